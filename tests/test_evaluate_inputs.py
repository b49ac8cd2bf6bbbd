"""What the evaluation is given: prompts, flags, images and candidates, and how it rejects what cannot work."""

import json
import re
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import run
from diffusers import EDMEulerScheduler, StableDiffusionXLPipeline
from diffusers.schedulers import KarrasDiffusionSchedulers
from PIL import Image
from sampling import (
    BASE,
    LORA_FILE,
    PROMPTS,
    VAE,
    cache_repository,
    edit_config,
    edit_weights,
    error_of,
    parse,
    records_of,
    remove_vocabulary,
    remove_weight,
    results_of,
    set_to_nan,
    usage_error_of,
    weights_file,
)
from small_loras import save_refused
from small_world import build_pipeline


pytest_plugins = "sampling_fixtures"


def texts_of(rows):
    return [row.text for row in rows]


def generated_images(folder):
    return list(folder.rglob("*.png"))


# Prompts -------------------------------------------------------------------------------------------------------------
def read_prompts(evaluation, *words):
    return evaluation.read_prompts(evaluation.parse_args(["--images", "a=b", *map(str, words)]))


def test_prompts_are_a_column_of_a_table(evaluation, tmp_path):
    pq.write_table(pa.table({"caption": PROMPTS, "number": [1, 2, 3]}), tmp_path / "x.parquet")

    rows = read_prompts(evaluation, "--prompts", tmp_path / "x.parquet", "--prompt_column", "caption")

    assert texts_of(rows) == PROMPTS
    assert [row.scored for row in rows] == PROMPTS


def test_prompts_of_a_text_file_may_end_with_blank_lines(evaluation, tmp_path):
    (tmp_path / "x.txt").write_text("\n".join(PROMPTS) + "\n\n  \n")

    rows = read_prompts(evaluation, "--prompts", tmp_path / "x.txt")

    assert texts_of(rows) == PROMPTS


@pytest.mark.parametrize(
    ("words", "source", "column", "split", "category"),
    [
        (["pickapic_v2"], "yuvalkirstain/pickapic_v2_no_images", "caption", "test_unique", None),
        (["partiprompts"], "nateraw/parti-prompts", "Prompt", "train", "Animals"),
        (["me/mine", "--prompt_column", "text", "--prompt_split", "dev"], "me/mine", "text", "dev", None),
    ],
)
def test_prompt_sets_of_the_hub(evaluation, monkeypatch, words, source, column, split, category):
    rows_of_split = {split: [{column: prompt, "Category": "Animals"} for prompt in PROMPTS]}
    builder = SimpleNamespace(config=None, as_streaming_dataset=lambda split: rows_of_split[split])
    builders = {source: builder}
    monkeypatch.setattr(evaluation.datasets, "load_dataset_builder", lambda path: builders[path])

    rows = read_prompts(evaluation, "--prompts", *words)

    assert texts_of(rows) == PROMPTS
    assert {row.category for row in rows} == {category}


def test_hpdv2_is_read_from_the_hub(evaluation):
    assert evaluation.HPDV2["concept-art"] == "hf://datasets/zhwang/HPDv2/benchmark/concept-art.json"


def test_styles_of_hpdv2_are_categories(evaluation, inputs, scoring_flags, tmp_path, monkeypatch):
    """Existing images may be named as the hpsv2 package names them."""
    files = {style: str(tmp_path / f"{style}.json") for style in ("photo", "anime")}
    monkeypatch.setattr(evaluation, "HPDV2", files)
    for style, file in files.items():
        with open(file, "w") as stream:
            json.dump([f"{style} 0", f"{style} 1"], stream)
        for colour in ("red", "blue"):
            folder = tmp_path / colour / style
            folder.mkdir(parents=True)
            for i in range(2):
                image = Image.open(inputs / colour / f"{i:05d}_0.png")
                image.rotate(90 if style == "anime" else 0).save(folder / f"{i:05d}.jpg")
    images = [f"red={tmp_path / 'red'}", f"blue={tmp_path / 'blue'}"]

    output_dir = run(evaluation, {**scoring_flags, "prompts": "hpdv2", "images": images})

    records = records_of(output_dir)
    assert [record["prompt"] for record in records[:4]] == ["photo 0", "photo 1", "anime 0", "anime 1"]
    assert [record["category"] for record in records[:4]] == ["photo", "photo", "anime", "anime"]
    assert records[3]["file"] == str(tmp_path / "red" / "anime" / "00001.jpg")

    mean = np.mean([record["clip"] for record in records[6:]])
    row = {"category": "anime", "model": "blue", "clip": pytest.approx(mean)}
    assert row in results_of(output_dir)["categories"]
    assert f"| anime | blue | {mean:.3f} |" in (output_dir / "results.md").read_text()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.txt", "a\n \nb\n", "row 2 is empty or not text"),
        ("x.txt", "", "contains no prompts"),
        ("x.csv", "text,n\na,1\n", "--prompt_column: there is no column 'prompt' (columns: text, n)"),
        ("x.jsonl", '{"prompt": 3}\n', "row 1 is empty or not text"),
        ("missing.txt", None, "cannot be loaded"),
    ],
)
def test_rejects_wrong_prompts(evaluation, scoring_flags, tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)

    sentence = error_of(evaluation, {**scoring_flags, "prompts": tmp_path / name})

    assert message in sentence


