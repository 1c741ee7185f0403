#!/usr/bin/env bash
# Trains through DeepSpeed's launcher, on this machine or on those of a hostfile (lines such as "node1 slots=8"):
#   launch/deepspeed.sh CONFIG [key.sub=value ...] [--resume auto|PATH] [--dry-run]
# or runs another verb of `dist-qft` there, with the verb's own arguments, as torchrun.sh does.
# Environment: ranks.sh lists it; besides
#   MASTER_PORT   where rank 0 listens (default: a free port on one node, 29500 on several)
# --dry-run starts no rank: it prints the command and, for train, the plan. A failing rank makes the exit code another than 0.
set -euo pipefail
# shellcheck source=launch/ranks.sh
source "$(dirname "${BASH_SOURCE[0]}")/ranks.sh"

command -v deepspeed >/dev/null || stop "DeepSpeed is not installed; pip install 'dist-qft[deepspeed]'"
port=${MASTER_PORT:-29500}
if [[ -z ${MASTER_PORT:-} && $nodes == 1 ]]; then
  port=$("$python" -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
fi
# Without a count the launcher starts one rank per CUDA device or, on a CPU, per NUMA node.
options=(--quiet --num_gpus "$per_node" --master_port "$port")
if [[ -n ${HOSTFILE:-} ]]; then options+=(--hostfile "$HOSTFILE"); fi

variables_for_other_nodes() { # as lines of a DS_ENV_FILE, those of the user's own last: DeepSpeed takes the last one
  local name file withheld=()
  for name in $(names_for_other_nodes); do
    case $name in
      PYTHON* | UCX_* | MLFLOW_*) continue ;; # which DeepSpeed hands on by itself
      *_TOKEN | *_KEY | *SECRET* | *PASSWORD*) withheld+=("$name") && continue ;;
    esac
    if [[ ${name,,} == *_proxy && ${!name} == *@* ]]; then withheld+=("$name") && continue; fi # with a password
    # DeepSpeed puts a value between double quotes, and pdsh replaces what follows a percent sign.
    if [[ ${!name} =~ [\"\$\`\\%$'\n'] ]]; then withheld+=("$name"); else echo "$name=${!name}"; fi
  done
  for file in ~/"${DS_ENV_FILE:-.deepspeed_env}" "${DS_ENV_FILE:-.deepspeed_env}"; do
    if [[ -f $file ]]; then cat "$file"; fi
  done
  [[ ${#withheld[@]} == 0 ]] ||
    echo "$script: the other nodes do not get ${withheld[*]}: DeepSpeed would put it into command lines; set it there" >&2
}

if [[ $nodes -gt 1 ]]; then
  # A file without a name: it is gone when DeepSpeed has ended.
  file=$(mktemp) && variables_for_other_nodes >"$file" && exec {variables}<"$file" && rm "$file"
  export DS_ENV_FILE=/proc/self/fd/$variables
fi
# The local rank is in the environment.
start deepspeed "${options[@]}" --no_local_rank --module dist_qft "$verb" "${arguments[@]}"
