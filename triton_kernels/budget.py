"""What a compiled kernel may cost: limits that hold always, and what was recorded for one version of Triton."""

import json
from collections.abc import Mapping
from pathlib import Path

from triton_kernels.ahead_of_time import Cost

MAX_SHARED = 64 * 1024
"""Bytes: all the LDS that a compute unit of AMD has."""
MAX_THREADS = 1024
WIDEST = 16
"""Bytes that one thread can load or store at once, and should."""

Costs = Mapping[str, Mapping[str, Cost]]
"""By target and kernel."""


def violations(cost: Cost) -> list[str]:
    """What no kernel of ours may do, whatever was recorded."""
    found = {
        "spills registers": cost.spills > 0,
        "computes in float64": cost.float64 > 0,
        f"accesses memory by {cost.widest} bytes at most, not {WIDEST}": cost.widest < WIDEST,
        f"loads {cost.elementwise} times a single 2-byte element": cost.elementwise > 0,
        f"takes {cost.shared} bytes of shared memory, over {MAX_SHARED}": cost.shared > MAX_SHARED,
        f"has {cost.threads} threads, over {MAX_THREADS}": cost.threads > MAX_THREADS,
    }
    return [problem for problem, holds in found.items() if holds]


def regressions(cost: Cost, recorded: Cost) -> list[str]:
    """In what a kernel has become worse than it was."""
    return [
        f"{field}: {new} instead of {old}"
        for field, new, old in zip(Cost._fields, cost, recorded, strict=True)
        if (new < old if field == "widest" else new > old)
    ]


def check(costs: Costs, recorded: Costs | None) -> list[str]:
    """One line per problem. Nothing recorded: only the limits hold."""
    problems = []
    for target, kernels in costs.items():
        for kernel, cost in kernels.items():
            found = violations(cost)
            if recorded is not None:
                before = recorded.get(target, {}).get(kernel)
                found += ["is not recorded"] if before is None else regressions(cost, before)
            problems += [f"{target} {kernel}: {problem}" for problem in found]
    return problems


def read(path: Path, version: str) -> Costs | None:
    """What is recorded for a version of Triton; None if nothing is."""
    by_version = json.loads(path.read_text(encoding="utf-8"))["triton"] if path.exists() else {}
    if version not in by_version:
        return None
    return {
        target: {name: Cost(**cost) for name, cost in kernels.items()}
        for target, kernels in by_version[version].items()
    }


def record(path: Path, version: str, costs: Costs) -> None:
    """Put costs in the place of those of the same version of Triton. Kernels are one line each, for readable diffs."""
    by_version = json.loads(path.read_text(encoding="utf-8"))["triton"] if path.exists() else {}
    by_version[version] = {t: {name: cost._asdict() for name, cost in ks.items()} for t, ks in costs.items()}
    versions = []
    for name in sorted(by_version):
        targets = []
        for target, kernels in by_version[name].items():
            rows = ",\n".join(f"        {json.dumps(kernel)}: {json.dumps(cost)}" for kernel, cost in kernels.items())
            targets.append(f"      {json.dumps(target)}: {{\n{rows}\n      }}")
        versions.append(f"    {json.dumps(name)}: {{\n" + ",\n".join(targets) + "\n    }")
    path.write_text('{\n  "triton": {\n' + ",\n".join(versions) + "\n  }\n}\n", encoding="utf-8")
