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
#     "accelerate>=1.13",
#     "datasets>=5.1",
#     "peft>=0.18",
#     "bitsandbytes>=0.50",
#     "tensorboard>=2.21",
#     "wandb>=0.20",
# ]
# ///
"""
Fine-tune Stable Diffusion XL on preference pairs with MaPO, which needs no reference model (arXiv 2406.06424).

A LoRA, on one 24 GB GPU:

    accelerate launch train_diffusion_mapo_sdxl.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
        --dataset_name mapo-t2i/pick-style-cartoon --beta_mapo 64 --rank 16 --train_batch_size 1 \
        --gradient_accumulation_steps 16 --max_train_steps 1000 --gradient_checkpointing \
        --mixed_precision bf16 --num_validation_pairs 64 --run_validation --output_dir mapo-lora

The full UNet, as in the paper (4 GPUs x 4 pairs x 8 accumulation steps = 128 pairs per step):

    accelerate launch --config_file launch_configs/multi_gpu.yaml --num_processes 4 train_diffusion_mapo_sdxl.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
        --dataset_name mapo-t2i/pick-style-cartoon --beta_mapo 64 --learning_rate 1e-7 --lr_scheduler cosine \
        --train_batch_size 4 --gradient_accumulation_steps 8 --max_train_steps 2000 --gradient_checkpointing \
        --use_8bit_adam --mixed_precision bf16 --output_dir mapo-full
"""

# Sections:
#
#   Objective        the loss of a pair, as pure functions
#   SDXL             what is specific to the model: loading, encoding, denoising errors, sampling
#   Training         one step, and the loop around it
#   Errors           exceptions, and how an error of one process reaches the others
#   Arguments        the command line
#   Pairs            from rows of a dataset to batches, in an order that can be resumed
#   Trained weights  full UNet or LoRA: creating, loading and saving; optimizer and learning rate
#   Cache            pairs encoded once, before training
#   Checkpoints      saving, finding and loading them
#   Validation       held-out metrics and sample images
#   Results          final weights, Kohya format, model card, upload
#   Main             puts everything together

import argparse
import atexit
import collections
import contextlib
import glob
import hashlib
import importlib.util
import itertools
import json
import logging
import math
import multiprocessing.pool
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import datasets
import diffusers
import fsspec
import numpy as np
import pandas as pd
import psutil
import pyarrow.parquet as pq
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.logging import get_logger
from accelerate.state import PartialState
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    DistributedType,
    broadcast_object_list,
    gather_object,
    is_torch_version,
    send_to_device,
)
from datasets.fingerprint import Hasher
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionXLPipeline,
    Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.configuration_utils import FrozenDict
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import cast_training_params, offload_models
from diffusers.utils import check_min_version
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_kohya,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from filelock import FileLock, Timeout
from huggingface_hub import ModelCard, ModelCardData, create_repo, hf_hub_download, upload_folder
from PIL import Image, ImageOps, PngImagePlugin
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm.auto import tqdm


check_min_version("0.40.0")

logger = get_logger(__name__)


# Objective -----------------------------------------------------------------------------------------------------------
def log_phi(errors):
    """Logarithm of the score phi(l) = l / (exp(l) - 1) (eq. 11 at beta = 1) of float64 errors, accurate down to 0."""
    small = errors < 1e-2
    series = -errors / 2 - errors**2 / 24 + errors**4 / 2880
    # torch.where backpropagates through both branches, so the one that is not selected must not see 0 either.
    safe = torch.where(small, 1.0, errors)
    # log(exp(l) - 1) = l + log(1 - exp(-l)), which does not overflow.
    return torch.where(small, series, safe.log() - safe - (-torch.expm1(-safe)).log())


def mapo_loss(chosen_errors, rejected_errors, beta):
    """
    The MaPO objective of the paper's current version (arXiv 2406.06424v2, eqs. 9 to 11).

        L = l_w - 1/beta * log sigmoid(phi_beta(l_w) - phi_beta(l_l)),   phi_beta(l) = (l / (exp(l) - 1)) ** beta

    Args:
        chosen_errors, rejected_errors: `(pairs,)` squared errors l_w and l_l of the denoiser, each the mean over all
            elements of a latent. Both images of a pair must have the same noise and timestep.
        beta: temperature of the score; `inf` is supervised fine-tuning on the chosen images.

    Returns:
        Loss and margin of each pair, both `(pairs,)`, in float64 because beta amplifies rounding errors of log phi.
    """
    chosen = chosen_errors.double()
    rejected = rejected_errors.double()
    if math.isinf(beta):
        # 0 * inf is NaN, so that a non-finite rejected error still shows in the loss.
        return chosen + 0 * rejected, torch.zeros_like(chosen)
    margin = (beta * log_phi(chosen)).exp() - (beta * log_phi(rejected)).exp()
    return chosen - F.logsigmoid(margin) / beta, margin


def mapo_v1_loss(chosen_errors, rejected_errors, beta, snr_value, num_train_timesteps):
    """
    The objective of MaPO's first release (arXiv 2406.06424v1), with which the published weights were trained.

        L = l_w - beta * log sigmoid(T * (phi(s * l_w) - phi(s * l_l))),   phi(l) = l / (exp(l) - 1)

    Args and returns as in `mapo_loss`, except that `beta` weights the preference term: as it approaches 0, this
    becomes supervised fine-tuning. `snr_value` is s and `num_train_timesteps` is T. The returned margin is not
    multiplied by T.
    """
    chosen = chosen_errors.double()
    rejected = rejected_errors.double()
    margin = log_phi(snr_value * chosen).exp() - log_phi(snr_value * rejected).exp()
    return chosen - beta * F.logsigmoid(num_train_timesteps * margin), margin


# What is logged about the objective, in this order. `mse` is the mean squared error, accuracy the share of l_w < l_l.
METRICS = ("loss", "chosen_mse", "rejected_mse", "margin", "accuracy")


# SDXL ----------------------------------------------------------------------------------------------------------------
#
# What is specific to the model: the errors that the objective compares, and the loading, encoding and sampling that
# belong to them. To train another model, change this section first, and then everything else that knows SDXL:
#
#   Training         the types of `Run`
#   Arguments        the default of --resolution, its multiple of 8, and the flags of MODEL_FLAGS
#   Pairs            `load_pair` and `PairDataset.load` know SDXL's sizes and crops; `load` samples integer timesteps
#   Trained weights  `trained_parts`, `build_model` and `compile_blocks`; the layers and names of `choose_lora_layers`,
#                    `freeze_last_layer`, `read_lora`, `name_in_file`, `save_unet`, `save_lora` and
#                    `load_trained_weights`; the key "unet"
#   Cache            `encode_to_file`, `read_cached`, `describe_encoders` and `fill_caches` know the encoders
#   Checkpoints      the commits of `Progress`, and the folder "unet" of `refuse_other_runs`
#   Validation       ranges of integer timesteps; `warn_if_diverging` knows the error of predicting zero
#   Results          MODEL_CARD and `write_model_card` load a pipeline; the license, and the names of the Kohya format
#   Main             the scheduler of `set_up` and `build_run`
#
# `launch_configs/fsdp2.yaml` names the UNet's blocks.
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TRANSFORMER = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
RESNET = ["conv1", "conv2", "conv_shortcut", "time_emb_proj"]
LORA_LAYERS = {"attention": ATTENTION, "transformer": TRANSFORMER, "all": TRANSFORMER + RESNET}
TEXT_LORA_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def denoising_errors(model, noise_scheduler, latents, conditions, noise, timesteps):
    """
    Mean squared errors of the chosen and of the rejected images, two `(pairs,)` float32 tensors.

    Args:
        model: the UNet, or `UNetWithTextEncoders`.
        latents: `(2 * pairs, channels, height, width)` in float32, the chosen images first.
        conditions: arguments of the model, as returned by `encode_captions`.
        noise, timesteps: `(pairs, channels, height, width)` and `(pairs,)`, shared by the two images of a pair.
    """
    noise = noise.repeat(2, 1, 1, 1)
    timesteps = timesteps.repeat(2)
    target = noise
    if noise_scheduler.config.prediction_type == "v_prediction":
        target = noise_scheduler.get_velocity(latents, noise, timesteps)

    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    prediction = model(noisy_latents, timesteps, **conditions, return_dict=False)[0]
    errors = F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
    return errors.chunk(2)


def sample_latents(vae, batch, vae_batch_size):
    """Latents `(2 * pairs, channels, height, width)` of a batch, sampled from the VAE's posterior."""
    if "moments" in batch:
        moments = batch["moments"]
    else:
        with torch.no_grad():
            moments = encode_images(vae, batch["pixel_values"], vae_batch_size)
    mean, std = moments.float().unbind(dim=1)
    return (mean + std * batch["posterior_noise"]) * vae.config.scaling_factor


def encode_captions(pipeline, batch, dtype, train_text_encoder):
    """
    Keyword arguments that condition the model: prompt embeddings `(2 * pairs, 77, dim)` and SDXL's added conditions.

    With --train_text_encoder, `input_ids` `(pairs, 2, 77)` instead of embeddings: `UNetWithTextEncoders` encodes them.
    """
    # As at inference, the sizes get the dtype of the embeddings.
    time_ids = batch["add_time_ids"].repeat(2, 1).to(dtype)
    if "prompt_embeds" in batch:
        prompt_embeds = batch["prompt_embeds"]
        pooled_prompt_embeds = batch["pooled_prompt_embeds"]
    else:
        input_ids = tokenize(pipeline, batch["caption"]).to(time_ids.device, non_blocking=True)
        if train_text_encoder:
            return {"input_ids": input_ids, "added_cond_kwargs": {"time_ids": time_ids}}
        with torch.no_grad():
            prompt_embeds, pooled_prompt_embeds = encode_prompts(pipeline, input_ids)
    return {
        "encoder_hidden_states": prompt_embeds.repeat(2, 1, 1),
        "added_cond_kwargs": {"text_embeds": pooled_prompt_embeds.repeat(2, 1), "time_ids": time_ids},
    }


def encode_images(vae, pixel_values, vae_batch_size):
    """Mean and standard deviation of the posterior of `(images, 3, h, w)` uint8: `(images, 2, channels, h/8, w/8)`."""
    moments = []
    for pixels in pixel_values.split(vae_batch_size):
        distribution = vae.encode((pixels.float() / 127.5 - 1).to(vae.dtype)).latent_dist
        moments.append(torch.stack([distribution.mean, distribution.std], dim=1))
    return torch.cat(moments)


def tokenize(pipeline, prompts):
    """Token ids of prompts for both text encoders, `(prompts, 2, 77)` on the CPU. Longer prompts are truncated."""
    options = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
    first = pipeline.tokenizer(prompts, **options).input_ids
    second = pipeline.tokenizer_2(prompts, **options).input_ids
    return torch.stack([first, second], dim=1)


def encode_prompts(owner, input_ids):
    """
    `prompt_embeds` `(prompts, 77, dim)` and `pooled_prompt_embeds` `(prompts, pooled_dim)` of token ids.

    `owner` has both text encoders as attributes: the pipeline, or `UNetWithTextEncoders`.
    """
    prompt_embeds = []
    pooled_prompt_embeds = []
    # One prompt at a time, so that an embedding does not depend on the batch, and equals a cached one.
    for ids in input_ids:
        first = owner.text_encoder(ids[:1], output_hidden_states=True)
        second = owner.text_encoder_2(ids[1:], output_hidden_states=True)
        prompt_embeds.append(torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1))
        pooled_prompt_embeds.append(second.text_embeds)
    return torch.cat(prompt_embeds), torch.cat(pooled_prompt_embeds)


class UNetWithTextEncoders(torch.nn.Module):
    """
    The UNet and both text encoders as one module, for --train_text_encoder.

    It is called like the UNet, but with the `input_ids` of the captions instead of their embeddings.
    """

    def __init__(self, pipeline):
        super().__init__()
        self.unet = pipeline.unet
        self.text_encoder = pipeline.text_encoder
        self.text_encoder_2 = pipeline.text_encoder_2

    def forward(self, noisy_latents, timesteps, input_ids, added_cond_kwargs, return_dict=False):
        prompt_embeds, pooled_prompt_embeds = encode_prompts(self, input_ids)
        # In float32, because each layer of the UNet adds to the gradient of the embeddings.
        text_embeds = pooled_prompt_embeds.float().repeat(2, 1)
        return self.unet(
            noisy_latents,
            timesteps,
            prompt_embeds.float().repeat(2, 1, 1),
            added_cond_kwargs={**added_cond_kwargs, "text_embeds": text_embeds},
            return_dict=return_dict,
        )


@torch.no_grad()
def generate_images(args, accelerator, pipeline):
    """One image per validation prompt, seeded with the prompt's index. Processes share the prompts."""
    images = []
    prompts = list(enumerate(args.validation_prompts))
    encoders = (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    with (
        offload_models(*encoders, device=accelerator.device, offload=args.cache_latents),
        accelerator.split_between_processes(prompts, apply_padding=True) as own_prompts,
    ):
        for number, prompt in own_prompts:
            with autocast(args, accelerator):
                latents = pipeline(
                    prompt,
                    height=args.resolution,
                    width=args.resolution,
                    num_inference_steps=args.num_inference_steps,
                    guidance_scale=args.guidance_scale,
                    generator=torch.Generator().manual_seed(number),
                    output_type="latent",
                ).images
            # Decode outside of the pipeline and of autocast, because the VAE may need another precision than the UNet.
            latents = latents.to(pipeline.vae.dtype) / pipeline.vae.config.scaling_factor
            pixels = pipeline.vae.decode(latents, return_dict=False)[0]
            images.append((number, pipeline.image_processor.postprocess(pixels.float())[0]))

    by_prompt = dict(gather_object(images))  # padding repeats a prompt
    return [by_prompt[number] for number, _ in prompts]


# The parts of the pipeline that have weights.
COMPONENTS = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": transformers.CLIPTextModel,
    "text_encoder_2": transformers.CLIPTextModelWithProjection,
}
# The flags that name models: the base model, and a UNet and a VAE that replace its own.
MODEL_FLAGS = {
    "model": "pretrained_model_name_or_path",
    "unet": "pretrained_unet_name_or_path",
    "vae": "pretrained_vae_model_name_or_path",
}


def find_models(args, checkpoint):
    """
    The models that flags name: {kind: arguments of from_pretrained}.

    A resumed run keeps the commits of those on the hub, so that a later push does not change it.
    """
    settings = {} if checkpoint is None else checkpoint.settings
    models = {}
    for kind, flag in MODEL_FLAGS.items():
        name = getattr(args, flag)
        if name is None:
            continue

        # --revision is of the base model only.
        revision = None
        is_same = settings.get(flag) == name
        if kind == "model":
            revision = args.revision
            is_same = is_same and settings["revision"] == revision
        if is_same:
            revision = getattr(checkpoint.progress, f"{kind}_commit") or revision
        with explain(f"--{flag} {name} cannot be loaded, and is not a local folder"):
            models[kind] = find_model(kind, name, args.cache_dir, revision)
    return models


def find_model(kind, name, cache_dir, revision):
    """
    Where a model is stored, as arguments of from_pretrained. On the hub, it is pinned to a commit.

    A UNet or VAE is in the subfolder of a pipeline, or in a folder or repository of its own.
    """
    location = {"pretrained_model_name_or_path": name, "cache_dir": cache_dir, "revision": None}
    part = "unet" if kind == "model" else kind
    if os.path.exists(name):
        in_subfolder = os.path.isdir(os.path.join(name, part))
    else:
        # Any config of a repository names its commit.
        location["revision"] = revision
        try:
            _, commit = COMPONENTS[part].load_config(**location, subfolder=part, return_commit_hash=True)
            in_subfolder = True
        except OSError:
            _, commit = COMPONENTS[part].load_config(**location, return_commit_hash=True)
            in_subfolder = False
        location["revision"] = commit

    # Each part of the base model is in a subfolder of its own.
    if kind != "model":
        location["subfolder"] = part if in_subfolder else None
    return location


