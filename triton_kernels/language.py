"""Triton, if it is installed. Without it the kernels' files still import, and torch computes."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

try:
    import triton
    import triton.language as tl

    MISSING: str | None = None
    """Why there is no Triton; None if there is one."""
    INTERPRETED = bool(triton.knobs.runtime.interpret)
    """Whether kernels run as Python on CPU tensors: TRITON_INTERPRET=1 was set before the first import."""
    jit: Callable[[Callable[..., Any]], Any] = triton.jit
except ImportError as error:
    MISSING = f"Triton cannot be imported ({error})"
    INTERPRETED = False
    # What the signatures of kernels mention.
    tl = SimpleNamespace(constexpr=Any)

    def jit(function: Callable[..., Any]) -> Callable[..., Any]:
        """Leave a kernel as it is; nobody will call it."""
        return function
