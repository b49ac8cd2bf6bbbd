"""Every launch config for real: GPU configs run on two CPU processes over gloo, machines are launchers on loopback."""

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import partial, partialmethod
from pathlib import Path

import bitsandbytes
import cpu_cluster as cluster
import numpy as np
import psutil
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from conftest import ROOT, SCRIPT, also, command_line, run
from cpu_cluster import Fault, full_disk, not_finite, noting_weights, run_ranks, signalled, with_faults
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from PIL import Image
from test_faults import checkpoints
from test_training import assert_equal, curves, trained


CONFIGS = sorted((ROOT / "launch_configs").glob("*.yaml"))
ALONE = ("cpu", "single_gpu")
TRAININGS, OPTIMIZERS = ("full", "lora"), ("32bit", "8bit")
KINDS = ("cpu", "single_gpu", "multi_gpu", "multi_node", "deepspeed_zero2", "deepspeed_zero3", "fsdp2")
# For metrics relative, for weights in learning rates. In 32 bits, sums over processes round in another order; in 8
# bits that can move a state by one of its 256 codes.
TOLERANCES = {"32bit": (1e-6, 0.01), "8bit": (1e-6, 0.5)}


def commands(config, flags, faults=None, file=None):
    """The command line of each machine's launcher; `file` may stand in for the config's own."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    launcher += ["--config_file", file or ROOT / "launch_configs" / f"{config}.yaml"]
    training = [*([] if config == "cpu" else with_faults(faults)), SCRIPT, *command_line(flags)]
    if config in ALONE:
        return [[*launcher, *training]]
    launcher += ["--num_processes", 2, "--main_process_port", cluster.free_port()]
    if config != "multi_node":
        return [[*launcher, *training]]
    launcher += ["--num_machines", 2, "--main_process_ip", "127.0.0.1"]
    return [[*launcher, "--machine_rank", rank, *training] for rank in range(2)]


def kill_tree(process):
    """Kill -9 a process and all it started: the launcher puts every worker in a session of its own."""
    for descendant in [*psutil.Process(process.pid).children(recursive=True), process]:
        try:
            descendant.kill()
        except psutil.NoSuchProcess:
            pass


def launch_config(config, flags, faults=None, file=None):
    """Run all launchers at the same time, kill those that hang; returns their statuses and the whole output."""
    env = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    lines = [list(map(str, line)) for line in commands(config, flags, faults, file)]
    with tempfile.TemporaryFile("w+") as output:
        processes = [subprocess.Popen(line, stdout=output, stderr=output, env=env) for line in lines]
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                for process in processes:
                    process.wait(cluster.TIMEOUT)
        finally:
            for process in processes:
                if process.poll() is None:
                    kill_tree(process)
                    process.wait()
        output.seek(0)
        return [process.returncode for process in processes], output.read()


def launch_well(config, flags):
    """Launch to a good end, at which all processes hold the same weights; returns the output folder."""
    held = Path(tempfile.mkdtemp(dir=Path(flags["output_dir"]).parent))
    noting = Fault("weights", cluster.EVERY_CALL, partial(noting_weights, held))
    statuses, output = launch_config(config, flags, {0: [noting], 1: [noting]} if config not in ALONE else {})
    assert set(statuses) == {0}, output
    if config not in ALONE:
        assert_ranks_hold_the_same(held)
    return Path(flags["output_dir"])


def assert_ranks_hold_the_same(folder):
    """Every process holds all of the weights that were saved last, or its shard of them."""
    held, gathered = [torch.load(folder / f"held-{rank}.pt") for rank in range(2)], torch.load(folder / "gathered.pt")
    assert held[0].keys() == held[1].keys() and len(held[0]) > 0
    for name in held[0]:
        whole = gathered[name].flatten()
        if {len(weights[name]) for weights in held} == {len(whole)}:
            assert torch.equal(held[0][name], whole) and torch.equal(held[1][name], whole), name
        else:
            # ZeRO-3 pads the last shard.
            assert torch.equal(torch.cat([weights[name] for weights in held])[: len(whole)], whole), name


@pytest.fixture(scope="module")
def kind_flags(world):
    """Flags of a run of six steps of four pairs, checkpointed in the middle, with all that validation does."""
    return {
        "pretrained_model_name_or_path": world / "pipeline",
        "dataset_name": world / "pairs",
        "cache_dir": world / "cache",
        "resolution": 64,
        "max_train_steps": 6,
        "checkpointing_steps": 3,
        "logging_steps": 1,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
        "seed": 0,
        "num_validation_pairs": 5,
        "run_validation": True,
        "validation_steps": 3,
        "validation_prompts": ["a red circle", "a blue star", "a green square"],
        "num_inference_steps": 2,
    }


def settings(kind, training, optimizer, folder):
    """What tells the runs of the matrix apart; the global batch is four pairs in all of them."""
    return {
        "rank": 4 if training == "lora" else None,
        "learning_rate": 1e-3 if training == "lora" else 1e-4,
        "use_8bit_adam": True if optimizer == "8bit" else None,
        "train_batch_size": 4 if kind in ALONE else 2,
        "output_dir": folder,
    }


class ShardedAdamW8bit(torch.optim.Optimizer):
    """
    AdamW8bit in one process, with the states of two. DeepSpeed steps what a process holds of the weights as one
    vector, in blocks of 256 that know nothing of layers: ZeRO-2 halves all weights in a row, ZeRO-3 each weight.
    """

    stage, adam = None, bitsandbytes.optim.AdamW8bit

    def __init__(self, groups, lr, *args, **kwargs):
        super().__init__(groups, {"lr": lr})
        (weights,) = (group["params"] for group in self.param_groups)
        self.units = [weights] if self.stage == 2 else [[weight] for weight in weights]
        self.shards = [torch.nn.Parameter(torch.cat(halves)) for halves in zip(*self.halves(lambda weight: weight))]
        self.inner = self.adam(self.shards, lr, *args, **kwargs)

    def halves(self, tensor):
        """Both halves of the tensors of each unit."""
        flat = [torch.cat([tensor(weight).detach().flatten() for weight in unit]) for unit in self.units]
        multiple = {2: 4, 3: 2}[self.stage]
        return [torch.nn.functional.pad(vector, (0, -len(vector) % multiple)).chunk(2) for vector in flat]

    @torch.no_grad()
    def step(self, closure=None):
        gradients = self.halves(lambda weight: weight.grad)
        for shard, halves in zip(self.shards, zip(*gradients)):
            shard.grad = torch.cat(halves)
        self.inner.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        self.inner.step()
        stepped = [shard.split([len(half) for half, _ in gradients]) for shard in self.shards]
        for unit, halves in zip(self.units, zip(*stepped)):
            sizes = [weight.numel() for weight in unit]
            for weight, values in zip(unit, torch.cat(halves)[: sum(sizes)].split(sizes)):
                weight.copy_(values.view_as(weight))


@pytest.fixture(scope="module")
def reference(script, kind_flags, tmp_path_factory):
    """The same run in one process, made once for each training, optimizer and way in which its states are blocked."""
    folders = {}

    def make(training, optimizer, kind="cpu"):
        stage = int(kind[-1]) if optimizer == "8bit" and kind.startswith("deepspeed") else None
        if (training, optimizer, stage) not in folders:
            folder = tmp_path_factory.mktemp(f"reference-{training}-{optimizer}-{stage}")
            flags = {**kind_flags, **settings("cpu", training, optimizer, folder), "run_validation": None}
            with pytest.MonkeyPatch.context() as patch:
                if stage:
                    sharded = type("Sharded", (ShardedAdamW8bit,), {"stage": stage})
                    patch.setattr(bitsandbytes.optim, "AdamW8bit", sharded)
                folders[training, optimizer, stage] = run(script, flags)
        return folders[training, optimizer, stage]

    return make


def measure(folder, other):
    """Largest difference of any logged metric, relative to the larger of it and 1, and of any trained weight."""
    logged, expected = curves(folder), curves(other)
    assert logged.keys() == expected.keys()
    assert sorted(logged["loss"]) == sorted(expected["loss"]) == list(range(1, 7))
    metric = max(
        abs(value - expected[name][step]) / max(abs(expected[name][step]), 1)
        for name, values in logged.items()
        for step, value in values.items()
        if "accuracy" not in name
    )
    weights, others = trained(folder), trained(other)
    assert weights.keys() == others.keys()
    return metric, max((weight - others[name]).abs().max().item() for name, weight in weights.items())


def assert_loads_in_diffusers(world, folder, flags):
    """A plain pipeline with the saved weights draws, to the pixel, what the trained model drew at the run's end."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(world / "pipeline", add_watermarker=False)
    if flags["rank"] is None:
        pipeline.unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    else:
        pipeline.load_lora_weights(folder)
    pipeline.set_progress_bar_config(disable=True)
    grid = Image.open(folder / "validation" / "step-000006.png")
    for row, prompt in enumerate(flags["validation_prompts"]):
        options = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 5.0}
        image = pipeline(prompt, **options, generator=torch.Generator().manual_seed(row)).images[0]
        drawn = grid.crop((64, 64 * row, 128, 64 * row + 64))
        assert np.abs(np.asarray(image).astype(int) - np.asarray(drawn)).max() <= 1
    assert {weight.dtype for weight in trained(folder).values()} == {torch.float32}


