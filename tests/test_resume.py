"""Resuming changes nothing: on any split of a step's pairs, with changed flags, and after a kill."""

import re
import signal
from pathlib import Path

import cpu_cluster
import pytest
import torch
from conftest import command_line, matrix, run, scalars
from cpu_cluster import Fault, killed
from runs import (
    LORA_WEIGHTS,
    VALIDATION,
    assert_close,
    assert_continues,
    assert_equal,
    assert_one_error,
    assert_same,
    checkpoints,
    differ,
    read_state,
    resume,
    run_ranks,
    run_ranks_successfully,
    run_sharded,
    train_error,
    trained,
)
from small_world import build_pipeline, draw_pairs


RANDOM = {"random_crop": True, "label_noise_prob": 0.3}
WARMUP = {"lr_scheduler": "cosine", "lr_warmup_steps": 2}
STREAMED = {"streaming": True, "shuffle_shards": 2}


# The same flags -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"train_batch_size": 2, "gradient_accumulation_steps": 2, "rank": None}, [5, 6, 7]),
        ({**STREAMED, "gradient_accumulation_steps": 2, "dataloader_num_workers": 2, "max_train_steps": 4}, [2]),
        matrix({**RANDOM, **WARMUP, "train_batch_size": 5, "use_8bit_adam": True}, [4]),
        matrix({"mixed_precision": "bf16", "gradient_checkpointing": True, "max_train_steps": 4}, [2]),
        matrix({"cache_latents": True, "dataloader_num_workers": 2, "max_train_steps": 4}, [2]),
        matrix({**STREAMED, **RANDOM, **WARMUP, "num_validation_pairs": 3}, [5, 6]),
    ],
    ids=["accumulation", "stream-workers", "batch-over-epochs", "bf16", "cache-workers", "stream"],
)
def test_resumed_run_equals_the_uninterrupted_one(script, flags, tmp_path, changes, steps):
    """Before, at and after the end of an epoch of 24 pairs (stream: 21), and between two epochs."""
    flags.update({"max_train_samples": 24, "max_train_steps": 8, "checkpointing_steps": 1, **changes})
    uninterrupted = run(script, flags)

    last = f"checkpoint-{flags['max_train_steps']}"
    expected = read_state(uninterrupted / last)
    for step in steps:
        resumed = resume(script, flags, uninterrupted / f"checkpoint-{step}", tmp_path / f"from-{step}")
        assert_continues(uninterrupted, resumed, step)
        state = read_state(resumed / last)
        for name in expected.keys() - {"settings", "run_id"}:  # these depend on the output folder
            assert state[name] == expected[name], name


def test_means_of_a_resumed_run_start_at_the_checkpoint(script, flags, tmp_path):
    flags.update(max_train_steps=8, checkpointing_steps=6)
    every_step = scalars(run(script, {**flags, "output_dir": tmp_path / "every step"}))
    flags.update(logging_steps=4)
    uninterrupted = run(script, flags)

    logged = scalars(resume(script, flags, uninterrupted / "checkpoint-6", tmp_path / "resumed"))

    for name in script.METRICS:
        mean = (every_step[name][7] + every_step[name][8]) / 2
        assert logged[name] == pytest.approx({8: mean}, rel=1e-6), name


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 4, "use_8bit_adam": True, **WARMUP, **STREAMED},
        matrix({"rank": None, "use_8bit_adam": True, "learning_rate": 1e-4}),
    ],
    ids=["LoRA, stream", "full"],
)
def test_killed_run_resumes_exactly(script, flags, tmp_path, changes):
    """Killed in step 5, between the validations of steps 3 and 6."""
    flags.update(changes, checkpointing_steps=4, max_train_steps=6, validation_steps=3, **VALIDATION)
    uninterrupted = run(script, {**flags, "output_dir": tmp_path / "uninterrupted"})
    out = flags["output_dir"]

    statuses, outputs = run_ranks(flags, {0: [Fault("step", (5,), killed)]}, size=1)
    kept = checkpoints(out)
    has_results = (out / LORA_WEIGHTS).exists() or (out / "unet").exists()
    run(script, {**flags, "resume_from_checkpoint": "latest"})

    assert statuses == [-signal.SIGKILL], outputs
    assert kept == [4]
    assert not has_results
    assert_same(uninterrupted, out)
    images = Path("validation", "step-000006.png")
    assert (out / images).read_bytes() == (uninterrupted / images).read_bytes()


