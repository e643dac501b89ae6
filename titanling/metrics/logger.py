"""Everything a run reports passes here: one line per logged step, metrics.jsonl, TensorBoard, Weights & Biases."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from titanling.config import schema
from titanling.errors import UserError
from titanling.metrics.console import Console, Piece
from titanling.metrics.hardware import TERA
from titanling.metrics.jsonl import JsonLines, Scalar
from titanling.metrics.sinks import TensorBoard, Wandb, require_wandb

GIB = 2**30


class MetricsLogger:
    """Reports a run. Only rank 0 prints or writes anything; on other ranks every method returns at once.

    A row is a mapping from names to Python numbers. Call `resume_at` before the first row.

    Args:
        settings: The `[metrics]` table.
        run_folder: Gets metrics.jsonl and the TensorBoard folder; made if missing.
        rank: Global rank of this process.
        total_steps: Steps of the whole run, for the progress and the ETA.
        run_config: The resolved config, for W&B.
        device_name: Device and peak behind the MFU, named in the alarm.
        peak_flops: See `device_name`; FLOP/s, None if unknown.
        clock: Seconds, monotonic.

    Raises:
        UserError: The folder cannot be written; wandb is enabled but not installed (on every rank, before anything
            is written) or does not start.
    """

    def __init__(
        self,
        settings: schema.Metrics,
        run_folder: Path,
        rank: int,
        total_steps: int,
        run_config: Mapping[str, Any],
        *,
        device_name: str = "this device",
        peak_flops: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if settings.enable_wandb:
            require_wandb()
        self._on, self._rank = rank == 0, rank
        self._total_steps = total_steps
        self._device_name = device_name
        self._peak_flops = peak_flops
        self._clock = clock
        self._console = Console(colour=not settings.disable_color_printing)
        # Step and time of the latest lines: their span is a running mean that includes validation and saving.
        self._recent: deque[tuple[int, float]] = deque(maxlen=50)
        self._warned: set[str] = set()
        if not self._on:
            return
        self._jsonl = _open_jsonl(run_folder)
        self._tensorboard = TensorBoard(run_folder / settings.save_tb_folder) if settings.enable_tensorboard else None
        self._wandb = Wandb(run_folder, run_config) if settings.enable_wandb else None

    def resume_at(self, step: int, validated: bool = True) -> None:
        """Forget what an earlier process logged after `step`, because those steps run again.

        0: a new run, and what an earlier one logged is kept under another name.

        Unless `step` counts as `validated`, what is said of its validation is forgotten too.
        Raises UserError if metrics.jsonl cannot be rewritten; it is then unchanged.
        """
        if not self._on:
            return
        try:
            aside = self._jsonl.begin_anew() if step == 0 else None
            broken = self._jsonl.drop_after(step, validated)
        except OSError as error:
            raise UserError(
                f"{self._jsonl.path}: cannot be rewritten without the rows after step {step} ({error.strerror});"
                " free some space or make the folder writable"
            ) from None
        if aside is not None:
            self.info(f"metrics.jsonl: this run begins at step 0; what an earlier one wrote is kept as {aside.name}")
        if broken:
            self.warn(f"metrics.jsonl: dropped {broken} line(s) that were not whole rows (an interrupted write)")
        if self._tensorboard is not None:
            self._tensorboard.resume_at(step)

    def log_step(self, row: Mapping[str, Scalar]) -> None:
        """Report one training step.

        Required: `step`, `loss`, `grad_norm` (before clipping), `lr`, `tokens_seen`, `tokens_per_second` (all
        ranks), `step_seconds`, `memory_bytes`. Optional: `mfu_full` and `mfu_causal` (fractions), `skipped_steps`,
        `empty_steps`, `loss_scale`, and any other number, which goes to the files only. Non-finite values are allowed.
        """
        if not self._on:
            return
        self._console.line(self._step_line(row))
        self._record("train", row, row)
        if row.get("mfu_full", 0.0) > 1.0:
            self._alarm(row["mfu_full"])

    def log_validation(self, row: Mapping[str, Scalar]) -> None:
        """Report a validation: `step`, `val_loss`, `perplexity`, `seconds`, optionally `bits_per_byte`.

        In metrics.jsonl all keys but `step` begin with `val_`, in TensorBoard they stand under `validation/`.
        """
        if not self._on:
            return
        short = {key.removeprefix("val_"): value for key, value in row.items()}
        pieces = [
            *self._progress("val", int(row["step"])),
            (f"  loss {short['loss']:.4f}", "bold cyan"),
            (f"  perplexity {short['perplexity']:,.2f}", ""),
        ]
        if "bits_per_byte" in short:
            pieces.append((f"  {short['bits_per_byte']:.4f} bits/byte", ""))
        pieces.append((f"  {short['seconds']:.1f} s", "dim"))
        self._console.line(pieces)
        self._record("validation", short, {key if key == "step" else f"val_{key}": short[key] for key in short})

    def log_text(self, step: int, title: str, text: str) -> None:
        """Print `text` indented under `title`, control characters escaped, and give it to TensorBoard."""
        if not self._on:
            return
        self._console.line([(f"{title}:", "dim")])
        for line in text.split("\n"):
            self._console.line([(f"    {line}", "dim")])
        if self._tensorboard is not None:
            self.guard("TensorBoard events", partial(self._tensorboard.text, step, title, text))

    def info(self, message: str) -> None:
        """Print `message` to stdout."""
        if self._on:
            self._console.line([(message, "")])

    def warn(self, message: str) -> None:
        """Print `message` to stderr as a warning."""
        if self._on:
            self._console.warning(message)

    def close(self) -> None:
        """Finish the files and the W&B run."""
        if not self._on:
            return
        self._jsonl.close()
        if self._tensorboard is not None:
            self.guard("TensorBoard events", self._tensorboard.close)
        if self._wandb is not None:
            self.guard("W&B", self._wandb.close)

    def _record(self, group: str, row: Mapping[str, Scalar], stored: Mapping[str, Scalar]) -> None:
        self.guard("metrics.jsonl", partial(self._jsonl.append, stored))
        if self._jsonl.replaced:
            self._warn_once("replaced", f"{self._jsonl.path}: was deleted or replaced; rows go on in a new one")
        if self._tensorboard is not None:
            self.guard("TensorBoard events", partial(self._tensorboard.scalars, group, row))
        if self._wandb is not None:
            self.guard("W&B", partial(self._wandb.scalars, group, row))

    def guard(self, target: str, write: Callable[[], None]) -> None:
        """Write what is only a report. If it fails, on any rank, say so once: training goes on.

        Days of it must not end because a chart cannot be written, whatever a library raises that writes it.
        """
        try:
            write()
        except Exception as error:
            why = (error.strerror if isinstance(error, OSError) else None) or f"{type(error).__name__}: {error}"
            who = "" if self._on else f" by rank {self._rank}"
            self._warn_once(target, f"{target}: cannot be written{who} ({why}); training goes on, rows are lost")

    def _warn_once(self, subject: str, message: str) -> None:
        if subject not in self._warned:
            self._warned.add(subject)
            self._console.warning(message)

    def _alarm(self, mfu_full: float) -> None:
        peak = "unstated" if self._peak_flops is None else f"{self._peak_flops / TERA:g} TFLOP/s"
        self._warn_once(
            "MFU",
            f"MFU {100 * mfu_full:.1f} % is impossible: either the measured step time is wrong, or the peak of"
            f" {self._device_name} ({peak}, from titanling/metrics/hardware.py)",
        )

    def _progress(self, label: str, step: int) -> list[Piece]:
        width = len(str(self._total_steps))
        return [(f"{label:<4}  {step:>{width}}/{self._total_steps}", "bold")]

    def _step_line(self, row: Mapping[str, Scalar]) -> list[Piece]:
        step = int(row["step"])
        pieces = [
            *self._progress("step", step),
            (f"  loss {row['loss']:.4f}", "bold green"),
            (f"  grad_norm {row['grad_norm']:.3f}", ""),
            (f"  lr {row['lr']:.2e}", ""),
            (f"  {row['tokens_per_second']:,.0f} tok/s", "blue"),
        ]
        if "mfu_full" in row:
            causal = f" (causal {100 * row['mfu_causal']:.1f} %)" if "mfu_causal" in row else ""
            pieces.append((f"  MFU {100 * row['mfu_full']:.1f} %{causal}", "magenta"))
        pieces.append((f"  {row['memory_bytes'] / GIB:.2f} GiB", ""))
        for kind in ("skipped", "empty"):
            if row.get(f"{kind}_steps", 0) > 0:
                pieces.append((f"  {kind} {row[f'{kind}_steps']}", "bold red"))
        pieces.append((f"  ETA {format_duration(self._seconds_left(step, row['step_seconds']))}", "dim"))
        return pieces

    def _seconds_left(self, step: int, step_seconds: float) -> float:
        now = self._clock()
        if self._recent and step > self._recent[0][0]:
            first_step, first_time = self._recent[0]
            step_seconds = (now - first_time) / (step - first_step)
        self._recent.append((step, now))
        return max(self._total_steps - step, 0) * step_seconds


def format_duration(seconds: float) -> str:
    """Two units for a person: "42 s", "1 m 02 s", "2 h 03 m", "3 d 04 h"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} m {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} m"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def _open_jsonl(run_folder: Path) -> JsonLines:
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        return JsonLines(run_folder / "metrics.jsonl")
    except OSError as error:
        raise UserError(
            f"job.dump_folder {run_folder}: metrics.jsonl cannot be written there ({error.strerror});"
            " choose a writable folder"
        ) from None
