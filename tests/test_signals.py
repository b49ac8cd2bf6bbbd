"""Signals and kill -9: an interrupted run exits with a checkpoint, and resuming it changes nothing."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import cpu_cluster as cluster
import psutil
import pytest
from conftest import SCRIPT, command_line, launch, matrix, run
from cpu_cluster import Fault, install, raising, signalled, signalled_after
from runs import (
    LORA_WEIGHTS,
    STOPPED,
    VALIDATION,
    assert_exact,
    checkpoints,
    files_in,
    run_ranks,
    run_ranks_successfully,
    run_to_status,
    trained,
)


OUT_OF_MEMORY = RuntimeError("out of memory")


# In this process ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("data", "place", "call", "action", "number", "expected"),
    [
        # In the validation of step 2, which is then completed.
        ("map", "evaluation", 6, signalled, signal.SIGINT, [3]),
        matrix("stream", "evaluation", 3, signalled, signal.SIGTERM, [3]),
        matrix("map", "generation", 5, signalled, signal.SIGUSR1, [3]),
        matrix("stream", "generation", 5, signalled, signal.SIGINT, [3]),
        # In step 4; with accumulation, between its two batches.
        matrix("map", "step", 7, signalled, signal.SIGTERM, [3, 4]),
        matrix("stream", "step", 4, signalled, signal.SIGUSR1, [3, 4]),
        # In the checkpoint of step 3.
        matrix("map", "checkpoint", 1, signalled, signal.SIGINT, [3, 4]),
        matrix("stream", "checkpoint", 1, signalled, signal.SIGTERM, [3, 4]),
        matrix("map", "checkpoint", 1, signalled_after, signal.SIGUSR1, [3, 4]),
        matrix("stream", "checkpoint", 1, signalled_after, signal.SIGINT, [3, 4]),
    ],
)
def test_signal_saves_a_checkpoint_and_exits(
    script, flags, uninterrupted, monkeypatch, data, place, call, action, number, expected
):
    flags.update(max_train_steps=5, checkpointing_steps=3, validation_steps=2, **VALIDATION)
    if data == "map":
        flags.update(train_batch_size=2, gradient_accumulation_steps=2)
    else:
        flags.update(streaming=True, shuffle_shards=1)
    out = flags["output_dir"]

    with monkeypatch.context() as patch:
        install(Fault(place, (call,), partial(action, number)), patch.setattr)
        status = run_to_status(script, flags)
    stopped_at = checkpoints(out)
    has_results = (out / LORA_WEIGHTS).exists()
    run(script, {**flags, "resume_from_checkpoint": "latest"})

    assert status == STOPPED
    assert stopped_at == expected
    assert not has_results
    assert_exact(uninterrupted(flags), out)
    assert files_in(out / "validation") == files_in(uninterrupted(flags) / "validation")


def test_signal_after_the_last_step_does_not_stop_the_run(script, flags, monkeypatch):
    flags.update(max_train_steps=2)
    install(Fault("weights", (1,), partial(signalled, signal.SIGTERM)), monkeypatch.setattr)

    status = run_to_status(script, flags)

    assert status == 0
    assert trained(flags["output_dir"])


def test_run_stopped_in_its_last_step_saves_its_weights_when_it_resumes(script, flags, monkeypatch):
    flags.update(max_train_steps=2)
    with monkeypatch.context() as patch:
        install(Fault("step", (2,), partial(signalled, signal.SIGTERM)), patch.setattr)
        status = run_to_status(script, flags)

    out = run(script, {**flags, "resume_from_checkpoint": "latest"})

    assert status == STOPPED
    assert trained(out)


# On several ranks ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rank", "place", "call", "number", "step"),
    [
        (1, "step", 4, signal.SIGUSR1, 4),
        matrix(0, "step", 2, signal.SIGINT, 2),
        matrix(0, "checkpoint", 1, signal.SIGTERM, 4),
        matrix(1, "generation", 4, signal.SIGTERM, 3),
        matrix(0, "evaluation", 3, signal.SIGUSR1, 3),
    ],
)
def test_signal_to_one_rank_stops_all(flags, uninterrupted, rank, place, call, number, step):
    flags.update(train_batch_size=2, max_train_steps=5, checkpointing_steps=3, validation_steps=2, **VALIDATION)
    fault = Fault(place, (call,), partial(signalled, number))

    statuses, outputs = run_ranks(flags, {rank: [fault]})
    stopped_at = checkpoints(flags["output_dir"])
    out = run_ranks_successfully({**flags, "resume_from_checkpoint": "latest"})

    assert statuses == [STOPPED, STOPPED], outputs
    assert stopped_at[-1] == step
    assert_exact(uninterrupted(flags, size=2), out)


@pytest.mark.parametrize("number", [signal.SIGINT, matrix(signal.SIGTERM)])
def test_second_signal_after_ctrl_c_kills_a_process_at_once(flags, number):
    """In the checkpoint that the first one asked for. torchrun answers a second Ctrl-C with SIGTERM."""
    flags.update(checkpointing_steps=1)
    first = Fault("step", (2,), partial(signalled, signal.SIGINT))
    second = Fault("checkpoint", (2,), partial(signalled, number))

    statuses, outputs = run_ranks(flags, {0: [first, second]}, size=1)

    assert statuses == [-number], outputs
    assert checkpoints(flags["output_dir"]) == [1]


# With launchers -----------------------------------------------------------------------------------------------------
LAUNCHERS = {
    "accelerate": [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    "python": [sys.executable],
}
RANKS = {"accelerate": 1, "torchrun": 2, "python": 1}


class LaunchedRun:
    """A run that a launcher starts in a process group, as a terminal does. All of it is killed at the end."""

    def __init__(self, folder, launcher, flags, faults):
        self.size = RANKS[launcher]
        self.log_file = folder / "log"
        command = [*LAUNCHERS[launcher], *cluster.with_faults(faults), SCRIPT, *command_line(flags)]
        with self.log_file.open("w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        self.launcher = psutil.Process(self.process.pid)
        self.children = []

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in [*reversed(self.children), self.launcher]:
            if process.is_running():
                process.kill()

    def log(self):
        return self.log_file.read_text()

    def wait_for(self, files):
        """Wait until all files exist, or the launcher ends."""
        deadline = time.monotonic() + cluster.TIMEOUT
        while self.process.poll() is None and not all(file.exists() for file in files):
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.01)

    def find_ranks(self):
        """The ranks, in their order. Workers of data loaders are children of a rank."""
        self.children = self.launcher.children(recursive=True)
        processes = [self.launcher, *self.children]
        candidates = [process for process in processes if "cpu_cluster.py" in " ".join(process.cmdline()[:3])]
        found = [process for process in candidates if process.parent() not in candidates]
        assert len(found) == self.size, self.log()
        return sorted(found, key=lambda process: int(process.environ().get("RANK", 0)))

    def send(self, number, target):
        """Send a signal to the last rank, to the launcher or, as a terminal sends Ctrl-C, to the process group."""
        ranks = self.find_ranks()
        if target == "group":
            os.killpg(self.process.pid, number)
        elif target == "rank":
            ranks[-1].send_signal(number)
        else:
            self.launcher.send_signal(number)

    def wait(self):
        """Wait until all processes have ended, and return the status of the launcher."""
        self.process.wait(cluster.TIMEOUT)
        _, hung = psutil.wait_procs(self.children, cluster.TIMEOUT)
        assert not hung, self.log()
        assert self.process.returncode != 0, self.log()
        return self.process.returncode


@pytest.mark.parametrize(
    ("launcher", "target", "number"),
    [
        ("accelerate", "rank", signal.SIGTERM),
        matrix("torchrun", "launcher", signal.SIGTERM),
        matrix("accelerate", "group", signal.SIGINT),
        matrix("torchrun", "group", signal.SIGINT),
        matrix("torchrun", "rank", signal.SIGUSR1),
        matrix("python", "rank", signal.SIGTERM),
    ],
)
def test_signal_to_a_launched_run_saves_a_checkpoint(script, flags, uninterrupted, tmp_path, launcher, target, number):
    """Each rank that receives the signal waits for it within step 3. A process group contains the loader's workers."""
    flags.update(dataloader_num_workers=1, train_batch_size=2, max_train_steps=5)
    size = RANKS[launcher]
    signalled_ranks = [size - 1] if target == "rank" else range(size)
    reached = {rank: tmp_path / f"reached-{rank}" for rank in signalled_ranks}
    faults = {}
    for rank, file in reached.items():
        faults[rank] = [Fault("step", (3,), partial(cluster.waiting_for_a_signal, file))]

    with LaunchedRun(tmp_path, launcher, flags, faults) as launched:
        launched.wait_for(reached.values())
        launched.send(number, target)
        status = launched.wait()

    if launcher == "python":
        assert status == STOPPED
    message = "Stopped by a signal (the checkpoint of step 3 is saved). Resume with --resume_from_checkpoint latest."
    assert message in launched.log()
    assert checkpoints(flags["output_dir"]) == [3]

    flags["resume_from_checkpoint"] = "latest"
    if size == 1:
        run(script, flags)
    else:
        run_ranks_successfully(flags)
    assert_exact(uninterrupted(flags, size), flags["output_dir"])


