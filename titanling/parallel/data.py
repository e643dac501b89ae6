"""Data parallelism: FSDP2, HSDP or DDP, by the mesh's data dimensions."""

import warnings
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from titanling.config.schema import Parallelism, Training
from titanling.model.layout import ModelLayout
from titanling.parallel.degrees import Degrees, resharding
from titanling.parallel.gloo import suit_gloo
from titanling.parallel.mesh import World
from titanling.parallel.plan import Plan
from titanling.parallel.precision import compute_dtype


class DataParallel(Plan):
    """Copies over `dp_replicate`, shards of each copy over `dp_shard` and `cp`.

    Copies alone are DDP, which wraps the module (`wrap`) once it has memory. All else is FSDP2, block by block, in
    place: HSDP where there are copies of shards.
    """

    name = "data"
    needs = ("dp_replicate", "dp_shard", "cp")

    def __init__(self, settings: Parallelism, training: Training, degrees: Degrees) -> None:
        self.settings, self.training, self.degrees = settings, training, degrees
        self.reshards = resharding(settings, degrees)

    def apply(self, model: nn.Module, world: World) -> None:
        """In place, on meta; names do not change. Nothing to do for DDP."""
        if self.degrees.ddp:
            return
        # Under a tensor plan the logits are a view. Our loss overwrites them, but not so that autograd would see it.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        options: dict[str, Any] = {
            "mesh": world.submesh("dp_replicate", "fsdp") if self.degrees.dp_replicate > 1 else world.submesh("fsdp"),
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=compute_dtype(world.device, self.training),
                reduce_dtype=getattr(torch, self.training.mixed_precision_reduce),
                cast_forward_inputs=False,  # RoPE's angles stay float32
            ),
        }
        if self.training.enable_cpu_offload and world.device.type == "cuda":
            options["offload_policy"] = CPUOffloadPolicy()
        layout: ModelLayout = model.layout  # type: ignore[assignment]
        blocks: list[Any] = list(model.get_submodule(layout.blocks).children())
        for block in blocks:
            fully_shard(block, reshard_after_forward=self.reshards, **options)
        # The root holds embedding, norm and head: needed first and last, so they stay gathered between.
        fully_shard(model, reshard_after_forward=False, **options)
        if world.device.type == "cpu":
            for part in (*blocks, model):
                suit_gloo(part)
        ahead = self.settings.fsdp_prefetch
        if ahead > 1:  # FSDP looks one block ahead by itself
            for index, block in enumerate(blocks):
                block.set_modules_to_forward_prefetch(blocks[index + 1 : index + 1 + ahead])
                block.set_modules_to_backward_prefetch(blocks[max(0, index - ahead) : index][::-1])

    def wrap(self, model: nn.Module, world: World) -> nn.Module:
        """The module to call for a forward pass: under DDP a wrapper around `model`, otherwise `model` itself."""
        if not self.degrees.ddp:
            return model
        # Weights are equal by construction and there are no buffers: nothing to broadcast.
        group = world.submesh("dp_replicate").get_group()
        return DistributedDataParallel(model, process_group=group, init_sync=False, gradient_as_bucket_view=True)

    def describe(self) -> str:
        """One line."""
        degrees = self.degrees
        if self.degrees.ddp:
            return f"DDP, {degrees.dp_replicate} copies"
        kind = "HSDP" if degrees.dp_replicate > 1 else "FSDP2"
        copies = f"{degrees.dp_replicate} copies of " if degrees.dp_replicate > 1 else ""
        shared = f" ({degrees.dp_shard} data × {degrees.cp} context)" if degrees.cp > 1 else ""
        kept = {True: "freed after each block", False: "kept until the backward pass"}
        after = kept.get(self.reshards, f"kept over {self.reshards} ranks")
        return f"{kind}, {copies}{degrees.fsdp} shards{shared}, gathered parameters {after}"


def sync_gradients(module: nn.Module, enabled: bool) -> None:
    """Whether the next backward pass averages gradients over the ranks; off while accumulating."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(enabled)
    elif isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = enabled


def reshard(module: nn.Module) -> None:
    """Shard FSDP's parameters again.

    FSDP shards what it keeps gathered after a forward pass only in the backward pass. Until then, the model's
    parameters are not the ones that the optimizer knows, and a checkpoint would miss their optimizer state.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
