"""Generation of the evaluation: images against diffusers, settings, resuming, and several processes."""

import itertools
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import command_line, run
from cpu_cluster import run_ranks
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from runs import files_in
from sampling import (
    BASE,
    EVALUATION,
    LORA_FILE,
    PROMPTS,
    SCORERS,
    TOLERANCE,
    VAE,
    double,
    edit_weights,
    error_of,
    flags_to_generate,
    image_of,
    interrupt,
    max_difference,
    parse,
    read_folder,
    read_rgb,
    records_of,
    results_of,
    sample,
    save_lora_trained_on,
    times_of,
    weights_file,
)
from small_loras import merge, random_lora, save_kohya
from small_scorers import expected_score


pytest_plugins = "sampling_fixtures"

# A candidate of each kind: {name: folder in `inputs`}.
CANDIDATES = {"unet_in_subfolder": "trained", "unet": "unet", "lora": "lora", "pipeline": "other"}


def flags_of_candidates(inputs):
    return [f"{name}={inputs / folder}" for name, folder in CANDIDATES.items()]


@pytest.fixture(scope="module")
def generated(evaluation, inputs, scorers, tmp_path_factory):
    """Output of a run with the base model and a candidate of each kind."""
    flags = flags_to_generate(inputs, scorers, tmp_path_factory.mktemp("generated"))
    return run(evaluation, {**flags, "candidates": flags_of_candidates(inputs)})


@pytest.fixture
def copied(generated, tmp_path):
    """A copy of `generated` as the output folder of a test, with the times of its files."""
    return shutil.copytree(generated, tmp_path / "out")


@pytest.fixture
def one_image(generation_flags):
    """Flags that generate a single image per model."""
    return {**generation_flags, "max_prompts": 1, "images_per_prompt": 1}


def load_base(inputs):
    return StableDiffusionXLPipeline.from_pretrained(inputs / "pipeline")


def sample_for(evaluation, pipeline, prompt_number=0, image_number=0, seed=0, **options):
    """The image that the evaluation should generate, by diffusers' own pipeline."""
    seed_of_image = evaluation.image_seed(seed, prompt_number, image_number)
    return sample(pipeline, PROMPTS[prompt_number], seed_of_image, **options)


# Images --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["base", *CANDIDATES])
def test_images_match_diffusers(evaluation, inputs, generated, name):
    pipeline = load_base(inputs)
    if name == "pipeline":
        pipeline = StableDiffusionXLPipeline.from_pretrained(inputs / "other")
    elif name == "lora":
        pipeline.load_lora_weights(inputs / "lora")
    elif name != "base":
        pipeline.unet = UNet2DConditionModel.from_pretrained(inputs / "other", subfolder="unet")

    assert len(list((generated / "images" / name).glob("*.png"))) == 6
    for image_id in ((0, 0), (2, 1)):
        image = image_of(generated, name, *image_id)
        # Rounding depends on the batch.
        assert max_difference(image, sample_for(evaluation, pipeline, *image_id)) <= 1
        if name != "base":
            assert max_difference(image, image_of(generated, "base", *image_id)) > 1


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("{file}", "lora"),
        ("{folder}", "lora"),
        ("{inputs}/trained+{file}", "unet and lora"),
        ("{inputs}/other+{folder}", "unet and lora"),
    ],
    ids=["a file of any name", "its folder", "on a UNet", "on a pipeline"],
)
def test_a_lora_changes_the_unet_and_the_text_encoders(evaluation, inputs, one_image, tmp_path, source, kind):
    pipeline = load_base(inputs)
    if "trained" in source:
        pipeline.unet = UNet2DConditionModel.from_pretrained(inputs / "trained", subfolder="unet")
    elif "other" in source:
        pipeline = StableDiffusionXLPipeline.from_pretrained(inputs / "other")
    lora = random_lora(pipeline)
    file = tmp_path / "lora" / "mystyle.safetensors"
    save_kohya(lora, file)
    source = source.format(inputs=inputs, file=file, folder=file.parent)

    output_dir = run(evaluation, {**one_image, "candidates": [f"x={source}"]})

    expected = sample_for(evaluation, merge(pipeline, lora))
    assert max_difference(image_of(output_dir, "x"), expected) <= 1
    assert max_difference(image_of(output_dir, "base"), expected) > 8
    assert results_of(output_dir)["settings"]["models"]["x"]["kind"] == kind


