"""The evaluation script: what is drawn, what the scorers say, what is written, and how wrong use ends."""

import json
import math
import os
import re
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, command_line, load_script, save_lora
from conftest import run as run_script
from cpu_cluster import run_ranks
from diffusers import DDIMScheduler, EDMEulerScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.schedulers import KarrasDiffusionSchedulers
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from small_loras import REFUSED, merge, random_lora, save_kohya, save_peft, save_refused
from small_scorers import build_scorers, expected_score, remove_vocabulary, remove_weight, spoil_weights
from small_world import build_pipeline, draw


SCRIPT = ROOT / "evaluate_diffusion_mapo_sdxl.py"
SCORERS = ["pickscore", "hps", "aesthetic", "clip", "siglip", "dinov2", "imagereward", "hps_no_antialias"]
# float32 itself leaves 1e-7 of a cosine, which some scores are a hundred times of.
TOLERANCE = {"pickscore": 1e-5, "aesthetic": 1e-5, "hps": 3e-5, "clip": 3e-5, "siglip": 3e-5, "dinov2": 3e-5}
TOLERANCE |= {"imagereward": 1e-5, "hps_no_antialias": 3e-5}
# One in capitals with a comma, one longer than the scorers read.
PROMPTS = ["a red circle", "An orange star, drawn by hand", "a blue square " * 30]
SIZES = [(64, 64), (90, 50), (33, 57)]


@pytest.fixture(scope="module")
def script():
    return load_script(SCRIPT)


def write_images(folder, colour, seed):
    folder.mkdir()
    for index, (shape, size) in enumerate(zip(("circle", "star", "square"), SIZES, strict=True)):
        image = draw(shape, colour, "photo", np.random.default_rng(seed + index), 96)
        image.resize(size).save(folder / f"{index:05d}_0.png")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Folder with prompts, ready-made images (red, blue, references), a base pipeline, and candidates of each kind."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    for colour, seed in (("red", 0), ("blue", 10), ("green", 20)):
        write_images(folder / colour, colour, seed)
    build_pipeline(folder / "pipeline")
    build_pipeline(folder / "other", seed=1)
    shutil.copytree(folder / "other" / "unet", folder / "trained" / "unet")
    shutil.copytree(folder / "other" / "unet", folder / "unet")
    save_lora(folder)
    return folder


@pytest.fixture(scope="module")
def scorers(tmp_path_factory):
    return build_scorers(tmp_path_factory.mktemp("scorers"))


@pytest.fixture
def ready(small, scorers, tmp_path):
    """Flags that score images made already with one scorer."""
    return {
        "images": [f"red={small / 'red'}", f"blue={small / 'blue'}"],
        "prompts": small / "prompts.txt",
        "scorers": ["clip"],
        "output_dir": tmp_path / "out",
        **scorers,
    }


def drawing(small, sources, output_dir, **changes):
    """Flags that draw with the small pipeline."""
    return {
        "pretrained_model_name_or_path": small / "pipeline",
        "prompts": small / "prompts.txt",
        "images_per_prompt": 2,
        "num_inference_steps": 2,
        "resolution": 64,
        "batch_size": 4,
        "scorers": ["clip"],
        "output_dir": output_dir,
        **sources,
        **changes,
    }


CANDIDATES = {"full": "trained", "flat": "unet", "lora": "lora", "whole": "other"}


@pytest.fixture(scope="module")
def drawn(script, small, scorers, tmp_path_factory):
    """Output of a run that draws the base and a candidate of each kind."""
    candidates = [f"{name}={small / folder}" for name, folder in CANDIDATES.items()]
    return run_script(script, drawing(small, scorers, tmp_path_factory.mktemp("drawn"), candidates=candidates))


@pytest.fixture
def copied(drawn, tmp_path):
    """A copy of `drawn`, times of the files included."""
    return shutil.copytree(drawn, tmp_path / "out")


def records(output_dir):
    return [json.loads(line) for line in (output_dir / "scores.jsonl").read_text().splitlines()]


def refused(script, flags):
    """The sentence that these flags end in."""
    with pytest.raises(script.EvaluationError) as error:
        run_script(script, flags)
    assert "\n" not in str(error.value)
    return str(error.value)


# Scores --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(script, small, scorers, tmp_path_factory):
    """Output of a run with every scorer."""
    flags = {
        "images": [f"red={small / 'red'}", f"blue={small / 'blue'}"],
        "prompts": small / "prompts.txt",
        "reference_images": small / "green",
        "scorers": SCORERS,
        "output_dir": tmp_path_factory.mktemp("scored"),
        **scorers,
    }
    return flags, run_script(script, flags)


@pytest.mark.parametrize("scorer", SCORERS)
def test_scores_are_those_of_the_formulas(scored, small, scorers, scorer):
    references = [Image.open(path).convert("RGB") for path in sorted((small / "green").iterdir())]
    rows = records(scored[1])
    assert [(row["model"], row["prompt_index"], row["image"]) for row in rows] == [
        (model, prompt, 0) for model in ("red", "blue") for prompt in range(3)
    ]
    for row in rows:
        image = Image.open(row["file"]).convert("RGB")
        expected = expected_score(scorer, scorers, image, row["prompt"], references)
        assert row[scorer] == pytest.approx(expected, rel=0, abs=TOLERANCE[scorer])
    assert len({row[scorer] for row in rows}) == len(rows)
    if scorer == "hps_no_antialias":
        assert max(abs(row["hps"] - row[scorer]) for row in rows) > 0.1
    assert not torch.backends.cudnn.allow_tf32


def sources_of(flags, name):
    name = name.removesuffix("_no_antialias")
    return {flag.removeprefix(f"{name}_"): str(path) for flag, path in flags.items() if flag.startswith(f"{name}_")}


@pytest.mark.parametrize("name", SCORERS)
def test_a_scorer_is_built_from_a_device(script, small, scorers, name):
    """As from a notebook: no argument is parsed, and there is no Accelerator."""
    image = Image.open(small / "red" / "00001_0.png").convert("RGB")
    references = [Image.open(path).convert("RGB") for path in sorted((small / "green").iterdir())]
    subject = [small / "green"] if name == "dinov2" else []
    scorer = script.SCORERS[name](torch.device("cpu"), *subject, **sources_of(scorers, name))
    assert scorer.image_processor.backend == "pil"
    scores = scorer.score([image, image], [PROMPTS[0], PROMPTS[1]])
    assert scores.shape == (2,) and scores.dtype == torch.float32 and not scores.requires_grad
    expected = [expected_score(name, scorers, image, prompt, references) for prompt in PROMPTS[:2]]
    assert scores.tolist() == pytest.approx(expected, rel=0, abs=TOLERANCE[name])
    with pytest.raises(TypeError, match="not modle"):
        script.SCORERS[name]("cpu", *subject, modle="x")


def test_negative_cosines_are_clip_scores_of_zero(script, scorers):
    scorer = script.CLIP("cpu", **sources_of(scorers, "clip"))
    scorer.cosines = lambda images, prompts: torch.tensor([-0.2, 0.3])
    assert scorer.score([], []).tolist() == pytest.approx([0, 30])


def test_a_text_is_embedded_once(script, small, scorers, monkeypatch):
    scorer, seen = script.CLIP("cpu", **sources_of(scorers, "clip")), []
    embed = scorer.embed_texts
    monkeypatch.setattr(scorer, "embed_texts", lambda prompts: seen.extend(prompts) or embed(prompts))
    images = [Image.open(small / "red" / "00000_0.png").convert("RGB")] * 3
    first, again = scorer.score(images, ["a", "b", "a"]), scorer.score(images, ["b", "a", "c"])
    assert seen == ["a", "b", "c"] and first[1] == again[0] and first[0] == again[1]


def test_neither_batch_nor_order_moves_a_score(script, small, scored, tmp_path):
    flags, output_dir = scored
    (tmp_path / "prompts.txt").write_text("\n".join(reversed(PROMPTS)))
    for colour in ("red", "blue"):
        (tmp_path / colour).mkdir()
        for index in range(3):
            shutil.copy(small / colour / f"{index:05d}_0.png", tmp_path / colour / f"{2 - index:05d}_0.png")
    changes = {
        "images": [f"blue={tmp_path / 'blue'}", f"red={tmp_path / 'red'}"],
        "prompts": tmp_path / "prompts.txt",
        "batch_size": 1,
        "output_dir": tmp_path / "out",
    }
    again = {(row["model"], 2 - row["prompt_index"]): row for row in records(run_script(script, {**flags, **changes}))}
    for row in records(output_dir):
        other = again[row["model"], row["prompt_index"]]
        for name in SCORERS:
            assert other[name] == pytest.approx(row[name], rel=0, abs=TOLERANCE[name])


