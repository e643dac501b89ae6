"""The Triton kernels beside a copy of memory, torch eager, torch.compile, and Liger and quack where they are installed.

Time on the device (graph replay over inputs that no cache holds) and wall time of eager calls. "of copy" is the time of
a copy that moves the ideal number of bytes, measured in the same session, over the kernel's. Everybody computes in
bfloat16 with Llama's casting, and gets the weight's gradient too. Most telling sizes come first: what the time does not
suffice for is left out, and said.
"""

import sys
from os.path import dirname, realpath

sys.path.insert(0, dirname(dirname(realpath(__file__))))
from titanling import environment

environment.require(even_for_help=True)

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch._dynamo
import torch._functorch.config
from device_time import Clock, describe
from harness import machine, say, write_json
from torch import Tensor

import triton_kernels as ours

EXAMPLE = "example: python benchmarks/kernels.py --json benchmarks/results/kernels_h200.json"
EPS = 1e-5
ROWS = (16384, 65536, 4096)
HIDDEN_SIZES = (4096, 2048, 8192, 1536)
WIDTHS = (14336, 8192, 6144, 4096)
HEADS, KV_HEADS = 32, 8
HEAD_SIZES = (128, 64)

Function = Callable[..., Any]


class Case(NamedTuple):
    """One cell: an operation at a size."""

    operation: str
    rows: int
    width: int
    make: Callable[[], list[Tensor]]
    """Fresh inputs; those that require gradients first get them."""
    forward_bytes: int
    backward_bytes: int


class Result(NamedTuple):
    """What one contestant did in one direction of one case. Seconds."""

    case: Case
    direction: str
    contestant: str
    device: float
    wall: float
    of_copy: float


# ---- contestants ----


def contestants(operation: str) -> dict[str, Function]:
    """Name → function with the operation's arguments (tensors only). Peers that are not installed are not there."""
    plain = {
        "rms_norm": lambda x, w: ours.rms_norm_torch(x, w, EPS),
        "add_rms_norm": lambda x, r, w: ours.add_rms_norm_torch(x, r, w, EPS),
        "swiglu": lambda gate, up: torch.nn.functional.silu(gate) * up,
        "rope": ours.rope_torch,
    }[operation]
    kernel = {
        "rms_norm": lambda x, w: ours.rms_norm(x, w, EPS),
        "add_rms_norm": lambda x, r, w: ours.add_rms_norm(x, r, w, EPS),
        "swiglu": ours.swiglu,
        "rope": ours.rope,
    }[operation]
    found = {"titanling": kernel, "torch": plain, "compile": torch.compile(plain, dynamic=False)}
    for peer in (_liger, _quack):
        try:
            found |= peer(operation)
        except Exception as error:  # a peer of another version is no reason to stop
            say(f"{operation}: {peer.__name__[1:]} is left out: {type(error).__name__}: {error}")
    return found


def _liger(operation: str) -> dict[str, Function]:
    if operation == "rms_norm":
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        # Offset 0, Llama's casting, dX not in place: it would overwrite dY, which others still read.
        return {"liger": lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False)}
    if operation == "add_rms_norm":
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        return {"liger": lambda x, r, w: LigerFusedAddRMSNormFunction.apply(x, r, w, EPS, 0.0, "llama", False)}
    if operation == "swiglu":
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return {"liger": LigerSiLUMulFunction.apply}
    return {}  # its RoPE rotates in place and in another layout


def _quack(operation: str) -> dict[str, Function]:
    if operation != "rms_norm":
        return {}
    from quack.rmsnorm import rmsnorm

    return {"quack": lambda x, w: rmsnorm(x, w, eps=EPS)}


# ---- cases ----


def cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """All cells, the most telling first."""
    rows = (8, 4) if smoke else ROWS
    for m in rows:
        for n in (64,) if smoke else HIDDEN_SIZES:
            yield from _norms(device, m, n)
        for n in (128,) if smoke else WIDTHS:
            yield _swiglu(device, m, n)
        for n in (16,) if smoke else HEAD_SIZES:
            heads = 2 if smoke else HEADS
            yield _norm("rms_norm", device, m * heads, n)  # QK-norm
            yield _rope(device, m, heads, 1 if smoke else KV_HEADS, n)


def _random(device: torch.device, *shape: int, grad: bool = True) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_(grad)


def _norm(operation: str, device: torch.device, m: int, n: int) -> Case:
    inputs = 2 if operation == "add_rms_norm" else 1

    def make() -> list[Tensor]:
        return [*(_random(device, m, n) for _ in range(inputs)), _random(device, n)]

    return Case(operation, m, n, make, 4 * inputs * m * n, (8 if inputs == 2 else 6) * m * n)


def _norms(device: torch.device, m: int, n: int) -> Iterator[Case]:
    for operation in ("rms_norm", "add_rms_norm"):
        yield _norm(operation, device, m, n)


def _swiglu(device: torch.device, m: int, n: int) -> Case:
    return Case("swiglu", m, n, lambda: [_random(device, m, n), _random(device, m, n)], 6 * m * n, 10 * m * n)


