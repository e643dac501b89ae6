"""What a plan is, and the one order that plans are applied in.

A plan lays one idea over a plain model, in place, while the model is on the meta device and costs nothing. The order:

1. quantize               exchanges linear layers: whatever divides a layer must find the one that will run
2. tensor                 divides every matrix, and needs the whole model to find them
3. context                exchanges attention; heads are already those of this rank
4. pipeline               cuts the model into stages; whatever follows sees only the stages of this rank
5. precision              the type of what leaves the embedding, hence of all that follows
6. activation_checkpoint  wraps the blocks' arithmetic with all of the above: their collectives are recomputed as well
7. compile                compiles each block with its recomputation, so that the compiler sees what is kept
8. data                   FSDP shards what is left; its gathering must stay outside of what is compiled and recomputed

A plan of your own comes behind the one that it names in `after`.
"""

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from titanling.errors import UserError
from titanling.parallel.mesh import World

ORDER = ("quantize", "tensor", "context", "pipeline", "precision", "activation_checkpoint", "compile", "data")


class Plan:
    """One idea of how to run a model. Subclass it, and give its settings to your own `__init__`."""

    name: str
    after: str = "context"
    """For a plan that is not one of ORDER: the one that it follows."""
    needs: tuple[str, ...] = ()
    """Dimensions of the mesh. Where all of them have size 1, the plan has nothing to do and is left out."""

    def check(self, device: torch.device) -> None:
        """Raise UserError if this plan cannot work on such a device. Called before any process group exists."""

    def apply(self, model: nn.Module, world: World) -> Sequence[nn.Module] | None:
        """Change `model`, on the meta device, in place; or return the parts that it was cut into."""
        raise NotImplementedError

    def describe(self) -> str:
        """What it does here, in one line."""
        raise NotImplementedError


def order(plans: Iterable[Plan]) -> list[Plan]:
    """The plans in the order that they are applied in. Raises UserError if one follows a plan that there is not."""
    ordered = list(plans)
    for plan in ordered:
        if plan.name not in ORDER and plan.after not in ORDER:
            raise UserError(f'parallelism.plans: plan "{plan.name}" comes after "{plan.after}"; use one of {ORDER}')

    def place(plan: Plan) -> tuple[int, bool]:
        own = plan.name in ORDER
        return ORDER.index(plan.name if own else plan.after), not own

    return sorted(ordered, key=place)


def active(plans: Iterable[Plan], world: World) -> list[Plan]:
    """Those that have something to do in this world, in order."""
    return [plan for plan in order(plans) if not plan.needs or any(world.degree(name) > 1 for name in plan.needs)]


def apply(plans: Iterable[Plan], model: nn.Module, world: World) -> list[nn.Module]:
    """Apply plans to a model on meta; the parts of it that this rank runs (one, but for pipeline stages)."""
    parts = [model]
    for plan in active(plans, world):
        parts = [piece for part in parts for piece in plan.apply(part, world) or [part]]
    return parts


def load_plan(reference: str) -> Plan:
    """The plan that "path/to/file.py:ClassName" names, built without arguments. Raises UserError if there is none."""
    path, _, name = reference.rpartition(":")
    if not (path.endswith(".py") and Path(path).is_file()):
        raise UserError(
            f'parallelism.plans = "{reference}": "{path}" is no Python file; give "path/to/file.py:ClassName"'
        )
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, Plan)):
        raise UserError(f'parallelism.plans = "{reference}": {path} has no subclass of Plan called {name}')
    return found()
