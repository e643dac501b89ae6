"""Cross-entropy of the logits hidden · weightᵀ, without ever holding all of them.

The loss is that of cross_entropy.py. Its gradient overwrites a chunk of logits, is multiplied into the gradients of
hidden states and weight, and the next chunk takes its place. The matrix products are torch's on every device; the sum
of the weight's gradient is float32 (float64 for float64 inputs).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from triton_kernels.cross_entropy import PIECE, loss_and_gradient_, rows_at_once, scale_, scale_of, take_gradients
from triton_kernels.loss_options import DTYPES, PLAIN, LossOptions, check_inputs, check_vocabulary
from triton_kernels.operator import wide_type

CHUNK = {"cpu": 2**25, "cuda": 2**29}
"""Logits that exist at once, by device: rows enough for the products to run at full speed."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, options: LossOptions = PLAIN, chunk_tokens: int | None = None
) -> Tensor:
    """Sum of the losses of all tokens whose label is not IGNORE_INDEX, 0-dim: hidden (tokens, dim), weight (vocab, dim)
    and labels (tokens,) int64.

    Computed in hidden's type, which weight is cast to; its gradient comes back in its own. `chunk_tokens` are worked on
    at once (None: CHUNK logits; the result is the same but for rounding). With a shard, weight is this rank's part,
    (vocab of this rank, dim), and hidden the same on all ranks of the group. Then hidden's gradient is this rank's
    part of a sum, which the caller must add up over the group. Gradients are computed in the forward pass, and can be
    had once. Raises ValueError for what does not fit together.
    """
    check_inputs("linear_cross_entropy", "hidden", hidden, labels)
    if weight.ndim != 2 or weight.size(1) != hidden.size(1) or weight.dtype not in DTYPES:
        ours, theirs = tuple(hidden.shape), f"{weight.dtype} {tuple(weight.shape)}"
        raise ValueError(f"linear_cross_entropy: hidden is {ours}, weight {theirs}; needs (tokens, dim), (vocab, dim)")
    check_vocabulary("linear_cross_entropy", weight.size(0), options.shard)
    if chunk_tokens is None:
        largest = weight.size(0) if options.shard is None else options.shard.largest
        chunk_tokens = rows_at_once(CHUNK, hidden.device.type, largest)
    if chunk_tokens < 1:
        raise ValueError(f"linear_cross_entropy: chunk_tokens = {chunk_tokens}; must be at least 1")
    # Without gradients enabled, parameters still say that they need one.
    return _LinearCrossEntropy.apply(hidden, weight, labels, options, chunk_tokens, torch.is_grad_enabled())


def _add_product_(total: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    """total += alpha · a · b, where total may be wider than a and b."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, alpha=alpha)
    elif total.is_cuda:
        torch.addmm(total, a, b, alpha=alpha, out_dtype=total.dtype, out=total)
    elif a.dtype == torch.bfloat16:
        # A CPU multiplies bfloat16 to bfloat16 only: one rounding a chunk, and the chunks add up in float32.
        rows = rows_at_once(PIECE, total.device.type, total.size(1))
        for piece, own in zip(total.split(rows), (a @ b).split(rows), strict=True):
            piece.add_(own.to(total.dtype), alpha=alpha)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), alpha=alpha)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, options: LossOptions, chunk: int, enabled: bool
    ) -> Tensor:
        needs_hidden, needs_weight = (enabled and needed for needed in ctx.needs_input_grad[:2])
        tokens, vocab = hidden.size(0), weight.size(0)
        matrix, wide_ = weight.to(hidden.dtype), wide_type(hidden)
        loss = torch.zeros((), dtype=wide_, device=hidden.device)
        d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs_hidden else None
        d_weight = weight.new_zeros(weight.shape, dtype=wide_) if needs_weight else None
        alpha = 1 / scale_of(hidden.dtype)
        # One buffer for all chunks: new memory for each would cost a CPU as much as the loss itself.
        buffer = hidden.new_empty(min(chunk, tokens), vocab)
        for start in range(0, tokens, chunk):
            own = hidden[start : start + chunk]
            logits = torch.mm(own, matrix.t(), out=buffer[: len(own)])
            loss += loss_and_gradient_(logits, labels[start : start + chunk], options, needs_hidden or needs_weight)
            if d_hidden is not None:
                place = d_hidden[start : start + chunk]
                torch.addmm(place, logits, matrix, beta=0, alpha=alpha, out=place)
            if d_weight is not None:
                _add_product_(d_weight, logits.t(), own, alpha)
        ctx.gradients = d_hidden, d_weight
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = take_gradients(ctx)
        # Autograd casts the weight's to the weight's own type.
        return *(None if each is None else scale_(each, grad_loss) for each in (d_hidden, d_weight)), *[None] * 4
