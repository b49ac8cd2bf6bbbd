"""Pairs made by SDXL itself: what is drawn and chosen, what is written, and how runs resume, share out and end."""

import hashlib
import importlib
import inspect
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import types
from functools import partial
from importlib.metadata import metadata
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import ROOT, command_line, load_script, save_lora, scalars
from conftest import run as run_script
from cpu_cluster import Fault, killed, run_ranks, with_faults
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from huggingface_hub.utils import filter_repo_objects
from packaging.specifiers import SpecifierSet
from PIL import Image
from safetensors.torch import load_file, save_file
from small_loras import REFUSED, merge, random_lora, save_kohya, save_peft, save_refused
from small_scorers import build_scorers, expected_score, remove_vocabulary, remove_weight
from small_world import build_pipeline


SCRIPT = ROOT / "make_pick_style_sdxl.py"
PREFIX = "a cartoon of"
CAPTIONS = ["a red circle", "a blue square", "An orange star, by hand", "a green triangle", "a red circle"]
CAPTIONS += ["a purple star", "a yellow circle"]
DRAWN = {"num_inference_steps": 2, "resolution": 64, "batch_size": 3}
TOKEN = "hf_ThisIsNoRealTokenButItMustStaySecret"


@pytest.fixture(scope="module")
def maker():
    """The script as a module, with its sibling within reach, as beside a script that is run."""
    sys.path.insert(0, str(ROOT))
    yield load_script(SCRIPT)
    sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Folder with captions, a pipeline, another one with its UNet alone (as training writes it), and a LoRA."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "captions.txt").write_text("".join(f"{caption}\n" for caption in CAPTIONS))
    build_pipeline(folder / "pipeline")
    build_pipeline(folder / "other", seed=1)
    shutil.copytree(folder / "other" / "unet", folder / "trained" / "unet")
    save_lora(folder)
    return folder


@pytest.fixture(scope="module")
def scorers(tmp_path_factory):
    return build_scorers(tmp_path_factory.mktemp("scorers"))


def style_flags(small, output_dir):
    sources = {"pretrained_model_name_or_path": small / "pipeline", "prompts": small / "captions.txt"}
    return {**sources, "style_prefix": PREFIX, **DRAWN, "output_dir": output_dir}


@pytest.fixture
def flags(small, tmp_path):
    return style_flags(small, tmp_path / "out")


@pytest.fixture(scope="module")
def made(maker, small, tmp_path_factory):
    """Output of a run with a style prefix."""
    return run_script(maker, style_flags(small, tmp_path_factory.mktemp("made") / "pairs"))


@pytest.fixture
def copied(made, tmp_path):
    return shutil.copytree(made, tmp_path / "out")


def refused(maker, flags):
    """The sentence that these flags end in."""
    with pytest.raises(maker.PairsError) as error:
        run_script(maker, flags)
    assert "\n" not in str(error.value)
    return str(error.value)


def shards(folder):
    return sorted((folder / "data").iterdir())


def rows(folder):
    return [row for shard in shards(folder) for row in pq.read_table(shard).to_pylist()]


def decoded(row):
    """The images of a row, chosen and rejected, as arrays."""
    images = [np.asarray(Image.open(io.BytesIO(row[name])), dtype=int) for name in ("jpg_0", "jpg_1")]
    return images if row["label_0"] >= row["label_1"] else images[::-1]


def hashes(folder):
    """{file: digest} of everything in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def distance(a, b):
    return np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max()


def noise_seed(number, image, seed=0):
    """The first number of a caption's sequence is for its side."""
    return int(np.random.SeedSequence([seed, number]).generate_state(image + 2, np.uint64)[image + 1])


def plain_image(pipeline, prompt, seed, **options):
    """An image by diffusers alone."""
    pipeline.set_progress_bar_config(disable=True)
    options = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 5.0, **options}
    return pipeline(prompt, generator=torch.Generator().manual_seed(seed), **options).images[0]


# Pairs ---------------------------------------------------------------------------------------------------------------


def test_layout_is_that_of_pick_style(made):
    (shard,) = shards(made)
    assert shard.name == "train-00000-of-00001.parquet"
    types = {"caption": pa.string(), "jpg_0": pa.binary(), "jpg_1": pa.binary()}
    assert pq.read_schema(shard).equals(pa.schema(types | {"label_0": pa.int64(), "label_1": pa.int64()}))
    assert [row["caption"] for row in rows(made)] == CAPTIONS
    assert {(row["label_0"], row["label_1"]) for row in rows(made)} == {(0, 1), (1, 0)}
    for row in rows(made):
        for name in ("jpg_0", "jpg_1"):
            image = Image.open(io.BytesIO(row[name]))
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 64))
    assert {path.name for path in made.iterdir()} == {"data", "README.md", "pairs_made"}
    assert [path.name for path in (made / "pairs_made").iterdir()] == ["settings.json"]


def test_chosen_is_drawn_with_the_prefix_and_rejected_without_from_the_same_noise(small, made):
    pipeline = StableDiffusionXLPipeline.from_pretrained(small / "pipeline")
    for number, row in enumerate(rows(made)):
        images, seed = decoded(row), noise_seed(number, 0)
        # By batches or alone, the last bits of the latents differ.
        assert distance(images[0], plain_image(pipeline, f"{PREFIX} {row['caption']}", seed)) <= 1
        assert distance(images[1], plain_image(pipeline, row["caption"], seed)) <= 1
        assert distance(*images) > 1
    # Equal captions have different noise.
    assert distance(decoded(rows(made)[0])[1], decoded(rows(made)[4])[1]) > 8


def test_settings_reach_the_pipeline_and_seeds_may_differ(maker, small, flags):
    changes = {"different_seeds": True, "seed": 3, "guidance_scale": 1.5, "num_inference_steps": 3, "max_prompts": 2}
    out = run_script(maker, flags | changes | {"style_prefix": f"  {PREFIX} "})
    pipeline = StableDiffusionXLPipeline.from_pretrained(small / "pipeline")
    options = {"num_inference_steps": 3, "guidance_scale": 1.5}
    assert len(rows(out)) == 2
    for number, row in enumerate(rows(out)):
        prompts = (f"{PREFIX} {row['caption']}", row["caption"])
        for image, (side, prompt) in zip(decoded(row), enumerate(prompts)):
            assert distance(image, plain_image(pipeline, prompt, noise_seed(number, side, seed=3), **options)) <= 1


def test_sides_are_swapped_at_random_by_the_seed(maker, flags, monkeypatch):
    """Of 400 pairs; as many are on either side as of a coin, and another seed throws other ones."""
    monkeypatch.setattr(
        maker, "generate_images", lambda args, pipeline, prompts, seeds: [Image.new("RGB", (1, 1))] * len(prompts)
    )
    sides = []
    for seed in (0, 0, 1):
        args = maker.parse_args(command_line(flags | {"seed": seed}))
        inputs = maker.Inputs(["a"] * 400, [], [])
        tables = maker.make_block(args, None, None, inputs, range(400))
        sides.append([table.to_pylist()[0]["label_0"] for table in tables])
    assert sides[0] == sides[1] != sides[2]
    assert all(160 < sum(side) < 240 for side in sides) and 160 < sum(a == b for a, b in zip(*sides[1:])) < 240


