"""Scorers of the evaluation: agreement with independent implementations, damaged weights, and reused scores."""

import math
import os
import shutil

import pytest
import torch
from conftest import run
from PIL import Image
from sampling import (
    PROMPTS,
    SCORERS,
    TOLERANCE,
    constant_score,
    edit_weights,
    error_of,
    read_folder,
    read_rgb,
    records_of,
    remove_vocabulary,
)
from small_scorers import expected_score, part_of


pytest_plugins = "sampling_fixtures"


def sources_of(scorers, name):
    """The keyword arguments of a scorer's class, by its flags."""
    return part_of(scorers, name.removesuffix("_no_antialias") + "_")


# Scores --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCORERS)
def test_scores_match_an_independent_implementation(scored, inputs, scorers, name):
    references = read_folder(inputs / "green")

    records = records_of(scored)

    for record in records:
        expected = expected_score(name, scorers, read_rgb(record["file"]), record["prompt"], references)
        assert record[name] == pytest.approx(expected, rel=0, abs=TOLERANCE[name])
    # A scorer that ignored the image or the prompt would repeat itself.
    assert len({record[name] for record in records}) == len(records)


@pytest.mark.parametrize("name", SCORERS)
def test_a_scorer_can_be_used_from_a_notebook(evaluation, inputs, scorers, name):
    """Without arguments of a command line, and without an Accelerator."""
    image = read_rgb(inputs / "red" / "00001_0.png")
    references = read_folder(inputs / "green")
    reference_folders = [inputs / "green"] if name == "dinov2" else []

    sources = sources_of(scorers, name)
    scorer = evaluation.SCORERS[name](torch.device("cpu"), *reference_folders, **sources)
    scores = scorer.score([image, image], PROMPTS[:2])

    expected = [expected_score(name, scorers, image, prompt, references) for prompt in PROMPTS[:2]]
    assert scores.tolist() == pytest.approx(expected, rel=0, abs=TOLERANCE[name])
    assert scores.shape == (2,)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    assert scorer.image_processor.backend == "pil"
    assert not torch.backends.cudnn.allow_tf32


def test_a_scorer_rejects_unknown_keyword_arguments(evaluation):
    with pytest.raises(TypeError, match="not modle"):
        evaluation.CLIP("cpu", modle="x")


def test_clip_scores_are_not_negative(evaluation, scorers):
    sources = sources_of(scorers, "clip")
    scorer = evaluation.CLIP("cpu", **sources)
    scorer.cosines = lambda images, prompts: torch.tensor([-0.2, 0.3])

    scores = scorer.score([], [])

    assert scores.tolist() == pytest.approx([0, 30])


def test_each_prompt_is_embedded_once(evaluation, inputs, scorers, record_calls):
    sources = sources_of(scorers, "clip")
    scorer = evaluation.CLIP("cpu", **sources)
    embedded = record_calls(scorer, "embed_texts")
    images = [read_rgb(inputs / "red" / "00000_0.png")] * 3

    first = scorer.score(images, ["a", "b", "a"])
    second = scorer.score(images, ["b", "a", "c"])

    assert [call.args[0] for call in embedded] == [["a"], ["b"], ["c"]]
    assert first[1] == second[0]
    assert first[0] == second[1]


def test_scores_do_not_depend_on_batches_or_order(evaluation, scored, scoring_flags, inputs, tmp_path):
    """The prompts are reversed, and so are their images and the models."""
    (tmp_path / "prompts.txt").write_text("\n".join(reversed(PROMPTS)))
    for colour in ("red", "blue"):
        (tmp_path / colour).mkdir()
        for i in range(3):
            shutil.copy(inputs / colour / f"{i:05d}_0.png", tmp_path / colour / f"{2 - i:05d}_0.png")
    flags = {
        **scoring_flags,
        "images": [f"blue={tmp_path / 'blue'}", f"red={tmp_path / 'red'}"],
        "prompts": tmp_path / "prompts.txt",
        "reference_images": inputs / "green",
        "scorers": SCORERS,
        "batch_size": 1,
    }

    records = records_of(run(evaluation, flags))

    reordered = {(record["model"], 2 - record["prompt_index"]): record for record in records}
    for record in records_of(scored):
        other = reordered[record["model"], record["prompt_index"]]
        for name in SCORERS:
            assert other[name] == pytest.approx(record[name], rel=0, abs=TOLERANCE[name])


def test_hps_cleans_texts_as_open_clip_does(evaluation, scorers, record_calls):
    embedded = record_calls(evaluation.Scorer, "embed_texts")
    sources = sources_of(scorers, "hps")
    scorer = evaluation.HPS("cpu", **sources)

    scorer.embed_texts(["the cat’s “hat”", "a &amp;amp; b"])

    assert embedded[0].args[1] == ['the cat\'s "hat"', "a & b"]


def test_truncated_prompts_are_counted(evaluation, scoring_flags, caplog):
    run(evaluation, scoring_flags)

    assert "clip truncates 1 prompts to 77 tokens." in caplog.text


