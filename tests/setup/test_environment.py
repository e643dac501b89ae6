"""Scripts started by a Python that lacks the packages: they go on in .venv, or say in one line what to run."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from titanling.environment import MODULES

HELP = """
import runpy, sys
for script in sys.argv[1:]:
    sys.argv[:] = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code, script
"""
COMMANDS = sorted({*ROOT.glob("scripts/*.py"), *ROOT.glob("benchmarks/*.py")})
COMMANDS = [path for path in COMMANDS if "__main__" in path.read_text() and path.name != "check_env.py"]
BEGINNING = """import sys
from os.path import dirname, realpath
sys.path.insert(0, dirname(dirname(realpath(__file__))))
from titanling import environment"""


@pytest.mark.parametrize("command", COMMANDS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_command_finds_its_environment_before_all_else(command: Path) -> None:
    tree = ast.parse(command.read_text(encoding="utf-8"), feature_version=(3, 6))  # what an old Python can still read
    assert ast.unparse(tree.body[1:5]).split("\n") == BEGINNING.split("\n")
    assert ast.unparse(tree.body[5]).startswith("environment.require(")
    # Python before 3.8 wants parentheses there.
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple)):
        starred = any(isinstance(element, ast.Starred) for element in node.value.elts)
        assert not starred or node.value.col_offset < node.value.elts[0].col_offset, node.lineno


def test_old_pythons_can_read_what_finds_the_environment() -> None:
    for path in ("titanling/__init__.py", "titanling/environment.py", "titanling/train.py"):
        ast.parse((ROOT / path).read_text(encoding="utf-8"), feature_version=(3, 6))


def test_the_modules_are_those_of_pyproject() -> None:
    dependencies = (ROOT / "pyproject.toml").read_text().split("\ndependencies = [")[1].split("\n]")[0]
    names = re.findall(r'^    "([\w-]+)', dependencies, re.MULTILINE)
    assert sorted(MODULES) == sorted(name.replace("-", "_") for name in names)


class Place:
    """A copy of the project in a folder with a space in its name, and a Python without packages."""

    def __init__(self, folder: Path) -> None:
        self.root = (folder / "a copy").resolve()
        self.venv = self.root / ".venv"
        self.setup = f"'{self.root}/scripts/setup_env.sh'"
        self.anew = f"mv '{self.venv}' '{self.venv}.old' && {self.setup}"
        for name in ("scripts", "titanling", "triton_kernels"):
            shutil.copytree(ROOT / name, self.root / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", self.root)
        self.bare = self.environment(folder / "bare")
        # The project, whatever path leads to it.
        (folder / "elsewhere").mkdir()
        self.script = folder / "elsewhere" / "a link.py"
        self.script.symlink_to(self.root / "scripts" / "data.py")

    def environment(self, folder: Path, packages: bool = False) -> Path:
        """Make a Python environment, without packages or with those of the tests."""
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        if packages:
            paths = "".join(f"{path}\n" for path in sys.path if path.endswith("-packages"))
            (next(folder.glob("lib/python3*/site-packages")) / "tests.pth").write_text(paths)
        return folder / "bin" / "python"

    def run(
        self, *command: str | Path, flags: tuple[str, ...] = (), cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Start the bare Python, in another folder if nothing else is said."""
        words = [self.bare, *flags, *(command or (self.script, "no  such"))]
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
        return subprocess.run(words, cwd=cwd or self.script.parent, env=environment, capture_output=True, text=True)

    def refusal(self, *command: str | Path, cwd: Path | None = None) -> tuple[str, str]:
        """The one line with which it ends: what is wrong, and the command that it names."""
        done = self.run(*command, cwd=cwd)
        found = re.fullmatch(r"error: (.*?); run (.*) once, then the same command again\n", done.stderr)
        assert done.returncode == 2 and done.stdout == "" and found, done.stderr
        return found[1], found[2]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The copy, made once."""
    return Place(tmp_path_factory.mktemp("bare"))


@pytest.fixture
def place(project: Place) -> Place:
    """The copy, without a .venv."""
    if project.venv.is_symlink():
        project.venv.unlink()
    shutil.rmtree(project.venv, ignore_errors=True)
    return project


def test_without_a_venv_each_script_says_what_to_run_and_gives_help(place: Place) -> None:
    scripts = [path for path in COMMANDS if path.parent.name == "scripts"]
    refused = (f"{place.bare} lacks {', '.join(MODULES)}", place.setup)
    assert place.refusal() == place.refusal("-m", "titanling.train", "--help", cwd=place.root) == refused
    # In one process, for all of them begin alike.
    helped = place.run("-c", HELP, *scripts, flags=("-I", "-S"))
    assert (helped.returncode, helped.stderr) == (0, "")
    assert re.findall(r"^usage: (\S+)", helped.stdout, re.MULTILINE) == [path.name for path in scripts]


@pytest.mark.parametrize("flags", [(), ("-I", "-S")])
def test_with_a_venv_the_command_goes_on_there(place: Place, flags: tuple[str, ...]) -> None:
    python = place.environment(place.venv, packages=True)
    done = place.run(flags=flags)
    direct = subprocess.run([python, place.script, "no  such"], capture_output=True, text=True)
    assert "invalid choice: 'no  such'" in done.stderr and done.stderr == direct.stderr
    assert done.returncode == direct.returncode == 2


def test_a_venv_that_does_not_serve(place: Place) -> None:
    place.venv.symlink_to(place.root / "gone")
    assert place.refusal() == (f"{place.venv} is broken (bin/python: No such file or directory)", place.anew)
    place.venv.unlink()
    (place.venv / "bin").mkdir(parents=True)
    python = place.venv / "bin" / "python"
    for content, why in (("no program", "(bin/python: Exec format error)"), ("#!/bin/sh\nexit 1\n", "")):
        python.write_text(content)
        python.chmod(0o755)
        assert place.refusal() == (f"{place.venv} is broken {why}".strip(), place.anew)
    python.unlink()
    python = place.environment(place.venv)
    assert place.refusal() == (f"{place.venv} lacks torch", place.anew)
    # Made for what pyproject.toml said then: it is completed.
    (place.venv / ".titanling-ready").touch()
    (place.venv / ".titanling-pyproject.toml").write_text("other")
    assert place.refusal() == (f"{place.venv} lacks torch", place.setup)


def test_a_venv_that_promises_too_much_is_tried_once(place: Place) -> None:
    (place.venv / "bin").mkdir(parents=True)
    python = place.venv / "bin" / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$1" in *check_env.py) echo "torch 2.13.0";; *) exec "{place.bare}" "$@";; esac\n'
    )
    python.chmod(0o755)
    assert place.refusal() == (f"{place.venv} lacks {', '.join(MODULES)}", place.anew)
