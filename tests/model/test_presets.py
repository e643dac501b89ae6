"""Named sizes: exact parameter counts, and what a [model] table makes of them."""

import json
from pathlib import Path

import pytest
import torch

from titanling.config.schema import Model
from titanling.errors import UserError
from titanling.model.hf import to_hf_config
from titanling.model.llama import build_on_meta
from titanling.model.presets import PRESETS, resolve_shape

# matmul parameters of the blocks, with norms, embedding, total: of the systems that titanling grew out of.
COUNTS = {
    "minilingua_30m": (26_542_080, 26_551_680, 49_152_000, 75_703_680),
    "minilingua_60m": (62_914_560, 62_931_456, 65_536_000, 128_467_456),
    "minilingua_100m": (110_592_000, 110_615_680, 81_920_000, 192_535_680),
    "minilingua_1b": (1_107_296_256, 1_107_396_096, 196_608_000, 1_304_004_096),
    "dense_180m": (201_326_592, 201_380_608, 25_165_824, 226_546_432),
    "llammlein_120m": (75_497_472, 75_516_672, 24_625_152, 124_766_976),
    "llammlein_1b": (968_884_224, 968_976_384, 65_667_072, 1_100_310_528),
    "llammlein_7b": (6_476_005_376, 6_476_271_616, 131_334_144, 6_738_939_904),
    "custom_300m": (402_653_184, 402_703_360, 51_463_168, 454_166_528),
}
# As published for Llama 3.2 and 3.1.
TOTALS = {
    "1B": 1_235_814_400,
    "3B": 3_212_749_824,
    "8B": 8_030_261_248,
    "70B": 70_553_706_496,
    "405B": 405_853_388_800,
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name: str) -> None:
    shape = resolve_shape(Model(flavor=name))
    found = (shape.matmul_params, shape.non_embedding_params, shape.embedding_params, shape.total_params)
    assert found == COUNTS[name]


@pytest.mark.parametrize("name", TOTALS)
def test_published_totals(name: str) -> None:
    assert resolve_shape(Model(flavor=name)).total_params == TOTALS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_the_module_has_as_many_parameters(name: str) -> None:
    shape = resolve_shape(Model(flavor=name))
    model = build_on_meta(shape, torch.bfloat16)
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    outside = sum(counts.get(f"{name}.weight", 0) for name in ("model.embed_tokens", "lm_head"))
    assert sum(counts.values()) == shape.total_params
    assert sum(counts.values()) - outside == shape.non_embedding_params
    assert sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2) == shape.matmul_params
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not list(model.buffers())


@pytest.mark.parametrize("name", ["8B", "8b", "llama3_8b", "Llama3_8B", "MINILINGUA_30M", "DebugModel"])
def test_names_have_no_case(name: str) -> None:
    assert resolve_shape(Model(flavor=name)) == resolve_shape(Model(flavor=name.lower().removeprefix("llama3_")))


@pytest.mark.parametrize(
    ("wrong", "nearest"), [("7B", "70B"), ("minilingua_30", "minilingua_30m"), ("llamlein_1b", "llammlein_1b")]
)
def test_an_unknown_name_is_told_the_nearest(wrong: str, nearest: str) -> None:
    with pytest.raises(UserError, match=f'model.flavor = "{wrong}".* did you mean {nearest}\\?'):
        resolve_shape(Model(flavor=wrong))


def test_a_name_like_no_other_is_told_all() -> None:
    with pytest.raises(UserError, match="known: debugmodel, 1B.*custom_300m"):
        resolve_shape(Model(flavor="????"))


def test_overrides() -> None:
    changes = {
        "dim": 96,
        "n_layers": 3,
        "n_heads": 6,
        "n_kv_heads": 2,
        "ffn_dim": 80,
        "vocab_size": 1000,
        "rope_theta": 77.0,
        "norm_eps": 1e-3,
        "tie_embeddings": True,
        "qk_norm": True,
        "dropout": 0.25,
    }
    shape = resolve_shape(Model(flavor="llammlein_1b", **changes))
    assert {key: getattr(shape, key) for key in changes} == changes
    assert shape.head_dim == 16


def test_head_dim() -> None:
    assert resolve_shape(Model(flavor="8B")).head_dim == 128
    assert resolve_shape(Model(flavor="8B", dim=2048)).head_dim == 64  # follows dim, not the preset
    assert resolve_shape(Model(flavor="8B", n_heads=64)).head_dim == 64
    assert resolve_shape(Model(flavor="8B", dim=2048, head_dim=128)).head_dim == 128
    assert resolve_shape(Model(flavor="8B", n_layers=2)).head_dim == 128


@pytest.mark.parametrize(
    ("vocab", "multiple", "padded"), [(50_257, 128, 50_304), (50_257, 1, 50_257), (32_010, 64, 32_064), (64, 64, 64)]
)
def test_vocab_padding(vocab: int, multiple: int, padded: int) -> None:
    shape = resolve_shape(Model(vocab_size=vocab, make_vocab_size_divisible_by=multiple))
    assert shape.vocab_size == padded


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_dim": 15}, "model.head_dim = 15 is odd"),
        ({"dim": 240}, "model.head_dim = 15 is odd"),
        ({"n_kv_heads": 3}, "model.n_heads = 16 is not a multiple of model.n_kv_heads = 3"),
        ({"n_heads": 8, "n_kv_heads": 16}, "model.n_heads = 8 is not a multiple of model.n_kv_heads = 16"),
        ({"dim": 250}, "model.dim = 250 is not a multiple of model.n_heads = 16; set model.head_dim"),
    ],
)
def test_sizes_that_do_not_fit(changes: dict[str, int], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        resolve_shape(Model(flavor="debugmodel", **changes))
    assert "\n" not in str(caught.value)


def test_llama_3_1_as_hugging_face_has_it() -> None:
    """config.json of the published Llama-3.1-8B, where it says something of the model."""
    config = to_hf_config(resolve_shape(Model(flavor="8B")), 8192, "bfloat16", 128_000, 128_001)
    published = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128_000,
        "eos_token_id": 128_001,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 131_072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500_000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 128_256,
    }
    assert {key: config[key] for key in published} == published
    assert config.keys() - published.keys() == {"head_dim"}


def test_context_length_of_the_export() -> None:
    plain, scaled = resolve_shape(Model(flavor="minilingua_30m")), resolve_shape(Model(flavor="1B"))
    assert to_hf_config(plain, 2048, "float32", None, 0)["max_position_embeddings"] == 2048
    assert to_hf_config(scaled, 2048, "float32", None, 0)["max_position_embeddings"] == 131_072
    assert to_hf_config(scaled, 262_144, "float32", None, 0)["max_position_embeddings"] == 262_144


def test_the_config_is_json(tmp_path: Path) -> None:
    config = to_hf_config(resolve_shape(Model(flavor="dense_180m")), 2048, "float32", 0, 1)
    assert json.loads(json.dumps(config)) == config
