#!/usr/bin/env bash
# General preference, on pairs that the hub has: Open Image Preferences (Apache 2.0, 2.15 GB). The paper's own pairs
# are gone, see pickapic.sh. Beta and learning rate are the paper's; batch and steps are those of its smaller data sets.
# 4 A100: 4 GPUs x 4 pairs x 8 accumulated batches = 128 pairs per step, 2,000 steps, the full UNet, beta 8.
# One 80 GB GPU: 1 x 16 x 8. Set DATASET to train on other pairs (caption, jpg_0, jpg_1, label_0, label_1) instead, such
# as those that make_pick_style_sdxl.py generates with SDXL and ranks by a scorer (--num_candidates 8 --scorer pickscore).
# Flags given to this file are appended to the training command and override its own. Set OUTPUT instead of
# --output_dir, because the evaluation reads the results from there.
set -euo pipefail
HERE=$(cd "$(dirname "$0")/../.." && pwd)
PREFERENCES=data-is-better-together/open-image-preferences-v1-binarized
DATASET=${DATASET:-$PREFERENCES}
OUTPUT=${OUTPUT:-mapo-general-preference}
columns=
[ "$DATASET" != "$PREFERENCES" ] || columns="--caption_column prompt --chosen_column chosen --rejected_column rejected"

accelerate launch --config_file "$HERE/launch_configs/deepspeed_zero2.yaml" --num_processes 4 \
    "$HERE/train_diffusion_mapo_sdxl.py" \
    --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
    --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix \
    --dataset_name "$DATASET" $columns --cache_latents \
    --beta_mapo 8 --learning_rate 1e-7 --lr_scheduler cosine --lr_warmup_steps 0 \
    --train_batch_size 4 --gradient_accumulation_steps 8 --max_train_steps 2000 \
    --use_8bit_adam --gradient_checkpointing --mixed_precision bf16 \
    --num_validation_pairs 256 --validation_steps 200 --checkpointing_steps 500 \
    --seed 0 --output_dir "$OUTPUT" "$@"

# 500 prompts of Pick-a-Pic. They are not the test prompts of the paper's Table 2.
accelerate launch --config_file "$HERE/launch_configs/multi_gpu.yaml" --num_processes 4 \
    "$HERE/evaluate_diffusion_mapo_sdxl.py" \
    --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
    --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix --candidates "mapo=$OUTPUT" \
    --prompts sayakpaul/pick-a-pic-v2-unique-prompts --prompt_split train --max_prompts 500 \
    --scorers aesthetic hps pickscore --mixed_precision bf16 --seed 0 --output_dir "$OUTPUT/evaluation"
