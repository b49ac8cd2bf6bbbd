"""
Step time and memory of the script against the bare loop: the UNet's forward and backward pass and the optimizer's step
on ready latents and embeddings; and the cost of the script's one reduction and one read of the device per optimizer
step, against a run that takes constants in their place. Every measurement is a process of its own; rounds take turns,
so that a machine that is slow for a while is slow for all.

    python tests/benchmarks/speed.py --rounds 3 --json speed.json
    python tests/benchmarks/speed.py --rounds 1 --toy    # only to see that it runs
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
TOY = "--toy" in sys.argv
PAIRS, RESOLUTION, RANK = 2, 64 if TOY else 256, 8
WARMUP, STEPS = (1, 2) if TOY else (2, 6)


def build_world(folder):
    """An SDXL-shaped pipeline whose parts cost about what SDXL's cost each other, and pairs to train on."""
    build_pipeline(folder / "pipeline")
    draw_pairs(folder / "pairs", num_pairs=32, size=RESOLUTION)
    if TOY:
        return
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder / "pipeline")
    unet, vae = dict(pipeline.unet.config), dict(pipeline.vae.config)
    unet.update(block_out_channels=(96, 192, 384), layers_per_block=2, transformer_layers_per_block=(1, 2, 4))
    unet.update(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"))
    unet.update(up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))
    unet.update(attention_head_dim=(2, 4, 8), norm_num_groups=32)
    vae.update(block_out_channels=(16, 32, 64, 64), layers_per_block=2, norm_num_groups=8)
    torch.manual_seed(0)
    pipeline.unet, pipeline.vae = UNet2DConditionModel.from_config(unet), AutoencoderKL.from_config(vae)
    pipeline.save_pretrained(folder / "pipeline")


def report(seconds, **more):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": seconds, "gib": peak, **more}))


def timed(step):
    """Mean seconds of a call, behind the warmup."""
    for _ in range(WARMUP):
        step()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    return (time.perf_counter() - start) / STEPS


def bare_loop(folder, full):
    """The optimum: nothing but the UNet, its gradients and the optimizer."""
    import bitsandbytes
    from peft import LoraConfig

    unet = UNet2DConditionModel.from_pretrained(folder / "pipeline", subfolder="unet")
    noise_scheduler = DDPMScheduler.from_pretrained(folder / "pipeline", subfolder="scheduler")
    if not full:
        unet.requires_grad_(False)
        targets = ["to_k", "to_q", "to_v", "to_out.0"]
        unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=targets))
    unet.train()
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = bitsandbytes.optim.AdamW8bit(parameters, lr=1e-5)
    side, config = RESOLUTION // 8, unet.config
    latents, noise = torch.randn(2, 2 * PAIRS, 4, side, side)
    timesteps = torch.randint(1000, (2 * PAIRS,))
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    embeds = torch.randn(2 * PAIRS, 77, config.cross_attention_dim)
    pooled_dim = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    conditions = {"text_embeds": torch.randn(2 * PAIRS, pooled_dim), "time_ids": torch.zeros(2 * PAIRS, 6)}

    def step():
        prediction = unet(noisy_latents, timesteps, embeds, added_cond_kwargs=conditions, return_dict=False)[0]
        torch.nn.functional.mse_loss(prediction, noise).backward()
        optimizer.step()
        optimizer.zero_grad()

    report(timed(step), parameters=sum(parameter.numel() for parameter in unet.parameters()))


