"""What gloo, through which ranks on CPUs talk, does slowly, done with what it does well: sending and receiving.

gloo gathers into a buffer of its own, and scatters what it has all-reduced, which sends each byte twice.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule


def suit_gloo(module: FSDPModule) -> None:
    """Let FSDP's parameters and gradients of one module travel by the classes below. In place."""
    module.set_custom_all_gather(SendToAll())
    module.set_custom_reduce_scatter(SwapAndAdd())


class Buffers:
    """Where FSDP puts what is to be sent, and finds what has come."""

    def allocate(self, size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer of this size."""
        return torch.empty(size, dtype=dtype, device=device)


class SendToAll(Buffers):
    """FSDP's all-gather: each rank sends its part to every other, straight into their buffers."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Fill `output_tensor` (ranks × n) with every rank's `input_tensor` (n)."""
        parts = list(output_tensor.chunk(group.size()))
        mine = parts[group.rank()]
        if mine.data_ptr() != input_tensor.data_ptr():
            mine.copy_(input_tensor)
        _exchange([mine] * len(parts), parts, group)


class SwapAndAdd(Buffers):
    """FSDP's reduce-scatter: ranks swap the parts of their gradients and each adds up its own, in rank order."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> None:
        """Sum or mean over the ranks of `input_tensor` (ranks × n), of which this rank's n go into `output_tensor`.

        Raises ValueError for any other `op`, as gloo does: FSDP asks for one if its division of gradients is changed.
        """
        if op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
            raise ValueError(f"{op}: FSDP's gradients can only be summed or averaged on CPUs")
        parts = input_tensor.chunk(group.size())
        mine = parts[group.rank()]
        received = [mine if part is mine else torch.empty_like(mine) for part in parts]
        _exchange(parts, received, group)
        output_tensor.copy_(received[0])
        for part in received[1:]:
            output_tensor += part
        if op == dist.ReduceOp.AVG:
            output_tensor /= group.size()


def _exchange(sent: Sequence[Tensor], received: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Send part k to rank k of a group and receive part k from it, but for this rank's own. Waits.

    Waiting later, while a block computes, was no faster on two cores.
    """
    size, rank = group.size(), group.rank()
    works = []
    for distance in range(1, size):  # everyone sends to another, so that none is sent to by all
        to, source = (rank + distance) % size, (rank - distance) % size
        works.append(dist.isend(sent[to], group=group, group_dst=to))
        works.append(dist.irecv(received[source], group=group, group_src=source))
    # Unless told, these would wait for a silent rank as long as at the start of the run. There is no public way to ask.
    patience = group._get_backend(sent[0].device).options._timeout
    for work in works:
        if work is not None:
            work.wait(patience)
