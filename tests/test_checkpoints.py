"""Killed, interrupted and resumed runs against runs that never were, bit for bit."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import SCRIPT, command_line, launch_recorded, run, scalars
from diffusers import UNet2DConditionModel
from small_world import build_pipeline, draw_pairs
from test_training import LORA_WEIGHTS, assert_close, assert_equal, assert_same, curves, trained


SAVE_STATE, REMOVE_TREE = Accelerator.save_state, shutil.rmtree


def checkpoints(folder):
    return sorted(path.name for path in Path(folder).glob("*checkpoint*"))


def hidden(folder):
    return [path.name for path in Path(folder).glob(".*")]


def assert_goes_on(whole, resumed, step):
    """`resumed` did the steps after `step` as `whole` did them, and no others."""
    expected = {name: {s: v for s, v in values.items() if s > step} for name, values in curves(whole).items()}
    assert curves(resumed) == expected
    assert len(expected["loss"]) > 0
    assert_equal(trained(whole), trained(resumed))


# Killed -------------------------------------------------------------------------------------------------------------


def steps_done(log):
    """What the progress bar in `log` has come to."""
    return max(map(int, re.findall(r"Steps:[^\r\n]* (\d+)/\d+ \[", log.read_text())), default=0)


def kill_at(flags, step, log):
    """Run the script in processes of its own and kill -9 them all as soon as `step` is done."""
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *command_line(flags)],
            env={**os.environ, "TQDM_MININTERVAL": "0"},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    deadline = time.monotonic() + 120
    while steps_done(log) < step and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None, log.read_text()
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert step <= steps_done(log) < flags["max_train_steps"]


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 4, "use_8bit_adam": True, "lr_scheduler": "cosine", "lr_warmup_steps": 2},
        {"rank": None, "use_8bit_adam": True, "learning_rate": 1e-4},
        {"rank": 4, "dataloader_num_workers": 2, "random_crop": True, "label_noise_prob": 0.2},
    ],
    ids=["lora-8bit", "full-8bit", "lora-workers"],
)
def test_killed_and_resumed_run_is_the_uninterrupted_one(script, flags, tmp_path, changes):
    """Killed at step 9 or later, in the first epoch of eleven steps, between the validations of steps 5 and 10."""
    flags.update(checkpointing_steps=7, max_train_steps=18, num_validation_pairs=4, **changes)
    flags.update(run_validation=True, validation_steps=5, num_inference_steps=2, validation_prompts=["a red circle"])
    whole = run(script, {**flags, "output_dir": tmp_path / "whole"})
    kill_at(flags, 9, tmp_path / "log")
    out = flags["output_dir"]
    assert "checkpoint-7" in checkpoints(out) and not (out / LORA_WEIGHTS).exists() and not (out / "unet").exists()
    # TensorBoard's thread may not have written what the killed step logged.
    assert max(scalars(out)["loss"]) >= 8
    run(script, {**flags, "resume_from_checkpoint": "latest"})
    assert_same(whole, out)
    for name in ("step-000010.png", "step-000018.png"):
        assert (out / "validation" / name).read_bytes() == (whole / "validation" / name).read_bytes()


# Resumed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpointing_steps": 12, "max_train_steps": 14},
        {"checkpointing_steps": 5, "max_train_steps": 14, "train_batch_size": 5, "use_8bit_adam": True},
        {"checkpointing_steps": 2, "gradient_accumulation_steps": 3, "train_batch_size": 2, "rank": None},
        {"checkpointing_steps": 3, "max_train_steps": 6, "lr_scheduler": "cosine", "lr_warmup_steps": 2},
        {"checkpointing_steps": 3, "max_train_steps": 6, "label_noise_prob": 0.5, "random_crop": True},
        {"checkpointing_steps": 3, "max_train_steps": 9, "logging_steps": 4},
        {"checkpointing_steps": 3, "mixed_precision": "bf16", "gradient_checkpointing": True},
        {"checkpointing_steps": 3, "max_train_steps": 14, "streaming": True, "shuffle_buffer_size": 9},
        {"checkpointing_steps": 13, "max_train_steps": 15, "streaming": True, "num_validation_pairs": 3},
        {"checkpointing_steps": 3, "max_train_steps": 5, "streaming": True, "dataloader_num_workers": 2},
    ],
    ids=[
        "epoch-end",
        "batch-over-epochs",
        "accumulation",
        "schedule",
        "draws",
        "log-window",
        "bf16",
        "streaming",
        "streaming-held-out",
        "streaming-workers",
    ],
)
def test_resumed_run_goes_on_as_the_uninterrupted_one(script, flags, tmp_path, changes):
    step = changes["checkpointing_steps"]
    flags.update(changes)
    whole = run(script, flags)
    flags.update(output_dir=tmp_path / "resumed", resume_from_checkpoint=whole / f"checkpoint-{step}")
    assert_goes_on(whole, run(script, flags), step)


@pytest.mark.parametrize("streaming", [None, True])
def test_two_restarts_in_a_row(script, flags, tmp_path, streaming):
    flags.update(checkpointing_steps=3, max_train_steps=10, streaming=streaming, shuffle_buffer_size=7)
    whole = run(script, flags)
    once = run(script, {**flags, "output_dir": tmp_path / "once", "resume_from_checkpoint": whole / "checkpoint-3"})
    twice = run(script, {**flags, "output_dir": tmp_path / "twice", "resume_from_checkpoint": once / "checkpoint-6"})
    assert_goes_on(whole, twice, 6)
    states = [json.loads((folder / "checkpoint-9" / "mapo_state.json").read_text()) for folder in (whole, twice)]
    for state in states:
        del state["args"]
    assert states[0] == states[1]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.matrix)])
@pytest.mark.parametrize("held_out", [None, 2], ids=["with a step", "in mid-window"])
@pytest.mark.parametrize("streaming", [None, True], ids=["map", "stream"])
def test_resumed_before_at_and_after_the_end_of_an_epoch(script, flags, tmp_path, streaming, held_out, workers):
    """Epochs of 48 pairs end with step 12, epochs of 46 between its two micro-steps; also over two restarts."""
    flags.update(streaming=streaming, num_validation_pairs=held_out, dataloader_num_workers=workers)
    flags.update(train_batch_size=2, gradient_accumulation_steps=2, max_train_steps=14, checkpointing_steps=1)
    flags.update(shuffle_buffer_size=10)
    whole = run(script, flags)

    def resume(name, checkpoint):
        return run(script, {**flags, "output_dir": tmp_path / name, "resume_from_checkpoint": checkpoint})

    before = resume("before", whole / "checkpoint-11")
    assert_goes_on(whole, before, 11)
    assert_goes_on(whole, resume("at", whole / "checkpoint-12"), 12)
    assert_goes_on(whole, resume("after", whole / "checkpoint-13"), 13)
    twice = resume("twice", before / "checkpoint-12")
    assert_goes_on(whole, twice, 12)
    assert_goes_on(whole, resume("thrice", twice / "checkpoint-13"), 13)


def test_map_style_run_goes_on_over_two_processes(script, flags, tmp_path):
    """
    The way back is among the tests of training. The pairs are the same in the same order; losses differ by roundings
    of float32, as each process sums up half of a batch. Relative 1e-5 are some 80 of them; Adam's epsilon is raised
    because it divides by gradients that may be no larger than their rounding.
    """
    flags.update(max_train_steps=14, checkpointing_steps=10, lr_scheduler="cosine", adam_epsilon=1e-5)
    whole = run(script, flags)
    flags.update(train_batch_size=2, output_dir=tmp_path / "two", resume_from_checkpoint=whole / "checkpoint-10")
    read = launch_recorded(flags, 2, tmp_path / "read")
    together = [row for start in range(0, 8, 2) for rows in read for row in rows[start : start + 2]]
    order = [np.random.default_rng([0, epoch]).permutation(48) for epoch in (0, 1)]
    assert together == [f"row {row}" for row in np.concatenate(order)[40:56]]
    assert_close(tmp_path / "two", whole, steps=range(11, 15))


def test_checkpoint_waits_for_the_end_of_the_accumulation_window(script, flags):
    flags.update(gradient_accumulation_steps=3, train_batch_size=2, checkpointing_steps=1, max_train_steps=2)
    out = run(script, flags)
    assert checkpoints(out) == ["checkpoint-1", "checkpoint-2"]
    states = [json.loads((out / name / "mapo_state.json").read_text()) for name in checkpoints(out)]
    assert [state["pairs_seen"] for state in states] == [6, 12]
    assert [state["rows_read"] for state in states] == [6, 12]


@pytest.mark.parametrize("by", ["path", "name", "latest"])
def test_checkpoint_is_found(script, flags, by):
    """By number: in the order of names checkpoint-5 would come after checkpoint-10."""
    flags.update(checkpointing_steps=5, max_train_steps=11)
    out = run(script, flags)
    shutil.rmtree(out / "logs")
    (out / "checkpoint-99-copy").mkdir()
    (out / "checkpoint-best").mkdir()
    asked = {"path": out / "checkpoint-10", "name": "checkpoint-10", "latest": "latest"}[by]
    run(script, {**flags, "resume_from_checkpoint": asked, "max_train_steps": 12})
    assert list(scalars(out)["loss"]) == [11, 12]


def test_latest_starts_a_new_run_where_there_is_none(script, flags, tmp_path):
    out = run(script, {**flags, "resume_from_checkpoint": "latest"})
    assert_same(out, run(script, {**flags, "output_dir": tmp_path / "new"}))


@pytest.mark.parametrize("asked", ["checkpoint-9", "no_checkpoint"])
def test_what_is_no_checkpoint_is_refused(script, flags, tmp_path, asked):
    (tmp_path / "no_checkpoint").mkdir()
    asked = tmp_path / asked if asked == "no_checkpoint" else asked
    with pytest.raises(script.TrainingError, match="--resume_from_checkpoint"):
        run(script, {**flags, "resume_from_checkpoint": asked})


@pytest.mark.parametrize("file", ["optimizer.bin", "pytorch_lora_weights.safetensors"])
def test_damaged_checkpoint_is_one_sentence(script, flags, file):
    folder = run(script, {**flags, "checkpointing_steps": 2}) / "checkpoint-2"
    (folder / file).write_bytes((folder / file).read_bytes()[:100])
    with pytest.raises(script.TrainingError, match=f"--resume_from_checkpoint {folder} cannot be loaded: ") as error:
        run(script, {**flags, "resume_from_checkpoint": folder})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rank", [4, None])
def test_resumed_run_with_nothing_left_to_do_ends_well(script, flags, tmp_path, rank):
    flags.update(rank=rank, checkpointing_steps=4, num_validation_pairs=4)
    whole = run(script, flags)
    resumed = run(
        script, {**flags, "output_dir": tmp_path / "again", "resume_from_checkpoint": whole / "checkpoint-4"}
    )
    assert_equal(trained(whole), trained(resumed))
    logged = scalars(resumed)
    assert "loss" not in logged
    assert logged["eval_loss"] == {4: scalars(whole)["eval_loss"][4]}
    assert (resumed / "README.md").exists()


def test_finished_run_can_be_prolonged(script, flags):
    """Its last checkpoint is where it goes on, and the final weights are replaced."""
    flags.update(checkpointing_steps=3, max_train_steps=3)
    before = trained(run(script, flags))
    flags.update(resume_from_checkpoint="latest", max_train_steps=6)
    after = trained(run(script, flags))
    whole = run(script, {**flags, "resume_from_checkpoint": None, "output_dir": flags["output_dir"] / "whole"})
    assert_equal(after, trained(whole))
    assert any(not torch.equal(before[name], after[name]) for name in after)


@pytest.mark.parametrize(
    ("name", "value"), [("rank", 2), ("rank", None), ("use_8bit_adam", True), ("streaming", True), ("seed", 1)]
)
def test_difference_that_makes_a_checkpoint_useless_is_refused(script, flags, name, value):
    flags.update(checkpointing_steps=1, max_train_steps=1)
    run(script, flags)
    with pytest.raises(script.TrainingError, match=f"--resume_from_checkpoint: --{name} is {value}, but"):
        run(script, {**flags, "resume_from_checkpoint": "latest", "max_train_steps": 2, name: value})


def differences(caplog):
    """The flags that warnings say to differ from the checkpoint's."""
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    return set(re.findall(r"--(\w+) is .*, but .* in .*checkpoint-1", "\n".join(warned)))


