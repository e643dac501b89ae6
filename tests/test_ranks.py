"""titanling.ranks: what launchers and clusters may say, what is understood, and what is refused in one line."""

import re

import pytest
from helpers import ROOT, clean_env, run_python

from titanling import ranks
from titanling.errors import UserError
from titanling.ranks import Process, Topology, first_host, planned, refuse_unlaunched, this_process, topology

MEET = {"MASTER_ADDR": "n0", "MASTER_PORT": "29500"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1", **MEET}
JOB = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_JOB_NODELIST": "rack[1-2]n[01-04]"}
TWO_NODES = STEP | {"SLURM_NNODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "1"}
NO_NUMBERS = ("abc", "-1", "1.5", "08", "+1", " 1", "1e3", "٣", "²", "9" * 5000, "99999999999", "\x1b[2J")


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher's variables."""
    for name in set(TORCHRUN) | set(JOB) | set(TWO_NODES) | {"NGPU", "NNODES", "NODE_RANK"}:
        monkeypatch.delenv(name, raising=False)
    for _, *names in ranks.TASKS:
        for name in filter(None, names):
            monkeypatch.delenv(name, raising=False)


def say(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    """Set variables."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Process()),
        ({"RANK": "", "WORLD_SIZE": "", "MASTER_ADDR": ""}, Process()),
        (TORCHRUN, Process(3, 4, 1, 2, "n0", 29500)),
        (TORCHRUN | JOB | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}, Process(3, 4, 1, 2, "n0", 29500)),
        ({"RANK": "1", "WORLD_SIZE": "2", **MEET}, Process(1, 2, 0, None, "n0", 29500)),  # one to a pod
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", **MEET}, Process()),
        ({"WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "4", "OMPI_COMM_WORLD_SIZE": "4"}, Process()),  # as advised
        (JOB, Process()),  # a batch script, or an interactive shell
        (JOB | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}, Process()),
        ({"PMI_SIZE": "1", "PMI_RANK": "0", "PMIX_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, Process()),
        ({"PMI_SIZE": "none", "PMI_RANK": "-1"}, Process()),
    ],
)
def test_what_is_understood(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: Process) -> None:
    say(monkeypatch, variables)
    assert this_process() == expected


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"RANK": "1"}, "RANK=1 without WORLD_SIZE: left over from another launcher? unset RANK to start anew"),
        ({"LOCAL_RANK": "1", "RANK": "0"}, "LOCAL_RANK=1 without WORLD_SIZE"),
        ({"RANK": "1", "WORLD_SIZE": ""}, "RANK=1 without WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 needs RANK, MASTER_ADDR, MASTER_PORT, which a launcher sets"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a"}, "WORLD_SIZE=2 needs MASTER_PORT"),
        (TORCHRUN | {"RANK": "4"}, "RANK=4: must be below WORLD_SIZE=4; unset RANK LOCAL_RANK WORLD_SIZE"),
        (TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"}, "LOCAL_WORLD_SIZE=2 is more than WORLD_SIZE=1"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "LOCAL_RANK=2: must be below LOCAL_WORLD_SIZE=2"),
        (TORCHRUN | {"MASTER_PORT": "65536"}, "MASTER_PORT=65536: must be a whole number, from 1 to 65,535"),
        (TORCHRUN | {"MASTER_PORT": "0"}, "MASTER_PORT=0"),
        (TORCHRUN | {"MASTER_ADDR": "a b"}, "MASTER_ADDR=a b: must be the name or address of a host"),
        (TORCHRUN | {"MASTER_ADDR": "a" * 9000}, "(9,000 characters): must be the name"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "WORLD_SIZE=0: must be a whole number, from 1 to"),
        (
            {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"},
            "SLURM_STEP_NUM_TASKS=2: Slurm's srun has started",
        ),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}, "(srun --ntasks-per-node=1) with NGPU=4, or set "),
        (TWO_NODES, "SLURM_STEP_NUM_TASKS=2"),
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
            "OMPI_COMM_WORLD_SIZE=2: Open MPI has started 2 of",
        ),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "PMI_SIZE=2"),
        ({"PMIX_RANK": "1"}, "PMIX_RANK=1: PMIx has started several"),
        ({"PALS_RANKID": "3"}, "PALS_RANKID=3"),
        ({"MV2_COMM_WORLD_SIZE": "2"}, "or set WORLD_SIZE=1 if each has a run of its own"),
        ({"FLUX_JOB_SIZE": "8", "FLUX_JOB_NNODES": "2"}, "NGPU=4"),
        (
            JOB | {"SLURM_STEP_ID": "0"},
            "SLURM_NTASKS=4: Slurm's srun has started 4",
        ),  # others hidden
        ({"SLURM_LOCALID": "1"}, "SLURM_LOCALID=1: Slurm's srun has started several"),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "1"}, "OMPI_COMM_WORLD_LOCAL_RANK=1: Open MPI has started several"),
        *(({name: value}, f"{name}=") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") for value in NO_NUMBERS),
        *((TORCHRUN | {"LOCAL_WORLD_SIZE": value}, "LOCAL_WORLD_SIZE=") for value in NO_NUMBERS),
    ],
)
def test_what_cannot_be_is_refused_in_one_short_line(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], says: str
) -> None:
    say(monkeypatch, variables)
    with pytest.raises(UserError, match=re.escape(says)) as refused:
        this_process()
    assert len(str(refused.value)) < 320


def test_the_remedies_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every "unset …" is followed."""
    for variables in ({"RANK": "1"}, TORCHRUN | {"RANK": "4"}, TORCHRUN | {"LOCAL_RANK": "2"}):
        say(monkeypatch, variables)
        with pytest.raises(UserError) as refused:
            this_process()
        for name in re.findall(r"unset ([A-Z_ ]+) to start anew", str(refused.value))[0].split():
            monkeypatch.delenv(name)
        assert this_process() == Process()
        assert topology() == Topology()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Topology()),
        ({"NGPU": "", "NNODES": "", "NODE_RANK": "", "MASTER_ADDR": ""}, Topology()),
        ({"NGPU": "8"}, Topology(8)),
        ({"NGPU": "2", "NNODES": "4", "NODE_RANK": "3", "MASTER_ADDR": "a"}, Topology(2, 4, 3, "a", 29500)),
        (TWO_NODES | {"NGPU": "4"}, Topology(4, 2, 1, "rack1n01", 29500)),
        (TWO_NODES | {"MASTER_ADDR": "b", "MASTER_PORT": "9"}, Topology(1, 2, 1, "b", 9)),
        (TWO_NODES | {"WORLD_SIZE": "1", "NGPU": "2"}, Topology(2)),
        (JOB | {"NGPU": "4"}, Topology(4)),
        (TORCHRUN, Topology()),  # this process is one of them
        (  # a Kubernetes operator's variables, passed on
            {"WORLD_SIZE": "2", "RANK": "1", "NNODES": "2", "NODE_RANK": "1", "NGPU": "8", **MEET},
            Topology(8, 2, 1, "n0", 29500),
        ),
        (  # Open MPI as the way to each node
            {"OMPI_COMM_WORLD_SIZE": "2", "NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a"},
            Topology(1, 2, 0, "a", 29500),
        ),
    ],
)
def test_what_is_to_be_started(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: Topology) -> None:
    say(monkeypatch, variables)
    assert topology() == expected


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        (
            {"NNODES": "2"},
            "NNODES=2 needs NODE_RANK and MASTER_ADDR: set NODE_RANK=0…1 and MASTER_ADDR=<host of node 0>",
        ),
        (
            {"NODE_RANK": "1"},
            "NODE_RANK=1: must be below NNODES=1; count the nodes from 0, and set NNODES to their number",
        ),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "NODE_RANK=2: must be below NNODES=2"),
        ({"NGPU": "2000"}, "NGPU=2000: must be a whole number, from 1 to 1,024"),
        ({"RANK": "1", "NGPU": "2"}, "RANK=1 without WORLD_SIZE"),
        (TORCHRUN | {"NGPU": "2"}, "WORLD_SIZE=4 says that a launcher has started this process, and NGPU × NNODES = 2"),
        (STEP | {"SLURM_STEP_NUM_TASKS": "2", "NGPU": "2"}, "SLURM_STEP_NUM_TASKS=2"),
        (TWO_NODES | {"SLURM_STEP_NUM_TASKS": "4"}, "with NGPU=2, or"),
        (TWO_NODES | {"NNODES": "1"}, "SLURM_STEP_NUM_TASKS=2"),
        (TWO_NODES | {"SLURM_LOCALID": "1"}, "SLURM_LOCALID=1"),  # two tasks on one node, none on the other
        (TWO_NODES | {"SLURM_JOB_NODELIST": "a[1-"}, "SLURM_JOB_NODELIST=a[1-: is no list of nodes; set MASTER_ADDR="),
        (TWO_NODES | {"SLURM_STEP_ID": ""}, "this Slurm job has 2 nodes: start me on each with srun"),
        (TWO_NODES | {"SLURM_STEP_ID": "4294967290"}, "this Slurm job has 2 nodes"),  # an interactive shell's
        ({"SLURM_NNODES": "many"}, "SLURM_NNODES=many"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "NGPU": "2"}, "OMPI_COMM_WORLD_SIZE=2"),
        *(({name: value}, f"{name}=") for name in ("NGPU", "NNODES", "NODE_RANK") for value in NO_NUMBERS),
    ],
)
def test_what_cannot_be_started(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], says: str) -> None:
    say(monkeypatch, variables)
    with pytest.raises(UserError, match=re.escape(says)):
        topology()


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("nid[005123-005124,6],login1", "nid005123"),
        ("gpu7,gpu9", "gpu7"),
        ("only", "only"),
        ("a[3,5]-ib,b", "a3-ib"),
        ("rack[1-2]n[01-04]", "rack1n01"),
        ("c[1,3]-node[07-09]", "c1-node07"),
        ("c[1,3]-node[07-09],d[1-2]", "c1-node07"),
        ("x,rack[1-2]n[01-04]", "x"),
        ("[01-02].example.org", "01.example.org"),
        ("bgl[000x133]", "bgl000"),
        ("r[1-2]c[0003,0005-0007]b[9]-ib0", "r1c0003b9-ib0"),
        ("a[1-", None),
        ("a]b", None),
        ("a[x-y]", None),
        ("a[]", None),
        (",a", None),
        ("", None),
    ],
)
def test_first_host(nodes: str, host: str | None) -> None:
    assert first_host(nodes) == host


def test_processes_that_nobody_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_unlaunched()
    say(monkeypatch, {"NGPU": "2"})
    assert planned() == 2
    with pytest.raises(UserError, match="NGPU × NNODES = 2 processes are asked for, and this command is one process"):
        refuse_unlaunched()
    say(monkeypatch, TORCHRUN)
    refuse_unlaunched()
    assert planned() == 4


def test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, TORCHRUN)
    with ranks.alone():
        assert this_process() == Process(local_rank=1)
    assert this_process() == Process(3, 4, 1, 2, "n0", 29500)


@pytest.mark.parametrize("variables", [{"RANK": "abc", "WORLD_SIZE": "2"}, {"NGPU": "2"}])
def test_training_says_so_before_anything_else(variables: dict[str, str]) -> None:
    run = run_python("-m", "titanling.train", "--config", ROOT / "train_configs/debug.toml", env=clean_env(**variables))
    assert (run.returncode, run.stdout, len(run.stderr.splitlines())) == (2, "", 1)
