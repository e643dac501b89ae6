"""Weights in bfloat16: what cannot move is said, and stochastic rounding moves it without bias, the same everywhere."""

import math
from pathlib import Path

import pytest
import torch
from helpers import TinyData
from runs import differing, live_tensors, open_trainer, rows, saved_tensors
from torch import nn

from titanling.bfloat16 import StochasticAdamW, places, random_bits, random_keys, round_into, stuck_above
from titanling.config import Config
from titanling.config.check import check_runnable
from titanling.config.schema import Optimizer
from titanling.errors import UserError
from titanling.optim import LossScaler, clip_and_step, optimizer_state

BFLOAT16 = {"training.dtype": "bfloat16", "training.mixed_precision_param": "bfloat16"}
ROUNDED = BFLOAT16 | {"optimizer.stochastic_rounding": True}
KEYS = random_keys(1, 2, "name")


@pytest.fixture(autouse=True)
def bfloat16_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute in bfloat16 even on a CPU that is slow at it."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")


def rounded(values: torch.Tensor, keys: tuple[int, int] = KEYS) -> torch.Tensor:
    """float32 values rounded by chance."""
    target = torch.empty(values.shape, dtype=torch.bfloat16)
    round_into(target, values, [0] * values.ndim, values.shape, keys)
    return target


