"""
Measure the CPU time of a training step, without a GPU.

    python tests/benchmarks/host.py                     # all cases, in less than five minutes
    python tests/benchmarks/host.py --cases lora        # those whose name contains a word

A GPU waits if the CPU cannot launch its kernels fast enough. SDXL's blocks and layers at tiny width have hardly
anything to compute, so the CPU time of a step on one thread is what launching costs. Each case runs in a process of
its own: the script's step, and a bare loop (noise, UNet, loss and optimizer, on ready latents and embeddings).
"generate" is a denoising step with guidance, by the pipeline and as a call of the UNet.

Operators are counted in bfloat16, as on a GPU; compiled code hides its operators from the counter. Times are taken in
float32, because a CPU without bfloat16 units would spend them on emulating it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace


sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
os.environ.update(
    {
        "ACCELERATE_USE_CPU": "true",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
)

import torch  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel  # noqa: E402
from estimate import SDXL_UNET  # noqa: E402
from small_world import build_pipeline, draw_pairs  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import train_diffusion_mapo_sdxl as script  # noqa: E402


RESOLUTION = 64  # latents of 8 x 8
WARMUP = 2  # the first call compiles
ROUNDS = 8

# SDXL's blocks and layers, each as narrow as possible.
KEPT = ("down_block_types", "up_block_types", "layers_per_block", "transformer_layers_per_block")
TOPOLOGY = {
    **{name: SDXL_UNET[name] for name in KEPT},
    "block_out_channels": (32, 32, 64),
    "attention_head_dim": (1, 1, 1),
    "norm_num_groups": 32,
}

# Flags of the script for each case.
CASES = {
    "generate": None,
    "generate, compile": None,
    "lora": {"rank": 16},
    "full": {},
    "lora, checkpointing": {"rank": 16, "gradient_checkpointing": True},
    "full, checkpointing": {"gradient_checkpointing": True},
    "lora, compile": {"rank": 16, "compile": True},
    "full, compile": {"compile": True},
    "lora, compile, checkpointing": {"rank": 16, "compile": True, "gradient_checkpointing": True},
    "full, compile, checkpointing": {"compile": True, "gradient_checkpointing": True},
}


def build_world(folder):
    """An SDXL pipeline of this topology, and a few pairs."""
    build_pipeline(folder / "pipeline")
    config = {**UNet2DConditionModel.load_config(folder / "pipeline" / "unet"), **TOPOLOGY}
    torch.manual_seed(0)
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "pipeline" / "unet")
    draw_pairs(folder / "pairs", num_pairs=4, num_shards=1)


def set_up(folder, flags, mixed_precision):
    """The script's Run and batches of one pair, as its `main` makes them."""
    # Forget the accelerator of an earlier call.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    flags = {
        "pretrained_model_name_or_path": folder / "pipeline",
        "dataset_name": folder / "pairs",
        "cache_dir": folder / "cache",
        "output_dir": folder / "out",
        "resolution": RESOLUTION,
        "train_batch_size": 1,
        "max_train_steps": 10**6,
        "mixed_precision": mixed_precision,
        "report_to": "none",
        "cache_latents": True,
        "seed": 0,
        **flags,
    }
    words = []
    for name, value in flags.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    args = script.parse_args(words)
    accelerator = script.build_accelerator(args)
    run, batches = script.set_up(args, accelerator)
    batches.read()
    return run, batches


def script_step(run, batches):
    """The script's own optimizer step, as a function without arguments."""
    stop = SimpleNamespace(requested=False)
    return lambda: script.train_step(run, batches, stop)


