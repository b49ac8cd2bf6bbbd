#!/usr/bin/env bash
# Check the evaluation before you train: the paper's Table 2 from published weights, without any training.
# Expected (Aesthetic / HPS v2.1 / PickScore): SDXL 6.03 / 30.0 / 22.4, MaPO 6.34 / 31.2 / 22.9, DPO 6.03 / 31.1 / 22.9.
# HPS is scored with both resizes: compare the one that gives SDXL's row, about 30.0, and say which when you report it.
# 1,500 images take one H100 1.8 hours without --compile, estimated: 0.69 PFLOP per image (tests/benchmarks/flops.py) at
# 16 % of its peak, which stock diffusers reaches. If the hub no longer has the test prompts of Pick-a-Pic v2, use
# another copy: PROMPTS=FILE, with a column caption.
# Flags given to this file are appended to the command and override its own.
set -euo pipefail
HERE=$(cd "$(dirname "$0")/../.." && pwd)
OUTPUT=${OUTPUT:-table2}

accelerate launch --config_file "$HERE/launch_configs/single_gpu.yaml" "$HERE/evaluate_diffusion_mapo_sdxl.py" \
    --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
    --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix \
    --candidates mapo=mapo-t2i/mapo-beta dpo=mhdang/dpo-sdxl-text2image-v1 \
    --prompts "${PROMPTS:-pickapic_v2}" --prompt_column caption \
    --scorers aesthetic hps hps_no_antialias pickscore --mixed_precision bf16 --seed 0 --output_dir "$OUTPUT" "$@"
