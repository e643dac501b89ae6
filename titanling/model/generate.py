"""Continuing a text, token by token, with a key/value cache."""

import torch
from torch import Tensor, nn

from titanling.model.llama import LayerCache


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    n_layers: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_id: int | None = None,
) -> list[int]:
    """The ids that follow `prompt` (seq,) int64: at most `max_new_tokens`, ending before `stop_id`.

    temperature 0 is greedy. top_k keeps the k likeliest tokens (0: all); top_p keeps the smallest set of tokens
    whose probability reaches p (nucleus sampling, Holtzman et al. 2020). The same seed gives the same text.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    cache = [LayerCache(len(prompt) + max_new_tokens) for _ in range(n_layers)]
    tokens, new = prompt.to(device), []
    while len(new) < max_new_tokens:
        logits = model(tokens[None], cache)[0, -1].double().cpu()
        token = _choose(logits, temperature, top_k, top_p, generator)
        if token == stop_id:
            break
        new.append(token)
        tokens = torch.tensor([token], device=device)
    return new


def _choose(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    # Relative to the largest: a tiny temperature then gives -inf for the others, not inf for all.
    values, ids = ((logits - logits.max()) / temperature).sort(descending=True)
    if top_k:
        values, ids = values[:top_k], ids[:top_k]
    probabilities = values.softmax(-1)
    if top_p < 1:
        # Keep a token if those before it have not reached p yet; the likeliest always stays.
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities * (before < top_p)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