def _rope(device: torch.device, tokens: int, heads: int, kv_heads: int, head_dim: int) -> Case:
    seq = min(tokens, 2048)

    def make() -> list[Tensor]:
        angle = torch.rand(seq, 1, head_dim // 2, device=device)
        q, k = (_random(device, tokens // seq, seq, h, head_dim) for h in (heads, kv_heads))
        return [q, k, angle.cos(), angle.sin()]

    nbytes = 4 * tokens * (heads + kv_heads) * head_dim
    return Case("rope", tokens, head_dim, make, nbytes, nbytes)


# ---- measuring ----


def measure(clock: Clock, case: Case, name: str, function: Function) -> list[Result]:
    """One contestant forward and backward. Inputs are rotated over four times the cache."""
    sets = [case.make() for _ in range(clock.copies_of_inputs(case.forward_bytes))]
    with torch.no_grad():
        forward = [lambda given=given: function(*given) for given in sets]
        results = [_result(clock, case, "forward", name, forward, case.forward_bytes)]
    outputs = clock.on_stream(lambda: [_as_tuple(function(*given)) for given in sets])
    gradients = [tuple(torch.randn_like(y) for y in of_one) for of_one in outputs]
    backward = [
        lambda y=y, given=given, dy=dy: torch.autograd.grad(
            y, [x for x in given if x.requires_grad], dy, retain_graph=True
        )
        for y, given, dy in zip(outputs, sets, gradients, strict=True)
    ]
    return [*results, _result(clock, case, "backward", name, backward, case.backward_bytes)]


def _result(clock: Clock, case: Case, direction: str, name: str, calls: list[Any], nbytes: int) -> Result:
    seconds = clock.device_seconds(calls)
    return Result(case, direction, name, seconds, clock.wall_seconds(calls), clock.copy_seconds(nbytes) / seconds)


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


# ---- judging ----

TARGETS = {
    ("rms_norm", "forward"): 0.92,
    ("rms_norm", "backward"): 0.88,
    ("swiglu", "forward"): 0.92,
    ("swiglu", "backward"): 0.90,
}
SLOWER_BY = 1.03
OVER_LIGER = 1.4


def judge(results: list[Result]) -> list[str]:
    """One line per goal that is missed: "rms_norm forward 16384 × 1536: 0.90 of copy, wanted 0.92"."""
    cells: dict[tuple[str, str, int, int], dict[str, Result]] = {}
    for r in results:
        cells.setdefault((r.case.operation, r.direction, r.case.rows, r.case.width), {})[r.contestant] = r
    missed = []
    for (operation, direction, rows, width), by_name in cells.items():
        where, mine = f"{operation} {direction} {rows} × {width}", by_name.get("titanling")
        if mine is None:
            continue
        wanted = TARGETS.get((operation, direction), 0.0) if width >= 1536 and rows >= 16384 else 0.0
        if mine.of_copy < wanted:
            missed.append(f"{where}: {mine.of_copy:.2f} of copy, wanted {wanted}")
        for peer in ("liger", "compile"):
            if peer in by_name and mine.device > SLOWER_BY * by_name[peer].device:
                missed.append(f"{where}: {mine.device / by_name[peer].device:.2f} × the time of {peer}")
        if (operation, direction) == ("rms_norm", "backward") and "liger" in by_name and wanted:
            ratio = by_name["liger"].device / mine.device
            if ratio < OVER_LIGER:
                missed.append(f"{where}: {ratio:.2f} × the speed of liger, wanted {OVER_LIGER}")
    return missed


HEADER = (
    f"{'operation':14}{'direction':10}{'rows':>9}{'width':>7}  {'':10}{'device µs':>11}{'wall µs':>11}{'of copy':>9}"
)


def line(result: Result) -> str:
    """A row of the table."""
    case = result.case
    return (
        f"{case.operation:14}{result.direction:10}{case.rows:>9}{case.width:>7}  {result.contestant:10}"
        f"{result.device * 1e6:>11.1f}{result.wall * 1e6:>11.1f}{result.of_copy:>9.2f}"
    )


def main() -> None:
    """Arguments → cells → table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--operations", nargs="+", choices=["rms_norm", "add_rms_norm", "swiglu", "rope"])
    parser.add_argument("--seconds", type=float, default=270, help="leave out what does not fit in (default 270)")
    parser.add_argument("--json", metavar="OUT", help="also write the results here")
    parser.add_argument("--smoke", action="store_true", help="seconds: tiny sizes; the figures mean nothing")
    arguments = parser.parse_args()
    if arguments.device == "cpu" and not arguments.smoke:
        parser.error("on a CPU only --smoke makes sense: there the kernels compute in torch")
    torch._functorch.config.donated_buffer = False  # one forward pass, many backward passes
    # Every shape is compiled for itself; beyond a limit torch would run the rest eagerly, without a word.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10**4
    device = torch.device(arguments.device)
    clock, started, left_out = Clock(device, arguments.smoke), time.monotonic(), 0
    results: list[Result] = []
    functions = {
        name: contestants(name) for name in arguments.operations or ("rms_norm", "add_rms_norm", "swiglu", "rope")
    }
    print(HEADER)
    for case in cases(device, arguments.smoke):
        for name, function in functions.get(case.operation, {}).items():
            if time.monotonic() - started > arguments.seconds:
                left_out += 1
                continue
            try:
                results += measure(clock, case, name, function)
            except Exception as error:  # one contestant that fails must not cost the others their figures
                say(f"{case.operation} {case.rows} × {case.width}: {name} failed: {type(error).__name__}: {error}")
                if name == "titanling":
                    raise
                continue
            print("\n".join(map(line, results[-2:])), flush=True)
    missed = judge(results) if device.type == "cuda" else []
    if left_out:
        print(f"{left_out} cells not measured: out of time after {arguments.seconds:.0f} s")
    print("\n".join(["goals missed:", *missed]) if missed else "no goal missed" if device.type == "cuda" else "dry run")
    rows = [{**_flat(r.case), **{k: v for k, v in r._asdict().items() if k != "case"}} for r in results]
    about = {"benchmark": "kernels", "machine": machine() | describe(device), "dry_run": arguments.smoke}
    write_json(arguments.json, about | {"results": rows, "missed": missed, "cells_left_out": left_out})


def _flat(case: Case) -> dict[str, Any]:
    return {"operation": case.operation, "rows": case.rows, "width": case.width}


if __name__ == "__main__":
    main()
