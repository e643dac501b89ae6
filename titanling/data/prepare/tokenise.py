"""Tokenises documents into training and validation files in one pass."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack

from titanling.data.indexed import IndexedWriter, Sidecar, write_sidecar
from titanling.data.prepare.tokenizer import TokenizerFiles
from titanling.errors import UserError

# Characters that are encoded together: enough to occupy all cores, little enough to hold the encodings in memory.
BATCH_CHARACTERS = 4_000_000


def is_validation(text: str, fraction: float) -> bool:
    """Whether a document belongs to validation: a function of its text alone, so that copies stay together."""
    value = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return value < fraction * 2**64


def tokenise(
    documents: Iterable[tuple[str, str]], prefixes: Mapping[str, str], files: TokenizerFiles, source: str
) -> dict[str, Sidecar]:
    """Write one .bin/.idx/.json for each split; return each split's sidecar.

    `documents` yields (split, text); `prefixes` maps each split to write to its prefix, other splits are skipped.
    Every document is closed by the tokenizer's end-of-document token; special tokens written out in a text are
    encoded as plain text. Raises `UserError` if a split receives no document; then nothing is written.
    """
    # Otherwise a text that mentions <|end_of_text|> would end its document there.
    files.tokenizer.encode_special_tokens = True
    utf8_bytes = dict.fromkeys(prefixes, 0)
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(IndexedWriter(prefix, files.vocab_size)) for split, prefix in prefixes.items()
        }
        for batch in _batches((split, text) for split, text in documents if split in prefixes):
            encodings = files.tokenizer.encode_batch_fast([text for _, text in batch], add_special_tokens=False)
            for (split, text), encoding in zip(batch, encodings, strict=True):
                writers[split].add_document([*encoding.ids, files.eod_id])
                utf8_bytes[split] += len(text.encode())
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
