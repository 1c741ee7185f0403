#!/usr/bin/env bash
# The test command: installs what is missing, then ruff, mypy and pytest.
#   tests/run.sh                     everything, as two streams side by side
#   tests/run.sh unit|ranks|whole    one tier: single functions; pools of ranks; launchers, faults, Slurm and SmolLM2
# Further arguments go to pytest: tests/run.sh unit -k merge
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
prepare_environment
"$ROOT/launch/get_smollm2.sh"

tiers=()
while [[ ${1:-} == unit || ${1:-} == ranks || ${1:-} == whole ]]; do tiers+=("tests/$1") && shift; done

cd "$ROOT"
ruff check .
ruff format --check .
# Many tests run several ranks at a time: one thread each keeps them from fighting over the cores, and the results the
# same on every machine. No test may need the network.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
unset PYTHONDONTWRITEBYTECODE # hundreds of processes start, and should not each compile the package
types=$(mktemp) code=0
mypy >"$types" 2>&1 & # takes a minute of one core
checker=$!
trap 'kill "$checker" 2>/dev/null || true; rm -f "$types"' EXIT # a failed kill would become the exit code
if [[ ${#tiers[@]} == 0 && $# == 0 ]]; then
  # File by file to whichever stream is free; the files with the longest tests come first.
  set -- --numprocesses=2 --dist=loadfile --no-loadscope-reorder tests/whole tests/ranks tests/unit
elif [[ "${tiers[*]}" == tests/unit && $# == 0 ]]; then
  set -- --numprocesses=2 --dist=loadfile
fi
pytest --durations=25 "${tiers[@]}" "$@" || code=$?
wait "$checker" || code=1
cat "$types"
exit "$code"
