"""Measure a streamed data set, as markdown tables: how well it is mixed, what it holds, how fast it is resumed.

    python tests/benchmarks/stream.py

The first two are taken on labels alone, the last with the tiny pipeline of `tests/small_world.py`.
"""

import json
import logging
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np


sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import command_line, load_script, run  # noqa: E402
from small_world import build_pipeline, draw_pairs  # noqa: E402


script = load_script()

GROUPS, ROWS, BUFFER, BATCH = 100, 100, 256, 16
SEEDS = range(10)
EARLY, LATE, REPEATS = 10, 10_000, 3


class Record(dict):
    """A record that is counted as long as it lives."""

    living = most = 0

    def __init__(self, **values):
        super().__init__(**values)
        Record.living += 1
        Record.most = max(Record.most, Record.living)

    def __del__(self):
        Record.living -= 1


class RowGroups:
    """A streamed data set of labels alone."""

    num_shards = GROUPS

    def shard(self, num_shards, index):
        return (Record(label_0=1, label_1=0) for _ in range(ROWS))


def streamed_order(seed, epochs=1):
    """Row numbers, through all row groups, in the order of their visits."""
    words = ["--pretrained_model_name_or_path", "none", "--dataset_name", "none", "--streaming"]
    words += ["--max_train_steps", "1", "--seed", str(seed), "--shuffle_buffer_size", str(BUFFER)]
    visits = script.PairStream(script.parse_args(words), RowGroups()).visits()
    # Not kept: only what the stream itself holds is counted.
    order = np.array([visit.shard * ROWS + visit.row for visit, _ in zip(visits, range(epochs * GROUPS * ROWS))])
    visits.close()
    return order


def groups_in_a_batch(order):
    batches = (order // ROWS)[: len(order) // BATCH * BATCH].reshape(-1, BATCH)
    return np.mean([len(set(batch)) for batch in batches.tolist()])


def print_mixing():
    orders = {
        f"streamed, `--shuffle_buffer_size {BUFFER}`": [streamed_order(seed) for seed in SEEDS],
        "shuffled as a whole": [np.random.default_rng(seed).permutation(GROUPS * ROWS) for seed in SEEDS],
    }
    print(f"{GROUPS} row groups of {ROWS} rows, one epoch, {len(SEEDS)} seeds:\n")
    print(f"| order | Spearman with storage, mean of sizes | largest | row groups in a batch of {BATCH} |")
    print("|---|---|---|---|")
    for name, seeds in orders.items():
        # Row numbers are their own ranks.
        sizes = [abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) for order in seeds]
        groups = np.mean([groups_in_a_batch(order) for order in seeds])
        print(f"| {name} | {np.mean(sizes):.3f} | {max(sizes):.3f} | {groups:.1f} |")


def print_held():
    Record.most = 0
    streamed_order(0, epochs=5)
    print(f"\nMost records held at a time, over 5 epochs: {Record.most}, two blocks of {BUFFER} and the one in use.\n")


def make_late(checkpoint, flags):
    """Turn the checkpoint of step EARLY into that of step LATE; returns it, and the seconds of reading up to there."""
    late = checkpoint.with_name(f"checkpoint-{LATE}")
    shutil.copytree(checkpoint, late)
    state = json.loads((late / "mapo_state.json").read_text())
    state.update(step=LATE, pairs_seen=LATE * flags["train_batch_size"])
    start = time.perf_counter()
    if flags["streaming"]:
        args = script.parse_args(command_line(flags))
        batches = script.PairStream(args, script.load_all_pairs(args)[0]).batches(args.train_batch_size, None)
        for _ in range(LATE):
            batch = next(batches)
        batches.close()
        state["cursors"] = [batch[-1].cursor]
    seconds = time.perf_counter() - start
    (late / "mapo_state.json").write_text(json.dumps(state))
    return late, seconds


class Clock:
    """A function of the script that notes when it was first called and first returned."""

    def __init__(self, name):
        self.function = getattr(script, name)
        self.called = self.returned = None

    def __call__(self, *args):
        self.called = self.called or time.perf_counter()
        result = self.function(*args)
        self.returned = self.returned or time.perf_counter()
        return result


def seconds_to_first_step(flags, checkpoint, step):
    """From the script's start, libraries imported, to the end of its first step; and of these, waiting for pairs."""
    names = ("train", "preference_step", "update_weights")
    clocks = {name: Clock(name) for name in names}
    start = time.perf_counter()
    with mock.patch.multiple(script, **clocks):
        run(script, {**flags, "resume_from_checkpoint": checkpoint, "max_train_steps": step + 1})
    whole = clocks["update_weights"].returned - start
    return whole, clocks["preference_step"].called - clocks["train"].called


def print_resuming(folder):
    build_pipeline(folder / "pipeline")
    draw_pairs(folder / "pairs", num_pairs=1000, num_shards=4, row_group_size=50)
    flags = {
        "pretrained_model_name_or_path": folder / "pipeline",
        "dataset_name": folder / "pairs",
        "cache_dir": folder / "cache",
        "resolution": 64,
        "rank": 4,
        "train_batch_size": 4,
        "max_train_steps": EARLY,
        "checkpointing_steps": EARLY,
        "shuffle_buffer_size": BUFFER,
        "report_to": "none",
        "seed": 0,
    }
    print(f"1,000 pairs in row groups of 50, batches of 4, medians of {REPEATS}:\n")
    print("| resumed at step | | seconds to the end of the first step | of these, to the first batch |")
    print("|---|---|---|---|")
    for name, streaming in (("map-style", None), ("streamed", True)):
        flags.update(output_dir=folder / name, streaming=streaming)
        early = run(script, flags) / f"checkpoint-{EARLY}"
        late, reading = make_late(early, flags)
        for step, checkpoint in ((EARLY, early), (LATE, late)):
            times = [seconds_to_first_step(flags, checkpoint, step) for _ in range(REPEATS)]
            whole, waiting = (statistics.median(column) for column in zip(*times))
            print(f"| {step:,} | {name} | {whole:.2f} | {waiting:.3f} |", flush=True)
    print(f"\nTo read the stream up to step {LATE:,} takes {reading:.0f} s.")


def main():
    logging.disable(logging.WARNING)
    print_mixing()
    print_held()
    with tempfile.TemporaryDirectory() as folder:
        print_resuming(Path(folder))


if __name__ == "__main__":
    main()
