"""What became of each step: did it update the weights, and if not, why not? Read one step late: nobody waits for it."""

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from titanling.config.schema import Training
from titanling.summary import Failure

TELLING = 10
"""So many steps of a kind are warned of one by one; the others are only counted."""

Outcome = Literal["updated", "skipped", "empty"]


class Step(NamedTuple):
    """A step of which the device knows more than we do."""

    number: int
    samples: str
    flags: Tensor
    """In memory of the CPU: found_inf and empty, once `arrived`."""
    arrived: torch.cuda.Event | None


class Outcomes:
    """Counts the steps of a run that updated nothing, and warns of them. The same on every rank.

    A step is skipped where its loss or a gradient is not finite, and empty where no token of it is to be predicted.
    Either leaves weights, optimizer and loss scale bit-equal, but that a skipped one halves the scale.
    """

    def __init__(self, warn: Callable[[str], None], scales: bool) -> None:
        """`scales`: whether skipped steps are no reason to worry, for they are how a loss scale is found."""
        self.skipped = self.empty = self.in_a_row = 0
        self.last: Outcome = "updated"
        self._warn, self._scales = warn, scales
        self._told = {"skipped": 0, "empty": 0}
        self._waiting: deque[Step] = deque()

    def count(self, number: int, samples: str, found_inf: Tensor, empty: Tensor) -> None:
        """Take a step's outcome, two 0-dim tensors on the device, without waiting for it."""
        flags, arrived = torch.stack((found_inf, empty.to(found_inf))), None
        if flags.device.type == "cuda":
            flags = torch.empty(2, pin_memory=True).copy_(flags, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._waiting.append(Step(number, samples, flags, arrived))

    def poll(self) -> None:
        """Read what has arrived of all steps but the newest, and warn."""
        while len(self._waiting) > 1 and (self._waiting[0].arrived is None or self._waiting[0].arrived.query()):
            self._read(self._waiting.popleft())

    def settle(self) -> "Outcomes":
        """Read all of them, waiting for the device; itself."""
        while self._waiting:
            step = self._waiting.popleft()
            if step.arrived is not None:
                step.arrived.synchronize()
            self._read(step)
        return self

    def _read(self, step: Step) -> None:
        found_inf, empty = step.flags.tolist()
        self.last = "empty" if empty else "skipped" if found_inf else "updated"
        self.skipped += self.last == "skipped"
        self.empty += self.last == "empty"
        self.in_a_row = self.in_a_row + 1 if self.last != "updated" else 0
        if self.last == "empty":
            self._tell(f"step {step.number}: none of its tokens{step.samples} is to be predicted: it changed nothing")
        elif self.last == "skipped" and not self._scales:
            self._tell(f"step {step.number}: its loss or a gradient is not finite: skipped, it changed nothing")

    def _tell(self, line: str) -> None:
        told = self._told[self.last] = self._told[self.last] + 1
        if told <= TELLING:
            self._warn(f"{line}{f'. Further ones are only counted ({self.last}_steps)' if told == TELLING else ''}")

    def state(self) -> dict[str, int]:
        """For a checkpoint; waits for the device."""
        self.settle()
        return {"skipped_steps": self.skipped, "empty_steps": self.empty, "skipped_in_a_row": self.in_a_row}

    def load(self, state: Mapping[str, Any]) -> None:
        """From a checkpoint. Those of earlier versions knew of no empty steps, and did not count in a row."""
        self.skipped = int(state["skipped_steps"])
        self.empty, self.in_a_row = int(state.get("empty_steps", 0)), int(state.get("skipped_in_a_row", 0))

    def failure(self, step: int, training: Training) -> Failure | None:
        """What the run has come to after `step`: too many in a row, or a whole run, that updated nothing."""
        hopeless = 0 < training.max_skipped_in_a_row <= self.in_a_row
        if hopeless or step == training.steps <= self.skipped + self.empty:
            return Failure(step - self.in_a_row + 1, step, self.last == "empty" or not self.skipped)
        return None
