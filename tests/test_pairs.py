"""From a stored row to the tensors of a visit: sources, order of a pair, pixels, randomness, streams and bad rows."""

import gc
import io
import itertools
import json
import logging
import math
import tarfile
import threading
import time
import zlib
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import command_line, launch, launch_recorded, run, scalars
from diffusers import UNet2DConditionModel
from PIL import Image, ImageDraw


LABELS = ("label_0", "label_1")
RED, BLUE = (255, 0, 0), (0, 0, 255)
IMAGE_COLUMNS = {"jpg_0": datasets.Image(), "jpg_1": datasets.Image()}
WEBDATASET_FLAGS = {
    "caption_column": "caption.txt",
    "image_0_column": "jpg_0.png",
    "image_1_column": "jpg_1.png",
    "label_0_column": "label_0.cls",
    "label_1_column": "label_1.cls",
}
# Row groups of a streamed data set, which are its shards.
GROUPS = {"one": [[24]], "even": [[6, 6], [6, 6]], "uneven": [[7, 1], [5, 2], [9]]}


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def flat(colour, size=(8, 8)):
    return encode(Image.new("RGB", size, colour))


def make_row(index, **changes):
    """A pair whose images tell which it is; the first image is the chosen one of odd rows."""
    row = {
        "caption": f"pair {index}",
        "jpg_0": flat((index, 0, 1)),
        "jpg_1": flat((index, 1, 0)),
        "label_0": index % 2,
        "label_1": 1 - index % 2,
    }
    return {**row, **changes}


def expected_pair(index):
    """(caption, chosen colour, rejected colour) of `make_row(index)`."""
    colours = [(index, 1, 0), (index, 0, 1)]
    return f"pair {index}", *(colours[::-1] if index % 2 else colours)


