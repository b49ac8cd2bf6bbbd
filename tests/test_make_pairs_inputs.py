"""What the pair maker is given: captions, folders of images, flags, models and an output folder."""

import importlib
import math
import os
import re
import shutil
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import command_line, run
from cpu_cluster import run_ranks
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from runs import files_in
from sampling import (
    BASE,
    CAPTIONS,
    MAKER,
    TOKEN,
    VAE,
    constant_score,
    double,
    edit_config,
    edit_weights,
    error_of,
    images_of,
    interrupt,
    max_difference,
    parse,
    remove_vocabulary,
    remove_weight,
    rows_of,
    save_lora_trained_on,
    set_to_nan,
    unfinished_pairs,
    usage_error_of,
    weights_file,
)
from small_loras import save_refused


pytest_plugins = "sampling_fixtures"


# Captions ------------------------------------------------------------------------------------------------------------
def read_captions(maker, *words):
    return maker.read_captions(maker.parse_args([*REQUIRED, *STYLE, *map(str, words)]))


@pytest.mark.parametrize("flag", ["--prompt_column", "--caption_column"])
def test_captions_are_a_column_of_a_table(maker, pairs, flag):
    """Here, of earlier pairs."""
    assert read_captions(maker, "--prompts", pairs, flag, "caption") == CAPTIONS


def test_captions_are_read_without_the_images_beside_them(maker, tmp_path):
    """Decoding one of these images would fail."""
    features = datasets.Features({"caption": datasets.Value("string"), "photo": datasets.Image()})
    broken = {"bytes": b"not an image", "path": None}
    table = pa.table({"caption": CAPTIONS, "photo": [broken] * len(CAPTIONS)}, schema=features.arrow_schema)
    (tmp_path / "data").mkdir()
    pq.write_table(table, tmp_path / "data" / "dev-00000-of-00001.parquet")

    captions = read_captions(maker, "--prompts", tmp_path, "--prompt_column", "caption", "--prompt_split", "dev")

    assert captions == CAPTIONS


def test_rows_without_text_are_left_out_with_a_warning(maker, tmp_path, caplog):
    (tmp_path / "x.jsonl").write_text('{"prompt": " a "}\n{"prompt": " "}\n{"prompt": null}\n{"prompt": "b"}\n')

    assert read_captions(maker, "--prompts", tmp_path / "x.jsonl") == ["a", "b"]
    assert "2 rows without text are left out." in caplog.text


def test_warns_about_prompts_that_are_too_long_with_their_prefix(maker, pair_flags, tmp_path, caplog):
    """Each word is a token, the prefix has three, and two mark the start and the end."""
    (tmp_path / "captions.txt").write_text(f"{'red ' * 76}\n{'red ' * 73}\n{'red ' * 72}\n")

    run(maker, {**pair_flags, "prompts": tmp_path / "captions.txt", "style_prefix": "star circle square"})

    assert "2 of 3 prompts have more than 77 tokens; SDXL ignores the rest." in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.txt", "\n \n", "contains no captions"),
        ("x.csv", "text,n\na,1\n", "cannot be loaded: --prompt_column: there is no column 'prompt'"),
        ("missing.txt", None, "cannot be loaded: "),
        ("no/such", None, "cannot be loaded: "),
    ],
)
def test_rejects_wrong_captions(maker, pair_flags, tmp_path, name, text, message):
    file = tmp_path / name
    if text is not None:
        file.write_text(text)

    sentence = error_of(maker, {**pair_flags, "prompts": file})

    assert sentence.startswith(f"--prompts {file} {message}")


# Folders of images ---------------------------------------------------------------------------------------------------
@pytest.fixture
def folder_flags(tmp_path):
    """Flags for two folders of images, of which only `a` and `b` are in both."""
    colours = {
        "chosen": {"a.png": "red", "b.jpg": "green", "c.png": "blue"},
        "rejected": {"a.jpg": "white", "b.png": "black", "d.png": "gray"},
    }
    for folder, images in colours.items():
        (tmp_path / folder).mkdir()
        for name, colour in images.items():
            Image.new("RGB", (40, 30), colour).save(tmp_path / folder / name)
    return {
        "chosen_images": tmp_path / "chosen",
        "rejected_images": tmp_path / "rejected",
        "output_dir": tmp_path / "out",
    }


