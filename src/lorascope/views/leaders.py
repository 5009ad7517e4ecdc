"""Features to begin with: the directions that matter most when off, and the latents that write most."""

from lorascope.study import Study
from lorascope.views.ablation_tables import COMMAND
from lorascope.views.feature_list import kind_rows, strongest_directions, strongest_latents
from lorascope.views.reading import Json, missing, ready

SHOWN = 8
KEPT = ("id", "text", "kl", "kl_method", "detection", "strength")


def leaders(study: Study) -> Json:
    """The first features of the training corpus by kind.

    Returns:
        `{"direction": {"available", "rows": [{"id", "text", "kl", "kl_method", "detection", "strength"}]}, "latent":
        the same}`, or what to run in place of rows; `strength` is that of `feature_table`. Directions stand by KL,
        those under the noise floor left out, each with its explained polarity; latents by the length of what they
        write.
    """
    return dict(ready({"direction": leading_directions(study), "latent": leading_latents(study)}))


def leading_directions(study: Study) -> Json:
    """The directions with the largest KL above the noise floor."""
    rows = kind_rows(study, "train", "direction")
    if not rows:
        return missing(study, "examples of directions", "lorascope examples STUDY --kinds direction")
    if all(row["kl"] is None for row in rows):
        return missing(study, "the KL of directions", COMMAND.format("direction"))
    ranked = [row for row in rows if row["kl"] is not None and not row["kl_under_floor"]]
    chosen = []
    for address in strongest_directions(ranked, SHOWN):
        sides = [row for row in ranked if row["address"] == address]
        chosen.append(min(sides, key=lambda row: (not row["text"], row["polarity"] != "+")))
    return shown(chosen)


def leading_latents(study: Study) -> Json:
    """The latents that write most per token."""
    names = strongest_latents(study, "train", SHOWN)
    if names is None:
        return missing(study, "examples of latents", "lorascope examples STUDY --kinds latent")
    return shown(kind_rows(study, "train", "latent", names))


def shown(rows: list[Json]) -> Json:
    """What a list of leaders says of each."""
    return {"available": True, "rows": [{key: row[key] for key in KEPT} for row in rows]}
