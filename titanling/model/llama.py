"""The Llama-3 decoder on one device. It knows nothing of parallelism or training.

It computes in the type of the embedding's output; weights held in another type are cast where they are used.

Modules are named as in Hugging Face's LlamaForCausalLM (Qwen3ForCausalLM with QK-norm), so the state dict is theirs.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titanling.model.documents import DocumentMask, attend_documents, document_mask
from titanling.model.layout import LLAMA
from titanling.model.presets import LlamaShape


def rope_frequencies(shape: LlamaShape, device: torch.device | None = None) -> Tensor:
    """Angles per position, (head_dim / 2,) float32: theta^(-2i / head_dim) (RoFormer, eq. 15).

    With `rope_scaling`, wavelengths longer than the original context are stretched by `factor` and those in between
    interpolated, as Llama 3.1 does.
    """
    index = torch.arange(0, shape.head_dim, 2, dtype=torch.float32, device=device)
    frequencies = 1.0 / (shape.rope_theta ** (index / shape.head_dim))
    scaling = shape.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    # 0 for wavelengths that do not fit the original context, 1 for those that fit it often.
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def rope_angles(shape: LlamaShape, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, each (..., seq, 1, head_dim / 2) float32, for positions (..., seq)."""
    angles = positions.float()[..., None, None] * rope_frequencies(shape, positions.device)
    return angles.cos(), angles.sin()


# What a plan may exchange for faster kernels; modules hold these as attributes of the same names.


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight over the last dimension, with statistics in float32: (..., dim) and (dim,) of one type."""
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm` of x + residual, and that sum: (..., dim) each."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up of two tensors of one shape."""
    return F.silu(gate) * up


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate q (batch, seq, heads, head_dim) and k (batch, seq, kv_heads, head_dim) by the angles of their places."""
    return apply_rope(q, cos, sin), apply_rope(k, cos, sin)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (batch, seq, heads, head_dim): element i of the first half pairs with element i of the second."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).type_as(x)


HeadLoss = Callable[[Tensor, Tensor], Tensor]
"""A loss of hidden states (batch, seq, dim) and the output matrix (vocab, dim), which computes no logits, or few."""


class LayerCache:
    """Keys and values of one layer for the positions seen so far: (batch, kv_heads, capacity, head_dim) each."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.keys = self.values = torch.empty(0)

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (batch, kv_heads, new, head_dim) behind those so far; return all of them."""
        if self.length == 0:
            size = (*keys.shape[:2], self.capacity, keys.size(3))
            self.keys, self.values = keys.new_empty(size), values.new_empty(size)
        start, self.length = self.length, self.length + keys.size(2)
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension, with statistics in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.rms_norm = rms_norm

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) → (..., dim), in x's dtype."""
        return self.rms_norm(x, self.weight.to(x.dtype), self.eps)


class AddRMSNorm(nn.Module):
    """RMSNorm of a sum, which is the residual stream: where a branch ends, the next one begins with its norm."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.add_rms_norm = add_rms_norm

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and the sum: (..., dim) each, in x's dtype."""
        return self.add_rms_norm(x, residual, self.weight.to(x.dtype), self.eps)


class Linear(nn.Linear):
    """x · weightᵀ, computed in x's type, whatever type the weight is held in."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features)."""
        return F.linear(x, self.weight.to(x.dtype))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: DocumentMask | None = None) -> Tensor:
    """Causal attention of q (batch, heads, seq, head_dim) over k and v (batch, kv_heads, seq, head_dim).

    With a mask, within documents. A single query, the newest token, sees all keys.
    """
    if mask is not None:
        return attend_documents(q, k, v, mask)
    # Not the comparison itself: compiled for sequences of any length, it is a SymBool, which the function refuses.
    causal = True if q.size(2) > 1 else False
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.size(1) != k.size(1))


