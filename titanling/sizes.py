"""What cannot be held by any means, said before anything is allocated. Imports no torch."""

import os
from collections.abc import Iterator

from titanling.config import Config
from titanling.errors import UserError
from titanling.metrics.hardware import device_memory
from titanling.model.presets import LlamaShape
from titanling.parallel.degrees import Degrees, sequences_per_step
from titanling.ranks import this_process

MOST_TOKENS = 2**63
"""Tokens are counted in 64 bits."""
TOKEN_BYTES = 16
"""Of a token of a batch in the host's memory: its id and its label, both int64."""


def host_memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_batches(config: Config, degrees: Degrees, memory: int) -> None:
    """Raise UserError if the batches of one process are more than its machine's `memory`, or tokens uncountable."""
    training, validation = config.training, config.validation
    sequences = sequences_per_step(training, degrees.dp)
    size = f"global_batch_size = {training.global_batch_size}, seq_len = {training.seq_len}"
    name = f"training.local_batch_size = {training.local_batch_size}, {size}"
    _refuse(name, sequences // degrees.dp * training.seq_len, memory)
    if validation.enable:
        seq_len = validation.seq_len or training.seq_len
        name = f"validation.local_batch_size = {validation.local_batch_size}, seq_len = {seq_len}"
        _refuse(name, validation.local_batch_size * seq_len, memory)
    if training.steps * sequences * training.seq_len >= MOST_TOKENS:
        raise UserError(
            f"training.steps = {training.steps}: of {sequences} × {training.seq_len} tokens each are more than 2^63"
            " tokens, which nobody can count; lower it"
        )


def _refuse(setting: str, tokens: int, memory: int) -> None:
    if tokens * TOKEN_BYTES > memory:
        raise UserError(
            f"{setting}: the {tokens:,} tokens of a process are {_gib(tokens * TOKEN_BYTES)}, and this machine has"
            f" {_gib(memory)}; lower it"
        )


def room(device_type: str) -> tuple[int, int]:
    """Bytes of this process's device, and how many processes share it: a GPU is one's own."""
    return device_memory(device_type).total, 1 if device_type == "cuda" else this_process().per_node or 1


def check_device(config: Config, shape: LlamaShape, degrees: Degrees, memory: int, sharing: int) -> None:
    """Raise UserError if a device of `memory` bytes, which `sharing` processes share, cannot hold what each needs.

    The least of it: the weights and what is held beside each; hidden states of one block; keys and values of a sample.
    """
    for setting, needed in _needs(config, shape, degrees):
        if needed * sharing > memory:
            each = f"each of the {sharing} processes" if sharing > 1 else "the process"
            raise UserError(
                f"{setting} that {each} needs at least {_gib(needed)}, and there are {_gib(memory)}; lower it, or"
                " divide it over more processes (scripts/plan.py says what fits)"
            )


def _needs(config: Config, shape: LlamaShape, degrees: Degrees) -> Iterator[tuple[str, int]]:
    training, sampling, validation = config.training, config.sampling, config.validation
    width = 2 if training.dtype == "bfloat16" else 4
    own = shape.total_params // (degrees.fsdp * degrees.tp * degrees.pp)
    sizes = ", ".join(f"{key} = {getattr(shape, key)}" for key in ("n_layers", "dim", "ffn_dim", "vocab_size"))
    if not (training.enable_cpu_offload and degrees.fsdp > 1):
        model = f"model.{sizes}: has {shape.total_params:,} parameters, for whose weights, gradients and moments it is"
        yield model, own * width * 4
    hidden = 2 * shape.dim // (degrees.cp * degrees.tp)  # in the type of the compute, for each token
    rows = config.parallelism.pipeline_parallel_microbatch_size if degrees.pp > 1 else training.local_batch_size
    states = "so many hidden states"
    yield f"training.local_batch_size = {rows}: makes {states}", rows * training.seq_len * hidden
    if validation.enable:
        rows, seq_len = validation.local_batch_size, validation.seq_len or training.seq_len
        yield f"validation.local_batch_size = {rows}: makes {states}", rows * seq_len * hidden
    if sampling.freq:
        cached = 4 * shape.n_layers * shape.n_kv_heads * shape.head_dim // (degrees.cp * degrees.pp * degrees.tp)
        text = f"sampling.max_new_tokens = {sampling.max_new_tokens}: makes so many keys and values"
        yield text, sampling.max_new_tokens * max(8, cached)


def _gib(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"
