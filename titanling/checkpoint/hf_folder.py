"""A Hugging Face model directory, read as it is: JSON and safetensors only, and no file outside of it."""

import json
from pathlib import Path
from typing import Any

from titanling.checkpoint.folder import renames
from titanling.checkpoint.names import check_tensors
from titanling.checkpoint.shards import Shards
from titanling.checkpoint.stream import equal
from titanling.errors import UserError
from titanling.model.hf import from_hf_config
from titanling.model.presets import LlamaShape

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def open_hf_folder(folder: Path) -> tuple[LlamaShape, Shards]:
    """The shape and the tensors of the Llama or dense Qwen3 model in a directory.

    Raises UserError, naming file, field or tensor, if it is damaged, names files outside of itself, has no weights in
    safetensors, or holds a model that ours cannot represent or other tensors than the model's.
    """
    config = read_hf_json(folder / CONFIG)
    try:
        shape = from_hf_config(config)
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None
    except (TypeError, ValueError, OverflowError) as error:  # a list for a name, a number beyond all bounds
        raise UserError(f"{folder / CONFIG}: does not describe a model: {error}") from None
    shards = Shards(folder, _weight_files(folder))
    # Llama's first releases keep the angles of RoPE too, which the config determines.
    ignore = [name for name in shards.names() if name.endswith(".self_attn.rotary_emb.inv_freq")]
    tied_head = shape.tie_embeddings and HEAD in shards.names()
    check_tensors(shards, shape, folder, [*ignore, HEAD] if tied_head else ignore)
    if tied_head and not (shards.shape(HEAD) == shards.shape(EMBEDDING) and equal(shards, HEAD, EMBEDDING)):
        raise UserError(f"{folder}: {HEAD} differs from the embedding, but {CONFIG} says tie_word_embeddings = true")
    return shape, shards


def read_hf_json(path: Path) -> dict[str, Any]:
    """Read one of the directory's JSON objects. Raises UserError if it is missing, a link, or malformed."""
    _refuse_link(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a Hugging Face model directory has one") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return value


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / WEIGHTS, folder / INDEX
    if single.exists() or single.is_symlink():
        _refuse_link(single)
        return [single]
    if index.exists():
        return _indexed_files(folder, index)
    pickled = next((path.name for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".pt", ".pth")), None)
    if pickled is not None:
        raise UserError(
            f"{folder / pickled}: pickled weights can run any program and are never read; have whoever you trust with"
            " that save them as safetensors (save_pretrained does)"
        )
    raise UserError(f"{folder}: has neither {WEIGHTS} nor {INDEX}; where are its weights?")


def _indexed_files(folder: Path, index: Path) -> list[Path]:
    """The files that an index names, if each holds just the tensors that the index places there."""
    places = read_hf_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()) or not places:
        raise UserError(f"{index}: weight_map must give the file of each tensor")
    for name in sorted(set(places.values())):
        if Path(name).name != name or "\\" in name or "\0" in name or name == "..":
            raise UserError(f"{index}: names {name!r}, which is not a file beside it; do not trust this directory")
        if not name.endswith(".safetensors"):
            raise UserError(f"{index}: names {name!r}; weights are read from .safetensors only")
        _refuse_link(folder / name)
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: no such file, but {INDEX} names it")
        wanted, found = {tensor for tensor, file in places.items() if file == name}, Shards(folder, [folder / name])
        stray = next(iter(sorted(wanted ^ set(found.names()))), None)
        if stray is not None:
            verb = "holds no" if stray in wanted else "holds a"
            raise UserError(f"{folder / name}: {verb} tensor {stray}, other than {INDEX} says")
    return [folder / name for name in sorted(set(places.values()))]


def _refuse_link(path: Path) -> None:
    if renames(path) and path.is_symlink():
        raise UserError(f"{path}: is a link, which is not followed; copy the directory with cp -rL and give the copy")
    if renames(path) and path.exists() and not path.is_file():  # a pipe would keep its reader waiting for ever
        raise UserError(f"{path}: is no regular file")
