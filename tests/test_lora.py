"""LoRA: its layers and alpha, the files that other programs load, continued training, and text encoders."""

import json
import shutil

import pytest
import torch
from conftest import SCRIPT, load_script, run
from cpu_cluster import Fault, install
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from runs import (
    LORA_WEIGHTS,
    assert_close,
    assert_equal,
    grid_images,
    largest_difference,
    resume,
    run_ranks_successfully,
    train_error,
    trained,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_world import build_unet


KOHYA = "pytorch_lora_weights_kohya.safetensors"
# The layers that each choice adapts, by the names of SDXL's modules.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TRANSFORMER = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
ALL = (*TRANSFORMER, "conv1", "conv2", "conv_shortcut", "time_emb_proj")
TEXT = {"train_text_encoder": True, "text_encoder_lr": 1e-2}
# Too small to change a float32.
FROZEN = {"learning_rate": 1e-30, "text_encoder_lr": 1e-30, "adam_weight_decay": 0}


def select_layers(names, layers):
    return {name for name in names if name.endswith(tuple(f".{layer}" for layer in layers))}


def read_metadata(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def generate(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        "a red circle",
        height=64,
        width=64,
        num_inference_steps=2,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images


# Layers and files ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def sdxl_layers():
    """Names of the modules of SDXL's UNet at its real size, without weights."""
    from benchmarks.estimate import SDXL_UNET

    with torch.device("meta"):
        return [name for name, _ in UNet2DConditionModel(**SDXL_UNET).named_modules()]


@pytest.mark.parametrize(
    ("choice", "layers", "count"),
    [("attention", ATTENTION, 560), ("transformer", TRANSFORMER, 722), ("all", ALL, 784)],
)
def test_choices_select_these_layers_of_sdxl(script, sdxl_layers, choice, layers, count):
    selected = select_layers(sdxl_layers, script.LORA_LAYERS[choice])

    assert selected == select_layers(sdxl_layers, layers)
    assert len(selected) == count


@pytest.mark.parametrize(
    ("choices", "layers"),
    [(["attention"], ATTENTION), (["attention", "conv_in", "conv1"], (*ATTENTION, "conv_in", "conv1"))],
    ids=["attention", "attention and names"],
)
def test_both_files_contain_the_layers_and_alpha_and_give_the_same_image(script, flags, choices, layers):
    """Pipelines apply alpha / rank from the file's metadata. The Kohya file contains alpha for each layer."""
    base = flags["pretrained_model_name_or_path"]

    out = run(script, {**flags, "lora_layers": choices, "lora_alpha": 8})

    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    modules = [f"unet.{name}" for name, _ in unet.named_modules()]
    expected = select_layers(modules, layers)
    assert {name.split(".lora_")[0] for name in load_file(out / LORA_WEIGHTS)} == expected

    metadata = read_metadata(out / LORA_WEIGHTS)
    assert json.loads(metadata["lora_adapter_metadata"])["unet.lora_alpha"] == 8
    assert str(base) not in str(metadata)

    kohya = load_file(out / KOHYA)
    alphas = {name: value.item() for name, value in kohya.items() if name.endswith(".alpha")}
    assert alphas == {f"lora_{name.replace('.', '_')}.alpha": 8 for name in expected}

    images = []
    for file in (LORA_WEIGHTS, KOHYA, None):
        pipeline = StableDiffusionXLPipeline.from_pretrained(base)
        if file is not None:
            pipeline.load_lora_weights(out, weight_name=file)
        images.append(generate(pipeline))
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def comfyui_names():
    """The names under which ComfyUI looks for the layers of SDXL's UNet and text encoders."""
    names = []

    # Depth and number of the transformers in each block.
    transformers = {
        "down_blocks_1": (2, 2),
        "down_blocks_2": (10, 2),
        "mid_block": (10, 1),
        "up_blocks_0": (10, 3),
        "up_blocks_1": (2, 3),
    }
    layers = ["ff_net_0_proj", "ff_net_2"]
    for attention in ("attn1", "attn2"):
        layers += [f"{attention}_{name}" for name in ("to_q", "to_k", "to_v", "to_out_0")]
    for block, (depth, number) in transformers.items():
        for n in range(number):
            names += [f"{block}_attentions_{n}_proj_in", f"{block}_attentions_{n}_proj_out"]
            for i in range(depth):
                names += [f"{block}_attentions_{n}_transformer_blocks_{i}_{layer}" for layer in layers]

    # Number of the resnets in each block.
    resnets = {
        "down_blocks_0": 2,
        "down_blocks_1": 2,
        "down_blocks_2": 2,
        "mid_block": 2,
        "up_blocks_0": 3,
        "up_blocks_1": 3,
        "up_blocks_2": 3,
    }
    for block, number in resnets.items():
        for n in range(number):
            names += [f"{block}_resnets_{n}_{layer}" for layer in ("conv1", "conv2", "time_emb_proj")]
            # There is a shortcut where the number of channels changes, as it does with every skip connection.
            if block.startswith("up") or (n == 0 and block in ("down_blocks_1", "down_blocks_2")):
                names.append(f"{block}_resnets_{n}_conv_shortcut")
    names = [f"lora_unet_{name}" for name in names]

    for encoder, num_layers in (("te1", 11), ("te2", 32)):  # the last layer of the first encoder is not used
        for i in range(num_layers):
            for name in ("q", "k", "v", "out"):
                names.append(f"lora_{encoder}_text_model_encoder_layers_{i}_self_attn_{name}_proj")
    return names


def test_comfyui_finds_every_layer_of_a_kohya_file(script, sdxl_layers, tmp_path):
    """With the names of SDXL at its real size."""
    layers = [f"unet.{name}" for name in select_layers(sdxl_layers, ALL)]
    for encoder, num_layers in (("text_encoder", 11), ("text_encoder_2", 32)):
        for i in range(num_layers):
            for name in script.TEXT_LORA_LAYERS:
                layers.append(f"{encoder}.text_model.encoder.layers.{i}.self_attn.{name}")
    weights = {}
    for layer in layers:
        weights[f"{layer}.lora_A.weight"] = torch.zeros(4, 4)
        weights[f"{layer}.lora_B.weight"] = torch.zeros(4, 4)
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 2})}
    save_file(weights, tmp_path / LORA_WEIGHTS, metadata)

    script.write_kohya_lora(tmp_path)

    names = comfyui_names()
    assert len(set(names)) == 784 + 4 * (11 + 32)
    expected = set()
    for name in names:
        expected.update([f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"])
    assert set(load_file(tmp_path / KOHYA)) == expected


def test_kohya_file_can_be_turned_off(script, flags):
    out = run(script, {**flags, "no_kohya_format": True, "max_train_steps": 1})

    assert not (out / KOHYA).exists()


def test_names_that_pipelines_do_not_load_are_an_error(script, flags, monkeypatch):
    def rename(call):
        return {name.replace("down", "lower"): weight for name, weight in call().items()}

    install(Fault("weights", (1,), rename), monkeypatch.setattr)

    error = train_error(script, flags)

    assert "names of the LoRA weights of the unet do not match its layers" in error


def test_unknown_layer_and_one_that_cannot_have_a_lora_are_refused(script, flags):
    unknown = train_error(script, {**flags, "lora_layers": ["to_k", "to_nothing"]})
    norm = train_error(script, {**flags, "lora_layers": ["norm1"]})

    assert "--lora_layers to_nothing is neither" in unknown
    assert norm.startswith("--lora_layers or --init_lora: peft cannot adapt the layers of the unet: ")


# Continued training -------------------------------------------------------------------------------------------------
def test_training_continues_from_a_lora_in_a_folder_or_file(script, flags, tmp_path):
    """With a learning rate that changes nothing, the weights stay the same."""
    flags.update(TEXT, lora_alpha=8)
    first = run(script, flags)
    other_folder = tmp_path / "style"
    other_folder.mkdir()
    shutil.copy(first / KOHYA, other_folder / "mystyle.safetensors")

    for lora in (first, first / KOHYA, other_folder):
        flags.update(FROZEN, init_lora=lora, output_dir=tmp_path / f"from {lora.name}")
        assert_equal(trained(run(script, flags)), trained(first))


def test_training_continues_from_a_unet(script, flags, tmp_path):
    flags["rank"] = None
    first = run(script, flags)

    flags.update(FROZEN, text_encoder_lr=None, output_dir=tmp_path / "second")
    second = run(script, {**flags, "pretrained_unet_name_or_path": first})

    assert_equal(trained(second), trained(first))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({"rank": 8}, "--rank is 8"), ({"lora_alpha": 2}, "--lora_alpha 2"), ({}, "add --train_text_encoder")],
    ids=["rank", "alpha", "text encoders"],
)
def test_lora_that_does_not_match_the_flags_is_refused(script, flags, tmp_path, changes, expected):
    first = run(script, {**flags, **TEXT, "max_train_steps": 1})

    error = train_error(script, {**flags, "init_lora": first, "output_dir": tmp_path / "second", **changes})

    assert expected in error


