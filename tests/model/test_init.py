"""Initial weights: a pure function of (seed, name, shape), however the rows are divided."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from titanling.config.schema import Model
from titanling.model.init import BLOCK_ELEMENTS, initialize, standard_deviation
from titanling.model.llama import build_on_meta
from titanling.model.presets import resolve_shape

SHAPE = resolve_shape(Model(n_layers=8, dim=128, n_heads=4, n_kv_heads=2, ffn_dim=256, qk_norm=True))
NAME = "model.layers.0.mlp.gate_proj.weight"
COLUMNS, ROWS = 8192, 103  # 32 rows in a block: four blocks, the last one short


def draw(
    rows: int, columns: int, name: str = NAME, seed: int = 0, first: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    tensor = torch.full((rows, columns), math.nan, dtype=dtype)
    initialize(tensor, (first, 0), tensor.shape, name, SHAPE, seed)
    return tensor


WHOLE = draw(ROWS, COLUMNS)


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, ROWS), max_size=6).map(sorted))
def test_any_partition_draws_the_same(cuts: list[int]) -> None:
    edges = [0, *cuts, ROWS]
    parts = [draw(high - low, COLUMNS, first=low) for low, high in zip(edges, edges[1:], strict=False)]
    assert torch.equal(torch.cat(parts), WHOLE)


@settings(max_examples=40, deadline=None)
@given(row=st.integers(0, ROWS), column=st.integers(0, COLUMNS), data=st.data())
def test_any_rectangle_is_a_part_of_the_whole(row: int, column: int, data: st.DataObject) -> None:
    last_row, last_column = data.draw(st.integers(row, ROWS)), data.draw(st.integers(column, COLUMNS))
    part = torch.full((last_row - row, last_column - column), math.nan)
    initialize(part, (row, column), (ROWS, COLUMNS), NAME, SHAPE, 0)
    assert torch.equal(part, WHOLE[row:last_row, column:last_column])


@pytest.mark.parametrize("columns", [1, 3, 100, 3000, BLOCK_ELEMENTS - 1, BLOCK_ELEMENTS, BLOCK_ELEMENTS + 1])
def test_any_width(columns: int) -> None:
    """A row wider than a block is a block of its own."""
    whole = draw(7, columns)
    assert torch.isfinite(whole).all()
    assert torch.equal(torch.cat([draw(3, columns), draw(4, columns, first=3)]), whole)
    assert len({row.sum().item() for row in whole}) == 7


def test_rows_far_down() -> None:
    """As many rows as a vocabulary has, of which a rank draws its last."""
    whole = draw(128_000, 16)
    assert torch.equal(draw(1, 16, first=127_999), whole[-1:])


def test_in_place_in_a_view() -> None:
    memory = torch.zeros(ROWS + 2, COLUMNS)
    initialize(memory[1:-1], (0, 0), (ROWS, COLUMNS), NAME, SHAPE, 0)
    assert torch.equal(memory[1:-1], WHOLE)
    assert not memory[0].any() and not memory[-1].any()


def test_bfloat16_is_the_rounded_float32() -> None:
    assert torch.equal(draw(ROWS, COLUMNS, dtype=torch.bfloat16), WHOLE.bfloat16())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), other=st.integers(0, 2**63 - 1))
def test_seeds_and_names_differ(seed: int, other: int) -> None:
    one = draw(4, 64, seed=seed)
    assert torch.equal(draw(4, 64, seed=seed), one)
    assert seed == other or not torch.equal(draw(4, 64, seed=other), one)
    assert not torch.equal(draw(4, 64, NAME.replace(".0.", ".1."), seed), one)


def test_the_global_generator_plays_no_part() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(draw(2, COLUMNS), WHOLE[:2])
    assert torch.equal(torch.get_rng_state(), state)


def test_every_parameter_of_a_model() -> None:
    model = build_on_meta(SHAPE, torch.float32).to_empty(device="cpu")
    drawn = {}
    for name, parameter in model.named_parameters():
        initialize(parameter, [0] * parameter.ndim, parameter.shape, name, SHAPE, seed=7)
        drawn[name] = parameter.detach()
    for name, values in drawn.items():
        if values.ndim == 1:
            assert name.endswith("norm.weight") and (values == 1).all()
            continue
        written = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = 0.02 / 4 if written else 0.02  # sqrt(2 · 8 layers) = 4
        assert standard_deviation(name, SHAPE) == pytest.approx(std)
        n = values.numel()
        assert values.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * n))
        assert abs(values.mean().item()) < 5 * std / math.sqrt(n)
        assert values.abs().max() > 3 * std  # not truncated
    assert sum(values.ndim == 1 for values in drawn.values()) == 8 * 4 + 1
    flat = [values.flatten()[:64] for values in drawn.values() if values.ndim == 2]
    assert len({tuple(values.tolist()) for values in flat}) == len(flat)


def test_blocks_are_independent() -> None:
    """No correlation between neighbouring blocks, or between two parameters at the same place."""
    other = draw(ROWS, COLUMNS, NAME.replace("gate", "up"))
    for one, two in ((WHOLE[:32], WHOLE[32:64]), (WHOLE, other)):
        correlation = torch.corrcoef(torch.stack([one.flatten(), two.flatten()]))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(one.numel())
