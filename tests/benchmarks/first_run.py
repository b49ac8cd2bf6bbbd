"""
The README's first run, and variants of it: other objectives, LoRAs, and two runs that break the model.

    python tests/benchmarks/first_run.py FOLDER           # one run on each core; finished runs are kept
    python tests/benchmarks/first_run.py FOLDER --show    # the table, curves.png and first_run.png

Every run is the README's own command with other flags, on the same pairs. 48 images of held-out captions are sampled
at each guidance scale, and their shape, colour and style are recognized by fixed rules. FOLDER/first_run.jsonl gets a
line for each run: command, commit, versions, metrics and shares. FOLDER/grids gets samples of each run.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import date
from pathlib import Path


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
# Each run has one core.
os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"})

import diffusers  # noqa: E402
import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from conftest import scalars  # noqa: E402
from PIL import Image  # noqa: E402
from trained_world import sample, shares  # noqa: E402


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


IMAGES = 48
GUIDANCE = (1.5, 5.0, 7.5)
LORA = "--learning_rate 1e-3 --rank 64 --lora_layers"

# Flags that are appended to those of the first run; None is the base model itself.
RUNS = {
    "base": None,
    "full UNet, beta 64": "",
    "full UNet, beta 8": "--beta_mapo 8",
    "full UNet, SFT": "--beta_mapo inf",
    "LoRA, attention": f"{LORA} attention",
    "LoRA, transformer": f"{LORA} transformer",
    "LoRA, all": f"{LORA} all",
    "LoRA of rank 8, all": "--learning_rate 1e-3 --rank 8",
    "beta 0.1": "--beta_mapo 0.1",
    "learning rate 5e-3": "--learning_rate 5e-3",
}

# Runs in the pictures, with their titles there.
PICTURED = {
    "base": "base model",
    "full UNet, SFT": "SFT",
    "full UNet, beta 64": "MaPO",
    "LoRA, attention": "MaPO, LoRA:\nattention",
    "LoRA, transformer": "MaPO, LoRA:\ntransformer",
    "LoRA, all": "MaPO, LoRA:\nall layers",
}
CURVES = {
    "full UNet, beta 64": "healthy (beta 64)",
    "full UNet, SFT": "SFT",
    "beta 0.1": "beta too small (0.1)",
}
METRICS = ("eval_loss", "eval_chosen_mse", "eval_rejected_mse", "eval_margin", "eval_accuracy")


# Runs ----------------------------------------------------------------------------------------------------------------


def readme_commands():
    """The README's first run: the words of the command that makes the pairs, and of the one that trains on them."""
    section = (ROOT / "README.md").read_text().split("## First run")[1].split("\n## ")[0]
    make_pairs, train = re.findall(r"accelerate launch --config_file [^\n&]*", section.replace("\\\n", " "))
    return shlex.split(make_pairs), shlex.split(train)


def launch(words, folder):
    """Run a command of the README, with `folder` as its `demo`. Returns its seconds and its log."""
    words = [str(folder / word.removeprefix("demo/")) if word.startswith("demo/") else word for word in words]
    started = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(words)}\n{done.stderr[-2000:]}")
    return time.perf_counter() - started, done.stderr


