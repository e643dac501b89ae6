"""Reads documents from files of every format that `data.formats` recognises; packed ones are unpacked on the way.

Memory does not grow with a file: a line, a batch of rows or a document is held at a time.
"""

import codecs
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

from titanling.data.formats import Format, recognise
from titanling.data.prepare.reading import Document, Reading, Span, document_of, id_of, reading_of
from titanling.data.prepare.tables import arrow_rows, csv_rows, of_arrow, parquet_rows
from titanling.data.prepare.text import TextFile
from titanling.data.prepare.values import json_values
from titanling.data.unpack import Unreadable, convert, open_parquet, open_unpacked
from titanling.errors import UserError

__all__ = [
    "Document",
    "Reading",
    "Span",
    "format_of",
    "read_documents",
    "read_rows",
    "read_texts",
    "reading_of",
    "row_groups",
    "too_long",
]
BLOCK = 1 << 20
BOM = codecs.BOM_UTF8


def format_of(file: TextFile, reading: Reading) -> Format:
    """What a file holds. Raises Unreadable, OSError."""
    # The standard library is code, whatever it looks like.
    wanted = "text" if file.lenient else reading.format
    separator = None if reading.document_separator else reading.setting("document_separator")
    return recognise(file.path, wanted, reading.text_field, reading.setting("format"), separator)


def read_texts(span: Span, reading: Reading, counts: Counter[str]) -> Iterator[str]:
    """The texts of `read_documents`."""
    return (document.text for document in read_documents(span, reading, counts))


def read_documents(span: Span, reading: Reading, counts: Counter[str]) -> Iterator[Document]:
    """The documents of a span in order, none of them empty.

    Counts "documents" (those it yields), "bytes" (theirs, in UTF-8), "empty" and "bad" (only with `skip_bad`).
    Raises `UserError` for what cannot be read: the file, where in it, why.
    """
    rows = read_rows(span, reading)
    while True:
        try:
            _, document = next(rows, (0, None))
            if isinstance(document, Unreadable):
                raise document
        except Unreadable as bad:
            if not _lenient(span, reading):
                raise UserError(f"{bad}, or set data.prepare.skip_bad (--skip-bad) to leave such out") from None
            counts["bad"] += 1
            continue
        if document is None:
            return
        if not document.text:
            counts["empty"] += 1
            continue
        counts["documents"] += 1
        counts["bytes"] += len(document.text.encode())
        yield document


def read_rows(
    span: Span, reading: Reading, first: int = 0, part: int = 0, parts: int = 1
) -> Iterator[tuple[int, Document | Unreadable]]:
    """(row, document) of each row of a span from `first` on whose number leaves the rest `part`, divided by `parts`.

    Blank lines have numbers and no document. What is wrong with one document stands in its place; what is wrong with
    the file is raised as Unreadable, and ends it.
    """
    kind = format_of(span.file, reading).kind
    of_kind = _KINDS[kind]
    for number, raw in of_kind.rows(span, reading, first):
        if number % parts != part:
            continue
        try:
            if isinstance(raw, Unreadable):
                raise raw
            document = of_kind.document(raw, reading)
        except Unreadable as bad:
            yield number, Unreadable(f"{of_kind.place(span, reading, number)}: {bad}")
            continue
        if document is not None:
            yield number, document


def _lenient(span: Span, reading: Reading) -> bool:
    """Whether what is bad is left out."""
    return reading.skip_bad or span.file.lenient


def row_groups(path: str) -> list[tuple[int, int]]:
    """(rows, bytes when unpacked) of each row group of a Parquet file. Raises `UserError`."""
    try:
        with open_parquet(path) as file:
            groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
            return [(group.num_rows, group.total_byte_size) for group in groups]
    except Unreadable as bad:
        raise UserError(str(bad)) from None


def _lines(span: Span, reading: Reading, first: int) -> Iterator[tuple[int, Any]]:
    """(number of the line in the span, the line), or what is wrong with one."""
    limit = reading.longest_line
    with open_unpacked(span.file.path) as file:
        number, place = 0, span.start
        if place:
            # The line that holds the byte in front of the span belongs to the span before.
            file.seek(place - 1)
            place += _line(file, limit)[1] - 1
        while span.end < 0 or place < span.end:
            line, length = _line(file, limit)
            if not length:
                return
            if place == 0:
                line = line.removeprefix(BOM)
            place += length
            if number >= first:
                too_long = length > limit
                yield number, Unreadable(f"a line of {length:,} bytes; {reading.longer}") if too_long else line
            number += 1


def _line(file: IO[bytes], limit: int) -> tuple[bytes, int]:
    """The next line and its length; of a line longer than `limit` only the beginning is kept."""
    line = file.readline(limit + 1)
    length = len(line)
    if length > limit:
        rest = line
        while rest and not rest.endswith(b"\n"):
            rest = file.readline(1 << 20)
            length += len(rest)
    return line, length


