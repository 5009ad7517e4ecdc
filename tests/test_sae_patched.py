"""Patched KL on a tiny model: its floor, its baselines and its pooling against brute force."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorascope.adapter import Adapter
from lorascope.attached import attach
from lorascope.config import Options
from lorascope.edits import off, replace
from lorascope.errors import BadInput, MissingStage
from lorascope.models import load_model
from lorascope.recording import RecordConfig, record
from lorascope.sae import PatchConfig, SAEConfig, decompose, patched_kl, save_sae
from lorascope.sae.model import SAE
from lorascope.sae.patched import draw_sequences
from lorascope.store import Store, store_folder
from lorascope.study import Study
from lorascope.traces import Trace, write_traces
from tiny_folder import save_tiny
from tiny_models import random_adapter
from tiny_store import make_study, write_store

OPTIONS = Options(device="cpu")
METADATA = {"unit": "effect", "corpus": "train"}


def traces(n: int, start: int) -> list[Trace]:
    rows = [(f"What is {i} + {i}?", f"{i} + {i} is {2 * i}. Wait, yes.", f"{2 * i}") for i in range(start, start + n)]
    return [Trace(f"t{i}", *row) for i, row in enumerate(rows)]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    base = save_tiny(tmp_path_factory.mktemp("model"))
    made = Study.create(tmp_path_factory.mktemp("made") / "study", model=str(base), system="")
    random_adapter(load_model(str(base))[0]).save(made.path / "adapter")
    for corpus, n, start in (("train", 12, 10), ("heldout", 5, 50)):
        write_traces(made.corpus_file(corpus), traces(n, start))
        record(made, RecordConfig(corpus=corpus), OPTIONS)
    return made


def heldout(study: Study, corpus: str = "heldout") -> Store:
    return Store.open(store_folder(study.path, corpus, "adapter"))


def identity_sae(n: int) -> SAE:
    both = torch.cat([torch.eye(n), -torch.eye(n)], dim=1)
    return SAE(both, both.T.contiguous(), torch.zeros(2 * n), torch.zeros(n), torch.zeros(2 * n))


def brute_force(study: Study, patch: Any) -> float:
    """Mean KL over the assistant's predicted tokens, one unpadded sequence at a time, in float64."""
    store, (model, _) = heldout(study), load_model(study.model_name)
    total = count = 0.0
    with torch.no_grad(), attach(model, Adapter.load(study.path / "adapter")) as attached:
        for i in range(store.n_traces):
            part = slice(int(store.offsets[i]), int(store.offsets[i + 1]))
            ids = torch.from_numpy(store.tokens[part].astype(np.int64))[None]
            first = attached.run(ids)
            if patch is None:
                edit = off("*")
            else:
                z = first.scalars.clone()
                ordinary = torch.from_numpy(store.ordinary[part].copy())
                z[0, ordinary] = patch(z[0, ordinary])
                edit = replace(z)
            with attached.edit(edit):
                second = attached.run(ids)
            start = int(store.response_start[i])
            p, q = (torch.log_softmax(run.logits[0, start - 1 : -1].double(), -1) for run in (first, second))
            total += float((p.exp() * (p - q)).sum())
            count += len(p)
    return total / count


def test_a_perfect_sae_reaches_the_floor_and_off_is_the_base_model(study: Study) -> None:
    save_sae(study.path / "sae", identity_sae(len(heldout(study).addresses)), METADATA)
    result = patched_kl(study, PatchConfig(), OPTIONS)
    assert abs(result["floor"]) < 1e-6
    assert abs(result["patched_kl"]) < 1e-6
    assert result["adapter_off_kl"] == pytest.approx(brute_force(study, None), rel=1e-3)
    assert result["adapter_off_kl"] > 1e-3
    assert study.summary["adapter_off_kl"] == result["adapter_off_kl"]
    assert study.summary["patched_kl"] == result["patched_kl"]


