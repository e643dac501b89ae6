#!/usr/bin/env bash
# Finds or makes the Python environment that run_train.sh and scripts/test.sh use.
#
#   ./scripts/setup_env.sh [extra …]         example: ./scripts/setup_env.sh test
#   source scripts/setup_env.sh; setup_env [extra …]      sets PYTHON and exports PYTHONPATH
#
# The active environment (venv, conda, container) is used if it has torch: only what else is missing is installed there,
# and never a torch or a Triton. Otherwise .venv is made beside this project. Nothing is done twice: with everything in
# place this needs no network and a fraction of a second. All messages go to stderr. Exit code 2: one line says what to mend.

SETUP_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
SETUP_VENV=$SETUP_ROOT/.venv
SETUP_STAMP=$SETUP_VENV/.titanling-ready
SETUP_MARKER=$SETUP_VENV/.titanling-made

# Nothing that lies in the folder where the user stands is a part of this: neither as Python's own first place to import
# from (PYTHONSAFEPATH, from Python 3.11 on) nor as an empty entry of PYTHONPATH.
export PYTHONSAFEPATH=1
if [[ -n ${PYTHONPATH:-} ]]; then
  mapfile -t -d : SETUP_PATHS < <(printf '%s' "$PYTHONPATH")
  PYTHONPATH=
  for SETUP_PATH in "${SETUP_PATHS[@]}"; do
    if [[ -n $SETUP_PATH ]]; then PYTHONPATH+=${PYTHONPATH:+:}$SETUP_PATH; fi
  done
fi

setup_say() { printf '%s\n' "$*" >&2; }

setup_fail() {
  setup_say "error: $*"
  exit 2
}

# The full output of pip; removed when all went well, named in the error line otherwise.
setup_open_log() { SETUP_LOG=$(mktemp "${TMPDIR:-/tmp}/titanling-setup.XXXXXX"); }

# Runs a command with its output in $SETUP_LOG; on failure says in one line why, as far as pip's words tell.
setup_pip() {
  local what=$1 why
  shift
  if "$@" >>"$SETUP_LOG" 2>&1 </dev/null; then return 0; fi
  if grep -q 'externally-managed-environment' "$SETUP_LOG"; then
    why="the operating system manages this Python: activate a virtual environment and run again"
  elif grep -qi 'no space left\|disk quota exceeded' "$SETUP_LOG"; then
    why="the disk is full: free some space and run again"
  elif grep -qi 'permission denied\|read-only file system' "$SETUP_LOG"; then
    why="a folder is not writable: activate an environment of your own, or make the folder writable"
  elif grep -q 'ResolutionImpossible\|conflicting dependencies' "$SETUP_LOG"; then
    why="the environment's own versions are in the way: install it there by hand, or use another environment"
  elif grep -qi 'no matching distribution\|connection\|proxyerror\|retrying\|name resolution\|SSLError' "$SETUP_LOG"; then
    why="no package index in reach has it: check the network, HTTPS_PROXY and PIP_INDEX_URL, and run again"
  else
    why="see pip's words there"
  fi
  setup_fail "could not install $what ($SETUP_LOG): $why"
}

# Runs a function alone, where flock exists: processes of one job may set up one shared checkout at the same time.
setup_locked() {
  local lock=$SETUP_ROOT/.venv.lock
  if ! command -v flock >/dev/null || ! { : >>"$lock"; } 2>/dev/null; then
    "$@"
    return
  fi
  # A subshell, so that the training process does not inherit the lock.
  (
    if ! flock -n 9; then
      setup_say "Waiting for another set-up of $SETUP_ROOT …"
      flock 9
    fi
    "$@"
  ) 9>>"$lock"
}

# ---- an active environment with torch ----

