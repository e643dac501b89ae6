#!/usr/bin/env bash
# Proof and speed of the kernels on this machine's GPU, in under nine minutes. Installs nothing.
#
#   ./scripts/gpu_check.sh [--device cpu]        example: PYTHON=python3 OUT=/scratch/results ./scripts/gpu_check.sh
#
# Needs a CUDA or ROCm torch with its Triton; the kernel tests need pytest and hypothesis too, the training benchmark
# titanling's dependencies, and are left out, and said so, without them. Four parts, each with a time limit of its own:
# all kernel tests on the device, benchmarks/kernels.py, benchmarks/loss_gpu.py, benchmarks/train_gpu.py. Results as JSON
# in OUT (benchmarks/results). --device cpu is a dry run in tiny sizes. Exit code: 0 all went well, 1 something failed,
# 2 there is nothing to check here.
set -uo pipefail
if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  sed -n '2,/^set /p' "$0" | sed '/^set /d; s/^# \{0,1\}//'
  exit 0
fi
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT" || exit 2
DEVICE=cuda
if [[ ${1:-} == --device ]]; then DEVICE=${2:-}; fi
PYTHON=${PYTHON:-$(type -P python3 || type -P python)}
OUT=${OUT:-$ROOT/benchmarks/results}
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
FAILED=0
LEFT_OUT=()

give_up() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

# Runs a part within $2 seconds; what it is called, then the command.
part() {
  local name=$1 limit=$2 code=0 started=$SECONDS
  shift 2
  printf '\n== %s (at most %d s)\n' "$name" "$limit"
  timeout "$limit" "$@" </dev/null || code=$?
  if ((code == 0)); then
    printf '== %s: done after %d s\n' "$name" $((SECONDS - started))
  else
    FAILED=1
    printf '== %s: FAILED with code %d after %d s\n' "$name" "$code" $((SECONDS - started))
  fi
}

[[ $DEVICE == cuda || $DEVICE == cpu ]] || give_up "--device $DEVICE: use cuda (NVIDIA or AMD) or cpu"
[[ -n $PYTHON ]] || give_up "no Python found: set PYTHON"
mkdir -p "$OUT" 2>/dev/null || give_up "cannot write $OUT: set OUT"
"$PYTHON" -c 'import torch, triton' 2>/dev/null || give_up "$PYTHON has no torch with Triton: set PYTHON"
if [[ $DEVICE == cuda ]]; then
  NAME=$("$PYTHON" - <<'PY'
import re, sys, torch
from triton_kernels import available
problem = available("cuda")
if problem:
    sys.exit(problem)
print(re.sub(r"\W+", "_", torch.cuda.get_device_name().lower()))
PY
  ) || give_up "no kernels for this machine; --device cpu makes a dry run"
else
  NAME=cpu_dry_run
fi
"$PYTHON" -c 'import sys, torch, triton; print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, Triton {triton.__version__}")'
printf 'device: %s\n' "$NAME"

if "$PYTHON" -c 'import pytest, hypothesis' 2>/dev/null; then
  checks=("$PYTHON" -m pytest --noconftest -c /dev/null --rootdir "$ROOT" -q -p no:cacheprovider tests/kernels/kernel_checks.py)
  # Most of their time is the compiler's, on the CPU. A GPU in an exclusive mode takes one process only.
  if [[ $DEVICE == cuda ]] && "$PYTHON" -c 'import xdist' 2>/dev/null &&
    ! nvidia-smi --query-gpu=compute_mode --format=csv,noheader 2>/dev/null | grep -q Exclusive; then
    checks+=(-n "$(($(nproc) < 16 ? 4 : 8))")
  fi
  if [[ $DEVICE == cuda ]]; then
    part "kernel tests on the device" 150 env KERNEL_DEVICE=cuda "${checks[@]}"
  else
    part "kernel tests, a few, interpreted" 150 env TRITON_INTERPRET=1 "${checks[@]}" -k "castings or refused"
  fi
else
  printf '\n== kernel tests: NOT RUN, there is no pytest or no hypothesis\n'
  LEFT_OUT+=("kernel tests")
fi

smoke=()
if [[ $DEVICE == cpu ]]; then smoke=(--smoke); fi
part "kernels" 190 "$PYTHON" benchmarks/kernels.py --device "$DEVICE" --seconds 140 --json "$OUT/kernels_$NAME.json" "${smoke[@]}"
part "loss" 40 "$PYTHON" benchmarks/loss_gpu.py --device "$DEVICE" --seconds 25 --json "$OUT/loss_$NAME.json" "${smoke[@]}"
missing=$("$PYTHON" -c 'import sys; sys.path.insert(0, "benchmarks"); from train_gpu import missing; print(missing())')
if [[ -n $missing ]]; then
  printf '\n== training: NOT RUN, %s\n' "$missing"
  LEFT_OUT+=("training")
else
  part "training" 160 "$PYTHON" benchmarks/train_gpu.py --device "$DEVICE" --json "$OUT/train_$NAME.json" "${smoke[@]}"
fi

printf '\n'
for each in "${LEFT_OUT[@]}"; do echo "gpu_check: NOT RUN (above): $each"; done
if ((FAILED)); then echo "gpu_check: something FAILED (above)"; else echo "gpu_check: done; results in $OUT"; fi
exit $FAILED
