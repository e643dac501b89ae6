"""Which Python a command runs in: one that has what the project needs, or else the project's own .venv.

Any Python from 3.6 on can read this file, without any package: on many a machine that is what `python3` is.
"""

import importlib.util
import os
import shlex
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
VENV = os.path.join(ROOT, ".venv")
SETUP = os.path.join(ROOT, "scripts", "setup_env.sh")
MODULES = (
    *("torch", "torchdata", "tokenizers", "tomli", "tomli_w", "tensorboard", "xxhash", "safetensors", "pydantic"),
    *("rich", "numpy"),
)
"""What the dependencies in pyproject.toml are imported as."""
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "universal_newlines": True}  # 3.6 has no shorter way
MINIMUM = (3, 10)
HANDED_OVER = "TITANLING_HANDED_OVER"  # this command has been handed over to .venv once already


def require(even_for_help: bool = False) -> None:
    """Return if this Python has what the project needs. Else the command goes on in .venv, if that has; else it ends
    with exit code 2 and one line that says what to run. Only --help needs no package, if not `even_for_help`.

    Call it before anything else is imported. Child processes will find the project, whether it is installed or not.
    """
    handed_over = os.environ.pop(HANDED_OVER, None) is not None
    _forget_working_folder()
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if ROOT not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([ROOT] + paths)
    lacking = _lacking()
    helps = not even_for_help and sys.version_info >= MINIMUM and {"-h", "--help"} & set(sys.argv[1:])
    if helps or not lacking:
        return
    if not os.path.lexists(VENV):
        what, command = sys.executable + " " + lacking, shlex.quote(SETUP)
    else:
        inside = handed_over or os.path.realpath(sys.prefix) == os.path.realpath(VENV)
        what, command = VENV + " " + (lacking if inside else _hand_over()), _mending()
    what = " ".join(what.split())
    sys.stderr.write(f"error: {what}; run {command} once, then the same command again\n")
    sys.exit(2)


def _forget_working_folder() -> None:
    """What lies where the user stands is no part of the program: `python -m` puts that folder before all others.

    It also does so in every process that this one starts, from Python 3.11 on unless it is told not to.
    """
    started_by_m = getattr(sys.modules["__main__"], "__spec__", None) is not None
    if started_by_m and "PYTHONSAFEPATH" not in os.environ and sys.path and os.path.realpath(sys.path[0]) != ROOT:
        del sys.path[0]
    os.environ["PYTHONSAFEPATH"] = "1"


def _lacking() -> str:
    """What keeps this Python from running the project, in words; empty if nothing does."""
    if sys.version_info < MINIMUM:
        return f"is Python {sys.version_info[0]}.{sys.version_info[1]}, and the project needs 3.10"
    # Of a package that was removed, a folder without code may be left, which has no origin.
    specs = [(name, importlib.util.find_spec(name)) for name in MODULES]
    missing = [name for name, spec in specs if spec is None or spec.origin is None]
    return "lacks " + ", ".join(missing) if missing else ""


def _hand_over() -> str:
    """Let the .venv's Python run this command instead. Returns, with the reason in words, only if it cannot."""
    python = os.path.join(VENV, "bin", "python")
    check = [python, os.path.join(ROOT, "scripts", "check_env.py"), "--own"]
    try:
        found = subprocess.run(check, **PIPES)
    except OSError as error:
        return f"is broken (bin/python: {error.strerror})"
    if found.returncode != 0:
        return {2: "does not fit: " + found.stdout, 3: "lacks torch"}.get(found.returncode, "is broken")
    needs = [line[len("need ") :] for line in found.stdout.splitlines() if line.startswith("need ")]
    if needs:
        return "lacks " + ", ".join(needs)
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    command = ["-m", spec.name] if spec is not None else [sys.argv[0]]
    os.environ[HANDED_OVER] = "1"
    sys.stdout.flush()
    try:
        os.execv(python, [python] + ["-I"] * sys.flags.isolated + command + sys.argv[1:])
    except OSError as error:
        return f"is broken (bin/python: {error.strerror})"


def _mending() -> str:
    """The command that makes a .venv usable: beside an older pyproject.toml it is completed, else made anew."""
    venv, setup = shlex.quote(VENV), shlex.quote(SETUP)
    return setup if _is_older() else f"mv {venv} {shlex.quote(VENV + '.old')} && {setup}"


def _is_older() -> bool:
    """Whether setup_env.sh made .venv for another pyproject.toml: then it brings it up to date."""
    try:
        with open(os.path.join(VENV, ".titanling-pyproject.toml"), "rb") as then:
            with open(os.path.join(ROOT, "pyproject.toml"), "rb") as now:
                return os.path.exists(os.path.join(VENV, ".titanling-ready")) and then.read() != now.read()
    except OSError:
        return False
