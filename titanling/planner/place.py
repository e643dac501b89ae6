"""The real plans over a model on meta, as one rank of a world that does not exist: exact placements and bytes."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from titanling.config.schema import Kernels
from titanling.model.layout import ModelLayout
from titanling.model.llama import build_on_meta
from titanling.parallel import plan
from titanling.parallel.compile import CompileBlocks
from titanling.parallel.data import DataParallel
from titanling.parallel.kernels import KernelChoice
from titanling.parallel.lay_out import build_plans
from titanling.parallel.mesh import World, build_meshes
from titanling.parallel.pipeline import Pipeline
from titanling.parallel.plan import Plan
from titanling.parallel.quantize import CONVERTER, Float8Linear
from titanling.parallel.stages import stages_of_rank
from titanling.parallel.tensor import TensorParallel
from titanling.planner.setup import Setup


@dataclass(frozen=True)
class Placed:
    """A parameter as one rank holds it."""

    name: str
    shape: tuple[int, ...]
    placements: str
    """"dimension of the mesh: Shard(dimension of the tensor)" each; empty: a plain tensor, whole on every rank."""
    local: tuple[int, ...]
    """This rank's part."""
    gathered: tuple[int, ...]
    """What FSDP gathers for the computation: this rank's part among the tensor-parallel ranks alone."""
    itemsize: int
    in_block: bool

    @property
    def bytes(self) -> int:
        """Of this rank's part."""
        return math.prod(self.local) * self.itemsize


@contextmanager
def fake_world(size: int) -> Iterator[None]:
    """A process group of `size` ranks of which this process is rank 0, and whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def make_world(setup: Setup) -> World:
    """Rank 0 of the setup's mesh, inside of a fake_world."""
    meshes = build_meshes(setup.degrees, "cpu") if setup.world > 1 else (None, None)
    return World(0, setup.world, setup.device, setup.degrees, *meshes)


def make_plans(setup: Setup) -> list[Plan]:
    """The plans of this setup, in order; those that need a GPU are there, but will not ask for it."""
    config = setup.config
    others = tuple(name for name in config.model.converters if name != CONVERTER)
    plans = build_plans(
        config.parallelism,
        config.training,
        config.activation_checkpoint,
        config.compile,
        config.model.model_copy(update={"converters": others}),
        config.quantize,
        Kernels(implementation="torch"),  # they change nothing that is planned, and the GPU cannot be asked
        shape=setup.shape,
        degrees=setup.degrees,
        device=setup.device,
    )
    plans = [each for each in plans if not isinstance(each, KernelChoice)]
    return plan.order([*plans, Float8Linear(config.quantize.linear.float8)]) if setup.float8 else plans


def place(setup: Setup, plans: Sequence[Plan], world: World) -> list[list[Placed]]:
    """What each rank of the pipeline holds that is first in all other dimensions: no other holds more.

    Ranks that hold as many layers, and both or neither of embedding and head, hold the same: it is laid out once.
    """
    found: dict[tuple[object, ...], list[Placed]] = {}
    ranks = []
    for rank in range(setup.degrees.pp):
        layers = [(len(setup.cut[s]), s == 0, s == len(setup.cut) - 1) for s in stages(setup, rank)]
        kind = tuple(sorted(layers))
        if kind not in found:
            found[kind] = _lay_out(setup, plans, replace(world, rank=rank * (world.size // setup.degrees.pp)))
        ranks.append(found[kind])
    return ranks


def place_by_one_block(setup: Setup, plans: Sequence[Plan], world: World) -> list[list[Placed]]:
    """As `place`, from a model of one block: blocks are alike, so what holds for one holds for all. Takes seconds less.

    Plans of a user's own may treat blocks differently; only `place` sees that.
    """
    small = replace(setup, shape=replace(setup.shape, n_layers=1))
    whole = [each for each in plans if not isinstance(each, Pipeline)]
    found = _lay_out(small, whole, world)
    ranks = []
    for rank in range(setup.degrees.pp):
        held = []
        for stage in stages(setup, rank):
            ends = [each for each in found if not each.in_block]
            for each in ends:
                embeds = "embed" in each.name
                if (embeds and stage == 0) or (not embeds and stage == len(setup.cut) - 1):
                    held.append(each)
            for layer in setup.cut[stage]:
                held += [replace(e, name=e.name.replace(".0.", f".{layer}.", 1)) for e in found if e.in_block]
        ranks.append(held)
    return ranks


def stages(setup: Setup, rank: int) -> list[int]:
    """Pipeline stages of a rank of the pipeline."""
    if setup.degrees.pp == 1:
        return [0]
    return stages_of_rank(setup.config.parallelism, setup.degrees.pp, rank, len(setup.cut))


def _lay_out(setup: Setup, plans: Sequence[Plan], world: World) -> list[Placed]:
    model = build_on_meta(setup.shape, getattr(torch, setup.config.training.dtype))
    layout: ModelLayout = model.layout  # type: ignore[assignment]
    parts = plan.apply([_harmless(each) for each in plans if not isinstance(each, SKIPPED)], model, world)
    return [
        placed(name, parameter, name.startswith(f"{layout.blocks}."))
        for part in parts
        for name, parameter in part.named_parameters()
    ]


# They move no parameter, and need a compiler or a GPU.
SKIPPED = (CompileBlocks, Float8Linear)


def _harmless(each: Plan) -> Plan:
    if isinstance(each, TensorParallel) and each.settings.enable_async_tensor_parallel:
        return TensorParallel(each.settings.model_copy(update={"enable_async_tensor_parallel": False}), each.compiled)
    if isinstance(each, DataParallel) and each.training.enable_cpu_offload:
        return DataParallel(each.settings, each.training.model_copy(update={"enable_cpu_offload": False}), each.degrees)
    return each


def placed(name: str, parameter: Tensor, in_block: bool) -> Placed:
    """How a parameter lies."""
    shape = tuple(parameter.shape)
    if not isinstance(parameter, DTensor):
        return Placed(name, shape, "", shape, shape, parameter.element_size(), in_block)
    gathered, texts = list(shape), []
    mesh = parameter.device_mesh
    for dimension, (axis, place) in enumerate(zip(mesh.mesh_dim_names or (), parameter.placements, strict=True)):
        dim = getattr(place, "dim", None)  # FSDP over TP has a kind of its own, which is a Shard too
        texts.append(f"{axis}: {'Replicate' if dim is None else f'Shard({dim})'}")
        if axis == "tp" and dim is not None:
            gathered[dim] = -(-gathered[dim] // mesh.size(dimension))
    local = tuple(parameter.to_local().shape)
    return Placed(name, shape, ", ".join(texts), local, tuple(gathered), parameter.element_size(), in_block)
