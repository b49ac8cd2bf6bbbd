"""Killed, interrupted and resumed runs against runs that never were, bit for bit."""

import json
import math
import re
import shutil
import signal
from functools import partial
from pathlib import Path

import cpu_cluster
import pytest
import torch
from conftest import SCRIPT, also, command_line, run, scalars
from cpu_cluster import Fault, install, killed, raising, signalled, with_faults
from diffusers import UNet2DConditionModel
from small_world import build_pipeline, draw_pairs
from test_faults import STOPPED, VALIDATION, checkpoints, content, run_ranks, run_ranks_well, run_to_status
from test_training import LORA_WEIGHTS, assert_close, assert_equal, assert_same, curves, trained


STATE = "mapo_state.json"
# What a run draws and schedules, none of it a default.
DRAWS = {
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "random_crop": True,
    "label_noise_prob": 0.3,
}
STREAMED = {"streaming": True, "shuffle_shards": 2}


def state_of(folder):
    """The state in a checkpoint, without the flags and without the run's id, which is another in another folder."""
    state = json.loads((folder / STATE).read_text())
    del state["settings"], state["run_id"]
    return state


def resumed(script, flags, checkpoint, folder):
    return run(script, {**flags, "output_dir": folder, "resume_from_checkpoint": checkpoint})


def assert_continues(whole, folder, step):
    """`folder` made the steps after `step` as `whole` made them, and no others."""
    expected = {name: {s: v for s, v in values.items() if s > step} for name, values in curves(whole).items()}
    assert curves(folder) == expected
    assert len(expected["loss"]) > 0
    assert_equal(trained(whole), trained(folder))


# Resumed ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        also({"train_batch_size": 5, "use_8bit_adam": True, **DRAWS}, [4]),
        ({"train_batch_size": 2, "gradient_accumulation_steps": 2, "rank": None}, [5, 6, 7]),
        also({"mixed_precision": "bf16", "gradient_checkpointing": True, "max_train_steps": 4}, [2]),
        also({"cache_latents": True, "dataloader_num_workers": 2, "max_train_steps": 4}, [2]),
        also({**STREAMED, **DRAWS, "num_validation_pairs": 3}, [5, 6]),
        ({**STREAMED, "gradient_accumulation_steps": 2, "dataloader_num_workers": 2, "max_train_steps": 4}, [2]),
    ],
    ids=["batch-over-epochs", "accumulation", "bf16", "cache-workers", "stream", "stream-workers"],
)
def test_resumed_run_is_the_uninterrupted_one(script, flags, tmp_path, changes, steps):
    """Before, at and after the end of an epoch of 24 pairs (stream: 21), between two epochs."""
    flags.update({"max_train_samples": 24, "max_train_steps": 8, "checkpointing_steps": 1, **changes})
    whole = run(script, flags)
    for step in steps:
        folder = resumed(script, flags, whole / f"checkpoint-{step}", tmp_path / f"from-{step}")
        assert_continues(whole, folder, step)


def test_resumed_run_starts_a_new_window_of_log_values(script, flags, tmp_path):
    flags.update(max_train_steps=8, checkpointing_steps=1)
    each = scalars(run(script, {**flags, "output_dir": tmp_path / "each"}))
    whole = run(script, {**flags, "logging_steps": 4})
    for step in (4, 6):
        folder = tmp_path / f"from-{step}"
        logged = scalars(resumed(script, {**flags, "logging_steps": 4}, whole / f"checkpoint-{step}", folder))
        for name in script.METRICS:
            values = [each[name][n] for n in range(step + 1, 9)]
            assert logged[name] == pytest.approx({8: sum(values) / len(values)}, rel=1e-6), name


@pytest.mark.parametrize("changes", [also({}), STREAMED], ids=["map", "stream"])
def test_two_restarts_in_a_row(script, flags, tmp_path, changes):
    flags.update(checkpointing_steps=2, max_train_steps=8, max_train_samples=24, **changes)
    whole = run(script, flags)
    once = resumed(script, flags, whole / "checkpoint-2", tmp_path / "once")
    twice = resumed(script, flags, once / "checkpoint-4", tmp_path / "twice")
    assert_continues(whole, twice, 4)
    assert state_of(whole / "checkpoint-8") == state_of(twice / "checkpoint-8")


