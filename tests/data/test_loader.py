"""Batches: the right tokens in the right order at any world size, resumable anywhere, and no thread left behind."""

import gc
import json
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import run_python, write_documents

from titanling.data.indexed import IndexedDataset
from titanling.data.loader import BatchStream, Prefetcher, build_loader, cut_rows, validation_batches
from titanling.data.sources import WindowSource, count_windows
from titanling.errors import UserError
from titanling.loss import IGNORE_INDEX

Counting = Callable[[int], IndexedDataset]
SEQ_LEN = 4


@pytest.fixture(autouse=True)
def no_thread_left():
    """Every test must end with its prefetch threads stopped."""
    yield
    gc.collect()
    assert prefetch_threads() == 0


def prefetch_threads() -> int:
    return sum(thread.name == "data-prefetch" for thread in threading.enumerate())


def samples_of(batch: dict[str, torch.Tensor], source: WindowSource, epoch: int = 0) -> list[int]:
    """Sample numbers of a batch read from a counting dataset."""
    windows = batch["input_ids"][:, 0].numpy() // source.seq_len
    return source.samples_of_window(windows, epoch).tolist()


def test_windows_cover_the_text(counting: Counting) -> None:
    for tokens, windows in ((5, 1), (8, 1), (9, 2), (41, 10), (44, 10)):
        assert count_windows(counting(tokens), SEQ_LEN) == windows
    with pytest.raises(UserError, match=r"counting4.bin: 4 tokens are too few .* seq_len = 4 \(which needs 5\)"):
        WindowSource([counting(4)], SEQ_LEN, seed=0)


def test_each_epoch_shows_each_window_once_in_its_own_order(counting: Counting) -> None:
    source = WindowSource([counting(401)], SEQ_LEN, seed=3)
    orders = source.window_of(np.arange(300)).reshape(3, 100)
    assert all(np.array_equal(np.sort(order), np.arange(100)) for order in orders)
    assert not np.array_equal(orders[0], orders[1]) and not np.array_equal(orders[1], orders[2])
    other_seed = WindowSource([source.datasets[0]], SEQ_LEN, seed=4)
    other_name = WindowSource([source.datasets[0]], SEQ_LEN, seed=3, name="other")
    for other in (other_seed, other_name):
        assert not np.array_equal(other.window_of(np.arange(100)), orders[0])


def test_samples_and_their_inverse(counting: Counting) -> None:
    source = WindowSource([counting(401)], SEQ_LEN, seed=3)
    for index in (0, 1, 99, 100, 250, 10**12):
        window = source.window_of(index)
        assert source.read(np.array([index]))[0].tolist() == list(
            range(window * SEQ_LEN, window * SEQ_LEN + SEQ_LEN + 1)
        )
        assert source.samples_of_window(window, index // 100) == index
    samples = np.arange(100, 200)
    assert np.array_equal(source.samples_of_window(source.window_of(samples), epoch=1), samples)


def test_labels_are_one_token_ahead(counting: Counting) -> None:
    loader = build_loader(WindowSource([counting(401)], SEQ_LEN, 0), 3)
    for batch in islice(loader, 200):
        assert set(batch) == {"input_ids", "labels"}
        for tensor in batch.values():
            assert tensor.shape == (3, SEQ_LEN) and tensor.dtype == torch.int64 and tensor.is_contiguous()
        assert torch.equal(batch["labels"], batch["input_ids"] + 1)
        assert torch.all(batch["input_ids"][:, 1:] == batch["input_ids"][:, :1] + torch.arange(1, SEQ_LEN))


def test_rows_are_cut_into_shorter_ones(counting: Counting) -> None:
    """No token and no label is lost; what is cut off from its document's beginning counts from 0."""
    batch = next(iter(build_loader(WindowSource([counting(40)], 8, 5), 2)))
    cut = cut_rows(batch | {"positions": torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1], [0, 1, 0, 1, 2, 3, 4, 5]])}, 4)
    assert torch.equal(cut["input_ids"].flatten(), batch["input_ids"].flatten())
    assert torch.equal(cut["labels"].flatten(), batch["labels"].flatten())
    assert torch.equal(cut["labels"][0], cut["input_ids"][0] + 1)
    assert cut["positions"].tolist() == [[0, 1, 2, 3], [0, 1, 0, 1], [0, 1, 0, 1], [0, 1, 2, 3]]
    assert cut_rows(batch, None) is batch


