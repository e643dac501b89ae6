"""Two nodes on this machine: with addresses of their own they train as one node does, and no start waits for ever.

The nodes are network namespaces joined by a cable where the kernel lets an ordinary user make them, as Linux does by
default; otherwise 127.0.0.2 and 127.0.0.3. In a namespace the host's name leads to the loopback interface or nowhere,
as it does on many a cloud machine.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import ROOT, TinyData, clean_env, tiny_config
from runs import differing, rows, saved_shards

from titanling.launch import free_port
from titanling.parallel.rendezvous import _choose_gloo_interface

STEPS = 4
PATIENCE = {"comm.init_timeout_seconds": 90}
IMPATIENT = {"comm.init_timeout_seconds": 3}
# Runs in a user and network namespace of its own, makes another, and stays for as long as its standard input is open.
CABLE = """
set -e
ip link set lo up
unshare --net sleep 3600 & other=$!
trap 'kill $other' EXIT
until [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.02; done
ip link add cable0 type veth peer name cable1 netns $other
ip address add 10.77.0.1/24 dev cable0
ip link set cable0 up
nsenter --target $other --net ip link set lo up
nsenter --target $other --net ip address add 10.77.0.2/24 dev cable1
nsenter --target $other --net ip link set cable1 up
echo $other
read -r _ || true
"""


class Node(NamedTuple):
    """A node: its address, and what to put before a command that runs on it."""

    address: str
    enter: list[str]


class Ended(NamedTuple):
    """What a node's command left."""

    code: int
    out: str
    error: str


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    """Two nodes."""
    command = ["unshare", "--user", "--map-root-user", "--net", "bash", "-c", CABLE]
    if not all(shutil.which(tool) for tool in ("unshare", "nsenter", "ip")):
        command = ["false"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as cable:
        assert cable.stdout is not None
        other = cable.stdout.readline().strip()  # nothing, if the kernel or a missing tool forbids it
        if other:
            yield [
                Node(address, ["nsenter", "--target", pid, "--user", "--net", "--preserve-credentials"])
                for address, pid in (("10.77.0.1", str(cable.pid)), ("10.77.0.2", other))
            ]
        else:
            yield [Node("127.0.0.2", []), Node("127.0.0.3", [])]


@contextmanager
def started(command: list[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A command in a session of its own, of which nothing is left in the end."""
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # a launcher ends its processes, which have sessions of their own
            try:
                process.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()


def run(*commands: tuple[list[str], Mapping[str, str]], timeout: float = 300) -> list[Ended]:
    """Run commands side by side to their ends."""
    if not commands:
        return []
    with started(*commands[0]) as first:
        others = run(*commands[1:], timeout=timeout)
        out, error = first.communicate(timeout=timeout)
        return [Ended(first.returncode, out, error), *others]


def script(node: Node, *arguments: str | Path, **variables: str) -> tuple[list[str], Mapping[str, str]]:
    """run_train.sh on a node, with the Python of these tests as the active one."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [*node.enter, str(ROOT / "run_train.sh"), *map(str, arguments)]
    return command, clean_env(PATH=path, **variables)


def both(nodes: list[Node], config: Path, ranks: int = 1) -> list[Ended]:
    """run_train.sh on both nodes."""
    common = {"NNODES": "2", "NGPU": str(ranks), "MASTER_ADDR": nodes[0].address, "MASTER_PORT": str(free_port())}
    return run(*(script(node, "--config", config, NODE_RANK=str(i), **common) for i, node in enumerate(nodes)))


def assert_equal_runs(run_folder: Path, reference: Path) -> None:
    """Same metrics and checkpoint, bit for bit."""
    for key in ("loss", "grad_norm"):
        assert len(rows(run_folder, key)) == STEPS
        assert rows(run_folder, key) == rows(reference, key)
    checkpoints = [folder / "checkpoint" / f"step-{STEPS:06d}" for folder in (run_folder, reference)]
    assert differing(*map(saved_shards, checkpoints)) == []


def one_node(folder: Path, data: TinyData, ranks: int) -> Path:
    """The folder of a run on one node."""
    config = tiny_config(folder, data, PATIENCE | {"training.local_batch_size": 4 // ranks})
    [ended] = run(script(Node("", []), "--config", config, NGPU=str(ranks)))
    assert ended.code == 0, ended.error
    return folder / "run"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, tiny_data: TinyData) -> Path:
    """The folder of a run of two ranks on one node."""
    return one_node(tmp_path_factory.mktemp("reference"), tiny_data, ranks=2)


def assert_trained(ended: list[Ended]) -> None:
    """Both did well, and only the first says so."""
    assert [node.code for node in ended] == [0, 0], [node.error for node in ended]
    assert "loss" in ended[0].out and ended[1].out == ""


@pytest.mark.slow
def test_two_nodes_train_as_one(nodes: list[Node], reference: Path, tmp_path: Path, tiny_data: TinyData) -> None:
    assert_trained(both(nodes, tiny_config(tmp_path, tiny_data, PATIENCE)))
    assert_equal_runs(tmp_path / "run", reference)


@pytest.mark.slow
def test_two_nodes_of_two_ranks(nodes: list[Node], tmp_path: Path, tiny_data: TinyData) -> None:
    settings = PATIENCE | {"training.local_batch_size": 1}
    reference = one_node(tmp_path / "one", tiny_data, ranks=4)
    assert_trained(both(nodes, tiny_config(tmp_path, tiny_data, settings), ranks=2))
    assert_equal_runs(tmp_path / "run", reference)


@pytest.mark.slow
def test_two_torchrun_agents(nodes: list[Node], reference: Path, tmp_path: Path, tiny_data: TinyData) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    torchrun += [f"--master-addr={nodes[0].address}", f"--master-port={free_port()}"]
    program = ["-m", "titanling.train", "--config", str(tiny_config(tmp_path, tiny_data, PATIENCE))]
    commands = [[*node.enter, *torchrun, f"--node-rank={i}", *program] for i, node in enumerate(nodes)]
    assert_trained(run(*((command, clean_env()) for command in commands)))
    assert_equal_runs(tmp_path / "run", reference)


@pytest.mark.slow
def test_slurm_step(nodes: list[Node], reference: Path, tmp_path: Path, tiny_data: TinyData) -> None:
    """What srun tells a step on two nodes of a job of four; node names are addresses, a range as Slurm writes it."""
    stem, first, second = nodes[0].address[:-1], nodes[0].address[-1], nodes[1].address[-1]
    job = {
        "SLURM_NNODES": "4",
        "SLURM_JOB_NODELIST": "elsewhere[1-4]",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NODELIST": f"{stem}[{first}-{second}]",
        "MASTER_PORT": str(free_port()),
        "NGPU": "1",
    }
    config = tiny_config(tmp_path, tiny_data, PATIENCE)
    steps = [script(node, "--config", config, SLURM_NODEID=str(i), **job) for i, node in enumerate(nodes)]
    assert_trained(run(*steps))
    assert_equal_runs(tmp_path / "run", reference)


def error_of(ended: Ended) -> str:
    """The one line that a refused start writes; without what torch says of a network that has no name server."""
    assert ended.code == 2, ended
    lines = [line for line in ended.error.splitlines() if "The hostname of the client socket cannot be" not in line]
    assert len(lines) == 1, ended.error
    return lines[0]


def alone(nodes: list[Node], node_rank: int, config: Path, ranks: int = 1, **variables: str) -> tuple[str, int]:
    """Run one of two nodes; its error line, and the port."""
    port = free_port()
    variables = {"MASTER_ADDR": nodes[0].address, "MASTER_PORT": str(port)} | variables
    command = script(
        nodes[node_rank], "--config", config, NNODES="2", NODE_RANK=str(node_rank), NGPU=str(ranks), **variables
    )
    [ended] = run(command, timeout=120)
    return error_of(ended), port


@pytest.fixture
def impatient(tmp_path: Path, tiny_data: TinyData) -> Path:
    """The config of a run that waits three seconds for the others."""
    return tiny_config(tmp_path, tiny_data, IMPATIENT)


def test_node_1_never_starts(nodes: list[Node], impatient: Path) -> None:
    error, port = alone(nodes, 0, impatient)
    assert f"rank 1 (NODE_RANK 1) of 2 did not come to {nodes[0].address}:{port} within 3 s" in error


@pytest.mark.alone
@pytest.mark.slow
def test_several_ranks_say_it_once(nodes: list[Node], tmp_path: Path, tiny_data: TinyData) -> None:
    settings = {"comm.init_timeout_seconds": 10, "training.local_batch_size": 1}  # time to start for two of them
    config = tiny_config(tmp_path, tiny_data, settings)
    error, port = alone(nodes, 0, config, ranks=2)
    assert f"rank 2, 3 (NODE_RANK 1) of 4 did not come to {nodes[0].address}:{port} within 10 s" in error
    error, port = alone(nodes, 1, config, ranks=2)
    assert f"could not reach {nodes[0].address}:{port} within 10 s" in error


def test_node_0_never_starts(nodes: list[Node], impatient: Path) -> None:
    error, port = alone(nodes, 1, impatient)
    assert f"rank 1 could not reach {nodes[0].address}:{port} within 3 s" in error


@pytest.mark.parametrize("node_rank", [0, 1])
def test_a_name_that_does_not_resolve(nodes: list[Node], impatient: Path, node_rank: int) -> None:
    error, port = alone(nodes, node_rank, impatient, MASTER_ADDR="no-such-host.invalid")
    assert f"no-such-host.invalid:{port}" in error
    assert ("no name or address that this node can reach" if node_rank == 0 else "[Errno -") in error


def test_port_in_use_on_node_0(nodes: list[Node], impatient: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        error, _ = alone([Node("127.0.0.2", [])], 0, impatient, MASTER_PORT=port, MASTER_ADDR="127.0.0.2")
    assert f"MASTER_PORT={port}: in use on node 0" in error


@pytest.mark.slow
def test_a_node_rank_given_twice(nodes: list[Node], tmp_path: Path, tiny_data: TinyData) -> None:
    config = tiny_config(tmp_path, tiny_data, {"comm.init_timeout_seconds": 20, "training.global_batch_size": 6})
    port = str(free_port())
    common = {"NNODES": "3", "NGPU": "1", "MASTER_ADDR": nodes[0].address, "MASTER_PORT": port}
    places = [(nodes[0], "0"), (nodes[1], "1"), (nodes[1], "1")]
    ended = run(*(script(node, "--config", config, NODE_RANK=rank, **common) for node, rank in places))
    errors = [error_of(node) for node in ended]
    assert "rank 2 (NODE_RANK 2) of 3 did not come" in errors[0]
    assert sum(f"rank 1 is at {nodes[0].address}:{port} already" in error for error in errors) == 1


@contextmanager
def firewall(node: Node) -> Iterator[None]:
    """Let nothing from a node reach the ports that the kernel gives to whoever asks for any, such as gloo's."""
    rule = ["ipproto", "tcp", "dport", "32768-60999", "blackhole"]
    if not node.enter or subprocess.run([*node.enter, "ip", "rule", "add", *rule], capture_output=True).returncode:
        pytest.skip("needs a network namespace with rules of its own")
    try:
        yield
    finally:
        subprocess.run([*node.enter, "ip", "rule", "del", *rule], check=True)


def assert_cannot_connect(nodes: list[Node], config: Path, says: str, **variables: str) -> None:
    """Both nodes end with one line of ours that says so."""
    common = {"NNODES": "2", "NGPU": "1", "MASTER_ADDR": nodes[0].address, "MASTER_PORT": "29417"} | variables
    ended = run(*(script(node, "--config", config, NODE_RANK=str(i), **common) for i, node in enumerate(nodes)))
    for rank, node in enumerate(ended):
        assert node.code == 2 and "Traceback" not in node.error, node
        [line] = [line for line in node.error.splitlines() if line.startswith("error")]
        assert f'GLOO_SOCKET_IFNAME: rank {rank}, with interface "' in line and says in line
        assert f"met at {nodes[0].address}:29417 but cannot connect to one another" in line
        assert "lo 127.0.0.1" in line and "let the firewall between the nodes pass all TCP ports" in line


def test_an_interface_that_there_is_not(nodes: list[Node], impatient: Path) -> None:
    assert_cannot_connect(nodes, impatient, 'with interface "none0"', GLOO_SOCKET_IFNAME="none0")


def test_a_firewall_between_the_nodes(nodes: list[Node], impatient: Path) -> None:
    with firewall(nodes[1]):
        assert_cannot_connect(nodes, impatient, 'with interface "cable')


def test_the_users_network_interface_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    _choose_gloo_interface("192.0.2.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"
