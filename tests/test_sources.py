"""Sources of pairs: formats, columns, image files, what is said of those that cannot serve, the index of labels."""

import io
import itertools
import json
import math
import os
import re
import shutil
import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import run
from fsspec.implementations.local import LocalFileOpener
from PIL import Image
from small_world import png
from test_pairs import (
    BOTH_WAYS,
    GROUPS,
    IMAGES,
    LABELS,
    TIED,
    USABLE,
    expected_pair,
    load_pairs,
    make_args,
    make_row,
    random_pixels,
    reason,
    summaries,
    summary,
    visits,
    write_groups,
    write_parquet,
)
from test_training import assert_same


# Sources ------------------------------------------------------------------------------------------------------------
def save_bytes(folder, rows):
    write_parquet(folder / "train.parquet", [rows[:3], rows[3:]])


def save_image_feature(folder, rows):
    table = datasets.Dataset.from_list(rows)
    for name in IMAGES:
        table = table.cast_column(name, datasets.Image())
    folder.mkdir()
    table.to_parquet(folder / "train.parquet")


def write_images(folder, rows):
    """Put the images of the rows into files of `folder`, and their names into the rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for (number, row), name in itertools.product(enumerate(rows), IMAGES):
        (folder / f"{number}-{name}.png").write_bytes(row[name])
        row[name] = f"{number}-{name}.png"


def save_absolute_paths(folder, rows):
    """The Image feature with paths alone, which `to_parquet` would replace by the bytes."""
    folder.mkdir()
    write_images(folder.parent / "images", rows)
    features = {"caption": datasets.Value("string"), **{name: datasets.Image() for name in IMAGES}}
    features = datasets.Features({**features, **{name: datasets.Value("int64") for name in LABELS}})
    for row, name in itertools.product(rows, IMAGES):
        row[name] = {"bytes": None, "path": str(folder.parent / "images" / row[name])}
    pq.write_table(datasets.Dataset.from_list(rows, features=features).data.table, folder / "train.parquet")


def save_imagefolder(folder, rows):
    write_images(folder, rows)
    rows = [{(f"{name}_file_name" if name in IMAGES else name): row[name] for name in row} for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def save_imagefolder_with_parquet(folder, rows):
    write_images(folder, rows)
    rows = [{(f"{name}_file_name" if name in IMAGES else name): row[name] for name in row} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")


def zipped(save, folder, rows):
    save(folder.parent / "unzipped", rows)
    shutil.make_archive(folder / "train", "zip", folder.parent / "unzipped")


def save_zipped_imagefolder(folder, rows):
    zipped(save_imagefolder, folder, rows)


WEBDATASET_COLUMNS = ("caption.txt", "jpg_0.png", "jpg_1.png", "label_0.cls", "label_1.cls")
COLUMN_FLAGS = ("caption_column", "image_0_column", "image_1_column", "label_0_column", "label_1_column")


def save_webdataset(folder, rows):
    folder.mkdir()
    with tarfile.open(folder / "train-000.tar", "w") as tar:
        for number, row in enumerate(rows):
            for value, column in zip(row.values(), WEBDATASET_COLUMNS, strict=True):
                content = value if isinstance(value, bytes) else str(value).encode()
                member = tarfile.TarInfo(f"{number:04d}.{column}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def ordered(rows):
    """(caption, chosen, rejected) of each row."""
    for row in rows:
        first, second = row["jpg_0"], row["jpg_1"]
        yield (row["caption"], first, second) if row["label_0"] else (row["caption"], second, first)


def save_ready_ordered(folder, rows):
    save_bytes(folder, [dict(zip(("caption", "win", "lose"), row)) for row in ordered(rows)])


def save_chosen_files(folder, rows):
    write_images(folder, rows)
    lines = ["caption,chosen_file_name,rejected_file_name", *map(",".join, ordered(rows))]
    (folder / "metadata.csv").write_text("\n".join(lines))


def save_zipped_chosen_files(folder, rows):
    zipped(save_chosen_files, folder, rows)


CHOSEN = {"chosen_column": "chosen", "rejected_column": "rejected"}
LAYOUT_FLAGS = {
    save_webdataset: dict(zip(COLUMN_FLAGS, WEBDATASET_COLUMNS)),
    save_ready_ordered: {"chosen_column": "win", "rejected_column": "lose"},
    save_chosen_files: CHOSEN,
    save_zipped_chosen_files: CHOSEN,
}
STREAMED = [save_bytes, save_image_feature, save_ready_ordered, save_absolute_paths]
PREPARED = [save_imagefolder, save_imagefolder_with_parquet, save_zipped_imagefolder]
PREPARED += [save_chosen_files, save_zipped_chosen_files, save_webdataset, *STREAMED]
LAYOUTS = [*((save, None) for save in PREPARED), *((save, True) for save in STREAMED)]


@pytest.mark.parametrize("save, streaming", LAYOUTS)
def test_any_layout_gives_the_same_pairs(script, tmp_path, save, streaming):
    save(tmp_path / "data", [make_row(number) for number in range(5)])
    found = summaries(script, tmp_path / "data", streaming=streaming, **LAYOUT_FLAGS.get(save, {}))
    assert found == [expected_pair(number) for number in range(5)]


@pytest.mark.parametrize("save", [save_chosen_files, save_zipped_chosen_files])
def test_image_files_train_as_their_bytes_in_parquet_do(script, flags, tmp_path, save):
    """Read by workers, too."""
    outs = []
    for layout, workers in ((save, 2), (save_ready_ordered, None)):
        layout(tmp_path / layout.__name__, [make_row(number) for number in range(9)])
        flags.update(LAYOUT_FLAGS[layout], dataset_name=tmp_path / layout.__name__, dataloader_num_workers=workers)
        flags.update(cache_dir=tmp_path / "cache", output_dir=tmp_path / f"out-{layout.__name__}", resolution=16)
        outs.append(run(script, flags))
    assert_same(*outs)


@pytest.mark.parametrize("save", [save_absolute_paths, save_imagefolder])
def test_a_missing_image_file_is_an_unusable_row(script, tmp_path, save):
    save(tmp_path / "data", [make_row(number) for number in range(3)])
    pairs = load_pairs(script, tmp_path / "data")
    next(tmp_path.glob("*/1-jpg_1.png")).unlink()
    assert [summary(tensors)[0] for tensors in visits(pairs)] == ["pair 0", "pair 2", "pair 2"]


@BOTH_WAYS
def test_pairs_are_tried_before_weights_are_loaded(script, flags, tmp_path, monkeypatch, streaming):
    def refuse(*args):
        raise AssertionError("called")

    monkeypatch.setattr(script, "load_pipeline", refuse)
    flags["dataset_name"] = write_groups(tmp_path / "data", [[6, 6]], bad=range(12))
    with pytest.raises(script.TrainingError, match="no row .* can be used.* has no image"):
        run(script, {**flags, "max_bad_rows": 1, "streaming": streaming})


@BOTH_WAYS
def test_captions_of_more_tokens_than_sdxl_reads_are_counted(script, flags, tmp_path, caplog, streaming):
    """75 tokens, and two for beginning and end, fit. Of a stream, the first row group is counted."""
    rows = [make_row(n, caption=" ".join(["red"] * count)) for n, count in enumerate([3, 76, 1, 75, 90, 5, 200, 75])]
    write_parquet(tmp_path / "data" / "train.parquet", [rows[:5], rows[5:]])
    flags.update(dataset_name=tmp_path / "data", cache_dir=tmp_path / "cache", streaming=streaming, resolution=16)
    flags.update(max_train_steps=2, num_validation_pairs=None if streaming else 2)

    run(script, flags)

    (warning,) = [record.getMessage() for record in caplog.records if "77 tokens" in record.getMessage()]
    assert warning.endswith("] 3 of the first 8 captions have more than 77 tokens; SDXL ignores the rest.")


def test_short_captions_and_those_behind_the_first_1000_are_not_told_of(script, flags, tmp_path, caplog):
    captions = ["red"] * 1000 + ["red " * 200]
    write_parquet(tmp_path / "data" / "train.parquet", [[make_row(1, caption=caption) for caption in captions]])
    flags.update(dataset_name=tmp_path / "data", cache_dir=tmp_path / "cache", max_train_steps=1, resolution=16)
    run(script, flags)
    assert "77 tokens" not in caplog.text


@pytest.mark.parametrize("name", ["pairs[1]", "pairs*", "pair?", "some*/pairs"])
def test_a_folder_with_a_pattern_for_a_name_is_to_be_renamed(script, tmp_path, name):
    """Of datasets' loader: "pairs*" would be read with its neighbours."""
    write_groups(tmp_path / name, [[2]])
    with pytest.raises(script.TrainingError, match="--dataset_name.*rename"):
        load_pairs(script, tmp_path / name)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_paths_in_a_table_of_another_name_are_refused_with_what_to_do(script, tmp_path, kind):
    """What the sentence says makes them pairs."""
    rows = [make_row(number) for number in range(3)]
    write_images(tmp_path / "data", rows)

    def save(name, rows):
        table = datasets.Dataset.from_list(rows)
        write = {"csv": table.to_csv, "jsonl": table.to_json, "parquet": table.to_parquet}[kind]
        write(tmp_path / "data" / f"{name}.{kind}")

    save("train", rows)
    with pytest.raises(script.TrainingError) as error:
        load_pairs(script, tmp_path / "data")
    assert str(error.value) == (
        "--image_0_column: column 'jpg_0' contains strings. If they are paths of images, name the table metadata.csv "
        "(or .jsonl, .parquet), and let the names of its image columns end in _file_name."
    )

    (tmp_path / "data" / f"train.{kind}").unlink()
    save("metadata", [{(f"{name}_file_name" if name in IMAGES else name): row[name] for name in row} for row in rows])
    assert summaries(script, tmp_path / "data") == [expected_pair(number) for number in range(3)]


