"""Joins parts, in order, to the token files of each split."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack

import numpy as np

from titanling.data.ids import write_ids
from titanling.data.indexed import DTYPES, FLUSH_TOKENS, IndexedWriter, Sidecar, dtype_code, write_sidecar
from titanling.data.prepare.cut import Half, cut_by_tokens, write_names
from titanling.data.prepare.parts import read_array, read_counts
from titanling.data.prepare.record import Record
from titanling.data.prepare.tokenizer import TokenizerFiles


def join_parts(
    parts: Sequence[str],
    prefixes: Mapping[str, str],
    files: TokenizerFiles,
    source: str,
    before_sidecars: Callable[[], None] = lambda: None,
    may_be_empty: bool = False,
    with_ids: bool = False,
    bos_id: int | None = None,
    fraction: float = 0.0,
    record: Record | None = None,
) -> tuple[dict[str, Sidecar | None], list[str]]:
    """Write .bin/.idx/.json of each split (split → prefix) by copying the parts; return the sidecars, and remarks.

    With `with_ids`, .ids.jsonl too. `bos_id` is what each document begins with,
    if anything, `record` what the sidecars say of how they were prepared.
    `before_sidecars` is called when only these are missing. If no document falls into a split, the last `fraction` of
    the tokens are validation. With `may_be_empty`, an empty file PREFIX.empty says so instead. Raises `UserError`.
    """
    utf8_bytes = dict.fromkeys(prefixes, 0)
    filled = dict.fromkeys(prefixes, 0)
    for counts in map(read_counts, parts):
        for split in prefixes:
            utf8_bytes[split] += counts["splits"][split]["bytes"]
            filled[split] += counts["splits"][split]["documents"]
    empty = [split for split in prefixes if not filled[split]]
    halves: dict[str, Half] = {}
    remarks = []
    if empty and not may_be_empty:
        halves = cut_by_tokens(parts, fraction, files, bos_id)
        utf8_bytes = {split: halves[split].bytes for split in prefixes}
        share = len(halves["validation"].tokens) / sum(len(half.tokens) for half in halves.values())
        remarks.append(
            f"{empty[0]}: no document falls into it; validation is the last {share:.1%} of the tokens instead"
        )
        empty = []
    dtype = DTYPES[dtype_code(files.vocab_size)]
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(IndexedWriter(prefix, files.vocab_size))
            for split, prefix in prefixes.items()
            if split not in empty
        }
        for split, writer in writers.items():
            for tokens, lengths in _documents(parts, split, dtype, halves):
                copy_documents(writer, tokens, lengths)
    names = {split: write_ids(prefixes[split], _names(parts, split, halves) if with_ids else []) for split in writers}
    before_sidecars()
    written: dict[str, Sidecar | None] = dict.fromkeys(prefixes)
    for split, writer in writers.items():
        made = writer.sidecar(files.sha256, files.eod_id, utf8_bytes[split], source, names[split], bos_id)
        written[split] = made.model_copy(update={"prepared": record})
        write_sidecar(prefixes[split], written[split])
    for split in empty:
        with open(f"{prefixes[split]}.empty", "x") as file:  # never in another's place, nor through a link
            os.fsync(file.fileno())
    return written, remarks


def _documents(
    parts: Sequence[str], split: str, dtype: np.dtype, halves: Mapping[str, Half]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and lengths of the documents of a split."""
    if halves:
        yield halves[split].tokens, halves[split].lengths
        return
    for part in parts:
        yield read_array(part, f"{split}.bin", dtype), read_array(part, f"{split}.lengths", "<i4")


def _names(parts: Sequence[str], split: str, halves: Mapping[str, Half]) -> list[str]:
    """Files of the names of a split's documents."""
    if halves:
        return [write_names(halves[split], parts[-1], split)]
    return [os.path.join(part, f"{split}.ids") for part in parts]


def copy_documents(writer: IndexedWriter, tokens: np.ndarray, lengths: np.ndarray) -> None:
    """Append the documents of another file, of any size: tokens (tokens,) and lengths (documents,), mapped."""
    writer.add_documents(tokens[:0], lengths)
    for start in range(0, len(tokens), FLUSH_TOKENS):
        writer.add_documents(tokens[start : start + FLUSH_TOKENS], lengths[:0])
