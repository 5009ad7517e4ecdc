"""Every request to a judge and what came back, as append-only JSON Lines keyed by the content of the request.

So a cut-off run pays for nothing twice and a finished one replays without network or key. In memory is only where each
line starts: 16 bytes a request, and about 130 for each of the last ones.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path

from lorascope.errors import RunFailed
from lorascope.explain.places import Places, key_number
from lorascope.explain.rows import Row, row_line

PASSING = ("HTTP 408", "HTTP 409", "HTTP 429", "HTTP 5", "time-out", "no connection", "no chat completion")
"""How the reasons of failures begin that may be gone on the next run; all others are final."""
TRUNCATED = "truncated"
"""The reason of an answer that ended at the most tokens of one, before it could be read."""


def is_passing(reason: str) -> bool:
    """Whether a failure may be gone when the same is asked on another run."""
    return reason.startswith(PASSING)


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
                    key, failure = key_number(row["key"]), row["failure"]
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
            place = self._at.find(key_number(key))
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
            self._at.put(key_number(row["key"]), place)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        self._reader.close()
