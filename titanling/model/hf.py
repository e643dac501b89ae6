"""The model's shape as Hugging Face's config.json, both ways. Imports no torch."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from titanling.errors import UserError
from titanling.model.presets import LlamaShape, RopeScaling

LLAMA_3_1_CONTEXT = 131_072
FAMILIES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# What a config.json may say, and what our model does; other values mean other arithmetic. Missing is ours.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "auto_map": (None,),
}


def to_hf_config(
    shape: LlamaShape, max_positions: int, dtype: str, bos_token_id: int | None, eos_token_id: int | list[int] | None
) -> dict[str, Any]:
    """config.json of the model: Llama, or Qwen3 with QK-norm, which is the same arithmetic.

    `max_positions` is the longest sequence trained on; a shape with Llama-3.1 scaling states the context that this
    scaling is published for, if that is longer.
    """
    scaling = shape.rope_scaling
    if scaling is not None:
        max_positions = max(max_positions, LLAMA_3_1_CONTEXT)
    family = "qwen3" if shape.qk_norm else "llama"
    config: dict[str, Any] = {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "hidden_size": shape.dim,
        "intermediate_size": shape.ffn_dim,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": max_positions,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None if scaling is None else {"rope_type": "llama3", **asdict(scaling)},
        "rms_norm_eps": shape.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": shape.tie_embeddings,
        "initializer_range": 0.02,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if shape.qk_norm:
        config |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": shape.n_layers}
    else:
        config |= {"mlp_bias": False, "pretraining_tp": 1}
    return config


def from_hf_config(config: Mapping[str, Any]) -> LlamaShape:
    """The shape that a config.json of Llama or dense Qwen3 describes; the inverse of `to_hf_config`, without dropout.

    Raises UserError naming the field and its value if our model cannot represent it. The caller adds the file's name.
    """
    family = _family(config)
    for key, allowed in FIXED.items():
        value = config.get(key)
        if key in config and value not in allowed:
            raise _refusal(key, value, f"this model has {key} = {allowed[0]!r} only")
    _check_windows(config, family)
    theta, scaling = _rope(config)
    shape = LlamaShape(
        dim=_size(config, "hidden_size"),
        n_layers=_size(config, "num_hidden_layers"),
        n_heads=_size(config, "num_attention_heads"),
        # Qwen3 has defaults of its own for these two, which no config.json leaves out.
        n_kv_heads=_size(config, "num_key_value_heads", config["num_attention_heads"] if family == "llama" else None),
        ffn_dim=_size(config, "intermediate_size"),
        vocab_size=_size(config, "vocab_size"),
        head_dim=_head_dim(config, family),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=_number(config, "rms_norm_eps", 1e-6),
        tie_embeddings=_flag(config, "tie_word_embeddings"),
        qk_norm=family == "qwen3",
    )
    if shape.n_heads % shape.n_kv_heads:
        raise _refusal("num_key_value_heads", shape.n_kv_heads, f"does not divide num_attention_heads {shape.n_heads}")
    return shape


def _family(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    names = named if isinstance(named, list) else [] if named is None else [named]
    stranger = next((name for name in names if name not in FAMILIES.values()), None)
    if stranger is not None:
        raise _refusal("architectures", names, f"only {' and '.join(FAMILIES.values())} can be read")
    family = config.get("model_type")
    if family not in FAMILIES:
        raise _refusal("model_type", family, f"only {' and '.join(FAMILIES)} can be read")
    if names and names != [FAMILIES[family]]:
        raise _refusal("architectures", names, f"does not go with model_type {family!r}")
    return family


def _check_windows(config: Mapping[str, Any], family: str) -> None:
    """Refuse attention over a window where one is in use."""
    why = "this model attends to all earlier positions in every layer"
    kinds = config.get("layer_types") or []
    if any(kind != "full_attention" for kind in kinds):
        raise _refusal("layer_types", kinds, why)
    used, window = config.get("use_sliding_window"), config.get("sliding_window")
    if family == "qwen3" and used and not kinds:  # Qwen3 ignores its window unless it is told to use it
        raise _refusal("use_sliding_window", used, why)
    if family == "llama" and window is not None and used is not False:
        raise _refusal("sliding_window", window, why)


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling from rope_theta and rope_scaling, or from rope_parameters, which transformers 5 writes."""
    spellings = [key for key in ("rope_parameters", "rope_scaling") if config.get(key) is not None]
    if len(spellings) == 2 and config["rope_parameters"] != config["rope_scaling"]:
        raise _refusal("rope_scaling", config["rope_scaling"], "differs from rope_parameters; remove one of them")
    key = spellings[0] if spellings else "rope_scaling"
    found = dict(config[key]) if spellings and isinstance(config[key], Mapping) else {}
    if spellings and not isinstance(config[key], Mapping):
        raise _refusal(key, config[key], "must be a JSON object")
    kind = found.pop("rope_type", None) or found.get("type") or "default"
    legacy = found.pop("type", kind)
    thetas = {float(source["rope_theta"]) for source in (found, config) if _is_number(source.get("rope_theta"))}
    if len(thetas) > 1:
        raise _refusal("rope_theta", config["rope_theta"], f"differs from {key}.rope_theta; remove one of them")
    theta = _number({**config, **found}, "rope_theta", 10_000.0)
    found.pop("rope_theta", None)
    if found.pop("partial_rotary_factor", 1) not in (1, None):
        raise _refusal(f"{key}.partial_rotary_factor", config[key]["partial_rotary_factor"], "this model rotates all")
    if kind not in ("default", "llama3") or legacy != kind:
        raise _refusal(f"{key}.rope_type", kind if legacy == kind else legacy, "this model has default and llama3 only")
    if kind == "default":
        return theta, None
    names = [field.name for field in fields(RopeScaling)]
    stranger = next((name for name in found if name not in names), None)
    if stranger is not None:
        raise _refusal(f"{key}.{stranger}", found[stranger], "this model does not know it")
    values = {name: _number(found, name, where=f"{key}.") for name in names[:-1]}
    return theta, RopeScaling(**values, original_max_position_embeddings=_size(found, names[-1], where=f"{key}."))


def _head_dim(config: Mapping[str, Any], family: str) -> int:
    if config.get("head_dim") is None and family == "llama":
        dim, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
        if dim % heads:
            raise _refusal("hidden_size", dim, f"no multiple of num_attention_heads {heads}; give head_dim")
        size = dim // heads
    else:
        size = _size(config, "head_dim")
    if size % 2:
        raise _refusal("head_dim", size, "must be even, for RoPE rotates pairs")
    return size


def _size(config: Mapping[str, Any], key: str, default: int | None = None, where: str = "") -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _refusal(where + key, value, "must be a positive integer")
    return value


def _number(config: Mapping[str, Any], key: str, default: float | None = None, where: str = "") -> float:
    value = config.get(key)
    value = default if value is None else value
    if not _is_number(value) or not 0 < value < float("inf"):
        raise _refusal(where + key, value, "must be a positive number")
    return float(value)


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise _refusal(key, value, "must be true or false")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _refusal(key: str, value: Any, why: str) -> UserError:
    text = str(value)
    return UserError(f"{key} = {text if len(text) <= 60 else text[:57] + '…'}: {why}")
