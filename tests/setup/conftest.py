"""Small stand-ins for a user's machine: a copy of the project, environments and wheels, all offline."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from helpers import LAUNCHER

ROOT = Path(__file__).parents[2]
REQUIREMENT = r'^    "([\w-]+)[>=]=([\d.]+)'
DEPENDENCIES, EXTRAS = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")
REQUIREMENTS = dict(re.findall(REQUIREMENT, DEPENDENCIES, re.MULTILINE)) | {"torch": "2.13.0"}
"""A version that fits, by package that the project needs."""
TEST_REQUIREMENTS = dict(re.findall(REQUIREMENT, EXTRAS.split("test = [")[1].split("\n]")[0], re.MULTILINE))
"""The same for the test extra."""
# A build backend that needs nothing from an index: it links the project with a .pth file.
BACKEND = """
import os, zipfile

def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    name = "titanling-0.1.0-py3-none-any.whl"
    info = "titanling-0.1.0.dist-info"
    requires = REQUIRES
    with zipfile.ZipFile(os.path.join(wheel_directory, name), "w") as wheel:
        wheel.writestr("titanling.pth", os.getcwd() + "\\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: titanling\\nVersion: 0.1.0\\n" + requires)
        tags = "Root-Is-Purelib: true\\nTag: py3-none-any\\n"
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nGenerator: t\\n" + tags)
        wheel.writestr(f"{info}/RECORD", "")
    return name
"""


def own_pip() -> tuple[Path, str]:
    """Folder and version of the tests' own pip.

    Not by importing it: from then on setuptools, and with it torch's compiler, could not be imported any more, for it
    leaves the standard library's distutils to pip for the rest of the process.
    """
    try:
        pip = distribution("pip")
    except PackageNotFoundError:
        pytest.skip("needs pip")
    return Path(str(pip.locate_file("pip"))), pip.version


def make_wheel(folder: Path, name: str, version: str, requires: str | None = None, module: bool = False) -> None:
    """Write an empty but installable wheel, with an empty module if that is wanted."""
    stem = f"{name.replace('-', '_')}-{version}"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    if requires:
        metadata += f"Requires-Dist: {requires}\n"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{stem}.dist-info/METADATA", metadata)
        wheel.writestr(
            f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{stem}.dist-info/RECORD", "")
        if module:
            wheel.writestr(f"{name.replace('-', '_')}.py", "")


# What titanling.launch imports.
LAUNCH = (
    "cli",
    "environment",
    "errors",
    "files",
    "interrupts",
    "launch",
    "paths",
    "ranks",
    "start",
    "terminal",
    "text",
)


class Machine:
    """A project copy in a folder with a space in its name, and an active Python environment without pip."""

    requirements = REQUIREMENTS
    test_requirements = TEST_REQUIREMENTS

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a copy"
        self.environment = folder / "env"
        self.wheels = folder / "wheels"
        self.temporary = folder / "tmp"
        for path in (self.root / "titanling", self.wheels, self.temporary):
            path.mkdir(parents=True)
        shutil.copytree(ROOT / "scripts", self.root / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
        for name in (
            "run_train.sh",
            "pyproject.toml",
            *(f"titanling/{name}.py" for name in LAUNCH),
        ):
            shutil.copy(ROOT / name, self.root / name)
        (self.root / "titanling" / "__init__.py").write_text('__version__ = "0.1.0"\n')
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", self.environment], check=True)
        # git and the like are not needed; the tools of a bare system are.
        self.variables = {
            "PATH": f"{self.environment}/bin:/usr/bin:/bin",
            "HOME": str(folder),
            "TMPDIR": str(self.temporary),
            "PIP_CONFIG_FILE": "/dev/null",
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": self.wheels.as_uri(),
        }

    @property
    def site(self) -> Path:
        """site-packages of the active environment."""
        return next(self.environment.glob("lib/python3*/site-packages"))

    def install(self, name: str, version: str) -> None:
        """Put a package's metadata and an empty module into the active environment, as if it were installed."""
        info = self.site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "RECORD").write_text(f"{info.name}/METADATA,,\n{info.name}/RECORD,,\n")
        (self.site / f"{name.replace('-', '_')}.py").touch()

    def uninstall(self, name: str) -> None:
        """Take a package's metadata away again."""
        for info in self.site.glob(f"{name}-*.dist-info"):
            shutil.rmtree(info)

    def install_pip(self) -> None:
        """Give the active environment the pip that the tests' own environment has."""
        linked = self.environment / "pip"
        linked.mkdir()
        (linked / "pip").symlink_to(own_pip()[0])
        (self.site / "pip.pth").write_text(f"{linked}\n")

    def offer(self, requirements: dict[str, str], requires: str | None = None) -> None:
        """Add wheels to the package index; each depends on `requires`."""
        for name, version in requirements.items():
            make_wheel(self.wheels, name, version, requires, module=True)

    def offer_pip(self) -> None:
        """Add the tests' own pip to the package index."""
        package, version = own_pip()
        make_wheel(self.wheels, "pip", version)
        with zipfile.ZipFile(self.wheels / f"pip-{version}-py3-none-any.whl", "a") as wheel:
            for path in package.rglob("*"):
                if path.is_file() and path.suffix != ".pyc":
                    wheel.write(path, Path("pip") / path.relative_to(package))

    def hide_ensurepip(self) -> dict[str, str]:
        """Variables with which Python lacks ensurepip, as Debian's does without python3-venv."""
        hidden = self.temporary / "hidden"
        hidden.mkdir()
        (hidden / "ensurepip.py").write_text("raise ImportError('as on Debian')\n")
        return {"PYTHONPATH": str(hidden)}

    def offer_everything(self) -> None:
        """Let the project's copy be installed with its test extra, without setuptools and offline."""
        self.offer(REQUIREMENTS | TEST_REQUIREMENTS)
        pyproject = self.root / "pyproject.toml"
        text = pyproject.read_text()
        requires = "".join(f"Requires-Dist: {name}\n" for name in REQUIREMENTS)
        requires += "Provides-Extra: test\n"
        requires += "".join(f'Requires-Dist: {name}; extra == "test"\n' for name in TEST_REQUIREMENTS)
        (self.root / "backend.py").write_text(BACKEND.replace("REQUIRES", repr(requires)))
        system = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        pyproject.write_text(re.sub(r"\[build-system\]\n.*?\n(?=\n)", system, text, count=1, flags=re.DOTALL))

    def run(self, *command: str, timeout: float = 120, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the project from an unrelated folder."""
        return subprocess.run(
            [str(self.root / command[0]), *command[1:]],
            env=self.variables | variables,
            cwd=self.temporary,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def setup(self, *extras: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run scripts/setup_env.sh."""
        return self.run("scripts/setup_env.sh", *extras, **variables)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A bare machine: Python, no torch."""
    return Machine(tmp_path)


@pytest.fixture
def torch_machine(machine: Machine) -> Machine:
    """A machine whose active environment has torch and everything else."""
    for name, version in REQUIREMENTS.items():
        machine.install(name, version)
    return machine


@pytest.fixture
def module(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """Writes a program `worker` and returns the environment in which it and titanling can be imported."""

    def write(source: str) -> dict[str, str]:
        (tmp_path / "worker.py").write_text(source)
        environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER}
        return environment | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "NGPU": "2", "PYTHONUNBUFFERED": "1"}

    return write
