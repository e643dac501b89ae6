"""torch.compile, block by block: one graph serves all layers, and names do not change."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from titanling.config.schema import Compile
from titanling.model.llama import Llama


def compile_blocks(model: Llama, settings: Compile) -> None:
    """Compile every transformer block in place, as a whole and for the shapes at hand."""
    if settings.enable and "model" in settings.components:
        for block in model.model.layers:
            block.compile(fullgraph=True, dynamic=False, backend=settings.backend)


def compile_loss(loss: Callable[..., torch.Tensor], settings: Compile) -> Callable[..., torch.Tensor]:
    """The compiled loss function."""
    if settings.enable and "loss" in settings.components:
        return torch.compile(loss, fullgraph=True, dynamic=False, backend=settings.backend)
    return loss


def uncompiled() -> AbstractContextManager[None]:
    """Run compiled modules eagerly: generation changes shapes at every token."""
    return torch.compiler.set_stance("force_eager")
