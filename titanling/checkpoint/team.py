"""The processes of one conversion: what torchrun starts, or a single one. They share a store and no collectives."""

from collections.abc import Callable
from datetime import timedelta

import torch

from titanling.checkpoint.agreement import Agreement
from titanling.config.schema import Comm
from titanling.errors import UserError
from titanling.parallel.degrees import Degrees
from titanling.parallel.mesh import World
from titanling.parallel.rendezvous import rendezvous
from titanling.ranks import this_process

FAREWELL = timedelta(seconds=60)


class Team:
    """This process among those of a conversion: `rank` of `size`. All call `act` and `leave` together."""

    def __init__(self) -> None:
        """Meet the others. Raises UserError if some do not come."""
        place = this_process()
        self.rank, self.size = place.rank, place.size
        timeout = timedelta(seconds=Comm().init_timeout_seconds)
        self._store = rendezvous(self.rank, self.size, timeout) if self.size > 1 else None
        degrees = Degrees(dp_shard=self.size)
        self._agreement = Agreement(World(self.rank, self.size, torch.device("cpu"), degrees, store=self._store))

    def act(self, action: Callable[[], object], then: Callable[[], object] | None = None) -> None:
        """Do something on every process, then, if it succeeded everywhere, something on rank 0.

        Raises UserError on all if one of them did; any other exception is raised where it happened, and named to the
        others in a UserError.
        """
        bug: BaseException | None = None
        error: str | None = None
        try:
            action()
        except UserError as problem:
            error = str(problem)
        except BaseException as problem:
            error, bug = f"rank {self.rank} of the conversion failed: {type(problem).__name__}: {problem}", problem

        def decide(errors: list[str | None]) -> str | None:
            nonlocal bug
            found = next((text for text in errors if text is not None), None)
            if found is None and then is not None:
                try:
                    then()
                except UserError as problem:
                    return str(problem)
                except BaseException as problem:
                    bug = problem
                    return f"rank 0 of the conversion failed: {type(problem).__name__}: {problem}"
            return found

        outcome = self._agreement.decide(error, decide)
        if bug is not None:
            raise bug
        if outcome is not None:
            raise UserError(outcome)

    def share(self, value: str) -> str:
        """What rank 0 gave here, on every process."""
        return self._agreement.decide(value, lambda values: values[0])

    def leave(self) -> None:
        """Rank 0, which may keep the store, waits until the others need it no more."""
        if self._store is None:
            return
        self._store.set(f"left/{self.rank}", "")
        if self.rank == 0:
            self._store.wait([f"left/{rank}" for rank in range(self.size)], FAREWELL)
