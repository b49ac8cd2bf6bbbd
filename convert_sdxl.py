#!/usr/bin/env python
# Copyright 2026 The MaPO SDXL contributors. All rights reserved.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
#
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.9.1",
#     "diffusers>=0.40",
#     "transformers>=5.24",
#     "peft>=0.18",
# ]
# ///
"""
Convert SDXL models: a single-file checkpoint to a diffusers folder, or a fully fine-tuned UNet to a LoRA.

Convert a checkpoint for ComfyUI or A1111 to a folder that diffusers and the other scripts load:

    python convert_sdxl.py single_file model.safetensors model

Extract a LoRA from a fully fine-tuned UNet:

    python convert_sdxl.py extract_lora stabilityai/stable-diffusion-xl-base-1.0 mapo-full --rank 64 mapo-full-lora
"""

import argparse
import contextlib
import functools
import importlib.util
import math
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from diffusers.utils import check_min_version
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


check_min_version("0.40.0")

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "pytorch_lora_weights_kohya.safetensors"


# Arguments -----------------------------------------------------------------------------------------------------------
def bounded(kind, low, high, wanted):
    """A type for argparse: a number from `low` to `high`; `wanted` describes it in messages."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from error
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
        return value

    return parse


COUNT = bounded(int, 1, sys.maxsize, "a positive whole number")
PATH = os.path.expanduser  # leaves hub ids as they are


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    add = commands.add_parser("single_file", help="Convert a single file to a diffusers folder.").add_argument
    add("file", type=PATH, help="SDXL checkpoint, a .safetensors file.")
    add("folder", type=PATH, help="New folder for the model.")
    add("--vae", type=PATH, help="VAE to use instead of the one in the file: hub id or folder.")
    add("--prediction_type", choices=["epsilon", "v_prediction"], help="Default: what the file says.")
    add(
        "--zero_terminal_snr",
        action=argparse.BooleanOptionalAction,
        help="Whether the model was trained with zero terminal SNR. Default: what the file says.",
    )
    add("--config", type=PATH, help=f"Local SDXL folder to take configs and tokenizers from, instead of {SDXL}.")

    add = commands.add_parser("extract_lora", help="Extract a LoRA from a fully fine-tuned UNet.").add_argument
    add("base", type=PATH, help="SDXL base model that the UNet was trained from: hub id or folder.")
    add("unet", type=PATH, help="Fine-tuned UNet: hub id or folder, e.g. the output_dir of a run.")
    add("folder", type=PATH, help="New folder for the LoRA.")
    add("--rank", type=COUNT, default=64, help="Rank of the LoRA. Default: %(default)s.")

    args = parser.parse_args(input_args)
    if args.command == "extract_lora" and importlib.util.find_spec("peft") is None:
        parser.error("extract_lora requires peft: pip install peft")
    return args


# Errors and files ----------------------------------------------------------------------------------------------------
class ConversionError(Exception):
    """An error that one sentence explains; printed without a traceback."""


def describe(error):
    """An error's type and text in one line. The type of a ValueError says nothing, and is left out."""
    text = " ".join(str(error).split())
    if type(error) is ValueError and text:
        return text
    return f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def explain(message):
    """Raise any error of the body as a ConversionError that begins with `message`."""
    try:
        yield
    except ConversionError:
        raise
    except Exception as error:
        raise ConversionError(f"{message}: {describe(error)}") from error


def write_atomically(path, save):
    """Let `save` write a file or folder that appears under its name only when it is complete."""
    with explain(f"{path} could not be written"):
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as temporary_folder:
            save(Path(temporary_folder, path.name))
            os.replace(Path(temporary_folder, path.name), path)


# Single files --------------------------------------------------------------------------------------------------------
# Tensors that every SDXL base model has. Other models lack the first one; SDXL's refiner lacks the second one.
SDXL_TENSORS = ["model.diffusion_model.label_emb.0.0.bias", "conditioner.embedders.1.model.ln_final.bias"]
TEXT_ENCODER = "conditioner.embedders.0.transformer.text_model."
TEXT_ENCODER_2 = "conditioner.embedders.1.model."


