"""Ranks that meet while rank 0 is still at work: who waits, what they say, and where the store listens."""

import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from helpers import ROOT, clean_env, run_python

from titanling.errors import UserError
from titanling.launch import free_port
from titanling.parallel import rendezvous
from titanling.parallel.rendezvous import Place, at_work

LIMIT = timedelta(seconds=1)


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """Where two ranks of one node meet; this process is rank 0."""
    port = free_port()
    variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    for name, value in (variables | {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(rendezvous, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(rendezvous, "SPEAKS_AFTER_SECONDS", 0.0)
    return port


def other_rank(port: int, found: list[object]) -> threading.Thread:
    """Rank 1, in a thread; what it comes to."""

    def meet() -> None:
        place = Place("127.0.0.1", port, 1, 2, LIMIT)
        try:
            found.append(rendezvous._meet(place, rendezvous._open_store(place)))
        except UserError as error:
            found.append(error)

    thread = threading.Thread(target=meet)
    thread.start()
    return thread


def listening(port: int) -> set[str]:
    """Addresses, as the kernel writes them, at which something listens on a port."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    return {line[1].split(":")[0] for line in lines if line[1].endswith(f":{port:04X}") and line[3] == "0A"}


def test_the_others_clock_starts_when_rank_0_has_done_its_work(port: int, capfd: pytest.CaptureFixture[str]) -> None:
    found: list[object] = []
    other = other_rank(port, found)
    with at_work(LIMIT):
        time.sleep(2.5 * LIMIT.total_seconds())  # longer than they have patience
        assert found == [] and listening(port) == {"0100007F"}  # 127.0.0.1 alone
    store = rendezvous.rendezvous(0, 2, LIMIT)
    other.join()
    assert found == [([], "127.0.0.1")] and store.check(["outcome"])
    assert capfd.readouterr().out == "rank 1 waits for rank 0, which prepares or checks the data\n"


def test_silence_has_an_end(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "BEAT_SECONDS", 100.0)  # one beat, and then none
    found: list[object] = []
    with at_work(LIMIT):
        other = other_rank(port, found)
    other.join()
    rendezvous._early.pop().stop()
    assert "rank 0 at 127.0.0.1" in str(found[0]) and "has been silent for twice 1 s (comm.init_" in str(found[0])


def test_what_rank_0_fails_with_is_told_to_other_nodes(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # nobody else would end them
    found: list[object] = []
    other = other_rank(port, found)
    with pytest.raises(UserError, match="^this text is bad$"), at_work(LIMIT):
        raise UserError("this text is bad")
    other.join()
    assert [str(error) for error in found] == ["this text is bad"]


SOCKETS = """
import os, sys
from pathlib import Path
from titanling.config.schema import Comm
from titanling.parallel.degrees import Degrees
from titanling.parallel.mesh import local_device, start_world, stop_world
world = start_world(Degrees(dp_shard=2), Comm(), local_device(Comm()))
values = world.gather([world.rank, None, "ä", {"a": float("inf")}, "x" * (9 * world.rank)])
own = {os.readlink(path) for path in Path("/proc/self/fd").iterdir() if os.path.lexists(path)}
lines = [line.split() for name in ("tcp", "tcp6") for line in open(f"/proc/net/{name}")]
here = sorted({line[1].split(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in own})
sys.stdout.write(f"{here} {values}\\n")
stop_world(world)
"""


@pytest.mark.slow
def test_nothing_listens_beyond_this_node(tmp_path: Path) -> None:
    """Neither the store nor gloo; and what the ranks tell each other arrives as it was."""
    (tmp_path / "worker.py").write_text(SOCKETS)
    environment = clean_env(NGPU="2", PYTHONPATH=f"{tmp_path}:{ROOT}", CUDA_VISIBLE_DEVICES="")
    run = run_python("-m", "titanling.launch", "--module", "worker", env=environment)
    assert run.returncode == 0, run.stderr
    values = "[[0, None, 'ä', {'a': inf}, ''], [1, None, 'ä', {'a': inf}, 'xxxxxxxxx']]"
    assert sorted(run.stdout.splitlines()) == [f"['0100007F'] {values}"] * 2
