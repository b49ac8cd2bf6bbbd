"""Every launch config. GPU configs run on two CPU processes over gloo, machines are launchers on loopback."""

import base64
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes
import cpu_cluster as cluster
import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType, compare_versions, is_torch_version
from conftest import ROOT, SCRIPT, command_line, matrix, run
from cpu_cluster import Fault, full_disk, not_finite, noting_weights, signalled, with_faults
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from packaging.version import Version
from runs import (
    VALIDATION,
    assert_continues,
    assert_equal,
    assert_one_error,
    checkpoints,
    curves,
    differ,
    grid_images,
    largest_difference,
    resume,
    run_ranks_successfully,
    trained,
)


CONFIGS = sorted((ROOT / "launch_configs").glob("*.yaml"))
DISTRIBUTED_TYPES = {
    "cpu": DistributedType.NO,
    "single_gpu": DistributedType.NO,
    "multi_gpu": DistributedType.MULTI_GPU,
    "multi_node": DistributedType.MULTI_GPU,
    "deepspeed_zero2": DistributedType.DEEPSPEED,
    "deepspeed_zero3": DistributedType.DEEPSPEED,
    "fsdp2": DistributedType.FSDP,
}
ONE_PROCESS = ("cpu", "single_gpu")
# The last of the grids of images that a run writes.
IMAGES = Path("validation", "step-000006.png")


# Launching ----------------------------------------------------------------------------------------------------------
def launch_commands(kind, flags, faults=None, config_file=None):
    """The command line of each machine's launcher."""
    config_file = config_file or ROOT / "launch_configs" / f"{kind}.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config_file]
    training = [SCRIPT, *command_line(flags)]
    if kind != "cpu":
        training = [*with_faults(faults), *training]
    if kind in ONE_PROCESS:
        return [[*launcher, *training]]

    launcher += ["--num_processes", 2, "--main_process_port", cluster.free_port()]
    if kind != "multi_node":
        return [[*launcher, *training]]

    launcher += ["--num_machines", 2, "--main_process_ip", "127.0.0.1"]
    return [[*launcher, "--machine_rank", rank, *training] for rank in range(2)]


def launch_config(kind, flags, faults=None, config_file=None):
    """Run all launchers at once. Returns their statuses and what was printed. Scripts that hang end themselves."""
    env = dict(os.environ)
    env.pop("ACCELERATE_USE_CPU")
    processes = []
    with tempfile.TemporaryFile("w+") as output:
        for words in launch_commands(kind, flags, faults, config_file):
            processes.append(subprocess.Popen(list(map(str, words)), stdout=output, stderr=output, env=env))
        statuses = [process.wait(cluster.TIMEOUT) for process in processes]
        output.seek(0)
        return statuses, output.read()


def launch_successfully(kind, flags):
    """Launch, check that all processes have the weights that were saved, and return the output folder."""
    out = Path(flags["output_dir"])
    if kind in ONE_PROCESS:
        statuses, output = launch_config(kind, flags)
        assert statuses == [0], output
        return out

    noted = Path(tempfile.mkdtemp(dir=out.parent))
    noting = Fault("weights", cluster.EVERY_CALL, partial(noting_weights, noted))
    statuses, output = launch_config(kind, flags, {0: [noting], 1: [noting]})
    assert set(statuses) == {0}, output

    # Each process has all of the weights that were saved last, or its shard of them.
    gathered = torch.load(noted / "gathered.pt")
    first = torch.load(noted / "shards-0.pt")
    second = torch.load(noted / "shards-1.pt")
    assert first.keys() == second.keys()
    assert len(first) > 0
    for name in first:
        full = gathered[name].flatten()
        if len(first[name]) == len(second[name]) == len(full):
            assert torch.equal(first[name], full), name
            assert torch.equal(second[name], full), name
        else:
            joined = torch.cat([first[name], second[name]])  # ZeRO-3 pads the last shard
            assert torch.equal(joined[: len(full)], full), name
    return out


