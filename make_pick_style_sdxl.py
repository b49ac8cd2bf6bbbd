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
Make preference pairs with Stable Diffusion XL itself, in the layout of Pick-Style (arXiv 2406.06424).

As in the Pick-Style datasets on the hub, SDXL generates chosen images with a style prefix before the caption, and
rejected images without it:

    accelerate launch make_pick_style_sdxl.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
        --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix --prompts captions.txt \
        --style_prefix "A flat cartoon with thick outlines of" --mixed_precision bf16 --output_dir pairs

Version 2 of the paper used other data: FLUX.1-schnell generated the images, with a prefix on one side or both
(`--rejected_prefix`), and a vision-language model kept the pairs that it scored above 5 out of 10. Here, `--scorer
pickscore --min_score 21` keeps the pairs whose chosen image reaches a score.

Instead of prefixes, `--num_candidates 8 --scorer pickscore` pairs the best and the worst of eight samples, and
`--chosen_images photos` pairs photos of a subject with samples. `--lora` or `--unet` generates with a fine-tuned
model, for another round of training. Run the same command again to resume, on any number of processes.

Pairing existing files needs no model: `--chosen_images A --rejected_images B` pairs the files of the same name.
"""

# Sections:
#
#   Pairs      how pairs are made: with prefixes, from candidates, from photos or from files
#   Errors     exceptions that one sentence explains
#   Arguments  the command line
#   Files      finding, reading and writing them
#   Captions   from files, folders and hub datasets
#   Models     loading an SDXL pipeline
#   LoRA       reading LoRAs in the formats of diffusers, peft and kohya, and applying them exactly
#   Making     the missing pairs
#   Dataset    shards, the card and the upload
#   Main       puts everything together

import argparse
import contextlib
import copy
import functools
import glob
import importlib.util
import io
import json
import logging
import math
import os
import re
import sys
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import datasets
import diffusers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.logging import get_logger
from accelerate.state import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets.fingerprint import Hasher
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils.state_dict_utils import (
    StateDictType,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from huggingface_hub import (
    DatasetCardData,
    ModelCard,
    create_repo,
    hf_hub_download,
    is_offline_mode,
    upload_folder,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from safetensors import safe_open
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


logger = get_logger(__name__)


# Pairs ---------------------------------------------------------------------------------------------------------------
class Pair(NamedTuple):
    """Two images as PNG, and their labels."""

    chosen: bytes
    rejected: bytes
    chosen_label: float = 1
    rejected_label: float = 0


class PairOfFiles(NamedTuple):
    """Two existing image files, and their caption."""

    caption: str
    chosen: Path
    rejected: Path


class Inputs(NamedTuple):
    """What pairs are made of: captions, and photos (--chosen_images) or files (with --rejected_images) if given."""

    captions: list
    photos: list
    files: list


def order_and_seeds(seed, number, num_images):
    """Random numbers of a pair: whether its chosen image comes first, and the seeds of its images' noise."""
    coin, *seeds = np.random.SeedSequence([seed, number]).generate_state(1 + num_images, np.uint64).tolist()
    return coin % 2 == 1, seeds


@torch.no_grad()
def generate_images(args, pipeline, prompts, seeds):
    """Generate one image per prompt, each from its own noise."""
    vae = pipeline.vae
    latents = pipeline(
        prompts,
        height=args.resolution,
        width=args.resolution,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
    ).images

    # Decode outside of the pipeline, because the VAE may need another precision than the UNet.
    pixels = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
    if not pixels.isfinite().all():
        raise PairsError(
            f"The model produced NaN in {latents.dtype}; try --mixed_precision bf16 or another "
            "--pretrained_vae_model_name_or_path."
        )
    return pipeline.image_processor.postprocess(pixels.float())


