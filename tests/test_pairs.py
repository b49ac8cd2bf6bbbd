"""From a stored row to the tensors of a visit: decoding, crops and conditioning, and every random choice."""

import io
import itertools
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin
from small_pairs import (
    encode,
    flat,
    make_pairs,
    make_row,
    random_image,
    random_pixels,
    summary,
    unusable_reason,
    visit_all,
)


RED = (255, 0, 0)
BLUE = (0, 0, 255)


def assert_share(share, expected, number):
    """A share of `number` random choices is within four standard deviations."""
    assert abs(share - expected) <= 4 * math.sqrt(expected * (1 - expected) / number)


# Decoding -----------------------------------------------------------------------------------------------------------
def on_white(pixels, alpha):
    """Pixels on a white background, at an alpha from 0 to 255."""
    opacity = np.asarray(alpha, dtype=np.float64)[..., None] / 255
    return np.asarray(pixels, dtype=np.float64) * opacity + 255 * (1 - opacity)


def grey(values):
    return values[..., None].repeat(3, axis=2)


def all_image_kinds():
    """{kind: (encoded image, expected pixels, tolerance)}."""
    rgb = random_pixels(6, 5, 3)
    rgba = random_pixels(6, 5, 4)
    deep = np.random.default_rng(2).integers(2**16, size=(6, 5), dtype=np.uint16)

    palette = random_pixels(4, 3, seed=1)
    palette_alphas = np.array([0, 80, 200, 255], dtype=np.uint8)
    palette_index = random_pixels(6, 5) % 4
    paletted = Image.frombytes("P", (5, 6), palette_index.tobytes())
    paletted.putpalette(palette.tobytes())
    palette_on_white = on_white(palette[palette_index], palette_alphas[palette_index])

    key = rgb[2, 3]
    opaque = (rgb != key).any(axis=2)

    integers = Image.fromarray(rgb[..., 0].astype(np.int32))
    workflow = PngImagePlugin.PngInfo()
    workflow.add_text("workflow", "x" * 2**21, zip=True)  # Pillow's limit is 2**20
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    return {
        "RGB": (encode(Image.fromarray(rgb)), rgb, 0),
        "2 MiB of metadata": (encode(Image.fromarray(rgb), pnginfo=workflow), rgb, 0),
        "16-bit PNG": (encode(Image.fromarray(deep)), grey(deep / 257), 1),
        "16-bit TIFF": (encode(Image.fromarray(deep), "TIFF"), grey(deep / 257), 1),
        "mode I": (encode(integers, "TIFF"), grey(rgb[..., 0]), 0),
        "CMYK": (encode(cmyk, "JPEG", quality=100), np.array(RED), 2),
        "RGBA": (encode(Image.fromarray(rgba)), on_white(rgba[..., :3], rgba[..., 3]), 1),
        "palette with alphas": (encode(paletted, transparency=palette_alphas.tobytes()), palette_on_white, 1),
        "colour key": (encode(Image.fromarray(rgb), transparency=tuple(key.tolist())), on_white(rgb, 255 * opaque), 1),
    }


def test_every_kind_of_image_becomes_rgb_on_white(script):
    for kind, (encoded, expected, tolerance) in all_image_kinds().items():
        image = script.decode_image(encoded)
        assert image.mode == "RGB", kind
        assert np.abs(np.asarray(image, dtype=np.float64) - expected).max() <= tolerance, kind


def test_16_bits_are_scaled_if_pillow_opens_them_as_32(script, monkeypatch):
    """Like Pillow before 11.3, where a 16-bit PNG has mode I."""
    deep = np.random.default_rng(2).integers(2**16, size=(6, 5), dtype=np.uint16)
    encoded = encode(Image.fromarray(deep))
    monkeypatch.setitem(PngImagePlugin._MODES, (16, 0), ("I", "I;16B"))
    assert Image.open(io.BytesIO(encoded)).mode == "I"

    decoded = np.asarray(script.decode_image(encoded), dtype=np.float64)

    assert np.abs(decoded - grey(deep / 257)).max() <= 1


