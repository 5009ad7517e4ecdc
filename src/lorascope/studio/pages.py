"""What each page shows: functions from a study and an address's parts to a JSON-ready dict.

A page and its JSON twin are made from the same dict. None of them reads a whole store.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lorascope.errors import BadInput, MissingStage
from lorascope.studio.live import LONGEST_PROMPT, MOST_FEATURES, RUNS, WEIGHTS, sample_prompts
from lorascope.studio.measuring import is_recorded, known_effects, measure
from lorascope.studio.notes import FILE, Note, as_shown, current_notes, read_events, searchable
from lorascope.studio.queries import BadQuery, asked, check_names, choice, chosen_corpus, listed_features, whole_number
from lorascope.study import Study, digest
from lorascope.views import (
    ablation_view,
    category_view,
    comparison_view,
    direction_map,
    dropped,
    explanation_scores,
    feature_page,
    lens_view,
    overview,
    provenance,
    reasoning_view,
    sae_page,
    training_curves,
)
from lorascope.views.control_scores import control_means
from lorascope.views.directions import open_directions
from lorascope.views.feature_list import feature_kind, feature_place
from lorascope.views.feature_search import SORTS, FeatureQuery, feature_index, find_features
from lorascope.views.firing import check_corpus, coloured_trace, fires_here, known_column, trace_list
from lorascope.views.interactions import interaction_matrix
from lorascope.views.kept import kept_view, study_state
from lorascope.views.leaders import leaders
from lorascope.views.maps import class_grid, score_grid
from lorascope.views.nearby import nearby
from lorascope.views.one_feature import column_of, open_features

Json = dict[str, Any]
Parts = Mapping[str, str]
FEW, FEW_PER_QUANTILE = 10, 2
"""Examples shown until all are asked for."""
MOST_COMPARED = 4
FEW_LATENTS = 4
"""Latents whose pages the map leads to."""


@dataclass(frozen=True)
class Page:
    """An address with its template and the function that makes its content."""

    path: str
    template: str
    view: Callable[[Study, Parts, Parts], Json]
    """(study, parts of the path, parts of the query) to the page's content."""
    asks: tuple[str, ...] = ()
    """The names that its query may have."""
    twin: str = ""
    """The address of the JSON twin (default: the path with .json)."""

    @property
    def json_path(self) -> str:
        """The address of its JSON."""
        return self.twin or f"{self.path}.json"

    def content(self, study: Study, path: Parts, query: Parts) -> Json:
        """What it shows.

        Raises:
            BadQuery: the query has a name or a value that makes no sense.
        """
        check_names(query, self.asks)
        return self.view(study, path, query)


def overview_page(study: Study, path: Parts, query: Parts) -> Json:
    """What the study is and found, its training, and what was left out."""
    views = {"overview": overview, "leaders": leaders, "curves": training_curves, "sae": sae_page, "dropped": dropped}
    return {name: kept_view(study, view) for name, view in views.items()} | {"notes": notes_at(study, ["study"])}


def evidence_page(study: Study, path: Parts, query: Parts) -> Json:
    """Whether explanations hold and against what, reasoning features, how good the SAE is, how all of it was made."""
    views = {"overview": overview, "scores": explanation_scores, "compare": comparison_view, "sae": sae_page}
    shown = {
        "reasoning": reasoning_found(study),
        "made": kept_view(study, provenance),
        "texts": kept_view(study, reasoning_texts),
    }
    return {name: kept_view(study, view) for name, view in views.items()} | shown


def reasoning_found(study: Study) -> Json:
    """Reasoning features on the held-out corpus or, where only that was scored, on the training corpus."""
    first = kept_view(study, reasoning_view, "heldout")
    second = first if first["available"] else kept_view(study, reasoning_view, "train")
    return dict(second if second["available"] else first)


def reasoning_texts(study: Study) -> dict[str, str]:
    """Explanations of the reasoning features that are shown."""
    shown = {row["feature"] for kind in reasoning_found(study).get("kinds", []) for row in kind["rows"]}
    rows = feature_index(study, "train", study_state(study)).get("rows", [])
    return {row["id"]: row["text"] for row in rows if row["id"] in shown and row["text"]}


def categories_page(study: Study, path: Parts, query: Parts) -> Json:
    """What kinds of things features encode."""
    return {"categories": kept_view(study, category_view)}


