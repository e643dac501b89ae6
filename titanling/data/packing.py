"""Sequences of whole documents: best-fit packing without an index. Free of torch.

The documents of a source, file after file, are one stream of tokens, cut into `num_stretches` stretches of equal
length, at least `window` sequences long. A stretch is packed by itself: its documents are split at seq_len, and the
parts, longest first, each go to the row where they leave the least room (best-fit decreasing; Johnson, 1973, and for
language models Ding et al., Fewer Truncations Improve Language Modeling, 2024).

Every stretch has the same number of rows, as few as its tokens can fill: so a run's sequences can be counted, and any
of them found, without packing those before it; an index of 10¹² tokens' rows would take hours to make. The price:
where best fit would take one more row, parts that find no room are split into what is left at the end, as is a
document where two stretches meet. Where lengths differ, these are few, for best fit leaves hardly any room; where most
documents are just above half of seq_len they are many, and best fit would leave half of each row empty. In return
padding is less than one row of a stretch, less than 1 / `window`, whatever the text.

A row is found by packing its stretch, which takes about a millisecond. So that it need not be done anew for each, the
order stays within GROUP stretches for a while: each epoch visits the stretches in a permuted order, and permutes the
rows of each GROUP of them.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from titanling.data.order import Permutation, order_key
from titanling.data.token_files import Tokens

GROUP = 64
NO_LABEL = -100
"""torch's ignore_index (titanling.loss has it, and torch)."""

Arrays = dict[str, np.ndarray]


class Part(NamedTuple):
    """Consecutive tokens of a dataset."""

    dataset: Tokens
    start: int
    """Offset of the first in the dataset's flat stream."""
    tokens: int


class _Packing(NamedTuple):
    """The parts of a stretch, row after row, in each row in the order of the stream: (parts,), and (rows + 1,)."""

    starts: np.ndarray
    lengths: np.ndarray
    ends: np.ndarray
    """Whether a document ends with the part."""
    rows: np.ndarray
    """The first part of each row, and behind the last row the number of parts."""


