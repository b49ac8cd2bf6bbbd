"""The training script on SDXL at its real size, on a CPU: does it load, train, die, resume, save and load again?

    pip install --no-deps open_clip_torch              # for CLIP's vocabulary
    python tests/benchmarks/full_size.py FOLDER        # 24 GB of memory, 50 GB of disk

FOLDER gets a pipeline of SDXL's configs with random bfloat16 weights (7 GB), its UNet in float32 (10 GB), and pairs
of 256 px. Loading is measured in processes of its own. A LoRA and the whole UNet are trained through the launcher:
two steps with a checkpoint after each, killed (-9) when the first is complete, and resumed. What was saved must then
load into a plain pipeline and change what its UNet predicts. Memory is resident memory of the launched processes, read
ten times a second. The table's rows are in FOLDER/full_size.jsonl, too. It takes ten minutes on two cores that have
instructions for bfloat16, and far longer without.
"""

import argparse
import contextlib
import gzip
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

import psutil
import torch


ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]
os.environ |= {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}

SHARED = "--resolution 256 --cache_latents --gradient_checkpointing --mixed_precision bf16 --seed 0 --logging_steps 1 "
SHARED += "--train_batch_size 1 --max_train_steps 2 --checkpointing_steps 1 --checkpoints_total_limit 1"
RUNS = {
    "LoRA of rank 16": "--rank 16 --learning_rate 1e-3 --gradient_accumulation_steps 2",
    "whole UNet": "--full_bf16 --use_8bit_adam --learning_rate 1e-5",
}
LOADED = RUNS | {
    "whole UNet, float32": "--learning_rate 1e-5",
    "LoRA of rank 16, float32 files": "--rank 16 --pretrained_unet_name_or_path {folder}/float32-unet",
}
STATE, LORA, KOHYA = "mapo_state.json", "pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"
# Attention, feed-forward and projections of 70 transformer blocks, convolutions of the resnets, and embeddings.
KOHYA_LAYERS = 784


def clip_tokenizer(pad_token):
    """CLIP's own vocabulary, from the file that open_clip brings; nothing of it is imported."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    package = importlib.util.find_spec("open_clip")
    if package is None:
        sys.exit("CLIP's vocabulary: pip install --no-deps open_clip_torch")
    lines = gzip.open(Path(package.origin).parent / "bpe_simple_vocab_16e6.txt.gz", "rt").read().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    symbols = list(bytes_to_unicode().values())
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *("".join(merge) for merge in merges)]
    vocab = {token: number for number, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    assert len(vocab) == 49408
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=77)


def build(folder):
    """The pipeline and the pairs, once."""
    from diffusers import UNet2DConditionModel
    from gpu import build_sdxl
    from small_world import draw_pairs

    if (folder / "built").exists():
        return
    build_sdxl(folder, "cpu")
    unet = UNet2DConditionModel.from_pretrained(folder / "pipeline", subfolder="unet")
    unet.save_pretrained(folder / "float32-unet", max_shard_size="20GB")
    for name, pad_token in {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}.items():
        clip_tokenizer(pad_token).save_pretrained(folder / "pipeline" / name)
    draw_pairs(folder / "pairs", num_pairs=4, num_shards=1, size=256)
    (folder / "built").touch()


def watch(command, until=None):
    """
    Run a command to its end, or kill it and all that it started when the file `until` is there; returns seconds,
    the peak of resident memory in GB, and what was printed.
    """
    started, peak = time.perf_counter(), 0
    output = tempfile.TemporaryFile("w+")
    process = subprocess.Popen(command, stdout=output, stderr=output)
    tree = psutil.Process(process.pid)
    while process.poll() is None:
        members = [tree, *tree.children(recursive=True)]
        resident = 0
        for member in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                resident += member.memory_info().rss
        peak = max(peak, resident)
        for member in reversed(members if until is not None and until.exists() else []):
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        time.sleep(0.1)
    output.seek(0)
    printed = output.read()
    if until is None and process.returncode:
        sys.exit(printed[-3000:])
    return time.perf_counter() - started, peak / 1e9, printed


def size(folder, pattern="**/*"):
    return sum(path.stat().st_size for path in folder.glob(pattern) if path.is_file()) / 1e9


def command_line(folder, flags, output):
    words = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "launch_configs" / "cpu.yaml"]
    words += [ROOT / "train_diffusion_mapo_sdxl.py", "--pretrained_model_name_or_path", folder / "pipeline"]
    words += ["--dataset_name", folder / "pairs", "--cache_dir", folder / "cache", "--output_dir", output]
    return [sys.executable, *map(str, words), *SHARED.split(), *(flag.format(folder=folder) for flag in flags.split())]


def train(folder, name):
    """A run that is killed and resumed; returns its rows of the table."""
    output = folder / "runs" / name.replace(" ", "-")
    command, checkpoint = command_line(folder, RUNS[name], output), output / "checkpoint-1"
    seconds, peak, _ = watch(command, until=checkpoint / STATE)
    rows = [{"what": f"{name}: from the start to its first checkpoint, killed", "seconds": seconds, "peak GB": peak}]
    rows[-1] |= {"checkpoint GB": size(checkpoint)}
    seconds, peak, printed = watch([*command, "--resume_from_checkpoint", "latest"])
    assert json.loads((output / "checkpoint-2" / STATE).read_text())["step"] == 2, printed[-3000:]
    rows += [{"what": f"{name}: resumed, a step, saved", "seconds": seconds, "peak GB": peak}]
    rows[-1] |= {"result GB": sum(size(output, pattern) for pattern in ("unet/*", "*.safetensors"))}
    return rows


def load(folder, name):
    """What a plain pipeline predicts with the saved weights, and without them."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from safetensors import safe_open

    output, started = folder / "runs" / name.replace(" ", "-"), time.perf_counter()
    options = {"torch_dtype": torch.bfloat16, "add_watermarker": False}
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder / "pipeline", **options)
    inputs = {"sample": torch.randn(1, 4, 32, 32, generator=torch.manual_seed(0)), "timestep": torch.tensor(500)}
    inputs["encoder_hidden_states"] = torch.randn(1, 77, 2048)
    inputs = {key: value.to(torch.bfloat16) for key, value in inputs.items()}
    conditions = {"text_embeds": torch.ones(1, 1280, dtype=torch.bfloat16), "time_ids": torch.ones(1, 6)}
    predict = lambda: pipeline.unet(**inputs, added_cond_kwargs=conditions).sample.float()  # noqa: E731
    row = {"what": f"{name}: loaded into a plain pipeline"}
    with torch.no_grad():
        before = predict()
        if (output / "unet").exists():
            pipeline.unet = UNet2DConditionModel.from_pretrained(output / "unet", torch_dtype=torch.bfloat16)
        else:
            pipeline.load_lora_weights(output, weight_name=LORA)
            with safe_open(output / KOHYA, "pt") as file:
                layers = {key.split(".")[0] for key in file.keys()}
            assert len(layers) == KOHYA_LAYERS, len(layers)
            row |= {"kohya layers": len(layers)}
        changed = (predict() - before).norm() / before.norm()
    assert 0 < changed < 1
    return [row | {"seconds": time.perf_counter() - started, "change of its prediction": changed.item()}]


