"""The order in which a run visits its pairs, prepared or streamed, and the rows that it skips."""

import collections
import itertools
import logging
import math
import os
import re
from functools import partial

import numpy as np
import pytest
from conftest import run, scalars
from cpu_cluster import EVERY_CALL, Fault
from runs import assert_same, curves, read_state, run_ranks, train_error
from small_pairs import GROUPS, MAP_AND_STREAM, TIES, USABLE, load_pairs, write_groups


# Epochs -------------------------------------------------------------------------------------------------------------
def make_index(sizes):
    """An index with the shard and the row of each pair, for shards of these sizes."""
    rows = []
    for shard, size in enumerate(sizes):
        rows += [(shard, row) for row in range(size)]
    return np.array(rows)


def most_shards_in_use(shards):
    """The most shards that are needed at once, if a shard is needed from its first to its last pair."""
    first = {}
    last = {}
    for place, shard in enumerate(shards):
        first.setdefault(shard, place)
        last[shard] = place
    in_use = [sum(first[shard] <= place <= last[shard] for shard in first) for place in range(len(shards))]
    return max(in_use, default=0)


@pytest.mark.parametrize(("shards_mixed", "lanes", "turn"), [(4, 1, 4), (1, 1, 1), (2, 3, 2), (3, 8, 4)])
@pytest.mark.parametrize(
    "sizes",
    [13 * [5], [1, 0, 17, 3, 3, 0, 8, 2, 1, 9], [23], [1, 1, 1]],
    ids=["equal", "uneven, some empty", "one", "tiny"],
)
def test_epoch_is_a_permutation_in_which_each_lane_reads_few_shards(script, sizes, shards_mixed, lanes, turn):
    index = make_index(sizes)
    layout = script.Layout(shards_mixed, lanes, turn)
    for seed, epoch in itertools.product((0, 1), range(4)):
        order = script.epoch_order(index, seed, epoch, layout)

        assert sorted(order.tolist()) == list(range(len(index)))
        shards_of_lane = collections.defaultdict(list)
        for place, pair in enumerate(order):
            lane = (epoch * len(index) + place) // turn % lanes
            shards_of_lane[lane].append(int(index[pair, 0]))
        for shards in shards_of_lane.values():
            assert most_shards_in_use(shards) <= shards_mixed
        # At each border between two lanes, at most one shard is read by both.
        reads = sum(len(set(shards)) for shards in shards_of_lane.values())
        assert reads - len(set(index[:, 0].tolist())) <= lanes - 1


@pytest.mark.parametrize(
    ("sizes", "shards_mixed", "num_orders"),
    [([4], 1, 24), ([2, 2], 2, 24), ([1, 2, 1], 4, 24), ([2, 2], 1, 8)],
)
def test_all_possible_orders_are_equally_likely(script, sizes, shards_mixed, num_orders):
    """In 2,400 epochs: 800 seeds, three epochs each. If all shards are mixed, every order is possible."""
    index = make_index(sizes)
    counts = collections.Counter()
    for seed, epoch in itertools.product(range(800), range(3)):
        order = script.epoch_order(index, seed, epoch, script.Layout(shards_mixed))
        counts[tuple(order.tolist())] += 1

    assert len(counts) == num_orders
    expected = 2400 / num_orders
    for count in counts.values():
        assert abs(count - expected) < 5 * math.sqrt(expected)


# Runs ---------------------------------------------------------------------------------------------------------------
@pytest.fixture
def batches(script, monkeypatch):
    """The captions of each training batch of a run."""
    batches = []
    preference_loss = script.preference_loss

    def record(run, batch):
        if not batch["row"][0].startswith("held-out"):
            batches.append(batch["caption"])
        return preference_loss(run, batch)

    monkeypatch.setattr(script, "preference_loss", record)
    return batches


