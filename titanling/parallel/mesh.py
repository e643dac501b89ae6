"""The processes of a run and their device mesh. CUDA (NVIDIA or ROCm) where there is one, else the CPU with gloo."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titanling.config.schema import Comm
from titanling.errors import UserError
from titanling.parallel.degrees import Degrees, world_size

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among the others: its rank, device and mesh (None when it is alone)."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None

    def sum_(self, tensor: Tensor) -> Tensor:
        """All-reduce `tensor` in place over all ranks and return it."""
        if self.mesh is not None:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, in rank order, on every rank."""
        if self.mesh is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def start_world(degrees: Degrees, comm: Comm) -> World:
    """Join the other ranks (the environment is torchrun's) and build the mesh (dp_replicate, dp_shard)."""
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"NGPU: process {local_rank + 1} of this node has no GPU, there are {torch.cuda.device_count()}; start"
                " one process per GPU"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    size = world_size()
    if size == 1:
        return World(rank, size, device, None)
    # Objects (hashes, errors) travel over gloo whatever the device, so that no GPU is touched for them.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=comm.init_timeout_seconds))
    sizes = (degrees.dp_replicate, degrees.dp_shard)
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("dp_replicate", "dp_shard"))
    return World(rank, size, device, mesh)


def stop_world(world: World) -> None:
    """Leave the process group."""
    if world.mesh is not None:
        dist.destroy_process_group()
