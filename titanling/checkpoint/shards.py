"""Tensors in sharded safetensors files: written by each rank alone, read back in any other division.

The format is that of torch's distributed checkpoint in safetensors (HuggingFaceStorageReader reads these files, and
`Shards` reads those of HuggingFaceStorageWriter): every file is an ordinary safetensors file whose metadata says where
in the whole tensor each of its pieces begins. No rank needs to know what the others write, and no index is kept.
"""

import json
import math
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from titanling.checkpoint.folder import new_hash, open_to_read, renames
from titanling.errors import UserError

SHARDING = "DCP_SHARDING_INFO"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
THREADS = 4
CHUNK_BYTES = 2**24
"""Bytes that are written or sent for at once: small beside memory, large beside the cost of a call or a request."""
CACHED_BYTES = 2**20
"""Bytes that are read from a file system at once: hashing them finds them in a core's cache."""
SCRATCH_BYTES = 2**20
"""Bytes that are converted at once: they stay in a core's cache between the file and their place."""
LARGEST_HEADER = 100_000_000  # safetensors' own limit


class Piece(NamedTuple):
    """A rectangle of a tensor: its values and where it begins along each dimension of the whole."""

    values: Tensor
    offsets: Sequence[int]


class Written(NamedTuple):
    """A file's size and the hash of the bytes that were written to it."""

    bytes: int
    xxh3_128: str


def write_tensors(file: BinaryIO, pieces: Mapping[str, Piece], metadata: Mapping[str, str] | None = None) -> Written:
    """Write one safetensors file, hashing what is written in a second thread. Raises OSError as writing does.

    Values may lie on any device; those on the CPU are not copied.
    """
    layout = {name: (piece.values.dtype, piece.values.shape) for name, piece in pieces.items()}
    offsets = {name: {"saved_offsets": list(piece.offsets)} for name, piece in pieces.items()}
    header = encode_header(layout, {SHARDING: json.dumps(offsets), "DCP_VERSION": "1.0"} | dict(metadata or {}))
    return write_file(file, _chunks(header, (piece.values for piece in pieces.values())))


def write_file(file: BinaryIO, chunks: Iterable[memoryview | bytes]) -> Written:
    """Write chunks of bytes, hashing each while it is written."""
    hasher, size = new_hash(), 0
    with ThreadPoolExecutor(1, thread_name_prefix="checkpoint-hash") as hashing:
        hashed: Future[None] | None = None
        for chunk in chunks:
            if hashed is not None:
                hashed.result()  # at most one chunk behind, so that a generator's chunks are not all alive
            hashed = hashing.submit(hasher.update, chunk)
            _write(file, chunk)
            size += len(chunk)
    return Written(size, hasher.hexdigest())