def read_checkpoint(path):
    """The tensors of a single file, {name: tensor}, and its metadata."""
    with explain(f"{path} cannot be read as a safetensors file"):
        with safe_open(path, "pt") as file:
            checkpoint = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata() or {}

    for name in SDXL_TENSORS:
        if name not in checkpoint:
            raise ConversionError(f"{path} is not an SDXL base model: it has no tensor {name}.")
    if "edm_mean" in checkpoint or "edm_vpred.sigma_max" in checkpoint:
        raise ConversionError(f"{path} is an EDM model, which is not supported.")
    return checkpoint, metadata


def load_empty_pipeline(config):
    """SDXL with its tokenizers and scheduler. Its models have shapes, but no weights yet."""
    message = (
        f"SDXL's configs and tokenizers are needed once, but cannot be loaded from {config or SDXL}; "
        "--config takes a local SDXL folder"
    )
    with explain(message):
        folder = config or snapshot_download(SDXL, allow_patterns=["*.json", "*.txt"])
        unet_config = UNet2DConditionModel.load_config(folder, subfolder="unet")
        vae_config = AutoencoderKL.load_config(folder, subfolder="vae")
        text_config = CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder")
        text_config_2 = CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder_2")
        tokenizers = load_tokenizers(folder)
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(unet_config)
            vae = AutoencoderKL.from_config(vae_config)
            text_encoder = CLIPTextModel(text_config)
            text_encoder_2 = CLIPTextModelWithProjection(text_config_2)
        return StableDiffusionXLPipeline(
            unet=unet,
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            scheduler=EulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler"),
            **tokenizers,
        )


def load_tokenizers(source):
    """The tokenizers of an SDXL pipeline, checked against its text encoders."""
    tokenizers = {}
    for suffix in ("", "_2"):
        name = f"tokenizer{suffix}"
        tokenizers[name] = CLIPTokenizer.from_pretrained(source, subfolder=name)
        expected = CLIPTextConfig.from_pretrained(source, subfolder=f"text_encoder{suffix}").vocab_size
        # Without its vocabulary file, transformers silently builds an empty tokenizer.
        if len(tokenizers[name]) != expected:
            raise ValueError(
                f"its {name} has {len(tokenizers[name])} tokens, but its text_encoder{suffix} has embeddings for "
                f"{expected}"
            )
    return tokenizers


def fill(model, weights, part):
    """Give a model its weights, in the dtypes that they have in the file."""
    for name, parameter in model.state_dict().items():
        if name not in weights:
            raise ValueError(f"{part}.{name} is missing")
        shape = weights[name].shape
        if shape != parameter.shape:
            raise ValueError(f"{part}.{name} has the shape {list(shape)}, not {list(parameter.shape)}")
    model.load_state_dict(weights, strict=False, assign=True)


def load_complete(model_class, source, **options):
    """`from_pretrained`, but missing weights are an error: libraries would initialize them randomly."""
    model, info = model_class.from_pretrained(source, use_safetensors=True, output_loading_info=True, **options)
    missing = info["missing_keys"]
    if missing:
        raise ValueError(f"it lacks {len(missing)} of its weights, e.g. {min(missing)}")
    return model


def load_vae(name, scaling_factor):
    """The VAE of --vae, from a pipeline's folder or from one of its own."""
    with explain(f"--vae {name} cannot be loaded"):
        subfolder = "vae"
        try:
            AutoencoderKL.load_config(name, subfolder=subfolder)
        except OSError:
            subfolder = None
        vae = load_complete(AutoencoderKL, name, subfolder=subfolder)

    # Nothing else tells a VAE of SDXL from one of SD 1.5.
    if vae.config.scaling_factor != scaling_factor:
        raise ConversionError(
            f"--vae {name} is not a VAE of SDXL: "
            f"its scaling_factor is {vae.config.scaling_factor}, not {scaling_factor}."
        )
    return vae


