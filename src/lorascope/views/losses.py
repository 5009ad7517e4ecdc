"""Everything that was cut, filtered, not read, dead or too rare: nothing is lost in silence."""

import itertools
from collections import Counter
from typing import Any

from lorascope.comparison_cells import count_answers
from lorascope.explained import LEXICAL, WORDS, plain_reason
from lorascope.study import Study
from lorascope.views.ablation_tables import WAYS, ablation_table
from lorascope.views.gains import label_of
from lorascope.views.reading import Json, explanations, json_file, ready, stage_records

KINDS = {
    "direction": "directions",
    "latent": "latents",
    "neuron": "MLP neurons",
    "base": "the base model's directions",
    "random": "random controls",
    "untrained": "untrained controls",
}
"""Kinds of features as a stage's row names them."""
WHOSE = {"own": "own explanation", "wrong": "wrong explanation", "shuffled": "shuffled feature"}
"""What answers were asked about, in words."""


def dropped(study: Study) -> Json:
    """Counts of everything that did not go in, with the rule.

    Returns:
        `{"available": True, "rows": [{"stage", "what", "count", "of": number or None, "rule"}]}`; zeros are listed
        too. A stage that has not run has no rows.
    """
    parts = (corpus_losses, recording_losses, evaluation_losses, ablation_losses, sae_losses, example_losses)
    rows = [row for part in parts for row in part(study)] + explanation_losses(study)
    return {"available": True, "rows": ready(rows)}


def entry(stage: str, what: str, count: Any, of: Any, rule: str = "") -> Json:
    """One row of the account."""
    return {"stage": stage, "what": what, "count": count, "of": of, "rule": rule}


def length_rows(stage: str, counts: Json, rule: str) -> list[Json]:
    """What the length rule did."""
    total = counts.get("kept", 0) + counts.get("truncated", 0) + counts.get("dropped", 0)
    cut = counts.get("truncated_tokens", 0)
    return [
        entry(stage, "traces truncated", counts.get("truncated", 0), total, f"{rule}; {cut:,} tokens cut in all"),
        entry(stage, "traces dropped", counts.get("dropped", 0), total, rule),
    ]


def corpus_losses(study: Study) -> list[Json]:
    """Traces that the study's length rule changed."""
    manifest = study.manifest
    limit = manifest.get("max_tokens")
    rule = f"longer than {limit:,} tokens: {manifest.get('too_long')}" if limit else "no limit on length"
    rows: list[Json] = []
    for name, corpus in manifest.get("corpora", {}).items():
        rows += length_rows(f"traces of {name}", corpus.get("length_rule") or {}, rule)
    return rows


