"""What kinds of things features encode: shares of categories, where their weight comes from, maps and clusters."""

from collections import Counter

from lorascope.explained import CATEGORIES, NO_ANSWER, NONE_FITS, WITHOUT
from lorascope.study import Study
from lorascope.views.feature_list import kind_rows
from lorascope.views.reading import Json, feature_lines, json_file, json_lines, missing, ready, table_rows

LABELS = {"latent": "latents", "direction": "directions", "base": "control: base model", "token": "tokens"}
SPACES = {
    "explanations": "by explanation",
    "decoder": "by decoder row",
    "coactivation": "by co-activation",
    "states": "by raw state",
    "categories": "categories",
}
MEMBERS = 8
"""Features listed per subcategory, the strongest."""
POINTS = 500
"""Features shown on a map, the strongest; tokens, evenly spaced."""


def category_view(study: Study) -> Json:
    """Categories of features, or what to run.

    Returns:
        `{"available", "outdated": command or None, "corpus", "by", "taxonomy", "categories": [{"name", "number",
        "description"}], "kinds": [{"kind", "label", "features", "firings", "traces", "relative", "rows": [share],
        "members": [group]}], "flow": {"rows", "unit", "relative", "latents"} or None, "maps": [map], "agreement":
        [{"kind", "one", "two", "value", "null_95", "p", "n", "same_words"}], "listed", "drawn"}`. A share is a row of
        `categories/shares.json` with its category's number and `anchor`, which tells where on a page its features are
        listed; a group is `{"category", "number", "anchor", "n", "subcategories": [{"name", "anchor", "n", "features":
        [{"id", "text", "reason", "score"}]}]}`; a map is `{"kind", "space", "label", "corpus", "total", "k",
        "silhouette", "rising", "left_out": [{"n", "why"}], "clusters", "points": [{"id", "x", "y", "number", "anchor",
        "segment", "cluster", "trace", "position", "said"}]}` with x and y from 0 to 1. Number 0 is for features without
        a category; `relative` tells whether what is written is measured against the base's own outputs, so that matrix
        types add up; `rising` is the most clusters tried where the silhouette is largest there; `listed` and `drawn`
        are the most features in a list and points in a map.
    """
    shares = json_file(study, "categories/shares.json")
    if shares is None:
        return missing(study, "the categories of features", "lorascope categorize STUDY")
    numbers = {entry["name"]: i for i, entry in enumerate(shares["categories"], start=1)}
    known = {kind: {row["id"]: row for row in kind_rows(study, shares["corpus"], kind)} for kind in shares["kinds"]}
    found = json_file(study, "categories/clusters.json") or {"spaces": [], "agreement": []}
    again = f"lorascope categorize {study.path} --corpus {shares['corpus']}"
    view = {key: shares[key] for key in ("corpus", "by", "taxonomy")} | {
        "available": True,
        "outdated": None if shares.get("method") == CATEGORIES else again,
        "categories": [entry | {"number": numbers[entry["name"]]} for entry in shares["categories"]],
        "kinds": [one_kind(study, kind, shares["kinds"][kind], numbers, known[kind]) for kind in shares["kinds"]],
        "flow": numbered_flow(study, numbers),
        "maps": [
            one_map(study, space, numbers, known.get(space["kind"], {}), found.get("enough"))
            | {"corpus": shares["corpus"]}
            for space in found["spaces"]
        ],
        "listed": MEMBERS,
        "drawn": POINTS,
        "agreement": [agreement_row(row) for row in found["agreement"]],
        "map_by": found.get("map"),
        "embed": found.get("embed"),
        "enough": found.get("enough"),
    }
    return dict(ready(view))


def feature_category(study: Study, kind: str, feature: str) -> Json | None:
    """One feature's row of `categories/KIND.jsonl`; None when features of its kind were not sorted into categories."""
    return next(iter(feature_lines(study, f"categories/{kind}.jsonl", feature)), None)


def one_kind(study: Study, kind: str, table: Json, numbers: dict[str, int], known: dict[str, Json]) -> Json:
    """Shares and members of one kind."""
    places = {(row["category"], row["subcategory"]): place for place, row in enumerate(table["rows"])}
    rows = [
        row
        | {"number": numbers.get(row["category"], 0)}
        | {"anchor": anchor_of(numbers, row["category"], row["subcategory"] and place)}
        for place, row in enumerate(table["rows"])
    ]
    assigned = json_lines(study, f"categories/{kind}.jsonl")
    kept = {key: table[key] for key in ("features", "firings", "traces")} | {"relative": bool(table.get("relative"))}
    names = [*numbers, NONE_FITS, NO_ANSWER, WITHOUT]
    members = [group_of(name, numbers, assigned, known, places) for name in names]
    return {"kind": kind, "label": LABELS.get(kind, kind), "rows": rows, "members": members} | kept


def anchor_of(numbers: dict[str, int], category: str, place: int | None = None) -> str:
    """The end of the address of a category's list: its number, for what has none its outcome, and for a subcategory its
    place among the rows of shares."""
    name = str(numbers[category]) if category in numbers else category.replace(" ", "-")
    return name if place is None else f"{name}-{place}"


