"""convert_sdxl.py: it converts single files to folders, and fully fine-tuned UNets to LoRAs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, load_script, run
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from huggingface_hub.utils import filter_repo_objects
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sampling import (
    BASE,
    cache_repository,
    edit_config,
    raise_interrupt,
    remove_vocabulary,
    remove_weight,
    sample,
    set_to_nan,
)
from single_file import save_single_file
from small_loras import UNET_LAYERS
from small_world import build_pipeline, build_unet


CONVERT = ROOT / "convert_sdxl.py"
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"
KOHYA = "pytorch_lora_weights_kohya.safetensors"
WEIGHTS = [UNET, VAE, "text_encoder/model.safetensors", "text_encoder_2/model.safetensors"]
CONFIGS = ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json"]
# Names in single files begin with these.
UNET_PREFIX = "model.diffusion_model."
TEXT_PREFIX = "conditioner.embedders.0.transformer.text_model."
TEXT_2_PREFIX = "conditioner.embedders.1.model."


@pytest.fixture(scope="module")
def converter():
    """The script as a module."""
    return load_script(CONVERT)


def convert(converter, *words):
    converter.main(converter.parse_args([str(word) for word in words]))


def conversion_error(converter, *words):
    """The message of a conversion that fails. It must be one line."""
    with pytest.raises(converter.ConversionError) as error:
        convert(converter, *words)
    message = str(error.value)
    assert "\n" not in message
    return message


def load_pipeline(folder, **options):
    return StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False, **options)


def assert_same_tensors(path, other_path):
    tensors = load_file(path)
    others = load_file(other_path)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        other = others[name]
        assert tensor.dtype == other.dtype, name
        assert torch.equal(tensor, other), name


# Single files -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def checkpoint(world, tmp_path_factory):
    """The small world's pipeline as a single file."""
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_single_file(load_pipeline(world / "pipeline"), path)
    return path


@pytest.fixture
def change_checkpoint(checkpoint, tmp_path):
    """Write the single file with other tensors (None removes one) and metadata."""

    def change_checkpoint(changes, metadata=None):
        tensors = {**load_file(checkpoint), **changes}
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(kept, tmp_path / "changed.safetensors", metadata)
        return tmp_path / "changed.safetensors"

    return change_checkpoint


def test_folder_has_the_weights_dtypes_and_configs_of_the_pipeline(converter, world, tmp_path):
    """Many files contain a VAE in float32 and everything else in float16."""
    pipeline = load_pipeline(world / "pipeline", dtype={"vae": torch.float32, "default": torch.float16})
    pipeline.save_pretrained(tmp_path / "original")
    path = tmp_path / "model.safetensors"
    folder = tmp_path / "model"
    save_single_file(pipeline, path)

    convert(converter, "single_file", path, folder, "--config", world / "pipeline")

    for file in WEIGHTS:
        assert_same_tensors(folder / file, tmp_path / "original" / file)
    for file in CONFIGS:
        expected = json.loads((world / "pipeline" / file).read_text())
        assert json.loads((folder / file).read_text()) == expected


def test_training_on_the_folder_equals_training_on_the_original(converter, script, flags, checkpoint, tmp_path):
    original = flags[BASE]
    flags.update(max_train_steps=2)
    convert(converter, "single_file", checkpoint, tmp_path / "model", "--config", original)

    on_original = run(script, flags)
    flags.update({BASE: tmp_path / "model", "output_dir": tmp_path / "on folder"})
    on_folder = run(script, flags)

    assert_same_tensors(on_folder / LORA, on_original / LORA)


