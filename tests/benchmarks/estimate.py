"""
Estimate what training SDXL base 1.0 takes at 1024 px, without a GPU: memory, FLOPs, and the times that follow from
them. The script's own functions run on fake tensors, which have shapes but no content.

    python tests/benchmarks/estimate.py            # all tables, in Markdown
    python tests/benchmarks/estimate.py --check    # compare the accounting with real steps of a small UNet on the CPU

Memory is the storage of every tensor that PyTorch's operators return. Left out are workspaces of convolutions and
matrix products, rounding and fragmentation of the allocator, and the CUDA context. DDP's buckets are the gradients.

FLOPs are those of matrix products, convolutions and attention; a multiply-add counts as two. Times assume a share of
the GPU's peak, and leave out loading data and the optimizer's step.
"""

import argparse
import gc
import json
import sys
import tempfile
import weakref
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import bitsandbytes
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection


sys.path.insert(0, str(Path(__file__).parents[2]))
import train_diffusion_mapo_sdxl as script  # noqa: E402


GIB = 2**30

# Flags of the runs whose memory is estimated. All of them also have --mixed_precision bf16.
RECIPES = [
    "--rank 16 --train_batch_size 1 --cache_latents --gradient_checkpointing",
    "--rank 16 --train_batch_size 4 --cache_latents --gradient_checkpointing",
    "--rank 16 --train_batch_size 1 --cache_latents",
    "--rank 16 --train_batch_size 3 --cache_latents",
    "--rank 16 --train_batch_size 1 --gradient_checkpointing",
    "--rank 16 --train_batch_size 1 --cache_latents --gradient_checkpointing --use_8bit_adam",
    "--rank 64 --lora_layers attention --train_batch_size 1 --cache_latents --gradient_checkpointing --use_8bit_adam",
    "--rank 64 --lora_layers transformer --train_batch_size 1 --cache_latents --gradient_checkpointing "
    "--use_8bit_adam",
    "--rank 64 --lora_layers all --train_batch_size 1 --cache_latents --gradient_checkpointing --use_8bit_adam",
    "--train_batch_size 1 --cache_latents --gradient_checkpointing",
    "--train_batch_size 1 --cache_latents --gradient_checkpointing --use_8bit_adam",
    "--train_batch_size 4 --cache_latents --gradient_checkpointing --use_8bit_adam",
    "--train_batch_size 2 --cache_latents --use_8bit_adam",
    "--train_batch_size 1 --cache_latents --gradient_checkpointing --use_8bit_adam --full_bf16",
    "--train_batch_size 4 --cache_latents --gradient_checkpointing --use_8bit_adam --full_bf16",
]

# For --check: one recipe for each kind of weights, optimizer and activations.
CHECKED = [
    "--cache_latents --gradient_checkpointing --train_batch_size 2",
    "--cache_latents --train_batch_size 2",
    "--cache_latents --gradient_checkpointing --train_batch_size 2 --use_8bit_adam",
    "--cache_latents --gradient_checkpointing --train_batch_size 2 --use_8bit_adam --full_bf16",
    "--cache_latents --train_batch_size 2 --use_8bit_adam --rank 16",
]

# Dense peaks in TFLOP/s, from NVIDIA's data sheets.
GPU_PEAKS = {
    "A100": {"bfloat16": 312, "TF32": 156, "float32": 19.5},
    "H100 SXM": {"bfloat16": 989, "TF32": 495, "float32": 67},
}

# The share of the peak that training reaches: NVIDIA's Stable Diffusion 2 in MLPerf Training v4.0 reached 31 %, with
# CUDA graphs and large batches.
TRAINING = 0.30
# The share that sampling reaches: SDXL in stock diffusers reaches 16 % (28 to 31 % with TensorRT).
SAMPLING = 0.16


# Models --------------------------------------------------------------------------------------------------------------

SDXL_UNET = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# The same shape with 47 M parameters, for --check.
SMALL_UNET = {
    **SDXL_UNET,
    "sample_size": 64,
    "block_out_channels": (64, 128, 256),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 4),
}
SDXL_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
}
CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
CLIP_BIGG = {
    **CLIP_L,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "projection_dim": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
}


@contextmanager
def default_dtype(dtype):
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(previous)