# Comparing with one process -----------------------------------------------------------------------------------------
@pytest.fixture
def flags(flags):
    """Six steps of four pairs, with a checkpoint in the middle and all that validation does."""
    flags.update(VALIDATION, num_validation_pairs=5, validation_steps=3, checkpointing_steps=3)
    flags.update(max_train_steps=6, lr_scheduler="cosine", lr_warmup_steps=2)
    return flags


def flags_of_case(flags, kind, training="lora", optimizer="32bit"):
    """Flags of one run of the matrix. The global batch is always four pairs."""
    return {
        **flags,
        "rank": 4 if training == "lora" else None,
        "learning_rate": 1e-3 if training == "lora" else 1e-4,
        "use_8bit_adam": True if optimizer == "8bit" else None,
        "train_batch_size": 4 if kind in ONE_PROCESS else 2,
    }


@pytest.fixture
def short_flags(flags):
    """A checkpoint at each of five steps, and no validation."""
    flags.update(max_train_steps=5, checkpointing_steps=1, run_validation=None, num_validation_pairs=None)
    return flags_of_case(flags, "fsdp2")


class ShardedAdamW8bit(torch.optim.Optimizer):
    """
    AdamW8bit in one process, with the states of two processes under DeepSpeed.

    DeepSpeed updates each process's part of the weights as one vector, in blocks of 256 that may cross layers. ZeRO-2
    halves the concatenation of all weights, ZeRO-3 halves each weight.
    """

    stage = None
    adam = bitsandbytes.optim.AdamW8bit

    def __init__(self, groups, lr, *args, **kwargs):
        super().__init__(groups, {"lr": lr})
        (weights,) = [group["params"] for group in self.param_groups]
        # The units are halved: lists of weights that are concatenated before.
        self.units = [weights] if self.stage == 2 else [[weight] for weight in weights]
        halves = self.halve([[weight.detach() for weight in unit] for unit in self.units])
        self.shards = [torch.nn.Parameter(torch.cat(shard)) for shard in zip(*halves)]
        self.inner = self.adam(self.shards, lr, *args, **kwargs)

    def halve(self, units):
        """Both halves of each unit, which is padded."""
        multiple = 4 if self.stage == 2 else 2
        halves = []
        for tensors in units:
            vector = torch.cat([tensor.flatten() for tensor in tensors])
            padding = -len(vector) % multiple
            halves.append(torch.nn.functional.pad(vector, (0, padding)).chunk(2))
        return halves

    @torch.no_grad()
    def step(self, closure=None):
        halves = self.halve([[weight.grad for weight in unit] for unit in self.units])
        for shard, gradients in zip(self.shards, zip(*halves)):
            shard.grad = torch.cat(gradients)

        self.inner.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        self.inner.step()

        # Copy the shards back to the weights.
        sizes_of_halves = [len(half) for half, _ in halves]
        updated = [shard.split(sizes_of_halves) for shard in self.shards]
        for unit, halves_of_unit in zip(self.units, zip(*updated)):
            sizes = [weight.numel() for weight in unit]
            vector = torch.cat(halves_of_unit)[: sum(sizes)]
            for weight, values in zip(unit, vector.split(sizes)):
                weight.copy_(values.view_as(weight))


def measure_differences(folder, other):
    """Largest difference of a metric, relative to the larger of it and 1, and of a trained weight."""
    logged = curves(folder)
    expected = curves(other)
    assert logged.keys() == expected.keys()
    assert sorted(logged["loss"]) == sorted(expected["loss"]) == [1, 2, 3, 4, 5, 6]
    metric_differences = []
    for name, values in logged.items():
        if "accuracy" in name:
            continue
        for step, value in values.items():
            scale = max(abs(expected[name][step]), 1)
            metric_differences.append(abs(value - expected[name][step]) / scale)

    weights = trained(folder)
    others = trained(other)
    assert weights.keys() == others.keys()
    weight_differences = [(weight - others[name]).abs().max().item() for name, weight in weights.items()]
    return max(metric_differences), max(weight_differences)


