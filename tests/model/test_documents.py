"""Documents packed into one sequence: as if each were alone, bit by bit untouched by the others, on every path."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from model_helpers import SHAPES, random_ids, random_model
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from titanling.model.documents import (
    _attend,
    attend_blocks,
    attend_densely,
    attend_documents,
    block_mask,
    document_mask,
)
from titanling.model.llama import Llama

LENGTHS = (7, 1, 22, 3, 1, 1, 14)
"""Documents of one row."""


def positions_of(*rows: Sequence[int]) -> Tensor:
    """(batch, seq) int64 of rows of documents of these lengths."""
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])


def random_positions(batch: int, seq: int, seed: int = 0) -> Tensor:
    """Documents of some twenty tokens."""
    begins = torch.rand(batch, seq, generator=torch.Generator().manual_seed(seed)) < 0.05
    places = torch.arange(seq)
    return places - torch.where(begins, places, 0).cummax(1).values


def random_heads(seq: int, head_dim: int = 8, dtype: torch.dtype = torch.float64, batch: int = 2) -> list[Tensor]:
    """q, k and v as a block makes them: (batch, seq, heads, head_dim) in memory, six and two heads."""
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(batch, seq, heads, head_dim, generator=generator) for heads in (6, 2, 2)]
    return [x.to(dtype).transpose(1, 2).requires_grad_() for x in made]


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 1e-1)]
)
@pytest.mark.parametrize("head_dim", [6, 64])
def test_attention_and_its_gradient(dtype: torch.dtype, bound: float, head_dim: int) -> None:
    """Against the mask written out."""
    heads, mask = random_heads(150, head_dim, dtype), document_mask(random_positions(2, 150))
    direction = torch.randn(2, 6, 150, head_dim, generator=torch.Generator().manual_seed(2)).to(dtype)
    found, wanted = attend_documents(*heads, mask), attend_densely(*heads, mask)
    assert found.dtype == dtype and torch.allclose(found, wanted, rtol=bound, atol=bound)
    gradients = (torch.autograd.grad(out, heads, direction) for out in (found, wanted))
    for mine, theirs in zip(*gradients, strict=True):
        assert torch.allclose(mine, theirs, rtol=bound, atol=bound)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_part_of_the_sequence(ranks: int) -> None:
    """Queries that are an early and a late piece of the keys, as a context-parallel rank's are."""
    heads, positions = random_heads(60), random_positions(2, 60)
    whole = attend_densely(*heads, document_mask(positions))
    direction = torch.randn(whole.shape, dtype=whole.dtype, generator=torch.Generator().manual_seed(2))
    wanted = torch.autograd.grad(whole, heads, direction, retain_graph=True)
    sums = [torch.zeros_like(x) for x in heads]
    pieces = torch.arange(60).chunk(2 * ranks)
    for rank in range(ranks):
        own = torch.cat((pieces[rank], pieces[-1 - rank]))
        mask = document_mask(positions[:, own], own, 60)
        found = attend_documents(heads[0][:, :, own], *heads[1:], mask)
        assert torch.allclose(found, whole[:, :, own], rtol=1e-13, atol=1e-13)
        for total, part in zip(sums, torch.autograd.grad(found, heads, direction[:, :, own]), strict=True):
            total += part
    for total, gradient in zip(sums, wanted, strict=True):
        assert torch.allclose(total, gradient, rtol=1e-12, atol=1e-12)


def test_the_operator_keeps_its_promises_to_the_compiler() -> None:
    mask = document_mask(random_positions(2, 20))
    torch.library.opcheck(_attend, (*random_heads(20, dtype=torch.float32), mask.starts, mask.places))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_packed_row_is_its_documents_alone(shape: str) -> None:
    """Logits and the gradient of every parameter, in float32; the documents alone in float64."""
    model, row = random_model(SHAPES[shape]), random_ids(SHAPES[shape], 1, sum(LENGTHS))
    alone = random_model(SHAPES[shape]).double()
    direction = torch.randn(*row.shape, SHAPES[shape].vocab_size, generator=torch.Generator().manual_seed(3))
    packed = model(row, positions_of(LENGTHS))
    each = torch.cat([alone(ids) for ids in row.split(LENGTHS, dim=1)], dim=1)
    assert not torch.allclose(packed, model(row), atol=0.1)  # else the mask would do nothing
    assert (packed - each).abs().max() < 1e-5 * each.abs().max()
    (packed * direction).sum().backward()
    (each * direction).sum().backward()
    for mine, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        assert (mine.grad - theirs.grad).abs().max() < 1e-5 * theirs.grad.abs().max()


