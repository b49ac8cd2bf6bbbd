#!/usr/bin/env python
# coding=utf-8
# Copyright 2026 The MaPO SDXL contributors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
#
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6",
#     "diffusers>=0.36",
#     "transformers>=5.0",
#     "accelerate>=1.12",
#     "datasets>=5.2",
#     "peft>=0.18",
#     "bitsandbytes>=0.50",
#     "tensorboard",
# ]
# ///
"""Align Stable Diffusion XL with MaPO, preference optimization without a reference model (arXiv 2406.06424).

LoRA, on one 24 GB GPU:

    accelerate launch train_diffusion_mapo_sdxl.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
        --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix \
        --dataset_name mapo-t2i/pick-style-cartoon --beta_mapo 64 --rank 16 --learning_rate 1e-5 \
        --train_batch_size 1 --gradient_accumulation_steps 16 --max_train_steps 1000 --gradient_checkpointing \
        --use_8bit_adam --mixed_precision bf16 --num_validation_pairs 64 --run_validation --output_dir mapo-lora

The whole UNet, as in the paper (4 GPUs x 4 pairs x 8 accumulation = 128 pairs a step):

    accelerate launch --config_file launch_configs/multi_gpu.yaml --num_processes 4 train_diffusion_mapo_sdxl.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
        --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix \
        --dataset_name mapo-t2i/pick-style-cartoon --beta_mapo 64 --learning_rate 1e-7 --lr_scheduler cosine \
        --train_batch_size 4 --gradient_accumulation_steps 8 --max_train_steps 2000 --gradient_checkpointing \
        --use_8bit_adam --mixed_precision fp16 --output_dir mapo-full
"""

import argparse
import contextlib
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import accelerate
import datasets
import diffusers
import fsspec
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import (
    AutocastKwargs,
    DistributedType,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    send_to_device,
    set_seed,
)
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import cast_training_params
from diffusers.utils import check_min_version, convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from diffusers.utils.hub_utils import populate_model_card
from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm


check_min_version("0.36.0")

logger = get_logger(__name__)

TRACKERS = ("tensorboard", "wandb")
DEFAULT_BETA = {"mapo": 8.0, "mapo_v1": 0.1}
LORA_TARGET_MODULES = ["to_k", "to_q", "to_v", "to_out.0"]
VALIDATION_PROMPTS = [
    "a lighthouse on a cliff at dusk",
    "portrait of an old sailor with a pipe",
    "a red fox asleep in the snow",
    "a bowl of ramen on a wooden table",
]
# Rows are judged against --max_bad_rows once this many were read, so that one early bad row stops nothing.
ROWS_BEFORE_JUDGEMENT = 100
# Flags of the scripts that users come from, with what to write here instead.
FOREIGN_FLAGS = {
    "--enable_xformers_memory_efficient_attention": "leave it out, PyTorch's own attention is memory-efficient",
    "--local_rank": "leave it out, the launcher passes it by environment",
    "--sft_training": "write --beta_mapo inf",
    "--mapo_training": "leave it out, MaPO is what this script trains",
    "--train_unet": "leave it out, the UNet is trained whole unless --rank is given",
    "--dpo_training": "there is no reference model here; use diffusers' train_diffusion_dpo_sdxl.py",
    "--beta_dpo": "write --beta_mapo",
    "--train_data_dir": "write --dataset_name FOLDER",
    "--validation_prompt": "write --validation_prompts",
    "True": "switches take no value, write the flag alone",
    "False": "switches take no value, leave the flag out (or write --no-remove_ties)",
}
# What safetensors, torch.save and FSDP raise where a disk is full.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError, CheckpointException)
CAPTION_TYPES = ("string", "large_string")
IMAGE_TYPES = ("binary", "large_binary", "PIL.Image.Image")
LABEL_TYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "float16", "float32", "float64")


class TrainingError(Exception):
    """A wrong use or a fault that one sentence explains; the command line prints that sentence alone."""


def one_line(error):
    if isinstance(error, CheckpointException):
        # One failure for each process that had one, with its stack.
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())


# Arguments -----------------------------------------------------------------------------------------------------------