@pytest.fixture
def compare_with_one_process(script, world, uninterrupted, monkeypatch, tmp_path):
    """Checks that a run of the matrix equals the same run in one process, and that diffusers loads its result."""

    def compare_with_one_process(folder, flags, kind):
        one_process = {**flags, "train_batch_size": 4, "run_validation": None}
        if flags["use_8bit_adam"] and kind.startswith("deepspeed"):
            with monkeypatch.context() as patch:
                sharded = type("Sharded", (ShardedAdamW8bit,), {"stage": int(kind[-1])})
                patch.setattr(bitsandbytes.optim, "AdamW8bit", sharded)
                other = run(script, {**one_process, "output_dir": tmp_path / "one-process"})
        else:
            other = uninterrupted(one_process)

        # In 32 bits, sums over processes are rounded in another order. In 8 bits, this can move an optimizer state by
        # one of its 256 codes.
        metric, weight = measure_differences(folder, other)
        assert metric < 1e-6
        assert weight < (0.5 if flags["use_8bit_adam"] else 0.01) * flags["learning_rate"]

        assert_loads_in_diffusers(world, folder, flags)

    return compare_with_one_process


def assert_loads_in_diffusers(world, folder, flags):
    """With the saved weights, a plain pipeline generates the images that the trained model generated at the end."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(world / "pipeline", add_watermarker=False)
    if flags["rank"] is None:
        pipeline.unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    else:
        pipeline.load_lora_weights(folder)
    pipeline.set_progress_bar_config(disable=True)
    options = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 5.0}

    images = []
    for number, prompt in enumerate(flags["validation_prompts"]):
        image = pipeline(prompt, **options, generator=torch.Generator().manual_seed(number)).images[0]
        images.append(np.asarray(image, dtype=int))

    assert largest_difference(images, grid_images(folder / IMAGES)[1::2]) <= 1
    assert {weight.dtype for weight in trained(folder).values()} == {torch.float32}


def assert_resumed(uninterrupted, folder, step):
    """`folder` was resumed from `step`, and equals the uninterrupted run bit for bit."""
    assert_continues(uninterrupted, folder, step)
    assert (uninterrupted / IMAGES).read_bytes() == (folder / IMAGES).read_bytes()


MATRIX = []
for case in itertools.product(DISTRIBUTED_TYPES, ("full", "lora"), ("32bit", "8bit")):
    kind, training, optimizer = case
    if kind == "fsdp2" and optimizer == "8bit":
        continue  # bitsandbytes cannot update FSDP2's weights
    MATRIX.append(case)


@pytest.mark.matrix
@pytest.mark.parametrize(("kind", "training", "optimizer"), MATRIX)
def test_config_equals_one_process_and_resumes_exactly(
    flags, compare_with_one_process, tmp_path, kind, training, optimizer
):
    flags = flags_of_case(flags, kind, training, optimizer)
    out = launch_successfully(kind, flags)
    compare_with_one_process(out, flags, kind)

    flags.update(output_dir=tmp_path / "resumed", resume_from_checkpoint=out / "checkpoint-3")
    resumed = launch_successfully(kind, flags)

    assert_resumed(out, resumed, 3)


@pytest.mark.parametrize("kind", ["fsdp2", "deepspeed_zero3"])
def test_lora_equals_one_process(flags, compare_with_one_process, kind):
    flags = flags_of_case(flags, kind)

    out = launch_successfully(kind, flags)

    compare_with_one_process(out, flags, kind)


@pytest.mark.parametrize(
    ("kind", "training", "optimizer"),
    [
        ("deepspeed_zero2", "lora", "32bit"),
        matrix("deepspeed_zero2", "full", "8bit"),
        matrix("deepspeed_zero3", "lora", "32bit"),
        matrix("fsdp2", "full", "32bit"),
    ],
)
def test_sharded_run_that_a_signal_stopped_resumes_exactly(
    flags, compare_with_one_process, tmp_path, kind, training, optimizer
):
    """A signal to one process stops both after step 4."""
    flags = flags_of_case(flags, kind, training, optimizer)
    uninterrupted = launch_successfully(kind, {**flags, "output_dir": tmp_path / "uninterrupted"})
    compare_with_one_process(uninterrupted, flags, kind)
    out = flags["output_dir"]
    fault = Fault("step", (4,), partial(signalled, signal.SIGTERM))

    statuses, output = launch_config(kind, flags, {1: [fault]})
    flags.update(resume_from_checkpoint=out / "checkpoint-4", output_dir=tmp_path / "resumed")
    resumed = launch_successfully(kind, flags)

    assert statuses == [1], output
    assert "Stopped by a signal (the checkpoint of step 4 is saved)" in output
    assert checkpoints(out) == [3, 4]
    assert_resumed(uninterrupted, resumed, 4)


# Precision and gradients --------------------------------------------------------------------------------------------
def share_of_bfloat16(tensor):
    """Share of the values that bfloat16 represents exactly."""
    return (tensor == tensor.bfloat16().float()).float().mean().item()


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["multi_gpu", "deepspeed_zero2", "deepspeed_zero3", "fsdp2"])
def test_trained_weights_stay_float32_in_half_precision(flags, kind):
    """At the paper's learning rate, nearly every update of a bfloat16 weight would be lost."""
    flags = flags_of_case(flags, kind, "full")

    statuses, output = launch_config(kind, {**flags, "mixed_precision": "bf16", "learning_rate": 1e-7})

    assert set(statuses) == {0}, output
    weights = trained(flags["output_dir"]).values()
    assert {weight.dtype for weight in weights} == {torch.float32}
    assert np.mean([share_of_bfloat16(weight) for weight in weights]) < 0.1


