#!/usr/bin/env bash
# Trains through DeepSpeed's launcher, on this machine or on those of a hostfile (lines such as "node1 slots=8"):
#   launch/deepspeed.sh CONFIG [key.sub=value ...] [--resume [auto|PATH]] [--dry-run]
# or runs another verb of `dist-qft` there, with the verb's own arguments, as torchrun.sh does.
# Environment: ranks.sh lists it; besides
#   MASTER_PORT   where rank 0 listens (default 29500: two runs on one machine need two ports)
# --dry-run starts no rank: it prints the command and, for train, the plan. The exit code is that of the first failing rank.
set -euo pipefail
# shellcheck source=launch/ranks.sh
source "$(dirname "${BASH_SOURCE[0]}")/ranks.sh"

command -v deepspeed >/dev/null || stop "DeepSpeed is not installed; pip install 'dist-qft[deepspeed]'"
# Without a count the launcher starts one rank per CUDA device or, on a CPU, per NUMA node.
options=(--quiet --num_gpus "$per_node" --master_port "${MASTER_PORT:-29500}")
if [[ -n ${HOSTFILE:-} ]]; then options+=(--hostfile "$HOSTFILE"); fi
# The local rank is in the environment; as an argument it would be one that dist_qft does not know.
start deepspeed "${options[@]}" --no_local_rank --module dist_qft "$verb" "${arguments[@]}"
