"""Everything that is planned for one setup."""

from collections.abc import Sequence
from dataclasses import dataclass

from titanling.parallel.plan import active
from titanling.planner.memory import RESERVE, Memory, memory
from titanling.planner.place import Placed, fake_world, make_plans, make_world, place, place_by_one_block
from titanling.planner.setup import Setup
from titanling.planner.speed import Flops, Speed, flops, speed
from titanling.planner.traffic import Collective, traffic


@dataclass(frozen=True)
class Forecast:
    """A setup and what will become of it."""

    setup: Setup
    plans: list[tuple[str, str]]
    """Name and description of each active plan."""
    parameters: list[list[Placed]]
    """Of each rank of the pipeline that is first in all other dimensions."""
    memory: Memory
    """Of the rank of the pipeline that needs most."""
    collectives: list[Collective]
    """Of the same rank."""
    flops: Flops
    speed: Speed | None

    @property
    def limit(self) -> int:
        """Bytes that the device has for a run."""
        gpu = self.setup.device.type == "cuda"
        return self.setup.hardware.memory - (RESERVE if gpu else 0)

    @property
    def fits(self) -> bool:
        """Whether the peak stays below the limit."""
        return self.memory.peak <= self.limit


def forecast(setup: Setup, quick: bool = False) -> Forecast:
    """Plan a setup. `quick` lays out one block instead of all. Raises the UserErrors of the plans.

    The process must have no process group of its own.
    """
    plans = make_plans(setup)
    with fake_world(setup.world):
        world = make_world(setup)
        said = [(each.name, each.describe()) for each in active(plans, world)]
        parameters = (place_by_one_block if quick else place)(setup, plans, world)
    return put_together(setup, said, parameters)


def put_together(setup: Setup, plans: list[tuple[str, str]], parameters: Sequence[list[Placed]]) -> Forecast:
    """The formulas' part, over placed parameters."""
    ranks = [memory(setup, held, rank) for rank, held in enumerate(parameters)]
    worst = max(ranks, key=lambda each: each.peak)
    held = parameters[worst.pp_rank]
    collectives = traffic(setup, held, worst.pp_rank)
    layers = max(len({each.name.split(".")[2] for each in held if each.in_block}) for held in parameters)
    found = speed(setup, worst, layers, collectives)
    return Forecast(setup, plans, list(parameters), worst, collectives, flops(setup), found)
