"""--cache_latents: the same training from pairs that were encoded once; whole files after any kill, for all runs."""

import collections
import itertools
import os
import time
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from conftest import SCRIPT, also, command_line, fork, run, scalars
from cpu_cluster import FORKS, work
from safetensors.torch import load_file
from small_world import draw_pairs
from test_pairs import BOTH_WAYS, make_row, write_groups
from test_sources import save_imagefolder, save_zipped_imagefolder


@pytest.fixture
def flags(flags, tmp_path):
    """Each test fills a cache of its own, of the 42 training pairs and the 6 held-out ones."""
    return {**flags, "cache_dir": tmp_path / "cache", "num_validation_pairs": 6, "cache_latents": True}


def refuse(*args, **kwargs):
    raise AssertionError("called")


def cache_files(flags):
    """All that lies in the caches, by its path."""
    return sorted(path for path in flags["cache_dir"].glob("mapo_latents/**/*") if path.is_file())


def cache_folders(flags):
    return {path.parts[len(flags["cache_dir"].parts) + 1] for path in cache_files(flags)}


@pytest.fixture
def encoded(script, monkeypatch):
    """How many images each call of `encode_images` gets."""
    counts, encode_images = [], script.encode_images

    def count(vae, pixels, batch_size):
        counts.append(len(pixels))
        return encode_images(vae, pixels, batch_size)

    monkeypatch.setattr(script, "encode_images", count)
    return counts


def results(out):
    """Everything logged but speed and memory, and the trained weights."""
    logged = {name: values for name, values in scalars(out).items() if name[:4] not in ("pair", "peak")}
    return logged, {name: w.tolist() for name, w in load_file(out / "pytorch_lora_weights.safetensors").items()}


VARIANTS = {
    "map-style, bf16, no flips": {"no_hflip": True, "mixed_precision": "bf16"},
    "map-style, ties, noise, workers": {"no-remove_ties": True, "label_noise_prob": 0.3, "dataloader_num_workers": 2},
    "streamed, workers, bf16": {"streaming": True, "dataloader_num_workers": 2, "mixed_precision": "bf16"},
}
*OTHERS, LAST = VARIANTS


@pytest.mark.parametrize("variant", [*(also(other) for other in OTHERS), LAST])
def test_cached_is_uncached_bit_by_bit(script, flags, tmp_path, monkeypatch, encoded, variant):
    """More than one epoch. Each pair is encoded once, before training; a second run encodes nothing."""
    flags.update(max_train_steps=12, resolution=32, **VARIANTS[variant])
    cached = results(run(script, flags))
    # The two images of the pair that is tried first; then two images of 48 pairs, in two orientations if they are
    # trained on and flipped.
    trained = 48 - flags["num_validation_pairs"]
    orientations = 1 if "no_hflip" in flags else 2
    assert encoded.pop(0) == 2
    assert sum(encoded) == 2 * (trained * orientations + flags["num_validation_pairs"])
    uncached = results(run(script, {**flags, "cache_latents": None, "output_dir": tmp_path / "uncached"}))
    assert cached == uncached
    encoded.clear()
    monkeypatch.setattr(script, "encode_prompts", refuse)
    assert results(run(script, {**flags, "output_dir": tmp_path / "again"})) == uncached and encoded == [2]


