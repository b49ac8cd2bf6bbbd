"""The README's first run, and runs that differ from it: what guidance shows of them.

    python tests/benchmarks/first_run.py FOLDER           # one run on each core; finished runs are kept
    python tests/benchmarks/first_run.py FOLDER --show    # table and picture of them, into FOLDER

Every run is the README's own command with other flags, on the same pairs, and is measured on 48 images of captions
that are in no pair, at each guidance. FOLDER/first_run.jsonl has a line for each: command, commit, versions, figures.
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
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}

import diffusers  # noqa: E402
import torch  # noqa: E402
from conftest import scalars  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402
from trained_world import SIZE, sample, shares  # noqa: E402


IMAGES, GUIDANCE = 48, (1.5, 5.0, 7.5)
LORA = "--learning_rate 1e-3 --rank 64 --lora_layers"
# Flags that come behind those of the first run; None is the base model itself.
RUNS = {
    "base": None,
    "whole UNet, beta 64": "",
    "whole UNet, beta 8": "--beta_mapo 8",
    "whole UNet, SFT": "--beta_mapo inf",
    "LoRA, attention": f"{LORA} attention",
    "LoRA, transformer": f"{LORA} transformer",
    "LoRA, all": f"{LORA} all",
    "LoRA of rank 8, all": "--learning_rate 1e-3 --rank 8",
    "beta 0.1": "--beta_mapo 0.1",
    "learning rate 5e-3": "--learning_rate 5e-3",
}
PICTURED = ("base", "whole UNet, SFT", "whole UNet, beta 64", "LoRA, attention", "LoRA, transformer", "LoRA, all")


def commands():
    """The words of the README's first run: those that make the pairs, and those that train on them."""
    block = re.search(r"```bash\n(python3 -m venv.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    lines = [shlex.split(part) for part in block.replace("\\\n", " ").replace("\n", " ").split("&&")]
    return [words for words in lines if words[:2] == ["accelerate", "launch"]]


def launch(words, folder):
    """Run a command of the README, `demo` being the folder; returns its seconds and all that it printed."""
    words = [str(folder / word.removeprefix("demo/")) if word.startswith("demo/") else word for word in words]
    started = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(words)}\n{done.stderr[-2000:]}")
    return time.perf_counter() - started, done.stderr


def run(folder, name):
    """Train, draw and measure one run; returns its line of results."""
    torch.set_num_threads(1)
    line = {"name": name, "date": str(date.today()), "torch": torch.__version__, "diffusers": diffusers.__version__}
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(folder / "pipeline", add_watermarker=False)
    if RUNS[name] is not None:
        words = [*commands()[1], *RUNS[name].split(), "--cache_dir", str(folder / "cache"), "--validation_steps", "10"]
        output_dir = folder / "runs" / name.replace(" ", "_").replace(",", "")
        line["command"] = shlex.join([*words, "--output_dir", f"demo/runs/{output_dir.name}"]).replace(
            str(folder), "demo"
        )
        line["seconds"], printed = launch([*words, "--output_dir", str(output_dir)], folder)
        line["warnings"] = re.findall(r"WARNING - .*?(eval_.*)", printed)
        line["metrics"] = {key: values for key, values in scalars(output_dir).items() if key.startswith("eval_")}
        if (output_dir / "unet").exists():
            pipeline.unet = diffusers.UNet2DConditionModel.from_pretrained(output_dir / "unet")
        else:
            pipeline.load_lora_weights(output_dir, weight_name="pytorch_lora_weights.safetensors")
            line["parameters"] = sum(p.numel() for n, p in pipeline.unet.named_parameters() if "lora" in n)
    for guidance in GUIDANCE:
        samples = sample(pipeline, IMAGES, guidance)
        line[f"guidance {guidance}"] = shares(samples)
        grid = Image.new("RGB", (6 * SIZE, 2 * SIZE))
        for place, (_, image) in enumerate(samples[:12]):
            grid.paste(image, (place % 6 * SIZE, place // 6 * SIZE))
        grid.save(folder / "grids" / f"{name} {guidance}.png")
    return line


def titled(rows, left, top, cell):
    """A picture of rows of (title, pictures), a column's name above each picture of the first row."""
    picture = Image.new("RGB", (left + cell[0] * len(rows[0][1]), top + cell[1] * len(rows)), "white")
    canvas = ImageDraw.Draw(picture)
    for y, (title, images) in enumerate(rows):
        canvas.text((4, top + y * cell[1] + 4), title, fill="black")
        for x, (name, image) in enumerate(images.items()):
            canvas.text((left + x * cell[0] + 4, 2), name if y == 0 else "", fill="black")
            picture.paste(image, (left + x * cell[0], top + y * cell[1]))
    return picture


def show(folder, lines):
    """Print the table; draw what some runs draw at each guidance."""
    print("| run | parameters | " + " | ".join(f"guidance {guidance:g}" for guidance in GUIDANCE))
    for name in [name for name in RUNS if name in lines]:
        cells = [lines[name][f"guidance {guidance}"] for guidance in GUIDANCE]
        cells = [f"{100 * cell['cartoon']:.0f} / {100 * cell['right']:.0f} %" for cell in cells]
        print(f"| {name} | {lines[name].get('parameters', '')} | " + " | ".join(cells) + " |")
        print("".join(f"    {warning}\n" for warning in lines[name].get("warnings", [])[-2:]), end="")
    rows = []
    for name in [name for name in PICTURED if name in lines]:
        images = {f"guidance {g:g}": Image.open(folder / "grids" / f"{name} {g}.png") for g in GUIDANCE}
        rows.append((name, images))
    titled(rows, 130, 16, (6 * SIZE + 8, 2 * SIZE + 4)).quantize(128).save(folder / "first_run.png", optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", help="names of runs")
    parser.add_argument("--show", action="store_true")
    args = parser.parse_args()
    folder = args.folder.resolve()
    results = folder / "first_run.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    lines = {line["name"]: line for line in lines}
    if args.show:
        return show(folder, lines)
    (folder / "grids").mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, ROOT / "tests" / "trained_world.py", folder], check=True)
    print(f"pairs made in {launch(commands()[0], folder)[0]:.0f} s", flush=True)
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        missing = [name for name in args.only or RUNS if name not in lines]
        for future in as_completed([pool.submit(run, folder, name) for name in missing]):
            line = {**future.result(), "commit": commit}
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print({key: value for key, value in line.items() if key == "name" or "guidance" in key}, flush=True)


if __name__ == "__main__":
    main()
