"""Statistics of every direction's effect on a corpus: one reading of the store, kept for the next view.

Shape legend: T tokens, N directions.
"""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorascope.store import INDEX, Store, store_folder
from lorascope.study import Study, digest, read_json, write_json

CACHE = ".views"
"""Folder in the study for what can be computed again; names with a dot are no stage's input."""
VERSION = 2
"""Part of the stamp of what is kept: raise it when the statistics change."""


def direction_effects(study: Study, corpus: str, source: str = "adapter") -> dict[str, list[Any]]:
    """Per direction, over ordinary tokens: `{"address", "rms", "mean", "median", "participation"}`, lists of N.

    `rms`, `mean` and `median` are of the effect s·‖b‖·z, the median that of `Store.medians`. `participation` is
    (E|e|)² / E[e²]: 1 when |e| is the same on every token, 2/π = 0.64 for a Gaussian, near 0 when few tokens carry
    everything; None for a direction that is always 0.

    Raises:
        MissingStage: the corpus is not recorded.
    """
    store = Store.open(store_folder(study.path, corpus, source))
    if kept := kept_effects(study, corpus, source):
        return kept
    of = store_stamp(store.folder)  # before the reading: a store made anew meanwhile is another one
    columns = measure_effects(store)
    with contextlib.suppress(OSError):  # a study that cannot be written to can still be looked at
        write_json(cache_file(study, corpus, source), {"of": of, "columns": columns})
    return columns


def kept_effects(study: Study, corpus: str, source: str = "adapter") -> dict[str, list[Any]] | None:
    """What `direction_effects` measured before, if the store is still the same; None otherwise."""
    cache = cache_file(study, corpus, source)
    if not (store_folder(study.path, corpus, source) / INDEX).is_file():
        return None  # its files were removed: what was measured is of nothing
    kept = read_json(cache) if cache.is_file() else {}
    same = kept and kept.get("of") == store_stamp(store_folder(study.path, corpus, source))
    return dict(kept["columns"]) if same else None


def cache_file(study: Study, corpus: str, source: str) -> Path:
    """Where the statistics of a store are kept."""
    return study.path / CACHE / f"effects-{corpus}-{source}.json"


def store_stamp(folder: Path) -> str:
    """What the statistics are of: this version of them, on this store."""
    return digest([VERSION, read_json(folder / INDEX)])


def measure_effects(store: Store) -> dict[str, list[Any]]:
    """The statistics of `direction_effects`, computed."""
    n = len(store.addresses)
    total_N, absolute_N, square_N = np.zeros(n), np.zeros(n), np.zeros(n)
    ordinary_T = store.ordinary
    count = int(ordinary_T.sum())
    for start, z_TN in store.chunks():
        effect_TN = z_TN[ordinary_T[start : start + len(z_TN)]].astype(np.float64) * store.effect_per_scalar
        total_N += effect_TN.sum(0)
        absolute_N += np.abs(effect_TN).sum(0)
        square_N += np.square(effect_TN).sum(0)
    size = max(count, 1)
    return {
        "address": list(store.addresses),
        "rms": np.sqrt(square_N / size).tolist(),
        "mean": (total_N / size).tolist(),
        "median": (store.medians * store.effect_per_scalar).tolist(),
        "participation": participation(absolute_N / size, square_N / size),
    }


def participation(absolute_N: npt.NDArray[np.float64], square_N: npt.NDArray[np.float64]) -> list[float | None]:
    """(E|e|)² / E[e²] of each direction."""
    return [float(a * a / s) if s > 0 else None for a, s in zip(absolute_N, square_N, strict=True)]