@pytest.mark.matrix
def test_fsdp2_sums_gradients_in_float32(short_flags, tmp_path):
    """Over four micro-batches and two processes. Sums in bfloat16 would contain only values of bfloat16."""
    flags = flags_of_case(short_flags, "fsdp2", "full")
    flags.update(mixed_precision="bf16", max_train_steps=1, gradient_accumulation_steps=4)
    noting = Fault("clip", (1,), partial(cluster.noting_gradients, tmp_path))

    statuses, output = launch_config("fsdp2", flags, {0: [noting], 1: [noting]})

    assert statuses == [0], output
    for rank in range(2):
        gradient = torch.cat(torch.load(tmp_path / f"gradients-{rank}.pt"))
        assert gradient.dtype == torch.float32
        assert share_of_bfloat16(gradient) < 0.2


def test_ddp_does_not_copy_gradients(short_flags, tmp_path):
    """They are views of the buckets in which DDP sums them."""
    short_flags.update(rank=None, max_train_steps=1)
    noting = Fault("clip", (1,), partial(cluster.noting_gradients, tmp_path))

    run_ranks_successfully(short_flags, {0: [noting], 1: [noting]})

    gradients = torch.load(tmp_path / "gradients-0.pt")
    buckets = {gradient.untyped_storage().data_ptr() for gradient in gradients}
    assert len(buckets) < len(gradients) / 10


# Compilers ----------------------------------------------------------------------------------------------------------
@pytest.mark.matrix
@pytest.mark.parametrize("training", ["lora", "full"])
def test_compiler_of_the_launcher_changes_nothing(
    script, flags, compare_with_one_process, tmp_path, monkeypatch, training
):
    torch._dynamo.reset()
    flags = flags_of_case(flags, "cpu", training)

    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
        out = run(script, flags)
        resumed = resume(script, flags, out / "checkpoint-3", tmp_path / "resumed")

    compare_with_one_process(out, flags, "cpu")
    assert_resumed(out, resumed, 3)


@pytest.mark.matrix
def test_compiler_of_the_launcher_keeps_one_reduction_per_step(flags, uninterrupted, tmp_path):
    """After a checkpoint as well."""
    flags = flags_of_case(flags, "cpu", "full")
    flags.update(run_validation=None)
    expected = uninterrupted(flags)
    flags.update(checkpointing_steps=1, train_batch_size=1, gradient_accumulation_steps=2)
    noted = tmp_path / "no_sync"
    noting = Fault("no_sync", cluster.EVERY_CALL, partial(cluster.noting_process_group, noted))

    out = run_ranks_successfully(flags, {0: [noting]}, env={"ACCELERATE_DYNAMO_BACKEND": "eager"})

    assert len(noted.read_text().splitlines()) == flags["max_train_steps"]
    metric, weight = measure_differences(out, expected)
    assert metric < 1e-6
    assert weight < 0.1 * flags["learning_rate"]


