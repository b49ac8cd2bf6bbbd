"""The pair maker: images and layout of the pairs, kinds of pairs, resuming, several processes, card and hub."""

import io
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import command_line, run, scalars
from cpu_cluster import Fault, killed, run_ranks, with_faults
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from runs import files_in
from sampling import (
    BASE,
    CAPTIONS,
    MAKER,
    STYLE_PREFIX,
    TOKEN,
    VAE,
    cache_repository,
    edit_config,
    error_of,
    images_of,
    interrupt,
    max_difference,
    pair_seed,
    parse,
    raise_interrupt,
    rows_of,
    sample,
    shards_of,
    times_of,
    unfinished_pairs,
)
from small_scorers import expected_score


pytest_plugins = "sampling_fixtures"


@pytest.fixture
def pipeline(inputs):
    """The base model in diffusers' own pipeline."""
    return StableDiffusionXLPipeline.from_pretrained(inputs / "pipeline")


def card_of(folder):
    """The fields and the text of a dataset's card."""
    _, fields, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(fields), text


def assert_sampled(rows, pipeline, chosen_prefix="", rejected_prefix="", different_seeds=False, seed=0, **options):
    """The images are those of diffusers' own pipeline. Rounding depends on the batch."""
    for number, row in enumerate(rows):
        chosen, rejected = images_of(row)
        chosen_prompt = f"{chosen_prefix} {row['caption']}".strip()
        rejected_prompt = f"{rejected_prefix} {row['caption']}".strip()
        chosen_seed = pair_seed(number, 0, seed)
        rejected_seed = pair_seed(number, 1, seed) if different_seeds else chosen_seed
        assert max_difference(chosen, sample(pipeline, chosen_prompt, chosen_seed, **options)) <= 1
        assert max_difference(rejected, sample(pipeline, rejected_prompt, rejected_seed, **options)) <= 1


# Layout --------------------------------------------------------------------------------------------------------------
COLUMNS = {"caption": "string", "jpg_0": "binary", "jpg_1": "binary", "label_0": "int64", "label_1": "int64"}


def test_dataset_has_the_layout_of_pick_style(pairs):
    files = ["data/train-00000-of-00001.parquet", "README.md", ".pairs_made/settings.json"]

    rows = rows_of(pairs)

    assert files_in(pairs).keys() == set(map(Path, files))
    assert pq.read_schema(pairs / files[0]).equals(pa.schema(COLUMNS.items()))
    assert [row["caption"] for row in rows] == CAPTIONS
    assert {(row["label_0"], row["label_1"]) for row in rows} == {(0, 1), (1, 0)}
    for row in rows:
        for name in ("jpg_0", "jpg_1"):
            image = Image.open(io.BytesIO(row[name]))
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 64))


def test_pairs_are_sharded_and_grouped(maker, pair_flags, pairs, monkeypatch):
    monkeypatch.setattr(maker, "ROWS_PER_GROUP", 3)
    monkeypatch.setattr(maker, "ROWS_PER_SHARD", 4)

    output_dir = run(maker, pair_flags)

    row_groups = {}
    for shard in shards_of(output_dir):
        metadata = pq.read_metadata(shard)
        row_groups[shard.name] = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert row_groups == {"train-00000-of-00002.parquet": [3, 1], "train-00001-of-00002.parquet": [3]}
    assert rows_of(output_dir) == rows_of(pairs)
    assert datasets.load_dataset(str(output_dir), split="train")["caption"] == CAPTIONS


@pytest.mark.parametrize("streaming", [None, True], ids=["map-style", "streaming"])
def test_the_trainer_reads_pairs(script, flags, pairs, streaming):
    flags.update(dataset_name=pairs, streaming=streaming, max_train_steps=2)

    losses = scalars(run(script, flags))["loss"]

    assert len(losses) == 2
    assert np.isfinite(list(losses.values())).all()


# Images --------------------------------------------------------------------------------------------------------------
def test_only_the_chosen_image_has_the_style_prefix(pipeline, pairs):
    """Both images start from the same noise."""
    assert_sampled(rows_of(pairs), pipeline, chosen_prefix=STYLE_PREFIX)
    for row in rows_of(pairs):
        assert max_difference(*images_of(row)) > 1


