"""The loss on one GPU: time, and memory above inputs and gradients, of linear cross-entropy forward and backward.

8,192 tokens, hidden 4,096, vocabulary 128,256, bfloat16. Beside ours with the rows' work in Triton and in torch: all
logits and torch's cross-entropy, eager and compiled, and Liger's and quack's chunked losses where they are installed.
Gradients are those of hidden states (bfloat16) and of the matrix: in float32 where a contestant adds it up so, which
ours does, else in bfloat16. Then the rows' work alone, of logits that exist: its time beside that of a copy that moves
the ideal bytes, 6 for each logit. What the time does not suffice for is left out, and said.
"""

import sys
from os.path import dirname, realpath

sys.path.insert(0, dirname(dirname(realpath(__file__))))
from titanling import environment

environment.require(even_for_help=True)

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from device_time import Clock, describe
from harness import machine, say, write_json
from torch import Tensor
from torch.nn import functional as F

import triton_kernels as ours

EXAMPLE = "example: python benchmarks/loss_gpu.py --json benchmarks/results/loss_h200.json"
TOKENS, HIDDEN, VOCAB = 8192, 4096, 128_256
ROWS = 4096
"""Of the logits that exist: about a chunk."""
REPEATS = 5
GIB = 2**30
GOAL_DEVICE, GOAL_SECONDS, GOAL_MEMORY = "H200", 0.040, 1.2
SAME_LOSS = 0.01

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Contestant(NamedTuple):
    """A mean loss of hidden states (tokens, hidden), matrix (vocab, hidden) and labels (tokens,)."""

    loss: Loss
    sums_in: torch.dtype
    """The type in which the matrix's gradient is added up."""


# ---- contestants ----


def contestants() -> dict[str, Contestant]:
    """By name. Peers that are not installed are not there."""

    def by(implementation: str) -> Loss:
        options = ours.LossOptions(by=implementation)
        return lambda hidden, weight, labels: ours.linear_cross_entropy(hidden, weight, labels, options) / len(labels)

    def full(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), labels)

    compiled: Loss = torch.compile(full, dynamic=False)
    found = {
        "titanling": Contestant(by("auto"), torch.float32),
        "titanling, torch": Contestant(by("torch"), torch.float32),
        "all logits": Contestant(full, torch.bfloat16),
        "compiled": Contestant(compiled, torch.bfloat16),
    }
    for peer in (_liger, _quack):
        try:
            found[peer.__name__[1:]] = Contestant(peer(), torch.bfloat16)
        except ImportError:
            say(f"{peer.__name__[1:]} is not installed: left out")
    return found


def _liger() -> Loss:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy


def _quack() -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda hidden, weight, labels: chunked_linear_cross_entropy(hidden, weight, labels, reduction="mean")


# ---- measuring ----


