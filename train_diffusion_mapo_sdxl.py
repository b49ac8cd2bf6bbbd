#!/usr/bin/env python
# Copyright 2026 The MaPO SDXL contributors. All rights reserved.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
#
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8", "diffusers>=0.40", "transformers>=5.24", "accelerate>=1.12", "datasets>=4.4.1",
#   "peft>=0.18", "bitsandbytes>=0.50", "tensorboard>=2.21", "wandb>=0.20"]
# ///
"""Align Stable Diffusion XL with MaPO, preference optimization without a reference model (arXiv 2406.06424).

LoRA, on one 24 GB GPU:

    accelerate launch train_diffusion_mapo_sdxl.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
        --dataset_name mapo-t2i/pick-style-cartoon --beta_mapo 64 --rank 16 --train_batch_size 1 \
        --gradient_accumulation_steps 16 --max_train_steps 1000 --gradient_checkpointing --use_8bit_adam \
        --mixed_precision bf16 --num_validation_pairs 64 --run_validation --output_dir mapo-lora

The whole UNet, as in the paper (4 GPUs x 4 pairs x 8 accumulation = 128 pairs a step):

    accelerate launch --config_file launch_configs/multi_gpu.yaml --num_processes 4 train_diffusion_mapo_sdxl.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
        --dataset_name mapo-t2i/pick-style-cartoon --beta_mapo 64 --learning_rate 1e-7 --lr_scheduler cosine \
        --train_batch_size 4 --gradient_accumulation_steps 8 --max_train_steps 2000 --gradient_checkpointing \
        --use_8bit_adam --mixed_precision bf16 --output_dir mapo-full
"""

import argparse
import contextlib
import functools
import gc
import glob
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import multiprocessing.pool
import os
import shutil
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import datasets
import diffusers
import fsspec
import numpy as np
import psutil
import pyarrow.parquet as pq
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    DistributedType,
    gather_object,
    send_to_device,
)
from datasets.fingerprint import Hasher
from datasets.table import embed_table_storage
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import cast_training_params
from diffusers.utils import check_min_version
from diffusers.utils.hub_utils import populate_model_card
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_kohya,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from filelock import FileLock
from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder
from PIL import Image, ImageOps
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm


check_min_version("0.40.0")

logger = get_logger(__name__)


# Objective -----------------------------------------------------------------------------------------------------------
def log_phi(errors):
    """Logarithm of the score phi(l) = l / (exp(l) - 1) (eq. 11 at beta = 1) of float64 errors, exact from 0 on."""
    small = errors < 1e-2
    series = -errors / 2 - errors**2 / 24 + errors**4 / 2880
    # torch.where propagates the gradient of both branches, so the unused one must not see 0.
    away = torch.where(small, 1.0, errors)
    return torch.where(small, series, away.log() - away - (-torch.expm1(-away)).log())


def mapo_loss(chosen_errors, rejected_errors, beta):
    """
    The published MaPO objective (arXiv 2406.06424v2, eqs. 9 to 11).

        L = l_w - 1/beta * log sigmoid(phi_beta(l_w) - phi_beta(l_l)),   phi_beta(l) = (l / (exp(l) - 1)) ** beta

    Args:
        chosen_errors, rejected_errors: `(pairs,)` mean squared errors l_w and l_l of the denoiser.
        beta: temperature of the score; `inf` is supervised fine-tuning on the chosen images.

    Returns:
        Loss and margin of each pair, both `(pairs,)` in float64: beta multiplies the rounding errors of log phi.
    """
    chosen, rejected = chosen_errors.double(), rejected_errors.double()
    if math.isinf(beta):
        return chosen + 0 * rejected, torch.zeros_like(chosen)  # a non-finite rejected error stays visible
    margin = (beta * log_phi(chosen)).exp() - (beta * log_phi(rejected)).exp()
    return chosen - F.logsigmoid(margin) / beta, margin


def mapo_v1_loss(chosen_errors, rejected_errors, beta, snr_value, num_train_timesteps):
    """
    The objective of MaPO's first release (arXiv 2406.06424v1), with which the published weights were trained.

        L = l_w - beta * log sigmoid(T * (phi(s * l_w) - phi(s * l_l))),   phi(l) = l / (exp(l) - 1)

    Args and returns as in `mapo_loss`; `snr_value` is s, `num_train_timesteps` is T, which the margin is without.
    """
    chosen, rejected = chosen_errors.double(), rejected_errors.double()
    margin = log_phi(snr_value * chosen).exp() - log_phi(snr_value * rejected).exp()
    return chosen - beta * F.logsigmoid(num_train_timesteps * margin), margin


METRICS = ("loss", "chosen_mse", "rejected_mse", "margin", "accuracy")


def preference_step(run, batch):
    """The objective on a batch: the scalar loss with its gradient, and METRICS `(len(METRICS), pairs)` in float64."""
    args, config = run.args, run.noise_scheduler.config
    batch = send_to_device(batch, run.accelerator.device, non_blocking=True)
    encoded = encode_pairs(run, batch)
    with autocast(run):
        chosen, rejected = denoising_errors(run.unet, run.noise_scheduler, *encoded, batch)
    if args.loss_type == "mapo":
        losses, margin = mapo_loss(chosen, rejected, args.beta_mapo)
    else:
        losses, margin = mapo_v1_loss(chosen, rejected, args.beta_mapo, args.snr_value, config.num_train_timesteps)
    metrics = [losses, chosen, rejected, margin, chosen < rejected]
    metrics = torch.stack([metric.double() for metric in metrics])
    return losses.mean().to(chosen.dtype), metrics.detach()


def denoising_errors(unet, noise_scheduler, latents, prompt_embeds, pooled_prompt_embeds, batch):
    """
    Mean squared errors of the chosen and of the rejected images, two `(pairs,)` float32 tensors. The images of a pair
    share one noise and one timestep; `latents` holds the chosen ones first.
    """
    noise, timesteps = batch["noise"].repeat(2, 1, 1, 1), batch["timesteps"].repeat(2)
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps).to(prompt_embeds.dtype)
    target = noise
    if noise_scheduler.config.prediction_type == "v_prediction":
        target = noise_scheduler.get_velocity(latents, noise, timesteps)
    time_ids = batch["add_time_ids"].repeat(2, 1).to(prompt_embeds.dtype)
    conditions = {"text_embeds": pooled_prompt_embeds.repeat(2, 1), "time_ids": time_ids}
    prompt_embeds = prompt_embeds.repeat(2, 1, 1)
    prediction = unet(noisy_latents, timesteps, prompt_embeds, added_cond_kwargs=conditions, return_dict=False)[0]
    return F.mse_loss(prediction.float(), target, reduction="none").mean(dim=(1, 2, 3)).chunk(2)


def autocast(run):
    """accelerate's own does nothing under DeepSpeed. Casts that checkpointing recomputes need not be kept."""
    dtype, kept = run.pipeline.text_encoder.dtype, not run.args.gradient_checkpointing
    enabled = dtype != torch.float32
    return torch.autocast(run.accelerator.device.type, dtype=dtype, enabled=enabled, cache_enabled=kept)


# Errors --------------------------------------------------------------------------------------------------------------
class TrainingError(Exception):
    """A wrong use or a fault that one sentence explains; the command line prints that sentence alone."""


class UnusableRow(Exception):
    """Why a row cannot be trained on."""