def encode_png(image):
    """Encode an image as PNG. A higher level saves a few percent and takes as long as several denoising steps."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def add_prefix(prefix, captions):
    """Captions as prompts for generation."""
    if prefix is None:
        return captions
    return [f"{prefix} {caption}" for caption in captions]


def score_images(scorer, images, captions):
    """Scores of images. Scorers see the caption without a prefix."""
    scores = scorer.score(images, captions).tolist()
    for score, caption in zip(scores, captions, strict=True):
        if not math.isfinite(score):
            raise PairsError(f"--scorer scored an image of {caption!r} as {score}.")
    return scores


def pairs_of_samples(args, pipeline, scorer, captions, seeds, photos):
    """
    Chosen: photos, or samples with --style_prefix if given. Rejected: samples with --rejected_prefix if given.

    A pair is None if its chosen image does not reach --min_score.
    """
    chosen = photos
    if not photos:
        chosen_seeds = [seeds_of_pair[0] for seeds_of_pair in seeds]
        chosen = generate_images(args, pipeline, add_prefix(args.style_prefix, captions), chosen_seeds)

    # By default, both images come from the same noise.
    index = 1 if args.different_seeds else 0
    rejected_seeds = [seeds_of_pair[index] for seeds_of_pair in seeds]
    rejected = generate_images(args, pipeline, add_prefix(args.rejected_prefix, captions), rejected_seeds)

    pairs = []
    scores = score_images(scorer, chosen, captions) if scorer is not None else []
    for i in range(len(captions)):
        if scorer is not None and scores[i] < args.min_score:
            pairs.append(None)
        else:
            pairs.append(Pair(encode_png(chosen[i]), encode_png(rejected[i])))
    return pairs


def pairs_of_candidates(args, pipeline, scorer, captions, seeds):
    """
    Pair the best and the worst of --num_candidates samples per caption, with their scores as labels.

    A pair is None if its best sample does not reach --min_score.
    """
    candidates = []
    scores = []
    for number in range(args.num_candidates):
        images = generate_images(args, pipeline, captions, [seeds_of_pair[number] for seeds_of_pair in seeds])
        candidates.append(images)
        scores.append(score_images(scorer, images, captions))
    scores = np.array(scores)

    pairs = []
    for i in range(len(captions)):
        best = scores[:, i].argmax()
        worst = scores[:, i].argmin()
        if args.min_score is not None and scores[best, i] < args.min_score:
            pairs.append(None)
            continue
        pairs.append(
            Pair(
                chosen=encode_png(candidates[best][i]),
                rejected=encode_png(candidates[worst][i]),
                chosen_label=float(scores[best, i]),
                rejected_label=float(scores[worst, i]),
            )
        )
    return pairs


def read_pair(files):
    """The Pair of two image files; None if one of them is broken."""
    images = []
    for flag, path in (("chosen_images", files.chosen), ("rejected_images", files.rejected)):
        try:
            # Encoded again, because metadata may reveal where a photo was taken.
            images.append(encode_png(decode_image(path)))
        except Exception as error:  # Pillow raises all kinds
            logger.warning(
                f"--{flag}: {path} cannot be read ({describe(error)}); its pair is left out.",
                main_process_only=False,
            )
            return None
    return Pair(*images)


def make_block(args, pipeline, scorer, inputs, block):
    """
    Make the pairs of a block, a range of pair numbers whose images are generated as one batch.

    Yields a table for each pair: one row, or an empty table if the pair is dropped. A pair's noise depends only on its
    number and --seed. Blocks are always the same, because an image's last bits depend on the others in its batch.
    """
    captions = [inputs.captions[number] for number in block]
    num_samples = args.num_candidates or 2
    chosen_first = []
    seeds = []
    for number in block:
        is_first, seeds_of_pair = order_and_seeds(args.seed, number, num_samples)
        chosen_first.append(is_first)
        seeds.append(seeds_of_pair)

    label_type = pa.int64()
    if inputs.files:
        pairs = [read_pair(inputs.files[number]) for number in block]
    elif args.num_candidates is not None:
        label_type = pa.float64()
        pairs = pairs_of_candidates(args, pipeline, scorer, captions, seeds)
    else:
        photos = []
        if inputs.photos:
            photos = [inputs.photos[number % len(inputs.photos)] for number in block]
        pairs = pairs_of_samples(args, pipeline, scorer, captions, seeds, photos)

    schema = pa.schema(
        {
            "caption": pa.string(),
            "jpg_0": pa.binary(),
            "jpg_1": pa.binary(),
            "label_0": label_type,
            "label_1": label_type,
        }
    )
    for caption, pair, is_first in zip(captions, pairs, chosen_first, strict=True):
        if pair is None:
            yield schema.empty_table()
            continue
        images = [pair.chosen, pair.rejected]
        labels = [pair.chosen_label, pair.rejected_label]
        if not is_first:
            images.reverse()
            labels.reverse()
        row = {
            "caption": caption,
            "jpg_0": images[0],
            "jpg_1": images[1],
            "label_0": labels[0],
            "label_1": labels[1],
        }
        yield pa.Table.from_pylist([row], schema)


# Errors --------------------------------------------------------------------------------------------------------------
class PairsError(Exception):
    """An error that one sentence explains; printed without a traceback."""


def describe(error):
    """An error's type and text in one line. The type of a ValueError says nothing, and is left out."""
    text = " ".join(str(error).split())
    if type(error) is ValueError and text:
        return text
    return f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def explain(message):
    """Raise any error of the body as a PairsError that begins with `message`."""
    try:
        yield
    except PairsError:
        raise
    except Exception as error:
        raise PairsError(f"{message}: {describe(error)}") from error


@contextlib.contextmanager
def raise_on_all_ranks(message):
    """
    If the body fails on any process, raise the same PairsError on all of them, so that none hangs.

    The body must not contain another use of this: a process that fails before the inner one would enter the outer
    gather while the others enter the inner one.
    """
    failure = None
    try:
        with explain(message):
            yield
    except PairsError as error:
        failure = str(error)

    for sentence in gather_object([failure]):
        if sentence is not None:
            raise PairsError(sentence)


def from_main_process(function, *args):
    """Call `function` on the main process; return its result, or raise its error, on all processes."""
    result = None
    with raise_on_all_ranks("The main process failed"):
        if PartialState().is_main_process:
            result = function(*args)
    return broadcast_object_list([result])[0]


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


