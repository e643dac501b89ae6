"""How a model was trained so far: a phase for each run, or part of one with other settings. Imports no torch.

Under "phases" a state.json has those that are over; the state itself tells of the last one.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from titanling.checkpoint.origin import Origin, eos_ids, origin_of

SETTINGS = {
    "sequence length": "training.seq_len",
    "global batch, sequences": "training.global_batch_size",
    "steps of the run": "training.steps",
    "parameters held in": "training.dtype",
    "optimizer": "optimizer.name",
    "peak learning rate": "optimizer.lr",
    "weight decay": "optimizer.weight_decay",
    "warm-up, steps": "lr_scheduler.warmup_steps",
    "decay": "lr_scheduler.decay_type",
    "seed": "debug.seed",
}
"""In words → dotted key of the config."""
TOLD = frozenset({*SETTINGS.values()} - {"training.steps"})
"""Settings that make another phase where they change; to train for longer does not."""


class Past(NamedTuple):
    """Of a run's weights, what was before it."""

    origin: Origin | None = None
    """Of the first of them, if somebody else made them."""
    phases: tuple[dict[str, Any], ...] = ()
    """Training that is over."""

    def state(self) -> dict[str, Any]:
        """What a state.json says of it."""
        return {"phases": list(self.phases)} | ({} if self.origin is None else {"origin": self.origin})

    def eos_ids(self) -> list[int]:
        """What ends a text by the origin's own word."""
        return eos_ids(self.origin)


def past_of(state: Mapping[str, Any], config: Mapping[str, Any], goes_on: bool) -> Past:
    """The past of a run with this config that starts from a state; `goes_on`: in the steps of the other.

    Weights that are only converted, or not trained yet, are no phase.
    """
    phases = list(state.get("phases") or [])
    if state.get("step"):
        same = all(look_up(state["config"], key) == look_up(config, key) for key in TOLD)
        phases += [] if goes_on and same else [phase_of(state)]
    return Past(origin_of(state), tuple(phases))


def phase_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """What is told of the phase that a state is in."""
    return {
        "step": state["step"],
        "tokens_seen": state["tokens_seen"],
        "longest": longest_sequence(state),
        "computed_in": state.get("computed_in"),
        "settings": {key: look_up(state["config"], key) for key in SETTINGS.values()},
    }


def longest_sequence(state: Mapping[str, Any]) -> int:
    """Tokens of the longest sequences that the phase of a state has trained on."""
    data = state.get("data") or {}
    said = look_up(state["config"], "training.seq_len")
    longest: int = said if isinstance(said, int) else data.get("seq_len", 0)
    begun = [s for s in data.get("stages", []) if s["start"] * data["seq_len"] < max(1, state["tokens_seen"])]
    return max((stage.get("seq_len") or longest for stage in begun), default=longest)


def longest_of_all(state: Mapping[str, Any]) -> int:
    """Of all phases."""
    return max([longest_sequence(state), *(phase["longest"] for phase in state.get("phases") or [])])


def look_up(tree: Any, dotted: str) -> Any:
    """What stands under a dotted key; None if nothing does."""
    for key in dotted.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree
