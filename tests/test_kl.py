"""KL per token against float64 arithmetic, its direction, its chunks, and which positions count."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from lorascope.kl import assistant_positions, hidden_scores, kl_per_token, predicted_segments


def exact_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    logp, logq = torch.log_softmax(p.double(), -1), torch.log_softmax(q.double(), -1)
    return (logp.exp() * (logp - logq)).sum(-1)


@pytest.mark.parametrize("size", [1e-3, 1e-1, 3.0])
def test_agrees_with_float64_from_tiny_to_large(size: float) -> None:
    rng = torch.Generator().manual_seed(0)
    p = torch.randn(37, 5000, generator=rng) * 5
    q = p + torch.randn(37, 5000, generator=rng) * size
    torch.testing.assert_close(kl_per_token(p, q, chunk=8).double(), exact_kl(p, q), rtol=1e-4, atol=2e-7)


def test_direction_is_p_to_q() -> None:
    p, q = torch.log(torch.tensor([[0.9, 0.1]])), torch.log(torch.tensor([[0.5, 0.5]]))
    expected = 0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5)
    assert kl_per_token(p, q).item() == pytest.approx(expected, rel=1e-5)
    assert kl_per_token(q, p).item() != pytest.approx(expected, rel=1e-2)


def test_same_logits_give_exactly_zero() -> None:
    p = torch.randn(5, 1000) * 10
    assert torch.equal(kl_per_token(p, p.clone()), torch.zeros(5))


def test_certain_predictions_stay_finite() -> None:
    p, q = torch.tensor([[200.0, 0.0, -200.0]]), torch.tensor([[0.0, 150.0, 0.0]])
    assert kl_per_token(p, q).item() == pytest.approx(150.0, rel=1e-5)
    assert kl_per_token(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)


def test_hidden_scores_equal_whole_logits_for_any_chunk() -> None:
    rng = torch.Generator().manual_seed(1)
    weight = torch.randn(50, 8, generator=rng)
    p, q = torch.randn(11, 8, generator=rng), torch.randn(11, 8, generator=rng)
    targets = torch.randint(50, (11,), generator=rng)

    def head(hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ weight.T

    small, whole = (hidden_scores(head, p, q, targets, chunk=c) for c in (3, 100))
    torch.testing.assert_close(small.kl, whole.kl)
    torch.testing.assert_close(whole.kl, kl_per_token(head(p), head(q)))
    torch.testing.assert_close(whole.ce_p, cross_entropy(head(p), targets, reduction="none"))
    torch.testing.assert_close(small.ce_q, cross_entropy(head(q), targets, reduction="none"))


def test_positions_predict_the_response_only() -> None:
    rendered = SimpleNamespace(
        ids=np.arange(7, dtype=np.int32), segments=np.array([0, 1, 1, 0, 2, 3, 0], np.uint8), response_start=4
    )
    assert assistant_positions(rendered).tolist() == [3, 4, 5]  # type: ignore[arg-type]
    assert predicted_segments(rendered).tolist() == [2, 3, 0]  # type: ignore[arg-type]
