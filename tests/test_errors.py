"""Wrong columns, files, models and folders: an error of one line before any weight is loaded, and warnings."""

import json
import logging
import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import command_line, run
from runs import train_error
from safetensors.torch import load_file, save_file
from small_pairs import MAP_AND_STREAM


COLUMNS = {"caption": ["a", "b"], "jpg_0": [b"", b""], "jpg_1": [b"", b""], "label_0": [0, 1], "label_1": [1, 0]}
ORDERED = {"chosen_column": "jpg_0", "rejected_column": "jpg_1"}

UNET = "unet/config.json"
VAE = "vae/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
MISSING = "missing"


@pytest.fixture
def no_weights(script, monkeypatch):
    """From now on, loading weights is an error."""

    def refuse(*args, **kwargs):
        raise AssertionError("weights were about to be loaded")

    for component in (script.StableDiffusionXLPipeline, script.AutoencoderKL, script.UNet2DConditionModel):
        monkeypatch.setattr(component, "from_pretrained", refuse)


def write_table(folder, columns):
    folder.mkdir()
    pq.write_table(pa.table(columns), folder / "train.parquet")
    return folder


def copy_configs(folder, copy):
    """Copy a model's folder without its weights."""
    return shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors"))


def change_config(path, fields):
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in config.items() if value != MISSING}))


@pytest.fixture
def other_model(flags, world, tmp_path, no_weights):
    """Folder of the configs of the base model that the flags name."""
    flags["pretrained_model_name_or_path"] = copy_configs(world / "pipeline", tmp_path / "other")
    return tmp_path / "other"


# Pairs --------------------------------------------------------------------------------------------------------------
@MAP_AND_STREAM
@pytest.mark.parametrize(
    ("flag", "wrong_type", "reason"),
    [
        ("caption_column", "jpg_0", "cannot be read as text"),
        ("image_0_column", "label_0", "image"),
        ("image_1_column", "label_1", "image"),
        ("label_0_column", "caption", "must contain numbers"),
        ("label_1_column", "jpg_0", "must contain numbers"),
        ("rejected_column", "label_1", "image"),
    ],
)
def test_missing_column_or_column_of_the_wrong_type(script, flags, no_weights, streaming, flag, wrong_type, reason):
    flags["streaming"] = streaming
    if flag in ORDERED:
        flags.update(ORDERED)

    missing = train_error(script, {**flags, flag: "nothing"})
    mistyped = train_error(script, {**flags, flag: wrong_type})

    assert missing.startswith(f"--{flag}: ")
    assert "no column 'nothing' (columns: ['caption', 'jpg_0'" in missing
    assert reason in mistyped


@MAP_AND_STREAM
def test_nested_labels(script, flags, no_weights, tmp_path, streaming):
    folder = write_table(tmp_path / "pairs", {**COLUMNS, "label_0": [[1], [0]]})

    error = train_error(script, {**flags, "dataset_name": folder, "streaming": streaming})

    assert "must contain numbers" in error


@MAP_AND_STREAM
@pytest.mark.parametrize("kind", ["ties", "no rows", "no files"])
def test_dataset_without_pairs(script, flags, no_weights, tmp_path, streaming, kind):
    folder = tmp_path / "pairs"
    if kind == "ties":
        write_table(folder, {**COLUMNS, "label_1": [0, 1]})
    elif kind == "no rows":
        table = pa.table(COLUMNS).slice(0, 0)
        write_table(folder, {name: table[name] for name in COLUMNS})
    else:
        folder.mkdir()

    error = train_error(script, {**flags, "dataset_name": folder, "streaming": streaming})

    assert error.startswith("--dataset_name")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"dataset_split_name": "nothing"}, ["--dataset_split_name", "'nothing'", "train"]),
        ({"validation_split": "nothing"}, ["--validation_split", "'nothing'", "train"]),
        ({"dataset_name": "/no/such/folder"}, ["--dataset_name /no/such/folder"]),
        ({"dataset_name": "no/such"}, ["--dataset_name no/such"]),
        ({"dataset_config_name": "nothing"}, ["--dataset_name"]),
        ({"num_validation_pairs": 48}, ["--dataset_name", "48 held out"]),
        # accelerate would neither cast nor scale the loss on a CPU.
        ({"mixed_precision": "fp16"}, ["--mixed_precision fp16"]),
        ({"push_to_hub": True, "hub_token": "hf_secret"}, ["--push_to_hub", "offline"]),
        ({"push_to_hub": True, "hub_model_id": "one/two/three"}, ["--push_to_hub", "one/two/three"]),
        ({"resume_from_checkpoint": "checkpoint-9"}, ["--resume_from_checkpoint checkpoint-9", "not a complete"]),
        ({"resume_from_checkpoint": "/tmp"}, ["--resume_from_checkpoint /tmp: /tmp is not a complete checkpoint"]),
    ],
    ids=str,
)
def test_error_names_the_flag_and_its_value(script, flags, no_weights, changes, parts):
    error = train_error(script, {**flags, **changes})

    for part in parts:
        assert part in error
    assert "secret" not in error


