"""Which ranks are lost: after a collective has failed, or while a save takes long, who still answers?

The failed collective tells at best which neighbour it waited for, and that one may itself have waited for another. So
every rank keeps a thread that answers roll calls through the store, even while its main thread hangs in a collective.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

ANSWER_SECONDS = 0.5
LEAVE_SECONDS = 15.0
"""For how long a rank that leaves waits for its own threads: on a busy machine for their turn, else for nothing."""
POLL_SECONDS = 0.02
FOREVER = timedelta(days=30)


class RanksLost(RuntimeError):
    """The run cannot go on, for these ranks do not answer any more."""

    def __init__(self, ranks: list[int]) -> None:
        super().__init__(f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} stopped answering")
        self.ranks = ranks


class RollCall:
    """Made on every rank, with the store that all ranks have met in; closed before that store goes away."""

    def __init__(self, store: dist.Store, rank: int, size: int, patience: float) -> None:
        """`patience`, in seconds, is that of the collectives."""
        self._rank, self._size = rank, size
        self.patience = patience
        self._caller = store.clone()
        self._closed = False
        self._thread = threading.Thread(target=self._answer, args=(store.clone(),), name="roll-call", daemon=True)
        self._thread.start()

    def lost(self, patience: float = ANSWER_SECONDS) -> list[int]:
        """Ranks that do not answer within `patience` seconds and have not left; that of the store if it does not."""
        found: list[list[int]] = []
        deadline = time.monotonic() + patience
        # In a thread, for a store whose process is suspended keeps even those waiting who only ask whether it is there.
        asking = threading.Thread(
            target=lambda: found.append(self._silent(deadline - 2 * POLL_SECONDS)), name="asking", daemon=True
        )
        asking.start()
        asking.join(patience)
        # Never sooner: a launcher that knows what has happened says so, and ends us meanwhile.
        time.sleep(max(0.0, deadline - time.monotonic()) if found != [[]] else 0.0)
        return found[0] if found else [0]

    def _silent(self, deadline: float) -> list[int]:
        try:
            call = self._call()
            missing = list(range(self._size))
            while missing and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
                missing = [rank for rank in missing if not self._is_there(call, rank)]
            return missing
        except RuntimeError:  # torch's own error of a store that is gone
            return [0] if self._rank else []

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Raises RanksLost for a failure within (a collective's is a RuntimeError) if that is the reason."""
        try:
            yield
        except RanksLost:
            raise
        except RuntimeError as error:
            lost = self.lost()
            if lost:
                raise RanksLost(lost) from error
            raise

    def wait(self, event: threading.Event) -> None:
        """Wait for what other ranks take part in, outside of collectives, as long as they all answer; else RanksLost.

        How long a disk takes is nobody's fault, so only a rank's silence has a limit: `patience`.
        """
        while not event.wait(self.patience / 2):
            lost = self.lost(self.patience / 2)
            if lost:
                raise RanksLost(lost)

    def close(self) -> None:
        """Leave, and end the threads: one that the interpreter's end meets inside the store aborts the process.

        Only a store whose process is suspended makes this wait for longer than its threads need.
        """
        self._closed = True
        deadline = time.monotonic() + LEAVE_SECONDS
        leaving = threading.Thread(target=self._leave, name="leaving", daemon=True)
        leaving.start()
        for thread in (leaving, self._thread):
            thread.join(max(0.0, deadline - time.monotonic()))

    def close_last(self, seconds: float) -> None:
        """Leave; rank 0, whose process holds the store, only after the others have left too, or after `seconds`."""
        self.close()
        others = [f"left/{rank}" for rank in range(1, self._size)] if self._rank == 0 else []
        deadline = time.monotonic() + seconds
        while others and not self._caller.check(others) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def _leave(self) -> None:
        try:
            self._caller.set(f"left/{self._rank}", "")
            self._call()
        except RuntimeError:
            pass

    def _call(self) -> int:
        number = self._caller.add("calls", 1)
        self._caller.set(f"call/{number}", "")
        return number

    def _is_there(self, call: int, rank: int) -> bool:
        return self._caller.check([f"here/{call}/{rank}"]) or self._caller.check([f"left/{rank}"])

    def _answer(self, store: dist.Store) -> None:
        try:
            call = 1
            while not self._closed:
                store.wait([f"call/{call}"], FOREVER)
                store.set(f"here/{call}/{self._rank}", "")
                call += 1
        except RuntimeError:
            pass  # the store is gone, and with it the run
