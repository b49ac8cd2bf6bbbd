"""
Functions that the evaluation and the pair maker repeat, since each script can be copied without the other.

Equal functions are tested once, in the evaluation.
"""

import inspect
import os
import re
import shutil
import struct
from importlib.metadata import metadata

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionXLPipeline,
)
from huggingface_hub.errors import LocalEntryNotFoundError
from packaging.specifiers import SpecifierSet
from PIL import Image, PngImagePlugin, features
from sampling import EVALUATION, MAKER, max_difference, sample, usage_error_of
from small_loras import REFUSED, merge, random_lora, save_kohya, save_peft, save_refused


pytest_plugins = "sampling_fixtures"

EQUAL_FUNCTIONS = """
add_branch add_lora apply_alphas bounded decode_image describe find_alpha find_file find_images find_lora_file
load_complete load_component load_sdxl load_tokenizers read_lora read_lora_config stream_prompts try_scheduler
warn_about_long_prompts write_text
"""


@pytest.mark.parametrize("name", EQUAL_FUNCTIONS.split())
def test_both_scripts_have_the_same_function(evaluation, maker, name):
    assert inspect.getsource(getattr(evaluation, name)) == inspect.getsource(getattr(maker, name))


# Both scripts --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", [EVALUATION, MAKER], ids=["evaluation", "maker"])
def test_header_asks_for_a_python_that_its_packages_support(path):
    header = path.read_text().split("# ///")[1]

    oldest = re.search(r'requires-python = ">=([\d.]+)"', header)[1]
    packages = re.findall(r'"([a-z]+)(?:>=|")', header)

    assert "transformers" in packages
    for package in packages:
        assert oldest in SpecifierSet(metadata(package)["Requires-Python"]), package


@pytest.mark.parametrize(("script", "words"), [("evaluation", []), ("maker", ["--style_prefix", "x"])])
def test_rejects_a_single_file_with_the_command_that_converts_it(request, capsys, script, words):
    flags = ["--prompts", "p.txt", "--pretrained_model_name_or_path", "some/model.safetensors"]

    printed = usage_error_of(request.getfixturevalue(script), [*flags, *words], capsys)

    assert "python convert_sdxl.py single_file some/model.safetensors FOLDER" in printed


MODEL_FLAGS = ["pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"]


@pytest.mark.parametrize(
    ("script", "names", "words"),
    [
        ("evaluation", ["reference_images", "clip_model", "hps_weights"], ["--images", "a=b"]),
        ("maker", ["chosen_images", "unet", "lora"], []),
    ],
)
def test_home_is_expanded_in_path_flags(request, monkeypatch, script, names, words):
    monkeypatch.setenv("HOME", "/home/me")
    names = [*names, *MODEL_FLAGS, "prompts", "output_dir"]

    args = request.getfixturevalue(script).parse_args([*words, *(f"--{name}=~/{name}" for name in names)])

    for name in names:
        assert getattr(args, name) == f"/home/me/{name}"


def test_home_is_expanded_in_named_paths(evaluation, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    words = ["--prompts", "p.txt", "--pretrained_model_name_or_path", "x"]

    args = evaluation.parse_args([*words, "--images", "a=~/images", "--candidates", "b=~/lora", "c=~/unet+~/lora"])

    assert args.images == [("a", "/home/me/images")]
    assert args.candidates == [("b", "/home/me/lora"), ("c", "/home/me/unet+/home/me/lora")]


# Images --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", ["png", "tiff", "ppm"])
def test_16_bit_grey_is_scaled(evaluation, tmp_path, suffix):
    grey = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    file = tmp_path / f"x.{suffix}"
    if suffix == "ppm":
        file.write_bytes(b"P5 8 8 65535\n" + grey.astype(">u2").tobytes())  # older Pillow only reads it
    else:
        Image.fromarray(grey).save(file)

    image = evaluation.decode_image(file)

    assert image.mode == "RGB"
    assert (np.asarray(image)[..., 1] == grey >> 8).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_images_are_composited_over_white(evaluation, tmp_path, mode):
    image = Image.new("RGBA", (8, 8), (90, 90, 90, 0))
    image.paste((0, 0, 0, 255), (2, 2, 6, 6))
    file = tmp_path / "x.png"
    image.convert(mode).save(file)

    pixels = np.asarray(evaluation.decode_image(file))

    expected = np.full((8, 8, 3), 255)
    expected[2:6, 2:6] = 0
    assert (pixels == expected).all()


def exif_data(*entries):
    """EXIF data with entries of (tag, type, count, four bytes), which Pillow itself would not write."""
    data = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries))
    for tag, kind, count, value in entries:
        data += struct.pack("<HHI", tag, kind, count) + value
    return data + bytes(4)


