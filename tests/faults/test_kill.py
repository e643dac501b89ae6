"""kill -9 the real command again and again, resume, and end with the very same run."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, TinyData, clean_env, tiny_config
from runs import differing, rows, saved_shards

from titanling.checkpoint import folder

STEPS = 30
# Work enough for a step that a kill can be aimed.
CHANGES: dict[str, Any] = {
    "training.steps": STEPS,
    "training.local_batch_size": 4,
    "training.global_batch_size": 16,
    "training.seq_len": 128,
    "model.dim": 64,
    "model.ffn_dim": 256,
    "model.dropout": 0.1,
    "checkpoint.interval": 2,
    "checkpoint.keep_latest_k": 2,
    "validation.enable": True,
    "validation.freq": 5,
    "validation.steps": 2,
}
Target = Callable[[subprocess.Popen[bytes]], int]


@contextmanager
def started(command: list[str], environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command, running; it and its children are gone afterwards whatever happens."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    finally:
        doomed = [process.pid, *children(process)]
        process.kill()
        process.wait(30)
        for pid in doomed:
            assert gone(pid), f"process {pid} was left behind"


def children(process: subprocess.Popen[bytes]) -> list[int]:
    """Pids of a process's children."""
    try:
        return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    except OSError:
        return []


def gone(pid: int) -> bool:
    """Whether a process ends within ten seconds."""
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def last_step(run: Path) -> int:
    """The last step in metrics.jsonl."""
    try:
        return rows(run)[-1][0]
    except (OSError, IndexError, ValueError):  # not there yet, or in the middle of a write
        return 0


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Wait for a condition of a process that must not end before."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode} before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def kill_once(
    command: list[str],
    environment: Mapping[str, str],
    run: Path,
    step: int,
    *,
    saving: bool,
    delay: float,
    target: Target,
) -> tuple[int, bool]:
    """Run until `step`, then kill `target`, in the middle of a save if `saving`.

    Returns the command's exit code and whether a save was cut short.
    """
    root = run / "checkpoints"
    with started(command, environment, run.parent / "log.txt") as process:
        wait_until(lambda: last_step(run) >= step, process)
        if saving:
            wait_until(lambda: any(path.suffix == ".partial" for path in root.iterdir()), process)
        time.sleep(delay)
        victim, others = target(process), children(process)
        os.kill(victim, signal.SIGKILL)
        code = process.wait(30)
        assert all(gone(pid) for pid in others)
    for saved in folder.list_steps(root):
        path = folder.step_folder(root, saved)
        manifest = folder.read_manifest(path)
        assert folder.damage(path, sorted(manifest), manifest) is None
    return code, any(path.suffix == ".partial" for path in root.iterdir())


def finish(command: list[str], environment: Mapping[str, str], run: Path) -> None:
    """Run the command to its end."""
    log = run.parent / "log.txt"
    with started(command, environment, log) as process:
        assert process.wait(200) == 0, log.read_text()[-4000:]


def assert_equal(run: Path, straight: Path) -> None:
    """Both runs told and left the same."""
    for key in ("loss", "grad_norm", "lr", "tokens_seen", "val_loss"):
        assert rows(run, key) == rows(straight, key), key
    assert [step for step, _ in rows(run)] == list(range(1, STEPS + 1))
    left = [f"step-{step:06d}" for step in (STEPS - 2, STEPS)]
    for found in (run, straight):
        assert sorted(path.name for path in (found / "checkpoints").iterdir()) == left
    last = f"checkpoints/{left[-1]}"
    assert saved_shards(run / last)
    assert differing(saved_shards(run / last), saved_shards(straight / last)) == []


def itself(process: subprocess.Popen[bytes]) -> int:
    """Kill the command's own process."""
    return process.pid


def second_rank(process: subprocess.Popen[bytes]) -> int:
    """Kill rank 1."""
    return children(process)[1]


@pytest.mark.slow
def test_killed_five_times(tmp_path: Path, tiny_data: TinyData) -> None:
    choose, environment = random.Random(7), clean_env()
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    command = [sys.executable, "-m", "titanling.train", "--config"]
    finish([*command, str(tiny_config(straight, tiny_data, CHANGES))], environment, straight / "run")
    command.append(str(tiny_config(killed, tiny_data, CHANGES)))
    cut_short = 0
    for number, saving in enumerate([False, True, False, True, True]):
        step = 5 * number + choose.randint(1, 4)
        delay = choose.uniform(0, 0.005 if saving else 0.05)
        code, cut = kill_once(command, environment, killed / "run", step, saving=saving, delay=delay, target=itself)
        assert code == -signal.SIGKILL
        cut_short += cut
    assert cut_short, "no kill met a save"
    finish(command, environment, killed / "run")
    assert_equal(killed / "run", straight / "run")


@pytest.mark.slow
def test_two_ranks_killed(tmp_path: Path, tiny_data: TinyData) -> None:
    """The launcher dies, or one rank of two in the middle of a save: nobody is left, and the run goes on."""
    environment = clean_env(NGPU="2")
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    command = [sys.executable, "-m", "titanling.launch", "--", "--config"]
    finish([*command, str(tiny_config(straight, tiny_data, CHANGES))], environment, straight / "run")
    command.append(str(tiny_config(killed, tiny_data, CHANGES)))
    for step, saving, target, expected in (
        (7, True, second_rank, 128 + signal.SIGKILL),
        (18, True, itself, -signal.SIGKILL),
    ):
        code, _ = kill_once(command, environment, killed / "run", step, saving=saving, delay=0.002, target=target)
        assert code == expected
    assert "rank 1 was killed by SIGKILL" in (killed / "log.txt").read_text()
    finish(command, environment, killed / "run")
    assert_equal(killed / "run", straight / "run")
