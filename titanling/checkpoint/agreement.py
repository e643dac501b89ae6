"""How the ranks' background threads agree, while the collectives belong to the training step."""

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from titanling.parallel.mesh import World

# No limit of its own: how long a disk takes is not known, and a rank that is lost ends the run by its collectives.
PATIENCE = timedelta(days=30)


class Agreement:
    """Rank 0 decides on what all ranks report, through a connection of its own to the store that the ranks met in."""

    def __init__(self, world: World) -> None:
        self._rank, self._size = world.rank, world.size
        self._store = None if world.store is None else dist.PrefixStore("checkpoint", world.store.clone())
        self._decisions = 0
        self._said: list[str] = []

    def decide(self, report: Any, decision: Callable[[list[Any]], Any]) -> Any:
        """Rank 0's `decision` on all ranks' reports, in rank order, on every rank; all JSON.

        All ranks call it equally often. `decision` is called on rank 0 only and must not raise.
        """
        if self._store is None:
            return decision([report])
        self._decisions += 1
        topic = str(self._decisions)
        keys = [f"{topic}/{rank}" for rank in range(self._size)]
        self._store.set(keys[self._rank], json.dumps(report))
        if self._rank == 0:
            self._store.wait(keys, PATIENCE)
            outcome = decision([json.loads(value) for value in self._store.multi_get(keys)])
            self._store.set(topic, json.dumps(outcome))
            self._forget(keys, topic)
        self._store.wait([topic], PATIENCE)
        return json.loads(self._store.get(topic))

    def _forget(self, keys: list[str], topic: str) -> None:
        """Delete the reports and earlier decisions: who has reported to this one has heard those."""
        assert self._store is not None
        for key in keys + self._said:
            self._store.delete_key(key)
        self._said = [topic]
