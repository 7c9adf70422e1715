#!/usr/bin/env bash
# Everything that needs a GPU, in one call: the tests marked gpu, then the benchmarks.
# Usage: benchmarks/gpu/run.sh [OUT_DIR]; results are JSON files there, a short table comes last.
# Needs a Python with torch (CUDA), transformers, safetensors and pytest; nothing is installed.
# RIVALS may name a folder with unpacked wheels of rivals (moe-policylang), which are then compared.
# Under ten minutes: the tests take about one, the reference engine's benchmark one, the fast
# engine's the rest; FAST_MINUTES (default 6.5) says how long it may take.
set -uo pipefail
cd "$(dirname "$0")/../.."
out="${1:-benchmarks/results/gpu}"
mkdir -p "$out"
# 0: kernels are compiled. The tests' own default is to interpret them on the CPU.
export TRITON_INTERPRET=0
export PYTHONPATH="src:tests:${RIVALS:+$RIVALS:}${PYTHONPATH:-}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
python="${PYTHON:-python3}"
"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' ||
  { echo "no CUDA device: nothing was run" >&2; exit 1; }

timeout 150 "$python" -m pytest tests/gpu -m gpu -p no:cacheprovider -W default \
  --junitxml="$out/tests.xml" 2>&1 | tee "$out/tests.log"
tests=${PIPESTATUS[0]}
timeout 120 "$python" benchmarks/gpu/reference_engine.py --out "$out/reference_engine.json" \
  > "$out/reference_engine.log" 2>&1
reference=$?
minutes="${FAST_MINUTES:-6.5}"
timeout "$("$python" -c "print(round(60 * $minutes + 30))")" \
  "$python" benchmarks/gpu/fast_engine.py --minutes "$minutes" --out "$out/fast_engine.json" \
  > "$out/fast_engine.log" 2>&1
fast=$?

echo
tail -n 2 "$out/tests.log"
if [ "$reference" -eq 0 ]; then sed '$d' "$out/reference_engine.log" | tail -n 8
else echo "reference engine's benchmark failed:"; tail -n 20 "$out/reference_engine.log"; fi
if [ "$fast" -eq 0 ]; then sed '$d' "$out/fast_engine.log" | sed -n '/^GB\/s:/,$p'
else echo "fast engine's benchmark failed:"; tail -n 20 "$out/fast_engine.log"; fi
exit $((tests || reference || fast))
