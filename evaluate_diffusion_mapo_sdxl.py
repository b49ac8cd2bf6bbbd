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
#     "sentencepiece",
#     "protobuf",
#     "ftfy",
# ]
# ///
"""
Generate images with SDXL and its fine-tuned versions, and score them with PickScore, HPS v2.1 and others.

Compare the base model with a LoRA and a full UNet on the 500 Pick-a-Pic v2 test prompts of the paper's Table 2:

    accelerate launch evaluate_diffusion_mapo_sdxl.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
        --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix --prompts pickapic_v2 \
        --candidates lora=mapo-lora full=mapo-full --mixed_precision bf16 --output_dir evaluation

Images that already exist, `00000_0.png` (prompt 0, image 0), `00001_0.png`, ... in a folder per model:

    accelerate launch evaluate_diffusion_mapo_sdxl.py --images sdxl=images/sdxl mapo=images/mapo \
        --prompts prompts.txt --output_dir evaluation

Run the same command again to resume; prompts, models and scorers may be added. `--output_dir` contains
`images/NAME/` with its `settings.json`, `scores/SCORER.json`, `scores.jsonl` (one image per line), `results.md`,
`results.json`, and `grid-NAME.png` with the largest wins and losses by the first scorer.

Scorers can be used without the rest: `PickScore("cuda").score(images, prompts)` scores PIL images in RGB.
"""

# Sections:
#
#   Scorers     the published models, as classes that can be used on their own
#   Statistics  means, differences and win rates
#   Errors      exceptions, and how several processes fail together
#   Arguments   the command line
#   Files       finding, reading and writing them
#   Prompts     from files, folders and hub datasets
#   Models      what is evaluated: the base model, candidates, folders of images
#   LoRA        reading LoRAs in the formats of diffusers, peft and kohya, and applying them exactly
#   Images      generating the missing ones
#   Scores      computing the missing ones
#   Results     tables and grids
#   Main        puts everything together

import argparse
import contextlib
import copy
import functools
import glob
import hashlib
import html
import importlib.util
import itertools
import json
import logging
import math
import os
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import datasets
import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.logging import get_logger
from accelerate.state import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import make_image_grid
from diffusers.utils.state_dict_utils import (
    StateDictType,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from huggingface_hub import hf_hub_download, is_offline_mode
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from PIL import Image, ImageDraw, PngImagePlugin, UnidentifiedImageError
from safetensors import safe_open
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Dinov2Model,
    SiglipModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


logger = get_logger(__name__)


# Scorers -------------------------------------------------------------------------------------------------------------
CLIP_L = "openai/clip-vit-large-patch14"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class Scorer:
    """
    A published model. `score(images, prompts)` takes N PIL images in RGB and N strings, and returns N scores.

    Preprocessing is fixed (no torchvision; texts padded to one length) and everything is float32, so that scores agree
    across machines and batches up to rounding. TF32 is turned off for convolutions in the whole process. Keyword
    arguments replace entries of `sources`. Each is a hub id or a local folder; `weights` is a local file or
    HUB_ID/FILE.
    """

    sources = {}
    # {source: files of which it must have one}. Default: config.json.
    required_files = {"model": ("model.safetensors", "model.safetensors.index.json")}
    architecture = CLIPModel
    reads_text = True
    package = None  # an optional package that the scorer needs

    def __init__(self, device, **sources):
        if not sources.keys() <= self.sources.keys():
            raise TypeError(f"{type(self).__name__} takes {', '.join(self.sources)}, not {', '.join(sources)}")
        torch.backends.cudnn.allow_tf32 = False  # convolutions would use it by default
        self.device = device
        self.sources = {**self.sources, **sources}
        self.model = self.load_model().eval().requires_grad_(False).to(device)
        self.text_embeddings = {}

        source = self.sources.get("processor") or self.sources["model"]
        self.image_processor = self.load_image_processor(source)
        self.tokenizer = None
        if self.reads_text:
            self.tokenizer = AutoTokenizer.from_pretrained(source)
            # Without its vocabulary, transformers silently builds a tokenizer of special tokens.
            if len(self.tokenizer) == len(self.tokenizer.all_special_ids):
                raise ValueError(f"the tokenizer of {source} has no vocabulary")

    def load_model(self):
        return load_complete(self.architecture, self.sources["model"], dtype=torch.float32)

    def load_image_processor(self, source):
        return AutoImageProcessor.from_pretrained(source, backend="pil")

    def max_tokens(self):
        return self.model.config.text_config.max_position_embeddings

    def to_pixels(self, images):
        """Normalized pixels (N, 3, height, width) of N images."""
        return self.image_processor(images, return_tensors="pt").pixel_values

    def embed_images(self, images):
        """Unit vectors (N, width) of N images."""
        pixels = self.to_pixels(images).to(self.device)
        return F.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)

    def tokenize(self, prompts):
        """Tokens of N prompts, padded or cut to the length that the model was trained with."""
        return self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=self.max_tokens(),
            return_tensors="pt",
        ).to(self.device)

    def embed_texts(self, prompts):
        """Unit vectors (N, width) of N prompts."""
        input_ids = self.tokenize(prompts).input_ids
        return F.normalize(self.model.get_text_features(input_ids=input_ids).pooler_output, dim=-1)

    def cosines(self, images, prompts):
        """Cosines (N,) of N images with their prompts. Each prompt is embedded once, in a batch of its own."""
        for prompt in prompts:
            if prompt not in self.text_embeddings:
                self.text_embeddings[prompt] = self.embed_texts([prompt])[0]
        text_embeddings = torch.stack([self.text_embeddings[prompt] for prompt in prompts])
        return (self.embed_images(images) * text_embeddings).sum(dim=-1)


class PickScore(Scorer):
    """exp(logit_scale) x cosine, about 22 for SDXL (arXiv 2305.01569, model card of yuvalkirstain/PickScore_v1)."""

    sources = {"model": "yuvalkirstain/PickScore_v1", "processor": CLIP_H}

    def score(self, images, prompts):
        return self.model.logit_scale.exp() * self.cosines(images, prompts)


class CLIP(Scorer):
    """max(100 x cosine, 0) with CLIP ViT-L/14 (arXiv 2104.08718, with the factor 100 of torchmetrics)."""

    sources = {"model": CLIP_L}

    def score(self, images, prompts):
        return (100 * self.cosines(images, prompts)).clamp(min=0)


def rename(weights, patterns):
    """Weights under new names, applying each (pattern, replacement) in this order."""
    renamed = {}
    for name, weight in weights.items():
        for pattern, replacement in patterns:
            name = re.sub(pattern, replacement, name)
        renamed[name] = weight
    return renamed


