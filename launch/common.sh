# shellcheck shell=bash
# Sourced by torchrun.sh, deepspeed.sh and mpirun.sh, which take the same arguments. Sets verb, arguments (all that follow
# it but --dry-run), dry_run (true or false) and python.
# shellcheck disable=SC2034

script=$(basename "$0")

stop() {
  echo "$script: $*" >&2
  exit 2
}

usage() {
  stop "$1; usage: launch/$script CONFIG [key.sub=value ...] [--resume auto|PATH] [--dry-run]"
}

[[ ${1:--} != -* ]] || usage "the first argument must be a config file"
verb=train
case $1 in train | eval | generate | chat | merge | lm-eval | study) verb=$1 && shift ;; esac

dry_run=false arguments=()
for argument in "$@"; do
  if [[ $argument == --dry-run ]]; then dry_run=true; else arguments+=("$argument"); fi
done

# shellcheck source=launch/active.sh
source "$(dirname "${BASH_SOURCE[0]}")/active.sh"
venv=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv
# An environment that the user activated wins over the one that quickstart.sh made.
if [[ -z $active && -x $venv/bin/python ]]; then export PATH=$venv/bin:$PATH; fi
python=$(command -v python) || stop "there is no python"
