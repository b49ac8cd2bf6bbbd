"""Small LoRAs in the formats that people share, merged into a pipeline by the formula, and files to refuse."""

import json

import torch
from safetensors.torch import save_file


TRANSFORMER_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
UNET_LAYERS = (*TRANSFORMER_LAYERS, "conv1", "conv2", "conv_shortcut", "time_emb_proj")
TEXT_ENCODER_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
LAYERS = (*UNET_LAYERS, *TEXT_ENCODER_LAYERS)
KOHYA_PARTS = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


def adapted_modules(pipeline):
    """{(part, name in a file): module} for all layers that a LoRA may change."""
    modules = {}
    for part in KOHYA_PARTS:
        for name, module in getattr(pipeline, part).named_modules():
            if name.endswith(LAYERS):
                if part != "unet" and not name.startswith("text_model."):
                    name = f"text_model.{name}"
                modules[part, name] = module
    return modules


def random_lora(pipeline, parts=tuple(KOHYA_PARTS)):
    """{(part, name): (down, up, alpha)}. Ranks and alphas differ between layers."""
    generator = torch.Generator().manual_seed(0)
    lora = {}
    for number, ((part, name), module) in enumerate(adapted_modules(pipeline).items()):
        rank = 1 + number % 3
        weight = module.weight
        down = torch.randn((rank, *weight.shape[1:]), generator=generator)
        up = torch.randn((len(weight), rank, *[1] * (weight.ndim - 2)), generator=generator)
        if part in parts:
            lora[part, name] = (down / down[0].numel() ** 0.5, up * 0.3, 0.5 + number % 5)
    return lora


@torch.no_grad()
def merge(pipeline, lora):
    """Replace a pipeline's weights W with W + alpha / rank * up @ down."""
    modules = adapted_modules(pipeline)
    for layer, (down, up, alpha) in lora.items():
        change = up.flatten(1) @ down.flatten(1) * alpha / len(down)
        modules[layer].weight += change.reshape(modules[layer].weight.shape)
    return pipeline


def kohya_weights(lora):
    weights = {}
    for (part, name), (down, up, alpha) in lora.items():
        layer = KOHYA_PARTS[part] + name.replace(".", "_")
        weights[f"{layer}.lora_down.weight"] = down
        weights[f"{layer}.lora_up.weight"] = up
        weights[f"{layer}.alpha"] = torch.tensor(float(alpha))
    return weights


def peft_weights(lora):
    weights = {}
    for (part, name), (down, up, _) in lora.items():
        weights[f"{part}.{name}.lora_A.weight"] = down
        weights[f"{part}.{name}.lora_B.weight"] = up
    return weights


def peft_metadata(lora):
    """The alphas of all layers: the default, and those that differ from it as patterns."""
    config = {}
    for (part, name), (_, _, alpha) in lora.items():
        config.setdefault(f"{part}.lora_alpha", 0.5)
        if alpha != 0.5:
            config.setdefault(f"{part}.alpha_pattern", {})[name] = alpha
    return {"lora_adapter_metadata": json.dumps(config)}


def save_kohya(lora, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(kohya_weights(lora), file)


def save_peft(lora, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(peft_weights(lora), file, peft_metadata(lora))


def renamed(weights, old, new):
    return {name.replace(old, new): weight for name, weight in weights.items()}


def add_magnitudes(weights, up, ending):
    """Turn a LoRA into a DoRA."""
    magnitudes = {}
    for name, weight in weights.items():
        if name.endswith(up):
            magnitudes[name.replace(up, ending)] = torch.ones(len(weight), 1)
    return {**weights, **magnitudes}


# Files that must be refused, and a part of the error message.
REFUSED = {
    "kohya dora": "DoRA, which is not supported",
    "peft dora": "DoRA, which is not supported",
    "dora by its metadata": "use_dora is not supported",
    "rslora": "use_rslora is not supported",
    "wrong names": " layers are not in the model, e.g. unet.down_blocks.1.attentions.0.transformer_blocks.7.",
    "compiled": " layers are not in the model, e.g. unet._orig_mod.",
    "layers too many": " layers are not in the model, e.g. unet.xx.",
    "two formats": " of its weights use a different naming format from the rest",
    "half a layer": ".lora_down.weight is not one of the two weights of a LoRA's layer",
    "an alpha too many": "and 1 other weights",
    "loha": ".hada_w1_a is not one of the two weights of a LoRA's layer",
    "unet": "conv_in.bias is not one of the two weights of a LoRA's layer",
    "nothing": "it has 0 layers of two weights",
    "another text width": "attn2.to_k of (32, 96) does not fit LoRA weights of (32, ",
}


def save_refused(kind, pipeline, file):
    """Write one of the files of REFUSED."""
    lora = random_lora(pipeline)
    kohya = kohya_weights(lora)
    peft = peft_weights(lora)
    layer = min(kohya).partition(".")[0]
    weights = {
        "kohya dora": add_magnitudes(kohya, "lora_up.weight", "dora_scale"),
        "peft dora": add_magnitudes(peft, "lora_B.weight", "lora_magnitude_vector"),
        "wrong names": renamed(peft, "transformer_blocks.0", "transformer_blocks.7"),
        "compiled": renamed(peft, "unet.", "unet._orig_mod."),
        "layers too many": {**kohya, **renamed(kohya, "lora_unet_", "lora_unet_xx_")},
        "two formats": {**kohya, **renamed(kohya, "lora_unet_mid_block_attentions_0", "lora_unet_middle_block_1")},
        "half a layer": {name: weight for name, weight in kohya.items() if name != f"{layer}.lora_up.weight"},
        "an alpha too many": {**kohya, "lora_unet_x.alpha": torch.tensor(1.0)},
        "loha": renamed(kohya, "lora_down.weight", "hada_w1_a"),
        "unet": {"conv_in.bias": torch.zeros(4)},
        "nothing": {},
        "another text width": {name: widened(name, weight) for name, weight in peft.items()},
    }.get(kind, peft)
    metadata = {}
    if kind == "dora by its metadata":
        metadata = {"unet.use_dora": True}
    elif kind == "rslora":
        metadata = {"unet.use_rslora": True}

    file.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.clone() for name, weight in weights.items()}
    save_file(weights, file, {"lora_adapter_metadata": json.dumps(metadata)})


def widened(name, weight):
    """The weight for a model with another width of the text embeddings, if it depends on that."""
    if name.endswith(("attn2.to_k.lora_A.weight", "attn2.to_v.lora_A.weight")):
        return torch.zeros(len(weight), 77)
    return weight