@pytest.mark.parametrize("share", [0.0, 2**-16, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1, -1])
def test_rounding_is_unbiased(share: float, sign: int) -> None:
    """To 1e-3 of the distance between neighbours, which it rounds to; what fits stays."""
    count = 2**21
    low, high = sign * 0.015625, sign * (0.015625 + 2**-13)
    value = torch.full((2**10, count // 2**10), low + share * (high - low), dtype=torch.float32)
    found = rounded(value).float()
    assert set(found.unique().tolist()) <= {low, high}
    exact = (value[0, 0].double().item() - low) / (high - low)
    assert abs(((found.double().mean().item() - low) / (high - low)) - exact) < 1e-3
    assert share > 0 or torch.equal(found, value)


def test_what_bfloat16_can_represent_stays() -> None:
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -3.0, 1e-40, torch.finfo(torch.bfloat16).max]
    values = torch.tensor(special, dtype=torch.bfloat16).expand(1000, -1).contiguous()
    found = rounded(values.float())
    assert torch.equal(found.isnan(), values.isnan())
    keep = ~values.isnan()
    assert torch.equal(found[keep].view(torch.int16), values[keep].view(torch.int16))


def test_bits_depend_on_everything_and_on_no_division() -> None:
    """Neighbouring places, steps, names and seeds have independent bits; a part's are those of the whole."""
    whole = random_bits(places(torch.Size((64, 48)), [0, 0], torch.Size((64, 48)), torch.device("cpu")), KEYS)
    part = random_bits(places(torch.Size((10, 7)), [20, 13], torch.Size((64, 48)), torch.device("cpu")), KEYS)
    assert torch.equal(part, whole[20:30, 13:20])
    n = torch.arange(2**18)
    streams = [random_bits(n, random_keys(*of)) for of in ((0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"))]
    streams += [random_bits(n + 1, random_keys(0, 0, "a")), random_bits(n + 2**32, random_keys(0, 0, "a"))]
    for index, one in enumerate(streams):
        for bit in range(16):
            assert abs((one >> bit & 1).double().mean().item() - 0.5) < 5e-3
        for other in streams[:index]:
            assert abs(torch.corrcoef(torch.stack((one, other)).double())[0, 1].item()) < 0.01


def test_in_float32_it_is_the_fused_step(tmp_path: Path) -> None:
    """Its mean over many seeds is AdamW's in float32; not finite, everything stays; moments are float32."""
    settings, start = Optimizer(lr=1e-5, weight_decay=0.1, stochastic_rounding=True), torch.full((8, 8), 0.02)
    gradient = torch.linspace(-1, 1, 64).view(8, 8)
    exact = nn.Parameter(start.bfloat16().float())
    exact.grad = gradient.bfloat16().float()
    torch.optim.AdamW([exact], lr=1e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True).step()
    total = torch.zeros(8, 8, dtype=torch.float64)
    for seed in range(400):
        weights = nn.Parameter(start.bfloat16())
        optimizer = StochasticAdamW([("w", weights)], settings, seed)
        weights.grad = gradient.bfloat16()
        optimizer.step()
        total += weights.detach().double()
    moved = (exact.detach() - start.bfloat16().float()).double()
    error = (total / 400 - start.bfloat16().double() - moved).abs().mean() / moved.abs().mean()
    assert error < 0.25  # of one element: by chance; of all of them
    assert abs((total / 400 - start.bfloat16().double() - moved).mean().item()) < 0.1 * moved.abs().mean().item()
    state = optimizer_state([("w", weights)], optimizer)
    assert {name: tensor.dtype for name, tensor in state.items()} == dict.fromkeys(state, torch.float32)
    before = {name: tensor.clone() for name, tensor in (state | {"w": weights.detach()}).items()}
    weights.grad = torch.full((8, 8), math.nan, dtype=torch.bfloat16)
    clip_and_step(optimizer, 1.0, LossScaler(False, torch.device("cpu")))
    assert differing(before, optimizer_state([("w", weights)], optimizer) | {"w": weights.detach()}) == []


def test_what_does_not_move_is_said_and_moves_with_stochastic_rounding(
    tmp_path: Path, tiny_data: TinyData, capsys: pytest.CaptureFixture[str]
) -> None:
    lr = {"optimizer.lr": 1e-5, "lr_scheduler.warmup_steps": 0, "lr_scheduler.decay_ratio": 0.0}
    lr |= {"checkpoint.enable": False, "optimizer.weight_decay": 0.0}
    share = {}
    for name, changes in (("nearest", BFLOAT16), ("by chance", ROUNDED)):
        with open_trainer(tmp_path / name, tiny_data, lr | changes | {"training.steps": 10}) as trainer:
            before = live_tensors(trainer)
            weights = torch.cat([before[name].flatten() for name, _ in trainer.runner.named_parameters()])
            trainer.train()
            after = live_tensors(trainer)
            moved = [(before[n] != after[n]).flatten() for n, _ in trainer.runner.named_parameters()]
            large = weights.abs() >= stuck_above(1e-5)
            share[name] = torch.cat(moved)[large].double().mean().item()
        said = capsys.readouterr().err
        words = (
            f"{large.double().mean():.0%} of the weights (those from 0.00391 on) cannot move at optimizer.lr = 1e-05"
        )
        assert (words in said) == (name == "nearest"), said
    assert share["nearest"] < 0.01 and share["by chance"] > 0.1
    for changes in ({"optimizer.lr": 1e-2} | BFLOAT16, {"optimizer.lr": 1e-6}):
        with open_trainer(tmp_path / "fine", tiny_data, {"checkpoint.enable": False} | changes):
            assert "cannot move" not in capsys.readouterr().err


def test_a_resume_is_bitwise(tmp_path: Path, tiny_data: TinyData) -> None:
    """And a run may change to it, and back."""
    common = ROUNDED | {"checkpoint.interval": 3, "lr_scheduler.total_steps": 6}
    for folder, parts in (("straight", (6,)), ("halves", (3, 6))):
        for steps in parts:
            with open_trainer(tmp_path / folder, tiny_data, common | {"training.steps": steps}) as trainer:
                trainer.train()
    last = "run/checkpoints/step-000006"
    found = [saved_tensors(tmp_path / folder / last) for folder in ("straight", "halves")]
    assert differing(*found) == [] and rows(tmp_path / "straight/run") == rows(tmp_path / "halves/run")
    for other in (False, True):
        changes = common | {"training.steps": 7 + other, "optimizer.stochastic_rounding": other}
        with open_trainer(tmp_path / "halves", tiny_data, changes) as trainer:
            assert trainer.step == 6 + other
            trainer.train()


def test_it_is_refused_for_other_types() -> None:
    config = Config.model_validate({"optimizer": {"stochastic_rounding": True}, "data": {"train": "x"}})
    with pytest.raises(
        UserError, match='stochastic_rounding = true is for weights in bfloat16, and training.dtype = "fl'
    ):
        check_runnable(config)
