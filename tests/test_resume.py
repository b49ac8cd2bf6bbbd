"""What a resumed run must not depend on, and what must never be mistaken for a checkpoint or a result."""

import collections
import contextlib
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import threading
from types import SimpleNamespace

import cpu_cluster
import numpy as np
import pytest
from conftest import SCRIPT, also, command_line, run
from cpu_cluster import EVERY_CALL, Fault, install, killed, with_faults
from filelock import FileLock
from small_world import draw_pairs
from test_checkpoints import SHARDED, STATE
from test_faults import assert_one_sentence, checkpoints, run_ranks, run_ranks_well
from test_training import LORA_WEIGHTS, assert_close, assert_equal, trained


# The pairs of a step ------------------------------------------------------------------------------------------------
# Batch size and accumulation of a step of four pairs on one process.
SPLITS = {"4 x 1": (4, 1), "2 x 2": (2, 2), "1 x 4": (1, 4)}


def split_flags(flags, split):
    batch_size, accumulation = SPLITS[split]
    return {**flags, "train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pair if pair in (("4 x 1", "2 x 2"), ("1 x 4", "2 x 2")) else also(*pair)
        for pair in itertools.permutations(SPLITS, 2)
    ],
)
def test_any_split_of_the_pairs_of_a_step_resumes_to_the_same_run(script, flags, tmp_path, before, after):
    """accelerate's counter of batches is kept in checkpoints: here it stands in the middle of a step afterwards."""
    flags.update(max_train_steps=6, checkpointing_steps=3, adam_epsilon=1e-5)
    whole = run(script, split_flags({**flags, "output_dir": tmp_path / "whole"}, after))
    run(script, split_flags({**flags, "max_train_steps": 3}, before))

    resumed = run(script, split_flags({**flags, "resume_from_checkpoint": "latest"}, after))

    assert_close(resumed, whole)


def test_two_processes_resume_a_run_of_one_with_another_accumulation(script, flags, tmp_path):
    """Three batches of one process, up to step 5, and then two on each of two: 12 pairs per step either way."""
    flags.update(checkpointing_steps=5, max_train_steps=7, adam_epsilon=1e-5)
    one = {"train_batch_size": 4, "gradient_accumulation_steps": 3}
    two = {"train_batch_size": 3, "gradient_accumulation_steps": 2}
    whole = run(script, {**flags, **one, "output_dir": tmp_path / "whole"})
    run(script, {**flags, **one, "max_train_steps": 5})

    resumed = run_ranks_well({**flags, **two, "resume_from_checkpoint": "latest"})

    assert_close(resumed, whole)


@pytest.mark.parametrize("kind", [also("zero2"), also("zero3"), also("fsdp2")])
def test_sharded_run_resumes_with_another_accumulation(script, flags, tmp_path, kind):
    flags.update(checkpointing_steps=3, max_train_steps=6, adam_epsilon=1e-5)
    whole = run(script, {**flags, "output_dir": tmp_path / "whole"})
    env = {"ACCELERATE_USE_CPU": "false", **SHARDED[kind]}
    first = {"train_batch_size": 2, "max_train_steps": 3}
    second = {"train_batch_size": 1, "gradient_accumulation_steps": 2, "resume_from_checkpoint": "latest"}

    for changes in (first, second):
        words = [*with_faults({}), SCRIPT, *command_line({**flags, **changes})]
        statuses, outputs = cpu_cluster.run_ranks(words, env=env)
        assert statuses == [0, 0], outputs

    assert_close(flags["output_dir"], whole)


# The latest checkpoint ----------------------------------------------------------------------------------------------
def test_all_ranks_resume_from_the_checkpoint_that_the_main_process_finds(flags, tmp_path):
    """The second process gets a stale listing, as from a network file system."""
    flags.update(train_batch_size=2, checkpointing_steps=2)
    whole = run_ranks_well({**flags, "output_dir": tmp_path / "whole"})
    run_ranks_well({**flags, "max_train_steps": 2})
    stale = Fault("listing", EVERY_CALL, cpu_cluster.nothing_listed)

    statuses, outputs = run_ranks({**flags, "resume_from_checkpoint": "latest"}, {1: [stale]})

    assert statuses == [0, 0], outputs
    assert_equal(trained(flags["output_dir"]), trained(whole))