def test_hps_mends_texts_as_open_clip(script, scorers, monkeypatch):
    seen = []
    monkeypatch.setattr(script.Scorer, "embed_texts", lambda self, prompts: seen.extend(prompts))
    script.HPS("cpu", **sources_of(scorers, "hps")).embed_texts(["the cat’s “hat”", "a &amp;amp; b"])
    assert seen == ['the cat\'s "hat"', "a & b"]


def test_cut_texts_are_counted(script, ready, caplog):
    run_script(script, ready)
    assert "clip truncates 1 prompts to 77 tokens." in caplog.text


def test_results_hold_scores_and_what_they_depend_on(scored, small, scorers):
    _, output_dir = scored
    rows = records(output_dir)
    results = json.loads((output_dir / "results.json").read_text())
    assert [(row["scorer"], row["model"]) for row in results["results"]] == [
        (scorer, model) for scorer in SCORERS for model in ("red", "blue")
    ]
    for row in results["results"]:
        mine = [record[row["scorer"]] for record in rows if record["model"] == row["model"]]
        assert row["mean"] == pytest.approx(np.mean(mine))
        if row["model"] == "blue":
            base = [record[row["scorer"]] for record in rows if record["model"] == "red"]
            assert row["win_rate"] == pytest.approx(np.mean(np.array(mine) > base))
            assert 0 <= row["win_rate_low"] <= row["win_rate"] <= row["win_rate_high"] <= 1
            difference = np.array(mine) - base
            assert row["difference"] == pytest.approx(difference.mean())
            assert row["difference_error"] == pytest.approx(difference.std(ddof=1) / math.sqrt(3))
            assert (row["wins"], row["losses"]) == ((difference > 0).sum(), (difference < 0).sum())
    assert results.keys() == {"results", "pairs", "categories", "settings"}
    assert results["settings"]["hps_weights"] == str(scorers["hps_weights"])
    assert results["settings"]["models"]["blue"]["source"] == str(small / "blue")
    assert results["settings"]["num_distinct_prompts"] == 3
    assert set(results["settings"]["scorer_versions"]["hps"]) == {"model", "weights"}
    text = (output_dir / "results.md").read_text()
    assert json.loads(text.split("```json")[1].strip("`\n")) == results["settings"]
    # Models and scorers come first, as in the tables of papers, and then which weights they are.
    means = " | ".join(f"{row['mean']:.3f}" for row in results["results"] if row["model"] == "blue")
    head, _, red, blue = text.splitlines()[:4]
    assert head == f"| model | {' | '.join(SCORERS)} |" and blue == f"| blue | {means} |"
    assert f"- clip: {scorers['clip_model']}" in text and "%" not in red


def hide(weights, name):
    return {key: weight for key, weight in weights.items() if key != name}


def spoil(weights, name):
    return {**weights, name: weights[name][..., :-1].contiguous()}


@pytest.mark.parametrize(
    "flag, name, change",
    [
        ("clip_model", "visual_projection.weight", hide),
        ("hps_weights", "visual.proj", hide),
        ("aesthetic_weights", "layers.6.weight", spoil),
        ("dinov2_model", "layernorm.weight", spoil),
    ],
)
def test_wrong_weights(script, ready, small, tmp_path, flag, name, change):
    path = Path(shutil.copytree(ready[flag], tmp_path / "x") if ready[flag].is_dir() else tmp_path / "x.pt")
    if path.suffix == ".pt":
        weights = torch.load(ready[flag])
        nested = "state_dict" in weights
        weights = change(weights["state_dict"] if nested else weights, name)
        torch.save({"state_dict": weights} if nested else weights, path)
    else:
        file = path / "model.safetensors"
        save_file(change(load_file(file), name), file, metadata={"format": "pt"})
    flags = {**ready, flag: path, "scorers": [flag.partition("_")[0]], "reference_images": small / "green"}
    sentence = refused(script, flags)
    assert f"--{flag} {path} " in sentence and " cannot be loaded: " in sentence


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("scorer", ["hps", "aesthetic"])
def test_weights_that_would_run_code_are_refused(script, ready, tmp_path, scorer):
    file = tmp_path / "x.pt"
    torch.save({"state_dict": Trap(tmp_path / "trapped")}, file)
    sentence = refused(script, {**ready, "scorers": [scorer], f"{scorer}_weights": file})
    assert f"--{scorer}_weights {file} cannot be loaded: " in sentence
    assert not (tmp_path / "trapped").exists()


# Statistics ----------------------------------------------------------------------------------------------------------


def test_mean_and_error_by_hand(script):
    # The prompts' means are 2, 4 and 9: mean 5, deviations -3, -1 and 4.
    mean, error = script.mean_and_error(np.array([[1.0, 3.0], [4.0, 4.0], [8.0, 10.0]]))
    assert mean == 5
    assert error == pytest.approx(math.sqrt((9 + 1 + 16) / 2) / math.sqrt(3))
    assert script.mean_and_error(np.array([[1.0, 3.0]])) == (2, None)


def test_win_rate_by_hand(script):
    base = np.zeros((4, 2))
    candidate = np.array([[1, 1], [1, -1], [0, -1], [0, 1]])
    row = script.compare(candidate, base)
    assert (row["win_rate"], row["wins"], row["ties"], row["losses"]) == (5 / 8, 4, 2, 2)
    # Prompts' differences 1, 0, -0.5 and 0.5.
    assert row["difference"] == 0.25 and row["difference_error"] == pytest.approx(math.sqrt(1.25 / 3) / 2)
    # Wilson's interval of n wins of n is n / (n + z^2) to 1; of half of them, z / 2 / sqrt(n + z^2) wide.
    z = 1.959964
    assert script.win_rate(base + 1, base) == pytest.approx((1, 4 / (4 + z**2), 1))
    half = z / 2 / math.sqrt(4 + z**2)
    assert script.win_rate(base, base) == pytest.approx((0.5, 0.5 - half, 0.5 + half))


def test_interval_covers_the_truth_of_few_prompts(script):
    """Of five prompts that are won at 97 %: a bootstrap's interval holds the truth in 15 of 100 cases."""
    covered = 0
    for won in range(6):
        _, low, high = script.win_rate((np.arange(5) < won)[:, None] * 1.0, np.full((5, 1), 0.5))
        covered += math.comb(5, won) * 0.97**won * 0.03 ** (5 - won) * (low <= 0.97 <= high)
    assert covered == pytest.approx(0.859, abs=1e-3)


def test_interval_of_wins_is_over_prompts(script):
    wins = np.random.default_rng(1).random(400) < 0.6
    rate, low, high = script.win_rate(wins[:, None] * 1.0, np.full((400, 1), 0.5))
    half = 1.96 * math.sqrt(rate * (1 - rate) / 400)
    assert [low, high] == pytest.approx([rate - half, rate + half], abs=0.002)
    # Images that always agree with each other add no certainty.
    doubled = script.win_rate(np.repeat(wins[:, None] * 1.0, 4, axis=1), np.full((400, 4), 0.5))
    assert doubled == pytest.approx((rate, low, high))
    # Those that have nothing in common count as prompts of their own.
    shared = script.win_rate(wins.reshape(100, 4) * 1.0, np.full((100, 4), 0.5))
    assert shared == pytest.approx((rate, low, high), abs=0.01)


def test_models_are_compared_by_pairs_and_by_categories(script):
    tables = {"clip": np.array([[[1.0], [2.0], [3.0]], [[2.0], [2.0], [9.0]], [[0.0], [4.0], [3.0]]])}
    summary = script.summarize(["clip"], ["base", "a", "b"], tables, ["dog", "dog", "cat"])
    pair = {key: summary["pairs"][0][key] for key in ("model", "against", "wins", "ties", "losses")}
    assert pair == {"model": "b", "against": "a", "wins": 1, "ties": 0, "losses": 2} and len(summary["pairs"]) == 1
    rows = {(row["category"], row["model"]): row["clip"] for row in summary["categories"]}
    assert (rows["dog", "a"], rows["cat", "a"], rows["mean of categories", "a"]) == (2, 9, 5.5)
    assert script.summarize(["clip"], ["base", "a", "b"], tables, 3 * [None])["categories"] == []


