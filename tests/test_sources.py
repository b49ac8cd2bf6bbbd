"""Where pairs can come from: formats, columns, splits and image files, and the index of their labels."""

import contextlib
import itertools
import math
import os
import re
import shutil
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_pairs
from conftest import run
from fsspec.implementations.local import LocalFileOpener
from runs import assert_same, read_state, train_error
from small_pairs import (
    GROUPS,
    IMAGES,
    LABELS,
    MAP_AND_STREAM,
    TIES,
    USABLE,
    expected_pair,
    load_both_pairs,
    load_pairs,
    make_args,
    make_row,
    random_image,
    random_pixels,
    summaries,
    summary,
    unusable_reason,
    visit_all,
    with_file_name_columns,
    write_groups,
    write_images,
    write_parquet,
)


# Layouts ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("save", "flags"),
    [
        (small_pairs.save_bytes, {}),
        (small_pairs.save_image_feature, {}),
        (small_pairs.save_absolute_paths, {}),
        (small_pairs.save_ordered_bytes, small_pairs.ORDERED),
        (small_pairs.save_bytes, {"streaming": True}),
        (small_pairs.save_image_feature, {"streaming": True}),
        (small_pairs.save_absolute_paths, {"streaming": True}),
        (small_pairs.save_ordered_bytes, {**small_pairs.ORDERED, "streaming": True}),
        (small_pairs.save_imagefolder, {}),
        (small_pairs.save_imagefolder_with_parquet, {}),
        (small_pairs.save_zipped_imagefolder, {}),
        (small_pairs.save_ordered_files, small_pairs.ORDERED),
        (small_pairs.save_zipped_ordered_files, small_pairs.ORDERED),
        (small_pairs.save_webdataset, small_pairs.WEBDATASET_COLUMNS),
    ],
)
def test_all_layouts_give_the_same_pairs(script, tmp_path, save, flags):
    save(tmp_path / "data", [make_row(number) for number in range(5)])

    found = summaries(script, tmp_path / "data", **flags)

    assert found == [expected_pair(number) for number in range(5)]


@pytest.mark.parametrize("save", [small_pairs.save_ordered_files, small_pairs.save_zipped_ordered_files])
def test_training_on_image_files_equals_training_on_parquet(script, flags, tmp_path, save):
    """Loader workers read the image files."""
    rows = [make_row(number) for number in range(9)]
    save(tmp_path / "files", rows)
    small_pairs.save_ordered_bytes(tmp_path / "parquet", rows)
    flags.update(small_pairs.ORDERED, cache_dir=tmp_path / "cache", resolution=16)

    on_parquet = run(script, {**flags, "dataset_name": tmp_path / "parquet"})
    flags.update(dataset_name=tmp_path / "files", dataloader_num_workers=2, output_dir=tmp_path / "on files")
    on_files = run(script, flags)

    assert_same(on_files, on_parquet)


@MAP_AND_STREAM
@pytest.mark.parametrize("dtype", [pa.bool_(), pa.float32()], ids=str)
def test_higher_label_wins_and_ties_are_dropped(script, tmp_path, dtype, streaming):
    """NULL and NaN are not ties, but unusable."""
    if dtype == pa.bool_():
        labels = [(True, False), (True, True), (False, False), (False, True), (None, None), (None, True)]
    else:
        labels = [(0.51, 0.49), (0.5, 0.5), (0.0, -0.0), (-2.0, -1.5), (math.nan, math.nan), (None, 1.0)]
    rows = [make_row(n, label_0=first, label_1=second) for n, (first, second) in enumerate(labels)]
    schema = {"caption": pa.string(), "jpg_0": pa.binary(), "jpg_1": pa.binary(), "label_0": dtype, "label_1": dtype}
    folder = write_parquet(tmp_path / "data" / "train.parquet", [rows], pa.schema(schema))

    pairs = load_pairs(script, folder, streaming=streaming)
    with_ties = load_pairs(script, folder, streaming=streaming, **{"no-remove_ties": True})

    assert pairs.index[:, 1].tolist() == [0, 3, 4, 5]
    assert summary(pairs[script.Visit(0, 0)]) == ("pair 0", (0, 0, 1), (0, 1, 0))
    assert summary(pairs[script.Visit(0, 1)]) == ("pair 3", (3, 1, 0), (3, 0, 1))
    for shard, row, _ in pairs.index[2:]:
        assert unusable_reason(script, pairs.rows.record(shard, row, lane=0)) == "has no label_0"
    assert with_ties.index[:, 1].tolist() == [0, 1, 2, 3, 4, 5]


