"""The losses against float64: whole logits, then torch's own cross-entropy."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, clean_env
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from triton_kernels import LossOptions, cross_entropy, linear_cross_entropy
from triton_kernels.cross_entropy import PIECE
from triton_kernels.linear_cross_entropy import CHUNK
from triton_kernels.loss_options import IGNORE_INDEX

OPTIONS = [LossOptions(), LossOptions(z_loss=0.01), LossOptions(label_smoothing=0.1, z_loss=1e-3)]


def draw(tokens: int, dim: int, vocab: int, ignored: float = 0.2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and labels, in float64."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, dim, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, dim, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < ignored] = IGNORE_INDEX
    return hidden, weight, labels


def reference(logits: Tensor, labels: Tensor, options: LossOptions) -> Tensor:
    """The loss in float64, differentiable."""
    logits, valid = logits.double(), labels != IGNORE_INDEX
    loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=options.label_smoothing)
    return loss + options.z_loss * logits.logsumexp(-1).square()[valid].sum()


def expected(hidden: Tensor, weight: Tensor, labels: Tensor, options: LossOptions) -> list[Tensor]:
    """Loss, d_hidden and d_weight by torch."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    loss = reference(hidden @ weight.t(), labels, options)
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]


def ours(hidden: Tensor, weight: Tensor, labels: Tensor, *rest: Any) -> list[Tensor]:
    """The same by linear_cross_entropy."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, labels, *rest)
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]


def assert_close(results: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    """Each within `tolerance` of the largest element of what is wanted, or of 0.1 if that is less."""
    for result, right in zip(results, wanted, strict=True):
        assert result.shape == right.shape
        if result.numel():
            assert (result.double() - right).abs().max() <= tolerance * (right.abs().max() + 0.1)


@settings(max_examples=40, derandomize=True)
@given(
    tokens=st.integers(0, 12),
    vocab=st.integers(2, 40),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    chunk=st.sampled_from([None, 1, 2, 5, 100]),
    piece=st.integers(1, 200),
    options=st.sampled_from(OPTIONS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_chunks_give_logits_then_cross_entropy(
    tokens: int,
    vocab: int,
    ignored: float,
    chunk: int | None,
    piece: int,
    options: LossOptions,
    dtype: torch.dtype,
) -> None:
    hidden, weight, labels = draw(tokens, 6, vocab, ignored)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PIECE, "cpu", piece)
        found = ours(hidden.to(dtype), weight.to(dtype), labels, options, chunk)
    assert all(x.dtype == dtype for x in found)
    tolerance = 64 * torch.finfo(dtype).eps
    assert_close(found, expected(hidden.to(dtype), weight.to(dtype), labels, options), tolerance)


@pytest.mark.parametrize("options", OPTIONS)
def test_logits_that_exist(options: LossOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PIECE, "cpu", 3 * 40)
    hidden, weight, labels = draw(20, 6, 40)
    logits = (hidden @ weight.t()).requires_grad_()
    wanted = reference(logits, labels, options)
    (gradient,) = torch.autograd.grad(wanted, logits)
    before = logits.detach().clone()
    with torch.no_grad():
        assert cross_entropy(logits, labels, options).item() == pytest.approx(wanted.item(), rel=1e-12)
    assert torch.equal(logits, before)  # overwritten only where a gradient is due
    loss = cross_entropy(logits, labels, options)
    (3 * loss).backward()
    assert logits.grad is not None
    assert_close([loss.detach(), logits.grad], [wanted.detach(), 3 * gradient], 1e-13)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_by_differences(options: LossOptions) -> None:
    hidden, weight, labels = draw(7, 4, 9)

    class Anew(torch.autograd.Function):
        """gradcheck goes backward several times."""

        @staticmethod
        def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(hidden, weight)
            return linear_cross_entropy(hidden, weight, labels, options, 3)

        @staticmethod
        def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                again = [x.detach().requires_grad_() for x in ctx.saved_tensors]
                return torch.autograd.grad(linear_cross_entropy(*again, labels, options, 3), again, grad_loss)

    assert torch.autograd.gradcheck(Anew.apply, (hidden.requires_grad_(), weight.requires_grad_()))


def test_all_ignored() -> None:
    hidden, weight, labels = draw(5, 4, 9, ignored=1.0)
    loss, *gradients = ours(hidden, weight, labels, LossOptions(0.1, 0.1))
    assert loss == 0 and not any(gradient.any() for gradient in gradients)


def test_large_logits() -> None:
    hidden, weight = torch.ones(2, 1), torch.tensor([[1e4], [0.0], [-1e4]])
    assert linear_cross_entropy(hidden, weight, torch.tensor([0, 2])) == 2e4


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-9)])
def test_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, labels = draw(300, 32, 500)
    hidden, weight = hidden.to(dtype), (weight / 6).to(dtype)
    loss, *gradients = ours(hidden, weight, labels, LossOptions(z_loss=1e-3), 64)
    assert loss.dtype == torch.float32 and all(gradient.dtype == dtype for gradient in gradients)
    assert_close([loss, *gradients], expected(hidden, weight, labels, LossOptions(z_loss=1e-3)), tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_held_in_float32(dtype: torch.dtype) -> None:
    """Half of the products' rounding: the weight's gradient is summed and given back in float32."""
    hidden, weight, labels = draw(512, 16, 50, ignored=0)
    hidden = hidden.to(dtype)
    weight = (weight / 4).to(dtype)
    _, d_hidden, d_weight = ours(hidden, weight.float(), labels, LossOptions(), 8)
    assert (d_hidden.dtype, d_weight.dtype) == (dtype, torch.float32)
    _, _, wanted = expected(hidden, weight, labels, LossOptions())
    # 64 chunks added up in 16 bits would lose several times as much.
    assert (d_weight.double() - wanted).norm() <= torch.finfo(dtype).eps / 2 * wanted.norm()


def test_small_probabilities_survive_float16() -> None:
    """Ids of probability 2e-9 each: not a number in float16, but all together what keeps their weights in place."""
    vocab = 4096
    hidden = torch.full((256, 2), 4.0).half()
    weight = torch.full((vocab, 2), -1.5)
    weight[0] = 1.0
    labels = torch.zeros(256, dtype=torch.int64)
    found = ours(hidden, weight, labels, LossOptions(), 64)
    wanted = expected(hidden, weight, labels, LossOptions())
    assert 0 < wanted[2][1, 0] / (4 * 256) < torch.finfo(torch.float16).smallest_normal / 2**14
    small = slice(1, None)
    assert (found[2][small] / wanted[2][small] - 1).abs().max() < 1e-2


def test_large_gradients_survive_float16() -> None:
    """What is scaled up is scaled down before it is rounded."""
    hidden, weight = torch.full((64, 4), 100.0).half(), torch.full((8, 4), 30.0).half()
    weight[0] = -30
    labels = torch.zeros(64, dtype=torch.int64)
    assert_close(ours(hidden, weight, labels)[1:], expected(hidden, weight, labels, LossOptions())[1:], 2**-9)


def test_reruns_are_bit_equal() -> None:
    hidden, weight, labels = (x.float() if x.is_floating_point() else x for x in draw(100, 16, 300))
    runs = [ours(hidden, weight, labels, LossOptions(0.1, 0.1), 32) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_only_what_needs_a_gradient_gets_one() -> None:
    hidden, weight, labels = draw(10, 4, 9)
    wanted = expected(hidden, weight, labels, LossOptions())
    for index, x in enumerate((hidden, weight)):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), x)
        assert_close([gradient], [wanted[1 + index]], 1e-13)
        x.requires_grad_(False)


def test_gradients_are_had_once() -> None:
    hidden, weight, labels = draw(10, 4, 9)
    loss = linear_cross_entropy(hidden, weight.requires_grad_(), labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute it again"):
        loss.backward()


class Largest(TorchDispatchMode):
    """The most elements of a storage that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(output) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *sizes])
        return output


