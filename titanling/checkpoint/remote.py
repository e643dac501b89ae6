"""Reading a file in storage that is named by a URL, a range of bytes at a time."""

import io
from pathlib import Path


class RemoteFile(io.RawIOBase):
    """A file to read from. Each read is one request for just its bytes; any number of threads may have it open.

    fsspec's own file objects read ahead, which costs more than it gains where pieces are taken from here and there, and
    those of memory:// are one object, with one position, for all who read it.
    """

    def __init__(self, path: Path) -> None:
        self._fs, self._path = path.fs, path.path  # type: ignore[attr-defined]  # universal_pathlib's
        self._size, self._at = path.stat().st_size, 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place, counted from the beginning."""
        if whence != io.SEEK_SET:
            raise io.UnsupportedOperation("only from the beginning")
        self._at = offset
        return offset

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill `buffer` as far as the file reaches; how many bytes that were."""
        count = max(0, min(len(buffer), self._size - self._at))
        if count:
            data = self._fs.cat_file(self._path, start=self._at, end=self._at + count)
            count = len(data)
            buffer[:count] = data
            self._at += count
        return count
