"""The files of streaming sources, read a document at a time from any row on. Free of torch."""

import glob
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

from titanling.config.schema import Data, Source
from titanling.data.prepare.readers import Reading, Span, format_of, read_rows
from titanling.data.prepare.text import TextFile, find_files
from titanling.data.unpack import Unreadable, import_arrow, utf8_bytes
from titanling.errors import UserError

Row = tuple[int, str]
"""Number of a row in its file, from 0, and its text."""
EXTRA = "pip install 'titanling[datasets]'"
HF_ROWS = 64
LOOKS = 256
LONGEST = 1_000_000_000
"""Bytes of a document."""


class TextFiles(Protocol):
    """What a source reads: files of rows, each with a text."""

    def __len__(self) -> int:
        """Files."""
        ...

    def read(self, file: int, first: int, part: int, parts: int) -> Iterator[Row]:
        """Rows of a file from `first` on whose number leaves the rest `part` when divided by `parts`.

        Empty texts are left out. Raises UserError: a file, or a row of it, that cannot be read.
        """
        ...

    def identity(self) -> dict[str, Any]:
        """What a resumed run must find again: JSON."""
        ...

    def check(self) -> None:
        """Raise UserError for files that their beginnings show to be unreadable, and for a first document."""
        ...


def open_files(data: Data, source: Source) -> TextFiles:
    """The files of a streaming source. Raises UserError if there are none, or what reads them is not installed."""
    if source.kind == "hf":
        return HubFiles(data.root, source)
    return LocalFiles(data.root, source)


class LocalFiles:
    """Files of every format that preparation reads, or of the one that the kind names."""

    def __init__(self, root: str | None, source: Source) -> None:
        self._source = source
        self._reading = Reading(
            source.text_field,
            max_document_bytes=LONGEST,
            format=source.format,
            document_separator=source.document_separator,
            source=source.name,
        )
        find = _find_below if source.kind == "files" else _find
        self.paths = list(dict.fromkeys(path for each in source.paths for path in find(root, source.name, each)))
        if source.kind == "parquet":
            import_arrow(self.paths[0])

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, file: int, first: int, part: int, parts: int) -> Iterator[Row]:
        """See `TextFiles`."""
        path = self.paths[file]
        try:
            reading = self._of_kind(path)
            for row, document in read_rows(Span(TextFile(path, 0)), reading, first, part, parts):
                if isinstance(document, Unreadable):
                    raise document
                if document.text:
                    yield row, document.text
        except Unreadable as error:
            raise UserError(str(error)) from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read to its end ({error.strerror}); restore it") from None

    def _of_kind(self, path: str) -> Reading:
        """How a file is read. Raises Unreadable if it is not what the kind says."""
        kinds, kind = {"jsonl": ("jsonl", "json"), "parquet": ("parquet",)}, self._source.kind
        found = format_of(TextFile(path, 0), self._reading)
        if kind == "files":
            return self._reading
        if found.kind not in kinds[kind] and found.kind != "text":
            raise Unreadable(f'{path}: is {found}, and its source is of kind "{kind}"; set kind = "files"')
        return replace(self._reading, format=found.kind if found.kind in kinds[kind] else kind)

    def check(self) -> None:
        """See `TextFiles`. Of many files it looks at LOOKS."""
        for path in self.paths[:: -(-len(self.paths) // LOOKS)]:
            try:
                self._of_kind(path)
            except Unreadable as error:
                raise UserError(str(error)) from None
        next(self.read(0, 0, 0, 1), None)

    def identity(self) -> dict[str, Any]:
        """Names and sizes of the files, which may move together, and how they are read."""
        files = [(os.path.basename(path), os.path.getsize(path)) for path in self.paths]
        names = hashlib.sha256(json.dumps(files).encode()).hexdigest()
        found = {"files": len(files), "names_and_sizes_sha256": names, "text_field": self._source.text_field}
        if self._source.kind == "files":
            found |= {"format": self._source.format, "document_separator": self._source.document_separator}
        return found


def _checked(text: Any, place: str, field: str) -> str:
    """A row's text, if it is one and can be tokenised."""
    if not isinstance(text, str):
        found = "null" if text is None else f"of type {type(text).__name__}"
        raise UserError(f'{place}: "{field}" is {found}, not text; correct the row, or text_field of its source')
    try:
        utf8_bytes(text)
    except Unreadable as error:
        raise UserError(f'{place}: "{field}": {error}') from None
    return text


def _find(root: str | None, name: str, path: str) -> list[str]:
    pattern = os.path.join(root or "", path)
    found = [pattern] if os.path.isfile(pattern) else sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
    if not found:
        raise UserError(
            f'data.sources: "{name}": {pattern} is no file, nor a glob of any; correct its paths or data.root'
        )
    return found


def _find_below(root: str | None, name: str, path: str) -> list[str]:
    """As of data.prepare.text: folders too, and nothing that titanling has written."""
    try:
        return [file.path for file in find_files([os.path.join(root or "", os.path.expanduser(path))])]
    except UserError as error:  # it names the key of the config
        raise UserError(str(error).replace("data.prepare.text", f'data.sources: "{name}"')) from None


class HubFiles:
    """A data set of the Hugging Face Hub, or a folder in its layout, streamed by `datasets`."""

    def __init__(self, root: str | None, source: Source) -> None:
        try:
            import datasets
        except ImportError:
            raise UserError(f'data.sources: "{source.name}": kind = "hf" needs datasets; install it: {EXTRA}') from None
        local = os.path.join(root or "", source.paths[0])
        self._path = local if os.path.isdir(local) else source.paths[0]
        self._source = source
        try:
            dataset = datasets.load_dataset(self._path, source.subset, split=source.split, streaming=True)
            columns = dataset.column_names or list(next(iter(dataset.take(1)), {}))
        except Exception as error:  # of many libraries: files, network, the Hub
            raise self._unreadable(error) from None
        if source.text_field not in columns:
            raise UserError(
                f'data.sources: "{source.name}": {self._path} has no column "{source.text_field}" but'
                f" {', '.join(columns)}; set text_field"
            )
        self._dataset = dataset.select_columns([source.text_field])

    def __len__(self) -> int:
        return self._dataset.num_shards

    def read(self, file: int, first: int, part: int, parts: int) -> Iterator[Row]:
        """See `TextFiles`."""
        field, row = self._source.text_field, first
        place = f'data.sources: "{self._source.name}": {self._path}, file {file + 1}'
        try:
            # iter, for __iter__ would divide a worker's shard once more among all workers.
            for batch in self._dataset.shard(len(self), file).skip(first).iter(HF_ROWS):
                for text in batch[field]:
                    if row % parts == part and _checked(text, f"{place}, row {row + 1}", field):
                        yield row, text
                    row += 1
        except UserError:
            raise
        except Exception as error:
            raise self._unreadable(error) from None

    def check(self) -> None:
        """See `TextFiles`."""
        next(self.read(0, 0, 0, 1), None)

    def identity(self) -> dict[str, Any]:
        """What was asked for."""
        source = self._source
        asked = {"paths": list(source.paths), "subset": source.subset, "split": source.split}
        return asked | {"files": len(self), "text_field": source.text_field}

    def _unreadable(self, error: Exception) -> UserError:
        subset = f' with subset = "{self._source.subset}"' if self._source.subset else ""
        words = " ".join(str(error).split())[:300]
        return UserError(
            f'data.sources: "{self._source.name}": datasets cannot stream split "{self._source.split}" of'
            f" {self._path}{subset} ({type(error).__name__}: {words}); correct paths, subset or split"
        )
