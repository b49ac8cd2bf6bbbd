"""Training equals a loop written by hand, and many flags change nothing."""

import itertools
import json
import math
import re

import pytest
import torch
from accelerate.utils import recursively_apply
from conftest import command_line, fork, run, scalars
from diffusers import AutoencoderKL, UNet2DConditionModel
from runs import assert_close, assert_same, curves, differ, trained
from small_world import build_pipeline, draw_pairs
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


# No value is a default, so that a flag that is not used is noticed.
OPTIMIZER = {"adam_beta1": 0.8, "adam_beta2": 0.99, "adam_weight_decay": 0.1, "adam_epsilon": 1e-5}


DATASET_CARD = """---
configs:
- config_name: one_shard
  data_files: data/train-00000-*.parquet
- config_name: all_shards
  data_files: data/train-*.parquet
---
"""


@pytest.fixture(scope="module")
def other_world(tmp_path_factory):
    """What the small world lacks: v-prediction, a VAE without force_upcast and with other weights, pairs with ties."""
    folder = tmp_path_factory.mktemp("other")
    build_pipeline(folder / "pipeline", seed=7, prediction_type="v_prediction", force_upcast=False)
    draw_pairs(folder / "pairs", ties=20)
    (folder / "pairs" / "README.md").write_text(DATASET_CARD)
    return folder


# The oracle: models, objective, noise schedule, LoRA and optimizer, independent of the script -----------------------


def embed(folder, captions):
    """SDXL's conditioning: the penultimate hidden states of both text encoders, the projection of the second."""
    states = []
    for suffix, model in (("", CLIPTextModel), ("_2", CLIPTextModelWithProjection)):
        tokenizer = CLIPTokenizer.from_pretrained(folder / f"tokenizer{suffix}")
        tokens = tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        output = model.from_pretrained(folder / f"text_encoder{suffix}")(tokens.input_ids, output_hidden_states=True)
        states.append(output.hidden_states[-2])
    return torch.cat(states, dim=-1), output.text_embeds


def objective(chosen, rejected, args):
    chosen, rejected = chosen.double(), rejected.double()
    if math.isinf(args.beta_mapo):
        return chosen.mean()
    if args.loss_type == "mapo_v1":
        chosen_score, rejected_score = (
            args.snr_value * e / torch.expm1(args.snr_value * e) for e in (chosen, rejected)
        )
        return (chosen + args.beta_mapo * torch.log1p((-1000 * (chosen_score - rejected_score)).exp())).mean()
    chosen_score, rejected_score = ((e / torch.expm1(e)) ** args.beta_mapo for e in (chosen, rejected))
    return (chosen + torch.log1p((rejected_score - chosen_score).exp()) / args.beta_mapo).mean()


def draw_noisy(args, vae, items):
    """Noisy latents of all chosen and then all rejected images, with what the UNet should say and when."""
    with torch.no_grad():
        posteriors = [vae.encode(item["pixel_values"].float() / 127.5 - 1).latent_dist for item in items]
    samples = [p.mean + p.std * item["posterior_noise"] for p, item in zip(posteriors, items)]
    latents = torch.stack(samples, dim=1).flatten(0, 1).double() * vae.config.scaling_factor
    noise = torch.stack([item["noise"] for item in items]).repeat(2, 1, 1, 1).double()
    timesteps = torch.stack([item["timesteps"] for item in items]).repeat(2)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    signal = (1 - betas).cumprod(0)[timesteps].sqrt()[:, None, None, None]
    scatter = (1 - signal**2).sqrt()
    target = signal * noise - scatter * latents if args.prediction == "v_prediction" else noise
    return (signal * latents + scatter * noise).float(), target.float(), timesteps


