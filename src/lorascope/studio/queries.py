"""What an address asks for beside its path. Names and values that make no sense are the asker's mistake: status 400."""

import contextlib
from collections.abc import Collection, Iterator, Mapping

from lorascope.errors import BadInput, MissingStage
from lorascope.study import Study
from lorascope.views.firing import check_corpus

Query = Mapping[str, str]


class BadQuery(BadInput):
    """A name or a value of an address's query makes no sense; the message says which."""


@contextlib.contextmanager
def asked() -> Iterator[None]:
    """What is wrong here is wrong with the query."""
    try:
        yield
    except MissingStage:
        raise
    except BadInput as error:
        raise BadQuery(str(error)) from error


def check_names(query: Query, known: Collection[str]) -> None:
    """Raise BadQuery for a name that an address does not take; a token that nobody asks for is let be."""
    if unknown := sorted(set(query) - set(known) - {"token"}):
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise BadQuery(f"This address takes no {unknown[0][:40]!r} after its question mark; {takes}.")


def choice(query: Query, name: str, allowed: Collection[str]) -> str:
    """One of a few values, "" where the query does not say."""
    value = query.get(name, "")
    if value and value not in allowed:
        raise BadQuery(f"{name} is one of {', '.join(allowed)}, not {value[:40]!r}.")
    return value


def chosen_corpus(study: Study, query: Query) -> str:
    """The corpus that a query names, the training corpus by default."""
    corpus = query.get("corpus") or "train"
    if corpus != "train":
        with asked():
            check_corpus(study, corpus)
    return corpus


def whole_number(text: str, what: str) -> int:
    """A number from an address.

    Raises:
        BadInput: it is none.
    """
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise BadInput(f"{what} must be a whole number, 0 or more, not {text[:40]!r}.")
    return int(text)


def listed_features(query: Query, most: int) -> list[str]:
    """The features that a query lists, comma-separated, each once."""
    names = list(dict.fromkeys(name for name in query.get("features", "").split(",") if name))
    if len(names) > most:
        raise BadQuery(f"At most {most} features can be shown together.")
    return names
