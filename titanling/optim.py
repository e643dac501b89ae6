"""AdamW, clipping, and the guard that skips a step whose gradients are not finite, all without a host sync."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titanling.bfloat16 import StochasticAdamW, new_state
from titanling.config.schema import Optimizer

State = dict[str, Tensor]


def build_optimizer(parameters: Iterable[nn.Parameter], settings: Optimizer) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov & Hutter 2019). Only parameters of two or more dimensions decay, not the norms."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True
    )


def make_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]], settings: Optimizer, seed: int
) -> torch.optim.AdamW | StochasticAdamW:
    """The optimizer that the settings ask for, over parameters and their names in the whole model."""
    if settings.stochastic_rounding:
        return StochasticAdamW(parameters, settings, seed)
    return build_optimizer((parameter for _, parameter in parameters), settings)


def optimizer_state(parameters: Iterable[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer) -> State:
    """The optimizer's tensors as `<parameter>.exp_avg`, `.exp_avg_sq` and `.step`, made (as zeros) where missing.

    They are the optimizer's own tensors: loading into them in place restores it.
    """
    state: State = {}
    for name, parameter in parameters:
        own = optimizer.state[parameter]
        if not own:
            own |= new_state(parameter, getattr(optimizer, "moment_dtype", None))
        state |= {f"{name}.{key}": own[key] for key in ("exp_avg", "exp_avg_sq", "step")}
    return state


class LossScaler:
    """Dynamic loss scaling for float16 (Micikevicius et al. 2018), on the device.

    Halves the scale after a step with non-finite gradients, doubles it after `interval` good steps in a row.
    """

    def __init__(self, enabled: bool, device: torch.device, interval: int = 2000) -> None:
        self.enabled = enabled
        self.interval = interval
        self.scale = torch.tensor(65536.0 if enabled else 1.0, device=device)
        self.good_steps = torch.tensor(0.0, device=device)

    def update(self, found_inf: Tensor, empty: Tensor | float = 0.0) -> None:
        """Adapt to one step; `found_inf` is 1.0 or 0.0, and `empty` 1.0 if the step says nothing about the scale."""
        if not self.enabled:
            return
        self.good_steps = (self.good_steps + (1 - empty)) * (1 - found_inf)
        grow = (self.good_steps >= self.interval).float()
        self.scale = self.scale * (1 - 0.5 * found_inf) * (1 + grow)
        self.good_steps = self.good_steps * (1 - grow)

    def state(self) -> dict[str, float]:
        """For a checkpoint; empty without float16."""
        if not self.enabled:
            return {}
        return {"scale": self.scale.item(), "good_steps": self.good_steps.item()}

    def load(self, state: dict[str, float]) -> None:
        """From a checkpoint. A run that newly uses float16, or no longer does, keeps its own start."""
        if self.enabled and state:
            self.scale.fill_(state["scale"])
            self.good_steps.fill_(state["good_steps"])


def clip_and_step(
    optimizer: torch.optim.AdamW | StochasticAdamW,
    max_norm: float,
    scaler: LossScaler,
    total_norm: Callable[[list[Tensor]], Tensor] = torch.nn.utils.get_total_norm,
    empty: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Unscale and clip the gradients, then update the parameters, unless a gradient is not finite or the step `empty`.

    `total_norm` gives the 2-norm of this rank's gradients and of all others that it must know, 0-dim float32.
    Returns the global gradient norm before clipping and found_inf, both 0-dim float32 on the device. With found_inf = 1
    the fused kernel leaves parameters and optimizer state bit-equal and does not count the step; so it does where
    `empty`, 0-dim, is true, which leaves the loss scale as it is too, and found_inf 0.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = total_norm(grads) / scaler.scale
    idle = torch.zeros_like(norm) if empty is None else empty.to(norm)
    found_inf = (~torch.isfinite(norm)).float() * (1 - idle)
    coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0) / scaler.scale
    torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in grads], coefficient)
    optimizer.found_inf = found_inf + idle  # type: ignore[attr-defined]
    optimizer.step()
    scaler.update(found_inf, idle)
    return norm, found_inf
