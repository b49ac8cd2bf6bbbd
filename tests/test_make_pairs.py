"""The pair maker: images and layout of the pairs, kinds of pairs, resuming, several processes, card and hub."""

import io
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

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
from sampling import (
    CAPTIONS,
    LORA_FILE,
    MAKER,
    STYLE_PREFIX,
    TOKEN,
    digests_of,
    error_of,
    images_of,
    max_difference,
    pair_seed,
    parse,
    rows_of,
    sample,
    shards_of,
    unfinished_pairs,
)
from small_scorers import expected_score
from small_world import build_pipeline


pytest_plugins = "sampling_fixtures"


@pytest.fixture
def pipeline(inputs):
    """The base model in diffusers' own pipeline."""
    return StableDiffusionXLPipeline.from_pretrained(inputs / "pipeline")


@pytest.fixture
def copied(pairs, tmp_path):
    """A copy of `pairs` as the output folder of a test, with the times of its files."""
    return shutil.copytree(pairs, tmp_path / "out")


def raise_interrupt(*args, **options):
    raise KeyboardInterrupt


def card_of(folder):
    """The fields and the text of a dataset's card."""
    _, fields, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(fields), text


# Layout --------------------------------------------------------------------------------------------------------------
def test_dataset_has_the_layout_of_pick_style(pairs):
    schema = pa.schema(
        {
            "caption": pa.string(),
            "jpg_0": pa.binary(),
            "jpg_1": pa.binary(),
            "label_0": pa.int64(),
            "label_1": pa.int64(),
        }
    )

    (shard,) = shards_of(pairs)
    rows = rows_of(pairs)

    assert shard.name == "train-00000-of-00001.parquet"
    assert pq.read_schema(shard).equals(schema)
    assert [row["caption"] for row in rows] == CAPTIONS
    assert {(row["label_0"], row["label_1"]) for row in rows} == {(0, 1), (1, 0)}
    for row in rows:
        for name in ("jpg_0", "jpg_1"):
            image = Image.open(io.BytesIO(row[name]))
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 64))


def test_a_finished_run_leaves_the_dataset_and_its_settings(pairs):
    assert digests_of(pairs).keys() == {"data/train-00000-of-00001.parquet", "README.md", "pairs_made/settings.json"}


def test_pairs_are_sharded_and_grouped(maker, pair_flags, pairs, monkeypatch):
    monkeypatch.setattr(maker, "ROWS_PER_GROUP", 3)
    monkeypatch.setattr(maker, "ROWS_PER_SHARD", 4)

    output_dir = run(maker, pair_flags)

    first, second = shards_of(output_dir)
    assert first.name == "train-00000-of-00002.parquet"
    assert second.name == "train-00001-of-00002.parquet"
    assert [row_group.num_rows for row_group in row_groups_of(first)] == [3, 1]
    assert [row_group.num_rows for row_group in row_groups_of(second)] == [3]
    assert rows_of(output_dir) == rows_of(pairs)
    assert datasets.load_dataset(str(output_dir), split="train")["caption"] == CAPTIONS


def row_groups_of(shard):
    metadata = pq.read_metadata(shard)
    return [metadata.row_group(i) for i in range(metadata.num_row_groups)]


@pytest.mark.parametrize("streaming", [None, True], ids=["map-style", "streaming"])
def test_the_trainer_reads_pairs(script, pairs, inputs, tmp_path, streaming):
    flags = {
        "pretrained_model_name_or_path": inputs / "pipeline",
        "dataset_name": pairs,
        "streaming": streaming,
        "resolution": 64,
        "rank": 4,
        "train_batch_size": 2,
        "max_train_steps": 2,
        "logging_steps": 1,
        "seed": 0,
        "cache_dir": tmp_path / "cache",
        "output_dir": tmp_path / "out",
    }

    losses = scalars(run(script, flags))["loss"]

    assert len(losses) == 2
    assert np.isfinite(list(losses.values())).all()


# Images --------------------------------------------------------------------------------------------------------------
def test_only_the_chosen_image_has_the_style_prefix(pipeline, pairs):
    """Both images start from the same noise."""
    for number, row in enumerate(rows_of(pairs)):
        chosen, rejected = images_of(row)
        seed = pair_seed(number)

        # Rounding depends on the batch.
        assert max_difference(chosen, sample(pipeline, f"{STYLE_PREFIX} {row['caption']}", seed)) <= 1
        assert max_difference(rejected, sample(pipeline, row["caption"], seed)) <= 1
        assert max_difference(chosen, rejected) > 1


