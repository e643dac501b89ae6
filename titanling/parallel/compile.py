"""torch.compile, block by block: one graph serves all layers, and names do not change."""

import os
import shutil
import sys
from contextlib import AbstractContextManager

import torch
from torch import nn

from titanling.config.schema import Compile
from titanling.errors import UserError
from titanling.model.layout import ModelLayout
from titanling.parallel.mesh import World
from titanling.parallel.plan import Plan


class CompileBlocks(Plan):
    """Compile every transformer block in place, as a whole and for the shapes at hand."""

    name = "compile"

    def __init__(self, settings: Compile) -> None:
        self.settings = settings
        self.possible = settings.backend != "inductor" or has_compiler()

    def check(self, device: torch.device) -> None:
        """Raises UserError for a backend that torch does not know."""
        backend = self.settings.backend
        if backend != "inductor" and backend not in torch.compiler.list_backends(exclude_tags=()):
            known = ", ".join(torch.compiler.list_backends())
            raise UserError(f'compile.backend = "{backend}": torch has no such backend; use one of {known}')

    def apply(self, model: nn.Module, world: World) -> None:
        """In place. Does nothing where there is no C++ compiler to work with."""
        if not self.possible:
            return
        import torch._inductor.config as inductor

        # pytorch #193061: fusing reductions of mixed order has given wrong gradients since torch 2.10.
        inductor.triton.mix_order_reduction = False
        if self.settings.cache_dir is not None:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = self.settings.cache_dir
        layout: ModelLayout = model.layout  # type: ignore[assignment]
        for block in model.get_submodule(layout.blocks).children():
            block.compile(fullgraph=True, dynamic=False, backend=self.settings.backend)

    def describe(self) -> str:
        """One line."""
        if not self.possible:
            return "no C++ compiler found, so nothing is compiled; install g++ (or set CXX) to train faster"
        return f"each block by itself, {self.settings.backend}"


def has_compiler() -> bool:
    """Whether Inductor will find the C++ compiler: where CXX is set it looks for no other (inductor.config.cpp.cxx)."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")) is not None


def uncompiled() -> AbstractContextManager[None]:
    """Run compiled modules eagerly: generation changes shapes at every token."""
    return torch.compiler.set_stance("force_eager")
