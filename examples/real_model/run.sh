#!/usr/bin/env bash
# A pretrained model learns arithmetic: every command of docs/real_model.md, in its order.
# examples/real_model/run.sh [FOLDER [SEED]]
set -euo pipefail
real=${1:-runs/real} seed=${2:-0} here=$(dirname "$0")
mkdir -p "$real"
rm -rf "$real"/store.db* "$real/spo" "$real/started"  # of an earlier run; the model stays
# Sums and differences of two numbers below 100, as a message of the user; the last number that the
# model says is its answer.
sums=(--environment reasoning_gym:chain_sum --environment-args '{"size": 600, "eval_size": 200,
    "min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2, "extract": "flexible", "instruction": ""}')
look=(spo eval --store "$real/store.db" "${sums[@]}" --split test --max-new-tokens 24 --n 8 --k 1,8)
set -x

[ -d "$real/model" ] || python "$here/model.py" "$real/model"
spo import "${sums[@]}" --store "$real/store.db" --tokenizer "$real/model"
"${look[@]}" --model "$real/model" --out "$real/spo/evaluation-0-pretrained"

# A supervised start: the answers of 32 prompts.
python "$here/solutions.py" "$real/store.db" 32 > "$real/solutions.jsonl"
spo import "$real/solutions.jsonl" --store "$real/store.db" --tokenizer "$real/model"
spo export "$real/solved.jsonl" --store "$real/store.db" --min-reward 1
python "$here/../supervised_start.py" "$real/solved.jsonl" "$real/model" "$real/started" --seed "$seed" \
    --learning_rate 5e-5 --num_train_epochs 3 --per_device_train_batch_size 8 --report_to none \
    --save_strategy no --use_cpu true --bf16 false --logging_steps 4
"${look[@]}" --model "$real/started" --out "$real/spo/evaluation-1-started"

spo train --config "$here/train.yaml" --model "$real/started" --store "$real/store.db" --output_dir "$real/spo" \
    --seed "$seed"
"${look[@]}" --model "$real/spo" --out "$real/spo/evaluation-2-spo"
spo report "$real/spo" --store "$real/store.db"
