#!/usr/bin/env bash
# From a fresh clone to a fine-tuned GGUF file: installs, gets SmolLM2-135M, trains configs/quickstart.yaml over two
# sharded processes, merges, and asks the merged file. No GPU is needed, and no arguments; earlier results are reused.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment
"$ROOT/launch/get_smollm2.sh"

cd "$ROOT"
NPROC_PER_NODE=${NPROC_PER_NODE:-2} launch/torchrun.sh configs/quickstart.yaml --resume auto

question="What does the function os.path.join do in Python?"
printf '\nmerged.gguf: %s\n    ' "$question"
python -m dist_qft generate runs/quickstart/merged.gguf --max-new-tokens 48 --prompt "$question"

cat <<END

summary:      $ROOT/runs/quickstart/summary.json
checkpoints:  $ROOT/runs/quickstart/checkpoint-*
merged model: $ROOT/runs/quickstart/merged.gguf, and merged.gguf.certificate.json
TensorBoard:  $VENV/bin/tensorboard --logdir $ROOT/runs/quickstart/runs
END
