# shellcheck shell=bash
# Sourced by the launchers of others, deepspeed.sh and mpirun.sh, for what they share with torchrun.sh: the same arguments,
# and these variables, all optional:
#   NPROC_PER_NODE   ranks on each node (default: one per CUDA device, or one)
#   HOSTFILE         several nodes: a file with one name a line, in the launcher's own format
# Sets python, nodes, per_node, ranks, verb and arguments; `start COMMAND...` runs the command, or shows it and the plan.

script=$(basename "$0")
stop() {
  echo "$script: $*" >&2
  exit 2
}
[[ ${1:--} != -* ]] || stop "the first argument must be a config file;" \
  "usage: launch/$script CONFIG [key.sub=value ...] [--resume [auto|PATH]] [--dry-run]"

verb=train
case $1 in train | eval | generate | merge) verb=$1 && shift ;; esac

dry_run=false arguments=()
for argument in "$@"; do
  if [[ $argument == --dry-run ]]; then dry_run=true; else arguments+=("$argument"); fi
done

venv=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv
# An environment that the user activated wins over the one that quickstart.sh made.
if [[ -z ${VIRTUAL_ENV:-} && -x $venv/bin/python ]]; then export PATH=$venv/bin:$PATH; fi
python=$(command -v python) || stop "there is no python"

nodes=1
if [[ -n ${HOSTFILE:-} ]]; then
  [[ -r $HOSTFILE ]] || stop "HOSTFILE: cannot read '$HOSTFILE'"
  nodes=$(grep -cvE "^[[:space:]]*(#|$)" "$HOSTFILE") || stop "HOSTFILE: there is no node in '$HOSTFILE'"
fi
gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
per_node=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}
[[ $per_node =~ ^[1-9][0-9]*$ ]] || stop "NPROC_PER_NODE is '$per_node', need a whole number, one or more"
ranks=$((nodes * per_node))
threads=$(($(nproc) / per_node))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}

start() {
  # The ranks end with this process, however it ends. exec: a scheduler's signals must reach the launcher, not this shell.
  $dry_run || DIST_QFT_LAUNCHER=$HOSTNAME:$$ exec "$@"
  printf '%q ' "$@" && echo
  [[ $verb == train ]] || exit 0  # only training has a plan to show
  export RANK=0 WORLD_SIZE=$ranks MASTER_ADDR=127.0.0.1 MASTER_PORT=29500
  exec "$python" -m dist_qft train "${arguments[@]}" --dry-run
}
