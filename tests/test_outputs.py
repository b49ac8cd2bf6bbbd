"""Validation, trackers, and what a run leaves behind."""

import re
import shutil
import struct
import time

import numpy as np
import pytest
import torch
import yaml
from conftest import launch, run, scalars
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from small_world import draw_pairs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_training import assert_equal, curves, trained
from wandb.proto.wandb_internal_pb2 import Record


PROMPTS = ["a red circle", "an orange star, drawn by hand"]
EVAL_NAMES = {"eval_loss", "eval_chosen_mse", "eval_rejected_mse", "eval_margin", "eval_accuracy"}
TOKEN = "hf_ThisIsNoRealTokenButItMustStaySecret"
DRAWN = {
    "run_validation": True,
    "validation_steps": 2,
    "validation_prompts": PROMPTS,
    "num_inference_steps": 3,
    "guidance_scale": 4.0,
}


def draw(pipeline):
    """What the script's validation shows, by a plain diffusers pipeline."""
    pipeline.set_progress_bar_config(disable=True)
    return [
        pipeline(
            prompt,
            height=64,
            width=64,
            num_inference_steps=3,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(index),
        ).images[0]
        for index, prompt in enumerate(PROMPTS)
    ]


def load_aligned(world, out, rank):
    """The pipeline of the model card's snippet."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(world / "pipeline")
    if rank is None:
        pipeline.unet = UNet2DConditionModel.from_pretrained(out, subfolder="unet")
    else:
        pipeline.load_lora_weights(out)
    return pipeline


def cells(grid, rows):
    """A grid's labels, and its images by (column, row): 64 pixels wide, shown at twice that."""
    line = (grid.height - rows * 128) // (rows + 1)
    assert grid.size == (2 * 128, line + rows * (128 + line)) and 10 <= line <= 40
    labels = [grid.crop((0, row * (128 + line), 256, row * (128 + line) + line)) for row in range(rows + 1)]
    labels[1:] = [grid.crop((0, line + row * (128 + line), 256, 2 * line + row * (128 + line))) for row in range(rows)]
    images = {}
    for row in range(rows):
        top = 2 * line + row * (128 + line)
        for column in range(2):
            shown = grid.crop((column * 128, top, (column + 1) * 128, top + 128))
            images[column, row] = shown.resize((64, 64), Image.Resampling.NEAREST)
            assert images[column, row].resize((128, 128), Image.Resampling.NEAREST).tobytes() == shown.tobytes()
    return labels, images


def greatest_difference(image, other):
    return np.abs(np.asarray(image, dtype=int) - np.asarray(other, dtype=int)).max()


def wandb_records(path):
    """What wandb wrote in offline mode: LevelDB's log format behind a header of seven bytes."""
    data, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        room = 32768 - position % 32768
        if room < 7:
            position += room
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


def finished_wandb_records(folder):
    """wandb's service is a process of its own and may write its last records after the run has ended."""
    (file,) = folder.rglob("*.wandb")
    for _ in range(300):
        records = list(wandb_records(file))
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            break
        time.sleep(0.1)
    return records


def holds(folder, text):
    """Files under `folder` with `text` in them."""
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


# Validation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"rank": 4}, {"rank": None}, {"rank": 4, "streaming": True}], ids=str)
def test_validation_leaves_training_bit_identical(script, flags, tmp_path, changes):
    """At seed 0, with all validation at every step and with none but that of the end."""
    flags.update(changes, num_validation_pairs=6, label_noise_prob=0.3, random_crop=True)
    often = run(script, {**flags, **DRAWN, "validation_steps": 1})
    never = run(script, {**flags, "output_dir": tmp_path / "never"})
    assert_equal(trained(often), trained(never))
    logged, expected = curves(often), curves(never)
    for name in ("loss", "margin", "grad_norm", "lr"):
        assert logged[name] == expected[name], name
    assert list(logged["eval_loss"]) == [0, 1, 2, 3, 4]
    assert list(expected["eval_loss"]) == [0, 4]
    assert [logged["eval_loss"][step] for step in (0, 4)] == list(expected["eval_loss"].values())


