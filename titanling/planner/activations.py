"""What the forward pass keeps for the backward pass, in bytes of one micro-batch on one rank.

Symbols: n tokens of the micro-batch on this rank; d = dim; q, kv = query and key/value heads × head_dim, f = ffn_dim
and V = vocabulary, each divided by tp; c bytes of an element; n/tp where the sequence is divided between matrices.

A block, eager, keeps the inputs of every product and of every operation whose derivative needs them:

    norms       2 · n/tp · d · c          their inputs (eager, a CPU has no fused norm: 8 bytes, float32 in and out)
    products    2 · n · d · c             their outputs, which q, k, v and gate, up are multiplied with
    attention   n · (2 q + 2 kv) · c      q, k, v and the output; 4 n · heads for the log-sum-exp
    MLP         4 · n · f · c             gate, silu(gate), up, and their product

Compiled, silu(gate) alone is computed again: torch's partitioner keeps what the backward pass would write out for a
product of matrices, and those are the norms' outputs and the MLP's product. Triton's SwiGLU does not keep it either.
"full" keeps the block's input alone; "op" adds the outputs of all products, attention and reductions.
"""

from dataclasses import dataclass

from titanling.planner.setup import Setup


@dataclass(frozen=True)
class Activations:
    """Bytes."""

    input: float
    """A block's input."""
    whole: float
    """All that a block's backward pass needs, its input included."""
    operators: float
    """What "op" keeps of it, the input included."""
    again: float
    """What comes on top of it while the block is recomputed."""
    transient: float
    """Gradients of activations that are alive at once in a block's backward pass."""
    casts: float
    """Copies of a block's weights in the type of the computation, where FSDP does not make them."""
    norm: float
    """What the final norm keeps, where the head is."""
    hidden: float
    """The head's input, whole sequences."""
    angles: float
    """cos and sin of RoPE."""
    logits: float
    """Those that exist at once."""
    loss: float
    """What the loss works in besides the logits."""


def activations(setup: Setup, matrix_elements: float) -> Activations:
    """Sizes for this setup; `matrix_elements` of a block on one tensor-parallel rank."""
    shape, tp, cp, c, n = setup.shape, setup.degrees.tp, setup.degrees.cp, setup.c, setup.n
    d, f, heads = shape.dim, shape.ffn_dim / tp, shape.n_heads / tp
    q, kv = heads * shape.head_dim, shape.n_kv_heads / tp * shape.head_dim
    share = n / tp
    lse = 4 * n * heads
    # Under context parallelism, attention keeps all keys and values of its sequence, and its output in two copies.
    attention = n * (q + 2 * kv * cp + q * (2 if cp > 1 else 1)) * c + lse
    norms = 2 * _norm(setup, share * d, share, setup.compiled)
    if shape.qk_norm:
        norms += _norm(setup, n * (q + kv), n * (heads + shape.n_kv_heads / tp), setup.compiled)
    mlp = (3 if setup.compiled or setup.triton("swiglu") else 4) * n * f * c
    dropout = 2 * share * d * (1 if setup.device.type == "cuda" else c) if shape.dropout else 0.0
    whole = norms + 2 * n * d * c + attention + mlp + dropout
    products = n * (q + 2 * kv + 2 * d + 2 * f) * c
    # Reductions over tensor-parallel ranks are kept; all-gathers run again.
    reduced = 2 * share * d * c if tp > 1 else 0.0
    operators = share * d * c + products + n * q * c + lse + reduced
    # v, attention, gate and up are in both; q, k and attention's product are let go as they are used again.
    both = n * (kv + q + 2 * f) * c + lse + n * (q + kv + d) * c
    logits = setup.loss_rows * setup.vocab
    return Activations(
        input=share * d * c,
        whole=whole,
        operators=operators,
        again=whole - both,
        transient=2 * n * f * c,
        casts=0.0 if setup.fsdp or setup.dtype.itemsize == _held(setup) else matrix_elements * c,
        norm=_norm(setup, share * d, share, compiled=False),
        hidden=n * d * c,
        angles=8 * (setup.config.training.seq_len / cp) * shape.head_dim / 2,
        logits=logits * c,
        loss=0.0 if c == 4 or setup.triton("linear_cross_entropy") else 4 * setup.piece_rows * setup.vocab,
    )


def kept(setup: Setup, sizes: Activations, layers: int) -> float:
    """Bytes that `layers` blocks keep under the setup's activation checkpointing."""
    settings = setup.config.activation_checkpoint
    whole = sizes.whole + sizes.casts
    if settings.mode == "none":
        return layers * whole
    if settings.mode == "full":
        return layers * sizes.input
    if settings.mode == "memory_budget":
        return layers * (settings.memory_budget * whole + (1 - settings.memory_budget) * sizes.input)
    if settings.selective_ac_option == "op":
        return layers * sizes.operators
    recomputed = -(-layers // int(settings.selective_ac_option))
    return recomputed * sizes.input + (layers - recomputed) * whole


def recomputed(setup: Setup, sizes: Activations, block: int) -> float:
    """Bytes that appear when the backward pass reaches this block of a rank."""
    settings = setup.config.activation_checkpoint
    if settings.mode == "none":
        return 0.0
    if settings.mode == "memory_budget":
        return (1 - settings.memory_budget) * (sizes.whole + sizes.casts)
    if settings.mode == "selective":
        if settings.selective_ac_option == "op":
            return sizes.again + sizes.casts
        if block % int(settings.selective_ac_option):
            return 0.0
    return sizes.whole + sizes.casts


def kept_by_first(setup: Setup, sizes: Activations, layers: int) -> float:
    """Bytes that the first of a rank's blocks keeps."""
    settings = setup.config.activation_checkpoint
    if settings.mode == "selective" and settings.selective_ac_option != "op":
        return sizes.input
    return kept(setup, sizes, layers) / max(1, layers)


def _norm(setup: Setup, elements: float, rows: float, compiled: bool) -> float:
    """What an RMSNorm keeps: its input, and a number per row."""
    return elements * (setup.c if compiled or setup.device.type == "cuda" else 8) + 4 * rows


def _held(setup: Setup) -> int:
    return {"float32": 4, "bfloat16": 2}[setup.config.training.dtype]
