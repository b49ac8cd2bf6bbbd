"""
Measure the training script on SDXL at its real size, on one CUDA GPU. No network is needed.

    python tests/benchmarks/gpu.py FOLDER            # about ten minutes; a second call measures what is missing
    python tests/benchmarks/gpu.py FOLDER --toy      # the same on the tiny pipeline of the tests, without a GPU

FOLDER gets a pipeline of SDXL's configs with random weights (7 GB), pairs of 1024 px, and `results.jsonl`, to which
each case is added when it ends. Each case is the script in a process of its own, without saving the final weights.

Speed and memory are those that the script logs for the steps after the first ones. In two more steps, the profiler
adds up the time in which the GPU computes; for the rest of these steps it waits for the CPU. The peak is the rate of a
large matrix product in bfloat16. The bare loop is the UNet and the optimizer on ready latents and embeddings.
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

# What is trained.
LORA = "--rank 16"
ROUNDED = "--use_8bit_adam --full_bf16"
FULL = "--use_8bit_adam"

# How the pairs are encoded; BARE is the bare loop.
CACHED = "--cache_latents"
UNCACHED = "bfloat16 VAE"
FLOAT32_VAE = "float32 VAE"
BARE = "bare"

# Cases: what is trained, encoding, pairs per forward pass, more flags. The most wanted ones come first.
WORKERS = "--dataloader_num_workers 4"
CASES = [
    (LORA, CACHED, 1, ""),
    (ROUNDED, CACHED, 1, ""),
    (FULL, CACHED, 1, ""),
    (LORA, BARE, 1, ""),
    (FULL, BARE, 1, ""),
    (LORA, UNCACHED, 1, WORKERS),
    (LORA, FLOAT32_VAE, 1, WORKERS),
    (LORA, CACHED, 4, ""),
    (ROUNDED, CACHED, 4, ""),
    (FULL, CACHED, 4, ""),
    (LORA, CACHED, 1, "--compile"),
    (LORA, CACHED, 4, "--compile"),
    (ROUNDED, CACHED, 4, "--compile"),
    (LORA, FLOAT32_VAE, 1, f"{WORKERS} --allow_tf32"),
    (LORA, BARE, 4, ""),
    (FULL, BARE, 4, ""),
    (LORA, CACHED, 2, ""),
    (LORA, CACHED, 8, ""),
    (ROUNDED, CACHED, 2, ""),
    (ROUNDED, CACHED, 8, ""),
    (ROUNDED, UNCACHED, 1, WORKERS),
]
TOY_CASES = [(LORA, CACHED, 1, ""), (FULL, BARE, 1, "")]

# TFLOP of a cached pair with checkpointing: forward, backward, recomputed, by estimate.py.
FULL_TFLOP = 13.52 + 26.94 + 10.42
TFLOP = {LORA: 13.79 + 15.46 + 12.99, ROUNDED: FULL_TFLOP, FULL: FULL_TFLOP}

PROFILED = 2  # steps after the measured ones


def measured_steps(toy):
    """Steps of a measurement. As many run before it."""
    return 2 if toy else 6


# Model and pairs -----------------------------------------------------------------------------------------------------


def build_sdxl(folder, device):
    """Write SDXL base 1.0's configs with random bfloat16 weights, small enough for finite activations."""
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
    from estimate import CLIP_BIGG, CLIP_L, SDXL_UNET, SDXL_VAE, default_dtype
    from small_world import build_scheduler, build_tokenizer
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    with torch.device(device), default_dtype(torch.bfloat16):
        unet = UNet2DConditionModel(**SDXL_UNET)
        vae = AutoencoderKL(**SDXL_VAE)
        text_encoder = CLIPTextModel(CLIPTextConfig(**CLIP_L))
        text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_BIGG))
    vae.register_to_config(scaling_factor=0.13025, force_upcast=False)

    pipeline = StableDiffusionXLPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=build_tokenizer("<|endoftext|>"),
        tokenizer_2=build_tokenizer("!"),
        scheduler=build_scheduler("epsilon"),
    )
    pipeline.to("cpu").save_pretrained(folder / "pipeline")

    # The same VAE, which the script then runs in float32.
    vae.register_to_config(force_upcast=True)
    vae.save_pretrained(folder / "float32-vae")


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


# The script ----------------------------------------------------------------------------------------------------------


def script_words(folder, case, toy):
    """The script's command line for a case."""
    trained, encoding, pairs, more = case
    steps = measured_steps(toy)
    options = {
        "pretrained_model_name_or_path": folder / "pipeline",
        "dataset_name": folder / "pairs",
        "cache_dir": folder / "cache",
        "output_dir": folder / "runs" / f"{time.time():.0f}",
        "resolution": 64 if toy else 1024,
        "train_batch_size": pairs,
        "max_train_steps": 2 * steps + PROFILED,
        "logging_steps": steps,
        "mixed_precision": "bf16",
        "seed": 0,
    }
    if encoding == FLOAT32_VAE:
        options["pretrained_vae_model_name_or_path"] = folder / "float32-vae"

    words = ["--gradient_checkpointing", *trained.split(), *more.split()]
    if encoding == CACHED:
        words.append(CACHED)
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    return words, options["output_dir"]