@pytest.mark.parametrize(
    ("markers", "metadata", "words", "prediction_type", "zero_terminal_snr"),
    [
        ([], None, "", "epsilon", False),
        (["v_pred"], None, "", "v_prediction", False),
        (["v_pred", "ztsnr"], None, "", "v_prediction", True),
        ([], "v", "", "v_prediction", False),
        ([], "v_prediction", "", "v_prediction", False),
        (["v_pred", "ztsnr"], "v", "--prediction_type epsilon", "epsilon", False),
        (["v_pred", "ztsnr"], None, "--no-zero_terminal_snr", "v_prediction", False),
        ([], None, "--prediction_type v_prediction --zero_terminal_snr", "v_prediction", True),
    ],
)
def test_noise_schedule_is_what_the_file_says_unless_flags_override_it(
    converter, change_checkpoint, world, tmp_path, capsys, markers, metadata, words, prediction_type, zero_terminal_snr
):
    markers = {name: torch.zeros(0) for name in markers}
    path = change_checkpoint(markers, metadata and {"modelspec.prediction_type": metadata})

    convert(converter, "single_file", path, tmp_path / "model", "--config", world / "pipeline", *words.split())

    scheduler = json.loads((tmp_path / "model" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == prediction_type
    assert scheduler["rescale_betas_zero_snr"] is zero_terminal_snr
    assert scheduler["timestep_spacing"] == ("trailing" if zero_terminal_snr else "leading")
    printed = f"{path}: prediction_type is {prediction_type}, zero_terminal_snr is {zero_terminal_snr}\n"
    assert capsys.readouterr().out == printed


def test_zero_terminal_snr_requires_v_prediction(converter, checkpoint, world, tmp_path):
    words = ["--config", world / "pipeline", "--zero_terminal_snr"]

    sentence = conversion_error(converter, "single_file", checkpoint, tmp_path / "model", *words)

    assert sentence == "--zero_terminal_snr requires --prediction_type v_prediction."


def test_file_without_a_vae_needs_the_flag(converter, checkpoint, change_checkpoint, world, tmp_path):
    names = [name for name in load_file(checkpoint) if name.startswith("first_stage_model.")]
    path = change_checkpoint(dict.fromkeys(names))
    words = ("single_file", path, tmp_path / "model", "--config", world / "pipeline")

    error = conversion_error(converter, *words)
    convert(converter, *words, "--vae", world / "pipeline")

    assert error.startswith(f"{path} contains no VAE")
    assert "--vae" in error
    assert_same_tensors(tmp_path / "model" / VAE, world / "pipeline" / VAE)


@pytest.mark.parametrize("kind", ["pipeline", "folder", "hub"])
def test_given_vae_is_used_instead_of_the_one_in_the_file(converter, monkeypatch, checkpoint, world, tmp_path, kind):
    build_pipeline(tmp_path / "other", seed=1)
    vae = tmp_path / "other"
    if kind == "folder":
        vae = tmp_path / "other" / "vae"
    elif kind == "hub":
        vae = "someone/vae"
        cache_repository(monkeypatch, tmp_path / "cache", vae, tmp_path / "other" / "vae")

    convert(converter, "single_file", checkpoint, tmp_path / "model", "--config", world / "pipeline", "--vae", vae)

    assert_same_tensors(tmp_path / "model" / VAE, tmp_path / "other" / VAE)
    assert AutoencoderKL.load_config(tmp_path / "model" / "vae")["scaling_factor"] == 0.13025


def test_broken_vae_of_a_pipeline_is_refused_with_the_reason(converter, checkpoint, world, tmp_path):
    shutil.copytree(world / "pipeline" / "vae", tmp_path / "other" / "vae")
    os.truncate(tmp_path / "other" / VAE, 1000)
    words = ("--config", world / "pipeline", "--vae", tmp_path / "other")

    error = conversion_error(converter, "single_file", checkpoint, tmp_path / "model", *words)

    assert error.startswith(f"--vae {tmp_path / 'other'} cannot be loaded")
    assert "config.json" not in error
    assert Path(VAE).name in error


def test_vae_without_some_weights_is_refused(converter, checkpoint, world, tmp_path):
    vae = shutil.copytree(world / "pipeline" / "vae", tmp_path / "vae")
    weight = remove_weight(vae)
    words = ("--config", world / "pipeline", "--vae", vae)

    error = conversion_error(converter, "single_file", checkpoint, tmp_path / "model", *words)

    assert error == f"--vae {vae} cannot be loaded: it lacks 1 of its weights, e.g. {weight}"


def test_vae_of_another_model_is_refused(converter, checkpoint, world, tmp_path):
    shutil.copytree(world / "pipeline" / "vae", tmp_path / "other")
    edit_config(tmp_path / "other", scaling_factor=0.18215)
    words = ("single_file", checkpoint, tmp_path / "model", "--config", world / "pipeline", "--vae")

    of_another_model = conversion_error(converter, *words, tmp_path / "other")
    nowhere = conversion_error(converter, *words, tmp_path / "nowhere")

    assert of_another_model.endswith("is not a VAE of SDXL: its scaling_factor is 0.18215, not 0.13025.")
    assert nowhere.startswith(f"--vae {tmp_path / 'nowhere'} cannot be loaded")


INCOMPLETE = "not a complete SDXL base model"


@pytest.mark.parametrize(
    ("tensor", "changed", "kind", "reason"),
    [
        (f"{UNET_PREFIX}middle_block.0.in_layers.2.bias", None, INCOMPLETE, "unet.mid_block.resnets.0.conv1.bias"),
        (f"{UNET_PREFIX}label_emb.0.2.bias", None, INCOMPLETE, "label_emb.0.2.bias"),
        ("first_stage_model.decoder.conv_in.bias", None, INCOMPLETE, "vae.decoder.conv_in.bias"),
        (f"{TEXT_PREFIX}final_layer_norm.bias", None, INCOMPLETE, "text_encoder.final_layer_norm.bias"),
        (f"{TEXT_2_PREFIX}text_projection", None, INCOMPLETE, "text_encoder_2.text_projection.weight"),
        # Other models: SDXL's refiner, SD 1.5, inpainting, Playground 2.5, CosXL.
        (f"{TEXT_2_PREFIX}ln_final.bias", None, "not an SDXL", f"it has no tensor {TEXT_2_PREFIX}ln_final.bias"),
        (f"{UNET_PREFIX}label_emb.0.0.bias", None, "not an SDXL", f"it has no tensor {UNET_PREFIX}label_emb"),
        (
            f"{UNET_PREFIX}input_blocks.0.0.weight",
            torch.zeros(32, 9, 3, 3),
            INCOMPLETE,
            "unet.conv_in.weight has the shape [32, 9, 3, 3], not [32, 4, 3, 3]",
        ),
        ("edm_mean", torch.zeros(4), "an EDM model", "EDM"),
        ("edm_vpred.sigma_max", torch.zeros(1), "an EDM model", "EDM"),
    ],
)
def test_incomplete_model_or_one_of_another_kind_is_refused(
    converter, change_checkpoint, world, tmp_path, tensor, changed, kind, reason
):
    path = change_checkpoint({tensor: changed})

    error = conversion_error(converter, "single_file", path, tmp_path / "model", "--config", world / "pipeline")

    assert error.startswith(f"{path} is {kind}")
    assert reason in error
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", ["text.safetensors", "nowhere.safetensors"])
def test_file_of_another_kind_is_refused(converter, tmp_path, name):
    (tmp_path / "text.safetensors").write_text("not tensors")

    error = conversion_error(converter, "single_file", tmp_path / name, tmp_path / "model")

    assert error.startswith(f"{tmp_path / name} cannot be read as a safetensors file")


def test_configs_come_from_the_hub(converter, monkeypatch, checkpoint, world, tmp_path):
    no_weights = shutil.ignore_patterns("*.safetensors")
    cache_repository(monkeypatch, tmp_path / "cache", converter.SDXL, world / "pipeline", no_weights)
    folder = tmp_path / "model"

    convert(converter, "single_file", checkpoint, folder)

    for file in WEIGHTS:
        assert_same_tensors(folder / file, world / "pipeline" / file)
    for path in folder.rglob("*.json"):
        assert str(tmp_path) not in path.read_text(), path


def test_offline_the_error_says_how_to_use_local_configs(checkpoint, tmp_path):
    finished = subprocess.run(
        [sys.executable, CONVERT, "single_file", checkpoint, tmp_path / "model"],
        env={**os.environ, "HF_HOME": str(tmp_path / "empty")},
        capture_output=True,
        text=True,
    )

    assert finished.returncode == 1
    last_line = finished.stderr.splitlines()[-1]
    assert last_line.startswith("error: SDXL's configs and tokenizers are needed once")
    assert "--config takes a local SDXL folder" in last_line
    assert "Traceback" not in finished.stderr


def test_config_without_configs_is_refused(converter, checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()

    error = conversion_error(converter, "single_file", checkpoint, tmp_path / "model", "--config", tmp_path / "empty")

    assert f"cannot be loaded from {tmp_path / 'empty'}" in error


def test_config_with_a_tokenizer_without_vocabulary_is_refused(converter, checkpoint, world, tmp_path):
    config = shutil.copytree(world / "pipeline", tmp_path / "config")
    remove_vocabulary(config / "tokenizer_2")

    error = conversion_error(converter, "single_file", checkpoint, tmp_path / "model", "--config", config)

    assert "--config takes a local SDXL folder: its tokenizer_2 has " in error


def test_only_needed_files_are_downloaded(converter, monkeypatch, checkpoint, tmp_path):
    configs = {"model_index.json", "tokenizer/merges.txt", "tokenizer_2/vocab.json", "unet/config.json"}
    unet = {UNET, "unet/diffusion_pytorch_model-00001-of-00002.safetensors"}
    others = {"sd_xl_base_1.0.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors", "unet/model.onnx", VAE}
    files = [*configs, *unet, *others]
    downloaded = []

    def snapshot_download(name, allow_patterns):
        downloaded.append(set(filter_repo_objects(files, allow_patterns=allow_patterns)))
        raise OSError("not today")

    monkeypatch.setattr(converter, "snapshot_download", snapshot_download)
    conversion_error(converter, "single_file", checkpoint, tmp_path / "model")
    conversion_error(converter, "extract_lora", "some/base", "some/unet", tmp_path / "lora")

    assert downloaded == [configs, unet]


# Output folders -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["folder", "file", "current folder"])
def test_existing_output_is_refused_and_kept(converter, tmp_path, monkeypatch, kind):
    path = tmp_path / "out" / "notes.txt"
    path.parent.mkdir()
    path.write_text("kept")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    folder = {"folder": path.parent, "file": path, "current folder": "."}[kind]

    error = conversion_error(converter, "single_file", "model.safetensors", folder)

    assert error.startswith(f"{folder} exists already")
    assert path.read_text() == "kept"


def test_interrupted_write_leaves_nothing(converter, monkeypatch, checkpoint, world, tmp_path):
    # The VAE and the text encoders are written before it.
    monkeypatch.setattr(UNet2DConditionModel, "save_pretrained", raise_interrupt)

    with pytest.raises(KeyboardInterrupt):
        convert(converter, "single_file", checkpoint, tmp_path / "new" / "model", "--config", world / "pipeline")

    assert list((tmp_path / "new").iterdir()) == []


def test_rejects_unwritable_output_folder_before_anything_is_read(converter, tmp_path):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "model"

    error = conversion_error(converter, "single_file", tmp_path / "nowhere", folder)

    assert error.startswith(f"{folder} cannot be written")


# LoRA extraction ----------------------------------------------------------------------------------------------------
def load_unet(folder):
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet")


def is_adapted(name):
    """Whether a LoRA has a layer for a weight."""
    return name.endswith(tuple(f".{layer}.weight" for layer in UNET_LAYERS))


def save_changed_unet(world, folder, dtype=torch.float32, only_adapted=False):
    """Write to `folder / "unet"` the small world's UNet with random changes."""
    unet = load_unet(world / "pipeline")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if is_adapted(name) or not only_adapted:
                weight += 0.02 * torch.randn(weight.shape, generator=generator)
    unet.to(dtype).save_pretrained(folder / "unet")
    return folder


def generate(pipeline):
    return sample(pipeline, "a red circle", seed=0, output_type="pt")


@pytest.fixture(params=["run", "bfloat16"])
def trained_folder(request, world, tmp_path):
    """A fully fine-tuned UNet: from a run, and in bfloat16."""
    if request.param == "bfloat16":
        return save_changed_unet(world, tmp_path / "trained", torch.bfloat16)
    script = request.getfixturevalue("script")
    flags = request.getfixturevalue("flags")
    return run(script, {**flags, "rank": None, "max_train_steps": 2})


def changes_of(world, trained_folder):
    """{name: change of a weight} as matrices. Rounding the base model to bfloat16 is not a change."""
    base = load_unet(world / "pipeline").state_dict()
    changes = {}
    for name, weight in load_file(trained_folder / UNET).items():
        change = weight.double() - base[name].to(weight.dtype).double()
        changes[name] = change.reshape(len(change), -1).numpy()
    return changes


def products_of(folder):
    """{name: change of a weight} that a LoRA makes, as matrices."""
    lora = load_file(folder / LORA)
    products = {}
    for name, up in lora.items():
        if name.endswith(".lora_B.weight"):
            layer = name.removesuffix(".lora_B.weight")
            down = lora[f"{layer}.lora_A.weight"]
            product = up.flatten(1).double() @ down.flatten(1).double()
            products[f"{layer.removeprefix('unet.')}.weight"] = product.numpy()
    return products


@pytest.mark.parametrize("rank", [2, 288])
def test_extracted_lora_is_the_best_of_its_rank(converter, world, tmp_path, trained_folder, capsys, rank):
    """The error of a layer is that of its truncated SVD. The share of all changes that is kept is printed."""
    convert(converter, "extract_lora", world / "pipeline", trained_folder, "--rank", rank, tmp_path / "lora")

    changes = changes_of(world, trained_folder)
    products = products_of(tmp_path / "lora")
    assert products.keys() == {name for name in changes if is_adapted(name)}
    for name, product in products.items():
        change = changes[name]
        left_out = np.linalg.svd(change, compute_uv=False)[rank:]
        error = np.linalg.norm(change - product)
        bound = 1e-5 * np.linalg.norm(change)
        assert error == pytest.approx(np.linalg.norm(left_out), rel=1e-3, abs=bound), name

    squared_change = sum((change**2).sum() for change in changes.values())
    squared_error = sum(((changes[name] - products.get(name, 0)) ** 2).sum() for name in changes)
    share = 1 - squared_error / squared_change
    assert f"The LoRA of rank {rank} keeps {share:.1%} of the squared change" in capsys.readouterr().out


def test_full_rank_lora_generates_the_images_of_the_trained_unet(converter, world, tmp_path):
    """Norms, biases, and the first and last layers are not changed here, because a LoRA does not contain them."""
    trained_folder = save_changed_unet(world, tmp_path / "trained", only_adapted=True)

    convert(converter, "extract_lora", world / "pipeline", trained_folder, "--rank", 288, tmp_path / "lora")

    base = generate(load_pipeline(world / "pipeline"))
    expected = generate(load_pipeline(world / "pipeline", unet=load_unet(trained_folder)))
    images = {}
    for name in (LORA, KOHYA):
        pipeline = load_pipeline(world / "pipeline")
        pipeline.load_lora_weights(tmp_path / "lora", weight_name=name)
        images[name] = generate(pipeline)
    assert (images[LORA] - expected).abs().max() < 1e-4
    assert (base - expected).abs().max() > 1e-2
    assert torch.equal(images[KOHYA], images[LORA])


def test_adapter_metadata_says_rank_and_alpha(converter, world, tmp_path):
    trained_folder = save_changed_unet(world, tmp_path / "trained")

    convert(converter, "extract_lora", world / "pipeline", trained_folder, tmp_path / "lora")

    with safe_open(tmp_path / "lora" / LORA, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (metadata["unet.r"], metadata["unet.lora_alpha"]) == (64, 64)


@pytest.mark.parametrize("source", ["folder of a UNet", "shards", "hub"])
def test_unet_may_be_a_folder_or_shards_or_on_the_hub(converter, monkeypatch, world, tmp_path, source):
    trained_folder = save_changed_unet(world, tmp_path / "trained")
    convert(converter, "extract_lora", world / "pipeline", trained_folder, "--rank", 4, tmp_path / "expected")
    name = trained_folder
    if source == "folder of a UNet":
        name = trained_folder / "unet"
    elif source == "shards":
        name = tmp_path / "shards"
        load_unet(trained_folder).save_pretrained(name / "unet", max_shard_size="200KB")
        assert not (name / UNET).exists()
    elif source == "hub":
        name = "someone/trained"
        cache_repository(monkeypatch, tmp_path / "cache", name, trained_folder)

    convert(converter, "extract_lora", world / "pipeline", name, "--rank", 4, tmp_path / "lora")

    assert_same_tensors(tmp_path / "lora" / LORA, tmp_path / "expected" / LORA)


@pytest.mark.parametrize("difference", ["shapes", "missing tensor"])
def test_unet_of_another_kind_is_refused(converter, world, tmp_path, difference):
    folder = tmp_path / "other"
    if difference == "shapes":
        build_unet(cross_attention_dim=32, pooled_dim=64).save_pretrained(folder)
    else:
        shutil.copytree(world / "pipeline" / "unet", folder)
        remove_weight(folder)

    error = conversion_error(converter, "extract_lora", world / "pipeline", folder, tmp_path / "lora")

    assert error.startswith(f"{folder} was not trained from {world / 'pipeline'}")


def test_extraction_requires_peft(converter, monkeypatch, capsys):
    monkeypatch.setattr(converter.importlib.util, "find_spec", lambda name: None)

    with pytest.raises(SystemExit):
        converter.parse_args(["extract_lora", "base", "unet", "folder"])

    assert "extract_lora requires peft: pip install peft" in capsys.readouterr().err


def test_unchanged_unet_is_refused(converter, world, tmp_path):
    """Rounding it to bfloat16 is not a change."""
    load_unet(world / "pipeline").to(torch.bfloat16).save_pretrained(tmp_path / "unet")

    error = conversion_error(converter, "extract_lora", world / "pipeline", tmp_path / "unet", tmp_path / "lora")

    assert error.endswith("nothing was changed.")


def test_nan_in_a_unet_is_refused(converter, world, tmp_path):
    folder = shutil.copytree(world / "pipeline" / "unet", tmp_path / "unet")
    set_to_nan(folder, "conv1.weight")

    error = conversion_error(converter, "extract_lora", world / "pipeline", folder, tmp_path / "lora")

    assert error.startswith(f"{folder} or {world / 'pipeline'} contains NaN or inf in ")
    assert error.endswith("conv1.weight.")


def test_folders_without_a_unet_are_refused(converter, world, tmp_path):
    (tmp_path / "empty").mkdir()

    empty = conversion_error(converter, "extract_lora", tmp_path / "empty", world / "pipeline", tmp_path / "lora")
    nowhere = conversion_error(converter, "extract_lora", world / "pipeline", tmp_path / "nowhere", tmp_path / "lora")

    assert empty.startswith(f"{tmp_path / 'empty'} has no UNet")
    assert nowhere.startswith(f"{tmp_path / 'nowhere'} cannot be loaded")


# Arguments ----------------------------------------------------------------------------------------------------------
def test_home_is_expanded_in_paths(converter, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")

    single_file = converter.parse_args("single_file ~/file ~/folder --vae ~/vae --config ~/config".split())
    extract_lora = converter.parse_args("extract_lora ~/base ~/unet ~/folder".split())

    for name in ("file", "folder", "vae", "config"):
        assert getattr(single_file, name) == f"/home/me/{name}"
    for name in ("base", "unet", "folder"):
        assert getattr(extract_lora, name) == f"/home/me/{name}"


@pytest.mark.parametrize("rank", ["0", "1.5"])
def test_rank_is_a_positive_number(converter, capsys, rank):
    with pytest.raises(SystemExit):
        convert(converter, "extract_lora", "base", "unet", f"--rank={rank}", "lora")

    assert "is not a positive whole number" in capsys.readouterr().err
