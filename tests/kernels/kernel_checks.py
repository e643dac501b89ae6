"""What holds of the Triton kernels on any device: compared with float64, at awkward sizes, strides and inputs.

On a GPU: KERNEL_DEVICE=cuda python -m pytest --noconftest -c /dev/null tests/kernels/kernel_checks.py
On a CPU the interpreter runs the kernels: test_interpreter.py starts this file with TRITON_INTERPRET=1. It needs
torch, Triton, pytest and hypothesis only.
"""

import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import triton_kernels as kernels
from triton_kernels.language import INTERPRETED
from triton_kernels.launch import device_of, row_for

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS refuses to be deterministic
DEVICE = torch.device(os.environ.get("KERNEL_DEVICE", "cpu"))
EPS = 1e-5
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (FP32, BF16, FP16)
# Rounding of the result, plus what is lost before it (in the float32 sums, or in x̂ under Llama's casting).
TOLERANCE = {FP32: 2e-6, BF16: 2**-7, FP16: 2**-10}

settings.register_profile(
    "kernels", deadline=None, max_examples=8, suppress_health_check=list(HealthCheck), derandomize=True
)
settings.load_profile("kernels")
slow = pytest.mark.slow


def round_to_nearest() -> None:
    """Mend Triton's interpreter, which cuts float32 off where it should round it to bfloat16."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def rounding_cast(self: Any, source: Any, kind: Any) -> Any:
        if source.dtype.scalar != tl.float32 or kind.scalar != tl.bfloat16:
            return cast(self, source, kind)
        data = np.ascontiguousarray(source.data)
        rounded = torch.from_numpy(data).to(BF16).view(torch.int16).numpy().view(np.uint16)
        return interpreter.TensorHandle(rounded.reshape(data.shape), kind.scalar)

    interpreter.InterpreterBuilder.cast_impl = rounding_cast


if INTERPRETED:
    round_to_nearest()


@pytest.fixture(autouse=True, scope="module")
def unwritten_memory_is_nan() -> Iterator[None]:
    """So that an element that a kernel forgets is seen."""
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("highest")  # some containers of NVIDIA's allow TF32
    assert torch.empty(8, device=DEVICE).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def random(*shape: int, dtype: torch.dtype = FP32, seed: int = 0) -> Tensor:
    """Normal random numbers on the device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(result: Tensor, expected: Tensor, tolerance: float) -> None:
    """Each element within `tolerance` of its size and of the tensor's typical size. NaN is never close."""
    assert result.shape == expected.shape
    if result.numel():
        scale = expected.detach().abs() + expected.detach().square().mean().sqrt() + 1e-30
        assert float(((result.detach().double() - expected.detach()).abs() / scale).max()) <= tolerance


Function = Callable[..., Any]


def compare(function: Function, reference: Function, inputs: list[Tensor], tolerance: float) -> None:
    """Values, gradients by random dy, the same by a second backward pass, and dy left alone."""
    ours = [x.detach().requires_grad_() for x in inputs]  # strides stay
    exact = [x.detach().double().requires_grad_() for x in inputs]
    outputs, expected = function(*ours), reference(*exact)
    outputs, expected = ([y] if isinstance(y, Tensor) else list(y) for y in (outputs, expected))
    dy = [random(*y.shape, dtype=y.dtype, seed=9 + i) for i, y in enumerate(outputs)]
    before = [d.clone() for d in dy]
    first = torch.autograd.grad(outputs, ours, dy, retain_graph=True)
    second = torch.autograd.grad(outputs, ours, dy)
    gradients = torch.autograd.grad(expected, exact, [d.double() for d in dy])
    for result, wanted in zip([*outputs, *first], [*expected, *gradients], strict=True):
        close(result, wanted, tolerance)
    for one, again in zip([*first, *before], [*second, *dy], strict=True):
        assert torch.equal(one, again)
    assert all(torch.equal(y, again) for y, again in zip(outputs, _as_list(function(*ours)), strict=True))


