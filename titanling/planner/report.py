"""A forecast as a terminal table, and as JSON."""

import math
import re
from collections import Counter
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from titanling.planner.activations import activations, kept
from titanling.planner.forecast import Forecast
from titanling.planner.hardware import GIB
from titanling.planner.memory import in_flight
from titanling.planner.place import Placed
from titanling.planner.remedy import Changes

Remedies = list[tuple[Changes, Forecast]]


def show(planned: Forecast, remedies: Remedies, console: Console) -> None:
    """Print everything."""
    _head(planned, console)
    _parameters(planned, console)
    _memory(planned, console)
    _collectives(planned, console)
    _speed(planned, console)
    if not planned.fits:
        _remedies(planned, remedies, console)


def as_json(planned: Forecast, remedies: Remedies) -> dict[str, Any]:
    """Everything, in bytes, seconds, FLOPs."""
    setup, memory = planned.setup, planned.memory
    return {
        "hardware": asdict(setup.hardware),
        "world_size": setup.world,
        "mesh": asdict(setup.degrees),
        "plans": dict(planned.plans),
        "micro_batches": setup.micro_batches,
        "tokens_per_step": setup.tokens,
        "parameters": [
            {"pp_rank": rank, "number": number, "name": name, "shape": each.shape, "local": each.local,
             "placements": each.placements, "bytes": number * each.bytes}
            for rank, held in enumerate(planned.parameters)
            for name, number, each in grouped(held)
        ],
        "memory": asdict(memory) | {
            "worst": memory.worst.name, "peak": memory.peak, "limit": planned.limit, "fits": planned.fits,
            "saved": dict(savings(planned)),
        },
        "collectives": [asdict(each) for each in planned.collectives],
        "flops": {
            "per_token_full": planned.flops.per_token.full, "per_token_causal": planned.flops.per_token.causal,
            "recomputed_per_token": planned.flops.recomputed, "step": planned.flops.step,
        },
        "speed": asdict(planned.speed) if planned.speed else None,
        "remedies": [
            {"changes": changes, "peak": other.memory.peak, "fits": other.fits,
             "step": other.speed.step if other.speed else None}
            for changes, other in remedies
        ],
    }  # fmt: skip


def grouped(parameters: list[Placed]) -> list[tuple[str, int, Placed]]:
    """(name with * for the layer, how many, one of them) of parameters that lie alike."""
    numbers: Counter[tuple[str, Placed]] = Counter()
    for each in parameters:
        numbers[re.sub(r"\.\d+\.", ".*.", each.name), replace(each, name="")] += 1
    return [(name, number, each) for (name, each), number in numbers.items()]


def savings(planned: Forecast) -> list[tuple[str, float]]:
    """Bytes that each plan saves a rank, one after the other: of weights and their states, and of activations."""
    setup, held = planned.setup, planned.parameters[planned.memory.pp_rank]
    states = 4  # weight, gradient, two moments
    item = held[0].itemsize
    stage = sum(math.prod(each.shape) for each in held)
    gathered = sum(math.prod(each.gathered) for each in held)
    local = sum(math.prod(each.local) for each in held)
    layers = len({each.name.split(".")[2] for each in held if each.in_block})
    flights = in_flight(setup, planned.memory.pp_rank)

    def held_activations(degrees: Any, mode: str | None = None) -> float:
        settings = setup.config.activation_checkpoint
        other = settings if mode is None else settings.model_copy(update={"mode": mode})
        config = setup.config.model_copy(update={"activation_checkpoint": other})
        changed = replace(setup, config=config, degrees=degrees)
        return flights * kept(changed, activations(changed, 0), layers)

    degrees = setup.degrees
    without_cp = replace(degrees, cp=1, dp_shard=degrees.fsdp)
    alone = held_activations(replace(without_cp, tp=1), "none")
    divided, shared = held_activations(without_cp, "none"), held_activations(degrees, "none")
    rows = [
        ("pipeline", (setup.shape.total_params - stage) * item * states),
        ("tensor", (stage - gathered) * item * states + alone - divided),
        ("context", divided - shared),
        ("activation_checkpoint", shared - held_activations(degrees)),
        ("data", (gathered - local) * item * states),
    ]
    return [(name, saved) for name, saved in rows if saved > 0]


def _gib(value: float) -> str:
    return f"{value / GIB:,.2f}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return table