def load_configs(args, models):
    """
    Shape of the latents `(channels, height, width)`, and the noise scheduler.

    Reads only configs, tokenizers and --init_lora, so that a mismatch is reported before weights are downloaded.
    """
    name = args.pretrained_model_name_or_path
    base = models["model"]
    with explain(f"--pretrained_model_name_or_path {name} cannot be loaded"):
        unet = UNet2DConditionModel.load_config(**base, subfolder="unet")
        vae = AutoencoderKL.load_config(**base, subfolder="vae")
        scheduler = DDPMScheduler.load_config(**base, subfolder="scheduler")
        text_width = check_text_encoders(base)

    # The base model.
    refusal = f"--pretrained_model_name_or_path {name} is not an SDXL base model"
    # EDM schedulers have sigmas instead of betas.
    is_continuous = scheduler.get("timestep_type") == "continuous"
    if "beta_start" not in scheduler or scheduler.get("use_flow_sigmas") or is_continuous:
        raise TrainingError(f"{refusal}: schedulers for EDM and flow matching are not supported.")
    if scheduler.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"):
        raise TrainingError(f"{refusal}: its prediction type is neither epsilon nor v_prediction.")
    channels = vae.get("latent_channels", 4)
    check_unet(unet, channels, text_width, refusal)

    # A UNet or VAE that replaces the base model's.
    if "unet" in models:
        flag = f"--pretrained_unet_name_or_path {args.pretrained_unet_name_or_path}"
        with explain(f"{flag} cannot be loaded"):
            unet = UNet2DConditionModel.load_config(**models["unet"])
        check_unet(unet, channels, text_width, f"{flag} is not an SDXL UNet for this base model")
    if "vae" in models:
        flag = f"--pretrained_vae_model_name_or_path {args.pretrained_vae_model_name_or_path}"
        base_vae = vae
        with explain(f"{flag} cannot be loaded"):
            vae = AutoencoderKL.load_config(**models["vae"])
        for key, default in (("latent_channels", 4), ("scaling_factor", 0.18215)):  # AutoencoderKL's defaults
            if vae.get(key, default) != base_vae.get(key, default):
                raise TrainingError(f"{flag}: its {key} is not that of {name}, so their latents are incompatible.")
    if args.init_lora is not None:
        check_lora(args, unet)

    vae_scale_factor = 2 ** (len(vae.get("block_out_channels", [64])) - 1)
    side = args.resolution // vae_scale_factor
    return (channels, side, side), DDPMScheduler.from_config(scheduler)


def check_text_encoders(base):
    """Check that each tokenizer of the base model matches its text encoder. Returns the width of prompt embeddings."""
    width = 0
    for suffix in ("", "_2"):
        tokenizer = transformers.CLIPTokenizer.from_pretrained(**base, subfolder=f"tokenizer{suffix}")
        config = transformers.CLIPTextConfig.from_pretrained(**base, subfolder=f"text_encoder{suffix}")
        # Without its vocabulary file, transformers silently builds an empty tokenizer.
        if len(tokenizer) != config.vocab_size:
            raise TrainingError(
                f"--pretrained_model_name_or_path {base['pretrained_model_name_or_path']}: tokenizer{suffix} has "
                f"{len(tokenizer)} tokens, but text_encoder{suffix} has embeddings of {config.vocab_size}."
            )
        width += config.hidden_size
    return width


def check_unet(config, channels, text_width, refusal):
    """Raise an error that begins with `refusal` if this is not the config of an SDXL UNet."""
    if config.get("addition_embed_type") != "text_time":
        raise TrainingError(f"{refusal}: its UNet is not conditioned on image sizes and crops (addition_embed_type).")
    if config.get("in_channels", 4) != channels or config.get("out_channels", 4) != channels:
        raise TrainingError(f"{refusal}: its UNet does not have the channels of the VAE's latents.")
    if config.get("cross_attention_dim", 1280) != text_width:
        raise TrainingError(f"{refusal}: its cross_attention_dim does not match the text encoders.")


def load_complete(model_class, **options):
    """`from_pretrained`, but missing weights are an error: libraries would initialize them randomly."""
    model, info = model_class.from_pretrained(use_safetensors=True, output_loading_info=True, **options)
    missing = info["missing_keys"]
    if missing:
        raise ValueError(f"its {model_class.__name__} lacks {len(missing)} of its weights, e.g. {min(missing)}")
    return model


def load_component(model_class, location, dtype, variant, variant_required):
    """
    A part of the pipeline, in the variant if it has one.

    `variant_required` is for the base model's UNet, so that a missing variant is not silently a larger download.
    """
    name = location["pretrained_model_name_or_path"]
    if os.path.isdir(name):
        # Name the exact folder, otherwise diffusers reports missing files in the parent folder.
        location = {"pretrained_model_name_or_path": str(Path(name, location["subfolder"] or ""))}
    if variant is not None:
        try:
            return load_complete(model_class, dtype=dtype, variant=variant, **location)
        except OSError as error:
            # Truncated weights are an OSError as well.
            if variant_required or "file named" not in str(error):
                raise
    return load_complete(model_class, dtype=dtype, **location)


