"""Which hashes have occurred before: the one thing of a preparation that depends on the order of all documents."""

import numpy as np


class SeenHashes:
    """A set of 64-bit hashes, grown in order by one process.

    Sorted arrays, each at least twice as long as the next: 8 bytes a hash, and as much again while the longest are
    merged; looking one up costs a binary search in each.
    """

    def __init__(self) -> None:
        self._sorted: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(map(len, self._sorted))

    @property
    def bytes(self) -> int:
        """Memory of the set."""
        return 8 * len(self)

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Add hashes (n,) uint64; which of them have not occurred before: (n,) bool."""
        values, first = np.unique(hashes, return_index=True)
        known = self._contains(values)
        self._insert(values[~known])
        new = np.zeros(len(hashes), bool)
        new[first[~known]] = True
        return new

    def _contains(self, values: np.ndarray) -> np.ndarray:
        found = np.zeros(len(values), bool)
        for part in self._sorted:
            places = np.minimum(np.searchsorted(part, values), len(part) - 1)
            found |= part[places] == values
        return found

    def _insert(self, values: np.ndarray) -> None:
        if not len(values):
            return
        while self._sorted and len(self._sorted[-1]) < 2 * len(values):
            values = np.concatenate([self._sorted.pop(), values])
            values.sort(kind="stable")  # merges runs
        self._sorted.append(values)
