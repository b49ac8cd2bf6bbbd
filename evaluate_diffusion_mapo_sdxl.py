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
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.8",
#     "diffusers>=0.40",
#     "transformers>=5.24",
#     "accelerate>=1.12",
#     "datasets>=4.4.1",
#     "sentencepiece",
#     "protobuf",
#     "ftfy",
# ]
# ///
"""Draw images with SDXL and its aligned versions, and score them with the preference models of the MaPO paper.

The 500 Pick-a-Pic v2 test prompts, base model against a LoRA and a whole UNet (the prompts of the paper's Table 2):

    accelerate launch evaluate_diffusion_mapo_sdxl.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
        --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix --prompts pickapic_v2 \
        --candidates lora=mapo-lora full=mapo-full --mixed_precision bf16 --output_dir evaluation

Images made elsewhere, `00000_0.png` (prompt 0, image 0), `00001_0.png`, ... in a folder for each model:

    accelerate launch evaluate_diffusion_mapo_sdxl.py --images sdxl=images/sdxl mapo=images/mapo \
        --prompts prompts.txt --output_dir evaluation

Run the same command again to resume, with more prompts, models or scorers if you like. `--output_dir` holds
`images/NAME/` with its `settings.json`, `scores/SCORER.json`, `scores.jsonl` (one image per line), `results.md`,
`results.json`, and `grid-NAME.png` with the largest wins and losses.

Scorers also work alone: `PickScore("cuda").score(images, prompts)` scores PIL images in RGB.
"""

import argparse
import contextlib
import copy
import glob
import hashlib
import html
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
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple


# Arguments -----------------------------------------------------------------------------------------------------------
# Before the libraries are imported, which takes seconds that --help and a wrong flag should not cost.


# Where the scorers come from; hps_no_antialias has the weights of hps.
CLIP_L, CLIP_H = "openai/clip-vit-large-patch14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
SOURCES = {
    "pickscore": {"model": "yuvalkirstain/PickScore_v1", "processor": CLIP_H},
    "hps": {"model": CLIP_H, "weights": "xswu/HPSv2/HPS_v2.1_compressed.pt"},
    "aesthetic": {"model": CLIP_L, "weights": "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth"},
    "clip": {"model": CLIP_L},
    "siglip": {"model": "google/siglip-so400m-patch14-384"},
    "dinov2": {"model": "facebook/dinov2-base"},
    "imagereward": {"weights": "zai-org/ImageReward/ImageReward.pt", "processor": "google-bert/bert-base-uncased"},
}
PACKAGES = {"hps": "ftfy", "hps_no_antialias": "ftfy", "siglip": "sentencepiece"}
DEFAULT_SCORERS = ["pickscore", "hps", "aesthetic", "clip"]
SCHEDULERS = ("DDIM", "DDPM", "PNDM", "LMSDiscrete", "EulerDiscrete", "HeunDiscrete", "EulerAncestralDiscrete")
SCHEDULERS += ("DPMSolverMultistep", "DPMSolverSinglestep", "KDPM2Discrete", "KDPM2AncestralDiscrete")
SCHEDULERS += ("DEISMultistep", "UniPCMultistep", "DPMSolverSDE")
# Stands for each prompt's category in a path.
CATEGORY = "{category}"
PATH = os.path.expanduser  # shells leave the ~ of --flag=~/path


def count(text):
    """Parse a whole number from 1 for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def named_source(text):
    """Parse NAME=PATH or NAME=PATH+PATH for argparse."""
    match = re.fullmatch(r"(\w[\w.-]*)=(.+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH with a NAME of letters, digits, '.', '_', '-'")
    name, path = match.groups()
    return name, "+".join(PATH(part) for part in path.split("+"))


def add_image_arguments(parser):
    add = parser.add_argument_group("prompts and images").add_argument
    shown = "pickapic_v2, hpdv2, partiprompts, a hub id, or a .txt, .csv, .tsv, .json, .jsonl or .parquet file."
    add("--prompts", type=PATH, required=True, help=shown)
    add("--prompt_column", default="prompt", help="Column of the prompts in a file or hub data set.")
    shown = "Column of what scorers read instead, e.g. without a subject's rare token."
    add("--scoring_prompt_column", help=shown)
    shown = (
        "Column of a prompt's category, e.g. its subject: results are given for each, too, and {category} stands for "
    )
    add("--category_column", help=shown + "it in paths of --candidates and --reference_images.")
    add("--prompt_split", default="test", help="Split of the hub data set.")
    add("--max_prompts", type=count, help="Use only the first prompts.")
    add("--images_per_prompt", type=count, default=1, help="Images of each prompt.")
    add("--batch_size", type=count, default=4, help="Images per process and forward pass.")
    add("--output_dir", type=PATH, default="evaluation", help="Folder for everything that the run writes.")
    named = {"nargs": "+", "type": named_source, "default": []}
    shown = "Folders of images named by prompt and image, 00012_0.png, or as hpsv2 names them, CATEGORY/00012.jpg. "
    shown += "Without a base pipeline, the first is the base."
    add("--images", **named, metavar="NAME=FOLDER", help=shown)

    add = parser.add_argument_group("drawing").add_argument
    add("--pretrained_model_name_or_path", type=PATH, help="Base SDXL model, called `base`: hub id or local folder.")
    add("--pretrained_vae_model_name_or_path", type=PATH, help="VAE of all, e.g. madebyollin/sdxl-vae-fp16-fix.")
    add("--variant", help="Variant of the base pipeline's weights, e.g. fp16.")
    shown = "Models to compare with the base: UNets, LoRAs or pipelines; hub ids or local folders, e.g. of training; "
    shown += "a LoRA may also be a .safetensors file. NAME=UNET+LORA is a LoRA that was trained on another UNet."
    add("--candidates", **named, metavar="NAME=PATH", help=shown)
    schedulers = [f"{kind}Scheduler" for kind in SCHEDULERS]
    add("--scheduler", choices=schedulers, help="Scheduler of all models. Without it, the base's.")
    add("--num_inference_steps", type=count, default=50, help="Denoising steps.")
    add("--guidance_scale", type=float, default=5.0, help="Classifier-free guidance.")
    add("--resolution", type=count, default=1024, help="Side of the images in pixels.")
    add("--seed", type=int, default=0, help="Seed of the images' noise.")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="Without it, accelerate's setting.")
    add("--compile", action="store_true", help="Compile the UNet's transformer blocks to reduce CPU overhead.")


def add_scorer_arguments(parser):
    shown = "A weights file is given as a path or as HUB_ID/FILE, any other source as a hub id or local folder."
    add = parser.add_argument_group("scores", shown).add_argument
    add(
        "--scorers",
        nargs="+",
        choices=[*SOURCES, "hps_no_antialias"],
        default=DEFAULT_SCORERS,
        help="Scores to compute.",
    )
    add("--reference_images", type=PATH, help="Local folder of the subject's images, for dinov2.")
    for name, sources in SOURCES.items():
        for part, source in sources.items():
            add(f"--{name}_{part}", type=PATH, default=source, help=f"Source of {name}.")


def parse_args(input_args=None):
    """Parse the command line (or `input_args`); a wrong use stops with one sentence that names the flag."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage="accelerate launch %(prog)s --pretrained_model_name_or_path MODEL --candidates NAME=PATH [...]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add_image_arguments(parser)
    add_scorer_arguments(parser)
    args = parser.parse_args(input_args)
    path = args.pretrained_model_name_or_path
    if path is not None and path.endswith(".safetensors"):
        parser.error(
            "--pretrained_model_name_or_path is a single file, convert it first: "
            f"python convert_sdxl.py single_file {path} FOLDER"
        )
    args.scorers = list(dict.fromkeys(args.scorers))
    base = [] if args.pretrained_model_name_or_path is None else [("base", None)]
    names = [name for name, _ in base + args.candidates + args.images]
    rules = [
        (not names, "give --pretrained_model_name_or_path to draw images, or --images to score existing ones"),
        (args.candidates and not base, "--candidates needs --pretrained_model_name_or_path to compare with"),
        (len(set(names)) < len(names), f"--candidates and --images need different names, not {', '.join(names)}"),
        (args.resolution % 8 != 0, "--resolution must be a multiple of 8"),
        (args.seed < 0, "--seed must be at least 0"),
        (not 0 <= args.guidance_scale < math.inf, "--guidance_scale must be a number of at least 0"),
        ("dinov2" in args.scorers and not args.reference_images, "--scorers dinov2 needs --reference_images"),
    ]
    by_category = [path for _, path in args.candidates] + [args.reference_images or ""]
    rules += [
        (CATEGORY in path and not args.category_column, f"{CATEGORY} in a path needs --category_column")
        for path in by_category
    ]
    needed = [(name, PACKAGES[name]) for name in args.scorers if name in PACKAGES]
    rules += [(not find_spec(package), f"--scorers {name} needs: pip install {package}") for name, package in needed]
    for broken, sentence in rules:
        if broken:
            parser.error(sentence)
    return args


