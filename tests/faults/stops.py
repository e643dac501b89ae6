"""Signals that ask a run to stop, at every moment of its life."""

import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harm import Died, Job, Process, Row, children, has_torch
from helpers import TinyData

ASYNC = ("--checkpoint.async_mode", "async")
VALIDATED = {"validation.enable": True, "validation.freq": 4, "validation.steps": 40, "validation.local_batch_size": 4}
GRACE_SECONDS = 30.0


class Stop(NamedTuple):
    """A signal and when it comes."""

    number: signal.Signals
    moment: str
    """"start", "step", "save", "background save", "validation" or "compile"."""
    to_all: bool = False
    """To every process, as Slurm's scancel does, not to the command alone."""


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
MOMENTS = ("start", "step", "save", "background save", "validation")
ALL = [Stop(number, moment) for moment in MOMENTS for number in SIGNALS]
ALL += [Stop(number, "step", to_all=True) for number in SIGNALS]


def stop_and_go_on(where: Path, data: TinyData, ranks: int, stops: Sequence[Stop], seed: int = 3) -> Row:
    """Stop one run at each of these moments, going on each time; it must end as the one that nobody touched."""
    choose, steps = random.Random(seed), 5 * len(stops) + 8
    changes = {"training.steps": steps, **VALIDATED}
    straight, job = (Job(where / name, data, changes, ranks) for name in ("straight", "stopped"))
    straight.finish()
    failures, slowest, validations_cut = [], 0.0, 0
    for stop in stops:
        with job.started(*(ASYNC if stop.moment == "background save" else ())) as process:
            _await(stop.moment, process, job, choose)
            began = time.monotonic()
            _send(process, stop)
            try:
                code = process.end(GRACE_SECONDS)
            except Died as error:
                failures.append(f"{_name(stop)}: {error}")
                continue
            slowest = max(slowest, time.monotonic() - began)
            failures += [f"{_name(stop)}: {found}" for found in _wrong(job, process, code)]
            validations_cut += stop.moment == "validation" and not _validated(job)
    job.finish()
    failures += [f"differs from the uninterrupted run: {name}" for name in job.unlike(straight, steps)]
    what = f"code 75 and a verified checkpoint within {slowest:.1f} s at most, {validations_cut} validations cut short"
    return Row(
        f"SIGTERM, SIGINT, SIGUSR1 in {', '.join(dict.fromkeys(stop.moment for stop in stops))}, {_ranks(ranks)}",
        len(stops),
        failures,
        f"{what}; end bitwise equal",
        {"slowest_seconds": slowest},
    )


def stop_in_compile(where: Path, data: TinyData, ranks: int, numbers: Sequence[signal.Signals]) -> Row:
    """Stop in the middle of compiling the first step; and the second signal ends it at once, leaving nothing torn."""
    changes = {"training.steps": len(numbers) + 3, "compile.enable": True}
    straight, job = (Job(where / name, data, changes, ranks) for name in ("straight", "stopped"))
    straight.finish(f"--compile.cache_dir={where / 'cache'}")
    failures, slowest = [], 0.0
    for turn, number in enumerate(numbers):
        stop = Stop(number, "compile")
        cache = where / f"cache-{turn}"
        with job.started(f"--compile.cache_dir={cache}") as process:
            process.wait_until(lambda cache=cache: _compiling(cache), "compiling")
            began = time.monotonic()
            _send(process, stop)
            code = process.end(120)
            slowest = max(slowest, time.monotonic() - began)
            failures += [f"{_name(stop)}: {found}" for found in _wrong(job, process, code)]
    cache = where / "cache-twice"
    with job.started(f"--compile.cache_dir={cache}") as process:
        process.wait_until(lambda: _compiling(cache), "compiling")
        process.popen.send_signal(signal.SIGTERM)
        time.sleep(1.2)
        if process.popen.poll() is not None:
            failures.append("it had ended before the second signal came")
        else:
            failures += _at_once(process, job)
    job.finish(f"--compile.cache_dir={where / 'cache'}")
    failures += [f"differs from the uninterrupted run: {name}" for name in job.unlike(straight, len(numbers) + 3)]
    what = f"code 75 after the compiled step, {slowest:.1f} s at most; twice: 143 at once; end bitwise equal"
    return Row(f"signals in compile, and twice, {_ranks(ranks)}", len(numbers) + 1, failures, what)


