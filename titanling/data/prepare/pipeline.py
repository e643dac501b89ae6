"""The preparation of token files: pieces → parts by worker processes → files. Killed, it goes on where it was.

A part is named by a hash of all that makes it: settings, tokenizer, and the place, size and time of change of the
files that it is read from. So a part that is there is used, and one that no longer fits is not found.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import xxhash

from titanling.config.schema import Prepare
from titanling.data.prepare.parts import read_array
from titanling.data.prepare.pieces import Piece
from titanling.data.prepare.pool import cores, make_parts
from titanling.data.prepare.readers import reading_of
from titanling.data.prepare.seen import SeenHashes
from titanling.data.prepare.tokenizer import TokenizerFiles
from titanling.data.prepare.worker import Job, Task, cut_into_stages

DECIDES = {
    "format",
    "text_field",
    "id_field",
    "document_separator",
    "max_document_bytes",
    "language",
    "filters",
}
"""Settings that decide which documents are written."""
# To be raised with every change that makes other parts of the same input.
PARTS_VERSION = 3
# Of a large packed file, which is one piece, all at once would take several times their memory to sort.
BLOCK_HASHES = 1 << 22


@dataclass(frozen=True)
class Made:
    """Parts of all pieces."""

    pieces: Sequence[Piece]
    parts: list[list[str]]
    """Of each stage, those of the pieces in order; the last are those to join."""
    seen: dict[int, SeenHashes]
    """Place of a filter in the list → what it has seen."""


def new_job(
    settings: Prepare, pieces: Sequence[Piece], tokenizer_dir: str, fraction: float, bos_id: int | None = None
) -> Job:
    """The job that settings describe; `bos_id` is what each document begins with, if anything."""
    return Job(
        reading=reading_of(settings),
        stages=cut_into_stages(settings.filters),
        tokenizer=tokenizer_dir,
        backend=settings.backend,
        fraction=fraction,
        language=settings.language,
        workers=min(settings.workers or cores(), len(pieces)),
        bos_id=bos_id,
    )


def settings_hash(settings: Prepare, pieces: Sequence[Piece], fraction: float) -> str:
    """Of what decides which documents are written, beside text and tokenizer: the same for all shards.

    `pieces` are those of all shards. Raises `UserError` for filters that cannot work.
    """
    outside = ""
    if settings.filters:
        from titanling.data.prepare.filters import check_filters

        outside = check_filters(settings.filters, {settings.language or piece.name for piece in pieces})
    used = settings.model_dump_json(include=DECIDES)
    # Only where it is set: what was prepared before there was a choice keeps its hash.
    return _hash(f"{used} {outside} {fraction}{' add_bos' if settings.add_bos else ''}")


def fingerprint(settings: Prepare, settings_hash: str, files: TokenizerFiles) -> str:
    """Of all that pieces have in common."""
    # The backend too: who is told that one gives wrong ids sets another, and must not get the parts that it made.
    used = settings.model_dump_json(include={"skip_bad", "backend"})
    ends = f"{files.eod_id} {files.bos_id}" if settings.add_bos else str(files.eod_id)
    return _hash(f"{PARTS_VERSION} {settings_hash} {used} {files.sha256} {ends}")


def make_all(
    job: Job, pieces: Sequence[Piece], files: TokenizerFiles, key: str, folder: str, advance: Callable[[int], None]
) -> Made:
    """Make the parts that `folder` lacks. `key` is the fingerprint of what the pieces have in common.

    `files` are the job's tokenizer. `advance` is told the bytes of each piece that is done in a stage.
    Raises `UserError`, OSError; finished parts stay then.
    """
    keys = [_hash(f"{key} {piece.identity}") for piece in pieces]
    made = Made(pieces, [], {})
    before: list[str] | None = None
    for number, stage in enumerate(job.stages):
        parts = [os.path.join(folder, its) for its in keys]
        tasks = [
            Task(piece, number, part, before and before[index])
            for index, (piece, part) in enumerate(zip(pieces, parts, strict=True))
        ]
        missing = [task for task in tasks if not os.path.isdir(task.folder)]
        advance(sum(task.piece.bytes for task in tasks) - sum(task.piece.bytes for task in missing))
        for task in make_parts(job, missing, files):
            advance(task.piece.bytes)
        made.parts.append(parts)
        if stage.hashed:
            seen = made.seen[stage.hashed[0]] = SeenHashes()
            keys = [_hash(f"{its} {_decide(seen, part)}") for its, part in zip(keys, parts, strict=True)]
            before = parts
    return made


def _decide(seen: SeenHashes, part: str) -> str:
    """Write which hashes of a part are new; a hash of that."""
    hashes, digest = read_array(part, "hashes.bin", "<u8"), xxhash.xxh3_128()
    partial = os.path.join(part, "new.partial")
    with open(partial, "wb") as file:
        for start in range(0, len(hashes), BLOCK_HASHES):
            new = seen.add(hashes[start : start + BLOCK_HASHES]).tobytes()
            file.write(new)
            digest.update(new)
    os.replace(partial, os.path.join(part, "new.bin"))
    return digest.hexdigest()


def _hash(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())
