"""May this run go on from that checkpoint? Imports no torch."""

from pathlib import Path
from typing import Any

from titanling.checkpoint.folder import STATE, read_json
from titanling.errors import UserError

DATA_NAMES = {"bin_sha256": "the training .bin", "idx_sha256": "the training .idx"}
# Where a run writes and what it prints may differ between its parts without a word.
UNREMARKABLE = ("job.", "metrics.", "profiling.", "comm.", "data.prepare.", "sampling.")


def check_resumable(
    path: Path, shape: dict[str, Any], data: dict[str, Any], config: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The checkpoint's state, and in words which settings changed since.

    Raises UserError if the checkpoint holds another model or was trained on other data, saying what differs.
    """
    state = read_json(path / STATE)
    differ = _differences(state["model"], shape)
    if differ:
        raise UserError(
            f"{path}: holds another model than this config: {_words(differ)}; restore these, or use another"
            " job.dump_folder"
        )
    differ = {DATA_NAMES.get(key, key): pair for key, pair in _differences(state["data"], data).items()}
    if differ:
        raise UserError(
            f"{path}: was trained on other data than this config: {_words(differ)}; restore these, or use another"
            " job.dump_folder"
        )
    changed = {
        key: pair
        for key, pair in _differences(state["config"], config).items()
        if not key.startswith(UNREMARKABLE) and not key.startswith("model.")
    }
    return state, [f"{key} was {old}, now {new}" for key, (old, new) in changed.items()]


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            found |= _differences(before, now, f"{prefix}{key}.")
        elif before != (list(now) if isinstance(now, tuple) else now):
            found[prefix + key] = (before, now)
    return found


def _words(differences: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{key} was {_short(old)} and is now {_short(new)}" for key, (old, new) in differences.items())


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 20 else text[:12] + "…"