def bounded(text, kind, low, high=sys.float_info.max):
    """Parse a number in [low, high] for argparse."""
    try:
        value = kind(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number") from error
    if not low <= value <= high:
        limits = f"at least {low}" if high > 1e300 else f"from {low} to {high}"
        raise argparse.ArgumentTypeError(f"{text} is out of range, it must be {limits}")
    return value


COUNT = partial(bounded, kind=int, low=1)
COUNT_OR_ZERO = partial(bounded, kind=int, low=0)
SEED = partial(bounded, kind=int, low=0, high=2**32 - 1)
FRACTION = partial(bounded, kind=float, low=0, high=1)
BELOW_ONE = partial(bounded, kind=float, low=0, high=math.nextafter(1, 0))
NOT_NEGATIVE = partial(bounded, kind=float, low=0)
POSITIVE = partial(bounded, kind=float, low=sys.float_info.min)
POSITIVE_OR_INF = partial(bounded, kind=float, low=sys.float_info.min, high=math.inf)


def add_model_arguments(add):
    add("--pretrained_model_name_or_path", required=True, help="SDXL pipeline: hub id or local folder.")
    add("--pretrained_vae_model_name_or_path", help="Another VAE, e.g. madebyollin/sdxl-vae-fp16-fix.")
    add("--revision", help="Revision of the pretrained model on the hub.")
    add("--variant", help="Variant of the pretrained weights, e.g. fp16.")
    add("--cache_dir", help="Where downloaded models and data sets are kept.")
    add("--rank", "--lora_rank", type=COUNT, help="Train a LoRA of this rank (alpha = rank). None: the whole UNet.")


def add_data_arguments(add):
    add("--dataset_name", required=True, help="Pairs: hub id or local folder that `datasets` reads.")
    add("--dataset_config_name", help="Configuration of the data set, if it has several.")
    add("--dataset_split_name", help="Split to train on. None: the only split, else `train`.")
    add("--streaming", action="store_true", help="Read shards as they are needed instead of preparing the data set.")
    add(
        "--shuffle_buffer_size",
        type=COUNT,
        default=256,
        help="Streamed pairs mixed at a time; two such blocks and the one in use are held.",
    )
    add("--max_train_samples", type=COUNT, help="Use only this many rows of the data set.")
    add("--caption_column", default="caption", help="Column of the prompts.")
    add("--image_0_column", default="jpg_0", help="Column of the first images.")
    add("--image_1_column", default="jpg_1", help="Column of the second images.")
    add("--label_0_column", default="label_0", help="Column of the first images' labels.")
    add("--label_1_column", default="label_1", help="Column of the second images' labels.")
    add("--chosen_column", help="Column of the chosen images, for pairs in order (no labels).")
    add("--rejected_column", help="Column of the rejected images, for pairs in order (no labels).")
    ties = {"action": argparse.BooleanOptionalAction, "default": True}
    add("--remove_ties", **ties, help="Drop pairs of equal labels; kept ones are ordered at random at each visit.")
    add("--label_noise_prob", type=FRACTION, default=0.0, help="Probability of swapping a pair.")
    add("--max_bad_rows", type=FRACTION, default=0.01, help="Stop when more than this share of the rows is unusable.")
    add("--resolution", type=COUNT, default=1024, help="Side of the training images in pixels.")
    add("--random_crop", action="store_true", help="Crop at random instead of at the centre.")
    add("--no_hflip", action="store_true", help="Never mirror the images.")
    add("--cache_latents", action="store_true", help="Encode each pair once, to files that later runs read.")
    add("--dataloader_num_workers", type=COUNT_OR_ZERO, default=0, help="Processes that decode images.")
    add("--vae_encode_batch_size", type=COUNT, default=8, help="Images that pass through the VAE at a time.")


def add_objective_arguments(add):
    add("--loss_type", choices=["mapo", "mapo_v1"], default="mapo", help="Published objective or first release's.")
    add(
        "--beta_mapo",
        type=POSITIVE_OR_INF,
        help="Temperature of the score; `inf` is supervised fine-tuning on the chosen images. None: 8, the paper's "
        "value for general preference alignment, or 0.1 for mapo_v1.",
    )
    add("--snr_value", type=POSITIVE, default=0.5, help="Scale of the errors in mapo_v1.")


def add_training_arguments(add):
    add("--seed", type=SEED, help="Seed of every random choice. None: drawn and reported.")
    add("--train_batch_size", type=COUNT, default=4, help="Pairs per process and micro-step.")
    add("--num_train_epochs", type=COUNT, default=1, help="Visits of the data set.")
    add("--max_train_steps", type=COUNT, help="Optimizer steps; overrides --num_train_epochs.")
    add("--gradient_accumulation_steps", type=COUNT, default=1, help="Micro-steps per optimizer step.")
    add("--gradient_checkpointing", action="store_true", help="Save memory, recompute activations.")
    add(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        help="Precision of the computation and of frozen weights. None: what accelerate is set to.",
    )
    add(
        "--full_bf16",
        action="store_true",
        help="Train the whole UNet in bfloat16 weights, rounded at random: 10 GiB less than float32, with noise.",
    )
    add("--allow_tf32", action="store_true", help="Let float32 products run in TF32.")
    add("--compile", action="store_true", help="Compile the UNet's transformer blocks (torch.compile).")


def add_optimizer_arguments(add):
    add(
        "--learning_rate",
        type=POSITIVE,
        default=1e-5,
        help="Learning rate. The 5e-4 that other scripts default to destroys a fully trained SDXL: the MaPO authors' "
        "commands pass 1e-5, the paper used 1e-7.",
    )
    add("--scale_lr", action="store_true", help="Multiply the learning rate by the pairs of an optimizer step.")
    schedulers = [s.value for s in SchedulerType if s.value != "piecewise_constant"]
    add("--lr_scheduler", choices=schedulers, default="constant", help="Curve of the learning rate.")
    add("--lr_warmup_steps", type=COUNT_OR_ZERO, default=500, help="Optimizer steps of warmup.")
    add("--lr_num_cycles", type=COUNT, default=1, help="Restarts of cosine_with_restarts.")
    add("--lr_power", type=POSITIVE, default=1.0, help="Power of the polynomial scheduler.")
    add("--use_8bit_adam", action="store_true", help="AdamW with 8-bit states, from bitsandbytes.")
    add("--adam_beta1", type=BELOW_ONE, default=0.9, help="Adam's beta1.")
    add("--adam_beta2", type=BELOW_ONE, default=0.999, help="Adam's beta2.")
    add("--adam_weight_decay", type=NOT_NEGATIVE, default=1e-2, help="Weight decay.")
    add("--adam_epsilon", type=POSITIVE, default=1e-8, help="Adam's epsilon.")
    add("--max_bad_steps", type=COUNT, default=10, help="Stop after this many steps in a row with no finite gradient.")
    add("--max_grad_norm", type=POSITIVE, default=1.0, help="Gradients are clipped to this norm.")


def add_output_arguments(add):
    add("--output_dir", default="mapo", help="Folder of all that is written.")
    add("--checkpointing_steps", type=COUNT, default=500, help="Optimizer steps between checkpoints.")
    add("--checkpoints_total_limit", type=COUNT, help="Newest checkpoints to keep.")
    add("--resume_from_checkpoint", help="`latest`, a checkpoint's path, or its name in output_dir.")
    add("--logging_dir", default="logs", help="Folder of the trackers' files, in output_dir.")
    add("--logging_steps", type=COUNT, default=10, help="Steps between log lines, which alone wait for the device.")
    trackers = [*TRACKERS, "all", "none"]
    add("--report_to", choices=trackers, help="Tracker; `all` is those installed. None: tensorboard, if installed.")
    add("--tracker_name", default="mapo", help="Project name in the trackers.")
    add("--push_to_hub", action="store_true", help="Upload output_dir when all is saved.")
    add("--hub_model_id", help="Repository to upload to. None: the name of output_dir.")
    add("--hub_token", help="Token for the upload. None: the one of `hf auth login`.")


def add_validation_arguments(add):
    add("--run_validation", action="store_true", help="Draw images of base and aligned model.")
    add("--validation_steps", type=COUNT, default=200, help="Optimizer steps between validations.")
    add("--validation_prompts", nargs="+", default=VALIDATION_PROMPTS, help="Prompts to draw.")
    add("--num_inference_steps", type=COUNT, default=25, help="Denoising steps of a drawn image.")
    add("--guidance_scale", type=NOT_NEGATIVE, default=5.0, help="Guidance of the drawn images.")
    add("--validation_split", help="Split whose pairs are held out for the eval_ metrics.")
    add(
        "--num_validation_pairs",
        type=COUNT,
        help="Pairs to hold out: of --validation_split, else of the training rows.",
    )


def parse_args(input_args=None):
    """Parse the command line (or `input_args`), refusing contradictory flags in one sentence."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage="accelerate launch train_diffusion_mapo_sdxl.py --pretrained_model_name_or_path MODEL "
        "--dataset_name PAIRS [flags, see --help]",
        allow_abbrev=False,
    )
    add_model_arguments(parser.add_argument_group("model").add_argument)
    add_data_arguments(parser.add_argument_group("pairs").add_argument)
    add_objective_arguments(parser.add_argument_group("objective").add_argument)
    add_training_arguments(parser.add_argument_group("training").add_argument)
    add_optimizer_arguments(parser.add_argument_group("optimizer").add_argument)
    add_output_arguments(parser.add_argument_group("output").add_argument)
    add_validation_arguments(parser.add_argument_group("validation").add_argument)
    args, unknown = parser.parse_known_args(input_args)
    for flag in unknown:
        name = flag.partition("=")[0]
        parser.error(f"unknown argument {name}: {FOREIGN_FLAGS.get(name, 'see --help for those there are')}")
    if args.report_to is None:
        args.report_to = "tensorboard" if importlib.util.find_spec("tensorboard") else "none"
    if args.beta_mapo is None:
        args.beta_mapo = DEFAULT_BETA[args.loss_type]
    problem = find_contradiction(args)
    if problem is not None:
        parser.error(problem)
    return args


def find_contradiction(args):
    """Return the first rule that these arguments break, as a sentence that names the flag, or None."""
    missing = {name for name in ("bitsandbytes", "peft", *TRACKERS) if importlib.util.find_spec(name) is None}
    num_held_out, split, most = args.num_validation_pairs, args.validation_split, args.max_train_samples
    too_few = None not in (most, num_held_out) and split is None and num_held_out >= most
    too_slow = args.lr_scheduler == "polynomial" and args.learning_rate <= 1e-7 and not args.scale_lr
    leaks = args.hub_token is not None and args.report_to in ("wandb", "all")
    rounds = args.rank is None and args.use_8bit_adam and args.mixed_precision == "bf16"
    endless = args.streaming and args.max_train_steps is None
    unbounded = args.streaming and split is not None and num_held_out is None
    rules = [
        (args.cache_latents and args.random_crop, "--random_crop crops anew at each visit, --cache_latents keeps one"),
        (args.resolution % 8 != 0, "--resolution must be a multiple of 8, the VAE's reduction"),
        (endless, "--streaming needs --max_train_steps, since a stream does not know its length"),
        (bool(args.chosen_column) != bool(args.rejected_column), "--chosen_column and --rejected_column go together"),
        (args.loss_type == "mapo_v1" and math.isinf(args.beta_mapo), "--beta_mapo inf is for --loss_type mapo alone"),
        (too_few, "--num_validation_pairs leaves nothing of --max_train_samples to train on"),
        (too_slow, "--lr_scheduler polynomial ends at 1e-7, so --learning_rate must be larger"),
        (unbounded, "--streaming with --validation_split needs --num_validation_pairs, the pairs to hold in memory"),
        (leaks, "--report_to wandb would send --hub_token to the tracker; log in with `hf auth login` instead"),
        (
            args.use_8bit_adam and "bitsandbytes" in missing,
            "--use_8bit_adam needs bitsandbytes: pip install bitsandbytes",
        ),
        (
            args.full_bf16 and not rounds,
            "--full_bf16 needs --use_8bit_adam and --mixed_precision bf16, without --rank",
        ),
        (args.rank is not None and "peft" in missing, "--rank needs peft: pip install peft"),
        (args.report_to in missing, f"--report_to {args.report_to} needs its package: pip install {args.report_to}"),
    ]
    return next((sentence for broken, sentence in rules if broken), None)


# Objective -----------------------------------------------------------------------------------------------------------


def log_phi(errors):
    """Logarithm of the score phi(l) = l / (exp(l) - 1) (eq. 11 at beta = 1) of float64 errors, exact from 0 on."""
    small = errors < 1e-2
    series = -errors / 2 - errors**2 / 24 + errors**4 / 2880
    # The dead branch must not see 0: a NaN gradient there survives torch.where.
    away = torch.where(small, 1.0, errors)
    return torch.where(small, series, away.log() - away - (-torch.expm1(-away)).log())


def preference_metrics(chosen_errors, rejected_errors, margin):
    return {
        "chosen_mse": chosen_errors.detach().mean(),
        "rejected_mse": rejected_errors.detach().mean(),
        "margin": margin.detach().mean(),
        "accuracy": (chosen_errors < rejected_errors).double().mean(),
    }


def mapo_loss(chosen_errors, rejected_errors, beta):
    """
    The published MaPO objective (arXiv 2406.06424v2, eqs. 9 to 11).

        L = l_w - 1/beta * log sigmoid(phi_beta(l_w) - phi_beta(l_l)),   phi_beta(l) = (l / (exp(l) - 1)) ** beta

    Args:
        chosen_errors, rejected_errors: `(pairs,)` mean squared errors l_w and l_l of the denoiser.
        beta: temperature of the score; `inf` is supervised fine-tuning on the chosen images.

    Returns:
        The scalar loss, in the errors' dtype, and a dict of detached scalars. Computed in float64: at beta = 1024 a
        float32 rounding of log phi would be multiplied by as much.
    """
    chosen, rejected = chosen_errors.double(), rejected_errors.double()
    if math.isinf(beta):
        # 0 x keeps a rejected error that is not finite visible.
        loss = chosen_errors.mean() + 0 * rejected_errors.mean()
        return loss, preference_metrics(chosen, rejected, torch.zeros_like(chosen))
    margin = (beta * log_phi(chosen)).exp() - (beta * log_phi(rejected)).exp()
    loss = (chosen - F.logsigmoid(margin) / beta).mean()
    return loss.to(chosen_errors.dtype), preference_metrics(chosen, rejected, margin)


def mapo_v1_loss(chosen_errors, rejected_errors, beta, snr_value, num_train_timesteps):
    """
    The objective of MaPO's first release (arXiv 2406.06424v1), which the published weights were trained with.

        L = l_w - beta * log sigmoid(T * (phi(s * l_w) - phi(s * l_l))),   phi(l) = l / (exp(l) - 1)

    Args:
        chosen_errors, rejected_errors: `(pairs,)` mean squared errors l_w and l_l of the denoiser.
        beta: weight of the margin term.
        snr_value: the constant s.
        num_train_timesteps: T, the length of the noise schedule.

    Returns:
        As `mapo_loss`; the margin in the metrics is without the factor T.
    """
    chosen, rejected = chosen_errors.double(), rejected_errors.double()
    margin = log_phi(snr_value * chosen).exp() - log_phi(snr_value * rejected).exp()
    loss = (chosen - beta * F.logsigmoid(num_train_timesteps * margin)).mean()
    return loss.to(chosen_errors.dtype), preference_metrics(chosen, rejected, margin)


def preference_loss(args, noise_scheduler):
    """The objective that the arguments pick, as a function of the two errors alone."""
    if args.loss_type == "mapo":
        return partial(mapo_loss, beta=args.beta_mapo)
    length = noise_scheduler.config.num_train_timesteps
    return partial(mapo_v1_loss, beta=args.beta_mapo, snr_value=args.snr_value, num_train_timesteps=length)


# Pairs ---------------------------------------------------------------------------------------------------------------


class Visit(NamedTuple):
    """
    One visit of one pair. `position` is its place in the order of the whole run, over all processes; it seeds what is
    drawn for the visit. Only a streamed visit has a `shard`, brings its `record`, and knows the `cursor` from which
    the stream goes on behind it. A pair that was encoded before is `cached`: (file, index), or why it is unusable.
    """

    row: int
    position: int = 0
    shard: int | None = None
    record: dict | None = None
    cursor: dict | None = None
    held_out: bool = False
    cached: tuple | str | None = None

    def __str__(self):
        place = "" if self.shard is None else f" of shard {self.shard}"
        return f"{'held-out ' if self.held_out else ''}row {self.row}{place}"


class UnusableRow(Exception):
    """Why a row cannot be trained on."""


def pair_columns(args):
    """Names of the caption column, of the two image columns, and of the two label columns (if any)."""
    if args.chosen_column is not None:
        return args.caption_column, (args.chosen_column, args.rejected_column), ()
    return args.caption_column, (args.image_0_column, args.image_1_column), (args.label_0_column, args.label_1_column)


def pick_split(args):
    names = datasets.get_dataset_split_names(args.dataset_name, args.dataset_config_name)
    wanted = args.dataset_split_name or (names[0] if len(names) == 1 else "train")
    for flag, split in [("--dataset_split_name", wanted), ("--validation_split", args.validation_split)]:
        if split is not None and split not in names:
            raise TrainingError(f"{flag}: {args.dataset_name} has no split {split!r}, but {', '.join(names)}.")
    return wanted


def check_columns(args, dataset):
    """Every column must be there and hold what pairs are made of."""
    caption, images, labels = pair_columns(args)
    image_flags = ["chosen_column", "rejected_column"] if args.chosen_column else ["image_0_column", "image_1_column"]
    wanted = [("caption_column", caption, CAPTION_TYPES)]
    wanted += [(flag, column, IMAGE_TYPES) for flag, column in zip(image_flags, images, strict=True)]
    wanted += [(flag, column, LABEL_TYPES) for flag, column in zip(["label_0_column", "label_1_column"], labels)]
    for flag, column, types in wanted:
        if column not in dataset.features:
            there = ", ".join(dataset.features)
            raise TrainingError(f"--{flag} {column}: {args.dataset_name} has no such column, but {there}.")
        feature = dataset.features[column]
        if getattr(feature, "dtype", None) not in types:
            raise TrainingError(f"--{flag} {column} holds {feature}, it must hold one of: {', '.join(types)}.")


def load_pairs(args, split, max_rows=None):
    """
    The columns of `split` that make pairs, image columns as encoded bytes: a `Dataset`, or with --streaming an
    `IterableDataset` whose shards are as small as the format allows (parquet: one row group each).
    """
    dataset = datasets.load_dataset(
        args.dataset_name, args.dataset_config_name, split=split, streaming=args.streaming, cache_dir=args.cache_dir
    )
    check_columns(args, dataset)
    caption, images, labels = pair_columns(args)
    if args.streaming:
        dataset = dataset.reshard()
    if max_rows is not None and not args.streaming:
        dataset = dataset.take(max_rows)
    dataset = dataset.select_columns([caption, *images, *labels])
    for column in images:
        if isinstance(dataset.features[column], datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    if args.streaming and max_rows is not None:
        return FirstRows(dataset, max_rows)
    return dataset


class FirstRows:
    """The first rows of a streamed data set; `take` would take an equal number from each shard, even of short ones."""

    def __init__(self, dataset, most):
        self.dataset, self.limits = dataset, []
        while most > 0 and len(self.limits) < dataset.num_shards:
            shard = dataset.shard(dataset.num_shards, len(self.limits)).take(most)
            self.limits.append(sum(1 for _ in shard))
            most -= self.limits[-1]
        self.num_shards = len(self.limits)

    def shard(self, num_shards, index):
        return self.dataset.shard(self.dataset.num_shards, index).take(self.limits[index])


def load_all_pairs(args):
    """The training data set, and the one to hold pairs out of: the same unless --validation_split is given."""
    dataset = load_pairs(args, pick_split(args), args.max_train_samples)
    return dataset, load_pairs(args, args.validation_split) if args.validation_split else dataset


def is_tie(record, labels):
    return bool(labels) and record[labels[0]] is not None and record[labels[0]] == record[labels[1]]


def usable_rows(args, dataset):
    """Row numbers of a map-style data set without the ties to drop: only the label columns are read."""
    rows = np.arange(len(dataset))
    _, _, labels = pair_columns(args)
    if labels and args.remove_ties:
        frame = dataset.select_columns(list(labels)).to_pandas().astype("float64")
        rows = rows[frame[labels[0]] != frame[labels[1]]]
    return rows


def map_style_visits(rows, seed, position):
    """Visits from `position` on, without end: each epoch is one permutation of `rows`, the next follows at once."""
    while True:
        epoch, offset = divmod(position, len(rows))
        order = np.random.default_rng([seed, epoch]).permutation(rows)
        for position, row in enumerate(order[offset:], start=position):
            yield Visit(int(row), position)
        position += 1


def deal(visits, batch_size, rank, num_processes):
    """Split one global order into this rank's micro-batches: the order does not depend on how it is split."""
    while True:
        dealt = list(itertools.islice(visits, batch_size * num_processes))
        yield dealt[rank * batch_size : (rank + 1) * batch_size]


class PairStream:
    """
    Endless visits of a streamed data set, in this rank's share of the shards.

    Each epoch deals the shards out to the ranks in a new order; behind each other, `buffer_size` of a rank's pairs at
    a time are mixed. While one such block is used, the next is read: two of them are what a rank holds in memory.
    """

    def __init__(self, args, dataset, left_out=(), rank=0, num_processes=1, cache=None):
        self.dataset, self.left_out, self.cache = dataset, left_out, cache
        self.rank, self.num_processes = rank, num_processes
        self.seed, self.buffer_size = args.seed, args.shuffle_buffer_size
        self.labels = pair_columns(args)[2] if args.remove_ties else ()
        # Too few shards for all ranks: each rank reads them all and keeps every num_processes-th row.
        by_row = dataset.num_shards < num_processes
        self.shard_share = (0, 1) if by_row else (rank, num_processes)
        self.row_share = (rank, num_processes) if by_row else (0, 1)

    def takes(self, shard, row):
        first, every = self.row_share
        return row % every == first and (shard, row) not in self.left_out

    def shard_visits(self, shard, start=0):
        """Visits of this rank's share of one shard from row `start` on, without ties and what is left out."""
        if self.cache is not None:
            cached = self.cache.rows_of(shard, self.takes)
            if cached is not None:
                yield from (Visit(row, shard=shard) for row in cached if row >= start)
                return
        rows = []
        records = enumerate(self.dataset.shard(self.dataset.num_shards, shard))
        for row, record in itertools.islice(records, start, None):
            if not is_tie(record, self.labels):
                rows.append(row)
                if self.takes(shard, row):
                    yield Visit(row, shard=shard, record=record)
        if self.cache is not None and start == 0:
            self.cache.note_rows(shard, rows)

    def epoch_visits(self, epoch, place, start):
        """Visits of one epoch in shard order, each with its (place in the order, row), from (place, start) on."""
        first, every = self.shard_share
        order = np.random.default_rng([self.seed, epoch]).permutation(self.dataset.num_shards)[first::every]
        for place, shard in itertools.islice(enumerate(order), place, None):
            for visit in self.shard_visits(int(shard), start):
                yield place, visit
            start = 0

    def blocks(self, cursor):
        """Blocks of visits, each with the cursor of its beginning, without end."""
        epoch, place, start = cursor["epoch"], cursor["place"], cursor["row"]
        empty = 0
        while True:
            visits = self.epoch_visits(epoch, place, start)
            seen = 0
            while block := list(itertools.islice(visits, self.buffer_size)):
                seen += len(block)
                beginning = {"epoch": epoch, "place": place, "row": start}
                place, start = block[-1][0], block[-1][1].row + 1
                yield beginning, [visit for _, visit in block]
            # The share is another one in each epoch; by row it is not.
            empty = empty + 1 if seen == 0 and (place, start) == (0, 0) else 0
            if empty == 20:
                raise TrainingError("--dataset_name: a process found no pair to train on in its share of the shards.")
            epoch, place, start = epoch + 1, 0, 0

    def visits(self, cursor=None):
        """Visits from `cursor` on, mixed inside their blocks; each carries the cursor behind it."""
        cursor = cursor or {"epoch": 1, "place": 0, "row": 0, "used": 0}
        blocks, used = self.blocks(cursor), cursor["used"]
        with ThreadPoolExecutor(max_workers=1) as reader:
            upcoming = reader.submit(next, blocks)
            while True:
                beginning, block = upcoming.result()
                upcoming = reader.submit(next, blocks)
                if self.cache is not None:
                    block = self.cache.filled(block)
                order = np.random.default_rng([self.seed, *beginning.values()]).permutation(len(block))
                for used, index in itertools.islice(enumerate(order, start=1), used, None):
                    yield block[index]._replace(cursor={**beginning, "used": used})
                used = 0

    def batches(self, batch_size, cursor, position=0):
        """This rank's batches from `cursor` on, where the run of all ranks has come to `position`."""
        visits = self.visits(cursor)
        for start in itertools.count(position + self.rank * batch_size, batch_size * self.num_processes):
            batch = itertools.islice(visits, batch_size)
            yield [visit._replace(position=start + index) for index, visit in enumerate(batch)]


def decode_image(value):
    """
    Decode one image to RGB, upright, on white where it is transparent.

    Args:
        value: encoded bytes, or what `datasets.Image(decode=False)` gives.

    Raises:
        UnusableRow: nothing there, or nothing that Pillow can decode safely.
    """
    if isinstance(value, dict):
        value = value["bytes"] or value["path"]
    if not value:
        raise UnusableRow("has no image")
    try:
        source = fsspec.open(value).open() if isinstance(value, str) else io.BytesIO(value)
        with source, Image.open(source) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise UnusableRow(f"has an image of {image.width} x {image.height} pixels, refused as a bomb")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):
                # Pillow's own conversion to RGB cuts off at 255 of 65535.
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except UnusableRow:
        raise
    # Pillow raises most of the built-in exceptions on one broken file or another.
    except Exception as error:
        raise UnusableRow(f"has an image that cannot be decoded ({type(error).__name__}: {error})") from error


