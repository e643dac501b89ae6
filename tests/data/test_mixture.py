"""Mixtures: exact shares at any moment, nothing left out or twice, across stages and back."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titanling.data.mixture import BLOCK, Mixture, Span, apportion, whole_weights

WEIGHTS = st.lists(st.integers(0, 1000), min_size=1, max_size=30).filter(any)


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    size = draw(st.integers(1, 12))
    weights = st.lists(st.integers(0, 50), min_size=size, max_size=size).filter(any)
    starts = sorted(draw(st.sets(st.integers(1, 6000), max_size=3)))
    return Mixture([Span(start, tuple(draw(weights))) for start in (0, *starts)], draw(st.integers(0, 9)))


def test_weights_become_whole_numbers() -> None:
    assert whole_weights([0.27, 0.18, 0.1]) == (27, 18, 10)
    assert whole_weights([27.0, 9.0]) == (3, 1)
    assert whole_weights([1.5, 1e-7]) == (15_000_000, 1)
    assert whole_weights([5.0]) == (1,)


@given(WEIGHTS, st.integers(0, 300))
def test_seats_are_those_given_out_one_by_one(weights: list[int], seats: int) -> None:
    counts = [0] * len(weights)
    for _ in range(seats):
        there = [place for place, weight in enumerate(weights) if weight]
        counts[min(there, key=lambda place: (Fraction(2 * counts[place] + 1, 2 * weights[place]), place))] += 1
    assert apportion(weights, seats) == counts


@given(WEIGHTS, st.integers(0, 10**15))
def test_shares_are_exact_at_any_size(weights: list[int], seats: int) -> None:
    counts, later = apportion(weights, seats), apportion(weights, seats + BLOCK)
    assert sum(counts) == seats
    for weight, count, more in zip(weights, counts, later, strict=True):
        assert more >= count and abs(count - Fraction(weight * seats, sum(weights))) < 2 + len(weights) / 2


@settings(deadline=None, max_examples=60)
@given(mixtures())
def test_every_source_is_read_in_order_without_gap_or_repeat(mixture: Mixture) -> None:
    samples = np.arange(8000)
    sources, numbers = mixture.locate(samples)
    for source in range(mixture.num_sources):
        assert np.array_equal(numbers[sources == source], np.arange((sources == source).sum()))
    for span, following in zip(mixture.spans, [*mixture.spans[1:], Span(8000, ())], strict=True):
        total = sum(span.weights)
        counts = np.zeros(mixture.num_sources)
        here = sources[span.start : following.start]
        for source, weight in enumerate(span.weights):
            shares = np.arange(1, len(here) + 1) * weight / total
            counts = np.cumsum(here == source)
            assert np.abs(counts - shares).max(initial=0) <= BLOCK  # after any number of samples
            assert weight or not counts[-1:].sum()
            assert abs(counts[BLOCK - 1 :: BLOCK] - shares[BLOCK - 1 :: BLOCK]).max(initial=0) < 2


@settings(deadline=None, max_examples=60)
@given(mixtures(), st.lists(st.integers(0, 10**12), min_size=1, max_size=20))
def test_any_sample_is_found_and_found_back(mixture: Mixture, samples: list[int]) -> None:
    sources, numbers = mixture.locate(np.array(samples))
    for sample, source, number in zip(samples, sources.tolist(), numbers.tolist(), strict=True):
        assert mixture.sample_of(source, number) == sample
        assert mixture.counts(sample)[source] == number


def test_a_later_edit_changes_nothing_before_it() -> None:
    first, second = Span(0, (3, 1)), Span(1500, (1, 3))
    samples = np.arange(4000)
    before, after = (Mixture(spans, 7).locate(samples) for spans in ([first], [first, second]))
    for old, new in zip(before, after, strict=True):
        assert np.array_equal(old[:1500], new[:1500]) and not np.array_equal(old[1500:], new[1500:])


def test_a_source_that_comes_to_its_end_of_weight_is_never_read_again() -> None:
    mixture = Mixture([Span(0, (1, 1)), Span(1000, (0, 1)), Span(2000, (1, 0)), Span(3000, (0, 1))], 0)
    first = mixture.counts(1000)[0]
    assert mixture.sample_of(0, first - 1) < 1000 <= 2000 == mixture.sample_of(0, first)
    assert mixture.sample_of(0, first + 999) == 2999 and mixture.sample_of(0, first + 1000) is None


def test_the_order_within_a_block_is_mixed() -> None:
    sources, _ = Mixture([Span(0, (1, 1))], 0).locate(np.arange(BLOCK))
    runs = 1 + np.count_nonzero(np.diff(sources))
    assert abs(runs - BLOCK / 2) < 64  # four standard deviations of a fair coin's


@pytest.mark.parametrize("starts", [[], [1], [0, 5, 5], [0, 6, 5]])
def test_spans_out_of_order(starts: list[int]) -> None:
    with pytest.raises(ValueError, match="one after the other"):
        Mixture([Span(start, (1,)) for start in starts], 0)