@BOTH_WAYS
def test_a_split_column_or_format_that_cannot_serve_is_named(script, tmp_path, streaming):
    for number, split in enumerate(("train", "validation", "test")):
        write_parquet(tmp_path / "data" / f"{split}.parquet", [[make_row(number)]])
    for flags, number in (({}, 0), ({"dataset_split_name": "test"}, 2)):
        assert summaries(script, tmp_path / "data", streaming=streaming, **flags)[0][0] == f"pair {number}"
    save_imagefolder(tmp_path / "folder", [make_row(0)])
    for name, flags, sentence in (
        (
            "data",
            {"dataset_split_name": "val"},
            r"--dataset_split_name: .* no split 'val' \(splits: .*'train', 'validation'",
        ),
        ("data", {"validation_split": "val"}, "--validation_split: .* no split 'val'"),
        ("data", {"caption_column": "text"}, r"--caption_column: .* no column 'text' \(columns: .*'caption'"),
        ("data", {"image_0_column": "caption"}, "--image_0_column: column 'caption' contains strings"),
        ("data", {"label_1_column": "jpg_1"}, "label columns .*'label_0', 'jpg_1'.* must contain numbers"),
        ("folder", {"streaming": True}, "--streaming reads parquet files"),
    ):
        with pytest.raises(script.TrainingError, match=sentence):
            load_pairs(script, tmp_path / name, **{"streaming": streaming, **flags})


