"""--cache_latents: training on pairs that were encoded once changes nothing, also after faults and kills."""

import collections
import os
import time
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from conftest import SCRIPT, command_line, fork, matrix, run, scalars
from cpu_cluster import FORKS, work
from runs import assert_continues, assert_same, curves, train_error
from safetensors.torch import load_file
from small_pairs import MAP_AND_STREAM, make_row, save_imagefolder, save_zipped_imagefolder, write_groups
from small_world import draw_pairs


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


@pytest.fixture
def encoded(script, monkeypatch):
    """The number of images of each call of `encode_images`."""
    encoded = []
    encode_images = script.encode_images

    def record(vae, pixels, batch_size):
        encoded.append(len(pixels))
        return encode_images(vae, pixels, batch_size)

    monkeypatch.setattr(script, "encode_images", record)
    return encoded


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
def test_cached_and_uncached_runs_are_equal(script, flags, tmp_path, monkeypatch, encoded, changes, orientations):
    """More than one epoch, in which each pair is encoded once. A second run encodes nothing."""
    flags.update(changes, max_train_steps=12, resolution=32)

    cached = run(script, flags)
    encoded_first = list(encoded)
    uncached = run(script, {**flags, "cache_latents": None, "output_dir": tmp_path / "uncached"})
    encoded.clear()
    monkeypatch.setattr(script, "encode_prompts", refuse)
    again = run(script, {**flags, "output_dir": tmp_path / "again"})

    assert_same(cached, uncached)
    assert_same(again, uncached)
    # The two images of the first pair are a trial. Flipped training images are encoded in both orientations.
    assert encoded_first[0] == 2
    assert sum(encoded_first[1:]) == 2 * (42 * orientations + 6)
    assert encoded == [2]


