"""The tensors of a Megatron-core Llama checkpoint as if they were ours: other names, packed and divided matrices.

Megatron keeps q, k and v as one matrix: for each key/value head the rows of its query heads, then its key's, then its
value's. The gate and the up projection are one matrix too, gate first. Under tensor parallelism each rank has some
key/value heads, a share of the gate and of the up rows (gate first on every rank), a share of the columns of the
matrices that write into the residual stream, and a share of the vocabulary. RoPE pairs the halves of a head, as ours.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from titanling.checkpoint.borrowed import own_file
from titanling.checkpoint.names import FLOATS, Shapes, tensor_shapes
from titanling.checkpoint.shards import Shards, as_bytes
from titanling.errors import UserError
from titanling.model.presets import LlamaShape

RANK_FILE = re.compile(r"mp_rank_(\d+)(_\d{3}(?!\d))?")
PREFIX = re.compile(r"^((module|model)\.)+")
# Not weights: what Transformer Engine keeps for float8, and RoPE's angles.
NOT_WEIGHTS = ("._extra_state", "rotary_pos_emb.inv_freq")
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
# Ours → Megatron's, within a layer; norms are fused into the matrix behind them, or modules of their own.
NORMS = {
    "input_layernorm": ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    "post_attention_layernorm": ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
    "self_attn.q_norm": ("self_attention.q_layernorm.weight",),
    "self_attn.k_norm": ("self_attention.k_layernorm.weight",),
}


class Region(NamedTuple):
    """A rectangle of one of our tensors, and where one of Megatron's has it."""

    rank: int
    name: str
    """Megatron's, without prefix."""
    source: tuple[int, ...]
    target: tuple[int, ...]
    size: tuple[int, ...]


class Mosaic:
    """Our tensors, each put together from rectangles of Megatron's; read like `Shards`."""

    def __init__(self, ranks: Sequence["RankTensors"], shapes: Shapes, regions: dict[str, list[Region]]) -> None:
        self._ranks, self._shapes, self._regions = ranks, shapes, regions

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one of our tensors."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Type in which it is stored."""
        region = self._regions[name][0]
        return self._ranks[region.rank].dtype(region.name)

    def read(self, name: str, into: Tensor, offsets: Sequence[int]) -> None:
        """Fill `into` with the rectangle of our tensor that begins at `offsets`."""
        for region in self._regions[name]:
            low = [max(want, at) for want, at in zip(offsets, region.target, strict=True)]
            high = [
                min(want + wanted, at + size)
                for want, wanted, at, size in zip(offsets, into.shape, region.target, region.size, strict=True)
            ]
            if all(begin < end for begin, end in zip(low, high, strict=True)):
                part = into[tuple(slice(b - o, e - o) for b, e, o in zip(low, high, offsets, strict=True))]
                source = [b - t + s for b, t, s in zip(low, region.target, region.source, strict=True)]
                self._ranks[region.rank].read(region.name, part, source)


