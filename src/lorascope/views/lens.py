"""The lens of a feature: the tokens that it writes towards and reads, from `lorascope lens`."""

from lorascope.study import Study
from lorascope.views.reading import Json, feature_rows, missing, path_of, ready

LENS = "lens/lens.parquet"
SHOWN = 8
BEYOND = 0.05
"""A vector whose largest value is reached by more random vectors than this is marked as no more than random."""


def lens_view(study: Study) -> Json:
    """What the lens covers: `{"available", "features", "directions_elsewhere", "sides": {side: {"features",
    "beyond_random", "by_chance", "random_largest"}}}`.

    `beyond_random` is not corrected for the number of vectors; `by_chance` is how many would be counted if none did
    more than random ones.
    """
    record = study.manifest["stages"].get("lens")
    if record is None or not path_of(study, LENS):
        return missing(study, "the lens", "lorascope lens STUDY")
    found = record["result"]
    sides = {name: side | {"by_chance": BEYOND * side["features"]} for name, side in found["sides"].items()}
    return dict(ready({"available": True} | found | {"sides": sides}))


def feature_lens(study: Study, feature: str, *, shown: int = SHOWN) -> list[Json]:
    """One entry per side of a feature in the residual stream, none where it has none or the lens was not run.

    Returns:
        `[{"side": "write" or "read", "norm", "tokens": [{"text", "value"}], "bottom": [..], "random_share",
        "beyond_random"}]`; values are of the vector at length 1, largest first, at the bottom smallest first.
    """
    rows = feature_rows(study, LENS, feature) or []
    return [
        {
            "side": row["side"],
            "norm": row["norm"],
            "tokens": listed(row, "", shown),
            "bottom": listed(row, "bottom_", shown),
            "random_share": row["random_share"],
            "beyond_random": row["random_share"] <= BEYOND,
        }
        for row in rows
    ]


def listed(row: Json, end: str, shown: int) -> list[Json]:
    """The first tokens of one end."""
    pairs = zip(row[f"{end}tokens"][:shown], row[f"{end}values"][:shown], strict=True)
    return [{"text": text, "value": value} for text, value in pairs]