def write_parquet(file, groups, schema=None):
    """One parquet file with the given row groups (lists of rows)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    schema = schema or pa.Table.from_pylist([row for group in groups for row in group]).schema
    with pq.ParquetWriter(file, schema) as writer:
        for group in groups:
            writer.write_table(pa.Table.from_pylist(group, schema=schema), row_group_size=max(len(group), 1))
    return file.parent


def write_groups(folder, sizes, tied=(), bad=()):
    """Files of row groups of the given sizes, rows numbered through; `tied` and `bad` (no image) rows among them."""
    numbers = itertools.count()
    for index, file_sizes in enumerate(sizes):
        groups = []
        for size in file_sizes:
            rows = [make_row(number) for number in itertools.islice(numbers, size)]
            for row in rows:
                number = int(row["caption"].split()[1])
                row.update({"label_0": 1, "label_1": 1} if number in tied else {})
                row.update({"jpg_1": b""} if number in bad else {})
            groups.append(rows)
        write_parquet(folder / f"train-{index}.parquet", groups)
    return folder


def make_args(script, folder="none", **flags):
    flags = {
        "pretrained_model_name_or_path": "none",
        "dataset_name": folder,
        "seed": 0,
        "resolution": 8,
        "cache_dir": None if folder == "none" else folder.parent / "cache",
        "max_train_steps": 1,
        **flags,
    }
    # False is a switch that is not given.
    return script.parse_args(command_line({name: value for name, value in flags.items() if value is not False}))


def make_pairs(script, rows, **flags):
    """The `PairDataset` of hand-made rows."""
    return script.PairDataset(make_args(script, **flags), rows, (4, 1, 1), 1000)


def make_stream(script, folder, rank=0, num_processes=1, left_out=(), **flags):
    args = make_args(script, folder, streaming=True, **{"shuffle_buffer_size": 4, **flags})
    return script.PairStream(args, script.load_all_pairs(args)[0], left_out, rank, num_processes)


def visit_row(script, row, held_out=False, **flags):
    """The tensors of one visit of one hand-made row; a row that cannot be used gives its reason."""
    return make_pairs(script, [row], **flags)[script.Visit(0, held_out=held_out)][1]


def colour_of(pixels):
    assert (pixels == pixels[:, :1, :1]).all()
    return tuple(pixels[:, 0, 0].tolist())


def summary(tensors):
    return tensors["captions"], *(colour_of(pixels) for pixels in tensors["pixel_values"])


def captions(visits):
    return [visit.record["caption"] for visit in visits]


def epochs_of(visits, count):
    """The visits of an endless stream in epochs 1 to `count`."""
    return list(itertools.takewhile(lambda visit: visit.cursor["epoch"] <= count, visits))


def stream_in_order(script, args, dataset):
    stream = script.PairStream(args, dataset)
    return [visit for shard in range(dataset.num_shards) for visit in stream.shard_visits(shard)]


def read_all(script, args):
    """Tensors of every usable row of the data set that `args` name, in its order."""
    dataset, _ = script.load_all_pairs(args)
    if args.streaming:
        visits = stream_in_order(script, args, dataset)
    else:
        visits = [script.Visit(int(row)) for row in script.usable_rows(args, dataset)]
    pairs = script.PairDataset(args, dataset, (4, 1, 1), 1000)
    return [pairs[visit][1] for visit in visits]


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]) if isinstance(value, torch.Tensor) else value == right[name], name


# Sources ------------------------------------------------------------------------------------------------------------


def save_bytes(folder, rows):
    write_parquet(folder / "train.parquet", [rows])


def save_large_binary(folder, rows):
    names = [("caption", pa.large_string()), ("jpg_0", pa.large_binary()), ("jpg_1", pa.large_binary())]
    write_parquet(folder / "t.parquet", [rows], pa.schema([*names, *((label, pa.int8()) for label in LABELS)]))


def save_image_feature(folder, rows):
    table = datasets.Dataset.from_list(rows)
    for name, feature in IMAGE_COLUMNS.items():
        table = table.cast_column(name, feature)
    folder.mkdir()
    table.to_parquet(folder / "train.parquet")


def save_image_paths(folder, rows):
    """The Image feature with paths alone, which `to_parquet` would replace by the bytes."""
    folder.mkdir()
    for index, row in enumerate(rows):
        for name in IMAGE_COLUMNS:
            (folder.parent / f"{index}-{name}.png").write_bytes(row[name])
            row[name] = {"bytes": None, "path": str(folder.parent / f"{index}-{name}.png")}
    label = datasets.Value("int64")
    features = {"caption": datasets.Value("string"), **IMAGE_COLUMNS, "label_0": label, "label_1": label}
    table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    pq.write_table(table.data.table, folder / "train.parquet")


def save_imagefolder(folder, rows):
    folder.mkdir()
    lines = []
    for index, row in enumerate(rows):
        for name in IMAGE_COLUMNS:
            (folder / f"{index}-{name}.png").write_bytes(row.pop(name))
            row[f"{name}_file_name"] = f"{index}-{name}.png"
        lines.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def save_webdataset(folder, rows):
    folder.mkdir()
    with tarfile.open(folder / "train-000.tar", "w") as tar:
        for index, row in enumerate(rows):
            for name, column in zip(row, WEBDATASET_FLAGS.values(), strict=True):
                content = row[name] if isinstance(row[name], bytes) else str(row[name]).encode()
                member = tarfile.TarInfo(f"{index:04d}.{column}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def save_arrow(folder, rows):
    datasets.Dataset.from_list(rows).save_to_disk(folder.parent / "saved")
    folder.mkdir()
    (folder.parent / "saved" / "data-00000-of-00001.arrow").rename(folder / "train.arrow")


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize(
    "save, flags",
    [
        (save_bytes, {}),
        (save_large_binary, {}),
        (save_image_feature, {}),
        (save_image_paths, {}),
        (save_imagefolder, {}),
        (save_webdataset, WEBDATASET_FLAGS),
        (save_arrow, {}),
    ],
)
def test_any_layout_gives_the_same_pairs(script, tmp_path, save, flags, streaming):
    save(tmp_path / "data", [make_row(index) for index in range(5)])
    read = read_all(script, make_args(script, tmp_path / "data", streaming=streaming, **flags))
    assert [summary(tensors) for tensors in read] == [expected_pair(index) for index in range(5)]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("save", [save_bytes, save_image_feature])
def test_image_columns_stay_encoded_until_a_visit(script, tmp_path, save, streaming):
    save(tmp_path / "data", [make_row(3)])
    args = make_args(script, tmp_path / "data", streaming=streaming)
    dataset, _ = script.load_all_pairs(args)
    value = next(iter(dataset))["jpg_0"]
    assert (value["bytes"] if isinstance(value, dict) else value) == flat((3, 0, 1))
    assert sorted(dataset.features) == ["caption", "jpg_0", "jpg_1", *LABELS]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_every_column_has_its_flag(script, tmp_path, streaming):
    names = {"caption": "text", "jpg_0": "a", "jpg_1": "b", "label_0": "score a", "label_1": "score b"}
    rows = [{names[name]: value for name, value in make_row(index).items()} for index in range(3)]
    flag_names = ("caption_column", "image_0_column", "image_1_column", "label_0_column", "label_1_column")
    save_bytes(tmp_path / "data", [{**row, "more": 1.5} for row in rows])
    flags = dict(zip(flag_names, names.values(), strict=True))
    read = read_all(script, make_args(script, tmp_path / "data", streaming=streaming, **flags))
    assert [summary(tensors) for tensors in read] == [expected_pair(index) for index in range(3)]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_ready_ordered_pairs_need_no_label(script, tmp_path, streaming):
    rows = [{"caption": f"pair {i}", "win": flat((i, 1, 0)), "lose": flat((i, 0, 1))} for i in range(4)]
    save_bytes(tmp_path / "data", rows)
    flags = {"chosen_column": "win", "rejected_column": "lose", "streaming": streaming}
    read = read_all(script, make_args(script, tmp_path / "data", **flags))
    assert [summary(tensors) for tensors in read] == [(f"pair {i}", (i, 1, 0), (i, 0, 1)) for i in range(4)]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize(
    "splits, named, taken",
    [
        (["train"], None, "train"),
        (["validation"], None, "validation"),
        (["train", "validation", "test"], None, "train"),
        (["train", "validation", "test"], "test", "test"),
        (["validation", "test"], "validation", "validation"),
    ],
)
def test_split(script, tmp_path, splits, named, taken, streaming):
    for index, split in enumerate(splits):
        write_parquet(tmp_path / "data" / f"{split}.parquet", [[make_row(index, caption=split)]])
    read = read_all(script, make_args(script, tmp_path / "data", dataset_split_name=named, streaming=streaming))
    assert [tensors["captions"] for tensors in read] == [taken]


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ({}, "--dataset_split_name: .* has no split 'train', but validation, test"),
        ({"dataset_split_name": "val"}, "--dataset_split_name: .* has no split 'val', but validation, test"),
        ({"dataset_split_name": "test", "validation_split": "val"}, "--validation_split: .* has no split 'val'"),
    ],
)
def test_a_split_that_is_not_there_is_named(script, tmp_path, flags, sentence):
    for split in ("validation", "test"):
        write_parquet(tmp_path / "data" / f"{split}.parquet", [[make_row(0)]])
    with pytest.raises(script.TrainingError, match=sentence):
        script.load_all_pairs(make_args(script, tmp_path / "data", **flags))


def test_configuration(script, flags, tmp_path):
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in ("small", "large"))
    for index, name in enumerate(("small", "large")):
        write_parquet(tmp_path / "data" / name / "part.parquet", [[make_row(index)]])
    (tmp_path / "data" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    read = read_all(script, make_args(script, tmp_path / "data", dataset_config_name="large"))
    assert [tensors["captions"] for tensors in read] == ["pair 1"]
    with pytest.raises(script.TrainingError, match="--dataset_name .* cannot be read: (?s:.*)small"):
        run(script, {**flags, "dataset_name": tmp_path / "data"})


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize(
    "flags, changes, sentence",
    [
        ({"caption_column": "text"}, {}, "--caption_column text: .* no such column, but caption"),
        ({"image_1_column": "png"}, {}, "--image_1_column png: .* no such column"),
        ({"label_0_column": "l"}, {}, "--label_0_column l: .* no such column"),
        ({"chosen_column": "win", "rejected_column": "jpg_1"}, {}, "--chosen_column win: .* no such column"),
        ({}, {"caption": 3}, "--caption_column caption holds .*int64"),
        ({}, {"jpg_0": "0.png"}, "--image_0_column jpg_0 holds .*string"),
        ({}, {"label_1": "yes"}, "--label_1_column label_1 holds .*string"),
    ],
)
def test_a_column_that_cannot_serve_is_named(script, tmp_path, flags, changes, sentence, streaming):
    save_bytes(tmp_path / "data", [make_row(0, **changes)])
    with pytest.raises(script.TrainingError, match=sentence):
        script.load_all_pairs(make_args(script, tmp_path / "data", streaming=streaming, **flags))


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("content", [None, b"", b"PAR1 this is no parquet PAR1"], ids=["nothing", "empty", "junk"])
def test_a_data_set_that_cannot_be_read_is_one_sentence(script, flags, tmp_path, content, streaming):
    (tmp_path / "data").mkdir()
    if content is not None:
        (tmp_path / "data" / "train.parquet").write_bytes(content)
    with pytest.raises(script.TrainingError, match="--dataset_name .* cannot be read"):
        run(script, {**flags, "dataset_name": tmp_path / "data", "streaming": streaming or None})


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("most", [1, 5, 12, 21, 24, 30])
def test_max_train_samples_counts_rows(script, tmp_path, most, streaming):
    """Row groups of different sizes: none may fall short of an equal share of the samples."""
    folder = write_groups(tmp_path / "data", GROUPS["uneven"])
    read = read_all(script, make_args(script, folder, max_train_samples=most, streaming=streaming))
    assert len({tensors["captions"] for tensors in read}) == len(read) == min(most, 24)


# Which image is the chosen one --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lower, higher",
    [(0, 1), (-2, -1), (3, 7), (0.0, 1.0), (0.49, 0.51), (-1.5, 0.0), (False, True), (0, 0.5), (0.0, math.inf)],
)
def test_the_higher_label_wins_on_both_sides(script, lower, higher):
    row = make_row(0, jpg_0=flat(RED), jpg_1=flat(BLUE))
    assert summary(visit_row(script, {**row, "label_0": higher, "label_1": lower}))[1:] == (RED, BLUE)
    assert summary(visit_row(script, {**row, "label_0": lower, "label_1": higher}))[1:] == (BLUE, RED)


LABEL_TABLES = {
    "int": (pa.int64(), [(1, 0), (1, 1), (0, 0), (0, 1), (None, None), (None, 1)]),
    "uint8": (pa.uint8(), [(1, 0), (1, 1), (0, 0), (0, 1), (None, None), (None, 1)]),
    "float32": (pa.float32(), [(1.0, 0.0), (0.5, 0.5), (0.0, 0.0), (0.0, 1.0), (math.nan, math.nan), (None, 1.0)]),
    "float16": (pa.float16(), [(1.0, 0.0), (0.5, 0.5), (0.0, -0.0), (0.0, 1.0), (math.nan, math.nan), (None, 1.0)]),
    "bool": (pa.bool_(), [(True, False), (True, True), (False, False), (False, True), (None, None), (None, True)]),
}


def write_labels(file, kind):
    dtype, labels = LABEL_TABLES[kind]
    rows = [make_row(i, label_0=label_0, label_1=label_1) for i, (label_0, label_1) in enumerate(labels)]
    names = [("caption", pa.string()), ("jpg_0", pa.binary()), ("jpg_1", pa.binary())]
    schema = pa.schema([*names, *((label, dtype) for label in LABELS)])
    if dtype == pa.float16():
        # Arrow makes half floats from NumPy's alone.
        rows = [{**row, **{name: np.float16(row[name]) for name in LABELS if row[name] is not None}} for row in rows]
    return write_parquet(file, [rows], schema)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("kind", LABEL_TABLES)
def test_ties_are_dropped_and_broken_labels_are_not_ties(script, tmp_path, kind, streaming):
    folder = write_labels(tmp_path / "data" / "train.parquet", kind)
    read = read_all(script, make_args(script, folder, streaming=streaming))
    assert [summary(tensors) for tensors in read[:2]] == [
        ("pair 0", (0, 0, 1), (0, 1, 0)),
        ("pair 3", (3, 1, 0), (3, 0, 1)),
    ]
    assert read[2:] == ["has no label_0", "has no label_0"]
    kept = read_all(script, make_args(script, folder, streaming=streaming, **{"no-remove_ties": True}))
    assert [tensors["captions"] for tensors in kept[:4]] == [f"pair {i}" for i in range(4)]
    assert kept[4:] == ["has no label_0", "has no label_0"]


@pytest.mark.parametrize("tie, decided", [((1, 1.0), (1, 0.5)), ((True, 1), (True, 0)), ((False, 0.0), (True, 0.5))])
def test_labels_of_different_types_are_compared(script, tmp_path, tie, decided):
    rows = [make_row(i, **dict(zip(LABELS, labels, strict=True))) for i, labels in enumerate((tie, decided))]
    save_bytes(tmp_path / "data", rows)
    for streaming in (False, True):
        read = read_all(script, make_args(script, tmp_path / "data", streaming=streaming))
        assert [summary(tensors) for tensors in read] == [("pair 1", (1, 0, 1), (1, 1, 0))]


class LabelsOnly:
    """A map-style data set from which only whole columns can be read; remembers which."""

    def __init__(self, dataset):
        self.dataset, self.read = dataset, set()

    def __len__(self):
        return len(self.dataset)

    def select_columns(self, names):
        self.read.update(names)
        return self.dataset.select_columns(names)


def test_ties_are_found_without_reading_an_image(script, tmp_path):
    folder = write_groups(tmp_path / "data", [[6, 6]], tied={0, 7, 11})
    args = make_args(script, folder)
    dataset = LabelsOnly(script.load_all_pairs(args)[0])
    assert script.usable_rows(args, dataset).tolist() == [1, 2, 3, 4, 5, 6, 8, 9, 10]
    assert dataset.read == set(LABELS)


def chosen_first(script, rows, epoch, **flags):
    """For each row, whether its first image (red) came out as the chosen one."""
    pairs = make_pairs(script, rows, **flags)
    positions = range(epoch * len(rows), (epoch + 1) * len(rows))
    colours = [summary(pairs[script.Visit(row, position)][1])[1:] for row, position in enumerate(positions)]
    assert all(pair in ((RED, BLUE), (BLUE, RED)) for pair in colours)
    return np.array([pair[0] == RED for pair in colours])


def test_kept_ties_are_ordered_at_random_at_each_visit(script):
    rows = 600 * [make_row(0, jpg_0=flat(RED), jpg_1=flat(BLUE), label_0=0.5, label_1=0.5)]
    first, second, again = (chosen_first(script, rows, epoch, **{"no-remove_ties": True}) for epoch in (1, 2, 1))
    # Four standard deviations of a fair coin thrown 600 times.
    for share in (first.mean(), second.mean(), (first == second).mean()):
        assert abs(share - 0.5) < 4 * 0.5 / math.sqrt(600)
    assert (first == again).all()


@pytest.mark.parametrize("ready", [False, True], ids=["labels", "ready-ordered"])
@pytest.mark.parametrize("probability", [0, 1, 0.3])
def test_label_noise_swaps_this_share(script, probability, ready):
    flags = {"chosen_column": "jpg_0", "rejected_column": "jpg_1"} if ready else {}
    rows = 600 * [make_row(0, jpg_0=flat(RED), jpg_1=flat(BLUE), label_0=1, label_1=0)]
    swapped = [~chosen_first(script, rows, epoch, label_noise_prob=probability, **flags) for epoch in (1, 2)]
    for share in (swapped[0].mean(), swapped[1].mean()):
        assert abs(share - probability) <= 4 * math.sqrt(probability * (1 - probability) / 600)
    # 0.3 x 0.7 + 0.7 x 0.3 of the visits differ.
    assert (swapped[0] == swapped[1]).all() or abs((swapped[0] != swapped[1]).mean() - 0.42) < 0.09
    assert (swapped[0] == swapped[1]).all() == (probability in (0, 1))


def test_held_out_pairs_know_no_noise_flip_or_random_crop(script):
    pixels = np.random.default_rng(0).integers(256, size=(16, 40, 3), dtype=np.uint8)
    row = make_row(0, jpg_0=encode(Image.fromarray(pixels)), label_0=1, label_1=0)
    pairs = make_pairs(script, 20 * [row], resolution=16, random_crop=True, label_noise_prob=1)
    for index in range(20):
        tensors = pairs[script.Visit(index, index, held_out=True)][1]
        assert np.array_equal(tensors["pixel_values"][0].permute(1, 2, 0), pixels[:, 12:28])
        assert tensors["add_time_ids"].tolist() == [16, 40, 0, 12, 16, 16]


# Decoding -----------------------------------------------------------------------------------------------------------


def on_white(pixels, alpha):
    """Alpha compositing on white in exact arithmetic."""
    alpha = np.asarray(alpha, dtype=np.float64)[..., None] / 255
    return np.asarray(pixels, dtype=np.float64) * alpha + 255 * (1 - alpha)


def random_pixels(*shape, seed=0, high=256):
    return np.random.default_rng(seed).integers(high, size=shape, dtype=np.uint8)


def transparent_images():
    """(name, encoded bytes, expected pixels) of images with every kind of transparency."""
    rgba, la, index = random_pixels(6, 5, 4), random_pixels(6, 5, 2), random_pixels(6, 5, high=4)
    palette = random_pixels(4, 3, seed=1)
    alphas = np.array([0, 80, 200, 255], dtype=np.uint8)
    paletted = Image.fromarray(index, "L").convert("L")
    paletted = Image.frombytes("P", paletted.size, paletted.tobytes())
    paletted.putpalette(palette.tobytes())
    grey = random_pixels(6, 5, high=3) * 100
    keyed = np.where(index[..., None] == 2, np.array([9, 8, 7], dtype=np.uint8), 255 - palette[index])
    yield "RGBA", encode(Image.fromarray(rgba)), on_white(rgba[..., :3], rgba[..., 3])
    yield "LA", encode(Image.fromarray(la, "LA")), on_white(la[..., :1].repeat(3, 2), la[..., 1])
    yield "P index", encode(paletted, transparency=2), on_white(palette[index], 255 * (index != 2))
    yield "P alphas", encode(paletted, transparency=alphas.tobytes()), on_white(palette[index], alphas[index])
    yield "GIF", encode(paletted, "GIF", transparency=2), on_white(palette[index], 255 * (index != 2))
    yield (
        "L key",
        encode(Image.fromarray(grey), transparency=100),
        on_white(grey[..., None].repeat(3, 2), 255 * (grey != 100)),
    )
    yield (
        "RGB key",
        encode(Image.fromarray(keyed), transparency=(9, 8, 7)),
        on_white(keyed, 255 * (keyed != (9, 8, 7)).any(axis=2)),
    )
    webp = encode(Image.fromarray(rgba), "WEBP", lossless=True, exact=True)
    yield "WebP", webp, on_white(rgba[..., :3], rgba[..., 3])


@pytest.mark.parametrize("name, encoded, expected", [pytest.param(*case, id=case[0]) for case in transparent_images()])
def test_transparency_is_laid_on_white(script, name, encoded, expected):
    image = script.decode_image(encoded)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image) - expected).max() <= 1


def opaque_images():
    rgb, grey, bits = random_pixels(6, 5, 3), random_pixels(6, 5), random_pixels(6, 5, high=2)
    paletted = Image.fromarray(rgb).quantize(256)
    deep = np.random.default_rng(2).integers(2**16, size=(6, 5), dtype=np.uint16)
    cmyk = encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    yield "RGB", encode(Image.fromarray(rgb)), rgb, 0
    yield "L", encode(Image.fromarray(grey)), grey[..., None].repeat(3, 2), 0
    yield "1", encode(Image.fromarray(bits * 255).convert("1")), 255 * bits[..., None].repeat(3, 2), 0
    yield "P", encode(paletted), np.asarray(paletted.convert("RGB")), 0
    yield "16 bits", encode(Image.fromarray(deep)), (deep / 257)[..., None].repeat(3, 2), 1
    yield "CMYK JPEG", cmyk, np.broadcast_to([255, 0, 0], (8, 8, 3)), 2
    yield "JPEG", encode(Image.new("RGB", (8, 8), (200, 90, 30)), "JPEG"), np.full((8, 8, 3), (200, 90, 30)), 2
    yield "WebP", encode(Image.fromarray(rgb), "WEBP", lossless=True), rgb, 0
    yield "BMP", encode(Image.fromarray(rgb), "BMP"), rgb, 0


@pytest.mark.parametrize(
    "encoded, expected, tolerance", [pytest.param(*case[1:], id=case[0]) for case in opaque_images()]
)
def test_every_mode_becomes_rgb(script, encoded, expected, tolerance):
    image = script.decode_image(encoded)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image, dtype=np.float64) - expected).max() <= tolerance


# How the letters of the stored image lie once it is upright, after the Exif standard.
UPRIGHT = {
    1: ["abc", "def"],
    2: ["cba", "fed"],
    3: ["fed", "cba"],
    4: ["def", "abc"],
    5: ["ad", "be", "cf"],
    6: ["da", "eb", "fc"],
    7: ["fc", "eb", "da"],
    8: ["cf", "be", "ad"],
}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(script, orientation, kind):
    levels = {letter: 20 + 40 * index for index, letter in enumerate("abcdef")}
    stored = np.array([[levels[letter] for letter in line] for line in UPRIGHT[1]], dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(stored.repeat(16, 0).repeat(16, 1)).convert("RGB")
    upright = np.asarray(script.decode_image(encode(image, kind, exif=exif)))[8::16, 8::16, 0].astype(int)
    expected = np.array([[levels[letter] for letter in line] for line in UPRIGHT[orientation]])
    assert upright.shape == expected.shape
    assert np.abs(upright - expected).max() <= 3


def test_micro_conditioning_has_the_upright_size(script):
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = encode(Image.new("RGB", (40, 16)), exif=exif)
    tensors = visit_row(script, make_row(0, jpg_0=lying, jpg_1=lying), resolution=16, no_hflip=True)
    assert tensors["add_time_ids"].tolist() == [40, 16, 12, 0, 16, 16]


NOISE = random_pixels(24, 24, 3)
PNG, JPEG = encode(Image.fromarray(NOISE)), encode(Image.fromarray(NOISE), "JPEG")


@pytest.mark.parametrize(
    "value, reason",
    [
        (None, "has no image"),
        (b"", "has no image"),
        ({"bytes": None, "path": None}, "has no image"),
        ({"bytes": b"", "path": None}, "has no image"),
        ({"bytes": None, "path": "/nowhere/at-all.png"}, "cannot be decoded"),
        ({"bytes": None, "path": "/"}, "cannot be decoded"),
        (random_pixels(500).tobytes(), "cannot be decoded"),
        (b"<html>404</html>", "cannot be decoded"),
        (PNG[:-600], "cannot be decoded"),
        (PNG[:30], "cannot be decoded"),
        (JPEG[: len(JPEG) // 2], "cannot be decoded"),
        ({"bytes": JPEG[:100], "path": "name.jpg"}, "cannot be decoded"),
    ],
)
@pytest.mark.parametrize("column", IMAGE_COLUMNS)
def test_a_broken_image_is_a_reason_not_an_error(script, value, reason, column):
    with pytest.raises(script.UnusableRow, match=reason):
        script.decode_image(value)
    assert reason in visit_row(script, make_row(0, **{column: value}))


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"caption": None}, "has None for a caption"),
        ({"label_0": None}, "has no label_0"),
        ({"label_1": None}, "has no label_1"),
        ({"label_0": math.nan}, "has no label_0"),
        ({"label_1": math.nan, "label_0": 1.0}, "has no label_1"),
    ],
)
def test_a_null_is_a_reason_not_an_error(script, changes, reason):
    assert visit_row(script, make_row(0, **changes)) == reason
    assert visit_row(script, make_row(0, **changes), held_out=True) == reason


def test_an_empty_caption_is_a_caption(script):
    assert visit_row(script, make_row(0, caption=""))["captions"] == ""


def png_chunk(kind, content):
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


@pytest.mark.parametrize("width, height", [(10_000, 10_000), (100_000, 100_000), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_refused_by_its_header(script, width, height):
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    bomb = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(1000)))
    with pytest.raises(script.UnusableRow, match="(?i)bomb"):
        script.decode_image(bomb + png_chunk(b"IEND", b""))


@pytest.mark.parametrize("size, refused", [((10, 10), False), ((101, 1), True), ((11, 10), True), ((50, 50), True)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_limit_of_bombs_is_pillows_own(script, monkeypatch, size, refused):
    """Pillow itself only warns up to twice its limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    reason = visit_row(script, make_row(0, jpg_0=flat(RED, size)))
    assert ("bomb" in reason) == refused