def test_rows_are_grouped_and_sharded(maker, flags, made, monkeypatch):
    monkeypatch.setattr(maker, "ROWS_PER_GROUP", 3)
    monkeypatch.setattr(maker, "ROWS_PER_SHARD", 4)
    out = run_script(maker, flags)
    names = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    assert [shard.name for shard in shards(out)] == names and rows(out) == rows(made)
    footers = [pq.read_metadata(shard) for shard in shards(out)]
    groups = [[footer.row_group(n).num_rows for n in range(footer.num_row_groups)] for footer in footers]
    assert groups == [[3, 1], [3]]
    assert datasets.load_dataset(str(out), split="train")["caption"] == CAPTIONS


@pytest.mark.parametrize("streaming", [None, True], ids=["map-style", "streaming"])
def test_the_trainer_reads_them(script, made, small, tmp_path, streaming):
    flags = {"pretrained_model_name_or_path": small / "pipeline", "dataset_name": made, "resolution": 64, "seed": 0}
    flags |= {"rank": 4, "train_batch_size": 2, "max_train_steps": 2, "logging_steps": 1, "streaming": streaming}
    logged = scalars(run_script(script, flags | {"cache_dir": tmp_path / "cache", "output_dir": tmp_path / "out"}))
    assert len(logged["loss"]) == 2 and all(map(np.isfinite, logged["loss"].values()))


# Candidates, photos, second rounds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pickscore", "aesthetic", "imagereward"])
def test_best_candidate_is_paired_with_the_worst(maker, small, scorers, flags, name):
    sources = {flag: path for flag, path in scorers.items() if flag.startswith(f"{name}_")}
    changes = {"style_prefix": None, "num_candidates": 3, "scorer": name, "max_prompts": 4, **sources}
    out = run_script(maker, flags | changes)
    assert pq.read_schema(shards(out)[0]).field("label_0").type == pa.float64()
    pipeline = StableDiffusionXLPipeline.from_pretrained(small / "pipeline")
    for number, row in enumerate(rows(out)):
        images = [plain_image(pipeline, row["caption"], noise_seed(number, image)) for image in range(3)]
        scores = [expected_score(name, scorers, image, row["caption"]) for image in images]
        order = np.argsort(scores)
        for image, best in zip(decoded(row), (order[-1], order[0])):
            assert distance(image, images[best]) <= 1
        # A pixel in another last place moves the scores of these small models by so much.
        expected = [max(scores), min(scores)]
        assert sorted((row["label_0"], row["label_1"]), reverse=True) == pytest.approx(expected, abs=0.05)
    card = yaml.safe_load((out / "README.md").read_text().split("---\n")[1])
    dtypes = {feature["name"]: feature["dtype"] for feature in card["dataset_info"]["features"]}
    assert dtypes["label_0"] == dtypes["label_1"] == "float64"
    assert datasets.load_dataset(str(out), split="train").features["label_1"].dtype == "float64"


@pytest.mark.parametrize("chosen_prefix", [PREFIX, None])
def test_rejected_images_have_a_prefix_of_their_own(maker, small, flags, chosen_prefix):
    changes = {"style_prefix": chosen_prefix, "rejected_prefix": "a blurred photo of", "max_prompts": 2}

    out = run_script(maker, flags | changes)

    pipeline = StableDiffusionXLPipeline.from_pretrained(small / "pipeline")
    for number, row in enumerate(rows(out)):
        chosen, rejected = decoded(row)
        styled = f"{chosen_prefix} {row['caption']}" if chosen_prefix else row["caption"]
        blurred = f"a blurred photo of {row['caption']}"
        assert distance(chosen, plain_image(pipeline, styled, noise_seed(number, 0))) <= 1
        assert distance(rejected, plain_image(pipeline, blurred, noise_seed(number, 0))) <= 1


@pytest.mark.parametrize("kind", [{}, {"style_prefix": None, "num_candidates": 2}], ids=["prefix", "candidates"])
def test_pairs_whose_chosen_image_misses_a_score_are_dropped(maker, scorers, made, flags, tmp_path, kind):
    sources = {"scorer": "clip", "clip_model": scorers["clip_model"]}
    all_pairs = rows(run_script(maker, flags | sources | kind | {"min_score": -1e9, "output_dir": tmp_path / "all"}))
    scores = []
    for row in all_pairs:
        chosen = Image.fromarray(decoded(row)[0].astype(np.uint8))
        scores.append(expected_score("clip", scorers, chosen, row["caption"]))
    bound = (sorted(scores)[2] + sorted(scores)[3]) / 2

    out = run_script(maker, flags | sources | kind | {"min_score": bound})

    expected = [row for row, score in zip(all_pairs, scores) if score > bound]
    assert rows(out) == expected and len(expected) == len(CAPTIONS) - 3
    sentence = refused(maker, flags | sources | kind | {"min_score": 1e9, "output_dir": tmp_path / "none"})
    assert "every pair was dropped. Try a lower --min_score" in sentence
    assert not list((tmp_path / "none" / "pairs_made").glob("*.parquet"))


@pytest.fixture
def pair_folders(tmp_path):
    """Two folders of images; `a` and `b` are in both."""
    colours = {"chosen": {"a.png": "red", "b.jpg": "green", "c.png": "blue"}}
    colours["rejected"] = {"a.jpg": "white", "b.png": "black", "d.png": "gray"}
    for folder, images in colours.items():
        (tmp_path / folder).mkdir()
        for name, colour in images.items():
            Image.new("RGB", (40, 30), colour).save(tmp_path / folder / name)
    return {"chosen_images": tmp_path / "chosen", "rejected_images": tmp_path / "rejected"}


@pytest.mark.parametrize("source", ["beside", "csv"])
def test_files_of_the_same_name_are_paired(maker, pair_folders, tmp_path, caplog, monkeypatch, source):
    monkeypatch.setattr(maker, "load_pipeline", lambda *args: pytest.fail("a model is loaded"))
    flags = {**pair_folders, "output_dir": tmp_path / "out"}
    if source == "beside":
        for name in "abc":
            (pair_folders["chosen_images"] / f"{name}.txt").write_text(f"caption {name}\n")
    else:
        flags["prompts"] = tmp_path / "captions.csv"
        flags["prompts"].write_text("file_name,prompt\na.png,caption a\nb.jpg,caption b\nc.png,caption c\n")

    found = rows(run_script(maker, flags))

    assert [row["caption"] for row in found] == ["caption a", "caption b"]
    for row, colours in zip(found, ([(255, 0, 0), (255, 255, 255)], [(0, 128, 0), (0, 0, 0)])):
        for image, colour in zip(decoded(row), colours):
            assert image.shape == (30, 40, 3) and distance(image, np.full_like(image, colour)) < 3
    assert "2 names without two images and a caption are left out: c, d." in caplog.text


