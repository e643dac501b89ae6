"""The first words of a run: what it trains, on what, how it is laid out."""

from collections.abc import Iterator, Sequence

import torch

from titanling import __version__
from titanling.config import Config
from titanling.model.presets import LlamaShape
from titanling.parallel.mesh import World
from titanling.parallel.plan import Plan, active


def introduction(
    config: Config,
    shape: LlamaShape,
    world: World,
    sizes: tuple[int, int],
    text: Sequence[str],
    plans: Sequence[Plan],
) -> Iterator[str]:
    """Lines. `sizes`: the sequences of a step, and its micro-batches on each rank. `text` is what the data say."""
    sequences, accumulation = sizes
    yield f"titanling {__version__}, torch {torch.__version__}: {config.job.description}"
    tied = ", tied embeddings" if shape.tie_embeddings else ""
    yield f"model: {shape.total_params:,} parameters, {shape.non_embedding_params:,} non-embedding{tied}"
    tokens = sequences * config.training.seq_len
    yield (
        f"batch: {sequences} × {config.training.seq_len} = {tokens:,} tokens a step, {accumulation} micro-batch"
        f"{'es' if accumulation > 1 else ''} on each of {world.size} process{'es' if world.size > 1 else ''}"
    )
    yield from text
    yield f"device: {world.device.type}"
    for plan in active(plans, world):
        yield f"{plan.name}: {plan.describe()}"
