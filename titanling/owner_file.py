"""owner.json, by which a run has a folder: what it says, and how it is made, read, renewed and replaced.

The file appears whole and exclusively, in a file system by a link to it, in an object store by a create-only write.
Imports no torch.
"""

import errno
import json
import os
import secrets
import socket
import stat
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

from titanling.errors import UserError

NAME = "owner.json"
TAKING = ".owner.taking"
STALE_SECONDS = 60.0
SETTLE_SECONDS = 0.5
MOST_BYTES = 2**16
FORMAT = 1


@dataclass(frozen=True)
class Holder:
    """A process that has a folder."""

    host: str
    pid: int
    started: str
    """When the run began, for people."""
    job: str
    """Of the cluster; "" without one."""
    restarts: int
    """How often the cluster has started that job again."""
    token: str
    """Random, unlike any other."""
    machine: str
    """Boot and process namespace that `pid` belongs to; "" where the system does not tell."""
    birth: int
    """When the process began, in the kernel's ticks: numbers of processes are used again."""

    @classmethod
    def this_process(cls) -> "Holder":
        """This process, with a new token."""
        now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
        job, restarts = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "0")
        if job:
            job = f"{os.environ.get('SLURM_CLUSTER_NAME', 'Slurm')} job {job}"
        pid, restarts = os.getpid(), int(restarts) if restarts.isascii() and restarts.isdecimal() else 0
        return cls(socket.gethostname(), pid, now, job, restarts, secrets.token_hex(16), _machine(), _birth(pid) or 0)

    @classmethod
    def decode(cls, content: bytes) -> "Holder | None":
        """What `encode` wrote; None: anything else."""
        try:
            value = json.loads(content)
            if value.pop("format") != FORMAT:
                return None
            found = cls(**{field.name: value[field.name] for field in fields(cls)})
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            return None
        right = all(type(getattr(found, field.name)) is field.type for field in fields(cls))
        return found if right and len(found.token) == 32 else None

    def encode(self) -> bytes:
        """As the file holds it."""
        return (json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n").encode()

    def __str__(self) -> str:
        job = f", {self.job[:80]}" if self.job else ""
        return f"process {self.pid} on {self.host[:80]} (since {self.started[:40]}{job})"

    def ended(self) -> bool:
        """Whether it certainly has: a process of this boot and this namespace that is no more."""
        if not self.machine or self.machine != _machine() or self.pid <= 0:
            return False
        birth = _birth(self.pid)
        if birth is not None:
            return birth != self.birth
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return True
        except PermissionError:
            return False  # there is one, of another user, whose birth we may not see
        return True  # it has ended, and only its parent has not looked yet


class Place(Protocol):
    """A folder as the owners' files need it. Methods raise the errors of the storage."""

    name: str

    def create(self, me: Holder) -> bool:
        """Write our file unless there is one; whether we did."""

    def read(self) -> bytes | None:
        """What the file holds; None: there is none. Raises UserError if it is nothing to read."""

    def age(self) -> float | None:
        """Seconds since the file was renewed, by the storage's own clock; None: it does not tell."""

    def renew(self, me: Holder) -> str | None:
        """Show that we are there; what is wrong if the file is not ours any more, or None."""

    def replace(self, content: bytes, me: Holder) -> bool:
        """Put our file in the place of the one that holds `content`; whether we did: only one process can."""

    def remove(self) -> None:
        """Remove our file, and what was made for it."""


class LocalPlace:
    """A folder of a file system. Made if it is missing, and removed again if nothing else has come into it."""

    def __init__(self, folder: Path) -> None:
        self.name = str(folder)
        self._folder, self._path = folder, folder / NAME
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._identity = self._identify()

    def create(self, me: Holder) -> bool:
        """See Place."""
        made = self._appear(self._path, me)
        self._identity = self._identify()
        return made

    def read(self) -> bytes | None:
        """See Place. Follows no link, and does not wait for a pipe."""
        descriptor = self._open()
        if descriptor is None:
            return None
        with os.fdopen(descriptor, "rb") as file:
            return file.read(MOST_BYTES)

    def age(self) -> float | None:
        """See Place."""
        descriptor = self._open()  # opened: a network file system answers from what it remembers otherwise
        if descriptor is None:
            return None
        with os.fdopen(descriptor):
            return self._age(os.fstat(descriptor).st_mtime)

    def renew(self, me: Holder) -> str | None:
        """See Place. A folder that was deleted, or made anew, is not lost to anybody."""
        descriptor = self._open()
        if descriptor is not None:
            with os.fdopen(descriptor, "rb") as file:
                other = Holder.decode(file.read(MOST_BYTES))
                if other is not None and other.token == me.token:
                    os.utime(descriptor)
                    return None
            return f"{other or 'another program'} has it now"
        now = self._identify()
        if now is None or (now != self._identity and self.create(me)):
            return None
        return f"its {NAME} is gone"

    def replace(self, content: bytes, me: Holder) -> bool:
        """See Place. Who is about to do so says it in a file of its own, for what was read may be another's by now."""
        claim, scratch = self._folder / TAKING, self._scratch()
        if not self._appear(claim, me):
            with suppress(FileNotFoundError):
                other, age = Holder.decode(claim.read_bytes()), self._age(claim.stat().st_mtime)
                if (other is not None and other.ended()) or (age is not None and age > STALE_SECONDS):
                    claim.unlink()  # it was killed in the middle of this
            return False
        try:
            if self.read() != content:
                return False
            _write(scratch, me.encode())
            scratch.rename(self._path)
            return True
        finally:
            claim.unlink(missing_ok=True)
            scratch.unlink(missing_ok=True)

    def remove(self) -> None:
        """See Place."""
        self._path.unlink(missing_ok=True)
        for path in self._made:
            path.rmdir()  # raises where something is in it

    def _appear(self, path: Path, me: Holder) -> bool:
        """Make a file whole: written beside, and linked. Whether there was none."""
        scratch = self._scratch()
        try:
            _write(scratch, me.encode())
            try:
                os.link(scratch, path)
            except FileExistsError:
                return False
            except OSError:  # no links here
                try:
                    _write(path, me.encode())
                except FileExistsError:
                    return False
        finally:
            with suppress(OSError):
                scratch.unlink()
        return True

    def _age(self, modified: float) -> float | None:
        """Seconds from a time of the file system's clock until now by the same clock."""
        scratch = self._scratch()
        try:
            _write(scratch, b".")
            return scratch.stat().st_mtime - modified
        except OSError:
            return None
        finally:
            with suppress(OSError):
                scratch.unlink()

    def _open(self) -> int | None:
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise foreign(self._path, "a link" if error.errno == errno.ELOOP else "no regular file") from None
            raise
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise foreign(self._path, "no regular file")
        return descriptor

    def _identify(self) -> tuple[int, int] | None:
        try:
            found = self._folder.stat()
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    def _scratch(self) -> Path:
        return self._folder / f".owner-{secrets.token_hex(8)}.tmp"


class RemotePlace:
    """A folder of an object store, through fsspec: create-only where the store can, else with a short race."""

    def __init__(self, folder: Path) -> None:
        self.name = str(folder)
        path = folder / NAME
        self._fs, self._path = path.fs, path.path  # type: ignore[attr-defined]  # universal_pathlib's

    def create(self, me: Holder) -> bool:
        """See Place."""
        try:
            self._fs.pipe_file(self._path, me.encode(), mode="create")
        except Exception:  # each client has its own; what became of it is to be seen there
            if self.read() is None:
                raise
        return self.read() == me.encode()

    def read(self) -> bytes | None:
        """See Place."""
        try:
            return self._fs.cat_file(self._path, start=0, end=MOST_BYTES)
        except FileNotFoundError:
            return None

    def age(self) -> float | None:
        """See Place."""
        probe = f"{self._path}.{secrets.token_hex(8)}"
        try:
            self._fs.pipe_file(probe, b".")
            return (self._fs.modified(probe) - self._fs.modified(self._path)).total_seconds()
        except Exception:
            return None
        finally:
            with suppress(Exception):
                self._fs.rm_file(probe)

    def renew(self, me: Holder) -> str | None:
        """See Place."""
        content = self.read()
        if content == me.encode():
            self._fs.pipe_file(self._path, content)
            return None
        return f"{Holder.decode(content) or 'another program'} has it now" if content else f"its {NAME} is gone"

    def replace(self, content: bytes, me: Holder) -> bool:
        """See Place. Looks once more after a moment: another may have been as fast."""
        if self.read() != content:
            return False
        self._fs.rm_file(self._path)
        if not self.create(me):
            return False
        time.sleep(SETTLE_SECONDS)
        return self.read() == me.encode()

    def remove(self) -> None:
        """See Place."""
        self._fs.rm_file(self._path)


def open_place(folder: Path) -> Place:
    """The place of a folder, a path or universal_pathlib's. Makes a local one that is missing."""
    protocol = getattr(folder, "protocol", "")
    if isinstance(folder, Path) or protocol in ("file", "local"):
        path = Path(getattr(folder, "path", folder))
        if path.is_symlink() and not path.exists():  # a disk that is not mounted: no folder is made in its place
            raise UserError(f"{path}: is a link to {os.readlink(path)}, which is not there; make it or remove the link")
        return LocalPlace(Path(os.path.realpath(path)))
    return RemotePlace(folder)


def foreign(path: Any, what: str) -> UserError:
    """What to say of an owner's file that no run has written."""
    return UserError(f"{path}: is {what}; if no run uses this folder, remove that file and start again")


def _write(path: Path, content: bytes) -> None:
    """Write a new file, durably. Raises FileExistsError if there is one."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except (OSError, ValueError):
        return ""


def _birth(pid: int) -> int | None:
    """Start of a process in ticks since boot; None: there is none, or it is not ours to see, or it has ended."""
    try:
        state, *rest = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
        return None if state in "ZX" else int(rest[18])
    except (OSError, ValueError, IndexError):
        return None
