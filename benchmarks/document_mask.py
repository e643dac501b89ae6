"""A training step with document masks against one without, on the CPU, in one run.

minilingua_30m with a small vocabulary (the head costs the same in both, and would only hide the difference), eager,
with fused AdamW, on 2,048 random tokens a step in sequences of 512 and of 2,048. Documents have random lengths of a
given mean. Both steps take turns on the same model, so that drift of the machine cancels in their ratio.
"""

import sys
from os.path import dirname, realpath

sys.path.insert(0, dirname(dirname(realpath(__file__))))
from titanling import environment

environment.require(even_for_help=True)

import argparse
import statistics
import time
from typing import Any

import torch
from contestants.protocol import LR
from harness import machine, say, write_json
from rich.console import Console
from rich.table import Table

from titanling.config.schema import Model
from titanling.data.documents import separate_documents
from titanling.loss import head_cross_entropy_sum
from titanling.model.llama import Llama
from titanling.model.presets import resolve_shape

EXAMPLE = "example: python benchmarks/document_mask.py --dtype bfloat16 --json results.json"
TOKENS, EOD = 2048, 0
TARGET = 1.15

Batch = dict[str, torch.Tensor]


def main() -> None:
    """Arguments → cells → table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="computed in")
    parser.add_argument("--lengths", type=int, nargs="+", default=[50, 400, 4000], help="mean tokens of a document")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each step (default 5)")
    parser.add_argument("--vocab", type=int, default=8192, help="default 8192")
    parser.add_argument("--json", metavar="OUT", help="also write the results here")
    parser.add_argument("--smoke", action="store_true", help="seconds: a tiny model; the ratios mean nothing")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or min(arguments.lengths) < 2:
        parser.error("--rounds must be positive, --lengths 2 or more")
    sizes = {"dim": 48, "n_layers": 2, "ffn_dim": 128, "vocab_size": 500} if arguments.smoke else {}
    results: dict[str, Any] = {"benchmark": "document_mask", "machine": machine(), "target": TARGET}
    results |= {"dtype": arguments.dtype, "torch": torch.__version__, "cells": []}
    shape = Model(flavor="minilingua_30m", **({"vocab_size": arguments.vocab} | sizes))
    for seq_len in (512, 2048):
        for length in arguments.lengths:
            say(f"sequences of {seq_len}, documents of {length}")
            cell = measure(shape, getattr(torch, arguments.dtype), seq_len, length, arguments.rounds)
            results["cells"].append({"seq_len": seq_len, "document": length} | cell)
    report(results)
    write_json(arguments.json, results)


def measure(sizes: Model, dtype: torch.dtype, seq_len: int, length: int, rounds: int) -> dict[str, Any]:
    """Seconds of each step, plain and masked in turns, and the median of their ratios."""
    torch.manual_seed(0)
    model = Llama(resolve_shape(sizes))
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.02)
    model.model.embed_tokens.register_forward_hook(lambda _, __, output: output.to(dtype))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    text = torch.randint(1, model.shape.vocab_size, (TOKENS // seq_len, seq_len + 1))
    text[torch.rand(text.shape) < 1 / length] = EOD
    batch = {"input_ids": text[:, :-1].contiguous(), "labels": text[:, 1:].contiguous()}
    seconds: dict[str, list[float]] = {"plain": [], "masked": []}
    for turn in range(-1, rounds):
        for name, eod_id in (("plain", None), ("masked", EOD)):
            start = time.perf_counter()
            step(model, optimizer, separate_documents(batch, eod_id))
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    ratios = [masked / plain for plain, masked in zip(seconds["plain"], seconds["masked"], strict=True)]
    return {"seconds": seconds, "ratios": ratios, "ratio": statistics.median(ratios)}


def step(model: Llama, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """One training step."""
    labels = batch["labels"]
    model(
        batch["input_ids"],
        batch.get("positions"),
        loss=lambda hidden, weight: head_cross_entropy_sum(hidden, weight, labels) / TOKENS,
    ).backward()
    optimizer.step()
    optimizer.zero_grad()


def report(results: dict[str, Any]) -> None:
    """Print a row for each cell."""
    table = Table(title=f"a step of {TOKENS:,} tokens, {results['dtype']}")
    for column in ("seq_len", "document", "plain, s", "masked, s", "masked / plain", "min … max"):
        table.add_column(column, justify="right")
    for cell in results["cells"]:
        seconds = [f"{statistics.median(cell['seconds'][name]):.3f}" for name in ("plain", "masked")]
        spread = f"{min(cell['ratios']):.2f} … {max(cell['ratios']):.2f}"
        table.add_row(str(cell["seq_len"]), str(cell["document"]), *seconds, f"{cell['ratio']:.2f} ×", spread)
    console = Console()
    console.print(table)
    console.print(f"target: {TARGET} × or less", highlight=False)


if __name__ == "__main__":
    main()