def test_other_differences_are_warned_of(script, flags, tmp_path, caplog):
    flags.update(checkpointing_steps=1, max_train_steps=1)
    run(script, flags)
    build_pipeline(tmp_path / "pipeline", seed=1)
    draw_pairs(tmp_path / "pairs", seed=1)
    flags.update(resume_from_checkpoint="latest", max_train_steps=2)
    caplog.clear()
    run(script, flags)
    assert not differences(caplog)
    changes = {
        "pretrained_model_name_or_path": tmp_path / "pipeline",
        "pretrained_vae_model_name_or_path": tmp_path / "pipeline" / "vae",
        "dataset_name": tmp_path / "pairs",
        "dataset_split_name": "train",
        "max_train_samples": 40,
        "num_validation_pairs": 4,
        "resolution": 32,
        "learning_rate": 1e-4,
        "lr_scheduler": "linear",
        "loss_type": "mapo_v1",
        "beta_mapo": 0.5,
    }
    state_file = flags["output_dir"] / "checkpoint-1" / "mapo_state.json"
    state = json.loads(state_file.read_text())
    state["args"]["flag_of_another_version"] = 3
    state_file.write_text(json.dumps(state))
    caplog.clear()
    run(script, {**flags, **changes, "resume_from_checkpoint": "checkpoint-1", "no-remove_ties": True})
    assert differences(caplog) == {*changes, "remove_ties", "flag_of_another_version"}


