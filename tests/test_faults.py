"""Full disks, broken sources, lost trackers and non-finite gradients: what was trained is kept, bit for bit."""

import os
import re
import shutil
import subprocess
from functools import partial

import cpu_cluster as cluster
import pytest
import torch
from conftest import command_line, matrix, run, scalars
from cpu_cluster import Fault, full_disk, install, not_finite, raising
from runs import (
    VALIDATION,
    assert_equal,
    assert_exact,
    assert_one_error,
    checkpoints,
    differ,
    files_in,
    read_state,
    run_ranks,
    run_ranks_successfully,
    train_error,
    trained,
)
from small_world import draw_pairs


STREAMED = {"streaming": True, "shuffle_shards": 1}
GONE = ConnectionError("Couldn't reach the hub")


# Waiting ranks ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("streaming", "place", "lock"),
    [matrix(None, "prepare", "_builder.lock"), (True, "file", ".safetensors.lock")],
    ids=["dataset", "index"],
)
def test_a_rank_waits_at_a_lock_while_the_other_prepares_pairs(flags, tmp_path, streaming, place, lock):
    """In a collective it would wait no longer than the timeout of the process group."""
    flags.update(train_batch_size=2, max_train_steps=1, cache_dir=tmp_path / "cache", streaming=streaming)
    asking = Fault("lock", cluster.EVERY_CALL, partial(cluster.noting_lock, tmp_path))
    slow = Fault(place, (1,), partial(cluster.waiting_for_the_ranks, tmp_path, lock, 2))

    run_ranks_successfully(flags, {0: [asking, slow], 1: [asking, slow]})


def test_ranks_synchronize_while_they_fill_a_cache(script, flags, tmp_path):
    """If one rank fails at its first pair, the other stops after its first round."""
    draw_pairs(tmp_path / "pairs", num_pairs=3 * script.PAIRS_PER_ROUND, num_shards=1)
    flags.update(dataset_name=tmp_path / "pairs", cache_dir=tmp_path / "cache", cache_latents=True, train_batch_size=2)
    # The first two images that a rank encodes are a trial.
    fault = Fault("encode", (3,), partial(raising, RuntimeError("out of memory")))

    statuses, outputs = run_ranks(flags, {1: [fault]})

    assert_one_error(statuses, outputs, "--cache_latents: pairs could not be encoded into ", "out of memory")
    assert len(list(tmp_path.glob("cache/mapo_latents/*/*/*.safetensors"))) == script.PAIRS_PER_ROUND


@pytest.mark.parametrize("place", ["upload", matrix("tracker end")])
def test_no_rank_waits_for_uploads_and_trackers(flags, tmp_path, place):
    """A slow one must not exceed the timeout of the process group, so the group no longer exists."""
    flags.update(train_batch_size=2, max_train_steps=1, push_to_hub=True)
    faults = [
        Fault("repository", (1,), cluster.created),
        Fault("upload", (1,), partial(cluster.noting_process_group, tmp_path / "upload")),
        Fault("tracker end", (1,), partial(cluster.noting_process_group, tmp_path / "tracker end")),
    ]

    run_ranks_successfully(flags, {0: faults})

    assert (tmp_path / place).read_text() == "False\n"


# Gradients ----------------------------------------------------------------------------------------------------------
def assert_nothing_trained_between(checkpoint, other):
    """Weights and optimizer states are equal."""
    assert_equal(trained(checkpoint), trained(other))
    states = torch.load(checkpoint / "optimizer.bin")["state"]
    others = torch.load(other / "optimizer.bin")["state"]
    assert states.keys() == others.keys()
    assert len(states) > 0
    for name, state in states.items():
        assert_equal(state, others[name])


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_steps_with_a_non_finite_gradient_are_skipped(script, flags, monkeypatch, caplog, kind):
    """In the second batch of step 3 and in the first batch of step 4."""
    flags.update(max_train_steps=5, checkpointing_steps=1, train_batch_size=2, gradient_accumulation_steps=2)
    install(Fault("step", (6, 7), partial(not_finite, kind)), monkeypatch.setattr)

    out = run(script, flags)

    assert_nothing_trained_between(out / "checkpoint-2", out / "checkpoint-3")
    assert_nothing_trained_between(out / "checkpoint-2", out / "checkpoint-4")
    assert differ(trained(out / "checkpoint-4"), trained(out))
    for name, weight in trained(out).items():
        assert weight.isfinite().all(), name
    warnings = re.findall(r"Step (\d+): non-finite gradient, update skipped \((\d+) in a row\)", caplog.text)
    assert warnings == [("3", "1"), ("4", "2")]
    assert scalars(out)["skipped_steps"] == {1: 0, 2: 0, 3: 1, 4: 2, 5: 2}
    assert list(scalars(out)["loss"]) == [1, 2, 5]
    assert read_state(out / "checkpoint-5")["bad_steps"] == 0


