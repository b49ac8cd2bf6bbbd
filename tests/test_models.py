"""Models and optimizers: dtypes, how weights are loaded, 8-bit Adam, bfloat16 and fp16."""

import json
import math
import re
import shutil

import bitsandbytes
import pytest
import torch
from conftest import matrix, run, scalars
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from runs import assert_continues, assert_equal, assert_same, resume, train_error, trained
from small_pairs import make_row, random_image, write_parquet
from small_world import build_pipeline


@pytest.fixture(scope="module")
def half_pipeline(tmp_path_factory):
    """A pipeline whose VAE works in half precision."""
    folder = tmp_path_factory.mktemp("half") / "pipeline"
    build_pipeline(folder, seed=7, force_upcast=False)
    return folder


# Loading ------------------------------------------------------------------------------------------------------------
def base_weights(pipeline):
    """All weights of a pipeline except for a LoRA's, under their original names."""
    weights = {}
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        for name, weight in getattr(pipeline, part).named_parameters():
            if "lora" not in name:
                weights[f"{part}.{name.replace('.base_layer', '')}"] = weight
    return weights


@pytest.mark.parametrize(
    ("rank", "force_upcast", "float32_parts"),
    [(4, True, ("vae.",)), (None, False, ("unet.",))],
    ids=["LoRA, VAE in float32", "full, VAE in bfloat16"],
)
def test_bf16_is_for_frozen_weights(script, flags, world, half_pipeline, loaded, rank, force_upcast, float32_parts):
    """Trained weights are float32, and so is a VAE with force_upcast. None is rounded on the way."""
    folder = world / "pipeline" if force_upcast else half_pipeline
    # A learning rate too small to change a float32.
    flags.update(rank=rank, mixed_precision="bf16", pretrained_model_name_or_path=folder, learning_rate=1e-30)

    out = run(script, flags)

    pipeline = loaded[0].result
    weights = base_weights(pipeline)
    original = base_weights(type(pipeline).from_pretrained(folder))
    assert weights.keys() == original.keys()
    for name, weight in weights.items():
        assert weight.dtype == (torch.float32 if name.startswith(float32_parts) else torch.bfloat16), name
        # Only weights that are 0 can change, by 1e-30 per step.
        torch.testing.assert_close(weight, original[name].to(weight.dtype), rtol=0, atol=1e-20)
    for name, weight in pipeline.unet.named_parameters():
        if "lora" in name:
            assert weight.dtype == torch.float32, name
    for name, weight in trained(out).items():
        assert weight.dtype == torch.float32, name


@pytest.mark.parametrize("rank", [4, matrix(None)], ids=["LoRA", "full"])
def test_bf16_trains_about_like_float32(script, flags, tmp_path, loaded, rank):
    flags["rank"] = rank

    losses = scalars(run(script, flags))["loss"]
    half = run(script, {**flags, "output_dir": tmp_path / "half", "mixed_precision": "bf16"})

    for model in (loaded[0].result.vae, loaded[0].result.unet, loaded[0].result.text_encoder):
        assert model.dtype == torch.float32
    half_losses = scalars(half)["loss"]
    assert half_losses == pytest.approx(losses, rel=0.01)
    assert half_losses != losses


@pytest.mark.parametrize(
    ("train_text_encoder", "dtypes"),
    # A trained text encoder returns float32.
    [(None, {torch.bfloat16}), matrix(True, {torch.bfloat16, torch.float32})],
    ids=["UNet", "text encoders"],
)
def test_lora_does_not_copy_activations_to_float32(script, flags, tmp_path, monkeypatch, train_text_encoder, dtypes):
    """It learns the same as with peft's copies, which autocast would round again, bit for bit."""
    flags.update(mixed_precision="bf16", train_text_encoder=train_text_encoder, run_validation=True)
    flags.update(validation_prompts=["a red circle"], num_inference_steps=2)
    cast = BaseTunerLayer._cast_input_dtype
    found = set()

    def record(layer, values, dtype):
        values = cast(layer, values, dtype)
        found.add(values.dtype)
        return values

    with monkeypatch.context() as patch:
        patch.setattr(BaseTunerLayer, "_cast_input_dtype", record)
        uncopied = run(script, flags)
    monkeypatch.setattr(BaseTunerLayer, "_cast_input_dtype", lambda layer, values, dtype: values.to(dtype))
    copied = run(script, {**flags, "output_dir": tmp_path / "copied"})

    assert found == dtypes
    assert_same(copied, uncopied)


