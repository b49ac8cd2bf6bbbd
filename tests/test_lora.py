"""LoRA: its layers and alpha, the files that others load, second rounds, and text encoders."""

import argparse
import json

import pytest
import torch
from conftest import SCRIPT, command_line, load_script, run
from cpu_cluster import run_ranks
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_world import build_unet
from test_validation_and_results import cells, greatest_difference


DIFFUSERS, KOHYA = "pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"
# What each choice adapts, by the names of SDXL's modules; counts of real SDXL's layers.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TRANSFORMER = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
ALL = (*TRANSFORMER, "conv1", "conv2", "conv_shortcut", "time_emb_proj")
COUNTS = {"attention": (ATTENTION, 560), "transformer": (TRANSFORMER, 722), "all": (ALL, 784)}
TEXT = {"train_text_encoder": True, "text_encoder_lr": 1e-2}


def adapted(names, layers):
    return {name for name in names if name.endswith(tuple(f".{layer}" for layer in layers))}


def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "pt"}
    return pipeline("a red circle", **size, generator=torch.Generator().manual_seed(0)).images


@pytest.mark.parametrize("choice", COUNTS)
def test_choices_are_those_layers_of_sdxl(script, choice):
    from benchmarks.estimate import SDXL_UNET

    with torch.device("meta"):
        names = [name for name, _ in UNet2DConditionModel(**SDXL_UNET).named_modules()]
    layers, count = COUNTS[choice]
    assert adapted(names, script.LORA_LAYERS[choice]) == adapted(names, layers)
    assert len(adapted(names, layers)) == count


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(["attention"], ATTENTION), (["attention", "conv_in", "conv1"], (*ATTENTION, "conv_in", "conv1"))],
    ids=["attention", "names, too"],
)
def test_lora_layers_and_alpha_reach_the_file(script, flags, layers, expected):
    """A pipeline applies alpha / rank by the file's metadata; the kohya file says it for each layer."""
    output = run(script, {**flags, "lora_layers": layers, "lora_alpha": 8, "max_train_steps": 1})
    unet = UNet2DConditionModel.from_pretrained(flags["pretrained_model_name_or_path"], subfolder="unet")
    names = {name.removeprefix(".") for name in adapted([f".{name}" for name, _ in unet.named_modules()], expected)}
    assert names == {name.split(".lora_")[0].removeprefix("unet.") for name in load_file(output / DIFFUSERS)}
    with safe_open(output / DIFFUSERS, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["lora_adapter_metadata"])["unet.lora_alpha"] == 8
    assert str(flags["pretrained_model_name_or_path"]) not in str(metadata)
    alphas = {n: v for n, v in load_file(output / KOHYA).items() if n.endswith(".alpha")}
    assert {name.removesuffix(".alpha") for name in alphas} == {f"lora_unet_{n.replace('.', '_')}" for n in names}
    assert {value.item() for value in alphas.values()} == {8.0}


def comfyui_table():
    """Names under which ComfyUI looks for SDXL's LoRA layers, from the plan of SDXL's blocks alone."""
    depths = {"down_blocks_1": (2, 2), "down_blocks_2": (10, 2), "mid_block": (10, 1), "up_blocks_0": (10, 3)}
    depths["up_blocks_1"] = (2, 3)
    resnets = {"down_blocks_0": 2, "down_blocks_1": 2, "down_blocks_2": 2, "mid_block": 2}
    resnets |= {"up_blocks_0": 3, "up_blocks_1": 3, "up_blocks_2": 3}
    attention = [f"attn{n}_{name}" for n in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out_0")]
    names = []
    for block, (depth, number) in depths.items():
        for n in range(number):
            inner = [f"transformer_blocks_{i}_{name}" for i in range(depth) for name in attention]
            inner += [f"transformer_blocks_{i}_ff_net_{name}" for i in range(depth) for name in ("0_proj", "2")]
            names += [f"{block}_attentions_{n}_{name}" for name in (*inner, "proj_in", "proj_out")]
    for block, number in resnets.items():
        for n in range(number):
            # Where the number of channels changes: it does with every skip connection.
            shortcut = block.startswith("up") or (n == 0 and block in ("down_blocks_1", "down_blocks_2"))
            layers = ("conv1", "conv2", "time_emb_proj", *["conv_shortcut"] * shortcut)
            names += [f"{block}_resnets_{n}_{name}" for name in layers]
    names = [f"lora_unet_{name}" for name in names]
    for encoder, layers in (("te1", 11), ("te2", 32)):  # the last one of the first encoder is not used
        text = [f"layers_{i}_self_attn_{name}_proj" for i in range(layers) for name in ("q", "k", "v", "out")]
        names += [f"lora_{encoder}_text_model_encoder_{name}" for name in text]
    return names


def test_comfyui_finds_every_layer_of_a_kohya_file(script, tmp_path):
    """The names of SDXL at its real size, of modules that hold no weights."""
    from benchmarks.estimate import SDXL_UNET

    with torch.device("meta"):
        unet = adapted([name for name, _ in UNet2DConditionModel(**SDXL_UNET).named_modules()], ALL)
    text = [("text_encoder", 11), ("text_encoder_2", 32)]
    layers = [f"{name}.text_model.encoder.layers.{i}.self_attn" for name, number in text for i in range(number)]
    layers = [f"{layer}.{name}" for layer in layers for name in script.TEXT_LORA_LAYERS]
    layers += [f"unet.{name}" for name in unet]
    weights = {f"{name}.lora_{half}.weight": torch.zeros(4, 4) for name in layers for half in "AB"}
    save_file(weights, tmp_path / DIFFUSERS, {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 2})})
    script.write_kohya_lora(tmp_path)
    table = comfyui_table()
    assert len(table) == len(set(table)) == 784 + 4 * (11 + 32)
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert set(load_file(tmp_path / KOHYA)) == {f"{name}.{part}" for name in table for part in parts}


