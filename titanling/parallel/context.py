"""Context parallelism: ranks share each sequence, and gather keys and values for attention."""

import torch
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention.bias import causal_lower_right

from titanling.config.schema import Parallelism
from titanling.errors import UserError
from titanling.model.documents import DocumentMask, attend_documents, document_mask
from titanling.model.layout import ModelLayout
from titanling.parallel.mesh import World
from titanling.parallel.plan import Plan

# torch 2.13 has given it another name.
all_gather = getattr(collectives, "all_gather_single_autograd", None) or collectives.all_gather_tensor_autograd


def shard_sequence(tensor: Tensor, dim: int, ranks: int, rank: int) -> Tensor:
    """This rank's part of a tensor along its sequence: of 2 · ranks pieces, one early and its mirror image, late.

    Under a causal mask late tokens see many keys and early ones few: so every rank has the same work.
    """
    pieces = tensor.chunk(2 * ranks, dim)
    return torch.cat((pieces[rank], pieces[-1 - rank]), dim)


class ContextAttention:
    """Causal attention of this rank's queries over the keys and values of all ranks of the `cp` mesh."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh, self.ranks, self.rank = mesh, mesh.size(), mesh.get_local_rank()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: DocumentMask | None = None) -> Tensor:
        """q (batch, heads, seq / cp, head_dim), k and v (batch, kv_heads, seq / cp, head_dim) → as q."""
        k, v = self._gather(torch.cat((k, v), dim=1)).chunk(2, dim=1)
        if mask is not None:
            return attend_documents(q, k, v, mask)
        early, late = q.chunk(2, dim=2)
        piece = early.size(2)
        parts = []
        for queries, end in ((early, self.rank + 1), (late, 2 * self.ranks - self.rank)):
            parts.append(attend_at_the_end(queries, k[:, :, : end * piece], v[:, :, : end * piece]))
        return torch.cat(parts, dim=2)

    def document_mask(self, positions: Tensor) -> DocumentMask:
        """The mask of this rank's queries, at positions (batch, seq / cp) of their documents, over all keys."""
        keys = positions.size(1) * self.ranks
        places = shard_sequence(torch.arange(keys, device=positions.device), 0, self.ranks, self.rank)
        return document_mask(positions, places, keys)

    def _gather(self, x: Tensor) -> Tensor:
        """(…, seq / cp, head_dim) of every rank → (…, seq, head_dim) in the order of the text."""
        pieces = all_gather(x.contiguous(), 2, self.mesh).chunk(2 * self.ranks, dim=2)
        return torch.cat((*pieces[0::2], *reversed(pieces[1::2])), dim=2)


def attend_at_the_end(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of queries that are the last of the keys' positions."""
    length, total = q.size(2), k.size(2)
    gqa = q.size(1) != k.size(1)
    if length == total:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    if q.device.type == "cuda":
        mask = causal_lower_right(length, total)  # the flash kernels know it: nothing is written out
    else:
        mask = torch.ones(length, total, dtype=torch.bool, device=q.device).tril(total - length)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)


class ContextParallel(Plan):
    """Let attention see the whole sequence, of which every rank holds its part (`shard_sequence`)."""

    name = "context"
    needs = ("cp",)

    def __init__(self, settings: Parallelism) -> None:
        self.settings = settings

    def check(self, device: torch.device) -> None:
        """Raises UserError for a method that is not built."""
        if self.settings.context_parallel_degree > 1 and self.settings.context_parallel_rotate_method != "allgather":
            raise UserError(
                f'parallelism.context_parallel_rotate_method = "{self.settings.context_parallel_rotate_method}" is not'
                ' supported; set "allgather"'
            )

    def apply(self, model: nn.Module, world: World) -> None:
        """In place. One object serves all blocks, so that they compile to one graph."""
        layout: ModelLayout = model.layout  # type: ignore[assignment]
        assert world.cp_mesh is not None
        attention = ContextAttention(world.cp_mesh)
        for block in model.get_submodule(layout.blocks).children():
            block.get_submodule(layout.attention).attend = attention
        decoder = model.get_submodule(layout.blocks.rpartition(".")[0])
        if hasattr(decoder, "document_mask"):
            decoder.document_mask = attention.document_mask

    def describe(self) -> str:
        """One line."""
        return f"sequences over {self.settings.context_parallel_degree} ranks, an early and a late piece each"
