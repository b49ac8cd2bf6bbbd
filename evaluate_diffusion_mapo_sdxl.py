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
#     "transformers>=5.4",
#     "accelerate>=1.12",
#     "datasets>=5.2",
#     "peft>=0.18",
#     "sentencepiece",
#     "protobuf",
#     "ftfy",
# ]
# ///
"""Draw images with SDXL and its aligned versions, and score them with the preference models of the MaPO paper.

The 500 Pick-a-Pic v2 test prompts, base model against a LoRA and a whole UNet (the prompts of the paper's Table 2):

    accelerate launch evaluate_diffusion_mapo_sdxl.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
        --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix \
        --candidates lora=mapo-lora full=mapo-full --prompts pickapic_v2 --mixed_precision bf16 \
        --output_dir evaluation

Images made elsewhere, `00000_0.png` (prompt 0, image 0), `00001_0.png`, ... in a folder for each model:

    accelerate launch evaluate_diffusion_mapo_sdxl.py --images sdxl=images/sdxl mapo=images/mapo \
        --prompts prompts.txt --output_dir evaluation

Run the same command again to go on where it stopped. `--output_dir` holds `images/NAME/` with its `settings.json`,
`scores.jsonl` (one image a line), `results.md`, `results.json`, and `grid-NAME.png` with the largest wins and losses.
"""

import argparse
import contextlib
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
import textwrap
from datetime import timedelta
from functools import partial
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
from accelerate.utils import gather_object
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import check_min_version
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoTokenizer, CLIPConfig, CLIPModel, Dinov2Model, SiglipModel
from transformers.utils import is_protobuf_available, is_sentencepiece_available


check_min_version("0.36.0")

logger = get_logger(__name__)

# (hub id, column, split) of the known prompt sets; HPDv2 is four files, see `read_hpdv2`.
PROMPT_SETS = {
    "pickapic_v2": ("yuvalkirstain/pickapic_v2_no_images", "caption", "test_unique"),
    "partiprompts": ("nateraw/parti-prompts", "Prompt", "train"),
}
HPDV2_STYLES = ("anime", "concept-art", "paintings", "photo")
PROMPT_FILES = {".csv": "csv", ".jsonl": "json", ".parquet": "parquet"}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LORA_FILE = "pytorch_lora_weights.safetensors"
# What a candidate is, by the first of these files that its folder or hub id holds.
CANDIDATE_FILES = {
    "model_index.json": "pipeline",
    "unet/config.json": "unet",
    LORA_FILE: "lora",
    "config.json": "unet",
}
# What the scorers are made of, each a flag; `_weights` are files, given as a path or as HUB_ID/FILE.
SCORER_SOURCES = {
    "pickscore_model": "yuvalkirstain/PickScore_v1",
    "pickscore_processor": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "hps_model": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "hps_weights": "xswu/HPSv2/HPS_v2.1_compressed.pt",
    "aesthetic_model": "openai/clip-vit-large-patch14",
    "aesthetic_weights": "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth",
    "clip_model": "openai/clip-vit-large-patch14",
    "siglip_model": "google/siglip-so400m-patch14-384",
    "dinov2_model": "facebook/dinov2-base",
}
# Settings of the base that results.md leaves out.
NOT_FACTS = ("pretrained_model_name_or_path", "base_weights", "scheduler_config", "kind", "source", "weights")
BOOTSTRAP_SAMPLES = 2000
# Largest wins, and as many largest losses, that a grid shows.
GRID_ROWS = 4


class EvaluationError(Exception):
    """A wrong use or a fault that one sentence explains; the command line prints that sentence alone."""


def one_line(error):
    return " ".join(str(error).split())


@contextlib.contextmanager
def loading(flag, source):
    """Name the flag and the file or hub id of whatever fails to load."""
    try:
        yield
    except EvaluationError:
        raise
    # One broken file or another raises most of the built-in exceptions.
    except Exception as error:
        reason = one_line(error) or type(error).__name__
        raise EvaluationError(f"--{flag} {source} cannot be loaded: {reason}") from error


def check_complete(missing):
    """Refuse a model whose file lacks weights, which the libraries would draw at random."""
    if missing:
        raise ValueError(f"it lacks {len(missing)} weights, e.g. {min(missing)}")


@contextlib.contextmanager
def failing_together():
    """Turn an EvaluationError of one process or more into one of all."""
    problem = None
    try:
        yield
    except EvaluationError as error:
        problem = str(error)
    problems = [problem for problem in gather_object([problem]) if problem is not None]
    if problems:
        raise EvaluationError(problems[0])


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
SEED = partial(bounded, kind=int, low=0, high=2**32 - 1)
NOT_NEGATIVE = partial(bounded, kind=float, low=0)