# Refusals and warnings ----------------------------------------------------------------------------------------------
@MAP_AND_STREAM
def test_pairs_are_tried_before_weights_are_loaded(script, flags, tmp_path, monkeypatch, streaming):
    def refuse(*args):
        raise AssertionError("weights were about to be loaded")

    monkeypatch.setattr(script, "load_pipeline", refuse)
    flags.update(dataset_name=write_groups(tmp_path / "data", [[6, 6]], bad=range(12)), streaming=streaming)

    error = train_error(script, {**flags, "max_bad_rows": 1})

    assert re.search("no row .* can be used.* has no image", error)


@pytest.mark.parametrize(
    ("numbers_of_words", "streaming", "expected"),
    [
        ([3, 76, 1, 75, 90, 5, 200, 75], None, ["3 of the first 8"]),
        ([3, 76, 1, 75, 90, 5, 200, 75], True, ["3 of the first 8"]),
        ([*1000 * [1], 200], None, []),
    ],
    ids=["map", "stream", "after the first 1000"],
)
def test_long_captions_are_counted_in_a_warning(
    script, flags, tmp_path, caplog, numbers_of_words, streaming, expected
):
    """77 tokens are 75 and two for start and end."""
    rows = [make_row(number % 9, caption=" ".join(words * ["red"])) for number, words in enumerate(numbers_of_words)]
    write_parquet(tmp_path / "data" / "train.parquet", [rows[:5], rows[5:]])
    flags.update(dataset_name=tmp_path / "data", cache_dir=tmp_path / "cache", streaming=streaming, resolution=16)

    run(script, {**flags, "max_train_steps": 1, "num_validation_pairs": 2})

    pattern = r"(\d+ of the first \d+) captions have more than 77 tokens; SDXL ignores the rest\."
    assert re.findall(pattern, caplog.text) == expected


@pytest.mark.parametrize("name", ["pairs[1]", "pairs*", "pair?", "some*/pairs"])
def test_folder_whose_name_is_a_pattern_is_refused(script, tmp_path, name):
    """`datasets` would read all folders that match "pairs*"."""
    write_groups(tmp_path / name, [[2]])

    with pytest.raises(script.TrainingError, match="--dataset_name.*rename"):
        load_pairs(script, tmp_path / name)


@MAP_AND_STREAM
@pytest.mark.parametrize("name", [".", "train-0.parquet"])
def test_dataset_may_be_the_current_folder_or_a_file_in_it(script, tmp_path, monkeypatch, name, streaming):
    write_groups(tmp_path / "data", [[3], [2]])
    monkeypatch.chdir(tmp_path / "data")

    found = summaries(script, tmp_path / "data", dataset_name=name, streaming=streaming)

    assert found == [expected_pair(number) for number in range(5 if name == "." else 3)]


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_paths_in_a_table_are_refused_with_the_name_that_makes_them_images(script, tmp_path, kind):
    folder = tmp_path / "data"
    rows = write_images(folder, [make_row(number) for number in range(3)])

    def save(rows, name):
        table = datasets.Dataset.from_list(rows)
        file = folder / f"{name}.{'jsonl' if kind == 'json' else kind}"
        getattr(table, f"to_{kind}")(file)
        return file

    file = save(rows, "train")
    with pytest.raises(script.TrainingError) as error:
        load_pairs(script, folder)
    file.unlink()
    save(with_file_name_columns(rows), "metadata")
    found = summaries(script, folder)

    assert str(error.value) == (
        "--image_0_column: column 'jpg_0' contains strings. If they are paths of images, give the folder of the "
        "table, name it metadata.csv (or .jsonl, .parquet), and let the names of its image columns end in _file_name."
    )
    assert found == [expected_pair(number) for number in range(3)]


def test_streaming_needs_parquet_files(script, tmp_path):
    small_pairs.save_imagefolder(tmp_path / "data", [make_row(0)])

    with pytest.raises(script.TrainingError, match="--streaming reads parquet files"):
        load_pairs(script, tmp_path / "data", streaming=True)