@pytest.mark.parametrize(
    "changes",
    [
        also({}),
        STREAMED,
        also({"dataloader_num_workers": 2}),
        also({**STREAMED, "dataloader_num_workers": 2}),
        also({**STREAMED, "gradient_accumulation_steps": 2}),
    ],
    ids=["map", "stream", "map-workers", "stream-workers", "stream-accumulation"],
)
def test_run_resumes_on_any_number_of_processes(script, flags, tmp_path, changes):
    """
    One process, then two, then one again, over the end of an epoch. The pairs stay the same in the same order; the
    losses differ by rounding, since each process sums up half of a batch. Adam's epsilon is raised because Adam
    divides by gradients that may be no larger than their rounding.
    """
    flags.update(changes, lr_scheduler="cosine", lr_warmup_steps=2, adam_epsilon=1e-5, num_validation_pairs=4)
    flags.update(checkpointing_steps=3, max_train_steps=9, max_train_samples=24)
    whole = run(script, flags)
    halves = {**flags, "train_batch_size": 2, "output_dir": tmp_path / "two"}
    two = run_ranks_well({**halves, "resume_from_checkpoint": whole / "checkpoint-3"})
    assert_close(two, whole, steps=range(4, 10))
    one = resumed(script, flags, two / "checkpoint-6", tmp_path / "one")
    assert_close(one, whole, steps=range(7, 10))
    states = [state_of(folder / "checkpoint-9") for folder in (whole, two, one)]
    assert len({state["pairs_seen"] for state in states}) == 1


@pytest.mark.matrix
@pytest.mark.parametrize("changes", [STREAMED, {}], ids=["stream", "map"])
@pytest.mark.parametrize("workers", [0, 2])
def test_run_that_began_on_two_processes_resumes_on_one(script, flags, tmp_path, changes, workers):
    """A stream's lanes are those of the processes and workers that it began with."""
    flags.update(changes, adam_epsilon=1e-5, dataloader_num_workers=workers, checkpointing_steps=3)
    flags.update(max_train_steps=8, max_train_samples=24, train_batch_size=2)
    whole = run_ranks_well({**flags, "output_dir": tmp_path / "two"})
    flags.update(train_batch_size=4)
    assert_close(resumed(script, flags, whole / "checkpoint-3", tmp_path / "one"), whole, steps=range(4, 9))


# Killed -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 4, "use_8bit_adam": True, "lr_scheduler": "cosine", "lr_warmup_steps": 2, **STREAMED},
        also({"rank": None, "use_8bit_adam": True, "learning_rate": 1e-4}),
        also({"dataloader_num_workers": 2, "random_crop": True}),
    ],
    ids=["lora-8bit", "full-8bit", "workers"],
)
def test_killed_and_resumed_run_is_the_uninterrupted_one(script, flags, tmp_path, changes):
    """Killed within step 5, between the validations of steps 3 and 6."""
    flags.update(checkpointing_steps=4, max_train_steps=6, validation_steps=3, **VALIDATION, **changes)
    whole = run(script, {**flags, "output_dir": tmp_path / "whole"})
    statuses, outputs = run_ranks(flags, {0: [Fault("step", (5,), killed)]}, size=1)
    assert statuses == [-signal.SIGKILL], outputs
    out = flags["output_dir"]
    assert checkpoints(out) == [4] and not (out / LORA_WEIGHTS).exists() and not (out / "unet").exists()
    run(script, {**flags, "resume_from_checkpoint": "latest"})
    assert_same(whole, out)
    grid = Path("validation", "step-000006.png")
    assert (out / grid).read_bytes() == (whole / grid).read_bytes()


# With other flags ---------------------------------------------------------------------------------------------------
SECOND = {"learning_rate": 2e-3, "adam_beta1": 0.5, "adam_beta2": 0.9, "adam_weight_decay": 0.3, "adam_epsilon": 1e-4}


def test_states_of_an_adam_that_was_not_fused_stay_so(script, flags, tmp_path):
    """Their step counters lie on the CPU, where a fused one on a GPU cannot read them."""
    folder = run(script, {**flags, "checkpointing_steps": 2}) / "checkpoint-2"
    states = torch.load(folder / "optimizer.bin")
    states["param_groups"][0]["fused"] = None
    torch.save(states, folder / "optimizer.bin")
    resumed = run(script, {**flags, "resume_from_checkpoint": folder, "output_dir": tmp_path / "resumed"})
    assert torch.load(resumed / "checkpoint-4" / "optimizer.bin")["param_groups"][0]["fused"] is None