def test_eval_metrics_depend_on_the_weights_alone(script, flags, tmp_path):
    """Before training and at weights that do not move they are one and the same, wherever training is."""
    flags.update(num_validation_pairs=7, validation_steps=2, max_train_steps=6)
    out = run(script, flags)
    still = run(script, {**flags, "output_dir": tmp_path / "still", "learning_rate": 1e-30, "train_batch_size": 4})
    logged, frozen = scalars(out), scalars(still)
    assert {name for name in logged if name.startswith("eval_")} == EVAL_NAMES
    for name in EVAL_NAMES:
        assert list(logged[name]) == [0, 2, 4, 6]
        assert set(frozen[name].values()) == {logged[name][0]}, name
    assert len(set(logged["eval_loss"].values())) == 4
    cut = {**flags, "output_dir": tmp_path / "cut", "train_batch_size": 2, "max_train_steps": 1, "random_crop": True}
    regrouped = scalars(run(script, cut))
    for name in EVAL_NAMES:
        assert regrouped[name][0] == pytest.approx(logged[name][0], rel=1e-5, abs=1e-7), name


def test_held_out_pairs_are_not_trained_on(script, flags, tmp_path):
    """All but 4 of 48 are held out: training on the others alone gives the same weights."""
    flags.update(num_validation_pairs=44, max_train_steps=2)
    table = script.datasets.load_dataset(str(flags["dataset_name"]), split="train", cache_dir=str(tmp_path / "cache"))
    visited = []
    items = script.PairDataset.__getitem__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            script.PairDataset, "__getitem__", lambda self, visit: visited.append(visit) or items(self, visit)
        )
        run(script, flags)
    assert {visit.row for visit in visited if not visit.held_out} == set(range(44, len(table)))
    assert [visit.row for visit in visited if visit.held_out] == 2 * list(range(44))


@pytest.fixture(scope="module")
def two_splits(tmp_path_factory):
    """A data set with a second split, of twenty other pairs."""
    folder = tmp_path_factory.mktemp("splits")
    draw_pairs(folder / "pairs")
    draw_pairs(folder / "other", num_pairs=20, seed=5, num_shards=1)
    (part,) = (folder / "other" / "data").iterdir()
    shutil.move(part, folder / "pairs" / "data" / "validation-00000-of-00001.parquet")
    return folder / "pairs"


def test_validation_split_is_used_and_all_of_the_other_trained_on(script, flags, two_splits, tmp_path):
    flags.update(dataset_name=two_splits, validation_split="validation", max_train_steps=2)
    whole = scalars(run(script, flags))
    first = {**flags, "output_dir": tmp_path / "first", "num_validation_pairs": 8}
    first_eight = scalars(run(script, first))
    streamed = scalars(run(script, {**first, "output_dir": tmp_path / "streamed", "streaming": True}))
    plain = scalars(run(script, {**flags, "output_dir": tmp_path / "plain", "validation_split": None}))
    assert whole["loss"] == first_eight["loss"] == plain["loss"]
    assert list(whole["eval_loss"]) == [0, 2] and "eval_loss" not in plain
    assert whole["eval_loss"][0] != first_eight["eval_loss"][0]
    for name in EVAL_NAMES:
        assert first_eight[name][0] == streamed[name][0], name


# Images -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [4, None])
def test_grid_shows_what_plain_pipelines_draw(script, flags, world, rank):
    """Left the base model's images, right those of the saved weights, both at the same seeds."""
    flags.update(DRAWN, rank=rank, learning_rate=0.02 if rank else 1e-3)
    out = run(script, flags)
    assert sorted(path.name for path in (out / "validation").iterdir()) == ["step-000002.png", "step-000004.png"]
    base = draw(StableDiffusionXLPipeline.from_pretrained(world / "pipeline"))
    aligned = draw(load_aligned(world, out, rank))
    for name in ("step-000002.png", "step-000004.png"):
        labels, images = cells(Image.open(out / "validation" / name), len(PROMPTS))
        assert all(np.asarray(label).min() < 100 and np.asarray(label).max() == 255 for label in labels)
        assert labels[1].tobytes() != labels[2].tobytes()
        for row in range(len(PROMPTS)):
            assert greatest_difference(images[0, row], base[row]) <= 1
            off = greatest_difference(images[1, row], aligned[row])
            assert off <= 1 if name == "step-000004.png" else off > 1
            assert greatest_difference(base[row], aligned[row]) > 3


