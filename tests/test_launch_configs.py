"""Every launch config for real: GPU configs run on two CPU processes over gloo, machines are launchers on loopback."""

import itertools
import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from conftest import ROOT, SCRIPT, command_line, run
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from test_training import assert_equal, curves, trained


CONFIGS = sorted((ROOT / "launch_configs").glob("*.yaml"))
ALONE = ("cpu", "single_gpu")
TRAININGS, OPTIMIZERS = ("full", "lora"), ("32bit", "8bit")
KINDS = ("cpu", "single_gpu", "multi_gpu", "multi_node", "deepspeed_zero2", "deepspeed_zero3", "fsdp2")
# For metrics relative, for weights in learning rates. In 32 bits, sums over processes round in another order. In 8
# bits that can move a state by one of its 256 codes; and DeepSpeed, which flattens the weights, blocks the states
# otherwise and quantizes small ones too, which one process keeps in 32 bits.
TOLERANCES = {"32bit": (1e-6, 0.01), "8bit": (1e-6, 0.5), "8bit flattened": (1e-3, 5)}
# Seconds; a launch takes 10 to 20.
TIMEOUT = 240


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def commands(config, flags, file=None, wrapper=ROOT / "tests" / "cpu_cluster.py"):
    """The command line of each machine's launcher; `file` may stand in for the config's own."""
    wrapper = [] if config == "cpu" else [wrapper]
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    launcher += ["--config_file", file or ROOT / "launch_configs" / f"{config}.yaml"]
    training = [*wrapper, SCRIPT, *command_line(flags)]
    if config in ALONE:
        return [[*launcher, *training]]
    launcher += ["--num_processes", 2, "--main_process_port", free_port()]
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


def run_together(command_lines, env, timeout):
    """Run them at the same time to their end, or kill them all; returns the statuses and the whole output."""
    with tempfile.TemporaryFile("w+") as output:
        processes = [
            subprocess.Popen(list(map(str, line)), stdout=output, stderr=output, env=env) for line in command_lines
        ]
        try:
            statuses = [process.wait(timeout) for process in processes]
        finally:
            for process in processes:
                if process.poll() is None:
                    kill_tree(process)
                    process.wait()
        output.seek(0)
        return statuses, output.read()


def launch_config(config, flags, **changes):
    env = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    return run_together(commands(config, flags, **changes), env, TIMEOUT)


def launch_well(config, flags):
    """Launch to a good end; returns the output folder."""
    statuses, output = launch_config(config, flags)
    assert set(statuses) == {0}, output
    return Path(flags["output_dir"])


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


@pytest.fixture(scope="module")
def reference(script, kind_flags, tmp_path_factory):
    """The same run in one process, made once for each (training, optimizer)."""
    folders = {}

    def make(training, optimizer):
        if (training, optimizer) not in folders:
            folder = tmp_path_factory.mktemp(f"reference-{training}-{optimizer}")
            folders[training, optimizer] = run(
                script, {**kind_flags, **settings("cpu", training, optimizer, folder), "run_validation": None}
            )
        return folders[training, optimizer]

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
    grid, side, line = Image.open(folder / "validation" / "step-000006.png"), 128, 20
    for row, prompt in enumerate(flags["validation_prompts"]):
        image = pipeline(
            prompt,
            height=64,
            width=64,
            num_inference_steps=2,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(row),
        ).images[0]
        top = 2 * line + row * (side + line)
        drawn = grid.crop((side, top, 2 * side, top + side)).resize((64, 64), Image.Resampling.NEAREST)
        difference = np.abs(np.asarray(image).astype(int) - np.asarray(drawn))
        assert difference.max() <= 1
    assert {weight.dtype for weight in trained(folder).values()} == {torch.float32}


def train_whole(world, kind_flags, reference, tmp_path, kind, training, optimizer):
    """Launch one run of the matrix and compare it with the same run in one process; returns its flags."""
    flags = {**kind_flags, **settings(kind, training, optimizer, tmp_path / "whole")}
    folder = launch_well(kind, flags)
    metric, weight = measure(folder, reference(training, optimizer))
    print(f"{kind} {training} {optimizer}: metrics {metric:.2e}, weights {weight:.2e}")
    flattened = " flattened" if optimizer == "8bit" and kind.startswith("deepspeed") else ""
    metric_tolerance, weight_tolerance = TOLERANCES[optimizer + flattened]
    assert metric < metric_tolerance and weight < weight_tolerance * flags["learning_rate"]
    assert_loads_in_diffusers(world, folder, flags)
    return flags


def assert_resumes(kind, flags, folder):
    """Going on from the middle is, bit for bit, never having stopped."""
    whole = flags["output_dir"]
    middle = whole / "checkpoint-3"
    launch_well(kind, {**flags, "output_dir": folder, "resume_from_checkpoint": middle})
    # The validation that followed the checkpoint is done once more.
    assert curves(folder) == {
        name: {step: value for step, value in values.items() if step > 3 - name.startswith("eval_")}
        for name, values in curves(whole).items()
    }
    assert_equal(trained(whole), trained(folder))
    picture = Path("validation") / "step-000006.png"
    assert (whole / picture).read_bytes() == (folder / picture).read_bytes()


# bitsandbytes cannot step what FSDP2 splits.
REFUSED = ("fsdp2", "8bit")
MATRIX = [case for case in itertools.product(KINDS, TRAININGS, OPTIMIZERS) if (case[0], case[2]) != REFUSED]


@pytest.mark.matrix
@pytest.mark.parametrize("kind, training, optimizer", MATRIX)
def test_every_config_trains_resumes_and_equals_one_process(
    world, kind_flags, reference, tmp_path, kind, training, optimizer
):
    flags = train_whole(world, kind_flags, reference, tmp_path, kind, training, optimizer)
    assert_resumes(kind, flags, tmp_path / "resumed")


