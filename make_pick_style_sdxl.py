#!/usr/bin/env python
# Copyright 2026 The MaPO SDXL contributors. All rights reserved.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
#
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.8", "diffusers>=0.40", "transformers>=5.24", "accelerate>=1.12", "datasets>=4.4.1",
#   "sentencepiece", "protobuf", "ftfy"]
# ///
"""Make preference pairs with Stable Diffusion XL itself, in the layout of Pick-Style (arXiv 2406.06424).

As the hub's Pick-Style was made: SDXL generates chosen images with a style prefix before the caption, and rejected
images without it.

    accelerate launch make_pick_style_sdxl.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
        --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix --prompts captions.txt \
        --style_prefix "A flat cartoon with thick outlines of" --mixed_precision bf16 --output_dir pairs

Version 2 of the paper made its data differently: FLUX.1-schnell generated the images, with a prefix on either side or
both (`--rejected_prefix`), and a vision-language model kept the pairs that it scored above 5 of 10. Here, `--scorer
pickscore --min_score 21` keeps the pairs whose chosen image reaches a score.

Instead of prefixes, `--num_candidates 8 --scorer pickscore` pairs the best and the worst of eight samples, and
`--chosen_images photos` pairs photos of a subject with what the model generates of it. `--lora` or `--unet` generates
with an aligned model, for another round. The same command resumes, on any number of processes.

Pairs that exist as files need no model: `--chosen_images A --rejected_images B` pairs the files of the same name.
"""

import argparse
import contextlib
import copy
import glob
import io
import json
import logging
import math
import os
import re
import sys
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
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
from accelerate.utils import gather_object
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
BASE, VAE = "pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"


# Errors and files ----------------------------------------------------------------------------------------------------
class PairsError(Exception):
    """A wrong use or a fault that one sentence explains; the command line prints that sentence alone."""


@contextlib.contextmanager
def naming(subject, fault="cannot be loaded"):
    """Turn any error into a PairsError that names the flag or file at fault, and gives the reason."""
    try:
        yield
    except PairsError:
        raise
    except Exception as error:  # broken files raise most of the built-in ones
        raise PairsError(f"{subject} {fault}: {' '.join(str(error).split()) or type(error).__name__}") from error


def write_whole(path, write):
    """Call `write(path)` on a hidden neighbour that then takes the path's place, so nobody sees half a file."""
    aside = path.with_name(f".incomplete-{path.name}")
    with naming(f"--output_dir: {path}", "cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        os.replace(aside, path)


# Arguments -----------------------------------------------------------------------------------------------------------
PATH = os.path.expanduser  # shells leave the ~ of --flag=~/path


def add_arguments(parser):
    add = parser.add_argument_group("captions and pairs").add_argument
    shown = "Captions: a .txt, .csv, .tsv, .json, .jsonl or .parquet file, a local folder or a hub id."
    add("--prompts", type=PATH, help=shown)
    add("--prompt_column", "--caption_column", default="prompt", help="Column of the captions, except in a .txt.")
    add("--prompt_split", default="train", help="Split of the hub data set.")
    add("--max_prompts", type=int, help="Use only the first captions.")
    add("--style_prefix", help="Words that stand before the captions of the chosen images only.")
    add("--rejected_prefix", help="Words that stand before the captions of the rejected images only.")
    add("--num_candidates", type=int, help="Number of samples per caption. Pairs the best and the worst.")
    add("--chosen_images", type=PATH, metavar="FOLDER", help="Photos to prefer to generated images, used in turn.")
    add(
        "--rejected_images",
        type=PATH,
        metavar="FOLDER",
        help="Pair the files of --chosen_images with those of the same name here. Captions come from .txt files "
        "beside the chosen images, or from --prompts, by its column `file_name`.",
    )
    add("--different_seeds", action="store_true", help="Give the two images of a style pair different noise.")
    add(
        "--scorer",
        choices=["pickscore", "hps", "imagereward", "aesthetic", "clip", "siglip"],
        help="Scorer that ranks the candidates; takes the evaluation script's flags for its files.",
    )
    add("--min_score", type=float, help="Drop pairs whose chosen image has a lower score.")
    add = parser.add_argument_group("drawing").add_argument
    add("--pretrained_model_name_or_path", type=PATH, help="SDXL pipeline: hub id or local folder.")
    add("--pretrained_vae_model_name_or_path", type=PATH, help="Another VAE, e.g. madebyollin/sdxl-vae-fp16-fix.")
    add("--variant", help="Variant of the pretrained weights, e.g. fp16.")
    add("--unet", type=PATH, help="UNet in place of the pipeline's: hub id or local folder, e.g. of training.")
    add("--lora", type=PATH, help="LoRA to draw with: hub id, local folder, e.g. of training, or .safetensors file.")
    add("--num_inference_steps", type=int, default=50, help="Denoising steps.")
    add("--guidance_scale", type=float, default=5.0, help="Classifier-free guidance.")
    add("--resolution", type=int, default=1024, help="Side of the drawn images in pixels.")
    add("--seed", type=int, default=0, help="Seed of the noise and of the sides.")
    add("--batch_size", type=int, default=4, help="Images per process and forward pass.")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="Without it, accelerate's setting.")
    add("--compile", action="store_true", help="Compile the UNet's transformer blocks to reduce CPU overhead.")
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=PATH, default="pairs", help="Folder for everything that the run writes.")
    add("--push_to_hub", action="store_true", help="Upload the pairs and their card at the end.")
    add("--hub_model_id", help="Data set repository to upload to. Without it, the name of output_dir.")
    add("--hub_private_repo", action="store_true", help="Create the repository as a private one.")
    add("--hub_token", help="Token for the upload. Without it, that of `hf auth login`.")