def load_pipeline(args, accelerator, models):
    """
    The SDXL pipeline, with frozen parts in `weight_dtype` unless they would overflow.

    The UNet stays on the CPU: encoding the cache with the UNet on the GPU would need more memory than training.
    """
    name = args.pretrained_model_name_or_path
    message = f"--pretrained_model_name_or_path {name} cannot be loaded"
    if args.variant is None and any(Path(name).glob("unet/*.fp16.*")):
        message += " (try --variant fp16)"
    frozen_dtype = weight_dtype(accelerator)
    unet_dtype = full_unet_dtype(args) if args.rank is None else frozen_dtype

    # Under ZeRO-3, transformers would shard the frozen text encoders while it loads them.
    transformers.integrations.unset_hf_deepspeed_config()

    # The UNet comes first: while it is cast, its file is in memory as well, and other parts would add to that peak.
    base = models["model"]
    dtypes = {"unet": unet_dtype, "vae": torch.float32}
    components = {}
    for part, model_class in COMPONENTS.items():
        location = {**base, "subfolder": part}
        part_message = message
        if part in models:
            location = models[part]
            part_message = f"--{MODEL_FLAGS[part]} {location['pretrained_model_name_or_path']} cannot be loaded"
        with explain(part_message):
            components[part] = load_component(
                model_class,
                location,
                dtypes.get(part, frozen_dtype),
                args.variant,
                variant_required=part == "unet" and part not in models,
            )
    with explain(message):
        pipeline = StableDiffusionXLPipeline.from_pretrained(**base, **components, add_watermarker=False)

    # Freeze everything for now. force_upcast marks VAEs that overflow in half precision.
    vae_dtype = torch.float32 if pipeline.vae.config.force_upcast else frozen_dtype
    pipeline.unet.requires_grad_(False).to(unet_dtype)
    pipeline.vae.requires_grad_(False).to(accelerator.device, vae_dtype)
    pipeline.text_encoder.requires_grad_(False).to(accelerator.device, frozen_dtype)
    pipeline.text_encoder_2.requires_grad_(False).to(accelerator.device, frozen_dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def check_vae(vae, example, vae_batch_size):
    """Fail early if the VAE overflows, instead of at the first NaN loss."""
    moments = encode_images(vae, example["pixel_values"].to(vae.device), vae_batch_size)
    if not moments.isfinite().all():
        raise TrainingError(
            f"The VAE encodes the images of {example['row']} to NaN in {vae.dtype}. Use "
            "--pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix."
        )


def warn_about_long_captions(tokenizer, rows):
    """Warn about captions that exceed SDXL's 77 tokens, start and end tokens included."""
    _, frame = rows.read_texts(rows.files[0], [rows.columns.caption])
    captions = [caption for caption in frame[rows.columns.caption][:1000] if isinstance(caption, str)]
    too_long = sum(len(tokenizer(caption).input_ids) > 77 for caption in captions)
    if too_long > 0:
        logger.warning(
            f"{too_long} of the first {len(captions)} captions have more than 77 tokens; SDXL ignores the rest."
        )


# Training ------------------------------------------------------------------------------------------------------------
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Windows has no SIGUSR1.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
STOPPED = 75  # exit status of a run that a signal stopped (EX_TEMPFAIL: run it again)
MIN_BAD_ROWS = 10  # fewer bad rows stop a run only with --max_bad_rows 0


@dataclass
class Run:
    """What training, validation and checkpoints share. Built once, when everything is loaded."""

    args: argparse.Namespace
    accelerator: Accelerator
    pipeline: StableDiffusionXLPipeline  # its UNet is the one inside the model's wrappers
    noise_scheduler: DDPMScheduler
    model: torch.nn.Module  # the UNet or UNetWithTextEncoders, wrapped for DDP, FSDP or DeepSpeed
    parts: dict  # the trained modules by name: `unet` and, if they are trained, the text encoders
    parameters: list  # the trainable parameters of the model
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    held_out: Dataset  # a PairDataset
    base_images: list  # of the validation prompts, before training
    pairs_per_step: int
    progress: object  # a Progress


@dataclass
class StepResult:
    """What the processes agreed on at the end of a step. It is equal on all of them."""

    metrics: dict  # gradient norm and learning rate and, if the gradient was finite, means of METRICS over the pairs
    source_failed: bool  # the next batches could not be read
    stop_requested: bool


class StepBatches:
    """Batches, read one optimizer step ahead: those of the next step while the GPU computes this one."""

    def __init__(self, batches):
        self.batches = batches
        self.ready = collections.deque()
        self.error = None

    def read(self):
        """Read one more batch. An error is kept for later, because the step in progress is still good."""
        if self.error is None:
            try:
                self.ready.append(next(self.batches))
            except Exception as error:  # file systems raise all kinds
                self.error = error

    def check(self, message):
        """Raise on all processes if one of them could not read its batches."""
        with raise_on_all_ranks(message):
            if self.error is not None:
                raise self.error


class StopSignal:
    """
    Records Ctrl-C, SIGTERM or SIGUSR1 (SLURM, cloud preemption), so that the current step is completed first.

    Once the last step is done, the results are saved despite a signal; only a second Ctrl-C quits. torchrun kills its
    processes 30 s after forwarding a signal, so a step or a validation, and a checkpoint, must fit into that time.
    """

    def __init__(self):
        self.requested = False
        for stop_signal in STOP_SIGNALS:
            if signal.getsignal(stop_signal) != signal.SIG_IGN:  # shells let background jobs ignore Ctrl-C
                signal.signal(stop_signal, self.note)

    def note(self, number, frame):
        self.requested = True
        if number == signal.SIGINT:
            # `print` could be interrupted in the middle of its own work, so write directly.
            pid = os.getpid()
            os.write(2, b"\nFinishing and saving. Press Ctrl-C again or `kill %d` to quit immediately.\n" % pid)
            # torchrun passes the second Ctrl-C on as SIGTERM.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def summarize(steps, pairs_per_step):
    """Average metrics and `seconds` of steps for logging. Gradient norm and learning rate are of the last step."""
    logs = pd.DataFrame(steps).mean().to_dict()  # skipped steps lack the METRICS
    logs["pairs_per_second"] = pairs_per_step / logs.pop("seconds")
    logs["grad_norm"] = steps[-1]["grad_norm"]
    logs["lr"] = steps[-1]["lr"]
    return logs


def weight_dtype(accelerator):
    """Dtype of frozen weights and of autocast."""
    return DTYPES[accelerator.mixed_precision]


def autocast(args, accelerator):
    """The autocast of accelerate's forward pass, also for sampling and under DeepSpeed, where accelerate has none."""
    return torch.autocast(
        accelerator.device.type,
        dtype=weight_dtype(accelerator),
        enabled=weight_dtype(accelerator) != torch.float32,
        cache_enabled=not args.gradient_checkpointing,  # casts that are recomputed need not be kept
    )


def preference_loss(run, batch):
    """The objective on a batch: the scalar loss, and METRICS `(len(METRICS), pairs)` in float64."""
    args = run.args
    batch = send_to_device(batch, run.accelerator.device, non_blocking=True)
    latents = sample_latents(run.pipeline.vae, batch, args.vae_encode_batch_size)
    dtype = weight_dtype(run.accelerator)
    conditions = encode_captions(run.pipeline, batch, dtype, args.train_text_encoder)
    with autocast(args, run.accelerator):
        chosen_errors, rejected_errors = denoising_errors(
            run.model,
            run.noise_scheduler,
            latents,
            conditions,
            batch["noise"],
            batch["timesteps"],
        )

    if args.loss_type == "mapo":
        losses, margin = mapo_loss(chosen_errors, rejected_errors, args.beta_mapo)
    else:
        num_train_timesteps = run.noise_scheduler.config.num_train_timesteps
        losses, margin = mapo_v1_loss(
            chosen_errors, rejected_errors, args.beta_mapo, args.snr_value, num_train_timesteps
        )
    values = [losses, chosen_errors, rejected_errors, margin, chosen_errors < rejected_errors]
    metrics = torch.stack([value.double() for value in values])
    return losses.mean().float(), metrics.detach()


def clip_gradients(accelerator, parameters, max_grad_norm):
    """Clip gradients to `max_grad_norm` (0 disables it). Returns the norm before clipping as a float64 tensor."""
    grad_norm = accelerator.clip_grad_norm_(parameters, max_grad_norm or math.inf)
    if isinstance(grad_norm, DTensor):
        grad_norm = grad_norm.full_tensor()
    return torch.as_tensor(grad_norm, dtype=torch.float64, device=accelerator.device)


def train_step(run, batches, stop):
    """
    One optimizer step.

    Whatever the processes must agree on is summed in a single reduction. After it, every decision is plain Python on
    numbers that are the same everywhere, so all processes take the same branches.
    """
    args = run.args
    accelerator = run.accelerator
    progress = run.progress

    # Forward and backward over the accumulated batches. accelerate counts them to know when to reduce the gradients,
    # and restores its count from checkpoints, which is wrong if --gradient_accumulation_steps has changed.
    accelerator.step = 0
    metrics = torch.zeros(len(METRICS), dtype=torch.float64, device=accelerator.device)
    rows = []
    bad_rows = 0
    more_to_read = progress.step + 1 < args.max_train_steps
    for _ in range(args.gradient_accumulation_steps):
        batch = batches.ready.popleft()
        with accelerator.accumulate(run.model):
            loss, pair_metrics = preference_loss(run, batch)
            accelerator.backward(loss)
        metrics += pair_metrics.mean(dim=1) / args.gradient_accumulation_steps
        rows += batch["row"]
        bad_rows += int(batch["skipped"].sum())

        # Read a batch of the next step while the GPU is busy with this one.
        if more_to_read:
            batches.read()
    grad_norm = clip_gradients(accelerator, run.parameters, args.max_grad_norm)

    # Agree. With DDP, this is the step's only communication apart from the gradients (and from the position ids of
    # trained text encoders), and the only wait for the GPU.
    counts = metrics.new_tensor([bad_rows, batches.error is not None, stop.requested])
    totals = accelerator.reduce(torch.cat([metrics, grad_norm.reshape(1), counts])).tolist()
    total_bad_rows, failed, stopped = totals[-3:]
    means = [total / accelerator.num_processes for total in totals[:-3]]
    step_metrics = dict(zip([*METRICS, "grad_norm"], means))
    step_metrics["lr"] = run.lr_scheduler.get_last_lr()[0]
    finite = math.isfinite(step_metrics["grad_norm"])

    # Update the weights, unless the gradient is not finite. fp16's GradScaler skips such steps by itself, and lowers
    # its scale. DeepSpeed has already updated the weights in `backward`, or skipped the update; here it does nothing.
    if finite or accelerator.scaler is not None:
        run.optimizer.step()
    run.lr_scheduler.step()
    run.optimizer.zero_grad()

    progress.count_step(run.pairs_per_step, int(total_bad_rows), finite)
    if not finite:
        for name in METRICS:
            del step_metrics[name]
        logger.warning(
            f"Step {progress.step}: non-finite gradient, update skipped ({progress.bad_steps} in a row). "
            f"Pairs on process {accelerator.process_index}: {', '.join(rows)}.",
            main_process_only=False,
        )
    return StepResult(step_metrics, source_failed=failed > 0, stop_requested=stopped > 0)


def find_fault(progress, max_bad_steps, max_bad_rows):
    """Reason to stop training, or None."""
    if progress.bad_steps >= max_bad_steps:
        return f"--max_bad_steps {max_bad_steps}: no finite gradient in the last {progress.bad_steps} steps"

    enough = progress.rows_bad >= MIN_BAD_ROWS or max_bad_rows == 0
    if enough and progress.rows_bad > max_bad_rows * progress.rows_read:
        return f"--max_bad_rows {max_bad_rows}: {progress.rows_bad} of {progress.rows_read} rows could not be used"
    return None


def peak_memory(device):
    """Peak GPU memory, or on the CPU the current resident memory, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss


def train(run, batches, stop):
    """Train to --max_train_steps. Returns False if a signal stopped the run early."""
    args = run.args
    accelerator = run.accelerator
    progress = run.progress

    # Read the first step's batches. All others are read during the step before theirs.
    if progress.step < args.max_train_steps:
        for _ in range(args.gradient_accumulation_steps):
            batches.read()
    batches.check(f"--dataset_name {args.dataset_name} cannot be read")

    steps = []  # metrics of the steps since the last log
    bar = tqdm(
        initial=progress.step,
        total=args.max_train_steps,
        desc="Steps",
        disable=not accelerator.is_local_main_process,
    )
    while progress.step < args.max_train_steps:
        started = time.perf_counter()
        result = train_step(run, batches, stop)
        steps.append({**result.metrics, "seconds": time.perf_counter() - started})
        bar.update()
        is_last_step = progress.step == args.max_train_steps

        fault = find_fault(progress, args.max_bad_steps, args.max_bad_rows)
        ends_early = fault is not None or result.source_failed or result.stop_requested

        # Log.
        if is_last_step or ends_early or progress.step % args.logging_steps == 0:
            logs = summarize(steps, run.pairs_per_step)
            steps.clear()
            logs["skipped_steps"] = progress.skipped_steps
            logs["peak_memory_gib"] = peak_memory(accelerator.device) / 2**30
            shown = ("loss", "accuracy", "pairs_per_second")
            bar.set_postfix({name: f"{logs[name]:.4g}" for name in shown if name in logs})
            with ignoring_tracker_errors(accelerator):
                accelerator.log(logs, step=progress.step)

        # Save, also before the run ends early. If it does not, `finish` saves the last step: the weights come first.
        if ends_early or (progress.step % args.checkpointing_steps == 0 and not is_last_step):
            save_checkpoint(run)
        if fault is not None:
            raise TrainingError(f"{fault} (the checkpoint of step {progress.step} is saved).")
        if result.source_failed:
            batches.check(
                f"--dataset_name {args.dataset_name} cannot be read any further "
                f"(the checkpoint of step {progress.step} is saved)"
            )
        if result.stop_requested:
            logger.warning(
                f"Stopped by a signal (the checkpoint of step {progress.step} is saved). Resume with "
                "--resume_from_checkpoint latest."
            )
            return False

        # Validate.
        if progress.step % args.validation_steps == 0 and not is_last_step:
            validate(run)
    return True


# Errors --------------------------------------------------------------------------------------------------------------
#
# A failure that can hit a single process, such as a full disk or an unreadable file, is raised on all of them
# (`raise_on_all_ranks`) where the others would otherwise wait for it in a collective. Elsewhere `explain` is enough:
# the process ends (`abandon_process_group`), and the launcher ends the others.
class TrainingError(Exception):
    """An error that one sentence explains; printed without a traceback."""


class UnusableRow(Exception):
    """Raised for a row that cannot be used; the message says why."""


def in_one_line(text):
    """The text on one line. Of a long one, the beginning and the end."""
    text = " ".join(text.split())
    if len(text) > 600:
        return f"{text[:300]} [...] {text[-300:]}"
    return text


def describe(error):
    """An error's type and text in one line. The type of our own errors, or of a ValueError, says nothing."""
    # PyTorch wraps errors of loader workers in text: keep what follows the last frame of the traceback.
    if "Original Traceback" in str(error):
        last_frame = str(error).rpartition('\n  File "')[2].splitlines()[1:]
        return in_one_line("\n".join(line for line in last_frame if not line.startswith("    ")))
    # `datasets` hides the reason in the cause of this error, and logs the file.
    if type(error) is datasets.exceptions.DatasetGenerationError and error.__cause__ is not None:
        error = error.__cause__
    text = in_one_line(str(error))
    if type(error) in (ValueError, UnusableRow) and text:
        return text
    return f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def explain(message):
    """Raise any error of the body as a TrainingError that begins with `message`."""
    try:
        yield
    except TrainingError:
        raise
    except (Exception, CheckpointException) as error:  # FSDP's CheckpointException is not an Exception
        raise TrainingError(f"{message}: {describe(error)}") from error


@contextlib.contextmanager
def raise_on_all_ranks(message):
    """
    If the body fails on any process, raise the same TrainingError on all of them, so that none hangs.

    The body must not contain another use of this: a process that fails before the inner one would enter the outer
    gather while the others enter the inner one.
    """
    failure = None
    try:
        with explain(message):
            yield
    except TrainingError as error:
        failure = str(error)

    for sentence in gather_object([failure]):
        if sentence is not None:
            raise TrainingError(sentence)


def raise_on_all_ranks_if_unsharded(accelerator, message):
    """
    `raise_on_all_ranks` for a body that gathers weights with FSDP or DeepSpeed.

    If one process fails while they gather, the others wait inside the body, and never learn about the failure. With
    FSDP and DeepSpeed, the error is only explained: the process ends, and the launcher ends the others.
    """
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return explain(message)
    return raise_on_all_ranks(message)


def from_main_process(function, *args):
    """Call `function` on the main process; return its result, or raise its error, on all processes."""
    result = None
    with raise_on_all_ranks("The main process failed"):
        if PartialState().is_main_process:
            result = function(*args)
    return broadcast_object_list([result])[0]


def abandon_process_group():
    """
    Exit handler: if the process group still exists, the run has failed. Exit without destroying it.

    Other processes may wait for this one in a collective. NCCL's cleanup would wait for them in turn, so that the
    launcher would never learn about the failure.
    """
    if torch.distributed.is_initialized():
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(1)


def sync_to_disk(path):
    """Flush a file, or a folder's directory entries, to the disk (fsync). Windows has no such call for folders."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path, save):
    """Let `save` write a file that appears under its name only when it is complete and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary_path = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        save(temporary_path)
        sync_to_disk(temporary_path)
        os.replace(temporary_path, path)
        sync_to_disk(path.parent)
    finally:
        temporary_path.unlink(missing_ok=True)


@contextlib.contextmanager
def ignoring_tracker_errors(accelerator):
    """If a tracker fails, training continues without trackers."""
    try:
        yield
    except Exception as error:
        logger.warning(f"--report_to: training continues without trackers ({describe(error)}).")
        accelerator.trackers = []


# Arguments -----------------------------------------------------------------------------------------------------------
VALIDATION_PROMPTS = ["a lighthouse at dusk", "an old sailor with a pipe", "a fox in the snow", "a bowl of ramen"]
TRACKERS = {"tensorboard": ["tensorboard"], "wandb": ["wandb"], "all": ["tensorboard", "wandb"], "none": []}
# Flags of other scripts for what is always done (PyTorch's attention replaces xFormers). They are ignored.
WITHOUT_EFFECT = ["center_crop", "random_flip", "mapo_training", "enable_xformers_memory_efficient_attention"]


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


SMALLEST = sys.float_info.min
LARGEST = sys.float_info.max
COUNT = bounded(int, 1, sys.maxsize, "a positive whole number")
COUNT_OR_ZERO = bounded(int, 0, sys.maxsize, "zero or a positive whole number")
SEED = bounded(int, 0, 2**32 - 1, "a whole number from 0 to 4294967295")
FRACTION = bounded(float, 0, 1, "a number from 0 to 1")
BELOW_ONE = bounded(float, 0, math.nextafter(1, 0), "a number from 0 to less than 1")
NOT_NEGATIVE = bounded(float, 0, LARGEST, "zero or a positive number")
NOT_NEGATIVE_OR_INF = bounded(float, 0, math.inf, "zero, a positive number or inf")
POSITIVE = bounded(float, SMALLEST, LARGEST, "a positive number")
POSITIVE_OR_INF = bounded(float, SMALLEST, math.inf, "a positive number or inf")
PATH = os.path.expanduser  # leaves hub ids as they are


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults other than None and False."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def add_model_arguments(parser):
    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", type=PATH, required=True, help="SDXL base model: hub id or folder.")
    add("--pretrained_vae_model_name_or_path", type=PATH, help="Another VAE, e.g. madebyollin/sdxl-vae-fp16-fix.")
    add("--pretrained_unet_name_or_path", type=PATH, help="Another UNet to start from, e.g. an earlier output_dir.")
    add(
        "--init_lora",
        type=PATH,
        help="LoRA to continue training, e.g. an earlier output_dir. Its target layers are reused.",
    )
    add("--revision", help="Revision of the base model on the hub.")
    add("--variant", help="Variant of the pretrained weights, e.g. fp16.")
    add("--cache_dir", type=PATH, help="Folder for downloaded models, datasets, indexes and cached latents.")
    add("--rank", "--lora_rank", type=COUNT, help="Train a LoRA of this rank instead of the full UNet.")
    add("--lora_alpha", type=POSITIVE, help="LoRA alpha. Defaults to the rank, as in diffusers (sd-scripts: 1).")
    add(
        "--lora_layers",
        nargs="+",
        help="Layers that get a LoRA: `attention` (as in diffusers' scripts), `transformer` (as in sd-scripts), `all` "
        "(default; also the resnets), or names of layers.",
    )
    add("--train_text_encoder", action="store_true", help="Also train a LoRA of both text encoders.")


def add_pair_arguments(parser):
    add = parser.add_argument_group("pairs").add_argument
    add("--dataset_name", type=PATH, required=True, help="Preference pairs: hub id, folder or file for `datasets`.")
    add("--dataset_config_name", help="Configuration of the dataset, if it has several.")
    add("--dataset_split_name", help="Split to train on, or several: a+b. Defaults to the only split, or to `train`.")
    add(
        "--streaming",
        action="store_true",
        help="Stream parquet row groups on demand instead of downloading the files.",
    )
    add(
        "--shuffle_shards",
        type=COUNT,
        default=4,
        help="With --streaming: row groups that each reading process keeps in memory and shuffles together.",
    )
    add("--max_train_samples", type=COUNT, help="Train on a random subset of this many pairs.")
    add("--caption_column", default="caption", help="Column with the prompts.")
    add("--image_0_column", default="jpg_0", help="Column with the first images.")
    add("--image_1_column", default="jpg_1", help="Column with the second images.")
    add("--label_0_column", default="label_0", help="Column with the labels of the first images.")
    add("--label_1_column", default="label_1", help="Column with the labels of the second images.")
    add("--chosen_column", help="Column with the chosen images, for pairs without labels.")
    add("--rejected_column", help="Column with the rejected images, for pairs without labels.")
    add(
        "--remove_ties",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Drop pairs with equal labels. Otherwise their chosen image is picked at random.",
    )
    add(
        "--label_noise_prob",
        type=FRACTION,
        default=0.0,
        help="Probability of swapping chosen and rejected (label noise).",
    )
    add(
        "--max_bad_rows",
        type=FRACTION,
        default=0.01,
        help="Stop if more than this share of the rows, and at least 10, are unusable. 0 stops at the first.",
    )
    add("--resolution", type=COUNT, default=1024, help="Side of the training images in pixels.")
    add("--random_crop", action="store_true", help="Crop at random instead of at the center.")
    add("--no_hflip", action="store_true", help="Do not flip images at random.")
    add(
        "--cache_latents",
        action="store_true",
        help="Encode all pairs before training. Later runs on the same pairs reuse the encodings.",
    )
    add(
        "--dataloader_num_workers",
        type=COUNT_OR_ZERO,
        default=0,
        help="Processes per GPU that read and decode images.",
    )
    add("--vae_encode_batch_size", type=COUNT, default=1, help="Images per forward pass of the VAE.")


def add_training_arguments(parser):
    add = parser.add_argument_group("objective").add_argument
    add(
        "--loss_type",
        choices=["mapo", "mapo_v1"],
        default="mapo",
        help="`mapo`: current version of the paper; `mapo_v1`: its first release.",
    )
    add(
        "--beta_mapo",
        type=POSITIVE_OR_INF,
        help="Beta. Larger values approach supervised fine-tuning on the chosen images (`inf`); with mapo_v1, smaller "
        "values do. Defaults to 8 (mapo_v1: 0.1).",
    )
    add("--snr_value", type=POSITIVE, default=0.5, help="Multiplies the errors in mapo_v1.")

    add = parser.add_argument_group("training").add_argument
    add("--seed", type=SEED, help="Seed of training. Default: a random one, or that of the checkpoint.")
    add("--train_batch_size", type=COUNT, default=4, help="Pairs per device and forward pass.")
    add("--num_train_epochs", type=COUNT, default=1, help="Passes over the dataset.")
    add("--max_train_steps", type=COUNT, help="Optimizer steps; overrides --num_train_epochs.")
    add("--gradient_accumulation_steps", type=COUNT, default=1, help="Forward passes per optimizer step.")
    add("--gradient_checkpointing", action="store_true", help="Recompute activations to save memory.")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="Defaults to the setting of accelerate.")
    add("--full_bf16", action="store_true", help="Train the full UNet in bfloat16 with stochastic rounding.")
    add("--allow_tf32", action="store_true", help="Allow TF32 in float32 matrix products and convolutions.")
    add("--compile", action="store_true", help="Compile the UNet's transformer blocks to reduce CPU overhead.")

    add = parser.add_argument_group("optimizer").add_argument
    add(
        "--learning_rate",
        type=POSITIVE,
        default=1e-5,
        help="Learning rate. The paper uses 1e-7 for the full UNet; diffusers' default of 5e-4 breaks it.",
    )
    add("--text_encoder_lr", type=POSITIVE, default=5e-6, help="Learning rate of the text encoders.")
    add("--scale_lr", action="store_true", help="Multiply the learning rates by the pairs per optimizer step.")
    schedules = [schedule.value for schedule in SchedulerType if schedule.value != "piecewise_constant"]
    add("--lr_scheduler", choices=schedules, default="constant", help="Learning rate schedule.")
    add(
        "--lr_warmup_steps",
        type=COUNT_OR_ZERO,
        default=500,
        help="Optimizer steps of warmup. The schedule `constant` has none.",
    )
    add("--lr_num_cycles", type=COUNT, default=1, help="Cycles of cosine_with_restarts.")
    add("--lr_power", type=POSITIVE, default=1.0, help="Power of the polynomial schedule.")
    add("--use_8bit_adam", action="store_true", help="AdamW with 8-bit states, from bitsandbytes.")
    add("--adam_beta1", type=BELOW_ONE, default=0.9, help="Adam's beta1.")
    add("--adam_beta2", type=BELOW_ONE, default=0.999, help="Adam's beta2.")
    add("--adam_weight_decay", type=NOT_NEGATIVE, default=1e-2, help="Weight decay.")
    add("--adam_epsilon", type=POSITIVE, default=1e-8, help="Adam's epsilon.")
    add(
        "--max_grad_norm",
        type=NOT_NEGATIVE_OR_INF,
        default=1.0,
        help="Clip gradients to this norm. 0 disables clipping.",
    )
    add("--max_bad_steps", type=COUNT, default=10, help="Stop after this many non-finite gradients in a row.")


def add_output_arguments(parser):
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=PATH, default="mapo", help="Folder for everything that the run writes.")
    add("--checkpointing_steps", type=COUNT, default=500, help="Optimizer steps between checkpoints.")
    add("--checkpoints_total_limit", type=COUNT, help="Number of checkpoints to keep.")
    add("--resume_from_checkpoint", type=PATH, help="`latest`, a checkpoint's path, or its name in output_dir.")
    add("--logging_dir", default="logs", help="Folder of the trackers' files, in output_dir.")
    add("--logging_steps", type=COUNT, default=10, help="Optimizer steps between logged metrics.")
    add("--report_to", choices=list(TRACKERS), default="tensorboard", help="Where metrics are logged.")
    add("--tracker_name", default="mapo", help="Name of the project in the tracker.")
    add("--no_kohya_format", action="store_true", help="Do not also save the LoRA in Kohya format (ComfyUI, A1111).")
    add("--push_to_hub", action="store_true", help="Upload output_dir at the end, without checkpoints and logs.")
    add("--hub_model_id", help="Repository to upload to. Defaults to the name of output_dir.")
    add("--hub_private_repo", action="store_true", help="Create a private repository.")
    add("--hub_token", help="Token for the upload. Defaults to that of `hf auth login`.")

    add = parser.add_argument_group("validation").add_argument
    add("--run_validation", action="store_true", help="Generate images of --validation_prompts.")
    add("--validation_steps", type=COUNT, default=200, help="Optimizer steps between validations.")
    add("--validation_prompts", nargs="+", default=VALIDATION_PROMPTS, help="Prompts of the generated images.")
    add("--num_inference_steps", type=COUNT, default=25, help="Denoising steps of the generated images.")
    add("--guidance_scale", type=NOT_NEGATIVE, default=5.0, help="Guidance scale of the generated images.")
    add("--validation_split", help="Split of the held-out pairs. Without it, the first pairs are held out.")
    add(
        "--num_validation_pairs",
        type=COUNT,
        help="Number of held-out pairs for the eval_ metrics. Defaults to none, or to all of --validation_split.",
    )