def test_pair_with_a_broken_file_is_left_out(maker, pair_folders, tmp_path, caplog):
    for name in "ab":
        (pair_folders["chosen_images"] / f"{name}.txt").write_text(f"caption {name}")
    broken = pair_folders["rejected_images"] / "a.jpg"
    broken.write_bytes(broken.read_bytes()[:300])

    (row,) = rows(run_script(maker, {**pair_folders, "output_dir": tmp_path / "out"}))

    assert row["caption"] == "caption b"
    assert f"--rejected_images: {broken} cannot be read" in caplog.text


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ("file_name,prompt\n0001,red\n", "file_name 1 is not text"),
        ("file_name,prompt\nx/a.png,red\ny/a.png,blue\n", "file_name: a occurs twice"),
        ("file_name,prompt\na.png,  \n", "contain no two images of the same name with a caption"),
    ],
)
def test_captions_that_fit_no_file_are_refused(maker, pair_folders, tmp_path, table, complaint):
    (tmp_path / "captions.csv").write_text(table)
    flags = {**pair_folders, "prompts": tmp_path / "captions.csv", "output_dir": tmp_path / "out"}
    assert complaint in refused(maker, flags)


def test_files_without_a_partner_are_refused(maker, pair_folders, tmp_path):
    assert refused(maker, {**pair_folders, "output_dir": tmp_path / "out"}).endswith(
        "contain no two images of the same name with a caption."
    )


def test_photos_are_chosen_in_turn(maker, small, flags, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    colours = {"a.PNG": (200, 30, 30), "b.jpg": (30, 200, 30), "c.webp": (30, 30, 200)}
    Image.new("RGBA", (60, 40), (*colours["a.PNG"], 0)).save(folder / "a.PNG", format="PNG")
    # Lying on its side, and larger than is needed.
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (300, 150), colours["b.jpg"]).save(folder / "b.jpg", exif=exif)
    Image.new("RGB", (80, 80), colours["c.webp"]).save(folder / "c.webp")
    (folder / "notes.md").write_text("no photo")
    out = run_script(maker, flags | {"style_prefix": None, "chosen_images": folder})
    pipeline = StableDiffusionXLPipeline.from_pretrained(small / "pipeline")
    sizes = [(40, 60), (128, 64), (64, 64)]
    shown = [(255, 255, 255), colours["b.jpg"], colours["c.webp"]]
    for number, row in enumerate(rows(out)):
        photo, sample = decoded(row)
        assert photo.shape[:2] == sizes[number % 3] and distance(photo, np.full_like(photo, shown[number % 3])) < 8
        assert distance(sample, plain_image(pipeline, row["caption"], noise_seed(number, 0))) <= 1
        # Nothing of the place where a photo was taken.
        assert b"Exif" not in row["jpg_0"] + row["jpg_1"] and b"eXIf" not in row["jpg_0"] + row["jpg_1"]


@pytest.mark.parametrize(
    "flag, source",
    [("unet", "trained"), ("unet", "other/unet"), ("lora", "lora"), ("lora", "lora/pytorch_lora_weights.safetensors")],
)
def test_a_second_round_is_drawn_by_the_aligned_model(maker, small, made, flags, flag, source):
    out = run_script(maker, flags | {flag: small / source, "max_prompts": 3})
    pipeline = StableDiffusionXLPipeline.from_pretrained(small / "pipeline")
    if flag == "unet":
        pipeline.unet = UNet2DConditionModel.from_pretrained(small / "other", subfolder="unet")
    else:
        pipeline.load_lora_weights(small / "lora")
    for number, (row, first) in enumerate(zip(rows(out), rows(made))):
        for image, of_base, words in zip(decoded(row), decoded(first), (f"{PREFIX} ", "")):
            assert distance(image, plain_image(pipeline, words + row["caption"], noise_seed(number, 0))) <= 1
            assert distance(image, of_base) > 1