def test_equal_captions_have_different_noise(pairs):
    rows = rows_of(pairs)

    assert rows[0]["caption"] == rows[4]["caption"]
    assert max_difference(images_of(rows[0])[1], images_of(rows[4])[1]) > 8


@pytest.mark.parametrize("style_prefix", [STYLE_PREFIX, None])
def test_rejected_images_may_have_a_prefix_of_their_own(maker, pipeline, pair_flags, style_prefix):
    changes = {"style_prefix": style_prefix, "rejected_prefix": "a blurred photo of", "max_prompts": 2}

    output_dir = run(maker, {**pair_flags, **changes})

    for number, row in enumerate(rows_of(output_dir)):
        chosen, rejected = images_of(row)
        chosen_prompt = f"{style_prefix} {row['caption']}" if style_prefix else row["caption"]
        assert max_difference(chosen, sample(pipeline, chosen_prompt, pair_seed(number))) <= 1
        assert (
            max_difference(rejected, sample(pipeline, f"a blurred photo of {row['caption']}", pair_seed(number))) <= 1
        )


def test_settings_reach_the_pipeline(maker, pipeline, pair_flags):
    changes = {
        "style_prefix": f"  {STYLE_PREFIX} ",
        "different_seeds": True,
        "seed": 3,
        "guidance_scale": 1.5,
        "num_inference_steps": 3,
        "max_prompts": 2,
    }

    rows = rows_of(run(maker, {**pair_flags, **changes}))

    assert len(rows) == 2
    sample_with_settings = partial(sample, pipeline, num_inference_steps=3, guidance_scale=1.5)
    for number, row in enumerate(rows):
        chosen, rejected = images_of(row)
        styled = f"{STYLE_PREFIX} {row['caption']}"
        assert max_difference(chosen, sample_with_settings(styled, pair_seed(number, image=0, seed=3))) <= 1
        assert max_difference(rejected, sample_with_settings(row["caption"], pair_seed(number, image=1, seed=3))) <= 1


def test_the_seed_swaps_sides_at_random(maker, pair_flags, monkeypatch):
    monkeypatch.setattr(
        maker, "generate_images", lambda args, pipeline, prompts, seeds: [Image.new("RGB", (1, 1))] * len(prompts)
    )

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


@pytest.mark.parametrize(
    ("flag", "source"),
    [("unet", "trained"), ("unet", "other/unet"), ("lora", "lora"), ("lora", f"lora/{LORA_FILE}")],
)
def test_a_second_round_uses_the_trained_model(maker, pipeline, inputs, pairs, pair_flags, flag, source):
    if flag == "unet":
        pipeline.unet = UNet2DConditionModel.from_pretrained(inputs / "other", subfolder="unet")
    else:
        pipeline.load_lora_weights(inputs / "lora")

    output_dir = run(maker, {**pair_flags, flag: inputs / source, "max_prompts": 3})

    for number, (row, row_of_base) in enumerate(zip(rows_of(output_dir), rows_of(pairs))):
        chosen, rejected = images_of(row)
        assert max_difference(chosen, sample(pipeline, f"{STYLE_PREFIX} {row['caption']}", pair_seed(number))) <= 1
        assert max_difference(rejected, sample(pipeline, row["caption"], pair_seed(number))) <= 1
        assert max_difference(chosen, images_of(row_of_base)[0]) > 1
        assert max_difference(rejected, images_of(row_of_base)[1]) > 1


@pytest.mark.parametrize(
    ("force_upcast", "vae_dtype"), [(True, torch.float32), (False, torch.bfloat16)], ids=["upcast", "half"]
)
def test_half_precision_leaves_a_vae_that_would_overflow_in_float32(
    maker, pairs, pair_flags, loaded_pipelines, tmp_path, force_upcast, vae_dtype
):
    build_pipeline(tmp_path / "base", force_upcast=force_upcast)
    changes = {"pretrained_model_name_or_path": tmp_path / "base", "mixed_precision": "bf16", "max_prompts": 2}

    output_dir = run(maker, {**pair_flags, **changes})

    (loaded,) = loaded_pipelines
    assert loaded.unet.dtype == torch.bfloat16
    assert loaded.text_encoder.dtype == torch.bfloat16
    assert loaded.text_encoder_2.dtype == torch.bfloat16
    assert loaded.vae.dtype == vae_dtype
    for row, exact in zip(rows_of(output_dir), rows_of(pairs)):
        assert 0 < max_difference(images_of(row)[0], images_of(exact)[0]) < 40


