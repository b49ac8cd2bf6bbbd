"""Hand-made pairs whose captions and colours say which pair they are, as files and as datasets of the script."""

import io
import json
import shutil
import tarfile
from functools import partial
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import command_line
from PIL import Image


IMAGES = ("jpg_0", "jpg_1")
LABELS = ("label_0", "label_1")
# Sizes of the row groups of each file, with 24 rows in all, and rows with equal labels.
GROUPS = {"one": [[24]], "uneven": [[7, 1], [5, 2], [], [9]]}
TIES = {0, 9, 13, 20}
USABLE = [f"pair {number}" for number in range(24) if number not in TIES]
MAP_AND_STREAM = pytest.mark.parametrize("streaming", [None, True], ids=["map", "stream"])


# Rows ---------------------------------------------------------------------------------------------------------------
def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def flat(colour, size=(8, 8)):
    """An encoded image of one colour."""
    return encode(Image.new("RGB", size, colour))


def random_pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)


def random_image(width, height, seed=0):
    """An encoded image of random pixels."""
    return encode(Image.fromarray(random_pixels(height, width, 3, seed=seed)))


def make_row(number, **changes):
    """Row `number`. The first image is the chosen one in odd rows."""
    return {
        "caption": f"pair {number}",
        "jpg_0": flat((number, 0, 1)),
        "jpg_1": flat((number, 1, 0)),
        "label_0": number % 2,
        "label_1": 1 - number % 2,
        **changes,
    }


def expected_pair(number):
    """(caption, chosen colour, rejected colour) of `make_row(number)`."""
    if number % 2:
        return f"pair {number}", (number, 0, 1), (number, 1, 0)
    return f"pair {number}", (number, 1, 0), (number, 0, 1)


