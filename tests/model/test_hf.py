"""config.json both ways: what we write is read back exactly, and what our model cannot do is refused by name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from model_helpers import SHAPES
from transformers import AutoConfig

from titanling.config.schema import Model
from titanling.errors import UserError
from titanling.model.hf import from_hf_config, to_hf_config
from titanling.model.presets import PRESETS, LlamaShape, resolve_shape

ALL = SHAPES | {name: replace(resolve_shape(Model(flavor=name)), dropout=0.0) for name in PRESETS}


def written(shape: LlamaShape) -> dict[str, Any]:
    """config.json as an export writes and a reader parses it."""
    return json.loads(json.dumps(to_hf_config(shape, 128, "bfloat16", 0, 1)))


@pytest.mark.parametrize("name", ALL)
def test_round_trip(name: str) -> None:
    assert from_hf_config(written(ALL[name])) == ALL[name]


@pytest.mark.parametrize("name", ALL)
def test_round_trip_through_transformers(name: str, tmp_path: Path) -> None:
    """As the installed transformers spells it: version 5 writes rope_parameters and no rope_theta."""
    config = written(ALL[name])
    AutoConfig.for_model(**config).save_pretrained(tmp_path)
    theirs = json.loads((tmp_path / "config.json").read_text())
    assert theirs["model_type"] == config["model_type"]
    assert from_hf_config(theirs | {"architectures": config["architectures"]}) == ALL[name]
    assert from_hf_config(theirs) == ALL[name]  # a config that was never a model's names no architecture


def test_older_spellings() -> None:
    config = written(SHAPES["rope_scaling"])
    scaling = config["rope_scaling"]
    scaling["type"] = scaling.pop("rope_type")
    assert from_hf_config(config) == SHAPES["rope_scaling"]
    for key in ("head_dim", "num_key_value_heads", "rope_theta", "rope_scaling", "rms_norm_eps", "tie_word_embeddings"):
        del config[key]
    assert from_hf_config(config) == LlamaShape(32, 2, 2, 2, 64, 320, head_dim=16, rope_theta=10_000.0, norm_eps=1e-6)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("untied", {"attention_bias": True}, "attention_bias = True"),
        ("untied", {"mlp_bias": True}, "mlp_bias = True"),
        ("untied", {"hidden_act": "gelu"}, "hidden_act = gelu"),
        ("untied", {"architectures": ["MistralForCausalLM"]}, "architectures = .*Mistral.*LlamaForCausalLM and Qwen3"),
        ("untied", {"architectures": ["Qwen3ForCausalLM"]}, "architectures = .* does not go with model_type 'llama'"),
        ("untied", {"architectures": ["LlamaForSequenceClassification"]}, "architectures = "),
        ("untied", {"architectures": None, "model_type": "gemma"}, "model_type = gemma: only llama and qwen3"),
        ("untied", {"model_type": None}, "model_type = None"),
        ("untied", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type = yarn"),
        ("untied", {"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling.rope_type = linear"),
        (
            "untied",
            {"rope_scaling": None, "rope_parameters": {"rope_type": "dynamic"}},
            "rope_parameters.rope_type = dyn",
        ),
        (
            "untied",
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope_scaling.low_freq_factor = None",
        ),
        ("untied", {"rope_scaling": "yarn"}, "rope_scaling = yarn: must be a JSON object"),
        (
            "rope_scaling",
            {"rope_parameters": {"rope_type": "default"}},
            "rope_scaling = .* differs from",
        ),
        ("untied", {"rope_parameters": {"rope_theta": 9.0}}, "rope_theta = 500000.0: differs from rope_parameters"),
        ("untied", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("untied", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor = 0.5"),
        ("untied", {"sliding_window": 4096}, "sliding_window = 4096"),
        ("qk_norm", {"use_sliding_window": True, "sliding_window": 64}, "use_sliding_window = True"),
        ("qk_norm", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = "),
        ("untied", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config = "),
        ("untied", {"auto_map": {"AutoModel": "modeling.Evil"}}, "auto_map = "),
        ("untied", {"hidden_size": "32"}, "hidden_size = 32: must be a positive integer"),
        ("untied", {"hidden_size": True}, "hidden_size = True: must be a positive integer"),
        ("untied", {"num_hidden_layers": 0}, "num_hidden_layers = 0: must be a positive integer"),
        ("untied", {"num_hidden_layers": None}, "num_hidden_layers = None: must be a positive integer"),
        ("untied", {"num_key_value_heads": 3}, "num_key_value_heads = 3: does not divide"),
        ("untied", {"head_dim": 7}, "head_dim = 7: must be even"),
        ("untied", {"head_dim": None, "hidden_size": 30}, "hidden_size = 30: no multiple"),
        ("qk_norm", {"head_dim": None}, "head_dim = None"),
        ("untied", {"rms_norm_eps": -1}, "rms_norm_eps = -1: must be a positive number"),
        ("untied", {"rope_theta": float("inf")}, "rope_theta = inf: must be a positive number"),
        ("untied", {"tie_word_embeddings": "no"}, "tie_word_embeddings = no: must be true or false"),
    ],
)
def test_what_our_model_cannot_do_is_named(name: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        from_hf_config(written(SHAPES[name]) | changes)
    assert "\n" not in str(caught.value)


def test_what_makes_no_difference_is_accepted() -> None:
    config = written(SHAPES["qk_norm"])
    config |= {
        "sliding_window": 4096,
        "layer_types": ["full_attention"] * 2,
        "pretraining_tp": 2,
        "hidden_act": "swish",
    }
    config |= {"attention_dropout": 0.1, "rope_scaling": {"rope_type": "default"}, "eos_token_id": [1, 2]}
    assert from_hf_config(config) == SHAPES["qk_norm"]