def _as_list(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


# ---- the mathematics, in float64 and in other words than the kernels' ----


def norm_reference(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm."""
    return weight * x / (x.pow(2).sum(-1, keepdim=True) / x.size(-1) + EPS).sqrt()


def add_reference(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """RMSNorm of the sum, and the sum."""
    return norm_reference(x + residual, weight), x + residual


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU."""
    return up * gate / (1 + (-gate).exp())


def rope_reference(cos: Tensor, sin: Tensor) -> Function:
    """RoPE by complex numbers."""
    turn = torch.complex(cos.double(), sin.double())

    def rotate(x: Tensor) -> Tensor:
        half = x.size(-1) // 2
        y = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat((y.real, y.imag), dim=-1)

    return lambda q, k: (rotate(q), rotate(k))


# ---- norms ----


def programs(n: int, itemsize: int = 2) -> int:
    """How many rows of n elements the backward kernel has in hand at once on this device."""
    device = device_of(random(1), "rms_norm")
    row = row_for(device, "norm_backward", n, itemsize)
    return row.per_sm * device.processors * max(1, row.tile // n)


@pytest.mark.parametrize("rows", ["0", "1", "3", "P-1", "P", "P+1"])
@pytest.mark.parametrize("n", [64, 1000])
def test_rows(rows: str, n: int) -> None:
    m = programs(n, 4) + {"P-1": -1, "P": 0, "P+1": 1}[rows] if "P" in rows else int(rows)
    weight = random(n, seed=1)
    compare(lambda x, w: kernels.rms_norm(x, w, EPS), norm_reference, [random(m, n), weight], 5e-6)
    inputs = [random(m, n), random(m, n, seed=2), weight]
    compare(lambda x, r, w: kernels.add_rms_norm(x, r, w, EPS), add_reference, inputs, 5e-6)
    if m == 0:
        w = weight.clone().requires_grad_()
        kernels.rms_norm(random(0, n), w, EPS).sum().backward()
        assert torch.equal(w.grad, torch.zeros_like(w))


@pytest.mark.parametrize("n", [7, 96, 128, 256, 1536, 2560, 3000, 8192, 16384])
def test_hidden_sizes(n: int) -> None:
    compare(lambda x, w: kernels.rms_norm(x, w, EPS), norm_reference, [random(3, n), random(n, seed=1)], 5e-6)


@pytest.mark.parametrize("casting", ["llama", "float32"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_norms_in_16_bits(dtype: torch.dtype, casting: str) -> None:
    x, residual, weight = random(2, 3, 640, dtype=dtype), random(2, 3, 640, dtype=dtype, seed=1), random(640, seed=2)
    for w in (weight, weight.to(dtype)):
        compare(lambda x, w: kernels.rms_norm(x, w, EPS, casting), norm_reference, [x, w], TOLERANCE[dtype] * 1.5)
        compare(
            lambda x, r, w: kernels.add_rms_norm(x, r, w, EPS, casting),
            add_reference,
            [x, residual, w],
            TOLERANCE[dtype] * 3,  # the sum is rounded before it is normed
        )
        # And what torch computes with the same casting.
        y = kernels.rms_norm(x, w, EPS, casting)
        close(y, kernels.rms_norm_torch(x, w, EPS, casting).double(), TOLERANCE[dtype])


def test_castings_differ_as_documented() -> None:
    x, weight = random(4, 256, dtype=BF16), random(256, dtype=BF16, seed=1)
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)
    expected = {"llama": normed.to(BF16) * weight, "float32": (normed * weight.float()).to(BF16)}
    for casting, y in expected.items():
        # Summed in another order, a few elements in a thousand may round the other way.
        assert (kernels.rms_norm(x, weight, EPS, casting) == y).float().mean() >= 0.99
    assert (expected["llama"] == expected["float32"]).float().mean() < 0.9


def strided(kind: str, m: int, n: int, dtype: torch.dtype, seed: int) -> Tensor:
    """(m, n) that is not contiguous."""
    return {
        "rows apart": lambda: random(m, n + 24, dtype=dtype, seed=seed)[:, 8 : n + 8],
        "odd rows": lambda: random(m, n + 3, dtype=dtype, seed=seed)[:, 1 : n + 1],
        "transposed": lambda: random(n, m, dtype=dtype, seed=seed).t(),
        "every other": lambda: random(m, 2 * n, dtype=dtype, seed=seed)[:, ::2],
        "one row": lambda: random(1, n, dtype=dtype, seed=seed).expand(m, n),
    }[kind]()


@pytest.mark.parametrize("kind", ["rows apart", "odd rows", "transposed", "every other", "one row"])
def test_not_contiguous(kind: str) -> None:
    for n in (96, 320):
        x, residual = strided(kind, 5, n, FP32, 0), strided(kind, 5, n, FP32, 1)
        compare(lambda x, w: kernels.rms_norm(x, w, EPS), norm_reference, [x, random(2 * n)[::2]], 5e-6)
        inputs = [x, residual, random(n)]
        compare(lambda x, r, w: kernels.add_rms_norm(x, r, w, EPS), add_reference, inputs, 5e-6)
        compare(kernels.swiglu, swiglu_reference, [x, residual], 2e-6)
        x = x.reshape(5, 2, n // 2).transpose(0, 1)
        compare(lambda x, w: kernels.rms_norm(x, w, EPS), norm_reference, [x, random(n // 2)], 5e-6)
    # A gradient that has another layout than the output.
    x, w = random(4, 96).requires_grad_(), random(96, seed=1)
    dy = strided(kind, 4, 96, FP32, 2)
    (ours,) = torch.autograd.grad(kernels.rms_norm(x, w, EPS), x, dy)
    (plain,) = torch.autograd.grad(kernels.rms_norm_torch(x, w, EPS), x, dy)
    close(ours, plain.double(), 5e-6)


@slow
@pytest.mark.parametrize("n", [64, 1536])
def test_more_than_2_to_the_31_elements_apart(n: int) -> None:
    # On a CPU, memory that is never touched is never there: four rows take a page or two each.
    room = torch.empty(0, dtype=FP16, device=DEVICE)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        x = room.new_empty(3 * 2**30 + n).as_strided((4, n), (2**30, 1))
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    near = random(4, n, dtype=FP16)
    x.copy_(near)
    weight, dy = random(n, dtype=FP16, seed=1), random(4, n, dtype=FP16, seed=2)
    # Rows so far apart are taken one by one, others packed, and so their squares are added up in another order.
    norm, gated = (lambda x: kernels.rms_norm(x, weight, EPS), 2**-9), (lambda x: kernels.swiglu(x, x), 0.0)
    for function, tolerance in (norm, gated):
        results = []
        for source in (x, near):
            leaf = source.detach().requires_grad_()
            y = function(leaf)
            # The gradient of a leaf is asked for without accumulation, so it is dense.
            results.append((y, *torch.autograd.grad(y, leaf, dy)))
        for far, close_by in zip(*results, strict=True):
            close(far, close_by.double(), tolerance)
    heads = n // 32
    q, near_q = x.view(4, 1, heads, 32), near.view(4, 1, heads, 32)
    angle = random(1, 1, 16)
    turned = kernels.rope(q, q, angle.cos(), angle.sin())
    assert torch.equal(turned[0], kernels.rope(near_q, near_q, angle.cos(), angle.sin())[1])
    labels, by_triton = torch.arange(4, device=DEVICE), kernels.LossOptions(by="triton")
    losses = [kernels.cross_entropy(logits.requires_grad_(), labels, by_triton) for logits in (x, near)]
    assert torch.equal(*losses) and torch.equal(x, near), "logits, or what has overwritten them"


# ---- SwiGLU ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (3, 100), (2, 3, 2048), (3, 2500)])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate, up = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    compare(kernels.swiglu, swiglu_reference, [gate, up], TOLERANCE[dtype])
    both = torch.cat((gate, up), dim=-1)
    compare(kernels.swiglu_packed, lambda x: swiglu_reference(*x.chunk(2, dim=-1)), [both], TOLERANCE[dtype])
    assert torch.equal(kernels.swiglu_packed(both), kernels.swiglu(gate, up))


def test_swiglu_of_large_gates() -> None:
    gate = torch.tensor([-1e4, -200.0, -30.0, 0.0, 30.0, 200.0, 1e4], device=DEVICE).requires_grad_()
    y = kernels.swiglu(gate, torch.ones_like(gate))
    (gradient,) = torch.autograd.grad(y.sum(), gate)
    assert y.isfinite().all() and gradient.isfinite().all()
    assert torch.equal(y[4:], gate[4:]) and torch.equal(gradient[-2:], torch.ones_like(gradient[-2:]))


# ---- RoPE ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(1, 1, 64), (4, 2, 128), (5, 3, 80), (3, 3, 6), (40, 8, 128), (7, 1, 2), (2, 1, 96)],
)
def test_rope(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    q, k = random(2, 3, heads, head_dim, dtype=dtype), random(2, 3, kv_heads, head_dim, dtype=dtype, seed=1)
    for angles in (random(3, 1, head_dim // 2), random(2, 3, 1, head_dim // 2)):
        cos, sin = angles.cos(), angles.sin()
        compare(lambda q, k: kernels.rope(q, k, cos, sin), rope_reference(cos, sin), [q, k], TOLERANCE[dtype])  # noqa: B023


def test_rope_of_views() -> None:
    # q and k out of one tensor, angles out of a longer table, gradients as attention returns them.
    both = random(2, 5, 6, 48).transpose(0, 1)  # (seq, batch, …) in memory
    table = random(20, 1, 48).cos()
    cos, sin = table[3:8:1, :, :24], table[8:13, :, 24:]
    both = both.transpose(0, 1)
    compare(lambda q, k: kernels.rope(q, k, cos, sin), rope_reference(cos, sin), [both[:, :, :4], both[:, :, 4:]], 2e-6)
    q, k = random(2, 5, 4, 48).requires_grad_(), random(2, 5, 2, 48)
    y = kernels.rope(q, k, cos, sin)[0]
    dy = random(2, 4, 5, 48, seed=3).transpose(1, 2)
    (ours,) = torch.autograd.grad(y, q, dy)
    (dense,) = torch.autograd.grad(kernels.rope(q, k, cos, sin)[0], q, dy.contiguous())
    assert torch.equal(ours, dense)


# ---- cross-entropy ----


def loss_reference(logits: Tensor, labels: Tensor, options: kernels.LossOptions) -> Tensor:
    """The loss by torch's own functions."""
    loss = torch.nn.functional.cross_entropy(
        logits, labels, reduction="sum", label_smoothing=options.label_smoothing, ignore_index=-100
    )
    return loss + options.z_loss * logits.logsumexp(-1).square()[labels != -100].sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), [(0, 8), (1, 2), (3, 7), (5, 1000), (4, 4097), (2, 9000)])
def test_cross_entropy(rows: int, vocab: int, dtype: torch.dtype) -> None:
    labels = torch.arange(rows, device=DEVICE) * 37 % vocab
    labels[1::3] = -100
    for smoothing, z in ((0.0, 0.0), (0.1, 0.0), (0.0, 0.01), (0.2, 0.01)):
        options = kernels.LossOptions(smoothing, z, by="triton")
        logits = random(rows, vocab + 8, dtype=dtype)[:, :vocab] * 3
        apart = torch.cat((logits, logits), dim=1)[:, :vocab]  # its rows do not lie side by side
        exact = logits.detach().double().requires_grad_()
        wanted = loss_reference(exact, labels, options)
        gradient = torch.autograd.grad(wanted, exact)[0]
        tolerance = 1e-5 * (1 + wanted.item())  # of lse less a logit, where all but little may cancel
        for x in (logits.clone(), apart):
            before = x.clone()
            with torch.no_grad():
                assert abs(kernels.cross_entropy(x, labels, options).item() - wanted.item()) <= tolerance
            assert torch.equal(x, before), "without a gradient the logits stay"
            x.requires_grad_()
            loss = kernels.cross_entropy(x, labels, options)
            assert abs(loss.item() - wanted.item()) <= tolerance
            close(torch.autograd.grad(loss, x)[0], gradient, TOLERANCE[dtype] * 3)


def test_cross_entropy_of_large_logits() -> None:
    labels = torch.tensor([0, 2], device=DEVICE)
    x = torch.tensor([[1e4, -1e4, -torch.inf], [-3e38, 0.0, 3e38]], device=DEVICE).requires_grad_()
    loss = kernels.cross_entropy(x, labels, kernels.LossOptions(by="triton"))
    assert loss.item() == 0 and torch.equal(torch.autograd.grad(loss, x)[0], torch.zeros(2, 3, device=DEVICE))
    # More impossible ids than a program takes at once, before the first that is possible.
    x = torch.cat((torch.full((1, 9000), -torch.inf), torch.zeros(1, 4)), dim=1).to(DEVICE).requires_grad_()
    loss = kernels.cross_entropy(x, labels[:1] + 9000, kernels.LossOptions(by="triton"))
    assert loss.item() == pytest.approx(math.log(4), rel=1e-6)
    assert torch.autograd.grad(loss, x)[0][0, -5:].tolist() == [0, -0.75, 0.25, 0.25, 0.25]


class Part:
    """A shard of a vocabulary, ids from `first` on, that is told what the rank with all other logits would add."""

    def __init__(self, first: int, total: int, other: Tensor, other_labels: Tensor) -> None:
        self.first, self.total, self.largest = first, total, total
        self.other, self.labels = other, other_labels

    def max_(self, values: Tensor) -> Tensor:
        self.top = torch.maximum(values, self.other.amax(1, keepdim=True))
        return self.top

    def sum_(self, values: Tensor) -> Tensor:
        there = (self.labels >= 0) & (self.labels < self.other.size(1))
        picked = self.other.gather(1, self.labels.where(there, 0)[:, None]) * there[:, None]
        more = [(self.other - self.top).exp().sum(1, keepdim=True), picked, self.other.sum(1, keepdim=True)]
        return values + torch.stack(more[: len(values)])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_of_a_divided_vocabulary(smoothing: float) -> None:
    logits, labels = random(4, 1000) * 3, torch.tensor([3, 999, -100, 600], device=DEVICE)
    logits[1, 600:] -= 200  # nothing that counts beside this row's first part
    exact = logits.double().requires_grad_()
    wanted = loss_reference(exact, labels, kernels.LossOptions(smoothing, 0.01))
    gradient = torch.autograd.grad(wanted, exact)[0].split((600, 400), dim=1)
    parts = logits.split((600, 400), dim=1)
    for index, first in enumerate((0, 600)):
        shard = Part(first, 1000, parts[1 - index], labels - (600 - first))
        x = parts[index].clone().requires_grad_()
        loss = kernels.cross_entropy(x, labels, kernels.LossOptions(smoothing, 0.01, shard, "triton"))  # type: ignore[arg-type]
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
        close(torch.autograd.grad(loss, x)[0], gradient[index], 1e-5)


# ---- properties ----

seeds = st.integers(0, 10**6)


@given(seed=seeds, power=st.integers(-6, 6), n=st.integers(2, 300))
def test_norm_does_not_see_scale(seed: int, power: int, n: int) -> None:
    x, w = random(3, n, seed=seed), random(n, seed=seed + 1)
    assert torch.equal(kernels.rms_norm(x * 2.0**power, w, 0.0), kernels.rms_norm(x, w, 0.0))


@given(seed=seeds, n=st.integers(2, 300))
def test_gradient_of_norm_is_orthogonal_to_its_input(seed: int, n: int) -> None:
    x, w, dy = random(3, n, seed=seed).requires_grad_(), random(n, seed=seed + 1), random(3, n, seed=seed + 2)
    (dx,) = torch.autograd.grad(kernels.rms_norm(x, w, 0.0), x, dy)
    lengths = x.detach().norm(dim=-1) * dy.norm(dim=-1)
    assert ((x * dx).sum(-1).abs() <= 1e-5 * lengths * w.abs().max()).all()


@given(seed=seeds, n=st.integers(1, 200), rows=st.integers(2, 40), split=st.data())
def test_gradient_of_the_weight_adds_up(seed: int, n: int, rows: int, split: st.DataObject) -> None:
    x, dy, w = random(rows, n, seed=seed), random(rows, n, seed=seed + 1), random(n, seed=seed + 2).requires_grad_()
    cut = split.draw(st.integers(1, rows - 1))

    def gradient(part: slice) -> Tensor:
        return torch.autograd.grad(kernels.rms_norm(x[part], w, EPS), w, dy[part])[0]

    close(gradient(slice(0, cut)) + gradient(slice(cut, rows)), gradient(slice(0, rows)).double(), 1e-5)


@given(seed=seeds, shape=st.tuples(st.integers(1, 4), st.integers(1, 300)), dtype=st.sampled_from(DTYPES))
def test_add_norm_is_add_then_norm(seed: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual = random(*shape, dtype=dtype, seed=seed), random(*shape, dtype=dtype, seed=seed + 1)
    w = random(shape[1], dtype=dtype, seed=seed + 2)
    y, total = kernels.add_rms_norm(x, residual, w, EPS)
    assert torch.equal(total, x + residual) and torch.equal(y, kernels.rms_norm(total, w, EPS))


@given(seed=seeds, shape=st.tuples(st.integers(1, 4), st.integers(1, 300)), factor=st.sampled_from([-2.0, 0.5, 4.0]))
def test_swiglu_is_linear_in_up(seed: int, shape: tuple[int, int], factor: float) -> None:
    gate, a, b = (random(*shape, seed=seed + i) for i in range(3))
    assert torch.equal(kernels.swiglu(gate, factor * a), factor * kernels.swiglu(gate, a))
    separate = kernels.swiglu(gate, a).double() + kernels.swiglu(gate, b).double()
    assert ((kernels.swiglu(gate, a + b) - separate).abs() <= 1e-6 * gate.abs() * (a.abs() + b.abs())).all()


@given(seed=seeds, head_dim=st.integers(1, 40), heads=st.integers(1, 5), shift=st.integers(0, 50))
def test_rope_keeps_lengths_and_sees_distances_only(seed: int, head_dim: int, heads: int, shift: int) -> None:
    q, k = random(1, 2, heads, 2 * head_dim, seed=seed), random(1, 2, heads, 2 * head_dim, seed=seed + 1)
    frequency = random(head_dim, seed=seed + 2).abs()

    def scores(start: int) -> Tensor:
        angles = (torch.arange(start, start + 2, device=DEVICE)[:, None, None] * frequency).float()
        turned = kernels.rope(q, k, angles.cos(), angles.sin())
        close(turned[0].norm(dim=-1), q.norm(dim=-1).double(), 1e-5)
        return (turned[0][:, 0] * turned[1][:, 1]).sum(-1)

    size = q[:, 0].norm(dim=-1) * k[:, 1].norm(dim=-1)
    assert ((scores(0) - scores(shift)).abs() <= 1e-4 * size).all()


# ---- what the kernels refuse ----


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: kernels.rms_norm(random(2, 8).double(), random(8), EPS), ["rms_norm", "float64", "rms_norm_torch"]),
        (lambda: kernels.rms_norm(random(2, 8), random(8).double(), EPS), ["rms_norm", "float64", "rms_norm_torch"]),
        (lambda: kernels.rms_norm(random(1, 16385), random(16385), EPS), ["rms_norm", "16384", "16385", "_torch"]),
        (
            lambda: kernels.add_rms_norm(random(1, 16385), random(1, 16385), random(16385), EPS),
            ["add_rms_norm", "16385", "add_rms_norm_torch"],
        ),
        (
            lambda: kernels.cross_entropy(
                random(1, 4).double(),
                torch.zeros(1, dtype=torch.int64, device=DEVICE),
                kernels.LossOptions(by="triton"),
            ),
            ["cross_entropy", "float64", 'by = "torch"'],
        ),
        (lambda: kernels.swiglu(random(2).int(), random(2).int()), ["swiglu", "int32", "swiglu_torch"]),
        (lambda: kernels.swiglu_packed(random(2).double()), ["swiglu_packed", "float64", "swiglu_packed_torch"]),
        (
            lambda: kernels.rope(*[random(1, 1, 1, 2048)] * 2, *[random(1, 1, 1024)] * 2),
            ["rope", "1024", "2048", "rope_torch"],
        ),
        (
            lambda: kernels.rope(random(1, 1, 1, 4), random(1, 1, 1, 4, dtype=BF16), *[random(1, 1, 2)] * 2),
            ["rope", "bfloat16", "rope_torch"],
        ),
    ],
)
def test_refused(call: Callable[[], Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


# ---- linear cross-entropy: products and sums of another kind on each device ----


@pytest.mark.parametrize(("dtype", "tolerance"), [(FP32, 1e-5), (BF16, 2**-6), (FP16, 2**-9)])
def test_linear_cross_entropy(dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight = random(300, 64, dtype=dtype), (random(1000, 64, seed=1) / 8).to(dtype)
    labels = torch.arange(300, device=DEVICE).where(random(300) > -1, -100)
    results, exact = [], [x.double().requires_grad_() for x in (hidden, weight)]
    for _ in range(2):
        inputs = [hidden.clone().requires_grad_(), weight.float().requires_grad_()]
        loss = kernels.linear_cross_entropy(*inputs, labels, chunk_tokens=128)
        results.append([loss, *torch.autograd.grad(loss, inputs)])
    assert all(torch.equal(one, again) for one, again in zip(*results, strict=True))
    wanted = torch.nn.functional.cross_entropy(exact[0] @ exact[1].t(), labels, reduction="sum")
    for result, right in zip(results[0], [wanted, *torch.autograd.grad(wanted, exact)], strict=True):
        assert float((result.detach().double() - right.detach()).norm()) <= tolerance * float(right.detach().norm())
