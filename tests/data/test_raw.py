"""Token files of datatrove and OLMo, as those write them: the same documents and rows as from our own."""

import struct
from pathlib import Path

import numpy as np
import pytest
from data_helpers import write_documents

from titanling.data import raw
from titanling.data.indexed import IndexedDataset
from titanling.data.raw import open_tokens
from titanling.errors import UserError

EOD = 9
DOCUMENTS = [[5, 6, 7, EOD], [EOD], [60_000, 1, EOD], list(range(10, 40)) + [EOD]]
FLAT = [token for document in DOCUMENTS for token in document]


def write_ds(path: Path, documents: list[list[int]], letter: str) -> None:
    path.write_bytes(b"".join(struct.pack(f"<{len(document)}{letter}", *document) for document in documents))
    ends = np.cumsum([len(document) for document in documents]).tolist()
    Path(f"{path}.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))


def write_memmap(path: Path, dtype: str) -> None:
    """The way of OLMo-core's guide: a memory map that is named .npy but has no header."""
    tokens = np.memmap(path, mode="w+", dtype=dtype, shape=(len(FLAT),))
    tokens[:] = FLAT
    tokens.flush()


@pytest.fixture(params=["bin", "ds2", "ds4", "npy2", "npy4", "npy header"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> "IndexedDataset | raw.RawTokens":
    """The same documents in each format."""
    kind = request.param
    if kind == "bin":
        write_documents(str(tmp_path / "t"), DOCUMENTS, vocab_size=65_000)
        return open_tokens(str(tmp_path / "t"))
    if kind.startswith("ds"):
        write_ds(tmp_path / "t.ds", DOCUMENTS, "H" if kind == "ds2" else "I")
        return open_tokens(str(tmp_path / "t.ds"))
    if kind == "npy header":
        np.save(tmp_path / "t.npy", np.array(FLAT, np.uint32))
        return open_tokens(str(tmp_path / "t.npy"), EOD)
    write_memmap(tmp_path / "t.npy", "uint16" if kind == "npy2" else "uint32")
    return open_tokens(str(tmp_path / "t.npy"), EOD, "uint16" if kind == "npy2" else "uint32")


@pytest.mark.parametrize("scan", [2, 5, 1 << 24])
def test_every_format_gives_the_same(
    dataset: "IndexedDataset | raw.RawTokens", scan: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw, "SCAN_TOKENS", scan)
    assert (dataset.num_tokens, dataset.num_documents) == (len(FLAT), len(DOCUMENTS))
    assert dataset.prefix.endswith(("t", "t.ds", "t.npy")) and dataset.dtype.itemsize in (2, 4)
    assert [dataset.document(index).tolist() for index in range(len(DOCUMENTS))] == DOCUMENTS
    rows = dataset.read_rows(np.array([0, 3, len(FLAT) - 5]), 5)
    assert rows.dtype == dataset.dtype
    assert rows.tolist() == [FLAT[:5], FLAT[3:8], FLAT[-5:]] and dataset.read(1, 3).tolist() == FLAT[1:4]
    for wrong in (-1, len(DOCUMENTS)):
        with pytest.raises(IndexError):
            dataset.document(wrong)
    with pytest.raises(IndexError):
        dataset.read(len(FLAT) - 2, 3)
    dataset.close()
    dataset.close()
    with pytest.raises(OSError):
        dataset.read(0, 1)


def test_what_follows_the_last_end_is_a_document_too(tmp_path: Path) -> None:
    np.array([1, 2, EOD, 3], np.uint16).tofile(tmp_path / "t.npy")
    dataset = open_tokens(str(tmp_path / "t.npy"), EOD)
    assert [dataset.document(index).tolist() for index in range(dataset.num_documents)] == [[1, 2, EOD], [3]]
    assert open_tokens(str(tmp_path / "t.npy"), 77).num_documents == 1


def test_documents_are_looked_for_only_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_memmap(tmp_path / "t.npy", "uint16")
    dataset = open_tokens(str(tmp_path / "t.npy"), EOD)
    monkeypatch.setattr(np, "flatnonzero", None)
    assert dataset.read(0, 2).tolist() == FLAT[:2]


@pytest.mark.parametrize(
    ("files", "path", "says"),
    [
        ({}, "t.ds", "t.ds: no such file"),
        ({"t.ds": b"\0\0"}, "t.ds", "t.ds.index: no such file"),
        ({"t.ds": b"\0\0", "t.ds.index": b"\0\0"}, "t.ds", "t.ds.index: 2 bytes are no list"),
        ({"t.ds": b"\0\0", "t.ds.index": b""}, "t.ds", "0 bytes are no list"),
        ({"t.ds": b"\0\0\0", "t.ds.index": struct.pack("<Q", 2)}, "t.ds", "3 bytes do not fit the 2 tokens"),
        ({"t.ds": b"\0\0", "t.ds.index": struct.pack("<3Q", 0, 9, 1)}, "t.ds", "do not fit"),
        ({"t.ds": b"", "t.ds.index": struct.pack("<Q", 0)}, "t.ds", "holds no tokens"),
        ({}, "t.npy", "t.npy: no such file"),
        ({"t.npy": b""}, "t.npy", "holds no tokens"),
        ({"t.npy": b"\0\0\0"}, "t.npy", "3 bytes are no whole number of uint16 tokens"),
        ({"t.npy": np.zeros((2, 2), np.uint16)}, "t.npy", "shape (2, 2)"),
        ({"t.npy": np.zeros(3, np.float32)}, "t.npy", "tokens of type float32"),
        ({"t.npy": b"\x93NUMPY\x01\x00\x09\x00{'descr':"}, "t.npy", "damaged header"),
        ({}, "t", "t.bin: no such file"),
    ],
)
def test_bad_files(tmp_path: Path, files: dict, path: str, says: str) -> None:
    for name, content in files.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            np.save(tmp_path / name, content)
    with pytest.raises(UserError) as error:
        open_tokens(str(tmp_path / path), EOD)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_npy_needs_its_end_of_document_id(tmp_path: Path) -> None:
    write_memmap(tmp_path / "t.npy", "uint16")
    with pytest.raises(UserError, match="end-of-document"):
        open_tokens(str(tmp_path / "t.npy"))
