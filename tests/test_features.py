"""Features: polarities, latents and firing levels against the plain formulas."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lorascope import features
from lorascope.errors import BadInput, MissingStage, RunFailed
from lorascope.features import available_kinds, firing_levels, jumprelu_codes, load_features
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


@pytest.mark.parametrize("group_bytes", [1, 1 << 28], ids=["one feature at a time", "all at once"])
@pytest.mark.parametrize("sample", [7, 100, 5000])  # a bound from a few tokens misleads, and is noticed
def test_firing_levels_are_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group_bytes: int, sample: int
) -> None:
    rng = np.random.default_rng(1)
    monkeypatch.setattr(features, "LEVEL_BYTES", group_bytes)
    monkeypatch.setattr(features, "SAMPLE_ROWS", sample)
    monkeypatch.setattr(features, "CHUNK_ACTIVATIONS", 100)
    z = rng.standard_normal((1000, 4)).astype(np.float16).astype(np.float32)
    z[:, 1] = 0  # never fires
    z[:, 2] = np.round(z[:, 2] * 2) / 2  # many ties
    z[:, 3] = np.where(np.arange(1000) < 5, 8.0, 0)  # non-zero on half a per cent
    segments = rng.integers(0, 4, 1000)
    sink = rng.random(1000) < 0.1
    study = make_study(tmp_path / "s")
    store = write_store(study, z, [100] * 10, segments=segments, sink=sink, shard_tokens=250)
    found = load_features(study, "train", "direction")
    levels = firing_levels(found)
    acts = all_chunks(found)[(segments != 0) & ~sink]
    n = len(acts)
    assert n == store.ordinary.sum()
    wanted = np.sort(acts, axis=0)[::-1][n // 100]
    np.testing.assert_array_equal(levels, wanted)
    assert ((acts > levels).mean(axis=0) <= 0.01).all()
    untied = [0, 1]  # polarities of the continuous column
    np.testing.assert_array_equal((acts > levels).sum(axis=0)[untied], n // 100)
    assert levels[2] == levels[3] == levels[6] == 0


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