def run_case(folder, case, toy):
    """The script on a case: seconds of a step, pairs per second, and peak memory."""
    words, output_dir = script_words(folder, case, toy)
    command = [sys.executable, __file__, "--only-steps", json.dumps([2 * measured_steps(toy), toy]), *words]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    result = {"wall": time.perf_counter() - started}

    if "OutOfMemory" in done.stderr:
        return {**result, "error": "out of memory"}
    if done.returncode:
        errors = [line for line in (done.stdout + done.stderr).splitlines() if "rror" in line]
        return {**result, "error": (errors or ["?"])[-1][:300]}

    logged = read_scalars(output_dir)
    _, pairs_per_second, *_ = logged["pairs_per_second"]
    _, gib, *_ = logged["peak_memory_gib"]
    _, _, pairs, _ = case
    return {
        **result,
        "pairs_per_second": pairs_per_second,
        "step": pairs / pairs_per_second,
        "gib": gib,
        **json.loads(done.stdout.splitlines()[-1]),
    }


def read_scalars(folder):
    """What a run logged: {name: values}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for file in folder.glob("logs/**/events.out.tfevents.*"):
        events = EventAccumulator(str(file)).Reload()
        for name in events.Tags()["scalars"]:
            found[name] = [event.value for event in events.Scalars(name)]
    return found


def run_only_steps(measured, toy, words):
    """
    The script, profiled after its `measured` first steps. Nothing is saved at the end, because writing a full UNet
    takes longer than the steps.
    """
    import train_diffusion_mapo_sdxl as script

    profile = device_profile(toy)
    train_step = script.train_step
    calls = itertools.count()

    def profiled_step(*args):
        if next(calls) == measured:
            profile.start()
        return train_step(*args)

    script.train_step = profiled_step
    script.finish = lambda run: profile.stop()
    script.main(script.parse_args(words))
    print("\n" + json.dumps({"busy": busy_seconds(profile, toy)}))


def device_profile(toy):
    activity = torch.profiler.ProfilerActivity
    return torch.profiler.profile(activities=[activity.CPU if toy else activity.CUDA])


def busy_seconds(profile, toy):
    """Seconds of each profiled step in which the device computed or copied."""
    microseconds = 0
    for event in profile.events():
        if toy:
            microseconds += event.self_cpu_time_total
        elif event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            # An annotation spans kernels that are counted already.
            microseconds += event.self_device_time_total
    return microseconds / 1e6 / PROFILED


# What it is compared with --------------------------------------------------------------------------------------------


def time_second_round(function, times, toy):
    """Mean seconds of a call in a second round of calls, after one that warms up."""
    for _ in range(2):
        started = time.perf_counter()
        for _ in range(times):
            function()
        if not toy:
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - started) / times
    return seconds


def matmul_rate(toy):
    """TFLOP/s of a product of two large bfloat16 matrices."""
    size = 256 if toy else 8192
    matrix = torch.randn(size, size, device="cpu" if toy else "cuda", dtype=torch.bfloat16)
    seconds = time_second_round(lambda: matrix @ matrix, 2 if toy else 30, toy)
    if not toy:
        del matrix
        torch.cuda.empty_cache()  # for the processes that are measured
    return float(f"{2 * size**3 / seconds / 1e12:.3g}")


def build_bare_unet(trained, toy):
    """For full fine-tuning the UNet in float32, for a LoRA in bfloat16 with adapters in float32."""
    from diffusers import UNet2DConditionModel
    from estimate import SDXL_UNET
    from peft import LoraConfig
    from small_world import build_unet

    from train_diffusion_mapo_sdxl import LORA_LAYERS

    with torch.device("cpu" if toy else "cuda"):
        unet = build_unet(cross_attention_dim=96, pooled_dim=64) if toy else UNet2DConditionModel(**SDXL_UNET)
    if trained == LORA:
        unet.to(torch.bfloat16).requires_grad_(False)
        unet.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=LORA_LAYERS["all"]))
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    unet.enable_gradient_checkpointing()
    return unet.train()


def run_bare_loop(trained, pairs, toy):
    """UNet and 8-bit AdamW on ready latents and embeddings: as little as a training step can be."""
    import bitsandbytes

    from train_diffusion_mapo_sdxl import mapo_loss

    # Model and optimizer.
    device = "cpu" if toy else "cuda"
    unet = build_bare_unet(trained, toy)
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = bitsandbytes.optim.AdamW8bit(parameters, 1e-6)

    # One batch.
    side, width, pooled_width = (8, 96, 64) if toy else (128, 2048, 1280)
    noise = torch.randn(2 * pairs, 4, side, side, device=device)
    embeds = torch.randn(2 * pairs, 77, width, device=device, dtype=torch.bfloat16)
    conditions = {
        "text_embeds": embeds[:, 0, :1].expand(-1, pooled_width),
        "time_ids": torch.ones(2 * pairs, 6, device=device),
    }
    timesteps = torch.randint(1000, (2 * pairs,), device=device)

    def step():
        with torch.autocast(device, torch.bfloat16, cache_enabled=False):
            prediction = unet(noise.bfloat16(), timesteps, embeds, added_cond_kwargs=conditions).sample
        errors = (prediction.float() - noise).square().mean(dim=(1, 2, 3)).chunk(2)
        mapo_loss(*errors, 64.0)[0].mean().backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad()

    # Measure, then profile.
    seconds = time_second_round(step, measured_steps(toy), toy)
    gib = 0 if toy else torch.cuda.max_memory_allocated() / 2**30
    with device_profile(toy) as profile:
        for _ in range(PROFILED):
            step()
    return {"pairs_per_second": pairs / seconds, "step": seconds, "gib": gib, "busy": busy_seconds(profile, toy)}


def bare_case(trained, pairs, toy):
    """The bare loop in a process of its own, so that the peak of memory is its own."""
    words = [sys.executable, __file__, "--bare", json.dumps([trained, pairs, toy])]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr[-300:]}
    return json.loads(done.stdout.splitlines()[-1])


# Results -------------------------------------------------------------------------------------------------------------

COLUMNS = [
    "trained",
    "encoding",
    "pairs per pass",
    "more",
    "s/step",
    "pairs/s",
    "GiB",
    "TFLOP/s",
    "of the peak",
    "waits for the CPU",
]


def print_table(results):
    print(f"| {' | '.join(COLUMNS)} |")
    print("|---" * len(COLUMNS) + "|")
    for (trained, encoding, pairs, more), result in results.items():
        cells = [trained, encoding, str(pairs), more]
        if "error" in result:
            cells += [result["error"], "", "", "", "", ""]
        else:
            rate = result["pairs_per_second"] * TFLOP[trained]
            cells += [f"{result['step']:.3f}", f"{result['pairs_per_second']:.2f}", f"{result['gib']:.1f}"]
            cells.append(f"{rate:.0f}")
            # Earlier results lack the last two.
            cells.append(f"{rate / result['peak_tflops']:.0%}" if "peak_tflops" in result else "")
            cells.append(f"{max(0, 1 - result['busy'] / result['step']):.0%}" if "busy" in result else "")
        print(f"| {' | '.join(cells)} |")


def describe_machine(toy):
    cpus = re.findall("model name\\s*: (.*)", Path("/proc/cpuinfo").read_text())  # ARM names none
    return {
        "card": "CPU" if toy else torch.cuda.get_device_name(),
        "cpu": cpus[0] if cpus else platform.machine(),
        "peak_tflops": matmul_rate(toy),
        "date": datetime.date.today().isoformat(),
        "torch": version("torch"),
        "diffusers": version("diffusers"),
        "bitsandbytes": version("bitsandbytes"),
    }


def choose_cases(toy, skipped_words):
    cases = []
    for case in TOY_CASES if toy else CASES:
        text = " ".join(map(str, case))
        if not any(word in text for word in skipped_words):
            cases.append(case)
    return cases


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to build the pipeline and to keep the results")
    parser.add_argument("--toy", action="store_true", help="the tiny pipeline, one case of each kind, on CPU")
    parser.add_argument("--results", type=Path, help="another place for results.jsonl")
    parser.add_argument("--skip", nargs="*", default=[], help="leave out cases with these words: compile, bare, ...")
    parser.add_argument("--minutes", type=float, default=9, help="start no case after this time")
    args = parser.parse_args()
    started = time.perf_counter()
    folder = args.folder.resolve()
    results = args.results or folder / "results.jsonl"
    cases = choose_cases(args.toy, args.skip)

    # Build.
    folder.mkdir(parents=True, exist_ok=True)
    build_world(folder, args.toy)
    print(f"Built in {time.perf_counter() - started:.0f} s.", flush=True)
    machine = describe_machine(args.toy)

    # Measure what is missing.
    done = {}
    if results.exists():
        for line in results.read_text().splitlines():
            result = json.loads(line)
            done[tuple(result["case"])] = result
    for case in cases:
        if case in done or time.perf_counter() - started > 60 * args.minutes:
            continue
        trained, encoding, pairs, _ = case
        if encoding == BARE:
            result = bare_case(trained, pairs, args.toy)
        else:
            result = run_case(folder, case, args.toy)
        done[case] = {"case": case, **result, **machine}
        line = json.dumps(done[case])
        print(f"{time.perf_counter() - started:5.0f} s", line, flush=True)
        with results.open("a") as file:
            file.write(line + "\n")

    # Show.
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"Cases left: {len(set(cases) - done.keys())}.\n")
    print_table(done)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--bare"]:
        print(json.dumps(run_bare_loop(*json.loads(sys.argv[2]))))
    elif sys.argv[1:2] == ["--only-steps"]:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        run_only_steps(*json.loads(sys.argv[2]), sys.argv[3:])
    else:
        main()
