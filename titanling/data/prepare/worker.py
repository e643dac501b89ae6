"""What one process does to a piece: read, filter, tokenise, and write a part."""

import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import compress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from titanling.data.indexed import DTYPES, dtype_code
from titanling.data.prepare.counts import Counts
from titanling.data.prepare.parts import (
    SPLITS,
    ArrayWriter,
    LineWriter,
    new_part,
    read_array,
    read_lines,
    write_counts,
)
from titanling.data.prepare.pieces import Piece
from titanling.data.prepare.readers import Document, Reading, read_documents

if TYPE_CHECKING:
    from titanling.data.prepare.encode import Encoder
    from titanling.data.prepare.filters import Steps
    from titanling.data.prepare.tokenizer import TokenizerFiles


class Stage(NamedTuple):
    """What happens to a piece in one go. Filters are (place in the list of all, settings).

    A filter that must know what came before a document divides the list: one stage hashes each document for it, and
    the next leaves out what the decision was against.
    """

    decided: tuple[int, Any] | None
    """The filter that needed a decision, which is there now."""
    text: tuple[tuple[int, Any], ...]
    """Filters that look at a document alone."""
    tokens: tuple[tuple[int, Any], ...]
    """Filters that look at a document and the number of its tokens."""
    hashed: tuple[int, Any] | None
    """The filter that needs a decision next; with none, the documents are tokenised."""


@dataclass(frozen=True)
class Job:
    """What all pieces of a preparation have in common."""

    reading: Reading
    stages: tuple[Stage, ...]
    tokenizer: str
    """Folder of the tokenizer."""
    backend: str
    fraction: float
    """Share of the documents that is kept for validation."""
    language: str | None
    """Of all text; without it, the names of the sources."""
    workers: int = 1
    bos_id: int | None = None
    """What each document begins with, if anything."""


class Task(NamedTuple):
    """One stage of one piece."""

    piece: Piece
    stage: int
    folder: str
    """The part to make."""
    before: str | None
    """The part that the stage before has made, with `new.bin`, what was decided: bool for each hash."""


def cut_into_stages(filters: Sequence[Any]) -> tuple[Stage, ...]:
    """Stages of a list of filters, each of which says what it `needs`: "text", "hashes" or "tokens"."""
    stages: list[Stage] = []
    decided: tuple[int, Any] | None = None
    found: dict[str, list[tuple[int, Any]]] = {"text": [], "tokens": []}
    for place in enumerate(filters):
        if place[1].needs == "hashes":
            stages.append(Stage(decided, tuple(found["text"]), (), place))
            decided = place
            found["text"] = []
        else:
            found[place[1].needs].append(place)
    return (*stages, Stage(decided, tuple(found["text"]), tuple(found["tokens"]), None))


class Worker:
    """Makes parts, one at a time. Holds the tokenizer and what filters have loaded, once it is needed."""

    def __init__(self, job: Job, files: "TokenizerFiles | None" = None) -> None:
        self._job = job
        self._files = files
        self._encode: Encoder | None = None
        self._steps: Steps | None = None

    def make(self, task: Task) -> None:
        """Make the part of a task. Raises `UserError`, OSError."""
        stage = self._job.stages[task.stage]
        with new_part(task.folder) as folder:
            making = _Making(self._job, task, stage, folder, self._filters() if stage.text else None)
            if stage.hashed:
                making.spill()
            else:
                making.tokenise(self._encoder())
            write_counts(folder, making.counts())

    def _filters(self) -> "Steps":
        from titanling.data.prepare.filters import Steps

        self._steps = self._steps or Steps()
        return self._steps

    def _encoder(self) -> "Encoder":
        # Imported here: not before the number of its threads is set.
        from titanling.data.prepare.encode import Encoder
        from titanling.data.prepare.tokenizer import load_tokenizer

        if self._encode is None:
            self._files = self._files or load_tokenizer(self._job.tokenizer)
            self._encode = Encoder(self._files, self._job.backend, self._job.bos_id)
        return self._encode


