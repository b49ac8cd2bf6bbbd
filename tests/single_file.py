"""Save a pipeline as one `.safetensors` file with the original tensor names, like those for ComfyUI and A1111."""

import re

import torch
from safetensors.torch import save_file


# Diffusers' names of layers, and the original ones.
UNET = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
    "encoder.layers": "transformer.resblocks",
    "embeddings.token_embedding": "token_embedding",
    "final_layer_norm": "ln_final",
}


def unet_name(name, layers_per_block):
    """The original numbers its blocks through all levels. A downsampler is a block, an upsampler the end of one."""
    layer, _, parameter = name.rpartition(".")
    if layer in UNET:
        return f"{UNET[layer]}.{parameter}"

    found = re.match(r"(down|mid|up)_block(?:s\.(\d+))?\.(resnets|attentions|\w+samplers)\.(\d+)\.(.*)", name)
    side, level, kind, number, rest = found.groups()
    number = int(number)
    first_block = int(level or 0) * (layers_per_block + 1)

    if kind == "downsamplers":
        return f"input_blocks.{first_block + layers_per_block + 1}.0.op.{parameter}"
    if kind == "upsamplers":
        # It follows the attention. SDXL has no attention at its largest size, which is not upsampled.
        return f"output_blocks.{first_block + layers_per_block}.2.conv.{parameter}"

    if kind == "resnets":
        layer, _, parameter = rest.rpartition(".")
        rest = f"{RESNET[layer]}.{parameter}"
    if side == "mid":
        position = 2 * number if kind == "resnets" else 1
        return f"middle_block.{position}.{rest}"
    position = 0 if kind == "resnets" else 1
    if side == "down":
        return f"input_blocks.{first_block + number + 1}.{position}.{rest}"
    return f"output_blocks.{first_block + number}.{position}.{rest}"


def replace_parts(name, names):
    for part, original in names.items():
        name = re.sub(rf"(^|\.){re.escape(part)}(?=\.|$)", rf"\g<1>{original}", name)
    return name


def vae_name(name, levels):
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1")
    name = re.sub(r"down_blocks\.(\d)", r"down.\1", name)
    name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{levels - 1 - int(found[1])}", name)
    name = re.sub(r"\.resnets\.", ".block.", name)
    name = re.sub(r"\.(up|down)samplers\.0\.", r".\1sample.", name)
    return replace_parts(name, VAE)


def open_clip_tensors(text_encoder):
    """open_clip has one tensor for query, key and value, and a projection that is multiplied from the left."""
    state = {}
    for name, tensor in text_encoder.state_dict().items():
        state[name.removeprefix("text_model.")] = tensor

    tensors = {}
    for name, tensor in state.items():
        if ".q_proj." in name:
            parts = [state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            joined_name = name.replace("self_attn.q_proj.", "attn.in_proj_")
            tensors[replace_parts(joined_name, CLIP)] = torch.cat(parts)
        elif name == "text_projection.weight":
            tensors["text_projection"] = tensor.T
        elif name == "embeddings.position_embedding.weight":
            tensors["positional_embedding"] = tensor
        elif not re.search(r"\.[kv]_proj\.|position_ids", name):
            tensors[replace_parts(name, CLIP)] = tensor
    return tensors


def save_single_file(pipeline, path):
    """Write an SDXL pipeline as one file."""
    layers_per_block = pipeline.unet.config.layers_per_block
    levels = len(pipeline.vae.config.block_out_channels)
    tensors = {}
    for name, tensor in pipeline.unet.state_dict().items():
        tensors[f"model.diffusion_model.{unet_name(name, layers_per_block)}"] = tensor
    for name, tensor in pipeline.vae.state_dict().items():
        name = vae_name(name, levels)
        if "attn_1" in name and tensor.ndim == 2:
            tensor = tensor[..., None, None]  # a convolution in the original
        tensors[f"first_stage_model.{name}"] = tensor
    for name, tensor in pipeline.text_encoder.state_dict().items():
        name = name.removeprefix("text_model.")
        tensors[f"conditioner.embedders.0.transformer.text_model.{name}"] = tensor
    for name, tensor in open_clip_tensors(pipeline.text_encoder_2).items():
        tensors[f"conditioner.embedders.1.model.{name}"] = tensor
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
