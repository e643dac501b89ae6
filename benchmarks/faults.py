"""The table of faults: real processes, real signals, a real full disk; what happened, and whether the gate is met.

The rows are those of tests/faults, where every test run tries a few of each. All of them take about a quarter of an
hour on two cores. Exit code 1 if a gate is not met.
"""

import sys
from os.path import dirname, realpath

sys.path.insert(0, dirname(dirname(realpath(__file__))))
from titanling import environment

environment.require(even_for_help=True)

import argparse
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from harness import ROOT, machine, say, write_json
from rich.console import Console
from rich.table import Table

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "faults")]

import beside
import channels
import damage
import full_disk
import hostile
import kills
import lost
import stops
import worlds
from harm import Died, Row
from helpers import TinyData, make_tiny_data

EXAMPLE = "example: python benchmarks/faults.py --rows damage disk --json results.json"


class Size(NamedTuple):
    """How much of everything."""

    kills: int
    """Of each number of ranks and each mode."""
    flips: int
    cuts: int
    """Lengths at which each file is cut."""
    stops: Sequence[stops.Stop]
    compiled: Sequence[signal.Signals]
    losses: Sequence[lost.Loss]
    clean_steps: int
    chain: Sequence[worlds.Part]
    terminals: int
    """How many kinds of broken terminals."""
    large: int
    """Hidden size of a model whose save takes seconds."""


WHOLE = Size(10, 400, 10, stops.ALL, stops.SIGNALS, lost.ALL, 1000, worlds.CHAIN, len(channels.TERMINALS), 2048)
SMOKE = Size(1, 20, 1, stops.ALL[4:5], (), lost.ALL[:1], 20, worlds.CHAIN[1:3], 1, 0)


class Task(NamedTuple):
    """A part of the table."""

    make: Callable[[Path, TinyData, Size], list[Row]]
    """(a folder of its own, data, how much of everything) → its rows."""
    alone: bool = True
    """Whether it needs both cores; else it is one process after another, and another task goes on beside it."""


def _kills(ranks: int, mode: str) -> Task:
    return Task(
        lambda where, data, size: [kills.kill_during_saves(where, data, ranks, mode, size.kills)], alone=ranks > 1
    )


def _damage(where: Path, data: TinyData, size: Size) -> list[Row]:
    with damage.patient(where, data) as case:
        alone = damage.refuse_whole(case)
        rows = [damage.flip_bits(case, size.flips), damage.cut_and_swap(case, size.cuts)]
        rows.append(Row("all checkpoints damaged", 1, alone, "refused in one line, nothing moved"))
        return [*rows, hostile.meet_hostile_checkpoints(case)]


def _stops(ranks: int) -> Task:
    return Task(lambda where, data, size: [stops.stop_and_go_on(where, data, ranks, size.stops)], alone=ranks > 1)


def _compile(ranks: int, tries: int | None = None) -> Task:
    def make(where: Path, data: TinyData, size: Size) -> list[Row]:
        return [stops.stop_in_compile(where, data, ranks, size.compiled[:tries])] if size.compiled else []

    return Task(make, alone=ranks > 1)


def _one(make: Callable[[Path, TinyData], Row], alone: bool = False) -> Task:
    return Task(lambda where, data, size: [make(where, data)], alone)


def _terminals(ranks: int) -> Task:
    def make(where: Path, data: TinyData, size: Size) -> list[Row]:
        return [
            channels.broken_terminals(where / "broken", data, ranks, channels.TERMINALS[: size.terminals]),
            channels.closed_terminal(where / "closed", data, ranks),
        ]

    return Task(make, alone=ranks > 1)


def _twice(mode: str) -> Task:
    def make(where: Path, data: TinyData, size: Size) -> list[Row]:
        return [stops.stop_twice_in_a_save(where, data, mode, size.large)] if size.large else []

    return Task(make)