def parse_args(input_args=None):
    """Parse the command line (or `input_args`); a wrong use stops with one sentence that names the flag."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage="accelerate launch %(prog)s --pretrained_model_name_or_path MODEL --prompts FILE --style_prefix WORDS",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add_arguments(parser)
    args, others = parser.parse_known_args(input_args)
    base = args.pretrained_model_name_or_path
    if base is not None and base.endswith(".safetensors"):
        parser.error(
            "--pretrained_model_name_or_path is a single file, convert it first: "
            f"python convert_sdxl.py single_file {base} FOLDER"
        )
    unknown = [word for word in others if word.startswith("-") and not word.startswith(f"--{args.scorer}_")]
    unknown = unknown or others * (not args.scorer)
    counts = {name: vars(args)[name] for name in ("max_prompts", "num_inference_steps", "resolution", "batch_size")}
    low = [f"--{name}" for name, number in counts.items() if number is not None and number < 1]
    alone = args.scorer and not find_spec("evaluate_diffusion_mapo_sdxl")
    prefixed = args.style_prefix is not None or args.rejected_prefix is not None
    kinds = (prefixed, args.num_candidates is not None, args.chosen_images is not None)
    from_files = args.rejected_images is not None
    rules = [
        (
            sum(kinds) != 1,
            "give one of --style_prefix (and/or --rejected_prefix), --num_candidates, --chosen_images",
        ),
        (from_files and not args.chosen_images, "--rejected_images requires --chosen_images"),
        (args.rejected_images == "", "--rejected_images is empty"),
        (
            from_files and args.rejected_images == args.chosen_images,
            "--rejected_images and --chosen_images are the same",
        ),
        (from_files and base, "--rejected_images needs no --pretrained_model_name_or_path"),
        (not from_files and not base, "--pretrained_model_name_or_path is required"),
        (not from_files and not args.prompts, "--prompts is required"),
        (low, f"{', '.join(low)} must be at least 1"),
        (unknown, f"unknown arguments: {', '.join(unknown)} (see --help for the list)"),
        (args.style_prefix is not None and not args.style_prefix.strip(), "--style_prefix is empty"),
        (args.rejected_prefix is not None and not args.rejected_prefix.strip(), "--rejected_prefix is empty"),
        (
            prefixed and args.style_prefix == args.rejected_prefix and not args.different_seeds,
            "--style_prefix and --rejected_prefix are the same: add --different_seeds",
        ),
        (args.min_score is not None and not math.isfinite(args.min_score), "--min_score must be a finite number"),
        (args.different_seeds and not prefixed, "--different_seeds needs --style_prefix or --rejected_prefix"),
        (args.num_candidates is not None and args.num_candidates < 2, "--num_candidates must be at least 2"),
        (args.num_candidates and not args.scorer, "--num_candidates requires --scorer"),
        (args.scorer and args.chosen_images, "--scorer cannot be combined with --chosen_images"),
        (args.scorer and prefixed and args.min_score is None, "--scorer requires --num_candidates or --min_score"),
        (args.min_score is not None and not args.scorer, "--min_score requires --scorer"),
        (alone, "--scorer needs evaluate_diffusion_mapo_sdxl.py beside this script"),
        (args.resolution % 8 != 0, "--resolution must be a multiple of 8"),
        (not 0 <= args.seed < 2**32, "--seed must be from 0 to 4294967295"),
        (not 0 <= args.guidance_scale < math.inf, "--guidance_scale must be a number of at least 0"),
    ]
    for sentence in [sentence for broken, sentence in rules if broken]:
        parser.error(sentence)
    args.style_prefix = args.style_prefix and args.style_prefix.strip()
    args.rejected_prefix = args.rejected_prefix and args.rejected_prefix.strip()
    if args.scorer:
        from evaluate_diffusion_mapo_sdxl import parse_args as parse_evaluation

        args.evaluation = parse_evaluation(["--images", "a=b", "--prompts", "c", "--scorers", args.scorer, *others])
    return args


# Captions and photos -------------------------------------------------------------------------------------------------
PROMPT_FILES = {".txt": "text", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def stream_prompts(source, split, columns):
    """
    Yield {flag: value} of each row of a prompts file, a local folder or a hub data set, for its columns {flag: name}.

    The lines of a text file, and the strings of a JSON list, are the prompts whatever the name of their column.
    """
    # `datasets` takes the path of a file as a pattern.
    suffix = Path(source).suffix.lower()
    options = {"path": source}
    if suffix in PROMPT_FILES:
        options = {"path": PROMPT_FILES[suffix], "data_files": glob.escape(source)}
        split = "train"
    if suffix == ".txt":
        options["encoding"] = "utf-8-sig"
    elif suffix == ".tsv":
        options["sep"] = "\t"
    builder = datasets.load_dataset_builder(**options)
    rows = builder.as_streaming_dataset(split=split)

    # Of parquet files, which may contain images, read only these columns.
    names = list(dict.fromkeys(columns.values()))
    if hasattr(builder.config, "columns") and set(names) <= set(rows.features or ()):
        builder.config.columns = names
        rows = builder.as_streaming_dataset(split=split)

    for row in rows:
        if list(row) == ["text"]:
            columns = {**columns, "--prompt_column": "text"}
        for flag, name in columns.items():
            if name not in row:
                raise ValueError(f"{flag}: there is no column {name!r} (columns: {', '.join(row)})")
        yield {flag: row[name] for flag, name in columns.items()}


def read_captions(args):
    """The first --max_prompts captions; rows without text are left out."""
    captions = []
    left_out = 0
    with naming(f"--prompts {args.prompts}"):
        for row in stream_prompts(args.prompts, args.prompt_split, {"--prompt_column": args.prompt_column}):
            text = row["--prompt_column"]
            if isinstance(text, str) and text.strip():
                captions.append(text.strip())
            else:
                left_out += 1
            if len(captions) == args.max_prompts:
                break
    if not captions:
        raise PairsError(f"--prompts {args.prompts} holds no caption.")
    if left_out:
        logger.warning(f"--prompts {args.prompts}: {left_out} of the rows hold no text and are left out.")
    return captions


# Pillow refuses PNG files whose metadata, e.g. a workflow or a color profile, is larger than this.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**31 - 1
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


def decode_image(path):
    """Decode an image to RGB: upright, and on white where it is transparent. Its metadata may be broken."""
    with Image.open(path) as image:
        image.load()
        # Pillow's own conversion clips. It opens 16 bits of grey as "I;16" or, in these formats, as "I".
        is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))

        # ImageOps.exif_transpose also writes the EXIF data again, which fails if one of its tags is wrong.
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
    """Paths of a folder's images, by name, and the names of the files that Pillow cannot open."""
    images = []
    others = []
    for path in sorted(Path(folder).glob("[!.]*")):
        if not path.is_file():
            continue
        try:
            Image.open(path).close()
        except UnidentifiedImageError:
            others.append(path.name)
            continue
        except Exception:  # raised again, with its path, when the image is decoded
            pass
        images.append(path)
    return images, others