@pytest.mark.parametrize("changes", [{}, {"rank": None, "use_8bit_adam": True}], ids=["AdamW", "8-bit"])
def test_flags_hold_from_the_resumed_step_on(script, flags, tmp_path, monkeypatch, changes):
    """To the bit what a run does whose optimizer and objective are changed by hand behind step 2."""
    flags.update(changes, checkpointing_steps=2)
    step = script.train_step

    def changed(run, *args):
        if run.progress.step == 2:
            run.args.beta_mapo = 1.0
            betas, eps = (SECOND["adam_beta1"], SECOND["adam_beta2"]), SECOND["adam_epsilon"]
            for group in run.optimizer.param_groups:
                group.update(lr=2e-3, betas=betas, eps=eps, weight_decay=SECOND["adam_weight_decay"])
            run.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(run.optimizer, factor=1)
        return step(run, *args)

    with monkeypatch.context() as patch:
        patch.setattr(script, "train_step", changed)
        whole = run(script, flags)
    flags.update(SECOND, beta_mapo=1)
    assert_continues(whole, resumed(script, flags, whole / "checkpoint-2", tmp_path / "second"), 2)


@pytest.mark.parametrize(
    "schedule", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
)
def test_schedule_can_start_at_any_step(script, flags, schedule):
    flags.update(lr_scheduler=schedule, lr_warmup_steps=3, lr_num_cycles=2, lr_power=2, max_train_steps=8)
    args = script.parse_args(command_line(flags))

    def rates(step):
        optimizer = script.build_optimizer(args, [torch.nn.Parameter(torch.zeros(1))], 4)
        scheduler = script.build_schedule(args, optimizer, step)
        for _ in range(step, 8):
            yield optimizer.param_groups[0]["lr"]
            optimizer.step()
            scheduler.step()

    whole = list(rates(0))
    assert all(list(rates(step)) == whole[step:] for step in range(8))
    assert (len(set(whole)) == 1) == (schedule == "constant")


def test_rates_of_a_prolonged_run_are_those_of_a_longer_one(script, flags, tmp_path):
    """Those of the cosine over 6 steps, from the middle on."""
    flags.update(lr_scheduler="cosine", lr_warmup_steps=1)
    first = run(script, {**flags, "max_train_steps": 3})
    flags.update(max_train_steps=6)
    last = resumed(script, flags, first / "checkpoint-3", tmp_path / "last")
    rates = [1e-3 * (1 + math.cos(math.pi * step / 5)) / 2 for step in range(2, 5)]
    assert scalars(last)["lr"] == pytest.approx(dict(zip((4, 5, 6), rates)))


DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true"}
SHARDED = {
    "zero2": {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
    "fsdp2": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "BasicTransformerBlock,ResnetBlock2D",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    },
}


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["zero2", "zero3", "fsdp2"])
def test_flags_hold_in_sharded_optimizers(script, flags, tmp_path, kind):
    """As on one process, with the schedule that asks the optimizer for its rate."""
    flags.update(lr_scheduler="polynomial", lr_warmup_steps=1, adam_epsilon=1e-3, max_train_steps=2)
    second = {**SECOND, "max_train_steps": 4, "lr_power": 2, "resume_from_checkpoint": "latest"}
    whole = {**flags, "output_dir": tmp_path / "whole"}
    run(script, whole)
    run(script, {**whole, **second})
    flags["train_batch_size"] = 2
    for changes in ({}, second):
        words = [*with_faults({}), SCRIPT, *command_line({**flags, **changes})]
        statuses, outputs = cpu_cluster.run_ranks(words, env={"ACCELERATE_USE_CPU": "false", **SHARDED[kind]})
        assert statuses == [0, 0], outputs
    settings = json.loads((flags["output_dir"] / "checkpoint-4" / STATE).read_text())["settings"]
    assert settings["sharding"] != "none"
    assert_close(flags["output_dir"], tmp_path / "whole")