def test_checkpoint_that_one_rank_cannot_read_is_an_error_on_all(flags):
    flags.update(train_batch_size=2, max_train_steps=2)
    out = run_ranks_well(flags)
    missing = Fault("reading", EVERY_CALL, cpu_cluster.no_state_file)

    statuses, outputs = run_ranks({**flags, "resume_from_checkpoint": "latest", "max_train_steps": 4}, {1: [missing]})

    assert_one_sentence(statuses, outputs, str(out / "checkpoint-2"), "shared storage")


def test_copies_of_checkpoints_under_other_names_are_left_alone(script, flags):
    flags.update(checkpointing_steps=1, checkpoints_total_limit=1, max_train_steps=2)
    out = run(script, flags)
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-2-good")
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-best")

    run(script, {**flags, "resume_from_checkpoint": "latest", "max_train_steps": 4})

    names = sorted(path.name for path in out.glob("checkpoint-*"))
    assert names == ["checkpoint-2-good", "checkpoint-4", "checkpoint-best"]


def test_checkpoint_that_was_moved_and_linked_belongs_to_the_same_run(script, flags, tmp_path):
    flags.update(checkpointing_steps=2, max_train_steps=2, checkpoints_total_limit=1)
    out = run(script, flags)
    run_id = json.loads((out / "checkpoint-2" / STATE).read_text())["run_id"]
    shutil.move(out / "checkpoint-2", tmp_path / "moved")
    (out / "checkpoint-2").symlink_to(tmp_path / "moved")

    run(script, {**flags, "resume_from_checkpoint": out / "checkpoint-2", "max_train_steps": 4})

    assert json.loads((out / "checkpoint-4" / STATE).read_text())["run_id"] == run_id
    # Beyond the limit the link goes, and what somebody has moved stays.
    assert not (out / "checkpoint-2").exists() and (tmp_path / "moved" / STATE).exists()


