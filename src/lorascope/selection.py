"""Keeping the best candidates of many features while a corpus streams by, with a limit per trace.

Shape legend: F features, K candidates kept per feature, M candidates in a list over all features.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
MERGE_AT = 1 << 19  # candidates held back before they are merged; a merge sorts them


@dataclass(frozen=True)
class Candidates:
    """Parallel lists [M]: at `position` of the corpus, in `trace`, `feature` has the activation `value`."""

    feature: Ints
    key: npt.NDArray[np.float64]
    """What is ranked, above 0: the activation itself, or a random number for a sample."""
    position: Ints
    trace: Ints
    value: npt.NDArray[np.float32]

    def take(self, index: npt.NDArray[np.bool_] | Ints) -> "Candidates":
        """Some of the candidates, in the order of `index`."""
        return Candidates(
            self.feature[index], self.key[index], self.position[index], self.trace[index], self.value[index]
        )


def join(parts: list[Candidates]) -> Candidates:
    """One list of candidates from several."""
    return Candidates(
        np.concatenate([p.feature for p in parts]),
        np.concatenate([p.key for p in parts]),
        np.concatenate([p.position for p in parts]),
        np.concatenate([p.trace for p in parts]),
        np.concatenate([p.value for p in parts]),
    )


def no_candidates() -> Candidates:
    """The empty list."""
    none = np.zeros(0, np.int64)
    return Candidates(none, np.zeros(0), none, none, np.zeros(0, np.float32))


def rank_in_runs(*keys: Ints) -> Ints:
    """For lists in which equal keys stand together: the place of each entry in its run, from 0."""
    n = len(keys[0])
    new = np.ones(n, bool)
    for key in keys:
        new[1:] &= key[1:] == key[:-1]
    new[1:] = ~new[1:]
    starts = np.flatnonzero(new)
    return np.arange(n) - np.repeat(starts, np.diff(np.append(starts, n)))


def best(candidates: Candidates, k: int, per_trace: int) -> Candidates:
    """Per feature the `per_trace` largest keys of each trace, and of these the k largest, by falling key.

    Of equal keys the earlier position comes first. Choosing from the chosen and new candidates together gives
    the same as choosing from all of them at once, so that a stream may be cut anywhere.
    """
    c = candidates.take(np.lexsort((candidates.position, -candidates.key, candidates.feature)))
    if per_trace < k:
        by_trace = np.lexsort((c.trace, c.feature))  # stable: within a trace still by falling key
        rank = np.empty(len(by_trace), np.int64)
        rank[by_trace] = rank_in_runs(c.feature[by_trace], c.trace[by_trace])
        c = c.take(rank < per_trace)
    return c.take(rank_in_runs(c.feature) < k)


class Selection:
    """The best k candidates of each feature so far, at most `per_trace` from one trace; memory O(features x k).

    Candidates must come by rising position. `bound_F` is the key that a new candidate must exceed to matter,
    `open_bound_F` the same for a candidate of the trace `open_trace`, the last one merged.
    """

    def __init__(self, features: int, k: int, per_trace: int) -> None:
        self.features, self.k, self.per_trace = features, k, per_trace
        self.bound_F = np.zeros(features)
        self.open_bound_F = np.zeros(features)
        self.open_trace = -1
        self._chosen = no_candidates()
        self._waiting: list[Candidates] = []
        self._count = 0

    def add(self, candidates: Candidates) -> None:
        """Offer candidates, of which those that cannot matter are dropped."""
        candidates = candidates.take(candidates.key > self.bound_F[candidates.feature])
        self._waiting.append(candidates)
        self._count += len(candidates.key)
        if self._count > MERGE_AT:
            self.merge()

    def merge(self) -> Candidates:
        """Choose among all candidates so far; returns them by feature, then falling key."""
        if self._count:
            self._chosen = best(join([self._chosen, *self._waiting]), self.k, self.per_trace)
            c = self._chosen
            full = rank_in_runs(c.feature) == self.k - 1
            self.bound_F[c.feature[full]] = c.key[full]
            self.open_trace = max(int(part.trace[-1]) for part in self._waiting if len(part.trace))
            mine = c.take(c.trace == self.open_trace)
            last = rank_in_runs(mine.feature) == self.per_trace - 1
            self.open_bound_F[:] = 0
            self.open_bound_F[mine.feature[last]] = mine.key[last]
        self._waiting, self._count = [], 0
        return self._chosen


def random_keys(seed: int, feature: Ints, position: Ints) -> npt.NDArray[np.float64]:
    """A number in (0, 1) for each pair, the same whenever and in whatever order it is asked for (splitmix64)."""
    with np.errstate(over="ignore"):
        x = position.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x += feature.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)
        x += np.uint64(seed % 2**63) * np.uint64(0x8CB92BA72F3D8DD7)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return ((x >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