def named_source(text):
    """Parse NAME=PATH for argparse."""
    name, _, source = text.partition("=")
    if not source or not re.fullmatch(r"\w[\w.-]*", name):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH with a NAME of letters, digits, '.', '_', '-'")
    return name, source


def add_generation_arguments(group):
    group.add_argument(
        "--pretrained_model_name_or_path", help="Base SDXL pipeline, shown as `base`: hub id or folder."
    )
    group.add_argument(
        "--pretrained_vae_model_name_or_path", help="VAE of all models, e.g. madebyollin/sdxl-vae-fp16-fix."
    )
    group.add_argument("--variant", help="Variant of the base pipeline's weights, e.g. fp16.")
    group.add_argument(
        "--candidates",
        nargs="+",
        type=named_source,
        default=[],
        metavar="NAME=PATH",
        help="Models to compare with the base: UNets (as `unet/` in training's --output_dir), LoRAs, or pipelines; "
        "folders or hub ids.",
    )
    group.add_argument(
        "--scheduler", choices=[kind.name for kind in KarrasDiffusionSchedulers], help="None: the base's."
    )
    group.add_argument("--num_inference_steps", type=COUNT, default=50, help="Denoising steps.")
    group.add_argument("--guidance_scale", type=NOT_NEGATIVE, default=5.0, help="Classifier-free guidance.")
    group.add_argument("--resolution", type=COUNT, default=1024, help="Side of the images in pixels.")
    group.add_argument("--seed", type=SEED, default=0, help="Seed of the images' noise.")
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="None: what accelerate is set to.")


def add_data_arguments(group):
    group.add_argument(
        "--images",
        nargs="+",
        type=named_source,
        default=[],
        metavar="NAME=FOLDER",
        help="Images made already, named by prompt (five digits) and image, both from zero: 00012_0.png. "
        "The first folder is the base if there is no base pipeline.",
    )
    group.add_argument(
        "--prompts",
        required=True,
        help="A .txt with a prompt a line, a .csv, .jsonl or .parquet, pickapic_v2, hpdv2, partiprompts, or a hub id.",
    )
    group.add_argument("--prompt_column", default="prompt", help="Column of the prompts in a file or hub data set.")
    group.add_argument("--prompt_split", default="test", help="Split of the hub data set.")
    group.add_argument("--max_prompts", type=COUNT, help="Use only this many first prompts.")
    group.add_argument("--images_per_prompt", type=COUNT, default=1, help="Images of each prompt.")
    group.add_argument("--reference_images", help="Folder of the subject's images, for --scorers dinov2.")
    group.add_argument("--batch_size", type=COUNT, default=4, help="Images drawn or scored at a time, per process.")
    group.add_argument("--output_dir", default="evaluation", help="Folder of all that is written.")


def add_scorer_arguments(group):
    group.add_argument(
        "--scorers",
        nargs="+",
        choices=list(SCORERS),
        default=["pickscore", "hps", "aesthetic", "clip"],
        help="Scores.",
    )
    for flag, source in SCORER_SOURCES.items():
        kind = "file, or HUB_ID/FILE" if flag.endswith("weights") else "hub id or folder"
        group.add_argument(f"--{flag}", default=source, help=f"A {kind}; %(default)s.")


def parse_args(input_args=None):
    """Parse the command line (or `input_args`), refusing contradictory flags in one sentence."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage="accelerate launch evaluate_diffusion_mapo_sdxl.py --pretrained_model_name_or_path MODEL "
        "--candidates NAME=PATH --prompts PROMPTS [flags, see --help]",
        allow_abbrev=False,
    )
    add_data_arguments(parser.add_argument_group("prompts and images"))
    add_generation_arguments(parser.add_argument_group("generation"))
    add_scorer_arguments(parser.add_argument_group("scores"))
    args = parser.parse_args(input_args)
    generated = [] if args.pretrained_model_name_or_path is None else [("base", None)]
    names = [name for name, _ in generated + args.candidates + args.images]
    rules = [
        (not names, "give --pretrained_model_name_or_path to draw images, or --images to score those made already"),
        (
            bool(args.candidates) and not generated,
            "--candidates needs --pretrained_model_name_or_path, which they are compared with",
        ),
        (
            len(set(names)) < len(names),
            f"--candidates and --images need names of their own, not {', '.join(names)}",
        ),
        (args.resolution % 8 != 0, "--resolution must be a multiple of 8, the VAE's reduction"),
        (
            "dinov2" in args.scorers and args.reference_images is None,
            "--scorers dinov2 needs --reference_images, the folder of images to compare with",
        ),
        (
            "siglip" in args.scorers and not (is_sentencepiece_available() and is_protobuf_available()),
            "--scorers siglip needs its tokenizer's libraries: pip install sentencepiece protobuf",
        ),
        (
            "hps" in args.scorers and importlib.util.find_spec("ftfy") is None,
            "--scorers hps needs ftfy: pip install ftfy",
        ),
    ]
    problem = next((sentence for broken, sentence in rules if broken), None)
    if problem is not None:
        parser.error(problem)
    return args


# Files ---------------------------------------------------------------------------------------------------------------


def find_file(source, name):
    """Path of a file in a local folder, or of a hub id (then downloaded); None where there is none of that name."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(source, name))
    except (EntryNotFoundError, OSError, ValueError):
        return None


