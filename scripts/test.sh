#!/usr/bin/env bash
# Sets everything up, the test extra included, and runs the tests. Arguments go to pytest.
#
#   ./scripts/test.sh                  all of them
#   ./scripts/test.sh tests/data -k order -x
#   ./scripts/test.sh -n 0         one at a time: with --pdb, or to see the output as it comes
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/setup_env.sh
source scripts/setup_env.sh
setup_env test
export HF_HUB_OFFLINE=1 # a test that reaches for the network is wrong
# Two at a time, a module's tests together, for they share what is slow to make; in the order of tests/conftest.py.
exec "$PYTHON" -m pytest -n 2 --dist loadscope --no-loadscope-reorder "$@"
