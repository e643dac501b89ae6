"""How fast a run goes. Pure Python: the clock and the device's synchronisation are handed in."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Rate(NamedTuple):
    """Speed over one window."""

    tokens_per_second: float
    """Tokens of all ranks."""
    step_seconds: float
    """Mean over the window's steps."""


class Throughput:
    """Tokens/s and step time since the last `read`, without the time spent in `paused`.

    Args:
        synchronize: Waits for the device (`torch.cuda.synchronize`); called at both ends of a pause, so that training
            work still queued on a GPU is not hidden in the pause, nor the pause's work in training.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, synchronize: Callable[[], None] | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._synchronize = synchronize
        self._clock = clock
        self._start = clock()
        self._paused = 0.0
        self._depth = 0
        self._steps = 0
        self._tokens = 0

    def step(self, tokens: int) -> None:
        """Count one finished optimizer step that used `tokens` tokens over all ranks."""
        self._steps += 1
        self._tokens += tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude what runs inside: validation, saving, sampling. May be nested."""
        before = self._now()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._paused += self._now() - before

    def read(self) -> Rate:
        """Rate of the window that ends now; the next window starts now.

        On a GPU, call it when the step's result has been read (the loss on a logging step): only then is the
        work done. Raises ValueError inside a pause or if no step was counted since the last call.
        """
        if self._depth or not self._steps:
            raise ValueError("read() needs a counted step, outside of paused()")
        now = self._clock()
        seconds = max(now - self._start - self._paused, 1e-9)  # a coarse clock may stand still
        rate = Rate(self._tokens / seconds, seconds / self._steps)
        self._start, self._paused, self._steps, self._tokens = now, 0.0, 0, 0
        return rate

    def _now(self) -> float:
        if self._synchronize is not None:
            self._synchronize()
        return self._clock()
