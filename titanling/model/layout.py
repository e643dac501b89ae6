"""Where a model family keeps what parallel plans need to find. A table beside the model: plans read it, and no model.

To add a family: write its model file, give its class a `layout`, let its forward pass end in `loss(hidden, output
matrix)` where it is given a loss, and every plan applies.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Role = Literal["norm", "add_norm", "head_norm", "gather", "column", "row"]


@dataclass(frozen=True)
class ModelLayout:
    """Module names as dotted paths from the model; those in `block` from a block."""

    embedding: str
    """nn.Embedding, token ids to hidden states. Pipeline stages without it pass hidden states through its place."""
    embedding_dropout: str
    blocks: str
    """nn.ModuleDict of the blocks by their index, which all have one shape. The module that holds it makes what they
    mask documents with by its `document_mask(positions)`, if it can."""
    norm: str
    """The norm before the output head."""
    head: str
    """The output head; absent (None) where the embedding is the output matrix."""
    attention: str
    """In a block: the module whose `attend(q, k, v, mask=None)` mixes positions, each (batch, heads, seq, head_dim)."""
    tensor: Mapping[str, Role]
    """In a block, for tensor parallelism (Megatron-LM; Shoeybi 2019, Korthikanti 2022):

    norm       works on a share of the sequence; its weight is whole on every rank
    add_norm   as norm, of the sum of its two arguments; returns the norm and the sum
    gather     its first argument is gathered along the sequence
    column     its output features, so its weight's rows, are divided
    head_norm  works on the heads that a column-parallel module left here (batch, seq, heads, head_dim)
    row        its input features, so its weight's columns, are divided; its output is a share of the sequence again
    """


LLAMA = ModelLayout(
    embedding="model.embed_tokens",
    embedding_dropout="model.dropout",
    blocks="model.layers",
    norm="model.norm",
    head="lm_head",
    attention="self_attn",
    tensor={
        "input_layernorm": "norm",
        "self_attn": "gather",
        "self_attn.q_proj": "column",
        "self_attn.k_proj": "column",
        "self_attn.v_proj": "column",
        "self_attn.q_norm": "head_norm",
        "self_attn.k_norm": "head_norm",
        "self_attn.o_proj": "row",
        "post_attention_layernorm": "add_norm",
        "mlp": "gather",
        "mlp.gate_proj": "column",
        "mlp.up_proj": "column",
        "mlp.down_proj": "row",
    },
)
