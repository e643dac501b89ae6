"""Files of text as they lie on a disk: packed (gzip, bzip2, xz, zstd), Parquet, Arrow, or plain."""

import bz2
import gzip
import io
import lzma
import os
import re
import shlex
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from titanling.errors import UserError

# Each read gives the interpreter's lock to the thread that encodes: better seldom.
BUFFER = 1 << 20
PACKED = {".gz": "gz", ".bz2": "bz2", ".xz": "xz", ".zst": "zst", ".zstd": "zst"}
"""Suffix → packing."""
_MAGIC = {
    "gz": re.compile(rb"\x1f\x8b"),
    "bz2": re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "zst": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
}


class Unreadable(Exception):
    """What cannot be used, a file or a part of it: where, why, and what mends it."""


def packing_of(path: str) -> str | None:
    """How a file is packed, by its first bytes: "gz", "bz2", "xz", "zst"; None if it is not.

    Raises Unreadable for one that is not packed as its suffix says.
    """
    named = PACKED.get(os.path.splitext(path.lower())[1])
    with open(path, "rb") as file:
        head = file.read(16)
    found = next((packing for packing, magic in _MAGIC.items() if magic.match(head)), None)
    if named and found != named:
        why = f"it begins with {head[:8]!r}" if head else "it is empty"
        raise Unreadable(
            f"{path}: damaged (Not a gzipped, or otherwise packed, file as its suffix says: {why}); fetch it or pack it"
            " again, or rename it"
        )
    return found


@contextmanager
def open_unpacked(path: str) -> Iterator[IO[bytes]]:
    """A file, unpacked if it is packed. Raises Unreadable for a damaged packing, here or in the body."""
    packing = packing_of(path)
    try:
        if packing is None:
            with open(path, "rb", BUFFER) as file:
                yield file
        elif packing == "zst":
            arrow = import_arrow(path)
            # Unlike the readers of the usual zstd packages, Arrow's notices a file that is cut off.
            with arrow.CompressedInputStream(arrow.OSFile(path), "zstd") as stream:
                yield io.BufferedReader(stream, BUFFER)
        else:
            opener: Any = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}[packing]
            with opener(path, "rb") as stream:
                yield io.BufferedReader(stream, BUFFER)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise Unreadable(f"{path}: damaged ({one_line(error)}); fetch it or pack it again") from None


@contextmanager
def open_parquet(path: str) -> Iterator[Any]:
    """pyarrow's ParquetFile. Raises Unreadable for a damaged one, here or in the body."""
    import_arrow(path)
    from pyarrow.parquet import ParquetFile

    with _damage_is_said(path), ParquetFile(path, page_checksum_verification=True) as file:
        yield file


@contextmanager
def open_arrow(path: str) -> Iterator[tuple[Any, Iterator[Any]]]:
    """The schema of an Arrow file or stream, and its record batches. Raises Unreadable, here or in the body."""
    arrow = import_arrow(path)

    def batches(reader: Any) -> Iterator[Any]:
        count = getattr(reader, "num_record_batches", None)
        for batch in reader if count is None else map(reader.get_batch, range(count)):
            batch.validate(full=True)  # its offsets are followed without a look
            yield batch

    with _damage_is_said(path), arrow.memory_map(path) as file:
        kind = arrow.ipc.open_file if file.read(6) == b"ARROW1" else arrow.ipc.open_stream
        file.seek(0)
        with kind(file) as reader:
            yield reader.schema, batches(reader)


@contextmanager
def _damage_is_said(path: str) -> Iterator[None]:
    """Whatever pyarrow raises for bytes that cannot be is a file that is damaged."""
    arrow = import_arrow(path)
    try:
        yield
    except (arrow.ArrowException, OSError, ValueError, KeyError, IndexError, OverflowError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise Unreadable(f"{path}: damaged ({one_line(error)}); fetch or write it again") from None


def utf8_bytes(text: str) -> int:
    """Length of a text in UTF-8. Raises Unreadable if it cannot be written in it."""
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise Unreadable(f"half a surrogate pair at character {error.start} is no Unicode; correct the text") from None


def convert(path: str, encoding: str) -> str:
    """The command that turns a file of another encoding into UTF-8, in its place."""
    name, new = shlex.quote(path), shlex.quote(f"{path}.utf8")
    return f"iconv -f {encoding} -t utf-8 {name} > {new} && mv {new} {name}"


def one_line(error: Exception) -> str:
    """What an error says, short."""
    return " ".join(str(error).split())[:200]


def import_arrow(path: str) -> Any:
    """pyarrow. Raises UserError if it is not installed, which `path` needs."""
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise UserError(f"{path}: needs pyarrow: pip install pyarrow (or titanling's extra: parquet)") from None
    return pyarrow
