"""SwiGLU: silu(gate) · up (Shazeer 2020), of two tensors or of the halves of one.

Computed in float32 and rounded once. The backward pass computes silu again from gate and up instead of saving it.
"""

from typing import Any

import torch
from torch import Tensor

from triton_kernels.implementation import refuse, uses_triton
from triton_kernels.language import jit, tl
from triton_kernels.launch import Device, Launch, ceil_div, device_of, row_for
from triton_kernels.operator import Sharding, as_rows, define, wide

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up of two tensors of one shape and type, by the Triton kernel on a GPU.

    Raises ValueError where they differ, and for a type that the kernel does not support.
    """
    if (gate.shape, gate.dtype) != (up.shape, up.dtype) or gate.ndim == 0:
        ours, theirs = f"{gate.dtype} {tuple(gate.shape)}", f"{up.dtype} {tuple(up.shape)}"
        raise ValueError(f"swiglu: gate is {ours}, up {theirs}; they must be alike, with a dimension or more")
    _check("swiglu", gate)
    return _swiglu(gate, up)


def swiglu_packed(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of [gate | up]: (..., 2 n) → (..., n). Nothing is copied apart; one gradient comes back.

    Raises ValueError for an odd last dimension, and for a type that the kernel does not support.
    """
    if gate_up.ndim == 0 or gate_up.size(-1) % 2:
        raise ValueError(f"swiglu_packed: the input is {tuple(gate_up.shape)}; needs (..., 2 n)")
    _check("swiglu_packed", gate_up)
    return _swiglu_packed(gate_up)