def bare_step(folder, run, batch):
    """The least that a step needs, on a UNet that `build_model` has prepared in the same way."""
    # The model and its optimizer.
    args = run.args
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder / "pipeline")
    pipeline.unet.requires_grad_(False)
    dtype = script.weight_dtype(run.accelerator)
    if args.rank is not None:
        pipeline.unet.to(dtype)
    unet = script.build_model(args, pipeline, {"unet": pipeline.unet}).train()
    optimizer = torch.optim.AdamW(script.trainable(unet), lr=1e-6, fused=True)

    # The batch, encoded once.
    latents = script.sample_latents(pipeline.vae, batch, vae_batch_size=1)
    conditions = script.encode_captions(pipeline, batch, dtype, train_text_encoder=False)
    noise = batch["noise"].repeat(2, 1, 1, 1)
    timesteps = batch["timesteps"].repeat(2)

    def step():
        noisy_latents = run.noise_scheduler.add_noise(latents, noise, timesteps)
        with script.autocast(args, run.accelerator):
            prediction = unet(noisy_latents, timesteps, **conditions).sample
        torch.nn.functional.mse_loss(prediction.float(), noise).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class OperatorCounter(TorchDispatchMode):
    """Counts the operators that PyTorch dispatches."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def build_steps(folder, flags, mixed_precision):
    """The step of the script and that of the bare loop, as functions without arguments."""
    run, batches = set_up(folder, flags, mixed_precision)
    return {"script": script_step(run, batches), "bare": bare_step(folder, run, batches.ready[0])}


def build_generation(folder, compiled):
    """One denoising step of the pipeline, with guidance, and what it needs of the UNet."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    if compiled:
        pipeline.unet.compile_repeated_blocks(dynamic=False)

    # Record what the pipeline passes to the UNet.
    calls = []
    hook = pipeline.unet.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    with torch.no_grad():
        embeds = dict(zip(names, pipeline.encode_prompt("a red circle")))

    def generate():
        return pipeline(**embeds, height=RESOLUTION, width=RESOLUTION, num_inference_steps=1, output_type="latent")

    generate()
    hook.remove()
    args, kwargs = calls[0]

    @torch.no_grad()
    def call_unet():
        return pipeline.unet(*args, **kwargs)

    return {"script": generate, "bare": call_unet}


def count_operators(steps):
    """Operators that each step dispatches, after a first one, in which optimizers create their states."""
    counts = {}
    for name, step in steps.items():
        step()
        with OperatorCounter() as counter:
            step()
        counts[name] = counter.count
    return counts


def measure(folder, case):
    """Operators and CPU seconds of the script's step and of the bare loop: `{"script": ..., "bare": ...}`."""
    torch.set_num_threads(1)
    compiled = "compile" in case
    if CASES[case] is None:
        steps = build_generation(folder, compiled)
        operators = {} if compiled else count_operators(steps)
    else:
        operators = {} if compiled else count_operators(build_steps(folder, CASES[case], "bf16"))
        steps = build_steps(folder, CASES[case], "no")

    results = {}
    for name, step in steps.items():
        torch._dynamo.reset()  # otherwise, the second UNet would be compared with what was compiled for the first
        for _ in range(WARMUP):
            step()
        seconds = []
        for _ in range(ROUNDS):
            started = time.process_time()
            step()
            seconds.append(time.process_time() - started)
        results[name] = {"operators": operators.get(name), "seconds": statistics.median(seconds)}
    return results


def print_table(results):
    print("| case | operators: script | bare loop | ratio | CPU ms: script | bare loop | ratio | of eager |")
    print("|---|---|---|---|---|---|---|---|")
    for name, result in results.items():
        ours = result["script"]
        bare = result["bare"]
        cells = [name, "-", "-", "-"]
        if ours["operators"] is not None:
            ratio = ours["operators"] / bare["operators"]
            cells = [name, f"{ours['operators']:,}", f"{bare['operators']:,}", f"{ratio:.3f}"]
        cells += [f"{1000 * ours['seconds']:.0f}", f"{1000 * bare['seconds']:.0f}"]
        cells.append(f"{ours['seconds'] / bare['seconds']:.2f}")

        eager = results.get(name.replace(", compile", ""))
        cells.append("-" if eager is None else f"{ours['seconds'] / eager['script']['seconds']:.2f}")
        print(f"| {' | '.join(cells)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # of a process that measures one case
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case is not None:
        print(json.dumps(measure(args.folder, args.case)))
        return

    results = {}
    with tempfile.TemporaryDirectory() as folder:
        build_world(Path(folder))
        for name in CASES:
            if args.cases in name:
                words = [sys.executable, __file__, "--case", name, "--folder", folder]
                output = subprocess.run(words, check=True, text=True, stdout=subprocess.PIPE).stdout
                results[name] = json.loads(output.splitlines()[-1])
    print_table(results)


if __name__ == "__main__":
    main()