@pytest.mark.matrix
@pytest.mark.parametrize("training", ["lora", "full"])
@pytest.mark.parametrize("kind", ["multi_gpu", "deepspeed_zero2", "deepspeed_zero3", "fsdp2"])
def test_compiled_blocks_with_recomputation_equal_eager_ones(uninterrupted, flags, kind, training):
    """With generated code, which rounds differently."""
    if kind == "deepspeed_zero3" and is_torch_version("<", "2.12"):
        pytest.skip("refused, see the test below")
    flags = flags_of_case(flags, kind, training)
    flags.update(run_validation=None, gradient_checkpointing=True, adam_epsilon=1e-5)
    eager = uninterrupted({**flags, "train_batch_size": 4})

    compiled = launch_successfully(kind, {**flags, "compile": True})

    metric, weight = measure_differences(compiled, eager)
    assert metric < 1e-5
    assert weight < 0.01 * flags["learning_rate"]


@pytest.mark.parametrize(
    ("stage", "installed", "refused"), [(3, "2.11.0", True), (2, "2.11.0", False), (3, "2.12.0", False)]
)
def test_compiled_blocks_under_zero_3_need_torch_2_12(script, monkeypatch, stage, installed, refused):
    monkeypatch.setattr(script, "is_torch_version", partial(compare_versions, Version(installed)))
    args = SimpleNamespace(compile=True, full_bf16=False, max_grad_norm=1, train_batch_size=1)
    args.gradient_accumulation_steps = 1
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config={"zero_optimization": {}})

    if refused:
        with pytest.raises(script.TrainingError, match="--compile with ZeRO-3 needs torch 2.12"):
            script.configure_deepspeed(args, "no", plugin)
    else:
        script.configure_deepspeed(args, "no", plugin)


# Faults -------------------------------------------------------------------------------------------------------------
@pytest.mark.matrix
@pytest.mark.parametrize("rank", [1, 0])
@pytest.mark.parametrize("kind", ["deepspeed_zero2", "deepspeed_zero3", "fsdp2"])
def test_sharded_run_skips_a_bad_step_of_one_rank_and_stops_at_its_full_disk(short_flags, kind, rank):
    out = short_flags["output_dir"]
    bad = Fault("step", (2,), partial(not_finite, "loss"))
    full = Fault("checkpoint", (4,), partial(full_disk, 2000))

    statuses, output = launch_config(kind, short_flags, {rank: [bad, full]})

    assert statuses == [1], output
    assert "Step 2: non-finite gradient, update skipped (1 in a row)" in output
    assert f"error: {out / 'checkpoint-4'} could not be written; older checkpoints are untouched" in output
    assert checkpoints(out) == [1, 2, 3]
    assert_equal(trained(out / "checkpoint-1"), trained(out / "checkpoint-2"))
    assert differ(trained(out / "checkpoint-2"), trained(out / "checkpoint-3"))


@pytest.mark.matrix
def test_checkpoint_of_another_stage_is_refused(short_flags):
    launch_successfully("deepspeed_zero2", {**short_flags, "max_train_steps": 1})

    statuses, output = launch_config("deepspeed_zero3", {**short_flags, "resume_from_checkpoint": "latest"})

    assert statuses == [1], output
    assert "sharding is DeepSpeed ZeRO-3 over 2 processes, but DeepSpeed ZeRO-2 over 2 processes in" in output


@pytest.mark.matrix
def test_accumulation_in_a_launch_config_is_refused(short_flags, tmp_path):
    text = (ROOT / "launch_configs" / "deepspeed_zero2.yaml").read_text()
    config_file = tmp_path / "own.yaml"
    config_file.write_text(text.replace("  zero_stage", "  gradient_accumulation_steps: 3\n  zero_stage"))

    statuses, output = launch_config("deepspeed_zero2", short_flags, config_file=config_file)

    assert statuses == [1], output
    assert "error: --gradient_accumulation_steps: the launch config sets a different number" in output