def test_streamed_and_prepared_runs_are_equal(script, flags, tmp_path, batches):
    """
    Bit for bit if the stream has one row group. With several row groups, a stream has another order, but the same
    pairs and held-out metrics. 16 of 24 pairs, in two epochs.
    """
    flags.update({"no-remove_ties": True}, random_crop=True, label_noise_prob=0.4, resolution=32)
    flags.update(max_train_samples=16, num_validation_pairs=5, max_train_steps=8)

    folders = {groups: write_groups(tmp_path / groups, sizes, TIES) for groups, sizes in GROUPS.items()}

    runs = {}
    for groups, streaming, workers in (*itertools.product(GROUPS, (None, True), (0, 2)), ("one", True, 1)):
        batches.clear()
        flags.update(dataset_name=folders[groups], streaming=streaming, dataloader_num_workers=workers)
        out = run(script, {**flags, "output_dir": tmp_path / f"{groups}-{streaming}-{workers}"})
        runs[groups, streaming, workers] = (out, sum(batches, []))

    expected, expected_captions = runs["one", None, 0]
    assert len(curves(expected)["loss"]) == 8
    for other in (("one", None, 2), ("one", True, 0), ("one", True, 1), ("uneven", None, 0), ("uneven", None, 2)):
        out, captions = runs[other]
        assert captions == expected_captions, other
        assert_same(out, expected)
    for out, captions in runs.values():
        assert sorted(captions[:16]) == sorted(expected_captions[:16])
        assert curves(out)["eval_loss"][0] == curves(expected)["eval_loss"][0]
    assert len(set(expected_captions[:16])) == 16
    assert set(expected_captions[:16]) <= {f"pair {number}" for number in range(5, 24)}
    # Two workers deal the row groups of a stream in another order, and so do several row groups.
    assert len({tuple(captions) for _, captions in runs.values()}) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_epochs_visit_each_pair_once(script, flags, tmp_path, batches, workers):
    """20 pairs, twice, in batches of 3: 14 steps."""
    folder = write_groups(tmp_path / "data", GROUPS["uneven"], TIES)
    flags.update(dataset_name=folder, streaming=True, shuffle_shards=2, dataloader_num_workers=workers)
    flags.update(num_train_epochs=2, max_train_steps=None, train_batch_size=3)

    out = run(script, flags)

    captions = sum(batches, [])
    assert sorted(scalars(out)["loss"]) == list(range(1, 15))
    assert len(captions) == 42
    assert sorted(captions[:20]) == sorted(USABLE)
    assert sorted(captions[20:40]) == sorted(USABLE)
    assert captions[:20] != captions[20:40]


def noting_row_group(folder, call):
    """Note which row groups a process reads with images."""
    _, group, _ = call.args
    with (folder / f"images-{os.environ['RANK']}").open("a") as file:
        file.write(f"{group} ")
    return call()


def noting_labels(folder, call):
    """Note which process reads the labels of a file."""
    _, columns = call.args
    if "label_0" in columns:
        with (folder / "labels").open("a") as file:
            file.write(f"{os.environ['RANK']} ")
    return call()


@pytest.mark.matrix
def test_each_process_reads_only_the_row_groups_of_its_own_lane(script, flags, tmp_path):
    """Two processes, one epoch of 12 row groups of 4 rows, one of them bad."""
    folder = write_groups(tmp_path / "data", [12 * [4]], bad={17}, broken=b"broken")
    flags.update(dataset_name=folder, streaming=True, shuffle_shards=2, max_bad_rows=1)
    flags.update(train_batch_size=2, num_train_epochs=1, max_train_steps=None)
    faults = [
        Fault("source", EVERY_CALL, partial(noting_row_group, tmp_path)),
        Fault("labels", EVERY_CALL, partial(noting_labels, tmp_path)),
    ]

    statuses, outputs = run_ranks(flags, {0: faults, 1: faults})

    printed = "\n".join(outputs)
    assert statuses == [0, 0], printed
    assert "Skipped row 1 of shard 4: it has an image that cannot be read" in printed
    # A parquet reader that is still open at exit would print one of these.
    for text in ("Exception ignored", "Fatal Python error", "terminate called"):
        assert text not in printed
    index = load_pairs(script, folder, streaming=True).index
    order = script.epoch_order(index, 0, 0, script.Layout(2, 2, 2))
    shards = index[order, 0].reshape(-1, 2, 2)
    for rank in (0, 1):
        row_groups = (tmp_path / f"images-{rank}").read_text().split()
        assert sorted(map(int, row_groups)) == sorted(set(shards[:, rank].flatten().tolist()))
        assert len(row_groups) == 6
    # One process reads the labels for both.
    assert len((tmp_path / "labels").read_text().split()) == 1


