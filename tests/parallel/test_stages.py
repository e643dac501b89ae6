"""Cutting layers into pipeline stages: all of them, in order, evenly; and which rank holds which."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titanling.config.schema import SCHEDULE_NAMES, Parallelism
from titanling.errors import UserError
from titanling.parallel.stages import SCHEDULES, cut_layers, stages_of_rank

NAMES = st.sampled_from(list(SCHEDULE_NAMES.values()))


def settings(schedule: str = "1F1B", first: int = 1, last: int = 1, per_stage: int | None = None) -> Parallelism:
    """A [parallelism] table."""
    return Parallelism(
        pipeline_parallel_schedule=schedule,
        pipeline_parallel_first_stage_less_layers=first,
        pipeline_parallel_last_stage_less_layers=last,
        pipeline_parallel_layers_per_stage=per_stage,
    )


def test_the_schema_and_the_table_know_the_same_schedules() -> None:
    assert set(SCHEDULES) == set(SCHEDULE_NAMES)


@given(
    schedule=NAMES,
    pp=st.integers(2, 16),
    layers=st.integers(1, 200),
    first=st.integers(0, 4),
    last=st.integers(0, 4),
    per_stage=st.none() | st.integers(1, 40),
)
def test_every_layer_is_in_one_stage_in_order_and_stages_weigh_alike(
    schedule: str, pp: int, layers: int, first: int, last: int, per_stage: int | None
) -> None:
    table = settings(schedule, first, last, per_stage)
    try:
        cut = cut_layers(table, pp, layers)
    except UserError as error:
        assert "\n" not in str(error) and str(error).startswith("parallelism.pipeline_parallel_")
        if per_stage is None:
            share = (layers + first + last) / (pp * SCHEDULES[schedule.lower()].stages_per_rank)
            # Refused only where layers are so few that the embedding or the head fill a stage, or stages go short.
            assert share < max(first, last) + 1
        return
    assert [layer for stage in cut for layer in stage] == list(range(layers))
    weights = [len(stage) for stage in cut]
    weights[0] += first
    weights[-1] += last
    assert max(weights) - min(weights) <= 1
    held = sorted(stage for rank in range(pp) for stage in stages_of_rank(table, pp, rank, len(cut)))
    assert held == list(range(len(cut)))


@pytest.mark.parametrize(
    ("schedule", "pp", "layers", "expected"),
    [
        ("1F1B", 2, 32, [16, 16]),
        ("1F1B", 4, 32, [8, 8, 9, 7]),  # 34 in quarters, less one for the embedding and one for the head
        ("1F1B", 2, 3, [2, 1]),
        ("Interleaved1F1B", 2, 6, [1, 2, 2, 1]),
        ("ZBVZeroBubble", 4, 30, [3, 4, 4, 4, 4, 4, 4, 3]),
        ("1F1B", 16, 126, [7, *[8] * 14, 7]),  # the published 405B
    ],
)
def test_known_cuts(schedule: str, pp: int, layers: int, expected: list[int]) -> None:
    assert [len(stage) for stage in cut_layers(settings(schedule), pp, layers)] == expected


def test_layers_per_stage_sets_the_number_of_stages() -> None:
    assert len(cut_layers(settings("Interleaved1F1B", per_stage=2), 2, 14)) == 8


def test_v_shaped_schedules_give_the_first_rank_both_ends() -> None:
    for name, expected in (("ZBVZeroBubble", [0, 7]), ("Interleaved1F1B", [0, 4])):
        assert stages_of_rank(settings(name), 4, 0, 8) == expected


@pytest.mark.parametrize(
    ("schedule", "per_stage", "layers", "says"),
    [
        ("1F1B", None, 3, "pipeline_parallel_degree = 4: 3 layers leave stage 0 of 4 without any"),
        ("1F1B", 2, 14, "layers_per_stage = 2 cuts 14 layers into 8 stages, but 1F1B on 4 ranks needs 4 stages"),
        ("Interleaved1F1B", 4, 14, "into 4 stages, but Interleaved1F1B on 4 ranks needs a multiple of 4 stages, at"),
        ("Interleaved1F1B", 3, 14, "into 6 stages, but Interleaved1F1B on 4 ranks needs a multiple of 4 stages, at"),
        ("ZBVZeroBubble", 1, 14, "into 16 stages, but ZBVZeroBubble on 4 ranks needs 8 stages; remove it"),
    ],
)
def test_cuts_that_do_not_work(schedule: str, per_stage: int | None, layers: int, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        cut_layers(settings(schedule, per_stage=per_stage), 4, layers)


@given(schedule=NAMES, pp=st.integers(2, 8), batches=st.integers(1, 64))
def test_what_a_schedule_says_of_micro_batches(schedule: str, pp: int, batches: int) -> None:
    known = SCHEDULES[schedule.lower()]
    problem = known.problem(batches, pp, pp * known.stages_per_rank)
    assert not problem or f"not {batches}" in problem
    if batches % (2 * pp) == 0 and (batches // pp) and batches % (batches // pp) == 0:
        assert not problem  # twice as many as ranks, in whole rounds, suit them all
