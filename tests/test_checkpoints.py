"""Killed, interrupted and resumed runs against runs that never were, bit for bit."""

import json
import os
import re
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import run, scalars
from cpu_cluster import Fault, install, killed, raising
from diffusers import UNet2DConditionModel
from small_world import build_pipeline, draw_pairs
from test_faults import VALIDATION, checkpoints, run_ranks, run_ranks_well
from test_training import LORA_WEIGHTS, assert_close, assert_equal, assert_same, curves, trained


STATE = "mapo_state.json"
# What a run draws and schedules, none of it a default.
DRAWS = {
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "random_crop": True,
    "label_noise_prob": 0.3,
    "logging_steps": 4,
}
STREAMED = {"streaming": True, "shuffle_shards": 2}


def state_of(folder):
    """The state in a checkpoint, without the flags."""
    state = json.loads((folder / STATE).read_text())
    del state["settings"]
    return state


def resumed(script, flags, checkpoint, folder):
    return run(script, {**flags, "output_dir": folder, "resume_from_checkpoint": checkpoint})


def assert_continues(whole, folder, step):
    """`folder` made the steps after `step` as `whole` made them, and no others."""
    expected = {name: {s: v for s, v in values.items() if s > step} for name, values in curves(whole).items()}
    assert curves(folder) == expected
    assert len(expected["loss"]) > 0
    assert_equal(trained(whole), trained(folder))


# Resumed ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"train_batch_size": 5, "use_8bit_adam": True, **DRAWS}, [4]),
        ({"train_batch_size": 2, "gradient_accumulation_steps": 2, "rank": None}, [5, 6, 7]),
        ({"mixed_precision": "bf16", "gradient_checkpointing": True, "max_train_steps": 4}, [2]),
        ({"cache_latents": True, "dataloader_num_workers": 2, "max_train_steps": 4}, [2]),
        ({**STREAMED, **DRAWS, "num_validation_pairs": 3}, [5, 6]),
        ({**STREAMED, "gradient_accumulation_steps": 2, "dataloader_num_workers": 2, "max_train_steps": 4}, [2]),
    ],
    ids=["batch-over-epochs", "accumulation", "bf16", "cache-workers", "stream", "stream-workers"],
)
def test_resumed_run_is_the_uninterrupted_one(script, flags, tmp_path, changes, steps):
    """Before, at and after the end of an epoch of 24 pairs (stream: 21), in a log window, between two epochs."""
    flags.update({"max_train_samples": 24, "max_train_steps": 8, "checkpointing_steps": 1, **changes})
    whole = run(script, flags)
    for step in steps:
        folder = resumed(script, flags, whole / f"checkpoint-{step}", tmp_path / f"from-{step}")
        assert_continues(whole, folder, step)


@pytest.mark.parametrize("changes", [{}, STREAMED], ids=["map", "stream"])
def test_two_restarts_in_a_row(script, flags, tmp_path, changes):
    flags.update(checkpointing_steps=2, max_train_steps=8, max_train_samples=24, **changes)
    whole = run(script, flags)
    once = resumed(script, flags, whole / "checkpoint-2", tmp_path / "once")
    twice = resumed(script, flags, once / "checkpoint-4", tmp_path / "twice")
    assert_continues(whole, twice, 4)
    assert state_of(whole / "checkpoint-8") == state_of(twice / "checkpoint-8")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        STREAMED,
        pytest.param({"dataloader_num_workers": 2}, marks=pytest.mark.matrix),
        pytest.param({**STREAMED, "dataloader_num_workers": 2}, marks=pytest.mark.matrix),
        pytest.param({**STREAMED, "gradient_accumulation_steps": 2}, marks=pytest.mark.matrix),
    ],
    ids=["map", "stream", "map-workers", "stream-workers", "stream-accumulation"],
)
def test_run_resumes_on_any_number_of_processes(script, flags, tmp_path, changes):
    """
    One process, then two, then one again, over the end of an epoch. The pairs stay the same in the same order; the
    losses differ by rounding, since each process sums up half of a batch. Adam's epsilon is raised because Adam
    divides by gradients that may be no larger than their rounding.
    """
    flags.update(changes, lr_scheduler="cosine", lr_warmup_steps=2, adam_epsilon=1e-5, num_validation_pairs=4)
    flags.update(checkpointing_steps=3, max_train_steps=9, max_train_samples=24)
    whole = run(script, flags)
    halves = {**flags, "train_batch_size": 2, "output_dir": tmp_path / "two"}
    two = run_ranks_well({**halves, "resume_from_checkpoint": whole / "checkpoint-3"})
    assert_close(two, whole, steps=range(4, 10))
    one = resumed(script, flags, two / "checkpoint-6", tmp_path / "one")
    assert_close(one, whole, steps=range(7, 10))
    states = [state_of(folder / "checkpoint-9") for folder in (whole, two, one)]
    assert len({state["pairs_seen"] for state in states}) == 1