def _place_of_line(span: Span, reading: Reading, number: int) -> str:
    # What is left out is not shown: it need not be looked for in what comes before the span.
    before = 0 if _lenient(span, reading) else _lines_before(span.file.path, span.start)
    return f"{span.file.path}:{number + 1 + before}"


def _lines_before(path: str, start: int) -> int:
    """Lines in front of the first one that begins at or behind a byte of an unpacked file."""
    lines = int(start > 0)
    with open(path, "rb") as file:
        left = start - 1
        while left > 0:
            block = file.read(min(1 << 22, left))
            lines += block.count(b"\n")
            left -= len(block)
    return lines


def _of_line(line: bytes, reading: Reading) -> Document | None:
    """The document of a line of JSON, None if the line is blank."""
    if not line.strip():
        return None
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise Unreadable(f"not UTF-8 at byte {error.start} of the line; convert it (iconv -t utf-8)") from None
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"not JSON ({' '.join(str(error).split())}); correct the line") from None
    return document_of(row, reading)


def _texts(span: Span, reading: Reading, first: int) -> Iterator[tuple[int, Any]]:
    """(number, (name, bytes)) of the file as a document, or of what separators divide it into."""
    path = span.file.path
    if _is_whole(span, reading):
        with open_unpacked(path) as file:
            if not first:
                yield 0, (path, file.read(reading.max_document_bytes + 1))
        return
    for number, raw in enumerate(_separated(path, reading)):
        if number >= first:
            yield number, (f"{path}:{number + 1}", raw)


def _is_whole(span: Span, reading: Reading) -> bool:
    return reading.document_separator is None or span.file.lenient


def _separated(path: str, reading: Reading) -> Iterator[bytes]:
    """The parts of a text between separators, without the line breaks at their ends. Behind the last, if not empty."""
    assert reading.document_separator is not None
    separator = reading.document_separator.encode()
    sought, mark = re.compile(re.escape(separator).replace(b"\\\n", b"\r?\n")), 2 * len(separator)
    with open_unpacked(path) as file:
        begun = b""
        while block := file.read(BLOCK):
            # Of what is begun only the end is searched again, where a separator may have begun.
            cut = max(0, len(begun) - mark)
            begun, held, place = begun[:cut], begun[cut:] + block, 0
            for found in sought.finditer(held):
                yield (begun + held[place : found.start()]).strip(b"\r\n")
                begun, place = b"", found.end()
            begun += held[place:]
            if len(begun) > reading.max_document_bytes + mark:
                raise Unreadable(f"{path}: {too_long(reading)}")
        if last := begun.strip(b"\r\n"):
            yield last


def too_long(reading: Reading) -> str:
    """What is wrong with a plain text that is too long for a document."""
    return (
        f"more than {reading.max_document_bytes:,} bytes in a document; {reading.longer}, or say what stands between"
        f" documents by {reading.setting('document_separator')}"
    )


def _of_text(named: tuple[str, bytes], reading: Reading) -> Document:
    """A document of plain text, without its byte-order mark. Raises Unreadable."""
    name, raw = named
    if len(raw) > reading.max_document_bytes:
        raise Unreadable(too_long(reading))
    if b"\0" in raw and reading.format == "auto":
        raise Unreadable(
            f"is binary (a zero byte at {raw.index(0)}); leave it out, or set {reading.setting('format')} ="
            ' "text" to take it as it is'
        )
    raw = raw.removeprefix(BOM)
    try:
        return Document(raw.decode(), id_of(name, reading))
    except UnicodeDecodeError as error:
        command = convert(name if os.path.exists(name) else name.rpartition(":")[0], "latin1")
        raise Unreadable(
            f"not UTF-8 at byte {error.start}; if it is Latin-1, convert it ({command}), or leave it out of the text"
        ) from None


def _place_of_text(span: Span, reading: Reading, number: int) -> str:
    return span.file.path if _is_whole(span, reading) else f"{span.file.path}: document {number + 1}"


class _Kind(NamedTuple):
    """How one format is read."""

    rows: Callable[[Span, Reading, int], Iterator[tuple[int, Any]]]
    """(number, row) of a span, from a row on; instead of a row, Unreadable. Raises Unreadable for the file."""
    document: Callable[[Any, Reading], Document | None]
    """The document of a row, None if it is blank. Raises Unreadable."""
    place: Callable[[Span, Reading, int], str]
    """What messages call a row."""


def _place_of_row(span: Span, reading: Reading, number: int) -> str:
    return f"{span.file.path}: row {number + 1}"


_KINDS = {
    "text": _Kind(_texts, _of_text, _place_of_text),
    "jsonl": _Kind(_lines, _of_line, _place_of_line),
    "json": _Kind(json_values, document_of, _place_of_row),
    "csv": _Kind(csv_rows, document_of, _place_of_row),
    "parquet": _Kind(parquet_rows, of_arrow, _place_of_row),
    "arrow": _Kind(arrow_rows, of_arrow, _place_of_row),
}
