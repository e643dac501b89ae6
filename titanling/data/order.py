"""The order of samples: a keyed permutation that is computed, never stored. Free of torch.

A Feistel network of six rounds over the smallest power-of-two domain that holds n (its halves differ by one bit when
the exponent is odd); a value that lands outside 0 … n - 1 walks on through the network until it is inside ("cycle
walking", Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002). The round function is the output mix of
splitmix64 (Steele, Lea, Flood, Fast Splittable Pseudorandom Number Generators, 2014).
"""

import hashlib

import numpy as np

ROUNDS = 6
WORD = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
# Long arrays are permuted in pieces: large against numpy's cost per call, small enough for the CPU's second cache.
PIECE = 32768


def splitmix64(value: int) -> int:
    """Output of the splitmix64 generator in the state `value`: a bijective mix of 64 bits."""
    value = (value + GOLDEN) & WORD
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & WORD
    return value ^ (value >> 31)


def order_key(seed: int, source: str, epoch: int) -> int:
    """64-bit key of one epoch over one named source."""
    key = splitmix64(seed & WORD)
    key = splitmix64(key ^ int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "little"))
    return splitmix64(key ^ epoch)


class Permutation:
    """A pseudo-random bijection of 0 … n - 1 (1 ≤ n ≤ 2^62), a pure function of (n, key), in O(1) time and memory."""

    def __init__(self, n: int, key: int) -> None:
        if not 1 <= n <= 2**62:
            raise ValueError(f"n = {n} outside 1 … 2^62")
        self.n = n
        bits = max(2, (n - 1).bit_length())
        self._low = np.uint64(bits // 2)
        self._low_mask = np.uint64((1 << (bits // 2)) - 1)
        self._high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
        self._rounds = [(r % 2 == 0, np.uint64(splitmix64(key + r * GOLDEN))) for r in range(ROUNDS)]

    def forward(self, index: int | np.ndarray) -> int | np.ndarray:
        """Image of each index, in the shape of `index`: int for an int, int64 for an array. IndexError outside."""
        return self._map(index, self._rounds)

    def inverse(self, image: int | np.ndarray) -> int | np.ndarray:
        """The index whose image each value is: undoes `forward`."""
        return self._map(image, self._rounds[::-1])

    def _map(self, index: int | np.ndarray, rounds: list[tuple[bool, np.uint64]]) -> int | np.ndarray:
        values = np.array(index, dtype=np.int64, ndmin=1, order="C")
        if values.size and (values.min() < 0 or values.max() >= self.n):
            raise IndexError(f"index outside 0 … {self.n - 1}")
        flat = values.reshape(-1).view(np.uint64)
        for start in range(0, flat.size, PIECE):
            self._walk(flat[start : start + PIECE], rounds)
        return values if isinstance(index, np.ndarray) else int(values[0])

    def _walk(self, values: np.ndarray, rounds: list[tuple[bool, np.uint64]]) -> None:
        n = np.uint64(self.n)
        values[:] = self._network(values, rounds)
        outside = np.flatnonzero(values >= n)
        while outside.size:
            walked = self._network(values[outside], rounds)
            values[outside] = walked
            outside = outside[walked >= n]

    def _network(self, values: np.ndarray, rounds: list[tuple[bool, np.uint64]]) -> np.ndarray:
        """Each round changes one half by a function of the other, so that a round undoes itself."""
        high, low = values >> self._low, values & self._low_mask
        mixed, shifted = np.empty_like(high), np.empty_like(high)
        for into_high, key in rounds:
            np.add(low if into_high else high, key, out=mixed)
            _mix(mixed, shifted)
            if into_high:
                high ^= np.bitwise_and(mixed, self._high_mask, out=mixed)
            else:
                low ^= np.bitwise_and(mixed, self._low_mask, out=mixed)
        return (high << self._low) | low


def _mix(values: np.ndarray, shifted: np.ndarray) -> None:
    """splitmix64's output mix on uint64, in place; `shifted` is scratch."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values ^= np.right_shift(values, np.uint64(shift), out=shifted)
        values *= np.uint64(factor)
    values ^= np.right_shift(values, np.uint64(31), out=shifted)
