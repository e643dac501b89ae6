"""From a Hugging Face directory, or a Megatron checkpoint's tensors, to a checkpoint to start a run from. Streamed."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from titanling.checkpoint import folder
from titanling.checkpoint.foreign import what_it_is
from titanling.checkpoint.hf_folder import open_hf_folder
from titanling.checkpoint.hf_json import CONFIG
from titanling.checkpoint.megatron import open_megatron
from titanling.checkpoint.names import tensor_shapes
from titanling.checkpoint.origin import Origin, hf_origin
from titanling.checkpoint.shards import SHARDING
from titanling.checkpoint.stream import Source, Target, plan_files, sizes_of, write_target
from titanling.checkpoint.tokenizer_files import tokenizer_names
from titanling.config.schema import Config
from titanling.errors import UserError
from titanling.model.presets import OPTIONS, PRESETS, SIZES, LlamaShape
from titanling.owner import held

FILE_BYTES = 4 * 10**9
"""Bytes of a weight file at most: each rank that loads the checkpoint verifies some of them."""


class Imported(NamedTuple):
    """A checkpoint that was made, and how to make a run of it."""

    path: Path
    shape: LlamaShape
    model_table: dict[str, Any] | None
    """The [model] table of a config for this model; None if no config can name its RoPE scaling."""
    tokenizer: Path | None = None
    """Directory of its tokenizer."""


def import_hf(directory: Path, output: Path) -> Imported:
    """Make `output`/step-000000 of a Hugging Face directory of a Llama or dense Qwen3 model, weights as they are.

    Raises UserError if the directory cannot be read as one, if its model cannot be represented, if there is such a
    checkpoint already, or if it cannot be written.
    """
    whole = (directory / CONFIG).exists() and not (directory / "lit_model.pth").exists()  # LitGPT keeps a config.json
    if directory.exists() and not whole and (what := what_it_is(directory)):
        raise UserError(f"{directory}: is no Hugging Face directory: it {what}")
    shape, shards = open_hf_folder(directory)
    origin = hf_origin(directory, shape)
    tokenizer = directory if "tokenizer.json" in tokenizer_names(directory) else None
    seq_len = origin.get("max_positions", 2048)
    with held("--output", output):
        return _write(shards, shape, output, _config(shape, shards, seq_len, tokenizer), origin)


def import_megatron(
    directory: Path,
    output: Path,
    shape: LlamaShape,
    vocab_size: int | None = None,
    tokenizer: Path | None = None,
    seq_len: int = 2048,
) -> Imported:
    """Make `output`/step-000000 of the tensors of a Megatron-core Llama checkpoint, saved as .safetensors files.

    With `vocab_size`, the rows that pad the vocabulary beyond it are cut. Raises UserError as `import_hf` does, and
    naming the first tensor that is missing, has no place in the model, or is of another shape than `shape` demands.
    """
    shape, source = open_megatron(directory, shape, vocab_size)
    origin = {"from": "Megatron-core", "max_positions": seq_len}
    with held("--output", output):
        return _write(source, shape, output, _config(shape, source, seq_len, tokenizer), origin)


def _config(shape: LlamaShape, source: Source, seq_len: int, tokenizer: Path | None) -> dict[str, Any]:
    """A whole config that says of the model what is known, for `state.json`."""
    model = _model_table(shape) or {key: getattr(shape, key) for key in SIZES + OPTIONS}
    if tokenizer is not None:
        model["hf_assets_path"] = str(tokenizer.resolve())
    half = source.dtype("model.embed_tokens.weight") == torch.bfloat16
    training = {"seq_len": seq_len, "dtype": "bfloat16" if half else "float32"}
    return Config.model_validate({"model": model, "training": training}).model_dump(mode="json")


def _model_table(shape: LlamaShape) -> dict[str, Any] | None:
    """The shortest [model] table that makes this shape; None if no preset has its RoPE scaling."""
    tables = []
    for flavor, preset in PRESETS.items():
        if preset.rope_scaling == shape.rope_scaling:
            keys = [key for key in SIZES + OPTIONS if getattr(shape, key) != getattr(preset, key)]
            tables.append({"flavor": flavor, **{key: getattr(shape, key) for key in keys}})
    return min(tables, key=len, default=None)


def _write(source: Source, shape: LlamaShape, output: Path, config: dict[str, Any], origin: Origin) -> Imported:
    final = folder.step_folder(output, 0)
    if final.exists():
        raise UserError(f"{final}: exists already; give another --output or remove it")
    dtypes = {name: source.dtype(name) for name in sorted(tensor_shapes(shape))}
    sizes = sizes_of(source, dtypes)
    working = folder.working_folder(final)
    try:
        if folder.renames(final):
            folder.discard(working)  # of an import that was cut short
        folder.begin(final)
        _check_space(working, sum(sizes.values()))
        files: dict[str, dict[str, Any]] = {}
        (working / "model").mkdir()
        plan = plan_files(sizes, FILE_BYTES)
        for number, names in enumerate(plan, 1):
            name = f"model/shard-{number:05d}-of-{len(plan):05d}.safetensors"
            whole = {tensor: {"saved_offsets": [0] * len(source.shape(tensor))} for tensor in names}
            metadata = {SHARDING: json.dumps(whole), "DCP_VERSION": "1.0"}
            written = write_target(Target(working / name, {t: dtypes[t] for t in names}, metadata), source, hashed=True)
            assert written is not None
            files[name] = written._asdict()
        folder.write_json(working / folder.STATE, _state(shape, config, origin))
        folder.sync(working / folder.STATE)
        files[folder.STATE] = folder.digest(working / folder.STATE)
        folder.commit(final, files)
    except FileExistsError as error:
        raise UserError(f"{error.filename}: is in the way ({error.strerror}); move it away") from None
    except OSError as error:
        raise UserError(
            f"{output}: cannot be written: {error.strerror or error}; free some space or choose another --output"
        ) from None
    finally:
        if folder.renames(final):
            folder.discard(working)
    tokenizer = config["model"]["hf_assets_path"]
    return Imported(final, shape, _model_table(shape), None if tokenizer is None else Path(tokenizer))


def _check_space(working: Path, needed: int) -> None:
    free = shutil.disk_usage(working).free
    if needed > free:
        raise UserError(f"{working.parent}: needs {needed:,} bytes and the disk has {free:,} free; free some space")


def _state(shape: LlamaShape, config: Mapping[str, Any], origin: Origin) -> dict[str, Any]:
    return {
        "format": 1,
        "step": 0,
        "tokens_seen": 0,
        "model_only": True,
        "converted_from": origin["from"],
        "origin": origin,
        "model": asdict(shape),
        "config": config,
    }
