"""What composes plans: their order, which are left out, and plans from a user's own file."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, TinyData, clean_env, run_python, run_train, tiny_config
from runs import saved_shards
from torch import nn

from titanling.errors import UserError
from titanling.parallel import plan
from titanling.parallel.degrees import Degrees
from titanling.parallel.mesh import World
from titanling.parallel.plan import ORDER, Plan

EXAMPLE = ROOT / "docs/examples/freeze_norms.py"
GUIDE = ROOT / "docs/parallelism.md"


class Noted(Plan):
    """A plan that notes what it was applied to."""

    def __init__(self, name: str, after: str = "context", needs: tuple[str, ...] = ()) -> None:
        self.name, self.after, self.needs = name, after, needs
        self.models: list[nn.Module] = []

    def apply(self, model: nn.Module, world: World) -> list[nn.Module] | None:
        """Note it; a pipeline cuts it in two."""
        self.models.append(model)
        return [nn.Identity(), nn.Identity()] if self.name == "pipeline" else None


def world(**degrees: int) -> World:
    """A world that consists of its sizes only."""
    sizes = Degrees(**degrees)
    return World(0, sizes.world, torch.device("cpu"), sizes)


def names(plans: list[Plan]) -> list[str]:
    """Their names."""
    return [each.name for each in plans]


def test_whatever_the_order_of_the_list_the_order_of_application_is_one() -> None:
    for shuffled in itertools.islice(itertools.permutations(ORDER), 0, None, 1000):
        assert names(plan.order([Noted(name) for name in shuffled])) == list(ORDER)


@pytest.mark.parametrize("after", ORDER)
def test_a_plan_of_ones_own_follows_the_one_that_it_names(after: str) -> None:
    mine = [Noted("mine", after), Noted("also mine", after)]
    ordered = names(plan.order([*mine, *map(Noted, ORDER)]))
    assert ordered.index("mine") == ordered.index(after) + 1 and ordered.index("also mine") == ordered.index(after) + 2
    # The one that it follows need not be there.
    assert "mine" in names(plan.order([*mine, *(Noted(name) for name in ORDER if name != after)]))


def test_following_a_plan_that_there_is_not() -> None:
    with pytest.raises(UserError, match='parallelism.plans: plan "mine" comes after "tensors"; use one of .*tensor'):
        plan.order([Noted("mine", "tensors")])


def test_a_plan_without_anything_to_do_is_left_out() -> None:
    plans = [Noted("tensor", needs=("tp",)), Noted("data", needs=("dp_replicate", "dp_shard", "cp")), Noted("compile")]
    assert names(plan.active(plans, world())) == ["compile"]
    assert names(plan.active(plans, world(tp=2))) == ["tensor", "compile"]
    assert names(plan.active(plans, world(cp=2))) == ["compile", "data"]


def test_what_comes_behind_the_pipeline_sees_its_stages() -> None:
    before, pipeline, behind, model = Noted("tensor"), Noted("pipeline"), Noted("mine", "pipeline"), nn.Identity()
    parts = plan.apply([behind, pipeline, before], model, world(pp=2))
    assert before.models == pipeline.models == [model]
    assert behind.models == parts and len(parts) == 2


def test_the_example_of_the_documentation_loads() -> None:
    loaded = plan.load_plan(f"{EXAMPLE}:FreezeNorms")
    assert loaded.name == "freeze_norms" and loaded.describe()
    assert len(EXAMPLE.read_text().splitlines()) <= 32


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("nowhere.py:Mine", '"nowhere.py" is no Python file; give "path/to/file.py:ClassName"'),
        ("Mine", '"" is no Python file; give "path/to/file.py:ClassName"'),
        (f"{ROOT}/README.md:Mine", "is no Python file"),
        (f"{EXAMPLE}:FreezeNorm", f"{EXAMPLE} has no subclass of Plan called FreezeNorm"),
        (f"{EXAMPLE}:World", f"{EXAMPLE} has no subclass of Plan called World"),
        (f"{EXAMPLE}:", f"{EXAMPLE} has no subclass of Plan called"),
    ],
)
def test_plans_that_are_not_there(reference: str, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        plan.load_plan(reference)
    assert str(caught.value).startswith(f'parallelism.plans = "{reference}": ')


WHOLE = 'def apply(self, model, world): ...\n    def describe(self): return ""\n'


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (f"class Mine(Plan):\n    {WHOLE}", 'Mine has no name; write name = "…" in the class'),
        (f"class Mine(Plan):\n    name = 3\n    {WHOLE}", "Mine has no name"),
        ('class Mine(Plan):\n    name = "mine"\n', "Mine has no method apply; docs/parallelism.md shows a whole plan"),
        (f'class Mine(Plan):\n    name = "mine"\n    needs = "tp"\n    {WHOLE}', "Mine.needs = 'tp' is not a tuple of"),
        (f'class Mine(Plan):\n    name = "mine"\n    needs = ("tq",)\n    {WHOLE}', "some of ('pp', 'dp_replicate',"),
        (
            "class Mine(Plan):\n    def __init__(self, ratio): ...\n",
            "without arguments: TypeError: Mine.__init__() missing 1",
        ),
        ("class Mine(Plan):\n    def __init__(self):\n        1 / 0\n", "ZeroDivisionError: division by zero (line 4)"),
        (
            "import no_such_module\n",
            "mine.py cannot be imported: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("\n1 / 0\n", "mine.py cannot be imported: ZeroDivisionError: division by zero (line 3)"),
        ("class Mine(Plan:\n", "mine.py cannot be imported: SyntaxError: "),
    ],
)
def test_plans_that_do_not_work(tmp_path: Path, code: str, says: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(f"from titanling.parallel.plan import Plan\n{code}", encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        plan.load_plan(f"{path}:Mine")
    assert str(caught.value).startswith(f'parallelism.plans = "{path}:Mine": ')
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (1, {}),
        pytest.param(2, {"parallelism.tensor_parallel_degree": 2}, marks=pytest.mark.slow),
        pytest.param(2, {"parallelism.data_parallel_shard_degree": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_run_with_the_example(tmp_path: Path, tiny_data: TinyData, ranks: int, changes: dict[str, Any]) -> None:
    """Norms keep their first value of one, everything else learns."""
    path = tiny_config(tmp_path, tiny_data, changes)
    command = ("--config", path, "--parallelism.plans", f'["{EXAMPLE}:FreezeNorms"]')
    if ranks == 1:
        run = run_train(*command)
    else:
        run = run_python("-m", "titanling.launch", "--", *command, env=clean_env(NGPU=str(ranks)))
    assert run.returncode == 0, run.stderr
    assert "freeze_norms: the norms' weights stay as they are" in run.stdout
    tensors = saved_shards(tmp_path / "run/checkpoints/step-000004")
    norms = [tensor for name, tensor in tensors.items() if name.endswith("norm.weight")]
    assert len(norms) >= 5 and all((norm == 1).all() for norm in norms)
    learning = {name.split(": ")[1] for name, tensor in tensors.items() if name.endswith("exp_avg_sq") and tensor.any()}
    assert len(learning) == 16 and not [name for name in learning if "norm" in name]


def test_the_guide_shows_the_example_as_it_is() -> None:
    assert EXAMPLE.read_text(encoding="utf-8") in GUIDE.read_text(encoding="utf-8")