def test_killed_loader_worker_stops_the_run_with_a_checkpoint(script, flags, tmp_path):
    """As when memory runs out. The step in progress is completed."""
    flags.update(max_train_steps=6)
    uninterrupted = run(script, {**flags, "output_dir": tmp_path / "uninterrupted"})
    flags.update(dataloader_num_workers=2)

    statuses, outputs = run_ranks(flags, {0: [Fault("step", (3,), cpu_cluster.workers_killed)]}, size=1)
    kept = checkpoints(flags["output_dir"])
    resumed = run(script, {**flags, "resume_from_checkpoint": "latest"})

    assert_one_error(statuses, outputs, "cannot be read any further (the checkpoint of step ")
    # PyTorch's error depends on whether the worker was sending a batch.
    assert re.search("DataLoader worker|ConnectionResetError|EOFError", outputs[0])
    assert len(kept) == 1
    assert_equal(trained(resumed), trained(uninterrupted))


# Another split of the pairs of a step -------------------------------------------------------------------------------
# Adam's epsilon is raised in these tests. Sums are rounded in another order, and Adam divides by gradients that may be
# as small as their rounding errors.
ONE_BATCH = {"train_batch_size": 4, "gradient_accumulation_steps": 1}
TWO_BATCHES = {"train_batch_size": 2, "gradient_accumulation_steps": 2}
FOUR_BATCHES = {"train_batch_size": 1, "gradient_accumulation_steps": 4}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (ONE_BATCH, TWO_BATCHES),
        (FOUR_BATCHES, TWO_BATCHES),
        matrix(TWO_BATCHES, ONE_BATCH),
        matrix(TWO_BATCHES, FOUR_BATCHES),
    ],
    ids=["1 to 2", "4 to 2", "2 to 1", "2 to 4"],
)
def test_accumulation_can_change_between_runs(script, flags, tmp_path, before, after):
    """Checkpoints contain accelerate's counter of batches, which here is in the middle of a step afterwards."""
    flags.update(max_train_steps=6, checkpointing_steps=3, adam_epsilon=1e-5)
    uninterrupted = run(script, {**flags, **after, "output_dir": tmp_path / "uninterrupted"})

    run(script, {**flags, **before, "max_train_steps": 3})
    resumed = run(script, {**flags, **after, "resume_from_checkpoint": "latest"})

    assert_close(resumed, uninterrupted)


@pytest.mark.parametrize(
    "changes",
    [STREAMED, matrix({"dataloader_num_workers": 2}), matrix({**STREAMED, "dataloader_num_workers": 2})],
    ids=["stream", "map-workers", "stream-workers"],
)
def test_run_resumes_on_two_processes_and_on_one_again(script, flags, tmp_path, changes):
    """Over the end of an epoch."""
    flags.update(changes, **WARMUP, adam_epsilon=1e-5, num_validation_pairs=4)
    flags.update(checkpointing_steps=3, max_train_steps=9, max_train_samples=24)
    uninterrupted = run(script, flags)

    on_two = {**flags, "train_batch_size": 2, "output_dir": tmp_path / "two"}
    two = run_ranks_successfully({**on_two, "resume_from_checkpoint": uninterrupted / "checkpoint-3"})
    one = resume(script, flags, two / "checkpoint-6", tmp_path / "one")

    assert_close(two, uninterrupted, steps=range(4, 10))
    assert_close(one, uninterrupted, steps=range(7, 10))
    pairs_seen = [read_state(folder / "checkpoint-9")["pairs_seen"] for folder in (uninterrupted, two, one)]
    assert len(set(pairs_seen)) == 1


@pytest.mark.matrix
@pytest.mark.parametrize("workers", [0, 2])
def test_stream_that_began_on_two_processes_resumes_on_one(script, flags, tmp_path, workers):
    """The lanes of a stream are those of the processes and workers with which it began."""
    flags.update(STREAMED, adam_epsilon=1e-5, dataloader_num_workers=workers, checkpointing_steps=3)
    flags.update(max_train_steps=8, max_train_samples=24)
    two = run_ranks_successfully({**flags, "train_batch_size": 2, "output_dir": tmp_path / "two"})

    one = resume(script, flags, two / "checkpoint-3", tmp_path / "one")

    assert_close(one, two, steps=range(4, 9))