MODEL_FLAGS = ["pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "unet", "lora"]
GENERATION_FLAGS = [
    "variant",
    "num_inference_steps",
    "guidance_scale",
    "resolution",
    "mixed_precision",
    "compile",
]
LARGEST = sys.float_info.max
COUNT = bounded(int, 1, sys.maxsize, "a positive whole number")
CANDIDATES = bounded(int, 2, sys.maxsize, "a whole number of at least 2")
SEED = bounded(int, 0, 2**32 - 1, "a whole number from 0 to 4294967295")
NUMBER = bounded(float, -LARGEST, LARGEST, "a finite number")
NOT_NEGATIVE = bounded(float, 0, LARGEST, "zero or a positive number")
PATH = os.path.expanduser  # leaves hub ids as they are


def words(text):
    """Parse a prefix for argparse."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty")
    return text.strip()


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults other than None and False."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def add_pair_arguments(parser):
    add = parser.add_argument_group("captions and pairs").add_argument
    add(
        "--prompts",
        type=PATH,
        help="Captions: a .txt, .csv, .tsv, .json, .jsonl or .parquet file, a local folder or a hub id.",
    )
    add("--prompt_column", "--caption_column", default="prompt", help="Column with the captions of a table.")
    add("--prompt_split", default="train", help="Split of the hub dataset or local folder.")
    add("--max_prompts", type=COUNT, help="Use only this many captions, from the start.")
    add("--style_prefix", type=words, help="Words before the captions of the chosen images only.")
    add("--rejected_prefix", type=words, help="Words before the captions of the rejected images only.")
    add(
        "--different_seeds",
        action="store_true",
        help="Generate the two images of a pair from different noise. Only with a prefix.",
    )
    add("--num_candidates", type=CANDIDATES, help="Number of samples per caption. Pairs the best and the worst.")
    add(
        "--chosen_images",
        type=PATH,
        metavar="FOLDER",
        help="Photos to use as chosen images. Without --rejected_images, samples are rejected, and captions get the "
        "photos in the order of their names, each in turn; all photos are kept in memory.",
    )
    add(
        "--rejected_images",
        type=PATH,
        metavar="FOLDER",
        help="Pair the files of --chosen_images with those of the same name here. Captions come from .txt files "
        "beside the chosen images, or from --prompts, by its column `file_name`.",
    )
    add(
        "--scorer",
        choices=["pickscore", "hps", "imagereward", "aesthetic", "clip", "siglip"],
        help="Scorer for --num_candidates and --min_score. The evaluation script's flags for its files are accepted.",
    )
    add("--min_score", type=NUMBER, help="Drop pairs whose chosen image has a lower score.")


def add_generation_arguments(parser):
    add = parser.add_argument_group("generation").add_argument
    add("--pretrained_model_name_or_path", type=PATH, help="SDXL base model: hub id or local folder.")
    add(
        "--pretrained_vae_model_name_or_path",
        type=PATH,
        help="VAE to use instead of the base model's, e.g. madebyollin/sdxl-vae-fp16-fix.",
    )
    add("--variant", help="Variant of the base model's weights, e.g. fp16.")
    add(
        "--unet",
        type=PATH,
        help="Another UNet than the base model's: hub id or local folder, e.g. an output_dir of training. The base "
        "model's scheduler is used, so both must have the same prediction type.",
    )
    add("--lora", type=PATH, help="LoRA: hub id, local folder, e.g. an output_dir of training, or .safetensors file.")
    add("--num_inference_steps", type=COUNT, default=50, help="Denoising steps.")
    add("--guidance_scale", type=NOT_NEGATIVE, default=5.0, help="Guidance scale.")
    add("--resolution", type=COUNT, default=1024, help="Width and height of the images in pixels.")
    add("--seed", type=SEED, default=0, help="Seed of the noise, and of which image of a pair comes first.")
    add("--batch_size", type=COUNT, default=4, help="Images per process and forward pass.")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="Defaults to accelerate's setting.")
    add("--compile", action="store_true", help="Compile the UNet's transformer blocks to reduce CPU overhead.")


def add_output_arguments(parser):
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=PATH, default="pairs", help="Output folder.")
    add("--push_to_hub", action="store_true", help="Upload the pairs and their card at the end.")
    add("--hub_model_id", help="Dataset repository to upload to. Defaults to the name of output_dir.")
    add("--hub_private_repo", action="store_true", help="Create a private repository.")
    add("--hub_token", help="Token for the upload. Defaults to that of `hf auth login`.")


def parse_args(input_args=None):
    """Parse the command line (or `input_args`). An invalid one exits with one sentence that names the flag."""
    parser = argparse.ArgumentParser(
        description=__doc__.strip().splitlines()[0],
        usage="accelerate launch %(prog)s --pretrained_model_name_or_path MODEL --prompts FILE --style_prefix WORDS",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add_pair_arguments(parser)
    add_generation_arguments(parser)
    add_output_arguments(parser)
    args, unknown = parser.parse_known_args(input_args)
    if args.scorer is not None:
        if importlib.util.find_spec("evaluate_diffusion_mapo_sdxl") is None:
            parser.error("--scorer needs evaluate_diffusion_mapo_sdxl.py beside this script")
        from evaluate_diffusion_mapo_sdxl import add_source_arguments, check_package

        add_source_arguments(parser, [args.scorer])
        check_package(parser, "--scorer", args.scorer)
        args, unknown = parser.parse_known_args(input_args)
    if unknown:
        # Values are not shown: one may be a token.
        flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        if flags:
            parser.error(f"unknown argument: {flags[0]} (see --help for the list)")
        parser.error("a value does not belong to any flag; quote values that contain spaces")
    check_arguments(parser, args)
    return args


def check_arguments(parser, args):  # noqa: C901
    """Reject combinations of flags that cannot work."""
    base = args.pretrained_model_name_or_path
    has_prefix = args.style_prefix is not None or args.rejected_prefix is not None
    if args.output_dir == "":
        parser.error("--output_dir is empty")

    # One way of making pairs.
    if [has_prefix, args.num_candidates is not None, args.chosen_images is not None].count(True) != 1:
        parser.error("give one of --style_prefix (and/or --rejected_prefix), --num_candidates, --chosen_images")
    for flag in ("chosen_images", "rejected_images"):
        if getattr(args, flag) == "":
            parser.error(f"--{flag} is empty")
    if args.rejected_images is not None:
        if args.chosen_images is None:
            parser.error("--rejected_images requires --chosen_images")
        if os.path.realpath(args.rejected_images) == os.path.realpath(args.chosen_images):
            parser.error("--rejected_images and --chosen_images are the same")
        for flag in (*MODEL_FLAGS, *GENERATION_FLAGS):
            if getattr(args, flag) != parser.get_default(flag):
                parser.error(f"--rejected_images cannot be combined with --{flag}")
    else:
        if base is None:
            parser.error("--pretrained_model_name_or_path is required")
        if args.prompts is None:
            parser.error("--prompts is required")
    if args.different_seeds and not has_prefix:
        parser.error("--different_seeds requires --style_prefix or --rejected_prefix")
    if has_prefix and args.style_prefix == args.rejected_prefix and not args.different_seeds:
        parser.error("--style_prefix and --rejected_prefix are the same: add --different_seeds")

    # Scores.
    if args.num_candidates is not None and args.scorer is None:
        parser.error("--num_candidates requires --scorer")
    if args.min_score is not None and args.scorer is None:
        parser.error("--min_score requires --scorer")
    if args.scorer is not None and args.chosen_images is not None:
        parser.error("--scorer cannot be combined with --chosen_images")
    if args.scorer is not None and has_prefix and args.min_score is None:
        parser.error("--scorer requires --num_candidates or --min_score")

    # Generation.
    if base is not None and base.endswith(".safetensors"):
        parser.error(
            "--pretrained_model_name_or_path is a single file, convert it first: "
            f"python convert_sdxl.py single_file {base} FOLDER"
        )
    if args.resolution % 8 != 0:
        parser.error("--resolution must be a multiple of 8")


# Files ---------------------------------------------------------------------------------------------------------------
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
        raise PairsError(f"--{flag} {folder} is not a folder with images that Pillow can open.")
    others = [name for name in others if not name.endswith(".txt")]
    if others:
        logger.warning(
            f"--{flag} {folder}: left out {len(others)} files that Pillow cannot open: {', '.join(others[:10])}."
        )
    return paths


def read_photos(paths, resolution):
    """The images of --chosen_images, with a short side of at most `resolution`."""
    photos = []
    for path in paths:
        with explain(f"--chosen_images: {path} cannot be read"):
            image = decode_image(path)
        side = min(resolution, *image.size)
        photos.append(ImageOps.cover(image, (side, side), Image.Resampling.LANCZOS))
    return photos


def write_atomically(path, save):
    """Let `save` write a file that appears under its name only when it is complete."""
    with explain(f"--output_dir: {path} cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary_path = path.with_name(f".incomplete-{path.name}")
        save(temporary_path)
        os.replace(temporary_path, path)


def write_text(path, text):
    write_atomically(path, lambda temporary_path: temporary_path.write_text(text, encoding="utf-8"))


# Captions ------------------------------------------------------------------------------------------------------------
PROMPT_FILES = {".txt": "text", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
TABLES = (".csv", ".tsv", ".jsonl", ".parquet")  # files whose columns have names; a .json file may be a list


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


def read_captions(args):
    """The first --max_prompts captions. Rows without text are left out; with photos, they may only be at the end."""
    captions = []
    num_empty = 0
    with explain(f"--prompts {args.prompts} cannot be loaded"):
        for row in stream_prompts(args.prompts, args.prompt_split, {"--prompt_column": args.prompt_column}):
            text = row["--prompt_column"]
            if not isinstance(text, str) or not text.strip():
                num_empty += 1
                continue
            if num_empty > 0 and args.chosen_images is not None:
                raise ValueError(f"a row above {text.strip()!r} has no text, so this caption would get another photo")
            captions.append(text.strip())
            if len(captions) == args.max_prompts:
                break
    if not captions:
        raise PairsError(f"--prompts {args.prompts} contains no captions.")
    if num_empty > 0:
        logger.warning(f"--prompts {args.prompts}: {num_empty} rows without text are left out.")
    return captions


def captions_beside(images):
    """{name: caption} from the .txt files beside {name: image}."""
    captions = {}
    for name, path in images.items():
        file = path.with_suffix(".txt")
        if file.exists():
            with explain(f"--chosen_images: {file} cannot be read"):
                captions[name] = file.read_text(encoding="utf-8-sig")
    return captions


def captions_by_file_name(args):
    """{name: caption} from --prompts, by its column `file_name`."""
    captions = {}
    # No flag renames the column file_name, so errors name --prompts.
    columns = {"--prompt_column": args.prompt_column, "--prompts": "file_name"}
    with explain(f"--prompts {args.prompts} cannot be loaded"):
        for row in stream_prompts(args.prompts, args.prompt_split, columns):
            file_name = row["--prompts"]
            if not isinstance(file_name, str):
                raise ValueError(f"file_name {file_name!r} is not text")
            name = Path(file_name).stem
            if name in captions:
                raise ValueError(f"file_name: {name} occurs twice")
            captions[name] = row["--prompt_column"]
    return captions


def match_files(args):
    """The PairOfFiles of --chosen_images and --rejected_images. Files are matched by name, without extension."""
    images_of_flags = []
    for flag in ("chosen_images", "rejected_images"):
        folder = getattr(args, flag)
        paths = find_given_images(flag, folder)
        images = {path.stem: path for path in paths}
        if len(images) < len(paths):
            raise PairsError(f"--{flag} {folder}: some files have the same name with different extensions.")
        images_of_flags.append(images)
    chosen, rejected = images_of_flags
    captions = captions_by_file_name(args) if args.prompts else captions_beside(chosen)

    files = []
    incomplete = []
    for name in sorted({*chosen, *rejected}):
        caption = captions.get(name)
        if name in chosen and name in rejected and isinstance(caption, str) and caption.strip():
            files.append(PairOfFiles(caption.strip(), chosen[name], rejected[name]))
        else:
            incomplete.append(name)
    if incomplete:
        logger.warning(
            f"{len(incomplete)} names lack an image or a caption and are left out: {', '.join(incomplete[:10])}."
        )
    if not files:
        raise PairsError(
            f"--chosen_images {args.chosen_images} and --rejected_images {args.rejected_images} share no file "
            "name that has a caption."
        )
    return files[: args.max_prompts]


def warn_about_long_prompts(prompts, tokenizer):
    """Warn about prompts with more tokens than SDXL reads. Its two tokenizers split a prompt in the same way."""
    limit = tokenizer.model_max_length
    too_long = sum(len(tokens) > limit for tokens in tokenizer(prompts).input_ids)
    if too_long > 0:
        logger.warning(f"{too_long} of {len(prompts)} prompts have more than {limit} tokens; SDXL ignores the rest.")


# Models --------------------------------------------------------------------------------------------------------------
LORA_FILE = "pytorch_lora_weights.safetensors"
# The parts of an SDXL pipeline that have weights.
COMPONENTS = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}


def find_models(args):
    """The file that identifies each given model: {flag: path}."""
    names_of_flags = {
        "pretrained_model_name_or_path": ["unet/config.json"],
        "pretrained_vae_model_name_or_path": ["config.json"],
        "unet": ["unet/config.json", "config.json"],
    }
    model_files = {}
    for flag, names in names_of_flags.items():
        source = getattr(args, flag)
        if source is None:
            continue
        files = [find_file(source, name) for name in names]
        found = [file for file in files if file is not None]
        if not found:
            raise PairsError(
                f"--{flag} {source} is neither a folder nor a reachable hub id that contains {' or '.join(names)}."
            )
        model_files[flag] = found[0]

    if args.lora is not None:
        file = find_lora_file(args.lora)
        if file is None and args.lora.endswith(".safetensors"):
            raise PairsError(f"--lora {args.lora}: there is no such file.")
        if file is None:
            raise PairsError(
                f"--lora {args.lora} is neither a folder nor a reachable hub id that contains {LORA_FILE}."
            )
        model_files["lora"] = file
    return model_files


def check_models(args, model_files):
    """Refuse UNets that are not SDXL's by their configs, and warn about a LoRA that was trained on another UNet."""
    base = args.pretrained_model_name_or_path
    with explain(f"--pretrained_model_name_or_path {base} cannot be loaded"):
        base_config = json.loads(model_files["pretrained_model_name_or_path"].read_text())
    for flag in ("pretrained_model_name_or_path", "unet"):
        if flag not in model_files:
            continue
        name = f"--{flag} {getattr(args, flag)}"
        with explain(f"{name} cannot be loaded"):
            config = json.loads(model_files[flag].read_text())
        if config.get("addition_embed_type") != "text_time":
            raise PairsError(f"{name}: its UNet is not conditioned on image sizes and crops (addition_embed_type).")
        if config.get("in_channels", 4) != config.get("out_channels", 4):
            raise PairsError(f"{name} is not an SDXL model: its UNet has extra input channels.")
        for key in ("cross_attention_dim", "in_channels"):
            if config.get(key) != base_config.get(key):
                raise PairsError(
                    f"{name}: its {key} is {config.get(key)}, not {base_config.get(key)} as in the base model."
                )

    if args.lora is not None and args.unet is None:
        with explain(f"--lora {args.lora} cannot be loaded"):
            unet = read_lora_config(model_files["lora"]).get("unet.base_model_name_or_path")
        if unet not in (None, "", base, Path(base).absolute().name):  # training shortens local paths
            logger.warning(
                f"--lora {args.lora} names {unet} as its base model. If that is not {base}, name its UNet with --unet."
            )


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


def load_pipeline(args, device, dtype, model_files):
    """The pipeline on the device. A VAE that overflows in half precision stays in float32."""
    base = args.pretrained_model_name_or_path
    vae = args.pretrained_vae_model_name_or_path
    components = {}
    if vae is not None:
        with explain(f"--pretrained_vae_model_name_or_path {vae} cannot be loaded"):
            components["vae"] = load_complete(AutoencoderKL, vae)
    else:
        with explain(f"--pretrained_model_name_or_path {base} cannot be loaded"):
            components["vae"] = load_component("vae", base, args.variant, torch.float32)
    if args.unet is not None:
        subfolder = None
        if find_file(args.unet, "unet/config.json") is not None:
            subfolder = "unet"
        with explain(f"--unet {args.unet} cannot be loaded"):
            components["unet"] = load_complete(UNet2DConditionModel, args.unet, subfolder=subfolder, dtype=dtype)
    with explain(f"--pretrained_model_name_or_path {base} cannot be loaded"):
        pipeline = load_sdxl(base, args.variant, dtype, **components)
    try_scheduler(pipeline.scheduler, args.num_inference_steps)
    if args.lora is not None:
        with explain(f"--lora {args.lora} cannot be loaded"):
            add_lora(pipeline, read_lora(model_files["lora"], pipeline.unet.config))
    if pipeline.vae.config.latents_mean or pipeline.vae.config.shift_factor:
        flag = "pretrained_model_name_or_path" if vae is None else "pretrained_vae_model_name_or_path"
        raise PairsError(f"--{flag}: the VAE's config has latents_mean or shift_factor, which SDXL does not use.")

    if not pipeline.vae.config.force_upcast:
        pipeline.vae.to(dtype)
    pipeline.vae.enable_slicing()
    pipeline.to(device)
    if args.compile:
        # Blocks are compiled for each shape; beyond this limit they would run eagerly.
        torch._dynamo.config.recompile_limit = 64
        pipeline.unet.compile_repeated_blocks(dynamic=False)
    pipeline.set_progress_bar_config(disable=True)
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


# Making --------------------------------------------------------------------------------------------------------------
#
# Captions are processed in blocks of --batch_size, each by one process. A finished pair is a file in `.pairs_made`,
# beside the settings that it depends on, until all of them go into `data`.
MADE_BY = "made by `make_pick_style_sdxl.py`"  # in the card of a finished dataset


def fingerprint(flag, source, file):
    """A hash that changes with a model's weights: of the hub's commit, or of names, sizes and times of local files."""
    if not os.path.exists(source):
        return Hasher.hash(str(file.parts[-3:]))  # snapshots/COMMIT/NAME, or COMMIT/unet/NAME

    paths = file.parent.glob("*.safetensors")
    if flag == "lora":
        paths = [file]
    elif flag == "pretrained_model_name_or_path":
        paths = [path for path in file.parent.parent.glob("*/*") if path.is_file()]
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(paths)]
    return Hasher.hash(str(stats))