@pytest.mark.parametrize("spoiled", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_refused(script, ready, monkeypatch, spoiled):
    monkeypatch.setattr(script.CLIP, "score", lambda self, images, prompts: torch.full((len(images),), spoiled))
    assert refused(script, ready).startswith(f"clip gives {spoiled} to ")
    assert not (ready["output_dir"] / "scores" / "clip.json").exists()


def test_grid_shows_largest_wins_then_largest_losses(script, tmp_path):
    colours = {
        name: tuple(np.random.default_rng(i).integers(256, size=3).tolist()) for i, name in enumerate("abcdefghijkl")
    }
    gains = dict(zip(colours, [1, -1, 5, -5, 0, 7, 3, -3, -9, -2, 2, 9], strict=True))
    pairs = []
    for name, colour in colours.items():
        for model, shade in (("base", colour), ("new", colour[::-1])):
            Image.new("RGB", (8, 8), shade).save(tmp_path / f"{model}-{name}.png")
        record = {"prompt": f"prompt {name}"}
        pairs.append(
            tuple(
                {**record, "model": model, "file": str(tmp_path / f"{model}-{name}.png"), "clip": 20 + gain}
                for model, gain in (("base", 0), ("new", gains[name]))
            )
        )
    grid = script.draw_grid("clip", pairs)
    assert grid.size == (768, 8 * 424)
    for row, name in enumerate("lfcgjhdi"):
        middle = row * 424 + 40 + 192
        assert grid.getpixel((192, middle)) == colours[name]
        assert grid.getpixel((576, middle)) == colours[name][::-1]


# Drawing -------------------------------------------------------------------------------------------------------------


def plain_image(script, pipeline, place):
    """An image by diffusers alone, one at a time."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(script.image_seed(0, *place))
    return pipeline(
        PROMPTS[place[0]], height=64, width=64, num_inference_steps=2, guidance_scale=5.0, generator=generator
    ).images[0]


def distance(a, b):
    return np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max()


@pytest.mark.parametrize("name", ["base", *CANDIDATES])
def test_images_are_those_of_diffusers(script, small, drawn, name):
    pipeline = StableDiffusionXLPipeline.from_pretrained(small / ("other" if name == "whole" else "pipeline"))
    if name in ("full", "flat"):
        pipeline.unet = UNet2DConditionModel.from_pretrained(small / "other", subfolder="unet")
    if name == "lora":
        pipeline.load_lora_weights(small / "lora")
    for place in ((0, 0), (2, 1)):
        image = Image.open(drawn / "images" / name / f"{place[0]:05d}_{place[1]}.png")
        # By batches or alone, the last bits of the latents differ.
        assert distance(image, plain_image(script, pipeline, place)) <= 1
        if name != "base":
            assert distance(image, Image.open(drawn / "images" / "base" / f"{place[0]:05d}_{place[1]}.png")) > 1
    assert len(list((drawn / "images" / name).glob("*.png"))) == 6


@pytest.mark.parametrize("save", [save_kohya, save_peft])
def test_each_layer_of_a_lora_has_its_own_alpha_and_rank(script, small, scorers, tmp_path, save):
    """In the UNet and in the text encoders; the file may have any name, and its folder may stand for it."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(small / "pipeline")
    lora = random_lora(pipeline)
    save(lora, tmp_path / "lora" / "mystyle.safetensors")
    candidates = [f"file={tmp_path / 'lora' / 'mystyle.safetensors'}", f"folder={tmp_path / 'lora'}"]
    flags = drawing(small, scorers, tmp_path / "out", candidates=candidates, max_prompts=1, images_per_prompt=1)

    output_dir = run_script(script, flags)

    expected = plain_image(script, merge(pipeline, lora), (0, 0))
    for name in ("file", "folder"):
        assert distance(Image.open(output_dir / "images" / name / "00000_0.png"), expected) <= 1
    assert distance(Image.open(output_dir / "images" / "base" / "00000_0.png"), expected) > 8


@pytest.mark.parametrize("below", ["trained", "unet", "other"])
def test_a_unet_and_a_lora_are_one_candidate(script, small, scorers, tmp_path, below):
    pipeline = StableDiffusionXLPipeline.from_pretrained(small / ("other" if below == "other" else "pipeline"))
    pipeline.unet = UNet2DConditionModel.from_pretrained(small / "other", subfolder="unet")
    lora = random_lora(pipeline)
    save_kohya(lora, tmp_path / "x.safetensors")
    candidates = [f"both={small / below}+{tmp_path / 'x.safetensors'}"]
    flags = drawing(small, scorers, tmp_path / "out", candidates=candidates, max_prompts=1, images_per_prompt=1)

    output_dir = run_script(script, flags)

    expected = plain_image(script, merge(pipeline, lora), (0, 0))
    assert distance(Image.open(output_dir / "images" / "both" / "00000_0.png"), expected) <= 1
    settings = json.loads((output_dir / "results.json").read_text())["settings"]
    assert settings["models"]["both"]["kind"] == "unet and lora"


def test_other_weights_of_a_unet_or_a_lora_are_noticed(script, small, scorers, tmp_path):
    unet = shutil.copytree(small / "trained", tmp_path / "unet")
    lora = shutil.copytree(small / "lora", tmp_path / "lora")
    flags = drawing(small, scorers, tmp_path / "out", candidates=[f"x={unet}+{lora}"], max_prompts=1)
    run_script(script, flags)

    for folder in (unet / "unet", lora):
        (file,) = folder.glob("*.safetensors")
        before = file.read_bytes()
        save_file({name: weight * 1.1 for name, weight in load_file(file).items()}, file)
        assert "x was generated with another model of prompt 0 (" in refused(script, flags)
        file.write_bytes(before)


@pytest.mark.parametrize(
    ("unet", "prefix", "warned"),
    [("trained", "", True), ("trained", "trained+", False), ("pipeline", "", False), (None, "", False)],
    ids=["another UNet", "that UNet", "the base's", "not said"],
)
def test_a_lora_of_another_unet_is_warned_of(script, small, scorers, tmp_path, caplog, unet, prefix, warned):
    file = tmp_path / "x.safetensors"
    config = {"unet.lora_alpha": 2, "unet.base_model_name_or_path": unet and str(small / unet)}
    weights = load_file(small / "lora" / "pytorch_lora_weights.safetensors")
    save_file(weights, file, {"lora_adapter_metadata": json.dumps(config)})
    source = f"{small / 'trained'}+{file}" if prefix else str(file)
    flags = drawing(small, scorers, tmp_path / "out", candidates=[f"x={source}"], max_prompts=1)

    run_script(script, flags)

    warning = f"--candidates x={file} was trained on another UNet, with which it is x={small / 'trained'}+{file}."
    assert (warning in caplog.text) == warned
    assert ("another UNet" in caplog.text) == warned


def test_small_changes_of_text_encoders_survive_bfloat16(script, small, tmp_path):
    """Added to bfloat16 weights, 85 % of this one would be rounded away."""
    base = str(small / "pipeline")
    exact = script.load_sdxl(base)
    lora = random_lora(exact, parts=("text_encoder", "text_encoder_2"))
    lora = {layer: (down, up * 1e-4, alpha) for layer, (down, up, alpha) in lora.items()}
    save_kohya(lora, tmp_path / "x.safetensors")

    def encode(pipeline):
        with torch.no_grad():
            return pipeline.to(torch.float32).encode_prompt("a red circle", do_classifier_free_guidance=False)[0]

    half_base = script.load_sdxl(base, dtype=torch.bfloat16)
    half = script.load_sdxl(base, dtype=torch.bfloat16)
    script.add_lora(half, script.read_lora(tmp_path / "x.safetensors", half.unet.config))
    assert half.text_encoder.dtype == torch.bfloat16
    change = encode(half) - encode(half_base)

    before = encode(exact)
    expected = encode(merge(exact, lora)) - before
    assert (change * expected).sum() / expected.square().sum() == pytest.approx(1, abs=0.05)


def test_prompts_that_are_cut_are_counted(script, small, scorers, tmp_path, caplog):
    flags = drawing(small, scorers, tmp_path / "out", images_per_prompt=1)

    run_script(script, flags)

    assert "1 of 3 prompts have more than 77 tokens; SDXL ignores the rest." in caplog.text


def test_each_image_has_its_own_noise(script):
    seeds = {script.image_seed(*numbers) for numbers in np.ndindex(3, 20, 20)}
    assert len(seeds) == 1200


def test_scheduler_and_settings_are_passed_on_and_logged(script, small, scorers, tmp_path):
    flags = drawing(
        small, scorers, tmp_path / "out", scheduler="DDIMScheduler", guidance_scale=1.5, seed=3, max_prompts=1
    )
    output_dir = run_script(script, {**flags, "images_per_prompt": 1})
    pipeline = StableDiffusionXLPipeline.from_pretrained(small / "pipeline")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    generator = torch.Generator().manual_seed(script.image_seed(3, 0, 0))
    size = {"height": 64, "width": 64}
    image = pipeline(PROMPTS[0], num_inference_steps=2, guidance_scale=1.5, generator=generator, **size).images[0]
    assert distance(Image.open(output_dir / "images" / "base" / "00000_0.png"), image) == 0
    settings = json.loads((output_dir / "results.json").read_text())["settings"]
    expected = {"scheduler": "DDIMScheduler", "guidance_scale": 1.5, "seed": 3, "num_inference_steps": 2}
    assert expected.items() <= settings.items()
    stored = json.loads((output_dir / "images" / "base" / "settings.json").read_text())
    version = settings["models"]["base"]["version"]
    assert stored["settings"].pop("base model") == version
    assert stored["settings"].items() <= settings.items()
    assert stored["models"] == {"model of prompt 0": version}
    assert stored["prompts"] == {"prompt 0": PROMPTS[0]}


def test_images_of_one_model_are_not_taken_for_those_of_a_model_per_category(script, small, scorers, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a red circle", "kind": "trained"}\n')
    flags = drawing(small, scorers, tmp_path / "out", prompts=tmp_path / "prompts.jsonl", category_column="kind")
    run_script(script, {**flags, "candidates": [f"x={small / 'lora'}"]})

    sentence = refused(script, {**flags, "candidates": [f"x={small}/{{category}}"]})

    assert "x was generated with another model of prompt 0 (" in sentence


def test_images_without_their_settings_are_refused(script, small, scorers, copied):
    (copied / "images" / "base" / "settings.json").unlink()

    sentence = refused(script, drawing(small, scorers, copied))

    assert sentence.startswith(f"{copied / 'images' / 'base'} contains images without a settings.json")


def test_upgrades_of_diffusers_keep_the_images(script, small, scorers, tmp_path):
    flags = drawing(small, scorers, tmp_path / "out", max_prompts=1)
    pipeline = shutil.copytree(small / "pipeline", tmp_path / "pipeline")
    run_script(script, {**flags, "pretrained_model_name_or_path": pipeline})
    images = state(tmp_path / "out" / "images")
    config = json.loads((pipeline / "scheduler" / "scheduler_config.json").read_text())

    config["_diffusers_version"] = "99"
    (pipeline / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    run_script(script, {**flags, "pretrained_model_name_or_path": pipeline})

    assert state(tmp_path / "out" / "images") == images


def test_variant(script, small, scorers, drawn, tmp_path):
    pipeline = StableDiffusionXLPipeline.from_pretrained(small / "pipeline")
    pipeline.save_pretrained(tmp_path / "pipeline", variant="fp16")
    changes = {"pretrained_model_name_or_path": tmp_path / "pipeline", "images_per_prompt": 1}
    flags = drawing(small, scorers, tmp_path / "out", **changes)
    assert refused(script, flags).startswith(
        f"--pretrained_model_name_or_path {tmp_path / 'pipeline'} cannot be loaded"
    )
    shutil.rmtree(tmp_path / "out")
    output_dir = run_script(script, {**flags, "variant": "fp16"})
    images = (Image.open(folder / "images" / "base" / "00000_0.png") for folder in (output_dir, drawn))
    assert distance(*images) <= 1


def test_half_precision_and_another_vae(script, small, scorers, tmp_path):
    flags = drawing(small, scorers, tmp_path / "out", max_prompts=1, candidates=[f"lora={small / 'lora'}"])
    output_dir = run_script(script, {**flags, "mixed_precision": "bf16"})
    settings = json.loads((output_dir / "images" / "lora" / "settings.json").read_text())
    assert settings["settings"]["dtype"] == "torch.bfloat16"
    vae = shutil.copytree(small / "other" / "vae", tmp_path / "vae")
    changes = {"pretrained_vae_model_name_or_path": vae, "output_dir": tmp_path / "vae-out"}
    other = run_script(script, {**flags, **changes})
    assert distance(*(Image.open(folder / "images" / "base" / "00000_0.png") for folder in (output_dir, other))) > 8


def test_compiled_blocks_give_the_same_images(script, small, scorers, drawn, compiled_graphs, tmp_path):
    candidates = [f"lora={small / 'lora'}"]
    flags = drawing(small, scorers, tmp_path / "out", candidates=candidates, compile=True)

    output_dir = run_script(script, flags)

    assert compiled_graphs
    for name in ("base", "lora"):
        for image in (drawn / "images" / name).glob("*.png"):
            assert distance(Image.open(image), Image.open(output_dir / "images" / name / image.name)) <= 1


def test_float32_on_a_gpu_is_warned_of(script, small, caplog):
    args = script.parse_args(["--pretrained_model_name_or_path", str(small / "pipeline"), "--prompts", "p"])
    script.build_accelerator(args)
    for device, precision, warned in (("cuda", "no", True), ("cuda", "bf16", False), ("cpu", "no", False)):
        caplog.clear()
        accelerator = SimpleNamespace(device=torch.device(device), mixed_precision=precision)
        script.load_shared(args, accelerator)
        assert ("--mixed_precision bf16 is faster" in caplog.text) == warned


def state(folder):
    """{path: (bytes, time)} of a folder's images."""
    return {path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*.png")}


def again(script, small, scorers, output_dir, **changes):
    candidates = [f"{name}={small / folder}" for name, folder in CANDIDATES.items()]
    return run_script(script, drawing(small, scorers, output_dir, candidates=candidates, **changes))


def test_only_missing_images_are_drawn_again(script, small, scorers, drawn, copied, monkeypatch):
    lost = Path("full/00001_0.png")
    batches, generate_images = [], script.generate_images

    def noted(args, pipeline, prompts, places):
        batches.append(places)
        return generate_images(args, pipeline, prompts, places)

    monkeypatch.setattr(script, "generate_images", noted)
    before = state(copied / "images")
    (copied / "images" / lost).unlink()
    scores = (copied / "scores.jsonl").read_text().replace(str(drawn), str(copied))
    again(script, small, scorers, copied)
    # Beside the same neighbours as before: in another batch its last bits could differ.
    assert batches == [[(0, 0), (0, 1), (1, 0), (1, 1)]]
    after = state(copied / "images")
    assert {path for path in before if before[path] != after[path]} == {lost}
    assert after[lost][0] == before[lost][0]
    assert (copied / "scores.jsonl").read_text() == scores


def test_an_interrupted_run_resumes(script, small, scorers, drawn, tmp_path, monkeypatch):
    flags = drawing(small, scorers, tmp_path / "out", candidates=[f"lora={small / 'lora'}"])
    save, left = Image.Image.save, iter(range(3))

    def torn(image, path, **options):
        save(image, path, **options)
        if next(left, None) is None:
            Path(path).write_bytes(Path(path).read_bytes()[:50])
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Image.Image, "save", torn)
        run_script(script, flags)
    assert len(list((tmp_path / "out").rglob("0*.png"))) == 3
    run_script(script, flags)
    for name in ("base", "lora"):
        whole, resumed = (state(folder / "images" / name) for folder in (drawn, tmp_path / "out"))
        assert {path: whole[path][0] for path in whole} == {path: resumed[path][0] for path in resumed}


@pytest.mark.parametrize(
    "change, named",
    [
        ({"seed": 1}, "seed (0, now 1)"),
        ({"scheduler": "DDIMScheduler"}, "scheduler (EulerDiscreteScheduler, now DDIMScheduler)"),
        ({"mixed_precision": "bf16"}, "dtype (torch.float32, now torch.bfloat16)"),
    ],
)
def test_images_of_other_settings_are_not_mixed(script, small, scorers, drawn, change, named):
    sentence = refused(script, drawing(small, scorers, drawn, **change))
    assert sentence == f"{drawn}/images/base was generated with another {named}: delete it or change --output_dir."


def test_more_prompts_keep_what_is_drawn(script, small, scorers, tmp_path):
    """--max_prompts first, then all, then one more; but an image of another prompt is none of this one."""
    flags = drawing(small, scorers, tmp_path / "out", prompts=tmp_path / "prompts.txt")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]) + "\n")
    run_script(script, {**flags, "max_prompts": 1})
    before = state(tmp_path / "out" / "images")
    run_script(script, flags)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    run_script(script, flags)
    # Fewer again lose nothing.
    run_script(script, {**flags, "max_prompts": 1})
    after = state(tmp_path / "out" / "images")
    assert len(after) == 6 and before.items() <= after.items()
    (tmp_path / "prompts.txt").write_text(f"{PROMPTS[0]}\na green star\n")
    change = f"another prompt 1 ({PROMPTS[1]}, now a green star)"
    assert f"base was generated with {change}: delete it" in refused(script, flags)