def train_whole(world, kind_flags, reference, tmp_path, kind, training, optimizer):
    """Launch one run of the matrix and compare it with the same run in one process; returns its flags."""
    flags = {**kind_flags, **settings(kind, training, optimizer, tmp_path / "whole")}
    folder = launch_well(kind, flags)
    metric, weight = measure(folder, reference(training, optimizer, kind))
    print(f"{kind} {training} {optimizer}: metrics {metric:.2e}, weights {weight:.2e}")
    metric_tolerance, weight_tolerance = TOLERANCES[optimizer]
    assert metric < metric_tolerance and weight < weight_tolerance * flags["learning_rate"]
    assert_loads_in_diffusers(world, folder, flags)
    return flags


def assert_resumed(whole, folder, step):
    """`folder` was resumed from `step`, and is bit for bit what `whole` is."""
    # The validation that followed the checkpoint is made once more.
    assert curves(folder) == {
        name: {s: value for s, value in values.items() if s > step - name.startswith("eval_")}
        for name, values in curves(whole).items()
    }
    assert_equal(trained(whole), trained(folder))
    picture = Path("validation") / "step-000006.png"
    assert (whole / picture).read_bytes() == (folder / picture).read_bytes()


# bitsandbytes cannot step what FSDP2 shards.
REFUSED = ("fsdp2", "8bit")
MATRIX = [case for case in itertools.product(KINDS, TRAININGS, OPTIMIZERS) if (case[0], case[2]) != REFUSED]


