"""Where checkpoints lie: a local folder, or storage named by a URL, whose files are read a range of bytes at a time."""

import io
import sys
from pathlib import Path

from titanling.errors import UserError

# Kind of storage → the package that fsspec reaches it with.
_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
}


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


def root_name(run_folder: Path, name: str) -> str:
    """The folder of a run's checkpoints: `name` below the run folder, or a URL such as s3://bucket/run."""
    return name.rstrip("/") if "://" in name else str(run_folder / name)


def open_root(run_folder: Path, name: str) -> Path:
    """The same as a path. Raises UserError if the URL's kind of storage is unknown, not installed or not in reach."""
    return open_path(root_name(run_folder, name))


def open_path(name: str) -> Path:
    """A local path, or for a URL its counterpart of universal_pathlib. Raises UserError as `open_root` does."""
    if "://" not in name:
        return Path(name)
    package, pip = _PACKAGES.get(name.partition("://")[0]), f"{sys.executable} -m pip install"
    try:
        from upath import UPath
    except ImportError:
        needed = " ".join(["universal_pathlib", *([package] if package else [])])
        raise UserError(f"{name}: storage named by a URL needs {needed}: {pip} {needed}") from None
    try:
        path = UPath(name, use_listings_cache=False)  # a listing must hold what other ranks have written
        path.exists()
    except ImportError as error:
        install = f"{pip} {package}" if package else str(error)
        raise UserError(f"{name}: this kind of storage needs a package that is not installed: {install}") from None
    except Exception as error:  # each storage has its own
        raise UserError(f"{name}: this storage cannot be used: {reason(error)}") from None
    return path


def reason(error: Exception) -> str:
    """Why something failed, in words."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
