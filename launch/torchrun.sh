#!/usr/bin/env bash
# Trains on this machine, or on several if run on each of them:
#   launch/torchrun.sh CONFIG [key.sub=value ...] [--resume auto|PATH] [--dry-run]
# or runs another verb of `dist-qft` there, with the verb's own arguments:
#   launch/torchrun.sh merge RUN --to gguf
# Environment, all optional:
#   NPROC_PER_NODE                            ranks on this node (default: one per CUDA device, or one)
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT  several nodes: how many, which is this (from 0), where node 0 listens
# --dry-run starts no rank: it prints the command and, for train, the plan. The exit code is that of the first failing rank.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

options=(--nproc-per-node "${NPROC_PER_NODE:-auto}")
if [[ ${NNODES:-1} != 1 ]]; then
  [[ -n ${NODE_RANK:-} && -n ${MASTER_ADDR:-} ]] || usage "NNODES=$NNODES also needs NODE_RANK and MASTER_ADDR"
  options+=(--nnodes "$NNODES" --node-rank "$NODE_RANK")
  options+=(--master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
fi
if $dry_run; then arguments+=(--dry-run); fi

# exec: a scheduler's signals must reach the launcher, not this shell.
exec "$python" -m dist_qft.launch "${options[@]}" -- "$verb" "${arguments[@]}"
