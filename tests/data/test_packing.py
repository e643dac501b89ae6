"""Best-fit packing: every token once, parts of documents whole, labels within them, order and tracing."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import write_documents
from hypothesis import given
from hypothesis import strategies as st

from titanling.config.schema import Data
from titanling.data.documents import separate_documents
from titanling.data.indexed import IndexedDataset
from titanling.data.loader import build_loader
from titanling.data.packing import NO_LABEL, PackedSource, pack, split_documents
from titanling.data.sources import MixedSource, WindowSource, identity, open_sources
from titanling.data.trace import pieces, sights
from titanling.loss import IGNORE_INDEX

SEQ_LEN = 16
Make = Callable[..., PackedSource]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A source over files of documents of these lengths; its tokens count from 1 through all files."""

    def make(*files: list[int], window: int = 16, masked: bool = True, seq_len: int = SEQ_LEN) -> PackedSource:
        datasets, first = [], 1
        for number, lengths in enumerate(files):
            ends = first + np.cumsum([0, *lengths])
            documents = [list(range(a, b)) for a, b in zip(ends, ends[1:], strict=False)]
            write_documents(str(tmp_path / f"{number}"), documents, vocab_size=1_000_000)
            datasets.append(IndexedDataset(str(tmp_path / f"{number}")))
            first = int(ends[-1])
        return PackedSource(datasets, seq_len, 3, "a", window, masked)

    return make


def lengths(seed: int, count: int, mean: float) -> list[int]:
    return np.random.default_rng(seed).geometric(1 / mean, count).tolist()


