"""Fixtures for the tests of the evaluation and of the pair maker: `pytest_plugins = "sampling_fixtures"`."""

import shutil
import sys

import numpy as np
import pytest
from accelerate import PartialState
from conftest import ROOT, load_script, run, save_lora
from sampling import (
    CAPTIONS,
    EVALUATION,
    MAKER,
    PROMPTS,
    SCORERS,
    flags_to_generate,
    flags_to_make_pairs,
    flags_to_score,
)
from small_scorers import build_scorers
from small_world import build_pipeline, draw


@pytest.fixture(scope="session")
def evaluation():
    """The evaluation script as a module. Its logger needs accelerate's state."""
    PartialState()
    return load_script(EVALUATION)


@pytest.fixture(scope="session")
def maker(evaluation):
    """The pair maker as a module. It imports the evaluation, which is in the same folder."""
    sys.path.insert(0, str(ROOT))
    yield load_script(MAKER)
    sys.path.remove(str(ROOT))


def write_images(folder, colour, seed):
    """Write three images of different sizes, named as the evaluation expects them."""
    folder.mkdir()
    for i, (shape, size) in enumerate([("circle", (64, 64)), ("star", (90, 50)), ("square", (33, 57))]):
        image = draw(shape, colour, "photo", np.random.default_rng(seed + i), 96)
        image.resize(size).save(folder / f"{i:05d}_0.png")


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """
    Folder with what the tests start from: prompts, captions, images, and models.

    `pipeline` is the base model. `other` has different weights; `trained/unet` and `unet` are its UNet, and `lora` is
    a LoRA of the base model.
    """
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    (folder / "captions.txt").write_text("".join(f"{caption}\n" for caption in CAPTIONS))
    write_images(folder / "red", "red", seed=0)
    write_images(folder / "blue", "blue", seed=10)
    write_images(folder / "green", "green", seed=20)

    build_pipeline(folder / "pipeline")
    build_pipeline(folder / "other", seed=1)
    shutil.copytree(folder / "other" / "unet", folder / "trained" / "unet")
    shutil.copytree(folder / "other" / "unet", folder / "unet")
    save_lora(folder)
    return folder


@pytest.fixture
def base(inputs, tmp_path):
    """A copy of the base model that a test may damage."""
    return shutil.copytree(inputs / "pipeline", tmp_path / "base")


@pytest.fixture
def red(inputs, tmp_path):
    """A folder of images that a test may damage."""
    return shutil.copytree(inputs / "red", tmp_path / "red")


@pytest.fixture(scope="session")
def scorers(tmp_path_factory):
    """The scorers' flags {flag: path}, for small scorers of the published architectures."""
    return build_scorers(tmp_path_factory.mktemp("scorers"))


@pytest.fixture(scope="session")
def scored(evaluation, inputs, scorers, tmp_path_factory):
    """Output of an evaluation of existing images with every scorer."""
    flags = flags_to_score(inputs, scorers, tmp_path_factory.mktemp("scored"))
    return run(evaluation, {**flags, "scorers": SCORERS, "reference_images": inputs / "green"})


@pytest.fixture(scope="session")
def pairs(maker, inputs, tmp_path_factory):
    """Output of the pair maker with a style prefix."""
    return run(maker, flags_to_make_pairs(inputs, tmp_path_factory.mktemp("made") / "pairs"))


@pytest.fixture
def scoring_flags(inputs, scorers, tmp_path):
    return flags_to_score(inputs, scorers, tmp_path / "out")


@pytest.fixture
def generation_flags(inputs, scorers, tmp_path):
    return flags_to_generate(inputs, scorers, tmp_path / "out")


@pytest.fixture
def pair_flags(inputs, tmp_path):
    return flags_to_make_pairs(inputs, tmp_path / "out")


@pytest.fixture
def candidate_flags(pair_flags, scorers):
    """Flags of the pair maker for the better of two candidates."""
    changes = {"style_prefix": None, "num_candidates": 2, "scorer": "clip"}
    return {**pair_flags, **changes, "clip_model": scorers["clip_model"]}


@pytest.fixture
def loaded_pipelines(maker, record_calls):
    """The calls by which the pair maker loads pipelines."""
    return record_calls(maker, "load_pipeline")
