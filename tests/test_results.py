"""What a run leaves behind: images, model card, and uploads to the hub."""

import json
import re
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import run, scalars, short_run
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from huggingface_hub.utils import filter_repo_objects
from runs import LORA_WEIGHTS, TOKEN, VALIDATION, assert_equal, files_with, grid_images, largest_difference, trained
from safetensors import safe_open
from small_world import build_pipeline


SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
PROMPTS = ["a red circle", "an orange star, drawn by hand", "a green square"]


def published_files_with(text, out):
    """Checkpoints are not published."""
    return [path for path in files_with(text, out) if not path.relative_to(out).parts[0].startswith("checkpoint-")]


def read_model_card(out):
    """The metadata, the text, and the JSON block of the text."""
    _, metadata, text = (out / "README.md").read_text().split("---\n", 2)
    details = re.search(r"```json\n(.*?)\n```", text, re.DOTALL)[1]
    return yaml.safe_load(metadata), text, json.loads(details)


@pytest.fixture(scope="module", params=[4, None], ids=["LoRA", "UNet"])
def finished_flags(request, script, world, tmp_path_factory):
    """Flags of a finished run, of a LoRA or of the full UNet with the default prompts."""
    flags = {
        **short_run(world, tmp_path_factory.mktemp("out")),
        "rank": request.param,
        "learning_rate": 0.02 if request.param else 1e-3,
        "num_validation_pairs": 4,
        "loss_type": "mapo_v1",
        "beta_mapo": 0.25,
        "hub_token": TOKEN,
        "run_validation": True,
        "validation_steps": 2,
        "validation_prompts": PROMPTS if request.param else None,
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
    }
    run(script, flags)
    return flags


def generate(pipeline, prompts):
    """Images like those of a validation."""
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for number, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(number)
        output = pipeline(prompt, num_inference_steps=3, guidance_scale=4.0, generator=generator)
        images.append(np.asarray(output.images[0], dtype=int))
    return images


def test_grid_shows_images_of_plain_pipelines(script, finished_flags):
    """Left those of the base model, right those of the saved weights, with the same seeds."""
    out = finished_flags["output_dir"]
    prompts = finished_flags["validation_prompts"] or script.VALIDATION_PROMPTS
    pipeline = StableDiffusionXLPipeline.from_pretrained(finished_flags["pretrained_model_name_or_path"])
    base = generate(pipeline, prompts)
    if finished_flags["rank"] is None:
        pipeline.unet = UNet2DConditionModel.from_pretrained(out, subfolder="unet")
    else:
        pipeline.load_lora_weights(out)
    aligned = generate(pipeline, prompts)

    middle = grid_images(out / "validation" / "step-000002.png")
    end = grid_images(out / "validation" / "step-000004.png")

    assert largest_difference(middle[::2], base) <= 1
    assert largest_difference(end[::2], base) <= 1
    assert largest_difference(end[1::2], aligned) <= 1
    for image, base_image, middle_image in zip(aligned, base, middle[1::2]):
        assert largest_difference([image], [base_image]) > 3
        assert largest_difference([image], [middle_image]) > 3


# Model card ---------------------------------------------------------------------------------------------------------
def test_model_card_describes_the_run_and_how_to_load_the_weights(script, finished_flags):
    out = finished_flags["output_dir"]
    metadata, text, details = read_model_card(out)

    assert {"mapo", "text-to-image"} <= set(metadata["tags"])
    if finished_flags["rank"] is None:
        assert "unet" in metadata["tags"]
        assert "unet = UNet2DConditionModel.from_pretrained(" in text
    else:
        assert "lora" in metadata["tags"]
        assert "load_lora_weights(" in text
    assert "objective `mapo_v1` at beta 0.25" in text
    assert "of `pipeline`" in text
    assert "pairs of `pairs`" in text
    for name in ("learning_rate", "seed", "max_train_steps", "resolution"):
        assert details["flags"][name] == finished_flags[name]
    assert details["flags"]["lr_scheduler"] == "constant"
    for library in (torch, script.diffusers, script.transformers, script.datasets):
        assert details["versions"][library.__name__] == library.__version__
    for name in ("loss", "chosen_mse", "rejected_mse", "margin", "accuracy"):
        key = f"eval_{name}"
        assert details["metrics"][key] == pytest.approx(scalars(out)[key][4], rel=1e-6)
    image = re.search(r"!\[.*\]\((.*)\)", text)[1]
    assert (out / image).is_file()