def parse_args(input_args=None):
    """Parse the command line, or `input_args`. Contradictory flags are refused."""
    parser = argparse.ArgumentParser(
        description=__doc__.strip().splitlines()[0],
        usage="accelerate launch %(prog)s --pretrained_model_name_or_path MODEL --dataset_name PAIRS [...]",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add_model_arguments(parser)
    add_pair_arguments(parser)
    add_training_arguments(parser)
    add_output_arguments(parser)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # passed by old launchers
    for name in WITHOUT_EFFECT:
        parser.add_argument(f"--{name}", action="store_true", help=argparse.SUPPRESS)

    args = parser.parse_args(input_args)
    check_arguments(parser, args)
    for name in ("local_rank", *WITHOUT_EFFECT):
        delattr(args, name)
    if args.beta_mapo is None:
        args.beta_mapo = 8.0 if args.loss_type == "mapo" else 0.1
    if args.rank is not None:
        args.lora_alpha = args.lora_alpha or args.rank
        if args.init_lora is None:
            args.lora_layers = args.lora_layers or ["all"]
    return args


def check_arguments(parser, args):  # noqa: C901
    """Check for contradictory flags and missing packages."""
    base_model = args.pretrained_model_name_or_path
    if base_model.endswith(".safetensors"):
        parser.error(
            f"--pretrained_model_name_or_path {base_model} is a single file. Convert it first: "
            f"python convert_sdxl.py single_file {base_model} FOLDER"
        )
    if args.output_dir == "":
        parser.error("--output_dir is empty")
    logging_dir = Path(args.logging_dir)
    if logging_dir.is_absolute() or logging_dir == Path() or ".." in logging_dir.parts:
        parser.error(f"--logging_dir {args.logging_dir} must be a folder inside --output_dir")

    # Loader workers use sockets in the folder for temporary files. Their paths can have at most 107 characters,
    # and the sockets' own names take about 35.
    if args.dataloader_num_workers > 0 and os.name == "posix" and len(tempfile.gettempdir()) > 70:
        parser.error(
            f"--dataloader_num_workers: the path of temporary files is too long ({tempfile.gettempdir()}); set TMPDIR"
        )

    # LoRA.
    for name in ("lora_alpha", "lora_layers", "init_lora", "train_text_encoder"):
        if getattr(args, name) and args.rank is None:
            parser.error(f"--{name} requires --rank")
    if args.init_lora and args.lora_layers:
        parser.error("--lora_layers cannot be combined with --init_lora, which reuses that LoRA's layers")
    if args.train_text_encoder and args.cache_latents:
        parser.error("--train_text_encoder cannot be combined with --cache_latents, which stores embeddings")

    # Images and pairs.
    if args.cache_latents and args.random_crop:
        parser.error("--cache_latents stores one crop per image; it cannot be combined with --random_crop")
    if args.center_crop and args.random_crop:
        parser.error("--center_crop contradicts --random_crop")
    if args.random_flip and args.no_hflip:
        parser.error("--random_flip contradicts --no_hflip")
    if args.resolution % 8 != 0:
        parser.error("--resolution must be a multiple of 8")
    if (args.chosen_column is None) != (args.rejected_column is None):
        parser.error("--chosen_column and --rejected_column require each other")

    # Objective and optimizer.
    if args.loss_type == "mapo_v1" and args.beta_mapo == math.inf:
        parser.error("--beta_mapo inf requires --loss_type mapo")
    if args.lr_scheduler == "polynomial" and args.learning_rate <= 1e-7:
        parser.error("--lr_scheduler polynomial ends at 1e-7, so --learning_rate must be larger")
    if args.full_bf16 and (args.rank is not None or not args.use_8bit_adam or args.mixed_precision != "bf16"):
        parser.error(
            "--full_bf16 requires --use_8bit_adam and --mixed_precision bf16; it cannot be combined with --rank"
        )

    # Trackers and packages.
    trackers = TRACKERS[args.report_to]
    if args.hub_token and "wandb" in trackers:
        parser.error(
            "--report_to wandb uploads the command line, and --hub_token with it; use `hf auth login` instead"
        )
    for tracker in trackers:
        require_package(parser, tracker, f"--report_to {args.report_to}")
    if args.use_8bit_adam:
        require_package(parser, "bitsandbytes", "--use_8bit_adam")
    if args.rank is not None:
        require_package(parser, "peft", "--rank")


def require_package(parser, package, flag):
    if importlib.util.find_spec(package) is None:
        parser.error(f"{flag} requires {package}: pip install {package}")


# Pairs ---------------------------------------------------------------------------------------------------------------
#
# A pair is a row of an index, which has the columns SHARD, ROW (in the shard) and CAPTION (its hash). The order of
# the pairs depends only on seed, epoch and the run's Layout, and every random choice about a pair only on seed and
# position in that order. So Layout and number of pairs seen are all that a checkpoint needs to know about the data, on
# any number of processes.
SHARD, ROW, CAPTION = range(3)
INDEX_VERSION = 3  # increment when the format of the index changes
MAX_SKIPPED = 100  # give up after this many consecutive unusable rows


class Columns(NamedTuple):
    """Names of the columns that pairs are read from."""

    caption: str
    images: tuple
    labels: tuple  # empty if the images are already split into chosen and rejected

    def all(self):
        return list(dict.fromkeys([self.caption, *self.images, *self.labels]))


class Visit(NamedTuple):
    """A pair, its position in the order of the run, and the lane that reads it."""

    position: int
    pair: int
    lane: int = 0


@dataclass(frozen=True)
class Layout:
    """
    How the pairs of an epoch are ordered: chosen when a run first starts, and kept in its checkpoints.

    With --streaming, each reader (a loader worker, or a process without workers) should download its own row groups.
    So the shards are divided into lanes, one per reader. In a lane, the pairs of `shards_mixed` shards at a time are
    shuffled together. The lanes take turns of `turn` pairs: the batch size at the first start, so that each batch
    comes from one reader. After a restart with fewer readers, one of them reads several lanes.

    A shard is a row group of a stream. A prepared dataset is a single shard, with a single lane.
    """

    shards_mixed: int = 1
    lanes: int = 1
    turn: int = 1

    def lane(self, position):
        """Which lane reads the pair at a position, or at each of several positions."""
        return position // self.turn % self.lanes


def find_columns(args, features):
    """The columns that the flags name. Their values are checked when rows are read."""
    image_flags = ("chosen_column", "rejected_column")
    label_flags = ()
    if args.chosen_column is None:
        image_flags = ("image_0_column", "image_1_column")
        label_flags = ("label_0_column", "label_1_column")

    for flag in ("caption_column", *image_flags, *label_flags):
        column = getattr(args, flag)
        if column not in features:
            raise TrainingError(f"--{flag}: {args.dataset_name} has no column {column!r} (columns: {list(features)}).")
        if flag in image_flags and getattr(features[column], "dtype", None) in ("string", "large_string"):
            raise TrainingError(
                f"--{flag}: column {column!r} contains strings. If they are paths of images, give the folder "
                "of the table, name it metadata.csv (or .jsonl, .parquet), and let the names of its image columns end "
                "in _file_name."
            )

    return Columns(
        caption=args.caption_column,
        images=tuple(getattr(args, flag) for flag in image_flags),
        labels=tuple(getattr(args, flag) for flag in label_flags),
    )


@contextlib.contextmanager
def open_parquet(file):
    """A parquet file, local or remote. Reading ahead is off, because it would fetch neighboring images as well."""
    filesystem, path = fsspec.url_to_fs(file)
    with filesystem.open(path, cache_type="none") as opened, pq.ParquetFile(opened) as parquet:
        yield parquet


# The rows of a dataset are PreparedRows or StreamedRows, which have the same methods.
class PreparedRows:
    """Rows of a dataset on disk, as one memory-mapped shard. Their images are still encoded."""

    files = [None]  # `read_texts` is called once per file; here one call reads the whole table

    def __init__(self, dataset, columns):
        self.columns = columns
        self.table = dataset.select_columns(columns.all()).with_format("arrow")  # leaves images encoded

    def record(self, shard, row, lane):
        """One row as a dict."""
        return self.table[int(row)].to_pylist()[0]

    def read_texts(self, file, names):
        """Number of rows and bytes of each shard of a file, and a DataFrame of these columns."""
        return [(len(self.table), 0)], self.table.select_columns(names)[:].to_pandas()

    def row_name(self, shard, row):
        """How messages name a row."""
        return f"row {row}"


class StreamedRows:
    """
    Rows of parquet files, read when they are needed. A shard is a row group; their images are still encoded.

    Keeps the latest `shards_kept` row groups of each lane in memory. A process may read several lanes after a restart.
    """

    def __init__(self, files, columns, shards_kept):
        self.files = files
        self.columns = columns
        self.shards_kept = shards_kept
        self.row_groups = []  # (number of the file, row group, bytes) of each shard, known when the index is loaded
        self.kept = {}  # {lane: {shard: table}}, oldest shard first

    def record(self, shard, row, lane):
        kept = self.kept.setdefault(lane, {})
        if shard not in kept:
            if len(kept) == self.shards_kept:
                oldest = next(iter(kept))
                del kept[oldest]
            file, row_group, _ = self.row_groups[shard]
            with open_parquet(self.files[file]) as parquet:
                kept[shard] = parquet.read_row_group(row_group, self.columns.all())
        return kept[shard].slice(int(row), 1).to_pylist()[0]

    def read_texts(self, file, names):
        with open_parquet(file) as parquet:
            shards = []
            for n in range(parquet.num_row_groups):
                row_group = parquet.metadata.row_group(n)
                num_bytes = 0
                for number in range(row_group.num_columns):
                    column = row_group.column(number)
                    if column.path_in_schema.split(".")[0] in self.columns.all():
                        num_bytes += column.total_uncompressed_size
                shards.append((row_group.num_rows, num_bytes))
            return shards, parquet.read(names).to_pandas()

    def row_name(self, shard, row):
        return f"row {row} of shard {shard}"


def read_index(rows, file, remove_ties):
    """Index of one file, with its shards numbered from 0, and the size of each shard in bytes. Reads no images."""
    columns = rows.columns
    shards, frame = rows.read_texts(file, list(dict.fromkeys([columns.caption, *columns.labels])))
    with explain(f"Column {columns.caption} cannot be read as text"):
        captions = frame[columns.caption].astype(str).to_numpy(object)
    caption_hashes = pd.util.hash_array(captions, categorize=False).view("int64")
    num_rows = np.array([size for size, _ in shards], dtype=np.int64)  # empty if a file has no row groups
    first_rows = np.cumsum(num_rows) - num_rows
    shard_numbers = np.repeat(np.arange(len(shards)), num_rows)
    row_numbers = np.arange(len(frame)) - first_rows[shard_numbers]
    index = np.stack([shard_numbers, row_numbers, caption_hashes], axis=1)

    if columns.labels:
        with explain(f"The label columns {columns.labels} must contain numbers"):
            labels = frame[list(columns.labels)].astype("float64").to_numpy()
        if remove_ties:
            index = index[labels[:, 0] != labels[:, 1]]
    return index, [num_bytes for _, num_bytes in shards]


def build_index(rows, remove_ties):
    """Index of all pairs, and (file, row group, bytes) of each shard. Files are read in 16 threads."""
    parts = []
    row_groups = []
    with multiprocessing.pool.ThreadPool(16) as pool:
        indexes = pool.imap(lambda file: read_index(rows, file, remove_ties), rows.files)
        bar = tqdm(indexes, desc="Reading labels", total=len(rows.files), disable=len(rows.files) == 1)
        for file, (index, bytes_of_shards) in enumerate(bar):
            index[:, SHARD] += len(row_groups)
            parts.append(index)
            for row_group, num_bytes in enumerate(bytes_of_shards):
                row_groups.append((file, row_group, num_bytes))
    return {"index": torch.from_numpy(np.concatenate(parts)), "row_groups": torch.tensor(row_groups)}


def load_index(rows, fingerprint, remove_ties, cache_dir):
    """Index of all pairs `(pairs, 3)`, and (file, row group, bytes) of each shard; built once and kept on disk."""
    key = Hasher.hash([fingerprint, remove_ties, INDEX_VERSION])
    path = Path(cache_dir or datasets.config.HF_DATASETS_CACHE, "mapo_index", f"{key}.safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    # One process builds the index. The others wait for the lock, which unlike a barrier has no time limit.
    with FileLock(f"{path}.lock"):
        if not path.exists():
            tensors = build_index(rows, remove_ties)
            write_atomically(path, lambda temporary_path: safetensors.torch.save_file(tensors, temporary_path))
    tensors = safetensors.torch.load_file(path)
    return tensors["index"].numpy(), tensors["row_groups"].tolist()


def open_dataset(name, config_name, cache_dir, revision):
    """Dataset builder of a local folder or file, or of a dataset on the hub at `revision` (default: the latest)."""
    if not os.path.exists(name):
        builder = datasets.load_dataset_builder(name, config_name, cache_dir=cache_dir, revision=revision)
        if revision is not None and builder.hash != revision:
            raise TrainingError(f"--dataset_name {name}: the run used commit {revision}, which cannot be reached.")
        return builder

    name = os.path.abspath(name)
    if glob.has_magic(name):
        raise TrainingError(f"--dataset_name: `datasets` reads *, ? and [ as patterns; rename {name}.")
    file = None
    if os.path.isfile(name):
        name, file = os.path.split(name)
    return datasets.load_dataset_builder(name, config_name, data_files=file, cache_dir=cache_dir)


class Split(NamedTuple):
    """The pairs of a split, or of several."""

    names: list
    rows: PreparedRows | StreamedRows
    index: np.ndarray
    fingerprint: list  # of the data, for caches
    commit: str | None  # of a dataset on the hub


def open_split(args, name, flag, revision):
    """The Split `name`, or several: a+b. `flag` is named in error messages."""
    dataset_name = args.dataset_name
    builder = open_dataset(dataset_name, args.dataset_config_name, args.cache_dir, revision)
    streams = builder.as_streaming_dataset()
    if name is None:
        name = next(iter(streams)) if len(streams) == 1 else "train"
    names = name.split("+")
    for part in names:
        if part not in streams:
            raise TrainingError(f"--{flag}: {dataset_name} has no split {part!r} (splits: {list(streams)}).")

    features = streams[names[0]].features
    if args.streaming:
        if builder.config.data_files is None:  # loaded from the local cache, without the original files
            raise TrainingError(
                f"--streaming: {dataset_name} cannot be reached, and is only in the cache. Leave out --streaming."
            )
        files = list(itertools.chain.from_iterable(builder.config.data_files[part] for part in names))
        if not all(file.endswith(".parquet") for file in files):
            raise TrainingError(f"--streaming reads parquet files only, and {dataset_name} contains other formats.")
        rows = StreamedRows(files, find_columns(args, features), args.shuffle_shards)
    else:
        # Report wrong columns before the download. Some formats, like JSON lines, only have features after it.
        if features is not None:
            find_columns(args, features)
        builder.download_and_prepare()
        prepared = builder.as_dataset(name)
        rows = PreparedRows(prepared, find_columns(args, prepared.features))

    fingerprint = [builder.cache_dir, name, args.streaming, rows.columns.all()]
    index, row_groups = load_index(rows, fingerprint, args.remove_ties, args.cache_dir)
    if args.streaming:
        rows.row_groups = row_groups
    return Split(
        names=names,
        rows=rows,
        index=index,
        fingerprint=fingerprint,
        commit=builder.hash if builder.repo_id is not None else None,
    )


def hold_out(index, number):
    """The first `number` pairs of an index: those of the first caption, then of the second, and so on."""
    caption_numbers, _ = pd.factorize(index[:, CAPTION])  # in the order in which captions first appear
    by_caption = np.argsort(caption_numbers, kind="stable")
    return index[np.sort(by_caption[:number])]


def load_pairs(args, latent_shape, num_train_timesteps, revision=None):
    """The PairDatasets of the training pairs and of the held-out ones."""
    split = open_split(args, args.dataset_split_name, "dataset_split_name", revision)

    # Hold out the first pairs, caption by caption, or another split.
    if args.validation_split is None:
        held_out_split = split
        held_out = hold_out(split.index, args.num_validation_pairs or 0)
    else:
        held_out_split = open_split(args, args.validation_split, "validation_split", split.commit)
        held_out = held_out_split.index[: args.num_validation_pairs]
        if set(split.names) & set(held_out_split.names):
            raise TrainingError(f"--validation_split {args.validation_split} is also trained on.")

    # No held-out caption is trained on.
    shared = np.isin(split.index[:, CAPTION], held_out[:, CAPTION])
    index = split.index[~shared]
    left_out = shared.sum()
    if args.validation_split is None:
        left_out -= len(held_out)  # the held-out pairs themselves
    if left_out > 0:
        logger.warning(f"{left_out} training pairs are left out, because their captions are held out.")

    if args.max_train_samples is not None:
        subset = np.random.default_rng(args.seed).permutation(len(index))[: args.max_train_samples]
        index = index[np.sort(subset)]
    if len(index) == 0 or (args.validation_split is not None and len(held_out) == 0):
        raise TrainingError(
            f"--dataset_name {args.dataset_name}: {len(index)} pairs left for training, {len(held_out)} held out. "
            "Ties and held-out captions are not trained on."
        )
    return (
        PairDataset(args, split, index, latent_shape, num_train_timesteps),
        PairDataset(args, held_out_split, held_out, latent_shape, num_train_timesteps, held_out=True),
    )


def epoch_order(index, seed, epoch, layout):
    """`(pairs,)` numbers of the pairs of `index`, in the order of one epoch."""
    num_pairs = len(index)
    rng = np.random.default_rng([seed, epoch])

    # 1. Put the shards in a random order; the pairs of a shard stay together.
    num_shards = int(index[-1, SHARD]) + 1
    shard_place = rng.permutation(num_shards)[index[:, SHARD]]
    pairs = np.argsort(shard_place, kind="stable")

    # 2. Decide which lane fills which slot (a position in the epoch). Turns continue across epochs.
    slot_lane = layout.lane(epoch * num_pairs + np.arange(num_pairs))
    slots = np.argsort(slot_lane, kind="stable")  # the slots of lane 0, then those of lane 1, ...

    # 3. Give each lane its stretch of the pairs, shuffled inside blocks of `shards_mixed` shards.
    order = np.empty(num_pairs, dtype=np.int64)
    start = 0
    for size in np.bincount(slot_lane, minlength=layout.lanes):
        stretch = pairs[start : start + size]
        new_shard = np.diff(shard_place[stretch], prepend=shard_place[stretch[:1]]) != 0
        block = np.cumsum(new_shard) // layout.shards_mixed
        order[slots[start : start + size]] = stretch[np.lexsort((rng.random(size), block))]
        start += size
    return order


def training_batches(index, seed, layout, batch_size, pairs_seen, process_index, num_processes):
    """Yield a process's batches (lists of visits) endlessly, starting after `pairs_seen` pairs."""
    num_pairs = len(index)
    epoch = None
    order = None
    for start in itertools.count(pairs_seen + process_index * batch_size, num_processes * batch_size):
        batch = []
        for position in range(start, start + batch_size):
            if position // num_pairs != epoch:
                epoch = position // num_pairs
                order = epoch_order(index, seed, epoch, layout)
            batch.append(Visit(position, int(order[position % num_pairs]), layout.lane(position)))
        yield batch


# By default, Pillow refuses PNG files with more than 1 MiB of metadata, e.g. a workflow or a color profile.
PngImagePlugin.MAX_TEXT_CHUNK = 2**31 - 1
PngImagePlugin.MAX_TEXT_MEMORY = 2**31 - 1


def decode_image(value):
    """Decode an image to RGB: upright, and composited over white where it is transparent."""
    if not isinstance(value, dict):
        value = {"bytes": value, "path": None}
    if not value.get("bytes") and not value.get("path"):
        raise UnusableRow("has no image")
    try:
        # Images may also be separate files, on disk, in an archive or on the hub; `datasets` reads them all.
        image = datasets.Image().decode_example(value)  # applies the EXIF orientation
        # Pillow's own conversion clips 16-bit grey, whose mode is "I;16", or "I" in older versions.
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # Pillow and file systems raise all kinds
        raise UnusableRow(f"has an image that cannot be read ({describe(error)})") from error


def crop_image(image, resolution, crop_fractions, flip):
    """Resize the shorter side, optionally flip, and crop: `(3, resolution, resolution)` uint8, and (top, left)."""
    scale = resolution / min(image.size)
    width = max(resolution, round(image.width * scale))
    height = max(resolution, round(image.height * scale))
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise UnusableRow(f"has an image of {image.width} x {image.height} pixels, too large or too narrow")
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    if flip:
        image = ImageOps.mirror(image)

    top = round((height - resolution) * crop_fractions[0])
    left = round((width - resolution) * crop_fractions[1])
    image = image.crop((left, top, left + resolution, top + resolution))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1), (top, left)


def load_pair(record, columns, resolution, crop_fractions, flip):
    """
    One row as caption, labels, images and micro-conditioning, in the order of its columns.

    Returns:
        `caption`, `labels` (two numbers), `pixel_values` `(2, 3, resolution, resolution)` uint8, and `add_time_ids`
        `(2, 6)`.

    Raises:
        UnusableRow: one of them is missing or broken.
    """
    caption = record[columns.caption]
    if not isinstance(caption, str):
        raise UnusableRow(f"has {str(caption)[:80]!r} instead of text in column {columns.caption}")

    labels = [1.0, 0.0]
    if columns.labels:
        labels = []
        for name in columns.labels:
            label = math.nan if record[name] is None else float(record[name])
            if math.isnan(label):
                raise UnusableRow(f"has no {name}")
            labels.append(label)

    pixel_values = []
    add_time_ids = []
    for name in columns.images:
        image = decode_image(record[name])
        pixels, top_left = crop_image(image, resolution, crop_fractions, flip)
        pixel_values.append(pixels)
        add_time_ids.append([image.height, image.width, *top_left, resolution, resolution])
    return {
        "caption": caption,
        "labels": labels,
        "pixel_values": torch.stack(pixel_values),
        "add_time_ids": torch.tensor(add_time_ids),
    }


class PairDataset(Dataset):
    """Turns visits into tensors. Unusable rows are logged, and replaced by the next usable one."""

    def __init__(self, args, split, index, latent_shape, num_train_timesteps, held_out=False):
        self.split = split
        self.rows = split.rows
        self.index = index  # the rows of the split's index that belong to this dataset
        self.latent_shape = latent_shape
        self.num_train_timesteps = num_train_timesteps
        self.held_out = held_out
        self.cache = None  # folder of the encoded pairs, with --cache_latents

        self.seed = args.seed
        self.resolution = args.resolution

        # Held-out pairs look the same whenever they are evaluated.
        self.flip_at_random = not args.no_hflip and not held_out
        self.crop_at_random = args.random_crop and not held_out
        self.label_noise_prob = 0.0 if held_out else args.label_noise_prob

    def row_name(self, pair):
        name = self.rows.row_name(self.index[pair, SHARD], self.index[pair, ROW])
        return f"held-out {name}" if self.held_out else name

    def cached_file(self, pair):
        # At most 1,000 files per folder.
        return self.cache / f"{pair // 1000:04d}" / f"{pair % 1000:03d}.safetensors"

    def __getitem__(self, visit):
        for skipped in range(min(len(self.index), MAX_SKIPPED)):
            pair = (visit.pair + skipped) % len(self.index)
            try:
                return {**self.load(visit._replace(pair=pair)), "row": self.row_name(pair), "skipped": skipped}
            except UnusableRow as error:
                reason = str(error)
            # Workers have no accelerate state, which `logger` needs.
            logging.getLogger(__name__).warning(f"Skipped {self.row_name(pair)}: it {reason}.")

        first = self.row_name(visit.pair)
        raise UnusableRow(f"no row from {first} to {self.row_name(pair)} can be used; the last one {reason}")

    def load(self, visit):
        """The tensors of a visit. Raises UnusableRow."""
        # Sample everything regardless of the flags, so that no flag changes what the others get. Held-out pairs get
        # the same numbers under any seed; the leading 0 separates them from those of training.
        entropy = (0, visit.position) if self.held_out else (1, self.seed, visit.position)
        seed = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
        label_noise, tie, flip, crop_top, crop_left = np.random.default_rng(seed).random(5)
        generator = torch.Generator().manual_seed(int(seed[0]))
        timestep = torch.randint(self.num_train_timesteps, (), generator=generator)
        latent_noise = torch.randn(self.latent_shape, generator=generator)
        posterior_noise = torch.randn((2, *self.latent_shape), generator=generator)

        # Load the images, or their cached latents.
        flipped = bool(flip < 0.5 and self.flip_at_random)
        if self.cache is not None:
            tensors = read_cached(self.cached_file(visit.pair), flipped)
        else:
            shard, row, _ = self.index[visit.pair]
            record = self.rows.record(shard, row, visit.lane)
            crop_fractions = (crop_top, crop_left) if self.crop_at_random else (0.5, 0.5)
            tensors = load_pair(record, self.rows.columns, self.resolution, crop_fractions, flipped)

        # Decide which image is the chosen one.
        first, second = tensors.pop("labels")
        chosen = 0 if first > second or (first == second and tie < 0.5) else 1
        if label_noise < self.label_noise_prob:
            chosen = 1 - chosen
        for name in ("pixel_values", "moments"):
            if name in tensors:
                tensors[name] = tensors[name][[chosen, 1 - chosen]]

        return {
            **tensors,
            # Both images get the chosen one's micro-conditioning: only the images may differ in a pair.
            "add_time_ids": tensors["add_time_ids"][chosen],
            "timesteps": timestep,
            "noise": latent_noise,
            "posterior_noise": posterior_noise,
        }


def collate_pairs(items):
    """
    Stack the items: the chosen images come first, then the rejected ones in the same order.

    Returns:
        `pixel_values` `(2 * pairs, 3, resolution, resolution)` uint8 and `caption`, or from a cache `moments`
        `(2 * pairs, 2, channels, height, width)`, `prompt_embeds` and `pooled_prompt_embeds`; `posterior_noise`
        `(2 * pairs, channels, height, width)`; and for each pair `noise` `(channels, height, width)`, `timesteps`,
        `add_time_ids` `(6,)`, `row` (its name) and `skipped` (unusable rows before it).
    """
    batch = default_collate(items)
    for name in ("pixel_values", "moments", "posterior_noise"):
        if name in batch:
            batch[name] = batch[name].transpose(0, 1).flatten(0, 1)
    return batch


def data_iterator(data, num_workers, **batching):
    """Iterate over `data` with `num_workers` processes; `batching` are arguments of the DataLoader."""
    loader = DataLoader(
        data,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=ignore_stop_signals,
        generator=torch.Generator(),  # otherwise every loader would use, and advance, the global one
        **batching,
    )
    iterator = iter(loader)
    # If a worker is killed, PyTorch's signal handler raises an error in the middle of whatever this process does.
    # Without the handler, the error is raised where the worker's batch is due.
    if num_workers > 0 and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return iterator


def ignore_stop_signals(worker):
    """Launchers also signal the loader's workers, but the process that reads from them shuts them down."""
    for stop_signal in STOP_SIGNALS:
        signal.signal(stop_signal, signal.SIG_IGN)


# Trained weights -----------------------------------------------------------------------------------------------------
LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "pytorch_lora_weights_kohya.safetensors"


def trained_parts(args, pipeline):
    """The modules that are trained, fully or with a LoRA, by their names in the pipeline."""
    parts = {"unet": pipeline.unet}
    if args.train_text_encoder:
        parts["text_encoder"] = pipeline.text_encoder
        parts["text_encoder_2"] = pipeline.text_encoder_2
    return parts


def full_unet_dtype(args):
    """Dtype of the UNet in full fine-tuning."""
    return torch.bfloat16 if args.full_bf16 else torch.float32


def trainable(module):
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def build_model(args, pipeline, parts):
    """Choose what is trained: the full UNet or LoRA adapters. Returns the module for accelerate to prepare."""
    unet = pipeline.unet
    if args.rank is None:
        unet.requires_grad_(True)
    else:
        add_lora(args, parts)

    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.compile:
        compile_blocks(unet, args.gradient_checkpointing)

    return UNetWithTextEncoders(pipeline) if args.train_text_encoder else unet


def compile_blocks(unet, gradient_checkpointing):
    """Compile the UNet's transformer blocks in place, so that its weights keep their names."""
    # Blocks are recompiled for each shape, to train and to sample. Past the limit, they would run eagerly.
    torch._dynamo.config.recompile_limit = 64
    torch._logging.set_logs(graph_breaks=True)  # so that a slow compilation explains itself

    # Let the compiler save only the inputs of a block, and recompute the rest inside it. Checkpointing around compiled
    # blocks saves as much memory, but takes the CPU longer.
    torch._functorch.config.activation_memory_budget = 1.0
    if gradient_checkpointing:
        torch._functorch.config.activation_memory_budget = 0.0
        for module in unet.modules():
            if isinstance(module, Transformer2DModel):
                module.gradient_checkpointing = False
    unet.compile_repeated_blocks(dynamic=False)


def find_lora_file(name, cache_dir=None):
    """The file of a LoRA: `name` itself, a file in the folder `name`, or one in a repository on the hub."""
    path = Path(name)
    if path.is_file():
        return path
    if not path.is_dir():
        return hf_hub_download(name, LORA_FILE, cache_dir=cache_dir)
    files = [path / LORA_FILE] if (path / LORA_FILE).exists() else sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise ValueError(f"it must contain {LORA_FILE} or one .safetensors file, but contains {len(files)}")
    return files[0]


def read_lora(name, unet_config=None, cache_dir=None):
    """Read a LoRA in any format that diffusers loads: {part.name as in peft: weight}, and the set of its alphas."""
    file = find_lora_file(name, cache_dir)
    with safetensors.safe_open(file, "pt") as tensors:
        if any("dora_scale" in key or "lora_magnitude_vector" in key for key in tensors.keys()):
            raise ValueError("DoRA is not supported")  # diffusers would ignore its magnitudes
    weights, alphas, metadata = StableDiffusionXLPipeline.lora_state_dict(
        str(file),
        unet_config=unet_config,
        use_safetensors=True,
        return_lora_metadata=True,
    )
    unet = {}
    text = {}
    for key, weight in weights.items():
        if key.startswith("unet."):
            unet[key] = weight
        else:
            text[key] = weight
    if text:
        text = convert_state_dict_to_peft(convert_state_dict_to_diffusers(text))

    # Kohya files have an alpha per layer. diffusers' files have the peft config of each part in their metadata, or no
    # alpha.
    found = set((alphas or {}).values())
    for setting, value in (metadata or {}).items():
        if setting.endswith(".use_rslora") and value:
            raise ValueError("rank-stabilized LoRA (use_rslora) is not supported")
        if alphas:
            continue
        if setting.endswith(".lora_alpha"):
            found.add(value)
        elif setting.endswith(".alpha_pattern"):
            found.update((value or {}).values())
    return {**convert_unet_state_dict_to_peft(unet), **text}, found


def check_lora(args, unet_config):
    """Refuse an --init_lora whose rank or alpha differs from the flags."""
    lora = f"--init_lora {args.init_lora}"
    with explain(f"{lora} cannot be loaded"):
        weights, alphas = read_lora(args.init_lora, FrozenDict(unet_config), args.cache_dir)
    ranks = {len(weight) for name, weight in weights.items() if name.startswith("unet.") and ".lora_A." in name}
    alphas = alphas or ranks
    if ranks != {args.rank} or alphas != {args.lora_alpha}:
        raise TrainingError(
            f"{lora} has rank {sorted(ranks)} and alpha {sorted(alphas)}, but --rank is {args.rank} and "
            f"--lora_alpha {args.lora_alpha:g}."
        )
    if not args.train_text_encoder and any(name.startswith("text_encoder") for name in weights):
        raise TrainingError(f"{lora} adapts the text encoders: add --train_text_encoder.")


def name_in_file(part, name):
    """The name under which a weight or layer of a part is saved."""
    # transformers 5 has a flat CLIPTextModel; other programs expect the prefix of earlier versions.
    if isinstance(part, transformers.CLIPTextModel) and not hasattr(part, "text_model"):
        return f"text_model.{name}"
    return name


def choose_lora_layers(args, part_name, part, weights):
    """Names of the layers of a part that get a LoRA: those of --init_lora, or else those that the flags name."""
    names = [name for name, _ in part.named_modules()]
    given = [name for name in names if f"{part_name}.{name_in_file(part, name)}.lora_A.weight" in weights]
    if given:
        return given
    if part_name == "unet" and weights:
        raise TrainingError(f"--init_lora {args.init_lora}: no layer matches the UNet.")

    # peft takes these as endings of names.
    endings = []
    if part_name == "unet":
        for choice in args.lora_layers:
            if choice not in LORA_LAYERS and not any(f".{name}".endswith(f".{choice}") for name in names):
                raise TrainingError(f"--lora_layers {choice} is neither a layer nor one of {list(LORA_LAYERS)}.")
            endings += LORA_LAYERS.get(choice, [choice])
    else:
        # The last layer of the first text encoder is not used: SDXL takes the hidden states before it.
        num_layers = part.config.num_hidden_layers - (1 if part_name == "text_encoder" else 0)
        for layer in range(num_layers):
            endings += [f"layers.{layer}.self_attn.{projection}" for projection in TEXT_LORA_LAYERS]
    return endings


def freeze_last_layer(text_encoder):
    """SDXL does not use the last layer of the first text encoder. It would get no gradient, which DDP refuses."""
    last = text_encoder.config.num_hidden_layers - 1
    for name, parameter in text_encoder.named_parameters():
        if f"layers.{last}." in name:
            parameter.requires_grad_(False)


def add_lora(args, parts):
    """Add LoRA adapters to the parts: new ones, or those of --init_lora. Their metadata names the base model."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    weights = {}
    if args.init_lora is not None:
        weights, _ = read_lora(args.init_lora, parts["unet"].config, args.cache_dir)
    flags = without_local_paths(args)
    for name, part in parts.items():
        config = LoraConfig(
            r=args.rank,
            lora_alpha=args.lora_alpha,
            target_modules=choose_lora_layers(args, name, part, weights),
            init_lora_weights="gaussian",
            base_model_name_or_path=flags["pretrained_unet_name_or_path"] or flags["pretrained_model_name_or_path"],
        )
        with explain(f"--lora_layers or --init_lora: peft cannot adapt the layers of the {name}"):
            inject_adapter_in_model(config, part)
        for module in part.modules():
            if isinstance(module, BaseTunerLayer):
                module.cast_input_dtype_enabled = False  # autocast would undo peft's cast to float32
        cast_training_params(part, torch.float32)
        if name == "text_encoder":
            freeze_last_layer(part)  # LoRAs of other scripts may adapt it

    if weights:
        adapted = {}  # the LoRA may lack the text encoders
        for name, part in parts.items():
            if any(key.startswith(f"{name}.") for key in weights):
                adapted[name] = part
        with explain(f"--init_lora {args.init_lora} cannot be loaded"):
            set_lora_weights(adapted, weights)


def set_lora_weights(parts, weights):
    """Copy weights from `read_lora` into the adapters of the parts. Weights and layers must match exactly."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    unused = dict(weights)
    for name, part in parts.items():
        own = {}
        for key in get_peft_model_state_dict(part, save_embedding_layers=False):
            name_of_weight = f"{name}.{name_in_file(part, key)}"
            if name_of_weight not in unused:
                raise ValueError(f"it lacks {name_of_weight}")
            own[key] = unused.pop(name_of_weight)
        set_peft_model_state_dict(part, own)
    if unused:
        raise ValueError(f"{len(unused)} of its weights have no matching layer, e.g. {next(iter(unused))}")


def gather_trained_weights(accelerator, model, parts):
    """{part: {name: weight}} of the trained parts, gathered by all processes. Only complete on the main process."""
    # Unwrapping would permanently remove DDP from a model that the launcher compiled. Remove its prefixes instead.
    state_dict = {}
    gathered = accelerator.get_state_dict(model, unwrap=False) or {}  # None on other processes with ZeRO-3
    for name, weight in gathered.items():
        state_dict[name.replace("_orig_mod.", "").removeprefix("module.")] = weight
    if len(parts) == 1:
        return {"unet": state_dict}  # the model is the UNet itself

    weights = {}
    for part_name in parts:
        prefix = f"{part_name}."
        weights[part_name] = {
            name.removeprefix(prefix): weight for name, weight in state_dict.items() if name.startswith(prefix)
        }
    return weights


def save_trained_weights(run, folder):
    """Write `pytorch_lora_weights.safetensors` or `unet/` to a folder. All processes call this."""
    weights = gather_trained_weights(run.accelerator, run.model, run.parts)
    if not run.accelerator.is_main_process:
        return
    if run.args.rank is None:
        save_unet(run.parts["unet"], weights["unet"], folder)
    else:
        save_lora(run.parts, weights, folder)


def save_unet(unet, weights, folder):
    """Write `unet/`. Loading the weights into an empty copy fails if a name still has the prefix of a wrapper."""
    # `_name_or_path` may be a local path.
    config = {name: value for name, value in unet.config.items() if name != "_name_or_path"}
    with torch.device("meta"):
        copy = UNet2DConditionModel.from_config(config)
    copy.load_state_dict(weights, assign=True)
    copy.save_pretrained(folder / "unet")


def save_lora(parts, weights, folder):
    """Write `pytorch_lora_weights.safetensors`, if no name has the prefix of a wrapper left."""
    from peft import get_peft_model_state_dict

    layers = {}
    for name, part in parts.items():
        own = get_peft_model_state_dict(part, state_dict=weights[name], save_embedding_layers=False)
        if own.keys() != get_peft_model_state_dict(part, save_embedding_layers=False).keys():
            raise TrainingError(f"The names of the LoRA weights of the {name} do not match its layers.")
        layers[f"{name}_lora_layers"] = {name_in_file(part, key): weight for key, weight in own.items()}
        layers[f"{name}_lora_adapter_metadata"] = part.peft_config["default"].to_dict()
    StableDiffusionXLPipeline.save_lora_weights(folder, **layers)


def load_trained_weights(parts, folder):
    """Load what `save_trained_weights` wrote into the same parameters, which the optimizer already refers to."""
    if (folder / "unet").exists():
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", use_safetensors=True)
        parts["unet"].load_state_dict(unet.state_dict())
    else:
        weights, _ = read_lora(folder)
        set_lora_weights(parts, weights)


def round_stochastically(weights, generator):
    """Stochastically round float32 weights to bfloat16 (the upper 16 bits), which preserves their expected value."""
    bits = torch.empty_like(weights, dtype=torch.int32).random_(2**16, generator=generator)
    return bits.add_(weights.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32).to(torch.bfloat16)


class StochasticRounding:
    """Makes a bitsandbytes optimizer update bfloat16 weights in float32, one tensor at a time, and round them."""

    @torch.no_grad()
    def update_step(self, group, p, gindex, pindex):
        # Update a copy, because DDP's buckets refer to the parameter and its gradient. bitsandbytes finds the state by
        # the parameter.
        shadow = torch.nn.Parameter(p.float())
        shadow.grad = p.grad.float()
        self.state[shadow] = self.state[p]
        super().update_step(group, shadow, gindex, pindex)
        del self.state[shadow]
        # One seed per step and parameter (SDXL has fewer than 4,096), the same on all processes and after a resume.
        generator = torch.Generator(p.device).manual_seed(2**12 * self.state[p]["step"] + pindex)
        p.copy_(round_stochastically(shadow.data, generator))


def build_optimizer(args, parameters_of_parts, pairs_per_step):
    """AdamW with 32-bit or 8-bit states, for the parameters of the UNet and then of each text encoder, if trained."""
    rates = [args.learning_rate] + [args.text_encoder_lr] * (len(parameters_of_parts) - 1)
    scale = pairs_per_step if args.scale_lr else 1
    groups = []
    for parameters, rate in zip(parameters_of_parts, rates):
        groups.append({"params": parameters, "lr": scale * rate})
    options = {
        "lr": scale * args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.adam_weight_decay,
    }
    if not args.use_8bit_adam:
        return torch.optim.AdamW(groups, fused=True, **options)  # unfused, it allocates copies as large as the weights

    import bitsandbytes

    if not args.full_bf16:
        return bitsandbytes.optim.AdamW8bit(groups, **options)

    class RoundedAdamW8bit(StochasticRounding, bitsandbytes.optim.AdamW8bit):
        pass

    return RoundedAdamW8bit(groups, **options)


def build_schedule(args, optimizer, step):
    """The learning rate schedule from `step` on. It counts optimizer steps, whatever the number of processes."""
    # The schedule multiplies this rate. PyTorch only sets it at step 0, and a resumed run may have another rate.
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        # The polynomial schedule divides by the number of steps after the warmup, which must not be 0.
        num_training_steps=max(args.max_train_steps, args.lr_warmup_steps + 1),
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
        last_epoch=step - 1,
    )