if __name__ == "__main__":
    ARGUMENTS = parse_args()


import datasets
import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.logging import get_logger
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
from torch import nn
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


# Errors and files ----------------------------------------------------------------------------------------------------


class EvaluationError(Exception):
    """A wrong use or a fault that one sentence explains; the command line prints that sentence alone."""


@contextlib.contextmanager
def naming(subject, fault="cannot be loaded"):
    """Turn any error into an EvaluationError that names the flag or file at fault, and gives the reason."""
    try:
        yield
    except EvaluationError:
        raise
    # Broken files raise most of the built-in exceptions.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise EvaluationError(f"{subject} {fault}: {reason}") from error


@contextlib.contextmanager
def failing_together():
    """Raise an EvaluationError of one process on all of them; none leaves before all have arrived."""
    problem = None
    try:
        yield
    except EvaluationError as error:
        problem = str(error)
    problem = next(filter(None, gather_object([problem])), None)
    if problem is not None:
        raise EvaluationError(problem)


def decided_once(accelerator, decide):
    """The value of `decide()` on the main process, for all: no two processes see different files."""
    value = [None]
    with failing_together():
        if accelerator.is_main_process:
            value = [decide()]
    return broadcast_object_list(value)[0]


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif")


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


def digest(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def file_digest(path):
    """SHA-256 of a file's content."""
    content = hashlib.sha256()
    with naming(path, "cannot be read"), open(path, "rb") as file:
        for block in iter(partial(file.read, 2**24), b""):
            content.update(block)
    return content.hexdigest()[:16]


def version_of(source, file, name, weights=()):
    """The commit of a hub id; of a local folder, a digest of the weights' content, or of the file `name` itself."""
    if not Path(source).exists():
        return file.parents[len(Path(name).parts) - 1].name
    return digest([file_digest(path) for path in sorted(weights) or [file]])


def load_complete(architecture, source, **options):
    """`from_pretrained`, but weights that are missing are an error: the libraries would initialize them at random."""
    model, info = architecture.from_pretrained(source, use_safetensors=True, output_loading_info=True, **options)
    missing = info["missing_keys"]
    if missing:
        raise ValueError(f"{options.get('subfolder') or 'it'} lacks {len(missing)} weights, e.g. {min(missing)}")
    return model


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


def read_image(path):
    """An image in RGB; EvaluationError if it cannot be decoded."""
    with naming(f"Image {path}", "cannot be read, fix or delete it"):
        return decode_image(path)


def write_whole(path, write):
    """Call `write(path)` on a hidden neighbour that then takes the path's place, so nobody sees half a file."""
    aside = path.with_name(f".incomplete-{path.name}")
    with naming(f"--output_dir: {path}", "cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        os.replace(aside, path)


def write_text(path, text):
    write_whole(path, partial(Path.write_text, data=text, encoding="utf-8"))


def in_batches(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]


# Prompts and models --------------------------------------------------------------------------------------------------


# Source, split, and columns of prompt and category, of each known prompt set. HPDv2 (arXiv 2306.09341) is a list of
# prompts for each style.
HPDV2 = {s: f"hf://datasets/zhwang/HPDv2/benchmark/{s}.json" for s in ("anime", "concept-art", "paintings", "photo")}
PROMPT_SETS = {
    "pickapic_v2": ("yuvalkirstain/pickapic_v2_no_images", "test_unique", "caption", None),
    "partiprompts": ("nateraw/parti-prompts", "train", "Prompt", "Category"),
}
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


class Prompt(NamedTuple):
    """What is drawn, what scorers read, the category, and the prompt's number within its category."""

    text: str
    scored: str
    category: str | None
    number: int


def read_rows(args):
    """Yield text, text for scorers, and category."""
    if args.prompts == "hpdv2":
        for style, file in HPDV2.items():
            for row in stream_prompts(file, "train", {"--prompt_column": "text"}):
                yield row["--prompt_column"], row["--prompt_column"], style
        return

    source = args.prompts
    split = args.prompt_split
    columns = {
        "--prompt_column": args.prompt_column,
        "--scoring_prompt_column": args.scoring_prompt_column,
        "--category_column": args.category_column,
    }
    if args.prompts in PROMPT_SETS:
        source, split, columns["--prompt_column"], columns["--category_column"] = PROMPT_SETS[args.prompts]

    columns = {flag: name for flag, name in columns.items() if name is not None}
    for row in stream_prompts(source, split, columns):
        text = row["--prompt_column"]
        category = None
        if "--category_column" in row:
            category = str(row["--category_column"])
        yield text, row.get("--scoring_prompt_column", text), category


def read_prompts(args):
    """The first --max_prompts prompts; EvaluationError if there are none, or one is not text."""
    with naming(f"--prompts {args.prompts}"):
        rows = list(itertools.islice(read_rows(args), args.max_prompts))
    while rows and rows[-1][0] == "":
        rows.pop()
    if not rows:
        raise EvaluationError(f"--prompts {args.prompts} holds no prompt.")
    seen, prompts = {}, []
    for i, (text, scored, category) in enumerate(rows):
        if not all(isinstance(words, str) and words.strip() for words in (text, scored)):
            raise EvaluationError(f"--prompts {args.prompts}: row {i} is empty or not text.")
        prompts.append(Prompt(text, scored, category, seen.get(category, 0)))
        seen[category] = prompts[-1].number + 1
    return prompts


class Model(NamedTuple):
    """What draws: `load` makes a pipeline of `source`; `version` tells its weights."""

    kind: str
    load: object
    source: str
    version: str


class System(NamedTuple):
    """
    A set of images under evaluation; messages call it `shown`, `folder` holds it, and `models` draw it: {category:
    Model}, or {None: Model} if one model draws all. Images that exist already have no models.
    """

    name: str
    shown: str
    folder: Path
    models: dict

    def image(self, prompts, place):
        """Path of an image, by the numbers of its prompt and of the image among those of the prompt."""
        i, number = place
        paths = [self.folder / f"{i:05d}_{number}{suffix}" for suffix in IMAGE_SUFFIXES]
        if not self.models and prompts[i].category and number == 0:
            # The layout of hpsv2.
            hpsv2 = self.folder / prompts[i].category
            paths += [hpsv2 / f"{prompts[i].number:05d}{suffix}" for suffix in IMAGE_SUFFIXES]
        return next((path for path in paths if path.exists()), paths[0])


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


def load_base(args, *_, **parts):
    return load_sdxl(args.pretrained_model_name_or_path, args.variant, **parts)


# What models must have in common to be sampled by one scheduler, with the defaults of configs that lack it.
SCHEDULE = {
    "prediction_type": "epsilon",
    "beta_start": None,
    "beta_end": None,
    "beta_schedule": None,
    "rescale_betas_zero_snr": False,
}


def load_whole(args, source, **parts):
    """Another pipeline, which must fit the base's scheduler."""
    own = EulerDiscreteScheduler.load_config(source, subfolder="scheduler")
    base = EulerDiscreteScheduler.load_config(args.pretrained_model_name_or_path, subfolder="scheduler")
    for key, default in SCHEDULE.items():
        if own.get(key, default) != base.get(key, default):
            raise ValueError(
                f"its scheduler's {key} is {own.get(key, default)}, not {base.get(key, default)} as in the base"
            )
    return load_sdxl(source, **parts)


def load_with_unet(args, source, subfolder=None, **parts):
    """The base with this UNet, which must take the base's latents and prompts."""
    unet = load_complete(UNet2DConditionModel, source, subfolder=subfolder, dtype=parts["dtype"])
    base = UNet2DConditionModel.load_config(args.pretrained_model_name_or_path, subfolder="unet")
    for key in ("cross_attention_dim", "in_channels"):
        if unet.config[key] != base[key]:
            raise ValueError(f"its {key} is {unet.config[key]}, not {base[key]} as in the base")
    return load_base(args, unet=unet, **parts)


def load_with_lora(args, source, **parts):
    """The base with this LoRA."""
    pipeline = load_base(args, **parts)
    add_lora(pipeline, read_lora(find_lora(source), pipeline.unet.config))
    return pipeline


def load_with_unet_and_lora(args, source, unet, lora, **parts):
    """The base with another UNet, or another pipeline, and with a LoRA."""
    pipeline = unet.load(args, unet.source, **parts)
    add_lora(pipeline, read_lora(find_lora(lora.source), pipeline.unet.config))
    return pipeline


# The first of these files that a model holds tells its kind, and who makes a pipeline of it on the CPU.
BASE = {"model_index.json": ("base", load_base)}
CANDIDATES = {
    "model_index.json": ("pipeline", load_whole),
    "unet/config.json": ("unet", partial(load_with_unet, subfolder="unet")),
    LORA_FILE: ("lora", load_with_lora),
    "config.json": ("unet", load_with_unet),
}
# The two parts of UNET+LORA.
UNETS = {name: kind for name, kind in CANDIDATES.items() if name != LORA_FILE}
LORAS = {LORA_FILE: CANDIDATES[LORA_FILE]}


def find_model(source, shown, kinds):
    """The Model of a folder, file or hub id; EvaluationError if it is of no known kind."""
    for name, (kind, load) in kinds.items():
        weights = []
        if kind == "lora":
            file = find_lora(source)
        elif source.endswith(".safetensors"):
            continue
        else:
            file = find_file(source, name)
        if file is None:
            continue
        if kind in ("base", "pipeline"):
            weights = file.parent.glob("*/*.safetensors")
        elif kind == "unet":
            weights = file.parent.glob("*.safetensors")
        return Model(kind, load, source, version_of(source, file, name, weights))
    raise EvaluationError(f"{shown} is no folder or reachable hub id with one of {', '.join(kinds)}.")


def find_candidate(args, name, source):
    """The Model of --candidates NAME=PATH, or of NAME=UNET+LORA if no path is called so."""
    shown = f"--candidates {name}={source}"
    if "+" in source and not Path(source).exists():
        unet_source, _, lora_source = source.rpartition("+")
        unet = find_model(unet_source, f"{shown}: {unet_source}", UNETS)
        lora = find_model(lora_source, f"{shown}: {lora_source}", LORAS)
        load = partial(load_with_unet_and_lora, unet=unet, lora=lora)
        return Model("unet and lora", load, source, digest([unet.version, lora.version]))

    model = find_model(source, shown, CANDIDATES)
    if model.kind == "lora":
        with naming(shown):
            unet = read_lora_config(find_lora(source)).get("unet.base_model_name_or_path")
        if unet not in (None, "", args.pretrained_model_name_or_path):
            logger.warning(f"{shown} was trained on another UNet, with which it is {name}={unet}+{source}.")
    return model


def find_vae(source):
    """The version of --pretrained_vae_model_name_or_path; EvaluationError if there is none."""
    file = find_file(source, "config.json")
    if file is None:
        raise EvaluationError(
            f"--pretrained_vae_model_name_or_path {source} is no folder or reachable hub id with config.json."
        )
    return version_of(source, file, "config.json", file.parent.glob("*.safetensors"))


def find_systems(args, prompts):
    """All that is evaluated, the base first."""
    systems = []
    images = Path(args.output_dir) / "images"
    base = args.pretrained_model_name_or_path
    if base is not None:
        shown = f"--pretrained_model_name_or_path {base}"
        systems.append(System("base", shown, images / "base", {None: find_model(base, shown, BASE)}))
    for name, source in args.candidates:
        categories = [None]
        if CATEGORY in source:
            categories = dict.fromkeys(prompt.category for prompt in prompts)
        models = {c: find_candidate(args, name, source.replace(CATEGORY, str(c))) for c in categories}
        systems.append(System(name, f"--candidates {name}={source}", images / name, models))
    for name, folder in args.images:
        systems.append(System(name, f"--images {name}={folder}", Path(folder), {}))
    return systems


# Drawing -------------------------------------------------------------------------------------------------------------


def load_shared_parts(args, accelerator):
    """The scheduler, the VAE and the dtype of all pipelines, as options of `from_pretrained`."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    parts = {"dtype": dtype}
    if dtype == torch.float32 and accelerator.device.type != "cpu":
        logger.warning("Images are drawn in float32; --mixed_precision bf16 is faster and takes half of the memory.")
    base, vae = args.pretrained_model_name_or_path, args.pretrained_vae_model_name_or_path
    if vae is not None:
        with naming(f"--pretrained_vae_model_name_or_path {vae}"):
            parts["vae"] = load_complete(AutoencoderKL, vae, dtype=dtype)
    with naming(f"--pretrained_model_name_or_path {base}"):
        config = EulerDiscreteScheduler.load_config(base, subfolder="scheduler")
        if args.scheduler is not None and "beta_start" not in config:
            raise EvaluationError(f"--scheduler {args.scheduler} does not fit {base}, whose scheduler has no betas.")
        parts["scheduler"] = getattr(diffusers, args.scheduler or config["_class_name"]).from_config(config)
    try_scheduler(parts["scheduler"], args.num_inference_steps)
    return parts


def describe(system):
    """The kind, source and version of a system's models."""
    if not system.models:
        return {"kind": "images", "source": str(system.folder)}
    models = {c: {"kind": m.kind, "source": m.source, "version": m.version} for c, m in system.models.items()}
    return models.get(None, models)


def collect_settings(args, systems, prompts, scorers, parts, vae):
    """The flags, and all else that the results depend on."""
    settings = {
        **vars(args),
        "num_prompts": len(prompts),
        "num_distinct_prompts": len({prompt.text for prompt in prompts}),
        "models": {system.name: describe(system) for system in systems},
        "scorer_versions": scorers,
        "versions": {library.__name__: library.__version__ for library in (torch, diffusers, transformers)},
    }
    if parts:
        settings["vae"] = vae
        settings["dtype"] = str(parts["dtype"])
        settings["scheduler"] = type(parts["scheduler"]).__name__
        settings["scheduler_config"] = json.loads(parts["scheduler"].to_json_string())
    return settings


def image_settings(settings, systems, system, prompts):
    """
    What the images of one system depend on. Batches, processes and the libraries' versions only move their rounding.
    """
    names = ["vae", "variant", "seed", "num_inference_steps", "guidance_scale"]
    names += ["resolution", "dtype", "scheduler", "scheduler_config"]
    versions = {name: {str(c): m.version for c, m in s.models.items()} for name, s in systems.items()}
    return {
        "settings": {name: settings[name] for name in names},
        "base": versions["base"],
        "model": versions[system.name],
        "prompt": {str(i): prompt.text for i, prompt in enumerate(prompts)},
        "libraries": settings["versions"],
    }


def check_settings(system, now):
    """Refuse to mix images of different settings; returns those of images drawn before and now."""
    path = system.folder / "settings.json"
    with naming(path):
        drawn = path.exists() and any(system.folder.glob("*.png"))
        before = json.loads(path.read_text(encoding="utf-8")) if drawn else now
        merged = {part: {**before[part], **now[part]} for part in now}
    for part in ("settings", "base", "model", "prompt"):
        for name, value in now[part].items():
            was = before[part].get(name, value)
            if was != value:
                # The None is the category of a model that draws all.
                what = name if part == "settings" else f"{part} {name}".removesuffix(" None")
                change = f"another {what} ({was}, now {value})"
                raise EvaluationError(f"{system.folder} was drawn with {change}: delete it or change --output_dir.")
    if before["libraries"] != now["libraries"]:
        logger.warning(f"{system.folder} was begun with {before['libraries']}, now {now['libraries']}.")
    return merged


def image_seed(seed, prompt, number):
    """The seed of one image's noise, from --seed, the prompt's number and the image's number among those of it."""
    return int(np.random.SeedSequence([seed, prompt, number]).generate_state(1, np.uint64)[0])


def draw_images(args, pipeline, prompts, places):
    """Images of the places [(prompt's number, image's number)]; each has its own noise, wherever it is drawn."""
    options = {name: getattr(args, name) for name in ("num_inference_steps", "guidance_scale")}
    options["generator"] = [torch.Generator().manual_seed(image_seed(args.seed, *place)) for place in places]
    texts = [prompts[i].text for i, _ in places]
    pixels = pipeline(texts, height=args.resolution, width=args.resolution, output_type="pt", **options).images

    # As images, they would be black.
    if not pixels.isfinite().all():
        raise ValueError(
            f"NaN in {pipeline.unet.dtype}, try --mixed_precision bf16 or another --pretrained_vae_model_name_or_path"
        )
    return pipeline.image_processor.numpy_to_pil(pipeline.image_processor.pt_to_numpy(pixels))


def load_pipeline(args, system, model, parts):
    """The pipeline of a system's model, on the CPU."""
    with naming(system.shown):
        return model.load(args, model.source, **parts)


def draw_batches(args, accelerator, system, model, prompts, batches, parts):
    """Draw these batches of places and write the images that do not exist yet."""
    pipeline = load_pipeline(args, system, model, parts).to(accelerator.device)
    pipeline.vae.enable_slicing()
    if args.compile:
        # Blocks are compiled for each shape. Past the limit, they would run eagerly. What was compiled for the model
        # before this one would be used again, without the hooks by which a LoRA is applied.
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = 64
        pipeline.unet.compile_repeated_blocks(dynamic=False)
    pipeline.set_progress_bar_config(disable=True)
    for batch in tqdm(batches, desc=f"Drawing {system.name}", disable=not accelerator.is_local_main_process):
        with naming(system.shown, "generates no images"):
            images = draw_images(args, pipeline, prompts, batch)
        for place, image in zip(batch, images, strict=True):
            path = system.image(prompts, place)
            if not path.exists():
                # Level 1 takes a quarter of the time of the default.
                write_whole(path, partial(image.save, format="PNG", compress_level=1))


def draw_missing(args, accelerator, systems, prompts, places, settings, parts):
    """Draw missing images. Batches are those of a run from the start, so an interruption changes no image."""
    jobs, named = [], {system.name: system for system in systems}
    # No process writes before all have looked.
    with failing_together():
        for system in systems:
            used = check_settings(system, image_settings(settings, named, system, prompts))
            for category, model in system.models.items():
                its_places = [place for place in places if category in (None, prompts[place[0]].category)]
                batches = in_batches(its_places, args.batch_size)
                batches = [b for b in batches if not all(system.image(prompts, place).exists() for place in b)]
                jobs.append((system, used, model, batches))

    # Load every model once: if one cannot be loaded, images of the models before it would be generated in vain.
    with failing_together():
        if accelerator.is_main_process:
            for system, _, model, batches in jobs:
                if batches:
                    load_pipeline(args, system, model, parts)

    for system, used, model, batches in jobs:
        with failing_together():
            if accelerator.is_main_process:
                write_text(system.folder / "settings.json", json.dumps(used, indent=2))
            mine = batches[accelerator.process_index :: accelerator.num_processes]
            if mine:
                draw_batches(args, accelerator, system, model, prompts, mine, parts)
        accelerator.free_memory()


def list_records(systems, prompts, places):
    """A record for each image; EvaluationError if all images of a system are those of the first one."""
    records, seen = [], {}
    for system in systems:
        for i, number in places:
            prompt, file = prompts[i], system.image(prompts, (i, number))
            record = {"model": system.name, "prompt_index": i, "image": number, "prompt": prompt.text}
            record |= {} if prompt.scored == prompt.text else {"scored_prompt": prompt.scored}
            record |= {} if prompt.category is None else {"category": prompt.category}
            records.append({**record, "file": str(file), "sha256": file_digest(file)})
            seen.setdefault(system.name, []).append(records[-1]["sha256"])
        if system is not systems[0] and seen[system.name] == seen[systems[0].name]:
            same = f"all {len(places)} images are those of {systems[0].name}"
            raise EvaluationError(f"{system.shown}: {same}, so there is nothing to compare.")
    return records


# Scores --------------------------------------------------------------------------------------------------------------


def references_of(args, category):
    """The folder of a subject's images."""
    return args.reference_images.replace(CATEGORY, str(category))


def read_weights(source):
    return torch.load(find_file(*os.path.split(source)), map_location="cpu", weights_only=True)


class Scorer:
    """
    A published model. `score(images, prompts)` takes N PIL images in RGB and N strings, and returns [N] scores.

    Images pass through Pillow whatever else is installed, and texts are padded to one length, so that a score depends
    neither on the machine nor on the batch. All is float32.

    Keyword arguments give other hub ids, folders or files than the class's `sources`.
    """

    sources = {}
    # Files that each source must have; the first found of those in a tuple.
    files = {"model": ("model.safetensors", "model.safetensors.index.json")}
    architecture = CLIPModel
    reads_text = True

    def __init__(self, device, **sources):
        if not sources.keys() <= self.sources.keys():
            raise TypeError(f"{type(self).__name__} takes {', '.join(self.sources)}, not {', '.join(sources)}")
        self.device, self.sources, self.texts = device, {**self.sources, **sources}, {}
        self.model = self.load_model().eval().requires_grad_(False).to(device)
        source = self.sources.get("processor") or self.sources["model"]
        self.image_processor = self.load_image_processor(source)
        self.tokenizer = AutoTokenizer.from_pretrained(source) if self.reads_text else None
        if self.reads_text and len(self.tokenizer) == len(self.tokenizer.all_special_ids):
            raise ValueError(f"the tokenizer of {source} has no vocabulary")

    def load_model(self):
        return load_complete(self.architecture, self.sources["model"], dtype=torch.float32)

    def load_image_processor(self, source):
        return AutoImageProcessor.from_pretrained(source, backend="pil")

    def max_tokens(self):
        return self.model.config.text_config.max_position_embeddings

    def to_pixels(self, images):
        """[N, 3, H, W], normalised."""
        return self.image_processor(images, return_tensors="pt").pixel_values

    def embed_images(self, images):
        """Unit vectors [N, D] of N images."""
        pixels = self.to_pixels(images).to(self.device)
        return F.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)

    def tokenize(self, prompts):
        """The tokens of N texts, each cut after as many as the model was trained with."""
        options = {"padding": "max_length", "truncation": True, "max_length": self.max_tokens()}
        return self.tokenizer(prompts, **options, return_tensors="pt").to(self.device)

    def embed_texts(self, prompts):
        """Unit vectors [N, D] of N texts."""
        ids = self.tokenize(prompts).input_ids
        return F.normalize(self.model.get_text_features(input_ids=ids).pooler_output, dim=-1)

    def cosines(self, images, prompts):
        """[N] cosines of N images with their own prompts; each text is embedded once, and alone."""
        for prompt in prompts:
            if prompt not in self.texts:
                self.texts[prompt] = self.embed_texts([prompt])[0]
        return (self.embed_images(images) * torch.stack([self.texts[prompt] for prompt in prompts])).sum(dim=-1)


class PickScore(Scorer):
    """exp(logit_scale) x cosine, about 22 for SDXL (arXiv 2305.01569, model card of yuvalkirstain/PickScore_v1)."""

    sources = SOURCES["pickscore"]

    def score(self, images, prompts):
        return self.model.logit_scale.exp() * self.cosines(images, prompts)


class CLIP(Scorer):
    """max(100 x cosine, 0) (arXiv 2104.08718, with the factor 100 of torchmetrics)."""

    sources = SOURCES["clip"]

    def score(self, images, prompts):
        return (100 * self.cosines(images, prompts)).clamp(min=0)


# Where open_clip's names of a CLIP model's weights differ from those of transformers, in the order of replacement.
OPEN_CLIP_NAMES = (
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
)


def from_open_clip(weights):
    """The weights of an open_clip CLIP model under the names of transformers' CLIPModel."""
    converted = {}
    for name, weight in weights.items():
        for pattern, replacement in OPEN_CLIP_NAMES:
            name = re.sub(pattern, replacement, name)
        if ".in_proj_" in name:
            for part, rows in zip("qkv", weight.chunk(3), strict=True):
                converted[name.replace("in_proj_", f"{part}_proj.")] = rows
        else:
            # A projection is stored as the right factor, where a linear layer holds its transpose.
            converted[name] = weight.T if name.endswith("_projection.weight") else weight
    return converted


def fit_into_square(image, side, antialias):
    """[3, side, side] from 0 to 1: the image brought to `side` pixels in the longer direction, centred on black."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    height, width = (round(length * side / max(image.size)) for length in pixels.shape[-2:])
    pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=antialias)
    left, top = (side - width) // 2, (side - height) // 2
    return F.pad(pixels, (left, side - width - left, top, side - height - top))[0]


class HPS(Scorer):
    """
    Human Preference Score v2.1: 100 x cosine, about 30 for SDXL (arXiv 2306.09341, github.com/tgxs002/HPSv2).

    The weights are those of open_clip's ViT-H-14; `model` gives the same architecture's config and vocabulary. The
    model sees the whole image, fitted into a black square, where CLIP would cut out its centre, and texts are fixed as
    by open_clip. HPSv2 itself computes in float16.
    """

    sources = SOURCES["hps"]
    files = {}
    antialias = True

    def load_model(self):
        config = CLIPConfig.from_pretrained(self.sources["model"])
        weights = from_open_clip(read_weights(self.sources["weights"])["state_dict"])
        return load_complete(self.architecture, None, config=config, state_dict=weights, dtype=torch.float32)

    def to_pixels(self, images):
        side = self.model.config.vision_config.image_size
        mean, std = (torch.tensor(getattr(self.image_processor, f"image_{name}")) for name in ("mean", "std"))
        pixels = torch.stack([fit_into_square(image, side, self.antialias) for image in images])
        return (pixels - mean[:, None, None]) / std[:, None, None]

    def embed_texts(self, prompts):
        import ftfy

        return super().embed_texts([html.unescape(html.unescape(ftfy.fix_text(prompt))) for prompt in prompts])

    def score(self, images, prompts):
        return 100 * self.cosines(images, prompts)


class HPSWithoutAntialias(HPS):
    """
    HPS v2.1 with the resize that it was trained and its tables were made with: torchvision turned antialiasing on in
    0.17, under HPSv2's code. Users measure 28.7 with it where HPSv2's README, from before, says 30.6.
    """

    antialias = False


def linear_head(weights):
    """From 768 numbers to one: linear layers without activations (dropout between them in training)."""
    head = nn.Sequential(
        *(nn.Linear(768, 1024), nn.Identity(), nn.Linear(1024, 128), nn.Identity()),
        *(nn.Linear(128, 64), nn.Identity(), nn.Linear(64, 16), nn.Linear(16, 1)),
    )
    head.load_state_dict({name.removeprefix("layers."): weight for name, weight in weights.items()})
    return head.requires_grad_(False)


class Aesthetic(Scorer):
    """
    The LAION aesthetic predictor, about 5 to 7: linear layers on the unit vector of CLIP ViT-L/14
    (github.com/christophschuhmann/improved-aesthetic-predictor, `sac+logos+ava1-l14-linearMSE.pth`). The prompt plays
    no part.
    """

    sources = SOURCES["aesthetic"]
    reads_text = False

    def __init__(self, device, **sources):
        super().__init__(device, **sources)
        self.head = linear_head(read_weights(self.sources["weights"])).to(device)

    def score(self, images, prompts):
        return self.head(self.embed_images(images))[:, 0]


class SigLIP(Scorer):
    """100 x sigmoid(exp(logit_scale) x cosine + logit_bias): how probably they match (arXiv 2303.15343)."""

    sources = SOURCES["siglip"]
    architecture = SiglipModel

    def score(self, images, prompts):
        logits = self.model.logit_scale.exp() * self.cosines(images, prompts) + self.model.logit_bias
        return 100 * logits.sigmoid()


class DINOv2(Scorer):
    """
    100 x the mean cosine of the CLS vectors of an image and each of the images in a folder: the subject fidelity of
    DreamBooth (arXiv 2208.12242) with DINOv2 in place of DINO. The prompt plays no part.
    """

    sources = SOURCES["dinov2"]
    architecture = Dinov2Model
    reads_text = False

    def __init__(self, device, reference_images, **sources):
        super().__init__(device, **sources)
        self.references = self.embed_images([read_image(path) for path in find_images(reference_images)[0]])

    def embed_images(self, images):
        pixels = self.to_pixels(images).to(self.device)
        return F.normalize(self.model(pixel_values=pixels).last_hidden_state[:, 0], dim=-1)

    def score(self, images, prompts):
        return 100 * (self.embed_images(images) @ self.references.T).mean(dim=1)


# Where BLIP's names of a vision model's weights differ from those of transformers, in the order of replacement.
BLIP_NAMES = {"^cls_token": "embeddings.class_embedding", "^pos_embed": "embeddings.position_embedding"}
BLIP_NAMES |= {r"^patch_embed\.proj": "embeddings.patch_embedding", "^norm": "post_layernorm"}
BLIP_NAMES |= {r"^blocks\.": "encoder.layers.", r"\.norm": ".layer_norm", r"\.attn\.": ".self_attn."}
BLIP_NAMES |= {r"self_attn\.proj\.": "self_attn.projection."}


class ImageReward(Scorer):
    """
    ImageReward v1.0, of mean 0 and standard deviation 1 on its training images (arXiv 2304.05977,
    github.com/zai-org/ImageReward): BLIP's text encoder reads the prompt and looks at the image, and linear layers
    judge its first vector. The sizes are those of the weights; `processor` gives the vocabulary.
    """

    sources = SOURCES["imagereward"]
    mean, std = 0.16717362830052426, 1.0333394966054072

    def load_model(self):
        weights, parts = read_weights(self.sources["weights"]), []
        for prefix in ("blip.visual_encoder.", "blip.text_encoder.", "mlp."):
            part = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
            parts.append({name: weight for name, weight in part.items() if not name.endswith("position_ids")})
        vision, text, head = parts
        for old, new in BLIP_NAMES.items():
            vision = {re.sub(old, new, name): weight for name, weight in vision.items()}
        width, _, patch, _ = vision["embeddings.patch_embedding.weight"].shape
        side = patch * math.isqrt(vision["embeddings.position_embedding"].shape[1] - 1)
        eyes = {"hidden_size": width, "num_attention_heads": width // 64, "image_size": side, "patch_size": patch}
        eyes["intermediate_size"] = len(vision["encoder.layers.0.mlp.fc1.bias"])
        eyes["num_hidden_layers"] = sum(name.endswith("fc1.bias") for name in vision)
        words, hidden = text["embeddings.word_embeddings.weight"].shape
        reader = {"vocab_size": words, "hidden_size": hidden, "num_attention_heads": hidden // 64}
        reader["intermediate_size"] = len(text["encoder.layer.0.intermediate.dense.bias"])
        reader["num_hidden_layers"] = sum(name.endswith("intermediate.dense.bias") for name in text)
        reader["max_position_embeddings"] = len(text["embeddings.position_embeddings.weight"])
        eyes = {"config": BlipVisionConfig(**eyes, layer_norm_eps=1e-6), "state_dict": vision}
        reader = {"config": BlipTextConfig(**reader, encoder_hidden_size=width), "state_dict": text}
        reader["add_pooling_layer"] = False
        models = [load_complete(BlipVisionModel, None, **eyes), load_complete(BlipTextModel, None, **reader)]
        return nn.ModuleList([*models, linear_head(head)]).float()

    def load_image_processor(self, source):
        side = self.model[0].config.image_size
        return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=side)

    def max_tokens(self):
        return 35

    def score(self, images, prompts):
        vision, text, head = self.model
        patches = vision(pixel_values=self.to_pixels(images).to(self.device)).last_hidden_state
        tokens = self.tokenize(prompts)
        inputs = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
        states = text(**inputs, encoder_hidden_states=patches).last_hidden_state
        return (head(states[:, 0])[:, 0] - self.mean) / self.std


SCORERS = {"pickscore": PickScore, "hps": HPS, "aesthetic": Aesthetic, "clip": CLIP, "siglip": SigLIP}
SCORERS |= {"dinov2": DINOv2, "imagereward": ImageReward, "hps_no_antialias": HPSWithoutAntialias}


def sources_of(args, name):
    """{part: (flag, source)} of a scorer."""
    flags = {part: f"{name.removesuffix('_no_antialias')}_{part}" for part in SCORERS[name].sources}
    return {part: (f"--{flag} {getattr(args, flag)}", getattr(args, flag)) for part, flag in flags.items()}


def build_scorer(args, name, device, *references):
    sources = sources_of(args, name)
    with naming(" ".join(shown for shown, _ in sources.values())):
        return SCORERS[name](device, *references, **{part: source for part, (_, source) in sources.items()})


def find_scorers(args, prompts):
    """The version of each scorer's sources; EvaluationError if one lacks a file. So nothing is drawn in vain."""
    versions = {}
    for name in args.scorers:
        versions[name] = {}
        for part, (shown, source) in sources_of(args, name).items():
            folder, file = os.path.split(source) if part == "weights" else (source, "config.json")
            names = (file,) if part == "weights" else SCORERS[name].files.get(part, (file,))
            found = next(((path, file) for file in names if (path := find_file(folder, file))), None)
            if found is None:
                raise EvaluationError(f"{shown}: there is no {names[0]} in this folder or hub id.")
            versions[name][part] = version_of(folder, *found)
    if "dinov2" in args.scorers:
        for folder in dict.fromkeys(references_of(args, prompt.category) for prompt in prompts):
            images, others = find_images(folder)
            if not images:
                raise EvaluationError(f"--reference_images {folder} is not a folder with images that Pillow can open.")
            if others:
                logger.warning(
                    f"--reference_images {folder}: left out {len(others)} files that Pillow cannot open: "
                    f"{', '.join(others)}."
                )
            versions["dinov2"][folder] = digest([file_digest(path) for path in images])
    return versions


def read_ahead(batches):
    """Yield the images of each batch of paths, while the next ones are decoded."""
    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for batch in [*batches, None]:
            ready, ahead = ahead, batch and pool.submit(lambda paths: [read_image(path) for path in paths], batch)
            if ready:
                yield ready.result()


def text_of(record):
    return record.get("scored_prompt", record["prompt"])


def score_records(args, accelerator, name, references, records):
    """{key: score} for {key: record}, computed by all processes and rounded to six decimals."""
    batches = in_batches(list(records), args.batch_size)[accelerator.process_index :: accelerator.num_processes]
    scores = []
    with failing_together():
        # A process of several has "cpu:0", to which weights would be copied: elsewhere in memory the last bits differ.
        device = "cpu" if accelerator.device.type == "cpu" else accelerator.device
        scorer = build_scorer(args, name, device, *references)
        texts = {text_of(record) for record in records.values()} if scorer.reads_text else ()
        long = [text for text in texts if len(scorer.tokenizer(text).input_ids) > scorer.max_tokens()]
        if long:
            logger.warning(f"{name} reads only {scorer.max_tokens()} tokens of {len(long)} prompts.")
        shown = tqdm(batches, desc=f"Scoring {name}", disable=not accelerator.is_local_main_process)
        images = read_ahead([[records[key]["file"] for key in batch] for batch in batches])
        for batch, its_images in zip(shown, images, strict=True):
            values = scorer.score(its_images, [text_of(records[key]) for key in batch])
            scores += zip(batch, values.tolist(), strict=True)
        del scorer
    scores = dict(gather_object(scores))
    accelerator.free_memory()
    for key, record in records.items():
        if not math.isfinite(scores[key]):
            raise EvaluationError(f"{name} gives {scores[key]} to {record['file']}.")
    return {key: round(scores[key], 6) for key in records}


def score_images(args, accelerator, records, versions):
    """Add each scorer's score to the records. Scores are kept in files, by image and prompt, for the next run."""
    # cuDNN would run the convolutions in TF32.
    torch.backends.cudnn.allow_tf32 = False
    for name in args.scorers:
        path, stored = Path(args.output_dir) / "scores" / f"{name}.json", {}
        with failing_together(), naming(path, "cannot be read, delete it"):
            if path.exists():
                stored = json.loads(path.read_text(encoding="utf-8"))
            known = stored["scores"] if stored.get("versions") == versions[name] else {}
        keys, missing = [], {}
        for record in records:
            references = (references_of(args, record.get("category")),) if name == "dinov2" else ()
            keys.append(digest([record["sha256"], text_of(record), references]))
            if keys[-1] not in known:
                missing.setdefault(references, {})[keys[-1]] = record
        for references, its_records in missing.items():
            known |= score_records(args, accelerator, name, references, its_records)
        with failing_together():
            if missing and accelerator.is_main_process:
                write_text(path, json.dumps({"versions": versions[name], "scores": known}, indent=0))
        for record, key in zip(records, keys, strict=True):
            record[name] = known[key]


# Results -------------------------------------------------------------------------------------------------------------


def mean_and_error(scores):
    """The mean of scores [prompts, images of each], and its standard error over prompts, None for a single one."""
    means = scores.mean(axis=1)
    error = float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None
    return float(means.mean()), error


def win_rate(candidate, base):
    """
    The share of images that the candidate wins, ties counting half, and its 95 % confidence interval (Wilson's).
    Scores are [prompts, images of each], of the same seeds. Images of one prompt may agree: how many are worth
    counting, from one to all of each prompt, follows from how far the prompts' shares differ.
    """
    wins = (candidate > base) + 0.5 * (candidate == base)
    prompts, rate, z2 = len(wins), wins.mean(), 1.959964**2
    variance = wins.mean(axis=1).var(ddof=1) / prompts if prompts > 1 else 0
    number = np.clip(rate * (1 - rate) / variance, prompts, wins.size) if variance > 0 else prompts
    centre = (rate + z2 / (2 * number)) / (1 + z2 / number)
    half = math.sqrt(z2 * (rate * (1 - rate) / number + z2 / (4 * number**2))) / (1 + z2 / number)
    # Rounding must not put the rate outside.
    return float(rate), float(min(max(centre - half, 0), rate)), float(max(min(centre + half, 1), rate))


def compare(scores, others):
    """The paired comparison of the scores of two models, [prompts, images of each], of the same seeds."""
    row = dict(zip(("difference", "difference_error"), mean_and_error(scores - others), strict=True))
    row |= {"wins": int((scores > others).sum()), "ties": int((scores == others).sum())}
    row["losses"] = scores.size - row["wins"] - row["ties"]
    return row | dict(zip(("win_rate", "win_rate_low", "win_rate_high"), win_rate(scores, others), strict=True))


def summarize(scorers, names, tables, categories):
    """
    Rows of results: of each scorer and model, the base first; of any two models; of each category, and their mean.
    `tables` is {scorer: [models, prompts, images of each]}, `categories` the category of each prompt.
    """
    results, pairs, by_category = [], [], []
    for scorer in scorers:
        for i, (name, scores) in enumerate(zip(names, tables[scorer], strict=True)):
            row = dict(zip(("mean", "standard_error"), mean_and_error(scores), strict=True))
            row |= compare(scores, tables[scorer][0]) if i else {}
            results.append({"scorer": scorer, "model": name, **row})
            against = [(names[j], compare(scores, tables[scorer][j])) for j in range(1, i)]
            pairs += [{"scorer": scorer, "model": name, "against": other, **row} for other, row in against]
    different = list(dict.fromkeys(categories))
    for i, name in enumerate(names if len(different) > 1 else []):
        # Every category counts the same in their mean, however many prompts it has.
        means = {s: [tables[s][i][np.array(categories) == c].mean() for c in different] for s in scorers}
        for j, category in enumerate(different):
            by_category.append({"category": category, "model": name, **{s: float(means[s][j]) for s in scorers}})
        mean = {s: float(np.mean(means[s])) for s in scorers}
        by_category.append({"category": "mean of categories", "model": name, **mean})
    return {"results": results, "pairs": pairs, "categories": by_category}


def as_table(columns, rows):
    """Rows as a Markdown table of these columns {key: format}; what a row lacks stays empty."""
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        lines.append(["" if row.get(key) is None else format(row[key], spec) for key, spec in columns.items()])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def markdown(scorers, summary, settings):
    """Models and scorers first, as papers print them; then comparisons, categories and settings."""
    models = {}
    for row in summary["results"]:
        models.setdefault(row["model"], {"model": row["model"]})[row["scorer"]] = row["mean"]
    means = dict.fromkeys(scorers, ".3f")
    sources = {
        s: ", ".join(source for _, source in sources_of(argparse.Namespace(**settings), s).values()) for s in scorers
    }
    text = as_table({"model": "", **means}, models.values())
    text += "".join(f"\n- {scorer}: {source}" for scorer, source in sources.items()) + "\n"
    details = {"mean": ".3f", "standard_error": ".3f", "difference": "+.3f", "difference_error": ".3f"}
    compared = {"wins": "", "ties": "", "losses": "", "win_rate": ".1%", "win_rate_low": ".1%", "win_rate_high": ".1%"}
    text += "\n" + as_table({"scorer": "", "model": "", **details, **compared}, summary["results"])
    if summary["pairs"]:
        text += "\n" + as_table({"scorer": "", "model": "", "against": "", **compared}, summary["pairs"])
    if summary["categories"]:
        text += "\n" + as_table({"category": "", "model": "", **means}, summary["categories"])
    return f"{text}\n```json\n{json.dumps(settings, indent=2)}\n```\n"


def tile(record, scorer):
    """An image under its prompt and score."""
    image = Image.new("RGB", (384, 424), "white")
    image.paste(read_image(record["file"]).resize((384, 384)), (0, 40))
    text = f"{record['prompt'][:50]}\n{record['model']}: {scorer} {record[scorer]:.3f}"
    ImageDraw.Draw(image).text((4, 0), text, fill="black", font_size=14)
    return image


def draw_grid(scorer, pairs):
    """A row for each pair of records (base's, candidate's): the four largest wins, then the four largest losses."""
    ordered = sorted(pairs, key=lambda pair: pair[0][scorer] - pair[1][scorer])
    shown = ordered[:4] + ordered[4:][-4:]
    return make_image_grid([tile(record, scorer) for pair in shown for record in pair], len(shown), 2)


def write_results(args, systems, prompts, records, settings):
    """Write scores.jsonl, results.json, results.md and a grid for each candidate, all from the records in order."""
    output_dir = Path(args.output_dir)
    write_text(output_dir / "scores.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    shape = (len(systems), -1, args.images_per_prompt)
    tables = {scorer: np.reshape([record[scorer] for record in records], shape) for scorer in args.scorers}
    names, categories = [system.name for system in systems], [prompt.category for prompt in prompts]
    summary = summarize(args.scorers, names, tables, categories)
    write_text(output_dir / "results.json", json.dumps({**summary, "settings": settings}, indent=2) + "\n")
    write_text(output_dir / "results.md", markdown(args.scorers, summary, settings))
    base, *others = in_batches(records, len(records) // len(systems))
    for system, its_records in zip(systems[1:], others, strict=True):
        grid = draw_grid(args.scorers[0], zip(base, its_records, strict=True))
        write_whole(output_dir / f"grid-{system.name}.png", partial(grid.save, format="PNG"))
    logger.info(f"Wrote {output_dir / 'results.md'}")


def check_inputs(args, systems, prompts, places):
    """Find the given images, the scorers and a place to write before hours are spent on drawing; returns versions."""
    for system in systems:
        paths = [system.image(prompts, place) for place in places if not system.models]
        missing = [path for path in paths if not path.exists()]
        if missing:
            raise EvaluationError(f"{system.shown} lacks {len(missing)} of {len(paths)}, e.g. {missing[0]}")
    with naming(f"--output_dir {args.output_dir}", "cannot be written"):
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.output_dir).close()
    return find_scorers(args, prompts)


def build_accelerator(args):
    with naming(f"--mixed_precision {args.mixed_precision}", "does not work here"):
        # Processes wait for the slowest, which may draw for hours.
        patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))
        accelerator = Accelerator(mixed_precision=args.mixed_precision, kwargs_handlers=[patience])
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", level=logging.INFO)
    for library in (datasets, transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    return accelerator


def main(args):
    accelerator = build_accelerator(args)
    prompts = decided_once(accelerator, partial(read_prompts, args))
    systems = decided_once(accelerator, partial(find_systems, args, prompts))
    places = list(itertools.product(range(len(prompts)), range(args.images_per_prompt)))
    scorers = decided_once(accelerator, partial(check_inputs, args, systems, prompts, places))
    drawn = [system for system in systems if system.models]
    parts = {}
    vae = None  # the base's own
    if drawn and args.pretrained_vae_model_name_or_path is not None:
        vae = decided_once(accelerator, partial(find_vae, args.pretrained_vae_model_name_or_path))
    if drawn:
        parts = load_shared_parts(args, accelerator)
        with naming(f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}"):
            tokenizer = load_tokenizers(args.pretrained_model_name_or_path)["tokenizer"]
        warn_of_long_prompts([prompt.text for prompt in prompts], tokenizer)
    settings = collect_settings(args, systems, prompts, scorers, parts, vae)
    draw_missing(args, accelerator, drawn, prompts, places, settings, parts)
    records = decided_once(accelerator, partial(list_records, systems, prompts, places))
    score_images(args, accelerator, records, scorers)
    with failing_together():
        if accelerator.is_main_process:
            write_results(args, systems, prompts, records, settings)
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main(ARGUMENTS)
    except EvaluationError as error:
        sys.exit(f"error: {error}")
