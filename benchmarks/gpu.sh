#!/usr/bin/env bash
# Everything that needs a GPU, in less than nine minutes: the tests, the table of costs, EASIER's curve, large networks.
#
#   benchmarks/gpu.sh [--dry]
#
# It starts from a bare checkout. The Python that is there is taken if it has torch, lightning, torchvision and pytest,
# else a venv is made with pip ($PYTHON says which Python, $VENV where). Results go to $OUT (gpu_results by default) as
# they come: results.md, results.json, tests.xml, log.txt. Every part has a time limit of its own, and it may be stopped
# at any moment. --dry does all of it on the CPU, in tiny sizes; the tests are skipped there where there is no GPU.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu_results}
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv-gpu}
quick=(--quick --device cuda) full=(--device cuda)
[ "${1:-}" = --dry ] && quick=(--dry) full=(--dry)
mkdir -p "$OUT"
began=$SECONDS
most=530  # seconds for all of it

limited() {  # seconds, command: stopped after that, with what it has written so far
    local seconds=$1 left=$((most - (SECONDS - began)))
    shift
    [ $left -gt 5 ] || { echo "== no time is left for: $*" | tee -a "$OUT/log.txt"; return; }
    [ "$seconds" -lt $left ] || seconds=$left
    echo "== $((SECONDS - began)) s: $*" | tee -a "$OUT/log.txt"
    timeout --kill-after=5 "$seconds" "$@" >>"$OUT/log.txt" 2>&1
    local status=$?
    [ $status -eq 0 ] || echo "   ended with $status after at most $seconds s" | tee -a "$OUT/log.txt"
}

needed='import torch, lightning, torchvision, torchmetrics, pytest, hypothesis, sklearn, yaml, tqdm, filelock, tensorboard'
if ! "$PYTHON" -c "$needed" 2>>"$OUT/log.txt"; then
    limited 150 "$PYTHON" -m venv --system-site-packages "$VENV"
    limited 150 "$VENV/bin/python" -m pip install --quiet --editable '.[zoo,cli]' pytest hypothesis
    PYTHON=$VENV/bin/python
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
"$PYTHON" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda, torch.cuda.is_available())' |
    tee -a "$OUT/log.txt"

bench() {  # seconds, part, size
    limited "$1" "$PYTHON" -m benchmarks "${@:2}" --output "$OUT" --limit "$1"
}

limited 110 "$PYTHON" -m pytest -q -p no:cacheprovider --junitxml="$OUT/tests.xml" tests/integration/test_gpu.py
bench 60 measuring "${full[@]}"
bench 40 collapsing "${quick[@]}"
bench 40 rounds "${quick[@]}"
bench 75 large "${quick[@]}"
bench 60 runtimes "${quick[@]}"
bench 130 curve "${full[@]}"
echo "== $((SECONDS - began)) s: done, see $OUT/results.md" | tee -a "$OUT/log.txt"