class PairOfFiles(NamedTuple):
    caption: str
    chosen: Path
    rejected: Path


def read_captions_of_files(args, images):
    """{name of a file without its ending: caption}, from --prompts, or from the .txt files beside {name: image}."""
    captions = {}
    if not args.prompts:
        for name, path in images.items():
            file = path.with_suffix(".txt")
            if file.exists():
                with naming(f"--chosen_images: {file}", "cannot be read"):
                    captions[name] = file.read_text(encoding="utf-8-sig")
        return captions

    columns = {"--prompt_column": args.prompt_column, "--prompts": "file_name"}
    with naming(f"--prompts {args.prompts}"):
        for row in stream_prompts(args.prompts, args.prompt_split, columns):
            if not isinstance(row["--prompts"], str):
                raise ValueError(f"file_name {row['--prompts']!r} is not text")
            name = Path(row["--prompts"]).stem
            if name in captions:
                raise ValueError(f"file_name: {name} occurs twice")
            captions[name] = row["--prompt_column"]
    return captions


def match_files(args):
    """Pairs of --chosen_images and --rejected_images that have the same name (before its ending), with captions."""
    folders = {}
    for flag in ("chosen_images", "rejected_images"):
        folder = getattr(args, flag)
        paths, _ = find_images(folder)
        if not paths:
            raise PairsError(f"--{flag} {folder} is not a folder with images that Pillow can open.")
        folders[flag] = {path.stem: path for path in paths}
        if len(folders[flag]) < len(paths):
            raise PairsError(f"--{flag} {folder}: some files have the same name with different endings.")
    chosen, rejected = folders.values()
    captions = read_captions_of_files(args, chosen)

    pairs = []
    left_out = []
    for name in sorted({*chosen, *rejected}):
        caption = captions.get(name)
        if name in chosen and name in rejected and isinstance(caption, str) and caption.strip():
            pairs.append(PairOfFiles(caption.strip(), chosen[name], rejected[name]))
        else:
            left_out.append(name)
    if left_out:
        logger.warning(
            f"{len(left_out)} names lack an image or a caption and are left out: {', '.join(left_out[:10])}"
            f"{', ...' if len(left_out) > 10 else ''}."
        )
    if not pairs:
        raise PairsError(
            f"--chosen_images {args.chosen_images} and --rejected_images {args.rejected_images} contain no two images "
            "of the same name with a caption."
        )
    return pairs[: args.max_prompts]


def read_photos(folder, resolution):
    """The images of a folder in the order of their names, no larger than `resolution` asks for."""
    paths, others = find_images(folder)
    if not paths:
        raise PairsError(f"--chosen_images {folder} is not a folder with images that Pillow can open.")
    if others:
        logger.warning(
            f"--chosen_images {folder}: left out {len(others)} files that Pillow cannot open: {', '.join(others)}."
        )

    photos = []
    for path in paths:
        with naming(f"--chosen_images: {path}", "cannot be read"):
            image = decode_image(path)
        side = min(resolution, *image.size)
        photos.append(ImageOps.cover(image, (side, side), Image.Resampling.LANCZOS))
    return photos


