"""Tokenises documents into training and validation files in one pass."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np

from titanling.data.indexed import IndexedWriter, Sidecar, write_sidecar
from titanling.data.prepare.encode import Encoded, Encoder
from titanling.data.prepare.tokenizer import TokenizerFiles
from titanling.errors import UserError

# Characters that are encoded together: enough to occupy all cores, little enough to hold the encodings in memory.
BATCH_CHARACTERS = 4_000_000


def is_validation(text: str, fraction: float) -> bool:
    """Whether a document belongs to validation: a function of its text alone, so that copies stay together."""
    value = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return value < fraction * 2**64


def tokenise(
    documents: Iterable[tuple[str, str]],
    prefixes: Mapping[str, str],
    files: TokenizerFiles,
    source: str,
    encode: Encoder | None = None,
) -> dict[str, Sidecar]:
    """Write one .bin/.idx/.json for each split; return each split's sidecar.

    `documents` yields (split, text); `prefixes` maps each split to write to its prefix, other splits are skipped.
    Every document is closed by the tokenizer's end-of-document token; special tokens written out in a text are
    encoded as plain text. `encode` is an `Encoder(files)` unless given. Raises `UserError` if a split receives no
    document; then nothing is written.
    """
    encode = encode or Encoder(files)
    utf8_bytes = dict.fromkeys(prefixes, 0)
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(IndexedWriter(prefix, files.vocab_size)) for split, prefix in prefixes.items()
        }
        batches = _batches((split, text) for split, text in documents if split in prefixes)
        for batch, encoded in _encode_ahead(batches, encode):
            for split, writer in writers.items():
                chosen = np.array([its == split for its, _ in batch])
                writer.add_documents(*(encoded if chosen.all() else _choose(encoded, chosen)))
                utf8_bytes[split] += sum(len(text.encode()) for its, text in batch if its == split)
        for split, writer in writers.items():
            if not writer.num_documents:
                raise UserError(
                    f"data.prepare.text: no document falls into {split} ({prefixes[split]}); give more files, or"
                    " change data.prepare.validation_fraction"
                )
    written = {}
    for split, writer in writers.items():
        written[split] = writer.sidecar(files.sha256, files.eod_id, utf8_bytes[split], source)
        write_sidecar(prefixes[split], written[split])
    return written


def _encode_ahead(
    batches: Iterable[list[tuple[str, str]]], encode: Encoder
) -> Iterator[tuple[list[tuple[str, str]], Encoded]]:
    """Each batch with its ids. A thread encodes while the batch after it is read and the one before it written."""
    with ThreadPoolExecutor(1) as thread:
        waiting = None
        for batch in batches:
            encoding = thread.submit(encode.encode, [text for _, text in batch])
            if waiting:
                yield waiting[0], encode.close(*waiting[1].result())
            waiting = batch, encoding
        if waiting:
            yield waiting[0], encode.close(*waiting[1].result())


def _choose(documents: Encoded, chosen: np.ndarray) -> Encoded:
    """The documents where `chosen` (documents,) is true."""
    return Encoded(documents.ids[np.repeat(chosen, documents.lengths)], documents.lengths[chosen])


def _batches(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch: list[tuple[str, str]] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document[1])
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
