"""float8 linear layers through torchao."""

import sys

import torch
from torch import nn

from titanling.config.schema import Float8
from titanling.errors import UserError
from titanling.model.layout import ModelLayout
from titanling.parallel.mesh import World
from titanling.parallel.plan import Plan

CONVERTER = "quantize.linear.float8"
CAPABILITY = (8, 9)


class Float8Linear(Plan):
    """Multiply the blocks' matrices in float8 (Micikevicius et al. 2022), with weights still held as they were.

    Needs a GPU with float8 units (NVIDIA, compute capability 8.9 or more) and torchao. Matrices whose sides are not
    multiples of 16 stay as they are, as does the output head.
    """

    name = "quantize"

    def __init__(self, settings: Float8) -> None:
        self.settings = settings

    def check(self, device: torch.device) -> None:
        """Raises UserError without such a GPU or without torchao."""
        asked = f'model.converters = ["{CONVERTER}"]'
        if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < CAPABILITY:
            raise UserError(f"{asked} needs an NVIDIA GPU of compute capability 8.9 or more (L4, H100, …); remove it")
        try:
            import torchao.float8  # noqa: F401
        except ImportError:
            raise UserError(f"{asked} needs torchao; install it: {sys.executable} -m pip install torchao") from None

    def apply(self, model: nn.Module, world: World) -> None:
        """In place: linear layers of the blocks become float8 ones of the same names and parameters."""
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        layout: ModelLayout = model.layout  # type: ignore[assignment]
        if self.settings.recipe_name is not None:
            config = Float8LinearConfig.from_recipe_name(self.settings.recipe_name)
        else:
            config = Float8LinearConfig()

        def convert(module: nn.Module, name: str) -> bool:
            fits = isinstance(module, nn.Linear) and not module.in_features % 16 and not module.out_features % 16
            return fits and not any(part in name for part in self.settings.filter_fqns)

        convert_to_float8_training(model.get_submodule(layout.blocks), config=config, module_filter_fn=convert)

    def describe(self) -> str:
        """One line."""
        keys = ("enable_fsdp_float8_all_gather", "precompute_float8_dynamic_scale_for_fsdp")
        idle = " and ".join(key for key in keys if getattr(self.settings, key))
        said = f"; weights are not gathered in float8: no effect of {idle}" if idle else ""
        return f"blocks multiply in float8, {self.settings.recipe_name or 'tensorwise'}{said}"