def parse_recipe(flags):
    """The script's arguments for a recipe."""
    needed = "--pretrained_model_name_or_path sdxl --dataset_name pairs --mixed_precision bf16"
    return script.parse_args([*needed.split(), *flags.split()])


def build_unet(args, config, device):
    """The UNet as the script prepares it for training."""
    dtype = torch.bfloat16 if args.rank else script.full_unet_dtype(args)
    with torch.device(device), default_dtype(dtype):
        unet = UNet2DConditionModel(**config).requires_grad_(False)
    script.build_model(args, SimpleNamespace(unet=unet), {"unet": unet})
    return unet.train()


def build_encoders(device, vae_dtype=torch.bfloat16):
    """SDXL's VAE and text encoders, with the names that they have in a pipeline."""
    with torch.device(device), default_dtype(vae_dtype):
        vae = AutoencoderKL(**SDXL_VAE)
    with torch.device(device), default_dtype(torch.bfloat16):
        text_encoder = CLIPTextModel(CLIPTextConfig(**CLIP_L))
        text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_BIGG))
    return SimpleNamespace(
        vae=vae.requires_grad_(False),
        text_encoder=text_encoder.requires_grad_(False),
        text_encoder_2=text_encoder_2.requires_grad_(False),
    )


def make_fake(*modules):
    """Move modules from the meta device into the active FakeTensorMode, which `Module.to` cannot do."""
    for module in modules:
        for part in module.modules():
            for name, value in part._parameters.items():
                if value is not None:
                    blank = torch.empty(value.shape, dtype=value.dtype)
                    part._parameters[name] = torch.nn.Parameter(blank, value.requires_grad)
            for name, value in part._buffers.items():
                part._buffers[name] = torch.empty(value.shape, dtype=value.dtype)


