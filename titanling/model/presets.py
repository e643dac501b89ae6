"""Named model sizes, and what a [model] table makes of them. Imports no torch: sizes are checked before it loads."""

import difflib
from dataclasses import dataclass, replace

from titanling.config.schema import Model
from titanling.errors import UserError


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3.1 frequency scaling (Llama 3 herd of models, section 3.4.2; field names as in Hugging Face)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class LlamaShape:
    """Everything that determines the model's parameters and arithmetic."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    vocab_size: int
    head_dim: int = 0  # 0: dim / n_heads
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qk_norm: bool = False
    dropout: float = 0.0

    @property
    def embedding_params(self) -> int:
        """Parameters of the embedding matrix."""
        return self.vocab_size * self.dim

    @property
    def matmul_params(self) -> int:
        """Parameters of the matrices inside the blocks: without embeddings, output matrix and norms."""
        attention = 2 * self.dim * self.head_dim * (self.n_heads + self.n_kv_heads)
        return self.n_layers * (attention + 3 * self.dim * self.ffn_dim)

    @property
    def non_embedding_params(self) -> int:
        """All parameters but the embedding and the output matrix."""
        norms = 2 * self.dim + (2 * self.head_dim if self.qk_norm else 0)
        return self.matmul_params + self.n_layers * norms + self.dim

    @property
    def total_params(self) -> int:
        """All parameters; a tied embedding counts once."""
        return self.non_embedding_params + self.embedding_params * (1 if self.tie_embeddings else 2)


def _minilingua(n_layers: int, dim: int, ffn_dim: int, n_heads: int, n_kv_heads: int) -> LlamaShape:
    return LlamaShape(dim, n_layers, n_heads, n_kv_heads, ffn_dim, vocab_size=128_000, tie_embeddings=True)


def _llammlein(n_layers: int, dim: int, ffn_dim: int, n_heads: int, n_kv_heads: int) -> LlamaShape:
    return LlamaShape(dim, n_layers, n_heads, n_kv_heads, ffn_dim, vocab_size=32_064)


def _llama3(
    n_layers: int, dim: int, ffn_dim: int, n_heads: int, head_dim: int, factor: float, tied: bool
) -> LlamaShape:
    return LlamaShape(
        dim,
        n_layers,
        n_heads,
        n_kv_heads=8,
        ffn_dim=ffn_dim,
        vocab_size=128_256,
        head_dim=head_dim,
        rope_theta=500_000.0,
        rope_scaling=RopeScaling(factor),
        tie_embeddings=tied,
    )


PRESETS: dict[str, LlamaShape] = {
    # torchtitan's debugmodel
    "debugmodel": LlamaShape(256, 6, 16, 16, 768, 2048, rope_theta=500_000.0),
    # Llama 3.2 (1B, 3B) and 3.1 (8B, 70B, 405B), as published
    "1B": _llama3(16, 2048, 8192, 32, 64, factor=32.0, tied=True),
    "3B": _llama3(28, 3072, 8192, 24, 128, factor=32.0, tied=True),
    "8B": _llama3(32, 4096, 14336, 32, 128, factor=8.0, tied=False),
    "70B": _llama3(80, 8192, 28672, 64, 128, factor=8.0, tied=False),
    "405B": _llama3(126, 16384, 53248, 128, 128, factor=8.0, tied=False),
    # MiniLingua: 13 European languages and code
    "minilingua_30m": _minilingua(12, 384, 1536, 6, 3),
    "minilingua_60m": _minilingua(16, 512, 2048, 8, 4),
    "minilingua_100m": _minilingua(18, 640, 2560, 10, 5),
    "minilingua_1b": _minilingua(32, 1536, 6144, 24, 8),
    # A dense 180M model with QK-norm
    "dense_180m": LlamaShape(768, 32, 12, 4, 2048, 32_768, tie_embeddings=True, qk_norm=True),
    # LLäMmlein: German
    "llammlein_120m": _llammlein(12, 768, 2048, 12, 4),
    "llammlein_1b": _llammlein(22, 2048, 5632, 32, 4),
    "llammlein_7b": _llammlein(32, 4096, 11008, 32, 32),
    "custom_300m": LlamaShape(1024, 24, 16, 16, 4096, 50_257, tie_embeddings=True, dropout=0.1),
}

SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size")
OPTIONS = ("rope_theta", "norm_eps", "tie_embeddings", "qk_norm", "dropout")


def resolve_shape(model: Model) -> LlamaShape:
    """The shape that a [model] table describes: its preset with the sizes set beside it.

    `8B`, `8b` and `llama3_8b` name the same preset. Raises UserError for an unknown preset (naming the nearest) and
    for sizes that do not fit together.
    """
    known = {name.lower(): shape for name, shape in PRESETS.items()}
    wanted = model.flavor.lower()
    shape = known.get(wanted) or known.get(wanted.removeprefix("llama3_"))
    if shape is None:
        match = difflib.get_close_matches(wanted, known, n=1, cutoff=0.3)
        nearest = next((name for name in PRESETS if match and name.lower() == match[0]), None)
        hint = f"did you mean {nearest}?" if nearest else f"known: {', '.join(PRESETS)}"
        raise UserError(f'model.flavor = "{model.flavor}": no such preset; {hint}')
    changes = {key: getattr(model, key) for key in SIZES + OPTIONS if getattr(model, key) is not None}
    shape = replace(shape, **changes)
    if not shape.head_dim or ("head_dim" not in changes and {"dim", "n_heads"} & changes.keys()):
        if shape.dim % shape.n_heads:
            raise UserError(
                f"model.dim = {shape.dim} is not a multiple of model.n_heads = {shape.n_heads}; set model.head_dim"
            )
        shape = replace(shape, head_dim=shape.dim // shape.n_heads)
    multiple = model.make_vocab_size_divisible_by
    shape = replace(shape, vocab_size=-(-shape.vocab_size // multiple) * multiple)
    _check(shape)
    return shape


def _check(shape: LlamaShape) -> None:
    if shape.n_heads % shape.n_kv_heads:
        raise UserError(
            f"model.n_heads = {shape.n_heads} is not a multiple of model.n_kv_heads = {shape.n_kv_heads};"
            " each key/value head must serve the same number of query heads"
        )
    if shape.head_dim % 2:
        raise UserError(f"model.head_dim = {shape.head_dim} is odd; RoPE rotates pairs, so it must be even")
