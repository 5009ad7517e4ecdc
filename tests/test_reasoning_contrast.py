"""The contrast of one word: a planted feature that knows what comes wins over random ones and over the token."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorascope.adapter import Adapter
from lorascope.attached import attach
from lorascope.config import Options
from lorascope.creation import NewConfig, create_study
from lorascope.errors import BadInput, RunFailed
from lorascope.features import load_features
from lorascope.models import load_model
from lorascope.reasoning import ReasoningConfig, find_reasoning, mark_words
from lorascope.reasoning.auroc import column_aurocs, weighted_auroc
from lorascope.reasoning.contrast import find_places, random_features
from lorascope.reasoning.model_words import word_log_probability
from lorascope.recording import RecordConfig, record
from lorascope.study import Study
from lorascope.token_text import open_tokenizer
from lorascope.traces import THINK
from planted_model import planted_traces, save_planted
from planted_text import make_tokenizer, make_words, random_tokens
from tiny_store import make_study, write_store

CONFIG = ReasoningConfig(shifts=19, contrast="Then")


def foreseen(path: Path, *, knows: bool = True, traces: int = 120) -> Study:
    """` Then` follows a full stop more often than other tokens; column 2 is large just before it, if it knows."""
    study = make_study(path)
    (path / "tokenizer").mkdir()
    make_tokenizer().save(str(path / "tokenizer" / "tokenizer.json"))
    words = make_words()[1]
    for seed, corpus in enumerate(("train", "heldout")):
        rng = np.random.default_rng(seed)
        tokens, segments, offsets = random_tokens(seed, traces)
        joined = [i for word, i in words.items() if word[0].isalnum()]
        tokens = np.where(np.isin(tokens, [*joined, words[" Then"]]), words[" word7"], tokens)
        stops, others = (
            np.flatnonzero(hit[:-1]) for hit in (tokens == words["."], np.isin(tokens, [words[" is"], words[" the"]]))
        )
        tokens[rng.choice(stops, len(stops) // 3, replace=False) + 1] = words[" Then"]
        tokens[rng.choice(others, len(others) // 9, replace=False) + 1] = words[" Then"]
        z = rng.normal(size=(len(tokens), 6))
        before = np.flatnonzero(tokens == words[" Then"]) - 1
        z[before[before >= 0], 2] += 3.0 * knows
        write_store(
            study,
            z,
            np.diff(offsets).tolist(),
            corpus=corpus,
            tokens=tokens,
            segments=segments,
            shard_tokens=2048,
        )
    return study


def rows_of(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["predictor"]: row for row in result["contrast"]["predictors"]}


def test_a_feature_that_foresees_the_word_wins(tmp_path: Path) -> None:
    study = foreseen(tmp_path / "s")
    result = find_reasoning(study, CONFIG, Options())
    rows = rows_of(result)
    best, random = rows["best direction"], rows["best random for direction"]
    assert best["feature"] == "L2.gate+"
    assert best["candidates"] == random["candidates"] == 12
    assert best["auroc"]["low"] > 0.9
    assert best["selected_auroc"] > 0.9
    assert best["above"]["random"]["low"] > 0
    assert best["above"]["unigram"]["low"] > 0
    assert 0.55 < rows["token unigram"]["auroc"]["value"] < 0.8  # it knows that full stops come before
    halves = result["contrast"]["halves"]
    assert abs(halves["selected_on"]["traces"] - halves["reported_on"]["traces"]) <= 1
    kept = json.loads((study.path / "reasoning" / "heldout" / "contrast-then.json").read_text())
    assert kept == result["contrast"]
    assert kept["tokens"][0][0] == "."
    assert kept["random"] == {"direction": "random linear combinations of the state"}


def test_without_one_the_chosen_feature_is_at_chance_on_the_other_half(tmp_path: Path) -> None:
    found = [
        rows_of(find_reasoning(foreseen(tmp_path / f"s{seed}", knows=False), CONFIG, Options(seed=seed)))
        for seed in range(4)
    ]
    selected = [row["best direction"]["selected_auroc"] for row in found]
    reported = [row["best direction"]["auroc"]["value"] for row in found]
    assert min(selected) > 0.5
    assert abs(np.mean(reported) - 0.5) < 0.06
    assert np.mean(selected) > np.mean(reported)
    assert all(row["best direction"]["auroc"]["low"] < 0.5 < row["best direction"]["auroc"]["high"] for row in found)


def test_positives_and_negatives_are_the_right_tokens(tmp_path: Path) -> None:
    study = foreseen(tmp_path / "s", traces=20)
    store = load_features(study, "heldout", "direction").store
    places = find_places(store, mark_words(store, make_tokenizer(), ["then"]), np.random.default_rng(0))
    words = make_words()[1]
    thinking = store.segments == THINK
    after = np.append(store.tokens[1:], -1) == words[" Then"]
    after &= np.append(store.segments[1:], 0) == THINK
    expected = np.flatnonzero(thinking & after)
    assert places.position_P[places.positive_P].tolist() == expected.tolist()
    alike = thinking & ~after & np.isin(store.tokens, store.tokens[expected])
    assert places.position_P[~places.positive_P].tolist() == np.flatnonzero(alike).tolist()
    assert places.first_ids.tolist() == [words[" Then"]]


def test_auroc_is_the_share_of_pairs() -> None:
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 6, (50, 4)).astype(np.float32)
    positive = rng.random(50) < 0.3
    weight = rng.integers(0, 3, 50).astype(np.float64)

    def plain(score: Any, weight: Any) -> float:
        wins = (score[positive, None] > score[None, ~positive]) + 0.5 * (score[positive, None] == score[~positive])
        pairs = weight[positive, None] * weight[~positive]
        return float((wins * pairs).sum() / pairs.sum())

    np.testing.assert_allclose(column_aurocs(scores, positive), [plain(s, np.ones(50)) for s in scores.T])
    for column in scores.T:
        assert np.isclose(weighted_auroc(column, positive)(weight), plain(column, weight))
    assert np.isnan(weighted_auroc(scores[:, 0], positive)(np.zeros(50)))
    assert np.isnan(column_aurocs(scores, np.ones(50, bool))).all()


def test_rare_words_and_different_texts_are_refused(tmp_path: Path) -> None:
    study = foreseen(tmp_path / "s", traces=20)
    with pytest.raises(BadInput, match="'hmm' follows only 0 tokens"):
        find_reasoning(study, replace(CONFIG, contrast="hmm"), Options())
    assert (study.path / "reasoning" / "heldout" / "direction.parquet").exists()
    store = load_features(study, "heldout", "direction").store
    lengths = np.diff(store.offsets).tolist()
    for corpus in ("train", "heldout"):
        tokens, z = np.roll(store.tokens, 1), np.ones((store.n_tokens, 6))
        write_store(study, z, lengths, corpus=corpus, source="base", tokens=tokens, segments=store.segments)
    with pytest.raises(RunFailed, match="differ in their texts"):
        find_reasoning(study, CONFIG, Options())


def test_the_models_own_log_p(tmp_path: Path) -> None:
    """Equal to a full forward pass of each trace on its own, and its row is there beside the others."""
    model_folder, adapter = save_planted(tmp_path)
    traces = planted_traces(tmp_path / "traces.jsonl")
    study = create_study(
        tmp_path / "study", NewConfig(str(model_folder), str(traces), adapter=str(adapter), system=""), Options()
    )
    study = Study.open(tmp_path / "study")
    record(study, RecordConfig("train"), Options())
    config = ReasoningConfig(corpus="train", kinds="direction", shifts=9, contrast="so", model_logp=True)
    rows = rows_of(find_reasoning(study, config, Options()))
    row = rows["the model's own log p"]
    assert row["feature"] is None
    assert row["auroc"]["low"] <= row["auroc"]["value"] <= row["auroc"]["high"]
    assert set(rows["best direction"]["above"]) == {"random", "unigram", "model"}

    store = load_features(study, "train", "direction").store
    marks = mark_words(store, open_tokenizer(study.path / "tokenizer"), ["so"])
    places = find_places(store, marks, np.random.default_rng(0))
    chosen = places.position_P[::7]
    found = word_log_probability(study, store, chosen, np.array([7, 9]), Options())
    model, _ = load_model(study.model_name)
    with torch.no_grad(), attach(model, Adapter.load(study.path / "adapter")) as attached:
        for position, value in list(zip(chosen.tolist(), found, strict=True))[:12]:
            start = int(store.offsets[store.token_traces(np.array([position]))[0]])
            ids = store.tokens[start : position + 1].tolist()
            logp_V = attached.run([ids]).logits[0, -1].log_softmax(0)
            assert value == pytest.approx(float(logp_V[[7, 9]].logsumexp(0)), abs=1e-4)


def test_recorded_random_features_are_used_where_there_are_enough(tmp_path: Path) -> None:
    store = load_features(foreseen(tmp_path / "s", traces=20), "heldout", "direction")
    places = find_places(store.store, mark_words(store.store, make_tokenizer(), ["then"]), np.random.default_rng(0))
    recorded = replace(store, kind="random")
    few = replace(recorded, ids=store.ids[:4])
    z_PN = store.store.rows(places.position_P)
    for others, said in (([store, recorded], "recorded controls"), ([store, few], "random linear combinations")):
        encode, how = random_features(store, others, places, np.random.default_rng(1))
        assert how.startswith(said)
        acts_PF = encode(np.arange(12))
        assert acts_PF.shape == (len(places.position_P), 12)
        assert (acts_PF >= 0).all()
        if how == "recorded controls":
            np.testing.assert_array_equal(acts_PF, store.encode(z_PN, np.arange(12)))
        else:  # a combination and its opposite never fire together
            assert not ((acts_PF[:, :6] > 0) & (acts_PF[:, 6:] > 0)).any()