def test_weights_are_known_by_their_content(script, small, scorers, tmp_path, monkeypatch):
    """Copied to another place, or drawn on with another library, they are the same; trained on, they are others."""
    lora = shutil.copytree(small / "lora", tmp_path / "snapshots" / "lora")
    flags = drawing(small, scorers, tmp_path / "out", candidates=[f"lora={lora}"], max_prompts=1)
    run_script(script, flags)
    before = state(tmp_path / "out")
    copied = shutil.copytree(lora, tmp_path / "copied", copy_function=shutil.copyfile)
    monkeypatch.setattr(script.diffusers, "__version__", "99")
    run_script(script, {**flags, "candidates": [f"lora={copied}"]})
    grid = Path("grid-lora.png")
    assert {**state(tmp_path / "out"), grid: 0} == {**before, grid: 0}
    file = copied / "pytorch_lora_weights.safetensors"
    save_file({name: weight * 1.5 for name, weight in load_file(file).items()}, file)
    assert "lora was generated with another model of prompt 0 (" in refused(
        script, {**flags, "candidates": [f"lora={copied}"]}
    )


def test_a_vae_is_known_by_its_weights(script, small, scorers, tmp_path):
    """Copied to another place it is the same; with other weights under its path it is not."""
    vae = shutil.copytree(small / "pipeline" / "vae", tmp_path / "vae")
    flags = drawing(small, scorers, tmp_path / "out", max_prompts=1, pretrained_vae_model_name_or_path=vae)
    run_script(script, flags)
    before = state(tmp_path / "out")
    copied = shutil.copytree(vae, tmp_path / "copied", copy_function=shutil.copyfile)

    run_script(script, {**flags, "pretrained_vae_model_name_or_path": copied})
    (file,) = vae.glob("*.safetensors")
    shutil.copy(small / "other" / "vae" / file.name, file)
    sentence = refused(script, flags)

    assert state(tmp_path / "out") == before
    assert sentence.startswith(f"{tmp_path / 'out' / 'images' / 'base'} was generated with another vae (")


