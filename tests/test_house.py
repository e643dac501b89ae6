"""The house's own rules: which room may know which, what stays free of torch, no pickle, everything documented."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from helpers import ROOT, run_python

from titanling import ranks

PACKAGES = [name for name in ("titanling", "triton_kernels") if (ROOT / name).is_dir()]
ROOMS_WITHOUT_TORCH = [
    "titanling.cli",
    "titanling.config",
    "titanling.config.reference",
    "titanling.model.presets",
    "titanling.model.hf",
    "titanling.parallel.degrees",
    "titanling.data.indexed",
    "titanling.data.order",
    "titanling.data.prepare.run",
    "titanling.data.raw",
    "titanling.data.trace",
    "titanling.data.audit",
    "titanling.data.verify",
    "titanling.data.streaming",
    "titanling.checkpoint.describe",
    "titanling.checkpoint.folder",
    "titanling.checkpoint.inventory",
    "titanling.checkpoint.model_card",
    "titanling.checkpoint.resume",
    "titanling.checkpoint.text",
    "titanling.train",
    "titanling.launch",
    "titanling.owner",
    "titanling.owner_file",
    "titanling.ranks",
]
# Room → rooms it must not know, whether at import or later: those to its right in docs/architecture.md.
STRANGERS = {
    "titanling.config": ["model", "parallel", "data", "checkpoint", "metrics", "trainer", "loss", "optim", "schedule"],
    "titanling.model": ["parallel", "data", "checkpoint", "metrics", "trainer", "optim", "schedule"],
    "titanling.parallel": ["data", "checkpoint", "metrics", "planner", "trainer"],
    "titanling.data": ["model", "parallel", "checkpoint", "metrics", "trainer"],
    "titanling.metrics": ["model", "parallel", "data", "checkpoint", "trainer"],
    "titanling.checkpoint": ["metrics", "trainer"],
    "titanling.planner": ["data", "checkpoint", "trainer"],
}


@cache
def modules() -> dict[str, Path]:
    """Dotted name → file of every module."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(module: str) -> ast.Module:
    """A module's syntax tree."""
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """Names that the import statements among `nodes` bring in: of `from a import b`, both a and a.b."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}"
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def is_below(name: str, package: str) -> bool:
    """Whether a dotted name is `package` or inside it."""
    return f"{name}.".startswith(f"{package}.")


def test_no_import_cycle() -> None:
    # A package's __init__ runs before its modules, but importing one of them is not importing what __init__ offers.
    needs = {name: imported(ast.iter_child_nodes(tree(name))) & modules().keys() - {name} for name in modules()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in sorted(needs[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in needs:
        visit(name, ())


@pytest.mark.parametrize("room", STRANGERS)
def test_a_room_does_not_know_the_rooms_to_its_right(room: str) -> None:
    strangers = [f"titanling.{name}" for name in STRANGERS[room]]
    for module in (name for name in modules() if is_below(name, room)):
        known = imported(ast.walk(tree(module)))
        assert [name for name in known if any(is_below(name, stranger) for stranger in strangers)] == [], module


def test_kernels_know_nothing_of_titanling() -> None:
    for module in (name for name in modules() if is_below(name, "triton_kernels")):
        assert [name for name in imported(ast.walk(tree(module))) if is_below(name, "titanling")] == [], module


def test_only_commands_know_the_trainer() -> None:
    users = [name for name in modules() if "titanling.trainer" in imported(ast.walk(tree(name)))]
    assert users == ["titanling.parity", "titanling.train"]


def test_one_module_reads_what_launchers_say() -> None:
    said = {*ranks.LAUNCHED, "MASTER_ADDR", "MASTER_PORT", "NGPU", "NNODES", "NODE_RANK"}
    parsed = {module: tree(module) for module in modules() if module not in ("titanling.ranks", "titanling.launch")}
    parsed |= {path.name: ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "scripts").glob("*.py")}
    for name, nodes in parsed.items():
        assert not {node.value for node in ast.walk(nodes) if isinstance(node, ast.Constant)} & said, name


@pytest.mark.parametrize("module", [name for name in modules()])
def test_no_pickle(module: str) -> None:
    unsafe = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    assert not {name.partition(".")[0] for name in imported(ast.walk(tree(module)))} & unsafe
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save")}, f"{module}:{node.lineno}"


def test_nothing_is_pickled_for_another_process_of_the_run() -> None:
    """What torch sends as an "object" is a pickle, which runs any program where it arrives."""
    parsed = {module: tree(module) for module in modules()}
    parsed |= {path.name: ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "scripts").glob("*.py")}
    for name, nodes in parsed.items():
        used = {node.attr for node in ast.walk(nodes) if isinstance(node, ast.Attribute)}
        used |= {alias.name for node in ast.walk(nodes) if isinstance(node, ast.ImportFrom) for alias in node.names}
        assert not [word for word in used if re.search("_object$|_object_list$|^PythonStore$|^rpc$", word)], name


def public(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """Public functions, classes and methods of a module or class body, with their names."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield f"{prefix}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{prefix}{node.name}.")


@pytest.mark.parametrize("module", [name for name in modules()])
def test_what_is_public_is_documented_and_annotated(module: str) -> None:
    assert ast.get_docstring(tree(module)), f"{module} has no docstring"
    for name, node in public(tree(module).body, ""):
        # nn.Module.forward is documented by its class.
        assert ast.get_docstring(node) or node.name == "forward", f"{module}: {name} has no docstring"
        methods = node.body if isinstance(node, ast.ClassDef) else [node]
        for function in (f for f in methods if isinstance(f, ast.FunctionDef) and f.name in (node.name, "__init__")):
            arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            assert not bare, f"{module}: {name}: arguments without a type: {bare}"
            assert function.returns is not None, f"{module}: {name}: no return type"


@pytest.mark.parametrize("module", [name for name in modules()])
def test_files_and_functions_stay_short(module: str) -> None:
    lines = len(modules()[module].read_text(encoding="utf-8").splitlines())
    # The schema is a list; splitting it would only hide half of it.
    assert lines <= 400 or module == "titanling.config.schema", f"{module} has {lines} lines"
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 60, f"{module}: {node.name} has {length} lines"


def test_torch_is_not_imported_where_it_is_not_needed() -> None:
    checks = "".join(
        f"import {name}\nassert not {{'torch', 'tensorboard'}} & sys.modules.keys(), '{name} imports torch'\n"
        for name in ROOMS_WITHOUT_TORCH
    )
    run = run_python("-c", f"import sys\n{checks}")
    assert run.returncode == 0, run.stderr


def test_names_of_test_files_are_unique() -> None:
    """pytest cannot collect two of one name, and notices only where both are run."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))
