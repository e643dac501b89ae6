"""What a run tells, and where it lies, fails beside it: the run goes on, says so once where it can, and saves."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from beside import refused
from harm import Job, Row
from helpers import TinyData

STEPS = 12
CHANGES: dict[str, Any] = {"training.steps": STEPS, "metrics.enable_tensorboard": True}


class Terminal(NamedTuple):
    """Where the output goes."""

    name: str
    shell: str
    environment: dict[str, str] = {}


TERMINALS = (
    Terminal("stdout on a full disk", ">/dev/full"),
    Terminal("both on a full disk", ">/dev/full 2>&1"),
    Terminal("stdout closed", ">&-"),
    Terminal("both closed", ">&- 2>&-"),
    Terminal("a reader that leaves", "> >(head -n 1 >/dev/null)"),
    Terminal("a reader of both that leaves", "> >(head -n 1 >/dev/null) 2>&1"),
    Terminal("ASCII", "", {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    Terminal("Latin-1", "", {"PYTHONIOENCODING": "latin-1"}),
)


def broken_terminals(where: Path, data: TinyData, ranks: int, terminals: Sequence[Terminal] = TERMINALS) -> Row:
    """Output that nobody can take: the run is finished all the same, with code 0."""
    straight = Job(where / "straight", data, CHANGES, ranks)
    straight.finish()
    failures = []
    for number, (name, shell, environment) in enumerate(terminals):
        job = Job(where / str(number), data, CHANGES, ranks)
        with job.started(shell=shell, **environment) as process:
            code = process.end()
        wrong = [] if code == 0 else [f"code {code}: {process.said[-1500:]}"]
        wrong += ["traceback"] if "Traceback" in process.said or "Exception ignored" in process.said else []
        failures += [f"{name}: {each}" for each in wrong or job.unlike(straight, STEPS)]
    what = f"{len(terminals) - len(failures)} of {len(terminals)} finished with code 0, bitwise equal"
    return Row(
        f"terminal full, closed, gone or not UTF-8, {ranks} rank{'s' * (ranks > 1)}", len(terminals), failures, what
    )


def closed_terminal(where: Path, data: TinyData, ranks: int) -> Row:
    """SIGHUP saves as SIGTERM does."""
    changes = {"training.steps": 100_000}
    job = Job(where, data, changes, ranks)
    with job.started() as process:
        process.wait_until(lambda: job.step > 2, "steps")
        process.popen.send_signal(signal.SIGHUP)
        code = process.end()
    failures = [] if code == os.EX_TEMPFAIL else [f"code {code}: {process.said[-1000:]}"]
    failures += [] if job.saved() and job.step == max(job.saved()) else [f"step {job.step}, saved {job.saved()}"]
    return Row(f"SIGHUP, {ranks} rank{'s' * (ranks > 1)}", 1, failures + job.torn(), "code 75, saved")


def channels_taken_away(where: Path, data: TinyData) -> Row:
    """Metrics, TensorBoard, the audit log, checkpoints and the run folder itself go away while the run goes on."""
    failures = []
    harms = _harms()
    for number, (name, harm) in enumerate(harms.items()):
        changes = {**CHANGES, "training.steps": 60, "checkpoint.interval": 20, "data.audit_log": True}
        job = Job(where / str(number), data, changes)
        with job.started() as process:
            process.wait_until(lambda job=job: job.step > 4, "steps")
            harm(job.run)
            code = process.end()
        wrong = [] if code == 0 else [f"code {code}: {process.said[-1500:]}"]
        wrong += [process.said[-1500:]] if "Traceback" in process.said else []
        wrong += [] if 60 in job.saved() else [f"saved {job.saved()}: {process.said[-800:]}"]
        failures += [f"{name}: {each}" for each in wrong + job.torn()]
    what = f"{len(harms) - len(failures)} of {len(harms)} ran to the end and saved"
    return Row("metrics, events, audit log, run folder taken away", len(harms), failures, what)


def found_out_at_once(where: Path, data: TinyData) -> Row:
    """What can never be saved to is refused before the first step, in one line."""
    ways: dict[str, Callable[[Path], object]] = {
        "a file": lambda path: path.write_text("mine"),
        "a dangling link": lambda path: path.symlink_to(path.parent / "nowhere" / "deep"),
        "a FIFO": lambda path: os.mkfifo(path),
    }
    failures = []
    for name, make in ways.items():
        job = Job(where / name.replace(" ", "-"), data, {"training.steps": 4})
        job.run.mkdir(parents=True)
        make(job.root)
        with job.started() as process:
            code = process.end()
        failures += [f"{name}: {wrong}" for wrong in refused(code, process.said)]
        failures += [f"{name}: trained"] if "step " in process.said else []
    what = f"{len(ways)} of {len(ways)} refused before the first step"
    return Row("checkpoints/ cannot be written", len(ways), failures, what)


def preparation_longer_than_the_timeout(where: Path, data: TinyData) -> Row:
    """Two ranks, a first start, text whose preparation takes longer than the others' patience: they wait."""
    text = where / "text"
    text.mkdir(parents=True)
    lines = [path.read_text(encoding="utf-8") for path in sorted(data.text.iterdir())]
    for number in range(40):
        (text / f"{number}.txt").write_text("".join(lines) * 12, encoding="utf-8")
    changes = {
        "training.steps": 2,
        "data.train": str(where / "prepared" / "train"),
        "data.validation": str(where / "prepared" / "validation"),
        "model.hf_assets_path": str(where / "prepared" / "tokenizer"),
        "data.prepare.text": [str(text)],
        "data.prepare.vocab_size": 320,
        "comm.init_timeout_seconds": 1,
    }
    job = Job(where / "job", data, changes, ranks=2)
    with job.started() as process:
        code = process.end(300)
    failures = [] if code == 0 else [f"code {code}: {process.said[-1500:]}"]
    return Row("preparation longer than init_timeout_seconds, 2 ranks", 1, failures, "the other rank waited")


