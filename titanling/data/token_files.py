"""Token files of any kind, as a run reads them: ours with their sidecar, and those of others without. Free of torch.

What our sidecar tells comes from elsewhere for the others: the end-of-document id from data.eod_id, that the ids suit
the model from samples of them, the identity of a file from its size and its two ends. Their tokenizer is not known.
"""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from titanling.config.schema import Data
from titanling.data.check_files import check_dataset, check_index
from titanling.data.indexed import PREPARE_AGAIN, IndexedDataset, Sidecar, read_sidecar
from titanling.data.raw import SUFFIXES, NumpyTokens, RawTokens, open_tokens
from titanling.errors import UserError

BEGINNINGS = 2
"""Documents whose beginnings tell whether a token begins each."""
SAMPLES, SAMPLE_TOKENS = 16, 4096
"""Pieces of a file whose ids are looked at."""
END_BYTES = 1 << 20
"""Of each end of a file, for its identity."""
READERS = 16

Tokens = IndexedDataset | RawTokens


class Facts(NamedTuple):
    """What is known of token files beside their tokens."""

    tokens: int
    eod_id: int
    bos_id: int | None = None
    """What each document begins with; None: nothing does, or it is not known."""
    tokenizer_sha256: str | None = None
    """Of tokenizer.json; None: not known."""
    utf8_bytes: int | None = None
    """Of the text; None: not known."""
    unigram_entropy: float | None = None
    """In nats per token; None: not known."""


def is_foreign(prefix: str) -> bool:
    """Whether these are token files of others, which have no sidecar: .ds, .npy, or a .bin and .idx of Megatron's.

    What our preparation has not finished is not.
    """
    if prefix.endswith(SUFFIXES):
        return True
    ours = (f"{prefix}.json", f"{prefix}.json.partial")
    return os.path.isfile(f"{prefix}.bin") and not any(map(os.path.exists, ours))


def tokens_path(prefix: str) -> str:
    """The file that holds the tokens."""
    return prefix if prefix.endswith(SUFFIXES) else f"{prefix}.bin"


def open_files(prefix: str, data: Data) -> Tokens:
    """Open token files of any kind; reads none of their tokens. Raises UserError: missing, damaged, no data.eod_id."""
    if is_foreign(prefix):
        _eod_id(prefix, data)
    return open_tokens(prefix, data.eod_id, data.npy_dtype)


def facts(prefix: str, data: Data) -> Facts:
    """What is known of token files. Raises UserError as `open_files`, or for a malformed sidecar."""
    if not is_foreign(prefix):
        return _known(read_sidecar(prefix))
    dataset = open_files(prefix, data)
    dataset.close()
    return Facts(dataset.num_tokens, _eod_id(prefix, data), data.bos_id)


def _known(sidecar: Sidecar) -> Facts:
    tokenizer, utf8_bytes, entropy = sidecar.tokenizer_sha256, sidecar.utf8_bytes, sidecar.unigram_entropy
    return Facts(sidecar.tokens, sidecar.eod_id, sidecar.bos_id, tokenizer, utf8_bytes, entropy)


def check_files(prefix: str, data: Data, vocab_size: int, tokenizer_sha256: str | None) -> Facts:
    """Check that token files are whole and suit a model and, where theirs is known, the tokenizer of a run.

    Of the files of others, pieces are read. Raises UserError.
    """
    if is_foreign(prefix):
        _check_foreign(prefix, data, vocab_size)
        found = facts(prefix, data)
    else:
        found = _known(check_dataset(prefix, vocab_size, tokenizer_sha256))
        dataset = IndexedDataset(prefix)
        try:
            what = f"{found.eod_id}, which {prefix}.json says ends documents; restore both, or {PREPARE_AGAIN}"
            _check_ends(dataset, found.eod_id, what)
        finally:
            dataset.close()
    if data.eod_id not in (None, found.eod_id):
        raise UserError(
            f"data.eod_id = {data.eod_id}: {prefix}.json says that {found.eod_id} ends its documents; all files of"
            " a run must be of one tokenizer"
        )
    if data.bos_id not in (None, found.bos_id):
        says = "nothing" if found.bos_id is None else found.bos_id
        raise UserError(f"data.bos_id = {data.bos_id}: {prefix}.json says that {says} begins its documents; unset it")
    return found


def bos_of(prefix: str, data: Data, tokenizer_bos: int | None) -> int | None:
    """Id of the token that begins each document of token files; None: nothing does, or it is not known.

    Ours say so. Of those of others data.bos_id does, or it is `tokenizer_bos`, that of the run's tokenizer, if samples
    of the documents begin with it. Raises UserError if they do not begin with data.bos_id.
    """
    if not is_foreign(prefix):
        return read_sidecar(prefix).bos_id
    wanted = tokenizer_bos if data.bos_id is None else data.bos_id
    if wanted is None:
        return None
    dataset = open_files(prefix, data)
    try:
        tokens = _samples(dataset)
    finally:
        dataset.close()
    # The first of the file, and what comes behind the end of another.
    firsts = np.append(tokens[:, 1:][tokens[:, :-1] == _eod_id(prefix, data)], tokens[0, 0])
    if data.bos_id is not None:
        other = firsts[firsts != data.bos_id]
        if len(other):
            raise UserError(
                f"data.bos_id = {data.bos_id}: a document of {tokens_path(prefix)} begins with {other[0]}; correct or"
                " unset it"
            )
        return data.bos_id
    return wanted if len(firsts) >= BEGINNINGS and (firsts == wanted).all() else None