def changes(model: Llama) -> list[list[bool]]:
    """For the first token of each document changed: of which documents any bit of the logits differs."""
    ids, positions, found = random_ids(model.shape, 2, sum(LENGTHS)), positions_of(LENGTHS, LENGTHS), []
    before = model(ids, positions).split(LENGTHS, dim=1)
    for first in itertools.accumulate(LENGTHS[:-1], initial=0):
        changed = ids.clone()
        changed[:, first] = (ids[:, first] + 1) % model.shape.vocab_size
        after = model(changed, positions).split(LENGTHS, dim=1)
        found.append([not torch.equal(a, b) for a, b in zip(before, after, strict=True)])
    return found


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
def test_no_bit_of_another_document_changes(compiled: bool) -> None:
    """Compiled too, and then in one graph for other documents."""
    model = random_model(SHAPES["qk_norm"])
    counters.clear()
    if compiled:
        for block in model.model.layers.values():
            block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    assert changes(model) == torch.eye(len(LENGTHS), dtype=torch.bool).tolist()
    model(random_ids(model.shape, 2, sum(LENGTHS)), positions_of(LENGTHS[::-1], [sum(LENGTHS)]))
    assert counters["stats"]["unique_graphs"] == compiled


def test_one_document_is_the_plain_causal_model() -> None:
    model, ids = random_model(SHAPES["untied"]), random_ids(SHAPES["untied"], 2, 30)
    assert torch.allclose(model(ids, positions_of([30], [30])), model(ids), atol=1e-6)


@pytest.mark.parametrize("seq", [256, 300, 700])
def test_blocks_are_those_that_torch_finds_in_the_mask_written_out(seq: int) -> None:
    positions = torch.cat((random_positions(2, seq), positions_of([seq // 3, seq - seq // 3], [seq])))
    mask = document_mask(positions)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (mask.starts[batch, query] <= key) & (key <= query)

    found = block_mask(mask.starts, mask.places, seq)
    wanted = create_block_mask(sees, 4, None, seq, seq, device="cpu")
    for kind in ("kv", "full_kv", "q", "full_q"):
        assert torch.equal(getattr(found, f"{kind}_num_blocks"), getattr(wanted, f"{kind}_num_blocks")), kind
        listed = [getattr(each, f"{kind}_indices").sort(-1).values for each in (found, wanted)]
        assert torch.equal(*listed), kind
    assert torch.equal(found.to_dense(), wanted.to_dense())


@torch.no_grad()
@pytest.mark.parametrize("ranks", [1, 2])
def test_flex_attention_asks_the_same(ranks: int) -> None:
    """What runs on a GPU, forward and without its compiler; queries of one context-parallel rank too."""
    heads, positions = [x.detach() for x in random_heads(300, 16, torch.float32)], random_positions(2, 300)
    pieces = torch.arange(300).chunk(2 * ranks)
    own = torch.cat((pieces[0], pieces[-1]))
    mask = document_mask(positions[:, own], own, 300)
    blocks = block_mask(mask.starts, mask.places, 300)
    queries = heads[0][:, :, own]
    found = flex_attention(queries, *heads[1:], block_mask=blocks, enable_gqa=True)
    assert torch.allclose(found, attend_densely(queries, *heads[1:], mask), atol=1e-5)


@torch.no_grad()
@pytest.mark.slow
def test_flex_attention_is_compiled_once_for_all_documents() -> None:
    """As a compiled block calls it, and as an eager one does; forward, which is all that the CPU has."""
    inside = torch.compile(lambda q, k, v, mask: attend_blocks(q, k, v, mask.blocks), fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            heads = [x.detach() for x in random_heads(384, 16, torch.float32)]
            mask = document_mask(random_positions(2, 384, seed))
            mask = mask._replace(blocks=block_mask(mask.starts, mask.places, 384))
            wanted = attend_densely(*heads, mask)
            assert torch.allclose(attend_blocks(*heads, mask.blocks), wanted, atol=1e-5)
            assert torch.allclose(inside(*heads, mask), wanted, atol=1e-5)
