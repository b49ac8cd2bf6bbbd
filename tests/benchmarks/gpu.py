"""Measure the training script on SDXL at its real size, on one CUDA GPU.

    python tests/benchmarks/gpu.py FOLDER            # about ten minutes; a second call measures what is missing
    python tests/benchmarks/gpu.py FOLDER --toy      # the same on the tiny pipeline of tests, without a GPU

FOLDER gets a pipeline of SDXL's configs with random weights (7 GB), pairs of 1024 px, and `results.jsonl`, to which
each case is added as it ends. Each case is the script in a process of its own, without the files that it writes at the
end; speed and memory are what it logs, means over the steps after the first ones. The profiler adds up what the GPU
computes in two more steps: for the rest of a step it waits for the host. The peak is the rate of a large matrix
product in bfloat16. The bare loop is the UNet and the optimizer on ready latents and embeddings. It needs no network.
"""

import argparse
import datetime
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch


ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

BASE = "--gradient_checkpointing --mixed_precision bf16"
LORA, ROUNDED, FULL = "--rank 16", "--use_8bit_adam --full_bf16", "--use_8bit_adam"
CACHED, UNCACHED, FLOAT32_VAE, BARE = "--cache_latents", "bfloat16 VAE", "float32 VAE", "bare"
# Trained, encoding (or "bare"), pairs a forward pass, more flags; the most wanted first.
CASES = [
    (LORA, CACHED, 1, ""),
    (ROUNDED, CACHED, 1, ""),
    (FULL, CACHED, 1, ""),
    (LORA, BARE, 1, ""),
    (FULL, BARE, 1, ""),
    (LORA, UNCACHED, 1, "--dataloader_num_workers 4"),
    (LORA, FLOAT32_VAE, 1, "--dataloader_num_workers 4"),
    (LORA, CACHED, 4, ""),
    (ROUNDED, CACHED, 4, ""),
    (FULL, CACHED, 4, ""),
    (LORA, CACHED, 1, "--compile"),
    (LORA, CACHED, 4, "--compile"),
    (ROUNDED, CACHED, 4, "--compile"),
    (LORA, FLOAT32_VAE, 1, "--dataloader_num_workers 4 --allow_tf32"),
    (LORA, BARE, 4, ""),
    (FULL, BARE, 4, ""),
    (LORA, CACHED, 2, ""),
    (LORA, CACHED, 8, ""),
    (ROUNDED, CACHED, 2, ""),
    (ROUNDED, CACHED, 8, ""),
    (ROUNDED, UNCACHED, 1, "--dataloader_num_workers 4"),
]
TOY_CASES = [case for case in CASES if case in ((LORA, CACHED, 1, ""), (FULL, BARE, 1, ""))]
PROFILED = 2  # steps behind the measured ones
# TFLOP of a pair at 1024 px by tests/benchmarks/flops.py: forward and backward, with what checkpointing recomputes.
TFLOP = {LORA: 13.79 + 15.46 + 12.99, ROUNDED: 13.52 + 26.94 + 10.42, FULL: 13.52 + 26.94 + 10.42}


def build_sdxl(folder, device):
    """Write SDXL base 1.0's configs with random bfloat16 weights, small enough for finite activations."""
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
    from memory import CLIP_BIGG, CLIP_L, SDXL_UNET, SDXL_VAE
    from small_world import build_scheduler, build_tokenizer
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        parts = {
            "unet": UNet2DConditionModel(**SDXL_UNET),
            "vae": AutoencoderKL(**SDXL_VAE),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP_L)),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_BIGG)),
        }
    torch.set_default_dtype(torch.float32)
    parts["vae"].register_to_config(scaling_factor=0.13025, force_upcast=False)
    tokenizers = {"tokenizer": build_tokenizer("<|endoftext|>"), "tokenizer_2": build_tokenizer("!")}
    pipeline = StableDiffusionXLPipeline(**parts, **tokenizers, scheduler=build_scheduler("epsilon"))
    pipeline.to("cpu").save_pretrained(folder / "pipeline")
    parts["vae"].register_to_config(force_upcast=True)
    parts["vae"].save_pretrained(folder / "float32-vae")


