"""state.json: what a run takes over of it, and whether it can. Imports no torch."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from titanling.checkpoint import folder
from titanling.errors import UserError

Count = Annotated[int, Field(ge=0, lt=2**63)]
Name = Annotated[str, Field(max_length=1000)]
MOST_SHOWN = 3


class _Part(BaseModel):
    """Types of some keys; what else there is, is later versions' business."""

    model_config = ConfigDict(strict=True, extra="ignore")


class Best(_Part):
    """The best validation."""

    step: Count
    val_loss: Annotated[float, Field(allow_inf_nan=False)]


class ReadStage(_Part):
    """From which sample on the sources were read in which shares, and in rows of how many tokens."""

    start: Count
    weights: dict[Name, Annotated[float, Field(ge=0)]]
    seq_len: Count | None = None


class ReadData(_Part):
    """What the order of the samples depends on."""

    seq_len: Annotated[int, Field(ge=1, lt=2**63)]
    seed: int
    sources: dict[Name, dict[Name, Any]]
    stages: list[ReadStage] = []
    """Of the first versions, which had no sources, there are none: such a state is refused elsewhere, with a remedy."""
    stream: dict[Name, Any] | None = None
    files: dict[Name, list[dict[Name, Any]]] = {}


class Weights(_Part):
    """What is needed of the state where there are only weights."""

    step: Count
    tokens_seen: Count
    model_only: bool = False
    model: dict[Name, Any]
    config: dict[Name, Any]
    # What earlier versions did not write; absent, it is nothing.
    empty_steps: Count = 0
    skipped_in_a_row: Count = 0
    trunk_ends: list[Count] = []
    documents: dict[Name, Any] = {}
    phases: list[Any] = []
    origin: dict[Name, Any] = {}


class State(Weights):
    """What a run goes on with."""

    skipped_steps: Annotated[float, Field(ge=0, lt=2**63)]
    best: Best | None
    interrupted: bool
    scaler: dict[Name, float]
    loader: dict[Name, Any]
    data: ReadData


def read_state(checkpoint: Path, manifest: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A checkpoint's state.json. Raises UserError if it is missing, damaged or another program's."""
    if folder.STATE not in manifest:
        raise UserError(f"{checkpoint / folder.MANIFEST}: does not list {folder.STATE}")
    problem = folder.damage(checkpoint, [folder.STATE], manifest)
    if problem is not None:
        raise UserError(problem)
    state = folder.read_json(checkpoint / folder.STATE)
    wrong = _unusable(state, Weights if state.get("model_only") is True else State)
    if wrong:
        more = f" and {len(wrong) - MOST_SHOWN} more" if len(wrong) > MOST_SHOWN else ""
        shown = ", ".join(wrong[:MOST_SHOWN])
        raise UserError(f"{checkpoint / folder.STATE}: has no usable {shown}{more}; titanling did not write it")
    return state


def trains_on(state: dict[str, Any]) -> bool:
    """Whether a run can go on from a state, or at least end there: converted weights have no run behind them."""
    return not _unusable(state, State)


def _unusable(state: dict[str, Any], wanted: type[Weights]) -> list[str]:
    """Dotted keys whose values a run could not take over."""
    try:
        wanted.model_validate(state)
    except ValidationError as error:
        return list(dict.fromkeys(".".join(map(str, each["loc"]))[:60] for each in error.errors()))
    return []
