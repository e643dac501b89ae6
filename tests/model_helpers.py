"""Small models with random weights, and their twins in transformers."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from titanling.model.hf import to_hf_config
from titanling.model.llama import Llama, build_on_meta
from titanling.model.presets import LlamaShape, RopeScaling

# Small, and each with something that another has not. All fit the vocabulary of the tests' tokenizer.
SHAPES: dict[str, LlamaShape] = {
    "gqa3_tied": LlamaShape(48, 2, 6, 2, 96, 320, head_dim=8, tie_embeddings=True),
    "untied": LlamaShape(32, 2, 4, 4, 64, 320, head_dim=8, rope_theta=500_000.0, norm_eps=1e-6),
    "head_dim": LlamaShape(32, 2, 4, 2, 64, 320, head_dim=20),
    "rope_scaling": LlamaShape(
        32, 2, 2, 1, 64, 320, head_dim=16, rope_scaling=RopeScaling(original_max_position_embeddings=32)
    ),
    "qk_norm": LlamaShape(32, 2, 4, 2, 64, 320, head_dim=16, tie_embeddings=True, qk_norm=True),
}


def random_model(shape: LlamaShape, seed: int = 0) -> Llama:
    """A float32 model in eval mode whose weights are large enough that every part of it moves the logits."""
    generator = torch.Generator().manual_seed(seed)
    model = build_on_meta(shape, torch.float32).to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.3 * noise if name.endswith("norm.weight") else 0.15 * noise
    return model.eval()


def random_ids(shape: LlamaShape, batch: int, seq: int, seed: int = 1) -> Tensor:
    """(batch, seq) int64 token ids."""
    return torch.randint(shape.vocab_size, (batch, seq), generator=torch.Generator().manual_seed(seed))


def hf_twin(model: Llama) -> PreTrainedModel:
    """transformers' model of the same shape with the same weights."""
    config = AutoConfig.for_model(**to_hf_config(model.shape, 128, "float32", None, None))
    twin = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    missing, unexpected = twin.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if model.shape.tie_embeddings else [])
    return twin


def hf_greedy(twin: PreTrainedModel, prompt: Tensor, new: int) -> list[int]:
    """transformers' greedy continuation of `prompt` (seq,) by exactly `new` tokens."""
    output = twin.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt)[None],
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    return output[0, len(prompt) :].tolist()
