"""A rank is killed or suspended: the others end, and the rank is named."""

import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from harm import Died, Job, Row
from helpers import TinyData

TIMEOUT_SECONDS = 3
MARGIN_SECONDS = 2.0
CHANGES = {
    "training.steps": 100_000,
    "comm.train_timeout_seconds": TIMEOUT_SECONDS,
    "checkpoint.interval": 8,
    "validation.enable": True,
    "validation.freq": 7,
    "validation.steps": 200,
    "validation.local_batch_size": 2,
}


class Loss(NamedTuple):
    """Which rank is lost, by what, and when."""

    number: signal.Signals
    victim: int
    moment: str
    """"step", "save", "background save" or "validation"."""


MOMENTS = ("step", "save", "background save", "validation")
ALL = [Loss(n, v, m) for n in (signal.SIGKILL, signal.SIGSTOP) for v in (0, 1) for m in MOMENTS]


def lose_ranks(where: Path, data: TinyData, losses: Sequence[Loss], margin: float = MARGIN_SECONDS) -> Row:
    """In a run of two ranks, one after another. All must be gone `margin` seconds after the timeout."""
    job, failures, slowest = Job(where, data, CHANGES, ranks=2), [], 0.0
    choose = random.Random(11)
    for loss in losses:
        name = f"{loss.number.name} of rank {loss.victim} in {loss.moment}"
        mode = "async" if loss.moment == "background save" else "disabled"
        with job.started(f"--checkpoint.async_mode={mode}") as process:
            first = job.step if loss.moment != "validation" else (job.step // 7 + 1) * 7 - 1
            process.wait_until(lambda first=first: job.step > first, "a step")
            if "save" in loss.moment:
                process.wait_until(lambda: job.saving, "a save")
            elif loss.moment == "step":  # anywhere in it: what waits for the lost rank differs
                time.sleep(choose.uniform(0, 0.3))
            os.kill(process.ranks()[loss.victim], loss.number)
            began = time.monotonic()
            try:
                code = process.end(TIMEOUT_SECONDS + 15)
            except Died as error:
                failures.append(f"{name}: {error}")
                continue
            seconds = time.monotonic() - began
            slowest = max(slowest, seconds)
            failures += [f"{name}: {wrong}" for wrong in _wrong(code, seconds - margin, loss.victim, process.said)]
        failures += [f"{name}: {torn}" for torn in job.torn()]
    what = f"all gone within {slowest:.1f} s at most, the rank named in one line"
    return Row(
        f"rank SIGKILL / SIGSTOP, train_timeout_seconds = {TIMEOUT_SECONDS}",
        len(losses),
        failures,
        what,
        {"slowest_seconds": slowest, "limit_seconds": TIMEOUT_SECONDS + margin},
    )


def _wrong(code: int, waited: float, victim: int, said: str) -> list[str]:
    found = []
    if waited > TIMEOUT_SECONDS:
        found.append(f"waited {waited:.1f} s")
    if code <= 0:
        found.append(f"code {code}")
    known = (
        "step ",
        "val ",
        "saved ",
        "titanling ",
        "model: ",
        "batch: ",
        "device: ",
        "kernels: ",
        "data",
        "precision",
        "resumed ",
    )
    # Of the start behind the one that was lost before.
    known_within = (": taken over from process ", "metrics.jsonl: this run begins at step 0; ")
    lines = [line for line in said.splitlines() if not line.startswith(known)]
    strange = [line for line in lines if not any(words in line for words in known_within)]
    if len(strange) != 1 or f"rank {victim} " not in strange[0]:
        found.append("said: " + "\n".join(strange)[:1500])
    return found
