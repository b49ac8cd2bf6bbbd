"""Speed: each optimizer step reads the device once and reduces gradients once, with few operators."""

import functools
import json
import re
import subprocess
import sys

import accelerate
import cpu_cluster
import pytest
import torch
from conftest import ROOT, matrix, run
from cpu_cluster import Fault, install
from runs import run_ranks_successfully


# Functions that read a tensor's value on the host, and functions in which processes wait for each other. DDP's own
# reduction is in C++.
READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero")
COLLECTIVES = (
    "all_reduce",
    "reduce",
    "all_gather",
    "all_gather_into_tensor",
    "gather",
    "broadcast",
    "barrier",
    "all_gather_object",
    "gather_object",
    "broadcast_object_list",
    "scatter",
    "reduce_scatter_tensor",
)


def record_events(file, patch, call):
    """From this call on, record every read, collective and log line, and write them to `file` at each log line."""
    events = []

    def record(owner, name):
        original = getattr(owner, name)

        @functools.wraps(original)
        def recorded(*args, **kwargs):
            # torch.optim reads its step counters with this function. They are on the CPU.
            if sys._getframe(1).f_code.co_name != "_get_value":
                events.append(name)
            if name == "log":
                file.write_text(json.dumps(events))
            return original(*args, **kwargs)

        patch(owner, name, recorded)

    for name in READS:
        record(torch.Tensor, name)
    for name in COLLECTIVES:
        record(torch.distributed, name)
    record(accelerate.Accelerator, "log")
    return call()


ACCUMULATED = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "use_8bit_adam": True}
VARIANTS = {
    "LoRA": {},
    "8-bit": {"rank": None, "use_8bit_adam": True},
    "full_bf16": {"rank": None, "use_8bit_adam": True, "mixed_precision": "bf16", "full_bf16": True},
    "cached": {"cache_latents": True, "loss_type": "mapo_v1"},
    "streamed": {"streaming": True, "gradient_checkpointing": True},
    "accumulated": ACCUMULATED,
}


def run_and_record(script, flags, tmp_path, monkeypatch):
    flags.update(cache_dir=tmp_path, report_to="none")
    action = functools.partial(record_events, tmp_path / "events", monkeypatch.setattr)
    install(Fault("step", (1,), action), monkeypatch.setattr)
    run(script, flags)
    return json.loads((tmp_path / "events").read_text())


@pytest.mark.parametrize("variant", VARIANTS)
def test_step_reads_the_device_once(script, flags, tmp_path, monkeypatch, variant):
    """The metrics with `tolist`. `__int__` reads the skipped rows of each batch, which are on the host."""
    flags.update(VARIANTS[variant])

    events = run_and_record(script, flags, tmp_path, monkeypatch)

    batches = 2 if variant == "accumulated" else 1
    assert events == 4 * [*batches * ["__int__"], "tolist", "log"]


def test_another_read_is_noticed(script, flags, tmp_path, monkeypatch):
    """A check of the test above."""
    preference_loss = script.preference_loss

    def loss_with_a_read(run, batch):
        loss, metrics = preference_loss(run, batch)
        assert loss > -1
        return loss, metrics

    monkeypatch.setattr(script, "preference_loss", loss_with_a_read)

    events = run_and_record(script, flags, tmp_path, monkeypatch)

    assert "__bool__" in events


def test_processes_reduce_once_per_step(flags, tmp_path):
    flags.update(ACCUMULATED, cache_dir=tmp_path, report_to="none")
    files = [tmp_path / f"events-{rank}" for rank in range(2)]
    faults = {}
    for rank, file in enumerate(files):
        faults[rank] = [Fault("step", (1,), functools.partial(record_events, file, setattr))]

    run_ranks_successfully(flags, faults)

    for file in files:
        assert json.loads(file.read_text()) == 4 * ["__int__", "__int__", "all_reduce", "tolist", "log"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only CUDA reports synchronizations")
@pytest.mark.parametrize("variant", ["LoRA", "8-bit", "cached"])
def test_objective_does_not_wait_for_the_gpu(script, flags, tmp_path, monkeypatch, variant):
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    preference_loss = script.preference_loss

    def loss_without_synchronization(*args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return preference_loss(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(script, "preference_loss", loss_without_synchronization)

    run(script, {**flags, **VARIANTS[variant], "cache_dir": tmp_path})


# Operators of a step ------------------------------------------------------------------------------------------------
@pytest.fixture
def benchmarks(monkeypatch):
    """Makes the benchmarks importable."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "benchmarks")


@pytest.fixture
def host(script, benchmarks, monkeypatch):
    """The benchmark of the host's work, with the script as a module."""
    import host

    monkeypatch.setattr(host, "script", script)
    return host


@pytest.fixture
def narrow_sdxl(host, tmp_path):
    """A folder with SDXL's topology at tiny width."""
    host.build_world(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", ["lora, checkpointing", "full", matrix("lora"), matrix("full, checkpointing")])
def test_step_dispatches_hardly_more_operators_than_a_bare_loop(host, narrow_sdxl, case):
    steps = host.build_steps(narrow_sdxl, host.CASES[case], "bf16")

    operators = host.count_operators(steps)

    assert operators["script"] <= 1.05 * operators["bare"]


def test_step_does_not_iterate_over_the_model(host, narrow_sdxl, monkeypatch):
    """With SDXL's thousands of parameters, that takes a tenth of a LoRA step."""
    step = host.build_steps(narrow_sdxl, host.CASES["lora, checkpointing"], "bf16")["script"]
    step()

    def refuse(*args, **kwargs):
        raise AssertionError("the step iterates over the model")

    for name in ("named_parameters", "named_modules", "named_buffers"):
        monkeypatch.setattr(torch.nn.Module, name, refuse)

    step()


@pytest.mark.matrix
def test_benchmark_for_a_gpu_runs_at_toy_size_and_continues(benchmarks, tmp_path, monkeypatch, capsys):
    import gpu

    commands = []

    def run_forked(command, **options):
        commands.append(command)
        [status], [output] = cpu_cluster.run_ranks(command[1:], size=1)
        return subprocess.CompletedProcess(command, status, stdout=output, stderr="")

    def measure(*words):
        monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path), "--toy", *words])
        gpu.main()
        return capsys.readouterr().out

    monkeypatch.setattr(gpu.subprocess, "run", run_forked)

    without_time = measure("--minutes", "0")
    skipped = measure("--skip", "rank", "compile")
    first = measure()
    second = measure()

    assert "Cases left: 2." in without_time
    assert "Cases left: 0." in skipped
    # Seconds, pairs, memory, TFLOP/s, and the shares of the peak and of waiting.
    row = r"^\| .* \| \d+\.\d{3} \| \d+\.\d\d \| \d+\.\d \| \d+ \| \d+% \| \d+% \|$"
    assert len(re.findall(row, first, re.M)) == 2
    assert len(re.findall(row, second, re.M)) == 2
    bare, lora = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert bare["case"][1] == "bare"
    assert lora["case"] == ["--rank 16", "--cache_latents", 1, ""]
    for result in (bare, lora):
        assert result["pairs_per_second"] > 0
        assert result["busy"] > 0
    assert len(commands) == 2
