"""Bytes of a rank: weights, gradients and optimizer state exactly, and the rest by formula at the step's worst moment.

A step's peak is at the loss, in the head's backward pass, in the last or the first block's backward pass, or when the
last gradients are reduced: gradients grow while activations shrink, so adding up all of both would be too much.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from titanling.planner.activations import Activations, activations, kept, kept_by_first, recomputed
from titanling.planner.hardware import GIB
from titanling.planner.place import Placed, stages
from titanling.planner.setup import Setup

REDUCE = 4
"""Bytes of an element while gradients are reduced: mixed_precision_reduce is float32."""
LOSS = 4
"""Bytes of an element that the loss adds up: float32."""
STATES = 2
"""Moments of AdamW, in the parameter's type."""
RESERVE = 2 * GIB
"""Kept free on a GPU: the driver's context, the communication library's buffers, workspaces, fragmentation."""


@dataclass(frozen=True)
class Moment:
    """Bytes that are alive at one moment of a step, besides weights and optimizer state."""

    name: str
    gradients: float = 0.0
    """This rank's own, of the parameters it holds."""
    activations: float = 0.0
    logits: float = 0.0
    """And what the loss works in, and leaves behind in a wider type."""
    gathered: float = 0.0
    """FSDP's whole parameters."""
    communication: float = 0.0
    """Whole gradients on their way to the rank that keeps them, and buffers of collectives."""

    @property
    def total(self) -> float:
        """All of them."""
        return sum(value for value in asdict(self).values() if not isinstance(value, str))


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. Exact: weights, gradients, optimizer (with an offload, in the host's memory)."""

    pp_rank: int
    weights: int
    gradients: int
    optimizer: int
    moments: tuple[Moment, ...]
    offloaded: bool

    @property
    def worst(self) -> Moment:
        """The moment of the peak."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def static(self) -> int:
        """Weights and optimizer state on the device."""
        return 0 if self.offloaded else self.weights + self.optimizer

    @property
    def peak(self) -> float:
        """The most at once on the device."""
        return self.static + self.worst.total


@dataclass(frozen=True)
class Elements:
    """Parameter elements of one rank, before FSDP divides them (`gathered`) and after."""

    block: float
    """Of the largest block."""
    root: float
    """Outside of blocks."""
    head: float
    """Of the output matrix; 0 on other stages."""
    embedding: float
    layers: int
    local_root: float
    local_blocks: float


def count(setup: Setup, parameters: Sequence[Placed]) -> Elements:
    """Add up a rank's parameters."""
    blocks: dict[str, float] = {}
    root = head = embedding = local_root = local_blocks = 0.0
    for each in parameters:
        elements, local = math.prod(each.gathered), math.prod(each.local)
        if each.in_block:
            index = each.name.split(".")[2]
            blocks[index] = blocks.get(index, 0.0) + elements
            local_blocks += local
            continue
        root, local_root = root + elements, local_root + local
        if len(each.shape) == 2 and each.shape[0] == setup.shape.vocab_size:
            if "embed" in each.name:
                embedding = elements
            if "head" in each.name or setup.shape.tie_embeddings:
                head = elements
    return Elements(max(blocks.values(), default=0.0), root, head, embedding, len(blocks), local_root, local_blocks)


def in_flight(setup: Setup, rank: int) -> float:
    """Micro-batches whose activations a rank of the pipeline holds at once, each through all of the rank's stages."""
    p, m = setup.degrees.pp, setup.micro_batches
    if p == 1:
        return 1.0
    v = len(setup.cut) // p
    schedule = setup.config.parallelism.pipeline_parallel_schedule.lower()
    if schedule == "1f1b":
        return min(m, p - rank)
    if schedule in ("interleaved1f1b", "interleavedzerobubble"):
        return min(m * v, 2 * (p - rank - 1) + (v - 1) * p + 1) / v
    if schedule in ("zbvzerobubble", "dualpipev"):
        return min(m, p + (schedule == "dualpipev") / 2)
    return m


def memory(setup: Setup, parameters: Sequence[Placed], rank: int) -> Memory:
    """Memory of a rank of the pipeline that holds these parameters."""
    weights = sum(each.bytes for each in parameters)
    # AdamW counts its steps in a float32 for each parameter.
    by_itself = setup.config.optimizer.stochastic_rounding  # float32 moments of bfloat16 weights
    optimizer = STATES * weights * (2 if by_itself else 1) + 4 * len(parameters)
    elements = count(setup, parameters)
    matrices = setup.shape.matmul_params / setup.shape.n_layers / setup.degrees.tp
    sizes = activations(setup, matrices)
    moments = tuple(_moments(setup, elements, sizes, rank, weights))
    return Memory(rank, weights, weights, optimizer, moments, setup.offload)


def _moments(setup: Setup, e: Elements, sizes: Activations, rank: int, weights: int) -> list[Moment]:
    """The moments of a step's last micro-batches, with as many others in flight as a pipeline's schedule has."""
    flights, item = in_flight(setup, rank), weights / max(1.0, e.local_root + e.local_blocks)
    own, whole = _gradients_before(setup, e, weights)
    moments = []
    if setup.micro_batches > flights or setup.ddp:
        moments += _micro_batch(setup, e, sizes, rank, item, flights, own, whole)
    else:
        # The first backward pass meets all activations, and later ones the gradients.
        moments += _micro_batch(setup, e, sizes, rank, item, flights, 0.0, 0.0)
        if setup.micro_batches > 1:
            moments += _micro_batch(setup, e, sizes, rank, item, flights - 1, own, whole)
    last = e.root * ((setup.c + REDUCE) if setup.fsdp else 0)
    sent = _pipeline_buffers(setup, sizes)
    device = 0.0 if setup.offload else 1.0
    return [*moments, Moment("last reduction", weights * device, 0.0, 0.0, _gathered(setup, e).root, last + sent)]


def _micro_batch(
    setup: Setup, e: Elements, sizes: Activations, rank: int, item: float, flights: float, own: float, whole: float
) -> list[Moment]:
    """From the loss to the first block's gradients. `own` and `whole` gradients are there already."""
    last = len(setup.cut) - 1 in stages(setup, rank)
    blocks, layers = kept(setup, sizes, e.layers), max(1, e.layers)
    ends = sizes.norm + sizes.hidden if last else 0.0
    logits, loss = (sizes.logits, sizes.loss) if last else (0.0, 0.0)
    others = (flights - 1) * (blocks + ends + sizes.angles) + sizes.angles
    hidden, sent = sizes.input * setup.degrees.tp, _pipeline_buffers(setup, sizes)
    gathered, fsdp = _gathered(setup, e), setup.fsdp
    work = hidden + sizes.transient
    at_last, at_first = work + recomputed(setup, sizes, layers - 1), work + recomputed(setup, sizes, 0)
    # Gradients of a block are made from its end; at its worst moment there is that of the last matrix.
    down = setup.shape.dim * setup.shape.ffn_dim / setup.degrees.tp
    made = (e.head * setup.c, down * setup.c) if fsdp else (0.0, 0.0)
    mine = (0.0, 0.0) if fsdp or own else (e.head * item, down * item)
    reduced = e.block * REDUCE if fsdp and layers > 1 else 0.0
    local = 0.0 if own or setup.offload else e.local_blocks * item * (1.0 if fsdp else (layers - 1) / layers)
    before = others + blocks + ends
    if last and setup.loss_of_hidden:
        # FSDP lets go of the buffer of its last gathering when the model has returned, which is after the loss.
        buffer = e.block * setup.c if fsdp else 0.0
        # The loss leaves behind gradients: that of the head's input in its place, that of the matrix in float32.
        target = setup.c if fsdp else item
        head = e.head * LOSS if own or target < LOSS else 0.0
        ending = [
            Moment(
                "loss",
                own,
                before + hidden,
                logits + loss,
                gathered.forward + buffer,
                whole + sent + _loss_work(setup, e, item),
            ),
            Moment("head's backward pass", own + mine[0], before, head, gathered.head, whole + sent + made[0]),
        ]
    else:
        ending = [
            Moment("loss", own, before, logits + loss, gathered.forward, whole + sent),
            Moment(
                "head's backward pass", own + mine[0], before + hidden, logits, gathered.head, whole + sent + made[0]
            ),
        ]
    return [
        *ending,
        Moment(
            "last block's backward pass", own + sum(mine), others + blocks + at_last, 0.0, gathered.last,
            whole + sent + sum(made),
        ),
        Moment(
            "first block's backward pass", own + sum(mine) + local,
            others + kept_by_first(setup, sizes, layers) + at_first, 0.0, gathered.first,
            whole / layers + sent + sum(made) + reduced,
        ),
    ]  # fmt: skip


def _loss_work(setup: Setup, e: Elements, item: float) -> float:
    """The gradient of the output matrix in the making, and the matrix in the type that is computed in, if it is not."""
    cast = setup.c if not setup.fsdp and setup.c != item else 0.0
    # A CPU adds a chunk's product, in its own type, to the sum.
    product = setup.c if setup.device.type == "cpu" and setup.c < LOSS else 0.0
    return e.head * (LOSS + cast + product)


@dataclass(frozen=True)
class Gathered:
    """Bytes of FSDP's whole parameters at the moments of a micro-batch, and at the step's end."""

    forward: float
    head: float
    last: float
    first: float
    root: float


def _gathered(setup: Setup, e: Elements) -> Gathered:
    if not setup.fsdp:
        return Gathered(0.0, 0.0, 0.0, 0.0, 0.0)
    reshards = setup.reshards
    block, root = e.block * setup.c, e.root * setup.c
    ahead = min(setup.config.parallelism.fsdp_prefetch, max(0, e.layers - 1))
    if not reshards:
        whole = root + block * e.layers
        # Without a pipeline, a block's parameters are let go when its gradients are there.
        return Gathered(whole, whole, whole, whole if setup.degrees.pp > 1 else root + block, root)
    some = root + (0.0 if reshards is True else block * e.layers / reshards)
    # A block in use, and one or more gathered ahead of it.
    return Gathered(some, some + block, some + block * (1 + ahead), some + block, root)


def _gradients_before(setup: Setup, e: Elements, weights: int) -> tuple[float, float]:
    """Gradients of earlier micro-batches: this rank's own, and FSDP's whole ones."""
    if setup.ddp:
        return weights, 0.0  # in DDP's buckets, always
    if setup.micro_batches == 1:
        return 0.0, 0.0
    if setup.fsdp:
        # Without a reduction after every micro-batch, whole gradients add up in the type that they are reduced in.
        return 0.0, (e.root + e.block * e.layers) * REDUCE
    return weights, 0.0


def _pipeline_buffers(setup: Setup, sizes: Activations) -> float:
    """Hidden states and their gradients of all micro-batches: every stage has buffers to receive them in."""
    if setup.degrees.pp == 1:
        return 0.0
    return 2 * setup.micro_batches * sizes.input * (len(setup.cut) // setup.degrees.pp)