@given(
    seq_len=st.integers(1, 40),
    rows=st.integers(1, 12),
    fill=st.floats(0.01, 1),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_parts_fill_rows_without_loss(seq_len: int, rows: int, fill: float, seed: int, data: st.DataObject) -> None:
    tokens = max(1, int(fill * rows * seq_len))
    cuts = data.draw(st.sets(st.integers(1, max(1, tokens - 1)))) | {tokens}
    borders = np.array([0, *sorted(cut for cut in cuts if cut <= tokens)])
    starts, sizes = split_documents(borders, seq_len)
    assert sizes.max() <= seq_len and sizes.min() >= 1
    parts, firsts, found, places = pack(sizes, rows, seq_len)
    assert np.bincount(places, found, minlength=rows).max() <= seq_len and places.max() < rows
    covered = np.concatenate([np.arange(s, s + n) for s, n in zip(starts[parts] + firsts, found, strict=True)])
    assert np.array_equal(np.sort(covered), np.arange(tokens))


def test_parts_go_where_they_fit_best() -> None:
    """By hand: 10, then 8 into a new row, 6 beside the 10, 5 beside the 8, 3 beside these, and no room is left."""
    sizes = np.array([3, 6, 10, 5, 8])
    parts, firsts, found, rows = pack(sizes, 2, 16)
    assert dict(zip(parts.tolist(), rows.tolist(), strict=True)) == {2: 0, 4: 1, 1: 0, 3: 1, 0: 1}
    assert found.tolist() == sizes[parts].tolist() and not firsts.any()
    parts, firsts, found, rows = pack(np.array([6, 6, 6, 6]), 2, 12)
    assert len(parts) == 4
    parts, firsts, found, rows = pack(np.array([8, 8, 8]), 2, 12)  # only room for the last in two pieces
    assert (parts.tolist(), firsts.tolist(), found.tolist()) == ([0, 1, 2, 2], [0, 0, 0, 4], [8, 8, 4, 4])


@pytest.mark.parametrize("mean", [1.5, 7.0, 40.0])
@pytest.mark.parametrize("masked", [True, False])
def test_every_token_once_an_epoch(make: Make, mean: float, masked: bool) -> None:
    source = make(lengths(1, 700, mean), lengths(2, 30, mean), [1], lengths(3, 500, mean), masked=masked)
    assert source.num_stretches > 2 or mean < 2
    orders = []
    for epoch in range(2):
        batch = source.batch(np.arange(epoch * source.num_windows, (epoch + 1) * source.num_windows))
        ids, labels = batch["input_ids"], batch["labels"]
        assert ids.shape == labels.shape == (source.num_windows, SEQ_LEN) and ids.dtype == labels.dtype == np.int64
        real = ids[ids > 0]
        assert np.array_equal(np.sort(real), np.arange(1, source.num_tokens + 1))
        counts = (ids > 0).sum(1)
        assert counts.min() > 0 and np.array_equal(ids > 0, np.arange(SEQ_LEN) < counts[:, None])  # padding is last
        assert (labels[ids == 0] == NO_LABEL).all()
        assert 1 - len(real) / ids.size < 1 / source.rows
        orders.append(ids.tolist())
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


@pytest.mark.parametrize("mean", [1.5, 7.0, 40.0])
def test_labels_stay_in_their_document(make: Make, mean: float) -> None:
    source = make(lengths(1, 300, mean), lengths(2, 300, mean))
    ends = {int(end) for dataset in source.datasets for end in _ends(dataset)}
    batch = source.batch(np.arange(source.num_windows))
    for ids, labels, positions in zip(*(batch[k].tolist() for k in ("input_ids", "labels", "positions")), strict=True):
        for at, (token, label, position) in enumerate(zip(ids, labels, positions, strict=True)):
            if token:
                assert label == (NO_LABEL if token in ends else token + 1)
            begins = at == 0 or (ids[at - 1] in ends) or (ids[at - 1] + 1 != token and (token or ids[at - 1]))
            assert position == (0 if begins else positions[at - 1] + 1)


def _ends(dataset: IndexedDataset) -> list[int]:
    return [dataset.document(number)[-1] for number in range(dataset.num_documents)]


def test_without_masks_a_document_ends_with_the_next_of_its_row(make: Make) -> None:
    source = make(lengths(1, 300, 7), masked=False)
    ends = {int(end) for end in _ends(source.datasets[0])}
    batch = source.batch(np.arange(source.num_windows))
    assert "positions" not in batch
    ids, labels = batch["input_ids"], batch["labels"]
    follows = np.concatenate([ids[:, 1:], np.zeros((len(ids), 1), int)], 1)
    inside, last = (ids > 0) & ~np.isin(ids, list(ends)), np.isin(ids, list(ends))
    assert np.array_equal(labels[inside], ids[inside] + 1)
    assert np.array_equal(labels[last], np.where(follows[last] > 0, follows[last], NO_LABEL))


def test_documents_that_fit_are_kept_whole(make: Make) -> None:
    sizes = lengths(4, 4000, 100)
    source = make(sizes, window=64, seq_len=256)
    held = [[part.tokens for part in source.parts(window)] for window in range(source.num_windows)]
    parts = sum(map(len, held))
    needed = sum(-(-size // 256) for size in sizes)
    assert needed <= parts < 1.01 * needed
    assert all(sum(row) <= 256 for row in held)


def test_order_leads_back_and_to_any_sample(make: Make) -> None:
    source = make(lengths(1, 9000, 9), window=16)
    assert source.num_stretches > 128
    far = [*range(300), source.num_windows - 1, source.num_windows, 10**9, 10**12 + 7]
    for sample in far:
        window = source.window_of(sample)
        assert source.samples_of_window(window, sample // source.num_windows) == sample
    first = [source.window_of(sample) // source.rows for sample in range(64)]
    assert len(set(first)) > 16  # neighbours come from many places


def test_an_empty_row_is_avoided(make: Make) -> None:
    """33 × 16 + 1 tokens in two stretches would be one of 16.5 rows and a token less."""
    source = make([1] * (2 * 16 * SEQ_LEN + 1))
    assert (source.num_stretches, source.rows) == (1, 33)
    assert (source.batch(np.arange(33))["input_ids"][:, 0] > 0).all()


def _data(root: Path, **changes: object) -> Data:
    sources = [{"name": "x", "paths": ["x-*"], "weight": 1.0}, {"name": "y", "paths": ["y"], "weight": 3.0}]
    settings = {"root": str(root), "sources": sources, "packing": "best_fit", "packing_window": 16}
    return Data(**settings | {"document_mask": "causal"} | changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packing")
    for number, name in enumerate(("x-1", "x-2", "y")):
        documents = [np.random.default_rng(size).integers(1, 50, size).tolist() for size in lengths(number, 90, 12)]
        write_documents(str(folder / name), documents, vocab_size=50, vocab=50)
    return folder


def test_tracing_both_ways(root: Path) -> None:
    source = open_sources(_data(root), SEQ_LEN, 7, 4)
    samples = 400
    seen = set()
    for sample in range(samples):
        ids, found = source.batch(np.array([sample]))["input_ids"][0], pieces(source, sample)
        read = [np.asarray(_document(source, piece)[piece.first : piece.first + piece.tokens]) for piece in found]
        tokens = np.concatenate(read)
        assert np.array_equal(ids[: len(tokens)], tokens) and not ids[len(tokens) :].any()
        seen |= {(sample, p.source, p.document, p.first, p.tokens) for p in found}
    back = {
        (sight.sample, name, document, sight.first, sight.tokens)
        for name, count in (("x", 180), ("y", 90))
        for document in range(count)
        for sight in sights(source, name, document, samples, 4)
    }
    assert back == seen


def _document(source: MixedSource, piece) -> np.ndarray:
    (windows,) = (each for each in source.sources if each.name == piece.source)
    local = piece.document - (90 if piece.prefix.endswith("x-2") else 0)
    (dataset,) = (each for each in windows.datasets if each.prefix == piece.prefix)
    return dataset.document(local)


def test_batches_are_the_same_on_any_number_of_ranks(root: Path) -> None:
    def read(ranks: int, rank: int, batches: int) -> list[dict[str, torch.Tensor]]:
        source = open_sources(_data(root), SEQ_LEN, 7, 4)
        loader = build_loader(source, 4 // ranks, dp_rank=rank, dp_world=ranks)
        return [batch for batch, _ in zip(loader, range(batches), strict=False)]

    whole, halves = read(1, 0, 12), [read(2, rank, 12) for rank in (0, 1)]
    for one, *parts in zip(whole, *halves, strict=True):
        assert one.keys() == {"input_ids", "labels", "positions"}
        assert all(torch.equal(one[key], torch.cat([part[key] for part in parts])) for key in one)
        assert separate_documents(one, 0) is one


def test_packing_belongs_to_the_identity(root: Path) -> None:
    packed, plain = (
        identity(open_sources(_data(root, packing=packing), SEQ_LEN, 7, 4)) for packing in ("best_fit", "concat")
    )
    assert packed["packing"] == "best_fit of 16" and plain == packed | {"packing": "concat"}
    assert NO_LABEL == IGNORE_INDEX and WindowSource.packing == "concat"
