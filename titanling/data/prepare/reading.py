"""How documents are read, whatever the format, and what is common to the readers of all formats."""

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

from titanling.config.schema import Prepare
from titanling.data.prepare.text import TextFile
from titanling.data.unpack import Unreadable, utf8_bytes


@dataclass(frozen=True)
class Reading:
    """How documents are read, whatever the format."""

    text_field: str = "text"
    """JSON, CSV, Parquet, Arrow: the key or column that holds the text."""
    id_field: str | None = None
    """JSON, CSV, Parquet, Arrow: the key or column that names the document. A plain text's name is its path."""
    max_document_bytes: int = 100_000_000
    """A document above this, in UTF-8, is a bad one."""
    skip_bad: bool = False
    """Count bad documents and leave them out, instead of refusing them."""
    format: str = "auto"
    """As `Prepare.format`."""
    document_separator: str | None = None
    """As `Prepare.document_separator`."""
    source: str | None = None
    """Name of the streamed source, for messages: its keys stand there, not in data.prepare."""

    def setting(self, key: str) -> str:
        """What messages call a setting."""
        if self.source is not None:
            return f'{key} of source "{self.source}"'
        return f"data.prepare.{key} (--{key.replace('_', '-')})"

    @property
    def longest_line(self) -> int:
        """Bytes of a document as it is stored, at most."""
        # JSON may need six bytes for one of the text (\u0001); further fields are of no such size.
        return 6 * self.max_document_bytes + (1 << 20)

    @property
    def fields(self) -> list[tuple[str, str]]:
        """Fields that a row must have, each with the setting that says so."""
        named = [] if self.id_field is None else [(self.id_field, "id_field")]
        return [(self.text_field, "text_field"), *named]

    @property
    def longer(self) -> str:
        """What is to be done about a document that is too long."""
        return f"above data.prepare.max_document_bytes = {self.max_document_bytes:,}: split it, or raise that"


def reading_of(settings: Prepare) -> Reading:
    """How a config has documents read."""
    return Reading(
        settings.text_field,
        settings.id_field,
        settings.max_document_bytes,
        settings.skip_bad,
        settings.format,
        settings.document_separator,
    )


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


def document_of(row: Any, reading: Reading) -> Document:
    """The document of an object or a row of a table. Raises Unreadable."""
    if not isinstance(row, dict):
        raise Unreadable("no JSON object; each document must be one, with the text under a key")
    values = [_value(row, field, reading.setting(key)) for field, key in reading.fields]
    return checked(values[0], values[-1], reading)


def _value(row: dict[str, Any], field: str, setting: str) -> Any:
    """What an object holds under a key, or, of a.b, under b in what it holds under a."""
    if field in row:
        return row[field]
    inner: Any = row
    for name in field.split("."):
        if not isinstance(inner, dict) or name not in inner:
            raise Unreadable(f'no "{field}" (it has {_keys(row)}); correct {setting}')
        inner = inner[name]
    return inner


def _keys(row: dict[str, Any]) -> str:
    """Where text might lie."""
    inner = [f"{key}.{name}" for key, value in row.items() if isinstance(value, dict) for name in list(value)[:3]]
    keys = [*list(row)[:8], *inner[:8]]
    return ", ".join(name if len(name) <= 30 else f"{name[:30]}…" for name in map(str, keys)) or "no keys"


def checked(value: Any, id: Any, reading: Reading) -> Document:
    """A document whose text is one, can be written as UTF-8, and is not too long. Raises Unreadable."""
    if not isinstance(value, str):
        found = "null" if value is None else type(value).__name__
        raise Unreadable(
            f'"{reading.text_field}" is {found}, not a string; correct it, or {reading.setting("text_field")}'
        )
    size = utf8_bytes(value)
    if size > reading.max_document_bytes:
        raise Unreadable(f"a document of {size:,} bytes; {reading.longer}")
    return Document(value, id_of(id, reading))


def id_of(value: Any, reading: Reading) -> str:
    """What `Document.id` is for a name. Raises Unreadable."""
    if reading.id_field is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | str):
        found = "null" if value is None else type(value).__name__
        raise Unreadable(f'"{reading.id_field}" is {found}, not a string or a whole number; correct it')
    utf8_bytes(str(value))
    return json.dumps(value, ensure_ascii=False)
