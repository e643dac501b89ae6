"""What the files of a version give: which tensors a run loads, which samples follow, which losses.

Shared by make.py, which notes it in expected.json with the version that wrote the files, and by the tests. Everything
happens in the current folder, for the configs name their files from there.
"""

import gc
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from runs import Tensors, live_tensors
from safetensors.torch import load_file
from torch import Tensor

from titanling.config import load_config
from titanling.model.presets import resolve_shape
from titanling.parallel.degrees import resolve_degrees
from titanling.parallel.runner import Batch
from titanling.trainer import Trainer

AT_ONE_RANK = ("one", "streams", "mixture", "float16", "bfloat16")
AT_TWO_RANKS = {"fsdp": {"data_parallel_shard_degree": 2}, "pipeline": {"pipeline_parallel_degree": 2}}
"""Run → what of [parallelism] makes it one of two ranks."""
RUNS = (*AT_ONE_RANK, *AT_TWO_RANKS)
STEPS = 2
"""How many steps each run has behind it, and how many are looked at after them."""
CUT = 20
"""Characters of a hash that are kept."""


@contextmanager
def opened(run: str, overrides: dict[str, Any] | None = None, folder: str | None = None) -> Iterator[Trainer]:
    """The trainer of runs/`run`, with the config that lies in it, gone on with; in runs/`folder` if that is given."""
    if "RANK" in os.environ:  # a process group of its own, at an address that no earlier one has used
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    settings: dict[str, Any] = {"training.steps": 2 * STEPS, "job.dump_folder": f"runs/{folder or run}"}
    config = load_config(f"runs/{run}/config.toml", settings | dict(overrides or {})).config
    trainer = Trainer(
        config, resolve_shape(config.model), resolve_degrees(config.parallelism, int(os.environ.get("WORLD_SIZE", "1")))
    )
    try:
        yield trainer
    finally:
        trainer.close()
        gc.enable()  # Trainer.train switches it off


def outcome(run: str, overrides: dict[str, Any] | None = None) -> tuple[dict[str, Any], Tensors]:
    """What a run loads and does next: JSON, the same on every rank; and what it ends with. Nothing is saved."""
    with opened(run, overrides) as trainer:
        step, tensors = trainer.step, live_tensors(trainer)
        read: list[list[int]] = []
        trainer.batches = _noting(trainer.batches, read)
        losses = [train_step(trainer) for _ in range(STEPS)]
        rows = sorted({tuple(row) for rank in trainer.world.gather(read) for row in rank})
        found = {
            "step": step,
            "tensors": hashes(tensors),
            "next_row": list(rows[0]),
            "next_rows": hashlib.sha256(repr(rows).encode()).hexdigest()[:CUT],
            "losses": losses,
        }
        return found, live_tensors(trainer)


def interrupted_again(run: str, overrides: dict[str, Any] | None = None) -> Tensors:
    """What a run ends with that is saved and gone on with once more before its last step."""
    with opened(run, overrides) as trainer:
        train_step(trainer)
        trainer.save()
        trainer.checkpointer.finish()
    with opened(run, overrides) as trainer:
        assert trainer.step == STEPS + 1
        train_step(trainer)
        return live_tensors(trainer)


def _noting(batches: Iterator[Batch], read: list[list[int]]) -> Iterator[Batch]:
    for batch in batches:
        read += batch["input_ids"].tolist()
        yield batch


def train_step(trainer: Trainer) -> float:
    """One step; its loss, of all ranks together."""
    loss, _, _ = trainer.train_step()
    return trainer.world.sum_(loss).item()


def hashes(tensors: Tensors) -> dict[str, str]:
    """Name → type, shape and hash of the bytes of each tensor."""
    return {name: _hash(tensor) for name, tensor in sorted(tensors.items())}


def of_folder(folder: str | Path) -> dict[str, str]:
    """`hashes` of all tensors in a folder's safetensors files, read with safetensors alone."""
    return hashes({name: t for path in Path(folder).glob("*.safetensors") for name, t in load_file(path).items()})


def _hash(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    shape = "×".join(map(str, tensor.shape))
    return f"{str(tensor.dtype).removeprefix('torch.')} {shape} {hashlib.sha256(content).hexdigest()[:CUT]}"
