"""The .bin/.idx format byte for byte, the sidecar, and everything that can be wrong with the files."""

import json
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_helpers import run_python, write_documents
from hypothesis import given, settings
from hypothesis import strategies as st

from titanling.data.check_files import check_dataset, verify_hashes
from titanling.data.indexed import (
    IndexedDataset,
    IndexedWriter,
    read_sidecar,
)
from titanling.errors import UserError

DOCUMENTS = [[5, 6, 7], [8], [9, 1]]


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """A small good dataset of three documents."""
    path = str(tmp_path / "small")
    write_documents(path, DOCUMENTS, vocab_size=10)
    return path


def assert_refused(error: pytest.ExceptionInfo, name: str) -> None:
    """One line that names the file and offers a remedy."""
    message = str(error.value)
    assert name in message and ";" in message and "\n" not in message


def test_bytes_are_megatrons(prefix: str) -> None:
    assert Path(f"{prefix}.bin").read_bytes() == struct.pack("<6H", 5, 6, 7, 8, 9, 1)
    assert Path(f"{prefix}.idx").read_bytes() == bytes.fromhex(
        "4d4d49444944580000 0100000000000000 08 0300000000000000 0400000000000000"  # magic, version, uint16, 3, 3 + 1
        "03000000 01000000 02000000"  # lengths
        "0000000000000000 0600000000000000 0800000000000000"  # byte pointers
        "0000000000000000 0100000000000000 0200000000000000 0300000000000000"  # document index
    )


@pytest.mark.parametrize(("vocab_size", "code", "dtype"), [(65499, 8, np.uint16), (65500, 4, np.int32)])
def test_dtype_follows_the_vocabulary(tmp_path: Path, vocab_size: int, code: int, dtype: type) -> None:
    prefix = str(tmp_path / "data")
    write_documents(prefix, [[0, vocab_size - 1]], vocab_size)
    dataset = IndexedDataset(prefix)
    assert Path(f"{prefix}.idx").read_bytes()[17] == code
    assert dataset.dtype == dtype
    assert dataset.read(0, 2).tolist() == [0, vocab_size - 1]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=40), min_size=1, max_size=20), st.booleans())
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, documents: list, wide: bool) -> None:
    prefix = str(tmp_path_factory.mktemp("roundtrip") / "data")
    sidecar = write_documents(prefix, documents, 70_000 if wide else 100)
    dataset = IndexedDataset(prefix)
    flat = [token for ids in documents for token in ids]
    assert dataset.num_documents == sidecar.documents == len(documents)
    assert dataset.num_tokens == sidecar.tokens == len(flat)
    assert [dataset.document(index).tolist() for index in range(len(documents))] == documents
    assert dataset.read(0, len(flat)).tolist() == flat
    assert dataset.read(len(flat) - 1, 1).tolist() == flat[-1:]
    assert check_dataset(prefix, sidecar.vocab_size, "ab" * 32) == sidecar
    verify_hashes(prefix)


def test_documents_of_several_sequences_are_read(tmp_path: Path) -> None:
    """Megatron may split documents into sentences; we never do."""
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, 3, 3)
    index = struct.pack("<3i3q3q", 2, 1, 2, 0, 8, 12, 0, 2, 3)
    (tmp_path / "split.idx").write_bytes(header + index)
    (tmp_path / "split.bin").write_bytes(struct.pack("<5i", 1, 2, 3, 70_000, 5))
    dataset = IndexedDataset(str(tmp_path / "split"))
    assert [dataset.document(index).tolist() for index in (0, 1)] == [[1, 2, 3], [70_000, 5]]


def test_reads_outside_are_refused(prefix: str) -> None:
    dataset = IndexedDataset(prefix)
    for start, count in ((-1, 1), (0, 7), (6, 1)):
        with pytest.raises(IndexError):
            dataset.read(start, count)
    with pytest.raises(IndexError):
        dataset.document(3)
    dataset.close()
    dataset.close()
    with pytest.raises(OSError):
        dataset.read(0, 1)


def header(
    magic: bytes = b"MMIDIDX\0\0", version: int = 1, code: int = 8, sequences: int = 3, entries: int = 4
) -> bytes:
    return struct.pack("<9sQBQQ", magic, version, code, sequences, entries)


@pytest.mark.parametrize(
    ("damage", "name", "says"),
    [
        (lambda idx, bin_: (idx, None), "small.bin", "no such file"),
        (lambda idx, bin_: (None, bin_), "small.idx", "no such file"),
        (lambda idx, bin_: (b"", bin_), "small.idx", "not a Megatron index"),
        (lambda idx, bin_: (idx[:20], bin_), "small.idx", "not a Megatron index"),
        (lambda idx, bin_: (header(magic=b"MMIDIDXYZ") + idx[34:], bin_), "small.idx", "not a Megatron index"),
        (lambda idx, bin_: (header(version=2) + idx[34:], bin_), "small.idx", "version 2"),
        (lambda idx, bin_: (header(code=5) + idx[34:], bin_), "small.idx", "int64 (code 5)"),
        (lambda idx, bin_: (header(code=77) + idx[34:], bin_), "small.idx", "unknown (code 77)"),
        (lambda idx, bin_: (header(code=4) + idx[34:], bin_), "small.bin", "12 bytes"),
        (lambda idx, bin_: (idx[:-1], bin_), "small.idx", "101 bytes"),
        (lambda idx, bin_: (idx + b"x", bin_), "small.idx", "103 bytes"),
        (lambda idx, bin_: (header(sequences=2**40) + idx[34:], bin_), "small.idx", "promises"),
        (lambda idx, bin_: (header(sequences=0, entries=1) + bytes(8), bin_), "small.idx", "no documents"),
        (lambda idx, bin_: (header(sequences=1, entries=2) + bytes(20) + b"\1" + bytes(7), b""), "small.bin", "no tok"),
        (lambda idx, bin_: (idx, bin_[:-2]), "small.bin", "10 bytes"),
        (lambda idx, bin_: (idx, bin_ + b"xx"), "small.bin", "14 bytes"),
    ],
)
def test_damaged_files_are_refused(prefix: str, damage: Callable, name: str, says: str) -> None:
    paths = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path, content in zip(paths, damage(*(path.read_bytes() for path in paths)), strict=True):
        path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError) as error:
        IndexedDataset(prefix)
    assert_refused(error, name)
    assert says in str(error.value)