@pytest.mark.parametrize("save", [save_kohya, save_peft])
def test_each_layer_of_a_lora_has_its_own_alpha_and_rank(maker, small, flags, tmp_path, save):
    """In the UNet and in the text encoders; the only file of a folder may have any name."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(small / "pipeline")
    lora = random_lora(pipeline)
    save(lora, tmp_path / "lora" / "mystyle.safetensors")

    (row,) = rows(run_script(maker, flags | {"lora": tmp_path / "lora", "max_prompts": 1}))

    expected = plain_image(merge(pipeline, lora), row["caption"], noise_seed(0, 0))
    assert distance(decoded(row)[1], expected) <= 1


@pytest.mark.parametrize("given", [False, True], ids=["without its UNet", "with its UNet"])
def test_a_lora_of_another_unet_is_warned_of(maker, small, flags, tmp_path, caplog, given):
    file = tmp_path / "x.safetensors"
    config = {"unet.lora_alpha": 2, "unet.base_model_name_or_path": str(small / "trained")}
    weights = load_file(small / "lora" / "pytorch_lora_weights.safetensors")
    save_file(weights, file, {"lora_adapter_metadata": json.dumps(config)})
    unet = small / "trained" if given else None

    run_script(maker, flags | {"lora": file, "unet": unet, "max_prompts": 1})

    warning = f"--lora {file} was trained on the UNet of {small / 'trained'}: add --unet {small / 'trained'}."
    assert (warning in caplog.text) == (not given)


@pytest.fixture
def spied(maker, monkeypatch):
    """The pipelines that the script loads, as it uses them."""
    pipelines, load = [], maker.load_pipeline
    monkeypatch.setattr(maker, "load_pipeline", lambda *args: pipelines.append(load(*args)) or pipelines[-1])
    return pipelines


def test_half_precision_spares_a_vae_that_would_overflow(maker, small, made, flags, spied, tmp_path):
    build_pipeline(tmp_path / "mild", force_upcast=False)
    for base in (small / "pipeline", tmp_path / "mild"):
        changes = {"pretrained_model_name_or_path": base, "mixed_precision": "bf16", "max_prompts": 2}
        out = run_script(maker, flags | changes | {"output_dir": tmp_path / base.name})
        for row, exact in zip(rows(out), rows(made)):
            assert 0 < distance(decoded(row)[0], decoded(exact)[0]) < 40
    dtypes = [(p.unet.dtype, p.text_encoder.dtype, p.text_encoder_2.dtype, p.vae.dtype) for p in spied]
    half, whole = torch.bfloat16, torch.float32
    assert dtypes == [(half, half, half, whole), (half, half, half, half)]


def test_compiled_blocks_give_the_same_images(maker, small, flags, compiled_graphs, tmp_path):
    flags |= {"lora": small / "lora"}
    eager = rows(run_script(maker, {**flags, "output_dir": tmp_path / "eager"}))

    compiled = rows(run_script(maker, {**flags, "compile": True}))

    assert compiled_graphs
    for row, expected in zip(compiled, eager, strict=True):
        assert distance(decoded(row)[0], decoded(expected)[0]) <= 1


def test_another_vae_and_a_variant(maker, small, made, flags, tmp_path):
    pipeline = StableDiffusionXLPipeline.from_pretrained(small / "pipeline")
    pipeline.save_pretrained(tmp_path / "pipeline", variant="fp16")
    pipeline.vae = AutoencoderKL.from_pretrained(small / "other" / "vae")
    changes = {"pretrained_model_name_or_path": tmp_path / "pipeline", "max_prompts": 1}
    assert refused(maker, flags | changes).startswith(f"--pretrained_model_name_or_path {tmp_path / 'pipeline'} ")
    changes |= {"variant": "fp16", "pretrained_vae_model_name_or_path": small / "other" / "vae"}
    (row,) = rows(run_script(maker, flags | changes))
    assert distance(decoded(row)[1], plain_image(pipeline, CAPTIONS[0], noise_seed(0, 0))) <= 1
    assert distance(decoded(row)[1], decoded(rows(made)[0])[1]) > 8


def test_images_of_nan_are_refused(maker, small, flags, tmp_path):
    folder = shutil.copytree(small / "pipeline", tmp_path / "pipeline")
    (file,) = (folder / "vae").glob("*.safetensors")
    weights = load_file(file)
    save_file({**weights, "decoder.conv_out.bias": weights["decoder.conv_out.bias"] * np.nan}, file)
    sentence = refused(maker, flags | {"pretrained_model_name_or_path": folder})
    assert "NaN" in sentence and "--mixed_precision bf16" in sentence
    assert not list((flags["output_dir"] / "pairs_made").glob("*.parquet"))


# Captions ------------------------------------------------------------------------------------------------------------


def captions_of(maker, words):
    base = ["--pretrained_model_name_or_path", "x", "--style_prefix", "y"]
    return maker.read_captions(maker.parse_args([*base, *map(str, words)]))


def test_caption_files(maker, tmp_path):
    table = pa.table({"text": CAPTIONS, "number": range(len(CAPTIONS))})
    pq.write_table(table, tmp_path / "x.parquet")
    frame = table.to_pandas()
    frame.to_csv(tmp_path / "x.csv", index=False)
    frame.to_json(tmp_path / "x.jsonl", orient="records", lines=True)
    frame.to_json(tmp_path / "x.json", orient="records")
    for name in ("x.parquet", "x.csv", "x.jsonl", "x.json"):
        for flag in ("--prompt_column", "--caption_column"):
            assert captions_of(maker, ["--prompts", tmp_path / name, flag, "text"]) == CAPTIONS, name
    (tmp_path / "x.txt").write_text("\ufeff" + "\n".join(CAPTIONS), encoding="utf-8")
    assert captions_of(maker, ["--prompts", tmp_path / "x.txt"]) == CAPTIONS
    assert captions_of(maker, ["--prompts", tmp_path / "x.txt", "--max_prompts", 2]) == CAPTIONS[:2]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("UPPER.TXT", "a red circle\na blue square\n"),
        ("table.tsv", "id\tprompt\n1\ta red circle\n2\ta blue square\n"),
        ("TABLE.CSV", "id,prompt\n1,a red circle\n2,a blue square\n"),
        ("list.json", '["a red circle", "a blue square"]'),
        ("lines.jsonl", '{"prompt": "a red circle"}\n{"prompt": "a blue square"}\n'),
        ("brackets[1].txt", "a red circle\na blue square\n"),
    ],
)
def test_captions_are_read_as_the_evaluation_reads_them(maker, tmp_path, name, text):
    evaluation = importlib.import_module("evaluate_diffusion_mapo_sdxl")
    file = tmp_path / name
    file.write_text(text)

    captions = captions_of(maker, ["--prompts", file])
    prompts = evaluation.read_prompts(evaluation.parse_args(["--images", "a=b", "--prompts", str(file)]))

    assert captions == ["a red circle", "a blue square"]
    assert [prompt.text for prompt in prompts] == captions


def test_captions_of_a_set_with_images_are_read_alone(maker, tmp_path):
    """An image that would be decoded would end this one."""
    features = datasets.Features({"caption": datasets.Value("string"), "photo": datasets.Image()})
    broken = [{"bytes": b"no image", "path": None}] * len(CAPTIONS)
    table = pa.table({"caption": CAPTIONS, "photo": broken}, schema=features.arrow_schema)
    (tmp_path / "set" / "data").mkdir(parents=True)
    pq.write_table(table, tmp_path / "set" / "data" / "dev-00000-of-00001.parquet")
    words = ["--prompts", tmp_path / "set", "--caption_column", "caption"]
    assert captions_of(maker, [*words, "--prompt_split", "dev"]) == CAPTIONS


def test_captions_of_pairs_make_another_round(maker, made):
    assert captions_of(maker, ["--prompts", made, "--prompt_column", "caption"]) == CAPTIONS


def test_prompts_that_are_cut_are_counted_with_their_prefix(maker, flags, tmp_path, caplog):
    """Each word is a token, the prefix has three, and two are the start and the end."""
    (tmp_path / "captions.txt").write_text(f"{'red ' * 76}\n{'red ' * 73}\n{'red ' * 72}\n")
    flags |= {"prompts": tmp_path / "captions.txt", "style_prefix": "star circle square"}

    run_script(maker, flags)

    assert "2 of 3 prompts have more than 77 tokens; SDXL ignores the rest." in caplog.text


def test_rows_without_text_are_left_out_and_counted(maker, tmp_path, caplog):
    (tmp_path / "x.jsonl").write_text('{"prompt": " a "}\n{"prompt": " "}\n{"prompt": null}\n{"prompt": "b"}\n')
    assert captions_of(maker, ["--prompts", tmp_path / "x.jsonl"]) == ["a", "b"]
    assert "2 rows without text are left out." in caplog.text


@pytest.mark.parametrize(
    "name, text, sentence",
    [
        ("x.txt", "\n \n", "--prompts x.txt contains no captions"),
        ("x.csv", "text,n\na,1\n", "--prompts x.csv cannot be loaded: --prompt_column: there is no column 'prompt'"),
        ("nowhere.txt", None, "--prompts nowhere.txt cannot be loaded: "),
        ("no/such", None, "--prompts no/such cannot be loaded: "),
    ],
)
def test_wrong_captions(maker, flags, tmp_path, monkeypatch, name, text, sentence):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path(name).write_text(text)
    assert refused(maker, flags | {"prompts": name}).startswith(sentence)


# Resumption and processes --------------------------------------------------------------------------------------------


def launched(words, processes=1):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run([*launcher, *map(str, words)], capture_output=True, text=True, timeout=300)


def test_two_processes_make_the_same(flags, made):
    """Three blocks, which two processes cannot share evenly."""
    statuses, outputs = run_ranks([SCRIPT, *command_line(flags)])
    assert statuses == [0, 0], outputs
    assert hashes(flags["output_dir"] / "data") == hashes(made / "data")


def killed_while_drawing(flags):
    """A run that is killed when it has made its fifth pair, of the second block, but not yet given it its name."""
    assert run_ranks([SCRIPT, *command_line(flags)], {0: [Fault("replace", (6,), killed)]}, size=1)[0] == [-9]
    pairs = sorted(path.name for path in (flags["output_dir"] / "pairs_made").iterdir())
    whole = [f"{number:06d}.parquet" for number in range(4)]
    assert pairs == [".incomplete-000004.parquet", *whole, "settings.json"]


def test_a_killed_run_goes_on_as_if_it_never_was(maker, flags, made, monkeypatch):
    killed_while_drawing(flags)
    blocks, make_block = [], maker.make_block
    monkeypatch.setattr(maker, "make_block", lambda *args: blocks.append(args[-1]) or make_block(*args))
    folder = flags["output_dir"] / "pairs_made"
    times = {path: path.stat().st_mtime_ns for path in folder.glob("0*")}
    checked, assemble = [], maker.assemble

    def check(*args):
        checked.extend(path for path in times if path.stat().st_mtime_ns == times[path])
        assemble(*args)

    monkeypatch.setattr(maker, "assemble", check)
    out = run_script(maker, flags)
    # The second block is drawn beside the same neighbours as before, and its first pair is kept.
    assert blocks == [range(3, 6), range(6, 7)] and len(checked) == len(times) == 4
    assert hashes(out / "data") == hashes(made / "data")
    assert (out / "README.md").read_text() == (made / "README.md").read_text().replace("# pairs", "# out")


def test_a_run_killed_between_shards_or_behind_the_card_goes_on(maker, flags, made, monkeypatch):
    monkeypatch.setattr(maker, "ROWS_PER_SHARD", 4)

    def stopped(*args, **options):
        raise KeyboardInterrupt

    def first_shard_only(write_table, table, path, **options):
        return stopped() if "00001-of" in path.name else write_table(table, path, **options)

    for place in ("array_split", "DatasetCardData", "unlink"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            if place == "array_split":
                patch.setattr(maker.pq, "write_table", partial(first_shard_only, pq.write_table))
            elif place == "unlink":
                patch.setattr(Path, "unlink", stopped)
            else:
                patch.setattr(maker, place, stopped)
            run_script(maker, flags)
    assert len(list(flags["output_dir"].rglob("0*.parquet"))) == 7
    out = run_script(maker, flags)
    assert rows(out) == rows(made) and [path.name for path in (out / "pairs_made").iterdir()] == ["settings.json"]


@pytest.mark.matrix
def test_one_of_two_processes_is_killed_and_both_go_on(flags, made):
    """In its second pair; the launcher ends the other one."""
    fault = {1: [Fault("replace", (2,), killed)]}
    done = launched([*with_faults(fault), SCRIPT, *command_line(flags | {"batch_size": 1})], processes=2)
    assert done.returncode != 0 and not (flags["output_dir"] / "data").exists()
    done = launched([SCRIPT, *command_line(flags | {"batch_size": 1})], processes=2)
    assert done.returncode == 0, done.stderr
    alone = flags["output_dir"].with_name("alone")
    assert launched([SCRIPT, *command_line(flags | {"batch_size": 1, "output_dir": alone})]).returncode == 0
    assert hashes(flags["output_dir"] / "data") == hashes(alone / "data")


def test_a_finished_run_does_nothing_more(maker, flags, copied, spied):
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*.parquet")}, (copied / "README.md").stat()
    run_script(maker, flags)
    after = {path: path.stat().st_mtime_ns for path in copied.rglob("*.parquet")}, (copied / "README.md").stat()
    assert before == after and not spied


@pytest.mark.parametrize(
    "change, named",
    [
        ({"seed": 1}, "--seed 0, now 1"),
        ({"style_prefix": "a photo of"}, "--style_prefix a cartoon of, now a photo of"),
        ({"batch_size": 2}, "--batch_size 3, now 2"),
        ({"different_seeds": True}, "--different_seeds False, now True"),
        ({"mixed_precision": "bf16"}, "--mixed_precision torch.float32, now torch.bfloat16"),
        ({"max_prompts": 2}, "--prompts 7 captions, version "),
        ({"unet": "trained"}, "--unet None, now a local one, version "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_pairs_of_other_settings_are_not_mixed(maker, small, flags, copied, spied, change, named):
    before = hashes(copied)
    change = {name: small / value if name == "unet" else value for name, value in change.items()}
    sentence = refused(maker, flags | change)
    assert sentence.startswith(f"--output_dir {copied} contains ") and f"made with {named}" in sentence
    assert hashes(copied) == before and not spied


def test_retrained_weights_and_other_photos_are_noticed(maker, small, flags, tmp_path):
    lora = shutil.copytree(small / "lora", tmp_path / "lora")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "photos" / "a.png")
    flags |= {"lora": lora, "style_prefix": None, "chosen_images": tmp_path / "photos", "max_prompts": 1}
    run_script(maker, flags)
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "photos" / "a.png")
    assert "made with --chosen_images 1 photos, version " in refused(maker, flags)
    file = lora / "pytorch_lora_weights.safetensors"
    os.utime(file, ns=(0, 0))  # of weights of the same size
    Image.new("RGB", (64, 64), "red").save(tmp_path / "photos" / "a.png")
    assert "made with --lora a local one, version " in refused(maker, flags)


@pytest.mark.parametrize(
    ("flag", "folder"),
    [
        ("pretrained_model_name_or_path", "text_encoder"),
        ("pretrained_vae_model_name_or_path", "vae"),
        ("unet", "unet"),
    ],
)
def test_other_weights_under_the_same_path_are_noticed(maker, small, flags, tmp_path, flag, folder):
    """Although the config beside them has not changed."""
    model = shutil.copytree(small / "pipeline", tmp_path / "model")
    source = model if flag == "pretrained_model_name_or_path" else model / folder
    flags |= {flag: source, "max_prompts": 1}
    run_script(maker, flags)
    (file,) = (model / folder).glob("*.safetensors")
    os.utime(file, ns=(0, 0))

    sentence = refused(maker, flags)

    assert f"made with --{flag} a local one, version " in sentence


def test_flags_of_a_run_without_pairs_may_change(maker, flags, monkeypatch):
    """E.g. a batch that was too large."""
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(maker, "make_block", lambda *args: (_ for _ in ()).throw(MemoryError))
        run_script(maker, flags)
    assert len(rows(run_script(maker, flags | {"batch_size": 2, "max_prompts": 1}))) == 1


@pytest.mark.parametrize("file", ["README.md", "data/train-00000-of-00001.parquet"])
def test_files_of_another_maker_are_left_alone(maker, flags, spied, file):
    path = flags["output_dir"] / file
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    assert (
        refused(maker, flags)
        == f"--output_dir {flags['output_dir']} contains {path.name}, made by another program: choose another folder."
    )
    assert path.read_text() == "mine" and not spied


# Card and hub --------------------------------------------------------------------------------------------------------


def test_card_tells_sizes_and_how_the_pairs_were_made(made):
    _, head, text = (made / "README.md").read_text().split("---\n", 2)
    head, (shard,) = yaml.safe_load(head), shards(made)
    info = head["dataset_info"]
    dtypes = {"caption": "string", "jpg_0": "binary", "jpg_1": "binary", "label_0": "int64", "label_1": "int64"}
    assert {feature["name"]: feature["dtype"] for feature in info["features"]} == dtypes
    assert info["splits"] == [{"name": "train", "num_bytes": info["dataset_size"], "num_examples": len(CAPTIONS)}]
    assert info["download_size"] == shard.stat().st_size
    images = sum(len(row["jpg_0"]) + len(row["jpg_1"]) for row in rows(made))
    assert images < info["dataset_size"] < images + 1000
    assert head["license"] == "other" and "mapo" in head["tags"]
    data = datasets.load_dataset(str(made), split="train")
    assert data.features == datasets.Features({name: datasets.Value(dtype) for name, dtype in dtypes.items()})
    assert data["caption"] == CAPTIONS
    assert "7 pairs of images" in text and "make_pick_style_sdxl.py" in text
    for line in (f"--style_prefix: {PREFIX}", "--seed: 0", "--num_inference_steps: 2", "--guidance_scale: 5.0"):
        assert f"- {line}\n" in text
    assert f"- torch: {torch.__version__}\n" in text


def test_nothing_of_this_machine_is_published(maker, small, scorers, flags, tmp_path):
    """Neither a path nor the last name of one, but for the folder itself."""
    photos = tmp_path / "album"
    photos.mkdir()
    Image.new("RGB", (64, 64)).save(photos / "a.png")
    sources = {"lora": small / "lora", "unet": small / "trained", "hub_token": TOKEN, "max_prompts": 1}
    sources["pretrained_vae_model_name_or_path"] = small / "pipeline" / "vae"
    kinds = [{"chosen_images": photos}, {"num_candidates": 2, "scorer": "clip", "clip_model": scorers["clip_model"]}]
    for number, kind in enumerate(kinds):
        out = run_script(maker, flags | sources | {"style_prefix": None, "output_dir": tmp_path / str(number)} | kind)
        for path in (path for path in out.rglob("*") if path.is_file()):
            content = path.read_bytes()
            for word in (str(tmp_path), str(small), "small0", "captions.txt", "album", TOKEN):
                assert word.encode() not in content, (word, path)


def test_licence_of_a_local_base_is_in_its_folder(maker, small, flags, tmp_path, monkeypatch):
    """The name of a folder may look like a hub id, and nobody is asked for that."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small / "pipeline", "some/sdxl")
    monkeypatch.setattr("huggingface_hub.repocard.hf_hub_download", lambda *args, **options: pytest.fail("asked"))
    flags |= {"pretrained_model_name_or_path": "some/sdxl", "max_prompts": 1}
    assert "license: other" in (run_script(maker, flags) / "README.md").read_text()
    Path("some/sdxl/README.md").write_text("---\nlicense: openrail++\n---\n")
    out = run_script(maker, {**flags, "output_dir": tmp_path / "licensed"})
    assert "license: openrail++" in (out / "README.md").read_text()


