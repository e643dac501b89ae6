"""Files as a careful program makes them: under a name of its own first, never through a link, in nobody's place.

A temporary name is `NAME.titanling-HOST-PID-RANDOM.partial`, beside NAME. It is made exclusively, so that no link or
folder of somebody else's is ever written to, and it is removed by its process, or by whoever makes NAME next once that
process is dead. What has no such name is never removed: a `NAME.partial` is the user's.
"""

import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import BinaryIO

_MARK = re.compile(r"\.titanling-([0-9a-f]{8})-(\d+)-[0-9a-f]{12}\.partial$")
_own: set[Path] = set()
"""What this process has made and not yet published or removed."""


def temporary(path: Path) -> Path:
    """A name beside `path` that nothing has yet, and that says whose it is. Makes nothing."""
    return path.with_name(f"{path.name}.titanling-{_host()}-{os.getpid()}-{secrets.token_hex(6)}.partial")


def is_temporary(name: str) -> bool:
    """Whether a file's or folder's name is a temporary one of any process."""
    return _MARK.search(name) is not None


@contextmanager
def new_folder(path: Path, name: Path | None = None) -> Iterator[Path]:
    """An empty folder with a temporary name, or this one, to be renamed to `path`; removed at the end if it was not.

    What dead processes left of earlier tries goes first. Raises OSError.
    """
    _remove_dead(path)
    folder = name or temporary(path)
    folder.mkdir(parents=True)
    _own.add(folder)
    try:
        yield folder
    finally:
        _remove(folder)
        _own.discard(folder)


class NewFile:
    """A file with a temporary name, open for writing as `file`, that `publish` gives its own. Raises OSError."""

    def __init__(self, path: Path) -> None:
        _remove_dead(path)
        self.path, self.name = path, temporary(path)
        descriptor = os.open(self.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        _own.add(self.name)
        self.file: BinaryIO = os.fdopen(descriptor, "wb")

    def sync(self) -> None:
        """Have what was written on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def publish(self) -> None:
        """Give the file, synced, its name, in one move; it takes the place of what has it. Raises OSError."""
        self.sync()
        self.file.close()
        os.replace(self.name, self.path)
        _own.discard(self.name)
        _sync_folder(self.path.parent)

    def drop(self) -> None:
        """Remove it, unless it is published."""
        with suppress(OSError):  # what a full disk did not take
            self.file.close()
        if self.name in _own:
            _remove(self.name)
            _own.discard(self.name)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which becomes `path` at the end, whole and synced; if the body fails, it leaves no trace."""
    made = NewFile(path)
    try:
        yield made.file
        made.publish()
    finally:
        made.drop()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it has its old content or the new one whatever happens. Raises OSError."""
    with new_file(path) as file:
        file.write(content)


def set_aside(path: Path) -> Path:
    """Rename a file to the first free of NAME.1.SUFFIX, NAME.2.SUFFIX …; the new name. Raises OSError."""
    names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in count(1))
    aside = next(name for name in names if not os.path.lexists(name))
    path.rename(aside)
    return aside


def append_to(path: Path) -> BinaryIO:
    """Open a regular file to append to, made if it is missing; unbuffered.

    Never waits, as opening a pipe would, and goes through no link. Raises OSError, which says what is in its place.
    """
    if path.is_symlink():
        raise OSError(errno.ELOOP, "it is a link", str(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    file: BinaryIO = os.fdopen(os.open(path, flags, 0o666), "ab", buffering=0)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return file


def is_still(file: BinaryIO, path: Path) -> bool:
    """Whether `path` is still the file that was opened there, and no other has been put in its place."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except OSError:
        return False


def remove_own() -> None:
    """Remove all that this process has made under temporary names: it is about to end."""
    for path in list(_own):
        _remove(path)


def _remove_dead(path: Path) -> None:
    """Remove what processes of this machine that are no more left of `path`."""
    with suppress(OSError):
        for entry in path.parent.iterdir():
            found = _MARK.fullmatch(entry.name.removeprefix(path.name)) if entry.name.startswith(path.name) else None
            if found and found[1] == _host() and not _lives(int(found[2])):
                _remove(entry)


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _host() -> str:
    """This machine, or this container: the space in which a process's number means something."""
    space = ""
    with suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return hashlib.blake2b(f"{socket.gethostname()} {space}".encode(), digest_size=4).hexdigest()


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # somebody else's; no such number
        return True
    return True


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # we may write there, but not read it; a network file system that cannot
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