@pytest.mark.matrix
def test_flags_replace_what_a_deepspeed_file_says(flags, tmp_path):
    """A file of one's own, which has other steps, and which does not let ZeRO-3 save the weights."""
    flags.update(train_batch_size=1, gradient_accumulation_steps=2, max_train_steps=3, report_to="none")
    words = [*with_faults({}), SCRIPT]
    env = deepspeed_file(stage=3, gradient_accumulation_steps=1, train_batch_size=7)
    own = {**flags, "output_dir": tmp_path / "own"}

    expected = cluster.run_ranks([*words, *command_line(flags)], env=cluster.SHARDED["zero3"])
    statuses, outputs = cluster.run_ranks([*words, *command_line(own)], env={"ACCELERATE_USE_CPU": "false", **env})

    assert expected[0] == statuses == [0, 0], outputs
    assert_equal(trained(own["output_dir"]), trained(flags["output_dir"]))


def deepspeed_file(stage, **settings):
    """Environment variables for a DeepSpeed config of one's own."""
    content = json.dumps({"zero_optimization": {"stage": stage}, **settings})
    encoded = base64.urlsafe_b64encode(content.encode()).decode()
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": encoded}


DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
STAGE_0 = {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}
FSDP1 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
FULL_STATE = {**FSDP2, "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
FULL_BF16 = {"rank": None, "use_8bit_adam": True, "mixed_precision": "bf16", "full_bf16": True}


@pytest.mark.parametrize(
    ("env", "changes", "reason"),
    [
        (FSDP2, {"use_8bit_adam": True}, "--use_8bit_adam cannot update FSDP's weights"),
        (FSDP2, {"train_text_encoder": True}, "--train_text_encoder cannot be sharded"),
        (FSDP1, {}, "FSDP version 1 is not supported"),
        (FULL_STATE, {}, "fsdp_state_dict_type FULL_STATE_DICT: a run cannot resume from it"),
        (DEEPSPEED, FULL_BF16, "--full_bf16: DeepSpeed keeps float32 weights"),
        (STAGE_0, {}, "DeepSpeed's ZeRO stage 0 is not supported"),
        (deepspeed_file(stage=2, optimizer={}), {}, "The DeepSpeed config must not set the optimizer"),
        (deepspeed_file(stage=2, scheduler={}), {}, "The DeepSpeed config must not set the scheduler"),
    ],
    ids=[
        "fsdp2-8bit",
        "fsdp2-text-encoder",
        "fsdp1",
        "fsdp2-full-state",
        "deepspeed-full-bf16",
        "deepspeed-stage-0",
        "deepspeed-optimizer",
        "deepspeed-scheduler",
    ],
)
def test_unsupported_combination_is_refused(short_flags, env, changes, reason):
    words = [*with_faults({}), SCRIPT, *command_line({**short_flags, **changes})]

    statuses, outputs = cluster.run_ranks(words, env={"ACCELERATE_USE_CPU": "false", **env})

    assert_one_error(statuses, outputs, f"error: {reason}")


# The files ----------------------------------------------------------------------------------------------------------
def test_every_config_is_tested():
    assert {path.stem for path in CONFIGS} == set(DISTRIBUTED_TYPES)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_documented_and_sets_only_the_type_and_processes_of_its_name(path):
    comment, content = re.fullmatch(r"((?:#.*\n)+)((?:[^#\n].*\n)+)", path.read_text()).groups()
    config = load_config_from_file(str(path))

    assert f"accelerate launch --config_file launch_configs/{path.name}" in comment
    assert "train_diffusion_mapo_sdxl.py" in comment
    assert re.search(r"accelerate 1\.\d+", comment)
    for setting in ("accumulation", "precision", "clipping", "fp16", "bf16", "dynamo"):
        assert setting not in content.replace("zero3_save_16bit_model", "")
    assert config.mixed_precision is None
    assert config.distributed_type == DISTRIBUTED_TYPES[path.stem]
    assert config.use_cpu == (path.stem == "cpu")
    assert config.num_machines == (2 if path.stem == "multi_node" else 1)
    assert (config.num_processes == 1) == (path.stem in ONE_PROCESS)
