"""Sizes that nothing can hold or count: one line before anything is allocated, whatever the key."""

import os
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import TinyData, tiny_config

from titanling.config import load_config
from titanling.config.schema import Config, Table
from titanling.errors import UserError
from titanling.parallel.degrees import Degrees
from titanling.sizes import check_batches, check_device
from titanling.train import check
from titanling.trainer import Trainer

SMALL = 2**33
HARMLESS = {  # how often, how long, how many of what there is: nothing is made of such a size
    *("training.steps", "training.max_skipped_in_a_row", "training.gc_freq", "debug.seed", "data.shuffle_buffer"),
    *("lr_scheduler.warmup_steps", "lr_scheduler.total_steps", "parallelism.fsdp_prefetch", "metrics.log_freq"),
    *("checkpoint.interval", "checkpoint.keep_latest_k", "checkpoint.keep_every", "validation.freq"),
    *("validation.steps", "sampling.freq", "profiling.profile_freq"),
    *(f"parallelism.pipeline_parallel_{what}" for what in ("microbatch_size", "layers_per_stage")),
    *(f"parallelism.pipeline_parallel_{end}_stage_less_layers" for end in ("first", "last")),
}


def integers(table: type[Table], prefix: str = "") -> Iterator[str]:
    """Every key of the schema that takes a whole number."""
    for name, field in table.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Table):
            yield from integers(kind, f"{prefix}{name}.")
        elif kind is int or int in typing.get_args(kind):
            yield prefix + name


@pytest.mark.parametrize("power", [40, 62])
@pytest.mark.parametrize("key", list(integers(Config)))
def test_no_key_asks_for_more_than_there_is(tmp_path: Path, tiny_data: TinyData, key: str, power: int) -> None:
    changes = {"validation.enable": True, "sampling.freq": 2, key: 2**power}
    changes |= {"training.global_batch_size": 2**power if key == "training.global_batch_size" else None}
    try:
        config = load_config(tiny_config(tmp_path, tiny_data, changes)).config
        shape, degrees = check(config)
        check_device(config, shape, degrees, SMALL, 1)
    except UserError as error:
        assert key.rpartition(".")[2] in str(error) and "\n" not in str(error) and len(str(error)) < 500
    else:
        assert key in HARMLESS or key == "checkpoint.load_step"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"training.local_batch_size": 2**26},
            "training.local_batch_size = 67108864, global_batch_size = -1, seq_len = 32: the 2,147,483,648",
        ),
        (
            {"training.local_batch_size": 1, "training.global_batch_size": 2**26},
            "global_batch_size = 67108864, seq_len = 32: the 2,147,483,648 tokens of a process are 32.0 GiB",
        ),
        ({"training.steps": 2**58}, "training.steps = 288230376151711744: of 2 × 32 tokens each are more than 2^63"),
        ({"validation.enable": True, "validation.local_batch_size": 2**26}, "validation.local_batch_size = 67108864"),
    ],
)
def test_batches(tmp_path: Path, tiny_data: TinyData, changes: dict[str, int], words: str) -> None:
    changes = {"training.global_batch_size": None} | changes
    config = load_config(tiny_config(tmp_path, tiny_data, changes)).config
    with pytest.raises(UserError) as caught:
        check_batches(config, Degrees(), SMALL)
    assert words in str(caught.value)
    check_batches(load_config(tiny_config(tmp_path, tiny_data)).config, Degrees(), SMALL)


def test_a_model_that_the_device_cannot_hold(tmp_path: Path, tiny_data: TinyData) -> None:
    """Said by the trainer before it builds it; a little less is not refused, nor what processes share."""
    config = load_config(tiny_config(tmp_path, tiny_data, {"model.n_layers": 9000, "model.ffn_dim": 2**21})).config
    shape, degrees = check(config)
    with pytest.raises(UserError, match=r"model.n_layers = 9000, .* parameters, for whose weights, gradients and"):
        Trainer(config, shape, degrees)
    assert not os.path.exists(config.job.dump_folder)
    small = load_config(tiny_config(tmp_path, tiny_data)).config
    shape, degrees = check(small)
    needed = shape.total_params * 16
    check_device(small, shape, degrees, needed, 1)
    check_device(small, shape, Degrees(dp_shard=2), needed, 2)
    with pytest.raises(UserError, match="each of the 2 processes needs at least"):
        check_device(small, shape, degrees, needed, 2)