def test_seed_that_was_drawn_is_taken_over(script, flags, tmp_path):
    flags.update(checkpointing_steps=2, seed=None)
    whole = run(script, flags)
    flags.update(output_dir=tmp_path / "resumed", resume_from_checkpoint=whole / "checkpoint-2")
    assert_goes_on(whole, run(script, flags), 2)


# Written ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [4, None])
def test_checkpoint_holds_what_users_expect(script, flags, rank):
    flags.update(rank=rank, checkpointing_steps=4)
    out = run(script, flags)
    folder = out / "checkpoint-4"
    weights = (
        {"pytorch_lora_weights.safetensors"}
        if rank
        else {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    )
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == weights | {"optimizer.bin", "scheduler.bin", "random_states_0.pkl", "mapo_state.json"}
    assert_equal(trained(folder), trained(out))
    state = json.loads((folder / "mapo_state.json").read_text())
    assert (state["step"], state["pairs_seen"], state["rows_read"], state["rows_bad"]) == (4, 16, 16, 0)
    if rank is None:
        assert UNet2DConditionModel.from_pretrained(folder, subfolder="unet").dtype == torch.float32


@pytest.mark.parametrize(("limit", "kept"), [(None, [1, 2, 3, 4]), (1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])])
def test_newest_checkpoints_are_kept(script, flags, limit, kept):
    out = run(script, {**flags, "checkpointing_steps": 1, "checkpoints_total_limit": limit})
    assert checkpoints(out) == [f"checkpoint-{step}" for step in kept]
    assert not hidden(out)


