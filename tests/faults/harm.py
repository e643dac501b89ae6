"""Runs that come to harm, in processes of their own, started as a user starts them: what the rows of faults share."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from helpers import ROOT, TinyData, clean_env, tiny_config
from runs import differing, rows, saved_shards

from titanling.checkpoint import folder

# Work enough for a step that a moment within it can be aimed at.
RUN: dict[str, Any] = {
    "training.local_batch_size": 4,
    "training.global_batch_size": 16,
    "training.seq_len": 128,
    "model.dim": 64,
    "model.ffn_dim": 256,
    "model.dropout": 0.1,
    "checkpoint.interval": 2,
    "checkpoint.keep_latest_k": 2,
}
COMPARED = ("loss", "grad_norm", "lr", "tokens_seen", "val_loss")
PATIENCE_SECONDS = 120


class Row(NamedTuple):
    """One line of the table of faults."""

    fault: str
    tries: int
    failures: list[str]
    """What did not go as promised, in words; empty if the gate is met."""
    what: str
    """What happened."""
    figures: dict[str, Any] = {}
    """For the JSON."""


class Died(Exception):
    """A run ended before it could come to harm, or did not end as it should."""


class Process(NamedTuple):
    """A started command, and where in the log its output begins."""

    popen: subprocess.Popen[bytes]
    log: Path
    start: int

    @property
    def said(self) -> str:
        """Its output so far, stdout and stderr."""
        return self.log.read_bytes()[self.start :].decode(errors="replace")

    def ranks(self) -> list[int]:
        """Pids of its training processes, by rank."""
        return children(self.popen.pid) or [self.popen.pid]

    def wait_until(self, condition: Callable[[], bool], what: str = "") -> None:
        """Wait for a condition; Died if it ends before."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            if self.popen.poll() is not None or time.monotonic() > deadline:
                raise Died(f"ended with {self.popen.returncode} before {what}: {self.said[-2000:]}")
            time.sleep(0.0005)

    def end(self, seconds: float = PATIENCE_SECONDS) -> int:
        """Its exit code, once it and its children are gone. Died if that takes too long."""
        pids = self.ranks()
        deadline = time.monotonic() + seconds
        try:
            code = self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Died(f"still there after {seconds:.0f} s: {self.said[-2000:]}") from None
        for pid in pids:
            if not gone(pid, max(1.0, deadline - time.monotonic())):
                raise Died(f"process {pid} was left behind")
        return code


class Job:
    """A run folder and the command that trains in it."""

    def __init__(self, where: Path, data: TinyData, changes: Mapping[str, Any], ranks: int = 1) -> None:
        self.run, self.ranks, self.log = where / "run", ranks, where / "log.txt"
        self.config = tiny_config(where, data, {**RUN, **changes})
        self.root = self.run / "checkpoints"
        self.interval = {**RUN, **changes}["checkpoint.interval"]

    @contextmanager
    def started(self, *overrides: str, shell: str = "", **environment: str) -> Iterator[Process]:
        """The command, running; it is gone afterwards whatever happens. `shell`: redirections, as typed behind it."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        command = [str(ROOT / "run_train.sh"), "--config", str(self.config), *overrides]
        if shell:
            command = ["bash", "-c", f'exec "$@" {shell}', "bash", *command]
        start = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as output:
            popen = subprocess.Popen(
                command,
                cwd=self.run.parent,
                env=clean_env(PATH=path, NGPU=str(self.ranks), CUDA_VISIBLE_DEVICES="", **environment),
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            yield Process(popen, self.log, start)
        finally:
            pids = children(popen.pid)
            if popen.poll() is None:
                popen.kill()
            popen.wait(30)
            for pid in pids:  # only what we started; and only if our launcher did not end it
                if not gone(pid, 10):
                    os.kill(pid, signal.SIGKILL)

    def finish(self, *overrides: str) -> None:
        """Run to the end."""
        with self.started(*overrides) as process:
            code = process.end(300)
            if code:
                raise Died(f"ended with {code}: {process.said[-4000:]}")

    @property
    def step(self) -> int:
        """The last step in metrics.jsonl."""
        try:
            return rows(self.run)[-1][0]
        except (OSError, IndexError, ValueError):  # not there yet, or in the middle of a write
            return 0

    @property
    def saving(self) -> bool:
        """Whether a save is under way."""
        try:
            return any(name.endswith(".partial") for name in os.listdir(self.root))
        except OSError:
            return False

    def saved(self) -> list[int]:
        """Steps of its checkpoints."""
        return folder.list_steps(self.root)

    def torn(self) -> list[str]:
        """What is wrong with checkpoints that look whole."""
        found = []
        for step in self.saved():
            path = folder.step_folder(self.root, step)
            manifest = folder.read_manifest(path)
            problem = folder.damage(path, sorted(manifest), manifest)
            if problem is None and folder.read_json(path / folder.STATE)["step"] != step:
                problem = f"{path}: holds another step"
            found += [] if problem is None else [problem]
        return found

    def unlike(self, straight: "Job", steps: int) -> list[str]:
        """In what this finished run differs from an uninterrupted one: rows of metrics, weights, Adam's state."""
        found = [key for key in COMPARED if rows(self.run, key) != rows(straight.run, key)]
        if [step for step, _ in rows(self.run)] != list(range(1, steps + 1)):
            found.append("steps in metrics.jsonl")
        last = folder.step_folder(self.root, steps)
        mine, theirs = saved_shards(last), saved_shards(folder.step_folder(straight.root, steps))
        return found + (differing(mine, theirs) if mine else ["no checkpoint"])


def children(pid: int) -> list[int]:
    """Pids of a process's children, oldest first."""
    try:
        return sorted(int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    except OSError:
        return []


def gone(pid: int, seconds: float = 10) -> bool:
    """Whether a process ends within some time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


def has_torch(pid: int) -> bool:
    """Whether a process has begun to load torch: it then heeds signals."""
    try:
        return "libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


def state(job: Job, step: int) -> dict[str, Any]:
    """state.json of a checkpoint."""
    return json.loads((folder.step_folder(job.root, step) / folder.STATE).read_text())
