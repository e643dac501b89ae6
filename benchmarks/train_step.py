"""Training speed: titanling's Trainer beside a bare reference loop, Hugging Face's Trainer and litgpt, on the CPU.

All contestants train the same tied Llama (minilingua_30m, vocabulary 32,768) on 4 × 512 random tokens a step. They stay
loaded and take turns in rounds; every ratio is taken within a round, so that drift of the machine cancels.
benchmarks/setup_peers.sh installs the peers; those that are not installed are left out.
"""

import sys
from os.path import dirname, realpath

sys.path.insert(0, dirname(dirname(realpath(__file__))))
from titanling import environment

environment.require(even_for_help=True)

import argparse
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from contestants.protocol import CELLS, FULL, SMOKE, Sizes
from harness import OURS, PROGRAMS, Contestant, ContestantFailed, installed, machine, say, write_json
from rich.console import Console
from rich.table import Table

EXAMPLE = "example: python benchmarks/train_step.py --cells fp32-eager fp32-compiled --json results.json"
CONTESTANTS = [name for name in PROGRAMS if name != "gemm"]
PEERS = [name for name in CONTESTANTS if name not in OURS]

# bfloat16 steps take half a minute where the CPU has no units for it.
STEPS = {"fp32": 3, "bf16-autocast": 1, "bf16-parameters": 1}

TARGET_REFERENCE = 0.98
TARGET_PEERS = 1.0
TARGET_PEERS_BF16_COMPILED = 1.15
SAME_LOSS = 0.02


def main() -> int:
    """Arguments → cells → table and JSON. Exit code 1 if a comparison is not valid."""
    arguments = parse_arguments()
    sizes = SMOKE if arguments.smoke else FULL
    results: dict[str, Any] = {
        "benchmark": "train_step",
        "machine": machine(),
        "rounds": arguments.rounds,
        "tokens_per_step": sizes.tokens,
        "gemm_flops_per_step": sizes.gemm_flops,
        "cells": [],
    }
    for cell in arguments.cells:
        with tempfile.TemporaryDirectory(prefix="titanling-benchmark-") as folder:
            steps = arguments.steps or STEPS[CELLS[cell].precision]
            result = run_cell(cell, arguments.contestants, steps, arguments.rounds, Path(folder), arguments.smoke)
        results["cells"].append(result)
    console = Console(width=160 if not sys.stdout.isatty() else None)
    console.print(table(results["cells"]))
    for result in results["cells"]:
        for line in verdict(result):
            console.print(line, highlight=False)
    write_json(arguments.json, results)
    return int(any(result["problems"] for result in results["cells"]))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--cells", nargs="+", choices=CELLS, help="default: all")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS, help="default: all")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contestant (default 3)")
    parser.add_argument("--steps", type=int, help="steps in a turn (default 3 in fp32, 1 in bf16)")
    parser.add_argument("--json", metavar="OUT", help="also write the results here")
    parser.add_argument(
        "--smoke", action="store_true", help="seconds: a tiny model, fp32-eager; the times mean nothing"
    )
    arguments = parser.parse_args()
    if arguments.rounds < 1 or (arguments.steps is not None and arguments.steps < 1):
        parser.error("--rounds and --steps must be positive")
    if "reference" not in arguments.contestants:
        parser.error("--contestants needs reference: every ratio is to it")
    arguments.cells = arguments.cells or (["fp32-eager"] if arguments.smoke else list(CELLS))
    for name in arguments.contestants:
        if not installed(name):
            say(f"{name} is not installed (benchmarks/setup_peers.sh): left out")
    arguments.contestants = [name for name in arguments.contestants if installed(name)]
    return arguments


def run_cell(cell: str, names: list[str], steps: int, rounds: int, folder: Path, smoke: bool) -> dict[str, Any]:
    """Start all contestants of a cell one after another, let them take turns, sum up."""
    problems: list[str] = []
    with ExitStack() as stack:
        contestants: dict[str, Contestant] = {}
        for name in names:
            say(f"{cell}: {name} starts")
            try:
                contestants[name] = stack.enter_context(Contestant(name, cell, folder, smoke=smoke))
            except ContestantFailed as error:
                problems.append(str(error))
        gemms: dict[str, Contestant] = {}
        for dtype in {contestant.hello["compute_dtype"] for contestant in contestants.values()}:
            gemm_cell = "fp32-eager" if dtype == "float32" else "bf16-parameters-eager"
            gemms[dtype] = stack.enter_context(Contestant("gemm", gemm_cell, folder, smoke=smoke))
        turns: list[dict[str, dict[str, Any]]] = []
        for number in range(rounds):
            say(f"{cell}: round {number + 1} of {rounds}")
            turn = {name: contestant.window(steps) for name, contestant in contestants.items()}
            turns.append(turn | {f"gemm {dtype}": gemm.window(1) for dtype, gemm in gemms.items()})
    hellos = {name: contestant.hello for name, contestant in contestants.items()}
    return summarise(cell, hellos, turns, problems, SMOKE if smoke else FULL)