# Cache ---------------------------------------------------------------------------------------------------------------
PAIRS_PER_ROUND = 16  # pairs per process between synchronizations


class PairsToEncode(Dataset):
    """The images of a pair, unflipped and, if training flips, flipped; or why the pair is unusable."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, pair):
        dataset = self.dataset
        columns = dataset.rows.columns
        shard, row, _ = dataset.index[pair]
        try:
            record = dataset.rows.record(shard, row, lane=0)
            item = load_pair(record, columns, dataset.resolution, (0.5, 0.5), flip=False)
            orientations = [item["pixel_values"]]
            if dataset.flip_at_random:
                flipped = load_pair(record, columns, dataset.resolution, (0.5, 0.5), flip=True)
                orientations.append(flipped["pixel_values"])
            return {**item, "pixel_values": torch.stack(orientations, dim=1)}
        except UnusableRow as reason:
            return {"unusable": str(reason)}


def unusable_file(path):
    """The file that says why a pair is not cached. The next run tries again: an image may have been out of reach."""
    return path.with_suffix(".json")


def read_cached(path, flipped):
    """A pair as `load_pair` returns it, but with `moments` `(2, 2, channels, height, width)` and prompt embeddings."""
    if not path.exists():
        raise UnusableRow(json.loads(unusable_file(path).read_text()))
    with safetensors.safe_open(path, framework="pt") as file:
        return {
            "labels": json.loads(file.metadata()["labels"]),
            "moments": file.get_slice("moments")[:, int(flipped)],
            "add_time_ids": file.get_tensor("add_time_ids"),
            "prompt_embeds": file.get_tensor("prompt_embeds"),
            "pooled_prompt_embeds": file.get_tensor("pooled_prompt_embeds"),
        }


@torch.no_grad()
def encode_to_file(pipeline, item, path, vae_batch_size):
    """Encode a pair of PairsToEncode, and write it, or the reason why it is unusable."""
    device = pipeline.vae.device
    unusable = item.get("unusable")
    if unusable is None:
        pixel_values = item["pixel_values"].to(device)
        moments = encode_images(pipeline.vae, pixel_values.flatten(0, 1), vae_batch_size)
        if not moments.isfinite().all():
            unusable = "has an image that the VAE encodes to NaN"
    if unusable is not None:
        write_atomically(unusable_file(path), lambda temporary_path: temporary_path.write_text(json.dumps(unusable)))
        return

    input_ids = tokenize(pipeline, [item["caption"]]).to(device)
    prompt_embeds, pooled_prompt_embeds = encode_prompts(pipeline, input_ids)
    tensors = {
        "moments": moments.unflatten(0, pixel_values.shape[:2]),
        "add_time_ids": item["add_time_ids"],
        "prompt_embeds": prompt_embeds[0],
        "pooled_prompt_embeds": pooled_prompt_embeds[0],
    }
    metadata = {"labels": json.dumps(item["labels"])}
    write_atomically(path, lambda temporary_path: safetensors.torch.save_file(tensors, temporary_path, metadata))


def hash_weights(module):
    """Hash of a module's weights, one tensor at a time to save memory."""
    digest = hashlib.sha256()
    for name, weight in module.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.flatten().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