@pytest.mark.parametrize("source", ["text files", "table"])
def test_images_of_the_same_name_are_paired(maker, folder_flags, loaded_pipelines, tmp_path, caplog, source):
    if source == "text files":
        for name in "abc":
            (folder_flags["chosen_images"] / f"{name}.txt").write_text(f"caption {name}\n")
    else:
        table = tmp_path / "captions.csv"
        table.write_text("file_name,prompt\na.png,caption a\nb.jpg,caption b\nc.png,caption c\n")
        folder_flags["prompts"] = table
    expected = {"caption a": [(255, 0, 0), (255, 255, 255)], "caption b": [(0, 128, 0), (0, 0, 0)]}

    rows = rows_of(run(maker, folder_flags))

    assert [row["caption"] for row in rows] == list(expected)
    for row in rows:
        for image, colour in zip(images_of(row), expected[row["caption"]]):
            assert image.shape == (30, 40, 3)
            assert max_difference(image, np.full_like(image, colour)) < 3
    assert "2 names lack an image or a caption and are left out: c, d." in caplog.text
    card = (folder_flags["output_dir"] / "README.md").read_text()
    assert "synthetic" not in card
    assert "diffusers" not in card  # no model is involved, so an upgrade does not matter
    assert not loaded_pipelines


def test_a_pair_with_a_broken_file_is_left_out(maker, folder_flags, caplog):
    for name in "ab":
        (folder_flags["chosen_images"] / f"{name}.txt").write_text(f"caption {name}")
    broken = folder_flags["rejected_images"] / "a.jpg"
    broken.write_bytes(broken.read_bytes()[:300])

    (row,) = rows_of(run(maker, folder_flags))

    assert row["caption"] == "caption b"
    assert f"--rejected_images: {broken} cannot be read" in caplog.text


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("file_name,prompt\n0001,red\n", "file_name 1 is not text"),
        ("file_name,prompt\nx/a.png,red\ny/a.png,blue\n", "file_name: a occurs twice"),
        ("file_name,prompt\na.png,  \n", "share no file name that has a caption"),
    ],
)
def test_rejects_tables_without_a_caption_for_each_file(maker, folder_flags, tmp_path, table, message):
    (tmp_path / "captions.csv").write_text(table)

    sentence = error_of(maker, {**folder_flags, "prompts": tmp_path / "captions.csv"})

    assert message in sentence


@pytest.fixture
def photo_flags(pair_flags, tmp_path):
    """Flags of the pair maker with one photo."""
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "photos" / "a.png")
    return {**pair_flags, "style_prefix": None, "chosen_images": tmp_path / "photos", "max_prompts": 1}


@pytest.mark.parametrize("kind", ["missing", "another format"])
def test_rejects_folders_without_photos(maker, photo_flags, loaded_pipelines, kind):
    folder = photo_flags["chosen_images"]
    (folder / "a.png").unlink()
    if kind == "missing":
        folder.rmdir()
    else:
        (folder / "a.heic").write_bytes(b"not an image")

    sentence = error_of(maker, photo_flags)

    assert sentence == f"--chosen_images {folder} is not a folder with images that Pillow can open."
    assert not loaded_pipelines


def test_rejects_a_broken_photo(maker, photo_flags, loaded_pipelines):
    photo = photo_flags["chosen_images"] / "a.png"
    photo.write_bytes(photo.read_bytes()[:60])

    sentence = error_of(maker, photo_flags)

    assert sentence.startswith(f"--chosen_images: {photo} cannot be read: ")
    assert not loaded_pipelines


def test_a_caption_without_text_is_refused_with_photos(maker, photo_flags, loaded_pipelines, tmp_path):
    """Left out, it would move all later captions to other photos. At the end, it is harmless."""
    prompts = tmp_path / "captions.txt"
    prompts.write_text("a red circle\n\na blue square\n")

    sentence = error_of(maker, {**photo_flags, "prompts": prompts, "max_prompts": None})

    assert sentence.startswith(f"--prompts {prompts} cannot be loaded: a row above 'a blue square' has no text")
    assert not loaded_pipelines
    prompts.write_text("a red circle\n\n \n")
    (row,) = rows_of(run(maker, {**photo_flags, "prompts": prompts, "max_prompts": None}))
    assert row["caption"] == "a red circle"


