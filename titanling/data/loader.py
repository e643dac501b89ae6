"""Batches for the trainer, of the run's samples in order.

Any rank at any world size and any step finds its samples in O(1); the only state is the number of samples consumed.
"""

import queue
import threading
import warnings
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from titanling.data.damage import check_ids, place_of_sample
from titanling.data.held_out import validation_starts
from titanling.data.packing import Arrays
from titanling.data.sources import MixedSource, WindowSource, whole_batch
from titanling.data.token_files import Tokens
from titanling.loss import IGNORE_INDEX

Batch = dict[str, torch.Tensor]

PREFETCH = 2
# At most so many rows and tokens are ordered, read and handed from thread to thread together: each of the three has a
# cost per call.
READ_ROWS = 64
READ_TOKENS = 1 << 17
STOP_SECONDS = 5.0


class BatchStream(IterableDataset):
    """The endless stream of one data-parallel rank's micro-batches, with the global position as its state.

    Micro-batch after micro-batch, all ranks together take the next `local_batch_size × dp_world` samples, rank r the
    r-th `local_batch_size` of them: the order of the samples depends neither on the world size nor on accumulation.

    Yields {"input_ids", "labels"}: int64 CPU tensors (local_batch_size, seq_len), labels one token ahead; packed with
    document masks, also their "positions". The next batches are read by one daemon thread, which ends with its
    iterator; what it raises is raised by the iterator.
    """

    def __init__(
        self,
        source: MixedSource | WindowSource,
        local_batch_size: int,
        dp_rank: int = 0,
        dp_world: int = 1,
        vocab_size: int | None = None,
    ) -> None:
        """With `vocab_size`, an id beyond it is a UserError."""
        super().__init__()
        self.source = source
        self.vocab_size = vocab_size
        self._whole = all(each.packing == "concat" for each in getattr(source, "sources", [source]))
        self.local_batch_size = local_batch_size
        self.dp_rank = dp_rank
        self.dp_world = dp_world
        self.samples = 0
        """Global samples handed out so far; prefetched ones do not count."""
        self._prefetcher: Prefetcher | None = None

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        prefetcher = self._prefetcher = Prefetcher(self._read_from(self.samples))
        try:
            for read in prefetcher:
                for arrays in zip(*read.values(), strict=True):
                    if prefetcher.closed:
                        return
                    self.samples += self.local_batch_size * self.dp_world
                    yield dict(zip(read, map(torch.from_numpy, arrays), strict=True))
        finally:
            prefetcher.close()

    def state_dict(self) -> dict[str, int]:
        """{"samples": global samples handed out}. Valid at any world size and batch size."""
        return {"samples": self.samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after `state["samples"]` samples. An iterator that is open ends; take a new one."""
        self.close()
        self.samples = int(state["samples"])

    def close(self) -> None:
        """End the open iterator, if any, and its thread."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None

    def _read_from(self, first: int) -> Iterator[Arrays]:
        """Several micro-batches at a time: arrays (batches, local_batch_size, seq_len)."""
        stride = self.local_batch_size * self.dp_world
        rows = min(READ_ROWS, READ_TOKENS // self.source.seq_len)
        batches = max(1, rows // self.local_batch_size)
        begins = self.dp_rank * self.local_batch_size + stride * np.arange(batches)
        block = (begins[:, None] + np.arange(self.local_batch_size)).reshape(-1)
        shape = (batches, self.local_batch_size, self.source.seq_len)
        while True:
            batch = self.source.batch(first + block)
            if self.vocab_size is not None:
                check_ids(batch, self.vocab_size, partial(self._place_of, first + block), self._whole)
            yield {name: array.reshape(shape) for name, array in batch.items()}
            first += stride * batches

    def _place_of(self, samples: np.ndarray, row: int, place: int) -> tuple[Tokens, int, str]:
        return place_of_sample(self.source, int(samples[row]), place)


def build_loader(
    source: MixedSource | WindowSource,
    local_batch_size: int,
    dp_rank: int = 0,
    dp_world: int = 1,
    vocab_size: int | None = None,
) -> StatefulDataLoader:
    """torchdata's loader around a `BatchStream` (its `.dataset`): in process, no worker processes, no collation.

    Its state is small and JSON-serialisable, the same on all ranks, and may be loaded at another world size.
    """
    stream = BatchStream(source, local_batch_size, dp_rank, dp_world, vocab_size)
    with warnings.catch_warnings():
        # torchdata 0.11 calls a function that torch 2.13 deprecates.
        warnings.filterwarnings("ignore", message=".*set_vital.*")
        return StatefulDataLoader(stream, batch_size=None, num_workers=0)


def cut_rows(batch: Batch, seq_len: int | None) -> Batch:
    """The batch with each row cut into rows of `seq_len` tokens, which see nothing of each other; None: as it is.

    Raises RuntimeError if the rows cannot be divided so.
    """
    if seq_len is None:
        return batch
    rows = {name: tensor.reshape(-1, seq_len) for name, tensor in batch.items()}
    if "positions" in rows:  # of a document that began in an earlier row, a row has what comes then, from 0 on
        rows["positions"] = torch.minimum(rows["positions"], torch.arange(seq_len))
    return rows


def validation_batches(
    dataset: Tokens,
    seq_len: int,
    local_batch_size: int,
    num_batches: int = -1,
    dp_rank: int = 0,
    dp_world: int = 1,
    vocab_size: int | None = None,
) -> Iterator[Batch]:
    """The fixed validation set: `num_batches × local_batch_size` windows spread evenly over the file (-1: all).

    The set is the same at any world size. Every rank yields the same number of batches, as collectives need, in the
    form of `BatchStream`'s; rows beyond the set have all labels IGNORE_INDEX.
    """
    starts = validation_starts(dataset, seq_len, local_batch_size, num_batches)
    return _validation_rows(dataset, seq_len, starts, local_batch_size, dp_rank, dp_world, vocab_size)


def _validation_rows(
    dataset: Tokens,
    seq_len: int,
    starts: np.ndarray,
    local_batch_size: int,
    dp_rank: int,
    dp_world: int,
    vocab_size: int | None,
) -> Iterator[Batch]:
    for first in range(0, len(starts), local_batch_size * dp_world):
        rows = first + dp_rank * local_batch_size + np.arange(local_batch_size)
        beyond = rows >= len(starts)
        places = starts[np.where(beyond, 0, rows)]
        batch = whole_batch(dataset.read_rows(places, seq_len + 1))
        if vocab_size is not None:
            check_ids(batch, vocab_size, lambda row, place: (dataset, int(places[row]) + place, "of validation"))  # noqa: B023
        batch["labels"][beyond] = IGNORE_INDEX
        yield {name: torch.from_numpy(array) for name, array in batch.items()}


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


class Prefetcher:
    """Iterates over `items` in a daemon thread, so many `ahead`, until closed, dropped or the interpreter exits."""

    def __init__(self, items: Iterator, ahead: int = PREFETCH) -> None:
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue = queue.SimpleQueue()
        for _ in range(ahead):
            self._wanted.put(True)
        thread = threading.Thread(
            target=_produce, args=(items, self._wanted, self._ready), name="data-prefetch", daemon=True
        )
        # The finalizer must not refer to self: it also runs when self is dropped, and at exit while threads still live.
        self._finalizer = weakref.finalize(self, _stop, thread, self._wanted)
        thread.start()

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> Any:
        if self.closed:
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, _Failure):
            self.close()
            raise item.error
        self._wanted.put(True)
        return item

    @property
    def closed(self) -> bool:
        """Whether the thread has been told to stop."""
        return not self._finalizer.alive

    def close(self) -> None:
        """Stop the thread and wait for its end, but not for long: what it reads may be minutes away."""
        self._finalizer()


def _produce(items: Iterator, wanted: "queue.SimpleQueue[bool]", ready: queue.SimpleQueue) -> None:
    """Make one item for each True in `wanted`, until a False."""
    try:
        while wanted.get():
            ready.put(next(items))
    except BaseException as error:
        ready.put(_Failure(error))


def _stop(thread: threading.Thread, wanted: "queue.SimpleQueue[bool]") -> None:
    wanted.put(False)
    if thread is not threading.current_thread():  # garbage collection may run this in the thread itself
        thread.join(STOP_SECONDS)
