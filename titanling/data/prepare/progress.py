"""How far a preparation is: a bar on a terminal, a line now and then in a log; both on stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_SECONDS = 30


@contextmanager
def show_progress(total: int) -> Iterator[Callable[[int], None]]:
    """Gives what is to be told how many of the `total` bytes more are done."""
    if sys.stderr.isatty():
        with _bar(total) as advance:
            yield advance
    else:
        yield _Lines(total)


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress("preparing", *columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("preparing", total=total)
        yield lambda size: progress.advance(task, size)


class _Lines:
    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._start = self._last = time.monotonic()

    def __call__(self, size: int) -> None:
        self._done += size
        now = time.monotonic()
        if now - self._last < LINE_SECONDS:
            return
        self._last = now
        rate = self._done / (now - self._start)
        print(progress_line(self._done, self._total, rate), file=sys.stderr, flush=True)


def progress_line(done: int, total: int, rate: float) -> str:
    """One line: done and total in bytes, rate in bytes a second."""
    left = round((total - done) / max(rate, 1))
    return (
        f"preparing: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB ({done / max(1, total):.0%}), {rate / 1e6:.1f} MB/s,"
        f" {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
    )
