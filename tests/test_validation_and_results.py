"""Validation, trackers, and the results that a run leaves behind."""

import itertools
import json
import re
import shutil
import struct
import time
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import wandb
import yaml
from accelerate.state import PartialState
from conftest import SCRIPT, also, command_line, run, scalars
from cpu_cluster import run_ranks
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors import safe_open
from small_world import build_pipeline, draw_pairs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_training import assert_equal, curves, trained
from wandb.proto.wandb_internal_pb2 import Record


PROMPTS = ["a red circle", "an orange star, drawn by hand", "a green square"]
METRICS = ("loss", "chosen_mse", "rejected_mse", "margin", "accuracy")
EVAL_METRICS = [f"eval_{name}" for name in METRICS]
TOKEN = "hf_ThisIsNoRealTokenButItMustStaySecret"
DRAWN = {"run_validation": True, "validation_steps": 2, "validation_prompts": PROMPTS}
DRAWN |= {"num_inference_steps": 3, "guidance_scale": 4.0}


def cells(path):
    """The images of a grid file, two a row."""
    grid = Image.open(path)
    assert grid.width == 2 * 64 and grid.height % 64 == 0
    corners = itertools.product(range(0, grid.height, 64), (0, 64))
    return [np.asarray(grid.crop((left, top, left + 64, top + 64)), dtype=int) for top, left in corners]


def greatest_difference(images, others):
    return max(np.abs(image - other).max() for image, other in zip(images, others, strict=True))


def files_with(text, folder):
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


# Validation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [also({"rank": 4}), {"rank": None, "streaming": True}], ids=str)
def test_validation_leaves_training_bit_identical(script, flags, tmp_path, changes):
    flags.update(changes, num_validation_pairs=6, label_noise_prob=0.3, random_crop=True)
    often = run(script, {**flags, **DRAWN, "validation_steps": 1})
    never = run(script, {**flags, "output_dir": tmp_path / "never"})
    assert_equal(trained(often), trained(never))
    logged, expected = curves(often), curves(never)
    assert list(logged["eval_loss"]) == [0, 1, 2, 3, 4] and list(expected["eval_loss"]) == [0, 4]
    for name, values in expected.items():
        assert {step: logged[name][step] for step in values} == values, name


def test_eval_metrics_depend_on_the_weights_alone(script, flags, tmp_path):
    """Weights that do not move have the same metrics at every step, under any seed and in any batches."""
    flags.update(num_validation_pairs=7, validation_steps=2)
    logged = scalars(run(script, flags))
    other = {"learning_rate": 1e-30, "seed": 1, "random_crop": True, "label_noise_prob": 0.5, "rank": None}
    frozen = scalars(run(script, {**flags, **other, "output_dir": tmp_path / "frozen"}))
    regrouped = scalars(run(script, {**flags, **other, "output_dir": tmp_path / "regrouped", "train_batch_size": 2}))
    names = [name for name in logged if name.startswith("eval_")]
    assert set(EVAL_METRICS) < set(names)
    for name in names:
        assert list(logged[name]) == [0, 2, 4] and set(frozen[name].values()) == {logged[name][0]}, name
        assert regrouped[name][0] == pytest.approx(logged[name][0], abs=1e-6), name
    assert len(set(logged["eval_loss"].values())) == 3