# Runs the script with process 1 coming late to the cache, and notes what each process encodes.
LATE = """
import os, pathlib, runpy, sys, time
import safetensors.torch

folder, rank = pathlib.Path(__file__).parent, os.environ["RANK"]
exists, listdir, save_file = pathlib.Path.exists, os.listdir, safetensors.torch.save_file
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


pathlib.Path.exists, os.listdir, safetensors.torch.save_file = late_exists, late_listdir, noted
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_two_processes_encode_their_shares_once(script, flags, tmp_path):
    """Streamed; the process that comes late finds files of the other. The run is the uncached one."""
    flags.update(streaming=True, train_batch_size=2, max_train_steps=11, resolution=16, num_validation_pairs=4)
    (tmp_path / "late.py").write_text(LATE)
    done = fork(flags, 2, wrapper=[tmp_path / "late.py"])
    assert done.returncode == 0, done.stderr
    shares = [len((tmp_path / f"encoded-{rank}").read_text().split()) for rank in (0, 1)]
    assert shares[0] == shares[1] and sum(shares) == len(cache_files(flags))
    done = fork({**flags, "cache_latents": None, "output_dir": tmp_path / "uncached"}, 2)
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "out") == results(tmp_path / "uncached")


def test_a_killed_run_leaves_whole_files_and_the_next_one_adds_the_rest(script, flags, tmp_path, encoded):
    draw_pairs(tmp_path / "data", num_pairs=300, size=16)
    flags.update(dataset_name=tmp_path / "data", resolution=16, max_train_steps=2, num_validation_pairs=None)
    process = FORKS.Process(target=work, args=({}, [SCRIPT, *command_line(flags)], [], tmp_path / "log"))
    process.start()
    while len(cache_files(flags)) < 2:
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    # One that a killed process was writing has another name.
    whole = [path for path in cache_files(flags) if path.suffix == ".safetensors"]
    kept = {path: (load_file(path), path.stat().st_mtime_ns) for path in whole}
    before = sum(len(moments["moments"].reshape(-1, 4, 2, 4, 2, 2)) for moments, _ in kept.values())
    assert 0 < before < 300
    run(script, flags)
    assert encoded.pop(0) == 2 and sum(encoded) == 4 * (300 - before)
    assert all(path.stat().st_mtime_ns == changed for path, (_, changed) in kept.items())


@pytest.mark.parametrize("streaming", [also(None), True], ids=["map", "stream"])
def test_bad_rows_and_resumed_runs_are_the_same_cached(script, flags, tmp_path, caplog, streaming):
    flags["dataset_name"] = write_groups(tmp_path / "data", [[9, 9]], tied={4}, bad={3, 7, 12})
    flags.update(num_validation_pairs=None, streaming=streaming, max_bad_rows=0.5, max_train_steps=9)
    flags["checkpointing_steps"] = 4
    found, messages = [], []
    for number, cached in enumerate((True, None)):
        caplog.clear()
        out = run(script, {**flags, "cache_latents": cached, "output_dir": tmp_path / f"out-{number}"})
        found.append(results(out))
        told = [record.getMessage() for record in caplog.records]
        messages.append([message for message in told if "Skipped" in message or "rows read" in message])
    assert found[0] == found[1]
    assert messages[0] == messages[1] and sum("Skipped" in message for message in messages[0]) >= 6
    # Uncached and cached runs resume each other.
    resume = {"resume_from_checkpoint": tmp_path / "out-1" / "checkpoint-4", "output_dir": tmp_path / "resumed"}
    logged, weights = results(run(script, {**flags, **resume}))
    assert weights == found[0][1]
    assert logged["loss"] == {step: loss for step, loss in found[0][0]["loss"].items() if step > 4}


class Filled(Exception):
    pass


@pytest.fixture
def fill(script, flags, monkeypatch):
    """Runs that end when their caches are filled; each returns the caches that there are."""

    def stop(*args):
        raise Filled

    def filled(**changes):
        with pytest.raises(Filled):
            run(script, {**flags, **changes})
        return cache_folders(flags)

    monkeypatch.setattr(script, "build_model", stop)
    flags.update(max_train_steps=1, num_validation_pairs=None, resolution=16)
    return filled


@pytest.mark.parametrize("save", [save_imagefolder, save_zipped_imagefolder])
def test_the_key_knows_when_image_files_change(flags, tmp_path, fill, save):
    """`datasets` prepares a folder again when a file in it has another time of change."""
    save(tmp_path / "data", [make_row(number) for number in range(3)])
    flags["dataset_name"] = tmp_path / "data"
    assert fill() == (seen := fill()) and len(seen) == 1
    changed = next(itertools.chain(tmp_path.glob("data/*.zip"), tmp_path.glob("*/2-jpg_1.png")))
    os.utime(changed, ns=(0, changed.stat().st_mtime_ns + 10**9))
    assert len(fill()) == 2


def test_the_key_knows_all_that_changes_what_is_stored(script, flags, tmp_path, monkeypatch, fill):
    draw_pairs(tmp_path / "pairs", num_pairs=4, num_shards=1)
    flags["dataset_name"] = tmp_path / "pairs"
    fill()
    seen = cache_folders(flags)
    assert len(seen) == 1
    fill(beta_mapo=2, seed=3, label_noise_prob=0.5, train_batch_size=1, run_validation=True)
    assert cache_folders(flags) == seen
    draw_pairs(tmp_path / "other", num_pairs=6, num_shards=1, seed=1)
    load_pipeline = script.load_pipeline

    def change(part):
        def loaded(*args):
            pipeline = load_pipeline(*args)
            if part == "pad_token":
                pipeline.tokenizer_2.pad_token = "a"
            elif part == "eos_token_id":
                pipeline.text_encoder.config.eos_token_id = 5
            else:
                with torch.no_grad():
                    next(getattr(pipeline, part).parameters()).flatten()[0].add_(1e-3)
            return pipeline

        return loaded

    flag_changes = [{"resolution": 24}, {"no_hflip": True}, {"streaming": True}, {"dataset_name": tmp_path / "other"}]
    flag_changes += [{"max_train_samples": 3}, {"chosen_column": "jpg_0", "rejected_column": "jpg_1"}]
    flag_changes += [{"allow_tf32": True}, {"num_validation_pairs": 2}]
    for changes in [*flag_changes, "vae", "text_encoder", "text_encoder_2", "eos_token_id", "pad_token"]:
        with monkeypatch.context() as patched:
            if isinstance(changes, str):
                patched.setattr(script, "load_pipeline", change(changes))
            fill(**(changes if isinstance(changes, dict) else {}))
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        found = cache_folders(flags)
        # Held-out pairs have a folder of their own, and those left to train on another.
        assert len(found - seen) == (2 if "num_validation_pairs" in changes else 1), changes
        seen = found
    draw_pairs(tmp_path / "other", num_pairs=6, num_shards=1, seed=2)
    fill(dataset_name=tmp_path / "other")
    assert len(cache_folders(flags) - seen) == 1


# What a VAE is given and gives --------------------------------------------------------------------------------------
@pytest.mark.parametrize("cached", [True, None], ids=["cached", "uncached"])
def test_a_vae_without_finite_latents_is_named_at_once(script, flags, monkeypatch, cached):
    load_pipeline, steps = script.load_pipeline, []

    def load_broken(*args):
        pipeline = load_pipeline(*args)
        pipeline.vae.quant_conv.weight.data.fill_(torch.nan)
        return pipeline

    monkeypatch.setattr(script, "load_pipeline", load_broken)
    monkeypatch.setattr(script, "train_step", lambda *args: steps.append(args))
    with pytest.raises(script.TrainingError, match="--pretrained_vae_model_name_or_path"):
        run(script, {**flags, "cache_latents": cached})
    assert not cache_files(flags) and not steps


@BOTH_WAYS
def test_a_pair_without_finite_latents_is_an_unusable_row(script, flags, tmp_path, monkeypatch, caplog, streaming):
    encode_images, number = script.encode_images, 5

    def encode(vae, pixels, batch_size):
        moments = encode_images(vae, pixels, batch_size)
        moments[pixels[:, 0, 0, 0] == number] = torch.nan
        return moments

    monkeypatch.setattr(script, "encode_images", encode)
    flags.update(dataset_name=write_groups(tmp_path / "data", [[12]]), num_validation_pairs=None, max_bad_rows=0.5)
    out = run(script, {**flags, "streaming": streaming, "max_train_steps": 3, "resolution": 16})
    logged = scalars(out)
    assert len(logged["loss"]) == 3 and set(logged["skipped_steps"].values()) == {0}
    skipped = [record.getMessage() for record in caplog.records if "Skipped" in record.getMessage()]
    assert len(skipped) == 1 and skipped[0].startswith(f"Skipped row {number}")


# Faults -------------------------------------------------------------------------------------------------------------
def test_a_full_disk_is_one_sentence_and_leaves_no_part(script, flags, monkeypatch):
    save_file, saved = safetensors.torch.save_file, []

    def save(tensors, path, *args, **kwargs):
        saved.extend([path] if "mapo_latents" in str(path) else [])
        if len(saved) > 1:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(safetensors.torch, "save_file", save)
        with pytest.raises(script.TrainingError, match="--cache_latents: .*mapo_latents.*: OSError.*No space left"):
            run(script, {**flags, "num_validation_pairs": None})
    assert len(cache_files(flags)) == 1
    run(script, {**flags, "num_validation_pairs": None})


def test_encoders_are_moved_off_the_device(script, flags, monkeypatch):
    """`meta` stands for the host's memory, to which they go: nothing there can compute, so training needs none."""
    moved, move = collections.Counter(), torch.nn.Module.to

    def to_meta(part, *args, **kwargs):
        if args == ("cpu",):
            moved[type(part).__name__] += 1
            args = ("meta",)
        return move(part, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "to", to_meta)
    run(script, flags)
    assert set(moved) == {"AutoencoderKL", "CLIPTextModel", "CLIPTextModelWithProjection"}


