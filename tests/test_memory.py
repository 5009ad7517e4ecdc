"""Token budgets chosen from free memory: bounded, steady, and without a say in the results."""

from typing import Any

import pytest
import torch

from lorascope import memory
from lorascope.memory import FEWEST, MOST_ELSEWHERE, MOST_ON_CPU, bytes_per_token, choose_budget, graph_budget
from tiny_models import random_adapter, tiny_model

CPU = torch.device("cpu")


def with_free(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda _: int(free))


def test_free_memory_is_some_and_less_than_all() -> None:
    assert 1 << 20 < memory.free_memory(CPU) < 1 << 50


@pytest.mark.parametrize("device", [CPU, torch.device("meta")])
def test_a_budget_is_a_power_of_two_that_fits(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    adapter = random_adapter(tiny_model())
    each = bytes_per_token(adapter, 4)
    most = MOST_ON_CPU if device == CPU else MOST_ELSEWHERE
    for free in (0, 1 << 20, 1 << 24, 1 << 26, 1 << 50):
        with_free(monkeypatch, free)
        budget = choose_budget(adapter, device, torch.float32)
        assert budget & (budget - 1) == 0
        assert FEWEST <= budget <= most
        assert budget * each <= max(free / memory.SHARE, FEWEST * each)
    assert budget == most


def test_half_precision_fits_more(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = random_adapter(tiny_model(hidden_size=64, intermediate_size=512))
    with_free(monkeypatch, 1 << 25)
    assert choose_budget(adapter, CPU, torch.bfloat16) > choose_budget(adapter, CPU, torch.float32)


@pytest.mark.parametrize(("dtype", "beside"), [("float32", 0), ("float32", 84), ("bfloat16", 84)])
def test_a_pass_holds_no_more_than_is_said(dtype: str, beside: int) -> None:
    """By hand: width 32, inner width 48, 21 directions; beside them 42 random ones, 21 untrained, 21 neurons."""
    size, wide = {"float32": (4, 4), "bfloat16": (2, 4)}[dtype]
    read = 4 * (21 + beside)
    stream = 2 * 32 * size  # the residual, and the normed input of the map that runs
    inner = stream + 2 * 48 * size + read  # the gate's product and the output of up
    if dtype == "bfloat16":
        inner += 3 * 48 * wide  # that output, the directions' term and their sum in fp32
    attention = stream + (32 + 16 + 16) * size + 3 * 32 * size + read  # q, k, v, and q as it is rotated
    norm = stream + 2 * 32 * wide + read  # in fp32, and its product
    joined = 32 * size + 3 * read  # the last hidden state; scalars as read, by source, and all
    told = bytes_per_token(random_adapter(tiny_model()), size, beside)
    assert max(inner, attention, norm, joined) <= told < 4 * max(inner, attention, norm, joined)


def test_a_pass_with_controls_takes_fewer_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """With many columns the scalars are most of what is held: five times as many, a quarter of the tokens."""
    adapter = random_adapter(tiny_model(), rank=32)
    assert len(adapter.addresses) == 21 * 32
    with_free(monkeypatch, 1 << 27)
    alone, together = (choose_budget(adapter, CPU, torch.float32, beside) for beside in (0, 4 * 21 * 32))
    assert together == alone // 4


@pytest.mark.parametrize(("free", "wanted"), [(0, 1), (1 << 50, 4096)])
def test_a_graph_takes_at_least_one_token_and_at_most_what_is_asked(
    monkeypatch: pytest.MonkeyPatch, free: int, wanted: int
) -> None:
    with_free(monkeypatch, free)
    model: Any = tiny_model()
    assert graph_budget(model, 4096) == wanted


def test_a_graph_grows_with_layers_and_width(monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, 1 << 24)
    small, deep = tiny_model(), tiny_model(num_hidden_layers=6)
    assert graph_budget(small, 1 << 30) == pytest.approx(2 * graph_budget(deep, 1 << 30), rel=0.01)