def without_local_path(source):
    return "a local path" if os.path.exists(source) else source


def describe_scorer(args):
    """{flag: source and version} of the scorer."""
    from evaluate_diffusion_mapo_sdxl import EvaluationError, find_source, source_flags

    described = {}
    for part, flag in source_flags(args.scorer).items():
        try:
            version = find_source(args, args.scorer, part)
        except EvaluationError as error:
            raise PairsError(str(error)) from error
        described[f"--{flag}"] = f"{without_local_path(getattr(args, flag))}, version {version}"
    return described


def collect_settings(args, dtype, inputs, model_files):
    """What the pairs depend on, by flag. Local paths are left out, because the settings are published."""
    settings = {}

    # Models.
    if args.scorer is not None:
        settings.update(describe_scorer(args))
    for flag, file in model_files.items():
        source = getattr(args, flag)
        settings[f"--{flag}"] = f"{without_local_path(source)}, version {fingerprint(flag, source, file)}"

    # Captions and images.
    captions = inputs.captions
    settings["--prompts"] = f"{len(captions)} captions, version {Hasher.hash(captions)}"
    if inputs.files:
        hashes = []
        for pair in inputs.files:
            for path in (pair.chosen, pair.rejected):
                with explain(f"{path} cannot be read"):
                    hashes.append(Hasher.hash(path.read_bytes()))
        settings["--chosen_images, --rejected_images"] = f"{len(inputs.files)} pairs, version {Hasher.hash(hashes)}"
    if inputs.photos:
        version = Hasher.hash(b"".join(photo.tobytes() for photo in inputs.photos))
        settings["--chosen_images"] = f"{len(inputs.photos)} photos, version {version}"

    # Flags and libraries.
    flags = ["seed"]
    if not inputs.files:
        settings["--mixed_precision"] = str(dtype)
        flags += [
            "style_prefix",
            "rejected_prefix",
            "different_seeds",
            "num_candidates",
            "scorer",
            "min_score",
            "num_inference_steps",
            "guidance_scale",
            "resolution",
            "batch_size",
            "variant",
        ]
    for flag in flags:
        value = getattr(args, flag)
        if value is not None:
            settings[f"--{flag}"] = value
    if not inputs.files:
        for library in (torch, diffusers, transformers):
            settings[library.__name__] = library.__version__
    return settings


