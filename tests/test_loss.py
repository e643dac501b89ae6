"""The loss against log-softmax by hand in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from titanling.loss import IGNORE_INDEX, cross_entropy_sum, head_cross_entropy_sum
from triton_kernels.cross_entropy import PIECE


def batch(batch: int, seq: int, vocab: int, ignored: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, seq, vocab, generator=generator)
    labels = torch.randint(vocab, (batch, seq), generator=generator)
    labels[torch.rand(batch, seq, generator=generator) < ignored] = IGNORE_INDEX
    return logits, labels


def by_hand(logits: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Sum of -log p(label), and its gradient p - onehot, over the valid targets."""
    logits = logits.double()
    exponentials = (logits - logits.amax(-1, keepdim=True)).exp()
    p = exponentials / exponentials.sum(-1, keepdim=True)
    loss, gradient = 0.0, torch.zeros_like(p)
    for b, t in (labels != IGNORE_INDEX).nonzero().tolist():
        loss -= math.log(p[b, t, labels[b, t]])
        gradient[b, t] = p[b, t]
        gradient[b, t, labels[b, t]] -= 1
    return loss, gradient


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 4),
    seq=st.integers(1, 9),
    vocab=st.integers(2, 50),
    ignored=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    seed=st.integers(0, 999),
)
def test_value_and_gradient(rows: int, seq: int, vocab: int, ignored: float, seed: int) -> None:
    logits, labels = batch(rows, seq, vocab, ignored, seed)
    wanted, gradient = by_hand(logits, labels)
    logits.requires_grad_()
    loss = cross_entropy_sum(logits, labels)  # overwrites the logits
    loss.backward()
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    assert logits.grad is not None
    assert (logits.grad.double() - gradient).abs().max() <= 1e-6


def test_of_hidden_states() -> None:
    hidden, labels = batch(2, 9, 8, 0.2)
    labels[labels != IGNORE_INDEX] += 10
    weight = torch.randn(30, 8)
    assert head_cross_entropy_sum(hidden, weight, labels).item() == pytest.approx(
        by_hand(hidden @ weight.t(), labels)[0], rel=1e-5
    )


def test_a_sum_not_a_mean() -> None:
    logits, labels = batch(2, 8, 11, 0.3)
    twice = cross_entropy_sum(torch.cat([logits, logits]), torch.cat([labels, labels]))
    assert twice.item() == pytest.approx(2 * cross_entropy_sum(logits, labels).item(), rel=1e-6)


def test_uniform_logits() -> None:
    assert cross_entropy_sum(torch.zeros(2, 3, 8192), torch.ones(2, 3).long()) == pytest.approx(6 * math.log(8192))


def test_nothing_to_learn() -> None:
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = cross_entropy_sum(logits, torch.full((2, 3), IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None and not logits.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_float32(dtype: torch.dtype) -> None:
    logits, labels = batch(4, 64, 100, 0.1)
    half = logits.to(dtype)
    wanted, gradient = by_hand(half, labels)
    half.requires_grad_()
    loss = cross_entropy_sum(half, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted, rel=1e-6)  # a sum in half precision would be off by 1e-3 or more
    assert half.grad is not None and half.grad.dtype == dtype
    assert (half.grad.double() - gradient).abs().max() <= torch.finfo(dtype).eps


@pytest.mark.parametrize("rows", [1, 3, 32, 100])
def test_any_chunk_gives_the_same(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = batch(4, 8, 50, 0.2)
    wanted, gradient = by_hand(logits, labels)
    monkeypatch.setitem(PIECE, "cpu", rows * 50)
    before = logits.clone()
    assert cross_entropy_sum(logits, labels).item() == pytest.approx(wanted, rel=1e-5)
    assert torch.equal(logits, before)  # nothing is overwritten where no gradient is due
    logits.requires_grad_()
    (2 * cross_entropy_sum(logits, labels)).backward()
    assert logits.grad is not None and (logits.grad.double() - 2 * gradient).abs().max() <= 2e-6


def test_large_logits() -> None:
    logits = torch.tensor([[[1e4, 0.0, -1e4]]])
    assert cross_entropy_sum(logits, torch.tensor([[0]])) == 0
    assert cross_entropy_sum(logits, torch.tensor([[2]])) == 2e4
