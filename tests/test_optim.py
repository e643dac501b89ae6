"""AdamW, clipping and the skipped step, against the algorithm by hand in float64."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from titanling.config.schema import Optimizer
from titanling.optim import LossScaler, build_optimizer, clip_and_step, optimizer_state

SETTINGS = Optimizer(lr=0.01, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3)
CPU = torch.device("cpu")


def build(dtype: torch.dtype = torch.float32, settings: Optimizer = SETTINGS) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = nn.ParameterDict({"matrix": torch.randn(5, 7), "norm": torch.randn(7), "other": torch.randn(3, 5)})
    model = model.to(dtype)
    return model, build_optimizer(model.parameters(), settings)


def gradients(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Iterator[dict[str, Tensor]]:
    """Gradients of step after step; every second one is too small to be clipped."""
    generator = torch.Generator().manual_seed(1)
    size = 1.0
    while True:
        shapes = {"matrix": (5, 7), "norm": (7,), "other": (3, 5)}
        yield {k: (scale * size * torch.randn(s, generator=generator)).to(dtype) for k, s in shapes.items()}
        size = 1.01 - size


def set_gradients(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.grad = values[name].clone()


def snapshot(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    tensors = dict(model.named_parameters()) | optimizer_state(model.named_parameters(), optimizer)
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert not [name for name in one if not torch.equal(one[name], two[name])]


def norm_of(values: dict[str, Tensor]) -> float:
    return torch.cat([v.double().flatten() for v in values.values()]).norm().item()


class ByHand:
    """Algorithm 2 of Loshchilov & Hutter 2019 in float64, after clipping; decay on matrices only."""

    def __init__(self, model: nn.Module) -> None:
        self.p = {name: p.detach().double() for name, p in model.named_parameters()}
        self.m = {name: torch.zeros_like(p) for name, p in self.p.items()}
        self.v = {name: torch.zeros_like(p) for name, p in self.p.items()}
        self.t = 0

    def step(self, grads: dict[str, Tensor], lr: float, max_norm: float) -> None:
        self.t += 1
        s, shrink = SETTINGS, min(1.0, max_norm / norm_of(grads))
        for name, p in self.p.items():
            g = grads[name].double() * shrink
            self.m[name] = s.beta1 * self.m[name] + (1 - s.beta1) * g
            self.v[name] = s.beta2 * self.v[name] + (1 - s.beta2) * g**2
            m, v = self.m[name] / (1 - s.beta1**self.t), self.v[name] / (1 - s.beta2**self.t)
            decay = s.weight_decay if p.ndim >= 2 else 0.0
            self.p[name] = p - lr * (m / (v.sqrt() + s.eps) + decay * p)


@pytest.mark.parametrize("fp16", [False, True])
def test_five_steps(fp16: bool) -> None:
    model, optimizer = build()
    reference, scaler = ByHand(model), LossScaler(fp16, CPU)
    clipped = []
    for step, grads in zip(range(5), gradients(), strict=False):
        lr = 0.01 / (1 + step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        set_gradients(model, {name: scaler.scale * g for name, g in grads.items()})
        norm, found_inf = clip_and_step(optimizer, 2.0, scaler)
        reference.step(grads, lr, 2.0)
        assert norm.shape == found_inf.shape == () and norm.dtype == found_inf.dtype == torch.float32
        assert norm.item() == pytest.approx(norm_of(grads), rel=1e-6)  # as it was before clipping, unscaled
        assert found_inf.item() == 0
        clipped.append(norm.item() > 2)
    assert True in clipped and False in clipped
    state = optimizer_state(model.named_parameters(), optimizer)
    for name, p in model.named_parameters():
        assert (p.double() - reference.p[name]).abs().max() <= 1e-6
        assert (state[f"{name}.exp_avg"].double() - reference.m[name]).abs().max() <= 1e-6
        assert (state[f"{name}.exp_avg_sq"].double() - reference.v[name]).abs().max() <= 1e-6
        assert state[f"{name}.step"].item() == 5


def test_clipping_reaches_max_norm() -> None:
    model, optimizer = build()
    grads = next(gradients())
    set_gradients(model, grads)
    clip_and_step(optimizer, 0.5, LossScaler(False, CPU))
    left = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert norm_of(left) == pytest.approx(0.5, rel=1e-5)
    for name, g in grads.items():
        assert torch.allclose(left[name], g * (0.5 / norm_of(grads)), rtol=1e-5)


def test_only_matrices_decay() -> None:
    model, optimizer = build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    set_gradients(model, {name: torch.zeros_like(p) for name, p in before.items()})
    clip_and_step(optimizer, 1.0, LossScaler(False, CPU))
    for name, p in model.named_parameters():
        kept = 1 - SETTINGS.lr * SETTINGS.weight_decay if p.ndim >= 2 else 1.0
        assert torch.allclose(p, before[name] * kept, rtol=1e-6)


def test_a_parameter_without_gradient_stays() -> None:
    model, optimizer = build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    set_gradients(model, next(gradients()))
    model["other"].grad = None
    clip_and_step(optimizer, 1.0, LossScaler(False, CPU))
    assert torch.equal(model["other"], before["other"])
    assert not torch.equal(model["matrix"], before["matrix"])


def test_bfloat16() -> None:
    model, optimizer = build(torch.bfloat16)
    reference = ByHand(model)
    for _, grads in zip(range(3), gradients(torch.bfloat16), strict=False):
        set_gradients(model, grads)
        norm, _ = clip_and_step(optimizer, 2.0, LossScaler(False, CPU))
        reference.step(grads, 0.01, 2.0)
        assert norm.item() == pytest.approx(norm_of(grads), rel=1e-2)
    for name, p in model.named_parameters():
        assert p.dtype == torch.bfloat16
        assert (p.double() - reference.p[name]).abs().max() <= 0.05


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("at", [0, 2])
def test_a_non_finite_gradient_skips_the_step(bad: float, dtype: torch.dtype, fp16: bool, at: int) -> None:
    """Everything stays bit-equal, and the run goes on as if that step had never been."""
    (model, optimizer), (twin, twins) = build(dtype), build(dtype)
    scaler, other = LossScaler(fp16, CPU), LossScaler(fp16, CPU)
    for step, grads in zip(range(4), gradients(dtype), strict=False):
        if step == at:
            poisoned = {name: g.clone() for name, g in grads.items()}
            poisoned["norm"][3] = bad
            before = snapshot(model, optimizer)
            set_gradients(model, poisoned)
            norm, found_inf = clip_and_step(optimizer, 1.0, scaler)
            assert not torch.isfinite(norm) and found_inf.item() == 1
            assert_same(snapshot(model, optimizer), before)
            assert scaler.scale.item() == (32768.0 if fp16 else 1.0)
        for each, its, scale in ((model, optimizer, scaler), (twin, twins, other)):
            set_gradients(each, {name: g * scale.scale.to(dtype) for name, g in grads.items()})
            _, found_inf = clip_and_step(its, 1.0, scale)
            assert found_inf.item() == 0
    found, wanted = snapshot(model, optimizer), snapshot(twin, twins)
    assert_same(found, wanted)  # scales are powers of two: dividing by them is exact
    assert found["matrix.step"].item() == 4


def test_a_norm_that_overflows_is_not_finite() -> None:
    model, optimizer = build()
    before = snapshot(model, optimizer)
    set_gradients(model, {name: g * 1e30 for name, g in next(gradients()).items()})
    _, found_inf = clip_and_step(optimizer, 1.0, LossScaler(False, CPU))
    assert found_inf.item() == 1
    assert_same(snapshot(model, optimizer), before)


def test_state_names_and_restoring() -> None:
    model, optimizer = build()
    state = optimizer_state(model.named_parameters(), optimizer)
    assert set(state) == {
        f"{name}.{key}" for name in ("matrix", "norm", "other") for key in ("exp_avg", "exp_avg_sq", "step")
    }
    assert not any(tensor.any() for tensor in state.values())
    grads = gradients()
    for _ in range(3):
        set_gradients(model, next(grads))
        clip_and_step(optimizer, 1.0, LossScaler(False, CPU))
    saved = snapshot(model, optimizer)
    assert saved["norm.step"].item() == 3

    other, its = build()
    for name, tensor in (dict(other.named_parameters()) | optimizer_state(other.named_parameters(), its)).items():
        tensor.data.copy_(saved[name])
    last = next(grads)
    for each, optimizer_ in ((model, optimizer), (other, its)):
        set_gradients(each, last)
        clip_and_step(optimizer_, 1.0, LossScaler(False, CPU))
    assert_same(snapshot(other, its), snapshot(model, optimizer))


def test_settings_reach_the_optimizer() -> None:
    _, optimizer = build()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (0.01, (0.8, 0.9), 1e-6, True)


def test_the_scale_grows_after_good_steps_in_a_row() -> None:
    scaler = LossScaler(True, CPU, interval=3)
    scales = []
    for found_inf in (0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 1, 0):
        scaler.update(torch.tensor(float(found_inf)))
        scales.append(scaler.scale.item() / 65536)
    assert scales == [1, 1, 0.5, 0.5, 0.5, 1, 1, 1, 2, 1, 0.5, 0.5]


def test_without_float16_the_scale_is_one() -> None:
    scaler = LossScaler(False, CPU, interval=1)
    for found_inf in (0.0, 1.0, 0.0):
        scaler.update(torch.tensor(found_inf))
    assert scaler.scale.item() == 1
    assert scaler.state() == {}


@pytest.mark.parametrize("halvings", [3, 16])  # 16: down to 1, the scale of a run without float16
def test_scaler_state_round_trip(halvings: int) -> None:
    scaler, other = LossScaler(True, CPU, interval=5), LossScaler(True, CPU, interval=5)
    for found_inf in [1.0] * halvings + [0.0, 0.0]:
        scaler.update(torch.tensor(found_inf))
    other.load(scaler.state())
    for _ in range(4):
        assert other.state() == scaler.state()
        for each in (scaler, other):
            each.update(torch.tensor(0.0))
    assert other.scale.item() == 65536 / 2**halvings * 2


def test_scaler_state_of_another_precision() -> None:
    newly, no_longer = LossScaler(True, CPU), LossScaler(False, CPU)
    newly.load(LossScaler(False, CPU).state())
    no_longer.load(LossScaler(True, CPU).state())
    assert newly.scale.item() == 65536 and no_longer.scale.item() == 1