def map_page(study: Study, path: Parts, query: Parts) -> Json:
    """The layer × type maps, ablation, the first latents; what maps need of a whole recording is measured meanwhile."""
    corpus = chosen_corpus(study, query)
    waiting = measure(study, corpus)  # first: what ends after it is known to the next line
    known = known_effects(study, corpus) is not None
    # What ends from here on is not on this page, which has to be made anew for it.
    trouble = waiting.trouble if waiting else None
    measuring = {"running": bool(waiting and not known and not trouble), "trouble": None if known else trouble}
    pairs = kept_view(study, interaction_matrix)
    return {
        "map": kept_view(study, scored_map, corpus, known),
        "corpus": corpus,
        "corpora": study.corpora(),
        "measuring": measuring,
        "ablation": kept_view(study, ablation_view),
        "interactions": {name: value for name, value in pairs.items() if name != "cosines"},
        "latents": [row["id"] for row in kept_view(study, leaders)["latent"].get("rows", [])[:FEW_LATENTS]],
    }


def measured_page(study: Study, path: Parts, query: Parts) -> Json:
    """Whether a corpus is still being measured."""
    measured = measure(study, chosen_corpus(study, query))
    return {"running": bool(measured and measured.running), "trouble": measured.trouble if measured else None}


def interactions_page(study: Study, path: Parts, query: Parts) -> Json:
    """The matrix of interactions, which is too large to be a part of the map's page."""
    return dict(kept_view(study, interaction_matrix))


def scored_map(study: Study, corpus: str, measured: bool) -> Json:
    """The layer × type maps with those of detection scores and classes; those of effects only once these are known."""
    map_ = direction_map(study, corpus, effects_of=known_effects if measured else lambda *_: None)
    if map_["available"]:
        rows = feature_index(study, corpus, study_state(study)).get("rows", [])
        map_["grids"] += [score_grid(study, map_, rows), class_grid(study, map_, rows)]
    return map_


def features_page(study: Study, path: Parts, query: Parts) -> Json:
    """The table of features."""
    corpus = chosen_corpus(study, query)
    given: dict[str, Any] = {name: query[key] for key, name in FILTERS.items() if query.get(key)}
    notes = current_notes(read_events(study.path / FILE)[0])
    only, tag = choice(query, "only", ("starred",)), query.get("tag", "")
    with asked():
        for name in {"page", "size"} & set(given):
            given[name] = whole_number(given[name], name.capitalize())
        noted = noted_as(notes, only == "starred", tag)
        found = find_features(study, corpus, FeatureQuery(**given), said=searchable(notes), only=noted)
    places = {name: f"feature:{name}" for name in (row["id"] for row in found.get("rows", []))}
    labels = {name: as_shown(study, notes[place]) for name, place in places.items() if place in notes}
    shown = {name: {key: note[key] for key in ("label", "star", "tags", "moved")} for name, note in labels.items()}
    tags = sorted({name for place, note in notes.items() if place.startswith("feature:") for name in note.tags})
    chosen = {"only": only, "tag": tag, "tags": tags, "study": study_name(study)}
    return found | chosen | {"notes": shown, "sorts": SORTS, "corpora": study.corpora()}


def noted_as(notes: Mapping[str, Note], starred: bool, tag: str) -> set[str] | None:
    """The features whose notes have a star or a tag; None where neither is asked for."""
    if not starred and not tag:
        return None
    wanted = [place for place, note in notes.items() if (note.star or not starred) and (not tag or tag in note.tags)]
    return {place.removeprefix("feature:") for place in wanted if place.startswith("feature:")}


def study_name(study: Study) -> str:
    """Under what name a browser keeps what was chosen of this study: others may be served from the same port."""
    return digest(str(study.path.resolve()))[:12]


