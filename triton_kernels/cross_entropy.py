"""Cross-entropy of logits that exist, which their gradient overwrites.

Of a token, with lse = log Σ exp(logits), ε the label smoothing (Szegedy 2016), z the z-loss (PaLM; Chowdhery 2022):

    lse - (1 - ε) · (its label's logit) - ε · (mean of the logits) + z · lse²

The loss is the last operation of a model, so its gradient is known as soon as its logits are. Two passes over a row:
one for its largest logit and Σ exp(logit - that), one for the gradient. By Triton kernels on a GPU, by torch anywhere.
Statistics and losses are float32 (float64 for float64 logits).
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from triton_kernels.implementation import choose, refuse
from triton_kernels.language import jit, tl
from triton_kernels.launch import Device, Launch, ceil_div, device_of, row_for
from triton_kernels.loss_options import IGNORE_INDEX, PLAIN, LossOptions, check_inputs, check_vocabulary
from triton_kernels.operator import wide, wide_type

PIECE = {"cpu": 2**22, "cuda": 2**25}
"""Logits that torch works on at once, by device: what fits the last cache of a CPU; on a GPU, enough to fill it."""
HALF_SCALE = 2.0**12
"""Of gradients of float16 logits while they are held in float16, whose smallest number is 6e-8: probabilities are
smaller in a large vocabulary. A product divides it out again."""


def cross_entropy(logits: Tensor, labels: Tensor, options: LossOptions = PLAIN) -> Tensor:
    """Sum of the losses, 0-dim, of logits (tokens, vocab) and labels (tokens,) int64.

    Where a gradient is due it overwrites the logits, which must not be used again: the largest tensor of a step is held
    once instead of three times. With a shard, logits are this rank's part. Raises ValueError for what does not fit
    together, and for what the Triton kernels do not support.
    """
    check_inputs("cross_entropy", "logits", logits, labels)
    check_vocabulary("cross_entropy", logits.size(1), options.shard)
    return _CrossEntropy.apply(logits, labels, options, torch.is_grad_enabled())


def rows_at_once(sizes: Mapping[str, int], device: str, vocab: int) -> int:
    """Rows of logits that make up so many logits on a kind of device, at least one."""
    return max(1, sizes.get(device, sizes["cuda"]) // vocab)


def scale_of(dtype: torch.dtype) -> float:
    """What gradients of logits of this type are multiplied by where they are held."""
    return HALF_SCALE if dtype == torch.float16 else 1.0


# ---- kernels ----


@jit
def _statistics_kernel(
    logits_ptr,
    top_ptr,
    total_ptr,
    sum_ptr,
    vocab,
    stride,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    SUM: tl.constexpr,
) -> None:
    """Of one row in one pass: its largest logit, Σ exp(logit - that), and Σ logit (Milakov & Gimelshein 2018)."""
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * stride
    column = tl.arange(0, BLOCK)
    top = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    plain = tl.zeros((1,), tl.float32)
    for start in tl.range(0, vocab, BLOCK, num_stages=STAGES):
        inside = column < vocab - start
        x = tl.load(logits_ptr + start + column, mask=inside, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, axis=0, keep_dims=True))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # -inf less -inf is not a number
        total = total * tl.exp(top - base) + tl.sum(tl.exp(x - base), axis=0, keep_dims=True)
        top = higher
        if SUM:
            plain += tl.sum(tl.where(inside, x, 0.0), axis=0, keep_dims=True)
    only = row + tl.arange(0, 1)
    tl.store(top_ptr + only, top)
    tl.store(total_ptr + only, total)
    if SUM:
        tl.store(sum_ptr + only, plain)


@jit
def _gradient_kernel(
    logits_ptr,
    top_ptr,
    weight_ptr,
    even_ptr,
    spike_ptr,
    label_ptr,
    vocab,
    tiles,
    stride,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
) -> None:
    """One tile of BLOCK logits of one row, of `tiles`: exp(logit - top) · weight - even, less `spike` at the label."""
    program = tl.program_id(0)
    row = program // tiles
    start = (program % tiles) * BLOCK
    column = tl.arange(0, BLOCK)
    inside = column < vocab - start
    logits_ptr += row.to(tl.int64) * stride + start
    x = tl.load(logits_ptr + column, mask=inside, other=float("-inf")).to(tl.float32)
    gradient = tl.exp(x - tl.load(top_ptr + row)) * tl.load(weight_ptr + row)
    if EVEN:
        gradient -= tl.load(even_ptr + row)
    label = tl.load(label_ptr + row).to(tl.int32) - start
    gradient = tl.where(column == label, gradient - tl.load(spike_ptr + row), gradient)
    tl.store(logits_ptr + column, gradient.to(logits_ptr.dtype.element_ty), mask=inside)


def statistics_launch(device: Device, logits: Tensor, top: Tensor, total: Tensor, plain: Tensor | None) -> Launch:
    """The first pass over logits (rows, vocab) with dense rows; top, total and plain (or None) are (rows, 1)."""
    row = row_for(device, "cross_entropy_statistics", 1)
    arguments = {"logits_ptr": logits, "top_ptr": top, "total_ptr": total, "sum_ptr": plain}
    arguments |= {"vocab": logits.size(1), "stride": logits.stride(0)}
    constants = {"BLOCK": row.tile, "STAGES": row.stages, "SUM": plain is not None}
    return Launch(_statistics_kernel, logits.size(0), arguments, constants, row.warps)


def gradient_launch(
    device: Device, logits: Tensor, top: Tensor, weight: Tensor, even: Tensor | None, spike: Tensor, labels: Tensor
) -> Launch:
    """The second pass, in place; all else is (rows, 1), float32 but for the int64 labels."""
    row = row_for(device, "cross_entropy_gradient", 1)
    tiles = ceil_div(logits.size(1), row.tile)
    arguments = {"logits_ptr": logits, "top_ptr": top, "weight_ptr": weight, "even_ptr": even, "spike_ptr": spike}
    arguments |= {"label_ptr": labels, "vocab": logits.size(1), "tiles": tiles, "stride": logits.stride(0)}
    constants = {"BLOCK": row.tile, "EVEN": even is not None}
    return Launch(_gradient_kernel, logits.size(0) * tiles, arguments, constants, row.warps)


# ---- two ways to work on rows: what is asked of each is `statistics`, then perhaps `gradient_` ----


class _Triton:
    """By the kernels. Needs no memory but a few numbers for each row."""

    def __init__(self, logits: Tensor, gradient: bool) -> None:
        self.logits, self.device = logits, device_of(logits, "cross_entropy", INSTEAD)

    def statistics(self, smoothing: bool) -> tuple[Tensor, ...]:
        found = self.logits.new_empty(3 if smoothing else 2, self.logits.size(0), 1, dtype=torch.float32).unbind()
        statistics_launch(self.device, self.logits, found[0], found[1], found[2] if smoothing else None).run()
        return found

    def gradient_(self, top: Tensor, weight: Tensor, even: Tensor | None, spike: Tensor, local: Tensor) -> None:
        gradient_launch(self.device, self.logits, top, weight, even, spike, local).run()


class _Torch:
    """Operation by operation. The exponentials are kept: in the logits' memory where it is wide enough."""

    def __init__(self, logits: Tensor, gradient: bool) -> None:
        self.logits, self.gradient = logits, gradient

    def statistics(self, smoothing: bool) -> tuple[Tensor, ...]:
        values = wide(self.logits)  # the logits themselves if they are float32 or float64
        top = values.amax(1, keepdim=True)
        plain = (values.sum(1, keepdim=True),) if smoothing else ()
        keep = values is self.logits and not self.gradient
        self.exponentials = (values - top if keep else values.sub_(top)).exp_()
        return top, self.exponentials.sum(1, keepdim=True), *plain

    def gradient_(self, top: Tensor, weight: Tensor, even: Tensor | None, spike: Tensor, local: Tensor) -> None:
        gradient = self.exponentials.mul_(weight)
        if even is not None:
            gradient.sub_(even)
        gradient.scatter_add_(1, local, -spike)
        if gradient is not self.logits:
            self.logits.copy_(gradient)


