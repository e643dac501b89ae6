"""Joins token files, such as those of shards, to one: the same bytes as if they had been written at once."""

import glob
import hashlib
import os
import re
from collections.abc import Mapping, Sequence

import numpy as np

from titanling.data.ids import ids_path, write_ids
from titanling.data.indexed import (
    FLUSH_TOKENS,
    HEADER,
    PREPARE_AGAIN,
    IndexedDataset,
    IndexedWriter,
    Sidecar,
    read_sidecar,
    write_sidecar,
)
from titanling.data.prepare.join import copy_documents
from titanling.data.prepare.report import Report, check_unused_report, merge_reports, read_report, write_report
from titanling.errors import UserError

SHARD = re.compile(r"-shard-(\d{5})-of-(\d{5})\.(?:json|empty)$")


def shards_of(prefix: str) -> list[str]:
    """Prefixes of the shards of `prefix` in order, all of them finished, with the same settings. Raises `UserError`."""
    found = {}
    for path in glob.glob(f"{glob.escape(prefix)}-shard-*"):
        if match := SHARD.search(path):
            found[int(match[1]), int(match[2])] = path.rpartition(".")[0]
    counts = {count for _, count in found}
    if len(counts) != 1:
        what = f"shards of {' and of '.join(map(str, sorted(counts)))}" if counts else "no shards"
        raise UserError(f"{prefix}: has {what} ({prefix}-shard-00001-of-….json); correct it, or give the inputs")
    count = counts.pop()
    missing = [str(number) for number in range(1, count + 1) if (number, count) not in found]
    if missing:
        raise UserError(f"{prefix}: shards {', '.join(missing)} of {count} are not finished; run them (again) first")
    shards = [found[number, count] for number in range(1, count + 1)]
    reports = {shard: read_report(shard) for shard in shards if _has_report(shard)}
    for shard, report in reports.items():
        first = next(iter(reports))
        if report.get("settings") != reports[first].get("settings"):
            raise UserError(
                f"{shard}: was made with other filters or settings than {first}; make it again, or give the inputs"
            )
    return shards


def merge(prefix: str, inputs: Sequence[str]) -> tuple[Sidecar, list[str]]:
    """Write `prefix`.bin/.idx/.json, the documents of the inputs (prefixes) one after another; lines of remarks beside.

    An input of which only PREFIX.empty exists adds nothing. The inputs' hashes are compared on the way. Reports are
    added up if all have the same filters, documents' names are kept if all inputs have some. Raises `UserError`: an
    input that is missing, damaged or of another tokenizer, files that exist already; then nothing is written.
    """
    filled = [name for name in inputs if os.path.exists(f"{name}.json") or not os.path.exists(f"{name}.empty")]
    if not filled:
        raise UserError(f"{prefix}: no document falls into any of its {len(inputs)} shards; nothing to write")
    sidecars = [read_sidecar(name) for name in filled]
    first = sidecars[0]
    for name, sidecar in zip(filled, sidecars, strict=True):
        for key in ("tokenizer_sha256", "vocab_size", "eod_id"):
            if getattr(sidecar, key) != getattr(first, key):
                raise UserError(f"{name}.json: {key} is not that of {filled[0]}.json; prepare both with one tokenizer")
        if sidecar.bos_id != first.bos_id:
            raise UserError(
                f"{name}.json: bos_id is not that of {filled[0]}.json; prepare both with the same data.prepare.add_bos"
            )
    check_unused_report(prefix)
    report, lines = _merge_reports(inputs)
    with IndexedWriter(prefix, first.vocab_size) as writer:
        for name, sidecar in zip(filled, sidecars, strict=True):
            _copy(writer, name, sidecar)
    if report is not None:
        write_report(prefix, report)
    ids = _merge_ids(prefix, dict(zip(filled, sidecars, strict=True)), lines)
    source = " ".join(dict.fromkeys(sidecar.source for sidecar in sidecars))
    size = sum(sidecar.utf8_bytes for sidecar in sidecars)
    merged = writer.sidecar(first.tokenizer_sha256, first.eod_id, size, source, ids, first.bos_id)
    if all(sidecar.prepared == first.prepared for sidecar in sidecars):
        merged = merged.model_copy(update={"prepared": first.prepared})
    write_sidecar(prefix, merged)
    return merged, lines


def document_lengths(prefix: str) -> np.ndarray:
    """Tokens of each document: (documents,) int32 or int64. The files must have been opened as `IndexedDataset`."""
    path = f"{prefix}.idx"
    with open(path, "rb") as file:
        _, _, _, sequences, entries = HEADER.unpack(file.read(HEADER.size))
    lengths = np.memmap(path, "<i4", "r", HEADER.size, (sequences,)).view(np.ndarray)
    documents = np.memmap(path, "<i8", "r", HEADER.size + 12 * sequences, (entries,)).view(np.ndarray)
    if sequences == entries - 1:  # one of each, as we write them
        return lengths
    return np.diff(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[documents])


def _copy(writer: IndexedWriter, prefix: str, sidecar: Sidecar) -> None:
    dataset = IndexedDataset(prefix)
    dataset.close()
    tokens = np.memmap(f"{prefix}.bin", dataset.dtype, "r").view(np.ndarray)
    digest = hashlib.sha256()
    for start in range(0, len(tokens), FLUSH_TOKENS):
        digest.update(tokens[start : start + FLUSH_TOKENS])
    if digest.hexdigest() != sidecar.bin_sha256:
        raise UserError(f"{prefix}.bin: damaged, its SHA-256 is not the one in {prefix}.json; {PREPARE_AGAIN}")
    copy_documents(writer, tokens, document_lengths(prefix))


def _merge_ids(prefix: str, inputs: Mapping[str, Sidecar], lines: list[str]) -> str | None:
    """Join the names of documents; their SHA-256. Adds to `lines` what is to be said."""
    without = [name for name, sidecar in inputs.items() if sidecar.ids_sha256 is None]
    if without:
        if len(without) < len(inputs):
            lines.append(f"{prefix}: its documents have numbers only, for those of {', '.join(without)} have no names")
        return write_ids(prefix, [])
    return write_ids(prefix, [ids_path(name) for name in inputs])


def _has_report(prefix: str) -> bool:
    return os.path.exists(f"{prefix}.report.json")


def _merge_reports(inputs: Sequence[str]) -> tuple[Report | None, list[str]]:
    """The sum of the inputs' reports, if all have one and it means something; what is to be said about them."""
    if not all(map(_has_report, inputs)):
        return None, []
    reports = [read_report(name) for name in inputs]
    filters = list(dict.fromkeys(tuple(report["filters"]) for report in reports))
    deduplicated = dict.fromkeys(kind for kinds in filters for kind in kinds if kind.startswith("deduplicate"))
    lines = []
    if deduplicated and len(reports) > 1:
        names = ", ".join(deduplicated)
        lines.append(f"{names}: each shard knew only its own documents; what two of them share is still there")
    if len(filters) > 1:
        names = "; ".join(", ".join(kinds) or "none" for kinds in filters)
        return None, [*lines, f"no report is written: the inputs went through different filters ({names})"]
    return merge_reports(reports), lines
