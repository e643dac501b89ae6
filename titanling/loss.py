"""The training loss."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100
"""A label that counts for nothing, neither in the loss nor in the number of tokens that it is divided by."""
# Elements of the logits worked on together: what fits the last cache of a CPU; on a GPU, enough to fill it.
CHUNK = {"cpu": 2**22, "cuda": 2**28}


@dataclass(frozen=True)
class VocabShard:
    """Logits whose vocabulary is divided over the ranks of a group: this rank's begin at id `first`."""

    group: dist.ProcessGroup
    first: int

    def sum_(self, values: Tensor) -> Tensor:
        """Add up over the shards, in place."""
        dist.all_reduce(values, group=self.group)
        return values

    def max_(self, values: Tensor) -> Tensor:
        """The largest over the shards, in place."""
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values


def cross_entropy_sum(logits: Tensor, labels: Tensor, shard: VocabShard | None = None) -> Tensor:
    """Sum of the cross-entropy in nats over all valid targets, 0-dim float32.

    logits (batch, seq, vocab) of any floating dtype; labels (batch, seq) int64, already shifted. Summed, not averaged:
    the caller divides by the valid targets of the whole global batch. With a `shard`, logits (batch, seq, vocab of
    this rank) are its part; the loss is the same on all ranks of the group (Megatron-LM's vocabulary-parallel loss).
    Where a gradient is due it is computed at once and overwrites the logits, which the caller must not use again: the
    largest tensor of a step is then held once instead of three times, and read while it is in the cache.
    """
    return _CrossEntropySum.apply(logits.flatten(0, 1), labels.flatten(), shard)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, shard: VocabShard | None) -> Tensor:
        vocab = logits.size(1)
        rows = max(1, CHUNK.get(logits.device.type, CHUNK["cuda"]) // vocab)
        loss = torch.zeros((), dtype=torch.float32, device=logits.device)
        for chunk, targets in zip(logits.split(rows), labels[:, None].split(rows), strict=True):
            valid = targets != IGNORE_INDEX
            local = targets if shard is None else targets - shard.first
            here = valid if shard is None else valid & (local >= 0) & (local < vocab)
            safe = local.clamp(0, vocab - 1)
            values = chunk.float()  # the chunk itself if it is float32 already
            top = values.amax(1, keepdim=True)
            top = top if shard is None else shard.max_(top)
            picked = values.gather(1, safe) * here
            keep = not ctx.needs_input_grad[0] and values is chunk
            exponentials = (values - top if keep else values.sub_(top)).exp_()
            total = exponentials.sum(1, keepdim=True)
            if shard is not None:
                total, picked = shard.sum_(torch.stack((total, picked)))
            loss += ((total.log() + top - picked) * valid).sum()
            if not ctx.needs_input_grad[0]:
                continue
            # softmax - one-hot, and nothing where the label is ignored
            gradient = exponentials.mul_(valid / total).scatter_add_(1, safe, -here.float())
            if chunk.dtype != torch.float32:
                chunk.copy_(gradient)
        # Not save_for_backward: it would refuse a view (of a DTensor's local part, say) that was overwritten.
        ctx.gradient = logits.detach()
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(grad_loss), None, None
