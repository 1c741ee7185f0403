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
# shellcheck source=launch/other_nodes.sh
source "$(dirname "${BASH_SOURCE[0]}")/other_nodes.sh"

command -v deepspeed >/dev/null || stop "DeepSpeed is not installed; pip install 'dist-qft[deepspeed]'"
port=${MASTER_PORT:-29500}
if [[ -z ${MASTER_PORT:-} && $nodes == 1 ]]; then
  port=$("$python" -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
fi
# Without a count the launcher starts one rank per CUDA device or, on a CPU, per NUMA node.
options=(--quiet --num_gpus "$per_node" --master_port "$port")
if [[ -n ${HOSTFILE:-} ]]; then options+=(--hostfile "$HOSTFILE"); fi

if [[ $nodes -gt 1 ]]; then
  # A file without a name: it is gone when DeepSpeed has ended.
  file=$(mktemp) && deepspeeds_variables >"$file" && exec {variables}<"$file" && rm "$file"
  export DS_ENV_FILE=/proc/self/fd/$variables
fi
# The local rank is in the environment.
start deepspeed "${options[@]}" --no_local_rank --module dist_qft "$verb" "${arguments[@]}"