# Bad rows -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def skipped(tmp_path):
    """Returns the rows that were reported as skipped, also by loader workers."""
    handler = logging.FileHandler(tmp_path / "log")
    script_logger = logging.getLogger("train_diffusion_mapo_sdxl")
    script_logger.addHandler(handler)
    yield lambda: re.findall(r"Skipped (.*?): it has no image\.", (tmp_path / "log").read_text())
    script_logger.removeHandler(handler)


@pytest.mark.parametrize("workers", [0, 2])
@MAP_AND_STREAM
def test_bad_rows_are_replaced_named_and_counted(
    script, flags, tmp_path, batches, caplog, skipped, streaming, workers
):
    """One epoch of 24 rows. Row 13 is visited twice, the second time after row 12. Row 23 is replaced by row 0."""
    bad = {2, 12, 13, 23}
    flags["dataset_name"] = write_groups(tmp_path / "data", [[15, 9]], bad=bad)
    flags.update(max_bad_rows=0.5, streaming=streaming, train_batch_size=3, max_train_steps=8, checkpointing_steps=8)
    flags.update(dataloader_num_workers=workers)

    with caplog.at_level(logging.INFO):
        out = run(script, flags)

    assert [len(captions) for captions in batches] == 8 * [3]
    numbers = [int(caption.removeprefix("pair ")) for caption in sum(batches, [])]
    assert sorted(numbers) == sorted([*set(range(24)) - bad, 3, 14, 14, 0])

    state = read_state(out / "checkpoint-8")
    assert state["rows_bad"] == 5
    assert state["rows_read"] == 29
    assert state["pairs_seen"] == 24
    assert "29 rows read, 5 of them unusable." in caplog.text

    names = ["row 2", "row 12", "row 13", "row 23"]
    if streaming:
        names = ["row 2 of shard 0", "row 12 of shard 0", "row 13 of shard 0", "row 8 of shard 1"]
    assert set(skipped()) == set(names)
    if workers == 0:  # workers read ahead, into the next epoch
        assert sorted(skipped()) == sorted([*names, names[2]])


def test_dataset_without_a_usable_row_is_refused(script, flags, tmp_path):
    folder = write_groups(tmp_path / "data", [[3]], bad={0, 1, 2})

    error = train_error(script, {**flags, "dataset_name": folder})

    reason = r"no row from row \d to row \d can be used; the last one has no image"
    assert re.fullmatch(f"--dataset_name {folder} cannot be trained on: {reason}", error)


@MAP_AND_STREAM
def test_too_many_bad_rows_stop_the_run_after_a_checkpoint(script, flags, tmp_path, skipped, streaming):
    flags.update(dataset_name=write_groups(tmp_path / "data", [[12]], bad={3, 8}), streaming=streaming)

    error = train_error(script, {**flags, "max_train_steps": 60})

    assert re.search("--max_bad_rows 0.01: 10 of .* rows could not be used", error)
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert read_state(checkpoint)["rows_bad"] == 10
    assert len(skipped()) >= 10  # the batch after the last step has been read as well


@pytest.mark.parametrize(
    ("pairs", "bad", "limit", "expected"),
    [
        (100, 9, 0.01, None),
        (100, 10, 0.01, "--max_bad_rows 0.01: 10 of 110 rows could not be used"),
        (1000, 10, 0.01, None),
        (100, 1, 0, "--max_bad_rows 0: 1 of 101 rows could not be used"),
    ],
)
def test_run_stops_at_ten_bad_rows_above_the_limit_or_at_the_first_if_none_is_allowed(
    script, pairs, bad, limit, expected
):
    progress = script.Progress(run_id="", layout=script.Layout(), index_hash="")
    progress.count_step(pairs, bad, finite=True)

    fault = script.find_fault(progress, 10, limit)

    assert fault == expected