def summarise(
    cell: str, hellos: dict[str, Any], turns: list[dict[str, dict[str, Any]]], problems: list[str], sizes: Sizes
) -> dict[str, Any]:
    """Medians over the rounds, and ratios taken within each."""

    def step_seconds(name: str) -> list[float]:
        return [statistics.fmean(turn[name]["seconds"]) for turn in turns]

    reference = step_seconds("reference") if "reference" in hellos else []
    rows: dict[str, Any] = {}
    for name, hello in hellos.items():
        seconds, gemm = step_seconds(name), step_seconds(f"gemm {hello['compute_dtype']}")
        ratios = [theirs / own for own, theirs in zip(seconds, reference, strict=False)]
        rows[name] = hello | {
            "tokens_per_second": sizes.tokens / statistics.median(seconds),
            "ratios_to_reference": ratios,
            "ratio_to_reference": statistics.median(ratios) if ratios else None,
            "gemm_gflops": sizes.gemm_flops / statistics.median(gemm) / 1e9,
            "fraction_of_gemm_rate": statistics.median(g / s for g, s in zip(gemm, seconds, strict=True)),
            "windows": [turn[name]["seconds"] for turn in turns],
            "gemm_seconds": gemm,
            "last_loss": turns[-1][name]["loss"],
            "peak_rss": turns[-1][name]["peak_rss"],
        }
    return {"cell": cell, "contestants": rows, "problems": problems + incomparable(hellos)}


def incomparable(hellos: dict[str, Any]) -> list[str]:
    """What makes the contestants' models differ: parameter counts, initial losses, torch versions, threads."""
    found = []
    for key, what in (("parameters", "parameters"), ("threads", "threads")):
        if len({hello[key] for hello in hellos.values()}) > 1:
            found.append(f"{what} differ: " + ", ".join(f"{name} {hello[key]}" for name, hello in hellos.items()))
    if len({hello["versions"]["torch"] for hello in hellos.values()}) > 1:
        found.append("torch differs: " + ", ".join(f"{n} {h['versions']['torch']}" for n, h in hellos.items()))
    losses = {name: hello["first_loss"] for name, hello in hellos.items()}
    if losses and not max(losses.values()) <= (1 + SAME_LOSS) * min(losses.values()):
        found.append("initial losses differ: " + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))
    return found


def verdict(result: dict[str, Any]) -> list[str]:
    """Lines below the table: titanling against the targets, and what is wrong with a cell."""
    cell, rows = result["cell"], result["contestants"]
    lines = [f"{cell}: NOT VALID: {problem}" for problem in result["problems"]]
    own = rows.get("titanling")
    if own is None or own["ratio_to_reference"] is None:
        return lines
    line = f"{cell}: titanling {own['ratio_to_reference']:.3f} × reference (target {TARGET_REFERENCE})"
    # Against the fastest peer of each round: both ratios have the same reference window below.
    peers = [rows[name]["ratios_to_reference"] for name in PEERS if name in rows]
    if peers:
        ratio = statistics.median(
            mine / max(theirs) for mine, *theirs in zip(own["ratios_to_reference"], *peers, strict=True)
        )
        bf16_compiled = cell.startswith("bf16") and CELLS[cell].compiled
        target = TARGET_PEERS_BF16_COMPILED if bf16_compiled else TARGET_PEERS
        line += f", {ratio:.3f} × fastest peer (target {target})"
    lines.append(line)
    if cell.startswith("bf16") and own["compute_dtype"] == "float32":
        lines.append(
            f"{cell}: titanling computes in float32, for this CPU has no bfloat16 units and the others emulate them"
        )
    return lines


def table(cells: list[dict[str, Any]]) -> Table:
    """One row per cell and contestant."""
    found = Table(title="training step: medians over the rounds")
    for name in ("cell", "contestant", "computes in"):
        found.add_column(name, no_wrap=True)
    for name in ("GEMM GFLOP/s", "tokens/s", "× ref", "min … max", "of GEMM rate", "1st step s", "RSS GiB", "loss"):
        found.add_column(name, justify="right", no_wrap=True)
    for result in cells:
        for name, row in result["contestants"].items():
            ratios = row["ratios_to_reference"] or [float("nan")]
            found.add_row(
                result["cell"],
                name,
                row["compute_dtype"],
                f"{row['gemm_gflops']:.0f}",
                f"{row['tokens_per_second']:.0f}",
                f"{statistics.median(ratios):.3f}",
                f"{min(ratios):.3f} … {max(ratios):.3f}",
                f"{row['fraction_of_gemm_rate']:.0%}",
                f"{row['first_step_seconds']:.1f}",
                f"{row['peak_rss'] / 2**30:.2f}",
                f"{row['first_loss']:.3f} → {row['last_loss']:.3f}",
            )
        found.add_section()
    return found


if __name__ == "__main__":
    sys.exit(main())