@pytest.fixture(scope="module")
def fp16_files(world, tmp_path_factory):
    """The small world's pipeline, only in files of the variant fp16."""
    folder = tmp_path_factory.mktemp("half")
    pipeline = StableDiffusionXLPipeline.from_pretrained(world / "pipeline", add_watermarker=False)
    pipeline.to(torch.float16).save_pretrained(folder, variant="fp16")
    return folder


@pytest.mark.parametrize("vae", ["fp16 files", "plain files"])
def test_variant_is_loaded_and_trained_in_float32(script, flags, world, fp16_files, loaded, vae):
    """Another VAE is loaded in that variant as well, if it exists."""
    flags.update(pretrained_model_name_or_path=fp16_files, variant="fp16", revision="main", rank=None)
    vae_folder = fp16_files if vae == "fp16 files" else world / "pipeline"

    out = run(script, {**flags, "pretrained_vae_model_name_or_path": vae_folder / "vae", "max_train_steps": 1})

    for name, weight in trained(out).items():
        assert weight.dtype == torch.float32, name
    vae_weights = loaded[0].result.vae.parameters()
    vae_is_rounded = all(torch.equal(weight, weight.half().float()) for weight in vae_weights)
    assert vae_is_rounded == (vae != "plain files")


def test_missing_variant_is_suggested(script, flags, fp16_files):
    error = train_error(script, {**flags, "pretrained_model_name_or_path": fp16_files})

    assert error.startswith(f"--pretrained_model_name_or_path {fp16_files} cannot be loaded (try --variant fp16)")
    assert str(fp16_files / "unet") in error


@pytest.mark.parametrize("fault", ["missing", "truncated"])
def test_variant_of_the_unet_that_cannot_be_loaded_is_an_error(script, flags, world, tmp_path, fault):
    """Instead of its files without a variant."""
    folder = shutil.copytree(world / "pipeline", tmp_path / "model")
    if fault == "truncated":
        (weights,) = (folder / "unet").glob("*.safetensors")
        (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(weights.read_bytes()[:1000])

    error = train_error(script, {**flags, "pretrained_model_name_or_path": folder, "variant": "fp16"})

    assert error.startswith(f"--pretrained_model_name_or_path {folder} cannot be loaded")
    assert "diffusion_pytorch_model.fp16.safetensors" in error


@pytest.mark.parametrize("flag", ["pretrained_unet_name_or_path", "pretrained_vae_model_name_or_path"])
def test_truncated_variant_of_a_replaced_part_is_an_error(script, flags, world, tmp_path, flag):
    """A missing one is not."""
    part = "unet" if flag == "pretrained_unet_name_or_path" else "vae"
    folder = shutil.copytree(world / "pipeline" / part, tmp_path / part)
    (weights,) = folder.glob("*.safetensors")
    variant = weights.with_suffix(".fp16.safetensors")
    variant.write_bytes(weights.read_bytes()[:1000])
    full = shutil.copytree(world / "pipeline", tmp_path / "model")
    (weights,) = (full / "unet").glob("*.safetensors")
    weights.rename(weights.with_suffix(".fp16.safetensors"))

    error = train_error(script, {**flags, "pretrained_model_name_or_path": full, "variant": "fp16", flag: folder})

    assert error.startswith(f"--{flag} {folder} cannot be loaded: ")
    assert variant.name in error


def test_unet_is_loaded_first(script, flags, monkeypatch):
    """While it is cast, its memory-mapped file counts towards peak memory."""
    from_pretrained = StableDiffusionXLPipeline.from_pretrained
    dtypes = []

    def load_others(*names, **parts):
        dtypes.append(parts["unet"].dtype)
        return from_pretrained(*names, **parts)

    monkeypatch.setattr(script.StableDiffusionXLPipeline, "from_pretrained", load_others)

    run(script, {**flags, "mixed_precision": "bf16", "max_train_steps": 1})

    assert dtypes == [torch.bfloat16]


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("unet/config.json", {"mid_block_type": None}),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    ],
    ids=["without a middle block, like SSD-1B", "v-prediction with zero terminal SNR"],
)
def test_variations_of_sdxl_train(script, flags, world, tmp_path, file, fields):
    folder = shutil.copytree(world / "pipeline", tmp_path / "pipeline")
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**config, **fields}))

    logged = scalars(run(script, {**flags, "pretrained_model_name_or_path": folder, "max_train_steps": 2}))

    assert logged["skipped_steps"] == {1: 0, 2: 0}
    assert all(math.isfinite(loss) for loss in logged["loss"].values())