def check_output_dir(output_dir, settings):
    """Refuse a folder with pairs of other settings, or with files of another program."""
    folder = Path(output_dir)
    card = folder / "README.md"
    file = settings_path(output_dir)
    existing = [*folder.glob(".pairs_made/[0-9]*.parquet"), *folder.glob("data/*"), *folder.glob(card.name)]
    if not existing:
        return

    if card.exists() and not is_finished(output_dir):
        raise PairsError(
            f"--output_dir {folder} contains {card.name}, which this script did not write. Choose another folder."
        )
    if not file.exists():
        raise PairsError(
            f"--output_dir {folder} contains {existing[0].name}, but no {file.relative_to(folder)}, so it was not "
            "made here. Choose another folder."
        )

    with explain(f"--output_dir: {file} cannot be read"):
        previous = json.loads(file.read_text(encoding="utf-8"))
    for name in sorted(settings.keys() | previous.keys()):
        # Libraries no longer matter once all pairs are made.
        if is_finished(output_dir) and name in (torch.__name__, diffusers.__name__, transformers.__name__):
            continue
        if settings.get(name) != previous.get(name):
            raise PairsError(
                f"--output_dir {folder} contains {existing[0].name}, made with {name} {previous.get(name)}, now "
                f"{settings.get(name)}. Choose another folder."
            )


