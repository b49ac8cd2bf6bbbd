"""Runs of the training script on several processes, and comparisons of what two runs trained and logged."""

import json
from pathlib import Path

import cpu_cluster
import numpy as np
import pytest
import torch
from conftest import SCRIPT, command_line, run, scalars
from PIL import Image
from safetensors.torch import load_file


STATE = "mapo_state.json"
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
# Must not be in any file of a run.
TOKEN = "hf_ThisIsNoRealTokenButItMustStaySecret"
# Exit status of a run that a signal has stopped.
STOPPED = 75
# Validation that generates three images and holds out eight pairs.
VALIDATION = {
    "num_validation_pairs": 8,
    "run_validation": True,
    "validation_prompts": ["a red circle", "a blue star", "a green square"],
    "num_inference_steps": 2,
}


# Running ------------------------------------------------------------------------------------------------------------
def run_ranks(flags, faults=None, size=2, env=None):
    """Exit statuses and outputs of the ranks. `faults` are lists of faults by rank."""
    return cpu_cluster.run_ranks([SCRIPT, *command_line(flags)], faults, size, env)


def run_ranks_successfully(flags, faults=None, env=None):
    """Run on two ranks, and return the output folder."""
    statuses, outputs = run_ranks(flags, faults, env=env)
    assert statuses == [0, 0], "\n".join(outputs)
    return Path(flags["output_dir"])


def run_sharded(flags, kind):
    """Run on two ranks with weights or optimizer states sharded by DeepSpeed or FSDP, and return the output folder."""
    words = [*cpu_cluster.with_faults({}), SCRIPT, *command_line(flags)]
    statuses, outputs = cpu_cluster.run_ranks(words, env=cpu_cluster.SHARDED[kind])
    assert statuses == [0, 0], "\n".join(outputs)
    return Path(flags["output_dir"])


def run_to_status(script, flags):
    """Like `run`, but returns the exit status, or None after a SIGINT that the script did not catch."""
    try:
        run(script, flags)
    except SystemExit as end:
        return end.code
    except KeyboardInterrupt:
        return None
    return 0


def resume(script, flags, checkpoint, folder):
    """Resume from a checkpoint into a new output folder."""
    return run(script, {**flags, "output_dir": folder, "resume_from_checkpoint": checkpoint})


def train_error(script, flags):
    """The message of the TrainingError that ends a run. It must be one line."""
    with pytest.raises(script.TrainingError) as error:
        run(script, flags)
    message = str(error.value)
    assert "\n" not in message
    return message


# Reading what a run has written -------------------------------------------------------------------------------------
def read_state(checkpoint):
    return json.loads((checkpoint / STATE).read_text())


def checkpoints(folder):
    """Steps of the complete checkpoints."""
    states = Path(folder).glob(f"checkpoint-*/{STATE}")
    return sorted(int(path.parent.name.removeprefix("checkpoint-")) for path in states)


def trained(folder):
    """The weights that a run or a checkpoint has saved."""
    path = folder / LORA_WEIGHTS
    return load_file(path if path.exists() else folder / UNET_WEIGHTS)


def curves(folder):
    """Everything that was logged except for time and memory: {name: {step: value}}."""
    logged = scalars(folder)
    return {name: values for name, values in logged.items() if "second" not in name and "memory" not in name}


def files_in(folder):
    """Contents of all files: {path: bytes}."""
    folder = Path(folder)
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def files_with(text, folder):
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def grid_images(path):
    """The images of a validation grid, row by row: base model and trained model side by side."""
    grid = Image.open(path)
    assert grid.width == 2 * 64
    assert grid.height % 64 == 0
    images = []
    for top in range(0, grid.height, 64):
        for left in (0, 64):
            images.append(np.asarray(grid.crop((left, top, left + 64, top + 64)), dtype=int))
    return images


# Comparing ----------------------------------------------------------------------------------------------------------
def assert_equal(weights, others):
    """Two state dicts are equal, bit for bit."""
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, others[name]), name


def differ(weights, others):
    """Whether at least one weight differs between two state dicts."""
    return any(not torch.equal(weight, others[name]) for name, weight in weights.items())


def largest_difference(images, others):
    """Largest difference of a pixel, from 0 to 255."""
    return max(np.abs(image - other).max() for image, other in zip(images, others, strict=True))


def assert_same(folder, other):
    """Two runs have the same curves and the same weights, bit for bit."""
    assert curves(folder) == curves(other)
    assert_equal(trained(folder), trained(other))


def assert_close(folder, other, steps=None):
    """Two runs have the same curves (in all or some of the steps) and weights, up to the rounding of float32."""
    other_curves = curves(other)
    for name, values in curves(folder).items():
        expected = other_curves[name]
        if steps is not None:
            expected = {step: value for step, value in expected.items() if step in steps}
        assert values == pytest.approx(expected, rel=1e-5, abs=1e-6), name

    weights = trained(folder)
    others = trained(other)
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert (weight - others[name]).abs().max() < 1e-5, name


def assert_exact(uninterrupted, resumed):
    """A resumed run has the curves and weights of the uninterrupted one, bit for bit."""
    expected = curves(uninterrupted)
    logged = curves(resumed)
    for name in expected:  # a resumed run may have logged more, if it repeats a validation
        assert logged[name] == expected[name], name
    assert_equal(trained(resumed), trained(uninterrupted))


def assert_continues(uninterrupted, resumed, step):
    """A run that was resumed in another folder made the steps after `step` like the uninterrupted one, and no more."""
    expected = {}
    for name, values in curves(uninterrupted).items():
        first = step if name.startswith("eval_") else step + 1  # the validation after the checkpoint is repeated
        expected[name] = {s: value for s, value in values.items() if s >= first}
    assert curves(resumed) == expected
    assert len(expected["loss"]) > 0
    assert_equal(trained(resumed), trained(uninterrupted))


def assert_one_error(statuses, outputs, *parts):
    """Every rank exits with status 1 and the same error message in one line, without a traceback."""
    printed = "\n".join(outputs)
    assert set(statuses) == {1}, printed
    assert "Traceback" not in printed, printed
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(outputs), printed
    assert len(set(errors)) == 1, printed
    for part in parts:
        assert part in errors[0], errors[0]
