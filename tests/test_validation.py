"""Validation: held-out metrics, images of the validation prompts, warnings, and trackers."""

import math
import re
import shutil
from types import SimpleNamespace

import pytest
import wandb
import yaml
from accelerate.state import PartialState
from conftest import matrix, run, scalars
from PIL import Image
from runs import (
    TOKEN,
    VALIDATION,
    assert_equal,
    curves,
    files_with,
    read_state,
    resume,
    trained,
)
from small_pairs import write_groups
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


METRICS = ["loss", "chosen_mse", "rejected_mse", "margin", "accuracy"]
EVAL_METRICS = [f"eval_{name}" for name in METRICS]


# Held-out pairs -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes", [matrix({"rank": 4}), {"rank": None, "streaming": True}], ids=["LoRA", "full, stream"]
)
def test_validation_does_not_change_training(script, flags, tmp_path, changes):
    flags.update(changes, num_validation_pairs=6, label_noise_prob=0.3, random_crop=True)

    often = run(script, {**flags, **VALIDATION, "num_validation_pairs": 6, "validation_steps": 1})
    rarely = run(script, {**flags, "output_dir": tmp_path / "rarely"})

    assert_equal(trained(often), trained(rarely))
    logged = curves(often)
    expected = curves(rarely)
    assert list(logged["eval_loss"]) == [0, 1, 2, 3, 4]
    assert list(expected["eval_loss"]) == [0, 4]
    for name, values in expected.items():
        for step, value in values.items():
            assert logged[name][step] == value, (name, step)


def test_eval_metrics_depend_only_on_the_weights(script, flags, tmp_path):
    """Weights that do not change have the same metrics at every step, under any seed and in any batches."""
    flags.update(num_validation_pairs=7, validation_steps=2)
    trained_run = scalars(run(script, flags))
    flags.update(learning_rate=1e-30, seed=1, random_crop=True, label_noise_prob=0.5, rank=None)
    frozen = scalars(run(script, {**flags, "output_dir": tmp_path / "frozen"}))
    flags.update(train_batch_size=2)
    other_batches = scalars(run(script, {**flags, "output_dir": tmp_path / "other batches"}))

    names = [name for name in trained_run if name.startswith("eval_")]
    assert set(EVAL_METRICS) < set(names)
    for name in names:
        at_start = trained_run[name][0]
        assert frozen[name] == {0: at_start, 2: at_start, 4: at_start}, name
        assert other_batches[name][0] == pytest.approx(at_start, abs=1e-6), name
    assert len(set(trained_run["eval_loss"].values())) == 3


