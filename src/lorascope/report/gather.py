"""What the report shows, as one dict for its template: the views, and for each card its parts.

Shape legend: F features, T tokens.
"""

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorascope.errors import BadInput
from lorascope.study import Study
from lorascope.views import (
    ablation_view,
    category_view,
    comparison_view,
    direction_map,
    dropped,
    explanation_scores,
    feature_page,
    feature_table,
    lens_view,
    overview,
    provenance,
    reasoning_view,
    sae_page,
    trace_page,
    training_curves,
)
from lorascope.views.feature_list import strongest_directions, strongest_latents
from lorascope.views.one_trace import trace_features

Json = dict[str, Any]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class ReportConfig:
    """Write everything into one HTML file that works offline."""

    corpus: str = "train"
    """Corpus whose examples are shown."""
    trace_corpus: str = "heldout"
    """Corpus whose whole traces are shown (the other corpus when it is not recorded)."""
    directions: int = 24
    """Number of directions with a card: the strongest by KL, or by activation when nothing was ablated."""
    latents: int = 24
    """Number of latents with a card: those that write most."""
    examples: int = 5
    """Strongest examples per card and polarity."""
    per_quantile: int = 1
    """Examples per card, polarity and quantile of activation."""
    window: int = 24
    """Tokens shown on either side of an example."""
    traces: int = 6
    """Number of whole traces, drawn by seed."""
    trace_tokens: int = 1200
    """Most tokens shown of a whole trace."""


def gather(study: Study, config: ReportConfig, seed: int) -> Json:
    """All that the template needs.

    Raises:
        BadInput: a number below what makes sense.
    """
    if min(config.directions, config.latents, config.examples, config.per_quantile, config.traces) < 0:
        raise BadInput("--directions, --latents, --examples, --per-quantile and --traces must not be negative.")
    if config.window < 1 or config.trace_tokens < 1:
        raise BadInput("--window and --trace-tokens must be at least 1.")
    table = feature_table(study, config.corpus)
    rows = table.get("rows", [])
    by_id = {row["id"]: row for row in rows}
    directions = [direction_card(study, config, a, by_id) for a in strongest_directions(rows, config.directions)]
    latents = [card_page(study, config, name) for name in strongest_latents(study, config.corpus, config.latents) or []]
    pages = [side for card in directions for side in card["sides"]] + latents
    typical = {page["id"]: page["typical"] for page in pages if page["stats"] and page["stats"]["n_firing"]}
    return {
        "overview": overview(study),
        "curves": training_curves(study),
        "map": direction_map(study, config.corpus),
        "ablation": ablation_view(study),
        "scores": explanation_scores(study),
        "compare": comparison_view(study),
        "categories": category_view(study),
        "reasoning": either_corpus(study, config),
        "lens": lens_view(study),
        "sae": sae_page(study),
        "dropped": dropped(study),
        "made": provenance(study),
        "table": table,
        "texts": {row["id"]: row["text"] for row in rows if row["text"]},
        "cards": {page["id"]: f"card-{page['address'] or page['id']}" for page in pages},
        "kinds": table.get("kinds", {}),
        "directions": directions,
        "latents": latents,
        "traces": whole_traces(study, config, typical, by_id, seed),
        "config": config,
    }


def either_corpus(study: Study, config: ReportConfig) -> Json:
    """Reasoning features on the corpus of the whole traces or, where only that was scored, of the examples."""
    first, second = (reasoning_view(study, corpus) for corpus in (config.trace_corpus, config.corpus))
    return second if second["available"] and not first["available"] else first


def card_page(study: Study, config: ReportConfig, feature: str) -> Json:
    """A feature's page with as many examples as a card has room for."""
    return feature_page(
        study,
        feature,
        config.corpus,
        window=config.window,
        top=config.examples,
        per_quantile=config.per_quantile,
    )


def direction_card(study: Study, config: ReportConfig, address: str, by_id: dict[str, Json]) -> Json:
    """Both polarities of a direction, each a page of its own."""
    sides = [card_page(study, config, f"{address}{sign}") for sign in "+-" if f"{address}{sign}" in by_id]
    first = by_id[sides[0]["id"]]
    return {"address": address, "layer": first["layer"], "type": first["type"], "kl": sides[0]["kl"], "sides": sides}


def whole_traces(
    study: Study, config: ReportConfig, typical: dict[str, float], by_id: dict[str, Json], seed: int
) -> Json:
    """Whole traces with the activations of all features with a typical activation given, as bytes.

    Returns:
        `{"available", "corpus", "pages": [trace page], "data": {"features": [{"id", "label", "max", "level",
        "typical", "kind"}], "traces": [{"name", "codes": base64 of uint8 [F, T]}]}}`.
    """
    shown = list(typical)
    first = trace_page(study, config.trace_corpus, 0, limit=1)
    corpus = config.trace_corpus if first["available"] else config.corpus
    first = first if first["available"] else trace_page(study, corpus, 0, limit=1)
    if not first["available"] or not shown or not config.traces:
        return first | {"available": False, "pages": []}
    order = np.random.default_rng(seed).permutation(first["n_traces"])[: config.traces]
    chosen = sorted(int(i) for i in order)
    pages = [trace_page(study, corpus, i, limit=config.trace_tokens) for i in chosen]
    acts = [trace_features(study, corpus, page["index"], shown, len(page["tokens"])) for page in pages]
    typical_F = np.array([typical[name] for name in shown], np.float32)
    largest_F = np.array([by_id[name]["max"] or 0.0 for name in shown], np.float32)
    # a held-out activation may exceed the largest of the corpus whose examples are shown; what is not ordinary is
    # clipped to the largest of what is
    counted = [a_FT[:, ordinary(page)] for a_FT, page in zip(acts, pages, strict=True)]
    largest_F = np.max([largest_F, *(a_FT.max(axis=1, initial=0) for a_FT in counted)], axis=0)
    features = [
        feature_entry(by_id[name], float(most)) | {"typical": float(typical)}
        for name, most, typical in zip(shown, largest_F, typical_F, strict=True)
    ]
    traces = [
        {"name": page["id"], "codes": quantised(a_FT, typical_F, largest_F)}
        for page, a_FT in zip(pages, acts, strict=True)
    ]
    return {"available": True, "corpus": corpus, "pages": pages, "data": {"features": features, "traces": traces}}


def ordinary(page: Json) -> NDArray[np.bool_]:
    """The shown tokens of a trace's page that are neither template nor attention sinks, bool [T]."""
    ordinary_T = np.array(page["segments"]) != 0
    ordinary_T[page["sinks"]] = False
    return ordinary_T


def feature_entry(row: Json, most: float) -> Json:
    """One feature for the select box."""
    label = row["id"].replace("-", "−") + (f" · {row['text']}" if row["text"] else "")
    kind = "latent" if row["kind"] == "latent" else "plus" if row["polarity"] == "+" else "minus"
    return {"id": row["id"], "label": label, "max": most, "level": row["level"] or 0.0, "kind": kind}


def quantised(acts_FT: Floats, typical_F: Floats, largest_F: Floats) -> str:
    """Activations as base64 of uint8 [F, T]: 0 up to the typical one, 255 for the largest."""
    range_F1 = np.where(largest_F > typical_F, largest_F - typical_F, 1.0)[:, None]
    codes = np.ceil(255 * (acts_FT - typical_F[:, None]) / range_F1).clip(0, 255).astype(np.uint8)
    return base64.b64encode(codes.tobytes()).decode("ascii")
