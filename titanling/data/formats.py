"""Recognises what a file of text holds, by its content. Its suffix decides only what the content leaves open.

What would be nonsense as training text is refused with what mends it: archives, images, other encodings, mark-up, and
JSON or tables under a name that promises plain text. Everything that reads text asks here.
"""

import csv
import io
import json
import os
import re
import shlex
from itertools import islice
from typing import IO, NamedTuple, get_args

from titanling.config.schema import TextFormat
from titanling.data.unpack import PACKED, Unreadable, convert, open_unpacked, packing_of

HEAD = 1 << 16
"""Bytes that are looked at."""
WORDS = {
    "text": "plain text",
    "jsonl": "JSON lines",
    "json": "JSON, an array or objects over several lines",
    "csv": "a table, CSV",
    "parquet": "Parquet",
    "arrow": "Arrow",
}
"""What a format is called."""
_JSON = {".json", ".jsonl", ".ndjson", ".jsonlines"}
_TABLES = {".csv", ".tsv"}
_PLAIN = {"", ".txt", ".text", ".dat", ".data", ".tab"}
"""Suffixes behind which a table may hide."""

_STRING = r'"(?:[^"\\]|\\.)*"'
_OBJECT = re.compile(rf"\{{\s*{_STRING}\s*:", re.DOTALL)
_OBJECTS = re.compile(rf"\[\s*\{{\s*(?:{_STRING}\s*:|\}})", re.DOTALL)
_MARKUP = re.compile(r"<(\?xml|!doctype|html|svg|rss|mediawiki)\b", re.IGNORECASE)
_MARK = re.compile(rb"^(<\|(?:endoftext|end_of_text|im_end)\|>|</s>)\s*$", re.MULTILINE)
_NAME = re.compile(r"[^\W\d][\w.-]*")

