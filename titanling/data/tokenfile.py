"""One file of raw tokens, read at random. Free of torch."""

import os
import sys

import numpy as np

from titanling.errors import UserError


class TokenFile:
    """Random access to the raw little-endian tokens of one file, through a descriptor that threads may share (`pread`).

    The tokens begin `offset` bytes into the file and reach to its end, which the caller has checked.

    Attributes: `num_tokens`; `dtype`.
    """

    def __init__(self, path: str, dtype: np.dtype, offset: int = 0) -> None:
        self._bin_path = path
        self._offset = offset
        self.dtype = dtype
        self.num_tokens = (os.path.getsize(path) - offset) // dtype.itemsize
        self._fd = os.open(path, os.O_RDONLY)
        if sys.platform == "linux":  # macOS has no fadvise
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens `start … start + count - 1` of the flat stream: (count,), in the file's dtype."""
        if start < 0 or start + count > self.num_tokens:
            raise IndexError(f"{self._bin_path}: token range outside the {self.num_tokens} tokens of the file")
        row = np.empty(count, self.dtype)
        self._fill(row, start)
        return row

    def read_rows(self, starts: np.ndarray, count: int) -> np.ndarray:
        """`count` tokens from each offset of `starts` (rows,) in the flat stream: (rows, count), in the file's dtype.

        Raises IndexError beyond the stream, `UserError` if the file has shrunk since it was opened.
        """
        if len(starts) and (int(starts.min()) < 0 or int(starts.max()) + count > self.num_tokens):
            raise IndexError(f"{self._bin_path}: token range outside the {self.num_tokens} tokens of the file")
        rows = np.empty((len(starts), count), self.dtype)
        for row, start in zip(rows, starts.tolist(), strict=True):
            self._fill(row, start)
        return rows

    def _fill(self, row: np.ndarray, start: int) -> None:
        if os.preadv(self._fd, [row], self._offset + start * self.dtype.itemsize) != row.nbytes:
            raise UserError(f"{self._bin_path}: became shorter while in use; make it again")

    def close(self) -> None:
        """Close the file; later reads fail. Closing twice is allowed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        if hasattr(self, "_fd"):  # __init__ may have raised before opening
            self.close()
