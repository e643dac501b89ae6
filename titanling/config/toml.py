"""TOML as configs are made of: what is too large, too deep or no file is refused before it costs time or memory."""

import os
import stat
from pathlib import Path
from typing import Any

import tomli

from titanling.errors import UserError
from titanling.text import shorten

MAX_BYTES = 10_000_000
MAX_DEPTH = 32
"""Levels of tables and lists in each other; the schema has five."""


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file holds. Raises FileNotFoundError where there is none, and UserError for one that is unusable."""
    shown = shorten(str(path), 400)
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe may never end, and a second read finds it empty
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
            raise UserError(f"{shown}: cannot read this config file: it is {kind}; give a regular file")
        if status.st_size > MAX_BYTES:
            raise UserError(
                f"{shown}: cannot read this config file: {status.st_size:,} bytes are no config (at most"
                f" {MAX_BYTES:,}); give the TOML file of a run"
            )
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # a UnicodeDecodeError is a ValueError
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{shown}: cannot read this config file: {why}") from None
    try:
        return parse_toml(text)
    except ValueError as error:
        raise UserError(f"{shown}: not valid TOML: {error}") from None


def parse_toml(text: str) -> dict[str, Any]:
    """What TOML text says. Raises ValueError (tomli's for its grammar) for what no config can hold, too."""
    too_deep = f"tables or lists in each other to more than {MAX_DEPTH} levels; take some out"
    try:
        tree = tomli.loads(text)
    except RecursionError:
        raise ValueError(too_deep) from None
    except tomli.TOMLDecodeError:
        raise
    except ValueError:  # Python's, of its limit to the digits of a number
        raise ValueError("a whole number of too many digits: they have 64 bits") from None
    level: list[Any] = [tree]
    for _ in range(MAX_DEPTH):
        inner = [each for value in level for each in (value.values() if isinstance(value, dict) else value)]
        if any(isinstance(each, int) and not -(2**63) <= each < 2**63 for each in inner):
            raise ValueError("a whole number of too many digits: they have 64 bits")
        level = [each for each in inner if isinstance(each, (dict, list))]
        if not level:
            return tree
    raise ValueError(too_deep)
