"""Initial weights: a pure function of (seed, parameter name, shape), bit-identical under any layout.

A parameter is drawn in blocks of rows, each from its own generator, so that a rank that holds a part of a sharded
parameter draws only the blocks that it needs, on the CPU, and never holds more than one block beside its own part.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from titanling.model.presets import LlamaShape

BLOCK_ELEMENTS = 2**18
STD = 0.02


def standard_deviation(name: str, shape: LlamaShape) -> float | None:
    """Standard deviation of a parameter's normal distribution; None for norm weights, which start at one.

    0.02, and for the matrices that write into the residual stream 0.02 / sqrt(2 · layers) (GPT-2, Megatron-LM), so
    that the stream's variance does not grow with depth.
    """
    if name.endswith("norm.weight"):
        return None
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return STD / math.sqrt(2 * shape.n_layers)
    return STD


@torch.no_grad()
def initialize(
    part: Tensor, offsets: Sequence[int], size: Sequence[int], name: str, shape: LlamaShape, seed: int
) -> None:
    """Fill `part`, the part of parameter `name` (of `size`) that begins at `offsets`, in its own dtype and device."""
    std = standard_deviation(name, shape)
    if std is None:
        part.fill_(1)
        return
    if part.numel() == 0:
        return
    (first_row, first_column), columns = offsets, size[1]
    per_block = max(1, BLOCK_ELEMENTS // columns)
    last_row, last_column = first_row + part.size(0), first_column + part.size(1)
    for block in range(first_row // per_block, -(-last_row // per_block)):
        start = block * per_block
        values = torch.from_numpy(_normal(f"{seed}/{name}/{block}", (per_block, columns))).mul_(std)
        low, high = max(start, first_row), min(start + per_block, last_row)
        part[low - first_row : high - first_row] = values[low - start : high - start, first_column:last_column]


def _normal(key: str, size: tuple[int, int]) -> np.ndarray:
    """float32 standard normal numbers of their own for every key.

    Philox (Salmon et al. 2011) takes a 128-bit key. torch's generator on the CPU would keep 32 bits of a seed: too few
    for the million blocks of a large model, some of which would be drawn alike.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
    return generator.standard_normal(size, dtype=np.float32)