ROWS: dict[str, list[Task]] = {
    "kills": [_kills(ranks, mode) for ranks in (1, 2) for mode in ("disabled", "async")],
    "damage": [Task(_damage)],
    "disk": [Task(lambda where, data, size: [full_disk.fill_disk(where, data)])],
    "nan": [Task(lambda where, data, size: [worlds.poison_a_gradient(where, data, size.clean_steps)])],
    "lost": [Task(lambda where, data, size: [lost.lose_ranks(where, data, size.losses)])],
    "stops": [_stops(1), _stops(2)],
    "compile": [_compile(1), _compile(2, tries=1)],
    "twice": [_twice("disabled"), _twice("async")],
    "worlds": [Task(lambda where, data, size: [worlds.change_worlds(where, data, size.chain)])],
    "hostile": [Task(lambda where, data, size: [hostile.meet_hostile_surroundings(where, data)])],
    "owner": [_one(beside.one_owner, alone=True)],
    "ranks": [_one(beside.left_over_variables)],
    "cwd": [_one(beside.hostile_cwd, alone=True)],
    "terminal": [_terminals(1), _terminals(2)],
    "channels": [_one(channels.channels_taken_away)],
    "start": [_one(channels.found_out_at_once), _one(channels.preparation_longer_than_the_timeout, alone=True)],
    "stream": [_one(channels.bad_line_in_a_stream)],
}


def main() -> int:
    """Arguments → faults → table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="these only (default: all)")
    parser.add_argument("--json", metavar="OUT", help="also write the results here")
    parser.add_argument("--smoke", action="store_true", help="a minute: one or two tries of each row")
    arguments = parser.parse_args()
    # Started in a shell's background it would be ignored, by the runs that we start as well.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    results: dict[str, Any] = {"benchmark": "faults", "machine": machine(), "rows": []}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="titanling-benchmark-") as temporary:
        data = make_tiny_data(Path(temporary) / "data")
        rows = run_tasks(arguments.rows, Path(temporary), data, SMOKE if arguments.smoke else WHOLE)
        results["rows"] = [{**row._asdict(), "met": not row.failures} for row in rows]
    results["seconds"] = time.perf_counter() - began
    report(results)
    write_json(arguments.json, results)
    return int(not all(row["met"] for row in results["rows"]))


def run_tasks(names: Sequence[str], where: Path, data: TinyData, size: Size) -> list[Row]:
    """All rows of these names, in order: first what leaves a core free, two at a time, then what needs both."""
    tasks = [(f"{name}-{number}", task) for name in names for number, task in enumerate(ROWS[name])]

    def run(name: str, task: Task) -> list[Row]:
        start = time.perf_counter()
        (where / name).mkdir()
        try:
            rows = task.make(where / name, data, size)
        except Died as error:  # the others are still of interest
            rows = [Row(name, 0, [str(error)], "did not end as it should")]
        say(f"{name}: {time.perf_counter() - start:.0f} s")
        return rows

    with ThreadPoolExecutor(2) as pool:
        beside = {name: pool.submit(run, name, task) for name, task in tasks if not task.alone}
        found = {name: rows.result() for name, rows in beside.items()}
    found |= {name: run(name, task) for name, task in tasks if task.alone}
    return [row for name, _ in tasks for row in found[name]]


def report(results: dict[str, Any]) -> None:
    """Print the table, and below it what was not as promised."""
    table = Table(title=f"faults, {results['seconds'] / 60:.1f} minutes")
    for column in ("fault", "tries", "what happened", "gate"):
        table.add_column(column, justify="right" if column == "tries" else "left")
    for row in results["rows"]:
        table.add_row(row["fault"], str(row["tries"]), row["what"], "met" if row["met"] else "NOT MET")
    console = Console(highlight=False, markup=False)
    console.print(table)
    for row in results["rows"]:
        for failure in row["failures"]:
            console.print(f"{row['fault']}: {failure}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
