"""One checkpoint on its way to the disk, in a thread of each rank.

Each rank writes and hashes its own files; rank 0 commits when all have; then each reads its files back, and only what
has been read back lets older checkpoints go.
"""

import errno
import os
import shutil
import sys
import threading
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from titanling.checkpoint import folder
from titanling.checkpoint.agreement import Agreement
from titanling.checkpoint.shards import Piece, Written, write_file, write_tensors
from titanling.parallel.mesh import World
from titanling.parallel.weights import is_writer, local_part

Tensors = Mapping[str, Tensor]
Parts = Mapping[str, Tensors]
"""Part of a checkpoint (folder.PARTS) → its tensors as this rank holds them, by name."""
NICENESS = 10  # a step on a CPU whose cores are all needed is 1.4 × as long while a save is written, not 2.4 ×
FILE_BYTES = 2**29
"""Where a rank begins another file. Whoever reads them hashes several at a time."""
BLOCK_BYTES = 4096
HEADER_BYTES = 160  # of a tensor in a safetensors header, beside its name, which is there twice


@dataclass(frozen=True)
class Retention:
    """Which older checkpoints go when a new one has been read back: see folder.prune."""

    keep: int
    every: int = 0
    protected: Collection[int] = ()


class Content(NamedTuple):
    """What one rank writes of a checkpoint."""

    pieces: Mapping[str, Mapping[str, Piece]]
    """Part → name → this rank's piece."""
    state: dict[str, Any]
    total_bytes: int
    """Size of all tensors of all ranks, as far as this rank knows them."""
    overhead: int
    """What files take beside that, at most: headers, state, what is left of the last block of each."""


class Staging:
    """Takes this rank's pieces out of the live tensors, into memory that is kept for the next time."""

    def __init__(self, world: World, copies: bool, pinned: bool = False) -> None:
        """Without `copies`, the pieces are the live tensors, which must not change until they are saved."""
        self._world, self._copies = world, copies
        self._pinned = pinned and torch.cuda.is_available()
        self._buffers: dict[str, Tensor] = {}

    def take(self, parts: Parts, state: dict[str, Any], dtype: torch.dtype | None = None) -> Content:
        """This rank's pieces of `parts`, floating-point ones as `dtype` if given; waits for the device."""
        pieces: dict[str, dict[str, Piece]] = {}
        total, size = 0, self._world.size
        overhead = len(folder.encode_json(state)) + (3 * size + 3) * BLOCK_BYTES
        for part, tensors in parts.items():
            mine = pieces[part] = {}
            for turn, (name, tensor) in enumerate(sorted(tensors.items())):
                total += tensor.numel() * (dtype or tensor.dtype).itemsize
                overhead += size * (HEADER_BYTES + 2 * len(name))
                local, offsets = local_part(tensor)
                if local.numel() and is_writer(tensor, turn, self._world):
                    local = local.to(dtype) if dtype is not None else local
                    mine[name] = Piece(self._staged(f"{part}/{name}", local), offsets)
        if self._copies and self._world.device.type == "cuda":
            torch.cuda.synchronize()
        return Content(pieces, state, total, overhead)

    def _staged(self, key: str, local: Tensor) -> Tensor:
        if not self._copies:
            return local
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
            buffer = torch.empty(local.shape, dtype=local.dtype, pin_memory=self._pinned)
            self._buffers[key] = buffer
        return buffer.copy_(local, non_blocking=self._pinned)