class PackedSource:
    """The endless sample order over one source whose sequences ("windows") are packed by best fit.

    Each of `num_windows` sequences is read once in every epoch, in an order keyed by (seed, name, epoch), and with them
    every token once. Of datasets whose documents are told by their index.
    """

    def __init__(
        self, datasets: Sequence[Tokens], seq_len: int, seed: int, name: str, window: int, masked: bool
    ) -> None:
        """`window`: sequences packed together, at least. `masked`: documents do not see each other (`batch`)."""
        self.datasets = tuple(datasets)
        self.seq_len = seq_len
        self.seed = seed
        self.name = name
        self.masked = masked
        self.packing = f"best_fit of {window}"
        self._file_ends = list(accumulate(dataset.num_tokens for dataset in datasets))
        self.num_tokens = self._file_ends[-1]
        self.num_stretches = max(1, self.num_tokens // (window * seq_len))
        while self.num_tokens % self.num_stretches and self.num_tokens // self.num_stretches % seq_len == 0:
            self.num_stretches -= 1  # or the shorter stretches could fill one row less, and leave it without a token
        longest = -(-self.num_tokens // self.num_stretches)
        self.rows = -(-longest // seq_len)
        """Sequences of each stretch."""
        self.num_windows = self.num_stretches * self.rows
        self._pack = lru_cache(GROUP)(self._pack_stretch)
        self._block = lru_cache(2)(self._order_block)
        self._places = np.arange(seq_len)

    def window_of(self, sample: int) -> int:
        """Window of a sample of the source (0, 1, …)."""
        epoch, sample = divmod(sample, self.num_windows)
        block, slot = divmod(sample, GROUP * self.rows)
        stretches, order = self._block(epoch, block)
        place, row = divmod(int(order[slot]), self.rows)
        return int(stretches[place]) * self.rows + row

    def samples_of_window(self, window: int, epoch: int) -> int:
        """The sample of the source that shows `window` in `epoch` (0, 1, …): the inverse of `window_of`."""
        stretch, row = divmod(window, self.rows)
        block, slot = divmod(self._stretches_order(epoch).inverse(stretch) * self.rows + row, GROUP * self.rows)
        inverse = self._rows_order(epoch, block).inverse(slot)
        return epoch * self.num_windows + block * GROUP * self.rows + inverse

    def batch(self, samples: np.ndarray) -> Arrays:
        """The batch of samples (rows,) of the source, as `packed_batch`."""
        return packed_batch((self, self.window_of(sample)) for sample in samples.tolist())

    def parts(self, window: int) -> list[Part]:
        """What a window holds, in order; each is of one document."""
        return [Part(*self._locate(start), length) for start, length, _ in self._parts_of_row(window)]

    def windows_of(self, dataset: int, first: int, last: int) -> list[int]:
        """The windows in which tokens `first` … `last` of a dataset are inputs."""
        before = self._file_ends[dataset - 1] if dataset else 0
        first, last = first + before, last + before
        found = []
        for stretch in range(self._stretch_at(first), self._stretch_at(last) + 1):
            packing = self._pack(stretch)
            here = np.flatnonzero((packing.starts <= last) & (first < packing.starts + packing.lengths))
            rows = np.unique(np.searchsorted(packing.rows, here, side="right") - 1)
            found += [stretch * self.rows + row for row in rows.tolist()]
        return found

    def write_row(self, window: int, batch: Arrays, row: int) -> None:
        """Write a window into a row of a batch (`packed_batch`)."""
        ids, labels = batch["input_ids"][row], batch["labels"][row]
        at, follows = 0, False  # whether a label is missing: that of the token before, which may see the next document
        for start, length, ends in self._parts_of_row(window):
            dataset, offset = self._locate(start)
            tokens = dataset.read(offset, length if ends else length + 1)  # the label of the last is in its document
            ids[at : at + length] = tokens[:length]
            labels[at : at + len(tokens) - 1] = tokens[1:]
            if self.masked:
                batch["positions"][row, at : at + length] = self._places[:length]
            elif follows:
                labels[at - 1] = tokens[0]
            at, follows = at + length, ends
        if self.masked:  # padding is as a document
            batch["positions"][row, at:] = self._places[: self.seq_len - at]

    def _parts_of_row(self, window: int) -> Iterator[tuple[int, int, bool]]:
        """(offset in the source's stream, length, whether its document ends) of each part of a window."""
        stretch, row = divmod(window, self.rows)
        packing = self._pack(stretch)
        here = slice(packing.rows[row], packing.rows[row + 1])
        return zip(*(each[here].tolist() for each in packing[:3]), strict=True)

    def _locate(self, offset: int) -> tuple[Tokens, int]:
        file = bisect_right(self._file_ends, offset)
        return self.datasets[file], offset - (self._file_ends[file - 1] if file else 0)

    def _bounds(self, stretch: int) -> tuple[int, int]:
        tokens, count = self.num_tokens, self.num_stretches
        return stretch * tokens // count, (stretch + 1) * tokens // count

    def _stretch_at(self, offset: int) -> int:
        """Undoes `_bounds`."""
        return ((offset + 1) * self.num_stretches - 1) // self.num_tokens

    def _pack_stretch(self, stretch: int) -> _Packing:
        begin, end = self._bounds(stretch)
        borders = self._documents_between(begin, end)
        starts, lengths = split_documents(np.array([begin, *borders, end]), self.seq_len)
        parts, firsts, lengths, rows = pack(lengths, self.rows, self.seq_len)
        starts = starts[parts] + firsts
        order = np.lexsort((starts, rows))
        starts, lengths, rows = starts[order], lengths[order], rows[order]
        whole = end == self.num_tokens or self._documents_between(end - 1, end + 1)  # or its last document goes on
        ends = np.isin(starts + lengths, [*borders, *([end] if whole else [])])
        return _Packing(starts, lengths.astype(np.int32), ends, np.searchsorted(rows, np.arange(self.rows + 1)))

    def _documents_between(self, begin: int, end: int) -> list[int]:
        """Where documents begin behind `begin` and before `end`: offsets in the source's stream."""
        found: list[int] = []
        for file in range(bisect_right(self._file_ends, begin), bisect_left(self._file_ends, end) + 1):
            before = self._file_ends[file - 1] if file else 0
            if begin < before < end:
                found.append(before)
            starts = self.datasets[file].document_starts(max(0, begin - before), end - before)
            found += (starts + before).tolist()
        return found

    def _order_block(self, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The stretches of a block, and its rows in the order of an epoch, counted through them: all at once."""
        first = block * GROUP
        places = np.arange(first, min(first + GROUP, self.num_stretches))
        order = self._rows_order(epoch, block)
        return self._stretches_order(epoch).forward(places), order.forward(np.arange(order.n))

    def _stretches_order(self, epoch: int) -> Permutation:
        return _order(self.num_stretches, self.seed, f"{self.name} stretches", epoch)

    def _rows_order(self, epoch: int, block: int) -> Permutation:
        size = GROUP * self.rows
        return _order(min(size, self.num_windows - block * size), self.seed, f"{self.name} rows {epoch}", block)


def packed_batch(rows: Iterable[tuple[PackedSource, int]]) -> Arrays:
    """The batch of windows, each with its source, all of the same seq_len and all masked, or not.

    {"input_ids", "labels"} and if masked "positions": int64 (rows, seq_len). A label is the token that follows in the
    document. Behind the last token of a document, that is NO_LABEL if masked, else the next token of the row. Rows end
    with padding, if any: token 0 without labels. `positions` are those of tokens in their part; padding is one part.
    """
    chosen = list(rows)
    source = chosen[0][0]
    shape = len(chosen), source.seq_len
    batch = {"input_ids": np.zeros(shape, np.int64), "labels": np.full(shape, NO_LABEL, np.int64)}
    if source.masked:
        batch["positions"] = np.empty(shape, np.int64)
    for row, (each, window) in enumerate(chosen):
        each.write_row(window, batch, row)
    return batch


def split_documents(borders: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents from each border (n + 1,) to the next, in parts of seq_len and a last one: starts and lengths."""
    sizes = np.diff(borders)
    counts = -(-sizes // seq_len)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(borders[:-1], counts) + number * seq_len
    return starts, np.minimum(seq_len, np.repeat(borders[1:], counts) - starts)


def pack(lengths: np.ndarray, rows: int, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Put parts of `lengths` (1 … seq_len), no more together than rows × seq_len, into rows of seq_len.

    Best-fit decreasing; what then finds no room is split into the largest that is left. Returns four arrays: the part,
    where in it the piece begins, the piece's length, and its row.
    """
    room = _Room(rows, seq_len)
    placed: list[tuple[int, int, int, int]] = []
    beyond: list[tuple[int, int]] = []
    order = np.argsort(-lengths, kind="stable")
    for part, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        space = room.least(length)
        if space:
            placed.append((part, 0, length, room.take(space, length)))
        else:
            beyond.append((part, length))
    for part, length in beyond:
        first = 0
        while first < length:
            space = room.least(length - first) or room.most()
            piece = min(space, length - first)
            placed.append((part, first, piece, room.take(space, piece)))
            first += piece
    return tuple(np.array(placed, np.int64).reshape(-1, 4).T)


class _Room:
    """Rows by how much room they have; the bits of one large integer say of which amounts there are any."""

    def __init__(self, rows: int, seq_len: int) -> None:
        self._rows: list[list[int]] = [[] for _ in range(seq_len + 1)]
        self._rows[seq_len] = list(range(rows - 1, -1, -1))
        self._there = 1 << seq_len

    def least(self, length: int) -> int:
        """The least room that is enough; 0 if none is."""
        there = self._there >> length
        return length + (there & -there).bit_length() - 1 if there else 0

    def most(self) -> int:
        """The most room of any row."""
        return self._there.bit_length() - 1

    def take(self, space: int, length: int) -> int:
        """A row with just this room, of which `length` is taken."""
        rows = self._rows[space]
        row = rows.pop()
        if not rows:
            self._there ^= 1 << space
        if space > length:
            self._rows[space - length].append(row)
            self._there |= 1 << (space - length)
        return row


@lru_cache(1024)  # of some epochs and blocks of each source
def _order(size: int, seed: int, name: str, number: int) -> Permutation:
    return Permutation(size, order_key(seed, name, number))