def test_apple_gpus_are_refused(script, flags, no_weights, monkeypatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "mps")

    error = train_error(script, flags)

    assert re.search("Apple .*float64.*cpu.yaml", error)


# Folders ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("flag", "below"), [("output_dir", ""), ("cache_dir", "below")])
def test_rejects_unwritable_folders(script, flags, no_weights, tmp_path, flag, below):
    (tmp_path / "file").write_text("kept")

    error = train_error(script, {**flags, flag: tmp_path / "file" / below})

    if flag == "output_dir":
        assert error.startswith("--output_dir")
    assert str(tmp_path / "file") in error
    assert (tmp_path / "file").read_text() == "kept"


def test_checkpoint_with_other_settings(script, flags, loaded):
    flags.update(max_train_steps=1, resume_from_checkpoint="latest")
    run(script, flags)

    for name, value, saved in [
        ("rank", 8, 4),
        ("rank", None, 4),
        ("seed", 1, 0),
        ("use_8bit_adam", True, False),
        ("streaming", True, False),
        ("shuffle_shards", 2, 4),
        ("lora_alpha", 2.0, 4),
        ("train_text_encoder", True, False),
        ("mixed_precision", "bf16", "no"),
    ]:
        error = train_error(script, {**flags, name: value})
        assert error.startswith("--resume_from_checkpoint")
        assert f"{name} is {value}, but {saved} in " in error
    assert len(loaded) == 1  # no more weights were loaded


# Models -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flag", ["pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"])
@pytest.mark.parametrize("model", ["/no/such/folder", "no/such", "empty"])
def test_missing_model(script, flags, no_weights, tmp_path, monkeypatch, flag, model):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()

    error = train_error(script, {**flags, flag: model})

    assert f"--{flag} {model} cannot be loaded" in error


@pytest.mark.parametrize(
    ("file", "fields", "reason"),
    [
        (UNET, {"addition_embed_type": None}, "UNet"),
        (UNET, {"in_channels": 9}, "UNet"),
        (UNET, {"out_channels": 8}, "UNet"),
        (VAE, {"latent_channels": 16}, "UNet"),
        (UNET, {"cross_attention_dim": 2048}, "text encoders"),
        (SCHEDULER, {"_class_name": "EDMEulerScheduler", "beta_start": MISSING, "sigma_data": 0.5}, "EDM"),
        (SCHEDULER, {"timestep_type": "continuous", "prediction_type": "v_prediction"}, "EDM"),
        (SCHEDULER, {"use_flow_sigmas": True}, "flow"),
        (SCHEDULER, {"prediction_type": "sample"}, "neither epsilon nor v_prediction"),
    ],
    ids=str,
)
def test_base_model_of_another_kind(script, flags, other_model, file, fields, reason):
    change_config(other_model / file, fields)

    error = train_error(script, flags)

    start, _, explanation = error.partition(": ")
    assert start == f"--pretrained_model_name_or_path {other_model} is not an SDXL base model"
    assert reason in explanation


@pytest.mark.parametrize("component", ["unet", "text_encoder", "text_encoder_2", "tokenizer"])
def test_base_model_without_a_component(script, flags, other_model, component):
    """Like SD 3, SDXL's refiner, SD 1.5, and an incomplete download."""
    shutil.rmtree(other_model / component)

    error = train_error(script, flags)

    assert error.startswith(f"--pretrained_model_name_or_path {other_model}")
    assert component in error or "config.json" in error


def test_tokenizer_without_its_vocabulary(script, flags, other_model):
    """transformers would turn all captions into the same tokens."""
    for path in (other_model / "tokenizer_2").iterdir():
        if path.name not in ("tokenizer_config.json", "special_tokens_map.json"):
            path.unlink()

    error = train_error(script, flags)

    assert error.startswith(f"--pretrained_model_name_or_path {other_model}: tokenizer_2 has ")


@pytest.mark.parametrize("fields", [{"scaling_factor": 0.18215}, {"latent_channels": 16}], ids=str)
def test_vae_with_other_latents(script, flags, world, no_weights, tmp_path, fields):
    folder = copy_configs(world / "pipeline" / "vae", tmp_path / "vae")
    change_config(folder / "config.json", fields)

    error = train_error(script, {**flags, "pretrained_vae_model_name_or_path": folder})

    (field,) = fields
    assert error.startswith(f"--pretrained_vae_model_name_or_path {folder}: its {field} is not that of")
    assert "latents" in error


