"""Says whether the Python that runs this file can train, and what it lacks. Called by scripts/setup_env.sh.

    python scripts/check_env.py [--own] [extra …]
    example: python scripts/check_env.py test

Looks at installed metadata only: nothing heavy is imported and nothing is changed. Needs no third-party package, for
it runs before anything is installed. Prints one `key value` line per finding: `python 3.11.7`, `torch 2.13.0+cpu`,
`triton 3.7.1` (any installed build of it), `need tokenizers>=0.20` for each requirement that is missing or too old,
and `project no` when `titanling` cannot be imported without PYTHONPATH. A Triton is only needed beside a CPU build of
torch: any other brings its own, and PyPI's must never be laid over it. Exit codes: 0 a torch is there and fits;
2 a torch is there and does not fit (the reason and the remedy are printed instead); 3 no torch, or, without --own,
our own .venv.
"""

from __future__ import annotations

import importlib.util
import operator
import os
import re
import sys
from importlib import metadata

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MINIMUM_PYTHON = (3, 10)
# A torch build pins its own Triton, under one of these names.
TRITON_NAMES = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm", "pytorch-triton-xpu", "triton-xpu")
COMPARE = {">=": operator.ge, "<": operator.lt, "==": operator.eq}


def requirements(extras: list[str]) -> list[str]:
    """Requirements of the project and of `extras`, as pyproject.toml lists them, e.g. "torch>=2.11,<2.14".

    Read without a TOML parser, because Python 3.10 has none. An unknown extra raises ValueError.
    """
    with open(os.path.join(ROOT, "pyproject.toml"), encoding="utf-8") as file:
        text = file.read()
    found = []
    for name in ["dependencies", *extras]:
        block = re.search(rf"^{re.escape(name)} = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
        if block is None:
            raise ValueError(f"pyproject.toml: no extra named {name}")
        found += re.findall(r'^\s*"([^"]+)"', block.group(1), re.MULTILINE)
    return found


def installed_version(name: str) -> str | None:
    """Version of the installed distribution `name`; None if there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, ...]:
    """Numbers of a version without trailing zeros: "2.11.0a0+git" is (2, 11), as PEP 440 compares releases."""
    matched = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in matched.group().split(".")] if matched else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def brings_triton(torch: str) -> bool:
    """Whether a torch of this version may come with a Triton of its own: all but CPU builds, as far as they tell."""
    label = torch.partition("+")[2]
    brought = re.compile(rf"({'|'.join(map(re.escape, TRITON_NAMES))}|nvidia-|cuda-)", re.IGNORECASE)
    try:
        needs = metadata.requires("torch") or []
    except metadata.PackageNotFoundError:
        needs = []
    return label not in ("", "cpu") or any(brought.match(need) for need in needs)


def satisfied(requirement: str, version: str | None) -> bool:
    """Whether installed `version` fulfils `requirement`, e.g. "numpy>=1.26"."""
    if version is None:
        return False
    clauses = re.findall(r"(>=|==|<)([^,]+)", requirement.partition(";")[0])
    return all(COMPARE[sign](release(version), release(bound)) for sign, bound in clauses)


def main() -> int:
    """Print the findings; return the exit code."""
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        return 0
    own, extras = "--own" in sys.argv, [argument for argument in sys.argv[1:] if argument != "--own"]
    if not own and os.path.realpath(sys.prefix) == os.path.realpath(os.path.join(ROOT, ".venv")):
        return 3
    try:
        wanted = requirements(extras)
    except ValueError as error:
        print(error)
        return 2
    # Where this file lies must not make the project importable.
    sys.path = [entry for entry in sys.path if os.path.realpath(entry or ".") != os.path.join(ROOT, "scripts")]
    torch = installed_version("torch")
    if torch is None:
        return 3
    torch_wanted = next(item for item in wanted if re.match(r"torch\b", item))
    remedy = "activate an environment that has these, or an empty one to get a .venv made"
    if sys.version_info < MINIMUM_PYTHON:
        needed = ".".join(map(str, MINIMUM_PYTHON))
        print(f"{sys.executable} is Python {sys.version.split()[0]}, needs >={needed}: {remedy}")
        return 2
    if not satisfied(torch_wanted, torch):
        print(f"{sys.executable} has torch {torch}, needs {torch_wanted}: {remedy}")
        return 2
    print(f"python {sys.version.split()[0]}")
    print(f"torch {torch}")
    tritons = {name: installed_version(name) for name in TRITON_NAMES}
    for name, version in tritons.items():
        if version is not None:
            print(f"{name} {version}")
    without_triton = brings_triton(torch) or any(tritons.values()) or sys.platform != "linux"
    for requirement in (item.partition(";")[0] for item in wanted):
        name = re.match(r"[\w.-]+", requirement).group()
        if name == "triton" and without_triton:
            continue
        if not satisfied(requirement, installed_version(name)):
            print(f"need {requirement}")
    if importlib.util.find_spec("titanling") is None:
        print("project no")
    return 0


if __name__ == "__main__":
    sys.exit(main())
