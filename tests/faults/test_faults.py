"""A few tries of every row of the table of faults. `benchmarks/faults.py` makes all of them."""

import signal
from collections.abc import Iterator
from pathlib import Path

import damage
import full_disk
import hostile
import kills
import lost
import pytest
import stops
import worlds
from harm import Row
from helpers import TinyData

SIGTERM, SIGINT, SIGUSR1 = stops.SIGNALS


def met(row: Row) -> None:
    """Whether everything went as promised."""
    assert not row.failures and row.tries, f"{row.fault}: {row.failures}"


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, tiny_data: TinyData) -> Iterator[damage.Patient]:
    """A trainer with three checkpoints, to be damaged and healed."""
    with damage.patient(tmp_path_factory.mktemp("patient"), tiny_data) as found:
        yield found


def test_bit_flips(case: damage.Patient) -> None:
    met(damage.flip_bits(case, 100))


def test_truncated_missing_and_swapped_files(case: damage.Patient) -> None:
    met(damage.cut_and_swap(case, 2))


def test_if_all_are_damaged_nothing_moves(case: damage.Patient) -> None:
    assert damage.refuse_whole(case) == []


def test_hostile_checkpoints(case: damage.Patient) -> None:
    met(hostile.meet_hostile_checkpoints(case))


def test_full_disk(tmp_path: Path, tiny_data: TinyData) -> None:
    row = full_disk.fill_disk(tmp_path, tiny_data)
    if not row.tries:
        pytest.skip(row.failures[0])
    met(row)


@pytest.mark.slow
def test_hostile_surroundings(tmp_path: Path, tiny_data: TinyData) -> None:
    met(hostile.meet_hostile_surroundings(tmp_path, tiny_data, fast=True))


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "mode"), [(1, "disabled"), (2, "async")])
def test_kills_during_saves(tmp_path: Path, tiny_data: TinyData, ranks: int, mode: str) -> None:
    row = kills.kill_during_saves(tmp_path, tiny_data, ranks, mode, 2)
    met(row)
    assert row.figures["cut_short"], "no kill met a save"


@pytest.mark.alone
@pytest.mark.slow
def test_signals(tmp_path: Path, tiny_data: TinyData) -> None:
    moments = [stops.Stop(SIGUSR1, "validation"), stops.Stop(SIGINT, "save"), stops.Stop(SIGTERM, "background save")]
    met(stops.stop_and_go_on(tmp_path, tiny_data, 1, moments))


@pytest.mark.alone
@pytest.mark.slow
def test_signals_on_two_ranks(tmp_path: Path, tiny_data: TinyData) -> None:
    moments = [stops.Stop(SIGTERM, "start"), stops.Stop(SIGUSR1, "step", to_all=True)]
    met(stops.stop_and_go_on(tmp_path, tiny_data, 2, moments))


@pytest.mark.alone
@pytest.mark.slow
def test_twice_in_compile(tmp_path: Path, tiny_data: TinyData) -> None:
    met(stops.stop_in_compile(tmp_path, tiny_data, 1, []))


@pytest.mark.alone
@pytest.mark.slow
def test_lost_ranks(tmp_path: Path, tiny_data: TinyData) -> None:
    losses = [
        lost.Loss(signal.SIGKILL, 1, "step"),
        lost.Loss(signal.SIGSTOP, 0, "step"),
        lost.Loss(signal.SIGSTOP, 1, "save"),
    ]
    # A busy machine proves that all end and who is named; the two seconds are for benchmarks/faults.py to measure.
    met(lost.lose_ranks(tmp_path, tiny_data, losses, margin=10))


@pytest.mark.slow
def test_a_nan_gradient(tmp_path: Path, tiny_data: TinyData) -> None:
    met(worlds.poison_a_gradient(tmp_path, tiny_data, 20))
