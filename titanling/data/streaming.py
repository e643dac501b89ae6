"""Streaming sources: text that is tokenised while training reads it. Free of torch.

All ranks' workers are so many shards, and each shard has documents of its own: if there are g files or a multiple in
each of g groups, g shards, or as many each, share a group, and deal its rows among them. A shard goes through its
documents in blocks of `shuffle_buffer`, each in an order of its own, and its token stream is cut into windows. Where it
stands is five numbers, from which the same windows follow again.
"""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from math import gcd
from typing import Any, NamedTuple

import numpy as np

from titanling.config.schema import Data, Source
from titanling.data.mixture import Mixture
from titanling.data.order import Permutation, order_key
from titanling.data.prepare.encode import Encoded, Encoder
from titanling.data.prepare.tokenizer import TokenizerFiles, load_tokenizer
from titanling.data.sources import changes_of, lengths_of, shares_of, sources_of, spans_of, stages_of
from titanling.data.stream_files import TextFiles, open_files
from titanling.errors import UserError

CHUNK = 64
"""Documents that are tokenised together."""
FORK = "fork"
"""How workers begin: streams cannot be sent to a new process, and a worker must be a child of its rank."""


class Place(NamedTuple):
    """Where a shard stands in a source: at the token that its next window begins with."""

    epoch: int = 0
    file: int = 0
    """Number of the file, in the epoch's order of this shard's files, in which the block of documents begins."""
    row: int = 0
    """Row at which it begins there."""
    index: int = 0
    """Document of the block, in the block's order."""
    offset: int = 0
    """Token of the document."""


class Stream:
    """One source as one shard of `shards` reads it: windows of seq_len + 1 tokens, the last one the next one's first.

    Documents end with the end-of-document token; windows do not care where documents end, nor epochs.
    """

    def __init__(
        self,
        source: Source,
        files: TextFiles,
        encode: Callable[[Sequence[str]], Encoded],
        shard: int,
        shards: int,
        seq_len: int,
        seed: int,
        buffer: int,
        place: Place = Place(),  # noqa: B008
    ) -> None:
        """`place`: where to go on, as `place` said it then."""
        groups = gcd(len(files), shards)
        self._source, self._files, self._encode = source, files, encode
        self._mine = range(shard % groups, len(files), groups)
        self._part, self._parts = shard // groups, shards // groups
        self._shard = f"{shard + 1} of {shards}"
        self._seq_len, self._seed, self._buffer = seq_len, seed, buffer
        self._held: deque[tuple[Place, np.ndarray]] = deque()
        """Tokens of documents that are not used up."""
        self._tokens = 0
        """How many they are."""
        self._offset = place.offset
        """How many of the first document's are used up."""
        self._start = place
        self._reading = self._tokenised(place)

    @property
    def place(self) -> Place:
        """Where the next window begins."""
        return self._held[0][0]._replace(offset=self._offset) if self._held else self._start

    def window(self) -> np.ndarray:
        """The next window: (seq_len + 1,) uint32. Raises UserError for what cannot be read, and beyond max_epochs."""
        while self._tokens - self._offset <= self._seq_len:
            try:
                document = next(self._reading)
            except StopIteration:
                raise self._over() from None
            self._held.append(document)
            self._tokens += len(document[1])
        parts, start, left = [], self._offset, self._seq_len + 1
        for _, tokens in self._held:
            parts.append(tokens[start : start + left])
            left -= len(parts[-1])
            start = 0
            if not left:
                break
        self._offset += self._seq_len
        while self._offset >= len(self._held[0][1]):  # there is one behind it: its last token is still to come
            used = len(self._held.popleft()[1])
            self._offset -= used
            self._tokens -= used
        return np.concatenate(parts)

    def _tokenised(self, place: Place) -> Iterator[tuple[Place, np.ndarray]]:
        documents = self._documents(place)
        while chunk := list(islice(documents, CHUNK)):
            encoded = self._encode([text for _, text in chunk])
            ends = np.cumsum(encoded.lengths)[:-1]
            yield from zip((there for there, _ in chunk), np.split(encoded.ids, ends), strict=True)

    def _documents(self, place: Place) -> Iterator[tuple[Place, str]]:
        """Documents of this shard, epoch after epoch up to max_epochs, and the place of each."""
        epoch, file, row, skip, _ = place
        while self._source.max_epochs is None or epoch < self._source.max_epochs:
            rows, empty = self._rows(epoch, file, row), True
            while block := list(islice(rows, self._buffer)):
                empty = False
                file, row, _ = block[0]
                key = order_key(self._seed, f"block of {self._source.name}, {self._shard}, {epoch}, {file}", row)
                order = Permutation(len(block), key)
                for index in range(skip, len(block)):
                    yield Place(epoch, file, row, index), block[order.forward(index)][2]
                skip = 0
            if empty:
                raise UserError(
                    f'data.sources: "{self._source.name}" has no document for shard {self._shard} (every worker of'
                    " every rank is one); use fewer data.workers or ranks, or give it more text"
                )
            epoch, file, row = epoch + 1, 0, 0

    def _rows(self, epoch: int, first_file: int, first_row: int) -> Iterator[tuple[int, int, str]]:
        """(file in the epoch's order, row, text) of an epoch from there on."""
        order = Permutation(len(self._mine), order_key(self._seed, f"files of {self._source.name}", epoch))
        for file in range(first_file, len(self._mine)):
            path = self._mine[order.forward(file)]
            first = first_row if file == first_file else 0
            for row, text in self._files.read(path, first, self._part, self._parts):
                yield file, row, text

    def _over(self) -> UserError:
        return UserError(
            f'data.sources: "{self._source.name}": its max_epochs = {self._source.max_epochs:g} are over for shard'
            f" {self._shard} (every worker of every rank is one); give it more text or less weight, raise max_epochs,"
            " or train for fewer steps"
        )


