"""What a plan is, and the one order that plans are applied in.

A plan lays one idea over a plain model, in place, while the model is on the meta device and costs nothing. The order:

1. kernels                exchanges functions, which nothing else looks at
2. quantize               exchanges linear layers: whatever divides a layer must find the one that will run
3. tensor                 divides every matrix, and needs the whole model to find them
4. context                exchanges attention; heads are already those of this rank
5. pipeline               cuts the model into stages; whatever follows sees only the stages of this rank
6. precision              the type of what leaves the embedding, hence of all that follows
7. activation_checkpoint  wraps the blocks' arithmetic with all of the above: their collectives are recomputed as well
8. compile                compiles each block with its recomputation, so that the compiler sees what is kept
9. data                   FSDP shards what is left; its gathering must stay outside of what is compiled and recomputed

A plan of your own comes behind the one that it names in `after`.
"""

import importlib.util
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from titanling.errors import UserError
from titanling.parallel.mesh import DIMENSIONS, World

ORDER = (
    "kernels",
    "quantize",
    "tensor",
    "context",
    "pipeline",
    "precision",
    "activation_checkpoint",
    "compile",
    "data",
)


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
    asked = f'parallelism.plans = "{reference}"'
    if not (path.endswith(".py") and Path(path).is_file()):
        raise UserError(f'{asked}: "{path}" is no Python file; give "path/to/file.py:ClassName"')
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _blames_the_file(f"{asked}: {path} cannot be imported", path):
        spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, Plan)):
        raise UserError(f"{asked}: {path} has no subclass of Plan called {name}")
    with _blames_the_file(f"{asked}: {name}() cannot be called without arguments", path):
        plan = found()
    if not (isinstance(getattr(plan, "name", None), str) and plan.name):
        raise UserError(f'{asked}: {name} has no name; write name = "…" in the class')
    for method in ("apply", "describe"):
        if getattr(found, method) is getattr(Plan, method):
            raise UserError(f"{asked}: {name} has no method {method}; docs/parallelism.md shows a whole plan")
    if isinstance(plan.needs, str) or not set(plan.needs) <= set(DIMENSIONS):
        raise UserError(f"{asked}: {name}.needs = {plan.needs!r} is not a tuple of some of {DIMENSIONS}")
    return plan


@contextmanager
def _blames_the_file(what: str, path: str) -> Iterator[None]:
    """Turn whatever a user's own code raises into a UserError that says what, why, and in which line of that file."""
    try:
        yield
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = f" (line {line})" if line else ""
        raise UserError(f"{what}: {type(error).__name__}: {error}{where}") from error
