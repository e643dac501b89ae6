"""What is in one checkpoint. Imports torch only to list its tensors."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from titanling.checkpoint import folder, remote
from titanling.checkpoint.inventory import saved_at, saved_by
from titanling.checkpoint.state import read_state
from titanling.checkpoint.text import columns, counted, moment, size
from titanling.errors import UserError
from titanling.model.presets import LlamaShape


def inspect(name: str, tensors: bool = False) -> str:
    """Several lines: the model, how far it was trained, with what; with `tensors`, a table of them.

    Raises UserError if it is no checkpoint, or manifest or state are damaged.
    """
    path = remote.open_path(name)
    manifest = folder.read_manifest(path)
    state = read_state(path, manifest)
    try:
        rows = _facts(path, manifest, state)
    except (LookupError, ArithmeticError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path / folder.STATE}: lacks {error}; it was not written by this version") from None
    lines = [str(path), *columns(rows)]
    if tensors:
        lines += ["", *columns(_table(path), right=(4,))]
    return "\n".join(lines)


def _facts(path: Path, manifest: dict[str, Any], state: dict[str, Any]) -> list[tuple[str, str]]:
    config, origin = state["config"], state.get("converted_from")
    training = config["training"]
    when = moment(saved_at(path))
    total = size(sum(file["bytes"] for file in manifest.values()))
    ranks = saved_by(manifest)
    known = {each.name for each in fields(LlamaShape)} - {"rope_scaling"}
    shape = LlamaShape(**{key: value for key, value in state["model"].items() if key in known})
    facts = {
        "saved": f"{when}, by {counted(ranks or 1, 'rank')}, {counted(len(manifest), 'file')}, {total}",
        "holds": "weights only" if state.get("model_only") else "weights, optimizer, place in the data",
        "model": _shape_words(shape),
        "parameters": f"{shape.total_params:,}, {shape.non_embedding_params:,} non-embedding",
        "weights kept in": training["dtype"],
        "tokenizer": str(config["model"]["hf_assets_path"] or "none"),
    }
    facts |= {"converted from": str(origin)} if origin is not None else _run_facts(state)
    return list(facts.items())


def _run_facts(state: dict[str, Any]) -> dict[str, str]:
    """What only training gives: converted weights have none of it."""
    config, best, data = state["config"], state["best"], state["data"]
    training, optimizer, sequences = config["training"], config["optimizer"], config["training"]["global_batch_size"]
    return {
        "step": f"{state['step']:,} of {training['steps']:,}; {state['tokens_seen']:,} tokens seen,"
        f" {counted(int(state['skipped_steps']), 'step')} skipped",
        "best": f"validation loss {best['val_loss']:.4f} at step {best['step']:,}" if best else "not validated",
        "optimizer": f"{optimizer['name']}, lr {optimizer['lr']:g}, weight decay {optimizer['weight_decay']:g}",
        "batch": f"{sequences if sequences > 0 else 'local'} × {training['seq_len']} tokens",
        "computed in": state.get("computed_in") or f"{training['mixed_precision_param']}, where the device can",
        "layout": _layout_words(config["parallelism"]),
        "data": "; ".join(f"{name}, {_files_words(files)}" for name, files in data["sources"].items())
        + f"; seed {data['seed']}",
    }


def _files_words(files: dict[str, Any]) -> str:
    if "bin_sha256" in files:
        return f".bin SHA-256 {files['bin_sha256'][:12]}…"
    kind = "" if files["kind"] == "files" else f"{files['kind']} "
    return f"{counted(files['files'], f'{kind}file')}, streamed"


def _shape_words(shape: LlamaShape) -> str:
    words = [
        f"dim {shape.dim}, {counted(shape.n_layers, 'layer')}, {shape.n_heads} heads of {shape.head_dim}"
        f" ({shape.n_kv_heads} key/value), ffn {shape.ffn_dim}, vocabulary {shape.vocab_size:,}",
        "tied embeddings" if shape.tie_embeddings else "",
        "QK-norm" if shape.qk_norm else "",
        f"dropout {shape.dropout:g}" if shape.dropout else "",
    ]
    return ", ".join(filter(None, words))


def _layout_words(parallelism: dict[str, Any]) -> str:
    """Degrees that were set; any other layout can load it too."""
    short = {
        "data_parallel_replicate_degree": "replicas",
        "data_parallel_shard_degree": "shards",
        "tensor_parallel_degree": "tensor",
        "context_parallel_degree": "context",
        "pipeline_parallel_degree": "pipeline",
    }
    found = [f"{word} {parallelism[key]}" for key, word in short.items() if parallelism[key] > 1]
    return ", ".join(found) or "data parallel alone, over all ranks"


def _table(path: Path) -> list[tuple[str, ...]]:
    from titanling.checkpoint.shards import NAMES, Shards  # torch takes seconds to import: only for this table

    rows = [("tensor", "part", "type", "shape", "bytes", "divided")]
    for part in folder.PARTS:
        shards = Shards(path / part)
        for name in shards.names():
            shape, dtype, places = shards.shape(name), shards.dtype(name), shards.places(name)
            count = dtype.itemsize
            for length in shape:
                count *= length
            rows.append((name, part, NAMES[dtype], " × ".join(map(str, shape)) or "-", f"{count:,}", _divided(places)))
    return rows


def _divided(places: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> str:
    """How a tensor's pieces lie: along which dimensions, and how long they are there."""
    if len(places) == 1:
        return "whole"
    along = [dim for dim in range(len(places[0][0])) if len({offsets[dim] for offsets, _ in places}) > 1]
    if len(along) != 1:
        return f"{len(places)} blocks over dimensions {', '.join(map(str, along))}"
    lengths = [shape[along[0]] for _, shape in sorted(places)]
    alike = len(set(lengths)) == 1
    return f"dimension {along[0]}: " + (f"{len(lengths)} × {lengths[0]}" if alike else " + ".join(map(str, lengths)))
