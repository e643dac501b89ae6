"""A disk that fills up: a small file system of its own."""

import contextlib
import io
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harm import Job, Row
from helpers import TinyData, snapshot
from runs import open_trainer

MIB = 4
STAGES = ("stage", "write", "manifest")
FULL_AT = 6
PAGE = 4096


@contextmanager
def mounted(disk: Path) -> Iterator[bool]:
    """A file system of a few MiB at `disk`; False where mounting is not permitted."""
    disk.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={MIB}m", "titanling-test", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill_disk(where: Path, data: TinyData, stages: tuple[str, ...] = STAGES) -> Row:
    """Room runs out at each stage of a save, in both modes; then it comes back and the run ends in order."""
    failures: list[str] = []
    tries = 0
    with mounted(where / "disk") as there:
        if not there:
            return Row("disk full", 0, ["mounting a file system is not permitted here"], "not tried")
        for mode in ("disabled", "async"):
            for stage in stages:
                tries += 1
                failures += [f"{stage}, {mode}: {wrong}" for wrong in _fill(where, data, mode, stage)]
        tries += 1
        failures += [f"start: {wrong}" for wrong in _start(where, data)]
    what = "bytes needed and free named, earlier checkpoints as they were, training went on"
    return Row("disk full at start, stage, write, manifest; sync and async", tries, failures, what)


def _fill(where: Path, data: TinyData, mode: str, stage: str) -> list[str]:
    disk = where / "disk"
    run, ballast = disk / "run", disk / "ballast"
    shutil.rmtree(run, ignore_errors=True)
    changes = {
        "job.dump_folder": str(run),
        "training.steps": 8,
        "checkpoint.keep_latest_k": 2,
        "checkpoint.async_mode": mode,
    }
    before: dict[str, str] = {}
    after: dict[str, str] = {}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        with open_trainer(where / "job", data, changes) as trainer:
            save, used = trainer.save, 0

            def saved(last: bool = False) -> None:
                nonlocal used, before, after
                if trainer.step == FULL_AT:
                    before = snapshot(trainer.checkpointer.root)
                    ballast.write_bytes(b"\1" * (_free(disk) - _room(stage, used, trainer.checkpointer.root)))
                start = _free(disk)
                save(last)
                trainer.checkpointer.wait()
                used = start - _free(disk)
                if trainer.step == FULL_AT:
                    after = snapshot(trainer.checkpointer.root)
                    ballast.unlink()

            trainer.save = saved  # type: ignore[method-assign]
            trainer.train()
            left = sorted(path.name for path in trainer.checkpointer.root.iterdir())
    return _wrong(said.getvalue(), before == after, left)


def _wrong(said: str, untouched: bool, left: list[str]) -> list[str]:
    words = r"could not be saved: No space left on device.*it needs ([\d,]+) bytes and the disk has ([\d,]+)"
    found = re.findall(words, said)
    wrong = [] if len(found) == 1 and len(said.splitlines()) == 1 else [f"said {said!r}"]
    wrong += [f"needs {n}, has {h}" for n, h in found if int(n.replace(",", "")) <= int(h.replace(",", ""))]
    wrong += [] if untouched else ["an earlier checkpoint changed, or something was left"]
    return wrong + ([] if left == ["step-000004", "step-000008"] else [f"left {left}"])


def _room(stage: str, used: int, root: Path) -> int:
    """How many bytes to leave free, such that a save fails there. `used`: what an earlier one took, of whole pages."""
    files = sum(-(-path.stat().st_size // PAGE) * PAGE for path in (root / "step-000004").rglob("*") if path.is_file())
    return {"stage": files // 2, "write": files - 3 * PAGE, "manifest": files - PAGE}[stage]


def _free(disk: Path) -> int:
    return shutil.disk_usage(disk).free


def _start(where: Path, data: TinyData) -> list[str]:
    """Nothing is free when the run starts: one line."""
    disk = where / "disk"
    shutil.rmtree(disk / "run", ignore_errors=True)
    (disk / "ballast").write_bytes(b"\1" * _free(disk))
    job = Job(where / "start", data, {"job.dump_folder": str(disk / "run"), "training.steps": 2})
    with job.started() as process:
        code = process.end()
    (disk / "ballast").unlink()
    error = [line for line in process.said.splitlines() if line.startswith("error")]
    told = len(error) == 1 and re.search(r"needs [\d,]+ bytes and the disk has 0 free", error[0])
    return [] if code == 2 and told else [f"code {code}: {process.said[-800:]}"]