# From open_clip's names of weights to those of transformers.
OPEN_CLIP_NAMES = [
    (r"^(visual\.)?transformer\.resblocks\.", r"\1encoder.layers."),
    (r"^(encoder|positional_embedding|token_embedding|ln_final)", r"text_model.\1"),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^text_projection$", "text_projection.weight"),
    (r"^visual\.", "vision_model."),
    (r"positional_embedding$", "embeddings.position_embedding.weight"),
    (r"(token_embedding|class_embedding)", r"embeddings.\1"),
    (r"\.conv1\.", ".embeddings.patch_embedding."),
    (r"\.ln_pre\.", ".pre_layrnorm."),
    (r"\.ln_post\.", ".post_layernorm."),
    (r"\.ln_final\.", ".final_layer_norm."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."),
]


def from_open_clip(weights):
    """The weights of an open_clip CLIP model, under the names of transformers' CLIPModel."""
    converted = {}
    for name, weight in rename(weights, OPEN_CLIP_NAMES).items():
        if ".in_proj_" in name:
            for projection, rows in zip("qkv", weight.chunk(3), strict=True):
                converted[name.replace("in_proj_", f"{projection}_proj.")] = rows
        elif name.endswith("_projection.weight"):
            # open_clip stores the transpose of a linear layer's weight.
            converted[name] = weight.T
        else:
            converted[name] = weight
    return converted


def fit_into_square(image, side, antialias):
    """Pixels (3, side, side) from 0 to 1: the image, its longer side resized to `side`, centered on black."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    height, width = (round(length * side / max(image.size)) for length in pixels.shape[-2:])
    pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=antialias)
    left = (side - width) // 2
    top = (side - height) // 2
    return F.pad(pixels, (left, side - width - left, top, side - height - top))[0]


class HPS(Scorer):
    """
    Human Preference Score v2.1: 100 x cosine, about 30 for SDXL (arXiv 2306.09341, github.com/tgxs002/HPSv2).

    The weights are those of open_clip's ViT-H-14; `model` provides the config and the vocabulary of that architecture.
    The model sees the full image on a black square, where CLIP would crop its center. Texts are cleaned as in
    open_clip. HPSv2 itself computes in float16.
    """

    sources = {"model": CLIP_H, "weights": "xswu/HPSv2/HPS_v2.1_compressed.pt"}
    required_files = {}  # only the config and the vocabulary of `model` are used
    package = "ftfy"
    antialias = True

    def load_model(self):
        # Without a source, `from_pretrained` takes the weights from `state_dict`.
        return load_complete(
            CLIPModel,
            None,
            config=CLIPConfig.from_pretrained(self.sources["model"]),
            state_dict=from_open_clip(read_weights(self.sources["weights"])["state_dict"]),
            dtype=torch.float32,
        )

    def to_pixels(self, images):
        side = self.model.config.vision_config.image_size
        mean = torch.tensor(self.image_processor.image_mean)[:, None, None]
        std = torch.tensor(self.image_processor.image_std)[:, None, None]
        pixels = torch.stack([fit_into_square(image, side, self.antialias) for image in images])
        return (pixels - mean) / std

    def embed_texts(self, prompts):
        import ftfy

        cleaned = [html.unescape(html.unescape(ftfy.fix_text(prompt))) for prompt in prompts]
        return super().embed_texts(cleaned)

    def score(self, images, prompts):
        return 100 * self.cosines(images, prompts)


class HPSWithoutAntialias(HPS):
    """
    HPS v2.1 with the resizing that it was trained with, and that its published tables used.

    Since torchvision 0.17, HPSv2's own code antialiases: users measure 28.7 where its older README says 30.6.
    """

    antialias = False


def linear_head(weights):
    """Linear layers from 768 features to one score, without activations; training had dropout in between."""
    head = torch.nn.Sequential(
        torch.nn.Linear(768, 1024),
        torch.nn.Identity(),
        torch.nn.Linear(1024, 128),
        torch.nn.Identity(),
        torch.nn.Linear(128, 64),
        torch.nn.Identity(),
        torch.nn.Linear(64, 16),
        torch.nn.Linear(16, 1),
    )
    head.load_state_dict({name.removeprefix("layers."): weight for name, weight in weights.items()})
    return head.requires_grad_(False)


class Aesthetic(Scorer):
    """
    The LAION aesthetic predictor, about 5 to 7: linear layers on the unit vector of CLIP ViT-L/14.

    From github.com/christophschuhmann/improved-aesthetic-predictor, `sac+logos+ava1-l14-linearMSE.pth`. It does not
    read the prompt.
    """

    sources = {"model": CLIP_L, "weights": "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth"}
    reads_text = False

    def __init__(self, device, **sources):
        super().__init__(device, **sources)
        self.head = linear_head(read_weights(self.sources["weights"])).to(device)

    def score(self, images, prompts):
        return self.head(self.embed_images(images))[:, 0]


class SigLIP(Scorer):
    """100 x sigmoid(exp(logit_scale) x cosine + logit_bias), the probability of a match (arXiv 2303.15343)."""

    sources = {"model": "google/siglip-so400m-patch14-384"}
    architecture = SiglipModel
    package = "sentencepiece"

    def score(self, images, prompts):
        logits = self.model.logit_scale.exp() * self.cosines(images, prompts) + self.model.logit_bias
        return 100 * logits.sigmoid()


class DINOv2(Scorer):
    """
    100 x the mean cosine between the CLS vectors of an image and of each image in a folder.

    This is the subject fidelity of DreamBooth (arXiv 2208.12242), with DINOv2 instead of DINO. It does not read the
    prompt.
    """

    sources = {"model": "facebook/dinov2-base"}
    architecture = Dinov2Model
    reads_text = False

    def __init__(self, device, reference_images, **sources):
        super().__init__(device, **sources)
        paths, _ = find_images(reference_images)
        self.references = self.embed_images([read_image(path) for path in paths])

    def embed_images(self, images):
        pixels = self.to_pixels(images).to(self.device)
        return F.normalize(self.model(pixel_values=pixels).last_hidden_state[:, 0], dim=-1)

    def score(self, images, prompts):
        return 100 * (self.embed_images(images) @ self.references.T).mean(dim=1)


# From BLIP's names of a vision model's weights to those of transformers.
BLIP_NAMES = [
    (r"^cls_token", "embeddings.class_embedding"),
    (r"^pos_embed", "embeddings.position_embedding"),
    (r"^patch_embed\.proj", "embeddings.patch_embedding"),
    (r"^norm", "post_layernorm"),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm", ".layer_norm"),
    (r"\.attn\.", ".self_attn."),
    (r"self_attn\.proj\.", "self_attn.projection."),
]


def weights_of_part(weights, prefix):
    """The weights whose names begin with `prefix`, without it. Position ids are not weights in transformers."""
    part = {}
    for name, weight in weights.items():
        if name.startswith(prefix) and not name.endswith("position_ids"):
            part[name.removeprefix(prefix)] = weight
    return part


class ImageReward(Scorer):
    """
    ImageReward v1.0, normalized to mean 0 and standard deviation 1 on its training images (arXiv 2304.05977).

    As in github.com/zai-org/ImageReward, BLIP's text encoder reads the prompt and attends to the image, and linear
    layers score its first vector. All sizes come from the weights; `processor` provides the vocabulary.
    """

    sources = {"weights": "zai-org/ImageReward/ImageReward.pt", "processor": "google-bert/bert-base-uncased"}
    mean = 0.16717362830052426
    std = 1.0333394966054072

    def load_model(self):
        weights = read_weights(self.sources["weights"])
        vision = rename(weights_of_part(weights, "blip.visual_encoder."), BLIP_NAMES)
        text = weights_of_part(weights, "blip.text_encoder.")
        head = weights_of_part(weights, "mlp.")

        vision_width, _, patch_size, _ = vision["embeddings.patch_embedding.weight"].shape
        num_patches = vision["embeddings.position_embedding"].shape[1] - 1
        vision_config = BlipVisionConfig(
            hidden_size=vision_width,
            intermediate_size=len(vision["encoder.layers.0.mlp.fc1.bias"]),
            num_hidden_layers=sum(name.endswith("fc1.bias") for name in vision),
            num_attention_heads=vision_width // 64,
            image_size=patch_size * math.isqrt(num_patches),
            patch_size=patch_size,
            layer_norm_eps=1e-6,
        )
        vocab_size, text_width = text["embeddings.word_embeddings.weight"].shape
        text_config = BlipTextConfig(
            vocab_size=vocab_size,
            hidden_size=text_width,
            encoder_hidden_size=vision_width,
            intermediate_size=len(text["encoder.layer.0.intermediate.dense.bias"]),
            num_hidden_layers=sum(name.endswith("intermediate.dense.bias") for name in text),
            num_attention_heads=text_width // 64,
            max_position_embeddings=len(text["embeddings.position_embeddings.weight"]),
        )
        vision_model = load_complete(BlipVisionModel, None, config=vision_config, state_dict=vision)
        text_model = load_complete(
            BlipTextModel,
            None,
            config=text_config,
            state_dict=text,
            add_pooling_layer=False,
        )
        return torch.nn.ModuleList([vision_model, text_model, linear_head(head)]).float()

    def load_image_processor(self, source):
        side = self.model[0].config.image_size
        return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=side)

    def max_tokens(self):
        return 35

    def score(self, images, prompts):
        vision_model, text_model, head = self.model
        patches = vision_model(pixel_values=self.to_pixels(images).to(self.device)).last_hidden_state
        tokens = self.tokenize(prompts)
        states = text_model(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=patches,
        ).last_hidden_state
        return (head(states[:, 0])[:, 0] - self.mean) / self.std


SCORERS = {
    "pickscore": PickScore,
    "hps": HPS,
    "aesthetic": Aesthetic,
    "clip": CLIP,
    "siglip": SigLIP,
    "dinov2": DINOv2,
    "imagereward": ImageReward,
    "hps_no_antialias": HPSWithoutAntialias,
}


# Statistics ----------------------------------------------------------------------------------------------------------
#
# Scores of a model are an array (prompts, images per prompt). Two models are compared image by image, because their
# images have the same seeds.
def mean_and_error(scores):
    """The mean of scores, and its standard error over prompts (None for a single prompt)."""
    means = scores.mean(axis=1)
    error = None
    if len(means) > 1:
        error = float(means.std(ddof=1) / math.sqrt(len(means)))
    return float(means.mean()), error


def win_rate(candidate, base):
    """
    The share of images that the candidate wins, where ties count as half, and its 95 % confidence interval (Wilson's).

    Images of one prompt are correlated. The effective sample size, between the number of prompts and the number of
    images, is estimated from the variance between prompts.
    """
    points = (candidate > base) + 0.5 * (candidate == base)
    num_prompts = len(points)
    rate = points.mean()

    # The effective sample size: how many independent images would have this variance.
    variance = 0
    if num_prompts > 1:
        variance = points.mean(axis=1).var(ddof=1) / num_prompts
    effective_size = num_prompts
    if variance > 0:
        effective_size = np.clip(rate * (1 - rate) / variance, num_prompts, points.size)

    z_squared = 1.959964**2
    center = (rate + z_squared / (2 * effective_size)) / (1 + z_squared / effective_size)
    half_width = math.sqrt(z_squared * (rate * (1 - rate) / effective_size + z_squared / (4 * effective_size**2)))
    half_width /= 1 + z_squared / effective_size

    # Rounding must not put the rate outside of its interval.
    low = min(max(center - half_width, 0), rate)
    high = max(min(center + half_width, 1), rate)
    return float(rate), float(low), float(high)


def compare(scores, others):
    """The paired comparison of two models' scores."""
    difference, error = mean_and_error(scores - others)
    rate, low, high = win_rate(scores, others)
    wins = int((scores > others).sum())
    ties = int((scores == others).sum())
    return {
        "difference": difference,
        "difference_error": error,
        "wins": wins,
        "ties": ties,
        "losses": scores.size - wins - ties,
        "win_rate": rate,
        "win_rate_low": low,
        "win_rate_high": high,
    }


def summarize_categories(scorers, names, tables, categories):
    """Mean scores of each model in each category, if there are several, and the mean of the categories."""
    distinct = list(dict.fromkeys(categories))
    if len(distinct) < 2:
        return []

    rows = []
    for i, name in enumerate(names):
        rows_of_model = []
        for category in distinct:
            in_category = np.array([other == category for other in categories])
            row = {"category": category, "model": name}
            for scorer in scorers:
                row[scorer] = float(tables[scorer][i][in_category].mean())
            rows_of_model.append(row)

        # Every category has the same weight, however many prompts it has.
        average = {"category": "mean of categories", "model": name}
        for scorer in scorers:
            average[scorer] = float(np.mean([row[scorer] for row in rows_of_model]))
        rows += [*rows_of_model, average]
    return rows


def summarize(scorers, names, tables, categories):
    """
    Rows of results: per scorer and model (base model first), per pair of candidates, and per category.

    `tables` is {scorer: (models, prompts, images per prompt)}, `categories` the category of each prompt.
    """
    results = []
    pairs = []
    for scorer in scorers:
        for i, name in enumerate(names):
            scores = tables[scorer][i]
            mean, error = mean_and_error(scores)
            row = {"scorer": scorer, "model": name, "mean": mean, "standard_error": error}
            if i > 0:
                row.update(compare(scores, tables[scorer][0]))
            results.append(row)
            for j in range(1, i):
                comparison = compare(scores, tables[scorer][j])
                pairs.append({"scorer": scorer, "model": name, "against": names[j], **comparison})
    return {
        "results": results,
        "pairs": pairs,
        "categories": summarize_categories(scorers, names, tables, categories),
    }


# Errors --------------------------------------------------------------------------------------------------------------
#
# A failure that can hit a single process, such as a full disk or an unreadable file, is raised on all of them
# (`raise_on_all_ranks`) where the others would otherwise wait for it. Elsewhere `explain` is enough.
class EvaluationError(Exception):
    """An error that one sentence explains; printed without a traceback."""


def describe(error):
    """An error's type and text in one line. The type of a ValueError says nothing, and is left out."""
    text = " ".join(str(error).split())
    if type(error) is ValueError and text:
        return text
    return f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def explain(message):
    """Raise any error of the body as an EvaluationError that begins with `message`."""
    try:
        yield
    except EvaluationError:
        raise
    except Exception as error:
        raise EvaluationError(f"{message}: {describe(error)}") from error


@contextlib.contextmanager
def raise_on_all_ranks(message):
    """
    If the body fails on any process, raise the same EvaluationError on all of them, so that none hangs.

    The body must not contain another use of this: a process that fails before the inner one would enter the outer
    gather while the others enter the inner one.
    """
    failure = None
    try:
        with explain(message):
            yield
    except EvaluationError as error:
        failure = str(error)

    for sentence in gather_object([failure]):
        if sentence is not None:
            raise EvaluationError(sentence)


def from_main_process(function, *args):
    """Call `function` on the main process; return its result, or raise its error, on all processes."""
    result = None
    with raise_on_all_ranks("The main process failed"):
        if PartialState().is_main_process:
            result = function(*args)
    return broadcast_object_list([result])[0]


# Arguments -----------------------------------------------------------------------------------------------------------
DEFAULT_SCORERS = ["pickscore", "hps", "aesthetic", "clip"]
SCHEDULERS = [
    "DDIM",
    "DDPM",
    "PNDM",
    "LMSDiscrete",
    "EulerDiscrete",
    "HeunDiscrete",
    "EulerAncestralDiscrete",
    "DPMSolverMultistep",
    "DPMSolverSinglestep",
    "KDPM2Discrete",
    "KDPM2AncestralDiscrete",
    "DEISMultistep",
    "UniPCMultistep",
]
CATEGORY = "{category}"  # stands for each prompt's category in a path


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
SEED = bounded(int, 0, sys.maxsize, "zero or a positive whole number")
NOT_NEGATIVE = bounded(float, 0, sys.float_info.max, "zero or a positive number")
PATH = os.path.expanduser  # leaves hub ids as they are


def named_source(text):
    """Parse NAME=PATH or NAME=PATH+PATH for argparse."""
    match = re.fullmatch(r"(\w[\w.-]*)=(.+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH with a NAME of letters, digits, '.', '_', '-'")
    name, path = match.groups()
    return name, "+".join(PATH(part) for part in path.split("+"))


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults other than None, False and []."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


def add_prompt_arguments(parser):
    add = parser.add_argument_group("prompts and images").add_argument
    add(
        "--prompts",
        type=PATH,
        required=True,
        help="`pickapic_v2`, `hpdv2`, `partiprompts`, a hub id, a local folder, or a .txt, .csv, .tsv, .json, .jsonl "
        "or .parquet file.",
    )
    add("--prompt_column", default="prompt", help="Column with the prompts.")
    add("--scoring_prompt_column", help="Column with the prompts for scorers, e.g. without a subject's rare token.")
    add(
        "--category_column",
        help="Column with a prompt's category, e.g. its subject. Results are also given per category, and {category} "
        "stands for it in paths of --candidates and --reference_images.",
    )
    add("--prompt_split", default="test", help="Split of the hub dataset or local folder.")
    add("--max_prompts", type=COUNT, help="Use only this many prompts, from the start. hpdv2 is sorted by style.")
    add("--images_per_prompt", type=COUNT, default=1, help="Number of images per prompt.")
    add("--batch_size", type=COUNT, default=4, help="Images per process and forward pass.")
    add("--output_dir", type=PATH, default="evaluation", help="Output folder.")
    add(
        "--images",
        nargs="+",
        type=named_source,
        default=[],
        metavar="NAME=FOLDER",
        help="Folders of existing images, named by prompt and image (00012_0.png), or as hpsv2 names them "
        "(CATEGORY/00012.jpg). Without --pretrained_model_name_or_path, the others are compared with the first.",
    )


def add_generation_arguments(parser):
    add = parser.add_argument_group("generation").add_argument
    add(
        "--pretrained_model_name_or_path",
        type=PATH,
        help="SDXL base model, `base` in results: hub id or local folder.",
    )
    add(
        "--pretrained_vae_model_name_or_path",
        type=PATH,
        help="VAE for all models, e.g. madebyollin/sdxl-vae-fp16-fix.",
    )
    add("--variant", help="Variant of the base model's weights, e.g. fp16.")
    add(
        "--candidates",
        nargs="+",
        type=named_source,
        default=[],
        metavar="NAME=PATH",
        help="Models to compare with the base model: UNets, LoRAs or pipelines; hub ids or local folders, e.g. an "
        "output_dir of training. A LoRA may also be a .safetensors file. Use NAME=UNET+LORA for a LoRA that was "
        "trained on another UNet.",
    )
    schedulers = [f"{kind}Scheduler" for kind in SCHEDULERS]
    add("--scheduler", choices=schedulers, help="Scheduler for all models. Defaults to the base model's.")
    add("--num_inference_steps", type=COUNT, default=50, help="Denoising steps.")
    add("--guidance_scale", type=NOT_NEGATIVE, default=5.0, help="Guidance scale.")
    add("--resolution", type=COUNT, default=1024, help="Width and height of the images in pixels.")
    add("--seed", type=SEED, default=0, help="Seed of the noise.")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="Defaults to accelerate's setting.")
    add("--compile", action="store_true", help="Compile the UNet's transformer blocks to reduce CPU overhead.")


def source_flags(name):
    """{part: name of its flag} of a scorer. The two versions of HPS have the same flags."""
    prefix = name.removesuffix("_no_antialias")
    return {part: f"{prefix}_{part}" for part in SCORERS[name].sources}


def add_source_arguments(parser, names):
    """Flags for the sources of these scorers. The pair maker has them as well."""
    description = "Weights are a file or HUB_ID/FILE; any other source is a hub id or a local folder."
    add = parser.add_argument_group("sources of the scorers", description).add_argument
    for name in names:
        for part, flag in source_flags(name).items():
            default = SCORERS[name].sources[part]
            add(f"--{flag}", type=PATH, default=default, help=f"{part.capitalize()} of {name}.")


def check_package(parser, flag, name):
    """Reject a scorer whose package is not installed."""
    package = SCORERS[name].package
    if package is not None and importlib.util.find_spec(package) is None:
        parser.error(f"{flag} {name} needs a package: pip install {package}")


def add_scorer_arguments(parser):
    add = parser.add_argument_group("scorers").add_argument
    add("--scorers", nargs="+", choices=list(SCORERS), default=DEFAULT_SCORERS, help="Scorers to use.")
    add("--reference_images", type=PATH, help="Local folder with images of the subject, for dinov2.")
    add_source_arguments(parser, [name for name in SCORERS if name != "hps_no_antialias"])


def parse_args(input_args=None):
    """Parse the command line (or `input_args`). An invalid one exits with one sentence that names the flag."""
    parser = argparse.ArgumentParser(
        description=__doc__.strip().splitlines()[0],
        usage="accelerate launch %(prog)s --prompts FILE --pretrained_model_name_or_path MODEL "
        "--candidates NAME=PATH [...]",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add_prompt_arguments(parser)
    add_generation_arguments(parser)
    add_scorer_arguments(parser)
    args = parser.parse_args(input_args)
    args.scorers = list(dict.fromkeys(args.scorers))
    check_arguments(parser, args)
    return args


def check_arguments(parser, args):  # noqa: C901
    """Reject combinations of flags that cannot work."""
    base = args.pretrained_model_name_or_path
    if base is None and not args.images:
        parser.error("give --pretrained_model_name_or_path to generate images, or --images to score existing ones")
    if base is None and args.candidates:
        parser.error("--candidates requires --pretrained_model_name_or_path")
    if base is not None and base.endswith(".safetensors"):
        parser.error(
            "--pretrained_model_name_or_path is a single file, convert it first: "
            f"python convert_sdxl.py single_file {base} FOLDER"
        )

    names = [name for name, _ in [*args.candidates, *args.images]]
    if base is not None:
        names.insert(0, "base")
    if len(set(names)) < len(names):
        parser.error(f"--candidates and --images need different names, not {', '.join(names)}")

    paths = [path for _, path in args.candidates]
    if args.reference_images is not None:
        paths.append(args.reference_images)
    has_categories = args.category_column is not None or args.prompts in ("hpdv2", "partiprompts")
    if not has_categories and any(CATEGORY in path for path in paths):
        parser.error(f"{CATEGORY} in a path requires --category_column")
    if args.prompts in ("hpdv2", *PROMPT_SETS):
        for flag in ("prompt_split", "prompt_column", "scoring_prompt_column", "category_column"):
            if getattr(args, flag) != parser.get_default(flag):
                parser.error(f"--{flag} cannot be combined with --prompts {args.prompts}")

    if args.output_dir == "":
        parser.error("--output_dir is empty")
    if args.resolution % 8 != 0:
        parser.error("--resolution must be a multiple of 8")
    if "dinov2" in args.scorers and not args.reference_images:
        parser.error("--scorers dinov2 requires --reference_images")
    for name in args.scorers:
        check_package(parser, "--scorers", name)


# Files ---------------------------------------------------------------------------------------------------------------
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif")

# By default, Pillow refuses PNG files with more than 1 MiB of metadata, e.g. a workflow or a color profile.
PngImagePlugin.MAX_TEXT_CHUNK = 2**31 - 1
PngImagePlugin.MAX_TEXT_MEMORY = 2**31 - 1
ORIENTATION = 0x0112
# How an image is turned upright, by its EXIF orientation.
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def find_file(source, name):
    """Path of a file in a local folder, or in a hub repository (then downloaded); None if it does not exist."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    with explain(f"{source} is not a local folder, and its {name} cannot be downloaded"):
        try:
            return Path(hf_hub_download(source, name))
        except HFValidationError:
            return None
        except GatedRepoError:
            raise
        except LocalEntryNotFoundError:
            if not is_offline_mode():  # the hub cannot be reached, and may have the file
                raise
            return None
        except (EntryNotFoundError, RepositoryNotFoundError):
            return None


def read_weights(source):
    """A dictionary of weights from a local .pt or .pth file, or from HUB_ID/FILE."""
    file = find_file(*os.path.split(source))
    if file is None:
        raise FileNotFoundError(source)
    return torch.load(file, map_location="cpu", weights_only=True)


def digest(value):
    """A short hash of anything that JSON can write."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def file_digest(path):
    """A short hash of a file's content."""
    with explain(f"{path} cannot be read"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def version_of(source, file, weights=()):
    """The commit of a hub id; for a local folder, a digest of `weights`, or of `file` if there are none."""
    if not Path(source).exists():
        # The hub's cache keeps files at snapshots/COMMIT/NAME.
        return file.as_posix().rpartition("/snapshots/")[2].partition("/")[0]
    return digest([file_digest(path) for path in sorted(weights) or [file]])


def decode_image(path):
    """Decode an image to RGB: upright, and composited over white where it is transparent. Ignores broken metadata."""
    with Image.open(path) as image:
        image.load()
        # Pillow's own conversion clips 16-bit grey, whose mode is "I;16", or "I" in older versions.
        is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))

        # ImageOps.exif_transpose also rewrites the EXIF data, which fails if one of its tags is wrong.
        orientation = None
        with contextlib.suppress(Exception):
            orientation = image.getexif().get(ORIENTATION)
        if orientation in TRANSPOSITIONS:
            image = image.transpose(TRANSPOSITIONS[orientation])

        if is_16_bit:
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def read_image(path):
    """`decode_image` with an error that names the file."""
    with explain(f"Image {path} cannot be read, fix or delete it"):
        return decode_image(path)


def find_images(folder):
    """Paths of the images in a folder, sorted by name, and the names of the files that Pillow cannot open."""
    images = []
    others = []
    for path in sorted(Path(folder).glob("[!.]*")):
        if not path.is_file():
            continue
        if path.suffix == ".txt":  # Pillow mistakes some texts, e.g. "BMX rider", for images
            others.append(path.name)
            continue
        try:
            Image.open(path).close()
        except UnidentifiedImageError:
            others.append(path.name)
            continue
        except Exception:  # reported with its path when the image is decoded
            pass
        images.append(path)
    return images, others


def find_given_images(flag, folder):
    """Paths of the images in a flag's folder. Files other than images and captions are left out with a warning."""
    paths, others = find_images(folder)
    if not paths:
        raise EvaluationError(f"--{flag} {folder} is not a folder with images that Pillow can open.")
    others = [name for name in others if not name.endswith(".txt")]
    if others:
        logger.warning(
            f"--{flag} {folder}: left out {len(others)} files that Pillow cannot open: {', '.join(others[:10])}."
        )
    return paths


def write_atomically(path, save):
    """Let `save` write a file that appears under its name only when it is complete."""
    with explain(f"--output_dir: {path} cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary_path = path.with_name(f".incomplete-{path.name}")
        save(temporary_path)
        os.replace(temporary_path, path)


def write_text(path, text):
    write_atomically(path, lambda temporary_path: temporary_path.write_text(text, encoding="utf-8"))


def in_batches(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]


# Prompts -------------------------------------------------------------------------------------------------------------
PROMPT_FILES = {".txt": "text", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
TABLES = (".csv", ".tsv", ".jsonl", ".parquet")  # files whose columns have names; a .json file may be a list
# Known prompt sets: (source, split, prompt column, category column).
PROMPT_SETS = {
    "pickapic_v2": ("yuvalkirstain/pickapic_v2_no_images", "test_unique", "caption", None),
    "partiprompts": ("nateraw/parti-prompts", "train", "Prompt", "Category"),
}
# HPDv2 (arXiv 2306.09341) is a list of prompts per style.
HPDV2 = {
    "anime": "hf://datasets/zhwang/HPDv2/benchmark/anime.json",
    "concept-art": "hf://datasets/zhwang/HPDv2/benchmark/concept-art.json",
    "paintings": "hf://datasets/zhwang/HPDv2/benchmark/paintings.json",
    "photo": "hf://datasets/zhwang/HPDv2/benchmark/photo.json",
}


class Prompt(NamedTuple):
    text: str
    scored: str  # what scorers read
    category: str | None
    number: int  # among the prompts of its category


def stream_prompts(source, split, columns):
    """
    Yield {flag: value} for each row of a prompts file, a local folder or a hub dataset.

    `columns` is {flag: name of its column}; errors name the flag. The lines of a text file, and the strings of a JSON
    list, are prompts regardless of the name of their column.
    """
    suffix = Path(source).suffix.lower()
    options = {"path": source}
    if suffix in PROMPT_FILES:
        # `datasets` takes the path of a file as a pattern.
        options = {"path": PROMPT_FILES[suffix], "data_files": glob.escape(source)}
        split = "train"
    if suffix == ".txt":
        options["encoding"] = "utf-8-sig"
    if suffix == ".tsv":
        options["sep"] = "\t"
    builder = datasets.load_dataset_builder(**options)
    try:
        rows = builder.as_streaming_dataset(split=split)
    except ValueError as error:
        if not str(error).startswith("Bad split"):
            raise
        raise ValueError(f"--prompt_split: {error}") from error

    # Read only these columns of parquet files, which may contain images.
    names = list(dict.fromkeys(columns.values()))
    if hasattr(builder.config, "columns") and set(names) <= set(rows.features or ()):
        builder.config.columns = names
        rows = builder.as_streaming_dataset(split=split)

    for row in rows:
        if list(row) == ["text"] and suffix not in TABLES:
            columns = {**columns, "--prompt_column": "text"}
        for flag, name in columns.items():
            if name not in row:
                raise ValueError(f"{flag}: there is no column {name!r} (columns: {', '.join(row)})")
        yield {flag: row[name] for flag, name in columns.items()}


def read_rows(args):
    """Yield (prompt, prompt for scorers, category) for each row of --prompts."""
    if args.prompts == "hpdv2":
        for style, file in HPDV2.items():
            for row in stream_prompts(file, "train", {"--prompt_column": "text"}):
                yield row["--prompt_column"], row["--prompt_column"], style
        return

    source = args.prompts
    split = args.prompt_split
    prompt_column = args.prompt_column
    category_column = args.category_column
    if args.prompts in PROMPT_SETS:
        source, split, prompt_column, category_column = PROMPT_SETS[args.prompts]
    columns = {"--prompt_column": prompt_column}
    if args.scoring_prompt_column is not None:
        columns["--scoring_prompt_column"] = args.scoring_prompt_column
    if category_column is not None:
        columns["--category_column"] = category_column

    for row in stream_prompts(source, split, columns):
        text = row["--prompt_column"]
        category = None
        if category_column is not None:
            if row["--category_column"] is None:
                raise ValueError(f"--category_column: the row of {text!r} has no category")
            category = str(row["--category_column"])
        yield text, row.get("--scoring_prompt_column", text), category


def read_prompts(args):
    """The first --max_prompts prompts."""
    with explain(f"--prompts {args.prompts} cannot be loaded"):
        rows = list(itertools.islice(read_rows(args), args.max_prompts))
    # Text files may end with blank lines.
    while rows and isinstance(rows[-1][0], str) and not rows[-1][0].strip():
        rows.pop()
    if not rows:
        raise EvaluationError(f"--prompts {args.prompts} contains no prompts.")

    prompts = []
    seen = {}  # {category: number of its prompts so far}
    for i, (text, scored, category) in enumerate(rows):
        for words in (text, scored):
            if not isinstance(words, str) or not words.strip():
                raise EvaluationError(f"--prompts {args.prompts}: row {i + 1} is empty or not text.")
        number = seen.get(category, 0)
        seen[category] = number + 1
        prompts.append(Prompt(text, scored, category, number))
    return prompts


def warn_about_long_prompts(prompts, tokenizer):
    """Warn about prompts with more tokens than SDXL reads. Its two tokenizers split a prompt in the same way."""
    limit = tokenizer.model_max_length
    too_long = sum(len(tokens) > limit for tokens in tokenizer(prompts).input_ids)
    if too_long > 0:
        logger.warning(f"{too_long} of {len(prompts)} prompts have more than {limit} tokens; SDXL ignores the rest.")


# Models --------------------------------------------------------------------------------------------------------------
LORA_FILE = "pytorch_lora_weights.safetensors"
# The first of these files that a source contains determines its kind.
KINDS = {
    "model_index.json": "pipeline",
    "unet/config.json": "unet",
    LORA_FILE: "lora",
    "config.json": "unet",
}
# The parts of an SDXL pipeline that have weights.
COMPONENTS = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
# One scheduler samples from all models, so pipelines among the candidates must agree with the base model on these keys
# of its config. The values are the defaults of configs without the key.
SCHEDULE = {
    "prediction_type": "epsilon",
    "beta_start": None,
    "beta_end": None,
    "beta_schedule": None,
    "rescale_betas_zero_snr": False,
}


class Model(NamedTuple):
    """What generates images: a pipeline, optionally with another UNet and a LoRA; each a hub id or a path."""

    label: str  # the flag and its value, for messages
    kind: str
    source: str
    version: str
    pipeline: str
    unet: str | None = None
    lora: str | None = None


class System(NamedTuple):
    """
    One line of the results: the base model, a candidate, or a folder of --images. Messages name its `label`, a flag.

    `folder` contains its images. `models` generate them: {category: Model}, or {None: Model} for all categories; there
    are none for --images.
    """

    name: str
    label: str
    folder: Path
    models: dict

    def model_of(self, prompt):
        """The Model that generates the images of a prompt."""
        if None in self.models:
            return self.models[None]
        return self.models[prompt.category]

    def image_path(self, prompts, image_id):
        """Path of an image by its id: the number of its prompt, and its number among the images of that prompt."""
        prompt_number, image_number = image_id
        if self.models:
            return self.folder / f"{prompt_number:05d}_{image_number}.png"

        paths = [self.folder / f"{prompt_number:05d}_{image_number}{suffix}" for suffix in IMAGE_SUFFIXES]
        prompt = prompts[prompt_number]
        if prompt.category is not None and image_number == 0:
            # hpsv2 names images by category, and by their number within it.
            paths += [self.folder / prompt.category / f"{prompt.number:05d}{suffix}" for suffix in IMAGE_SUFFIXES]
        for path in paths:
            if path.exists():
                return path
        return paths[0]


def find_kind(source, label, kinds):
    """The kind of a folder, file or hub id, one of `kinds`, and the version of its weights."""
    for name, kind in KINDS.items():
        if kind not in kinds:
            continue
        file = None
        if kind == "lora":
            file = find_lora_file(source)
        elif not source.endswith(".safetensors"):  # only a LoRA may be a single file
            file = find_file(source, name)
        if file is None:
            continue

        weights = []
        if kind == "pipeline":
            weights = file.parent.glob("*/*.safetensors")
        elif kind == "unet":
            weights = file.parent.glob("*.safetensors")
        return kind, version_of(source, file, weights)

    if source.endswith(".safetensors") and "lora" in kinds:
        raise EvaluationError(f"{label}: there is no such file.")
    names = [name for name, kind in KINDS.items() if kind in kinds]
    raise EvaluationError(f"{label} is neither a folder nor a reachable hub id that contains {' or '.join(names)}.")


def find_candidate(args, name, source):
    """The Model of --candidates NAME=PATH; PATH may be UNET+LORA unless a file of that name exists."""
    base = args.pretrained_model_name_or_path
    label = f"--candidates {name}={source}"
    if "+" in source and not Path(source).exists():
        unet, _, lora = source.rpartition("+")
        kind, unet_version = find_kind(unet, f"{label}: {unet}", ["pipeline", "unet"])
        _, lora_version = find_kind(lora, f"{label}: {lora}", ["lora"])
        version = digest([unet_version, lora_version])
        if kind == "pipeline":
            return Model(label, "unet and lora", source, version, pipeline=unet, lora=lora)
        return Model(label, "unet and lora", source, version, pipeline=base, unet=unet, lora=lora)

    kind, version = find_kind(source, label, ["pipeline", "unet", "lora"])
    if kind == "pipeline":
        return Model(label, kind, source, version, pipeline=source)
    if kind == "unet":
        return Model(label, kind, source, version, pipeline=base, unet=source)

    with explain(f"{label} cannot be loaded"):
        unet = read_lora_config(find_lora_file(source)).get("unet.base_model_name_or_path")
    if unet not in (None, "", base, Path(base).absolute().name):  # training shortens local paths
        logger.warning(
            f"{label} names {unet} as its base model. If that is not {base}, use {name}=UNET+{source} with the UNet "
            "that it was trained on."
        )
    return Model(label, kind, source, version, pipeline=base, lora=source)


def find_systems(args, prompts):
    """Everything under evaluation, the base model first."""
    systems = []
    folder = Path(args.output_dir) / "images"
    base = args.pretrained_model_name_or_path
    if base is not None:
        label = f"--pretrained_model_name_or_path {base}"
        _, version = find_kind(base, label, ["pipeline"])
        model = Model(label, "base", base, version, pipeline=base)
        systems.append(System("base", label, folder / "base", {None: model}))

    for name, source in args.candidates:
        models = {}
        if CATEGORY in source:
            for prompt in prompts:
                if prompt.category not in models:
                    models[prompt.category] = find_candidate(args, name, source.replace(CATEGORY, prompt.category))
        else:
            models[None] = find_candidate(args, name, source)
        systems.append(System(name, f"--candidates {name}={source}", folder / name, models))

    for name, source in args.images:
        systems.append(System(name, f"--images {name}={source}", Path(source), {}))
    return systems


def find_vae(source):
    """The version of --pretrained_vae_model_name_or_path."""
    file = find_file(source, "config.json")
    if file is None:
        raise EvaluationError(
            f"--pretrained_vae_model_name_or_path {source} is neither a folder nor a reachable hub id that contains "
            "config.json."
        )
    return version_of(source, file, file.parent.glob("*.safetensors"))


def load_complete(model_class, source, **options):
    """`from_pretrained`, but missing weights are an error: libraries would initialize them randomly."""
    model, info = model_class.from_pretrained(source, use_safetensors=True, output_loading_info=True, **options)
    missing = info["missing_keys"]
    if missing:
        raise ValueError(
            f"{options.get('subfolder') or 'it'} lacks {len(missing)} of its weights, e.g. {min(missing)}"
        )
    return model


def load_component(name, source, variant, dtype):
    """One of COMPONENTS. All but the UNet may lack the variant."""
    if variant is not None:
        try:
            return load_complete(COMPONENTS[name], source, subfolder=name, variant=variant, dtype=dtype)
        except OSError as error:
            # Truncated weights are an OSError as well.
            if name == "unet" or "file named" not in str(error):
                raise
    return load_complete(COMPONENTS[name], source, subfolder=name, dtype=dtype)


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


def load_sdxl(source, variant=None, dtype=torch.float32, **components):
    """A pipeline with these components instead of its own. Missing weights are an error."""
    for name in COMPONENTS:
        if name not in components:
            components[name] = load_component(name, source, variant, dtype)
    components.update(load_tokenizers(source))
    return StableDiffusionXLPipeline.from_pretrained(source, add_watermarker=False, **components)


def check_schedule(source, base):
    """Refuse a pipeline that was trained with another noise schedule than the base model's."""
    config = EulerDiscreteScheduler.load_config(source, subfolder="scheduler")
    base_config = EulerDiscreteScheduler.load_config(base, subfolder="scheduler")
    for key, default in SCHEDULE.items():
        value = config.get(key, default)
        base_value = base_config.get(key, default)
        if value != base_value:
            raise ValueError(f"its scheduler's {key} is {value}, not {base_value} as in the base model")


def load_unet(source, base, dtype):
    """A UNet from a folder or hub id, or from `unet` in it. It must fit the base model's latents and prompts."""
    subfolder = None
    if find_file(source, "unet/config.json") is not None:
        subfolder = "unet"
    config = UNet2DConditionModel.load_config(source, subfolder=subfolder)
    base_config = UNet2DConditionModel.load_config(base, subfolder="unet")
    for key in ("addition_embed_type", "cross_attention_dim", "in_channels"):
        if config.get(key) != base_config.get(key):
            raise ValueError(f"its {key} is {config.get(key)}, not {base_config.get(key)} as in the base model")
    return load_complete(UNet2DConditionModel, source, subfolder=subfolder, dtype=dtype)


class Shared(NamedTuple):
    """What all pipelines have in common; `vae` is None if each one uses its own."""

    dtype: torch.dtype
    scheduler: object
    vae: AutoencoderKL | None


def load_pipeline(args, model, shared):
    """A model's pipeline. Nothing is moved to the GPU."""
    base = args.pretrained_model_name_or_path
    variant = args.variant
    components = {"scheduler": shared.scheduler}
    if shared.vae is not None:
        components["vae"] = shared.vae
    with explain(f"{model.label} cannot be loaded"):
        if model.pipeline != base:
            check_schedule(model.pipeline, base)
            variant = None
        if model.unet is not None:
            components["unet"] = load_unet(model.unet, base, shared.dtype)
        pipeline = load_sdxl(model.pipeline, variant, shared.dtype, **components)
        if model.lora is not None:
            add_lora(pipeline, read_lora(find_lora_file(model.lora), pipeline.unet.config))
    return pipeline


# LoRA ----------------------------------------------------------------------------------------------------------------
#
# diffusers applies some alphas wrongly and silently drops some weights. Here, every layer becomes
# W + alpha / rank * up @ down, and a file that contains anything else is refused.

# The two matrices of a LoRA layer, {down: up}, as kohya, peft and earlier versions of diffusers name them.
LORA_UP = {"lora_down": "lora_up", "lora_A": "lora_B", "down": "up"}


def find_lora_file(source):
    """Path of a LoRA: a .safetensors file (also as HUB_ID/FILE), or one in a folder or hub id; or None."""
    if source.endswith(".safetensors"):
        return find_file(*os.path.split(source))

    file = find_file(source, LORA_FILE)
    # A local folder with a config.json is a UNet's. In any other, the only weights file may have any name.
    if file is None and not Path(source, "config.json").exists():
        files = list(Path(source).glob("*.safetensors"))
        if len(files) == 1:
            file = files[0]
    return file


def read_lora_config(file):
    """The peft config in the metadata of a LoRA's file: {"PART.NAME": value}, empty if there is none."""
    with safe_open(file, "pt") as tensors:
        metadata = tensors.metadata() or {}
    return json.loads(metadata.get("lora_adapter_metadata", "{}"))


def find_alpha(config, layer):
    """The alpha of a layer in the peft config of its file, or None. Patterns match as in peft."""
    part, _, name = layer.partition(".")
    for pattern, alpha in (config.get(f"{part}.alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return alpha
    return config.get(f"{part}.lora_alpha")


def apply_alphas(weights, config):
    """A LoRA's weights in float32, each `up` multiplied by alpha / rank. Anything else is refused."""
    alphas = {}
    matrices = {}
    for name, weight in weights.items():
        if name.endswith(".alpha"):
            alphas[name.removesuffix(".alpha")] = weight.item()
        else:
            matrices[name] = weight.float()

    num_layers = 0
    for name, weight in matrices.items():
        layer, _, kind = name.removesuffix(".weight").rpartition(".")
        if kind in LORA_UP.values():
            continue
        if kind == "dora_scale" or kind.startswith("lora_magnitude"):
            raise ValueError("it is a DoRA, which is not supported")
        up = f"{layer}.{LORA_UP.get(kind)}.weight"
        if kind not in LORA_UP or up not in matrices:
            raise ValueError(f"{name} is not one of the two weights of a LoRA's layer")

        # An alpha among the weights takes precedence over that of the config. Without either, alpha = rank.
        alpha = find_alpha(config, layer)
        if layer in alphas:
            alpha = alphas.pop(layer)
        if alpha is not None:
            matrices[up] *= alpha / len(weight)
        num_layers += 1

    # What is left over: `up` without `down`, and alphas without a layer. Those with a layer were removed above.
    num_others = len(matrices) - 2 * num_layers + len(alphas)
    if num_others > 0 or num_layers == 0:
        raise ValueError(f"it has {num_layers} layers of two weights, and {num_others} other weights")
    return matrices


def read_lora(file, unet_config):
    """The layers of a LoRA, {name in the pipeline: (down, up)} in float32; W becomes W + up @ down."""
    config = read_lora_config(file)
    for name, value in config.items():
        if name.endswith((".use_dora", ".use_rslora")) and value:
            raise ValueError(f"{name.partition('.')[2]} is not supported")
    weights = apply_alphas(load_file(file), config)

    # Rename all layers as peft does. diffusers knows the other formats, but drops weights if a file mixes two.
    num_weights = len(weights)
    renamed, *_ = StableDiffusionXLPipeline.lora_state_dict(weights, unet_config=unet_config)
    if len(renamed) < num_weights:
        raise ValueError(f"{num_weights - len(renamed)} of its weights use a different naming format from the rest")
    unet = {}
    text = {}
    for name, weight in renamed.items():
        if name.startswith("text_encoder"):
            text[name] = weight
        else:
            unet[name] = weight
    peft_weights = {
        **convert_unet_state_dict_to_peft(unet),
        **convert_state_dict_to_peft(text, StateDictType.DIFFUSERS_OLD),
    }

    layers = {}
    for name, down in peft_weights.items():
        if name.endswith(".lora_A.weight"):
            # LoRA files have `text_model.` in the names of text encoder layers, which transformers 5 dropped.
            layer = name.removesuffix(".lora_A.weight").replace(".text_model.", ".")
            layers[layer] = (down, peft_weights[name.replace(".lora_A.", ".lora_B.")])
    return layers


def add_lora(pipeline, layers):
    """
    Add the layers of a LoRA, {name: (down, up)}, to a pipeline, which must have all of them.

    They are not merged: half precision would round away most of a small weight change.
    """
    modules = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        for name, module in getattr(pipeline, part).named_modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                modules[f"{part}.{name.removeprefix('text_model.')}"] = module

    # Check all layers first.
    unknown = sorted(layers.keys() - modules.keys())
    if unknown:
        raise ValueError(f"{len(unknown)} of its {len(layers)} layers are not in the model, e.g. {unknown[0]}")
    for name, (down, up) in layers.items():
        weight = modules[name].weight
        if down.shape[1:] != weight.shape[1:] or up.shape[:2] != (len(weight), len(down)):
            raise ValueError(
                f"{name} of {tuple(weight.shape)} does not fit LoRA weights of {tuple(up.shape)} and "
                f"{tuple(down.shape)}"
            )

    for name, (down, up) in layers.items():
        add_branch(modules[name], down, up)


def add_branch(layer, down, up):
    """Let a linear or convolutional layer add up(down(x)) to its output."""
    rank = len(down)
    if isinstance(layer, torch.nn.Conv2d):
        layer.lora_down = torch.nn.Conv2d(
            layer.in_channels,
            rank,
            layer.kernel_size,
            stride=layer.stride,
            padding=layer.padding,
            bias=False,
        )
        layer.lora_up = torch.nn.Conv2d(rank, layer.out_channels, 1, bias=False)
    else:
        layer.lora_down = torch.nn.Linear(layer.in_features, rank, bias=False)
        layer.lora_up = torch.nn.Linear(rank, layer.out_features, bias=False)
    layer.lora_down.load_state_dict({"weight": down})
    layer.lora_up.load_state_dict({"weight": up})
    layer.to(layer.weight.dtype)
    layer.register_forward_hook(lambda module, inputs, output: output + module.lora_up(module.lora_down(inputs[0])))


# Images --------------------------------------------------------------------------------------------------------------
def load_shared(args, accelerator):
    base = args.pretrained_model_name_or_path
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    if dtype == torch.float32 and accelerator.device.type != "cpu":
        logger.warning("Images are generated in float32; --mixed_precision bf16 is faster and needs half the memory.")

    vae = None
    if args.pretrained_vae_model_name_or_path is not None:
        source = args.pretrained_vae_model_name_or_path
        with explain(f"--pretrained_vae_model_name_or_path {source} cannot be loaded"):
            vae = load_complete(AutoencoderKL, source, dtype=dtype)

    with explain(f"--pretrained_model_name_or_path {base} cannot be loaded"):
        config = EulerDiscreteScheduler.load_config(base, subfolder="scheduler")
        if args.scheduler is not None and "beta_start" not in config:
            raise EvaluationError(
                f"--scheduler {args.scheduler} cannot be used with {base}: its scheduler has no beta schedule."
            )
        scheduler_class = getattr(diffusers, args.scheduler or config["_class_name"])
        scheduler = scheduler_class.from_config(config)
    try_scheduler(scheduler, args.num_inference_steps)
    return Shared(dtype, scheduler, vae)


def try_scheduler(scheduler, num_steps):
    """Run the scheduler once on noise: it may lack a package, or not support its config or the number of steps."""
    scheduler = copy.deepcopy(scheduler)
    with explain(f"--num_inference_steps {num_steps} with {type(scheduler).__name__} does not work"):
        scheduler.set_timesteps(num_steps)
        latents = torch.randn(1, 4, 8, 8) * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            prediction = torch.zeros_like(scheduler.scale_model_input(latents, timestep))
            latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
        if not latents.isfinite().all():
            raise ValueError("it produces NaN")


def describe_models(system):
    """The kind, source and version of a system's models, by category unless one model generates all images."""
    if not system.models:
        return {"kind": "images", "source": str(system.folder)}
    described = {}
    for category, model in system.models.items():
        described[category] = {"kind": model.kind, "source": model.source, "version": model.version}
    if None in described:
        return described[None]
    return described


def collect_settings(args, systems, prompts, scorer_versions, shared, vae_version):
    """The flags, and everything else that the results depend on."""
    settings = {
        **vars(args),
        "num_prompts": len(prompts),
        "num_distinct_prompts": len({prompt.text for prompt in prompts}),
        "models": {system.name: describe_models(system) for system in systems},
        "scorer_versions": scorer_versions,
        "versions": {library.__name__: library.__version__ for library in (torch, diffusers, transformers)},
    }
    if shared is not None:
        settings["vae"] = vae_version
        settings["dtype"] = str(shared.dtype)
        settings["scheduler"] = type(shared.scheduler).__name__
        settings["scheduler_config"] = json.loads(shared.scheduler.to_json_string())
        del settings["scheduler_config"]["_diffusers_version"]
    return settings


def describe_images(settings, base, system, prompts):
    """
    Everything that the images of a system depend on, for its settings.json.

    The batch size and the number of processes only affect rounding. So should versions of libraries; a change is
    reported. Error messages contain the keys.
    """
    names = [
        "vae",
        "variant",
        "seed",
        "num_inference_steps",
        "guidance_scale",
        "resolution",
        "dtype",
        "scheduler",
        "scheduler_config",
    ]
    models = {}
    texts = {}
    for i, prompt in enumerate(prompts):
        models[f"model for prompt {i}"] = system.model_of(prompt).version
        texts[f"prompt {i}"] = prompt.text
    return {
        "settings": {"base model": base.models[None].version, **{name: settings[name] for name in names}},
        "models": models,
        "prompts": texts,
        "libraries": settings["versions"],
    }


def check_images(system, description):
    """
    Refuse to mix images of different settings.

    Returns the description, merged with that of existing images, which keeps the versions of their libraries.
    """
    path = system.folder / "settings.json"
    if not any(system.folder.glob("[!.]*.png")):
        return description
    before = {}
    if path.exists():
        with explain(f"{path} cannot be loaded"):
            before = json.loads(path.read_text(encoding="utf-8"))
    if before.keys() != description.keys():
        raise EvaluationError(
            f"{system.folder} contains images, but its settings.json is missing or was written by another version of "
            "this script. Delete the folder or change --output_dir."
        )

    for part in ("settings", "models", "prompts"):
        for name, value in description[part].items():
            previous = before[part].get(name, value)  # added prompts and settings have no previous value
            if previous != value:
                raise EvaluationError(
                    f"{system.folder} was generated with another {name} ({previous}, now {value}). Delete the folder "
                    "or change --output_dir."
                )
    merged = {part: {**description[part], **before[part]} for part in description}
    if before["libraries"] != description["libraries"]:
        logger.warning(
            f"Images in {system.folder} were generated with {before['libraries']}, now {description['libraries']}."
        )
    return merged


def image_seed(seed, prompt_number, image_number):
    """The seed of an image's noise. It depends only on --seed and the image's id."""
    return int(np.random.SeedSequence([seed, prompt_number, image_number]).generate_state(1, np.uint64)[0])


def generate_images(args, pipeline, prompts, image_ids):
    """Generate the images with these ids. Each has its own seed, whichever process runs it."""
    generators = [torch.Generator().manual_seed(image_seed(args.seed, *image_id)) for image_id in image_ids]
    pixels = pipeline(
        [prompts[prompt_number].text for prompt_number, _ in image_ids],
        height=args.resolution,
        width=args.resolution,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        generator=generators,
        output_type="pt",
    ).images

    # Pillow would turn NaN into black.
    if not pixels.isfinite().all():
        raise ValueError(
            f"the model produced NaN in {pipeline.unet.dtype}; try --mixed_precision bf16 or another "
            "--pretrained_vae_model_name_or_path"
        )
    return pipeline.image_processor.numpy_to_pil(pipeline.image_processor.pt_to_numpy(pixels))


def generate_batches(args, accelerator, system, model, prompts, batches, shared):
    """Generate these batches of image ids, and write the images that do not exist yet."""
    pipeline = load_pipeline(args, model, shared).to(accelerator.device)
    pipeline.vae.enable_slicing()
    pipeline.set_progress_bar_config(disable=True)
    if args.compile:
        # Drop the blocks compiled for the previous model; they would skip the hooks that apply this model's LoRA.
        torch._dynamo.reset()
        # Blocks are compiled for each shape; beyond this limit they would run eagerly.
        torch._dynamo.config.recompile_limit = 64
        pipeline.unet.compile_repeated_blocks(dynamic=False)

    for batch in tqdm(batches, desc=f"Generating {system.name}", disable=not accelerator.is_local_main_process):
        images = generate_images(args, pipeline, prompts, batch)
        for image_id, image in zip(batch, images, strict=True):
            path = system.image_path(prompts, image_id)
            if not path.exists():
                # Level 1 takes a quarter of the default's time.
                write_atomically(path, functools.partial(image.save, format="PNG", compress_level=1))


class Job(NamedTuple):
    """Batches of image ids that one model generates, and the description of its system's images."""

    system: System
    model: Model
    description: dict
    batches: list


def find_jobs(args, systems, prompts, image_ids, settings):
    """
    The batches that lack an image, for each model.

    They are cut as in an uninterrupted run, because rounding depends on the rest of the batch.
    """
    jobs = []
    for system in systems:
        description = check_images(system, describe_images(settings, systems[0], system, prompts))
        for category, model in system.models.items():
            ids_of_model = []
            for prompt_number, image_number in image_ids:
                if category is None or prompts[prompt_number].category == category:
                    ids_of_model.append((prompt_number, image_number))
            batches = []
            for batch in in_batches(ids_of_model, args.batch_size):
                if not all(system.image_path(prompts, image_id).exists() for image_id in batch):
                    batches.append(batch)
            if batches:
                jobs.append(Job(system, model, description, batches))
    return jobs


def generate_missing(args, accelerator, systems, prompts, image_ids, settings, shared):
    """Generate the images that do not exist yet. `systems` begin with the base model."""
    jobs = from_main_process(find_jobs, args, systems, prompts, image_ids, settings)

    # Load every model once, so that the second one does not fail after hours of generating with the first.
    with raise_on_all_ranks("The models cannot be loaded"):
        if accelerator.is_main_process and len(jobs) > 1:
            for job in jobs:
                load_pipeline(args, job.model, shared)

    for job in jobs:
        with raise_on_all_ranks(f"{job.model.label}: the settings cannot be written"):
            if accelerator.is_main_process:
                write_text(job.system.folder / "settings.json", json.dumps(job.description, indent=2))
        with raise_on_all_ranks(f"{job.model.label}: image generation failed"):
            batches = job.batches[accelerator.process_index :: accelerator.num_processes]
            if batches:
                generate_batches(args, accelerator, job.system, job.model, prompts, batches, shared)
        accelerator.free_memory()


# Scores --------------------------------------------------------------------------------------------------------------
def list_records(systems, prompts, image_ids):
    """A record for each image, in order. Refuses a system whose images are all equal to those of the first one."""
    records = []
    hashes_of_base = []
    for system in systems:
        hashes = []
        for prompt_number, image_number in image_ids:
            prompt = prompts[prompt_number]
            file = system.image_path(prompts, (prompt_number, image_number))
            record = {
                "model": system.name,
                "prompt_index": prompt_number,
                "image": image_number,
                "prompt": prompt.text,
            }
            if prompt.scored != prompt.text:
                record["scored_prompt"] = prompt.scored
            if prompt.category is not None:
                record["category"] = prompt.category
            record["file"] = str(file)
            record["sha256"] = file_digest(file)
            records.append(record)
            hashes.append(record["sha256"])

        if system is systems[0]:
            hashes_of_base = hashes
        elif hashes == hashes_of_base:
            raise EvaluationError(
                f"{system.label}: all {len(hashes)} images are identical to those of {systems[0].name}, so there is "
                "nothing to compare."
            )
    return records


def scored_text(record):
    return record.get("scored_prompt", record["prompt"])


def reference_folder(args, category):
    """The folder with the images of a prompt's subject."""
    if CATEGORY not in args.reference_images:
        return args.reference_images
    return args.reference_images.replace(CATEGORY, category)


# Files in a scorer's folder that its scores depend on, besides weights.
CONFIG_SUFFIXES = (".json", ".txt", ".model")


def find_source(args, name, part):
    """The version of one source of a scorer; an error if it lacks a file."""
    flag = source_flags(name)[part]
    source = getattr(args, flag)
    names = SCORERS[name].required_files.get(part, ("config.json",))
    if part == "weights":
        source, file_name = os.path.split(source)
        names = (file_name,)
    for file_name in names:
        file = find_file(source, file_name)
        if file is not None:
            used = []
            if part != "weights":
                used = [path for path in Path(source).glob("*") if path.suffix in CONFIG_SUFFIXES]
            if "model.safetensors" in names:
                used += Path(source).glob("*.safetensors")
            return version_of(source, file, used)
    raise EvaluationError(f"--{flag} {getattr(args, flag)}: there is no {names[0]} in this folder or hub repository.")


def find_references(folder):
    """A digest of the reference images in a folder."""
    paths = find_given_images("reference_images", folder)
    return digest([file_digest(path) for path in paths])


def find_scorers(args, prompts):
    """{scorer: {source: version}}. Fails if a source is missing, before any image is generated."""
    versions = {}
    for name in args.scorers:
        versions[name] = {part: find_source(args, name, part) for part in SCORERS[name].sources}
    if "dinov2" in args.scorers:
        references = {}
        for prompt in prompts:
            folder = reference_folder(args, prompt.category)
            if folder not in references:
                references[folder] = find_references(folder)
        versions["dinov2"]["reference_images"] = references
    return versions


def build_scorer(args, name, device, reference_images=None):
    """A scorer with the sources that the flags name. Only dinov2 has a folder of reference images."""
    flags = source_flags(name)
    sources = {part: getattr(args, flag) for part, flag in flags.items()}
    shown = " ".join(f"--{flag} {getattr(args, flag)}" for flag in flags.values())
    with explain(f"{shown} cannot be loaded"):
        if reference_images is not None:
            return SCORERS[name](device, reference_images, **sources)
        return SCORERS[name](device, **sources)


def read_ahead(batches):
    """Yield the images of each batch of paths, while a thread decodes the next batch."""

    def read(paths):
        return [read_image(path) for path in paths]

    with ThreadPoolExecutor(1) as pool:
        pending = None
        for paths in batches:
            submitted = pool.submit(read, paths)
            if pending is not None:
                yield pending.result()
            pending = submitted
        if pending is not None:
            yield pending.result()


def score_records(args, accelerator, name, reference_images, records):
    """{key: score} of {key: record}, rounded to six decimals. All processes take their share of the images."""
    batches = in_batches(list(records), args.batch_size)[accelerator.process_index :: accelerator.num_processes]
    scores = []
    with raise_on_all_ranks(f"--scorers {name} failed"):
        # With several CPU processes, the device is "cpu:0". Moving weights there copies them, and scores would differ
        # in the last bits.
        device = accelerator.device
        if device.type == "cpu":
            device = "cpu"
        scorer = build_scorer(args, name, device, reference_images)

        if scorer.reads_text:
            texts = {scored_text(record) for record in records.values()}
            too_long = sum(len(scorer.tokenizer(text).input_ids) > scorer.max_tokens() for text in texts)
            if too_long > 0:
                logger.warning(f"{name} truncates {too_long} prompts to {scorer.max_tokens()} tokens.")

        progress = tqdm(batches, desc=f"Scoring {name}", disable=not accelerator.is_local_main_process)
        paths = []
        for batch in batches:
            paths.append([records[key]["file"] for key in batch])
        for batch, images in zip(progress, read_ahead(paths), strict=True):
            values = scorer.score(images, [scored_text(records[key]) for key in batch]).tolist()
            scores += zip(batch, values, strict=True)
        del scorer

    scores = dict(gather_object(scores))
    accelerator.free_memory()
    for key, record in records.items():
        if not math.isfinite(scores[key]):
            raise EvaluationError(f"{name} scored {record['file']} as {scores[key]}.")
    return {key: round(scores[key], 6) for key in records}


def read_scores(path, versions):
    """{key: score} of an earlier run, if its scorer had the same sources."""
    if not path.exists():
        return {}
    with explain(f"{path} cannot be read, delete it"):
        stored = json.loads(path.read_text(encoding="utf-8"))
        return stored["scores"] if stored["versions"] == versions else {}


def score_images(args, accelerator, records, versions):
    """Add each scorer's score to the records. Scores are cached by image and prompt."""
    for name in args.scorers:
        path = Path(args.output_dir) / "scores" / f"{name}.json"
        scores = from_main_process(read_scores, path, versions[name])

        # A scorer is built once for all images with the same references.
        keys = []
        missing = {}
        for record in records:
            reference_images = None
            if name == "dinov2":
                reference_images = reference_folder(args, record.get("category"))
            key = digest([record["sha256"], scored_text(record), reference_images])
            keys.append(key)
            if key not in scores:
                missing.setdefault(reference_images, {})[key] = record
        for reference_images, records_to_score in missing.items():
            scores.update(score_records(args, accelerator, name, reference_images, records_to_score))
            with raise_on_all_ranks("The scores cannot be written"):
                if accelerator.is_main_process:
                    write_text(path, json.dumps({"versions": versions[name], "scores": scores}, indent=0))
        for record, key in zip(records, keys, strict=True):
            record[name] = scores[key]


# Results -------------------------------------------------------------------------------------------------------------
def as_table(columns, rows):
    """A Markdown table of rows with these columns {key: format}; missing values stay empty."""
    lines = [list(columns), ["---"] * len(columns)]
    for row in rows:
        cells = []
        for key, spec in columns.items():
            value = row.get(key)
            cells.append("" if value is None else format(value, spec))
        lines.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def results_as_markdown(args, summary, settings):
    """The text of results.md: models x scorers, as papers print them; then comparisons, categories and settings."""
    models = {}
    for row in summary["results"]:
        models.setdefault(row["model"], {"model": row["model"]})[row["scorer"]] = row["mean"]
    means = dict.fromkeys(args.scorers, ".3f")
    comparison = {
        "wins": "",
        "ties": "",
        "losses": "",
        "win_rate": ".1%",
        "win_rate_low": ".1%",
        "win_rate_high": ".1%",
    }
    details = {
        "scorer": "",
        "model": "",
        "mean": ".3f",
        "standard_error": ".3f",
        "difference": "+.3f",
        "difference_error": ".3f",
        **comparison,
    }

    text = as_table({"model": "", **means}, models.values())
    for scorer in args.scorers:
        sources = [getattr(args, flag) for flag in source_flags(scorer).values()]
        text += f"\n- {scorer}: {', '.join(sources)}"
    text += "\n\n" + as_table(details, summary["results"])
    if summary["pairs"]:
        text += "\n" + as_table({"scorer": "", "model": "", "against": "", **comparison}, summary["pairs"])
    if summary["categories"]:
        text += "\n" + as_table({"category": "", "model": "", **means}, summary["categories"])
    return f"{text}\n```json\n{json.dumps(settings, indent=2)}\n```\n"


def draw_tile(record, scorer):
    """An image under its prompt and score."""
    tile = Image.new("RGB", (384, 424), "white")
    tile.paste(read_image(record["file"]).resize((384, 384)), (0, 40))
    prompt = " ".join(record["prompt"].split())
    text = f"{prompt[:50]}\n{record['model']}: {scorer} {record[scorer]:.3f}"
    ImageDraw.Draw(tile).text((4, 0), text, fill="black", font_size=14)
    return tile


def draw_grid(scorer, pairs):
    """A row for each (base record, candidate record): the four largest wins, then the four largest losses."""
    ordered = sorted(pairs, key=lambda pair: pair[0][scorer] - pair[1][scorer])
    if len(ordered) > 8:
        ordered = ordered[:4] + ordered[-4:]
    tiles = []
    for base, candidate in ordered:
        tiles += [draw_tile(base, scorer), draw_tile(candidate, scorer)]
    return make_image_grid(tiles, len(ordered), 2)


def write_results(args, systems, prompts, records, settings):
    """Write scores.jsonl, results.json, results.md and a grid per candidate."""
    output_dir = Path(args.output_dir)
    write_text(output_dir / "scores.jsonl", "".join(json.dumps(record) + "\n" for record in records))

    tables = {}
    for scorer in args.scorers:
        scores = [record[scorer] for record in records]
        tables[scorer] = np.reshape(scores, (len(systems), len(prompts), args.images_per_prompt))
    names = [system.name for system in systems]
    categories = [prompt.category for prompt in prompts]
    summary = summarize(args.scorers, names, tables, categories)
    write_text(output_dir / "results.json", json.dumps({**summary, "settings": settings}, indent=2) + "\n")
    write_text(output_dir / "results.md", results_as_markdown(args, summary, settings))

    records_of = {name: [] for name in names}
    for record in records:
        records_of[record["model"]].append(record)
    for name in names[1:]:
        grid = draw_grid(args.scorers[0], zip(records_of[names[0]], records_of[name], strict=True))
        write_atomically(output_dir / f"grid-{name}.png", functools.partial(grid.save, format="PNG"))
    logger.info(f"Wrote {output_dir / 'results.md'}")


# Main ----------------------------------------------------------------------------------------------------------------
def build_accelerator(args):
    with explain(f"accelerate cannot start (--mixed_precision {args.mixed_precision})"):
        # Processes wait for the slowest, which may generate images for hours.
        process_group_kwargs = InitProcessGroupKwargs(timeout=timedelta(hours=6))
        accelerator = Accelerator(mixed_precision=args.mixed_precision, kwargs_handlers=[process_group_kwargs])
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s")
    logging.getLogger(__name__).setLevel(logging.INFO)
    for library in (datasets, transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    return accelerator


def check_inputs(args, systems, prompts, image_ids):
    """Check existing images and the output folder before hours of generating."""
    for system in systems:
        if system.models:
            continue
        paths = [system.image_path(prompts, image_id) for image_id in image_ids]
        missing = [path for path in paths if not path.exists()]
        if missing:
            raise EvaluationError(f"{system.label} lacks {len(missing)} of {len(paths)} images, e.g. {missing[0]}")
    with explain(f"--output_dir {args.output_dir} cannot be written"):
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.output_dir).close()


def main(args):
    accelerator = build_accelerator(args)

    # Find the prompts, the models and the scorers.
    prompts = from_main_process(read_prompts, args)
    image_ids = list(itertools.product(range(len(prompts)), range(args.images_per_prompt)))
    systems = from_main_process(find_systems, args, prompts)
    from_main_process(check_inputs, args, systems, prompts, image_ids)
    scorer_versions = from_main_process(find_scorers, args, prompts)

    # Load what all pipelines share.
    generated = [system for system in systems if system.models]
    shared = None
    vae_version = None  # each pipeline uses its own VAE
    if generated:
        if args.pretrained_vae_model_name_or_path is not None:
            vae_version = from_main_process(find_vae, args.pretrained_vae_model_name_or_path)
        shared = load_shared(args, accelerator)
        base = args.pretrained_model_name_or_path
        with explain(f"--pretrained_model_name_or_path {base} cannot be loaded"):
            tokenizer = load_tokenizers(base)["tokenizer"]
        warn_about_long_prompts([prompt.text for prompt in prompts], tokenizer)

    # Generate, score and compare.
    settings = collect_settings(args, systems, prompts, scorer_versions, shared, vae_version)
    generate_missing(args, accelerator, generated, prompts, image_ids, settings, shared)
    records = from_main_process(list_records, systems, prompts, image_ids)
    score_images(args, accelerator, records, scorer_versions)
    with raise_on_all_ranks("The results cannot be written"):
        if accelerator.is_main_process:
            write_results(args, systems, prompts, records, settings)
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main(parse_args())
    except EvaluationError as error:
        sys.exit(f"error: {error}")