def test_rejects_prompts_without_a_category(evaluation, scoring_flags, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "kind": null}\n')

    sentence = error_of(evaluation, {**scoring_flags, "prompts": file, "category_column": "kind"})

    assert sentence.endswith("--category_column: the row of 'a' has no category")


# Flags ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "give --pretrained_model_name_or_path to generate images, or --images"),
        ("--images i=j --candidates a=b", "--candidates requires --pretrained_model_name_or_path"),
        ("--images a", "'a' is not NAME=PATH"),
        ("--images a=b a=c", "need different names, not a, a"),
        ("--pretrained_model_name_or_path m --images base=b", "need different names, not base, base"),
        ("--images a=b --output_dir=", "--output_dir is empty"),
        ("--images a=b --resolution 100", "--resolution must be a multiple of 8"),
        ("--images a=b --scorers dinov2", "--scorers dinov2 requires --reference_images"),
        ("--images a=b --scheduler EDMEulerScheduler", "--scheduler: invalid choice: 'EDMEulerScheduler'"),
        ("--images a=b --batch_size 0", "argument --batch_size: 0 is not a positive whole number"),
        ("--images a=b --guidance_scale nan", "--guidance_scale: nan is not zero or a positive number"),
        ("--images a=b --reference_images x/{category}", "{category} in a path requires --category_column"),
        (
            "--images a=b --prompts hpdv2 --category_column c",
            "--category_column cannot be combined with --prompts hpdv2",
        ),
        (
            "--images a=b --prompts pickapic_v2 --prompt_split x",
            "--prompt_split cannot be combined with --prompts pick",
        ),
    ],
)
def test_rejects_wrong_arguments(evaluation, capsys, words, message):
    printed = usage_error_of(evaluation, ["--prompts", "p.txt", *words.split()], capsys)

    assert message in printed


@pytest.mark.parametrize(("scorer", "package"), [("siglip", "sentencepiece"), ("hps", "ftfy")])
def test_scorers_name_missing_packages(evaluation, capsys, monkeypatch, scorer, package):
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda package: None)

    printed = usage_error_of(evaluation, ["--prompts", "p.txt", "--images", "a=b", "--scorers", scorer], capsys)

    assert f"--scorers {scorer} needs a package: pip install {package}" in printed


def test_repeated_scorers_are_used_once(evaluation):
    args = evaluation.parse_args(["--prompts", "p.txt", "--images", "a=b", "--scorers", "clip", "hps", "clip"])

    assert args.scorers == ["clip", "hps"]


def test_stable_diffusion_supports_every_scheduler(evaluation):
    supported = {scheduler.name.removesuffix("Scheduler") for scheduler in KarrasDiffusionSchedulers}

    assert set(evaluation.SCHEDULERS) <= supported


# Missing files, before any image is generated ------------------------------------------------------------------------
@pytest.mark.parametrize(
    "flag",
    [BASE, VAE, "clip_model", "hps_model", "hps_weights", "aesthetic_weights", "reference_images"],
)
def test_rejects_missing_sources(evaluation, generation_flags, inputs, tmp_path, flag):
    scorers = {"scorers": ["clip", "hps", "aesthetic", "dinov2"], "reference_images": inputs / "green"}

    sentence = error_of(evaluation, {**generation_flags, **scorers, flag: tmp_path / "missing"})

    assert re.match(rf"--{flag} {tmp_path / 'missing'}( is (neither|not) a folder|: there is no )", sentence)
    assert not (tmp_path / "out" / "images").exists()


def test_rejects_a_scorer_without_weights(evaluation, generation_flags, tmp_path):
    model = shutil.copytree(generation_flags["clip_model"], tmp_path / "clip")
    weights_file(model).unlink()

    sentence = error_of(evaluation, {**generation_flags, "clip_model": model})

    assert sentence == f"--clip_model {model}: there is no model.safetensors in this folder or hub repository."


