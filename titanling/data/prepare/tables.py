"""The rows of tables: Parquet, Arrow, CSV."""

import csv
import io
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from titanling.data.formats import separator_of
from titanling.data.prepare.reading import Document, Reading, Span, document_of
from titanling.data.unpack import Unreadable, convert, open_arrow, open_parquet, open_unpacked

ROWS = 256

# Each function yields (number of the row in the file, from 0; the row), from row `first` on.


def parquet_rows(span: Span, reading: Reading, first: int) -> Iterator[tuple[int, Any]]:
    """The rows of some row groups: values of Arrow by their column. Raises Unreadable."""
    path = span.file.path
    with open_parquet(path) as file:
        columns = _columns(path, file.schema_arrow.names, reading)
        groups = range(span.start, span.end if span.end >= 0 else file.metadata.num_row_groups)
        begin = 0
        for group in range(groups.stop):
            rows = file.metadata.row_group(group).num_rows
            if group >= groups.start and begin + rows > first:
                row = begin
                for batch in file.iter_batches(
                    ROWS, row_groups=[group], columns=[field for field, _ in reading.fields]
                ):
                    yield from _of_batch(batch, columns, row, first)
                    row += len(batch)
            begin += rows


def arrow_rows(span: Span, reading: Reading, first: int) -> Iterator[tuple[int, Any]]:
    """The rows of an Arrow file, as those of Parquet. Raises Unreadable."""
    path, row = span.file.path, 0
    with open_arrow(path) as (schema, batches):
        columns = _columns(path, schema.names, reading)
        for batch in batches:
            if row + len(batch) > first:
                yield from _of_batch(batch, columns, row, first)
            row += len(batch)


def _columns(path: str, names: Sequence[str], reading: Reading) -> list[str]:
    """The columns that hold the fields. Raises Unreadable if one is missing, or there are two of its name."""
    columns = []
    for field, key in reading.fields:
        column = field if field in names else field.partition(".")[0]
        if column not in names:
            has = ", ".join(name[:30] for name in names[:8]) or "no columns"
            raise Unreadable(f'{path}: no column "{field}" (it has {has}); correct {reading.setting(key)}')
        if names.count(column) > 1:
            raise Unreadable(
                f'{path}: {names.count(column)} columns are named "{column}"; write it again with one of that name'
            )
        columns.append(column)
    return columns


def _of_batch(batch: Any, columns: list[str], row: int, first: int) -> Iterator[tuple[int, Any]]:
    skipped = max(0, first - row)
    values = [batch.column(column).slice(skipped) for column in columns]
    for number, cells in enumerate(zip(*values, strict=True), row + skipped):
        yield number, dict(zip(columns, cells, strict=True))


def of_arrow(row: dict[str, Any], reading: Reading) -> Document:
    """The document of a row of Arrow's values. Raises Unreadable."""
    return document_of({column: _python(value) for column, value in row.items()}, reading)


def _python(value: Any) -> Any:
    """A value of Arrow, which does not look whether its strings are UTF-8."""
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise Unreadable(f"not UTF-8 at byte {error.start}; write the file again") from None


def csv_rows(span: Span, reading: Reading, first: int) -> Iterator[tuple[int, Any]]:
    """The rows of a CSV file below its header: cells by their column, or what is wrong with one. Raises Unreadable."""
    path, number = span.file.path, -1
    csv.field_size_limit(reading.longest_line)  # of the whole process, but nothing else sets it
    with open_unpacked(path) as file:
        try:
            lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
            header = lines.readline()
            separator = separator_of(header, reading.text_field)
            table = csv.reader(chain([header], lines), delimiter=separator, strict=True)
            names = next(table, [])
            if not names:
                return
            _columns(path, names, reading)
            for cells in table:
                if not cells:
                    continue
                number += 1
                if number < first:
                    continue
                if len(cells) == len(names):
                    yield number, dict(zip(names, cells, strict=True))
                else:
                    words = f"{len(cells)} cells, and the header has {len(names)}"
                    yield number, Unreadable(f"{words}; correct the row, or put quotes around its text")
        except UnicodeDecodeError as error:
            raise Unreadable(
                f"{path}: not UTF-8 behind row {number + 1} (byte 0x{error.object[error.start]:02x}); if it is Latin-1,"
                f" convert it ({convert(path, 'latin1')})"
            ) from None
        except csv.Error as error:
            raise Unreadable(f"{path}: behind row {number + 1}: no CSV ({error}); correct its quotes") from None
