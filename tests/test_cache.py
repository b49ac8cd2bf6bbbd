"""--cache_latents: the same training from pairs that were encoded once; whole files after any kill, for all runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import SCRIPT, command_line, launch, run, scalars
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from small_world import draw_pairs
from test_pairs import make_row, write_groups, write_parquet


@pytest.fixture
def flags(flags, tmp_path):
    """Each test fills a cache of its own."""
    return {**flags, "cache_dir": tmp_path / "cache", "num_validation_pairs": 6, "cache_latents": True}


def refuse(*args, **kwargs):
    raise AssertionError("called")


def cache_files(flags):
    return sorted(flags["cache_dir"].glob("mapo_latents/*/*.safetensors"))


def cached_pairs(flags):
    """(shard, row, prompt, labels or reason) of every pair in every file."""
    pairs = []
    for path in cache_files(flags):
        with safe_open(path, framework="pt") as file:
            pairs += json.loads(file.metadata()["pairs"])
    return pairs


def trained(out):
    return load_file(next(out.glob("pytorch_lora_weights.safetensors")))


def curves(out):
    """Everything logged but speed and memory."""
    logged = scalars(out)
    return {name: values for name, values in logged.items() if name not in ("pairs_per_second", "peak_memory_gib")}


def assert_same_run(out, other):
    assert curves(out) == curves(other)
    weights, others = trained(out), trained(other)
    assert weights.keys() == others.keys()
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())


VARIANTS = {
    "map-style": {},
    "streamed": {"streaming": True, "shuffle_buffer_size": 10},
    "no mirror": {"no_hflip": True},
    "ties and label noise": {"no-remove_ties": True, "label_noise_prob": 0.3},
    "workers": {"dataloader_num_workers": 2},
    "streamed by workers": {"streaming": True, "shuffle_buffer_size": 10, "dataloader_num_workers": 2},
    "bf16": {"mixed_precision": "bf16"},
    "accumulated": {"train_batch_size": 2, "gradient_accumulation_steps": 2, "use_8bit_adam": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_is_uncached_bit_by_bit(script, flags, tmp_path, monkeypatch, variant):
    """More than one epoch of 42 pairs; a second run finds all encoded."""
    flags.update(max_train_steps=12, **VARIANTS[variant])
    cached = run(script, flags)
    uncached = run(script, {**flags, "cache_latents": None, "output_dir": tmp_path / "uncached"})
    assert_same_run(cached, uncached)
    monkeypatch.setattr(script, "encode_images", refuse)
    assert_same_run(run(script, {**flags, "output_dir": tmp_path / "again"}), uncached)


def test_cached_resume_is_the_uninterrupted_uncached_run(script, flags, tmp_path):
    """Stopped in the first epoch of a stream, when a part of the pairs is cached."""
    flags.update(streaming=True, shuffle_buffer_size=10, max_train_steps=4, checkpointing_steps=4)
    # The end of the first run would log metrics that the uninterrupted run has no reason to.
    flags["num_validation_pairs"] = None
    run(script, flags)
    assert 0 < len(cached_pairs(flags)) < 48
    flags["max_train_steps"] = 14
    resumed = run(script, {**flags, "resume_from_checkpoint": "latest"})
    assert_same_run(resumed, run(script, {**flags, "cache_latents": None, "output_dir": tmp_path / "whole"}))


@pytest.mark.parametrize("streaming", [None, True], ids=["map", "stream"])
def test_two_processes_encode_each_pair_once(flags, tmp_path, streaming):
    flags.update(streaming=streaming, train_batch_size=2, max_train_steps=10, shuffle_buffer_size=8)
    result = launch(flags, processes=2)
    assert result.returncode == 0, result.stderr
    pairs = [tuple(pair[:2]) for pair in cached_pairs(flags)]
    # The last block of each rank's stream is not asked for.
    assert len({*pairs}) == len(pairs) == 48 if streaming is None else 46 <= len({*pairs}) == len(pairs)
    flags.update(cache_latents=None, output_dir=tmp_path / "uncached")
    assert launch(flags, processes=2).returncode == 0
    assert_same_run(tmp_path / "out", tmp_path / "uncached")


def test_a_file_holds_the_moments_of_both_orientations(script, flags, world):
    run(script, {**flags, "max_train_steps": 1, "validation_split": None})
    pipeline = StableDiffusionXLPipeline.from_pretrained(world / "pipeline")
    args = script.parse_args(command_line(flags))
    dataset, rows, _, _ = script.load_rows(args)
    seen = 0
    for path in cache_files(flags):
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            pairs = json.loads(file.metadata()["pairs"])
        if len(pairs) != len(rows):
            continue
        for index, (_, row, prompt, labels) in enumerate(pairs):
            record = dataset[row]
            assert labels == [record["label_0"], record["label_1"]]
            for column, name in enumerate(("jpg_0", "jpg_1")):
                pixels, _ = script.crop_image(script.decode_image(record[name]), 64, (0.5, 0.5), False)
                for mirrored, image in enumerate((pixels, pixels.flip(-1))):
                    with torch.no_grad():
                        posterior = pipeline.vae.encode(image[None] / 127.5 - 1).latent_dist
                    moments = torch.cat([posterior.mean, posterior.std])
                    torch.testing.assert_close(tensors["moments"][index, column, mirrored], moments, rtol=0, atol=2e-4)
            with torch.no_grad():
                embeds, _, pooled, _ = pipeline.encode_prompt(record["caption"], do_classifier_free_guidance=False)
            assert torch.equal(tensors["prompt_embeds"][prompt], embeds[0])
            assert torch.equal(tensors["pooled_prompt_embeds"][prompt], pooled[0])
            seen += 1
        assert len(tensors["prompt_embeds"]) == len({dataset[row]["caption"] for _, row, _, _ in pairs}) < len(pairs)
    assert seen == 42


def test_the_key_knows_all_that_changes_what_is_stored(script, flags, world, tmp_path):
    def folder(pipeline=None, held_out=False, **changes):
        args = script.parse_args(command_line({**flags, **changes}))
        pipeline = pipeline or StableDiffusionXLPipeline.from_pretrained(world / "pipeline")
        return script.cache_folder(args, script.encoders_digest(pipeline), held_out)

    plain = folder()
    for same in ({"beta_mapo": 2}, {"seed": 3}, {"rank": None}, {"train_batch_size": 1}, {"num_validation_pairs": 3}):
        assert folder(**same) == plain, same
    draw_pairs(tmp_path / "other", seed=1)
    others = [
        {"resolution": 32},
        {"no_hflip": True},
        {"streaming": True, "max_train_steps": 1},
        {"dataset_name": tmp_path / "other"},
        {"max_train_samples": 20},
        {"caption_column": "other"},
        {"chosen_column": "jpg_0", "rejected_column": "jpg_1"},
        {"no-remove_ties": True},
        {"allow_tf32": True},
        {"held_out": True},
        {"held_out": True, "num_validation_pairs": 3},
    ]
    found = [folder(**changes) for changes in others]
    for change in ("vae", "text_encoder", "text_encoder_2", "dtype", "pad_token", "eos_token_id"):
        pipeline = StableDiffusionXLPipeline.from_pretrained(world / "pipeline")
        if change == "dtype":
            pipeline.vae.to(torch.bfloat16)
        elif change == "pad_token":
            pipeline.tokenizer_2.pad_token = "a"
        elif change == "eos_token_id":
            pipeline.text_encoder.config.eos_token_id = 5
        else:
            with torch.no_grad():
                next(getattr(pipeline, change).parameters()).flatten()[0].add_(1e-3)
        found.append(folder(pipeline))
    assert len({plain, *found}) == len(found) + 1


def test_a_changed_file_of_pairs_is_encoded_anew(script, flags, tmp_path):
    flags["dataset_name"] = tmp_path / "pairs"
    draw_pairs(flags["dataset_name"])
    run(script, {**flags, "max_train_steps": 1})
    before = len(cache_files(flags))
    draw_pairs(flags["dataset_name"], seed=1)
    run(script, {**flags, "max_train_steps": 1})
    assert len(cache_files(flags)) == 2 * before


def test_a_killed_run_leaves_whole_files_and_the_next_goes_on(script, flags, tmp_path, monkeypatch):
    rows = [make_row(index % 200, caption=f"pair {index}") for index in range(1500)]
    flags["dataset_name"] = write_parquet(tmp_path / "data" / "train.parquet", [rows])
    flags.update(resolution=32, max_train_steps=2, num_validation_pairs=None, train_batch_size=16)
    process = subprocess.Popen([sys.executable, SCRIPT, *command_line(flags)], stderr=subprocess.DEVNULL)
    while not cache_files(flags):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # As a kill in mid-write leaves it.
    whole = cache_files(flags)
    parts = [whole[0].with_name(f"{age}.safetensors.part") for age in (0, 2 * 3600)]
    for part, age in zip(parts, (0, 2 * 3600), strict=True):
        part.write_bytes(whole[0].read_bytes()[:1000])
        os.utime(part, (time.time() - age, time.time() - age))
    before = len(cached_pairs(flags))
    assert 0 < before < 1500
    encoded, encode_images = [], script.encode_images

    def count(args, vae, pixels):
        encoded.append(len(pixels))
        return encode_images(args, vae, pixels)

    monkeypatch.setattr(script, "encode_images", count)
    cached = run(script, flags)
    # Two images in two orientations.
    assert sum(encoded) == 4 * (1500 - before)
    pairs = {tuple(pair[:2]) for pair in cached_pairs(flags)}
    assert len(pairs) == len(cached_pairs(flags)) == 1500
    assert [part.exists() for part in parts] == [True, False]
    monkeypatch.undo()
    assert_same_run(cached, run(script, {**flags, "cache_latents": None, "output_dir": tmp_path / "uncached"}))


@pytest.mark.parametrize("streaming", [None, True], ids=["map", "stream"])
def test_bad_rows_are_the_same_ones_cached(script, flags, tmp_path, streaming, caplog):
    flags["dataset_name"] = write_groups(tmp_path / "data", [[9, 9]], tied={4}, bad={3, 7, 12})
    flags.update(num_validation_pairs=None, streaming=streaming, max_bad_rows=0.5, max_train_steps=9)
    messages = []
    for cached in (True, True, None):
        caplog.clear()
        flags.update(cache_latents=cached, output_dir=tmp_path / f"out-{len(messages)}")
        run(script, flags)
        messages.append([record.message for record in caplog.records if "row" in record.message])
    assert messages[0] == messages[1] == messages[2]
    assert sum("Skipped" in message for message in messages[0]) == 6
    assert_same_run(tmp_path / "out-0", tmp_path / "out-2")


def test_a_cached_epoch_of_a_stream_reads_no_image(script, flags, monkeypatch):
    flags.update(streaming=True, max_train_steps=14)
    run(script, flags)
    monkeypatch.setattr(script, "decode_image", refuse)
    read = []
    is_tie = script.is_tie
    monkeypatch.setattr(script, "is_tie", lambda record, labels: read.append(record) or is_tie(record, labels))
    run(script, flags)
    # The held-out ones are found by reading; not one row behind them.
    assert len(read) <= 8


def test_two_processes_may_write_the_same_file(script, flags, world, tmp_path):
    """As two ranks do that read the same shards of a stream."""
    args = script.parse_args(command_line(flags))
    pipeline = StableDiffusionXLPipeline.from_pretrained(world / "pipeline")
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    one, other = (script.PairCache(args, accelerator, pipeline, [], tmp_path / "shared") for _ in range(2))

    def overtaken(path):
        other.write("0.json", lambda path: path.write_text("[1]"))
        path.write_text("[1]")

    one.write("0.json", overtaken)
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["0.json"]


def test_a_stream_that_will_not_fit_is_one_sentence(script, flags, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=9))
    flags.update(streaming=True, num_validation_pairs=None)
    with pytest.raises(script.TrainingError, match=r"--cache_latents: 48 pairs need 0\.\d+ GiB in .*mapo_latents"):
        run(script, flags)


@pytest.mark.parametrize("where", ["estimate", "write"])
def test_a_full_disk_is_one_sentence(script, flags, monkeypatch, where):
    if where == "estimate":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=9))
        expected = r"--cache_latents: 6 pairs need 0\.\d+ GiB in .*mapo_latents.*, where 8\.\d+e-09 GiB are free"
    else:

        def save(tensors, path, metadata):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(script, "save_file", save)
        expected = r"--cache_latents: .*mapo_latents.* cannot be written: .*No space left"
    with pytest.raises(script.TrainingError, match=expected):
        run(script, flags)
    assert not cache_files(flags) and not list(flags["cache_dir"].glob("mapo_latents/*/*.part"))


def test_a_disk_that_fills_up_under_a_stream_costs_no_trained_step(script, flags, monkeypatch):
    flags.update(streaming=True, shuffle_buffer_size=10, max_train_steps=14, num_validation_pairs=None)
    save_file, saved = script.save_file, []

    def save(tensors, path, metadata):
        saved.append(path)
        if len(saved) == 3:
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(script, "save_file", save)
    with pytest.raises(script.TrainingError, match="checkpoint of step 5 is saved.*--cache_latents: .*No space left"):
        run(script, flags)
    assert (flags["output_dir"] / "checkpoint-5" / "mapo_state.json").exists()


def test_encoders_leave_the_device_and_come_back(script, flags, world, monkeypatch):
    """`meta` stands for a GPU's memory."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(world / "pipeline")
    parts = (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    script.move_encoders(pipeline, torch.device("meta"))
    assert all(part.device.type == "meta" for part in parts) and pipeline.unet.device.type == "cpu"
    # The host's memory has another name here than the device's, so that moves between them are seen.
    moves, move_encoders = [], script.move_encoders
    monkeypatch.setattr(script, "move_encoders", lambda pipeline, device: moves.append(device))
    run(script, {**flags, "max_train_steps": 2})
    assert len(moves) >= 5 and moves[-1] == torch.device("cpu")
    monkeypatch.setattr(script, "move_encoders", move_encoders)
