"""The custom ops on a CPU, where torch computes: autograd, torch.compile, fake tensors, checkpointing, DTensors."""

import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_python
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import triton_kernels as kernels
from triton_kernels import implementation

EPS = 1e-5
OPERATIONS = ("rms_norm", "add_rms_norm", "swiglu", "swiglu_packed", "rope")


def arguments(operation: str, dtype: torch.dtype = torch.float32, grad: bool = True) -> list[Any]:
    """Small valid arguments: differentiable tensors first."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_(grad)

    angle = torch.randn(4, 1, 3, generator=generator)
    return {
        "rms_norm": lambda: [draw(2, 4, 6), draw(6), EPS],
        "add_rms_norm": lambda: [draw(2, 4, 6), draw(2, 4, 6), draw(6), EPS],
        "swiglu": lambda: [draw(2, 4, 6), draw(2, 4, 6)],
        "swiglu_packed": lambda: [draw(2, 4, 6)],
        "rope": lambda: [draw(2, 4, 4, 6), draw(2, 4, 2, 6), angle.cos(), angle.sin()],
    }[operation]()


def tensors(values: Any) -> list[Tensor]:
    """Of one result or several."""
    return [values] if isinstance(values, Tensor) else list(values)


def differentiable(given: list[Any]) -> list[Tensor]:
    """The arguments that get gradients."""
    return [x for x in given if isinstance(x, Tensor) and x.requires_grad]


def with_gradients(function: Callable[..., Any], given: list[Any]) -> list[Tensor]:
    """Results, and gradients of their sum of squares."""
    results = tensors(function(*given))
    loss = sum(y.float().square().sum() for y in results)
    return [*(y.detach() for y in results), *torch.autograd.grad(loss, differentiable(given))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_op_equals_plain_torch(operation: str, dtype: torch.dtype) -> None:
    given = arguments(operation, dtype)
    ours = with_gradients(getattr(kernels, operation), given)
    plain = with_gradients(getattr(kernels, f"{operation}_torch"), given)
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=8 * torch.finfo(dtype).eps, rtol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("casting", ["llama", "float32"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradients_by_differences(operation: str, casting: str) -> None:
    extra = [casting] if "norm" in operation else []
    given = [*arguments(operation, torch.float64), *extra]
    for function in (getattr(kernels, operation), getattr(kernels, f"{operation}_torch")):
        assert torch.autograd.gradcheck(function, given)
    # Only the plain torch functions, and rope, can be differentiated twice.
    assert torch.autograd.gradgradcheck(getattr(kernels, f"{operation}_torch"), given)


@pytest.mark.parametrize("operation", ["rms_norm", "add_rms_norm", "swiglu", "swiglu_packed"])
def test_second_derivative_is_an_error(operation: str) -> None:
    given = arguments(operation)
    y = tensors(getattr(kernels, operation)(*given))[0]
    (gradient,) = torch.autograd.grad(y.square().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


OPS = {
    "rms_norm": lambda: (*arguments("rms_norm"), True),
    "add_rms_norm": lambda: (*arguments("add_rms_norm"), True),
    "swiglu": lambda: tuple(arguments("swiglu")),
    "swiglu_packed": lambda: tuple(arguments("swiglu_packed")),
    "rope": lambda: (*arguments("rope"), False),
    "rms_norm_backward": lambda: (torch.randn(2, 6), torch.randn(2, 6), torch.randn(6), torch.rand(2), True),
    "add_rms_norm_backward": lambda: (*torch.randn(3, 2, 6), torch.randn(6), torch.rand(2), False),
    "swiglu_backward": lambda: tuple(torch.randn(3, 2, 6)),
    "swiglu_packed_backward": lambda: (torch.randn(2, 3), torch.randn(2, 6)),
}


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.triton_kernels, name).default, OPS[name]())


@pytest.mark.parametrize("operation", OPERATIONS)
def test_fake_tensors_have_the_real_layout(operation: str) -> None:
    given = [
        x.transpose(0, 1) if isinstance(x, Tensor) and x.ndim == 3 else x for x in arguments(operation, grad=False)
    ]
    if operation == "rope":
        given = arguments(operation, grad=False)
        given[:2] = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given[:2]]
    real = tensors(getattr(kernels, operation)(*given))
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in given]
        fake = tensors(getattr(kernels, operation)(*fakes))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()) and a.is_contiguous()


def layer(x: Tensor, residual: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Something like a block, with every operation in it."""
    y = kernels.rms_norm(x, weight, EPS)
    q, k = kernels.rope(y.unflatten(-1, (2, -1)), y.unflatten(-1, (2, -1)), cos, sin)
    y, residual = kernels.add_rms_norm(q.flatten(2) @ torch.ones(8, 8), residual + k.flatten(2), weight, EPS)
    return kernels.swiglu(y, residual) + kernels.swiglu_packed(torch.cat((y, residual), dim=-1))