def stop_twice_in_a_save(where: Path, data: TinyData, mode: str, dim: int) -> Row:
    """A second signal while a checkpoint that takes seconds is written: it ends at once, nothing is torn."""
    changes: dict[str, Any] = {
        "training.steps": 50,
        "training.seq_len": 16,
        "training.local_batch_size": 1,
        "training.global_batch_size": 1,
        "model.dim": dim,
        "model.n_heads": 8,
        "model.ffn_dim": 4 * dim,
        "checkpoint.async_mode": mode,
    }
    job, failures = Job(where, data, changes), []
    with job.started() as process:
        process.wait_until(lambda: bool(job.saved()), "its first save")
        process.wait_until(lambda: job.saving, "its second save")
        process.popen.send_signal(signal.SIGTERM)
        time.sleep(1.1)
        during = job.saving
        failures += _at_once(process, job)
    size = sum(path.stat().st_size for path in job.root.rglob("*") if path.is_file())
    what = f"143 at once, {'in the middle of the save' if during else 'AFTER the save'}; {size / 1e9:.1f} GB on disk"
    return Row(f"SIGTERM twice in a save, async_mode {mode}", 1, failures, what, {"during": during})


def _await(moment: str, process: Process, job: Job, choose: random.Random) -> None:
    first = job.step
    if moment == "start":
        ranks = job.ranks
        process.wait_until(lambda: len(pids := _pids(process, ranks)) == ranks and all(map(has_torch, pids)), "torch")
        time.sleep(choose.uniform(0, 0.5))
        return
    if moment == "validation":
        first = (first // 4 + 1) * 4 - 1
    process.wait_until(lambda: job.step > first, f"step {first + 1}")
    if "save" in moment:
        process.wait_until(lambda: job.saving, "a save")
    time.sleep(choose.uniform(0, 0.01))


def _pids(process: Process, ranks: int) -> list[int]:
    return children(process.popen.pid) if ranks > 1 else [process.popen.pid]


def _send(process: Process, stop: Stop) -> None:
    pids = {process.popen.pid, *process.ranks()} if stop.to_all else {process.popen.pid}
    for pid in pids:
        os.kill(pid, stop.number)


def _wrong(job: Job, process: Process, code: int) -> list[str]:
    """What a stopped run left wrong."""
    found = job.torn()
    if code != os.EX_TEMPFAIL:
        found.append(f"code {code}: {process.said[-1500:]}")
    if job.step and job.step != max(job.saved(), default=0):
        found.append(f"the last row is of step {job.step}, the last checkpoint of {job.saved()}")
    if job.saving:
        found.append("a torn save was left")
    if "Traceback" in process.said or "terminate" in process.said:
        found.append(process.said[-1500:])
    return found


def _at_once(process: Process, job: Job) -> list[str]:
    """The second signal."""
    began = time.monotonic()
    process.popen.send_signal(signal.SIGTERM)
    code, seconds = process.end(20), time.monotonic() - began
    found = job.torn()
    if code != 128 + signal.SIGTERM:
        found.append(f"twice: code {code}: {process.said[-1500:]}")
    if seconds > 5:  # a save that is waited for, or a compiled step, takes longer; a busy machine less
        found.append(f"twice: took {seconds:.1f} s")
    return found


def _compiling(cache: Path) -> bool:
    return cache.is_dir() and any(path.is_file() for path in cache.rglob("*"))


def _validated(job: Job) -> bool:
    return f'"step": {job.step}, "val_loss"' in (job.run / "metrics.jsonl").read_text()


def _name(stop: Stop) -> str:
    return f"{stop.number.name} in {stop.moment}{' to all' if stop.to_all else ''}"


def _ranks(ranks: int) -> str:
    return f"{ranks} rank{'s' if ranks > 1 else ''}"
