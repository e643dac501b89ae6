"""Which documents a step reads, and which steps read a document: the samples' order and its inverse. Free of torch.

Nothing is logged for it: a sample's place is a function of the config, the same at any world size and after resuming.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import accumulate, count
from typing import NamedTuple

import numpy as np

from titanling.data.ids import documents_named, has_ids, read_ids
from titanling.data.packing import PackedSource
from titanling.data.sources import MixedSource, WindowSource
from titanling.errors import UserError


class Piece(NamedTuple):
    """A part of a document in a sample."""

    source: str
    document: int
    """Number of the document in its source, through all of its files."""
    first: int
    """Offset in the document of the first of its tokens here."""
    tokens: int
    prefix: str
    """The file that holds it."""


class Sight(NamedTuple):
    """A time when a run reads a part of a document."""

    step: int
    """1 is the first."""
    sample: int
    """Of the run; 0 is the first."""
    epoch: int
    """0 is the first."""
    first: int
    tokens: int


def samples_of_step(step: int, sequences: int) -> range:
    """The samples of a step (1, 2, …) that takes `sequences`."""
    return range((step - 1) * sequences, step * sequences)


def pieces(source: MixedSource, sample: int) -> list[Piece]:
    """The documents that a sample's inputs are made of, in order."""
    (place,), (number,) = (array.tolist() for array in source.mixture.locate(np.array([sample])))
    windows, firsts = source.sources[place], _first_documents(source.sources[place])
    found = []
    for data, at, tokens in windows.parts(windows.window_of(number)):
        earlier, end = firsts[windows.datasets.index(data)], at + tokens
        while at < end:
            document = data.document_at(at)
            there = data.document_range(document)
            upto = min(end, there.stop)
            found.append(Piece(windows.name, earlier + document, at - there.start, upto - at, data.prefix))
            at = upto
    return found


def sights(source: MixedSource, name: str, document: int, samples: int, sequences: int) -> Iterator[Sight]:
    """When a run of `samples` reads a document of a source, window after window, each in the order of the epochs.

    Raises UserError if there is no such source or document.
    """
    place = _place(source, name, f"--document {name}:{document}")
    windows = source.sources[place]
    firsts = _first_documents(windows)
    if not 0 <= document < firsts[-1]:
        raise UserError(f'--document {name}:{document}: "{name}" has the documents 0 to {firsts[-1] - 1:,}')
    file = bisect_right(firsts, document) - 1
    dataset = windows.datasets[file]
    there = dataset.document_range(document - firsts[file])
    for window in windows.windows_of(file, there.start, there.stop - 1):
        for data, start, tokens in windows.parts(window):
            first, last = max(start, there.start), min(start + tokens, there.stop)
            if data is dataset and first < last:
                for epoch, sample in enumerate(_samples(source, place, window, samples)):
                    yield Sight(sample // sequences + 1, sample, epoch, first - there.start, last - first)


def names(source: MixedSource, found: Iterable[Piece]) -> dict[tuple[str, int], str | int]:
    """The names of pieces' documents, for those that have one: (source, document) → name."""
    wanted: dict[tuple[str, str], set[int]] = defaultdict(set)
    for piece in found:
        if has_ids(piece.prefix):
            wanted[piece.source, piece.prefix].add(piece.document)
    result: dict[tuple[str, int], str | int] = {}
    for windows in source.sources:
        for data, first in zip(windows.datasets, _first_documents(windows), strict=False):
            if documents := list(wanted[windows.name, data.prefix]):
                ids = read_ids(data.prefix, [document - first for document in documents])
                result |= {(windows.name, document): id for document, id in zip(documents, ids, strict=True)}
    return result


def documents_with_id(source: MixedSource, name: str, id: str) -> list[int]:
    """The documents of a source that have this name. Raises UserError if there are none, or none with any name."""
    asked = f"--id {name}:{id}"
    windows = source.sources[_place(source, name, asked)]
    found = documents_named(id, [data.prefix for data in windows.datasets], f'"{name}"', asked)
    return [
        first + number for first, numbers in zip(_first_documents(windows), found, strict=False) for number in numbers
    ]


def _place(source: MixedSource, name: str, asked: str) -> int:
    names = [windows.name for windows in source.sources]
    if name not in names:
        raise UserError(f'{asked}: no source is named "{name}"; there are {", ".join(names)}')
    return names.index(name)


def _samples(source: MixedSource, place: int, window: int, samples: int) -> Iterator[int]:
    """The samples that show a window of a source in a run of `samples`, epoch after epoch."""
    for epoch in count():
        sample = source.mixture.sample_of(place, source.sources[place].samples_of_window(window, epoch))
        if sample is None or sample >= samples:
            return
        yield sample


def _first_documents(windows: WindowSource | PackedSource) -> list[int]:
    """The number of the first document of each file of a source, and behind the last the number of them all."""
    return [0, *accumulate(dataset.num_documents for dataset in windows.datasets)]
