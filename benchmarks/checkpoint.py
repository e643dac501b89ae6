"""Saving and loading: the same bytes as checkpoints of ours and by safetensors alone; and what an async save costs.

One process trains a model; contestants take turns on its weights and Adam's state. Theirs: `save_file` of the model and
of the optimizer, and fsync; `safe_open` and a copy into the tensors that are there. Ours: the same bytes hashed while
they are written, manifest, fsync, rename; read with every hash verified. Loads find their files in the page cache.
"""

import sys
from os.path import dirname, realpath

sys.path.insert(0, dirname(dirname(realpath(__file__))))
from titanling import environment

environment.require(even_for_help=True)

import argparse
import contextlib
import io
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import ROOT, machine, say, write_json
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(ROOT / "tests"))

from helpers import make_tiny_data
from runs import open_trainer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from titanling.checkpoint import folder
from titanling.checkpoint.checkpointer import Checkpointer
from titanling.trainer import Trainer

EXAMPLE = "example: python benchmarks/checkpoint.py --rounds 5 --json results.json"
MODEL = {"model.dim": 768, "model.n_layers": 14, "model.n_heads": 12, "model.n_kv_heads": 4, "model.ffn_dim": 2304}
SMALL = {"model.dim": 64, "model.n_layers": 2, "model.ffn_dim": 128}
BATCH = {"training.seq_len": 256, "training.local_batch_size": 2, "training.global_batch_size": 2}
TARGETS = {
    "save": 0.7,
    "load, cold": 0.7,
    "load, warm": 0.7,
    "load unverified, warm": 0.7,
    "stall_of_sync_save": 0.1,
    "stall_in_steps": 1.0,
}
NAMES = ["step", "save", "safetensors save", "stall", "step while saving"]
NAMES += [f"{what}, {kind}" for kind in ("cold", "warm") for what in ("load", "load unverified", "safetensors load")]
Tensors = dict[str, Tensor]


def main() -> int:
    """Arguments → rounds → table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--rounds", type=int, default=5, help="times that each is measured (default 5)")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--json", metavar="OUT", help="also write the results here")
    parser.add_argument("--smoke", action="store_true", help="seconds: a tiny model, two rounds")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"benchmark": "checkpoint", "machine": machine()}
    rounds = 2 if arguments.smoke else arguments.rounds
    with tempfile.TemporaryDirectory(prefix="titanling-benchmark-", dir=arguments.folder) as temporary:
        results |= measure(Path(temporary), SMALL if arguments.smoke else MODEL, rounds)
    results["ratios"] = ratios(results["seconds"])
    results["targets"] = TARGETS
    report(results)
    write_json(arguments.json, results)
    return 0


def measure(where: Path, model: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Seconds of everything, one of each a round."""
    data = make_tiny_data(where / "data")
    changes = {**model, **BATCH, "training.steps": 10**6, "checkpoint.enable": True}
    with contextlib.redirect_stdout(io.StringIO()), open_trainer(where, data, changes) as trainer:
        trainer.train_step()
        weights, optimizer = trainer._tensors()
        size = sum(tensor.nbytes for tensor in (weights | optimizer).values())
        say(f"{size / 1e9:.2f} GB in {len(weights | optimizer)} tensors")
        seconds: dict[str, list[float]] = {name: [] for name in NAMES}
        ours = checkpointer(trainer, where / "sync", "disabled")
        behind = checkpointer(trainer, where / "async", "async")
        theirs = where / "theirs"
        save(trainer, behind)  # makes its buffers: the first save of a run takes longer
        behind.wait()
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            once(seconds["step"], trainer.train_step)
            once(seconds["save"], lambda: save(trainer, ours))
            ours.wait()
            once(seconds["safetensors save"], lambda: their_save(theirs, weights, optimizer))
            mine = folder.step_folder(ours.root, trainer.step)
            for kind, prepare in (("cold", forget), ("warm", warm)):
                prepare(mine)
                once(seconds[f"load, {kind}"], lambda: load(trainer, ours, verify=True))
                prepare(mine)
                once(seconds[f"load unverified, {kind}"], lambda: load(trainer, ours, verify=False))
                prepare(theirs)
                once(seconds[f"safetensors load, {kind}"], lambda: their_load(theirs, weights, optimizer))
            once(seconds["stall"], lambda: save(trainer, behind))
            once(seconds["step while saving"], trainer.train_step)
            behind.wait()
            shutil.rmtree(theirs)
    return {"bytes": size, "tensors": len(weights | optimizer), "seconds": seconds}


