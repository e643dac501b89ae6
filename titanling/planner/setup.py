"""A config, a world size and a device, resolved and checked as in training."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from titanling.config.check import check_runnable
from titanling.config.schema import Config
from titanling.errors import UserError
from titanling.model.presets import LlamaShape
from titanling.parallel.degrees import Degrees, accumulation_steps, loss_of_hidden, resharding, resolve_layout
from titanling.parallel.precision import compute_dtype
from titanling.parallel.quantize import CONVERTER
from titanling.parallel.stages import cut_layers
from titanling.planner.hardware import Hardware
from triton_kernels.cross_entropy import PIECE, rows_at_once
from triton_kernels.linear_cross_entropy import CHUNK


@dataclass(frozen=True)
class Setup:
    """What is planned. The numbers that all formulas use are here, in the symbols of docs/parallelism.md."""

    config: Config
    world: int
    hardware: Hardware
    shape: LlamaShape
    degrees: Degrees

    @property
    def device(self) -> torch.device:
        """The kind of device; there need not be one."""
        return torch.device("cpu" if self.hardware.name == "cpu" else "cuda")

    @cached_property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return compute_dtype(self.device, self.config.training)

    @property
    def c(self) -> int:
        """Bytes of an element that is computed with."""
        return self.dtype.itemsize

    @property
    def compiled(self) -> bool:
        """Whether blocks are compiled."""
        return self.config.compile.enable and "model" in self.config.compile.components

    def triton(self, operation: str) -> bool:
        """Whether this key of [kernels] comes to a Triton kernel: every GPU that can be planned for has them."""
        kernels = self.config.kernels
        return self.device.type == "cuda" and (getattr(kernels, operation) or kernels.implementation) != "torch"

    @property
    def float8(self) -> bool:
        """Whether blocks multiply in float8."""
        return CONVERTER in self.config.model.converters

    @property
    def accumulation(self) -> int:
        """Micro-batches of local_batch_size in a step on one rank."""
        return accumulation_steps(self.config.training, self.degrees.dp)

    @property
    def micro_batches(self) -> int:
        """How often a step runs the model (or a stage of it) forward and backward."""
        sequences = self.config.training.local_batch_size * self.accumulation
        return sequences // self.micro_sequences

    @property
    def micro_sequences(self) -> int:
        """Sequences in one of them."""
        if self.degrees.pp > 1:
            return self.config.parallelism.pipeline_parallel_microbatch_size
        return self.config.training.local_batch_size

    @property
    def n(self) -> int:
        """Tokens of a micro-batch on one rank, between tensor-parallel matrices."""
        return self.micro_sequences * self.config.training.seq_len // self.degrees.cp

    @property
    def tokens(self) -> int:
        """Tokens of a step, over all ranks."""
        training = self.config.training
        return training.local_batch_size * self.accumulation * self.degrees.dp * training.seq_len

    @property
    def ddp(self) -> bool:
        """Copies alone, of whole models."""
        return self.degrees.ddp

    @property
    def fsdp(self) -> bool:
        """FSDP2 or HSDP."""
        return self.degrees.dp * self.degrees.cp > 1 and not self.ddp

    @property
    def reshards(self) -> bool | int:
        """What FSDP does with gathered parameters after a block's forward pass (parallel/degrees.py)."""
        return resharding(self.config.parallelism, self.degrees)

    @property
    def loss_of_hidden(self) -> bool:
        """Whether the loss is computed a chunk of logits at a time (parallel/degrees.py)."""
        return loss_of_hidden(self.config.parallelism, self.degrees)

    @property
    def vocab(self) -> int:
        """Ids that the loss of one rank sees; of uneven shards the largest."""
        whole = self.config.parallelism.disable_loss_parallel
        return self.shape.vocab_size if whole else -(-self.shape.vocab_size // self.degrees.tp)

    @property
    def loss_rows(self) -> int:
        """Rows of logits of a micro-batch that exist at once."""
        if not self.loss_of_hidden:
            return self.n
        return min(self.n, rows_at_once(CHUNK, self.device.type, self.vocab))

    @property
    def piece_rows(self) -> int:
        """Rows of them that the loss works on at once: torch in pieces, a Triton kernel without memory of its own."""
        if self.triton("linear_cross_entropy"):
            return self.loss_rows
        return min(self.loss_rows, rows_at_once(PIECE, self.device.type, self.vocab))

    @property
    def offload(self) -> bool:
        """Weights, gradients and optimizer state in the host's memory."""
        return self.config.training.enable_cpu_offload and self.fsdp and self.device.type == "cuda"

    @cached_property
    def cut(self) -> list[range]:
        """Layers of each pipeline stage."""
        if self.degrees.pp == 1:
            return [range(self.shape.n_layers)]
        return cut_layers(self.config.parallelism, self.degrees.pp, self.shape.n_layers)

    def changed(self, changes: dict[str, Any]) -> "Setup":
        """This one with other values of dotted keys ("table.key"). Raises UserError as resolve does."""
        config = self.config
        for dotted, value in changes.items():
            table, _, key = dotted.partition(".")
            values = getattr(config, table).model_dump() | {key: value}
            section = type(getattr(config, table)).model_validate(values)
            config = config.model_copy(update={table: section})
        return resolve(config, self.world, self.hardware)


def resolve(config: Config, world: int, hardware: Hardware) -> Setup:
    """Check a config for a world size. Raises the UserErrors of training, but needs no data."""
    if world < 1:
        raise UserError(f"--world-size {world}: must be at least 1")
    train = None if config.data.sources else config.data.train or "-"
    data = {"train": train, "validation": config.data.validation or "-"}
    check_runnable(config.model_copy(update={"data": config.data.model_copy(update=data)}))
    shape, degrees = resolve_layout(
        config.model, config.parallelism, config.training, config.data, config.validation, config.compile, world
    )
    setup = Setup(config, world, hardware, shape, degrees)
    if setup.float8 and not hardware.float8_gain:
        raise UserError(
            f'model.converters = ["{CONVERTER}"] needs an NVIDIA GPU of compute capability 8.9 or more, which'
            f" --hardware {hardware.name} is not; remove it"
        )
    return setup
