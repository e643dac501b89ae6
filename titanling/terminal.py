"""Standard output and error as channels of reports: what they cannot take is lost, and ends nothing. Free of torch."""

import io
import os
import select
import sys
from contextlib import suppress
from typing import TextIO

PATIENCE_SECONDS = 1.0
"""How long a reader may take that has asked not to be waited for."""


class Channel(io.RawIOBase):
    """The descriptor of a stream. No write raises anything; the first that fails is told to the other stream, if that
    is one for reports as well.

    A disk that is full may have room again: every write is tried.
    """

    def __init__(self, name: str, descriptor: int) -> None:
        self.name, self._descriptor = name, descriptor
        self._told = False

    def fileno(self) -> int:
        """The descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        """Yes."""
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        """Write what can be written; the rest counts as written."""
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:
            select.select([], [self._descriptor], [], PATIENCE_SECONDS)
        except OSError as error:
            self._tell(error)
            return len(data)
        try:
            return os.write(self._descriptor, data)
        except OSError as error:
            self._tell(error)
            return len(data)

    def _tell(self, error: OSError) -> None:
        other = "stdout" if self.name == "stderr" else "stderr"
        channel = getattr(getattr(getattr(sys, other), "buffer", None), "raw", None)
        if not self._told and isinstance(channel, Channel):
            self._told = True
            message = f"warning: {self.name} cannot be written ({error.strerror}); its lines are lost, the work goes on"
            with suppress(OSError):
                os.write(channel.fileno(), f"{message}\n".encode())


def make_ready() -> None:
    """Make standard streams that any text can be written to, whatever they encode. Call it before anything is opened.

    One that is closed is opened so that writing fails: otherwise the next file would get its number, and with it
    whatever a library prints.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)  # the lowest number that is free: this one
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "w", encoding="utf-8", closefd=False))
        reconfigure = getattr(getattr(sys, name), "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def report_to(name: str) -> None:
    """Let "stdout" or "stderr" be a `Channel` from now on, unless a program has put something else in its place."""
    stream: TextIO = getattr(sys, name)
    try:
        descriptor = stream.fileno()
        stream.flush()
    except (OSError, ValueError):
        descriptor = -1
    if descriptor == {"stdout": 1, "stderr": 2}[name]:
        channel, encoding = io.BufferedWriter(Channel(name, descriptor)), stream.encoding or "utf-8"
        setattr(sys, name, io.TextIOWrapper(channel, encoding, "backslashreplace", line_buffering=True))


def give_up(descriptor: int) -> None:
    """Let what is still to be written to a descriptor be lost: the interpreter's last flush must not fail on it."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
