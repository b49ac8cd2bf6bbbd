"""The script aligns a model: a small SDXL that generates photos learns to generate cartoons of held-out captions."""

import numpy as np
import pytest
import torch
from conftest import run, scalars
from diffusers import UNet2DConditionModel
from trained_world import (
    HELD_OUT,
    PREFERRED,
    SIZE,
    SUBJECTS,
    WEIGHTS,
    draw,
    draw_preferences,
    load_pipeline,
    measure,
    sample,
    shares,
)


IMAGES = 24
# Guidance as people use it with SDXL. It extrapolates away from the model without a caption, which no pair trains.
GUIDANCE = 5
LORA = {"rank": 64, "learning_rate": 1e-3, "beta_mapo": 64}


@pytest.fixture(scope="module")
def trained_world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    load_pipeline().save_pretrained(folder / "pipeline")
    draw_preferences(folder / "pairs", "cartoon", 240)
    return folder


@pytest.fixture(scope="module")
def base_shares():
    return shares(sample(load_pipeline(), IMAGES, GUIDANCE))


@pytest.fixture
def flags(trained_world, tmp_path):
    return {
        "pretrained_model_name_or_path": trained_world / "pipeline",
        "dataset_name": trained_world / "pairs",
        "cache_dir": tmp_path / "cache",
        "cache_latents": True,
        "output_dir": tmp_path / "out",
        "resolution": SIZE,
        "beta_mapo": 8,
        "learning_rate": 2e-4,
        "lr_warmup_steps": 0,
        "train_batch_size": 8,
        "max_train_steps": 100,
        "num_validation_pairs": 24,
        "seed": 0,
    }


def align(script, flags, base_shares, rejected_growth=10):
    """Train, and check the images of held-out captions and the metrics of held-out pairs."""
    out = run(script, flags)

    pipeline = load_pipeline()
    if "rank" in flags:
        pipeline.load_lora_weights(out, weight_name="pytorch_lora_weights.safetensors")
    else:
        pipeline.unet = UNet2DConditionModel.from_pretrained(out, subfolder="unet")
    aligned_shares = shares(sample(pipeline, IMAGES, GUIDANCE))
    logged = scalars(out)
    before = {name: values[0] for name, values in logged.items() if name.startswith("eval_")}
    after = {name: values[100] for name, values in logged.items() if name.startswith("eval_")}
    print(base_shares, aligned_shares, before, after, sep="\n")

    assert aligned_shares["cartoon"] > 0.9
    assert aligned_shares["right"] >= 0.95 * base_shares["right"]
    # The right captions and sizes give 0.01465, SDXL's own sizes 0.01547, and no captions 0.0218.
    assert before["eval_chosen_mse"] < 0.0150
    assert after["eval_chosen_mse"] < 0.93 * before["eval_chosen_mse"]
    assert after["eval_rejected_mse"] > rejected_growth * before["eval_rejected_mse"]
    assert before["eval_margin"] < 0.1
    assert after["eval_margin"] > 0.5
    assert before["eval_accuracy"] < 0.6
    assert after["eval_accuracy"] > 0.95
    assert before["eval_accuracy_t750_999"] < 0.2
    assert after["eval_accuracy_t750_999"] > 0.8


def test_photos_become_cartoons_of_the_same_captions(script, flags, base_shares):
    assert base_shares["cartoon"] < 0.05

    align(script, flags, base_shares)


@pytest.mark.matrix
def test_lora_learns_the_same(script, flags, base_shares):
    align(script, {**flags, **LORA}, base_shares, rejected_growth=5)


# Damages that the test above must notice ----------------------------------------------------------------------------
def flip_sign(script, patch):
    logsigmoid = torch.nn.functional.logsigmoid
    patch.setattr(torch.nn.functional, "logsigmoid", lambda margin: logsigmoid(-margin))


def swap_pair(script, patch):
    load_pair = script.load_pair

    def load_swapped(*args, **options):
        pair = load_pair(*args, **options)
        return {**pair, "labels": pair["labels"][::-1]}

    patch.setattr(script, "load_pair", load_swapped)


def drop_caption(script, patch):
    tokenize = script.tokenize
    patch.setattr(script, "tokenize", lambda pipeline, prompts: tokenize(pipeline, len(prompts) * [""]))


def use_sizes_of_sdxl(script, patch):
    load_pair = script.load_pair

    def load_with_wrong_sizes(*args, **options):
        pair = load_pair(*args, **options)
        return {**pair, "add_time_ids": torch.tensor([[1024, 1024, 0, 0, 1024, 1024]] * 2)}

    patch.setattr(script, "load_pair", load_with_wrong_sizes)


def adapt_few_layers(script, patch):
    patch.setitem(script.LORA_LAYERS, "all", ["to_q"])


@pytest.mark.matrix
@pytest.mark.parametrize("damage", [flip_sign, swap_pair, drop_caption, use_sizes_of_sdxl, adapt_few_layers])
def test_damaged_script_fails(script, flags, base_shares, monkeypatch, damage):
    if damage is adapt_few_layers:
        flags.update(LORA)
    damage(script, monkeypatch)

    with pytest.raises(AssertionError) as error:
        align(script, flags, base_shares)

    print(f"{damage.__name__}: {error.value}")


# The world of these tests -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("style", "framed"), [("photo", False), ("photo", True), ("cartoon", False)])
def test_images_are_measured_reliably(style, framed):
    """Of 480 drawn images, at most one in a hundred is mistaken for something else."""
    rng = np.random.default_rng(5)

    mistakes = 0
    for shape, colour in 20 * SUBJECTS:
        image = draw(shape, colour, style, rng, SIZE, framed=framed)
        expected = {"shape": shape, "colour": colour, "cartoon": style == "cartoon", "framed": framed}
        mistakes += measure(image) != expected

    assert mistakes <= 4


def test_held_out_captions_are_in_no_pair():
    assert set(HELD_OUT) | set(PREFERRED) == set(SUBJECTS)
    assert set(HELD_OUT) & set(PREFERRED) == set()
    assert {shape for shape, _ in HELD_OUT} == {shape for shape, _ in PREFERRED}
    assert {colour for _, colour in HELD_OUT} == {colour for _, colour in PREFERRED}


def test_weights_are_small_enough_to_ship():
    assert WEIGHTS.stat().st_size < 5e6
