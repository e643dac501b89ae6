"""Drops documents with words of a list."""

from collections import defaultdict
from collections.abc import Callable

from titanling.config.schema import BadWordsFilter
from titanling.data.prepare.filters.lists import read_list, words_of
from titanling.errors import UserError


def bad_words(settings: BadWordsFilter, language: str | None) -> Callable[[str], str | None]:
    """Keeps documents with less than `settings.hits` places at which a word or phrase of the list begins.

    Raises `UserError` for a missing or empty list.
    """
    entries: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for line in read_list(settings.path, language):
        words = tuple(words_of(line))
        if not words:
            raise UserError(f'{settings.path}: "{line}" has neither letter nor digit; take it out')
        entries[words[0]].add(words)
    entries = dict(entries)

    def apply(text: str) -> str | None:
        words = words_of(text)
        if entries.keys().isdisjoint(words):
            return text
        places = (place for place, word in enumerate(words) if word in entries)
        hits = sum(any(tuple(words[at : at + len(e)]) == e for e in entries[words[at]]) for at in places)
        return text if hits < settings.hits else None

    return apply