def test_scores_are_kept(script, ready, monkeypatch):
    """The next run, with another scorer, one more model or after an error, scores what is new."""
    seen = []
    for scorer in (script.CLIP, script.Aesthetic):
        score = scorer.score
        noted = lambda self, images, prompts, score=score: seen.append(len(images)) or score(self, images, prompts)  # noqa: E731
        monkeypatch.setattr(scorer, "score", noted)
    red, blue = ready["images"]
    flags = {**ready, "batch_size": 8}
    first = records(run_script(script, {**flags, "images": [red]}))
    both = records(run_script(script, {**flags, "scorers": ["clip", "aesthetic"]}))
    assert seen == [3, 3, 6] and [row["clip"] for row in both[:3]] == [row["clip"] for row in first]
    file = Path(both[0]["file"])
    spoiled = lambda self, images, prompts: torch.full((len(images),), math.nan)  # noqa: E731
    monkeypatch.setattr(script.Aesthetic, "score", spoiled)
    sides = [f"blue={blue.split('=')[1]}", f"green={file.parents[1] / 'green'}"]
    assert "aesthetic gives nan" in refused(script, {**flags, "images": sides, "scorers": ["clip", "aesthetic"]})
    run_script(script, {**flags, "images": sides})
    # The green ones were scored by CLIP once, although the run ended in an error.
    assert seen == [3, 3, 6, 3]