def test_both_files_give_the_same_image(script, flags):
    output, base = run(script, {**flags, "lora_alpha": 8}), flags["pretrained_model_name_or_path"]
    images = [draw(StableDiffusionXLPipeline.from_pretrained(base))]
    for weight_name in (DIFFUSERS, KOHYA):
        pipeline = StableDiffusionXLPipeline.from_pretrained(base)
        pipeline.load_lora_weights(output, weight_name=weight_name)
        images.append(draw(pipeline))
    assert torch.equal(images[1], images[2]) and not torch.equal(images[0], images[1])


def test_kohya_file_can_be_left_out(script, flags):
    assert not (run(script, {**flags, "no_kohya_format": True, "max_train_steps": 1}) / KOHYA).exists()


@pytest.mark.parametrize("file", ["", KOHYA], ids=["folder", "kohya"])
def test_second_round_starts_from_the_first(script, flags, tmp_path, file):
    """With a learning rate that changes nothing, the second round ends with the weights of the first."""
    first = run(script, {**flags, **TEXT, "lora_alpha": 8})
    changes = {**TEXT, "lora_alpha": 8, "init_lora": first / file, "output_dir": tmp_path / "second"}
    second = run(script, {**flags, **changes, "learning_rate": 1e-30, "text_encoder_lr": 1e-30})
    weights, expected = load_file(second / DIFFUSERS), load_file(first / DIFFUSERS)
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"rank": 8}, "--rank is 8"), ({"lora_alpha": 2}, "--lora_alpha 2"), ({}, "add --train_text_encoder")],
)
def test_lora_that_does_not_fit_the_flags_is_refused(script, flags, tmp_path, changes, named):
    first = run(script, {**flags, **TEXT, "max_train_steps": 1})
    with pytest.raises(script.TrainingError, match=named):
        run(script, {**flags, "init_lora": first, "output_dir": tmp_path / "second", **changes})


@pytest.mark.parametrize("flag", ["init_lora", "pretrained_unet_name_or_path"])
def test_second_round_is_shown_beside_the_first(script, flags, tmp_path, flag):
    """The left images of its grid are the right ones of the first round's, and no longer those of the base."""
    drawn = {"run_validation": True, "num_inference_steps": 2, "validation_prompts": ["a red circle", "a blue star"]}
    flags.update(drawn, max_train_steps=2, rank=4 if flag == "init_lora" else None, learning_rate=1e-2)
    first = run(script, flags)
    second = run(script, {**flags, flag: first, "output_dir": tmp_path / "second"})
    base, aligned = (cells(first / "validation" / "step-000002.png")[side::2] for side in (0, 1))
    start = cells(second / "validation" / "step-000002.png")[::2]
    assert greatest_difference(start, aligned) <= 1 and greatest_difference(start, base) > 3


def test_evaluation_draws_with_the_lora_of_text_encoders(script, flags, spied):
    """Merged into them, it gives what the trained modules give; alpha is not the rank."""
    out = run(script, {**flags, **TEXT, "lora_alpha": 8, "learning_rate": 1e-2})
    evaluate = load_script(SCRIPT.with_name("evaluate_diffusion_mapo_sdxl.py"))
    args = argparse.Namespace(pretrained_model_name_or_path=flags["pretrained_model_name_or_path"], variant=None)
    pipelines = [spied[0], evaluate.load_with_lora(args, str(out)), evaluate.load_base(args)]
    for result in (draw, lambda pipeline: pipeline.encode_prompt("a red circle")[0]):
        with torch.no_grad():
            trained, merged, base = map(result, pipelines)
        assert (trained - merged).abs().max() < 1e-4 < 1e-2 < (trained - base).abs().max()


def test_unet_of_another_kind_is_refused(script, flags, tmp_path):
    """Before any weight is loaded: there are none."""
    unet = build_unet(cross_attention_dim=32, pooled_dim=64)
    unet.save_config(tmp_path / "other" / "unet")
    with pytest.raises(script.TrainingError, match="--pretrained_unet_name_or_path .*other is not an SDXL UNet"):
        run(script, {**flags, "pretrained_unet_name_or_path": tmp_path / "other"})
    with pytest.raises(script.TrainingError, match="--pretrained_unet_name_or_path .*none cannot be loaded"):
        run(script, {**flags, "pretrained_unet_name_or_path": tmp_path / "none"})


