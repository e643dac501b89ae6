"""The cheapest changes that make a setup fit, each planned anew."""

from collections.abc import Iterator
from typing import Any

from titanling.errors import UserError
from titanling.planner.forecast import Forecast, forecast
from titanling.planner.setup import Setup

Changes = dict[str, Any]
ENOUGH = 5
"""So many that fit are shown."""


def remedies(planned: Forecast, enough: int = ENOUGH) -> list[tuple[Changes, Forecast]]:
    """Changes of the config, from cheap to dear, after which it fits; the global batch stays what it is.

    Each is tried alone, and then together with recomputing every block. If none makes it fit, the one that comes
    closest is returned, if any comes closer at all.
    """
    setup = planned.setup
    found: list[tuple[Changes, Forecast]] = []
    closest: tuple[Changes, Forecast] | None = None
    for wanted in candidates(setup):
        changes = {key: value for key, value in wanted.items() if value != _value(setup, key)}
        try:
            tried = forecast(setup.changed(changes), quick=True)
        except (UserError, ValueError):  # it does not divide so, or contradicts another key
            continue
        if tried.fits:
            if any(tried.memory == other.memory for _, other in found):
                continue  # another way to write a change that is there already
            found.append((changes, tried))
            if len(found) == enough:
                break
        elif tried.memory.peak < (closest[1] if closest is not None else planned).memory.peak:
            closest = (changes, tried)
    return found or ([closest] if closest is not None else [])


def candidates(setup: Setup) -> Iterator[Changes]:
    """In order of cost: what computes again, what adds up, what sends more, what leaves the device."""
    config, degrees = setup.config, setup.degrees
    batch = {"training.global_batch_size": setup.tokens // config.training.seq_len}
    full = {"activation_checkpoint.mode": "full"}
    if not config.compile.enable:
        yield {"compile.enable": True}
    modes: list[Changes] = []
    if config.activation_checkpoint.mode == "none":
        modes.append({"activation_checkpoint.mode": "selective", "activation_checkpoint.selective_ac_option": "op"})
    if config.activation_checkpoint.mode != "full":
        modes.append(full)
    yield from modes
    single = list(_layouts(setup, batch))
    yield from single
    if modes:
        yield from (changes | full for changes in single)
    smallest = {"training.local_batch_size": 1} | batch
    yield from (full | smallest | changes for changes in single if "training.local_batch_size" not in changes)
    if degrees.fsdp > 1 and not config.training.enable_cpu_offload:
        yield {"training.enable_cpu_offload": True}
        yield full | smallest | {"training.enable_cpu_offload": True}


def _layouts(setup: Setup, batch: Changes) -> Iterator[Changes]:
    training, degrees = setup.config.training, setup.degrees
    local = training.local_batch_size // 2
    while local:
        yield {"training.local_batch_size": local} | batch
        local //= 2
    if setup.reshards is not True and setup.fsdp:
        yield {"parallelism.fsdp_reshard_after_forward": "always"}
    free = {"parallelism.data_parallel_shard_degree": -1}
    if degrees.dp_replicate > 1:
        yield {"parallelism.data_parallel_replicate_degree": 1} | free
    keys = {"tp": "tensor", "cp": "context", "pp": "pipeline"}
    for name, word in keys.items():
        degree = getattr(degrees, name) * 2
        while degree <= (setup.hardware.per_node if name != "pp" else 16) and degree <= setup.world:
            yield {f"parallelism.{word}_parallel_degree": degree} | free | batch
            degree *= 2


def _value(setup: Setup, dotted: str) -> Any:
    table, _, key = dotted.partition(".")
    return getattr(getattr(setup.config, table), key)