def test_bad_steps_are_counted_and_stop_the_run_also_across_restarts(script, flags, monkeypatch):
    """
    Step 2 is not in a row with the others, step 4 is the last one before the restart. The step of the fault is logged.
    """
    flags.update(max_train_steps=7, checkpointing_steps=4, max_bad_steps=2)
    bad = partial(not_finite, "loss")
    with monkeypatch.context() as patch:
        install(Fault("step", (2, 4), bad), patch.setattr)
        run(script, {**flags, "max_train_steps": 4})

    install(Fault("step", (1,), bad), monkeypatch.setattr)
    error = train_error(script, {**flags, "resume_from_checkpoint": "latest", "logging_steps": 100})

    assert "--max_bad_steps 2: no finite gradient in the last 2 steps (the checkpoint of step 5" in error
    assert checkpoints(flags["output_dir"]) == [4, 5]
    assert scalars(flags["output_dir"])["skipped_steps"] == {1: 0, 2: 1, 3: 1, 4: 2, 5: 3}


def test_warning_of_a_bad_step_names_its_rows(script, flags, monkeypatch, caplog):
    flags.update(max_train_steps=3)
    install(Fault("step", (2,), partial(not_finite, "loss")), monkeypatch.setattr)

    run(script, flags)

    pairs, _ = script.load_pairs(script.parse_args(command_line(flags)), (4, 8, 8), 1000)
    rows = script.epoch_order(pairs.index, 0, 0, script.Layout(4, 1, 4))[4:8]
    (named,) = re.findall(r"Step 2: .* Pairs on process 0: (.*)\.", caplog.text)
    assert sorted(named.split(", ")) == sorted(f"row {row}" for row in rows)


def test_ranks_agree_on_a_bad_step_of_one_of_them(flags):
    flags.update(train_batch_size=2, max_train_steps=9, checkpointing_steps=1, max_bad_steps=2)
    fault = Fault("step", (2, 4, 5), partial(not_finite, "loss"))

    statuses, outputs = run_ranks(flags, {1: [fault]})

    assert_one_error(statuses, outputs, "--max_bad_steps 2: no finite gradient in the last 2 steps")
    for rank, output in enumerate(outputs):
        warning = rf"Step 5: non-finite gradient.* Pairs on process {rank}: row \d+, row \d+\."
        assert len(re.findall(warning, output)) == 1
    out = flags["output_dir"]
    assert checkpoints(out) == [1, 2, 3, 4, 5]
    assert_nothing_trained_between(out / "checkpoint-1", out / "checkpoint-2")
    assert_nothing_trained_between(out / "checkpoint-3", out / "checkpoint-4")


# Disks --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rank", "victim", "size"),
    [(4, 1, 1_000), matrix(4, 0, 10_000), matrix(None, 0, 100_000)],
)
def test_full_disk_on_one_rank_stops_all_and_costs_only_that_checkpoint(flags, uninterrupted, rank, victim, size):
    flags.update(train_batch_size=2, max_train_steps=3, checkpointing_steps=1, rank=rank, checkpoints_total_limit=1)
    out = flags["output_dir"]

    statuses, outputs = run_ranks(flags, {victim: [Fault("checkpoint", (2,), partial(full_disk, size))]})
    kept = checkpoints(out)
    was_started = (out / "checkpoint-2").exists()
    run_ranks_successfully({**flags, "resume_from_checkpoint": "latest"})

    assert_one_error(
        statuses, outputs, f"{out / 'checkpoint-2'} could not be written; older checkpoints are untouched"
    )
    assert kept == [1]
    assert was_started
    assert checkpoints(out) == [3]
    assert_exact(uninterrupted(flags, size=2), out)


