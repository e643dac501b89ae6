"""Compile the kernels for GPUs that are not there, and read from the machine code what they would cost.

Compiled is what a GPU would be given: the launches that the operations make, over tensors without memory. Used by
scripts/kernel_report.py and the tests.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_kernels.cross_entropy import gradient_launch, statistics_launch
from triton_kernels.launch import MAX_HIDDEN, Device, Launch
from triton_kernels.rms_norm import backward_launch, forward_launch
from triton_kernels.rope import make_launch as rope_launch
from triton_kernels.swiglu import backward_launch as swiglu_backward
from triton_kernels.swiglu import forward_launch as swiglu_forward

HIDDEN_SIZES = (1536, 2048, 4096, 8192)
HEAD_SIZES = (64, 128)
VOCAB = 128_256
ROWS = 4096
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64"}


class Cost(NamedTuple):
    """What one compiled kernel needs."""

    registers: int
    """Vector registers per thread."""
    spills: int
    """Bytes per thread (NVIDIA) or registers (AMD) that did not fit."""
    shared: int
    """Bytes of shared memory (LDS) per program."""
    threads: int
    """Per program."""
    widest: int
    """Bytes of the widest access to global memory."""
    elementwise: int
    """Loads from global memory of a single 2-byte element: slow, where neighbours lie side by side."""
    float64: int
    """Instructions on float64: a Python float has crept in."""


def launches(target: str) -> Iterator[tuple[str, Launch]]:
    """Every kernel at every size, by name; bfloat16 where it does not say float32."""
    device = Device(target, 1)

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    sizes = [(f"{n}", n, torch.bfloat16) for n in (*HEAD_SIZES, *HIDDEN_SIZES, MAX_HIDDEN)]
    sizes.append(("4096 float32", 4096, torch.float32))
    for size, n, dtype in sizes:
        x, weight, rstd = empty(ROWS, n, dtype=dtype), empty(n, dtype=dtype), empty(ROWS, dtype=torch.float32)
        for name, other in (("rms_norm", None), ("add_rms_norm", x)):
            if other is not None and n in HEAD_SIZES:
                continue  # heads are normed without a residual
            yield f"{name} {size}", forward_launch(device, x, other, weight, (x, other, rstd), 1e-5, True)
            yield f"{name} backward {size}", backward_launch(device, x, other, x, weight, rstd, x, True)[0]
    for name, n in (("swiglu", 8192), ("swiglu_packed", 16384)):
        gate, up = empty(ROWS, 8192), empty(ROWS, 8192)
        if name == "swiglu_packed":
            gate, up = empty(ROWS, n).chunk(2, dim=1)
        y = empty(ROWS, 8192)
        yield name, swiglu_forward(device, gate, up, y)
        yield f"{name} backward", swiglu_backward(device, y, gate, up, gate, up)
    for head_dim in HEAD_SIZES:
        q, k = empty(2, ROWS, 4096 // head_dim, head_dim), empty(2, ROWS, 1024 // head_dim, head_dim)
        angle = empty(ROWS, 1, head_dim // 2, dtype=torch.float32)
        for name, backward in (("rope", False), ("rope backward", True)):
            yield f"{name} {head_dim}", rope_launch(device, (q, k, angle, angle), (q, k), backward)
    logits, labels = empty(ROWS, VOCAB), empty(ROWS, 1, dtype=torch.int64)
    number = empty(ROWS, 1, dtype=torch.float32)
    yield "cross_entropy", statistics_launch(device, logits, number, number, number)
    yield "cross_entropy gradient", gradient_launch(device, logits, number, number, number, number, labels)


def compile_launch(launch: Launch, target: str) -> Any:
    """The compiled kernel, specialised as Triton specialises it when it launches."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    amd = target.startswith("gfx")
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(launch.kernel.arg_names):
        value = launch.constants.get(name, launch.arguments.get(name))
        if name in launch.constants or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            attributes[(index,)] = [["tt.divisibility", 16]]
            if amd and value.numel() * value.element_size() < 2**31:
                attributes[(index,)].append(["tt.pointer_range", 32])
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    aim = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target[3:]), 32)
    return triton.compile(source, target=aim, options={"num_warps": launch.warps})


def measure(launch: Launch, target: str) -> Cost:
    """Compile a launch for a target and read its cost."""
    compiled = compile_launch(launch, target)
    if target.startswith("gfx"):
        return _read_amd(compiled.asm["amdgcn"], compiled.metadata.shared, launch.warps * 64)
    return _read_nvidia(compiled.asm["ptx"], compiled.asm["cubin"], compiled.metadata.shared, launch.warps * 32)


def measure_target(target: str, wanted: str = "") -> dict[str, Cost]:
    """Costs on a target of all kernels whose name matches a regular expression."""
    return {name: measure(launch, target) for name, launch in launches(target) if re.search(wanted, name)}


def _read_amd(assembly: str, shared: int, threads: int) -> Cost:
    def value(key: str) -> int:
        return int(re.search(rf"\.{key}:\s*(\d+)", assembly).group(1))  # type: ignore[union-attr]

    widths = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "ushort": 2}
    accesses = re.findall(r"^\s*(?:global|buffer)_(?:load|store)_(dwordx\d|dword|u?short)\b", assembly, re.MULTILINE)
    return Cost(
        registers=value("vgpr_count"),
        spills=value("vgpr_spill_count") + value("sgpr_spill_count"),
        shared=shared,
        threads=threads,
        widest=max(widths[access] for access in accesses),
        elementwise=len(re.findall(r"^\s*(?:global|buffer)_load_(?:u?short|s?short)", assembly, re.MULTILINE)),
        float64=len(re.findall(r"^\s*v_\w*_f64", assembly, re.MULTILINE)),
    )


def _read_nvidia(ptx: str, cubin: bytes, shared: int, threads: int) -> Cost:
    usage = _resource_usage(cubin)
    widths = [
        (int(count or 1) * int(bits) // 8, kind)
        for kind, count, bits in re.findall(r"\b(ld|st)\.global(?:\.\w+(?:::\w+)*)*?(?:\.v(\d))?\.[bufs](\d+)", ptx)
    ]
    asynchronous = [int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global.*?,.*?, (0x\w+|\d+)", ptx)]
    return Cost(
        registers=usage["REG"],
        spills=usage["STACK"] + usage["LOCAL"],
        shared=shared,
        threads=threads,
        widest=max([width for width, _ in widths] + asynchronous),
        elementwise=sum(width == 2 and kind == "ld" for width, kind in widths),
        float64=len(re.findall(r"^\s*(?:@\S+\s+)?\w[\w.]*\.f64\b", ptx, re.MULTILINE)),
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL as the cuobjdump that comes with Triton reports them."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", report)}
