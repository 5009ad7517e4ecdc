"""Where rows are and which keys they have: few bytes a row, whatever their number."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np

from lorascope.explain.places import DIGITS, FEWEST_SORTED, Keys, Places
from lorascope.explain.rows import RowFile, keep_rows
from lorascope.study import digest


def test_places_are_those_given_last() -> None:
    rng = np.random.default_rng(0)
    places, right = Places(), {}
    for place in range(5 * FEWEST_SORTED):
        number = int(rng.integers(0, 3 * FEWEST_SORTED)) << 50
        places.put(number, place)
        right[number] = place
    assert {number: places.find(number) for number in right} == right
    assert len(places._new) < FEWEST_SORTED <= len(places._numbers)
    assert (np.diff(places._numbers.astype(object)) > 0).all()
    assert places.find(1) is None
    assert places.find(2**64 - 1) is None


def test_keys_are_found_whatever_their_order() -> None:
    keys = Keys(50)
    right = [digest(k)[:DIGITS] for k in range(50)]
    for k in np.random.default_rng(0).permutation(50):
        keys[k] = right[k]
    assert [keys[k] for k in range(len(keys))] == right
    among = keys.sort()
    assert all(key in among for key in right)
    assert not any(key in among for key in ["", "0", "~", "日本", right[3][:-1], digest(50)[:DIGITS]])
    assert "0" not in Keys(0).sort()


def test_a_file_of_rows_and_their_keys_are_held_in_few_bytes_a_row(tmp_path: Path) -> None:
    def held(count: int) -> tuple[int, Keys, RowFile]:
        keys = Keys(count)
        for k in range(count):
            keys[k] = digest(k)[:DIGITS]
        file = tmp_path / f"{count}.jsonl"
        lines = (json.dumps({"explainer": "lexical", "key": keys[k], "k": k}) + "\n" for k in range(count))
        file.write_text("".join(lines), encoding="utf-8")
        before, _ = tracemalloc.get_traced_memory()
        rows = keep_rows(file, keys.sort(), "lexical")
        return tracemalloc.get_traced_memory()[0] - before, keys, rows

    few, many = FEWEST_SORTED, 4 * FEWEST_SORTED
    tracemalloc.start()
    try:
        held(100)  # what is only made once
        (less, _, _), (more, keys, rows) = held(few), held(many)
    finally:
        tracemalloc.stop()
    assert (more - less) / (many - few) < 24
    assert rows.read(keys[many - 1]) == {"explainer": "lexical", "key": keys[many - 1], "k": many - 1}
    assert not tmp_path.joinpath("superseded.jsonl").exists()
