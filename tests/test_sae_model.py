"""The saved SAE: folding, thresholds, SAELens reading the folder, and quality against plain arithmetic."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lorascope.errors import BadInput, MissingStage
from lorascope.features import jumprelu_codes
from lorascope.sae.files import load_sae, save_sae
from lorascope.sae.model import SAE, fold
from lorascope.sae.moments import Unit, choose_unit, measure_moments
from lorascope.sae.quality import measure_quality
from tiny_store import make_study, write_store


def random_sae(n: int = 10, f: int = 40, seed: int = 0) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((n, f), (f, n), (f,), (n,))
    tensors = [torch.randn(*shape, generator=generator) for shape in shapes]
    return SAE(*tensors, torch.rand(f, generator=generator))


def random_unit(n: int = 10) -> Unit:
    rng = np.random.default_rng(0)
    return Unit("effect", rng.normal(0, 3, n), rng.uniform(0.1, 4, n))


def test_threshold_is_strict_and_per_latent() -> None:
    one = torch.ones(1, 3)
    sae = SAE(one, torch.eye(3)[:, :1], torch.zeros(3), torch.zeros(1), torch.tensor([0.5, 1.0, 2.0]))
    assert sae.encode(torch.tensor([[1.0]])).tolist() == [[1.0, 0.0, 0.0]]
    assert sae.encode(torch.tensor([[3.0]])).tolist() == [[3.0, 3.0, 3.0]]
    assert sae.encode(torch.tensor([[-3.0]])).tolist() == [[0.0, 0.0, 0.0]]


def test_folding_gives_the_same_codes_and_the_same_reconstruction_in_raw_units() -> None:
    sae, unit = random_sae(), random_unit()
    z = np.random.default_rng(1).normal(0, 5, (300, 10)).astype(np.float32)
    folded = fold(sae, unit)
    u = torch.from_numpy(unit.apply(z))
    codes, raw = sae.encode(u), folded.encode(torch.from_numpy(z))
    torch.testing.assert_close(raw, codes, rtol=1e-4, atol=1e-4)
    assert torch.equal(raw > 0, codes > 0)
    expected = sae.decode(codes).numpy() / unit.factor_N + unit.offset_N
    np.testing.assert_allclose(folded.reconstruct(torch.from_numpy(z)).numpy(), expected, rtol=1e-3, atol=1e-3)


def test_codes_do_not_depend_on_the_batch() -> None:
    sae = random_sae()
    z = torch.randn(257, 10, generator=torch.Generator().manual_seed(5)) * 3
    whole, order = sae.encode(z), torch.randperm(257, generator=torch.Generator().manual_seed(6))
    split = torch.cat([sae.encode(part) for part in z[order].split(7)])
    torch.testing.assert_close(split, whole[order], rtol=1e-5, atol=1e-5)
    assert torch.equal(split > 0, whole[order] > 0)
    alone = sae.encode(z[3])
    torch.testing.assert_close(alone, whole[3], rtol=1e-5, atol=1e-5)


def test_features_compute_the_same_codes() -> None:
    sae, z = random_sae(), np.random.default_rng(0).normal(0, 3, (100, 10)).astype(np.float32)
    ours = sae.encode(torch.from_numpy(z)).numpy()
    theirs = jumprelu_codes(z, *(sae.tensors()[name].numpy() for name in ("W_enc", "b_enc", "threshold")))
    np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-5)


READ_BY_SAELENS = """
import sys, json, torch
from sae_lens import SAE
from safetensors.torch import load_file, save_file
sae = SAE.load_from_disk(sys.argv[1])
z = load_file(sys.argv[2])["z"]
with torch.no_grad():
    codes = sae.encode(z)
    save_file({"codes": codes, "output": sae.decode(codes)}, sys.argv[3])