def fill_pipeline(pipeline, checkpoint, vae):
    """Give the models of a pipeline the weights of a single file. `vae` names another VAE, or is None."""
    unet_weights = convert_ldm_unet_checkpoint(checkpoint, pipeline.unet.config)
    fill(pipeline.unet, unet_weights, "unet")

    if vae is not None:
        pipeline.vae = load_vae(vae, pipeline.vae.config.scaling_factor)
    else:
        vae_weights = convert_ldm_vae_checkpoint(checkpoint, pipeline.vae.config)
        fill(pipeline.vae, vae_weights, "vae")

    text_weights = {}
    for name, tensor in checkpoint.items():
        if name.startswith(TEXT_ENCODER):
            text_weights[name.removeprefix(TEXT_ENCODER)] = tensor
    fill(pipeline.text_encoder, text_weights, "text_encoder")

    text_weights_2 = convert_open_clip_checkpoint(pipeline.text_encoder_2, checkpoint, TEXT_ENCODER_2)
    fill(pipeline.text_encoder_2, text_weights_2, "text_encoder_2")


def detect_prediction_type(checkpoint, metadata):
    """What the UNet predicts, by the marker that ComfyUI looks for or by the metadata that sd-scripts write."""
    if "v_pred" in checkpoint:
        return "v_prediction"
    if metadata.get("modelspec.prediction_type") in ("v", "v_prediction"):
        return "v_prediction"
    return "epsilon"


def load_single_file(args):
    """The pipeline of a single file."""
    checkpoint, metadata = read_checkpoint(args.file)
    has_vae = any(name.startswith("first_stage_model.") for name in checkpoint)
    if args.vae is None and not has_vae:
        raise ConversionError(f"{args.file} contains no VAE: name one with --vae, e.g. madebyollin/sdxl-vae-fp16-fix.")

    pipeline = load_empty_pipeline(args.config)
    with explain(f"{args.file} is not a complete SDXL base model"):
        fill_pipeline(pipeline, checkpoint, args.vae)

    # Flags override what the file says. Only v-prediction can use zero terminal SNR.
    prediction_type = args.prediction_type
    if prediction_type is None:
        prediction_type = detect_prediction_type(checkpoint, metadata)
    zero_terminal_snr = args.zero_terminal_snr
    if zero_terminal_snr is None:
        zero_terminal_snr = "ztsnr" in checkpoint and prediction_type == "v_prediction"
    if zero_terminal_snr and prediction_type == "epsilon":
        raise ConversionError("--zero_terminal_snr requires --prediction_type v_prediction.")

    scheduler = pipeline.scheduler
    scheduler.register_to_config(
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_terminal_snr,
    )
    if zero_terminal_snr:
        scheduler.register_to_config(timestep_spacing="trailing")
    print(f"{args.file}: prediction_type is {prediction_type}, zero_terminal_snr is {zero_terminal_snr}")
    return pipeline


# LoRA extraction -----------------------------------------------------------------------------------------------------
# A LoRA adapts these layers of the transformers and resnets. Norms, biases and all other layers are left out.
TRANSFORMER = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
RESNET = ["conv1", "conv2", "conv_shortcut", "time_emb_proj"]
LORA_LAYERS = TRANSFORMER + RESNET

# A UNet may be sharded. The files of variants, like fp16, have other names.
UNET_FILE = "diffusion_pytorch_model.safetensors"
UNET_SHARDS = "diffusion_pytorch_model-?????-of-?????.safetensors"


def open_unet(name):
    """The files that contain the tensors of a UNet, {tensor name: open file}."""
    files = {}
    with explain(f"{name} cannot be loaded"):
        folder = Path(name)
        if not folder.is_dir():
            patterns = [UNET_FILE, UNET_SHARDS, f"unet/{UNET_FILE}", f"unet/{UNET_SHARDS}"]
            folder = Path(snapshot_download(name, allow_patterns=patterns))
        if (folder / "unet").is_dir():
            folder = folder / "unet"

        paths = [folder / UNET_FILE]
        if not paths[0].exists():
            paths = list(folder.glob(UNET_SHARDS))
        for path in paths:
            file = safe_open(path, "pt")
            for tensor_name in file.keys():
                files[tensor_name] = file
    if not files:
        raise ConversionError(f"{name} has no UNet: {folder} contains no {UNET_FILE}.")
    return files


