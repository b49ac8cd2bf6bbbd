"""Compute the peak memory of a training step of SDXL without a GPU, on fake tensors.

    python tests/benchmarks/memory.py                # SDXL base 1.0 at 1024 px, every recipe
    python tests/benchmarks/memory.py --phases       # encoding and training with a cache, for the README's table
    python tests/benchmarks/memory.py --check        # a small UNet: the same accounting against a real step on CPU

The storage of every tensor that PyTorch's operators return is counted. Not counted are workspaces of convolutions and
matrix products, rounding and fragmentation of the allocator, the CUDA context. DDP's buckets are the gradients.
"""

import argparse
import gc
import json
import sys
import tempfile
import weakref
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import bitsandbytes
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection


sys.path.insert(0, str(Path(__file__).parents[2]))
import train_diffusion_mapo_sdxl as script  # noqa: E402


GIB = 2**30
# A 24 GB card, less the CUDA context and the libraries' own memory.
BUDGET = 24 - 0.7
KINDS = ("weights", "gradients", "states", "encoders", "weight copies", "activations")

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
# The same shape at 47 M parameters, for --check.
SMALL_UNET = SDXL_UNET | {
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
CLIP_BIGG = CLIP_L | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "projection_dim": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
}


def build_encoders():
    """SDXL's VAE and two text encoders."""
    return (
        AutoencoderKL(**SDXL_VAE),
        CLIPTextModel(CLIPTextConfig(**CLIP_L)),
        CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_BIGG)),
    )


@contextmanager
def default_dtype(dtype):
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(previous)


@dataclass
class Recipe:
    name: str
    optimizer: str = "AdamW8bit"
    rank: int | None = None
    layers: str = "all"
    weights: torch.dtype = torch.float32
    checkpointing: bool = True
    encoders: bool = True
    pairs: int = 1
    # Gradients: "kept", or "released" by stepping in backward. States: on the "gpu", or on the "cpu" for free.
    gradients: str = "kept"
    states: str = "gpu"
    cache_casts: bool = True

    @property
    def autocast(self):
        """Weights that are all bfloat16 need none."""
        return self.rank is not None or self.weights == torch.float32


def recipes():
    adamw8bit = Recipe("float32, 8-bit AdamW")
    gone = replace(adamw8bit, encoders=False)
    uncached = replace(gone, name="float32, 8-bit AdamW, casts not cached", cache_casts=False)
    rounded = Recipe("bfloat16, stochastic rounding, 8-bit AdamW", "Rounded", weights=torch.bfloat16)
    lora = Recipe("LoRA rank 16, 8-bit AdamW", rank=16, weights=torch.bfloat16)
    return [
        Recipe("float32, AdamW (foreach)", "foreach"),
        Recipe("float32, AdamW (fused)", "fused"),
        Recipe("float32, AdamW (fused)", "fused", encoders=False),
        *[replace(adamw8bit, encoders=encoders, pairs=pairs) for pairs in (1, 4) for encoders in (True, False)],
        *[replace(uncached, encoders=encoders, pairs=pairs) for pairs in (1, 4) for encoders in (True, False)],
        replace(gone, checkpointing=False),
        replace(gone, name=f"{gone.name}, gradients released", gradients="released"),
        replace(uncached, name=f"{uncached.name}, gradients released", gradients="released"),
        replace(gone, name=f"{gone.name}, states on CPU", states="cpu"),
        replace(uncached, name=f"{uncached.name}, states on CPU", states="cpu"),
        *[replace(rounded, encoders=encoders, pairs=pairs) for pairs in (1, 4) for encoders in (True, False)],
        replace(rounded, name=f"{rounded.name}, gradients released", encoders=False, gradients="released"),
        *[replace(lora, checkpointing=on, encoders=encoders) for on in (True, False) for encoders in (True, False)],
        *[
            Recipe(f"LoRA rank 64, {layers}", rank=64, layers=layers, weights=torch.bfloat16, encoders=False)
            for layers in script.LORA_LAYERS
        ],
    ]


