"""Small token files, and text to make them of."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import json_lines, texts_of, write_documents

from titanling.data.indexed import IndexedDataset
from titanling.data.prepare import pieces
from titanling.data.prepare.train import train_tokenizer


@pytest.fixture
def counting(tmp_path: Path) -> Callable[[int], IndexedDataset]:
    """Makes a dataset whose token at offset k is k, so that a row tells where it was read."""

    def make(tokens: int) -> IndexedDataset:
        prefix = str(tmp_path / f"counting{tokens}")
        write_documents(prefix, [list(range(tokens))], vocab_size=max(70_000, tokens))
        return IndexedDataset(prefix)

    return make


@pytest.fixture
def mixed_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of every format, cut into several pieces, and a tokenizer beside it."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(json_lines(0, 60))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(json_lines(60, 90)))
    texts = [json.loads(line)["text"] for line in json_lines(90, 150).splitlines()]
    pq.write_table(pa.table({"text": texts}), folder / "c.parquet", row_group_size=20)
    for number in range(150, 160):
        (folder / f"d{number}.txt").write_text(f"plain text {number} " * 20)
    train_tokenizer(texts_of(folder), 400, str(tmp_path / "tokenizer"))
    monkeypatch.setattr(pieces, "PIECE_BYTES", 2000)
    return folder
