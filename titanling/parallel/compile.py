"""torch.compile, block by block: one graph serves all layers, and names do not change."""

from contextlib import AbstractContextManager

import torch

from titanling.config.schema import Compile
from titanling.model.llama import Llama


def compile_blocks(model: Llama, settings: Compile) -> None:
    """Compile every transformer block in place, as a whole and for the shapes at hand."""
    if settings.enable and "model" in settings.components:
        for block in model.model.layers:
            block.compile(fullgraph=True, dynamic=False, backend=settings.backend)


def uncompiled() -> AbstractContextManager[None]:
    """Run compiled modules eagerly: generation changes shapes at every token."""
    return torch.compiler.set_stance("force_eager")