def loading(folder, name):
    """
    The script's own loading: its peak, with and without the files' pages that are mapped into memory and that the
    kernel may take away at any time, beside what it keeps and the size of the weights.
    """
    import train_diffusion_mapo_sdxl as script

    args = script.parse_args(command_line(folder, LOADED[name], folder / "runs" / "loading")[6:])
    accelerator = script.build_accelerator(args)
    script.load_configs(args)
    read = psutil.Process().memory_info
    own, loaded = [], threading.Event()
    before, started = read(), time.perf_counter()

    def watch_own():
        while not loaded.wait(0.05):
            own.append((now := read()).rss - now.shared)

    watcher = threading.Thread(target=watch_own, daemon=True)
    watcher.start()
    pipeline = script.load_pipeline(args, accelerator)
    seconds, kept = time.perf_counter() - started, read().rss - before.rss
    loaded.set()
    watcher.join()
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    weights = sum(weight.numel() * weight.element_size() for part in parts for weight in part.parameters())
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    row = {"what": f"{name}: loading", "seconds": seconds, "peak GB": (int(peak) * 1024 - before.rss) / 1e9}
    row["without files GB"] = (max(own) - (before.rss - before.shared)) / 1e9
    return row | {"kept GB": kept / 1e9, "weights GB": weights / 1e9}


def in_a_process(folder, name):
    """`loading` in a process of its own, whose peak is its own."""
    words = [sys.executable, __file__, str(folder), "--loading", name]
    return [json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[-1])]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--loading", choices=LOADED, help="only load for this run, and print what that takes")
    args = parser.parse_args()
    folder = args.folder.resolve()
    if args.loading:
        print(json.dumps(loading(folder, args.loading)))
        return
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "full_size.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    build(folder)
    where = {"date": str(date.today()), "machine": f"{os.cpu_count()} cores, {platform.machine()}"}
    where |= {library: version(library) for library in ("torch", "diffusers", "transformers", "bitsandbytes")}
    parts = {}
    for name in LOADED:
        parts[f"{name}, loading"] = partial(in_a_process, folder, name)
    for name in RUNS:
        parts |= {name: partial(train, folder, name), f"{name}, saved": partial(load, folder, name)}
    for part, function in parts.items():
        if not any(line["part"] == part for line in lines):
            new = [{"part": part, **row, **where} for row in function()]
            lines += new
            with results.open("a") as file:
                file.write("".join(json.dumps(line) + "\n" for line in new))
            print(*(json.dumps(line) for line in new), sep="\n", flush=True)
    columns = ["seconds", "peak GB", "without files GB", "kept GB", "weights GB", "checkpoint GB", "result GB"]
    print(f"\n| what | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for line in lines:
        cells = [f"{line[column]:.{0 if column == 'seconds' else 2}f}" if column in line else "" for column in columns]
        print(f"| {line['what']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