def describe_encoders(args, pipeline):
    """The flags and models that affect what is cached."""
    contents = [args.resolution, args.allow_tf32]
    for module in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        contents += [str(module), str(module.config), hash_weights(module)]
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
        contents += [tokenizer("", padding="max_length").input_ids, tokenizer.backend_tokenizer.to_str()]
    return contents


def fill_cache(args, accelerator, pipeline, pairs, encoder_key):
    """Encode the pairs of a dataset that are not yet in its cache: a folder per setting, with a file per pair."""
    key = Hasher.hash(
        {
            "encoders": encoder_key,
            "split": pairs.split.fingerprint,
            "index": pairs.index,
            "flip": pairs.flip_at_random,
        }
    )
    pairs.cache = Path(args.cache_dir or datasets.config.HF_DATASETS_CACHE, "mapo_latents", key)

    # All processes need the same list of missing pairs, so list them before any process writes.
    missing = from_main_process(lambda: [n for n in range(len(pairs.index)) if not pairs.cached_file(n).exists()])

    # Split them between the processes, and again between the workers of each, in stretches, so that few row groups of
    # a stream are read twice. The loader asks its workers in turn, so item i of `order` is of worker i % num_workers.
    own = np.array_split(missing, accelerator.num_processes)[accelerator.process_index]
    num_workers = max(args.dataloader_num_workers, 1)
    order = np.empty(len(own), dtype=np.int64)
    for worker, share in enumerate(np.array_split(own, num_workers)):
        order[worker::num_workers] = share
    order = order.tolist()
    items = data_iterator(PairsToEncode(pairs), args.dataloader_num_workers, batch_size=None, sampler=order)

    # Synchronize after each round, so that all processes stop soon after one fails.
    bar = tqdm(desc="Encoding pairs", total=len(order), disable=not accelerator.is_local_main_process)
    for start in range(0, math.ceil(len(missing) / accelerator.num_processes), PAIRS_PER_ROUND):
        with raise_on_all_ranks(f"--cache_latents: pairs could not be encoded into {pairs.cache}"):
            for pair in order[start : start + PAIRS_PER_ROUND]:
                encode_to_file(pipeline, next(items), pairs.cached_file(pair), args.vae_encode_batch_size)
                bar.update()


def fill_caches(args, accelerator, pipeline, *data):
    """Fill the caches of these datasets, and move the encoders off the device."""
    encoder_key = from_main_process(describe_encoders, args, pipeline)
    for pairs in data:
        fill_cache(args, accelerator, pipeline, pairs, encoder_key)
    for module in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        module.to("cpu")


# Checkpoints ---------------------------------------------------------------------------------------------------------
#
# A checkpoint is complete exactly when its state file can be read: it is written last, after everything else is on the
# disk, and removed first. It contains the progress and the settings. The other files are the trained weights, in
# diffusers' format, and the optimizer's state, in accelerate's (FSDP and DeepSpeed add sharded weights).
STATE_FILE = "mapo_state.json"
# Settings whose change is refused when a run resumes, and those that may change silently. All others are logged.
FIXED_ON_RESUME = [
    "rank",
    "lora_alpha",
    "lora_layers",
    "init_lora",
    "train_text_encoder",
    "use_8bit_adam",
    "full_bf16",
    "mixed_precision",
    "streaming",
    "shuffle_shards",  # the order mixes as many shards as are kept in memory
    "seed",
    "sharding",
]
FREE_ON_RESUME = ["resume_from_checkpoint", "max_train_steps", "hub_token", "output_dir"]


@dataclass
class Progress:
    """Training progress: plain values, equal on all processes. Checkpoints contain all of it."""

    run_id: str
    layout: Layout
    index_hash: str  # of the training pairs
    # Commits of what is on the hub.
    model_commit: str | None = None  # of the base model
    unet_commit: str | None = None  # of --pretrained_unet_name_or_path
    vae_commit: str | None = None  # of --pretrained_vae_model_name_or_path
    dataset_commit: str | None = None
    step: int = 0
    pairs_seen: int = 0
    rows_read: int = 0  # pairs seen plus bad rows
    rows_bad: int = 0
    skipped_steps: int = 0
    bad_steps: int = 0  # skipped in a row, up to now
    first_eval: dict | None = None  # step and held-out metrics of the first validation

    def count_step(self, pairs, bad_rows, finite):
        self.step += 1
        self.pairs_seen += pairs
        self.rows_read += pairs + bad_rows
        self.rows_bad += bad_rows
        if finite:
            self.bad_steps = 0
        else:
            self.bad_steps += 1
            self.skipped_steps += 1


class Checkpoint(NamedTuple):
    folder: Path
    progress: Progress
    settings: dict  # see `checkpoint_settings`


def read_checkpoint(folder):
    """The checkpoint in a folder, or None if it is not complete."""
    try:
        state = json.loads((folder / STATE_FILE).read_text())
    except (OSError, ValueError):
        return None
    try:
        settings = state.pop("settings")
        layout = Layout(**state.pop("layout"))
        return Checkpoint(folder, Progress(layout=layout, **state), settings)
    except (KeyError, TypeError) as error:
        raise TrainingError(
            f"{folder} was written by another version of this script. Resume it with that version."
        ) from error


def list_checkpoints(output_dir):
    """Complete checkpoints, oldest first. Other folders, like a copy named checkpoint-40-good, are left alone."""
    checkpoints = []
    for folder in Path(output_dir).glob("checkpoint-*"):
        if folder.name.removeprefix("checkpoint-").isdecimal():
            checkpoint = read_checkpoint(folder)
            if checkpoint is not None:
                checkpoints.append(checkpoint)
    return sorted(checkpoints, key=lambda checkpoint: checkpoint.progress.step)


def find_checkpoint(output_dir, name):
    """The checkpoint to resume from, or None to start a new run."""
    existing = list_checkpoints(output_dir)
    checkpoint = None
    if name == "latest":
        checkpoint = existing[-1] if existing else None
    elif name is not None:
        folder = Path(name) if Path(name).exists() else Path(output_dir, name)
        checkpoint = read_checkpoint(folder)
        if checkpoint is None:
            raise TrainingError(f"--resume_from_checkpoint {name}: {folder} is not a complete checkpoint.")

    # In a folder with checkpoints of the same run, it continues. Elsewhere, this is a new run with a new id, because
    # the old one may still continue.
    run_id = None
    step = 0
    if checkpoint is not None:
        progress = checkpoint.progress
        if all(other.progress.run_id != progress.run_id for other in existing):
            progress.run_id = os.urandom(4).hex()
        run_id = progress.run_id
        step = progress.step
    refuse_other_runs(output_dir, existing, run_id, step)
    return checkpoint