class Streams:
    """The streaming sources of a run."""

    def __init__(
        self,
        data: Data,
        tokenizer: TokenizerFiles,
        seq_len: int,
        seed: int,
        files: Sequence[TextFiles],
        mixture: Mixture,
    ) -> None:
        """`files` in the order of `sources_of(data)`, as those of the mixture."""
        self.sources = sources_of(data)
        self.tokenizer = tokenizer
        self.mixture = mixture
        self.seq_len = seq_len
        self.workers = data.workers
        self._files = files
        self._seed, self._buffer, self._backend = seed, data.shuffle_buffer, data.prepare.backend
        self.bos_id = tokenizer.document_bos() if data.prepare.add_bos else None
        """What each document begins with, if anything."""

    def open(self, shard: int, shards: int, places: dict[str, list[int]]) -> list[Stream]:
        """Each source as one shard reads it, from its place, or from the beginning if `places` has none."""
        encode = Encoder(self.tokenizer, self._backend, self.bos_id)
        return [
            Stream(
                source,
                files,
                encode,
                shard,
                shards,
                self.seq_len,
                self._seed,
                self._buffer,
                Place(*places.get(source.name, ())),
            )
            for source, files in zip(self.sources, self._files, strict=True)
        ]

    def identity(self, dp_world: int, local_batch_size: int) -> dict[str, Any]:
        """What the windows depend on, for a checkpoint to be compared with: all JSON."""
        return {
            "seq_len": self.seq_len,
            "seed": self._seed,
            "tokenizer_sha256": self.tokenizer.sha256,
            "eod_id": self.tokenizer.eod_id,
            "sources": {
                source.name: {"kind": source.kind} | files.identity()
                for source, files in zip(self.sources, self._files, strict=True)
            },
            "stages": stages_of(self.mixture, [source.name for source in self.sources]),
            "stream": {
                "data-parallel ranks": dp_world,
                "data.workers": self.workers,
                "training.local_batch_size": local_batch_size,
                "data.shuffle_buffer": self._buffer,
            }
            # Only where it is set: what was streamed before there was a choice says nothing of it.
            | ({"data.prepare.add_bos": True} if self.bos_id is not None else {}),
        }

    def check_readable(self) -> None:
        """Look at the files of each source, and read its first document. Raises UserError."""
        for files in self._files:
            files.check()

    def describe(self, sequences: int) -> list[str]:
        """Lines that say what a run reads: kind, files and share in every stage of each source."""
        by = f"{self.workers} workers of each rank" if self.workers else "a thread of each rank"
        lines = lengths_of(self.mixture, self.seq_len, sequences)
        lines += [f"data: streamed, tokenised by {by}{changes_of(self.mixture, sequences)}"]
        width = max(len(source.name) for source in self.sources)
        for place, (source, files) in enumerate(zip(self.sources, self._files, strict=True)):
            kind = "" if source.kind == "files" else f"{source.kind} "
            what = f"{len(files):,} {kind}file{'s' if len(files) > 1 else ''}"
            lines.append(f"  {source.name:<{width}}  {shares_of(self.mixture, place)}  of {what}")
        return lines


def open_streams(data: Data, tokenizer: str, seq_len: int, seed: int, sequences: int) -> Streams:
    """Find the files of all streaming sources; `tokenizer` is its directory, `sequences` how many a step takes.

    Raises UserError: files that are missing or need an extra, a tokenizer that cannot be used, stages out of order.
    """
    sources = sources_of(data)
    files = [open_files(data, source) for source in sources]
    mixture = Mixture(spans_of(data, sources, seq_len, sequences), seed)
    return Streams(data, load_tokenizer(tokenizer), seq_len, seed, files, mixture)


def check_streams(data: Data, tokenizer: str, vocab_size: int, seq_len: int, seed: int, sequences: int) -> None:
    """Raise UserError for what `open_streams` raises, a first document without text, and ids beyond the vocabulary.

    And for workers where processes cannot fork.
    """
    if data.workers and FORK not in multiprocessing.get_all_start_methods():
        raise UserError(f"data.workers = {data.workers}: processes cannot fork on this system; set it to 0, a thread")
    streams = open_streams(data, tokenizer, seq_len, seed, sequences)
    if streams.tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{tokenizer}/tokenizer.json: token ids reach {streams.tokenizer.vocab_size - 1}, beyond the model's"
            f" vocabulary; set model.vocab_size to {streams.tokenizer.vocab_size} or more (now {vocab_size})"
        )
    streams.check_readable()