def test_base_from_the_hub_is_named_with_its_licence(maker, small, flags, tmp_path, monkeypatch):
    repo = tmp_path / "cache" / "models--some--sdxl"
    shutil.copytree(small / "pipeline", repo / "snapshots" / ("0" * 40))
    head = "---\nlicense: openrail++\nlicense_link: LICENSE.md\nlanguage: en\n---\n"
    (repo / "snapshots" / ("0" * 40) / "README.md").write_text(head)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    flags |= {"pretrained_model_name_or_path": "some/sdxl", "max_prompts": 1}
    out = run_script(maker, flags)
    _, head, text = (out / "README.md").read_text().split("---\n", 2)
    head = yaml.safe_load(head)
    assert (head["license"], head["license_link"]) == ("openrail++", "LICENSE.md") and "language" not in head
    assert "--pretrained_model_name_or_path: some/sdxl, version " in text and str(tmp_path) not in text
    (repo / "refs" / "main").write_text("1" * 40)
    (repo / "snapshots" / ("0" * 40)).rename(repo / "snapshots" / ("1" * 40))
    assert "made with --pretrained_model_name_or_path some/sdxl, version " in refused(maker, flags)


@pytest.fixture
def hub(maker, monkeypatch):
    """A hub on which data sets can be created; what happens there, and when weights are loaded, in order."""
    events, load, repo = [], maker.load_pipeline, types.SimpleNamespace(repo_id="me/some-pairs")
    monkeypatch.setattr(maker, "create_repo", lambda *args, **options: events.append((args, options)) or repo)
    monkeypatch.setattr(maker, "load_pipeline", lambda *args: events.append("weights") or load(*args))
    return events