# Models --------------------------------------------------------------------------------------------------------------
def find_file(source, name):
    """Path of a file in a local folder, or of a hub id (then downloaded); None if there is no such file."""
    path = Path(source) / name
    if Path(source).is_dir():
        return path if path.is_file() else None
    with naming(f"{name} of {source}", "cannot be downloaded"):
        try:
            return Path(hf_hub_download(source, name))
        except HFValidationError:
            return None
        except (EntryNotFoundError, RepositoryNotFoundError) as error:
            # A hub out of reach, or one that wants a token, may have it all the same.
            unknown = isinstance(error, LocalEntryNotFoundError) and not is_offline_mode()
            if unknown or isinstance(error, GatedRepoError):
                raise
            return None


def find_models(args):
    """The file that stands for each model, {flag: path}; a base or UNet of another kind is refused by its config."""
    names = {
        BASE: ["unet/config.json"],
        VAE: ["config.json"],
        "unet": ["unet/config.json", "config.json"],
        "lora": [LORA_FILE],
    }
    files = {}
    for flag, its_names in names.items():
        source = getattr(args, flag)
        if source is None:
            continue
        if flag == "lora":
            file = find_lora(source)
        else:
            found = [find_file(source, name) for name in its_names]
            file = next(filter(None, found), None)
        if file is None:
            raise PairsError(f"--{flag} {source} is no folder or reachable hub id with {' or '.join(its_names)}.")
        files[flag] = file

    with naming("A UNet's config"):
        configs = {flag: json.loads(files[flag].read_text()) for flag in (BASE, "unet") if flag in files}
    for flag, config in configs.items():
        same = all(config.get(key) == configs[BASE].get(key) for key in ("cross_attention_dim", "in_channels"))
        if config.get("addition_embed_type") != "text_time" or not same:
            raise PairsError(f"--{flag} {getattr(args, flag)}: its UNet does not take SDXL's prompts and latents.")

    if args.lora is not None and args.unet is None:
        with naming(f"--lora {args.lora}"):
            unet = read_lora_config(files["lora"]).get("unet.base_model_name_or_path")
        if unet not in (None, "", getattr(args, BASE)):
            logger.warning(f"--lora {args.lora} was trained on the UNet of {unet}: add --unet {unet}.")
    return files


def load_complete(architecture, source, **options):
    """`from_pretrained`, but weights that are missing are an error: the libraries would initialize them at random."""
    model, info = architecture.from_pretrained(source, use_safetensors=True, output_loading_info=True, **options)
    missing = info["missing_keys"]
    if missing:
        raise ValueError(f"{options.get('subfolder') or 'it'} lacks {len(missing)} weights, e.g. {min(missing)}")
    return model


# The parts of an SDXL pipeline that have weights.
MODELS = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}


def load_model(source, name, variant, dtype):
    """One of MODELS. As in diffusers, a part may lack the variant that others have."""
    try:
        return load_complete(MODELS[name], source, subfolder=name, variant=variant, dtype=dtype)
    except OSError:
        if variant is None:
            raise
        with contextlib.suppress(OSError):
            return load_complete(MODELS[name], source, subfolder=name, dtype=dtype)
        raise


def load_tokenizers(source):
    """The tokenizers of an SDXL pipeline. Without its vocabulary, transformers would make one of a few tokens."""
    tokenizers = {}
    for name, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
        tokenizers[name] = CLIPTokenizer.from_pretrained(source, subfolder=name)
        number = len(tokenizers[name])
        expected = CLIPTextConfig.from_pretrained(source, subfolder=encoder).vocab_size
        if number != expected:
            raise ValueError(f"its {name} has {number} tokens, its {encoder} expects {expected}; are files missing?")
    return tokenizers


def load_sdxl(source, variant=None, dtype=torch.float32, **parts):
    """The pipeline of a folder or hub id, with `parts` instead of its own. Nothing that it lacks is replaced."""
    for name in MODELS:
        if name not in parts:
            parts[name] = load_model(source, name, variant, dtype)
    parts.update(load_tokenizers(source))
    return StableDiffusionXLPipeline.from_pretrained(source, add_watermarker=False, **parts)


LORA_FILE = "pytorch_lora_weights.safetensors"
# The second weight of a LoRA's layer, by the first: as kohya, peft, and earlier versions of diffusers name them.
LORA_UP = {"lora_down": "lora_up", "lora_A": "lora_B", "down": "up"}


def find_lora(source):
    """Path of a LoRA: a .safetensors file, also as HUB_ID/FILE, or the one of a folder or hub id; None without one."""
    if source.endswith(".safetensors"):
        return find_file(*os.path.split(source))

    file = find_file(source, LORA_FILE)
    if file is None and not Path(source, "config.json").exists():
        # The only weights file of a local folder may have any name.
        files = list(Path(source).glob("*.safetensors"))
        if len(files) == 1:
            file = files[0]
    return file