def group_of(
    name: str,
    numbers: dict[str, int],
    assigned: tuple[Json, ...],
    known: dict[str, Json],
    places: dict[tuple[str, str | None], int],
) -> Json:
    """The features of one category (or of an outcome without one) by subcategory, the strongest of each."""
    inside = [row for row in assigned if name in (row["category"], row["outcome"])]
    strength = {row["feature"]: known.get(row["feature"], {}).get("strength") or 0.0 for row in inside}
    subcategories: list[Json] = []
    for sub, count in Counter(row["subcategory"] for row in inside).most_common():
        own = sorted((row for row in inside if row["subcategory"] == sub), key=lambda row: -strength[row["feature"]])
        listed = [
            {
                "id": row["feature"],
                "text": known.get(row["feature"], {}).get("text"),
                "reason": row["reason"],
                "score": row["score"],
            }
            for row in own[:MEMBERS]
        ]
        anchor = anchor_of(numbers, name, places[name, sub] if sub else None)
        subcategories.append({"name": sub, "anchor": anchor, "n": count, "features": listed})
    about = {"category": name, "number": numbers.get(name, 0), "anchor": anchor_of(numbers, name)}
    return about | {"n": len(inside), "subcategories": subcategories}


def numbered_flow(study: Study, numbers: dict[str, int]) -> Json | None:
    """The rows of `categories/flow.json` with their category's number; None without latents."""
    flow = json_file(study, "categories/flow.json")
    if flow is None or not any(row["weight"] > 0 for row in flow["rows"]):
        return None
    rows = [row | {"number": numbers.get(row["category"], 0)} for row in flow["rows"] if row["weight"] > 0]
    return dict(flow | {"rows": rows, "relative": bool(flow.get("relative"))})


def one_map(study: Study, space: Json, numbers: dict[str, int], known: dict[str, Json], enough: int | None) -> Json:
    """One space's map with its strongest points."""
    rows = [
        row
        for row in table_rows(study, "categories/maps.parquet") or []
        if (row["kind"], row["space"]) == (space["kind"], space["space"])
    ]
    low = {axis: min((row[axis] for row in rows), default=0.0) for axis in "xy"}
    high = {axis: max((row[axis] for row in rows), default=1.0) for axis in "xy"}
    rows = sorted(rows, key=lambda row: -(known.get(row["feature"], {}).get("strength") or 0.0))
    rows = rows[:POINTS] if known else rows[:: max(1, -(-len(rows) // POINTS))]
    outcomes = {row["feature"]: row["outcome"] for row in json_lines(study, f"categories/{space['kind']}.jsonl")}
    points = [point_of(row, numbers, known, outcomes) for row in rows]
    for point, row in zip(points, rows, strict=True):
        point |= {axis: (row[axis] - low[axis]) / (high[axis] - low[axis] or 1.0) for axis in "xy"}
    values = space["silhouettes"]
    label = f"{LABELS.get(space['kind'], space['kind'])} {SPACES.get(space['space'], space['space'])}"
    return {
        "kind": space["kind"],
        "space": space["space"],
        "label": label[0].upper() + label[1:],
        "total": space["points"],
        "k": space["k"],
        "silhouette": values.get(str(space["k"])),
        "rising": rising(values),
        "left_out": left_out(space, enough),
        "clusters": space["clusters"],
        "points": points,
    }


def rising(silhouettes: Json) -> int | None:
    """The most clusters tried, where their silhouette is the largest of all: more may fit better still."""
    most = max(map(int, silhouettes), default=None)
    return most if most and silhouettes[str(most)] >= max(silhouettes.values()) else None


def left_out(space: Json, enough: int | None) -> list[Json]:
    """Features of a kind that are not on a map, `{"n", "why"}` for each reason."""
    reasons = {
        "too_few_firings": f"fire on fewer than {enough} tokens",
        "without_explanation": "have no explanation's words",
    }
    return [{"n": space[key], "why": why} for key, why in reasons.items() if space.get(key)]


def point_of(row: Json, numbers: dict[str, int], known: dict[str, Json], outcomes: dict[str, str]) -> Json:
    """What a point is and says."""
    if row["feature"] is None:
        where = f"token {row['position']} of trace {row['trace']}"
        kept = {key: row[key] for key in ("segment", "cluster", "trace", "position")}
        said = f"{row['text']!r}, {row['segment']}, {where}, cluster {row['cluster'] + 1}"
        return {"id": None, "number": None, "anchor": None, "said": said} | kept
    text = known.get(row["feature"], {}).get("text") or "not explained"
    said = f"{row['feature']}: {row['category'] or 'no category'}, cluster {row['cluster'] + 1}; {text}"
    place: Json = {"anchor": anchor_of(numbers, row["category"] or outcomes.get(row["feature"], NONE_FITS))}
    place |= dict.fromkeys(("segment", "trace", "position"))
    number = numbers.get(row["category"] or "", 0)
    return {"id": row["feature"], "number": number, "cluster": row["cluster"], "said": said} | place


def agreement_row(row: Json) -> Json:
    """One comparison with its names in words."""
    words: Json = {"kind": LABELS.get(row["kind"], row["kind"])}
    # both come from the explanations, so that they agree whatever the features do
    words["same_words"] = {row["one"], row["two"]} == {"explanations", "categories"}
    return row | words | {name: SPACES.get(row[name], row[name]) for name in ("one", "two")}