def recording_losses(study: Study) -> list[Json]:
    """Tokens that are stored but not ordinary, and numbers that did not fit; sources of equal counts share a row."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for index in sorted((study.path / "scalars").glob("*/[!.]*/index.json")):
        stored = json_file(study, str(index.relative_to(study.path)))
        counts, about = stored.get("counts") or {}, stored.get("about") or {}
        corpus, source = index.parent.parent.name, index.parent.name
        tokens, sinks = counts.get("tokens"), counts.get("sinks")
        sink = about.get("sink_rule") or {}
        rule = f"hidden state entering layer {sink.get('layer')} over {sink.get('ratio')} times the trace's median norm"
        said: list[tuple[Any, ...]] = []
        if tokens is not None and counts.get("ordinary") is not None and sinks is not None:
            special = tokens - counts["ordinary"] - sinks
            said.append(("template and markup tokens", special, tokens, "special; never an example"))
        said.append(("attention sinks", sinks, tokens, rule if sink else ""))
        said.append(("scalars clipped", counts.get("clipped"), None, "beyond half precision after scaling"))
        for counted in said:
            found.setdefault((corpus, *counted), []).append(source)
    return [
        entry(f"record {corpus}, {', '.join(sources)}", what, count, of, rule)
        for (corpus, what, count, of, rule), sources in found.items()
        if count is not None
    ]


def evaluation_losses(study: Study) -> list[Json]:
    """Responses without a readable answer, those cut at the limit, and samples that stand in no table."""
    details = json_file(study, "eval/details.json") or {}
    limit = (details.get("settings") or {}).get("max_new_tokens")
    rows: list[Json] = []
    for model in details.get("models", []):
        n, stage = model["n"], f"evaluate, {label_of(model['model'])}"
        rows.append(entry(stage, "answers not read", round(model["unparsed"] * n), n, "counted as wrong"))
        cut = f"cut at {limit} tokens; right only if an answer could be read"
        rows.append(entry(stage, "responses not finished", round(model["unfinished"] * n), n, cut))
    if details:
        rule = "of other limits or seeds than the last run's, or of benchmarks that a later run has; kept in eval/sets"
        rows.append(entry("evaluate", "sets of samples not shown", len(details.get("not_shown") or []), None, rule))
    return rows


def ablation_losses(study: Study) -> list[Json]:
    """Tokens cut, and targets whose KL is no more than noise."""
    rows: list[Json] = []
    results = [record.get("result") or {} for record in stage_records(study, "ablate").values()]
    for cut, tokens in dict.fromkeys((r["cut_tokens"], r.get("tokens", 0)) for r in results if "cut_tokens" in r):
        rows.append(entry("ablate", "tokens cut", cut, tokens + cut, "beyond --max-tokens of a trace"))
    for to, way in itertools.product(("zero", "mean"), WAYS):
        table = ablation_table(study, way, to)
        if table["available"]:
            under = sum(row["under_floor"] for row in table["rows"])
            stage = f"ablate by {way}" + (" to the mean" if to == "mean" else "")
            rows.append(entry(stage, "under the noise floor", under, len(table["rows"]), "not ranked"))
    return rows


def sae_losses(study: Study) -> list[Json]:
    """Latents that never fire on the training corpus."""
    quality = json_file(study, "sae/metrics.json") or {}
    if "dead_latents" not in quality:
        return []
    rule = "never fires on the training corpus"
    return [entry("sae", "dead latents", quality["dead_latents"], quality.get("latents"), rule)]


def example_losses(study: Study) -> list[Json]:
    """Features that never fire on a corpus or have too few examples."""
    rows: list[Json] = []
    for name, record in stage_records(study, "examples").items():
        result, config = record.get("result") or {}, record.get("config") or {}
        if "features" not in result:
            continue
        _, corpus, kind = name.split(":")
        stage = f"examples {corpus}, {KINDS.get(kind, kind)}"
        rule = f"fires on fewer than {config.get('enough', 20)} ordinary tokens, or on none"
        rows.append(entry(stage, "features that never fire", result.get("never_fire"), result["features"]))
        rows.append(entry(stage, "features with too few examples", result.get("too_few"), result["features"], rule))
    return rows


def explanation_losses(study: Study) -> list[Json]:
    """Features without an explanation or without a score, by reason."""
    rows: list[Json] = []
    for path in sorted((study.path / "explanations").glob("*.jsonl")):
        if path.stem == "superseded":
            continue
        by_explainer: dict[str, list[Json]] = {}
        for row in explanations(study, path.stem):
            by_explainer.setdefault(row["explainer"], []).append(row)
        for explainer, explained in by_explainer.items():
            by_whom = "" if explainer == LEXICAL else f", {explainer}"
            stage = f"explain {KINDS.get(path.stem, path.stem)}{by_whom}"
            rows += explainer_losses(stage, explained, judged=explainer != LEXICAL)
    return rows


def explainer_losses(stage: str, explained: list[Json], *, judged: bool) -> list[Json]:
    """What one explainer could not do about one kind of features."""
    rows = judge_losses(stage, explained) if judged else []
    classes = [row["class"] for row in explained if row.get("class")]
    if classes:
        failed = sum(found["class"] is None for found in classes)
        rows.append(entry(stage, "without a class", failed, len(classes), "the judge's answer failed"))
    reasons = Counter(plain_reason(str(row["reason"])) for row in explained if row.get("reason"))
    for reason, count in reasons.most_common() or [("", 0)]:
        rows.append(entry(stage, "without a score", count, len(explained), reason))
    scored = [row["scored"] for row in explained if row.get("scored")]
    missing = Counter(
        plain_reason(found["without"]["fuzzing"]) for found in scored if "fuzzing" in found.get("without", {})
    )
    rows += [entry(stage, "without a fuzzing score", n, len(scored), reason) for reason, n in missing.most_common()]
    return rows


def judge_losses(stage: str, explained: list[Json]) -> list[Json]:
    """Answers of a judge that were not read, by whose explanation; requests that failed; explanations at length."""
    counts = [count_answers(row.get("scored") or {}) for row in explained]
    rows = []
    for whose, words in WHOSE.items():
        asked, unread = (sum(count[whose][k] for count in counts) for k in (0, 1))
        rows.append(entry(stage, f"judge's answers not read, {words}", unread, asked, "counted as wrong"))
    again = sum(bool(row.get("retry")) for row in explained)
    rule = "requests failed: what they were for is in no score; the same explain sends them again"
    rows.append(entry(stage, "features to be asked again", again, len(explained), rule))
    texts = [row["text"].split() for row in explained if row.get("text")]
    longer = sum(len(text) > WORDS for text in texts)
    rule = "asked for as many at most; kept and scored as they are"
    return [*rows, entry(stage, f"explanations longer than {WORDS} words", longer, len(texts), rule)]
