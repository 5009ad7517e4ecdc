"""Features: polarities, latents and firing levels against the plain formulas."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lorascope import features
from lorascope.config import field_docs
from lorascope.errors import BadInput, MissingStage, RunFailed
from lorascope.example_search import ExamplesConfig
from lorascope.explain import ExplainConfig
from lorascope.explain.categories import CategorizeConfig
from lorascope.features import KINDS, available_kinds, firing_levels, jumprelu_codes, load_features
from lorascope.reasoning import ReasoningConfig
from lorascope.store import Store
from lorascope.study import Study
from tiny_store import halves, make_study, write_store


def save_sae(study: Study, inputs: int, latents: int, *, subtract: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    weights = {
        "W_enc": rng.standard_normal((inputs, latents)).astype(np.float32),
        "W_dec": rng.standard_normal((latents, inputs)).astype(np.float32),
        "b_enc": rng.standard_normal(latents).astype(np.float32),
        "b_dec": rng.standard_normal(inputs).astype(np.float32),
        "threshold": rng.random(latents).astype(np.float32) * 3,
    }
    (study.path / "sae").mkdir(exist_ok=True)
    save_file(weights, study.path / "sae" / "sae_weights.safetensors")
    (study.path / "sae" / "cfg.json").write_text(json.dumps({"apply_b_dec_to_input": subtract}))
    return weights


def all_chunks(found: features.FeatureSet) -> np.ndarray:
    parts = list(found.chunks())
    assert [start for start, _ in parts] == list(np.cumsum([0] + [len(a) for _, a in parts])[:-1])
    assert len(parts) == found.n_chunks
    return np.concatenate([acts for _, acts in parts])


def test_a_direction_has_two_features_that_never_fire_together(tmp_path: Path) -> None:
    study = make_study(tmp_path / "s")
    z = np.float32([[1, -2], [-3, 0], [0.5, 4]])
    write_store(study, z, [2, 1], addresses=["L0.q", "L1.gate"], effect=[2.0, 0.5])
    found = load_features(study, "train", "direction")
    assert found.ids == ["L0.q+", "L0.q-", "L1.gate+", "L1.gate-"]
    wanted = np.float32([[2, 0, 0, 1], [0, 6, 0, 0], [1, 0, 2, 0]])
    np.testing.assert_array_equal(all_chunks(found), wanted)
    np.testing.assert_array_equal(found.columns([3, 0]), wanted[:, [3, 0]])
    assert (found.unit, found.latent) == ("effect", False)


def test_the_base_models_features_come_from_its_own_store(tmp_path: Path) -> None:
    study = make_study(tmp_path / "s")
    with pytest.raises(MissingStage, match="--source base"):
        load_features(study, "train", "base")
    write_store(study, [[1.0], [-1.0]], [2], source="base")
    found = load_features(study, "train", "base")
    assert found.ids == ["base.L0.gate+", "base.L0.gate-"]
    np.testing.assert_array_equal(all_chunks(found), [[1, 0], [0, 1]])


def test_jumprelu_by_hand() -> None:
    codes = jumprelu_codes(
        np.float32([[1.0], [2.0], [-1.0]]), np.float32([[1, -1]]), np.float32([0, 0.5]), np.float32([1, -1])
    )
    # 1 is not above the threshold 1; a threshold below 0 lets nothing negative through
    np.testing.assert_array_equal(codes, np.float32([[0, 0], [2, 0], [0, 1.5]]))


@pytest.mark.parametrize("subtract", [False, True])
def test_latents_are_the_saes_codes(tmp_path: Path, subtract: bool) -> None:
    study = make_study(tmp_path / "s")
    z = halves(np.random.default_rng(0), (40, 3))
    write_store(study, z, [25, 15], shard_tokens=20)
    with pytest.raises(MissingStage, match="lorascope sae"):
        load_features(study, "train", "latent")
    w = save_sae(study, 3, 7, subtract=subtract)
    found = load_features(study, "train", "latent")
    pre = (z - w["b_dec"] * subtract) @ w["W_enc"] + w["b_enc"]
    codes = np.where(pre > w["threshold"], np.maximum(pre, 0), 0)
    np.testing.assert_allclose(all_chunks(found), codes, atol=1e-5)
    np.testing.assert_allclose(found.columns([6, 2]), codes[:, [6, 2]], atol=1e-5)
    assert found.ids[6] == "sae.6"
    np.testing.assert_array_equal(firing_levels(found), np.zeros(7))


def test_an_sae_of_another_adapter_is_refused(tmp_path: Path) -> None:
    study = make_study(tmp_path / "s")
    write_store(study, np.ones((4, 3)), [4])
    save_sae(study, 2, 5)
    with pytest.raises(RunFailed, match="reads 2 scalars"):
        load_features(study, "train", "latent")


def level_store(study: Study, z: np.ndarray, *, seed: int = 1) -> tuple[features.FeatureSet, np.ndarray]:
    """The directions of scalars in four shards and more, and the activations on their ordinary tokens."""
    rng = np.random.default_rng(seed)
    n = len(z)
    segments, sink = rng.integers(0, 4, n), rng.random(n) < 0.1
    write_store(study, z, [n // 20] * 20, segments=segments, sink=sink, shard_tokens=n // 4)
    found = load_features(study, "train", "direction")
    return found, all_chunks(found)[(segments != 0) & ~sink]


@pytest.mark.parametrize("waiting", [1, 1 << 21], ids=["equal ones counted at once", "at the end"])
@pytest.mark.parametrize("size", [1000, 20_000])  # the longer one is long enough for the bound to rise on the way
def test_firing_levels_are_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waiting: int, size: int) -> None:
    rng = np.random.default_rng(1)
    monkeypatch.setattr(features, "MOST_WAITING", waiting)
    monkeypatch.setattr(features, "CHUNK_ACTIVATIONS", 1000)
    z = rng.standard_normal((size, 8)).astype(np.float16).astype(np.float32)
    z[:, 1] = 0  # never fires
    z[:, 2] = np.round(z[:, 2] * 2) / 2  # many ties
    z[:, 3] = np.where(np.arange(size) < size // 200, 8.0, 0)  # non-zero on half a per cent
    z[:, 4] = np.where(np.arange(size) < size // 2, 4.0, -4.0)  # one value, and that in order
    z[:, 5] *= np.linspace(5, 1, size) ** 4  # the largest come first
    z[:, 6] *= np.linspace(1, 5, size) ** 4  # and last
    z[:, 7] *= 2.0**-40  # below the histogram: all of it is in the lowest bin
    found, acts = level_store(make_study(tmp_path / "s"), z)
    levels = firing_levels(found)
    n = len(acts)
    assert n == found.store.ordinary.sum()
    wanted = np.sort(acts, axis=0)[::-1][n // 100]
    np.testing.assert_array_equal(levels, wanted)
    assert ((acts > levels).mean(axis=0) <= 0.01).all()
    assert levels[2] == levels[3] == levels[6] == levels[7] == 0
    assert levels[8] == levels[9] == 4
    assert (levels[10:] > 0).all()


def test_the_largest_activations_are_told_apart_beyond_the_histogram(tmp_path: Path) -> None:
    z = np.random.default_rng(0).standard_normal((1000, 1)) * 2.0**10
    study = make_study(tmp_path / "s")
    write_store(study, z, [1000], effect=[2.0**20])
    found = load_features(study, "train", "direction")
    np.testing.assert_array_equal(firing_levels(found), np.sort(all_chunks(found), axis=0)[::-1][10])


@pytest.mark.parametrize("size", [400, 40_000])
def test_firing_levels_take_two_readings_whatever_the_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    found, _ = level_store(make_study(tmp_path / "s"), np.random.default_rng(0).standard_normal((size, 6)))
    real, readings, rows = Store.chunks, [], []

    def counted(self: Store, most: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        readings.append(1)
        for start, z_TN in real(self, most):
            rows.append(len(z_TN))
            yield start, z_TN

    monkeypatch.setattr(Store, "chunks", counted)
    monkeypatch.setattr(Store, "gather", None)  # nothing is read beside
    firing_levels(found)
    assert len(readings) == 2
    assert sum(rows) == 2 * size


def test_equal_activations_take_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token of the corpus is in the one bin: what is held is the different values, however many there are."""
    monkeypatch.setattr(features, "MOST_WAITING", 100)
    monkeypatch.setattr(features, "CHUNK_ACTIVATIONS", 500)
    z = np.where(np.random.default_rng(0).random((20_000, 2)) < 0.5, 1.0, 1.0 + 2**-10)
    found, acts = level_store(make_study(tmp_path / "s"), z)
    held, real = [], features.counted

    def watched(values: np.ndarray, counts: np.ndarray, more: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        held.append((len(values), sum(len(part) for part in more)))
        return real(values, counts, more)

    monkeypatch.setattr(features, "counted", watched)
    np.testing.assert_array_equal(firing_levels(found), np.sort(acts, axis=0)[::-1][len(acts) // 100])
    assert max(values for values, _ in held) == 4  # two directions, two values
    assert max(waiting for _, waiting in held) <= 100 + 500
    assert sum(waiting for _, waiting in held) == 2 * len(acts)


def test_levels_of_a_corpus_without_ordinary_tokens_are_zero(tmp_path: Path) -> None:
    study = make_study(tmp_path / "s")
    write_store(study, np.ones((4, 1)), [4], segments=np.zeros(4))
    np.testing.assert_array_equal(firing_levels(load_features(study, "train", "direction")), [0, 0])


def test_kinds_are_named(tmp_path: Path) -> None:
    study = make_study(tmp_path / "s")
    with pytest.raises(BadInput, match="direction, latent, base"):
        load_features(study, "train", "neurons")
    assert available_kinds(study, "train") == []
    write_store(study, np.ones((4, 2)), [4])
    assert available_kinds(study, "train") == ["direction"]
    save_sae(study, 2, 5)
    assert available_kinds(study, "train") == ["direction", "latent"]
    write_store(study, np.ones((4, 2)), [4], corpus="heldout", source="base")  # its levels are not known
    write_store(study, np.ones((4, 2)), [4], corpus="heldout")
    assert available_kinds(study, "heldout") == ["direction", "latent"]


@pytest.mark.parametrize("config", [ExamplesConfig, ExplainConfig, CategorizeConfig, ReasoningConfig])
def test_help_names_every_kind_in_order(config: type) -> None:
    """Help texts are literals in the source, so that a new kind of features must be added to each."""
    assert ", ".join(KINDS) in field_docs(config)["kinds"]