def test_lora_that_cannot_be_continued_is_refused(script, flags, tmp_path):
    """diffusers would ignore the magnitudes of a DoRA."""
    weights = trained(run(script, {**flags, "max_train_steps": 1}))
    dora = tmp_path / "dora.safetensors"
    compiled = tmp_path / "compiled.safetensors"
    save_file({name.replace("unet.", "unet._orig_mod."): weight for name, weight in weights.items()}, compiled)
    flags["output_dir"] = tmp_path / "second"

    for key in ("lora_magnitude_vector", "dora_scale"):
        save_file({**weights, f"unet.conv_in.{key}": torch.ones(4)}, dora)
        error = train_error(script, {**flags, "init_lora": dora})
        assert error == f"--init_lora {dora} cannot be loaded: DoRA is not supported"
    error = train_error(script, {**flags, "init_lora": compiled})
    assert error == f"--init_lora {compiled}: no layer matches the UNet."


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("unet.use_rslora", True, "rank-stabilized LoRA (use_rslora) is not supported"),
        ("unet.alpha_pattern", {"down_blocks.1": 8}, "alpha [4, 8], but --rank is 4 and --lora_alpha 4."),
        ("text_encoder.lora_alpha", 8, "alpha [4, 8], but --rank is 4 and --lora_alpha 4."),
    ],
)
def test_lora_with_several_scales_is_refused(script, flags, tmp_path, setting, value, expected):
    """All layers get the scale lora_alpha / rank of the flags."""
    first = run(script, {**flags, **TEXT, "max_train_steps": 1})
    metadata = read_metadata(first / LORA_WEIGHTS)
    config = json.loads(metadata["lora_adapter_metadata"])
    metadata["lora_adapter_metadata"] = json.dumps({**config, setting: value})
    save_file(load_file(first / LORA_WEIGHTS), first / LORA_WEIGHTS, metadata)

    error = train_error(script, {**flags, **TEXT, "init_lora": first, "output_dir": tmp_path / "second"})

    assert error.startswith(f"--init_lora {first}")
    assert error.endswith(expected)


