"""Signals, kill -9, full disks, broken sources and lost gradients: what was trained survives, to the bit."""

import functools
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from conftest import SCRIPT, command_line, run, scalars
from datasets.packaged_modules.parquet.parquet import Parquet
from diffusers import StableDiffusionXLPipeline
from small_world import draw_pairs
from test_training import LORA_WEIGHTS, assert_equal, assert_same, curves, trained


# Processes are forked from one that has imported the libraries: a run of two ranks takes seconds.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "accelerate",
        "datasets",
        "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
        "peft",
        "torch.utils.tensorboard",
    ]
)
# Seconds after which a run hangs; the longest here takes 15.
TIMEOUT = 60
VALIDATION = {
    "num_validation_pairs": 8,
    "run_validation": True,
    "validation_prompts": ["a red circle", "a blue star", "a green square"],
    "num_inference_steps": 2,
}


# Faults -------------------------------------------------------------------------------------------------------------


class Fault(NamedTuple):
    """In the given calls of a place, counted from 1, `action` is called with the call that it replaces."""

    place: str
    calls: tuple[int, ...]
    action: Callable


# Where: the owner and name of a function that the script calls there, and whether that is with gradients (or either).
PLACES = {
    "step": (torch.nn.functional, "mse_loss", {True}),
    "evaluation": (torch.nn.functional, "mse_loss", {False}),
    "drawing": (StableDiffusionXLPipeline, "__call__", {True, False}),
    "checkpoint": (Accelerator, "save_state", {True, False}),
    "log": (Accelerator, "log", {True, False}),
    "picture": (TensorBoardTracker, "log_images", {True, False}),
    "end": (TensorBoardTracker, "finish", {True, False}),
    "source": (Parquet, "_generate_tables", {True, False}),
}


def install(fault, patch=setattr):
    owner, name, gradients = PLACES[fault.place]
    original, count = getattr(owner, name), itertools.count(1)

    @functools.wraps(original)
    def hook(*args, **kwargs):
        call = functools.partial(original, *args, **kwargs)
        if torch.is_grad_enabled() in gradients and next(count) in fault.calls:
            return fault.action(call)
        return call()

    patch(owner, name, hook)


def signalled(number, call):
    os.kill(os.getpid(), number)
    return call()


def signalled_behind(number, call):
    result = call()
    os.kill(os.getpid(), number)
    return result


def killed(delay, call):
    threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
    return call()


def not_finite(kind, call):
    errors = call()
    if kind == "inf gradient":
        errors.register_hook(lambda gradient: gradient * torch.inf)
        return errors
    return errors * {"nan loss": torch.nan, "inf loss": torch.inf}[kind]