def test_built_in_prompts_are_drawn_when_none_is_given(script, flags):
    flags.update(DRAWN, validation_prompts=None, num_inference_steps=1, max_train_steps=1)
    grid = Image.open(run(script, flags) / "validation" / "step-000001.png")
    _, images = cells(grid, 4)
    assert len({image.tobytes() for image in images.values()}) > 3


# Trackers -----------------------------------------------------------------------------------------------------------


def test_tensorboard_gets_scalars_images_and_settings_but_no_token(script, flags):
    flags.update(DRAWN, num_validation_pairs=4, hub_token=TOKEN)
    out = run(script, flags)
    logged = scalars(out)
    for name in ("loss", "chosen_mse", "rejected_mse", "margin", "accuracy"):
        assert list(logged[name]) == [1, 2, 3, 4], name
        assert list(logged[f"eval_{name}"]) == [0, 2, 4], name
    for name in ("lr", "grad_norm"):
        assert list(logged[name]) == [1, 2, 3, 4], name
    (events,) = [
        events
        for events in (EventAccumulator(str(file)).Reload() for file in out.glob("logs/**/events*"))
        if events.Tags()["images"]
    ]
    shown = [image for name in events.Tags()["images"] for image in events.Images(name)]
    assert [image.step for image in shown] == [2, 4]
    assert (shown[0].width, shown[0].height) == Image.open(out / "validation" / "step-000002.png").size
    (settings,) = out.glob("logs/**/hparams.yml")
    settings = yaml.safe_load(settings.read_text())
    assert settings["beta_mapo"] == 8.0 and settings["learning_rate"] == 1e-3
    assert not holds(out, TOKEN)


def test_logs_are_means_over_the_steps_between_two(script, flags, tmp_path):
    """Also the last, shorter window is logged."""
    flags["max_train_steps"] = 5
    every = scalars(run(script, flags))
    rare = scalars(run(script, {**flags, "output_dir": tmp_path / "rare", "logging_steps": 2}))
    for name in ("loss", "accuracy", "margin"):
        steps = every[name]
        assert rare[name] == pytest.approx(
            {2: (steps[1] + steps[2]) / 2, 4: (steps[3] + steps[4]) / 2, 5: steps[5]}, rel=1e-5, abs=1e-9
        )


@pytest.mark.parametrize("what", ["pairs_per_second", "memory"])
def test_speed_and_memory_are_logged(script, flags, what):
    logged = scalars(run(script, flags))
    (name,) = [name for name in logged if what in name]
    assert list(logged[name]) == [1, 2, 3, 4]
    assert min(logged[name].values()) > 0