class Oracle:
    """The run that `flags` ask for, step by step in float32 with plain torch."""

    def __init__(self, script, flags, start=None):
        self.args = args = script.parse_args(command_line(flags))
        self.folder = flags["pretrained_model_name_or_path"]
        self.unet = UNet2DConditionModel.from_pretrained(self.folder / "unet")
        self.vae = AutoencoderKL.from_pretrained(args.pretrained_vae_model_name_or_path or self.folder / "vae")
        args.prediction = "v_prediction" if "v_prediction" in self.scheduler_config() else "epsilon"
        self.items, self.held_out = script.load_pairs(args, (4, 8, 8), 1000)
        self.index = self.items.index
        self.script = script
        # LoRA as the sum that it means; `start` has what peft drew, for the down projections.
        self.lora = {name: weight.float().clone().requires_grad_() for name, weight in (start or {}).items()}
        self.full = dict(self.unet.named_parameters())

    def scheduler_config(self):
        return (self.folder / "scheduler" / "scheduler_config.json").read_text()

    def weights(self):
        if not self.lora:
            return self.full
        merged = {name: weight.detach() for name, weight in self.full.items()}
        for name in self.lora:
            if name.endswith(".lora_A.weight"):
                update = self.lora[name.replace("lora_A", "lora_B")].flatten(1) @ self.lora[name].flatten(1)
                target = name.removeprefix("unet.").replace(".lora_A", "")
                scale = (self.args.lora_alpha or self.args.rank) / self.args.rank
                merged[target] = merged[target] + scale * update.view_as(merged[target])
        return merged

    def errors(self, items):
        noisy, target, timesteps = draw_noisy(self.args, self.vae, items)
        with torch.no_grad():
            embeds, pooled = embed(self.folder, [item["caption"] for item in items])
        time_ids = torch.stack([item["add_time_ids"] for item in items])
        conditions = {"text_embeds": pooled.repeat(2, 1), "time_ids": time_ids.repeat(2, 1)}
        call = (noisy, timesteps, embeds.repeat(2, 1, 1), None, None, None, None, conditions)
        prediction = torch.func.functional_call(self.unet, self.weights(), call).sample
        return (prediction - target).pow(2).mean(dim=(1, 2, 3)).chunk(2)

    def train(self, pairs_per_step, learning_rates):
        """The losses and the gradient norms, step by step."""
        args = self.args
        layout = self.script.Layout(shards_mixed=args.shuffle_shards, turn=args.train_batch_size)
        batches = self.script.training_batches(self.index, args.seed, layout, args.train_batch_size, 0, 0, 1)
        visits = itertools.chain.from_iterable(batches)
        parameters = list((self.lora or self.full).values())
        optimizer = torch.optim.AdamW(
            parameters,
            betas=(args.adam_beta1, args.adam_beta2),
            weight_decay=args.adam_weight_decay,
            eps=args.adam_epsilon,
        )
        losses, norms = [], []
        for learning_rate in learning_rates:
            loss = objective(*self.errors([self.items[next(visits)] for _ in range(pairs_per_step)]), args)
            gradients = torch.autograd.grad(loss, parameters)
            norm = torch.stack([gradient.double().norm() for gradient in gradients]).norm()
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = gradient * min(1.0, args.max_grad_norm / (norm.item() + 1e-6))
            optimizer.param_groups[0]["lr"] = learning_rate
            optimizer.step()
            losses.append(loss.item())
            norms.append(norm.item())
        return losses, norms


def assert_equals_oracle(script, flags, tmp_path, learning_rates=None, pairs_per_step=4):
    """The losses, gradient norms and final weights of a run are those of the oracle."""
    start = None
    if flags["rank"]:
        # The LoRA before its first step: this learning rate is too small to change a float32.
        changes = {"learning_rate": 1e-30, "max_train_steps": 1, "output_dir": tmp_path / "start"}
        start = trained(run(script, {**flags, **changes}))
    oracle = Oracle(script, flags, start)
    expected = oracle.lora or oracle.full
    first = {name: weight.detach().clone() for name, weight in expected.items()}
    if learning_rates is None:
        learning_rates = flags["max_train_steps"] * [flags["learning_rate"]]

    losses, norms = oracle.train(pairs_per_step, learning_rates)
    out = run(script, flags)

    logged = scalars(out)
    assert list(logged["loss"].values()) == pytest.approx(losses, rel=1e-5)
    assert list(logged["grad_norm"].values()) == pytest.approx(norms, rel=1e-4)
    assert list(logged["lr"].values()) == pytest.approx(learning_rates, rel=1e-6)
    weights = trained(out)
    assert weights.keys() == expected.keys()
    largest_change = max((expected[name] - first[name]).abs().max().item() for name in weights)
    largest_error = max((expected[name] - weights[name]).abs().max().item() for name in weights)
    assert largest_error < 2e-3 * largest_change
    return oracle


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("world", {"beta_mapo": 1, "learning_rate": 1e-2, "lora_layers": ["attention"]}),
        ("world", {"beta_mapo": 64, "rank": None}),
        ("other_world", {"loss_type": "mapo_v1", "beta_mapo": 1, "snr_value": 0.1}),
        ("other_world", {"beta_mapo": "inf", "rank": None}),
        ("world", {"max_grad_norm": 1e-3, "adam_epsilon": 1e-2, "learning_rate": 0.1, "seed": 3, "rank": 2}),
    ],
    ids=["LoRA", "full", "LoRA, v, mapo_v1", "full, v, fine-tuning", "clipped"],
)
def test_run_equals_the_loop_written_by_hand(script, flags, request, tmp_path, model, changes):
    flags.update(OPTIMIZER, pretrained_model_name_or_path=request.getfixturevalue(model) / "pipeline")
    flags.update(changes)

    assert_equals_oracle(script, flags, tmp_path)


