#!/usr/bin/env bash
# Everything that needs a GPU, in one call: the tests marked gpu, then the benchmarks.
# Usage: benchmarks/gpu/run.sh [OUT_DIR]; results are JSON files there, a short table comes last.
# Needs a Python with torch (CUDA), transformers, safetensors and pytest, and for training peft;
# nothing is installed. RIVALS may name a folder with unpacked wheels of rivals (moe-policylang),
# which are then compared.
# Under ten minutes: the tests get 200 seconds at most, the reference engine's benchmark 120, the
# fast engine's what is left of the ten; FAST_MINUTES says otherwise.
# PARTS names what to run, of "tests reference fast training"; the default leaves out training, which
# takes TRAINING_MINUTES (default 7) of a call of its own. FAST_OPTIONS and TRAINING_OPTIONS are
# handed on: with FAST_OPTIONS=--resume a second call that is given the OUT_DIR of the first runs
# only those sections of the fast engine's benchmark that have no result yet.
set -uo pipefail
cd "$(dirname "$0")/../.."
out="${1:-benchmarks/results/gpu}"
mkdir -p "$out"
# 0: kernels are compiled. The tests' own default is to interpret them on the CPU.
export TRITON_INTERPRET=0
export PYTHONPATH="src:tests:${RIVALS:+$RIVALS:}${PYTHONPATH:-}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
python="${PYTHON:-python3}"
parts=" ${PARTS:-tests reference fast} "
"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' ||
  { echo "no CUDA device: nothing was run" >&2; exit 1; }
wants() { [[ "$parts" == *" $1 "* ]]; }
seconds() { "$python" -c "print(round(60 * $1 + 40))"; }
failed=0

if wants tests; then
  timeout 200 "$python" -m pytest tests/gpu -m gpu -p no:cacheprovider -W default --durations=5 \
    -o faulthandler_timeout=120 --junitxml="$out/tests.xml" 2>&1 | tee "$out/tests.log"
  failed=$((failed || PIPESTATUS[0]))
fi
if wants reference; then
  timeout 120 "$python" benchmarks/gpu/reference_engine.py --out "$out/reference_engine.json" \
    > "$out/reference_engine.log" 2>&1
  reference=$?
fi
if wants fast; then
  # 40 seconds more are given to end in order.
  left="$("$python" -c "print(round(max(580 - 40 - $SECONDS, 60) / 60, 1))")"
  minutes="${FAST_MINUTES:-$left}"
  timeout "$(seconds "$minutes")" "$python" benchmarks/gpu/fast_engine.py --minutes "$minutes" \
    --out "$out/fast_engine.json" ${FAST_OPTIONS:-} > "$out/fast_engine.log" 2>&1
  fast=$?
fi
if wants training; then
  minutes="${TRAINING_MINUTES:-7}"
  timeout "$(seconds "$minutes")" "$python" benchmarks/gpu/training.py --minutes "$minutes" \
    --out "$out/training.json" ${TRAINING_OPTIONS:-} > "$out/training.log" 2>&1
  training=$?
fi

echo
wants tests && grep -E "^(FAILED|ERROR)|(passed|failed).* in " "$out/tests.log" | cut -c1-200
if wants reference; then
  failed=$((failed || reference))
  if [ "$reference" -eq 0 ]; then sed '$d' "$out/reference_engine.log" | tail -n 8
  else echo "reference engine's benchmark failed:"; tail -n 20 "$out/reference_engine.log"; fi
fi
if wants fast; then
  failed=$((failed || fast))
  if [ "$fast" -eq 0 ]; then sed '$d' "$out/fast_engine.log" | sed -n '/^GB\/s:/,$p'
  else echo "fast engine's benchmark failed:"; tail -n 20 "$out/fast_engine.log"; fi
fi
if wants training; then
  failed=$((failed || training))
  if [ "$training" -eq 0 ]; then sed '$d' "$out/training.log" | tail -n 14 | grep -v '^{'
  else echo "training's benchmark failed:"; tail -n 20 "$out/training.log"; fi
fi
exit "$failed"