def full_disk(size, call):
    """No file may grow beyond `size` bytes."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        return call()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def read_only(folder, call):
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    return call()


def unreachable(error, call):
    raise error


def damaged(how, folder, call):
    for path in damageable(folder):
        if how == "removed":
            path.unlink()
        else:
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 3] if how == "truncated" else b"garbage " * (len(content) // 8))
    return call()


def damageable(folder):
    return sorted(Path(folder).glob("data/*.parquet"))


def nothing():
    """A call to damage things before the start."""


# Processes ----------------------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def work(environment, words, fault, log):
    """One rank: the script as it runs from the command line."""
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.update(environment)
    if fault is not None:
        install(fault)
    sys.argv = [str(SCRIPT), *words]
    runpy.run_path(str(SCRIPT), run_name="__main__")


def run_ranks(flags, faults=None, size=2, env=None):
    """The script on `size` ranks, with a fault on some of them; returns their exit codes and outputs."""
    faults, folder = faults or {}, Path(tempfile.mkdtemp())
    environment = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **(env or {})}
    logs = [folder / f"rank-{rank}.log" for rank in range(size)]
    ranks = []
    for rank in range(size):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {}
        arguments = ({**environment, **place}, command_line(flags), faults.get(rank), logs[rank])
        ranks.append(FORKS.Process(target=work, args=arguments))
        ranks[-1].start()
    deadline = time.monotonic() + TIMEOUT
    for process in ranks:
        process.join(max(deadline - time.monotonic(), 0))
    hung = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for process in ranks:
        process.kill()
        process.join()
    outputs = [log.read_text() for log in logs]
    shutil.rmtree(folder)
    assert not hung, f"ranks {hung} hung:\n" + "\n".join(outputs)
    return [process.exitcode for process in ranks], outputs


def run_ranks_well(flags):
    statuses, outputs = run_ranks(flags)
    assert statuses == [0, 0], "\n".join(outputs)
    return Path(flags["output_dir"])


def assert_one_sentence(statuses, outputs, *parts):
    """Every rank ends with status 1 and the same one sentence, and shows no traceback."""
    assert set(statuses) == {1}, "\n".join(outputs)
    assert not any("Traceback" in output for output in outputs), "\n".join(outputs)
    sentences = [line for output in outputs for line in output.splitlines() if line.startswith("error: ")]
    assert len(sentences) == len(outputs) and len(set(sentences)) == 1, "\n".join(outputs)
    assert all(part in sentences[0] for part in parts), sentences[0]


# Comparisons --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(script, world, tmp_path_factory):
    """The run that nothing happens to, made once for each set of flags."""
    folders = {}

    def make(flags, size=1):
        flags = {name: value for name, value in flags.items() if name not in ("output_dir", "resume_from_checkpoint")}
        key = json.dumps([size, flags], default=str, sort_keys=True)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("uninterrupted") / "out"
            flags["output_dir"] = folders[key]
            run(script, flags) if size == 1 else run_ranks_well(flags)
        return folders[key]

    return make


def checkpoints(folder):
    """Steps of the complete checkpoints."""
    return sorted(int(path.name.split("-")[1]) for path in Path(folder).glob("checkpoint-*"))


def training_curves(folder):
    return {name: values for name, values in curves(folder).items() if not name.startswith("eval_")}


def assert_exact(whole, out):
    """All that was trained and logged of the training is what the uninterrupted run has."""
    assert training_curves(out) == training_curves(whole)
    assert_equal(trained(out), trained(whole))
    assert not list(out.glob(".*"))


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


# Signals ------------------------------------------------------------------------------------------------------------


SMALL_STEPS = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 3}
STREAMED = {"streaming": True, "shuffle_buffer_size": 6, "logging_steps": 3}


SIGNAL_CASES = [
    ("step", {"map": 7, "stream": 4}, signalled, [3, 4]),
    ("evaluation", {"map": 6, "stream": 3}, signalled, [2]),
    ("drawing", {"map": 5, "stream": 5}, signalled, [2]),
    ("checkpoint", {"map": 1, "stream": 1}, signalled, [3, 4]),
    ("checkpoint", {"map": 1, "stream": 1}, signalled_behind, [3, 4]),
]
BY_DEFAULT = {
    (0, signal.SIGTERM, "map"),
    (1, signal.SIGUSR1, "map"),
    (2, signal.SIGTERM, "stream"),
    (3, signal.SIGUSR1, "stream"),
}


@pytest.mark.parametrize(
    ("case", "number", "kind"),
    [
        pytest.param(*key, marks=() if key in BY_DEFAULT else pytest.mark.matrix)
        for key in itertools.product(range(len(SIGNAL_CASES)), [signal.SIGTERM, signal.SIGUSR1], ["map", "stream"])
    ],
)
def test_signal_saves_a_checkpoint_and_exits(script, flags, uninterrupted, monkeypatch, case, number, kind):
    """
    In the middle of an accumulation window, of a log window, of the validation of step 2 or of the checkpoint of
    step 3, which is whole before the run stops behind the step that follows.
    """
    place, calls, action, expected = SIGNAL_CASES[case]
    flags.update(max_train_steps=5, checkpointing_steps=3, validation_steps=2, **VALIDATION)
    flags.update(SMALL_STEPS if kind == "map" else STREAMED)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        install(Fault(place, (calls[kind],), functools.partial(action, number)), patch.setattr)
        run(script, flags)
    assert stopped.value.code == 128 + number
    out = flags["output_dir"]
    assert checkpoints(out) == expected
    assert not (out / LORA_WEIGHTS).exists()
    run(script, {**flags, "resume_from_checkpoint": "latest"})
    assert_exact(uninterrupted(flags), out)


def test_validation_that_a_signal_cut_short_is_made_up_for(script, flags, uninterrupted, monkeypatch):
    flags.update(max_train_steps=3, validation_steps=2, **VALIDATION)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        install(Fault("drawing", (5,), functools.partial(signalled, signal.SIGTERM)), patch.setattr)
        run(script, flags)
    run(script, {**flags, "resume_from_checkpoint": "latest"})
    out, whole = flags["output_dir"], uninterrupted(flags)
    assert_same(out, whole)
    assert content(out / "validation") == content(whole / "validation")


def test_signal_in_the_last_validation_ends_a_run_that_is_saved(script, flags, monkeypatch):
    """Its weights are there, so it ends well, and its card promises no picture that was not drawn."""
    flags.update(max_train_steps=1, **VALIDATION)
    install(Fault("drawing", (5,), functools.partial(signalled, signal.SIGTERM)), monkeypatch.setattr)
    out = run(script, flags)
    trained(out)
    card = (out / "README.md").read_text()
    assert ("validation/step-000001.png" in card) == (out / "validation" / "step-000001.png").exists()


@pytest.mark.parametrize(
    ("rank", "place", "calls", "number", "step"),
    [
        (1, "step", 4, signal.SIGUSR1, 4),
        pytest.param(0, "checkpoint", 1, signal.SIGTERM, 4, marks=pytest.mark.matrix),
        pytest.param(1, "drawing", 4, signal.SIGTERM, 2, marks=pytest.mark.matrix),
        pytest.param(0, "evaluation", 3, signal.SIGUSR1, 2, marks=pytest.mark.matrix),
    ],
)
def test_signal_to_one_rank_stops_all(flags, uninterrupted, rank, place, calls, number, step):
    flags.update(train_batch_size=2, max_train_steps=5, checkpointing_steps=3, validation_steps=2, **VALIDATION)
    fault = Fault(place, (calls,), functools.partial(signalled, number))
    statuses, outputs = run_ranks(flags, {rank: fault})
    assert statuses == 2 * [128 + number], outputs
    assert checkpoints(flags["output_dir"])[-1] == step
    out = run_ranks_well({**flags, "resume_from_checkpoint": "latest"})
    assert_exact(uninterrupted(flags, size=2), out)


def launcher_line(launcher, flags):
    words = {
        "accelerate": ["accelerate.commands.launch", "--cpu", "--num_processes=1"],
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    }
    start = [sys.executable, "-m", *words[launcher]] if launcher in words else [sys.executable]
    return [*start, str(SCRIPT), *command_line(flags)]


def steps_shown(log):
    return log.read_text().count("it/s") + log.read_text().count("s/it")


def is_at(place, out, log):
    """Whether a launched run has come to where it is to be signalled."""
    if place == "checkpoint":
        return any(out.glob(".checkpoint-*.incomplete"))
    if place == "validation":
        return (out / "logs").exists() and "eval_loss" in log.read_text()
    return "Steps:" in log.read_text() and steps_shown(log) >= 3


def wait_until(condition, *arguments):
    deadline = time.monotonic() + TIMEOUT
    while not condition(*arguments):
        assert time.monotonic() < deadline, f"{condition.__name__} did not come true"
        time.sleep(0.002)


def has_ended(process):
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def all_have_ended(processes):
    return all(map(has_ended, processes))


@pytest.mark.parametrize(
    ("launcher", "target", "number", "place"),
    [
        ("accelerate", "launcher", signal.SIGTERM, "validation"),
        ("torchrun", "launcher", signal.SIGTERM, "step"),
        ("torchrun", "launcher", signal.SIGUSR1, "step"),
        pytest.param("torchrun", "rank", signal.SIGUSR1, "checkpoint", marks=pytest.mark.matrix),
        pytest.param("python", "rank", signal.SIGTERM, "step", marks=pytest.mark.matrix),
        pytest.param("accelerate", "launcher", signal.SIGUSR1, "step", marks=pytest.mark.matrix),
        pytest.param("accelerate", "rank", signal.SIGUSR1, "checkpoint", marks=pytest.mark.matrix),
        pytest.param("torchrun", "launcher", signal.SIGTERM, "validation", marks=pytest.mark.matrix),
        pytest.param("torchrun", "launcher", signal.SIGTERM, "checkpoint", marks=pytest.mark.matrix),
        pytest.param("torchrun", "rank", signal.SIGTERM, "validation", marks=pytest.mark.matrix),
    ],
)
def test_signal_to_a_launched_run(script, flags, uninterrupted, tmp_path, launcher, target, number, place):
    """
    Long enough to be caught in the act; then resumed for two steps more than it had come to. torchrun signals the
    loaders' workers as well.
    """
    size = 2 if launcher == "torchrun" else 1
    flags.update(dataloader_num_workers=1 if place == "step" else 0)
    flags.update(train_batch_size=2, max_train_steps=10_000, logging_steps=3, checkpointing_steps=4)
    if place == "validation":
        flags.update(VALIDATION, validation_steps=3, num_inference_steps=20)
    out, log = flags["output_dir"], tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            launcher_line(launcher, flags),
            env={**os.environ, "TQDM_MININTERVAL": "0", "CUDA_VISIBLE_DEVICES": ""},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    family = [psutil.Process(process.pid)]
    try:
        wait_until(is_at, place, out, log)
        family += family[0].children(recursive=True)
        ranks = [member for member in family if str(SCRIPT) in member.cmdline()[1:3]]
        ranks = [member for member in ranks if member.parent() not in ranks]
        assert len(ranks) == size
        (ranks[-1] if target == "rank" else family[0]).send_signal(number)
        wait_until(all_have_ended, family)
    finally:
        for member in family:
            if not has_ended(member):
                member.kill()
        process.wait()
    assert process.returncode != 0
    if launcher == "python":
        assert process.returncode == 128 + number
    # A launcher that handles no SIGUSR1 is gone by it, and that is answered like SIGTERM.
    heard = number if target == "rank" else signal.SIGTERM
    assert f"Stopped by {signal.Signals(heard).name}" in log.read_text(), log.read_text()
    step = checkpoints(out)[-1]
    flags.update(max_train_steps=step + 2)
    resumed = {**flags, "resume_from_checkpoint": "latest"}
    run(script, resumed) if size == 1 else run_ranks_well(resumed)
    whole = uninterrupted(flags, size)
    logged, expected = training_curves(out), training_curves(whole)
    assert logged == expected
    assert_equal(trained(out), trained(whole))


# Gradients ----------------------------------------------------------------------------------------------------------


def optimizer_state(folder):
    return torch.load(folder / "optimizer.bin")["state"]


def assert_nothing_trained_between(out, step, other):
    folder, other = out / f"checkpoint-{step}", out / f"checkpoint-{other}"
    assert_equal(trained(folder), trained(other))
    states, others = optimizer_state(folder), optimizer_state(other)
    assert states.keys() == others.keys() and len(states) > 0
    for name, state in states.items():
        assert_equal(state, others[name])


@pytest.mark.parametrize("kind", ["nan loss", "inf loss", "inf gradient"])
def test_step_without_a_finite_gradient_is_left_out(script, flags, monkeypatch, caplog, kind):
    """Bad in the second half of step 3 and in the first half of step 4."""
    flags.update(max_train_steps=5, checkpointing_steps=1, train_batch_size=2, gradient_accumulation_steps=2)
    install(Fault("step", (6, 7), functools.partial(not_finite, kind)), monkeypatch.setattr)
    out = run(script, flags)
    assert_nothing_trained_between(out, 2, 3)
    assert_nothing_trained_between(out, 2, 4)
    before, after = trained(out / "checkpoint-4"), trained(out)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(weight.isfinite().all() for weight in after.values())
    warned = re.findall(r"Step (\d+): no finite gradient in (\d+) steps, not applied", caplog.text)
    assert warned == [("3", "1"), ("4", "2")]
    assert json.loads((out / "checkpoint-5" / "mapo_state.json").read_text())["bad_steps"] == 0


def test_steps_left_out_are_counted_in_the_log(script, flags, tmp_path, monkeypatch):
    """The count goes on after a restart."""
    flags.update(max_train_steps=5, checkpointing_steps=3)
    install(Fault("step", (2, 3, 5), functools.partial(not_finite, "nan loss")), monkeypatch.setattr)
    out = run(script, flags)
    assert scalars(out)["skipped_steps"] == {1: 0, 2: 1, 3: 2, 4: 2, 5: 3}
    monkeypatch.undo()
    flags.update(output_dir=tmp_path / "resumed", resume_from_checkpoint=out / "checkpoint-3")
    assert scalars(run(script, flags))["skipped_steps"] == {4: 2, 5: 2}


def test_bad_steps_in_a_row_end_the_run(script, flags, uninterrupted, monkeypatch):
    flags.update(max_train_steps=7, checkpointing_steps=4, max_bad_steps=2)
    whole = uninterrupted(flags)
    with monkeypatch.context() as patch, pytest.raises(script.TrainingError) as error:
        install(Fault("step", (5, 6), functools.partial(not_finite, "nan loss")), patch.setattr)
        run(script, flags)
    rows = np.random.default_rng([0, 0]).permutation(48)[20:24]
    named = ", ".join(sorted(f"row {row}" for row in rows))
    assert f"in 2 steps up to step 6 (its pairs: {named})" in str(error.value)
    out = flags["output_dir"]
    assert checkpoints(out) == [4]
    assert_equal(trained(out / "checkpoint-4"), trained(whole / "checkpoint-4"))
    run(script, {**flags, "resume_from_checkpoint": "latest"})
    assert_exact(whole, out)


def test_bad_steps_that_are_not_in_a_row_do_not_end_the_run(script, flags, monkeypatch):
    flags.update(max_train_steps=6, max_bad_steps=2)
    install(Fault("step", (1, 3, 5), functools.partial(not_finite, "nan loss")), monkeypatch.setattr)
    trained(run(script, flags))


def test_bad_steps_are_counted_over_a_restart(script, flags, monkeypatch):
    flags.update(max_train_steps=3, checkpointing_steps=3, max_bad_steps=3)
    with monkeypatch.context() as patch:
        install(Fault("step", (2, 3), functools.partial(not_finite, "nan loss")), patch.setattr)
        run(script, flags)
    install(Fault("step", (1,), functools.partial(not_finite, "nan loss")), monkeypatch.setattr)
    with pytest.raises(script.TrainingError, match="in 3 steps up to step 4"):
        run(script, {**flags, "max_train_steps": 5, "resume_from_checkpoint": "latest"})


def test_ranks_agree_on_a_bad_step_of_one(flags):
    flags.update(train_batch_size=2, max_train_steps=9, checkpointing_steps=1, max_bad_steps=2)
    fault = Fault("step", (2, 4, 5), functools.partial(not_finite, "inf loss"))
    statuses, outputs = run_ranks(flags, {1: fault})
    rows = np.random.default_rng([0, 0]).permutation(48)[16:20]
    named = ", ".join(sorted(f"row {row}" for row in rows))
    assert_one_sentence(statuses, outputs, "--max_bad_steps", f"in 2 steps up to step 5 (its pairs: {named})")
    assert checkpoints(flags["output_dir"]) == [1, 2, 3, 4]
    assert_nothing_trained_between(flags["output_dir"], 1, 2)
    assert_nothing_trained_between(flags["output_dir"], 3, 4)


# Disks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "victim", "size"),
    [
        (4, 0, 10_000),
        pytest.param(None, 0, 100_000, marks=pytest.mark.matrix),
        (4, 1, 1_000),
        pytest.param(None, 1, 1_000, marks=pytest.mark.matrix),
    ],
    ids=["lora-main", "full-main", "lora-other", "full-other"],
)
def test_full_disk_on_one_rank_ends_all_in_one_sentence(flags, uninterrupted, rank, victim, size):
    flags.update(train_batch_size=2, max_train_steps=3, checkpointing_steps=1, rank=rank, checkpoints_total_limit=1)
    statuses, outputs = run_ranks(flags, {victim: Fault("checkpoint", (2,), functools.partial(full_disk, size))})
    out = flags["output_dir"]
    assert_one_sentence(statuses, outputs, f"{out / 'checkpoint-2'} could not be written")
    assert checkpoints(out) == [1]
    run_ranks_well({**flags, "resume_from_checkpoint": "latest"})
    assert_exact(uninterrupted(flags, size=2), out)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own; only root can make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def resize_disk(folder, size):
    subprocess.run(["mount", "-o", f"remount,rw,size={size}", folder], check=True)


def shrink_disk(folder, room, call):
    """Leave `room` bytes on a disk."""
    used = shutil.disk_usage(folder).used
    resize_disk(folder, used + room)
    return call()


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file system")


@needs_root
@pytest.mark.parametrize("rank", [4, None], ids=["lora", "full"])
@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_checkpoint_on_a_real_disk_that_is(script, flags, uninterrupted, small_disk, rank, fault):
    out = small_disk / "out"
    flags.update(max_train_steps=3, checkpointing_steps=1, rank=rank, output_dir=out)
    action = {
        "full": functools.partial(shrink_disk, small_disk, 40_960),
        "read-only": functools.partial(read_only, small_disk),
    }[fault]
    logs = small_disk.parent / "logs"
    logs.mkdir()
    statuses, outputs = run_ranks({**flags, "logging_dir": logs}, {0: Fault("checkpoint", (2,), action)}, size=1)
    assert_one_sentence(statuses, outputs, f"{out / 'checkpoint-2'} could not be written")
    assert checkpoints(out) == [1]
    resize_disk(small_disk, "64m")
    run(script, {**flags, "resume_from_checkpoint": "latest"})
    whole = uninterrupted(flags)
    assert_equal(trained(out), trained(whole))
    expected = {name: {s: v for s, v in values.items() if s > 1} for name, values in training_curves(whole).items()}
    assert training_curves(out) == expected


@needs_root
@pytest.mark.parametrize(("place", "calls"), [("checkpoint", 2), ("step", 4)], ids=["checkpoint", "step"])
def test_disk_that_is_full_for_the_log_too(flags, small_disk, place, calls):
    """The tracker's files are on it, and after the last step the weights of the run."""
    flags.update(max_train_steps=5, checkpointing_steps=2, output_dir=small_disk / "out")
    fault = Fault(place, (calls,), functools.partial(shrink_disk, small_disk, 0))
    statuses, outputs = run_ranks(flags, {0: fault}, size=1)
    assert_one_sentence(statuses, outputs, "could not be written")
    assert checkpoints(flags["output_dir"]) == [2]


