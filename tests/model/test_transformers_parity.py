"""The model against transformers' Llama and Qwen3 with the same random weights."""

import pytest
import torch
from model_helpers import SHAPES, hf_greedy, hf_twin, random_ids, random_model

from titanling.config.schema import Model
from titanling.model.generate import CachedDecoder, generate
from titanling.model.presets import resolve_shape


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_logits(name: str) -> None:
    shape = SHAPES[name]
    model, ids = random_model(shape), random_ids(shape, 2, 96)  # rope_scaling: three times its original context
    twin = hf_twin(model)
    found, wanted = model(ids), twin(ids).logits
    assert wanted.abs().max() > 1  # else 1e-4 would mean little
    assert (found - wanted).abs().max() <= 1e-4


@pytest.mark.parametrize("name", SHAPES)
def test_greedy_tokens(name: str) -> None:
    shape = SHAPES[name]
    model, prompt = random_model(shape), random_ids(shape, 1, 7)[0]
    found = generate(CachedDecoder(model, shape.n_layers, len(prompt) + 64), prompt, 64, temperature=0)
    assert len(found) == 64
    assert found == hf_greedy(hf_twin(model), prompt, 64)


@pytest.mark.parametrize("name", SHAPES)
def test_state_dict_names_and_shapes(name: str) -> None:
    model = random_model(SHAPES[name])
    ours = {key: value.shape for key, value in model.state_dict().items()}
    theirs = {key: value.shape for key, value in hf_twin(model).state_dict().items()}
    if SHAPES[name].tie_embeddings:
        assert theirs.pop("lm_head.weight") == theirs["model.embed_tokens.weight"]
    assert ours == theirs


def test_the_family() -> None:
    assert type(hf_twin(random_model(SHAPES["qk_norm"]))).__name__ == "Qwen3ForCausalLM"
    assert type(hf_twin(random_model(SHAPES["head_dim"]))).__name__ == "LlamaForCausalLM"


@torch.no_grad()
def test_llama_3_2_1b_with_fewer_layers_past_its_original_context() -> None:
    """The published frequency scaling itself (head 64, theta 500,000, factor 32), at positions around 8,192."""
    shape = resolve_shape(Model(flavor="1B", n_layers=1, dim=64, n_heads=1, n_kv_heads=1, ffn_dim=64, vocab_size=64))
    assert shape.rope_scaling is not None and shape.head_dim == 64
    model, ids = random_model(shape), random_ids(shape, 1, 8400)
    found, wanted = model(ids), _sdpa(hf_twin(model))(ids).logits
    assert wanted.abs().max() > 1
    assert (found - wanted)[:, -300:].abs().max() <= 1e-4


def _sdpa(twin: torch.nn.Module) -> torch.nn.Module:
    """Eager attention would hold 8,400² scores."""
    twin.config._attn_implementation = "sdpa"
    return twin
