"""Screening: gate gradients against autograd on the plain path, its estimates against exact leave-one-out."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lorascope import edits
from lorascope.ablation import make_targets, screened_rows
from lorascope.attached import attach
from lorascope.leave_one_out import leave_out
from lorascope.screening import gate_draws, gated, label_slopes, passes_needed, screen
from test_ablation import TRACES
from tiny_models import random_adapter, tiny_model


@pytest.mark.parametrize(("kind", "rank"), [("llama", 1), ("qwen2", 2)])
def test_gate_gradients_equal_autograd_through_the_edit(kind: str, rank: int) -> None:
    model = tiny_model(kind)
    model.requires_grad_(False)
    adapter = random_adapter(model, rank)
    ids = torch.randint(0, 97, (3, 9), generator=torch.Generator().manual_seed(0))
    slope = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(1))
    with attach(model, adapter) as attached:
        gates = torch.ones(3, len(adapter.addresses), requires_grad=True)
        with attached.edit(edits.gate(gates)):
            wanted = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        (expected,) = torch.autograd.grad(wanted, gates, slope)
        own = torch.ones(3, len(adapter.addresses), requires_grad=True)
        with gated(attached, own):
            got = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        (found,) = torch.autograd.grad(got, own, slope)
        assert torch.equal(attached.model.base_model(input_ids=ids, use_cache=False).last_hidden_state, wanted * 1)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("softcap", [False, True])
def test_label_slopes_are_gradients_of_log_probabilities(softcap: bool) -> None:
    model = tiny_model()
    if softcap:
        model.config.final_logit_softcapping = 5.0
    hidden = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    draws, signs = torch.rand(2, 7, generator=torch.Generator().manual_seed(1)), torch.tensor([[1.0] * 7, [-1.0] * 7])
    with attach(model, random_adapter(model)) as attached:
        slopes = list(label_slopes(attached, hidden, draws, signs))
    leaf = hidden.clone().requires_grad_()
    logits = leaf @ model.lm_head.weight.T
    logp = F.log_softmax(torch.tanh(logits / 5) * 5 if softcap else logits, dim=-1)
    cdf = logp.exp().cumsum(-1)
    for k, sign in enumerate((1, -1)):
        labels = torch.tensor([int((row <= u).sum()) for row, u in zip(cdf, draws[k], strict=True)])
        (expected,) = torch.autograd.grad(sign * logp[torch.arange(7), labels].sum(), leaf, retain_graph=True)
        torch.testing.assert_close(slopes[k], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_label_slopes_of_sure_predictions_are_not_lost_in_low_precision(dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    weight = model.lm_head.weight.detach()
    rows = torch.arange(0, 97, 9)
    hidden = (weight[rows].float() * 14 / weight[rows].float().norm(dim=1, keepdim=True) ** 2).to(dtype)
    p = torch.softmax(hidden.double() @ weight.double().T, -1)
    assert float(p.amax(1).median()) > 0.99
    sure = p.amax(1) > 0.99
    draws, signs = torch.full((1, len(rows)), 0.5), torch.ones(1, len(rows))
    with attach(model, random_adapter(model)) as attached:
        (slopes,) = label_slopes(attached, hidden, draws, signs)
    wanted = (weight.double()[p.argmax(1)] - p @ weight.double())[sure]
    late = (weight[p.argmax(1)].float() - (p.to(dtype) @ weight).float())[sure]
    assert float((slopes[sure] - wanted).norm() / wanted.norm()) < 1e-3
    assert float((late - wanted).norm() / wanted.norm()) > 1e-2


def test_labels_follow_the_prediction() -> None:
    model = tiny_model()
    hidden = torch.randn(1, 32, generator=torch.Generator().manual_seed(3)) / 4
    count = 4000
    draws, signs = torch.rand(count, 1, generator=torch.Generator().manual_seed(1)), torch.ones(count, 1)
    with attach(model, random_adapter(model)) as attached:
        slopes = torch.cat(list(label_slopes(attached, hidden, draws, signs)))
    # A score's mean is zero and its covariance the Fisher matrix of the hidden state.
    p = torch.softmax(hidden @ model.lm_head.weight.detach().T, -1)[0]
    weight = model.lm_head.weight.detach()
    fisher = weight.T @ (torch.diag(p) - torch.outer(p, p)) @ weight
    assert float(slopes.mean(0).abs().max()) < 5 * float(fisher.diagonal().max().sqrt()) / count**0.5
    covariance = slopes.T @ slopes / count
    torch.testing.assert_close(covariance, fisher, rtol=0, atol=0.1 * float(fisher.abs().max()))


def small_adapter(model: Any, rank: int = 1) -> Any:
    """Weak enough for the second order to hold, each direction differently strong."""
    adapter = random_adapter(model, rank)
    for number, module in enumerate(adapter.modules):
        module.b_OR.mul_(0.004 * (1 + number % 5))
    return adapter


def test_many_passes_give_the_exact_values() -> None:
    model = tiny_model()
    adapter = small_adapter(model)
    targets = [t for by in ("direction", "type", "layer") for t in make_targets(adapter.addresses, by)]
    with attach(model, adapter) as attached:
        sums, _ = leave_out(attached, TRACES, targets, 0.0, budget=200)
        screened = screen(attached, TRACES, passes=3000)
    tokens = screened.tokens_S.sum()
    exact = np.array([sums[t.by, t.name][:, 0, 0].sum() / tokens for t in targets])
    own = screened.kl_KSG(np.stack([t.columns for t in targets])).mean(0).sum(0) / tokens
    np.testing.assert_allclose(own, exact, rtol=0.15)
    assert 0.95 < np.median(own / exact) < 1.05
    nulls = screened.null_kls(np.stack([t.columns for t in targets]))
    assert list(nulls) == ["rerun", "rebatched", "resplit"]
    assert 0 < max(nulls.values()) < 1e-3 * exact.min()


def test_one_floor_flags_the_rows_that_it_is_shown_beside() -> None:
    """The largest null of any target is every row's floor, not each one's own."""
    model = tiny_model()
    adapter = small_adapter(model)
    targets = make_targets(adapter.addresses, "direction")
    with attach(model, adapter) as attached:
        screened = screen(attached, TRACES, passes=4)
    values = {row["target"]: row["kl"] for row in screened_rows(screened, targets, 0.0, np.random.default_rng(0))}
    floor = sorted(values.values())[5]
    rows = screened_rows(screened, targets, floor, np.random.default_rng(0))
    assert [row["under_floor"] for row in rows] == [values[row["target"]] <= floor for row in rows]
    assert sum(row["under_floor"] for row in rows) == 6


@pytest.mark.parametrize(("count", "budget"), [(3, 200), (3, 1), (1, 200)])
def test_null_runs_are_of_two_traces_where_there_are(count: int, budget: int) -> None:
    """Their values are those that the same differences have as gradients of the traces themselves."""
    model = tiny_model()
    adapter = small_adapter(model)
    with attach(model, adapter) as attached:
        screened = screen(attached, TRACES[:count], passes=2, budget=budget)
    pair = min(count, 2)
    assert {null_CN.shape for null_CN in screened.nulls.values()} == {(pair, len(adapter.addresses))}
    assert ("resplit" in screened.nulls) == (count > 1)
    assert max(screened.null_kls(np.eye(len(adapter.addresses), dtype=bool)).values()) < 1e-9


def test_groups_and_interactions_are_algebra_on_the_same_gradients() -> None:
    model = tiny_model("qwen2")
    adapter = small_adapter(model, 2)
    with attach(model, adapter) as attached:
        screened = screen(attached, TRACES, passes=5, budget=20)
        again = screen(attached, TRACES, passes=5, budget=20)
        together = screen(attached, TRACES, passes=5, budget=200)
    np.testing.assert_array_equal(screened.gradients_KSN, again.gradients_KSN)
    scale = np.abs(together.gradients_KSN).max()
    np.testing.assert_allclose(screened.gradients_KSN, together.gradients_KSN, rtol=0, atol=1e-4 * scale)
    target = make_targets(adapter.addresses, "layer")[1]
    block = screened.interactions_NN()[np.ix_(target.columns, target.columns)].sum()
    value = screened.kl_KSG(target.columns[None])[:, :, 0].mean(0).sum() / screened.tokens_S.sum()
    assert block == pytest.approx(value)


def test_it_stops_when_precise_enough() -> None:
    model = tiny_model()
    adapter = small_adapter(model)
    with attach(model, adapter) as attached:
        rough, fine = (len(screen(attached, TRACES, precision=p).gradients_KSN) for p in (1.0, 0.2))
        whole, batched = (screen(attached, TRACES, precision=0.3, budget=b).gradients_KSN for b in (200, 20))
        draws = gate_draws(attached, TRACES, [0, 1, 2], 0, 0)
        kl_KN = np.array([(next(draws) ** 2).sum(axis=0) for _ in range(400)])
    # Later looks continue the passes of the first, however the traces are batched.
    assert len(whole) == len(batched) > 4
    np.testing.assert_allclose(batched, whole, rtol=0, atol=1e-4 * np.abs(whole).max())
    assert rough == 4
    assert rough < fine <= 64
    spread = np.median(kl_KN.std(axis=0) / kl_KN.mean(axis=0))
    assert passes_needed(np.sqrt(kl_KN)[:, None], spread / 30) == pytest.approx(900, rel=0.02)
    assert passes_needed(np.zeros((4, 1, 3), np.float32), 0.1) == 4
