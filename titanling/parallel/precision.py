"""The type that the model computes in, which need not be the one that its parameters are held in."""

import torch
from torch import Tensor, nn

from titanling.config.schema import Training
from titanling.model.layout import ModelLayout
from titanling.parallel.mesh import World
from titanling.parallel.plan import Plan


def compute_dtype(device: torch.device, training: Training) -> torch.dtype:
    """The type that matrices are multiplied in: mixed_precision_param, where the device can.

    A CPU that has AVX2 at most multiplies bfloat16 without any hardware for it, several times slower than float32
    and less exactly: it computes in float32 instead.
    """
    wanted = getattr(torch, training.mixed_precision_param)
    emulated = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    return torch.float32 if wanted == torch.bfloat16 and emulated else wanted


class Precision(Plan):
    """Let the forward pass run in `dtype`: the embedding's output is cast, and all that follows takes its type.

    Weights are cast where they are used. FSDP's own policy does that before it gathers them, which halves the traffic.
    """

    name = "precision"

    def __init__(self, training: Training, device: torch.device) -> None:
        self.wanted, self.dtype = training.mixed_precision_param, compute_dtype(device, training)

    def apply(self, model: nn.Module, world: World) -> None:
        """In place."""
        layout: ModelLayout = model.layout  # type: ignore[assignment]

        def cast(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output.to(self.dtype)

        model.get_submodule(layout.embedding).register_forward_hook(cast)

    def describe(self) -> str:
        """One line."""
        dtype = str(self.dtype).removeprefix("torch.")
        if dtype == self.wanted:
            return f"computes in {dtype}"
        return f"computes in {dtype}, faster and more exact here: this CPU has no {self.wanted} units"
