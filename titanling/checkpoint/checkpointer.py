"""Saving and loading: sharded safetensors through torch's distributed checkpoint (DCP), no pickle."""

import errno
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from titanling.checkpoint import folder
from titanling.config.schema import Checkpoint
from titanling.errors import UserError
from titanling.parallel.mesh import World

Tensors = Mapping[str, Tensor]


class Checkpointer:
    """The checkpoints of one run. Every method is called by all ranks together."""

    def __init__(self, settings: Checkpoint, run_folder: Path, world: World) -> None:
        self.settings = settings
        self.root = run_folder / settings.folder
        self.world = world
        if settings.enable and world.rank == 0:
            folder.remove_leftovers(self.root)

    def newest(self) -> Path | None:
        """The checkpoint to resume from, or None for a fresh start. Raises UserError if load_step is not there."""
        steps, wanted = folder.list_steps(self.root), self.settings.load_step
        if not self.settings.enable:
            if steps:
                raise UserError(
                    f"checkpoint.enable = false: {self.root} holds the checkpoints of an earlier run, which would start"
                    " over; set checkpoint.enable = true to go on with it, or another job.dump_folder"
                )
            return None
        if wanted == -1:
            return folder.step_folder(self.root, steps[-1]) if steps else None
        if wanted not in steps:
            have = ", ".join(map(str, steps)) or "none"
            raise UserError(f"checkpoint.load_step = {wanted}: {self.root} has no such checkpoint (it has: {have})")
        return folder.step_folder(self.root, wanted)

    def due(self, step: int, last: bool) -> bool:
        """Whether to save after `step`."""
        first = step == 1 and self.settings.enable_first_step_checkpoint
        return self.settings.enable and (last or first or step % self.settings.interval == 0)

    def save(self, step: int, model: Tensors, optimizer: Tensors, state: dict[str, Any]) -> Path:
        """Write the checkpoint of `step`, whole or not at all.

        Raises UserError when the disk is full or not writable; earlier checkpoints are not touched then.
        """
        final = folder.step_folder(self.root, step)
        partial = final.with_name(final.name + ".partial")
        hashes: dict[str, Any] = {}
        stages: tuple[Callable[[], object], ...] = (
            lambda: self._begin(final, [*model.values(), *optimizer.values()]),
            lambda: self._write(partial, model, optimizer, state),
            lambda: hashes.update(self._hash(partial)),
            lambda: self._commit(partial, hashes),
        )
        for stage in stages:
            error = self._attempt(stage)
            if error is not None:
                if self.world.rank == 0:
                    shutil.rmtree(partial, ignore_errors=True)
                raise UserError(
                    f"{final}: this checkpoint could not be saved: {error}. Earlier checkpoints are untouched; free"
                    " some space or set job.dump_folder, and run the same command to resume"
                )
            hashes = {name: entry for part in self.world.gather(hashes) for name, entry in part.items()}
        return final

    def _begin(self, final: Path, tensors: list[Tensor]) -> None:
        if self.world.rank:
            return
        folder.begin(final)
        # A lower bound (other ranks may share this disk), but it says so before anything is written.
        needed, free = sum(_local_bytes(t) for t in tensors), shutil.disk_usage(final.parent).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"no space: it needs {needed:,} bytes and the disk has {free:,} free")

    def _write(self, partial: Path, model: Tensors, optimizer: Tensors, state: dict[str, Any]) -> None:
        for part, tensors in (("model", model), ("optimizer", optimizer)):
            with without_warnings():
                writer = HuggingFaceStorageWriter(str(partial / part), save_distributed=True)
                dcp.save(dict(tensors), storage_writer=writer)
        # Only the node that wrote a file can be sure to flush it.
        folder.sync_files(partial, f"shard-{self.world.rank + 1:05d}-")
        if self.world.rank == 0:
            folder.write_json(partial / folder.STATE, state)

    def _hash(self, partial: Path) -> dict[str, Any]:
        # One listing for all: on a network file system, each node may still see another one.
        names = self.world.gather(folder.files_of(partial))[0]
        return {name: folder.digest(partial / name) for name in names[self.world.rank :: self.world.size]}

    def _commit(self, partial: Path, hashes: dict[str, Any]) -> None:
        if self.world.rank == 0:
            folder.commit(partial, dict(sorted(hashes.items())))
            folder.retain(self.root, self.settings.keep_latest_k)

    def _attempt(self, stage: Callable[[], object]) -> str | None:
        """Run one stage on all ranks and wait for all; the first disk error among them as text, or None."""
        message = None
        try:
            stage()
        except (OSError, CheckpointException) as error:
            message = _disk_error(error)
            if message is None:
                raise
        return next((text for text in self.world.gather(message) if text), None)

    def verify(self, path: Path) -> None:
        """Check every file's size and hash, each rank its share. Raises UserError naming the first bad file."""
        try:
            manifest = folder.read_manifest(path)
            found = folder.damage(path, sorted(manifest)[self.world.rank :: self.world.size], manifest)
        except UserError as error:
            found = str(error)
        problems = [text for text in self.world.gather(found) if text]
        if problems:
            others = [step for step in folder.list_steps(self.root) if folder.step_folder(self.root, step) != path]
            remedy = f"resume from another one with --checkpoint.load_step {others[-1]}" if others else "start anew"
            raise UserError(f"{problems[0]}; this checkpoint is damaged: delete {path}, or {remedy}")

    def load(self, path: Path, model: Tensors, optimizer: Tensors) -> None:
        """Read a verified checkpoint into the given tensors, in place, whatever their layout."""
        for part, tensors in (("model", model), ("optimizer", optimizer)):
            with without_warnings():
                dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(path / part)))

    def supersede(self, step: int) -> list[str]:
        """Set aside the checkpoints after `step`, from which the run goes on another way; their new names.

        Otherwise the next start would take the newest of them, and retention would keep them before what is saved now.
        """
        return folder.set_aside(self.root, step) if self.world.rank == 0 else []


def _local_bytes(tensor: Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()


def _disk_error(error: BaseException) -> str | None:
    """The operating system's words if a disk error lies beneath `error`, else None."""
    causes = [error, error.__cause__, error.__context__]
    if isinstance(error, CheckpointException):
        causes += [failure[0] if isinstance(failure, tuple) else failure for failure in error.failures.values()]
    for cause in causes:
        if isinstance(cause, OSError):
            return f"{cause.strerror or cause}" + (f" ({cause.filename})" if cause.filename else "")
    return None


@contextmanager
def without_warnings() -> Iterator[None]:
    """DCP warns of a single process and of its own deprecated storage: nothing that a user could act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