def test_settings_reach_the_pipeline(maker, pipeline, inputs, pair_flags, tmp_path):
    pipeline.save_pretrained(tmp_path / "base", variant="fp16")
    pipeline.vae = AutoencoderKL.from_pretrained(inputs / "other" / "vae")
    flags = {
        **pair_flags,
        BASE: tmp_path / "base",
        VAE: inputs / "other" / "vae",
        "variant": "fp16",
        "style_prefix": f"  {STYLE_PREFIX} ",
        "rejected_prefix": "a blurred photo of",
        "different_seeds": True,
        "seed": 3,
        "guidance_scale": 1.5,
        "num_inference_steps": 3,
        "max_prompts": 2,
    }

    rows = rows_of(run(maker, flags))

    assert len(rows) == 2
    prefixes = {"chosen_prefix": STYLE_PREFIX, "rejected_prefix": "a blurred photo of"}
    options = {"guidance_scale": 1.5, "num_inference_steps": 3}
    assert_sampled(rows, pipeline, **prefixes, different_seeds=True, seed=3, **options)


def test_only_the_rejected_image_may_have_a_prefix(maker, pipeline, pair_flags):
    prefixes = {"style_prefix": None, "rejected_prefix": "a blurred photo of"}

    rows = rows_of(run(maker, {**pair_flags, **prefixes, "max_prompts": 2}))

    assert_sampled(rows, pipeline, rejected_prefix="a blurred photo of")


def test_the_seed_swaps_sides_at_random(maker, pair_flags, monkeypatch):
    image = Image.new("RGB", (1, 1))
    monkeypatch.setattr(maker, "generate_images", lambda args, pipeline, prompts, seeds: [image] * len(prompts))

    def sides_of(seed):
        args = parse(maker, {**pair_flags, "seed": seed})
        tables = maker.make_block(args, None, None, maker.Inputs(["a"] * 400, [], []), range(400))
        return np.array([table.to_pylist()[0]["label_0"] for table in tables])

    sides = sides_of(seed=0)
    repeated = sides_of(seed=0)
    others = sides_of(seed=1)

    assert (sides == repeated).all()
    # As fair coins, which are equal to each other in half of the cases.
    assert 160 < sides.sum() < 240
    assert 160 < others.sum() < 240
    assert 160 < (sides == others).sum() < 240


@pytest.mark.parametrize(("flag", "source"), [("unet", "trained"), ("unet", "other/unet"), ("lora", "lora")])
def test_a_second_round_uses_the_trained_model(maker, pipeline, inputs, pairs, pair_flags, flag, source):
    if flag == "unet":
        pipeline.unet = UNet2DConditionModel.from_pretrained(inputs / "other", subfolder="unet")
    else:
        pipeline.load_lora_weights(inputs / "lora")

    output_dir = run(maker, {**pair_flags, flag: inputs / source, "max_prompts": 3})

    rows = rows_of(output_dir)
    assert_sampled(rows, pipeline, chosen_prefix=STYLE_PREFIX)
    for row, row_of_base in zip(rows, rows_of(pairs)):
        for image, image_of_base in zip(images_of(row), images_of(row_of_base)):
            assert max_difference(image, image_of_base) > 1


