"""The collectives of a step on one rank, by a formula per plan. L blocks, A micro-batches; tests count them.

FSDP2     all-gather: A · (L + 1) forward, A · L backward if blocks are resharded (the root, which holds embedding,
          final norm and head, stays); reduce-scatter: L + 1, after the last micro-batch. HSDP: as many all-reduces of
          shards. Under a pipeline: once a step, for micro-batches share what is gathered.
DDP       all-reduce: one a bucket of 25 MiB
tensor    A · (2 L + 1) all-gathers and reduce-scatters forward (two modules a block are entered and left; the embedding
          is left, the head entered), as many backward; recomputed blocks enter twice more, and "full" leaves once more.
          all-reduce: one a norm's weight each step; the loss over vocabulary shards, two a piece
context   A · L all-gathers of keys and values forward, A · L reduce-scatters backward; recomputed ones again
pipeline  a send or receive of hidden states or their gradient for each micro-batch and border between ranks
step      all-reduce of the number of targets, and of the gradient norm (DDP: of whether the losses are finite)
"""

from collections.abc import Sequence
from dataclasses import dataclass

from titanling.planner.memory import REDUCE, count
from titanling.planner.place import Placed, stages
from titanling.planner.setup import Setup

BUCKET = 25 * 2**20
"""DistributedDataParallel's default; its first bucket is of 1 MiB."""

