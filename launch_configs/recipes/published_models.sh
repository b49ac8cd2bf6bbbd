#!/usr/bin/env bash
# Check the evaluation before you train: scores the published SDXL models of six methods on 500 Pick-a-Pic prompts, and
# prints beside each difference to SDXL the published one. mapo-t2i/mapo-beta belongs to version 1 of the paper; the
# model of version 2's Table 2 is not public.
# STEPS=50 (the default) or STEPS=20, both with guidance 5, are the settings of the published tables, whose figures and
# sources are in published_models.py. Only differences within a table compare: SDXL's own scores move with prompts, steps
# and resize. HPS is scored with both resizes; the older one, without antialiasing, is that of the published tables.
# 3,500 images take one H100 4.2 hours (STEPS=20: 1.7 hours) without --compile, estimated: 0.69 PFLOP for 50 steps
# (tests/benchmarks/estimate.py) at 16 % of its peak, which stock diffusers reaches. If the hub no longer has the prompts,
# use another copy: PROMPTS=FILE, with a column caption.
# Flags given to this file are appended to the evaluation's command and override its own. Set OUTPUT and STEPS instead of
# --output_dir and --num_inference_steps, because the comparison reads them.
set -euo pipefail
HERE=$(cd "$(dirname "$0")/../.." && pwd)
STEPS=${STEPS:-50}
[[ $STEPS == 50 || $STEPS == 20 ]] || { echo "STEPS must be 50 or 20, not $STEPS." >&2; exit 2; }
OUTPUT=${OUTPUT:-published-models-$STEPS}

accelerate launch --config_file "$HERE/launch_configs/single_gpu.yaml" "$HERE/evaluate_diffusion_mapo_sdxl.py" \
    --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
    --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix \
    --candidates dpo=mhdang/dpo-sdxl-text2image-v1 mapo=mapo-t2i/mapo-beta \
    spo=SPO-Diffusion-Models/SPO-SDXL_4k-p_10ep inpo=JaydenLu666/InPO-SDXL smpo=JaydenLu666/SmPO-SDXL \
    linear_dpo=whynot0128/Linear-DPO-SDXL \
    --prompts "${PROMPTS:-pickapic_v2}" ${PROMPTS:+--prompt_column caption} --max_prompts 500 \
    --num_inference_steps "$STEPS" --guidance_scale 5 \
    --scorers pickscore hps_no_antialias hps imagereward aesthetic \
    --mixed_precision bf16 --seed 0 --output_dir "$OUTPUT" "$@"

python "$HERE/launch_configs/recipes/published_models.py" "$OUTPUT/results.json" --steps "$STEPS"
