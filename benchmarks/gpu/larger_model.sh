#!/usr/bin/env bash
# Does a larger model pay the same price? The study's first question on a model of 100 M parameters.
# Usage: CORPUS=DIR benchmarks/gpu/larger_model.sh [OUT_DIR]; CORPUS as `recipes/tiny_olmoe.py` reads it.
# Trains a model of 64 experts, top-8, by the recipe of the shipped one, then plainly, and for locality
# in two ways with their controls, three seeds each, and appends a line a run to OUT_DIR/larger_model.jsonl:
# what is there when time is up stays. Bad news would be: a price in perplexity that is higher than the
# small model's for as many transfers saved. Not measured: speed. About ten minutes on one large GPU.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${CORPUS:?name the directory of text to train on}"
out="${1:-benchmarks/results/gpu}"
work="${WORK:-$(mktemp -d)}"
python="${PYTHON:-python3}"
mkdir -p "$out"
export PYTHONPATH="src:${PYTHONPATH:-}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
shape="${SHAPE:---experts 64 --top-k 8 --layers 8 --hidden-size 384 --intermediate-size 192 --heads 6}"
budget="${BUDGET:---tokens 60e6 --batch 64 --lr 1e-3 --bf16}"
# shellcheck disable=SC2086 # several options each
"$python" recipes/tiny_olmoe.py --data "$CORPUS" --out "$work/model" $shape $budget
cp "$work/model/training.json" "$out/larger_model_training.json"
for seed in ${SEEDS:-0 1 2}; do
  # shellcheck disable=SC2086
  "$python" benchmarks/study/run.py --base "$work/model" --rate "${RATE:-0.5}" --seeds "$seed" \
    --name plain --name "resident form 1" ${STUDY:-} \
    --keep "$work/kept" --out "$out/larger_model.jsonl"
done