def test_file_that_shrinks_while_in_use(prefix: str) -> None:
    dataset = IndexedDataset(prefix)
    with open(f"{prefix}.bin", "r+b") as file:
        file.truncate(4)
    with pytest.raises(UserError) as error:
        dataset.read(0, 4)
    assert_refused(error, "small.bin")


def test_failed_writing_leaves_nothing(tmp_path: Path) -> None:
    prefix = str(tmp_path / "data")
    with pytest.raises(RuntimeError), IndexedWriter(prefix, 10) as writer:
        writer.add_document([1])
        names = {re.sub("titanling-.*[.]", "", path.name) for path in tmp_path.iterdir()}
        assert names == {"data.bin.partial", "data.json.partial"}
        raise RuntimeError
    for ids in ([[10]], [[-1]], [[]], []):
        with pytest.raises(ValueError), IndexedWriter(prefix, 10) as writer:
            for document in ids:
                writer.add_document(document)
        assert not list(tmp_path.iterdir())


def test_existing_files_are_never_overwritten(prefix: str, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError) as error, IndexedWriter(prefix, 10):
        pass
    assert_refused(error, "small.")
    Path(f"{prefix}.json").unlink()  # now a foreign pair
    with pytest.raises(UserError), IndexedWriter(prefix, 10):
        pass
    assert all(path.read_bytes() == before[path] for path in tmp_path.iterdir())


def test_unfinished_files_are_done_again(tmp_path: Path) -> None:
    prefix = str(tmp_path / "data")
    with IndexedWriter(prefix, 10) as writer:
        writer.add_document([1, 2])
    assert Path(f"{prefix}.json.partial").exists()  # killed before write_sidecar
    with pytest.raises(UserError) as error:
        read_sidecar(prefix)
    assert_refused(error, "data.json")
    write_documents(prefix, [[3, 4]], 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bin", "data.idx", "data.json"]
    assert IndexedDataset(prefix).read(0, 2).tolist() == [3, 4]


def test_sidecar_counts_and_entropy(tmp_path: Path) -> None:
    prefix = str(tmp_path / "data")
    made = write_documents(prefix, [[0, 1], [2, 3, 0, 1, 2, 3]], 10)
    assert read_sidecar(prefix) == made
    assert made.unigram_entropy == pytest.approx(math.log(4))
    assert (made.documents, made.tokens, made.bin_bytes, made.vocab_size) == (2, 8, 16, 10)


@pytest.mark.parametrize(
    "text", ["", "not json", "[]", "{}", '{"format_version": 2}', "null", '{"tokens": "many"}', '{"tokens": 1.5}']
)
def test_malformed_sidecar_is_refused(prefix: str, text: str) -> None:
    Path(f"{prefix}.json").write_text(text)
    with pytest.raises(UserError) as error:
        read_sidecar(prefix)
    assert_refused(error, "small.json")


@pytest.mark.parametrize("change", [{"tokens": -1}, {"extra": 1}, {"format_version": 9}, {"unigram_entropy": "high"}])
def test_wrong_sidecar_value_is_refused(prefix: str, change: dict) -> None:
    path = Path(f"{prefix}.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as error:
        read_sidecar(prefix)
    assert next(iter(change)) in str(error.value)


def test_size_and_content_against_the_sidecar(prefix: str) -> None:
    path = Path(f"{prefix}.bin")
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    with pytest.raises(UserError) as error:
        read_sidecar(prefix)
    assert_refused(error, "small.bin")
    path.write_bytes(good[:-1] + b"\x07")
    read_sidecar(prefix)
    with pytest.raises(UserError, match="small.bin: damaged"):
        verify_hashes(prefix)
    path.unlink()
    with pytest.raises(UserError) as error:
        read_sidecar(prefix)
    assert_refused(error, "small.bin")


def test_check_dataset(prefix: str, tmp_path: Path) -> None:
    assert check_dataset(prefix, 10).tokens == 6
    with pytest.raises(UserError, match="another tokenizer"):
        check_dataset(prefix, 10, "cd" * 32)
    with pytest.raises(UserError, match=r"model.vocab_size to 10 or more \(now 9\)"):
        check_dataset(prefix, 9)
    other = str(tmp_path / "other")
    write_documents(other, DOCUMENTS, 10, tokens=7)
    with pytest.raises(UserError, match=r"other.idx: 3 documents"):
        check_dataset(other, 10)


def test_no_torch_and_no_tokenizers_are_imported() -> None:
    code = (
        "import sys, titanling.data.indexed, titanling.data.order, titanling.data.prepare.run\n"
        "assert not {'torch', 'tokenizers'} & set(sys.modules), 'heavy import'"
    )
    assert run_python("-c", code).stderr == ""