@torch.no_grad()
def encoding(folder):
    """VAE and text encoders on one batch."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder / "pipeline")
    pixels = torch.rand(2 * PAIRS, 3, RESOLUTION, RESOLUTION)

    def step():
        pipeline.vae.encode(pixels)
        pipeline.encode_prompt(PAIRS * ["a red circle"], do_classifier_free_guidance=False)

    report(timed(step))


# Measured with and without the reduction: names by number of processes.
SYNCHRONIZED = {n: f"script, LoRA, cached, {n} process{'es' if n > 1 else ''}" for n in (1, 2)}
UNSYNCHRONIZED = "unsynchronized"


class Constants:
    """In place of a reduced tensor: as many zeros, for which nothing has to be waited."""

    def __init__(self, tensor):
        self.size = len(tensor)

    def tolist(self):
        return self.size * [0.0]


def run_unsynchronized(words):
    """The script, with constants for what it reads in each optimizer step."""
    Accelerator.reduce = lambda accelerator, tensor: Constants(tensor)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def script(folder, full, cached, processes=1, synchronized=True):
    """The real script through its launcher; seconds a step from its own log, behind the warmup."""
    with tempfile.TemporaryDirectory() as output_dir:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += [SCRIPT] if synchronized else [__file__, UNSYNCHRONIZED, SCRIPT]
        command += ["--pretrained_model_name_or_path", folder / "pipeline"]
        command += ["--dataset_name", folder / "pairs", "--cache_dir", folder / "cache", "--output_dir", output_dir]
        command += ["--resolution", RESOLUTION, "--train_batch_size", PAIRS, "--use_8bit_adam", "--seed", 0]
        command += ["--max_train_steps", WARMUP + STEPS, "--logging_steps", 1]
        # Two processes have both cores to themselves.
        command += ["--dataloader_num_workers", 1] if processes == 1 else []
        command += [] if full else ["--rank", RANK, "--lora_layers", "attention"]
        command += ["--cache_latents"] if cached else []
        start = time.time()
        env = {**os.environ, "ACCELERATE_USE_CPU": "true"}
        subprocess.run(list(map(str, command)), check=True, stderr=subprocess.DEVNULL, env=env)
        events = EventAccumulator(str(next(Path(output_dir).glob("logs/**/events*")).parent)).Reload()
        speeds = [event.value for event in events.Scalars("pairs_per_second")][WARMUP:]
        first = events.Scalars("loss")[0].wall_time - start
        seconds = statistics.mean(processes * PAIRS / speed for speed in speeds)
        return {"seconds": seconds, "gib": events.Scalars("peak_memory_gib")[-1].value, "first_step": first}


def imports():
    """Time that the script takes before it reads its arguments."""
    start = time.perf_counter()
    subprocess.run([sys.executable, SCRIPT, "--help"], check=True, capture_output=True)
    return {"seconds": time.perf_counter() - start, "gib": 0}


def in_process(*words):
    words = [*map(str, words), *["--toy"] * TOY]
    result = subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def measure(folder, rounds):
    """{measurement: list of results}, all measurements once in each round."""
    results = {}

    def add(name, result):
        results.setdefault(name, []).append(result)

    for _ in range(rounds):
        add("encoding", in_process("encode", folder))
        for full in (False, True):
            kind = "whole UNet" if full else "LoRA"
            add(f"bare loop, {kind}", in_process("full" if full else "lora", folder))
            for cached in (True, False):
                add(f"script, {kind}, {'cached' if cached else 'uncached'}", script(folder, full, cached))
        for processes, name in SYNCHRONIZED.items():
            add(name, script(folder, False, True, processes))
            add(f"{name}, {UNSYNCHRONIZED}", script(folder, False, True, processes, synchronized=False))
        add("imports", imports())
    return results


def table(results):
    def median(name, key="seconds"):
        return statistics.median(result[key] for result in results[name])

    columns = ["", "s/step, median (least to most)", "against the bare loop", "against bare loop + encoding"]
    columns += ["peak GiB", "s from launch to first step"]
    lines = [f"| {' | '.join(columns)} |", "|---|---|---|---|---|---|"]
    for name, runs in results.items():
        seconds = [run["seconds"] for run in runs]
        kind = name.split(", ")[1] if ", " in name else None
        ratio, parts = "", ""
        if kind:
            bare = median(f"bare loop, {kind}")
            ratio = f"{median(name) / bare:.2f}"
            parts = f"{median(name) / (bare + median('encoding')):.2f}" if "uncached" in name else ""
        spread = f"{median(name):.3f} ({min(seconds):.3f} to {max(seconds):.3f})"
        first = f"{median(name, 'first_step'):.1f}" if "first_step" in runs[0] else ""
        lines.append(f"| {name} | {spread} | {ratio} | {parts} | {median(name, 'gib'):.2f} | {first} |")
    lines.append("\nStep time with the reduction and the read of the device, against none (medians; each round):\n")
    for name in SYNCHRONIZED.values():
        rounds = zip(results[name], results[f"{name}, {UNSYNCHRONIZED}"])
        ratios = ", ".join(f"{run['seconds'] / other['seconds']:.3f}" for run, other in rounds)
        lines.append(f"- {name}: {median(name) / median(f'{name}, {UNSYNCHRONIZED}'):.3f} ({ratios})")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["encode", "full", "lora"])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--toy", action="store_true", help="a tiny model and few steps, to see that all parts run")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.part == "encode":
        return encoding(args.folder)
    if args.part:
        return bare_loop(args.folder, args.part == "full")
    with tempfile.TemporaryDirectory() as folder:
        build_world(Path(folder))
        results = measure(Path(folder), args.rounds)
    print(table(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == [UNSYNCHRONIZED]:
        run_unsynchronized(sys.argv[2:])
    else:
        main()
