"""What a study's state is, views kept in memory until it changes, and files that are of features it no longer has."""

import contextlib
from collections.abc import Callable
from functools import cache, lru_cache, wraps
from pathlib import Path
from threading import Lock, RLock
from typing import Any, ParamSpec, TypeVar

from lorascope.study import Study, is_shared

P = ParamSpec("P")
R = TypeVar("R")
State = tuple[tuple[str, int, int], ...]
MOST = 64
"""How many views are kept."""
FEATURE_FOLDERS = ("examples/", "reasoning/", "categories/", "lens/")
"""What stages say of single features."""
IDENTITY = ("adapter", "sae/sae_weights.safetensors", "scalars/")
"""Inputs that decide which features there are: an adapter or autoencoder made anew has others of the same names."""


def stamp(path: Path) -> tuple[int, int]:
    """Size and modification time: a cached reading is good while both stay."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def study_state(study: Study) -> State:
    """Name, size and time of the manifest, the summary and every folder of a stage: what a stage's end changes."""
    found = []
    for path in (study.path / "study.json", study.path / "summary.json", *sorted(study.path.glob("[!.]*/"))):
        with contextlib.suppress(OSError):  # being re-made
            found.append((path.name, *stamp(path)))
    return tuple(found)


def kept_once(maxsize: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """`lru_cache` whose value one thread computes while others that ask for the same wait, instead of all computing it.

    A value may be made of others kept so, as long as none is made of itself: threads then wait in one order.
    """

    def keep(function: Callable[P, R]) -> Callable[P, R]:
        cached = lru_cache(maxsize=maxsize)(function)
        lock_of = lru_cache(maxsize=4 * maxsize)(lambda *key: RLock())
        finding = Lock()

        @wraps(function)
        def kept(*args: P.args, **kwargs: P.kwargs) -> R:
            with finding:
                lock = lock_of(args, *sorted(kwargs.items()))
            with lock:
                return cached(*args, **kwargs)  # type: ignore[arg-type]  # a parameter specification is not Hashable

        return kept

    return keep


def kept_view(study: Study, view: Callable[..., Any], *arguments: Any) -> Any:
    """`view(study, *arguments)`, computed once per state of the study. Shared between callers: do not change it."""
    return remembered(view, study, arguments, study_state(study))


@kept_once(maxsize=MOST)
def remembered(view: Callable[..., Any], study: Study, arguments: tuple[Any, ...], state: State) -> Any:
    """`kept_view` of one state of the study."""
    return view(study, *arguments)


def of_other_features(study: Study) -> frozenset[str]:
    """Files of the study that say something of features it no longer has, by their stages' records."""
    files: set[str] = set()
    fingerprint = cache(study.fingerprint)
    for record in study.manifest["stages"].values():
        said = [name for name in record["outputs"] if name.startswith(FEATURE_FOLDERS)]
        if said and any(name.startswith(IDENTITY) for name in study.changes(record, fingerprint)[0]):
            files.update(name for name in said if not is_shared(name))
    return frozenset(files)