def test_compiled_blocks_give_the_same_images(maker, inputs, pair_flags, compiled_graphs, tmp_path):
    flags = {**pair_flags, "lora": inputs / "lora"}
    eager = rows_of(run(maker, {**flags, "output_dir": tmp_path / "eager"}))

    compiled = rows_of(run(maker, {**flags, "compile": True}))

    assert compiled_graphs
    for row, expected in zip(compiled, eager, strict=True):
        assert max_difference(images_of(row)[0], images_of(expected)[0]) <= 1


def test_another_vae_and_a_variant(maker, pipeline, inputs, pairs, pair_flags, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipeline", variant="fp16")
    pipeline.vae = AutoencoderKL.from_pretrained(inputs / "other" / "vae")
    flags = {**pair_flags, "pretrained_model_name_or_path": tmp_path / "pipeline", "max_prompts": 1}
    vae = {"pretrained_vae_model_name_or_path": inputs / "other" / "vae"}

    sentence = error_of(maker, flags)
    (row,) = rows_of(run(maker, {**flags, **vae, "variant": "fp16"}))

    assert sentence.startswith(f"--pretrained_model_name_or_path {tmp_path / 'pipeline'} ")
    rejected = images_of(row)[1]
    assert max_difference(rejected, sample(pipeline, CAPTIONS[0], pair_seed(0))) <= 1
    assert max_difference(rejected, images_of(rows_of(pairs)[0])[1]) > 8


# Candidates, scores and photos ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["pickscore", "aesthetic", "imagereward"])
def test_the_best_candidate_is_paired_with_the_worst(maker, pipeline, scorers, pair_flags, name):
    sources = {flag: path for flag, path in scorers.items() if flag.startswith(f"{name}_")}
    changes = {"style_prefix": None, "num_candidates": 3, "scorer": name, "max_prompts": 4}

    output_dir = run(maker, {**pair_flags, **changes, **sources})

    for number, row in enumerate(rows_of(output_dir)):
        candidates = [sample(pipeline, row["caption"], pair_seed(number, i)) for i in range(3)]
        scores = [expected_score(name, scorers, image, row["caption"]) for image in candidates]
        chosen, rejected = images_of(row)
        assert max_difference(chosen, candidates[np.argmax(scores)]) <= 1
        assert max_difference(rejected, candidates[np.argmin(scores)]) <= 1
        # Pixels that are rounded differently change the scores of these small models by up to 0.05.
        labels = sorted([row["label_0"], row["label_1"]])
        assert labels == pytest.approx([min(scores), max(scores)], abs=0.05)

    # Scores are stored as float64, and the card says so.
    assert pq.read_schema(shards_of(output_dir)[0]).field("label_0").type == pa.float64()
    features = {feature["name"]: feature["dtype"] for feature in card_of(output_dir)[0]["dataset_info"]["features"]}
    assert features["label_0"] == "float64"
    assert features["label_1"] == "float64"
    assert datasets.load_dataset(str(output_dir), split="train").features["label_1"].dtype == "float64"


@pytest.mark.parametrize("kind", [{}, {"style_prefix": None, "num_candidates": 2}], ids=["prefix", "candidates"])
def test_pairs_below_the_minimum_score_are_dropped(maker, scorers, pair_flags, tmp_path, kind):
    flags = {**pair_flags, **kind, "scorer": "clip", "clip_model": scorers["clip_model"]}
    all_rows = rows_of(run(maker, {**flags, "min_score": -1e9, "output_dir": tmp_path / "all"}))
    scores = []
    for row in all_rows:
        chosen = Image.fromarray(images_of(row)[0].astype(np.uint8))
        scores.append(expected_score("clip", scorers, chosen, row["caption"]))
    third, fourth = sorted(scores)[2:4]
    min_score = (third + fourth) / 2

    rows = rows_of(run(maker, {**flags, "min_score": min_score}))

    assert len(rows) == len(CAPTIONS) - 3
    assert rows == [row for row, score in zip(all_rows, scores) if score > min_score]


def test_rejects_a_minimum_score_that_no_pair_reaches(maker, scorers, pair_flags):
    flags = {**pair_flags, "scorer": "clip", "clip_model": scorers["clip_model"], "min_score": 1e9}

    sentence = error_of(maker, flags)

    assert "every pair was dropped. No image can be read, or --min_score is too high" in sentence
    assert not unfinished_pairs(flags["output_dir"])


def test_photos_are_chosen_in_turn(maker, pipeline, pair_flags, tmp_path):
    """A transparent one, a large one that is turned by its EXIF data, and an ordinary one."""
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGBA", (60, 40), (200, 30, 30, 0)).save(photos / "a.PNG", format="PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (300, 150), (30, 200, 30)).save(photos / "b.jpg", exif=exif)
    Image.new("RGB", (80, 80), (30, 30, 200)).save(photos / "c.webp")
    # Height, width and colour of the chosen images.
    expected = [(40, 60, (255, 255, 255)), (128, 64, (30, 200, 30)), (64, 64, (30, 30, 200))]

    output_dir = run(maker, {**pair_flags, "style_prefix": None, "chosen_images": photos})

    for number, row in enumerate(rows_of(output_dir)):
        chosen, rejected = images_of(row)
        height, width, colour = expected[number % 3]
        assert chosen.shape[:2] == (height, width)
        assert max_difference(chosen, np.full_like(chosen, colour)) < 8
        assert max_difference(rejected, sample(pipeline, row["caption"], pair_seed(number))) <= 1
        # EXIF data may tell where a photo was taken.
        assert b"exif" not in row["jpg_0"].lower()
        assert b"exif" not in row["jpg_1"].lower()


