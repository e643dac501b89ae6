"""What one launch of layouts.py works with: trainers under any layout, and one process to compare them with."""

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from helpers import TinyData
from runs import Tensors, differing, full, live_tensors, of_all_stages, open_trainer
from table import GLOBAL_BATCH, MODELS

from titanling.trainer import Trainer

STEPS = 5
RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
WITHOUT_CHECKPOINTS = {
    "checkpoint.enable": False,
    "training.steps": 1000,
    "training.global_batch_size": GLOBAL_BATCH,
    "comm.init_timeout_seconds": 60,
}


class Run(NamedTuple):
    """What a run did, whole tensors on every rank."""

    initial: Tensors
    losses: list[float]
    norms: list[float]
    gradients: list[Tensors]
    final: Tensors


class Suite:
    """The folder, the data and the references of one launch."""

    def __init__(self, folder: Path, data: TinyData) -> None:
        self.folder, self.data = folder, data
        # The documents of the tiny data are longer than its sequences: where they are masked, this one closes them.
        self.eod_id = int(np.bincount(np.fromfile(f"{data.train}.bin", np.uint16)).argmax())
        self.references: dict[str, Run] = {}
        self.groups = self.runs = 0
        self.first_port = int(os.environ["MASTER_PORT"])
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)

    @contextmanager
    def trainer(self, *changes: Mapping[str, Any], run: str | None = None) -> Iterator[Trainer]:
        """A trainer with these settings, in a run folder of its own unless `run` names one."""
        if "RANK" in os.environ:
            # A process group of its own, at an address that no earlier one has used.
            self.groups += 1
            os.environ["MASTER_PORT"] = str(self.first_port + self.groups)
        self.runs += 1
        merged = {"job.dump_folder": str(self.folder / (run or f"rank{RANK}-run{self.runs}"))}
        for change in changes:
            merged |= change
        # The TOML is each rank's own, so that none reads it while another writes it.
        with open_trainer(self.folder / f"rank{RANK}", self.data, merged) as trainer:
            if trainer.eod_id is not None:
                trainer.eod_id = self.eod_id
                if trainer.config.validation.enable:
                    trainer.held_out.eod_id = self.eod_id
            yield trainer

    def run(self, *changes: Mapping[str, Any]) -> Run:
        """Train STEPS steps."""
        with self.trainer(WITHOUT_CHECKPOINTS, *changes) as trainer:
            initial, gradients = live_tensors(trainer), []
            trainer.optimizer.register_step_pre_hook(lambda *_: gradients.append(gradients_of(trainer)))
            losses, norms = [], []
            for _ in range(STEPS):
                loss, norm, _ = trainer.train_step()
                losses.append(trainer.world.sum_(loss.clone()).item())
                norms.append(norm.item())
            return Run(initial, losses, norms, gradients, live_tensors(trainer))

    def compare(self, model: str, *layout: Mapping[str, Any]) -> dict[str, Any]:
        """The differences between a run under a layout and one in a single process, in float32 and eager."""
        if model not in self.references:
            with alone():
                self.references[model] = self.run(MODELS[model], {"training.local_batch_size": GLOBAL_BATCH})
        mine, reference = self.run(MODELS[model], *layout), self.references[model]
        gc.collect()  # trainers hold themselves in circles
        return {
            "initial_differing": differing(mine.initial, reference.initial),
            "final_names": mine.final.keys() == reference.final.keys(),
            "loss": max(abs(a - b) for a, b in zip(mine.losses, reference.losses, strict=True)),
            "norm": max(abs(a - b) / b for a, b in zip(mine.norms, reference.norms, strict=True)),
            "gradient": max(map(gradient_error, mine.gradients, reference.gradients)),
        }


def gradients_of(trainer: Trainer) -> Tensors:
    """Whole clipped gradients, just before the update."""
    found = {name: full(p.grad) for name, p in trainer.runner.named_parameters() if p.grad is not None}
    return of_all_stages(trainer, found)


def gradient_error(mine: Tensors, reference: Tensors) -> float:
    """The largest relative error (2-norm) of any parameter's gradient."""
    assert mine.keys() == reference.keys()
    return max(float((mine[n] - reference[n]).norm() / reference[n].norm()) for n in reference)


@contextmanager
def alone() -> Iterator[None]:
    """Let what is built here believe that this process is the only one. Every rank computes its own reference."""
    others = {name: os.environ.pop(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    try:
        yield
    finally:
        os.environ.update(others)
