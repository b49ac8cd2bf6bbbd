"""The training step against a loop written by hand, and all that must not change what it computes."""

import itertools
import json
import math
import re

import pytest
import torch
from conftest import command_line, fork, run, scalars
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from small_world import build_pipeline, draw_pairs
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
# Full of defaults that would hide a flag that is not used: no value here is one.
OPTIMIZER = {"adam_beta1": 0.8, "adam_beta2": 0.99, "adam_weight_decay": 0.1, "adam_epsilon": 1e-5}


def trained(folder):
    """The weights that a run ended with."""
    path = folder / LORA_WEIGHTS
    return load_file(path if path.exists() else folder / UNET_WEIGHTS)


def curves(folder):
    """What was logged but for time and memory."""
    return {name: values for name, values in scalars(folder).items() if "second" not in name and "memory" not in name}


def assert_same(folder, other):
    """Same curves and same weights, bit for bit."""
    assert curves(folder) == curves(other)
    assert_equal(trained(folder), trained(other))


def assert_equal(weights, others):
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, others[name]), name


def assert_close(folder, other, steps=None):
    """Same curves (of all or of some steps) and same weights, to the rounding of float32."""
    for name, values in curves(folder).items():
        expected = {step: value for step, value in curves(other)[name].items() if steps is None or step in steps}
        assert values == pytest.approx(expected, rel=1e-5, abs=1e-6), name
    weights, others = trained(folder), trained(other)
    assert weights.keys() == others.keys()
    assert max((value - others[name]).abs().max().item() for name, value in weights.items()) < 1e-5


CONFIGURATIONS = """---
configs:
- config_name: part
  data_files: data/train-00000-*.parquet
- config_name: whole
  data_files: data/train-*.parquet
---
"""


@pytest.fixture(scope="module")
def other_world(tmp_path_factory):
    """What the small world lacks: a v-prediction model and a half-precision VAE of other weights, pairs with ties."""
    folder = tmp_path_factory.mktemp("other")
    build_pipeline(folder / "pipeline", seed=7, prediction_type="v_prediction", force_upcast=False)
    draw_pairs(folder / "pairs", ties=20)
    (folder / "pairs" / "README.md").write_text(CONFIGURATIONS)
    return folder


# Independent of the script: models, objective, noise schedule, LoRA, optimizer --------------------------------------


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


def start_of_lora(script, flags, folder):
    """The adapter before its first step: a run with a learning rate too small to move a float32."""
    return trained(
        run(script, {**flags, "output_dir": folder, "learning_rate": 1e-30, "max_train_steps": 1, "report_to": "none"})
    )


def check_against_oracle(script, flags, tmp_path, learning_rates=None, pairs_per_step=4):
    """Losses, gradient norms and final weights of a run are those of the oracle."""
    start = start_of_lora(script, flags, tmp_path / "start") if flags["rank"] else None
    oracle = Oracle(script, flags, start)
    first = {name: weight.detach().clone() for name, weight in (oracle.lora or oracle.full).items()}
    learning_rates = learning_rates or flags["max_train_steps"] * [flags["learning_rate"]]
    losses, norms = oracle.train(pairs_per_step, learning_rates)
    out = run(script, flags)
    logged = scalars(out)
    assert list(logged["loss"].values()) == pytest.approx(losses, rel=1e-5)
    assert list(logged["grad_norm"].values()) == pytest.approx(norms, rel=1e-4)
    assert list(logged["lr"].values()) == pytest.approx(learning_rates, rel=1e-6)
    weights, expected = trained(out), oracle.lora or oracle.full
    assert weights.keys() == expected.keys()
    moved = max((expected[name] - first[name]).abs().max().item() for name in weights)
    off = max((expected[name] - weights[name]).abs().max().item() for name in weights)
    assert off < 2e-3 * moved
    return oracle


