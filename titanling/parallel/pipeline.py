"""Pipeline parallelism: ranks hold consecutive layers and pass hidden states on, micro-batch by micro-batch."""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

from titanling.config.schema import Parallelism
from titanling.model.layout import ModelLayout
from titanling.model.presets import LlamaShape
from titanling.parallel.data import DataParallel
from titanling.parallel.mesh import World
from titanling.parallel.plan import Plan
from titanling.parallel.runner import Batch, Runner
from titanling.parallel.stages import cut_layers, stages_of_rank
from titanling.parallel.weights import settle


class Pipeline(Plan):
    """Cut the model into stages of consecutive layers and keep those of this rank."""

    name = "pipeline"
    needs = ("pp",)

    def __init__(self, settings: Parallelism, shape: LlamaShape) -> None:
        self.settings, self.shape = settings, shape

    def apply(self, model: nn.Module, world: World) -> Sequence[nn.Module]:
        """The stages of this rank: models like the whole one, where an identity stands for what others hold."""
        cut = cut_layers(self.settings, world.degrees.pp, self.shape.n_layers)
        own = stages_of_rank(self.settings, world.degrees.pp, world.index("pp"), len(cut))
        return [take_stage(model, cut[s], first=s == 0, last=s == len(cut) - 1) for s in own]

    def describe(self) -> str:
        """One line."""
        cut = cut_layers(self.settings, self.settings.pipeline_parallel_degree, self.shape.n_layers)
        layers = "+".join(str(len(stage)) for stage in cut)
        if len(cut) > 16:
            sizes = [len(stage) for stage in cut]
            layers = f"{min(sizes)}–{max(sizes)} each"
        return f"{len(cut)} stages of {layers} layers, {self.settings.pipeline_parallel_schedule}"


def take_stage(model: nn.Module, layers: range, first: bool, last: bool) -> nn.Module:
    """A model that shares its parameters with `model` but runs some of its layers only.

    The first stage has the embedding, the last one norm and head; elsewhere hidden states pass through their places.
    """
    layout: ModelLayout = model.layout  # type: ignore[assignment]
    blocks = model.get_submodule(layout.blocks)
    exchanged: dict[str, nn.Module] = {
        layout.blocks: nn.ModuleDict({str(index): blocks.get_submodule(str(index)) for index in layers})
    }
    if not first:
        exchanged |= {layout.embedding: nn.Identity(), layout.embedding_dropout: nn.Identity()}
    if not last:
        exchanged |= {layout.norm: nn.Identity(), layout.head: nn.Identity()}
    twins = {"": _twin(model)}
    for path, module in exchanged.items():
        parent = ""
        *parents, name = path.split(".")
        for step in parents:
            inner = f"{parent}.{step}" if parent else step
            if inner not in twins:
                twins[inner] = _twin(getattr(twins[parent], step))
                setattr(twins[parent], step, twins[inner])
            parent = inner
        setattr(twins[parent], name, module)
    return twins[""]


def _twin(module: nn.Module) -> nn.Module:
    """A module with the same parameters, children and hooks, whose children can be exchanged without touching them."""
    twin = copy.copy(module)
    for name, value in vars(twin).items():
        if isinstance(value, dict):
            twin.__dict__[name] = copy.copy(value)
    return twin


class Stage(PipelineStage):
    """torch's stage; that of torch 2.11 also greets neighbours on its own rank, where gloo has no connection."""

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.peer != dist.get_rank()]