# Power failures and kills -------------------------------------------------------------------------------------------
def test_files_are_on_the_disk_before_a_checkpoint_counts_and_older_ones_go(script, flags, monkeypatch):
    """The order of syncing, renaming and removing is what a power failure tests."""
    events = []
    fsync, replace, rmtree = os.fsync, os.replace, shutil.rmtree

    def note_fsync(descriptor):
        events.append(("sync", pathlib.Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def note_replace(source, target):
        events.append(("rename", pathlib.Path(target)))
        replace(source, target)

    def note_rmtree(path, *args, **kwargs):
        events.append(("remove", pathlib.Path(path)))
        rmtree(path, *args, **kwargs)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    monkeypatch.setattr(shutil, "rmtree", note_rmtree)
    flags.update(checkpointing_steps=2, checkpoints_total_limit=1)

    out = run(script, flags)

    folder = out / "checkpoint-4"
    renamed = events.index(("rename", folder / STATE))
    synced = {path for event, path in events[:renamed] if event == "sync"}
    others = {path for path in folder.rglob("*") if path.name != STATE}
    assert others | {folder} <= synced
    assert any(event == "sync" and path.name.startswith(f".{STATE}") for event, path in events[:renamed])
    removed = events.index(("remove", out / "checkpoint-2"))
    assert ("sync", folder) in events[renamed:removed]
    weights = events.index(("rename", out / LORA_WEIGHTS))
    assert ("sync", out / ".incomplete" / LORA_WEIGHTS) in events[:weights]


@pytest.mark.parametrize("content", ["", "{", '{"step": '])
def test_checkpoint_whose_state_cannot_be_read_is_passed_over(script, flags, content):
    flags.update(checkpointing_steps=2, max_train_steps=4)
    out = run(script, flags)
    weights = trained(out)
    (out / "checkpoint-4" / STATE).write_text(content)

    run(script, {**flags, "resume_from_checkpoint": "latest"})

    assert checkpoints(out) == [2, 4]
    assert_equal(trained(out), weights)


def test_state_of_another_version_is_an_error(script, flags):
    out = run(script, {**flags, "max_train_steps": 2})
    state = json.loads((out / "checkpoint-2" / STATE).read_text())
    del state["run_id"]
    (out / "checkpoint-2" / STATE).write_text(json.dumps(state))

    with pytest.raises(script.TrainingError, match="checkpoint-2 was written by another version"):
        run(script, {**flags, "resume_from_checkpoint": "latest"})


@pytest.mark.parametrize("rank", [4, None], ids=["LoRA", "full"])
def test_run_killed_while_it_writes_its_result_starts_again(script, flags, tmp_path, rank):
    """Before its first checkpoint: a half-written result must not look like one of another run."""
    flags.update(rank=rank, max_train_steps=2)
    place = "lora" if rank else "replace"
    whole = run(script, {**flags, "output_dir": tmp_path / "whole"})
    statuses, outputs = run_ranks(flags, {0: [Fault(place, (1,), killed)]}, size=1)
    assert statuses == [-signal.SIGKILL], outputs

    again = run(script, flags)

    assert_equal(trained(again), trained(whole))
    assert not (again / ".incomplete").exists()


def test_two_runs_cannot_write_to_one_folder(script, flags):
    """The lock is the system's, so that a killed run leaves none behind."""
    flags["output_dir"].mkdir()
    held = threading.Event()
    done = threading.Event()

    def hold():
        with FileLock(flags["output_dir"] / ".lock"):
            held.set()
            done.wait()

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    try:
        with pytest.raises(script.TrainingError, match="--output_dir .*another run is writing to this folder"):
            run(script, flags)
    finally:
        done.set()
        other.join()

    run(script, flags)


def test_second_launch_into_the_folder_of_a_running_one_is_refused(script, flags, monkeypatch):
    """The second run starts while the first one is in its second step."""
    results = []

    def launch_second(call):
        results.append(run_ranks(flags, size=1))
        return call()

    install(Fault("step", (2,), launch_second), monkeypatch.setattr)

    run(script, flags)

    statuses, outputs = results[0]
    assert_one_sentence(statuses, outputs, "another run is writing to this folder")


# Other flags --------------------------------------------------------------------------------------------------------
def test_precision_cannot_change_when_a_run_resumes(script, flags):
    """A checkpoint without fp16 lacks the state of its gradient scaler."""
    flags.update(max_train_steps=1)
    run(script, flags)

    changes = {"mixed_precision": "bf16", "resume_from_checkpoint": "latest", "max_train_steps": 2}
    with pytest.raises(script.TrainingError, match="mixed_precision is bf16, but no in .*checkpoint-1"):
        run(script, {**flags, **changes})


def test_other_pairs_are_reported(script, flags, caplog):
    run(script, {**flags, "max_train_steps": 1})

    changes = {"max_train_samples": 20, "resume_from_checkpoint": "latest", "max_train_steps": 2}
    run(script, {**flags, **changes})

    assert "checkpoint-1 was trained on other pairs" in caplog.text


def test_epochs_end_after_the_same_pairs_on_another_number_of_processes(script, flags):
    """An epoch of 48 pairs: 4 pairs in each of 6 steps, and then 8 in each of 3."""
    run(script, {**flags, "max_train_steps": 6})

    out = run(
        script,
        {**flags, "max_train_steps": None, "train_batch_size": 8, "resume_from_checkpoint": "latest"},
    )

    state = json.loads((out / "checkpoint-9" / STATE).read_text())
    assert state["pairs_seen"] == 48


def test_another_dataset_is_reported_once(script, flags, tmp_path, caplog):
    """From then on, the checkpoints belong to it."""
    run(script, {**flags, "max_train_steps": 1})
    draw_pairs(tmp_path / "others", num_pairs=20)
    resume = {"dataset_name": tmp_path / "others", "resume_from_checkpoint": "latest"}

    run(script, {**flags, **resume, "max_train_steps": 2})
    assert "was trained on other pairs" in caplog.text
    caplog.clear()
    run(script, {**flags, **resume, "max_train_steps": 3})

    assert "was trained on other pairs" not in caplog.text


def test_processes_wait_hours_for_each_other(script, flags):
    """One of them may download the model, or write 30 GB to a slow disk."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()

    accelerator = script.build_accelerator(script.parse_args(command_line(flags)))

    assert accelerator.init_handler.timeout.total_seconds() >= 3600


# Memory of a stream -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("lanes", "processes", "workers", "bound"),
    [(64, 4, 8, 8), (64, 8, 8, 4), (64, 1, 0, 256), (8, 1, 2, 16)],
)
def test_process_keeps_the_row_groups_of_its_own_lanes_only(script, monkeypatch, lanes, processes, workers, bound):
    """A run that began with 64 lanes (8 GPUs x 8 workers), resumed on 4 x 8, keeps 2 lanes x 4 row groups in each."""
    sizes = 512 * [10]
    index = np.array([(shard, row, 0) for shard, size in enumerate(sizes) for row in range(size)])
    layout = script.Layout(shards_mixed=4, lanes=lanes, turn=2)
    rows = script.StreamedRows(["file"], SimpleNamespace(all=list), shards_kept=4)
    rows.row_groups = [(0, shard, 0) for shard in range(len(sizes))]
    row_group = SimpleNamespace(read_row_group=lambda number, names: number)
    monkeypatch.setattr(script, "open_parquet", lambda file: contextlib.nullcontext(row_group))
    most = 0

    for worker in range(max(workers, 1)):
        rows.kept = {}
        batches = script.training_batches(index, 0, layout, 2, 0, process_index=0, num_processes=processes)
        for number, batch in enumerate(itertools.islice(batches, 600)):
            if number % max(workers, 1) == worker:
                for visit in batch:
                    with pytest.raises(AttributeError):  # a number stands for the row group
                        rows.record(index[visit.pair, 0], 0, visit.lane)
                most = max(most, sum(len(kept) for kept in rows.kept.values()))

    assert most <= bound
    assert most > bound / 4


# Bad rows and workers -----------------------------------------------------------------------------------------------
def test_few_bad_rows_below_the_limit_stop_no_run(script):
    """0.4 % of bad rows under a limit of 1 %: 22 % of these runs were stopped when two rows were enough."""
    rng = np.random.default_rng(0)
    stopped = collections.Counter()

    for run_number in range(1000):
        progress = script.Progress(run_id="", layout=script.Layout(), index_hash="")
        for bad in rng.binomial(16, 0.004, size=300):
            progress.count_step(16, int(bad), finite=True)
            if script.find_fault(progress, 10, 0.01) is not None:
                stopped[run_number] += 1
                break

    assert len(stopped) < 20


def test_too_many_bad_rows_are_noticed(script):
    progress = script.Progress(run_id="", layout=script.Layout(), index_hash="")

    progress.count_step(100, 10, finite=True)

    assert "--max_bad_rows 0.01: 10 of 110 rows" in script.find_fault(progress, 10, 0.01)
    progress.rows_bad = 1
    assert "--max_bad_rows 0: 1 of 110 rows" in script.find_fault(progress, 10, 0)


def test_killed_loader_worker_ends_the_run_with_a_checkpoint(script, flags, tmp_path):
    """As when memory runs out. The step in progress is completed first."""
    whole = run(script, {**flags, "output_dir": tmp_path / "whole", "max_train_steps": 6})
    flags.update(dataloader_num_workers=2, max_train_steps=6)

    statuses, outputs = run_ranks(flags, {0: [Fault("step", (3,), cpu_cluster.workers_killed)]}, size=1)

    assert_one_sentence(statuses, outputs, "cannot be read any further (the checkpoint of step ")
    # Which one PyTorch raises depends on whether the worker was sending a batch.
    assert re.search("DataLoader worker|ConnectionResetError|EOFError", outputs[0])
    assert len(checkpoints(flags["output_dir"])) == 1
    run(script, {**flags, "resume_from_checkpoint": "latest"})
    assert_equal(trained(flags["output_dir"]), trained(whole))
