"""Cross-entropy of the logits hidden · weightᵀ, without ever holding all of them; and of logits that exist already.

Of a token, with lse = log Σ exp(logits), ε the label smoothing (Szegedy 2016), z the z-loss (PaLM; Chowdhery 2022):

    lse - (1 - ε) · (its label's logit) - ε · (mean of the logits) + z · lse²

The loss is the last operation of a model, so its gradient is known as soon as its logits are: it overwrites them, a
chunk of tokens at a time, is multiplied into the gradients of hidden states and weight, and the next chunk takes its
place. Plain torch, on a CPU and on a GPU: the matrix products are most of the work. Statistics, losses and the sum of
the weight's gradient are float32 (float64 for float64 inputs).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from triton_kernels.launch import ceil_div
from triton_kernels.operator import wide, wide_type

IGNORE_INDEX = -100
"""A label that counts for nothing."""
PIECE = {"cpu": 2**22, "cuda": 2**25}
"""Logits worked on at once, by device: what fits the last cache of a CPU; on a GPU, enough to fill it."""
CHUNK = {"cpu": 2**25, "cuda": 2**29}
"""Logits that exist at once: rows enough for the products to run at full speed."""
HALF_SCALE = 2.0**12
"""Of gradients of float16 logits while they are held in float16, whose smallest number is 6e-8: probabilities are
smaller in a large vocabulary. A product divides it out again."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class VocabShard:
    """Logits whose vocabulary is divided over the ranks of a group: this rank's begin at id `first`, of `total`.

    Every rank but the last ones holds total / ranks, rounded up.
    """

    group: dist.ProcessGroup
    first: int
    total: int

    @property
    def largest(self) -> int:
        """The most ids that a rank holds."""
        return ceil_div(self.total, self.group.size())

    def sum_(self, values: Tensor) -> Tensor:
        """Add up over the shards, in place."""
        dist.all_reduce(values, group=self.group)
        return values

    def max_(self, values: Tensor) -> Tensor:
        """The largest over the shards, in place."""
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values


