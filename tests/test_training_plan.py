"""What training sees, and when: every trace once an epoch, packs within the budget, the rate, control traces."""

import itertools
import math

import numpy as np
import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from lorascope.traces import Trace
from lorascope.training_plan import control_traces, plan_packs, plan_steps, rate_at


def test_packs_hold_every_sequence_once_within_the_budget() -> None:
    lengths = [5, 9, 3, 3, 12, 1]
    packs = plan_packs(lengths, 10)
    assert sorted(i for pack in packs for i in pack) == list(range(6))
    assert packs == [[4], [1, 5], [0, 2], [3]]


def test_every_trace_is_used_once_an_epoch_and_seeds_differ() -> None:
    lengths = list(np.random.default_rng(0).integers(5, 90, 50))
    steps = plan_steps(lengths, 8, 2.0, None, 0)
    per_epoch = math.ceil(50 / 8)
    assert sorted(i for step in steps[:per_epoch] for i in step) == list(range(50))
    assert steps == plan_steps(lengths, 8, 2.0, None, 0) != plan_steps(lengths, 8, 2.0, None, 1)
    assert plan_steps(lengths, 8, 2.0, 3, 0) == steps[:3]


@pytest.mark.parametrize(("traces", "batch", "per_epoch"), [(136, 16, 9), (1000, 16, 63), (576, 12, 48), (3, 16, 1)])
@pytest.mark.parametrize("epochs", [1, 3])
def test_an_epochs_steps_are_whole_batches_and_one_of_what_is_left(
    traces: int, batch: int, per_epoch: int, epochs: int
) -> None:
    lengths = list(np.random.default_rng(1).integers(5, 90, traces))
    steps = plan_steps(lengths, batch, epochs, None, 0)
    assert len(steps) == epochs * per_epoch
    for epoch in range(epochs):
        mine = steps[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(i for step in mine for i in step) == list(range(traces))
        left = [traces % batch] if traces % batch else []
        assert sorted(map(len, mine)) == sorted([batch] * (traces // batch) + left)
    assert len(plan_steps(lengths, batch, 0.5, None, 0)) == math.ceil(per_epoch / 2)


def test_the_rate_rises_then_falls_to_zero() -> None:
    rates = [rate_at(step, 100, 1.0, 0.05) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a >= b for a, b in itertools.pairwise(rates[5:]))
    assert rates[-1] < 0.001


@pytest.mark.parametrize(("warmup", "rise"), [(0.0, 0), (0.01, 0), (0.05, 2), (0.5, 24)])
def test_the_rate_is_transformers_cosine_without_its_idle_first_step(warmup: float, rise: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, rise, 48)
    theirs = []
    for _ in range(48):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    ours = [rate_at(step, 48, 3.0, warmup) for step in range(48)]
    assert ours[rise:] == pytest.approx(theirs[rise:])
    assert ours[rise] == 3.0
    assert ours[:rise] == pytest.approx(theirs[1 : rise + 1])


def test_control_traces_are_answers_only_or_another_problems_thinking() -> None:
    traces = [Trace(str(i), f"q{i}", f"t{i}", f"a{i}", family="xy"[i % 2]) for i in range(10)]
    assert all(t.thinking == "" and t.answer for t in control_traces(traces, "answers", 0))
    shuffled = control_traces(traces, "shuffled", 0)
    assert all(s.thinking != t.thinking and s.answer == t.answer for s, t in zip(shuffled, traces, strict=True))
    assert sorted(s.thinking for s in shuffled) == sorted(t.thinking for t in traces)
    donors = {t.thinking: t.family for t in traces}
    assert all(donors[s.thinking] == s.family for s in shuffled)
