"""Dtypes and weights of the models, their conditioning, and the optimizers that keep less than float32."""

import io
import json
import math
import re
import shutil

import bitsandbytes
import numpy as np
import pytest
import torch
from conftest import also, run, scalars
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image, ImageOps
from small_world import build_pipeline, png, write_pairs
from test_arguments import complaint
from test_training import assert_equal, assert_same, curves, trained


@pytest.fixture(scope="module")
def half_pipeline(tmp_path_factory):
    """A pipeline whose VAE is safe in half precision."""
    folder = tmp_path_factory.mktemp("half") / "pipeline"
    build_pipeline(folder, seed=7, force_upcast=False)
    return folder


# Loading ------------------------------------------------------------------------------------------------------------


def weights_of(pipeline):
    """The pipeline's weights, the LoRA's base layers under the names that they have without it."""
    parts = {name: getattr(pipeline, name) for name in ("unet", "vae", "text_encoder", "text_encoder_2")}
    weights = {f"{part}.{name}": weight for part in parts for name, weight in parts[part].named_parameters()}
    return {name.replace(".base_layer", ""): weight for name, weight in weights.items() if "lora" not in name}


@pytest.mark.parametrize(("rank", "upcast_vae"), [(4, True), (None, False)])
def test_bf16_is_for_frozen_weights_and_leaves_all_alone(script, flags, world, half_pipeline, spied, rank, upcast_vae):
    """Trained weights are float32, and so is a VAE whose config asks for it with force_upcast, never rounded."""
    folder = world / "pipeline" if upcast_vae else half_pipeline
    # A learning rate too small to move a float32.
    flags.update(rank=rank, mixed_precision="bf16", pretrained_model_name_or_path=folder, learning_rate=1e-30)
    out = run(script, flags)
    assert {weight.dtype for weight in trained(out).values()} == {torch.float32}
    (pipeline,) = spied
    adapter = [weight for name, weight in pipeline.unet.named_parameters() if "lora" in name]
    assert {weight.dtype for weight in adapter} == ({torch.float32} if rank else set())
    precise = ("vae.",) * upcast_vae + ("unet.",) * (rank is None)
    weights, original = weights_of(pipeline), weights_of(type(pipeline).from_pretrained(folder))
    assert weights.keys() == original.keys()
    for name, weight in weights.items():
        assert weight.dtype == (torch.float32 if name.startswith(precise) else torch.bfloat16), name
        # Only what is 0 can move at all, by 1e-30 a step.
        torch.testing.assert_close(weight, original[name].to(weight.dtype), rtol=0, atol=1e-20)


@pytest.mark.parametrize("rank", [4, also(None)])
def test_bf16_trains_about_as_float32_does(script, flags, tmp_path, spied, rank):
    flags["rank"] = rank
    full = scalars(run(script, flags))["loss"]
    assert {part.dtype for part in (spied[0].vae, spied[0].unet, spied[0].text_encoder)} == {torch.float32}
    half = scalars(run(script, {**flags, "output_dir": tmp_path / "half", "mixed_precision": "bf16"}))["loss"]
    assert half == pytest.approx(full, rel=0.01)
    assert half != full


def test_nearly_all_lora_weights_move_under_bf16_at_a_small_learning_rate(script, flags, tmp_path):
    """Weights kept in bf16 would swallow updates this small: under 2 % of them would move."""
    flags.update(mixed_precision="bf16", learning_rate=1e-5, max_train_steps=3)
    # Too small to move a float32.
    still = {"learning_rate": 1e-30, "max_train_steps": 1, "output_dir": tmp_path / "start"}
    start, end = trained(run(script, {**flags, **still})), trained(run(script, flags))
    moved = torch.cat([(start[name] != weight).flatten() for name, weight in end.items()])
    assert moved.float().mean() > 0.99