@BOTH_WAYS
def test_splits_are_joined_and_none_is_both_trained_on_and_held_out(script, tmp_path, streaming):
    numbers = iter(range(6))
    for split in ("train", "validation", "test"):
        write_parquet(tmp_path / "data" / f"{split}.parquet", [[make_row(next(numbers)), make_row(next(numbers))]])
    flags = {"streaming": streaming, "dataset_split_name": "test+train"}
    pairs = load_pairs(script, tmp_path / "data", **flags)
    assert [row["caption"] for row in visits(pairs)] == [f"pair {number}" for number in (4, 5, 0, 1)]
    with pytest.raises(script.TrainingError, match="no split 'val' .*'train', 'validation'"):
        load_pairs(script, tmp_path / "data", streaming=streaming, dataset_split_name="test+val")
    with pytest.raises(script.TrainingError, match="--validation_split train is also trained on"):
        load_pairs(script, tmp_path / "data", **flags, validation_split="train")


# Index --------------------------------------------------------------------------------------------------------------
@BOTH_WAYS
def test_the_index_is_built_from_labels_once(script, tmp_path, monkeypatch, streaming):
    """Counts the bytes that a stream reads; a second start reads no label, and a changed file is read again."""
    images = {name: random_pixels(500_000, seed=number).tobytes() for number, name in enumerate(IMAGES)}
    write_parquet(tmp_path / "data" / "train-0.parquet", [[make_row(number, **images) for number in range(3)]] * 4)
    read, columns, select_columns = [], [], datasets.Dataset.select_columns

    def note_bytes(opened, *args):
        read.append(opened.f.read(*args))
        return read[-1]

    def refuse(*args):
        raise AssertionError("called")

    monkeypatch.setattr(LocalFileOpener, "read", note_bytes, raising=False)
    monkeypatch.setattr(datasets.Dataset, "select_columns", lambda *a: columns.append(a[1]) or select_columns(*a))
    load_pairs(script, tmp_path / "data", streaming=streaming)
    if streaming:
        # Of 12 MB. A parquet reader begins with the last 64 KiB of a file, where its footer is.
        assert 0 < sum(map(len, read)) < 2**17
    else:
        assert columns == [["caption", *IMAGES, *LABELS], ["caption", *LABELS]]
    with monkeypatch.context() as patched:
        patched.setattr(script, "build_index", refuse)
        assert len(load_pairs(script, tmp_path / "data", streaming=streaming).index) == 12
        with pytest.raises(AssertionError, match="called"):
            load_pairs(script, tmp_path / "data", streaming=streaming, **{"no-remove_ties": True})
    write_groups(tmp_path / "data", [[2, 3]], tied={1})
    assert len(load_pairs(script, tmp_path / "data", streaming=streaming).index) == 4


