#!/usr/bin/env bash
# Everything that needs a GPU, in one call: the tests marked gpu, then the benchmarks.
# Usage: benchmarks/gpu/run.sh [OUT_DIR]; results are JSON files there, a short table comes last.
# Needs a Python with torch (CUDA), transformers, safetensors and pytest; nothing is installed.
set -uo pipefail
cd "$(dirname "$0")/../.."
out="${1:-benchmarks/results/gpu}"
mkdir -p "$out"
export PYTHONPATH="src:tests:${PYTHONPATH:-}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
python="${PYTHON:-python3}"
"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' ||
  { echo "no CUDA device: nothing was run" >&2; exit 1; }

"$python" -m pytest tests/gpu -m gpu -p no:cacheprovider -W default \
  --junitxml="$out/tests.xml" 2>&1 | tee "$out/tests.log"
tests=${PIPESTATUS[0]}
timeout 300 "$python" benchmarks/gpu/reference_engine.py --out "$out/reference_engine.json" \
  > "$out/reference_engine.log" 2>&1
bench=$?

echo
tail -n 2 "$out/tests.log"
if [ "$bench" -eq 0 ]; then sed '$d' "$out/reference_engine.log" | tail -n 8
else echo "benchmark failed:"; tail -n 20 "$out/reference_engine.log"; fi
exit $((tests || bench))