def refuse_other_runs(output_dir, existing, run_id, step):
    """Refuse a folder with results or checkpoints of another run, or with checkpoints of later steps of this run."""
    own = []
    obstacles = []
    for other in existing:
        if other.progress.run_id == run_id and other.progress.step <= step:
            own.append(other.folder)
        else:
            obstacles.append(other.folder)
    if not own:  # results without a checkpoint of this run belong to another run
        for path in (Path(output_dir, LORA_FILE), Path(output_dir, "unet")):
            if path.exists():
                obstacles.append(path)

    if obstacles:
        advice = "Choose another folder"
        if existing:
            advice += ", or continue that run with --resume_from_checkpoint latest"
        raise TrainingError(f"--output_dir {output_dir} already contains {obstacles[0].name}. {advice}.")


def count_pairs_per_step(args, accelerator):
    return args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps


def checkpoint_settings(args, accelerator):
    """The flags, pairs per step, and how weights are sharded. Without sharding, the number of processes is free."""
    settings = {name: value for name, value in vars(args).items() if name not in FREE_ON_RESUME}
    settings["mixed_precision"] = accelerator.mixed_precision
    settings["pairs_per_step"] = count_pairs_per_step(args, accelerator)
    settings["sharding"] = "none"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        stage = accelerator.state.deepspeed_plugin.zero_stage
        settings["sharding"] = f"DeepSpeed ZeRO-{stage} over {accelerator.num_processes} processes"
    if accelerator.distributed_type == DistributedType.FSDP:
        settings["sharding"] = f"FSDP over {accelerator.num_processes} processes"
    return settings


def check_settings(checkpoint, settings):
    """Refuse or report settings that differ from those of the checkpoint."""
    for name, old in checkpoint.settings.items():
        new = settings.get(name)
        if new == old:
            continue
        if name in FIXED_ON_RESUME:
            raise TrainingError(f"--resume_from_checkpoint: {name} is {new}, but {old} in {checkpoint.folder}.")
        logger.warning(f"--resume_from_checkpoint: {name} changed from {old} to {new}.")


def start_progress(args, accelerator, checkpoint, pairs, models):
    """Progress of a new run, or that of the checkpoint."""
    index_hash = hashlib.sha256(pairs.index.tobytes()).hexdigest()[:16]
    commits = {"dataset_commit": pairs.split.commit}
    for kind in MODEL_FLAGS:
        commits[f"{kind}_commit"] = models[kind]["revision"] if kind in models else None

    if checkpoint is not None:
        if checkpoint.progress.index_hash != index_hash:
            logger.warning(f"--resume_from_checkpoint: {checkpoint.folder} was trained on different pairs.")
        return replace(checkpoint.progress, index_hash=index_hash, **commits)

    lanes = accelerator.num_processes * max(args.dataloader_num_workers, 1) if args.streaming else 1
    return Progress(
        run_id=from_main_process(lambda: os.urandom(4).hex()),
        layout=Layout(shards_mixed=args.shuffle_shards, lanes=lanes, turn=args.train_batch_size),
        index_hash=index_hash,
        **commits,
    )


def save_checkpoint(run):
    """Write checkpoint-{step}, then remove the oldest ones beyond --checkpoints_total_limit."""
    args = run.args
    folder = Path(args.output_dir, f"checkpoint-{run.progress.step}")
    settings = checkpoint_settings(args, run.accelerator)
    message = f"{folder} could not be written; older checkpoints are untouched"
    with raise_on_all_ranks_if_unsharded(run.accelerator, message):
        folder.mkdir(exist_ok=True)
        save_trained_weights(run, folder)
        run.accelerator.save_state(folder)
    run.accelerator.wait_for_everyone()

    # All processes have written. Complete the checkpoint, and only then remove older ones.
    with raise_on_all_ranks(message):
        if run.accelerator.is_main_process:
            for path in (*folder.rglob("*"), folder):
                sync_to_disk(path)
            state = json.dumps({**asdict(run.progress), "settings": settings}, indent=2)
            write_atomically(folder / STATE_FILE, lambda temporary_path: temporary_path.write_text(state))
            sync_to_disk(folder.parent)
    if run.accelerator.is_main_process and args.checkpoints_total_limit is not None:
        remove_old_checkpoints(args.output_dir, args.checkpoints_total_limit)
    logger.info(f"Saved {folder}")


def remove_old_checkpoints(output_dir, limit):
    for checkpoint in list_checkpoints(output_dir)[:-limit]:
        try:
            if checkpoint.folder.is_symlink():
                checkpoint.folder.unlink()  # keep what somebody moved elsewhere
            else:
                (checkpoint.folder / STATE_FILE).unlink()
                shutil.rmtree(checkpoint.folder)
        except OSError as error:
            logger.warning(f"--checkpoints_total_limit: {checkpoint.folder} cannot be removed ({describe(error)}).")


def load_checkpoint(accelerator, parts, optimizer, checkpoint):
    """Load trained weights and optimizer states. Learning rate, betas and decay come from the flags instead."""
    from_flags = []
    for group in optimizer.param_groups:
        # `fused` stays as saved: it says on which device the saved step counters are.
        from_flags.append({name: value for name, value in group.items() if name not in ("params", "fused")})

    message = f"--resume_from_checkpoint {checkpoint.folder} cannot be loaded"
    with raise_on_all_ranks_if_unsharded(accelerator, message):
        if read_checkpoint(checkpoint.folder) is None:
            raise TrainingError(f"{checkpoint.folder} is not on all machines: checkpoints must be on shared storage.")
        if checkpoint.settings["sharding"] == "none":
            load_trained_weights(parts, checkpoint.folder)
        accelerator.load_state(checkpoint.folder)

    for group, values in zip(optimizer.param_groups, from_flags):
        group.update(values)


# Validation ----------------------------------------------------------------------------------------------------------
BANDS = 4  # ranges of timesteps, for accuracy and margin
HELD_OUT_LANE = -1  # keeps its row groups apart from those of training


def held_out_batches(run):
    """Yield (number of pairs, batch) of the held-out pairs of this process. Batches of 0 pairs are padding."""
    accelerator = run.accelerator
    num_pairs = len(run.held_out.index)
    num_batches = math.ceil(num_pairs / (run.args.train_batch_size * accelerator.num_processes))

    # Every process gets the same number of batches, because FSDP and ZeRO-3 gather weights in each forward pass.
    sizes = []
    visits = []
    chunks = np.array_split(np.arange(num_pairs), num_batches * accelerator.num_processes)
    for chunk in chunks[accelerator.process_index :: accelerator.num_processes]:
        sizes.append(len(chunk))
        if len(chunk) == 0:
            chunk = [0]  # padding
        visits.append([Visit(int(pair), int(pair), HELD_OUT_LANE) for pair in chunk])
    batches = data_iterator(
        run.held_out, run.args.dataloader_num_workers, batch_sampler=visits, collate_fn=collate_pairs
    )
    for size in sizes:
        with raise_on_all_ranks("The held-out pairs cannot be read"):
            batch = next(batches)
        yield size, batch


@torch.no_grad()
def evaluate_pairs(run):
    """
    Log and return the eval_ metrics: METRICS of the held-out pairs, with fixed noise and timesteps.

    Accuracy and margin are also given in bands of noise level, because the mean over timesteps hides failures at one
    end.
    """
    accelerator = run.accelerator
    num_train_timesteps = run.noise_scheduler.config.num_train_timesteps
    sums = torch.zeros(BANDS, len(METRICS), dtype=torch.float64, device=accelerator.device)
    counts = torch.zeros(BANDS, dtype=torch.float64, device=accelerator.device)
    for size, batch in held_out_batches(run):
        _, metrics = preference_loss(run, batch)
        if size > 0:
            bands = (batch["timesteps"] * BANDS // num_train_timesteps).to(accelerator.device)
            sums.index_add_(0, bands, metrics.T)
            counts += torch.bincount(bands, minlength=BANDS)
    sums = accelerator.reduce(sums).cpu()
    counts = accelerator.reduce(counts).cpu()

    means = sums.sum(dim=0) / counts.sum()
    results = {f"eval_{name}": mean for name, mean in zip(METRICS, means.tolist())}
    summary = ", ".join(f"{name} {value:.4g}" for name, value in results.items())
    logger.info(f"Step {run.progress.step}: {summary}")

    for name in ("accuracy", "margin"):
        band_sums = sums[:, METRICS.index(name)].tolist()
        for band, (total, count) in enumerate(zip(band_sums, counts.tolist())):
            first = num_train_timesteps * band // BANDS
            last = num_train_timesteps * (band + 1) // BANDS - 1
            if count > 0:
                results[f"eval_{name}_t{first}_{last}"] = total / count
    with ignoring_tracker_errors(accelerator):
        accelerator.log(results, step=run.progress.step)
    return results


def warn_if_diverging(args, first, last):
    """Warn if the model diverges, judging by its first and its last held-out metrics."""
    advice = "try a smaller --learning_rate"
    if args.loss_type == "mapo_v1":
        advice += " or a smaller --beta_mapo"
    elif args.beta_mapo != math.inf:
        advice += " or a larger --beta_mapo"

    chosen = last["eval_chosen_mse"]
    if not chosen <= 1.01 * first["eval_chosen_mse"]:  # or NaN
        logger.warning(
            f"eval_chosen_mse has risen ({chosen:.4g} at step {last['step']}, {first['eval_chosen_mse']:.4g} at step "
            f"{first['step']}): {advice}."
        )
    rejected = last["eval_rejected_mse"]
    if not rejected <= max(1, first["eval_rejected_mse"]):
        logger.warning(
            f"eval_rejected_mse is {rejected:.4g} at step {last['step']}. Predicting zero already gives 1, so samples "
            f"are broken: {advice}."
        )


def validate(run):
    """Log the eval_ metrics and an image grid (left: before training, right: after this step). Returns the metrics."""
    args = run.args
    accelerator = run.accelerator
    step = run.progress.step
    run.model.eval()

    metrics = {}
    if len(run.held_out.index) > 0:
        metrics = evaluate_pairs(run)
        point = {"step": step, **metrics}
        if run.progress.first_eval is None:
            run.progress.first_eval = point
        warn_if_diverging(args, run.progress.first_eval, point)

    # At step 0, both would be the same.
    if run.base_images and step > 0:
        images = generate_images(args, accelerator, run.pipeline)
        cells = []
        for base_image, image in zip(run.base_images, images):
            cells += [base_image, image]
        grid = diffusers.utils.make_image_grid(cells, rows=len(images), cols=2)
        if accelerator.is_main_process:
            save_grid(run, grid)

    run.model.train()
    return metrics


def save_grid(run, grid):
    """Write a picture to `validation/`, and send it to the trackers."""
    step = run.progress.step
    path = Path(run.args.output_dir, "validation", f"step-{step:06d}.png")
    try:
        path.parent.mkdir(exist_ok=True)
        grid.save(path)
    except OSError as error:
        logger.warning(f"{path} could not be written ({describe(error)}).")
    with ignoring_tracker_errors(run.accelerator):
        for tracker in run.accelerator.trackers:
            images = {"validation": np.asarray(grid)[None]}
            if tracker.name == "tensorboard":
                tracker.log_images(images, step=step, dataformats="NHWC")
            else:
                tracker.log_images(images, step=step)


# Results -------------------------------------------------------------------------------------------------------------
MODEL_CARD = """---
{{ card_data }}
---

# {{ name }}

{{ kind }} of `{{ base }}`, fine-tuned for {{ step }} steps on the preference pairs of `{{ dataset }}` with
[MaPO](https://arxiv.org/abs/2406.06424), objective `{{ loss_type }}` at beta {{ beta }}.
{{ picture }}
```python
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

pipeline = StableDiffusionXLPipeline.from_pretrained("{{ base }}")
{{ load }}
image = pipeline.to("cuda")("a lighthouse on a cliff at dusk").images[0]
```

```json
{{ details }}
```
"""


def without_local_paths(args):
    """{flag: value} without --hub_token. Local paths are reduced to their last part."""
    flags = {}
    for name, value in vars(args).items():
        if name == "hub_token":
            continue
        if isinstance(value, str) and (os.path.isabs(value) or os.path.exists(value)):
            value = Path(value).absolute().name
        flags[name] = value
    return flags


def write_model_card(args, metrics, progress):
    """Write README.md: base model, dataset, metrics, flags, and how to load the weights."""
    output_dir = Path(args.output_dir)
    card = output_dir / "README.md"
    # Our cards have both tags. Those of other scripts, and of the pair maker's datasets, have one of them.
    if card.exists() and not all(f"- {tag}\n" in card.read_text() for tag in ("diffusers-training", "mapo")):
        logger.warning(f"{card} is not a model card of this script. It is kept, and no model card is written.")
        return

    flags = without_local_paths(args)
    other_unet = flags["pretrained_unet_name_or_path"]
    if args.rank is None:
        load = 'pipeline.unet = UNet2DConditionModel.from_pretrained("FOLDER_OR_REPO", subfolder="unet")'
    elif other_unet is None:
        load = 'pipeline.load_lora_weights("FOLDER_OR_REPO")'
    else:
        load = (
            f'pipeline.unet = UNet2DConditionModel.from_pretrained("{other_unet}", subfolder="unet")\n'
            'pipeline.load_lora_weights("FOLDER_OR_REPO")'
        )
    picture = f"validation/step-{progress.step:06d}.png"
    details = {
        "metrics": metrics,
        "flags": flags,
        "commits": {
            "model": progress.model_commit,
            "unet": progress.unet_commit,
            "vae": progress.vae_commit,
            "dataset": progress.dataset_commit,
        },
        "versions": {library.__name__: library.__version__ for library in (torch, diffusers, transformers, datasets)},
    }

    # The hub refuses a local folder as the base model. Models that derive from SDXL may have other licenses.
    base = args.pretrained_model_name_or_path
    license_name = None
    if base == "stabilityai/stable-diffusion-xl-base-1.0" and other_unet is None and args.init_lora is None:
        license_name = "openrail++"
    kind_tag = "unet" if args.rank is None else "lora"
    data = ModelCardData(
        base_model=None if os.path.exists(base) else base,
        license=license_name,
        library_name="diffusers",
        tags=["stable-diffusion-xl", "text-to-image", "diffusers-training", "mapo", kind_tag],
    )
    ModelCard.from_template(
        data,
        template_str=MODEL_CARD,
        name=output_dir.resolve().name,
        kind="UNet" if args.rank is None else f"LoRA of rank {args.rank}",
        base=flags["pretrained_model_name_or_path"],
        step=progress.step,
        dataset=flags["dataset_name"],
        loss_type=args.loss_type,
        beta=args.beta_mapo,
        picture=f"\n![before and after training]({picture})\n" if (output_dir / picture).exists() else "",
        load=load,
        details=json.dumps(details, indent=2),
    ).save(card)


def write_kohya_lora(folder):
    """Also save the LoRA of a folder in Kohya format (ComfyUI, A1111, sd-scripts)."""
    weights, alphas = read_lora(folder)
    alpha = float(alphas.pop())  # the same in all layers; the converter would write the rank
    tensors = {}
    for name, weight in convert_state_dict_to_kohya(weights).items():
        tensors[name] = torch.tensor(alpha) if name.endswith(".alpha") else weight
    safetensors.torch.save_file(tensors, folder / KOHYA_FILE)


def save_results(run):
    """Write the trained weights to the output folder. Files are moved into place when they are complete."""
    output_dir = Path(run.args.output_dir)
    temporary_folder = output_dir / ".incomplete"
    message = f"{output_dir} could not be written; the checkpoints are untouched"
    with raise_on_all_ranks_if_unsharded(run.accelerator, message):
        if run.accelerator.is_main_process:
            shutil.rmtree(temporary_folder, ignore_errors=True)
            temporary_folder.mkdir()
        save_trained_weights(run, temporary_folder)
        if run.accelerator.is_main_process:
            if run.args.rank is not None and not run.args.no_kohya_format:
                write_kohya_lora(temporary_folder)
            for path in temporary_folder.rglob("*"):
                sync_to_disk(path)
            (output_dir / KOHYA_FILE).unlink(missing_ok=True)  # that of an earlier run
            for path in sorted(temporary_folder.iterdir()):
                if path.is_dir():
                    shutil.rmtree(output_dir / path.name, ignore_errors=True)
                os.replace(path, output_dir / path.name)
            temporary_folder.rmdir()
            sync_to_disk(output_dir)


def finish(run):
    """Save the trained weights first, then a checkpoint to continue from. Then validate, and write the model card."""
    args = run.args
    progress = run.progress
    save_results(run)

    # A finished run that is started again already has its last checkpoint.
    last = Path(args.output_dir, f"checkpoint-{progress.step}")
    if not from_main_process(lambda: read_checkpoint(last) is not None):
        save_checkpoint(run)

    metrics = validate(run)
    with raise_on_all_ranks(f"{args.output_dir}/README.md could not be written; the weights are saved"):
        if run.accelerator.is_main_process:
            write_model_card(args, metrics, progress)
    logger.info(f"{progress.rows_read} rows read, {progress.rows_bad} of them unusable.")


def create_hub_repo(args):
    """Create the repository before training, to fail early on a wrong name or token. Returns its id."""
    with explain("--push_to_hub: the repository cannot be created"):
        repo = create_repo(
            args.hub_model_id or Path(args.output_dir).resolve().name,
            exist_ok=True,
            private=args.hub_private_repo or None,  # None leaves it to the organization
            token=args.hub_token,
        )
    return repo.repo_id


def upload(args, repo_id):
    """Upload the output folder. A failed upload does not fail the run."""
    # The trackers' files contain the name of this machine. Hidden files are temporary.
    ignored = ["checkpoint-*/**", ".*", "*/.*", f"{Path(args.logging_dir).as_posix()}/**"]
    try:
        upload_folder(
            repo_id=repo_id,
            folder_path=args.output_dir,
            commit_message="End of training",
            token=args.hub_token,
            ignore_patterns=ignored,
        )
    except Exception as error:
        excludes = " ".join(f"--exclude '{pattern}'" for pattern in ignored)
        logger.error(
            f"--push_to_hub failed ({describe(error)}). Upload it yourself: "
            f"hf upload {repo_id} {args.output_dir} {excludes}"
        )


# Main ----------------------------------------------------------------------------------------------------------------
def start_trackers(args, accelerator, progress):
    """Start the trackers. A resumed run continues in W&B, and purges points after its checkpoint in TensorBoard."""
    config = {}
    for name, value in without_local_paths(args).items():
        config[name] = value if isinstance(value, (int, float)) else str(value)
    wandb_dir = Path(args.output_dir, args.logging_dir)
    tensorboard_options = {}
    if progress.step > 0:
        tensorboard_options["purge_step"] = progress.step + 1
    with ignoring_tracker_errors(accelerator):
        accelerator.init_trackers(
            args.tracker_name,
            config,
            init_kwargs={
                "wandb": {"dir": str(wandb_dir), "id": progress.run_id, "resume": "allow"},
                "tensorboard": tensorboard_options,
            },
        )


@contextlib.contextmanager
def only_run_in(output_dir, accelerator):
    """Refuse to run where another run is in progress. The system releases the lock however the process ends."""
    lock = FileLock(Path(output_dir, ".lock"))
    with raise_on_all_ranks(f"--output_dir {output_dir} cannot be locked"):
        if accelerator.is_main_process:
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                raise TrainingError(f"--output_dir {output_dir}: another run is writing to this folder.") from error
    try:
        yield
    finally:
        lock.release()


def configure_fsdp(args, plugin):
    """Refuse what FSDP cannot do, and sum gradients over batches and processes in float32, as DDP does."""
    if plugin.fsdp_version == 1:
        raise TrainingError("FSDP version 1 is not supported. Use launch_configs/fsdp2.yaml.")
    if args.use_8bit_adam:
        raise TrainingError("--use_8bit_adam cannot update FSDP's weights. Use launch_configs/deepspeed_zero2.yaml.")
    if plugin.state_dict_type.name != "SHARDED_STATE_DICT":
        raise TrainingError(
            f"fsdp_state_dict_type {plugin.state_dict_type.name}: a run cannot resume from it. Use SHARDED_STATE_DICT."
        )
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32)


