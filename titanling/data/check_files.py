"""Are token files what they were when they were made, and do they suit a run? Free of torch."""

import os

import numpy as np

from titanling.data.ids import ids_path
from titanling.data.indexed import PREPARE_AGAIN, IndexedDataset, Sidecar, file_sha256, read_sidecar
from titanling.data.tokenfile import CHUNK
from titanling.errors import UserError

SMALL_BYTES = 1 << 24
"""What is soon read whole."""


def check_dataset(prefix: str, vocab_size: int, tokenizer_sha256: str | None = None) -> Sidecar:
    """Check that the token files of `prefix` are whole and suit a model; return their sidecar. Reads no tokens.

    `vocab_size` is the model's; `tokenizer_sha256` that of the run's tokenizer.json, None if it has none.
    Raises `UserError`.
    """
    sidecar = read_sidecar(prefix)
    dataset = IndexedDataset(prefix)
    try:
        check_index(dataset)
        _check_content(dataset, sidecar)
    finally:
        dataset.close()
    found, said = (dataset.num_documents, dataset.num_tokens), (sidecar.documents, sidecar.tokens)
    if found != said:
        raise UserError(
            f"{prefix}.idx: {found[0]} documents, {found[1]} tokens, but {prefix}.json says {said[0]}, {said[1]};"
            f" {PREPARE_AGAIN}"
        )
    if tokenizer_sha256 not in (None, sidecar.tokenizer_sha256):
        raise UserError(
            f"{prefix}.json: the data was tokenised with another tokenizer than the run's (tokenizer.json"
            f" {sidecar.tokenizer_sha256[:12]}…, not {tokenizer_sha256[:12]}…); correct model.hf_assets_path,"
            " or prepare the data again under another prefix"
        )
    if sidecar.vocab_size > vocab_size:
        raise UserError(
            f"{prefix}.json: token ids reach {sidecar.vocab_size - 1}, beyond the model's vocabulary;"
            f" set model.vocab_size to {sidecar.vocab_size} or more (now {vocab_size})"
        )
    return sidecar


def _check_content(dataset: IndexedDataset, sidecar: Sidecar) -> None:
    """Compare files with the sampled hashes of their sidecar, or if it has none, small ones with the whole ones."""
    sampled = {"bin": (dataset, sidecar.bin_sample), "idx": (dataset.index, sidecar.idx_sample)}
    for suffix, (file, expected) in sampled.items():
        path = f"{dataset.prefix}.{suffix}"
        if expected is not None:
            differs = file.sample() != expected
        else:
            small = os.path.getsize(path) <= SMALL_BYTES
            differs = small and file_sha256(path) != getattr(sidecar, f"{suffix}_sha256")
        if differs:
            raise UserError(
                f"{path}: holds something else than when it was made, its hash is not the one in {dataset.prefix}.json;"
                f" restore it, or {PREPARE_AGAIN}"
            )


def check_index(dataset: IndexedDataset) -> None:
    """Read the index whole: raise `UserError` unless its documents follow each other from end to end of `.bin`."""
    expected, width = 0, dataset.dtype.itemsize
    for start in range(0, len(dataset.lengths), CHUNK):
        lengths = dataset.lengths[start : start + CHUNK].astype(np.int64)
        ends = expected + np.cumsum(lengths) * width
        wrong = (lengths < 0) | (dataset.pointers[start : start + CHUNK] != ends - lengths * width)
        if wrong.any():
            raise _bad_index(dataset.prefix, f"sequence {start + int(wrong.argmax())} does not begin where it must")
        expected = int(ends[-1])
    last = 0
    for start in range(0, dataset.num_documents + 1, CHUNK):
        documents = dataset.documents[start : start + CHUNK]
        wrong = np.diff(documents, prepend=last) < 0
        wrong[0] |= start == 0 and documents[0] != 0
        if wrong.any():
            raise _bad_index(dataset.prefix, f"document {start + int(wrong.argmax())} does not begin where it must")
        last = int(documents[-1])


def _bad_index(prefix: str, what: str) -> UserError:
    remedy = PREPARE_AGAIN if os.path.exists(f"{prefix}.json") else "restore both files, or make them again"
    return UserError(f"{prefix}.idx: damaged: {what}; {remedy}")


def verify_hashes(prefix: str) -> None:
    """Read the files whole and compare them with the sidecar's hashes. Raises `UserError` naming the damaged one."""
    sidecar = read_sidecar(prefix)
    bin_path, idx_path = f"{prefix}.bin", f"{prefix}.idx"
    hashes = {bin_path: sidecar.bin_sha256, idx_path: sidecar.idx_sha256, ids_path(prefix): sidecar.ids_sha256}
    for path, expected in hashes.items():
        if expected is not None and not os.path.isfile(path):
            raise UserError(f"{path}: no such file, though {prefix}.json says its hash; copy it too, or prepare again")
        if expected is not None and file_sha256(path) != expected:
            raise UserError(f"{path}: damaged, its SHA-256 is not the one in {prefix}.json; {PREPARE_AGAIN}")
