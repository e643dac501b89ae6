"""scripts/setup_env.sh on made-up machines: what it uses, what it installs, what it says."""

import importlib.util
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def one_error(result: subprocess.CompletedProcess[str]) -> str:
    """The one error line of a command that must end with code 2."""
    errors = [line for line in result.stderr.splitlines() if not re.match(r"(Creating|Installing|Using) ", line)]
    assert result.returncode == 2, result.stderr
    assert len(errors) == 1 and errors[0].startswith("error: "), result.stderr
    return errors[0]


def installed(machine: Any, name: str) -> list[str]:
    """Versions of a package in the active environment."""
    return [path.name for path in machine.site.glob(f"{name}-*.dist-info")]


def test_active_environment_is_used_untouched(torch_machine: Any) -> None:
    before = sorted(torch_machine.site.iterdir())
    result = torch_machine.setup()
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert sorted(torch_machine.site.iterdir()) == before
    assert not (torch_machine.root / ".venv").exists()


@pytest.mark.parametrize("version", ["2.11.0", "2.13.1+rocm6.4", "2.12.0a0+git1234.nv26.01"])
def test_torch_in_range(torch_machine: Any, version: str) -> None:
    torch_machine.uninstall("torch")
    torch_machine.install("torch", version)
    assert torch_machine.setup().returncode == 0


@pytest.mark.parametrize("version", ["2.10.1", "2.14.0", "2.9.0+cu128", "3.0"])
def test_torch_out_of_range(machine: Any, version: str) -> None:
    machine.install("torch", version)
    error = one_error(machine.setup())
    assert f"has torch {version}, needs torch>=2.11,<2.14" in error and "activate" in error
    assert not (machine.root / ".venv").exists()


def test_only_missing_requirements_are_installed(torch_machine: Any) -> None:
    torch_machine.install_pip()
    torch_machine.install("triton", "3.7.1")
    numpy = torch_machine.requirements["numpy"]
    torch_machine.uninstall("rich")
    torch_machine.uninstall("tomli")
    torch_machine.install("tomli", "1.2.0")
    torch_machine.offer({"rich": "14.1", "tomli": "2.3", "torch": "2.13.5", "triton": "3.9", "numpy": "2.4"})
    result = torch_machine.setup()
    assert result.returncode == 0, result.stderr
    assert "Using torch 2.13.0" in result.stderr and "installing tomli>=2.0 rich>=13" in result.stderr
    assert installed(torch_machine, "rich") == ["rich-14.1.dist-info"]
    assert installed(torch_machine, "tomli") == ["tomli-2.3.dist-info"]
    assert installed(torch_machine, "torch") == ["torch-2.13.0.dist-info"]
    assert installed(torch_machine, "triton") == ["triton-3.7.1.dist-info"]
    assert installed(torch_machine, "numpy") == [f"numpy-{numpy}.dist-info"]
    assert list(torch_machine.temporary.iterdir()) == []
    assert torch_machine.setup(PIP_FIND_LINKS="").stderr == ""


def test_torch_is_never_replaced(torch_machine: Any) -> None:
    torch_machine.install_pip()
    torch_machine.uninstall("rich")
    torch_machine.offer({"rich": "14.1"}, requires="torch>=2.13.5")
    torch_machine.offer({"torch": "2.13.5"})
    error = one_error(torch_machine.setup())
    assert "could not install rich>=13" in error and "own versions are in the way" in error
    assert installed(torch_machine, "torch") == ["torch-2.13.0.dist-info"]


def torch_of(machine: Any, version: str, requires: str | None = None) -> None:
    """Exchange the active environment's torch."""
    machine.uninstall("torch")
    machine.install("torch", version)
    if requires:
        with open(machine.site / f"torch-{version}.dist-info" / "METADATA", "a", encoding="utf-8") as metadata:
            metadata.write(f"Requires-Dist: {requires}\n")


@pytest.mark.parametrize(
    ("version", "requires", "wanted"),
    [
        ("2.13.0+cpu", None, True),
        ("2.13.0", None, True),  # as on PyPI for machines without CUDA
        ("2.13.0", 'triton==3.7.1; platform_system == "Linux"', False),
        ("2.13.0", "nvidia-cublas-cu12", False),
        ("2.13.0+cu130", None, False),
        ("2.13.1+rocm6.4", "pytorch-triton-rocm==3.7.1", False),
        ("2.12.0a0+git1234.nv26.01", None, False),
    ],
)
def test_triton_is_only_for_cpu_builds_of_torch(
    torch_machine: Any, version: str, requires: str | None, wanted: bool
) -> None:
    torch_of(torch_machine, version, requires)
    torch_machine.install_pip()
    torch_machine.offer(torch_machine.test_requirements)
    torch_machine.offer({"triton": "3.9"})
    result = torch_machine.setup("test")
    assert result.returncode == 0, result.stderr
    assert installed(torch_machine, "triton") == (["triton-3.6.dist-info"] if wanted else [])
    assert torch_machine.setup("test", PIP_FIND_LINKS="").stderr == ""


@pytest.mark.parametrize("name", ["triton", "pytorch-triton-rocm", "triton-xpu"])
def test_no_triton_over_another(torch_machine: Any, name: str) -> None:
    torch_machine.install(name, "3.9")
    torch_machine.install_pip()
    torch_machine.offer(torch_machine.test_requirements)
    result = torch_machine.setup("test")
    assert result.returncode == 0, result.stderr
    assert installed(torch_machine, "triton") == (["triton-3.9.dist-info"] if name == "triton" else [])


