# shellcheck shell=bash
# Sourced by the launchers that start the ranks of all nodes themselves, deepspeed.sh and mpirun.sh. Variables, all
# optional:
#   NPROC_PER_NODE   ranks on each node (default: one per visible CUDA device, or one)
#   HOSTFILE         several nodes: a file with one name a line, in the launcher's own format
# Sets nodes, per_node and ranks; `start COMMAND...` runs the command, or shows it and the plan.

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

visible_gpus() {
  if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true
  else
    # MIG slices are listed below their card, each on a line of its own.
    (nvidia-smi --list-gpus 2>/dev/null || true) | grep -c '^GPU ' || true
  fi
}

nodes=1
if [[ -n ${HOSTFILE:-} ]]; then
  [[ -r $HOSTFILE ]] || stop "HOSTFILE: cannot read '$HOSTFILE'"
  nodes=$(grep -cvE "^[[:space:]]*(#|$)" "$HOSTFILE") || stop "HOSTFILE: there is no node in '$HOSTFILE'"
fi
gpus=$(visible_gpus)
per_node=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}
[[ $per_node =~ ^[1-9][0-9]*$ ]] || stop "NPROC_PER_NODE: got '$per_node', must be a whole number, one or more"
ranks=$((nodes * per_node))
threads=$(($(nproc) / per_node))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}

start() {
  # The ranks end with this process, however it ends. exec: a scheduler's signals must reach the launcher, not this shell.
  $dry_run || DIST_QFT_LAUNCHER=$HOSTNAME:$$ exec "$@"
  printf '%q ' "$@" && echo
  [[ $verb == train ]] || exit 0  # only training has a plan to show
  export RANK=0 WORLD_SIZE=$ranks LOCAL_RANK=0 LOCAL_WORLD_SIZE=$per_node MASTER_ADDR=127.0.0.1 MASTER_PORT=29500
  exec "$python" -m dist_qft train "${arguments[@]}" --dry-run
}
