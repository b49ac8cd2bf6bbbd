"""
Step time and memory of the script against a bare loop, on a CPU.

    python tests/benchmarks/speed.py --rounds 3 --json speed.json
    python tests/benchmarks/speed.py --show speed.json     # only print the table of earlier measurements
    python tests/benchmarks/speed.py --rounds 1 --toy      # a tiny model and few steps, to see that all parts run

The bare loop is the UNet's forward and backward pass and the optimizer's step, on ready latents and embeddings. The
script is also compared with itself without its one reduction and one read of the device per optimizer step: then it
takes constants instead of what it would read.

Every measurement is a process of its own, and each round makes all of them, so that a machine that is slow for a while
is slow for all.
"""

import argparse
import json
import os
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel  # noqa: E402
from small_world import build_pipeline, draw_pairs  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "train_diffusion_mapo_sdxl.py"
PAIRS = 2
RANK = 8


@dataclass
class Scale:
    """How much is computed."""

    resolution: int = 256
    warmup: int = 2
    steps: int = 6


TOY = Scale(resolution=64, warmup=1, steps=2)


def build_world(folder, toy):
    """A pipeline whose parts cost about what SDXL's cost relative to each other, and pairs to train on."""
    scale = TOY if toy else Scale()
    build_pipeline(folder / "pipeline")
    draw_pairs(folder / "pairs", num_pairs=32, size=scale.resolution)
    if toy:
        return

    pipeline = StableDiffusionXLPipeline.from_pretrained(folder / "pipeline")
    unet_config = {
        **pipeline.unet.config,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (96, 192, 384),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 4),
        "attention_head_dim": (2, 4, 8),
        "norm_num_groups": 32,
    }
    vae_config = {
        **pipeline.vae.config,
        "block_out_channels": (16, 32, 64, 64),
        "layers_per_block": 2,
        "norm_num_groups": 8,
    }
    torch.manual_seed(0)
    pipeline.unet = UNet2DConditionModel.from_config(unet_config)
    pipeline.vae = AutoencoderKL.from_config(vae_config)
    pipeline.save_pretrained(folder / "pipeline")


# Measurements in processes of their own ------------------------------------------------------------------------------


def report(seconds, **more):
    """Print the result of this process, with its peak of resident memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": seconds, "gib": peak, **more}))


def time_step(step, scale):
    """Mean seconds of a call, after the warmup."""
    for _ in range(scale.warmup):
        step()
    start = time.perf_counter()
    for _ in range(scale.steps):
        step()
    return (time.perf_counter() - start) / scale.steps


def run_bare_loop(folder, full, scale):
    """The optimum: only the UNet, its gradients and the optimizer."""
    import bitsandbytes
    from peft import LoraConfig

    # Model and optimizer.
    unet = UNet2DConditionModel.from_pretrained(folder / "pipeline", subfolder="unet")
    if not full:
        unet.requires_grad_(False)
        targets = ["to_k", "to_q", "to_v", "to_out.0"]
        unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=targets))
    unet.train()
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = bitsandbytes.optim.AdamW8bit(parameters, lr=1e-5)

    # One batch.
    noise_scheduler = DDPMScheduler.from_pretrained(folder / "pipeline", subfolder="scheduler")
    config = unet.config
    side = scale.resolution // 8
    latents = torch.randn(2 * PAIRS, 4, side, side)
    noise = torch.randn(2 * PAIRS, 4, side, side)
    timesteps = torch.randint(1000, (2 * PAIRS,))
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    embeds = torch.randn(2 * PAIRS, 77, config.cross_attention_dim)
    pooled_dim = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    conditions = {
        "text_embeds": torch.randn(2 * PAIRS, pooled_dim),
        "time_ids": torch.zeros(2 * PAIRS, 6),
    }

    def step():
        prediction = unet(noisy_latents, timesteps, embeds, added_cond_kwargs=conditions, return_dict=False)[0]
        torch.nn.functional.mse_loss(prediction, noise).backward()
        optimizer.step()
        optimizer.zero_grad()

    report(time_step(step, scale), parameters=sum(parameter.numel() for parameter in unet.parameters()))


@torch.no_grad()
def run_encoders(folder, scale):
    """VAE and text encoders on one batch."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder / "pipeline")
    pixels = torch.rand(2 * PAIRS, 3, scale.resolution, scale.resolution)

    def step():
        pipeline.vae.encode(pixels)
        pipeline.encode_prompt(PAIRS * ["a red circle"], do_classifier_free_guidance=False)

    report(time_step(step, scale))


class Constants:
    """Takes the place of a reduced tensor: as many zeros, which need not be waited for."""

    def __init__(self, tensor):
        self.size = len(tensor)

    def tolist(self):
        return self.size * [0.0]


def run_unsynchronized(words):
    """The script, with constants for what it reads in each optimizer step."""
    Accelerator.reduce = lambda accelerator, tensor: Constants(tensor)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


# All measurements ----------------------------------------------------------------------------------------------------

# The script with and without the reduction, by number of processes.
SYNCHRONIZED = {
    1: "script, LoRA, cached, 1 process",
    2: "script, LoRA, cached, 2 processes",
}
UNSYNCHRONIZED = "unsynchronized"