def test_lora_on_all_layers_equals_the_loop_written_by_hand(script, flags, tmp_path, monkeypatch):
    """With the UNet in float64: with LoRAs on convolutions, rounding errors of float32 would be near the tolerance."""
    flags.update(OPTIMIZER, beta_mapo=1, learning_rate=1e-2, lora_alpha=8)
    denoising_errors = script.denoising_errors

    def in_double(unet, noise_scheduler, latents, conditions, noise, timesteps):
        latents, conditions, noise = recursively_apply(torch.Tensor.double, (latents, conditions, noise))
        return denoising_errors(unet.double(), noise_scheduler, latents, conditions, noise, timesteps)

    monkeypatch.setattr(script, "denoising_errors", in_double)

    assert_equals_oracle(script, flags, tmp_path)


def test_accumulation_and_scaled_learning_rate_equal_the_loop_written_by_hand(script, flags, tmp_path):
    flags.update(OPTIMIZER, gradient_accumulation_steps=3, train_batch_size=2, scale_lr=True, max_train_steps=3)

    assert_equals_oracle(script, flags, tmp_path, learning_rates=3 * [6e-3], pairs_per_step=6)


def test_other_pairs_and_another_vae_equal_the_loop_written_by_hand(script, flags, other_world, tmp_path):
    """With ties, label noise and random crops."""
    flags.update(OPTIMIZER, dataset_name=other_world / "pairs", label_noise_prob=0.5, random_crop=True)
    flags.update({"dataset_config_name": "all_shards", "no-remove_ties": True})
    flags["pretrained_vae_model_name_or_path"] = other_world / "pipeline" / "vae"

    oracle = assert_equals_oracle(script, flags, tmp_path)

    assert len(oracle.index) == 48


def test_first_eval_metrics_equal_those_computed_by_hand(script, flags):
    """Ten pairs in batches of four: the mean is over pairs, not over batches."""
    flags.update(rank=None, num_validation_pairs=10, beta_mapo=1, max_train_steps=1)
    oracle = Oracle(script, flags)
    with torch.no_grad():
        chosen, rejected = oracle.errors([oracle.held_out[script.Visit(row, row)] for row in range(10)])
    margin = chosen / torch.expm1(chosen) - rejected / torch.expm1(rejected)
    expected = {
        "eval_loss": objective(chosen, rejected, oracle.args),
        "eval_chosen_mse": chosen.mean(),
        "eval_rejected_mse": rejected.mean(),
        "eval_margin": margin.mean(),
        "eval_accuracy": (chosen < rejected).double().mean(),
    }

    logged = scalars(run(script, flags))

    for name, value in expected.items():
        assert logged[name][0] == pytest.approx(value.item(), rel=1e-5, abs=1e-6), name


