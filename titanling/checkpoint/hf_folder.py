"""A Hugging Face model directory, read as it is: JSON and safetensors only, and no file outside of it."""

from pathlib import Path

from titanling.checkpoint.borrowed import own_file
from titanling.checkpoint.hf_json import CONFIG, MOST_CONFIG, MOST_JSON, read_hf_json
from titanling.checkpoint.names import check_tensors
from titanling.checkpoint.shards import Shards
from titanling.checkpoint.stream import equal
from titanling.errors import UserError
from titanling.model.hf import from_hf_config
from titanling.model.presets import LlamaShape

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def open_hf_folder(folder: Path) -> tuple[LlamaShape, Shards]:
    """The shape and the tensors of the Llama or dense Qwen3 model in a directory.

    Raises UserError, naming file, field or tensor, if it is damaged, names files outside of itself, has no weights in
    safetensors, or holds a model that ours cannot represent or other tensors than the model's.
    """
    config = read_hf_json(folder / CONFIG, MOST_CONFIG)
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


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / WEIGHTS, folder / INDEX
    if own_file(single) is not None:
        return [single]
    if own_file(index, MOST_JSON) is not None:
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
        if own_file(folder / name) is None:
            raise UserError(f"{folder / name}: no such file, but {INDEX} names it")
        wanted, found = {tensor for tensor, file in places.items() if file == name}, Shards(folder, [folder / name])
        stray = next(iter(sorted(wanted ^ set(found.names()))), None)
        if stray is not None:
            verb = "holds no" if stray in wanted else "holds a"
            raise UserError(f"{folder / name}: {verb} tensor {stray}, other than {INDEX} says")
    return [folder / name for name in sorted(set(places.values()))]