def build_world(folder, toy):
    """The pipeline and the pairs, once."""
    from small_world import build_pipeline, build_vae, draw_pairs

    if (folder / "built").exists():
        return
    draw_pairs(folder / "pairs", num_pairs=8, num_shards=1, size=64 if toy else 1024)
    if toy:
        build_pipeline(folder / "pipeline")
        build_vae(force_upcast=True).save_pretrained(folder / "float32-vae")
    else:
        build_sdxl(folder, "cuda")
    (folder / "built").touch()


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for events in folder.glob("logs/**/events.out.tfevents.*"):
        accumulator = EventAccumulator(str(events)).Reload()
        found |= {tag: [e.value for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}
    return found


def run_case(folder, case, toy):
    """The script on one case: seconds of a step, pairs a second, and peak memory."""
    trained, encoding, size, more = case
    words = [*BASE.split(), *trained.split(), *more.split()]
    words += ["--cache_latents"] * (encoding == CACHED)
    if encoding == FLOAT32_VAE:
        words += ["--pretrained_vae_model_name_or_path", folder / "float32-vae"]
    output = folder / "runs" / f"{time.time():.0f}"
    words += ["--pretrained_model_name_or_path", folder / "pipeline", "--dataset_name", folder / "pairs"]
    steps = 2 if toy else 6
    words += ["--train_batch_size", size, "--max_train_steps", 2 * steps + PROFILED, "--logging_steps", steps]
    words += ["--resolution", 64 if toy else 1024, "--seed", 0]
    words += ["--output_dir", output, "--cache_dir", folder / "cache"]
    started = time.perf_counter()
    command = [sys.executable, __file__, "--steps-alone", json.dumps([2 * steps, toy]), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    result = {"wall": time.perf_counter() - started}
    if done.returncode:
        error = [line for line in (done.stdout + done.stderr).splitlines() if "rror" in line]
        return result | {"error": "out of memory" if "OutOfMemory" in done.stderr else (error or ["?"])[-1][:300]}
    logs = scalars(output)
    speed = logs["pairs_per_second"][1]
    result |= {"pairs_per_second": speed, "step": size / speed, "gib": logs["peak_memory_gib"][1]}
    return result | json.loads(done.stdout.splitlines()[-1])


def steps_alone(measured, toy, words):
    """
    The script without its last files: a whole UNet's take longer to write than the steps to make. Its last PROFILED
    steps come behind those that are measured.
    """
    import train_diffusion_mapo_sdxl as script

    profile, train_step, calls = device_profile(toy), script.train_step, itertools.count()

    def profiled(*args):
        if next(calls) == measured:
            profile.start()
        return train_step(*args)

    script.train_step, script.finish = profiled, lambda run: profile.stop()
    script.main(script.parse_args(words))
    print("\n" + json.dumps({"busy": busy_seconds(profile, toy)}))


def device_profile(toy):
    activity = torch.profiler.ProfilerActivity
    return torch.profiler.profile(activities=[activity.CPU if toy else activity.CUDA])


def busy_seconds(profile, toy):
    """Of each profiled step, in which the device computed or copied."""
    if toy:
        return sum(event.self_cpu_time_total for event in profile.events()) / 1e6 / PROFILED
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    # An annotation spans what is counted already.
    return sum(event.self_device_time_total for event in on_device if not event.is_user_annotation) / 1e6 / PROFILED


def matmul_rate(toy):
    """TFLOP/s of a product of two large bfloat16 matrices."""
    size, device, times = (256, "cpu", 2) if toy else (8192, "cuda", 30)
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    for _ in range(2):  # the first round warms up
        started = time.perf_counter()
        for _ in range(times):
            matrix @ matrix
        if not toy:
            torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / times
    if not toy:
        del matrix
        torch.cuda.empty_cache()  # for the processes that are measured
    return float(f"{2 * size**3 / seconds / 1e12:.3g}")


def bare_loop(trained, size, toy):
    """UNet and 8-bit AdamW on ready latents and embeddings, as little as a training step can be."""
    import bitsandbytes
    from diffusers import UNet2DConditionModel
    from memory import SDXL_UNET
    from peft import LoraConfig
    from small_world import build_unet

    from train_diffusion_mapo_sdxl import LORA_LAYERS, mapo_loss

    device = "cpu" if toy else "cuda"
    dtype = torch.bfloat16 if trained else torch.float32
    with torch.device(device):
        unet = build_unet(96, 64) if toy else UNet2DConditionModel(**SDXL_UNET)
    unet.to(dtype).requires_grad_(not trained)
    if trained:
        unet.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=LORA_LAYERS["all"]))
        for parameter in unet.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    unet.enable_gradient_checkpointing()
    unet.train()
    optimizer = bitsandbytes.optim.AdamW8bit([p for p in unet.parameters() if p.requires_grad], 1e-6)
    side, width, pooled = (8, 96, 64) if toy else (128, 2048, 1280)
    noise = torch.randn(2 * size, 4, side, side, device=device)
    embeds = torch.randn(2 * size, 77, width, device=device, dtype=torch.bfloat16)
    conditions = {
        "text_embeds": embeds[:, 0, :1].expand(-1, pooled),
        "time_ids": torch.ones(2 * size, 6, device=device),
    }
    timesteps = torch.randint(1000, (2 * size,), device=device)
    steps, profile = 2 if toy else 6, device_profile(toy)

    def step():
        with torch.autocast(device, torch.bfloat16, cache_enabled=False):
            prediction = unet(noise.bfloat16(), timesteps, embeds, added_cond_kwargs=conditions).sample
        errors = (prediction.float() - noise).square().mean(dim=(1, 2, 3)).chunk(2)
        mapo_loss(*errors, 64.0)[0].mean().backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):  # the first round warms up
        started = time.perf_counter()
        for _ in range(steps):
            step()
        if not toy:
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - started) / steps
    gib = 0 if toy else torch.cuda.max_memory_allocated() / 2**30
    with profile:
        for _ in range(PROFILED):
            step()
    return {"pairs_per_second": size / seconds, "step": seconds, "gib": gib, "busy": busy_seconds(profile, toy)}