def test_version_of_a_local_scorer_covers_all_its_files(evaluation, generation_flags, tmp_path):
    """Otherwise its earlier scores would be used again."""
    model = shutil.copytree(generation_flags["clip_model"], tmp_path / "clip")
    args = parse(evaluation, {**generation_flags, "clip_model": model})
    versions = [evaluation.find_source(args, "clip", "model")]

    for name in ("config.json", "preprocessor_config.json", "tokenizer.json", weights_file(model).name):
        with open(model / name, "ab") as file:
            file.write(b" ")
        versions.append(evaluation.find_source(args, "clip", "model"))

    assert len(set(versions)) == 5


def test_rejects_an_unwritable_output_dir(evaluation, generation_flags, tmp_path):
    (tmp_path / "file").write_text("")
    output_dir = tmp_path / "file" / "out"

    sentence = error_of(evaluation, {**generation_flags, "output_dir": output_dir})

    assert sentence.startswith(f"--output_dir {output_dir} cannot be written: ")


def test_rejects_missing_images(evaluation, scoring_flags, red):
    (red / "00001_0.png").unlink()

    sentence = error_of(evaluation, {**scoring_flags, "images": [f"red={red}"]})

    assert sentence == f"--images red={red} lacks 1 of 3 images, e.g. {red / '00001_0.png'}"


def test_images_may_have_other_formats(evaluation, scoring_flags, red):
    (red / "00001_0.png").unlink()
    Image.open(red / "00000_0.png").save(red / "00001_0.jpg")

    output_dir = run(evaluation, {**scoring_flags, "images": [f"red={red}"]})

    assert records_of(output_dir)[1]["file"] == str(red / "00001_0.jpg")


# Models that cannot work, before any image is generated --------------------------------------------------------------
def test_rejects_a_scheduler_that_cannot_sample(evaluation, generation_flags, tmp_path):
    flags = {**generation_flags, "scheduler": "DDIMScheduler", "num_inference_steps": 1001}

    sentence = error_of(evaluation, flags)

    assert sentence.startswith("--num_inference_steps 1001 with DDIMScheduler does not work: ")
    assert not generated_images(tmp_path)


def test_rejects_another_scheduler_for_a_base_model_without_betas(evaluation, base, generation_flags, tmp_path):
    EDMEulerScheduler().save_pretrained(base / "scheduler")

    sentence = error_of(evaluation, {**generation_flags, BASE: base, "scheduler": "DDIMScheduler"})

    assert sentence == f"--scheduler DDIMScheduler cannot be used with {base}: its scheduler has no beta schedule."
    assert not generated_images(tmp_path)


@pytest.mark.parametrize(
    ("folder", "damage", "reason"),
    [
        ("tokenizer", remove_vocabulary, "its tokenizer has "),
        ("unet", remove_weight, "unet lacks 1 of its weights, e.g. {}"),
        ("vae", remove_weight, "vae lacks 1 of its weights, e.g. {}"),
        ("text_encoder", remove_weight, "text_encoder lacks 1 of its weights, e.g. {}"),
        ("text_encoder_2", remove_weight, "text_encoder_2 lacks 1 of its weights, e.g. {}"),
    ],
)
def test_rejects_an_incomplete_base_model(evaluation, base, generation_flags, tmp_path, folder, damage, reason):
    """transformers would build a tokenizer of two tokens, and missing weights would be random."""
    removed = damage(base / folder)

    sentence = error_of(evaluation, {**generation_flags, BASE: base})

    assert sentence.startswith(f"--{BASE} {base} cannot be loaded: {reason.format(removed)}")
    assert not generated_images(tmp_path)


@pytest.mark.parametrize(("flag", "folder"), [(BASE, "vae"), ("candidates", "unet")], ids=["VAE", "UNet"])
def test_rejects_images_of_nan(evaluation, base, generation_flags, tmp_path, flag, folder):
    """Saved as PNG, they would be black."""
    set_to_nan(base / folder, "conv_out.bias")
    source = base if flag == BASE else f"x={base}"
    changes = {"images_per_prompt": 1, flag: source if flag == BASE else [source]}

    sentence = error_of(evaluation, {**generation_flags, **changes})

    assert sentence.startswith(f"--{flag} {source}: image generation failed: the model produced NaN in ")
    assert not generated_images(tmp_path / "out" / "images" / "x")
    assert bool(generated_images(tmp_path / "out" / "images" / "base")) == (flag == "candidates")


