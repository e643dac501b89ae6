"""Which implementation runs where: Triton on the GPUs that the kernels are made for, torch elsewhere."""

import os
import shutil
from functools import cache

import torch

from triton_kernels.language import INTERPRETED, MISSING

OPERATIONS = ("rms_norm", "add_rms_norm", "swiglu", "rope", "linear_cross_entropy")
"""What there is to choose for."""
IMPLEMENTATIONS = ("auto", "triton", "torch")
AMD = ("gfx90a", "gfx942")
"""MI210/MI250/MI250X; MI300A/MI300X/MI325X."""
MINIMUM_NVIDIA = 80


def available(device: torch.device | str) -> str | None:
    """None if the Triton kernels run on `device`, else why not, as a clause: "this GPU is gfx1100, …"."""
    device = torch.device(device)
    if MISSING is not None:
        return MISSING
    if device.type == "cpu":
        return None if INTERPRETED else "Triton has no CPU target"
    if device.type != "cuda":
        return f"the Triton kernels are for NVIDIA and AMD GPUs, not for {device.type}"
    if not torch.cuda.is_available():
        return "no GPU driver is in reach"
    if not has_compiler():
        return "Triton finds no C compiler (install gcc, or set CC)"
    name = target(device)
    if name.startswith("sm_") and int(name[3:]) < MINIMUM_NVIDIA:
        return f"this GPU is {name}, and the Triton kernels need sm_{MINIMUM_NVIDIA} or newer"
    if not name.startswith("sm_") and name not in AMD:
        return f"this GPU is {name}, and the Triton kernels know {' and '.join(AMD)}"
    return None


def choose(implementation: str, device: torch.device | str, operation: str) -> str:
    """ "triton" or "torch", for `operation` on `device`. "auto" takes Triton where it is available.

    Raises ValueError for an unknown name, and for "triton" where it is not available.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"{operation}: no such operation; there are {', '.join(OPERATIONS)}")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f'{operation} = "{implementation}": use one of {", ".join(IMPLEMENTATIONS)}')
    if implementation == "torch":
        return "torch"
    problem = available(device)
    if implementation == "triton" and problem is not None:
        raise ValueError(f'{operation} = "triton": {problem}; "auto" would run torch here')
    # The interpreter is for tests: nobody gets it without asking for it.
    automatic = "torch" if torch.device(device).type == "cpu" else "triton"
    return "torch" if problem is not None else "triton" if implementation == "triton" else automatic


@cache
def target(device: torch.device) -> str:
    """What code is compiled for on a CUDA or ROCm device: "sm_90", "gfx90a"."""
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def has_compiler() -> bool:
    """Whether there is the C compiler that Triton builds a kernel's launcher with, in the first step."""
    named = os.environ.get("CC")
    return any(map(shutil.which, [named] if named else ("gcc", "clang")))


def uses_triton(device: torch.device) -> bool:
    """Whether an operation called on `device` runs a Triton kernel, or at least should."""
    return device.type == "cuda" or (device.type == "cpu" and INTERPRETED)


def refuse(operation: str, problem: str, instead: str = "") -> None:
    """Raise the ValueError of an operation whose Triton kernel cannot do what is asked, and say what would."""
    instead = instead or f'implementation = "torch" would run {operation}_torch'
    raise ValueError(f"{operation}: {problem}; {instead}")