@pytest.mark.parametrize("changes", [STREAMED, pytest.param({}, marks=pytest.mark.matrix)], ids=["stream", "map"])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.matrix)])
def test_run_that_began_on_two_processes_resumes_on_one(script, flags, tmp_path, changes, workers):
    """A stream's lanes are those of the processes and workers that it began with."""
    flags.update(changes, adam_epsilon=1e-5, dataloader_num_workers=workers, checkpointing_steps=3)
    flags.update(max_train_steps=8, max_train_samples=24, train_batch_size=2)
    whole = run_ranks_well({**flags, "output_dir": tmp_path / "two"})
    flags.update(train_batch_size=4)
    assert_close(resumed(script, flags, whole / "checkpoint-3", tmp_path / "one"), whole, steps=range(4, 9))


# Killed -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 4, "use_8bit_adam": True, "lr_scheduler": "cosine", "lr_warmup_steps": 2, **STREAMED},
        pytest.param({"rank": None, "use_8bit_adam": True, "learning_rate": 1e-4}, marks=pytest.mark.matrix),
        pytest.param({"dataloader_num_workers": 2, "random_crop": True}, marks=pytest.mark.matrix),
    ],
    ids=["lora-8bit", "full-8bit", "workers"],
)
def test_killed_and_resumed_run_is_the_uninterrupted_one(script, flags, tmp_path, changes):
    """Killed within step 5, between the validations of steps 3 and 6."""
    flags.update(checkpointing_steps=4, max_train_steps=6, validation_steps=3, **VALIDATION, **changes)
    whole = run(script, {**flags, "output_dir": tmp_path / "whole"})
    statuses, outputs = run_ranks(flags, {0: [Fault("step", (5,), killed)]}, size=1)
    assert statuses == [-signal.SIGKILL], outputs
    out = flags["output_dir"]
    assert checkpoints(out) == [4] and not (out / LORA_WEIGHTS).exists() and not (out / "unet").exists()
    run(script, {**flags, "resume_from_checkpoint": "latest"})
    assert_same(whole, out)
    grid = Path("validation", "step-000006.png")
    assert (out / grid).read_bytes() == (whole / grid).read_bytes()


# Found and compared -------------------------------------------------------------------------------------------------
def test_checkpoint_is_found(script, flags):
    """By number: in the order of names checkpoint-5 would come after checkpoint-10."""
    flags.update(checkpointing_steps=5, max_train_steps=11, train_batch_size=1)
    out = run(script, flags)
    (out / "checkpoint-99").mkdir()
    for asked in (out / "checkpoint-10", "checkpoint-10", "latest"):
        shutil.rmtree(out / "logs")
        run(script, {**flags, "resume_from_checkpoint": asked, "max_train_steps": 12})
        assert list(scalars(out)["loss"]) == [11, 12]


def test_latest_of_none_starts_a_new_run_and_a_missing_checkpoint_is_refused(script, flags, tmp_path):
    out = run(script, {**flags, "resume_from_checkpoint": "latest"})
    assert_same(out, run(script, {**flags, "output_dir": tmp_path / "new"}))
    (tmp_path / "folder").mkdir()
    for asked in ("checkpoint-9", tmp_path / "folder"):
        with pytest.raises(script.TrainingError, match="--resume_from_checkpoint .* is no checkpoint"):
            run(script, {**flags, "resume_from_checkpoint": asked})


@pytest.mark.parametrize("file", ["optimizer.bin", LORA_WEIGHTS])
def test_damaged_checkpoint_is_one_sentence(script, flags, file):
    folder = run(script, {**flags, "checkpointing_steps": 2}) / "checkpoint-2"
    (folder / file).write_bytes((folder / file).read_bytes()[:100])
    with pytest.raises(script.TrainingError, match=f"--resume_from_checkpoint {folder} cannot be loaded: ") as error:
        run(script, {**flags, "resume_from_checkpoint": folder})
    assert "\n" not in str(error.value)


def test_finished_run_is_validated_again_or_prolonged(script, flags, tmp_path):
    """Its last checkpoint is where it resumes, and the final weights are replaced."""
    flags.update(checkpointing_steps=3, max_train_steps=3, num_validation_pairs=4)
    whole = run(script, flags)
    again = resumed(script, flags, whole / "checkpoint-3", tmp_path / "again")
    assert_equal(trained(whole), trained(again))
    assert "loss" not in scalars(again) and (again / "README.md").exists()
    assert scalars(again)["eval_loss"] == {3: scalars(whole)["eval_loss"][3]}
    before = trained(whole)
    after = trained(run(script, {**flags, "resume_from_checkpoint": "latest", "max_train_steps": 6}))
    longer = run(script, {**flags, "output_dir": tmp_path / "longer", "max_train_steps": 6})
    assert_equal(after, trained(longer))
    assert any(not torch.equal(before[name], after[name]) for name in after)


