"""A laid-out model as the training loop sees it: the same few calls under every layout."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from titanling.loss import LossOptions, VocabShard, cross_entropy_sum, head_cross_entropy_sum
from titanling.model.generate import CachedDecoder, NextLogits
from titanling.model.presets import LlamaShape
from titanling.parallel.context import shard_sequence
from titanling.parallel.data import DataParallel, reshard, sync_gradients
from titanling.parallel.degrees import loss_of_hidden
from titanling.parallel.mesh import World
from titanling.parallel.weights import materialize, settle

Batch = dict[str, Tensor]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch there, without waiting for it."""
    if device.type == "cuda":  # only from pinned memory does a copy not make the host wait
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


class Runner:
    """One rank's part of a model under its plans. Every method is called by all ranks together.

    Batches hold `input_ids` and `labels`, (batch, seq) int64 on the device, the same on all ranks that do not differ in
    their data-parallel place; the runner takes from them what is this rank's. Those whose documents are not to see each
    other also hold `positions` of the same shape.
    """

    def __init__(
        self, parts: list[nn.Module], data: DataParallel, shape: LlamaShape, world: World, loss_by: str
    ) -> None:
        self.parts, self.shape, self.world, self.data = parts, shape, world, data
        degrees = world.degrees
        self.of_hidden = loss_of_hidden(data.settings, degrees)
        self.loss: Callable[..., Tensor] = head_cross_entropy_sum if self.of_hidden else cross_entropy_sum
        self.averaged = 1 if world.mesh is None else degrees.dp * degrees.cp
        shard = None
        if degrees.tp > 1 and not data.settings.disable_loss_parallel:
            piece = -(-shape.vocab_size // degrees.tp)
            shard = VocabShard(world.submesh("tp").get_group(), piece * world.index("tp"), shape.vocab_size)
        self.vocab_shard: VocabShard | None = shard
        # What is minimised, and what validation tells.
        self.objective = LossOptions(data.training.label_smoothing, data.training.z_loss, shard, loss_by)
        self.measure = LossOptions(shard=shard, by=loss_by)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters of this rank, under the names that they have in the whole model."""
        return [named for part in self.parts for named in part.named_parameters()]

    def initialize(self, seed: int) -> None:
        """Memory and first weights: the same under every layout."""
        offloaded = self.data.training.enable_cpu_offload and self.world.degrees.fsdp > 1
        self.state_device = torch.device("cpu") if offloaded else self.world.device
        for part in self.parts:
            materialize(part, self.state_device, self.shape, seed)
        self.modules = [self.data.wrap(part, self.world) for part in self.parts]

    def forward_backward(self, batches: Sequence[Batch], targets: Tensor, scale: Tensor) -> Tensor:
        """Add to the gradients those of the summed objective of all micro-batches over `targets`, times `scale`.

        Gradients of data-parallel ranks are summed. Returns this rank's share of the loss, 0-dim float32: the sum of
        all ranks' shares is the loss.
        """
        (module,) = self.modules
        loss = torch.zeros((), device=self.world.device)
        for index, batch in enumerate(batches):
            sync_gradients(module, index == len(batches) - 1)
            micro_loss = self._loss(batch, self.objective) / targets
            # Data parallelism averages gradients over ranks; the loss is a sum over them.
            (micro_loss * (self.averaged * scale)).backward()
            loss += micro_loss.detach()
        settle(parameter for _, parameter in self.named_parameters())
        return self.share(loss)

    def loss_sum(self, batch: Batch) -> Tensor:
        """This rank's share of the cross-entropy summed over a batch, without gradients."""
        return self.share(self._loss(batch, self.measure))

    def _loss(self, batch: Batch, options: LossOptions) -> Tensor:
        input_ids, labels, positions = self.take(batch)
        (module,) = self.modules
        if not self.of_hidden:
            return self.loss(module(input_ids, positions), labels, options)

        def loss(hidden: Tensor, weight: Tensor) -> Tensor:
            # Under a tensor plan: whole hidden states, of whose gradient each rank has a part, and rows of the matrix.
            if isinstance(hidden, DTensor) and isinstance(weight, DTensor):
                hidden, weight = hidden.to_local(grad_placements=[Partial()]), weight.to_local()
            return self.loss(hidden, weight, labels, options)

        return module(input_ids, positions, loss=loss)

    def take(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """This rank's token ids and labels (batch, seq / cp), and their positions unless they run from 0."""
        input_ids, labels, positions = batch["input_ids"], batch["labels"], batch.get("positions")
        ranks, rank = self.world.degrees.cp, self.world.index("cp")
        if ranks == 1:
            return input_ids, labels, positions
        if positions is None:
            positions = torch.arange(input_ids.size(1), device=input_ids.device)
        return (
            shard_sequence(input_ids, 1, ranks, rank),
            shard_sequence(labels, 1, ranks, rank),
            shard_sequence(positions, -1, ranks, rank),
        )

    def share(self, loss: Tensor) -> Tensor:
        """`loss`, or nothing where another tensor-parallel rank has the same one and counts it."""
        return loss if self.world.index("tp") == 0 else torch.zeros_like(loss)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Forward passes without gradients: dropout off, and FSDP's parameters sharded again at the end."""
        for module in self.modules:
            module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module in self.modules:
                module.train()
                reshard(module)

    def decoder(self, capacity: int) -> NextLogits:
        """What gives the logits of the next token on every rank, token by token, for a text of `capacity` tokens."""
        degrees = self.world.degrees
        if degrees.tp * degrees.cp * degrees.pp == 1:
            return CachedDecoder(self.parts[0], self.shape.n_layers, capacity)
        return WholeTextDecoder(self, capacity)

    def logits(self, input_ids: Tensor) -> Tensor | None:
        """This rank's part of the logits of whole texts (batch, seq): (batch, seq / cp, vocab / tp), if it has any."""
        ids, _, positions = self.take({"input_ids": input_ids, "labels": input_ids})
        return self.modules[0](ids, positions)


class WholeTextDecoder:
    """Runs the whole text anew for every token: no cache, but right wherever sequence, heads or layers are divided."""

    def __init__(self, runner: Runner, capacity: int) -> None:
        degrees = runner.world.degrees
        unit = 2 * degrees.cp * degrees.tp
        self.runner, self.length = runner, 0
        # Causal: what stands behind the text does not change it.
        self.text = torch.zeros(1, -(-capacity // unit) * unit, dtype=torch.int64, device=runner.world.device)

    def __call__(self, tokens: Tensor) -> Tensor:
        """New tokens (n,) → logits (vocab,) float32 behind them, the same on all ranks."""
        self.text[0, self.length : self.length + len(tokens)] = tokens
        self.length += len(tokens)
        runner, world = self.runner, self.runner.world
        logits = runner.logits(self.text)
        found = torch.zeros(runner.shape.vocab_size, device=world.device)
        positions = torch.arange(self.text.size(1), device=world.device)
        own = shard_sequence(positions, 0, world.degrees.cp, world.index("cp")) if world.degrees.cp > 1 else positions
        place = (own == self.length - 1).nonzero()
        if logits is not None and len(place) and world.dp_rank == 0:
            shard = runner.vocab_shard
            if shard is not None or world.index("tp") == 0:
                first = shard.first if shard is not None else 0
                found[first : first + logits.size(-1)] = logits[0, place[0, 0]].float()
        return world.sum_(found)
