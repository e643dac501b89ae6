"""Reads documents from files, by suffix: JSON lines, Parquet, plain text; .gz and .zst are unpacked as they are read.

Memory does not grow with a file: a line, a batch of rows or a document is held at a time.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import IO, Any, NamedTuple

from titanling.config.schema import Prepare
from titanling.data.prepare.text import TextFile
from titanling.data.unpack import Unreadable, open_parquet, open_unpacked, utf8_bytes
from titanling.errors import UserError

LINES = (".jsonl", ".ndjson")
PARQUET = ".parquet"
PACKED = (".gz", ".zst")
ROWS = 256


@dataclass(frozen=True)
class Reading:
    """How documents are read, whatever the format."""

    text_field: str = "text"
    """JSON lines, Parquet: the key or column that holds the text."""
    id_field: str | None = None
    """JSON lines, Parquet: the key or column that names the document. A plain text's name is its path."""
    max_document_bytes: int = 100_000_000
    """A document above this, in UTF-8, is a bad one."""
    skip_bad: bool = False
    """Count bad documents and leave them out, instead of refusing them."""


def reading_of(settings: Prepare) -> Reading:
    """How a config has documents read."""
    return Reading(settings.text_field, settings.id_field, settings.max_document_bytes, settings.skip_bad)


class Document(NamedTuple):
    """What is read."""

    text: str
    id: str
    """JSON of its name, a string or a whole number; empty if names are not read."""


class Span(NamedTuple):
    """A part of a file: the lines that begin in a range of bytes, some row groups, or (0, -1), the whole file."""

    file: TextFile
    start: int = 0
    end: int = -1


def kind(path: str) -> str:
    """What a file holds, by its suffix: "lines", "parquet" or "text", which is one document."""
    name, packed = os.path.splitext(path.lower())
    if packed == PARQUET:
        return "parquet"
    inner = os.path.splitext(name)[1] if packed in PACKED else packed
    return "lines" if inner in LINES or (inner == ".json" and packed in PACKED) else "text"


def is_packed(path: str) -> bool:
    """Whether a file is unpacked as it is read, from its beginning on."""
    return path.lower().endswith(PACKED)


def read_texts(span: Span, reading: Reading, counts: Counter[str]) -> Iterator[str]:
    """The texts of `read_documents`."""
    return (document.text for document in read_documents(span, reading, counts))


def read_documents(span: Span, reading: Reading, counts: Counter[str]) -> Iterator[Document]:
    """The documents of a span in order, none of them empty.

    Counts "documents" (those it yields), "bytes" (theirs, in UTF-8), "empty" and "bad" (only with `skip_bad`).
    Raises `UserError` for what cannot be read: the file, where in it, why.
    """
    reader = {"lines": _read_lines, "parquet": _read_parquet, "text": _read_text}[kind(span.file.path)]
    documents = reader(span, reading)
    while True:
        try:
            document = next(documents, None)
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


# A reader yields what is wrong with one document, and goes on; it raises what is wrong with the file, and ends.


def _read_lines(span: Span, reading: Reading) -> Iterator[Any]:
    path = span.file.path
    # JSON may need six bytes for one of the text (\u0001); further fields are of no such size.
    limit = 6 * reading.max_document_bytes + (1 << 20)
    with open_unpacked(path) as file:
        number, place = 0, span.start
        if place:
            # The line that holds the byte in front of the span belongs to the span before.
            file.seek(place - 1)
            place += _line(file, limit)[1] - 1
        while span.end < 0 or place < span.end:
            line, length = _line(file, limit)
            if not length:
                return
            place += length
            number += 1
            try:
                if length > limit:
                    raise Unreadable(f"a line of {length:,} bytes; {_longer(reading)}")
                document = _of_line(line, reading)
            except Unreadable as bad:
                # What is left out is not shown: it need not be looked for in what comes before the span.
                at = number + (0 if _lenient(span, reading) else _lines_before(path, span.start))
                yield Unreadable(f"{path}:{at}: {bad}")
                continue
            if document is not None:
                yield document


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
    try:
        row = json.loads(line.decode()) if line.strip() else None
    except UnicodeDecodeError as error:
        raise Unreadable(f"not UTF-8 at byte {error.start} of the line; convert it (iconv -t utf-8)") from None
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"not JSON ({' '.join(str(error).split())}); correct the line") from None
    if row is None and not line.strip():
        return None
    if not isinstance(row, dict):
        raise Unreadable("no JSON object; each line must be one, with the text under a key")
    for field, key in _fields(reading):
        if field not in row:
            keys = ", ".join(map(str, list(row)[:8])) or "no keys"
            raise Unreadable(f'no "{field}" (it has {keys}); {_correct(key)}')
    return _checked(row[reading.text_field], row.get(reading.id_field), reading)