ROTATED = (0x0112, 3, 1, b"\6\0\0\0")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "avif", "tiff"])
def test_images_are_turned_upright(evaluation, tmp_path, suffix):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("Pillow supports AVIF since version 11.3")
    image = Image.new("RGB", (64, 32), "white")
    image.paste("black", (0, 0, 32, 32))
    file = tmp_path / f"x.{suffix}"
    image.save(file, exif=exif_data(ROTATED))

    upright = np.asarray(evaluation.decode_image(file).convert("L"), dtype=int)

    # The left half is now the upper one.
    assert upright.shape == (64, 32)
    assert upright[:30].max() < 30
    assert upright[34:].min() > 225


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize(
    ("exif", "size"),
    [
        (b"Exif\0\0not EXIF data", (64, 32)),
        (exif_data(ROTATED, (0x011A, 2, 4, b"abc\0")), (32, 64)),
        (exif_data(ROTATED, (0x0100, 9, 1, b"\xff\xff\xff\xff")), (32, 64)),
    ],
    ids=["garbage", "text for a number", "negative width"],
)
def test_broken_exif_data_is_ignored(evaluation, tmp_path, suffix, exif, size):
    file = tmp_path / f"x.{suffix}"
    Image.new("RGB", (64, 32), "red").save(file, exif=exif)

    image = evaluation.decode_image(file)

    assert image.size == size


@pytest.mark.parametrize("kind", ["profile", "zTXt", "iTXt"])
def test_large_metadata_is_accepted(evaluation, tmp_path, kind):
    """3 MB; Pillow's limit is 1 MB."""
    info = PngImagePlugin.PngInfo()
    profile = None
    if kind == "profile":
        profile = os.urandom(3 * 2**20)
    elif kind == "zTXt":
        info.add_text("workflow", "x" * 3 * 2**20, zip=True)
    else:
        info.add_itxt("workflow", "x" * 3 * 2**20, zip=True)
    file = tmp_path / "x.png"
    Image.new("RGB", (8, 8), "red").save(file, pnginfo=info, icc_profile=profile)

    image = evaluation.decode_image(file)

    assert image.getpixel((0, 0)) == (255, 0, 0)


# Prompts -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("UPPER.TXT", "a red circle\na blue square\n"),
        ("bom.txt", "\ufeffa red circle\na blue square\n"),
        ("brackets[1].txt", "a red circle\na blue square\n"),
        ("table.csv", "id,prompt\n1,a red circle\n2,a blue square\n"),
        ("table.tsv", "id\tprompt\n1\ta red circle\n2\ta blue square\n"),
        ("TABLE.TSV", "id\tprompt\n1\ta red circle\n2\ta blue square\n"),
        ("list.json", '["a red circle", "a blue square"]'),
        ("table.json", '[{"id": 1, "prompt": "a red circle"}, {"id": 2, "prompt": "a blue square"}]'),
        ("table.jsonl", '{"prompt": "a red circle"}\n{"prompt": "a blue square"}\n'),
    ],
)
def test_prompts_are_read_from_files(evaluation, tmp_path, name, text):
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")

    rows = list(evaluation.stream_prompts(str(file), "train", {"--prompt_column": "prompt"}))

    assert rows == [{"--prompt_column": "a red circle"}, {"--prompt_column": "a blue square"}]


def test_broken_parquet_file_is_not_blamed_on_the_split(evaluation, tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"garbage")

    with pytest.raises(ValueError) as error:
        list(evaluation.stream_prompts(str(tmp_path / "x.parquet"), "test", {"--prompt_column": "prompt"}))

    assert "--prompt_split" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", "text\na red circle\n", "--prompt_column: there is no column 'prompt' (columns: text)"),
        ("folder/x.txt", "a red circle\n", "--prompt_split: Bad split: test. Available splits: ['train']"),
    ],
)
def test_rejects_prompts_of_another_column_or_split(evaluation, tmp_path, name, text, message):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    source = file if file.parent == tmp_path else file.parent

    with pytest.raises(ValueError) as error:
        list(evaluation.stream_prompts(str(source), "test", {"--prompt_column": "prompt"}))

    assert str(error.value) == message


# Models --------------------------------------------------------------------------------------------------------------
def test_an_unreachable_hub_is_an_error_unless_offline(evaluation, monkeypatch):
    def hf_hub_download(repo, name):
        raise LocalEntryNotFoundError("the network is down")

    monkeypatch.setattr(evaluation, "hf_hub_download", hf_hub_download)

    file = evaluation.find_file("me/mine", "unet/config.json")
    monkeypatch.setattr(evaluation, "is_offline_mode", lambda: False)
    with pytest.raises(evaluation.EvaluationError) as error:
        evaluation.find_file("me/mine", "unet/config.json")

    assert file is None
    message = "me/mine is not a local folder, and its unet/config.json cannot be downloaded: .*the network"
    assert re.match(message, str(error.value))