class ResizeSpy:
    """Pillow's own resize, remembering the largest image that was asked for."""

    def __init__(self):
        self.resize, self.largest = Image.Image.resize, 0

    def __call__(self, image, size, *args, **kwargs):
        self.largest = max(self.largest, size[0] * size[1])
        return self.resize(image, size, *args, **kwargs)


@pytest.mark.parametrize("size", [(1, 2000), (2000, 1)])
def test_a_thin_image_does_not_explode_when_resized(script, monkeypatch, size):
    """2,000 pixels whose shorter side is stretched to 64 would be 8 million, and 1 x 100,000 at 1024 is 420 GB."""
    spy = ResizeSpy()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    monkeypatch.setattr(Image.Image, "resize", lambda image, *args, **kwargs: spy(image, *args, **kwargs))
    tensors = visit_row(script, make_row(0, jpg_0=flat(RED, size)), resolution=64)
    assert isinstance(tensors, str) or tensors["pixel_values"].shape == (2, 3, 64, 64)
    assert spy.largest <= 100_000


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_no_damage_raises_anything_but_unusable_row(script, kind):
    """100 truncations and 100 files with up to four changed bytes."""
    whole = encode(Image.fromarray(NOISE), kind)
    rng = np.random.default_rng(0)
    outcomes = {"usable": 0, "unusable": 0}
    for trial in range(200):
        damaged = bytearray(whole)
        if trial % 2:
            damaged = damaged[: rng.integers(len(whole))]
        else:
            for place in rng.integers(len(whole), size=rng.integers(1, 5)):
                damaged[place] ^= int(rng.integers(1, 256))
        try:
            assert script.decode_image(bytes(damaged)).mode == "RGB"
            outcomes["usable"] += 1
        except script.UnusableRow as reason:
            assert str(reason).startswith("has ")
            outcomes["unusable"] += 1
    assert outcomes["unusable"] >= 50


