"""The gradient norm of one process; under every other layout, tests/distributed compares it with this one."""

import pytest
import torch

from titanling.parallel.degrees import Degrees
from titanling.parallel.mesh import World
from titanling.parallel.weights import global_norm

ALONE = World(0, 1, torch.device("cpu"), Degrees())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_of_large_and_empty_gradients(dtype: torch.dtype) -> None:
    """Summed in one go, the squares of a matrix as large as an embedding lose four digits on a CPU."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(8192, 256), (256,), (0, 256), (3, 5)]
    gradients = [(torch.randn(size, generator=generator) * 1e-3).to(dtype) for size in sizes]
    exact = torch.cat([gradient.double().flatten() for gradient in gradients]).norm().item()
    norm = global_norm(gradients, ALONE)
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx(exact, rel=3e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(bad: float) -> None:
    gradient = torch.zeros(70_000)
    gradient[-1] = bad
    assert not global_norm([gradient], ALONE).isfinite()
