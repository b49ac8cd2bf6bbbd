"""
The training script on SDXL at its real size, on a CPU: does it load, train, die, resume, save and load again?

    python tests/benchmarks/full_size.py FOLDER        # 24 GB of memory, 40 GB of disk

FOLDER gets a pipeline of SDXL's configs with random bfloat16 weights (7 GB) and pairs of 256 px. A LoRA and the full
UNet are trained through the launcher: two steps with a checkpoint after each, killed (-9) when the first checkpoint is
complete, and resumed. What was saved must then load into a plain pipeline and change what its UNet predicts.

Memory is resident memory of all launched processes, read ten times per second. The rows of the table are also added to
FOLDER/full_size.jsonl, and a second call adds what is missing. It takes ten minutes on two cores that have
instructions for bfloat16, and far longer without.
"""

import argparse
import contextlib
import json
import os
import platform
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import psutil
import torch


ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]
os.environ.update({"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"})

SHARED_FLAGS = (
    "--resolution 256 --cache_latents --gradient_checkpointing --mixed_precision bf16 --seed 0 --logging_steps 1 "
    "--train_batch_size 1 --max_train_steps 2 --checkpointing_steps 1 --checkpoints_total_limit 1"
)
RUNS = {
    "LoRA of rank 16": "--rank 16 --learning_rate 1e-3 --gradient_accumulation_steps 2",
    "full UNet": "--full_bf16 --use_8bit_adam --learning_rate 1e-5",
}
STATE_FILE = "mapo_state.json"
LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "pytorch_lora_weights_kohya.safetensors"
# Attention, feed-forward and projections of 70 transformer blocks, convolutions of the resnets, and embeddings.
KOHYA_LAYERS = 784


def build_world(folder):
    """The pipeline and the pairs, once."""
    from gpu import build_sdxl
    from small_world import draw_pairs

    if (folder / "built").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    build_sdxl(folder, "cpu")
    draw_pairs(folder / "pairs", num_pairs=4, num_shards=1, size=256)
    (folder / "built").touch()


def output_folder(folder, name):
    return folder / "runs" / name.replace(" ", "-")


def command_line(folder, name):
    options = {
        "pretrained_model_name_or_path": folder / "pipeline",
        "dataset_name": folder / "pairs",
        "cache_dir": folder / "cache",
        "output_dir": output_folder(folder, name),
    }
    words = [sys.executable, "-m", "accelerate.commands.launch"]
    words += ["--config_file", str(ROOT / "launch_configs" / "cpu.yaml"), str(ROOT / "train_diffusion_mapo_sdxl.py")]
    for option, value in options.items():
        words += [f"--{option}", str(value)]
    return [*words, *SHARED_FLAGS.split(), *RUNS[name].split()]


def resident_bytes(processes):
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total


def run(command, kill_at=None):
    """
    Run a command to its end, or kill it and all that it started when the file `kill_at` exists. Returns its seconds
    and peak of resident memory in GB, and what it printed.
    """
    started = time.perf_counter()
    peak = 0
    with tempfile.TemporaryFile("w+") as output:
        launcher = psutil.Popen(command, stdout=output, stderr=output)
        while launcher.poll() is None:
            processes = [launcher, *launcher.children(recursive=True)]
            peak = max(peak, resident_bytes(processes))
            if kill_at is not None and kill_at.exists():
                for process in reversed(processes):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
            time.sleep(0.1)
        output.seek(0)
        printed = output.read()

    if kill_at is None and launcher.returncode != 0:
        sys.exit(printed[-3000:])
    return {"seconds": time.perf_counter() - started, "peak GB": peak / 1e9}, printed


def size(folder, *patterns):
    """GB of the files in a folder that match one of the patterns."""
    total = 0
    for pattern in patterns:
        total += sum(path.stat().st_size for path in folder.glob(pattern) if path.is_file())
    return total / 1e9


def train(folder, name):
    """A run that is killed and resumed. Returns two rows of the table."""
    output_dir = output_folder(folder, name)
    command = command_line(folder, name)

    killed, _ = run(command, kill_at=output_dir / "checkpoint-1" / STATE_FILE)
    killed["what"] = f"{name}: from the start to its first checkpoint, killed"
    killed["checkpoint GB"] = size(output_dir / "checkpoint-1", "**/*")

    resumed, printed = run([*command, "--resume_from_checkpoint", "latest"])
    assert json.loads((output_dir / "checkpoint-2" / STATE_FILE).read_text())["step"] == 2, printed[-3000:]
    resumed["what"] = f"{name}: resumed, a step, saved"
    resumed["result GB"] = size(output_dir, "unet/*", "*.safetensors")
    return [killed, resumed]


def load(folder, name):
    """Load what was saved into a plain pipeline. Returns a row of the table."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from safetensors import safe_open

    started = time.perf_counter()
    output_dir = output_folder(folder, name)
    row = {"what": f"{name}: loaded into a plain pipeline"}
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        folder / "pipeline", torch_dtype=torch.bfloat16, add_watermarker=False
    )
    latents = torch.randn(1, 4, 32, 32, generator=torch.manual_seed(0)).to(torch.bfloat16)
    prompt_embeds = torch.randn(1, 77, 2048).to(torch.bfloat16)
    conditions = {
        "text_embeds": torch.ones(1, 1280, dtype=torch.bfloat16),
        "time_ids": torch.ones(1, 6),
    }

    @torch.no_grad()
    def predict():
        return pipeline.unet(latents, 500, prompt_embeds, added_cond_kwargs=conditions).sample.float()

    before = predict()
    if (output_dir / "unet").exists():
        pipeline.unet = UNet2DConditionModel.from_pretrained(output_dir / "unet", torch_dtype=torch.bfloat16)
    else:
        pipeline.load_lora_weights(output_dir, weight_name=LORA_FILE)
        with safe_open(output_dir / KOHYA_FILE, "pt") as file:
            layers = {key.split(".")[0] for key in file.keys()}
        assert len(layers) == KOHYA_LAYERS, len(layers)
        row["kohya layers"] = len(layers)
    change = (predict() - before).norm() / before.norm()
    assert 0 < change < 1, change
    return [{**row, "seconds": time.perf_counter() - started, "change of its prediction": change.item()}]


def print_table(lines):
    columns = ["seconds", "peak GB", "checkpoint GB", "result GB"]
    print(f"\n| what | {' | '.join(columns)} |")
    print("|---|" + "---|" * len(columns))
    for line in lines:
        cells = []
        for column in columns:
            digits = 0 if column == "seconds" else 2
            cells.append(f"{line[column]:.{digits}f}" if column in line else "")
        print(f"| {line['what']} | {' | '.join(cells)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--show", action="store_true", help="only print the table")
    args = parser.parse_args()
    folder = args.folder.resolve()
    results = folder / "full_size.jsonl"
    lines = []
    if results.exists():
        lines = [json.loads(line) for line in results.read_text().splitlines()]
    if args.show:
        return print_table(lines)

    build_world(folder)
    machine = {
        "date": str(date.today()),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "torch": version("torch"),
        "diffusers": version("diffusers"),
        "transformers": version("transformers"),
        "bitsandbytes": version("bitsandbytes"),
    }
    for name in RUNS:
        for part, measure in ((name, train), (f"{name}, saved", load)):
            if any(line["part"] == part for line in lines):
                continue
            for row in measure(folder, name):
                line = {"part": part, **row, **machine}
                lines.append(line)
                print(json.dumps(line), flush=True)
                with results.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    print_table(lines)


if __name__ == "__main__":
    main()
