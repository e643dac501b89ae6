"""metrics.jsonl: one strict JSON object per line, whole lines only, even when a process dies or a disk fills."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

Scalar = float | int


def encode_row(row: Mapping[str, Scalar]) -> bytes:
    """`row` as one line of strict JSON with every float's full precision.

    JSON has no nan or infinity: such a value becomes null, and `<key>_text` says "nan", "inf" or "-inf".
    """
    safe: dict[str, Scalar | str | None] = {}
    for key, value in row.items():
        if math.isfinite(value):
            safe[key] = value
        else:
            safe[key] = None
            safe[f"{key}_text"] = str(float(value))
    return json.dumps(safe, allow_nan=False).encode() + b"\n"


class JsonLines:
    """Appends rows to a file. Each row is with the operating system when `append` returns.

    Raises OSError from the constructor if the file cannot be opened.
    """

    path: Path
    """The file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = self._open()

    def append(self, row: Mapping[str, Scalar]) -> None:
        """Write one row. On OSError (a full disk) nothing of it stays in the file."""
        data = encode_row(row)
        size = self._file.seek(0, os.SEEK_END)
        try:
            written = self._file.write(data)
            if written < len(data):
                # The disk filled up within the row; the rest gives the error.
                self._file.write(data[written:])
        except OSError:
            self._file.truncate(size)
            raise

    def drop_after(self, step: int) -> int:
        """Remove rows whose `step` is greater, and lines that are not whole rows (a process died in mid-write).

        The file is replaced in one move, so that a crash leaves the old or the new one. Returns the number of lines
        removed that were not whole rows.
        """
        scratch = self.path.with_name(self.path.name + ".tmp")
        changed, broken = False, 0
        with self.path.open("rb") as old, scratch.open("wb") as new:
            for line in old:
                found = _step_of(line)
                kept = found is not None and found <= step
                if kept:
                    new.write(line.rstrip(b"\n") + b"\n")
                changed |= not kept or not line.endswith(b"\n")
                broken += found is None
            new.flush()
            os.fsync(new.fileno())
        if not changed:
            scratch.unlink()
            return 0
        self._file.close()
        os.replace(scratch, self.path)
        self._file = self._open()
        return broken

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _open(self) -> BinaryIO:
        # Unbuffered: a row is one write, whole in the file for a reader and after a kill.
        return self.path.open("ab", buffering=0)


def _step_of(line: bytes) -> int | None:
    """The row's step, or None if the line is not a whole row."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) else None
