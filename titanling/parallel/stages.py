"""Which layers each pipeline stage holds, and which rank holds which stage. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass

from titanling.config.schema import Parallelism
from titanling.errors import UserError


def _any(batches: int, pp: int, stages: int) -> str:
    return ""


def _as_many_as_stages(batches: int, pp: int, stages: int) -> str:
    return "" if batches >= stages else f"needs at least {stages} micro-batches a step, one per stage, not {batches}"


def _whole_rounds(batches: int, pp: int, stages: int) -> str:
    rounds = max(1, batches // pp)
    if batches % rounds == 0:
        return ""
    return f"needs a number of micro-batches that its {rounds} rounds over {pp} ranks divide, not {batches}"


@dataclass(frozen=True)
class Schedule:
    """A pipeline schedule by torch's name: how it places stages, and the micro-batches that it can take."""

    stages_per_rank: int = 1
    """Stages of one rank where pipeline_parallel_layers_per_stage does not say otherwise."""
    v_shaped: bool = False
    """Rank r holds stages r and 2·pp - 1 - r, so that the first rank also has the loss; otherwise r, r + pp, …"""
    splits_backward: bool = False
    """Computes gradients of inputs and of weights apart (zero bubble), which compiled blocks cannot."""
    problem: Callable[[int, int, int], str] = _any
    """(micro-batches, pp, stages) → why that does not work, or nothing."""


SCHEDULES = {
    "gpipe": Schedule(),
    "1f1b": Schedule(problem=_as_many_as_stages),
    "loopedbfs": Schedule(2),
    "interleaved1f1b": Schedule(2, problem=_whole_rounds),
    "interleavedzerobubble": Schedule(2, splits_backward=True, problem=_whole_rounds),
    "zbvzerobubble": Schedule(2, v_shaped=True, splits_backward=True),
    "dualpipev": Schedule(2, v_shaped=True, splits_backward=True, problem=_as_many_as_stages),
}
"""GPipe (Huang 2019), 1F1B and interleaved (Narayanan 2021), looped BFS (Lamy-Poirier 2023), zero bubble and ZBV (Qi
2023 and 2024), DualPipeV (DeepSeek 2024)."""


def cut_layers(settings: Parallelism, pp: int, n_layers: int) -> list[range]:
    """The layers of each stage, in order.

    The embedding weighs as many layers as pipeline_parallel_first_stage_less_layers, the head as
    pipeline_parallel_last_stage_less_layers: their stages get fewer. Raises UserError if a stage would be empty.
    """
    schedule = SCHEDULES[settings.pipeline_parallel_schedule.lower()]
    first, last = (
        settings.pipeline_parallel_first_stage_less_layers,
        settings.pipeline_parallel_last_stage_less_layers,
    )
    weight = n_layers + first + last
    per_stage = settings.pipeline_parallel_layers_per_stage
    stages = pp * schedule.stages_per_rank if per_stage is None else -(-weight // per_stage)
    name = settings.pipeline_parallel_schedule
    if stages % pp or (schedule.stages_per_rank == 1) != (stages == pp) or (schedule.v_shaped and stages != 2 * pp):
        wanted = {1: f"{pp} stages", 2: f"a multiple of {pp} stages, at least {2 * pp}"}[schedule.stages_per_rank]
        if schedule.v_shaped:
            wanted = f"{2 * pp} stages"
        raise UserError(
            f"parallelism.pipeline_parallel_layers_per_stage = {per_stage} cuts {n_layers} layers into {stages} stages,"
            f" but {name} on {pp} ranks needs {wanted}; remove it to let titanling choose"
        )
    # Stage s ends where its share of the weight does, rounded, less the embedding's.
    ends = [min(max((2 * (s + 1) * weight + stages) // (2 * stages) - first, 0), n_layers) for s in range(stages)]
    ends[-1] = n_layers
    cut = [range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    empty = [stage for stage, layers in enumerate(cut) if not layers]
    if empty:
        raise UserError(
            f"parallelism.pipeline_parallel_degree = {pp}: {n_layers} layers leave stage {empty[0]} of {stages} without"
            " any; use fewer ranks, or set pipeline_parallel_first_stage_less_layers and _last_stage_less_layers to 0"
        )
    return cut


def stages_of_rank(settings: Parallelism, pp: int, rank: int, stages: int) -> list[int]:
    """Which stages a rank of the pipeline holds."""
    if SCHEDULES[settings.pipeline_parallel_schedule.lower()].v_shaped:
        return [rank, stages - 1 - rank]
    return list(range(rank, stages, pp))
