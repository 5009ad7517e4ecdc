"""Where features fire, in bounded memory: the same as by brute force, however it is divided."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorascope.config import Options
from lorascope.explain import ExplainConfig, explain_features
from lorascope.explain.firings import FIRING, collect_firings, read_corpus
from lorascope.features import FeatureSet, load_features
from lorascope.study import Study
from planted_text import planted_study


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> FeatureSet:
    study, _ = planted_study(tmp_path_factory.mktemp("firings") / "study", traces=60)
    return load_features(study, "train", "direction")


class Chunked(FeatureSet):
    """Features whose chunks are of a few tokens, so that many are needed."""

    @property
    def chunk_rows(self) -> int:
        return 37


@pytest.mark.parametrize("held", [1, 40, 10_000])
@pytest.mark.parametrize("max_tokens", [800, 100_000])
def test_firings_are_those_of_brute_force(features: FeatureSet, tmp_path: Path, held: int, max_tokens: int) -> None:
    chunked = Chunked(**features.__dict__)
    reading = read_corpus(features.store, max_tokens=max_tokens, rng=np.random.default_rng(0))
    levels_F = np.full(len(features.ids), 0.25, np.float32)
    found = collect_firings(chunked, reading, levels_F, tmp_path, held)
    acts_TF = features.columns(np.arange(len(features.ids)))[reading.store_T]
    fires_TF = (acts_TF > levels_F) & reading.corpus.ordinary_T[:, None]
    assert fires_TF.sum() > 100
    for number in range(len(features.ids)):
        at_n, activation_n = found.of(number)
        np.testing.assert_array_equal(at_n, np.flatnonzero(fires_TF[:, number]))
        np.testing.assert_array_equal(activation_n, acts_TF[at_n, number])
        assert (at_n.dtype, activation_n.dtype) == (np.int64, np.float32)
    found.close()


def test_what_is_over_the_bound_is_in_a_file_that_goes_away(features: FeatureSet, tmp_path: Path) -> None:
    chunked = Chunked(**features.__dict__)
    reading = read_corpus(features.store, max_tokens=100_000, rng=np.random.default_rng(0))
    levels_F = np.zeros(len(features.ids), np.float32)
    whole = collect_firings(features, reading, levels_F, tmp_path)
    parts = collect_firings(chunked, reading, levels_F, tmp_path, 100)
    all_of_them = sum(len(whole.of(number)[0]) for number in range(len(features.ids)))
    assert len(parts._only) == 0
    assert parts._file is not None
    assert parts._file.seek(0, 2) == FIRING.itemsize * all_of_them
    assert whole._file is None
    parts.close()
    whole.close()
    assert list(tmp_path.iterdir()) == []


def test_any_thread_may_read(features: FeatureSet, tmp_path: Path) -> None:
    reading = read_corpus(features.store, max_tokens=100_000, rng=np.random.default_rng(0))
    levels_F = np.zeros(len(features.ids), np.float32)
    found = collect_firings(Chunked(**features.__dict__), reading, levels_F, tmp_path, 20)
    right = [found.of(number)[0] for number in range(len(features.ids))]
    wrong: list[int] = []

    def read(number: int) -> None:
        wrong.extend(number for _ in range(20) if not np.array_equal(found.of(number)[0], right[number]))

    threads = [threading.Thread(target=read, args=(number,)) for number in range(len(features.ids))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.close()
    assert wrong == []


def test_a_bound_changes_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(study: Study) -> bytes:
        explain_features(study, ExplainConfig(kinds="direction", examples=10, learn=64), Options())
        return (study.path / "explanations" / "direction.jsonl").read_bytes()

    whole = rows(planted_study(tmp_path / "whole", traces=60)[0])
    collected: list[int] = []

    def in_small_parts(features: FeatureSet, *arguments: Any) -> Any:
        collected.append(1)
        return collect_firings(Chunked(**features.__dict__), *arguments, 30)

    monkeypatch.setattr("lorascope.explain.job.collect_firings", in_small_parts)
    assert rows(planted_study(tmp_path / "parts", traces=60)[0]) == whole
    assert collected == [1, 1]
