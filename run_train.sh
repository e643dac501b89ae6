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
# Output goes to the folder it is called from. Exit codes: 0 done, 2 input to mend, 1 a bug, 128 + n ended by signal n.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/setup_env.sh
source "$ROOT/scripts/setup_env.sh"

# First host of a Slurm node list, e.g. nid[0005-0008,11],login1: nid0005.
first_host() {
  local hosts
  # Containers often hold Slurm's variables but not its programs.
  if command -v scontrol >/dev/null && hosts=$(scontrol show hostnames "$1" 2>/dev/null); then
    printf '%s\n' "${hosts%%$'\n'*}"
  elif [[ $1 =~ ^([^][,]*)\[([0-9]+)[^]]*\]([^][,]*) ]]; then
    printf '%s\n' "${BASH_REMATCH[1]}${BASH_REMATCH[2]}${BASH_REMATCH[3]}"
  else
    printf '%s\n' "${1%%,*}"
  fi
}

# A job step on several nodes: one of these scripts runs on each.
if [[ -z ${NNODES:-} && ${SLURM_NNODES:-1} != 1 ]]; then
  [[ -n ${SLURM_STEP_ID:-} ]] ||
    setup_fail "this Slurm job has $SLURM_NNODES nodes: start me on each with srun --ntasks-per-node=1 $0, or set NNODES=1"
  NNODES=${SLURM_STEP_NUM_NODES:-$SLURM_NNODES}
  NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-}}
  MASTER_ADDR=${MASTER_ADDR:-$(first_host "${SLURM_STEP_NODELIST:-${SLURM_JOB_NODELIST:-}}")}
fi
export NGPU=${NGPU:-1} NNODES=${NNODES:-1} NODE_RANK MASTER_ADDR PYTHONUNBUFFERED=1
for name in NGPU NNODES; do
  [[ ${!name} =~ ^[1-9][0-9]*$ ]] || setup_fail "$name=${!name}: must be a positive whole number"
done

config=(--config "${CONFIG_FILE:-$ROOT/train_configs/debug.toml}")
for argument in "$@"; do
  if [[ $argument == --config || $argument == --config=* ]]; then config=(); fi
done

setup_env
if ((NGPU == 1 && NNODES == 1)); then
  exec "$PYTHON" -m titanling.train "${config[@]}" "$@"
fi
exec "$PYTHON" -m titanling.launch -- "${config[@]}" "$@"
