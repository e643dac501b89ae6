"""Cuts the input into pieces: each is read by one worker and becomes one part of the output."""

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from titanling.data.prepare.readers import Reading, Span, is_packed, kind, row_groups
from titanling.data.prepare.text import TextFile
from titanling.errors import UserError

# Enough for a worker to start for, little enough to be made again when a run is killed.
PIECE_BYTES = 1 << 26


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
    Raises `UserError` for a damaged Parquet file, unless `reading.skip_bad`.
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


def _piece(spans: list[Span], size: int) -> Piece:
    return Piece(spans[0].file.source, spans[0].file.name, tuple(spans), size)


def _cut(file: TextFile, reading: Reading) -> Iterator[tuple[Span, int]]:
    what = kind(file.path)
    if what == "parquet":
        yield from _cut_parquet(file, reading)
    elif what == "lines" and not is_packed(file.path):
        for start in range(0, max(1, file.bytes), PIECE_BYTES):
            end = min(start + PIECE_BYTES, file.bytes)
            yield Span(file, start, end), end - start
    else:
        yield Span(file), file.bytes


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
