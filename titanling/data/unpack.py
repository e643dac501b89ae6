"""Files of text as they lie on a disk: packed (.gz, .zst), Parquet, or plain."""

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from titanling.errors import UserError

# Each read gives the interpreter's lock to the thread that encodes: better seldom.
BUFFER = 1 << 20


class Unreadable(Exception):
    """What cannot be used, a file or a part of it: where, why, and what mends it."""


@contextmanager
def open_unpacked(path: str) -> Iterator[IO[bytes]]:
    """A file, unpacked if its suffix says so. Raises Unreadable for a damaged packing, here or in the body."""
    suffix = os.path.splitext(path.lower())[1]
    try:
        if suffix == ".gz":
            with gzip.open(path, "rb") as file:
                yield io.BufferedReader(file, BUFFER)
        elif suffix == ".zst":
            arrow = import_arrow(path)
            # Unlike the readers of the usual zstd packages, Arrow's notices a file that is cut off.
            with arrow.CompressedInputStream(arrow.OSFile(path), "zstd") as stream:
                yield io.BufferedReader(stream, BUFFER)
        else:
            with open(path, "rb", BUFFER) as file:
                yield file
    except (EOFError, OSError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise Unreadable(f"{path}: damaged ({' '.join(str(error).split())}); fetch it or pack it again") from None


@contextmanager
def open_parquet(path: str) -> Iterator[Any]:
    """pyarrow's ParquetFile. Raises Unreadable for a damaged one, here or in the body."""
    arrow = import_arrow(path)
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except (arrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise Unreadable(f"{path}: damaged ({' '.join(str(error).split())[:200]}); fetch or write it again") from None


def utf8_bytes(text: str) -> int:
    """Length of a text in UTF-8. Raises Unreadable if it cannot be written in it."""
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise Unreadable(f"half a surrogate pair at character {error.start} is no Unicode; correct the text") from None


def import_arrow(path: str) -> Any:
    """pyarrow. Raises UserError if it is not installed, which `path` needs."""
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"{path}: needs pyarrow: pip install pyarrow (or titanling's extra: parquet)") from None
    return pyarrow