def test_epochs_end_after_the_same_pairs_with_larger_batches(script, flags):
    """An epoch of 48 pairs: 4 pairs in each of 6 steps, and then 8 pairs in each of 3."""
    run(script, {**flags, "max_train_steps": 6})

    flags.update(max_train_steps=None, train_batch_size=8, resume_from_checkpoint="latest")
    out = run(script, flags)

    assert read_state(out / "checkpoint-9")["pairs_seen"] == 48


# Other flags --------------------------------------------------------------------------------------------------------
OPTIMIZER = {
    "learning_rate": 2e-3,
    "adam_beta1": 0.5,
    "adam_beta2": 0.9,
    "adam_weight_decay": 0.3,
    "adam_epsilon": 1e-4,
}


@pytest.mark.parametrize("changes", [{}, {"rank": None, "use_8bit_adam": True}], ids=["AdamW", "8-bit"])
def test_changed_flags_take_effect_when_the_run_resumes(script, flags, tmp_path, monkeypatch, changes):
    """Like a run whose optimizer and objective are changed by hand after step 2, bit for bit."""
    flags.update(changes, checkpointing_steps=2)
    train_step = script.train_step

    def change_after_step_2(run, *args):
        if run.progress.step == 2:
            run.args.beta_mapo = 1.0
            for group in run.optimizer.param_groups:
                group["lr"] = OPTIMIZER["learning_rate"]
                group["betas"] = (OPTIMIZER["adam_beta1"], OPTIMIZER["adam_beta2"])
                group["eps"] = OPTIMIZER["adam_epsilon"]
                group["weight_decay"] = OPTIMIZER["adam_weight_decay"]
            run.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(run.optimizer, factor=1)
        return train_step(run, *args)

    with monkeypatch.context() as patch:
        patch.setattr(script, "train_step", change_after_step_2)
        changed_by_hand = run(script, flags)
    flags.update(OPTIMIZER, beta_mapo=1)
    resumed = resume(script, flags, changed_by_hand / "checkpoint-2", tmp_path / "resumed")

    assert_continues(changed_by_hand, resumed, 2)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["zero2", "zero3", "fsdp2"])
def test_changed_flags_and_accumulation_take_effect_in_sharded_runs(script, flags, tmp_path, kind):
    """As on one process. The polynomial schedule asks the optimizer for its learning rate."""
    flags.update(lr_scheduler="polynomial", lr_warmup_steps=1, adam_epsilon=1e-3, max_train_steps=2)
    changes = {**OPTIMIZER, "max_train_steps": 4, "lr_power": 2, "resume_from_checkpoint": "latest"}
    one_process = {**flags, "output_dir": tmp_path / "one"}
    run(script, one_process)
    run(script, {**one_process, **changes})

    run_sharded({**flags, "train_batch_size": 2}, kind)
    sharded = run_sharded({**flags, **changes, "train_batch_size": 1, "gradient_accumulation_steps": 2}, kind)

    assert read_state(sharded / "checkpoint-4")["settings"]["sharding"] != "none"
    assert_close(sharded, tmp_path / "one")


def test_optimizer_that_was_not_fused_stays_so(script, flags, tmp_path):
    """Its step counters are on the CPU, where a fused one on a GPU could not read them."""
    checkpoint = run(script, {**flags, "checkpointing_steps": 2}) / "checkpoint-2"
    state = torch.load(checkpoint / "optimizer.bin")
    state["param_groups"][0]["fused"] = None
    torch.save(state, checkpoint / "optimizer.bin")

    resumed = resume(script, flags, checkpoint, tmp_path / "resumed")

    assert torch.load(resumed / "checkpoint-4" / "optimizer.bin")["param_groups"][0]["fused"] is None


@pytest.mark.parametrize(
    "schedule", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
)
def test_schedule_can_start_at_any_step(script, flags, schedule):
    flags.update(lr_scheduler=schedule, lr_warmup_steps=3, lr_num_cycles=2, lr_power=2, max_train_steps=8)
    args = script.parse_args(command_line(flags))

    def rates_from(step):
        optimizer = script.build_optimizer(args, [torch.nn.Parameter(torch.zeros(1))], 4)
        scheduler = script.build_schedule(args, optimizer, step)
        rates = []
        for _ in range(step, 8):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return rates

    expected = rates_from(0)
    for step in range(8):
        assert rates_from(step) == expected[step:]
    assert (len(set(expected)) == 1) == (schedule == "constant")