@pytest.fixture
def tf32_backends():
    """PyTorch's settings for matrix products and for convolutions, which are restored after the test."""
    backends = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [backend.allow_tf32 for backend in backends]
    yield backends
    for backend, allowed in zip(backends, before):
        backend.allow_tf32 = allowed


@pytest.mark.parametrize("allowed", [True, None])
def test_allow_tf32_is_for_matrix_products_and_convolutions(script, flags, tf32_backends, allowed):
    for backend in tf32_backends:
        backend.allow_tf32 = not allowed

    train_error(script, {**flags, "allow_tf32": allowed, "caption_column": "nothing"})

    assert [backend.allow_tf32 for backend in tf32_backends] == 2 * [bool(allowed)]


def test_unet_gets_the_size_and_crop_of_each_pair_for_both_images(script, flags, tmp_path, record_calls):
    """They are compared with Pillow's in test_pairs.py."""
    rows = []
    for number in range(4):
        image = random_image(72 + 8 * number, 64)
        rows.append(make_row(number, jpg_0=image, jpg_1=image))
    write_parquet(tmp_path / "pairs" / "train.parquet", [rows])
    flags.update(dataset_name=tmp_path / "pairs", cache_dir=tmp_path / "cache", random_crop=True)
    losses = record_calls(script, "preference_loss")
    forwards = record_calls(UNet2DConditionModel, "forward")

    run(script, {**flags, "max_train_steps": 1})

    (forward,) = forwards
    _, batch = losses[0].args
    expected = batch["add_time_ids"].tolist()
    assert sorted(width for _, width, *_ in expected) == [72, 80, 88, 96]
    assert forward.kwargs["added_cond_kwargs"]["time_ids"].tolist() == 2 * expected


# 8-bit Adam and bfloat16 weights ------------------------------------------------------------------------------------
def test_8bit_adam_has_8bit_states_and_trains_about_like_adamw(script, flags, tmp_path):
    flags.update(rank=None, checkpointing_steps=4)

    adamw = run(script, flags)
    adam_8bit = run(script, {**flags, "output_dir": tmp_path / "8bit", "use_8bit_adam": True})

    num_large = 0
    optimizer = torch.load(adam_8bit / "checkpoint-4" / "optimizer.bin", weights_only=False)
    for state in optimizer["state"].values():
        state = state.get("__bnb_optimizer_quant_state__", state)
        if state["state1"].numel() >= 4096:  # smaller ones stay in float32
            num_large += 1
            assert state["state1"].dtype == torch.uint8
            assert state["state2"].dtype == torch.uint8
    assert num_large > 20
    assert scalars(adam_8bit)["loss"] == pytest.approx(scalars(adamw)["loss"], rel=0.01)
    assert scalars(adam_8bit)["loss"] != scalars(adamw)["loss"]


def test_stochastic_rounding_goes_to_a_neighbor_and_keeps_the_mean(script):
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([torch.randn(200), torch.tensor([1.0, -3.0, 1e-30, 1e30, 0.0101])])

    rounded = torch.stack([script.round_stochastically(values, generator) for _ in range(20_000)]).double()

    exact = values.double()
    spacing = 2.0 ** (exact.abs().log2().floor() - 7)  # bfloat16 has eight bits of precision
    assert ((rounded - exact).abs() <= spacing).all()
    # Five standard errors of a coin toss.
    assert ((rounded.mean(dim=0) - exact).abs() <= 5 * 0.5 * spacing / 20_000**0.5).all()
    representable = values.bfloat16().float() == values
    assert representable.sum() >= 2
    assert (rounded[:, representable] == exact[representable]).all()