def test_two_processes_write_the_same(script, small, scorers, drawn, tmp_path, monkeypatch):
    """Paths are relative so that even the paths in the files are the same."""
    changes = {"scorers": SCORERS, "reference_images": small / "green", "batch_size": 2}
    changes["candidates"] = [f"lora={small / 'lora'}"]
    outputs = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        monkeypatch.chdir(folder)
        flags = drawing(small, scorers, "out", **changes)
        if processes == 1:
            run_script(script, flags)
        else:
            statuses, printed = run_ranks([SCRIPT, *command_line(flags)])
            assert statuses == [0, 0], printed
        outputs.append(
            {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        )
    assert outputs[0].keys() == outputs[1].keys()
    assert [name for name in outputs[0] if outputs[0][name] != outputs[1][name]] == []
    assert len(outputs[0]) == 12 + 2 + 4 + len(SCORERS)


# Prompts -------------------------------------------------------------------------------------------------------------


def rows_of(script, words):
    return script.read_prompts(script.parse_args(["--images", "a=b", *map(str, words)]))


def prompts_of(script, words):
    rows = rows_of(script, words)
    assert all(row.scored == row.text for row in rows)
    return [row.text for row in rows]


def test_prompt_files(script, tmp_path):
    rows = {"caption": PROMPTS, "number": [1, 2, 3]}
    table = pa.table(rows)
    pq.write_table(table, tmp_path / "x.parquet")
    table.to_pandas().to_csv(tmp_path / "x.csv", index=False)
    table.to_pandas().to_json(tmp_path / "x.jsonl", orient="records", lines=True)
    table.to_pandas().to_csv(tmp_path / "x.TSV", index=False, sep="\t")
    (tmp_path / "x.json").write_text(json.dumps([{"caption": prompt} for prompt in PROMPTS]))
    (tmp_path / "list.json").write_text(json.dumps(PROMPTS))
    # Blank lines may end a file.
    (tmp_path / "x.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS) + "\n\n")
    assert prompts_of(script, ["--prompts", tmp_path / "list.json"]) == PROMPTS
    for name in ("x.parquet", "x.csv", "x.TSV", "x.json", "x.jsonl"):
        assert prompts_of(script, ["--prompts", tmp_path / name, "--prompt_column", "caption"]) == PROMPTS
    assert prompts_of(script, ["--prompts", tmp_path / "x.txt"]) == PROMPTS
    assert prompts_of(script, ["--prompts", tmp_path / "x.txt", "--max_prompts", 2]) == PROMPTS[:2]


@pytest.mark.parametrize(
    "words, name, column, split",
    [
        (["pickapic_v2"], "yuvalkirstain/pickapic_v2_no_images", "caption", "test_unique"),
        (["partiprompts"], "nateraw/parti-prompts", "Prompt", "train"),
        (["me/mine", "--prompt_column", "text", "--prompt_split", "dev"], "me/mine", "text", "dev"),
    ],
)
def test_prompt_sets_of_the_hub(script, monkeypatch, words, name, column, split):
    rows = [{column: prompt, "Category": "Animals"} for prompt in PROMPTS]
    splits = {split: rows}
    builders = {name: SimpleNamespace(config=None, as_streaming_dataset=lambda split: splits[split])}
    monkeypatch.setattr(script.datasets, "load_dataset_builder", lambda path: builders[path])
    assert prompts_of(script, ["--prompts", *words]) == PROMPTS
    categories = {row.category for row in rows_of(script, ["--prompts", *words])}
    assert categories == {"Animals" if words == ["partiprompts"] else None}


def test_hpdv2_is_four_lists(script, ready, small, tmp_path, monkeypatch):
    """Their styles are categories, and images lie as hpsv2 names them."""
    assert script.HPDV2["concept-art"] == "hf://datasets/zhwang/HPDv2/benchmark/concept-art.json"
    monkeypatch.setattr(script, "HPDV2", {style: str(tmp_path / f"{style}.json") for style in ("photo", "anime")})
    for style, file in script.HPDV2.items():
        Path(file).write_text(json.dumps([f"{style} {i}" for i in range(2)]))
        for colour in ("red", "blue"):
            for i in range(2):
                path = tmp_path / colour / style / f"{i:05d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.open(small / colour / f"{i:05d}_0.png").rotate(90 * (style == "anime")).save(path)
    assert prompts_of(script, ["--prompts", "hpdv2"]) == ["photo 0", "photo 1", "anime 0", "anime 1"]
    images = [f"{colour}={tmp_path / colour}" for colour in ("red", "blue")]
    output_dir = run_script(script, {**ready, "prompts": "hpdv2", "images": images})
    rows = records(output_dir)
    assert rows[3]["file"] == str(tmp_path / "red" / "anime" / "00001.jpg") and rows[3]["category"] == "anime"
    results = json.loads((output_dir / "results.json").read_text())
    expected = np.mean([row["clip"] for row in rows[4:] if row["category"] == "anime"])
    assert {"category": "anime", "model": "blue", "clip": pytest.approx(expected)} in results["categories"]
    assert f"| anime | blue | {expected:.3f} |" in (output_dir / "results.md").read_text()


def test_subjects_have_models_and_photos_of_their_own(script, small, scorers, tmp_path):
    """A personalization of two subjects in one run: a LoRA, photos and words for the scorers for each."""
    rows = [("dog", "a red circle", "a circle"), ("cat", "a blue star", "a star"), ("dog", "a red star", "a star")]
    lines = ["subject,prompt,plain", *(",".join(row) for row in rows)]
    (tmp_path / "prompts.csv").write_text("\n".join(lines))
    for subject, colour, factor in (("dog", "red", 1), ("cat", "blue", -1)):
        shutil.copytree(small / colour, tmp_path / "photos" / subject)
        weights = load_file(small / "lora" / "pytorch_lora_weights.safetensors")
        weights = {name: weight * (factor if "lora_B" in name else 1) for name, weight in weights.items()}
        (tmp_path / subject).mkdir()
        save_file(weights, tmp_path / subject / "pytorch_lora_weights.safetensors")
    flags = drawing(small, scorers, tmp_path / "out", prompts=tmp_path / "prompts.csv", images_per_prompt=1)
    flags |= {"category_column": "subject", "scoring_prompt_column": "plain", "scorers": ["clip", "dinov2"]}
    flags |= {"candidates": [f"lora={tmp_path}/{{category}}"], "reference_images": f"{tmp_path}/photos/{{category}}"}
    output_dir = run_script(script, flags)
    pipeline = StableDiffusionXLPipeline.from_pretrained(small / "pipeline")
    pipeline.load_lora_weights(tmp_path / "cat", weight_name="pytorch_lora_weights.safetensors")
    pipeline.set_progress_bar_config(disable=True)
    options = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 5.0}
    generator = torch.Generator().manual_seed(script.image_seed(0, 1, 0))
    image = pipeline("a blue star", generator=generator, **options).images[0]
    assert distance(Image.open(output_dir / "images" / "lora" / "00001_0.png"), image) <= 1
    for row, (subject, _, plain) in zip(records(output_dir)[3:], rows, strict=True):
        image = Image.open(row["file"]).convert("RGB")
        photos = [Image.open(path).convert("RGB") for path in sorted((tmp_path / "photos" / subject).iterdir())]
        for scorer in flags["scorers"]:
            expected = expected_score(scorer, scorers, image, plain, photos)
            assert row[scorer] == pytest.approx(expected, rel=0, abs=TOLERANCE[scorer])
    models = {row["category"] for row in json.loads((output_dir / "results.json").read_text())["categories"]}
    assert models == {"dog", "cat", "mean of categories"}


@pytest.mark.parametrize(
    "name, text, sentence",
    [
        ("x.txt", "a\n \nb\n", "row 1 is empty or not text"),
        ("x.txt", "", "contains no prompts"),
        ("x.csv", "text,n\na,1\n", "--prompt_column: there is no column 'prompt' (columns: text, n)"),
        ("x.jsonl", '{"prompt": 3}\n', "row 0 is empty or not text"),
        ("nowhere.txt", None, "cannot be loaded"),
    ],
)
def test_wrong_prompts(script, ready, tmp_path, monkeypatch, name, text, sentence):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path(name).write_text(text)
    assert sentence in refused(script, {**ready, "prompts": name})


def test_prompts_without_a_category_are_refused(script, ready, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "kind": null}\n')

    sentence = refused(script, {**ready, "prompts": file, "category_column": "kind"})

    assert sentence.endswith("--category_column: the row of 'a' has no category")


# Wrong use -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, sentence",
    [
        ([], "give --pretrained_model_name_or_path to generate images, or --images"),
        (["--images", "i=j", "--candidates", "a=b"], "--candidates requires --pretrained_model_name_or_path"),
        (["--images", "a"], "'a' is not NAME=PATH"),
        (["--images", "a=b", "a=c"], "need different names, not a, a"),
        (["--pretrained_model_name_or_path", "m", "--images", "base=b"], "need different names, not base, base"),
        (["--images", "a=b", "--resolution", "100"], "--resolution must be a multiple of 8"),
        (["--images", "a=b", "--scorers", "dinov2"], "--scorers dinov2 requires --reference_images"),
        (["--images", "a=b", "--scheduler", "EDMEulerScheduler"], "--scheduler: invalid choice: 'EDMEulerScheduler'"),
        (["--images", "a=b", "--batch_size", "0"], "argument --batch_size: 0 is not a positive whole number"),
        (["--images", "a=b", "--guidance_scale", "nan"], "--guidance_scale: nan is not zero or a positive number"),
        (["--images", "a=b", "--reference_images", "x/{category}"], "{category} in a path requires --category_column"),
        (["--images", "a=b", "--prompts", "hpdv2", "--category_column", "c"], "--prompts hpdv2 has its own columns"),
    ],
)
def test_wrong_arguments(script, capsys, words, sentence):
    with pytest.raises(SystemExit) as end:
        script.parse_args(["--prompts", "p.txt", *words])
    assert end.value.code == 2
    assert sentence in capsys.readouterr().err


def test_single_file_is_refused_with_the_command_that_converts_it(script, capsys):
    with pytest.raises(SystemExit) as end:
        script.parse_args(["--prompts", "p.txt", "--pretrained_model_name_or_path", "some/model.safetensors"])
    assert end.value.code == 2
    assert "python convert_sdxl.py single_file some/model.safetensors FOLDER" in capsys.readouterr().err


def test_home_is_expanded_in_every_path_flag(script, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    names = ["prompts", "pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "output_dir"]
    names += ["reference_images", "clip_model", "hps_weights"]
    words = [f"--{name}=~/{name}" for name in names]

    args = script.parse_args([*words, "--images", "a=~/images", "--candidates", "b=~/lora", "c=~/unet+~/lora"])

    assert {name: vars(args)[name] for name in names} == {name: f"/home/me/{name}" for name in names}
    assert args.images == [("a", "/home/me/images")]
    assert args.candidates == [("b", "/home/me/lora"), ("c", "/home/me/unet+/home/me/lora")]


def test_every_scheduler_is_one_that_stable_diffusion_supports(script):
    kinds = {kind.name.removesuffix("Scheduler") for kind in KarrasDiffusionSchedulers}
    assert kinds >= set(script.SCHEDULERS)


def test_a_scorer_named_twice_is_one(script):
    words = ["--prompts", "p.txt", "--images", "a=b", "--scorers", "clip", "hps", "clip"]
    assert script.parse_args(words).scorers == ["clip", "hps"]


def test_scorers_name_missing_packages(script, capsys, monkeypatch):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda package: None)
    for scorer, package in (("siglip", "sentencepiece"), ("hps", "ftfy")):
        with pytest.raises(SystemExit):
            script.parse_args(["--prompts", "p.txt", "--images", "a=b", "--scorers", scorer])
        assert f"--scorers {scorer} needs a package: pip install {package}" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["clip_model", "hps_model", "hps_weights", "aesthetic_weights"])
def test_missing_scorers_end_a_run_before_it_draws(script, small, scorers, tmp_path, flag):
    changes = {flag: tmp_path / "nothing", "scorers": ["clip", "hps", "aesthetic"]}
    assert refused(script, drawing(small, scorers, tmp_path / "out", **changes)).startswith(f"--{flag} {tmp_path}")
    assert not (tmp_path / "out" / "images").exists()


def test_lost_weights_and_places_end_a_run_before_it_draws(script, small, scorers, tmp_path):
    model = shutil.copytree(scorers["clip_model"], tmp_path / "clip", ignore=shutil.ignore_patterns("*.safetensors"))
    flags = drawing(small, {**scorers, "clip_model": model}, tmp_path / "out")
    expected = f"--clip_model {model}: there is no model.safetensors in this folder or hub repository."
    assert refused(script, flags) == expected
    (tmp_path / "file").write_text("")
    sentence = refused(script, drawing(small, scorers, tmp_path / "file" / "out"))
    assert sentence.startswith(f"--output_dir {tmp_path / 'file' / 'out'} cannot be written: ")


