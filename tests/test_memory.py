"""--full_bf16: bfloat16 weights, rounded at random, learn what float32 weights do; plain ones learn nothing."""

import bitsandbytes
import pytest
import torch
from conftest import run, scalars
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file


@pytest.fixture
def flags(flags):
    changes = {"rank": None, "learning_rate": 1e-4, "use_8bit_adam": True, "mixed_precision": "bf16"}
    return {**flags, **changes, "full_bf16": True, "max_train_steps": 12}


def weights(folder):
    assert UNet2DConditionModel.from_pretrained(folder / "unet").dtype == torch.float32
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def test_rounding_goes_to_a_neighbour_and_keeps_the_mean(script):
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([torch.randn(200), torch.tensor([1.0, -3.0, 1e-30, 1e30, 0.0101])])
    rounded = torch.stack([script.round_stochastically(values, generator) for _ in range(20_000)]).double()
    nearest = values.bfloat16()
    # A step in bfloat16's eight bits of precision.
    step = 2.0 ** (values.double().abs().log2().floor() - 7)
    assert ((rounded - values.double()).abs() <= step).all()
    # Five standard errors of a coin's throw.
    assert ((rounded.mean(dim=0) - values.double()).abs() <= 5 * 0.5 * step / 20_000**0.5).all()
    exact = nearest.float() == values
    assert exact.sum() >= 2 and (rounded[:, exact] == values[exact].double()).all()


def train(script, optimizer_class, dtype, steps=300):
    """Weights of about 1e-2 under gradients with a mean, at the paper's learning rate; returns how far they moved."""
    generator = torch.Generator().manual_seed(0)
    start = (1e-2 * torch.randn(64, 1024, generator=generator)).bfloat16()
    direction = torch.randn(64, 1024, generator=generator)
    parameter = torch.nn.Parameter(start.to(dtype, copy=True))
    optimizer = optimizer_class([parameter], lr=1e-7, weight_decay=0)
    for _ in range(steps):
        parameter.grad = (direction + torch.randn(64, 1024, generator=generator)).to(dtype)
        optimizer.step()
    return (parameter.detach().float() - start.float()).double()


def test_the_papers_learning_rate_moves_rounded_weights_and_not_plain_ones(script):
    plain = bitsandbytes.optim.AdamW8bit
    rounded = type("Rounded", (script.StochasticRounding, plain), {})
    expected = train(script, plain, torch.float32)

    def share(moved):
        return float((moved * expected).sum() / (expected * expected).sum())

    assert share(train(script, plain, torch.bfloat16)) < 0.05
    assert share(train(script, rounded, torch.bfloat16)) == pytest.approx(1, abs=0.1)


def test_bfloat16_weights_learn_what_float32_weights_learn(script, flags, tmp_path):
    rounded = run(script, flags)
    exact = run(script, {**flags, "full_bf16": None, "output_dir": tmp_path / "float32"})
    losses, expected = (list(scalars(out)["loss"].values()) for out in (rounded, exact))
    assert losses == pytest.approx(expected, rel=3e-3)
    # So that the closeness says something.
    assert expected[0] - expected[-1] > 0.1
    assert {weight.dtype for weight in weights(rounded).values()} == {torch.bfloat16}
    assert {weight.dtype for weight in weights(exact).values()} == {torch.float32}


def test_a_resumed_run_rounds_as_the_uninterrupted_one(script, flags, tmp_path):
    flags.update(checkpointing_steps=5)
    whole = run(script, flags)
    flags.update(resume_from_checkpoint=whole / "checkpoint-5", output_dir=tmp_path / "resumed")
    resumed = run(script, flags)
    losses = scalars(resumed)["loss"]
    assert losses == {step: value for step, value in scalars(whole)["loss"].items() if step > 5}
    expected = weights(whole)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(resumed).items())


def test_a_checkpoint_of_other_weights_is_refused(script, flags):
    run(script, {**flags, "max_train_steps": 1, "checkpointing_steps": 1})
    with pytest.raises(script.TrainingError, match="--full_bf16 is False, but True in .*checkpoint-1"):
        run(script, {**flags, "full_bf16": None, "resume_from_checkpoint": "latest"})
