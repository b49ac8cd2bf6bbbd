"""Pairs: the way from a stored row to the tensors of a visit, the order of a run, and whole runs from both sources."""

import collections
import io
import itertools
import json
import logging
import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import command_line, fork, run, scalars
from PIL import Image, ImageOps, PngImagePlugin
from safetensors.torch import load_file


RED, BLUE = (255, 0, 0), (0, 0, 255)
IMAGES, LABELS = ("jpg_0", "jpg_1"), ("label_0", "label_1")
BOTH_WAYS = pytest.mark.parametrize("streaming", [None, True], ids=["map", "stream"])
RANDOM_FLAGS = {"random_crop": True, "label_noise_prob": 0.4, "no-remove_ties": True}
# Sizes of the row groups of each file, 24 rows in all, and rows with equal labels.
GROUPS = {"one": [[24]], "uneven": [[7, 1], [5, 2], [9]]}
TIED = {0, 9, 13, 20}
USABLE = [f"pair {number}" for number in range(24) if number not in TIED]


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def flat(colour, size=(8, 8)):
    return encode(Image.new("RGB", size, colour))


def random_pixels(*shape, seed=0, high=256):
    return np.random.default_rng(seed).integers(high, size=shape, dtype=np.uint8)


def make_row(number, **changes):
    """A pair whose images tell which it is; the first image is the chosen one of odd rows."""
    row = {"caption": f"pair {number}", "jpg_0": flat((number, 0, 1)), "jpg_1": flat((number, 1, 0))}
    return {**row, "label_0": number % 2, "label_1": 1 - number % 2, **changes}


def expected_pair(number):
    """(caption, chosen colour, rejected colour) of `make_row(number)`."""
    colours = [(number, 1, 0), (number, 0, 1)]
    return f"pair {number}", *(colours[::-1] if number % 2 else colours)