def one_line(error):
    """An error's type and text; of one that a loader's worker raised, the last line of its traceback."""
    if "Original Traceback" in str(error):
        return str(error).strip().splitlines()[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@contextlib.contextmanager
def failing_together(sentence, together=True):
    """Turn an error on one process or more into the same TrainingError on all of them."""
    failure = None
    try:
        yield
    except (Exception, CheckpointException) as error:  # FSDP's is no Exception
        failure = str(error) if isinstance(error, TrainingError) else f"{sentence}: {one_line(error)}"
    failure = next(filter(None, gather_object([failure])), None) if together else failure
    if failure is not None:
        raise TrainingError(failure)


def write_whole(path, save):
    """Let `save` write a file that appears under its name only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    try:
        save(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


# Arguments -----------------------------------------------------------------------------------------------------------
VALIDATION_PROMPTS = ["a lighthouse at dusk", "an old sailor with a pipe", "a fox in the snow", "a bowl of ramen"]
TRACKERS = {"tensorboard": ["tensorboard"], "wandb": ["wandb"], "all": ["tensorboard", "wandb"], "none": []}
# Switches of other scripts that ask for what is done anyway. They are accepted and have no effect.
HARMLESS_SWITCHES = ("center_crop", "random_flip", "mapo_training", "enable_xformers_memory_efficient_attention")


def bounded(text, kind, low, high=sys.float_info.max):
    """Parse a number in [low, high] for argparse."""
    try:
        value = kind(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number") from error
    if not low <= value <= high:
        wanted = "positive" if 0 < low < 1e-300 else f"from {low:.3g} to {high:.3g}"
        raise argparse.ArgumentTypeError(f"{text} is out of range, it must be {wanted}")
    return value


COUNT = functools.partial(bounded, kind=int, low=1)
COUNT_OR_ZERO = functools.partial(bounded, kind=int, low=0, high=2**32 - 1)
FRACTION = functools.partial(bounded, kind=float, low=0, high=1)
BELOW_ONE = functools.partial(bounded, kind=float, low=0, high=math.nextafter(1, 0))
NOT_NEGATIVE = functools.partial(bounded, kind=float, low=0)
POSITIVE = functools.partial(bounded, kind=float, low=sys.float_info.min)
POSITIVE_OR_INF = functools.partial(POSITIVE, high=math.inf)


def add_model_and_data_arguments(parser):
    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", required=True, help="SDXL pipeline: hub id or local folder.")
    add("--pretrained_vae_model_name_or_path", help="Another VAE, e.g. madebyollin/sdxl-vae-fp16-fix.")
    add("--pretrained_unet_name_or_path", help="Another UNet to start from, e.g. the output_dir of an earlier run.")
    add("--init_lora", help="LoRA to continue, e.g. the output_dir of an earlier run; it brings its layers.")
    add("--revision", help="Revision of the pretrained model on the hub.")
    add("--variant", help="Variant of the pretrained weights, e.g. fp16.")
    add("--cache_dir", help="Folder for downloaded models, data sets, indexes and cached latents.")
    add("--rank", "--lora_rank", type=COUNT, help="Train a LoRA of this rank, not the whole UNet.")
    add("--lora_alpha", type=POSITIVE, help="LoRA's alpha. Without it, the rank, as in diffusers (sd-scripts: 1).")
    layers = "`attention` (diffusers' choice), `transformer` (sd-scripts'), `all` (convolutions, too), or names."
    add("--lora_layers", nargs="+", help=f"Layers with LoRA (all): {layers}")
    add("--train_text_encoder", action="store_true", help="Train a LoRA on both text encoders, too.")
    add = parser.add_argument_group("pairs").add_argument
    add("--dataset_name", required=True, help="Pairs: hub id or local folder that `datasets` can load.")
    add("--dataset_config_name", help="Configuration of the data set, if it has several.")
    add("--dataset_split_name", help="Split to train on, or several: a+b. Without it, the only one, or `train`.")
    add("--streaming", action="store_true", help="Read parquet row groups when they are needed; download nothing.")
    add("--shuffle_shards", type=COUNT, default=4, help="Row groups that a stream keeps in memory and mixes.")
    add("--max_train_samples", type=COUNT, help="Train on a random subset of so many pairs.")
    add("--caption_column", default="caption", help="Column of the prompts.")
    add("--image_0_column", default="jpg_0", help="Column of the first images.")
    add("--image_1_column", default="jpg_1", help="Column of the second images.")
    add("--label_0_column", default="label_0", help="Column of the first images' labels.")
    add("--label_1_column", default="label_1", help="Column of the second images' labels.")
    add("--chosen_column", help="Column of the chosen images, for pairs without labels.")
    add("--rejected_column", help="Column of the rejected images, for pairs without labels.")
    ties = {"action": argparse.BooleanOptionalAction, "default": True}
    add("--remove_ties", **ties, help="Drop pairs with equal labels; otherwise they are ordered at random.")
    add("--label_noise_prob", type=FRACTION, default=0.0, help="Probability of swapping chosen and rejected.")
    add("--max_bad_rows", type=FRACTION, default=0.01, help="Stop when more than this share of the rows is unusable.")
    add("--resolution", type=COUNT, default=1024, help="Side of the training images in pixels.")
    add("--random_crop", action="store_true", help="Crop at random instead of at the center.")
    add("--no_hflip", action="store_true", help="Never flip the images.")
    add("--cache_latents", action="store_true", help="Encode all pairs before training, to files that are kept.")
    add("--dataloader_num_workers", type=COUNT_OR_ZERO, default=0, help="Processes that read and decode images.")
    add("--vae_encode_batch_size", type=COUNT, default=8, help="Images per forward pass of the VAE.")


def add_training_arguments(parser):
    add = parser.add_argument_group("objective").add_argument
    add("--loss_type", choices=["mapo", "mapo_v1"], default="mapo", help="Published objective or first release's.")
    add("--beta_mapo", type=POSITIVE_OR_INF, help="Temperature; `inf` is SFT. Without it, 8 (mapo_v1: 0.1).")
    add("--snr_value", type=POSITIVE, default=0.5, help="Scale of the errors in mapo_v1.")
    add = parser.add_argument_group("training").add_argument
    add("--seed", type=COUNT_OR_ZERO, help="Seed of every random choice. Without it, one is drawn and reported.")
    add("--train_batch_size", type=COUNT, default=4, help="Pairs per process and forward pass.")
    add("--num_train_epochs", type=COUNT, default=1, help="Passes over the data set.")
    add("--max_train_steps", type=COUNT, help="Optimizer steps; overrides --num_train_epochs.")
    add("--gradient_accumulation_steps", type=COUNT, default=1, help="Forward passes per optimizer step.")
    add("--gradient_checkpointing", action="store_true", help="Recompute activations to save memory.")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="Without it, accelerate's setting.")
    add("--full_bf16", action="store_true", help="Train the whole UNet in bfloat16 with stochastic rounding.")
    add("--allow_tf32", action="store_true", help="Allow TF32 in float32 products and convolutions.")
    add("--compile", action="store_true", help="Compile the UNet's transformer blocks (torch.compile).")
    add = parser.add_argument_group("optimizer").add_argument
    add("--learning_rate", type=POSITIVE, default=1e-5, help="The usual 5e-4 destroys a fully trained SDXL.")
    add("--text_encoder_lr", type=POSITIVE, default=5e-6, help="Learning rate of the text encoders.")
    add("--scale_lr", action="store_true", help="Multiply the learning rates by the pairs per optimizer step.")
    schedulers = [s.value for s in SchedulerType if s.value != "piecewise_constant"]
    add("--lr_scheduler", choices=schedulers, default="constant", help="Learning rate schedule.")
    add("--lr_warmup_steps", type=COUNT_OR_ZERO, default=500, help="Optimizer steps of warmup.")
    add("--lr_num_cycles", type=COUNT, default=1, help="Restarts of cosine_with_restarts.")
    add("--lr_power", type=POSITIVE, default=1.0, help="Power of the polynomial schedule.")
    add("--use_8bit_adam", action="store_true", help="AdamW with 8-bit states, from bitsandbytes.")
    add("--adam_beta1", type=BELOW_ONE, default=0.9, help="Adam's beta1.")
    add("--adam_beta2", type=BELOW_ONE, default=0.999, help="Adam's beta2.")
    add("--adam_weight_decay", type=NOT_NEGATIVE, default=1e-2, help="Weight decay.")
    add("--adam_epsilon", type=POSITIVE, default=1e-8, help="Adam's epsilon.")
    add("--max_grad_norm", type=POSITIVE, default=1.0, help="Gradients are clipped to this norm.")
    add("--max_bad_steps", type=COUNT, default=10, help="Stop after so many non-finite gradients in a row.")


def add_output_arguments(parser):
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="mapo", help="Folder for everything that the run writes.")
    add("--checkpointing_steps", type=COUNT, default=500, help="Optimizer steps between checkpoints.")
    add("--checkpoints_total_limit", type=COUNT, help="Number of checkpoints to keep.")
    add("--resume_from_checkpoint", help="`latest`, a checkpoint's path, or its name in output_dir.")
    add("--logging_dir", default="logs", help="Folder of the trackers' files, in output_dir.")
    add("--logging_steps", type=COUNT, default=10, help="Optimizer steps between log lines.")
    add("--report_to", choices=list(TRACKERS), default="tensorboard", help="Tracker.")
    add("--tracker_name", default="mapo", help="Name of the project in the tracker.")
    add("--no_kohya_format", action="store_true", help="Write no second file of the LoRA for ComfyUI and others.")
    add("--push_to_hub", action="store_true", help="Upload output_dir at the end.")
    add("--hub_model_id", help="Repository to upload to. Without it, the name of output_dir.")
    add("--hub_private_repo", action="store_true", help="Create the repository as a private one.")
    add("--hub_token", help="Token for the upload. Without it, that of `hf auth login`.")
    add = parser.add_argument_group("validation").add_argument
    add("--run_validation", action="store_true", help="Draw images with the base and the aligned model.")
    add("--validation_steps", type=COUNT, default=200, help="Optimizer steps between validations.")
    add("--validation_prompts", nargs="+", default=VALIDATION_PROMPTS, help="Prompts to draw.")
    add("--num_inference_steps", type=COUNT, default=25, help="Denoising steps of the drawn images.")
    add("--guidance_scale", type=NOT_NEGATIVE, default=5.0, help="Guidance of the drawn images.")
    add("--validation_split", help="Split of the held-out pairs. Without it, the first training pairs are held out.")
    add("--num_validation_pairs", type=COUNT, help="Number of pairs held out for the eval_ metrics.")


def parse_args(input_args=None):
    """Parse the command line (or `input_args`); a wrong use stops with one sentence that names the flag."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage="accelerate launch %(prog)s --pretrained_model_name_or_path MODEL --dataset_name PAIRS [...]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add_model_and_data_arguments(parser)
    add_training_arguments(parser)
    add_output_arguments(parser)
    for name in HARMLESS_SWITCHES:
        parser.add_argument(f"--{name}", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # of old launchers
    args = parser.parse_args(input_args)
    if args.center_crop and args.random_crop:
        parser.error("--center_crop and --random_crop contradict each other")
    if args.random_flip and args.no_hflip:
        parser.error("--random_flip and --no_hflip contradict each other")
    for name in (*HARMLESS_SWITCHES, "local_rank"):
        delattr(args, name)
    base = args.pretrained_model_name_or_path
    if base.endswith(".safetensors"):
        parser.error(
            "--pretrained_model_name_or_path is a single file, convert it first: "
            f"python convert_sdxl.py single_file {base} FOLDER"
        )
    if args.beta_mapo is None:
        args.beta_mapo = 8.0 if args.loss_type == "mapo" else 0.1
    trackers = TRACKERS[args.report_to]
    too_slow = args.lr_scheduler == "polynomial" and args.learning_rate <= 1e-7 and not args.scale_lr
    rounds = args.rank is None and args.use_8bit_adam and args.mixed_precision == "bf16"
    needed = [(f"--report_to {args.report_to}", tracker) for tracker in trackers]
    needed += [("--use_8bit_adam", "bitsandbytes")] * args.use_8bit_adam + [("--rank", "peft")] * bool(args.rank)
    lora = ("lora_alpha", "lora_layers", "init_lora", "train_text_encoder")
    rules = [(getattr(args, name) and not args.rank, f"--{name} needs --rank") for name in lora]
    cached_text = args.train_text_encoder and args.cache_latents
    rules += [
        (args.init_lora and args.lora_layers, "--init_lora brings its own layers, leave --lora_layers out"),
        (cached_text, "--train_text_encoder cannot be used with --cache_latents, which keeps their output"),
        (args.cache_latents and args.random_crop, "--random_crop cannot be used with --cache_latents"),
        (args.resolution % 8 != 0, "--resolution must be a multiple of 8"),
        (bool(args.chosen_column) != bool(args.rejected_column), "--chosen_column and --rejected_column go together"),
        (args.loss_type == "mapo_v1" and math.isinf(args.beta_mapo), "--beta_mapo inf needs --loss_type mapo"),
        (too_slow, "--lr_scheduler polynomial ends at 1e-7, so --learning_rate must be larger"),
        (args.hub_token and "wandb" in trackers, "--report_to wandb would be sent --hub_token; use `hf auth login`"),
        (args.full_bf16 and not rounds, "--full_bf16 needs --use_8bit_adam --mixed_precision bf16, without --rank"),
    ]
    rules += [(not importlib.util.find_spec(n), f"{flag} needs {n}: pip install {n}") for flag, n in needed]
    for sentence in [sentence for broken, sentence in rules if broken]:
        parser.error(sentence)
    if args.rank and not args.init_lora:
        args.lora_layers = args.lora_layers or ["all"]
    return args


# Pairs ---------------------------------------------------------------------------------------------------------------
#
# A pair is a number in an index of (shard, row). A prepared data set is one shard; a streamed one has a shard for each
# parquet row group. The order of a run is a function of (seed, epoch, index), and what is drawn for a pair depends on
# the seed and its position in that order alone. So a run resumes, on any number of processes, from the pairs seen.
CAPTION_TYPES = ("string", "large_string")
IMAGE_TYPES = ("binary", "large_binary", "PIL.Image.Image")
LABEL_TYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "float16", "float32", "float64")


def pair_columns(args):
    """Names of the caption column, of the two image columns, and of the two label columns (if any)."""
    if args.chosen_column is not None:
        return args.caption_column, (args.chosen_column, args.rejected_column), ()
    return args.caption_column, (args.image_0_column, args.image_1_column), (args.label_0_column, args.label_1_column)


def check_columns(args, features):
    """Every column must be there and have a type that pairs are made of."""
    folder = Path(args.dataset_name)
    images = ("chosen_column", "rejected_column") if args.chosen_column else ("image_0_column", "image_1_column")
    labels = () if args.chosen_column else ("label_0_column", "label_1_column")
    wanted = dict.fromkeys(images, IMAGE_TYPES) | dict.fromkeys(labels, LABEL_TYPES)
    for flag, types in {"caption_column": CAPTION_TYPES, **wanted}.items():
        column = getattr(args, flag)
        if column not in features:
            there = f"--{flag} {column}: {folder} has no such column, but {', '.join(features)}"
            if (folder / "w").is_dir() and (folder / "l").is_dir():
                there += "; list its pairs in a metadata.csv there, with columns caption, chosen_file_name and "
                there += "rejected_file_name, and remove its .txt files"
            if "_data_files" in features:  # datasets before 5.2 does not know its own format
                there += "; `datasets.load_from_disk` reads it, write it again with `to_parquet`"
            raise TrainingError(f"{there}.")
        kind = getattr(features[column], "dtype", None)
        if types == IMAGE_TYPES and kind in CAPTION_TYPES:
            raise TrainingError(
                f"--{flag} {column} holds strings, not images: name the table metadata.csv (or .jsonl, .parquet) and "
                "let its image columns end in _file_name."
            )
        if kind not in types:
            raise TrainingError(f"--{flag} {column} holds {features[column]}, not one of: {', '.join(types)}.")


class PairSource:
    """Rows of a split by (shard, row). Of streamed parquet, the `shards_kept` row groups read last stay in memory."""

    def __init__(self, args, split_flag):
        folder = Path(args.dataset_name).resolve()
        if folder.exists() and glob.has_magic(str(folder)):
            raise TrainingError(f"--dataset_name: `datasets` takes *, ? and [ for patterns, rename {folder}.")
        builder = datasets.load_dataset_builder(args.dataset_name, args.dataset_config_name, cache_dir=args.cache_dir)
        streams = builder.as_streaming_dataset()
        split = getattr(args, split_flag) or (next(iter(streams)) if len(streams) == 1 else "train")
        self.splits = split.split("+")
        for name in self.splits:
            if name not in streams:
                there = ", ".join(streams)
                raise TrainingError(f"--{split_flag}: {args.dataset_name} has no split {name!r}, but {there}.")
            # JSON lines and the like have features only after they are prepared.
            if streams[name].features is not None:
                check_columns(args, streams[name].features)
        caption, images, self.labels = pair_columns(args)
        self.columns, self.images, self.data = [caption, *images, *self.labels], images, None
        self.files = [file for name in self.splits for file in builder.config.data_files[name]]
        self.shards, self.shards_kept = {}, args.shuffle_shards
        self.fingerprint = [builder.cache_dir, split, args.streaming, self.columns]
        if not args.streaming:
            builder.download_and_prepare()
            check_columns(args, builder.as_dataset(split).features)
            # As Arrow tables, so that images stay encoded.
            self.data = builder.as_dataset(split).select_columns(self.columns).with_format("arrow")
        elif not all(file.endswith(".parquet") for file in self.files):
            raise TrainingError(f"--streaming reads parquet files, but {args.dataset_name} has others; leave it out.")

    def read_labels(self, file):
        """Labels `(rows, 2)` of each shard of one file, or 1 and 0 where pairs have none. No image is read."""
        columns = list(self.labels) or self.columns[:1]
        if self.data is not None:
            frames = [self.data.select_columns(columns)[:].to_pandas()]
        else:
            with fsspec.open(file, cache_type="none") as opened, pq.ParquetFile(opened) as parquet:
                frames = [parquet.read_row_group(n, columns).to_pandas() for n in range(parquet.num_row_groups)]
        if not self.labels:
            return [np.tile((1.0, 0.0), (len(frame), 1)) for frame in frames]
        return [frame.astype("float64").to_numpy() for frame in frames]

    def build_index(self, args):
        """The index, and (file, row group) of each shard. Labels are read from 16 files at a time."""
        files = self.files if self.data is None else [None]
        with multiprocessing.pool.ThreadPool(16) as pool:
            tables = pool.imap(self.read_labels, files)
            labels = list(tqdm(tables, "Reading labels", len(files), disable=len(files) == 1))
        groups = [(file, group) for file, shards in enumerate(labels) for group in range(len(shards))]
        labels = [shard for shards in labels for shard in shards]
        shard = np.repeat(np.arange(len(labels)), [len(rows) for rows in labels])
        index = np.stack([shard, np.arange(len(shard)) - np.searchsorted(shard, shard)], axis=1)
        labels = np.concatenate(labels)
        index = index[labels[:, 0] != labels[:, 1]] if args.remove_ties else index
        return {"index": torch.from_numpy(index), "groups": torch.tensor(groups)}

    def index(self, args):
        """`(pairs, 2)` shard and row of all pairs but the ties, built once and kept on disk."""
        key = Hasher.hash([self.fingerprint, args.remove_ties])
        path = Path(args.cache_dir or datasets.config.HF_DATASETS_CACHE, "mapo_index", f"{key}.safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                write_whole(path, functools.partial(safetensors.torch.save_file, self.build_index(args)))
        tensors = safetensors.torch.load_file(path)
        self.groups = tensors["groups"].numpy()
        return tensors["index"].numpy()

    def record(self, shard, row):
        """One row as a dict, its images encoded."""
        if self.data is not None:
            table = self.data[int(row)]
            try:
                # Some data sets keep paths of image files, also in archives.
                record = embed_table_storage(table).to_pylist()[0]
            except Exception as error:  # file systems raise all kinds
                raise UnusableRow(f"has an image that cannot be read ({one_line(error)})") from error
        else:
            record = {column: values[row] for column, values in self.shard(shard).items()}
        for column in self.images:
            if isinstance(record[column], dict):  # of the Image feature
                record[column] = record[column]["bytes"]
        return record

    def captions(self, index):
        """Captions of the first 1,000 pairs of an index; those of a stream are of the row group read first."""
        column = self.columns[0]
        if self.data is not None:
            captions = self.data.select_columns([column])[index[:1000, 1]][column].to_pylist()
        else:
            captions = next(iter(self.shards.values()))[column][:1000]
        return [caption for caption in captions if isinstance(caption, str)]

    def shard(self, shard):
        """The columns of a row group as lists."""
        if shard not in self.shards:
            while len(self.shards) >= self.shards_kept:
                self.shards.pop(next(iter(self.shards)))
            file, group = self.groups[shard]
            with fsspec.open(self.files[file], cache_type="none") as opened, pq.ParquetFile(opened) as parquet:
                self.shards[shard] = parquet.read_row_group(group, self.columns).to_pydict()
        return self.shards[shard]


def load_indexes(args):
    """(source, index) of the training pairs and (source, index) of the held-out ones."""
    source = held_out_source = PairSource(args, "dataset_split_name")
    index, number = source.index(args), args.num_validation_pairs
    if args.validation_split is None:
        held_out, index = index[: number or 0], index[number or 0 :]
    else:
        held_out_source = PairSource(args, "validation_split")
        if set(source.splits) & set(held_out_source.splits):
            raise TrainingError(f"--validation_split {args.validation_split} is trained on, too.")
        held_out = held_out_source.index(args)[:number]
    if args.max_train_samples is not None:
        subset = np.random.default_rng(args.seed).permutation(len(index))[: args.max_train_samples]
        index = index[np.sort(subset)]
    if len(index) == 0 or (args.validation_split and len(held_out) == 0):
        raise TrainingError(f"--dataset_name: {len(index)} pairs are left to train on, and {len(held_out)} held out.")
    return (source, index), (held_out_source, held_out)


def epoch_order(index, seed, epoch, shards_mixed, lanes, turn):
    """
    `(pairs,)` numbers of the pairs of `index` in the order of one epoch. The shards stand one behind the other in a
    random order, and each lane takes a stretch of them, in which the pairs of `shards_mixed` shards at a time are
    mixed. The lanes take turns of `turn` pairs, all through the run: a process whose batches are the turns of one
    lane reads the shards of that lane only.
    """
    rng = np.random.default_rng([seed, epoch])
    place = rng.permutation(int(index[-1, 0]) + 1)[index[:, 0]]
    pairs = np.argsort(place, kind="stable")
    lane = (epoch * len(index) + np.arange(len(index))) // turn % lanes
    turns = np.argsort(lane, kind="stable")
    lane, place = lane[turns], place[pairs]
    shard = np.cumsum(np.r_[0, (np.diff(lane) != 0) | (np.diff(place) != 0)])
    block = (shard - shard[np.searchsorted(lane, lane)]) // shards_mixed
    order = np.empty_like(pairs)
    order[turns] = pairs[np.lexsort((rng.random(len(index)), block, lane))]
    return order


def training_batches(args, index, order, position, rank, num_processes):
    """This process' batches of (position, pair), from `position` in the run on, without end."""
    size = args.train_batch_size
    epoch_pairs = functools.lru_cache(1)(lambda epoch: epoch_order(index, args.seed, epoch, *order))
    for start in itertools.count(position + rank * size, size * num_processes):
        yield [(n, int(epoch_pairs(n // len(index))[n % len(index)])) for n in range(start, start + size)]


def decode_image(encoded):
    """Decode an image's bytes to RGB: upright, and on white where transparent."""
    if not encoded:
        raise UnusableRow("has no image")
    try:
        image = Image.open(io.BytesIO(encoded))
        # Pillow's own conversions clip. It opens 16 bits of grey as "I;16" or, in these formats, as "I".
        is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
        image = ImageOps.exif_transpose(image)
        if is_16_bit:
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # Pillow raises most of the built-in ones
        raise UnusableRow(f"has an image that cannot be decoded ({one_line(error)})") from error


def crop_image(image, resolution, crop_fractions, flip):
    """Resize the shorter side, flip, crop a square: `(3, side, side)` uint8, and the crop's (top, left) beforehand."""
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    if max(image.width * image.height, width * height) > Image.MAX_IMAGE_PIXELS:
        raise UnusableRow(f"has an image of {image.width} x {image.height} pixels, too large or too narrow")
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    image = ImageOps.mirror(image) if flip else image
    top, left = round((height - resolution) * crop_fractions[0]), round((width - resolution) * crop_fractions[1])
    image = image.crop((left, top, left + resolution, top + resolution))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1), (top, left)


def load_pair(args, record, crop_fractions, flips):
    """
    One row's caption, labels, images `(2, len(flips), 3, resolution, resolution)` uint8, each flipped as `flips` says,
    and micro-conditioning `(2, 6)`, in the order of its columns. Raises UnusableRow where one is missing or broken.
    """
    caption, images, labels = pair_columns(args)
    if not isinstance(record[caption], str):
        raise UnusableRow(f"has {record[caption]!r} for a caption")
    for label in labels:
        if record[label] is None or math.isnan(record[label]):
            raise UnusableRow(f"has no {label}")
    pixel_values, add_time_ids = [], []
    for image in [decode_image(record[column]) for column in images]:
        crops = [crop_image(image, args.resolution, crop_fractions, flip) for flip in flips]
        pixel_values.append(torch.stack([pixels for pixels, _ in crops]))
        add_time_ids.append([image.height, image.width, *crops[-1][1], args.resolution, args.resolution])
    labels = [float(record[label]) for label in labels] or [1.0, 0.0]
    tensors = {"pixel_values": torch.stack(pixel_values), "add_time_ids": torch.tensor(add_time_ids)}
    return {"caption": record[caption], "labels": labels, **tensors}


class PairDataset(torch.utils.data.Dataset):
    """
    Turns (position, pair) into tensors, in the loader's workers. Every random choice comes from a generator seeded by
    (seed, position). A row that cannot be used is replaced by the next one that can, and reported.
    """

    def __init__(self, args, source, index, latent_shape, num_train_timesteps, held_out=False):
        self.args, self.source, self.index, self.held_out = args, source, index, held_out
        self.latent_shape, self.num_train_timesteps, self.cache = latent_shape, num_train_timesteps, None

    def row(self, pair):
        """How messages name a pair."""
        shard, row = self.index[pair]
        place = f" of shard {shard}" if self.source.data is None else ""
        return f"{'held-out ' if self.held_out else ''}row {row}{place}"

    def cached(self, pair):
        return self.cache / f"{pair // 1000:04d}" / f"{pair % 1000:03d}.safetensors"

    def __getitem__(self, visit):
        position, pair = visit
        for skipped in range(min(len(self.index), 100)):
            number = (pair + skipped) % len(self.index)
            try:
                return {**self.prepare(position, number), "row": self.row(number), "skipped": skipped}
            except UnusableRow as error:
                reason = error
                logging.getLogger(__name__).warning(f"Skipped {self.row(number)}: it {reason}.")
        raise UnusableRow(f"no row from {self.row(pair)} to {self.row(number)} can be used, the last one {reason}")

    def prepare(self, position, pair):
        args = self.args
        # Held-out pairs get the same noise in every run, whatever its seed.
        seed = np.random.SeedSequence((0, position) if self.held_out else (1, args.seed, position))
        seed = seed.generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(seed[0]))
        # All numbers are drawn whatever the flags, so that no flag shifts another's draws.
        noisy, tie, flip, *crop_fractions = np.random.default_rng(seed).random(5)
        flip = bool(flip < 0.5 and not args.no_hflip and not self.held_out)
        if not args.random_crop or self.held_out:
            crop_fractions = (0.5, 0.5)
        if self.cache is None:
            tensors = load_pair(args, self.source.record(*self.index[pair]), crop_fractions, [flip])
            tensors["pixel_values"] = tensors["pixel_values"][:, 0]
        else:
            tensors = read_cached(self.cached(pair), flip)
        first, second = tensors.pop("labels")
        chosen = 0 if first > second or (first == second and tie < 0.5) else 1
        if noisy < args.label_noise_prob and not self.held_out:
            chosen = 1 - chosen
        for name in {"pixel_values", "moments"} & tensors.keys():
            tensors[name] = tensors[name][[chosen, 1 - chosen]]
        # Both images get the chosen one's micro-conditioning: only the images may differ in a pair.
        tensors["add_time_ids"] = tensors["add_time_ids"][chosen]
        tensors["timesteps"] = torch.randint(self.num_train_timesteps, (), generator=generator)
        tensors["noise"] = torch.randn(self.latent_shape, generator=generator)
        return {**tensors, "posterior_noise": torch.randn((2, *self.latent_shape), generator=generator)}


def collate_pairs(items):
    """Stack the items: the chosen images come first, then the rejected ones in the same order."""
    batch = torch.utils.data.default_collate(items)
    for name in {"pixel_values", "moments", "posterior_noise"} & batch.keys():
        batch[name] = batch[name].transpose(0, 1).flatten(0, 1)
    return batch


def make_loader(args, data, batches, collate=collate_pairs):
    options = {"num_workers": args.dataloader_num_workers, "pin_memory": torch.cuda.is_available()}
    # Without a generator of its own, every loader would draw from the global one.
    options |= {"collate_fn": collate, "worker_init_fn": ignore_stop_signals, "generator": torch.Generator()}
    return torch.utils.data.DataLoader(data, batch_sampler=batches, **options)


# Models --------------------------------------------------------------------------------------------------------------
# What a VAE's config says of its latents, and AutoencoderKL's defaults.
LATENTS = {"_class_name": "AutoencoderKL", "latent_channels": 4, "scaling_factor": 0.18215}
LATENTS |= {"shift_factor": None, "latents_mean": None}
NO_SDXL = "--pretrained_model_name_or_path {name} is no SDXL base model: {reason}."
# What a UNet's config says of what it takes and gives, and the defaults.
UNET_KIND = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 1280, "time_cond_proj_dim": None}
UNET_KIND |= {"addition_embed_type": None, "projection_class_embeddings_input_dim": None}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TRANSFORMER = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
RESNET = ["conv1", "conv2", "conv_shortcut", "time_emb_proj"]
LORA_LAYERS = {"attention": ATTENTION, "transformer": TRANSFORMER, "all": TRANSFORMER + RESNET}
TEXT_LORA_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def check_lora(args, unet_config):
    """A LoRA to continue must be of the rank and alpha asked for; other layers must be names of the UNet's layers."""
    layers = [layer for layer in args.lora_layers or [] if layer not in LORA_LAYERS]
    with torch.device("meta"):
        modules = UNet2DConditionModel.from_config(unet_config).named_modules() if layers else []
    names = [f".{name}" for name, module in modules if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))]
    for layer in layers:
        if not any(name.endswith(f".{layer}") for name in names):
            presets = ", ".join(LORA_LAYERS)
            raise TrainingError(f"--lora_layers {layer} is neither a layer of the UNet nor one of: {presets}.")
    if args.init_lora:
        with failing_together(f"--init_lora {args.init_lora} cannot be loaded"):
            weights, alphas = read_lora(args.init_lora, unet_config)
        ranks = {len(weight) for name, weight in weights.items() if name.startswith("unet.") and ".lora_A." in name}
        checks = [("rank", ranks, args.rank), ("lora_alpha", alphas or ranks, args.lora_alpha or args.rank)]
        for flag, there, asked in checks:
            if there != {asked}:
                there = ", ".join(f"{value:g}" for value in sorted(there)) or "none for the UNet"
                raise TrainingError(f"--{flag} {asked:g}: --init_lora {args.init_lora} has {there}.")
        if any(name.startswith("text_encoder") for name in weights) and not args.train_text_encoder:
            raise TrainingError(f"--init_lora {args.init_lora} adapts the text encoders: add --train_text_encoder.")


def load_configs(args):
    """Shape of the latents and noise scheduler, by configs alone; refuses a base of another kind than SDXL's."""
    name, vae_name = args.pretrained_model_name_or_path, args.pretrained_vae_model_name_or_path
    options = {"cache_dir": args.cache_dir, "revision": args.revision}
    with failing_together(f"--pretrained_model_name_or_path {name} cannot be loaded"):
        parts = StableDiffusionXLPipeline.load_config(name, **options)
        needed = ("unet", "vae", "scheduler", "text_encoder", "text_encoder_2")
        missing = [part for part in needed if not (parts.get(part) or [None])[0]]
        if missing:
            raise TrainingError(NO_SDXL.format(name=name, reason=f"it has no {missing[0]}"))
        unet, vae = (UNet2DConditionModel.load_config(name, subfolder=part, **options) for part in needed[:2])
        scheduler = DDPMScheduler.load_config(name, subfolder="scheduler", **options)
    unet_name = args.pretrained_unet_name_or_path
    with failing_together(f"--pretrained_unet_name_or_path {unet_name} cannot be loaded"):
        start = load_part(UNet2DConditionModel.load_config, unet_name, args, "unet") if unet_name else unet
        if any(start.get(key, default) != unet.get(key, default) for key, default in UNET_KIND.items()):
            raise TrainingError(f"--pretrained_unet_name_or_path {unet_name}: it is of another kind than {name}'s.")
    with failing_together(f"--pretrained_vae_model_name_or_path {vae_name} cannot be loaded"):
        other = AutoencoderKL.load_config(vae_name, cache_dir=args.cache_dir) if vae_name else vae
        if any(other.get(key, default) != vae.get(key, default) for key, default in LATENTS.items()):
            sentence = f"--pretrained_vae_model_name_or_path {vae_name}: its latents are not those of {name}."
            raise TrainingError(sentence)
    channels = vae.get("latent_channels", LATENTS["latent_channels"])
    no_betas = scheduler.get("use_flow_sigmas") or scheduler.get("timestep_type") == "continuous"
    prediction_type = scheduler.get("prediction_type", "epsilon")
    rules = [
        (unet.get("addition_embed_type") != "text_time", "its UNet does not take SDXL's sizes and crops"),
        ({unet.get("in_channels", 4), unet.get("out_channels", 4)} != {channels}, "its UNet takes more than latents"),
        (unet.get("time_cond_proj_dim"), "its UNet was distilled to take the guidance scale"),
        (no_betas or "beta_start" not in scheduler, "its scheduler is of EDM or flow matching"),
        (prediction_type not in ("epsilon", "v_prediction"), "it predicts no epsilon or v"),
        (vae.get("latents_mean") or vae.get("shift_factor"), "its VAE shifts its latents"),
    ]
    for reason in [reason for broken, reason in rules if broken]:
        raise TrainingError(NO_SDXL.format(name=name, reason=reason))
    if args.rank is not None:
        check_lora(args, start)
    side = args.resolution // 2 ** (len(other.get("block_out_channels", [64])) - 1)
    return (channels, side, side), DDPMScheduler.from_config(scheduler)


def load_part(load, name, args, subfolder=None, **options):
    """A part that a flag names, in its folder there or alone, and in the variant asked for if it has it."""
    for folder, variant in itertools.product(*(dict.fromkeys([x, None]) for x in (subfolder, args.variant))):
        try:
            return load(name, subfolder=folder, variant=variant, cache_dir=args.cache_dir, **options)
        except OSError as error:
            failure = error
    raise failure


def load_unet(args, dtype):
    """The UNet that training starts from."""
    options, name = {"use_safetensors": True, "dtype": dtype}, args.pretrained_unet_name_or_path
    if name is not None:
        return load_part(UNet2DConditionModel.from_pretrained, name, args, "unet", **options)
    options |= {"revision": args.revision, "variant": args.variant, "cache_dir": args.cache_dir}
    base = args.pretrained_model_name_or_path
    # Given the base, diffusers would say that its folder lacks a file that the UNet's lacks.
    folder, subfolder = (Path(base, "unet"), None) if os.path.isdir(base) else (base, "unet")
    return UNet2DConditionModel.from_pretrained(folder, subfolder=subfolder, **options)


def load_pipeline(args, accelerator, weight_dtype):
    """The SDXL pipeline on the device: frozen parts in `weight_dtype`, a wholly trained UNet in its own dtype."""
    unet_name, vae_name = args.pretrained_unet_name_or_path, args.pretrained_vae_model_name_or_path
    name, parts = args.pretrained_model_name_or_path, {}
    # Under ZeRO-3 transformers would shard the frozen text encoders as it loads them.
    transformers.integrations.unset_hf_deepspeed_config()
    whole_unet_dtype = torch.bfloat16 if args.full_bf16 else torch.float32
    unet_dtype = whole_unet_dtype if args.rank is None else weight_dtype
    advice = " (try --variant fp16)" if not args.variant and any(Path(name).glob("unet/*.fp16.*")) else ""
    sentence = f"--pretrained_model_name_or_path {name} cannot be loaded{advice}"
    # The UNet comes first: as it is cast, its files are mapped into memory beside it, and nothing else should be.
    with failing_together(f"--pretrained_unet_name_or_path {unet_name} cannot be loaded" if unet_name else sentence):
        parts["unet"] = load_unet(args, unet_dtype)
    if vae_name:
        with failing_together(f"--pretrained_vae_model_name_or_path {vae_name} cannot be loaded"):
            parts["vae"] = load_part(AutoencoderKL.from_pretrained, vae_name, args, use_safetensors=True)
    options = {"cache_dir": args.cache_dir, "use_safetensors": True, "add_watermarker": False}
    options |= {"revision": args.revision, "variant": args.variant}
    # Each part is loaded in the dtype that it keeps.
    options["dtype"] = {"vae": torch.float32, "default": weight_dtype}
    with failing_together(sentence):
        pipeline = StableDiffusionXLPipeline.from_pretrained(name, **parts, **options)
    dtypes = {"unet": unet_dtype, "text_encoder": weight_dtype, "text_encoder_2": weight_dtype}
    # What half precision overflows in is upcast.
    dtypes["vae"] = torch.float32 if pipeline.vae.config.force_upcast else weight_dtype
    for name, dtype in dtypes.items():
        getattr(pipeline, name).requires_grad_(False).to(accelerator.device, dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def trained_parts(args, pipeline):
    """The modules that are trained, wholly or with a LoRA, by their names in the pipeline."""
    names = ["unet", "text_encoder", "text_encoder_2"] if args.train_text_encoder else ["unet"]
    return {name: getattr(pipeline, name) for name in names}


def read_lora(folder, unet_config=None):
    """A LoRA of any format that diffusers knows, {name in peft's way: weight}, and its alphas if it says some."""
    options = {"unet_config": unet_config, "use_safetensors": True, "return_lora_metadata": True}
    weights, alphas, metadata = StableDiffusionXLPipeline.lora_state_dict(folder, **options)
    unet = {name: weight for name, weight in weights.items() if name.startswith("unet.")}
    text = {name: weight for name, weight in weights.items() if name not in unet}
    text = convert_state_dict_to_peft(convert_state_dict_to_diffusers(text)) if text else {}
    weights = convert_unet_state_dict_to_peft(unet) | text
    alphas = set((alphas or {}).values()) or {(metadata or {}).get("unet.lora_alpha")}
    return weights, alphas - {None}


def names_in_files(part, own_names):
    """Names in a file of what has `own_names` in a part of the pipeline."""
    # transformers 5 has a flat CLIPTextModel; other readers know the names of before.
    flat = isinstance(part, transformers.CLIPTextModel) and not hasattr(part, "text_model")
    return [f"text_model.{own}" if flat else own for own in own_names]


def set_lora(parts, weights):
    """Copy a LoRA of a file into those that the parts have; all of its weights must be theirs."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    weights = dict(weights)
    for name, part in parts.items():
        own = list(get_peft_model_state_dict(part))
        own = {key: weights.pop(f"{name}.{in_file}") for key, in_file in zip(own, names_in_files(part, own))}
        set_peft_model_state_dict(part, own)
        cast_training_params(part, torch.float32)
    if weights:
        raise ValueError(f"{len(weights)} of its weights are of no layer, as {next(iter(weights))}")


def add_lora(args, parts):
    """Give the parts that are trained a new LoRA, or the one to continue."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    with failing_together(f"--init_lora {args.init_lora} cannot be loaded"):
        weights = read_lora(args.init_lora, parts["unet"].config)[0] if args.init_lora else {}
        adapted = {}  # by the LoRA to continue
        for name, part in parts.items():
            modules = [module for module, _ in part.named_modules()]
            in_files = zip(modules, names_in_files(part, modules))
            layers = [module for module, in_file in in_files if f"{name}.{in_file}.lora_A.weight" in weights]
            if layers:
                adapted[name] = part
            elif name == "unet":
                layers = [layer for choice in args.lora_layers for layer in LORA_LAYERS.get(choice, [choice])]
            else:
                # The output of the first encoder's last layer is not used, it would get no gradient.
                layers = range(part.config.num_hidden_layers - (name == "text_encoder"))
                layers = [f"layers.{number}.self_attn.{layer}" for number in layers for layer in TEXT_LORA_LAYERS]
            options = {"lora_alpha": args.lora_alpha or args.rank, "init_lora_weights": "gaussian"}
            inject_adapter_in_model(LoraConfig(r=args.rank, target_modules=layers, **options), part)
            for module in part.modules():
                if isinstance(module, BaseTunerLayer):
                    module.cast_input_dtype_enabled = False  # autocast would round its float32 copies again
            cast_training_params(part, torch.float32)
        set_lora(adapted, weights)


def make_trainable(args, pipeline):
    """Choose what is trained, the whole UNet or LoRA adapters; return the parameters of each trained part."""
    unet = pipeline.unet
    if args.rank is None:
        unet.requires_grad_(True)
    else:
        add_lora(args, trained_parts(args, pipeline))
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.compile:
        # A block is compiled for each width and length, to train and to draw. Past the limit it would run uncompiled.
        torch._dynamo.config.recompile_limit = 64
        torch._logging.set_logs(graph_breaks=True)
        unet.compile_repeated_blocks(dynamic=False)  # in place, so that the weights keep their names
    unet.train()
    parts = trained_parts(args, pipeline).values()
    return [[parameter for parameter in part.parameters() if parameter.requires_grad] for part in parts]


def round_stochastically(weights, generator):
    """float32 weights rounded up or down to bfloat16, the upper half of their bits, such that the mean is kept."""
    bits = torch.empty_like(weights, dtype=torch.int32).random_(2**16, generator=generator)
    return bits.add_(weights.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32).to(torch.bfloat16)


class StochasticRounding:
    """Lets a bitsandbytes optimizer update bfloat16 weights in float32, one tensor at a time, and round them."""

    @torch.no_grad()
    def update_step(self, group, p, gindex, pindex):
        # The step is made on a copy, because DDP's buckets hold on to the parameter and its gradient.
        shadow = torch.nn.Parameter(p.float())
        shadow.grad = p.grad.float()
        self.state[shadow] = self.state[p]
        super().update_step(group, shadow, gindex, pindex)
        del self.state[shadow]
        # Seeded the same on all processes and after a restart; generators on CPU have 32 bits of seed.
        generator = torch.Generator(p.device).manual_seed(2**12 * self.state[p]["step"] + pindex)
        p.copy_(round_stochastically(shadow.data, generator))


def build_optimizer(args, parameters, pairs_per_step):
    """AdamW, with 32-bit or 8-bit states, at the learning rates from which the schedules of all parts start."""
    optimizer_class = functools.partial(torch.optim.AdamW, fused=True)  # otherwise it copies all gradients
    if args.use_8bit_adam:
        import bitsandbytes

        optimizer_class = bitsandbytes.optim.AdamW8bit
        if args.full_bf16:
            optimizer_class = type("RoundedAdamW8bit", (StochasticRounding, optimizer_class), {})
    rates = (args.learning_rate, args.text_encoder_lr, args.text_encoder_lr)
    scale = pairs_per_step if args.scale_lr else 1
    groups = [{"params": group, "lr": scale * rate} for group, rate in zip(parameters, rates)]
    betas, decay = (args.adam_beta1, args.adam_beta2), args.adam_weight_decay
    return optimizer_class(groups, groups[0]["lr"], betas, args.adam_epsilon, weight_decay=decay)


def build_schedule(args, optimizer, step):
    """The learning rate schedule from `step` on, in optimizer steps whatever the number of processes."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    # The polynomial schedule divides by the steps after the warmup.
    steps = {"num_training_steps": max(args.max_train_steps, args.lr_warmup_steps + 1), "last_epoch": step - 1}
    steps |= {"num_warmup_steps": args.lr_warmup_steps, "num_cycles": args.lr_num_cycles, "power": args.lr_power}
    return get_scheduler(args.lr_scheduler, optimizer, **steps)


@torch.no_grad()
def check_vae(args, vae, pair):
    """A VAE that overflows in half precision should not be found out by its NaN."""
    if not encode_images(args, vae, pair["pixel_values"].to(vae.device)).isfinite().all():
        flag, advice = "--pretrained_vae_model_name_or_path", "madebyollin/sdxl-vae-fp16-fix does not overflow"
        raise TrainingError(f"{flag}: the VAE encodes the images of {pair['row']} to NaN in {vae.dtype}; {advice}.")


def encode_images(args, vae, pixel_values):
    """Mean and standard deviation of the posterior of `(images, 3, h, w)` uint8: `(images, 2, channels, h/8, w/8)`."""
    moments = []
    for pixels in pixel_values.split(args.vae_encode_batch_size):
        distribution = vae.encode(pixels.to(vae.dtype) / 127.5 - 1).latent_dist
        moments.append(torch.stack([distribution.mean, distribution.std], dim=1))
    return torch.cat(moments)


def warn_of_long_captions(captions, tokenizer):
    """Say how many captions have more tokens than SDXL reads."""
    long = sum(len(ids) > tokenizer.model_max_length for ids in tokenizer(captions).input_ids)
    if long:
        logger.warning(
            f"{long} of the first {len(captions)} captions have more than {tokenizer.model_max_length} tokens; SDXL "
            "ignores the rest."
        )


def encode_prompts(pipeline, prompts, text_encoders):
    """Each prompt by itself: prompt_embeds `(prompts, tokens, dim)`, pooled_prompt_embeds `(prompts, pooled_dim)`."""
    prompt_embeds, pooled_prompt_embeds = [], []
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    for prompt in prompts:
        hidden_states = []
        # `pipeline.encode_prompt` would wait for the device.
        for tokenizer, text_encoder in zip((pipeline.tokenizer, pipeline.tokenizer_2), text_encoders):
            input_ids = tokenizer(prompt, **options).input_ids
            on_device = input_ids.to(pipeline.text_encoder.device, non_blocking=True)
            output = text_encoder(on_device, output_hidden_states=True)
            hidden_states.append(output.hidden_states[-2])
        prompt_embeds.append(torch.cat(hidden_states, dim=-1))
        pooled_prompt_embeds.append(output.text_embeds)
    return torch.cat(prompt_embeds), torch.cat(pooled_prompt_embeds)


def encode_pairs(run, batch):
    """Samples of the VAE's posterior `(2 * pairs, channels, height, width)`, and what `encode_prompts` gives."""
    vae = run.pipeline.vae
    if "moments" in batch:
        moments, embeds = batch["moments"], [batch[name] for name in EMBEDDINGS]
    else:
        with torch.no_grad():
            moments = encode_images(run.args, vae, batch["pixel_values"])
        embeds = encode_prompts(run.pipeline, batch["caption"], run.text_encoders)
    mean, std = moments.float().unbind(dim=1)
    return (mean + std * batch["posterior_noise"]) * vae.config.scaling_factor, *embeds


# Cache ---------------------------------------------------------------------------------------------------------------
EMBEDDINGS = ("prompt_embeds", "pooled_prompt_embeds")
PAIRS_A_ROUND = 16  # that a process encodes before it meets the others


def read_cached(path, flip):
    """What `load_pair` gives, encoded: moments `(2, 2, channels, height, width)` of the two images, and embeddings."""
    with safetensors.safe_open(path, framework="pt") as file:
        labels, unusable = json.loads(file.metadata()["pair"])
        if unusable:
            raise UnusableRow(unusable)
        tensors = {name: file.get_tensor(name) for name in ("add_time_ids", *EMBEDDINGS)}
        return {**tensors, "moments": file.get_slice("moments")[:, int(flip)], "labels": labels}


def load_images(pairs, numbers):
    """`load_pair` of the one number, in all orientations, or why it cannot be used."""
    flips = [False] if pairs.args.no_hflip else [False, True]
    try:
        return load_pair(pairs.args, pairs.source.record(*pairs.index[numbers[0]]), (0.5, 0.5), flips)
    except UnusableRow as reason:
        return {"labels": None, "unusable": str(reason)}


@torch.no_grad()
def cache_pair(args, pipeline, path, item):
    """Encode and write what `load_images` gives."""
    tensors, unusable = {}, item.get("unusable")
    if unusable is None:
        pixel_values = item["pixel_values"].to(pipeline.vae.device)
        moments = encode_images(args, pipeline.vae, pixel_values.flatten(0, 1)).unflatten(0, (2, -1))
        unusable = None if moments.isfinite().all() else "has an image that the VAE encodes to NaN"
        text_encoders = pipeline.text_encoder, pipeline.text_encoder_2
        embeds = encode_prompts(pipeline, [item["caption"]], text_encoders)
        embeds = dict(zip(EMBEDDINGS, [values[0] for values in embeds]))
        tensors = {"moments": moments, "add_time_ids": item["add_time_ids"], **embeds}
    metadata = {"pair": json.dumps([item["labels"], unusable])}
    write_whole(path, functools.partial(safetensors.torch.save_file, tensors, metadata=metadata))


def digest_of(part):
    """Of a part's weights, one after the other: pickled together they would take several times their memory."""
    digest = hashlib.sha256()
    for name, weight in part.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.flatten().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


def fill_caches(args, accelerator, pipeline, *data):
    """
    Give each of these data sets a cache, a folder for everything that changes what is stored, with a file for each
    pair. Each process encodes a stretch of the pairs that are missing; then the encoders are moved off the device.
    """
    parts = pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2
    settings = [[str(part), str(part.config), digest_of(part)] for part in parts]
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
        settings += [tokenizer("", padding="max_length").input_ids, tokenizer.backend_tokenizer.to_str()]
    settings += [args.resolution, args.no_hflip, args.allow_tf32]
    for pairs in data:
        key = Hasher.hash([settings, pairs.source.fingerprint, pairs.index])
        # One folder and one list for all processes, made before any of them writes.
        key = gather_object([key])[0]
        pairs.cache = Path(args.cache_dir or datasets.config.HF_DATASETS_CACHE, "mapo_latents", key)
        missing = gather_object([[n for n in range(len(pairs.index)) if not pairs.cached(n).exists()]])[0]
        mine = np.array_split(missing, accelerator.num_processes)[accelerator.process_index]
        # A loader's workers take turns, so each of them gets a stretch, too.
        stretches = np.array_split(mine, args.dataloader_num_workers or 1)
        mine = [[int(pair)] for turn in itertools.zip_longest(*stretches) for pair in turn if pair is not None]
        loader = make_loader(args, range(len(pairs.index)), mine, functools.partial(load_images, pairs))
        items = zip(mine, tqdm(loader, "Encoding pairs", len(mine)))
        # The processes meet after each round, so that none waits for long, and one's failure soon ends all.
        for _ in range(0, math.ceil(len(missing) / accelerator.num_processes), PAIRS_A_ROUND):
            with failing_together(f"--cache_latents: pairs could not be encoded into {pairs.cache}"):
                for (pair,), item in itertools.islice(items, PAIRS_A_ROUND):
                    cache_pair(args, pipeline, pairs.cached(pair), item)
    for part in parts:
        part.to("cpu")


# Checkpoints ---------------------------------------------------------------------------------------------------------
STATE, LORA_FILE = "mapo_state.json", "pytorch_lora_weights.safetensors"
KOHYA_FILE = "pytorch_lora_weights_kohya.safetensors"
# A difference in one of the first settings is refused; in any other but the last ones it is reported.
FIXED_ON_RESUME = ("rank", "lora_alpha", "lora_layers", "init_lora", "train_text_encoder", "use_8bit_adam")
FIXED_ON_RESUME += ("full_bf16", "streaming", "shuffle_shards", "seed", "sharding")
FREE_ON_RESUME = ("resume_from_checkpoint", "max_train_steps", "hub_token", "output_dir")


@dataclass
class Progress:
    """How far a run has come, the same on all processes: the whole state that checkpoints add to accelerate's."""

    run_id: str = ""  # of the run from its first start on
    step: int = 0
    pairs_seen: int = 0
    rows_read: int = 0
    rows_bad: int = 0
    bad_steps: int = 0
    skipped_steps: int = 0
    order: list = field(default_factory=list)  # shards mixed, lanes, turn: kept when the number of processes changes
    first_eval: dict = field(default_factory=dict)  # step and eval_ metrics of the run's first validation


def save_trained_weights(run, folder):
    """Write `pytorch_lora_weights.safetensors` or `unet/`, by all processes: sharded weights are gathered."""
    # Unwrapping for it would leave a compiled UNet without DDP.
    weights = {name: run.accelerator.get_state_dict(part, unwrap=False) for name, part in run.trained.items()}
    if not run.accelerator.is_main_process:
        return
    weights = {
        part: {name.replace("_orig_mod.", "").removeprefix("module."): w for name, w in tensors.items()}
        for part, tensors in weights.items()
    }
    if run.args.rank is None:
        unet = run.pipeline.unet
        with torch.device("meta"):
            # Without the folder that the base model was loaded from.
            whole = UNet2DConditionModel.from_config({k: v for k, v in unet.config.items() if k != "_name_or_path"})
        whole.load_state_dict(weights["unet"], assign=True)
        whole.save_pretrained(folder / "unet")
        files, names = (folder / "unet").glob("*.safetensors"), set(unet.state_dict())
    else:
        from peft import get_peft_model_state_dict

        lora, names = {}, set()
        for name, part in trained_parts(run.args, run.pipeline).items():
            names |= {f"{name}.{in_file}" for in_file in names_in_files(part, get_peft_model_state_dict(part))}
            layers = get_peft_model_state_dict(part, state_dict=weights[name])
            lora[f"{name}_lora_layers"] = dict(zip(names_in_files(part, layers), layers.values()))
            lora[f"{name}_lora_adapter_metadata"] = part.peft_config["default"].to_dict()
        StableDiffusionXLPipeline.save_lora_weights(folder, **lora)
        files = [folder / LORA_FILE]
    # Whatever wraps the UNet, the files hold the names that pipelines load.
    if set().union(*(safetensors.safe_open(file, "pt").keys() for file in files)) != names:
        raise TrainingError(f"{folder} was written with other names than the UNet's weights have.")


def load_trained_weights(args, pipeline, folder):
    """Load what `save_trained_weights` wrote into the same parameters, which the optimizer already holds."""
    if args.rank is None:
        weights = UNet2DConditionModel.from_pretrained(folder / "unet", use_safetensors=True).state_dict()
        pipeline.unet.load_state_dict(weights)
    else:
        set_lora(trained_parts(args, pipeline), read_lora(folder)[0])


def list_checkpoints(output_dir):
    """Complete checkpoints, oldest first: the state file is written last and removed first."""
    return sorted((path.parent for path in output_dir.glob(f"checkpoint-*/{STATE}")), key=lambda p: int(p.name[11:]))


def checkpoint_settings(args, accelerator):
    """The flags, and how weights are sharded: whole ones can be resumed on any number of processes."""
    plugin, settings = accelerator.state.deepspeed_plugin, {**vars(args), "sharding": "none"}
    kind = f"DeepSpeed ZeRO-{plugin.zero_stage}" if plugin else "FSDP"
    if plugin or accelerator.distributed_type == DistributedType.FSDP:
        settings["sharding"] = f"{kind} over {accelerator.num_processes} processes"
    return {name: value for name, value in settings.items() if name not in FREE_ON_RESUME}


def read_state(folder):
    """What a checkpoint's state file holds."""
    try:
        return json.loads((folder / STATE).read_text())
    except (OSError, ValueError) as error:
        raise TrainingError(f"--resume_from_checkpoint {folder} is no checkpoint of this script: {error}") from error


def find_checkpoint(args, accelerator):
    """The folder to resume from and the state it was written with, or (None, None); settles the seed."""
    output_dir, asked = Path(args.output_dir), args.resume_from_checkpoint
    if asked == "latest":
        asked = next(reversed(list_checkpoints(output_dir)), None)
    if asked is None:
        refuse_other_runs(output_dir, {})
        return None, None
    folder = Path(asked) if Path(asked).exists() else output_dir / asked
    state = read_state(folder)
    refuse_other_runs(output_dir, state)
    if folder.resolve().parent != output_dir.resolve():
        state.pop("run_id", None)  # in another folder it is another run
    args.seed = state["settings"]["seed"] if args.seed is None else args.seed
    for name, value in checkpoint_settings(args, accelerator).items():
        old = state["settings"].get(name)
        if value != old:
            if name in FIXED_ON_RESUME:
                raise TrainingError(f"--resume_from_checkpoint: {name} is {value}, but {old} in {folder}.")
            logger.warning(f"--resume_from_checkpoint: {name} is {value} from here on, it was {old}.")
    return folder, state


def refuse_other_runs(output_dir, state):
    """A run must not mix its checkpoints with those of others, or of a later step, nor write over a result."""
    others, folders = [], list_checkpoints(output_dir)
    for folder in folders:
        other = read_state(folder)
        if not state or other["run_id"] != state["run_id"] or other["step"] > state["step"]:
            others.append(folder)
    if others == folders:  # nothing here is of this run
        others = [output_dir / name for name in (LORA_FILE, "unet") if (output_dir / name).exists()] + others
    if others:
        ways = "choose another one" + ", or continue with --resume_from_checkpoint latest" * bool(folders)
        raise TrainingError(f"--output_dir {output_dir} holds {others[-1].name} of another or a longer run: {ways}.")


def start_progress(args, accelerator, state, source):
    """Progress of a new run, or of the one whose state is given."""
    lanes = accelerator.num_processes * max(args.dataloader_num_workers, 1) if args.streaming else 1
    order, run_id = [args.shuffle_shards, lanes, args.train_batch_size], gather_object([os.urandom(4).hex()])[0]
    progress = Progress(run_id=run_id, order=order)
    if state is not None:
        vars(progress).update({name: value for name, value in state.items() if name != "settings"})
    if progress.order != order:
        # A process may need the shards of all lanes of the run that it continues.
        source.shards_kept *= progress.order[1]
    return progress


def resume(run, checkpoint, state):
    """Load a checkpoint, and make up for the validation that was to follow it."""
    args, progress = run.args, run.progress
    # What the flags say of rates and decay holds from here on; fused belongs to the states of the checkpoint.
    groups = [group.items() for group in run.optimizer.param_groups]
    flags = [{name: value for name, value in group if name not in ("params", "fused")} for group in groups]
    with failing_together(f"--resume_from_checkpoint {checkpoint} cannot be loaded"):
        if state["settings"]["sharding"] == "none":
            load_trained_weights(args, run.pipeline, checkpoint)
        run.accelerator.load_state(checkpoint)
    for group, values in zip(run.optimizer.param_groups, flags):
        group.update(values)
    if progress.step < args.max_train_steps and progress.step % args.validation_steps == 0:
        validate(run)


def save_checkpoint(run):
    """Write checkpoint-{step} by all processes; only when it is complete are the oldest ones removed."""
    args, accelerator, output_dir = run.args, run.accelerator, Path(run.args.output_dir)
    folder = output_dir / f"checkpoint-{run.progress.step}"
    sentence = f"{folder} could not be written, older checkpoints are untouched"
    # Processes that hold shards meet while they save, so one that fails ends alone, and the launcher ends the others.
    settings = checkpoint_settings(args, accelerator)
    with failing_together(sentence, together=settings["sharding"] == "none"):
        if accelerator.is_main_process:
            folder.mkdir(exist_ok=True)
        save_trained_weights(run, folder)
        accelerator.save_state(folder)
    accelerator.wait_for_everyone()
    with failing_together(sentence):
        if accelerator.is_main_process:
            state = json.dumps({**asdict(run.progress), "settings": settings}, indent=2)
            write_whole(folder / STATE, functools.partial(Path.write_text, data=state))
            others = [other for other in list_checkpoints(output_dir) if other != folder]
            for old in others[: max(len(others) + 1 - (args.checkpoints_total_limit or sys.maxsize), 0)]:
                (old / STATE).unlink()
                shutil.rmtree(old)
    logger.info(f"Saved {folder}")


# Validation ----------------------------------------------------------------------------------------------------------
BANDS = 4


@torch.no_grad()
def evaluate_pairs(run):
    """
    Log and return the eval_ metrics: METRICS of the held-out pairs, at noise and timesteps that never change, and
    accuracy and margin in BANDS of noise level, which a mean over all timesteps hides.
    """
    accelerator, size, num_pairs = run.accelerator, run.args.train_batch_size, len(run.held_out.index)
    turns = math.ceil(num_pairs / (size * accelerator.num_processes))
    chunks = np.array_split(np.arange(num_pairs), turns * accelerator.num_processes)
    # All processes make as many forward passes, since sharded weights are gathered in step; an added one weighs 0.
    chunks = chunks[accelerator.process_index :: accelerator.num_processes]
    batches = [[(int(n), int(n)) for n in chunk] or [(0, 0)] for chunk in chunks]
    width = run.noise_scheduler.config.num_train_timesteps / BANDS
    sums = torch.zeros(BANDS, len(METRICS) + 1, dtype=torch.float64, device=accelerator.device)
    for chunk, batch in zip(chunks, make_loader(run.args, run.held_out, batches)):
        metrics = F.pad(preference_step(run, batch)[1].T, (0, 1), value=1.0)  # the last column counts the pairs
        band = (batch["timesteps"] / width).long().to(accelerator.device)
        sums.index_add_(0, band, metrics * (len(chunk) > 0))
    sums = accelerator.reduce(sums).cpu()
    metrics = dict(zip([f"eval_{name}" for name in METRICS], (sums.sum(dim=0) / num_pairs).tolist()))
    logger.info(f"Step {run.progress.step}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    for name in ("accuracy", "margin"):
        bands = [f"eval_{name}_t{width * band:.0f}_{width * (band + 1) - 1:.0f}" for band in range(BANDS)]
        values = (sums[:, METRICS.index(name)] / sums[:, -1]).tolist()
        metrics |= {band: value for band, value in zip(bands, values) if not math.isnan(value)}  # a band without pairs
    with tracking(accelerator):
        accelerator.log(metrics, step=run.progress.step)
    return metrics


def judge(first, last):
    """Warn of a run that destroys the model, by its held-out errors at the first and at the last validation."""
    chosen, rejected = (f"eval_{name}" for name in ("chosen_mse", "rejected_mse"))
    if not last[chosen] <= 1.01 * first[chosen]:  # or NaN
        change = f"{last[chosen]:.4g} at step {last['step']}, {first[chosen]:.4g} at step {first['step']}"
        logger.warning(f"{chosen} has risen ({change}): --learning_rate is too large, or --beta_mapo too small.")
    if last[rejected] > max(1, first[rejected]):
        logger.warning(
            f"{rejected} is {last[rejected]:.4g} at step {last['step']}: to predict nothing at all gives 1, so images "
            "fall apart; --beta_mapo is too small, or --learning_rate too large."
        )


@torch.no_grad()
def draw_images(run):
    """One image for each validation prompt at a fixed seed, the prompts dealt to the processes."""
    args, pipeline, vae, images = run.args, run.pipeline, run.pipeline.vae, []
    size = {"height": args.resolution, "width": args.resolution, "num_inference_steps": args.num_inference_steps}
    options = {**size, "guidance_scale": args.guidance_scale, "output_type": "latent"}
    home, encoders = vae.device, (vae, pipeline.text_encoder, pipeline.text_encoder_2)
    pipeline.to(run.accelerator.device)
    with run.accelerator.split_between_processes(list(enumerate(args.validation_prompts)), apply_padding=True) as mine:
        for number, prompt in mine:
            with autocast(run):
                latents = pipeline(prompt, **options, generator=torch.Generator().manual_seed(number)).images
            # Decoded outside of the pipeline, because the VAE may need another precision than the UNet.
            pixels = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
            images.append((number, pipeline.image_processor.postprocess(pixels.float())[0]))
    for part in encoders:
        part.to(home)
    return [image for _, image in sorted(dict(gather_object(images)).items())]


def validate(run):
    """Log the eval_ metrics (and return them) and the images, base left and aligned right."""
    args, accelerator, step, metrics = run.args, run.accelerator, run.progress.step, {}
    run.unet.eval()
    if len(run.held_out.index) > 0:
        metrics = evaluate_pairs(run)
        last = {"step": step, **metrics}
        run.progress.first_eval = run.progress.first_eval or last
        judge(run.progress.first_eval, last)
    if run.base_images:
        images = draw_images(run)
        cells = [image for row in zip(run.base_images, images) for image in row]
        grid = diffusers.utils.make_image_grid(cells, rows=len(images), cols=2)
        if accelerator.is_main_process:
            path = Path(args.output_dir, "validation", f"step-{step:06d}.png")
            with tracking(accelerator):
                path.parent.mkdir(exist_ok=True)
                grid.save(path)
                for tracker in accelerator.trackers:
                    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    tracker.log_images({"validation": np.asarray(grid)[None]}, step=step, **layout)
    run.unet.train()
    return metrics


# Results -------------------------------------------------------------------------------------------------------------
MODEL_CARD = """# {name}

{kind} of `{args.pretrained_model_name_or_path}`, aligned for {step} steps on the pairs of `{args.dataset_name}` with
[MaPO](https://arxiv.org/abs/2406.06424), objective `{args.loss_type}` at beta {args.beta_mapo}.
{picture}
```python
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

pipeline = StableDiffusionXLPipeline.from_pretrained("{args.pretrained_model_name_or_path}")
pipeline.{load}
image = pipeline.to("cuda")("a lighthouse on a cliff at dusk").images[0]
```

{lines}
"""


def published(args):
    """The flags without the token and, of what lies on this machine, with the last name of its path alone."""
    flags = {name: value for name, value in vars(args).items() if name != "hub_token"}
    local = [n for n, v in flags.items() if isinstance(v, str) and (os.path.isabs(v) or os.path.exists(v))]
    return argparse.Namespace(**flags | {name: Path(flags[name]).resolve().name for name in local})


def write_model_card(args, metrics, step):
    """README.md of the output folder: what was trained on what, how, how well, and how to load it."""
    output_dir, picture = Path(args.output_dir), f"validation/step-{step:06d}.png"
    base_model = args.pretrained_model_name_or_path
    base_model = None if os.path.exists(base_model) else base_model  # the hub refuses the card of a local one
    args = published(args)
    picture = f"\n![base and aligned]({picture})\n" if (output_dir / picture).exists() else ""
    kind, load = f"LoRA of rank {args.rank}", 'load_lora_weights("FOLDER_OR_REPO")'
    if args.rank is None:
        kind, load = "UNet", 'unet = UNet2DConditionModel.from_pretrained("FOLDER_OR_REPO", subfolder="unet")'
    lines = {f"`--{name}`": value for name, value in vars(args).items() if value is not None}
    lines |= {library.__name__: library.__version__ for library in (torch, diffusers, transformers, datasets)}
    lines = "\n".join(f"- {name}: {value}" for name, value in {**metrics, **lines}.items())
    texts = {"name": output_dir.resolve().name, "kind": kind, "picture": picture, "load": load, "lines": lines}
    text = MODEL_CARD.format(args=args, step=step, **texts)
    data = ModelCardData(base_model=base_model, license="openrail++")
    tags = ["stable-diffusion-xl", "text-to-image", "diffusers-training", "mapo", "lora" if args.rank else "unet"]
    card = populate_model_card(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"), tags=tags)
    card.save(output_dir / "README.md")


def write_kohya_lora(folder):
    """The LoRA of a folder once more, under the names that ComfyUI, A1111 and sd-scripts know."""
    weights, (alpha,) = read_lora(folder)
    weights = convert_state_dict_to_kohya(weights)
    weights |= {name: torch.tensor(float(alpha)) for name in weights if name.endswith(".alpha")}
    write_whole(folder / KOHYA_FILE, functools.partial(safetensors.torch.save_file, weights))


def finish(run):
    """Save the trained weights first; then a checkpoint, to train them longer; then validate and describe them."""
    args, accelerator, progress, output_dir = run.args, run.accelerator, run.progress, Path(run.args.output_dir)
    with failing_together(f"{output_dir} could not be written, the checkpoints are untouched"):
        save_trained_weights(run, output_dir)
        if accelerator.is_main_process and args.rank is not None and not args.no_kohya_format:
            write_kohya_lora(output_dir)
    # A finished run that is run again has it; one process looks, so that all do the same.
    if not gather_object([(output_dir / f"checkpoint-{progress.step}" / STATE).exists()])[0]:
        save_checkpoint(run)
    metrics = validate(run)
    with failing_together(f"{output_dir}/README.md could not be written, the weights are saved"):
        if accelerator.is_main_process:
            write_model_card(args, metrics, progress.step)
    logger.info(f"{progress.rows_bad} of {progress.rows_read} rows read could not be used.")


def create_hub_repo(args, accelerator):
    """Make the repository to upload to before training, so that a wrong name or token costs nothing; its id."""
    private = args.hub_private_repo or None  # as the organization has it
    with failing_together("--push_to_hub: the repository cannot be created"):
        if args.push_to_hub and accelerator.is_main_process:
            repo_id = args.hub_model_id or Path(args.output_dir).resolve().name
            return create_repo(repo_id, exist_ok=True, private=private, token=args.hub_token).repo_id


def send(args, trackers, repo_id):
    """Finish the trackers, and upload the output folder to `repo_id`, if any. No failure may cost what is saved."""
    try:
        for tracker in trackers:
            tracker.finish()
    except Exception as error:
        logger.warning(f"--report_to: the tracker could not be finished ({one_line(error)}).")
    options = {"ignore_patterns": ["checkpoint-*/**", ".*/**", f"{args.logging_dir}/wandb/**"]}
    options |= {"folder_path": args.output_dir, "commit_message": "End of training", "token": args.hub_token}
    try:
        if repo_id is not None:
            upload_folder(repo_id=repo_id, **options)
    except Exception as error:
        logger.error(f"--push_to_hub failed ({error}); upload by hand: hf upload {repo_id} {args.output_dir}")


# Training ------------------------------------------------------------------------------------------------------------
STOPPED = 75  # the exit status after a stop request (EX_TEMPFAIL: run it again)
# Windows has no SIGUSR1.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class StopRequest:
    """Remembers Ctrl-C, and SIGTERM and SIGUSR1 of SLURM and cloud preemption, until the end of a step."""

    def __init__(self):
        self.received = False
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # which shells give to jobs in the background
                signal.signal(number, self.remember)

    def remember(self, number, frame):
        self.received = True
        if number == signal.SIGINT:
            # Python's own writing must not be entered again from here.
            os.write(2, b"\nCtrl-C: finishing this step and saving a checkpoint. Press it again to quit at once.\n")
            # torchrun sends SIGINT for the first Ctrl-C, SIGTERM for the second one.
            for again in (signal.SIGINT, signal.SIGTERM):
                signal.signal(again, signal.SIG_DFL)


def ignore_stop_signals(worker):
    """Launchers signal a loader's workers, too; the process that reads from them decides."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def tracking(accelerator):
    """Talk to the trackers; one that fails, from the start or in mid-run, must not cost a run."""
    try:
        yield
    except Exception as error:
        logger.warning(f"--report_to: training continues without trackers ({one_line(error)}).")
        accelerator.trackers = []


def start_trackers(run):
    """A resumed run goes on in W&B, and in TensorBoard hides the points that it makes again."""
    args, step = run.args, run.progress.step
    values = {n: v if isinstance(v, (int, float)) else str(v) for n, v in vars(published(args)).items()}
    options = {"wandb": {"dir": str(Path(args.output_dir, args.logging_dir)), "id": run.progress.run_id}}
    options["wandb"]["resume"] = "allow"
    options["tensorboard"] = {"purge_step": step + 1} if step else {}
    with tracking(run.accelerator):
        run.accelerator.init_trackers(args.tracker_name, values, init_kwargs=options)


def check_steps(args, state):
    """What the number of steps has to fit to, and a hint for a beta of the other objective."""
    if state is not None and state["step"] > args.max_train_steps:
        raise TrainingError(f"--max_train_steps {args.max_train_steps}: the checkpoint is of step {state['step']}.")
    if args.lr_scheduler != "constant" and args.lr_warmup_steps > args.max_train_steps:
        share = f"{args.max_train_steps / args.lr_warmup_steps:.0%} of the learning rate is reached"
        logger.warning(f"--lr_warmup_steps {args.lr_warmup_steps}: in {args.max_train_steps} steps only {share}.")
    if args.loss_type == "mapo" and args.beta_mapo < 1:
        logger.warning(f"--beta_mapo {args.beta_mapo} is a value for --loss_type mapo_v1; the paper takes 8 to 64.")


def configure_sharding(args, accelerator, weight_dtype):
    """Refuse what FSDP and DeepSpeed cannot do, and keep their gradients and trained weights in float32."""
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if args.train_text_encoder and sharded:
        raise TrainingError("--train_text_encoder: one model can be sharded, use launch_configs/multi_gpu.yaml.")
    if accelerator.distributed_type == DistributedType.FSDP:
        if args.use_8bit_adam:
            raise TrainingError("--use_8bit_adam: bitsandbytes cannot step sharded weights, use deepspeed_zero2.yaml.")
        # Gradients are summed over micro-batches and processes in float32, as with DDP.
        plugin = accelerator.state.fsdp_plugin
        if plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        if args.full_bf16:
            raise TrainingError("--full_bf16: DeepSpeed keeps float32 weights, use launch_configs/multi_gpu.yaml.")
        if weight_dtype == torch.float16:
            raise TrainingError("--mixed_precision fp16: DeepSpeed would clip gradients that are still scaled.")
        # DeepSpeed's own half-precision modes would round the trained weights, too; torch's autocast does not.
        config, half = accelerator.state.deepspeed_plugin.deepspeed_config, weight_dtype == torch.bfloat16
        config |= {"fp16": {"enabled": False}, "bf16": {"enabled": False}, "gradient_clipping": args.max_grad_norm}
        config["torch_autocast"] = {"enabled": half, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        config["train_micro_batch_size_per_gpu"] = args.train_batch_size


def build_accelerator(args):
    """The Accelerator, and the dtype of computation and frozen weights."""
    logging_dir = Path(args.output_dir, args.logging_dir)
    # Otherwise DDP would hold every gradient twice.
    handlers = [AutocastKwargs(cache_enabled=not args.gradient_checkpointing)]
    handlers.append(DistributedDataParallelKwargs(gradient_as_bucket_view=True))
    try:
        logging_dir.mkdir(parents=True, exist_ok=True)
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=TRACKERS[args.report_to] or None,
            project_dir=logging_dir,
            kwargs_handlers=handlers,
        )
    except OSError as error:
        raise TrainingError(f"--output_dir {args.output_dir} cannot be written: {error.strerror}.") from error
    except ValueError as error:
        raise TrainingError(f"--mixed_precision {args.mixed_precision} does not work here: {error}") from error
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    if weight_dtype == torch.float16 and accelerator.device.type == "cpu":
        raise TrainingError("--mixed_precision fp16 needs a GPU, use bf16 or no.")
    if accelerator.device.type == "mps":
        raise TrainingError("Apple GPUs have no float64, which the objective needs: use launch_configs/cpu.yaml.")
    if accelerator.state.dynamo_plugin.use_regional_compilation:
        raise TrainingError("--dynamo_use_regional_compilation does not work with this UNet, use --compile instead.")
    configure_sharding(args, accelerator, weight_dtype)
    if accelerator.gradient_accumulation_steps != args.gradient_accumulation_steps:
        raise TrainingError("--gradient_accumulation_steps: the launch config has another number, leave it out there.")
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s")
    logging.getLogger(__name__).setLevel(logging.INFO)
    for library in (datasets, transformers, diffusers):
        library.utils.logging.set_verbosity_error()
    # PyTorch's own default is TF32 in convolutions alone.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    return accelerator, weight_dtype


def train_step(run, micro_batches, batches, stop):
    """
    One optimizer step; the next one's batches are read while the device computes. What the processes must agree on
    travels with the metrics in one reduction, behind which all is plain Python on equal numbers: neither a broken
    source nor a signal costs a half-done step. Returns the next batches (or the exception that reading them raised),
    whether reading failed on any process, whether any process was asked to stop, and what to log of the step, with
    METRICS only if its gradient was finite.
    """
    args, accelerator, progress = run.args, run.accelerator, run.progress
    rows, skipped, sums = [], 0, 0
    while micro_batches:
        batch = micro_batches.pop(0)
        rows, skipped = rows + batch["row"], skipped + int(batch["skipped"].sum())
        with accelerator.accumulate(*run.trained.values()):
            loss, metrics = preference_step(run, batch)
            accelerator.backward(loss)
        sums = sums + metrics.mean(dim=1)
    trained = itertools.chain(*(part.parameters() for part in run.trained.values()))
    grad_norm = accelerator.clip_grad_norm_(trained, args.max_grad_norm)
    grad_norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
    progress.step += 1
    try:
        upcoming = next(batches) if progress.step < args.max_train_steps else []
    except Exception as error:  # sources fail in as many ways as there are file systems
        upcoming = error
    counts = [skipped, isinstance(upcoming, Exception), stop.received]
    grad_norm = torch.as_tensor(grad_norm, dtype=torch.float64, device=sums.device) / accelerator.num_processes
    # The one wait of a step for the device and for the other processes.
    totals = accelerator.reduce(torch.cat([sums, grad_norm[None], sums.new_tensor(counts)])).tolist()
    sums, (grad_norm, bad, failed, stopped) = totals[: len(METRICS)], totals[len(METRICS) :]
    logs, finite = {"grad_norm": grad_norm, "lr": run.lr_scheduler.get_last_lr()[0]}, math.isfinite(grad_norm)
    # The scaler of fp16 leaves non-finite steps out by itself, and learns its scale from them.
    if finite or accelerator.scaler is not None:
        run.optimizer.step()
    run.lr_scheduler.step()
    run.optimizer.zero_grad()
    progress.pairs_seen += run.pairs_per_step
    progress.rows_read += run.pairs_per_step + int(bad)
    progress.rows_bad += int(bad)
    progress.skipped_steps += not finite
    progress.bad_steps = 0 if finite else progress.bad_steps + 1
    if finite:
        batches_summed = args.gradient_accumulation_steps * accelerator.num_processes
        logs |= {name: total / batches_summed for name, total in zip(METRICS, sums)}
    else:
        steps = f"{progress.bad_steps} steps up to step {progress.step}"
        logger.warning(f"No finite gradient in {steps}, not applied.")
    if progress.bad_steps >= args.max_bad_steps:
        rows = ", ".join(sorted(gather_object(rows)))
        raise TrainingError(f"--max_bad_steps: no finite gradient in {steps} (its pairs: {rows}).")
    return upcoming, failed > 0, stopped > 0, logs


def train(run, batches, stop):
    """The training loop, to --max_train_steps; returns whether a signal stopped it before its end."""
    args, accelerator, progress = run.args, run.accelerator, run.progress
    unreadable = f"--dataset_name {args.dataset_name} cannot be read any further"
    with failing_together(unreadable):
        upcoming = next(batches) if progress.step < args.max_train_steps else []
    bar = tqdm(None, "Steps", args.max_train_steps, disable=not accelerator.is_local_main_process)
    bar.update(progress.step)
    window, steps, seconds = [], 0, 0  # since the last log line
    while progress.step < args.max_train_steps:
        started = time.perf_counter()
        upcoming, failed, stopped, logs = train_step(run, upcoming, batches, stop)
        steps, seconds = steps + 1, seconds + time.perf_counter() - started
        window += [[logs[name] for name in METRICS]] if "loss" in logs else []
        bar.update(1)
        last = progress.step == args.max_train_steps
        if last or progress.step % args.logging_steps == 0:
            if window:  # otherwise no step had a finite gradient
                logs |= dict(zip(METRICS, np.mean(window, axis=0).tolist()))
            logs |= {"skipped_steps": progress.skipped_steps, "pairs_per_second": steps * run.pairs_per_step / seconds}
            resident = psutil.Process().memory_info().rss
            peak = torch.cuda.max_memory_allocated() if accelerator.device.type == "cuda" else resident
            with tracking(accelerator):
                accelerator.log({**logs, "peak_memory_gib": peak / 2**30}, step=progress.step)
            shown = [name for name in ("loss", "accuracy", "pairs_per_second") if name in logs]
            bar.set_postfix({name: f"{logs[name]:.4g}" for name in shown})
            window, steps, seconds = [], 0, 0
        too_many_bad = progress.rows_bad > args.max_bad_rows * max(progress.rows_read, 100)
        due = progress.step % args.checkpointing_steps == 0 and not last  # the last one follows the final weights
        if due or failed or too_many_bad or stopped:
            save_checkpoint(run)
        saved = f"the checkpoint of step {progress.step} is saved"
        with failing_together(f"{unreadable} ({saved})") if failed else contextlib.nullcontext():
            if isinstance(upcoming, Exception):
                raise upcoming
        if too_many_bad:
            bad_rows = f"{progress.rows_bad} of {progress.rows_read} rows could not be used"
            raise TrainingError(f"--max_bad_rows {args.max_bad_rows}: {bad_rows} ({saved}).")
        if stopped:
            return True
        if progress.step % args.validation_steps == 0 and not last:
            validate(run)
    return False


def prepare(run, optimizer):
    """Wrap what is trained and the optimizer for this run's processes."""
    accelerator, pipeline, parts = run.accelerator, run.pipeline, trained_parts(run.args, run.pipeline)
    # Checkpoints hold the trained weights in diffusers' format in place of accelerate's copy of the model.
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
    accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())
    *wrapped, run.optimizer = accelerator.prepare(*parts.values(), optimizer)
    run.optimizer.defaults = optimizer.defaults  # the polynomial schedule reads them, DeepSpeed's optimizer has none
    run.trained = dict(zip(parts, wrapped))
    run.unet = run.trained["unet"]
    run.text_encoders = [run.trained.get(name, getattr(pipeline, name)) for name in ("text_encoder", "text_encoder_2")]


def main(args):
    """Train; returns the exit status, and the function that sends what no other process is to wait for."""
    accelerator, weight_dtype = build_accelerator(args)
    latent_shape, noise_scheduler = load_configs(args)
    checkpoint, state = find_checkpoint(args, accelerator)
    if args.seed is None:
        args.seed = gather_object([int.from_bytes(os.urandom(4), "big")])[0]
        logger.info(f"--seed {args.seed} was drawn for this run.")
    # Locks on files let one process prepare the data, and the others find them.
    with failing_together(f"--dataset_name {args.dataset_name} cannot be read"):
        (source, index), (held_out_source, held_out_index) = load_indexes(args)
    pairs_per_step = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    if args.max_train_steps is None:
        args.max_train_steps = math.ceil(args.num_train_epochs * len(index) / pairs_per_step)
    check_steps(args, state)
    repo_id = create_hub_repo(args, accelerator)
    sizes = latent_shape, noise_scheduler.config.num_train_timesteps
    pairs = PairDataset(args, source, index, *sizes)
    held_out = PairDataset(args, held_out_source, held_out_index, *sizes, held_out=True)
    progress = start_progress(args, accelerator, state, source)
    position = progress.pairs_seen, accelerator.process_index, accelerator.num_processes
    batches = training_batches(args, index, progress.order, *position)
    first_batch = next(batches)
    with failing_together(f"--dataset_name {args.dataset_name} cannot be trained on"):
        first_pair = pairs[first_batch[0]]
    pipeline = load_pipeline(args, accelerator, weight_dtype)
    with failing_together(f"The VAE cannot encode {first_pair['row']}"):
        check_vae(args, pipeline.vae, first_pair)
    if accelerator.is_main_process:
        warn_of_long_captions(source.captions(index), pipeline.tokenizer)
    if args.cache_latents:
        fill_caches(args, accelerator, pipeline, pairs, held_out)
    # add_noise would move it in the first step, and wait for that.
    noise_scheduler.alphas_cumprod = noise_scheduler.alphas_cumprod.to(accelerator.device)
    torch.manual_seed(args.seed)  # for the start of a LoRA
    parameters = make_trainable(args, pipeline)
    optimizer = build_optimizer(args, parameters, pairs_per_step)
    run = argparse.Namespace(args=args, accelerator=accelerator, pipeline=pipeline, noise_scheduler=noise_scheduler)
    prepare(run, optimizer)
    run.held_out, run.base_images, run.pairs_per_step, run.progress = held_out, [], pairs_per_step, progress
    start_trackers(run)
    number = sum(parameter.numel() for parameter in itertools.chain(*parameters))
    logger.info(f"***** Running training of {number:,} parameters for {args.max_train_steps} steps *****")
    logger.info(f"  Pairs = {len(index)}, held out = {len(held_out_index)}, per optimizer step = {pairs_per_step}")
    if checkpoint is None:
        validate(run)
    if args.run_validation:
        run.base_images = draw_images(run)
    if checkpoint is not None:
        resume(run, checkpoint, state)
    run.lr_scheduler = build_schedule(args, run.optimizer, progress.step)
    batches_of_run = iter(make_loader(args, pairs, itertools.chain([first_batch], batches)))
    step_batches = iter(lambda: list(itertools.islice(batches_of_run, args.gradient_accumulation_steps)), [])
    stopped = train(run, step_batches, StopRequest())
    if stopped:
        logger.warning(
            f"Stopped by a signal (the checkpoint of step {run.progress.step} is saved). Resume with "
            "--resume_from_checkpoint latest."
        )
    else:
        finish(run)
    accelerator.wait_for_everyone()
    unsent = functools.partial(send, args, accelerator.trackers, None if stopped else repo_id)
    return STOPPED if stopped else 0, unsent


if __name__ == "__main__":
    unsent = None
    try:
        status, unsent = main(parse_args())
    except TrainingError as error:
        status = f"error: {error}"
    except Exception:
        traceback.print_exc()
        status = 1
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    finally:
        for worker in multiprocessing.active_children():
            worker.kill()  # a loader's workers ignore SIGTERM, with which Python would end them
    # DDP's reducer and the threads of gloo must be gone while the interpreter still runs.
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if unsent is not None:
        unsent()
    sys.exit(status)