def test_weights_that_cannot_be_saved_at_the_end_are_one_sentence(flags, uninterrupted):
    """Step 3 has no checkpoint of its own: the disk is full just when all is done."""
    flags.update(max_train_steps=3, checkpointing_steps=2, num_validation_pairs=4, train_batch_size=4)
    fault = Fault("step", (3,), leave_disk_full)
    statuses, outputs = run_ranks(flags, {0: fault}, size=1)
    assert_one_sentence(statuses, outputs, "could not be written", str(flags["output_dir"]))
    assert checkpoints(flags["output_dir"]) == [2]


def leave_disk_full(call):
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return call()


# Sources ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_pairs(flags, tmp_path):
    """Pairs that may be damaged."""
    flags.update(dataset_name=tmp_path / "pairs", cache_dir=tmp_path / "cache")
    draw_pairs(tmp_path / "pairs", num_pairs=48, num_shards=3, row_group_size=4)
    shutil.copytree(tmp_path / "pairs", tmp_path / "copy")
    return tmp_path / "pairs"


def repair(pairs):
    shutil.copytree(pairs.parent / "copy", pairs, dirs_exist_ok=True)


@pytest.mark.parametrize(
    ("how", "changes"),
    [
        ("truncated", {"logging_steps": 4}),
        ("removed", {"dataloader_num_workers": 2}),
        ("garbage", {"train_batch_size": 2, "gradient_accumulation_steps": 3, "max_train_steps": 5}),
    ],
)
def test_shards_that_break_in_mid_run(script, flags, uninterrupted, own_pairs, monkeypatch, how, changes):
    flags.update({"streaming": True, "shuffle_buffer_size": 4, "max_train_steps": 8, **changes})
    whole = uninterrupted(flags)
    with monkeypatch.context() as patch, pytest.raises(script.TrainingError) as error:
        install(Fault("step", (3,), functools.partial(damaged, how, own_pairs)), patch.setattr)
        run(script, flags)
    out = flags["output_dir"]
    (step,) = checkpoints(out)
    kept = f"(the checkpoint of step {step} is saved)"
    assert f"--dataset_name {own_pairs} cannot be read any further {kept}: " in str(error.value)
    assert "\n" not in str(error.value)
    repair(own_pairs)
    run(script, {**flags, "resume_from_checkpoint": "latest"})
    assert_exact(whole, out)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach the hub"),
        httpx.ConnectError("[Errno 101] Network is unreachable"),
        httpx.ReadTimeout("timed out"),
        EOFError("torn"),
    ],
    ids=["connection", "unreachable", "timeout", "end-of-file"],
)
@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.matrix), 3])
def test_source_that_cannot_be_reached_in_mid_run(
    script, flags, uninterrupted, own_pairs, monkeypatch, error, accumulation
):
    """Reading fails behind 20 pairs; of steps of 6 the last is broken off when two of its three parts are done."""
    flags.update(streaming=True, shuffle_buffer_size=4, max_train_steps=4, num_validation_pairs=2)
    flags.update(train_batch_size=6 // accumulation, gradient_accumulation_steps=accumulation)
    whole = uninterrupted(flags)
    with monkeypatch.context() as patch, pytest.raises(script.TrainingError) as raised:
        install(Fault("source", (7,), functools.partial(unreachable, error)), patch.setattr)
        run(script, flags)
    assert str(error) in str(raised.value) and type(error).__name__ in str(raised.value)
    out = flags["output_dir"]
    assert len(checkpoints(out)) == 1
    run(script, {**flags, "resume_from_checkpoint": "latest"})
    assert_exact(whole, out)
    states = [
        json.loads((folder / "checkpoint-4/mapo_state.json").read_text())
        for folder in (whole, out)
        if (folder / "checkpoint-4").exists()
    ]
    assert all(state["rows_read"] == 24 for state in states)


def test_source_that_fails_before_the_first_step(script, flags, own_pairs, monkeypatch):
    flags.update(streaming=True)
    install(Fault("source", (1,), functools.partial(unreachable, ConnectionError("gone"))), monkeypatch.setattr)
    with pytest.raises(script.TrainingError, match=r"cannot be read any further \(nothing was trained yet\).*gone"):
        run(script, flags)
    assert checkpoints(flags["output_dir"]) == []


@pytest.mark.parametrize("error", [ConnectionError("gone"), httpx.ConnectError("gone")], ids=["hub", "http"])
@pytest.mark.parametrize(
    "changes", [{"num_validation_pairs": 3}, {"max_train_samples": 20}], ids=["held-out", "first"]
)
def test_source_that_fails_while_pairs_are_set_aside(script, flags, own_pairs, monkeypatch, changes, error):
    flags.update(streaming=True, **changes)
    install(Fault("source", (1,), functools.partial(unreachable, error)), monkeypatch.setattr)
    with pytest.raises(script.TrainingError, match=f"--dataset_name {own_pairs} cannot be read.*gone"):
        run(script, flags)


@pytest.mark.parametrize("streaming", [None, True], ids=["map-style", "streamed"])
@pytest.mark.parametrize("how", ["truncated", "garbage", "removed"])
def test_shards_that_are_broken_from_the_start(script, flags, own_pairs, how, streaming):
    damaged(how, own_pairs, nothing)
    with pytest.raises(script.TrainingError, match=f"--dataset_name {own_pairs} cannot be read") as error:
        run(script, {**flags, "streaming": streaming})
    assert "\n" not in str(error.value)


def test_shards_that_are_broken_from_the_start_end_all_ranks_in_one_sentence(flags, own_pairs):
    damaged("truncated", own_pairs, nothing)
    statuses, outputs = run_ranks({**flags, "streaming": True})
    assert_one_sentence(statuses, outputs, f"--dataset_name {own_pairs} cannot be read")


@pytest.mark.parametrize("how", ["truncated", "removed"])
def test_prepared_pairs_need_their_shards_no_more(script, flags, uninterrupted, own_pairs, monkeypatch, how):
    flags.update(max_train_steps=5)
    whole = uninterrupted(flags)
    install(Fault("step", (2,), functools.partial(damaged, how, own_pairs)), monkeypatch.setattr)
    assert_exact(whole, run(script, flags))


@pytest.mark.parametrize(
    ("call", "changes"),
    [
        (4, {"gradient_accumulation_steps": 2, "logging_steps": 2}),
        pytest.param(3, {}, marks=pytest.mark.matrix),
    ],
    ids=["accumulation", "step"],
)
def test_source_that_fails_on_one_rank_stops_all(flags, uninterrupted, own_pairs, call, changes):
    flags.update(streaming=True, shuffle_buffer_size=4, train_batch_size=2, max_train_steps=5, **changes)
    fault = Fault("source", (call,), functools.partial(unreachable, ConnectionError("Couldn't reach the hub")))
    statuses, outputs = run_ranks(flags, {1: fault})
    sentence = f"--dataset_name {own_pairs} cannot be read any further"
    assert_one_sentence(statuses, outputs, sentence, "Couldn't reach the hub")
    assert len(checkpoints(flags["output_dir"])) == 1
    out = run_ranks_well({**flags, "resume_from_checkpoint": "latest"})
    assert_exact(uninterrupted(flags, size=2), out)


# Trackers -----------------------------------------------------------------------------------------------------------


def test_unreachable_wandb_costs_nothing(flags, uninterrupted):
    flags.update(report_to="wandb", max_train_steps=2)
    env = {
        "WANDB_MODE": "online",
        "WANDB_BASE_URL": f"http://127.0.0.1:{free_port()}",
        "WANDB_API_KEY": 40 * "0",
        "WANDB_INIT_TIMEOUT": "5",
    }
    statuses, outputs = run_ranks(flags, size=1, env=env)
    assert statuses == [0], outputs
    assert "training goes on without a tracker" in outputs[0]
    assert_equal(trained(flags["output_dir"]), trained(uninterrupted({**flags, "report_to": "tensorboard"})))


def refused(call):
    raise BrokenPipeError("the tracker is gone")


@pytest.mark.parametrize(("place", "first"), [("log", 3), ("picture", 1), ("end", 1)])
def test_tracker_that_dies_in_mid_run_costs_nothing(script, flags, uninterrupted, monkeypatch, place, first):
    flags.update(max_train_steps=4, validation_steps=2, checkpointing_steps=2, **VALIDATION)
    whole = uninterrupted(flags)
    install(Fault(place, tuple(range(first, 100)), refused), monkeypatch.setattr)
    out = run(script, flags)
    assert_equal(trained(out), trained(whole))
    assert content(out / "validation") == content(whole / "validation")
    assert checkpoints(out) == [2, 4]


def wandb_killed(call):
    """wandb's service is a process of its own."""
    for child in psutil.Process().children(recursive=True):
        if "wandb" in " ".join(child.cmdline()):
            child.kill()
    return call()


def test_wandb_that_is_killed_in_mid_run_costs_nothing(flags, uninterrupted):
    flags.update(report_to="wandb", max_train_steps=4, validation_steps=2, **VALIDATION)
    statuses, outputs = run_ranks(flags, {0: Fault("step", (2,), wandb_killed)}, size=1)
    assert statuses == [0], outputs
    assert_equal(trained(flags["output_dir"]), trained(uninterrupted({**flags, "report_to": "tensorboard"})))


# kill -9 ------------------------------------------------------------------------------------------------------------


KILLS = 20
# Longest delay in seconds: about what each place lasts with all that follows in the same phase.
PHASES = {"step": (range(1, 9), 0.3), "checkpoint": (range(1, 4), 0.05), "drawing": (range(2, 7), 0.15)}


def draw_kill(number):
    """Victims and moment of a kill, at random but for the phase: each of the nine combinations comes up twice."""
    draw = random.Random(number)
    victims = ([0], [1], [0, 1])[number % 3]
    phase = list(PHASES)[number // 3 % 3]
    calls, delay = PHASES[phase]
    call = draw.choice(calls)
    return phase, {rank: Fault(phase, (call,), functools.partial(killed, delay * draw.random())) for rank in victims}


def assert_loads(folder, rank):
    """All that a checkpoint of two ranks is made of can be read."""
    trained(folder)
    torch.load(folder / "optimizer.bin")
    torch.load(folder / "scheduler.bin")
    for process in range(2):
        torch.load(folder / f"random_states_{process}.pkl", weights_only=False)
    return json.loads((folder / "mapo_state.json").read_text())


def kill_and_resume(flags, number, whole):
    """One kill and the resumed run; returns the phase, the victims and the pairs of the resumed run's whole length."""
    phase, faults = draw_kill(number)
    statuses, outputs = run_ranks(flags, faults)
    killed_ranks = [rank for rank, status in enumerate(statuses) if status == -signal.SIGKILL]
    assert killed_ranks, f"kill {number} at {phase} came too late: {statuses}"
    assert set(killed_ranks) <= set(faults) and 0 not in statuses, outputs
    out = flags["output_dir"]
    for step in checkpoints(out):
        assert assert_loads(out / f"checkpoint-{step}", step)["step"] == step
    half_written = len(list(out.glob(".checkpoint-*")))
    run_ranks_well({**flags, "resume_from_checkpoint": "latest"})
    assert_exact(whole, out)
    last = flags["max_train_steps"]
    seen, expected = (assert_loads(folder / f"checkpoint-{last}", last)["rows_read"] for folder in (out, whole))
    print(
        f"KILL {number}: rank {sorted(faults)} at {phase}, half-written {half_written}, pairs lost {expected - seen}"
    )
    assert seen == expected
    return half_written


@pytest.mark.parametrize(
    "number", [5, 3, *(pytest.param(n, marks=pytest.mark.matrix) for n in range(KILLS) if n not in (5, 3))]
)
def test_killed_ranks(flags, uninterrupted, number):
    flags.update(train_batch_size=2, max_train_steps=8, checkpointing_steps=2, validation_steps=3, **VALIDATION)
    kill_and_resume(flags, number, uninterrupted(flags, size=2))