def test_shards_and_card_are_uploaded(maker, flags, hub, monkeypatch):
    """To a repository that is there before any weight is loaded; by a finished run, too."""
    monkeypatch.setattr(maker, "upload_folder", lambda **options: hub.append(options))
    flags |= {"push_to_hub": True, "hub_token": TOKEN, "max_prompts": 1}
    out = run_script(maker, flags)
    created, weights, uploaded = hub
    # Not False, which would overrule an organization's default.
    assert created == (("out",), {"repo_type": "dataset", "token": TOKEN, "exist_ok": True, "private": None})
    assert weights == "weights" and uploaded["delete_patterns"] == "data/train-*"
    shown = {name: uploaded[name] for name in ("repo_id", "repo_type", "folder_path", "token", "commit_message")}
    assert shown == {
        **shown,
        "repo_id": "me/some-pairs",
        "repo_type": "dataset",
        "folder_path": str(out),
        "token": TOKEN,
    }
    files = [str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()]
    sent = set(filter_repo_objects(sorted(files), allow_patterns=uploaded["allow_patterns"]))
    assert sent == {"README.md", "data/train-00000-of-00001.parquet"}
    assert not [path for path in out.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    hub.clear()
    run_script(maker, flags | {"hub_model_id": "some-pairs", "hub_private_repo": True})
    assert len(hub) == 2 and hub[0][0] == ("some-pairs",) and hub[0][1]["private"] is True


def test_a_failed_upload_loses_nothing(maker, flags, hub):
    """There is no network here."""
    sentence = refused(maker, flags | {"push_to_hub": True, "max_prompts": 1, "hub_token": TOKEN})
    assert sentence.startswith(f"--push_to_hub: the pairs in {flags['output_dir']} cannot be uploaded: ")
    assert TOKEN not in sentence and len(rows(flags["output_dir"])) == 1


@pytest.mark.parametrize("name, word", [(None, "offline"), ("one/two/three", "one/two/three")])
def test_a_repository_that_cannot_be_costs_nothing(maker, flags, spied, name, word):
    sentence = refused(maker, flags | {"push_to_hub": True, "hub_model_id": name, "hub_token": TOKEN})
    assert sentence.startswith("--push_to_hub: the repository cannot be created: ") and word in sentence
    assert TOKEN not in sentence and not spied


# Wrong use -----------------------------------------------------------------------------------------------------------


STYLE = ["--style_prefix", "x"]
ONE_KIND = "give one of --style_prefix (and/or --rejected_prefix), --num_candidates, --chosen_images"


@pytest.mark.parametrize(
    "words, sentence",
    [
        ([], ONE_KIND),
        ([*STYLE, "--chosen_images", "x"], ONE_KIND),
        (["--style_prefix", " "], "--style_prefix: it is empty"),
        (["--rejected_prefix", " "], "--rejected_prefix: it is empty"),
        (["--num_candidates", "4"], "--num_candidates requires --scorer"),
        ([*STYLE, "--scorer", "clip"], "--scorer requires --num_candidates or --min_score"),
        ([*STYLE, "--min_score", "1"], "--min_score requires --scorer"),
        ([*STYLE, "--scorer", "clip", "--min_score", "nan"], "--min_score: nan is not a finite number"),
        (
            [*STYLE, "--rejected_prefix", "x"],
            "--style_prefix and --rejected_prefix are the same: add --different_seeds",
        ),
        (["--chosen_images", "x", "--rejected_images", "x"], "--rejected_images and --chosen_images are the same"),
        (["--chosen_images", "x", "--scorer", "clip"], "--scorer cannot be combined with --chosen_images"),
        ([*STYLE, "--rejected_images", "x"], "--rejected_images requires --chosen_images"),
        (
            ["--chosen_images", "x", "--rejected_images", "y"],
            "--rejected_images cannot be combined with --pretrained_model",
        ),
        (["--num_candidates", "1", "--scorer", "clip"], "is not a whole number of at least 2"),
        (["--num_candidates", "0", "--scorer", "clip"], "is not a whole number of at least 2"),
        (["--num_candidates", "4", "--scorer", "dinov2"], "argument --scorer: invalid choice: 'dinov2'"),
        (["--num_candidates", "4", "--scorer", "clip", "--hps_model", "x"], "unknown arguments: --hps_model ("),
        (["--num_candidates", "4", "--scorer", "clip", "--clip_modl", "x"], "--clip_modl"),
        (["--chosen_images", "x", "--different_seeds"], "--different_seeds requires --style_prefix"),
        ([*STYLE, "--resolution", "100"], "--resolution must be a multiple of 8"),
        ([*STYLE, "--resolution", "0"], "--resolution: 0 is not a positive whole number"),
        ([*STYLE, "--batch_size", "0"], "--batch_size: 0 is not a positive whole number"),
        ([*STYLE, "--num_inference_steps", "-1"], "--num_inference_steps: -1 is not a positive whole number"),
        ([*STYLE, "--seed", "-1"], "--seed: -1 is not a whole number from 0 to 4294967295"),
        ([*STYLE, "--guidance_scale", "nan"], "--guidance_scale: nan is not zero or a positive number"),
        ([*STYLE, "--hub_tokn", TOKEN], "unknown arguments: --hub_tokn (see"),
        ([*STYLE, f"--hub_tokn={TOKEN}"], "unknown arguments: --hub_tokn (see"),
        ([*STYLE, "stray"], "unknown arguments: stray"),
    ],
)
def test_wrong_arguments(maker, capsys, words, sentence):
    with pytest.raises(SystemExit) as end:
        maker.parse_args(["--pretrained_model_name_or_path", "x", "--prompts", "p.txt", *words])
    shown = capsys.readouterr().err
    assert end.value.code == 2 and sentence in shown and TOKEN not in shown


def test_single_file_is_refused_with_the_command_that_converts_it(maker, capsys):
    with pytest.raises(SystemExit) as end:
        maker.parse_args(["--pretrained_model_name_or_path", "some/model.safetensors", "--prompts", "p.txt", *STYLE])
    assert end.value.code == 2
    assert "python convert_sdxl.py single_file some/model.safetensors FOLDER" in capsys.readouterr().err


def test_home_is_expanded_in_every_path_flag(maker, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    names = ["prompts", "chosen_images", "pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"]
    names += ["unet", "lora", "output_dir"]

    args = maker.parse_args([f"--{name}=~/{name}" for name in names])

    assert {name: vars(args)[name] for name in names} == {name: f"/home/me/{name}" for name in names}


SHARED_FUNCTIONS = ["decode_image", "find_images", "stream_prompts", "load_complete", "load_component"]
SHARED_FUNCTIONS += [
    "load_tokenizers",
    "load_sdxl",
    "warn_about_long_prompts",
    "find_file",
    "find_lora_file",
    "find_alpha",
]
SHARED_FUNCTIONS += ["read_lora_config", "bounded", "describe", "write_text"]
SHARED_FUNCTIONS += ["apply_alphas", "read_lora", "add_lora", "add_branch", "try_scheduler"]


@pytest.mark.parametrize("name", SHARED_FUNCTIONS)
def test_both_scripts_repeat_a_function_identically(maker, name):
    evaluation = importlib.import_module("evaluate_diffusion_mapo_sdxl")

    assert inspect.getsource(getattr(maker, name)) == inspect.getsource(getattr(evaluation, name))


@pytest.mark.parametrize("name", ["make_pick_style_sdxl.py", "evaluate_diffusion_mapo_sdxl.py"])
def test_header_asks_for_a_python_that_its_packages_run_on(name):
    header = (ROOT / name).read_text().split("# ///")[1]

    oldest = re.search(r'requires-python = ">=([\d.]+)"', header)[1]
    packages = re.findall(r'"([a-z]+)(?:>=|")', header)

    assert "transformers" in packages
    for package in packages:
        assert oldest in SpecifierSet(metadata(package)["Requires-Python"]), package


def test_what_is_not_installed_is_named(maker, capsys, monkeypatch):
    monkeypatch.setattr(maker.importlib.util, "find_spec", lambda name: None)
    base = ["--pretrained_model_name_or_path", "x", "--prompts", "p.txt"]
    wrong = {"--scorer needs evaluate_diffusion_mapo_sdxl.py beside": ["--num_candidates", "4", "--scorer", "clip"]}
    for sentence, words in wrong.items():
        with pytest.raises(SystemExit):
            maker.parse_args([*base, *words])
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag", ["pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "unet", "lora"]
)
@pytest.mark.parametrize("source", ["/no/such/folder", "no/such", "empty"])
def test_missing_models_are_named_before_weights_are_loaded(maker, flags, spied, tmp_path, monkeypatch, flag, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert refused(maker, flags | {flag: source}).startswith(
        f"--{flag} {source} is not a folder or a reachable hub id with "
    )
    assert not spied and not flags["output_dir"].exists()


def test_wrong_unets(maker, small, flags, spied, tmp_path):
    unet = shutil.copytree(small / "other" / "unet", tmp_path / "unet")
    config = json.loads((unet / "config.json").read_text())
    UNet2DConditionModel.from_config({**config, "cross_attention_dim": 768}).save_pretrained(tmp_path / "wide")
    sentence = f"--unet {tmp_path / 'wide'}: its cross_attention_dim is 768, not 96 as in the base model."
    assert refused(maker, flags | {"unet": tmp_path / "wide"}) == sentence
    base = shutil.copytree(small / "pipeline", tmp_path / "base")
    (base / "unet" / "config.json").write_text(json.dumps({**config, "addition_embed_type": None}))
    sentence = refused(maker, flags | {"pretrained_model_name_or_path": base})
    assert sentence.startswith(f"--pretrained_model_name_or_path {base}: its UNet") and not spied
    weights = load_file(unet / "diffusion_pytorch_model.safetensors")
    del weights["conv_in.weight"]
    save_file(weights, unet / "diffusion_pytorch_model.safetensors")
    sentence = f"--unet {unet} cannot be loaded: it lacks 1 weights, e.g. conv_in.weight"
    assert refused(maker, flags | {"unet": unet}) == sentence


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_a_base_without_a_vocabulary_is_refused(maker, small, flags, tmp_path, name):
    """transformers makes a tokenizer of two tokens, for which all prompts of a length are equal."""
    base = shutil.copytree(small / "pipeline", tmp_path / "base")
    remove_vocabulary(base / name)

    sentence = refused(maker, flags | {"pretrained_model_name_or_path": base})

    assert sentence.startswith(f"--pretrained_model_name_or_path {base} cannot be loaded: its {name} has ")
    assert not list(tmp_path.rglob("0*.parquet"))


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_a_base_that_lacks_weights_is_refused(maker, small, flags, tmp_path, name):
    """The libraries initialize them at random."""
    base = shutil.copytree(small / "pipeline", tmp_path / "base")
    weight = remove_weight(base / name)

    sentence = refused(maker, flags | {"pretrained_model_name_or_path": base})

    reason = f"{name} lacks 1 weights, e.g. {weight}"
    assert sentence == f"--pretrained_model_name_or_path {base} cannot be loaded: {reason}"
    assert not list(tmp_path.rglob("0*.parquet"))


@pytest.mark.parametrize("kind", [*REFUSED, "broken"])
def test_a_lora_that_cannot_be_applied_as_a_whole_is_refused(maker, small, flags, tmp_path, kind):
    file = tmp_path / "x.safetensors"
    if kind == "broken":
        file.write_bytes(b"no weights")
    else:
        save_refused(kind, StableDiffusionXLPipeline.from_pretrained(small / "pipeline"), file)

    sentence = refused(maker, flags | {"lora": file})

    assert sentence.startswith(f"--lora {file} cannot be loaded: ")
    assert REFUSED.get(kind, "") in sentence
    assert not list((flags["output_dir"] / "pairs_made").glob("*.parquet"))


def test_a_scheduler_that_cannot_sample_is_refused(maker, small, flags, tmp_path):
    base = shutil.copytree(small / "pipeline", tmp_path / "base")
    FlowMatchEulerDiscreteScheduler().save_pretrained(base / "scheduler")
    index = (base / "model_index.json").read_text()
    index = index.replace("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler")
    (base / "model_index.json").write_text(index)

    steps = refused(maker, flags | {"num_inference_steps": 1001})
    flow = refused(maker, flags | {"pretrained_model_name_or_path": base})

    assert steps.startswith("--num_inference_steps 1001 with EulerDiscreteScheduler does not work: ")
    assert flow.startswith("--num_inference_steps 2 with FlowMatchEulerDiscreteScheduler does not work: ")
    assert not list(flags["output_dir"].rglob("0*.parquet"))


def test_a_vae_of_other_latents_is_refused(maker, small, flags, tmp_path):
    vae = shutil.copytree(small / "pipeline" / "vae", tmp_path / "vae")
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps({**config, "latents_mean": [0.1] * 4, "latents_std": [1.0] * 4}))
    sentence = refused(maker, flags | {"pretrained_vae_model_name_or_path": vae})
    assert sentence.startswith("--pretrained_vae_model_name_or_path: the VAE's config has latents_mean")