def test_unet_waits_on_the_cpu_until_all_pairs_are_encoded(script, flags, monkeypatch):
    """On the GPU, both would need more memory than training."""
    events, move, fill_cache = [], torch.nn.Module.to, script.fill_cache

    def note_move(module, *args, **kwargs):
        if isinstance(module, script.UNet2DConditionModel) and any(isinstance(arg, torch.device) for arg in args):
            events.append("moved")
        return move(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "to", note_move)
    monkeypatch.setattr(script, "fill_cache", lambda *args: events.append("encoded") or fill_cache(*args))

    run(script, {**flags, "max_train_steps": 1})

    assert events[:3] == ["encoded", "encoded", "moved"]


# Rounding -----------------------------------------------------------------------------------------------------------
def test_pixels_are_scaled_in_float32(script):
    """In bfloat16, half a grey level would be lost before the VAE sees the image."""
    seen = []
    posterior = SimpleNamespace(mean=torch.zeros(1, 4, 2, 2), std=torch.zeros(1, 4, 2, 2))
    vae = SimpleNamespace(
        dtype=torch.bfloat16,
        encode=lambda pixels: seen.append(pixels) or SimpleNamespace(latent_dist=posterior),
    )
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, 3, 1, 1)

    script.encode_images(vae, pixels, vae_batch_size=1)

    exact = pixels.double() / 127.5 - 1
    assert torch.equal(seen[0], exact.float().to(torch.bfloat16))
    assert not torch.equal(seen[0], pixels.to(torch.bfloat16) / 127.5 - 1)


def test_cached_latents_equal_those_of_a_vae_that_rounds_by_batch(script, flags, tmp_path, monkeypatch):
    """Large VAEs in bfloat16 round differently in another batch. By default, each image is encoded alone."""
    encode = script.AutoencoderKL.encode

    def round_by_batch(vae, pixels):
        output = encode(vae, pixels)
        output.latent_dist.mean += 1e-3 * len(pixels)
        return output

    monkeypatch.setattr(script.AutoencoderKL, "encode", round_by_batch)
    flags.update(resolution=32, num_validation_pairs=None)

    def losses(name, **changes):
        return scalars(run(script, {**flags, **changes, "output_dir": tmp_path / name}))["loss"]

    uncached = losses("uncached", cache_latents=None)
    assert losses("cached") == uncached
    assert losses("in batches", cache_latents=None, vae_encode_batch_size=4) != uncached