# Resuming ------------------------------------------------------------------------------------------------------------
def test_a_killed_run_resumes(maker, pair_flags, pairs, monkeypatch):
    """It is killed when it has written its fifth pair, in the second block, under a temporary name."""
    statuses, _ = run_ranks([MAKER, *command_line(pair_flags)], {0: [Fault("replace", (6,), killed)]}, size=1)
    assert statuses == [-9]
    folder = pair_flags["output_dir"] / "pairs_made"
    complete = unfinished_pairs(folder)
    assert [path.name for path in complete] == [f"{number:06d}.parquet" for number in range(4)]
    assert (folder / ".incomplete-000004.parquet").exists()
    times = [path.stat().st_mtime_ns for path in complete]

    make_block = maker.make_block
    blocks = []
    monkeypatch.setattr(maker, "make_block", lambda *args: blocks.append(args[-1]) or make_block(*args))
    assemble = maker.assemble
    times_before_assembly = []

    def record_times(*args):
        times_before_assembly.extend(path.stat().st_mtime_ns for path in complete)
        assemble(*args)

    monkeypatch.setattr(maker, "assemble", record_times)
    output_dir = run(maker, pair_flags)

    # The second block is the one of an uninterrupted run, because rounding depends on the rest of the batch.
    assert blocks == [range(3, 6), range(6, 7)]
    assert times_before_assembly == times
    assert digests_of(output_dir / "data") == digests_of(pairs / "data")
    assert (output_dir / "README.md").read_text() == (pairs / "README.md").read_text().replace("# pairs", "# out")


