#!/usr/bin/env bash
# Personalization of one DreamBooth subject, the paper's Table 1: chosen = its photos, rejected = the base model's own
# images of the same prompts. The full training set is the batch: 1 GPU x 1 pair x 5 accumulated = 5 pairs per step for five
# photos (PAIRS). DCO's settings: a LoRA of rank 32 on the UNet (5e-5) and both text encoders (5e-6), 2,000 steps; beta
# 1024. DCO's textual inversion is left out: name the subject by a rare word.
# PHOTOS: a folder of the photos; CAPTIONS: a text file that describes them, a line for each in the order of their names
# ("a photo of sks dog, lying in the grass"); PROMPTS: a text file of prompts with the subject, to evaluate.
# Flags given to this file are appended to the training command and override its own. Set OUTPUT instead of
# --output_dir, because the evaluation reads the results from there.
set -euo pipefail
HERE=$(cd "$(dirname "$0")/../.." && pwd)
PHOTOS=${PHOTOS:?Set PHOTOS to a folder of photos of the subject.}
CAPTIONS=${CAPTIONS:?Set CAPTIONS to a text file with a caption of each photo, in the order of their names.}
PROMPTS=${PROMPTS:?Set PROMPTS to a text file with a prompt on each line.}
PAIRS=${PAIRS:-5}
OUTPUT=${OUTPUT:-mapo-personalization}

accelerate launch --config_file "$HERE/launch_configs/single_gpu.yaml" \
    "$HERE/make_pick_style_sdxl.py" \
    --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
    --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix \
    --prompts "$CAPTIONS" --chosen_images "$PHOTOS" --mixed_precision bf16 --seed 0 --output_dir "$OUTPUT-pairs"

accelerate launch --config_file "$HERE/launch_configs/single_gpu.yaml" \
    "$HERE/train_diffusion_mapo_sdxl.py" \
    --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
    --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix \
    --dataset_name "$OUTPUT-pairs" \
    --rank 32 --beta_mapo 1024 --learning_rate 5e-5 --lr_warmup_steps 0 --train_text_encoder --text_encoder_lr 5e-6 \
    --train_batch_size 1 --gradient_accumulation_steps "$PAIRS" --max_train_steps 2000 \
    --gradient_checkpointing --mixed_precision bf16 --checkpointing_steps 500 \
    --seed 0 --output_dir "$OUTPUT" "$@"

# To compare, Table 1 of the paper's version 2 (Aesthetic / SigLIP / DINOv2): DreamBooth 5.91 / 61.60 / 84.69, DCO 5.92 /
# 70.45 / 89.12, MaPO 5.97 / 73.60 / 89.51. The table averages over subjects; this recipe trains one, with the same
# objective, learning rates, rank and scorers, and without textual inversion. One subject's scores may differ widely.
accelerate launch --config_file "$HERE/launch_configs/single_gpu.yaml" \
    "$HERE/evaluate_diffusion_mapo_sdxl.py" \
    --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
    --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix --candidates "mapo=$OUTPUT" \
    --prompts "$PROMPTS" --images_per_prompt 4 --reference_images "$PHOTOS" --scorers aesthetic siglip dinov2 \
    --mixed_precision bf16 --seed 0 --output_dir "$OUTPUT/evaluation"