@pytest.mark.parametrize(
    ("trained_on", "with_unet", "warned"),
    [
        ("{inputs}/trained", False, True),
        ("{inputs}/trained", True, False),
        ("{inputs}/pipeline", False, False),
        ("pipeline", False, False),
        ("", False, False),
    ],
    ids=["another UNet", "another UNet that is given", "the base model", "its folder's name", "unknown"],
)
def test_warns_about_a_lora_of_another_unet(
    evaluation, inputs, generation_flags, tmp_path, caplog, trained_on, with_unet, warned
):
    file = tmp_path / "x.safetensors"
    save_lora_trained_on(trained_on.format(inputs=inputs), inputs, file)
    source = f"{inputs / 'trained'}+{file}" if with_unet else str(file)
    args = parse(evaluation, {**generation_flags, "candidates": [f"x={source}"]})

    evaluation.find_systems(args, [])

    base = inputs / "pipeline"
    warning = f"x={file} names {inputs / 'trained'} as its base model. If that is not {base}, use x=UNET+{file} with"
    assert (warning in caplog.text) == warned
    assert ("as its base model" in caplog.text) == warned


def test_subjects_have_their_own_models_and_photos(evaluation, inputs, generation_flags, scorers, tmp_path):
    """Two personalized subjects in one run: each has a LoRA, photos, and prompts without its name for the scorers."""
    rows = [("dog", "a red circle", "a circle"), ("cat", "a blue star", "a star"), ("dog", "a red star", "a star")]
    lines = ["subject,prompt,plain", *(",".join(row) for row in rows)]
    (tmp_path / "prompts.csv").write_text("\n".join(lines))
    shutil.copytree(inputs / "red", tmp_path / "photos" / "dog")
    shutil.copytree(inputs / "blue", tmp_path / "photos" / "cat")
    shutil.copytree(inputs / "lora", tmp_path / "dog")
    shutil.copytree(inputs / "lora", tmp_path / "cat")
    edit_weights(tmp_path / "cat" / LORA_FILE, double)
    changes = {
        "prompts": tmp_path / "prompts.csv",
        "category_column": "subject",
        "scoring_prompt_column": "plain",
        "candidates": [f"lora={tmp_path}/{{category}}"],
        "reference_images": f"{tmp_path}/photos/{{category}}",
        "scorers": ["clip", "dinov2"],
        "images_per_prompt": 1,
    }

    output_dir = run(evaluation, {**generation_flags, **changes})

    pipeline = load_base(inputs)
    pipeline.load_lora_weights(tmp_path / "cat", weight_name=LORA_FILE)
    image = sample(pipeline, "a blue star", evaluation.image_seed(0, 1, 0))
    assert max_difference(image_of(output_dir, "lora", 1), image) <= 1

    records_of_lora = records_of(output_dir)[3:]
    for record, (subject, _, plain) in zip(records_of_lora, rows, strict=True):
        image = read_rgb(record["file"])
        photos = read_folder(tmp_path / "photos" / subject)
        for scorer in ("clip", "dinov2"):
            expected = expected_score(scorer, scorers, image, plain, photos)
            assert record[scorer] == pytest.approx(expected, rel=0, abs=TOLERANCE[scorer])

    categories = {row["category"] for row in results_of(output_dir)["categories"]}
    assert categories == {"dog", "cat", "mean of categories"}