def test_equal_visible_images_have_equal_scores(evaluation, scoring_flags, tmp_path, caplog):
    """One image has red hidden under its transparent pixels, the other one is the same on white."""
    hidden = Image.new("RGBA", (48, 48), (255, 0, 0, 0))
    hidden.paste((0, 0, 255, 255), (12, 12, 36, 36))
    visible = Image.new("RGB", (48, 48), "white")
    visible.paste((0, 0, 255), (12, 12, 36, 36))
    for name, image in (("hidden", hidden), ("visible", visible)):
        (tmp_path / name).mkdir()
        image.save(tmp_path / name / "00000_0.png")
    (tmp_path / "hidden" / "notes.md").write_text("not an image")
    flags = {
        **scoring_flags,
        "images": [f"hidden={tmp_path / 'hidden'}", f"visible={tmp_path / 'visible'}"],
        "reference_images": tmp_path / "hidden",
        "scorers": ["clip", "dinov2"],
        "max_prompts": 1,
    }

    first, second = records_of(run(evaluation, flags))

    assert first["clip"] == second["clip"]
    assert [first["dinov2"], second["dinov2"]] == pytest.approx([100, 100], abs=TOLERANCE["dinov2"])
    assert f"{tmp_path / 'hidden'}: left out 1 files that Pillow cannot open: notes.md." in caplog.text


# Damaged scorers -----------------------------------------------------------------------------------------------------
def remove(weights, name):
    del weights[name]


def shorten(weights, name):
    weights[name] = weights[name][..., :-1].contiguous()


@pytest.mark.parametrize(
    ("flag", "name", "damage"),
    [
        ("clip_model", "visual_projection.weight", remove),
        ("hps_weights", "visual.proj", remove),
        ("aesthetic_weights", "layers.6.weight", shorten),
        ("dinov2_model", "layernorm.weight", shorten),
    ],
)
def test_rejects_weights_that_do_not_fit(evaluation, scoring_flags, inputs, tmp_path, flag, name, damage):
    source = scoring_flags[flag]
    if source.is_dir():
        copy = shutil.copytree(source, tmp_path / "model")
        file = copy / "model.safetensors"
    else:
        copy = shutil.copy(source, tmp_path / "weights.pt")
        file = copy
    edit_weights(file, lambda weights: damage(weights.get("state_dict", weights), name))
    scorer = flag.partition("_")[0]
    flags = {**scoring_flags, flag: copy, "scorers": [scorer], "reference_images": inputs / "green"}

    sentence = error_of(evaluation, flags)

    assert f"--{flag} {copy} " in sentence
    assert " cannot be loaded: " in sentence


class MakesFolder:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("scorer", ["hps", "aesthetic"])
def test_rejects_weights_that_would_run_code(evaluation, scoring_flags, tmp_path, scorer):
    file = tmp_path / "weights.pt"
    torch.save({"state_dict": MakesFolder(tmp_path / "made")}, file)

    sentence = error_of(evaluation, {**scoring_flags, "scorers": [scorer], f"{scorer}_weights": file})

    assert f"--{scorer}_weights {file} cannot be loaded: " in sentence
    assert not (tmp_path / "made").exists()


def test_rejects_a_scorer_without_a_vocabulary(evaluation, scoring_flags, tmp_path):
    model = shutil.copytree(scoring_flags["clip_model"], tmp_path / "clip")
    remove_vocabulary(model)

    sentence = error_of(evaluation, {**scoring_flags, "clip_model": model})

    assert sentence == f"--clip_model {model} cannot be loaded: the tokenizer of {model} has no vocabulary"


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_rejects_scores_that_are_not_finite(evaluation, scoring_flags, monkeypatch, score):
    monkeypatch.setattr(evaluation.CLIP, "score", constant_score(score))

    sentence = error_of(evaluation, scoring_flags)

    assert sentence.startswith("clip scored ")
    assert sentence.endswith(f" as {score}.")
    assert not (scoring_flags["output_dir"] / "scores" / "clip.json").exists()


# Scores of earlier runs ----------------------------------------------------------------------------------------------
def test_scores_are_reused_with_more_models_and_scorers(evaluation, scoring_flags, record_calls):
    clip = record_calls(evaluation.CLIP, "score")
    aesthetic = record_calls(evaluation.Aesthetic, "score")
    flags = {**scoring_flags, "batch_size": 8}

    first = records_of(run(evaluation, {**flags, "images": flags["images"][:1]}))
    second = records_of(run(evaluation, {**flags, "scorers": ["clip", "aesthetic"]}))

    # CLIP scores the red images, and then only the blue ones; Aesthetic scores both.
    assert [len(call.result) for call in clip] == [3, 3]
    assert [len(call.result) for call in aesthetic] == [6]
    assert [record["clip"] for record in second[:3]] == [record["clip"] for record in first]


def test_scores_are_reused_after_an_error_of_a_later_scorer(evaluation, scoring_flags, record_calls, monkeypatch):
    monkeypatch.setattr(evaluation.Aesthetic, "score", constant_score(math.nan))
    clip = record_calls(evaluation.CLIP, "score")
    sentence = error_of(evaluation, {**scoring_flags, "scorers": ["clip", "aesthetic"]})
    num_batches = len(clip)

    run(evaluation, scoring_flags)

    assert sentence.startswith("aesthetic scored ")
    assert len(clip) == num_batches > 0
