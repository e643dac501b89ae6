"""Draws a weighted sample from several sources of text: what a tokenizer is trained on and compared by."""

import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titanling.config.toml import read_toml
from titanling.data.prepare.readers import Reading, Span, read_texts
from titanling.data.prepare.text import TextFile, find_files
from titanling.errors import UserError
from titanling.paths import expand

# A long document is sampled in pieces of at least so many characters, each ending before white space.
PIECE = 10_000
_SPACE = re.compile(r"\s")
DEFAULT = Reading()


@dataclass(frozen=True)
class Source:
    """Text of one kind, say a language."""

    name: str
    text: tuple[str, ...]
    """Files, folders or globs, as data.prepare.text."""
    weight: float = 1.0
    """Its share of the sample, relative to the other sources' weights."""


def parse_sources(arguments: Sequence[str]) -> list[Source]:
    """Sources of `--source` arguments: each NAME=PATH, NAME=PATH:WEIGHT, or a TOML file of [[sources]].

    Such a table has a name, a text (a path or a list) and perhaps a weight. Raises `UserError`.
    """
    sources = []
    for argument in arguments:
        if "=" not in argument and argument.endswith(".toml"):
            sources += _read_toml(expand(argument))
            continue
        name, equals, path = argument.partition("=")
        if not (name and equals and path):
            raise UserError(f"--source {argument}: must be NAME=PATH, NAME=PATH:WEIGHT or a .toml file")
        path, weight = _split_weight(argument, path)
        sources.append(Source(name, (path,), weight))
    _check(sources)
    return sources


class Sample:
    """About `max_bytes` of UTF-8 from the sources, each in proportion to its weight: the same at every iteration.

    A source that is larger than its share gives pieces from all over it, chosen by `seed`; a smaller one is
    repeated. A packed file counts as its packed size, and as much of its beginning is looked at as there is of a plain
    one. With `each`, every source gives `max_bytes`, or what it has. Iterating yields pieces of documents.
    Raises `UserError` for a `max_bytes` below 1, and for a source without text, when it is opened or met.

    Attributes: `sources`; `shares`, the normalised weights; `bytes`, the size of each source's files; `quotas`, the
    bytes that each may give.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        max_bytes: float,
        seed: int = 0,
        each: bool = False,
        reading: Reading = DEFAULT,
    ) -> None:
        if not 1 <= max_bytes < math.inf:
            raise UserError(f"--max-bytes {max_bytes:g}: must be 1 or more")
        self.sources = list(sources)
        self._seed = seed
        self._reading = reading
        self._files = [_find(source) for source in sources]
        self.bytes = [sum(file.bytes for file in files) for files in self._files]
        for source, size in zip(self.sources, self.bytes, strict=True):
            if not size:
                raise _no_text(source)
        max_bytes = int(max_bytes)
        total = min(max_bytes, sum(self.bytes))
        weight = math.fsum(source.weight for source in sources)
        self.shares = [source.weight / weight for source in sources]
        self.quotas = [max(1, round(share * total)) for share in self.shares]
        if each:
            self.quotas = [min(max_bytes, size) for size in self.bytes]

    def __iter__(self) -> Iterator[str]:
        for index in range(len(self.sources)):
            yield from self.of(index)

    def of(self, index: int) -> Iterator[str]:
        """The texts of one source."""
        source, quota, size = self.sources[index], self.quotas[index], self.bytes[index]
        share = min(1.0, quota / max(1, size))
        rng = random.Random(f"{self._seed} {source.name}")
        files = rng.sample(self._files[index], len(self._files[index]))
        # Where in the source the first piece is taken.
        skipped = rng.random() * min(PIECE, size // 2) if share < 1 else 0.0
        taken = 0
        while taken < quota:
            seen = 0
            for raw in _pieces(files, self._reading, max(1.0, quota / size)):
                seen += len(raw)
                if taken < share * (seen - skipped) or share == 1:
                    raw = raw[: quota - taken]
                    taken += len(raw)
                    yield raw.decode(errors="ignore")
                    if taken >= quota:
                        return
            if not seen:
                raise _no_text(source)
            if share < 1:  # the files hold less text than their sizes promised
                return


def _pieces(files: Sequence[TextFile], reading: Reading, most: float) -> Iterator[bytes]:
    """Pieces in UTF-8 of each file in turn, up to `most` times its size: only a packed one holds more than 1."""
    for file in files:
        left = math.ceil(most * file.bytes)
        for raw in _cut(read_texts(Span(file), reading, Counter())):
            yield raw[:left]
            left -= len(raw)
            if left <= 0:
                break


def _cut(texts: Iterator[str]) -> Iterator[bytes]:
    for text in texts:
        start = 0
        while start < len(text):
            space = _SPACE.search(text, start + PIECE)
            end = space.start() if space else len(text)
            yield text[start:end].encode()
            start = end


def _find(source: Source) -> list[TextFile]:
    try:
        return find_files(source.text)
    except UserError as error:  # it names the key of the config
        raise UserError(str(error).replace("data.prepare.text", f"source {source.name}")) from None


def _split_weight(argument: str, path: str) -> tuple[str, float]:
    before, colon, after = path.rpartition(":")
    if not colon or "/" in after:
        return path, 1.0
    try:
        return before, float(after)
    except ValueError:
        raise UserError(
            f'--source {argument}: the weight "{after}" is no number; write NAME=PATH:WEIGHT (a path that holds a'
            " colon needs a weight after it)"
        ) from None


def _read_toml(path: str) -> list[Source]:
    try:
        tables = read_toml(Path(path)).get("sources")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; correct --source") from None
    if not isinstance(tables, list) or not tables:
        raise UserError(f"{path}: has no [[sources]]; add one with name, text and weight for each source")
    return [_read_table(path, table) for table in tables]


def _read_table(path: str, table: Any) -> Source:
    kinds = {"name": str, "text": (str, list), "weight": (int, float)}
    for key, value in table.items() if isinstance(table, dict) else ():
        if key not in kinds or not isinstance(value, kinds[key]) or isinstance(value, bool):
            raise UserError(f"{path}: sources: {key} = {value!r}: there are name, text (path or list) and weight")
    if not isinstance(table, dict) or not table.get("name") or not table.get("text"):
        raise UserError(f"{path}: each of [[sources]] needs a name and a text")
    text = [table["text"]] if isinstance(table["text"], str) else table["text"]
    if not all(isinstance(part, str) for part in text):
        raise UserError(f"{path}: source {table['name']}: text must be a path or a list of paths")
    return Source(table["name"], tuple(text), float(table.get("weight", 1.0)))


def _check(sources: Sequence[Source]) -> None:
    names = set()
    for source in sources:
        if source.name in names:
            raise UserError(f"source {source.name}: named twice; give all of its paths as one (a glob, or [[sources]])")
        names.add(source.name)
        if not (math.isfinite(source.weight) and source.weight > 0):
            raise UserError(
                f"source {source.name}: weight {source.weight:g}; must be positive, or leave the source out"
            )


def _no_text(source: Source) -> UserError:
    return UserError(
        f"source {source.name}: holds no text ({', '.join(source.text)}); correct its path or leave it out"
    )