def test_scores_of_a_subject_are_kept_if_the_next_one_fails(
    evaluation, inputs, scoring_flags, tmp_path, monkeypatch, record_calls
):
    (tmp_path / "prompts.csv").write_text("subject,prompt\nred,a circle\nblue,a star\n")
    changes = {
        "prompts": tmp_path / "prompts.csv",
        "category_column": "subject",
        "reference_images": f"{inputs}/{{category}}",
        "scorers": ["dinov2"],
    }
    flags = {**scoring_flags, **changes}
    build_scorer = evaluation.build_scorer

    def broken_scorer(args, name, device, reference_images):
        if reference_images.endswith("blue"):
            raise OSError("the disk is gone")
        return build_scorer(args, name, device, reference_images)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "build_scorer", broken_scorer)
        error_of(evaluation, flags)
    builds = record_calls(evaluation, "build_scorer")
    run(evaluation, flags)

    assert [build.args[3] for build in builds] == [f"{inputs}/blue"]


# Settings of generation ----------------------------------------------------------------------------------------------
def test_each_image_has_its_own_seed(evaluation):
    ids = list(itertools.product(range(3), range(20), range(20)))

    seeds = {evaluation.image_seed(*image_id) for image_id in ids}

    assert len(seeds) == len(ids)


def test_settings_reach_the_pipeline_and_are_recorded(evaluation, inputs, one_image, tmp_path):
    pipeline = load_base(inputs)
    pipeline.save_pretrained(tmp_path / "base", variant="fp16")
    sources = {BASE: tmp_path / "base", VAE: inputs / "other" / "vae", "variant": "fp16"}
    changes = {"scheduler": "DDIMScheduler", "guidance_scale": 1.5, "seed": 3, "num_inference_steps": 3}

    output_dir = run(evaluation, {**one_image, **sources, **changes})

    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.vae = AutoencoderKL.from_pretrained(inputs / "other" / "vae")
    image = sample_for(evaluation, pipeline, seed=3, guidance_scale=1.5, num_inference_steps=3)
    assert max_difference(image_of(output_dir, "base"), image) == 0

    settings = results_of(output_dir)["settings"]
    assert changes.items() <= settings.items()

    version = settings["models"]["base"]["version"]
    stored = json.loads((output_dir / "images" / "base" / "settings.json").read_text())
    assert stored["settings"].pop("base model") == version
    assert stored["settings"].items() <= settings.items()
    assert stored["models"] == {"model for prompt 0": version}
    assert stored["prompts"] == {"prompt 0": PROMPTS[0]}


def test_half_precision(evaluation, inputs, one_image):
    flags = {**one_image, "candidates": [f"lora={inputs / 'lora'}"], "mixed_precision": "bf16"}

    output_dir = run(evaluation, flags)

    settings = json.loads((output_dir / "images" / "lora" / "settings.json").read_text())
    assert settings["settings"]["dtype"] == "torch.bfloat16"


def test_compiled_blocks_give_the_same_images(evaluation, inputs, generation_flags, generated, compiled_graphs):
    flags = {**generation_flags, "candidates": [f"lora={inputs / 'lora'}"], "compile": True}

    output_dir = run(evaluation, flags)

    assert compiled_graphs
    for name in ("base", "lora"):
        for path in (generated / "images" / name).glob("*.png"):
            compiled = Image.open(output_dir / "images" / name / path.name)
            assert max_difference(compiled, Image.open(path)) <= 1


@pytest.mark.parametrize(
    ("device", "mixed_precision", "warned"), [("cuda", "no", True), ("cuda", "bf16", False), ("cpu", "no", False)]
)
def test_warns_about_float32_on_a_gpu(evaluation, generation_flags, caplog, device, mixed_precision, warned):
    args = parse(evaluation, generation_flags)
    accelerator = SimpleNamespace(device=torch.device(device), mixed_precision=mixed_precision)

    evaluation.load_shared(args, accelerator)

    assert ("--mixed_precision bf16 is faster" in caplog.text) == warned


def test_warns_about_prompts_that_are_too_long(evaluation, generation_flags, caplog):
    run(evaluation, {**generation_flags, "images_per_prompt": 1})

    assert "1 of 3 prompts have more than 77 tokens; SDXL ignores the rest." in caplog.text


