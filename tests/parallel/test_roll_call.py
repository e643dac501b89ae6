"""How a rank leaves: with none of its threads left in the store, whatever the machine is busy with."""

import time
from datetime import timedelta

import torch.distributed as dist

from titanling.parallel import roll_call
from titanling.parallel.roll_call import RollCall


class SlowStore:
    """A store whose answers come late, as to a thread that waits for its turn."""

    def __init__(self, store: dist.Store, delay: float) -> None:
        self._store, self._delay = store, delay

    def clone(self) -> "SlowStore":
        return SlowStore(self._store.clone(), self._delay)

    def set(self, key: str, value: str) -> None:
        self._store.set(key, value)

    def add(self, key: str, amount: int) -> int:
        return self._store.add(key, amount)

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        self._store.wait(keys, timeout)
        time.sleep(self._delay)


def test_a_rank_that_leaves_waits_for_its_threads() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    call = RollCall(SlowStore(store, 3 * roll_call.ANSWER_SECONDS), rank=0, size=1, patience=60)
    call.close()
    assert not call._thread.is_alive()