def noise_is_the_same_in_half_precision():
    """Older versions of torch draw other noise."""
    exact, half = [
        torch.randn(64, dtype=dtype, generator=torch.Generator().manual_seed(0))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    return torch.equal(exact.bfloat16(), half)


@pytest.mark.parametrize(
    ("force_upcast", "vae_dtype"), [(True, torch.float32), (False, torch.bfloat16)], ids=["upcast", "half"]
)
def test_half_precision_leaves_a_vae_that_would_overflow_in_float32(
    maker, pairs, pair_flags, base, loaded_pipelines, record_calls, force_upcast, vae_dtype
):
    edit_config(base / "vae", force_upcast=force_upcast)
    loads = record_calls(maker, "load_complete")

    output_dir = run(maker, {**pair_flags, BASE: base, "mixed_precision": "bf16", "max_prompts": 2})

    ((_, _, loaded),) = loaded_pipelines
    for model in (loaded.unet, loaded.text_encoder, loaded.text_encoder_2):
        assert model.dtype == torch.bfloat16
    assert loaded.vae.dtype == vae_dtype
    # Only the VAE is loaded in float32.
    assert [load.kwargs["dtype"] for load in loads] == [torch.float32, *3 * [torch.bfloat16]]
    for row, exact in zip(rows_of(output_dir), rows_of(pairs)):
        difference = max_difference(images_of(row)[0], images_of(exact)[0])
        assert difference > 0
        assert difference < 40 or not noise_is_the_same_in_half_precision()


def test_compiled_blocks_give_the_same_images(maker, pipeline, inputs, pair_flags, compiled_graphs):
    pipeline.load_lora_weights(inputs / "lora")

    rows = rows_of(run(maker, {**pair_flags, "lora": inputs / "lora", "compile": True}))

    assert compiled_graphs
    assert_sampled(rows, pipeline, chosen_prefix=STYLE_PREFIX)


# Candidates, scores and photos ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["pickscore", "aesthetic", "imagereward"])
def test_the_best_candidate_is_paired_with_the_worst(maker, pipeline, scorers, pair_flags, name):
    sources = {flag: path for flag, path in scorers.items() if flag.startswith(f"{name}_")}
    changes = {"style_prefix": None, "num_candidates": 3, "scorer": name, "max_prompts": 4}

    output_dir = run(maker, {**pair_flags, **changes, **sources})

    rows = rows_of(output_dir)
    for number, row in enumerate(rows):
        candidates = [sample(pipeline, row["caption"], pair_seed(number, i)) for i in range(3)]
        scores = [expected_score(name, scorers, image, row["caption"]) for image in candidates]
        chosen, rejected = images_of(row)
        assert max_difference(chosen, candidates[np.argmax(scores)]) <= 1
        assert max_difference(rejected, candidates[np.argmin(scores)]) <= 1
        # Pixels that are rounded differently change the scores of these small models by up to 0.05.
        labels = sorted([row["label_0"], row["label_1"]])
        assert labels == pytest.approx([min(scores), max(scores)], abs=0.05)
    assert pq.read_schema(shards_of(output_dir)[0]).field("label_0").type == pa.float64()
    *_, label_0, label_1 = card_of(output_dir)[0]["dataset_info"]["features"]
    assert label_0["dtype"] == label_1["dtype"] == "float64"


@pytest.mark.parametrize(
    "kind", [{"style_prefix": STYLE_PREFIX, "num_candidates": None}, {}], ids=["prefix", "candidates"]
)
def test_pairs_below_the_minimum_score_are_dropped(maker, scorers, candidate_flags, tmp_path, kind):
    flags = {**candidate_flags, **kind}
    all_flags = {**flags, "min_score": -1e9, "output_dir": tmp_path / "all"}
    all_rows = rows_of(run(maker, all_flags))
    scores = []
    for row in all_rows:
        chosen = Image.fromarray(images_of(row)[0].astype(np.uint8))
        scores.append(expected_score("clip", scorers, chosen, row["caption"]))
    third, fourth = sorted(scores)[2:4]
    min_score = (third + fourth) / 2

    rows = rows_of(run(maker, {**flags, "min_score": min_score}))

    assert len(rows) == len(CAPTIONS) - 3
    assert rows == [row for row, score in zip(all_rows, scores) if score > min_score]


def test_rejects_a_minimum_score_that_no_pair_reaches(maker, candidate_flags):
    sentence = error_of(maker, {**candidate_flags, "min_score": 1e9})

    assert "every pair was dropped. No image can be read, or --min_score is too high" in sentence
    assert not unfinished_pairs(candidate_flags["output_dir"])


def test_photos_are_chosen_in_turn(maker, pipeline, pair_flags, tmp_path, caplog):
    """A transparent one, a large one that is turned by its EXIF data, and an ordinary one."""
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGBA", (60, 40), (200, 30, 30, 0)).save(photos / "a.PNG", format="PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (300, 150), (30, 200, 30)).save(photos / "b.jpg", exif=exif)
    Image.new("RGB", (80, 80), (30, 30, 200)).save(photos / "c.webp")
    for name in ("photo.heic", "notes.md", "a.txt", ".hidden"):
        (photos / name).write_text("not a photo")
    # Height, width and colour of the chosen images.
    expected = [(40, 60, (255, 255, 255)), (128, 64, (30, 200, 30)), (64, 64, (30, 30, 200))]

    output_dir = run(maker, {**pair_flags, "style_prefix": None, "chosen_images": photos})

    rows = rows_of(output_dir)
    for number, row in enumerate(rows):
        chosen, rejected = images_of(row)
        *size, colour = expected[number % 3]
        assert list(chosen.shape[:2]) == size
        assert max_difference(chosen, np.full_like(chosen, colour)) < 8
        assert max_difference(rejected, sample(pipeline, row["caption"], pair_seed(number))) <= 1
        # EXIF data may tell where a photo was taken.
        assert b"exif" not in (row["jpg_0"] + row["jpg_1"]).lower()
    assert "left out 2 files that Pillow cannot open: notes.md, photo.heic." in caplog.text