def test_no_local_path_and_no_token_is_published(finished_flags):
    """The hub would refuse a model card with a local folder as base model, whose license is not known either."""
    out = finished_flags["output_dir"]
    metadata, _, _ = read_model_card(out)

    assert published_files_with(str(out.parent), out) == []
    assert files_with(TOKEN, out) == []
    assert "base_model" not in metadata
    assert "license" not in metadata


@pytest.fixture
def hub_model(world, tmp_path, flags):
    """Flags of a run on SDXL from the hub, which is in the cache at commit aaa... Returns its folder."""
    folder = tmp_path / "cache" / "models--stabilityai--stable-diffusion-xl-base-1.0"
    shutil.copytree(world / "pipeline", folder / "snapshots" / (40 * "a"))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(40 * "a")
    flags.update(pretrained_model_name_or_path=SDXL, cache_dir=tmp_path / "cache")
    return folder


@pytest.mark.parametrize(("rank", "revision"), [(4, None), (None, "main")], ids=["LoRA", "UNet"])
def test_base_model_on_the_hub_is_named_and_stays_at_the_commit_of_the_first_start(
    script, flags, hub_model, tmp_path, rank, revision
):
    flags.update(rank=rank, checkpointing_steps=2, revision=revision)
    uninterrupted = run(script, {**flags, "output_dir": tmp_path / "uninterrupted"})
    run(script, {**flags, "max_train_steps": 2})

    # Somebody pushes another model.
    build_pipeline(hub_model / "snapshots" / (40 * "b"), seed=1)
    (hub_model / "refs" / "main").write_text(40 * "b")
    out = run(script, {**flags, "resume_from_checkpoint": "latest"})

    assert_equal(trained(out), trained(uninterrupted))
    metadata, text, details = read_model_card(out)
    assert details["commits"]["model"] == 40 * "a"
    assert metadata["base_model"] == SDXL
    assert metadata["license"] == "openrail++"
    assert f"of `{SDXL}`" in text
    assert f'from_pretrained("{SDXL}")' in text
    assert "fine-tuned for 4 steps" in text
    assert published_files_with(str(tmp_path), out) == []


@pytest.mark.parametrize("repository", ["of a pipeline", "of its own"])
@pytest.mark.parametrize(
    ("part", "flag"),
    [("unet", "pretrained_unet_name_or_path"), ("vae", "pretrained_vae_model_name_or_path")],
)
def test_replaced_part_on_the_hub_stays_at_the_commit_of_the_first_start(
    script, flags, tmp_path, part, flag, repository
):
    def push(commit, seed):
        build_pipeline(tmp_path / commit, seed=seed)
        pushed = tmp_path / commit if repository == "of a pipeline" else tmp_path / commit / part
        shutil.copytree(pushed, folder / "snapshots" / commit)
        (folder / "refs" / "main").write_text(commit)

    folder = tmp_path / "cache" / "models--me--other"
    (folder / "refs").mkdir(parents=True)
    push(40 * "a", seed=1)
    flags.update({flag: "me/other", "cache_dir": tmp_path / "cache", "checkpointing_steps": 2})
    uninterrupted = run(script, {**flags, "output_dir": tmp_path / "uninterrupted"})
    run(script, {**flags, "max_train_steps": 2})

    # Somebody pushes other weights. --revision is of the base model only.
    push(40 * "b", seed=2)
    out = run(script, {**flags, "resume_from_checkpoint": "latest", "revision": "main"})

    assert_equal(trained(out), trained(uninterrupted))
    _, _, details = read_model_card(out)
    assert details["commits"] == {"model": None, "unet": None, "vae": None, "dataset": None, part: 40 * "a"}


def test_model_card_of_a_lora_loads_the_unet_that_it_was_trained_on(script, flags, hub_model, tmp_path):
    """That UNet may have another license than SDXL."""
    full = run(script, {**flags, "rank": None, "max_train_steps": 1, "output_dir": tmp_path / "full"})

    out = run(script, {**flags, "pretrained_unet_name_or_path": full, "max_train_steps": 1})

    metadata, text, _ = read_model_card(out)
    assert "license" not in metadata
    assert 'pipeline.unet = UNet2DConditionModel.from_pretrained("full", subfolder="unet")' in text
    with safe_open(out / LORA_WEIGHTS, "pt") as file:
        lora_config = json.loads(file.metadata()["lora_adapter_metadata"])
    assert lora_config["unet.base_model_name_or_path"] == "full"


