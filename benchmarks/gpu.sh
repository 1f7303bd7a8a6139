#!/usr/bin/env bash
# On a CUDA machine, in one call of under 9 minutes: tokens/s, MFU with its formula, peak memory and where a step's
# time goes, of dnt_124m beside gpt_124m and a GPT-2 loop written by hand, and of dnt_774m and dnt_1.4b with mSGDW and
# AdamW, compiled and not; last, dnt_1.4b in fp8. What it wants: this project's dependencies (pip install '.[fp8]') with
# torch 2.11 or later, no internet; without torchao, or on a GPU without fp8, the last part is left out.
#   PYTHON=...   the environment              OUT=...   where the JSON goes (benchmarks/results); commit it
#   DATA=...     a prepared set; without one the standard library's source becomes data/bench
#   TOY=1        the same calls of a tiny model, on any machine
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
OUT=${OUT:-benchmarks/results}
DATA=${DATA:-data/bench}
TOY=${TOY:-}

if [ -z "$TOY" ]; then
    "$PYTHON" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "error: torch sees no CUDA device; run this where a GPU is, or with TOY=1")'
fi
if [ ! -f "$DATA/manifest.json" ]; then
    stdlib=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
    "$PYTHON" -m dnt_scale.cli data prepare "$stdlib/*.py" --out "$DATA" --vocab-size 16384 --seq-len 1024 --val-fraction 0
fi

# bench NAME SECONDS ROWS... : one table and one JSON; a part that takes too long, or fails, leaves the others
status=0
bench() {
    local name=$1 seconds=$2
    shift 2
    if [ -n "$TOY" ]; then
        set -- "$@" --turns 1 --turn-steps 1 --global-batch 4 --micro-batch 2 --matmul-side 64 --dtype fp32 \
            --common model.layers=1 model.width=32 model.heads=2 model.vocab_size=512 model.context=64
    fi
    echo "== $name"
    timeout "$seconds" "$PYTHON" -m benchmarks.train_speed --data "$DATA" --out "$OUT/train_speed-gpu-$name.json" "$@" ||
        { echo "error: $name failed or took more than $seconds s"; status=1; }
}
compiled=engine.compile=true peers="eager compiled"
if [ -n "$TOY" ]; then compiled=engine.compile=false peers=eager; fi
bench 124m 150 --run model=gpt_124m optim=adamw $compiled --run model=dnt_124m optim=msgdw $compiled \
    --run model=dnt_124m optim=msgdw --peer $peers --turns 3 --global-batch 64 --micro-batch 32
bench 774m 120 --run model=dnt_774m optim=msgdw $compiled --run model=dnt_774m optim=adamw $compiled \
    --turns 3 --turn-steps 2 --global-batch 32 --micro-batch 16
bench 1.4b-eager 110 --run model=dnt_1.4b optim=msgdw --run model=dnt_1.4b optim=adamw \
    --turns 2 --turn-steps 2 --global-batch 16 --micro-batch 8
bench 1.4b 140 --run model=dnt_1.4b optim=msgdw $compiled --run model=dnt_1.4b optim=adamw $compiled \
    --turns 3 --turn-steps 2 --global-batch 16 --micro-batch 8

# fp8 comes last, in what is left of the nine minutes: the other parts do not wait for one that has run nowhere yet
left=$((535 - SECONDS))
missing=$("$PYTHON" -c 'import torch
from dnt_scale.distributed.compute_dtype import check_fp8
try:
    check_fp8(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
except ValueError as error:
    print(error)')
if [ "$left" -lt 60 ]; then missing="$left s are left, fewer than 60"; fi
if [ -n "$missing" ]; then
    echo "== 1.4b-fp8 is left out: $missing"
else
    bench 1.4b-fp8 "$left" --run model=dnt_1.4b optim=msgdw $compiled \
        --run model=dnt_1.4b optim=msgdw $compiled train.dtype=fp8 \
        --turns 3 --turn-steps 2 --global-batch 16 --micro-batch 8
fi
exit $status
