#!/usr/bin/env bash
# General preference, Pick-a-Pic v2: Table 2 of the paper's version 2. Needs a copy of the data, which left the hub in 2025.
# 8 H100 of 80 GB: 8 GPUs x 16 pairs x 16 accumulated batches = 2,048 pairs per step, 2,000 steps, the full UNet, beta 8.
# (The paper: 8 x 32 x 8, by our accounting 75 GiB in float32 weights.) On fewer GPUs keep the product: 4 x 16 x 32.
# The 335 GB of pairs are streamed, ties are dropped; each of the 8 loader workers of a process keeps --shuffle_shards row
# groups in memory. Add --resume_from_checkpoint latest to resume a run that was stopped.
# Flags given to this file are appended to the training command and override its own. Set OUTPUT instead of
# --output_dir, because the evaluation reads the results from there.
set -euo pipefail
HERE=$(cd "$(dirname "$0")/../.." && pwd)
DATASET=${DATASET:?Set DATASET to your copy of Pick-a-Pic v2.}
OUTPUT=${OUTPUT:-mapo-pickapic}

accelerate launch --config_file "$HERE/launch_configs/deepspeed_zero2.yaml" --num_processes 8 \
    "$HERE/train_diffusion_mapo_sdxl.py" \
    --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
    --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix \
    --dataset_name "$DATASET" --dataset_split_name train --streaming --dataloader_num_workers 8 \
    --beta_mapo 8 --learning_rate 1e-7 --lr_scheduler cosine --lr_warmup_steps 0 \
    --train_batch_size 16 --gradient_accumulation_steps 16 --max_train_steps 2000 \
    --use_8bit_adam --gradient_checkpointing --mixed_precision bf16 \
    --num_validation_pairs 256 --validation_steps 200 --checkpointing_steps 200 --checkpoints_total_limit 3 \
    --seed 0 --output_dir "$OUTPUT" "$@"

# To compare, Table 2 of version 2 (Aesthetic / HPS v2.1 / PickScore): SDXL 6.03 / 30.0 / 22.4, MaPO 6.34 / 31.2 / 22.9.
accelerate launch --config_file "$HERE/launch_configs/multi_gpu.yaml" --num_processes 8 \
    "$HERE/evaluate_diffusion_mapo_sdxl.py" \
    --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
    --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix --candidates "mapo=$OUTPUT" \
    --prompts pickapic_v2 --scorers aesthetic hps pickscore --mixed_precision bf16 --seed 0 --output_dir "$OUTPUT/evaluation"
