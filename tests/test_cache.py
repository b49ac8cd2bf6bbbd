"""--cache_latents: training on pairs that were encoded once changes nothing, also after faults and kills."""

import os
import re
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import SCRIPT, command_line, matrix, run, scalars
from cpu_cluster import EVERY_CALL, FORKS, Fault, install, noting_path, waiting_for_a_cache, work
from runs import assert_continues, assert_same, curves, resume, run_ranks_successfully, train_error
from small_pairs import MAP_AND_STREAM, make_row, save_imagefolder, save_zipped_imagefolder, write_groups
from small_world import draw_pairs
from transformers import CLIPTextModel, CLIPTextModelWithProjection


@pytest.fixture
def flags(flags, tmp_path):
    """Each test fills its own cache with the 42 training pairs and the 6 held-out ones."""
    return {**flags, "cache_dir": tmp_path / "cache", "num_validation_pairs": 6, "cache_latents": True}


def refuse(*args, **kwargs):
    raise AssertionError("called")


def cache_files(flags):
    """All files in all caches."""
    return sorted(path for path in flags["cache_dir"].glob("mapo_latents/**/*") if path.is_file())


def cache_folders(flags):
    """Names of the caches."""
    return {path.relative_to(flags["cache_dir"]).parts[1] for path in cache_files(flags)}


# Equal runs ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "orientations"),
    [
        matrix({"no_hflip": True, "mixed_precision": "bf16"}, 1),
        matrix({"no-remove_ties": True, "label_noise_prob": 0.3, "dataloader_num_workers": 2}, 2),
        ({"streaming": True, "dataloader_num_workers": 2, "mixed_precision": "bf16"}, 2),
    ],
    ids=["without flips", "map, workers", "stream, workers"],
)
def test_cached_and_uncached_runs_are_equal(script, flags, tmp_path, monkeypatch, record_calls, changes, orientations):
    """More than one epoch, in which each pair is encoded once. A second run encodes nothing."""
    flags.update(changes, max_train_steps=12, resolution=32)
    calls = record_calls(script, "encode_images")

    cached = run(script, flags)
    encoded = [len(call.args[1]) for call in calls]
    uncached = run(script, {**flags, "cache_latents": None, "output_dir": tmp_path / "uncached"})
    calls.clear()
    monkeypatch.setattr(script, "encode_prompts", refuse)
    again = run(script, {**flags, "output_dir": tmp_path / "again"})

    assert_same(cached, uncached)
    assert_same(again, uncached)
    # The two images of the first pair are a trial. Flipped training images are encoded in both orientations.
    assert encoded[0] == 2
    assert sum(encoded[1:]) == 2 * (42 * orientations + 6)
    assert [len(call.args[1]) for call in calls] == [2]


def test_two_processes_share_the_encoding(flags, tmp_path):
    """The second process finds what the first one has written, which must not change its share."""
    flags.update(streaming=True, train_batch_size=2, max_train_steps=11, resolution=16, num_validation_pairs=4)
    noting = Fault("file", EVERY_CALL, partial(noting_path, tmp_path))
    late = Fault("existence", EVERY_CALL, partial(waiting_for_a_cache, flags["cache_dir"]))

    cached = run_ranks_successfully(flags, {0: [noting], 1: [noting, late]})
    uncached = run_ranks_successfully({**flags, "cache_latents": None, "output_dir": tmp_path / "uncached"})

    first = (tmp_path / "paths-0").read_text().count("mapo_latents")
    second = (tmp_path / "paths-1").read_text().count("mapo_latents")
    assert first == second
    assert first + second == len(cache_files(flags))
    assert_same(cached, uncached)


@pytest.mark.parametrize("streaming", [matrix(None), True], ids=["map", "stream"])
def test_bad_rows_are_the_same_cached_and_uncached(script, flags, tmp_path, caplog, streaming):
    """Cached and uncached runs resume each other."""
    flags["dataset_name"] = write_groups(tmp_path / "data", [[9, 9]], tied={4}, bad={3, 7, 12})
    flags.update(num_validation_pairs=None, streaming=streaming, max_bad_rows=0.5)
    flags.update(max_train_steps=9, checkpointing_steps=4)

    def run_and_read_reports(**changes):
        caplog.clear()
        out = run(script, {**flags, **changes})
        return out, re.findall("Skipped .*|.* rows read .*", caplog.text)

    cached, reports_of_cached = run_and_read_reports()
    uncached, reports = run_and_read_reports(cache_latents=None, output_dir=tmp_path / "uncached")
    resumed = resume(script, flags, uncached / "checkpoint-4", tmp_path / "resumed")

    assert_same(cached, uncached)
    assert reports == reports_of_cached
    assert len([report for report in reports if "Skipped" in report]) >= 6
    assert_continues(uncached, resumed, 4)