@pytest.mark.matrix
@pytest.mark.parametrize("kind, training, optimizer", MATRIX)
def test_every_config_trains_resumes_and_equals_one_process(
    world, kind_flags, reference, tmp_path, kind, training, optimizer
):
    flags = train_whole(world, kind_flags, reference, tmp_path, kind, training, optimizer)
    whole = flags["output_dir"]
    flags.update(output_dir=tmp_path / "resumed", resume_from_checkpoint=whole / "checkpoint-3")
    assert_resumed(whole, launch_well(kind, flags), 3)


@pytest.mark.parametrize(
    ("kind", "training", "optimizer"),
    [
        ("deepspeed_zero2", "lora", "32bit"),
        also("deepspeed_zero2", "full", "8bit"),
        also("deepspeed_zero3", "lora", "32bit"),
        also("fsdp2", "full", "32bit"),
    ],
)
def test_sharded_run_that_one_signal_stopped_equals_one_process(
    world, kind_flags, reference, tmp_path, kind, training, optimizer
):
    """A signal to one process stops all behind step 4; resumed, the run is what it would have been."""
    flags = train_whole(world, kind_flags, reference, tmp_path, kind, training, optimizer)
    whole, out = flags["output_dir"], tmp_path / "stopped"
    flags["output_dir"] = out
    fault = Fault("step", (4,), partial(signalled, signal.SIGTERM))
    statuses, output = launch_config(kind, flags, {1: [fault]})
    assert statuses == [1] and "Stopped by a signal (the checkpoint of step 4 is saved)" in output, output
    assert checkpoints(out) == [3, 4]
    flags.update(resume_from_checkpoint=out / "checkpoint-4", output_dir=tmp_path / "resumed")
    assert_resumed(whole, launch_well(kind, flags), 4)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["multi_gpu", "deepspeed_zero2", "deepspeed_zero3", "fsdp2"])