INSTEAD = 'LossOptions.by = "torch" would run it'
_WAYS: dict[str, Any] = {"triton": _Triton, "torch": _Torch}


def _way(logits: Tensor, options: LossOptions) -> str:
    """ "triton" or "torch". Raises ValueError where Triton is asked for and does not go with the logits."""
    fits = logits.dtype != torch.float64 and logits.stride(1) == 1
    if options.by == "auto":
        return _automatic(logits.device) if fits else "torch"
    if options.by == "triton" and not fits:
        kind = f"{logits.dtype} with strides {logits.stride()}"
        refuse("cross_entropy", f"the Triton kernels take dense rows of 16 or 32 bits, not {kind}", INSTEAD)
    return options.by


@cache
def _automatic(device: torch.device) -> str:
    return choose("auto", device, "linear_cross_entropy")


# ---- the loss ----


def loss_and_gradient_(logits: Tensor, labels: Tensor, options: LossOptions, gradient: bool) -> Tensor:
    """The summed loss of logits (rows, vocab); with `gradient` it overwrites them, times `scale_of` their type."""
    loss = torch.zeros((), dtype=wide_type(logits), device=logits.device)
    way, shard = _way(logits, options), options.shard
    # All ranks must work on the same rows at once, for they meet in all-reduces.
    largest = logits.size(1) if shard is None else shard.largest
    rows = max(1, logits.size(0)) if way == "triton" else rows_at_once(PIECE, logits.device.type, largest)
    for piece, targets in zip(logits.split(rows), labels[:, None].split(rows), strict=True):
        loss += _piece(piece, targets, options, gradient, way)
    return loss


