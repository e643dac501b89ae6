"""Turns documents into token ids, a batch after the other, while the next is read."""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from titanling.data.prepare.encode import Encoded, Encoder

# Characters that are encoded together, by all workers: enough to occupy all cores, little enough to hold the
# encodings in memory.
BATCH_CHARACTERS = 4_000_000
LEAST_CHARACTERS = 250_000


def is_validation(text: str, fraction: float) -> bool:
    """Whether a document belongs to validation: a function of its text alone, so that copies stay together."""
    value = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return value < fraction * 2**64


def encode_ahead(documents: Iterable[str], encode: Encoder, workers: int = 1) -> Iterator[tuple[list[str], Encoded]]:
    """Batches of documents with their ids, by one of `workers`.

    A thread encodes while the batch after it is read and the one before it is used.
    """
    with ThreadPoolExecutor(1) as thread:
        waiting = None
        for batch in batches(documents, max(BATCH_CHARACTERS // workers, min(BATCH_CHARACTERS, LEAST_CHARACTERS))):
            encoding = thread.submit(encode.encode, batch)
            if waiting:
                yield waiting[0], encode.close(*waiting[1].result())
            waiting = batch, encoding
        if waiting:
            yield waiting[0], encode.close(*waiting[1].result())


def choose(documents: Encoded, chosen: np.ndarray) -> Encoded:
    """The documents where `chosen` (documents,) is true."""
    if chosen.all():
        return documents
    return Encoded(documents.ids[np.repeat(chosen, documents.lengths)], documents.lengths[chosen])


def batches(documents: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Consecutive documents, together as soon as they have so many characters."""
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