@pytest.mark.parametrize("groups", GROUPS)
def test_samples_and_held_out_pairs_are_the_same_streamed_or_not(script, tmp_path, groups):
    """The first pairs are held out, whatever the seed; a random part of the others is trained on."""
    folder = write_groups(tmp_path / "data", GROUPS[groups], tied=TIED)
    for most, seed in itertools.product((5, 12, 30), (0, 1)):
        found = []
        for streaming in (None, True):
            flags = {"streaming": streaming, "max_train_samples": most, "num_validation_pairs": 3, "seed": seed}
            args = make_args(script, folder, **flags)
            data = [visits(pairs) for pairs in script.load_pairs(args, (4, 1, 1), 1000)]
            found.append([[tensors["caption"] for tensors in pairs] for pairs in data])
        assert found[0] == found[1]
        trained, held_out = found[0]
        assert held_out == USABLE[:3]
        assert trained == [caption for caption in USABLE[3:] if caption in trained] and len(trained) == min(most, 17)
    with pytest.raises(script.TrainingError, match="0 pairs left for training"):
        load_pairs(script, folder, num_validation_pairs=20)


@pytest.mark.parametrize(
    ("number", "held_out", "trained"),
    [(2, [0, 3], [1, 2, 4, 5, 6, 7]), (3, [0, 1, 3], [2, 5, 6, 7]), (4, [0, 1, 3, 4], [2, 5, 6, 7])],
)
def test_captions_are_held_out_as_a_whole(script, tmp_path, caplog, number, held_out, trained):
    """Four captions of two pairs each. Of a caption that is partly held out, no pair is trained on."""
    table = [make_row(n, caption=caption) for n, caption in enumerate("cbacbadd")]
    write_parquet(tmp_path / "data" / "train.parquet", [table])

    args = make_args(script, tmp_path / "data", num_validation_pairs=number)
    found = [pairs.index[:, 1].tolist() for pairs in script.load_pairs(args, (4, 1, 1), 1000)]

    assert found == [trained, held_out]
    assert ("1 training pairs are left out" in caplog.text) == (number == 3)


