"""The JSON files of a Hugging Face directory. Imports no torch."""

import json
from pathlib import Path
from typing import Any

from titanling.checkpoint.borrowed import own_file
from titanling.errors import UserError

CONFIG = "config.json"
GENERATION = "generation_config.json"
MOST_CONFIG = 1 << 20
"""Every checkpoint keeps it."""
MOST_JSON = 1 << 28
"""An index names each tensor of a model."""


def read_hf_json(path: Path, most: int = MOST_JSON) -> dict[str, Any]:
    """Read one of the directory's JSON objects.

    Raises UserError if it is missing, malformed, not of the directory (a link that leads out of it), or larger than
    `most` bytes.
    """
    if own_file(path, most) is None:
        raise UserError(f"{path}: no such file; a Hugging Face model directory has one")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return value
