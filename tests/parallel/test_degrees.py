"""Degrees of parallelism and gradient accumulation: they fit the world, or the user is told why not."""

import dataclasses
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titanling.config.schema import Compile, Parallelism, Training
from titanling.errors import UserError
from titanling.model.presets import LlamaShape
from titanling.parallel.degrees import Degrees, accumulation_steps, check_layout, resolve_degrees

SMALL = st.integers(1, 16)
WEIGHTS = ("pipeline_parallel_first_stage_less_layers", "pipeline_parallel_last_stage_less_layers")


def settings(replicate: int, shard: int) -> Parallelism:
    """A [parallelism] table."""
    return Parallelism(data_parallel_replicate_degree=replicate, data_parallel_shard_degree=shard)


@pytest.mark.parametrize(
    ("replicate", "shard", "world", "expected"),
    [
        (1, -1, 1, (1, 1)),  # one process
        (1, -1, 8, (1, 8)),  # FSDP, the default
        (8, 1, 8, (8, 1)),  # DDP
        (2, -1, 8, (2, 4)),  # HSDP
        (2, 4, 8, (2, 4)),
    ],
)
def test_degrees(replicate: int, shard: int, world: int, expected: tuple[int, int]) -> None:
    assert resolve_degrees(settings(replicate, shard), world) == Degrees(dp_replicate=expected[0], dp_shard=expected[1])


