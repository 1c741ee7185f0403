# shellcheck shell=bash
# Sourced by the batch scripts, in the repository: the preparations of a job, one step of it, and its requeue. Sets
# attempt, records (of the job) and logs (of the attempt), MASTER_ADDR and MASTER_PORT, PATH.

script=$SLURM_JOB_NAME job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}

stop() { # CODE REASON: ends the job
  echo "$script: $2" >&2
  exit "$1"
}

[[ -f launch/torchrun.sh ]] || stop 2 "submit from the repository, not from $PWD"
# shellcheck source=launch/active.sh
source launch/active.sh
if [[ -z $active || -n ${VENV:-} ]]; then export VIRTUAL_ENV=${VENV:-$PWD/.venv} && active=$VIRTUAL_ENV; fi
export PATH=$active/bin:$PATH PYTHONUNBUFFERED=1
command -v python >/dev/null || stop 3 "there is no python: activate a virtual environment before sbatch, or set VENV"

attempt=${SLURM_RESTART_COUNT:-0}
records=${LOGS:-slurm-logs}/$job
logs=$records/attempt-$attempt
mkdir -p "$logs" || stop 3 "cannot write logs to $logs"
nodes=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST")}
# Below 32768, where Linux hands out ports of its own accord; two jobs on a node have different ones.
export MASTER_ADDR=${nodes%%$'\n'*} MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))

run_step() { # [srun's options] COMMAND...: runs it to its end, passes on the warning before the time limit, sets code
  echo "attempt $attempt of job $job on $SLURM_JOB_NODELIST: logs in $logs"
  # Slurm's own TERM (requeue, scancel, time limit) reaches the ranks by itself; this script has to outlive it.
  local pid reasons final
  trap 'scancel --signal=USR1 "$job"' USR1
  trap : TERM CONT
  # Every task sees all GPUs of its node, however they were asked for: a rank takes that of its local number.
  unset SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK SLURM_TRES_BIND SLURM_GPU_BIND
  # --wait: where one task has ended, the others have so many seconds to report.
  srun --wait=120 --unbuffered --output="$logs/task-%t.log" \
    ${SLURM_GPUS_ON_NODE:+--gres="gpu:$SLURM_GPUS_ON_NODE"} "$@" 2>"$logs/srun.log" &
  pid=$!
  # Not one long `wait`: of two signals close together (Slurm sends CONT before its warning) bash 5.2's often loses one.
  while kill -0 "$pid" 2>/dev/null; do sleep 0.5; done
  wait "$pid"
  code=$?

  # srun's code is the largest one. The failure of a task counts for more than that its peers lost it (4), or were
  # stopped while they waited for it (75).
  cat "$logs/srun.log" >&2
  for final in 1 3 6 5 2; do
    if grep -q "exit code $final\$" "$logs/srun.log"; then code=$final; fi
  done
  reasons=$(grep -h "error: \|^dist_qft.launch: " "$logs"/task-*.log | sort -u)
  [[ -z $reasons ]] || echo "$reasons" >&2
  echo "attempt $attempt: exit code $code" | tee -a "$records/attempts"
}

requeue() { # unless the job is cancelled, or requeued by Slurm itself
  local state
  state=$(scontrol -o show job "$job" | grep -o "JobState=[A-Z_]*")
  if [[ $state == JobState=RUNNING ]]; then
    scontrol requeue "$job" || stop "$code" "exit code $code, and the job cannot be requeued"
  else
    echo "$script: $state: Slurm cancels or requeues this job by itself"
  fi
}