def write_parquet(file, groups, schema=None):
    """One parquet file with the given row groups (lists of rows)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    schema = schema or pa.Table.from_pylist([row for group in groups for row in group]).schema
    with pq.ParquetWriter(file, schema) as writer:
        for group in groups:
            writer.write_table(pa.Table.from_pylist(group, schema=schema), row_group_size=max(len(group), 1))
    return file.parent


def write_groups(folder, sizes, tied=(), bad=(), broken=b""):
    """Files of row groups of the given sizes, rows numbered through, `tied` and `bad` (image `broken`) among them."""
    numbers = itertools.count()
    for file, file_sizes in enumerate(sizes):
        groups = [[make_row(number) for number in itertools.islice(numbers, size)] for size in file_sizes]
        for row in itertools.chain(*groups):
            number = int(row["caption"].split()[1])
            row.update({"label_0": 1, "label_1": 1} if number in tied else {})
            row.update({"jpg_1": broken} if number in bad else {})
        write_parquet(folder / f"train-{file}.parquet", groups)
    return folder


def make_args(script, folder="none", **flags):
    flags = {"pretrained_model_name_or_path": "none", "dataset_name": folder, "resolution": 8, "seed": 0, **flags}
    flags = flags if folder == "none" else {"cache_dir": folder.parent / "cache", **flags}
    return script.parse_args(command_line(flags))


def load_pairs(script, folder, **flags):
    """The `PairDataset` of the training pairs in `folder`."""
    args = make_args(script, folder, **flags)
    pairs, _ = script.load_pairs(args, (4, 1, 1), 1000)
    return pairs


def make_pairs(script, rows, held_out=False, **flags):
    """The `PairDataset` of hand-made rows."""
    rows_in_memory = SimpleNamespace(
        columns=script.Columns("caption", IMAGES, LABELS),
        record=lambda shard, row, lane: rows[row],
        row_name=lambda shard, row: f"row {row}",
    )
    index = np.stack([np.zeros(len(rows), int), np.arange(len(rows)), np.arange(len(rows))], axis=1)
    split = script.Split(["train"], rows_in_memory, index, fingerprint=[], commit=None)
    return script.PairDataset(make_args(script, **flags), split, index, (4, 8, 8), 1000, held_out)


def visits(pairs, first=0):
    """Each pair once, at the positions from `first` on."""
    visit = sys.modules[type(pairs).__module__].Visit
    return [pairs[visit(first + number, number)] for number in range(len(pairs.index))]


def colour_of(pixels):
    assert (pixels == pixels[:, :1, :1]).all()
    return tuple(pixels[:, 0, 0].tolist())


def summary(tensors):
    return tensors["caption"], *(colour_of(pixels) for pixels in tensors["pixel_values"])


def summaries(script, folder, **flags):
    return [summary(tensors) for tensors in visits(load_pairs(script, folder, **flags))]


def reason(script, row, **flags):
    """Why a row cannot be used."""
    with pytest.raises(script.UnusableRow) as error:
        columns = script.Columns("caption", IMAGES, LABELS)
        script.load_pair(row, columns, make_args(script, **flags).resolution, (0.5, 0.5), flip=False)
    return str(error.value)


# Draws ---------------------------------------------------------------------------------------------------------------
def chosen_first(script, rows, first, **flags):
    """For each row, whether its first image (red) came out as the chosen one."""
    colours = [summary(tensors)[1:] for tensors in visits(make_pairs(script, rows, **flags), first)]
    assert all(pair in ((RED, BLUE), (BLUE, RED)) for pair in colours)
    return np.array([pair[0] == RED for pair in colours])


@pytest.mark.parametrize("noise", [None, 0, 0.3, 1])
def test_ties_and_label_noise_are_drawn_at_each_visit(script, noise):
    """Kept ties are a fair coin, label noise a biased one; the bounds are four standard deviations."""
    labels = {"label_0": 1, "label_1": 1 if noise is None else 0}
    flags = {"no-remove_ties": True} if noise is None else {"label_noise_prob": noise}
    rows = 600 * [make_row(0, jpg_0=flat(RED), jpg_1=flat(BLUE), **labels)]
    first, second, again = (chosen_first(script, rows, start, **flags) for start in (0, 600, 0))
    chance = 0.5 if noise is None else 1 - noise
    for found, share in ((first, chance), (second, chance), (first == second, chance**2 + (1 - chance) ** 2)):
        assert abs(found.mean() - share) <= 4 * math.sqrt(share * (1 - share) / 600)
    assert (first == again).all()


def test_held_out_pairs_know_no_seed_noise_flip_or_random_crop(script):
    row = make_row(0, jpg_0=encode(Image.fromarray(random_pixels(16, 40, 3))), label_0=1, label_1=0)
    flags = {"resolution": 16, "random_crop": True, "label_noise_prob": 1}
    drawn = [visits(make_pairs(script, 20 * [row], held_out=True, seed=seed, **flags)) for seed in (0, 1)]
    for tensors, others in zip(*drawn, strict=True):
        assert find_crop(row["jpg_0"], tensors["pixel_values"][0]) == (0, 12, False)
        assert tensors["add_time_ids"].tolist() == [16, 40, 0, 12, 16, 16]
        assert torch.equal(tensors["noise"], others["noise"])


# Decoding -----------------------------------------------------------------------------------------------------------
def on_white(pixels, alpha):
    alpha = np.asarray(alpha, dtype=np.float64)[..., None] / 255
    return np.asarray(pixels, dtype=np.float64) * alpha + 255 * (1 - alpha)


def images_of_all_kinds():
    """(name, encoded bytes, expected pixels, tolerance)."""
    rgb, rgba, la, index = (random_pixels(6, 5, *channels, high=4**4) for channels in ((3,), (4,), (2,), ()))
    index, palette, alphas = index % 4, random_pixels(4, 3, seed=1), np.array([0, 80, 200, 255], dtype=np.uint8)
    deep = np.random.default_rng(2).integers(2**16, size=(6, 5), dtype=np.uint16)
    paletted = Image.frombytes("P", (5, 6), index.tobytes())
    paletted.putpalette(palette.tobytes())
    of_alphas, of_key = on_white(palette[index], alphas[index]), on_white(rgb, 255 * (rgb != rgb[2, 3]).any(axis=2))
    yield "RGB", encode(Image.fromarray(rgb)), rgb, 0
    for kind in ("PNG", "TIFF"):
        yield f"16 bits, {kind}", encode(Image.fromarray(deep), kind), (deep / 257)[..., None].repeat(3, 2), 1
    for mode, kind in (("I", np.int32), ("F", np.float32)):
        yield f"mode {mode}", encode(Image.fromarray(rgb[..., 0].astype(kind)), "TIFF"), rgb[..., :1].repeat(3, 2), 0
    yield "CMYK", encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100), np.array(RED), 2
    yield "RGBA", encode(Image.fromarray(rgba)), on_white(rgba[..., :3], rgba[..., 3]), 1
    yield "LA", encode(Image.fromarray(la, "LA")), on_white(la[..., :1].repeat(3, 2), la[..., 1]), 1
    yield "palette of alphas", encode(paletted, transparency=alphas.tobytes()), of_alphas, 1
    yield "color key", encode(Image.fromarray(rgb), transparency=tuple(rgb[2, 3].tolist())), of_key, 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_kind_of_image_becomes_rgb_on_white(script):
    for name, encoded, expected, tolerance in images_of_all_kinds():
        image = script.decode_image(encoded)
        assert image.mode == "RGB", name
        assert np.abs(np.asarray(image, dtype=np.float64) - expected).max() <= tolerance, name


def test_16_bits_are_scaled_where_pillow_opens_them_as_32(script, monkeypatch):
    """As Pillow does before 11.3: a PNG of 16 bits has mode I."""
    deep = np.random.default_rng(2).integers(2**16, size=(6, 5), dtype=np.uint16)
    encoded = encode(Image.fromarray(deep))
    monkeypatch.setitem(PngImagePlugin._MODES, (16, 0), ("I", "I;16B"))
    assert Image.open(io.BytesIO(encoded)).mode == "I"
    found = np.asarray(script.decode_image(encoded), dtype=np.float64)
    assert np.abs(found - (deep / 257)[..., None]).max() <= 1


# How the letters of the stored image lie once it is upright, after the Exif standard.
UPRIGHT = ["abc def", "cba fed", "fed cba", "def abc", "ad be cf", "da eb fc", "fc eb da", "cf be ad"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_exif_orientation(script, kind):
    levels = {letter: 20 + 40 * place for place, letter in enumerate("abcdef")}
    stored, *_ = upright = [np.array([[levels[c] for c in line] for line in text.split()]) for text in UPRIGHT]
    image = Image.fromarray(stored.astype(np.uint8).repeat(16, 0).repeat(16, 1)).convert("RGB")
    for orientation, expected in enumerate(upright, start=1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        encoded = encode(image, kind, exif=exif)
        found = np.asarray(script.decode_image(encoded))[8::16, 8::16, 0].astype(int)
        assert found.shape == expected.shape and np.abs(found - expected).max() <= 3
        tensors = visits(make_pairs(script, [make_row(0, jpg_1=encoded)], resolution=16))[0]
        assert tensors["add_time_ids"][:2].tolist() == [16 * side for side in expected.shape]


NOISE = random_pixels(24, 24, 3)
PNG, JPEG = encode(Image.fromarray(NOISE)), encode(Image.fromarray(NOISE), "JPEG")


UNUSABLE = [
    ({"jpg_0": None}, "has no image"),
    ({"jpg_0": b"<html>404</html>"}, "cannot be read"),
    ({"jpg_0": PNG[:-600]}, "cannot be read"),
    ({"jpg_1": JPEG[: len(JPEG) // 2]}, "cannot be read"),
    ({"jpg_0": encode(Image.new("1", (20_000, 10_000)))}, "cannot be read .*Bomb"),
    # Stretched to a shorter side of 8, it would have 200 million pixels.
    ({"jpg_1": flat(RED, (1, 3_000_000))}, "1 x 3000000 pixels"),
    ({"caption": None}, "has 'None' instead of text in column caption"),
    ({"label_1": math.nan, "label_0": 1.0}, "has no label_1"),
]


@pytest.mark.parametrize("changes, expected", UNUSABLE, ids=range(len(UNUSABLE)))
def test_a_row_that_cannot_be_used_has_a_reason(script, changes, expected):
    assert re.search(expected, reason(script, make_row(0, **changes)))


# Pixels -------------------------------------------------------------------------------------------------------------
def find_crop(encoded, pixels):
    """(top, left, flipped) of the crop with these pixels in the image, resized by plain Pillow."""
    image, side = Image.open(io.BytesIO(encoded)), pixels.shape[-1]
    image = image.resize([round(size * side / min(image.size)) for size in image.size], Image.LANCZOS)
    for flip in (False, True):
        whole = np.asarray(ImageOps.mirror(image) if flip else image)
        for top, left in itertools.product(*(range(size - side + 1) for size in whole.shape[:2])):
            if np.array_equal(whole[top : top + side, left : left + side], pixels.permute(1, 2, 0)):
                return top, left, flip
    raise AssertionError("no such crop")


@pytest.mark.parametrize("random_crop", [None, True], ids=["center", "random"])
@pytest.mark.parametrize("chosen, rejected", [((90, 32), (60, 90)), ((30, 20), (7, 31)), ((16, 16), (16, 99))])
def test_crops_flips_and_conditioning_are_those_of_plain_pillow(script, chosen, rejected, random_crop):
    first, second = (encode(Image.fromarray(random_pixels(*size[::-1], 3))) for size in (chosen, rejected))
    row = make_row(0, jpg_0=first, jpg_1=second, label_0=1, label_1=0)
    flips = set()
    for tensors in visits(make_pairs(script, 40 * [row], resolution=16, random_crop=random_crop)):
        crops = [find_crop(image, pixels) for image, pixels in zip((first, second), tensors["pixel_values"])]
        assert tensors["add_time_ids"].tolist() == [chosen[1], chosen[0], *crops[0][:2], 16, 16]
        assert crops[0][2] == crops[1][2]
        flips.add(crops[0][2])
        for axis in (0, 1):
            # Each offset is the shared fraction of its own free room, to half a pixel.
            rooms = [round(size[1 - axis] * 16 / min(size)) - 16 for size in (chosen, rejected)]
            ranges = [((c[axis] - 0.5) / room, (c[axis] + 0.5) / room) for c, room in zip(crops, rooms) if room]
            ranges += [] if random_crop else [(0.5, 0.5)]
            lows, highs = zip(*(ranges or [(0, 1)]))
            assert max(lows) <= min(highs) + 1e-9
    assert flips == {False, True}


def test_crops_and_flips_have_their_distributions(script):
    row = make_row(0, jpg_0=(image := encode(Image.fromarray(random_pixels(8, 16, 3)))), jpg_1=image)
    drawn = visits(make_pairs(script, 900 * [row], random_crop=True))
    _, lefts, flips = zip(*(find_crop(image, tensors["pixel_values"][0]) for tensors in drawn))
    # Eight pixels of room; rounding gives the two ends half of what the places between them get.
    expected = 900 / 8 * np.array([0.5, *7 * [1], 0.5])
    assert (np.abs(np.bincount(lefts, minlength=9) - expected) < 4.5 * np.sqrt(expected)).all()
    assert abs(np.mean(flips) - 0.5) <= 4 * 0.5 / math.sqrt(900)
    # No flag shifts the draws of another.
    for plain, tensors in zip(drawn, visits(make_pairs(script, 20 * [row], no_hflip=True, label_noise_prob=1))):
        assert find_crop(image, tensors["pixel_values"][0]) == (0, 4, False)
        assert all(torch.equal(plain[name], tensors[name]) for name in ("timesteps", "noise", "posterior_noise"))


# Randomness ---------------------------------------------------------------------------------------------------------
def varied_rows(count):
    """Rows whose images are of different sizes and contents, ties among them."""
    sizes = [((9 + number % 5, 12, 3), (13, 8 + number % 3, 3)) for number in range(count)]
    images = [[encode(Image.fromarray(random_pixels(*size, seed=n))) for size in both] for n, both in enumerate(sizes)]
    return [make_row(n, jpg_0=a, jpg_1=b, label_0=n % 3, label_1=1) for n, (a, b) in enumerate(images)]


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]) if isinstance(value, torch.Tensor) else value == right[name], name


@pytest.mark.parametrize("size, processes, workers", [(4, 1, 0), (1, 1, 2), (2, 3, 2)])
def test_a_visit_depends_on_seed_and_position_alone(script, size, processes, workers):
    """From position 12 on, over two epochs, by real loaders; nothing is drawn from the process's own generators."""
    pairs = make_pairs(script, varied_rows(24), **RANDOM_FLAGS, train_batch_size=size, dataloader_num_workers=workers)
    torch.manual_seed(0)
    state, turns, seen = torch.get_rng_state(), 48 // (size * processes), set()
    layout = script.Layout(shards_mixed=4, lanes=1, turn=4)
    orders = [script.epoch_order(pairs.index, 0, epoch, layout) for epoch in range(3)]
    order = np.concatenate(orders)
    for rank in range(processes):
        batches = script.training_batches(pairs.index, 0, layout, size, 12, rank, processes)
        batches = itertools.islice(batches, turns)
        loader = script.data_iterator(pairs, workers, batch_sampler=batches, collate_fn=script.collate_pairs)
        for turn, batch in enumerate(loader):
            assert len(batch["caption"]) == size
            for place in range(size):
                position, both = 12 + (turn * processes + rank) * size + place, [place, size + place]
                single = ("caption", "row", "skipped", "add_time_ids", "timesteps", "noise")
                tensors = {name: batch[name][place] for name in single}
                tensors |= {name: batch[name][both] for name in ("pixel_values", "posterior_noise")}
                assert_same(
                    tensors,
                    {**(visit := pairs[script.Visit(position, int(order[position]))]), "skipped": torch.tensor(0)},
                )
                seen.add((position, visit["row"]))
    assert {position for position, _ in seen} == set(range(12, 60)) and len(seen) == 48
    assert torch.equal(state, torch.get_rng_state())