def test_trained_weights_stay_float32_in_half_precision(kind_flags, tmp_path, kind):
    """At the paper's learning rate an update is lost on nearly every weight that is held in bfloat16."""
    flags = {**kind_flags, **settings(kind, "full", "32bit", tmp_path / "out")}
    statuses, output = launch_config(kind, {**flags, "mixed_precision": "bf16", "learning_rate": 1e-7})
    assert set(statuses) == {0}, output
    weights = trained(tmp_path / "out")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    rounded = [(weight == weight.bfloat16().float()).float().mean().item() for weight in weights.values()]
    assert sum(rounded) / len(rounded) < 0.1


@pytest.mark.matrix
def test_fsdp2_sums_gradients_in_float32(kind_flags, tmp_path):
    """Over four micro-batches and two processes; what is reduced in bfloat16 holds numbers of bfloat16 alone."""
    flags = {**kind_flags, **settings("fsdp2", "full", "32bit", tmp_path / "out"), "mixed_precision": "bf16"}
    flags.update(max_train_steps=1, gradient_accumulation_steps=4, run_validation=None, num_validation_pairs=None)
    noting = Fault("clip", (1,), partial(cluster.noting_gradients, tmp_path))
    statuses, output = launch_config("fsdp2", flags, {0: [noting], 1: [noting]})
    assert statuses == [0], output
    for rank in range(2):
        gradient = torch.cat(torch.load(tmp_path / f"gradients-{rank}.pt"))
        assert gradient.dtype == torch.float32
        assert (gradient == gradient.bfloat16().float()).float().mean() < 0.2


@pytest.mark.parametrize("kind", ["fsdp2", "deepspeed_zero3", also("multi_node")])
def test_lora_equals_one_process(world, kind_flags, reference, tmp_path, kind):
    train_whole(world, kind_flags, reference, tmp_path, kind, "lora", "32bit")


@pytest.mark.matrix
@pytest.mark.parametrize("optimizer", ["adamw", "8bit", "full_bf16"])
def test_processes_hold_equal_weights_with_every_optimizer(kind_flags, tmp_path, optimizer):
    """They train on different pairs, and must apply the same gradients in the same way."""
    flags = {**kind_flags, **settings("multi_gpu", "full", "8bit" if optimizer != "adamw" else "32bit", tmp_path)}
    flags.update({"full_bf16": True, "mixed_precision": "bf16"} if optimizer == "full_bf16" else {})
    noting = Fault("weights", cluster.EVERY_CALL, partial(noting_weights, tmp_path))
    statuses, outputs = run_ranks([SCRIPT, *command_line(flags)], {0: [noting], 1: [noting]})
    assert statuses == [0, 0], outputs
    assert_ranks_hold_the_same(tmp_path)


