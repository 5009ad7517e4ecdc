"""Reasoning features: which fire at reasoning words, and what tells the positions before one word."""

from pathlib import Path
from typing import Any

from lorascope.features import CONTROLS, KINDS
from lorascope.study import Study, read_json
from lorascope.views.reading import Json, missing, ready, table_rows

LABELS = {"direction": "directions", "latent": "latents", "base": "control: base model"}
NAMES = {"direction": "direction", "latent": "latent", "base": "base-model"}
BASELINES = {
    "random": "the best of as many random features",
    "unigram": "the current token alone",
    "model": "the model's own log p of the word",
}
NO_MODEL = "The model's own log p of the word was not measured (--model-logp)."
LEVEL = 0.05
EXAMPLE, ENOUGH = "wait", 20
"""The word whose contrast is suggested, and the fewest occurrences with which it says anything."""


def reasoning_view(study: Study, corpus: str = "heldout", *, top: int = 10) -> Json:
    """Ranked features of every kind that was scored on a corpus, and the contrasts made on any.

    Returns:
        `{"available", "corpus", "level", "shifts", "words": [[word, count]], "near_tokens", "rest_tokens", "traces",
        "traces_without_words", "kinds": [{"kind", "label", "control", "features", "silent", "significant", "rows":
        [{"feature", "score", "null_mean", "null_sd", "p", "q"}]}], "contrasts": [contrast], "contrast_on", "example"}`.
        Rows have a q of at most `level`, by falling score; words are those found, the most frequent first. A contrast
        is its file with `sentences` added; `contrast_on` is a corpus with enough of the word `example`.
    """
    records = study.manifest["stages"]
    kinds: list[Json] = []
    about: Json = {}
    for kind in KINDS:
        rows = table_rows(study, f"reasoning/{corpus}/{kind}.parquet")
        record = records.get(f"reasoning:{corpus}:{kind}")
        if rows is not None and record is not None:
            kinds.append(kind_rows(kind, rows, record["result"], top))
            about = about or record["result"]
    if not kinds:
        return missing(study, f"reasoning features on {corpus}", f"lorascope reasoning STUDY --corpus {corpus}")
    words = sorted(((word, n) for word, n in about["words"].items() if n), key=lambda pair: -pair[1])
    kept = {key: about[key] for key in ("shifts", "near_tokens", "rest_tokens", "traces", "traces_without_words")}
    contrasts = [contrast_view(file) for file in sorted((study.path / "reasoning").glob("*/contrast-*.json"))]
    # Held-out text is the better one to find something in, where the word is not too rare there.
    contrast_on = corpus if dict(words).get(EXAMPLE, 0) >= ENOUGH else "train"
    found = {"available": True, "corpus": corpus, "level": LEVEL, "words": words, "kinds": kinds}
    return dict(ready(found | kept | {"contrasts": contrasts, "contrast_on": contrast_on, "example": EXAMPLE}))


def kind_rows(kind: str, rows: list[Json], counts: Json, top: int) -> Json:
    """One kind's counts and its first features."""
    passed = sorted((row for row in rows if row["q"] <= LEVEL), key=lambda row: -row["score"])
    keys = ("feature", "score", "null_mean", "null_sd", "p", "q")
    return {
        "kind": kind,
        "label": LABELS.get(kind, f"control: {kind}"),
        "control": kind in CONTROLS,
        "features": len(rows),
        "silent": counts["silent"],
        "significant": len(passed),
        "rows": [{key: row[key] for key in keys} for row in passed[:top]],
    }


def contrast_view(file: Path) -> Json:
    """A contrast's file and what it says."""
    found: dict[str, Any] = read_json(file)
    best = [row for row in found["predictors"] if row["feature"]]
    measured = any(row["baseline"] == "model" for row in found["predictors"])
    return found | {"sentences": [*map(contrast_sentence, best), *([] if measured else [NO_MODEL])]}


def contrast_sentence(row: Json) -> str:
    """Which baselines the best feature of a kind stands above, beyond the interval of the paired difference."""
    standing = {name: bool(gap and gap["low"] is not None and gap["low"] > 0) for name, gap in row["above"].items()}
    over = " and ".join(BASELINES[name] for name, above in standing.items() if above)
    under = " or ".join(BASELINES[name] for name, above in standing.items() if not above)
    name = row["feature"].replace("-", "−")
    said = (
        f"On the second half {name}, the best of {row['candidates']:,} {NAMES.get(row['kind'], row['kind'])} features"
    )
    if not over:
        return f"{said} on the first, does not stand clear of {under}."
    return f"{said} on the first, stands clear of {over}" + (f", not of {under}." if under else ".")