def test_each_image_is_decoded_once(script, monkeypatch):
    opened, open_image = [], Image.open
    monkeypatch.setattr(Image, "open", lambda source, *args: opened.append(source) or open_image(source, *args))
    pairs = make_pairs(script, [make_row(index) for index in range(4)], random_crop=True, train_batch_size=4)
    batch = next(iter(pairs.loader([[script.Visit(row) for row in range(4)]])))
    assert len(batch["captions"]) == 4 and len(opened) == 8


# Geometry -----------------------------------------------------------------------------------------------------------


def lanczos_matrix(length, target):
    """Rows of antialiased resampling weights in exact arithmetic: the Lanczos kernel widened by the reduction."""
    scale = length / target
    width = max(scale, 1.0)
    centres = (np.arange(target) + 0.5) * scale
    distance = (np.arange(length) + 0.5 - centres[:, None]) / width
    weights = np.where(np.abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("size", [(40, 64), (150, 96), (97, 331), (12, 9), (32, 32)])
def test_resize_is_antialiased(script, size):
    """The fractional crop of an independent float64 resampling; uint8 between the two passes costs rounding."""
    width, height = size
    pixels = random_pixels(height, width, 3)
    scale = 32 / min(size)
    new_width, new_height = round(width * scale), round(height * scale)
    resized = np.einsum("yh,xw,hwc->yxc", lanczos_matrix(height, new_height), lanczos_matrix(width, new_width), pixels)
    tensor, (top, left) = script.crop_image(Image.fromarray(pixels), 32, (0.5, 0.5), False)
    assert (top, left) == (round((new_height - 32) / 2), round((new_width - 32) / 2))
    assert tensor.dtype == torch.uint8 and tensor.shape == (3, 32, 32)
    expected = resized.clip(0, 255)[top : top + 32, left : left + 32]
    # Overshoot that the first pass clips to uint8 is lost to the second: rare, so the mean is the sharp measure.
    errors = np.abs(tensor.permute(1, 2, 0).numpy() - expected)
    assert np.quantile(errors, 0.9) <= 2 and errors.mean() < 1.2


@pytest.mark.parametrize("sizes", [((192, 128), (128, 320)), ((64, 64), (400, 130)), ((130, 60), (60, 130))])
def test_a_circle_stays_a_circle_in_both_images(script, sizes):
    images = []
    for width, height in sizes:
        image = Image.new("RGB", (4 * width, 4 * height), "white")
        radius = 4 * 0.3 * min(width, height)
        box = [2 * width - radius, 2 * height - radius, 2 * width + radius, 2 * height + radius]
        ImageDraw.Draw(image).ellipse(box, fill="black")
        images.append(encode(image.resize((width, height), Image.Resampling.BOX)))
    row = make_row(0, jpg_0=images[0], jpg_1=images[1], label_0=1, label_1=0)
    for pixels in visit_row(script, row, resolution=64)["pixel_values"]:
        dark = pixels[0] < 128
        extents = [int(dark.any(dim=axis).sum()) for axis in (0, 1)]
        assert abs(extents[0] - extents[1]) <= 1
        # 0.6 of the shorter side, whatever the longer one.
        assert all(abs(extent - 0.6 * 64) <= 1.5 for extent in extents)
        assert abs(int(dark.sum()) - math.pi * (0.3 * 64) ** 2) < 30


def coordinates(width, height):
    """An image whose red is x and whose green is y, so that a crop tells where it was taken."""
    y, x = np.mgrid[:height, :width].astype(np.uint8)
    return Image.fromarray(np.stack([x, y, 0 * x], axis=2))


def recover(pixels, width):
    """(top, left, mirrored) of a crop of `coordinates`, left in the mirrored image as it was cropped."""
    x, y = pixels[0].int(), pixels[1].int()
    step = int(x[0, 1] - x[0, 0])
    assert step in (-1, 1) and (x.diff(dim=1) == step).all() and (y.diff(dim=0) == 1).all()
    assert (x.diff(dim=0) == 0).all() and (y.diff(dim=1) == 0).all()
    return int(y[0, 0]), int(x[0, 0]) if step == 1 else width - 1 - int(x[0, 0]), step == -1


SIZES = [((100, 64), (64, 120)), ((64, 97), (64, 64)), ((250, 64), (91, 64)), ((64, 64), (64, 250))]


@pytest.mark.parametrize("random_crop", [False, True], ids=["centre", "random"])
@pytest.mark.parametrize("chosen, rejected", SIZES)
def test_crop_and_conditioning_are_those_of_the_pixels(script, chosen, rejected, random_crop):
    """The shorter side is the resolution already, so resizing leaves the coordinates exact."""
    images = [encode(coordinates(*size)) for size in (chosen, rejected)]
    row = make_row(0, jpg_0=images[0], jpg_1=images[1], label_0=1, label_1=0)
    pairs = make_pairs(script, 60 * [row], resolution=64, random_crop=random_crop)
    flips = set()
    for index in range(60):
        tensors = pairs[script.Visit(index, index)][1]
        top, left, flip = recover(tensors["pixel_values"][0], chosen[0])
        rejected_top, rejected_left, rejected_flip = recover(tensors["pixel_values"][1], rejected[0])
        assert tensors["add_time_ids"].tolist() == [chosen[1], chosen[0], top, left, 64, 64]
        assert flip == rejected_flip
        flips.add(flip)
        places = [(top, rejected_top, chosen[1], rejected[1]), (left, rejected_left, chosen[0], rejected[0])]
        for offset, rejected_offset, side, rejected_side in places:
            free, rejected_free = side - 64, rejected_side - 64
            if not random_crop:
                assert abs(offset - free / 2) <= 0.5 and abs(rejected_offset - rejected_free / 2) <= 0.5
            elif free and rejected_free:
                # Each offset is the shared fraction of its own free room, to half a pixel.
                assert abs(offset / free - rejected_offset / rejected_free) <= 0.5 / free + 0.5 / rejected_free + 1e-9
    assert flips == {False, True}


@pytest.mark.parametrize("random_crop", [False, True], ids=["centre", "random"])
def test_conditioning_of_a_reduced_image_is_in_reduced_pixels(script, random_crop):
    row = make_row(0, jpg_0=encode(coordinates(250, 128)), label_0=1, label_1=0)
    pairs = make_pairs(script, 20 * [row], resolution=64, random_crop=random_crop, no_hflip=True)
    for index in range(20):
        tensors = pairs[script.Visit(index, index)][1]
        height, width, top, left, *target = tensors["add_time_ids"].tolist()
        assert (height, width, target, top) == (128, 250, [64, 64], 0)
        # The centre of reduced pixel x lies at 2 x + 0.5 of the original; away from the edges' ringing.
        assert abs(int(tensors["pixel_values"][0, 0, 32, 32]) - (2 * (left + 32) + 0.5)) <= 1


def test_random_crop_reaches_both_ends_evenly(script):
    row = make_row(0, jpg_0=encode(coordinates(24, 16)), label_0=1, label_1=0)
    pairs = make_pairs(script, 900 * [row], resolution=16, random_crop=True)
    lefts = [pairs[script.Visit(index, index)][1]["add_time_ids"][3].item() for index in range(900)]
    counts = np.bincount(lefts, minlength=9)
    # Eight pixels of room; rounding gives the two ends half of what the places between them get.
    expected = 900 / 8 * np.array([0.5, *7 * [1], 0.5])
    assert len(counts) == 9
    assert (np.abs(counts - expected) < 4.5 * np.sqrt(expected)).all()


def test_half_of_the_visits_are_mirrored_and_none_when_refused(script):
    row = make_row(0, jpg_0=encode(coordinates(8, 8)), jpg_1=encode(coordinates(8, 8)))
    for flags, share in (({}, 0.5), ({"no_hflip": True}, 0)):
        pairs = make_pairs(script, 400 * [row], **flags)
        flips = [recover(pairs[script.Visit(index, index)][1]["pixel_values"][0], 8)[2] for index in range(400)]
        assert abs(np.mean(flips) - share) <= 4 * math.sqrt(share * (1 - share) / 400)


# Randomness ---------------------------------------------------------------------------------------------------------


def varied_rows(count):
    """Rows whose images are of different sizes and contents, ties among them."""
    rows = []
    for index in range(count):
        first = encode(Image.fromarray(random_pixels(9 + index % 5, 12, 3, seed=index)))
        second = encode(Image.fromarray(random_pixels(13, 8 + index % 3, 3, seed=1000 + index)))
        rows.append(make_row(index, jpg_0=first, jpg_1=second, label_0=index % 3, label_1=1))
    return rows


RANDOM_FLAGS = {"random_crop": True, "label_noise_prob": 0.4, "no-remove_ties": True}


def by_visit(pairs, batches, batch_size, most):
    """Run a real loader over the first `most` batches: {(position, row): tensors of that pair}."""
    batches = list(itertools.islice(batches, most))
    seen = {}
    for visits, batch in zip(batches, pairs.loader(batches), strict=True):
        size = len(visits)
        assert len(batch["captions"]) == size and batch["num_usable"] == len(batch["rows"]) == size
        for place, visit in enumerate(visits):
            both = [place, size + place]
            seen[visit.position, visit.row] = {
                "captions": batch["captions"][place],
                "pixel_values": batch["pixel_values"][both],
                "posterior_noise": batch["posterior_noise"][both],
                **{name: batch[name][place] for name in ("add_time_ids", "timesteps", "noise")},
            }
    return seen


@pytest.fixture(scope="module")
def reference(script):
    """Every visit of two epochs of 24 rows, made one by one."""
    pairs = make_pairs(script, varied_rows(24), **RANDOM_FLAGS)
    orders = [np.random.default_rng([0, epoch]).permutation(24) for epoch in (0, 1)]
    visits = [script.Visit(int(row), position) for position, row in enumerate(np.concatenate(orders))]
    return {(visit.position, visit.row): pairs[visit][1] for visit in visits}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size, processes", [(1, 1), (4, 1), (4, 2), (2, 3)])
def test_a_visit_depends_on_seed_position_and_row_alone(script, reference, workers, batch_size, processes):
    pairs = make_pairs(script, varied_rows(24), dataloader_num_workers=workers, **RANDOM_FLAGS)
    seen, turns = {}, 48 // (batch_size * processes)
    for rank in range(processes):
        visits = script.map_style_visits(np.arange(24), 0, 0)
        share = by_visit(pairs, script.deal(visits, batch_size, rank, processes), batch_size, turns)
        assert len(share) == 48 // processes and not share.keys() & seen.keys()
        seen.update(share)
    assert seen.keys() == reference.keys()
    for key, tensors in seen.items():
        assert_same(tensors, reference[key])


def test_seeds_and_positions_differ(script, reference):
    other_seed = make_pairs(script, varied_rows(24), **RANDOM_FLAGS, seed=1)
    visits = [script.Visit(row, position) for position, row in reference]
    everything = [*reference.values(), *(other_seed[visit][1] for visit in visits)]
    for name in ("noise", "posterior_noise"):
        assert len({tuple(tensors[name].flatten().tolist()) for tensors in everything}) == 96
    timesteps = torch.stack([tensors["timesteps"] for tensors in everything])
    assert len(timesteps.unique()) > 80 and timesteps.min() >= 0 and timesteps.max() < 1000


def test_noise_and_timesteps_have_their_distributions(script):
    pairs = script.PairDataset(make_args(script), 400 * [make_row(0)], (4, 8, 8), 1000)
    visits = [pairs[script.Visit(row, row)][1] for row in range(400)]
    for name in ("noise", "posterior_noise"):
        values = torch.stack([tensors[name] for tensors in visits])
        assert abs(values.mean()) < 0.01 and abs(values.std() - 1) < 0.01
        assert abs(torch.corrcoef(values.flatten(1))[0, 1:]).max() < 0.35
    timesteps = np.sort([tensors["timesteps"].item() for tensors in visits])
    # Kolmogorov's distance to the uniform distribution, at a level of 1 in 10,000.
    assert np.abs(timesteps / 1000 - (np.arange(400) + 0.5) / 400).max() < 2.23 / math.sqrt(400)


@pytest.mark.parametrize("flags", [{"random_crop": True}, {"no_hflip": True}, {"label_noise_prob": 1}])
def test_no_flag_shifts_the_draws_of_another(script, flags):
    row = make_row(0, jpg_0=encode(coordinates(24, 8)), jpg_1=encode(coordinates(24, 8)))
    plain, changed = make_pairs(script, 20 * [row]), make_pairs(script, 20 * [row], **flags)
    for index in range(20):
        one, other = (pairs[script.Visit(index, index)][1] for pairs in (plain, changed))
        for name in ("timesteps", "noise", "posterior_noise"):
            assert torch.equal(one[name], other[name])
        if "no_hflip" not in flags:
            mirrored = [recover(tensors["pixel_values"][0], 24)[2] for tensors in (one, other)]
            assert mirrored[0] == mirrored[1]


def test_nothing_is_drawn_from_the_processes_own_generators(script):
    pairs = make_pairs(script, [make_row(0)], **RANDOM_FLAGS)
    torch.manual_seed(0)
    np.random.seed(0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    pairs[script.Visit(0)]
    next(script.map_style_visits(np.arange(5), 0, 0))
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])


