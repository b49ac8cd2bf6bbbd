"""Measure how pairs are indexed, read, mixed and resumed, as Markdown tables.

    python tests/benchmarks/pairs.py

The first table is of a local imitation of a data set of 645 files and 900,000 rows, whose images are 64 random bytes;
the last one uses the tiny pipeline of `tests/small_world.py`.
"""

import io
import itertools
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
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from fsspec.implementations.local import LocalFileOpener
from PIL import Image


sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import command_line, load_script, run  # noqa: E402
from small_world import build_pipeline, draw_pairs  # noqa: E402


script = load_script()

FILES, ROWS, GROUP = 645, 900_000, 350
SIDE, PAIRS = 1024, 24
LONG, MOMENTS = 100_000, (1_000, 10_000, 100_000)
EARLY, LATE, REPEATS = 10, 10_000, 3


def random_binary(rng, rows, size):
    """A column of `rows` random byte strings of one size."""
    offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * size)
    return pa.Array.from_buffers(pa.binary(), rows, [None, offsets.buffers()[1], pa.py_buffer(rng.bytes(rows * size))])


def write(file, images, rows, group):
    """A file of pairs, the first image always the chosen one; `images(rows)` gives a column."""
    file.parent.mkdir(parents=True, exist_ok=True)
    columns = {"caption": [f"a caption of an ordinary length, number {row}" for row in range(rows)]}
    columns |= {"jpg_0": images(rows), "jpg_1": images(rows), "label_0": rows * [1], "label_1": rows * [0]}
    pq.write_table(pa.table(columns), file, row_group_size=group)


