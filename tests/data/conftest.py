"""Small token files."""

from collections.abc import Callable
from pathlib import Path

import pytest
from data_helpers import write_documents

from titanling.data.indexed import IndexedDataset


@pytest.fixture
def counting(tmp_path: Path) -> Callable[[int], IndexedDataset]:
    """Makes a dataset whose token at offset k is k, so that a row tells where it was read."""

    def make(tokens: int) -> IndexedDataset:
        prefix = str(tmp_path / f"counting{tokens}")
        write_documents(prefix, [list(range(tokens))], vocab_size=max(70_000, tokens))
        return IndexedDataset(prefix)

    return make
