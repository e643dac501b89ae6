"""Asking a run to stop: SIGTERM, SIGINT (Ctrl-C), SIGHUP (a closed terminal) and SIGUSR1 (Slurm's --signal) end it
after the current step."""

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from titanling.ranks import is_first

GRACEFUL = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
AT_ONCE = (signal.SIGTERM, signal.SIGINT)
DEBOUNCE_SECONDS = 1.0
"""Slurm signals every process of a job and our launcher passes its own on: what comes so soon is the same wish."""


class StopRequest:
    """Whether this process has been asked to stop. Unless `install` is called it never is."""

    def __init__(self, before_exit: Callable[[], None] | None = None) -> None:
        """`before_exit` is called where a second signal ends the process at once."""
        self.name: str | None = None
        """Name of the first signal."""
        self._hard_since: float | None = None
        self._before_exit = before_exit

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.name is not None

    def install(self) -> None:
        """Heed the signals from now on, unless the caller of this process had them ignored (nohup).

        A thread of its own does: Python's handlers wait for the main thread, and that may hang in a collective.
        """
        told, tell = os.pipe()
        os.set_blocking(tell, False)
        heeded = [number for number in GRACEFUL if signal.getsignal(number) != signal.SIG_IGN]
        signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
        for number in heeded:
            signal.signal(number, lambda *_: None)  # its number has gone down the pipe already
        os.register_at_fork(after_in_child=lambda: _forget(heeded))
        threading.Thread(target=self._listen, args=(told,), name="signals", daemon=True).start()

    def _listen(self, told: int) -> None:
        while True:
            for number in os.read(told, 64):
                if number in GRACEFUL:
                    self._take(number)

    def _take(self, number: int) -> None:
        if self.name is None:
            self.name = signal.Signals(number).name
            if is_first():
                with suppress(OSError):  # the terminal is gone, perhaps
                    os.write(2, f"{self.name}: stopping after this step; once more, and it stops at once\n".encode())
        if number not in AT_ONCE:
            return
        now = time.monotonic()
        if self._hard_since is None:
            self._hard_since = now
        elif now - self._hard_since > DEBOUNCE_SECONDS:
            # Nothing on the disk needs us: rows are written one by one, and a torn save is not taken for a checkpoint.
            if self._before_exit is not None:
                self._before_exit()
            os._exit(128 + number)


def _forget(heeded: list[signal.Signals]) -> None:
    """In a forked helper: what ends it is no wish of the run's user."""
    signal.set_wakeup_fd(-1)
    for number in heeded:
        signal.signal(number, signal.SIG_DFL)
