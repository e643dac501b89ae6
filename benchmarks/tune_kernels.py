"""Find launch parameters: times every candidate on this GPU and prints rows for triton_kernels/launch.py.

Nothing is written and nothing is tuned while training: a table in the source is what runs.
"""

import sys
from os.path import dirname, realpath

sys.path.insert(0, dirname(dirname(realpath(__file__))))
from titanling import environment

environment.require(even_for_help=True)

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from device_time import Clock, describe
from harness import machine, say, write_json
from torch import Tensor

from triton_kernels.ahead_of_time import VOCAB
from triton_kernels.cross_entropy import gradient_launch, statistics_launch
from triton_kernels.implementation import available, target
from triton_kernels.launch import MAX_HIDDEN, TABLES, Device, Row, known
from triton_kernels.rms_norm import backward_launch as norm_backward
from triton_kernels.rms_norm import forward_launch as norm_forward
from triton_kernels.rope import make_launch as rope_launch
from triton_kernels.swiglu import backward_launch as swiglu_backward
from triton_kernels.swiglu import forward_launch as swiglu_forward

EXAMPLE = "example: python benchmarks/tune_kernels.py --kernels norm_backward --rows 16384 --json tuned.json"
LOSS_KERNELS = ("cross_entropy_statistics", "cross_entropy_gradient")
KERNELS = ("norm_forward", "norm_backward", "swiglu_forward", "swiglu_backward", "rope", *LOSS_KERNELS)
SIZES = (128, 256, 512, 1024, 2048, 4096, 8192, MAX_HIDDEN)
HEAD_DIM = 128
TUNED = "tuned"
"""The name under which a candidate stands in the table of launches while it is timed."""


def candidates(kernel: str, size: int, amd: bool) -> Iterator[Row]:
    """Rows worth trying for one size."""
    per_lane = (4, 8, 16, 32, 64)
    lanes = 64 if amd else 32
    if kernel.startswith("norm"):
        tiles = [size] if size >= 2048 else [t for t in (1024, 2048, 4096) if t >= size]
        programs = (1, 2, 3, 4, 6, 8, 16) if kernel == "norm_backward" else (1,)
        stages = (1, 2, 3) if kernel == "norm_backward" and not amd else (1,)
    else:
        tiles, programs = [512, 1024, 2048, 4096, 8192], (1,)
        stages = (1, 2, 3) if kernel == "cross_entropy_statistics" and not amd else (1,)
    for tile, warps, per_sm, stage in itertools.product(tiles, (1, 2, 4, 8, 16, 32), programs, stages):
        if warps * lanes <= 1024 and tile // (warps * lanes) in per_lane:
            yield Row(size, tile, warps, stage, per_sm)


def launches(kernel: str, size: int, rows: int, device: torch.device, sets: int) -> list[Callable[[Device], Any]]:
    """One function per set of inputs, which makes and runs the launch that the table says."""

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def one() -> Callable[[Device], Any]:
        x, y, z = (random(rows, size) for _ in range(3))
        weight, rstd = random(size), random(rows, dtype=torch.float32)
        if kernel == "norm_forward":
            return lambda on: norm_forward(on, x, None, weight, (y, None, rstd), 1e-5, True).run()
        if kernel == "norm_backward":
            return lambda on: _run_and_reduce(norm_backward(on, x, None, y, weight, rstd, z, True))
        if kernel == "swiglu_forward":
            return lambda on: swiglu_forward(on, x, y, z).run()
        if kernel == "swiglu_backward":
            dgate, dup = random(rows, size), random(rows, size)
            return lambda on: swiglu_backward(on, x, y, z, dgate, dup).run()
        head_dim = min(HEAD_DIM, size)
        q, k = (random(1, rows, max(1, heads), head_dim) for heads in (size // head_dim, size // head_dim // 4))
        out, angle = (torch.empty_like(q), torch.empty_like(k)), random(rows, 1, head_dim // 2, dtype=torch.float32)
        return lambda on: rope_launch(on, (q, k, angle, angle), out, False).run()

    def of_logits() -> Callable[[Device], Any]:
        logits, labels = random(rows, size), torch.zeros(rows, 1, device=device, dtype=torch.int64)
        top, other = (random(rows, 1, dtype=torch.float32) for _ in range(2))
        if kernel == "cross_entropy_statistics":
            return lambda on: statistics_launch(on, logits, top, other, None).run()
        return lambda on: gradient_launch(on, logits, top, other, None, other, labels).run()

    return [of_logits() if kernel in LOSS_KERNELS else one() for _ in range(sets)]


def _run_and_reduce(launch: tuple[Any, Tensor]) -> Tensor:
    # More programs mean more partial sums to add up: part of the price.
    launch[0].run()
    return launch[1].sum(0)


def tune(clock: Clock, kernel: str, size: int, rows: int, limit: int | None) -> list[tuple[float, Row]]:
    """Seconds of every candidate that runs, the fastest first."""
    device = clock.device
    name = known(target(device)) if device.type == "cuda" else "sm_90"
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    sets = launches(kernel, size, rows, device, clock.copies_of_inputs(4 * rows * size))
    calls = [partial(run, Device(TUNED, processors)) for run in sets]
    found = []
    for row in itertools.islice(candidates(kernel, size, name.startswith("gfx")), limit):
        TABLES[TUNED] = {kernel: (row._replace(size=2 * MAX_HIDDEN),)}
        try:
            found.append((clock.device_seconds(calls), row))
        except Exception as error:  # too much shared memory, most often
            say(f"{kernel} {size}: {row} does not run: {type(error).__name__}")
    return sorted(found)


def main() -> None:
    """Arguments → candidates → rows."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS, metavar="KERNEL")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, metavar="N", help="hidden sizes, or widths")
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--json", metavar="OUT", help="also write every candidate's time here")
    parser.add_argument("--smoke", action="store_true", help="seconds: few candidates, tiny sizes")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    problem = available(device)
    if problem is not None:
        hint = "; set TRITON_INTERPRET=1 for a dry run" if device.type == "cpu" else ""
        parser.error(f"nothing to tune: {problem}{hint}")
    sizes, rows, limit = ((128,), 4, 2) if arguments.smoke else (arguments.sizes, arguments.rows, None)
    clock, tuned = Clock(device, arguments.smoke), {}
    for kernel in arguments.kernels:
        print(f'"{kernel}": (')
        # A row of logits is as long as many hidden states.
        of_loss = kernel in LOSS_KERNELS and not arguments.smoke
        for size in (VOCAB,) if of_loss else sizes:
            ranking = tune(clock, kernel, size, rows // 8 if of_loss else rows, limit)
            tuned[f"{kernel} {size}"] = [{"seconds": seconds, **row._asdict()} for seconds, row in ranking]
            if ranking:
                print(f"    {ranking[0][1]},  # {ranking[0][0] * 1e6:.1f} µs", flush=True)
        print("),")
    about = {"benchmark": "tune_kernels", "machine": machine() | describe(device), "dry_run": arguments.smoke}
    write_json(arguments.json, about | {"rows": rows, "tuned": tuned})


if __name__ == "__main__":
    main()
