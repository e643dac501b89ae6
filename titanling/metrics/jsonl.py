"""metrics.jsonl: one strict JSON object per line, whole lines only, even when a process dies or a disk fills."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titanling.files import NewFile, append_to, is_still, set_aside

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

    If the file is deleted or replaced meanwhile, rows go to the one that is there now, or to a new one.
    Raises OSError from the constructor if the file cannot be opened: a link, say, or a pipe.
    """

    path: Path
    """The file."""
    replaced: bool
    """Whether rows have gone on in another file than the one that was opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.replaced = False
        self._file = append_to(path)

    def append(self, row: Mapping[str, Scalar]) -> None:
        """Write one row. On OSError (a full disk) nothing of it stays in the file."""
        data = encode_row(row)
        if self._file.closed or not is_still(self._file, self.path):
            self._file.close()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = append_to(self.path)
            self.replaced = True
        size = self._file.seek(0, os.SEEK_END)
        try:
            written = self._file.write(data)
            if written < len(data):
                # The disk filled up within the row; the rest gives the error.
                self._file.write(data[written:])
        except OSError:
            self._file.truncate(size)
            raise

    def begin_anew(self) -> Path | None:
        """Keep what an earlier run wrote under another name, which is returned, and begin an empty file.

        None: there was nothing. Raises OSError.
        """
        if not self.path.stat().st_size:
            return None
        self._file.close()
        aside = set_aside(self.path)
        self._file = append_to(self.path)
        return aside

    def drop_after(self, step: int, validated: bool = True) -> int:
        """Remove rows whose `step` is greater, and lines that are not whole rows (a process died in mid-write).

        Unless `validated`, the validation of `step` itself goes too. The file is replaced in one move, so that a crash
        leaves the old or the new one. Returns the number of lines removed that were not whole rows. Raises OSError,
        leaving the file as it is.
        """
        changed, broken, new = False, 0, NewFile(self.path)
        try:
            with self.path.open("rb") as old:
                for line in old:
                    row = _row_of(line)
                    kept = row is not None and row["step"] <= step and (validated or not _validates(row, step))
                    if kept:
                        new.file.write(line.rstrip(b"\n") + b"\n")
                    changed |= not kept or not line.endswith(b"\n")
                    broken += row is None
            if changed:
                new.publish()
                self._file.close()
                self._file = append_to(self.path)
        finally:
            new.drop()
        return broken

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _validates(row: Mapping[str, object], step: int) -> bool:
    """Whether the row is that of the validation after `step`."""
    return row["step"] == step and any(key.startswith("val_") for key in row)


def _row_of(line: bytes) -> dict[str, Any] | None:
    """The row, which has a step, or None if the line is not a whole one."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # nested too deeply
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
