"""Speed: one read of the device and one reduction in each optimizer step, and --compile."""

import functools
import json
import re
import subprocess
import sys

import accelerate
import pytest
import torch
from conftest import ROOT, SCRIPT, command_line, run, scalars
from cpu_cluster import Fault, install, run_ranks
from test_training import trained


# All that reads a tensor's value on the host, and all by which processes meet (DDP's own reduction is in C++).
READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero")
MEETINGS = ("all_reduce", "reduce", "all_gather", "all_gather_into_tensor", "gather", "broadcast", "barrier")
MEETINGS += ("all_gather_object", "gather_object", "broadcast_object_list", "scatter", "reduce_scatter_tensor")


def count_from_here(file, patch, call):
    """From this call on, note every read, meeting and log line, and write them to `file` at each log line."""
    events = []

    def note(owner, name):
        original = getattr(owner, name)

        @functools.wraps(original)
        def noted(*args, **kwargs):
            # torch.optim keeps its step counters, which it reads by this function, on the CPU.
            if sys._getframe(1).f_code.co_name != "_get_value":
                events.append(name)
            if name == "log":
                file.write_text(json.dumps(events))
            return original(*args, **kwargs)

        patch(owner, name, noted)

    for name in READS:
        note(torch.Tensor, name)
    for name in MEETINGS:
        note(torch.distributed, name)
    note(accelerate.Accelerator, "log")
    return call()


VARIANTS = {
    "LoRA": {},
    "8-bit": {"rank": None, "use_8bit_adam": True},
    "full_bf16": {"rank": None, "use_8bit_adam": True, "mixed_precision": "bf16", "full_bf16": True},
    "cached": {"cache_latents": True, "loss_type": "mapo_v1"},
    "streamed": {"streaming": True, "gradient_checkpointing": True},
    "accumulated": {"train_batch_size": 2, "gradient_accumulation_steps": 2, "use_8bit_adam": True},
}


def expected_events(flags, meetings=()):
    """Of four steps. The numbers of skipped rows come from the loader, on the host."""
    step = [*flags.get("gradient_accumulation_steps", 1) * ["__int__"], *meetings, "tolist", "log"]
    return 4 * step


@pytest.mark.parametrize("variant", VARIANTS)
def test_step_reads_the_device_once(script, flags, tmp_path, monkeypatch, variant):
    flags.update(VARIANTS[variant], cache_dir=tmp_path, report_to="none")
    action = functools.partial(count_from_here, tmp_path / "events", monkeypatch.setattr)
    install(Fault("step", (1,), action), monkeypatch.setattr)
    run(script, flags)
    assert json.loads((tmp_path / "events").read_text()) == expected_events(flags)


def test_processes_meet_once_a_step(flags, tmp_path):
    flags.update(VARIANTS["accumulated"], cache_dir=tmp_path, report_to="none")
    files = [tmp_path / f"events-{rank}" for rank in range(2)]
    actions = [functools.partial(count_from_here, file, setattr) for file in files]
    faults = {rank: [Fault("step", (1,), action)] for rank, action in enumerate(actions)}
    statuses, outputs = run_ranks([SCRIPT, *command_line(flags)], faults)
    assert statuses == [0, 0], outputs
    for file in files:
        assert json.loads(file.read_text()) == expected_events(flags, meetings=["all_reduce"])


def test_another_read_is_noticed(script, flags, tmp_path, monkeypatch):
    step = script.preference_loss

    def reading(run, batch):
        loss, metrics = step(run, batch)
        assert loss > -1
        return loss, metrics

    monkeypatch.setattr(script, "preference_loss", reading)
    with pytest.raises(AssertionError, match="__bool__"):
        test_step_reads_the_device_once(script, flags, tmp_path, monkeypatch, "LoRA")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA alone says when it is waited for")
@pytest.mark.parametrize("variant", ["LoRA", "8-bit", "cached"])
def test_objective_does_not_wait_for_the_gpu(script, flags, tmp_path, monkeypatch, variant):
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    step = script.preference_loss

    def without_waiting(*args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(script, "preference_loss", without_waiting)
    run(script, {**flags, **VARIANTS[variant], "cache_dir": tmp_path})


@pytest.mark.matrix
@pytest.mark.parametrize("rank", [4, None], ids=["LoRA", "UNet"])
def test_compiled_and_eager_runs_resume_each_other(script, flags, tmp_path, rank):
    flags.update(rank=rank, learning_rate=1e-4, max_train_steps=4, checkpointing_steps=1)
    eager = run(script, flags)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    changes = {"compile": True, "resume_from_checkpoint": eager / "checkpoint-1", "max_train_steps": 3}
    compiled = run(script, {**flags, **changes, "output_dir": tmp_path / "compiled"})
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    changes = {"resume_from_checkpoint": compiled / "checkpoint-3", "output_dir": tmp_path / "eager again"}
    last = run(script, {**flags, **changes})
    losses = scalars(eager)["loss"]
    assert {**scalars(compiled)["loss"], **scalars(last)["loss"], 1: losses[1]} == pytest.approx(losses, rel=1e-5)
    weights, expected = trained(last), trained(eager)
    assert weights.keys() == expected.keys()
    assert max((weight - expected[name]).abs().max().item() for name, weight in weights.items()) < 2e-4


def test_benchmark_for_a_gpu_runs_at_toy_size(tmp_path, monkeypatch, capsys):
    """And measures nothing twice."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "benchmarks")
    import gpu

    started = []

    def forked(command, **options):
        started.append(command)
        (status,), (output,) = run_ranks(command[1:], size=1)
        return subprocess.CompletedProcess(command, status, stdout=output, stderr="")

    monkeypatch.setattr(gpu.subprocess, "run", forked)

    def measure(*words):
        monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path), "--toy", *words])
        gpu.main()
        return capsys.readouterr().out

    assert "Cases left: 2." in measure("--minutes", "0")
    assert "Cases left: 0." in measure("--skip", "rank", "compile")
    # Seconds, pairs, memory, TFLOP/s, and the shares of the peak and of waiting.
    row = r"^\| .* \| \d+\.\d{3} \| \d+\.\d\d \| \d+\.\d \| \d+ \| \d+% \| \d+% \|$"
    for _ in range(2):
        assert len(re.findall(row, measure(), re.M)) == 2
        bare, cased = (json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines())
        assert cased["case"] == ["--rank 16", "--cache_latents", 1, ""] and bare["case"][1] == "bare"
        assert all(result[value] > 0 for result in (cased, bare) for value in ("pairs_per_second", "busy"))
    assert len(started) == 2