def bare_case(trained, size, toy):
    """In a process of its own, so that memory is its own, too."""
    words = [sys.executable, __file__, "--bare", json.dumps([trained, size, toy])]
    done = subprocess.run(words, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if not done.returncode else {"error": done.stderr[-300:]}


def table(results):
    """Markdown: one row a case."""
    columns = ["trained", "encoding", "pairs a pass", "more", "s/step", "pairs/s", "GiB", "TFLOP/s", "of the peak"]
    columns += ["waits for the host"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for (trained, encoding, size, more), result in results.items():
        cells = [trained or "whole UNet", encoding, size, more]
        if "error" in result:
            cells += [result["error"], *5 * [""]]
        else:
            rate = result["pairs_per_second"] * TFLOP[trained]
            cells += [f"{result['step']:.3f}", f"{result['pairs_per_second']:.2f}", f"{result['gib']:.1f}"]
            # Earlier results are without the last two.
            cells += [f"{rate:.0f}", f"{rate / result['peak_tflops']:.0%}" if "peak_tflops" in result else ""]
            cells += [f"{max(0, 1 - result['busy'] / result['step']):.0%}" if "busy" in result else ""]
        print(f"| {' | '.join(map(str, cells))} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to build the pipeline and to keep the results")
    parser.add_argument("--toy", action="store_true", help="the tiny pipeline, one case of each kind, on CPU")
    parser.add_argument("--results", type=Path, help="another place for results.jsonl")
    parser.add_argument("--skip", nargs="*", default=[], help="words of cases to leave out: compile, bare, rank, ...")
    parser.add_argument("--minutes", type=float, default=9, help="no case begins after so many")
    args = parser.parse_args()
    folder, started, cases = args.folder.resolve(), time.perf_counter(), TOY_CASES if args.toy else CASES
    cases = [case for case in cases if not any(word in " ".join(map(str, case)) for word in args.skip)]
    results = args.results or folder / "results.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    build_world(folder, args.toy)
    print(f"Built in {time.perf_counter() - started:.0f} s.", flush=True)
    card = "CPU" if args.toy else torch.cuda.get_device_name()
    cpus = re.findall("model name\\s*: (.*)", Path("/proc/cpuinfo").read_text())  # ARM names none
    where = {
        "card": card,
        "cpu": cpus[0] if cpus else platform.machine(),
        "peak_tflops": matmul_rate(args.toy),
        "date": datetime.date.today().isoformat(),
    }
    where |= {library: version(library) for library in ("torch", "diffusers", "bitsandbytes")}
    known = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    done = {tuple(entry["case"]): entry for entry in known}
    for case in cases:
        if case in done or time.perf_counter() - started > 60 * args.minutes:
            continue
        trained, encoding, size, _ = case
        result = bare_case(trained, size, args.toy) if encoding == BARE else run_case(folder, case, args.toy)
        done[case] = {"case": case, **result, **where}
        print(f"{time.perf_counter() - started:5.0f} s", json.dumps(done[case]), flush=True)
        with results.open("a") as file:
            file.write(json.dumps(done[case]) + "\n")
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    print(f"Cases left: {len(set(cases) - done.keys())}.\n")
    table(done)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--bare"]:
        print(json.dumps(bare_loop(*json.loads(sys.argv[2]))))
    elif sys.argv[1:2] == ["--steps-alone"]:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        steps_alone(*json.loads(sys.argv[2]), sys.argv[3:])
    else:
        main()