def layer_inputs() -> list[Tensor]:
    """Arguments of `layer`."""
    generator = torch.Generator().manual_seed(1)
    x, residual, weight = (torch.randn(s, generator=generator).requires_grad_() for s in ((2, 3, 8), (2, 3, 8), (8,)))
    angle = torch.randn(3, 1, 2, generator=generator)
    return [x, residual, weight, angle.cos(), angle.sin()]


def test_compiled_as_one_graph() -> None:
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for a, b in zip(with_gradients(compiled, layer_inputs()), with_gradients(layer, layer_inputs()), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_compiled_by_inductor() -> None:
    compiled = torch.compile(layer, fullgraph=True)
    for a, b in zip(with_gradients(compiled, layer_inputs()), with_gradients(layer, layer_inputs()), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")])
def test_selective_checkpointing(wrap: Callable[..., Any]) -> None:
    asked: list[str] = []

    def policy(_: Any, operator: Any, *__: Any, **___: Any) -> CheckpointPolicy:
        asked.append(str(operator))
        keep = operator == torch.ops.aten.mm.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def recomputed(*given: Tensor) -> Tensor:
        return checkpoint(
            layer, *given, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, policy)
        )

    ours = with_gradients(wrap(recomputed), layer_inputs())
    for a, b in zip(ours, with_gradients(layer, layer_inputs()), strict=True):
        torch.testing.assert_close(a, b)
    # The policy has a say over each of them.
    assert wrap(layer) is not layer or {f"triton_kernels.{name}.default" for name in OPERATIONS} <= set(asked)


# ---- DTensors: two ranks simulated in this process ----


@pytest.fixture
def mesh() -> Iterator[Any]:
    """A mesh of two ranks, for use under LocalTensorMode(2)."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield init_device_mesh("cpu", (2,))
    finally:
        dist.destroy_process_group()


# Operation, dimension in which each differentiable argument is sharded (None: replicated), of the angles likewise.
LAYOUTS = {
    "norm of a sequence shard": ("rms_norm", [1, None]),
    "norm of head shards": ("rms_norm", [0, None]),
    "add norm of a sequence shard": ("add_rms_norm", [1, 1, None]),
    "swiglu by columns": ("swiglu", [2, 2]),
    "swiglu by sequence": ("swiglu", [1, 1]),
    "packed swiglu by sequence": ("swiglu_packed", [1]),
    "rope by heads": ("rope", [2, 2, None, None]),
    "rope by sequence": ("rope", [1, 1, 0, 0]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtensors_need_no_communication(mesh: Any, layout: str) -> None:
    from torch.distributed._local_tensor import LocalTensorMode
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    operation, dims = LAYOUTS[layout]
    given = arguments(operation)
    function = getattr(kernels, operation)
    expected = with_gradients(function, given)
    placements = [[Replicate() if dim is None else Shard(dim)] for dim in dims]
    with LocalTensorMode(2):
        shards = [
            distribute_tensor(x.detach(), mesh, placement).requires_grad_(x.requires_grad)
            for x, placement in zip(given, placements, strict=False)
        ]
        with CommDebugMode() as communication:
            results = tensors(function(*shards, *given[len(shards) :]))
            gradients = torch.autograd.grad(results, differentiable(shards), [2 * y.detach() for y in results])
        whole = [x.detach().full_tensor().reconcile() for x in (*results, *gradients)]
    assert communication.get_total_counts() == 0
    assert all(y.placements == (placements[0][0],) for y in results)
    for ours, wanted in zip(whole, expected, strict=True):
        torch.testing.assert_close(ours, wanted)


# ---- choosing, refusing ----


def test_choose_on_a_cpu() -> None:
    assert kernels.choose("auto", "cpu", "rms_norm") == kernels.choose("torch", "cpu", "rope") == "torch"
    with pytest.raises(ValueError, match='swiglu = "triton": .*"auto" would run torch here'):
        kernels.choose("triton", "cpu", "swiglu")
    with pytest.raises(ValueError, match='rope = "cuda": use one of auto, triton, torch'):
        kernels.choose("cuda", "cpu", "rope")
    with pytest.raises(ValueError, match="softmax: no such operation; there are rms_norm"):
        kernels.choose("auto", "cpu", "softmax")
    assert "meta" in str(kernels.available("meta"))


@pytest.mark.parametrize(
    ("name", "works"),
    [("sm_75", False), ("sm_80", True), ("sm_120", True), ("gfx90a", True), ("gfx942", True), ("gfx1100", False)],
)
def test_gpus(monkeypatch: pytest.MonkeyPatch, name: str, works: bool) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(implementation, "target", lambda device: name)
    monkeypatch.setattr(implementation, "has_compiler", lambda: True)
    problem = kernels.available("cuda")
    assert (problem is None) == works and (works or name in str(problem))
    assert kernels.choose("auto", "cuda", "rms_norm") == ("triton" if works else "torch")


def test_a_gpu_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(implementation, "target", lambda device: "sm_90")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert kernels.available("cuda") == "Triton finds no C compiler (install gcc, or set CC)"
    assert kernels.choose("auto", "cuda", "swiglu") == "torch"
    monkeypatch.setenv("CC", sys.executable)
    assert kernels.available("cuda") is None


def test_a_gpu_without_a_driver() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    with pytest.raises(ValueError, match=r'rms_norm = "triton": .*"auto" would run torch here'):
        kernels.choose("triton", "cuda", "rms_norm")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: kernels.rms_norm(torch.ones(2, 8), torch.ones(4), EPS), ["rms_norm", "(2, 8)", "(4,)"]),
        (lambda: kernels.rms_norm(torch.ones(2, 8), torch.ones(8), EPS, "half"), ["rms_norm", '"half"', "llama"]),
        (
            lambda: kernels.add_rms_norm(torch.ones(2, 8), torch.ones(1, 8), torch.ones(8), EPS),
            ["add_rms_norm", "(2, 8)", "(1, 8)"],
        ),
        (lambda: kernels.swiglu(torch.ones(2, 8), torch.ones(2, 4)), ["swiglu", "(2, 8)", "(2, 4)"]),
        (lambda: kernels.swiglu(torch.ones(2), torch.ones(2).half()), ["swiglu", "float32", "float16"]),
        (lambda: kernels.swiglu_packed(torch.ones(2, 7)), ["swiglu_packed", "(2, 7)"]),
        (lambda: kernels.rope(*[torch.ones(1, 2, 1, 7)] * 2, *[torch.ones(2, 1, 3)] * 2), ["rope", "even head_dim"]),
        (lambda: kernels.rope(*[torch.ones(1, 2, 1, 8)] * 2, *[torch.ones(3, 1, 4)] * 2), ["rope", "(3, 1, 4)"]),
    ],
)
def test_mismatches(call: Callable[[], Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_without_triton_torch_computes() -> None:
    done = run_python(
        "-c",
        "import sys; sys.modules['triton'] = None\n"
        "import torch, triton_kernels as kernels\n"
        "x = torch.ones(2, 8, requires_grad=True)\n"
        "kernels.rms_norm(x, torch.ones(8), 1e-5).sum().backward()\n"
        "assert kernels.choose('auto', 'cuda', 'rope') == 'torch'\n"
        "print(kernels.available('cuda'))",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Triton cannot be imported")


def test_import_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = run_python("-W", "error::UserWarning", "-c", "import triton_kernels")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
