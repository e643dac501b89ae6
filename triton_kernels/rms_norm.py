"""RMSNorm, also of a sum: y = x / rms(x) · weight over the last dimension (Zhang & Sennrich 2019).

Statistics and the weight's gradient are float32. Two castings of 16-bit inputs:
- "llama": x / rms(x) is rounded to x's type, then multiplied by the weight in that type, as in Hugging Face's Llama;
- "float32": everything is float32 until y is rounded.
Rounding counts as the identity in the backward pass. Gradients are deterministic: each program sums the weight's
gradient over its own rows, and one reduction adds the programs up. (`F.rms_norm` casts as "float32" does.)
"""

from typing import Any

import torch
from torch import Tensor

from triton_kernels.implementation import refuse, uses_triton
from triton_kernels.language import jit, tl
from triton_kernels.launch import MAX_HIDDEN, Device, Launch, ceil_div, device_of, power_of_two, row_for
from triton_kernels.operator import Sharding, as_rows, define, wide, wide_type

CASTINGS = ("llama", "float32")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def rms_norm(x: Tensor, weight: Tensor, eps: float, casting: str = "llama") -> Tensor:
    """x / rms(x) · weight: (..., n) and (n,) → (..., n) in x's type, by the Triton kernel on a GPU.

    Raises ValueError for shapes that do not match and for what the kernel does not support.
    """
    _check("rms_norm", x, weight, casting)
    return _rms_norm(x, weight, eps, casting == "llama")[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, casting: str = "llama"
) -> tuple[Tensor, Tensor]:
    """The norm of x + residual, and that sum, rounded to their type: two (..., n) in one pass over memory.

    Raises ValueError as `rms_norm` does, and where x and residual differ in shape or type.
    """
    _check("add_rms_norm", x, weight, casting)
    if (residual.shape, residual.dtype) != (x.shape, x.dtype):
        ours, theirs = f"{x.dtype} {tuple(x.shape)}", f"{residual.dtype} {tuple(residual.shape)}"
        raise ValueError(f"add_rms_norm: x is {ours}, residual {theirs}; they must be alike")
    y, total, _ = _add_rms_norm(x, residual, weight, eps, casting == "llama")
    return y, total


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float, casting: str = "llama") -> Tensor:
    """`rms_norm` in plain torch, differentiable any number of times."""
    return _normalise(x, weight, eps, casting == "llama")[0]