_UNZIP = "python -m zipfile -e {path} {path}.d"
_UNTAR = "python -m tarfile -e {path} {path}.d"
_TO_PARQUET = "convert it to Parquet or JSON lines"
_LEAVE_OUT = "leave it out"
# First bytes → what it is and what mends it.
_OTHERS: list[tuple[bytes, str, str]] = [
    (rb"PK(?:\x03\x04|\x05\x06)", "a zip archive", "unpack it ({unzip}) and give the folder instead"),
    (rb"(?s:.{257})ustar", "a tar archive", "unpack it ({untar}) and give the folder instead"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it (7z x {path}) and give what comes out"),
    (rb"Rar!\x1a\x07", "a rar archive", "unpack it (unrar x {path}) and give what comes out"),
    (rb"\x04\x22\x4d\x18", "packed by lz4", "unpack it (lz4 -d {path})"),
    (rb"\x1f\x9d", "packed by compress", "unpack it (gzip -d {path})"),
    (rb"\x1f\x8b|\xfd7zXZ\x00|\x28\xb5\x2f\xfd|BZh[1-9]1AY&SY", "packed twice", "unpack it once"),
    (rb"%PDF-", "a PDF", "take its text out (pdftotext {path})"),
    (rb"%!PS", "PostScript", "take its text out (ps2ascii {path})"),
    (rb"\{\\rtf", "RTF", "convert it (pandoc -t plain {path})"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|(?s:RIFF....WEBP)|II\*\x00|MM\x00\*", "an image", _LEAVE_OUT),
    (rb"(?s:RIFF....WAVE)|ID3[\x02-\x04]|OggS\x00|fLaC\x00|\x00\x00\x00.ftyp", "sound or video", _LEAVE_OUT),
    (rb"Obj\x01|\x89HDF\r\n|SQLite format 3\x00", "a table or database that is not read", _TO_PARQUET),
    (rb"\n[\x05-\x40]\n[\x03-\x08]<(?:unk|pad|s)>", "a SentencePiece model: a tokenizer, no text", _LEAVE_OUT),
    (rb"MMIDIDX\x00|\x93NUMPY", "token files, no text", "name them by data.train, or leave them out"),
    (rb"(?s:.{6})\x00\x00\{\"|\x80[\x02-\x05]|\x7fELF", "weights or a program, no text", _LEAVE_OUT),
]
_KNOWN = [(re.compile(pattern), what, remedy) for pattern, what, remedy in _OTHERS]
_BOMS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}


class Format(NamedTuple):
    """How a file is read."""

    kind: str
    """A key of WORDS."""
    packing: str | None = None
    """As of `unpack.packing_of`."""

    def __str__(self) -> str:
        return WORDS[self.kind] + (f" ({self.packing})" if self.packing else "")


def recognise(
    path: str, wanted: str = "auto", field: str = "text", setting: str = "format", separator: str | None = None
) -> Format:
    """The format of a file: what its content shows, unless `wanted` says it; packed files are looked into.

    `field` is where tables and objects have their text, `setting` the key that `wanted` comes from, for messages.
    `separator`: the key that says what stands between documents, if it is unset.
    Raises Unreadable for what is not read, and for what is damaged; OSError.
    """
    packing = packing_of(path)
    with open_unpacked(path) as file:
        head, whole = _head(file)
    if wanted == "auto":
        kind = _Content(path, head, whole, field, setting).kind()
        if kind == "text" and separator and (mark := _MARK.search(head)):
            raise Unreadable(
                f'{path}: holds {mark[1].decode()} between documents; set {separator} = "{mark[1].decode()}", or'
                f' {setting} = "text" to take the file as one document'
            )
    else:
        assert wanted in get_args(TextFormat)
        kind = wanted
    if packing and kind in ("parquet", "arrow"):
        raise Unreadable(f"{path}: is {WORDS[kind]} packed once more, which cannot be read from any place; unpack it")
    return Format(kind, packing)


def _head(file: IO[bytes]) -> tuple[bytes, bool]:
    """The first bytes, and whether these are all. Of a file that is cut off, what there is."""
    head = b""
    while len(head) < HEAD:
        try:
            block = file.read1(HEAD - len(head))  # type: ignore[attr-defined]
        except Exception:  # of several libraries; whoever reads on will meet it again
            if not head:
                raise
            return head, False
        if not block:
            return head, True
        head += block
    return head, False


class _Content:
    """What the beginning of a file shows."""

    def __init__(self, path: str, head: bytes, whole: bool, field: str, setting: str) -> None:
        self._path, self._head, self._whole, self._field, self._setting = path, head, whole, field, setting
        base, suffix = os.path.splitext(path.lower())
        self._suffix = os.path.splitext(base)[1] if suffix in PACKED else suffix

    def kind(self) -> str:
        """A key of WORDS. Raises Unreadable."""
        head = self._head
        if head.startswith(b"PAR1\x15") or self._suffix == ".parquet":
            return "parquet"
        if head.startswith((b"ARROW1\0\0", b"\xff\xff\xff\xff")) or self._suffix in (".arrow", ".feather"):
            return "arrow"
        self._refuse_binary()
        text = head.decode("utf-8", errors="replace").removeprefix("\ufeff").lstrip()
        if self._suffix in _JSON or _OBJECT.match(text) or _OBJECTS.match(text) or self._is_list(text):
            return self._json(text)
        if self._suffix in _TABLES:
            return "csv"
        if markup := _MARKUP.match(text):
            name = {"html": "HTML", "!doctype": "HTML"}.get(markup[1].lower(), "XML")
            raise self._refusal(f"is {name}; take the text out of the mark-up")
        if self._suffix in _PLAIN and (columns := self._columns(text)):
            raise self._refusal(
                f'looks like a table ({columns}); set {self._setting} = "csv", with the column of the text'
            )
        return "text"

    def _refusal(self, what: str) -> Unreadable:
        return Unreadable(f'{self._path}: {what}, or set {self._setting} = "text" to take the file as it is')

    def _refuse_binary(self) -> None:
        head, path = self._head, shlex.quote(self._path)
        for pattern, what, remedy in _KNOWN:
            if pattern.match(head):
                how = remedy.format(path=path, unzip=_UNZIP.format(path=path), untar=_UNTAR.format(path=path))
                raise Unreadable(f"{self._path}: is {what}; {how}")
        encoding = next((name for bom, name in _BOMS.items() if head.startswith(bom)), None) or _without_bom(head)
        if encoding:
            raise Unreadable(f"{self._path}: is {encoding.upper()}; convert it ({convert(self._path, encoding)})")
        if b"\0" in head:
            raise self._refusal(f"is binary (a zero byte at {head.index(0)}); {_LEAVE_OUT}")

    def _is_list(self, text: str) -> bool:
        """Whether the whole is a list in JSON."""
        if not (self._whole and text.startswith("[")):
            return False
        try:
            return isinstance(json.loads(text), list)
        except (ValueError, RecursionError):
            return False

    def _json(self, text: str) -> str:
        """ "jsonl", unless values are seen to go over several lines, or to stand in an array."""
        if text.startswith("["):
            return "json"
        line, newline, _ = text.partition("\n")
        if _parses(line) or not newline:
            return "jsonl"
        try:
            json.JSONDecoder().raw_decode(text)
        except RecursionError:
            return "jsonl"
        except ValueError as error:
            # Either the first line is broken, or the object goes on behind what is looked at.
            cut = not self._whole and (
                str(error).startswith("Unterminated") or getattr(error, "pos", 0) > len(text) - 9
            )
            return "json" if cut or line.strip() == "{" else "jsonl"
        return "json"

    def _columns(self, text: str) -> str | None:
        """The columns of a table, in words, if it looks like one."""
        lines = text.splitlines()[: None if self._whole else -1]
        lines = list(islice(filter(str.strip, lines), 20))
        for separator in ",;\t":
            rows = _rows(lines, separator)
            header = rows[0] if rows else []
            if len(header) < 2:
                continue
            even = all(len(row) == len(header) and all(row) for row in rows)
            named = all(map(_NAME.fullmatch, header)) and len(set(header)) == len(header)
            if (named and (self._field in header or (even and len(rows) > 2))) or (
                separator == "\t" and even and len(rows) > 4
            ):
                return "columns " + ", ".join(cell[:20] for cell in header[:6])
        return None


def separator_of(header: str, field: str) -> str:
    """What divides the cells of a CSV file, by its first line: what gives a column `field`, else most columns."""
    found = {separator: next(iter(_rows([header], separator)), []) for separator in ",;\t|"}
    return max(found, key=lambda separator: (field in found[separator], len(found[separator])))


def _rows(lines: list[str], separator: str) -> list[list[str]]:
    try:
        return list(csv.reader(io.StringIO("\n".join(lines)), delimiter=separator))
    except csv.Error:
        return []


def _without_bom(head: bytes) -> str | None:
    """UTF-16 or UTF-32 without a mark at the beginning, by where its zero bytes stand."""
    size = len(head) - len(head) % 4
    zeros = [head[place:size:4].count(0) * 4 / max(1, size) for place in range(4)]
    if size < 8:
        return None
    shapes = {"utf-32le": (0, 1, 1, 1), "utf-32be": (1, 1, 1, 0), "utf-16le": (0, 1, 0, 1), "utf-16be": (1, 0, 1, 0)}
    for encoding, shape in shapes.items():
        if all((share > 0.7) if zero else (share < 0.1) for share, zero in zip(zeros, shape, strict=True)):
            return encoding
    return None


def _parses(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
