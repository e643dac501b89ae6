"""Token files: Megatron's .bin/.idx pair and our sidecar .json, all named by one prefix. Free of torch.

`.bin` holds the raw little-endian tokens of all documents, each closed by its end-of-document token. `.idx` holds a
34-byte header (magic, u64 version, u8 dtype code, u64 sequences, u64 documents + 1), then int32 sequence lengths,
int64 byte pointers and the int64 document index; we write one sequence per document. Byte-compatible with
Megatron-LM's indexed_dataset.py. The sidecar adds what the pair lacks (tokenizer, counts, hashes). It is written
last: without it, the pair is unfinished.
"""

import hashlib
import math
import os
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from titanling.data.identity import sample_file
from titanling.data.ids import ids_path
from titanling.data.tokenfile import FileArray, OpenFile, TokenFile
from titanling.errors import UserError
from titanling.files import NewFile, new_file

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_NAMES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
DTYPES = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
"""Dtype codes that are read and written."""

FLUSH_TOKENS = 1 << 20
_SIDECAR_BEGINS = b'{\n  "format_version": 1,'
PREPARE_AGAIN = "delete the three files of this prefix and prepare them again (scripts/prepare_data.py)"


def dtype_code(vocab_size: int) -> int:
    """Megatron's choice: 8 (uint16) for a vocabulary below 65,500, else 4 (int32)."""
    return 8 if vocab_size < 65500 else 4