@pytest.mark.parametrize("key", ["dora_scale", "lora_magnitude_vector"])
def test_dora_is_refused(script, flags, tmp_path, key):
    """diffusers would leave the magnitudes out, which makes it another model."""
    file = run(script, {**flags, "max_train_steps": 1}) / KOHYA
    weights = load_file(file)
    name = next(name for name in weights if name.endswith(".lora_down.weight"))
    weights[name.replace("lora_down.weight", key)] = torch.ones(4)
    save_file(weights, tmp_path / "dora.safetensors")

    with pytest.raises(script.TrainingError, match="--init_lora .*dora.safetensors cannot be loaded.*DoRA"):
        run(script, {**flags, "init_lora": tmp_path / "dora.safetensors", "output_dir": tmp_path / "second"})


def test_lora_to_continue_may_be_the_only_file_of_a_folder(script, flags, tmp_path):
    first = run(script, {**flags, "max_train_steps": 1})
    (tmp_path / "style").mkdir()
    (tmp_path / "style" / "mystyle.safetensors").write_bytes((first / KOHYA).read_bytes())

    second = run(
        script, {**flags, "init_lora": tmp_path / "style", "learning_rate": 1e-30, "output_dir": tmp_path / "2"}
    )

    weights, expected = load_file(second / DIFFUSERS), load_file(first / DIFFUSERS)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_unknown_layer_is_refused(script, flags):
    with pytest.raises(script.TrainingError, match="--lora_layers to_nothing is neither"):
        run(script, {**flags, "lora_layers": ["to_k", "to_nothing"]})


def test_text_encoders_are_trained_and_resumed_exactly(script, flags, tmp_path):
    whole = run(script, {**flags, **TEXT, "checkpointing_steps": 2})
    changes = {"resume_from_checkpoint": whole / "checkpoint-2", "output_dir": tmp_path / "resumed"}
    resumed = run(script, {**flags, **TEXT, **changes})
    weights, expected = load_file(resumed / DIFFUSERS), load_file(whole / DIFFUSERS)
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)
    for part in ("text_encoder.", "text_encoder_2."):
        ups = [weight for name, weight in expected.items() if name.startswith(part) and "lora_B" in name]
        assert ups and all(up.any() for up in ups)
    names = load_file(whole / KOHYA)
    assert any(name.startswith("lora_te1_text_model_encoder_layers_0_self_attn_q_proj.") for name in names)
    assert any(name.startswith("lora_te2_text_model_encoder_layers_1_self_attn_q_proj.") for name in names)


def test_text_encoders_are_trained_alike_on_two_processes(script, flags, tmp_path):
    """Each rank's gradients of the text encoders are summed, as those of the UNet are."""
    one = run(script, {**flags, **TEXT, "max_train_steps": 2})
    changes = {"train_batch_size": 2, "output_dir": tmp_path / "two", "max_train_steps": 2}
    statuses, outputs = run_ranks([SCRIPT, *command_line({**flags, **TEXT, **changes})])
    assert statuses == [0, 0], "\n".join(outputs)
    weights, expected = load_file(tmp_path / "two" / DIFFUSERS), load_file(one / DIFFUSERS)
    assert weights.keys() == expected.keys()
    assert max((weights[name] - expected[name]).abs().max().item() for name in weights) < 1e-5


def test_two_processes_continue_a_lora_of_all_layers_of_the_text_encoders(script, flags, tmp_path):
    """sd-scripts also adapts the last layer of the first one, which is not used: it would get no gradient."""
    first = run(script, {**flags, **TEXT, "max_train_steps": 1})
    weights = load_file(first / DIFFUSERS)
    for name, weight in list(weights.items()):
        if name.startswith("text_encoder.") and ".layers.0." in name:
            weights[name.replace(".layers.0.", ".layers.1.")] = weight.clone()
    with safe_open(first / DIFFUSERS, "pt") as file:
        save_file(weights, first / DIFFUSERS, file.metadata())
    changes = {"train_batch_size": 2, "init_lora": first, "output_dir": tmp_path / "second"}

    statuses, outputs = run_ranks([SCRIPT, *command_line({**flags, **TEXT, **changes})])

    assert statuses == [0, 0], "\n".join(outputs)
    continued = load_file(tmp_path / "second" / DIFFUSERS)
    unused = [name for name in weights if name.startswith("text_encoder.") and ".layers.1." in name]
    assert continued.keys() == weights.keys() and len(unused) == 8
    assert all(torch.equal(continued[name], weights[name]) for name in unused)


def test_new_unet_starts_from_the_one_named(script, flags, tmp_path):
    flags["rank"] = None
    first = run(script, flags)
    changes = {"pretrained_unet_name_or_path": first, "learning_rate": 1e-30, "output_dir": tmp_path / "second"}
    changes["adam_weight_decay"] = 0
    second = run(script, {**flags, **changes})
    weights, expected = load_file(second / UNET), load_file(first / UNET)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
