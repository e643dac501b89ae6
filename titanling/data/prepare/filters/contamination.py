"""Drops documents that contain a text of a test set."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

import numpy as np

from titanling.config.schema import DecontaminateFilter
from titanling.data.prepare.filters.lists import find_test_sets, read_test_texts, words_of
from titanling.errors import UserError

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word's number is lost: 2^64 over the golden ratio


class KnownTexts:
    """The n-grams of the words of test texts, and which texts hold each.

    Containment of a text in a document: the share of its different n-grams that the document holds; a text shorter
    than n words is one n-gram of its own length.
    """

    def __init__(self, texts: Iterable[str], n: int, min_words: int) -> None:
        self._numbers: dict[str, int] = {}
        self._holders: dict[int, dict[tuple[int, ...], list[int]]] = defaultdict(lambda: defaultdict(list))
        sizes = []
        for words in dict.fromkeys(tuple(words_of(text)) for text in texts):
            if len(words) < min_words:
                continue
            ids = [self._numbers.setdefault(word, len(self._numbers) + 1) for word in words]
            length = min(n, len(ids))
            grams = {tuple(ids[start : start + length]) for start in range(len(ids) - length + 1)}
            for gram in grams:
                self._holders[length][gram].append(len(sizes))
            sizes.append(len(grams))
        self.sizes = sizes
        """Number of different n-grams of each text."""
        self._hashes = {
            length: np.sort(_hash(np.array(list(grams), np.int64))) for length, grams in self._holders.items()
        }

    def containment(self, text: str) -> float:
        """The greatest containment of a test text in this document, 0 … 1."""
        ids = np.array([self._numbers.get(word, 0) for word in words_of(text)], np.int64)
        found: Counter[int] = Counter()
        for length, hashes in self._hashes.items():
            grams = {tuple(ids[start : start + length].tolist()) for start in _candidates(ids, length, hashes)}
            for gram in grams:
                found.update(self._holders[length].get(gram, ()))
        return max((count / self.sizes[number] for number, count in found.items()), default=0.0)


def decontaminate(settings: DecontaminateFilter) -> Callable[[str], str | None]:
    """Keeps documents that hold no test text. Raises `UserError`: no test file, one that cannot be read, no texts."""
    paths = find_test_sets(settings.test_sets)
    texts = KnownTexts((text for path in paths for text in read_test_texts(path)), settings.n, settings.min_words)
    if not texts.sizes:
        raise UserError(
            f"data.prepare.filters: test_sets: {', '.join(paths)}: no text of {settings.min_words} words or more;"
            " correct test_sets or lower min_words"
        )
    return lambda text: text if texts.containment(text) < settings.min_containment else None


def _hash(grams: np.ndarray) -> np.ndarray:
    """(grams, length) word numbers → (grams,) uint64."""
    total = np.zeros(len(grams), np.uint64)
    for column in grams.T.astype(np.uint64):
        total = (total + column) * MULTIPLIER
    return total


def _candidates(ids: np.ndarray, length: int, hashes: np.ndarray) -> list[int]:
    """Where n-grams begin whose words are all known and whose hash is one of `hashes` (sorted)."""
    count = len(ids) - length + 1
    if count < 1:
        return []
    unknown = np.concatenate(([0], np.cumsum(ids == 0)))
    starts = np.flatnonzero(unknown[length:] == unknown[:count])
    if not len(starts):
        return []
    found = _hash(ids[starts[:, None] + np.arange(length)])
    place = np.minimum(np.searchsorted(hashes, found), len(hashes) - 1)
    return starts[hashes[place] == found].tolist()