# Resuming ------------------------------------------------------------------------------------------------------------
def test_a_killed_run_resumes(maker, pair_flags, pairs, record_calls, monkeypatch):
    """It is killed when it has written its fifth pair, in the second block, under a temporary name."""
    statuses, _ = run_ranks([MAKER, *command_line(pair_flags)], {0: [Fault("replace", (6,), killed)]}, size=1)
    assert statuses == [-9]
    folder = pair_flags["output_dir"] / ".pairs_made"
    times = times_of(folder, "0*.parquet")
    assert sorted(path.name for path in times) == [f"{number:06d}.parquet" for number in range(4)]
    assert (folder / ".incomplete-000004.parquet").exists()

    blocks = record_calls(maker, "make_block")
    assemble = maker.assemble
    times_before_assembly = {}

    def record_times(*args):
        times_before_assembly.update(times_of(folder, "0*.parquet"))
        assemble(*args)

    monkeypatch.setattr(maker, "assemble", record_times)
    output_dir = run(maker, pair_flags)

    # The second block is the one of an uninterrupted run, because rounding depends on the rest of the batch.
    assert [call.args[-1] for call in blocks] == [range(3, 6), range(6, 7)]
    assert times.items() < times_before_assembly.items()
    assert files_in(output_dir / "data") == files_in(pairs / "data")
    assert (output_dir / "README.md").read_text() == (pairs / "README.md").read_text().replace("# pairs", "# out")


@pytest.mark.parametrize("place", ["second shard", "card", "removal of finished pairs"])
def test_a_run_interrupted_at_its_end_resumes(maker, pair_flags, pairs, monkeypatch, place):
    monkeypatch.setattr(maker, "ROWS_PER_SHARD", 4)
    write_table = pq.write_table

    def write_first_shard_only(table, path, **options):
        if "00001-of" in path.name:
            raise KeyboardInterrupt
        write_table(table, path, **options)

    interruptions = {
        "second shard": (maker.pq, "write_table", write_first_shard_only),
        "card": (maker, "DatasetCardData", raise_interrupt),
        "removal of finished pairs": (Path, "unlink", raise_interrupt),
    }
    interrupt(maker, pair_flags, monkeypatch, *interruptions[place])
    assert len(unfinished_pairs(pair_flags["output_dir"])) == len(CAPTIONS)

    output_dir = run(maker, pair_flags)

    assert rows_of(output_dir) == rows_of(pairs)
    assert not unfinished_pairs(output_dir)


def test_flags_may_change_while_there_are_no_pairs(maker, pair_flags, monkeypatch):
    """E.g. the size of a batch that was too large."""
    interrupt(maker, pair_flags, monkeypatch, maker, "make_block")

    output_dir = run(maker, {**pair_flags, "batch_size": 2, "max_prompts": 1})

    assert len(rows_of(output_dir)) == 1


# Several processes ---------------------------------------------------------------------------------------------------
def test_two_processes_write_the_same_pairs(pair_flags, pairs):
    """There are three blocks, which two processes cannot share evenly."""
    statuses, outputs = run_ranks([MAKER, *command_line(pair_flags)])

    assert statuses == [0, 0], outputs
    assert files_in(pair_flags["output_dir"] / "data") == files_in(pairs / "data")


