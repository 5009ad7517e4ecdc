"""Edits of the built-in model's scalars, to zero, to the mean and to the autoencoder's, against plain edited runs."""

import json
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file

from lorascope.ablation import make_targets
from lorascope.adapter import Adapter
from lorascope.attached import attach
from lorascope.cli import main
from lorascope.leave_one_out import leave_out
from lorascope.models import load_model
from lorascope.store import Store
from lorascope.study import Study
from lorascope.traces import Rendered
from real_model import MODEL, kl_sum, plain_run, rendered
from test_real_model_stages import decoded


@pytest.fixture(scope="module")
def store(real_study: Study) -> Store:
    return Store.open(real_study.path / "scalars" / "train" / "adapter")


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(MODEL)[0].requires_grad_(False)


@pytest.fixture(scope="module")
def adapter(real_study: Study) -> Adapter:
    return Adapter.load(real_study.path / "adapter")


@pytest.fixture(scope="module")
def heldout(real_study: Study) -> list[Rendered]:
    return rendered(real_study, "heldout")


@torch.no_grad()
def test_ablation_to_zero_and_to_the_mean_equals_plain_edited_runs(
    real_study: Study, store: Store, model: Any, adapter: Adapter, heldout: list[Rendered]
) -> None:
    """The KL of whole logits in float64; its logits are fp32, so 1e-3 of it (docs/log.md)."""
    chosen = [make_targets(adapter.addresses, kind)[i] for kind, i in (("direction", 140), ("layer", 9), ("group", 0))]
    z_TN, traces = decoded(store.folder), heldout[:2]
    parts = zip(store.offsets, store.response_start, store.offsets[1:], strict=False)
    responses = np.concatenate([z_TN[first + start : stop] for first, start, stop in parts])
    mean = torch.from_numpy(responses.astype(np.float64).mean(axis=0).astype(np.float32))
    before = [plain_run(model, adapter, trace.ids) for trace in traces]
    assert main(["ablate", str(real_study.path), "--by", "group", "--to", "mean", "--traces", "2"]) == 0
    rows = pq.read_table(real_study.path / "ablation" / "mean" / "exact-group.parquet").to_pylist()
    tokens = sum(len(trace.ids) - trace.response_start for trace in traces)
    for to in (torch.zeros(len(mean)), mean):
        with attach(model, adapter) as attached:
            sums, _ = leave_out(attached, traces, chosen, to.numpy(), 4096)
        for target in chosen:
            off = torch.from_numpy(target.columns)

            def change(z: Any, columns: slice, off: Any = off, to: Any = to) -> Any:
                return torch.where(off[columns], to[columns], z)

            wanted = [
                kl_sum(p, plain_run(model, adapter, trace.ids, change), trace)
                for p, trace in zip(before, traces, strict=True)
            ]
            assert sums[target.by, target.name][:, 0, 0] == pytest.approx(np.array(wanted), rel=1e-3, abs=1e-6)
            if to is mean and target.by == "group":
                row = next(row for row in rows if (row["target"], row["segment"]) == (target.name, "all"))
                assert row["kl"] == pytest.approx(sum(wanted) / tokens, rel=1e-3)


@pytest.fixture(scope="module")
def decomposed(real_study: Study) -> Study:
    """With a small autoencoder and its patched KL."""
    sae = ["--tokens", "6400", "--expansion", "2", "--k", "8", "--batch", "64"]
    assert main(["sae", str(real_study.path), *sae]) == 0
    return real_study


@torch.no_grad()
def test_patched_kl_equals_plain_edited_runs(
    decomposed: Study, model: Any, adapter: Adapter, heldout: list[Rendered]
) -> None:
    """Ordinary tokens' scalars replaced by the autoencoder's, the others' by the first run's own."""
    saved = json.loads((decomposed.path / "sae" / "patched_kl.json").read_text())
    weights = load_file(decomposed.path / "sae" / "sae_weights.safetensors")
    sae = {name: torch.from_numpy(values) for name, values in weights.items()}
    other = Store.open(decomposed.path / "scalars" / "heldout" / "adapter")
    sums, tokens = {"off": 0.0, "sae": 0.0}, 0
    for i, trace in enumerate(heldout):
        first = plain_run(model, adapter, trace.ids)
        before = first.seen @ sae["W_enc"] + sae["b_enc"]
        codes = torch.where(before > sae["threshold"], before.relu(), 0)
        inside = torch.from_numpy(other.ordinary[other.offsets[i] : other.offsets[i + 1]])[:, None]
        patched = torch.where(inside, codes @ sae["W_dec"] + sae["b_dec"], first.seen)
        for name, values in (("off", torch.zeros_like(patched)), ("sae", patched)):
            after = plain_run(model, adapter, trace.ids, lambda _, columns, values=values: values[None, :, columns])
            sums[name] += kl_sum(first, after, trace)
        tokens += len(trace.ids) - trace.response_start
    assert saved["predicted_tokens"] == tokens
    assert 0 < saved["patched_kl"] < saved["adapter_off_kl"]
    for name, total in sums.items():
        # fp32 logits in a KL of some tenths of a nat; a code within 1e-5 of its threshold may fall on either side.
        assert saved["variants"][name]["value"] == pytest.approx(total / tokens, rel=1e-3), name
