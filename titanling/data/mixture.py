"""Which source each sample of a run comes from: in exact proportion to weights that stages may change. Free of torch.

In each stage, the sequence of sources is laid out in blocks of BLOCK samples. How many samples of a source the first b
blocks hold is Webster's apportionment of b × BLOCK seats (Balinski and Young, Fair Representation, 1982): never off
its share by as much as one for two sources and hardly more for many, and never fewer for more seats. Within a block the
order is a keyed permutation. So the place of any sample is found without looking at those before it, and undone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import gcd, lcm

import numpy as np

from titanling.data.order import Permutation, order_key

BLOCK = 1024
KEPT_BLOCKS = 64


@dataclass(frozen=True)
class Span:
    """A stage as the mixture sees it."""

    start: int
    """Its first sample of the run."""
    weights: tuple[int, ...]
    """Of every source, in their order; 0: not read. Without a common divisor."""
    seq_len: int | None = None
    """Its samples are cut into rows of so many tokens; None: they stay whole."""


@dataclass(frozen=True)
class _Block:
    """One block: (length,) arrays, and what came before it."""

    start: int
    sources: np.ndarray
    """Source of each sample."""
    numbers: np.ndarray
    """Which sample of its source each is."""


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights, as they are written in decimals, in the same proportion as whole numbers without a common divisor."""
    exact = [Fraction(repr(weight)) for weight in weights]
    factor = lcm(*(weight.denominator for weight in exact))
    numbers = [int(weight * factor) for weight in exact]
    divisor = gcd(*numbers)
    return tuple(number // divisor for number in numbers)


def apportion(weights: Sequence[int], seats: int) -> list[int]:
    """How many of `seats` each weight gets by Webster's method; the seat n of a weight w comes at (2n - 1) / 2w.

    Equal to giving out one seat after the other to the weight whose next one comes first, in the order of the weights
    if several do.
    """
    total, factor = sum(weights), lcm(*filter(None, weights))
    # Whole numbers, for fractions are slow to compare: 2 × factor times the moment of the seat.
    steps = [factor // weight if weight else 0 for weight in weights]
    counts = [(2 * weight * seats + total) // (2 * total) if weight else 0 for weight in weights]
    there = [place for place, weight in enumerate(weights) if weight]
    while sum(counts) < seats:
        counts[min(there, key=lambda place: ((2 * counts[place] + 1) * steps[place], place))] += 1
    while sum(counts) > seats:
        counts[max(there, key=lambda place: ((2 * counts[place] - 1) * steps[place], place))] -= 1
    return counts


class Mixture:
    """The source of every sample of a run, and which of that source's samples it is: a pure function of (spans, seed).

    Each source's samples come in order, 0, 1, …, through all spans: none is left out and none comes twice.
    """

    def __init__(self, spans: Sequence[Span], seed: int) -> None:
        """`spans` begin at sample 0 and stand in order."""
        starts = [span.start for span in spans]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise ValueError(f"spans begin at {starts}, not at 0 and one after the other")
        self.spans = tuple(spans)
        self.num_sources = len(spans[0].weights)
        self._seed = seed
        self._starts = np.array(starts, np.int64)
        self._block = lru_cache(KEPT_BLOCKS)(self._lay_out)
        self._before = [[0] * self.num_sources]
        """Samples of every source before each span."""
        for place, span in enumerate(spans[1:]):
            self._before.append(self._counts_within(place, span.start - spans[place].start))

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source, and number within the source, of samples (n,): two int64 arrays (n,). Raises IndexError below 0."""
        if samples.size and samples.min() < 0:
            raise IndexError(f"sample {samples.min()} is before the run")
        spans = np.searchsorted(self._starts, samples, side="right") - 1
        blocks, slots = np.divmod(samples - self._starts[spans], BLOCK)
        sources, numbers = np.empty_like(samples), np.empty_like(samples)
        for span, block in dict.fromkeys(zip(spans.tolist(), blocks.tolist(), strict=True)):
            here = (spans == span) & (blocks == block)
            found = self._block(span, block)
            sources[here], numbers[here] = found.sources[slots[here]], found.numbers[slots[here]]
        return sources, numbers

    def seq_len_at(self, sample: int) -> int | None:
        """The `seq_len` of the span that a sample is in."""
        return self.spans[self._span_of(sample)].seq_len

    def counts(self, samples: int) -> list[int]:
        """How many of the run's first `samples` come from each source."""
        span = self._span_of(samples)
        return self._counts_within(span, samples - self.spans[span].start)

    def sample_of(self, source: int, number: int) -> int | None:
        """The sample of the run that is sample `number` of `source`: undoes `locate`. None if it never comes."""
        span = max(place for place, before in enumerate(self._before) if before[source] <= number)
        weights = self.spans[span].weights
        # Among spans that begin with as many of the source, only the last can read it.
        if not weights[source]:
            return None
        low, high = 0, 1  # blocks of the span with at most, and with more than, `number` before their end
        while self._before[span][source] + apportion(weights, high * BLOCK)[source] <= number:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            if self._before[span][source] + apportion(weights, middle * BLOCK)[source] <= number:
                low = middle
            else:
                high = middle
        block = self._block(span, low)
        (slot,) = np.flatnonzero((block.sources == source) & (block.numbers == number))
        return block.start + int(slot)

    def _span_of(self, sample: int) -> int:
        return int(np.searchsorted(self._starts, sample, side="right")) - 1

    def _counts_within(self, span: int, samples: int) -> list[int]:
        """Samples of every source before sample `samples` of a span."""
        blocks, rest = divmod(samples, BLOCK)
        counts = apportion(self.spans[span].weights, blocks * BLOCK)
        if rest:
            partial = np.bincount(self._block(span, blocks).sources[:rest], minlength=self.num_sources)
            counts = [count + more for count, more in zip(counts, partial.tolist(), strict=True)]
        return [before + count for before, count in zip(self._before[span], counts, strict=True)]

    def _lay_out(self, span: int, block: int) -> _Block:
        weights, start = self.spans[span].weights, self.spans[span].start
        first, last = apportion(weights, block * BLOCK), apportion(weights, (block + 1) * BLOCK)
        quotas = [end - begin for begin, end in zip(first, last, strict=True)]
        order = Permutation(BLOCK, order_key(self._seed, f"mixture from {start}", block)).forward(np.arange(BLOCK))
        sources = np.repeat(np.arange(self.num_sources), quotas)[order]
        numbers = np.empty(BLOCK, np.int64)
        # Stable: the samples of a source come in their order.
        numbers[np.argsort(sources, kind="stable")] = np.concatenate(
            [np.arange(b + f, b + e) for b, f, e in zip(self._before[span], first, last, strict=True)]
        )
        return _Block(start + block * BLOCK, sources, numbers)