def crop_image(image, resolution, crop_fractions, flip):
    """
    Resize the shorter side to `resolution`, mirror, and crop a square at the given fractions of the free room.

    Returns:
        `(3, resolution, resolution)` uint8 tensor, and the crop's (top, left) in the resized, mirrored image.

    Raises:
        UnusableRow: resized, the image would be as large as a decompression bomb.
    """
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise UnusableRow(f"has an image of {image.width} x {image.height} pixels, too narrow to be resized")
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    if flip:
        image = ImageOps.mirror(image)
    top, left = round((height - resolution) * crop_fractions[0]), round((width - resolution) * crop_fractions[1])
    image = image.crop((left, top, left + resolution, top + resolution))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1), (top, left)


def load_pair(args, record, crop_fractions, flips):
    """
    One row's caption, labels and cropped images, in the order of its columns.

    Returns:
        Of each image its pixels mirrored as `flips` says, `(2, len(flips), 3, resolution, resolution)` uint8, and its
        micro-conditioning `(2, 6)`.

    Raises:
        UnusableRow: no caption, no label, or an image that cannot be decoded.
    """
    caption, images, labels = pair_columns(args)
    if not isinstance(record[caption], str):
        raise UnusableRow(f"has {record[caption]!r} for a caption")
    for label in labels:
        if record[label] is None or math.isnan(record[label]):
            raise UnusableRow(f"has no {label}")
    pixel_values, add_time_ids = [], []
    for image in [decode_image(record[column]) for column in images]:
        for flip in flips:
            pixels, crop_top_left = crop_image(image, args.resolution, crop_fractions, flip)
            pixel_values.append(pixels)
        add_time_ids.append([image.height, image.width, *crop_top_left, *2 * [args.resolution]])
    return {
        "captions": record[caption],
        "labels": [float(record[label]) for label in labels],
        "pixel_values": torch.stack(pixel_values).unflatten(0, (2, len(flips))),
        "add_time_ids": torch.tensor(add_time_ids),
    }


