"""How kernels are launched: a readable table per target, and the record of one launch.

The rows come from arithmetic and from what the compilers report (scripts/kernel_report.py): 16-byte accesses, no
spills, as many bytes in flight as fit. `benchmarks/tune_kernels.py` measures alternatives on a GPU and prints rows to
put here. Nothing is tuned at import or in the first step.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch

from triton_kernels.implementation import available, refuse, target


class Row(NamedTuple):
    """One line of a table."""

    size: int
    """For rows of up to this many 2-byte elements; a float32 counts as two."""
    tile: int
    """Elements that a program works on at once. A norm packs as many whole rows as that makes, at least one."""
    warps: int
    stages: int = 1
    """Of the loop over rows: 2 loads the next one while this one is computed."""
    per_sm: int = 1
    """Programs per multiprocessor or compute unit, of kernels that loop over rows."""


Table = dict[str, tuple[Row, ...]]

MAX_HIDDEN = 16384
"""Largest last dimension of the norms: a row stays in the registers of one program."""
LIMIT = 2 * MAX_HIDDEN

NVIDIA: Table = {
    "norm_forward": (
        Row(2048, 2048, 4),
        Row(4096, 4096, 8),
        Row(8192, 8192, 8),
        Row(LIMIT, MAX_HIDDEN, 16),
    ),
    "norm_backward": (
        Row(1024, 1024, 4, stages=2, per_sm=8),
        Row(2048, 2048, 4, stages=2, per_sm=4),
        Row(4096, 4096, 8, stages=2, per_sm=2),
        Row(8192, 8192, 16, stages=2, per_sm=1),
        Row(LIMIT, MAX_HIDDEN, 16),
    ),
    "swiglu_forward": (Row(LIMIT, 2048, 4),),
    "swiglu_backward": (Row(LIMIT, 1024, 4),),
    "rope": (Row(1024, 1024, 4), Row(LIMIT, 2048, 4)),
    "cross_entropy_statistics": (Row(LIMIT, 4096, 8, stages=2),),
    "cross_entropy_gradient": (Row(LIMIT, 2048, 4),),
}

# For this generation the compiler gives 4 warps 80 registers each, and a summed row of 2048 then spills.
BLACKWELL: Table = {
    **NVIDIA,
    "norm_backward": tuple(row._replace(warps=8) if row.size == 2048 else row for row in NVIDIA["norm_backward"]),
}

# Waves of 64: warps = next power of two of the hidden size / 512 gives every lane 16 bytes at a time.
AMD: Table = {
    "norm_forward": (
        Row(512, 2048, 4),
        Row(1024, 1024, 2),
        Row(2048, 2048, 4),
        Row(4096, 4096, 8),
        Row(8192, 8192, 16),
        Row(LIMIT, MAX_HIDDEN, 16),
    ),
    "norm_backward": (
        Row(512, 2048, 4, per_sm=8),
        Row(1024, 1024, 2, per_sm=16),
        Row(2048, 2048, 4, per_sm=8),
        Row(4096, 4096, 8, per_sm=4),
        Row(8192, 8192, 16, per_sm=2),
        Row(LIMIT, MAX_HIDDEN, 16),
    ),
    "swiglu_forward": (Row(LIMIT, 2048, 4),),
    "swiglu_backward": (Row(LIMIT, 2048, 4),),
    "rope": (Row(1024, 1024, 2), Row(LIMIT, 2048, 4)),
    "cross_entropy_statistics": (Row(LIMIT, 4096, 8),),
    "cross_entropy_gradient": (Row(LIMIT, 2048, 4),),
}

TABLES: dict[str, Table] = {
    "sm_80": NVIDIA,
    "sm_90": NVIDIA,
    "sm_100": BLACKWELL,
    "gfx90a": AMD,
    "gfx942": AMD,
}


class Device(NamedTuple):
    """What a launch has to know of a device."""

    target: str
    """A key of TABLES."""
    processors: int
    """Multiprocessors (NVIDIA) or compute units (AMD)."""


class Launch(NamedTuple):
    """One launch of one kernel. The ahead-of-time checks compile the same record that a GPU runs."""

    kernel: Any
    programs: int
    arguments: Mapping[str, Any]
    """Tensors, ints and floats by parameter name."""
    constants: Mapping[str, Any]
    """The compile-time constants by parameter name."""
    warps: int

    def run(self) -> None:
        """Do it, where the tensors are; nothing if there is nothing to do."""
        if self.programs > 0:
            # Triton launches on the current device, whatever device its arguments are on.
            with torch.cuda.device_of(next(x for x in self.arguments.values() if isinstance(x, torch.Tensor))):
                self.kernel[(self.programs,)](**self.arguments, **self.constants, num_warps=self.warps)


def row_for(device: Device, kernel: str, elements: int, itemsize: int = 2) -> Row:
    """The table's row for `elements` of `itemsize` bytes."""
    size = elements * max(1, itemsize // 2)
    return next(row for row in TABLES[device.target][kernel] if size <= row.size)


def device_of(tensor: torch.Tensor, operation: str, instead: str = "") -> Device:
    """The device of a tensor. Raises ValueError, and says what would run, if the Triton kernels do not run there."""
    problem = _problem(tensor.device)
    if problem is not None:
        refuse(operation, problem, instead)
    return _device(tensor.device)


@cache
def _problem(device: torch.device) -> str | None:
    return available(device)


@cache
def _device(device: torch.device) -> Device:
    if device.type == "cpu":
        # The interpreter runs programs one after another: few, but enough for partial sums to meet.
        return Device("sm_90", 1)
    return Device(known(target(device)), torch.cuda.get_device_properties(device).multi_processor_count)


def known(name: str) -> str:
    """The table for a target: its own, or that of the newest NVIDIA generation that is not newer."""
    if name in TABLES:
        return name
    older = [key for key in TABLES if key.startswith("sm_") and int(key[3:]) <= int(name[3:])]
    return max(older, key=lambda key: int(key[3:]))


def power_of_two(number: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << max(0, number - 1).bit_length()


def ceil_div(number: int, by: int) -> int:
    """number / by, rounded up."""
    return -(-number // by)
