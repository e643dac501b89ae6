"""The parameters of a laid-out model: their first values, and their norm, whatever the layout."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titanling.model.init import initialize
from titanling.model.presets import LlamaShape
from titanling.parallel.mesh import World

CPU_PIECE = 2**14


def materialize(model: nn.Module, device: torch.device, shape: LlamaShape, seed: int) -> None:
    """Give a model on meta its memory and its initial weights: the same weights under every layout."""
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        local, offsets = local_part(parameter)
        initialize(local, offsets, parameter.shape, name, shape, seed)


def local_part(parameter: Tensor) -> tuple[Tensor, list[int]]:
    """This rank's part of a parameter, detached and sharing its memory, and where it begins along each dimension."""
    parameter = parameter.detach()
    offsets, sizes = [0] * parameter.ndim, list(parameter.shape)
    if not isinstance(parameter, DTensor):
        return parameter, offsets
    # Innermost first: the tensor plan has divided a parameter before FSDP divides what is left of it.
    for mesh_dim, placement in reversed(list(enumerate(parameter.placements))):
        if not placement.is_replicate():  # FSDP over TP has a kind of its own, which is_shard denies
            dim = placement.dim
            # As torch.chunk does: equal pieces rounded up, the last ones short or empty.
            piece = -(-sizes[dim] // parameter.device_mesh.size(mesh_dim))
            start = min(piece * parameter.device_mesh.get_local_rank(mesh_dim), sizes[dim])
            offsets[dim] += start
            sizes[dim] = min(piece, sizes[dim] - start)
    return parameter.to_local(), offsets


def is_writer(tensor: Tensor, turn: int, world: World) -> bool:
    """Whether this rank is the one that saves its part of a tensor, among those that hold the same part.

    Every rank finds out by itself. `turn`, a number of the tensor's own, spreads the work over them.
    """
    degrees = world.degrees
    mine = {
        "dp_replicate": (world.index("dp_replicate"), degrees.dp_replicate),
        "fsdp": (world.index("dp_shard") * degrees.cp + world.index("cp"), degrees.fsdp),
        "tp": (world.index("tp"), degrees.tp),
    }
    if isinstance(tensor, DTensor):
        names = tensor.device_mesh.mesh_dim_names or ()
        for name, placement in zip(names, tensor.placements, strict=True):
            if not placement.is_replicate():
                del mine[name]
    place, copies = 0, 1
    for index, size in mine.values():
        place, copies = place * size + index, copies * size
    return turn % copies == place


def settle(parameters: Iterable[Tensor]) -> None:
    """Add up gradients of which every tensor-parallel rank has a part: those of whole weights, such as norms'."""
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, DTensor) and gradient.placements != parameter.placements:
            parameter.grad = gradient.redistribute(placements=parameter.placements)


def _pieces(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors, on a CPU in pieces: it adds a whole tensor's squares in few float32 sums (2M elements: 1e-4 off)."""
    if tensors[0].device.type != "cpu":
        return tensors
    return [piece for tensor in tensors for piece in tensor.flatten().split(CPU_PIECE)]


def global_norm(gradients: Iterable[Tensor], world: World, loss: Tensor | None = None) -> Tensor:
    """2-norm of all gradients of all ranks, 0-dim float32: one all-reduce of one number, whatever the layout.

    Every rank sums the squares of what it holds, each divided by the number of ranks that hold the same. It is nan
    where any rank's share of the `loss` is not finite, though gradients may be.
    """
    by_copies: dict[int, list[Tensor]] = {}
    replicated = world.size == 1 or world.degrees.ddp
    for gradient in gradients:
        copies = 1 if replicated else world.size // world.degrees.pp
        if isinstance(gradient, DTensor):
            mesh = gradient.device_mesh
            divided = [mesh.size(d) for d, place in enumerate(gradient.placements) if not place.is_replicate()]
            copies //= math.prod(divided)
            gradient = gradient.to_local()
        by_copies.setdefault(copies, []).append(gradient)
    squares = [
        torch.stack(torch._foreach_norm(_pieces(tensors), 2, dtype=torch.float32)).square().sum() / copies
        for copies, tensors in sorted(by_copies.items())
    ]
    total = torch.stack(squares).sum()
    fault = torch.zeros_like(total) if loss is None else (0 * loss).to(total)  # 0 · inf is nan
    total = total + world.sum_(fault) if replicated else world.sum_(total + fault)
    return total.sqrt()