def test_missing_unet_or_one_of_another_kind_is_refused(script, flags, tmp_path):
    unet = build_unet(cross_attention_dim=32, pooled_dim=64)
    unet.save_config(tmp_path / "other" / "unet")
    (tmp_path / "broken" / "unet").mkdir(parents=True)
    (tmp_path / "broken" / "unet" / "config.json").write_text("{")

    missing = train_error(script, {**flags, "pretrained_unet_name_or_path": tmp_path / "none"})
    broken = train_error(script, {**flags, "pretrained_unet_name_or_path": tmp_path / "broken"})
    other = train_error(script, {**flags, "pretrained_unet_name_or_path": tmp_path / "other"})

    assert f"--pretrained_unet_name_or_path {tmp_path / 'none'} cannot be loaded" in missing
    assert f"--pretrained_unet_name_or_path {tmp_path / 'other'} is not an SDXL UNet" in other
    assert str(tmp_path / "broken" / "unet" / "config.json") in broken


@pytest.mark.parametrize(
    ("flag", "rank"), [("init_lora", 4), ("pretrained_unet_name_or_path", None)], ids=["LoRA", "UNet"]
)
def test_grid_compares_with_the_weights_that_training_started_from(script, flags, tmp_path, flag, rank):
    """And not with the base model."""
    flags.update(run_validation=True, num_inference_steps=2, validation_prompts=["a red circle", "a blue star"])
    flags.update(max_train_steps=2, rank=rank, learning_rate=1e-2)
    first = run(script, flags)

    second = run(script, {**flags, flag: first, "output_dir": tmp_path / "second"})

    first_grid = grid_images(first / "validation" / "step-000002.png")
    second_grid = grid_images(second / "validation" / "step-000002.png")
    assert largest_difference(second_grid[::2], first_grid[1::2]) <= 1
    assert largest_difference(second_grid[::2], first_grid[::2]) > 3


