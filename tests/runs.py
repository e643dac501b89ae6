"""Trainers inside the test process, and what their runs leave on disk, for the tests that compare runs bit by bit."""

import gc
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import TinyData, tiny_config
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from titanling.config import load_config
from titanling.model.presets import resolve_shape
from titanling.parallel.degrees import resolve_degrees
from titanling.ranks import this_process
from titanling.trainer import Trainer

Tensors = dict[str, Tensor]


@contextmanager
def open_trainer(folder: Path, data: TinyData, changes: Mapping[str, Any] | None = None) -> Iterator[Trainer]:
    """A trainer of `tiny_settings` with `changes`, in the world that the environment names; closed at the end."""
    config = load_config(tiny_config(folder, data, changes)).config
    trainer = Trainer(config, resolve_shape(config.model), resolve_degrees(config.parallelism, this_process().size))
    try:
        yield trainer
    finally:
        trainer.close()
        gc.enable()  # Trainer.train switches it off


def gather_any(trainer: Trainer, value: Any) -> list[Any]:
    """Every rank's `value`, of any kind."""
    values = [value] * trainer.world.size
    if trainer.world.mesh is not None:
        dist.all_gather_object(values, value)
    return values


def full(tensor: Tensor) -> Tensor:
    """A copy of the whole tensor; a collective where it is sharded."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def live_tensors(trainer: Trainer) -> Tensors:
    """Whole copies of all weights and optimizer state, by name."""
    weights, optimizer = trainer._tensors()
    return of_all_stages(trainer, {name: full(tensor) for name, tensor in (weights | optimizer).items()})


def of_all_stages(trainer: Trainer, tensors: Tensors) -> Tensors:
    """With what the other stages of a pipeline hold, in the order of the stages."""
    if trainer.world.degrees.pp == 1:
        return tensors
    return {name: tensor for part in gather_any(trainer, tensors) for name, tensor in part.items()}


def saved_tensors(checkpoint: Path) -> Tensors:
    """All tensors of a checkpoint that one process saved, read with safetensors alone."""
    tensors: Tensors = {}
    for path in sorted(checkpoint.glob("*/*.safetensors")):
        for name, tensor in load_file(path).items():
            assert name not in tensors, f"{name} is in two files"
            tensors[name] = tensor
    return tensors


def saved_shards(checkpoint: Path) -> Tensors:
    """All tensors of a checkpoint as they lie on disk, by file and name, whoever saved which part."""
    return {
        f"{path.relative_to(checkpoint)}: {name}": tensor
        for path in sorted(checkpoint.glob("*/*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def differing(left: Tensors, right: Tensors) -> list[str]:
    """Names of the tensors that are not equal bit for bit (or are in one of the two only)."""
    both = left.keys() & right.keys()
    different = [name for name in both if left[name].dtype != right[name].dtype or not _same(left[name], right[name])]
    return sorted([*(left.keys() ^ right.keys()), *different])


def rows(run_folder: Path, key: str = "loss") -> list[tuple[int, Any]]:
    """(step, value) of each row of metrics.jsonl that has `key`, in the order of the file."""
    lines = (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [(row["step"], row[key]) for row in map(json.loads, lines) if key in row]


def _same(left: Tensor, right: Tensor) -> bool:
    # Bytes, not values: nan equals itself and -0.0 is not 0.0.
    return left.shape == right.shape and torch.equal(
        left.contiguous().reshape(-1).view(torch.uint8), right.contiguous().reshape(-1).view(torch.uint8)
    )