# Resuming ------------------------------------------------------------------------------------------------------------
def test_only_missing_images_are_generated(evaluation, inputs, generation_flags, generated, copied, record_calls):
    batches = record_calls(evaluation, "generate_images")
    images = copied / "images"
    times = times_of(images, "*.png")
    missing = images / "unet" / "00001_0.png"
    missing.unlink()

    run(evaluation, {**generation_flags, "candidates": flags_of_candidates(inputs)})

    # The batch is the one of the first run: in another one, the image might be rounded differently.
    assert [call.args[-1] for call in batches] == [[(0, 0), (0, 1), (1, 0), (1, 1)]]
    assert files_in(images) == files_in(generated / "images")
    new_times = times_of(images, "*.png")
    assert [path for path in times if new_times[path] != times[path]] == [missing]
    scores = (generated / "scores.jsonl").read_text()
    assert (copied / "scores.jsonl").read_text() == scores.replace(str(generated), str(copied))


def test_an_interrupted_run_resumes(evaluation, inputs, generation_flags, generated, monkeypatch):
    """It is interrupted while it writes the fourth image."""
    flags = {**generation_flags, "candidates": [f"lora={inputs / 'lora'}"]}
    output_dir = flags["output_dir"]
    save = Image.Image.save
    saved = []

    def save_or_interrupt(image, path, **options):
        save(image, path, **options)
        saved.append(path)
        if len(saved) == 4:
            Path(path).write_bytes(Path(path).read_bytes()[:50])
            raise KeyboardInterrupt

    interrupt(evaluation, flags, monkeypatch, Image.Image, "save", save_or_interrupt)
    num_complete = len(list(output_dir.rglob("0*.png")))
    run(evaluation, flags)

    assert num_complete == 3
    for name in ("base", "lora"):
        assert files_in(output_dir / "images" / name) == files_in(generated / "images" / name)


def test_more_prompts_keep_existing_images(evaluation, generation_flags, tmp_path):
    """First one of two prompts, then both, then three."""
    prompts = tmp_path / "prompts.txt"
    flags = {**generation_flags, "prompts": prompts}
    images = flags["output_dir"] / "images"
    prompts.write_text("\n".join(PROMPTS[:2]) + "\n")
    run(evaluation, {**flags, "max_prompts": 1})
    times = times_of(images, "*.png")

    run(evaluation, flags)
    prompts.write_text("\n".join(PROMPTS) + "\n")
    run(evaluation, flags)

    all_times = times_of(images, "*.png")
    assert len(all_times) == 6
    assert times.items() <= all_times.items()

    # Fewer prompts delete nothing.
    run(evaluation, {**flags, "max_prompts": 1})
    assert times_of(images, "*.png") == all_times


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 1}, "seed (0, now 1)"),
        ({"scheduler": "DDIMScheduler"}, "scheduler (EulerDiscreteScheduler, now DDIMScheduler)"),
        ({"mixed_precision": "bf16"}, "dtype (torch.float32, now torch.bfloat16)"),
        ({"prompts": "changed.txt"}, f"prompt 1 ({PROMPTS[1]}, now a green star)"),
    ],
    ids=["seed", "scheduler", "dtype", "prompt"],
)
def test_rejects_images_of_other_settings(
    evaluation, generation_flags, copied, tmp_path, monkeypatch, change, difference
):
    monkeypatch.chdir(tmp_path)
    Path("changed.txt").write_text(f"{PROMPTS[0]}\na green star\n")

    sentence = error_of(evaluation, {**generation_flags, **change})

    folder = copied / "images" / "base"
    assert sentence == f"{folder} was generated with another {difference}. Delete the folder or change --output_dir."


def test_rejects_images_without_their_settings(evaluation, generation_flags, copied):
    (copied / "images" / "base" / "settings.json").unlink()

    sentence = error_of(evaluation, generation_flags)

    assert sentence.startswith(f"{copied / 'images' / 'base'} contains images, but its settings.json is missing")