def test_changed_flags_and_pairs_are_reported_once(script, flags, caplog, tmp_path):
    """But not a seed that is not given, which is that of the checkpoint."""
    flags.update(max_train_steps=1, seed=None)
    checkpoint = run(script, flags) / "checkpoint-1"
    build_pipeline(tmp_path / "pipeline", seed=1)
    draw_pairs(tmp_path / "pairs", seed=1)
    changes = {
        **OPTIMIZER,
        "pretrained_model_name_or_path": tmp_path / "pipeline",
        "dataset_name": tmp_path / "pairs",
        "max_train_samples": 40,
        "num_validation_pairs": 4,
        "resolution": 32,
        "beta_mapo": 0.5,
        "gradient_accumulation_steps": 2,
    }
    flags.update(changes, **{"no-remove_ties": True})

    resumed = resume(script, {**flags, "max_train_steps": 2}, checkpoint, tmp_path / "resumed")
    reports = caplog.text
    caplog.clear()
    resume(script, {**flags, "max_train_steps": 3}, "latest", resumed)

    changed = re.findall(r"--resume_from_checkpoint: (\w+) changed from .* to .*\.", reports)
    assert sorted(changed) == sorted([*changes, "remove_ties", "pairs_per_step"])
    assert "checkpoint-1 was trained on different pairs" in reports
    assert "--resume_from_checkpoint" not in caplog.text


# Longer training ----------------------------------------------------------------------------------------------------
def test_finished_run_can_be_trained_longer(script, flags, tmp_path):
    """5 steps and 5 more equal 10: the last step has a checkpoint as well."""
    flags.update(STREAMED, rank=None, use_8bit_adam=True, gradient_accumulation_steps=2, train_batch_size=1)
    flags.update(lr_warmup_steps=3, lr_scheduler="constant_with_warmup", max_train_samples=24)
    longer = run(script, {**flags, "max_train_steps": 10, "output_dir": tmp_path / "longer"})

    out = run(script, {**flags, "max_train_steps": 5})
    weights_after_5_steps = trained(out)
    run(script, {**flags, "max_train_steps": 10, "resume_from_checkpoint": "latest"})

    assert checkpoints(out) == [5, 10]
    assert_same(longer, out)
    assert differ(weights_after_5_steps, trained(out))


def test_finished_run_is_only_validated_again(script, flags, tmp_path):
    flags.update(num_validation_pairs=4)
    finished = run(script, flags)

    again = resume(script, flags, finished / "checkpoint-4", tmp_path / "again")

    assert_equal(trained(finished), trained(again))
    assert "loss" not in scalars(again)
    assert scalars(again)["eval_loss"] == {4: scalars(finished)["eval_loss"][4]}
    assert (again / "README.md").exists()


def test_checkpoint_of_a_later_step_is_refused(script, flags, loaded):
    run(script, flags)

    error = train_error(script, {**flags, "resume_from_checkpoint": "latest", "max_train_steps": 3})

    assert re.search(r"--max_train_steps 3\b.*\b4\b", error)
    assert len(loaded) == 1  # no weights were loaded


# Several ranks ------------------------------------------------------------------------------------------------------
def test_ranks_resume_from_the_checkpoint_that_the_main_process_finds_if_all_can_read_it(flags, tmp_path):
    """A network file system may list it late on another machine, or storage may not be shared."""
    flags.update(train_batch_size=2, checkpointing_steps=2)
    uninterrupted = run_ranks_successfully({**flags, "output_dir": tmp_path / "uninterrupted"})
    out = run_ranks_successfully({**flags, "max_train_steps": 2})
    flags["resume_from_checkpoint"] = "latest"
    missing = Fault("reading", cpu_cluster.EVERY_CALL, cpu_cluster.no_state_file)
    stale = Fault("listing", cpu_cluster.EVERY_CALL, cpu_cluster.nothing_listed)

    statuses, outputs = run_ranks(flags, {1: [missing]})
    resumed = run_ranks_successfully(flags, {1: [stale]})

    assert_one_error(statuses, outputs, str(out / "checkpoint-2"), "shared storage")
    assert_equal(trained(resumed), trained(uninterrupted))