class PairDataset(torch.utils.data.Dataset):
    """
    Turns a `Visit` into tensors, in the loader's workers. Every random choice of a visit comes from a generator of its
    own, seeded by (seed, position): neither processes nor workers, batches or restarts change what it sees.
    """

    def __init__(self, args, dataset, latent_shape=None, num_train_timesteps=None):
        self.args, self.dataset = args, dataset
        self.latent_shape, self.num_train_timesteps = latent_shape, num_train_timesteps

    def __getitem__(self, visit):
        """Returns (visit, tensors), or (visit, reason) for a row that cannot be used."""
        try:
            return visit._replace(record=None), self.prepare(visit)
        except UnusableRow as reason:
            return visit._replace(record=None), str(reason)

    def record(self, visit):
        return visit.record or self.dataset[visit.row]

    def prepare(self, visit):
        args = self.args
        # Held-out pairs see the same in every run, whatever its seed.
        place = (0, visit.position) if visit.held_out else (1, args.seed, visit.position)
        seed = np.random.SeedSequence(place).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(seed[0]))
        # All numbers are drawn whatever the flags, so that no flag shifts another's draws.
        noisy, tie, flip, *crop_fractions = np.random.default_rng(seed).random(5)
        flip = bool(flip < 0.5 and not args.no_hflip and not visit.held_out)
        if not args.random_crop or visit.held_out:
            crop_fractions = (0.5, 0.5)
        if visit.cached is not None:
            pair = read_cached(visit.cached, flip)
        else:
            pair = load_pair(args, self.record(visit), crop_fractions, (flip,))
            pair["pixel_values"] = pair["pixel_values"][:, 0]
        labels = pair.pop("labels") or (1, 0)
        chosen = 0 if labels[0] > labels[1] or (labels[0] == labels[1] and tie < 0.5) else 1
        if noisy < args.label_noise_prob and not visit.held_out:
            chosen = 1 - chosen
        for name in {"pixel_values", "moments"} & pair.keys():
            pair[name] = pair[name][[chosen, 1 - chosen]]
        # One conditioning for both, the chosen image's: only the images may differ in a pair.
        pair["add_time_ids"] = pair["add_time_ids"][chosen]
        return {
            **pair,
            "timesteps": torch.randint(self.num_train_timesteps, (), generator=generator),
            "noise": torch.randn(self.latent_shape, generator=generator),
            "posterior_noise": torch.randn((2, *self.latent_shape), generator=generator),
        }

    def collate(self, items):
        """
        Stack the usable items; chosen images come first, then the rejected ones in the same order. A row that could
        not be used leaves its place empty; where all are, a blank pair keeps the processes in step.
        """
        usable = [item for _, item in items if not isinstance(item, str)]
        batch = torch.utils.data.default_collate(usable or [self.blank()])
        for name in {"pixel_values", "moments", "posterior_noise"} & batch.keys():
            batch[name] = batch[name].transpose(0, 1).flatten(0, 1)
        batch["num_usable"] = len(usable)
        batch["rows"] = [str(visit) for visit, _ in items]
        batch["bad_rows"] = [(str(visit), item) for visit, item in items if isinstance(item, str)]
        batch["cursor"] = items[-1][0].cursor if items else None
        return batch

    def blank(self):
        size = 2 * [self.args.resolution]
        return {
            "captions": "",
            "pixel_values": torch.zeros(2, 3, *size, dtype=torch.uint8),
            "add_time_ids": torch.tensor([*size, 0, 0, *size]),
            "timesteps": torch.tensor(0),
            "noise": torch.zeros(self.latent_shape),
            "posterior_noise": torch.zeros(2, *self.latent_shape),
        }

    def loader(self, batches):
        return torch.utils.data.DataLoader(
            self,
            batch_sampler=batches,
            num_workers=self.args.dataloader_num_workers,
            collate_fn=self.collate,
            worker_init_fn=ignore_stop_signals,
            pin_memory=torch.cuda.is_available(),
        )


def hold_out(args, dataset):
    """The first usable pairs, for the eval_ metrics, and their places: row numbers, or (shard, row) of a stream."""
    if args.validation_split is None and args.num_validation_pairs is None:
        return [], []
    if args.streaming:
        stream = PairStream(args, dataset)
        visits = (visit for shard in range(dataset.num_shards) for visit in stream.shard_visits(shard))
        visits = list(itertools.islice(visits, args.num_validation_pairs))
        records, places = [visit.record for visit in visits], [(visit.shard, visit.row) for visit in visits]
    else:
        places = usable_rows(args, dataset)[: args.num_validation_pairs]
        records = dataset.select(places)
    if len(records) == 0:
        raise TrainingError("--validation_split or --num_validation_pairs: no pair was found to hold out.")
    return records, places


def ignore_stop_signals(worker):
    """SLURM and torchrun signal a loader's workers too; the process that reads from them decides."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def held_out_visits(records):
    return [Visit(row, position=row, held_out=True) for row in range(len(records))]


# Models --------------------------------------------------------------------------------------------------------------


def trained_dtype(args):
    return torch.bfloat16 if args.full_bf16 else torch.float32


def load_pipeline(args, accelerator, weight_dtype):
    """
    The SDXL pipeline, every part on the device: frozen parts in `weight_dtype`, a UNet to be trained whole in its own
    dtype, the VAE in float32 unless its config says that half precision is safe.
    """
    options = {"cache_dir": args.cache_dir, "use_safetensors": True}
    # Under ZeRO-3 transformers would split the frozen text encoders as it loads them.
    transformers.integrations.unset_hf_deepspeed_config()
    parts = {}
    flag = "pretrained_vae_model_name_or_path"
    try:
        if args.pretrained_vae_model_name_or_path is not None:
            parts["vae"] = AutoencoderKL.from_pretrained(args.pretrained_vae_model_name_or_path, **options)
        flag = "pretrained_model_name_or_path"
        pipeline = StableDiffusionXLPipeline.from_pretrained(
            args.pretrained_model_name_or_path,
            revision=args.revision,
            variant=args.variant,
            add_watermarker=False,
            **parts,
            **options,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise TrainingError(f"--{flag} {getattr(args, flag)} cannot be loaded: {one_line(error)}") from error
    for part in (pipeline.vae, pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2):
        part.requires_grad_(False)
    pipeline.vae.to(accelerator.device, torch.float32 if pipeline.vae.config.force_upcast else weight_dtype)
    pipeline.unet.to(accelerator.device, trained_dtype(args) if args.rank is None else weight_dtype)
    pipeline.text_encoder.to(accelerator.device, weight_dtype)
    pipeline.text_encoder_2.to(accelerator.device, weight_dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_trainable(args, unet):
    """Choose what is trained, the whole UNet or a new LoRA adapter, in its own dtype; return those parameters."""
    if args.rank is None:
        unet.requires_grad_(True)
    else:
        from peft import LoraConfig

        unet.add_adapter(
            LoraConfig(
                r=args.rank, lora_alpha=args.rank, init_lora_weights="gaussian", target_modules=LORA_TARGET_MODULES
            )
        )
    cast_training_params(unet, trained_dtype(args))
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.compile:
        # In place: the weights keep their names, and checkpoints do not know of it.
        unet.compile_repeated_blocks()
    unet.train()
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def round_stochastically(weights, generator):
    """
    float32 weights rounded to one of their two neighbours in bfloat16, to the nearer one more often, so that the mean
    is kept. bfloat16 is the upper half of float32's bits.
    """
    bits = torch.empty_like(weights, dtype=torch.int32).random_(2**16, generator=generator)
    return bits.add_(weights.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32).to(torch.bfloat16)


class StochasticRounding:
    """Lets a bitsandbytes optimizer update one bfloat16 tensor after the other in float32, and round it at random."""

    @torch.no_grad()
    def update_step(self, group, p, gindex, pindex):
        weights, grad = p.data, p.grad
        p.grad, p.data = None, weights.float()
        p.grad = grad.float()
        super().update_step(group, p, gindex, pindex)
        # The same on every process and after a restart.
        generator = torch.Generator(p.device).manual_seed(2**20 * self.state[p]["step"] + pindex)
        rounded = round_stochastically(p.data, generator)
        p.grad, p.data = None, weights.copy_(rounded)
        p.grad = grad


def build_optimizer(args, accelerator, parameters):
    """AdamW and its learning-rate curve, in optimizer steps whatever the number of processes."""
    # The fused one can leave an update out on the device itself, see update_weights.
    optimizer_class = partial(torch.optim.AdamW, fused=True)
    if args.use_8bit_adam:
        import bitsandbytes

        optimizer_class = bitsandbytes.optim.AdamW8bit
        if args.full_bf16:
            optimizer_class = type("RoundedAdamW8bit", (StochasticRounding, optimizer_class), {})
    optimizer = optimizer_class(
        parameters,
        lr=args.learning_rate * (global_batch_size(args, accelerator) if args.scale_lr else 1),
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        # The polynomial curve divides by the steps behind the warmup.
        num_training_steps=max(args.max_train_steps, args.lr_warmup_steps + 1),
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
    return optimizer, scheduler


def encode_images(args, vae, pixel_values):
    """
    Mean and standard deviation of the VAE's posterior of `(images, 3, height, width)` uint8 pixels:
    `(images, 2, channels, height / 8, width / 8)` in the VAE's dtype.
    """
    moments = []
    for pixels in pixel_values.split(args.vae_encode_batch_size):
        distribution = vae.encode(pixels.to(vae.dtype) / 127.5 - 1).latent_dist
        moments.append(torch.stack([distribution.mean, distribution.std], dim=1))
    return torch.cat(moments)


def encode_prompts(pipeline, prompts):
    """
    SDXL's embeddings of the prompts, each distinct one encoded once and by itself, so that it does not depend on its
    neighbours in the batch: prompt_embeds `(prompts, tokens, dim)`, pooled_prompt_embeds `(prompts, pooled_dim)`.
    """
    encoded = {}
    for prompt in dict.fromkeys(prompts):
        hidden_states = []
        # `pipeline.encode_prompt` would wait for the device.
        for tokenizer, text_encoder in zip(
            (pipeline.tokenizer, pipeline.tokenizer_2), (pipeline.text_encoder, pipeline.text_encoder_2), strict=True
        ):
            input_ids = tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
            output = text_encoder(input_ids.to(text_encoder.device, non_blocking=True), output_hidden_states=True)
            hidden_states.append(output.hidden_states[-2])
        encoded[prompt] = torch.cat(hidden_states, dim=-1), output.text_embeds
    prompt_embeds, pooled_prompt_embeds = zip(*(encoded[prompt] for prompt in prompts), strict=True)
    return torch.cat(prompt_embeds), torch.cat(pooled_prompt_embeds)


@torch.no_grad()
def encode_pairs(args, pipeline, batch):
    """
    Latents and embeddings of a batch of `pairs`, encoded now or, from a cache, before.

    Returns:
        latents `(2 * pairs, channels, height, width)`, each a sample of the VAE's posterior, prompt_embeds
        `(pairs, tokens, dim)` and pooled_prompt_embeds `(pairs, pooled_dim)`.
    """
    if "moments" in batch:
        moments, embeds = batch["moments"], (batch["prompt_embeds"], batch["pooled_prompt_embeds"])
    else:
        move_encoders(pipeline, batch["pixel_values"].device)
        moments = encode_images(args, pipeline.vae, batch["pixel_values"])
        embeds = encode_prompts(pipeline, batch["captions"])
    mean, std = moments.float().unbind(dim=1)
    return (mean + std * batch["posterior_noise"]) * pipeline.vae.config.scaling_factor, *embeds


def denoising_errors(unet, noise_scheduler, latents, prompt_embeds, pooled_prompt_embeds, batch):
    """
    Mean squared error of each image of a batch, chosen and rejected under the same noise and timestep.

    Returns:
        Two `(pairs,)` float32 tensors, the errors of the chosen and of the rejected images.
    """
    noise, timesteps = batch["noise"].repeat(2, 1, 1, 1), batch["timesteps"].repeat(2)
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    if noise_scheduler.config.prediction_type == "v_prediction":
        target = noise_scheduler.get_velocity(latents, noise, timesteps)
    else:
        target = noise
    conditions = {
        "text_embeds": pooled_prompt_embeds.repeat(2, 1),
        "time_ids": batch["add_time_ids"].repeat(2, 1).to(prompt_embeds.dtype),
    }
    prediction = unet(
        noisy_latents.to(prompt_embeds.dtype),
        timesteps,
        encoder_hidden_states=prompt_embeds.repeat(2, 1, 1),
        added_cond_kwargs=conditions,
        return_dict=False,
    )[0]
    errors = F.mse_loss(prediction.float(), target, reduction="none").mean(dim=(1, 2, 3))
    return errors.chunk(2)


# Cache ---------------------------------------------------------------------------------------------------------------


# Pairs in one file: a killed run loses the encoding of no more.
PAIRS_PER_FILE = 64


def orientations(args):
    """Whether mirrored, for each orientation in which pairs are cached."""
    return (False,) if args.no_hflip else (False, True)


def move_encoders(pipeline, device):
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        if part.device != device:
            part.to(device)


def read_cached(place, flip):
    """What `load_pair` gives, encoded: moments `(2, 2, channels, height, width)` of the two images, and embeddings."""
    if isinstance(place, str):
        raise UnusableRow(place)
    path, index, prompt, labels = place
    with safe_open(path, framework="pt") as file:
        return {
            "labels": labels,
            "moments": file.get_slice("moments")[index, :, int(flip)],
            "add_time_ids": file.get_slice("add_time_ids")[index],
            "prompt_embeds": file.get_slice("prompt_embeds")[prompt],
            "pooled_prompt_embeds": file.get_slice("pooled_prompt_embeds")[prompt],
        }


class PairImages(PairDataset):
    """The images of visits in all orientations, to be encoded: (visit, what `load_pair` gives or why it cannot)."""

    def prepare(self, visit):
        return load_pair(self.args, self.record(visit), (0.5, 0.5), orientations(self.args))


class PairCache:
    """
    Encoded pairs on disk, in safetensors files whose headers tell what they hold: a file is whole or absent, and any
    run on the same pairs with the same encoders reads and adds to them. Stored are the moments of the VAE's posterior,
    from which each visit draws its own sample, in the dtype that they were computed in.
    """

    def __init__(self, args, accelerator, pipeline, dataset, folder):
        self.args, self.device, self.pipeline, self.folder = args, accelerator.device, pipeline, folder
        self.images = PairImages(args, dataset)
        self.files, self.places, self.rows = set(), {}, {}
        folder.mkdir(parents=True, exist_ok=True)
        for part in folder.glob("*.part"):
            # An hour old, it is no other run's that is being written now.
            if time.time() - part.stat().st_mtime > 3600:
                part.unlink(missing_ok=True)
        self.scan()

    def scan(self):
        """Learn of files that are new, from this process or another."""
        for name in set(os.listdir(self.folder)) - self.files:
            path = str(self.folder / name)
            if name.endswith(".json"):
                self.rows[int(name.removesuffix(".json"))] = json.loads(Path(path).read_text())
            elif name.endswith(".safetensors"):
                with safe_open(path, framework="pt") as file:
                    pairs = json.loads(file.metadata()["pairs"])
                for index, (shard, row, prompt, content) in enumerate(pairs):
                    self.places[shard, row] = content if prompt is None else (path, index, prompt, content)
            self.files.add(name)

    def write(self, name, save):
        """Let `save` write a file that appears under its name when it is whole."""
        aside = self.folder / f"{name}.{uuid.uuid4().hex}.part"
        try:
            save(aside)
            with aside.open("rb+") as file:
                os.fsync(file.fileno())
        except WRITE_ERRORS as error:
            aside.unlink(missing_ok=True)
            raise TrainingError(f"--cache_latents: {self.folder} cannot be written: {one_line(error)}") from error
        aside.rename(self.folder / name)

    def note_rows(self, shard, rows):
        """Remember the rows that a shard of a stream has."""
        if shard not in self.rows:
            self.write(f"{shard}.json", lambda path: path.write_text(json.dumps(rows)))

    def rows_of(self, shard, takes):
        """The rows of a shard of a stream that `takes` wants, if all of them are cached, else None."""
        self.scan()
        rows = [row for row in self.rows.get(shard, ()) if takes(shard, row)]
        return rows if shard in self.rows and all((shard, row) in self.places for row in rows) else None

    def missing(self, visits):
        return [visit for visit in visits if (visit.shard, visit.row) not in self.places]

    def filled(self, visits):
        """The visits, all of them `cached`: what is missing is encoded now, else the encoders leave the device."""
        if self.missing(visits):
            self.scan()
        if missing := self.missing(visits):
            self.check_room(len(missing))
            self.fill(missing)
        else:
            move_encoders(self.pipeline, torch.device("cpu"))
        return [visit._replace(cached=self.places[visit.shard, visit.row], record=None) for visit in visits]

    @torch.no_grad()
    def fill(self, visits, **progress):
        """Encode and store these visits, in batches as in training."""
        move_encoders(self.pipeline, self.device)
        size = self.args.train_batch_size
        loader = torch.utils.data.DataLoader(
            self.images,
            batch_sampler=[visits[start : start + size] for start in range(0, len(visits), size)],
            num_workers=self.args.dataloader_num_workers,
            collate_fn=list,
            worker_init_fn=ignore_stop_signals,
            # Nothing is random here; without it the loader would draw from the process' own generator.
            generator=torch.Generator(),
        )
        pending = []
        with tqdm(total=len(visits), desc="Encoding pairs", leave=False, **progress) as bar:
            for items in loader:
                pending += self.encode(items)
                bar.update(len(items))
                if len(pending) >= PAIRS_PER_FILE:
                    self.store(pending)
                    pending = []
        if pending:
            self.store(pending)
        self.scan()

    def encode(self, items):
        """Replace the pixels of usable items by their moments, `(2, orientations, 2, channels, height, width)`."""
        usable = [pair for _, pair in items if not isinstance(pair, str)]
        if usable:
            pixel_values = torch.stack([pair.pop("pixel_values") for pair in usable]).to(self.device)
            moments = encode_images(self.args, self.pipeline.vae, pixel_values.flatten(0, 2)).cpu()
            for pair, encoded in zip(usable, moments.unflatten(0, pixel_values.shape[:3]), strict=True):
                pair["moments"] = encoded
        return items

    def store(self, items):
        """Write one file: usable pairs first, in the order of their tensors, then rows with why they are unusable."""
        usable = [(visit, pair) for visit, pair in items if not isinstance(pair, str)]
        prompts = {caption: index for index, caption in enumerate(dict.fromkeys(p["captions"] for _, p in usable))}
        header = [(visit.shard, visit.row, prompts[pair["captions"]], pair["labels"]) for visit, pair in usable]
        header += [(visit.shard, visit.row, None, reason) for visit, reason in items if isinstance(reason, str)]
        tensors = {}
        if usable:
            tensors = {name: torch.stack([pair[name] for _, pair in usable]) for name in ("moments", "add_time_ids")}
            tensors["prompt_embeds"], tensors["pooled_prompt_embeds"] = encode_prompts(self.pipeline, prompts)
        save = partial(save_file, tensors, metadata={"pairs": json.dumps(header)})
        self.write(f"{uuid.uuid4().hex}.safetensors", save)

    def check_room(self, pairs):
        """Say what room this many pairs need, if each has a prompt of its own, or raise if there is less."""
        pipeline, vae = self.pipeline, self.pipeline.vae
        latents = vae.config.latent_channels * (self.args.resolution // pipeline.vae_scale_factor) ** 2
        moments = 4 * len(orientations(self.args)) * latents * vae.dtype.itemsize
        embeds = pipeline.tokenizer.model_max_length * pipeline.unet.config.cross_attention_dim
        needed = pairs * (moments + embeds * pipeline.text_encoder.dtype.itemsize) / 2**30
        free = shutil.disk_usage(self.folder).free / 2**30
        space = f"{pairs} pairs need {needed:.3g} GiB in {self.folder}, where {free:.3g} GiB are free"
        if needed > free:
            raise TrainingError(f"--cache_latents: {space}.")
        return space

    def fill_together(self, accelerator, visits):
        """Encode what is missing of these visits, each process its share, and free the encoders' device."""
        local = accelerator.local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        # The second time finds something to do on machines that do not share the folder.
        for rank, num_processes in ((accelerator.process_index, accelerator.num_processes), local):
            with failing_together(f"--cache_latents: pairs could not be encoded into {self.folder}", Exception):
                mine = self.missing(visits[rank::num_processes])
                space = self.check_room(num_processes * len(mine))
                if mine:
                    logger.info(f"Encoding once: {space}.")
                    self.fill(mine, disable=not accelerator.is_local_main_process)
            self.scan()
        move_encoders(self.pipeline, torch.device("cpu"))