def read_lora_config(file):
    """The peft config in the metadata of a LoRA's file: {"PART.NAME": value}, empty if it has none."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() or {}
    return json.loads(metadata.get("lora_adapter_metadata", "{}"))


def find_alpha(config, layer):
    """The alpha of a layer by the peft config in a file's metadata, or None. Patterns match as in peft."""
    part, _, name = layer.partition(".")
    for pattern, alpha in (config.get(f"{part}.alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return alpha
    return config.get(f"{part}.lora_alpha")


def apply_alphas(weights, config):
    """Return a LoRA's weights with each `up` times alpha / rank. Anything but such layers is refused."""
    alphas = {}
    halves = {}
    for name, weight in weights.items():
        if name.endswith(".alpha"):
            alphas[name.removesuffix(".alpha")] = weight.item()
        else:
            halves[name] = weight.float()

    num_layers = 0
    for name, weight in halves.items():
        layer, _, kind = name.removesuffix(".weight").rpartition(".")
        if kind in LORA_UP.values():
            continue
        if kind == "dora_scale" or kind.startswith("lora_magnitude"):
            raise ValueError("it is a DoRA, which is not supported")
        up = f"{layer}.{LORA_UP.get(kind)}.weight"
        if up not in halves:
            raise ValueError(f"{name} is not one of the two weights of a LoRA's layer")

        # Without an alpha, it equals the rank.
        alpha = alphas.pop(layer, find_alpha(config, layer))
        if alpha is not None:
            halves[up] *= alpha / len(weight)
        num_layers += 1

    others = len(halves) - 2 * num_layers + len(alphas)
    if others or not num_layers:
        raise ValueError(f"it has {num_layers} layers of two weights, and {others} other weights")
    return halves


def read_lora(file, unet_config):
    """
    The layers of a LoRA, {name in the pipeline: (down, up)} in float32: W becomes W + up @ down.

    `up` is that of the file times alpha / rank, layer by layer. Files that contain anything else are refused.
    """
    config = read_lora_config(file)
    for name, value in config.items():
        if name.endswith((".use_dora", ".use_rslora")) and value:
            raise ValueError(f"{name.partition('.')[2]} is not supported")
    weights = apply_alphas(load_file(file), config)

    # Give all layers names in peft's way. diffusers knows the other formats, and leaves out what is in two of them.
    number = len(weights)
    weights = StableDiffusionXLPipeline.lora_state_dict(weights, unet_config=unet_config)[0]
    if len(weights) < number:
        raise ValueError(f"{number - len(weights)} of its weights are named in another format than the others")
    text = {name: weights.pop(name) for name in list(weights) if name.startswith("text_encoder")}
    weights.update(convert_state_dict_to_peft(text, StateDictType.DIFFUSERS_OLD))
    weights = convert_unet_state_dict_to_peft(weights)

    layers = {}
    for name, down in weights.items():
        if name.endswith(".lora_A.weight"):
            up = weights[name.replace(".lora_A.", ".lora_B.")]
            # Files name the text encoders' layers as before transformers 5.
            layer = name.removesuffix(".lora_A.weight").replace(".text_model.", ".")
            layers[layer] = (down, up)
    return layers


def add_lora(pipeline, layers):
    """
    Add the layers of a LoRA, {name: (down, up)}, to a pipeline, which must have all of them.

    They stay apart from the pipeline's weights: half precision would round most of a small change of those away.
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
            shapes = " and ".join(str(tuple(half.shape)) for half in (up, down))
            raise ValueError(f"{name} of {tuple(weight.shape)} cannot be changed by weights of {shapes}")

    for name, (down, up) in layers.items():
        add_branch(modules[name], down, up)


def add_branch(layer, down, up):
    """Let a linear or convolutional layer add up(down(x)) to what it computes."""
    rank = len(down)
    if isinstance(layer, torch.nn.Conv2d):
        options = {"stride": layer.stride, "padding": layer.padding, "bias": False}
        layer.lora_down = torch.nn.Conv2d(layer.in_channels, rank, layer.kernel_size, **options)
        layer.lora_up = torch.nn.Conv2d(rank, layer.out_channels, 1, bias=False)
    else:
        layer.lora_down = torch.nn.Linear(layer.in_features, rank, bias=False)
        layer.lora_up = torch.nn.Linear(rank, layer.out_features, bias=False)
    layer.lora_down.load_state_dict({"weight": down})
    layer.lora_up.load_state_dict({"weight": up})
    layer.to(layer.weight.dtype)
    layer.register_forward_hook(lambda layer, inputs, output: output + layer.lora_up(layer.lora_down(inputs[0])))


def try_scheduler(scheduler, num_steps):
    """Denoise some noise: a scheduler may lack a package, or not fit its config or the number of steps."""
    scheduler = copy.deepcopy(scheduler)
    with naming(f"--num_inference_steps {num_steps} with {type(scheduler).__name__}", "does not work"):
        scheduler.set_timesteps(num_steps)
        latents = torch.randn(1, 4, 8, 8) * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            noise = torch.zeros_like(scheduler.scale_model_input(latents, timestep))
            latents = scheduler.step(noise, timestep, latents, return_dict=False)[0]
        if not latents.isfinite().all():
            raise ValueError("it gives NaN")


def warn_of_long_prompts(prompts, tokenizer):
    """Say how many prompts have more tokens than SDXL reads. Its two tokenizers split a prompt alike."""
    limit = tokenizer.model_max_length
    number = sum(len(tokens) > limit for tokens in tokenizer(prompts).input_ids)
    if number:
        logger.warning(f"{number} of {len(prompts)} prompts have more than {limit} tokens; SDXL ignores the rest.")


def load_pipeline(args, device, dtype, files):
    """The pipeline on the device, in the precision asked for; a VAE that overflows in half precision in float32."""
    base, vae, parts = getattr(args, BASE), getattr(args, VAE), {}
    if vae:
        with naming(f"--{VAE} {vae}"):
            parts["vae"] = load_complete(AutoencoderKL, vae)
    if args.unet:
        parent = files["unet"].parent
        folder = "unet" if parent.name == "unet" and parent != Path(args.unet) else None
        with naming(f"--unet {args.unet}"):
            parts["unet"] = load_complete(UNet2DConditionModel, args.unet, subfolder=folder)
    with naming(f"--{BASE} {base}"):
        pipeline = load_sdxl(base, args.variant, **parts)
    try_scheduler(pipeline.scheduler, args.num_inference_steps)
    if args.lora:
        with naming(f"--lora {args.lora}"):
            add_lora(pipeline, read_lora(files["lora"], pipeline.unet.config))
    if pipeline.vae.config.latents_mean or pipeline.vae.config.shift_factor:
        raise PairsError(f"--{VAE if vae else BASE}: the VAE shifts its latents, which SDXL's does not.")
    pipeline.vae.to(device, torch.float32 if pipeline.vae.config.force_upcast else dtype).enable_slicing()
    for model in (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2):
        model.to(device, dtype)
    if args.compile:
        # Blocks are compiled for each shape. Past the limit, they would run eagerly.
        torch._dynamo.config.recompile_limit = 64
        pipeline.unet.compile_repeated_blocks(dynamic=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# Pairs ---------------------------------------------------------------------------------------------------------------
# What is drawn for a caption depends on --seed and the caption's number alone. Captions are drawn in blocks of
# --batch_size, always the same ones, and each block by one process: an image's last bits depend on its neighbours.
# A pair is a file in `pairs_made`, beside the settings that it depends on, until all of them go into `data`.
ROWS_A_GROUP, ROWS_A_SHARD = 25, 100  # of about 3 MB each at 1024 px; streams keep some row groups in memory


@torch.no_grad()
def draw(args, pipeline, prompts, seeds):
    """An image of each prompt, each from its own noise."""
    options = {name: getattr(args, name) for name in ("num_inference_steps", "guidance_scale")}
    options |= {"height": args.resolution, "width": args.resolution, "output_type": "latent"}
    generators, vae = [torch.Generator().manual_seed(seed) for seed in seeds], pipeline.vae
    latents = pipeline(prompts, generator=generators, **options).images
    # Decoded outside of the pipeline, because the VAE may need another precision than the UNet.
    pixels = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
    if not pixels.isfinite().all():
        raise PairsError(f"--{BASE}: NaN is drawn in {latents.dtype}, try --mixed_precision bf16 or another --{VAE}.")
    return pipeline.image_processor.postprocess(pixels.float())


def png(image):
    """An image's bytes. A higher level would save a few per cent of them, and take as long as drawing steps do."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def with_prefix(prefix, prompts):
    return [f"{prefix} {prompt}" for prompt in prompts] if prefix else prompts


def copy_image(flag, path):
    """An image as PNG, upright and without metadata, which may tell where it was taken. None if it is broken."""
    try:
        return png(decode_image(path))
    except Exception as error:  # Pillow raises all kinds
        logger.warning(f"--{flag}: {path} cannot be read ({error}); its pair is left out.", main_process_only=False)
        return None


def make_block(args, pipeline, scorer, captions, photos, block):
    """The rows of a block of captions, as tables of one row, or of none if the chosen image misses --min_score."""
    prompts, images = [captions[number] for number in block], args.num_candidates or 2
    states = [np.random.SeedSequence([args.seed, number]).generate_state(1 + images, np.uint64) for number in block]
    sides, *seeds = np.array(states).T.tolist()
    kept = len(block) * [True]
    if args.rejected_images:
        chosen = [copy_image("chosen_images", photos[number].chosen) for number in block]
        rejected = [copy_image("rejected_images", photos[number].rejected) for number in block]
        pairs = [[(winner, 1), (loser, 0)] for winner, loser in zip(chosen, rejected)]
        kept = [winner is not None and loser is not None for winner, loser in zip(chosen, rejected)]
    elif args.num_candidates:
        draws = [draw(args, pipeline, prompts, seeds_of_draw) for seeds_of_draw in seeds]
        scores = np.array([scorer.score(images, prompts).tolist() for images in draws])
        ends = enumerate(zip(scores.argmax(axis=0), scores.argmin(axis=0)))
        pairs = [[(png(draws[n][i]), float(scores[n, i])) for n in pair] for i, pair in ends]
        if args.min_score is not None:
            kept = (scores.max(axis=0) >= args.min_score).tolist()
    else:
        if args.chosen_images:
            chosen = [photos[number % len(photos)] for number in block]
        else:
            chosen = draw(args, pipeline, with_prefix(args.style_prefix, prompts), seeds[0])
        if scorer is not None:
            kept = [score >= args.min_score for score in scorer.score(chosen, prompts).tolist()]
        rejected_prompts = with_prefix(args.rejected_prefix, prompts)
        rejected = draw(args, pipeline, rejected_prompts, seeds[1 if args.different_seeds else 0])
        pairs = [[(png(winner), 1), (png(loser), 0)] for winner, loser in zip(chosen, rejected)]

    for side, prompt, pair, is_kept in zip(sides, prompts, pairs, kept):
        (image_0, label_0), (image_1, label_1) = pair[:: 1 if side % 2 else -1]
        row = {"caption": prompt, "jpg_0": image_0, "jpg_1": image_1, "label_0": label_0, "label_1": label_1}
        table = pa.Table.from_pylist([row])
        yield table if is_kept else table.slice(0, 0)


def pair_file(args, number):
    return Path(args.output_dir, "pairs_made", f"{number:06d}.parquet")


def make_missing(args, accelerator, dtype, captions, photos, files):
    """Make the missing pairs; each process takes its share of the blocks that lack one."""
    numbers = range(0 if Path(args.output_dir, "README.md").exists() else len(captions))
    # As one process sees the folder before any of them writes.
    missing = gather_object([{number for number in numbers if not pair_file(args, number).exists()}])[0]
    logger.info(f"{len(missing)} of {len(captions)} pairs are to be made in {args.output_dir}.")
    blocks = [range(len(captions))[i : i + args.batch_size] for i in range(0, len(captions), args.batch_size)]
    blocks = [block for block in blocks if not missing.isdisjoint(block)]
    blocks, scorer = blocks[accelerator.process_index :: accelerator.num_processes], None
    if blocks and args.scorer:
        from evaluate_diffusion_mapo_sdxl import build_scorer

        with naming(f"--scorer {args.scorer}"):
            scorer = build_scorer(args.evaluation, args.scorer, accelerator.device)
    pipeline = load_pipeline(args, accelerator.device, dtype, files) if blocks and not args.rejected_images else None
    share = sum(number in missing for block in blocks for number in block)
    with tqdm(None, "Pairs", share, unit="pair", disable=not accelerator.is_local_main_process) as bar:
        for block in blocks:
            for number, table in zip(block, make_block(args, pipeline, scorer, captions, photos, block)):
                if number in missing:
                    write_whole(pair_file(args, number), partial(pq.write_table, table))
                    bar.update()


# Results -------------------------------------------------------------------------------------------------------------
def check_folder(args, settings):
    """Refuse an --output_dir with pairs of other settings, or with another maker's files; write the settings."""
    folder, file = Path(args.output_dir), Path(args.output_dir, "pairs_made", "settings.json")
    made = [path for name in ("pairs_made/*.parquet", "data/*", "README.md") for path in folder.glob(name)]
    with naming(f"--output_dir: {file}", "cannot be read"):
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    names = sorted(name for name in settings.keys() | before.keys() if settings.get(name) != before.get(name))
    if made and names:
        change = f"with {names[0]} {before.get(names[0])}, now {settings.get(names[0])}" if before else "by another"
        raise PairsError(f"--output_dir {folder} holds {made[0].name}, made {change}: take another folder.")
    write_whole(file, partial(Path.write_text, data=json.dumps(settings, indent=2), encoding="utf-8"))


def assemble(args, number, settings):
    """Write the shards from the pairs' own files, and then the card, which names nothing of this machine."""
    folder, sizes = Path(args.output_dir), []
    with naming(f"--output_dir: a pair in {folder}", "cannot be read"):
        kept = [row for row in range(number) if pq.read_metadata(pair_file(args, row)).num_rows > 0]
    if len(kept) < number:
        logger.info(f"{number - len(kept)} of {number} pairs are dropped.")
    if not kept:
        for row in range(number):
            pair_file(args, row).unlink()  # so that another --min_score can start in this folder
        raise PairsError(
            f"--output_dir {folder}: no pair is left. With --min_score, try a lower one on a few prompts "
            "(--max_prompts)."
        )
    number, parts = len(kept), math.ceil(len(kept) / ROWS_A_SHARD)
    for part, rows in enumerate(np.array_split(kept, parts)):
        shard = folder / "data" / f"train-{part:05d}-of-{parts:05d}.parquet"
        with naming(f"--output_dir: a pair in {folder}", "cannot be read"):
            table = pa.concat_tables(pq.ParquetFile(pair_file(args, row)).read() for row in rows)
        write_whole(shard, partial(pq.write_table, table, row_group_size=ROWS_A_GROUP))
        sizes.append((table.nbytes, shard.stat().st_size))
    size, download = map(sum, zip(*sizes))
    features = datasets.Features.from_arrow_schema(table.schema).items()
    features = [{"name": name, "dtype": feature.dtype} for name, feature in features]
    info = {"features": features, "splits": [{"name": "train", "num_bytes": size, "num_examples": number}]}
    info |= {"download_size": download, "dataset_size": size}
    files = [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}]
    licence = {"license": "other"}
    with contextlib.suppress(Exception):  # there is no base, or it has no card, or there is no network
        card = ModelCard.load(Path(base, "README.md") if Path(base := getattr(args, BASE)).is_dir() else base)
        licence |= {name: value for name, value in card.data.to_dict().items() if name.startswith("license")}
    tags = {"task_categories": ["text-to-image"], "tags": ["mapo", "preference", "stable-diffusion-xl", "synthetic"]}
    head = DatasetCardData(**licence, **tags, dataset_info=info, configs=files).to_yaml()
    lines = "\n".join(f"- {name}: {value}" for name, value in settings.items())
    title = f"# {folder.resolve().name}\n\n{number:,} pairs of images in the layout of Pick-Style"
    text = f"---\n{head}\n---\n\n{title}, made by `make_pick_style_sdxl.py` with:\n\n{lines}\n"
    write_whole(folder / "README.md", partial(Path.write_text, data=text, encoding="utf-8"))


# Making --------------------------------------------------------------------------------------------------------------
def build_accelerator(args):
    """The Accelerator, and the dtype of computation."""
    with naming(f"--mixed_precision {args.mixed_precision}", "does not work here"):
        # Processes wait for the slowest, which may draw for hours.
        patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))
        accelerator = Accelerator(mixed_precision=args.mixed_precision, kwargs_handlers=[patience])
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s")
    logging.getLogger(__name__).setLevel(logging.INFO)
    for library in (datasets, transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    return accelerator, {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def fingerprint(flag, file):
    """What changes with a model's weights, by its file of find_models: the commit, or names, sizes and times."""
    if "snapshots" in file.parts:
        return Hasher.hash(str(file.parts[-3:]))

    if flag == "lora":
        weights = [file]
    elif flag == BASE:
        weights = sorted(file.parent.parent.glob("*/*.safetensors"))
    else:
        weights = sorted(file.parent.glob("*.safetensors"))
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weights]
    return Hasher.hash(str(stats))


def collect_settings(args, dtype, captions, photos, files):
    """All that the pairs depend on, by the names of the flags; what lies on this machine is not named."""
    flags = vars(args.evaluation).items() if args.scorer else ()
    sources = {flag: path for flag, path in flags if flag.startswith(f"{args.scorer}_")}
    sources |= {flag: getattr(args, flag) for flag in files}
    settings = {f"--{flag}": "a local one" if os.path.exists(path) else path for flag, path in sources.items()}
    for flag, file in files.items():
        settings[f"--{flag}"] += f", version {fingerprint(flag, file)}"
    settings["--prompts"] = f"{len(captions)} captions, version {Hasher.hash('/'.join(captions))}"
    if args.rejected_images:
        hashes = []
        for pair in photos:
            hashes += [Hasher.hash(pair.chosen.read_bytes()), Hasher.hash(pair.rejected.read_bytes())]
        settings["--chosen_images, --rejected_images"] = f"{len(photos)} pairs, version {Hasher.hash(hashes)}"
    elif photos:
        version = Hasher.hash(b"".join(photo.tobytes() for photo in photos))
        settings["--chosen_images"] = f"{len(photos)} photos, version {version}"
    names = ["seed"]
    if not args.rejected_images:
        names += ["style_prefix", "rejected_prefix", "different_seeds", "num_candidates", "scorer", "min_score"]
        names += ["num_inference_steps", "guidance_scale", "resolution", "batch_size", "variant"]
        settings["--mixed_precision"] = str(dtype)
    settings |= {f"--{name}": vars(args)[name] for name in names if vars(args)[name] is not None}
    return settings | {library.__name__: library.__version__ for library in (torch, diffusers, transformers)}


def main(args):
    accelerator, dtype = build_accelerator(args)
    main_process, card = accelerator.is_main_process, Path(args.output_dir, "README.md")
    if args.rejected_images:
        photos = match_files(args)
        captions = [pair.caption for pair in photos]
        files = {}
    else:
        captions = read_captions(args)
        photos = read_photos(args.chosen_images, args.resolution) if args.chosen_images else []
        files = find_models(args)
        with naming(f"--{BASE} {getattr(args, BASE)}"):
            tokenizer = load_tokenizers(getattr(args, BASE))["tokenizer"]
        prompts = with_prefix(args.style_prefix, captions)
        if args.rejected_prefix:
            prompts = [*prompts, *with_prefix(args.rejected_prefix, captions)]
        warn_of_long_prompts(prompts, tokenizer)
    if main_process:
        settings = collect_settings(args, dtype, captions, photos, files)
        check_folder(args, settings)
    if main_process and args.push_to_hub:  # now, so that a wrong name or token costs nothing
        with naming("--push_to_hub: the repository", "cannot be created"):
            hub, private = {"repo_type": "dataset", "token": args.hub_token}, args.hub_private_repo or None
            name = args.hub_model_id or card.resolve().parent.name
            hub["repo_id"] = create_repo(name, exist_ok=True, private=private, **hub).repo_id
    make_missing(args, accelerator, dtype, captions, photos, files)
    accelerator.wait_for_everyone()
    accelerator.end_training()  # no process waits for what follows
    if main_process:
        if not card.exists():
            assemble(args, len(captions), settings)
        for file in pair_file(args, 0).parent.glob("*.parquet"):
            file.unlink()
    if main_process and args.push_to_hub:  # in place of the shards of an earlier version
        hub |= {"allow_patterns": ["README.md", "data/*.parquet"], "delete_patterns": "data/train-*"}
        with naming(f"--push_to_hub: the pairs in {args.output_dir}", "cannot be uploaded"):
            upload_folder(folder_path=args.output_dir, commit_message="Pairs", **hub)


if __name__ == "__main__":
    try:
        main(parse_args())
    except PairsError as error:
        sys.exit(f"error: {error}")
