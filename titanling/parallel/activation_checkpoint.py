"""Activation checkpointing: recompute in the backward pass what would not fit in memory (Chen et al. 2016)."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from titanling.config.schema import ActivationCheckpoint
from titanling.errors import UserError
from titanling.model.layout import ModelLayout
from titanling.parallel.mesh import World
from titanling.parallel.plan import Plan

KEPT = {
    "aten.mm",
    "aten.addmm",
    "aten._scaled_mm",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "titanling.document_attention",
    "flex_attention",
    "_c10d_functional.reduce_scatter_tensor",
}
"""What selective "op" keeps: it is costly to compute again, or to add up over ranks."""


class ActivationCheckpointing(Plan):
    """Recompute all blocks, every k-th, or inside each block all but KEPT."""

    name = "activation_checkpoint"

    def __init__(self, settings: ActivationCheckpoint, compiled: bool) -> None:
        self.settings, self.compiled = settings, compiled

    def check(self, device: torch.device) -> None:
        """Raises UserError for a memory budget without the compiler that keeps it."""
        if self.settings.mode == "memory_budget" and not self.compiled:
            raise UserError(
                'activation_checkpoint.mode = "memory_budget" is the compiler\'s: set compile.enable = true with'
                ' "model" among its components, or choose "selective" or "full"'
            )

    def apply(self, model: nn.Module, world: World) -> None:
        """In place; names do not change, for a block stays what it was and only its class is exchanged."""
        mode, option = self.settings.mode, self.settings.selective_ac_option
        if mode == "memory_budget":
            import torch._functorch.config as functorch

            functorch.activation_memory_budget = self.settings.memory_budget
            # torch 2.13 asks how large the mesh of a DTensor is, and finds no answer: it holds no activations.
            if hasattr(functorch, "unsafe_treat_script_objects_as_zero_size"):
                functorch.unsafe_treat_script_objects_as_zero_size = True
            return
        by_operator = mode == "selective" and option == "op"
        # torch 2.13 cannot compile the recomputation of a whole block of DTensors: it then stays outside, eager.
        outside = self.compiled and world.degrees.tp > 1 and not by_operator
        every = int(option) if mode == "selective" and not by_operator else 1
        layout: ModelLayout = model.layout  # type: ignore[assignment]
        for index, block in model.get_submodule(layout.blocks).named_children():
            if int(index) % every == 0:
                block.__class__ = recomputed(type(block), by_operator, outside)

    def describe(self) -> str:
        """One line."""
        option = self.settings.selective_ac_option
        return {
            "full": "every block is recomputed",
            "memory_budget": f"the compiler keeps {self.settings.memory_budget:.0%} of the activations",
            "selective": "all but matrix products and attention is recomputed"
            if option == "op"
            else f"one block in {option} is recomputed",
        }[self.settings.mode]


@cache
def recomputed(kind: type[nn.Module], by_operator: bool, outside: bool) -> type[nn.Module]:
    """The class with a `forward`, or `outside` a call, that is recomputed. One for all blocks: they share a graph."""
    method = "__call__" if outside else "forward"
    plain = getattr(kind, method)
    options = {"context_fn": _selective} if by_operator else {}

    def recompute(self: nn.Module, *inputs: Any) -> Any:
        return checkpoint(lambda *again: plain(self, *again), *inputs, use_reentrant=False, **options)

    return type(f"Checkpointed{kind.__name__}", (kind,), {method: recompute})


def _selective() -> Any:
    return create_selective_checkpoint_contexts(_keep)


def _keep(_: Any, operator: Callable[..., Any], *arguments: Any, **keywords: Any) -> CheckpointPolicy:
    name = str(operator)  # "aten.mm.default", but "flex_attention" for a higher-order one
    kept = name in KEPT or name.rpartition(".")[0] in KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