def test_exif_orientation_is_applied(script):
    """Orientation 6 is a quarter turn clockwise."""
    stored = random_pixels(16, 24, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    encoded = encode(Image.fromarray(stored), exif=exif)

    decoded = script.decode_image(encoded)
    (pair,) = visit_all(script, make_pairs(script, [make_row(0, jpg_1=encoded)], resolution=16))

    assert np.array_equal(decoded, np.rot90(stored, -1))
    assert pair["add_time_ids"][:2].tolist() == [24, 16]


PNG = random_image(24, 24)
JPEG = encode(Image.fromarray(random_pixels(24, 24, 3)), "JPEG")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"jpg_0": None}, "has no image"),
        ({"jpg_0": b"<html>404</html>"}, "cannot be read"),
        ({"jpg_0": {"bytes": None, "path": "/no/file.png"}}, "cannot be read .*/no/file.png"),
        ({"jpg_0": PNG[:-600]}, "cannot be read"),
        ({"jpg_1": JPEG[: len(JPEG) // 2]}, "cannot be read"),
        ({"jpg_0": encode(Image.new("1", (20_000, 10_000)))}, "cannot be read .*Bomb"),
        # Resized to a shorter side of 8, it would have 200 million pixels.
        ({"jpg_1": flat(RED, (1, 3_000_000))}, "1 x 3000000 pixels"),
        ({"caption": None}, "has 'None' instead of text in column caption"),
        ({"label_1": math.nan, "label_0": 1.0}, "has no label_1"),
    ],
    ids=["no image", "text", "no file", "cut PNG", "cut JPEG", "bomb", "narrow", "no caption", "no label"],
)
def test_reason_why_a_row_cannot_be_used(script, changes, expected):
    assert re.search(expected, unusable_reason(script, make_row(0, **changes)))


# Crops and flips ----------------------------------------------------------------------------------------------------
def find_crop(encoded, pixels):
    """(top, left, flipped) of the crop that gives these pixels, if plain Pillow resizes the image."""
    side = pixels.shape[-1]
    image = Image.open(io.BytesIO(encoded))
    width, height = [round(size * side / min(image.size)) for size in image.size]
    resized = image.resize((width, height), Image.LANCZOS)
    expected = pixels.permute(1, 2, 0).numpy()
    for flipped in (False, True):
        full = np.asarray(ImageOps.mirror(resized) if flipped else resized)
        for top in range(height - side + 1):
            for left in range(width - side + 1):
                if np.array_equal(full[top : top + side, left : left + side], expected):
                    return top, left, flipped
    raise AssertionError("no such crop")


def offset_range(offset, size, axis):
    """The relative positions (from 0 to 1) that give a crop's offset along one axis, or None if there is no choice."""
    room = round(size[axis] * 16 / min(size)) - 16
    if room == 0:
        return None
    return (offset - 0.5) / room, (offset + 0.5) / room


def assert_same_position(ranges, is_random):
    """All crops of a pair have the same relative position, which is the center if it is not random."""
    ranges = [bounds for bounds in ranges if bounds is not None]
    if not is_random:
        ranges.append((0.5, 0.5))
    if ranges:
        assert max(low for low, _ in ranges) <= min(high for _, high in ranges) + 1e-9


@pytest.mark.parametrize("random_crop", [None, True], ids=["center", "random"])
@pytest.mark.parametrize(
    ("chosen_size", "rejected_size"), [((90, 32), (60, 90)), ((30, 20), (7, 31)), ((16, 16), (16, 99))]
)
def test_crops_flips_and_conditioning_are_those_of_plain_pillow(script, chosen_size, rejected_size, random_crop):
    """Both images of a pair have the same flip, and crops at the same relative position."""
    chosen_width, chosen_height = chosen_size
    chosen = random_image(*chosen_size)
    rejected = random_image(*rejected_size)
    row = make_row(0, jpg_0=chosen, jpg_1=rejected, label_0=1, label_1=0)

    flips = set()
    for pair in visit_all(script, make_pairs(script, 40 * [row], resolution=16, random_crop=random_crop)):
        top, left, flipped = find_crop(chosen, pair["pixel_values"][0])
        other_top, other_left, other_flipped = find_crop(rejected, pair["pixel_values"][1])
        flips.add(flipped)

        assert pair["add_time_ids"].tolist() == [chosen_height, chosen_width, top, left, 16, 16]
        assert other_flipped == flipped
        for place, other_place, axis in ((top, other_top, 1), (left, other_left, 0)):
            ranges = [offset_range(place, chosen_size, axis), offset_range(other_place, rejected_size, axis)]
            assert_same_position(ranges, random_crop)
    assert flips == {False, True}


def test_crops_and_flips_are_uniform(script):
    image = random_image(16, 8)
    row = make_row(0, jpg_0=image, jpg_1=image)

    lefts = []
    flips = []
    for pair in visit_all(script, make_pairs(script, 900 * [row], random_crop=True)):
        _, left, flipped = find_crop(image, pair["pixel_values"][0])
        lefts.append(left)
        flips.append(flipped)

    # Eight pixels of room. Rounding gives the two ends half of what the others get.
    expected = 900 / 8 * np.array([0.5, *7 * [1], 0.5])
    counts = np.bincount(lefts, minlength=9)
    assert (np.abs(counts - expected) < 4.5 * np.sqrt(expected)).all()
    assert_share(np.mean(flips), 0.5, 900)


def test_flags_do_not_shift_the_random_numbers_of_others(script):
    image = random_image(16, 8)
    row = make_row(0, jpg_0=image, jpg_1=image)

    pairs = visit_all(script, make_pairs(script, 20 * [row], random_crop=True))
    others = visit_all(script, make_pairs(script, 20 * [row], no_hflip=True, label_noise_prob=1))

    for pair, other in zip(pairs, others, strict=True):
        assert find_crop(image, other["pixel_values"][0]) == (0, 4, False)
        for name in ("timesteps", "noise", "posterior_noise"):
            assert torch.equal(pair[name], other[name]), name


def test_held_out_pairs_do_not_depend_on_seed_label_noise_flips_and_random_crops(script):
    image = random_image(40, 16)
    rows = 20 * [make_row(0, jpg_0=image, label_0=1, label_1=0)]
    flags = {"resolution": 16, "random_crop": True, "label_noise_prob": 1}

    pairs = visit_all(script, make_pairs(script, rows, held_out=True, seed=0, **flags))
    others = visit_all(script, make_pairs(script, rows, held_out=True, seed=1, **flags))

    for pair, other in zip(pairs, others, strict=True):
        assert find_crop(image, pair["pixel_values"][0]) == (0, 12, False)
        assert pair["add_time_ids"].tolist() == [16, 40, 0, 12, 16, 16]
        assert torch.equal(pair["noise"], other["noise"])


# Random choices -----------------------------------------------------------------------------------------------------
def first_is_chosen(script, pairs, first):
    """For each visit, whether the red image is the chosen one."""
    colours = [summary(pair)[1:] for pair in visit_all(script, pairs, first)]
    assert set(colours) <= {(RED, BLUE), (BLUE, RED)}
    return np.array([chosen == RED for chosen, _ in colours])


@pytest.mark.parametrize(
    ("label", "flags", "chance"),
    [
        (1, {"no-remove_ties": True}, 0.5),
        (0, {"label_noise_prob": 0}, 1),
        (0, {"label_noise_prob": 0.3}, 0.7),
        (0, {"label_noise_prob": 1}, 0),
    ],
    ids=["tie", "no noise", "noise", "swapped"],
)
def test_ties_and_label_noise_are_random_at_each_visit(script, label, flags, chance):
    row = make_row(0, jpg_0=flat(RED), jpg_1=flat(BLUE), label_0=1, label_1=label)
    pairs = make_pairs(script, 600 * [row], **flags)

    first_epoch = first_is_chosen(script, pairs, 0)
    second_epoch = first_is_chosen(script, pairs, 600)
    repeated = first_is_chosen(script, pairs, 0)

    assert_share(first_epoch.mean(), chance, 600)
    assert_share(second_epoch.mean(), chance, 600)
    assert_share((first_epoch == second_epoch).mean(), chance**2 + (1 - chance) ** 2, 600)
    assert (first_epoch == repeated).all()


def test_noise_and_timesteps_are_independent_and_have_their_distributions(script):
    """At 200 positions with two seeds."""
    pairs = []
    for seed in (0, 1):
        pairs += visit_all(script, make_pairs(script, 200 * [make_row(0)], seed=seed))

    noise = torch.stack([pair["noise"] for pair in pairs])
    posterior_noise = torch.cat([pair["posterior_noise"] for pair in pairs])
    values = torch.cat([noise, posterior_noise]).flatten(1)
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    # Six standard deviations of the correlation of 256 numbers.
    assert abs(torch.corrcoef(values).fill_diagonal_(0)).max() < 6 / math.sqrt(256)
    # Kolmogorov's distance to the uniform distribution, at a significance level of 1 in 10,000.
    timesteps = np.sort([pair["timesteps"].item() for pair in pairs])
    uniform = (np.arange(400) + 0.5) / 400
    assert np.abs(timesteps / 1000 - uniform).max() < 2.23 / math.sqrt(400)


def varied_rows(count):
    """Rows with images of different sizes and contents, some of them ties."""
    rows = []
    for number in range(count):
        first = random_image(12, 9 + number % 5, seed=number)
        second = random_image(8 + number % 3, 13, seed=number)
        rows.append(make_row(number, jpg_0=first, jpg_1=second, label_0=number % 3, label_1=1))
    return rows


def assert_batch_contains(batch, number, pair):
    """The batch has this pair at a place. Its images are the chosen ones of all pairs, and then the rejected ones."""
    size = len(batch["caption"])
    assert batch.keys() == pair.keys()
    assert batch["skipped"][number] == 0
    for name in ("caption", "row"):
        assert batch[name][number] == pair[name], name
    for name in ("add_time_ids", "timesteps", "noise"):
        assert torch.equal(batch[name][number], pair[name]), name
    for name in ("pixel_values", "posterior_noise"):
        assert torch.equal(batch[name][[number, size + number]], pair[name]), name


@pytest.mark.parametrize(("size", "processes", "workers"), [(4, 1, 0), (1, 1, 2), (2, 3, 2)])
def test_visit_depends_only_on_seed_and_position(script, size, processes, workers):
    """From position 12 on, over two epochs, with real loaders, and without the process's own random generator."""
    flags = {"random_crop": True, "label_noise_prob": 0.4, "no-remove_ties": True}
    flags.update(train_batch_size=size, dataloader_num_workers=workers)
    pairs = make_pairs(script, varied_rows(24), **flags)
    layout = script.Layout(shards_mixed=4, lanes=1, turn=4)
    order = np.concatenate([script.epoch_order(pairs.index, 0, epoch, layout) for epoch in range(3)])
    steps = 48 // (size * processes)
    torch.manual_seed(0)
    generator_state = torch.get_rng_state()

    seen = []
    for rank in range(processes):
        endless = script.training_batches(pairs.index, 0, layout, size, 12, rank, processes)
        batches = itertools.islice(endless, steps)
        loader = script.data_iterator(pairs, workers, batch_sampler=batches, collate_fn=script.collate_pairs)
        for step, batch in enumerate(loader):
            assert len(batch["caption"]) == size
            for number in range(size):
                position = 12 + (step * processes + rank) * size + number
                pair = pairs[script.Visit(position, int(order[position]))]
                assert_batch_contains(batch, number, pair)
                seen.append(position)

    assert sorted(seen) == list(range(12, 60))
    assert torch.equal(torch.get_rng_state(), generator_state)
