"""titanling.owner: a folder has one run at a time, whoever starts, dies, sleeps or damages what."""

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import TinyData, run_train, snapshot, tiny_config
from upath import UPath

from titanling.checkpoint.inventory import prune
from titanling.config import load_config
from titanling.errors import UserError
from titanling.owner import Owner, held
from titanling.owner_file import NAME, STALE_SECONDS, Holder
from titanling.train import _run_folders


def take(folder: Path, said: list[str] | None = None) -> Owner:
    """Have a folder."""
    mine = Owner(lambda line: said.append(line) if said is not None else None)
    mine.take({"job.dump_folder": folder})
    return mine


def leave_behind(folder: Path, age: float = 0.0, **changes: object) -> Holder:
    """Let another run have the folder, last renewed `age` seconds ago; it is of another machine unless `changes`."""
    folder.mkdir(exist_ok=True)
    other = replace(Holder.this_process(), **{"machine": "elsewhere", "host": "gpu07", **changes})  # type: ignore[arg-type]
    (folder / NAME).write_bytes(other.encode())
    then = time.time() - age
    os.utime(folder / NAME, (then, then))
    return other


def test_one_at_a_time_and_nothing_left(tmp_path: Path) -> None:
    run = tmp_path / "outputs" / "run"
    mine = take(run)
    with pytest.raises(UserError) as refused:
        take(run)
    words = str(refused.value)
    assert words.startswith(f"job.dump_folder = {run}: another run has it: process {os.getpid()} on ")
    assert " UTC" in words and "wait for it or end it, or set another job.dump_folder" in words and "\n" not in words
    assert [path.name for path in run.iterdir()] == [NAME]
    mine.release()
    assert list(tmp_path.iterdir()) == []  # what was made for it is gone with it
    run.mkdir(parents=True)
    (run / "mine").touch()
    take(run).release()
    assert [path.name for path in run.iterdir()] == ["mine"]


def test_dead_on_this_machine_is_taken_over_at_once(tmp_path: Path) -> None:
    here = Holder.this_process()
    unreaped = subprocess.Popen(["true"])
    os.waitid(os.P_PID, unreaped.pid, os.WEXITED | os.WNOWAIT)
    reaped = subprocess.Popen(["true"])
    reaped.wait()
    number_used_again = {"pid": os.getpid(), "birth": here.birth - 5}
    for changes in ({"pid": unreaped.pid}, {"pid": reaped.pid}, number_used_again, {"pid": 2**40}):
        leave_behind(tmp_path, machine=here.machine, **{"birth": 1, **changes})
        said: list[str] = []
        mine = take(tmp_path, said)
        assert len(said) == 1 and "taken over from process" in said[0] and said[0].endswith("which has ended")
        mine.release()
    unreaped.wait()


@pytest.mark.parametrize("changes", [{}, {"machine": ""}, {"pid": 2**40}, {"host": Holder.this_process().host}])
def test_of_another_machine_only_time_tells(tmp_path: Path, changes: dict[str, object]) -> None:
    """Also of another container of this host, and of this host's name elsewhere."""
    for age in (0, STALE_SECONDS - 20, -3600):  # and a clock that was ahead
        leave_behind(tmp_path, age, **changes)
        with pytest.raises(UserError, match="another run has it: process"):
            take(tmp_path)
    leave_behind(tmp_path, STALE_SECONDS + 20, **changes)
    said: list[str] = []
    mine = take(tmp_path, said)
    assert "which has not been heard of for 8" in said[0]
    mine.check(lambda lost: [lost])
    assert sorted(path.name for path in tmp_path.iterdir()) == [NAME]
    mine.release()


