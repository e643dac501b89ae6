"""run_train.sh and scripts/test.sh on a made-up machine: what they start, with which arguments and variables."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """
import json, os, sys
names = ("RANK", "WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "OMP_NUM_THREADS", "PYTHONUNBUFFERED")
report = {"argv": sys.argv[1:], "cwd": os.getcwd(), **{n: os.environ.get(n) for n in names}}
sys.stdout.write(json.dumps(report) + "\\n")  # one write, so that two processes' lines do not mix
sys.stdout.flush()
sys.exit(int(os.environ.get("CODE", "0")))
"""


@pytest.fixture
def trainer(torch_machine: Any) -> Any:
    """A machine whose titanling.train prints what it was given."""
    (torch_machine.root / "titanling" / "train.py").write_text(PROGRAM)
    return torch_machine


def reports(result: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """What each process printed, in rank order."""
    assert result.stderr == ""
    return sorted((json.loads(line) for line in result.stdout.splitlines()), key=lambda report: report["RANK"] or "")


def test_default(trainer: Any) -> None:
    result = trainer.run("run_train.sh", "--training.steps", "3")
    assert result.returncode == 0
    assert reports(result) == [
        {
            "argv": ["--config", f"{trainer.root}/train_configs/debug.toml", "--training.steps", "3"],
            "cwd": str(trainer.temporary),
            "RANK": None,
            "WORLD_SIZE": None,
            "GROUP_RANK": None,
            "MASTER_ADDR": None,
            "OMP_NUM_THREADS": None,
            "PYTHONUNBUFFERED": "1",
        }
    ]


def test_which_config(trainer: Any) -> None:
    [report] = reports(trainer.run("run_train.sh", CONFIG_FILE="my file.toml"))
    assert report["argv"] == ["--config", "my file.toml"]
    for arguments in (["--config", "b.toml"], ["--config=b.toml"]):
        [report] = reports(trainer.run("run_train.sh", *arguments, CONFIG_FILE="a.toml"))
        assert report["argv"] == arguments


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_exit_code(trainer: Any, processes: str, code: int) -> None:
    assert trainer.run("run_train.sh", NGPU=processes, CODE=str(code)).returncode == code


def test_two_processes(trainer: Any) -> None:
    result = trainer.run("run_train.sh", "--help", NGPU="2")
    assert [(r["RANK"], r["WORLD_SIZE"], r["MASTER_ADDR"]) for r in reports(result)] == [
        ("0", "2", "127.0.0.1"),
        ("1", "2", "127.0.0.1"),
    ]
    assert all(r["argv"][-1] == "--help" and r["OMP_NUM_THREADS"] for r in reports(result))


@pytest.mark.parametrize("name", ["NGPU", "NNODES"])
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "all", "08"])
def test_bad_counts(trainer: Any, name: str, value: str) -> None:
    result = trainer.run("run_train.sh", **{name: value})
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {name}={value}: must be a whole number, from 1 to ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("nodes", "head"),
    [
        ("nid[005123-005124,6],login1", "nid005123"),
        ("gpu7,gpu9", "gpu7"),
        ("only", "only"),
        ("a[3,5]-ib,b", "a3-ib"),
    ],
)
def test_slurm_step(trainer: Any, nodes: str, head: str) -> None:
    slurm = {"SLURM_NNODES": "2", "SLURM_STEP_ID": "0", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": nodes}
    [report] = reports(trainer.run("run_train.sh", **slurm))
    assert (report["RANK"], report["WORLD_SIZE"], report["GROUP_RANK"]) == ("1", "2", "1")
    assert report["MASTER_ADDR"] == head


def test_own_variables_win_over_slurm(trainer: Any) -> None:
    slurm = {"SLURM_NNODES": "2", "SLURM_STEP_ID": "0", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "x[1-2]"}
    [report] = reports(trainer.run("run_train.sh", **slurm, NNODES="3", NODE_RANK="2", MASTER_ADDR="head"))
    assert (report["RANK"], report["WORLD_SIZE"], report["MASTER_ADDR"]) == ("2", "3", "head")
    [report] = reports(trainer.run("run_train.sh", **slurm, NNODES="1"))
    assert report["RANK"] is None


def test_slurm_batch_script_without_srun(trainer: Any) -> None:
    result = trainer.run("run_train.sh", SLURM_NNODES="4", SLURM_NODEID="0")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and "srun --ntasks-per-node=1" in result.stderr


def test_test_command(torch_machine: Any) -> None:
    """It runs pytest, from the project's folder, with what the test extra lists."""
    result = torch_machine.run("scripts/test.sh", "tests/x.py")
    assert result.returncode == 2 and "no pip: install pytest>=8" in result.stderr
    for name, version in torch_machine.test_requirements.items():
        torch_machine.install(name, version)
    (torch_machine.site / "pytest.py").write_text("import os, sys; print(os.getcwd(), sys.argv[1:])")
    assert torch_machine.run("scripts/test.sh", "a", "b c").stdout == (
        f"{torch_machine.root} ['-n', '2', '--dist', 'loadscope', '--no-loadscope-reorder', 'a', 'b c']\n"
    )


def test_scripts_parse() -> None:
    root = Path(__file__).parents[2]
    for script in ("run_train.sh", "scripts/setup_env.sh", "scripts/test.sh", "scripts/gpu_check.sh", ".ci/run"):
        assert subprocess.run(["bash", "-n", root / script]).returncode == 0
        assert (root / script).stat().st_mode & 0o111


HOSTILE = ("tomli", "torch", "titanling", "runpy", "signal", "pickle", "argparse", "sitecustomize", "json", "worker")


@pytest.mark.parametrize(("processes", "path"), [("1", "::/nowhere:"), ("2", ":")])
def test_nothing_is_imported_from_where_the_user_stands(trainer: Any, processes: str, path: str) -> None:
    """Neither by the launcher nor by what it starts, nor through an empty entry of PYTHONPATH."""
    (trainer.root / "titanling" / "train.py").write_text("import json, sys, tomli, torch, subprocess\n" + PROGRAM)
    for name in HOSTILE:
        (trainer.temporary / f"{name}.py").write_text("import os; os.write(2, __name__.encode()); os._exit(99)")
    (trainer.temporary / "titanling").mkdir()
    (trainer.temporary / "titanling" / "__init__.py").write_text("import os; os._exit(98)")
    result = trainer.run("run_train.sh", NGPU=processes, PYTHONPATH=path)
    assert (result.returncode, len(reports(result))) == (0, int(processes))
