"""What the Triton kernels cost on GPUs that are not there: registers, spills, shared memory, width of accesses.

Compiles every kernel for sm_80, sm_90, sm_100, gfx90a and gfx942, in about half a minute, and reads the machine code.
"""

import sys
from os.path import dirname, realpath

sys.path.insert(0, dirname(dirname(realpath(__file__))))
from titanling import environment

environment.require()

import argparse
import multiprocessing
import os
from pathlib import Path
from typing import TYPE_CHECKING

from titanling.cli import local_path

EXAMPLE = "example: python scripts/kernel_report.py --targets sm_90 gfx90a --match 'norm.*8192' --check"
ROOT = Path(__file__).resolve().parents[1]
BUDGET = ROOT / "benchmarks/kernel_budget.json"

if TYPE_CHECKING:
    from triton_kernels.budget import Costs


def main() -> int:
    """Arguments → compile → table, comparison, file. The exit code: 1 if --check found something."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--targets", nargs="+", metavar="TARGET", help="default: all of the above")
    parser.add_argument("--match", default="", metavar="REGEX", help="only kernels with such a name")
    parser.add_argument("--budget", type=local_path, default=BUDGET, metavar="FILE", help=f"default: {BUDGET.name}")
    parser.add_argument("--check", action="store_true", help="fail on a broken limit, and on more than is recorded")
    parser.add_argument("--record", action="store_true", help="record these costs for this version of Triton")
    arguments = parser.parse_args()
    # Imported late, so that --help answers at once.
    from triton_kernels import ahead_of_time, budget
    from triton_kernels.language import INTERPRETED, MISSING
    from triton_kernels.launch import TABLES

    targets = arguments.targets or list(TABLES)
    unknown = [target for target in targets if target not in TABLES]
    if unknown:
        parser.error(f"--targets {' '.join(unknown)}: choose from {', '.join(TABLES)}")
    if MISSING or INTERPRETED:
        parser.error(MISSING or "TRITON_INTERPRET is set: the interpreter compiles nothing")
    if arguments.record and (arguments.match or targets != list(TABLES)):
        parser.error("--record wants all kernels and targets")
    import triton

    jobs = [(target, arguments.match) for target in targets]
    workers = min(len(jobs), len(os.sched_getaffinity(0)))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        measured = pool.starmap(ahead_of_time.measure_target, jobs, chunksize=1)
    costs = dict(zip(targets, measured, strict=True))
    report(costs)
    if arguments.record:
        problems = budget.check(costs, None)
        if problems:
            print("\n".join([*problems, "nothing recorded: mend this first"]))
            return 1
        budget.record(arguments.budget, triton.__version__, costs)
        print(f"recorded for Triton {triton.__version__}: {arguments.budget}")
    if not arguments.check:
        return 0
    recorded = budget.read(arguments.budget, triton.__version__)
    if recorded is None:
        print(f"nothing is recorded for Triton {triton.__version__}: only the limits are checked")
    problems = budget.check(costs, recorded)
    print("\n".join(problems) or f"{sum(map(len, measured))} kernels within their budget")
    return 1 if problems else 0


def report(costs: "Costs") -> None:
    """One line per kernel and target."""
    columns = ("registers", "spills", "shared", "threads", "widest", "elementwise", "float64")
    print(f"{'target':8}{'kernel':34}" + "".join(f"{column:>12}" for column in columns))
    for target, kernels in costs.items():
        for kernel, cost in kernels.items():
            print(f"{target:8}{kernel:34}" + "".join(f"{value:12}" for value in cost))


if __name__ == "__main__":
    sys.exit(main())
