"""Views kept in memory until their study changes, for a server that answers many requests."""

import contextlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from lorascope.study import Study
from lorascope.views.reading import stamp

State = tuple[tuple[str, int, int], ...]
MOST = 64
"""How many views are kept."""


def study_state(study: Study) -> State:
    """Name, size and time of the manifest, the summary and every folder of a stage: what a stage's end changes."""
    found = []
    for path in (study.path / "study.json", study.path / "summary.json", *sorted(study.path.glob("[!.]*/"))):
        with contextlib.suppress(OSError):  # being re-made
            found.append((path.name, *stamp(path)))
    return tuple(found)


def kept_view(study: Study, view: Callable[..., Any], *arguments: Any) -> Any:
    """`view(study, *arguments)`, computed once per state of the study. Shared between callers: do not change it."""
    return remembered(view, study, arguments, study_state(study))


@lru_cache(maxsize=MOST)
def remembered(view: Callable[..., Any], study: Study, arguments: tuple[Any, ...], state: State) -> Any:
    """`kept_view` of one state of the study."""
    return view(study, *arguments)