def encoders_digest(pipeline):
    """A hash of all that turns images and captions into latents and embeddings."""
    digest = hashlib.sha256()
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
        digest.update(tokenizer.backend_tokenizer.model.__getstate__())
        digest.update(f"{tokenizer.special_tokens_map} {tokenizer.model_max_length}".encode())
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        config = part.config if isinstance(part.config, dict) else part.config.to_dict()
        # Names that begin with an underscore tell where it came from.
        config = {name: value for name, value in config.items() if not name.startswith("_")}
        digest.update(f"{part} {sorted(config.items(), key=str)}".encode())
        for name, tensor in part.state_dict().items():
            digest.update(f"{name} {tensor.dtype}".encode())
            digest.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def cache_folder(args, encoders, held_out):
    """Where pairs are cached: a folder for everything that changes what is stored."""
    builder = datasets.load_dataset_builder(args.dataset_name, args.dataset_config_name, cache_dir=args.cache_dir)
    settings = [encoders, builder.cache_dir, pick_split(args), args.max_train_samples, args.streaming]
    settings += [args.remove_ties, *pair_columns(args), args.resolution, orientations(args), args.allow_tf32]
    if held_out:
        settings += [args.validation_split, args.num_validation_pairs]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    return Path(args.cache_dir or datasets.config.HF_DATASETS_CACHE) / "mapo_latents" / key


# State of a run ------------------------------------------------------------------------------------------------------


def global_batch_size(args, accelerator):
    return args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps


METRICS = ("loss", "chosen_mse", "rejected_mse", "margin", "accuracy")


def weighted(metrics, weight):
    """What a batch adds to the sums of METRICS and of the weights, on the device."""
    values = [metrics[name].double() for name in METRICS]
    return weight * torch.stack([*values, torch.ones_like(values[0])])


def means(accelerator, sums, prefix=""):
    """Weighted means over all processes, by name; waits for the device and for the other processes."""
    *totals, weight = accelerator.reduce(sums).tolist()
    return {prefix + name: total / weight if weight else math.nan for name, total in zip(METRICS, totals)}


def warn_of_bad_rows(batch):
    for row, reason in batch["bad_rows"]:
        logger.warning(f"Skipped {row}: it {reason}.", main_process_only=False)


def count_rows(run):
    """Rows read and rows that could not be used, over all processes and over restarts."""
    return [sum(counts) for counts in zip(*gather_object([(run.rows_read, run.rows_bad)]), strict=True)]


def too_many_bad_rows(run, enough=0):
    """The sentence that ends the run, the same on all processes, or None while the bad rows are few."""
    read, bad = count_rows(run)
    if read >= enough and bad > run.args.max_bad_rows * read:
        return f"{bad} of {read} rows could not be used, more than --max_bad_rows {run.args.max_bad_rows} allows."
    return None


class StopRequest:
    """
    Remembers SIGTERM and SIGUSR1, which SLURM and cloud preemption send, until all processes can stop at one place.
    A process whose launcher is gone stops too: accelerate's launcher passes no signal on. So does one whose data
    source failed.
    """

    SOURCE_FAILED = 255

    def __init__(self, accelerator):
        self.number, self.failure = 0, None
        launched = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & set(os.environ)
        self.launcher = os.getppid() if launched else None
        # Asked on the CPU, so that a step does not wait for the GPU.
        self.group = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None

    def __enter__(self):
        self.previous = {number: signal.signal(number, self.remember) for number in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def remember(self, number, frame):
        self.number = number

    def asked(self):
        """What any of the processes has got: a signal, SOURCE_FAILED or 0. All must ask at the same place."""
        if self.launcher not in (None, os.getppid()):
            self.number = self.number or signal.SIGTERM
        number = self.number if self.failure is None else self.SOURCE_FAILED
        if self.group is None:
            return number
        number = torch.tensor(int(number))
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, self.group)
        return int(number)


