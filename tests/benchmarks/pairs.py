"""How fast one core turns streamed pairs into tensors at 1024 px, and what memory a long stream takes, as two tables.

python tests/benchmarks/pairs.py --json pairs.json
"""

import argparse
import io
import itertools
import json
import logging
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image


sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import command_line, load_script  # noqa: E402


script = load_script()

SIDE, PAIRS = 1024, 24
LONG, GROUP = 100_000, 100
MOMENTS = (1_000, 10_000, LONG)


def photo(seed):
    """Smooth shapes under grain: as hard to compress as a photo."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(256, size=(16, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float32)
    return Image.fromarray((smooth + rng.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8))


def encoded(image, kind):
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return buffer.getvalue()


def write(file, images, rows, group):
    file.parent.mkdir(parents=True)
    columns = {"caption": [f"pair {row}" for row in range(rows)]}
    for offset, name in enumerate(("jpg_0", "jpg_1")):
        columns[name] = [images[(2 * row + offset) % len(images)] for row in range(rows)]
    columns |= {"label_0": rows * [1], "label_1": rows * [0]}
    pq.write_table(pa.table(columns), file, row_group_size=group)
    return file.parent


def loader(folder, resolution):
    flags = {"pretrained_model_name_or_path": "none", "dataset_name": folder, "cache_dir": folder.parent / "cache"}
    flags |= {"streaming": True, "max_train_steps": 1, "resolution": resolution, "seed": 0}
    args = script.parse_args(command_line(flags))
    stream = script.PairStream(args, script.load_all_pairs(args)[0])
    pairs = script.PairDataset(args, None, (4, resolution // 8, resolution // 8), 1000)
    batches = stream.batches(4, None)
    return pairs.loader(batches), batches


def throughput(folder, kind):
    images = [encoded(photo(seed), kind) for seed in range(2 * PAIRS)]
    batches, stream = loader(write(folder / kind / "train.parquet", images, PAIRS, 8), SIDE)
    taken = iter(batches)
    next(taken)
    start = time.perf_counter()
    for _ in itertools.islice(taken, PAIRS // 2):
        pass
    seconds = (time.perf_counter() - start) / (PAIRS // 2) / 4
    stream.close()
    return {"pairs per second": 1 / seconds, "MB per image": sum(map(len, images)) / len(images) / 1e6}


def small_images():
    return [encoded(Image.fromarray(np.full((8, 8, 3), value, np.uint8)), "PNG") for value in range(200)]


def seconds_to_first_batch(folder):
    """From opening a streamed data set of each number of pairs."""
    seconds = {}
    for rows in MOMENTS:
        data = write(folder / str(rows) / "train.parquet", small_images(), rows, GROUP)
        start = time.perf_counter()
        batches, stream = loader(data, 8)
        next(iter(batches))
        seconds[rows] = time.perf_counter() - start
        stream.close()
    return seconds


def resident(folder):
    """Resident GiB after each number of streamed pairs."""
    batches, stream = loader(write(folder / "long" / "train.parquet", small_images(), LONG, GROUP), 8)
    process, found = psutil.Process(), {}
    for index, _ in enumerate(itertools.islice(batches, LONG // 4), start=1):
        if 4 * index in MOMENTS:
            found[4 * index] = process.memory_info().rss / 2**30
    stream.close()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        memory = resident(Path(folder))
        starts = seconds_to_first_batch(Path(folder))
        speeds = {kind: throughput(Path(folder), kind) for kind in ("PNG", "JPEG")}
    print(f"| streamed at {SIDE} px, one core | pairs per second | MB per image |\n|---|---|---|")
    for kind, found in speeds.items():
        print(f"| {kind} | {found['pairs per second']:.1f} | {found['MB per image']:.2f} |")
    print("\n| pairs | resident GiB after streaming them | s to the first batch of so many |\n|---|---|---|")
    for pairs, gib in memory.items():
        print(f"| {pairs:,} | {gib:.3f} | {starts[pairs]:.2f} |")
    if args.json:
        args.json.write_text(json.dumps({"throughput": speeds, "resident": memory, "first_batch": starts}, indent=2))


if __name__ == "__main__":
    main()