@pytest.mark.matrix
def test_two_processes_resume_after_one_was_killed(maker, pair_flags, tmp_path):
    """One process is killed in its second pair, and the launcher stops the other one."""
    flags = {**pair_flags, "batch_size": 1}
    output_dir = flags["output_dir"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = [*launcher, *with_faults({1: [Fault("replace", (2,), killed)]}), MAKER, *command_line(flags)]

    interrupted = subprocess.run(list(map(str, words)), capture_output=True, timeout=300)
    has_data = (output_dir / "data").exists()
    statuses, outputs = run_ranks([MAKER, *command_line(flags)])
    uninterrupted = run(maker, {**flags, "output_dir": tmp_path / "uninterrupted"})

    assert interrupted.returncode != 0
    assert not has_data
    assert statuses == [0, 0], outputs
    assert files_in(output_dir / "data") == files_in(uninterrupted / "data")


# Card ----------------------------------------------------------------------------------------------------------------
def test_card_describes_the_dataset_and_lists_its_settings(pairs):
    num_image_bytes = sum(len(row["jpg_0"]) + len(row["jpg_1"]) for row in rows_of(pairs))

    fields, text = card_of(pairs)
    dataset = datasets.load_dataset(str(pairs), split="train")

    info = fields["dataset_info"]
    assert {feature["name"]: feature["dtype"] for feature in info["features"]} == COLUMNS
    assert info["splits"] == [{"name": "train", "num_bytes": info["dataset_size"], "num_examples": len(CAPTIONS)}]
    assert info["download_size"] == shards_of(pairs)[0].stat().st_size
    assert num_image_bytes < info["dataset_size"] < num_image_bytes + 1000
    assert fields["license"] == "other"
    assert "mapo" in fields["tags"]
    assert dataset.features == datasets.Features({name: datasets.Value(dtype) for name, dtype in COLUMNS.items()})
    assert dataset["caption"] == CAPTIONS

    assert "7 pairs of images" in text
    assert "make_pick_style_sdxl.py" in text
    for flag in (f"style_prefix: {STYLE_PREFIX}", "seed: 0", "num_inference_steps: 2", "guidance_scale: 5.0"):
        assert f"- --{flag}\n" in text
    assert f"- torch: {torch.__version__}\n" in text


@pytest.mark.parametrize("kind", ["photos", "candidates"])
def test_output_contains_no_local_paths_or_tokens(maker, inputs, candidate_flags, tmp_path, kind):
    """Nor the names of folders and files."""
    (tmp_path / "album").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "album" / "a.png")
    flags = {
        **candidate_flags,
        VAE: inputs / "pipeline" / "vae",
        "lora": inputs / "lora",
        "unet": inputs / "trained",
        "hub_token": TOKEN,
        "max_prompts": 1,
    }
    if kind == "photos":
        flags.update(num_candidates=None, scorer=None, clip_model=None, chosen_images=tmp_path / "album")

    output_dir = run(maker, flags)

    for path, content in files_in(output_dir).items():
        for word in (str(tmp_path), str(inputs), inputs.name, "captions.txt", "album", TOKEN):
            assert word.encode() not in content, (word, path)


