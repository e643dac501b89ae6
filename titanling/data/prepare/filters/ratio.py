"""Drops documents by the number of tokens that they need for a word."""

from collections.abc import Callable

from titanling.config.schema import TokenWordRatioFilter
from titanling.errors import UserError


def token_word_ratio(settings: TokenWordRatioFilter, language: str | None) -> Callable[[str, int], bool]:
    """Whether a text of so many tokens is kept. Raises `UserError` for a language without a limit."""
    name = "*" if language is None else language
    most = settings.max_ratio.get(name, settings.max_ratio.get("*"))
    least = settings.min_ratio.get(name, settings.min_ratio.get("*", 0.0))
    if most is None:
        raise UserError(f'data.prepare.filters: token_word_ratio: max_ratio has no limit for "{name}"; add it, or "*"')

    def keep(text: str, tokens: int) -> bool:
        words = len(text.split())
        return least * words <= tokens <= most * words

    return keep