class Save:
    """A checkpoint that is being saved. `committed` and `finished` are set on all ranks, whatever becomes of it."""

    def __init__(
        self,
        final: Path,
        content: Content,
        world: World,
        agreement: Agreement,
        retention: Retention,
        background: bool = False,
    ) -> None:
        """In the `background`, it gives way to the training step."""
        self.final, self.working = final, folder.working_folder(final)
        self.committed, self.finished = threading.Event(), threading.Event()
        self.error: str | None = None
        """Why there is no such checkpoint, on all ranks the same; to be read once committed is set."""
        self.damage: str | None = None
        """Why the checkpoint, once committed, cannot be trusted; this and the next to be read once finished is set."""
        self.warning: str | None = None
        """What is wrong though it can."""
        self.reported = False
        """Whether the caller has told the user."""
        self.bug: BaseException | None = None
        """What a user can do nothing about; the caller raises it."""
        self._content, self._world, self._agreement, self._retention = content, world, agreement, retention
        self._background = background
        self._files: dict[str, Written] = {}
        # Daemon: a run that ends by an error does not wait for a save that may never be whole.
        threading.Thread(target=self._run, name="checkpoint", daemon=True).start()

    def _run(self) -> None:
        if self._background and sys.platform == "linux":  # where a thread has a niceness, and hands it to its own
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        try:
            self.error = self._agreement.decide(self._attempt(), self._commit)
            self.committed.set()
            if self.error is None:
                self.damage, self.warning = self._agreement.decide(self._read_back(), self._let_go)
        except BaseException as error:
            self.bug = error
        finally:
            self.committed.set()
            self.finished.set()

    def _attempt(self) -> dict[str, Any]:
        """Write this rank's files; what there is to tell rank 0."""
        try:
            self._write()
        except folder.failures(self.final) as error:
            return self._failure(error)
        except BaseException as error:
            self.bug = error  # ours; but the others must not wait for this rank
            return {"error": f"{type(error).__name__}: {error}"}
        return {"files": {name: written._asdict() for name, written in self._files.items()}}

    def _failure(self, error: Exception) -> dict[str, Any]:
        words = folder.reason(error)
        if not isinstance(error, OSError):
            return {"error": words}
        return {"error": words + (f" ({error.filename})" if error.filename else ""), "full": error.errno in folder.FULL}

    def _write(self) -> None:
        content, rank, size = self._content, self._world.rank, self._world.size
        folder.begin(self.final)
        if rank == 0:
            self._check_space()
        for part, pieces in content.pieces.items():
            for number, some in enumerate(_by_file(pieces)):
                name = f"{part}/shard-{rank + 1:05d}-of-{size:05d}{f'.{number}' if number else ''}.safetensors"
                with self._create(name) as file:
                    self._files[name] = write_tensors(file, some)
        if rank == 0:
            with self._create(folder.STATE) as file:
                self._files[folder.STATE] = write_file(file, [folder.encode_json(content.state)])
        for name in self._files:
            folder.sync(self.working / name)

    def _create(self, name: str) -> BinaryIO:
        path = self.working / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not folder.renames(path):
            return path.open("wb")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW  # through no link
        return os.fdopen(os.open(path, flags, 0o666), "wb", buffering=0)  # type: ignore[return-value]

    def _check_space(self) -> None:
        """A lower bound (other nodes may share this disk), but it says so before anything is written."""
        needed = self._content.total_bytes
        if folder.renames(self.working) and needed > shutil.disk_usage(self.working).free:
            raise OSError(errno.ENOSPC, "No space left on device")

    def _commit(self, reports: list[dict[str, Any]]) -> str | None:
        """On rank 0: make it whole, or remove what there is of it. Why it could not be saved, or None."""
        failure = next((report for report in reports if "error" in report), None)
        if failure is None:
            try:
                folder.commit(self.final, {name: file for report in reports for name, file in report["files"].items()})
                return None
            except folder.failures(self.final) as error:
                failure = self._failure(error)
        folder.discard(self.working)
        if failure.get("full") and folder.renames(self.working):  # counted without what there was of it
            needed = self._content.total_bytes + self._content.overhead
            return f"{failure['error']}: {folder.shortage(self.working, needed)}"
        return failure["error"]

    def _read_back(self) -> str | None:
        """What this rank's files are not as they were written, or None."""
        written = {name: file._asdict() for name, file in self._files.items()}
        for name in written:
            with suppress(OSError):  # of a file that cannot be opened, the next line tells
                folder.forget_cached(self.final / name)
        return folder.damage(self.final, list(written), written)

    def _let_go(self, reports: list[str | None]) -> tuple[str | None, str | None]:
        """On rank 0: delete older checkpoints if this one can be read. What is wrong with it, and what else is."""
        bad = next((report for report in reports if report is not None), None)
        if bad is not None:
            return f"{bad}: this checkpoint does not read back as it was written; look at the disk", None
        rule, root = self._retention, self.final.parent
        protected = {*rule.protected, _step(self.final)}
        try:
            folder.prune(root, rule.keep, protected, rule.every)
            return None, next(iter(folder.spared(root, rule.keep, protected, rule.every)), None)
        except folder.failures(self.final) as error:
            return None, f"{root}: an older checkpoint cannot be deleted: {folder.reason(error)}"


def _by_file(pieces: Mapping[str, Piece]) -> list[dict[str, Piece]]:
    """The pieces in groups of about FILE_BYTES."""
    groups: list[dict[str, Piece]] = []
    room = 0
    for name, piece in pieces.items():
        if room <= 0:
            groups.append({})
            room = FILE_BYTES
        groups[-1][name] = piece
        room -= piece.values.nbytes
    return groups


def _step(final: Path) -> int:
    return int(final.name.removeprefix("step-"))
