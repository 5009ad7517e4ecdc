"""The reasoning score: planted features are found, its null is uniform, false discoveries are controlled."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from lorascope.config import Options
from lorascope.errors import BadInput, MissingStage
from lorascope.features import FeatureSet, load_features
from lorascope.reasoning import ReasoningConfig, find_reasoning, mark_words, read_words
from lorascope.reasoning.word_scores import AFTER, BEFORE, draw_offsets, make_ring, near_words, score_features
from lorascope.reasoning.words import word_pattern
from lorascope.store import Floats, Store
from lorascope.study import Study
from lorascope.token_text import open_tokenizer, token_texts
from planted_text import ANSWER, THINK, make_tokenizer, make_words, random_tokens
from tiny_store import make_study, write_store
from tiny_text import tiny_tokenizer

WORDS = ("then", "so")


def spaced_tokens(seed: int, n: int, length: int = 60) -> tuple[Any, Any, Any]:
    """Random tokens each of which is a word of its own: what would run into its neighbour is another word."""
    tokens, segments, offsets = random_tokens(seed, n, length)
    words = make_words()[1]
    joined = [i for word, i in words.items() if word[0].isalnum()]
    return np.where(np.isin(tokens, joined), words[" word7"], tokens), segments, offsets


def text_study(path: Path, scalars: Callable[[np.random.Generator, Any], Any], n: int = 40, length: int = 60) -> Study:
    """A study of random words, whose scalars are a function of a generator and of the token ids."""
    study = make_study(path)
    (path / "tokenizer").mkdir()
    make_tokenizer().save(str(path / "tokenizer" / "tokenizer.json"))
    for number, corpus in enumerate(("train", "heldout")):
        tokens, segments, offsets = spaced_tokens(number, n, length)
        z = scalars(np.random.default_rng(number), tokens)
        lengths = np.diff(offsets).tolist()
        write_store(study, z, lengths, corpus=corpus, tokens=tokens, segments=segments, shard_tokens=1024)
    return study


def planted(rng: np.random.Generator, tokens: Any) -> Any:
    """Column 0 is large at ` Then` and on the two tokens after it, column 1 before ` so`, the rest is noise."""
    words = make_words()[1]
    z = rng.normal(size=(len(tokens), 8))
    then = np.flatnonzero(tokens == words[" Then"])
    for after in range(3):
        z[np.minimum(then + after, len(tokens) - 1), 0] += 3
    z[np.maximum(np.flatnonzero(tokens == words[" so"]) - 1, 0), 1] -= 3
    return z


def wander(rng: np.random.Generator, tokens: Any, columns: int = 40) -> Any:
    """Scalars that stay for a while at what they are, and know nothing of the tokens."""
    steps = rng.normal(size=(len(tokens) + 8, columns))
    smooth = sum(steps[k : len(tokens) + k] for k in range(6))
    return smooth**3  # heavy tails


def noise_set(store: Store, acts_TF: Any) -> FeatureSet:
    """Features whose activations are given, on the text of a store."""
    at = {"row": 0}

    def encode(z_TN: Floats, wanted: Any) -> Floats:
        rows = acts_TF[at["row"] : at["row"] + len(z_TN)].astype(np.float32)
        at["row"] = (at["row"] + len(z_TN)) % len(acts_TF)
        return rows if wanted is None else rows[:, wanted]

    return FeatureSet("noise", [f"n{i}" for i in range(acts_TF.shape[1])], "effect", False, store, encode)


def test_planted_features_rank_first(tmp_path: Path) -> None:
    study = text_study(tmp_path / "s", planted, n=160)
    (tmp_path / "words.txt").write_text("THEN # a turn\n\n# none\nSo\nhmm\n")
    config = ReasoningConfig(words=str(tmp_path / "words.txt"), shifts=999)
    result = find_reasoning(study, config, Options())["kinds"]["direction"]
    assert [row["feature"] for row in result["top"][:2]] in (["L0.gate+", "L1.gate-"], ["L1.gate-", "L0.gate+"])
    assert all(row["q"] < 0.02 for row in result["top"][:2])
    assert result["significant"] <= 4
    rows = pq.read_table(study.path / "reasoning" / "heldout" / "direction.parquet").to_pylist()
    assert [row["feature"] for row in rows] == load_features(study, "heldout", "direction").ids
    assert min(row["p"] for row in rows) == 1 / 1000
    store = load_features(study, "heldout", "direction").store
    thinking = store.segments == THINK
    words = make_words()[1]
    assert result["words"] == {
        "then": int((thinking & (store.tokens == words[" Then"])).sum()),
        "so": int((thinking & (store.tokens == words[" so"])).sum()),
        "hmm": 0,
    }
    assert result["near_tokens"] + result["rest_tokens"] == int(thinking.sum())


def test_scores_and_null_equal_a_plain_loop(tmp_path: Path) -> None:
    study = text_study(tmp_path / "s", planted, n=6)
    features = load_features(study, "heldout", "direction")
    store = features.store
    marks = mark_words(store, open_tokenizer(study.path / "tokenizer"), WORDS)
    near_T = near_words(store, marks)
    found = score_features(features, near_T, marks.thinking_T, shifts=20, rng=np.random.default_rng(3))
    acts_TF = features.columns(np.arange(len(features.ids))).astype(np.float64)
    ring = make_ring(store, near_T, marks.thinking_T)
    offsets = draw_offsets(ring, 20, np.random.default_rng(3))
    think = marks.thinking_T

    def score(near: Any) -> Any:
        return (acts_TF[think & near].mean(0) - acts_TF[think & ~near].mean(0)) / acts_TF[think].std(0)

    nulls = []
    for row in offsets[1:]:
        moved = np.zeros_like(near_T)
        places = np.unique(ring.trace_U)
        for trace in places:
            positions = ring.position_U[ring.trace_U == trace]
            moved[positions] = np.roll(near_T[positions], row[trace])
        nulls.append(score(moved))
    np.testing.assert_allclose(found.score_F, score(near_T), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.null_mean_F, np.mean(nulls, 0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.null_sd_F, np.std(nulls, 0), rtol=1e-4)
    np.testing.assert_allclose(found.p_F, (1 + (np.array(nulls) >= score(near_T)).sum(0)) / 21)
    np.testing.assert_allclose(found.mean_near_F, acts_TF[think & near_T].mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.mean_rest_F, acts_TF[think & ~near_T].mean(0), rtol=1e-5)


def test_near_is_two_before_to_three_after_within_a_trace(tmp_path: Path) -> None:
    study = make_study(tmp_path / "s")
    words = make_words()[1]
    tokens = np.full(20, words[" the"])
    tokens[[0, 9, 15]] = words[" so"]
    segments = np.full(20, THINK)
    segments[[14, 15]] = 1  # a word of the prompt counts for nothing
    store = write_store(study, np.zeros((20, 1)), [10, 10], tokens=tokens, segments=segments)
    near_T = near_words(store, mark_words(store, make_tokenizer(), ["so"]))
    assert (BEFORE, AFTER) == (2, 3)
    assert np.flatnonzero(near_T).tolist() == [0, 1, 2, 3, 7, 8, 9]


def null_p_values(store: Store, seed: int, shifts: int, columns: int = 40) -> Any:
    marks = mark_words(store, make_tokenizer(), WORDS)
    rng = np.random.default_rng(seed)
    acts_TF = np.abs(wander(rng, store.tokens, columns))
    found = score_features(
        noise_set(store, acts_TF), near_words(store, marks), marks.thinking_T, shifts=shifts, rng=rng
    )
    return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    study = text_study(tmp_path_factory.mktemp("null") / "s", partial(wander, columns=1), n=10, length=300)
    return load_features(study, "heldout", "direction").store


def test_features_that_know_nothing_give_uniform_p_values(store: Store) -> None:
    """Largest gap to the uniform distribution over 40 studies of 40 features, whose traces wander."""
    p = np.sort(np.concatenate([null_p_values(store, seed, 199).p_F for seed in range(40)]))
    n = len(p)
    gap = np.max(np.abs(p - 1 / 400 - (np.arange(n) + 0.5) / n))  # p takes the values k / 200
    assert gap < 1.63 / np.sqrt(n)  # exceeded by chance once in a hundred; the seeds are fixed


def test_false_discoveries_are_controlled_when_there_is_nothing(store: Store) -> None:
    """Where nothing is true, a study has a discovery at q <= 0.1 in at most about a tenth of the cases."""
    with_discovery = [bool((null_p_values(store, 100 + seed, 999).q_F <= 0.1).any()) for seed in range(60)]
    assert np.mean(with_discovery) < 0.1 + 2.33 * np.sqrt(0.1 * 0.9 / 60)


def test_silent_features_are_counted_and_never_found(store: Store) -> None:
    marks = mark_words(store, make_tokenizer(), WORDS)
    near_T = near_words(store, marks)
    acts = np.stack([np.zeros(store.n_tokens), np.full(store.n_tokens, 0.3), near_T * 1.0], axis=1)
    rng = np.random.default_rng(0)
    found = score_features(noise_set(store, acts), near_T, marks.thinking_T, shifts=99, rng=rng)
    assert found.silent == 2
    assert found.p_F.tolist() == [1, 1, 0.01]
    assert found.score_F[:2].tolist() == [0, 0]
    assert found.score_F[2] > 2


def test_words_are_found_across_tokens_and_at_boundaries(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    text = "Wait, await a waiter. Zürich 🙂 WAIT! let\n me see; hold  on"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    backend: Tokenizer = tokenizer.backend_tokenizer
    store = write_store(
        make_study(tmp_path / "s"), np.zeros((len(ids), 1)), [len(ids)], tokens=ids, segments=[THINK] * len(ids)
    )
    marks = mark_words(store, backend, ["wait", "let me", "hold on", "hold", "absent"])
    assert marks.counts == {"wait": 2, "let me": 1, "hold on": 1, "hold": 0, "absent": 0}
    texts = token_texts(backend, ids)
    for first, last, word in zip(marks.first_K, marks.last_K, ("Wait", "WAIT", "let\n me", "hold  on"), strict=True):
        assert word in "".join(texts[first : last + 1])
        assert word not in "".join(texts[first + 1 : last + 1])
        assert word not in "".join(texts[first:last])
    assert word_pattern(["so"]).findall("so, so_ also So.") == ["so", "So"]


def test_own_list_is_read() -> None:
    words = read_words(None)
    assert {"wait", "hmm", "alternatively", "check", "so"} <= set(words)
    assert all(word == word.lower().strip() and "#" not in word for word in words)


def test_an_edited_list_is_noticed_and_nothing_else_runs_again(tmp_path: Path) -> None:
    study = text_study(tmp_path / "s", planted, n=8)
    file = tmp_path / "words.txt"
    file.write_text("then\n")
    config = ReasoningConfig(words=str(file), shifts=19)
    first = find_reasoning(study, config, Options())
    done = study.manifest["stages"]["reasoning:heldout:direction"]["finished"], study.path / "log.txt"
    assert find_reasoning(study, replace(config, top=1, level=0.5), Options())["kinds"]["direction"]["level"] == 0.5
    assert study.manifest["stages"]["reasoning:heldout:direction"]["finished"] == done[0]
    assert "up to date" in done[1].read_text().splitlines()[-1]
    file.write_text("so\n")
    second = find_reasoning(study, config, Options())
    assert second["kinds"]["direction"]["words"].keys() == {"so"} != first["kinds"]["direction"]["words"].keys()


def test_traces_without_thinking_get_their_own_sentence(tmp_path: Path) -> None:
    """Other words would not help, which is what is said where there is thinking."""
    study = text_study(tmp_path / "s", planted, n=8)
    tokens, segments, offsets = spaced_tokens(1, 8)
    z = planted(np.random.default_rng(1), tokens)
    segments = np.where(segments == THINK, ANSWER, segments)
    lengths = np.diff(offsets).tolist()
    write_store(study, z, lengths, corpus="bare", tokens=tokens, segments=segments, shard_tokens=1024)
    for contrast in (None, "then"):
        with pytest.raises(BadInput, match="No trace of bare has any thinking") as caught:
            find_reasoning(study, ReasoningConfig(corpus="bare", contrast=contrast), Options())
        assert "--words" not in str(caught.value)


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    study = text_study(tmp_path / "s", planted, n=8)
    empty = tmp_path / "empty.txt"
    empty.write_text("# nothing\n")
    rare = tmp_path / "rare.txt"
    rare.write_text("notwithstanding\n")
    for config, said in (
        (ReasoningConfig(words=str(empty)), "names no word"),
        (ReasoningConfig(words=str(tmp_path / "gone.txt")), "Cannot read the words"),
        (ReasoningConfig(words=str(rare)), "No token of the thinking of heldout"),
        (ReasoningConfig(kinds="idea"), "no kind of feature 'idea'"),
        (ReasoningConfig(shifts=0), "--shifts"),
        (ReasoningConfig(level=0), "--level"),
        (ReasoningConfig(model_logp=True), "--contrast"),
        (ReasoningConfig(contrast="?!"), "--contrast"),
    ):
        with pytest.raises(BadInput, match=said):
            find_reasoning(study, config, Options())
    with pytest.raises(MissingStage, match="lorascope record"):
        find_reasoning(study, ReasoningConfig(corpus="other"), Options())
    assert not (study.path / "reasoning").exists()
