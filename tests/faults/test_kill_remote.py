"""kill -9 in the middle of a save to storage that renames nothing: what has no manifest is no checkpoint."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from harm import children
from helpers import ROOT, TinyData, clean_env, tiny_config
from runs import differing, rows, saved_shards

from titanling.checkpoint import folder, remote

pytest.importorskip("upath")
STEPS = 16
CHANGES: dict[str, Any] = {"training.steps": STEPS, "checkpoint.interval": 1, "checkpoint.keep_latest_k": 2}


@contextmanager
def started(config: Path, ranks: int) -> Iterator[subprocess.Popen[bytes]]:
    """The launcher with `ranks` ranks, which end with it."""
    command = [sys.executable, "-m", "titanling.launch", "--", "--config", str(config)]
    environment = clean_env(NGPU=str(ranks))
    with (config.parent / "log.txt").open("ab") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait(30)


def finish(config: Path, ranks: int) -> None:
    """Run to the end."""
    with started(config, ranks) as process:
        assert process.wait(200) == 0, (config.parent / "log.txt").read_text()[-4000:]


def kill_in_a_save(config: Path, ranks: int, bucket: Path) -> str:
    """Kill everything while a checkpoint is half there; its name."""
    deadline = time.monotonic() + 120
    with started(config, ranks) as process:
        while True:
            assert process.poll() is None and time.monotonic() < deadline, (config.parent / "log.txt").read_text()[
                -4000:
            ]
            if not half_saved(bucket):
                time.sleep(0.0002)
                continue
            pids = children(process.pid) if ranks > 1 else [process.pid]
            assert len(pids) == ranks
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(0.02)  # a thread in the middle of a call stops after it
            half = half_saved(bucket)
            for pid in pids:
                os.kill(pid, signal.SIGKILL if half else signal.SIGCONT)
            if half:
                return half[0]


def half_saved(bucket: Path) -> list[str]:
    """Checkpoints without a manifest that are newer than all whole ones: old ones lose it as they are deleted."""
    found = sorted(path for path in bucket.iterdir() if path.suffix == "") if bucket.is_dir() else []
    return [path.name for path in found[-1:] if not (path / folder.MANIFEST).exists() and any(path.iterdir())]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_in_the_middle_of_a_save(tmp_path: Path, tiny_data: TinyData, ranks: int) -> None:
    last = f"step-{STEPS:06d}"
    finish(tiny_config(tmp_path / "straight", tiny_data, CHANGES), ranks)
    bucket = tmp_path / "bucket"
    config = tiny_config(tmp_path / "killed", tiny_data, {**CHANGES, "checkpoint.folder": bucket.as_uri()})
    half = kill_in_a_save(config, ranks, bucket)
    root = remote.open_path(bucket.as_uri())
    whole = folder.list_steps(root)
    assert folder.parse_name(half)[0] not in whole
    for step in whole:
        manifest = folder.read_manifest(folder.step_folder(root, step))
        assert folder.damage(folder.step_folder(root, step), sorted(manifest), manifest) is None
    finish(config, ranks)
    assert sorted(path.name for path in bucket.iterdir()) == [f"step-{STEPS - 1:06d}", last]
    killed, straight = tmp_path / "killed" / "run", tmp_path / "straight" / "run"
    assert rows(killed) == rows(straight) and [step for step, _ in rows(killed)] == list(range(1, STEPS + 1))
    assert differing(saved_shards(bucket / last), saved_shards(straight / "checkpoints" / last)) == []