def hashes(prefix: str) -> dict[str, str]:
    """What tells token files from others, for a checkpoint to be compared with.

    Ours have the hashes of their sidecar. For those of others, whole files would take too long to read: it is the hash
    of a file's size and of its first and last MiB.
    """
    if not is_foreign(prefix):
        sidecar = read_sidecar(prefix)
        return {"bin_sha256": sidecar.bin_sha256, "idx_sha256": sidecar.idx_sha256}
    index = {".ds": f"{prefix}.index", ".npy": None}.get(os.path.splitext(prefix)[1], f"{prefix}.idx")
    return {"bin_sha256": _hash_of_ends(tokens_path(prefix)), "idx_sha256": _hash_of_ends(index) if index else ""}


def content_of(dataset: Tokens) -> dict[str, Any]:
    """What tells the content of open token files from any other, JSON; they are compared with it while they are read.

    Raises UserError if they cannot be read.
    """
    index = getattr(dataset, "index", None)
    content = {"path": tokens_path(dataset.prefix), "tokens": dataset.num_tokens, "sample": dataset.sample()}
    return content if index is None else content | {"index": index.sample()}


def contents_of(datasets: Sequence[Tokens]) -> list[dict[str, Any]]:
    """`content_of` each."""
    if len(datasets) == 1:
        return [content_of(datasets[0])]
    with ThreadPoolExecutor(READERS) as pool:  # a network's file system answers many at a time as soon as one
        return list(pool.map(content_of, datasets))


def _eod_id(prefix: str, data: Data) -> int:
    if data.eod_id is None:
        remedy = "set data.eod_id, the id of the token that ends a document"
        if prefix.endswith(SUFFIXES):
            raise UserError(f"{prefix}: does not say where its documents end; {remedy}")
        raise UserError(
            f"{prefix}.json: no such file, so {prefix}.bin is unfinished or foreign; prepare it (prepare_data.py) or,"
            f" if Megatron has made it, {remedy}"
        )
    return data.eod_id


def _check_foreign(prefix: str, data: Data, vocab_size: int) -> None:
    dataset = open_files(prefix, data)
    try:
        if isinstance(dataset, IndexedDataset):
            check_index(dataset)
        _check_ids(dataset, data, vocab_size)
        if data.document_mask != "none" and not isinstance(dataset, NumpyTokens):  # which are cut at that id
            what = (
                f"data.eod_id = {data.eod_id},"
                ' by which data.document_mask = "causal" tells documents apart; correct it, or write the files'
                " with an end-of-document token (Megatron's --append-eod)"
            )
            _check_ends(dataset, _eod_id(prefix, data), what)
    finally:
        dataset.close()


def _samples(dataset: Tokens) -> np.ndarray:
    """Pieces spread evenly over a file, from its first token on: (pieces, tokens)."""
    count = min(SAMPLE_TOKENS, dataset.num_tokens)
    starts = np.linspace(0, dataset.num_tokens - count, SAMPLES).astype(np.int64)
    return dataset.read_rows(np.unique(starts), count)


def _check_ids(dataset: Tokens, data: Data, vocab_size: int) -> None:
    path, tokens = tokens_path(dataset.prefix), _samples(dataset)
    wrong = tokens[(tokens < 0) | (tokens >= vocab_size)]
    other = "uint32" if data.npy_dtype == "uint16" else "uint16"
    if len(wrong):
        hint = f", or data.npy_dtype to {other}" if path.endswith(".npy") else ""
        raise UserError(
            f"{path}: has the token id {wrong[0]}, beyond the model's vocabulary of {vocab_size}; correct"
            f" model.vocab_size or the path{hint}"
        )
    # The upper halves of small numbers: every second of what is taken for tokens.
    if path.endswith(".npy") and dataset.dtype.itemsize == 2 and (tokens[0, 1::2] <= vocab_size >> 16).all():
        raise UserError(f'{path}: every second token is 0, or nearly, as of uint32; set data.npy_dtype = "uint32"')


def _check_ends(dataset: Tokens, eod_id: int, what: str) -> None:
    """Documents are told apart by their last token: look whether it is there, at some of them."""
    for document in sorted({0, dataset.num_documents // 2, dataset.num_documents - 1}):
        last = dataset.document(document)[-1:].tolist()
        if last != [eod_id]:
            raise UserError(f"{tokens_path(dataset.prefix)}: document {document} ends with {last}, not with {what}")


def _hash_of_ends(path: str) -> str:
    size = os.path.getsize(path)
    digest = hashlib.sha256(f"{size} ".encode())
    with open(path, "rb") as file:
        digest.update(file.read(END_BYTES))
        file.seek(max(0, size - END_BYTES))
        digest.update(file.read())
    return digest.hexdigest()
