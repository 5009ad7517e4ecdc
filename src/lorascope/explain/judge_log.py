"""Every request to a judge and what came back, as append-only JSON Lines keyed by the content of the request.

So a cut-off run pays for nothing twice and a finished one replays without network or key. In memory is only where each
line starts: 16 bytes a request, and about 100 for each of the last ones.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np

from lorascope.errors import RunFailed
from lorascope.explain.rows import Row, row_line

PASSING = ("HTTP 408", "HTTP 409", "HTTP 429", "HTTP 5", "time-out", "no connection", "no chat completion")
"""How the reasons of failures begin that may be gone on the next run; all others are final."""
TRUNCATED = "truncated"
"""The reason of an answer that ended at the most tokens of one, before it could be read."""


def is_passing(reason: str) -> bool:
    """Whether a failure may be gone when the same is asked on another run."""
    return reason.startswith(PASSING)


FEWEST_SORTED = 1 << 12
"""Places that are kept one by one at most, or an eighth of all: so sorting them in is seldom done."""


class Places:
    """Numbers of 64 bits and a place for each, as sorted arrays and a small dictionary of what came since."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._numbers = np.zeros(0, np.uint64)
        self._places = np.zeros(0, np.int64)
        self._new: dict[int, int] = {}

    def find(self, number: int) -> int | None:
        """The last place that a number was given."""
        if number in self._new:
            return self._new[number]
        at = int(np.searchsorted(self._numbers, np.uint64(number)))
        return int(self._places[at]) if at < len(self._numbers) and self._numbers[at] == number else None

    def put(self, number: int, place: int) -> None:
        """Give a number a place."""
        self._new[number] = place
        if len(self._new) >= max(FEWEST_SORTED, len(self._numbers) // 8):
            count = len(self._new)
            numbers = np.concatenate([np.fromiter(self._new, np.uint64, count), self._numbers])
            places = np.concatenate([np.fromiter(self._new.values(), np.int64, count), self._places])
            self._numbers, first = np.unique(numbers, return_index=True)  # the first of equal ones: the new
            self._places = places[first]
            self._new = {}


class JudgeLog:
    """One such file, opened; safe to use from several threads of one process."""

    def __init__(self, path: Path) -> None:
        """Read where each request's last row is; an unfinished last line is cut away.

        Raises:
            RunFailed: a finished line is not JSON.
        """
        self.path = path
        self.urls: set[str] = set()
        """Where the rows that were in the file came from."""
        self._at = Places()
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = self._read_places()
        self._file = path.open("ab")
        self._file.truncate(whole)
        self._reader = path.open("rb")

    def _read_places(self) -> int:
        """Fill the index; the number of bytes in whole lines."""
        place = 0
        if not self.path.is_file():
            return place
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    row = json.loads(line)
                    key, failure = _number(row["key"]), row["failure"]
                except (ValueError, KeyError, TypeError) as error:
                    raise RunFailed(
                        f"{self.path}, line {number} is damaged; remove the line and explain again."
                    ) from error
                self.urls.add(row.get("url", ""))
                if failure is None or not is_passing(failure):
                    self._at.put(key, place)
                place += len(line)
        return place

    def find(self, key: str) -> Row | None:
        """The row of a request, None when it was not answered; one that failed in passing is known in this run only."""
        with self._lock:
            place = self._at.find(_number(key))
            if place is None:
                return None
            self._reader.seek(place)
            row: Row = json.loads(self._reader.readline())
        return row if row["key"] == key else None

    def append(self, row: Row) -> None:
        """Write one row in a single write; a kill afterwards does not lose it."""
        line = row_line(row).encode("utf-8")
        with self._lock:
            place = self._file.seek(0, 2)
            self._file.write(line)
            self._file.flush()
            self._at.put(_number(row["key"]), place)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        self._reader.close()


def _number(key: str) -> int:
    """64 bits of a key (hexadecimal)."""
    return int(key[:16], 16)