class Attention(nn.Module):
    """Causal grouped-query attention with RoPE."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        q_dim, kv_dim = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
        self.q_proj = Linear(shape.dim, q_dim)
        self.k_proj = Linear(shape.dim, kv_dim)
        self.v_proj = Linear(shape.dim, kv_dim)
        self.o_proj = Linear(q_dim, shape.dim)
        self.q_norm = RMSNorm(shape.head_dim, shape.norm_eps) if shape.qk_norm else None
        self.k_norm = RMSNorm(shape.head_dim, shape.norm_eps) if shape.qk_norm else None
        self.rope = rope
        self.attend = attend

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None = None, mask: DocumentMask | None = None
    ) -> Tensor:
        """(batch, seq, dim) → (batch, seq, dim)."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (proj(x).view(heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.rope(q, k, cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (batch, heads, seq, head_dim)
        if cache is not None:
            k, v = cache.extend(k, v)
        return self.o_proj(self.attend(q, k, v, mask).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)) (Shazeer 2020)."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_proj = Linear(dim, ffn_dim)
        self.up_proj = Linear(dim, ffn_dim)
        self.down_proj = Linear(ffn_dim, dim)
        self.swiglu = swiglu

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) → (..., dim)."""
        return self.down_proj(self.swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = MLP(shape.dim, shape.ffn_dim)
        self.input_layernorm = RMSNorm(shape.dim, shape.norm_eps)
        self.post_attention_layernorm = AddRMSNorm(shape.dim, shape.norm_eps)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None = None, mask: DocumentMask | None = None
    ) -> Tensor:
        """(batch, seq, dim) → (batch, seq, dim)."""
        attended = self.dropout(self.self_attn(self.input_layernorm(x), cos, sin, cache, mask))
        normed, x = self.post_attention_layernorm(attended, x)
        return x + self.dropout(self.mlp(normed))


class Decoder(nn.Module):
    """Embedding, blocks and final norm: token ids to hidden states."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.dim)
        # By name, so that a pipeline stage that holds only some of them keeps their names.
        self.layers = nn.ModuleDict({str(index): Block(shape) for index in range(shape.n_layers)})
        self.norm = RMSNorm(shape.dim, shape.norm_eps)
        self.dropout = nn.Dropout(shape.dropout)
        self.document_mask = document_mask

    def forward(
        self, input_ids: Tensor, positions: Tensor | None = None, cache: list[LayerCache] | None = None
    ) -> Tensor:
        """(batch, seq) token ids → (batch, seq, dim)."""
        start = cache[0].length if cache else 0
        if start and input_ids.size(1) > 1:
            raise ValueError("a cache is filled with the whole prompt at once, then extended by one token at a time")
        if positions is None:
            positions = torch.arange(start, start + input_ids.size(1), device=input_ids.device)
        mask = self.document_mask(positions) if positions.ndim == 2 else None
        cos, sin = rope_angles(self.shape, positions)
        x = self.dropout(self.embed_tokens(input_ids))
        for index, block in self.layers.items():
            x = block(x, cos, sin, cache[int(index)] if cache else None, mask)
        return self.norm(x)


class Llama(nn.Module):
    """The causal language model."""

    layout = LLAMA

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape)
        # Tied: the embedding itself is the output matrix, so there is no second parameter to keep equal.
        self.lm_head = None if shape.tie_embeddings else Linear(shape.dim, shape.vocab_size)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        cache: list[LayerCache] | None = None,
        loss: HeadLoss | None = None,
    ) -> Tensor:
        """Logits (batch, seq, vocab) for input_ids (batch, seq) int64; or what `loss` makes of the hidden states.

        positions (seq,) int64 are the tokens' places in their text, which is one; in order from 0 if not given. As
        (batch, seq), they are places in documents: attention stays within each, and a document begins where they are 0.
        With a cache, input_ids continue what it has seen: first the whole prompt, then one token at a time.
        """
        hidden = self.model(input_ids, positions, cache)
        if loss is not None:
            # Called in here, where plans see to it that the matrix is whole.
            return loss(hidden, self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight)
        return self.lm_head(hidden) if self.lm_head is not None else self._tied_head(hidden)

    def _tied_head(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model.embed_tokens.weight.to(hidden.dtype))


def build_on_meta(shape: LlamaShape, dtype: torch.dtype) -> Llama:
    """The model without memory: parameters on the meta device, to be laid out and then initialised or loaded."""
    with torch.device("meta"):
        return Llama(shape).to(dtype)