def test_two_processes_log_evaluate_and_draw_as_one(script, flags, tmp_path):
    """Seven held-out pairs and three prompts, which two processes cannot share evenly; three steps, logged by twos."""
    flags.update(DRAWN, num_validation_pairs=7, max_train_steps=3, validation_steps=3)
    one = run(script, flags)
    flags.update(output_dir=tmp_path / "two", train_batch_size=2, logging_steps=2)
    assert run_ranks([SCRIPT, *command_line(flags)])[0] == [0, 0]
    logged, expected = scalars(tmp_path / "two"), scalars(one)
    for name in [name for name in expected if name.startswith("eval_")]:
        assert logged[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
    for name in METRICS:
        first, second, third = expected[name].values()
        assert logged[name] == pytest.approx({2: (first + second) / 2, 3: third}, rel=1e-5, abs=1e-6), name
    assert logged["grad_norm"][2] == pytest.approx(expected["grad_norm"][2], rel=1e-4)
    grids = [cells(folder / "validation" / "step-000003.png") for folder in (one, tmp_path / "two")]
    assert len(grids[0]) == 2 * len(PROMPTS) and greatest_difference(*grids) <= 1


def test_bands_hold_the_pairs_of_their_timesteps(script, flags, monkeypatch):
    """Nine held-out pairs in batches of four, by their own metrics, which the script hands to its loop."""
    pairs, step = [], script.preference_loss

    def noting_step(run, batch):
        loss, metrics = step(run, batch)
        pairs.extend(zip(batch["row"], batch["timesteps"].tolist(), *metrics.tolist()))
        return loss, metrics

    monkeypatch.setattr(script, "preference_loss", noting_step)
    logged = scalars(run(script, flags | {"num_validation_pairs": 9, "max_train_steps": 1}))
    pairs = [pair[1:] for pair in pairs if pair[0].startswith("held-out")][:9]
    for first in (0, 250, 500, 750):
        band = [metrics for timestep, *metrics in pairs if first <= timestep < first + 250]
        for name in ("accuracy", "margin"):
            values = [metrics[METRICS.index(name)] for metrics in band]
            found = logged.get(f"eval_{name}_t{first}_{first + 249}", {}).get(0)
            assert found == (pytest.approx(sum(values) / len(values), rel=1e-6) if values else None), (name, first)
    assert len({timestep // 250 for timestep, *_ in pairs}) > 2


@pytest.mark.parametrize(
    ("name", "values", "warned"),
    [
        ("chosen_mse", (0.1, 0.1005), None),
        ("chosen_mse", (0.1, 0.09), None),
        ("chosen_mse", (0.1, 0.11), "eval_chosen_mse has risen (0.11 at step 8, 0.1 at step 0)"),
        ("chosen_mse", (0.1, float("nan")), "eval_chosen_mse has risen (nan at step 8"),
        ("rejected_mse", (0.1, 0.9), None),
        ("rejected_mse", (0.1, 1.3), "eval_rejected_mse is 1.3 at step 8"),
        ("rejected_mse", (1.4, 1.3), None),
    ],
)
def test_a_run_that_destroys_the_model_is_warned_of(script, caplog, name, values, warned):
    PartialState()
    evals = [{"step": step, "eval_chosen_mse": 0.1, "eval_rejected_mse": 0.1} for step in (0, 8)]
    for metrics, value in zip(evals, values):
        metrics[f"eval_{name}"] = value
    script.warn_if_diverging(*evals)
    assert len(caplog.records) == (warned is not None) and (warned or "") in caplog.text


def test_a_resumed_run_is_compared_with_the_first_validation_of_the_whole(script, flags, tmp_path, caplog):
    """At a learning rate that destroys the model: both say the same of steps 2 to 4."""
    flags.update(num_validation_pairs=6, validation_steps=1, checkpointing_steps=2, learning_rate=0.1, rank=None)
    whole = run(script, flags)
    warned = re.findall(r"eval_\w+ (?:has risen|is) .*", caplog.text)
    caplog.clear()

    other = {"resume_from_checkpoint": whole / "checkpoint-2", "output_dir": tmp_path / "resumed"}
    resumed = run(script, flags | other)

    assert any("eval_chosen_mse has risen" in warning and "at step 0)" in warning for warning in warned)
    later = [warning for warning in warned if not re.search(r" at step 1\b", warning)]
    assert re.findall(r"eval_\w+ (?:has risen|is) .*", caplog.text) == later
    states = [json.loads((folder / "checkpoint-4" / "mapo_state.json").read_text()) for folder in (whole, resumed)]
    assert states[0]["first_eval"] == states[1]["first_eval"]
    logged = {name: values[0] for name, values in scalars(whole).items() if name.startswith("eval_")}
    assert states[0]["first_eval"] == pytest.approx({"step": 0, **logged}, rel=1e-6)


def test_held_out_pairs_are_not_trained_on(script, flags, monkeypatch):
    flags.update(num_validation_pairs=44, max_train_steps=2)
    rows, step = [], script.preference_loss
    monkeypatch.setattr(script, "preference_loss", lambda run, batch: rows.extend(batch["row"]) or step(run, batch))
    run(script, flags)
    assert sorted(row for row in rows if row.startswith("row")) == sorted(2 * [f"row {n}" for n in (22, 23, 46, 47)])
    held_out = [*range(22), *range(24, 46)]  # each caption has two pairs
    assert [row for row in rows if not row.startswith("row")] == 2 * [f"held-out row {n}" for n in held_out]


def test_validation_split_is_held_out_and_all_other_pairs_are_trained_on(script, flags, tmp_path):
    draw_pairs(tmp_path / "pairs")
    draw_pairs(tmp_path / "other", num_pairs=20, seed=5, num_shards=1)
    (part,) = (tmp_path / "other" / "data").iterdir()
    table = pq.read_table(part)
    captions = pa.array([f"another {caption}" for caption in table["caption"].to_pylist()])
    table = table.set_column(0, "caption", captions)
    pq.write_table(table, tmp_path / "pairs" / "data" / "validation-00000-of-00001.parquet")
    flags.update(dataset_name=tmp_path / "pairs", cache_dir=tmp_path / "cache", max_train_steps=1)
    whole = {"validation_split": "validation"}
    eight = {**whole, "num_validation_pairs": 8}
    variants = {"plain": {}, "whole": whole, "eight": eight, "streamed": {**eight, "streaming": True}}
    logged = {n: scalars(run(script, {**flags, "output_dir": tmp_path / n, **v})) for n, v in variants.items()}
    assert logged["plain"]["loss"] == logged["whole"]["loss"] == logged["eight"]["loss"]
    assert "eval_loss" not in logged["plain"] and list(logged["whole"]["eval_loss"]) == [0, 1]
    assert logged["whole"]["eval_loss"][0] != logged["eight"]["eval_loss"][0]
    for name in EVAL_METRICS:
        assert logged["eight"][name][0] == logged["streamed"][name][0], name


# Results ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[4, None], ids=["LoRA", "UNet"])
def finished(request, script, world, tmp_path_factory):
    """A run with all results, of a LoRA or of the whole UNet with the built-in prompts; returns its flags."""
    rank = request.param
    out, learning_rate, prompts = tmp_path_factory.mktemp("out"), 0.02 if rank else 1e-3, PROMPTS if rank else None
    flags = {"pretrained_model_name_or_path": world / "pipeline", "dataset_name": world / "pairs", "output_dir": out}
    flags |= {"cache_dir": world / "cache", "resolution": 64, "rank": rank, "learning_rate": learning_rate, "seed": 0}
    flags |= {"max_train_steps": 4, "logging_steps": 1, "num_validation_pairs": 4, "loss_type": "mapo_v1"}
    flags |= {"beta_mapo": 0.25, "hub_token": TOKEN, **DRAWN, "validation_prompts": prompts}
    run(script, flags)
    return flags


def draw(pipeline, prompts):
    """The validation images of the script, by a plain diffusers pipeline."""
    pipeline.set_progress_bar_config(disable=True)
    options = {"height": 64, "width": 64, "num_inference_steps": 3, "guidance_scale": 4.0}
    generators = [torch.Generator().manual_seed(number) for number in range(len(prompts))]
    images = [pipeline(p, generator=g, **options).images[0] for p, g in zip(prompts, generators)]
    return [np.asarray(image, dtype=int) for image in images]


def test_grid_shows_images_of_plain_pipelines(script, finished):
    """Left the base model's images, right those of the saved weights, both at the same seeds."""
    out, prompts = finished["output_dir"], finished["validation_prompts"] or script.VALIDATION_PROMPTS
    pipeline = StableDiffusionXLPipeline.from_pretrained(finished["pretrained_model_name_or_path"])
    base = draw(pipeline, prompts)
    if finished["rank"] is None:
        pipeline.unet = UNet2DConditionModel.from_pretrained(out, subfolder="unet")
    else:
        pipeline.load_lora_weights(out)
    aligned = draw(pipeline, prompts)
    middle, end = (cells(path) for path in sorted((out / "validation").glob("step-*")))
    assert greatest_difference(middle[::2], base) <= 1 and greatest_difference(end[::2], base) <= 1
    assert greatest_difference(end[1::2], aligned) <= 1
    for images in (base, middle[1::2]):
        assert all(greatest_difference([image], [other]) > 3 for image, other in zip(images, aligned))


def test_tensorboard_gets_scalars_images_and_settings_but_no_token(finished):
    out = finished["output_dir"]
    logged = scalars(out)
    names = (*METRICS, "lr", "grad_norm", "skipped_steps", "pairs_per_second", "peak_memory_gib")
    assert {name: list(logged[name]) for name in names} == dict.fromkeys(names, [1, 2, 3, 4])
    evaluated = {name: list(logged[name]) for name in logged.keys() - names}
    assert evaluated == dict.fromkeys(evaluated, [0, 2, 4]) and set(EVAL_METRICS) < evaluated.keys()
    assert min(logged["pairs_per_second"].values()) > 0 and min(logged["peak_memory_gib"].values()) > 0
    all_events = [EventAccumulator(str(file)).Reload() for file in out.glob("logs/mapo/**/events*")]
    (events,) = [events for events in all_events if events.Tags()["images"]]
    shown, size = events.Images("validation"), Image.open(out / "validation" / "step-000004.png").size
    assert [(image.step, image.width, image.height) for image in shown] == [(step, *size) for step in (2, 4)]
    settings = yaml.safe_load(next(out.glob("logs/**/hparams.yml")).read_text())
    assert settings["beta_mapo"] == 0.25 and settings["dataset_name"] == "pairs"
    assert not files_with(TOKEN, out)


def card_details(out):
    return json.loads(re.search(r"```json\n(.*?)\n```", (out / "README.md").read_text(), re.DOTALL)[1])


def test_model_card_tells_what_was_done(script, finished):
    out, rank = finished["output_dir"], finished["rank"]
    _, head, text = (out / "README.md").read_text().split("---\n", 2)
    head = yaml.safe_load(head)
    details = card_details(out)
    assert {"mapo", "text-to-image", "lora" if rank else "unet"} <= set(head["tags"])
    assert "objective `mapo_v1` at beta 0.25" in text and "of `pipeline`" in text and "pairs of `pairs`" in text
    for name in ("learning_rate", "seed", "max_train_steps", "resolution", "lr_scheduler"):
        assert details["flags"][name] == finished.get(name, "constant")
    for library in (torch, script.diffusers, script.transformers, script.datasets):
        assert details["versions"][library.__name__] == library.__version__
    for name in EVAL_METRICS:
        assert details["metrics"][name] == pytest.approx(scalars(out)[name][4], rel=1e-6)
    assert (out / re.search(r"!\[.*\]\((.*)\)", text)[1]).is_file()
    assert ("load_lora_weights(" if rank else "unet = UNet2DConditionModel.from_pretrained(") in text


def published_files_with(text, out):
    return [path for path in files_with(text, out) if not path.relative_to(out).parts[0].startswith("checkpoint-")]


def test_no_path_of_this_machine_is_published(finished):
    """Nor is a local folder a base model to the hub, which would refuse the model card."""
    out = finished["output_dir"]
    assert not published_files_with(str(out.parent), out)
    assert "base_model" not in (out / "README.md").read_text().split("---\n")[1]


def test_base_from_the_hub_is_named_and_its_place_in_the_cache_is_not(script, flags, world, tmp_path):
    repo = tmp_path / "cache" / "models--some--sdxl"
    shutil.copytree(world / "pipeline", repo / "snapshots" / ("0" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    flags.update(pretrained_model_name_or_path="some/sdxl", cache_dir=tmp_path / "cache", rank=None)
    out = run(script, flags | {"max_train_steps": 1})
    _, head, text = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["base_model"] == "some/sdxl"
    assert "of `some/sdxl`" in text and 'from_pretrained("some/sdxl")' in text
    assert not published_files_with(str(tmp_path), out)


def test_model_card_of_a_lora_names_the_unet_that_it_belongs_to(script, flags, world, tmp_path):
    """The image of its snippet would be another one with the base model's UNet."""
    full = run(script, {**flags, "rank": None, "max_train_steps": 1, "output_dir": tmp_path / "full"})

    out = run(script, {**flags, "pretrained_unet_name_or_path": full, "max_train_steps": 1})

    card = (out / "README.md").read_text()
    assert 'pipeline.unet = UNet2DConditionModel.from_pretrained("full", subfolder="unet")' in card
    with safe_open(out / "pytorch_lora_weights.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["unet.base_model_name_or_path"] == "full"


def test_readme_of_somebody_else_is_kept(script, flags, caplog):
    """The own one is written again."""
    flags["output_dir"].mkdir()
    (flags["output_dir"] / "README.md").write_text("# My project\n")

    out = run(script, {**flags, "max_train_steps": 1})

    assert (out / "README.md").read_text() == "# My project\n"
    assert "README.md is not a model card of this script" in caplog.text
    (out / "README.md").unlink()
    for steps in (2, 3):
        run(script, {**flags, "max_train_steps": steps, "resume_from_checkpoint": "latest"})
        assert f"fine-tuned for {steps} steps" in (out / "README.md").read_text()


@pytest.mark.parametrize("revision", [None, "main"])
def test_base_model_stays_at_the_commit_of_the_first_start(script, flags, world, tmp_path, revision):
    """A later push does not change a run that is resumed."""
    repo = tmp_path / "cache" / "models--some--sdxl"
    shutil.copytree(world / "pipeline", repo / "snapshots" / (40 * "a"))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(40 * "a")
    flags.update(pretrained_model_name_or_path="some/sdxl", cache_dir=tmp_path / "cache", checkpointing_steps=2)
    flags["revision"] = revision
    whole = run(script, {**flags, "output_dir": tmp_path / "whole"})
    run(script, {**flags, "max_train_steps": 2})

    build_pipeline(repo / "snapshots" / (40 * "b"), seed=1)
    (repo / "refs" / "main").write_text(40 * "b")
    out = run(script, {**flags, "resume_from_checkpoint": "latest"})

    assert_equal(trained(out), trained(whole))
    assert card_details(out)["commits"]["model"] == 40 * "a"


# Trackers -----------------------------------------------------------------------------------------------------------


def wandb_records(path):
    """The records of wandb's file: LevelDB's log format behind a header of seven bytes."""
    data, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        # No header is cut by the end of a block.
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        position += 7 + length
        record += data[position - length : position]
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


def finished_wandb_records(folder):
    """wandb's service is a process of its own, which may write the last records after the run has ended."""
    (file,) = folder.rglob("*.wandb")
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline:
        records = list(wandb_records(file))
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        time.sleep(0.1)
    raise TimeoutError


def test_wandb_gets_scalars_images_and_settings_but_no_token(script, flags, tmp_path, monkeypatch):
    """Beside TensorBoard, and with the weights of a run without any tracker."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    flags.update(DRAWN, num_validation_pairs=4, tracker_name="some-project", logging_dir="runs")
    out = run(script, {**flags, "report_to": "all"})
    rows, settings, project = [], {}, None
    for record in finished_wandb_records(out / "runs"):
        project = record.run.project or project
        rows.append({".".join(item.nested_key) or item.key: item.value_json for item in record.history.item})
        settings.update({item.key: item.value_json for item in (*record.run.config.update, *record.config.update)})
    assert {*METRICS, *EVAL_METRICS, "lr", "grad_norm"} <= {name for row in rows for name in row}
    assert len([row for row in rows if "loss" in row]) == 4
    assert float(settings["beta_mapo"]) == 8 and project == "some-project"
    assert len(list((out / "runs").rglob("media/images/validation*.png"))) == 2
    assert list(out.glob("runs/some-project/events*")) and not (out / "logs").exists()
    assert not files_with(TOKEN, out)
    silent = run(script, {**flags, "output_dir": tmp_path / "silent", "report_to": "none"})
    assert_equal(trained(out), trained(silent))
    assert not [path for path in (silent / "runs").rglob("*") if path.is_file()]


def test_a_resumed_run_goes_on_in_its_trackers(script, flags, monkeypatch):
    """As if killed behind step 3, which has no checkpoint: TensorBoard shows that step once, and W&B a single run."""
    started, start = [], wandb.init
    monkeypatch.setattr(wandb, "init", lambda **options: started.append(options) or start(**options))
    flags.update(report_to="all", checkpointing_steps=2)
    out = run(script, flags | {"max_train_steps": 3})
    shutil.rmtree(out / "checkpoint-3")
    run(script, flags | {"resume_from_checkpoint": "latest"})
    shown = EventAccumulator(str(out / "logs" / "mapo")).Reload().Scalars("loss")
    assert [event.step for event in shown] == [1, 2, 3, 4]
    ((run_id, resume),) = {(options["id"], options["resume"]) for options in started}
    assert re.fullmatch("[0-9a-f]{8}", run_id) and resume == "allow" and len(started) >= 2
    assert run_id in (out / "checkpoint-2" / "mapo_state.json").read_text()
    assert {path.name.rpartition("-")[2] for path in out.glob("logs/wandb/offline-run-*")} == {run_id}


# Upload -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(script, monkeypatch):
    """A hub on which repositories can be created; what happens there, and when weights are loaded, in order."""
    events, load = [], script.load_pipeline
    # The hub puts the user before a name without one.
    repo = types.SimpleNamespace(repo_id="me/some-model")
    monkeypatch.setattr(script, "create_repo", lambda *args, **options: events.append((args, options)) or repo)
    monkeypatch.setattr(script, "load_pipeline", lambda *args: events.append("weights") or load(*args))
    return events


def test_failed_upload_loses_nothing(script, flags, hub, tmp_path, monkeypatch, caplog, capfd):
    """There is no network here. From another working directory, with a relative output folder."""
    monkeypatch.chdir(tmp_path)
    flags.update(DRAWN, output_dir="results/mine", push_to_hub=True, hub_token=TOKEN, checkpointing_steps=4)
    out = run(script, flags)
    files = {str(path.relative_to(out)) for path in out.rglob("*")}
    assert {"README.md", "pytorch_lora_weights.safetensors", "validation/step-000004.png", "checkpoint-4"} <= files
    assert "--push_to_hub failed" in caplog.text and "hf upload me/some-model results/mine" in caplog.text
    # Not False, which would overrule an organization's default.
    assert hub == [(("mine",), {"exist_ok": True, "private": None, "token": TOKEN}), "weights"]
    assert not files_with(TOKEN, tmp_path) and TOKEN not in caplog.text + "".join(capfd.readouterr())
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


@pytest.mark.parametrize("logging_dir", ["logs", "./logs", "logs/"])
def test_everything_but_checkpoints_logs_and_hidden_files_is_uploaded(script, flags, hub, monkeypatch, logging_dir):
    """To a private repository that is there before any weight is loaded. Names of log files contain the host's."""
    flags["logging_dir"] = logging_dir
    monkeypatch.setattr(script, "upload_folder", lambda **options: hub.append(options))
    flags.update(push_to_hub=True, hub_model_id="some-model", hub_token=TOKEN, hub_private_repo=True)
    out = run(script, {**flags, "checkpointing_steps": 2, "max_train_steps": 2})
    created, weights, uploaded = hub
    assert created == (("some-model",), {"exist_ok": True, "private": True, "token": TOKEN}) and weights == "weights"
    patterns = uploaded.pop("ignore_patterns")
    names = {"repo_id": "me/some-model", "commit_message": "End of training"}
    assert Path(uploaded.pop("folder_path")) == out and uploaded == {"token": TOKEN, **names}
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    ignored = {file for file in files if file.startswith(("checkpoint-2/", "logs/"))}
    assert len(ignored) > 4 and {"README.md", "pytorch_lora_weights.safetensors"} <= files
    ignored |= {".lock", ".cache/huggingface/some.lock", "logs/wandb/offline-run/some.wandb", "unet/.config.json.1a"}
    assert set(filter_repo_objects(sorted(files | ignored), ignore_patterns=patterns)) == files - ignored