# Flags ---------------------------------------------------------------------------------------------------------------
REQUIRED = ["--pretrained_model_name_or_path", "x", "--prompts", "p.txt"]
STYLE = ["--style_prefix", "x"]
PHOTOS = ["--chosen_images", "x"]
ONE_KIND = "give one of --style_prefix (and/or --rejected_prefix), --num_candidates, --chosen_images"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], ONE_KIND),
        ([*STYLE, *PHOTOS], ONE_KIND),
        (["--style_prefix", " "], "--style_prefix: it is empty"),
        (["--rejected_prefix", " "], "--rejected_prefix: it is empty"),
        ([*STYLE, "--rejected_prefix", "x"], "--style_prefix and --rejected_prefix are the same"),
        (["--num_candidates", "4"], "--num_candidates requires --scorer"),
        (["--num_candidates", "1", "--scorer", "clip"], "is not a whole number of at least 2"),
        (["--num_candidates", "4", "--scorer", "dinov2"], "argument --scorer: invalid choice: 'dinov2'"),
        (["--num_candidates", "4", "--scorer", "clip", "--hps_model", "x"], "unknown argument: --hps_model ("),
        (["--num_candidates", "4", "--scorer", "clip", "--clip_modl", "x"], "--clip_modl"),
        ([*STYLE, "--scorer", "clip"], "--scorer requires --num_candidates or --min_score"),
        ([*STYLE, "--min_score", "1"], "--min_score requires --scorer"),
        ([*STYLE, "--scorer", "clip", "--min_score", "nan"], "--min_score: nan is not a finite number"),
        ([*PHOTOS, "--rejected_images", "./x/"], "--rejected_images and --chosen_images are the same"),
        ([*PHOTOS, "--rejected_images", "y"], "--rejected_images cannot be combined with --pretrained_model"),
        ([*STYLE, "--rejected_images", "x"], "--rejected_images requires --chosen_images"),
        ([*PHOTOS, "--scorer", "clip"], "--scorer cannot be combined with --chosen_images"),
        ([*PHOTOS, "--different_seeds"], "--different_seeds requires --style_prefix"),
        ([*STYLE, "--output_dir", ""], "--output_dir is empty"),
        ([*STYLE, "--resolution", "100"], "--resolution must be a multiple of 8"),
        ([*STYLE, "--resolution", "0"], "--resolution: 0 is not a positive whole number"),
        ([*STYLE, "--batch_size", "0"], "--batch_size: 0 is not a positive whole number"),
        ([*STYLE, "--num_inference_steps", "-1"], "--num_inference_steps: -1 is not a positive whole number"),
        ([*STYLE, "--seed", "-1"], "--seed: -1 is not a whole number from 0 to 4294967295"),
        ([*STYLE, "--guidance_scale", "nan"], "--guidance_scale: nan is not zero or a positive number"),
        ([*STYLE, "--hub_tokn", TOKEN], "unknown argument: --hub_tokn (see"),
        ([*STYLE, f"--hub_tokn={TOKEN}"], "unknown argument: --hub_tokn (see"),
        ([*STYLE, "--hub_token", "a", TOKEN], "error: a value does not belong to any flag; quote"),
        (
            ["--num_candidates", "4", "--scorer", "clip", "--clip_model", "x", TOKEN],
            "error: a value does not belong to any flag",
        ),
    ],
)
def test_rejects_wrong_arguments(maker, capsys, words, message):
    printed = usage_error_of(maker, [*REQUIRED, *words], capsys)

    assert message in printed
    assert TOKEN not in printed


@pytest.mark.parametrize(
    "words",
    [["--resolution", "512"], ["--compile"], ["--guidance_scale", "7"], ["--mixed_precision", "bf16"]],
    ids=str,
)
def test_pairs_of_files_reject_flags_of_generation(maker, capsys, words):
    printed = usage_error_of(maker, ["--chosen_images", "x", "--rejected_images", "y", *words], capsys)

    assert f"--rejected_images cannot be combined with {words[0]}" in printed


def test_scorers_require_the_evaluation_script(maker, capsys, monkeypatch):
    monkeypatch.setattr(maker.importlib.util, "find_spec", lambda name: None)

    printed = usage_error_of(maker, [*REQUIRED, "--num_candidates", "4", "--scorer", "clip"], capsys)

    assert "--scorer needs evaluate_diffusion_mapo_sdxl.py beside" in printed


def test_every_flag_occurs_in_a_test(maker, capsys):
    with pytest.raises(SystemExit):
        maker.parse_args(["--help"])
    names = set(re.findall(r"^  --(\w+)", capsys.readouterr().out, re.MULTILINE))
    folder = Path(__file__).parent
    text = "".join(path.read_text() for path in [*folder.glob("test_make_pairs*.py"), folder / "sampling.py"])

    unused = [name for name in names if not re.search(rf"""["'](--)?{name}["']|\b{name}=""", text)]

    assert len(names) > 20
    assert unused == []


