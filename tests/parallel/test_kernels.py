"""The choice of kernels: what is said, what is refused, and a model that runs on what was put into it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from titanling.config.schema import Kernels
from titanling.errors import UserError
from titanling.model.llama import Llama
from titanling.model.presets import LlamaShape
from titanling.parallel.degrees import Degrees
from titanling.parallel.kernels import EXCHANGED, KernelChoice
from titanling.parallel.mesh import World
from triton_kernels import implementation

CPU, GPU = torch.device("cpu"), torch.device("cuda")
WORLD = World(0, 1, CPU, Degrees(), None, None)
SHAPE = LlamaShape(
    dim=16,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    ffn_dim=32,
    vocab_size=50,
    head_dim=4,
    qk_norm=True,
    tie_embeddings=True,
)


@contextmanager
def h100() -> Iterator[None]:
    """In here, the machine seems to have one."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(implementation, "target", lambda device: "sm_90")
        patch.setattr(implementation, "has_compiler", lambda: True)
        yield


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "rms_norm, add_rms_norm, swiglu, rope, linear_cross_entropy in Triton"),
        ({"implementation": "triton"}, "rms_norm, add_rms_norm, swiglu, rope, linear_cross_entropy in Triton"),
        (
            {"implementation": "torch", "rope": "auto"},
            "rope in Triton; rms_norm, add_rms_norm, swiglu, linear_cross_entropy in torch",
        ),
        ({"swiglu": "torch"}, "rms_norm, add_rms_norm, rope, linear_cross_entropy in Triton; swiglu in torch"),
    ],
)
def test_what_is_said_on_a_gpu(settings: dict[str, Any], said: str) -> None:
    with h100():
        choice = KernelChoice(Kernels(**settings), GPU, SHAPE)
        choice.check(GPU)
        assert choice.describe() == said


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"implementation": "triton"}, 'kernels.implementation = "triton": rms_norm: Triton'),
        ({"rope": "triton"}, 'kernels.rope = "triton": Triton'),
        ({"linear_cross_entropy": "triton"}, 'kernels.linear_cross_entropy = "triton": Triton'),
    ],
)
def test_what_is_refused_on_a_cpu(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        KernelChoice(Kernels(**settings), CPU, SHAPE).check(CPU)
    assert str(error.value).startswith(says) and str(error.value).endswith('; "auto" would run torch here')
    assert (
        KernelChoice(Kernels(), CPU, SHAPE).describe()
        == "rms_norm, add_rms_norm, swiglu, rope, linear_cross_entropy in torch"
    )


def test_models_too_large_for_a_kernel() -> None:
    large = replace(SHAPE, dim=16384 + 64, head_dim=1026)
    says = 'kernels.rope = "triton": the kernel takes up to 1024 elements, not 1026; "auto" would run torch here'
    with h100():
        said = KernelChoice(Kernels(), GPU, large).describe()
        with pytest.raises(UserError, match=says):
            KernelChoice(Kernels(rope="triton"), GPU, large).check(GPU)
    assert said == "swiglu, linear_cross_entropy in Triton; rms_norm, add_rms_norm, rope in torch"


def exchanged(model: nn.Module) -> set[tuple[str, str]]:
    """(attribute, class of the module) of every kernel that a model calls."""
    return {
        (name, type(module).__name__)
        for module in model.modules()
        for name, kernel in EXCHANGED.items()
        if vars(module).get(name) is kernel
    }


def test_every_call_is_exchanged_that_was_asked_for() -> None:
    model = Llama(SHAPE)
    with h100():
        KernelChoice(Kernels(rope="torch"), GPU, SHAPE).apply(model, WORLD)
    assert exchanged(model) == {("rms_norm", "RMSNorm"), ("add_rms_norm", "AddRMSNorm"), ("swiglu", "MLP")}
    model = Llama(SHAPE)
    KernelChoice(Kernels(), CPU, SHAPE).apply(model, WORLD)
    assert exchanged(model) == set()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_the_model_computes_the_same(dtype: torch.dtype, tolerance: float, compiled: bool) -> None:
    """On a CPU, the ops behind the kernels compute in torch."""
    results = []
    for settings in (Kernels(implementation="torch"), Kernels()):
        torch.manual_seed(0)
        model = Llama(SHAPE).to(dtype)
        with h100():
            KernelChoice(settings, GPU, SHAPE).apply(model, WORLD)
        if compiled:
            for block in model.model.layers.values():
                block.compile(fullgraph=True, dynamic=False, backend="aot_eager")  # as the plan does
        loss = model(torch.arange(24).view(2, 12)).float().logsumexp(-1).sum()
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    assert len(exchanged(model)) == len(EXCHANGED)
    for plain, other in zip(*results, strict=True):
        assert (plain.float() - other.float()).norm() <= tolerance * plain.float().norm()