ASYNC = 0.4
"""Share of tensor-parallel communication that async TP hides: torchtitan reports 6 to 10 % more tokens/s with it."""


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind and purpose in a step."""

    kind: str
    purpose: str
    dimension: str
    ranks: int
    count: int
    bytes: float
    """Of one: the whole gathered, reduced or sent tensor."""
    stride: int = 1
    """How many ranks lie between neighbours: whether they share a node."""
    overlaps: float = 0.0
    """Share of it that runs beside the computation."""

    @property
    def total(self) -> float:
        """Bytes of a step."""
        return self.count * self.bytes


def traffic(setup: Setup, parameters: Sequence[Placed], rank: int) -> list[Collective]:
    """All collectives of a step on a rank of the pipeline that holds these parameters."""
    found = [*_data(setup, parameters), *_tensor(setup, parameters, rank), *_context(setup, parameters)]
    found += _pipeline(setup, rank)
    if setup.world > 1:
        found.append(Collective("all-reduce", "number of targets", "world", setup.world, 1, 8))
        # Of DDP every rank has the norm, but not the others' losses: one that is not finite skips the step.
        what = "losses that are not finite" if setup.ddp else "gradient norm"
        found.append(Collective("all-reduce", what, "world", setup.world, 1, 4))
    return [each for each in found if each.count]


def by_kind(collectives: Sequence[Collective]) -> dict[str, int]:
    """How many of each kind, and "send or receive"."""
    kinds: dict[str, int] = {}
    for each in collectives:
        kinds[each.kind] = kinds.get(each.kind, 0) + each.count
    return kinds


def _data(setup: Setup, parameters: Sequence[Placed]) -> list[Collective]:
    degrees, e = setup.degrees, count(setup, parameters)
    held = sum(each.bytes for each in parameters)
    if setup.ddp:
        buckets = 1 if held <= 2**20 else 1 + -(-(held - 2**20) // BUCKET)
        return [Collective("all-reduce", "gradients", "dp_replicate", setup.world, buckets, held / buckets, 1, 1.0)]
    if not setup.fsdp:
        return []
    reshards, inner = setup.reshards, degrees.tp
    times = 1 if degrees.pp > 1 and not reshards else setup.micro_batches
    groups = e.layers + (1 if e.root else 0)
    whole = (e.block * e.layers + e.root) / max(1, groups)
    shards, name = degrees.fsdp, "fsdp"
    found = []
    if shards > 1:
        found.append(
            Collective("all-gather", "parameters, forward", name, shards, times * groups, whole * setup.c, inner, 1.0)
        )
        if reshards:
            ranks = shards if reshards is True else reshards
            times *= e.layers
            found.append(
                Collective("all-gather", "parameters, backward", name, ranks, times, e.block * setup.c, inner, 1.0)
            )
        found.append(Collective("reduce-scatter", "gradients", name, shards, groups, whole * REDUCE, inner, 1.0))
    if degrees.dp_replicate > 1:
        shard = (e.local_root + e.local_blocks) / max(1, groups) * REDUCE
        copies, stride = degrees.dp_replicate, degrees.tp * degrees.fsdp
        found.append(
            Collective("all-reduce", "gradients between copies", "dp_replicate", copies, groups, shard, stride, 1.0)
        )
    return found


def _recomputed(setup: Setup, layers: int) -> int:
    """Blocks whose collectives run again in the backward pass."""
    settings = setup.config.activation_checkpoint
    if settings.mode in ("none", "memory_budget"):
        return 0
    if settings.mode == "full" or settings.selective_ac_option == "op":
        return layers
    return -(-layers // int(settings.selective_ac_option))


def _tensor(setup: Setup, parameters: Sequence[Placed], rank: int) -> list[Collective]:
    tp, times, own = setup.degrees.tp, setup.micro_batches, stages(setup, rank)
    if tp == 1:
        return []
    layers, d = count(setup, parameters).layers, setup.shape.dim
    hidden = setup.n * d * setup.c
    first, last = 0 in own, len(setup.cut) - 1 in own
    again = _recomputed(setup, layers)
    by_operator = setup.config.activation_checkpoint.selective_ac_option == "op"
    left_again = 0 if setup.config.activation_checkpoint.mode == "selective" and by_operator else again
    overlaps = ASYNC if setup.config.parallelism.enable_async_tensor_parallel else 0.0
    norms = sum(len(each.shape) == 1 for each in parameters)
    ends = first + last
    found = [
        Collective(
            "all-gather", "hidden states", "tp", tp, times * (4 * layers + ends + 2 * again), hidden, 1, overlaps
        ),
        Collective(
            "reduce-scatter", "hidden states", "tp", tp, times * (4 * layers + ends + left_again), hidden, 1, overlaps
        ),
        Collective("all-reduce", "gradients of norms", "tp", tp, norms, d * REDUCE),
    ]
    if last and setup.config.parallelism.disable_loss_parallel:
        logits = setup.n * setup.shape.vocab_size * setup.c
        found.append(Collective("all-gather", "logits", "tp", tp, times, logits))
    elif last:
        rows = setup.piece_rows
        # A chunk of logits is worked on in pieces; the last chunk may be shorter.
        whole, rest = divmod(setup.n, setup.loss_rows)
        pieces = whole * -(-setup.loss_rows // rows) + -(-rest // rows)
        found.append(Collective("all-reduce", "loss", "tp", tp, 2 * pieces * times, 1.5 * 4 * rows))
    return found


def _context(setup: Setup, parameters: Sequence[Placed]) -> list[Collective]:
    cp, tp, times = setup.degrees.cp, setup.degrees.tp, setup.micro_batches
    if cp == 1:
        return []
    layers = count(setup, parameters).layers
    heads = 2 * setup.shape.n_kv_heads * setup.shape.head_dim / tp
    keys = setup.n * cp * heads * setup.c
    gathers = times * (layers + _recomputed(setup, layers))
    return [
        Collective("all-gather", "keys and values", "cp", cp, gathers, keys, tp),
        Collective("reduce-scatter", "gradients of keys and values", "cp", cp, times * layers, keys, tp),
    ]


def _pipeline(setup: Setup, rank: int) -> list[Collective]:
    p, times = setup.degrees.pp, setup.micro_batches
    if p == 1:
        return []
    hidden, stride = setup.n * setup.shape.dim * setup.c / setup.degrees.tp, setup.world // p
    owner = {stage: r for r in range(p) for stage in stages(setup, r)}
    # Both sides of every own stage where the neighbour is on another rank; each forward and backward.
    borders = sum(owner.get(other, rank) != rank for stage in stages(setup, rank) for other in (stage - 1, stage + 1))
    sends = 2 * borders * times
    return [Collective("send or receive", "hidden states", "pp", 2, sends, hidden, stride, 1.0)]