def test_split_run_resumes_and_equals_one_process(world, kind_flags, reference, tmp_path):
    flags = train_whole(world, kind_flags, reference, tmp_path, "deepspeed_zero2", "full", "8bit")
    assert_resumes("deepspeed_zero2", flags, tmp_path / "resumed")


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


@pytest.mark.parametrize("kind", ["fsdp2", "deepspeed_zero3", "multi_node"])
def test_lora_equals_one_process(world, kind_flags, reference, tmp_path, kind):
    train_whole(world, kind_flags, reference, tmp_path, kind, "lora", "32bit")


def test_8bit_adam_is_refused_under_fsdp2(kind_flags, tmp_path):
    flags = {**kind_flags, **settings("fsdp2", "full", "8bit", tmp_path / "out")}
    statuses, output = launch_config("fsdp2", flags)
    assert statuses == [1]
    assert "error: --use_8bit_adam: " in output and "launch_configs/deepspeed_zero2.yaml" in output
    assert '/train_diffusion_mapo_sdxl.py", line' not in output


# Faults under configs that split ------------------------------------------------------------------------------------


FAULTY = """
import functools, os, signal, sys
sys.path.insert(0, {tests!r})
from test_faults import Fault, full_disk, install, not_finite, signalled
del os.environ["ACCELERATE_USE_CPU"]
import cpu_cluster
if os.environ["RANK"] == {rank!r}:
    install({fault})
cpu_cluster.main()
"""
SPLIT = [
    "deepspeed_zero2",
    pytest.param("deepspeed_zero3", marks=pytest.mark.matrix),
    pytest.param("fsdp2", marks=pytest.mark.matrix),
]


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


def launch_faulty(kind, flags, rank, fault, folder):
    """The script over two processes, of which one has a fault; returns the launcher's status and the whole output."""
    wrapper = folder / "faulty.py"
    wrapper.write_text(FAULTY.format(tests=str(ROOT / "tests"), rank=str(rank), fault=fault))
    (status,), output = launch_config(kind, flags, wrapper=wrapper)
    assert '/train_diffusion_mapo_sdxl.py", line' not in output, output
    return status, output


def checkpoints(out):
    return sorted(path.name for path in out.glob("checkpoint-*"))


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.matrix)])
@pytest.mark.parametrize("kind", SPLIT)
def test_full_disk_of_one_process_ends_all_in_one_sentence(short_flags, tmp_path, kind, rank):
    fault = "Fault('checkpoint', (2,), functools.partial(full_disk, 2000))"
    status, output = launch_faulty(kind, short_flags, rank, fault, tmp_path)
    out = short_flags["output_dir"]
    assert status == 1 and f"error: {out / 'checkpoint-2'} could not be written" in output, output
    assert checkpoints(out) == ["checkpoint-1"]


@pytest.mark.parametrize("kind", SPLIT)
def test_bad_step_of_one_process_is_left_out_by_all(short_flags, tmp_path, kind):
    fault = "Fault('step', (2,), functools.partial(not_finite, 'nan loss'))"
    status, output = launch_faulty(kind, short_flags, 1, fault, tmp_path)
    assert status == 0 and "Step 2: no finite gradient in 1 steps, not applied" in output, output
    out = short_flags["output_dir"]
    assert list(curves(out)["skipped_steps"].values()) == [0, 1, 1, 1, 1]
    assert_equal(trained(out / "checkpoint-1"), trained(out / "checkpoint-2"))
    before, after = trained(out / "checkpoint-2"), trained(out)
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", SPLIT)
def test_signal_to_one_process_stops_all_and_the_run_goes_on_exactly(short_flags, tmp_path, kind):
    flags = {**short_flags, "checkpointing_steps": 4}
    fault = "Fault('step', (3,), functools.partial(signalled, signal.SIGTERM))"
    status, output = launch_faulty(kind, flags, 1, fault, tmp_path)
    out = flags["output_dir"]
    assert status == 1 and "Stopped by SIGTERM at step 3" in output, output
    assert checkpoints(out) == ["checkpoint-3"]
    launch_well(kind, {**flags, "resume_from_checkpoint": "latest"})
    whole = launch_well(kind, {**flags, "output_dir": tmp_path / "whole"})
    assert curves(out) == curves(whole)
    assert_equal(trained(out), trained(whole))


@pytest.mark.matrix
def test_checkpoint_of_another_stage_is_refused(short_flags):
    launch_well("deepspeed_zero2", {**short_flags, "max_train_steps": 1})
    statuses, output = launch_config("deepspeed_zero3", {**short_flags, "resume_from_checkpoint": "latest"})
    assert statuses == [1] and "was written by DeepSpeed ZeRO-2 over 2 processes" in output, output


@pytest.mark.matrix
def test_accumulation_in_a_launch_config_is_refused(short_flags, tmp_path):
    text = (ROOT / "launch_configs" / "deepspeed_zero2.yaml").read_text()
    (tmp_path / "own.yaml").write_text(text.replace("  zero_stage", "  gradient_accumulation_steps: 3\n  zero_stage"))
    statuses, output = launch_config("deepspeed_zero2", short_flags, file=tmp_path / "own.yaml")
    assert statuses == [1] and "error: --gradient_accumulation_steps: the launch config has another" in output, output


@pytest.mark.matrix
def test_fp16_is_refused_under_deepspeed(short_flags):
    statuses, output = launch_config("deepspeed_zero2", {**short_flags, "mixed_precision": "fp16"})
    assert statuses == [1] and "error: --mixed_precision fp16: DeepSpeed would clip gradients" in output, output


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
