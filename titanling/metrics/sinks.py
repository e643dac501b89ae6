"""TensorBoard and Weights & Biases. Each is imported only when it is enabled."""

import importlib.util
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titanling.errors import UserError
from titanling.metrics.jsonl import Scalar

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """Scalars and texts by step, in an event file that is made at the first write.

    torch's writer is used: once torch is there it imports as fast as tensorboard's own event_file_writer (0.2 s), is
    documented, and knows `purge_step`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._purge_step: int | None = None
        self._writer: SummaryWriter | None = None

    def resume_at(self, step: int) -> None:
        """Make TensorBoard hide what earlier processes wrote after `step`. Call before the first write."""
        self._purge_step = step + 1

    def scalars(self, group: str, row: Mapping[str, Scalar]) -> None:
        """Write each value of `row` but its step as `group/key`. Raises OSError on a full disk."""
        step = int(row["step"])
        with self._writing() as writer:
            for key, value in row.items():
                if key != "step":
                    writer.add_scalar(f"{group}/{key}", value, step)

    def text(self, step: int, title: str, text: str) -> None:
        """Write `text` verbatim. Raises OSError on a full disk."""
        # Indented by four it is a Markdown code block, whatever it contains.
        verbatim = "\n".join(f"    {line}" for line in text.split("\n"))
        with self._writing() as writer:
            writer.add_text(title, verbatim, step)

    def close(self) -> None:
        """Write out what is pending. Raises OSError on a full disk."""
        if self._writer is not None:
            self._writer.close()

    @contextmanager
    def _writing(self) -> "Iterator[SummaryWriter]":
        """The writer. One that fails, as its thread has, is given up: the next write begins another file."""
        try:
            yield self._open()
        except Exception:
            self._writer = None
            raise

    def _open(self) -> "SummaryWriter":
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # An event is on disk 10 s after it was written: two minutes, the default, is a long time to look at
            # an empty page.
            self._writer = SummaryWriter(str(self._folder), purge_step=self._purge_step, flush_secs=10)
            self._purge_step = None  # a second file of this process hides nothing of the first
            _silence_writers()
        return self._writer


def _silence_writers() -> None:
    """TensorBoard's thread hands on what it raises to the next write; its traceback helps nobody."""
    before = threading.excepthook
    if getattr(before, "__name__", "") == "without_writers":
        return

    def without_writers(failure: threading.ExceptHookArgs) -> None:
        if type(failure.thread).__name__ != "_AsyncWriterThread":
            before(failure)

    threading.excepthook = without_writers


def require_wandb() -> None:
    """Raise UserError unless the wandb package is installed. Fast: does not import it."""
    spec = importlib.util.find_spec("wandb")
    # wandb's own output folder ./wandb looks like a package without an origin.
    if spec is None or spec.origin is None:
        raise UserError(
            "metrics.enable_wandb = true: the wandb package is not installed;"
            " pip install 'titanling[wandb]' or set enable_wandb = false"
        )


class Wandb:
    """One Weights & Biases run per process start, grouped by run folder, with `step` as the x axis.

    W&B drops rows whose step is not beyond the last one, so that a resumed run could not repeat steps in one W&B run.
    The project is WANDB_PROJECT or "titanling"; WANDB_MODE=offline needs no network.

    Raises:
        UserError: W&B did not start (no login, no network).
    """

    def __init__(self, run_folder: Path, run_config: Mapping[str, Any]) -> None:
        import wandb

        name = run_folder.resolve().name
        project = os.environ.get("WANDB_PROJECT", "titanling")
        try:
            self._run = wandb.init(project=project, group=name, name=name, dir=str(run_folder), config=dict(run_config))
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"metrics.enable_wandb = true: W&B did not start ({reason});"
                " run `wandb login`, set WANDB_MODE=offline, or set enable_wandb = false"
            ) from None
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def scalars(self, group: str, row: Mapping[str, Scalar]) -> None:
        """Send each value of `row` as `group/key`."""
        values = {f"{group}/{key}": value for key, value in row.items() if key != "step"}
        self._run.log({"step": row["step"], **values})

    def close(self) -> None:
        """Finish the W&B run."""
        self._run.finish()