def test_rejects_images_of_one_model_for_a_model_per_category(evaluation, inputs, one_image, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a red circle", "kind": "trained"}\n')
    flags = {**one_image, "prompts": tmp_path / "prompts.jsonl", "category_column": "kind"}
    run(evaluation, {**flags, "candidates": [f"x={inputs / 'lora'}"]})

    sentence = error_of(evaluation, {**flags, "candidates": [f"x={inputs}/{{category}}"]})

    assert "x was generated with another model for prompt 0 (" in sentence


@pytest.mark.parametrize(
    ("retrained", "difference"),
    [
        ("unet/unet", "x was generated with another model for prompt 0 ("),
        ("lora", "x was generated with another model for prompt 0 ("),
        ("vae", "base was generated with another vae ("),
    ],
    ids=["UNet", "LoRA", "VAE"],
)
def test_rejects_images_of_other_weights(evaluation, inputs, one_image, tmp_path, retrained, difference):
    unet = shutil.copytree(inputs / "trained", tmp_path / "unet")
    lora = shutil.copytree(inputs / "lora", tmp_path / "lora")
    vae = shutil.copytree(inputs / "pipeline" / "vae", tmp_path / "vae")
    flags = {**one_image, "candidates": [f"x={unet}+{lora}"], VAE: vae}
    run(evaluation, flags)
    edit_weights(weights_file(tmp_path / retrained), double)

    sentence = error_of(evaluation, flags)

    assert sentence.startswith(f"{flags['output_dir'] / 'images'}/{difference}")


def test_copies_of_models_and_other_libraries_keep_the_images(evaluation, inputs, one_image, tmp_path, monkeypatch):
    """Weights are recognized by their content, in any folder, and libraries only affect rounding."""
    lora = shutil.copytree(inputs / "lora", tmp_path / "snapshots" / "lora")
    vae = shutil.copytree(inputs / "pipeline" / "vae", tmp_path / "snapshots" / "vae")
    run(evaluation, {**one_image, "candidates": [f"lora={lora}"], VAE: vae})
    images = one_image["output_dir"] / "images"
    times = times_of(images, "*.png")

    lora = shutil.copytree(lora, tmp_path / "copied" / "lora", copy_function=shutil.copyfile)
    vae = shutil.copytree(vae, tmp_path / "copied" / "vae", copy_function=shutil.copyfile)
    monkeypatch.setattr("diffusers.configuration_utils.__version__", "99")
    monkeypatch.setattr(evaluation.diffusers, "__version__", "99")
    run(evaluation, {**one_image, "candidates": [f"lora={lora}"], VAE: vae})

    assert times_of(images, "*.png") == times


# Several processes ---------------------------------------------------------------------------------------------------
def test_two_processes_write_the_same_files(evaluation, inputs, scorers, tmp_path, monkeypatch):
    """Paths are relative, so that even the paths in the files are equal."""
    flags = {
        **flags_to_generate(inputs, scorers, "out"),
        "candidates": [f"lora={inputs / 'lora'}"],
        "reference_images": inputs / "green",
        "scorers": SCORERS,
        "batch_size": 2,
    }
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()

    monkeypatch.chdir(tmp_path / "one")
    run(evaluation, flags)
    monkeypatch.chdir(tmp_path / "two")
    statuses, outputs = run_ranks([EVALUATION, *command_line(flags)])

    assert statuses == [0, 0], outputs
    files = files_in(tmp_path / "one")
    files_of_two = files_in(tmp_path / "two")
    assert files.keys() == files_of_two.keys()
    assert [name for name in files if files[name] != files_of_two[name]] == []
    # Images and settings of two models, scores.jsonl, results.md, results.json, a grid, and the scores.
    assert len(files) == 12 + 2 + 4 + len(SCORERS)


def test_an_error_of_one_process_is_one_sentence(scoring_flags, red):
    broken = red / "00001_0.png"
    broken.write_bytes(b"not an image")
    flags = {**scoring_flags, "images": [f"red={red}"], "batch_size": 1}

    statuses, outputs = run_ranks([EVALUATION, *command_line(flags)])

    printed = "".join(outputs)
    assert 0 not in statuses
    assert f"error: Image {broken} cannot be read, fix or delete it: " in printed
    assert not re.search(r'File ".*evaluate_diffusion', printed)
