"""Search, filter, sort and pages over the table of all features, from an index that is kept until the study changes."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from lorascope.addresses import GROUPS, group_of
from lorascope.errors import BadInput, MissingStage
from lorascope.features import KINDS
from lorascope.study import Study
from lorascope.token_text import vocabulary_text
from lorascope.views.feature_list import CLASSES, feature_table
from lorascope.views.kept import State, kept_once, stamp, study_state
from lorascope.views.one_feature import open_features, vocabulary_of
from lorascope.views.reading import Json, coded, explanations, path_of, plain, read_table

SORTS = {
    "strength": "strength",
    "kl": "KL when off",
    "detection": "detection score",
    "density": "share of tokens",
    "n_firing": "firings",
    "max": "largest activation",
    "think": "share in thinking",
    "answer": "share in answers",
    "id": "name",
}
"""What the table can be sorted by, and its name for readers."""
SHARES = {"think": "share_think", "answer": "share_answer"}
PAGE = 100
MOST_PER_PAGE = 500
LONGEST_QUERY = 200
TOP_TOKENS = 5


@dataclass(frozen=True)
class FeatureQuery:
    """What to show of the table."""

    q: str = ""
    """Words that must all occur in a feature's name, explanations, top tokens, notes or tags."""
    kind: str = ""
    type: str = ""
    """A matrix type, or a group of them: attn, mlp."""
    layer: str = ""
    class_: str = ""
    category: str = ""
    explained: str = ""
    """`yes`: some explainer has a text for it; `no`: none has."""
    few: str = ""
    """`yes`: too few firings to go by; `no`: enough."""
    sort: str = ""
    order: str = "falling"
    """`falling` or `rising`; features without a value come last either way."""
    page: int = 1
    size: int = PAGE


