"""Filters of a document's form: its length, lines of symbols, Gopher's rules of quality."""

import re
import unicodedata
from collections.abc import Callable

from titanling.config.schema import GopherQualityFilter, LengthFilter, SymbolLinesFilter
from titanling.data.prepare.filters.lists import read_words
from titanling.errors import UserError

GOPHER_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
BULLETS = ("•", "‣", "◦", "●", "*", "-", "–", "—")
ELLIPSES = ("…", "...")
_SYMBOL = re.compile(r"[\W_]")


def length(settings: LengthFilter) -> Callable[[str], str | None]:
    """Keeps documents whose length is within the bounds."""
    characters = settings.min_characters or 0, settings.max_characters or float("inf")
    words = settings.min_words or 0, settings.max_words or float("inf")
    counts_words = words != (0, float("inf"))

    def apply(text: str) -> str | None:
        if not characters[0] <= len(text) <= characters[1]:
            return None
        return text if not counts_words or words[0] <= len(text.split()) <= words[1] else None

    return apply


def symbol_lines(settings: SymbolLinesFilter) -> Callable[[str], str | None]:
    """Takes out lines with too many symbols. Empty lines stay, but not alone."""
    limit = settings.max_symbols

    def is_good(line: str) -> bool:
        solid = "".join(line.split())
        symbols = _SYMBOL.findall(solid)
        if len(symbols) <= limit * len(solid):
            return True
        # A letter's accents and vowel signs are characters of their own in many scripts, and part of it.
        marks = sum(unicodedata.category(symbol)[0] == "M" for symbol in symbols)
        return len(symbols) - marks <= limit * len(solid)

    def apply(text: str) -> str | None:
        lines = text.split("\n")
        good = [line for line in lines if is_good(line)]
        if len(good) == len(lines):
            return text if text.strip() else None
        kept = "\n".join(good)
        return kept if kept.strip() else None

    return apply


def gopher_quality(settings: GopherQualityFilter, language: str | None) -> Callable[[str], str | None]:
    """Keeps documents that pass Gopher's rules (Rae et al. 2021, appendix A.1.1). Raises `UserError` for stop words."""
    stop_words: frozenset[str] | set[str] = frozenset()
    if settings.min_stop_words:
        stop_words = GOPHER_STOP_WORDS
        if settings.stop_words is None and language not in (None, "en"):
            raise UserError(
                f'data.prepare.filters: gopher_quality has English stop words and the language is "{language}"; set'
                " stop_words to a list, or min_stop_words = 0"
            )
        if settings.stop_words is not None:
            stop_words = read_words(settings.stop_words, language)

    def apply(text: str) -> str | None:
        words = text.split()
        if not max(1, settings.min_words) <= len(words) <= settings.max_words:
            return None
        mean = sum(map(len, words)) / len(words)
        if not settings.min_mean_word_length <= mean <= settings.max_mean_word_length:
            return None
        most = settings.max_symbol_ratio * len(words)
        if text.count("#") > most or sum(map(text.count, ELLIPSES)) > most:
            return None
        lines = [line for line in map(str.strip, text.splitlines()) if line]
        if sum(line.startswith(BULLETS) for line in lines) > settings.max_bullet_lines * len(lines):
            return None
        if sum(line.endswith(ELLIPSES) for line in lines) > settings.max_ellipsis_lines * len(lines):
            return None
        if not _have_letters(words, settings.min_alphabetic_words * len(words)):
            return None
        enough = not settings.min_stop_words or len(stop_words & {*text.casefold().split()}) >= settings.min_stop_words
        return text if enough else None

    return apply


def _have_letters(words: list[str], wanted: float) -> bool:
    """Whether at least `wanted` of the words have a letter."""
    count = sum(map(str.isalpha, words))  # all letters: most words, and quick
    if count < wanted:
        count += sum(not word.isalpha() and any(map(str.isalpha, word)) for word in words)
    return count >= wanted
