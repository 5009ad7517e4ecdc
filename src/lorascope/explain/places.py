"""Keys of rows, as few bytes as they can be held in: where the row of a key is, and which key a row is to have."""

from __future__ import annotations

import threading
from collections.abc import Container

import numpy as np
from numpy.typing import NDArray

FEWEST_SORTED = 1 << 12
"""Places that are kept one by one at most, or a 32nd of all: so sorting them in is seldom done."""
DIGITS = 32


class Places:
    """Numbers of 64 bits and a place for each, as sorted arrays and a small dictionary of what came since.

    Any thread may ask and tell.
    """

    def __init__(self) -> None:
        """Nothing yet."""
        self._numbers = np.zeros(0, np.uint64)
        self._places = np.zeros(0, np.int64)
        self._new: dict[int, int] = {}
        self._lock = threading.Lock()

    def find(self, number: int) -> int | None:
        """The last place that a number was given."""
        with self._lock:
            if number in self._new:
                return self._new[number]
            at = int(np.searchsorted(self._numbers, np.uint64(number)))
            return int(self._places[at]) if at < len(self._numbers) and self._numbers[at] == number else None

    def put(self, number: int, place: int) -> None:
        """Give a number a place."""
        with self._lock:
            self._new[number] = place
            if len(self._new) >= max(FEWEST_SORTED, len(self._numbers) // 32):
                self._sort_in()

    def _sort_in(self) -> None:
        """Move what came since into the arrays; sorting it alone, and not all, takes a fifth of the memory."""
        count = len(self._new)
        numbers = np.fromiter(self._new, np.uint64, count)
        order = np.argsort(numbers)
        numbers, places = numbers[order], np.fromiter(self._new.values(), np.int64, count)[order]
        at = np.searchsorted(self._numbers, numbers)
        known = np.searchsorted(self._numbers, numbers, side="right") > at
        self._places[at[known]] = places[known]
        self._numbers = np.insert(self._numbers, at[~known], numbers[~known])
        self._places = np.insert(self._places, at[~known], places[~known])
        self._new = {}


class Keys:
    """One key of 32 hexadecimal digits for each of some numbered things."""

    def __init__(self, count: int) -> None:
        """All empty."""
        self._keys = np.zeros(count, f"S{DIGITS}")

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, number: int) -> str:
        return str(self._keys[number], "ascii")

    def __setitem__(self, number: int, key: str) -> None:
        self._keys[number] = key.encode("ascii")

    def sort(self) -> Container[str]:
        """The keys as they are now, for telling whether one is among them."""
        return _Sorted(np.sort(self._keys))


class _Sorted:
    """Sorted keys."""

    def __init__(self, keys: NDArray[np.bytes_]) -> None:
        self._keys = keys

    def __contains__(self, key: object) -> bool:
        wanted = np.bytes_(str(key).encode())
        at = int(np.searchsorted(self._keys, wanted))
        return at < len(self._keys) and bool(self._keys[at] == wanted)


def key_number(key: str) -> int:
    """64 bits of a key (hexadecimal)."""
    return int(key[:16], 16)
