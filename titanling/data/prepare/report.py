"""The report of a preparation: documents, bytes and tokens of each source, before and behind each filter."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from titanling.data.prepare.counts import Counts
from titanling.data.prepare.parts import read_counts
from titanling.data.prepare.pipeline import Made
from titanling.errors import UserError
from titanling.files import write_whole

Report = dict[str, Any]


def report_of(made: Made, filters: Sequence[str], settings_hash: str) -> Report:
    """What the parts counted, added up for each source; `filters` are the names of the kinds, in order."""
    report: Report = {"settings": settings_hash, "filters": list(filters), "sources": {}, "seen": {}}
    for parts in made.parts:
        for piece, part in zip(made.pieces, parts, strict=True):
            _add(report["sources"].setdefault(piece.source, _empty(len(filters))), read_counts(part))
    for place, seen in made.seen.items():
        report["seen"][str(place)] = {"hashes": len(seen), "bytes": seen.bytes}
    return report


def merge_reports(reports: Iterable[Report]) -> Report:
    """The sum of reports with the same kinds of filters."""
    first, *others = reports
    for other in others:
        if other.get("settings") != first.get("settings"):
            first["settings"] = None
        for name, counts in other["sources"].items():
            _add(first["sources"].setdefault(name, _empty(len(first["filters"]))), counts)
        for place, seen in other["seen"].items():
            first["seen"][place] = dict(Counter(first["seen"].get(place, {})) + Counter(seen))
    return first


def write_report(prefix: str, report: Report) -> None:
    """Write `prefix`.report.json, atomically and durably."""
    write_whole(Path(f"{prefix}.report.json"), (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())


def check_unused_report(prefix: str) -> None:
    """Raise `UserError` if a file that is no report of ours has the report's name."""
    path = Path(f"{prefix}.report.json")
    if not os.path.lexists(path):
        return
    try:
        known = (
            path.is_file() and not path.is_symlink() and {"filters", "sources"} <= json.loads(path.read_bytes()).keys()
        )
    except (OSError, ValueError, AttributeError, RecursionError):
        known = False
    if not known:
        raise UserError(f"{path}: is no report of ours and would be overwritten; move it away or choose another prefix")


def read_report(prefix: str) -> Report:
    """The report of what was prepared as `prefix`."""
    return json.loads(Path(f"{prefix}.report.json").read_text(encoding="utf-8"))


def read_total(report: Report, key: str) -> int:
    """What all sources read: "documents", "bytes", "empty" or "bad"."""
    return sum(source["read"].get(key, 0) for source in report["sources"].values())


def written_total(report: Report) -> int:
    """Documents of all splits."""
    return sum(split["documents"] for source in report["sources"].values() for split in source["splits"].values())


def emptied(report: Report) -> str:
    """In words, what each filter left, where together they left nothing."""
    steps = [
        f"{kind} {sum(source['filters'][place]['documents_in'] for source in report['sources'].values()):,} →"
        f" {sum(source['filters'][place]['documents_out'] for source in report['sources'].values()):,}"
        for place, kind in enumerate(report["filters"])
    ]
    return (
        f"data.prepare.filters: leave none of {read_total(report, 'documents'):,} documents ({', '.join(steps)})"
        "; loosen them or give other text"
    )


def rows(report: Report) -> list[tuple[str, ...]]:
    """A table: for each source what was read, what each filter left, and what was written."""
    table = [("source", "step", "documents", "MB", "tokens")]
    for name, source in report["sources"].items():
        read = source["read"]
        table.append((name, "read", *_cells(read["documents"], read["bytes"]), ""))
        for kind, counts in zip(report["filters"], source["filters"], strict=True):
            table.append(("", kind, *_cells(counts["documents_out"], counts["bytes_out"]), ""))
        for why in ("empty", "bad"):
            if read[why]:
                table.append(("", f"{why}, left out", f"{read[why]:,}", "", ""))
        for split, counts in source["splits"].items():
            if counts["documents"]:
                table.append(("", split, *_cells(counts["documents"], counts["bytes"]), f"{counts['tokens']:,}"))
    return table


def memory_lines(report: Report) -> list[str]:
    """What each filter that knows all documents before has held in memory."""
    lines = []
    for place, seen in report["seen"].items():
        documents = sum(source["filters"][int(place)]["documents_in"] for source in report["sources"].values())
        lines.append(
            f"{report['filters'][int(place)]}: {seen['hashes']:,} hashes of {documents:,} documents remembered,"
            f" {seen['bytes'] / max(1, documents):.1f} MB per million documents"
        )
    return lines


def _cells(documents: int, size: int) -> tuple[str, str]:
    return f"{documents:,}", f"{size / 1e6:,.1f}"


def _empty(filters: int) -> Report:
    nothing = {"documents": 0, "bytes": 0, "tokens": 0}
    return {
        "read": {"documents": 0, "bytes": 0, "empty": 0, "bad": 0},
        "filters": [dict(vars(Counts())) for _ in range(filters)],
        "splits": {"training": dict(nothing), "validation": dict(nothing)},
    }


def _add(total: Report, counts: Mapping[str, Any]) -> None:
    """Add what a part counted, or a whole source."""
    _add_numbers(total["read"], counts["read"])
    filters = counts["filters"]
    for place, its in filters.items() if isinstance(filters, dict) else enumerate(filters):
        _add_numbers(total["filters"][int(place)], its)
    for split, its in counts["splits"].items():
        _add_numbers(total["splits"][split], its)


def _add_numbers(total: dict[str, int], more: Mapping[str, int]) -> None:
    for name, value in more.items():
        total[name] += value