def test_next_run_encodes_an_unusable_pair_after_all(script, flags, tmp_path, monkeypatch, caplog):
    """Its image may only have been out of reach."""
    flags["dataset_name"] = write_groups(tmp_path / "data", [[12]])
    flags.update(num_validation_pairs=None, max_bad_rows=0.5, max_train_steps=3, resolution=16)
    load_pair = script.load_pair

    def load_all_but_one(record, *args, **options):
        if record["caption"] == "pair 5":
            raise script.UnusableRow("has an image that cannot be read (stale file handle)")
        return load_pair(record, *args, **options)

    uncached = run(script, {**flags, "cache_latents": None, "output_dir": tmp_path / "uncached"})
    with monkeypatch.context() as patch:
        patch.setattr(script, "load_pair", load_all_but_one)
        run(script, flags)
    assert "Skipped row 5: it has an image that cannot be read (stale file handle)." in caplog.text
    caplog.clear()
    again = run(script, {**flags, "output_dir": tmp_path / "again"})

    assert "Skipped" not in caplog.text
    assert_same(again, uncached)


def test_cached_latents_equal_those_of_a_vae_that_rounds_by_batch(script, flags, tmp_path, monkeypatch):
    """Large VAEs in bfloat16 round differently in another batch. By default, each image is a batch."""
    encode = script.AutoencoderKL.encode

    def round_by_batch(vae, pixels):
        output = encode(vae, pixels)
        output.latent_dist.mean += 1e-3 * len(pixels)
        return output

    monkeypatch.setattr(script.AutoencoderKL, "encode", round_by_batch)
    flags.update(resolution=32, num_validation_pairs=None)

    cached = run(script, flags)
    flags["cache_latents"] = None
    uncached = run(script, {**flags, "output_dir": tmp_path / "uncached"})
    in_batches = run(script, {**flags, "vae_encode_batch_size": 4, "output_dir": tmp_path / "in batches"})

    assert_same(cached, uncached)
    assert curves(in_batches)["loss"] != curves(uncached)["loss"]


# The key of a cache -------------------------------------------------------------------------------------------------
@pytest.fixture
def fill(script, flags, monkeypatch, tmp_path):
    """Runs on four pairs until the caches are filled, and returns how many are new."""

    def stop(*args):
        raise script.TrainingError("filled")

    def fill(**changes):
        before = cache_folders(flags)
        assert train_error(script, {**flags, **changes}) == "filled"
        return len(cache_folders(flags) - before)

    monkeypatch.setattr(script, "build_model", stop)
    draw_pairs(tmp_path / "pairs", num_pairs=4, num_shards=1)
    flags.update(dataset_name=tmp_path / "pairs", max_train_steps=1, num_validation_pairs=None, resolution=16)
    return fill


def test_only_what_changes_latents_needs_another_cache(fill, tmp_path):
    assert fill() == 1
    assert fill(beta_mapo=2, seed=3, label_noise_prob=0.5, train_batch_size=1, run_validation=True) == 0
    for changes in (
        {"resolution": 24},
        {"no_hflip": True},
        {"streaming": True},
        {"max_train_samples": 3},
        {"chosen_column": "jpg_0", "rejected_column": "jpg_1"},
        {"allow_tf32": True},
    ):
        assert fill(**changes) == 1, changes
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    # One for the held-out pairs, and one for the others.
    assert fill(num_validation_pairs=2) == 2
    for seed in (1, 2):
        draw_pairs(tmp_path / "other", num_pairs=6, num_shards=1, seed=seed)
        assert fill(dataset_name=tmp_path / "other") == 1


@pytest.mark.parametrize("part", ["vae", "text_encoder", "text_encoder_2", "eos_token_id", "pad_token"])
def test_other_encoders_use_another_cache(script, monkeypatch, fill, part):
    load_pipeline = script.load_pipeline

    def load_changed(*args):
        pipeline = load_pipeline(*args)
        if part == "pad_token":
            pipeline.tokenizer_2.pad_token = "a"
        elif part == "eos_token_id":
            pipeline.text_encoder.config.eos_token_id = 5
        else:
            weight = next(getattr(pipeline, part).parameters())
            weight.data.flatten()[0] += 1e-3
        return pipeline

    assert fill() == 1
    monkeypatch.setattr(script, "load_pipeline", load_changed)
    assert fill() == 1


@pytest.mark.parametrize("save", [save_imagefolder, save_zipped_imagefolder])
def test_changed_image_files_use_another_cache(flags, tmp_path, fill, save):
    """`datasets` prepares a folder again if the modification time of a file changes."""
    save(tmp_path / "data", [make_row(number) for number in range(3)])
    flags["dataset_name"] = tmp_path / "data"
    assert fill() == 1
    assert fill() == 0

    pattern = "data/*.zip" if save is save_zipped_imagefolder else "data/2-jpg_1.png"
    (file,) = tmp_path.glob(pattern)
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**9))

    assert fill() == 1


