#!/usr/bin/env bash
# Culture, Pick-Culture (version 2 of the paper). Its 13k pairs are not public, as far as we know: set DATASET to your
# own, or MAKE_FROM to a file of prompts.
# 4 A100: 4 GPUs x 4 pairs x 8 accumulated batches = 128 pairs per step, 2,000 steps, the full UNet, beta 32.
# One 80 GB GPU: 1 x 16 x 8.
# Flags given to this file are appended to the training command and override its own. Set OUTPUT instead of
# --output_dir, because the evaluation reads the results from there.
set -euo pipefail
HERE=$(cd "$(dirname "$0")/../.." && pwd)
OUTPUT=${OUTPUT:-mapo-culture}

# The pairs of version 2 are not on the hub: FLUX.1-schnell generated them with a prefix on the chosen side, and a
# vision-language model kept those above 5 of 10. MAKE_FROM=FILE, a file of prompts without style words, makes such pairs
# with SDXL first. This repository has no such judge; --scorer and --min_score come closest.
if [ -n "${MAKE_FROM:-}" ]; then
    accelerate launch --config_file "$HERE/launch_configs/multi_gpu.yaml" --num_processes 4 \
        "$HERE/make_pick_style_sdxl.py" \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
        --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix \
        --prompts "$MAKE_FROM" --style_prefix "East-Asian art style images." \
        --mixed_precision bf16 --seed 0 --output_dir "$OUTPUT-pairs"
    DATASET=$OUTPUT-pairs
fi
DATASET=${DATASET:?Set DATASET to a folder or hub id of pairs, or MAKE_FROM to a file of prompts.}

accelerate launch --config_file "$HERE/launch_configs/deepspeed_zero2.yaml" --num_processes 4 \
    "$HERE/train_diffusion_mapo_sdxl.py" \
    --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
    --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix \
    --dataset_name "$DATASET" --cache_latents \
    --beta_mapo 32 --learning_rate 1e-7 --lr_scheduler cosine --lr_warmup_steps 0 \
    --train_batch_size 4 --gradient_accumulation_steps 8 --max_train_steps 2000 \
    --use_8bit_adam --gradient_checkpointing --mixed_precision bf16 \
    --num_validation_pairs 64 --run_validation --validation_steps 200 --checkpointing_steps 500 \
    --seed 0 --output_dir "$OUTPUT" "$@"

# The paper has a vision-language model judge culture on the HPDv2 prompts, which no script here does, and shows its
# scores as a plot (Figure 3a), without numbers. These scores tell how training changed image quality.
accelerate launch --config_file "$HERE/launch_configs/multi_gpu.yaml" --num_processes 4 \
    "$HERE/evaluate_diffusion_mapo_sdxl.py" \
    --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
    --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix --candidates "mapo=$OUTPUT" \
    --prompts hpdv2 --scorers hps clip aesthetic --mixed_precision bf16 --seed 0 --output_dir "$OUTPUT/evaluation"
