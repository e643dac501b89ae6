"""The files of streaming sources, read a document at a time from any row on. Free of torch."""

import glob
import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any, Protocol

from titanling.config.schema import Data, Source
from titanling.data.unpack import Unreadable, import_arrow, open_parquet, open_unpacked, utf8_bytes
from titanling.errors import UserError

Row = tuple[int, str]
"""Number of a row in its file, from 0, and its text."""
EXTRA = "pip install 'titanling[datasets]'"
HF_ROWS = 64


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


def open_files(data: Data, source: Source) -> TextFiles:
    """The files of a streaming source. Raises UserError if there are none, or what reads them is not installed."""
    if source.kind == "hf":
        return HubFiles(data.root, source)
    return LocalFiles(data.root, source)


class LocalFiles:
    """JSON Lines, perhaps compressed (.gz, .zst), or Parquet."""

    def __init__(self, root: str | None, source: Source) -> None:
        self._source = source
        self.paths = list(dict.fromkeys(path for each in source.paths for path in _find(root, source.name, each)))
        if source.kind == "parquet":
            import_arrow(self.paths[0])

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, file: int, first: int, part: int, parts: int) -> Iterator[Row]:
        """See `TextFiles`."""
        path, field = self.paths[file], self._source.text_field
        rows = _parquet_rows if self._source.kind == "parquet" else _jsonl_rows
        try:
            for row, text in rows(path, field, first, part, parts):
                if _checked(text, f"{path}:{row + 1}", field):
                    yield row, text
        except Unreadable as error:
            raise UserError(str(error)) from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read to its end ({error.strerror}); restore it") from None
        except UnicodeDecodeError:  # Arrow does not look whether its strings are
            raise UserError(f"{path}: holds text that is not UTF-8; write the file again") from None

    def identity(self) -> dict[str, Any]:
        """Names and sizes of the files, which may move together, and the field."""
        files = [(os.path.basename(path), os.path.getsize(path)) for path in self.paths]
        names = hashlib.sha256(json.dumps(files).encode()).hexdigest()
        return {"files": len(files), "names_and_sizes_sha256": names, "text_field": self._source.text_field}


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


def _jsonl_rows(path: str, field: str, first: int, part: int, parts: int) -> Iterator[tuple[int, Any]]:
    with open_unpacked(path) as lines:
        for row, line in enumerate(lines):
            if row >= first and row % parts == part and not line.isspace():
                yield row, _field(path, row, field, line)


def _field(path: str, row: int, field: str, line: bytes) -> Any:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise UserError(f"{path}:{row + 1}: not a line of JSON in UTF-8 ({error}); correct or remove it") from None
    if not isinstance(document, dict) or field not in document:
        raise UserError(f'{path}:{row + 1}: has no field "{field}"; set text_field of its source, or correct the line')
    return document[field]


def _parquet_rows(path: str, field: str, first: int, part: int, parts: int) -> Iterator[tuple[int, Any]]:
    with open_parquet(path) as file:
        if field not in file.schema_arrow.names:
            raise UserError(f'{path}: has no column "{field}"; set text_field of its source')
        start = 0
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if start + size > first:
                begin = start
                for batch in file.iter_batches(row_groups=[group], columns=[field]):
                    for row in range(begin + (part - begin) % parts, begin + len(batch), parts):
                        if row >= first:
                            yield row, batch.column(0)[row - begin].as_py()
                    begin += len(batch)
            start += size


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
