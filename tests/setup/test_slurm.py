"""scripts/slurm/train.sbatch with stand-ins for srun and scontrol: when it queues itself again, and one real run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, TinyData, clean_env, tiny_config
from runs import rows

BATCH = ROOT / "scripts" / "slurm" / "train.sbatch"
# As the real one: its own options first, then the command; the output where it was told.
SRUN = """#!/usr/bin/env bash
output=/dev/stdout
while [[ $1 == --* ]]; do
  printf '%s\\n' "$1" >>"$RECORD/srun"
  if [[ $1 == --output=* ]]; then output=${1#--output=}; fi
  shift
done
echo $$ >"$RECORD/pid"
if [[ -n ${CODE:-} ]]; then
  printf '%s\\n' "$@" >>"$RECORD/command"
  env >"$RECORD/env"
  exit "$CODE"
fi
exec "$@" >>"$output" 2>&1
"""
SCONTROL = """#!/usr/bin/env bash
echo "$*" >>"$RECORD/scontrol"
"""


class Cluster:
    """A folder with Slurm's commands and what they were called with."""

    def __init__(self, folder: Path) -> None:
        self.record, programs = folder / "record", folder / "bin"
        for path in (self.record, programs):
            path.mkdir()
        for name, source in (("srun", SRUN), ("scontrol", SCONTROL)):
            (programs / name).write_text(source)
            (programs / name).chmod(0o755)
        python = Path(sys.executable).parent
        self.environment = clean_env(
            PATH=f"{programs}:{python}:{os.environ['PATH']}",
            RECORD=str(self.record),
            SLURM_JOB_ID="1234567",
            SLURM_JOB_NAME="mine",
            SLURM_SUBMIT_DIR=str(ROOT),
            SLURM_GPUS_ON_NODE="2",
            RUN_FOLDER=str(folder / "run"),
        )

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """The batch script, as slurmd runs it."""
        return subprocess.Popen(
            ["bash", BATCH, *arguments],
            env=self.environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def recorded(self, name: str) -> list[str]:
        """What one command was called with, a line each."""
        path = self.record / name
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    """Slurm's commands."""
    return Cluster(tmp_path)


@pytest.mark.parametrize("code", [0, 1, 2, 3, 75, 137])
def test_only_a_saved_run_is_queued_again(cluster: Cluster, code: int) -> None:
    batch = cluster.start("--training.steps", "3", CODE=str(code))
    output, error = batch.communicate(timeout=60)
    assert (batch.returncode, error) == (code, "")
    assert f"exit code {code}" in output
    assert cluster.recorded("scontrol") == (["requeue 1234567"] if code == 75 else [])


def test_what_it_starts(cluster: Cluster, tmp_path: Path) -> None:
    cluster.start("--training.steps", "3 4", CODE="0", CONFIG_FILE="my.toml").communicate(timeout=60)
    run = tmp_path / "run"
    assert cluster.recorded("command") == ["./run_train.sh", "--job.dump_folder", str(run), "--training.steps", "3 4"]
    options = {"--ntasks-per-node=1", "--kill-on-bad-exit=0", "--open-mode=append", f"--output={run}/logs/%j-%n.log"}
    assert set(cluster.recorded("srun")) == options
    assert {"NGPU=2", "CONFIG_FILE=my.toml", "MASTER_PORT=24567"} <= set(cluster.recorded("env"))
    assert (run / "logs").is_dir()


def test_the_run_folder_is_the_configs_own(cluster: Cluster, tmp_path: Path) -> None:
    """Not one for all configs of a job's name. It is read from the config as the run will read it."""
    (tmp_path / "my.toml").write_text(f'[job]\ndump_folder = "{tmp_path}/its own"\n')
    cluster.environment.pop("RUN_FOLDER")
    batch = cluster.start(CODE="0", CONFIG_FILE=str(tmp_path / "my.toml"), SLURM_NNODES="2")
    _, error = batch.communicate(timeout=60)
    assert (batch.returncode, error) == (0, "")
    assert cluster.recorded("command") == ["./run_train.sh"]
    assert f"--output={tmp_path}/its own/logs/%j-%n.log" in cluster.recorded("srun")


def test_not_in_the_projects_folder(cluster: Cluster, tmp_path: Path) -> None:
    batch = cluster.start(CODE="0", SLURM_SUBMIT_DIR=str(tmp_path))
    _, error = batch.communicate(timeout=60)
    assert batch.returncode == 2 and "has no run_train.sh" in error and len(error.splitlines()) == 1


def test_what_slurm_reads() -> None:
    """Signalled in time, steps only; queued again with its log kept; and it is a script."""
    asked = [line.removeprefix("#SBATCH ") for line in BATCH.read_text().splitlines() if line.startswith("#SBATCH ")]
    assert {"--signal=USR1@180", "--requeue", "--open-mode=append", "--ntasks-per-node=1"} <= set(asked)
    assert subprocess.run(["bash", "-n", BATCH]).returncode == 0


@pytest.mark.slow
def test_signalled_and_queued_again_until_done(cluster: Cluster, tmp_path: Path, tiny_data: TinyData) -> None:
    """The task gets USR1, as from Slurm's proctrack/cgroup, which signals the first process of a task alone."""
    config = str(tiny_config(tmp_path, tiny_data, {"training.steps": 120, "checkpoint.interval": 1000}))
    batch = cluster.start(CONFIG_FILE=config)
    deadline = time.monotonic() + 120
    while not _steps(tmp_path / "run"):
        assert batch.poll() is None and time.monotonic() < deadline, _log(tmp_path)
        time.sleep(0.01)
    os.kill(int(cluster.recorded("pid")[0]), signal.SIGUSR1)
    output, _ = batch.communicate(timeout=60)
    assert batch.returncode == 75 and "queued again" in output, output + _log(tmp_path)
    assert cluster.recorded("scontrol") == ["requeue 1234567"]
    reached = _steps(tmp_path / "run")[-1]
    assert reached < 120
    again = cluster.start(CONFIG_FILE=config, SLURM_RESTART_COUNT="1")
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0 and "start 1: exit code 0" in output, output + _log(tmp_path)
    assert cluster.recorded("scontrol") == ["requeue 1234567"]
    assert _steps(tmp_path / "run") == list(range(1, 121))
    assert f"resumed from {tmp_path}/run/checkpoints/step-{reached:06d}" in _log(tmp_path)


def _steps(run: Path) -> list[int]:
    try:
        return [step for step, _ in rows(run)]
    except (OSError, ValueError):  # not there yet, or in the middle of a write
        return []


def _log(folder: Path) -> str:
    """Both starts', in one file."""
    return (folder / "run" / "logs" / "%j-%n.log").read_text()
