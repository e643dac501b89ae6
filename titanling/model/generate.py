"""Continuing a text, token by token."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from titanling.model.llama import LayerCache

NextLogits = Callable[[Tensor], Tensor]
"""New tokens (n,) int64 of a text that it remembers → logits (vocab,) of the token behind them."""


class CachedDecoder:
    """NextLogits of a model on one device, with a key/value cache for `capacity` tokens."""

    def __init__(self, model: nn.Module, n_layers: int, capacity: int) -> None:
        self.model = model
        self.cache = [LayerCache(capacity) for _ in range(n_layers)]

    def __call__(self, tokens: Tensor) -> Tensor:
        """First the whole prompt, then one token at a time."""
        return self.model(tokens[None], cache=self.cache)[0, -1]


@torch.no_grad()
def generate(
    next_logits: NextLogits,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Collection[int] = (),
) -> list[int]:
    """The ids that follow `prompt` (seq,) int64: at most `max_new_tokens`, ending before any of `stop_ids`.

    `next_logits` has room for len(prompt) + max_new_tokens. temperature 0 is greedy. top_k keeps the k likeliest tokens
    (0: all); top_p keeps the smallest set of tokens whose probability reaches p (nucleus sampling, Holtzman et al.
    2020). The same seed gives the same text.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens, new = prompt, []
    while len(new) < max_new_tokens:
        logits = next_logits(tokens).double().cpu()
        token = _choose(logits, temperature, top_k, top_p, generator)
        if token in stop_ids:
            break
        new.append(token)
        tokens = torch.tensor([token], device=prompt.device)
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
