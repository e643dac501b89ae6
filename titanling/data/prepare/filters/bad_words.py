"""Drops documents with words of a list."""

from collections import defaultdict
from collections.abc import Callable

from titanling.config.schema import BadWordsFilter
from titanling.data.prepare.filters.lists import read_list, words_of
from titanling.errors import UserError

KNOWN_PIECES = 200_000
"""Pieces of text of which we remember that nothing on the list begins in them: some 25 MB."""


def bad_words(settings: BadWordsFilter, language: str | None) -> Callable[[str], str | None]:
    """Keeps documents with less than `settings.hits` places at which a word or phrase of the list begins.

    A document is cut at white space; most of its pieces have been seen, and hold no word that begins an entry. Only if
    one does, the document is searched word by word. Raises `UserError` for a missing or empty list.
    """
    entries: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for line in read_list(settings.path, language):
        words = tuple(words_of(line))
        if not words:
            raise UserError(f'{settings.path}: "{line}" has neither letter nor digit; take it out')
        entries[words[0]].add(words)
    entries = dict(entries)
    clean: set[str] = set()

    def may_match(text: str) -> bool:
        new = {*text.casefold().split()} - clean
        if not entries.keys().isdisjoint(words_of(" ".join(new))):
            return True
        if len(clean) > KNOWN_PIECES:
            clean.clear()
        clean.update(new)
        return False

    def apply(text: str) -> str | None:
        if not may_match(text):
            return text
        words = words_of(text)
        places = (place for place, word in enumerate(words) if word in entries)
        hits = sum(any(tuple(words[at : at + len(e)]) == e for e in entries[words[at]]) for at in places)
        return text if hits < settings.hits else None

    return apply