def feature_view(study: Study, path: Parts, query: Parts) -> Json:
    """One feature: both polarities of a direction, or one latent, with what stands near it."""
    corpus = chosen_corpus(study, query)
    everything = choice(query, "all", ("1",)) == "1"
    feature = path["feature"]
    kind = feature_kind(feature)
    sides = polarities(feature, kind)
    few = {} if everything else {"top": FEW, "per_quantile": FEW_PER_QUANTILE}
    pages = [feature_page(study, name, corpus, **few) for name in sides]
    chosen = feature if feature in sides else sides[0]
    about: Json = {"id": chosen, "kind": kind, "corpus": corpus, "corpora": study.corpora(), "all": everything}
    if not pages[0]["available"]:
        return about | pages[0]
    place = feature_place(chosen)
    return about | {
        "available": True,
        "address": place["address"],
        "sides": pages,
        "near": {name: nearby(study, corpus, name) for name in sides},
        "steps": steps_around(study, corpus, sides[0], len(sides)),
        "lens": kept_view(study, lens_view),
        "controls": kept_view(study, control_means),
        "notes": notes_at(study, [f"feature:{name}" for name in sides]),
    }


def polarities(feature: str, kind: str) -> list[str]:
    """The ids that a feature's page shows: a latent alone, of anything else both polarities."""
    return [feature] if kind == "latent" else [feature.rstrip("+-") + sign for sign in "+-"]


def steps_around(study: Study, corpus: str, feature: str, step: int) -> Json:
    """The features before and after one in the order of the study's columns."""
    ids = open_features(study, corpus, feature_kind(feature)).ids
    column = column_of(open_features(study, corpus, feature_kind(feature)), feature) or 0
    before, after = column - step, column + step
    return {"previous": ids[before] if before >= 0 else None, "next": ids[after] if after < len(ids) else None}


def notes_at(study: Study, places: list[str]) -> dict[str, Json]:
    """The notes of some places, empty ones for those without any."""
    notes = current_notes(read_events(study.path / FILE)[0])
    return {place: as_shown(study, notes.get(place, Note(place))) for place in places}


def compare_page(study: Study, path: Parts, query: Parts) -> Json:
    """A few features side by side."""
    corpus = chosen_corpus(study, query)
    names = listed_features(query, MOST_COMPARED)
    pages = [compared(study, name, corpus) for name in names]
    return {"corpus": corpus, "features": names, "pages": pages}


def compared(study: Study, feature: str, corpus: str) -> Json:
    """One feature's page; one that is not there says so, and the others are shown all the same."""
    try:
        return feature_page(study, feature, corpus, top=6, per_quantile=0)
    except BadInput as error:
        return {"available": False, "id": feature, "error": str(error)}


def traces_page(study: Study, path: Parts, query: Parts) -> Json:
    """The traces of a corpus: by default of the held-out one, if it is recorded, or else of the first that is."""
    corpora = study.corpora()
    if not corpora:
        return direction_absent(study)
    first = sorted(corpora, key=lambda name: (not is_recorded(study, name), name != "heldout"))[0]
    with asked():
        number = whole_number(query.get("page") or "1", "Page")
        return trace_list(study, query.get("corpus") or first, number, query.get("q", ""))


def direction_absent(study: Study) -> Json:
    """A study without any corpus."""
    command = f"lorascope record {study.path} --corpus NAME --traces FILE"
    return {"available": False, "corpus": "", "corpora": [], "missing": {"what": "traces", "run": command}}


def trace_view(study: Study, path: Parts, query: Parts) -> Json:
    """One trace, coloured by those of the features that the query lists that there are."""
    index = whole_number(path["index"], "The trace")
    names = listed_features(query, MOST_COMPARED)
    check_corpus(study, path["corpus"])
    unknown = unknown_features(study, path["corpus"], names)
    page = coloured_trace(study, path["corpus"], index, [name for name in names if name not in unknown])
    if page["available"]:
        page["unknown"] = unknown
        place = f"{path['corpus']}:{index}"
        page["notes"] = notes_at(study, [f"trace:{place}"])
        page["noted"] = noted_tokens(study, place)
    return page


def unknown_features(study: Study, corpus: str, names: list[str]) -> dict[str, str]:
    """Those of some features that a corpus has no activations of, each with a sentence that says why."""
    unknown = {}
    for name in names:
        try:
            known_column(study, corpus, name)
        except BadInput as error:
            unknown[name] = str(error)
    return unknown


def noted_tokens(study: Study, place: str) -> list[int]:
    """Positions of a trace's tokens with notes of their own; the place is CORPUS:INDEX."""
    start = f"token:{place}:"
    notes = current_notes(read_events(study.path / FILE)[0])
    return sorted(int(name.removeprefix(start)) for name in notes if name.startswith(start))


