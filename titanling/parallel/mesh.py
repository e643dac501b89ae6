"""The processes of a run and their device mesh. CUDA (NVIDIA or ROCm) where there is one, else the CPU with gloo."""

import json
import math
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titanling.config.schema import Comm
from titanling.errors import UserError
from titanling.parallel.degrees import Degrees
from titanling.parallel.rendezvous import FAREWELL_SECONDS, rendezvous, unreachable
from titanling.parallel.roll_call import RollCall
from titanling.ranks import this_process

T = TypeVar("T")
DIMENSIONS = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""Outermost first: what talks most lies closest together, within a node."""


@dataclass(frozen=True)
class World:
    """This process among the others.

    `mesh` is that of the parameters, (pp, dp_replicate, fsdp, tp), where fsdp is dp_shard × cp: FSDP shards over both,
    for context-parallel ranks need the same weights too. `cp_mesh` is that of a sequence. None where there is but one.
    """

    rank: int
    size: int
    device: torch.device
    degrees: Degrees
    mesh: DeviceMesh | None = None
    cp_mesh: DeviceMesh | None = None
    store: dist.Store | None = None
    """Where the ranks met: for what they say to each other outside of collectives."""
    roll_call: RollCall | None = None
    """Finds the ranks that are lost."""

    def degree(self, dimension: str) -> int:
        """Number of ranks along one of DIMENSIONS."""
        return getattr(self.degrees, dimension)

    def index(self, dimension: str) -> int:
        """This rank's place along one of DIMENSIONS."""
        inner = DIMENSIONS[DIMENSIONS.index(dimension) + 1 :]
        return self.rank // math.prod(map(self.degree, inner)) % self.degree(dimension)

    def submesh(self, *dimensions: str) -> DeviceMesh:
        """The mesh of some dimensions of `mesh`, around this rank."""
        assert self.mesh is not None
        return self.mesh[dimensions if len(dimensions) > 1 else dimensions[0]]

    @property
    def dp_rank(self) -> int:
        """Which share of the sequences this rank reads."""
        return self.index("dp_replicate") * self.degrees.dp_shard + self.index("dp_shard")

    def sum_(self, tensor: Tensor) -> Tensor:
        """All-reduce `tensor` in place over all ranks and return it."""
        if self.mesh is not None:
            dist.all_reduce(tensor)
        return tensor

    def any(self, *flags: bool) -> list[bool]:
        """Which of some flags are set on any rank: a few bytes between CPUs, which waits for no device."""
        if self.mesh is None:
            return list(flags)
        found = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return [bool(flag) for flag in found.tolist()]

    def naming_the_lost(self) -> AbstractContextManager[None]:
        """A context in which a failure that comes of lost ranks is raised as RanksLost."""
        return nullcontext() if self.roll_call is None else self.roll_call.naming()

    def wait(self, event: threading.Event) -> None:
        """Wait for what all ranks take part in outside of collectives. Raises RanksLost if one goes silent."""
        if self.roll_call is None:
            event.wait()
        else:
            self.roll_call.wait(event)

    def leave(self) -> None:
        """End what this process does beside its main thread."""
        if self.roll_call is not None:
            self.roll_call.close()

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, which is JSON, in rank order, on every rank. Never a pickle, which is a program."""
        own = json.dumps(value).encode()
        if self.mesh is None:
            return [json.loads(own)]
        size = torch.tensor([len(own)])
        sizes = [torch.zeros_like(size) for _ in range(self.size)]
        dist.all_gather(sizes, size)
        padded = torch.zeros(max(map(int, sizes)), dtype=torch.uint8)
        padded[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
        texts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(texts, padded)
        return [json.loads(text[: int(size)].numpy().tobytes()) for text, size in zip(texts, sizes, strict=True)]


def local_device(comm: Comm) -> torch.device:
    """This process's device. Raises UserError if it has no GPU of its own, or if comm.backend needs one."""
    if not torch.cuda.is_available():
        if comm.backend == "nccl":
            raise UserError('comm.backend = "nccl" needs GPUs and this machine has none; set "auto" or "gloo"')
        return torch.device("cpu")
    local_rank = this_process().local_rank
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"NGPU: process {local_rank + 1} of this node has no GPU, there are {torch.cuda.device_count()}; start"
            " one process per GPU"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def start_world(degrees: Degrees, comm: Comm, device: torch.device) -> World:
    """Join the other ranks (the environment is torchrun's) and build the mesh. Raises UserError if they do not meet."""
    me = this_process()
    rank, size = me.rank, me.size
    if size == 1:
        return World(rank, size, device, degrees, None)
    # Objects (hashes, errors) travel over gloo whatever the device, so that no GPU is touched for them.
    gpu = "nccl" if comm.backend == "auto" else comm.backend
    backend = f"cpu:gloo,cuda:{gpu}" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=comm.init_timeout_seconds)
    store = rendezvous(rank, size, timeout)
    roll_call = RollCall(store, rank, size, comm.init_timeout_seconds)
    with roll_call.naming():
        try:
            # gloo connects every pair of ranks now, for each group of the meshes; NCCL does so when it is first used.
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
            meshes = build_meshes(degrees, device.type)
        except RuntimeError as error:
            if roll_call.lost():
                raise
            # The others find out by themselves, and tell it only while they find the store.
            roll_call.close_last(FAREWELL_SECONDS)
            raise unreachable(error, rank) from error
    world = World(rank, size, device, degrees, *meshes, store, roll_call)
    limit_collectives(world, comm.init_timeout_seconds)  # or groups of the meshes would have torch's half an hour
    return world


def build_meshes(degrees: Degrees, device_type: str) -> tuple[DeviceMesh, DeviceMesh | None]:
    """World's `mesh` and `cp_mesh`; the default process group must exist."""
    outer, inner = (degrees.pp, degrees.dp_replicate), (degrees.tp,)
    names = ("pp", "dp_replicate", "fsdp", "tp")
    mesh = init_device_mesh(device_type, (*outer, degrees.fsdp, *inner), mesh_dim_names=names)
    if degrees.cp == 1:
        return mesh, None
    sizes = (*outer, degrees.dp_shard, degrees.cp, *inner)
    return mesh, init_device_mesh(device_type, sizes, mesh_dim_names=DIMENSIONS)["cp"]


def limit_collectives(world: World, seconds: int) -> None:
    """From now on, nothing waits longer for a silent rank."""
    if world.mesh is None:
        return
    assert world.roll_call is not None
    world.roll_call.patience = seconds
    groups = {group for mesh in (world.mesh, world.cp_mesh) if mesh is not None for group in mesh.get_all_groups()}
    for group in (None, *groups):  # None: that of all ranks
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)  # there is no public way


def stop_world(world: World) -> None:
    """Leave the process group, all ranks together."""
    if world.mesh is not None:
        world.leave()
        world.any(False)  # nobody goes, rank 0 and its store above all, while another still talks to it
        dist.destroy_process_group()