# Splits -------------------------------------------------------------------------------------------------------------
@pytest.fixture
def three_splits(tmp_path):
    """A folder with the splits train (pairs 0 and 1), validation (2 and 3) and test (4 and 5)."""
    folder = tmp_path / "data"
    for number, split in enumerate(("train", "validation", "test")):
        write_parquet(folder / f"{split}.parquet", [[make_row(2 * number), make_row(2 * number + 1)]])
    return folder


@MAP_AND_STREAM
@pytest.mark.parametrize(("split", "numbers"), [(None, [0, 1]), ("test", [4, 5]), ("test+train", [4, 5, 0, 1])])
def test_splits_are_selected_and_joined(script, three_splits, streaming, split, numbers):
    found = summaries(script, three_splits, streaming=streaming, dataset_split_name=split)

    assert found == [expected_pair(number) for number in numbers]


@MAP_AND_STREAM
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"dataset_split_name": "test+val"}, r"--dataset_split_name: .* no split 'val' \(splits: .*'train', 'val"),
        ({"validation_split": "val"}, "--validation_split: .* no split 'val'"),
        ({"validation_split": "train"}, "--validation_split train is also trained on"),
    ],
    ids=str,
)
def test_wrong_splits_are_refused(script, three_splits, streaming, flags, expected):
    with pytest.raises(script.TrainingError, match=expected):
        load_pairs(script, three_splits, streaming=streaming, **flags)


@pytest.mark.parametrize(
    ("number", "held_out", "trained"),
    [(2, [0, 3], [1, 2, 4, 5, 6, 7]), (3, [0, 1, 3], [2, 5, 6, 7]), (4, [0, 1, 3, 4], [2, 5, 6, 7])],
)
def test_pairs_are_held_out_caption_by_caption(script, tmp_path, caplog, number, held_out, trained):
    """Four captions of two pairs each. A caption of which only one pair is held out is not trained on."""
    rows = [make_row(n, caption=caption) for n, caption in enumerate("cbacbadd")]
    write_parquet(tmp_path / "data" / "train.parquet", [rows])

    training_pairs, held_out_pairs = load_both_pairs(script, tmp_path / "data", num_validation_pairs=number)

    assert training_pairs.index[:, 1].tolist() == trained
    assert held_out_pairs.index[:, 1].tolist() == held_out
    assert ("1 training pairs are left out" in caplog.text) == (number == 3)


@MAP_AND_STREAM
def test_captions_of_the_validation_split_are_not_trained_on(script, tmp_path, caplog, streaming):
    """The number of training pairs does not limit those of the validation split."""
    write_parquet(tmp_path / "data" / "train.parquet", [[make_row(number) for number in range(6)]])
    write_parquet(tmp_path / "data" / "validation.parquet", [[make_row(number) for number in (1, 4, 9)]])
    flags = {"validation_split": "validation", "streaming": streaming}

    training_pairs = load_pairs(script, tmp_path / "data", **flags)
    two_pairs, held_out_pairs = load_both_pairs(script, tmp_path / "data", **flags, max_train_samples=2)

    assert training_pairs.index[:, 1].tolist() == [0, 2, 3, 5]
    assert "2 training pairs are left out" in caplog.text
    assert len(two_pairs.index) == 2
    assert held_out_pairs.index[:, 1].tolist() == [0, 1, 2]


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("samples", [5, 12, 30])
def test_samples_and_held_out_pairs_are_the_same_streamed_or_not(script, tmp_path, groups, samples):
    """The first pairs are held out under any seed. A random subset of the others is trained on, in their order."""
    folder = write_groups(tmp_path / "data", GROUPS[groups], TIES)

    for seed in (0, 1):
        captions = []
        for streaming in (None, True):
            flags = {"max_train_samples": samples, "num_validation_pairs": 3, "seed": seed, "streaming": streaming}
            for pairs in load_both_pairs(script, folder, **flags):
                captions.append([pair["caption"] for pair in visit_all(script, pairs)])

        trained, held_out, streamed_trained, streamed_held_out = captions
        assert streamed_trained == trained
        assert streamed_held_out == held_out
        assert held_out == USABLE[:3]
        assert trained == [caption for caption in USABLE[3:] if caption in trained]
        assert len(trained) == min(samples, 17)