def test_both_token_types(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 65_499, 101).tolist()
    for vocab_size in (65_499, 100_000):
        write_documents(str(tmp_path / str(vocab_size)), [tokens], vocab_size)
    narrow, wide = (IndexedDataset(str(tmp_path / name)) for name in ("65499", "100000"))
    assert (narrow.dtype, wide.dtype) == (np.uint16, np.int32)
    first, second = (next(iter(BatchStream(WindowSource([data], 10, 0), 10))) for data in (narrow, wide))
    assert torch.equal(first["input_ids"], second["input_ids"])
    assert sorted(torch.cat([first["input_ids"].flatten(), first["labels"][:, -1]]).tolist()) == sorted(
        tokens + [tokens[index] for index in range(10, 100, 10)]
    )


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("local", [1, 2])
def test_same_samples_per_step_at_any_world_size_and_accumulation(counting: Counting, world: int, local: int) -> None:
    global_batch, dataset = 8, counting(401)
    accumulation = global_batch // (world * local)
    source = WindowSource([dataset], SEQ_LEN, seed=5)
    ranks = [iter(BatchStream(source, local, rank, world)) for rank in range(world)]
    for step in range(12):  # 96 samples: within the first epoch
        seen = [samples_of(next(rank), source) for _ in range(accumulation) for rank in ranks]
        # Not only the same set: micro-batch by micro-batch and rank by rank, the very order.
        assert sum(seen, []) == list(range(step * global_batch, (step + 1) * global_batch))


def test_epochs_follow_each_other_inside_a_batch(counting: Counting) -> None:
    source = WindowSource([counting(41)], SEQ_LEN, seed=0)
    batches = list(islice(BatchStream(source, local_batch_size=7), 10))
    windows = torch.cat([batch["input_ids"][:, 0] for batch in batches]).numpy() // SEQ_LEN
    assert np.array_equal(windows, source.window_of(np.arange(70)))


def test_resume_continues_and_state_is_small_json(counting: Counting) -> None:
    dataset = counting(401)

    def loader(world: int = 1, local: int = 8):
        return build_loader(WindowSource([dataset], SEQ_LEN, 0), local, dp_world=world)

    straight = [batch["input_ids"] for batch in islice(loader(), 8)]
    first = loader()
    assert torch.equal(next(iter(first))["input_ids"], straight[0])
    iterator = iter(first)  # a second pass goes on, it does not begin again
    assert torch.equal(next(iterator)["input_ids"], straight[1])
    time.sleep(0.05)  # let the thread read ahead: what it has read must not count
    text = json.dumps(first.state_dict())
    assert len(text) < 500
    assert first.dataset.samples == 16
    resumed = loader()
    resumed.load_state_dict(json.loads(text))
    for batch, expected in zip(resumed, straight[2:], strict=False):
        assert torch.equal(batch["input_ids"], expected)
    elsewhere = loader(world=2, local=4)
    elsewhere.load_state_dict(json.loads(text))
    assert torch.equal(next(iter(elsewhere))["input_ids"], straight[2][:4])
    assert elsewhere.dataset.samples == 24


def test_state_before_the_first_batch(counting: Counting) -> None:
    dataset = counting(401)
    loader = build_loader(WindowSource([dataset], SEQ_LEN, 0), 2)
    state = loader.state_dict()
    first = next(iter(loader))
    again = build_loader(WindowSource([dataset], SEQ_LEN, 0), 2)
    again.load_state_dict(state)
    assert torch.equal(next(iter(again))["input_ids"], first["input_ids"])


