"""Drops documents that repeat themselves, by Gopher's measures."""

from collections.abc import Callable, Sequence

import numpy as np

from titanling.config.schema import GopherRepetitionFilter


def gopher_repetition(settings: GopherRepetitionFilter) -> Callable[[str], str | None]:
    """Keeps documents that repeat little (Rae et al. 2021, table A1)."""

    def apply(text: str) -> str | None:
        lines = [line for line in map(str.strip, text.splitlines()) if line]
        paragraphs = [part for part in map(str.strip, text.split("\n\n")) if part]
        for parts, most, most_characters in (
            (lines, settings.max_lines, settings.max_line_characters),
            (paragraphs, settings.max_paragraphs, settings.max_paragraph_characters),
        ):
            share, characters = repeated_parts(parts)
            if share > most or characters > most_characters:
                return None
        return text if _n_grams_pass(text.split(), settings) else None

    return apply


def repeated_parts(parts: Sequence[str]) -> tuple[float, float]:
    """Share of the parts, and of their characters without white space, that came before; (0, 0) without parts."""
    if len(parts) < 2:
        return 0.0, 0.0
    seen: set[str] = set()
    count = characters = total = 0
    for part in parts:
        size = sum(map(len, part.split()))
        total += size
        if part in seen:
            count += 1
            characters += size
        seen.add(part)
    return count / len(parts), characters / max(1, total)


class NGrams:
    """The n-grams of words of one document, n growing. `sizes` (words,): characters of each word."""

    def __init__(self, words: Sequence[str]) -> None:
        index: dict[str, int] = {}
        self._words = np.array([index.setdefault(word, len(index)) for word in words], np.int64)
        self.sizes = np.array([len(word) for word in words], np.int64)
        self.n = 0
        self.ids = np.zeros(len(words) + 1, np.int64)
        """(words - n + 1,): equal for equal n-grams."""
        self.first = np.zeros(0, np.int64)
        """Where each different n-gram comes first."""
        self.counts = np.zeros(0, np.int64)
        """How often each comes."""

    def grow(self) -> None:
        """n + 1. An n-gram is named by the one that is a word shorter and its last word, so that none share a name."""
        self.n += 1
        words = self._words[self.n - 1 :]
        pairs = self.ids[: len(words)] * (1 + len(self.sizes)) + words
        _, self.first, self.ids, self.counts = np.unique(
            pairs, return_index=True, return_inverse=True, return_counts=True
        )

    def share(self, starts: np.ndarray) -> float:
        """Share of the document's characters that the n-grams at `starts` (m,) hold, each counted once."""
        edges = np.zeros(len(self.sizes) + 1, np.int64)
        np.add.at(edges, starts, 1)
        np.add.at(edges, starts + self.n, -1)
        return float(self.sizes[np.cumsum(edges[:-1]) > 0].sum() / max(1, self.sizes.sum()))

    def top_is_above(self, limit: float) -> bool:
        """Whether an n-gram, occurring more than once, has in its places more than this share of the characters."""
        ends = np.concatenate(([0], np.cumsum(self.sizes)))
        lengths = (ends[self.n :] - ends[: len(ends) - self.n])[self.first]
        # Places of an n-gram may overlap, so these are bounds. They add up to at most n: few are above the limit.
        bounds = np.where(self.counts > 1, self.counts * lengths, 0) / ends[-1]
        return any(self.share(np.flatnonzero(self.ids == name)) > limit for name in np.flatnonzero(bounds > limit))

    def repeated(self) -> float:
        """Share of characters in n-grams that came before."""
        came_before = np.ones(len(self.ids), bool)
        came_before[self.first] = False
        return self.share(np.flatnonzero(came_before))


def _n_grams_pass(words: Sequence[str], settings: GopherRepetitionFilter) -> bool:
    top, repeated = dict(settings.top_n_grams), dict(settings.repeated_n_grams)
    grams = NGrams(words)
    for n in range(1, max((*top, *repeated), default=0) + 1):
        if n > len(words):
            break
        grams.grow()
        if len(grams.counts) == len(grams.ids):  # none comes twice, and no longer one can
            break
        if n in top and grams.top_is_above(top[n]) or n in repeated and grams.repeated() > repeated[n]:
            return False
    return True
