#!/usr/bin/env bash
# Everything that needs a GPU, in two calls that fit into a quarter of an hour: A first, then, when its
# results have been read, B. A third, for training, stands apart.
# Usage: benchmarks/gpu/run.sh A|B|training [OUT_DIR]; JSON files there, a short table comes last.
# Needs a Python with torch (CUDA), transformers, safetensors and, for B, pytest with xdist, and for
# training peft; nothing is installed. A takes 4 minutes at most, B 7, training TRAINING_MINUTES
# (default 7). OPTIONS are handed on: with OPTIONS=--resume only those sections run that have no
# result yet; OPTIONS=--dry-run runs tiny shapes on the CPU.
set -euo pipefail
cd "$(dirname "$0")/../.."
call="${1:?A, B or training}"
out="${2:-benchmarks/results/gpu}"
mkdir -p "$out"
export PYTHONPATH="src:tests:${PYTHONPATH:-}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
python="${PYTHON:-python3}"
if [[ " ${OPTIONS:-} " == *" --dry-run "* ]]; then
  export TRITON_INTERPRET=1
else
  export TRITON_INTERPRET=0  # the tests' own default is to interpret kernels on the CPU
  "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' ||
    { echo "no CUDA device: nothing was run" >&2; exit 1; }
fi
case "$call" in
  A | B)
    command=(benchmarks/gpu/fast_engine.py --call "$call" --out "$out") ;;
  training)
    command=(benchmarks/gpu/training.py --minutes "${TRAINING_MINUTES:-7}" --out "$out/training.json") ;;
  *)
    echo "there is no call $call; give A, B or training" >&2; exit 2 ;;
esac
# shellcheck disable=SC2086  # several options may be given
"$python" "${command[@]}" ${OPTIONS:-} > "$out/$call.log" 2>&1 && code=0 || code=$?
# The last line is the whole record.
if [ "$code" -eq 0 ]; then sed '$d' "$out/$call.log" | sed -n '/GB\/s:/,$p'
else tail -n 30 "$out/$call.log"; fi
exit "$code"
