"""Who is this process among those of its run? The one place that reads what launchers and clusters say. No torch.

Two questions: `this_process` is asked by a program that training consists of, started by titanling.launch, torchrun or
nobody; `topology` by the launcher, about the processes that it shall start. An empty variable counts as none. What is
contradictory, or would make a run start twice in one folder, is refused, with the variable's name.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from titanling.errors import UserError

PROCESSES_A_NODE, NODES = 1_024, 100_000
"""More than any machine has: a slip of the finger, not a wish."""
MASTER_PORT = 29500
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
"""What a launcher tells each of its processes, beside MASTER_ADDR and MASTER_PORT."""
SPECIAL_STEPS = 0xFFFFFFF0
"""Slurm's numbers of steps from here on are batch scripts, interactive shells and the like."""
SHOWN = 40
# Who starts several tasks, and its variables: how many, which of them this is, on how many nodes ("": it has none).
TASKS = (
    ("Slurm's srun", "SLURM_STEP_NUM_TASKS", "", "SLURM_STEP_NUM_NODES"),
    ("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", ""),
    ("MVAPICH", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", ""),
    ("MPI", "PMI_SIZE", "PMI_RANK", ""),  # Intel MPI, MPICH, Cray
    ("PALS", "PALS_SIZE", "PALS_RANKID", ""),
    ("PMIx", "", "PMIX_RANK", ""),
    ("Flux", "FLUX_JOB_SIZE", "FLUX_TASK_RANK", "FLUX_JOB_NNODES"),
    ("jsrun", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK", ""),
)
# Which of a node's tasks this is, from 0: with more than one, none of them is alone there.
ON_THIS_NODE = (
    ("Slurm's srun", "SLURM_LOCALID"),
    ("Open MPI", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("MVAPICH", "MV2_COMM_WORLD_LOCAL_RANK"),
    ("MPI", "MPI_LOCALRANKID"),
    ("PALS", "PALS_LOCAL_RANKID"),
)


@dataclass(frozen=True)
class Process:
    """One process of a run: `rank` of `size`, and where they meet ("" and 0 for one that is alone)."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    per_node: int | None = None
    """Processes on this node, where the launcher says so."""
    address: str = ""
    port: int = 0


@dataclass(frozen=True)
class Topology:
    """Which processes a launcher starts on this node. `port` None: a free one (one node only)."""

    local_size: int = 1
    nodes: int = 1
    node_rank: int = 0
    address: str = "127.0.0.1"
    port: int | None = None

    @property
    def size(self) -> int:
        """Processes on all nodes."""
        return self.local_size * self.nodes


def this_process() -> Process:
    """This process as its launcher describes it. UserError if that cannot be, or if it is one of several unawares."""
    said = _number("WORLD_SIZE", 1, PROCESSES_A_NODE * NODES)
    size, rank, local_rank = said or 1, _number("RANK", 0), _number("LOCAL_RANK", 0)
    if said is None:
        _refuse_left_over(rank, local_rank)
        _refuse_tasks(1)
        return Process()
    per_node = _number("LOCAL_WORLD_SIZE", 1)
    if size > 1:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing:
            raise UserError(
                f"WORLD_SIZE={size} needs {', '.join(missing)}, which a launcher sets: start NGPU={size}"
                " ./run_train.sh or torchrun, or unset WORLD_SIZE"
            )
    _refuse_beyond("RANK", rank, "WORLD_SIZE", size)
    _refuse_beyond("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", per_node)
    if per_node is not None and per_node > size:
        raise UserError(f"LOCAL_WORLD_SIZE={per_node} is more than WORLD_SIZE={size}; {_unset()}")
    if size == 1:
        return Process(local_rank=local_rank or 0, per_node=per_node)
    port = _number("MASTER_PORT", 1, 65535)
    assert port is not None
    return Process(rank or 0, size, local_rank or 0, per_node, _host("MASTER_ADDR"), port)


def is_first() -> bool:
    """Whether this is rank 0, which speaks for all."""
    return this_process().rank == 0


def launched() -> bool:
    """Whether a launcher says that there are other processes; never an error."""
    return os.environ.get("WORLD_SIZE", "") not in ("", "1")


@contextmanager
def alone() -> Iterator[None]:
    """Let what runs here believe that this process is the only one; its device stays its own."""
    before = {name: os.environ.pop(name) for name in ("RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE") if name in os.environ}
    os.environ["WORLD_SIZE"] = "1"
    try:
        yield
    finally:
        del os.environ["WORLD_SIZE"]
        os.environ.update(before)


def topology() -> Topology:
    """What NGPU, NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT ask for, or Slurm in a job step on several nodes.

    UserError if one is missing, out of range, or if this process is one of several that would each start them all.
    """
    local_size = _number("NGPU", 1, PROCESSES_A_NODE) or 1
    nodes = _number("NNODES", 1, NODES)
    size = _number("WORLD_SIZE", 1, PROCESSES_A_NODE * NODES)
    rank = _number("RANK", 0)
    if size is None:
        _refuse_left_over(rank, _number("LOCAL_RANK", 0))
    slurm = nodes is None and size is None and (_number("SLURM_NNODES", 1) or 1) > 1
    if slurm:
        nodes = _slurm_nodes()
    nodes = nodes or 1
    node_rank = _number("NODE_RANK", 0)
    if node_rank is None and slurm:
        node_rank = _number("SLURM_NODEID", 0)
    asked = Topology(local_size, nodes)
    # Kubernetes' operators set WORLD_SIZE and RANK to what are NNODES and NODE_RANK here.
    if size not in (None, 1) and asked.size > 1 and (size, rank) != (nodes, node_rank):
        raise UserError(
            f"WORLD_SIZE={size} says that a launcher has started this process, and NGPU × NNODES = {asked.size} asks"
            f" it to start others; {_unset()}, or unset NGPU and NNODES"
        )
    if size is None:
        _refuse_tasks(nodes)
    _refuse_beyond("NODE_RANK", node_rank, "NNODES", nodes)
    if nodes == 1:
        return asked
    address = _host("MASTER_ADDR") or (_slurm_head() if slurm else "")
    missing = [name for name, value in (("NODE_RANK", node_rank), ("MASTER_ADDR", address)) if value in (None, "")]
    if missing:
        raise UserError(
            f"NNODES={nodes} needs {' and '.join(missing)}: set NODE_RANK=0…{nodes - 1} and MASTER_ADDR=<host of node"
            " 0>"
        )
    port = _number("MASTER_PORT", 1, 65535) or MASTER_PORT
    return Topology(local_size, nodes, node_rank or 0, address, port)


def refuse_unlaunched() -> None:
    """UserError where several processes are asked for and none but this one has been started."""
    if os.environ.get("WORLD_SIZE"):
        return
    size = (_number("NGPU", 1, PROCESSES_A_NODE) or 1) * (_number("NNODES", 1, NODES) or 1)
    if size > 1:
        raise UserError(
            f"NGPU × NNODES = {size} processes are asked for, and this command is one process; start ./run_train.sh"
            " or python -m titanling.launch, or unset NGPU and NNODES"
        )
    _refuse_beyond("NODE_RANK", _number("NODE_RANK", 0), "NNODES", 1)


def planned() -> int:
    """Processes to plan for: WORLD_SIZE, or NGPU × NNODES; 1 where there are none. Raises UserError."""
    size = _number("WORLD_SIZE", 1, PROCESSES_A_NODE * NODES)
    return size or (_number("NGPU", 1, PROCESSES_A_NODE) or 1) * (_number("NNODES", 1, NODES) or 1)


def asked() -> list[str]:
    """NGPU and NNODES as a user would write them before the command; those that are 1 left out."""
    return [f"{name}={os.environ[name]}" for name in ("NGPU", "NNODES") if os.environ.get(name, "") not in ("", "1")]


def first_host(nodes: str) -> str | None:
    """First host of a list as Slurm writes them: `nid[0005-0008,11],login1` → `nid0005`; None: not such a list.

    A name may have several brackets: `rack[1-2]n[01-04]` → `rack1n01`.
    """
    found = re.match(r"\s*((?:[^][,\s]|\[[0-9,x-]+\])+)\s*(?:,|$)", nodes)
    if found is None:
        return None
    host = re.sub(r"\[([0-9]+)[^]]*\]", r"\1", found[1])
    return None if "[" in host else host


def _slurm_nodes() -> int:
    """Nodes of this Slurm job step. UserError outside of a step, where one node would train alone."""
    nodes = _number("SLURM_NNODES", 1)
    if not _in_step():
        raise UserError(
            f"this Slurm job has {nodes} nodes: start me on each with srun --ntasks-per-node=1 ./run_train.sh, or set"
            " NNODES=1"
        )
    return _number("SLURM_STEP_NUM_NODES", 1, NODES) or nodes or 1


def _slurm_head() -> str:
    name = "SLURM_STEP_NODELIST" if os.environ.get("SLURM_STEP_NODELIST") else "SLURM_JOB_NODELIST"
    nodes = os.environ.get(name, "")
    host = first_host(nodes) if nodes else ""
    if host is None:
        raise UserError(f"{name}={_shown(nodes)}: is no list of nodes; set MASTER_ADDR=<host of node 0>")
    return host


def _in_step() -> bool:
    """Whether Slurm's srun has started this: not the batch script, nor a shell in an allocation."""
    return os.environ.get("SLURM_STEP_ID", "").isdecimal() and _foreign("SLURM_STEP_ID") < SPECIAL_STEPS


def _refuse_tasks(nodes: int) -> None:
    """UserError if this is one of more tasks than the run has nodes: each would be a whole run of its own."""
    for who, place in ON_THIS_NODE:
        if _foreign(place):
            raise UserError(_several(f"{place}={_foreign(place)}: {who} has started several", who))
    for who, count, place, its_nodes in TASKS:
        if count == "SLURM_STEP_NUM_TASKS" and not os.environ.get(count) and _in_step():
            count = "SLURM_NTASKS"  # outside of a step it counts what a step could have
        tasks, above = _foreign(count), _foreign(place) + 1
        if max(tasks, above) <= nodes:
            continue
        found = (
            f"{count}={tasks}: {who} has started {tasks}"
            if tasks > nodes
            else f"{place}={above - 1}: {who} has started several"
        )
        per_node = -(-tasks // max(1, _foreign(its_nodes))) if its_nodes else 0
        raise UserError(_several(found, who, per_node))


def _several(found: str, who: str, per_node: int = 0) -> str:
    once = "./run_train.sh once on each node" + (" (srun --ntasks-per-node=1)" if "srun" in who else "")
    return (
        f"{found} of this command, each of which would be a whole run in the same folder; start {once} with"
        f" NGPU={per_node if per_node > 1 else '<processes per node>'}, or set WORLD_SIZE=1 if each has a run of"
        " its own"
    )


def _refuse_left_over(rank: int | None, local_rank: int | None) -> None:
    for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank)):
        if value:
            raise UserError(f"{name}={value} without WORLD_SIZE: left over from another launcher? {_unset()}")


def _refuse_beyond(name: str, value: int | None, limit: str, size: int | None) -> None:
    if value is None or size is None or value < size:
        return
    remedy = _unset() if name in LAUNCHED else f"count the nodes from 0, and set {limit} to their number on each"
    raise UserError(f"{name}={value}: must be below {limit}={size}; {remedy}")


def _unset() -> str:
    return f"unset {' '.join(name for name in LAUNCHED if os.environ.get(name))} to start anew"


def _host(name: str) -> str:
    text = os.environ.get(name, "")
    if len(text) > 255 or re.search(r"[\s\x00-\x1f\x7f/]", text):
        raise UserError(f"{name}={_shown(text)}: must be the name or address of a host")
    return text


def _number(name: str, low: int, high: int = 10**9) -> int | None:
    """A variable's number, None where it is unset or empty. UserError if it is not one, or out of range."""
    text = os.environ.get(name, "")
    if not text:
        return None
    value = int(text) if re.fullmatch(r"0|[1-9][0-9]{0,9}", text) else -1
    if not low <= value <= high:
        bounds = f"{low} or more" if high == 10**9 else f"from {low} to {high:,}"
        raise UserError(f"{name}={_shown(text)}: must be a whole number, {bounds}")
    return value


def _foreign(name: str) -> int:
    """A number that another program sets; 0 where it is none, for that is not ours to mend."""
    text = os.environ.get(name, "") if name else ""
    return int(text) if re.fullmatch(r"[0-9]{1,10}", text) else 0


def _shown(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text):,} characters)"
