"""What optional packages are given and give back, with stand-ins for them; and that explainers are not mixed."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from lorascope.errors import BadInput
from lorascope.explain.categories import CategorizeConfig
from lorascope.explain.categories.extras import embed_texts, place_by_umap
from lorascope.explain.categories.kinds import explained_words, read_kind
from lorascope.explain.categories.spaces import first_two
from lorascope.explain.categories.stage import feature_spaces
from lorascope.explain.categories.words import one_explanation
from lorascope.features import load_features
from lorascope.token_text import open_tokenizer, vocabulary_texts
from planted_categories import planted_categories

Calls = list[dict[str, Any]]


@pytest.fixture
def encoders(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What a stand-in for sentence-transformers was asked; it embeds a text as its length and number of words."""
    calls: Calls = []

    class SentenceTransformer:
        def __init__(self, model: str, device: str | None) -> None:
            if model == "none":
                raise OSError("no such\nmodel")
            calls.append({"model": model, "device": device})

        def encode(self, texts: list[str], **options: Any) -> Any:
            calls.append({"texts": texts, **options})
            made = np.array([[len(text), len(text.split())] for text in texts], np.float32)
            return made / np.linalg.norm(made, axis=1, keepdims=True)

    module = ModuleType("sentence_transformers")
    monkeypatch.setattr(module, "SentenceTransformer", SentenceTransformer, raising=False)
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    return calls


@pytest.fixture
def placers(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What a stand-in for umap-learn was asked; it places points at their first two coordinates plus the seed."""
    calls: Calls = []

    class UMAP:
        def __init__(self, **options: Any) -> None:
            calls.append(options)

        def fit_transform(self, points: Any) -> Any:
            calls[-1]["points"] = points
            return (points[:, :2] + calls[-1]["random_state"]).astype(np.float32)

    module = ModuleType("umap")
    monkeypatch.setattr(module, "UMAP", UMAP, raising=False)
    monkeypatch.setitem(sys.modules, "umap", module)
    return calls


def test_texts_are_embedded_in_order_at_length_one(encoders: Calls) -> None:
    found = embed_texts(("a bc", "def"), "some/model", "auto")
    assert encoders == [
        {"model": "some/model", "device": None},
        {"texts": ["a bc", "def"], "normalize_embeddings": True, "show_progress_bar": False},
    ]
    assert found.dtype == np.float64
    assert found.shape == (2, 2)
    assert np.linalg.norm(found, axis=1) == pytest.approx([1, 1])
    assert found[0, 0] / found[0, 1] == pytest.approx(2)
    embed_texts(["x"], "folder", "cuda:1")
    assert encoders[2] == {"model": "folder", "device": "cuda:1"}
    with pytest.raises(BadInput, match="Cannot load the embedding model none: no such model"):
        embed_texts(["x"], "none", "cpu")


@pytest.mark.parametrize(("count", "neighbours", "start"), [(4, 3, "random"), (39, 15, "random"), (40, 15, "spectral")])
def test_umap_is_given_points_seed_and_a_start(placers: Calls, count: int, neighbours: int, start: str) -> None:
    points = np.random.default_rng(0).normal(size=(count, 5))
    found = place_by_umap(points, 7)
    (options,) = placers
    assert options.pop("points") is points
    assert options == {
        "n_components": 2,
        "n_neighbors": neighbours,
        "random_state": 7,
        "n_jobs": 1,  # more give other maps for the same seed
        "init": start,
    }
    assert found.dtype == np.float64
    assert found == pytest.approx(points[:, :2] + 7, abs=1e-5)


def test_one_explainer_speaks_of_a_feature(tmp_path: Path, encoders: Calls, placers: Calls) -> None:
    study, _ = planted_categories(tmp_path / "study", traces=20)
    texts = vocabulary_texts(open_tokenizer(study.path / "tokenizer"))
    kind = read_kind(study, "heldout", load_features(study, "heldout", "latent"), texts)
    lexical = [row["text"] for rows in kind.rows_F for row in rows]
    assert len(lexical) == 9
    judged = {"text": "forms of adding", "rule": None}
    failed = {"text": None, "rule": None}
    rows_F = [[*kind.rows_F[0], judged], [failed, *kind.rows_F[1]], *kind.rows_F[2:]]
    kind = replace(kind, rows_F=rows_F)
    assert one_explanation(rows_F[0]) == [judged]
    assert one_explanation(rows_F[1]) == kind.rows_F[1][1:]
    assert one_explanation([failed]) == []
    assert explained_words(kind, 0) == [(" forms", 1.0), (" adding", 1.0)]
    config = CategorizeConfig(embed="some/model", map="umap", enough=1)
    place = partial(place_by_umap, seed=3)
    spaces = feature_spaces(kind, config, "cpu", place, np.random.default_rng(0))
    assert encoders[1]["texts"] == ["forms of adding", *lexical[1:]]
    said = spaces[0]
    assert (said.name, len(said.point_P)) == ("explanations", 9)
    assert {options["random_state"] for options in placers} == {3}
    assert len(placers) == len(spaces) == 3
    assert said.map_P2 == pytest.approx(first_two(placers[0]["points"]) + 3, abs=1e-5)
