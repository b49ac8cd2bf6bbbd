"""
Is preference optimization worth it? MaPO and SFT fine-tune the small SDXL of the tests on the same pairs.

    python tests/benchmarks/proof.py FOLDER           # the missing runs, one on each core, then tables and pictures
    python tests/benchmarks/proof.py FOLDER --short   # only the runs of the pictures, with one seed
    python tests/benchmarks/proof.py FOLDER --show    # tables and pictures of the finished runs

Three tasks are three degrees of mismatch between the base model and the chosen images. In `size`, both images of a
pair look like samples of the base model, and the larger shape is chosen. In `frame`, the chosen images lack the frame
that half of the base model's samples have. In `cartoon`, they are in a style that the base model never generates.

Each run is measured on 48 images of six captions at each guidance scale, at seeds that nothing else uses. The pairs of
`frame` and `cartoon` do not contain these captions. An image with a wrong shape or colour scores 0. Others score the
radius of their shape (`size`), or 1 if they are as the chosen images are (`frame`, `cartoon`).

FOLDER/proof.jsonl gets a line for each run: command, commit, versions, machine, date, metrics, and every score.
FOLDER/grids gets samples of each run. The tables are printed, for proof.md.
"""

import argparse
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import date
from pathlib import Path


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
# Each run has one core.
os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"})

import diffusers  # noqa: E402
import torch  # noqa: E402
from conftest import scalars  # noqa: E402
from first_run import (  # noqa: E402
    GUIDANCE,
    append_line,
    current_commit,
    draw_samples,
    grid_path,
    load_trained,
    read_lines,
    save_grid,
)
from trained_world import SIZE, TASKS, draw_preferences, load_pipeline, measure, radius, sample  # noqa: E402


IMAGES = 48
PAIRS = {"size": 720, "frame": 360, "cartoon": 360}
# Differences are small in the first two tasks, so they need more seeds.
SEEDS = {"size": 5, "frame": 3, "cartoon": 1}

SFT = "--beta_mapo inf"
BETA_8 = "--beta_mapo 8"
LORA = "--rank 64 --learning_rate 1e-3"
OBJECTIVES = {
    "SFT": SFT,
    "beta 8": BETA_8,
    "beta 32": "--beta_mapo 32",
    "beta 64": "--beta_mapo 64",
    "beta 128": "--beta_mapo 128",
    "beta 1024": "--beta_mapo 1024",
    "v1": "--loss_type mapo_v1 --beta_mapo 0.1",
}


# Runs ----------------------------------------------------------------------------------------------------------------


@dataclass
class Experiment:
    """A run for each seed."""

    task: str
    flags: str | None  # None is the base model itself
    seeds: int = 1


def experiments():
    """All experiments by name. A name begins with its task."""
    found = {}
    for task, seeds in SEEDS.items():
        found[f"{task}, base"] = Experiment(task, None)
        for name, flags in OBJECTIVES.items():
            found[f"{task}, {name}"] = Experiment(task, flags, seeds)
        for name in ("SFT", "beta 8", "beta 64"):
            found[f"{task}, LoRA, {name}"] = Experiment(task, f"{LORA} {OBJECTIVES[name]}")

    # What SFT reaches at other learning rates, and at the end of a longer run.
    for rate, seeds in {"5e-5": 1, "5e-4": 5, "1e-3": 1}.items():
        for name in ("SFT", "beta 8"):
            flags = f"{OBJECTIVES[name]} --learning_rate {rate}"
            found[f"size, {name}, rate {rate}"] = Experiment("size", flags, seeds)
    for name in ("SFT", "beta 8"):
        found[f"size, {name}, 450 steps"] = Experiment("size", f"{OBJECTIVES[name]} --max_train_steps 450")

    # Runs that break the model.
    for task in ("size", "cartoon"):
        found[f"{task}, beta 0.1"] = Experiment(task, "--beta_mapo 0.1")
        found[f"{task}, beta 8, rate 2e-3"] = Experiment(task, f"{BETA_8} --learning_rate 2e-3")
    found["cartoon, beta 8, 900 steps"] = Experiment("cartoon", f"{BETA_8} --max_train_steps 900")
    return found


def command_line(folder, experiment, seed, output_dir):
    """The words of a training run. Of flags that are given twice, the second ones are valid."""
    options = {
        "pretrained_model_name_or_path": folder / "world" / "pipeline",
        "dataset_name": folder / "world" / experiment.task,
        "cache_dir": folder / "cache",
        "resolution": SIZE,
        "train_batch_size": 8,
        "max_train_steps": 150,
        "learning_rate": "2e-4",
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 0,
        "num_validation_pairs": 48,
        "validation_steps": 1000,
        "seed": seed,
        "output_dir": output_dir,
    }
    words = ["accelerate", "launch", "--config_file", str(ROOT / "launch_configs" / "cpu.yaml")]
    # The base model's photos are lit from the left: models that learn from flipped ones generate fewer right shapes.
    words += [str(ROOT / "train_diffusion_mapo_sdxl.py"), "--cache_latents", "--no_hflip"]
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    return [*words, *experiment.flags.split()]