# A training step -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode(encoders, pairs):
    """What the encoders contribute to a batch."""
    side = encoders.vae.config.sample_size
    moments = script.encode_images(encoders.vae, torch.zeros(2 * pairs, 3, side, side, dtype=torch.uint8), 1)
    input_ids = torch.zeros(pairs, 2, 77, dtype=torch.long)
    prompt_embeds, pooled_prompt_embeds = script.encode_prompts(encoders, input_ids)
    return {"moments": moments, "prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}


def cached_encodings(unet, pairs):
    """The same, as it is read from a cache."""
    config = unet.config
    side = config.sample_size
    pooled_size = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return {
        "moments": torch.ones(2 * pairs, 2, 4, side, side, dtype=torch.bfloat16),
        "prompt_embeds": torch.ones(pairs, 77, config.cross_attention_dim, dtype=torch.bfloat16),
        "pooled_prompt_embeds": torch.ones(pairs, pooled_size, dtype=torch.bfloat16),
    }


def preference_loss(args, unet, encodings):
    """The script's loss of a batch."""
    pairs = args.train_batch_size
    side = unet.config.sample_size
    batch = {
        **encodings,
        "posterior_noise": torch.randn(2 * pairs, 4, side, side),
        "add_time_ids": torch.zeros(pairs, 6),
        "noise": torch.randn(pairs, 4, side, side),
        "timesteps": torch.zeros(pairs, dtype=torch.long),
    }
    run = SimpleNamespace(
        args=args,
        accelerator=SimpleNamespace(device=torch.device("cpu"), mixed_precision=args.mixed_precision),
        pipeline=SimpleNamespace(vae=SimpleNamespace(config=SimpleNamespace(scaling_factor=0.13025))),
        noise_scheduler=DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        model=unet,
    )
    loss, _ = script.preference_loss(run, batch)
    return loss


class TrainingStep:
    """An optimizer step on two accumulated batches, in parts whose peaks are recorded one by one."""

    def __init__(self, args, unet, encoders, meter):
        self.args = args
        self.unet = unet
        self.encoders = encoders
        self.meter = meter

        # Weights.
        meter.track_module(unet, "weights")
        if encoders is not None:
            for module in vars(encoders).values():
                meter.track_module(module, "encoders")

        # States of the optimizer, which it creates in its first step.
        self.parameters = script.trainable(unet)
        self.optimizer = script.build_optimizer(args, [self.parameters], pairs_per_step=1)
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for value in tree_leaves(list(self.optimizer.state.values())):
            if isinstance(value, torch.Tensor):
                meter.track(value, "states")

        # Gradients, when they are there.
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(lambda parameter: meter.track(parameter.grad, "gradients"))

    def parts(self):
        """The first batch, the second one (with the gradients of the first in memory), and the update."""
        return {
            "encoding": self.encode,
            "UNet": self.forward_and_backward,
            "next encoding": self.encode,
            "next UNet": self.forward_and_backward,
            "update": self.update,
        }

    def encode(self):
        if self.encoders is None:
            self.encodings = cached_encodings(self.unet, self.args.train_batch_size)
        else:
            self.encodings = encode(self.encoders, self.args.train_batch_size)

    def forward_and_backward(self):
        preference_loss(self.args, self.unet, self.encodings).backward()

    def update(self):
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()


# Memory --------------------------------------------------------------------------------------------------------------

# What a tensor is, in the order of the table's columns. Weight copies are those that autocast makes.
KINDS = ("weights", "gradients", "states", "encoders", "weight copies", "activations")


class StorageMeter(TorchDispatchMode):
    """Counts the bytes of all living storages by kind. `peak` has the counts when their sum was largest."""

    def __init__(self):
        super().__init__()
        self.kind_of = {}
        self.live = dict.fromkeys(KINDS, 0)
        self.restart()

    def restart(self):
        self.peak = dict(self.live)

    def track_module(self, module, kind):
        for tensor in [*module.parameters(), *module.buffers()]:
            self.track(tensor, kind)

    def track(self, tensor, kind):
        """Count a tensor's storage under a kind, from now until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = storage.nbytes()
        if key in self.kind_of:
            self.live[self.kind_of[key]] -= size
        else:
            weakref.finalize(storage, self.release, key, size)
        self.kind_of[key] = kind
        self.live[kind] += size
        if sum(self.live.values()) > sum(self.peak.values()):
            self.peak = dict(self.live)

    def release(self, key, size):
        self.live[self.kind_of.pop(key)] -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        kind = "activations"
        if func is torch.ops.aten._to_copy.default and self.is_weight(args[0]):
            kind = "weight copies"
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.kind_of:
                self.track(tensor, kind)
        return result

    def is_weight(self, tensor):
        return self.kind_of.get(tensor.untyped_storage()._cdata) == "weights"


@contextmanager
def norms_as_on_cuda():
    """Let autocast run normalizations in float32, as it does on CUDA but not on the CPU."""
    library = torch.library.Library("aten", "IMPL")
    without_autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def in_float32(operator):
        def run(*args):
            args = [value.float() if isinstance(value, torch.Tensor) else value for value in args]
            with torch._C._ExcludeDispatchKeyGuard(without_autocast):
                return operator(*args)

        return run

    for operator in (torch.ops.aten.group_norm.default, torch.ops.aten.layer_norm.default):
        library.impl(operator, in_float32(operator), "AutocastCPU")
    yield
    library._destroy()


@contextmanager
def fake_optimizers():
    """Give bitsandbytes' optimizers blank code books, because it can compute them on real tensors only."""

    def fill_qmap(optimizer):
        optimizer.name2qmap = {"dynamic": torch.empty(256), "udynamic": torch.empty(256)}

    with mock.patch.object(bitsandbytes.optim.AdamW8bit, "fill_qmap", fill_qmap):
        yield


def estimate_step(flags):
    """The peak of each part of SDXL's training step: {part: {kind: bytes}}."""
    args = parse_recipe(flags)
    unet = build_unet(args, SDXL_UNET, "meta")
    encoders = None if args.cache_latents else build_encoders("meta")
    with norms_as_on_cuda():
        return peaks_on_fake_tensors(args, unet, encoders)


def peaks_on_fake_tensors(args, unet, encoders=None):
    with FakeTensorMode(), fake_optimizers(), StorageMeter() as meter:
        make_fake(unet)
        if encoders is not None:
            make_fake(*vars(encoders).values())
        return peaks_of_parts(TrainingStep(args, unet, encoders, meter))


def peaks_of_parts(step):
    peaks = {}
    for name, part in step.parts().items():
        gc.collect()
        step.meter.restart()
        part()
        peaks[name] = step.meter.peak
    return peaks


def estimate_caching(vae_dtype):
    """The peak of encoding a cache, image by image, while the UNet waits on the CPU: {kind: bytes}."""
    encoders = build_encoders("meta", vae_dtype)
    with FakeTensorMode(), StorageMeter() as meter:
        make_fake(*vars(encoders).values())
        for module in vars(encoders).values():
            meter.track_module(module, "encoders")
        encode(encoders, pairs=1)
    return meter.peak


def in_gib(peak):
    return sum(peak.values()) / GIB


def print_memory():
    print("## Memory\n")
    print("GiB, estimated, with `--mixed_precision bf16`, without the CUDA context, workspaces and fragmentation.\n")
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        print(f"- Encoding a cache, with the VAE in {name}: {in_gib(estimate_caching(dtype)):.2f}", flush=True)

    print("\n`peak` is that of a step on one batch, `accumulating` that of a step on several batches. The columns")
    print("between them are the parts of `accumulating`.\n")
    print(f"| flags | peak | {' | '.join(KINDS)} | accumulating |")
    print("|---|" + "---|" * (len(KINDS) + 2))
    for flags in RECIPES:
        peaks = estimate_step(flags)
        first_batch = max(in_gib(peaks[part]) for part in ("encoding", "UNet", "update"))
        highest = max(peaks.values(), key=in_gib)
        parts = " | ".join(f"{highest[kind] / GIB:.2f}" for kind in KINDS)
        print(f"| `{flags}` | {first_batch:.1f} | {parts} | {in_gib(highest):.1f} |", flush=True)


# FLOPs and times -----------------------------------------------------------------------------------------------------


def count_tflop(function, *args):
    """The return value of a function, and its TFLOP."""
    # The counter does not know the CPU's fused attention.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        result = function(*args)
    return result, counter.get_total_flops() / 1e12


def count_encoders():
    """TFLOP of encoding the images of a pair and its caption, and of decoding two images."""
    encoders = build_encoders("meta")
    vae = encoders.vae
    with FakeTensorMode(), torch.no_grad():
        make_fake(*vars(encoders).values())
        pixel_values = torch.zeros(2, 3, 1024, 1024, dtype=torch.uint8)
        _, images = count_tflop(script.encode_images, vae, pixel_values, 1)
        _, caption = count_tflop(script.encode_prompts, encoders, torch.zeros(1, 2, 77, dtype=torch.long))
        _, decoding = count_tflop(vae.decode, torch.empty(2, 4, 128, 128, dtype=vae.dtype))
    return images, caption, decoding


def count_unet(flags):
    """TFLOP of the forward and of the backward pass of a pair."""
    args = parse_recipe(flags)
    unet = build_unet(args, SDXL_UNET, "meta")
    with FakeTensorMode():
        make_fake(unet)
        loss, forward = count_tflop(preference_loss, args, unet, cached_encodings(unet, pairs=1))
        _, backward = count_tflop(loss.backward)
    return forward, backward


def count_training():
    """TFLOP of a pair by part of a step: {what is trained: {part: TFLOP}}, and those of decoding two images."""
    images, caption, decoding = count_encoders()
    counts = {}
    flags_of = {
        "full UNet": "--train_batch_size 1 --cache_latents",
        "LoRA of rank 16": "--train_batch_size 1 --cache_latents --rank 16",
    }
    for trained, flags in flags_of.items():
        forward, backward = count_unet(flags)
        _, with_checkpointing = count_unet(f"{flags} --gradient_checkpointing")
        counts[trained] = {
            "images": images,
            "caption": caption,
            "forward": forward,
            "backward": backward,
            "recomputed": with_checkpointing - backward,
        }
    return counts, decoding


def step_times(tflop, peaks, checkpointing):
    """Seconds of a pair with cached encodings, and with the VAE in each precision."""
    unet = tflop["forward"] + tflop["backward"]
    if checkpointing:
        unet += tflop["recomputed"]
    cached = unet / peaks["bfloat16"] / TRAINING
    seconds = {"cached": cached}
    for precision, peak in peaks.items():
        encoding = tflop["images"] / peak + tflop["caption"] / peaks["bfloat16"]
        seconds[f"VAE in {precision}"] = cached + encoding / TRAINING
    return seconds


def print_flops_and_times():
    counts, decoding = count_training()

    print("\n## FLOPs\n")
    print("TFLOP of a pair (two images, one caption), counted on fake tensors:\n")
    parts = list(counts["full UNet"])
    print(f"| trained | {' | '.join(parts)} | cached, with checkpointing |")
    print("|---|" + "---|" * (len(parts) + 1))
    for trained, tflop in counts.items():
        unet = tflop["forward"] + tflop["backward"] + tflop["recomputed"]
        print(f"| {trained} | {' | '.join(f'{tflop[part]:.2f}' for part in parts)} | {unet:.2f} |")

    print("\n## Times\n")
    print(f"Seconds of a pair, estimated at {TRAINING:.0%} of the GPU's dense peak. PyTorch runs the convolutions of")
    print("a float32 VAE in TF32 unless told otherwise.\n")
    columns = ["cached", *(f"VAE in {precision}" for precision in GPU_PEAKS["A100"])]
    print(f"| GPU | trained | checkpointing | {' | '.join(columns)} |")
    print("|---|---|---|" + "---|" * len(columns))
    for gpu, peaks in GPU_PEAKS.items():
        for trained, tflop in counts.items():
            for checkpointing in ("yes", "no"):
                seconds = step_times(tflop, peaks, checkpointing == "yes")
                cells = " | ".join(f"{seconds[column]:.3f}" for column in columns)
                print(f"| {gpu} | {trained} | {checkpointing} | {cells} |")

    # With guidance, each of the 50 steps is a forward pass of two images, as that of a pair.
    sampling = 2 * 50 * counts["full UNet"]["forward"] + decoding
    hours = 1000 * sampling / GPU_PEAKS["H100 SXM"]["bfloat16"] / SAMPLING / 3600
    print(f"\nGenerating 1,000 pairs on an H100 (50 steps with guidance, {sampling:.0f} TFLOP for each pair) without")
    print(f"`--compile`, estimated at {SAMPLING:.0%} of the dense peak: {hours:.1f} hours.")


# Check ---------------------------------------------------------------------------------------------------------------


def allocated_peak(function):
    """How many bytes the use of PyTorch's CPU allocator grows at most while a function runs, by the profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]

    changes = []
    for event in events:
        if event["name"] == "[memory]":
            changes.append((event["ts"], event["args"]["Bytes"]))
    changes.sort(key=lambda change: change[0])

    level = 0
    peak = 0
    for _, size in changes:
        level += size
        peak = max(peak, level)
    return peak


def profile_step(args):
    """Bytes at the peak of each part of a real step on the CPU: storages before it, and the allocator's growth."""
    meter = StorageMeter()
    step = TrainingStep(args, build_unet(args, SMALL_UNET, "cpu"), None, meter)
    peaks = {}
    for name, part in step.parts().items():
        before = sum(meter.live.values())
        peaks[name] = before + allocated_peak(part)
    return peaks


def check():
    """Compare fake tensors, real ones, and PyTorch's allocator."""
    print("| flags | part | MiB on fake tensors | on real tensors | by the allocator | fake / allocator |")
    print("|---|---|---|---|---|---|")
    for flags in CHECKED:
        args = parse_recipe(flags)
        fake = peaks_on_fake_tensors(args, build_unet(args, SMALL_UNET, "meta"))
        with StorageMeter() as meter:
            real = peaks_of_parts(TrainingStep(args, build_unet(args, SMALL_UNET, "cpu"), None, meter))
        profiled = profile_step(args)
        for part, size in profiled.items():
            sizes = [sum(fake[part].values()), sum(real[part].values()), size]
            cells = " | ".join(f"{size / 2**20:.1f}" for size in sizes)
            print(f"| `{flags}` | {part} | {cells} | {sizes[0] / size:.3f} |", flush=True)
    print("\nIn the update, bitsandbytes' CPU kernel makes temporaries that its CUDA kernel does not make.")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with real steps of a small UNet on the CPU")
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.check:
        check()
    else:
        print_memory()
        print_flops_and_times()


if __name__ == "__main__":
    main()
