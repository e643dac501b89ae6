"""Sampling: what each setting does, and that the drawn tokens follow the distribution they should."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import SHAPES, random_ids, random_model
from torch import Tensor

from titanling.model.generate import CachedDecoder, generate
from titanling.model.llama import Llama
from titanling.model.presets import LlamaShape

SHAPE = SHAPES["gqa3_tied"]
MODEL = random_model(SHAPE)
PROMPT = random_ids(SHAPE, 1, 5)[0]
TINY = LlamaShape(16, 1, 2, 1, 16, 8, head_dim=8)


def sample(model: Llama = MODEL, prompt: Tensor = PROMPT, new: int = 20, **options: Any) -> list[int]:
    return generate(CachedDecoder(model, model.shape.n_layers, len(prompt) + new), prompt, new, **options)


GREEDY = sample(temperature=0)


@torch.no_grad()
def test_greedy_is_the_argmax_of_a_full_forward() -> None:
    ids = PROMPT.tolist()
    for token in GREEDY:
        assert token == MODEL(torch.tensor([ids]))[0, -1].argmax()
        ids.append(token)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    temperature=st.floats(0.01, 10),
    top_k=st.sampled_from([0, 1, 2, 400]),
    top_p=st.floats(1e-6, 1),
)
def test_one_candidate_is_greedy(seed: int, temperature: float, top_k: int, top_p: float) -> None:
    assert sample(seed=seed, temperature=temperature, top_k=1, top_p=top_p) == GREEDY
    assert sample(seed=seed, temperature=temperature, top_k=top_k, top_p=1e-6) == GREEDY


@pytest.mark.parametrize("temperature", [1e-3, 1e-9, 1e-38, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    assert sample(temperature=temperature) == GREEDY


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**63 - 1))
def test_a_seed_decides(seed: int) -> None:
    torch.manual_seed(seed)  # the global generator plays no part
    first = sample(seed=seed, temperature=2.0)
    assert sample(seed=seed, temperature=2.0) == first
    assert sample(seed=seed ^ 1, temperature=2.0) != first


@pytest.mark.parametrize(
    ("options", "keep"),
    [
        ({}, 8),
        ({"temperature": 0.5}, 8),
        ({"temperature": 2.0}, 8),
        ({"top_k": 3}, 3),
        ({"top_k": 100}, 8),
        ({"top_p": 0.8}, None),
        ({"temperature": 1.5, "top_k": 5, "top_p": 0.9}, None),
    ],
)
def test_distribution(options: dict[str, Any], keep: int | None) -> None:
    """χ² of 1,500 draws, one for each seed, against the probabilities by definition."""
    model, prompt, draws = random_model(TINY, seed=4), torch.tensor([1, 2, 3]), 1500
    with torch.no_grad():
        logits = model(prompt[None])[0, -1].double() / options.get("temperature", 1.0)
    wanted = _restrict(logits.softmax(-1).tolist(), options.get("top_k") or 8, options.get("top_p", 1.0))
    counts = [0] * 8
    for seed in range(draws):
        (token,) = sample(model, prompt, 1, seed=seed, **options)
        counts[token] += 1
    assert all(count == 0 for count, p in zip(counts, wanted, strict=True) if p == 0)
    chi2 = sum((count - draws * p) ** 2 / (draws * p) for count, p in zip(counts, wanted, strict=True) if p)
    candidates = sum(p > 0 for p in wanted)
    assert candidates >= 2 and keep in (None, candidates)
    # The 99.9 % quantiles for 1 … 7 degrees of freedom.
    assert chi2 < (10.83, 13.82, 16.27, 18.47, 20.52, 22.46, 24.32)[candidates - 2]


def _restrict(probabilities: list[float], top_k: int, top_p: float) -> list[float]:
    """Zero all but the top_k likeliest, then all but the fewest of these that reach top_p; normalise."""
    order = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])[:top_k]
    total = sum(probabilities[i] for i in order)
    kept, mass = [], 0.0
    for index in order:
        kept.append(index)
        mass += probabilities[index] / total
        if mass >= top_p:
            break
    total = sum(probabilities[i] for i in kept)
    return [p / total if i in kept else 0.0 for i, p in enumerate(probabilities)]


def test_stops_before_the_stop_token() -> None:
    stop = GREEDY[6]
    assert sample(temperature=0, stop_ids=[stop]) == GREEDY[: GREEDY.index(stop)]
    assert sample(temperature=0, stop_ids=[GREEDY[0]]) == []
    unseen = next(i for i in range(SHAPE.vocab_size) if i not in GREEDY)
    assert sample(temperature=0, stop_ids=[unseen]) == GREEDY


def test_length() -> None:
    assert len(sample(new=1)) == 1
    assert sample(new=7, temperature=0) == GREEDY[:7]
    assert sample(prompt=PROMPT[:1], new=3, temperature=0) != GREEDY[:3]


def test_the_model_keeps_no_gradients() -> None:
    sample(new=2)
    assert all(p.grad is None for p in MODEL.parameters())
