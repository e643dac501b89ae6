"""Attention within documents that are packed into one sequence: exact, and fast on each kind of device.

A token's position in its document says where that document begins: `starts` = its place in the sequence less that
position. A query sees the keys from there to its own place, and nothing of other documents. Nothing else is needed, so
a rank that holds a part of the sequence can do the same with the positions of its part.

On a CPU each document is attended to by itself, or with its neighbours if they are short, with torch's flash kernel:
another document's tokens cannot change a bit of it, and the work that the mask saves is not done. On a GPU
FlexAttention leaves out the blocks that no query sees. Elsewhere the mask is written out.
"""

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Queries and keys in one block of FlexAttention."""
FLEX_MIN_HEAD_DIM = 16
JOINED = 128
"""Queries of short documents that the CPU's kernel takes together."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class DocumentMask(NamedTuple):
    """What each query sees: made once in a forward pass, for all layers."""

    starts: Tensor
    """(batch, seq) int64: the place of the first token of the query's document."""
    places: Tensor
    """(seq,) int64: the query's own place among the keys."""
    blocks: "BlockMask | None" = None
    """The same for FlexAttention, on a GPU."""


def document_mask(positions: Tensor, places: Tensor | None = None, keys: int | None = None) -> DocumentMask:
    """The mask of tokens at these positions (batch, seq) of their documents.

    Where the keys are more than the queries, `keys` is their number and `places` (seq,) says which ones the queries
    are; otherwise they are the same.
    """
    if places is None:
        places = torch.arange(positions.size(1), device=positions.device)
    starts = places - positions
    return DocumentMask(starts, places, block_mask(starts, places, keys or len(places)) if starts.is_cuda else None)


def attend_documents(q: Tensor, k: Tensor, v: Tensor, mask: DocumentMask) -> Tensor:
    """Causal attention within documents: q (batch, heads, seq, head_dim), k and v (batch, kv_heads, keys, head_dim)."""
    if q.device.type == "cpu":
        return _attend(q, k, v, mask.starts, mask.places)[0]
    if mask.blocks is not None and q.size(3) >= FLEX_MIN_HEAD_DIM:
        return attend_blocks(q, k, v, mask.blocks)
    return attend_densely(q, k, v, mask)


