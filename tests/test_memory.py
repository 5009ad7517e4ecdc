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
