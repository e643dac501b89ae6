"""Under torchrun: a run on streaming sources, read by workers of each of two ranks, stopped and gone on with."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from helpers import TinyData
from runs import differing, live_tensors
from suite import RANK, Suite, alone

from titanling import cli
from titanling.errors import UserError

STEPS = 6


def main(folder: Path, data: TinyData) -> None:
    """Write on rank 0 what test_streams.py judges."""
    suite = Suite(folder, data)
    settings: dict[str, Any] = {
        "data.train": None,
        "data.sources": [{"name": "x", "kind": "jsonl", "paths": [str(folder / "*.jsonl")], "weight": 1.0}],
        "data.workers": 2,
        "data.shuffle_buffer": 5,
        "parallelism.data_parallel_shard_degree": 2,
        "training.global_batch_size": 8,
        "training.steps": STEPS,
        "checkpoint.interval": 3,
    }
    with suite.trainer(settings, run="straight") as trainer:
        trainer.train()
        straight = live_tensors(trainer)
        seen = trainer.world.gather([next(trainer.batches)["input_ids"].tolist() for _ in range(6)])
    with suite.trainer(settings, {"training.steps": 3, "lr_scheduler.total_steps": STEPS}, run="stopped") as trainer:
        trainer.train()
    refused = ""
    if RANK == 0:
        other = {"parallelism.data_parallel_shard_degree": 1, "training.global_batch_size": 4}
        try:
            with alone(), suite.trainer(settings, other, run="stopped"):
                pass
        except UserError as error:
            refused = str(error)
    with suite.trainer(settings, run="stopped") as trainer:
        step = trainer.step
        trainer.train()
        resumed = differing(straight, live_tensors(trainer))
    bad = {"data.sources": [{"name": "x", "kind": "jsonl", "paths": [str(folder / "bad/*.jsonl")], "weight": 1.0}]}
    try:
        with suite.trainer(settings, bad, {"data.workers": 0}, run="bad") as trainer:
            trainer.train()
        error = ""
    except UserError as one:
        error = str(one)
    (folder / f"error-{RANK}.txt").write_text(error, encoding="utf-8")
    if RANK == 0:
        result = {"resumed": resumed, "step": step, "refused": refused, "seen": seen}
        (folder / "results.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    cli.run(lambda: main(Path(sys.argv[2]), TinyData(*map(str, json.loads(sys.argv[3])))))