def encode_header(layout: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a safetensors file that holds tensors of these types and shapes, in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8, as safetensors itself does
    return struct.pack("<Q", len(text)) + text


def as_bytes(values: Tensor) -> memoryview:
    """The memory of a tensor as bytes; a copy only if it is not contiguous on the CPU."""
    flat = values.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


@dataclass(frozen=True)
class _Stored:
    """A piece in a file."""

    path: Path
    dtype: torch.dtype
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    start: int  # of its first byte in the file


class Take(NamedTuple):
    """What is wanted of a piece: a box in the whole tensor (begin and end along each dimension), and its place."""

    piece: _Stored
    box: list[tuple[int, int]]
    target: Tensor


class Shards:
    """The tensors in the safetensors files of one folder, whoever wrote which part of them; or in `files` of it only.

    Raises UserError, naming the file, where one is malformed. Nothing but the headers is read until asked for.
    """

    def __init__(self, folder: Path, files: Iterable[Path] | None = None) -> None:
        self.folder = folder
        self._stored: dict[str, list[_Stored]] = {}
        self._places: set[tuple[str, tuple[int, ...]]] = set()
        if files is None:
            files = sorted(folder.iterdir()) if folder.is_dir() else []
        for path in files:
            if path.name.endswith(".safetensors"):
                for name, piece in read_header(path):
                    self._add(name, piece)
        self._places.clear()

    def _add(self, name: str, piece: _Stored) -> None:
        """Keep a piece, if it goes with those of its tensor that are there. Raises UserError if not."""
        pieces = self._stored.setdefault(name, [])
        if pieces and (len(piece.shape), piece.dtype) != (len(pieces[0].shape), pieces[0].dtype):
            raise UserError(f"{piece.path}: {name} has another type or number of dimensions in {pieces[0].path.name}")
        if 0 not in piece.shape:
            if (name, piece.offsets) in self._places:  # it would hide that another piece is missing
                raise UserError(f"{piece.path}: holds a piece of {name} that another file holds as well")
            self._places.add((name, piece.offsets))
        pieces.append(piece)

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor, as far as its pieces reach."""
        pieces = self._stored[name]
        ends = ([o + n for o, n in zip(piece.offsets, piece.shape, strict=True)] for piece in pieces)
        return tuple(map(max, zip(*ends, strict=True)))

    def dtype(self, name: str) -> torch.dtype:
        """Type in which it is stored."""
        return self._stored[name][0].dtype

    def places(self, name: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Where each piece begins, and its shape."""
        return [(piece.offsets, piece.shape) for piece in self._stored[name]]

    def whole(self, name: str) -> Tensor:
        """The whole tensor on the CPU, as it was stored."""
        tensor = torch.empty(self.shape(name), dtype=self.dtype(name))
        self.read(name, tensor, [0] * tensor.ndim)
        return tensor

    def read(self, name: str, into: Tensor, offsets: Sequence[int]) -> None:
        """Fill `into`, the rectangle of the tensor that begins at `offsets`, converting to its type and device.

        Raises UserError if the tensor is not there, or not all of that rectangle.
        """
        for take in self.takes(name, into, offsets):
            _open_and_copy(take)

    def takes(self, name: str, into: Tensor, offsets: Sequence[int]) -> list[Take]:
        """What `read` would read, for `take_all`; nothing is read yet. Raises UserError as `read`."""
        takes = []
        for piece in self._stored.get(name, ()) if into.numel() else ():
            box = _overlap(piece, into.shape, offsets)
            if box is not None:
                inside = tuple(slice(low - at, high - at) for (low, high), at in zip(box, offsets, strict=True))
                takes.append(Take(piece, box, into.detach()[inside]))
        found = sum(take.target.numel() for take in takes)
        if found != into.numel():
            raise UserError(
                f"{self.folder}: holds {found:,} of the {into.numel():,} values of {name} that are needed; its files"
                " are not all there"
            )
        return takes


def take_all(takes: Sequence[Take], hashed: Collection[Path] = ()) -> dict[Path, Written]:
    """Do all of it, several files at a time; size and hash of the files in `hashed`, which are read whole, and once.

    Of a piece in one of those, one box can be taken.
    Raises UserError, or what opening and reading may raise.
    """
    of_file: dict[Path, list[Take]] = {path: [] for path in hashed}
    for take in takes:
        of_file.get(take.piece.path, []).append(take)
    with ThreadPoolExecutor(THREADS, thread_name_prefix="checkpoint-read") as pool:
        hashing = {path: pool.submit(_copy_and_hash, path, of_file[path]) for path in hashed}
        copying = [pool.submit(_open_and_copy, take) for take in takes if take.piece.path not in hashing]
        for copied in copying:
            copied.result()
        return {path: found.result() for path, found in hashing.items()}


class Forward:
    """A file that is read from its beginning to its end, and hashed on the way if that is wanted.

    What has just been read is still in the core's cache, where hashing it costs next to nothing.
    """

    def __init__(self, path: Path, hashed: bool = False) -> None:
        self._path, self._hasher = path, new_hash() if hashed else None
        self._file = open_to_read(path)
        self._at = 0
        self._at_once = CACHED_BYTES if renames(path) else CHUNK_BYTES  # there, each read is a request

    def __enter__(self) -> "Forward":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def skip_to(self, place: int) -> None:
        """Go on at a later place in the file."""
        if self._hasher is None:
            self._file.seek(place)
            self._at = place
        else:
            assert place >= self._at, "what is hashed is read forward only"
            scratch = memoryview(bytearray(min(self._at_once, place - self._at)))
            while self._at < place:
                self.fill(scratch[: place - self._at])

    def fill(self, part: memoryview) -> None:
        """Fill `part` with the bytes that follow. Raises UserError if the file ends too early."""
        done = 0
        while done < len(part):
            count = self._file.readinto(part[done : done + self._at_once])
            if not count:
                raise UserError(f"{self._path}: ends too early")
            if self._hasher is not None:
                self._hasher.update(part[done : done + count])
            done += count
        self._at += done

    def finish(self) -> Written:
        """Size and hash of the whole file, whose rest is read as well."""
        assert self._hasher is not None, "only of a file that is hashed"
        self.skip_to(max(self._at, self._path.stat().st_size))
        return Written(self._at, self._hasher.hexdigest())


def read_header(path: Path) -> Iterator[tuple[str, _Stored]]:
    """Name and place of each piece in a safetensors file. Raises UserError if the file is not a whole one."""
    try:
        if renames(path) and not path.is_file():  # a pipe would keep its reader waiting for ever
            raise ValueError("it is no regular file")
        size = path.stat().st_size
        with open_to_read(path) as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > min(size, LARGEST_HEADER):
                raise ValueError(f"its header would have {length:,} bytes, the file has {size:,}")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", None) or {}
        places = json.loads(metadata[SHARDING]) if SHARDING in metadata else {}
        if not isinstance(places, dict):
            raise ValueError(f"its {SHARDING} is no JSON object")
        _check_spans([entry["data_offsets"] for entry in header.values()], size - 8 - length)
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{name} is of type {entry['dtype']}, which cannot be read")
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            offsets = tuple(places[name]["saved_offsets"]) if name in places else (0,) * len(shape)
            start, end = (8 + length + at for at in entry["data_offsets"])
            if len(offsets) != len(shape) or not all(isinstance(n, int) and n >= 0 for n in (*shape, *offsets)):
                raise ValueError(f"{name} has shape {shape} at {offsets}")
            if end - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} does not fill its place")
            yield name, _Stored(path, dtype, offsets, shape, start)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise UserError(f"{path}: not a whole safetensors file: {error}") from None