# Runs the script, and notes what each process writes. Process 1 is late: it waits until the other one has written.
LATE = """
import os, pathlib, runpy, sys, time
import safetensors.torch

folder = pathlib.Path(__file__).parent
rank = os.environ["RANK"]
exists = pathlib.Path.exists
listdir = os.listdir
save_file = safetensors.torch.save_file
waited = []


def wait_for_the_other():
    if rank == "1" and not waited:
        waited.append(time.monotonic())
        while time.monotonic() < waited[0] + 5 and not list(folder.glob("cache/mapo_latents/*/*")):
            time.sleep(0.01)


def late_exists(path, *args, **kwargs):
    if "mapo_latents" in str(path):
        wait_for_the_other()
    return exists(path, *args, **kwargs)


def late_listdir(path="."):
    if "mapo_latents" in str(path):
        wait_for_the_other()
    return listdir(path)


def noted(tensors, path, *args, **kwargs):
    if "mapo_latents" in str(path):
        with open(folder / f"encoded-{rank}", "a") as file:
            file.write(f"{len(tensors)} ")
    return save_file(tensors, path, *args, **kwargs)


pathlib.Path.exists = late_exists
os.listdir = late_listdir
safetensors.torch.save_file = noted
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_two_processes_share_the_encoding(script, flags, tmp_path):
    flags.update(streaming=True, train_batch_size=2, max_train_steps=11, resolution=16, num_validation_pairs=4)
    (tmp_path / "late.py").write_text(LATE)

    cached = fork(flags, 2, wrapper=[tmp_path / "late.py"])
    uncached = fork({**flags, "cache_latents": None, "output_dir": tmp_path / "uncached"}, 2)

    assert cached.returncode == 0, cached.stderr
    assert uncached.returncode == 0, uncached.stderr
    first = len((tmp_path / "encoded-0").read_text().split())
    second = len((tmp_path / "encoded-1").read_text().split())
    assert first == second
    assert first + second == len(cache_files(flags))
    assert_same(flags["output_dir"], tmp_path / "uncached")


@pytest.mark.parametrize("streaming", [matrix(None), True], ids=["map", "stream"])
def test_bad_rows_are_the_same_cached_and_uncached(script, flags, tmp_path, caplog, streaming):
    """Cached and uncached runs resume each other."""
    flags["dataset_name"] = write_groups(tmp_path / "data", [[9, 9]], tied={4}, bad={3, 7, 12})
    flags.update(num_validation_pairs=None, streaming=streaming, max_bad_rows=0.5)
    flags.update(max_train_steps=9, checkpointing_steps=4)

    def reports():
        messages = [record.getMessage() for record in caplog.records]
        return [message for message in messages if "Skipped" in message or "rows read" in message]

    cached = run(script, flags)
    reports_of_cached = reports()
    caplog.clear()
    uncached = run(script, {**flags, "cache_latents": None, "output_dir": tmp_path / "uncached"})
    reports_of_uncached = reports()
    resume = {"resume_from_checkpoint": uncached / "checkpoint-4", "output_dir": tmp_path / "resumed"}
    resumed = run(script, {**flags, **resume})

    assert_same(cached, uncached)
    assert reports_of_cached == reports_of_uncached
    assert len([report for report in reports_of_cached if "Skipped" in report]) >= 6
    assert_continues(uncached, resumed, 4)


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
class CachesFilled(Exception):
    pass


@pytest.fixture
def fill(script, flags, monkeypatch):
    """Runs until the caches are filled, and returns the names of the new ones."""

    def stop(*args):
        raise CachesFilled

    def fill(**changes):
        before = cache_folders(flags)
        with pytest.raises(CachesFilled):
            run(script, {**flags, **changes})
        return cache_folders(flags) - before

    monkeypatch.setattr(script, "build_model", stop)
    flags.update(max_train_steps=1, num_validation_pairs=None, resolution=16)
    return fill


@pytest.fixture
def filled(flags, tmp_path, fill):
    """The caches contain the latents of four pairs."""
    draw_pairs(tmp_path / "pairs", num_pairs=4, num_shards=1)
    flags["dataset_name"] = tmp_path / "pairs"
    assert len(fill()) == 1


@pytest.mark.usefixtures("filled")
def test_flags_that_do_not_change_latents_use_the_same_cache(fill):
    new = fill(beta_mapo=2, seed=3, label_noise_prob=0.5, train_batch_size=1, run_validation=True)

    assert new == set()


@pytest.mark.usefixtures("filled")
def test_flags_that_change_latents_use_another_cache(fill):
    for changes in (
        {"resolution": 24},
        {"no_hflip": True},
        {"streaming": True},
        {"max_train_samples": 3},
        {"chosen_column": "jpg_0", "rejected_column": "jpg_1"},
        {"allow_tf32": True},
    ):
        assert len(fill(**changes)) == 1, changes
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    # One for the held-out pairs, and one for the others.
    assert len(fill(num_validation_pairs=2)) == 2


@pytest.mark.usefixtures("filled")
def test_other_pairs_use_another_cache(tmp_path, fill):
    draw_pairs(tmp_path / "other", num_pairs=6, num_shards=1, seed=1)
    assert len(fill(dataset_name=tmp_path / "other")) == 1

    draw_pairs(tmp_path / "other", num_pairs=6, num_shards=1, seed=2)
    assert len(fill(dataset_name=tmp_path / "other")) == 1


@pytest.mark.usefixtures("filled")
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

    monkeypatch.setattr(script, "load_pipeline", load_changed)

    assert len(fill()) == 1


@pytest.mark.parametrize("save", [save_imagefolder, save_zipped_imagefolder])
def test_changed_image_files_use_another_cache(flags, tmp_path, fill, save):
    """`datasets` prepares a folder again if the modification time of a file changes."""
    save(tmp_path / "data", [make_row(number) for number in range(3)])
    flags["dataset_name"] = tmp_path / "data"
    assert len(fill()) == 1
    assert fill() == set()

    pattern = "data/*.zip" if save is save_zipped_imagefolder else "data/2-jpg_1.png"
    (file,) = tmp_path.glob(pattern)
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**9))

    assert len(fill()) == 1


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
def test_killed_run_leaves_complete_files_and_the_next_one_adds_the_others(script, flags, tmp_path, encoded):
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
    num_cached = sum(len(load_file(path)["moments"].reshape(-1, 4, 2, 4, 2, 2)) for path in complete)

    run(script, flags)

    assert 0 < num_cached < 300
    assert encoded[0] == 2  # the trial
    assert sum(encoded[1:]) == 4 * (300 - num_cached)
    for path, time_ns in changed_at.items():
        assert path.stat().st_mtime_ns == time_ns


def test_full_disk_leaves_no_incomplete_file(script, flags, monkeypatch):
    flags["num_validation_pairs"] = None
    save_file = safetensors.torch.save_file
    saved = []

    def save(tensors, path, *args, **kwargs):
        if "mapo_latents" in str(path):
            saved.append(path)
        if len(saved) > 1:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", save)
        with pytest.raises(script.TrainingError, match="--cache_latents: .*mapo_latents.*: OSError.*No space left"):
            run(script, flags)

    assert len(cache_files(flags)) == 1
    run(script, flags)


# Memory -------------------------------------------------------------------------------------------------------------
def test_encoders_leave_the_device(script, flags, monkeypatch):
    """The meta device stands for the CPU's memory: nothing there can compute, so training does not need them."""
    moved = collections.Counter()
    move = torch.nn.Module.to

    def move_to_meta(module, *args, **kwargs):
        if args == ("cpu",):
            moved[type(module).__name__] += 1
            args = ("meta",)
        return move(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "to", move_to_meta)

    run(script, flags)

    assert set(moved) == {"AutoencoderKL", "CLIPTextModel", "CLIPTextModelWithProjection"}


def test_unet_stays_on_the_cpu_until_all_pairs_are_encoded(script, flags, monkeypatch):
    """UNet and encoders together would need more GPU memory than training."""
    events = []
    move = torch.nn.Module.to
    fill_cache = script.fill_cache

    def record_move(module, *args, **kwargs):
        if isinstance(module, script.UNet2DConditionModel) and any(isinstance(arg, torch.device) for arg in args):
            events.append("moved")
        return move(module, *args, **kwargs)

    def record_fill(*args):
        events.append("encoded")
        return fill_cache(*args)

    monkeypatch.setattr(torch.nn.Module, "to", record_move)
    monkeypatch.setattr(script, "fill_cache", record_fill)

    run(script, {**flags, "max_train_steps": 1})

    assert events[:3] == ["encoded", "encoded", "moved"]


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