def test_wrong_photos(maker, flags, spied, tmp_path):
    folder = tmp_path / "photos"
    flags |= {"style_prefix": None, "chosen_images": folder}
    sentence = f"--chosen_images {folder} is not a folder with images that Pillow can open."
    assert refused(maker, flags) == sentence
    folder.mkdir()
    assert refused(maker, flags) == sentence
    (folder / "a.heic").write_bytes(b"no image")
    assert refused(maker, flags) == sentence
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:60])
    assert refused(maker, flags).startswith(f"--chosen_images: {folder / 'a.png'} cannot be read: ")
    assert not spied


def test_photos_of_any_format_are_used_and_other_files_named(maker, tmp_path, caplog):
    """Two would be black or white if their pixels were taken as they are: 16 bits of grey, and a transparent one."""
    for suffix in ("avif", "bmp", "jpg", "tiff", "webp"):
        Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / f"a.{suffix}")
    Image.fromarray(np.full((64, 64), 100 * 256, dtype=np.uint16)).save(tmp_path / "b.png")
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(tmp_path / "c.png")
    for name in ("photo.heic", "notes.md", ".hidden"):
        (tmp_path / name).write_text("no photo")

    photos = maker.read_photos(maker.find_given_images("chosen_images", tmp_path), 64)

    centres = [np.array(photo.getpixel((32, 32))) for photo in photos]
    expected = [(200, 30, 30)] * 5 + [(100, 100, 100), (255, 255, 255)]
    assert len(centres) == len(expected)
    assert np.abs(np.array(centres) - np.array(expected)).max() < 8
    assert "left out 2 files that Pillow cannot open: notes.md, photo.heic." in caplog.text