@pytest.mark.matrix
@pytest.mark.parametrize("launcher", ["python", "torchrun"])
def test_second_ctrl_c_kills_a_launched_run_at_once(flags, tmp_path, launcher):
    """Each rank waits for the first one in step 3, and for the second one in the checkpoint that it then saves."""
    flags.update(dataloader_num_workers=1, train_batch_size=2, max_train_steps=5)
    steps = [tmp_path / f"step-{rank}" for rank in range(RANKS[launcher])]
    saves = [tmp_path / f"save-{rank}" for rank in range(RANKS[launcher])]
    faults = {}
    for rank, (step, save) in enumerate(zip(steps, saves)):
        first = Fault("step", (3,), partial(cluster.waiting_for_a_signal, step))
        second = Fault("checkpoint", (1,), partial(cluster.waiting_for_the_end, save))
        faults[rank] = [first, second]

    with LaunchedRun(tmp_path, launcher, flags, faults) as launched:
        launched.wait_for(steps)
        launched.send(signal.SIGINT, "group")
        launched.wait_for(saves)
        launched.send(signal.SIGINT, "group")
        launched.wait()

    assert checkpoints(flags["output_dir"]) == []


# What happens to the second of two processes, and the exit statuses of both. torchrun may end the first with SIGTERM.
ENDS = {
    "finished": ({}, None, set()),
    "error": ({}, Fault("step", (2,), partial(raising, OUT_OF_MEMORY)), {1}),
    "signal": ({}, Fault("step", (1,), partial(signalled, signal.SIGTERM)), {STOPPED}),
    "refusal": ({"resume_from_checkpoint": "checkpoint-9"}, None, {1}),
    "Ctrl-C": ({"run_validation": True}, Fault("generation", (1,), partial(signalled, signal.SIGINT)), {1, 130}),
}