@pytest.mark.parametrize(
    ("prediction", "changes"),
    [
        ("epsilon", {"beta_mapo": 1, "learning_rate": 1e-2, "lora_layers": ["attention"]}),
        ("epsilon", {"beta_mapo": 64, "rank": None}),
        ("v_prediction", {"loss_type": "mapo_v1", "beta_mapo": 1, "snr_value": 0.1}),
        ("v_prediction", {"beta_mapo": "inf", "rank": None}),
        # Clipped, and with another start of the LoRA.
        ("epsilon", {"max_grad_norm": 1e-3, "adam_epsilon": 1e-2, "learning_rate": 0.1, "seed": 3, "rank": 2}),
    ],
    ids=["LoRA", "full", "LoRA, v, mapo_v1", "full, v, fine-tuning", "clipped"],
)
def test_run_is_the_loop_written_by_hand(script, flags, other_world, tmp_path, prediction, changes):
    if prediction == "v_prediction":
        flags["pretrained_model_name_or_path"] = other_world / "pipeline"
    check_against_oracle(script, {**flags, **OPTIMIZER, **changes}, tmp_path)


def test_lora_on_all_layers_is_the_loop_written_by_hand(script, flags, tmp_path, monkeypatch):
    """With the UNet in float64: convolutions beside their LoRA round float32 to about the bound, 12 times as far."""
    errors = script.denoising_errors

    def in_double(unet, noise_scheduler, latents, prompt_embeds, conditions, noise, timesteps):
        conditions = {name: values.double() for name, values in conditions.items()}
        return errors(
            unet.double(),
            noise_scheduler,
            latents.double(),
            prompt_embeds.double(),
            conditions,
            noise.double(),
            timesteps,
        )

    monkeypatch.setattr(script, "denoising_errors", in_double)
    changes = {"beta_mapo": 1, "learning_rate": 1e-2, "lora_alpha": 8}
    check_against_oracle(script, {**flags, **OPTIMIZER, **changes}, tmp_path)


def test_accumulation_and_scaled_learning_rate_are_the_loop_written_by_hand(script, flags, tmp_path):
    flags.update(OPTIMIZER, gradient_accumulation_steps=3, train_batch_size=2, scale_lr=True, max_train_steps=3)
    check_against_oracle(script, flags, tmp_path, learning_rates=3 * [6e-3], pairs_per_step=6)


def test_kept_ties_label_noise_and_random_crops_are_the_loop_written_by_hand(script, flags, other_world, tmp_path):
    flags.update(OPTIMIZER, dataset_name=other_world / "pairs", label_noise_prob=0.5, random_crop=True)
    flags.update({"dataset_config_name": "whole", "no-remove_ties": True})
    assert len(check_against_oracle(script, flags, tmp_path).index) == 48


def test_second_vae_is_the_loop_written_by_hand(script, flags, other_world, tmp_path):
    flags.update(OPTIMIZER, pretrained_vae_model_name_or_path=other_world / "pipeline" / "vae")
    check_against_oracle(script, flags, tmp_path)


def test_adam_copies_no_gradients(script):
    """PyTorch's default on a GPU does, which takes 9 GiB for the whole UNet; the fused one does not."""
    args = script.parse_args(["--pretrained_model_name_or_path", "sdxl", "--dataset_name", "pairs"])
    optimizer = script.build_optimizer(args, [[torch.nn.Parameter(torch.ones(2))]], pairs_per_step=1)
    assert [group["fused"] for group in optimizer.param_groups] == [True]


def test_eval_metrics_before_training_are_the_ones_computed_by_hand(script, flags):
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


# What must not change the result ------------------------------------------------------------------------------------


# Trains one job after the other on each process, and notes a hash of the weights that this process ended with.
JOBS = """
import gc, hashlib, json, sys
from pathlib import Path

import torch
from accelerate import PartialState
from conftest import load_script, run_words

script, folder = load_script(), Path(__file__).parent
load, rounded, unets = script.load_pipeline, script.round_stochastically, []


def kept(*args):
    pipeline = load(*args)
    unets.append(pipeline.unet)
    return pipeline


def rounded_apart(weights, generator):
    return rounded(weights, generator.manual_seed(generator.initial_seed() + PartialState().process_index))


script.load_pipeline = kept
# One process group for all jobs; a run would destroy it at its end.
script.Accelerator.end_training = lambda accelerator: None
for name, words in json.loads((folder / "jobs.json").read_text()).items():
    script.round_stochastically = rounded_apart if name == "rounded apart" else rounded
    run_words(script, words)
    weights = [weight.detach().view(torch.uint8).numpy() for weight in unets[-1].parameters() if weight.requires_grad]
    digest = hashlib.sha256(b"".join(weight.tobytes() for weight in weights)).hexdigest()
    (folder / f"{name}-{PartialState().process_index}").write_text(digest)
unets.clear()
gc.collect()
PartialState().destroy_process_group()
"""