def settings_path(output_dir):
    return Path(output_dir, ".pairs_made", "settings.json")


def pair_path(output_dir, number):
    return Path(output_dir, ".pairs_made", f"{number:06d}.parquet")


def is_finished(output_dir):
    """Whether there is a card of this script, which is written last."""
    card = Path(output_dir, "README.md")
    return card.exists() and MADE_BY in card.read_text(encoding="utf-8", errors="replace")


def find_missing(output_dir, num_pairs):
    """Numbers of the pairs that are still to be made."""
    if is_finished(output_dir):
        return set()
    return {number for number in range(num_pairs) if not pair_path(output_dir, number).exists()}


def load_scorer(args, device):
    from evaluate_diffusion_mapo_sdxl import EvaluationError, build_scorer

    try:
        # Not "cpu:0", which would change scores in the last bits: see `score_records` of the evaluation script.
        return build_scorer(args, args.scorer, "cpu" if device.type == "cpu" else device)
    except EvaluationError as error:
        raise PairsError(str(error)) from error


def make_missing(args, accelerator, dtype, inputs, model_files):
    """Make the missing pairs; each process takes its share of the blocks with missing pairs."""
    num_pairs = len(inputs.captions)
    missing = from_main_process(find_missing, args.output_dir, num_pairs)
    logger.info(f"{len(missing)} of {num_pairs} pairs are missing in {args.output_dir}.")
    blocks = []
    for start in range(0, num_pairs, args.batch_size):
        block = range(start, min(start + args.batch_size, num_pairs))
        if not missing.isdisjoint(block):
            blocks.append(block)
    blocks = blocks[accelerator.process_index :: accelerator.num_processes]
    if not blocks:
        return

    scorer = None
    if args.scorer is not None:
        scorer = load_scorer(args, accelerator.device)
    pipeline = None
    if not inputs.files:
        pipeline = load_pipeline(args, accelerator.device, dtype, model_files)

    num_own = sum(len(missing.intersection(block)) for block in blocks)
    progress = tqdm(desc="Pairs", total=num_own, unit="pair", disable=not accelerator.is_local_main_process)
    with progress, explain(f"A pair cannot be made; those in {args.output_dir} are kept"):
        for block in blocks:
            tables = make_block(args, pipeline, scorer, inputs, block)
            for number, table in zip(block, tables, strict=True):
                if number in missing:
                    path = pair_path(args.output_dir, number)
                    write_atomically(path, functools.partial(pq.write_table, table))
                    progress.update()


