"""Memory and time of a training step under three losses, on the CPU: what the chunked linear cross-entropy saves.

minilingua_30m with a vocabulary of 128,000, tied, eager, with fused AdamW, on 8 × 512 random tokens a step, which is an
eighth of its own micro-batch:

full      all logits, in float32, then torch's cross-entropy: what a plain loop does
in place  all logits, overwritten by their gradient
chunked   linear_cross_entropy: logits of some hundred tokens at a time

Each is a process of its own; all stay loaded and take turns, so that drift of the machine cancels in ratios. The peak
is of the process's whole RSS: libraries, weights, optimizer state, activations.
"""

import sys
from os.path import dirname, realpath

sys.path.insert(0, dirname(dirname(realpath(__file__))))
from titanling import environment

environment.require(even_for_help=True)

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

from contestants.protocol import LR, peak_rss
from harness import environment, machine, say, write_json
from rich.console import Console
from rich.table import Table

EXAMPLE = "example: python benchmarks/linear_cross_entropy.py --dtype bfloat16 --json results.json"
LOSSES = ("full", "in place", "chunked")
TARGET_MEMORY, TARGET_TIME = 0.5, 1.0
MIB = 2**20


def main() -> None:
    """Arguments → turns → table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="computed in")
    parser.add_argument("--tokens", type=int, default=4096, help="of a step, in sequences of 512 (default 4096)")
    parser.add_argument("--vocab", type=int, default=128_000, help="default 128000")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each loss, one step each (default 5)")
    parser.add_argument("--json", metavar="OUT", help="also write the results here")
    parser.add_argument("--smoke", action="store_true", help="seconds: tiny sizes; the ratios mean nothing")
    parser.add_argument("--child", choices=LOSSES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tokens < 512 or arguments.tokens % 512 or arguments.rounds < 1:
        parser.error("--tokens must be a multiple of 512, --rounds positive")
    if arguments.smoke:
        arguments.tokens, arguments.vocab, arguments.rounds = 512, 1000, 1
    if arguments.child:
        take_turns(arguments.child, arguments.dtype, arguments.tokens, arguments.vocab, arguments.smoke)
        return
    results: dict[str, Any] = {"benchmark": "linear_cross_entropy", "machine": machine()}
    results |= {key: getattr(arguments, key) for key in ("dtype", "tokens", "vocab", "rounds")}
    results["runs"] = runs = measure(arguments)
    results["ratios"] = {
        other: {
            "memory": runs["chunked"]["peak_rss"] / runs[other]["peak_rss"],
            "time": statistics.median(
                a / b for a, b in zip(runs["chunked"]["seconds"], runs[other]["seconds"], strict=True)
            ),
        }
        for other in LOSSES[:2]
    }
    report(results)
    write_json(arguments.json, results)


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Seconds of every turn, the losses and the peak of each process."""
    shared = ["--dtype", arguments.dtype, "--tokens", str(arguments.tokens), "--vocab", str(arguments.vocab)]
    shared += ["--smoke"] if arguments.smoke else []
    children = {
        name: subprocess.Popen(
            [sys.executable, __file__, "--child", name, *shared],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for name in LOSSES
    }
    found: dict[str, dict[str, Any]] = {name: {"seconds": [], "losses": []} for name in LOSSES}
    for turn in range(-1, arguments.rounds):
        say("warm-up" if turn < 0 else f"round {turn + 1}")
        for name, child in children.items():
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write("\n")
            child.stdin.flush()
            answer = json.loads(child.stdout.readline())
            found[name]["peak_rss"] = answer["peak_rss"]
            found[name]["losses"].append(answer["loss"])
            if turn >= 0:
                found[name]["seconds"].append(answer["seconds"])
    for child in children.values():
        child.communicate()
    return found


def take_turns(name: str, dtype: str, tokens: int, vocab: int, smoke: bool) -> None:
    """The child: one step for each line on stdin, answered by one line of JSON."""
    import torch

    step = build(name, getattr(torch, dtype), tokens, vocab, smoke)
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = step()
        print(json.dumps({"seconds": time.perf_counter() - start, "loss": loss, "peak_rss": peak_rss()}), flush=True)


def build(name: str, dtype: Any, tokens: int, vocab: int, smoke: bool) -> Callable[[], float]:
    """A training step that returns its loss."""
    import torch
    from torch import Tensor
    from torch.nn.functional import cross_entropy

    from titanling.config.schema import Model
    from titanling.loss import cross_entropy_sum, head_cross_entropy_sum
    from titanling.model.llama import Llama
    from titanling.model.presets import resolve_shape

    torch.manual_seed(0)
    sizes = {"dim": 48, "n_layers": 2, "ffn_dim": 128} if smoke else {}
    model = Llama(resolve_shape(Model(flavor="minilingua_30m", vocab_size=vocab, **sizes)))
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.02)
    model.model.embed_tokens.register_forward_hook(lambda _, __, output: output.to(dtype))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    text = torch.randint(vocab, (tokens // 512, 513))
    ids, labels = text[:, :-1], text[:, 1:].contiguous()
    losses: dict[str, Callable[[], Tensor]] = {
        "full": lambda: cross_entropy(model(ids).flatten(0, 1).float(), labels.flatten(), reduction="sum"),
        "in place": lambda: cross_entropy_sum(model(ids), labels),
        "chunked": lambda: model(ids, loss=lambda hidden, weight: head_cross_entropy_sum(hidden, weight, labels)),
    }

    def step() -> float:
        loss = losses[name]() / tokens
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def report(results: dict[str, Any]) -> None:
    """Print a row for each loss."""
    title = f"a step of {results['tokens']:,} tokens, vocabulary {results['vocab']:,}, {results['dtype']}"
    table = Table(title=title)
    for column in ("loss", "peak RSS, MiB", "seconds a step", "chunked: memory", "chunked: time"):
        table.add_column(column, justify="right")
    for name, run in results["runs"].items():
        ratio = results["ratios"].get(name)
        ratios = [f"{ratio['memory']:.2f} ×", f"{ratio['time']:.2f} ×"] if ratio else ["", ""]
        seconds = f"{statistics.median(run['seconds']):.2f} ({min(run['seconds']):.2f} … {max(run['seconds']):.2f})"
        table.add_row(name, f"{run['peak_rss'] / MIB:,.0f}", seconds, *ratios)
    console = Console()
    console.print(table)
    console.print(f"targets against full: memory {TARGET_MEMORY} ×, time {TARGET_TIME} ×", highlight=False)


if __name__ == "__main__":
    main()