def measure(contestant: Contestant, device: torch.device, sizes: tuple[int, int, int]) -> dict[str, float]:
    """Seconds (the median of REPEATS) and bytes above inputs and gradients, of forward and backward; and the loss."""
    tokens, hidden_size, vocab = sizes
    torch.manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, device=device, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(vocab, hidden_size, device=device).mul_(hidden_size**-0.5).bfloat16().requires_grad_()
    labels = torch.randint(vocab, (tokens,), device=device)

    def once() -> float:
        hidden.grad = weight.grad = None
        loss = contestant.loss(hidden, weight, labels)
        loss.backward()
        return float(loss.detach())

    loss = once()
    if device.type == "cpu":
        started = time.perf_counter()
        once()
        return {"seconds": time.perf_counter() - started, "bytes": 0.0, "loss": loss}
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    once()
    gradients = hidden.numel() * 2 + weight.numel() * contestant.sums_in.itemsize
    above = torch.cuda.max_memory_allocated() - before - gradients
    seconds = []
    for _ in range(REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        once()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1000)
    return {"seconds": sorted(seconds)[REPEATS // 2], "bytes": float(above), "loss": loss}


def rows_alone(clock: Clock, rows: int, vocab: int) -> dict[str, float]:
    """Seconds of the loss of logits that exist, by the kernels where they run, and a copy's over it."""
    logits = torch.randn(rows, vocab, device=clock.device, dtype=torch.bfloat16)
    labels = torch.randint(vocab, (rows,), device=clock.device)
    seconds = clock.device_seconds([lambda: ours.cross_entropy(logits.requires_grad_(), labels)] * 2)
    return {"seconds": seconds, "of_copy": clock.copy_seconds(6 * rows * vocab) / seconds}


def judge(results: dict[str, dict[str, float]]) -> list[str]:
    """One line per goal that is missed."""
    mine, missed = results["titanling"], []
    if mine["seconds"] > GOAL_SECONDS:
        missed.append(f"titanling: {1000 * mine['seconds']:.1f} ms, wanted {1000 * GOAL_SECONDS:.0f}")
    if mine["bytes"] > GOAL_MEMORY * GIB:
        missed.append(f"titanling: {mine['bytes'] / GIB:.2f} GiB above inputs and gradients, wanted {GOAL_MEMORY}")
    return missed


def main() -> int:
    """Arguments → contestants → table and JSON. Exit code 1 if the losses differ."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=60, help="leave out what does not fit in (default 60)")
    parser.add_argument("--json", metavar="OUT", help="also write the results here")
    parser.add_argument("--smoke", action="store_true", help="seconds: tiny sizes; the figures mean nothing")
    arguments = parser.parse_args()
    if arguments.device == "cpu" and not arguments.smoke:
        parser.error("on a CPU only --smoke makes sense: linear_cross_entropy.py measures a step there")
    device, started, left_out = torch.device(arguments.device), time.monotonic(), []
    sizes = (32, 16, 500) if arguments.smoke else (TOKENS, HIDDEN, VOCAB)
    results: dict[str, dict[str, float]] = {}
    print(f"{'':18}{'ms':>9}{'GiB above':>11}{'loss':>9}   {sizes[0]} tokens, hidden {sizes[1]}, vocabulary {sizes[2]}")
    for name, contestant in contestants().items():
        if time.monotonic() - started > arguments.seconds:
            left_out.append(name)
            continue
        try:
            results[name] = found = measure(contestant, device, sizes)
        except Exception as error:  # one contestant that fails must not cost the others their figures
            say(f"{name} failed: {type(error).__name__}: {error}")
            if name == "titanling":
                raise
            continue
        milliseconds, gib = 1000 * found["seconds"], found["bytes"] / GIB
        print(f"{name:18}{milliseconds:>9.1f}{gib:>11.2f}{found['loss']:>9.3f}", flush=True)
    clock = Clock(device, arguments.smoke)
    alone = rows_alone(clock, 8 if arguments.smoke else ROWS, sizes[2])
    print(f"{'the rows alone':18}{1000 * alone['seconds']:>9.2f}   {alone['of_copy']:.2f} of a copy's speed")
    losses = [found["loss"] for found in results.values()]
    differ = not max(losses) <= (1 + SAME_LOSS) * min(losses)
    missed = judge(results) if device.type == "cuda" else []
    print("\n".join(_ending(device, missed, left_out, differ)))
    about: dict[str, Any] = {"benchmark": "loss_gpu", "machine": machine() | describe(device)}
    about |= {"dry_run": arguments.smoke, "sizes": sizes, "results": results, "rows_alone": alone}
    write_json(arguments.json, about | {"missed": missed, "left_out": left_out})
    return int(differ)


def _ending(device: torch.device, missed: list[str], left_out: list[str], differ: bool) -> list[str]:
    lines = [f"not measured: {name}, out of time" for name in left_out]
    lines += ["PROBLEM: the losses differ"] if differ else []
    if device.type == "cpu":
        return [*lines, "dry run"]
    here = torch.cuda.get_device_name(device)
    if GOAL_DEVICE not in here:
        lines.append(f"the goals are those of one {GOAL_DEVICE}, and this is one {here}")
    return [*lines, *(["goals missed:", *missed] if missed else ["no goal missed"])]


if __name__ == "__main__":
    raise SystemExit(main())
