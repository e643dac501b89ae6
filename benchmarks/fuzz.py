"""Fuzzing: odd inputs of every kind to the commands that read them, for as long as is asked.

A command may refuse an input in one line with exit code 2. A traceback, another exit code, a hang, gigabytes of
memory, or a file opened outside of its folder is a fault: the input is kept, and a command to repeat it is printed.
Exit code 1 if there was one.
"""

import sys
from os.path import dirname, realpath

sys.path.insert(0, dirname(dirname(realpath(__file__))))
from titanling import environment

environment.require(even_for_help=True)

import argparse
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

# Before anything starts threads: each input has a process of its own, a copy of this one.
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

from harness import ROOT, say

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/fuzz")]

import jail
import targets
from targets import TARGETS

import titanling.checkpoint.export
import titanling.checkpoint.import_model
import titanling.trainer  # noqa: F401  # all of it, once, for every input

EXAMPLE = (
    "example: python benchmarks/fuzz.py 600; repeat one: python benchmarks/fuzz.py --again outputs/fuzz/state-7-12"
)
KEPT = 3
"""Inputs that are kept of those with the same fault."""


def main() -> int:
    """Arguments → inputs → faults."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("seconds", nargs="?", type=float, default=600, help="how long (default: 600)")
    parser.add_argument("--seed", type=int, default=None, help="inputs follow from it (default: another each time)")
    parser.add_argument("--inputs", type=int, default=None, metavar="N", help="so many of each target at most")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="these only")
    parser.add_argument("--keep", type=Path, default=Path("outputs/fuzz"), metavar="FOLDER", help="for what is found")
    parser.add_argument("--verbose", action="store_true", help="print every input's end")
    parser.add_argument("--again", type=Path, metavar="FOLDER", help="repeat an input that was kept")
    arguments = parser.parse_args()
    if arguments.again is not None:
        return repeat(arguments.again)
    seed = int.from_bytes(os.urandom(4), "little") if arguments.seed is None else arguments.seed
    say(f"seed {seed}")
    with tempfile.TemporaryDirectory(prefix="titanling-fuzz-") as temporary:
        work = Path(temporary)
        targets.make_base(work / "base")
        return fuzz(arguments, seed, work)


def fuzz(arguments: argparse.Namespace, seed: int, work: Path) -> int:
    """One input of each target after the other, until time or inputs have run out."""
    began, counts, refused, found = time.monotonic(), Counter(), Counter(), Counter()
    number = 0
    while arguments.inputs is None or number < arguments.inputs:
        for name in arguments.targets:
            if time.monotonic() - began > arguments.seconds:
                return report(counts, refused, found)
            target, random = TARGETS[name], Random(f"{seed} {name} {number}")
            folder = work / "input/files"
            targets.copy_base(work / "base", target, folder)
            target.change(folder, random)
            command = targets.command_of(target, random)
            kept = shutil.copytree(folder, work / "before/files", symlinks=True) if _plain(folder) else None
            result = jail.run(command, folder, target.codes, target.confined)
            counts[name] += 1
            refused[name] += result.code == 2
            if arguments.verbose:
                say(f"{name} {number}: {result.code} {' '.join(command)[:150]}: {result.output.strip()[-300:]}")
            if result.faults:
                keep(arguments.keep, f"{name}-{seed}-{number}", name, command, result, kept, found)
            for used in ("input", "before"):
                shutil.rmtree(work / used, ignore_errors=True)
        number += 1
    return report(counts, refused, found)


def _plain(folder: Path) -> bool:
    """Whether it can be copied: a pipe would keep its reader waiting."""
    return not any(path.is_fifo() for path in folder.rglob("*"))


def keep(
    where: Path, name: str, target: str, command: list[str], result: jail.Result, files: Path | None, found: Counter
) -> None:
    """Note a fault; of the first few of a kind, the files too."""
    kind = f"{target}: {result.faults[0]}"
    found[kind] += 1
    if found[kind] > KEPT:
        return
    folder = where / name.replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    if files is not None:
        shutil.copytree(files, folder / "files", symlinks=True, dirs_exist_ok=True)
    note = {"target": target, "command": command, "faults": result.faults, "output": result.output[-20000:]}
    (folder / "input.json").write_text(json.dumps(note, indent=1) + "\n")
    say(f"{kind}\n  python benchmarks/fuzz.py --again {folder}")


def repeat(folder: Path) -> int:
    """Run a kept input once more, on a copy; what happened."""
    note = json.loads((folder / "input.json").read_text())
    target = TARGETS[note["target"]]
    with tempfile.TemporaryDirectory(prefix="titanling-fuzz-") as temporary:
        files = Path(temporary, "input/files")
        shutil.copytree(folder / "files", files, symlinks=True)
        (files.parent / "outside.txt").write_text("not yours\n")
        result = jail.run(note["command"], files, target.codes, target.confined)
    print(result.output)
    print(*(result.faults or [f"no fault: exit code {result.code}"]), sep="\n")
    return int(bool(result.faults))


def report(counts: Counter, refused: Counter, found: Counter) -> int:
    """Print what was tried; the exit code."""
    for name, count in counts.items():
        print(f"{name}: {count:,} inputs, {refused[name]:,} refused")
    for kind, count in found.most_common():
        print(f"{count:,} × {kind}")
    print(f"{counts.total():,} inputs, {found.total():,} faults")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