def test_missing_and_unreadable_images(script, ready, small, tmp_path):
    folder = shutil.copytree(small / "red", tmp_path / "red")
    flags = {**ready, "images": [f"red={folder}"]}
    (folder / "00001_0.png").write_bytes(b"no image")
    assert refused(script, flags).startswith(f"Image {folder / '00001_0.png'} cannot be read, fix or delete it: ")
    (folder / "00001_0.png").unlink()
    assert refused(script, flags) == f"--images red={folder} lacks 1 of 3 images, e.g. {folder / '00001_0.png'}"
    Image.open(folder / "00000_0.png").save(folder / "00001_0.jpg")
    subject = {"scorers": ["dinov2"], "reference_images": tmp_path / "x"}
    assert refused(script, {**flags, **subject}).startswith(f"--reference_images {tmp_path / 'x'} is not a folder")
    assert [row["file"] for row in records(run_script(script, flags))][1] == str(folder / "00001_0.jpg")


@pytest.mark.parametrize("suffix", ["png", "tiff", "ppm"])
def test_16_bit_grey_is_scaled(script, tmp_path, suffix):
    grey = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    file = tmp_path / f"x.{suffix}"
    Image.fromarray(grey).save(file)

    image = script.decode_image(file)

    assert image.mode == "RGB"
    assert (np.asarray(image)[..., 1] == grey >> 8).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_images_are_decoded_on_white(script, tmp_path, mode):
    image = Image.new("RGBA", (8, 8), (90, 90, 90, 0))
    image.paste((0, 0, 0, 255), (2, 2, 6, 6))
    image.convert(mode).save(tmp_path / "x.png")

    pixels = np.asarray(script.decode_image(tmp_path / "x.png"))

    expected = np.full((8, 8, 3), 255)
    expected[2:6, 2:6] = 0
    assert (pixels == expected).all()


def test_equal_visible_images_have_equal_scores(script, ready, tmp_path):
    """One image with red hidden under its transparent pixels, and the same on white."""
    hidden = Image.new("RGBA", (48, 48), (255, 0, 0, 0))
    hidden.paste((0, 0, 255, 255), (12, 12, 36, 36))
    visible = Image.new("RGB", (48, 48), "white")
    visible.paste((0, 0, 255), (12, 12, 36, 36))
    for name, image in (("hidden", hidden), ("visible", visible)):
        (tmp_path / name).mkdir()
        image.save(tmp_path / name / "00000_0.png")
    changes = {
        "images": [f"{name}={tmp_path / name}" for name in ("hidden", "visible")],
        "reference_images": tmp_path / "hidden",
        "scorers": ["clip", "dinov2"],
        "max_prompts": 1,
    }

    first, second = records(run_script(script, {**ready, **changes}))

    assert first["clip"] == second["clip"]
    assert [first["dinov2"], second["dinov2"]] == pytest.approx([100, 100], abs=TOLERANCE["dinov2"])


def exif_data(*entries):
    """EXIF data with entries of (tag, type, count, four bytes), which Pillow itself would not write."""
    data = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries))
    for tag, kind, count, value in entries:
        data += struct.pack("<HHI", tag, kind, count) + value
    return data + bytes(4)


TURNED = (0x0112, 3, 1, b"\6\0\0\0")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "avif", "tiff"])
def test_images_are_turned_upright(script, tmp_path, suffix):
    image = Image.new("RGB", (64, 32), "white")
    image.paste("black", (0, 0, 32, 32))
    image.save(tmp_path / f"x.{suffix}", exif=exif_data(TURNED))

    upright = np.asarray(script.decode_image(tmp_path / f"x.{suffix}").convert("L"), dtype=int)

    # The left side is now the upper one.
    assert upright.shape == (64, 32)
    assert upright[:30].max() < 30 and upright[34:].min() > 225


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize(
    ("exif", "size"),
    [
        (b"Exif\0\0no EXIF data at all", (64, 32)),
        (exif_data(TURNED, (0x011A, 2, 4, b"abc\0")), (32, 64)),
        (exif_data(TURNED, (0x0100, 9, 1, b"\xff\xff\xff\xff")), (32, 64)),
    ],
    ids=["garbage", "text for a number", "negative width"],
)
def test_broken_exif_data_is_no_reason_to_refuse_an_image(script, tmp_path, suffix, exif, size):
    Image.new("RGB", (64, 32), "red").save(tmp_path / f"x.{suffix}", exif=exif)

    image = script.decode_image(tmp_path / f"x.{suffix}")

    assert image.size == size


@pytest.mark.parametrize("kind", ["profile", "zTXt", "iTXt"])
def test_large_metadata_is_no_reason_to_refuse_an_image(script, tmp_path, kind):
    """3 MB, where Pillow's limit is 1 MB."""
    info = PngImagePlugin.PngInfo()
    profile = None
    if kind == "profile":
        profile = os.urandom(3 * 2**20)
    elif kind == "zTXt":
        info.add_text("workflow", "x" * 3 * 2**20, zip=True)
    else:
        info.add_itxt("workflow", "x" * 3 * 2**20, zip=True)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "x.png", pnginfo=info, icc_profile=profile)

    image = script.decode_image(tmp_path / "x.png")

    assert image.getpixel((0, 0)) == (255, 0, 0)


def test_references_of_any_format_are_used_and_other_files_named(script, ready, small, tmp_path, caplog):
    for suffix in ("avif", "bmp", "tiff"):
        Image.new("RGB", (48, 48), "red").save(tmp_path / f"photo.{suffix}")
    (tmp_path / "notes.md").write_text("no photo")
    flags = {**ready, "scorers": ["dinov2"], "reference_images": tmp_path}

    rows = records(run_script(script, flags))

    assert f"--reference_images {tmp_path}: left out 1 files that Pillow cannot open: notes.md." in caplog.text
    for row in rows:
        image = Image.open(row["file"]).convert("RGB")
        expected = expected_score("dinov2", ready, image, "", [Image.new("RGB", (48, 48), "red")])
        assert row["dinov2"] == pytest.approx(expected, rel=0, abs=0.5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_inference_steps": 1001}, "--num_inference_steps 1001 with EulerDiscreteScheduler does not work: "),
        ({"scheduler": "DDIMScheduler", "num_inference_steps": 1001}, "with DDIMScheduler does not work: "),
    ],
)
def test_a_scheduler_that_cannot_sample_is_refused(script, small, scorers, tmp_path, change, words):
    flags = drawing(small, scorers, tmp_path / "out", **change)

    sentence = refused(script, flags)

    assert words in sentence
    assert not list(tmp_path.rglob("*.png"))


def test_schedulers_that_miss_a_package_are_refused(script, small, scorers, tmp_path, monkeypatch):
    def set_timesteps(self, num_steps):
        raise ImportError("\nDDIMScheduler requires the scipy library")

    monkeypatch.setattr(DDIMScheduler, "set_timesteps", set_timesteps)
    flags = drawing(small, scorers, tmp_path / "out", scheduler="DDIMScheduler")

    sentence = refused(script, flags)

    reason = "ImportError: DDIMScheduler requires the scipy library"
    assert sentence == f"--num_inference_steps 2 with DDIMScheduler does not work: {reason}"


def test_schedulers_with_betas_are_refused_for_a_base_without(script, small, scorers, tmp_path):
    base = shutil.copytree(small / "pipeline", tmp_path / "base")
    EDMEulerScheduler().save_pretrained(base / "scheduler")
    flags = drawing(small, scorers, tmp_path / "out", pretrained_model_name_or_path=base, scheduler="DDIMScheduler")

    sentence = refused(script, flags)

    assert sentence == f"--scheduler DDIMScheduler cannot be used with {base}: its scheduler has no beta schedule."
    assert not list(tmp_path.rglob("*.png"))