@pytest.mark.parametrize("train_text_encoder", [None, also(True)])
def test_lora_copies_no_activation_to_float32(script, flags, tmp_path, monkeypatch, train_text_encoder):
    """And learns the same, bit for bit, as with peft's copies, which autocast would round again."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    cast, dtypes = BaseTunerLayer._cast_input_dtype, set()

    def noted(layer, values, dtype):
        dtypes.add(cast(layer, values, dtype).dtype)
        return cast(layer, values, dtype)

    flags.update(mixed_precision="bf16", train_text_encoder=train_text_encoder, run_validation=True)
    flags.update(validation_prompts=["a red circle"], num_inference_steps=2)
    monkeypatch.setattr(BaseTunerLayer, "_cast_input_dtype", noted)
    uncopied = run(script, flags)
    # What a trained text encoder gives is in float32 already.
    assert dtypes == {torch.bfloat16, *[torch.float32] * (train_text_encoder is True)}
    monkeypatch.setattr(BaseTunerLayer, "_cast_input_dtype", lambda layer, values, dtype: values.to(dtype))
    assert_same(run(script, {**flags, "output_dir": tmp_path / "copied"}), uncopied)


@pytest.fixture(scope="module")
def fp16_files(world, tmp_path_factory):
    """The small world's pipeline in files of the variant fp16 alone."""
    folder = tmp_path_factory.mktemp("half")
    pipeline = StableDiffusionXLPipeline.from_pretrained(world / "pipeline", add_watermarker=False)
    pipeline.to(torch.float16).save_pretrained(folder, variant="fp16")
    return folder


@pytest.mark.parametrize("vae", [None, "fp16 files", "plain files"])
def test_variant_of_the_weights_is_loaded_and_trained_in_float32(script, flags, world, fp16_files, spied, vae):
    """A VAE of its own is loaded in that variant, too, if it has it."""
    flags.update(pretrained_model_name_or_path=fp16_files, variant="fp16", revision="main", rank=None)
    flags["max_train_steps"] = 1
    folders = {None: None, "fp16 files": fp16_files / "vae", "plain files": world / "pipeline" / "vae"}
    out = run(script, flags | {"pretrained_vae_model_name_or_path": folders[vae]})
    assert {weight.dtype for weight in trained(out).values()} == {torch.float32}
    rounded = [bool((weight == weight.half()).all()) for weight in spied[0].vae.parameters()]
    assert all(rounded) is (vae != "plain files")


def test_unet_is_loaded_before_the_other_parts(script, flags, monkeypatch):
    """As it is cast, its files are mapped into memory: loading peaks there, and no other part should add to it."""
    dtypes, load = [], StableDiffusionXLPipeline.from_pretrained

    def load_others(*names, **parts):
        dtypes.append(parts["unet"].dtype)
        return load(*names, **parts)

    monkeypatch.setattr(script.StableDiffusionXLPipeline, "from_pretrained", load_others)
    run(script, flags | {"mixed_precision": "bf16", "max_train_steps": 1})
    assert dtypes == [torch.bfloat16]


def test_files_of_a_variant_alone_are_said_to_need_it(script, flags, fp16_files):
    sentence = complaint(script, flags | {"pretrained_model_name_or_path": fp16_files})
    assert sentence.startswith(f"--pretrained_model_name_or_path {fp16_files} cannot be loaded (try --variant fp16)")
    assert str(fp16_files / "unet") in sentence


def test_bases_without_a_middle_block_and_with_zero_snr_train(script, flags, world, tmp_path):
    """As SSD-1B is distilled from SDXL, and as its finetunes that predict v are noised."""
    folder = shutil.copytree(world / "pipeline", tmp_path / "pipeline")
    changes = {"unet/config.json": {"mid_block_type": None}}
    changes["scheduler/scheduler_config.json"] = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    for file, fields in changes.items():
        (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **fields}))
    logged = scalars(run(script, flags | {"pretrained_model_name_or_path": folder, "max_train_steps": 2}))
    assert all(math.isfinite(value) for value in logged["loss"].values()) and set(
        logged["skipped_steps"].values()
    ) == {0}


@pytest.fixture
def tf32_backends():
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    yield backends
    for backend, allowed in zip(backends, before):
        backend.allow_tf32 = allowed


@pytest.mark.parametrize("allowed", [True, None])
def test_allow_tf32_is_for_products_and_convolutions_alike(script, flags, tf32_backends, allowed):
    for backend in tf32_backends:
        backend.allow_tf32 = not allowed
    complaint(script, flags | {"allow_tf32": allowed, "caption_column": "nothing"})
    assert [backend.allow_tf32 for backend in tf32_backends] == 2 * [bool(allowed)]


# Conditioning -------------------------------------------------------------------------------------------------------

SIDES = (64, 72, 96, 130)