@pytest.fixture
def small_disk(tmp_path):
    """A separate file system; only root can mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file system")
@pytest.mark.parametrize(
    ("rank", "room", "size"),
    [(4, 40_960, 1), matrix(4, None, 1), matrix(None, 0, 1), matrix(4, 40_960, 2)],
)
def test_full_or_read_only_file_system(script, flags, small_disk, uninterrupted, rank, room, size):
    """The tracker writes to it as well."""
    out = small_disk / "out"
    flags.update(train_batch_size=4 // size, max_train_steps=3, checkpointing_steps=1, rank=rank, output_dir=out)
    fault = Fault("checkpoint", (2,), partial(cluster.shrink_disk, small_disk, room))

    statuses, outputs = run_ranks(flags, {0: [fault]}, size)
    kept = checkpoints(out)
    cluster.remount(small_disk, "rw,size=64m")
    resumed = {**flags, "resume_from_checkpoint": "latest"}
    if size == 1:
        run(script, resumed)
    else:
        run_ranks_successfully(resumed)

    assert_one_error(statuses, outputs, f"{out / 'checkpoint-2'} could not be written")
    assert kept == [1]
    assert_equal(trained(out), trained(uninterrupted(flags, size)))


def test_disk_that_is_full_at_the_end(flags):
    """Step 3 has no checkpoint of its own when the final weights cannot be saved."""
    flags.update(max_train_steps=3, checkpointing_steps=2)
    fault = Fault("lora", (2,), partial(full_disk, 10_000))

    statuses, outputs = run_ranks(flags, {0: [fault]}, size=1)

    assert_one_error(statuses, outputs, f"{flags['output_dir']} could not be written")
    assert checkpoints(flags["output_dir"]) == [2]


# Sources ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def own_pairs(flags, tmp_path):
    """Pairs that a test may damage, in twelve row groups of four, with a copy."""
    flags.update(dataset_name=tmp_path / "pairs", cache_dir=tmp_path / "cache")
    draw_pairs(tmp_path / "pairs", num_pairs=48, num_shards=3, row_group_size=4)
    shutil.copytree(tmp_path / "pairs", tmp_path / "copy")
    return tmp_path / "pairs"


def restore(own_pairs):
    shutil.copytree(own_pairs.parent / "copy", own_pairs, dirs_exist_ok=True)


def damaged(how, folder, call=lambda: None):
    for path in sorted(folder.glob("data/*.parquet")):
        size = path.stat().st_size
        if how == "removed":
            path.unlink()
        elif how == "truncated":
            os.truncate(path, size // 3)
        else:
            path.write_bytes(b"garbage " * (size // 8))
    return call()


@pytest.mark.parametrize(
    ("how", "changes"),
    [
        ("removed", {}),
        matrix("truncated", {}),
        matrix("garbage", {"train_batch_size": 2, "gradient_accumulation_steps": 3}),
        ("hub", {"train_batch_size": 2, "gradient_accumulation_steps": 3}),
    ],
    ids=["removed", "truncated", "garbage-accumulation", "hub-accumulation"],
)
def test_source_that_fails_during_training(script, flags, uninterrupted, own_pairs, monkeypatch, how, changes):
    """The run stops with a checkpoint of the last step that it had all pairs for."""
    flags.update(STREAMED, max_train_steps=5 if changes else 8, **changes)
    expected = uninterrupted(flags)
    fault = Fault("step", (3,), partial(damaged, how, own_pairs))
    if how == "hub":
        fault = Fault("source", (4,), partial(raising, GONE))

    with monkeypatch.context() as patch:
        install(fault, patch.setattr)
        error = train_error(script, flags)
    (step,) = checkpoints(flags["output_dir"])
    restore(own_pairs)
    out = run(script, {**flags, "resume_from_checkpoint": "latest"})

    assert f"--dataset_name {own_pairs} cannot be read any further (the checkpoint of step {step} is saved): " in error
    assert how != "hub" or str(GONE) in error
    assert_exact(expected, out)


@pytest.mark.matrix
def test_source_that_fails_under_loader_workers(script, flags, uninterrupted, own_pairs):
    flags.update(STREAMED, dataloader_num_workers=2, max_train_steps=8)
    expected = uninterrupted(flags)
    fault = Fault("step", (3,), partial(damaged, "removed", own_pairs))

    statuses, outputs = run_ranks(flags, {0: [fault]}, size=1)
    (step,) = checkpoints(flags["output_dir"])
    restore(own_pairs)
    out = run(script, {**flags, "resume_from_checkpoint": "latest"})

    message = f"--dataset_name {own_pairs} cannot be read any further (the checkpoint of step {step} is saved)"
    assert_one_error(statuses, outputs, message, "FileNotFoundError")
    assert_exact(expected, out)


def test_source_that_fails_on_one_rank_stops_all(flags, uninterrupted, own_pairs):
    flags.update(STREAMED, train_batch_size=2, max_train_steps=5, gradient_accumulation_steps=2)

    statuses, outputs = run_ranks(flags, {1: [Fault("source", (4,), partial(raising, GONE))]})
    kept = checkpoints(flags["output_dir"])
    out = run_ranks_successfully({**flags, "resume_from_checkpoint": "latest"})

    message = f"--dataset_name {own_pairs} cannot be read any further (the checkpoint of step "
    assert_one_error(statuses, outputs, message, str(GONE))
    assert len(kept) == 1
    assert_exact(uninterrupted(flags, size=2), out)


def test_held_out_pairs_that_one_rank_cannot_read_stop_all(flags):
    flags.update(streaming=True, train_batch_size=2, num_validation_pairs=8)

    statuses, outputs = run_ranks(flags, {1: [Fault("held out", (1,), partial(raising, GONE))]})

    assert_one_error(statuses, outputs, "The held-out pairs cannot be read", str(GONE))


@pytest.mark.parametrize(("call", "reason"), [(1, "cannot be trained on"), (2, "cannot be read")])
def test_source_that_fails_before_the_first_step(script, flags, own_pairs, monkeypatch, call, reason):
    """The first pair is read as a trial. The first batch then needs a second row group."""
    flags.update(STREAMED, train_batch_size=8)
    script.load_pairs(script.parse_args(command_line(flags)), (4, 8, 8), 1000)
    install(Fault("source", (call,), partial(raising, GONE)), monkeypatch.setattr)

    error = train_error(script, flags)

    assert f"--dataset_name {own_pairs} {reason}: " in error
    assert str(GONE) in error
    assert checkpoints(flags["output_dir"]) == []


def test_broken_shards_are_noticed_at_the_start(script, flags, own_pairs):
    damaged("truncated", own_pairs)

    error = train_error(script, flags)

    assert f"--dataset_name {own_pairs} cannot be read: " in error


def test_broken_shards_give_one_error_on_two_ranks(flags, own_pairs):
    damaged("truncated", own_pairs)

    statuses, outputs = run_ranks({**flags, "streaming": True})

    assert_one_error(statuses, outputs, f"--dataset_name {own_pairs} cannot be read")


def test_prepared_pairs_no_longer_need_their_files(script, flags, uninterrupted, own_pairs, monkeypatch):
    expected = uninterrupted(flags)
    install(Fault("step", (2,), partial(damaged, "removed", own_pairs)), monkeypatch.setattr)

    out = run(script, flags)

    assert_exact(expected, out)


# Trackers -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("place", "first"), [("log", 3), ("log images", 1), ("tracker end", 1)])
def test_tracker_that_dies_does_not_stop_training(script, flags, uninterrupted, monkeypatch, place, first):
    flags.update(max_train_steps=4, validation_steps=2, checkpointing_steps=2, **VALIDATION)
    expected = uninterrupted(flags)
    gone = partial(raising, BrokenPipeError("the tracker is gone"))
    install(Fault(place, cluster.EVERY_CALL[first - 1 :], gone), monkeypatch.setattr)

    out = run(script, flags)

    assert_equal(trained(out), trained(expected))
    assert files_in(out / "validation") == files_in(expected / "validation")
    assert checkpoints(out) == [2, 4]


UNREACHABLE = {
    "WANDB_MODE": "online",
    "WANDB_INIT_TIMEOUT": "5",
    "WANDB_BASE_URL": "http://127.0.0.1:9",
    "WANDB_API_KEY": 40 * "0",
}


@pytest.mark.parametrize(
    ("faults", "env"),
    [([Fault("step", (2,), cluster.wandb_killed)], {}), matrix([], UNREACHABLE)],
    ids=["killed", "unreachable"],
)
def test_wandb_that_is_killed_or_unreachable_does_not_stop_training(flags, uninterrupted, faults, env):
    flags.update(report_to="wandb", validation_steps=2, **VALIDATION)

    statuses, outputs = run_ranks(flags, {0: faults}, size=1, env=env)

    assert statuses == [0], outputs
    assert "training continues without trackers" in outputs[0]
    assert_equal(trained(flags["output_dir"]), trained(uninterrupted({**flags, "report_to": "tensorboard"})))