def test_thread_ends_with_its_iterator(counting: Counting) -> None:
    dataset = counting(401)
    stream = BatchStream(WindowSource([dataset], SEQ_LEN, seed=0), 2)
    iterator = iter(stream)
    assert prefetch_threads() == 0  # nothing runs before the first batch is asked for
    next(iterator)
    assert prefetch_threads() == 1
    del iterator
    assert prefetch_threads() == 0
    iterator = iter(stream)
    next(iterator)
    stream.close()
    assert prefetch_threads() == 0
    loader = build_loader(WindowSource([dataset], SEQ_LEN, 0), 2)
    for _ in zip(loader, range(3), strict=False):
        pass
    del loader
    gc.collect()
    assert prefetch_threads() == 0


def test_reloading_state_ends_the_open_iterator(counting: Counting) -> None:
    stream = BatchStream(WindowSource([counting(401)], SEQ_LEN, seed=0), 2)
    iterator = iter(stream)
    first, second = next(iterator), next(iterator)
    stream.load_state_dict({"samples": 2})
    assert prefetch_threads() == 0
    with pytest.raises(StopIteration):
        next(iterator)
    assert stream.state_dict() == {"samples": 2}
    assert torch.equal(next(iter(stream))["input_ids"], second["input_ids"])
    assert not torch.equal(first["input_ids"], second["input_ids"])


def test_what_the_thread_raises_reaches_the_trainer(counting: Counting) -> None:
    dataset = counting(401)
    stream = BatchStream(WindowSource([dataset], SEQ_LEN, seed=0), 2)
    with open(f"{dataset.prefix}.bin", "r+b") as file:
        file.truncate(40)
    iterator = iter(stream)
    with pytest.raises(UserError, match="became shorter"):
        next(iterator)
    assert prefetch_threads() == 0


def test_closing_does_not_wait_for_a_long_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titanling.data.loader.STOP_SECONDS", 0.01)
    reading, far = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        reading.set()
        far.wait(20)
        yield 1

    prefetcher = Prefetcher(items())
    assert reading.wait(20)
    prefetcher.close()
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "data-prefetch")
    far.set()
    thread.join()


def test_interpreter_exits_while_batches_are_open(counting: Counting) -> None:
    prefix = counting(401).prefix
    code = (
        "from titanling.data.indexed import IndexedDataset\n"
        "from titanling.data.loader import build_loader\n"
        "from titanling.data.sources import WindowSource\n"
        f"iterator = iter(build_loader(WindowSource([IndexedDataset({prefix!r})], 4, 0), 2))\n"
        "print(next(iterator)['labels'].shape)"
    )
    done = run_python("-W", "error", "-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "torch.Size([2, 4])\n", "")


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize(("num_batches", "expected"), [(-1, 23), (4, 12), (1, 3), (100, 23)])
def test_validation_set_is_the_same_at_any_world_size(
    counting: Counting, world: int, num_batches: int, expected: int
) -> None:
    dataset = counting(23 * SEQ_LEN + 2)
    ranks = [list(validation_batches(dataset, SEQ_LEN, 3, num_batches, rank, world)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1  # or a collective would wait for ever
    seen = []
    for batch in (batch for batches in ranks for batch in batches):
        assert batch["input_ids"].shape == batch["labels"].shape == (3, SEQ_LEN)
        assert batch["labels"].dtype == torch.int64
        for inputs, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            if torch.all(labels == IGNORE_INDEX):
                continue
            assert torch.equal(labels, inputs + 1)
            seen.append(int(inputs[0]) // SEQ_LEN)
    assert sorted(seen) == [index * 23 // expected for index in range(expected)]  # spread over the whole file


def test_validation_needs_one_window(counting: Counting) -> None:
    with pytest.raises(UserError, match="too few"):
        validation_batches(counting(4), SEQ_LEN, 1)