def _check_spans(spans: Sequence[Sequence[int]], size: int) -> None:
    """The format's rule: tensors fill the file from the header to its end, without holes and without overlapping."""
    if not all(type(at) is int for span in spans for at in span):
        raise ValueError("its offsets are no whole numbers")
    reached = 0
    for start, end in sorted(spans):
        if start != reached or end < start:
            raise ValueError(f"bytes {start:,} to {end:,} begin where {reached:,} is expected")
        reached = end
    if reached != size:
        raise ValueError(f"its tensors end at {reached:,}, the file at {size:,}")


def _chunks(header: bytes, values: Iterable[Tensor]) -> Iterator[memoryview | bytes]:
    yield header
    for tensor in values:
        yield from split_bytes(as_bytes(tensor))


def split_bytes(data: memoryview) -> Iterator[memoryview]:
    """`data` in pieces of CHUNK_BYTES."""
    return (data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES))


def _write(file: BinaryIO, chunk: memoryview | bytes) -> None:
    written = 0
    while written < len(chunk):  # an unbuffered file may take a part only, on a disk that is nearly full
        written += file.write(chunk[written:])


def _overlap(piece: _Stored, shape: Sequence[int], offsets: Sequence[int]) -> list[tuple[int, int]] | None:
    """Begin and end along each dimension, in the whole tensor, of what a piece has of a rectangle; None: nothing."""
    if len(piece.shape) != len(shape):
        raise UserError(f"{piece.path}: a tensor has {len(piece.shape)} dimensions where {len(shape)} are expected")
    box = [
        (max(have, want), min(have + had, want + wanted))
        for have, had, want, wanted in zip(piece.offsets, piece.shape, offsets, shape, strict=True)
    ]
    return box if all(low < high for low, high in box) else None


def _open_and_copy(take: Take) -> None:
    with Forward(take.piece.path) as file:
        _copy(take, file)


def _copy_and_hash(path: Path, takes: list[Take]) -> Written:
    """Take from a file all that is wanted of it, in one pass that reads it whole."""
    with Forward(path, hashed=True) as file:
        for take in sorted(takes, key=lambda take: take.piece.start):
            _copy(take, file)
        return file.finish()


def _copy(take: Take, file: Forward) -> None:
    """Copy a box from a file to its place, a block of rows at a time."""
    piece, box, target = take
    # As rows: everything behind the first dimension, of which the file has whole ones.
    rows, first = (box[0][1] - box[0][0], box[0][0] - piece.offsets[0]) if box else (1, 0)
    row_shape = piece.shape[1:]
    row_bytes = math.prod(row_shape) * piece.dtype.itemsize
    columns = tuple(slice(low - at, high - at) for (low, high), at in zip(box[1:], piece.offsets[1:], strict=True))
    whole_rows = all((c.start, c.stop) == (0, n) for c, n in zip(columns, row_shape, strict=True))
    direct = whole_rows and target.is_contiguous() and target.dtype == piece.dtype and target.device.type == "cpu"
    file.skip_to(piece.start + first * row_bytes)
    if direct:
        file.fill(as_bytes(target))
        return
    at_once = max(1, SCRATCH_BYTES // max(1, row_bytes))
    buffer = torch.empty((min(rows, at_once), *row_shape), dtype=piece.dtype)
    for start in range(0, rows, at_once):
        block = buffer[: min(at_once, rows - start)]
        file.fill(as_bytes(block))
        if box:
            target[start : start + len(block)] = block[(slice(None), *columns)]
        else:
            target.copy_(block[0])