@dataclass(frozen=True)
class LossOptions:
    """What the loss is. Raises ValueError for a share or factor that makes no sense."""

    label_smoothing: float = 0.0
    """Share of the target that all ids have alike, 0 to 1."""
    z_loss: float = 0.0
    """Factor of lse², which keeps logits near 0."""
    shard: VocabShard | None = None
    """Logits or weight are a part of the vocabulary; the loss is that of the whole, the same on every rank."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing = {self.label_smoothing}: must be from 0 to 1")
        if not 0 <= self.z_loss < float("inf"):
            raise ValueError(f"z_loss = {self.z_loss}: must be 0 or more, and finite")


PLAIN = LossOptions()


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
    _check("linear_cross_entropy", "hidden", hidden, labels)
    if weight.ndim != 2 or weight.size(1) != hidden.size(1) or weight.dtype not in DTYPES:
        ours, theirs = tuple(hidden.shape), f"{weight.dtype} {tuple(weight.shape)}"
        raise ValueError(f"linear_cross_entropy: hidden is {ours}, weight {theirs}; needs (tokens, dim), (vocab, dim)")
    _check_vocabulary("linear_cross_entropy", weight.size(0), options.shard)
    if chunk_tokens is None:
        chunk_tokens = rows_at_once(CHUNK, hidden.device.type, _largest(weight.size(0), options.shard))
    if chunk_tokens < 1:
        raise ValueError(f"linear_cross_entropy: chunk_tokens = {chunk_tokens}; must be at least 1")
    # Without gradients enabled, parameters still say that they need one.
    return _LinearCrossEntropy.apply(hidden, weight, labels, options, chunk_tokens, torch.is_grad_enabled())


def cross_entropy(logits: Tensor, labels: Tensor, options: LossOptions = PLAIN) -> Tensor:
    """Sum of the losses, 0-dim, of logits (tokens, vocab) and labels (tokens,) int64.

    Where a gradient is due it overwrites the logits, which must not be used again: the largest tensor of a step is held
    once instead of three times, and read while it is in the cache. With a shard, logits are this rank's part. Raises
    ValueError for what does not fit together.
    """
    _check("cross_entropy", "logits", logits, labels)
    _check_vocabulary("cross_entropy", logits.size(1), options.shard)
    return _CrossEntropy.apply(logits, labels, options, torch.is_grad_enabled())


def rows_at_once(sizes: Mapping[str, int], device: str, vocab: int) -> int:
    """Rows of logits that make up PIECE or CHUNK on a kind of device, at least one."""
    return max(1, sizes.get(device, sizes["cuda"]) // vocab)


def loss_and_gradient_(logits: Tensor, labels: Tensor, options: LossOptions, gradient: bool) -> Tensor:
    """The summed loss of logits (rows, vocab); with `gradient` it overwrites them, times `scale_of` their type."""
    loss = torch.zeros((), dtype=wide_type(logits), device=logits.device)
    rows = rows_at_once(PIECE, logits.device.type, _largest(logits.size(1), options.shard))
    for piece, targets in zip(logits.split(rows), labels[:, None].split(rows), strict=True):
        loss += _piece(piece, targets, options, gradient)
    return loss


def scale_of(dtype: torch.dtype) -> float:
    """What gradients of logits of this type are multiplied by where they are held."""
    return HALF_SCALE if dtype == torch.float16 else 1.0


def _piece(logits: Tensor, labels: Tensor, options: LossOptions, gradient: bool) -> Tensor:
    shard, smoothing, z = options.shard, options.label_smoothing, options.z_loss
    share = smoothing / (logits.size(1) if shard is None else shard.total)
    valid = labels != IGNORE_INDEX
    local, here, elsewhere = labels, valid, ~valid
    if shard is not None:
        local = labels - shard.first
        here = valid & (local >= 0) & (local < logits.size(1))
        elsewhere = ~here & (~valid | (labels >= 0) & (labels < shard.total))
    local = local.masked_fill(elsewhere, 0)
    values = wide(logits)  # the logits themselves if they are float32 or float64
    top = values.amax(1, keepdim=True)
    top = top if shard is None else shard.max_(top)
    sums = [_pick(values, local, labels) * here]
    if smoothing:
        sums.append(values.sum(1, keepdim=True))
    keep = values is logits and not gradient
    exponentials = (values - top if keep else values.sub_(top)).exp_()
    sums.append(exponentials.sum(1, keepdim=True))
    picked, *mean, total = sums if shard is None else shard.sum_(torch.stack(sums))
    lse = total.log() + top
    loss = lse - (1 - smoothing) * picked
    if smoothing:
        loss -= mean[0] * share
    if z:
        loss += z * lse.square()
    if gradient:
        # softmax · (1 + 2 z lse) - target, and nothing where the label is ignored
        weight = valid / total * scale_of(logits.dtype)
        exponentials.mul_(weight * (1 + 2 * z * lse) if z else weight)
        if smoothing:
            exponentials.sub_(valid.to(values.dtype) * (share * scale_of(logits.dtype)))
        exponentials.scatter_add_(1, local, here.to(values.dtype) * ((smoothing - 1) * scale_of(logits.dtype)))
        if exponentials is not logits:
            logits.copy_(exponentials)
    return (loss * valid).sum()


def _pick(values: Tensor, places: Tensor, labels: Tensor) -> Tensor:
    # A label out of the vocabulary has been left as it is. Nothing looks for one, for a GPU would have to be waited for
    # (it stops by itself); on a CPU it is an error here.
    try:
        return values.gather(1, places)
    except RuntimeError as error:
        beyond = (places < 0) | (places >= values.size(1))
        if not beyond.any():
            raise
        raise ValueError(f"label {labels[beyond][0].item()} is not in the vocabulary, nor {IGNORE_INDEX}") from error


def _scale_(gradient: Tensor, by: Tensor) -> Tensor:
    """gradient · by, in place, rounded once: torch would round a 0-dim `by` to the gradient's 16 bits first."""
    if gradient.dtype == by.dtype:
        return gradient.mul_(by)
    rows = rows_at_once(PIECE, gradient.device.type, gradient.size(1))
    for piece in gradient.split(rows):
        piece.copy_(piece.to(by.dtype).mul_(by))
    return gradient


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
        d_hidden, d_weight = _take(ctx)
        # Autograd casts the weight's to the weight's own type.
        return *(None if each is None else _scale_(each, grad_loss) for each in (d_hidden, d_weight)), *[None] * 4


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, options: LossOptions, enabled: bool) -> Tensor:
        needed = enabled and ctx.needs_input_grad[0]
        loss = loss_and_gradient_(logits, labels, options, needed)
        # Not save_for_backward: it would refuse a view (of a DTensor's local part, say) that was overwritten.
        ctx.gradients = (logits.detach(),) if needed else ()
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = _take(ctx)
        return _scale_(gradient, grad_loss / scale_of(gradient.dtype)), None, None, None


def _take(ctx: Any) -> Any:
    """The gradients, which then are the caller's alone."""
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:
        raise RuntimeError("the gradients of this loss were given away in an earlier backward pass; compute it again")
    return gradients


def _largest(vocab: int, shard: VocabShard | None) -> int:
    # All ranks must work on the same rows at once, for they meet in all-reduces.
    return vocab if shard is None else shard.largest


def _check(operation: str, name: str, x: Tensor, labels: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"{operation}: {name} is {x.dtype}; use one of {', '.join(map(str, DTYPES))}")
    if x.ndim != 2 or labels.shape != x.shape[:1] or labels.dtype != torch.int64:
        ours, theirs = tuple(x.shape), f"{labels.dtype} {tuple(labels.shape)}"
        raise ValueError(f"{operation}: {name} is {ours}, labels {theirs}; needs (tokens, n) and int64 (tokens,)")


def _check_vocabulary(operation: str, vocab: int, shard: VocabShard | None) -> None:
    total = vocab if shard is None else shard.total
    if vocab == 0 or (shard is not None and not shard.first + vocab <= total):
        raise ValueError(f"{operation}: {vocab} ids from {shard.first if shard else 0} of {total} are no vocabulary")