@pytest.mark.parametrize(
    ("asked", "world", "says"),
    [
        (settings(2, 1), 1, "parallelism.data_parallel_replicate_degree = 2 does not fit 1 process (NGPU × NNODES)"),
        (settings(1, 2), 1, "parallelism.data_parallel_shard_degree = 2 does not fit 1 process"),
        (settings(1, 1), 2, "parallelism.data_parallel_shard_degree = 1 does not fit 2 processes"),
        (settings(3, -1), 2, "replicate_degree = 3 × data_parallel_shard_degree = -1 does not fit 2 processes"),
        (settings(2, 3), 4, "replicate_degree = 2 × data_parallel_shard_degree = 3 does not fit 4 processes"),
        (Parallelism(tensor_parallel_degree=3), 4, "tensor_parallel_degree = 3 does not fit 4 processes"),
        (Parallelism(pipeline_parallel_degree=2, context_parallel_degree=2), 2, "pipeline_parallel_degree = 2 × "),
    ],
)
def test_mismatch_names_the_degrees_and_the_processes(asked: Parallelism, world: int, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        resolve_degrees(asked, world)


@given(pp=SMALL, cp=SMALL, tp=SMALL, replicate=SMALL, shard=SMALL)
def test_what_is_left_is_sharded(pp: int, cp: int, tp: int, replicate: int, shard: int) -> None:
    world = pp * cp * tp * replicate * shard
    asked = Parallelism(
        pipeline_parallel_degree=pp,
        context_parallel_degree=cp,
        tensor_parallel_degree=tp,
        data_parallel_replicate_degree=replicate,
    )
    degrees = resolve_degrees(asked, world)
    assert degrees == Degrees(pp, replicate, shard, cp, tp)
    assert (degrees.world, degrees.dp, degrees.fsdp) == (world, replicate * shard, shard * cp)


@given(replicate=SMALL, shard=st.one_of(st.just(-1), SMALL), world=st.integers(1, 64))
def test_degrees_multiply_to_the_world_or_are_refused(replicate: int, shard: int, world: int) -> None:
    fits = world % replicate == 0 if shard == -1 else replicate * shard == world
    try:
        degrees = resolve_degrees(settings(replicate, shard), world)
    except UserError as error:
        assert not fits
        assert "\n" not in str(error)
    else:
        assert fits
        assert degrees.dp == world and degrees.dp_replicate == replicate and shard in (-1, degrees.dp_shard)


@given(local=SMALL, dp=SMALL, batch=st.one_of(st.just(-1), st.integers(1, 512)))
def test_accumulation_makes_the_global_batch_or_is_refused(local: int, dp: int, batch: int) -> None:
    # The schema itself refuses a global batch that no number of ranks could make.
    batch = batch * local if batch > 0 else batch
    training = Training(local_batch_size=local, global_batch_size=batch)
    try:
        steps = accumulation_steps(training, dp)
    except UserError as error:
        assert batch % (local * dp)
        assert f"global_batch_size = {batch} " in str(error) and f"= {local * dp}" in str(error)
    else:
        assert steps == 1 if batch == -1 else steps * local * dp == batch


SHAPE = LlamaShape(
    dim=48, n_layers=6, n_heads=12, n_kv_heads=6, ffn_dim=144, vocab_size=321, head_dim=4, tie_embeddings=False
)


def check(world: int, tied: bool = False, compiled: bool = False, **changes: Any) -> None:
    """Check a layout of SHAPE; keys of [training] are told from those of [parallelism] by their names."""
    training = {key: changes.pop(key) for key in list(changes) if key in Training.model_fields}
    settings, tables = Parallelism(**changes), {"seq_len": 64, "local_batch_size": 8} | training
    shape = dataclasses.replace(SHAPE, tie_embeddings=tied)
    degrees = resolve_degrees(settings, world)
    check_layout(settings, degrees, shape, Training(**tables), Compile(enable=compiled))


@pytest.mark.parametrize(
    "changes",
    [
        {"tensor_parallel_degree": 2},
        {"tensor_parallel_degree": 6, "seq_len": 66},
        {"context_parallel_degree": 4, "seq_len": 72},
        {"pipeline_parallel_degree": 6, "pipeline_parallel_schedule": "gpipe"} | dict.fromkeys(WEIGHTS, 0),
        {"fsdp_reshard_after_forward": 4},
        {"enable_cpu_offload": True},
    ],
)
def test_layouts_that_fit(changes: dict[str, Any]) -> None:
    check(24, **changes)


@pytest.mark.parametrize(
    ("world", "changes", "says"),
    [
        (12, {"tensor_parallel_degree": 12}, "tensor_parallel_degree = 12 does not divide model.n_kv_heads = 6; this"),
        (4, {"tensor_parallel_degree": 4}, "does not divide model.n_kv_heads = 6; this model can use 1, 2, 3, 6"),
        (2, {"context_parallel_degree": 2, "seq_len": 62}, "training.seq_len = 62 does not divide by context_parallel"),
        (2, {"context_parallel_degree": 2, "seq_len": 62}, "(two pieces each) and tensor_parallel_degree = 1; use a"),
        (3, {"context_parallel_degree": 3}, "training.seq_len = 64 does not divide by context_parallel_degree = 3"),
        (3, {"tensor_parallel_degree": 3}, "tensor_parallel_degree = 3; use a multiple of 3"),
        (4, {"tensor_parallel_degree": 2, "context_parallel_degree": 2, "seq_len": 66}, "use a multiple of 4"),
        (4, {"fsdp_reshard_after_forward": 3}, "fsdp_reshard_after_forward = 3 does not divide the 4 ranks"),
        (1, {"enable_cpu_offload": True}, "training.enable_cpu_offload = true needs FSDP"),
        (2, {"enable_async_tensor_parallel": True}, "enable_async_tensor_parallel = true needs tensor_parallel_degree"),
        (8, {"pipeline_parallel_degree": 8}, "pipeline_parallel_degree = 8: 6 layers leave stage 0 of 8 without any"),
        (2, {"pipeline_parallel_degree": 2, "tied": True}, "the tied embedding would be on the first and the last"),
        (
            2,
            {"pipeline_parallel_degree": 2, "pipeline_parallel_microbatch_size": 3},
            "pipeline_parallel_microbatch_size = 3 does not divide the 8 sequences of a step on one rank",
        ),
        (
            2,
            {"pipeline_parallel_degree": 2, "local_batch_size": 1},
            'schedule = "1F1B" needs at least 2 micro-batches a step, one per stage, not 1; raise training',
        ),
        (
            2,
            {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "Interleaved1F1B", "local_batch_size": 7},
            "needs a number of micro-batches that its 3 rounds over 2 ranks divide, not 7",
        ),
        (
            2,
            {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "ZBVZeroBubble", "compiled": True},
            'schedule = "ZBVZeroBubble" splits the backward pass, which compiled blocks cannot; set compile.enable',
        ),
    ],
)
def test_layouts_that_do_not_fit_name_the_key_and_the_remedy(world: int, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        check(world, **changes)
    assert "\n" not in str(caught.value)