def _head(planned: Forecast, console: Console) -> None:
    setup, shape = planned.setup, planned.setup.shape
    sizes = " × ".join(f"{name} {size}" for name, size in asdict(setup.degrees).items() if size > 1)
    console.print(f"[bold]{setup.config.job.description}[/] on {setup.world:,} × {setup.hardware.name}")
    console.print(f"model: {shape.total_params:,} parameters, {shape.non_embedding_params:,} non-embedding")
    console.print(f"mesh: {sizes or 'one process'}")
    console.print(
        f"batch: {setup.tokens // setup.config.training.seq_len:,} × {setup.config.training.seq_len:,} ="
        f" {setup.tokens:,} tokens a step, {setup.micro_batches} micro-batch(es) on each rank"
    )
    for name, said in planned.plans:
        console.print(f"{name}: {said}", highlight=False)


def _parameters(planned: Forecast, console: Console) -> None:
    rank = planned.memory.pp_rank
    where = f", pipeline rank {rank}" if planned.setup.degrees.pp > 1 else ""
    table = _table(f"parameters of a rank{where}", "parameter", "shape", "placements", "local shape", "MiB")
    for name, number, each in grouped(planned.parameters[rank]):
        times = f"{number} × " if number > 1 else ""
        table.add_row(
            times + name, str(each.shape), each.placements or "whole", str(each.local),
            f"{number * each.bytes / 2**20:,.1f}",
        )  # fmt: skip
    console.print(table)


def _memory(planned: Forecast, console: Console) -> None:
    memory, worst = planned.memory, planned.memory.worst
    place = " (host)" if memory.offloaded else ""
    table = _table("memory of a rank", "", "GiB")
    rows = [(f"weights{place}", memory.weights), (f"gradients{place}", memory.gradients)]
    rows += [(f"optimizer{place}", memory.optimizer)]
    for name, value in rows:
        table.add_row(name, _gib(value))
    table.add_section()
    table.add_row(f"at the peak ({worst.name}):", "")
    here = {"weights and optimizer": memory.static} | asdict(worst)
    for name, value in here.items():
        if name != "name" and value:
            table.add_row(f"  {name}", _gib(value))
    verdict = "fits" if planned.fits else "does NOT fit"
    table.add_row(f"[bold]peak: {verdict} {_gib(planned.limit)}[/]", f"[bold]{_gib(memory.peak)}[/]")
    table.add_section()
    for name, saved in savings(planned):
        table.add_row(f"saved by {name}", _gib(saved))
    console.print(table)


def _collectives(planned: Forecast, console: Console) -> None:
    if not planned.collectives:
        return
    table = _table("collectives of a step on a rank", "kind", "of", "dimension", "ranks", "count", "MiB each", "GiB")
    for each in planned.collectives:
        table.add_row(
            each.kind, each.purpose, each.dimension, str(each.ranks), f"{each.count:,}",
            f"{each.bytes / 2**20:,.2f}", _gib(each.total),
        )  # fmt: skip
    console.print(table)


def _speed(planned: Forecast, console: Console) -> None:
    flops, speed, setup = planned.flops, planned.speed, planned.setup
    console.print(
        f"FLOPs per token: {flops.per_token.full:.4g} full, {flops.per_token.causal:.4g} causal,"
        f" {flops.recomputed:.4g} computed again; step: {flops.step:.4g}"
    )
    if speed is None:
        console.print(f"no times: the rates of {setup.hardware.name} are unknown, or it has no {setup.dtype} units")
        return
    table = _table("estimate of a step (roofline)", "", "seconds")
    for name in ("matmul", "attention", "memory_bound", "exposed", "bubble", "optimizer"):
        label = {"memory_bound": "element-wise", "exposed": f"communication (of {speed.communication:.3f} in all)"}
        table.add_row(label.get(name, name), f"{getattr(speed, name):.3f}")
    table.add_row("[bold]step[/]", f"[bold]{speed.step:.3f}[/]")
    console.print(table)
    console.print(
        f"MFU {speed.mfu_full:.1%} full, {speed.mfu_causal:.1%} causal; {speed.tokens_per_second:,.0f} tokens/s,"
        f" {speed.tokens_per_second / setup.world:,.0f} per device; {setup.config.training.steps:,} steps in"
        f" {speed.days:,.2f} days"
    )


def _remedies(planned: Forecast, remedies: Remedies, console: Console) -> None:
    fits = [each for each in remedies if each[1].fits]
    title = "it would fit with, cheapest first" if fits else "nothing tried makes it fit; closest comes"
    table = _table(title, "change", "peak GiB", "step s")
    for changes, other in remedies:
        words = " ".join(f"--{key} {str(value).lower() if value is True else value}" for key, value in changes.items())
        table.add_row(words, _gib(other.memory.peak), f"{other.speed.step:.3f}" if other.speed else "–")
    console.print(table)
