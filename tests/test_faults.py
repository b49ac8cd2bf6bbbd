"""Signals, kill -9, full disks, broken sources and lost gradients: what was trained survives, to the bit."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import cpu_cluster as cluster
import httpx
import psutil
import pytest
import torch
from conftest import SCRIPT, also, command_line, launch, run, scalars
from cpu_cluster import Fault, full_disk, install, not_finite, raising, signalled
from small_world import draw_pairs
from test_training import LORA_WEIGHTS, assert_equal, curves, trained


VALIDATION = {
    "num_validation_pairs": 8,
    "run_validation": True,
    "validation_prompts": ["a red circle", "a blue star", "a green square"],
    "num_inference_steps": 2,
}
STREAMED = {"streaming": True, "shuffle_shards": 1}


def run_ranks(flags, faults=None, size=2, env=None):
    return cluster.run_ranks([SCRIPT, *command_line(flags)], faults, size, env)


def run_ranks_well(flags):
    statuses, outputs = run_ranks(flags)
    assert statuses == [0, 0], "\n".join(outputs)
    return Path(flags["output_dir"])


def run_to_status(script, flags):
    """As `run`, but returns the exit status, or None after a SIGINT that the script has not caught."""
    try:
        run(script, flags)
    except SystemExit as end:
        return end.code
    except KeyboardInterrupt:
        return None
    return 0


def assert_one_sentence(statuses, outputs, *parts):
    """Every rank ends with status 1 and the same one sentence, and shows no traceback."""
    assert set(statuses) == {1}, "\n".join(outputs)
    assert not any("Traceback" in output for output in outputs), "\n".join(outputs)
    sentences = [line for output in outputs for line in output.splitlines() if line.startswith("error: ")]
    assert len(sentences) == len(outputs) and len(set(sentences)) == 1, "\n".join(outputs)
    assert all(part in sentences[0] for part in parts), sentences[0]


@pytest.fixture(scope="session")
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
    return sorted(int(path.parent.name[11:]) for path in Path(folder).glob("checkpoint-*/mapo_state.json"))


def assert_exact(whole, out):
    """All that was trained and logged of the training is what the uninterrupted run has."""
    logged, expected = curves(out), curves(whole)
    for name in expected:
        # A resumed run repeats the validation of the step that it starts from.
        assert logged[name] == expected[name], name
    assert_equal(trained(out), trained(whole))


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


# Signals ------------------------------------------------------------------------------------------------------------
SIGNALS = {
    "step": ({"map": 7, "stream": 4}, signalled, [3, 4]),
    "evaluation": ({"map": 6, "stream": 3}, signalled, [3]),
    "drawing": ({"map": 5, "stream": 5}, signalled, [3]),
    "checkpoint": ({"map": 1, "stream": 1}, signalled, [3, 4]),
    "checkpoint-behind": ({"map": 1, "stream": 1}, cluster.signalled_behind, [3, 4]),
}
SIGNALS_BY_DEFAULT = [("evaluation", signal.SIGINT, "map")]
STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
STOPPED = 75


@pytest.mark.parametrize(
    ("place", "number", "kind"),
    [
        key if key in SIGNALS_BY_DEFAULT else also(*key)
        for key in itertools.product(SIGNALS, STOP_SIGNALS, ["map", "stream"])
    ],
)
def test_signal_saves_a_checkpoint_and_exits(script, flags, uninterrupted, monkeypatch, place, number, kind):
    """Between two batches, in or before a validation (put off, then made up for), in a checkpoint."""
    calls, action, expected = SIGNALS[place]
    flags.update(max_train_steps=5, checkpointing_steps=3, validation_steps=2, **VALIDATION)
    flags.update({"train_batch_size": 2, "gradient_accumulation_steps": 2} if kind == "map" else STREAMED)
    fault = Fault(place.removesuffix("-behind"), (calls[kind],), partial(action, number))
    with monkeypatch.context() as patch:
        install(fault, patch.setattr)
        assert run_to_status(script, flags) == STOPPED
    out = flags["output_dir"]
    assert checkpoints(out) == expected and not (out / LORA_WEIGHTS).exists()
    run(script, {**flags, "resume_from_checkpoint": "latest"})
    whole = uninterrupted(flags)
    assert_exact(whole, out)
    assert content(out / "validation") == content(whole / "validation")


def test_signal_in_the_last_step_or_later_costs_no_weights(script, flags, monkeypatch):
    flags.update(max_train_steps=2)
    with monkeypatch.context() as patch:
        install(Fault("step", (2,), partial(signalled, signal.SIGTERM)), patch.setattr)
        assert run_to_status(script, flags) == STOPPED
    flags.update(resume_from_checkpoint="latest")
    install(Fault("weights", (1,), partial(signalled, signal.SIGTERM)), monkeypatch.setattr)
    assert run_to_status(script, flags) == 0
    trained(flags["output_dir"])


@pytest.mark.parametrize(
    ("rank", "place", "call", "number", "step"),
    [
        (1, "step", 4, signal.SIGUSR1, 4),
        also(0, "step", 2, signal.SIGINT, 2),
        also(0, "checkpoint", 1, signal.SIGTERM, 4),
        also(1, "drawing", 4, signal.SIGTERM, 3),
        also(0, "evaluation", 3, signal.SIGUSR1, 3),
    ],
)
def test_signal_to_one_rank_stops_all(flags, uninterrupted, rank, place, call, number, step):
    flags.update(train_batch_size=2, max_train_steps=5, checkpointing_steps=3, validation_steps=2, **VALIDATION)
    statuses, outputs = run_ranks(flags, {rank: [Fault(place, (call,), partial(signalled, number))]})
    assert statuses == 2 * [STOPPED], outputs
    assert checkpoints(flags["output_dir"])[-1] == step
    out = run_ranks_well({**flags, "resume_from_checkpoint": "latest"})
    assert_exact(uninterrupted(flags, size=2), out)


LAUNCHERS = {
    "accelerate": ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=1"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    "python": [],
}


def launch_and_signal(folder, launcher, target, flags, faults, events):
    """
    Launch a run, and send a signal to `target` at each of the events, which are (files to be there, signal); returns
    the launcher's status and what was printed. A group is what a terminal sends Ctrl-C to.
    """
    size = 2 if launcher == "torchrun" else 1
    with (folder / "log").open("w") as output:
        line = [sys.executable, *LAUNCHERS[launcher], *cluster.with_faults(faults), SCRIPT, *command_line(flags)]
        process = subprocess.Popen(list(map(str, line)), stdout=output, stderr=output, start_new_session=True)
    family = [psutil.Process(process.pid)]
    try:
        for files, number in events:
            deadline = time.monotonic() + cluster.TIMEOUT
            while process.poll() is None and not all(file.exists() for file in files):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            family = family[:1] + family[0].children(recursive=True)
            ranks = [member for member in family if "cpu_cluster.py" in " ".join(member.cmdline()[:3])]
            ranks = [member for member in ranks if member.parent() not in ranks]
            assert len(ranks) == size, (folder / "log").read_text()
            last = max(ranks, key=lambda member: int(member.environ().get("RANK", 0)))
            if target == "group":
                os.killpg(process.pid, number)
            else:
                (last if target == "rank" else family[0]).send_signal(number)
        process.wait(cluster.TIMEOUT)
        _, hung = psutil.wait_procs(family[1:], cluster.TIMEOUT)
    finally:
        for member in filter(psutil.Process.is_running, reversed(family)):
            member.kill()
    log = (folder / "log").read_text()
    assert not hung and process.returncode != 0, log
    return process.returncode, log


@pytest.mark.parametrize(
    ("launcher", "target", "number"),
    [
        ("accelerate", "rank", signal.SIGTERM),
        also("torchrun", "launcher", signal.SIGTERM),
        also("accelerate", "group", signal.SIGINT),
        also("torchrun", "group", signal.SIGINT),
        also("torchrun", "rank", signal.SIGUSR1),
        also("python", "rank", signal.SIGTERM),
        also("accelerate", "rank", signal.SIGUSR1),
    ],
)
def test_signal_to_a_launched_run(script, flags, uninterrupted, tmp_path, launcher, target, number):
    """Each rank that is to be signalled waits for it within step 3. Workers in its group get the signal, too."""
    size = 2 if launcher == "torchrun" else 1
    flags.update(dataloader_num_workers=1, train_batch_size=2, max_train_steps=5)
    reached = {rank: tmp_path / f"reached-{rank}" for rank in ([size - 1] if target == "rank" else range(size))}
    faults = {n: [Fault("step", (3,), partial(cluster.waiting_for_a_signal, file))] for n, file in reached.items()}
    status, log = launch_and_signal(tmp_path, launcher, target, flags, faults, [(list(reached.values()), number)])
    if launcher == "python":
        assert status == STOPPED
    sentence = "Stopped by a signal (the checkpoint of step 3 is saved). Resume with --resume_from_checkpoint latest."
    assert sentence in log, log
    assert checkpoints(flags["output_dir"]) == [3]
    resumed = {**flags, "resume_from_checkpoint": "latest"}
    run(script, resumed) if size == 1 else run_ranks_well(resumed)
    assert_exact(uninterrupted(flags, size), flags["output_dir"])


@pytest.mark.parametrize("number", [signal.SIGINT, also(signal.SIGTERM)])
def test_second_signal_after_ctrl_c_ends_a_process_at_once(flags, number):
    """In the checkpoint that the first one asked for. torchrun answers a second Ctrl-C with SIGTERM."""
    flags.update(checkpointing_steps=1)
    faults = (
        Fault("step", (2,), partial(signalled, signal.SIGINT)),
        Fault("checkpoint", (2,), partial(signalled, number)),
    )
    statuses, outputs = run_ranks(flags, {0: faults}, size=1)
    assert statuses == [-number], outputs
    assert checkpoints(flags["output_dir"]) == [1]


@pytest.mark.matrix
@pytest.mark.parametrize("launcher", ["python", "torchrun"])
def test_second_ctrl_c_ends_a_launched_run_at_once(flags, tmp_path, launcher):
    """Each rank waits for the first one in step 3, and for the second one in the checkpoint that it writes then."""
    size = 2 if launcher == "torchrun" else 1
    flags.update(dataloader_num_workers=1, train_batch_size=2, max_train_steps=5)
    steps, saves = ([tmp_path / f"{place}-{rank}" for rank in range(size)] for place in ("step", "save"))
    faults = {
        rank: [
            Fault("step", (3,), partial(cluster.waiting_for_a_signal, steps[rank])),
            Fault("checkpoint", (1,), partial(cluster.waiting_for_the_end, saves[rank])),
        ]
        for rank in range(size)
    }
    launch_and_signal(tmp_path, launcher, "group", flags, faults, [(steps, signal.SIGINT), (saves, signal.SIGINT)])
    assert checkpoints(flags["output_dir"]) == []


# Ends ---------------------------------------------------------------------------------------------------------------
@pytest.mark.matrix
def test_unexpected_error_ends_a_run_with_workers(flags):
    """They ignore the signal with which Python ends its children, and would be waited for."""
    flags.update(dataloader_num_workers=2)
    fault = Fault("step", (2,), partial(raising, RuntimeError("out of memory")))
    statuses, outputs = run_ranks(flags, {0: [fault]}, size=1)
    assert statuses == [1] and "RuntimeError: out of memory" in outputs[0], outputs


# The flags of a run, what happens to its second process, and the exit status of both (the first may fail with it).
ENDS = {
    "finished": ({}, None, set()),
    "error": ({}, Fault("step", (2,), partial(raising, RuntimeError("out of memory"))), {1, -signal.SIGTERM}),
    "signal": ({}, Fault("step", (1,), partial(signalled, signal.SIGTERM)), {STOPPED}),
    "refusal": ({"resume_from_checkpoint": "checkpoint-9"}, None, {1}),
    "Ctrl-C": ({"run_validation": True}, Fault("drawing", (1,), partial(signalled, signal.SIGINT)), {1, 130}),
}


@pytest.mark.parametrize(("end", "number"), [("finished", 1), *(also(end, 10) for end in ENDS)])
def test_launched_runs_end(flags, end, number):
    """However a run ends, it must not hang or crash while the interpreter takes down threads and sockets."""
    changes, fault, expected = ENDS[end]
    flags.update(train_batch_size=2, max_train_steps=2, report_to="none", checkpointing_steps=1, **changes)
    for _ in range(number):
        done = launch(flags, 2, timeout=cluster.TIMEOUT, wrapper=cluster.with_faults({1: [fault]}) if fault else ())
        codes = {int(code) for code in re.findall(r"exitcode\s*: (-?\d+) \(pid", done.stderr)}
        # When a process has failed, torchrun sends SIGTERM to one that has not ended yet.
        codes -= {-signal.SIGTERM} if expected else set()
        assert done.returncode == bool(expected) and codes <= expected, done.stderr
        assert bool(codes) == bool(expected), done.stderr
        shutil.rmtree(flags["output_dir"])


# Waits --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("place", "lock", "streaming"),
    [also("prepare", "_builder.lock", None), ("file", ".safetensors.lock", True)],
    ids=["data set", "index"],
)
def test_what_one_rank_prepares_the_other_awaits_at_a_lock(flags, tmp_path, place, lock, streaming):
    """In a collective it would wait no longer than the time limit of the process group."""
    flags.update(train_batch_size=2, max_train_steps=1, cache_dir=tmp_path / "cache", streaming=streaming)
    asking = Fault("lock", cluster.EVERY_CALL, partial(cluster.noting_lock, tmp_path))
    slow = Fault(place, (1,), partial(cluster.waiting_for_the_ranks, tmp_path, lock, 2))
    statuses, outputs = run_ranks(flags, {0: [asking, slow], 1: [asking, slow]})
    assert statuses == [0, 0], "\n".join(outputs)


def test_ranks_meet_while_they_fill_a_cache(script, flags, tmp_path):
    """When one fails at its first pair, the other does not go on to its last one."""
    pairs = tmp_path / "pairs"
    draw_pairs(pairs, num_pairs=3 * script.PAIRS_PER_ROUND, num_shards=1)
    flags.update(dataset_name=pairs, cache_dir=tmp_path / "cache", cache_latents=True, train_batch_size=2)
    # The first two images that a rank encodes are a trial.
    fault = Fault("encode", (3,), partial(raising, RuntimeError("out of memory")))
    statuses, outputs = run_ranks(flags, {1: [fault]})
    assert_one_sentence(statuses, outputs, "--cache_latents: pairs could not be encoded into ", "out of memory")
    assert len(list(tmp_path.glob("cache/mapo_latents/*/*/*.safetensors"))) == script.PAIRS_PER_ROUND


@pytest.mark.parametrize("place", ["upload", also("end")])
def test_what_is_sent_last_keeps_no_rank_waiting(flags, tmp_path, place):
    """Neither an upload nor a tracker that is slow may outlast the time limit of a process group."""
    flags.update(train_batch_size=2, max_train_steps=1, push_to_hub=True)
    faults = {
        "repository": Fault("repository", (1,), cluster.created),
        "upload": Fault("upload", (1,), partial(cluster.noting_alone, tmp_path / "upload")),
        "end": Fault("end", (1,), partial(cluster.noting, tmp_path / "end")),
    }
    statuses, outputs = run_ranks(flags, {0: list(faults.values())})
    assert statuses == [0, 0], "\n".join(outputs)
    assert (tmp_path / place).read_text() == "False\n"


# Gradients ----------------------------------------------------------------------------------------------------------
def assert_nothing_trained_between(out, step, other):
    folder, other = out / f"checkpoint-{step}", out / f"checkpoint-{other}"
    assert_equal(trained(folder), trained(other))
    states, others = (torch.load(path / "optimizer.bin")["state"] for path in (folder, other))
    assert states.keys() == others.keys() and len(states) > 0
    for name, state in states.items():
        assert_equal(state, others[name])


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_steps_without_a_finite_gradient_are_left_out(script, flags, tmp_path, monkeypatch, caplog, kind):
    """Bad in the second half of step 3 and in the first half of step 4; the count goes on after a restart."""
    flags.update(max_train_steps=5, checkpointing_steps=1, train_batch_size=2, gradient_accumulation_steps=2)
    install(Fault("step", (6, 7), partial(not_finite, kind)), monkeypatch.setattr)
    out = run(script, flags)
    assert_nothing_trained_between(out, 2, 3)
    assert_nothing_trained_between(out, 2, 4)
    before, after = trained(out / "checkpoint-4"), trained(out)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(weight.isfinite().all() for weight in after.values())
    warned = re.findall(r"Step (\d+): non-finite gradient, update skipped \((\d+) in a row\)", caplog.text)
    assert warned == [("3", "1"), ("4", "2")]
    assert scalars(out)["skipped_steps"] == {1: 0, 2: 0, 3: 1, 4: 2, 5: 2}
    assert list(scalars(out)["loss"]) == [1, 2, 5]
    assert json.loads((out / "checkpoint-5" / "mapo_state.json").read_text())["bad_steps"] == 0
    monkeypatch.undo()
    flags.update(output_dir=tmp_path / "resumed", resume_from_checkpoint=out / "checkpoint-4")
    assert scalars(run(script, flags))["skipped_steps"] == {5: 2}


def test_bad_steps_in_a_row_end_the_run(script, flags, monkeypatch, caplog):
    """Those before the checkpoint of step 4 are not in a row, and the count of the others goes on over a restart."""
    flags.update(max_train_steps=7, checkpointing_steps=4, max_bad_steps=2)
    bad = partial(not_finite, "loss")
    with monkeypatch.context() as patch:
        install(Fault("step", (2, 4), bad), patch.setattr)
        run(script, {**flags, "max_train_steps": 4})
    with monkeypatch.context() as patch, pytest.raises(script.TrainingError) as error:
        install(Fault("step", (1,), bad), patch.setattr)
        run(script, {**flags, "resume_from_checkpoint": "latest"})
    pairs, _ = script.load_pairs(script.parse_args(command_line(flags)), (4, 8, 8), 1000)
    rows = script.epoch_order(pairs.index, 0, 0, script.Layout(4, 1, 4))[16:20]
    named = ", ".join(sorted(f"row {row}" for row in rows))
    assert "--max_bad_steps 2: no finite gradient in the last 2 steps (the checkpoint of step 5" in str(error.value)
    warned = re.findall(r"Step 5: .* Pairs on process 0: (.*)\.", caplog.text)
    assert [", ".join(sorted(rows.split(", "))) for rows in warned] == [named]
    assert checkpoints(flags["output_dir"]) == [4, 5]


def test_ranks_agree_on_a_bad_step_of_one(flags):
    flags.update(train_batch_size=2, max_train_steps=9, checkpointing_steps=1, max_bad_steps=2)
    statuses, outputs = run_ranks(flags, {1: [Fault("step", (2, 4, 5), partial(not_finite, "loss"))]})
    assert_one_sentence(statuses, outputs, "--max_bad_steps 2: no finite gradient in the last 2 steps")
    for rank, output in enumerate(outputs):
        (rows,) = re.findall(rf"Step 5: non-finite gradient.* Pairs on process {rank}: (row \d+, row \d+)\.", output)
    out = flags["output_dir"]
    assert checkpoints(out) == [1, 2, 3, 4, 5]
    assert_nothing_trained_between(out, 1, 2)
    assert_nothing_trained_between(out, 3, 4)


# Disks --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("rank", "victim", "size"), [(4, 1, 1_000), also(4, 0, 10_000), also(None, 0, 100_000)])
def test_full_disk_on_one_rank_ends_all_in_one_sentence(flags, uninterrupted, rank, victim, size):
    flags.update(train_batch_size=2, max_train_steps=3, checkpointing_steps=1, rank=rank, checkpoints_total_limit=1)
    statuses, outputs = run_ranks(flags, {victim: [Fault("checkpoint", (2,), partial(full_disk, size))]})
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


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file system")
@pytest.mark.parametrize(("rank", "room"), [(4, 40_960), also(4, None), also(None, 0)])
@pytest.mark.parametrize("size", [1, also(2)])
def test_real_disk_that_is_full(script, flags, small_disk, uninterrupted, monkeypatch, rank, room, size):
    """The tracker's files are on it, too."""
    out = small_disk / "out"
    flags.update(train_batch_size=4 // size, max_train_steps=3, checkpointing_steps=1, rank=rank, output_dir=out)
    fault = Fault("checkpoint", (2,), partial(cluster.shrink_disk, small_disk, room))
    statuses, outputs = run_ranks(flags, {0: [fault]}, size)
    assert_one_sentence(statuses, outputs, f"{out / 'checkpoint-2'} could not be written")
    assert checkpoints(out) == [1]
    cluster.remount(small_disk, "rw,size=64m")
    resumed = {**flags, "resume_from_checkpoint": "latest"}
    run(script, resumed) if size == 1 else run_ranks_well(resumed)
    assert_equal(trained(out), trained(uninterrupted(flags, size)))


def test_weights_that_cannot_be_saved_at_the_end_are_one_sentence(flags):
    """Step 3 has no checkpoint of its own: the disk is full just when all is done."""
    flags.update(max_train_steps=3, checkpointing_steps=2)
    statuses, outputs = run_ranks(flags, {0: [Fault("lora", (2,), partial(full_disk, 10_000))]}, size=1)
    assert_one_sentence(statuses, outputs, f"{flags['output_dir']} could not be written")
    assert checkpoints(flags["output_dir"]) == [2]


# Sources ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def own_pairs(flags, tmp_path):
    """Pairs that may be damaged, in twelve row groups of four."""
    flags.update(dataset_name=tmp_path / "pairs", cache_dir=tmp_path / "cache")
    draw_pairs(tmp_path / "pairs", num_pairs=48, num_shards=3, row_group_size=4)
    shutil.copytree(tmp_path / "pairs", tmp_path / "copy")
    return tmp_path / "pairs"


def damaged(how, folder, call=lambda: None):
    for path in sorted(Path(folder).glob("data/*.parquet")):
        if how == "removed":
            path.unlink()
        else:
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 3] if how == "truncated" else b"garbage " * (len(content) // 8))
    return call()


@pytest.mark.parametrize(
    ("how", "changes"),
    [
        also("truncated", {}),
        ("removed", {}),
        also("garbage", {"train_batch_size": 2, "gradient_accumulation_steps": 3, "max_train_steps": 5}),
        (ConnectionError("Couldn't reach the hub"), {"train_batch_size": 2, "gradient_accumulation_steps": 3}),
        also(httpx.ConnectError("[Errno 101] Network is unreachable"), {}),
        also(httpx.ReadTimeout("timed out"), {}),
        also(EOFError("torn"), {}),
    ],
    ids=["truncated", "removed", "garbage-accumulation", "hub", "unreachable", "timeout", "torn"],
)
def test_source_that_breaks_in_mid_run(script, flags, uninterrupted, own_pairs, monkeypatch, how, changes):
    """The run ends with a checkpoint of the last step that it had all pairs for."""
    flags.update({**STREAMED, "max_train_steps": 8, **changes})
    whole = uninterrupted(flags)
    fault = Fault("step", (3,), partial(damaged, how, own_pairs))
    if isinstance(how, Exception):
        fault = Fault("source", (4,), partial(raising, how))
    with monkeypatch.context() as patch, pytest.raises(script.TrainingError) as error:
        install(fault, patch.setattr)
        run(script, flags)
    out = flags["output_dir"]
    (step,) = checkpoints(out)
    kept = f"(the checkpoint of step {step} is saved)"
    assert f"--dataset_name {own_pairs} cannot be read any further {kept}: " in str(error.value)
    assert "\n" not in str(error.value) and (isinstance(how, str) or str(how) in str(error.value))
    shutil.copytree(own_pairs.parent / "copy", own_pairs, dirs_exist_ok=True)
    run(script, {**flags, "resume_from_checkpoint": "latest"})
    assert_exact(whole, out)


@pytest.mark.matrix
def test_source_that_breaks_in_mid_run_under_workers(flags, uninterrupted, own_pairs):
    flags.update(STREAMED, dataloader_num_workers=2, max_train_steps=8)
    whole = uninterrupted(flags)
    fault = Fault("step", (3,), partial(damaged, "removed", own_pairs))
    statuses, outputs = run_ranks(flags, {0: [fault]}, size=1)
    (step,) = checkpoints(flags["output_dir"])
    sentence = f"--dataset_name {own_pairs} cannot be read any further (the checkpoint of step {step} is saved)"
    assert_one_sentence(statuses, outputs, sentence, "FileNotFoundError")
    shutil.copytree(own_pairs.parent / "copy", own_pairs, dirs_exist_ok=True)
    statuses, outputs = run_ranks({**flags, "resume_from_checkpoint": "latest"}, size=1)
    assert statuses == [0], outputs
    assert_exact(whole, flags["output_dir"])


def test_source_that_fails_on_one_rank_stops_all(flags, uninterrupted, own_pairs):
    flags.update(STREAMED, train_batch_size=2, max_train_steps=5, gradient_accumulation_steps=2)
    whole = uninterrupted(flags, size=2)
    fault = Fault("source", (4,), partial(raising, ConnectionError("Couldn't reach the hub")))
    statuses, outputs = run_ranks(flags, {1: [fault]})
    sentence = f"--dataset_name {own_pairs} cannot be read any further (the checkpoint of step "
    assert_one_sentence(statuses, outputs, sentence, "Couldn't reach the hub")
    assert len(checkpoints(flags["output_dir"])) == 1
    assert_exact(whole, run_ranks_well({**flags, "resume_from_checkpoint": "latest"}))


def test_held_out_pairs_that_one_rank_cannot_read_stop_all(flags):
    flags.update(streaming=True, train_batch_size=2, num_validation_pairs=8)
    fault = Fault("held out", (1,), partial(raising, ConnectionError("gone")))

    statuses, outputs = run_ranks(flags, {1: [fault]})

    assert_one_sentence(statuses, outputs, "The held-out pairs cannot be read", "gone")


@pytest.mark.parametrize(("call", "sentence"), [(1, "cannot be trained on"), (2, "cannot be read")])
def test_source_that_fails_before_the_first_step(script, flags, own_pairs, monkeypatch, call, sentence):
    """In the first pair, which is tried, or in the first batch, which needs two row groups."""
    flags.update(STREAMED, train_batch_size=8)
    script.load_pairs(script.parse_args(command_line(flags)), (4, 8, 8), 1000)
    install(Fault("source", (call,), partial(raising, ConnectionError("gone"))), monkeypatch.setattr)
    with pytest.raises(script.TrainingError, match=f"--dataset_name {own_pairs} {sentence}: .*gone"):
        run(script, flags)
    assert checkpoints(flags["output_dir"]) == []


@pytest.mark.parametrize("how", ["truncated", "removed"])
def test_shards_that_are_broken_from_the_start(script, flags, own_pairs, how):
    damaged(how, own_pairs)
    for streaming in (None, True):
        with pytest.raises(script.TrainingError, match=f"--dataset_name {own_pairs} cannot be read: [^\\n]*$"):
            run(script, {**flags, "streaming": streaming})
    if how == "truncated":
        assert_one_sentence(*run_ranks({**flags, "streaming": True}), f"--dataset_name {own_pairs} cannot be read")


def test_prepared_pairs_need_their_shards_no_more(script, flags, uninterrupted, own_pairs, monkeypatch):
    whole = uninterrupted(flags)
    install(Fault("step", (2,), partial(damaged, "removed", own_pairs)), monkeypatch.setattr)
    assert_exact(whole, run(script, flags))


# Trackers -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("place", "first"), [("log", 3), ("picture", 1), ("end", 1)])
def test_tracker_that_dies_in_mid_run_costs_nothing(script, flags, uninterrupted, monkeypatch, place, first):
    flags.update(max_train_steps=4, validation_steps=2, checkpointing_steps=2, **VALIDATION)
    whole = uninterrupted(flags)
    gone = partial(raising, BrokenPipeError("the tracker is gone"))
    install(Fault(place, cluster.EVERY_CALL[first - 1 :], gone), monkeypatch.setattr)
    out = run(script, flags)
    assert_equal(trained(out), trained(whole))
    assert content(out / "validation") == content(whole / "validation")
    assert checkpoints(out) == [2, 4]


@pytest.mark.parametrize("fault", ["killed", also("unreachable")])
def test_wandb_that_is_lost_costs_nothing(flags, uninterrupted, fault):
    """Killed in mid-run, or out of reach from the start."""
    flags.update(report_to="wandb", validation_steps=2, **VALIDATION)
    address = {"WANDB_BASE_URL": f"http://127.0.0.1:{cluster.free_port()}", "WANDB_API_KEY": 40 * "0"}
    env = {"WANDB_MODE": "online", "WANDB_INIT_TIMEOUT": "5", **address} if fault == "unreachable" else {}
    faults = {0: [Fault("step", (2,), cluster.wandb_killed)]} if fault == "killed" else {}
    statuses, outputs = run_ranks(flags, faults, size=1, env=env)
    assert statuses == [0] and (fault == "killed" or "training continues without trackers" in outputs[0]), outputs
    assert_equal(trained(flags["output_dir"]), trained(uninterrupted({**flags, "report_to": "tensorboard"})))


# kill -9 ------------------------------------------------------------------------------------------------------------
# In training, in a validation, in writing the second checkpoint, before its state, and in removing the first.
KILLS = {"step": 5, "drawing": 5, "checkpoint": 2, "replace": 2, "rmdir": 1}
KILLS_BY_DEFAULT = [("replace", (0,))]


@pytest.mark.parametrize(
    ("place", "victims"),
    [
        key if key in KILLS_BY_DEFAULT else also(*key)
        for key in itertools.product(KILLS, [(0,), (1,), (0, 1)])
        if key != ("replace", (1,)) and key != ("rmdir", (1,))
    ],
)
def test_killed_ranks(flags, uninterrupted, place, victims):
    flags.update(train_batch_size=2, max_train_steps=8, checkpointing_steps=2, validation_steps=3, **VALIDATION)
    flags.update(checkpoints_total_limit=1)
    whole = uninterrupted(flags, size=2)
    statuses, outputs = run_ranks(flags, {rank: [Fault(place, (KILLS[place],), cluster.killed)] for rank in victims})
    assert -signal.SIGKILL in statuses and 0 not in statuses, outputs
    out = flags["output_dir"]
    assert len(checkpoints(out)) == 1
    assert_exact(whole, run_ranks_well({**flags, "resume_from_checkpoint": "latest"}))
