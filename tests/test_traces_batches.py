"""Batches: every sequence once, the token budget kept, padding on the right."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorascope.traces import pad_ids, plan_batches


def test_known_plan() -> None:
    assert plan_batches([5, 1, 3, 1, 9], token_budget=8) == [[1, 3], [2], [0], [4]]
    assert plan_batches([2, 2, 2, 2], token_budget=100, max_rows=3) == [[0, 1, 2], [3]]
    assert plan_batches([], token_budget=4) == []


@given(st.lists(st.integers(1, 50)), st.integers(1, 120), st.none() | st.integers(1, 4))
def test_each_index_once_within_the_budget(lengths: list[int], budget: int, max_rows: int | None) -> None:
    plan = plan_batches(lengths, budget, max_rows)
    assert sorted(i for batch in plan for i in batch) == list(range(len(lengths)))
    for batch in plan:
        padded = len(batch) * max(lengths[i] for i in batch)
        assert padded <= budget or len(batch) == 1
        assert max_rows is None or len(batch) <= max_rows
    assert plan == plan_batches(tuple(lengths), budget, max_rows)


def test_budgets_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        plan_batches([1], 0)
    with pytest.raises(ValueError, match="at least 1"):
        plan_batches([1], 4, max_rows=0)


def test_padding_on_the_right() -> None:
    ids_BT, lengths_B = pad_ids([[1, 2, 3], np.array([4], dtype=np.int32)], pad_id=9)
    assert ids_BT.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert ids_BT.dtype == torch.int64
    assert lengths_B.tolist() == [3, 1]
