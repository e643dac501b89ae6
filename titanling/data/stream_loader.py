"""Batches of streaming sources for the trainer, read by a thread or by worker processes, resumable exactly."""

import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from titanling.data.loader import Batch, Prefetcher
from titanling.data.sources import MUCH, whole_batch
from titanling.data.streaming import FORK, Place, Streams
from titanling.errors import UserError
from titanling.stop import GRACEFUL

AHEAD = 8
"""Batches that are ready before they are asked for, of each worker: reading a block of documents takes long."""
WATCH_SECONDS = 2
Item = tuple[np.ndarray | str, list[int]]
"""Tokens (local_batch_size, seq_len + 1), or what a worker's UserError says; epoch of each source."""


class StreamRows(IterableDataset):
    """The endless stream of one worker's micro-batches, with the places of its streams as its state.

    Micro-batch after micro-batch, a rank's workers take turns; so each knows which of the run's samples its rows are,
    and of which source. Yields `Item`s: arrays, for torch's tensors would need shared memory.
    """

    def __init__(self, streams: Streams, local_batch_size: int, dp_rank: int, dp_world: int) -> None:
        super().__init__()
        self.streams = streams
        self.local_batch_size = local_batch_size
        self.dp_rank, self.dp_world = dp_rank, dp_world
        self._state: dict[str, Any] = {"batches": 0, "places": {}}

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        if worker is not None:
            yield from self._give(self._read(worker.id, worker.num_workers))
            return
        prefetcher = Prefetcher(self._read(0, 1), AHEAD)
        try:
            yield from self._give(prefetcher)
        finally:
            prefetcher.close()

    def state_dict(self) -> dict[str, Any]:
        """Micro-batches handed out, and where each source stands then; those that were read ahead do not count."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there. An iterator that is open is of no more use; take a new one.

        Raises KeyError, TypeError, ValueError or AttributeError for a state that is none.
        """
        places = {name: list(Place(*map(int, place))) for name, place in state["places"].items()}
        self._state = {"batches": int(state["batches"]), "places": places}

    def _give(self, items: Iterator[tuple[Item, dict[str, Any]]]) -> Iterator[Item]:
        for item, self._state in items:
            yield item

    def _read(self, worker: int, workers: int) -> Iterator[tuple[Item, dict[str, Any]]]:
        batches, size = self._state["batches"], self.local_batch_size
        try:
            shard, shards = self.dp_rank * workers + worker, self.dp_world * workers
            streams = self.streams.open(shard, shards, self._state["places"])
            while True:
                first = ((batches * workers + worker) * self.dp_world + self.dp_rank) * size
                sources, _ = self.streams.mixture.locate(first + np.arange(size))
                rows = np.stack([streams[source].window() for source in sources])
                batches += 1
                places = [stream.place for stream in streams]
                names = [source.name for source in self.streams.sources]
                state = {"batches": batches, "places": dict(zip(names, map(list, places), strict=True))}
                yield (rows, [place.epoch for place in places]), state
        except UserError as error:
            while True:  # an exception would come out of a worker as pages of traceback
                yield (str(error), []), self._state


class StreamLoader:
    """torchdata's loader around `StreamRows`; iterating yields batches as those of token files are.

    `say` is told when a source begins a new epoch. Iterating raises UserError. Its state is this rank's own, JSON, and
    may be loaded where there are as many ranks and workers.
    """

    def __init__(self, rows: StreamRows, say: Callable[[str], None]) -> None:
        self._names = [source.name for source in rows.streams.sources]
        self._say = say
        self._begun: Iterator[Item] | None = None
        workers = rows.streams.workers
        with warnings.catch_warnings():
            # torchdata 0.11 calls a function that torch 2.13 deprecates.
            warnings.filterwarnings("ignore", message=".*set_vital.*")
            self._loader = StatefulDataLoader(
                rows,
                batch_size=None,
                num_workers=workers,
                collate_fn=_as_it_is,
                worker_init_fn=_begin_worker if workers else None,
                prefetch_factor=AHEAD if workers else None,
                multiprocessing_context=FORK if workers else None,
            )

    def __iter__(self) -> Iterator[Batch]:
        items, self._begun = iter(self._loader) if self._begun is None else self._begun, None
        known: list[int] | None = None
        for rows, epochs in items:
            if isinstance(rows, str):
                raise UserError(rows)
            for name, epoch, before in zip(self._names, epochs, known or epochs, strict=True):
                if epoch > before:
                    much = f"; more than {MUCH} times teaches less than new text" if epoch == MUCH else ""
                    self._say(f'data: "{name}" is read for the {_ordinal(epoch + 1)} time{much}')
            known = list(map(max, epochs, known or epochs))
            yield {name: torch.from_numpy(array) for name, array in whole_batch(rows).items()}

    def state_dict(self) -> dict[str, Any]:
        """Where this rank stands after the batches handed out."""
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there, with the next iterator. Raises what `StreamRows` does, and AssertionError."""
        self._loader.load_state_dict(state)
        self._begun = iter(self._loader)


def build_stream_loader(
    streams: Streams, local_batch_size: int, say: Callable[[str], None], dp_rank: int = 0, dp_world: int = 1
) -> StreamLoader:
    """The loader of one data-parallel rank."""
    return StreamLoader(StreamRows(streams, local_batch_size, dp_rank, dp_world), say)


def _ordinal(number: int) -> str:
    ending = "th" if 10 < number % 100 < 14 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _as_it_is(item: Item) -> Item:
    return item


def _begin_worker(worker: int) -> None:
    """One thread for each worker, and none of the signals that ask the run to stop: its last batches are needed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    for number in GRACEFUL:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_heed_the_rank, args=(os.getppid(),), name="signals", daemon=True).start()


def _heed_the_rank(rank: int) -> None:
    """End this worker when its rank, that process, says so or is gone: torch's own worker waits for its full queue.

    A scheduler sends SIGTERM to all processes; only the rank's means that the worker is no longer needed.
    """
    while os.getppid() == rank:
        info = signal.sigtimedwait({signal.SIGTERM}, WATCH_SECONDS)
        if info is not None and info.si_pid == rank:
            break
    os._exit(0)
