"""Joins parts, in order, to the token files of each split."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import numpy as np

from titanling.data.ids import write_ids
from titanling.data.indexed import DTYPES, FLUSH_TOKENS, IndexedWriter, Sidecar, dtype_code, write_sidecar
from titanling.data.prepare.parts import read_array, read_counts
from titanling.data.prepare.tokenizer import TokenizerFiles
from titanling.errors import UserError


def join_parts(
    parts: Sequence[str],
    prefixes: Mapping[str, str],
    files: TokenizerFiles,
    source: str,
    before_sidecars: Callable[[], None] = lambda: None,
    may_be_empty: bool = False,
    with_ids: bool = False,
    bos_id: int | None = None,
) -> dict[str, Sidecar | None]:
    """Write .bin/.idx/.json of each split (split → prefix) by copying the parts; return the sidecars.

    With `with_ids`, .ids.jsonl too. `bos_id` is what each document begins with, if anything.

    `before_sidecars` is called when only these are missing. Raises `UserError` if a split receives no document; then
    nothing is written. With `may_be_empty`, an empty file PREFIX.empty says so instead.
    """
    utf8_bytes = dict.fromkeys(prefixes, 0)
    filled = dict.fromkeys(prefixes, 0)
    for counts in map(read_counts, parts):
        for split in prefixes:
            utf8_bytes[split] += counts["splits"][split]["bytes"]
            filled[split] += counts["splits"][split]["documents"]
    empty = [split for split in prefixes if not filled[split]]
    for split in empty:
        if not may_be_empty:
            raise UserError(
                f"data.prepare.text: no document falls into {split} ({prefixes[split]}); give more files, or"
                " change data.prepare.validation_fraction"
            )
    dtype = DTYPES[dtype_code(files.vocab_size)]
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(IndexedWriter(prefix, files.vocab_size))
            for split, prefix in prefixes.items()
            if split not in empty
        }
        for split, writer in writers.items():
            for part in parts:
                copy_documents(
                    writer, read_array(part, f"{split}.bin", dtype), read_array(part, f"{split}.lengths", "<i4")
                )
    names = {split: _join_ids(prefixes[split], parts, split, with_ids) for split in writers}
    before_sidecars()
    written: dict[str, Sidecar | None] = dict.fromkeys(prefixes)
    for split, writer in writers.items():
        written[split] = writer.sidecar(files.sha256, files.eod_id, utf8_bytes[split], source, names[split], bos_id)
        write_sidecar(prefixes[split], written[split])
    for split in empty:
        with open(f"{prefixes[split]}.empty", "w") as file:
            os.fsync(file.fileno())
    return written


def _join_ids(prefix: str, parts: Sequence[str], split: str, with_ids: bool) -> str | None:
    return write_ids(prefix, [os.path.join(part, f"{split}.ids") for part in parts] if with_ids else [])


def copy_documents(writer: IndexedWriter, tokens: np.ndarray, lengths: np.ndarray) -> None:
    """Append the documents of another file, of any size: tokens (tokens,) and lengths (documents,), mapped."""
    writer.add_documents(tokens[:0], lengths)
    for start in range(0, len(tokens), FLUSH_TOKENS):
        writer.add_documents(tokens[start : start + FLUSH_TOKENS], lengths[:0])