def weight_changes(optimizer_class, dtype):
    """Changes of weights of about 1e-2 in 300 steps with noisy gradients, at the paper's learning rate."""
    generator = torch.Generator().manual_seed(0)
    start = (1e-2 * torch.randn(64, 1024, generator=generator)).bfloat16()
    direction = torch.randn(64, 1024, generator=generator)
    parameter = torch.nn.Parameter(start.to(dtype, copy=True))
    optimizer = optimizer_class([parameter], lr=1e-7, weight_decay=0)
    for _ in range(300):
        parameter.grad = (direction + torch.randn(64, 1024, generator=generator)).to(dtype)
        optimizer.step()
    return (parameter.detach().float() - start.float()).double()


def test_small_updates_of_bfloat16_weights_need_stochastic_rounding(script):
    plain = bitsandbytes.optim.AdamW8bit
    stochastic = type("Stochastic", (script.StochasticRounding, plain), {})
    expected = weight_changes(plain, torch.float32)

    def share_of_expected(changes):
        return (changes * expected).sum().item() / (expected * expected).sum().item()

    assert share_of_expected(weight_changes(plain, torch.bfloat16)) < 0.05
    assert share_of_expected(weight_changes(stochastic, torch.bfloat16)) == pytest.approx(1, abs=0.1)


@pytest.fixture
def full_bf16_flags(flags):
    return {
        **flags,
        "rank": None,
        "learning_rate": 1e-4,
        "use_8bit_adam": True,
        "mixed_precision": "bf16",
        "full_bf16": True,
        "max_train_steps": 12,
        "checkpointing_steps": 5,
    }


def test_bfloat16_weights_train_about_like_float32_weights(script, full_bf16_flags, uninterrupted):
    bfloat16 = uninterrupted(full_bf16_flags)
    float32 = uninterrupted({**full_bf16_flags, "full_bf16": None})

    losses = list(scalars(bfloat16)["loss"].values())
    expected = list(scalars(float32)["loss"].values())
    assert losses == pytest.approx(expected, rel=0.01)
    assert expected[0] - expected[-1] > 0.1
    assert {weight.dtype for weight in trained(bfloat16).values()} == {torch.bfloat16}
    assert {weight.dtype for weight in trained(float32).values()} == {torch.float32}
    assert UNet2DConditionModel.from_pretrained(bfloat16 / "unet").dtype == torch.float32


def test_bfloat16_weights_resume_exactly(script, full_bf16_flags, uninterrupted, tmp_path):
    """They are rounded with the same random bits."""
    expected = uninterrupted(full_bf16_flags)
    checkpoint = expected / "checkpoint-5"

    resumed = resume(script, full_bf16_flags, checkpoint, tmp_path / "resumed")
    full_bf16_flags.update(full_bf16=None, resume_from_checkpoint=checkpoint)
    error = train_error(script, full_bf16_flags)

    assert_continues(expected, resumed, 5)
    assert re.search("full_bf16 is False, but True in .*checkpoint-5", error)


# fp16 ---------------------------------------------------------------------------------------------------------------
@pytest.fixture
def fp16_on_cpu(script, monkeypatch):
    """--mixed_precision fp16, which accelerate has only for GPUs. Returns the scalers, which start too large."""
    build_accelerator = script.build_accelerator
    scalers = []

    def build(args):
        accelerator = build_accelerator(args)
        accelerator.state._mixed_precision = "fp16"
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", 2.0**40, backoff_factor=2.0**-30, growth_interval=2)
        scalers.append(accelerator.scaler)
        return accelerator

    monkeypatch.setattr(script, "build_accelerator", build)
    return scalers


@pytest.mark.parametrize("changes", [{}, matrix({"rank": None, "use_8bit_adam": True})], ids=["LoRA", "full, 8-bit"])
def test_fp16_skips_a_step_adapts_its_scale_and_resumes(script, flags, half_pipeline, tmp_path, fp16_on_cpu, changes):
    flags.update(changes, pretrained_model_name_or_path=half_pipeline, checkpointing_steps=1)

    uninterrupted = run(script, flags)
    resumed = resume(script, flags, uninterrupted / "checkpoint-2", tmp_path / "resumed")

    logged = scalars(uninterrupted)
    assert logged["skipped_steps"] == {1: 1, 2: 1, 3: 1, 4: 1}
    assert [math.isfinite(norm) for norm in logged["grad_norm"].values()] == [False, True, True, True]
    assert list(logged["loss"]) == [2, 3, 4]
    assert_equal(trained(resumed), trained(uninterrupted))
    assert [scaler.get_scale() for scaler in fp16_on_cpu] == [2**11, 2**11]
