"""FLOPs of a step, and its time by a roofline: products, attention, memory traffic, communication, pipeline bubble.

step = (matrix products / (peak · share) + attention / (peak · share) + bytes / (bandwidth · share)
        + communication that nothing hides) · (1 + bubble) + optimizer
"""

from collections.abc import Sequence
from dataclasses import dataclass

from titanling.config.schema import Parallelism
from titanling.metrics.hardware import FlopsPerToken, flops_per_token, mfu
from titanling.planner.hardware import HOP, LINK, STREAM, Hardware
from titanling.planner.memory import Memory
from titanling.planner.setup import Setup
from titanling.planner.traffic import Collective

ATTENTION_BACKWARD = 2.5
"""Fused attention's backward pass over its forward one: five products instead of two (FlashAttention-2)."""

CONTENTION = 0.2
"""How much longer the computation takes while a collective runs beside it, which uses the same units and memory."""


@dataclass(frozen=True)
class Flops:
    """FLOPs."""

    per_token: FlopsPerToken
    """Of the model: the numerators of MFU."""
    step: float
    """Of the model in a step, "full"."""
    recomputed: float
    """Computed again per token of the step, because of activation checkpointing (causal attention)."""


@dataclass(frozen=True)
class Speed:
    """Seconds of a step on the slowest rank, and what follows from them."""

    matmul: float
    attention: float
    memory_bound: float
    optimizer: float
    communication: float
    """All of it, whether hidden or not."""
    exposed: float
    bubble: float
    step: float
    tokens_per_second: float
    mfu_full: float
    mfu_causal: float
    days: float


def flops(setup: Setup) -> Flops:
    """FLOPs of the model and of recomputation."""
    shape, seq_len = setup.shape, setup.config.training.seq_len
    with_head = shape.matmul_params + shape.embedding_params
    per_token = flops_per_token(with_head, shape.n_layers, shape.n_heads, shape.head_dim, seq_len)
    products, attention = _again(setup)
    causal = per_token.full - per_token.causal
    recomputed = products * 2 * shape.matmul_params + attention * causal / 3
    return Flops(per_token, per_token.full * setup.tokens, recomputed)


def bubble(settings: Parallelism, p: int, v: float, m: int) -> float:
    """Idle time of a rank over its working time, for p ranks of v stages and m micro-batches, all passes equally long.

    (p - 1) / m for GPipe and 1F1B; / v when stages interleave (Narayanan 2021); a third of that when weights' gradients
    fill the gaps (Qi 2023); none for the V-shaped schedules (Qi 2024), which also need as many micro-batches as ranks.
    """
    schedule = settings.pipeline_parallel_schedule.lower()
    if p == 1 or schedule in ("zbvzerobubble", "dualpipev"):
        return 0.0
    return (p - 1) / (v * m) / (3 if schedule == "interleavedzerobubble" else 1)


def speed(setup: Setup, memory: Memory, layers: int, collectives: Sequence[Collective]) -> Speed | None:
    """For the rank with the most work, of `layers` blocks and, if it is a pipeline's last, the head.

    None where the hardware's rates are unknown.
    """
    hardware, shape, degrees, times = setup.hardware, setup.shape, setup.degrees, setup.micro_batches
    peak = hardware.peak(str(setup.dtype).removeprefix("torch."))
    if peak is None or hardware.bandwidth is None:
        return None
    # A float32 product is allowed no other units; the share of the peak is that of bfloat16.
    tokens = setup.n * times
    blocks = layers / shape.n_layers / degrees.tp
    again_products, again_attention = _again(setup)
    product_flops = tokens * shape.matmul_params * blocks * (6 + 2 * again_products)
    gain = hardware.float8_gain if setup.float8 else 1.0
    head = tokens * 6 * shape.embedding_params / degrees.tp / degrees.pp
    forward = tokens * 2 * shape.n_heads * shape.head_dim * setup.config.training.seq_len * layers / degrees.tp
    matmul = (product_flops / gain + head) / (peak * hardware.matmul)
    attention = forward * (1 + ATTENTION_BACKWARD + again_attention) / (peak * hardware.attention)
    stream = hardware.bandwidth * STREAM
    memory_bound = _element_bytes(setup, layers) * times / stream
    # AdamW reads weight, gradient and two moments and writes three; clipping reads and writes gradients.
    optimizer = (memory.weights * 10) / stream if not memory.offloaded else memory.weights * 10 / 50e9
    working = matmul + attention + memory_bound
    communication = sum(seconds(each, hardware) for each in collectives)
    exposed = _exposed(setup, hardware, collectives, working)
    stages = len(setup.cut) / degrees.pp
    idle = (working + exposed) * bubble(setup.config.parallelism, degrees.pp, stages, times)
    step = working + exposed + idle + optimizer
    rate = setup.tokens / step
    per_token = flops(setup).per_token
    return Speed(
        matmul, attention, memory_bound, optimizer, communication, exposed, idle, step, rate,
        mfu(rate / setup.world, per_token.full, peak), mfu(rate / setup.world, per_token.causal, peak),
        setup.config.training.steps * step / 86400,
    )  # fmt: skip


