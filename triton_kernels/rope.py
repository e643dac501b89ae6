"""Rotary position embedding (RoFormer, Su et al. 2021) of queries and keys together.

Element i of the first half of a head pairs with element i of the second half, as in Hugging Face's Llama. Computed in
float32 and rounded once. The backward pass is the rotation by the opposite angle, by the same kernel.
"""

from typing import Any

import torch
from torch import Tensor

from triton_kernels.implementation import refuse, uses_triton
from triton_kernels.language import jit, tl
from triton_kernels.launch import Device, Launch, ceil_div, device_of, power_of_two, row_for
from triton_kernels.operator import Sharding, define, wide

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 1024
"""Largest head that one program holds."""


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate q (batch, seq, heads, head_dim) and k (batch, seq, kv_heads, head_dim), by the Triton kernel on a GPU.

    cos and sin are float32, (seq, 1, head_dim / 2), or (batch, seq, 1, head_dim / 2) where positions differ between
    sequences; they get no gradient. Raises ValueError for shapes that do not match, an odd head_dim, and for what the
    kernel does not support.
    """
    _check(q, k, cos, sin)
    return _rope(q, k, cos, sin, False)


def rope_torch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rope` in plain torch, differentiable any number of times."""
    return _rotate_torch(q, cos, sin), _rotate_torch(k, cos, sin)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in (("q", q), ("k", k), ("cos", cos), ("sin", sin)))
    if q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.size(3) != k.size(3) or q.size(3) % 2:
        raise ValueError(f"rope: {shapes}; needs q and k (batch, seq, heads, head_dim) with an even head_dim")
    angles = (q.size(1), 1, q.size(3) // 2)
    if cos.shape != sin.shape or tuple(cos.shape) not in (angles, (q.size(0), *angles)):
        raise ValueError(f"rope: {shapes}; needs cos and sin (seq, 1, head_dim / 2), or that for every sequence")
    if not uses_triton(q.device):
        return
    if q.dtype not in DTYPES or q.dtype != k.dtype or cos.dtype != torch.float32 or sin.dtype != torch.float32:
        types = f"q {q.dtype}, k {k.dtype}, cos {cos.dtype}, sin {sin.dtype}"
        refuse("rope", f"the Triton kernel takes q and k of one 16- or 32-bit type and float32 angles, not {types}")
    if not 0 < q.size(3) <= MAX_HEAD_DIM or min(q.size(2), k.size(2)) == 0:
        refuse("rope", f"the Triton kernel takes heads of up to {MAX_HEAD_DIM} elements, not {shapes}")


# ---- kernel ----


@jit
def _rotate_heads(
    x_ptr, y_ptr, cos, sin, first, heads, x_stride, HALF: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr
) -> None:
    """Rotate PACK heads of one token, from head `first` on; y's heads are dense."""
    head = first + tl.arange(0, PACK)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (head < heads) & (column < HALF)
    x_ptr += head * x_stride + column
    a = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + HALF, mask=inside, other=0.0).to(tl.float32)
    y_ptr += head * (2 * HALF) + column
    tl.store(y_ptr, (a * cos - b * sin).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(y_ptr + HALF, (b * cos + a * sin).to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _rope_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    seq,
    blocks,
    q_heads,
    k_heads,
    q_batch_stride,
    q_seq_stride,
    q_head_stride,
    k_batch_stride,
    k_seq_stride,
    k_head_stride,
    cos_batch_stride,
    cos_seq_stride,
    sin_batch_stride,
    sin_seq_stride,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    Q_PACK: tl.constexpr,
    K_PACK: tl.constexpr,
    BACKWARD: tl.constexpr,
) -> None:
    """One of `blocks` groups of heads of one token: Q_PACK of q and K_PACK of k, with the angles loaded once."""
    token = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    # Scalars that may exceed 31 bits; offsets within a token do not.
    batch = (token // seq).to(tl.int64)
    place = (token % seq).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    cos_ptr += batch * cos_batch_stride + place * cos_seq_stride
    sin_ptr += batch * sin_batch_stride + place * sin_seq_stride
    cos = tl.load(cos_ptr + column, mask=column < HALF, other=0.0)
    sin = tl.load(sin_ptr + column, mask=column < HALF, other=0.0)
    if BACKWARD:
        sin = -sin
    q_ptr += batch * q_batch_stride + place * q_seq_stride
    q_out_ptr += token.to(tl.int64) * (q_heads * (2 * HALF))
    _rotate_heads(q_ptr, q_out_ptr, cos, sin, block * Q_PACK, q_heads, q_head_stride, HALF, BLOCK, Q_PACK)
    k_ptr += batch * k_batch_stride + place * k_seq_stride
    k_out_ptr += token.to(tl.int64) * (k_heads * (2 * HALF))
    _rotate_heads(k_ptr, k_out_ptr, cos, sin, block * K_PACK, k_heads, k_head_stride, HALF, BLOCK, K_PACK)


def make_launch(
    device: Device, inputs: tuple[Tensor, Tensor, Tensor, Tensor], outputs: tuple[Tensor, Tensor], backward: bool
) -> Launch:
    """The kernel over q, k, cos and sin; outputs are dense, and the last dimension of the inputs too."""
    q, k, cos, sin = inputs
    batch, seq, q_heads, head_dim = q.shape
    k_heads, block = k.size(2), power_of_two(head_dim // 2)
    row = row_for(device, "rope", q_heads * block, q.element_size())
    blocks = ceil_div(q_heads, max(1, row.tile // block))
    q_pack, k_pack = (power_of_two(ceil_div(heads, blocks)) for heads in (q_heads, k_heads))
    tensors = {"q_ptr": q, "k_ptr": k, "cos_ptr": cos, "sin_ptr": sin, "q_out_ptr": outputs[0], "k_out_ptr": outputs[1]}
    sizes = {"seq": seq, "blocks": blocks, "q_heads": q_heads, "k_heads": k_heads}
    strides = {}
    for name, x in (("q", q), ("k", k)):
        strides |= {f"{name}_{dim}_stride": x.stride(i) for i, dim in enumerate(("batch", "seq", "head"))}
    for name, x in (("cos", cos), ("sin", sin)):
        strides |= {f"{name}_batch_stride": x.stride(0) if x.ndim == 4 else 0, f"{name}_seq_stride": x.stride(-3)}
    constants = {"HALF": head_dim // 2, "BLOCK": block, "Q_PACK": q_pack, "K_PACK": k_pack, "BACKWARD": backward}
    return Launch(_rope_kernel, batch * seq * blocks, {**tensors, **sizes, **strides}, constants, row.warps)


# ---- with Triton and with torch ----


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    outputs = _fake_rotate(q, k, cos, sin, backward)
    inputs = (_reachable(q), _reachable(k), _reachable(cos), _reachable(sin))
    make_launch(device_of(q, "rope"), inputs, outputs, backward).run()
    return outputs


def _reachable(x: Tensor) -> Tensor:
    # Offsets inside a token are 32-bit, and the last dimension is read in vectors.
    return x if x.stride(-1) == 1 and x.size(-2) * x.stride(-2) < 2**31 else x.contiguous()


def _rotate_cpu(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    q, k = rope_torch(q, k, cos, -sin if backward else sin)
    return q.contiguous(), k.contiguous()


def _rotate_torch(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = wide(x).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


# ---- the op ----


def _fake_rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _shardings(q: Any, k: Any, cos: Any, sin: Any, backward: bool) -> list[Sharding]:
    from torch.distributed.tensor import Replicate, Shard

    # By batch, sequence and heads: the angles have a sequence, perhaps a batch, and no heads.
    by_batch = Shard(0) if cos.ndim == 4 else Replicate()
    angles = {Replicate(): Replicate(), Shard(0): by_batch, Shard(1): Shard(cos.ndim - 3), Shard(2): Replicate()}
    return [([heads, heads], [heads, heads, angle, angle, None]) for heads, angle in angles.items()]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, ctx.backward = inputs
    ctx.save_for_backward(cos, sin)


def _propagate(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Any, ...]:
    return *_rope(dq, dk, *ctx.saved_tensors, not ctx.backward), None, None, None


_rope = define("rope", _rotate, _rotate_cpu, _fake_rotate, _shardings)
_rope.register_autograd(_propagate, setup_context=_save)