class StorageMeter(TorchDispatchMode):
    """Bytes of all living storages by kind, and their split when the sum was largest."""

    def __init__(self):
        super().__init__()
        self.kind_of, self.live = {}, dict.fromkeys(KINDS, 0)
        self.restart()

    def restart(self):
        self.peak = dict(self.live)

    def track(self, tensor, kind):
        """Count a tensor's storage under a kind, `None` for one that is not on the GPU."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.kind_of:
            self.add(self.kind_of[key], -size)
        else:
            weakref.finalize(storage, self.release, key, size)
        self.kind_of[key] = kind
        self.add(kind, size)
        if sum(self.live.values()) > sum(self.peak.values()):
            self.peak = dict(self.live)

    def release(self, key, size):
        self.add(self.kind_of.pop(key), -size)

    def add(self, kind, size):
        if kind is not None:
            self.live[kind] += size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        copies = func is torch.ops.aten._to_copy.default and self.is_weight(args[0])
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.kind_of:
                self.track(tensor, "weight copies" if copies else "activations")
        return result

    def is_weight(self, tensor):
        return self.kind_of.get(tensor.untyped_storage()._cdata) == "weights"


@contextmanager
def norms_as_on_cuda():
    """Autocast runs normalizations in float32 on CUDA, on CPU it does not; let it do so here."""
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


class Rounded(script.StochasticRounding, bitsandbytes.optim.AdamW8bit):
    """8-bit AdamW on bfloat16 weights, as the script steps them."""


def build_optimizers(recipe, parameters, fake):
    """One optimizer, or one for each parameter where gradients are released."""
    groups = [[parameter] for parameter in parameters] if recipe.gradients == "released" else [parameters]
    if recipe.optimizer in ("foreach", "fused"):
        return [torch.optim.AdamW(group, **{recipe.optimizer: True}) for group in groups]
    optimizer_class = Rounded if recipe.optimizer == "Rounded" else bitsandbytes.optim.AdamW8bit
    with mock.patch.object(optimizer_class, "fill_qmap", blank_maps) if fake else nullcontext():
        return [optimizer_class(group) for group in groups]


def blank_maps(optimizer):
    """bitsandbytes computes its code books on real tensors only."""
    optimizer.name2qmap = {name: torch.empty(256) for name in ("dynamic", "udynamic")}


def build_models(recipe, unet_config, device):
    """The UNet, with the recipe's trainable weights, and the encoders."""
    with torch.device(device), default_dtype(recipe.weights):
        unet = UNet2DConditionModel(**unet_config)
    with torch.device(device), default_dtype(torch.bfloat16):
        encoders = [part.requires_grad_(False) for part in build_encoders()] if recipe.encoders else []
    if recipe.autocast:
        unet.requires_grad_(recipe.rank is None)
        flags = ["--pretrained_model_name_or_path=sdxl", "--dataset_name=pairs"]
        flags += [f"--rank={recipe.rank}", f"--lora_layers={recipe.layers}"] if recipe.rank else []
        flags += ["--gradient_checkpointing"] if recipe.checkpointing else []
        script.build_model(script.parse_args(flags), argparse.Namespace(unet=unet), {"unet": unet})
    elif recipe.checkpointing:
        unet.enable_gradient_checkpointing()
    return unet.train(), encoders


def as_fake(module):
    """Move a module from the meta device into the fake mode, where `Module.to` cannot."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                blank = torch.empty(value.shape, dtype=value.dtype)
                part._parameters[name] = torch.nn.Parameter(blank, value.requires_grad)
        for name, value in part._buffers.items():
            part._buffers[name] = torch.empty(value.shape, dtype=value.dtype)


@torch.no_grad()
def encode_images(recipe, vae):
    pixels = torch.zeros(2 * recipe.pairs, 3, vae.config.sample_size, vae.config.sample_size, dtype=torch.uint8)
    return vae.encode(pixels.to(vae.dtype) / 127.5 - 1).latent_dist.sample().float()


@torch.no_grad()
def encode_captions(recipe, text_encoder, text_encoder_2):
    tokens = torch.zeros(recipe.pairs, 77, dtype=torch.long)
    first = text_encoder(tokens, output_hidden_states=True)
    second = text_encoder_2(tokens, output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second[0]


def random_encodings(recipe, unet):
    """In place of the encoders' output: latents, prompt embeddings, pooled prompt embeddings."""
    config, pairs = unet.config, recipe.pairs
    return (
        torch.randn(2 * pairs, 4, config.sample_size, config.sample_size),
        torch.randn(pairs, 77, config.cross_attention_dim, dtype=torch.bfloat16),
        torch.randn(pairs, config.projection_class_embeddings_input_dim - 6 * 256, dtype=torch.bfloat16),
    )