# Learning rate, steps and clipping ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("constant_with_warmup", [0, 1 / 3, 2 / 3, 1, 1, 1]),
        ("polynomial", [0, 1 / 3, 2 / 3, 1, 4 / 9, 1 / 9]),
        ("cosine_with_restarts", [0, 1 / 3, 2 / 3, 1, 0.25, 0.75]),
    ],
)
def test_schedule_counts_optimizer_steps(script, flags, scheduler, expected):
    flags.update(lr_scheduler=scheduler, lr_warmup_steps=3, max_train_steps=6, train_batch_size=1)
    flags.update(gradient_accumulation_steps=2, lr_power=2, lr_num_cycles=2)

    logged = scalars(run(script, flags))["lr"]

    assert list(logged) == [1, 2, 3, 4, 5, 6]
    # The polynomial schedule ends at 1e-7.
    assert list(logged.values()) == pytest.approx([1e-3 * factor for factor in expected], abs=2e-7)


def test_max_grad_norm_of_0_or_inf_turns_clipping_off(script, flags, tmp_path):
    """Like a norm that no gradient reaches."""
    flags.update(adam_epsilon=1.0)

    def clip_at(norm):
        return run(script, {**flags, "max_grad_norm": norm, "output_dir": tmp_path / str(norm)})

    unclipped = clip_at(1e6)
    assert_same(clip_at(0), unclipped)
    assert_same(clip_at("inf"), unclipped)
    assert differ(trained(clip_at(1e-3)), trained(unclipped))


def test_adam_is_fused(script):
    """PyTorch's default on a GPU copies all gradients, which takes 9 GiB for the full UNet."""
    args = script.parse_args(["--pretrained_model_name_or_path", "sdxl", "--dataset_name", "pairs"])

    optimizer = script.build_optimizer(args, [[torch.nn.Parameter(torch.ones(2))]], pairs_per_step=1)

    assert [group["fused"] for group in optimizer.param_groups] == [True]


# Several processes --------------------------------------------------------------------------------------------------
# Trains one job after the other on each process, and writes a hash of the weights that this process ends with.
JOBS = """
import gc, hashlib, json, sys
from pathlib import Path

import torch
from accelerate import PartialState
from conftest import load_script, run_words

script = load_script()
folder = Path(__file__).parent
load_pipeline = script.load_pipeline
round_stochastically = script.round_stochastically
unets = []


def load_and_record(*args):
    pipeline = load_pipeline(*args)
    unets.append(pipeline.unet)
    return pipeline


def round_differently(weights, generator):
    seed = generator.initial_seed() + PartialState().process_index
    return round_stochastically(weights, generator.manual_seed(seed))


script.load_pipeline = load_and_record
# One process group for all jobs. A run would destroy it at its end.
destroy_process_group = PartialState.destroy_process_group
PartialState.destroy_process_group = lambda state, group=None: None
for name, words in json.loads((folder / "jobs.json").read_text()).items():
    script.round_stochastically = round_differently if name == "rounded differently" else round_stochastically
    run_words(script, words)
    digest = hashlib.sha256()
    for weight in unets[-1].parameters():
        if weight.requires_grad:
            digest.update(weight.detach().view(torch.uint8).numpy().tobytes())
    (folder / f"{name}-{PartialState().process_index}").write_text(digest.hexdigest())
unets.clear()
gc.collect()
destroy_process_group(PartialState())
"""


def launch_jobs(folder, jobs):
    """Train jobs {name: flags} on two processes. Returns the hashes of each job's weights on both of them."""
    folder.mkdir()
    (folder / "jobs.py").write_text(JOBS)
    words = {name: command_line(flags) for name, flags in jobs.items()}
    (folder / "jobs.json").write_text(json.dumps(words))
    result = fork({}, 2, wrapper=[folder / "jobs.py"])
    assert result.returncode == 0, result.stderr
    return {name: [(folder / f"{name}-{rank}").read_text() for rank in range(2)] for name in jobs}