def peak_memory_gib(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@dataclass
class Run:
    """What the functions below share: the parts of one training run, and how far it has come."""

    args: argparse.Namespace
    accelerator: Accelerator
    pipeline: StableDiffusionXLPipeline
    unet: torch.nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    noise_scheduler: DDPMScheduler
    loss_function: Callable
    held_out: PairDataset
    held_out_cache: PairCache | None
    validation_prompts: list
    stop: StopRequest
    enough_rows: int
    # Summed up and counted on the device: reading them waits for it.
    sums: torch.Tensor
    bad_steps: torch.Tensor | int = 0
    skipped_steps: torch.Tensor | int = 0
    step: int = 0
    pairs_seen: int = 0
    rows_read: int = 0
    rows_bad: int = 0
    base_images: list | None = None

    def autocast(self):
        """accelerate's own would do nothing under DeepSpeed. Casts that are recomputed anyway need not be kept."""
        dtype, kept = self.pipeline.text_encoder.dtype, not self.args.gradient_checkpointing
        enabled = dtype != torch.float32
        return torch.autocast(self.accelerator.device.type, dtype=dtype, enabled=enabled, cache_enabled=kept)


def preference_step(run, batch):
    """The objective on a batch: the scalar loss with its gradient, and all metrics as detached scalars."""
    batch = send_to_device(batch, run.accelerator.device, non_blocking=True)
    encoded = encode_pairs(run.args, run.pipeline, batch)
    with run.autocast():
        errors = denoising_errors(run.unet, run.noise_scheduler, *encoded, batch)
    loss, metrics = run.loss_function(*errors)
    return loss, {"loss": loss.detach(), **metrics}


# Checkpoints ---------------------------------------------------------------------------------------------------------


def remove_folder(folder):
    """Remove a folder so that, whenever it is interrupted, what is left does not look like one."""
    if folder.exists():
        rubbish = folder.with_name(f".{folder.name.lstrip('.')}.removed")
        shutil.rmtree(rubbish, ignore_errors=True)
        folder.rename(rubbish)
        shutil.rmtree(rubbish)


@contextlib.contextmanager
def failing_together(sentence, *kinds):
    """Turn errors of these kinds, on one process or more, into one TrainingError on all of them."""
    failure = None
    try:
        yield
    except kinds as error:
        failure = str(error) if isinstance(error, TrainingError) else f"{sentence}: {one_line(error)}"
    failures = [failure for failure in gather_object([failure]) if failure is not None]
    if failures:
        raise TrainingError(failures[0])


@contextlib.contextmanager
def written_aside(accelerator, folder):
    """Yield a hidden folder to write to, which takes the place of `folder` when every process is done with it."""
    aside = folder.with_name(f".{folder.name}.incomplete")
    try:
        with failing_together(f"{folder} could not be written, older checkpoints are untouched", *WRITE_ERRORS):
            if accelerator.is_main_process:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
            accelerator.wait_for_everyone()
            yield aside
    except TrainingError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if accelerator.is_main_process:
        remove_folder(folder)
        aside.rename(folder)
    accelerator.wait_for_everyone()


def save_trained_weights(args, accelerator, unet, folder):
    """
    Write `pytorch_lora_weights.safetensors` or `unet/`, as diffusers pipelines load them. Every process must call it:
    weights that are split over the processes are gathered.
    """
    weights = accelerator.get_state_dict(unet)
    if not accelerator.is_main_process:
        return
    unet = accelerator.unwrap_model(unet)
    if args.rank is None:
        with torch.device("meta"):
            whole = UNet2DConditionModel.from_config(unet.config)
        whole.load_state_dict(weights, assign=True)
        whole.save_pretrained(folder / "unet")
    else:
        from peft import get_peft_model_state_dict

        metadata = unet.peft_config["default"].to_dict()
        metadata["target_modules"] = sorted(metadata["target_modules"])
        StableDiffusionXLPipeline.save_lora_weights(
            folder,
            unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(unet, state_dict=weights)),
            unet_lora_adapter_metadata=metadata,
        )


def load_trained_weights(args, unet, folder):
    """Load what `save_trained_weights` wrote into the same parameters, which the optimizer already holds."""
    if args.rank is None:
        unet.load_state_dict(UNet2DConditionModel.from_pretrained(folder / "unet", use_safetensors=True).state_dict())
    else:
        from peft import set_peft_model_state_dict

        layers = StableDiffusionXLPipeline.lora_state_dict(folder)[0]
        layers = {name.removeprefix("unet."): weight for name, weight in layers.items()}
        set_peft_model_state_dict(unet, convert_unet_state_dict_to_peft(layers))
    cast_training_params(unet, trained_dtype(args))


def register_checkpoint_hooks(args, accelerator):
    """Let checkpoints hold the trained weights in diffusers' format in place of accelerate's own whole copy."""

    failures = []

    def deferred(write):
        def attempt(*args, **kwargs):
            try:
                return write(*args, **kwargs)
            except WRITE_ERRORS as error:
                failures.append(error)

        return attempt

    def save_hook(models, weights, folder):
        save_trained_weights(args, accelerator, models[0], Path(folder))
        weights.clear()
        if failures:
            raise failures.pop()

    def load_hook(models, folder):
        # DeepSpeed and FSDP have loaded their own shards by now and leave no model to load.
        while models:
            load_trained_weights(args, accelerator.unwrap_model(models.pop()), Path(folder))

    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # Its processes meet behind the writing: one that cannot write comes there with the others, then fails.
        engine = accelerator.deepspeed_engine_wrapped.engine
        engine.checkpoint_engine.save = deferred(engine.checkpoint_engine.save)
        engine._copy_recovery_script = deferred(engine._copy_recovery_script)
    accelerator.register_save_state_pre_hook(save_hook)
    accelerator.register_load_state_pre_hook(load_hook)


def list_checkpoints(output_dir):
    """Complete checkpoints, oldest first."""
    folders = [folder for folder in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name)]
    return sorted(folders, key=lambda folder: int(folder.name.split("-")[1]))


# A checkpoint is refused where one of the first differs, and a difference in any other but the last is reported.
FIXED_ON_RESUME = ("rank", "use_8bit_adam", "full_bf16", "streaming", "shuffle_buffer_size", "seed")
FREE_ON_RESUME = ("resume_from_checkpoint", "max_train_steps", "hub_token")


def checkpoint_layout(args, accelerator):
    """How a checkpoint is split over the processes; None where any number of them can go on with it."""
    plugin = accelerator.state.deepspeed_plugin
    kinds = [f"DeepSpeed ZeRO-{plugin.zero_stage}"] if plugin else []
    kinds += ["FSDP"] if accelerator.distributed_type == DistributedType.FSDP else []
    kinds += ["a stream"] if args.streaming else []
    return f"{' and '.join(kinds)} over {accelerator.num_processes} processes" if kinds else None


def find_checkpoint(args, accelerator):
    """The folder to resume from and the state it was written with, or (None, None); settles the seed."""
    if args.resume_from_checkpoint is None:
        return None, None
    output_dir = Path(args.output_dir)
    if args.resume_from_checkpoint == "latest":
        folder = next(reversed(list_checkpoints(output_dir)), None)
        if folder is None:
            logger.info(f"No checkpoint in {output_dir} yet: starting a new run.")
            return None, None
    else:
        named = Path(args.resume_from_checkpoint)
        folder = named if named.exists() else output_dir / named
    try:
        state = json.loads((folder / "mapo_state.json").read_text())
    except (OSError, ValueError) as error:
        raise TrainingError(f"--resume_from_checkpoint {folder} is no checkpoint of this script: {error}") from error
    args.seed = state["args"]["seed"] if args.seed is None else args.seed
    for name, old in state["args"].items():
        now = vars(args).get(name)  # a flag of another version of this script is told, too
        if now != old:
            difference = f"--{name} is {now}, but {old} in {folder}."
            if name in FIXED_ON_RESUME:
                raise TrainingError(f"--resume_from_checkpoint: {difference}")
            logger.warning(difference)
    if state["layout"] != checkpoint_layout(args, accelerator):
        raise TrainingError(
            f"--resume_from_checkpoint: {folder} was written by {state['layout'] or 'a run on whole weights'}, and "
            f"cannot go on with {checkpoint_layout(args, accelerator) or 'whole weights'}."
        )
    return folder, state


def resume(run, checkpoint, state):
    """Register how checkpoints hold the weights, and go on from one if there is one."""
    register_checkpoint_hooks(run.args, run.accelerator)
    if checkpoint is not None:
        # A damaged file fails in as many ways as there are formats.
        with failing_together(f"--resume_from_checkpoint {checkpoint} cannot be loaded", Exception):
            run.accelerator.load_state(checkpoint)
        for name in ("step", "pairs_seen", "bad_steps", "skipped_steps"):
            setattr(run, name, state[name])
        if run.accelerator.is_main_process:
            run.rows_read, run.rows_bad = state["rows_read"], state["rows_bad"]
            run.sums += run.sums.new_tensor(state["window"])


def save_checkpoint(run, cursor):
    """Write checkpoint-{step} by all processes, whole or not at all, and only then drop the oldest ones."""
    args, accelerator = run.args, run.accelerator
    output_dir = Path(args.output_dir)
    rows_read, rows_bad = count_rows(run)
    state = {
        "step": run.step,
        "pairs_seen": run.pairs_seen,
        "bad_steps": int(run.bad_steps),
        "skipped_steps": int(run.skipped_steps),
        "layout": checkpoint_layout(args, accelerator),
        "cursors": gather_object([cursor]),
        "window": accelerator.reduce(run.sums).tolist(),
        "rows_read": rows_read,
        "rows_bad": rows_bad,
        "args": {name: value for name, value in vars(args).items() if name not in FREE_ON_RESUME},
    }
    with written_aside(accelerator, output_dir / f"checkpoint-{run.step}") as folder:
        accelerator.save_state(folder, save_latest=False)
        if accelerator.is_main_process:
            (folder / "mapo_state.json").write_text(json.dumps(state, indent=2))
    if accelerator.is_main_process and args.checkpoints_total_limit is not None:
        for old in list_checkpoints(output_dir)[: -args.checkpoints_total_limit]:
            remove_folder(old)
    logger.info(f"Saved {output_dir / f'checkpoint-{run.step}'}")


# Trackers ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def tracking(accelerator):
    """Talk to the trackers; one that fails, from the start or in mid-run, must not cost a run."""
    try:
        yield
    except Exception as error:
        logger.warning(f"--report_to: training goes on without a tracker ({type(error).__name__}: {one_line(error)}).")
        accelerator.trackers = []


def start_trackers(args, accelerator):
    logging_dir = Path(args.output_dir) / args.logging_dir
    logging_dir.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(args).items() if name != "hub_token"}
    settings = {
        name: value if isinstance(value, (int, float, str)) else str(value) for name, value in settings.items()
    }
    with tracking(accelerator):
        accelerator.init_trackers(args.tracker_name, settings, init_kwargs={"wandb": {"dir": str(logging_dir)}})


def end_training(accelerator):
    with tracking(accelerator):
        for tracker in accelerator.trackers:
            tracker.finish()
    accelerator.trackers = []
    accelerator.end_training()


