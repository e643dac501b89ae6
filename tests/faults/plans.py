"""Plans for runs of the table of faults, given as parallelism.plans: what they do happens inside a real command."""

import hashlib
import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titanling.parallel.mesh import World
from titanling.parallel.plan import Plan


class Poison(Plan):
    """On rank 1, the gradient of the forward pass number $POISON_AT is nan."""

    name = "poison"

    def __init__(self) -> None:
        self._passes = 0

    def apply(self, model: nn.Module, world: World) -> None:
        """Watch the embedding's output."""
        at = int(os.environ["POISON_AT"])

        def forward(module: nn.Module, inputs: object, output: Tensor) -> None:
            self._passes += torch.is_grad_enabled()
            if world.rank == 1 and self._passes == at and output.requires_grad:
                output.register_hook(lambda gradient: gradient * float("nan"))

        model.model.embed_tokens.register_forward_hook(forward)

    def describe(self) -> str:
        """What is put where."""
        return f"nan into pass {os.environ['POISON_AT']} of rank 1"


class Record(Plan):
    """Writes a hash of every sequence that the model trains on to $RECORD_TO, a file for each rank."""

    name = "record"

    def apply(self, model: nn.Module, world: World) -> None:
        """Watch the embedding's input."""
        path = Path(os.environ["RECORD_TO"]) / f"rank-{world.rank}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)

        def forward(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if torch.is_grad_enabled():
                whole = inputs[0].full_tensor() if isinstance(inputs[0], DTensor) else inputs[0]
                with path.open("a") as file:
                    for ids in whole.tolist():
                        file.write(json.dumps(hashlib.sha256(str(ids).encode()).hexdigest()[:16]) + "\n")

        model.model.embed_tokens.register_forward_pre_hook(forward)

    def describe(self) -> str:
        """Where to."""
        return f"hashes of all sequences to {os.environ['RECORD_TO']}"
