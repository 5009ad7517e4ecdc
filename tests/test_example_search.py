"""Example search against brute force: exact top k with the limit per trace, the sample, the statistics, the levels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorascope import features, selection
from lorascope.config import Options
from lorascope.errors import BadInput, MissingStage, RunFailed
from lorascope.example_search import ExamplesConfig, bin_edges, examples, firing_quantile
from lorascope.features import bins_of, load_features
from lorascope.selection import Candidates, activation_keys, best, random_keys
from lorascope.study import Study
from test_features import save_sae
from tiny_store import halves, make_study, write_store

OPTIONS = Options()


def table(study: Study, name: str, corpus: str = "train") -> list[dict[str, Any]]:
    return pq.read_table(study.path / "examples" / corpus / f"{name}.parquet").to_pylist()


def brute_force(acts_T: np.ndarray, trace_T: np.ndarray, allowed_T: np.ndarray, k: int, m: int) -> list[int]:
    """Positions of the top k, at most m per trace, by falling activation and rising position."""
    chosen: list[int] = []
    taken: dict[int, int] = {}
    for t in sorted(np.flatnonzero(allowed_T & (acts_T > 0)), key=lambda t: (-acts_T[t], t)):
        if taken.get(int(trace_T[t]), 0) < m and len(chosen) < k:
            taken[int(trace_T[t])] = taken.get(int(trace_T[t]), 0) + 1
            chosen.append(int(t))
    return chosen


def check_against_brute_force(study: Study, config: ExamplesConfig, kind: str = "direction") -> None:
    examples(study, config, OPTIONS)
    found = load_features(study, config.corpus, kind)
    store = found.store
    acts = found.columns(np.arange(len(found.ids)))
    traces = np.repeat(np.arange(store.n_traces), np.diff(store.offsets))
    levels = json.loads((study.path / "examples" / "levels.json").read_text())[kind]
    rows = table(study, f"{kind}-examples", config.corpus)
    stats = {row["feature"]: row for row in table(study, f"{kind}-stats", config.corpus)}
    assert list(stats) == found.ids == list(levels)
    ordinary = store.ordinary
    for f, name in enumerate(found.ids):
        mine = [row for row in rows if row["feature"] == name]
        top = [row for row in mine if row["where"] == "top"]
        wanted = brute_force(acts[:, f], traces, ordinary, config.k, config.per_trace)
        assert [store.offsets[row["trace"]] + row["position"] for row in top] == wanted
        assert [row["rank"] for row in top] == list(range(len(wanted)))
        assert [row["activation"] for row in top] == acts[wanted, f].tolist()
        fires = ordinary & (acts[:, f] > levels[name])
        row = stats[name]
        assert row["n_firing"] == fires.sum() == sum(row["hist_counts"])
        assert row["density"] == pytest.approx(fires.sum() / max(1, ordinary.sum()))
        assert row["max"] == (acts[wanted[0], f] if wanted else 0)
        assert row["level"] == np.float32(levels[name])
        if fires.any():
            assert row["mean"] == pytest.approx(acts[fires, f].mean(), rel=1e-5)
            assert row["p99"] == pytest.approx(np.quantile(acts[fires, f], 0.99, method="inverted_cdf"), rel=0.017)
            for segment, part in ((1, "prompt"), (2, "think"), (3, "answer")):
                assert row[f"share_{part}"] == pytest.approx((store.segments[fires] == segment).mean())
            edges, filled = np.array(row["hist_edges"]), acts[fires, f]
            counts, _ = np.histogram(filled, edges)
            assert counts.tolist() == row["hist_counts"]
            assert len(counts) <= 41
        check_sample(mine, acts[:, f], traces, fires, store.offsets, config)


def check_sample(
    mine: list[dict[str, Any]], acts_T: Any, traces: Any, fires: Any, offsets: Any, config: ExamplesConfig
) -> None:
    sampled = [row for row in mine if row["where"] != "top"]
    positions = [int(offsets[row["trace"]] + row["position"]) for row in sampled]
    assert len(set(positions)) == len(positions)
    assert fires[positions].all()
    assert [row["activation"] for row in sampled] == acts_T[positions].tolist()
    assert np.bincount(traces[positions], minlength=1).max(initial=0) <= config.per_trace
    means = []
    for q in range(config.quantiles):
        inside = [row for row in sampled if row["where"] == f"q{q}"]
        assert len(inside) <= config.per_quantile
        assert [row["rank"] for row in inside] == list(range(len(inside)))
        values = [row["activation"] for row in inside]
        assert values == sorted(values, reverse=True)
        means += [np.mean(values)] if values else []
    assert means == sorted(means)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_the_top_k_is_exact_on_random_arrays(data: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    longest = data.draw(st.sampled_from([40, 200]))
    lengths = data.draw(st.lists(st.integers(1, longest), min_size=1, max_size=12))
    seed = data.draw(st.integers(0, 2**32 - 1))
    values = data.draw(st.sampled_from([1, 3, 1000]))  # from nearly all ties to hardly any
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    z = halves(rng, (total, 4), values)
    z[:, 1] *= rng.random(total) < 0.1
    z[:, 2] = 0
    config = ExamplesConfig(
        k=data.draw(st.integers(1, 12)),
        per_trace=data.draw(st.integers(1, 14)),
        quantiles=data.draw(st.integers(1, 5)),
        per_quantile=data.draw(st.integers(1, 6)),
    )
    study = make_study(tmp_path_factory.mktemp("drawn") / "s")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "CHUNK_ACTIVATIONS", data.draw(st.sampled_from([8, 56, 4096])))
        patch.setattr(selection, "MERGE_AT", data.draw(st.sampled_from([0, 10, 100000])))
        write_store(
            study,
            z,
            lengths,
            segments=rng.integers(0, 4, total),
            sink=rng.random(total) < 0.05,
            shard_tokens=data.draw(st.sampled_from([40, 10000])),
        )
        check_against_brute_force(study, config)


def test_many_firings_in_few_long_traces(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    z = rng.standard_normal((6000, 5)).astype(np.float16)
    study = make_study(tmp_path / "s")
    write_store(study, z, [2500, 500, 3000], segments=rng.integers(0, 4, 6000), shard_tokens=2000)
    check_against_brute_force(study, ExamplesConfig(k=30, per_trace=4))
    check_against_brute_force(study, ExamplesConfig(k=30, per_trace=50))


def test_latents_and_the_base_model_go_the_same_way(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    study = make_study(tmp_path / "s")
    write_store(study, halves(rng, (300, 3)), [10] * 30)
    write_store(study, halves(rng, (300, 3)), [10] * 30, source="base")
    save_sae(study, 3, 9)
    result = examples(study, ExamplesConfig(), OPTIONS)
    assert list(result["kinds"]) == ["direction", "latent", "base"]
    for kind in result["kinds"]:
        check_against_brute_force(study, ExamplesConfig(k=7, kinds=kind), kind)
    assert set(json.loads((study.path / "examples" / "levels.json").read_text())["latent"].values()) == {0.0}
    assert study.summary["examples"]["train"]["latent"]["features"] == 9


def test_planted_triggers_are_found(tmp_path: Path) -> None:
    """Direction 0 is 5 on token 7 and noise elsewhere, direction 1 is -3 on token 9: their examples are these."""
    rng = np.random.default_rng(7)
    tokens = rng.integers(0, 10, 4000)
    tokens[rng.random(4000) < 0.93] = 0
    z = rng.uniform(-1, 1, (4000, 2))
    z[tokens == 7, 0] = 5 + rng.random((tokens == 7).sum())
    z[tokens == 9, 1] = -3 - rng.random((tokens == 9).sum())
    study = make_study(tmp_path / "s")
    store = write_store(study, z, [100] * 40, tokens=tokens)
    examples(study, ExamplesConfig(k=10, per_trace=1), OPTIONS)
    rows = table(study, "direction-examples")
    for name, token in (("L0.gate+", 7), ("L1.gate-", 9)):
        mine = [row for row in rows if row["feature"] == name]
        assert len(mine) > 10
        assert {int(store.tokens[store.offsets[r["trace"]] + r["position"]]) for r in mine if r["where"] == "top"} == {
            token
        }


def test_levels_come_from_the_training_corpus(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    study = make_study(tmp_path / "s")
    write_store(study, 3 * rng.standard_normal((500, 1)), [50] * 10, corpus="heldout")
    with pytest.raises(MissingStage, match="--corpus train"):
        examples(study, ExamplesConfig(corpus="heldout"), OPTIONS)
    train = write_store(study, rng.standard_normal((500, 1)), [50] * 10)
    examples(study, ExamplesConfig(corpus="heldout"), OPTIONS)
    levels = json.loads((study.path / "examples" / "levels.json").read_text())["direction"]
    z = np.concatenate([z for _, z in train.chunks()])[:, 0]
    assert levels == {"L0.gate+": float(np.sort(z)[-6]), "L0.gate-": float(np.sort(-z)[-6])}
    stats = table(study, "direction-stats", "heldout")
    assert all(row["density"] > 0.1 for row in stats)  # three times as strong: far above 1%
    write_store(study, rng.standard_normal((500, 2)), [50] * 10)
    with pytest.raises(RunFailed, match="different adapters"):
        examples(study, ExamplesConfig(corpus="heldout"), OPTIONS)


def test_a_lost_levels_file_comes_back_whole(tmp_path: Path) -> None:
    study = make_study(tmp_path / "s")
    write_store(study, halves(np.random.default_rng(9), (100, 2)), [10] * 10)
    save_sae(study, 2, 3)
    examples(study, ExamplesConfig(), OPTIONS)
    path = study.path / "examples" / "levels.json"
    whole = json.loads(path.read_text())
    path.unlink()
    examples(study, ExamplesConfig(), OPTIONS)
    assert json.loads(path.read_text()) == whole


def test_features_with_few_examples_are_counted(tmp_path: Path) -> None:
    z = np.zeros((3000, 2))
    z[:7, 0] = np.arange(1, 8)
    study = make_study(tmp_path / "s")
    write_store(study, z, [100] * 30, shard_tokens=1000)
    counts = examples(study, ExamplesConfig(), OPTIONS)["kinds"]["direction"]
    assert (counts["features"], counts["never_fire"], counts["too_few"]) == (4, 3, 4)
    assert table(study, "direction-stats")[3]["hist_counts"] == []


def test_the_sample_depends_on_the_seed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(10)
    z = rng.standard_normal((8000, 2))
    found: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for seed in (0, 1):
        for chunk in (1000, 1 << 20):
            monkeypatch.setattr(features, "CHUNK_ACTIVATIONS", chunk)
            study = make_study(tmp_path / f"s{seed}-{chunk}")
            write_store(study, z, [20] * 400, shard_tokens=3000)
            examples(study, ExamplesConfig(per_quantile=3), Options(seed=seed))
            found[seed, chunk] = table(study, "direction-examples")
    assert found[0, 1000] == found[0, 1 << 20]
    assert found[0, 1000] != found[1, 1000]


def test_bad_input(tmp_path: Path) -> None:
    study = make_study(tmp_path / "s")
    with pytest.raises(BadInput, match="at least 1"):
        examples(study, ExamplesConfig(k=0), OPTIONS)
    with pytest.raises(BadInput, match="no kind of feature"):
        examples(study, ExamplesConfig(kinds="nothing"), OPTIONS)
    with pytest.raises(MissingStage, match="lorascope record"):
        examples(study, ExamplesConfig(), OPTIONS)


def test_ties_go_to_the_earlier_token() -> None:
    value = np.float32([2, 3, 3, 3, 2])
    position = np.arange(5)
    given = Candidates(position * 0, activation_keys(value), position, np.array([0, 0, 0, 1, 1]), value)
    assert best(given, 3, 2).position.tolist() == [1, 2, 3]
    assert best(given, 4, 1).position.tolist() == [1, 3]


def test_random_keys_are_uniform_and_repeatable() -> None:
    feature, position = np.divmod(np.arange(100_000), 1000)
    keys = random_keys(3, feature, position)
    np.testing.assert_array_equal(keys, random_keys(3, feature, position))
    assert keys.min() > 0
    np.testing.assert_allclose(np.histogram(keys, 10, (0, 2**32))[0], 10_000, rtol=0.05)
    by_feature = keys.reshape(100, 1000).astype(float)
    assert np.abs(np.corrcoef(by_feature)[np.triu_indices(100, 1)]).max() < 0.15


def test_histogram_bins_hold_their_values() -> None:
    values = np.float32([1.0, 1.0312, 1.0313, 2.0, 3.0, 2**-29.5, 1e-3])
    edges = bin_edges()
    bins = bins_of(values)
    assert (edges[bins] <= values).all()
    assert (values < edges[bins + 1]).all()
    assert bins_of(np.float32([1e-30, 1e30])).tolist() == [0, len(edges) - 2]


def test_quantiles_of_a_histogram() -> None:
    values = np.random.default_rng(0).lognormal(size=5000).astype(np.float32)
    counts = np.bincount(bins_of(values), minlength=len(bin_edges()) - 1)
    for share in (0.01, 0.5, 0.99):
        assert firing_quantile(counts, share, values.max()) == pytest.approx(np.quantile(values, share), rel=0.016)
    assert firing_quantile(counts, 1.0, values.max()) == values.max()
    assert firing_quantile(counts * 0, 0.5, 1.0) == 0