# Validation ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate_pairs(run):
    """
    The eval_ metrics: the objective's own metrics on the held-out pairs, at noise and timesteps that never change.
    None if the run was asked to stop.
    """
    args, accelerator, pairs = run.args, run.accelerator, run.held_out
    visits = held_out_visits(pairs.dataset)
    chunks = [visits[start : start + args.train_batch_size] for start in range(0, len(visits), args.train_batch_size)]
    # Every rank takes as many forward passes, since split weights are gathered in step; those added weigh nothing.
    own = len(chunks[accelerator.process_index :: accelerator.num_processes])
    sums = torch.zeros_like(run.sums)
    with accelerator.split_between_processes(chunks, apply_padding=True) as mine:
        if run.held_out_cache is not None:
            mine = map(run.held_out_cache.filled, mine)
        for index, batch in enumerate(pairs.loader(mine)):
            if run.stop.asked():
                return None
            warn_of_bad_rows(batch)
            sums += weighted(preference_step(run, batch)[1], batch["num_usable"] * (index < own))
    return means(accelerator, sums, "eval_")


@torch.no_grad()
def encode_validation_prompts(args, pipeline):
    """The pipeline's arguments for each validation prompt, so that drawing needs no text encoder."""
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    guided = args.guidance_scale > 1
    embeds = [pipeline.encode_prompt(prompt, do_classifier_free_guidance=guided) for prompt in args.validation_prompts]
    return [dict(zip(names, tensors, strict=True)) for tensors in embeds]


@torch.no_grad()
def draw_images(run):
    """
    One image for each validation prompt at fixed seeds, the prompts split over the processes.
    None if the run was asked to stop.
    """
    args, pipeline = run.args, run.pipeline
    pipeline.vae.to(run.accelerator.device)
    jobs = list(enumerate(run.validation_prompts))
    images = []
    with run.accelerator.split_between_processes(jobs, apply_padding=True) as mine:
        for index, embeds in mine:
            if run.stop.asked():
                return None
            with run.autocast():
                latents = pipeline(
                    **embeds,
                    height=args.resolution,
                    width=args.resolution,
                    num_inference_steps=args.num_inference_steps,
                    guidance_scale=args.guidance_scale,
                    generator=torch.Generator().manual_seed(index),
                    output_type="latent",
                ).images
            # Decoded here and not by the pipeline: the VAE may need another precision than the UNet.
            latents = latents.to(pipeline.vae.dtype) / pipeline.vae.config.scaling_factor
            pixels = pipeline.vae.decode(latents, return_dict=False)[0]
            images.append((index, pipeline.image_processor.postprocess(pixels.float())[0]))
    drawn = dict(gather_object(images))
    return [drawn[index] for index, _ in jobs]


