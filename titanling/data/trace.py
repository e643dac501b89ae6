"""Which documents a step reads, and which steps read a document: the samples' order and its inverse. Free of torch.

Nothing is logged for it: a sample's place is a function of the config, the same at any world size and after resuming.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from titanling.data.sources import MixedSource
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
    windows = source.sources[place]
    window = windows.place(windows.window_of(number))
    data, at, end = window.dataset, window.start, window.start + source.seq_len
    earlier = _documents_before(source, place, windows.datasets.index(data))
    found = []
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
    names = [windows.name for windows in source.sources]
    if name not in names:
        raise UserError(f'--document {name}:{document}: no source is named "{name}"; there are {", ".join(names)}')
    place = names.index(name)
    windows = source.sources[place]
    file, local = 0, document
    while file < len(windows.datasets) and local >= windows.datasets[file].num_documents:
        local -= windows.datasets[file].num_documents
        file += 1
    if file == len(windows.datasets) or document < 0:
        count = _documents_before(source, place, len(windows.datasets))
        raise UserError(f'--document {name}:{document}: "{name}" has the documents 0 to {count - 1:,}')
    there = windows.datasets[file].document_range(local)
    for window in windows.windows_of(file, there.start, there.stop - 1):
        start = windows.place(window).start
        first, last = max(start, there.start), min(start + source.seq_len, there.stop)
        epoch = 0
        while True:
            sample = source.mixture.sample_of(place, windows.samples_of_window(window, epoch))
            if sample is None or sample >= samples:
                break
            yield Sight(sample // sequences + 1, sample, epoch, first - there.start, last - first)
            epoch += 1


def _documents_before(source: MixedSource, place: int, file: int) -> int:
    return sum(dataset.num_documents for dataset in source.sources[place].datasets[:file])