# Models --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flag", [BASE, VAE, "unet", "lora"])
@pytest.mark.parametrize("source", ["no/such", "empty"])
def test_rejects_missing_models(maker, pair_flags, loaded_pipelines, tmp_path, monkeypatch, flag, source):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()

    sentence = error_of(maker, {**pair_flags, flag: source})

    assert sentence.startswith(f"--{flag} {source} is neither a folder nor a reachable hub id that contains ")
    assert not pair_flags["output_dir"].exists()
    assert not loaded_pipelines


def test_a_lora_file_that_does_not_exist_is_called_a_file(maker, pair_flags):
    sentence = error_of(maker, {**pair_flags, "lora": "/no/such.safetensors"})

    assert sentence == "--lora /no/such.safetensors: there is no such file."


def test_rejects_a_missing_scorer(maker, candidate_flags, loaded_pipelines, tmp_path):
    sentence = error_of(maker, {**candidate_flags, "clip_model": tmp_path / "missing"})

    assert sentence.startswith(f"--clip_model {tmp_path / 'missing'}: ")
    assert not loaded_pipelines


def error_without_pairs(maker, flags):
    """The error of a run that ends before it has made a pair."""
    sentence = error_of(maker, flags)

    assert not unfinished_pairs(flags["output_dir"])
    return sentence


@pytest.mark.parametrize(
    ("flag", "folder", "damage", "reason"),
    [
        (BASE, "unet", partial(edit_config, addition_embed_type=None), ": its UNet is not conditioned on image sizes"),
        (
            BASE,
            "unet",
            partial(edit_config, in_channels=9),
            " is not an SDXL model: its UNet has extra input channels.",
        ),
        (
            "unet",
            "unet",
            partial(edit_config, cross_attention_dim=768),
            ": its cross_attention_dim is 768, not 96 as in the base model.",
        ),
        (BASE, "tokenizer_2", remove_vocabulary, " cannot be loaded: its tokenizer_2 has "),
    ],
    ids=["SD 1.5", "inpainting", "another text width", "no vocabulary"],
)
def test_rejects_models_before_they_are_loaded(
    maker, pair_flags, base, loaded_pipelines, flag, folder, damage, reason
):
    source = base if flag == BASE else base / folder
    damage(base / folder)

    sentence = error_without_pairs(maker, {**pair_flags, flag: source})

    assert sentence.startswith(f"--{flag} {source}{reason}")
    assert not loaded_pipelines


@pytest.mark.parametrize(
    ("flag", "folder"),
    [(BASE, "unet"), (BASE, "vae"), (BASE, "text_encoder"), (BASE, "text_encoder_2"), ("unet", "unet")],
)
def test_rejects_models_that_lack_weights(maker, pair_flags, base, flag, folder):
    """The libraries would initialize them at random."""
    source = base if flag == BASE else base / folder
    name = folder if flag == BASE else "it"
    weight = remove_weight(base / folder)

    sentence = error_without_pairs(maker, {**pair_flags, flag: source})

    assert sentence == f"--{flag} {source} cannot be loaded: {name} lacks 1 of its weights, e.g. {weight}"


def test_rejects_a_base_model_that_generates_nan(maker, pair_flags, base):
    set_to_nan(base / "vae", "decoder.conv_out.bias")

    sentence = error_without_pairs(maker, {**pair_flags, BASE: base})

    assert "NaN" in sentence
    assert "--mixed_precision bf16" in sentence


def test_rejects_a_scheduler_that_cannot_sample(maker, pair_flags):
    sentence = error_without_pairs(maker, {**pair_flags, "num_inference_steps": 1001})

    assert sentence.startswith("--num_inference_steps 1001 with EulerDiscreteScheduler does not work: ")


def test_rejects_a_vae_with_other_latents(maker, pair_flags, base):
    edit_config(base / "vae", latents_mean=[0.1] * 4, latents_std=[1.0] * 4)

    sentence = error_without_pairs(maker, {**pair_flags, VAE: base / "vae"})

    assert sentence.startswith(f"--{VAE}: the VAE's config has latents_mean")