def run(folder, name):
    """Train, sample and measure one run. Returns its line of results."""
    torch.set_num_threads(1)
    line = {
        "name": name,
        "date": str(date.today()),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(folder / "pipeline", add_watermarker=False)

    # Train. Of flags that are given twice, the second ones are valid.
    if RUNS[name] is not None:
        _, train = readme_commands()
        output_dir = Path("demo/runs") / name.replace(" ", "_").replace(",", "")
        words = [*train, *RUNS[name].split(), "--cache_dir", "demo/cache", "--validation_steps", "10"]
        words += ["--output_dir", str(output_dir)]
        line["command"] = shlex.join(words)
        line["seconds"], log = launch(words, folder)

        output_dir = folder / "runs" / output_dir.name
        line["warnings"] = re.findall(r"WARNING - .*?(eval_.*)", log)
        line["metrics"] = {key: values for key, values in scalars(output_dir).items() if key.startswith("eval_")}
        load_trained(pipeline, output_dir)
        if not (output_dir / "unet").exists():
            lora = [weight for key, weight in pipeline.unet.named_parameters() if "lora" in key]
            line["parameters"] = sum(weight.numel() for weight in lora)

    # Sample and measure.
    for guidance in GUIDANCE:
        samples = sample(pipeline, IMAGES, guidance)
        line[f"guidance {guidance}"] = shares(samples)
        save_grid(samples, grid_path(folder, name, guidance))
    return line


def load_trained(pipeline, output_dir):
    """Put what a run has trained, a UNet or a LoRA, into a pipeline."""
    if (output_dir / "unet").exists():
        pipeline.unet = diffusers.UNet2DConditionModel.from_pretrained(output_dir / "unet")
    else:
        pipeline.load_lora_weights(output_dir, weight_name="pytorch_lora_weights.safetensors")


def read_lines(path):
    """The lines of a JSONL file, which need not exist yet."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def append_line(path, line):
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def current_commit():
    words = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip()


# Tables and pictures -------------------------------------------------------------------------------------------------


def grid_path(folder, name, guidance):
    return folder / "grids" / f"{name} {guidance:g}.png"


def save_grid(samples, path):
    """The first twelve images, in two rows of six."""
    images = [np.asarray(image) for _, image in samples[:12]]
    upper = np.concatenate(images[:6], axis=1)
    lower = np.concatenate(images[6:], axis=1)
    plt.imsave(path, np.concatenate([upper, lower]))


def draw_samples(folder, titles, picture):
    """Draw the grids of runs, one row for each of {run: title}, one column for each guidance scale."""
    missing = [name for name in titles if not grid_path(folder, name, GUIDANCE[0]).exists()]
    if missing:
        print(f"{picture.name} is not drawn: {folder / 'grids'} has no samples of {missing[0]!r}.", file=sys.stderr)
        return

    figure, axes = plt.subplots(
        len(titles),
        len(GUIDANCE),
        figsize=(10, 0.35 + 0.98 * len(titles)),
        layout="constrained",
    )
    for axis, guidance in zip(axes[0], GUIDANCE):
        axis.set_title(f"guidance scale {guidance:g}")
    for (name, title), row in zip(titles.items(), axes):
        row[0].set_ylabel(title, rotation="horizontal", ha="right", va="center")
        for axis, guidance in zip(row, GUIDANCE):
            axis.imshow(plt.imread(grid_path(folder, name, guidance)), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
    figure.savefig(picture, dpi=100)
    plt.close(figure)

    # Fewer colours make a third of the bytes.
    Image.open(picture).convert("RGB").quantize(128).save(picture, optimize=True)


def draw_curves(lines, picture):
    """Plot the held-out metrics of a healthy run, of SFT, and of a beta that is too small."""
    figure, axes = plt.subplots(1, len(METRICS), figsize=(15, 2.8), layout="constrained")
    for axis, metric in zip(axes, METRICS):
        for name, label in CURVES.items():
            values = lines[name]["metrics"][metric]
            axis.plot([int(step) for step in values], list(values.values()), label=label)
        axis.set_title(metric)
        axis.set_xlabel("step")
        if metric in ("eval_loss", "eval_chosen_mse", "eval_rejected_mse"):
            axis.set_yscale("log")
    axes[0].legend(fontsize="small")
    figure.savefig(picture, dpi=100)
    plt.close(figure)


def print_table(lines):
    """Cartoons / images with the right shape and colour, in %."""
    print(f"| run | trained parameters | {' | '.join(f'guidance {guidance:g}' for guidance in GUIDANCE)} |")
    print("|---|---|" + "---|" * len(GUIDANCE))
    for name in RUNS:
        if name not in lines:
            continue
        line = lines[name]
        cells = []
        for guidance in GUIDANCE:
            measured = line[f"guidance {guidance}"]
            cells.append(f"{100 * measured['cartoon']:.0f} / {100 * measured['right']:.0f}")
        print(f"| {name} | {line.get('parameters', '')} | {' | '.join(cells)} |")


def print_warnings(lines):
    for name, line in lines.items():
        if line.get("warnings"):
            print(f"\nLast warning of {name}: {line['warnings'][-1]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--only", nargs="+", choices=RUNS, metavar="RUN", help="names of runs; by default, all of them"
    )
    parser.add_argument("--show", action="store_true", help="only print the table and draw the pictures")
    args = parser.parse_args()
    folder = args.folder.resolve()
    results = folder / "first_run.jsonl"
    lines = {line["name"]: line for line in read_lines(results)}

    if args.show:
        print_table(lines)
        print_warnings(lines)
        if all(name in lines for name in CURVES):
            draw_curves(lines, folder / "curves.png")
        draw_samples(folder, PICTURED, folder / "first_run.png")
        return

    # The model and its pairs.
    (folder / "grids").mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, ROOT / "tests" / "trained_world.py", folder], check=True)
    make_pairs, _ = readme_commands()
    seconds, _ = launch(make_pairs, folder)
    print(f"Pairs made in {seconds:.0f} s.", flush=True)

    # The runs.
    commit = current_commit()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        missing = [name for name in args.only or RUNS if name not in lines]
        futures = [pool.submit(run, folder, name) for name in missing]
        for future in as_completed(futures):
            line = {**future.result(), "commit": commit}
            append_line(results, line)
            print({key: value for key, value in line.items() if key == "name" or "guidance" in key}, flush=True)


if __name__ == "__main__":
    main()
