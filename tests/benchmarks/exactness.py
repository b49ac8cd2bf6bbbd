"""
The same run made in other ways: worst differences of the logged losses (relative) and of the final weights (absolute)
to the reference run of each block. A LoRA on the tiny pipeline, 8 steps of 4 pairs, learning rate 1e-3.

    python tests/benchmarks/exactness.py
"""

import sys
import tempfile
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import launch, scalars  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from small_world import build_pipeline, draw_pairs  # noqa: E402


STREAM = {"streaming": True, "shuffle_shards": 2}
FOUR, TWO = {"train_batch_size": 4}, {"train_batch_size": 2}
# Name: (processes, flags, what it is compared with, the run to resume at step 4).
RUNS = {
    "prepared, 1 process x 4 pairs": (1, FOUR, None, None),
    "accumulation 4 x 1 pair": (1, {"train_batch_size": 1, "gradient_accumulation_steps": 4}, 0, None),
    "2 processes x 2 pairs": (2, TWO, 0, None),
    "gradient checkpointing": (1, {**FOUR, "gradient_checkpointing": True}, 0, None),
    "2 loader workers": (1, {**FOUR, "dataloader_num_workers": 2}, 0, None),
    "`--cache_latents`": (1, {**FOUR, "cache_latents": True}, 0, None),
    "resumed": (1, FOUR, 0, 0),
    "resumed on 2 processes": (2, TWO, 0, 0),
    "streamed, 1 process x 4 pairs": (1, {**FOUR, **STREAM}, None, None),
    "streamed, `--cache_latents`": (1, {**FOUR, **STREAM, "cache_latents": True}, 8, None),
    "streamed, resumed with 2 workers": (1, {**FOUR, **STREAM, "dataloader_num_workers": 2}, 8, 8),
    "streamed, resumed on 2 processes": (2, {**TWO, **STREAM}, 8, 8),
    "streamed, resumed on 2 processes with 2 workers": (2, {**TWO, **STREAM, "dataloader_num_workers": 2}, 8, 8),
    "streamed, 2 processes x 2 pairs, 2 workers": (2, {**TWO, **STREAM, "dataloader_num_workers": 2}, None, None),
    "streamed, resumed on 1 process, 0 workers": (1, {**FOUR, **STREAM}, 13, 13),
}


def difference(folder, other):
    losses, expected = scalars(folder)["loss"], scalars(other)["loss"]
    weights, others = (load_file(path / "pytorch_lora_weights.safetensors") for path in (folder, other))
    loss = max(abs(value - expected[step]) / abs(expected[step]) for step, value in losses.items())
    return loss, max((weight - others[name]).abs().max().item() for name, weight in weights.items())


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        build_pipeline(folder / "pipeline")
        draw_pairs(folder / "pairs", num_pairs=48, num_shards=3, row_group_size=4)
        flags = {
            "pretrained_model_name_or_path": folder / "pipeline",
            "dataset_name": folder / "pairs",
            "cache_dir": folder / "cache",
            "resolution": 64,
            "rank": 4,
            "learning_rate": 1e-3,
            "max_train_steps": 8,
            "checkpointing_steps": 4,
            "logging_steps": 1,
            "seed": 0,
        }
        print("| run | compared with | losses, relative | final weights, absolute |\n|---|---|---|---|")
        names = list(RUNS)
        for number, (name, (processes, changes, other, resumed)) in enumerate(RUNS.items()):
            changes = {**flags, **changes, "output_dir": folder / str(number)}
            if resumed is not None:
                changes["resume_from_checkpoint"] = folder / str(resumed) / "checkpoint-4"
            done = launch(changes, processes)
            assert done.returncode == 0, done.stderr
            if other is not None:
                loss, weight = difference(folder / str(number), folder / str(other))
                print(f"| {name} | {names[other]} | {loss:.1e} | {weight:.1e} |", flush=True)


if __name__ == "__main__":
    main()