def attend_densely(q: Tensor, k: Tensor, v: Tensor, mask: DocumentMask) -> Tensor:
    """The same with the mask written out."""
    keys = torch.arange(k.size(2), device=k.device)
    seen = (mask.starts[:, None, :, None] <= keys) & (keys <= mask.places[:, None])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=q.size(1) != k.size(1))


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, blocks: "BlockMask") -> Tensor:
    """The same by FlexAttention, which is only fast when compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    run: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
    return run(q, k, v, block_mask=blocks, enable_gqa=q.size(1) != k.size(1))


@cache
def _compiled_flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def block_mask(starts: Tensor, places: Tensor, keys: int) -> "BlockMask":
    """FlexAttention's mask. Found block by block, so that no (seq, keys) mask is ever written out."""
    from torch.nn.attention.flex_attention import BlockMask

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (starts[batch, query] <= key) & (key <= places[query])

    def blocks_of(queries: Tensor, beyond: int) -> Tensor:
        """(…, blocks, BLOCK); what fills the last one up is `beyond`."""
        return F.pad(queries, (0, -queries.size(-1) % BLOCK), value=beyond).unflatten(-1, (-1, BLOCK))

    first = torch.arange(0, keys, BLOCK, device=starts.device)  # of each block of keys
    last = first + BLOCK - 1
    lowest, highest = blocks_of(starts, keys).amin(-1)[..., None], blocks_of(places, -1).amax(-1)[:, None]
    some = (lowest <= last) & (first <= highest)
    # Every query of the block sees every key: nothing is to be asked. Not so where the last block is filled up.
    whole = (blocks_of(starts, keys).amax(-1)[..., None] <= first) & (last <= blocks_of(places, -1).amin(-1)[:, None])
    listed = [*_listed(some & ~whole), *_listed(whole)]
    return BlockMask.from_kv_blocks(*listed, BLOCK, sees, seq_lengths=(len(places), keys))


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys are chosen for each block of queries, and which, those first."""
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]


class _Run(NamedTuple):
    """Consecutive queries of one document, or of several short ones, and the keys that they see."""

    row: slice
    queries: slice
    keys: slice
    mask: Tensor | None
    """To be added to the scores where they are not merely causal."""


def _runs(starts: Tensor, places: Tensor, dtype: torch.dtype) -> Iterator[_Run]:
    batch, seq = starts.shape
    begins = torch.ones_like(starts, dtype=torch.bool)
    begins[:, 1:] = (starts.diff() != 0) | (places.diff() != 1)
    firsts = begins.flatten().nonzero().flatten()
    found = torch.stack((firsts // seq, firsts % seq, starts.flatten()[firsts], places[firsts % seq])).T.tolist()
    for row, first, length, start, place, alone in _join(found, seq):
        queries, keys, mask = slice(first, first + length), slice(start, place + length), None
        if place > start or not alone:
            key = torch.arange(keys.start, keys.stop)
            seen = (starts[row, queries, None] <= key) & (key <= places[queries, None])
            mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)
        yield _Run(slice(row, row + 1), queries, keys, mask)


def _join(found: list[list[int]], seq: int) -> list[tuple[int, int, int, int, int, bool]]:
    """(row, first query, length, start, place, whether of one document) of runs; found: (row, first, start, place).

    Whole documents that are neighbours are joined up to JOINED queries: a call of the kernel costs more than the scores
    that a mask then takes away.
    """
    joined: list[tuple[int, int, int, int, int, bool]] = []
    for (row, first, start, place), after in zip(found, [*found[1:], None], strict=True):
        length = (after[1] if after and after[0] == row else seq) - first
        if joined and start == place:
            other, begin, before, *where, _ = joined[-1]
            follows = other == row and where == [place - before, place - before]
            if follows and before + length <= JOINED:
                joined[-1] = (row, begin, before + length, where[0], where[1], False)
                continue
        joined.append((row, first, length, start, place, True))
    return joined


def _like(x: Tensor) -> Tensor:
    """Room for a tensor (batch, heads, seq, head_dim) that lies in memory as (batch, seq, heads, head_dim)."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


@torch.library.custom_op("titanling::document_attention", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """The attention, and what its backward pass needs: logsumexp (batch, heads, seq)."""
    out, logsumexp = _attend_fake(q, k, v, starts, places)
    for row, queries, keys, mask in _runs(starts, places, q.dtype):
        part, sums = _flash(q[row, :, queries], k[row, :, keys], v[row, :, keys], 0.0, mask is None, attn_mask=mask)
        out[row, :, queries], logsumexp[row, :, queries] = part, sums
    return out, logsumexp


@_attend.register_fake
def _attend_fake(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, seq, _ = q.shape
    sums = torch.empty(batch, seq, heads, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    return _like(q), sums.transpose(1, 2)


@torch.library.custom_op("titanling::document_attention_backward", mutates_args=())
def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, starts: Tensor, places: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _like(q), _like(k).zero_(), _like(v).zero_()
    grad = _like(grad).copy_(grad)
    for row, queries, keys, mask in _runs(starts, places, q.dtype):
        given = (q[row, :, queries], k[row, :, keys], v[row, :, keys], out[row, :, queries], logsumexp[row, :, queries])
        parts = _flash_backward(grad[row, :, queries], *given, 0.0, mask is None, attn_mask=mask)
        dq[row, :, queries] = parts[0]
        dk[row, :, keys] += parts[1]
        dv[row, :, keys] += parts[2]
    return dq, dk, dv


@_attend_backward.register_fake
def _attend_backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, starts: Tensor, places: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, starts, places = inputs
    ctx.save_for_backward(q, k, v, *output, starts, places)
    ctx.set_materialize_grads(False)


def _propagate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    return *_attend_backward(grad, *ctx.saved_tensors), None, None


_attend.register_autograd(_propagate, setup_context=_save)
