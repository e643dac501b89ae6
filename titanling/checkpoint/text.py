"""What scripts/checkpoint.py prints: plain text in columns, the same on a terminal and in a file. Imports no torch."""

import time
from collections.abc import Sequence
from pathlib import Path

from titanling.checkpoint.inventory import LEFTOVERS, Entry, Pruned, Verdict


def stock_text(root: Path, entries: Sequence[Entry]) -> str:
    """`list`: one line a checkpoint."""
    if not entries:
        return f"{root}: no checkpoints yet"
    whole = [entry for entry in entries if entry.state == "whole"]
    head = f"{root}: {counted(len(whole), 'whole checkpoint')}, {size(sum(entry.bytes for entry in entries))} in all"
    rows = [("name", "saved", "size", "ranks", "holds", "state")]
    for entry in entries:
        is_checkpoint = entry.state in ("whole", "damaged")
        rows.append(
            (
                entry.path.name,
                moment(entry.saved),
                size(entry.bytes),
                str(entry.ranks or "-"),
                ("weights" if entry.weights_only else "weights, optimizer") if is_checkpoint and entry.ranks else "-",
                _state(entry),
            )
        )
    return "\n".join([head, *columns(rows, right=(2, 3))])


def verdicts_text(verdicts: Sequence[Verdict]) -> str:
    """`verify`: one line a good checkpoint, one a bad file."""
    lines = []
    for verdict in verdicts:
        what = f"{counted(verdict.files, 'file')}, {size(verdict.bytes)}"
        lines.append(f"{verdict.path}: {'DAMAGED' if verdict.bad else 'good'} ({what})")
        lines += [f"  {problem}" for problem in verdict.bad]
    return "\n".join(lines)


def pruned_text(pruned: Pruned, really: bool) -> str:
    """`prune`: what goes, what stays and why."""
    lines = [(step, f"kept: {why}") for step, why in pruned.kept]
    lines += [(step, "deleted" if really else "would be deleted") for step in pruned.deleted]
    rows = [(f"step {step}", what) for step, what in sorted(lines)]
    verb = "deleted" if really else "would delete"
    return "\n".join([*columns(rows), f"{verb} {counted(len(pruned.deleted), 'checkpoint')}, {size(pruned.bytes)}"])


def columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Aligned lines; the columns of `right` end, instead of beginning, at the same place."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def counted(number: int, noun: str) -> str:
    """A number of things: "1 file", "2 files"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size(count: int) -> str:
    """Bytes in words."""
    value, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{count:,} bytes" if unit == "bytes" else f"{value:.1f} {unit}"


def moment(seconds: float | None) -> str:
    """A time in local words."""
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _state(entry: Entry) -> str:
    if entry.state == "whole":
        marks = (", best by validation" if entry.best else "", ", last before the decay" if entry.trunk_end else "")
        return "whole" + "".join(marks)
    if entry.problem is not None:
        return "DAMAGED: " + entry.problem.removeprefix(f"{entry.path}/")
    return LEFTOVERS.get(entry.state, f"renamed to {entry.state}: not a part of the run")