def test_a_job_that_was_queued_again_takes_its_own_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    leave_behind(tmp_path)
    with pytest.raises(UserError, match="Slurm job 77"):  # another step of this job
        take(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    said: list[str] = []
    take(tmp_path, said).release()
    assert "this job before it was queued again" in said[0]


@pytest.mark.parametrize("stale", [True, False])
def test_of_many_at_once_exactly_one_wins(tmp_path: Path, stale: bool) -> None:
    for _ in range(5):
        if stale:
            leave_behind(tmp_path, 2 * STALE_SECONDS)
        together, winners, refused = threading.Barrier(6), [], []

        def start(together: threading.Barrier = together, winners: list = winners, refused: list = refused) -> None:
            together.wait()
            try:
                winners.append(take(tmp_path))
            except UserError as error:
                refused.append(error)

        threads = [threading.Thread(target=start) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(winners), len(refused)) == (1, 5)
        winners[0].check(lambda lost: [lost])
        winners[0].release()
        assert list(tmp_path.iterdir()) == []


def hear(mine: Owner) -> str | None:
    """What the run is told before a save."""
    try:
        mine.check(lambda lost: [lost])
    except UserError as error:
        return str(error)
    return None


def test_what_counts_as_lost(tmp_path: Path) -> None:
    run = tmp_path / "run"
    mine = take(run)
    assert hear(mine) is None and not mine.lost
    leave_behind(run)
    assert "this run has lost" in (hear(mine) or "") and "on gpu07" in str(hear(mine)) and mine.lost
    mine.release()
    assert (run / NAME).exists()  # it is the other's

    (run / NAME).unlink()
    mine = take(run)
    (run / NAME).unlink()
    assert f"its {NAME} is gone" in (hear(mine) or "")
    mine.release()

    mine = take(run)
    run.rename(tmp_path / "elsewhere")
    assert hear(mine) is None  # deleted or moved: nobody else has it
    run.mkdir()
    assert hear(mine) is None and (run / NAME).exists()
    run.rename(tmp_path / "moved")
    run.write_text("no folder, as of a disk that fails")
    assert hear(mine) is None
    run.unlink()
    leave_behind(run)
    assert "on gpu07" in (hear(mine) or "")
    mine.release()


def test_renewing_is_seen_by_the_file_systems_clock(tmp_path: Path) -> None:
    mine = take(tmp_path)
    os.utime(tmp_path / NAME, (1, 1))
    mine.renew()
    assert (tmp_path / NAME).stat().st_mtime > 1_000_000
    mine.release()


GARBAGE: dict[str, Callable[[Path], object]] = {
    "link": lambda path: path.symlink_to("/etc/passwd"),
    "dangling": lambda path: path.symlink_to("nowhere"),
    "pipe": lambda path: os.mkfifo(path),
    "folder": lambda path: path.mkdir(),
    "empty": lambda path: path.touch(),
    "torn": lambda path: path.write_bytes(Holder.this_process().encode()[:99]),
    "huge": lambda path: path.write_bytes(b" " * 2**22),
    "binary": lambda path: path.write_bytes(bytes(range(256))),
    "deep": lambda path: path.write_bytes(b"[" * 60_000),
    "digits": lambda path: path.write_bytes(b'{"format": 1, "pid": ' + b"9" * 5000 + b"}"),
    "list": lambda path: path.write_text("[1]"),
    "number": lambda path: path.write_text("1"),
    "another's": lambda path: path.write_text('{"name": "me"}'),
    "types": lambda path: path.write_text(json.dumps(json.loads(Holder.this_process().encode()) | {"pid": "1"})),
    "later format": lambda path: path.write_text(
        json.dumps(json.loads(Holder.this_process().encode()) | {"format": 2})
    ),
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_what_no_run_wrote_is_refused_in_one_line_and_kept(tmp_path: Path, kind: str) -> None:
    path = tmp_path / NAME
    GARBAGE[kind](path)
    before = os.lstat(path)
    with pytest.raises(UserError) as refused:
        take(tmp_path)
    assert len(str(refused.value)) < 300 and f"{NAME}: is " in str(refused.value)
    assert os.lstat(path).st_mode == before.st_mode and len(list(tmp_path.iterdir())) == 1
    path.rmdir() if kind == "folder" else path.unlink()  # as advised
    take(tmp_path).release()


def test_long_words_of_another_are_cut(tmp_path: Path) -> None:
    leave_behind(tmp_path, host="h" * 9000, job="j" * 9000, started="s" * 9000)
    with pytest.raises(UserError) as refused:
        take(tmp_path)
    assert len(str(refused.value)) < 500


def test_in_storage_named_by_a_url(tmp_path: Path) -> None:
    root = UPath(f"memory://{tmp_path.name}/run")
    mine = take(root)
    with pytest.raises(UserError, match="memory://.*another run has it"):
        take(root)
    mine.renew()
    assert hear(mine) is None
    other = replace(Holder.this_process(), machine="elsewhere", host="gpu07")
    (root / NAME).write_bytes(other.encode())
    assert "on gpu07" in (hear(mine) or "")
    mine.release()
    with pytest.raises(UserError, match="on gpu07"):
        take(root)
    entry = root.fs.store[(root / NAME).path]
    entry.modified = entry.modified.replace(year=2001)
    said: list[str] = []
    mine = take(root, said)
    assert "has not been heard of" in said[0]
    mine.release()
    assert root.fs.find(root.path) == []


def test_a_file_url_is_the_same_folder(tmp_path: Path) -> None:
    with held("run", tmp_path), pytest.raises(UserError, match="another run has it"):
        take(UPath(tmp_path.as_uri()))


def test_checkpoints_outside_of_the_run_folder_have_one_owner_too(tmp_path: Path, tiny_data: TinyData) -> None:
    """By an absolute path, by a path upwards, or through a link; also beside a run that has them inside."""
    shared = tmp_path / "shared"
    shared.mkdir()
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "checkpoints").symlink_to(shared)
    ways = {"a": str(shared), "b": "../shared", "c": "checkpoints", "d": shared.as_uri()}
    folders = {}
    for name, folder in ways.items():
        changes = {"job.dump_folder": str(tmp_path / name), "checkpoint.folder": folder}
        folders[name] = _run_folders(load_config(tiny_config(tmp_path, tiny_data, changes)).config)
    for first, second in (("a", "b"), ("b", "c"), ("c", "d"), ("d", "a")):
        one, two = Owner(), Owner()
        one.take(folders[first])
        with pytest.raises(UserError, match="^checkpoint.folder = .*another run has it"):
            two.take(folders[second])
        one.release()
    assert not (tmp_path / "a").exists() and list(shared.iterdir()) == []


def test_a_link_that_leads_nowhere_is_said(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(tmp_path / "scratch")
    with pytest.raises(UserError, match="is a link to .*scratch, which is not there; make it or remove the link"):
        take(tmp_path / "checkpoints")
    assert not (tmp_path / "scratch").exists()
    (tmp_path / "scratch").mkdir()  # as advised
    take(tmp_path / "checkpoints").release()
    assert list((tmp_path / "scratch").iterdir()) == []


def test_what_changes_a_run_from_outside_asks_its_owner(tmp_path: Path) -> None:
    (tmp_path / "step-000001").mkdir()
    with held("checkpoint.folder", tmp_path), pytest.raises(UserError, match="another run has it"):
        prune(str(tmp_path), 1)


def test_a_second_start_is_refused_before_it_does_anything(tmp_path: Path, tiny_data: TinyData) -> None:
    prepares = {"data.prepare.text": [str(tiny_data.text)], "data.train": str(tmp_path / "new")}
    config = tiny_config(tmp_path, tiny_data, prepares)
    with held("job.dump_folder", tmp_path / "run"):
        before = snapshot(tmp_path)
        second = run_train("--config", config)
        assert (second.returncode, second.stdout) == (2, "")
        assert "another run has it: process" in second.stderr and len(second.stderr.splitlines()) == 1
        assert snapshot(tmp_path) == before


def test_a_run_that_has_lost_its_folder_ends_before_its_next_save(tmp_path: Path, tiny_data: TinyData) -> None:
    """At the next step if the thread has noticed, and else before it saves; what was saved stays as it was."""
    from runs import open_trainer  # imports torch

    run = tmp_path / "run"
    with open_trainer(tmp_path, tiny_data, {"training.steps": 2}) as trainer:
        trainer.train()
    before = snapshot(run / "checkpoints")
    for notices in (True, False):
        changes = {"training.steps": 6, "checkpoint.interval": 3}
        with open_trainer(tmp_path, tiny_data, changes) as trainer:
            trainer.owner.take({"job.dump_folder": run})
            leave_behind(run)
            if notices:
                trainer.owner.renew()
            with pytest.raises(UserError, match="this run has lost .* on gpu07"):
                trainer.train()
            assert trainer.step == 3  # the step that it was in, or that with the save
            trainer.owner.release()
        assert snapshot(run / "checkpoints") == before
        (run / NAME).unlink()