def find_features(
    study: Study,
    corpus: str,
    query: FeatureQuery,
    *,
    said: dict[str, str] | None = None,
    only: Collection[str] | None = None,
) -> Json:
    """One page of the features that a query finds.

    Args:
        said: more text to search by feature (notes, tags).
        only: leave out all other features (starred ones).

    Returns:
        `{"available", "corpus", "query", "total", "found", "pages", "page", "kinds", "types", "layers", "classes",
        "categories", "rows"}`; a
        row is that of `feature_table` with `"tokens"`: the commonest peak tokens of its strongest examples.

    Raises:
        BadInput: an unknown sort, order or value of a filter, or numbers that make no sense.
    """
    check_query(query)
    index = feature_index(study, corpus, study_state(study))
    if not index["available"]:
        return index
    check_known(query, index)
    words = query.q.lower().split()
    rows = [
        row
        for row, text in zip(index["rows"], index["texts"], strict=True)
        if matches(row, query)
        and (only is None or row["id"] in only)
        and all(word in text or word in (said or {}).get(row["id"], "") for word in words)
    ]
    rows = ordered(rows, query)
    pages = max(1, -(-len(rows) // query.size))
    page = min(query.page, pages)
    kept = {key: index[key] for key in ("available", "corpus", "kinds", "types", "layers", "classes", "categories")}
    shown = rows[(page - 1) * query.size : page * query.size]
    counts = {"total": len(index["rows"]), "found": len(rows), "pages": pages, "page": page}
    return kept | counts | {"query": vars(query) | {"page": page}, "rows": shown}


def check_query(query: FeatureQuery) -> None:
    """Raise BadInput for a query that makes no sense."""
    if query.sort and query.sort not in SORTS:
        raise BadInput(f"The table cannot be sorted by {query.sort!r}; choose from {', '.join(SORTS)}.")
    if query.order not in ("falling", "rising"):
        raise BadInput(f"The order is falling or rising, not {query.order!r}.")
    chosen = {"class": query.class_, "explained": query.explained, "few": query.few}
    for name, value in chosen.items():
        allowed = [str(number) for number in CLASSES] if name == "class" else ["yes", "no"]
        if value and value not in allowed:
            raise BadInput(f"The filter {name!r} is one of {', '.join(allowed)}, not {value[:40]!r}.")
    if query.page < 1 or not 1 <= query.size <= MOST_PER_PAGE:
        raise BadInput(f"Pages count from 1 and hold 1 to {MOST_PER_PAGE} rows.")
    if len(query.q) > LONGEST_QUERY:
        raise BadInput(f"A search may have at most {LONGEST_QUERY} characters.")


def check_known(query: FeatureQuery, index: Json) -> None:
    """Raise BadInput for a value of a filter that no feature of the study could have."""
    values = {
        "kind": (query.kind, list(KINDS)),
        "type": (query.type, [*GROUPS, *index["types"]]),
        "layer": (query.layer, [str(layer) for layer in index["layers"]]),
        "category": (query.category, index["categories"]),
    }
    for name, (value, known) in values.items():
        if value and value not in known:
            listed = ", ".join(known) or "none here"
            raise BadInput(f"There is no {name} {value[:40]!r} among the features; there are: {listed}.")


def matches(row: Json, query: FeatureQuery) -> bool:
    """Whether a row passes the filters."""
    return (
        (not query.kind or row["kind"] == query.kind)
        and (not query.type or row["type"] == query.type or group_of(row["type"] or "") == query.type)
        and (not query.layer or str(row["layer"]) == query.layer)
        and (not query.class_ or str(row["class"]) == query.class_)
        and (not query.category or row["category"] == query.category)
        and (not query.explained or row["explained"] == (query.explained == "yes"))
        and (not query.few or row["too_few"] == (query.few == "yes"))
    )


def ordered(rows: list[Json], query: FeatureQuery) -> list[Json]:
    """Rows in the wanted order: by default that of the study's columns (or, rising, the reverse of it). A KL under the
    noise floor is not ranked."""
    if not query.sort:
        return rows if query.order == "falling" else rows[::-1]
    if query.sort == "id":  # the index is in that order
        return rows if query.order == "rising" else rows[::-1]
    key = SHARES.get(query.sort, query.sort)
    ranked = [row[key] is not None and not (key == "kl" and row["kl_under_floor"]) for row in rows]
    known = [row for row, has in zip(rows, ranked, strict=True) if has]
    unknown = [row for row, has in zip(rows, ranked, strict=True) if not has]
    return sorted(known, key=lambda row: row[key], reverse=query.order == "falling") + unknown


@kept_once(maxsize=4)
def feature_index(study: Study, corpus: str, state: State) -> Json:
    """The table with top tokens and the text that a search looks through (of all explainers), of one state of the
    study."""
    table = feature_table(study, corpus)
    if not table["available"]:
        return table
    tokens: dict[str, list[str]] = {}
    for kind, count in table["kinds"].items():
        tokens |= top_tokens(study, corpus, kind) if count else {}
    said: dict[str, str] = {}
    for kind in table["kinds"]:
        for row in explanations(study, kind):
            said[row["feature"]] = f"{said.get(row['feature'], '')} {row.get('text') or ''}"
    rows = [row | {"tokens": tokens.get(row["id"], [])} for row in table["rows"]]
    types = list(dict.fromkeys(row["type"] for row in rows if row["type"]))
    layers = sorted({row["layer"] for row in rows if row["layer"] is not None})
    texts = [" ".join([row["id"], said.get(row["id"], ""), *row["tokens"]]).lower() for row in rows]
    classes = sorted({row["class"] for row in rows if row["class"] is not None})
    categories = sorted({row["category"] for row in rows if row["category"]})
    found = {"rows": rows, "texts": texts, "types": types, "layers": layers}
    return table | found | {"classes": classes, "categories": categories}


def top_tokens(study: Study, corpus: str, kind: str) -> dict[str, list[str]]:
    """The commonest peak tokens of every feature's strongest examples, at most `TOP_TOKENS` each."""
    path = path_of(study, f"examples/{corpus}/{kind}-examples.parquet")
    if not path:
        return {}
    try:
        store = open_features(study, corpus, kind).store
    except MissingStage:
        return {}
    table = read_table(path, *stamp(path))
    groups, names = coded(table, "where")
    top = groups == names.index("top") if "top" in names else np.zeros(len(groups), bool)
    codes, features = coded(table, "feature")
    trace, position = (plain(table, key)[top] for key in ("trace", "position"))
    ids = np.asarray(store.tokens[store.offsets[trace] + position], np.int64)
    pairs, counts = np.unique(codes[top].astype(np.int64) << 32 | ids, return_counts=True)
    pairs = pairs[np.lexsort((-counts, pairs >> 32))]
    of = pairs >> 32
    place = np.arange(len(of))
    first = np.maximum.accumulate(np.where(np.diff(of, prepend=-1) != 0, place, 0))  # of the feature's pairs
    shown = place - first < TOP_TOKENS
    texts = cache(partial(vocabulary_text, vocabulary_of(study)))
    found: dict[str, list[str]] = {}
    for code, token in zip(of[shown].tolist(), (pairs[shown] & 0xFFFFFFFF).tolist(), strict=True):
        found.setdefault(features[code], []).append(texts(token))
    return found