def once(into: list[float], action: Callable[[], object]) -> None:
    """Add the seconds that an action takes."""
    start = time.perf_counter()
    action()
    into.append(time.perf_counter() - start)


def checkpointer(trainer: Trainer, where: Path, mode: str) -> Checkpointer:
    """One that keeps its last two checkpoints in a folder of its own."""
    settings = trainer.config.checkpoint.model_copy(update={"async_mode": mode, "keep_latest_k": 2})
    return Checkpointer(settings, where, trainer.world, say=lambda text: None, warn=say)


def save(trainer: Trainer, ours: Checkpointer) -> None:
    """What the trainer does at an interval."""
    mine, trainer.checkpointer = trainer.checkpointer, ours
    try:
        trainer.save()
    finally:
        trainer.checkpointer = mine


def load(trainer: Trainer, ours: Checkpointer, verify: bool) -> None:
    """What the trainer does at its start."""
    ours.settings = ours.settings.model_copy(update={"verify": verify})
    assert ours.restore(*trainer._tensors(), 10**6, lambda *_: []) is not None


def their_save(where: Path, weights: Tensors, optimizer: Tensors) -> None:
    """The same bytes with safetensors."""
    where.mkdir()
    for name, tensors in (("model", weights), ("optimizer", optimizer)):
        path = where / f"{name}.safetensors"
        save_file(tensors, path)
        folder.sync(path)
    folder.sync(where)


def their_load(where: Path, weights: Tensors, optimizer: Tensors) -> None:
    """The same bytes with safetensors, into the tensors that are there."""
    for name, tensors in (("model", weights), ("optimizer", optimizer)):
        with safe_open(where / f"{name}.safetensors", "pt") as file:
            for key in file.keys():
                tensors[key].copy_(file.get_tensor(key))


def forget(where: Path) -> None:
    """Have no file of a folder in the page cache."""
    for path in where.rglob("*"):
        if path.is_file():
            folder.forget_cached(path)


def warm(where: Path) -> None:
    """Have all files of a folder in the page cache."""
    for path in where.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(2**24):
                    pass


def ratios(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """Taken within each round."""

    def each(above: str, below: str) -> list[float]:
        return [a / b for a, b in zip(seconds[above], seconds[below], strict=True)]

    return {
        "save": each("safetensors save", "save"),
        "load, cold": each("safetensors load, cold", "load, cold"),
        "load, warm": each("safetensors load, warm", "load, warm"),
        "load unverified, warm": each("safetensors load, warm", "load unverified, warm"),
        "stall_of_sync_save": each("stall", "save"),
        "stall_in_steps": each("stall", "step"),
    }


def report(results: dict[str, Any]) -> None:
    """Print medians."""
    size = results["bytes"]
    table = Table(title=f"checkpoints of {size / 1e9:.2f} GB in {results['tensors']} tensors")
    for column in ("", "median", "min … max", "target"):
        table.add_column(column, justify="right")
    for name, found in results["seconds"].items():
        rate = f"  {size / statistics.median(found) / 1e9:.2f} GB/s" if "step" not in name else ""
        table.add_row(name, f"{statistics.median(found):.3f} s{rate}", f"{min(found):.3f} … {max(found):.3f}", "")
    names = {
        "save": "our save's bandwidth / safetensors'",
        "load, cold": "our load's bandwidth / safetensors', from the disk",
        "load, warm": "– from the page cache",
        "load unverified, warm": "– from the page cache, verify = false",
        "stall_of_sync_save": "async stall / sync save",
        "stall_in_steps": "async stall / step",
    }
    for key, found in results["ratios"].items():
        limit = f"{'≤' if key.startswith('stall') else '≥'} {TARGETS[key]:g}"
        table.add_row(names[key], f"{statistics.median(found):.2f}", f"{min(found):.2f} … {max(found):.2f}", limit)
    Console(highlight=False).print(table)


if __name__ == "__main__":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    sys.exit(main())
