"""The training loss: cross-entropy in nats, summed over all valid targets; by `LossOptions` smoothed, with a z-loss.

Summed, not averaged: the caller divides by the valid targets of the whole global batch. Labels are int64, already
shifted; IGNORE_INDEX counts for nothing, neither in the loss nor in that number. With a shard in the options, the
vocabulary is divided over a group of ranks, which all get the same loss (Megatron-LM's vocabulary-parallel loss). A
loss is computed together with its gradient, which can be had once.
"""

from torch import Tensor

from triton_kernels.cross_entropy import cross_entropy
from triton_kernels.linear_cross_entropy import linear_cross_entropy
from triton_kernels.loss_options import IGNORE_INDEX, PLAIN, LossOptions, VocabShard

__all__ = ["IGNORE_INDEX", "LossOptions", "VocabShard", "cross_entropy_sum", "head_cross_entropy_sum"]


def cross_entropy_sum(logits: Tensor, labels: Tensor, options: LossOptions = PLAIN) -> Tensor:
    """Of logits (batch, seq, vocab) of any floating dtype and labels (batch, seq): 0-dim float32.

    Where a gradient is due it overwrites the logits, which the caller must not use again. With a shard, logits are
    (batch, seq, vocab of this rank). Raises ValueError for what does not fit together.
    """
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), options)


def head_cross_entropy_sum(hidden: Tensor, weight: Tensor, labels: Tensor, options: LossOptions = PLAIN) -> Tensor:
    """Of the logits hidden · weightᵀ, never all of them at once: 0-dim float32.

    hidden (batch, seq, dim), weight (vocab, dim), labels (batch, seq). With a shard, weight is this rank's part, (vocab
    of this rank, dim), and hidden's gradient a part of a sum over the group. Raises ValueError as above.
    """
    return linear_cross_entropy(hidden.flatten(0, 1), weight, labels.flatten(), options)
