"""Checks between keys, and refusal of what is not built yet. Run before anything is allocated."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from titanling.config.load import LoadedConfig, is_key
from titanling.config.schema import Config, Table
from titanling.errors import UserError

# A table that is switched off asks for nothing.
SWITCHES = {"checkpoint", "validation"}


@contextmanager
def errors_name_the_file(loaded: LoadedConfig) -> Iterator[None]:
    """Rooms see only their tables: put the file that set it before a UserError that begins with a dotted key."""
    try:
        yield
    except UserError as error:
        dotted = re.match(r"[a-z0-9_.]*", str(error))
        if dotted and is_key(dotted[0]):
            raise UserError(f"{loaded.where(dotted[0])}: {error}") from error
        raise


def check_runnable(config: Config) -> None:
    """Raise UserError if this config cannot be run: a feature not built yet, or keys that contradict each other."""
    for dotted, value, default in _not_yet(config, ""):
        instead = "remove it" if default is None else f"set it to {json.dumps(default)}"
        raise UserError(f"{dotted} = {json.dumps(value)} is not supported yet; {instead}")
    _check_data(config)
    if config.optimizer.stochastic_rounding and config.training.dtype != "bfloat16":
        raise UserError(
            f'optimizer.stochastic_rounding = true is for weights in bfloat16, and training.dtype = "'
            f'{config.training.dtype}"; set training.dtype = "bfloat16", or stochastic_rounding = false'
        )
    if config.sampling.freq and not config.model.hf_assets_path:
        raise UserError("sampling.freq > 0 needs a tokenizer: set model.hf_assets_path, or sampling.freq = 0")


def _check_data(config: Config) -> None:
    if config.data.train is None and not config.data.sources:
        raise UserError(
            "data.train is not set, nor any [[data.sources]]: give the prefix of tokenised files"
            " (scripts/prepare_data.py makes them)"
        )
    if config.data.streams and not config.model.hf_assets_path:
        raise UserError("data.sources are streamed, which needs a tokenizer: set model.hf_assets_path")
    if config.validation.enable and config.data.validation is None:
        raise UserError("validation.enable = true needs data.validation, the prefix of tokenised files")
    if config.data.prepare.text and config.data.train is None:
        raise UserError("data.prepare.text makes data.train, which is not set; prepare each source by itself")
    if config.data.prepare.text and not config.model.hf_assets_path:
        raise UserError(
            "data.prepare.text needs model.hf_assets_path: the folder where the tokenizer is, or will be made"
        )


def _not_yet(table: Table, prefix: str) -> list[tuple[str, Any, Any]]:
    """(dotted key, value, default) of each key that asks for a feature not built yet."""
    found = []
    for name, field in type(table).model_fields.items():
        value = getattr(table, name)
        if isinstance(value, Table):
            if not (name in SWITCHES and not value.enable):  # type: ignore[attr-defined]
                found += _not_yet(value, f"{prefix}{name}.")
        elif isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("not_yet"):
            if value != field.default:
                found.append((prefix + name, value, field.default))
    return found
