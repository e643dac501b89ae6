"""What a loss is of: its options, and a vocabulary that is divided over ranks."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from triton_kernels.implementation import IMPLEMENTATIONS
from triton_kernels.launch import ceil_div

IGNORE_INDEX = -100
"""A label that counts for nothing."""
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
    """What the loss is, and what computes it. Raises ValueError for a share or factor that makes no sense."""

    label_smoothing: float = 0.0
    """Share of the target that all ids have alike, 0 to 1."""
    z_loss: float = 0.0
    """Factor of lse², which keeps logits near 0."""
    shard: VocabShard | None = None
    """Logits or weight are a part of the vocabulary; the loss is that of the whole, the same on every rank."""
    by: str = "auto"
    """What computes it, but for matrix products: "triton", "torch", or "auto": Triton where its kernels run."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing = {self.label_smoothing}: must be from 0 to 1")
        if not 0 <= self.z_loss < float("inf"):
            raise ValueError(f"z_loss = {self.z_loss}: must be 0 or more, and finite")
        if self.by not in IMPLEMENTATIONS:
            raise ValueError(f'by = "{self.by}": use one of {", ".join(IMPLEMENTATIONS)}')


PLAIN = LossOptions()


def check_inputs(operation: str, name: str, x: Tensor, labels: Tensor) -> None:
    """Raises ValueError for types and shapes that do not fit together."""
    if x.dtype not in DTYPES:
        raise ValueError(f"{operation}: {name} is {x.dtype}; use one of {', '.join(map(str, DTYPES))}")
    if x.ndim != 2 or labels.shape != x.shape[:1] or labels.dtype != torch.int64:
        ours, theirs = tuple(x.shape), f"{labels.dtype} {tuple(labels.shape)}"
        raise ValueError(f"{operation}: {name} is {ours}, labels {theirs}; needs (tokens, n) and int64 (tokens,)")


def check_vocabulary(operation: str, vocab: int, shard: VocabShard | None) -> None:
    """Raises ValueError for a vocabulary, or a part of one, that cannot be."""
    total = vocab if shard is None else shard.total
    if vocab == 0 or (shard is not None and not shard.first + vocab <= total):
        raise ValueError(f"{operation}: {vocab} ids from {shard.first if shard else 0} of {total} are no vocabulary")