@pytest.mark.parametrize("kind", ["broken file", "half a layer"])
def test_rejects_a_lora_that_does_not_fit(maker, inputs, pair_flags, tmp_path, kind):
    """All kinds are in test_shared_functions.py."""
    file = tmp_path / "x.safetensors"
    if kind == "broken file":
        file.write_bytes(b"not weights")
    else:
        save_refused(kind, StableDiffusionXLPipeline.from_pretrained(inputs / "pipeline"), file)

    sentence = error_without_pairs(maker, {**pair_flags, "lora": file})

    assert sentence.startswith(f"--lora {file} cannot be loaded: ")


@pytest.mark.parametrize(
    ("trained_on", "unet", "warned"),
    [("trained", None, True), ("trained", "trained", False), ("pipeline", None, False)],
    ids=["without that UNet", "with that UNet", "the base model, by its folder's name"],
)
def test_warns_about_a_lora_of_another_unet(
    maker, inputs, pair_flags, tmp_path, caplog, monkeypatch, trained_on, unet, warned
):
    monkeypatch.chdir(inputs)
    file = tmp_path / "x.safetensors"
    save_lora_trained_on(trained_on, inputs, file)
    args = parse(maker, {**pair_flags, "lora": file, "unet": unet})

    maker.check_models(args, maker.find_models(args))

    warning = (
        f"--lora {file} names {trained_on} as its base model. If that is not {inputs / 'pipeline'}, name its UNet"
    )
    assert (warning in caplog.text) == warned
    assert ("as its base model" in caplog.text) == warned


def test_rejects_scores_that_are_not_finite(maker, candidate_flags, monkeypatch):
    evaluation = importlib.import_module("evaluate_diffusion_mapo_sdxl")
    monkeypatch.setattr(evaluation.CLIP, "score", constant_score(math.nan))

    sentence = error_without_pairs(maker, candidate_flags)

    assert sentence == f"--scorer scored an image of {CAPTIONS[0]!r} as nan."


