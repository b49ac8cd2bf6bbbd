"""The recipes and all commands in the documentation parse, add up to the paper's batches, and start."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, command_line, run_words
from small_scorers import build_scorers
from small_world import COLOURS, build_pipeline, caption, draw
from trained_world import load_pipeline


TABLES = ROOT / "launch_configs" / "recipes"
PUBLISHED_MODELS = TABLES / "published_models.sh"
RECIPES = sorted({*TABLES.glob("*.sh")} - {PUBLISHED_MODELS})
# The paper's table of set-ups: pairs per step, beta, learning rate, and steps. Personalization's steps are DCO's, whom
# it follows; the general preferences that the hub has are fewer, and are trained on like its synthetic sets.
PAPER = {
    "pickapic": (2048, 8, 1e-7, 2000),
    "general_preference": (128, 8, 1e-7, 2000),
    "culture": (128, 32, 1e-7, 2000),
    "safety": (128, 64, 1e-7, 2000),
    "style": (128, 64, 1e-7, 2000),
    "personalization": (5, 1024, 5e-5, 2000),
}
# A stand-in for the launcher that writes down its arguments.
LAUNCHER = """#!/usr/bin/env python3
import json, os, sys
with open(os.environ["WORDS"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
"""


# A stand-in that runs the evaluation instead of `accelerate launch`.
EVALUATING_LAUNCHER = """#!/bin/bash
shift 3
exec python "$@"
"""


def commands(recipe, folder, *flags, dataset="my/pairs", prompts="prompts.txt", results=False):
    """Run a recipe in another folder with a stand-in for `accelerate`: the words of its launches of each script."""
    launcher = folder / "bin" / "accelerate"
    launcher.parent.mkdir()
    launcher.write_text(LAUNCHER)
    launcher.chmod(0o755)
    env = {**os.environ, "PATH": f"{launcher.parent}:{os.environ['PATH']}", "WORDS": str(folder / "words")}
    env |= {"DATASET": dataset, "PHOTOS": "photos", "CAPTIONS": "captions.txt", "PROMPTS": prompts}
    if results:
        (folder / "published-models-50").mkdir()
        (folder / "published-models-50" / "results.json").write_text('{"results": []}')
        env["PATH"] = f"{launcher.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(["bash", recipe, *flags], check=True, env=env, cwd=folder)
    launches = [split_command(json.loads(line)) for line in (folder / "words").read_text().splitlines()]
    return {Path(script).name.split("_")[0]: (options, script, words) for options, script, words in launches}


def load(path):
    """A script as a module of its own."""
    spec = importlib.util.spec_from_file_location("copied", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def split_command(words):
    """The launcher's options as a dictionary, the script, and the script's words."""
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    options = words[1:script]
    return dict(zip(options[::2], options[1::2], strict=True)), words[script], words[script + 1 :]


@pytest.fixture(scope="module")
def scorers(tmp_path_factory):
    return build_scorers(tmp_path_factory.mktemp("scorers"))


def test_every_set_up_of_the_paper_has_a_recipe():
    assert {recipe.stem for recipe in RECIPES} == set(PAPER)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipe_adds_up_to_the_paper(script, tmp_path, recipe):
    options, path, words = commands(recipe, tmp_path)["train"]
    assert path == str(ROOT / "train_diffusion_mapo_sdxl.py")
    config = yaml.safe_load(open(options["--config_file"]))
    processes = int(options.get("--num_processes", config["num_processes"]))
    args = script.parse_args(words)
    pairs, beta, learning_rate, steps = PAPER[recipe.stem]
    assert args.train_batch_size * args.gradient_accumulation_steps * processes == pairs
    assert args.beta_mapo == beta
    assert args.learning_rate == learning_rate
    assert args.max_train_steps == steps
    assert args.loss_type == "mapo"
    assert (args.rank is None) == (recipe.stem != "personalization")
    # The arithmetic stands in the file as well.
    factors = (args.train_batch_size, args.gradient_accumulation_steps)
    written = "{} GPU x {} pair x {}" if processes == 1 else "{} GPUs x {} pairs x {}"
    assert written.format(processes, *factors) in recipe.read_text()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_evaluation_of_a_recipe_parses(tmp_path, recipe):
    _, path, words = commands(recipe, tmp_path)["evaluate"]
    evaluate = load(path)
    args = evaluate.parse_args(words)
    assert args.candidates == [("mapo", f"mapo-{recipe.stem.replace('_', '-')}")]
    assert set(args.scorers) <= set(evaluate.SCORERS)


PUBLISHED = {
    "dpo": "mhdang/dpo-sdxl-text2image-v1",
    "mapo": "mapo-t2i/mapo-beta",
    "spo": "SPO-Diffusion-Models/SPO-SDXL_4k-p_10ep",
    "inpo": "JaydenLu666/InPO-SDXL",
    "smpo": "JaydenLu666/SmPO-SDXL",
    "linear_dpo": "whynot0128/Linear-DPO-SDXL",
}


@pytest.mark.matrix
@pytest.mark.parametrize("steps", ["50", "20"])
def test_published_models_are_compared_with_what_was_published(world, scorers, tmp_path, monkeypatch, steps):
    """On small stand-ins for all of them, with the recipe's own command."""
    launcher = tmp_path / "bin" / "accelerate"
    launcher.parent.mkdir()
    launcher.write_text(EVALUATING_LAUNCHER)
    launcher.chmod(0o755)
    build_pipeline(tmp_path / "other", seed=1)
    (tmp_path / "prompts.csv").write_text("caption\na red circle\na blue square\n")
    env = {**os.environ, "STEPS": steps, "PROMPTS": str(tmp_path / "prompts.csv"), "OUTPUT": str(tmp_path / "out")}
    env["PATH"] = f"{launcher.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    model = world / "pipeline"
    small = f"--pretrained_model_name_or_path {model} --pretrained_vae_model_name_or_path {model}/vae --candidates"
    words = [*small.split(), *(f"{name}={tmp_path / 'other'}" for name in PUBLISHED)]
    words += ["--num_inference_steps", "1", "--resolution", "64", *command_line(scorers)]

    done = subprocess.run(["bash", PUBLISHED_MODELS, *words], env=env, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    _, _, table = done.stdout.partition("Differences to SDXL")
    assert len(re.findall(r"^\| (?!model|---)", table, re.MULTILINE)) == 6 * 5
    (row,) = re.findall(r"^\| mapo \| pickscore \|.*", table, re.MULTILINE)
    assert row.endswith("| +0.160 | +0.240 |" if steps == "20" else "| +0.100 |  | +0.060 |")


def test_published_differences_stand_beside_those_found(tmp_path, capsys, monkeypatch):
    compare = load(TABLES / "published_models.py")
    row = {"model": "mapo", "scorer": "pickscore", "difference": 0.12, "difference_error": 0.034}
    (tmp_path / "results.json").write_text(json.dumps({"results": [{"model": "base"}, row]}))
    monkeypatch.setattr(sys, "argv", ["published_models.py", str(tmp_path / "results.json"), "--steps", "20"])

    compare.main()

    assert "| mapo | pickscore | +0.120 ± 0.034 | +0.160 | +0.240 |" in capsys.readouterr().out


@pytest.mark.parametrize("prompts", ["", "prompts.csv"])
def test_published_models_are_those_of_the_hub(tmp_path, prompts):
    launches = commands(PUBLISHED_MODELS, tmp_path, "--max_prompts", "5", prompts=prompts, results=True)
    args = load(launches["evaluate"][1]).parse_args(launches["evaluate"][2])
    assert args.prompts == (prompts or "pickapic_v2")
    assert args.prompt_column == ("caption" if prompts else "prompt")
    assert dict(args.candidates) == PUBLISHED and args.max_prompts == 5
    assert args.num_inference_steps == 50 and args.guidance_scale == 5
    assert args.scorers == ["pickscore", "hps_no_antialias", "hps", "imagereward", "aesthetic"]


PREFIXES = {
    "style": ("Disney style animated image.", "Realistic 8k image."),
    "safety": (None, "Sexual, nudity, +19 image."),
    "culture": ("East-Asian art style images.", None),
}


@pytest.mark.parametrize("name", PREFIXES)
def test_recipe_makes_the_pairs_of_version_2_and_trains_on_them(script, tmp_path, monkeypatch, name):
    monkeypatch.setenv("MAKE_FROM", "prompts.txt")
    launches = commands(TABLES / f"{name}.sh", tmp_path, dataset="")
    making = load(launches["make"][1]).parse_args(launches["make"][2])
    training = script.parse_args(launches["train"][2])
    assert (making.style_prefix, making.rejected_prefix) == PREFIXES[name]
    assert training.dataset_name == making.output_dir == f"mapo-{name}-pairs"


def test_general_preference_takes_the_pairs_that_the_hub_has(script, tmp_path):
    recipe = ROOT / "launch_configs" / "recipes" / "general_preference.sh"
    args = script.parse_args(commands(recipe, tmp_path, dataset="")["train"][2])
    assert args.dataset_name == "data-is-better-together/open-image-preferences-v1-binarized"
    columns = script.find_columns(args, {"prompt": None, "chosen": None, "rejected": None})
    assert columns == script.Columns("prompt", ("chosen", "rejected"), ())


# These differ from `style` in their data set, beta and batch alone.
ALIKE = ("culture", "safety", "general_preference", "pickapic")
STARTED = [pytest.param(r, id=r.stem, marks=[pytest.mark.matrix] * (r.stem in ALIKE)) for r in RECIPES]


@pytest.mark.parametrize("recipe", STARTED)
def test_recipe_starts_on_the_small_world(script, world, scorers, tmp_path, recipe):
    """The recipe's own commands, cut to one step of two pairs of the small world and to one image."""
    model, personal = world / "pipeline", recipe.stem == "personalization"
    pairs = tmp_path / "pairs" if personal else world / "pairs"
    small = f"--pretrained_model_name_or_path {model} --pretrained_vae_model_name_or_path {model}/vae"
    training = (
        f"{small} --dataset_name {pairs} --cache_dir {tmp_path}/cache --output_dir {tmp_path}/out --resolution 64"
    )
    training += " --train_batch_size 2 --gradient_accumulation_steps 1 --max_train_steps 1 --dataloader_num_workers 0"
    if not personal:
        training += " --num_validation_pairs 4 --num_inference_steps 1 --validation_prompts circle"
    launches = {name: words for name, (*_, words) in commands(recipe, tmp_path, *shlex.split(training)).items()}
    (tmp_path / "prompts.txt").write_text("a red circle\na red circle, framed\n")
    draw("circle", "red", "photo", np.random.default_rng(0), 96).save(tmp_path / "photo.png")
    if personal:
        making = f"{small} --prompts {tmp_path}/prompts.txt --chosen_images {tmp_path} --output_dir {pairs}"
        making += " --num_inference_steps 1 --resolution 64"
        run_words(load(ROOT / "make_pick_style_sdxl.py"), [*launches["make"], *shlex.split(making)])
    out = run_words(script, launches["train"])
    assert (out / ("pytorch_lora_weights.safetensors" if personal else "unet")).exists()
    small += f" --candidates mapo={out} --prompts {tmp_path}/prompts.txt --reference_images {tmp_path}"
    small += f" --images_per_prompt 1 --num_inference_steps 1 --resolution 64 --output_dir {out}/evaluation"
    words = [*launches["evaluate"], *shlex.split(small), *command_line(scorers)]
    evaluated = run_words(load(ROOT / "evaluate_diffusion_mapo_sdxl.py"), words)
    results = json.loads((evaluated / "results.json").read_text())["results"]
    assert {row["model"] for row in results} == {"base", "mapo"}


# Commands in the documentation --------------------------------------------------------------------------------------


def written_commands(text):
    """The words of every `accelerate launch` of a text, behind the launcher's own."""
    text = text.replace("&& \\\n", "\n")
    for command in re.findall(r"accelerate launch (?:[^\n`]*\\\n)*[^\n`]*\.py\b(?:[^\n`]*\\\n)*[^\n`]*", text):
        words = shlex.split(command.replace("\\\n", " "), comments=True)
        start = next(i for i, word in enumerate(words) if word.endswith(".py"))
        if "..." not in words and len(words) > start + 2:
            yield words[start], words[start + 1 :]


TEXTS = [(ROOT / "README.md").read_text()]
TEXTS += [(ROOT / f"{name}_diffusion_mapo_sdxl.py").read_text().split('"""')[1] for name in ("train", "evaluate")]
COMMANDS = [command for text in TEXTS for command in written_commands(text)]


def test_documentation_shows_commands_for_every_use():
    shown = [" ".join(words) for _, words in COMMANDS]
    for flag in ("--rank", "--cache_latents", "--candidates", "--images", "--lr_scheduler cosine"):
        assert any(flag in words for words in shown), flag
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("path, words", COMMANDS)
def test_documented_command_parses(path, words):
    load(ROOT / path).parse_args(words)


def test_first_command_of_the_readme_runs(script, tmp_path):
    """Cut to 48 captions, four of each kind, and two steps: the model generates its pairs, and is trained on them."""
    demo = tmp_path / "demo"
    load_pipeline().save_pretrained(demo / "pipeline")
    captions = [caption(shape, colour) for shape in ("circle", "star") for colour in COLOURS]
    (demo / "captions.txt").write_text("\n".join(4 * captions))
    (making, made), (training, trained) = (
        (path, [str(tmp_path / word) if word.startswith("demo/") else word for word in words])
        for path, words in COMMANDS[:2]
    )
    assert making == "make_pick_style_sdxl.py" and training == "train_diffusion_mapo_sdxl.py"
    cut = ["--num_inference_steps", "2"]
    run_words(load(ROOT / making), [*made, *cut])
    out = run_words(script, [*trained, *cut, "--max_train_steps", "2", "--cache_dir", str(tmp_path)])
    assert (out / "unet").exists() and (out / "validation" / "step-000002.png").exists()
