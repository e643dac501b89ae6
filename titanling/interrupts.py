"""Signals that end a command: within moments, once, in one line, and with nothing half-written. Free of torch.

The main thread is told by an exception, and clears up as it would after any other. But it may be deep in a library
that does not hear it, and where threads are being started or waited for, it may never come back: a thread of its own
waits for GRACE_SECONDS, or for the second signal, and then does the rest itself.
"""

import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from titanling import files
from titanling.errors import UserError
from titanling.ranks import is_first

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_SECONDS = 3.0


class Interrupted(KeyboardInterrupt):
    """A signal has asked this command to end."""


class Interruption:
    """Whether a signal has ended this command, and how to obey."""

    def __init__(self, words: str) -> None:
        """`words` say what has become of its work."""
        self.words = words
        self.number: int | None = None
        """Of the first signal."""
        self._over = threading.Lock()

    def install(self) -> None:
        """Heed the signals from now on, but those that the caller of this process had ignored (nohup)."""
        told, tell = os.pipe()
        os.set_blocking(tell, False)
        heeded = [number for number in ENDING if signal.getsignal(number) != signal.SIG_IGN]
        signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
        for number in heeded:
            signal.signal(number, self._raise)
        os.register_at_fork(after_in_child=lambda: _forget(heeded))
        threading.Thread(target=self._listen, args=(told,), name="interrupts", daemon=True).start()

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self._note(number)
            raise Interrupted

    def _note(self, number: int) -> None:
        self.number = number
        # An exception in a destructor or a thread would be printed, and helps nobody now.
        sys.unraisablehook = lambda _: None
        threading.excepthook = lambda _: None

    def _listen(self, told: int) -> None:
        timer: threading.Timer | None = None
        while True:
            for number in os.read(told, 64):
                if number not in ENDING or signal.getsignal(number) != self._raise:
                    continue  # somebody else heeds it by now: a launcher, say
                if timer is not None:
                    self.end(number)
                timer = threading.Timer(GRACE_SECONDS, self.end, (number,))
                timer.daemon = True
                timer.start()

    def end(self, number: int | None = None) -> NoReturn:
        """Say so, end child processes, remove what is half-written, and exit. Does not return."""
        self._over.acquire()  # never released: whoever comes second waits for the end
        first = self.number or number or signal.SIGINT
        self._note(first)
        for process in _descendants():
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)
        files.remove_own()
        how = "interrupted" if first == signal.SIGINT else f"ended by {signal.Signals(first).name}"
        if _speaks():
            with suppress(OSError):
                os.write(2, f"{how}{self.words and f'; {self.words}'}\n".encode(errors="backslashreplace"))
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(128 + first)


def _speaks() -> bool:
    """Whether this is the process that speaks for all; also where a launcher's words make no sense."""
    try:
        return is_first()
    except UserError:
        return True


def _descendants() -> list[int]:
    """Numbers of this process's children and theirs, where /proc tells."""
    found, todo = [], [os.getpid()]
    while todo:
        for path in Path(f"/proc/{todo.pop()}/task").glob("*/children"):
            with suppress(OSError):
                children = [int(number) for number in path.read_text().split()]
                found += children
                todo += children
    return found


def _forget(heeded: list[signal.Signals]) -> None:
    """In a forked helper: what ends it is its parent's affair."""
    signal.set_wakeup_fd(-1)
    for number in heeded:
        signal.signal(number, signal.SIG_DFL)