@pytest.mark.parametrize("gradients", [True, False])
def test_never_all_logits(gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, dim, vocab = 512, 8, 600
    hidden, weight, labels = draw(tokens, dim, vocab)
    hidden.requires_grad_()
    weight.requires_grad_()
    monkeypatch.setitem(CHUNK, "cpu", 20 * vocab)
    with Largest() as seen, torch.set_grad_enabled(gradients):
        loss = linear_cross_entropy(hidden, weight, labels)
        assert loss.requires_grad == gradients
        if gradients:
            loss.backward()
    assert seen.elements == 20 * vocab < tokens * vocab / 25


def test_without_gradients_nothing_but_the_logits_is_multiplied() -> None:
    class Products(TorchDispatchMode):
        names: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    hidden, weight, labels = draw(10, 4, 9)
    with Products() as seen, torch.no_grad():
        linear_cross_entropy(hidden, weight.requires_grad_(), labels)
    assert [name for name in seen.names if name in ("mm", "addmm", "addmm_")] == ["mm"]


RANKS = """
import sys, torch, torch.distributed as dist
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
from test_linear_cross_entropy import assert_close, draw, expected, ours, reference
from triton_kernels import LossOptions, VocabShard, cross_entropy
from triton_kernels.linear_cross_entropy import PIECE
PIECE["cpu"] = 64  # rows of 22 and of 21 ids: ranks that counted their own would meet at different times
hidden, weight, labels = draw(20, 6, 43)
place = slice(22 * rank, 22 * rank + 22)
for smoothing, z in ((0.0, 0.0), (0.2, 0.01)):
    options = LossOptions(smoothing, z, VocabShard(dist.group.WORLD, 22 * rank, 43))
    loss, d_hidden, d_weight = ours(hidden, weight[place], labels, options, 7)
    dist.all_reduce(d_hidden)
    wanted = expected(hidden, weight, labels, LossOptions(smoothing, z))
    assert_close([loss, d_hidden, d_weight], [*wanted[:2], wanted[2][place]], 1e-13)
    logits = (hidden @ weight.t()).requires_grad_()
    (whole,) = torch.autograd.grad(reference(logits, labels, options), logits)
    own = logits.detach()[:, place].clone().requires_grad_()
    loss = cross_entropy(own, labels, options)
    loss.backward()
    assert_close([loss.detach(), own.grad], [wanted[0], whole[:, place]], 1e-13)
for wrong in (-1, 43):
    try:
        cross_entropy(own.detach(), labels.fill_(wrong), options)
    except ValueError as error:
        assert f"label {wrong} is not" in str(error)
    else:
        raise AssertionError(wrong)
del options  # it holds the group, whose threads the interpreter's end would meet
dist.destroy_process_group()
"""


def test_a_vocabulary_over_two_ranks(tmp_path: Path) -> None:
    env = clean_env(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests/kernels'}")
    commands = [[sys.executable, "-c", RANKS, str(rank), str(tmp_path)] for rank in range(2)]
    ranks = [subprocess.Popen(c, env=env, stderr=subprocess.PIPE, text=True) for c in commands]
    for rank in ranks:
        _, said = rank.communicate(timeout=100)
        assert rank.returncode == 0, said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden": torch.ones(2, 3, 4)}, ["hidden", "(2, 3, 4)"]),
        ({"hidden": torch.ones(3, 4, dtype=torch.int64)}, ["hidden", "int64", "bfloat16"]),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, ["labels", "(2,)", "(3, 4)"]),
        ({"labels": torch.zeros(3)}, ["labels", "float32"]),
        ({"weight": torch.ones(5, 3)}, ["hidden", "(3, 4)", "weight", "(5, 3)"]),
        ({"weight": torch.ones(0, 4)}, ["0 ids"]),
        ({"chunk_tokens": 0}, ["chunk_tokens = 0"]),
    ],
)
def test_bad_input(change: dict[str, Any], words: list[str]) -> None:
    arguments = {"hidden": torch.ones(3, 4), "weight": torch.ones(5, 4), "labels": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError) as error:
        linear_cross_entropy(**(arguments | change))
    message = str(error.value)
    assert message.startswith("linear_cross_entropy: ") and "\n" not in message, message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("wrong", [-1, 5, 2**40])
def test_a_label_out_of_the_vocabulary(wrong: int) -> None:
    labels = torch.tensor([0, IGNORE_INDEX, wrong])
    with pytest.raises(ValueError, match=f"label {wrong} is not in the vocabulary, nor -100"):
        linear_cross_entropy(torch.ones(3, 4), torch.ones(5, 4), labels)


@pytest.mark.parametrize("options", [{"label_smoothing": 1.5}, {"z_loss": -1.0}, {"z_loss": math.nan}])
def test_bad_options(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} = .*: must be"):
        LossOptions(**options)
