"""state.json: what a run takes over of it, and whether it can. Imports no torch."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from titanling.checkpoint import folder
from titanling.errors import UserError

STATE_TYPES: dict[str, Any] = {
    "step": int,
    "tokens_seen": int,
    "skipped_steps": (int, float),
    "best": (dict, type(None)),
    "interrupted": bool,
    "scaler": dict,
    "loader": dict,
    "data": dict,
    "model": dict,
    "config": dict,
}
LATER_TYPES: dict[str, Any] = {"empty_steps": int, "skipped_in_a_row": int, "trunk_ends": list}
"""What earlier versions did not write; absent, it is nothing."""
OPTIONAL_TYPES: dict[str, Any] = {"documents": dict, "phases": list, "origin": dict}
"""Earlier versions wrote none of these."""
WEIGHTS_STATE = ("step", "tokens_seen", "model", "config")
"""What is needed of the state where there are only weights."""
COUNTABLE = 2**63


def read_state(checkpoint: Path, manifest: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A checkpoint's state.json. Raises UserError if it is missing, damaged or another program's."""
    if folder.STATE not in manifest:
        raise UserError(f"{checkpoint / folder.MANIFEST}: does not list {folder.STATE}")
    problem = folder.damage(checkpoint, [folder.STATE], manifest)
    if problem is not None:
        raise UserError(problem)
    state = folder.read_json(checkpoint / folder.STATE)
    wrong = _unusable(state, WEIGHTS_STATE if state.get("model_only") is True else STATE_TYPES)
    wrong += [key for key, type_ in OPTIONAL_TYPES.items() if not isinstance(state.get(key, type_()), type_)]
    if wrong:
        raise UserError(f"{checkpoint / folder.STATE}: has no usable {', '.join(wrong)}; titanling did not write it")
    return state


def trains_on(state: dict[str, Any]) -> bool:
    """Whether a run can go on from a state, or at least end there: converted weights have no run behind them."""
    return not _unusable(state, STATE_TYPES)


def _unusable(state: dict[str, Any], needed: Collection[str]) -> list[str]:
    """Keys of `needed` whose values a run could not take over."""
    wrong = [key for key, kind in LATER_TYPES.items() if key in state and not _is_counts(state[key], kind)]
    return [key for key in needed if not _is_usable(key, state.get(key))] + wrong


def _is_counts(value: Any, kind: type) -> bool:
    values = value if isinstance(value, list) else [value]
    return isinstance(value, kind) and all(type(each) is int and 0 <= each < COUNTABLE for each in values)


def _is_usable(key: str, value: Any) -> bool:
    if key == "best" and isinstance(value, dict):
        return isinstance(value.get("step"), int) and isinstance(value.get("val_loss"), (int, float))
    counts = isinstance(value, (int, float))
    return isinstance(value, STATE_TYPES[key]) and (not counts or 0 <= value < COUNTABLE)
