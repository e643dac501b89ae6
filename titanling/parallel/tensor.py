"""Tensor, sequence and loss parallelism on DTensors, by the roles in a model's layout table."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from titanling.config.schema import Parallelism
from titanling.errors import UserError
from titanling.model.layout import ModelLayout, Role
from titanling.parallel.mesh import World
from titanling.parallel.plan import Plan

SEQUENCE = 1
"""Dimension of hidden states (batch, seq, dim) that is shared between the matrices."""


class Gather(ParallelStyle):
    """The first argument of a module: gathered along the sequence."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        def gather(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = arguments[0]
            if not isinstance(x, DTensor):
                x = DTensor.from_local(x, mesh, [Shard(SEQUENCE)], run_check=False)
            return (x.redistribute(placements=[Replicate()]), *arguments[1:])

        module.register_forward_pre_hook(gather)
        return module


class AddNorm(ParallelStyle):
    """The norm of a sum of two shares of the sequence: its weight whole, the norm a DTensor, the sum a plain share."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        def enter(_: nn.Module, shares: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(DTensor.from_local(x, mesh, [Shard(SEQUENCE)], run_check=False) for x in shares)

        def leave(_: nn.Module, __: tuple[Tensor, ...], output: tuple[Tensor, DTensor]) -> tuple[Tensor, Tensor]:
            return output[0], output[1].to_local()

        distribute_module(module, mesh)
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
        return module


STYLES: dict[Role, ParallelStyle] = {
    "norm": SequenceParallel(sequence_dim=SEQUENCE),
    "add_norm": AddNorm(),
    "gather": Gather(),
    "column": ColwiseParallel(),
    "head_norm": SequenceParallel(sequence_dim=2, use_local_output=True),
    "row": RowwiseParallel(output_layouts=Shard(SEQUENCE)),
}


class TensorParallel(Plan):
    """Divide every matrix over the `tp` ranks, and between matrices the sequence (Korthikanti et al. 2022).

    The embedding and the head are divided by the vocabulary. The model returns the local part of the logits,
    (batch, seq, vocab / tp), for a loss over shards; or all of them with `disable_loss_parallel`. A loss that takes
    hidden states gets all of them, a Replicate DTensor, and the output matrix as one whose rows are divided.
    """

    name = "tensor"
    needs = ("tp",)

    def __init__(self, settings: Parallelism, compiled: bool) -> None:
        self.settings, self.compiled = settings, compiled

    def check(self, device: torch.device) -> None:
        """Raises UserError for async TP where it cannot work."""
        if self.settings.enable_async_tensor_parallel and not (device.type == "cuda" and self.compiled):
            missing = "a GPU" if device.type != "cuda" else 'compile.enable = true with "model" among its components'
            raise UserError(f"parallelism.enable_async_tensor_parallel = true needs {missing}; set it to false")

    def apply(self, model: nn.Module, world: World) -> None:
        """In place: parameters become DTensors on the `tp` mesh."""
        layout: ModelLayout = model.layout  # type: ignore[assignment]
        mesh = world.submesh("tp")
        for block in model.get_submodule(layout.blocks).children():
            present = {name for name, _ in block.named_modules()}
            parallelize_module(block, mesh, {n: STYLES[role] for n, role in layout.tensor.items() if n in present})
        logits = Replicate() if self.settings.disable_loss_parallel else Shard(-1)
        whole = PrepareModuleOutput(
            output_layouts=Shard(SEQUENCE), desired_output_layouts=Replicate(), use_local_output=False
        )
        parallelize_module(
            model,
            mesh,
            {
                layout.embedding: RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(SEQUENCE)),
                layout.norm: SequenceParallel(sequence_dim=SEQUENCE),
            },
        )
        # What is behind the norm takes whole sequences: the head, or a loss over the head's weight.
        parallelize_module(model, mesh, {layout.norm: whole})
        # torch 2.13: what the embedding returns is still in flight, and a compiled block that takes it loses its
        # gradient. A copy has landed.
        model.get_submodule(layout.embedding).register_forward_hook(lambda _, __, output: output.clone())
        if getattr(model, layout.head) is not None:
            head = ColwiseParallel(input_layouts=Replicate(), output_layouts=logits)
            parallelize_module(model, mesh, {layout.head: head})
        else:
            # The model multiplies by the embedding itself, outside of any module. A loss is no DTensor.
            def divide(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
                return output.redistribute(placements=[logits]).to_local() if isinstance(output, DTensor) else output

            model.register_forward_hook(divide)
        if self.settings.enable_async_tensor_parallel:
            overlap(mesh)

    def describe(self) -> str:
        """One line."""
        notes = ["sequence parallel"]
        notes += [] if self.settings.disable_loss_parallel else ["loss parallel"]
        notes += ["async"] if self.settings.enable_async_tensor_parallel else []
        return f"matrices over {self.settings.tensor_parallel_degree} ranks, {', '.join(notes)}"


def overlap(mesh: DeviceMesh) -> None:
    """Let the compiler cut matrix products into pieces that run beside their communication (async TP)."""
    import torch._inductor.config as inductor
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    inductor._micro_pipeline_tp = True
    enable_symm_mem_for_group(mesh.get_group().group_name)