def load_pairs(folder, resolution=8, **flags):
    flags = {"pretrained_model_name_or_path": "none", "dataset_name": folder, "streaming": True, "seed": 0, **flags}
    flags |= {"cache_dir": folder.parent / f"{folder.name}-cache", "resolution": resolution}
    args = script.parse_args(command_line(flags))
    pairs, _ = script.load_pairs(args, (4, resolution // 8, resolution // 8), 1000)
    return args, pairs


def batches(args, pairs):
    layout = script.Layout(shards_mixed=args.shuffle_shards, turn=args.train_batch_size)
    visits = script.training_batches(pairs.index, args.seed, layout, args.train_batch_size, 0, 0, 1)
    return script.data_iterator(
        pairs, args.dataloader_num_workers, batch_sampler=visits, collate_fn=script.collate_pairs
    )


def timed_index(folder):
    """Seconds of a start, and bytes read from the data files."""
    read = []

    def counted(opened, *args):
        read.append(len(data := opened.f.read(*args)))
        return data

    start = time.perf_counter()
    with mock.patch.object(LocalFileOpener, "read", counted, create=True):
        load_pairs(folder)
    return time.perf_counter() - start, sum(read)


def print_index(folder):
    rng = np.random.default_rng(0)
    for file, rows in enumerate(np.diff(np.linspace(0, ROWS, FILES + 1).astype(int)).tolist()):
        write(folder / "many" / f"{file:04d}.parquet", lambda rows: random_binary(rng, rows, 64), rows, GROUP)
    write(folder / "large" / "0.parquet", lambda rows: random_binary(rng, rows, 2**20), 200, 50)
    print("| data set | MB | start | seconds | MB read from the files |\n|---|---|---|---|---|")
    for name, text in (("many", f"{FILES} files, {ROWS:,} rows"), ("large", "1 file, 200 rows, images of 1 MB")):
        size = sum(file.stat().st_size for file in (folder / name).iterdir()) / 1e6
        for start in ("first", "second"):
            seconds, read = timed_index(folder / name)
            print(f"| {text} | {size:.1f} | {start} | {seconds:.1f} | {read / 1e6:.2f} |", flush=True)


def encoded(image, kind):
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return buffer.getvalue()


def photo(seed):
    """Smooth shapes under grain: as hard to compress as a photo."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(256, size=(16, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float32)
    return Image.fromarray((smooth + rng.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8))


def print_throughput(folder):
    print(f"\n| streamed at {SIDE} px, one core | pairs per second | MB per image |\n|---|---|---|")
    for kind in ("PNG", "JPEG"):
        images = itertools.cycle([encoded(photo(seed), kind) for seed in range(PAIRS)])
        write(folder / kind / "0.parquet", lambda rows: list(itertools.islice(images, rows)), PAIRS, 8)
        loader = iter(batches(*load_pairs(folder / kind, SIDE)))
        next(loader)
        start = time.perf_counter()
        for _ in range(PAIRS // 4):
            next(loader)
        size = (folder / kind / "0.parquet").stat().st_size / 2 / PAIRS / 1e6
        print(f"| {kind} | {PAIRS / (time.perf_counter() - start):.1f} | {size:.2f} |", flush=True)


def print_memory(folder):
    image = encoded(Image.fromarray(np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)), "PNG")
    write(folder / "long" / "0.parquet", lambda rows: rows * [image], LONG, 100)
    args, pairs = load_pairs(folder / "long")
    process = psutil.Process()
    print(f"\n{LONG:,} pairs in row groups of 100, {args.shuffle_shards} of which are kept:\n")
    print("| pairs streamed | resident MiB | row groups in memory |\n|---|---|---|")
    for seen, _ in enumerate(batches(args, pairs), start=1):
        if 4 * seen in MOMENTS:
            print(
                f"| {4 * seen:,} | {process.memory_info().rss / 2**20:.0f} | {len(pairs.rows.kept[0])} |", flush=True
            )
        if 4 * seen == LONG:
            return


def print_mixing(groups=100, rows=100, batch=16):
    index, seeds = np.argwhere(np.ones((groups, rows, 1), dtype=int)), range(10)
    print(f"\n{groups} row groups of {rows} rows, one epoch, {len(seeds)} seeds:\n")
    print(f"| --shuffle_shards | Spearman with storage, mean of sizes | row groups in a batch of {batch} |")
    print("|---|---|---|")
    for mixed in (1, 4, 16, groups):
        orders = [script.epoch_order(index, seed, 0, script.Layout(mixed, 1, batch)) for seed in seeds]
        # Numbers of pairs are their own ranks.
        sizes = [abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) for order in orders]
        taken = [len(set(part)) for order in orders for part in (order // rows).reshape(-1, batch).tolist()]
        name = f"{mixed}, as a map-style data set" if mixed == groups else mixed
        print(f"| {name} | {np.mean(sizes):.3f} | {np.mean(taken):.1f} |")


def seconds_to_first_step(flags, checkpoint, step):
    """From the script's start, libraries imported, to the end of its first step; and of these, waiting for pairs."""
    times, train, train_step = {}, script.train, script.train_step

    def timed_train(*args):
        times["train"] = time.perf_counter()
        return train(*args)

    def timed_step(*args):
        times["step"] = time.perf_counter()
        result = train_step(*args)
        times["end"] = time.perf_counter()
        return result

    start = time.perf_counter()
    with mock.patch.multiple(script, train=timed_train, train_step=timed_step):
        run(script, {**flags, "resume_from_checkpoint": checkpoint, "max_train_steps": step + 1})
    return times["end"] - start, times["step"] - times["train"]


def print_resuming(folder):
    build_pipeline(folder / "pipeline")
    draw_pairs(folder / "pairs", num_pairs=1000, num_shards=4, row_group_size=50)
    flags = {"pretrained_model_name_or_path": folder / "pipeline", "dataset_name": folder / "pairs", "seed": 0}
    flags |= {"cache_dir": folder / "cache", "resolution": 64, "rank": 4, "report_to": "none"}
    flags |= {"train_batch_size": 4, "max_train_steps": EARLY, "checkpointing_steps": EARLY}
    print(f"\n1,000 pairs in row groups of 50, batches of 4, medians of {REPEATS}:\n")
    print("| resumed at step | | seconds to the end of the first step | of these, to the first batch |")
    print("|---|---|---|---|")
    for name, streaming in (("map-style", None), ("streamed", True)):
        flags.update(output_dir=folder / name, streaming=streaming)
        early = run(script, flags) / f"checkpoint-{EARLY}"
        late = Path(shutil.copytree(early, early.with_name(f"checkpoint-{LATE}")))
        state = json.loads((late / "mapo_state.json").read_text())
        state.update(step=LATE, pairs_seen=LATE * flags["train_batch_size"])
        (late / "mapo_state.json").write_text(json.dumps(state))
        for step, checkpoint in ((EARLY, early), (LATE, late)):
            times = [seconds_to_first_step(flags, checkpoint, step) for _ in range(REPEATS)]
            whole, waiting = (statistics.median(column) for column in zip(*times))
            print(f"| {step:,} | {name} | {whole:.2f} | {waiting:.3f} |", flush=True)


def main():
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for table in (print_index, print_throughput, print_memory, print_resuming):
            table(Path(folder))
    print_mixing()


if __name__ == "__main__":
    main()
