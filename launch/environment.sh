# shellcheck shell=bash
# Sourced by the scripts that install the package: sets ROOT and offers prepare_environment, which makes or reuses
# the virtual environment $VENV (default: .venv in the repository) and puts it first in PATH.
# The build of PyTorch follows from the package index (docs/install.md). Where there is no GPU, point PIP_INDEX_URL
# or PIP_EXTRA_INDEX_URL at an index of CPU builds: the exact version in constraints.txt then takes that build, and not
# a newer one with gigabytes of CUDA libraries.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$(realpath -m "${VENV:-$ROOT/.venv}")

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 3
}

prepare_environment() {
  local stamp=$VENV/.dist_qft_installed wanted
  # The path counts because the package is installed in place.
  wanted=$(cd "$ROOT" && { pwd; cat pyproject.toml constraints.txt; } | sha256sum)
  if [[ ! -x $VENV/bin/python || $(cat "$stamp" 2>/dev/null) != "$wanted" ]]; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
      fail "python3 is missing or too old: the versions in constraints.txt need Python 3.11 or newer"
    echo "installing dist_qft and its dependencies into $VENV"
    python3 -m venv "$VENV" || fail "cannot create the virtual environment $VENV (on Debian: install python3-venv)"
    (cd "$ROOT" && "$VENV/bin/pip" install --quiet --constraint constraints.txt --editable ".[test]") ||
      fail "pip could not install dist_qft into $VENV; its own message is above"
    echo "$wanted" >"$stamp"
  fi
  export VIRTUAL_ENV=$VENV PATH=$VENV/bin:$PATH
}