def test_differences_of_flags_are_refused_or_reported(script, flags, tmp_path, caplog):
    """A seed that was drawn is taken over."""
    flags.update(max_train_steps=1, seed=None)
    checkpoint = run(script, flags) / "checkpoint-1"
    flags.update(resume_from_checkpoint=checkpoint, max_train_steps=2, output_dir=tmp_path / "resumed")
    fixed = {"rank": 2, "use_8bit_adam": True, "streaming": True, "shuffle_shards": 9, "seed": 1}
    fixed |= {"lora_alpha": 2.0, "train_text_encoder": True}
    for name, value in fixed.items():
        with pytest.raises(script.TrainingError, match=f"--resume_from_checkpoint: {name} is {value}, but"):
            run(script, {**flags, name: value})

    def reported(changes):
        caplog.clear()
        shutil.rmtree(run(script, {**flags, **changes}))
        messages = [record.message for record in caplog.records if record.levelname == "WARNING"]
        return set(re.findall(r"--resume_from_checkpoint: (\w+) changed from .* to .*\.", "\n".join(messages)))

    assert not reported({})
    assert reported(SECOND) == set(SECOND)
    build_pipeline(tmp_path / "pipeline", seed=1)
    draw_pairs(tmp_path / "pairs", seed=1)
    changes = {
        "pretrained_model_name_or_path": tmp_path / "pipeline",
        "dataset_name": tmp_path / "pairs",
        "max_train_samples": 40,
        "num_validation_pairs": 4,
        "resolution": 32,
        "learning_rate": 1e-4,
        "beta_mapo": 0.5,
    }
    assert reported({**changes, "no-remove_ties": True}) == {*changes, "remove_ties"}


# Prolonged ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes",
    [
        also({}),
        {"rank": None, "use_8bit_adam": True, "gradient_accumulation_steps": 2, "train_batch_size": 1, **STREAMED},
    ],
    ids=["LoRA", "8-bit-stream"],
)
def test_prolonged_run_is_the_longer_one(script, flags, tmp_path, changes):
    """5 steps and 5 more are 10: the last step has a checkpoint, too."""
    flags.update(changes, lr_warmup_steps=3, lr_scheduler="constant_with_warmup", max_train_samples=24)
    longer = run(script, {**flags, "max_train_steps": 10, "output_dir": tmp_path / "longer"})
    out = run(script, {**flags, "max_train_steps": 5})
    before = trained(out)
    assert checkpoints(out) == [5]
    run(script, {**flags, "max_train_steps": 10, "resume_from_checkpoint": "latest"})
    assert checkpoints(out) == [5, 10]
    assert_same(longer, out)
    assert any(not torch.equal(before[name], weight) for name, weight in trained(out).items())


def test_finished_run_is_validated_again(script, flags, tmp_path):
    whole = run(script, {**flags, "num_validation_pairs": 4})
    again = resumed(script, {**flags, "num_validation_pairs": 4}, whole / "checkpoint-4", tmp_path / "again")
    assert_equal(trained(whole), trained(again))
    assert "loss" not in scalars(again) and (again / "README.md").exists()
    assert scalars(again)["eval_loss"] == {4: scalars(whole)["eval_loss"][4]}


def test_checkpoint_of_a_later_step_is_refused(script, flags, spied):
    run(script, flags)
    with pytest.raises(script.TrainingError, match=r"--max_train_steps 3\b.*\b4\b"):
        run(script, {**flags, "resume_from_checkpoint": "latest", "max_train_steps": 3})
    assert len(spied) == 1


@pytest.mark.parametrize(("every", "number"), [(3, None), (2, None), (2, signal.SIGTERM)])
def test_checkpoint_of_the_last_step_is_written_once(script, flags, monkeypatch, every, number):
    """Its number may be one of --checkpointing_steps, and a signal may come in it."""
    saved, save = [], script.save_checkpoint
    monkeypatch.setattr(script, "save_checkpoint", lambda run: saved.append(run.progress.step) or save(run))
    if number:
        install(Fault("step", (4,), partial(signalled, number)), monkeypatch.setattr)
    assert run_to_status(script, {**flags, "checkpointing_steps": every}) == (STOPPED if number else 0)
    assert saved == [every, 4]


def test_last_checkpoint_that_fails_costs_no_weights(script, flags, tmp_path, monkeypatch):
    """It may be several times as large as they are."""
    whole = run(script, {**flags, "output_dir": tmp_path / "whole"})
    full = partial(raising, OSError(28, "No space left on device"))
    install(Fault("checkpoint", (1,), full), monkeypatch.setattr)
    with pytest.raises(script.TrainingError, match="checkpoint-4 could not be written"):
        run(script, flags)
    assert checkpoints(flags["output_dir"]) == []
    assert_equal(trained(whole), trained(flags["output_dir"]))


