#!/usr/bin/env bash
# A pretrained model learns a task: every command of docs/real_model.md. run.sh [FOLDER [SEED]]
set -euo pipefail
out=${1:-runs/real} seed=${2:-0}
task=(--environment reasoning_gym:chain_sum --environment-args "{\"size\": 600, \"eval_size\": 200,
    \"min_terms\": 2, \"max_terms\": 2, \"min_digits\": 1, \"max_digits\": 2, \"seed\": $seed,
    \"instruction\": \"Answer with the number alone.\"}")
drawn=(--max-new-tokens 12 --num-generations 8)
examples=examples/real_model
mkdir -p "$out"
set -x
[ -d "$out/model" ] || python $examples/model.py "$out/model"
spo eval --store "$out/store.db" "${task[@]}" "${drawn[@]}" --split test --model "$out/model" --k 1,8 \
    --out "$out/spo/evaluation-0-pretrained"
