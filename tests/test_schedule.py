"""The learning rate's shape."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titanling.config.schema import LRScheduler
from titanling.schedule import lr_factor

SCHEDULES = st.builds(
    LRScheduler,
    warmup_steps=st.integers(0, 300),
    decay_ratio=st.none() | st.floats(0, 1),
    decay_type=st.sampled_from(["linear", "sqrt", "cosine"]),
    min_lr_factor=st.floats(0, 1),
)


def curve(steps: int, **settings: Any) -> list[float]:
    """The factor of every step of a run, and behind the last the one that a further step would have."""
    return [lr_factor(LRScheduler(**settings), steps, completed) for completed in range(steps + 1)]


@given(settings=SCHEDULES, steps=st.integers(1, 400))
def test_properties(settings: LRScheduler, steps: int) -> None:
    factors = [lr_factor(settings, steps, completed) for completed in range(steps + 50)]
    warmup = settings.warmup_steps
    assert all(0 < factor <= 1 for factor in factors[:steps])
    rising, falling = factors[:warmup], factors[warmup:]
    assert rising == sorted(set(rising))
    assert falling == sorted(falling, reverse=True)
    assert all(factor >= settings.min_lr_factor for factor in falling)
    if warmup < steps and settings.decay_ratio is None:
        assert falling[0] == 1
        assert set(factors[steps:]) == {settings.min_lr_factor}


@given(settings=SCHEDULES, steps=st.integers(1, 400), total=st.integers(1, 400))
def test_total_steps_is_the_length(settings: LRScheduler, steps: int, total: int) -> None:
    given_total = settings.model_copy(update={"total_steps": total})
    for completed in range(0, 400, 7):
        assert lr_factor(given_total, steps, completed) == lr_factor(settings, total, completed)


def test_warm_up() -> None:
    assert curve(20, warmup_steps=4, decay_ratio=0.0)[:6] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert curve(3, warmup_steps=0, decay_ratio=0.0) == [1, 1, 1, 1]
    assert curve(3, warmup_steps=1, decay_ratio=0.0) == [1, 1, 1, 1]


def test_warm_up_longer_than_the_run() -> None:
    assert curve(5, warmup_steps=10) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    # A run that is then extended goes on rising.
    assert lr_factor(LRScheduler(warmup_steps=10), 20, 9) == 1


def test_warm_up_as_long_as_the_run() -> None:
    assert curve(4, warmup_steps=4) == [0.25, 0.5, 0.75, 1, 1]


def test_wsd_of_minilingua() -> None:
    """715,000 steps: warm-up to 6,000, constant to 643,500, then linearly to 0 at the end."""
    settings = LRScheduler(warmup_steps=6000, decay_ratio=0.1)
    factor = {n: lr_factor(settings, 715_000, n) for n in (0, 5999, 6000, 643_500, 643_501, 679_250, 714_999, 715_000)}
    assert factor[0] == 1 / 6000
    assert factor[5999] == factor[6000] == factor[643_500] == 1
    assert factor[643_501] == 1 - 1 / 71_500
    assert factor[679_250] == 0.5
    assert factor[714_999] == pytest.approx(1 / 71_500)
    assert factor[715_000] == 0
    assert all(lr_factor(settings, 715_000, n) == 1 for n in range(6000, 643_501, 997))


def test_the_decay_is_measured_from_the_end() -> None:
    """An extended run decays at its new end, not where the old one would have."""
    settings = LRScheduler(warmup_steps=0, decay_ratio=0.2)
    assert [lr_factor(settings, 100, n) for n in (80, 90, 100)] == [1, 0.5, 0]
    assert [lr_factor(settings, 200, n) for n in (80, 90, 100, 160, 180, 200)] == [1, 1, 1, 1, 0.5, 0]


def test_linear_to_a_floor() -> None:
    factors = curve(12, warmup_steps=2, min_lr_factor=0.5)
    assert factors[2:] == pytest.approx([1 - 0.05 * n for n in range(11)])
    assert factors[12] == 0.5


def test_cosine_to_a_floor() -> None:
    factors = curve(102, warmup_steps=2, decay_type="cosine", min_lr_factor=0.1)
    for n, factor in enumerate(factors[2:]):
        assert factor == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * n / 100)) / 2)
    assert factors[52] == pytest.approx(0.55)
    assert factors[102] == 0.1


def test_sqrt() -> None:
    factors = curve(100, warmup_steps=0, decay_ratio=0.64, decay_type="sqrt")
    assert factors[36] == 1
    assert [factors[36 + n] for n in (4, 16, 36, 64)] == pytest.approx([0.75, 0.5, 0.25, 0])
    assert factors[100] == 0


@pytest.mark.parametrize("decay_type", ["linear", "sqrt", "cosine"])
def test_decay_ratio_0_is_constant(decay_type: str) -> None:
    assert set(curve(50, warmup_steps=5, decay_ratio=0.0, decay_type=decay_type, min_lr_factor=0.3)[5:]) == {1.0}


def test_decay_does_not_reach_into_the_warm_up() -> None:
    factors = curve(10, warmup_steps=5, decay_ratio=1.0)
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 0.8, 0.6, 0.4, 0.2, 0])


def test_last_steps_stay_positive_in_a_long_run() -> None:
    for decay_type in ("linear", "sqrt", "cosine"):
        settings = LRScheduler(warmup_steps=0, decay_type=decay_type)
        assert 0 < lr_factor(settings, 1_430_512, 1_430_511) < 1e-5
        assert lr_factor(settings, 1_430_512, 1_430_512) == 0