def test_gradients_of_processes_are_held_once(short_flags, tmp_path):
    """They are views of the buckets in which DDP sums them, and no copies."""
    noting = Fault("clip", (1,), partial(cluster.noting_gradients, tmp_path))
    flags = {**short_flags, "rank": None, "max_train_steps": 1}
    statuses, outputs = run_ranks([SCRIPT, *command_line(flags)], {0: [noting], 1: [noting]})
    assert statuses == [0, 0], outputs
    gradients = torch.load(tmp_path / "gradients-0.pt")
    buckets = {gradient.untyped_storage().data_ptr() for gradient in gradients}
    assert len(buckets) < len(gradients) / 10


@pytest.fixture
def short_flags(kind_flags, tmp_path):
    """A checkpoint at each of five steps, and no validation."""
    flags = {**kind_flags, **settings("fsdp2", "lora", "32bit", tmp_path / "out")}
    return {
        **flags,
        "max_train_steps": 5,
        "checkpointing_steps": 1,
        "run_validation": None,
        "num_validation_pairs": None,
    }


# Compilers -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def dynamo(monkeypatch):
    """A launcher that was given `--dynamo_backend eager`."""
    torch._dynamo.reset()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")


@pytest.mark.matrix
@pytest.mark.parametrize("training", ["lora", "full"])
def test_compiler_of_the_launcher_changes_nothing(
    script, world, kind_flags, reference, tmp_path, monkeypatch, dynamo, training
):
    flags = {**kind_flags, **settings("cpu", training, "32bit", tmp_path / "whole")}
    whole = run(script, flags)
    metric_tolerance, weight_tolerance = TOLERANCES["32bit"]
    with monkeypatch.context() as patch:
        patch.delenv("ACCELERATE_DYNAMO_BACKEND")
        metric, weight = measure(whole, reference(training, "32bit"))
    assert metric < metric_tolerance and weight < weight_tolerance * flags["learning_rate"]
    assert_loads_in_diffusers(world, whole, flags)
    flags.update(output_dir=tmp_path / "resumed", resume_from_checkpoint=whole / "checkpoint-3")
    assert_resumed(whole, run(script, flags), 3)


@pytest.mark.matrix
def test_compiler_of_the_launcher_leaves_two_processes_together(kind_flags, reference, tmp_path):
    """They reduce their gradients once a step, also after a checkpoint, and equal one process."""
    flags = {**kind_flags, **settings("multi_gpu", "full", "32bit", tmp_path / "out"), "checkpointing_steps": 1}
    flags.update(train_batch_size=1, gradient_accumulation_steps=2, run_validation=None)
    noted = tmp_path / "no_sync"
    noting = Fault("no_sync", cluster.EVERY_CALL, partial(cluster.noting, noted))
    env = {"ACCELERATE_DYNAMO_BACKEND": "eager"}
    statuses, outputs = run_ranks([SCRIPT, *command_line(flags)], {0: [noting]}, env=env)
    assert statuses == [0, 0], outputs
    assert len(noted.read_text().splitlines()) == flags["max_train_steps"]
    metric, weight = measure(flags["output_dir"], reference("full", "32bit"))
    assert metric < 1e-6 and weight < 0.1 * flags["learning_rate"]


def test_names_that_pipelines_do_not_load_are_an_error(script, short_flags, monkeypatch):
    renamed = Fault("weights", (1,), lambda call: {name.replace("down", "lower"): w for name, w in call().items()})
    cluster.install(renamed, monkeypatch.setattr)
    with pytest.raises(script.TrainingError, match="names of the LoRA weights of the unet do not match its layers"):
        run(script, short_flags)


def test_regional_compiler_of_the_launcher_is_refused(script, short_flags, monkeypatch, dynamo):
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
    with pytest.raises(script.TrainingError, match="--dynamo_use_regional_compilation .* --compile"):
        run(script, short_flags)