def launch_jobs(folder, jobs, processes):
    """Train jobs `{name: flags}` one after the other; returns the hash of each job's weights on each process."""
    folder.mkdir()
    (folder / "jobs.py").write_text(JOBS)
    (folder / "jobs.json").write_text(json.dumps({name: command_line(flags) for name, flags in jobs.items()}))
    done = fork({}, processes, wrapper=[folder / "jobs.py"])
    assert done.returncode == 0, done.stderr
    return {name: [(folder / f"{name}-{rank}").read_text() for rank in range(processes)] for name in jobs}


def test_processes_and_accumulation_split_the_same_run_and_keep_all_ranks_equal(script, flags, tmp_path):
    """1 x 4 pairs = 2 processes x 2 = 4 forward passes of 1. Whatever the optimizer, all ranks hold equal weights."""
    flags.update(lr_scheduler="cosine", lr_warmup_steps=2, max_train_steps=6, adam_epsilon=1e-5)
    flags.update(num_validation_pairs=6)
    whole = run(script, flags)
    one_by_one = {"train_batch_size": 1, "gradient_accumulation_steps": 4}
    accumulated = run(script, {**flags, "output_dir": tmp_path / "accumulated", **one_by_one})
    assert_close(whole, accumulated)
    full = {"rank": None, "max_train_steps": 3, "num_validation_pairs": None, "report_to": "none"}
    rounded = {**full, "use_8bit_adam": True, "mixed_precision": "bf16", "full_bf16": True}
    jobs = {"LoRA": {}, "AdamW": full, "8-bit AdamW": {**full, "use_8bit_adam": True}, "full_bf16": rounded}
    # A control: this one must leave the ranks apart.
    jobs["rounded apart"] = rounded
    jobs = {name: {**flags, "train_batch_size": 2, "output_dir": tmp_path / name, **job} for name, job in jobs.items()}
    hashes = launch_jobs(tmp_path / "jobs", jobs, processes=2)
    assert_close(whole, tmp_path / "LoRA")
    apart = [name for name, (first, second) in hashes.items() if first != second]
    assert apart == ["rounded apart"]
    assert len({first for first, _ in hashes.values()}) == len(jobs)
    cosine = [1e-3 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    for folder in (whole, accumulated, tmp_path / "LoRA"):
        assert list(scalars(folder)["lr"].values()) == pytest.approx([0, 5e-4, *cosine])


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("constant_with_warmup", [0, 1 / 3, 2 / 3, 1, 1, 1]),
        ("polynomial", [0, 1 / 3, 2 / 3, 1, 4 / 9, 1 / 9]),
        ("cosine_with_restarts", [0, 1 / 3, 2 / 3, 1, 0.25, 0.75]),
    ],
)
def test_learning_rate_curve_counts_optimizer_steps(script, flags, scheduler, expected):
    flags.update(lr_scheduler=scheduler, lr_warmup_steps=3, max_train_steps=6, train_batch_size=1)
    flags.update(gradient_accumulation_steps=2, lr_power=2, lr_num_cycles=2)
    logged = scalars(run(script, flags))["lr"]
    assert list(logged) == [1, 2, 3, 4, 5, 6]
    # The floor of the polynomial scheduler is 1e-7.
    assert list(logged.values()) == pytest.approx([1e-3 * factor for factor in expected], abs=2e-7)


