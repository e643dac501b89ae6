"""A run's checkpoints: when to save, from which to go on, and what becomes of a damaged one."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titanling.checkpoint import folder, remote
from titanling.checkpoint.agreement import Agreement
from titanling.checkpoint.loading import CheckState, Opened, Restored, agreed, load_checkpoint, open_checkpoint
from titanling.checkpoint.saving import Parts, Retention, Save, Staging
from titanling.checkpoint.state import trains_on
from titanling.config.schema import Checkpoint
from titanling.errors import UserError
from titanling.parallel.mesh import World

Tensors = Mapping[str, Tensor]


class Checkpointer:
    """The checkpoints of one run. Every method is called by all ranks together, but `say` and `warn` speak once."""

    def __init__(
        self,
        settings: Checkpoint,
        run_folder: Path,
        world: World,
        say: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        self.settings, self.world = settings, world
        self.root = remote.open_root(run_folder, settings.folder)
        self._say, self._warn = say, warn
        self._agreement = Agreement(world)
        self._async = settings.async_mode != "disabled"
        self._staging = Staging(world, copies=self._async, pinned=settings.async_mode == "async_with_pinned_mem")
        self._save: Save | None = None
        self._unsaved: str | None = None
        self._warned: str | None = None  # of what retention cannot delete: once, not after every save
        self._ending = False
        self._last_begun = time.monotonic()
        if settings.enable and world.rank == 0:
            for remark in folder.remove_leftovers(self.root):
                warn(remark)

    # Saving

    def due(self, step: int, last: bool, wanted: bool = False) -> bool:
        """Whether to save after `step`: by the number of steps, or because it is `wanted` for another reason."""
        first = step == 1 and self.settings.enable_first_step_checkpoint
        return self.settings.enable and (last or first or wanted or step % self.settings.interval == 0)

    def overdue(self) -> bool:
        """Whether interval_minutes have passed on this rank; ranks' clocks differ, so they must agree on it."""
        minutes = self.settings.interval_minutes
        return self.settings.enable and minutes is not None and time.monotonic() - self._last_begun >= 60 * minutes

    def has(self, step: int) -> bool:
        """Whether there is a whole checkpoint of `step`, in the eyes of rank 0."""
        return step in self._steps()

    def before(self, step: int) -> int | None:
        """The newest checkpoint from before `step`, in the eyes of rank 0."""
        return max((each for each in self._steps() if each < step), default=None)

    def save(
        self,
        step: int,
        model: Tensors,
        optimizer: Tensors,
        state: dict[str, Any],
        last: bool = False,
        ending: bool = False,
    ) -> None:
        """Save `step`, the `last` of the run, or the one at which it is `ending` for now: whole or not at all.

        Returns once the tensors may change again.

        A save that fails leaves earlier checkpoints as they are and is warned of; `finish` says whether the last one
        succeeded. One is in flight at most: an unfinished one is waited for.
        """
        self.wait()
        self._last_begun = time.monotonic()
        model_only = last and self.settings.last_save_model_only
        parts: Parts = {"model": model} if model_only else {"model": model, "optimizer": optimizer}
        dtype = getattr(torch, self.settings.export_dtype) if model_only else None
        content = self._staging.take(parts, state | {"model_only": model_only}, dtype)
        kept = {(state.get("best") or {}).get("step"), *state.get("trunk_ends", ())} - {None}
        # While steps update nothing, what they save must not take the place of what there was before.
        keep = 0 if state.get("skipped_in_a_row") else self.settings.keep_latest_k
        retention = Retention(keep, self.settings.keep_every, kept)
        final = folder.step_folder(self.root, step)
        self._save = Save(final, content, self.world, self._agreement, retention, background=self._async)
        self._ending = last or ending
        if not self._async:
            self.world.wait(self._save.committed)
            self.poll()

    def poll(self) -> None:
        """Report on a save that has come to an end meanwhile. Costs nothing where there is none."""
        save = self._save
        if save is None or not save.committed.is_set():
            return
        if save.bug is not None:
            raise save.bug
        if not save.reported:
            save.reported = True
            if save.error is None:
                self._say(f"saved {save.final}")
            self._judge(save.error and f"{save.final}: could not be saved: {save.error}")
        if save.finished.is_set():
            self._save = None
            if save.damage is not None:
                self._judge(save.damage)
            if save.warning is not None and save.warning != self._warned:
                self._warned = save.warning
                self._warn(save.warning)

    def _judge(self, failure: str | None) -> None:
        """Note why the newest save is of no use, or that it is; warn, unless `finish` is about to refuse."""
        self._unsaved = failure
        if failure is not None and not self._ending:
            self._warn(f"{failure}. Training goes on, and earlier checkpoints are as they were")

    def wait(self) -> None:
        """Wait for the save in flight, if there is one, and report on it."""
        if self._save is not None:
            self.world.wait(self._save.finished)
            self.poll()

    def finish(self) -> None:
        """Wait for the save in flight. Raises UserError if the newest save of the run has failed."""
        self.wait()
        if self._unsaved is not None:
            raise UserError(
                f"{self._unsaved}. Earlier checkpoints are untouched; free some space or set job.dump_folder, and run"
                " the same command to go on from the last one"
            )

    # Loading

    def restore(self, model: Tensors, optimizer: Tensors, steps: int, check: CheckState) -> Restored | None:
        """Load the newest good checkpoint (or that of load_step) into the given tensors, whatever their layout.

        A damaged one is set aside with a warning, and the one before it is taken, unless checkpoint.fallback = false;
        one that holds only weights is passed over unless it is the end of the run, which has `steps` steps. Later ones
        are set aside, for the run now goes on another way. None: a fresh start. Raises UserError if there is no
        checkpoint of load_step, if none can be used, or if `check` refuses one.
        """
        candidates, damaged = self._candidates(), []
        for index, path in enumerate(candidates):
            opened, problem = self._open(path)
            if opened is not None:
                model_only = opened.state.get("model_only", False)
                if model_only and (opened.state["step"] < steps or not trains_on(opened.state)):
                    remedy = "start a new run from it with checkpoint.initial_load_path"
                    self._go_back(path, f"{path}: holds only weights", remedy, candidates[index + 1 :], damaged)
                    continue
                remarks = check(path, opened.state)
                parts = {"model": model} if model_only else {"model": model, "optimizer": optimizer}
                problem = agreed(self.world, lambda opened=opened, parts=parts: self._load(opened, parts))
                if problem is None:
                    remarks += self._set_aside(opened.state["step"], damaged)
                    return Restored(f"resumed from {path}", opened.state, remarks)
            older, problem = candidates[index + 1 :], f"{problem}; this checkpoint is damaged"
            self._go_back(path, problem, f"delete {path}", older, damaged)
            damaged.append(path)
        return None

    def _steps(self) -> list[int]:
        """Steps of whole checkpoints in the eyes of rank 0, for on a network file system each node has its own view."""
        steps = folder.list_steps(self.root) if self.world.rank == 0 else []
        return self.world.gather(steps)[0]

    def _candidates(self) -> list[Path]:
        """Checkpoints to try, the newest first."""
        steps, wanted = self._steps(), self.settings.load_step
        if not self.settings.enable:
            if steps:
                raise UserError(
                    f"checkpoint.enable = false: {self.root} holds the checkpoints of an earlier run, which would start"
                    " over; set checkpoint.enable = true to go on with it, or another job.dump_folder"
                )
            return []
        if wanted != -1 and wanted not in steps:
            have = ", ".join(map(str, steps)) or "none"
            raise UserError(f"checkpoint.load_step = {wanted}: {self.root} has no such checkpoint (it has: {have})")
        return [folder.step_folder(self.root, step) for step in (reversed(steps) if wanted == -1 else (wanted,))]

    def _open(self, path: Path) -> tuple[Opened | None, str | None]:
        """The checkpoint, or what is wrong with it on some rank."""
        opened: list[Opened] = []

        def open_it() -> None:
            opened.append(open_checkpoint(path))
            if folder.step_folder(self.root, opened[0].state["step"]) != path:
                raise UserError(f"{path / folder.STATE}: is that of step {opened[0].state['step']}")

        problem = agreed(self.world, open_it)
        return (None, problem) if problem is not None else (opened[0], None)

    def _load(self, opened: Opened, parts: Parts) -> None:
        load_checkpoint(opened, parts, self.world, self.settings.verify)

    def _go_back(self, path: Path, problem: str, remedy: str, older: list[Path], damaged: list[Path]) -> None:
        """Warn that an older checkpoint is taken, or raise UserError if there is none or none may be taken."""
        if not older or not self.settings.fallback:
            found = {step: folder.step_folder(self.root, step) for step in folder.list_steps(self.root)}
            others = [step for step, other in found.items() if other not in (path, *damaged)]
            other = f"go on from another one with --checkpoint.load_step {others[-1]}" if others else "start anew"
            raise UserError(f"{problem}: {remedy}, or {other}")
        self._warn(f"{problem}: going back to {older[0]}")

    def _set_aside(self, step: int, damaged: list[Path]) -> list[str]:
        """Rename damaged checkpoints and those after `step`, so that none is taken for the newest; what was done.

        Otherwise the next start would take the newest of them, and retention would keep them before what is saved now.
        """
        if self.world.rank:
            return []
        later = [folder.step_folder(self.root, number) for number in folder.list_steps(self.root) if number > step]
        said = [f"set the damaged {folder.set_aside(path, 'damaged')} aside" for path in damaged]
        names = [folder.set_aside(path, "superseded") for path in later if path not in damaged]
        return said + [f"set the later {name} aside" for name in names]