def test_training_pairs_with_captions_of_the_validation_split_are_left_out(script, tmp_path, caplog):
    for split, numbers in (("train", range(6)), ("validation", [1, 4, 9])):
        write_parquet(tmp_path / "data" / f"{split}.parquet", [[make_row(number) for number in numbers]])

    args = make_args(script, tmp_path / "data", validation_split="validation")
    trained, _ = script.load_pairs(args, (4, 1, 1), 1000)

    assert trained.index[:, 1].tolist() == [0, 2, 3, 5]
    assert "2 training pairs are left out" in caplog.text


def test_dataset_may_be_the_current_folder_but_not_a_file(script, tmp_path, monkeypatch):
    write_groups(tmp_path / "data", [[3]])
    monkeypatch.chdir(tmp_path / "data")

    assert summaries(script, tmp_path / "data", dataset_name=".") == [expected_pair(number) for number in range(3)]
    with pytest.raises(script.TrainingError, match="train-0.parquet is a file. Give the folder that contains it."):
        load_pairs(script, tmp_path / "data", dataset_name="train-0.parquet")


@pytest.fixture
def hub_dataset(tmp_path):
    """A cache that holds a prepared dataset of the hub, `me/pairs`, at commit a..., which cannot be reached."""
    folder = write_groups(tmp_path / "local", [[4]])
    builder = datasets.load_dataset_builder(str(folder), cache_dir=str(tmp_path / "cache"))
    builder.download_and_prepare()
    cached = tmp_path / "cache" / "me___pairs" / "default" / "0.0.0" / (40 * "a")
    shutil.copytree(builder.cache_dir, cached)
    for file in cached.glob("*-train.arrow"):
        file.rename(file.with_name("pairs-train.arrow"))
    return tmp_path / "cache"


def test_dataset_of_the_hub_is_used_from_the_cache_at_the_commit_of_the_run(script, tmp_path, hub_dataset):
    flags = {"dataset_name": "me/pairs", "cache_dir": hub_dataset}
    args = make_args(script, tmp_path / "none", **flags)

    pairs, _ = script.load_pairs(args, (4, 1, 1), 1000)

    assert [summary(tensors) for tensors in visits(pairs)] == [expected_pair(number) for number in range(4)]
    assert pairs.split.commit == 40 * "a"
    script.load_pairs(args, (4, 1, 1), 1000, revision=40 * "a")
    with pytest.raises(script.TrainingError, match="the run used commit b+, which is not available"):
        script.load_pairs(args, (4, 1, 1), 1000, revision=40 * "b")
    with pytest.raises(script.TrainingError, match="--streaming: me/pairs cannot be reached"):
        script.load_pairs(make_args(script, tmp_path / "none", streaming=True, **flags), (4, 1, 1), 1000)


def test_run_that_resumes_on_another_dataset_keeps_the_commit_of_that_one(script, flags, hub_dataset):
    """With the commit of the first one, the next resume would not find the new one."""
    flags.update(resolution=16, train_batch_size=2, cache_dir=hub_dataset)
    run(script, {**flags, "max_train_steps": 1})
    changes = {"dataset_name": "me/pairs", "resume_from_checkpoint": "latest", "max_train_steps": 2}

    out = run(script, {**flags, **changes})

    assert json.loads((out / "checkpoint-2" / "mapo_state.json").read_text())["dataset_commit"] == 40 * "a"


def test_every_pair_is_as_likely_to_be_sampled(script, monkeypatch):
    """At 1,000 seeds; the bound is 4.5 standard deviations."""
    index, seen = np.stack([np.zeros(20, int), np.arange(20), np.arange(20)], axis=1), np.zeros(20)
    split = script.Split(["train"], None, index, fingerprint=[], commit=None)
    monkeypatch.setattr(script, "open_split", lambda *args: split)
    args = make_args(script, max_train_samples=5)
    for args.seed in range(1000):
        sample = script.load_pairs(args, (4, 1, 1), 1000)[0].index
        seen[sample[:, 1]] += 1
    assert seen.sum() == 5000 and (np.abs(seen - 250) < 4.5 * math.sqrt(250 * 0.75)).all()