def fires_page(study: Study, path: Parts, query: Parts) -> Json:
    """What fires on one token."""
    index, position = whole_number(path["index"], "The trace"), whole_number(path["position"], "The token")
    found = fires_here(study, path["corpus"], index, position)
    if found["available"]:
        (found["note"],) = notes_at(study, [f"token:{path['corpus']}:{index}:{position}"]).values()
    return found


def notes_page(study: Study, path: Parts, query: Parts) -> Json:
    """All notes, newest first."""
    events, unread = read_events(study.path / FILE)
    notes = [as_shown(study, note) | {"earlier": len(note.earlier)} for note in current_notes(events).values()]
    tag = query.get("tag", "")
    tags = sorted({name for note in notes for name in note["tags"]})
    shown = [note for note in notes if not tag or tag in note["tags"]]
    shown.sort(key=lambda note: note["time"], reverse=True)
    about = {"total": len(notes), "events": len(events), "unread": unread, "file": FILE}
    return {"notes": shown, "tags": tags, "tag": tag} | about


def live_page(study: Study, path: Parts, query: Parts) -> Json:
    """What the Live page starts with; the model is another matter."""
    if not (study.path / WEIGHTS).is_file():
        command = f"lorascope train {study.path}"
        return {"available": False, "missing": {"what": "the adapter", "run": command}}
    names = listed_features(query, MOST_FEATURES)
    check_live(query)
    unknown = unwatchable(study, names)
    corpus, prompts = sample_prompts(study)
    about = {"features": [name for name in names if name not in unknown], "unknown": unknown}
    about |= {"prompts": prompts, "prompts_from": corpus, "runs": RUNS}
    return {"available": True, "longest": LONGEST_PROMPT} | about


def unwatchable(study: Study, names: list[str]) -> dict[str, str]:
    """Those of some features that Live cannot watch, each with a sentence; where only a recording or an autoencoder
    could tell, its engine will."""
    adapter = open_directions(study) if names else None
    directions = {f"{address}{sign}" for address in adapter.addresses for sign in "+-"} if adapter else set()

    def known(name: str) -> bool:
        if feature_kind(name) != "latent":
            return name in directions
        try:
            return known_column(study, "train", name) >= 0
        except MissingStage:
            return True
        except BadInput:
            return False

    return {name: f"There is no direction or latent {name!r} to watch." for name in names if not known(name)}


def check_live(query: Parts) -> None:
    """Raise BadQuery for runs, places and numbers that the Live page does not have; what else it is asked, it shows."""
    if unknown := sorted(set(filter(None, query.get("runs", "").split(","))) - set(RUNS)):
        raise BadQuery(f"There is no run {unknown[0][:40]!r}; choose from {', '.join(RUNS)}.")
    choice(query, "where", ("generated", "all"))
    for name in ("tokens", "temperature", "seed"):
        try:
            float(query.get(name) or 0)
        except ValueError as error:
            raise BadQuery(f"{name} must be a number, not {query[name][:40]!r}.") from error


FILTERS = {field.name.rstrip("_"): field.name for field in dataclasses.fields(FeatureQuery)}
"""What the table of features can be asked for, and the field that says it."""
LIVE = ("features", "moves", "runs", "tokens", "temperature", "seed", "where", "prompt")
PAGES = (
    Page("/", "overview_page.html.j2", overview_page, twin="/overview.json"),
    Page("/map", "map_page.html.j2", map_page, ("corpus",)),
    Page("/evidence", "evidence_page.html.j2", evidence_page),
    Page("/categories", "categories_page.html.j2", categories_page),
    Page("/features", "features_page.html.j2", features_page, (*FILTERS, "corpus", "only", "tag")),
    Page("/feature/{feature}", "feature_page.html.j2", feature_view, ("corpus", "all")),
    Page("/compare", "compare_page.html.j2", compare_page, ("features", "corpus")),
    Page("/traces", "traces_page.html.j2", traces_page, ("corpus", "page", "q")),
    Page("/trace/{corpus}/{index}", "trace_page.html.j2", trace_view, ("features",)),
    Page("/live", "live_page.html.j2", live_page, LIVE),
    Page("/notes", "notes_page.html.j2", notes_page, ("tag",)),
)
JSON_ONLY = (
    Page("/fires/{corpus}/{index}/{position}", "", fires_page),
    Page("/measured", "", measured_page, ("corpus",)),
    Page("/interactions", "", interactions_page),
)