print(json.dumps({"class": type(sae).__name__, "d_in": sae.cfg.d_in, "unit": sae.cfg.metadata["unit"]}))
"""


def test_saelens_loads_the_folder_and_gives_the_same_codes(tmp_path: Path) -> None:
    """In a process of its own: SAELens imports TransformerLens, whose warnings and patches stay out of these tests."""
    from safetensors.torch import load_file, save_file

    sae = fold(random_sae(), random_unit())
    save_sae(tmp_path / "sae", sae, {"unit": "effect"})
    z = torch.randn(200, 10, generator=torch.Generator().manual_seed(2)) * 4
    save_file({"z": z}, tmp_path / "z.safetensors")
    command = [sys.executable, "-c", READ_BY_SAELENS, "sae", "z.safetensors", "out.safetensors"]
    environment = os.environ | {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"class": "JumpReLUSAE", "d_in": 10, "unit": "effect"}
    theirs = load_file(tmp_path / "out.safetensors")
    codes = sae.encode(z)
    assert torch.equal(theirs["codes"] > 0, codes > 0)
    torch.testing.assert_close(theirs["codes"], codes, rtol=0, atol=1e-4)
    torch.testing.assert_close(theirs["output"], sae.decode(codes), rtol=1e-5, atol=1e-4)


def test_files_round_trip_and_damage_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "sae"
    with pytest.raises(MissingStage, match="lorascope sae"):
        load_sae(folder)
    sae = random_sae()
    save_sae(folder, sae, {"unit": "std", "addresses": ["L0.q"]})
    loaded, metadata = load_sae(folder)
    assert all(torch.equal(a, b) for a, b in zip(sae.tensors().values(), loaded.tensors().values(), strict=True))
    assert metadata["unit"] == "std"
    (folder / "sae_weights.safetensors").write_bytes(b"no")
    with pytest.raises(BadInput, match="damaged"):
        load_sae(folder)
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config | {"architecture": "gated"}))
    with pytest.raises(BadInput, match="gated"):
        load_sae(folder)


def test_quality_equals_plain_arithmetic(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    z = (rng.normal(0, 1, (700, 6)) * np.array([1, 2, 3, 1, 1, 0.5]) + 4).astype(np.float32)
    z[:, 5] = 0.25  # never varies
    study, effect = make_study(tmp_path / "s"), [1.0, 3.0, 0.5, 2.0, 1.0, 1.0]
    store = write_store(study, z[:500], [100] * 5, effect=effect)
    heldout = write_store(study, z[500:], [100] * 2, effect=effect, corpus="heldout")
    moments = measure_moments(store)
    unit = choose_unit(moments, "effect")
    sae = fold(random_sae(6, 12), unit)
    sae.threshold_F[:3] = 1e9  # these never fire
    found = measure_quality(sae, unit, moments, store, heldout, components=2)

    train, test = store.rows(np.arange(500)).astype(np.float64), heldout.rows(np.arange(200)).astype(np.float64)
    mean, output = train.mean(0), sae.reconstruct(torch.from_numpy(test.astype(np.float32))).numpy()
    varies = np.arange(5)
    for name, size in (("effect", np.array(effect)), ("std", 1 / np.maximum(train.std(0), 1e-9))):
        error = (((test - output) * size)[:, varies] ** 2).sum()
        assert found[f"fvu_{name}"] == pytest.approx(error / (((test - mean) * size)[:, varies] ** 2).sum(), rel=1e-4)
    per_direction = ((test - output) ** 2).sum(0)[varies] / ((test - mean) ** 2).sum(0)[varies]
    np.testing.assert_allclose(found["fvu_per_direction"][:5], per_direction, rtol=1e-4)
    assert found["fvu_per_direction"][5] is None
    codes = sae.encode(torch.from_numpy(test.astype(np.float32)))
    assert found["l0"] == pytest.approx(float((codes > 0).sum() / 200))
    assert found["dead_latents"] >= 3
    assert found["dead"] == found["dead_latents"] / 12
    assert found["fvu_unit"] == pytest.approx(found["fvu_effect"], rel=1e-6)

    scaled = ((train - mean) * effect)[:, varies]
    basis = np.linalg.svd(scaled, full_matrices=False)[2][:2]
    left = ((test - mean) * effect)[:, varies]
    error = ((left - left @ basis.T @ basis) ** 2).sum()
    assert found["pca_fvu_effect"] == pytest.approx(error / (left**2).sum(), rel=1e-4)
    json.dumps(found, allow_nan=False)


def test_perfect_reconstruction_leaves_nothing_unexplained(tmp_path: Path) -> None:
    z = np.random.default_rng(0).normal(0, 1, (300, 4)).astype(np.float32)
    store = write_store(make_study(tmp_path / "s"), z, [100] * 3)
    identity = torch.cat([torch.eye(4), -torch.eye(4)], dim=1)
    sae = SAE(identity, identity.T.contiguous(), torch.zeros(8), torch.zeros(4), torch.zeros(8))
    moments = measure_moments(store)
    found = measure_quality(sae, choose_unit(moments, "std"), moments, store, store)
    assert found["fvu_std"] < 1e-12
    assert found["l0"] == pytest.approx(4)
    assert found["dead"] == 0
