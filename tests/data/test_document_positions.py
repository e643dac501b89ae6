"""Where documents begin in a row, and which labels they leave."""

from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import write_documents

from titanling.data.documents import document_positions, separate_documents
from titanling.data.indexed import IndexedDataset
from titanling.data.loader import build_loader, validation_batches
from titanling.data.sources import WindowSource
from titanling.loss import IGNORE_INDEX

EOD = 0


def test_positions_restart_behind_each_end_of_document() -> None:
    ids = torch.tensor([[5, 6, EOD, 7, EOD, EOD, 8, 9], [EOD, 5, 5, 5, 5, 5, 5, EOD], [5, 6, 7, 8, 9, 1, 2, 3]])
    found = document_positions(ids, EOD)
    assert found.dtype == torch.int64
    assert found.tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6], list(range(8))]


def test_positions_of_random_rows_token_by_token() -> None:
    ids = torch.randint(0, 6, (40, 50), generator=torch.Generator().manual_seed(0))
    for row, found in zip(ids.tolist(), document_positions(ids, EOD).tolist(), strict=True):
        position = 0
        for token, place in zip(row, found, strict=True):
            assert place == position
            position = 0 if token == EOD else position + 1


@pytest.mark.parametrize("kind", ["train", "validation"])
def test_labels_are_shifted_once_and_end_with_their_document(tmp_path: Path, kind: str) -> None:
    """Tokens of which each is in the file once, but for the end of a document, tell where they and their label lie."""
    lengths = np.random.default_rng(0).integers(1, 12, 60)
    text, documents = iter(range(1, 10_000)), []
    for length in lengths:
        documents.append([next(text) for _ in range(length - 1)] + [EOD])
    write_documents(str(tmp_path / "data"), documents, vocab_size=10_000)
    dataset = IndexedDataset(str(tmp_path / "data"))
    if kind == "train":
        loader = build_loader(WindowSource([dataset], 16, 0), 4)
        batch = next(iter(loader))
        loader.dataset.close()
    else:
        batch = next(validation_batches(dataset, 16, 4))
    assert separate_documents(batch, None) is batch
    found = separate_documents(batch, EOD)
    ids, labels = found["input_ids"], found["labels"]
    assert torch.equal(ids, batch["input_ids"])
    ended = ids == EOD
    assert ended.any() and (labels[ended] == IGNORE_INDEX).all() and (batch["labels"] != IGNORE_INDEX).all()
    assert torch.equal(labels[:, :-1][~ended[:, :-1]], ids[:, 1:][~ended[:, :-1]])
    follows = {a: b for document in documents for a, b in zip(document, document[1:], strict=False)}
    assert labels[~ended].tolist() == [follows[token] for token in ids[~ended].tolist()]
    assert torch.equal(found["positions"], document_positions(ids, EOD))
