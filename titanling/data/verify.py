"""Whether the loaders of a run hand out what its config promises: nothing twice, every source in its share.

What is checked is what the loaders yield, token by token, against the files; free of torch all the same.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any, NamedTuple

import numpy as np

from titanling.data.mixture import BLOCK
from titanling.data.sources import MixedSource

SIGMAS = 5
"""How far a share may be off at the edges of blocks, where chance decides: a false alarm in two million."""


class Share(NamedTuple):
    """A source in the steps that were looked at."""

    source: str
    sequences: int
    expected: float
    """Sequences that its weights would give it."""
    tolerance: float
    """How many it may have more or less, as the steps may begin and end within a block."""
    epochs: float
    """How often it has been read since the run began, at the end of these steps."""


@dataclass
class Verdict:
    """What was found."""

    sequences: int = 0
    faults: list[str] = field(default_factory=list)
    """In words; none if all is well."""
    same_text: int = 0
    """Sequences that read as an earlier one does, from another place or in another epoch: no fault of the order."""
    padding: float = 0.0
    """Share of the tokens."""
    shares: list[Share] = field(default_factory=list)


class _Seen(NamedTuple):
    """A sequence: its sample of the run, where it is from, and that of its source it is."""

    sample: int
    source: int
    number: int
    window: int


def verify(
    source: MixedSource,
    streams: Sequence[Iterator[Mapping[str, Any]]],
    steps: range,
    sequences: int,
    local_batch_size: int,
) -> Verdict:
    """Compare what each data-parallel rank's stream yields in `steps` (from 1) with the order and the files.

    `streams` are those of the ranks in their order, where the first of the steps begins; `sequences` is how many a
    step takes of all of them. Reads them one micro-batch after the other.
    """
    verdict, seen, texts, strange, padding = Verdict(), [], Counter(), [], 0
    sample = (steps.start - 1) * sequences
    for step in steps:
        for _ in range(sequences // (local_batch_size * len(streams))):
            for rank, stream in enumerate(streams):
                for row in np.asarray(next(stream)["input_ids"]):
                    place = _place(source, sample)
                    expected = _tokens(source, place)
                    if not (np.array_equal(row[: len(expected)], expected) and not row[len(expected) :].any()):
                        strange.append(f"sequence {sample:,} (step {step:,}, data-parallel rank {rank})")
                    texts[hashlib.blake2b(row.tobytes(), digest_size=16).digest()] += 1
                    padding += len(row) - len(expected)
                    seen.append(place)
                    sample += 1
    if strange:
        verdict.faults.append(f"{_count(strange)} not what the order and the files say; the first is {strange[0]}")
    verdict.sequences, verdict.padding = len(seen), padding / (len(seen) * source.seq_len)
    verdict.same_text = len(seen) - len(texts)
    verdict.faults += _repeated(source, seen) + _left_out(source, seen)
    verdict.shares = _shares(source, seen, range((steps.start - 1) * sequences, sample))
    for share in verdict.shares:
        if abs(share.sequences - share.expected) > share.tolerance:
            verdict.faults.append(
                f'"{share.source}" gives {share.sequences:,} sequences, and its weights say {share.expected:,.0f} ±'
                f" {share.tolerance:,.0f}"
            )
    return verdict


def _place(source: MixedSource, sample: int) -> _Seen:
    (place,), (number,) = (array.tolist() for array in source.mixture.locate(np.array([sample])))
    return _Seen(sample, place, number, int(source.sources[place].window_of(number)))


def _tokens(source: MixedSource, seen: _Seen) -> np.ndarray:
    parts = source.sources[seen.source].parts(seen.window)
    return np.concatenate([dataset.read(start, tokens) for dataset, start, tokens in parts])


def _repeated(source: MixedSource, seen: list[_Seen]) -> list[str]:
    first: dict[tuple[int, int, int], int] = {}
    again = []
    for each in seen:
        epoch = each.number // source.sources[each.source].num_windows
        earlier = first.setdefault((each.source, epoch, each.window), each.sample)
        if earlier != each.sample:
            again.append(f'sequence {each.sample:,} of "{source.sources[each.source].name}", as {earlier:,} was')
    return [f"{_count(again)} read again in the same epoch; the first is {again[0]}"] if again else []


def _left_out(source: MixedSource, seen: list[_Seen]) -> list[str]:
    faults = []
    for place, windows in enumerate(source.sources):
        numbers = [each.number for each in seen if each.source == place]
        gaps = len(set(range(min(numbers), max(numbers) + 1)) - set(numbers)) if numbers else 0
        if gaps:
            faults.append(f'"{windows.name}": {gaps:,} of its sequences are left out')
    return faults


def _shares(source: MixedSource, seen: list[_Seen], samples: range) -> list[Share]:
    counts, epochs = Counter(each.source for each in seen), source.epochs(samples.stop)
    spans = source.mixture.spans
    found = []
    for place, windows in enumerate(source.sources):
        expected = variance = 0.0
        for span, after in zip(spans, [*(s.start for s in spans[1:]), samples.stop], strict=True):
            here = max(0, min(after, samples.stop) - max(span.start, samples.start))
            share = span.weights[place] / sum(span.weights)
            expected += here * share
            variance += min(here, 2 * BLOCK) * share * (1 - share)
        tolerance = SIGMAS * sqrt(variance) + 2 * len(spans)  # whole blocks are off by 1 or 2 at most
        found.append(Share(windows.name, counts[place], expected, tolerance if expected else 0, epochs[place]))
    return found


def _count(found: list[str]) -> str:
    return f"{len(found):,} sequence{'s are' if len(found) > 1 else ' is'}"