def test_model_card_of_a_continued_lora_does_not_claim_the_license_of_sdxl(script, flags, hub_model, tmp_path):
    lora = run(script, {**flags, "max_train_steps": 1, "output_dir": tmp_path / "lora"})

    out = run(script, {**flags, "init_lora": lora, "max_train_steps": 1})

    assert read_model_card(lora)[0]["license"] == "openrail++"
    assert "license" not in read_model_card(out)[0]


@pytest.mark.parametrize(
    "text",
    ["# My project\n", "tags:\n- mapo\n", "tags:\n- diffusers-training\n"],
    ids=["other", "pairs", "other script"],
)
def test_foreign_readme_is_kept(script, flags, caplog, text):
    flags["output_dir"].mkdir()
    (flags["output_dir"] / "README.md").write_text(text)

    out = run(script, {**flags, "max_train_steps": 1})

    assert (out / "README.md").read_text() == text
    assert "README.md is not a model card of this script" in caplog.text


# Upload -------------------------------------------------------------------------------------------------------------
@pytest.fixture
def hub_events(script, monkeypatch):
    """Created repositories, and when weights are loaded, in their order."""
    events = []
    load_pipeline = script.load_pipeline

    def create_repo(name, **options):
        events.append((name, options))
        return types.SimpleNamespace(repo_id="me/some-model")  # the hub adds the user

    def load_and_record(*args):
        events.append("weights")
        return load_pipeline(*args)

    monkeypatch.setattr(script, "create_repo", create_repo)
    monkeypatch.setattr(script, "load_pipeline", load_and_record)
    return events


def test_failed_upload_loses_nothing(script, flags, hub_events, tmp_path, monkeypatch, caplog, capfd):
    """There is no network here. With a relative output folder."""
    monkeypatch.chdir(tmp_path)
    flags.update(VALIDATION, output_dir="results/mine", push_to_hub=True, hub_token=TOKEN)

    out = run(script, flags)

    for name in ("README.md", LORA_WEIGHTS, "validation/step-000004.png", "checkpoint-4"):
        assert (out / name).exists()
    assert "--push_to_hub failed" in caplog.text
    assert "hf upload me/some-model results/mine --exclude 'checkpoint-*/**' --exclude '.*'" in caplog.text
    # None for `private`, because False would override an organization's default.
    assert hub_events == [("mine", {"exist_ok": True, "private": None, "token": TOKEN}), "weights"]
    assert files_with(TOKEN, tmp_path) == []
    assert TOKEN not in caplog.text
    assert TOKEN not in "".join(capfd.readouterr())
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


@pytest.mark.parametrize("logging_dir", ["logs", "./logs", "logs/"])
def test_everything_but_checkpoints_logs_and_hidden_files_is_uploaded(
    script, flags, hub_events, monkeypatch, logging_dir
):
    """Names of log files contain the host name."""
    uploads = []
    monkeypatch.setattr(script, "upload_folder", lambda **options: uploads.append(options))
    flags.update(push_to_hub=True, hub_model_id="some-model", hub_token=TOKEN, hub_private_repo=True)
    flags.update(logging_dir=logging_dir, checkpointing_steps=2, max_train_steps=2)

    out = run(script, flags)

    assert hub_events == [("some-model", {"exist_ok": True, "private": True, "token": TOKEN}), "weights"]
    (upload,) = uploads
    assert Path(upload["folder_path"]) == out
    assert upload["repo_id"] == "me/some-model"
    assert upload["token"] == TOKEN
    assert upload["commit_message"] == "End of training"

    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    ignored = {file for file in files if file.startswith(("checkpoint-2/", "logs/"))} | {".lock"}
    expected = files - ignored
    assert len(ignored) > 5
    assert {"README.md", LORA_WEIGHTS} <= expected
    others = [".cache/huggingface/some.lock", "logs/wandb/offline-run/some.wandb", "unet/.config.json.1a"]
    uploaded = filter_repo_objects(sorted(files) + others, ignore_patterns=upload["ignore_patterns"])
    assert set(uploaded) == expected