def swiglu_torch(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` in plain torch, differentiable any number of times."""
    return (torch.nn.functional.silu(wide(gate)) * wide(up)).to(gate.dtype)


def swiglu_packed_torch(gate_up: Tensor) -> Tensor:
    """`swiglu_packed` in plain torch."""
    return swiglu_torch(*gate_up.chunk(2, dim=-1))


def _check(operation: str, x: Tensor) -> None:
    if uses_triton(x.device) and x.dtype not in DTYPES:
        refuse(operation, f"the Triton kernel computes in 16 or 32 bits, not {x.dtype}")


# ---- kernels ----


@jit
def _forward_kernel(
    gate_ptr, up_ptr, y_ptr, width, tiles, gate_stride, up_stride, y_stride, BLOCK: tl.constexpr
) -> None:
    """One tile of BLOCK columns of one row of `width`, which has `tiles` of them."""
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    # A scalar, which may exceed 31 bits; what is left of the row after it tells which columns exist.
    start = (program % tiles).to(tl.int64) * BLOCK
    column = tl.arange(0, BLOCK)
    inside = column < width - start
    gate = tl.load(gate_ptr + (row * gate_stride + start) + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + (row * up_stride + start) + column, mask=inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + (row * y_stride + start) + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _backward_kernel(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    width,
    tiles,
    dy_stride,
    gate_stride,
    up_stride,
    dgate_stride,
    dup_stride,
    BLOCK: tl.constexpr,
) -> None:
    """The same tile of dgate and dup."""
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    start = (program % tiles).to(tl.int64) * BLOCK
    column = tl.arange(0, BLOCK)
    inside = column < width - start
    dy = tl.load(dy_ptr + (row * dy_stride + start) + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + (row * gate_stride + start) + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + (row * up_stride + start) + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate = dy * up * (sigmoid * (1.0 + gate * (1.0 - sigmoid)))
    dup = dy * (gate * sigmoid)
    tl.store(dgate_ptr + (row * dgate_stride + start) + column, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + (row * dup_stride + start) + column, dup.to(dup_ptr.dtype.element_ty), mask=inside)


def forward_launch(device: Device, gate: Tensor, up: Tensor, y: Tensor) -> Launch:
    """The forward kernel over (rows, n), each with its own distance between rows."""
    return _make_launch(device, _forward_kernel, "swiglu_forward", {"gate": gate, "up": up, "y": y})


def backward_launch(device: Device, dy: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor) -> Launch:
    """The backward kernel over (rows, n), each with its own distance between rows."""
    tensors = {"dy": dy, "gate": gate, "up": up, "dgate": dgate, "dup": dup}
    return _make_launch(device, _backward_kernel, "swiglu_backward", tensors)


def _make_launch(device: Device, kernel: Any, table: str, tensors: dict[str, Tensor]) -> Launch:
    some = next(iter(tensors.values()))
    rows, width = some.shape
    if all(x.is_contiguous() for x in tensors.values()):
        # One long row leaves no tile partly empty but the last.
        rows, width = 1, rows * width
    block = row_for(device, table, 1, some.element_size()).tile
    tiles = ceil_div(width, block)
    pointers = {f"{name}_ptr": x for name, x in tensors.items()}
    strides = {f"{name}_stride": x.stride(0) for name, x in tensors.items()}
    arguments = {**pointers, "width": width, "tiles": tiles, **strides}
    return Launch(kernel, rows * tiles, arguments, {"BLOCK": block}, row_for(device, table, 1).warps)


# ---- with Triton ----


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    y = gate.new_empty(gate.shape)
    forward_launch(device_of(gate, "swiglu"), as_rows(gate), as_rows(up), as_rows(y)).run()
    return y


def _backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    outputs = (as_rows(dgate), as_rows(dup))
    backward_launch(device_of(gate, "swiglu"), as_rows(dy), as_rows(gate), as_rows(up), *outputs).run()
    return dgate, dup


def _packed_forward(gate_up: Tensor) -> Tensor:
    y = _fake_packed_forward(gate_up)
    forward_launch(device_of(gate_up, "swiglu_packed"), *as_rows(gate_up).chunk(2, dim=1), as_rows(y)).run()
    return y


def _packed_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    gradient = gate_up.new_empty(gate_up.shape)
    halves = (*as_rows(gate_up).chunk(2, dim=1), *as_rows(gradient).chunk(2, dim=1))
    backward_launch(device_of(gate_up, "swiglu_packed"), as_rows(dy), *halves).run()
    return gradient


# ---- with torch ----


def _forward_torch(gate: Tensor, up: Tensor) -> Tensor:
    return swiglu_torch(gate, up).contiguous()


def _backward_torch(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dy, wide_gate, sigmoid = wide(dy), wide(gate), wide(gate).sigmoid()
    dgate = dy * wide(up) * (sigmoid * (1 + wide_gate * (1 - sigmoid)))
    dup = dy * (wide_gate * sigmoid)
    return dgate.to(gate.dtype).contiguous(), dup.to(up.dtype).contiguous()


def _packed_forward_torch(gate_up: Tensor) -> Tensor:
    return _forward_torch(*gate_up.chunk(2, dim=-1))


def _packed_backward_torch(dy: Tensor, gate_up: Tensor) -> Tensor:
    return torch.cat(_backward_torch(dy, *gate_up.chunk(2, dim=-1)), dim=-1)


# ---- the ops ----


def _fake_packed_forward(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.size(-1) // 2))


def _shardings(arguments: tuple[Any, ...], outputs: int, dims: int) -> list[Sharding]:
    from torch.distributed.tensor import Replicate, Shard

    placements = [Replicate(), *(Shard(dim) for dim in range(dims))]
    return [([placement] * outputs, [placement] * len(arguments)) for placement in placements]


# Every element stands alone, so all dimensions may be sharded; the halves of [gate | up] must stay together.
_swiglu = define(
    "swiglu",
    _forward,
    _forward_torch,
    lambda gate, up: gate.new_empty(gate.shape),
    lambda *a: _shardings(a, 1, a[0].ndim),
)
_swiglu_backward = define(
    "swiglu_backward",
    _backward,
    _backward_torch,
    lambda dy, gate, up: (gate.new_empty(gate.shape), up.new_empty(up.shape)),
    lambda *a: _shardings(a, 2, a[0].ndim),
)
_swiglu_packed = define(
    "swiglu_packed",
    _packed_forward,
    _packed_forward_torch,
    _fake_packed_forward,
    lambda *a: _shardings(a, 1, a[0].ndim - 1),
)
_swiglu_packed_backward = define(
    "swiglu_packed_backward",
    _packed_backward,
    _packed_backward_torch,
    lambda dy, gate_up: gate_up.new_empty(gate_up.shape),
    lambda *a: _shardings(a, 1, a[0].ndim - 1),
)
_swiglu.register_autograd(
    lambda ctx, dy: _swiglu_backward(dy, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
_swiglu_packed.register_autograd(
    lambda ctx, dy: _swiglu_packed_backward(dy, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
