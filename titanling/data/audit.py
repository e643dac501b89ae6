"""The auditors' log: what each step has read, written as it is read. Free of torch.

Tracing finds the same without a log; this is the evidence that it was so. `<run>/data/steps-rankNNN.jsonl`, one file of
each data-parallel rank, has a line for every step:

    {"step": 7, "sequences": [{"sample": 96, "blake2b": "…", "pieces": [{"source": …, "document": …, …}]}]}

with the pieces as `scripts/trace_data.py --json` prints them, and the hash (16 bytes) of the input ids that the model
was given, little-endian int64.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from mmap import ACCESS_READ, mmap
from pathlib import Path

import numpy as np

from titanling.data.sources import MixedSource
from titanling.data.trace import pieces
from titanling.errors import UserError
from titanling.files import append_to, is_still, set_aside

FOLDER = "data"
STEP = re.compile(rb'\{"step": (\d+), ')


class AuditLog:
    """The log of one data-parallel rank. Call `resume_at` before the first step."""

    def __init__(self, run_folder: Path, source: MixedSource, dp_rank: int, dp_world: int) -> None:
        self._folder = run_folder / FOLDER
        self._source = source
        self._dp_rank, self._dp_world = dp_rank, dp_world

    def resume_at(self, step: int, say: Callable[[str], None] = lambda _: None) -> None:
        """Remove what comes after a step, also from files of ranks that are no more; those are shared out.

        At 0, the log of an earlier run is kept under another name, which is told to `say`. Raises UserError if the log
        cannot be written.
        """
        try:
            self._resume_at(step, say)
        except OSError as error:
            where = error.filename or self._folder
            raise UserError(f"{where}: the audit log cannot be written: {error.strerror}; move it away") from None

    def _resume_at(self, step: int, say: Callable[[str], None]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self._folder.glob("steps-rank*.jsonl")):
            rank = path.stem.removeprefix("steps-rank")
            if rank.isdecimal() and int(rank) % self._dp_world == self._dp_rank:
                append_to(path).close()  # it is a file, then
                if step == 0 and path.stat().st_size:
                    say(f"{path}: what an earlier run wrote is kept as {set_aside(path).name}")
                else:
                    cut_after(path, step)
        self._path = self._folder / f"steps-rank{self._dp_rank:03d}.jsonl"
        self._file = append_to(self._path)

    def append(self, step: int, first: int, batches: Sequence[np.ndarray]) -> None:
        """Write the line of a step: its micro-batches' input ids, (rows, seq_len) each, from sample `first` of the run.

        `first` is that of all ranks together, of whose samples this rank has its share of each micro-batch.
        Raises OSError; the file then has what it had.
        """
        found = []
        for number, rows in enumerate(batches):
            begin = first + (number * self._dp_world + self._dp_rank) * len(rows)
            for sample, ids in enumerate(rows, begin):
                digest = hashlib.blake2b(np.ascontiguousarray(ids, "<i8").tobytes(), digest_size=16).hexdigest()
                parts = [piece._asdict() for piece in pieces(self._source, sample)]
                found.append({"sample": sample, "blake2b": digest, "pieces": parts})
        if self._file.closed or not is_still(self._file, self._path):
            self._file.close()
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = append_to(self._path)
        line = json.dumps({"step": step, "sequences": found}, ensure_ascii=False).encode() + b"\n"
        size = self._file.seek(0, os.SEEK_END)
        try:
            while line:  # a disk that fills up takes a part, and the rest raises the error
                line = line[self._file.write(line) :]
        except OSError:
            self._file.truncate(size)
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def cut_after(path: Path, step: int) -> None:
    """Cut a log behind the line of `step` and those before, looking from its end; an unfinished line goes too."""
    with open(path, "r+b") as file:
        end = os.fstat(file.fileno()).st_size
        if end:
            with mmap(file.fileno(), 0, access=ACCESS_READ) as text:
                end = text.rfind(b"\n") + 1
                while end:
                    start = text.rfind(b"\n", 0, end - 1) + 1
                    found = STEP.match(text[start : min(end, start + 64)])
                    if found and int(found[1]) <= step:
                        break
                    end = start
        file.truncate(end)