# Latents that are not finite ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("cached", [True, None], ids=["cached", "uncached"])
def test_vae_without_finite_latents_is_noticed_before_training(script, flags, monkeypatch, cached):
    load_pipeline = script.load_pipeline

    def load_broken(*args):
        pipeline = load_pipeline(*args)
        pipeline.vae.quant_conv.weight.data.fill_(torch.nan)
        return pipeline

    monkeypatch.setattr(script, "load_pipeline", load_broken)
    monkeypatch.setattr(script, "train_step", refuse)

    error = train_error(script, {**flags, "cache_latents": cached})

    assert "--pretrained_vae_model_name_or_path" in error
    assert cache_files(flags) == []


@MAP_AND_STREAM
def test_pair_without_finite_latents_is_a_bad_row(script, flags, tmp_path, monkeypatch, caplog, streaming):
    encode_images = script.encode_images

    def encode(vae, pixels, batch_size):
        moments = encode_images(vae, pixels, batch_size)
        row = pixels[:, 0, 0, 0]
        moments[row == 5] = torch.nan
        return moments

    monkeypatch.setattr(script, "encode_images", encode)
    flags.update(dataset_name=write_groups(tmp_path / "data", [[12]]), num_validation_pairs=None, max_bad_rows=0.5)

    out = run(script, {**flags, "streaming": streaming, "max_train_steps": 3, "resolution": 16})

    assert scalars(out)["skipped_steps"] == {1: 0, 2: 0, 3: 0}
    (skipped,) = [record.getMessage() for record in caplog.records if "Skipped" in record.getMessage()]
    assert skipped.startswith("Skipped row 5")


# Faults -------------------------------------------------------------------------------------------------------------
def test_killed_run_leaves_complete_files_and_the_next_one_adds_the_others(script, flags, tmp_path, record_calls):
    draw_pairs(tmp_path / "data", num_pairs=300, size=16)
    flags.update(dataset_name=tmp_path / "data", resolution=16, max_train_steps=2, num_validation_pairs=None)
    process = FORKS.Process(target=work, args=({}, [SCRIPT, *command_line(flags)], [], tmp_path / "log"))
    process.start()
    while len(cache_files(flags)) < 2:
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    complete = [path for path in cache_files(flags) if path.suffix == ".safetensors"]
    changed_at = {path: path.stat().st_mtime_ns for path in complete}
    calls = record_calls(script, "encode_images")

    run(script, flags)

    assert 0 < len(complete) < 300
    assert sum(len(call.args[1]) for call in calls) == 2 + 4 * (300 - len(complete))  # the first pair is also a trial
    for path, time_ns in changed_at.items():
        assert path.stat().st_mtime_ns == time_ns


def test_full_disk_leaves_no_incomplete_file(script, flags, monkeypatch):
    flags["num_validation_pairs"] = None

    def save_half(call):
        call.args[1].write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        # The first file is the index of the pairs.
        install(Fault("file", (3,), save_half), patch.setattr)
        error = train_error(script, flags)

    assert re.search("--cache_latents: .*mapo_latents.*: OSError.*No space left", error)
    assert len(cache_files(flags)) == 1
    run(script, flags)


# Memory -------------------------------------------------------------------------------------------------------------
def test_encoders_leave_the_device_before_the_unet_gets_there(script, flags, monkeypatch):
    """Together, they would need more GPU memory than training. Until they leave, all pairs are encoded."""
    moved = []
    move = torch.nn.Module.to

    def record_move(module, *args, **kwargs):
        if args == ("cpu",):
            moved.append(type(module))
            args = ("meta",)  # where nothing can be computed
        elif isinstance(module, script.UNet2DConditionModel) and isinstance(args[0], torch.device):
            moved.append(type(module))
        return move(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "to", record_move)

    run(script, flags)

    encoders = [script.AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection]
    assert moved[:4] == [*encoders, script.UNet2DConditionModel]


# Rounding -----------------------------------------------------------------------------------------------------------
def test_pixels_are_scaled_in_float32(script):
    """In bfloat16, half a grey level would be lost before the VAE gets the image."""
    received = []

    def encode(pixels):
        received.append(pixels)
        zeros = torch.zeros(1, 4, 2, 2)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=zeros, std=zeros))

    vae = SimpleNamespace(dtype=torch.bfloat16, encode=encode)
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, 3, 1, 1)

    script.encode_images(vae, pixels, vae_batch_size=1)

    exact = pixels.double() / 127.5 - 1
    assert torch.equal(received[0], exact.float().to(torch.bfloat16))
    assert not torch.equal(received[0], pixels.to(torch.bfloat16) / 127.5 - 1)