def test_a_held_out_split_is_not_sampled(script, tmp_path):
    for split, size in (("train", 9), ("validation", 6)):
        write_parquet(
            tmp_path / "data" / f"{split}.parquet",
            [[make_row(number, caption=f"{split} {number}") for number in range(size)]],
        )
    args = make_args(script, tmp_path / "data", max_train_samples=4, validation_split="validation")
    index, held_out = (pairs.index for pairs in script.load_pairs(args, (4, 1, 1), 1000))
    assert len(index) == 4 and held_out[:, 1].tolist() == [0, 1, 2, 3, 4, 5]


LABEL_TABLES = {
    pa.bool_(): [(True, False), (True, True), (False, False), (False, True), (None, None), (None, True)],
    pa.float32(): [(0.51, 0.49), (0.5, 0.5), (0.0, -0.0), (-2.0, -1.5), (math.nan, math.nan), (None, 1.0)],
}


@BOTH_WAYS
@pytest.mark.parametrize("dtype", LABEL_TABLES, ids=str)
def test_the_higher_label_wins_ties_are_dropped_and_nulls_are_no_ties(script, tmp_path, dtype, streaming):
    names = [("caption", pa.string()), *((name, pa.binary()) for name in IMAGES), *((name, dtype) for name in LABELS)]
    rows = [make_row(number, label_0=a, label_1=b) for number, (a, b) in enumerate(LABEL_TABLES[dtype])]
    folder = write_parquet(tmp_path / "data" / "train.parquet", [rows], pa.schema(names))
    pairs = load_pairs(script, folder, streaming=streaming)
    assert [row for _, row, _ in pairs.index] == [0, 3, 4, 5]
    expected = [("pair 0", (0, 0, 1), (0, 1, 0)), ("pair 3", (3, 1, 0), (3, 0, 1))]
    assert [summary(pairs[script.Visit(0, number)]) for number in (0, 1)] == expected
    for place in pairs.index[2:]:
        assert reason(script, pairs.rows.record(*place[:2], lane=0)) == "has no label_0"
    kept = load_pairs(script, folder, streaming=streaming, **{"no-remove_ties": True})
    assert [row for _, row, _ in kept.index] == list(range(6))


def test_a_stream_says_what_it_keeps_in_memory(script, flags, tmp_path, caplog):
    """The columns that are not read do not count."""
    rows = [make_row(number) for number in range(6)]
    for row in rows:
        row["jpg_0"] = row["jpg_1"] = png(Image.frombytes("RGB", (96, 96), os.urandom(3 * 96 * 96)))
        row["other"] = os.urandom(2**20)
    write_parquet(tmp_path / "data" / "train.parquet", [rows[:3], rows[3:]])
    images = sum(len(row[name]) for row in rows for name in IMAGES) / 2**20
    flags.update(dataset_name=tmp_path / "data", cache_dir=tmp_path / "cache", max_train_steps=1, resolution=16)

    run(script, {**flags, "streaming": True, "shuffle_shards": 4})

    found = re.search(r"2 row groups, on average (\S+) MiB\. .* keeps 2 of them .*: up to (\S+) MiB", caplog.text)
    assert float(found[1]) == pytest.approx(images / 2, rel=0.05)
    assert float(found[2]) == pytest.approx(images, rel=0.05)


def test_a_stream_keeps_as_many_row_groups_as_it_mixes(script, tmp_path, monkeypatch):
    folder, read, held = write_groups(tmp_path / "data", [12 * [2]]), [], []
    pairs = load_pairs(script, folder, streaming=True, shuffle_shards=3)
    read_row_group = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda *a: read.append(a[1]) or read_row_group(*a))
    for epoch in range(3):
        for pair in script.epoch_order(pairs.index, 0, epoch, script.Layout(3, 1, 4)):
            pairs[script.Visit(0, int(pair))]
            held.append(len(pairs.rows.kept[0]))
        # Those kept from the epoch before may be used again.
        assert 9 <= len(read) <= 12 and len(set(read)) == len(read)
        read.clear()
    assert max(held) == 3
