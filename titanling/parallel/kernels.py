"""Which kernels compute the model's operations: Triton's, or what the model calls by itself."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import triton_kernels
from titanling.config.schema import Kernels
from titanling.errors import UserError
from titanling.model.presets import LlamaShape
from titanling.parallel.mesh import World
from titanling.parallel.plan import Plan
from triton_kernels.launch import MAX_HIDDEN
from triton_kernels.rope import MAX_HEAD_DIM


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The Triton kernel with the casting of torch's own norm, which the model calls otherwise."""
    return triton_kernels.rms_norm(x, weight, eps, casting="float32")


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The same of a sum, which is returned too."""
    return triton_kernels.add_rms_norm(x, residual, weight, eps, casting="float32")


LOSS = "linear_cross_entropy"
"""The key of the loss, which no module calls: `lay_out` gives its choice to the runner."""
EXCHANGED: dict[str, Callable[..., Any]] = {
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "swiglu": triton_kernels.swiglu,
    "rope": triton_kernels.rope,
}
"""By the name of the key in [kernels] and of the attribute of the modules that call it."""


class KernelChoice(Plan):
    """Exchange the model's operations for Triton kernels where they are asked for and run.

    A module calls an operation through an attribute of its name (`self.swiglu(gate, up)`), and keeps torch's where it
    has no such attribute.
    """

    name = "kernels"

    def __init__(self, settings: Kernels, device: torch.device, shape: LlamaShape) -> None:
        self.settings, self.device = settings, device
        norm = (shape.dim, MAX_HIDDEN)
        self.sizes = {"rms_norm": norm, "add_rms_norm": norm, "rope": (shape.head_dim, MAX_HEAD_DIM)}

    def check(self, device: torch.device) -> None:
        """Raises UserError where Triton is asked for and does not run, or not for a model of this size."""
        for operation in triton_kernels.OPERATIONS:
            self.chosen(operation)

    def chosen(self, operation: str) -> str:
        """ "triton" or "torch". Raises UserError where Triton is asked for and does not run."""
        own = getattr(self.settings, operation)
        wanted = own or self.settings.implementation
        size, limit = self.sizes.get(operation, (0, 0))
        try:
            found = triton_kernels.choose(wanted, self.device, operation)
            if found == "torch" or size <= limit:
                return found
            if wanted == "auto":
                return "torch"
            problem = f'the kernel takes up to {limit} elements, not {size}; "auto" would run torch here'
        except ValueError as error:
            problem = str(error).partition(": ")[2]
        key = f'kernels.{operation} = "{own}"' if own else f'kernels.implementation = "{wanted}": {operation}'
        raise UserError(f"{key}: {problem}")

    def apply(self, model: nn.Module, world: World) -> None:
        """In place."""
        kernels = {name: kernel for name, kernel in EXCHANGED.items() if self.chosen(name) == "triton"}
        for module in model.modules():
            for name in kernels.keys() & vars(module).keys():
                setattr(module, name, kernels[name])

    def describe(self) -> str:
        """One line."""
        by = {name: self.chosen(name) for name in triton_kernels.OPERATIONS}
        found = {kind: ", ".join(name for name in by if by[name] == kind) for kind in ("triton", "torch")}
        return "; ".join(
            f"{found[kind]} in {said}" for kind, said in (("triton", "Triton"), ("torch", "torch")) if found[kind]
        )