def test_draws_are_independent_and_have_their_distributions(script):
    """Of 200 positions at two seeds."""
    both = [make_pairs(script, 200 * [make_row(0)], seed=seed) for seed in (0, 1)]
    draws = [tensors for pairs in both for tensors in visits(pairs)]
    values = torch.cat([torch.stack([d["noise"] for d in draws]), torch.cat([d["posterior_noise"] for d in draws])])
    assert abs(values.mean()) < 0.01 and abs(values.std() - 1) < 0.01
    # Six standard deviations of the correlation of 256 numbers.
    assert abs(torch.corrcoef(values.flatten(1)).fill_diagonal_(0)).max() < 6 / math.sqrt(256)
    # Kolmogorov's distance to the uniform distribution, at a level of 1 in 10,000.
    timesteps = np.sort([tensors["timesteps"].item() for tensors in draws])
    assert np.abs(timesteps / 1000 - (np.arange(400) + 0.5) / 400).max() < 2.23 / math.sqrt(400)


# Order --------------------------------------------------------------------------------------------------------------
def sized_index(sizes):
    return np.array([(shard, row) for shard, size in enumerate(sizes) for row in range(size)])


SIZES = {"equal": 13 * [5], "uneven, some empty": [1, 0, 17, 3, 3, 0, 8, 2, 1, 9], "one": [23], "tiny": [1, 1, 1]}