def test_vae_may_leave_defaults_out_of_its_config(script, flags, world, tmp_path):
    folder = copy_configs(world / "pipeline" / "vae", tmp_path / "vae")
    change_config(folder / "config.json", {"latent_channels": MISSING})
    flags["pretrained_vae_model_name_or_path"] = folder

    args = script.parse_args(command_line(flags))
    (channels, _, _), _ = script.load_configs(args, script.find_models(args, None))

    assert channels == 4


def test_a_long_error_keeps_its_beginning_and_its_end(script):
    error = OSError(f"Max retries exceeded with url: {600 * 'x'} (Caused by a timeout)")

    sentence = script.describe(error)

    assert sentence.startswith("OSError: Max retries exceeded with url: xxx")
    assert sentence.endswith("xxx (Caused by a timeout)")
    assert len(sentence) < 650


def test_error_of_a_loader_worker_is_described_like_any_other(script):
    class BrokenPairs(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, number):
            try:
                raise ValueError("a cause")
            except ValueError as error:
                raise OSError("503 Server Error for url\n\nInternal Error, we are working on it") from error

    with pytest.raises(OSError) as error:
        next(iter(torch.utils.data.DataLoader(BrokenPairs(), num_workers=1)))

    assert "Original Traceback" in str(error.value)
    assert script.describe(error.value) == "OSError: 503 Server Error for url Internal Error, we are working on it"


@pytest.mark.parametrize("component", ["vae", "unet"])
def test_truncated_weights(script, flags, world, tmp_path, component):
    folder = shutil.copytree(world / "pipeline", tmp_path / "model")
    (weights,) = (folder / component).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])

    error = train_error(script, {**flags, "pretrained_model_name_or_path": folder})

    assert f"--pretrained_model_name_or_path {folder} cannot be" in error


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_incomplete_weights(script, flags, world, tmp_path, component):
    """Libraries would initialize the missing ones randomly."""
    folder = shutil.copytree(world / "pipeline", tmp_path / "model")
    (file,) = (folder / component).glob("*.safetensors")
    weights = load_file(file)
    missing = max(weights)
    del weights[missing]
    save_file(weights, file, {"format": "pt"})

    error = train_error(script, {**flags, "pretrained_model_name_or_path": folder})

    assert error.startswith(f"--pretrained_model_name_or_path {folder} cannot be loaded: its ")
    # transformers 5 has dropped this prefix.
    assert f"lacks 1 of its weights, e.g. {missing}".replace("text_model.", "") in error.replace("text_model.", "")


# Warnings -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def warnings(script, flags, monkeypatch, caplog):
    """Returns the warnings of a run with some flags, up to the loading of weights."""

    def stop(*_):
        raise script.TrainingError("stopped here")

    def warnings(**changes):
        caplog.clear()
        assert train_error(script, {**flags, **changes}) == "stopped here"
        return [record.message for record in caplog.records if record.levelno == logging.WARNING]

    monkeypatch.setattr(script, "load_pipeline", stop)
    return warnings


def test_warns_if_warmup_is_longer_than_training(warnings):
    (warning,) = warnings(lr_scheduler="cosine", max_train_steps=50, lr_warmup_steps=200)

    for part in ("--lr_warmup_steps 200", "50 steps", "25%"):
        assert part in warning
    assert warnings(lr_scheduler="cosine", max_train_steps=200, lr_warmup_steps=200) == []
    assert warnings(lr_scheduler="constant", max_train_steps=50, lr_warmup_steps=500) == []


def test_warns_if_beta_is_meant_for_the_other_loss(warnings):
    (warning,) = warnings(beta_mapo=0.1)

    assert "--beta_mapo 0.1" in warning
    assert "mapo_v1" in warning
    assert warnings(beta_mapo=0.1, loss_type="mapo_v1") == []
    assert warnings(beta_mapo=1) == []


def test_only_the_scripts_own_logger_is_at_info(script, flags, monkeypatch, request):
    """httpx would report each request to the hub."""
    level = logging.root.level
    request.addfinalizer(lambda: logging.root.setLevel(level))
    monkeypatch.setattr(logging.root, "handlers", [])  # basicConfig does nothing if pytest's handlers are there

    train_error(script, {**flags, "caption_column": "nothing"})

    assert logging.getLogger(script.__name__).getEffectiveLevel() == logging.INFO
    assert logging.getLogger("httpx").getEffectiveLevel() == logging.WARNING
    assert logging.getLogger("httpx2").getEffectiveLevel() == logging.WARNING