@pytest.fixture
def compiled(world, kind_flags, tmp_path, monkeypatch):
    """
    Flags of a compiled run on a UNet of two widths, as SDXL's, for a compiler that only traces; and for each graph
    that is compiled whether it is one of training, and whether a shape is left open in it.
    """
    torch._dynamo.reset()
    base, graphs = tmp_path / "base", []
    shutil.copytree(world / "pipeline", base)
    config = {**UNet2DConditionModel.load_config(base / "unet"), "block_out_channels": (32, 32, 64)}
    config |= {"attention_head_dim": (1, 2, 4), "transformer_layers_per_block": (1, 1, 2)}
    config["down_block_types"] = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    config["up_block_types"] = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    UNet2DConditionModel.from_config(config).save_pretrained(base / "unet")

    def trace(graph, inputs):
        graphs.append((torch.is_grad_enabled(), any(isinstance(value, torch.SymInt) for value in inputs)))
        return graph.forward

    compile_blocks = UNet2DConditionModel.compile_repeated_blocks
    monkeypatch.setattr(UNet2DConditionModel, "compile_repeated_blocks", partialmethod(compile_blocks, backend=trace))
    flags = {**kind_flags, **settings("cpu", "lora", "32bit", tmp_path / "out"), "compile": True}
    # Below the number of graphs, so that it is hit unless the script raises it, which lasts for this test only.
    with torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True):
        yield {**flags, "pretrained_model_name_or_path": base, "max_train_steps": 3}, graphs
    torch._logging.set_logs()


def test_compiled_blocks_stay_compiled_through_training_and_validation(script, compiled):
    """Held-out pairs of two batch sizes, drawing, evaluation and training: no limit is hit, and shapes are fixed."""
    flags, graphs = compiled
    run(script, flags)
    # Two widths, each for both batch sizes of held-out pairs, for sampling and for training.
    assert len(graphs) == 8 and graphs.count((True, False)) == 2
    assert not any(open_shape for _, open_shape in graphs)


def test_graph_breaks_are_logged(script, compiled, monkeypatch, capfd):
    flags, _ = compiled
    attend = Attention.forward

    def breaking(self, *args, **kwargs):
        torch._dynamo.graph_break()
        return attend(self, *args, **kwargs)

    monkeypatch.setattr(Attention, "forward", breaking)
    run(script, {**flags, "max_train_steps": 1, "run_validation": None, "num_validation_pairs": None})
    assert "Graph break" in capfd.readouterr().err


@pytest.mark.matrix
@pytest.mark.parametrize("training", ["lora", "full"])
@pytest.mark.parametrize("kind", ["multi_gpu", "deepspeed_zero2", "deepspeed_zero3", "fsdp2"])
def test_recomputing_compiler_leaves_all_ranks_equal(script, kind_flags, tmp_path, kind, training):
    """With generated code, which rounds differently."""
    flags = {**kind_flags, **settings(kind, training, "32bit", tmp_path / "out")}
    flags.update(run_validation=None, gradient_checkpointing=True, adam_epsilon=1e-5)
    eager = run(script, {**flags, "train_batch_size": 4, "output_dir": tmp_path / "eager"})

    compiled = launch_well(kind, {**flags, "compile": True})

    metric, weight = measure(compiled, eager)
    assert metric < 1e-5 and weight < 0.01 * flags["learning_rate"]


