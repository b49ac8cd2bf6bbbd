"""--compile: compiled blocks compute what eager ones compute, are compiled once, and need no more memory."""

import ctypes
import functools
import gc
import shutil
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from conftest import command_line, matrix, run, scalars
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from runs import train_error, trained
from small_world import build_unet


RANKS = pytest.mark.parametrize("rank", [4, None], ids=["LoRA", "UNet"])


class Block(NamedTuple):
    """A UNet that is mostly transformer blocks, and a batch for it."""

    unet: torch.nn.Module
    inputs: dict

    def loss(self):
        return self.unet(**self.inputs, return_dict=False)[0].square().mean()


@pytest.fixture
def build(script, monkeypatch):
    """Builds the same UNet for some flags. No code is generated for compiled blocks, because that takes long."""
    compile_blocks = UNet2DConditionModel.compile_repeated_blocks
    compile_partly = functools.partialmethod(compile_blocks, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(UNet2DConditionModel, "compile_repeated_blocks", compile_partly)
    limit = torch._dynamo.config.recompile_limit
    budget = torch._functorch.config.activation_memory_budget

    def build(rank, **flags):
        torch._dynamo.reset()
        torch.manual_seed(0)
        config = {**build_unet(cross_attention_dim=32, pooled_dim=8).config, "transformer_layers_per_block": (1, 4)}
        unet = UNet2DConditionModel.from_config(config).requires_grad_(False)
        required = {"pretrained_model_name_or_path": "none", "dataset_name": "none"}
        args = script.parse_args(command_line({**required, "rank": rank, **flags}))
        script.build_model(args, SimpleNamespace(unet=unet), {"unet": unet})
        inputs = {
            "sample": torch.randn(4, 4, 16, 16),
            "timestep": torch.tensor([1, 500, 1, 500]),
            "encoder_hidden_states": torch.randn(4, 77, 32),
            "added_cond_kwargs": {"text_embeds": torch.randn(4, 8), "time_ids": torch.ones(4, 6)},
        }
        return Block(unet.train(), inputs)

    yield build
    torch._dynamo.config.recompile_limit = limit
    torch._functorch.config.activation_memory_budget = budget
    torch._logging.set_logs()
    torch._dynamo.reset()


def loss_and_gradients(block):
    loss = block.loss()
    loss.backward()
    gradients = [parameter.grad for parameter in block.unet.parameters() if parameter.requires_grad]
    return loss.item(), gradients


@RANKS
def test_compiled_recomputation_has_the_loss_and_gradients_of_eager(build, rank):
    loss, gradients = loss_and_gradients(build(rank))
    compiled_loss, compiled_gradients = loss_and_gradients(build(rank, compile=True, gradient_checkpointing=True))

    assert compiled_loss == pytest.approx(loss, rel=1e-5)
    largest = max(gradient.abs().max() for gradient in gradients)
    for gradient, compiled_gradient in zip(gradients, compiled_gradients, strict=True):
        assert (gradient - compiled_gradient).abs().max() <= 1e-5 * largest


class MallocInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def allocated_bytes():
    """All bytes that are allocated in this process."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = MallocInfo
    gc.collect()
    info = libc.mallinfo2()
    return info.uordblks + info.hblkhd


def activation_bytes(block):
    """Bytes that a forward pass keeps for the backward pass."""
    block.loss().backward()  # compiles
    before = allocated_bytes()
    loss = block.loss()
    kept = allocated_bytes() - before
    loss.backward()
    return kept


@pytest.mark.parametrize("rank", [4, matrix(None)], ids=["LoRA", "UNet"])
def test_compiled_recomputation_keeps_no_more_activations_than_checkpointing(build, rank):
    eager = activation_bytes(build(rank))
    checkpointing = activation_bytes(build(rank, gradient_checkpointing=True))
    compiled = activation_bytes(build(rank, compile=True))

    recomputed = activation_bytes(build(rank, compile=True, gradient_checkpointing=True))

    assert recomputed <= 1.05 * checkpointing
    assert 1.05 * checkpointing < 0.5 * eager
    assert 1.05 * checkpointing < 0.5 * compiled


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

    # Step 1 is eager, steps 2 and 3 are compiled, and step 4 is eager again.
    flags.update(compile=True, max_train_steps=3)
    flags.update(resume_from_checkpoint=eager / "checkpoint-1", output_dir=tmp_path / "compiled")
    compiled = run(script, flags)
    compiled_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    flags.update(compile=None, max_train_steps=4)
    flags.update(resume_from_checkpoint=compiled / "checkpoint-3", output_dir=tmp_path / "eager again")
    last = run(script, flags)

    assert compiled_graphs > 0
    losses = scalars(eager)["loss"]
    resumed_losses = {1: losses[1], **scalars(compiled)["loss"], **scalars(last)["loss"]}
    assert resumed_losses == pytest.approx(losses, rel=1e-5)
    weights = trained(last)
    expected = trained(eager)
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert (weight - expected[name]).abs().max() < 2e-4, name


# In a run -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def compiled_flags(flags, world, tmp_path):
    """Flags of a compiled run, on a UNet with blocks of two widths, like SDXL's."""
    model = tmp_path / "model"
    shutil.copytree(world / "pipeline", model)
    config = {
        **UNet2DConditionModel.load_config(model / "unet"),
        "block_out_channels": (32, 32, 64),
        "attention_head_dim": (1, 2, 4),
        "transformer_layers_per_block": (1, 1, 2),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    }
    UNet2DConditionModel.from_config(config).save_pretrained(model / "unet")
    return {**flags, "pretrained_model_name_or_path": model, "compile": True}


def test_compiled_blocks_are_used_in_training_and_validation(script, compiled_flags, compiled_graphs, monkeypatch):
    """Blocks are compiled once for each shape, and no shape is left open."""
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 4)  # too low, unless the script raises it
    compiled_flags.update(max_train_steps=3, validation_steps=3, num_validation_pairs=5)
    compiled_flags.update(run_validation=True, num_inference_steps=2)

    run(script, compiled_flags)

    # Two widths, each for both batch sizes of held-out pairs, for sampling and for training.
    assert len(compiled_graphs) == 8
    assert len([graph for graph in compiled_graphs if graph.for_training]) == 2
    assert not any(graph.has_open_shapes for graph in compiled_graphs)


@pytest.mark.usefixtures("compiled_graphs")
def test_graph_breaks_are_logged(script, compiled_flags, monkeypatch, capfd):
    forward = Attention.forward

    def forward_with_a_break(self, *args, **kwargs):
        torch._dynamo.graph_break()
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Attention, "forward", forward_with_a_break)

    run(script, {**compiled_flags, "max_train_steps": 1})

    assert "Graph break" in capfd.readouterr().err


def test_regional_compiler_of_the_launcher_is_refused(script, flags, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")

    error = train_error(script, flags)

    assert "--dynamo_use_regional_compilation " in error
    assert " --compile" in error
