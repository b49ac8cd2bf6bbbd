"""Checkpoints: what they contain, when they are complete, which are kept, and which runs may use a folder."""

import json
import os
import re
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import command_line, run, scalars
from cpu_cluster import Fault, install, killed, raising, signalled
from diffusers import UNet2DConditionModel
from runs import (
    LORA_WEIGHTS,
    STATE,
    STOPPED,
    assert_equal,
    assert_one_error,
    assert_same,
    checkpoints,
    files_in,
    read_state,
    resume,
    run_ranks,
    run_to_status,
    train_error,
    trained,
)


DISK_FULL = OSError(28, "No space left on device")


# Saving -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rank", "weights"),
    [(4, {LORA_WEIGHTS}), (None, {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"})],
    ids=["LoRA", "full"],
)
def test_checkpoint_contains_weights_that_pipelines_load_and_one_state(script, flags, rank, weights):
    flags.update(rank=rank, checkpointing_steps=4, gradient_accumulation_steps=2, train_batch_size=2)

    out = run(script, flags)

    checkpoint = out / "checkpoint-4"
    assert {str(path) for path in files_in(checkpoint)} == {"optimizer.bin", "random_states_0.pkl", STATE, *weights}
    assert_equal(trained(checkpoint), trained(out))
    state = read_state(checkpoint)
    assert state["step"] == 4
    assert state["pairs_seen"] == 16
    assert state["rows_read"] == 16
    assert state["rows_bad"] == 0
    if rank is None:
        assert UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet").dtype == torch.float32


@pytest.mark.parametrize(("limit", "kept"), [(None, [1, 2, 3, 4]), (2, [3, 4])])
def test_newest_checkpoints_are_kept(script, flags, limit, kept):
    out = run(script, {**flags, "checkpointing_steps": 1, "checkpoints_total_limit": limit})

    assert checkpoints(out) == kept
    others = {path.name for path in out.iterdir() if not path.name.startswith("checkpoint-")}
    assert others == {".lock", "README.md", "logs", LORA_WEIGHTS, "pytorch_lora_weights_kohya.safetensors"}


@pytest.mark.parametrize("stopped", [False, True], ids=["regular", "regular and signal"])
def test_checkpoint_of_the_last_step_is_saved_once(script, flags, monkeypatch, caplog, stopped):
    if stopped:
        install(Fault("step", (4,), partial(signalled, signal.SIGTERM)), monkeypatch.setattr)

    status = run_to_status(script, {**flags, "checkpointing_steps": 2})

    assert status == (STOPPED if stopped else 0)
    assert re.findall(r"Saved .*/checkpoint-(\d)\n", caplog.text) == ["2", "4"]


def test_copies_of_checkpoints_are_not_removed(script, flags):
    flags.update(checkpointing_steps=1, checkpoints_total_limit=1, max_train_steps=2)
    out = run(script, flags)
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-2-good")

    run(script, {**flags, "resume_from_checkpoint": "latest", "max_train_steps": 4})

    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2-good", "checkpoint-4"}


def test_moved_and_linked_checkpoint_belongs_to_the_same_run(script, flags, tmp_path):
    flags.update(checkpointing_steps=2, max_train_steps=2, checkpoints_total_limit=1)
    out = run(script, flags)
    run_id = read_state(out / "checkpoint-2")["run_id"]
    shutil.move(out / "checkpoint-2", tmp_path / "moved")
    (out / "checkpoint-2").symlink_to(tmp_path / "moved")

    run(script, {**flags, "resume_from_checkpoint": out / "checkpoint-2", "max_train_steps": 4})

    assert read_state(out / "checkpoint-4")["run_id"] == run_id
    # Beyond the limit, the link is removed, but not the folder that somebody has moved.
    assert not (out / "checkpoint-2").exists()
    assert (tmp_path / "moved" / STATE).exists()


def test_checkpoint_that_cannot_be_removed_does_not_stop_the_run(script, flags, monkeypatch, caplog):
    def refuse(folder, ignore_errors=False):
        if not ignore_errors:
            raise OSError(16, "Device or resource busy", str(folder))

    monkeypatch.setattr(script.shutil, "rmtree", refuse)

    out = run(script, {**flags, "checkpointing_steps": 1, "checkpoints_total_limit": 1, "max_train_steps": 2})

    assert f"--checkpoints_total_limit: {out / 'checkpoint-1'} cannot be removed" in caplog.text
    assert checkpoints(out)[-1] == 2


# Faults while saving ------------------------------------------------------------------------------------------------
def test_files_survive_a_power_failure(script, flags, monkeypatch):
    """All files are synced before a checkpoint counts as complete, and that is synced before an older one goes."""
    file_events = []

    def record(owner, name, find_path):
        original = getattr(owner, name)

        def recorded(*args, **kwargs):
            file_events.append((name, Path(find_path(*args))))
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, recorded)

    record(os, "fsync", lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}"))
    record(os, "replace", lambda source, target: target)
    record(shutil, "rmtree", lambda path, *_: path)

    out = run(script, {**flags, "checkpointing_steps": 2, "checkpoints_total_limit": 1})

    checkpoint = out / "checkpoint-4"
    completed = file_events.index(("replace", checkpoint / STATE))
    synced = [path for event, path in file_events[:completed] if event == "fsync"]
    other_files = {path for path in checkpoint.rglob("*") if path.name != STATE}
    assert other_files | {checkpoint} <= set(synced)
    assert any(path.name.startswith(f".{STATE}") for path in synced)

    removed = file_events.index(("rmtree", out / "checkpoint-2"))
    assert ("fsync", checkpoint) in file_events[completed:removed]

    saved = file_events.index(("replace", out / LORA_WEIGHTS))
    assert ("fsync", out / ".incomplete" / LORA_WEIGHTS) in file_events[:saved]


def test_full_disk_in_the_last_checkpoint_keeps_the_weights(script, flags, uninterrupted, monkeypatch):
    """The checkpoint may be several times as large as the weights, which are saved first."""
    install(Fault("checkpoint", (1,), partial(raising, DISK_FULL)), monkeypatch.setattr)

    error = train_error(script, flags)
    monkeypatch.undo()

    assert "checkpoint-4 could not be written" in error
    assert checkpoints(flags["output_dir"]) == []
    assert_equal(trained(flags["output_dir"]), trained(uninterrupted(flags)))


def test_interrupted_removal_leaves_no_checkpoint_that_looks_complete(script, flags, uninterrupted, monkeypatch):
    flags.update(checkpointing_steps=2, checkpoints_total_limit=1, max_train_steps=5)
    out = flags["output_dir"]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", partial(raising, KeyboardInterrupt()))
        run(script, flags)
    kept = checkpoints(out)
    is_left = (out / "checkpoint-2").exists()
    run(script, {**flags, "resume_from_checkpoint": "latest"})

    assert kept == [4]
    assert is_left
    assert_same(uninterrupted(flags), out)


@pytest.mark.parametrize(("rank", "place"), [(4, "lora"), (None, "replace")], ids=["LoRA", "full"])
def test_run_killed_while_it_saves_its_results_starts_again(script, flags, uninterrupted, rank, place):
    """Without a checkpoint. Incomplete results must not look like those of another run."""
    flags.update(rank=rank, max_train_steps=2)

    statuses, outputs = run_ranks(flags, {0: [Fault(place, (1,), killed)]}, size=1)
    out = run(script, flags)

    assert statuses == [-signal.SIGKILL], outputs
    assert_equal(trained(out), trained(uninterrupted(flags)))
    assert not (out / ".incomplete").exists()


# Finding ------------------------------------------------------------------------------------------------------------
def test_checkpoint_is_found_by_path_name_or_number(script, flags):
    """The latest one is the one of the largest number, not the last in alphabetical order."""
    flags.update(checkpointing_steps=5, max_train_steps=10, train_batch_size=1)
    out = run(script, flags)
    (out / "checkpoint-99").mkdir()
    flags.update(max_train_steps=11)

    for checkpoint in (out / "checkpoint-10", "checkpoint-10", "latest"):
        shutil.rmtree(out / "logs")
        run(script, {**flags, "resume_from_checkpoint": checkpoint})
        assert list(scalars(out)["loss"]) == [11]
        shutil.rmtree(out / "checkpoint-11")


@pytest.mark.parametrize("file", ["optimizer.bin", LORA_WEIGHTS])
def test_truncated_checkpoint_is_refused(script, flags, file):
    checkpoint = run(script, {**flags, "max_train_steps": 2}) / "checkpoint-2"
    (checkpoint / file).write_bytes((checkpoint / file).read_bytes()[:100])

    error = train_error(script, {**flags, "resume_from_checkpoint": checkpoint})

    assert f"--resume_from_checkpoint {checkpoint} cannot be loaded: " in error


def test_checkpoint_with_an_unreadable_state_is_ignored(script, flags):
    out = run(script, {**flags, "checkpointing_steps": 2})
    weights = trained(out)
    (out / "checkpoint-4" / STATE).write_text('{"step": ')

    run(script, {**flags, "resume_from_checkpoint": "latest"})

    assert checkpoints(out) == [2, 4]
    assert_equal(trained(out), weights)


def test_checkpoint_of_another_version_is_refused(script, flags):
    checkpoint = run(script, {**flags, "max_train_steps": 2}) / "checkpoint-2"
    state = read_state(checkpoint)
    del state["run_id"]
    (checkpoint / STATE).write_text(json.dumps(state))

    error = train_error(script, {**flags, "resume_from_checkpoint": "latest"})

    assert "checkpoint-2 was written by another version" in error


# Other runs in the folder -------------------------------------------------------------------------------------------
def assert_refused(script, flags, name):
    """The run does not start, says why, and changes nothing in the folder."""
    out = flags["output_dir"]
    before = files_in(out)

    error = train_error(script, flags)

    assert f"--output_dir {out} already contains {name}. " in error
    # A run without a checkpoint cannot be continued.
    assert ("--resume_from_checkpoint latest" in error) == (len(checkpoints(out)) > 0)
    assert files_in(out) == before


@pytest.mark.parametrize(("rank", "result"), [(4, LORA_WEIGHTS), (None, "unet")], ids=["LoRA", "full"])
def test_new_run_in_the_folder_of_another_is_refused(script, flags, loaded, rank, result):
    """Because of its checkpoints, or only because of its results. Logs and incomplete checkpoints are no obstacle."""
    flags["rank"] = rank
    out = run(script, flags)

    assert_refused(script, {**flags, "seed": 1}, "checkpoint-4")
    (out / "checkpoint-4" / STATE).unlink()
    assert_refused(script, flags, result)
    assert len(loaded) == 1  # no weights were loaded

    (out / result).rename(out / "moved")
    run(script, {**flags, "seed": 1})
    assert checkpoints(out) == [4]


def test_run_has_one_id_until_it_resumes_in_another_folder(script, flags, tmp_path):
    """In the folder of a run, only its latest checkpoint can be resumed."""
    flags["checkpointing_steps"] = 2
    out = run(script, flags)
    run(script, {**flags, "resume_from_checkpoint": "latest", "max_train_steps": 5})

    branch = resume(script, flags, out / "checkpoint-2", tmp_path / "branch")
    run(script, {**flags, "resume_from_checkpoint": "latest", "max_train_steps": 6, "output_dir": branch})

    assert checkpoints(out) == [2, 4, 5]
    assert checkpoints(branch) == [4, 6]
    [run_id] = {read_state(path)["run_id"] for path in out.glob("checkpoint-*")}
    [branch_id] = {read_state(path)["run_id"] for path in branch.glob("checkpoint-*")}
    assert run_id != branch_id
    for each in (run_id, branch_id):
        assert re.fullmatch("[0-9a-f]{8}", each)
    assert_refused(script, {**flags, "resume_from_checkpoint": out / "checkpoint-2"}, "checkpoint-4")
    flags.update(resume_from_checkpoint=branch / "checkpoint-6", max_train_steps=7)
    assert_refused(script, flags, "checkpoint-2")


def test_second_launch_into_the_folder_of_a_running_one_is_refused(script, flags, monkeypatch):
    """The second run starts during step 2 of the first one."""
    results = []

    def launch_second(call):
        results.append(run_ranks(flags, size=1))
        return call()

    install(Fault("step", (2,), launch_second), monkeypatch.setattr)

    run(script, flags)

    [(statuses, outputs)] = results
    assert_one_error(statuses, outputs, "another run is writing to this folder")


def test_processes_wait_hours_for_each_other(script, flags):
    """One of them may download the model, or write 30 GB to a slow disk."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()

    accelerator = script.build_accelerator(script.parse_args(command_line(flags)))

    assert accelerator.init_handler.timeout.total_seconds() >= 3600