# Text encoders ------------------------------------------------------------------------------------------------------
def test_text_encoders_are_trained_and_resume_exactly(script, flags, tmp_path):
    flags.update(TEXT, checkpointing_steps=2)

    uninterrupted = run(script, flags)
    resumed = resume(script, flags, uninterrupted / "checkpoint-2", tmp_path / "resumed")

    weights = trained(uninterrupted)
    assert_equal(trained(resumed), weights)
    for encoder in ("text_encoder.", "text_encoder_2."):
        # B is 0 at the start.
        ups = [weight for name, weight in weights.items() if name.startswith(encoder) and "lora_B" in name]
        assert len(ups) > 0
        assert all(up.any() for up in ups)
    kohya_names = load_file(uninterrupted / KOHYA)
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight" in kohya_names
    assert "lora_te2_text_model_encoder_layers_1_self_attn_q_proj.lora_up.weight" in kohya_names


def test_evaluation_applies_the_lora_of_text_encoders(script, flags, loaded):
    """Merged into them, it gives what the trained modules give. Alpha is not the rank."""
    out = run(script, {**flags, **TEXT, "lora_alpha": 8, "learning_rate": 1e-2})
    evaluate = load_script(SCRIPT.with_name("evaluate_diffusion_mapo_sdxl.py"))
    trained_pipeline = loaded[0].result
    base_pipeline = evaluate.load_sdxl(flags["pretrained_model_name_or_path"])
    merged_pipeline = evaluate.load_sdxl(flags["pretrained_model_name_or_path"])
    lora = evaluate.read_lora(evaluate.find_lora_file(str(out)), merged_pipeline.unet.config)
    evaluate.add_lora(merged_pipeline, lora)

    def embed(pipeline):
        return pipeline.encode_prompt("a red circle")[0]

    for compute in (generate, embed):
        with torch.no_grad():
            expected = compute(trained_pipeline)
            merged = compute(merged_pipeline)
            base = compute(base_pipeline)
        assert (expected - merged).abs().max() < 1e-4
        assert (expected - base).abs().max() > 1e-2


def test_text_encoders_are_trained_alike_on_two_processes(script, flags, tmp_path):
    """Their gradients are summed like those of the UNet. Adam must not divide by rounding errors of these sums."""
    flags.update(TEXT, max_train_steps=2, adam_epsilon=1e-5)

    one = run(script, flags)
    two = run_ranks_successfully({**flags, "train_batch_size": 2, "output_dir": tmp_path / "two"})

    assert_close(two, one)


def test_two_processes_continue_a_lora_of_all_layers_of_the_text_encoders(script, flags, tmp_path):
    """sd-scripts also adapts the last layer of the first encoder, which is not used: it would get no gradient."""
    flags.update(TEXT)
    first = run(script, {**flags, "max_train_steps": 1})
    weights = trained(first)
    unused = {}
    for name, weight in weights.items():
        if name.startswith("text_encoder.") and ".layers.0." in name:
            unused[name.replace(".layers.0.", ".layers.1.")] = weight.clone()
    save_file({**weights, **unused}, first / LORA_WEIGHTS, read_metadata(first / LORA_WEIGHTS))

    flags.update(train_batch_size=2, init_lora=first, output_dir=tmp_path / "second")
    second = trained(run_ranks_successfully(flags))

    assert len(unused) == 8
    assert second.keys() == weights.keys() | unused.keys()
    for name, weight in unused.items():
        assert torch.equal(second[name], weight), name
