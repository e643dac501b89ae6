"""From two implementations to one custom op that torch.compile, fake tensors, checkpointing and DTensors understand."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from triton_kernels.language import INTERPRETED

Sharding = tuple[list[Any], list[Any]]
"""Placements of the outputs, and of the arguments (None for what is no tensor), on one dimension of a mesh."""


def define(
    name: str,
    with_triton: Callable[..., Any],
    with_torch: Callable[..., Any],
    fake: Callable[..., Any],
    shardings: Callable[..., Sequence[Sharding]],
) -> Any:
    """The op triton_kernels::`name`: Triton on GPUs, torch on CPUs (Triton too where it is interpreted).

    `fake` makes the outputs without computing them, contiguous like the real ones. `shardings` gets the op's arguments,
    DTensor specs in place of tensors, and lists what needs no communication.
    """
    op = torch.library.custom_op(f"triton_kernels::{name}", with_triton, mutates_args=(), device_types="cuda")
    op.register_kernel("cpu")(with_triton if INTERPRETED else with_torch)
    op.register_fake(fake)
    if torch.distributed.is_available():
        from torch.distributed.tensor.experimental import register_sharding

        register_sharding(getattr(torch.ops.triton_kernels, name).default)(shardings)
    return op


def wide(x: Tensor) -> Tensor:
    """In float32, or in float64 if it is that already."""
    return x.to(wide_type(x))


def wide_type(x: Tensor) -> torch.dtype:
    """The type that statistics of x are held in."""
    return torch.promote_types(x.dtype, torch.float32)


def as_rows(x: Tensor) -> Tensor:
    """(..., n) as (rows, n) with the last dimension dense. A view where the strides allow it."""
    x = x.reshape(math.prod(x.shape[:-1]), x.size(-1))
    return x if x.stride(1) == 1 else x.contiguous()