def test_variants_equal_brute_force(study: Study) -> None:
    n = len(heldout(study).addresses)
    half = identity_sae(n)
    half.W_dec_FN.mul_(0.5)
    save_sae(study.path / "sae", half, METADATA)
    result = patched_kl(study, PatchConfig(token_budget=120), OPTIONS)
    assert result["patched_kl"] == pytest.approx(brute_force(study, lambda z: z * 0.5), rel=1e-3)
    saved = json.loads((study.path / "sae/patched_kl.json").read_text())
    assert saved["traces"] == 5
    train = heldout(study, "train")
    z = train.rows(np.flatnonzero(train.ordinary)).astype(np.float64)
    mean, size = torch.from_numpy(z.mean(0)).float(), torch.from_numpy(train.effect_per_scalar)
    basis = np.linalg.svd((z - z.mean(0)) * train.effect_per_scalar, full_matrices=False)[2][:16]
    maps = torch.from_numpy(basis.T @ basis).float()

    def largest(x: torch.Tensor) -> torch.Tensor:
        out = mean.repeat(len(x), 1)
        for row, kept in zip(range(len(x)), ((x - mean) * size).abs().argsort(1, descending=True), strict=True):
            out[row, kept[:16]] = x[row, kept[:16]]
        return out

    response = torch.from_numpy(train.assistant_mean())
    for name, patch in {
        "mean": lambda x: response.expand_as(x),
        "components": lambda x: mean + ((x - mean) * size) @ maps / size,
        "largest": largest,
    }.items():
        assert saved["variants"][name]["value"] == pytest.approx(brute_force(study, patch), rel=2e-3), name


def test_values_are_pooled_and_split_by_the_predicted_tokens_segment(study: Study) -> None:
    half = identity_sae(len(heldout(study).addresses))
    half.W_dec_FN.mul_(0.8)
    save_sae(study.path / "sae", half, METADATA)
    patched_kl(study, PatchConfig(), OPTIONS)
    saved = json.loads((study.path / "sae/patched_kl.json").read_text())
    for variant in saved["variants"].values():
        parts = variant["segments"].values()
        assert sum(part["tokens"] for part in parts) == saved["predicted_tokens"]
        pooled = sum(part["value"] * part["tokens"] for part in parts) / saved["predicted_tokens"]
        assert pooled == pytest.approx(variant["value"], rel=1e-6, abs=1e-12)
        if variant["value"]:  # an exact 0 in every trace has no interval
            assert variant["low"] <= variant["value"] <= variant["high"]
    assert set(saved["variants"]["sae"]["segments"]) == {"special", "think", "answer"}
    assert saved["ratio"]["value"] == pytest.approx(saved["patched_kl"] / saved["adapter_off_kl"])


def test_command_trains_and_patches_and_patching_options_leave_the_sae_alone(study: Study) -> None:
    config = SAEConfig(k=3, expansion=2, batch=64, tokens=3000, patched_tokens=300)
    result = decompose(study, config, OPTIONS)
    assert {"fvu_effect", "l0", "patched_kl", "adapter_off_kl"} <= set(result)
    stamp = (study.path / "sae/cfg.json").stat().st_mtime_ns
    again = decompose(study, SAEConfig(k=3, expansion=2, batch=64, tokens=3000, patched=False), OPTIONS)
    assert (study.path / "sae/cfg.json").stat().st_mtime_ns == stamp
    assert "patched_kl" not in again


def test_a_new_autoencoder_takes_the_old_ones_patched_kl_away(study: Study) -> None:
    config = SAEConfig(k=3, expansion=2, batch=64, tokens=3000, patched_tokens=300)
    decompose(study, config, OPTIONS)
    assert "patched_kl" in study.summary
    decompose(study, dataclasses.replace(config, patched=False), OPTIONS)  # the same one: its patched KL still holds
    assert {"patched_kl", "adapter_off_kl"} <= set(study.summary)
    assert (study.path / "sae/patched_kl.json").exists()
    decompose(study, dataclasses.replace(config, k=4, patched=False), OPTIONS)
    assert not {"patched_kl", "adapter_off_kl"} & set(study.summary)
    assert study.summary["sae"]["l0"] > 0
    assert not (study.path / "sae/patched_kl.json").exists()
    assert "sae:patched" not in study.manifest["stages"]


def test_drawn_traces_keep_to_the_budget(tmp_path: Path) -> None:
    store = write_store(make_study(tmp_path / "s"), np.ones((1000, 2)), [10] * 50 + [500])
    drawn = draw_sequences(store, 200, np.random.default_rng(0))
    assert sum(len(s.ids) for s in drawn) <= 200
    assert max(len(s.ids) for s in drawn) <= 26
    assert len(drawn) > 10
    first = drawn[0]
    assert len(first.predicted) == len(first.ids) - 1
    with pytest.raises(BadInput, match="patched-tokens"):
        draw_sequences(
            write_store(make_study(tmp_path / "t"), np.ones((3, 2)), [1, 1, 1]), 200, np.random.default_rng(0)
        )


def test_missing_pieces_are_named(tmp_path: Path) -> None:
    empty = make_study(tmp_path / "s")
    with pytest.raises(MissingStage, match="lorascope sae"):
        patched_kl(empty, PatchConfig(), OPTIONS)
    with pytest.raises(BadInput, match="patched-tokens"):
        patched_kl(empty, PatchConfig(tokens=1), OPTIONS)
