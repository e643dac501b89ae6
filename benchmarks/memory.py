"""Peak memory of training: titanling's Trainer beside the bare reference loop, in float32, eager.

Each run is a process of its own, alone, of the model and batch of train_step.py. The peak is the process's whole RSS:
libraries, weights, optimizer state, activations.
"""

import sys
from os.path import dirname, realpath

sys.path.insert(0, dirname(dirname(realpath(__file__))))
from titanling import environment

environment.require(even_for_help=True)

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from harness import OURS, Contestant, machine, say, write_json
from rich.console import Console
from rich.table import Table

EXAMPLE = "example: python benchmarks/memory.py --repeats 3 --json results.json"
CELL = "fp32-eager"
TARGET = 1.05
MIB = 2**20


def main() -> None:
    """Arguments → runs → table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (default 3)")
    parser.add_argument("--steps", type=int, default=3, help="steps of a run after the first (default 3)")
    parser.add_argument("--json", metavar="OUT", help="also write the results here")
    parser.add_argument("--smoke", action="store_true", help="seconds: a tiny model; the ratio means nothing")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"benchmark": "memory", "machine": machine(), "cell": CELL}
    runs: dict[str, list[dict[str, int]]] = {name: [] for name in OURS}
    for number in range(1 if arguments.smoke else arguments.repeats):
        for name in OURS:
            say(f"run {number + 1}: {name}")
            runs[name].append(measure(name, arguments.steps, arguments.smoke))
    peaks = {name: statistics.median(run["peak_rss"] for run in runs[name]) for name in OURS}
    results |= {"runs": runs, "ratio_to_reference": peaks["titanling"] / peaks["reference"], "target": TARGET}
    report(runs, results["ratio_to_reference"])
    write_json(arguments.json, results)


def measure(name: str, steps: int, smoke: bool) -> dict[str, int]:
    """Bytes: RSS with everything built but before the first step, and the peak of the whole run."""
    with tempfile.TemporaryDirectory(prefix="titanling-benchmark-") as folder:
        with Contestant(name, CELL, Path(folder), smoke=smoke) as contestant:
            peak = contestant.window(steps)["peak_rss"]
            return {"rss_before_steps": contestant.hello["rss_before_steps"], "peak_rss": peak}


def report(runs: dict[str, list[dict[str, int]]], ratio: float) -> None:
    """Print the medians."""
    table = Table(title=f"peak RSS of training, {CELL}: medians, MiB")
    for column in ("", "before the first step", "peak", "peak, min … max"):
        table.add_column(column, justify="right")
    for name, found in runs.items():
        before = statistics.median(run["rss_before_steps"] for run in found)
        peaks = [run["peak_rss"] / MIB for run in found]
        spread = f"{min(peaks):,.0f} … {max(peaks):,.0f}"
        table.add_row(name, f"{before / MIB:,.0f}", f"{statistics.median(peaks):,.0f}", spread)
    console = Console()
    console.print(table)
    console.print(f"titanling {ratio:.3f} × reference (target at most {TARGET})", highlight=False)


if __name__ == "__main__":
    main()
