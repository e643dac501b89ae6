"""Parts: what a worker makes of a piece. A folder each, which appears whole or not at all.

Of a finished piece: `training.bin` and `validation.bin` (tokens as in the .bin of the output), `.lengths` (int32, of
each document), `.ids` (a line each with its name, or empty). Of one that waits for a decision: `text.bin` (the
documents in UTF-8), `text.lengths` (int64, bytes), `text.ids`, `hashes.bin` (uint64), `hashes.lengths` (int64, hashes
of each document). In both, `part.json` with what was counted.
"""

import json
import os
import re
import shutil
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from titanling.files import new_folder

SPLITS = ("training", "validation")
# A part, whole or on its way: of this version, or of those that wrote only the number of their process.
_PART = re.compile(r"[0-9a-f]{32}(\.(?:titanling-[0-9a-f-]+|\d+)\.partial)?")


class ArrayWriter:
    """Writes arrays, one behind the other, to `folder`/`name`.bin, and the length of each to `name`.lengths."""

    def __init__(self, folder: str, name: str, lengths: str = "q") -> None:
        self._lengths_path = os.path.join(folder, f"{name}.lengths")
        self._file = open(os.path.join(folder, f"{name}.bin"), "wb")
        self._lengths = array(lengths)

    def add(self, raw: bytes, lengths: np.ndarray) -> None:
        """Append `raw`, which holds entries of these lengths (entries,)."""
        self._file.write(raw)
        self._lengths.frombytes(lengths.astype(self._lengths.typecode).tobytes())

    def close(self) -> None:
        """Write what is left, durably."""
        sync_and_close(self._file)
        with open(self._lengths_path, "wb") as file:
            file.write(self._lengths.tobytes())
            os.fsync(file.fileno())


class LineWriter:
    """Writes lines to `folder`/`name`.ids."""

    def __init__(self, folder: str, name: str) -> None:
        self._file = open(os.path.join(folder, f"{name}.ids"), "w", encoding="utf-8")

    def add(self, lines: Iterable[str]) -> None:
        """Append lines, none of which holds a line break."""
        self._file.writelines(f"{line}\n" for line in lines)

    def close(self) -> None:
        """Write what is left, durably."""
        sync_and_close(self._file)


def read_lines(folder: str, name: str) -> Iterator[str]:
    """The lines of `folder`/`name`.ids."""
    with open(os.path.join(folder, f"{name}.ids"), encoding="utf-8", newline="\n") as file:
        for line in file:
            yield line[:-1]


def sync_and_close(file: Any) -> None:
    """Make a written file durable."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


@contextmanager
def new_part(folder: str) -> Iterator[str]:
    """A folder to write a part in, which becomes `folder` at the end, or is removed if the body fails.

    A worker of a killed run may be at the same part: whoever is second leaves the first one's, which is the same.
    """
    with new_folder(Path(folder)) as partial:
        yield str(partial)
        try:
            os.rename(partial, folder)
        except OSError:
            if not os.path.isdir(folder):
                raise


def write_counts(folder: str, counts: dict[str, Any]) -> None:
    """Write a part's `part.json`."""
    with open(os.path.join(folder, "part.json"), "w", encoding="utf-8") as file:
        json.dump(counts, file, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())


def read_counts(folder: str) -> dict[str, Any]:
    """A part's `part.json`."""
    return json.loads(Path(folder, "part.json").read_text(encoding="utf-8"))


def read_array(folder: str, name: str, dtype: Any) -> np.ndarray:
    """A file of a part as a flat array, mapped into memory."""
    path = os.path.join(folder, name)
    return np.memmap(path, dtype, "r").view(np.ndarray) if os.path.getsize(path) else np.empty(0, dtype)


def remove_parts(folder: str, only_if_empty: bool = False) -> None:
    """Remove the parts in a folder, or only what killed workers left of some; and the folder, if nothing else is in it.

    A part's name is a hash: what has another name is somebody else's, and stays.
    """
    for entry in list(Path(folder).glob("*")):
        found = _PART.fullmatch(entry.name)
        if found and (found[1] or not only_if_empty):
            shutil.rmtree(entry, ignore_errors=True)
    with suppress(OSError):
        os.rmdir(folder)