class IndexedDataset(TokenFile):
    """Random access to the tokens of one .bin/.idx pair.

    Holds a file descriptor of each.

    Attributes: `prefix`; `num_tokens`; `num_documents`; `dtype` (uint16 or int32); `index`, the open `.idx`,
    and its three arrays, `lengths`, `pointers` and `documents`.
    Raises `UserError` when a file is missing, damaged, empty or of a type we do not read.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        bin_path, idx_path, _ = _files(prefix)
        for path in (bin_path, idx_path):
            if not os.path.isfile(path):
                raise UserError(f"{path}: no such file; correct the prefix in [data], or make it: prepare_data.py")
        code, sequences, documents = _read_header(idx_path)
        dtype = DTYPES[code]
        self.num_documents = documents
        self.index = OpenFile(idx_path)
        self.lengths = FileArray(self.index, "<i4", HEADER.size, sequences)
        self.pointers = FileArray(self.index, "<i8", HEADER.size + 4 * sequences, sequences)
        self.documents = FileArray(self.index, "<i8", HEADER.size + 12 * sequences, documents + 1)
        expected = int(self.pointers[-1]) + int(self.lengths[-1]) * dtype.itemsize
        size = os.path.getsize(bin_path)
        if size != expected or self.pointers[0] != 0 or self.documents[-1] != sequences:
            raise UserError(f"{bin_path}: {size} bytes, but {idx_path} describes {expected}; {PREPARE_AGAIN}")
        if size == 0:
            raise UserError(f"{bin_path}: holds no tokens; {PREPARE_AGAIN}")
        super().__init__(bin_path, dtype)

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document with its end-of-document token: (length,). Raises IndexError."""
        place = self.document_range(index)
        return self.read(place.start, len(place))

    def document_range(self, index: int) -> range:
        """Offsets of one document's tokens in the flat stream. Raises IndexError."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"{self.prefix}: document {index} of {self.num_documents}")
        first, last = int(self.documents[index]), int(self.documents[index + 1])
        start = int(self.pointers[first]) // self.dtype.itemsize
        return range(start, start + int(self.lengths[first:last].sum()))

    def document_at(self, offset: int) -> int:
        """The document that holds the token at an offset of the flat stream. Raises IndexError beyond the stream."""
        if not 0 <= offset < self.num_tokens:
            raise IndexError(f"{self._bin_path}: offset {offset} outside the {self.num_tokens} tokens of the file")
        sequence = self.pointers.searchsorted(offset * self.dtype.itemsize, side="right") - 1
        return self.documents.searchsorted(sequence, side="right") - 1

    def document_starts(self, begin: int, end: int) -> np.ndarray:
        """Where documents begin behind offset `begin` and before `end`: int64 offsets, in order."""
        width = self.dtype.itemsize
        first = self.pointers.searchsorted(begin * width, side="right")
        last = self.pointers.searchsorted(end * width)
        if len(self.lengths) == self.num_documents:  # one sequence each, as we write them
            return np.unique(self.pointers[first:last]) // width
        documents = self.documents[self.documents.searchsorted(first) : self.documents.searchsorted(last)]
        return np.unique(self.pointers[documents]) // width

    def close(self) -> None:
        """Close both files; later reads fail. Closing twice is allowed."""
        super().close()
        if hasattr(self, "index"):
            self.index.close()


def _read_header(path: str) -> tuple[int, int, int]:
    """(dtype code, sequences, documents) of an .idx whose size agrees with its header."""
    with open(path, "rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size or header[:9] != MAGIC:
        raise UserError(f"{path}: not a Megatron index (its first bytes differ); {PREPARE_AGAIN}")
    _, version, code, sequences, entries = HEADER.unpack(header)
    if version != VERSION:
        raise UserError(f"{path}: index version {version}, only {VERSION} is known; {PREPARE_AGAIN}")
    if code not in DTYPES:
        name = DTYPE_NAMES.get(code, "unknown")
        raise UserError(f"{path}: tokens of type {name} (code {code}), only uint16 and int32 are read; {PREPARE_AGAIN}")
    size, expected = os.path.getsize(path), HEADER.size + 12 * sequences + 8 * entries
    if size != expected:
        raise UserError(f"{path}: {size} bytes where its header promises {expected}; {PREPARE_AGAIN}")
    if sequences == 0 or entries < 2:
        raise UserError(f"{path}: holds no documents; {PREPARE_AGAIN}")
    return code, sequences, entries - 1


def check_unused(prefix: str) -> None:
    """Raise `UserError` if there are files of this prefix that `IndexedWriter` may not replace."""
    existing = [path for path in (*_files(prefix), ids_path(prefix)) if os.path.lexists(path)]
    claim = _claim_path(prefix)
    claimed = os.path.lexists(claim)
    if claimed and not _is_claim(claim):
        raise UserError(f"{claim}: is in the way and not ours; move it away or choose another prefix")
    if f"{prefix}.json" in existing or (existing and not claimed):
        raise UserError(f"{existing[0]}: exists and is never overwritten; move it away or choose another prefix")


def _claim_path(prefix: str) -> str:
    return f"{prefix}.json.partial"


def _is_claim(path: str) -> bool:
    """Whether that is a claim of ours on a prefix: empty, or the beginning of a sidecar."""
    if os.path.islink(path) or not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        begun = file.read(len(_SIDECAR_BEGINS))
    return _SIDECAR_BEGINS.startswith(begun)


def _open_claim(prefix: str) -> BinaryIO:
    """The claim on a prefix, made if it is missing, emptied if it is ours. Raises UserError if it is not."""
    path = _claim_path(prefix)
    if os.path.lexists(path) and not _is_claim(path):
        raise UserError(f"{path}: is in the way and not ours; move it away or choose another prefix")
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666), "wb")


class IndexedWriter:
    """Writes one .bin/.idx pair: a context manager whose files appear under their names only on success.

    Files grow under temporary names and are synced and renamed at the end, `.bin` first. From the beginning until
    `write_sidecar` an (at first empty) `.json.partial` claims the prefix for us: it tells an interrupted run, which
    may be done again, from foreign files, which are never overwritten.

    Raises `UserError` for existing files that are not ours to replace, ValueError for an empty document, an id
    outside the vocabulary, or no document at all; no partial file is left then.
    """

    def __init__(self, prefix: str, vocab_size: int) -> None:
        self.prefix = prefix
        self.vocab_size = vocab_size
        self._code = dtype_code(vocab_size)
        self._dtype = DTYPES[self._code]
        self._lengths = array("i")
        self._pending: list[np.ndarray] = []
        self._pending_tokens = 0
        self._counts = np.zeros(vocab_size, np.int64)
        self._bin_hash = hashlib.sha256()
        self._idx_hash = hashlib.sha256()

    def __enter__(self) -> "IndexedWriter":
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        check_unused(self.prefix)
        _open_claim(self.prefix).close()
        self._bin = NewFile(Path(f"{self.prefix}.bin"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._bin.drop()
            # The claim stays if it vouches for a .bin or .idx that waits for its sidecar.
            if not any(os.path.exists(path) for path in _files(self.prefix)):
                Path(_claim_path(self.prefix)).unlink(missing_ok=True)

    def add_document(self, ids: Sequence[int] | np.ndarray) -> None:
        """Append one document: token ids that already end with the end-of-document token."""
        self.add_documents(np.asarray(ids, np.int64), np.array([len(ids)]))

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents whose `tokens` stand one after another, each with its end-of-document token last."""
        if not lengths.all():
            raise ValueError("a document needs at least its end-of-document token")
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        self._pending.append(tokens)
        self._pending_tokens += len(tokens)
        if self._pending_tokens >= FLUSH_TOKENS:
            self._flush()

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._lengths)

    def sidecar(
        self,
        tokenizer_sha256: str,
        eod_id: int,
        utf8_bytes: int,
        source: str,
        ids_sha256: str | None = None,
        bos_id: int | None = None,
    ) -> "Sidecar":
        """The sidecar of the pair, once it is written."""
        tokens = int(self._counts.sum())
        shares = self._counts[self._counts > 0] / tokens
        return Sidecar(
            tokenizer_sha256=tokenizer_sha256,
            vocab_size=self.vocab_size,
            eod_id=eod_id,
            bos_id=bos_id,
            documents=self.num_documents,
            tokens=tokens,
            utf8_bytes=utf8_bytes,
            unigram_entropy=max(0.0, -math.fsum(shares * np.log(shares))),
            bin_bytes=tokens * self._dtype.itemsize,
            bin_sha256=self._bin_hash.hexdigest(),
            idx_sha256=self._idx_hash.hexdigest(),
            bin_sample=sample_file(f"{self.prefix}.bin"),
            idx_sample=sample_file(f"{self.prefix}.idx"),
            ids_sha256=ids_sha256,
            source=source,
        )

    def _flush(self) -> None:
        tokens = np.concatenate(self._pending)
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise ValueError(f"token ids {tokens.min()} … {tokens.max()} outside a vocabulary of {self.vocab_size}")
        self._counts += np.bincount(tokens, minlength=self.vocab_size)
        raw = tokens.astype(self._dtype).tobytes()
        self._bin_hash.update(raw)
        self._bin.file.write(raw)
        self._pending.clear()
        self._pending_tokens = 0

    def _finish(self) -> None:
        if not self.num_documents:
            raise ValueError("no documents")
        if self._pending:
            self._flush()
        lengths = np.frombuffer(self._lengths, np.int32)
        sequences = len(lengths)
        pointers = np.zeros(sequences, "<i8")
        np.cumsum(lengths[:-1].astype(np.int64) * self._dtype.itemsize, out=pointers[1:])
        header = HEADER.pack(MAGIC, VERSION, self._code, sequences, sequences + 1)
        with new_file(Path(f"{self.prefix}.idx")) as idx:
            for part in (header, lengths.astype("<i4"), pointers, np.arange(sequences + 1, dtype="<i8")):
                idx.write(part)
                self._idx_hash.update(part)
            idx.flush()
            os.fsync(idx.fileno())
            self._bin.publish()