# Dataset -------------------------------------------------------------------------------------------------------------
# About 3 MB per row at 1024 px. A streamed dataset keeps several row groups in memory.
ROWS_PER_GROUP = 25
ROWS_PER_SHARD = 100


def list_kept(output_dir, num_pairs):
    """Numbers of the pairs that were not dropped."""
    kept = []
    for number in range(num_pairs):
        path = pair_path(output_dir, number)
        with explain(f"--output_dir: {path} cannot be read, delete it to make it again"):
            if pq.read_metadata(path).num_rows > 0:
                kept.append(number)
    if len(kept) < num_pairs:
        logger.info(f"{num_pairs - len(kept)} of {num_pairs} pairs were dropped.")
    return kept


def write_shards(output_dir, numbers):
    """Write the shards from the files of pairs. Returns the schema, the size in memory and the size of the files."""
    num_shards = math.ceil(len(numbers) / ROWS_PER_SHARD)
    num_bytes = 0
    download_size = 0
    for shard_number, numbers_of_shard in enumerate(np.array_split(numbers, num_shards)):
        tables = []
        for number in numbers_of_shard:
            path = pair_path(output_dir, number)
            with explain(f"--output_dir: {path} cannot be read, delete it to make it again"):
                tables.append(pq.ParquetFile(path).read())
        table = pa.concat_tables(tables)
        shard = Path(output_dir, "data", f"train-{shard_number:05d}-of-{num_shards:05d}.parquet")
        write_atomically(shard, functools.partial(pq.write_table, table, row_group_size=ROWS_PER_GROUP))
        num_bytes += table.nbytes
        download_size += shard.stat().st_size
    return table.schema, num_bytes, download_size


def license_of(args):
    """The fields of the base model's card that state its license. Images of other models may have another license."""
    base = args.pretrained_model_name_or_path
    fields = {"license": "other"}
    if base is None or args.unet is not None or args.lora is not None:
        return fields
    # There may be no card, or no network.
    with contextlib.suppress(Exception):
        card = ModelCard.load(Path(base, "README.md") if Path(base).is_dir() else base)
        for name, value in card.data.to_dict().items():
            if name.startswith("license"):
                fields[name] = value
    return fields


