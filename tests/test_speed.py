"""Speed: one read of the device and one reduction in each optimizer step, and --compile."""

import ctypes
import functools
import gc
import json
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import NamedTuple

import accelerate
import pytest
import torch
from conftest import ROOT, SCRIPT, also, command_line, run, scalars
from cpu_cluster import Fault, install, run_ranks
from diffusers import UNet2DConditionModel
from small_world import build_unet
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


# Operators of a step -------------------------------------------------------------------------------------------------
HOST_CASES = ["lora, checkpointing", "full", also("lora"), also("full, checkpointing")]


@pytest.fixture
def host(script, monkeypatch):
    """The benchmark of the host's work, with the script's module."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "benchmarks")
    import host

    monkeypatch.setattr(host, "script", script)
    return host


@pytest.fixture(scope="session")
def narrow_sdxl(tmp_path_factory):
    """A folder with SDXL's topology at tiny width."""
    sys.path.append(str(ROOT / "tests" / "benchmarks"))
    from host import build_world

    folder = tmp_path_factory.mktemp("narrow")
    build_world(folder)
    return folder


@pytest.mark.parametrize("case", HOST_CASES)
def test_step_dispatches_hardly_more_operators_than_a_bare_loop(host, narrow_sdxl, case):
    steps = host.build_steps(narrow_sdxl, host.CASES[case], "bf16")

    operators = host.count_operators(steps)

    assert operators["script"] <= 1.05 * operators["bare"], operators


def test_step_does_not_walk_the_model(host, narrow_sdxl, monkeypatch):
    """With SDXL's thousands of parameters, that takes a tenth of a LoRA step."""
    step = host.build_steps(narrow_sdxl, host.CASES["lora, checkpointing"], "bf16")["script"]
    step()
    for name in ("named_parameters", "named_modules", "named_buffers"):
        monkeypatch.setattr(torch.nn.Module, name, refuse)

    step()


def refuse(*args, **kwargs):
    raise AssertionError("called")


# Compiled blocks -----------------------------------------------------------------------------------------------------
RANKS = pytest.mark.parametrize("rank", [4, None], ids=["LoRA", "UNet"])


class Block(NamedTuple):
    """A UNet that is mostly transformer blocks, and a batch for it."""

    unet: torch.nn.Module
    inputs: dict

    def loss(self):
        return self.unet(**self.inputs, return_dict=False)[0].square().mean()


@pytest.fixture
def build(script, monkeypatch):
    """Build the same UNet for some flags. Its blocks are compiled up to the generation of code, which takes long."""
    compile_blocks = UNet2DConditionModel.compile_repeated_blocks
    traced = functools.partialmethod(compile_blocks, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(UNet2DConditionModel, "compile_repeated_blocks", traced)
    limit = torch._dynamo.config.recompile_limit
    budget = torch._functorch.config.activation_memory_budget

    def built(rank, **flags):
        torch._dynamo.reset()
        torch.manual_seed(0)
        config = {**build_unet(cross_attention_dim=32, pooled_dim=8).config, "transformer_layers_per_block": (1, 4)}
        unet = UNet2DConditionModel.from_config(config).requires_grad_(False)
        needed = {"pretrained_model_name_or_path": "none", "dataset_name": "none", "rank": rank}
        args = script.parse_args(command_line({**needed, **flags}))
        script.build_model(args, SimpleNamespace(unet=unet), {"unet": unet})
        inputs = {
            "sample": torch.randn(4, 4, 16, 16),
            "timestep": torch.tensor([1, 500, 1, 500]),
            "encoder_hidden_states": torch.randn(4, 77, 32),
            "added_cond_kwargs": {"text_embeds": torch.randn(4, 8), "time_ids": torch.ones(4, 6)},
        }
        return Block(unet.train(), inputs)

    yield built
    torch._dynamo.config.recompile_limit = limit
    torch._functorch.config.activation_memory_budget = budget
    torch._logging.set_logs()
    torch._dynamo.reset()


@RANKS
def test_compiled_recomputation_gives_the_losses_and_gradients_of_eager(build, rank):
    results = []
    for flags in ({}, {"compile": True, "gradient_checkpointing": True}):
        block = build(rank, **flags)
        loss = block.loss()
        loss.backward()
        results.append((loss, [p.grad for p in block.unet.parameters() if p.requires_grad]))
    (loss, gradients), (compiled_loss, compiled_gradients) = results

    assert compiled_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    largest = max(gradient.abs().max() for gradient in gradients)
    for gradient, compiled_gradient in zip(gradients, compiled_gradients, strict=True):
        assert (gradient - compiled_gradient).abs().max() <= 1e-5 * largest


class MallocInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def allocated():
    """Bytes that are allocated in this process, by anything."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = MallocInfo
    gc.collect()
    info = libc.mallinfo2()
    return info.uordblks + info.hblkhd


def held_after_forward(block):
    block.loss().backward()  # compiles
    before = allocated()
    loss = block.loss()
    held = allocated() - before
    loss.backward()
    return held


@pytest.mark.parametrize("rank", [4, also(None)], ids=["LoRA", "UNet"])
def test_compiled_recomputation_holds_no_more_activations_than_checkpointing(build, rank):
    eager = held_after_forward(build(rank))
    checkpointing = held_after_forward(build(rank, gradient_checkpointing=True))
    compiled = held_after_forward(build(rank, compile=True))

    recomputed = held_after_forward(build(rank, compile=True, gradient_checkpointing=True))

    assert recomputed <= 1.05 * checkpointing < 0.5 * min(eager, compiled)


@pytest.mark.matrix
@pytest.mark.parametrize("gradient_checkpointing", [None, True], ids=["kept", "recomputed"])
@RANKS
def test_compiled_and_eager_runs_resume_each_other(script, flags, tmp_path, rank, gradient_checkpointing):
    """With the images and metrics of a validation."""
    flags.update(rank=rank, learning_rate=1e-4, max_train_steps=4, checkpointing_steps=1)
    flags.update(gradient_checkpointing=gradient_checkpointing, num_validation_pairs=4, validation_steps=2)
    flags.update(run_validation=True, num_inference_steps=2)
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


@pytest.mark.matrix
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
