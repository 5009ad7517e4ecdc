"""One table for every kind of feature: directions' polarities, latents, controls."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lorascope.addresses import direction_layer, direction_type
from lorascope.errors import RunFailed
from lorascope.explained import LEXICAL
from lorascope.features import KINDS, latent_weights
from lorascope.study import Study, read_json
from lorascope.views.ablation_tables import direction_kl
from lorascope.views.directions import open_directions
from lorascope.views.kept import kept_once, stamp
from lorascope.views.reading import (
    Json,
    coded,
    explanations,
    feature_rows,
    json_lines,
    missing,
    path_of,
    plain,
    read_table,
    ready,
    table_rows,
)

SHOWN_STATS = (
    "feature",
    "level",
    "density",
    "n_firing",
    "max",
    "p99",
    "mean",
    "share_prompt",
    "share_think",
    "share_answer",
)
CLASSES = {0: "specific and monosemantic", 1: "broad or noisy but consistent", 2: "polysemantic"}
"""What a judge's class of a feature means."""
TOO_FEW = 20
"""A feature with fewer firings than this on a corpus is marked as having too few examples."""


def feature_table(study: Study, corpus: str = "train") -> Json:
    """Every feature of a corpus that examples were searched for.

    Returns:
        `{"available", "corpus", "kinds": {kind: number}, "rows": [row]}`; a row has `id, kind, layer, type, polarity,
        level, density, n_firing, max, p99, mean, share_prompt, share_think, share_answer, too_few, kl (that of the
        whole direction), kl_under_floor, kl_method, strength, text, explainer, detection, detection_wrong, reason,
        explained, class, category`. `strength` ranks
        features of one kind: for latents the mean length of the effect they write per ordinary token, for
        others the mean activation while firing. `explained`: by any explainer; `class`: what a judge gave, or None.
    """
    rows: list[Json] = []
    for kind in KINDS:
        rows += kind_rows(study, corpus, kind)
    if not rows:
        return missing(study, f"the features of {corpus}", f"lorascope examples STUDY --corpus {corpus}")
    counts = {kind: sum(row["kind"] == kind for row in rows) for kind in KINDS}
    return {"available": True, "corpus": corpus, "kinds": counts, "rows": rows}


def kind_rows(study: Study, corpus: str, kind: str, only: Sequence[str] | None = None) -> list[Json]:
    """The rows of one kind, or `only` those of some features; none when its examples were not searched for."""
    file = f"examples/{corpus}/{kind}-stats.parquet"
    if only is None:
        stats = table_rows(study, file, SHOWN_STATS) or []
    else:
        found = [row for name in only for row in feature_rows(study, file, name) or []]
        stats = [{key: row[key] for key in SHOWN_STATS} for row in found]
    if not stats:
        return []
    kls = direction_kl(study) if kind == "direction" else {}
    norms = decoder_norms(study) if kind == "latent" else {}
    said = explanations(study, kind)
    explained, classes = shown_explanations(said), given_classes(said)
    any_text = {row["feature"] for row in said if row.get("text")}
    categories = {row["feature"]: row["category"] for row in json_lines(study, f"categories/{kind}.jsonl")}
    rows: list[Json] = []
    for stat in stats:
        feature = stat.pop("feature")
        where = feature_place(feature)
        kl = kls.get(str(where["address"]))
        weight = norms.get(feature, 1.0) * (stat["density"] if norms else 1.0)
        row = {"id": feature, "kind": kind} | where | stat
        row["too_few"] = stat["n_firing"] < TOO_FEW
        row["kl"] = kl["kl"]["value"] if kl and kl["kl"] else None
        row["kl_under_floor"] = bool(kl and kl["under_floor"])
        row["kl_method"] = kl["method"] if kl and kl["kl"] else None
        row["strength"] = stat["mean"] * weight
        row |= {"explained": feature in any_text, "class": classes.get(feature), "category": categories.get(feature)}
        rows.append(ready(row | short_scores(explained.get(feature))))
    return rows


def shown_explanations(rows: Iterable[Json]) -> dict[str, Json]:
    """The row of each feature that a table shows: all of one explainer, the lexical one where there is it."""
    by_explainer: dict[str, dict[str, Json]] = {}
    for row in rows:
        by_explainer.setdefault(row["explainer"], {})[row["feature"]] = row
    return by_explainer.get(LEXICAL) or next(iter(by_explainer.values()), {})


def given_classes(rows: Iterable[Json]) -> dict[str, int]:
    """The class of each feature that has one: that of the first judge who gave it any."""
    found: dict[str, int] = {}
    for row in rows:
        number = (row.get("class") or {}).get("class")
        if number is not None:
            found.setdefault(row["feature"], number)
    return found