def test_no_triton_over_that_of_a_rocm_torch_in_venv(machine: Any) -> None:
    machine.offer_everything()
    (machine.wheels / "torch-2.13.0-py3-none-any.whl").unlink()
    machine.offer({"torch": "2.13.0+rocm6.4"}, requires="pytorch-triton-rocm")
    machine.offer({"pytorch-triton-rocm": "3.7.1"})
    result = machine.setup("test")
    assert result.returncode == 0, result.stderr
    packages = [path.name for path in machine.root.glob(".venv/lib/*/site-packages/*.dist-info")]
    assert "pytest-8.dist-info" in packages and "pytorch_triton_rocm-3.7.1.dist-info" in packages
    assert not [name for name in packages if name.startswith("triton-")]


def test_missing_requirement_without_pip(torch_machine: Any) -> None:
    torch_machine.uninstall("rich")
    assert "no pip: install rich>=13" in one_error(torch_machine.setup())


def test_index_out_of_reach(machine: Any) -> None:
    unreachable = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_NO_INDEX": "", "PIP_FIND_LINKS": "", "PIP_RETRIES": "0"}
    result = machine.setup(**unreachable)
    error = one_error(result)
    assert "check the network, HTTPS_PROXY and PIP_INDEX_URL" in error
    log = Path(re.search(r"\((/.*?)\)", error).group(1))
    assert "127.0.0.1" in log.read_text()
    assert not (machine.root / ".venv" / ".titanling-ready").exists()


def test_venv_is_made_once_and_extended(machine: Any) -> None:
    machine.offer_everything()
    # The Python that the machine has refuses, and names a command that makes it work: here, beside a broken .venv.
    (machine.root / ".venv").mkdir()
    script = [str(machine.environment / "bin" / "python"), str(machine.root / "scripts" / "data.py")]
    refused = machine.run(*script)
    remedy = re.search(r"; run (.*) once, then the same command again\n$", refused.stderr)
    assert refused.returncode == 2 and remedy and refused.stderr.count("\n") == 1, refused.stderr
    first = machine.run("/bin/sh", "-c", remedy[1])
    assert first.returncode == 0, first.stderr
    assert machine.run(*script).stderr.startswith("usage: data.py")
    lines = first.stderr.splitlines()
    assert len(lines) == 3 and lines[0].startswith("Creating .venv (Python 3.") and "torch 2.13.0" in lines[2]
    python = machine.root / ".venv" / "bin" / "python"
    assert subprocess.run([python, "-c", "import titanling"], cwd="/").returncode == 0

    offline = {"PIP_FIND_LINKS": ""}
    assert machine.setup(**offline).stderr == ""
    assert "transformers" not in str(list(machine.root.glob(".venv/lib/*/site-packages/*")))
    added = machine.setup("test")
    assert added.returncode == 0 and added.stderr.splitlines()[0].startswith("Installing"), added.stderr
    # Having the extra, neither call installs anything.
    assert machine.setup("test", **offline).stderr == ""
    assert machine.setup(**offline).stderr == ""

    # Its own environment, when active, is no foreign one.
    assert machine.setup(PATH=f"{python.parent}:/usr/bin:/bin", **offline).stderr == ""

    # An interrupted set-up leaves no stamp, and is redone from the start.
    (machine.root / ".venv" / ".titanling-ready").unlink()
    assert machine.setup("test").stderr.startswith("Creating .venv")


def test_foreign_venv_is_left_alone(machine: Any) -> None:
    (machine.root / ".venv").mkdir()
    (machine.root / ".venv" / "mine").touch()
    assert "not made by this script" in one_error(machine.setup())
    assert (machine.root / ".venv" / "mine").exists()


def test_debian_without_venv_module(machine: Any) -> None:
    error = one_error(machine.setup(**machine.hide_ensurepip()))
    assert re.search(r"apt install python3\.\d+-venv", error)


def test_debian_with_pip_but_without_venv_module(machine: Any) -> None:
    machine.install_pip()
    machine.offer_everything()
    machine.offer_pip()
    result = machine.setup(**machine.hide_ensurepip())
    assert result.returncode == 0, result.stderr
    assert (machine.root / ".venv" / ".titanling-ready").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_read_only_checkout(machine: Any) -> None:
    machine.root.chmod(0o555)
    try:
        assert "make the folder writable" in one_error(machine.setup())
    finally:
        machine.root.chmod(0o755)


def test_two_at_once(machine: Any) -> None:
    machine.offer_everything()
    command = [str(machine.root / "scripts" / "setup_env.sh")]
    both = [
        subprocess.Popen(command, env=machine.variables, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
        for _ in range(2)
    ]
    texts = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], texts
    assert sum("Creating .venv" in text for text in texts) == 1


def test_help() -> None:
    result = subprocess.run([ROOT / "scripts" / "setup_env.sh", "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "example:" in result.stdout and "set -" not in result.stdout


def test_requirements_are_all_read() -> None:
    import tomli

    spec = importlib.util.spec_from_file_location("check_env", ROOT / "scripts" / "check_env.py")
    check_env = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check_env)
    project = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert check_env.requirements([]) == project["dependencies"]
    for extra, wanted in project["optional-dependencies"].items():
        assert check_env.requirements([extra]) == project["dependencies"] + wanted
    with pytest.raises(ValueError, match="no extra named nothing"):
        check_env.requirements(["nothing"])
    cases = {"1.26": True, "1.26.4": True, "2.0": True, "1.9": False, "1.25.9": False, None: False}
    assert {version: check_env.satisfied("numpy>=1.26", version) for version in cases} == cases
    assert check_env.satisfied("triton>=3.6,<3.8; sys_platform == 'linux'", "3.7.1")
    assert check_env.satisfied("ruff==0.17", "0.17.0") and not check_env.satisfied("ruff==0.17.6", "0.17.5")