def _piece(logits: Tensor, labels: Tensor, options: LossOptions, gradient: bool, way: str) -> Tensor:
    shard, smoothing, z = options.shard, options.label_smoothing, options.z_loss
    share = smoothing / (logits.size(1) if shard is None else shard.total)
    valid = labels != IGNORE_INDEX
    local, here, elsewhere = labels, valid, ~valid
    if shard is not None:
        local = labels - shard.first
        here = valid & (local >= 0) & (local < logits.size(1))
        elsewhere = ~here & (~valid | (labels >= 0) & (labels < shard.total))
    local = local.masked_fill(elsewhere, 0)
    picked = wide(_pick(logits, local, labels)) * here
    work = _WAYS[way](logits, gradient)
    top, total, *mean = work.statistics(smoothing > 0)
    own, shift = top, None
    if shard is not None:
        top = shard.max_(top.clone())
        shift = (own - top).exp()  # of exponentials of this part to those of the whole
        total, picked, *mean = shard.sum_(torch.stack([total * shift, picked, *mean]))
    lse = total.log() + top
    loss = lse - (1 - smoothing) * picked
    if smoothing:
        loss -= mean[0] * share
    if z:
        loss += z * lse.square()
    if gradient:
        # softmax · (1 + 2 z lse) - target, and nothing where the label is ignored
        scale = scale_of(logits.dtype)
        weight = valid / total * scale
        weight = weight * (1 + 2 * z * lse) if z else weight
        weight = weight if shift is None else weight * shift
        even = valid.to(weight.dtype) * (share * scale) if smoothing else None
        work.gradient_(own, weight, even, here.to(weight.dtype) * ((1 - smoothing) * scale), local)
    return (loss * valid).sum()


def _pick(logits: Tensor, places: Tensor, labels: Tensor) -> Tensor:
    # A label out of the vocabulary has been left as it is. Nothing looks for one, for a GPU would have to be waited for
    # (it stops by itself); on a CPU it is an error here.
    try:
        return logits.gather(1, places)
    except RuntimeError as error:
        beyond = (places < 0) | (places >= logits.size(1))
        if not beyond.any():
            raise
        raise ValueError(f"label {labels[beyond][0].item()} is not in the vocabulary, nor {IGNORE_INDEX}") from error


def scale_(gradient: Tensor, by: Tensor) -> Tensor:
    """gradient · by, in place, rounded once: torch would round a 0-dim `by` to the gradient's 16 bits first."""
    if gradient.dtype == by.dtype:
        return gradient.mul_(by)
    rows = rows_at_once(PIECE, gradient.device.type, gradient.size(1))
    for piece in gradient.split(rows):
        piece.copy_(piece.to(by.dtype).mul_(by))
    return gradient


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
        (gradient,) = take_gradients(ctx)
        return scale_(gradient, grad_loss / scale_of(gradient.dtype)), None, None, None


def take_gradients(ctx: Any) -> Any:
    """The gradients that a loss has kept, which then are the caller's alone."""
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:
        raise RuntimeError("the gradients of this loss were given away in an earlier backward pass; compute it again")
    return gradients