def _fields(reading: Reading) -> list[tuple[str, str]]:
    """Fields that a row must have, each with the setting that says so."""
    named = [] if reading.id_field is None else [(reading.id_field, "id_field")]
    return [(reading.text_field, "text_field"), *named]


def _correct(key: str) -> str:
    return f"correct data.prepare.{key} (--{key.replace('_', '-')})"


def _read_parquet(span: Span, reading: Reading) -> Iterator[Any]:
    path = span.file.path
    with open_parquet(path) as file:
        names = file.schema_arrow.names
        for field, key in _fields(reading):
            if field not in names:
                has = ", ".join(names[:8]) or "no columns"
                raise Unreadable(f'{path}: no column "{field}" (it has {has}); {_correct(key)}')
        columns = [field for field, _ in _fields(reading)]
        groups = range(span.start, span.end if span.end >= 0 else file.metadata.num_row_groups)
        row = sum(file.metadata.row_group(index).num_rows for index in range(span.start))
        for batch in file.iter_batches(ROWS, row_groups=list(groups), columns=columns):
            texts = batch.column(reading.text_field)
            ids = batch.column(reading.id_field) if reading.id_field is not None else repeat(None, len(texts))
            for text, its in zip(texts, ids, strict=True):
                row += 1
                try:
                    yield _checked(_python(text), None if its is None else _python(its), reading)
                except Unreadable as bad:
                    yield Unreadable(f"{path}: row {row}: {bad}")


def _python(value: Any) -> Any:
    """A value of Arrow, which does not look whether its strings are UTF-8."""
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise Unreadable(f"not UTF-8 at byte {error.start}; write the file again") from None


def _read_text(span: Span, reading: Reading) -> Iterator[Any]:
    path = span.file.path
    with open_unpacked(path) as file:
        raw = file.read(reading.max_document_bytes + 1)
    if len(raw) > reading.max_document_bytes:
        raise Unreadable(f"{path}: more than {reading.max_document_bytes:,} bytes in a document; {_longer(reading)}")
    try:
        yield Document(raw.decode(), _id(path, reading))
    except UnicodeDecodeError as error:
        raise Unreadable(
            f"{path}: not UTF-8 at byte {error.start}; convert it (iconv -t utf-8), leave it out of data.prepare.text"
        ) from None


def _checked(value: Any, id: Any, reading: Reading) -> Document:
    """A document whose text is one, can be written as UTF-8, and is not too long."""
    if not isinstance(value, str):
        found = "null" if value is None else type(value).__name__
        raise Unreadable(f'"{reading.text_field}" is {found}, not a string; correct it')
    size = utf8_bytes(value)
    if size > reading.max_document_bytes:
        raise Unreadable(f"a document of {size:,} bytes; {_longer(reading)}")
    return Document(value, _id(id, reading))


def _id(value: Any, reading: Reading) -> str:
    """What `Document.id` is for a name."""
    if reading.id_field is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | str):
        found = "null" if value is None else type(value).__name__
        raise Unreadable(f'"{reading.id_field}" is {found}, not a string or a whole number; correct it')
    utf8_bytes(str(value))
    return json.dumps(value, ensure_ascii=False)


def _longer(reading: Reading) -> str:
    return f"above data.prepare.max_document_bytes = {reading.max_document_bytes:,}: split it, or raise that"
