"""Files of numbers, read at random through a descriptor: what is cut off or fails meanwhile is an error that names it.

A memory map would end the process without a word there (SIGBUS). Free of torch.
"""

import os
import sys

import numpy as np

from titanling.data.identity import sample_blocks
from titanling.errors import UserError

SEARCH_BLOCK = 512
CHUNK = 1 << 20


class OpenFile:
    """A file that is open for reading at random, by any number of threads."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDONLY)
        if sys.platform == "linux":  # macOS has no fadvise
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)
        self._sampled: tuple[str, tuple[int, int]] | None = None

    def read_into(self, array: np.ndarray, offset: int) -> None:
        """Fill an array from a byte on. Raises UserError: the file has become shorter, or cannot be read."""
        view = memoryview(array).cast("B") if array.size else b""
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                if self._fd < 0:  # closed
                    raise
                raise UserError(f"{self._path}: cannot be read ({error.strerror}); see to its disk") from None
            if not count:
                raise UserError(f"{self._path}: became shorter while in use; restore it, or make it again")
            done += count

    def sample(self) -> str:
        """The sampled hash of what is read here (`identity`). From then on `check_unchanged` compares with it."""
        self._sampled = self._sample()
        return self._sampled[0]

    def _sample(self) -> tuple[str, tuple[int, int]]:
        found = os.fstat(self._fd)

        def read(start: int, count: int) -> bytes:
            block = np.empty(count, np.uint8)
            self.read_into(block, start)
            return block.tobytes()

        return sample_blocks(read, found.st_size), (found.st_size, found.st_mtime_ns)

    def check_unchanged(self) -> None:
        """Raise UserError if the file holds something else than when it was sampled; nothing if it never was.

        Only where its size or time of change differ is it looked at again.
        """
        if self._sampled is None:
            return
        try:
            found = os.fstat(self._fd)
        except OSError as error:
            raise UserError(f"{self._path}: cannot be read ({error.strerror}); see to its disk") from None
        if (found.st_size, found.st_mtime_ns) == self._sampled[1]:
            return
        before, self._sampled = self._sampled, self._sample()
        if self._sampled[0] != before[0]:
            raise UserError(
                f"{self._path}: was changed while the run reads it; restore what it held, and the same command goes on"
            )

    def close(self) -> None:
        """Close the file; later reads fail. Closing twice is allowed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        if hasattr(self, "_fd"):  # __init__ may have raised before opening
            self.close()


class FileArray:
    """An array of numbers within a file, as far as numpy's indexing and searching of one is needed here."""

    def __init__(self, file: OpenFile, dtype: str, offset: int, count: int) -> None:
        self._file, self._dtype, self._offset, self._count = file, np.dtype(dtype), offset, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int | slice | np.ndarray) -> np.ndarray:
        """One number, those of a slice without a step, or those at ascending places. Raises UserError as `OpenFile`."""
        if isinstance(index, slice):
            start, stop, _ = index.indices(self._count)
            return self._read(start, max(0, stop - start))
        if isinstance(index, np.ndarray):
            if not len(index):
                return np.empty(0, self._dtype)
            first = int(index[0])
            return self._read(first, int(index[-1]) - first + 1)[index - first]
        return self._read(int(index) % self._count, 1)[0]

    def searchsorted(self, value: int, side: str = "left") -> int:
        """As numpy's, for one value."""
        low, high = 0, self._count
        while high - low > SEARCH_BLOCK:
            middle = (low + high) // 2
            found = int(self[middle])
            if found < value or (side == "right" and found == value):
                low = middle + 1
            else:
                high = middle
        return low + int(np.searchsorted(self[low:high], value, side=side))

    def _read(self, start: int, count: int) -> np.ndarray:
        array = np.empty(count, self._dtype)
        self._file.read_into(array, self._offset + start * self._dtype.itemsize)
        return array


class TokenFile(OpenFile):
    """Random access to the raw little-endian tokens of one file.

    The tokens begin `offset` bytes into the file and reach to its end, which the caller has checked.

    Attributes: `num_tokens`; `dtype`.
    """

    def __init__(self, path: str, dtype: np.dtype, offset: int = 0) -> None:
        self._bin_path = path
        self._offset = offset
        self.dtype = dtype
        self.num_tokens = (os.path.getsize(path) - offset) // dtype.itemsize
        super().__init__(path)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens `start … start + count - 1` of the flat stream: (count,), in the file's dtype."""
        return self.read_rows(np.array([start]), count)[0]

    def read_rows(self, starts: np.ndarray, count: int) -> np.ndarray:
        """`count` tokens from each offset of `starts` (rows,) in the flat stream: (rows, count), in the file's dtype.

        Raises IndexError beyond the stream, `UserError` if the file has changed since it was opened or cannot be read.
        """
        if len(starts) and (int(starts.min()) < 0 or int(starts.max()) + count > self.num_tokens):
            raise IndexError(f"{self._bin_path}: token range outside the {self.num_tokens} tokens of the file")
        self.check_unchanged()
        rows = np.empty((len(starts), count), self.dtype)
        for row, start in zip(rows, starts.tolist(), strict=True):
            self.read_into(row, self._offset + start * self.dtype.itemsize)
        return rows
