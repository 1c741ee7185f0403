#!/usr/bin/env bash
# Shows the documentation at http://127.0.0.1:8000; with "build" it writes site/ instead, and fails on a broken link.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
command -v mkdocs >/dev/null || { echo 'mkdocs: not installed; pip install -c constraints.txt -e ".[docs]"' >&2; exit 3; }
export NO_MKDOCS_2_WARNING=1
if [[ ${1:-} == build ]]; then exec mkdocs build --strict "${@:2}"; fi
exec mkdocs serve "$@"
