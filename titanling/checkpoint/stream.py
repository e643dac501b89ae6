"""Tensors on their way from files to files, a block at a time: what conversion needs of memory is a few blocks."""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from titanling.checkpoint.folder import new_hash
from titanling.checkpoint.shards import Shards, Written, as_bytes, encode_header
from titanling.errors import UserError

BLOCK_BYTES = 2**24
"""Bytes that are read, converted and written at once; three blocks are alive."""
FLUSH_BYTES = 2**27
"""Bytes after which the disk is told to begin, so that it works while the next ones are made."""


class Source(Protocol):
    """Where tensors come from: `Shards`, or what another format makes of several."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """Type in which it is stored."""

    def read(self, name: str, into: Tensor, offsets: Sequence[int]) -> None:
        """Fill `into` with the rectangle that begins at `offsets`, converting to its type."""


class Target(NamedTuple):
    """A file to be made: its tensors in order, with the types to give them."""

    path: Path
    dtypes: Mapping[str, torch.dtype]
    metadata: Mapping[str, str]


def plan_files(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Divide tensors (name → bytes), in their order, into files of at most `limit` bytes; a larger one is alone."""
    files: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not files or size > room:
            files.append([])
            room = limit
        files[-1].append(name)
        room -= size
    return files


def sizes_of(source: Source, dtypes: Mapping[str, torch.dtype]) -> dict[str, int]:
    """Bytes of each tensor in the type it is to have."""
    return {name: source_numel(source, name) * dtype.itemsize for name, dtype in dtypes.items()}


def source_numel(source: Source, name: str) -> int:
    """Number of a tensor's values."""
    return torch.Size(source.shape(name)).numel()


def write_target(target: Target, source: Source, hashed: bool) -> Written | None:
    """Write one safetensors file and sync it; its size and hash if `hashed`.

    Reading the next block, hashing this one and flushing earlier ones go on while this one is written. Raises OSError
    if the file cannot be written, UserError if the source cannot be read.
    """
    layout = {name: (dtype, source.shape(name)) for name, dtype in target.dtypes.items()}
    hasher, size = new_hash(), 0
    hashing, flushing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
    with target.path.open("wb") as file, hashing, flushing:
        pending = hashing.submit(lambda: None)
        flush, flushed = flushing.submit(lambda: None), 0
        for chunk in _ahead(_chunks(source, target.dtypes, encode_header(layout, target.metadata))):
            pending.result()  # hashing is one block behind at most
            if hashed:
                pending = hashing.submit(hasher.update, chunk)
            file.write(chunk)
            size += len(chunk)
            if size - flushed >= FLUSH_BYTES and flush.done():
                flush.result()
                file.flush()
                flush, flushed = flushing.submit(os.fdatasync, file.fileno()), size
        pending.result()
        flush.result()
        file.flush()
        os.fsync(file.fileno())
    return Written(size, hasher.hexdigest()) if hashed else None


def compare(target: Target, source: Source) -> str | None:
    """Read a written file back; the name of the first tensor that is not the source's bit for bit, or None."""
    written, memory = Shards(target.path.parent, [target.path]), (_memory(1), _memory(1))
    if set(written.names()) != set(target.dtypes):
        return next(iter(set(written.names()) ^ set(target.dtypes)))
    for name, dtype in target.dtypes.items():
        if written.dtype(name) != dtype or written.shape(name) != source.shape(name):
            return name
        found, wanted = blocks(written, name, dtype, memory[0]), blocks(source, name, dtype, memory[1])
        if not all(_same(one, other) for one, other in zip(found, wanted, strict=True)):
            return name
    return None


def equal(source: Source, left: str, right: str) -> bool:
    """Whether two tensors of one shape are the same bit for bit."""
    if source.shape(left) != source.shape(right) or source.dtype(left) != source.dtype(right):
        return False
    one, other = (blocks(source, name, source.dtype(name), _memory(1)) for name in (left, right))
    return all(_same(ours, theirs) for ours, theirs in zip(one, other, strict=True))


def _same(left: Tensor, right: Tensor) -> bool:
    """Bytes, not values: nan equals itself and -0.0 is not 0.0."""
    return left.dtype == right.dtype and torch.equal(
        left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8)
    )


def blocks(source: Source, name: str, dtype: torch.dtype, memory: Iterator[Tensor]) -> Iterator[Tensor]:
    """A tensor in blocks of whole rows, in order, each in the next piece of `memory`.

    Raises UserError if it cannot be read.
    """
    shape = source.shape(name)
    rows, row_shape = (shape[0], shape[1:]) if shape else (1, ())
    row_bytes = torch.Size(row_shape).numel() * dtype.itemsize
    at_once = max(1, BLOCK_BYTES // max(1, row_bytes))
    narrowed = dtype == torch.float16 != source.dtype(name)
    for start in range(0, rows, at_once):
        count = min(at_once, rows - start)
        place = next(memory)
        if count * row_bytes > len(place):
            place = torch.empty(count * row_bytes, dtype=torch.uint8)
        block = place[: count * row_bytes].view(dtype).view(count, *row_shape)
        try:
            source.read(name, block if shape else block[0], [start, *[0] * len(row_shape)] if shape else [])
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read: {error.strerror or error}") from None
        if narrowed and not block.isfinite().all():
            raise UserError(f"{name}: has values that float16 cannot hold; use --dtype bfloat16")
        yield block


def _memory(count: int) -> Iterator[Tensor]:
    """Room for blocks, `count` by turns: new memory for each costs more time than what is done in it."""
    return cycle([torch.empty(BLOCK_BYTES, dtype=torch.uint8) for _ in range(count)])


def _chunks(source: Source, dtypes: Mapping[str, torch.dtype], header: bytes) -> Iterator[memoryview | bytes]:
    """The bytes of a file. Each stays as it is until the third one after it is made."""
    yield header
    memory = _memory(3)
    for name, dtype in dtypes.items():
        for block in blocks(source, name, dtype, memory):
            yield as_bytes(block)


def _ahead(chunks: Iterator[memoryview | bytes]) -> Iterator[memoryview | bytes]:
    """The same, with the next one made in a thread while this one is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="convert-read") as reading:
        following = reading.submit(next, chunks, None)
        while (chunk := following.result()) is not None:
            following = reading.submit(next, chunks, None)
            yield chunk