def bad_line_in_a_stream(where: Path, data: TinyData) -> Row:
    """A line that is no JSON, in the middle: saved, code 2, the file and line named; mended, it goes on bitwise."""
    text = [line for path in sorted(data.text.iterdir()) for line in path.read_text(encoding="utf-8").splitlines()]
    good = [json.dumps({"text": line}) for line in text]
    bad = [*good[: len(good) // 4], '{"text": "cut', *good[len(good) // 4 :]]
    failures = []
    jobs = {}
    for name, lines in (("straight", good), ("harmed", bad)):
        file = where / name / "stream.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        changes: dict[str, Any] = {
            "training.steps": 60,
            "training.seq_len": 32,
            "training.local_batch_size": 2,
            "training.global_batch_size": 4,
            "data.shuffle_buffer": 8,
            "checkpoint.interval": 1000,
            "data.train": None,
            "data.validation": None,
            "data.sources": [{"name": "s", "kind": "jsonl", "paths": [str(file)], "weight": 1.0}],
        }
        jobs[name] = (Job(where / name, data, changes), file)
    straight, _ = jobs["straight"]
    straight.finish()
    job, file = jobs["harmed"]
    with job.started() as process:
        code = process.end()
    failures += refused(code, process.said)
    failures += [] if f"{file}:{len(good) // 4 + 1}" in process.said else [f"line not named: {process.said[-500:]}"]
    failures += [] if job.step and job.step == max(job.saved(), default=0) else [f"step {job.step}, {job.saved()}"]
    file.write_text("\n".join(good) + "\n", encoding="utf-8")
    if not failures:
        job.finish()
        failures += [f"differs: {name}" for name in job.unlike(straight, 60)]
    return Row("a bad line in a stream", 1, failures, "saved, code 2, file and line named; mended: end bitwise equal")


def _harms() -> dict[str, Callable[[Path], object]]:
    def fifo(path: Path) -> None:
        path.unlink()
        os.mkfifo(path)

    def audit(run: Path) -> None:
        for path in [each for each in run.rglob("*") if "audit" in each.name]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return {
        "metrics.jsonl deleted": lambda run: (run / "metrics.jsonl").unlink(),
        "metrics.jsonl a FIFO": lambda run: fifo(run / "metrics.jsonl"),
        "tensorboard deleted": lambda run: shutil.rmtree(run / "tensorboard"),
        "audit log deleted": audit,
        "run folder deleted": lambda run: _gone(run),
    }


def _gone(run: Path) -> None:
    """It may be written to at that very moment."""
    deadline = time.monotonic() + 10
    while run.exists() and time.monotonic() < deadline:
        shutil.rmtree(run, ignore_errors=True)