def test_wandb_gets_scalars_images_and_settings_but_no_token(script, flags, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    flags.update(DRAWN, num_validation_pairs=4, report_to="wandb", tracker_name="some-project")
    out = run(script, flags)
    rows, settings, project = [], {}, None
    for record in finished_wandb_records(out / "logs"):
        project = record.run.project or project
        rows.append({".".join(item.nested_key) or item.key: item.value_json for item in record.history.item})
        settings.update({item.key: item.value_json for item in (*record.run.config.update, *record.config.update)})
    names = {name for row in rows for name in row}
    assert {"loss", "accuracy", "lr", "grad_norm", *EVAL_NAMES} <= names
    assert len([row for row in rows if "loss" in row]) == 4
    assert settings["beta_mapo"] == "8.0" or settings["beta_mapo"] == "8"
    assert project == "some-project"
    assert len(list((out / "logs").rglob("media/images/validation*.png"))) == 2
    assert not list(out.rglob("events*"))
    assert not holds(out, TOKEN)


def test_all_trackers_and_none(script, flags, tmp_path):
    flags["max_train_steps"] = 1
    out = run(script, {**flags, "report_to": "all"})
    assert list(out.rglob("*.wandb")) and "loss" in scalars(out)
    assert_equal(trained(out), trained(run(script, {**flags, "output_dir": tmp_path / "n", "report_to": "none"})))
    assert not [path for path in (tmp_path / "n" / "logs").rglob("*") if path.is_file()]


# Results ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [4, None])
def test_model_card_tells_what_was_done(script, flags, world, rank):
    flags.update(DRAWN, rank=rank, num_validation_pairs=4, hub_token=TOKEN, loss_type="mapo_v1", beta_mapo=0.25)
    out = run(script, flags)
    _, head, text = (out / "README.md").read_text().split("---\n", 2)
    head = yaml.safe_load(head)
    assert head["base_model"] == str(world / "pipeline")
    assert {"mapo", "text-to-image", "lora" if rank else "unet"} <= set(head["tags"])
    assert "objective `mapo_v1` at beta 0.25" in text
    assert str(world / "pairs") in text
    for name in ("learning_rate", "seed", "train_batch_size", "max_train_steps", "resolution", "lr_scheduler"):
        assert f"`--{name}`: {flags.get(name, 'constant')}" in text
    for library in (torch, script.diffusers, script.transformers, script.accelerate, script.datasets):
        assert f"{library.__name__} {library.__version__}" in text
    for name, values in scalars(out).items():
        if name.startswith("eval_"):
            (written,) = re.findall(rf"{name}: (\S+)", text)
            assert float(written) == pytest.approx(values[4], rel=1e-3)
    (picture,) = re.findall(r"!\[.*\]\((.*)\)", text)
    assert (out / picture).is_file()
    assert "load_lora_weights" in text if rank else "UNet2DConditionModel.from_pretrained" in text
    assert TOKEN not in text


def test_failed_upload_loses_nothing(flags, tmp_path, monkeypatch):
    """No network here. From another working directory, with a relative output folder."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    flags.update(DRAWN, output_dir="results/mine", push_to_hub=True, hub_token=TOKEN, checkpointing_steps=4)
    done = launch(flags)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "elsewhere" / "results" / "mine"
    files = {str(path.relative_to(out)) for path in out.rglob("*")}
    assert {"README.md", "pytorch_lora_weights.safetensors", "validation/step-000004.png", "checkpoint-4"} <= files
    assert "--push_to_hub failed" in done.stderr and "hf upload mine results/mine" in done.stderr
    assert "Traceback" not in done.stderr
    assert not holds(tmp_path, TOKEN) and TOKEN not in done.stdout + done.stderr
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["results"]


@pytest.mark.parametrize(("model_id", "name"), [(None, "out"), ("someone/some-model", "someone/some-model")])
def test_upload_is_of_all_but_checkpoints_and_hidden_files(script, flags, monkeypatch, model_id, name):
    calls = []
    monkeypatch.setattr(
        script, "create_repo", lambda *args, **options: calls.append((args, options)) or FullName(name)
    )
    monkeypatch.setattr(script, "upload_folder", lambda **options: calls.append(options))
    flags.update(DRAWN, push_to_hub=True, hub_model_id=model_id, hub_token=TOKEN, checkpointing_steps=2)
    out = run(script, flags)
    (created, options), upload = calls
    assert created == (name,) and options == {"exist_ok": True, "token": TOKEN}
    assert upload["folder_path"] == out
    assert upload["repo_id"] == FullName(name).repo_id
    assert upload["commit_message"] == "End of training"
    assert upload["token"] == TOKEN
    (out / ".checkpoint-6.incomplete").mkdir()
    (out / ".checkpoint-6.incomplete" / "optimizer.bin").touch()
    files = [str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()]
    sent = set(filter_repo_objects(files, ignore_patterns=upload["ignore_patterns"]))
    assert {"README.md", "pytorch_lora_weights.safetensors", "validation/step-000004.png"} <= sent
    assert sent == {file for file in files if "checkpoint-" not in file}


class FullName:
    """What `create_repo` returns: the hub puts the user before a name without one."""

    def __init__(self, name):
        self.repo_id = name if "/" in name else f"me/{name}"


def test_logging_dir(script, flags):
    out = run(script, {**flags, "logging_dir": "runs"})
    assert list(out.glob("runs/mapo/events*")) and not (out / "logs").exists()