def add_rms_norm_torch(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, casting: str = "llama"
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in plain torch."""
    total = x + residual
    return rms_norm_torch(total, weight, eps, casting), total


def _check(operation: str, x: Tensor, weight: Tensor, casting: str) -> None:
    if casting not in CASTINGS:
        raise ValueError(f'{operation}: casting = "{casting}"; use one of {", ".join(CASTINGS)}')
    if x.ndim == 0 or x.size(-1) == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(f"{operation}: x is {tuple(x.shape)}, weight {tuple(weight.shape)}; needs (..., n) and (n,)")
    if not uses_triton(x.device):
        return
    if x.dtype not in DTYPES or weight.dtype not in DTYPES:
        refuse(operation, f"the Triton kernel computes in 16 or 32 bits, not {x.dtype} times {weight.dtype}")
    if x.size(-1) > MAX_HIDDEN:
        refuse(operation, f"the Triton kernel takes hidden sizes up to {MAX_HIDDEN}, not {x.size(-1)}")


# ---- kernels ----


@jit
def _load_rows(x_ptr, base, stride, row, column, inside) -> Any:
    """Rows of a tensor as float32. `base`, the first, is 64-bit: only scalars of an address may exceed 31 bits."""
    return tl.load(x_ptr + base * stride + (row * stride + column), mask=inside, other=0.0).to(tl.float32)


@jit
def _load_rows_again(x_ptr, base, stride, row, column, inside) -> Any:
    """Rows that the cache still holds. A load unlike the first one, which the compiler would take to be the same."""
    x_ptr += base * stride
    return tl.load(x_ptr + (row * stride + column), mask=inside, other=0.0, eviction_policy="evict_first").to(
        tl.float32
    )


@jit
def _load_weight(weight_ptr, x_ptr, row, column, N: tl.constexpr, LLAMA: tl.constexpr) -> Any:
    """The weight as float32, once per row of a tile: in x's layout, with x's wide accesses."""
    weight = tl.load(weight_ptr + (row * 0 + column), mask=(row >= 0) & (column < N), other=0.0)
    if LLAMA:
        weight = weight.to(x_ptr.dtype.element_ty)
    return weight.to(tl.float32)


@jit
def _forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    sum_ptr,
    rstd_ptr,
    rows,
    x_stride,
    residual_stride,
    eps,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    PACK: tl.constexpr,
    LLAMA: tl.constexpr,
    ADD: tl.constexpr,
) -> None:
    """Norm of PACK rows of N by one program; y, sum and rstd are dense."""
    first = tl.program_id(0) * PACK
    base = first.to(tl.int64)
    row = tl.arange(0, PACK)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    exists = row < rows - first
    inside = column < N if PACK == 1 else exists & (column < N)
    x = _load_rows(x_ptr, base, x_stride, row, column, inside)
    if ADD:
        total = x + _load_rows(residual_ptr, base, residual_stride, row, column, inside)
        total = total.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + base * N + (row * N + column), total, mask=inside)
        x = total.to(tl.float32)
    weight = _load_weight(weight_ptr, x_ptr, row, column, N, LLAMA)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) * (1.0 / N) + eps)
    tl.store(rstd_ptr + base + row, rstd, mask=exists)
    normed = x * rstd
    if LLAMA:
        normed = normed.to(y_ptr.dtype.element_ty).to(tl.float32)
    y = normed * weight
    tl.store(y_ptr + base * N + (row * N + column), y.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _backward_kernel(
    dy_ptr,
    dsum_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    partial_ptr,
    rows,
    dy_stride,
    dsum_stride,
    x_stride,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    PACK: tl.constexpr,
    LLAMA: tl.constexpr,
    ADD: tl.constexpr,
    STAGES: tl.constexpr,
    RELOAD: tl.constexpr,
) -> None:
    """dx of every row, and one row of partial sums of dweight per program, which takes every so-manieth tile."""
    program = tl.program_id(0)
    row = tl.arange(0, PACK)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    if not RELOAD:
        kept = _load_weight(weight_ptr, x_ptr, row, column, N, LLAMA)
    dweight = tl.zeros((PACK, BLOCK), tl.float32)
    for tile in tl.range(program, tl.cdiv(rows, PACK), tl.num_programs(0), num_stages=STAGES):
        first = tile * PACK
        base = first.to(tl.int64)
        exists = row < rows - first
        inside = column < N if PACK == 1 else exists & (column < N)
        dy = _load_rows(dy_ptr, base, dy_stride, row, column, inside)
        x = _load_rows(x_ptr, base, x_stride, row, column, inside)
        rstd = tl.load(rstd_ptr + base + row, mask=exists, other=0.0)
        normed = x * rstd
        dweight += dy * (normed.to(x_ptr.dtype.element_ty).to(tl.float32) if LLAMA else normed)
        weight = _load_weight(weight_ptr, x_ptr, row, column, N, LLAMA) if RELOAD else kept
        mean = tl.sum(dy * weight * normed, axis=1, keep_dims=True) * (1.0 / N)
        if RELOAD:
            # Registers do not hold a wide row beside dweight.
            dy = _load_rows_again(dy_ptr, base, dy_stride, row, column, inside)
            normed = _load_rows_again(x_ptr, base, x_stride, row, column, inside) * rstd
        dx = (dy * weight - normed * mean) * rstd
        if ADD:
            dx += _load_rows(dsum_ptr, base, dsum_stride, row, column, inside)
        tl.store(dx_ptr + base * N + (row * N + column), dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + program * N + column, tl.sum(dweight, axis=0, keep_dims=True), mask=column < N)


def forward_launch(
    device: Device,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    outputs: tuple[Any, ...],
    eps: float,
    llama: bool,
) -> Launch:
    """The forward kernel over x (rows, n), and residual; outputs are y, the sum (or None) and rstd."""
    (rows, n), (y, total, rstd) = x.shape, outputs
    row = row_for(device, "norm_forward", n, x.element_size())
    block = power_of_two(n)
    pack = _pack(row.tile, block, x, *([] if residual is None else [residual]))
    strides = {"x_stride": x.stride(0), "residual_stride": 0 if residual is None else residual.stride(0)}
    tensors = {"x_ptr": x, "residual_ptr": residual, "weight_ptr": weight, "y_ptr": y, "sum_ptr": total}
    constants = {"N": n, "BLOCK": block, "PACK": pack, "LLAMA": llama, "ADD": residual is not None}
    arguments = {**tensors, "rstd_ptr": rstd, "rows": rows, **strides, "eps": eps}
    return Launch(_forward_kernel, ceil_div(rows, pack), arguments, constants, row.warps)


def backward_launch(
    device: Device, dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, dx: Tensor, llama: bool
) -> tuple[Launch, Tensor]:
    """The backward kernel over (rows, n), and the (programs, n) float32 partial sums of dweight that it fills."""
    rows, n = x.shape
    row = row_for(device, "norm_backward", n, x.element_size())
    block = power_of_two(n)
    pack = _pack(row.tile, block, x, dy, *([] if dsum is None else [dsum]))
    programs = min(ceil_div(rows, pack), row.per_sm * device.processors)
    partial = torch.empty(programs, n, dtype=torch.float32, device=x.device)
    tensors = {"dy_ptr": dy, "dsum_ptr": dsum, "x_ptr": x, "weight_ptr": weight, "rstd_ptr": rstd, "dx_ptr": dx}
    strides = {"dy_stride": dy.stride(0), "dsum_stride": 0 if dsum is None else dsum.stride(0)}
    constants = {"N": n, "BLOCK": block, "PACK": pack, "LLAMA": llama, "ADD": dsum is not None}
    # Two stages of float32 rows would take twice the shared memory.
    constants |= {"STAGES": row.stages if x.element_size() == 2 else 1, "RELOAD": n * x.element_size() > 16384}
    arguments = {**tensors, "partial_ptr": partial, "rows": rows, **strides, "x_stride": x.stride(0)}
    return Launch(_backward_kernel, programs, arguments, constants, row.warps), partial


def _pack(tile: int, block: int, *inputs: Tensor) -> int:
    # Inside a tile offsets are 32-bit, so rows that lie very far apart are taken one by one.
    pack = max(1, tile // block)
    return pack if all(pack * x.stride(0) < 2**31 for x in inputs) else 1


# ---- with Triton ----


def _forward(x: Tensor, weight: Tensor, eps: float, llama: bool) -> tuple[Tensor, Tensor]:
    y, rstd = _fake_forward(x, weight, eps, llama)
    device = device_of(x, "rms_norm")
    forward_launch(device, as_rows(x), None, weight.contiguous(), (y, None, rstd), eps, llama).run()
    return y, rstd


def _add_forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float, llama: bool) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _fake_add_forward(x, residual, weight, eps, llama)
    device = device_of(x, "add_rms_norm")
    forward_launch(device, as_rows(x), as_rows(residual), weight.contiguous(), outputs, eps, llama).run()
    return outputs


def _backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, llama: bool) -> tuple[Tensor, Tensor]:
    return _differentiate("rms_norm", dy, None, x, weight, rstd, llama)


def _add_backward(
    dy: Tensor, dsum: Tensor, total: Tensor, weight: Tensor, rstd: Tensor, llama: bool
) -> tuple[Tensor, Tensor]:
    return _differentiate("add_rms_norm", dy, dsum, total, weight, rstd, llama)


def _differentiate(
    operation: str, dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, llama: bool
) -> tuple[Tensor, Tensor]:
    dx = x.new_empty(x.shape)
    dsum = None if dsum is None else as_rows(dsum)
    device, rstd = device_of(x, operation), rstd.contiguous()
    launch, partial = backward_launch(device, as_rows(dy), dsum, as_rows(x), weight.contiguous(), rstd, dx, llama)
    launch.run()
    return dx, partial.sum(0).to(weight.dtype)


# ---- with torch ----


def _normalise(x: Tensor, weight: Tensor, eps: float, llama: bool) -> tuple[Tensor, Tensor]:
    rstd = torch.rsqrt(wide(x).square().mean(-1, keepdim=True) + eps)
    normed = wide(x) * rstd
    if llama:
        return normed.to(x.dtype) * weight.to(x.dtype), rstd
    return (normed * weight).to(x.dtype), rstd


def _forward_torch(x: Tensor, weight: Tensor, eps: float, llama: bool) -> tuple[Tensor, Tensor]:
    y, rstd = _normalise(x, weight, eps, llama)
    return y.contiguous(), rstd[..., 0].contiguous()


def _add_forward_torch(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, llama: bool
) -> tuple[Tensor, Tensor, Tensor]:
    total = (x + residual).contiguous()
    y, rstd = _forward_torch(total, weight, eps, llama)
    return y, total, rstd


def _backward_torch(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, llama: bool) -> tuple[Tensor, Tensor]:
    dx, dweight = _gradients(dy, x, weight, rstd, llama)
    return dx.to(x.dtype).contiguous(), dweight


def _add_backward_torch(
    dy: Tensor, dsum: Tensor, total: Tensor, weight: Tensor, rstd: Tensor, llama: bool
) -> tuple[Tensor, Tensor]:
    dx, dweight = _gradients(dy, total, weight, rstd, llama)
    return (dx + dsum).to(total.dtype).contiguous(), dweight


def _gradients(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, llama: bool) -> tuple[Tensor, Tensor]:
    dy, rstd = wide(dy), rstd[..., None]
    normed = wide(x) * rstd
    rounded = wide(normed.to(x.dtype)) if llama else normed
    dweight = (dy * rounded).flatten(0, -2).sum(0) if x.ndim > 1 else dy * rounded
    dnormed = dy * wide(weight.to(x.dtype) if llama else weight)
    dx = (dnormed - normed * (dnormed * normed).mean(-1, keepdim=True)) * rstd
    return dx, dweight.to(weight.dtype)


# ---- the ops ----


def _fake_forward(x: Tensor, weight: Tensor, eps: float, llama: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=wide_type(x))


def _fake_add_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, llama: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y, rstd = _fake_forward(x, weight, eps, llama)
    return y, x.new_empty(x.shape), rstd


def _fake_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    x, weight = arguments[-4:-2]
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _shardings(arguments: tuple[Any, ...], weight: int, returns: str) -> list[Sharding]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    tensors = [hasattr(argument, "ndim") for argument in arguments]
    found: list[Sharding] = [([Replicate()] * len(returns), [Replicate() if tensor else None for tensor in tensors])]
    for dim in range(arguments[0].ndim - 1):
        inputs = [Shard(dim) if tensor else None for tensor in tensors]
        inputs[weight] = Replicate()
        # A rank that has some of the rows has a part of the sum that is the weight's gradient.
        found.append(([Shard(dim) if kind == "r" else Partial() for kind in returns], inputs))
    return found


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, ctx.llama = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _save_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, _, weight, _, ctx.llama = inputs
    ctx.save_for_backward(output[1], weight, output[2])
    ctx.mark_non_differentiable(output[2])


def _propagate(ctx: Any, dy: Tensor, _: Any) -> tuple[Any, ...]:
    return *_rms_norm_backward(dy, *ctx.saved_tensors, ctx.llama), None, None


def _propagate_add(ctx: Any, dy: Tensor, dsum: Tensor, _: Any) -> tuple[Any, ...]:
    dx, dweight = _add_rms_norm_backward(dy, dsum, *ctx.saved_tensors, ctx.llama)
    return dx, dx, dweight, None, None


# What they return is sharded by rows ("r"), or a part of a sum ("p") where rows are sharded.
_rms_norm = define("rms_norm", _forward, _forward_torch, _fake_forward, lambda *a: _shardings(a, 1, "rr"))
_rms_norm_backward = define(
    "rms_norm_backward", _backward, _backward_torch, _fake_backward, lambda *a: _shardings(a, 2, "rp")
)
_add_rms_norm = define(
    "add_rms_norm", _add_forward, _add_forward_torch, _fake_add_forward, lambda *a: _shardings(a, 2, "rrr")
)
_add_rms_norm_backward = define(
    "add_rms_norm_backward", _add_backward, _add_backward_torch, _fake_backward, lambda *a: _shardings(a, 3, "rp")
)
_rms_norm.register_autograd(_propagate, setup_context=_save)
_add_rms_norm.register_autograd(_propagate_add, setup_context=_save_add)
