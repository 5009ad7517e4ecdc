"""What explanations there are, and which of them are of the features that a study has now: an adapter or autoencoder
trained anew has others."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

from lorascope.features import source_of
from lorascope.study import Study, digest

LEXICAL = "lexical"
SAE = "sae/sae_weights.safetensors"
WORDS = 10
"""At most so many words are asked for in an explanation."""
CATEGORIES = 2
"""The method that assigns categories and measures their shares and clusters: raise it when that changes."""
ASSIGNED, NONE_FITS, NO_ANSWER, WITHOUT = "assigned", "none fits", "no answer", "nothing to go by"
"""Outcomes of sorting features into categories: a category; words that fit none; a judge that did not say; a feature
with no explanation and no example."""


def explain_records(study: Study, explainer: str = LEXICAL) -> dict[str, dict[str, Any]]:
    """The record of each kind that an explainer explained; one each, as all its corpora share a file."""
    stages = study.manifest["stages"]
    parts = {name: name.split(":", 3) for name in sorted(stages) if name.startswith("explain:")}
    return {part[2]: stages[name] for name, part in parts.items() if (part[3:] or [LEXICAL]) == [explainer]}


def explainers_of(study: Study) -> list[str]:
    """Labels of the explainers that have a record, the lexical one first."""
    names = [name.split(":", 3) for name in study.manifest["stages"] if name.startswith("explain:")]
    return sorted(
        {part[3] if len(part) > 3 else LEXICAL for part in names}, key=lambda label: (label != LEXICAL, label)
    )


def inputs_of(corpus: str, kind: str) -> list[str]:
    """What decides which features a kind has and where they fire, as inputs of a stage: recordings, levels, the SAE."""
    stores = [f"scalars/{name}/{source_of(kind)}/index.json" for name in ("train", corpus)]
    return [*stores, f"examples/levels.json#{kind}", *([SAE] if kind == "latent" else [])]


def made_from(study: Study, corpus: str, kind: str) -> str:
    """A hash of the inputs, as it stands in every row of `explanations/KIND.jsonl`."""
    return digest([study.fingerprint(name) for name in inputs_of(corpus, kind)])[:16]


def current_rows(
    study: Study, kind: str, rows: Iterable[dict[str, Any]], made: Callable[[Study, str, str], str] = made_from
) -> Iterator[dict[str, Any]]:
    """The rows that are of the features a kind has now; a row that says nothing of its making is taken as such.

    Args:
        made: `made_from`, or what remembers it.
    """
    now = cache(lambda corpus: made(study, corpus, kind))
    return (row for row in rows if row.get("made_from") is None or row["made_from"] == now(row["corpus"]))


def plain_reason(reason: str) -> str:
    """Why a feature has no score without its own numbers, so that equal reasons are counted together.

    `fires on 3 tokens of the training corpus, fewer than 8` is `fires on fewer than 8 tokens of the training corpus`.
    """
    least = re.sub(r"(?:only )?\b\d+ (.*), fewer than (\d+)$", r"fewer than \2 \1", reason)
    return re.sub(r"\b\d+\b(?!$)", "n", reason) if least == reason else least
