"""The training loss."""

import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
"""A label that counts for nothing, neither in the loss nor in the number of tokens that it is divided by."""


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross-entropy in nats over all valid targets, 0-dim float32.

    logits (batch, seq, vocab) of any floating dtype; labels (batch, seq) int64, already shifted. Summed, not averaged:
    the caller divides by the valid targets of the whole global batch.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