@pytest.mark.parametrize(
    ("card", "license_of_pairs"), [(None, "other"), ("---\nlicense: openrail++\n---\n", "openrail++")]
)
def test_license_of_a_local_base_model_is_read_from_its_card(
    maker, inputs, pair_flags, tmp_path, monkeypatch, card, license_of_pairs
):
    """The name of a folder may look like a hub id, but the hub is not asked for it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(inputs / "pipeline", "some/sdxl")
    if card is not None:
        Path("some/sdxl/README.md").write_text(card)
    monkeypatch.setattr("huggingface_hub.repocard.hf_hub_download", lambda *args, **options: pytest.fail("asked"))

    output_dir = run(maker, {**pair_flags, BASE: "some/sdxl", "max_prompts": 1})

    assert card_of(output_dir)[0]["license"] == license_of_pairs


@pytest.mark.parametrize(("flag", "folder"), [("unet", "trained"), ("lora", "lora")])
def test_images_of_another_model_do_not_get_the_license_of_the_base_model(
    maker, inputs, base, pair_flags, flag, folder
):
    (base / "README.md").write_text("---\nlicense: openrail++\n---\n")

    output_dir = run(maker, {**pair_flags, BASE: base, flag: inputs / folder, "max_prompts": 1})

    assert card_of(output_dir)[0]["license"] == "other"


def test_base_model_from_the_hub_is_named_with_its_license_and_commit(
    maker, inputs, pair_flags, tmp_path, monkeypatch
):
    snapshot = cache_repository(monkeypatch, tmp_path / "cache", "some/sdxl", inputs / "pipeline")
    (snapshot / "README.md").write_text("---\nlicense: openrail++\nlicense_link: LICENSE.md\nlanguage: en\n---\n")
    flags = {**pair_flags, BASE: "some/sdxl", "max_prompts": 1}

    fields, text = card_of(run(maker, flags))
    (snapshot.parents[1] / "refs" / "main").write_text("1" * 40)
    snapshot.rename(snapshot.with_name("1" * 40))
    sentence = error_of(maker, flags)

    assert fields["license"] == "openrail++"
    assert fields["license_link"] == "LICENSE.md"
    assert "language" not in fields
    assert f"--{BASE}: some/sdxl, version " in text
    assert str(tmp_path) not in text
    assert f"made with --{BASE} some/sdxl, version " in sentence


# Hub -----------------------------------------------------------------------------------------------------------------
@pytest.fixture
def hub(maker, monkeypatch):
    """A hub without a network, which records the calls that reach it, and those that load a pipeline."""
    hub = Mock()
    hub.create_repo.return_value.repo_id = "me/some-pairs"
    hub.load_pipeline.side_effect = maker.load_pipeline
    for name in ("create_repo", "load_pipeline", "upload_folder"):
        monkeypatch.setattr(maker, name, getattr(hub, name))
    return hub


def test_shards_and_card_are_uploaded(maker, pair_flags, hub):
    output_dir = run(maker, {**pair_flags, "push_to_hub": True, "hub_token": TOKEN, "max_prompts": 1})

    # A wrong token or name is noticed before weights are loaded.
    assert [name for name, *_ in hub.method_calls] == ["create_repo", "load_pipeline", "upload_folder"]
    # `private` is not False, which would override the default of an organization.
    hub.create_repo.assert_called_once_with("out", repo_type="dataset", token=TOKEN, exist_ok=True, private=None)
    upload = hub.upload_folder.call_args.kwargs
    assert upload["repo_id"] == "me/some-pairs"
    assert upload["repo_type"] == "dataset"
    assert upload["folder_path"] == str(output_dir)
    assert upload["token"] == TOKEN
    assert upload["commit_message"]
    assert upload["delete_patterns"] == "data/train-*"
    files = filter_repo_objects(map(str, files_in(output_dir)), allow_patterns=upload["allow_patterns"])
    assert set(files) == {"README.md", "data/train-00000-of-00001.parquet"}


def test_finished_pairs_can_be_uploaded_after_an_upgrade(maker, pair_flags, pairs, hub, tmp_path, monkeypatch):
    """They are not made again."""
    output_dir = shutil.copytree(pairs, tmp_path / "out")
    times = times_of(output_dir, "*.*")
    monkeypatch.setattr(maker.transformers, "__version__", "99")

    run(maker, {**pair_flags, "push_to_hub": True, "hub_model_id": "some-pairs", "hub_private_repo": True})

    assert [name for name, *_ in hub.method_calls] == ["create_repo", "upload_folder"]
    options = {"repo_type": "dataset", "token": None, "exist_ok": True, "private": True}
    hub.create_repo.assert_called_once_with("some-pairs", **options)
    assert times_of(output_dir, "*.*") == times


def test_a_failed_upload_loses_nothing(maker, pair_flags, hub, monkeypatch):
    """There is no network."""
    monkeypatch.setattr(maker, "upload_folder", huggingface_hub.upload_folder)

    sentence = error_of(maker, {**pair_flags, "push_to_hub": True, "max_prompts": 1, "hub_token": TOKEN})

    assert sentence.startswith(f"--push_to_hub: the pairs in {pair_flags['output_dir']} cannot be uploaded: ")
    assert TOKEN not in sentence
    assert len(rows_of(pair_flags["output_dir"])) == 1


@pytest.mark.parametrize(("name", "word"), [(None, "offline"), ("one/two/three", "one/two/three")])
def test_a_repository_that_cannot_be_created_is_noticed_early(maker, pair_flags, loaded_pipelines, name, word):
    sentence = error_of(maker, {**pair_flags, "push_to_hub": True, "hub_model_id": name, "hub_token": TOKEN})

    assert sentence.startswith("--push_to_hub: the repository cannot be created: ")
    assert word in sentence
    assert TOKEN not in sentence
    assert not loaded_pipelines
