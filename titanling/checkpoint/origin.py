"""What a model brought along from where it was made, carried from checkpoint to checkpoint up to each export.

Under "origin" a state.json has, of a Hugging Face directory, its config.json and generation_config.json whole. Imports
no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from titanling.checkpoint.borrowed import own_file
from titanling.checkpoint.hf_json import CONFIG, GENERATION, MOST_CONFIG, read_hf_json
from titanling.errors import UserError
from titanling.model.hf import from_hf_config, to_hf_config
from titanling.model.presets import LlamaShape

Origin = Mapping[str, Any]


def hf_origin(folder: Path, shape: LlamaShape) -> dict[str, Any]:
    """The origin of a Hugging Face directory's model. Raises UserError for files that cannot be read."""
    kind = "Qwen3ForCausalLM" if shape.qk_norm else "LlamaForCausalLM"
    found: dict[str, Any] = {"from": f"Hugging Face ({kind})", "config": read_hf_json(folder / CONFIG, MOST_CONFIG)}
    if own_file(folder / GENERATION) is not None:
        found["generation_config"] = read_hf_json(folder / GENERATION, MOST_CONFIG)
    positions = found["config"].get("max_position_embeddings")
    if isinstance(positions, int) and positions > 0:
        found["max_positions"] = positions
    return found


def origin_of(state: Mapping[str, Any]) -> Origin | None:
    """The origin that a state has; of one that was converted before there were any, what it says of it all the same."""
    if "converted_from" in state and "origin" not in state:
        return {"from": state["converted_from"], "max_positions": state["config"]["training"]["seq_len"]}
    origin = state.get("origin")
    return origin if isinstance(origin, Mapping) else None


def eos_ids(origin: Origin | None) -> list[int]:
    """All ids that end a text by the origin's own word."""
    parts = [(origin or {}).get(name) for name in ("generation_config", "config")]
    found = [token for part in parts if isinstance(part, Mapping) for token in _listed(part.get("eos_token_id"))]
    return list(dict.fromkeys(found))


def exported_configs(
    shape: LlamaShape,
    dtype: str,
    longest: int,
    origin: Origin | None,
    bos_id: int | None,
    tokenizer_bos: int | None,
    stop_ids: Sequence[int],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and generation_config.json: the origin's, but for what is no longer so; without one, ours.

    `longest`: of all sequences trained on; `bos_id`: what training text began with, if anything. Raises UserError for
    an origin that is no model of ours.
    """
    origin = origin or {}
    positions = max(longest, origin.get("max_positions", 0))
    begin = tokenizer_bos if bos_id is None else bos_id
    ends = list(dict.fromkeys(stop_ids))
    ours = to_hf_config(shape, positions, dtype, begin, ends if len(ends) > 1 else ends[0])
    theirs = origin.get("config")
    if not isinstance(theirs, Mapping):
        return ours, {key: ours[key] for key in ("bos_token_id", "eos_token_id")}
    config = _merged(theirs, ours, shape)
    config["max_position_embeddings"] = positions
    for key in [key for key in ("dtype", "torch_dtype") if key in theirs] or ["torch_dtype"]:
        config[key] = dtype
    _set_ends(config, bos_id, tokenizer_bos, ends)
    generation = dict(origin.get("generation_config") or {})
    if "pad_token_id" in config:
        generation.setdefault("pad_token_id", config["pad_token_id"])
    for key in ("bos_token_id", "eos_token_id"):
        generation.setdefault(key, config[key])
    _set_ends(generation, bos_id, tokenizer_bos, ends)
    return config, generation


def _merged(theirs: Mapping[str, Any], ours: Mapping[str, Any], shape: LlamaShape) -> dict[str, Any]:
    """Their config, if it describes our model; else ours, with what it says beside that."""
    try:
        described = from_hf_config(theirs)
    except (TypeError, ValueError, OverflowError, LookupError, UserError) as error:
        raise UserError(f"state.json: origin.config: {error}; this checkpoint was not written by titanling") from None
    if described == replace(shape, dropout=described.dropout):
        return {**theirs, "architectures": ours["architectures"]}
    rest = {key: value for key, value in theirs.items() if key not in ("rope_parameters", "layer_types")}
    return rest | dict(ours)


def _set_ends(config: dict[str, Any], bos_id: int | None, tokenizer_bos: int | None, stop_ids: Sequence[int]) -> None:
    """What training has taught; what it has not touched stays."""
    known = _listed(config.get("eos_token_id"))
    if stop_ids[0] not in known:
        config["eos_token_id"] = [stop_ids[0], *known] if known else stop_ids[0]
    if bos_id is not None:
        config["bos_token_id"] = bos_id
    config.setdefault("bos_token_id", tokenizer_bos)


def _listed(ids: Any) -> list[int]:
    found = ids if isinstance(ids, list) else [ids]
    return [token for token in found if isinstance(token, int) and not isinstance(token, bool)]