@pytest.mark.parametrize("place", ["second shard", "card", "removal of finished pairs"])
def test_a_run_interrupted_at_its_end_resumes(maker, pair_flags, pairs, monkeypatch, place):
    monkeypatch.setattr(maker, "ROWS_PER_SHARD", 4)
    write_table = pq.write_table

    def write_first_shard_only(table, path, **options):
        if "00001-of" in path.name:
            raise KeyboardInterrupt
        write_table(table, path, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if place == "second shard":
            patch.setattr(maker.pq, "write_table", write_first_shard_only)
        elif place == "card":
            patch.setattr(maker, "DatasetCardData", raise_interrupt)
        else:
            patch.setattr(Path, "unlink", raise_interrupt)
        run(maker, pair_flags)
    assert len(unfinished_pairs(pair_flags["output_dir"])) == len(CAPTIONS)

    output_dir = run(maker, pair_flags)

    assert rows_of(output_dir) == rows_of(pairs)
    assert not unfinished_pairs(output_dir)


def test_a_finished_run_does_nothing(maker, pair_flags, copied, loaded_pipelines):
    files = [copied / "README.md", *copied.rglob("*.parquet")]
    times = [path.stat().st_mtime_ns for path in files]

    run(maker, pair_flags)

    assert [path.stat().st_mtime_ns for path in files] == times
    assert not loaded_pipelines


def test_flags_may_change_while_there_are_no_pairs(maker, pair_flags, monkeypatch):
    """E.g. the size of a batch that was too large."""

    def run_out_of_memory(*args):
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(maker, "make_block", run_out_of_memory)
        run(maker, pair_flags)

    output_dir = run(maker, {**pair_flags, "batch_size": 2, "max_prompts": 1})

    assert len(rows_of(output_dir)) == 1


# Several processes ---------------------------------------------------------------------------------------------------
def test_two_processes_write_the_same_pairs(pair_flags, pairs):
    """There are three blocks, which two processes cannot share evenly."""
    statuses, outputs = run_ranks([MAKER, *command_line(pair_flags)])

    assert statuses == [0, 0], outputs
    assert digests_of(pair_flags["output_dir"] / "data") == digests_of(pairs / "data")


@pytest.mark.matrix
def test_two_processes_resume_after_one_was_killed(pair_flags):
    """One process is killed in its second pair, and the launcher stops the other one."""
    flags = {**pair_flags, "batch_size": 1}
    output_dir = flags["output_dir"]
    fault = {1: [Fault("replace", (2,), killed)]}

    interrupted = launch([*with_faults(fault), MAKER, *command_line(flags)], processes=2)
    has_data = (output_dir / "data").exists()
    resumed = launch([MAKER, *command_line(flags)], processes=2)
    single = output_dir.with_name("single")
    uninterrupted = launch([MAKER, *command_line({**flags, "output_dir": single})])

    assert interrupted.returncode != 0
    assert not has_data
    assert resumed.returncode == 0, resumed.stderr
    assert uninterrupted.returncode == 0, uninterrupted.stderr
    assert digests_of(output_dir / "data") == digests_of(single / "data")


def launch(words, processes=1):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run([*launcher, *map(str, words)], capture_output=True, text=True, timeout=300)


# Card ----------------------------------------------------------------------------------------------------------------
def test_card_describes_the_dataset(pairs):
    columns = {"caption": "string", "jpg_0": "binary", "jpg_1": "binary", "label_0": "int64", "label_1": "int64"}
    num_image_bytes = sum(len(row["jpg_0"]) + len(row["jpg_1"]) for row in rows_of(pairs))

    fields, _ = card_of(pairs)
    dataset = datasets.load_dataset(str(pairs), split="train")

    info = fields["dataset_info"]
    assert {feature["name"]: feature["dtype"] for feature in info["features"]} == columns
    assert info["splits"] == [{"name": "train", "num_bytes": info["dataset_size"], "num_examples": len(CAPTIONS)}]
    assert info["download_size"] == shards_of(pairs)[0].stat().st_size
    assert num_image_bytes < info["dataset_size"] < num_image_bytes + 1000
    assert fields["license"] == "other"
    assert "mapo" in fields["tags"]
    assert dataset.features == datasets.Features({name: datasets.Value(dtype) for name, dtype in columns.items()})
    assert dataset["caption"] == CAPTIONS


def test_card_lists_the_settings(pairs):
    _, text = card_of(pairs)

    assert "7 pairs of images" in text
    assert "make_pick_style_sdxl.py" in text
    assert f"- --style_prefix: {STYLE_PREFIX}\n" in text
    assert "- --seed: 0\n" in text
    assert "- --num_inference_steps: 2\n" in text
    assert "- --guidance_scale: 5.0\n" in text
    assert f"- torch: {torch.__version__}\n" in text


@pytest.mark.parametrize("kind", ["photos", "candidates"])
def test_output_contains_no_local_paths_or_tokens(maker, inputs, scorers, pair_flags, tmp_path, kind):
    """Nor the names of folders and files."""
    photos = tmp_path / "album"
    photos.mkdir()
    Image.new("RGB", (64, 64)).save(photos / "a.png")
    changes = {
        "pretrained_vae_model_name_or_path": inputs / "pipeline" / "vae",
        "lora": inputs / "lora",
        "unet": inputs / "trained",
        "hub_token": TOKEN,
        "style_prefix": None,
        "max_prompts": 1,
    }
    if kind == "photos":
        changes["chosen_images"] = photos
    else:
        changes.update(num_candidates=2, scorer="clip", clip_model=scorers["clip_model"])

    output_dir = run(maker, {**pair_flags, **changes})

    for path in output_dir.rglob("*"):
        if path.is_file():
            for word in (str(tmp_path), str(inputs), inputs.name, "captions.txt", "album", TOKEN):
                assert word.encode() not in path.read_bytes(), (word, path)


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

    output_dir = run(maker, {**pair_flags, "pretrained_model_name_or_path": "some/sdxl", "max_prompts": 1})

    assert card_of(output_dir)[0]["license"] == license_of_pairs


@pytest.fixture
def cached_repo(inputs, tmp_path, monkeypatch):
    """The base model as the hub repository some/sdxl, in the local cache."""
    repo = tmp_path / "cache" / "models--some--sdxl"
    snapshot = shutil.copytree(inputs / "pipeline", repo / "snapshots" / ("0" * 40))
    (snapshot / "README.md").write_text("---\nlicense: openrail++\nlicense_link: LICENSE.md\nlanguage: en\n---\n")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return repo


def test_base_model_from_the_hub_is_named_with_its_license(maker, pair_flags, cached_repo, tmp_path):
    output_dir = run(maker, {**pair_flags, "pretrained_model_name_or_path": "some/sdxl", "max_prompts": 1})

    fields, text = card_of(output_dir)
    assert fields["license"] == "openrail++"
    assert fields["license_link"] == "LICENSE.md"
    assert "language" not in fields
    assert "--pretrained_model_name_or_path: some/sdxl, version " in text
    assert str(tmp_path) not in text


def test_rejects_pairs_of_another_commit_of_the_base_model(maker, pair_flags, cached_repo):
    flags = {**pair_flags, "pretrained_model_name_or_path": "some/sdxl", "max_prompts": 1}
    run(maker, flags)
    (cached_repo / "refs" / "main").write_text("1" * 40)
    (cached_repo / "snapshots" / ("0" * 40)).rename(cached_repo / "snapshots" / ("1" * 40))

    sentence = error_of(maker, flags)

    assert "made with --pretrained_model_name_or_path some/sdxl, version " in sentence


# Hub -----------------------------------------------------------------------------------------------------------------
@pytest.fixture
def hub(maker, monkeypatch):
    """A hub without a network. Records created repositories, uploads and the order of their events."""
    hub = SimpleNamespace(events=[], created=[], uploads=[])
    load_pipeline = maker.load_pipeline

    def create_repo(*args, **options):
        hub.events.append("create")
        hub.created.append((args, options))
        return SimpleNamespace(repo_id="me/some-pairs")

    def record_loading(*args):
        hub.events.append("load")
        return load_pipeline(*args)

    def upload_folder(**options):
        hub.events.append("upload")
        hub.uploads.append(options)

    monkeypatch.setattr(maker, "create_repo", create_repo)
    monkeypatch.setattr(maker, "load_pipeline", record_loading)
    monkeypatch.setattr(maker, "upload_folder", upload_folder)
    return hub


def test_shards_and_card_are_uploaded(maker, pair_flags, hub):
    flags = {**pair_flags, "push_to_hub": True, "hub_token": TOKEN, "max_prompts": 1}

    output_dir = run(maker, flags)

    # A wrong token or name is noticed before weights are loaded.
    assert hub.events == ["create", "load", "upload"]
    # `private` is not False, which would override the default of an organization.
    options = {"repo_type": "dataset", "token": TOKEN, "exist_ok": True, "private": None}
    assert hub.created == [(("out",), options)]
    (upload,) = hub.uploads
    assert upload["repo_id"] == "me/some-pairs"
    assert upload["repo_type"] == "dataset"
    assert upload["folder_path"] == str(output_dir)
    assert upload["token"] == TOKEN
    assert upload["commit_message"]
    assert upload["delete_patterns"] == "data/train-*"
    files = filter_repo_objects(digests_of(output_dir), allow_patterns=upload["allow_patterns"])
    assert set(files) == {"README.md", "data/train-00000-of-00001.parquet"}


def test_finished_pairs_can_be_uploaded_after_an_upgrade(maker, pair_flags, copied, hub, monkeypatch):
    monkeypatch.setattr(maker.transformers, "__version__", "99")
    flags = {**pair_flags, "push_to_hub": True, "hub_model_id": "some-pairs", "hub_private_repo": True}

    run(maker, flags)

    assert hub.events == ["create", "upload"]
    ((args, options),) = hub.created
    assert args == ("some-pairs",)
    assert options["private"] is True


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