def feature_kind(feature: str) -> str:
    """The kind that an id belongs to: `sae.17` latent, `base.L3.q+` base, `L3.q+` direction."""
    head = "latent" if feature.startswith("sae.") else feature.split(".")[0]
    return head if head in KINDS else "direction"


def feature_place(feature: str) -> Json:
    """`{"address", "layer", "type", "polarity"}` of a direction's polarity (or a control's); None each for a latent.

    A neuron (`neuron.L3.512+`) has a layer and no type.
    """
    kind = feature_kind(feature)
    if kind == "latent":
        return {"address": None, "layer": None, "type": None, "polarity": None}
    address = feature.removeprefix(f"{kind}.").rstrip("+-")
    return {
        "address": address,
        "layer": direction_layer(address),
        "type": None if kind == "neuron" else direction_type(address),
        "polarity": feature[-1],
    }


def short_scores(row: Json | None) -> Json:
    """Text and detection scores of an explanation's row, for a table."""
    scored = (row or {}).get("scored") or {}
    own, wrong = scored.get("detection"), scored.get("detection_wrong")
    return {
        "text": (row or {}).get("text"),
        "explainer": (row or {}).get("explainer"),
        "detection": own["value"] if own else None,
        "detection_wrong": wrong["value"] if wrong else None,
        "reason": (row or {}).get("reason"),
    }


def decoder_norms(study: Study) -> dict[str, float]:
    """Length of what each latent writes per unit of activation, in effect units."""
    decoder = decoder_effects(study)
    if decoder is None:
        return {}
    return {f"sae.{i}": length for i, length in enumerate(decoder.norms_F.tolist())}


@dataclass(frozen=True)
class Decoder:
    """The SAE's decoder in effect units (W_dec · s·‖b‖), and the length of each latent's row."""

    addresses: list[str]
    weights_FN: npt.NDArray[np.float32]
    norms_F: npt.NDArray[np.float32]


def decoder_effects(study: Study) -> Decoder | None:
    """The study's decoder; None without SAE or adapter."""
    weights = study.path / "sae" / "sae_weights.safetensors"
    adapter = study.path / "adapter" / "adapter_config.json"
    if not weights.is_file() or not adapter.is_file():
        return None
    return read_decoder(study, weights, stamp(weights), stamp(adapter))


@kept_once(maxsize=2)
def read_decoder(study: Study, weights: Path, *state: tuple[int, int]) -> Decoder:
    """`decoder_effects` of one state of the SAE's and the adapter's files."""
    adapter = open_directions(study)
    if adapter is None:
        raise RunFailed("The adapter is being made anew; reload the page.")
    weights_FN = latent_weights(study).W_dec_FN * adapter.effect_per_scalar
    return Decoder(adapter.addresses, weights_FN, np.linalg.norm(weights_FN, axis=1))


def sae_config(study: Study) -> Json:
    """The SAE's `cfg.json`, empty without one."""
    path = study.path / "sae" / "cfg.json"
    return dict(read_json(path)) if path.is_file() else {}


def strongest_directions(rows: list[Json], count: int) -> list[str]:
    """Addresses of the strongest directions: by KL above the floor where there is one, then by mean activation."""
    best: dict[str, tuple[float, float]] = {}
    for row in rows:
        if row["kind"] == "direction":
            kl = row["kl"] if row["kl"] is not None and not row["kl_under_floor"] else -1.0
            best[row["address"]] = max(best.get(row["address"], (-1.0, 0.0)), (kl, row["strength"] or 0.0))
    return sorted(best, key=lambda address: best[address], reverse=True)[:count]


def strongest_latents(study: Study, corpus: str, count: int) -> list[str] | None:
    """Ids of the latents that write most per ordinary token, those with too few examples left out; None before examples
    were searched for.

    From columns: making the rows of all would take most of a first page's time.
    """
    path = path_of(study, f"examples/{corpus}/latent-stats.parquet")
    table = read_table(path, *stamp(path)) if path else None
    if not table:
        return None
    codes, names = coded(table, "feature")
    mean, density, firings = (plain(table, key) for key in ("mean", "density", "n_firing"))
    norms = decoder_norms(study)
    weight = np.array([norms.get(name, 1.0) for name in names])[codes] * (density if norms else 1.0)
    order = np.argsort(-(mean * weight), kind="stable")
    return [names[code] for code in codes[order[firings[order] >= TOO_FEW][:count]].tolist()]
