"""The model's shape as Hugging Face's config.json. Imports no torch."""

from dataclasses import asdict
from typing import Any

from titanling.model.presets import LlamaShape

LLAMA_3_1_CONTEXT = 131_072


def to_hf_config(
    shape: LlamaShape, max_positions: int, dtype: str, bos_token_id: int | None, eos_token_id: int | None
) -> dict[str, Any]:
    """config.json of the model: Llama, or Qwen3 with QK-norm, which is the same arithmetic.

    `max_positions` is the longest sequence trained on; a shape with Llama-3.1 scaling states the context that this
    scaling is published for, if that is longer.
    """
    scaling = shape.rope_scaling
    if scaling is not None:
        max_positions = max(max_positions, LLAMA_3_1_CONTEXT)
    family = "Qwen3" if shape.qk_norm else "Llama"
    config: dict[str, Any] = {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": family.lower(),
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