def configure_deepspeed(args, mixed_precision, plugin):
    """Refuse what DeepSpeed cannot do, and keep gradients and trained weights in float32."""
    config = plugin.deepspeed_config
    if plugin.zero_stage == 0:
        raise TrainingError("DeepSpeed's ZeRO stage 0 is not supported. Use launch_configs/multi_gpu.yaml.")
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise TrainingError(f"The DeepSpeed config must not set the {section}; the script's flags do.")
    if args.compile and plugin.zero_stage == 3 and is_torch_version("<", "2.12"):
        raise TrainingError("--compile with ZeRO-3 needs torch 2.12: earlier versions crash or give other results.")
    if args.full_bf16:
        raise TrainingError("--full_bf16: DeepSpeed keeps float32 weights. Use launch_configs/multi_gpu.yaml.")
    if mixed_precision == "fp16":
        raise TrainingError("--mixed_precision fp16: DeepSpeed would clip gradients that are still scaled.")

    # DeepSpeed's own half-precision modes would round the trained weights as well; torch's autocast does not.
    config["fp16"] = {"enabled": False}
    config["bf16"] = {"enabled": False}
    config["torch_autocast"] = {
        "enabled": mixed_precision == "bf16",
        "dtype": "bfloat16",
        "lower_precision_safe_modules": [],
    }
    config["gradient_clipping"] = 0.0 if math.isinf(args.max_grad_norm) else args.max_grad_norm
    config["train_micro_batch_size_per_gpu"] = args.train_batch_size
    config["gradient_accumulation_steps"] = args.gradient_accumulation_steps
    config["train_batch_size"] = "auto"
    # Without this, ZeRO-3 cannot save trained weights.
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True


def configure_sharding(args, accelerator):
    """Configure FSDP or DeepSpeed, and refuse what they cannot do."""
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED) and args.train_text_encoder:
        raise TrainingError("--train_text_encoder cannot be sharded. Use launch_configs/multi_gpu.yaml.")
    if kind == DistributedType.FSDP:
        configure_fsdp(args, accelerator.state.fsdp_plugin)
    if kind == DistributedType.DEEPSPEED:
        configure_deepspeed(args, accelerator.mixed_precision, accelerator.state.deepspeed_plugin)


def build_accelerator(args):
    """Create the Accelerator, refuse what would fail later, and set up logging and global switches."""
    logging_dir = Path(args.output_dir, args.logging_dir)
    handlers = [
        AutocastKwargs(cache_enabled=not args.gradient_checkpointing),
        DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # otherwise DDP stores every gradient twice
        # Processes wait while one of them downloads the model, or writes a checkpoint to a slow disk.
        InitProcessGroupKwargs(timeout=timedelta(hours=6)),
    ]
    try:
        logging_dir.mkdir(parents=True, exist_ok=True)
        if args.cache_dir is not None:
            Path(args.cache_dir).mkdir(parents=True, exist_ok=True)
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=TRACKERS[args.report_to] or None,
            project_dir=logging_dir,
            kwargs_handlers=handlers,
        )
    except OSError as error:
        raise TrainingError(
            f"--output_dir or --cache_dir: {error.filename} cannot be written: {error.strerror}."
        ) from error
    except ValueError as error:
        raise TrainingError(
            f"accelerate cannot start (check --mixed_precision and the launch config): {error}"
        ) from error

    # Refuse what would fail later. A process that ends while others still connect to it would make them fail first.
    accelerator.wait_for_everyone()
    if accelerator.mixed_precision not in DTYPES:
        raise TrainingError(f"mixed_precision {accelerator.mixed_precision} is not supported: use no, fp16 or bf16.")
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise TrainingError("--mixed_precision fp16 needs a GPU. Use bf16 or no.")
    if accelerator.device.type == "mps":
        raise TrainingError("Apple GPUs lack float64, which the objective needs. Use launch_configs/cpu.yaml.")
    if accelerator.state.dynamo_plugin.use_regional_compilation:
        raise TrainingError("--dynamo_use_regional_compilation is not supported. Use --compile instead.")
    if accelerator.gradient_accumulation_steps != args.gradient_accumulation_steps:
        raise TrainingError(
            "--gradient_accumulation_steps: the launch config sets a different number. Remove it there."
        )
    configure_sharding(args, accelerator)

    # accelerate saves and loads the models in these lists. Empty them: checkpoints contain the trained weights in
    # diffusers' format instead.
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
    accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())

    # Logging, and PyTorch's global switches. Without --allow_tf32, TF32 is also off in convolutions, where PyTorch has
    # it on by default.
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s")
    logging.getLogger(__name__).setLevel(logging.INFO)
    for library in (datasets, transformers, diffusers):
        library.utils.logging.set_verbosity_error()
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    torch.backends.cudnn.allow_tf32 = args.allow_tf32
    return accelerator


def choose_seed(seed, checkpoint):
    """--seed, or else that of the checkpoint, or else a random one."""
    if seed is not None:
        return seed
    if checkpoint is not None:
        return checkpoint.settings["seed"]
    seed = from_main_process(lambda: int.from_bytes(os.urandom(4), "big"))
    logger.info(f"--seed {seed} was chosen at random.")
    return seed


def check_steps(args, step):
    """Refuse a checkpoint beyond the last step, and warn about unusual flags."""
    if step > args.max_train_steps:
        raise TrainingError(f"--max_train_steps {args.max_train_steps}: the checkpoint is from step {step}.")
    if args.lr_scheduler != "constant" and args.lr_warmup_steps > args.max_train_steps:
        peak = args.max_train_steps / args.lr_warmup_steps
        logger.warning(
            f"--lr_warmup_steps {args.lr_warmup_steps}: warmup is longer than the {args.max_train_steps} steps of "
            f"training; the learning rate will peak at {peak:.0%}."
        )
    if args.loss_type == "mapo" and args.beta_mapo < 1:
        logger.warning(
            f"--beta_mapo {args.beta_mapo} looks like a value for --loss_type mapo_v1; the paper uses 8 to 64."
        )


def build_run(args, accelerator, pipeline, noise_scheduler, held_out, pairs_per_step, progress, checkpoint):
    """Build the model, generate images before training, and only then load the checkpoint, if any."""
    # The model and its optimizer.
    pipeline.unet.to(accelerator.device)
    torch.manual_seed(args.seed)  # for the initial weights of a LoRA
    parts = trained_parts(args, pipeline)
    model = build_model(args, pipeline, parts)
    parameters_of_parts = [trainable(part) for part in parts.values()]
    number = sum(parameter.numel() for parameter in itertools.chain(*parameters_of_parts))
    logger.info(f"***** Running training of {number:,} parameters for {args.max_train_steps} steps *****")
    optimizer = build_optimizer(args, parameters_of_parts, pairs_per_step)
    model, prepared_optimizer = accelerator.prepare(model, optimizer)
    # The polynomial schedule reads the learning rate in `defaults`, which DeepSpeed's optimizer lacks.
    prepared_optimizer.defaults = optimizer.defaults

    # Collected before any forward pass, after which FSDP shows unsharded copies of some of them.
    parameters = trainable(model)

    # The checkpoint overwrites the initial weights, so sample with them first.
    base_images = []
    if args.run_validation:
        base_images = generate_images(args, accelerator, pipeline)
    if checkpoint is not None:
        load_checkpoint(accelerator, parts, prepared_optimizer, checkpoint)
    model.train()

    # add_noise would move this to the GPU in the first step, and wait for it.
    noise_scheduler.alphas_cumprod = noise_scheduler.alphas_cumprod.to(accelerator.device)
    return Run(
        args=args,
        accelerator=accelerator,
        pipeline=pipeline,
        noise_scheduler=noise_scheduler,
        model=model,
        parts=parts,
        parameters=parameters,
        optimizer=prepared_optimizer,
        lr_scheduler=build_schedule(args, prepared_optimizer, progress.step),
        held_out=held_out,
        base_images=base_images,
        pairs_per_step=pairs_per_step,
        progress=progress,
    )


def log_row_groups(row_groups, shuffle_shards):
    """Log how much memory a stream needs."""
    sizes = sorted(num_bytes / 2**20 for _, _, num_bytes in row_groups)
    largest = sizes[-shuffle_shards:]
    logger.info(
        f"Streaming {len(sizes)} row groups of {sum(sizes) / len(sizes):.3g} MiB on average. Each process (or each of "
        f"its loader workers) keeps {len(largest)} of them in memory (--shuffle_shards), up to {sum(largest):.3g} MiB."
    )


def set_up(args, accelerator):
    """Check and load everything that training needs. Returns a Run and its StepBatches."""
    # Find out where to start. Only the main process looks, so that all processes agree.
    checkpoint = from_main_process(find_checkpoint, args.output_dir, args.resume_from_checkpoint)
    args.seed = choose_seed(args.seed, checkpoint)
    models = from_main_process(find_models, args, checkpoint)
    if checkpoint is not None:
        check_settings(checkpoint, checkpoint_settings(args, accelerator))
    latent_shape, noise_scheduler = load_configs(args, models)

    # Open the pairs; those of the hub at the commit that the run started from.
    dataset_commit = None
    if checkpoint is not None and checkpoint.settings["dataset_name"] == args.dataset_name:
        dataset_commit = checkpoint.progress.dataset_commit
    message = f"--dataset_name {args.dataset_name} cannot be read"
    if not os.path.exists(args.dataset_name):
        message += ", and is not a local folder or file"
    with raise_on_all_ranks(message):
        pairs, held_out = load_pairs(args, latent_shape, noise_scheduler.config.num_train_timesteps, dataset_commit)
    progress = start_progress(args, accelerator, checkpoint, pairs, models)
    pairs_per_step = count_pairs_per_step(args, accelerator)
    if args.max_train_steps is None:
        remaining = max(args.num_train_epochs * len(pairs.index) - progress.pairs_seen, 0)
        args.max_train_steps = progress.step + math.ceil(remaining / pairs_per_step)
    check_steps(args, progress.step)
    logger.info(f"{len(pairs.index)} pairs to train on, {len(held_out.index)} held out.")
    if args.streaming:
        log_row_groups(pairs.rows.row_groups, args.shuffle_shards)

    # Try the first pair before any weights are loaded.
    visits = training_batches(
        index=pairs.index,
        seed=args.seed,
        layout=progress.layout,
        batch_size=args.train_batch_size,
        pairs_seen=progress.pairs_seen,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    first_visits = next(visits)
    with raise_on_all_ranks(f"--dataset_name {args.dataset_name} cannot be trained on"):
        example = pairs[first_visits[0]]

    # Load the models, and encode the pairs with --cache_latents.
    pipeline = load_pipeline(args, accelerator, models)
    with raise_on_all_ranks(f"The VAE cannot encode {example['row']}"):
        check_vae(pipeline.vae, example, args.vae_encode_batch_size)
    with explain(f"--dataset_name {args.dataset_name} cannot be read"):
        warn_about_long_captions(pipeline.tokenizer, pairs.rows)
    if args.cache_latents:
        fill_caches(args, accelerator, pipeline, pairs, held_out)

    run = build_run(
        args,
        accelerator,
        pipeline,
        noise_scheduler=noise_scheduler,
        held_out=held_out,
        pairs_per_step=pairs_per_step,
        progress=progress,
        checkpoint=checkpoint,
    )
    batches = data_iterator(
        pairs,
        args.dataloader_num_workers,
        batch_sampler=itertools.chain([first_visits], visits),
        collate_fn=collate_pairs,
    )
    return run, StepBatches(batches)


def main(args):
    """Train, and return the exit status."""
    accelerator = build_accelerator(args)
    with only_run_in(args.output_dir, accelerator):
        repo_id = from_main_process(create_hub_repo, args) if args.push_to_hub else None
        run, batches = set_up(args, accelerator)
        start_trackers(args, accelerator, run.progress)

        # Validate before the first step. A resumed run does so as well: its checkpoint was saved before validation.
        step = run.progress.step
        if step % args.validation_steps == 0 and step < args.max_train_steps:
            validate(run)

        stop = StopSignal()
        completed = train(run, batches, stop)
        if completed:
            finish(run)

    # Free DDP before its process group is destroyed, or some processes hang at exit.
    accelerator.wait_for_everyone()
    del run, batches
    accelerator.free_memory()
    accelerator.state.destroy_process_group()

    # End the trackers and upload last, so that no other process has to wait.
    with ignoring_tracker_errors(accelerator):
        accelerator.end_training()
    if not completed:
        return STOPPED
    if repo_id is not None and accelerator.is_main_process:
        upload(args, repo_id)
    return 0


if __name__ == "__main__":
    atexit.register(abandon_process_group)  # before trackers register theirs, so that it runs after them
    try:
        status = main(parse_args())
    except TrainingError as error:
        status = f"error: {error}"
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    finally:
        for worker in multiprocessing.active_children():
            worker.kill()  # a loader's workers ignore the SIGTERM with which Python would end them
    sys.exit(status)