# Prints the Pythons that "active" may mean; python3 only if it is of another environment than python.
setup_active_pythons() {
  local python python3
  python=$(type -P python || true)
  python3=$(type -P python3 || true)
  if [[ -n $python ]]; then printf '%s\n' "$python"; fi
  if [[ -n $python3 && (-z $python || ${python3%/*} != "${python%/*}") ]]; then printf '%s\n' "$python3"; fi
}

# Sets PYTHON and SETUP_REPORT for the first active Python with torch; returns 1 if there is none.
setup_find_active() {
  local candidate code
  while IFS= read -r candidate; do
    code=0
    # Quiet: a Python too old to read the file is simply not one of ours.
    SETUP_REPORT=$("$candidate" "$SETUP_ROOT/scripts/check_env.py" "$@" 2>/dev/null) || code=$?
    case $code in
      0) PYTHON=$candidate && return 0 ;;
      2) setup_fail "$SETUP_REPORT" ;;
    esac
  done < <(setup_active_pythons)
  return 1
}

setup_values() { sed -n "s/^$1 //p" <<<"$SETUP_REPORT"; }

# What the report says about torch and Triton, one `name version` a line.
setup_pins() { grep -v '^python \|^need \|^project ' <<<"$SETUP_REPORT"; }

# Installs requirements into a Python, with the torch and the Triton that are there pinned.
setup_install() {
  local python=$1 constraints=$SETUP_LOG.constraints
  shift
  setup_pins | sed 's/ /==/' >"$constraints"
  setup_pip "$*" "$python" -m pip install -c "$constraints" "$@"
  rm -f "$constraints"
}

# Installs what is missing, with the torch and the Triton that are there pinned.
setup_complete_active() {
  local needs torch before
  setup_open_log
  setup_find_active "$@" || true # another process may have been faster
  mapfile -t needs < <(setup_values need)
  torch=$(setup_values torch)
  if ((${#needs[@]})); then
    "$PYTHON" -m pip --version >/dev/null 2>&1 ||
      setup_fail "$PYTHON has torch $torch but no pip: install ${needs[*]} there yourself and run again"
    setup_say "Using torch $torch of $PYTHON; installing ${needs[*]}"
    before=$(setup_pins)
    setup_install "$PYTHON" "${needs[@]}"
    setup_find_active "$@" || true
    # Asked for beside a CPU build of torch, a Triton may be new; nothing else may differ.
    [[ $(setup_pins) == "$before" || ${needs[*]} == *triton* && $(setup_pins | grep -v '^triton ') == "$before" ]] ||
      setup_fail "installing ${needs[*]} changed torch or Triton in $PYTHON ($SETUP_LOG): restore ${before//$'\n'/, }"
    mapfile -t needs < <(setup_values need)
    ((${#needs[@]} == 0)) || setup_fail "pip did not install ${needs[*]} where $PYTHON finds it ($SETUP_LOG)"
  fi
  if [[ $(setup_values project) == no ]]; then setup_link_project; fi
  rm -f "$SETUP_LOG"
}

# Makes `import titanling` work in the active environment without PYTHONPATH, if that costs no download.
setup_link_project() {
  local check='
import os, sysconfig
from importlib import metadata
new_enough = int(metadata.version("setuptools").split(".")[0]) >= 77
raise SystemExit(not (new_enough and os.access(sysconfig.get_path("purelib"), os.W_OK)))'
  if [[ -w $SETUP_ROOT ]] && "$PYTHON" -c "$check" 2>/dev/null &&
    "$PYTHON" -m pip install --no-deps --no-build-isolation -e "$SETUP_ROOT" >>"$SETUP_LOG" 2>&1 </dev/null; then
    setup_say "Installed titanling (editable) in the environment of $PYTHON"
  fi
}

# ---- a .venv of our own ----

# What .venv depends on besides pyproject.toml: where it is (its scripts name their own path), and its Python.
setup_identity() { printf '%s\n%s\n' "$SETUP_ROOT" "$(readlink -f "$SETUP_VENV/bin/python")"; }

# Whether .venv is whole and holds these extras.
setup_venv_ready() {
  local extra
  [[ -f $SETUP_STAMP && -x $SETUP_VENV/bin/python ]] || return 1
  cmp -s "$SETUP_ROOT/pyproject.toml" "$SETUP_VENV/.titanling-pyproject.toml" || return 1
  [[ $(head -n 2 "$SETUP_STAMP") == "$(setup_identity)" ]] || return 1
  for extra in "$@"; do grep -qx "extra $extra" "$SETUP_STAMP" || return 1; done
}

# Prints the first usable Python: the user's own choice before the versions we know.
setup_base_python() {
  local candidate
  for candidate in python3 python python3.12 python3.11 python3.10 python3.13; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' 2>/dev/null; then
      type -P "$candidate"
      return
    fi
  done
  setup_fail "no Python 3.10 or newer found (python3, python3.12, …): install one and run again"
}

# Makes an empty .venv. Debian ships Python without ensurepip; its pip can then serve .venv from outside.
setup_create_venv() {
  local base version
  base=$(setup_base_python)
  version=$("$base" -c 'import platform; print(platform.python_version())')
  if [[ -d $SETUP_VENV && -n $(ls -A "$SETUP_VENV") && ! -f $SETUP_MARKER ]]; then
    setup_fail "$SETUP_VENV was not made by this script: activate it if it is yours, or move it away"
  fi
  { rm -rf "$SETUP_VENV" && mkdir "$SETUP_VENV" && : >"$SETUP_MARKER"; } 2>/dev/null ||
    setup_fail "cannot write $SETUP_VENV: make the folder writable, or activate an environment that has torch"
  setup_say "Creating .venv (Python $version)"
  if "$base" -c 'import ensurepip, venv' 2>/dev/null; then
    setup_pip ".venv" "$base" -m venv "$SETUP_VENV"
  elif "$base" -c 'import venv' 2>/dev/null && "$base" -m pip --python "$base" --version >/dev/null 2>&1; then
    setup_pip ".venv" "$base" -m venv --without-pip "$SETUP_VENV"
    setup_pip "pip" "$base" -m pip --python "$SETUP_VENV/bin/python" install pip
  else
    setup_fail "$base cannot make a virtual environment: install its venv module (Debian, Ubuntu: apt install python${version%.*}-venv)"
  fi
}

# Makes .venv, or adds to it. The stamp goes first and comes back last: an interrupted set-up is redone from the start.
setup_make_venv() {
  local known=() extras needs started=$SECONDS
  if setup_venv_ready "$@"; then return; fi
  setup_open_log
  export PIP_USER=0 # a site-wide "user = true" would miss .venv
  if [[ -f $SETUP_STAMP && -x $SETUP_VENV/bin/python && $(head -n 2 "$SETUP_STAMP") == "$(setup_identity)" ]]; then
    mapfile -t known < <(sed -n 's/^extra //p' "$SETUP_STAMP")
    rm -f "$SETUP_STAMP"
  else
    setup_create_venv
  fi
  mapfile -t extras < <(printf '%s\n' "${known[@]}" "$@" | sed '/^$/d' | sort -u)
  setup_say "Installing torch and what else pyproject.toml lists${extras[*]:+ (with: ${extras[*]})}: some minutes, 0.2 to 3 GB"
  setup_pip "torch and the other requirements" "$SETUP_VENV/bin/python" -m pip install -e "$SETUP_ROOT"
  # The extras come second: whether they need a Triton depends on the torch that is there now.
  SETUP_REPORT=$("$SETUP_VENV/bin/python" "$SETUP_ROOT/scripts/check_env.py" --own "${extras[@]}") ||
    setup_fail "$SETUP_REPORT"
  mapfile -t needs < <(setup_values need)
  if ((${#needs[@]})); then setup_install "$SETUP_VENV/bin/python" "${needs[@]}"; fi
  cp "$SETUP_ROOT/pyproject.toml" "$SETUP_VENV/.titanling-pyproject.toml"
  {
    setup_identity
    if ((${#extras[@]})); then printf 'extra %s\n' "${extras[@]}"; fi
  } >"$SETUP_STAMP"
  setup_say "Ready after $((SECONDS - started)) s: torch $("$SETUP_VENV/bin/python" -c 'from importlib.metadata import version; print(version("torch"))')"
  rm -f "$SETUP_LOG"
}

# Sets PYTHON to a Python that has the requirements and these extras, and exports PYTHONPATH.
setup_env() {
  export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_RETRIES=${PIP_RETRIES:-3}
  if setup_find_active "$@"; then
    if [[ $SETUP_REPORT == *$'\n''need '* || $SETUP_REPORT == *$'\n''project '* ]]; then
      setup_locked setup_complete_active "$@"
    fi
  else
    if ! setup_venv_ready "$@"; then setup_locked setup_make_venv "$@"; fi
    PYTHON=$SETUP_VENV/bin/python
  fi
  export PYTHONPATH=$SETUP_ROOT${PYTHONPATH:+:$PYTHONPATH}
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  set -euo pipefail
  if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
    exit 0
  fi
  setup_env "$@"
fi