def shapes_of(files):
    return {name: file.get_slice(name).get_shape() for name, file in files.items()}


def factorize(change, rank):
    """Best approximation of a change with this rank (SVD): down, up, and the squared norm of their product."""
    u, s, vh = torch.linalg.svd(change.flatten(1), full_matrices=False)
    kept = s[:rank]
    up = u[:, :rank] * kept.sqrt()
    down = kept.sqrt()[:, None] * vh[:rank]

    # A layer may be narrower than the rank.
    up = F.pad(up, (0, rank - up.shape[1]))
    down = F.pad(down, (0, 0, 0, rank - down.shape[0]))

    if change.ndim == 4:
        up = up[:, :, None, None]
        down = down.unflatten(1, change.shape[1:])
    return down, up, kept.square().sum().item()


def extract_lora(base_name, unet_name, rank):
    """The LoRA that is closest to the change of the UNet, {name: weight}."""
    base = open_unet(base_name)
    trained = open_unet(unet_name)
    if shapes_of(base) != shapes_of(trained):
        raise ConversionError(
            f"{unet_name} was not trained from {base_name}: the names or shapes of their weights differ."
        )

    device = "cuda" if torch.cuda.is_available() else "cpu"
    suffixes = tuple(f".{layer}" for layer in LORA_LAYERS)
    lora = {}
    squared_change = 0.0
    squared_kept = 0.0
    for name in tqdm(trained, desc="Extracting a LoRA"):
        # Rounding to the dtype of the trained UNet is not a change.
        after = trained[name].get_tensor(name)
        before = base[name].get_tensor(name).to(after.dtype)
        change = after.to(device, torch.float32) - before.to(device, torch.float32)
        squared_change += change.square().sum().item()
        if not math.isfinite(squared_change):
            raise ConversionError(f"{unet_name} or {base_name} contains NaN or inf in {name}.")

        layer = name.removesuffix(".weight")
        if layer.endswith(suffixes):
            down, up, kept = factorize(change, rank)
            lora[f"{layer}.lora_A.weight"] = down.cpu().contiguous()
            lora[f"{layer}.lora_B.weight"] = up.cpu().contiguous()
            squared_kept += kept

    if squared_change == 0:
        raise ConversionError(f"{unet_name} has the weights of {base_name}: nothing was changed.")
    share = squared_kept / squared_change
    print(f"The LoRA of rank {rank} keeps {share:.1%} of the squared change of the UNet's weights.")
    return lora


def write_kohya_lora(folder):
    """Save the LoRA of a folder also in Kohya format (ComfyUI, A1111). Its alpha is its rank."""
    weights = convert_state_dict_to_kohya(load_file(folder / LORA_FILE))
    save_file(weights, folder / KOHYA_FILE)


def save_lora(lora, rank, folder):
    from peft import LoraConfig

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_LAYERS)
    StableDiffusionXLPipeline.save_lora_weights(
        folder,
        unet_lora_layers=lora,
        unet_lora_adapter_metadata=config.to_dict(),
    )
    write_kohya_lora(folder)


def main(args):
    folder = Path(args.folder)
    if folder.exists():
        raise ConversionError(f"{folder} exists already: choose a new folder.")
    with explain(f"{folder} cannot be written"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder.parent).close()

    if args.command == "single_file":
        pipeline = load_single_file(args)
        write_atomically(folder, pipeline.save_pretrained)
    else:
        lora = extract_lora(args.base, args.unet, args.rank)
        write_atomically(folder, functools.partial(save_lora, lora, args.rank))


if __name__ == "__main__":
    try:
        main(parse_args())
    except ConversionError as error:
        sys.exit(f"error: {error}")
