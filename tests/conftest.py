"""Shared fixtures."""

import os

# Tiny models gain nothing from threads, and lose much to them when several processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import fcntl
import signal
import sys
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

from helpers import TinyData, make_tiny_data  # noqa: E402

# What a shell starts in the background ignores Ctrl-C, and so would all that the tests start and then stop by it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests never assert a time, and a busy machine is no failure.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """A tiny tokenised data set, made once. Tests that damage it must copy it first (`copy_data`)."""
    return make_tiny_data(tmp_path_factory.mktemp("tiny_data") / "data")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int | None]:
    """`python -m titanling.train` with some arguments in this process, whose signals stay its own: the exit code."""
    from titanling.stop import StopRequest
    from titanling.train import main

    monkeypatch.setattr(StopRequest, "install", lambda self: None)

    def run(*words: object) -> int | None:
        monkeypatch.setattr(sys, "argv", ["train", *map(str, words)])
        return main()

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules with slow tests come first, so that no worker is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """With several workers, a test marked `alone` waits for the others' tests to end, and no new one begins."""
    cache = getattr(item.config, "cache", None)  # None with -p no:cacheprovider: then there is no place to meet at
    if "PYTEST_XDIST_WORKER" not in os.environ or cache is None:
        return (yield)
    folder = cache.mkdir("turns")
    with open(folder / "queue", "w") as queue, open(folder / "turn", "w") as turn:
        # Whoever waits for its turn keeps the queue, else tests that may overlap would never let one alone in.
        fcntl.flock(queue, fcntl.LOCK_EX)
        fcntl.flock(turn, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
        fcntl.flock(queue, fcntl.LOCK_UN)
        return (yield)