# Files --------------------------------------------------------------------------------------------------------------
def write_parquet(file, groups, schema=None):
    """Write one parquet file with the given row groups, which are lists of rows. Returns its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if schema is None:
        schema = pa.Table.from_pylist(sum(groups, [])).schema
    with pq.ParquetWriter(file, schema) as writer:
        for group in groups:
            table = pa.Table.from_pylist(group, schema=schema)
            writer.write_table(table, row_group_size=max(len(group), 1))
    return file.parent


def write_groups(folder, sizes, tied=(), bad=(), broken=b""):
    """
    Write files with row groups of the given sizes, and return the folder.

    Args:
        sizes: for each file, the sizes of its row groups.
        tied: numbers of the rows with equal labels.
        bad: numbers of the rows whose second image is `broken`.
    """
    schema = pa.Table.from_pylist([make_row(0)]).schema
    number = 0
    for file, sizes_of_file in enumerate(sizes):
        groups = []
        for size in sizes_of_file:
            group = [make_row(number + place) for place in range(size)]
            for row in group:
                if number in tied:
                    row.update(label_0=1, label_1=1)
                if number in bad:
                    row["jpg_1"] = broken
                number += 1
            groups.append(group)
        write_parquet(folder / f"train-{file}.parquet", groups, schema)
    return folder


# Layouts ------------------------------------------------------------------------------------------------------------
def save_bytes(folder, rows):
    write_parquet(folder / "train.parquet", [rows[:3], rows[3:]])


def save_image_feature(folder, rows):
    folder.mkdir()
    with_image_feature(rows).to_parquet(folder / "train.parquet")


def with_image_feature(rows):
    """A dataset whose columns of images, which are bytes or paths, have the feature Image."""
    dataset = datasets.Dataset.from_list(rows)
    for name in IMAGES:
        dataset = dataset.cast_column(name, datasets.Image())
    return dataset


def write_images(folder, rows):
    """Write the images to files. Returns the rows with file names instead of images."""
    folder.mkdir(parents=True, exist_ok=True)
    named_rows = []
    for number, row in enumerate(rows):
        names = {name: f"{number}-{name}.png" for name in IMAGES}
        for name, file_name in names.items():
            (folder / file_name).write_bytes(row[name])
        named_rows.append({**row, **names})
    return named_rows


def save_absolute_paths(folder, rows):
    """The Image feature with only paths, which `to_parquet` would replace with the bytes."""
    folder.mkdir()
    images = folder.parent / "images"
    rows = write_images(images, rows)
    for row in rows:
        for name in IMAGES:
            row[name] = str(images / row[name])
    pq.write_table(with_image_feature(rows).data.table, folder / "train.parquet")


def with_file_name_columns(rows):
    """Rename the columns of images, as imagefolder expects it."""
    return [{f"{name}_file_name" if name in IMAGES else name: row[name] for name in row} for row in rows]


def save_imagefolder(folder, rows):
    rows = with_file_name_columns(write_images(folder, rows))
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def save_imagefolder_with_parquet(folder, rows):
    rows = with_file_name_columns(write_images(folder, rows))
    pq.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")


def save_zipped(save, folder, rows):
    save(folder.parent / "unzipped", rows)
    shutil.make_archive(folder / "train", "zip", folder.parent / "unzipped")


save_zipped_imagefolder = partial(save_zipped, save_imagefolder)
WEBDATASET_COLUMNS = {
    "caption_column": "caption.txt",
    "image_0_column": "jpg_0.png",
    "image_1_column": "jpg_1.png",
    "label_0_column": "label_0.cls",
    "label_1_column": "label_1.cls",
}


def save_webdataset(folder, rows):
    folder.mkdir()
    with tarfile.open(folder / "train-000.tar", "w") as tar:
        for number, row in enumerate(rows):
            for column in WEBDATASET_COLUMNS.values():
                value = row[column.partition(".")[0]]
                content = value if isinstance(value, bytes) else str(value).encode()
                member = tarfile.TarInfo(f"{number:04d}.{column}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def chosen_and_rejected(row):
    if row["label_0"] > row["label_1"]:
        return row["jpg_0"], row["jpg_1"]
    return row["jpg_1"], row["jpg_0"]


def save_ordered_bytes(folder, rows):
    ordered = []
    for row in rows:
        chosen, rejected = chosen_and_rejected(row)
        ordered.append({"caption": row["caption"], "chosen": chosen, "rejected": rejected})
    save_bytes(folder, ordered)


def save_ordered_files(folder, rows):
    lines = ["caption,chosen_file_name,rejected_file_name"]
    for row in write_images(folder, rows):
        chosen, rejected = chosen_and_rejected(row)
        lines.append(f"{row['caption']},{chosen},{rejected}")
    (folder / "metadata.csv").write_text("\n".join(lines))


save_zipped_ordered_files = partial(save_zipped, save_ordered_files)
ORDERED = {"chosen_column": "chosen", "rejected_column": "rejected"}


# Datasets of the script ---------------------------------------------------------------------------------------------
def make_args(script, folder=None, **flags):
    """Parsed flags with the pairs of a folder, and a cache beside it."""
    defaults = {
        "pretrained_model_name_or_path": "none",
        "dataset_name": folder or "none",
        "cache_dir": folder.parent / "cache" if folder else None,
        "resolution": 8,
        "seed": 0,
    }
    return script.parse_args(command_line({**defaults, **flags}))


def load_both_pairs(script, folder, **flags):
    """The PairDatasets of the training pairs and of the held-out pairs in a folder."""
    return script.load_pairs(make_args(script, folder, **flags), (4, 1, 1), 1000)


def load_pairs(script, folder, **flags):
    """The PairDataset of the training pairs in a folder."""
    pairs, _ = load_both_pairs(script, folder, **flags)
    return pairs


def make_pairs(script, rows, held_out=False, **flags):
    """The PairDataset of a list of rows."""
    rows_in_memory = SimpleNamespace(
        columns=script.Columns("caption", IMAGES, LABELS),
        record=lambda shard, row, lane: rows[row],
        row_name=lambda shard, row: f"row {row}",
    )
    numbers = np.arange(len(rows))
    index = np.stack([np.zeros_like(numbers), numbers, numbers], axis=1)
    split = script.Split(["train"], rows_in_memory, index, fingerprint=[], commit=None)
    return script.PairDataset(make_args(script, **flags), split, index, (4, 8, 8), 1000, held_out)


def visit_all(script, pairs, first=0):
    """Each pair once, at the positions from `first` on."""
    return [pairs[script.Visit(first + number, number)] for number in range(len(pairs.index))]


def colour_of(pixels):
    assert (pixels == pixels[:, :1, :1]).all()
    return tuple(pixels[:, 0, 0].tolist())


def summary(pair):
    """(caption, chosen colour, rejected colour), like `expected_pair`."""
    chosen, rejected = pair["pixel_values"]
    return pair["caption"], colour_of(chosen), colour_of(rejected)


def summaries(script, folder, **flags):
    return [summary(pair) for pair in visit_all(script, load_pairs(script, folder, **flags))]


def unusable_reason(script, row):
    """Why a row cannot be used."""
    columns = script.Columns("caption", IMAGES, LABELS)
    with pytest.raises(script.UnusableRow) as error:
        script.load_pair(row, columns, 8, (0.5, 0.5), flip=False)
    return str(error.value)