# Faults under configs that shard -------------------------------------------------------------------------------------
@pytest.mark.matrix
@pytest.mark.parametrize("rank", [1, 0])
@pytest.mark.parametrize("kind", ["deepspeed_zero2", "deepspeed_zero3", "fsdp2"])
def test_bad_step_of_one_process_is_left_out_and_its_full_disk_ends_all(short_flags, kind, rank):
    bad = Fault("step", (2,), partial(not_finite, "loss"))
    full = Fault("checkpoint", (4,), partial(full_disk, 2000))
    statuses, output = launch_config(kind, short_flags, {rank: [bad, full]})
    out = short_flags["output_dir"]
    assert statuses == [1] and "No finite gradient in 1 steps up to step 2, not applied." in output, output
    assert f"error: {out / 'checkpoint-4'} could not be written; older checkpoints are untouched" in output, output
    assert checkpoints(out) == [1, 2, 3]
    assert_equal(trained(out / "checkpoint-1"), trained(out / "checkpoint-2"))
    before, after = trained(out / "checkpoint-2"), trained(out / "checkpoint-3")
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.matrix
def test_checkpoint_of_another_stage_is_refused(short_flags):
    launch_well("deepspeed_zero2", {**short_flags, "max_train_steps": 1})
    statuses, output = launch_config("deepspeed_zero3", {**short_flags, "resume_from_checkpoint": "latest"})
    difference = "sharding is DeepSpeed ZeRO-3 over 2 processes, but DeepSpeed ZeRO-2 over 2 processes in"
    assert statuses == [1] and difference in output, output


@pytest.mark.matrix
def test_accumulation_in_a_launch_config_is_refused(short_flags, tmp_path):
    text = (ROOT / "launch_configs" / "deepspeed_zero2.yaml").read_text()
    (tmp_path / "own.yaml").write_text(text.replace("  zero_stage", "  gradient_accumulation_steps: 3\n  zero_stage"))
    statuses, output = launch_config("deepspeed_zero2", short_flags, file=tmp_path / "own.yaml")
    assert statuses == [1] and "error: --gradient_accumulation_steps: the launch config has another" in output, output


DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("env", "changes", "sentence"),
    [
        (FSDP, {"use_8bit_adam": True}, "--use_8bit_adam cannot update FSDP's weights"),
        (FSDP, {"train_text_encoder": True}, "--train_text_encoder cannot be sharded"),
        ({**FSDP, "FSDP_VERSION": "1"}, {}, "FSDP version 1 is not supported"),
        (
            DEEPSPEED,
            {"rank": None, "use_8bit_adam": True, "mixed_precision": "bf16", "full_bf16": True},
            "--full_bf16: DeepSpeed keeps float32 weights",
        ),
    ],
    ids=["fsdp2-8bit", "fsdp2-text-encoder", "fsdp1", "deepspeed-full-bf16"],
)
def test_combination_that_cannot_work_is_refused(short_flags, env, changes, sentence):
    words = [*with_faults({}), SCRIPT, *command_line({**short_flags, **changes})]
    statuses, outputs = run_ranks(words, env={"ACCELERATE_USE_CPU": "false", **env})
    assert statuses == [1, 1], outputs
    assert all(f"error: {sentence}" in output and "Traceback" not in output for output in outputs), outputs


# The files ----------------------------------------------------------------------------------------------------------


def test_all_configs_are_there():
    assert {path.stem for path in CONFIGS} == set(KINDS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_says_what_it_is_and_leaves_the_flags_to_the_script(path):
    text = path.read_text()
    comment, content = re.fullmatch(r"((?:#.*\n)+)((?:[^#\n].*\n)+)", text).groups()
    assert f"accelerate launch --config_file launch_configs/{path.name}" in comment
    assert "train_diffusion_mapo_sdxl.py" in comment and re.search(r"accelerate 1\.\d+", comment)
    for setting in ("accumulation", "precision", "clipping", "fp16", "bf16", "dynamo"):
        assert setting not in content.replace("zero3_save_16bit_model", "")
    config = load_config_from_file(str(path))
    assert config.mixed_precision is None and config.use_cpu == (path.stem == "cpu")
    assert config.num_machines == (2 if path.stem == "multi_node" else 1)
    assert (config.num_processes == 1) == (path.stem in ALONE)
    expected = {"multi_gpu": "MULTI_GPU", "multi_node": "MULTI_GPU", "fsdp2": "FSDP"}
    assert config.distributed_type == DistributedType(
        expected.get(path.stem, "DEEPSPEED" if "zero" in path.stem else "NO")
    )