@pytest.mark.parametrize(
    ("end", "repetitions"),
    [("finished", 1), ("error", 1), *(matrix(end, 10) for end in ENDS)],
)
def test_launched_run_ends_without_hanging_or_crashing(flags, end, repetitions):
    """
    After a run, the interpreter takes down threads and sockets.

    A rank that failed leaves without that: NCCL would wait for the other ranks, which may wait for this one.
    """
    changes, fault, expected = ENDS[end]
    flags.update(train_batch_size=2, max_train_steps=2, report_to="none", checkpointing_steps=1, **changes)
    wrapper = cluster.with_faults({1: [fault]} if fault else {})

    for _ in range(repetitions):
        result = launch(flags, 2, timeout=cluster.TIMEOUT, wrapper=wrapper)

        statuses = {int(status) for status in re.findall(r"exitcode\s*: (-?\d+) \(pid", result.stderr)}
        if expected:
            statuses.discard(-signal.SIGTERM)
            assert result.returncode == 1, result.stderr
            assert statuses, result.stderr
        else:
            assert result.returncode == 0, result.stderr
        assert statuses <= expected, result.stderr
        assert (cluster.CLEANS_UP in result.stdout) == (end in ("finished", "signal")), result.stdout
        shutil.rmtree(flags["output_dir"])


@pytest.mark.matrix
def test_unexpected_error_ends_a_run_with_loader_workers(flags):
    """The workers ignore the signal with which Python ends its children, so it would wait for them forever."""
    flags.update(dataloader_num_workers=2)
    fault = Fault("step", (2,), partial(raising, OUT_OF_MEMORY))

    statuses, outputs = run_ranks(flags, {0: [fault]}, size=1)

    assert statuses == [1], outputs
    assert "RuntimeError: out of memory" in outputs[0]


# kill -9 ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("place", "call", "victims"),
    [
        # After the files of the second checkpoint, before its state.
        ("replace", 2, [0]),
        # In training, in a validation, in saving the second checkpoint, and in removing the first one.
        matrix("step", 5, [1]),
        matrix("step", 5, [0, 1]),
        matrix("generation", 5, [0]),
        matrix("checkpoint", 2, [1]),
        matrix("checkpoint", 2, [0, 1]),
        matrix("rmdir", 1, [0]),
    ],
)
def test_killed_ranks_resume_from_the_newest_complete_checkpoint(flags, uninterrupted, place, call, victims):
    flags.update(train_batch_size=2, max_train_steps=8, checkpointing_steps=2, validation_steps=3, **VALIDATION)
    flags.update(checkpoints_total_limit=1)
    faults = {rank: [Fault(place, (call,), cluster.killed)] for rank in victims}

    statuses, outputs = run_ranks(flags, faults)
    kept = checkpoints(flags["output_dir"])
    out = run_ranks_successfully({**flags, "resume_from_checkpoint": "latest"})

    assert -signal.SIGKILL in statuses, outputs
    assert 0 not in statuses, outputs
    assert len(kept) == 1
    assert_exact(uninterrupted(flags, size=2), out)
