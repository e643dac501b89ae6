#!/usr/bin/env bash
# Sets everything up (see scripts/setup_env.sh) and trains. Arguments go to titanling.train.
#
#   ./run_train.sh                                          train_configs/debug.toml in one process
#   NGPU=8 CONFIG_FILE=my.toml ./run_train.sh --training.steps 100
#
# NGPU         processes on this node, one per GPU (default 1)
# CONFIG_FILE  TOML of the run (default train_configs/debug.toml of this project)
# NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT: several nodes; under Slurm's srun, one task per node, they are found by themselves
#
# Output goes to the folder it is called from. Exit codes: 0 done, 2 input to mend, 3 failed numerically, 75 stopped by a
# signal after saving, 1 a bug or a lost rank, 128 + n ended by signal n.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/setup_env.sh
source "$ROOT/scripts/setup_env.sh"

export PYTHONUNBUFFERED=1
config=(--config "${CONFIG_FILE:-$ROOT/train_configs/debug.toml}")
for argument in "$@"; do
  if [[ $argument == --config || $argument == --config=* ]]; then config=(); fi
done

setup_env
exec "$PYTHON" "$ROOT/titanling/start.py" titanling.launch -- "${config[@]}" "$@"