def preference_loss(recipe, unet, encoded):
    pairs, side = recipe.pairs, unet.config.sample_size
    latents, prompt_embeds, pooled_prompt_embeds = encoded
    conditions = {
        "text_embeds": pooled_prompt_embeds.repeat(2, 1),
        "time_ids": torch.zeros(2 * pairs, 6, dtype=torch.bfloat16),
    }
    prompt_embeds = prompt_embeds.repeat(2, 1, 1)
    noise = torch.randn(pairs, 4, side, side)
    timesteps = torch.zeros(pairs, dtype=torch.long)
    noise_scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    autocast = torch.autocast("cpu", torch.bfloat16, cache_enabled=recipe.cache_casts)
    with autocast if recipe.autocast else nullcontext():
        errors = script.denoising_errors(unet, noise_scheduler, latents, prompt_embeds, conditions, noise, timesteps)
    return script.mapo_loss(*errors, beta=8.0)[0].mean()


class Step:
    """The parts of one training step, in the order the script runs them."""

    def __init__(self, recipe, unet, encoders, meter, fake):
        self.recipe, self.unet, self.encoders, self.meter = recipe, unet, encoders, meter
        for module, kind in [(unet, "weights"), *((part, "encoders") for part in encoders)]:
            for tensor in [*module.parameters(), *module.buffers()]:
                meter.track(tensor, kind)
        self.parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        self.optimizers = build_optimizers(recipe, self.parameters, fake)
        self.make_states()
        for i, parameter in enumerate(self.parameters):
            hook = self.release if recipe.gradients == "released" else self.keep
            parameter.register_post_accumulate_grad_hook(partial(hook, i=i))

    def parts(self):
        """An optimizer step after two forward passes; after one, where gradients are released."""
        parts = {"encoding": self.encode, "UNet": self.forward_backward}
        if self.recipe.gradients == "kept":
            parts |= {"next encoding": self.encode, "next UNet": self.forward_backward, "update": self.update}
        return parts

    def make_states(self):
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
            for tensor in tree_leaves(list(optimizer.state.values())):
                if isinstance(tensor, torch.Tensor):
                    self.meter.track(tensor, "states" if self.recipe.states == "gpu" else None)

    def keep(self, parameter, i):
        self.meter.track(parameter.grad, "gradients")

    def release(self, parameter, i):
        self.meter.track(parameter.grad, "gradients")
        self.optimizers[i].step()
        self.optimizers[i].zero_grad()

    def encode(self):
        latents, *embeds = random_encodings(self.recipe, self.unet)
        if self.encoders:
            vae, *text_encoders = self.encoders
            latents, embeds = encode_images(self.recipe, vae), encode_captions(self.recipe, *text_encoders)
        self.encoded = latents, *embeds

    def forward_backward(self):
        preference_loss(self.recipe, self.unet, self.encoded).backward()

    def update(self):
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()


def account(recipe, unet_config, fake=True, as_on_cuda=True):
    """Bytes by kind at the peak of each part of a step: one forward and backward pass, another one, the update."""
    peaks = {}
    unet, encoders = build_models(recipe, unet_config, "meta" if fake else "cpu")
    with ExitStack() as stack:
        if as_on_cuda:
            stack.enter_context(norms_as_on_cuda())
        if fake:
            stack.enter_context(FakeTensorMode())
            for module in (unet, *encoders):
                as_fake(module)
        meter = stack.enter_context(StorageMeter())
        step = Step(recipe, unet, encoders, meter, fake)
        for name, part in step.parts().items():
            gc.collect()
            meter.restart()
            part()
            peaks[name] = meter.peak
        num_parameters = sum(parameter.numel() for parameter in step.unet.parameters())
    return {"parameters": num_parameters, "peaks": peaks}


def total(peak):
    return sum(peak.values()) / GIB


def table_row(recipe, peaks):
    """One line of the table: the split at the highest peak, then the peaks without and with accumulation."""
    single = max(total(peak) for name, peak in peaks.items() if not name.startswith("next"))
    part, highest = max(peaks.items(), key=lambda item: total(item[1]))
    accumulating = total(highest)
    fits = "yes" if accumulating <= BUDGET else "without accumulation" if single <= BUDGET else "no"
    cells = [
        recipe.name,
        str(recipe.pairs),
        "yes" if recipe.checkpointing else "no",
        "resident" if recipe.encoders else "gone",
        *(f"{highest[kind] / GIB:.2f}" for kind in KINDS),
        part,
        f"{single:.1f}",
        "impossible" if recipe.gradients == "released" else f"{accumulating:.1f}",
        fits,
    ]
    return f"| {' | '.join(cells)} |"


def compute(only, file):
    header = ["recipe", "pairs", "checkpointing", "encoders", *KINDS, "peak in", "peak", "accumulating", "fits 24 GB"]
    print("Estimated, in GiB, without workspaces and fragmentation.\n")
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
    results = []
    for recipe in [recipe for recipe in recipes() if only in recipe.name]:
        result = account(recipe, SDXL_UNET)
        print(table_row(recipe, result["peaks"]), flush=True)
        results.append(asdict(recipe) | {"weights": str(recipe.weights)} | result)
    if file:
        file.write_text(json.dumps(results, indent=2) + "\n")