class PipelineRunner(Runner):
    """A pipeline under one of torch's schedules. The sequences of all accumulation steps go through it together."""

    def __init__(
        self,
        parts: list[nn.Module],
        data: DataParallel,
        shape: LlamaShape,
        world: World,
        loss_by: str,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(parts, data, shape, world, loss_by)
        self.settings, self.dtype = data.settings, dtype
        self.group = world.submesh("pp").get_group()
        self.pp, self.rank = world.degrees.pp, world.index("pp")
        self.stages = len(cut_layers(self.settings, self.pp, shape.n_layers))
        self.own = stages_of_rank(self.settings, self.pp, self.rank, self.stages)
        self.owner = {s: r for r in range(self.pp) for s in stages_of_rank(self.settings, self.pp, r, self.stages)}
        self.schedule: Any = None
        self.scheduled: torch.Size | None = None
        # Hidden states may be a part of their sequence, so a stage cannot count positions by itself. None: they differ
        # between sequences, and the schedule hands them out.
        self.positions: Tensor | None = None
        for part in parts:
            part.register_forward_pre_hook(self._give_positions)

    def forward_backward(self, batches: Sequence[Batch], targets: Tensor, scale: Tensor) -> Tensor:
        """As Runner's."""
        whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        input_ids, labels, positions = self._take(whole)
        self.positions = positions if positions.ndim == 1 else None
        loss = torch.zeros((), device=self.world.device)

        def micro_loss(logits: Tensor, micro_labels: Tensor) -> Tensor:
            value = self.loss(logits, micro_labels, self.objective) / targets
            loss.add_(value.detach())
            return value * (self.averaged * scale)

        if self.scheduled != input_ids.shape:  # a stage of the data may have other sequences
            self.scheduled, self.schedule = input_ids.shape, self._build_schedule(input_ids)
        self.schedule._loss_fn = micro_loss
        arguments: dict[str, Any] = {"target": labels} if self.stages - 1 in self.own else {}
        if "return_outputs" in inspect.signature(self.schedule.step).parameters:
            arguments["return_outputs"] = False  # the loss has overwritten the logits
        if self.positions is None:
            arguments["positions"] = positions
        self.schedule.step(*([input_ids] if 0 in self.own else []), **arguments)
        settle(parameter for _, parameter in self.named_parameters())
        return self.share(loss)

    def loss_sum(self, batch: Batch) -> Tensor:
        """As Runner's."""
        logits = self._logits(batch)
        if logits is None:
            return torch.zeros((), device=self.world.device)
        return self.share(self.loss(logits, self._take(batch)[1], self.measure))

    def logits(self, input_ids: Tensor) -> Tensor | None:
        """As Runner's; only the last stage's rank has any."""
        return self._logits({"input_ids": input_ids, "labels": input_ids})

    def _logits(self, batch: Batch) -> Tensor | None:
        x, _, self.positions = self._take(batch)
        shape = self._hidden(x)
        for stage in range(self.stages):
            if self.owner[stage] != self.rank:
                continue
            before, after = self.owner.get(stage - 1, self.rank), self.owner.get(stage + 1, self.rank)
            if before != self.rank:
                x = torch.empty(shape, dtype=self.dtype, device=self.world.device)
                dist.recv(x, dist.get_global_rank(self.group, before), group=self.group)
            x = self.modules[self.own.index(stage)](x)
            if after != self.rank:
                dist.send(x.contiguous(), dist.get_global_rank(self.group, after), group=self.group)
        return x if self.owner[self.stages - 1] == self.rank else None

    def _take(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        input_ids, labels, positions = self.take(batch)
        if positions is None:
            positions = torch.arange(input_ids.size(1), device=input_ids.device)
        return input_ids, labels, positions

    def _give_positions(self, _: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return arguments if self.positions is None else (arguments[0], self.positions)

    def _hidden(self, input_ids: Tensor) -> tuple[int, int, int]:
        """Shape of the hidden states between stages for these token ids: a share of the sequence under tensor plans."""
        return (input_ids.size(0), input_ids.size(1) // self.world.degrees.tp, self.shape.dim)

    def _build_schedule(self, input_ids: Tensor) -> Any:
        """torch's schedule object. Shapes are said to the stages, so that they need not find them by a trial run."""
        size = self.settings.pipeline_parallel_microbatch_size
        ids = torch.empty((size, input_ids.size(1)), dtype=torch.int64, device="meta")
        hidden = torch.empty(self._hidden(ids), dtype=self.dtype, device="meta", requires_grad=True)
        vocab = self.shape.vocab_size
        if self.vocab_shard is not None:
            vocab = max(0, min(-(-vocab // self.world.degrees.tp), vocab - self.vocab_shard.first))
        logits = torch.empty((size, input_ids.size(1), vocab), dtype=self.dtype, device="meta", requires_grad=True)
        stages = [
            Stage(
                module,
                stage,
                self.stages,
                self.world.device,
                input_args=ids if stage == 0 else hidden,
                output_args=logits if stage == self.stages - 1 else hidden,
                group=self.group,
            )
            for stage, module in zip(self.own, self.modules, strict=True)
        ]
        kind = get_schedule_class(self.settings.pipeline_parallel_schedule)
        multiple = issubclass(kind, PipelineScheduleMulti)
        return kind(
            stages if multiple else stages[0],
            n_microbatches=input_ids.size(0) // size,
            loss_fn=lambda *_: None,  # set at every step: it depends on the step's targets
            scale_grads=False,
        )