def train(folder, name, seed):
    """Train one run. Returns what its line of results says about that, and its output folder."""
    output_dir = folder / "runs" / f"{name} {seed}".replace(",", "").replace(" ", "_")
    command = command_line(folder, experiments()[name], seed, output_dir)
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr[-2000:]}")
    seconds = time.perf_counter() - started

    # Held-out metrics before and after training, without those of the noise bands.
    metrics = {}
    for key, values in scalars(output_dir).items():
        if key.startswith("eval_") and "_t" not in key:
            steps = list(values)
            metrics[key] = (values[steps[0]], values[steps[-1]])

    line = {
        "seconds": round(seconds),
        "command": shlex.join(command).replace(f"{ROOT}/", "").replace(str(folder), "FOLDER"),
        "metrics": metrics,
    }
    return line, output_dir


def score(task, subject, image):
    """The score of an image whose caption names a (shape, colour)."""
    seen = measure(image)
    if (seen["shape"], seen["colour"]) != subject:
        return 0
    if task == "size":
        return round(radius(image), 4)
    if task == "frame":
        return int(not seen["framed"])
    return int(seen["cartoon"])


def run(folder, name, seed):
    """Train, sample and score one run. Returns its line of results."""
    torch.set_num_threads(1)
    experiment = experiments()[name]
    line = {
        "name": name,
        "seed": seed,
        "date": str(date.today()),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    pipeline = load_base(folder)
    if experiment.flags is not None:
        trained, output_dir = train(folder, name, seed)
        line.update(trained)
        load_trained(pipeline, output_dir)

    for guidance in GUIDANCE:
        samples = sample(pipeline, IMAGES, guidance)
        line[f"guidance {guidance:g}"] = [score(experiment.task, subject, image) for subject, image in samples]
        if seed == 0:
            save_grid(samples, grid_path(folder, name, guidance))
    return line


def load_base(folder):
    return diffusers.StableDiffusionXLPipeline.from_pretrained(folder / "world" / "pipeline", add_watermarker=False)


def build_world(folder):
    """The base model and the pairs of each task, once."""
    (folder / "grids").mkdir(parents=True, exist_ok=True)
    if (folder / "world").exists():
        return
    load_pipeline().save_pretrained(folder / "world" / "pipeline")
    for task in TASKS:
        draw_preferences(folder / "world" / task, task, PAIRS[task])


def run_missing(folder, results, lines, short):
    """Run what has no line of results yet, and append its line. `short` leaves out what no picture shows."""
    done = {(line["name"], line["seed"]) for line in lines}
    commit = current_commit()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        futures = []
        for name, experiment in experiments().items():
            seeds = experiment.seeds
            if short:
                seeds = 1 if name in PROOF_PICTURE or name in FAILURES_PICTURE else 0
            for seed in range(seeds):
                if (name, seed) not in done:
                    futures.append(pool.submit(run, folder, name, seed))
        for future in as_completed(futures):
            line = {**future.result(), "commit": commit}
            append_line(results, line)
            lines.append(line)
            print(line["name"], line["seed"], file=sys.stderr, flush=True)


# Tables and pictures -------------------------------------------------------------------------------------------------

# Names in the results, and what the tables and pictures call them.
SIZE_ROWS = {
    "base": "base",
    "SFT": "SFT",
    "beta 64": "MaPO, beta 64",
    "SFT, rate 5e-4": "SFT, rate 5e-4",
    "beta 8, rate 5e-4": "MaPO, beta 8, rate 5e-4",
    "v1": "MaPO, `mapo_v1`",
}
SHARE_TABLES = {
    "frame": "no frames",
    "cartoon": "cartoons",
}
SHARE_ROWS = {
    "base": "base",
    "SFT": "SFT",
    "beta 1024": "MaPO, beta 1024",
    "beta 128": "MaPO, beta 128",
    "beta 64": "MaPO, beta 64",
    "beta 32": "MaPO, beta 32",
    "beta 8": "MaPO, beta 8",
    "v1": "MaPO, `mapo_v1`",
    "LoRA, SFT": "SFT, LoRA",
    "LoRA, beta 64": "MaPO, beta 64, LoRA",
    "LoRA, beta 8": "MaPO, beta 8, LoRA",
}
PROOF_PICTURE = {
    "size, base": "larger shapes:\nbase model",
    "size, SFT": "SFT",
    "size, beta 64": "MaPO",
    "frame, base": "no frames:\nbase model",
    "frame, SFT": "SFT",
    "frame, beta 64": "MaPO",
    "cartoon, base": "cartoons:\nbase model",
    "cartoon, SFT": "SFT",
    "cartoon, beta 64": "MaPO",
}
FAILURES_PICTURE = {
    "cartoon, base": "base model",
    "cartoon, beta 64": "healthy: beta 64",
    "cartoon, beta 0.1": "beta too small:\n0.1",
    "cartoon, beta 8, 900 steps": "beta 8, too many\nsteps: 900",
    "cartoon, beta 8, rate 2e-3": "beta 8, learning rate\ntoo large: 2e-3",
}
KEYS = [f"guidance {guidance:g}" for guidance in GUIDANCE]


def by_name(lines):
    """{name: {seed: line}}"""
    runs = {}
    for line in lines:
        runs.setdefault(line["name"], {})[line["seed"]] = line
    return runs


def spread(values, digits=3):
    """Mean and standard error over seeds."""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{mean} ± {error:.{digits}f}"


def wins(scores, others):
    """Share of images with the higher score, ties counting half. Both lists are from the same seeds."""
    total = 0
    for score, other in zip(scores, others, strict=True):
        if score > other:
            total += 1
        elif score == other:
            total += 0.5
    return total / len(scores)


def print_size_table(runs):
    """Mean radius in % of the side; wins are against SFT at the same learning rate and seed."""
    print(f"| larger shapes | {' | '.join(KEYS)} |")
    print("|---|" + "---|" * len(KEYS))
    for name, title in SIZE_ROWS.items():
        if f"size, {name}" not in runs:
            continue
        sft = runs.get("size, SFT, rate 5e-4" if "rate 5e-4" in name else "size, SFT", {})
        cells = []
        for key in KEYS:
            means = []
            won = []
            for seed, line in runs[f"size, {name}"].items():
                means.append(100 * statistics.mean(line[key]))
                if seed in sft:
                    won.append(100 * wins(line[key], sft[seed][key]))
            cell = spread(means, 1)
            if "MaPO" in title and won:
                cell += f", wins {statistics.mean(won):.0f} %"
            cells.append(cell)
        print(f"| {title} | {' | '.join(cells)} |")


def print_share_table(runs, task):
    """Images as the chosen ones are, in %."""
    print(f"| {SHARE_TABLES[task]} | {' | '.join(KEYS)} |")
    print("|---|" + "---|" * len(KEYS))
    for name, title in SHARE_ROWS.items():
        if f"{task}, {name}" not in runs:
            continue
        cells = []
        for key in KEYS:
            means = [100 * statistics.mean(line[key]) for line in runs[f"{task}, {name}"].values()]
            cells.append(spread(means, 0))
        print(f"| {title} | {' | '.join(cells)} |")


def print_all_runs(runs, key):
    """Every experiment at one guidance scale."""
    print("| run | seeds | mean score | right | wins against the base | against SFT |")
    print("|---|---|---|---|---|---|")
    for name in experiments():
        if name not in runs:
            continue
        task = name.split(",")[0]
        base = runs[f"{task}, base"][0]
        sft = runs.get(f"{task}, SFT", {})

        means = []
        right = []
        against_base = []
        against_sft = []
        for seed, line in runs[name].items():
            means.append(statistics.mean(line[key]))
            right.append(statistics.mean(score > 0 for score in line[key]))
            against_base.append(wins(line[key], base[key]))
            if seed in sft:
                against_sft.append(wins(line[key], sft[seed][key]))
        last = ""
        if against_sft and name != f"{task}, SFT":
            last = spread(against_sft)
        print(f"| {name} | {len(runs[name])} | {spread(means)} | {spread(right)} | {spread(against_base)} | {last} |")


def show(folder, lines):
    runs = by_name(lines)

    print_size_table(runs)
    for task in SHARE_TABLES:
        print()
        print_share_table(runs, task)
    for key in KEYS:
        print(f"\n{key}\n")
        print_all_runs(runs, key)
    seconds = sum(line.get("seconds", 0) for line in lines)
    print(f"\n{len(lines)} runs, {seconds / 3600:.1f} hours of training on one core each")

    draw_samples(folder, PROOF_PICTURE, folder / "proof.png")
    draw_samples(folder, FAILURES_PICTURE, folder / "failures.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--short", action="store_true", help="only the runs of the pictures, with one seed")
    parser.add_argument("--show", action="store_true", help="only print the tables and draw the pictures")
    args = parser.parse_args()
    folder = args.folder.resolve()
    results = folder / "proof.jsonl"
    lines = read_lines(results)

    if not args.show:
        build_world(folder)
        run_missing(folder, results, lines, args.short)
    show(folder, lines)


if __name__ == "__main__":
    main()