def account_cache(vae_dtype):
    """Bytes by kind at the peak of encoding a cache, image by image, while the UNet waits on the CPU."""
    recipe = Recipe("cache")
    with torch.device("meta"), default_dtype(torch.bfloat16):
        vae, *text_encoders = (part.requires_grad_(False) for part in build_encoders())
    vae.to(vae_dtype)
    with FakeTensorMode(), StorageMeter() as meter:
        for module in (vae, *text_encoders):
            as_fake(module)
            for tensor in [*module.parameters(), *module.buffers()]:
                meter.track(tensor, "encoders")
        pixels = torch.zeros(1, 3, vae.config.sample_size, vae.config.sample_size)
        with torch.no_grad():
            vae.encode(pixels.to(vae_dtype))
        encode_captions(recipe, *text_encoders)
    return meter.peak


def print_phases():
    """The peaks of encoding a cache and of training on it, where only what a phase needs is on the GPU."""
    print("| phase of a run with --cache_latents | checkpointing | pairs | GiB, estimated |\n|---|---|---|---|")
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        print(f"| encoding, VAE in {name}, image by image | | | {total(account_cache(dtype)):.1f} |")

    lora = Recipe("LoRA of rank 16, AdamW (fused)", "fused", rank=16, weights=torch.bfloat16, encoders=False)
    full = Recipe("full UNet, 8-bit AdamW", encoders=False)
    for recipe in (
        lora,
        replace(lora, pairs=4),
        replace(lora, checkpointing=False),
        replace(lora, checkpointing=False, pairs=3),
        replace(full, checkpointing=False, pairs=2),
    ):
        peak = max(map(total, account(recipe, SDXL_UNET)["peaks"].values()))
        shown = "yes" if recipe.checkpointing else "no"
        print(f"| training, {recipe.name} | {shown} | {recipe.pairs} | {peak:.1f} |", flush=True)


def allocated_peak(function):
    """Peak growth in bytes of PyTorch's CPU allocator while a function runs, as the profiler recorded it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    level = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        level += change
        peak = max(peak, level)
    return peak


def measure(recipe, unet_config):
    """The peaks of a real step on CPU in bytes: the live storage before it, plus the growth of the allocator."""
    meter = StorageMeter()
    step = Step(recipe, *build_models(recipe, unet_config, "cpu"), meter, fake=False)
    peaks = {}
    for name, part in step.parts().items():
        before = sum(meter.live.values())
        peaks[name] = before + allocated_peak(part)
    return peaks


def check():
    print("| recipe | checkpointing | part | computed, MiB | tracked | profiled | computed / profiled |")
    print("|---|---|---|---|---|---|---|")
    choices = [
        Recipe("float32, AdamW", "foreach", encoders=False, pairs=2),
        Recipe("float32, AdamW", "foreach", encoders=False, pairs=2, checkpointing=False),
        Recipe("float32, 8-bit AdamW", encoders=False, pairs=2),
        Recipe("bfloat16, 8-bit AdamW", "Rounded", weights=torch.bfloat16, encoders=False, pairs=2),
        Recipe("LoRA, 8-bit AdamW", rank=16, weights=torch.bfloat16, encoders=False, pairs=2, checkpointing=False),
    ]
    for recipe in choices:
        computed = account(recipe, SMALL_UNET, as_on_cuda=False)["peaks"]
        tracked = account(recipe, SMALL_UNET, fake=False, as_on_cuda=False)["peaks"]
        profiled = measure(recipe, SMALL_UNET)
        for part, size in profiled.items():
            sizes = [sum(computed[part].values()), sum(tracked[part].values()), size]
            cells = [recipe.name, "yes" if recipe.checkpointing else "no", part, *(f"{s / 2**20:.1f}" for s in sizes)]
            print(f"| {' | '.join(cells)} | {sizes[0] / size:.3f} |", flush=True)
    print("\nIn the update, bitsandbytes' CPU kernel makes temporaries that its CUDA kernel does not.")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="compute the recipes with this in their names")
    parser.add_argument("--json", type=Path, help="also write the bytes of every part of a step there")
    parser.add_argument("--phases", action="store_true", help="the phases of cached runs, for the README's table")
    parser.add_argument("--check", action="store_true", help="compare with a real step of a small UNet on CPU")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.check:
        check()
    elif args.phases:
        print_phases()
    else:
        compute(args.only, args.json)


if __name__ == "__main__":
    main()
