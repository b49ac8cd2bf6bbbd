"""What makes a step fast: nothing waits for the device between two log lines, prompts are encoded once, --compile."""

import collections

import pytest
import torch
from conftest import run, scalars
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file


# What reads a tensor's value on the host.
READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero")


class ReadCounter:
    """Counts reads of tensors by the main process, from behind each log line to the next look at the gradients."""

    def __init__(self, script, monkeypatch):
        self.reads, self.windows, self.counting = collections.Counter(), [], True
        self.check, self.log = script.check_gradients, script.Accelerator.log
        for name in READS:
            monkeypatch.setattr(torch.Tensor, name, self.counted(name, getattr(torch.Tensor, name)))
        monkeypatch.setattr(script, "check_gradients", self.end_window)
        monkeypatch.setattr(script.Accelerator, "log", lambda *args, **kwargs: self.begin_window(*args, **kwargs))

    def counted(self, name, original):
        def read(tensor, *args, **kwargs):
            self.reads[name] += self.counting
            return original(tensor, *args, **kwargs)

        return read

    def end_window(self, *args):
        self.windows.append({name: count for name, count in self.reads.items() if count})
        self.counting = False
        return self.check(*args)

    def begin_window(self, *args, **kwargs):
        self.log(*args, **kwargs)
        self.reads.clear()
        self.counting = True


VARIANTS = {
    "LoRA": {},
    "whole UNet": {"rank": None, "learning_rate": 1e-4},
    "cached": {"cache_latents": True},
    "streamed": {"streaming": True},
    "accumulated": {"train_batch_size": 2, "gradient_accumulation_steps": 2},
    "bf16": {"mixed_precision": "bf16"},
    "v1": {"loss_type": "mapo_v1"},
    "checkpointed activations": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_step_that_is_not_logged_reads_the_device(script, flags, tmp_path, monkeypatch, variant):
    """Twelve steps, of which every fourth is logged; the first window has the start of the run in it."""
    flags.update(cache_dir=tmp_path, max_train_steps=12, logging_steps=4, **VARIANTS[variant])
    counter = ReadCounter(script, monkeypatch)
    run(script, flags)
    assert len(counter.windows) == 3 and counter.windows[1:] == [{}, {}]


def without_waiting(function):
    """The function, which raises where it waits for the GPU."""

    def call(*args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return function(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return call


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA alone says when it is waited for")
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_step_waits_for_the_gpu(script, flags, tmp_path, monkeypatch, variant):
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    for name in ("preference_step", "update_weights"):
        monkeypatch.setattr(script, name, without_waiting(getattr(script, name)))
    run(script, {**flags, "cache_dir": tmp_path, **VARIANTS[variant]})


def test_8bit_adam_waits_once_a_step_to_leave_bad_updates_out(script, flags, monkeypatch):
    """bitsandbytes has no way to leave an update out on the device."""
    flags.update(max_train_steps=6, logging_steps=3, use_8bit_adam=True)
    counter = ReadCounter(script, monkeypatch)
    run(script, flags)
    assert counter.windows[1:] == [{"__bool__": 3}]


def test_prompts_are_encoded_once_each_and_as_the_pipeline_does(script, world, monkeypatch):
    pipeline = StableDiffusionXLPipeline.from_pretrained(world / "pipeline")
    encoder, calls = pipeline.text_encoder_2, []
    handle = encoder.register_forward_pre_hook(lambda module, args: calls.append(args))
    prompts = ["a red circle", "", "a red circle", "a very long prompt " * 60, "a red circle"]
    with torch.no_grad():
        prompt_embeds, pooled = script.encode_prompts(pipeline, prompts)
        assert len(calls) == 3
        handle.remove()
        for index, prompt in enumerate(prompts):
            expected, _, expected_pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
            assert torch.equal(prompt_embeds[index], expected[0]) and torch.equal(pooled[index], expected_pooled[0])


def weights(folder):
    files = [*folder.glob("pytorch_lora_weights.safetensors"), *folder.glob("unet/*.safetensors")]
    return load_file(*files)


@pytest.mark.parametrize("rank", [4, None], ids=["LoRA", "whole UNet"])
def test_compiled_and_eager_runs_go_on_from_each_other(script, flags, tmp_path, rank):
    flags.update(rank=rank, learning_rate=1e-4, max_train_steps=4, checkpointing_steps=2)
    eager = run(script, flags)
    flags.update(compile=True, output_dir=tmp_path / "compiled")
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    compiled = run(script, flags)
    assert counters["unique_graphs"] > 0
    flags.update(resume_from_checkpoint=eager / "checkpoint-2", output_dir=tmp_path / "eager, then compiled")
    late = run(script, flags)
    flags.update(resume_from_checkpoint=compiled / "checkpoint-2", output_dir=tmp_path / "compiled, then eager")
    early = run(script, {**flags, "compile": None})
    expected = weights(eager)
    for out in (compiled, late, early):
        losses = scalars(out)["loss"]
        assert losses == pytest.approx({step: scalars(eager)["loss"][step] for step in losses}, rel=1e-5)
        assert weights(out).keys() == expected.keys()
        for name, weight in weights(out).items():
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=2e-4)