@pytest.fixture
def sized_pairs(tmp_path):
    """Folder with pairs of noise images, no two sizes (width, height) of which are the same."""
    rng = np.random.default_rng(0)
    sizes = rng.permutation([(width, height) for width in SIDES for height in SIDES]).tolist()
    images = [png(Image.fromarray(rng.integers(256, size=(h, w, 3), dtype=np.uint8))) for w, h in sizes]
    rows = [
        {"caption": "noise", "jpg_0": first, "jpg_1": second, "label_0": number % 2, "label_1": 1 - number % 2}
        for number, (first, second) in enumerate(zip(images[::2], images[1::2]))
    ]
    write_pairs(rows, tmp_path / "sized", 1, len(rows))
    return tmp_path / "sized", rows


@pytest.mark.parametrize("random_crop", [True, None])
def test_both_images_get_the_size_and_crop_of_the_chosen_one(script, flags, monkeypatch, sized_pairs, random_crop):
    """The UNet sees the chosen image's (height, width), the place of its crop after the flip, and the target size."""
    folder, rows = sized_pairs
    seen, batches, forward, step = [], [], UNet2DConditionModel.forward, script.preference_loss

    def seeing(unet, *args, added_cond_kwargs, **kwargs):
        seen.append(added_cond_kwargs["time_ids"])
        return forward(unet, *args, added_cond_kwargs=added_cond_kwargs, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", seeing)
    monkeypatch.setattr(script, "preference_loss", lambda run, batch: batches.append(batch) or step(run, batch))
    run(script, {**flags, "dataset_name": folder, "random_crop": random_crop})
    flipped, places = [], set()
    assert len(seen) == len(batches) == 4
    for time_ids, batch in zip(seen, batches):
        chosen_ids, rejected_ids = time_ids.chunk(2)
        assert torch.equal(chosen_ids, rejected_ids)
        for ids, pixels, name in zip(chosen_ids.int().tolist(), batch["pixel_values"], batch["row"]):
            row = rows[int(re.fullmatch(r"row (\d+)", name).group(1))]
            image = Image.open(io.BytesIO(row["jpg_0"] if row["label_0"] else row["jpg_1"]))
            height, width, top, left, *target = ids
            assert (width, height) == image.size and target == [64, 64]
            scale = 64 / min(image.size)
            image = image.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
            crops = [each.crop((left, top, left + 64, top + 64)) for each in (image, ImageOps.mirror(image))]
            flipped.append([np.array_equal(np.array(crop), pixels.permute(1, 2, 0)) for crop in crops].index(True))
            places.add((row["caption"], image.size, top, left))
    assert set(flipped) == {0, 1}
    # Two passes over eight pairs: centered crops come back at the same place.
    assert (len(places) > 8) is bool(random_crop)


# Optimizer states and weights of fewer bits --------------------------------------------------------------------------


def test_8bit_adam_has_states_of_8_bits_and_trains_nearly_as_adamw(script, flags, tmp_path):
    flags.update(rank=None, checkpointing_steps=4)
    plain = run(script, flags)
    small = run(script, {**flags, "output_dir": tmp_path / "8bit", "use_8bit_adam": True})
    states = torch.load(small / "checkpoint-4" / "optimizer.bin", weights_only=False)["state"].values()
    states = [state.get("__bnb_optimizer_quant_state__", state) for state in states]
    large = [state for state in states if state["state1"].numel() >= 4096]
    assert len(large) > 20
    assert {state[name].dtype for state in large for name in ("state1", "state2")} == {torch.uint8}
    assert scalars(small)["loss"] == pytest.approx(scalars(plain)["loss"], rel=0.01)
    assert scalars(small)["loss"] != scalars(plain)["loss"]


def test_stochastic_rounding_goes_to_a_neighbor_and_keeps_the_mean(script):
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([torch.randn(200), torch.tensor([1.0, -3.0, 1e-30, 1e30, 0.0101])])
    rounded = torch.stack([script.round_stochastically(values, generator) for _ in range(20_000)]).double()
    # A step in bfloat16's eight bits of precision.
    step = 2.0 ** (values.double().abs().log2().floor() - 7)
    assert ((rounded - values.double()).abs() <= step).all()
    # Five standard errors of a coin's throw.
    assert ((rounded.mean(dim=0) - values.double()).abs() <= 5 * 0.5 * step / 20_000**0.5).all()
    exact = values.bfloat16().float() == values
    assert exact.sum() >= 2 and (rounded[:, exact] == values[exact].double()).all()


def displacement(optimizer_class, dtype):
    """How far weights of about 1e-2 move in 300 steps at the paper's learning rate under noisy gradients."""
    generator = torch.Generator().manual_seed(0)
    start = (1e-2 * torch.randn(64, 1024, generator=generator)).bfloat16()
    direction = torch.randn(64, 1024, generator=generator)
    parameter = torch.nn.Parameter(start.to(dtype, copy=True))
    optimizer = optimizer_class([parameter], lr=1e-7, weight_decay=0)
    for _ in range(300):
        parameter.grad = (direction + torch.randn(64, 1024, generator=generator)).to(dtype)
        optimizer.step()
    return (parameter.detach().float() - start.float()).double()


def test_the_papers_learning_rate_moves_stochastically_rounded_weights_and_not_plain_ones(script):
    plain = bitsandbytes.optim.AdamW8bit
    rounded = type("Rounded", (script.StochasticRounding, plain), {})
    expected = displacement(plain, torch.float32)
    shares = [
        float((displacement(kind, torch.bfloat16) * expected).sum() / (expected * expected).sum())
        for kind in (plain, rounded)
    ]
    assert shares[0] < 0.05
    assert shares[1] == pytest.approx(1, abs=0.1)


@pytest.fixture
def full_bf16(flags):
    changes = {"rank": None, "learning_rate": 1e-4, "use_8bit_adam": True, "mixed_precision": "bf16"}
    return {**flags, **changes, "full_bf16": True, "max_train_steps": 12, "checkpointing_steps": 5}


def test_bfloat16_weights_learn_and_resume_as_float32_weights_do(script, full_bf16, tmp_path):
    rounded = run(script, full_bf16)
    exact = run(script, {**full_bf16, "full_bf16": None, "output_dir": tmp_path / "float32"})
    losses, expected = (list(scalars(out)["loss"].values()) for out in (rounded, exact))
    assert losses == pytest.approx(expected, rel=0.01)
    # So that the closeness says something.
    assert expected[0] - expected[-1] > 0.1
    assert {weight.dtype for weight in trained(rounded).values()} == {torch.bfloat16}
    assert {weight.dtype for weight in trained(exact).values()} == {torch.float32}
    assert UNet2DConditionModel.from_pretrained(rounded / "unet").dtype == torch.float32
    # Resumed, the weights are rounded as without the interruption, bit for bit.
    resume = {**full_bf16, "resume_from_checkpoint": rounded / "checkpoint-5", "output_dir": tmp_path / "resumed"}
    resumed = run(script, resume)
    after = {
        name: {step: value for step, value in values.items() if step > 5} for name, values in curves(rounded).items()
    }
    assert curves(resumed) == after
    assert_equal(trained(resumed), trained(rounded))
    with pytest.raises(script.TrainingError, match="full_bf16 is False, but True in .*checkpoint-5"):
        run(script, {**resume, "full_bf16": None, "output_dir": tmp_path / "refused"})


# fp16 ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def scalers(script, monkeypatch):
    """--mixed_precision fp16, which accelerate gives to GPUs alone, on CPU; the scale is far too large at first."""
    build, scalers = script.build_accelerator, []

    def build_half(args):
        accelerator = build(args)
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        accelerator.scaler = torch.amp.GradScaler("cpu", 2.0**40, backoff_factor=2.0**-30, growth_interval=2)
        scalers.append(accelerator.scaler)
        return accelerator

    monkeypatch.setattr(script, "build_accelerator", build_half)
    return scalers


@pytest.mark.parametrize("changes", [{}, also({"rank": None}), also({"rank": None, "use_8bit_adam": True})])
def test_fp16_skips_a_step_learns_its_scale_and_resumes(script, flags, half_pipeline, tmp_path, scalers, changes):
    flags.update(pretrained_model_name_or_path=half_pipeline, checkpointing_steps=1, **changes)
    whole = run(script, flags)
    logs = scalars(whole)
    assert list(logs["skipped_steps"].values()) == [1, 1, 1, 1] and scalers[0].get_scale() == 2**11
    assert [math.isfinite(norm) for norm in logs["grad_norm"].values()] == [False, True, True, True]
    assert list(logs["loss"]) == [2, 3, 4]
    resumed = {"resume_from_checkpoint": whole / "checkpoint-2", "output_dir": tmp_path / "resumed"}
    assert_equal(trained(run(script, {**flags, **resumed})), trained(whole))
    assert scalers[1].get_scale() == 2**11
