"""The first words of a run: what it trains, on what, how it is laid out. Imports no torch by itself."""

from collections.abc import Iterator, Sequence

from titanling import __version__
from titanling.config import Config
from titanling.model.presets import LlamaShape


def introduction(
    config: Config,
    shape: LlamaShape,
    sequences: int,
    accumulation: int,
    processes: int,
    device: str,
    text: Sequence[str],
    plans: Sequence[str],
) -> Iterator[str]:
    """Lines. `sequences` is those of a step, `accumulation` its micro-batches on each of the `processes`.

    `text` and `plans` are what data and layout say of themselves.
    """
    import torch

    yield f"titanling {__version__}, torch {torch.__version__}: {config.job.description}"
    tied = ", tied embeddings" if shape.tie_embeddings else ""
    yield f"model: {shape.total_params:,} parameters, {shape.non_embedding_params:,} non-embedding{tied}"
    tokens = sequences * config.training.seq_len
    yield (
        f"batch: {sequences} × {config.training.seq_len} = {tokens:,} tokens a step, {accumulation} micro-batch"
        f"{'es' if accumulation > 1 else ''} on each of {processes} process{'es' if processes > 1 else ''}"
    )
    yield from text
    yield f"device: {device}"
    yield from plans