# Output folders ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 1}, "--seed 0, now 1"),
        ({"style_prefix": "a photo of"}, "--style_prefix a cartoon of, now a photo of"),
        ({"batch_size": 2}, "--batch_size 3, now 2"),
        ({"different_seeds": True}, "--different_seeds False, now True"),
        ({"mixed_precision": "bf16"}, "--mixed_precision torch.float32, now torch.bfloat16"),
        ({"max_prompts": 2}, "--prompts 7 captions, version "),
        ({"unet": "trained"}, "--unet None, now a local path, version "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_rejects_pairs_of_other_settings(
    maker, inputs, pairs, pair_flags, loaded_pipelines, tmp_path, monkeypatch, change, difference
):
    monkeypatch.chdir(inputs)
    output_dir = shutil.copytree(pairs, tmp_path / "out")
    before = files_in(output_dir)

    sentence = error_of(maker, {**pair_flags, **change})

    assert sentence.startswith(f"--output_dir {output_dir} contains ")
    assert f"made with {difference}" in sentence
    assert files_in(output_dir) == before
    assert not loaded_pipelines


@pytest.mark.parametrize(
    ("flag", "folder"),
    [(BASE, "text_encoder"), (VAE, "vae"), ("unet", "unet"), ("lora", "lora")],
)
def test_rejects_pairs_of_other_weights_in_the_same_folder(maker, inputs, base, pair_flags, flag, folder):
    """Sizes and configs do not change when training continues; times do."""
    shutil.copytree(inputs / "lora", base / "lora")
    source = base if flag == BASE else base / folder
    flags = {**pair_flags, flag: source, "max_prompts": 1}
    run(maker, flags)
    os.utime(weights_file(base / folder), ns=(0, 0))

    sentence = error_of(maker, flags)

    assert f"made with --{flag} a local path, version " in sentence


def test_more_photos_than_captions_are_left_out_with_a_warning(maker, photo_flags, caplog):
    """The pairs do not depend on them."""
    run(maker, photo_flags)
    Image.new("RGB", (64, 64), "blue").save(photo_flags["chosen_images"] / "b.png")

    run(maker, photo_flags)

    assert "only the first 1 of 2 photos are used, one for each caption." in caplog.text


def test_rejects_pairs_of_other_photos(maker, photo_flags):
    run(maker, photo_flags)
    Image.new("RGB", (64, 64), "blue").save(photo_flags["chosen_images"] / "a.png")

    sentence = error_of(maker, photo_flags)

    assert "made with --chosen_images 1 photos, version " in sentence


def test_rejects_pairs_of_a_scorer_with_other_weights(maker, scorers, candidate_flags, tmp_path):
    model = shutil.copytree(scorers["clip_model"], tmp_path / "clip")
    flags = {**candidate_flags, "clip_model": model, "max_prompts": 1}
    run(maker, flags)
    edit_weights(model / "model.safetensors", double)

    sentence = error_of(maker, flags)

    assert "made with --clip_model a local path, version " in sentence


@pytest.mark.parametrize("file", ["README.md", "data/train-00000-of-00001.parquet"])
def test_rejects_an_output_folder_with_files_of_others(maker, pair_flags, loaded_pipelines, file):
    path = pair_flags["output_dir"] / file
    path.parent.mkdir(parents=True)
    mine = "in another encoding: é".encode("latin-1")
    path.write_bytes(mine)

    sentence = error_of(maker, pair_flags)

    reason = "which this script did not write"
    if path.name != "README.md":
        reason = "but no .pairs_made/settings.json, so it was not made here"
    assert (
        sentence == f"--output_dir {pair_flags['output_dir']} contains {path.name}, {reason}. Choose another folder."
    )
    assert path.read_bytes() == mine
    assert not loaded_pipelines


def test_rejects_other_settings_if_only_the_card_is_left(maker, pairs, pair_flags, tmp_path):
    (tmp_path / "out" / ".pairs_made").mkdir(parents=True)
    for name in ("README.md", ".pairs_made/settings.json"):
        shutil.copy(pairs / name, tmp_path / "out" / name)

    sentence = error_of(maker, {**pair_flags, "seed": 1})

    assert " contains README.md, made with --seed 0, now 1." in sentence


def test_an_error_of_the_gpu_is_one_sentence_and_pairs_are_kept(maker, pair_flags, monkeypatch):
    generate = maker.generate_images
    calls = []

    def run_out_of_memory(*args):
        calls.append(args)
        if len(calls) > 2:  # in the second block
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(*args)

    monkeypatch.setattr(maker, "generate_images", run_out_of_memory)

    sentence = error_of(maker, pair_flags)

    folder = pair_flags["output_dir"]
    assert sentence == f"A pair cannot be made; those in {folder} are kept: OutOfMemoryError: CUDA out of memory"
    assert [path.name for path in unfinished_pairs(folder)] == [f"{number:06d}.parquet" for number in range(3)]


def test_half_made_pairs_are_not_a_dataset(maker, pair_flags, monkeypatch):
    interrupt(maker, pair_flags, monkeypatch, maker, "assemble")

    with pytest.raises(FileNotFoundError, match="contain any data files"):
        datasets.load_dataset(str(pair_flags["output_dir"]))


def test_half_made_pairs_survive_a_card_that_the_user_has_written(maker, pair_flags, monkeypatch):
    """A card marks a finished dataset, whose pairs are deleted once they are in its shards."""
    interrupt(maker, pair_flags, monkeypatch, maker, "assemble")
    pairs_made = sorted(pair_flags["output_dir"].glob(".pairs_made/*.parquet"))
    (pair_flags["output_dir"] / "README.md").write_text("My notes")

    sentence = error_of(maker, pair_flags)

    assert " contains README.md, which this script did not write." in sentence
    assert len(pairs_made) == 7
    assert all(path.exists() for path in pairs_made)


def test_rejects_an_output_folder_that_cannot_be_made(maker, pair_flags, loaded_pipelines, tmp_path):
    output_dir = tmp_path / "file" / "out"
    output_dir.parent.write_text("kept")

    sentence = error_of(maker, {**pair_flags, "output_dir": output_dir})

    assert sentence.startswith(f"--output_dir: {output_dir}")
    assert not loaded_pipelines


def test_rejects_a_damaged_pair(maker, pair_flags, monkeypatch):
    interrupt(maker, pair_flags, monkeypatch, maker, "assemble")
    pair = pair_flags["output_dir"] / ".pairs_made" / "000002.parquet"
    pair.write_bytes(b"")

    sentence = error_of(maker, pair_flags)

    assert sentence.startswith(f"--output_dir: {pair} cannot be read, delete it to make it again: ")


def test_an_error_is_one_sentence_without_a_traceback(pair_flags):
    statuses, outputs = run_ranks([MAKER, *command_line({**pair_flags, "prompts": "missing.txt"})], size=1)

    (printed,) = outputs
    assert statuses != [0]
    assert re.search("^error: --prompts missing.txt cannot be loaded: ", printed, re.MULTILINE)
    assert f'{MAKER.name}", line' not in printed