def seconds(each: Collective, hardware: Hardware) -> float:
    """Time of a collective's count in a step: its ring's bytes over the slowest link, and a latency per node."""
    assert hardware.intra_node is not None and hardware.inter_node is not None
    if each.ranks == 1:
        return 0.0
    ring = (each.ranks - 1) / each.ranks * each.bytes * (2 if each.kind == "all-reduce" else 1)
    if each.kind == "send or receive":
        ring = each.bytes
    nodes = -(-each.ranks * each.stride // hardware.per_node)
    link = hardware.intra_node
    if nodes > 1:
        # Ranks of the ring that share a node share its links to others: what enters a node, leaves it once.
        within = max(1, hardware.per_node // each.stride)
        link = min(hardware.intra_node, hardware.inter_node * within)
    return each.count * (ring / (link * LINK) + HOP * (nodes if nodes > 1 else 1))


def _exposed(setup: Setup, hardware: Hardware, collectives: Sequence[Collective], working: float) -> float:
    """Seconds of communication that the computation cannot hide.

    What overlaps, hides behind the work of its kind's passes, all but its first and last piece.
    """
    hidden = sum(seconds(each, hardware) * each.overlaps for each in collectives)
    ends = sum(seconds(each, hardware) / each.count * each.overlaps for each in collectives)
    rest = sum(seconds(each, hardware) * (1 - each.overlaps) for each in collectives)
    return rest + ends + CONTENTION * hidden + max(0.0, hidden - ends - working)


def _again(setup: Setup) -> tuple[float, float]:
    """Shares of the blocks' products and of their attention that are computed twice."""
    settings = setup.config.activation_checkpoint
    if settings.mode == "none" or (settings.mode == "selective" and settings.selective_ac_option == "op"):
        return 0.0, 0.0
    if settings.mode == "full":
        return 1.0, 1.0
    if settings.mode == "memory_budget":
        return 1 - settings.memory_budget, 1 - settings.memory_budget
    return 1 / int(settings.selective_ac_option), 1 / int(settings.selective_ac_option)


def _element_bytes(setup: Setup, layers: int) -> float:
    """Bytes that element-wise kernels read and write in a micro-batch, forward and backward.

    Forward, in elements: norm 2 and residual 3, twice; RoPE 2 compiled, 10 eager (float32 halves, four products, cat);
    SwiGLU 3 compiled, 5 eager. Backward: twice that. Recomputation: the forward part again. Loss: logits in the type of
    the computation and three passes over a float32 copy; the matrix's gradient is read and written once a chunk.
    """
    shape, tp, n = setup.shape, setup.degrees.tp, setup.n
    hidden = 10 * n / tp * shape.dim
    rope = (2 if setup.compiled else 10) * n * (shape.n_heads + shape.n_kv_heads) * shape.head_dim / tp
    swiglu = (3 if setup.compiled else 5) * n * shape.ffn_dim / tp
    again, _ = _again(setup)
    settings = setup.config.activation_checkpoint
    if settings.mode == "selective" and settings.selective_ac_option == "op":
        again = 1.0
    blocks = layers * (hidden + rope + swiglu) * setup.c * (3 + again)
    chunks = -(-n // setup.loss_rows) if setup.loss_of_hidden else 0
    loss = shape.vocab_size / tp * (n * (3 * setup.c + 24) / setup.degrees.pp + chunks * 8 * shape.dim)
    return blocks + loss
