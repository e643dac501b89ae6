"""Text that the model writes while it trains."""

from collections.abc import Collection, Iterator

import torch

from titanling.config.schema import Sampling
from titanling.data.prepare.tokenizer import TokenizerFiles
from titanling.model.generate import generate
from titanling.parallel.compile import uncompiled
from titanling.parallel.runner import Runner


def samples(
    settings: Sampling,
    files: TokenizerFiles,
    runner: Runner,
    device: torch.device,
    seed: int,
    bos_id: int | None,
    stop_ids: Collection[int],
) -> Iterator[str]:
    """Each prompt with its continuation; the same seed gives the same. All ranks together.

    `bos_id`: what documents begin with, if anything; `stop_ids`: what ends a text, beside the tokenizer's eos_token.
    """
    for prompt in settings.prompts:
        known = files.encode_prompt(prompt, bos_id)
        with runner.evaluation(), uncompiled():
            new = generate(
                runner.decoder(len(known) + settings.max_new_tokens),
                torch.tensor(known, device=device),
                settings.max_new_tokens,
                temperature=settings.temperature,
                seed=seed,
                stop_ids={files.eod_id, *stop_ids},
            )
        yield prompt + files.continuation(known, new)