def assemble(args, num_pairs, settings):
    """Write the shards from the files of pairs, and then the card."""
    folder = Path(args.output_dir)
    kept = list_kept(args.output_dir, num_pairs)
    if not kept:
        # Delete the empty tables, so that another --min_score can start in this folder.
        for number in range(num_pairs):
            pair_path(args.output_dir, number).unlink()
        raise PairsError(
            f"--output_dir {folder}: every pair was dropped. No image can be read, or --min_score is too high: try a "
            "few captions (--max_prompts)."
        )
    schema, num_bytes, download_size = write_shards(args.output_dir, kept)

    features = []
    for name, feature in datasets.Features.from_arrow_schema(schema).items():
        features.append({"name": name, "dtype": feature.dtype})
    tags = ["mapo", "preference"]
    if args.rejected_images is None:
        tags += ["stable-diffusion-xl", "synthetic"]
    card = DatasetCardData(
        **license_of(args),
        task_categories=["text-to-image"],
        tags=tags,
        dataset_info={
            "features": features,
            "splits": [{"name": "train", "num_bytes": num_bytes, "num_examples": len(kept)}],
            "download_size": download_size,
            "dataset_size": num_bytes,
        },
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}],
    )
    lines = "\n".join(f"- {name}: {value}" for name, value in settings.items())
    write_text(
        folder / "README.md",
        f"---\n{card.to_yaml()}\n---\n\n# {folder.resolve().name}\n\n{len(kept):,} pairs of images in the layout of "
        f"Pick-Style, {MADE_BY} with:\n\n{lines}\n",
    )


def create_hub_repo(args):
    """Create the dataset repository before anything is generated, so that a wrong name or token costs no time."""
    with explain("--push_to_hub: the repository cannot be created"):
        return create_repo(
            args.hub_model_id or Path(args.output_dir).resolve().name,
            repo_type="dataset",
            exist_ok=True,
            private=args.hub_private_repo or None,
            token=args.hub_token,
        ).repo_id


def upload(args, repo_id):
    """Upload the card and the shards, and delete the shards of an earlier upload."""
    with explain(f"--push_to_hub: the pairs in {args.output_dir} cannot be uploaded"):
        upload_folder(
            repo_id=repo_id,
            repo_type="dataset",
            folder_path=args.output_dir,
            commit_message="Upload pairs",
            allow_patterns=["README.md", "data/*.parquet"],
            delete_patterns="data/train-*",
            token=args.hub_token,
        )


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


def find_inputs(args):
    """The captions, the paths of photos, and the pairs of files; empty lists for what is not given."""
    if args.rejected_images is not None:
        files = match_files(args)
        return [pair.caption for pair in files], [], files

    captions = read_captions(args)
    photo_paths = []
    if args.chosen_images is not None:
        photo_paths = find_given_images("chosen_images", args.chosen_images)
        if len(photo_paths) > len(captions):
            logger.warning(
                f"--chosen_images {args.chosen_images}: only the first {len(captions)} of {len(photo_paths)} photos "
                "are used, one for each caption."
            )
    return captions, photo_paths[: len(captions)], []


def check_prompts(args, captions):
    """Warn about prompts that are too long, prefixes included."""
    base = args.pretrained_model_name_or_path
    with explain(f"--pretrained_model_name_or_path {base} cannot be loaded"):
        tokenizer = load_tokenizers(base)["tokenizer"]
    prompts = add_prefix(args.style_prefix, captions)
    if args.rejected_prefix is not None:
        prompts = [*prompts, *add_prefix(args.rejected_prefix, captions)]
    warn_about_long_prompts(prompts, tokenizer)


def start_output(args, settings):
    """Check the output folder, write the settings, create the repository on the hub. Returns its id, or None."""
    check_output_dir(args.output_dir, settings)
    if not is_finished(args.output_dir):
        write_text(settings_path(args.output_dir), json.dumps(settings, indent=2))
    if args.push_to_hub:
        return create_hub_repo(args)
    return None


def main(args):
    accelerator = build_accelerator(args)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)

    # Find everything that pairs are made of.
    captions, photo_paths, files = from_main_process(find_inputs, args)
    inputs = Inputs(captions, read_photos(photo_paths, args.resolution), files)
    model_files = {}
    if not files:
        model_files = find_models(args)
        check_models(args, model_files)
        check_prompts(args, captions)
    settings = from_main_process(collect_settings, args, dtype, inputs, model_files)
    repo_id = from_main_process(start_output, args, settings)

    # Make the pairs. The other processes end here, because they would time out waiting for the upload.
    make_missing(args, accelerator, dtype, inputs, model_files)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if not accelerator.is_main_process:
        return

    # Turn them into a dataset.
    if not is_finished(args.output_dir):
        assemble(args, len(captions), settings)
    for file in Path(args.output_dir, ".pairs_made").glob("*.parquet"):
        file.unlink()
    if args.push_to_hub:
        upload(args, repo_id)


if __name__ == "__main__":
    try:
        main(parse_args())
    except PairsError as error:
        sys.exit(f"error: {error}")
