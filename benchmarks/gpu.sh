#!/usr/bin/env bash
# Everything that needs a GPU, in less than nine minutes: the tests, the table of costs, EASIER's curve, large networks.
#
#   benchmarks/gpu.sh [--dry]
#
# It starts from a bare checkout. The Python that is there is taken if it has what is needed, else a venv is made with pip
# ($PYTHON says which Python, $VENV where). Results go to $OUT (gpu_results by default) as they come: results.md,
# results.json, tests.xml, log.txt. Every part has a time limit of its own, and it may be stopped at any moment. --dry
# does all of it on the CPU, in tiny sizes; the tests are skipped there where there is no GPU. It ends with 1 if a part
# has failed, and the others are done all the same.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu_results}
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv-gpu}
quick=(--quick --device cuda) full=(--device cuda)
packages='torch, lightning, torchvision, torchmetrics, pytest, hypothesis, sklearn, yaml, tqdm, filelock, tensorboard, rich'
if [ "${1:-}" = --dry ]; then
    quick=(--dry) full=(--dry)
    packages="$packages, onnx, onnxscript, onnxruntime"  # on a GPU nothing is run in these
fi
needed="import $packages
for package in torch, lightning:
    version = tuple(map(int, package.__version__.split('.')[:2]))
    assert version >= (2, 6), f'{package.__name__} {package.__version__} is too old, 2.6 is needed'"
mkdir -p "$OUT"
began=$SECONDS
most=530  # seconds for all of it
failed=()

say() {
    echo "$@" | tee -a "$OUT/log.txt"
}

limited() {  # seconds, command: stopped after that, with what it has written so far
    local seconds=$1 left=$((most - (SECONDS - began)))
    shift
    [ $left -gt 5 ] || { say "== no time is left for: $*"; return 124; }
    [ "$seconds" -lt $left ] || seconds=$left
    say "== $((SECONDS - began)) s: $*"
    timeout --kill-after=5 "$seconds" "$@" >>"$OUT/log.txt" 2>&1
    local status=$?
    [ $status -eq 0 ] || say "   ended with $status after at most $seconds s"
    return $status
}

if ! "$PYTHON" -c "$needed" 2>>"$OUT/log.txt"; then
    limited 150 "$PYTHON" -m venv --system-site-packages "$VENV" &&
        limited 150 "$VENV/bin/python" -m pip install --quiet --editable '.[zoo,cli,onnx]' pytest hypothesis &&
        "$VENV/bin/python" -c "$needed" 2>>"$OUT/log.txt" || {
        say "$PYTHON lacks some of $packages, and they could not be installed into $VENV: see $OUT/log.txt," \
            "and give another Python by PYTHON=..."
        exit 1
    }
    PYTHON=$VENV/bin/python
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
say "$("$PYTHON" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda, torch.cuda.is_available())')"

bench() {  # seconds, seconds of each case, part, size: a case that takes too long leaves the others some
    limited "$1" "$PYTHON" -m benchmarks "${@:3}" --output "$OUT" --limit "$2" || failed+=("$3")
}

limited 110 "$PYTHON" -m pytest -q -p no:cacheprovider --junitxml="$OUT/tests.xml" tests/integration/test_gpu.py ||
    failed+=(tests)
bench 60 24 measuring "${full[@]}"
bench 40 16 collapsing "${quick[@]}"
bench 40 16 rounds "${quick[@]}"
bench 75 30 large "${quick[@]}"
bench 85 42 runtimes "${quick[@]}"  # three compilations in a case
bench 130 110 curve "${full[@]}"  # one case, which ends by itself after as many rounds as there is time for
say "== $((SECONDS - began)) s: done, see $OUT/results.md"
[ ${#failed[@]} -eq 0 ] || { say "== of seven parts ${#failed[@]} failed: ${failed[*]}; see $OUT/log.txt"; exit 1; }
