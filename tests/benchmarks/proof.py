"""Is preference optimization worth it? The trained world's small SDXL, aligned by MaPO and by SFT, run by run.

    python tests/benchmarks/proof.py FOLDER           # the missing runs, one on each core, then tables and pictures
    python tests/benchmarks/proof.py FOLDER --show    # tables and pictures of the runs that there are

Three tasks are three degrees of mismatch between the base and the chosen images. In `size` both images of a pair are
drawn as the base draws, and the larger shape is chosen; in `frame` the chosen ones lack the frame that half of the
base's images have; in `cartoon` they are of another style. Each run is measured on 48 images of six captions, at seeds
that nothing else uses, at each guidance; no pair of `frame` and `cartoon` has these captions. An image scores nothing
if its shape or colour is wrong, otherwise its radius (`size`), or 1 if it is as the chosen ones are.

FOLDER/proof.jsonl has a line for each run: command, commit, versions, machine, date, metrics, and every score.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import date
from pathlib import Path


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
# Each run has one core.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}

import diffusers  # noqa: E402
import torch  # noqa: E402
from conftest import scalars  # noqa: E402
from first_run import GUIDANCE, titled  # noqa: E402
from PIL import Image  # noqa: E402
from trained_world import SIZE, TASKS, draw_preferences, load_pipeline, measure, radius, sample  # noqa: E402


IMAGES = 48
PAIRS = {"size": 720, "frame": 360, "cartoon": 360}
BETAS = (8, 32, 64, 128, 1024)
SFT, V1 = "--beta_mapo inf", "--loss_type mapo_v1 --beta_mapo 0.1"
# The differences of the first tasks are small.
SEEDS = {"size": 5, "frame": 3, "cartoon": 1}
LORA = "--rank 64 --learning_rate 1e-3"


def experiments():
    """All runs: {name: (task, number of seeds, flags)}; the base has no flags. A name begins with its task."""
    runs = {}
    for task in TASKS:
        runs[f"{task}, base"] = (task, 1, None)
        for name, flags in {"SFT": SFT, **{f"beta {beta}": f"--beta_mapo {beta}" for beta in BETAS}, "v1": V1}.items():
            runs[f"{task}, {name}"] = (task, SEEDS[task], flags)
        for name, flags in {"SFT": SFT, "beta 8": "--beta_mapo 8", "beta 64": "--beta_mapo 64"}.items():
            runs[f"{task}, LoRA, {name}"] = (task, 1, f"{LORA} {flags}")
    # What SFT reaches with other rates, and at its end; what goes wrong on purpose.
    for rate, seeds in {"5e-5": 1, "5e-4": 5, "1e-3": 1}.items():
        for name, flags in {"SFT": SFT, "beta 8": "--beta_mapo 8"}.items():
            runs[f"size, {name}, rate {rate}"] = ("size", seeds, f"{flags} --learning_rate {rate}")
    for name, flags in {"SFT": SFT, "beta 8": "--beta_mapo 8"}.items():
        runs[f"size, {name}, 450 steps"] = ("size", 1, f"{flags} --max_train_steps 450")
    for task in ("size", "cartoon"):
        runs[f"{task}, beta 0.1"] = (task, 1, "--beta_mapo 0.1")
        runs[f"{task}, beta 8, rate 2e-3"] = (task, 1, "--beta_mapo 8 --learning_rate 2e-3")
    runs["cartoon, beta 8, 900 steps"] = ("cartoon", 1, "--beta_mapo 8 --max_train_steps 900")
    return runs


SIZE_ROWS = {"base": "base", "SFT": "SFT", "beta 64": "MaPO, beta 64"}
SIZE_ROWS |= {"SFT, rate 5e-4": "SFT, rate 5e-4", "beta 8, rate 5e-4": "MaPO, beta 8, rate 5e-4"}
SIZE_ROWS |= {"v1": "MaPO, `mapo_v1`"}
FAILURES = {"base": "base", "beta 8": "healthy: beta 8", "beta 0.1": "beta too small: 0.1"}
FAILURES |= {"beta 8, 900 steps": "too many steps: 900", "beta 8, rate 2e-3": "rate too large: 2e-3"}


def command_line(folder, task, flags, seed, output_dir):
    words = ["accelerate", "launch", "--config_file", ROOT / "launch_configs" / "cpu.yaml"]
    words += [ROOT / "train_diffusion_mapo_sdxl.py", "--pretrained_model_name_or_path", folder / "world" / "pipeline"]
    words += ["--dataset_name", folder / "world" / task, "--cache_dir", folder / "cache", "--cache_latents"]
    words += ["--resolution", SIZE, "--train_batch_size", 8, "--max_train_steps", 150, "--learning_rate", "2e-4"]
    # The light of the base's photos is on the left: models that learn from flipped ones draw fewer right shapes.
    words += ["--no_hflip", "--lr_scheduler", "cosine", "--lr_warmup_steps", 0, "--num_validation_pairs", 48]
    words += ["--validation_steps", 1000, "--seed", seed, "--output_dir", output_dir]
    return [*map(str, words), *flags.split()]


def score(task, subject, image):
    """What the image of a (shape, colour) is worth."""
    seen = measure(image)
    if (seen["shape"], seen["colour"]) != subject:
        return 0
    return {"size": round(radius(image), 4), "frame": int(not seen["framed"]), "cartoon": int(seen["cartoon"])}[task]


def run(folder, name, seed):
    """Train, draw and measure one run; returns its line of results."""
    torch.set_num_threads(1)
    task, _, flags = experiments()[name]
    line = {
        "name": name,
        "seed": seed,
        "date": str(date.today()),
        "machine": platform.processor() or platform.machine(),
    }
    line |= {"torch": torch.__version__, "diffusers": diffusers.__version__}
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(
        folder / "world" / "pipeline", add_watermarker=False
    )
    if flags is not None:
        output_dir = folder / "runs" / f"{name} {seed}".replace(",", "").replace(" ", "_")
        command, started = command_line(folder, task, flags, seed, output_dir), time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{shlex.join(command)}\n{done.stderr[-2000:]}")
        line["seconds"] = round(time.perf_counter() - started)
        line["command"] = shlex.join(command).replace(f"{ROOT}/", "").replace(str(folder), "FOLDER")
        logged = {key: list(values.items()) for key, values in scalars(output_dir).items() if key.startswith("eval_")}
        line["metrics"] = {key: (values[0][1], values[-1][1]) for key, values in logged.items() if "_t" not in key}
        if (output_dir / "unet").exists():
            pipeline.unet = diffusers.UNet2DConditionModel.from_pretrained(output_dir / "unet")
        else:
            pipeline.load_lora_weights(output_dir, weight_name="pytorch_lora_weights.safetensors")
    for guidance in GUIDANCE:
        samples = sample(pipeline, IMAGES, guidance)
        line[f"guidance {guidance:g}"] = [score(task, *drawn) for drawn in samples]
        if seed == 0:
            grid = Image.new("RGB", (6 * SIZE, 2 * SIZE))
            for place, (_, image) in enumerate(samples[:12]):
                grid.paste(image, (place % 6 * SIZE, place // 6 * SIZE))
            grid.save(folder / "grids" / f"{name} {guidance:g}.png")
    return line


# Tables and pictures -------------------------------------------------------------------------------------------------


def spread(values, digits=3):
    """Mean and standard error over seeds."""
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{error}"


def wins(scores, others):
    """Share of images with the higher score, ties counting half; both were drawn from the same seeds."""
    return statistics.mean((a > b) + 0.5 * (a == b) for a, b in zip(scores, others, strict=True))


def digest(runs):
    """The two tables of the README, means over seeds; wins are against SFT at the same rate and seed."""
    keys = [f"guidance {guidance:g}" for guidance in GUIDANCE]
    print(f"| larger shapes | {' | '.join(keys)} |\n|{'---|' * (len(keys) + 1)}")
    for name, title in SIZE_ROWS.items():
        name, cells = f"size, {name}", []
        tuned = runs["size, SFT" + (", rate 5e-4" if "5e-4" in name else "")]
        for key in keys:
            means = [100 * statistics.mean(line[key]) for line in runs[name].values()]
            won = [100 * wins(line[key], tuned[seed][key]) for seed, line in runs[name].items()]
            against = f", wins {statistics.mean(won):.0f} %" if "MaPO" in title else ""
            cells.append(spread(means, 1) + against)
        print(f"| {title} | {' | '.join(cells)} |")
    columns = {"SFT": "SFT", **{f"beta {beta}": f"beta {beta}" for beta in (128, 64, 32, 8)}, "v1": "`mapo_v1`"}
    print(f"\n| chosen | base | {' | '.join(columns.values())} |\n|{'---|' * (len(columns) + 2)}")
    for task, title in {"frame": "no frames", "cartoon": "cartoons", "cartoon, LoRA": "cartoons, LoRA"}.items():
        cells = []
        for name in [f"{task.split(',')[0]}, base", *(f"{task}, {column}" for column in columns)]:
            means = [[statistics.mean(line[key]) for line in runs.get(name, {}).values()] for key in keys]
            cells.append(" / ".join(f"{100 * statistics.mean(values):.0f}" for values in means if values))
        print(f"| {title} | {' | '.join(cells)} |")


def show(folder, lines):
    runs = {}
    for line in lines:
        runs.setdefault(line["name"], {})[line["seed"]] = line
    digest(runs)
    for guidance in GUIDANCE:
        key = f"guidance {guidance:g}"
        print(f"\n{key}\n\n| run | seeds | mean score | right | wins against the base | against SFT |")
        print("|---|---|---|---|---|---|")
        for name in [name for name in experiments() if name in runs]:
            task, same = name.split(",")[0], runs[name]
            base, tuned = runs[f"{task}, base"][0][key], runs.get(f"{task}, SFT", {})
            cells = [spread([statistics.mean(line[key]) for line in same.values()])]
            cells += [spread([statistics.mean(s > 0 for s in line[key]) for line in same.values()])]
            cells += [spread([wins(line[key], base) for line in same.values()])]
            paired = [wins(line[key], tuned[seed][key]) for seed, line in same.items() if seed in tuned]
            cells += [spread(paired) if paired and name != f"{task}, SFT" else ""]
            print(f"| {name} | {len(same)} | " + " | ".join(cells) + " |")
    seconds = sum(line.get("seconds", 0) for line in lines)
    print(f"\n{len(lines)} runs, {seconds / 3600:.1f} hours of training on one core each")
    grids = folder / "grids"
    shown = {"base": "base", "SFT": "SFT", "beta 64": "MaPO, beta 64"}
    pictures = {"proof": {f"{t}, {name}": f"{t}: {title}" for t in TASKS for name, title in shown.items()}}
    pictures["failures"] = {f"cartoon, {name}": title for name, title in FAILURES.items()}
    for file, rows in pictures.items():
        rows = [
            (title, {f"guidance {g:g}": Image.open(grids / f"{name} {g:g}.png") for g in GUIDANCE})
            for name, title in rows.items()
        ]
        picture = titled(rows, 130, 16, (6 * SIZE + 8, 2 * SIZE + 4))
        picture.quantize(128).save(folder / f"{file}.png", optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--show", action="store_true", help="run nothing")
    args = parser.parse_args()
    folder = args.folder.resolve()
    results = folder / "proof.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    if not args.show:
        (folder / "grids").mkdir(parents=True, exist_ok=True)
        if not (folder / "world").exists():
            load_pipeline().save_pretrained(folder / "world" / "pipeline")
            for task in TASKS:
                draw_preferences(folder / "world" / task, task, PAIRS[task])
        commit = subprocess.run(
            ["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True
        ).stdout.strip()
        done = {(line["name"], line["seed"]) for line in lines}
        jobs = [(name, seed) for name, (_, seeds, _) in experiments().items() for seed in range(seeds)]
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            jobs = [pool.submit(run, folder, *job) for job in jobs if job not in done]
            for job in as_completed(jobs):
                lines.append({**job.result(), "commit": commit})
                with results.open("a") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
                print(lines[-1]["name"], lines[-1]["seed"], flush=True)
    show(folder, lines)


if __name__ == "__main__":
    main()