def test_differences_of_flags_are_refused_or_reported(script, flags, tmp_path, caplog):
    """A seed that was drawn is taken over."""
    flags.update(checkpointing_steps=1, max_train_steps=1, seed=None)
    out = run(script, flags)
    flags.update(resume_from_checkpoint="checkpoint-1", max_train_steps=2)
    for name, value in {"rank": 2, "use_8bit_adam": True, "streaming": True, "shuffle_shards": 9, "seed": 1}.items():
        with pytest.raises(script.TrainingError, match=f"--resume_from_checkpoint: {name} is {value}, but"):
            run(script, {**flags, name: value})

    def reported(changes):
        caplog.clear()
        run(script, {**flags, **changes})
        messages = [record.message for record in caplog.records if record.levelname == "WARNING"]
        return set(re.findall(r"(\w+) is .*, but .* in .*checkpoint-1\.", "\n".join(messages)))

    assert not reported({})
    build_pipeline(tmp_path / "pipeline", seed=1)
    draw_pairs(tmp_path / "pairs", seed=1)
    changes = {
        "pretrained_model_name_or_path": tmp_path / "pipeline",
        "dataset_name": tmp_path / "pairs",
        "max_train_samples": 40,
        "num_validation_pairs": 4,
        "resolution": 32,
        "learning_rate": 1e-4,
        "beta_mapo": 0.5,
    }
    state = json.loads((out / "checkpoint-1" / STATE).read_text())
    state["settings"]["flag_of_another_version"] = 3
    (out / "checkpoint-1" / STATE).write_text(json.dumps(state))
    assert reported({**changes, "no-remove_ties": True}) == {*changes, "remove_ties", "flag_of_another_version"}


# Written ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rank", [4, None], ids=["lora", "full"])
def test_checkpoint_holds_a_pipeline_weights_and_one_state(script, flags, rank):
    """Written at the end of a step, whatever its number of forward passes."""
    flags.update(rank=rank, checkpointing_steps=4, gradient_accumulation_steps=2, train_batch_size=2)
    out = run(script, flags)
    folder = out / "checkpoint-4"
    unet = {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    states = {"optimizer.bin", "scheduler.bin", "random_states_0.pkl", STATE}
    assert files == states | ({LORA_WEIGHTS} if rank else unet)
    assert_equal(trained(folder), trained(out))
    state = state_of(folder)
    assert [state[name] for name in ("step", "pairs_seen", "rows_read", "rows_bad")] == [4, 16, 16, 0]
    if rank is None:
        assert UNet2DConditionModel.from_pretrained(folder, subfolder="unet").dtype == torch.float32


@pytest.mark.parametrize(("limit", "kept"), [(None, [1, 2, 3, 4]), (1, [4]), (2, [3, 4])])
def test_newest_checkpoints_are_kept(script, flags, limit, kept):
    out = run(script, {**flags, "checkpointing_steps": 1, "checkpoints_total_limit": limit})
    assert checkpoints(out) == kept and len(os.listdir(out)) == len(kept) + 3


def test_failed_save_leaves_the_older_checkpoint_alone(script, flags, tmp_path, monkeypatch):
    """Then a folder without its state is passed over, and completed when the run comes by again."""
    flags.update(checkpointing_steps=2, checkpoints_total_limit=1, max_train_steps=5)
    whole = run(script, {**flags, "output_dir": tmp_path / "whole"})
    full = partial(raising, OSError(28, "No space left on device"))
    with monkeypatch.context() as patch:
        install(Fault("checkpoint", (2,), full), patch.setattr)
        with pytest.raises(script.TrainingError, match="checkpoint-4 could not be written, older .*No space"):
            run(script, flags)
    out = flags["output_dir"]
    assert (out / "checkpoint-4").exists() and checkpoints(out) == [2]
    run(script, {**flags, "resume_from_checkpoint": "latest"})
    assert_same(whole, out)
    assert checkpoints(out) == [4]


def test_interrupted_pruning_leaves_only_whole_checkpoints(script, flags, tmp_path, monkeypatch):
    flags.update(checkpointing_steps=2, checkpoints_total_limit=1, max_train_steps=5)
    whole = run(script, {**flags, "output_dir": tmp_path / "whole"})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", partial(raising, KeyboardInterrupt()))
        run(script, flags)
    out = flags["output_dir"]
    assert (out / "checkpoint-2").exists() and checkpoints(out) == [4]
    run(script, {**flags, "resume_from_checkpoint": "latest"})
    assert_same(whole, out)


def test_checkpoint_of_the_same_step_is_replaced(script, flags, tmp_path, monkeypatch):
    """An output folder used again: the old state goes before the weights are written over."""
    flags.update(checkpointing_steps=2, max_train_steps=2)
    fresh = run(script, {**flags, "output_dir": tmp_path / "fresh"})
    out = run(script, {**flags, "seed": 1})
    with monkeypatch.context() as patch, pytest.raises(script.TrainingError):
        install(Fault("weights", (1,), partial(raising, OSError(28, "full"))), patch.setattr)
        run(script, flags)
    assert checkpoints(out) == []
    assert_equal(trained(fresh / "checkpoint-2"), trained(run(script, flags) / "checkpoint-2"))
    assert checkpoints(out) == [2]
