"""What a config's run would read, without the run: for the scripts that look into its data."""

from collections.abc import Sequence
from typing import NamedTuple

from titanling.config import Config, load_config
from titanling.config.arguments import parse_arguments
from titanling.config.check import check_runnable, errors_name_the_file
from titanling.data.sources import MixedSource, open_sources
from titanling.errors import UserError
from titanling.parallel.degrees import Degrees, resolve_layout, sequences_per_step


class RunData(NamedTuple):
    """A run's data, opened."""

    config: Config
    degrees: Degrees
    sequences: int
    """How many a step takes, of all ranks together."""
    source: MixedSource


def open_run_data(path: str, overrides: Sequence[str], world_size: int) -> RunData:
    """Open the token files of a config with --table.key overrides, for so many processes.

    Raises UserError for what is wrong with them, and for streamed sources.
    """
    loaded = load_config(path, parse_arguments(list(overrides)).overrides)
    config = loaded.config
    if config.data.streams:
        raise UserError(
            f"{loaded.where('data.sources')}: its sources are streamed: what a step reads of them follows from all that"
            " was read before; only token files can be looked into (scripts/prepare_data.py makes them)"
        )
    with errors_name_the_file(loaded):
        check_runnable(config)
        _, degrees = resolve_layout(
            config.model,
            config.parallelism,
            config.training,
            config.data,
            config.validation,
            config.compile,
            world_size,
        )
        sequences = sequences_per_step(config.training, degrees.dp)
        source = open_sources(config.data, config.training.seq_len, config.debug.seed, sequences)
    return RunData(config, degrees, sequences, source)
