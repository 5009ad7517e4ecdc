"""Statistics of the effects that maps show: measured in the background, once for every state of a recording."""

import contextlib
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorascope.errors import BadInput, RunFailed
from lorascope.store import INDEX, store_folder
from lorascope.study import Study
from lorascope.views.effects import direction_effects, kept_effects, store_stamp

Effects = dict[str, list[Any]]


@dataclass
class Measurement:
    """One reading of a whole store, in a thread of its own."""

    effects: Effects | None = None
    """What was found; kept here too, for a study that cannot be written to."""
    trouble: str | None = None
    """Why nothing was found."""

    @property
    def running(self) -> bool:
        """Whether the reading has not ended yet."""
        return self.effects is None and self.trouble is None


begun: dict[tuple[Path, str, str], Measurement] = {}
"""By study, corpus and stamp of the store: what was measured before is never measured again."""
lock = threading.Lock()


def known_effects(study: Study, corpus: str) -> Effects | None:
    """The effects of a corpus's directions if they have been measured; None otherwise. It measures nothing."""
    if kept := kept_effects(study, corpus):
        return kept
    found = begun.get(key_of(study, corpus))
    return found.effects if found else None


def measure(study: Study, corpus: str) -> Measurement | None:
    """The measurement of a recorded corpus, begun in the background if it was not; None where there is nothing to do.

    The corpus must be one of the study's; one that is not recorded has nothing to measure.
    """
    if not is_recorded(study, corpus) or kept_effects(study, corpus):
        return None
    key = key_of(study, corpus)
    with lock:
        if key in begun:
            return begun[key]
        found = begun[key] = Measurement()
    threading.Thread(target=work, args=(study, corpus, found), daemon=True).start()
    return found


def work(study: Study, corpus: str, found: Measurement) -> None:
    """Measure, and say what went wrong: a page that waits for it has nobody else to ask."""
    try:
        found.effects = direction_effects(study, corpus)
    except (BadInput, RunFailed) as error:
        found.trouble = str(error)
    except Exception as error:
        found.trouble = f"The recording could not be read ({type(error).__name__}: {error})."


def is_recorded(study: Study, corpus: str) -> bool:
    """Whether the adapter's scalars on a corpus are recorded."""
    return (store_folder(study.path, corpus, "adapter") / INDEX).is_file()


def key_of(study: Study, corpus: str) -> tuple[Path, str, str]:
    """What a measurement is of."""
    with contextlib.suppress(BadInput, RunFailed, OSError):  # being re-made: then there is nothing to look up
        return study.path.resolve(), corpus, store_stamp(store_folder(study.path, corpus, "adapter"))
    return study.path.resolve(), corpus, ""