def save_on_a_full_disk(accelerator, folder, **options):
    """The first checkpoint fits, the second does not."""
    SAVE_STATE(accelerator, folder, **options)
    if "checkpoint-4" in str(folder):
        (Path(folder) / "optimizer.bin").write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")


def test_failed_save_leaves_the_older_checkpoint_alone(script, flags, tmp_path, monkeypatch):
    flags.update(checkpointing_steps=2, checkpoints_total_limit=1, max_train_steps=5)
    whole = run(script, {**flags, "output_dir": tmp_path / "whole"})
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "save_state", save_on_a_full_disk)
        with pytest.raises(script.TrainingError, match="checkpoint-4 could not be written.*No space"):
            run(script, flags)
    out = flags["output_dir"]
    assert [name for name in checkpoints(out) if not name.startswith(".")] == ["checkpoint-2"]
    run(script, {**flags, "resume_from_checkpoint": "latest"})
    assert_same(whole, out)
    assert checkpoints(out) == ["checkpoint-4"]


def remove_one_file_only(folder, *args, **kwargs):
    """Interrupted while it removes checkpoint-2."""
    if "checkpoint-2" in str(folder) and Path(folder).exists():
        next(Path(folder).glob("mapo_state.json")).unlink()
        raise KeyboardInterrupt
    REMOVE_TREE(folder, *args, **kwargs)


def test_interrupted_pruning_leaves_only_whole_checkpoints(script, flags, tmp_path, monkeypatch):
    flags.update(checkpointing_steps=2, checkpoints_total_limit=1, max_train_steps=5)
    whole = run(script, {**flags, "output_dir": tmp_path / "whole"})
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", remove_one_file_only)
        with pytest.raises(KeyboardInterrupt):
            run(script, flags)
    out = flags["output_dir"]
    assert [name for name in checkpoints(out) if not name.startswith(".")] == ["checkpoint-4"]
    run(script, {**flags, "resume_from_checkpoint": "latest"})
    assert_same(whole, out)
    assert not hidden(out)


def test_half_written_checkpoint_is_ignored_and_cleaned_away(script, flags, tmp_path):
    flags.update(checkpointing_steps=2)
    whole = run(script, {**flags, "output_dir": tmp_path / "whole"})
    out = run(script, {**flags, "max_train_steps": 3})
    shutil.copytree(out / "checkpoint-2", out / ".checkpoint-3.incomplete")
    run(script, {**flags, "resume_from_checkpoint": "latest"})
    assert_same(whole, out)
    assert not hidden(out)


def test_checkpoint_of_the_same_step_is_replaced(script, flags, tmp_path):
    """An output folder used again: the new run's checkpoint takes the place of the old one."""
    flags.update(checkpointing_steps=2, max_train_steps=2)
    fresh = run(script, {**flags, "output_dir": tmp_path / "fresh"})
    run(script, {**flags, "seed": 1})
    out = run(script, flags)
    assert_equal(trained(fresh / "checkpoint-2"), trained(out / "checkpoint-2"))
    assert checkpoints(out) == ["checkpoint-2"] and not hidden(out)