def draw_grid(prompts, base_images, aligned_images):
    """One labelled picture: a row for each prompt, the base model's image left, the aligned model's right."""
    side = max(base_images[0].width, 128)
    font = ImageFont.load_default(size=max(10, side // 16))
    line = 2 * font.size
    grid = Image.new("RGB", (2 * side, line + len(prompts) * (side + line)), "white")
    canvas = ImageDraw.Draw(grid)
    for column, title in enumerate(["base", "aligned with MaPO"]):
        canvas.text((column * side + 4, 2), title, fill="black", font=font)
    for row, (prompt, *images) in enumerate(zip(prompts, base_images, aligned_images, strict=True)):
        top = line + row * (side + line)
        canvas.text((4, top + 2), prompt, fill="black", font=font)
        for column, image in enumerate(images):
            grid.paste(image.resize((side, side), Image.Resampling.NEAREST), (column * side, top + line))
    return grid


def log_grid(run, grid):
    path = Path(run.args.output_dir) / "validation" / f"step-{run.step:06d}.png"
    path.parent.mkdir(exist_ok=True)
    grid.save(path)
    with tracking(run.accelerator):
        for tracker in run.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": np.asarray(grid)[None]}, step=run.step, **layout)


def validate(run):
    """Log the eval_ metrics (and return them) and the grid of images; nothing that training depends on is touched."""
    run.unet.eval()
    metrics = evaluate_pairs(run) if len(run.held_out.dataset) > 0 else None
    if metrics:
        with tracking(run.accelerator):
            run.accelerator.log(metrics, step=run.step)
        logger.info(f"Step {run.step}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    images = draw_images(run) if run.base_images is not None else None
    if images and run.accelerator.is_main_process:
        log_grid(run, draw_grid(run.args.validation_prompts, run.base_images, images))
    run.unet.train()
    return metrics or {}


# Results -------------------------------------------------------------------------------------------------------------


MODEL_CARD = """# {name}

{kind} of `{args.pretrained_model_name_or_path}`, aligned for {step} steps on the pairs of `{args.dataset_name}`
with [MaPO](https://arxiv.org/abs/2406.06424), objective `{args.loss_type}` at beta {args.beta_mapo}.
{picture}
## Use

```python
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

model = "{args.pretrained_model_name_or_path}"
pipeline = StableDiffusionXLPipeline.from_pretrained(model)
{load}
pipeline.to("cuda", torch.float16)
image = pipeline("a lighthouse on a cliff at dusk").images[0]
```

## Training

{metrics}

{settings}

Versions: {versions}
"""
LOAD_LORA = 'pipeline.load_lora_weights("FOLDER_OR_REPO")'
LOAD_UNET = 'pipeline.unet = UNet2DConditionModel.from_pretrained("FOLDER_OR_REPO", subfolder="unet")'


def write_model_card(args, metrics, step):
    """README.md of the output folder: what was trained on what, how, how well, and how to load it."""
    libraries = [torch, diffusers, transformers, accelerate, datasets]
    picture = f"validation/step-{step:06d}.png"
    settings = {name: value for name, value in vars(args).items() if name != "hub_token" and value is not None}
    text = MODEL_CARD.format(
        args=args,
        step=step,
        name=Path(args.output_dir).resolve().name,
        kind="UNet" if args.rank is None else f"LoRA of rank {args.rank}",
        picture=f"\n![base and aligned]({picture})\n" if (Path(args.output_dir) / picture).exists() else "",
        load=LOAD_UNET if args.rank is None else LOAD_LORA,
        metrics="\n".join(f"- {name}: {value:.5g}" for name, value in metrics.items()),
        settings="\n".join(f"- `--{name}`: {value}" for name, value in settings.items()),
        versions=", ".join(f"{library.__name__} {library.__version__}" for library in libraries),
    )
    data = ModelCardData(base_model=args.pretrained_model_name_or_path, license="openrail++")
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
    tags = ["stable-diffusion-xl", "text-to-image", "diffusers-training", "mapo", "lora" if args.rank else "unet"]
    populate_model_card(card, tags=tags).save(Path(args.output_dir) / "README.md")


def push_to_hub(args, output_dir):
    repo_id = args.hub_model_id or output_dir.resolve().name
    try:
        repo_id = create_repo(repo_id, exist_ok=True, token=args.hub_token).repo_id
        upload_folder(
            repo_id=repo_id,
            folder_path=output_dir,
            commit_message="End of training",
            ignore_patterns=["checkpoint-*/**", ".*/**", f"{args.logging_dir}/wandb/**"],
            token=args.hub_token,
        )
    # Nothing that goes wrong on the way to the hub may cost what is saved here.
    except Exception as error:
        logger.error(f"--push_to_hub failed ({error}); upload by hand: hf upload {repo_id} {output_dir}")


# Training ------------------------------------------------------------------------------------------------------------


def build_accelerator(args):
    """The Accelerator, and the dtype of computation and frozen weights."""
    output_dir = Path(args.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()
    except OSError as error:
        raise TrainingError(f"--output_dir {output_dir} cannot be written: {error.strerror}.") from error
    trackers = [name for name in TRACKERS if args.report_to in (name, "all") and importlib.util.find_spec(name)]
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=trackers or None,
            project_config=ProjectConfiguration(output_dir, logging_dir=output_dir / args.logging_dir),
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[AutocastKwargs(cache_enabled=not args.gradient_checkpointing)],
        )
    except ValueError as error:
        raise TrainingError(f"--mixed_precision {args.mixed_precision} does not work here: {error}") from error
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    if accelerator.distributed_type == DistributedType.FSDP and args.use_8bit_adam:
        raise TrainingError(
            "--use_8bit_adam: bitsandbytes cannot step split weights, use launch_configs/deepspeed_zero2.yaml."
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        if args.full_bf16:
            raise TrainingError("--full_bf16: DeepSpeed keeps float32 weights, use launch_configs/multi_gpu.yaml.")
        if weight_dtype == torch.float16:
            raise TrainingError(
                "--mixed_precision fp16: DeepSpeed would clip gradients that are still scaled, use bf16 or "
                "launch_configs/multi_gpu.yaml."
            )
        # DeepSpeed clips by itself and must be told the batch size, having no prepared loader. Its own half-precision
        # modes would round the trained weights too; torch's autocast does not.
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["fp16"], config["bf16"] = {"enabled": False}, {"enabled": False}
        if weight_dtype == torch.bfloat16:
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        config["gradient_clipping"] = args.max_grad_norm
        config["train_micro_batch_size_per_gpu"] = args.train_batch_size
    if weight_dtype == torch.float16 and accelerator.device.type == "cpu":
        raise TrainingError("--mixed_precision fp16 needs a GPU, on CPU write bf16 or no.")
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", level=logging.INFO)
    for library in (datasets, transformers, diffusers):
        library.utils.logging.set_verbosity_error()
    if accelerator.is_main_process:
        for rubbish in [*output_dir.glob(".*.incomplete"), *output_dir.glob(".*.removed")]:
            shutil.rmtree(rubbish)
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    return accelerator, weight_dtype


def settle_seed(args):
    """Draw the seed that was not given, the same on all processes, and seed what libraries draw (LoRA's start)."""
    if args.seed is None:
        args.seed = broadcast_object_list([int.from_bytes(os.urandom(4), "big")])[0]
        logger.info(f"--seed {args.seed} was drawn for this run.")
    set_seed(args.seed)


def training_batches(args, accelerator, dataset, rows, left_out, cache, pairs_seen, cursor):
    """This rank's batches of visits without end, behind the pairs seen (map-style) or the cursor (streamed)."""
    rank, num_processes = accelerator.process_index, accelerator.num_processes
    if args.streaming:
        stream = PairStream(args, dataset, left_out, rank, num_processes, cache)
        return stream.batches(args.train_batch_size, cursor, pairs_seen)
    batches = deal(map_style_visits(rows, args.seed, pairs_seen), args.train_batch_size, rank, num_processes)
    return batches if cache is None else (cache.filled(visits) for visits in batches)


def update_weights(run):
    """
    One optimizer step, left out on the device where the gradient is not finite, where it is zero because no row was
    usable, and from --max_bad_steps on. bitsandbytes cannot do that and has the host wait for the decision; DeepSpeed
    does so by itself. Returns the gradient's norm before clipping and whether it is finite, both on the device.
    """
    args, accelerator, optimizer = run.args, run.accelerator, run.optimizer.optimizer
    grad_norm = accelerator.clip_grad_norm_(run.unet.parameters(), args.max_grad_norm)
    if isinstance(grad_norm, DTensor):
        grad_norm = grad_norm.full_tensor()
    grad_norm = torch.as_tensor(grad_norm, device=accelerator.device)
    finite = grad_norm.isfinite()
    run.bad_steps = torch.where(finite & (run.bad_steps < args.max_bad_steps), 0, run.bad_steps + 1)
    run.skipped_steps = run.skipped_steps + (run.bad_steps > 0)
    left_out = (run.bad_steps > 0) | (grad_norm == 0)
    # The scaler of fp16 leaves steps that are not finite out by itself, and learns its scale from them.
    if accelerator.scaler is None and isinstance(optimizer, torch.optim.AdamW):
        optimizer.found_inf = left_out.float()
        run.optimizer.step()
    elif accelerator.scaler is not None or not left_out:
        run.optimizer.step()
    run.optimizer.zero_grad()
    run.lr_scheduler.step()
    run.step += 1
    run.pairs_seen += global_batch_size(args, accelerator)
    return grad_norm, finite


def check_gradients(run, rows):
    """End a run whose gradients are not finite any more; nothing is saved over the last good checkpoint."""
    bad_steps, limit = int(run.bad_steps), run.args.max_bad_steps
    if bad_steps > 0:
        logger.warning(f"Step {run.step}: no finite gradient in {bad_steps} steps, not applied.")
    if bad_steps >= limit:
        step = run.step - bad_steps + limit
        named = ", ".join(sorted(set(gather_object(rows[step]))))
        raise TrainingError(
            f"--max_bad_steps: no finite gradient in {limit} steps up to step {step} (its pairs: {named}); "
            "the last checkpoint is untouched."
        )


def steady_batches(run, pairs, batches):
    """The loader's batches; where the data source fails, empty ones, until all processes have agreed to stop."""
    try:
        yield from pairs.loader(batches)
    # A source fails in as many ways as there are file systems.
    except Exception as error:
        run.stop.failure = f"{type(error).__name__}: {one_line(error)}"
    while True:
        yield pairs.collate([])


def stop_at_broken_source(run, cursor, counts):
    """End the run at the last step whose pairs were all read; all that the present one has summed up is forgotten."""
    run.sums, run.rows_read, run.rows_bad = counts
    failures = "; ".join(failure for failure in gather_object([run.stop.failure]) if failure)
    kept = "nothing was trained yet"
    if run.step > 0:
        save_checkpoint(run, cursor)
        kept = f"the checkpoint of step {run.step} is saved"
    raise TrainingError(f"--dataset_name {run.args.dataset_name} cannot be read any further ({kept}): {failures}")


def stop_at_signal(run, cursor, number, saved):
    """Save a checkpoint and exit with status 128 + the signal's number."""
    if number:
        if not saved:
            save_checkpoint(run, cursor)
        name = signal.Signals(number).name
        logger.warning(f"Stopped by {name} at step {run.step}; go on with --resume_from_checkpoint latest.")
        end_training(run.accelerator)
        sys.exit(128 + number)


def train(run, batches, cursor):
    """The training loop, to --max_train_steps."""
    args, accelerator = run.args, run.accelerator
    first_step, started = run.step, time.perf_counter()
    progress = tqdm(
        total=args.max_train_steps, initial=run.step, desc="Steps", disable=not accelerator.is_local_main_process
    )
    # The rows of each step since its gradients were looked at.
    rows = {}
    for batch in batches if run.step < args.max_train_steps else ():
        if run.step + 1 not in rows:
            counts = run.sums, run.rows_read, run.rows_bad
        run.rows_read, run.rows_bad = run.rows_read + len(batch["rows"]), run.rows_bad + len(batch["bad_rows"])
        warn_of_bad_rows(batch)
        rows.setdefault(run.step + 1, []).extend(batch["rows"])
        with accelerator.accumulate(run.unet):
            loss, metrics = preference_step(run, batch)
            run.sums = run.sums + weighted(metrics, batch["num_usable"])
            # Asked before DeepSpeed makes its step, which it does in the backward pass.
            signal_number = run.stop.asked() if accelerator.sync_gradients else 0
            if signal_number == StopRequest.SOURCE_FAILED:
                stop_at_broken_source(run, cursor, counts)
            # A row that could not be used weighs nothing; the mean is over all places of the batch.
            accelerator.backward(loss * batch["num_usable"] / args.train_batch_size)
            if not accelerator.sync_gradients:
                continue
            learning_rate = run.lr_scheduler.get_last_lr()[0]
            grad_norm, finite = update_weights(run)
        run.sums = torch.where(finite, run.sums, counts[0])
        cursor = batch["cursor"]
        progress.update(1)

        last, saved = run.step == args.max_train_steps, run.step % args.checkpointing_steps == 0
        logged = last or run.step % args.logging_steps == 0
        if logged or saved:
            check_gradients(run, rows)
            rows = {}
        complaint = None
        if logged:
            pairs = (run.step - first_step) * global_batch_size(args, accelerator)
            logs = {
                **means(accelerator, run.sums),
                "grad_norm": float(grad_norm),
                "lr": learning_rate,
                "skipped_steps": int(run.skipped_steps),
                "pairs_per_second": pairs / (time.perf_counter() - started),
                "peak_memory_gib": peak_memory_gib(accelerator.device),
            }
            with tracking(accelerator):
                accelerator.log(logs, step=run.step)
            run.sums = torch.zeros_like(run.sums)
            first_step, started = run.step, time.perf_counter()
            shown = {"loss": ".4f", "accuracy": ".2f", "pairs_per_second": ".2f"}
            progress.set_postfix({name: format(logs[name], digits) for name, digits in shown.items()})
            complaint = too_many_bad_rows(run, run.enough_rows)
        if saved or complaint:
            save_checkpoint(run, cursor)
            first_step, started = run.step, time.perf_counter()
        if complaint:
            raise TrainingError(f"Stopped at step {run.step}, whose checkpoint is saved: {complaint}")
        stop_at_signal(run, cursor, signal_number, saved)
        if last:
            break
        if run.step % args.validation_steps == 0:
            validate(run)
            first_step, started = run.step, time.perf_counter()
            stop_at_signal(run, cursor, run.stop.asked(), saved)
    progress.close()


def finish(run):
    """Save the trained weights first; then validate, describe and upload them."""
    output_dir = Path(run.args.output_dir)
    with failing_together(f"{output_dir} could not be written, the checkpoints are untouched", *WRITE_ERRORS):
        save_trained_weights(run.args, run.accelerator, run.unet, output_dir)
    logger.info(f"Saved the {'LoRA' if run.args.rank else 'UNet'} in {output_dir}")
    metrics = validate(run)
    if run.accelerator.is_main_process:
        write_model_card(run.args, metrics, run.step)
        if run.args.push_to_hub:
            push_to_hub(run.args, output_dir)
    run.accelerator.wait_for_everyone()
    logger.info("{1} of {0} rows read could not be used.".format(*count_rows(run)))
    complaint = too_many_bad_rows(run)
    end_training(run.accelerator)
    if complaint is not None:
        raise TrainingError(f"All is saved, but {complaint}")


def load_rows(args):
    """
    The training data set, its usable rows (None for a stream), the held-out records, and the places left out for them.
    """
    dataset, held_out_dataset = load_all_pairs(args)
    held_out, places = hold_out(args, held_out_dataset)
    left_out = [] if args.validation_split else places
    if args.streaming:
        return dataset, None, held_out, left_out
    rows = np.setdiff1d(usable_rows(args, dataset), left_out)
    if len(rows) == 0:
        raise TrainingError(
            f"--dataset_name {args.dataset_name} leaves no pair to train on; --num_validation_pairs holds out "
            f"{len(left_out)} of them."
        )
    return dataset, rows, held_out, left_out


def open_caches(args, accelerator, pipeline, dataset, rows, held_out):
    """The caches of the training pairs and of the held-out ones, filled as far as they can be beforehand."""
    if not args.cache_latents:
        return None, None
    encoders = encoders_digest(pipeline)
    with failing_together("--cache_latents: the cache cannot be opened", Exception):
        cache = PairCache(args, accelerator, pipeline, dataset, cache_folder(args, encoders, held_out=False))
        held_out_cache = PairCache(args, accelerator, pipeline, held_out, cache_folder(args, encoders, held_out=True))
    held_out_cache.fill_together(accelerator, held_out_visits(held_out))
    if rows is not None:
        cache.fill_together(accelerator, [Visit(int(row)) for row in rows])
    return cache, held_out_cache


def main(args):
    accelerator, weight_dtype = build_accelerator(args)
    checkpoint, state = find_checkpoint(args, accelerator)
    settle_seed(args)
    # A source fails in as many ways as there are file systems. No process goes first: `datasets` locks its cache.
    with failing_together(f"--dataset_name {args.dataset_name} cannot be read", Exception):
        dataset, rows, held_out, left_out = load_rows(args)
    if args.max_train_steps is None:
        args.max_train_steps = math.ceil(args.num_train_epochs * len(rows) / global_batch_size(args, accelerator))

    pipeline = load_pipeline(args, accelerator, weight_dtype)
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    if noise_scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise TrainingError("--pretrained_model_name_or_path must predict epsilon or v, by its scheduler's config.")
    side = args.resolution // pipeline.vae_scale_factor
    latent_shape = (pipeline.vae.config.latent_channels, side, side)
    validation_prompts = encode_validation_prompts(args, pipeline) if args.run_validation else []
    cache, held_out_cache = open_caches(args, accelerator, pipeline, dataset, rows, held_out)
    parameters = make_trainable(args, pipeline.unet)
    optimizer, lr_scheduler = build_optimizer(args, accelerator, parameters)
    unet, optimizer, lr_scheduler = accelerator.prepare(pipeline.unet, optimizer, lr_scheduler)
    if accelerator.gradient_accumulation_steps != args.gradient_accumulation_steps:
        raise TrainingError("--gradient_accumulation_steps: the launch config has another number, leave it out there.")

    sizes = latent_shape, noise_scheduler.config.num_train_timesteps
    pairs, held_out_pairs = PairDataset(args, dataset, *sizes), PairDataset(args, held_out, *sizes)
    cursor = state["cursors"][accelerator.process_index] if state and args.streaming else None
    pairs_seen = state["pairs_seen"] if state else 0
    batches = training_batches(args, accelerator, dataset, rows, set(left_out), cache, pairs_seen, cursor)
    # The reader is closed before the interpreter exits: left open, one of parquet can abort it.
    with StopRequest(accelerator) as stop, contextlib.closing(batches):
        run = Run(
            args,
            accelerator,
            pipeline,
            unet,
            optimizer,
            lr_scheduler,
            noise_scheduler,
            preference_loss(args, noise_scheduler),
            held_out_pairs,
            held_out_cache,
            validation_prompts,
            stop,
            ROWS_BEFORE_JUDGEMENT if rows is None else min(ROWS_BEFORE_JUDGEMENT, len(rows)),
            sums=torch.zeros(len(METRICS) + 1, dtype=torch.float64, device=accelerator.device),
        )
        start_trackers(args, accelerator)
        logger.info("***** Running training *****")
        logger.info(f"  Pairs = {'streamed' if rows is None else len(rows)}, held out = {len(held_out)}")
        logger.info(f"  Pairs per optimizer step = {global_batch_size(args, accelerator)}")
        logger.info(f"  Optimizer steps = {args.max_train_steps}")
        logger.info(f"  Trained parameters = {sum(parameter.numel() for parameter in parameters):,}")
        if checkpoint is None:
            validate(run)
        if args.run_validation:
            run.base_images = draw_images(run)
        resume(run, checkpoint, state)
        if 0 < run.step < args.max_train_steps and run.step % args.validation_steps == 0:
            # The one that followed this checkpoint may have been cut short; it gives the same once more.
            validate(run)
        train(run, steady_batches(run, pairs, batches), cursor)
        finish(run)


if __name__ == "__main__":
    try:
        main(parse_args())
    except TrainingError as error:
        sys.exit(f"error: {error}")