def test_processes_and_accumulation_give_the_same_run(script, flags, tmp_path):
    """
    1 process x 4 pairs = 2 processes x 2 pairs = 4 accumulated pairs.

    With every optimizer, both processes end with the same weights.
    """
    flags.update(lr_scheduler="cosine", lr_warmup_steps=2, max_train_steps=6, adam_epsilon=1e-5)
    flags.update(num_validation_pairs=7)
    full = {"rank": None, "max_train_steps": 3, "num_validation_pairs": None, "report_to": "none"}
    full_8bit = {**full, "use_8bit_adam": True}
    full_bf16 = {**full_8bit, "mixed_precision": "bf16", "full_bf16": True}
    changes = {
        "LoRA": {},
        "AdamW": full,
        "8-bit AdamW": full_8bit,
        "full_bf16": full_bf16,
        # A check of the test: here the processes must end with different weights.
        "rounded differently": full_bf16,
    }
    jobs = {}
    for name, changes_of_job in changes.items():
        jobs[name] = {**flags, "train_batch_size": 2, "output_dir": tmp_path / name, **changes_of_job}

    one = run(script, flags)
    flags.update(train_batch_size=1, gradient_accumulation_steps=4)
    accumulated = run(script, {**flags, "output_dir": tmp_path / "accumulated"})
    hashes = launch_jobs(tmp_path / "jobs", jobs)

    assert_close(one, accumulated)
    assert_close(one, tmp_path / "LoRA")
    cosine = [1e-3 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    for folder in (one, accumulated, tmp_path / "LoRA"):
        assert list(scalars(folder)["lr"].values()) == pytest.approx([0, 5e-4, *cosine])
    for name, (first, second) in hashes.items():
        if name == "rounded differently":
            assert first != second
        else:
            assert first == second, name
    assert len({first for first, _ in hashes.values()}) == len(jobs)


# What changes nothing -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rank", [4, None], ids=["LoRA", "full"])
def test_gradient_checkpointing_changes_nothing(script, flags, tmp_path, loaded, rank):
    flags["rank"] = rank

    plain = run(script, flags)
    checkpointed = run(script, {**flags, "output_dir": tmp_path / "checkpointed", "gradient_checkpointing": True})

    assert [call.result.unet.is_gradient_checkpointing for call in loaded] == [False, True]
    assert_same(plain, checkpointed)


def test_vae_batch_size_changes_nothing(script, flags, tmp_path, record_calls):
    flags["adam_epsilon"] = 1e-5
    calls = record_calls(AutoencoderKL, "encode")

    one_by_one = run(script, flags)
    in_batches = run(script, {**flags, "output_dir": tmp_path / "batches", "vae_encode_batch_size": 8})

    # Each run first encodes the two images of one pair as a trial.
    assert [len(call.args[1]) for call in calls] == [1, 1, *32 * [1], 2, *4 * [8]]
    assert_close(in_batches, one_by_one)


def test_each_batch_of_the_next_step_is_read_after_one_of_this_step(script, flags, monkeypatch):
    """While the GPU computes. If all were read at the end of a step, the GPU would wait for them."""
    flags.update(train_batch_size=2, gradient_accumulation_steps=2, max_train_steps=3)
    events = []

    def record(owner, name, event):
        original = getattr(owner, name)

        def recorded(*args):
            events.append(event)
            return original(*args)

        monkeypatch.setattr(owner, name, recorded)

    record(script.StepBatches, "read", "read")
    record(script, "preference_loss", "loss")

    run(script, flags)

    assert events == ["read", "read", *4 * ["loss", "read"], "loss", "loss"]


# Seeds --------------------------------------------------------------------------------------------------------------
def test_another_seed_gives_other_pairs_and_another_lora(script, flags, tmp_path):
    flags.update(max_train_steps=1)
    first = run(script, flags)
    other = run(script, {**flags, "output_dir": tmp_path / "other", "seed": 1})

    assert curves(first)["loss"] != curves(other)["loss"]
    name = next(name for name in trained(first) if "lora_A" in name)
    assert not torch.equal(trained(first)[name], trained(other)[name])


def test_seed_that_is_not_given_is_random_and_logged(script, flags, tmp_path, caplog):
    caplog.set_level("INFO")

    first = run(script, {**flags, "seed": None})
    run(script, {**flags, "seed": None, "output_dir": tmp_path / "second"})

    seeds = re.findall(r"--seed (\d+)", caplog.text)
    assert len(seeds) == 2
    assert seeds[0] != seeds[1]
    repeated = run(script, {**flags, "seed": seeds[0], "output_dir": tmp_path / "repeated"})
    assert_same(first, repeated)
