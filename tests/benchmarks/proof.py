"""Align the trained world's small SDXL through the script's command line, run by run: tables, curves and pictures.

    python tests/benchmarks/proof.py FOLDER [--only NAME ...]   # one run on each core; finished runs are kept
    python tests/benchmarks/proof.py FOLDER --show              # tables and proof.png of it; needs matplotlib

Each run aligns the trained world's model with 360 pairs, and is measured on 96 images of six captions that are in no
pair, at seeds that nothing else uses. FOLDER/proof.jsonl has a line for each run: its command, the commit and the
versions, the measured shares and all logged metrics.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
# Each run has one core.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}

import diffusers  # noqa: E402
import torch  # noqa: E402
from conftest import scalars  # noqa: E402
from PIL import Image  # noqa: E402
from trained_world import SIZE, TASKS, draw_preferences, load_pipeline, sample, shares  # noqa: E402


STEPS, IMAGES = 100, 96
LEARNING_RATES = {"full": "2e-4", "LoRA": "1e-3"}
LOSSES = {
    "SFT": ["--beta_mapo", "inf"],
    **{f"beta {beta}": ["--beta_mapo", str(beta)] for beta in (8, 32, 64, 128, 1024)},
    "v1 beta 0.1": ["--loss_type", "mapo_v1", "--beta_mapo", "0.1"],
}
SWAPPED = ["--label_0_column", "label_1", "--label_1_column", "label_0"]
# Losses that the second task is tried with, and that --show plots.
SHOWN = ("SFT", "beta 64", "beta 8", "v1 beta 0.1")
CURVES = {"eval_margin": "margin", "eval_accuracy": "accuracy", "eval_chosen_mse": "chosen error"}


def experiments():
    """All runs but for their seeds: {name: (task, base, flags)}; those without flags are the bases themselves."""
    runs = {"photo base": ("cartoon", "photo", None), "cartoon base": ("cartoon", "cartoon", None)}
    for kind, rank in (("full", []), ("LoRA", ["--rank", "64", "--lora_layers", "attention"])):
        runs |= {f"cartoon, {kind}, {loss}": ("cartoon", "photo", rank + flags) for loss, flags in LOSSES.items()}
    runs |= {f"frame, full, {loss}": ("frame", "photo", LOSSES[loss]) for loss in SHOWN}
    beta = ["--beta_mapo", "64"]
    runs["swapped labels"] = ("cartoon", "photo", beta + SWAPPED)
    runs["swapped labels, from cartoon base"] = ("cartoon", "cartoon", beta + SWAPPED)
    runs["30 % label noise"] = ("cartoon", "photo", [*beta, "--label_noise_prob", "0.3"])
    runs["photo over cartoon, from cartoon base"] = ("photo", "cartoon", beta)
    return runs


def command_line(folder, task, base, flags, seed, output_dir):
    world, kind = folder / "world", "LoRA" if "--rank" in flags else "full"
    words = ["accelerate", "launch", "--config_file", ROOT / "launch_configs" / "cpu.yaml"]
    words += [ROOT / "train_diffusion_mapo_sdxl.py", "--pretrained_model_name_or_path", world / f"{base}-base"]
    words += ["--dataset_name", world / task, "--cache_dir", folder / "cache", "--cache_latents"]
    words += ["--resolution", SIZE, "--train_batch_size", 16, "--max_train_steps", STEPS]
    words += ["--learning_rate", LEARNING_RATES[kind], "--lr_scheduler", "cosine", "--lr_warmup_steps", 0]
    words += ["--num_validation_pairs", 48, "--validation_steps", 25, "--logging_steps", 5, "--seed", seed]
    words += ["--output_dir", output_dir]
    return [str(word) for word in words + flags]


def train(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr[-2000:]}")


def load_aligned(base, output_dir):
    """The base, a folder, with the trained weights."""
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(base, add_watermarker=False)
    if (output_dir / "unet").exists():
        pipeline.unet = diffusers.UNet2DConditionModel.from_pretrained(output_dir / "unet")
    else:
        pipeline.load_lora_weights(output_dir)
    return pipeline


def prepare(folder):
    """Write the pairs and the two bases; the cartoon base is the photo base fine-tuned on the chosen cartoons."""
    world, out = folder / "world", folder / "runs" / "cartoon_base_training"
    if (world / "cartoon-base").exists():
        return
    load_pipeline().save_pretrained(world / "photo-base")
    for task in TASKS:
        draw_preferences(world / task, task)
    train(command_line(folder, "cartoon", "photo", ["--beta_mapo", "inf", "--max_train_steps", "200"], 0, out))
    load_aligned(world / "photo-base", out).save_pretrained(world / "cartoon-base")


def run(folder, name, seed):
    """Train, draw and measure one run; returns its line of results."""
    torch.set_num_threads(1)
    task, base, flags = experiments()[name]
    line = {"name": name, "seed": seed, "torch": torch.__version__, "diffusers": diffusers.__version__}
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    output_dir = folder / "runs" / f"{name} {seed}".translate(str.maketrans(" ", "_", ",%"))
    if flags is None:
        pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(folder / "world" / f"{base}-base")
    else:
        command = command_line(folder, task, base, flags, seed, output_dir)
        # The model card is written last.
        if not (output_dir / "README.md").exists():
            train(command)
        pipeline = load_aligned(folder / "world" / f"{base}-base", output_dir)
        shown = shlex.join(command).replace(f"{ROOT}/", "").replace(str(folder), "FOLDER")
        metrics = {key: value for key, value in scalars(output_dir).items() if "second" not in key}
        line |= {"commit": commit, "command": shown, "metrics": metrics}
    samples = sample(pipeline, IMAGES)
    draw_grid(samples[:24]).save(folder / f"{output_dir.name}.png")
    return line | shares(samples)


def draw_grid(samples, columns=6):
    grid = Image.new("RGB", (columns * SIZE, len(samples) // columns * SIZE))
    for i, (_, image) in enumerate(samples):
        grid.paste(image, (i % columns * SIZE, i // columns * SIZE))
    return grid


def cell(lines, column):
    values = [line.get(column, line.get("metrics", {}).get(column, {}).get(str(STEPS))) for line in lines]
    if None in values:
        return ""
    mean, spread = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0
    if column.startswith("eval_") and column != "eval_accuracy":
        return f"{mean:.3f} ± {spread:.3f}"
    return f"{100 * mean:.0f} ± {100 * spread:.0f} %"


def show(folder, lines):
    """Print mean and standard deviation over the seeds, and draw proof.png of seed 0."""
    columns = ["cartoon", "framed", "right", "eval_accuracy", "eval_margin", "eval_chosen_mse", "eval_rejected_mse"]
    print("| run | seeds | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 2))
    for name in experiments():
        same = [line for line in lines if line["name"] == name]
        if same:
            print(f"| {name} | {len(same)} | " + " | ".join(cell(same, column) for column in columns) + " |")
    draw_figure(folder, {line["name"]: line for line in lines if line["seed"] == 0})


def draw_figure(folder, lines):
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(12, 5.6), layout="constrained")
    pictures, curves = figure.subfigures(2, 1, height_ratios=[1.2, 1])
    titles = {"photo_base_0": "base model", "cartoon_full_beta_64_0": "aligned with MaPO, beta 64, 100 steps"}
    for axes, (name, title) in zip(pictures.subplots(1, 2), titles.items(), strict=True):
        image = Image.open(folder / f"{name}.png")
        axes.imshow(image.resize((4 * image.width, 4 * image.height), Image.Resampling.BICUBIC))
        axes.set_title(f"{title}: held-out prompts, the same seeds")
        axes.axis("off")
    for axes, (metric, title) in zip(curves.subplots(1, 3), CURVES.items(), strict=True):
        for loss in SHOWN:
            points = lines[f"cartoon, full, {loss}"]["metrics"][metric]
            axes.plot(list(map(int, points)), list(points.values()), label=loss)
        axes.set_title(f"{title} on held-out pairs")
        axes.set_xlabel("step")
        axes.legend()
    figure.savefig(folder / "proof.png", dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", help="beginnings of the names of runs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--show", action="store_true")
    args = parser.parse_args()
    folder = args.folder.resolve()
    results = folder / "proof.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    if args.show:
        return show(folder, lines)
    prepare(folder)
    done = {(line["name"], line["seed"]) for line in lines}
    runs = {
        name: parts for name, parts in experiments().items() if args.only is None or name.startswith(tuple(args.only))
    }
    # A base has no seed.
    jobs = [(name, seed) for seed in args.seeds for name, parts in runs.items() if parts[2] is not None or seed == 0]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for future in as_completed([pool.submit(run, folder, *job) for job in jobs if job not in done]):
            line = future.result()
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print({key: line[key] for key in ("name", "seed", "cartoon", "framed", "right")}, flush=True)


if __name__ == "__main__":
    main()