def test_every_pair_is_equally_likely_to_be_sampled(script, monkeypatch):
    """With 1,000 seeds. The bound is 4.5 standard deviations."""
    index = np.stack([np.zeros(20, int), np.arange(20), np.arange(20)], axis=1)
    split = script.Split(["train"], None, index, fingerprint=[], commit=None)
    monkeypatch.setattr(script, "open_split", lambda *args: split)
    args = make_args(script, max_train_samples=5)

    counts = np.zeros(20)
    for seed in range(1000):
        args.seed = seed
        pairs, _ = script.load_pairs(args, (4, 1, 1), 1000)
        counts[pairs.index[:, 1]] += 1

    assert counts.sum() == 5000
    assert (np.abs(counts - 250) < 4.5 * math.sqrt(250 * 0.75)).all()


# Index --------------------------------------------------------------------------------------------------------------
@pytest.fixture
def large_images(tmp_path):
    """A folder with 12 rows of 1 MB."""
    images = {name: random_pixels(500_000, seed=number).tobytes() for number, name in enumerate(IMAGES)}
    group = [make_row(number, **images) for number in range(3)]
    return write_parquet(tmp_path / "data" / "train-0.parquet", 4 * [group])


def test_index_of_a_stream_reads_no_images(script, large_images, monkeypatch):
    """A parquet reader begins with the last 64 KiB of a file, which contain its footer."""
    num_bytes = []

    def read(opened, *args):
        content = opened.f.read(*args)
        num_bytes.append(len(content))
        return content

    monkeypatch.setattr(LocalFileOpener, "read", read, raising=False)

    load_pairs(script, large_images, streaming=True)

    assert 0 < sum(num_bytes) < 2**17


def test_index_of_a_prepared_dataset_reads_no_images(script, large_images, record_calls):
    calls = record_calls(datasets.Dataset, "select_columns")

    load_pairs(script, large_images)

    assert [call.args[1] for call in calls] == [["caption", *IMAGES, *LABELS], ["caption", *LABELS]]


@MAP_AND_STREAM
def test_index_is_built_once(script, tmp_path, monkeypatch, streaming):
    """Other flags or other files need another index."""
    folder = write_groups(tmp_path / "data", [[3, 3, 3, 3]])
    load_pairs(script, folder, streaming=streaming)

    def refuse(*args):
        raise AssertionError("an index was about to be built")

    with monkeypatch.context() as patch:
        patch.setattr(script, "build_index", refuse)
        again = load_pairs(script, folder, streaming=streaming)
        with pytest.raises(AssertionError, match="an index was about to be built"):
            load_pairs(script, folder, streaming=streaming, **{"no-remove_ties": True})
    write_groups(folder, [[2, 3]], tied={1})
    changed = load_pairs(script, folder, streaming=streaming)

    assert len(again.index) == 12
    assert len(changed.index) == 4


# The hub ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def hub_cache(tmp_path):
    """A cache that contains the dataset me/pairs of the hub at commit aaa..., while the hub cannot be reached."""
    folder = write_groups(tmp_path / "local", [[4]])
    builder = datasets.load_dataset_builder(str(folder), cache_dir=str(tmp_path / "cache"))
    builder.download_and_prepare()
    cached = tmp_path / "cache" / "me___pairs" / "default" / "0.0.0" / (40 * "a")
    shutil.copytree(builder.cache_dir, cached)
    for file in cached.glob("*-train.arrow"):
        file.rename(file.with_name("pairs-train.arrow"))
    return tmp_path / "cache"


def test_dataset_of_the_hub_is_used_from_the_cache(script, hub_cache):
    args = make_args(script, dataset_name="me/pairs", cache_dir=hub_cache)

    pairs, _ = script.load_pairs(args, (4, 1, 1), 1000, revision=40 * "a")

    assert [summary(pair) for pair in visit_all(script, pairs)] == [expected_pair(number) for number in range(4)]
    assert pairs.split.commit == 40 * "a"


@pytest.mark.parametrize(
    ("flags", "revision", "expected"),
    [
        ({}, 40 * "b", "the run used commit b+, which cannot be reached"),
        ({"streaming": True}, None, "--streaming: me/pairs cannot be reached"),
    ],
    ids=["other commit", "streaming"],
)
def test_cached_dataset_of_the_hub_that_does_not_suffice(script, hub_cache, flags, revision, expected):
    args = make_args(script, dataset_name="me/pairs", cache_dir=hub_cache, **flags)

    with pytest.raises(script.TrainingError, match=expected):
        script.load_pairs(args, (4, 1, 1), 1000, revision=revision)