def measure_here(part, folder, toy):
    """A part of this file, in a process of its own."""
    words = [sys.executable, __file__, part, str(folder)]
    if toy:
        words.append("--toy")
    result = subprocess.run(words, check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def measure_script(folder, toy, full, cached, processes=1, synchronized=True):
    """The script through its launcher. Seconds of a step are from its own log, after the warmup."""
    scale = TOY if toy else Scale()
    options = {
        "pretrained_model_name_or_path": folder / "pipeline",
        "dataset_name": folder / "pairs",
        "cache_dir": folder / "cache",
        "resolution": scale.resolution,
        "train_batch_size": PAIRS,
        "max_train_steps": scale.warmup + scale.steps,
        "logging_steps": 1,
        "seed": 0,
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(SCRIPT)] if synchronized else [__file__, UNSYNCHRONIZED, str(SCRIPT)]
    command.append("--use_8bit_adam")
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    if processes == 1:
        command += ["--dataloader_num_workers", "1"]  # two processes have both cores to themselves
    if not full:
        command += ["--rank", str(RANK), "--lora_layers", "attention"]
    if cached:
        command.append("--cache_latents")

    with tempfile.TemporaryDirectory() as output_dir:
        start = time.time()
        env = {**os.environ, "ACCELERATE_USE_CPU": "true"}
        subprocess.run([*command, "--output_dir", output_dir], check=True, stderr=subprocess.DEVNULL, env=env)
        events = EventAccumulator(str(next(Path(output_dir).glob("logs/**/events*")).parent)).Reload()
        speeds = [event.value for event in events.Scalars("pairs_per_second")][scale.warmup :]
        return {
            "seconds": statistics.mean(processes * PAIRS / speed for speed in speeds),
            "gib": events.Scalars("peak_memory_gib")[-1].value,
            "first_step": events.Scalars("loss")[0].wall_time - start,
        }


def measure_imports():
    """Time that the script takes before it reads its arguments."""
    start = time.perf_counter()
    subprocess.run([sys.executable, SCRIPT, "--help"], check=True, capture_output=True)
    return {"seconds": time.perf_counter() - start, "gib": 0}


def measure_round(folder, toy):
    """All measurements, once: {name: result}."""
    results = {"encoding": measure_here("encoders", folder, toy)}
    for trained in ("LoRA", "full UNet"):
        full = trained == "full UNet"
        results[f"bare loop, {trained}"] = measure_here("full" if full else "lora", folder, toy)
        results[f"script, {trained}, cached"] = measure_script(folder, toy, full, cached=True)
        results[f"script, {trained}, uncached"] = measure_script(folder, toy, full, cached=False)
    for processes, name in SYNCHRONIZED.items():
        results[name] = measure_script(folder, toy, full=False, cached=True, processes=processes)
        results[f"{name}, {UNSYNCHRONIZED}"] = measure_script(
            folder, toy, full=False, cached=True, processes=processes, synchronized=False
        )
    results["imports"] = measure_imports()
    return results


COLUMNS = [
    "",
    "s/step, median (least to most)",
    "against the bare loop",
    "against bare loop + encoding",
    "peak GiB",
    "s from launch to first step",
]


def print_table(results):
    """`results` is {measurement: one result for each round}."""

    def median(name, key="seconds"):
        return statistics.median(result[key] for result in results[name])

    print(f"| {' | '.join(COLUMNS)} |")
    print("|---" * len(COLUMNS) + "|")
    for name, runs in results.items():
        seconds = [run["seconds"] for run in runs]
        spread = f"{median(name):.3f} ({min(seconds):.3f} to {max(seconds):.3f})"
        ratio = ""
        ratio_with_encoding = ""
        if ", " in name:
            bare = median(f"bare loop, {name.split(', ')[1]}")
            ratio = f"{median(name) / bare:.2f}"
            if "uncached" in name:
                ratio_with_encoding = f"{median(name) / (bare + median('encoding')):.2f}"
        first_step = f"{median(name, 'first_step'):.1f}" if "first_step" in runs[0] else ""
        cells = [name, spread, ratio, ratio_with_encoding, f"{median(name, 'gib'):.2f}", first_step]
        print(f"| {' | '.join(cells)} |")

    print("\nStep time with the reduction and the read of the device, against none (medians; each round):\n")
    for name in SYNCHRONIZED.values():
        without = f"{name}, {UNSYNCHRONIZED}"
        ratios = []
        for run, other in zip(results[name], results[without]):
            ratios.append(f"{run['seconds'] / other['seconds']:.3f}")
        print(f"- {name}: {median(name) / median(without):.3f} ({', '.join(ratios)})")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["encoders", "full", "lora"], help=argparse.SUPPRESS)
    parser.add_argument("folder", nargs="?", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3, help="how often to repeat all measurements")
    parser.add_argument("--json", type=Path, help="where to write all measurements")
    parser.add_argument("--show", type=Path, help="measure nothing, but print the table of such a file")
    parser.add_argument("--toy", action="store_true", help="a tiny model and few steps, to see that all parts run")
    args = parser.parse_args()
    torch.set_num_threads(1)

    # One measurement, in a process that `measure_here` has started.
    scale = TOY if args.toy else Scale()
    if args.part == "encoders":
        return run_encoders(args.folder, scale)
    if args.part is not None:
        return run_bare_loop(args.folder, args.part == "full", scale)

    if args.show is not None:
        return print_table(json.loads(args.show.read_text()))

    results = {}
    with tempfile.TemporaryDirectory() as folder:
        build_world(Path(folder), args.toy)
        for _ in range(args.rounds):
            for name, result in measure_round(Path(folder), args.toy).items():
                results.setdefault(name, []).append(result)
    print_table(results)
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == [UNSYNCHRONIZED]:
        run_unsynchronized(sys.argv[2:])
    else:
        main()