def test_bands_are_means_over_the_pairs_of_their_timesteps(script, flags, record_calls):
    """Nine held-out pairs in batches of four."""
    calls = record_calls(script, "preference_loss")

    logged = scalars(run(script, {**flags, "num_validation_pairs": 9, "max_train_steps": 1}))

    # The metrics of each held-out pair in the first validation.
    pairs = {}
    for call in calls:
        _, batch = call.args
        _, metrics = call.result
        for row, timestep, *values in zip(batch["row"], batch["timesteps"].tolist(), *metrics.tolist()):
            if row.startswith("held-out"):
                pairs.setdefault(row, (timestep, dict(zip(METRICS, values))))
    assert len(pairs) == 9
    for first in (0, 250, 500, 750):
        band = [metrics for timestep, metrics in pairs.values() if first <= timestep < first + 250]
        for name in ("accuracy", "margin"):
            key = f"eval_{name}_t{first}_{first + 249}"
            if band:
                mean = sum(metrics[name] for metrics in band) / len(band)
                assert logged[key][0] == pytest.approx(mean, rel=1e-6), key
            else:
                assert key not in logged
    assert len({timestep // 250 for timestep, _ in pairs.values()}) > 2


def test_validation_split_is_held_out_and_all_other_pairs_are_trained_on(script, flags, tmp_path):
    folder = write_groups(tmp_path / "pairs", [[16], [12]])
    (folder / "train-1.parquet").rename(folder / "validation.parquet")
    flags.update(dataset_name=folder, cache_dir=tmp_path / "cache", max_train_steps=1)

    without = scalars(run(script, flags))
    flags.update(validation_split="validation", output_dir=tmp_path / "all")
    all_pairs = scalars(run(script, flags))
    flags.update(num_validation_pairs=8, output_dir=tmp_path / "eight")
    eight_pairs = scalars(run(script, flags))

    assert all_pairs["loss"] == without["loss"]
    assert eight_pairs["loss"] == without["loss"]
    assert "eval_loss" not in without
    assert list(all_pairs["eval_loss"]) == [0, 1]
    assert all_pairs["eval_loss"][0] != eight_pairs["eval_loss"][0]


# Warnings -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "at_start", "later", "warning"),
    [
        ("eval_chosen_mse", 0.1, 0.1005, None),
        ("eval_chosen_mse", 0.1, 0.11, "eval_chosen_mse has risen (0.11 at step 8, 0.1 at step 0)"),
        ("eval_chosen_mse", 0.1, float("nan"), "eval_chosen_mse has risen (nan at step 8"),
        ("eval_rejected_mse", 0.1, 0.9, None),
        ("eval_rejected_mse", 0.1, 1.3, "eval_rejected_mse is 1.3 at step 8"),
        ("eval_rejected_mse", 1.4, 1.3, None),
    ],
)
def test_warns_if_training_destroys_the_model(script, caplog, name, at_start, later, warning):
    PartialState()
    first = {"step": 0, "eval_chosen_mse": 0.1, "eval_rejected_mse": 0.1, name: at_start}
    last = {"step": 8, "eval_chosen_mse": 0.1, "eval_rejected_mse": 0.1, name: later}

    script.warn_if_diverging(SimpleNamespace(loss_type="mapo", beta_mapo=8), first, last)

    messages = [record.getMessage() for record in caplog.records]
    if warning is None:
        assert messages == []
    else:
        assert len(messages) == 1
        assert warning in messages[0]


@pytest.mark.parametrize(
    ("loss_type", "beta", "advice"),
    [("mapo", 8, " or a larger --beta_mapo"), ("mapo", math.inf, ""), ("mapo_v1", 0.1, " or a smaller --beta_mapo")],
)
def test_advice_for_a_model_that_diverges_depends_on_the_objective(script, caplog, loss_type, beta, advice):
    PartialState()
    args = SimpleNamespace(loss_type=loss_type, beta_mapo=beta)
    first = {"step": 0, "eval_chosen_mse": 0.1, "eval_rejected_mse": 0.1}

    script.warn_if_diverging(args, first, {"step": 8, "eval_chosen_mse": 0.2, "eval_rejected_mse": 1.2})

    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == 2 * [
        f"try a smaller --learning_rate{advice}."
    ]


def test_resumed_run_is_compared_with_the_first_validation_of_all(script, flags, tmp_path, caplog):
    """At a learning rate that destroys the model, both runs warn alike in the steps 2 to 4."""
    flags.update(num_validation_pairs=6, validation_steps=1, checkpointing_steps=2, learning_rate=0.1, rank=None)
    pattern = r"eval_\w+ (?:has risen|is) .*"

    uninterrupted = run(script, flags)
    warnings = re.findall(pattern, caplog.text)
    caplog.clear()
    resumed = resume(script, flags, uninterrupted / "checkpoint-2", tmp_path / "resumed")
    warnings_of_resumed = re.findall(pattern, caplog.text)

    assert any("eval_chosen_mse has risen" in warning and "at step 0)" in warning for warning in warnings)
    assert warnings_of_resumed == [warning for warning in warnings if not re.search(r" at step 1\b", warning)]
    first_eval = read_state(uninterrupted / "checkpoint-4")["first_eval"]
    assert read_state(resumed / "checkpoint-4")["first_eval"] == first_eval
    expected = {"step": 0}
    for name, values in scalars(uninterrupted).items():
        if name.startswith("eval_"):
            expected[name] = values[0]
    assert first_eval == pytest.approx(expected, rel=1e-6)


# TensorBoard --------------------------------------------------------------------------------------------------------
def test_tensorboard_gets_metrics_images_and_flags_but_no_token(script, flags):
    """With validations at the steps 0, 2 and 4."""
    out = run(script, {**flags, **VALIDATION, "validation_steps": 2, "beta_mapo": 0.25, "hub_token": TOKEN})

    logged = scalars(out)
    assert min(logged["pairs_per_second"].values()) > 0
    assert min(logged["peak_memory_gib"].values()) > 0
    for name in (*METRICS, "lr", "grad_norm", "skipped_steps", "pairs_per_second", "peak_memory_gib"):
        assert list(logged.pop(name)) == [1, 2, 3, 4], name
    assert set(EVAL_METRICS) <= set(logged)
    for name, values in logged.items():
        assert name.startswith("eval_")
        assert list(values) == [0, 2, 4], name

    images = []
    for file in out.glob("logs/mapo/**/events*"):
        events = EventAccumulator(str(file)).Reload()
        if events.Tags()["images"]:
            images += events.Images("validation")
    size = Image.open(out / "validation" / "step-000004.png").size
    assert [(image.step, (image.width, image.height)) for image in images] == [(2, size), (4, size)]

    (file,) = out.glob("logs/**/hparams.yml")
    settings = yaml.safe_load(file.read_text())
    assert settings["beta_mapo"] == 0.25
    assert settings["dataset_name"] == "pairs"
    assert files_with(TOKEN, out) == []


# Weights & Biases ---------------------------------------------------------------------------------------------------
def test_wandb_gets_metrics_images_and_flags_but_no_token(script, flags, monkeypatch, record_calls):
    """Together with TensorBoard."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    flags.update(VALIDATION, validation_steps=2, tracker_name="some-project", logging_dir="runs", report_to="all")
    inits = record_calls(wandb, "init")
    configs = record_calls(wandb.Config, "update")
    logs = record_calls(wandb.sdk.wandb_run.Run, "log")

    out = run(script, flags)
    wandb.teardown()  # waits until the service, a separate process, has written its files

    rows = [call.args[1] for call in logs]
    assert {*METRICS, *EVAL_METRICS, "lr", "grad_norm"} <= set.union(*map(set, rows))
    assert len([row for row in rows if "loss" in row]) == 4
    # Offline, earlier versions of accelerate start W&B a second time, with the flags.
    given = [call.args[1] for call in configs]
    given += [call.kwargs["config"] for call in inits if call.kwargs.get("config")]
    assert [config["beta_mapo"] for config in given] == [8]
    assert {call.kwargs["project"] for call in inits} == {"some-project"}
    assert len(list((out / "runs").rglob("media/images/validation*.png"))) == 2
    assert list(out.glob("runs/some-project/events*"))
    assert not (out / "logs").exists()
    assert files_with(TOKEN, out) == []


def test_trackers_do_not_change_training(script, flags, tmp_path):
    flags.update(VALIDATION)

    tracked = run(script, flags)
    untracked = run(script, {**flags, "output_dir": tmp_path / "untracked", "report_to": "none"})

    assert_equal(trained(tracked), trained(untracked))
    assert [path for path in (untracked / "logs").rglob("*") if path.is_file()] == []


def test_resumed_run_continues_in_its_trackers(script, flags, record_calls):
    """As if killed after step 3, which has no checkpoint: TensorBoard shows that step once, and W&B has one run."""
    calls = record_calls(wandb, "init")
    flags.update(report_to="all", checkpointing_steps=2)
    out = run(script, {**flags, "max_train_steps": 3})
    shutil.rmtree(out / "checkpoint-3")

    run(script, {**flags, "resume_from_checkpoint": "latest"})

    losses = EventAccumulator(str(out / "logs" / "mapo")).Reload().Scalars("loss")
    assert [event.step for event in losses] == [1, 2, 3, 4]
    run_id = read_state(out / "checkpoint-2")["run_id"]
    assert re.fullmatch("[0-9a-f]{8}", run_id)
    assert len(calls) >= 2
    for call in calls:
        assert call.kwargs["id"] == run_id
        assert call.kwargs["resume"] == "allow"
    folders = out.glob("logs/wandb/offline-run-*")
    assert {path.name.rpartition("-")[2] for path in folders} == {run_id}
