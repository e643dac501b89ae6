"""Who has a folder: one run at a time, on any file system. Imports no torch.

A run keeps `owner.json` in each folder that it writes: created exclusively, renewed every RENEW_SECONDS by a thread,
removed at the end. One that has not been renewed for STALE_SECONDS, by the clock of the file system alone, or whose
process was one of this machine and has ended, is taken over, by one of those who would.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from titanling.checkpoint.folder import FULL, shortage
from titanling.checkpoint.remote import reason
from titanling.errors import UserError
from titanling.owner_file import NAME, STALE_SECONDS, Holder, Place, foreign, open_place

RENEW_SECONDS = 10.0
RETRY_SECONDS = 0.05
ATTEMPTS = 20


class Owner:
    """The folders that this process has. Without any, as on all ranks but the first, nothing is ever lost."""

    def __init__(self, say: Callable[[str], object] = print) -> None:
        """`say` is told where a folder has been taken over."""
        self._say, self._me = say, Holder.this_process()
        self._places: dict[str, Place] = {}
        self._lost: str | None = None
        self._ended = threading.Event()

    def take(self, folders: Mapping[str, Path]) -> None:
        """Have these folders (setting → path), all or none. Raises UserError that says who has one."""
        try:
            for setting, folder in folders.items():
                place = open_place(folder)
                if not any(place.name == other.name for other in self._places.values()):
                    self._take(setting, place)
                    self._places[setting] = place
        except UserError:
            self.release()
            raise
        except Exception as error:
            self.release()
            full = isinstance(error, OSError) and error.errno in FULL
            room = f": {shortage(folder.absolute(), len(self._me.encode()))}" if full else ""
            raise UserError(
                f"{setting} = {folder}: no {NAME} can be written there: {reason(error)}{room}; free some space, mend"
                " its permissions, or set another folder"
            ) from None
        threading.Thread(target=self._keep, name="owner", daemon=True).start()

    @property
    def lost(self) -> bool:
        """Whether a folder is known to belong to another run by now. Asks no disk."""
        return self._lost is not None

    def check(self, gather: Callable[[str | None], list[str | None]]) -> None:
        """Look now, on all ranks together. Raises UserError on each if a folder has been lost."""
        self.renew()
        lost = next(filter(None, gather(self._lost)), None)
        if lost is not None:
            raise UserError(lost)

    def renew(self) -> None:
        """Show that this process is there. A storage that fails is no loss: who has taken over is seen later."""
        for setting, place in self._places.items():
            try:
                found = place.renew(self._me)
            except UserError as error:
                found = str(error)
            except Exception:  # each client of a storage has its own
                continue
            if found is not None and not self._ended.is_set():
                self._lost = (
                    f"{setting}: this run has lost {place.name}: {found}. It ends without another save; the earlier"
                    " ones stay"
                )

    def release(self) -> None:
        """Give the folders back. Does nothing where there are none (any more)."""
        self._ended.set()
        while self._places:
            _, place = self._places.popitem()
            with suppress(Exception):
                if place.read() == self._me.encode():
                    place.remove()

    def _keep(self) -> None:
        while not self._ended.wait(RENEW_SECONDS) and not self.lost:
            self.renew()

    def _take(self, setting: str, place: Place) -> None:
        for _ in range(ATTEMPTS):
            if place.create(self._me):
                return
            content = place.read()
            if content is None:
                continue  # just given back
            other = Holder.decode(content)
            if other is None:
                raise foreign(f"{place.name}/{NAME}", "not what a run writes")
            why = self._why_free(other, place)
            if why is None:
                another = f", or set another {setting}" if "." in setting else ""
                raise UserError(
                    f"{setting} = {place.name}: another run has it: {other}; wait for it or end it{another} (one that"
                    f" has vanished counts as ended {STALE_SECONDS:.0f} s after its last sign)"
                )
            if place.replace(content, self._me):
                self._say(f"{place.name}: taken over from {other}, {why}")
                return
            time.sleep(RETRY_SECONDS)
        raise UserError(f"{setting} = {place.name}: others take it at the same time; try again")

    def _why_free(self, other: Holder, place: Place) -> str | None:
        """Why a folder may be taken over; None: it may not."""
        if other.ended():
            return "which has ended"
        if other.job and other.job == self._me.job and other.restarts < self._me.restarts:
            return "which is this job before it was queued again"
        age = place.age()
        return f"which has not been heard of for {age:.0f} s" if age is not None and age > STALE_SECONDS else None


@contextmanager
def held(setting: str, folder: Path) -> Iterator[None]:
    """Have a folder for a while. Raises UserError as `Owner.take` does."""
    owner = Owner()
    owner.take({setting: folder})
    try:
        yield
    finally:
        owner.release()
