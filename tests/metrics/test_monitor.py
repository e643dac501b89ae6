"""Rates, with a clock that the test moves."""

import pytest

from titanling.metrics import Throughput


class Clock:
    def __init__(self) -> None:
        self.now = 100.0
        self.waits = 0

    def __call__(self) -> float:
        return self.now

    def synchronize(self) -> None:
        """A device with half a second of work queued."""
        self.now += 0.5
        self.waits += 1


def test_rate_covers_the_steps_since_the_last_read() -> None:
    clock = Clock()
    throughput = Throughput(clock=clock)
    for _ in range(4):
        clock.now += 0.5
        throughput.step(tokens=1000)
    assert throughput.read() == (2000.0, 0.5)
    clock.now += 4
    throughput.step(tokens=1000)
    assert throughput.read() == (250.0, 4.0)


def test_pauses_are_left_out_even_nested_or_failing() -> None:
    clock = Clock()
    throughput = Throughput(clock=clock)
    clock.now += 1
    throughput.step(tokens=500)
    with throughput.paused():
        clock.now += 10
        with pytest.raises(RuntimeError), throughput.paused():
            clock.now += 10
            raise RuntimeError
        clock.now += 10
    clock.now += 1
    throughput.step(tokens=500)
    assert throughput.read() == (500.0, 1.0)


def test_work_queued_before_a_pause_counts_as_training() -> None:
    clock = Clock()
    throughput = Throughput(synchronize=clock.synchronize, clock=clock)
    throughput.step(tokens=1000)
    with throughput.paused():
        clock.now += 3
    assert clock.waits == 2
    assert throughput.read() == (2000.0, 0.5)


def test_reading_nothing_or_inside_a_pause_is_an_error() -> None:
    throughput = Throughput(clock=Clock())
    with pytest.raises(ValueError, match="counted step"):
        throughput.read()
    throughput.step(tokens=1)
    with throughput.paused(), pytest.raises(ValueError, match="paused"):
        throughput.read()
