"""Looks into token files: one document or window, whether all is well, and what there is of what."""

import os
from dataclasses import dataclass

import numpy as np

from titanling.data.check_files import check_dataset, verify_hashes
from titanling.data.indexed import IndexedDataset, Sidecar
from titanling.data.merge import document_lengths
from titanling.errors import UserError

SCAN_TOKENS = 1 << 24
QUANTILES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


def document_ids(prefix: str, document: int) -> np.ndarray:
    """Token ids of a document (from 0), its end-of-document token included: (tokens,). Raises `UserError`."""
    dataset = IndexedDataset(prefix)
    if not 0 <= document < dataset.num_documents:
        raise UserError(f"{prefix}: has documents 0 … {dataset.num_documents - 1}, no {document}")
    return dataset.document(document)


def sample_ids(prefix: str, sample: int, seq_len: int) -> tuple[np.ndarray, range]:
    """Window `sample` (from 0) of the file in its own order: seq_len + 1 ids; and the documents that it is of.

    The last id is the label of the one before it, and the first one of the next window. Raises `UserError`.
    """
    dataset = IndexedDataset(prefix)
    samples = (dataset.num_tokens - 1) // seq_len
    if not 0 <= sample < samples:
        raise UserError(f"{prefix}: has {samples} samples of {seq_len} tokens, from 0 on, no {sample}")
    start = sample * seq_len
    return dataset.read(start, seq_len + 1), range(dataset.document_at(start), dataset.document_at(start + seq_len) + 1)


def verify(prefix: str) -> Sidecar:
    """Read token files whole: sizes, hashes, ids within the vocabulary, documents that end, and only there, with eod.

    Returns the sidecar. Raises `UserError` for what is wrong first.
    """
    sidecar = check_dataset(prefix, 2**31)
    verify_hashes(prefix)
    dataset = IndexedDataset(prefix)
    tokens = np.memmap(f"{prefix}.bin", dataset.dtype, "r").view(np.ndarray)
    ended = 0
    for start in range(0, len(tokens), SCAN_TOKENS):
        block = tokens[start : start + SCAN_TOKENS]
        outside = (block < 0) | (block >= sidecar.vocab_size)
        if outside.any():
            place = start + int(outside.argmax())
            raise UserError(f"{prefix}.bin: token {place} is {tokens[place]}, beyond the vocabulary; prepare it again")
        ended += int(np.count_nonzero(block == sidecar.eod_id))
    lengths = document_lengths(prefix)
    last = np.cumsum(lengths, dtype=np.int64) - 1
    wrong = tokens[last] != sidecar.eod_id
    if wrong.any():
        document = int(wrong.argmax())
        raise UserError(f"{prefix}: document {document} does not end with token {sidecar.eod_id}; prepare it again")
    if sidecar.bos_id is not None:
        wrong = (tokens[last - lengths + 1] != sidecar.bos_id) | (lengths < 2)
        if wrong.any():
            document = int(wrong.argmax())
            raise UserError(
                f"{prefix}: document {document} does not begin with token {sidecar.bos_id}; prepare it again"
            )
    if ended != sidecar.documents:
        raise UserError(
            f"{prefix}: {ended - sidecar.documents} end-of-document tokens stand within documents; prepare it again"
        )
    return sidecar


@dataclass(frozen=True)
class Stats:
    """What token files hold."""

    sidecar: Sidecar
    mean_length: float
    """Tokens of a document."""
    lengths: dict[float, int]
    """Share of the documents that have at most so many tokens → so many tokens."""

    @property
    def bytes_per_token(self) -> float:
        """Of the text, in UTF-8."""
        return self.sidecar.utf8_bytes / self.sidecar.tokens


def stats(prefix: str) -> Stats:
    """Counts and document lengths; reads the sidecar and the index. Raises `UserError`."""
    sidecar = check_dataset(prefix, 2**31)
    lengths = document_lengths(prefix)
    places = [min(len(lengths) - 1, int(share * len(lengths))) for share in QUANTILES]
    ordered = np.partition(lengths, sorted(set(places)))
    found = {share: int(ordered[place]) for share, place in zip(QUANTILES, places, strict=True)}
    return Stats(sidecar, sidecar.tokens / len(lengths), found)


def tokenizer_beside(prefix: str) -> str:
    """Where `prepare_data.py` puts the tokenizer of these files."""
    return os.path.join(os.path.dirname(prefix), "tokenizer")
