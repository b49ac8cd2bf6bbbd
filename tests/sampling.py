"""Helpers for the tests of the two scripts that sample from SDXL: the evaluation and the pair maker.

The fixtures that these tests share are in `sampling_fixtures.py`.
"""

import io
import json
import shutil

import huggingface_hub
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import PartialState
from conftest import ROOT, command_line, run
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file


EVALUATION = ROOT / "evaluate_diffusion_mapo_sdxl.py"
MAKER = ROOT / "make_pick_style_sdxl.py"
# Flags of models.
BASE = "pretrained_model_name_or_path"
VAE = "pretrained_vae_model_name_or_path"
LORA_FILE = "pytorch_lora_weights.safetensors"

# Prompts of the evaluation. One has capitals and a comma, one is longer than the scorers read.
PROMPTS = ["a red circle", "An orange star, drawn by hand", "a blue square " * 30]
# Captions of the pair maker. One occurs twice.
CAPTIONS = [
    "a red circle",
    "a blue square",
    "An orange star, by hand",
    "a green triangle",
    "a red circle",
    "a purple star",
    "a yellow circle",
]
STYLE_PREFIX = "a cartoon of"
TOKEN = "hf_ThisIsNotARealTokenButItMustStaySecret"

SCORERS = ["pickscore", "hps", "aesthetic", "clip", "siglip", "dinov2", "imagereward", "hps_no_antialias"]
# float32 computes a cosine to 1e-7; some scores are a hundred times a cosine.
TOLERANCE = {**dict.fromkeys(SCORERS, 3e-5), "pickscore": 1e-5, "aesthetic": 1e-5, "imagereward": 1e-5}


# Running the scripts -------------------------------------------------------------------------------------------------
def flags_to_score(inputs, scorers, folder):
    """Flags of an evaluation that scores existing images with one scorer."""
    return {
        "images": [f"red={inputs / 'red'}", f"blue={inputs / 'blue'}"],
        "prompts": inputs / "prompts.txt",
        "scorers": ["clip"],
        "output_dir": folder,
        **scorers,
    }


def flags_to_generate(inputs, scorers, folder):
    """Flags of an evaluation that generates images with the base model."""
    return {
        BASE: inputs / "pipeline",
        "prompts": inputs / "prompts.txt",
        "images_per_prompt": 2,
        "num_inference_steps": 2,
        "resolution": 64,
        "batch_size": 4,
        "scorers": ["clip"],
        "output_dir": folder,
        **scorers,
    }


def flags_to_make_pairs(inputs, folder):
    """Flags of the pair maker with a style prefix."""
    return {
        BASE: inputs / "pipeline",
        "prompts": inputs / "captions.txt",
        "style_prefix": STYLE_PREFIX,
        "num_inference_steps": 2,
        "resolution": 64,
        "batch_size": 3,
        "output_dir": folder,
    }


def parse(script, flags):
    """The parsed flags, for calling functions of a script directly."""
    PartialState()  # required by the script's logger
    return script.parse_args(command_line(flags))


def error_of(script, flags):
    """The sentence with which a run with these flags ends."""
    error_class = script.EvaluationError if script.__name__ == EVALUATION.stem else script.PairsError

    with pytest.raises(error_class) as error:
        run(script, flags)

    sentence = str(error.value)
    assert "\n" not in sentence
    return sentence


def usage_error_of(script, words, capsys):
    """What the command line prints to reject these words."""
    with pytest.raises(SystemExit) as error:
        script.parse_args(words)

    assert error.value.code == 2
    return capsys.readouterr().err


def raise_interrupt(*args, **options):
    raise KeyboardInterrupt


def interrupt(script, flags, monkeypatch, owner, name, function=raise_interrupt):
    """Run the script with a function that interrupts it instead of its own."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, function)
        run(script, flags)


def cache_repository(monkeypatch, cache, name, folder, ignored=None):
    """Put a folder into the hub's cache as a repository. Returns the folder of its commit, which is 40 zeros."""
    repo = cache / f"models--{name.replace('/', '--')}"
    snapshot = shutil.copytree(folder, repo / "snapshots" / ("0" * 40), ignore=ignored)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return snapshot