def test_checkpoint_contains_the_commit_of_the_current_dataset(script, flags, hub_cache):
    """With the commit of an earlier dataset, the next resume would not find the current one."""
    flags.update(resolution=16, train_batch_size=2, cache_dir=hub_cache)
    run(script, {**flags, "max_train_steps": 1})

    flags.update(dataset_name="me/pairs", resume_from_checkpoint="latest", max_train_steps=2)
    out = run(script, flags)

    assert read_state(out / "checkpoint-2")["dataset_commit"] == 40 * "a"


# Memory of a stream -------------------------------------------------------------------------------------------------
def test_size_of_the_row_groups_in_memory_is_logged(script, flags, tmp_path, caplog):
    """Without columns that are not read."""
    rows = []
    for number in range(6):
        image = random_image(96, 96, seed=number)  # parquet stores equal ones once
        rows.append(make_row(number, jpg_0=image, jpg_1=image, other=os.urandom(2**20)))
    write_parquet(tmp_path / "data" / "train.parquet", [rows[:3], rows[3:]])
    mebibytes = sum(len(row["jpg_0"]) + len(row["jpg_1"]) for row in rows) / 2**20
    flags.update(dataset_name=tmp_path / "data", cache_dir=tmp_path / "cache", max_train_steps=1, resolution=16)

    run(script, {**flags, "streaming": True, "shuffle_shards": 4})

    found = re.search(r"2 row groups of (\S+) MiB on average\. .* keeps 2 of them .*, up to (\S+) MiB", caplog.text)
    assert float(found[1]) == pytest.approx(mebibytes / 2, rel=0.05)
    assert float(found[2]) == pytest.approx(mebibytes, rel=0.05)


def test_stream_keeps_as_many_row_groups_as_it_mixes(script, tmp_path, record_calls):
    pairs = load_pairs(script, write_groups(tmp_path / "data", [12 * [2]]), streaming=True, shuffle_shards=3)
    calls = record_calls(pq.ParquetFile, "read_row_group")

    num_kept = []
    for epoch in range(3):
        calls.clear()
        for pair in script.epoch_order(pairs.index, 0, epoch, script.Layout(3, 1, 4)):
            pairs[script.Visit(0, int(pair))]
            num_kept.append(len(pairs.rows.kept[0]))
        read = [call.args[1] for call in calls]
        # Row groups kept from the epoch before may be used again.
        assert 9 <= len(read) <= 12
        assert len(set(read)) == len(read)
    assert max(num_kept) == 3


@pytest.mark.parametrize(
    ("lanes", "processes", "workers", "bound"),
    [(64, 4, 8, 8), (64, 8, 8, 4), (64, 1, 0, 256), (8, 1, 2, 16)],
)
def test_process_keeps_only_the_row_groups_of_its_own_lanes(script, monkeypatch, lanes, processes, workers, bound):
    """A run with 64 lanes (8 GPUs x 8 workers), resumed on 4 x 8, keeps 2 lanes x 4 row groups in each worker."""
    index = np.array([(shard, row, 0) for shard, row in itertools.product(range(512), range(10))])
    layout = script.Layout(shards_mixed=4, lanes=lanes, turn=2)
    rows = script.StreamedRows(["file"], script.Columns("caption", IMAGES, LABELS), shards_kept=4)
    rows.row_groups = [(0, shard, 0) for shard in range(512)]
    parquet = SimpleNamespace(read_row_group=lambda number, columns: pa.table({"caption": ["a"]}))
    monkeypatch.setattr(script, "open_parquet", lambda file: contextlib.nullcontext(parquet))

    num_kept = []
    for worker in range(max(workers, 1)):
        rows.kept = {}
        batches = script.training_batches(index, 0, layout, 2, 0, process_index=0, num_processes=processes)
        for number, batch in enumerate(itertools.islice(batches, 600)):
            if number % max(workers, 1) != worker:
                continue
            for visit in batch:
                rows.record(index[visit.pair, 0], 0, visit.lane)
                num_kept.append(sum(len(kept) for kept in rows.kept.values()))

    assert max(num_kept) <= bound
    assert max(num_kept) > bound / 4