# Candidates ----------------------------------------------------------------------------------------------------------
def error_of_candidate(evaluation, flags, source):
    """The error for a candidate that is rejected before any image is generated, without its beginning."""
    sentence = error_of(evaluation, {**flags, "candidates": [f"x={source}"]})

    assert sentence.startswith(f"--candidates x={source}")
    assert not generated_images(flags["output_dir"])
    return sentence.removeprefix(f"--candidates x={source}")


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("{missing}", ""),
        ("{missing}+{lora}", ": {missing}"),
        ("{unet}+{missing}", ": {missing}"),
        ("{file}+{lora}", ": {file}"),
    ],
    ids=["a candidate", "the UNet of a LoRA", "the LoRA of a UNet", "a single file instead of a UNet"],
)
def test_rejects_candidates_without_weights(evaluation, inputs, generation_flags, tmp_path, source, missing):
    file = inputs / "unet" / "diffusion_pytorch_model.safetensors"
    source = source.format(lora=inputs / "lora", unet=inputs / "unet", missing=tmp_path, file=file)

    message = error_of_candidate(evaluation, generation_flags, source)

    named = missing.format(missing=tmp_path, file=file)
    assert message.startswith(f"{named} is neither a folder nor a reachable hub id that contains ")


def test_an_incomplete_image_does_not_fix_the_settings(evaluation, tmp_path):
    (tmp_path / ".incomplete-00000_0.png").touch()
    system = evaluation.System("x", "x", tmp_path, {})

    assert evaluation.check_images(system, {"settings": {"seed": 1}}) == {"settings": {"seed": 1}}


def test_a_lora_file_that_does_not_exist_is_called_a_file(evaluation, generation_flags):
    message = error_of_candidate(evaluation, generation_flags, "/no/such.safetensors")

    assert message == ": there is no such file."


@pytest.mark.parametrize("folder", ["lora", "unet", "other"])
def test_rejects_a_candidate_with_a_broken_file(evaluation, inputs, generation_flags, tmp_path, folder):
    model = shutil.copytree(inputs / folder, tmp_path / "model")
    for file in model.rglob("*.safetensors"):
        file.write_bytes(b"not weights")

    message = error_of_candidate(evaluation, generation_flags, model)

    assert message.startswith(" cannot be loaded: ")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (partial(edit_config, cross_attention_dim=768), "its cross_attention_dim is 768, not 96 as in the base model"),
        (remove_weight, "it lacks 1 of its weights, e.g. add_embedding.linear_1.bias"),
    ],
    ids=["another text width", "a missing weight"],
)
def test_rejects_a_unet_that_does_not_fit(evaluation, inputs, generation_flags, tmp_path, damage, reason):
    unet = shutil.copytree(inputs / "unet", tmp_path / "unet")
    damage(unet)

    message = error_of_candidate(evaluation, generation_flags, unet)

    assert message == f" cannot be loaded: {reason}"


def test_rejects_a_pipeline_of_another_prediction_type(evaluation, generation_flags, tmp_path):
    """All models are sampled with one scheduler, which would misread the predictions of this one."""
    build_pipeline(tmp_path / "other", prediction_type="v_prediction")

    message = error_of_candidate(evaluation, generation_flags, tmp_path / "other")

    reason = "its scheduler's prediction_type is v_prediction, not epsilon as in the base model"
    assert message == f" cannot be loaded: {reason}"


@pytest.mark.parametrize("kind", ["half a layer", "another text width"])
def test_rejects_a_lora_that_does_not_fit(evaluation, inputs, generation_flags, tmp_path, kind):
    """All kinds are in test_shared_functions.py."""
    file = tmp_path / "x.safetensors"
    save_refused(kind, StableDiffusionXLPipeline.from_pretrained(inputs / "pipeline"), file)

    message = error_of_candidate(evaluation, generation_flags, file)

    assert message.startswith(" cannot be loaded: ")


def zero_up(weights):
    for name, weight in weights.items():
        if "lora_B" in name:
            weight.zero_()


def test_rejects_a_candidate_that_is_the_base_model(evaluation, inputs, generation_flags, tmp_path):
    lora = shutil.copytree(inputs / "lora", tmp_path / "lora")
    edit_weights(lora / LORA_FILE, zero_up)
    flags = {**generation_flags, "max_prompts": 1, "images_per_prompt": 1, "candidates": [f"x={lora}"]}

    sentence = error_of(evaluation, flags)

    reason = "all 1 images are identical to those of base, so there is nothing to compare."
    assert sentence == f"--candidates x={lora}: {reason}"


def test_candidates_from_the_hub_are_recognized_by_their_files(
    evaluation, inputs, generation_flags, tmp_path, monkeypatch
):
    """The version of a hub id is its commit."""
    cache_repository(monkeypatch, tmp_path / "cache", "me/mine", inputs / "trained")
    args = parse(evaluation, {**generation_flags, "candidates": ["x=me/mine"]})

    base, candidate = evaluation.find_systems(args, [])

    assert base.models[None].kind == "base"
    assert candidate.models[None].kind == "unet"
    assert candidate.models[None].source == "me/mine"
    assert candidate.models[None].version == "0" * 40
