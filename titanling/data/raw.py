"""Token files that others wrote: datatrove's .ds and OLMo's .npy, both raw little-endian tokens. Free of torch.

`open_tokens` opens these and Megatron's by the path's suffix; all have the interface of `IndexedDataset`.
"""

import os
from functools import cached_property

import numpy as np

from titanling.data.indexed import IndexedDataset
from titanling.data.tokenfile import CHUNK, FileArray, OpenFile, TokenFile
from titanling.errors import UserError

DTYPES = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
"""Bytes of a token → its type."""
SUFFIXES = (".ds", ".npy")
SCAN_TOKENS = 1 << 24


class RawTokens(TokenFile):
    """Tokens of one raw file with the ends of its documents.

    Attributes: `prefix`, the path; `num_tokens`; `num_documents`; `dtype` (uint16 or uint32).
    """

    def __init__(self, path: str, dtype: np.dtype, offset: int = 0) -> None:
        self.prefix = path
        size = os.path.getsize(path) - offset
        if size <= 0:
            raise UserError(f"{path}: holds no tokens; make it again, or leave it out")
        if size % dtype.itemsize:
            raise UserError(f"{path}: {size} bytes are no whole number of {dtype.name} tokens; correct their type")
        super().__init__(path, dtype, offset)

    @cached_property
    def _ends(self) -> np.ndarray | FileArray:
        """Where each document ends, in tokens from the file's start: (documents,), integer."""
        raise NotImplementedError

    @property
    def num_documents(self) -> int:
        """Documents of the file."""
        return len(self._ends)

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document: (length,). Raises IndexError."""
        place = self.document_range(index)
        return self.read(place.start, len(place))

    def document_range(self, index: int) -> range:
        """Offsets of one document's tokens in the file. Raises IndexError."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"{self.prefix}: document {index} of {self.num_documents}")
        return range(int(self._ends[index - 1]) if index else 0, int(self._ends[index]))

    def document_at(self, offset: int) -> int:
        """The document that holds the token at an offset of the file. Raises IndexError beyond it."""
        if not 0 <= offset < self.num_tokens:
            raise IndexError(f"{self.prefix}: offset {offset} outside the {self.num_tokens} tokens of the file")
        return int(self._ends.searchsorted(offset, side="right"))

    def document_starts(self, begin: int, end: int) -> np.ndarray:
        """Where documents begin behind offset `begin` and before `end`: int64 offsets, in order."""
        first, last = self._ends.searchsorted(begin, side="right"), self._ends.searchsorted(end)
        return np.unique(self._ends[first:last]).astype(np.int64)


class DatatroveTokens(RawTokens):
    """datatrove's `.ds`, whose `.ds.index` holds each document's end as a uint64.

    Raises `UserError` if a file is missing or the two do not fit; from their sizes follows the type of the tokens.
    """

    def __init__(self, path: str) -> None:
        index = f"{path}.index"
        _check_file(path, "correct the path")
        _check_file(index, "datatrove writes it beside the .ds, keep them together")
        if os.path.getsize(index) == 0 or os.path.getsize(index) % 8:
            raise UserError(f"{index}: {os.path.getsize(index)} bytes are no list of document ends; make it again")
        self.index = OpenFile(index)
        ends = FileArray(self.index, "<u8", 0, os.path.getsize(index) // 8)
        size, tokens = os.path.getsize(path), int(ends[-1])
        dtype = next((dtype for width, dtype in DTYPES.items() if size == tokens * width), None)
        if dtype is None or not _ascends(ends):
            raise UserError(f"{path}: {size} bytes do not fit the {tokens} tokens of {index}; make both again")
        super().__init__(path, dtype)
        self._ends = ends

    def close(self) -> None:
        """Close both files; later reads fail. Closing twice is allowed."""
        super().close()
        if hasattr(self, "index"):
            self.index.close()


class NumpyTokens(RawTokens):
    """An OLMo-style `.npy`: a bare array of tokens, or one with numpy's header, which then tells their type.

    A document ends with `eod_id`, and the last one with the file; they are looked for, reading the whole file, when
    first asked for. Raises `UserError` if the file is missing, empty, or not one-dimensional uint16 or uint32.
    """

    def __init__(self, path: str, eod_id: int, dtype: np.dtype) -> None:
        _check_file(path, "correct the path")
        dtype, offset = _read_header(path, dtype)
        if dtype not in DTYPES.values():
            raise UserError(f"{path}: tokens of type {dtype.name}; only uint16 and uint32 are read")
        super().__init__(path, dtype, offset)
        self._eod_id = eod_id

    @cached_property
    def _ends(self) -> np.ndarray:
        parts = [range(self.num_tokens)[part : part + SCAN_TOKENS] for part in range(0, self.num_tokens, SCAN_TOKENS)]
        ends = [np.flatnonzero(self.read(part.start, len(part)) == self._eod_id) + part.start + 1 for part in parts]
        if not len(ends[-1]) or ends[-1][-1] != self.num_tokens:
            ends.append(np.array([self.num_tokens]))
        return np.concatenate(ends)


def open_tokens(path: str, eod_id: int | None = None, dtype: str = "uint16") -> IndexedDataset | RawTokens:
    """Token files by their suffix: `.ds`, `.npy`, else the prefix of Megatron's .bin and .idx.

    A `.npy` does not say where its documents end or, without numpy's header, of what type it is: `eod_id` and `dtype`
    ("uint16" or "uint32") do. Raises `UserError`.
    """
    if path.endswith(".ds"):
        return DatatroveTokens(path)
    if path.endswith(".npy"):
        if eod_id is None:
            raise UserError(f"{path}: does not say where its documents end; give the id of its end-of-document token")
        return NumpyTokens(path, eod_id, np.dtype(dtype).newbyteorder("<"))
    return IndexedDataset(path)


def _ascends(ends: FileArray) -> bool:
    """Whether no document ends before the one in front of it. Reads them all."""
    last = 0
    for start in range(0, len(ends), CHUNK):
        part = ends[start : start + CHUNK]
        if int(part[0]) < last or (part[1:] < part[:-1]).any():
            return False
        last = int(part[-1])
    return True


def _check_file(path: str, remedy: str) -> None:
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; {remedy}")


def _read_header(path: str, dtype: np.dtype) -> tuple[np.dtype, int]:
    """Type of the tokens and where they begin: as numpy's header says, or `dtype` and 0 if there is none."""
    with open(path, "rb") as file:
        if file.read(6) != b"\x93NUMPY":
            return dtype, 0
        file.seek(0)
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
        except Exception as error:  # numpy lets those of Python's parser through
            raise UserError(f"{path}: damaged header ({' '.join(str(error).split())}); make it again") from None
        offset = file.tell()
    if len(shape) != 1 or os.path.getsize(path) != offset + shape[0] * dtype.itemsize:
        raise UserError(f"{path}: its header promises an array of shape {shape}, {dtype.name}; make it again, flat")
    return dtype, offset