@pytest.mark.parametrize("position", range(0, 25, 3))
def test_map_style_order_goes_on_from_any_position(script, position):
    rows = np.array([1, 4, 5, 9, 12, 13, 20])
    whole = list(itertools.islice(script.map_style_visits(rows, 0, 0), 40))
    assert list(itertools.islice(script.map_style_visits(rows, 0, position), 40 - position)) == whole[position:]


def test_map_style_epochs_are_different_permutations(script):
    visits = list(itertools.islice(script.map_style_visits(np.arange(30), 0, 0), 90))
    assert [visit.position for visit in visits] == list(range(90))
    epochs = [[visit.row for visit in visits[start : start + 30]] for start in (0, 30, 60)]
    epochs.append([visit.row for visit in itertools.islice(script.map_style_visits(np.arange(30), 1, 0), 30)])
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, list(range(30))]}) == 5


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_map_style_ranks_share_one_global_order(script, processes):
    """Twelve pairs a step however they are dealt, also across the ends of epochs."""
    visits = [script.map_style_visits(np.arange(17), 0, 5) for _ in range(processes)]
    dealt = [script.deal(visits[rank], 12 // processes, rank, processes) for rank in range(processes)]
    together = [visit for _ in range(6) for batches in dealt for visit in next(batches)]
    assert together == list(itertools.islice(script.map_style_visits(np.arange(17), 0, 5), 72))


# Streams ------------------------------------------------------------------------------------------------------------


# Never all rows of a row group.
TIED = {0, 9, 13, 20}
USABLE = [f"pair {index}" for index in range(24) if index not in TIED]


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("groups", GROUPS)
def test_a_streamed_epoch_has_each_usable_pair_once(script, tmp_path, groups, processes):
    folder = write_groups(tmp_path / "data", GROUPS[groups], tied=TIED)
    seen = {1: [], 2: [], 3: []}
    for rank in range(processes):
        share = epochs_of(make_stream(script, folder, rank, processes).visits(), 3)
        assert [visit.cursor["epoch"] for visit in share] == sorted(visit.cursor["epoch"] for visit in share)
        for visit in share:
            seen[visit.cursor["epoch"]].append(visit.record["caption"])
    assert all(sorted(epoch) == sorted(USABLE) for epoch in seen.values())
    assert len({tuple(epoch) for epoch in [*seen.values(), USABLE]}) == 4


def test_streamed_order_depends_on_the_seed(script, tmp_path):
    folder = write_groups(tmp_path / "data", GROUPS["even"])
    orders = [captions(epochs_of(make_stream(script, folder, seed=seed).visits(), 1)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


DRAWS = ("timesteps", "noise", "posterior_noise")


def same_draws(tensors, others):
    return all(torch.equal(tensors[name], others[name]) for name in DRAWS)


def test_what_is_drawn_depends_on_the_position_and_not_on_the_row(script):
    """Nor on where the row comes from: mirrored, swapped and noised alike."""
    red_and_blue = make_row(0, jpg_0=encode(coordinates(24, 8)), jpg_1=flat(BLUE, (24, 8)), label_0=1, label_1=1)
    pairs = make_pairs(script, 3 * [red_and_blue], **RANDOM_FLAGS)
    swapped = set()
    for position in range(20):
        first = pairs[script.Visit(0, position)][1]
        others = [
            script.Visit(2, position),
            script.Visit(7, position, shard=3, record=red_and_blue, cursor={"epoch": 5}),
        ]
        for visit in others:
            assert_same(pairs[visit][1], first)
        assert not same_draws(first, pairs[script.Visit(0, position + 20)][1])
        assert not same_draws(first, pairs[script.Visit(0, position, held_out=True)][1])
        swapped.add(len(first["pixel_values"][0].unique()) == 2)
    assert swapped == {False, True}


@pytest.mark.parametrize("groups", GROUPS)
def test_streamed_and_map_style_visits_share_positions_and_draws(script, tmp_path, groups):
    """Over 1, 2, 3 and 5 processes (the last: often more than there are shards), each in turn a batch of two."""
    folder = write_groups(tmp_path / "data", GROUPS[groups])
    map_style = make_pairs(script, [make_row(index) for index in range(24)], **RANDOM_FLAGS)
    expected = [map_style[visit][1] for visit in itertools.islice(script.map_style_visits(np.arange(24), 0, 30), 60)]
    pairs = make_pairs(script, None, **RANDOM_FLAGS)
    for processes in (1, 2, 3, 5):
        streams = [make_stream(script, folder, rank, processes) for rank in range(processes)]
        shares = [stream.batches(2, None, 30) for stream in streams]
        turns = [[next(share) for share in shares] for _ in range(30 // processes)]
        visits = [visit for turn in turns for batch in turn for visit in batch]
        assert [visit.position for visit in visits] == list(range(30, 30 + len(visits))) and len(visits) == 60
        for visit, tensors in zip(visits, expected, strict=True):
            assert same_draws(pairs[visit][1], tensors)
        for rank, stream in enumerate(streams):
            mine = [visit for turn in turns for visit in turn[rank]]
            assert captions(mine) == captions(itertools.islice(stream.visits(), len(mine)))


@pytest.mark.parametrize("rank, processes", [(0, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("groups", GROUPS)
def test_a_stream_goes_on_from_any_cursor(script, tmp_path, groups, rank, processes):
    """Every position of more than two epochs; the cursor passes through JSON as in a checkpoint."""
    stream = make_stream(script, write_groups(tmp_path / "data", GROUPS[groups], tied=TIED), rank, processes)
    most = 2 + 2 * 20 // processes
    whole = list(itertools.islice(stream.visits(), most + 9))
    for position in range(most):
        cursor = json.loads(json.dumps(whole[position].cursor))
        resumed = list(itertools.islice(stream.visits(cursor), 9))
        assert resumed == whole[position + 1 : position + 10]


def test_batches_of_a_stream_carry_the_cursor_behind_them(script, tmp_path):
    stream = make_stream(script, write_groups(tmp_path / "data", GROUPS["uneven"]))
    pairs = script.PairDataset(make_args(script), None, (4, 1, 1), 1000)
    loader = pairs.loader(stream.batches(5, None))
    batches = list(itertools.islice(loader, 12))
    for position in (0, 3, 4, 8):
        resumed = pairs.loader(stream.batches(5, batches[position]["cursor"], 5 * (position + 1)))
        for batch, expected in zip(itertools.islice(resumed, 3), batches[position + 1 :], strict=False):
            assert_same(batch, expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_do_not_change_a_stream(script, tmp_path, workers):
    folder = write_groups(tmp_path / "data", GROUPS["uneven"])
    pairs = make_pairs(script, None, dataloader_num_workers=workers, **RANDOM_FLAGS)
    stream = make_stream(script, folder)
    plain = make_pairs(script, None, **RANDOM_FLAGS)
    expected = [plain.collate([plain[visit] for visit in visits]) for visits in first_batches(stream, 3, 10)]
    for batch, other in zip(itertools.islice(pairs.loader(stream.batches(3, None)), 10), expected, strict=True):
        assert_same(batch, other)


def first_batches(stream, size, count):
    return list(itertools.islice(stream.batches(size, None), count))


def skipped(caplog):
    """What the warnings say, without the rank that accelerate puts before them."""
    messages = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    return ["Skipped" + message.partition("Skipped")[2] for message in messages if "Skipped" in message]


@pytest.mark.parametrize("groups", GROUPS)
def test_held_out_pairs_are_the_first_ones_streamed_or_not(script, tmp_path, groups):
    folder = write_groups(tmp_path / "data", GROUPS[groups], tied=TIED)
    held_out = {}
    for streaming in (False, True):
        args = make_args(script, folder, num_validation_pairs=9, streaming=streaming, **RANDOM_FLAGS)
        args.remove_ties = True
        records, places = script.hold_out(args, script.load_all_pairs(args)[1])
        pairs = script.PairDataset(args, records, (4, 1, 1), 1000)
        held_out[streaming] = [pairs[visit][1] for visit in script.held_out_visits(records)]
        assert len(records) == len(places) == 9
    assert [tensors["captions"] for tensors in held_out[False]] == USABLE[:9]
    for tensors, streamed in zip(*held_out.values(), strict=True):
        assert_same(tensors, streamed)

    stream = make_stream(script, folder, left_out=set(places))
    trained = captions(epochs_of(stream.visits(), 2))
    assert sorted(trained) == sorted(2 * USABLE[9:])


@pytest.mark.parametrize("streaming", [None, True], ids=["map", "stream"])
@pytest.mark.parametrize("split", [None, "test"], ids=["of the training rows", "of another split"])
def test_training_reads_all_but_the_held_out_rows(script, flags, tmp_path, caplog, split, streaming):
    """Every row is broken, so that the warnings of a run tell all that it read, and for what."""
    write_groups(tmp_path / "data", [[6, 6]], bad=range(12))
    write_parquet(tmp_path / "data" / "test.parquet", [[make_row(index, caption=None) for index in range(4)]])
    flags.update(dataset_name=tmp_path / "data", cache_dir=tmp_path, streaming=streaming, max_bad_rows=1)
    flags.update(validation_split=split, num_validation_pairs=4)
    flags.update(train_batch_size=2, max_train_steps=6 if split else 4)
    run(script, flags)
    held_out, trained = [], []
    for message in skipped(caplog):
        (held_out if "held-out" in message else trained).append(message)
    reason = "has None for a caption" if split else "has no image"
    assert set(held_out) == {f"Skipped held-out row {row}: it {reason}." for row in range(4)}
    rows = range(12) if split else range(4, 12)
    names = [f"row {row % 6} of shard {row // 6}" if streaming else f"row {row}" for row in rows]
    assert sorted(trained) == sorted(f"Skipped {name}: it has no image." for name in names)


SPLITS = {"one": [[24]], "uneven": [[1, 7, 2], [11, 3]], "many": [[2, 2, 2, 2, 2, 2], [2, 2, 2, 2, 2, 2]]}


@pytest.mark.parametrize(
    "processes, splits, workers, streaming",
    [
        pytest.param(*case, marks=() if case == (2, "uneven", 2, True) else pytest.mark.matrix)
        for case in itertools.product([2, 3], SPLITS, [0, 2], [None, True])
    ],
)
def test_processes_share_each_epoch_among_them(script, flags, tmp_path, processes, splits, workers, streaming):
    """Over real processes, with ties and bad rows: each rank goes on into its next epoch, and all of them end."""
    folder = write_groups(tmp_path / "data", SPLITS[splits], tied=TIED, bad={1, 12, 22})
    flags.update(dataset_name=folder, cache_dir=tmp_path / "cache", dataloader_num_workers=workers)
    flags.update(streaming=streaming, shuffle_buffer_size=4, train_batch_size=2, max_bad_rows=1, logging_steps=20)
    flags.update(gradient_accumulation_steps=2, max_train_steps=30 // processes)
    read = launch_recorded(flags, processes, tmp_path / "read")
    assert [len(rows) for rows in read] == processes * [4 * flags["max_train_steps"]]
    if streaming:
        streams = [make_stream(script, folder, rank, processes) for rank in range(processes)]
        shares = [len(epochs_of(stream.visits(), 1)) for stream in streams]
        assert all(len(rows) > share for rows, share in zip(read, shares, strict=True))
        epochs = [[row for rows, share in zip(read, shares, strict=True) for row in rows[:share]]]
        sizes = itertools.chain(*SPLITS[splits])
        names = [f"row {row} of shard {shard}" for shard, size in enumerate(sizes) for row in range(size)]
    else:
        together = [row for start in range(0, len(read[0]), 2) for rows in read for row in rows[start : start + 2]]
        epochs = [together[:20], together[20:40], together[40:60]]
        names = [f"row {row}" for row in range(24)]
    expected = sorted(name for number, name in enumerate(names) if number not in TIED)
    assert all(sorted(epoch) == expected for epoch in epochs)


class CountedReads:
    """A streamed data set that counts the records read from it and the shards in the midst of being read."""

    def __init__(self, dataset):
        self.dataset, self.num_shards, self.read, self.open = dataset, dataset.num_shards, 0, 0

    def shard(self, num_shards, index):
        self.open += 1
        try:
            for record in self.dataset.shard(num_shards, index):
                self.read += 1
                yield {**record, "counted record": ["a list, so that the collector knows this record"]}
        finally:
            self.open -= 1


def test_a_stream_holds_no_more_than_two_blocks(script, tmp_path):
    small = flat((0, 0, 0))
    groups = [[make_row(0, jpg_0=small, jpg_1=small) for row in range(100)] for _ in range(20)]
    folder = write_parquet(tmp_path / "data" / "train.parquet", groups)
    args = make_args(script, folder, streaming=True, shuffle_buffer_size=64)
    dataset = CountedReads(script.load_all_pairs(args)[0])
    stream = script.PairStream(args, dataset)
    most_ahead = most_held = 0
    visits = stream.visits()
    for given, visit in enumerate(itertools.islice(visits, 2300), start=1):
        most_ahead = max(most_ahead, dataset.read - given)
        if given % 230 == 0:
            # Let the reader come as far as it may.
            time.sleep(0.05)
            held = sum(type(other) is dict and "counted record" in other for other in gc.get_objects())
            most_held = max(most_held, held)
    visits.close()
    assert 63 <= most_ahead < 2 * 64
    assert 64 <= most_held <= 2 * 64


def test_a_closed_stream_leaves_no_reader_and_no_thread(script, tmp_path):
    folder = write_groups(tmp_path / "data", [[40, 40]])
    args = make_args(script, folder, streaming=True, shuffle_buffer_size=6)
    dataset = CountedReads(script.load_all_pairs(args)[0])
    threads = threading.active_count()
    batches = script.PairStream(args, dataset).batches(4, None)
    next(batches)
    assert dataset.open == 1 and threading.active_count() == threads + 1
    batches.close()
    assert dataset.open == 0 and threading.active_count() == threads


@pytest.mark.parametrize("sizes, processes", [([[1]], 2), ([[1, 1]], 3)])
def test_an_empty_share_is_one_sentence(script, tmp_path, sizes, processes):
    """Fewer rows than processes: those that have none can never find one."""
    folder = write_groups(tmp_path / "data", sizes)
    assert next(make_stream(script, folder, 0, processes).visits()).record["caption"].startswith("pair")
    for rank in range(1, processes):
        with pytest.raises(script.TrainingError, match="^--dataset_name: .* found no pair"):
            next(make_stream(script, folder, rank, processes).visits())


@pytest.mark.parametrize("left_out", [set(), {(2, 0), (2, 1)}], ids=["ties", "held out"])
def test_a_row_group_without_a_usable_pair_does_not_end_the_run(script, tmp_path, left_out):
    """It falls to another process in each epoch, and there are pairs enough for all in the other row groups."""
    folder = write_groups(tmp_path / "data", [[2, 2, 2]], tied=() if left_out else {4, 5})
    seen = []
    for rank in range(3):
        stream = make_stream(script, folder, rank, 3, left_out=left_out)
        seen += captions(epochs_of(stream.visits(), 3))
    assert sorted(seen) == sorted(3 * [f"pair {index}" for index in range(4)])


def test_a_stream_of_ties_alone_is_one_sentence(script, tmp_path):
    folder = write_groups(tmp_path / "data", [[2, 2]], tied=range(4))
    with pytest.raises(script.TrainingError, match="found no pair"):
        next(make_stream(script, folder).visits())


# Batches and bad rows -----------------------------------------------------------------------------------------------


def test_collate_puts_the_chosen_images_first_and_bad_rows_aside(script):
    rows = [make_row(0), make_row(1, jpg_0=None), make_row(2), make_row(3, caption=None)]
    pairs = make_pairs(script, rows)
    items = [pairs[script.Visit(row, cursor={"used": row})] for row in range(4)]
    batch = pairs.collate(items)
    assert batch["captions"] == ["pair 0", "pair 2"]
    # Rows 0 and 2 are even: their second image is the chosen one.
    colours = [colour_of(pixels) for pixels in batch["pixel_values"]]
    assert colours == [(0, 1, 0), (2, 1, 0), (0, 0, 1), (2, 0, 1)]
    for image in (0, 1):
        for place, item in enumerate((items[0][1], items[2][1])):
            assert torch.equal(batch["posterior_noise"][2 * image + place], item["posterior_noise"][image])
    assert torch.equal(batch["noise"], torch.stack([items[0][1]["noise"], items[2][1]["noise"]]))
    assert (batch["num_usable"], len(batch["rows"]), batch["cursor"]) == (2, 4, {"used": 3})
    assert batch["bad_rows"] == [("row 1", "has no image"), ("row 3", "has None for a caption")]


def test_a_batch_of_bad_rows_weighs_nothing(script):
    pairs = make_pairs(script, 2 * [make_row(0, caption=None)])
    good = pairs.collate([make_pairs(script, [make_row(0)])[script.Visit(0)]])
    batch = pairs.collate([pairs[script.Visit(row)] for row in (0, 1)])
    assert (batch["num_usable"], len(batch["rows"]), len(batch["bad_rows"])) == (0, 2, 2)
    for name, value in good.items():
        if isinstance(value, torch.Tensor):
            assert batch[name].shape == value.shape and batch[name].dtype == value.dtype, name


@pytest.mark.parametrize("streaming", [None, True], ids=["map", "stream"])
def test_bad_rows_are_skipped_named_and_counted(script, flags, tmp_path, caplog, streaming):
    flags["dataset_name"] = write_groups(tmp_path / "data", [[8, 4]], tied={5}, bad={2, 9})
    flags.update(max_bad_rows=0.5, streaming=streaming, train_batch_size=3, max_train_steps=4, cache_dir=tmp_path)
    with caplog.at_level(logging.INFO):
        output_dir = run(script, flags)
    # 12 visits of 11 rows: one epoch and a pair more.
    rows = ["row 1 of shard 1", "row 2 of shard 0"] if streaming else ["row 2", "row 9"]
    warnings = skipped(caplog)
    assert sorted(set(warnings)) == [f"Skipped {row}: it has no image." for row in rows]
    assert f"{len(warnings)} of 12 rows read could not be used." in caplog.text
    assert len(warnings) in (2, 3)
    assert (output_dir / "pytorch_lora_weights.safetensors").exists()
    assert all(math.isfinite(value) for value in scalars(output_dir)["loss"].values())


@pytest.mark.parametrize("streaming, batch_size, stop", [(None, 4, 3), (True, 20, 5)], ids=["map", "stream"])
def test_too_many_bad_rows_stop_the_run_after_a_checkpoint(
    script, flags, tmp_path, caplog, streaming, batch_size, stop
):
    """The default of 1 %: a map-style data set of 12 rows is judged once all were read, a stream after 100 rows."""
    flags["dataset_name"] = write_groups(tmp_path / "data", [[12]], bad={3, 8})
    flags.update(streaming=streaming, train_batch_size=batch_size, max_train_steps=60, cache_dir=tmp_path)
    with pytest.raises(script.TrainingError, match=f"Stopped at step {stop}.* more than --max_bad_rows 0.01 allows"):
        run(script, flags)
    state = json.loads((tmp_path / "out" / f"checkpoint-{stop}" / "mapo_state.json").read_text())
    assert (state["step"], state["rows_read"]) == (stop, batch_size * stop)
    assert state["rows_bad"] == len(skipped(caplog)) >= 2
    assert (tmp_path / "out" / f"checkpoint-{stop}" / "pytorch_lora_weights.safetensors").exists()
    assert not (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.parametrize("limit, stops", [(2 / 12, False), (0.16, True), (0, True), (1, False)])
def test_the_limit_of_bad_rows_is_a_share_of_what_was_read(script, limit, stops):
    run = SimpleNamespace(args=SimpleNamespace(max_bad_rows=limit), rows_read=12, rows_bad=2)
    assert (script.too_many_bad_rows(run, enough=12) is not None) == stops
    run.rows_read = run.rows_bad = 11
    assert script.too_many_bad_rows(run, enough=12) is None
    assert (script.too_many_bad_rows(run) is not None) == (limit < 1)


@pytest.mark.parametrize("use_8bit_adam", [None, True], ids=["32bit", "8bit"])
def test_micro_batches_of_bad_rows_train_on_nothing(script, world, flags, tmp_path, caplog, use_8bit_adam):
    """The whole UNet: any gradient at all would move it, and any step would decay its weights."""
    flags["dataset_name"] = write_groups(tmp_path / "data", [[4]], bad=range(4))
    flags.update(rank=None, max_bad_rows=1, adam_weight_decay=0.1, max_train_steps=2, train_batch_size=2)
    flags["use_8bit_adam"] = use_8bit_adam
    output_dir = run(script, {**flags, "cache_dir": tmp_path})
    assert len(skipped(caplog)) == 4
    before, after = (
        UNet2DConditionModel.from_pretrained(folder / "unet") for folder in (world / "pipeline", output_dir)
    )
    for (name, weight), trained in zip(before.state_dict().items(), after.state_dict().values(), strict=True):
        assert torch.equal(weight, trained), name
    logged = scalars(output_dir)
    assert all(math.isnan(logged["loss"][step]) for step in (1, 2))
    assert logged["grad_norm"] == logged["skipped_steps"] == {1: 0, 2: 0}


@pytest.mark.parametrize("bad", ["in the rest of the batch", "in a micro-batch of its own"])
def test_a_bad_row_costs_its_place_and_nothing_else(script, flags, tmp_path, bad):
    """Four rows and one step: the same weights whether a bad row shares a micro-batch with good ones or not."""
    flags["dataset_name"] = write_groups(tmp_path / "data", [[4]], bad={1})
    flags.update(max_bad_rows=1, max_train_steps=1, max_grad_norm=1e9, cache_dir=tmp_path)
    sizes = {"in the rest of the batch": (4, 1), "in a micro-batch of its own": (1, 4)}[bad]
    flags.update(train_batch_size=sizes[0], gradient_accumulation_steps=sizes[1])
    logged = scalars(run(script, flags))
    reference = scalars(run(script, {**flags, "train_batch_size": 2, "gradient_accumulation_steps": 2}))
    for name in ("loss", "chosen_mse", "rejected_mse", "grad_norm"):
        assert logged[name][1] == pytest.approx(reference[name][1], rel=2e-5), name


# The end of a process -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad, code", [(False, 0), (True, 1)], ids=["done", "stopped"])
def test_a_stream_left_in_mid_shard_ends_cleanly(flags, tmp_path, bad, code):
    """A parquet reader still open at exit complains, or takes the interpreter down."""
    flags["dataset_name"] = write_groups(tmp_path / "data", [[80, 80]], bad=range(20, 160) if bad else ())
    flags.update(streaming=True, shuffle_buffer_size=6, num_validation_pairs=3, cache_dir=tmp_path)
    flags.update(train_batch_size=25, max_train_steps=6 if bad else 2, dataloader_num_workers=0 if bad else 2)
    result = launch(flags)
    assert result.returncode == code, result.stderr
    assert ("error: Stopped at step 4" in result.stderr) == bad
    assert not any(word in result.stderr for word in ("Exception ignored", "Fatal Python error", "terminate called"))