def find_weights(source):
    """Path of a weights file, given as a path or as HUB_ID/FILE."""
    folder, name = os.path.split(source)
    path = find_file(folder or ".", name)
    if path is None:
        raise FileNotFoundError("it is no file, nor can it be had from the hub")
    return path


def find_references(args):
    """The images of --reference_images."""
    paths = sorted(path for path in Path(args.reference_images).glob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise EvaluationError(f"--reference_images {args.reference_images} holds no {', '.join(IMAGE_SUFFIXES)} file.")
    return paths


def read_image(path):
    """Decode one image to RGB; EvaluationError if Pillow cannot."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    # Pillow raises most of the built-in exceptions on one broken file or another.
    except Exception as error:
        raise EvaluationError(f"Image {path} cannot be read, mend or delete it: {one_line(error)}") from error


def read_hpdv2():
    """
    The 3,200 benchmark prompts of HPDv2 (arXiv 2306.09341), 800 of each style in the order of HPDV2_STYLES: lists of
    strings in `benchmark/STYLE.json` of the hub data set `zhwang/HPDv2`.
    """
    for style in HPDV2_STYLES:
        path = hf_hub_download("zhwang/HPDv2", f"{style}.json", subfolder="benchmark", repo_type="dataset")
        yield from json.loads(Path(path).read_text(encoding="utf-8"))


def prompt_rows(args):
    """Iterate over the prompts as they are stored, whatever they are."""
    path = Path(args.prompts)
    if args.prompts == "hpdv2":
        yield from read_hpdv2()
    elif path.suffix == ".txt":
        with path.open(encoding="utf-8-sig") as file:
            yield from (line.rstrip("\n") for line in file)
    else:
        name, column, split = PROMPT_SETS.get(args.prompts, (args.prompts, args.prompt_column, args.prompt_split))
        options = {"split": split}
        if path.suffix in PROMPT_FILES:
            name, options = PROMPT_FILES[path.suffix], {"split": "train", "data_files": str(path)}
        for row in datasets.load_dataset(name, streaming=True, **options):
            if column not in row:
                raise EvaluationError(f"--prompt_column {column} is not among the columns {', '.join(row)}.")
            yield row[column]


def read_prompts(args):
    """
    The prompts of --prompts, at most --max_prompts.

    Raises:
        EvaluationError: they cannot be read, there is none, or a row holds no text.
    """
    with loading("prompts", args.prompts):
        prompts = list(itertools.islice(prompt_rows(args), args.max_prompts))
    if not prompts:
        raise EvaluationError(f"--prompts {args.prompts} holds no prompt.")
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise EvaluationError(f"--prompts {args.prompts}: row {row} is empty or no text.")
    return prompts


# Models to compare ---------------------------------------------------------------------------------------------------


class System(NamedTuple):
    """
    What is evaluated: `kind` is base, pipeline, unet, lora or images; `source` a folder or hub id; `folder` that of
    its images; `weights` tells retrained weights from those that drew the images: sizes and times of a local folder's
    files, or the hub's commit.
    """

    name: str
    kind: str
    source: str
    folder: Path
    weights: dict | str | None = None

    def image(self, prompt, number):
        """Path of an image, by the numbers of its prompt and of the image among those of the prompt."""
        paths = [self.folder / f"{prompt:05d}_{number}{suffix}" for suffix in IMAGE_SUFFIXES]
        return next((path for path in paths if path.exists()), paths[0])


def weights_stamp(file):
    """`System.weights` for the folder of this file."""
    folder = file.parent
    if "snapshots" in folder.parts:
        return folder.parts[folder.parts.index("snapshots") + 1]
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")])
    if file.name == LORA_FILE:
        # Beside the checkpoints of its training, which come and go.
        files = [file]
    return {str(path.relative_to(folder)): [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


def find_candidate(args, name, source, folder):
    """Recognise a candidate by the files it holds; a UNet must be of the base's kind."""
    found = ((kind, find_file(source, file)) for file, kind in CANDIDATE_FILES.items())
    kind, file = next(((kind, file) for kind, file in found if file is not None), (None, None))
    flag = f"--candidates {name}={source}"
    if kind is None:
        raise EvaluationError(f"{flag} is no folder or reachable hub id with one of {', '.join(CANDIDATE_FILES)}.")
    if kind == "lora" and importlib.util.find_spec("peft") is None:
        raise EvaluationError(f"{flag} is a LoRA, which needs peft: pip install peft")
    if kind == "unet":
        config = json.loads(file.read_text())
        with loading("pretrained_model_name_or_path", args.pretrained_model_name_or_path):
            base = UNet2DConditionModel.load_config(args.pretrained_model_name_or_path, subfolder="unet")
        for key in ("_class_name", "cross_attention_dim", "in_channels"):
            if config.get(key) != base[key]:
                raise EvaluationError(
                    f"{flag} is no UNet of the base's kind: its {key} is {config.get(key)}, not {base[key]}."
                )
    return System(name, kind, source, folder, weights_stamp(file))


def find_systems(args):
    """All that is to be evaluated, the base first."""
    images = Path(args.output_dir) / "images"
    systems = []
    if args.pretrained_model_name_or_path is not None:
        source = args.pretrained_model_name_or_path
        file = find_file(source, "model_index.json")
        if file is None:
            raise EvaluationError(
                f"--pretrained_model_name_or_path {source} is no folder or reachable hub id with a model_index.json."
            )
        systems.append(System("base", "base", source, images / "base", weights_stamp(file)))
    systems += [find_candidate(args, name, source, images / name) for name, source in args.candidates]
    return systems + [System(name, "images", folder, Path(folder)) for name, folder in args.images]


# Generation ----------------------------------------------------------------------------------------------------------


def load_scheduler(args):
    """The one scheduler of all models, made from the base's config."""
    source = args.pretrained_model_name_or_path
    with loading("pretrained_model_name_or_path", source):
        config = EulerDiscreteScheduler.load_config(source, subfolder="scheduler")
    name = args.scheduler or config["_class_name"]
    with loading("scheduler", name):
        return getattr(diffusers, name).from_config(config)


def load_pipeline(args, system, scheduler, dtype):
    """The system's SDXL pipeline on the CPU: its own part, and all else from the base (a pipeline brings its own)."""
    options = {"torch_dtype": dtype, "use_safetensors": True}
    parts = {"scheduler": scheduler, "add_watermarker": False}
    named = f"{system.name}={system.source}"
    if args.pretrained_vae_model_name_or_path is not None:
        with loading("pretrained_vae_model_name_or_path", args.pretrained_vae_model_name_or_path):
            parts["vae"] = AutoencoderKL.from_pretrained(args.pretrained_vae_model_name_or_path, **options)
    if system.kind == "pipeline":
        with loading("candidates", named):
            return StableDiffusionXLPipeline.from_pretrained(system.source, **parts, **options)
    if system.kind == "unet":
        with loading("candidates", named):
            subfolder = "unet" if find_file(system.source, "unet/config.json") else None
            parts["unet"], info = UNet2DConditionModel.from_pretrained(
                system.source, subfolder=subfolder, output_loading_info=True, **options
            )
            check_complete(info["missing_keys"])
    with loading("pretrained_model_name_or_path", args.pretrained_model_name_or_path):
        pipeline = StableDiffusionXLPipeline.from_pretrained(
            args.pretrained_model_name_or_path, variant=args.variant, **parts, **options
        )
    if system.kind == "lora":
        with loading("candidates", named):
            pipeline.load_lora_weights(system.source, weight_name=LORA_FILE)
    return pipeline


def image_seed(seed, prompt, number):
    """The seed of one image's noise, from --seed, the prompt's number and the image's number among those of it."""
    return int(np.random.SeedSequence([seed, prompt, number]).generate_state(1, np.uint64)[0])


def draw_images(args, pipeline, prompts, places):
    """Images of the places [(prompt's number, image's number)], whose noise depends on the place alone."""
    return pipeline(
        [prompts[prompt] for prompt, _ in places],
        height=args.resolution,
        width=args.resolution,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        generator=[torch.Generator().manual_seed(image_seed(args.seed, *place)) for place in places],
    ).images


def draw_missing(args, accelerator, system, pipeline, prompts, batches):
    """Draw these batches of places and write the images that are not there yet."""
    pipeline.vae.enable_slicing()
    pipeline.set_progress_bar_config(disable=True)
    for batch in tqdm(batches, desc=f"Drawing {system.name}", disable=not accelerator.is_local_main_process):
        for place, image in zip(batch, draw_images(args, pipeline, prompts, batch), strict=True):
            if not system.image(*place).exists():
                write_whole(system.image(*place), partial(image.save, format="PNG"))


def generation_settings(args, systems, prompts, scheduler, dtype):
    """For each system all that moves its images; the batch size and the processes move them by rounding at most."""
    named = ["pretrained_model_name_or_path", "variant", "pretrained_vae_model_name_or_path"]
    named += ["seed", "num_inference_steps", "guidance_scale", "resolution"]
    shared = {
        **{name: getattr(args, name) for name in named},
        "base_weights": systems[0].weights,
        "dtype": str(dtype),
        "prompts_sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "scheduler": type(scheduler).__name__,
        "scheduler_config": {name: value for name, value in scheduler.config.items() if not name.startswith("_")},
        **{library.__name__: library.__version__ for library in (torch, diffusers, transformers)},
    }
    own = [{"kind": system.kind, "source": system.source, "weights": system.weights} for system in systems]
    # As they come back from a file.
    return json.loads(json.dumps([{**shared, **settings} for settings in own]))


def check_settings(system, settings):
    """Refuse to mix images of different settings."""
    path = system.folder / "settings.json"
    stored = json.loads(path.read_text()) if path.exists() else settings
    for name, value in settings.items():
        if stored.get(name) != value:
            shown = "" if isinstance(value, dict) else f" ({stored.get(name)}, now {value})"
            raise EvaluationError(
                f"The images in {system.folder} were drawn with another {name}{shown}; delete that folder or choose "
                "another --output_dir."
            )


def write_whole(path, write):
    """Call `write(path)` on a hidden neighbour that then takes the path's place: no reader sees half a file."""
    aside = path.with_name(f".incomplete-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        os.replace(aside, path)
    except OSError as error:
        raise EvaluationError(f"--output_dir: {path} cannot be written: {one_line(error)}") from error


def write_text(path, text):
    write_whole(path, partial(Path.write_text, data=text, encoding="utf-8"))


def generate(args, accelerator, dtype, systems, prompts):
    """
    Draw what is missing of the systems' images, in batches dealt out to the processes, and write each in one piece.
    The batches are those of a run from the start, so that an image comes out the same after any interruption.

    Returns:
        The base's settings.
    """
    scheduler = load_scheduler(args)
    places = list(itertools.product(range(len(prompts)), range(args.images_per_prompt)))
    batches = [places[i : i + args.batch_size] for i in range(0, len(places), args.batch_size)]
    settings = generation_settings(args, systems, prompts, scheduler, dtype)
    missing = []
    for system, its_settings in zip(systems, settings, strict=True):
        check_settings(system, its_settings)
        missing.append([batch for batch in batches if not all(system.image(*place).exists() for place in batch)])
    # No process writes while another still looks at what there is.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for system, its_settings in zip(systems, settings, strict=True):
            write_text(system.folder / "settings.json", json.dumps(its_settings, indent=2) + "\n")
    accelerator.wait_for_everyone()
    for system, its_batches in zip(systems, missing, strict=True):
        mine = its_batches[accelerator.process_index :: accelerator.num_processes]
        with failing_together():
            if mine:
                pipeline = load_pipeline(args, system, scheduler, dtype).to(accelerator.device)
                draw_missing(args, accelerator, system, pipeline, prompts, mine)
                del pipeline
        accelerator.free_memory()
    return settings[0]


# Scores --------------------------------------------------------------------------------------------------------------


class Scorer:
    """
    A published model and what it says of images; `score` is the number that is reported.

    Images pass through Pillow whatever else is installed, and texts are filled up to one length, so that a score
    depends neither on the machine nor on the batch. All is float32.
    """

    architecture = CLIPModel
    model_flag = processor_flag = None
    reads_text = True

    def __init__(self, args, device):
        self.device = device
        self.model = self.load_model(args).eval().requires_grad_(False).to(device)
        source = getattr(args, self.processor_flag or self.model_flag)
        with loading(self.processor_flag or self.model_flag, source):
            self.image_processor = AutoImageProcessor.from_pretrained(source, backend="pil")
            self.tokenizer = AutoTokenizer.from_pretrained(source) if self.reads_text else None

    def load_model(self, args):
        return self.load_weights(self.model_flag, getattr(args, self.model_flag))

    def load_weights(self, flag, shown, **source):
        """The architecture with every weight found; `source` is for `from_pretrained`, None: the hub id `shown`."""
        source = source or {"pretrained_model_name_or_path": shown}
        with loading(flag, shown):
            model, info = self.architecture.from_pretrained(
                **source, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
            check_complete(info["missing_keys"])
        return model

    def max_tokens(self):
        return self.model.config.text_config.max_position_embeddings

    def embed_images(self, images):
        """Unit vectors [N, D] of N images."""
        pixels = self.image_processor(images, return_tensors="pt").pixel_values.to(self.device)
        return F.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)

    def embed_texts(self, prompts):
        """Unit vectors [N, D] of N texts, each cut after the tokens that the model was trained with."""
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.max_tokens(), return_tensors="pt"
        )
        ids = tokens.input_ids.to(self.device)
        return F.normalize(self.model.get_text_features(input_ids=ids).pooler_output, dim=-1)

    def cosines(self, images, prompts):
        """[N] cosines of N images with their own prompts."""
        return (self.embed_images(images) * self.embed_texts(prompts)).sum(dim=-1)


class PickScore(Scorer):
    """exp(logit_scale) x cosine, about 22 for SDXL (arXiv 2305.01569, model card of yuvalkirstain/PickScore_v1)."""

    model_flag, processor_flag = "pickscore_model", "pickscore_processor"

    def score(self, images, prompts):
        return self.model.logit_scale.exp() * self.cosines(images, prompts)


class ClipScore(Scorer):
    """max(100 x cosine, 0) (arXiv 2104.08718, with the factor 100 of torchmetrics)."""

    model_flag = "clip_model"

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


def fit_into_square(image, side):
    """[3, side, side] from 0 to 1: the image brought to `side` pixels in the longer direction, centred on black."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    height, width = (round(length * side / max(image.size)) for length in pixels.shape[-2:])
    pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    left, top = (side - width) // 2, (side - height) // 2
    return F.pad(pixels, (left, side - width - left, top, side - height - top))[0]


class HPS(Scorer):
    """
    Human Preference Score v2.1: 100 x cosine, about 30 for SDXL (arXiv 2306.09341, github.com/tgxs002/HPSv2).

    The weights are those of open_clip's ViT-H-14; --hps_model gives the same architecture's config and vocabulary. A
    whole image is seen, fitted into a black square, where CLIP would cut out its centre, and texts are mended as by
    open_clip. HPSv2 itself computes in float16, and resized without antialiasing before torchvision 0.17.
    """

    model_flag = "hps_model"

    def load_model(self, args):
        with loading("hps_model", args.hps_model):
            config = CLIPConfig.from_pretrained(args.hps_model)
        with loading("hps_weights", args.hps_weights):
            weights = torch.load(find_weights(args.hps_weights), map_location="cpu", weights_only=True)
            if "state_dict" not in weights:
                raise ValueError("it holds no state_dict")
            weights = from_open_clip(weights["state_dict"])
        return self.load_weights(
            "hps_weights", args.hps_weights, pretrained_model_name_or_path=None, config=config, state_dict=weights
        )

    def embed_images(self, images):
        side = self.model.config.vision_config.image_size
        mean, std = (torch.tensor(getattr(self.image_processor, f"image_{name}")) for name in ("mean", "std"))
        pixels = torch.stack([fit_into_square(image, side) for image in images])
        pixels = ((pixels - mean[:, None, None]) / std[:, None, None]).to(self.device)
        return F.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)

    def embed_texts(self, prompts):
        import ftfy

        return super().embed_texts([html.unescape(html.unescape(ftfy.fix_text(prompt))) for prompt in prompts])

    def score(self, images, prompts):
        return 100 * self.cosines(images, prompts)


class Aesthetic(Scorer):
    """
    The LAION aesthetic predictor, about 5 to 7: linear layers without activations (dropout between them in training)
    on the unit vector of CLIP ViT-L/14 (github.com/christophschuhmann/improved-aesthetic-predictor,
    `sac+logos+ava1-l14-linearMSE.pth`). The prompt plays no part.
    """

    model_flag = "aesthetic_model"
    reads_text = False

    def __init__(self, args, device):
        super().__init__(args, device)
        self.head = nn.Sequential(
            *(nn.Linear(768, 1024), nn.Identity(), nn.Linear(1024, 128), nn.Identity()),
            *(nn.Linear(128, 64), nn.Identity(), nn.Linear(64, 16), nn.Linear(16, 1)),
        )
        with loading("aesthetic_weights", args.aesthetic_weights):
            weights = torch.load(find_weights(args.aesthetic_weights), map_location="cpu", weights_only=True)
            self.head.load_state_dict({name.removeprefix("layers."): weight for name, weight in weights.items()})
        self.head.to(device)

    def score(self, images, prompts):
        return self.head(self.embed_images(images))[:, 0]


class SigLIP(Scorer):
    """100 x sigmoid(exp(logit_scale) x cosine + logit_bias): how probably they match (arXiv 2303.15343)."""

    architecture = SiglipModel
    model_flag = "siglip_model"

    def score(self, images, prompts):
        logits = self.model.logit_scale.exp() * self.cosines(images, prompts) + self.model.logit_bias
        return 100 * logits.sigmoid()


class DINOv2(Scorer):
    """
    100 x the mean cosine of the CLS vectors of an image and each of --reference_images: the subject fidelity of
    DreamBooth (arXiv 2208.12242) with DINOv2 in place of DINO. The prompt plays no part.
    """

    architecture = Dinov2Model
    model_flag = "dinov2_model"
    reads_text = False

    def __init__(self, args, device):
        super().__init__(args, device)
        self.references = self.embed_images([read_image(path) for path in find_references(args)])

    def embed_images(self, images):
        pixels = self.image_processor(images, return_tensors="pt").pixel_values.to(self.device)
        return F.normalize(self.model(pixel_values=pixels).last_hidden_state[:, 0], dim=-1)

    def score(self, images, prompts):
        return 100 * (self.embed_images(images) @ self.references.T).mean(dim=1)


SCORERS = {
    "pickscore": PickScore,
    "hps": HPS,
    "aesthetic": Aesthetic,
    "clip": ClipScore,
    "siglip": SigLIP,
    "dinov2": DINOv2,
}


def warn_of_long_texts(name, scorer, texts):
    long = sum(len(ids) > scorer.max_tokens() for ids in scorer.tokenizer(sorted(texts)).input_ids)
    if long > 0:
        logger.warning(f"{name} reads only {scorer.max_tokens()} tokens of {long} of the {len(texts)} prompts.")


@torch.no_grad()
def score_images(args, accelerator, records):
    """
    Add its scores to each record (keys file and prompt), in batches dealt out to the processes.

    A score is rounded to six decimals; it is the same for any number of processes.
    """
    # Convolutions would run in TF32 where there is such.
    torch.backends.cudnn.allow_tf32 = False
    batches = [records[i : i + args.batch_size] for i in range(0, len(records), args.batch_size)]
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    for name in args.scorers:
        with failing_together():
            scorer = SCORERS[name](args, accelerator.device)
            if scorer.reads_text:
                warn_of_long_texts(name, scorer, {record["prompt"] for record in records})
            scores = []
            for batch in tqdm(mine, desc=f"Scoring {name}", disable=not accelerator.is_local_main_process):
                images = [read_image(record["file"]) for record in batch]
                scores.append(scorer.score(images, [record["prompt"] for record in batch]).tolist())
            del scorer
        for rank, its_scores in gather_object([(accelerator.process_index, scores)]):
            for batch, batch_scores in zip(batches[rank :: accelerator.num_processes], its_scores, strict=True):
                for record, score in zip(batch, batch_scores, strict=True):
                    record[name] = round(score, 6)
        accelerator.free_memory()


# Results -------------------------------------------------------------------------------------------------------------


def mean_and_error(scores):
    """
    Args:
        scores: [prompts, images of each].

    Returns:
        The mean, and its standard error over prompts (the images of one prompt are not independent of each other);
        None for a single prompt.
    """
    means = scores.mean(axis=1)
    error = float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None
    return float(means.mean()), error


def win_rate(candidate, base):
    """
    Args:
        candidate, base: scores [prompts, images of each] of the same prompts and seeds.

    Returns:
        The share of images that the candidate wins, ties counting half, and the limits of its 95 % confidence
        interval: percentiles of a bootstrap over prompts, always of the same draws.
    """
    wins = ((candidate > base) + 0.5 * (candidate == base)).mean(axis=1)
    n = len(wins)
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=BOOTSTRAP_SAMPLES)
    low, high = np.percentile(draws @ wins / n, [2.5, 97.5])
    return float(wins.mean()), float(low), float(high)


def compare(args, systems, scores):
    """A row for each scorer and system; `scores` is {(scorer, system's name): [prompts, images of each]}."""
    rows = []
    for scorer in args.scorers:
        base = scores[scorer, systems[0].name]
        for system in systems:
            mean, error = mean_and_error(scores[scorer, system.name])
            row = {"scorer": scorer, "model": system.name, "mean": mean, "standard_error": error}
            if system is not systems[0]:
                names = ("win_rate", "win_rate_low", "win_rate_high")
                row.update(zip(names, win_rate(scores[scorer, system.name], base), strict=True))
            rows.append(row)
    return rows


def markdown(rows, facts):
    """The rows as a table, above what they depend on."""
    lines = [
        "| scorer | model | mean | standard error | wins against base | 95 % interval |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        error = "" if row["standard_error"] is None else f"{row['standard_error']:.3f}"
        wins, interval = "", ""
        if "win_rate" in row:
            wins = f"{row['win_rate']:.1%}"
            interval = f"{row['win_rate_low']:.1%} to {row['win_rate_high']:.1%}"
        lines.append(f"| {row['scorer']} | {row['model']} | {row['mean']:.3f} | {error} | {wins} | {interval} |")
    return "\n".join([*lines, "", *(f"- {name}: {value}" for name, value in facts.items()), ""])


def draw_grid(scorer, pairs):
    """
    The largest wins of a candidate, then its largest losses: a row for each pair of images, the base's left.

    Args:
        pairs: records (base's, candidate's) of the same prompt and seed.
    """
    ordered = sorted(pairs, key=lambda pair: pair[0][scorer] - pair[1][scorer])
    wins = [pair for pair in ordered[:GRID_ROWS] if pair[1][scorer] > pair[0][scorer]]
    losses = [pair for pair in ordered[: -GRID_ROWS - 1 : -1] if pair[1][scorer] < pair[0][scorer]]
    side, line = 384, 20
    font = ImageFont.load_default(size=14)
    grid = Image.new("RGB", (2 * side, line + (len(wins) + len(losses)) * (side + 2 * line)), "white")
    canvas = ImageDraw.Draw(grid)
    canvas.text((4, 0), f"{len(wins)} largest wins, then {len(losses)} largest losses", fill="black", font=font)
    for row, pair in enumerate(wins + losses):
        top = line + row * (side + 2 * line)
        canvas.text((4, top), textwrap.shorten(pair[0]["prompt"], 100, placeholder=" ..."), fill="black", font=font)
        for column, record in enumerate(pair):
            text = f"{record['model']}: {scorer} {record[scorer]:.3f}"
            canvas.text((column * side + 4, top + line), text, fill="black", font=font)
            grid.paste(read_image(record["file"]).resize((side, side)), (column * side, top + 2 * line))
    return grid


def write_results(args, systems, prompts, records, settings):
    """Write scores.jsonl, results.json, results.md and a grid for each candidate, all from the records in order."""
    output_dir = Path(args.output_dir)
    write_text(output_dir / "scores.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    shape = (len(systems), len(prompts), args.images_per_prompt)
    scores = {
        (scorer, system.name): table
        for scorer in args.scorers
        for system, table in zip(systems, np.reshape([record[scorer] for record in records], shape), strict=True)
    }
    rows = compare(args, systems, scores)
    facts = {
        "prompts": f"{len(prompts)} of {args.prompts}",
        "images per prompt": args.images_per_prompt,
        **{f"model {system.name}": system.source for system in systems},
        **{name: value for name, value in settings.items() if name not in NOT_FACTS},
        **{flag: getattr(args, flag) for flag in SCORER_SOURCES if flag.partition("_")[0] in args.scorers},
    }
    report = {"results": rows, "facts": facts, "settings": settings}
    write_text(output_dir / "results.json", json.dumps(report, indent=2) + "\n")
    write_text(output_dir / "results.md", markdown(rows, facts))
    count = len(records) // len(systems)
    for i, system in enumerate(systems[1:], start=1):
        grid = draw_grid(args.scorers[0], zip(records[:count], records[i * count : (i + 1) * count], strict=True))
        write_whole(output_dir / f"grid-{system.name}.png", partial(grid.save, format="PNG"))
    logger.info(f"Wrote {output_dir / 'results.md'}")


def check_inputs(args, systems, prompts):
    """Find the images given and what the scorers are made of, before hours are spent on drawing."""
    for system in systems:
        places = itertools.product(range(len(prompts)), range(args.images_per_prompt))
        paths = [system.image(*place) for place in places if system.kind == "images"]
        missing = [path for path in paths if not path.exists()]
        if missing:
            raise EvaluationError(
                f"--images {system.name}={system.source} lacks {len(missing)} of {len(paths)}, e.g. {missing[0]}"
            )
    if "dinov2" in args.scorers:
        find_references(args)
    for flag in SCORER_SOURCES:
        scorer, _, part = flag.partition("_")
        source = getattr(args, flag)
        if scorer not in args.scorers:
            continue
        if part == "weights":
            with loading(flag, source):
                find_weights(source)
            continue
        name = "preprocessor_config.json" if part == "processor" else "config.json"
        if find_file(source, name) is None:
            raise EvaluationError(f"--{flag} {source} is no folder or reachable hub id with a {name}.")


def build_accelerator(args):
    """The Accelerator, and the dtype that images are drawn in."""
    try:
        # Processes wait for the slowest, which may draw for hours.
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))]
        )
    except ValueError as error:
        raise EvaluationError(f"--mixed_precision {args.mixed_precision} does not work here: {error}") from error
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    if dtype == torch.float16 and accelerator.device.type == "cpu":
        raise EvaluationError("--mixed_precision fp16 needs a GPU, on CPU write bf16 or no.")
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", level=logging.INFO)
    for library in (datasets, transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    return accelerator, dtype


def main(args):
    accelerator, dtype = build_accelerator(args)
    prompts = read_prompts(args)
    systems = find_systems(args)
    check_inputs(args, systems, prompts)
    drawn = [system for system in systems if system.kind != "images"]
    settings = generate(args, accelerator, dtype, drawn, prompts) if drawn else {}
    records = [
        {
            "model": system.name,
            "prompt_index": prompt,
            "image": number,
            "prompt": prompts[prompt],
            "file": str(system.image(prompt, number)),
        }
        for system in systems
        for prompt in range(len(prompts))
        for number in range(args.images_per_prompt)
    ]
    score_images(args, accelerator, records)
    if accelerator.is_main_process:
        write_results(args, systems, prompts, records, settings)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main(parse_args())
    except EvaluationError as error:
        sys.exit(f"error: {error}")