def test_rejects_a_scheduler_without_its_package(evaluation, monkeypatch):
    def set_timesteps(self, num_steps):
        raise ImportError("\nDDIMScheduler requires the scipy library")

    monkeypatch.setattr(DDIMScheduler, "set_timesteps", set_timesteps)

    with pytest.raises(evaluation.EvaluationError) as error:
        evaluation.try_scheduler(DDIMScheduler(), 2)

    reason = "ImportError: DDIMScheduler requires the scipy library"
    assert str(error.value) == f"--num_inference_steps 2 with DDIMScheduler does not work: {reason}"


# LoRA ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("save", [save_kohya, save_peft])
def test_each_layer_of_a_lora_has_its_own_rank_and_alpha(evaluation, inputs, tmp_path, save):
    """In the UNet and in the text encoders."""
    base = str(inputs / "pipeline")
    pipeline = evaluation.load_sdxl(base)
    expected_pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    lora = random_lora(expected_pipeline)
    file = tmp_path / "x.safetensors"
    save(lora, file)

    evaluation.add_lora(pipeline, evaluation.read_lora(file, pipeline.unet.config))

    expected = sample(merge(expected_pipeline, lora), "a red circle", seed=0)
    assert max_difference(sample(pipeline, "a red circle", seed=0), expected) <= 1


def test_small_changes_of_text_encoders_survive_bfloat16(evaluation, inputs, tmp_path):
    """Added to bfloat16 weights, 85 % of this one would be rounded away."""
    base = str(inputs / "pipeline")
    file = tmp_path / "x.safetensors"
    exact = evaluation.load_sdxl(base)
    lora = random_lora(exact, parts=("text_encoder", "text_encoder_2"))
    for layer, (down, up, alpha) in lora.items():
        lora[layer] = (down, up * 1e-4, alpha)
    save_kohya(lora, file)
    half_base = evaluation.load_sdxl(base, dtype=torch.bfloat16)
    half = evaluation.load_sdxl(base, dtype=torch.bfloat16)

    evaluation.add_lora(half, evaluation.read_lora(file, half.unet.config))

    assert half.text_encoder.dtype == torch.bfloat16
    change = encode(half) - encode(half_base)
    before = encode(exact)
    expected = encode(merge(exact, lora)) - before
    assert (change * expected).sum() / expected.square().sum() == pytest.approx(1, abs=0.05)


@torch.no_grad()
def encode(pipeline):
    """The prompt embeddings, computed in float32."""
    return pipeline.to(torch.float32).encode_prompt("a red circle", do_classifier_free_guidance=False)[0]


def test_captions_beside_images_are_not_taken_for_images(evaluation, tmp_path):
    """Pillow takes a text that starts with BM for a broken BMP file."""
    image = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(image)
    (tmp_path / "a.txt").write_text("BMX rider jumping over a ramp in the city, seen from below at dusk")

    images, others = evaluation.find_images(tmp_path)

    assert images == [image]
    assert others == ["a.txt"]


def test_rejects_a_variant_that_the_unet_lacks(evaluation, inputs):
    with pytest.raises(OSError, match="fp61"):
        evaluation.load_sdxl(str(inputs / "pipeline"), variant="fp61")


def test_rejects_a_truncated_variant(evaluation, inputs, tmp_path):
    """Of any part, instead of its files without a variant."""
    base = shutil.copytree(inputs / "pipeline", tmp_path / "base")
    for part in ("unet", "vae"):
        (weights,) = (base / part).glob("*.safetensors")
        shutil.copy(weights, weights.with_suffix(".fp16.safetensors"))
    variant = base / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    variant.write_bytes(variant.read_bytes()[:1000])

    with pytest.raises(OSError, match=variant.name):
        evaluation.load_sdxl(str(base), variant="fp16")


@pytest.mark.parametrize("kind", REFUSED)
def test_rejects_a_lora_that_cannot_be_applied_exactly(evaluation, inputs, tmp_path, kind):
    file = tmp_path / "x.safetensors"
    pipeline = evaluation.load_sdxl(str(inputs / "pipeline"))
    save_refused(kind, pipeline, file)

    with pytest.raises(ValueError) as error:
        evaluation.add_lora(pipeline, evaluation.read_lora(file, pipeline.unet.config))

    assert REFUSED[kind] in str(error.value)
    assert not any("lora" in name for name, _ in pipeline.unet.named_parameters())
