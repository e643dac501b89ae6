"""How many ranks do what. Imports no torch, so that a mismatch costs no start-up."""

import os
from dataclasses import dataclass

from titanling.config.schema import Parallelism, Training
from titanling.errors import UserError


@dataclass(frozen=True)
class Degrees:
    """Sizes of the mesh's dimensions; their product is the world size."""

    dp_replicate: int
    dp_shard: int

    @property
    def dp(self) -> int:
        """Ranks that see different data."""
        return self.dp_replicate * self.dp_shard


def world_size() -> int:
    """Number of processes of this run, as torchrun tells each of them; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def resolve_degrees(settings: Parallelism, world: int) -> Degrees:
    """Fill in -1 and check the degrees against the world size. Raises UserError if they do not multiply to it."""
    replicate, shard = settings.data_parallel_replicate_degree, settings.data_parallel_shard_degree
    if shard == -1:
        shard = max(1, world // replicate)
    if replicate * shard != world:
        raise UserError(
            f"parallelism.data_parallel_replicate_degree = {replicate} × data_parallel_shard_degree ="
            f" {settings.data_parallel_shard_degree} does not fit {world} process{'es' if world > 1 else ''}"
            " (NGPU × NNODES); their product must be the number of processes"
        )
    return Degrees(replicate, shard)


def accumulation_steps(training: Training, dp: int) -> int:
    """Micro-batches in one optimizer step on each rank. Raises UserError if the global batch does not divide."""
    together = training.local_batch_size * dp
    if training.global_batch_size == -1:
        return 1
    if training.global_batch_size % together:
        raise UserError(
            f"training.global_batch_size = {training.global_batch_size} is not a multiple of"
            f" training.local_batch_size = {training.local_batch_size} × {dp} data-parallel ranks = {together}"
        )
    return training.global_batch_size // together
