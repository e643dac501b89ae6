#!/usr/bin/env bash
# Makes the virtual environments of those that the benchmarks compare with, each its own in benchmarks/.peers:
# huggingface and litgpt for train_step.py (they want different versions of huggingface-hub), megatron for tokenise.py, all
# with the very torch version of the project's environment. What is there already stays; delete benchmarks/.peers to
# begin again.
#
#   ./benchmarks/setup_peers.sh                       the active python3 is the one that has the project's torch
#   ./benchmarks/setup_peers.sh megatron              only this one
#   PYTHON=.venv/bin/python ./benchmarks/setup_peers.sh
set -euo pipefail

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  sed -n '2,/^set -/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 0
fi

peers=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/.peers
python=${PYTHON:-python3}
# Without the build's name (+cpu, +cu126): the index decides which build fits this machine, as it did for the project.
version() { "$python" -c 'import importlib.metadata as m, sys; print(m.version(sys.argv[1]).split("+")[0])' "$1" 2>/dev/null; }
torch=$(version torch) || {
  echo "error: $python has no torch: set PYTHON to the Python of the project's environment" >&2
  exit 2
}
export PIP_DISABLE_PIP_VERSION_CHECK=1

wanted=" ${*:-huggingface litgpt megatron} "
# make NAME PACKAGE …: one peer that cannot be had must not cost the other; train_step.py leaves it out.
make() {
  local name=$1
  shift
  if [[ $wanted != *" $name "* ]]; then return; fi
  echo "$name: $* with torch $torch"
  if [[ ! -x $peers/$name/bin/python ]]; then "$python" -m venv "$peers/$name"; fi
  "$peers/$name/bin/python" -m pip install --quiet "torch==$torch" "$@" || echo "$name could not be installed" >&2
}

make huggingface 'transformers>=5,<6' 'accelerate>=1.10'
make litgpt 'litgpt>=0.5.11'
make megatron 'megatron-core>=0.16' "tokenizers==$(version tokenizers)" numpy