# Found --------------------------------------------------------------------------------------------------------------
def test_checkpoint_is_found(script, flags):
    """By number: in the order of names checkpoint-5 would come after checkpoint-10."""
    flags.update(checkpointing_steps=5, max_train_steps=10, train_batch_size=1)
    out = run(script, flags)
    (out / "checkpoint-99").mkdir()
    for asked in (out / "checkpoint-10", "checkpoint-10", "latest"):
        shutil.rmtree(out / "logs")
        run(script, {**flags, "resume_from_checkpoint": asked, "max_train_steps": 11})
        assert list(scalars(out)["loss"]) == [11]
        shutil.rmtree(out / "checkpoint-11")


def test_latest_of_none_starts_a_new_run_and_a_missing_checkpoint_is_refused(script, flags, tmp_path):
    out = run(script, {**flags, "resume_from_checkpoint": "latest"})
    assert_same(out, run(script, {**flags, "output_dir": tmp_path / "new"}))
    (tmp_path / "folder").mkdir()
    for asked in ("checkpoint-9", tmp_path / "folder"):
        with pytest.raises(script.TrainingError, match="--resume_from_checkpoint .* is not a complete checkpoint"):
            run(script, {**flags, "resume_from_checkpoint": asked})


@pytest.mark.parametrize("file", ["optimizer.bin", LORA_WEIGHTS])
def test_damaged_checkpoint_is_one_sentence(script, flags, file):
    folder = run(script, {**flags, "max_train_steps": 2}) / "checkpoint-2"
    (folder / file).write_bytes((folder / file).read_bytes()[:100])
    with pytest.raises(script.TrainingError, match=f"--resume_from_checkpoint {folder} cannot be loaded: ") as error:
        run(script, {**flags, "resume_from_checkpoint": folder})
    assert "\n" not in str(error.value)


# Other runs in the folder -------------------------------------------------------------------------------------------
def refused(script, flags, folder, name):
    """The run does not start, says why and what to do, and changes nothing in the folder."""
    before = content(folder)
    with pytest.raises(script.TrainingError) as error:
        run(script, {**flags, "output_dir": folder})
    for part in (f"--output_dir {folder} contains {name} of another run", "--resume_from_checkpoint latest"):
        assert part in str(error.value)
    assert content(folder) == before


@pytest.mark.parametrize("rank", [4, None], ids=["lora", "full"])
def test_new_run_in_the_folder_of_another_is_refused(script, flags, spied, rank):
    """Before any weight is loaded, and by its result alone, too."""
    flags["rank"] = rank
    out = run(script, flags)
    refused(script, {**flags, "seed": 1}, out, "checkpoint-4")
    (out / "checkpoint-4" / STATE).unlink()
    with pytest.raises(script.TrainingError, match=f"contains {'unet' if rank is None else LORA_WEIGHTS} of another"):
        run(script, flags)
    assert len(spied) == 1


def test_new_run_starts_where_no_other_got_anywhere(script, flags):
    """A run that was killed early leaves its logs, and a checkpoint without a state."""
    out = run(script, flags)
    (out / "checkpoint-4" / STATE).unlink()
    (out / LORA_WEIGHTS).unlink()
    run(script, {**flags, "seed": 1})
    assert checkpoints(out) == [4]


def test_resuming_from_an_older_checkpoint_needs_another_folder(script, flags, tmp_path):
    """Not both lines of the run may go on in one folder."""
    whole = run(script, {**flags, "checkpointing_steps": 2})
    resume = {**flags, "resume_from_checkpoint": whole / "checkpoint-2"}
    refused(script, resume, whole, "checkpoint-4")
    assert_continues(whole, run(script, {**resume, "output_dir": tmp_path / "branch"}), 2)


def test_resuming_into_the_folder_of_another_run_is_refused(script, flags, tmp_path):
    """Whatever its steps."""
    other = run(script, {**flags, "max_train_steps": 1})
    out = run(script, {**flags, "max_train_steps": 2, "output_dir": tmp_path / "mine"})
    refused(script, {**flags, "resume_from_checkpoint": out / "checkpoint-2"}, other, "checkpoint-1")


