"""Data parallelism: FSDP2, HSDP or DDP, by the mesh's two data dimensions."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from titanling.config.schema import Parallelism, Training
from titanling.model.init import initialize_rows
from titanling.model.llama import Llama
from titanling.parallel.mesh import World
from titanling.parallel.precision import compute_dtype


def shard(model: Llama, world: World, settings: Parallelism, training: Training) -> None:
    """Shard every block's parameters over `dp_shard` (FSDP2), copies over `dp_replicate` (HSDP). In place, on meta.

    Does nothing where dp_shard is 1. Parameter names do not change.
    """
    if world.mesh is None or world.mesh["dp_shard"].size() == 1:
        return
    mesh = world.mesh if world.mesh["dp_replicate"].size() > 1 else world.mesh["dp_shard"]
    precision = MixedPrecisionPolicy(
        param_dtype=compute_dtype(world.device, training),
        reduce_dtype=getattr(torch, training.mixed_precision_reduce),
        cast_forward_inputs=False,  # RoPE's angles stay float32
    )
    reshard = settings.fsdp_reshard_after_forward != "never"
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard)
    # The root holds embedding, norm and head: needed first and last, so they stay gathered between.
    fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=False)


def materialize(model: Llama, world: World, seed: int) -> None:
    """Give a model on meta its memory and its initial weights: the same weights under every layout."""
    model.to_empty(device=world.device)
    for name, parameter in model.named_parameters():
        local, first_row = local_rows(parameter)
        initialize_rows(local, name, model.shape, seed, first_row)


def local_rows(parameter: torch.Tensor) -> tuple[torch.Tensor, int]:
    """This rank's rows of a parameter, detached and sharing its memory, and the index of the first of them."""
    parameter = parameter.detach()
    if not isinstance(parameter, DTensor):
        return parameter, 0
    local, first_row, rows = parameter.to_local(), 0, parameter.size(0)
    for dim, placement in enumerate(parameter.placements):
        if placement.is_shard():
            # FSDP2 cuts as torch.chunk does: equal pieces rounded up, the last ones short or empty.
            piece = -(-rows // parameter.device_mesh.size(dim))
            first_row += min(piece * parameter.device_mesh.get_local_rank(dim), rows)
    return local, first_row


def replicate(model: Llama, world: World) -> nn.Module:
    """The module to call for a forward pass: under DDP a wrapper around `model`, otherwise `model` itself."""
    if world.mesh is None or world.mesh["dp_shard"].size() > 1:
        return model
    # Weights are equal by construction (`materialize`) and there are no buffers: nothing to broadcast.
    return DistributedDataParallel(
        model, process_group=world.mesh["dp_replicate"].get_group(), init_sync=False, gradient_as_bucket_view=True
    )


def sync_gradients(module: nn.Module, enabled: bool) -> None:
    """Whether the next backward pass averages gradients over the ranks; off while accumulating."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(enabled)
    elif isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = enabled


@contextmanager
def evaluation(module: nn.Module) -> Iterator[None]:
    """Forward passes without gradients: dropout off, and FSDP's parameters sharded again at the end.

    FSDP shards what it keeps gathered after a forward pass only in the backward pass. Until then, the model's
    parameters are not the ones that the optimizer knows, and a checkpoint would miss their optimizer state.
    """
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train()
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
