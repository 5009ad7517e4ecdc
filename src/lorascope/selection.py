"""Keeping the best candidates of many features while a corpus streams by, with a limit per trace.

Shape legend: F features, K candidates kept per feature, M candidates in a list over all features.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
MERGE_AT = 1 << 18  # candidates held back before they are merged; a merge sorts them


@dataclass(frozen=True)
class Candidates:
    """Parallel lists [M]: at `position` of the corpus, in `trace`, `feature` has the activation `value`."""

    feature: Ints
    key: npt.NDArray[np.uint32]
    """What is ranked, above 0: the activation's bits (`activation_keys`), or a random number for a sample."""
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
    return Candidates(none, np.zeros(0, np.uint32), none, none, np.zeros(0, np.float32))


def rank_in_runs(*keys: Ints) -> Ints:
    """For lists in which equal keys stand together: the place of each entry in its run, from 0."""
    n = len(keys[0])
    new = np.ones(n, bool)
    for key in keys:
        new[1:] &= key[1:] == key[:-1]
    new[1:] = ~new[1:]
    starts = np.flatnonzero(new)
    return np.arange(n) - np.repeat(starts, np.diff(np.append(starts, n)))


def falling(feature: Ints, key: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint64]:
    """Numbers that sort by feature, then by falling key."""
    return (feature.astype(np.uint64) << np.uint64(32)) | (np.uint32(0xFFFFFFFF) - key)


def best(candidates: Candidates, k: int, per_trace: int) -> Candidates:
    """Per feature the `per_trace` largest keys of each trace, and of these the k largest, by falling key.

    Of equal keys the candidate that comes first in the list is the better. Choosing from the chosen and new
    candidates together gives the same as choosing from all at once, so a stream may be cut anywhere.
    """
    c = candidates.take(np.argsort(falling(candidates.feature, candidates.key), kind="stable"))
    if per_trace < k:
        both = (c.feature << 32) | c.trace
        by_trace = np.argsort(both, kind="stable")  # within a trace still by falling key
        rank = np.empty(len(by_trace), np.int64)
        rank[by_trace] = rank_in_runs(both[by_trace])
        c = c.take(rank < per_trace)
    return c.take(rank_in_runs(c.feature) < k)


class Selection:
    """The best k candidates of each feature so far, at most `per_trace` from one trace; memory O(features x k).

    Candidates must come by rising position, so that ties go to the earlier token. A new candidate matters only
    if its key is above `bound_F`.
    """

    def __init__(self, features: int, k: int, per_trace: int) -> None:
        self.k, self.per_trace = k, per_trace
        self.bound_F = np.zeros(features, np.uint32)
        self._chosen = no_candidates()
        self._waiting: list[Candidates] = []
        self._count = 0

    def add(self, candidates: Candidates) -> None:
        """Offer candidates; those that cannot matter are dropped."""
        candidates = candidates.take(np.flatnonzero(candidates.key > self.bound_F[candidates.feature]))
        self._waiting.append(candidates)
        self._count += len(candidates.key)
        if self._count > max(MERGE_AT, len(self._chosen.key)):
            self.merge()

    def merge(self) -> Candidates:
        """Choose among all candidates so far; returns them by feature, then falling key."""
        if self._count:
            c = self._chosen = best(join([self._chosen, *self._waiting]), self.k, self.per_trace)
            full = np.flatnonzero(rank_in_runs(c.feature) == self.k - 1)
            self.bound_F[c.feature[full]] = c.key[full]
        self._waiting, self._count = [], 0
        return self._chosen


def activation_keys(value: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
    """Keys in the order of activations >= 0: their bits."""
    return value.view(np.uint32)


def random_keys(seed: int, feature: Ints, position: Ints) -> npt.NDArray[np.uint32]:
    """A random number from 1 up for each pair, the same whenever and in whatever order asked (splitmix64)."""
    with np.errstate(over="ignore"):
        x = position.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x += feature.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)
        x += np.uint64(seed % 2**63) * np.uint64(0x8CB92BA72F3D8DD7)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return np.maximum((x >> np.uint64(32)).astype(np.uint32), 1)