def test_run_has_an_id_until_it_goes_on_in_another_folder(script, flags, tmp_path):
    flags["checkpointing_steps"] = 2
    out = run(script, flags)
    run(script, {**flags, "resume_from_checkpoint": "latest", "max_train_steps": 5})
    branch = resumed(script, flags, out / "checkpoint-2", tmp_path / "branch")
    run(script, {**flags, "resume_from_checkpoint": "latest", "max_train_steps": 6, "output_dir": branch})
    folders = [[out / f"checkpoint-{step}" for step in (2, 4, 5)], [branch / f"checkpoint-{step}" for step in (4, 6)]]
    ids = [{json.loads((path / STATE).read_text())["run_id"] for path in paths} for paths in folders]
    assert [len(drawn) for drawn in ids] == [1, 1] and ids[0] != ids[1]
    assert all(re.fullmatch("[0-9a-f]{8}", run_id) for drawn in ids for run_id in drawn)


# Written ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rank", [4, None], ids=["lora", "full"])
def test_checkpoint_holds_a_pipeline_weights_and_one_state(script, flags, rank):
    """Written at the end of a step, whatever its number of forward passes."""
    flags.update(rank=rank, checkpointing_steps=4, gradient_accumulation_steps=2, train_batch_size=2)
    out = run(script, flags)
    folder = out / "checkpoint-4"
    unet = {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    states = {"optimizer.bin", "random_states_0.pkl", STATE}
    assert files == states | ({LORA_WEIGHTS} if rank else unet)
    assert_equal(trained(folder), trained(out))
    state = state_of(folder)
    assert [state[name] for name in ("step", "pairs_seen", "rows_read", "rows_bad")] == [4, 16, 16, 0]
    if rank is None:
        assert UNet2DConditionModel.from_pretrained(folder, subfolder="unet").dtype == torch.float32


@pytest.mark.parametrize(("limit", "kept"), [(None, [1, 2, 3, 4]), (1, [4]), (2, [3, 4])])
def test_newest_checkpoints_are_kept(script, flags, limit, kept):
    out = run(script, {**flags, "checkpointing_steps": 1, "checkpoints_total_limit": limit})
    others = [
        ".lock",
        "README.md",
        "logs",
        "pytorch_lora_weights.safetensors",
        "pytorch_lora_weights_kohya.safetensors",
    ]
    assert checkpoints(out) == kept
    assert sorted(path.name for path in out.iterdir() if not path.name.startswith("checkpoint-")) == others


def test_old_checkpoint_that_cannot_be_removed_ends_no_run(script, flags, monkeypatch, caplog):
    def refuse(folder, ignore_errors=False):
        if not ignore_errors:
            raise OSError(16, "Device or resource busy", str(folder))

    monkeypatch.setattr(script.shutil, "rmtree", refuse)

    out = run(script, {**flags, "checkpointing_steps": 1, "checkpoints_total_limit": 1, "max_train_steps": 2})

    assert f"--checkpoints_total_limit: {out / 'checkpoint-1'} cannot be removed" in caplog.text
    assert (out / "checkpoint-2" / STATE).exists()


def test_failed_save_leaves_the_older_checkpoint_alone(script, flags, tmp_path, monkeypatch):
    """Then a folder without its state is passed over, and completed when the run comes by again."""
    flags.update(checkpointing_steps=2, checkpoints_total_limit=1, max_train_steps=5)
    whole = run(script, {**flags, "output_dir": tmp_path / "whole"})
    full = partial(raising, OSError(28, "No space left on device"))
    with monkeypatch.context() as patch:
        install(Fault("checkpoint", (2,), full), patch.setattr)
        with pytest.raises(script.TrainingError, match="checkpoint-4 could not be written; older .*No space"):
            run(script, flags)
    out = flags["output_dir"]
    assert (out / "checkpoint-4").exists() and checkpoints(out) == [2]
    run(script, {**flags, "resume_from_checkpoint": "latest"})
    assert_same(whole, out)
    assert checkpoints(out) == [5]


def test_interrupted_pruning_leaves_only_whole_checkpoints(script, flags, tmp_path, monkeypatch):
    flags.update(checkpointing_steps=2, checkpoints_total_limit=1, max_train_steps=5)
    whole = run(script, {**flags, "output_dir": tmp_path / "whole"})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", partial(raising, KeyboardInterrupt()))
        run(script, flags)
    out = flags["output_dir"]
    assert (out / "checkpoint-2").exists() and checkpoints(out) == [4]
    run(script, {**flags, "resume_from_checkpoint": "latest"})
    assert_same(whole, out)
