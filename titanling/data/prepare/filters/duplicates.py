"""Drops documents and paragraphs that came before. What came before is known to the caller, by 64-bit hashes."""

from typing import Protocol

import numpy as np
from xxhash import xxh3_64_intdigest

from titanling.config.schema import DeduplicateParagraphsFilter

NO_HASHES = np.zeros(1, np.uint64)
"""Stands for a document that has nothing to compare: the answer to it is not looked at."""


class HashFilter(Protocol):
    """A filter in two halves: which hashes a document has, and what is kept when it is known which of them are new.

    A hash is new that has not come before, in this document or another.
    """

    def hashes(self, text: str) -> np.ndarray:
        """(n,) uint64, n ≥ 1."""
        ...

    def keep(self, text: str, new: np.ndarray) -> str | None:
        """What stays of the document, None if nothing; `new` (n,) bool."""
        ...


class DocumentHashes:
    """The text as a whole."""

    def hashes(self, text: str) -> np.ndarray:
        """(1,) uint64."""
        return np.array([xxh3_64_intdigest(text.encode())], np.uint64)

    def keep(self, text: str, new: np.ndarray) -> str | None:
        """The text if it is new."""
        return text if new[0] else None


class ParagraphHashes:
    """Each paragraph, without white space around it, that is long enough."""

    def __init__(self, settings: DeduplicateParagraphsFilter) -> None:
        self._separator = settings.separator
        self._min_characters = settings.min_characters

    def hashes(self, text: str) -> np.ndarray:
        """(paragraphs that are long enough, at least 1,) uint64."""
        found = [xxh3_64_intdigest(part.encode()) for part in map(str.strip, self._split(text)) if self._counts(part)]
        return np.array(found, np.uint64) if found else NO_HASHES

    def keep(self, text: str, new: np.ndarray) -> str | None:
        """The text without its old paragraphs; None if only white space is left."""
        if new.all():
            return text if text.strip() else None
        answers = iter(new.tolist())
        parts = [part for part in self._split(text) if not self._counts(part.strip()) or next(answers)]
        kept = self._separator.join(parts)
        return kept if kept.strip() else None

    def _split(self, text: str) -> list[str]:
        return text.split(self._separator)

    def _counts(self, stripped: str) -> bool:
        return len(stripped) >= self._min_characters
