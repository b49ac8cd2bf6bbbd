"""The recipes of launch_configs/recipes/: what they ask for parses, adds up to the paper's batch, and starts."""

import importlib.util
import json
import os
import shlex
import subprocess

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT, run_words
from small_world import draw_pairs


RECIPES = sorted((ROOT / "launch_configs" / "recipes").glob("*.sh"))
# (pairs a step, beta, learning rate, steps or None where the paper names none), paper's table of set-ups
PAPER = {
    "general_preference": (2048, 8, 1e-7, 2000),
    "culture": (128, 32, 1e-7, 2000),
    "safety": (128, 64, 1e-7, 2000),
    "style": (128, 64, 1e-7, 2000),
    "personalization": (5, 1024, 5e-5, None),
}
# Stands in for the launcher: writes down the words that it is given.
LAUNCHER = """#!/usr/bin/env python3
import json, os, sys
with open(os.environ["WORDS"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
"""


def commands(recipe, folder, *flags):
    """Run a recipe in another folder with a stand-in for `accelerate`: the words of its launches."""
    launcher = folder / "bin" / "accelerate"
    launcher.parent.mkdir()
    launcher.write_text(LAUNCHER)
    launcher.chmod(0o755)
    env = {**os.environ, "PATH": f"{launcher.parent}:{os.environ['PATH']}", "WORDS": str(folder / "words")}
    env |= {"DATASET": "my/pairs", "PHOTOS": "photos", "PROMPTS": "prompts.txt"}
    subprocess.run(["bash", recipe, *flags], check=True, env=env, cwd=folder)
    return [json.loads(line) for line in (folder / "words").read_text().splitlines()]


def split_command(words):
    """The launcher's options as a dictionary, the script, and the script's words."""
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    options = words[1:script]
    return dict(zip(options[::2], options[1::2], strict=True)), words[script], words[script + 1 :]


def test_every_set_up_of_the_paper_has_a_recipe():
    assert {recipe.stem for recipe in RECIPES} == set(PAPER)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipe_adds_up_to_the_paper(script, tmp_path, recipe):
    options, path, words = split_command(commands(recipe, tmp_path)[0])
    assert path == str(ROOT / "train_diffusion_mapo_sdxl.py")
    config = yaml.safe_load(open(options["--config_file"]))
    processes = int(options.get("--num_processes", config["num_processes"]))
    args = script.parse_args(words)
    pairs, beta, learning_rate, steps = PAPER[recipe.stem]
    assert args.train_batch_size * args.gradient_accumulation_steps * processes == pairs
    assert args.beta_mapo == beta
    assert args.learning_rate == learning_rate
    assert steps in (None, args.max_train_steps)
    assert args.loss_type == "mapo"
    assert (args.rank is None) == (recipe.stem != "personalization")
    # The arithmetic stands in the file as well.
    factors = (args.train_batch_size, args.gradient_accumulation_steps)
    written = "{} GPU x {} pair x {}" if processes == 1 else "{} GPUs x {} pairs x {}"
    assert written.format(processes, *factors) in recipe.read_text()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_evaluation_of_a_recipe_parses(tmp_path, recipe):
    _, path, words = split_command(commands(recipe, tmp_path)[1])
    spec = importlib.util.spec_from_file_location("evaluate", path)
    evaluate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(evaluate)
    args = evaluate.parse_args(words)
    assert args.candidates == [("mapo", f"mapo-{recipe.stem.replace('_', '-')}")]
    assert set(args.scorers) <= set(evaluate.SCORERS)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipe_starts_on_the_small_world(script, world, tmp_path, recipe):
    """The recipe's own command, cut to one step of two pairs of the small world, through the script."""
    if recipe.stem == "personalization":
        pairs = tmp_path / "pairs"
        draw_pairs(pairs, num_pairs=5, num_shards=1)
        shard = next(pairs.glob("data/*"))
        rows = pq.read_table(shard).to_pylist()
        rows = [{"caption": row["caption"], "chosen": row["jpg_0"], "rejected": row["jpg_1"]} for row in rows]
        pq.write_table(pa.Table.from_pylist(rows), shard)
    else:
        pairs = world / "pairs"
    model = world / "pipeline"
    small = f"--pretrained_model_name_or_path {model} --pretrained_vae_model_name_or_path {model}/vae"
    small += f" --dataset_name {pairs} --cache_dir {tmp_path}/cache --output_dir {tmp_path}/out --resolution 64"
    small += " --train_batch_size 2 --gradient_accumulation_steps 1 --max_train_steps 1 --dataloader_num_workers 0"
    if recipe.stem != "personalization":
        small += " --num_validation_pairs 4 --num_inference_steps 1 --validation_prompts circle"
    _, _, words = split_command(commands(recipe, tmp_path, *shlex.split(small))[0])
    out = run_words(script, words)
    weights = "pytorch_lora_weights.safetensors" if recipe.stem == "personalization" else "unet"
    assert (out / weights).exists()