class _Making:
    """One part on its way."""

    def __init__(self, job: Job, task: Task, stage: Stage, folder: str, steps: "Steps | None") -> None:
        self._job, self._task, self._stage, self._folder, self._steps = job, task, stage, folder, steps
        self._language = job.language or task.piece.name
        self._read = Counter[str]()
        self._filters: dict[int, Counts] = {}
        self._splits: dict[str, dict[str, int]] = {}
        self._note: str | None = None

    def counts(self) -> dict[str, Any]:
        """What `part.json` says."""
        filters = {str(place): asdict(counts) for place, counts in self._filters.items()}
        return {"read": dict(self._read), "filters": filters, "splits": self._splits, "note": self._note}

    def spill(self) -> None:
        """Write the documents and their hashes."""
        from titanling.data.prepare.filters import open_hashes

        assert self._stage.hashed
        hashing = open_hashes(self._stage.hashed[1], self._language)
        writers = texts, ids, hashes = (
            ArrayWriter(self._folder, "text"),
            LineWriter(self._folder, "text"),
            ArrayWriter(self._folder, "hashes"),
        )
        for text, id in self._documents():
            raw, its = text.encode(), np.asarray(hashing.hashes(text), np.uint64)
            texts.add(raw, np.array([len(raw)]))
            ids.add([id])
            hashes.add(its.tobytes(), np.array([len(its)]))
        for writer in writers:
            writer.close()

    def tokenise(self, encode: "Encoder") -> None:
        """Write the tokens of each split."""
        from titanling.data.prepare.tokenise import choose, encode_ahead, is_validation

        fraction, dtype = self._job.fraction, DTYPES[dtype_code(encode.vocab_size)]
        writers = {split: ArrayWriter(self._folder, split, "i") for split in SPLITS}
        names = {split: LineWriter(self._folder, split) for split in SPLITS}
        ids: deque[str] = deque()  # of the documents that are read and not yet written
        self._splits = {split: {"documents": 0, "bytes": 0, "tokens": 0} for split in SPLITS}
        keep = self._token_filter()
        for batch, encoded in encode_ahead(self._texts(ids), encode, self._job.workers):
            its = [ids.popleft() for _ in batch]
            kept = keep(batch, encoded.lengths - encode.marks)
            aside = np.array([fraction > 0 and is_validation(text, fraction) for text in batch])
            sizes = np.array([len(text.encode()) for text in batch])
            for split, chosen in zip(SPLITS, (kept & ~aside, kept & aside), strict=True):
                if not chosen.any():
                    continue
                mine = choose(encoded, chosen)
                writers[split].add(mine.ids.astype(dtype).tobytes(), mine.lengths)
                names[split].add(compress(its, chosen))
                counts = self._splits[split]
                counts["documents"] += len(mine.lengths)
                counts["bytes"] += int(sizes[chosen].sum())
                counts["tokens"] += len(mine.ids)
        for writer in (*writers.values(), *names.values()):
            writer.close()
        self._note = encode.note

    def _token_filter(self) -> Any:
        if not self._stage.tokens:
            return lambda batch, lengths: np.ones(len(batch), bool)
        from titanling.data.prepare.filters import TokenFilters

        places, settings = zip(*self._stage.tokens, strict=True)
        filters = TokenFilters(settings, self._language)
        self._filters |= dict(zip(places, filters.report, strict=True))
        return lambda batch, lengths: np.array(
            [filters.keep(text, int(length)) for text, length in zip(batch, lengths, strict=True)]
        )

    def _texts(self, ids: deque[str]) -> Iterator[str]:
        """The texts of `_documents`; their names are added to `ids`."""
        for text, id in self._documents():
            ids.append(id)
            yield text

    def _documents(self) -> Iterator[Document]:
        """What the stage's filters leave of what the stage before left of the piece."""
        documents = self._decided() if self._stage.decided else self._first()
        if not self._stage.text:
            yield from documents
            return
        from titanling.data.prepare.filters import Filters

        places, settings = zip(*self._stage.text, strict=True)
        filters = Filters(settings, self._language, self._steps)
        self._filters |= dict(zip(places, filters.report, strict=True))
        for text, id in documents:
            result = filters.apply(text)
            if result is not None:
                yield Document(result, id)

    def _first(self) -> Iterator[Document]:
        for span in self._task.piece.spans:
            yield from read_documents(span, self._job.reading, self._read)

    def _decided(self) -> Iterator[Document]:
        from titanling.data.prepare.filters import open_hashes

        assert self._stage.decided and self._task.before
        place, settings = self._stage.decided
        keeping = open_hashes(settings, self._language)
        counts = self._filters[place] = Counts()
        new = read_array(self._task.before, "new.bin", bool)
        lengths, hashes = (read_array(self._task.before, f"{name}.lengths", "<i8") for name in ("text", "hashes"))
        place = 0
        with open(os.path.join(self._task.before, "text.bin"), "rb") as file:
            ids = read_lines(self._task.before, "text")
            for length, many, id in zip(lengths.tolist(), hashes.tolist(), ids, strict=True):
                text = file.read(length).decode()
                result = keeping.keep(text, new[place : place + many])
                place += many
                counts.take(text, result)
                if result is not None:
                    yield Document(result, id)
