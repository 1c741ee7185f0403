#!/usr/bin/env bash
# Correctness and speed on this machine's GPUs, without a download: one GPU, or with --ranks N several.
#
#     benchmarks/gpu.sh [--ranks N] [--device cuda|cpu] [--quick] [--again] [--parts REGEX] [--json FILE]
#
# Each part's figures are written to FILE (runs/gpu-<ranks>.json) as soon as they are there; a second call does only
# what is missing, and --parts only those whose names match. --quick takes tiny shapes; with --device cpu it tries the
# script out anywhere. Such figures go to a file of their own, and one of another device is refused.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
ranks=1 words=("$@")
while [[ $# -gt 0 ]]; do
    [[ $1 != --ranks ]] || ranks=${2:?--ranks needs a number}
    [[ $1 != --ranks=* ]] || ranks=${1#*=}
    shift
done
PYTHON=${PYTHON:-python}
if [[ $ranks == 1 ]]; then script=one; else script=several; fi
exec "$PYTHON" "$ROOT/benchmarks/gpu/$script.py" ${words[@]+"${words[@]}"}