class Sidecar(BaseModel):
    """What a .bin/.idx pair cannot say about itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format_version: Literal[1] = 1
    tokenizer_sha256: str
    """SHA-256 of the tokenizer.json that made the tokens."""
    vocab_size: int = Field(ge=1)
    """Every token id is below this."""
    eod_id: int = Field(ge=0)
    """Closes each document."""
    bos_id: int | None = Field(None, ge=0)
    """Begins each document; None: no such token does."""
    documents: int = Field(ge=1)
    tokens: int = Field(ge=1)
    """Tokens, end-of-document tokens included."""
    utf8_bytes: int = Field(ge=0)
    """Length of the text in UTF-8, for bits per byte."""
    unigram_entropy: float = Field(ge=0, allow_inf_nan=False)
    """Entropy in nats per token of this file's own token frequencies: what a model reaches that ignores context."""
    bin_bytes: int = Field(ge=1)
    bin_sha256: str
    idx_sha256: str
    bin_sample: str | None = None
    """Sampled hash (`identity`), compared whenever a run starts; None: earlier versions wrote none."""
    idx_sample: str | None = None
    ids_sha256: str | None = None
    """Of the documents' names, PREFIX.ids.jsonl, if they have some."""
    source: str
    """Where the text came from, in words."""
    prepared: dict[str, Any] | None = None
    """By which settings and from which files (`prepare.record`); None: earlier versions did not say."""


def write_sidecar(prefix: str, sidecar: Sidecar) -> None:
    """Write `prefix.json` atomically and durably; with it, the token files count as complete."""
    with _open_claim(prefix) as file:
        file.write((sidecar.model_dump_json(indent=2, exclude_none=True) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(_claim_path(prefix), f"{prefix}.json")
    sync_folder(prefix)


def read_sidecar(prefix: str) -> Sidecar:
    """Read `prefix.json` and compare it with the size of `prefix.bin`.

    Raises `UserError` when either file is missing, the sidecar is malformed, or the sizes differ.
    """
    path, bin_path = f"{prefix}.json", f"{prefix}.bin"
    if not os.path.isfile(bin_path):
        raise UserError(f"{bin_path}: no such file; correct the prefix in [data], or make it: prepare_data.py")
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file, so {bin_path} is unfinished or foreign; prepare it: prepare_data.py")
    try:
        sidecar = Sidecar.model_validate_json(Path(path).read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise UserError(f"{path}: {where}: {first['msg']}; {PREPARE_AGAIN}") from None
    size = os.path.getsize(bin_path)
    if size != sidecar.bin_bytes:
        raise UserError(f"{bin_path}: {size} bytes, but {path} says {sidecar.bin_bytes}; {PREPARE_AGAIN}")
    return sidecar


def file_sha256(path: str) -> str:
    """SHA-256 of a file in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def sync_folder(path: str) -> None:
    """Make renames in the folder that holds `path` durable."""
    fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _files(prefix: str) -> tuple[str, str, str]:
    return f"{prefix}.bin", f"{prefix}.idx", f"{prefix}.json"
