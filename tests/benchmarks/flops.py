"""Count the FLOPs of one pair through SDXL base 1.0 at 1024 px, without a GPU, and compute step times from them.

    python tests/benchmarks/flops.py

Counted are matrix products and convolutions, a multiply-add as two, attention included. The times are estimated from
the share of the dense peak that the best public runs reach; loading and the optimizer's step are left out.
"""

import argparse
import json
from pathlib import Path

import torch
from memory import (
    SDXL_UNET,
    Recipe,
    as_fake,
    build_models,
    encode_captions,
    encode_images,
    preference_loss,
    random_encodings,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


# Dense peaks in TFLOP/s, from NVIDIA's data sheets.
PEAKS = {
    "A100": {"bfloat16": 312, "TF32": 156, "float32": 19.5},
    "H100 SXM": {"bfloat16": 989, "TF32": 495, "float32": 67},
}


# Shares of the peak. Training: NVIDIA's Stable Diffusion 2 in MLPerf Training v4.0, 31 % with CUDA graphs and large
# batches. Generating: SDXL in stock diffusers, 16 % (28 to 31 % with TensorRT).
TRAINING = 0.30
GENERATING = 0.16


def count(function, *args):
    """The return value of a function, and its TFLOP; fused attention would count as nothing on CPU."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        result = function(*args)
    return result, counter.get_total_flops() / 1e12


def count_encoders():
    recipe = Recipe("encoders")
    with FakeTensorMode():
        _, encoders = build_models(recipe, SDXL_UNET, "meta")
        for encoder in encoders:
            as_fake(encoder)
        vae, *text_encoders = encoders
        return count(encode_images, recipe, vae)[1], count(encode_captions, recipe, *text_encoders)[1]


def count_decoder():
    """TFLOP to decode the two images of a pair."""
    recipe = Recipe("decoder")
    with FakeTensorMode():
        vae = build_models(recipe, SDXL_UNET, "meta")[1][0]
        as_fake(vae)
        latents = torch.empty(2, 4, 128, 128, dtype=vae.dtype)
        with torch.no_grad():
            return count(vae.decode, latents)[1]


def count_unet(rank, checkpointing):
    recipe = Recipe("UNet", rank=rank, weights=torch.bfloat16 if rank else torch.float32, checkpointing=checkpointing)
    unet, _ = build_models(recipe, SDXL_UNET, "meta")
    with FakeTensorMode():
        as_fake(unet)
        loss, forward = count(preference_loss, recipe, unet, random_encodings(recipe, unet))
        _, backward = count(loss.backward)
    return forward, backward


def count_all():
    """TFLOP of one pair by part of a step, for the whole UNet and for LoRA."""
    vae, text = count_encoders()
    tables = {}
    for name, rank in (("full", None), ("LoRA rank 16", 16)):
        forward, backward = count_unet(rank, checkpointing=False)
        recompute = count_unet(rank, checkpointing=True)[1] - backward
        tables[name] = {"VAE": vae, "text": text, "forward": forward, "backward": backward, "recompute": recompute}
    return tables


def step_times(tflop, peaks, utilisation, checkpointing):
    """Seconds of a pair with cached encodings, and with the VAE in each precision."""
    unet = tflop["forward"] + tflop["backward"] + checkpointing * tflop["recompute"]
    seconds = {"cached": unet / peaks["bfloat16"] / utilisation}
    for precision, peak in peaks.items():
        encoding = tflop["VAE"] / peak + tflop["text"] / peaks["bfloat16"]
        seconds[f"VAE in {precision}"] = seconds["cached"] + encoding / utilisation
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--utilisation", type=float, default=TRAINING, help="share of the peak that training reaches")
    args = parser.parse_args()
    torch.set_num_threads(1)

    tables = count_all()
    print("TFLOP of one pair (two images, one caption) at 1024 px, counted on fake tensors:\n")
    parts = list(tables["full"])
    print(f"| | {' | '.join(parts)} |\n|{'---|' * (1 + len(parts))}")
    for name, tflop in tables.items():
        print(f"| {name} | {' | '.join(f'{tflop[part]:.2f}' for part in parts)} |")

    print(f"\nSeconds of one pair, estimated at {args.utilisation:.0%} of the dense peak:\n")
    print("PyTorch runs float32 convolutions in TF32 unless told otherwise: of a float32 VAE, nearly all is TF32.\n")
    columns = ["cached", *(f"VAE in {precision}" for precision in PEAKS["A100"])]
    print(f"| GPU | trained | checkpointing | {' | '.join(columns)} |\n|{'---|' * (3 + len(columns))}")
    times = []
    for gpu, peaks in PEAKS.items():
        for name, tflop in tables.items():
            for checkpointing in (True, False):
                seconds = step_times(tflop, peaks, args.utilisation, checkpointing)
                cells = [f"{value:.3f} ({value / seconds['cached']:.2f} x)" for value in seconds.values()]
                print(f"| {gpu} | {name} | {'yes' if checkpointing else 'no'} | {' | '.join(cells)} |")
                times.append({"gpu": gpu, "trained": name, "checkpointing": checkpointing, "seconds": seconds})
    drawing = 50 * 2 * tables["full"]["forward"] + count_decoder()
    hours = 1000 * drawing / PEAKS["H100 SXM"]["bfloat16"] / GENERATING / 3600
    print(f"\nGenerating 1,000 pairs on an H100 (50 steps, guidance, {drawing:.0f} TFLOP each) without --compile,")
    print(f"estimated at {GENERATING:.0%} of the dense peak: {hours:.1f} h")
    if args.json:
        figures = {"estimated": True, "utilisation": args.utilisation, "tflop": tables, "times": times}
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
