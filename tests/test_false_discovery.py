"""Benjamini-Hochberg against the example of their paper, and against its definition."""

import numpy as np

from lorascope.stats import false_discovery_rates


def test_the_papers_example() -> None:
    """The 15 p-values of Benjamini and Hochberg (1995), section 3.2: at 0.05 the first four are rejected."""
    p = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719, 0.6528]
    q = false_discovery_rates([*p, 0.7590, 1.0])
    assert (q <= 0.05).sum() == 4
    assert np.isclose(q[0], 0.0015)
    assert np.isclose(q[3], 0.0095 * 15 / 4)
    assert q[-1] == 1.0


def test_definition_in_any_order_and_with_ties() -> None:
    rng = np.random.default_rng(0)
    p = rng.integers(1, 40, 60) / 40
    q = false_discovery_rates(p)
    ranked = np.sort(p)
    plain = [min(min(1.0, 60 * ranked[j] / (j + 1)) for j in range(60) if ranked[j] >= value) for value in p]
    np.testing.assert_allclose(q, plain)
    assert len(false_discovery_rates([])) == 0