def test_a_missing_scorer_is_named_before_the_model_is_loaded(maker, flags, spied, tmp_path):
    changes = {"style_prefix": None, "num_candidates": 2, "scorer": "clip", "clip_model": tmp_path / "nothing"}
    assert refused(maker, flags | changes).startswith(f"--clip_model {tmp_path / 'nothing'}: ") and not spied


def test_scores_that_are_not_finite_are_refused(maker, scorers, flags, monkeypatch):
    evaluation = importlib.import_module("evaluate_diffusion_mapo_sdxl")
    monkeypatch.setattr(evaluation.CLIP, "score", lambda self, images, captions: torch.full((len(images),), math.nan))
    changes = {"style_prefix": None, "num_candidates": 2, "scorer": "clip", "clip_model": scorers["clip_model"]}

    sentence = refused(maker, flags | changes)

    assert sentence == f"--scorer gives nan to an image of {CAPTIONS[0]!r}."


def test_other_weights_of_a_local_scorer_are_noticed(maker, scorers, flags, tmp_path):
    model = shutil.copytree(scorers["clip_model"], tmp_path / "clip")
    changes = {"style_prefix": None, "num_candidates": 2, "scorer": "clip", "clip_model": model, "max_prompts": 1}
    run_script(maker, flags | changes)

    weights = load_file(model / "model.safetensors")
    save_file({name: weight * 2 for name, weight in weights.items()}, model / "model.safetensors", {"format": "pt"})

    assert "made with --clip_model a local one, version " in refused(maker, flags | changes)


def test_finished_pairs_can_be_uploaded_after_an_upgrade(maker, flags, copied, hub, monkeypatch):
    monkeypatch.setattr(maker.transformers, "__version__", "99")
    uploads = []
    monkeypatch.setattr(maker, "upload_folder", lambda **options: uploads.append(options))

    run_script(maker, flags | {"push_to_hub": True})

    assert len(uploads) == 1


def test_damaged_pair_is_named(maker, flags, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(maker, "assemble", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        run_script(maker, flags)
    pair = flags["output_dir"] / "pairs_made" / "000002.parquet"
    pair.write_bytes(b"")

    sentence = refused(maker, flags)

    assert sentence.startswith(f"--output_dir: {pair} cannot be read, delete it to make it again: ")


@pytest.mark.parametrize("below", ["", "below"])
def test_an_output_folder_that_cannot_be(maker, flags, spied, tmp_path, below):
    (tmp_path / "file").write_text("kept")
    sentence = refused(maker, flags | {"output_dir": tmp_path / "file" / below})
    assert sentence.startswith(f"--output_dir: {tmp_path / 'file' / below}") and not spied


def test_users_see_one_sentence(flags):
    done = launched([SCRIPT, *command_line(flags | {"prompts": "nowhere.txt"})])
    assert done.returncode != 0 and "\nerror: --prompts nowhere.txt cannot be loaded: " in done.stderr
    assert f'{SCRIPT.name}", line' not in done.stderr


def test_every_flag_is_exercised(maker, capsys):
    with pytest.raises(SystemExit):
        maker.parse_args(["--help"])
    names = set(re.findall(r"^  (--\w+)", capsys.readouterr().out, re.MULTILINE))
    text = Path(__file__).read_text()
    assert len(names) > 20 and not {n for n in names if not re.search(rf'["\']{n[2:]}["\']|["\']{n}["\']', text)}
