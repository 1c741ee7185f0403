#!/usr/bin/env bash
# From a fresh clone to a fine-tuned model: installs, gets SmolLM2-135M, and trains configs/quickstart.yaml over two
# sharded processes. No GPU is needed, and no arguments; what is already there is reused.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment
"$ROOT/launch/get_smollm2.sh"

cd "$ROOT"
NPROC_PER_NODE=${NPROC_PER_NODE:-2} launch/torchrun.sh configs/quickstart.yaml

cat <<END

summary:      $ROOT/runs/quickstart/summary.json
checkpoints:  $ROOT/runs/quickstart/checkpoint-*
TensorBoard:  $VENV/bin/tensorboard --logdir $ROOT/runs/quickstart/runs
END
