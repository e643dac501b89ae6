"""Degrees of parallelism and gradient accumulation: they fit the world, or the user is told why not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titanling.config.schema import Parallelism, Training
from titanling.errors import UserError
from titanling.parallel.degrees import Degrees, accumulation_steps, resolve_degrees, world_size

SMALL = st.integers(1, 16)


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
    assert resolve_degrees(settings(replicate, shard), world) == Degrees(*expected)


@pytest.mark.parametrize(
    ("replicate", "shard", "world"), [(2, 1, 1), (1, 2, 1), (1, 1, 2), (3, -1, 2), (3, -1, 4), (2, 3, 4), (4, 4, 8)]
)
def test_mismatch_names_the_degrees_and_the_processes(replicate: int, shard: int, world: int) -> None:
    with pytest.raises(UserError, match=f"replicate_degree = {replicate} .*shard_degree = {shard} .* {world} process"):
        resolve_degrees(settings(replicate, shard), world)


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


def test_world_size_is_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert world_size() == 1
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert world_size() == 6