@pytest.mark.parametrize("rank", [4, None])
def test_gradient_checkpointing_changes_nothing(script, flags, tmp_path, spied, rank):
    flags["rank"] = rank
    plain = run(script, flags)
    checkpointed = run(script, {**flags, "output_dir": tmp_path / "c", "gradient_checkpointing": True})
    assert [pipeline.unet.is_gradient_checkpointing for pipeline in spied] == [False, True]
    assert_same(plain, checkpointed)


@pytest.mark.parametrize(("streaming", "workers"), [(None, 2), (True, 1)])
def test_workers_change_nothing(script, flags, tmp_path, streaming, workers):
    """More than one worker would deal a stream's row groups in another order."""
    flags.update(streaming=streaming, random_crop=True, label_noise_prob=0.3)
    other = {"output_dir": tmp_path / "workers", "dataloader_num_workers": workers}
    assert_same(run(script, flags), run(script, {**flags, **other}))


def test_images_may_pass_the_vae_one_by_one(script, flags, tmp_path, monkeypatch):
    flags["adam_epsilon"] = 1e-5
    sizes, encode = [], AutoencoderKL.encode
    monkeypatch.setattr(AutoencoderKL, "encode", lambda vae, x: sizes.append(len(x)) or encode(vae, x))
    one_by_one = run(script, flags)
    at_once = run(script, {**flags, "output_dir": tmp_path / "v", "vae_encode_batch_size": 8})
    # The first pair is tried before anything is trained.
    assert sizes == [1, 1, *32 * [1], 2, *4 * [8]]
    assert_close(at_once, one_by_one)


def test_each_batch_of_the_next_step_is_read_behind_one_of_this_step(script, flags, monkeypatch):
    """While the GPU computes: all of them at the end would keep it waiting for decoded images."""
    events, read, preference_loss = [], script.StepBatches.read, script.preference_loss
    monkeypatch.setattr(script.StepBatches, "read", lambda batches: events.append("read") or read(batches))
    monkeypatch.setattr(script, "preference_loss", lambda *args: events.append("loss") or preference_loss(*args))

    run(script, {**flags, "train_batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": 3})

    assert events == ["read", "read", *4 * ["loss", "read"], "loss", "loss"]


def test_seed_decides_the_run(script, flags, tmp_path):
    first = run(script, flags)
    assert_same(first, run(script, {**flags, "output_dir": tmp_path / "same"}))
    other = run(script, {**flags, "output_dir": tmp_path / "other", "seed": 1})
    assert curves(first)["loss"] != curves(other)["loss"]
    down = next(name for name in trained(first) if "down" in name)
    assert not torch.equal(trained(first)[down], trained(other)[down])


def test_seed_that_was_not_given_is_drawn_and_reported(script, flags, tmp_path, caplog):
    caplog.set_level("INFO")
    drawn = []
    for name in ("first", "second"):
        caplog.clear()
        run(script, {**flags, "output_dir": tmp_path / name, "seed": None})
        reports = [record.message for record in caplog.records if "--seed" in record.message]
        assert len(reports) == 1
        drawn.append(int(re.search(r"--seed (\d+)", reports[0]).group(1)))
    assert drawn[0] != drawn[1]
    assert_same(tmp_path / "first", run(script, {**flags, "seed": drawn[0]}))


def test_gradients_are_not_clipped_at_norm_0_or_inf(script, flags, tmp_path):
    """As with a norm that no gradient reaches, and unlike a run whose gradients are clipped."""
    outs = []
    for norm in (0, "inf", 1e6):
        outs.append(
            run(script, {**flags, "adam_epsilon": 1.0, "max_grad_norm": norm, "output_dir": tmp_path / str(norm)})
        )
    clipped = run(script, {**flags, "adam_epsilon": 1.0, "max_grad_norm": 1e-3})

    assert_same(outs[0], outs[1])
    assert_same(outs[0], outs[2])
    weights, others = trained(outs[0]), trained(clipped)
    assert any(not torch.equal(weight, others[name]) for name, weight in weights.items())


def test_epochs_give_the_number_of_steps(script, flags):
    flags.update(max_train_steps=None, num_train_epochs=2, train_batch_size=20)
    assert list(curves(run(script, flags))["loss"]) == [1, 2, 3, 4, 5]