@pytest.mark.parametrize("mixed, lanes, turn", [(4, 1, 4), (1, 1, 1), (2, 3, 2), (3, 8, 4)])
@pytest.mark.parametrize("sizes", SIZES)
def test_epochs_are_permutations_whose_lanes_read_few_shards(script, sizes, mixed, lanes, turn):
    index = sized_index(SIZES[sizes])
    for seed, epoch in itertools.product((0, 1), range(4)):
        order = script.epoch_order(index, seed, epoch, script.Layout(mixed, lanes, turn))
        assert sorted(order.tolist()) == list(range(len(index)))
        shards = collections.defaultdict(list)
        for place, pair in enumerate(order):
            shards[(epoch * len(index) + place) // turn % lanes].append(int(index[pair, 0]))
        for mine in shards.values():
            spans = [(mine.index(shard), len(mine) - mine[::-1].index(shard)) for shard in set(mine)]
            assert all(sum(first <= place < end for first, end in spans) <= mixed for place in range(len(mine)))
        lanes_of_shards = collections.Counter(shard for mine in shards.values() for shard in set(mine))
        assert sum(number - 1 for number in lanes_of_shards.values()) <= lanes - 1


@pytest.mark.parametrize("sizes, mixed, orders", [([4], 1, 24), ([2, 2], 2, 24), ([1, 2, 1], 4, 24), ([2, 2], 1, 8)])
def test_all_orders_that_a_block_allows_are_equally_likely(script, sizes, mixed, orders):
    """Over 2,400 epochs of seeds. One shard, or all of them mixed, is a full permutation."""
    index, found = sized_index(sizes), collections.Counter()
    for number in range(2400):
        found[tuple(script.epoch_order(index, *divmod(number, 3), script.Layout(mixed)).tolist())] += 1
    assert len(found) == orders
    assert all(abs(times - 2400 / orders) < 5 * math.sqrt(2400 / orders) for times in found.values())


# Runs ---------------------------------------------------------------------------------------------------------------
@pytest.fixture
def record(script, monkeypatch):
    """The captions of each batch of a run's training."""
    seen, preference_loss = [], script.preference_loss

    def noted(run, batch):
        if not batch["row"][0].startswith("held-out"):
            seen.append(batch["caption"])
        return preference_loss(run, batch)

    monkeypatch.setattr(script, "preference_loss", noted)
    return seen


def results(out):
    """Everything logged but speed and memory, and the weights as lists."""
    logged = {name: values for name, values in scalars(out).items() if name[:4] not in ("pair", "peak")}
    return logged, {name: w.tolist() for name, w in load_file(out / "pytorch_lora_weights.safetensors").items()}


def test_a_streamed_run_is_the_map_style_run(script, flags, tmp_path, record):
    """Bit by bit from one row group; from several, the same records and held-out metrics. More than an epoch."""
    flags.update(RANDOM_FLAGS, max_train_samples=16, num_validation_pairs=5, max_train_steps=8, resolution=32)
    found = {}
    for groups, streaming in itertools.product(GROUPS, (None, True)):
        flags["dataset_name"] = write_groups(tmp_path / groups, GROUPS[groups], tied=TIED)
        for workers in (0, 2):
            out = tmp_path / f"{groups}-{streaming}-{workers}"
            run(script, {**flags, "streaming": streaming, "dataloader_num_workers": workers, "output_dir": out})
            logged, weights = results(out)
            found[groups, streaming, workers] = (list(itertools.chain(*record)), logged, weights)
            record.clear()
    same = found["one", None, 0]
    assert len(same[1]["loss"]) == 8 and {0, 8} <= same[1]["eval_loss"].keys()
    for other in (("one", None, 2), ("one", True, 0), ("uneven", None, 0), ("uneven", None, 2)):
        assert found[other] == same, other
    for captions, logged, _ in found.values():
        assert sorted(captions[:16]) == sorted(same[0][:16])
        assert len(drawn := set(captions[:16])) == 16 and drawn <= {f"pair {number}" for number in range(5, 24)}
        assert logged["eval_loss"][0] == same[1]["eval_loss"][0]
    assert len({tuple(captions) for captions, _, _ in found.values()}) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_epochs_visit_each_pair_once(script, flags, tmp_path, record, workers):
    """20 pairs, twice, in batches of 3: 14 steps. Each row group is read once an epoch and few are kept."""
    folder = write_groups(tmp_path / "data", GROUPS["uneven"], tied=TIED)
    flags.update(dataset_name=folder, streaming=True, num_train_epochs=2, max_train_steps=None, train_batch_size=3)
    out = run(script, {**flags, "dataloader_num_workers": workers, "shuffle_shards": 2})
    captions = list(itertools.chain(*record))
    assert sorted(scalars(out)["loss"]) == list(range(1, 15)) and len(captions) == 42
    assert sorted(captions[:20]) == sorted(captions[20:40]) == sorted(USABLE)
    assert captions[:20] != captions[20:40]


# Runs the script and notes the row groups that each process reads with images.
COUNTER = """
import os, runpy, sys
import pyarrow.parquet as pq

read_row_group, read = pq.ParquetFile.read_row_group, pq.ParquetFile.read


def counted(parquet, group, columns):
    note("images", group)
    return read_row_group(parquet, group, columns)


def counted_labels(parquet, columns):
    if "label_0" in columns:
        note("labels", "file")
    return read(parquet, columns)


def note(kind, what):
    with open(os.path.join(os.path.dirname(__file__), f"{kind}-{os.environ['RANK']}"), "a") as file:
        file.write(f"{what} ")


pq.ParquetFile.read_row_group = counted
pq.ParquetFile.read = counted_labels
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.matrix
def test_each_process_reads_the_row_groups_of_its_own_lane_only(script, flags, tmp_path):
    """Two real processes, one epoch of 12 row groups of 4 rows, one of them broken."""
    flags["dataset_name"] = folder = write_groups(tmp_path / "data", [12 * [4]], bad={17}, broken=b"broken")
    flags.update(streaming=True, shuffle_shards=2, train_batch_size=2, num_train_epochs=1, max_train_steps=None)
    (tmp_path / "counter.py").write_text(COUNTER)
    done = fork({**flags, "max_bad_rows": 1}, 2, wrapper=[tmp_path / "counter.py"])
    assert done.returncode == 0, done.stderr
    assert "Skipped row 1 of shard 4: it has an image that cannot be read" in done.stderr
    # A parquet reader still open at exit would complain.
    assert not any(word in done.stderr for word in ("Exception ignored", "Fatal Python error", "terminate called"))
    index = load_pairs(script, folder, streaming=True).index
    shards = index[script.epoch_order(index, 0, 0, script.Layout(2, 2, 2)), 0].reshape(-1, 2, 2)
    read = [sorted(map(int, (tmp_path / f"images-{rank}").read_text().split())) for rank in (0, 1)]
    assert read == [sorted(set(shards[:, rank].flatten().tolist())) for rank in (0, 1)]
    assert [len(mine) for mine in read] == [6, 6]
    # The process that comes first reads the labels of all.
    (labels,) = tmp_path.glob("labels-*")
    assert labels.read_text() == "file "


@pytest.fixture
def skipped(tmp_path):
    """Reads the rows that were reported as skipped, by loader workers, too."""
    handler, named = logging.FileHandler(tmp_path / "log"), logging.getLogger("train_diffusion_mapo_sdxl")
    named.addHandler(handler)
    yield lambda: re.findall(r"Skipped (.*?): it has no image\.", (tmp_path / "log").read_text())
    named.removeHandler(handler)


@pytest.mark.parametrize("workers", [0, 2])
@BOTH_WAYS
def test_bad_rows_are_replaced_named_and_counted(script, flags, tmp_path, record, caplog, skipped, streaming, workers):
    """One epoch of 24 rows: row 13 is met twice, as itself and behind row 12; row 23 is followed by row 0."""
    bad = [2, 12, 13, 23]
    flags["dataset_name"] = write_groups(tmp_path / "data", [[15, 9]], bad=bad)
    flags.update(max_bad_rows=0.5, streaming=streaming, train_batch_size=3, max_train_steps=8, checkpointing_steps=8)
    with caplog.at_level(logging.INFO):
        out = run(script, {**flags, "dataloader_num_workers": workers})
    assert [len(captions) for captions in record] == 8 * [3]
    seen = [int(caption.split()[1]) for caption in itertools.chain(*record)]
    assert sorted(seen) == sorted([*set(range(24)) - {*bad}, 3, 14, 14, 0])
    state = json.loads((out / "checkpoint-8" / "mapo_state.json").read_text())
    assert (state["rows_bad"], state["rows_read"], state["pairs_seen"]) == (5, 29, 24)
    assert "5 of 29 rows read could not be used." in caplog.text
    names = {n: f"row {n % 15} of shard {n // 15}" if streaming else f"row {n}" for n in bad}
    # Workers read ahead, into the next epoch.
    assert set(skipped()) == set(names.values())
    assert workers or sorted(skipped()) == sorted([*names.values(), names[13]])


@BOTH_WAYS
def test_too_many_bad_rows_stop_the_run_after_a_checkpoint(script, flags, tmp_path, skipped, streaming):
    flags.update(dataset_name=write_groups(tmp_path / "data", [[12]], bad={3, 8}), streaming=streaming)
    with pytest.raises(script.TrainingError, match="--max_bad_rows 0.01: 10 of .* rows could not be used"):
        run(script, {**flags, "max_train_steps": 60})
    state = json.loads(next((tmp_path / "out").glob("checkpoint-*/mapo_state.json")).read_text())
    # The batch after the last step has been read as well.
    assert 10 == state["rows_bad"] <= len(skipped())
