"""Chrome traces of single training steps, through torch.profiler. torch is imported only when profiling is on."""

import errno
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from titanling.config import schema
from titanling.errors import UserError
from titanling.files import set_aside

if TYPE_CHECKING:
    import torch


Guard = Callable[[str, Callable[[], None]], None]


def unguarded(target: str, write: Callable[[], None]) -> None:
    """Write, and let it fail."""
    write()


class Steps(Protocol):
    """What the training loop sees, whether profiling is on or off."""

    def step(self) -> None:
        """Say that one training step has ended."""


class _Off:
    def step(self) -> None:
        pass


@contextmanager
def profile(
    settings: schema.Profiling, run_folder: Path, rank: int, start_step: int = 0, guard: Guard = unguarded
) -> Iterator[Steps]:
    """Trace each training step whose number is a multiple of `profile_freq`, counting from 1.

    Call `.step()` on the result after every training step. Step n of this rank goes to
    `<run_folder>/<save_traces_folder>/rank{rank}_step{n}.json`, which chrome://tracing and ui.perfetto.dev open.

    Args:
        settings: The `[profiling]` table.
        run_folder: The run's folder; every rank writes its own files.
        rank: Global rank.
        start_step: Steps done before this process began: a resumed run traces the same steps as a straight one.
        guard: Called with what is written and a function that writes it, which raises OSError.

    Raises:
        UserError: The folder of the traces cannot be made.
    """
    if not settings.enable_profiling:
        yield _Off()
        return
    folder = run_folder / settings.save_traces_folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"profiling.save_traces_folder {folder}: cannot be made ({error.strerror}); choose a writable folder"
        ) from None
    profiler = _profiler(settings.profile_freq, folder, rank, start_step, guard)
    with profiler:
        try:
            yield profiler
        finally:
            # Leaving the context in mid-cycle would write a trace of a step that never ended.
            profiler.on_trace_ready = None


def _profiler(freq: int, folder: Path, rank: int, start_step: int, guard: Guard) -> "torch.profiler.profile":
    import torch
    from torch.profiler import ProfilerAction, ProfilerActivity

    def action(done: int) -> ProfilerAction:
        step = start_step + done + 1
        if step % freq == 0:
            return ProfilerAction.RECORD_AND_SAVE
        # Starting the collector is slow and would distort the step that is traced, so it starts one step early.
        return ProfilerAction.WARMUP if (step + 1) % freq == 0 else ProfilerAction.NONE

    def save(profiler: "torch.profiler.profile") -> None:
        step = start_step + profiler.step_num
        path = folder / f"rank{rank}_step{step}.json"

        def write() -> None:
            if os.path.lexists(path):  # of an earlier run, or of this one before it went on from a checkpoint
                set_aside(path)
            folder.mkdir(parents=True, exist_ok=True)
            try:
                profiler.export_chrome_trace(str(path))
            except RuntimeError as error:  # Kineto's
                raise OSError(errno.EIO, str(error)) from None
            if not path.exists():  # Kineto says nothing of a disk that is full
                raise OSError(errno.EIO, "the profiler has written nothing")

        guard("profiler traces", write)

    # It keeps one cycle's events only, as meant here, and would say so to the user.
    warnings.filterwarnings("ignore", message=".*Profiler clears events at the end of each cycle", category=UserWarning)
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities, schedule=action, on_trace_ready=save, record_shapes=True)
