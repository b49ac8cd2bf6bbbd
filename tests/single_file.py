"""SDXL in its first layout: what `.safetensors` files of one piece, such as those for ComfyUI, call their tensors."""

import re

import torch
from safetensors.torch import save_file


RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
RESNET |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
UNET = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
UNET |= {f"time_embedding.linear_{n}": f"time_embed.{2 * n - 2}" for n in (1, 2)}
UNET |= {f"add_embedding.linear_{n}": f"label_emb.0.{2 * n - 2}" for n in (1, 2)}
VAE = {"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_out.0": "proj_out"}
VAE |= {"to_q": "q", "to_k": "k", "to_v": "v"}
CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
CLIP |= {"self_attn.out_proj": "attn.out_proj", "encoder.layers": "transformer.resblocks"}
CLIP |= {"embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final"}


def unet_name(name, per_block):
    """Blocks are counted through all levels, with the change of size as one of its own or at the last one's end."""
    head, _, end = name.rpartition(".")
    if head in UNET:
        return f"{UNET[head]}.{end}"
    found = re.match(r"(down|mid|up)_block(?:s\.(\d+))?\.(resnets|attentions|\w+samplers)\.(\d+)\.(.*)", name)
    side, level, kind, number, rest = found.groups()
    start = int(level or 0) * (per_block + 1)
    if kind.endswith("samplers"):
        at = per_block + start + (side == "down")
        # Behind the attention in an up block. SDXL has none at its largest size, which is not enlarged.
        return f"input_blocks.{at}.0.op.{end}" if side == "down" else f"output_blocks.{at}.2.conv.{end}"
    layer, _, end = rest.rpartition(".")
    rest = f"{RESNET[layer]}.{end}" if kind == "resnets" else rest
    if side == "mid":
        return f"middle_block.{2 * int(number) if kind == 'resnets' else 1}.{rest}"
    place = f"input_blocks.{start + int(number) + 1}" if side == "down" else f"output_blocks.{start + int(number)}"
    return f"{place}.{int(kind == 'attentions')}.{rest}"


def replace_parts(name, names):
    for part, other in names.items():
        name = re.sub(rf"(^|\.){re.escape(part)}(?=\.|$)", rf"\g<1>{other}", name)
    return name


def vae_name(name, levels):
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1")
    name = re.sub(r"down_blocks\.(\d)", r"down.\1", name)
    name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{levels - 1 - int(found[1])}", name)
    name = re.sub(r"\.resnets\.", ".block.", name)
    name = re.sub(r"\.(up|down)samplers\.0\.", r".\1sample.", name)
    return replace_parts(name, VAE)


def clip_tensors(state):
    """open_clip's: one tensor for query, key and value, and a projection that is multiplied from the left."""
    state, tensors = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}, {}
    for name, tensor in state.items():
        if ".q_proj." in name:
            joined = torch.cat([state[name.replace("q_proj", other)] for other in ("q_proj", "k_proj", "v_proj")])
            name = name.replace("self_attn.q_proj.", "attn.in_proj_")
            tensors[replace_parts(name, CLIP)] = joined
        elif name == "text_projection.weight":
            tensors["text_projection"] = tensor.T.contiguous()
        elif name == "embeddings.position_embedding.weight":
            tensors["positional_embedding"] = tensor
        elif not re.search(r"\.[kv]_proj\.|position_ids", name):
            tensors[replace_parts(name, CLIP)] = tensor
    return tensors


def save_single_file(pipeline, path, marks=()):
    """Write a pipeline as one file; `marks` are the empty tensors by which files say what they predict."""
    per_block, levels = pipeline.unet.config.layers_per_block, len(pipeline.vae.config.block_out_channels)
    tensors = {mark: torch.zeros(0) for mark in marks}
    for name, tensor in pipeline.unet.state_dict().items():
        tensors[f"model.diffusion_model.{unet_name(name, per_block)}"] = tensor
    for name, tensor in pipeline.vae.state_dict().items():
        name = vae_name(name, levels)
        tensors[f"first_stage_model.{name}"] = (
            tensor[..., None, None] if "attn_1" in name and tensor.ndim == 2 else tensor
        )
    for name, tensor in pipeline.text_encoder.state_dict().items():
        tensors[f"conditioner.embedders.0.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    for name, tensor in clip_tensors(pipeline.text_encoder_2.state_dict()).items():
        tensors[f"conditioner.embedders.1.model.{name}"] = tensor
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
