"""Weights that are held in bfloat16: which of them no step can move, and an AdamW that moves them all, by chance.

bfloat16 has 8 significant bits. A weight that is rounded to the nearest stays as it is wherever its update is less than
half of the distance to the next number. Rounded up or down by chance, in proportion to the distances, it moves by its
update in the mean (stochastic rounding: Gupta et al. 2015; for bfloat16 weights Zamirai et al. 2020).
"""

import hashlib
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from titanling.config import Config
from titanling.config.schema import Optimizer
from titanling.parallel.mesh import World
from titanling.parallel.weights import local_part

MUCH = 0.05
"""Share of weights that may stay without a word."""
CHUNK = 2**22
"""Elements that are rounded at once, for each needs some 30 bytes meanwhile."""
MASK = 0xFFFFFFFF


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW of bfloat16 weights: torch's fused step in float32, then rounded by chance; moments are float32.

    In bfloat16 a second moment would stop to fall, as weights do: beta2 = 0.999 changes it by less than half a step.
    The random bits are a function of (seed, the group's "step", name, place in the whole tensor): the same under every
    layout and after a resume. With `found_inf` = 1, weights, moments and step counters stay bit-equal.
    """

    moment_dtype = torch.float32

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], settings: Optimizer, seed: int) -> None:
        """`parameters` under the names that they have in the whole model."""
        self.seed, self.names = seed, {parameter: name for name, parameter in parameters}
        self.found_inf: Tensor | None = None
        matrices, others = ([p for p in self.names if (p.ndim >= 2) == wide] for wide in (True, False))
        groups: list[dict[str, Any]] = [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        super().__init__(groups, {"lr": settings.lr, "betas": (settings.beta1, settings.beta2), "eps": settings.eps})
        for group in self.param_groups:
            group["step"] = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step of all parameters that have a gradient; `closure` is not supported."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state |= new_state(parameter, self.moment_dtype)
        weights, offsets = local_part(parameter)
        tensors = [local(tensor) for tensor in (parameter.grad, state["exp_avg"], state["exp_avg_sq"], state["step"])]
        updated, gradient = weights.float(), tensors[0].float()
        beta1, beta2 = group["betas"]
        adamw(
            *([tensor] for tensor in (updated, gradient, tensors[1], tensors[2])),
            [],
            [tensors[3]],
            fused=True,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        keys = random_keys(self.seed, group["step"], self.names[parameter])
        round_into(weights, updated, offsets, parameter.shape, keys)


def new_state(parameter: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """AdamW's state before the first step; moments of `dtype`, or the parameter's."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, dtype=dtype),
        "exp_avg_sq": torch.zeros_like(parameter, dtype=dtype),
    }


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def random_keys(seed: int, step: int, name: str) -> tuple[int, int]:
    """Two numbers below 2³² that stand for all but the place in the tensor."""
    digest = hashlib.blake2b(f"{seed} {step} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def round_into(target: Tensor, values: Tensor, offsets: list[int], shape: torch.Size, keys: tuple[int, int]) -> None:
    """Round float32 `values` by chance to the bfloat16 `target`, both of one shape.

    They begin at `offsets` of a whole tensor of `shape`. What bfloat16 can represent stays as it is, as do inf and nan.
    """
    if not values.numel():
        return
    rows = max(1, CHUNK * len(values) // values.numel())
    for first in range(0, len(values), rows):
        part = values[first : first + rows]
        begin = [offsets[0] + first, *offsets[1:]]
        bits = random_bits(places(part.shape, begin, shape, part.device), keys)
        # The 16 bits that bfloat16 lacks, plus as many random ones: carried with the probability that they stand for.
        rounded = (part.view(torch.int32) + bits.to(torch.int32)).bitwise_and_(-65536).view(torch.float32)
        target[first : first + rows] = torch.where(part.isfinite(), rounded, part)


def places(size: torch.Size, offsets: list[int], shape: torch.Size, device: torch.device) -> Tensor:
    """The place, counted row by row through a whole tensor of `shape`, of each element of a part: int64 of `size`."""
    found = torch.zeros((), dtype=torch.int64, device=device)
    for dim, (length, offset) in enumerate(zip(size, offsets, strict=True)):
        along = torch.arange(offset, offset + length, device=device) * math.prod(shape[dim + 1 :])
        found = found + along.view([-1 if each == dim else 1 for each in range(len(size))])
    return found


def random_bits(places: Tensor, keys: tuple[int, int]) -> Tensor:
    """16 random bits for each place: two rounds of a 32-bit mixer (lowbias32: Wellons 2018), keyed before each."""
    mixed = (places & MASK) ^ keys[0] ^ ((places >> 32) * 0x9E3779B1 & MASK)
    for key in (keys[1], 0):
        mixed = (mixed ^ (mixed >> 16)) * 0x7FEB352D & MASK
        mixed = (mixed ^ (mixed >> 15)) * 0x846CA68B & MASK
        mixed = (mixed ^ (mixed >> 16)) ^ key
    return mixed & 0xFFFF


def stuck_above(lr: float) -> float:
    """The size from which on half of the distance to the next bfloat16 number is more than `lr`, AdamW's largest step.

    (Which it takes where all gradients of a weight so far were alike; most steps are smaller.)
    """
    return 2.0 ** (math.floor(math.log2(lr)) + 9)


def stuck(parameters: Iterable[tuple[str, nn.Parameter]], config: Config, world: World) -> list[str]:
    """A line where many bfloat16 weights are too large for the steps to come; waits for the device. All ranks."""
    lr = config.optimizer.lr
    if config.training.dtype != "bfloat16" or config.optimizer.stochastic_rounding:
        return []
    limit = stuck_above(lr)
    still = torch.zeros((), dtype=torch.float64, device=world.device)
    every = torch.zeros_like(still)
    for weights in (local(parameter.detach()) for _, parameter in parameters):
        still += (weights.abs() >= limit).sum().to(still)
        every += weights.numel()
    share = (world.sum_(still) / world.sum_(every)).item()
    if share <= MUCH:
        return []
    return [
        f'training.dtype = "bfloat16": {share:.0%} of the weights (those from {limit:.3g} on) cannot move at'
        f" optimizer.lr = {lr:g}, which is less than half of the distance to the next bfloat16 number; set"
        ' optimizer.stochastic_rounding = true, or training.dtype = "float32"'
    ]
