"""Cuts the input into pieces: each is read by one worker and becomes one part of the output."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from titanling.data.prepare.outputs import Outputs
from titanling.data.prepare.readers import Reading, Span, format_of, row_groups, too_long
from titanling.data.prepare.text import TextFile
from titanling.data.unpack import Unreadable
from titanling.errors import UserError

# Enough for a worker to start for, little enough to be made again when a run is killed.
PIECE_BYTES = 1 << 26
LOOKS = 1000


class Piece(NamedTuple):
    """Consecutive spans of one source."""

    source: str
    name: str | None
    """NAME of NAME=PATH."""
    spans: tuple[Span, ...]
    bytes: int
    """As stored; of Parquet, as unpacked."""

    @property
    def identity(self) -> str:
        """Changes when what the piece holds may have: path, size, time of change, and what of each file it is."""
        stats = [(span.file.path, os.stat(span.file.path), span.start, span.end) for span in self.spans]
        return repr((self.name, [(path, stat.st_size, stat.st_mtime_ns, *ends) for path, stat, *ends in stats]))


def cut_into_pieces(files: Sequence[TextFile], reading: Reading) -> list[Piece]:
    """Pieces of about PIECE_BYTES, in the order of the files; a function of the input alone.

    Lines that are not packed and Parquet are cut; any other file is whole in a piece, perhaps with its neighbours.
    Raises `UserError` for a file that is not read, or is damaged where that can be seen, unless `reading.skip_bad`.
    """
    pieces: list[Piece] = []
    spans: list[Span] = []
    size = 0
    for span, its in ((span, its) for file in files for span, its in _cut(file, reading)):
        if spans and (size >= PIECE_BYTES or span.file.source != spans[0].file.source):
            pieces.append(_piece(spans, size))
            spans, size = [], 0
        spans.append(span)
        size += its
    return [*pieces, _piece(spans, size)]


def describe(files: Sequence[TextFile], reading: Reading, outputs: Outputs) -> list[str]:
    """Lines that say what the text is, as far as its first files show, and what was left out of it."""
    found: Counter[str] = Counter()
    for file in files[:LOOKS]:
        try:
            found[str(format_of(file, reading))] += 1
        except Unreadable:
            found["unreadable, left out"] += 1
    more = f" (of the first {LOOKS:,})" if len(files) > LOOKS else ""
    lines = [f"text: {', '.join(f'{count:,} × {what}' for what, count in found.most_common())}{more}"]
    left = list(dict.fromkeys(outputs.met))
    if left:
        lines.append(f"text: left out {len(left):,} files and folders that titanling has written, as {left[0]}")
    return lines


def _piece(spans: list[Span], size: int) -> Piece:
    return Piece(spans[0].file.source, spans[0].file.name, tuple(spans), size)


def _cut(file: TextFile, reading: Reading) -> Iterator[tuple[Span, int]]:
    try:
        what = format_of(file, reading)
    except Unreadable as bad:
        if not (reading.skip_bad or file.lenient):
            raise UserError(f"{bad}, or set data.prepare.skip_bad (--skip-bad) to leave such out") from None
        yield Span(file), file.bytes  # whoever reads it will count it as bad
        return
    if what.kind == "parquet":
        yield from _cut_parquet(file, reading)
    elif what == ("jsonl", None):
        for start in range(0, max(1, file.bytes), PIECE_BYTES):
            end = min(start + PIECE_BYTES, file.bytes)
            yield Span(file, start, end), end - start
    else:
        if what == ("text", None) and file.bytes > reading.max_document_bytes and not reading.document_separator:
            _refuse_long(file, reading)
        yield Span(file), file.bytes


def _refuse_long(file: TextFile, reading: Reading) -> None:
    """Said before hours of other files, though whoever reads it would say it too."""
    if not (reading.skip_bad or file.lenient):
        raise UserError(f"{file.path}: {too_long(reading)}")


def _cut_parquet(file: TextFile, reading: Reading) -> Iterator[tuple[Span, int]]:
    try:
        groups = row_groups(file.path)
    except UserError:
        if not reading.skip_bad:
            raise
        yield Span(file), file.bytes  # whoever reads it will count it as bad
        return
    if not groups:
        yield Span(file), 0
    start = size = 0
    for index, (_, its) in enumerate(groups):
        size += its
        if size >= PIECE_BYTES or index == len(groups) - 1:
            yield Span(file, start, index + 1), size
            start, size = index + 1, 0