# Images --------------------------------------------------------------------------------------------------------------
def sample(pipeline, prompt, seed, **options):
    """One image by diffusers' own pipeline."""
    pipeline.set_progress_bar_config(disable=True)
    defaults = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 5.0}
    generator = torch.Generator().manual_seed(seed)
    return pipeline(prompt, generator=generator, **{**defaults, **options}).images[0]


def max_difference(image, other):
    """The largest difference of two images in any pixel and channel, out of 255."""
    return np.abs(np.asarray(image, dtype=int) - np.asarray(other, dtype=int)).max()


def read_rgb(path):
    return Image.open(path).convert("RGB")


def read_folder(folder):
    return [read_rgb(path) for path in sorted(folder.iterdir())]


def times_of(folder, pattern):
    """{path: time of the last change} of the files below a folder."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob(pattern)}


def constant_score(value):
    """A method `score` for scorers, by which all images have this score."""

    def score(self, images, prompts):
        return torch.full((len(images),), value)

    return score


# Output of the evaluation --------------------------------------------------------------------------------------------
def records_of(output_dir):
    return [json.loads(line) for line in (output_dir / "scores.jsonl").read_text().splitlines()]


def results_of(output_dir):
    return json.loads((output_dir / "results.json").read_text())


def image_of(output_dir, model, prompt_number=0, image_number=0):
    return Image.open(output_dir / "images" / model / f"{prompt_number:05d}_{image_number}.png")


# Output of the pair maker --------------------------------------------------------------------------------------------
def shards_of(folder):
    return sorted((folder / "data").iterdir())


def rows_of(folder):
    rows = []
    for shard in shards_of(folder):
        rows += pq.read_table(shard).to_pylist()
    return rows


def images_of(row):
    """The chosen and the rejected image of a row, as arrays."""
    first, second = [np.asarray(Image.open(io.BytesIO(row[name])), dtype=int) for name in ("jpg_0", "jpg_1")]
    if row["label_0"] >= row["label_1"]:
        return first, second
    return second, first


def unfinished_pairs(folder):
    return sorted(folder.rglob("0*.parquet"))


def pair_seed(number, image=0, seed=0):
    """The seed of an image of a pair. The first number of the sequence picks the side of the chosen image."""
    return int(np.random.SeedSequence([seed, number]).generate_state(image + 2, np.uint64)[image + 1])


# Changed and damaged models ------------------------------------------------------------------------------------------
def edit_weights(file, edit):
    """Let `edit` change the weights {name: weight} of a file in place."""
    if file.suffix != ".safetensors":
        weights = torch.load(file)
        edit(weights)
        torch.save(weights, file)
        return

    with safe_open(file, "pt") as tensors:
        metadata = tensors.metadata()
    weights = load_file(file)
    edit(weights)
    save_file(weights, file, metadata)


def weights_file(folder):
    (file,) = folder.glob("*.safetensors")
    return file


def double(weights):
    for weight in weights.values():
        weight *= 2


def set_to_nan(folder, ending):
    """Set the weights whose names end like this to NaN."""

    def edit(weights):
        for name, weight in weights.items():
            if name.endswith(ending):
                weight[:] = float("nan")

    edit_weights(weights_file(folder), edit)


def remove_weight(folder):
    """Remove the first weight of a model; returns its name."""
    file = weights_file(folder)
    name = min(load_file(file))
    edit_weights(file, lambda weights: weights.pop(name))
    return name


def remove_vocabulary(folder):
    """Leave only the small files of a tokenizer, as an incomplete download does."""
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        (folder / name).unlink(missing_ok=True)


def edit_config(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, **changes}))


def save_lora_trained_on(unet, inputs, file):
    """Save the LoRA as if it had been trained on another UNet, which its metadata names."""
    weights = load_file(inputs / "lora" / LORA_FILE)
    config = {"unet.lora_alpha": 2, "unet.base_model_name_or_path": unet}
    save_file(weights, file, {"lora_adapter_metadata": json.dumps(config)})