def test_a_pipeline_of_another_prediction_type_is_refused(script, small, scorers, tmp_path):
    """One scheduler samples all models, and would make noise of this one's predictions."""
    build_pipeline(tmp_path / "other", prediction_type="v_prediction")
    flags = drawing(small, scorers, tmp_path / "out", candidates=[f"x={tmp_path / 'other'}"])

    sentence = refused(script, flags)

    reason = "its scheduler's prediction_type is v_prediction, not epsilon as in the base model"
    assert sentence == f"--candidates x={tmp_path / 'other'} cannot be loaded: {reason}"
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("kind", ["lora", "unet", "pipeline"])
def test_a_candidate_that_cannot_be_loaded_is_refused_before_images_are_generated(
    script, small, scorers, tmp_path, kind
):
    model = shutil.copytree(small / {"lora": "lora", "unet": "unet", "pipeline": "other"}[kind], tmp_path / "model")
    for file in model.rglob("*.safetensors"):
        file.write_bytes(b"no weights")
    flags = drawing(small, scorers, tmp_path / "out", candidates=[f"x={model}"])

    sentence = refused(script, flags)

    assert sentence.startswith(f"--candidates x={model} cannot be loaded: ")
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("name", ["unet", "vae"])
@pytest.mark.parametrize("flag", ["pretrained_model_name_or_path", "candidates"])
def test_images_of_nan_are_refused(script, small, scorers, tmp_path, flag, name):
    """Saved, they would be black."""
    model = shutil.copytree(small / "pipeline", tmp_path / "nan")
    spoil_weights(model / name, "conv_out.bias")
    flags = drawing(small, scorers, tmp_path / "out", images_per_prompt=1)
    flags[flag] = model if flag != "candidates" else [f"x={model}"]

    sentence = refused(script, flags)

    source = model if flag != "candidates" else f"x={model}"
    assert sentence.startswith(f"--{flag} {source}: image generation failed: NaN in torch.float32, try ")
    written = {path.parent.name for path in (tmp_path / "out").rglob("*.png")}
    assert written == ({"base"} if flag == "candidates" else set())


@pytest.mark.parametrize("kind", REFUSED)
def test_a_lora_that_cannot_be_applied_as_a_whole_is_refused(script, small, scorers, tmp_path, kind):
    file = tmp_path / "x.safetensors"
    save_refused(kind, StableDiffusionXLPipeline.from_pretrained(small / "pipeline"), file)
    flags = drawing(small, scorers, tmp_path / "out", candidates=[f"x={file}"], max_prompts=1, images_per_prompt=1)

    sentence = refused(script, flags)

    assert sentence.startswith(f"--candidates x={file} cannot be loaded: ")
    assert REFUSED[kind] in sentence
    assert not list(tmp_path.rglob("*.png"))


def test_candidates_that_are_the_base(script, small, scorers, ready, tmp_path):
    """diffusers leaves out what does not fit, with a warning."""
    flags = drawing(small, scorers, tmp_path / "out", max_prompts=1, images_per_prompt=1)
    weights = load_file(small / "lora" / "pytorch_lora_weights.safetensors")
    lora = f"x={tmp_path}"
    layer = next(name for name in weights if "lora_A" in name)
    for changed in (
        {f"unet.nowhere.{name}": weight for name, weight in weights.items()},
        {name.replace("to_q", "to_x"): weight for name, weight in weights.items()},
        hide(weights, layer),
    ):
        save_file(changed, tmp_path / "pytorch_lora_weights.safetensors")
        sentence = refused(script, {**flags, "candidates": [lora]})
        assert sentence.startswith(f"--candidates {lora} cannot be loaded: ")
    idle = {name: weight * ("lora_B" not in name) for name, weight in weights.items()}
    save_file(idle, tmp_path / "pytorch_lora_weights.safetensors")
    sentence = refused(script, {**flags, "candidates": [lora]})
    assert (
        sentence
        == f"--candidates {lora}: all 1 images are identical to those of base, so there is nothing to compare."
    )
    twins = {**ready, "images": [f"red={small / 'red'}", f"twin={small / 'red'}"]}
    assert "all 3 images are identical to those of red" in refused(script, twins)


def test_wrong_candidates(script, small, scorers, tmp_path):
    flags = drawing(small, scorers, tmp_path / "out")
    assert "--candidates x=" in refused(script, {**flags, "candidates": [f"x={tmp_path}"]})
    for pair in (f"{tmp_path}+{small / 'lora'}", f"{small / 'lora'}+{tmp_path}"):
        sentence = refused(script, {**flags, "candidates": [f"x={pair}"]})
        assert sentence.startswith(f"--candidates x={pair}: ") and " is not a folder or a reachable hub id" in sentence
    unet = shutil.copytree(small / "unet", tmp_path / "narrow")
    config = json.loads((unet / "config.json").read_text())
    narrow = UNet2DConditionModel.from_config({**config, "cross_attention_dim": 768})
    narrow.save_pretrained(tmp_path / "wide")
    sentence = refused(script, {**flags, "candidates": [f"x={tmp_path / 'wide'}"]})
    assert "cannot be loaded: its cross_attention_dim is 768, not 96 as in the base model" in sentence
    weights = load_file(unet / "diffusion_pytorch_model.safetensors")
    save_file(hide(weights, "conv_in.weight"), unet / "diffusion_pytorch_model.safetensors")
    sentence = refused(script, {**flags, "candidates": [f"x={unet}"]})
    assert sentence.startswith(f"--candidates x={unet} cannot be loaded: ") and "conv_in.weight" in sentence
    for flag in ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"):
        sentence = refused(script, {**flags, flag: tmp_path / "nothing"})
        assert sentence.startswith(f"--{flag} {tmp_path / 'nothing'} is not a folder")


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_a_base_without_a_vocabulary_is_refused(script, small, scorers, tmp_path, name):
    """transformers makes a tokenizer of two tokens, for which all prompts of a length are equal."""
    base = shutil.copytree(small / "pipeline", tmp_path / "base")
    remove_vocabulary(base / name)

    sentence = refused(script, drawing(small, scorers, tmp_path / "out", pretrained_model_name_or_path=base))

    assert sentence.startswith(f"--pretrained_model_name_or_path {base} cannot be loaded: its {name} has ")
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_a_base_that_lacks_weights_is_refused(script, small, scorers, tmp_path, name):
    """The libraries initialize them at random."""
    base = shutil.copytree(small / "pipeline", tmp_path / "base")
    weight = remove_weight(base / name)

    sentence = refused(script, drawing(small, scorers, tmp_path / "out", pretrained_model_name_or_path=base))

    reason = f"{name} lacks 1 weights, e.g. {weight}"
    assert sentence == f"--pretrained_model_name_or_path {base} cannot be loaded: {reason}"
    assert not list(tmp_path.rglob("*.png"))


def test_a_scorer_without_a_vocabulary_is_refused(script, ready, tmp_path):
    model = shutil.copytree(ready["clip_model"], tmp_path / "clip")
    remove_vocabulary(model)

    sentence = refused(script, {**ready, "clip_model": model})

    assert sentence == f"--clip_model {model} cannot be loaded: the tokenizer of {model} has no vocabulary"


def test_hub_ids_are_found_by_their_files(script, small, tmp_path, monkeypatch):
    """A hub id is recognised as a folder is, and known by its commit."""
    snapshot = tmp_path / "snapshots" / "c0ffee"
    shutil.copytree(small / "trained", snapshot)

    def hf_hub_download(repo, name, **options):
        if not (snapshot / name).exists():
            raise LocalEntryNotFoundError(name)
        return str(snapshot / name)

    monkeypatch.setattr(script, "hf_hub_download", hf_hub_download)
    words = ["--pretrained_model_name_or_path", str(small / "pipeline"), "--candidates", "x=me/mine", "--prompts", "p"]
    base, candidate = (system.models[None] for system in script.find_systems(script.parse_args(words), []))
    assert (base.kind, candidate.kind, candidate.source) == ("base", "unet", "me/mine")
    assert candidate.version == "c0ffee"


def test_a_hub_out_of_reach_is_no_missing_file(script, small, monkeypatch):
    def hf_hub_download(repo, name, **options):
        raise LocalEntryNotFoundError("the network is down")

    monkeypatch.setattr(script, "hf_hub_download", hf_hub_download)
    assert script.find_file("me/mine", "unet/config.json") is None
    monkeypatch.setattr(script, "is_offline_mode", lambda: False)
    with pytest.raises(
        script.EvaluationError, match="unet/config.json of me/mine cannot be downloaded: .*the network"
    ):
        script.find_file("me/mine", "unet/config.json")


def test_a_fault_of_one_process_ends_all_in_one_sentence(ready, small, tmp_path):
    folder = shutil.copytree(small / "red", tmp_path / "red")
    (folder / "00001_0.png").write_bytes(b"no image")
    statuses, outputs = run_ranks([SCRIPT, *command_line({**ready, "images": [f"red={folder}"], "batch_size": 1})])
    assert 0 not in statuses
    assert f"error: Image {folder / '00001_0.png'} cannot be read" in "".join(outputs)
    assert not re.search(r'File ".*evaluate_diffusion', "".join(outputs))