class RankTensors:
    """The tensors of one tensor-parallel rank, by Megatron's names without prefix."""

    def __init__(self, shards: Shards, where: Path) -> None:
        self.where = where
        self._shards = shards
        self._names: dict[str, str] = {}
        for name in shards.names():
            short = PREFIX.sub("", name)
            if short.endswith(NOT_WEIGHTS):
                continue
            if short in self._names:
                raise UserError(f"{where}: holds {short} twice, as {self._names[short]} and as {name}")
            self._names[short] = name

    def names(self) -> set[str]:
        """Names of all."""
        return set(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of this rank's part."""
        return self._shards.shape(self._names[name])

    def dtype(self, name: str) -> torch.dtype:
        """Type in which it is stored."""
        return self._shards.dtype(self._names[name])

    def read(self, name: str, into: Tensor, offsets: Sequence[int]) -> None:
        """As `Shards.read`."""
        self._shards.read(self._names[name], into, offsets)

    def whole(self, name: str) -> Tensor:
        """As `Shards.whole`."""
        return self._shards.whole(self._names[name])


def open_megatron(directory: Path, shape: LlamaShape, vocab_size: int | None = None) -> tuple[LlamaShape, Mosaic]:
    """The tensors of a Megatron-core checkpoint in .safetensors files, as those of a model of `shape`; that shape.

    Files named mp_rank_00…, mp_rank_01…, … hold those of one tensor-parallel rank each; all others hold whole ones.
    With `vocab_size`, the model has as many tokens, and rows beyond them are left out. Raises UserError, naming file
    and tensor, if one is missing, unknown, or of another shape.
    """
    ranks = _open_ranks(directory)
    shape = replace(shape, vocab_size=vocab_size) if vocab_size is not None else shape
    for key, value in {"n_heads": shape.n_heads, "n_kv_heads": shape.n_kv_heads, "ffn_dim": shape.ffn_dim}.items():
        if value % len(ranks):
            raise UserError(f"{directory}: {key} = {value} cannot have been divided over {len(ranks)} mp_rank files")
    shapes, norms = tensor_shapes(shape), _norm_sources(shape, ranks[0])
    wanted = _source_shapes(shape, ranks, norms, cut=vocab_size is not None)
    for rank in ranks:
        _check(rank, wanted)
    for name in norms.values():
        if any(as_bytes(rank.whole(name)) != as_bytes(ranks[0].whole(name)) for rank in ranks[1:]):
            raise UserError(f"{directory}: {name} is not the same in all mp_rank files; are they of one checkpoint?")
    return shape, Mosaic(ranks, shapes, {name: _regions(name, shape, ranks, norms) for name in shapes})


def _open_ranks(directory: Path) -> list[RankTensors]:
    files = [path for path in sorted(directory.glob("*.safetensors")) if own_file(path) is not None]
    if not files:
        raise UserError(
            f"{directory}: has no .safetensors files; docs/checkpoints.md shows how to make them of a Megatron"
            " checkpoint, whose pickles are never read here"
        )
    ranked: dict[int, list[Path]] = {}
    for path in files:
        found = RANK_FILE.match(path.name)
        if found is None and ranked or found is not None and -1 in ranked:
            raise UserError(f"{path}: is there beside files of mp_rank_…; give a directory with one kind only")
        if found is not None and found[2] not in (None, "_000"):
            raise UserError(f"{path}: is of a later pipeline stage; save the checkpoint without pipeline stages first")
        ranked.setdefault(-1 if found is None else int(found[1]), []).append(path)
    numbers = sorted(ranked)
    if numbers not in ([-1], list(range(len(numbers)))):
        raise UserError(f"{directory}: has mp_rank files of {', '.join(map(str, numbers))}; some are missing")
    return [RankTensors(Shards(directory, ranked[number]), ranked[number][0]) for number in numbers]


def _norm_sources(shape: LlamaShape, rank: RankTensors) -> dict[str, str]:
    """Our name of each norm's weight → Megatron's, of the two that it may have."""
    names = {"model.norm.weight": "decoder.final_layernorm.weight"}
    for layer in range(shape.n_layers):
        for ours, theirs in NORMS.items():
            if shape.qk_norm or not ours.startswith("self_attn"):
                candidates = [f"decoder.layers.{layer}.{their}" for their in theirs]
                there = [name for name in candidates if name in rank.names()]
                if not there:
                    raise UserError(f"{rank.where}: has no tensor {' or '.join(candidates)}")
                names[f"model.layers.{layer}.{ours}.weight"] = there[0]
    return names


def _source_shapes(shape: LlamaShape, ranks: list[RankTensors], norms: dict[str, str], cut: bool) -> Shapes:
    """Megatron's names → the shape of each rank's part."""
    tp, dim, head = len(ranks), shape.dim, shape.head_dim
    shapes: Shapes = {
        name: (head if "q_layernorm" in name or "k_layernorm" in name else dim,) for name in norms.values()
    }
    for layer in range(shape.n_layers):
        at = f"decoder.layers.{layer}."
        shapes[f"{at}self_attention.linear_qkv.weight"] = ((shape.n_heads + 2 * shape.n_kv_heads) * head // tp, dim)
        shapes[f"{at}self_attention.linear_proj.weight"] = (dim, shape.n_heads * head // tp)
        shapes[f"{at}mlp.linear_fc1.weight"] = (2 * shape.ffn_dim // tp, dim)
        shapes[f"{at}mlp.linear_fc2.weight"] = (dim, shape.ffn_dim // tp)
    for name in (EMBEDDING,) if shape.tie_embeddings else (EMBEDDING, HEAD):
        rows = _vocabulary_rows(ranks[0], name) * tp
        if rows < shape.vocab_size or (rows > shape.vocab_size and not cut):
            raise UserError(
                f"{ranks[0].where}: {name} has {rows} rows in all, the model {shape.vocab_size} tokens; give the"
                " number of tokens with --vocab-size, beyond which rows are padding"
            )
        shapes[name] = (rows // tp, dim)
    return shapes


def _vocabulary_rows(rank: RankTensors, name: str) -> int:
    if name not in rank.names():
        raise UserError(f"{rank.where}: has no tensor {name}")
    return (*rank.shape(name), 0)[0]


def _check(rank: RankTensors, wanted: Shapes) -> None:
    missing = next((name for name in wanted if name not in rank.names()), None)
    if missing is not None:
        raise UserError(f"{rank.where}: has no tensor {missing}")
    unknown = next((name for name in sorted(rank.names()) if name not in wanted), None)
    if unknown is not None:
        raise UserError(f"{rank.where}: holds a tensor {unknown}, for which this model has no place")
    for name, size in wanted.items():
        if rank.shape(name) != size:
            raise UserError(
                f"{rank.where}: {name} has the shape {list(rank.shape(name))}, a model of this --flavor or --config"
                f" {list(size)}"
            )
        if rank.dtype(name) not in FLOATS:
            raise UserError(f"{rank.where}: {name} holds {rank.dtype(name)}; only floating-point weights can be read")


def _regions(name: str, shape: LlamaShape, ranks: list[RankTensors], norms: dict[str, str]) -> list[Region]:
    """Where Megatron has one of our tensors."""
    tp, dim, head = len(ranks), shape.dim, shape.head_dim
    if name in norms:
        size = (head if name.endswith(("q_norm.weight", "k_norm.weight")) else dim,)
        return [Region(0, norms[name], (0,), (0,), size)]
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        theirs = HEAD if name == "lm_head.weight" else EMBEDDING
        rows = ranks[0].shape(theirs)[0]
        kept = [min(rows, shape.vocab_size - rank * rows) for rank in range(tp)]
        return [Region(r, theirs, (0, 0), (r * rows, 0), (n, dim)) for r, n in enumerate(kept) if n > 0]
    layer, part = name.removeprefix("model.layers.").split(".", 1)
    at = f"decoder.layers.{layer}."
    if part in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
        attention = part.startswith("self_attn")
        theirs = at + ("self_attention.linear_proj.weight" if attention else "mlp.linear_fc2.weight")
        columns = (shape.n_heads * head if attention else shape.ffn_dim) // tp
        return [Region(rank, theirs, (0, 0), (0, rank * columns), (dim, columns)) for rank in range(tp)]
    if part in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
        rows = shape.ffn_dim // tp
        first = 0 if part == "mlp.gate_proj.weight" else rows
        theirs = f"{at}mlp.linear_fc1.weight"
        return [Region(rank, theirs, (first, 0), (rank * rows, 0), (rows, dim)) for rank in range(tp)]
    # q, k or v: of every key/value head's rows, those of its query heads, its key or its value.
    queries = shape.n_heads // shape.n_kv_heads
    first, heads = {"q": (0, queries), "k": (queries, 1), "v": (queries + 1, 1)}[part[len("self_attn.")]]
    local, theirs = shape.n_kv_heads // tp, f"{at}self_attention.linear_qkv.weight"
    return [
        Region(
            group // local,
            theirs,
            ((group % local * (queries + 2) + first) * head, 0),
            (group * heads * head, 0),
            (heads * head, dim),
        )
        for group in range(shape.n_kv_heads)
    ]
