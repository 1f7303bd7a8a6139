#!/usr/bin/env bash
# On a CUDA machine: train dnt_124m and gpt_124m for a short while; print tokens/s, MFU with its formula, peak memory.
# The result goes to benchmarks/results/, named after the GPU: commit it. PYTHON=... chooses the environment, which
# needs this project's dependencies (pip install .). The text is the standard library's source.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}

"$PYTHON" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "error: torch sees no CUDA device; run this where a GPU is")'
if [ ! -f data/bench/manifest.json ]; then
    stdlib=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
    "$PYTHON" -m dnt_scale.cli data prepare "$stdlib/*.py" --out data/bench --vocab-size 16384 --seq-len 1024 --val-fraction 0
fi
"$PYTHON" -m benchmarks.train_speed --models dnt_124m gpt_124m --data data/bench --steps "${STEPS:-40}" "$@"
