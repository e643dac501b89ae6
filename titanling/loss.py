"""The training loss."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100
"""A label that counts for nothing, neither in the loss nor in the number of tokens that it is divided by."""
# Elements of the logits worked on together: what fits the last cache of a CPU; on a GPU, enough to fill it.
CHUNK = {"cpu": 2**22, "cuda": 2**28}


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross-entropy in nats over all valid targets, 0-dim float32.

    logits (batch, seq, vocab) of any floating dtype; labels (batch, seq) int64, already shifted. Summed, not averaged:
    the caller divides by the valid targets of the whole global batch.
    Where a gradient is due it is computed at once and overwrites the logits, which the caller must not use again: the
    largest tensor of a step is then held once instead of three times, and read while it is in the cache.
    """
    return _CrossEntropySum.apply(logits.flatten(0, 1), labels.flatten())


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        rows = max(1, CHUNK.get(logits.device.type, CHUNK["cuda"]) // logits.size(1))
        loss = torch.zeros((), dtype=torch.float32, device=logits.device)
        for chunk, targets in zip(logits.split(rows), labels[:, None].split(rows), strict=True):
            valid, safe = targets != IGNORE_INDEX, targets.clamp(min=0)
            values = chunk.float()  # the chunk itself if it is float32 already
            if not ctx.needs_input_grad[0]:
                loss += ((values.logsumexp(1, keepdim=True) - values.gather(1, safe)) * valid).sum()
                continue
            top, picked = values.amax(1, keepdim=True), values.gather(1, safe)
            exponentials = values.sub_(top).exp_()
            total = exponentials.sum(1, keepdim=True)
            loss += ((total.log() + top - picked) * valid).sum()
            # softmax - one-hot, and nothing where the label is ignored
            gradient = exponentials.mul_(valid / total).scatter_add_(1, safe, -valid.float())
            if chunk.dtype != torch.float32:
                chunk.copy_(gradient)
        ctx.save_for_backward(logits)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad_loss), None
