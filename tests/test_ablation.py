"""Exact leave-one-out equals whole edited passes over single traces; nothing gives the floor; planted ranks first."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorascope import edits
from lorascope.ablation import make_targets, target_rows
from lorascope.adapter import Adapter, build_adapter
from lorascope.attached import attach
from lorascope.cli import main
from lorascope.config import Options
from lorascope.creation import NewConfig, create_study
from lorascope.leave_one_out import leave_out
from lorascope.models import load_model
from lorascope.restart import keep_hidden, start_at
from lorascope.traces import ANSWER, PROMPT, SPECIAL, THINK, Rendered
from tiny_folder import save_tiny
from tiny_models import random_adapter, tiny_model


def rendered(seed: int, length: int, start: int) -> Rendered:
    rng = np.random.default_rng(seed)
    segments = np.full(length, PROMPT, dtype=np.uint8)
    segments[start:] = THINK
    segments[start + 3 :] = ANSWER
    segments[-1] = SPECIAL
    return Rendered(f"t{seed}", rng.integers(1, 97, length).astype(np.int32), segments, start)


TRACES = [rendered(1, 12, 4), rendered(2, 9, 5), rendered(3, 15, 3)]


def naive(model: Any, adapter: Adapter, pattern: Any) -> np.ndarray:
    """[trace, (kl, ce change, tokens)] from one whole pass per trace and edit, in float64 at the end."""
    rows = []
    for trace in TRACES:
        ids = torch.tensor(trace.ids[None].astype(np.int64))
        part = slice(trace.response_start - 1, len(trace.ids) - 1)
        with torch.no_grad(), attach(model, adapter) as attached:
            p = torch.log_softmax(attached.run(ids).logits[0, part].double(), -1)
            with attached.edit(edits.off(pattern)):
                q = torch.log_softmax(attached.run(ids).logits[0, part].double(), -1)
        target = ids[0, part.start + 1 :][:, None]
        ce = (p.gather(1, target) - q.gather(1, target)).sum()
        rows.append([float((p.exp() * (p - q)).sum()), float(ce), len(target)])
    return np.array(rows)


@pytest.mark.parametrize(("kind", "rank"), [("llama", 1), ("qwen2", 2), ("falcon", 1), ("bloom", 1)])
def test_restarted_batches_equal_whole_single_passes(kind: str, rank: int) -> None:
    """Layers of Falcon and Bloom give tuples."""
    model = tiny_model(kind)
    adapter = random_adapter(model, rank, patterns="*")
    targets = [t for by in ("direction", "layer", "type", "group") for t in make_targets(adapter.addresses, by)]
    with torch.no_grad(), attach(model, adapter) as attached:
        sums, floor = leave_out(attached, TRACES, targets, 0.0, budget=200)
    assert set(floor) == {"rerun", "rebatched", "restart at L1", "restart at L2"}
    assert max(floor.values()) < 1e-6
    for target in targets:
        chosen = [a for a, hit in zip(adapter.addresses, target.columns, strict=True) if hit]
        expected = naive(model, adapter, chosen)
        np.testing.assert_allclose(sums[target.by, target.name][:, 0], expected, rtol=1e-3, atol=1e-5)


def test_segments_add_up_and_belong_to_the_predicted_token() -> None:
    model = tiny_model()
    adapter = random_adapter(model)
    targets = make_targets(adapter.addresses, "group")
    with torch.no_grad(), attach(model, adapter) as attached:
        sums, _ = leave_out(attached, TRACES, targets, 0.0, budget=200)
    total = sums["group", "all"]
    np.testing.assert_allclose(total[:, 0], total[:, 1:].sum(axis=1), rtol=1e-6)
    # t1: response 4..11; thinking is predicted 3 times, the end of turn once, the answer between.
    assert total[0, :, 2].tolist() == [8, 3, 4, 1]
    rows = target_rows(targets[-1], total, floor=0.0, rng=np.random.default_rng(0))
    assert [row["segment"] for row in rows] == ["all", "think", "answer", "special"]
    assert all(row["low"] <= row["kl"] <= row["high"] and row["kl"] > 0 for row in rows)


def test_off_to_mean_equals_an_edit_to_the_means() -> None:
    model = tiny_model()
    adapter = random_adapter(model)
    means = np.linspace(-1, 1, len(adapter.addresses)).astype(np.float32)
    target = make_targets(adapter.addresses, "layer")[1]
    with torch.no_grad(), attach(model, adapter) as attached:
        sums, _ = leave_out(attached, TRACES[:1], [target], means, budget=200)
        ids = torch.tensor(TRACES[0].ids[None].astype(np.int64))
        p = torch.log_softmax(attached.run(ids).logits[0, 3:-1].double(), -1)
        with attached.edit(edits.off("L1.*", to=means)):
            q = torch.log_softmax(attached.run(ids).logits[0, 3:-1].double(), -1)
    assert sums["layer", "L1"][0, 0, 0] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3)


def test_a_direction_that_does_nothing_is_under_the_floor_and_a_strong_one_ranks_first() -> None:
    model = tiny_model()
    adapter = random_adapter(model)
    for module in adapter.modules:
        module.b_OR.mul_(0.01)
    adapter.modules[3].b_OR.zero_()
    adapter.modules[11].b_OR.mul_(1000)
    targets = make_targets(adapter.addresses, "direction")
    with torch.no_grad(), attach(model, adapter) as attached:
        sums, floor = leave_out(attached, TRACES, targets, 0.0, budget=200)
    rng = np.random.default_rng(0)
    rows = {t.name: target_rows(t, sums[t.by, t.name], max(floor.values()), rng)[0] for t in targets}
    assert max(rows, key=lambda name: rows[name]["kl"]) == adapter.addresses[11]
    assert rows[adapter.addresses[3]]["under_floor"]


def test_starting_at_a_layer_gives_the_same_hidden_states_and_leaves_no_trace() -> None:
    model = tiny_model("qwen2")
    ids = torch.tensor([[4, 5, 6, 7]])
    with torch.no_grad():
        with keep_hidden(model.model.layers) as hidden:
            whole = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        with start_at(model.model.layers, 2, hidden[1]):
            again = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        assert torch.equal(whole, again)
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("method", ["exact", "screen"])
def test_an_adapter_of_the_head_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str) -> None:
    model, _ = load_model(str(save_tiny(tmp_path / "model")))
    adapter = random_adapter(model, patterns="L0.up,L1.q")
    parts = {m.path: (m.a_RI, m.b_OR, m.scale) for m in adapter.modules}
    vocabulary, width = model.get_output_embeddings().weight.shape
    parts["lm_head"] = (torch.ones(1, width), torch.ones(vocabulary, 1), adapter.modules[0].scale)
    build_adapter(parts, adapter.config).save(tmp_path / "lora")
    rows = [{"question": f"{i}?", "thinking": "Hm.", "answer": str(i)} for i in range(10)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    new = NewConfig(str(tmp_path / "model"), str(tmp_path / "t.jsonl"), str(tmp_path / "lora"), heldout=4, system="")
    create_study(tmp_path / "study", new, Options())
    capsys.readouterr()
    assert main(["ablate", str(tmp_path / "study"), "--method", method]) == 2
    assert "adapts the LM head (lm_head), which ablate cannot measure" in capsys.readouterr().err
    assert not list((tmp_path / "study").rglob("*.parquet"))
