"""What fires where: levels that are unknown or 0, attention sinks, and the tokens around a feature's firings."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from lorascope.features import load_features
from lorascope.report.tokens import plain_tokens
from lorascope.study import Study, write_json
from lorascope.token_text import token_table
from lorascope.views.firing import coloured_trace, fires_here
from lorascope.views.nearby import direction_cosines, thresholds
from lorascope.views.token_counts import NOTHING_AROUND, segment_densities, tokens_around
from report_study import make_adapter
from tiny_store import make_study, write_store
from tiny_text import tiny_tokenizer

ADDRESSES = ["L0.q", "L0.up", "L1.q"]


def small_study(path: Path, z: Any, lengths: list[int], **beside: Any) -> Study:
    """A recorded corpus of which no examples were searched for."""
    study = make_study(path)
    tiny_tokenizer().save_pretrained(path / "tokenizer")
    write_store(study, z, lengths, addresses=ADDRESSES, **beside)
    study.update_manifest(corpora={"train": {"source": "made", "traces": len(lengths), "tokens": sum(lengths)}})
    return study


def test_without_levels_nothing_is_said_to_fire(tmp_path: Path) -> None:
    study = small_study(tmp_path / "s", np.ones((6, 3)), [6])
    found = fires_here(study, "train", 0, 2)["kinds"]
    assert set(found) == {"direction"}
    assert (found["direction"]["firing"], found["direction"]["rows"]) == (None, [])
    assert f"lorascope examples {study.path} --corpus train" in found["direction"]["missing"]["run"]
    (feature,) = coloured_trace(study, "train", 0, ["L0.q+"])["features"]
    assert feature["level"] is None
    assert "lorascope examples" in feature["missing"]["run"]
    level_F, _ = thresholds(study, "train", "direction")
    assert not np.any(np.float32(1e9) > level_F)


def test_a_level_of_0_has_no_ratio_and_comes_last(tmp_path: Path) -> None:
    z = np.zeros((6, 3))
    z[2] = [3, 4, 5]
    study = small_study(tmp_path / "s", z, [6])
    levels = {f"{address}{sign}": 0.0 for address in ADDRESSES for sign in "+-"} | {"L0.up+": 2.0}
    write_json(study.path / "examples" / "levels.json", {"direction": levels})
    found = fires_here(study, "train", 0, 2)["kinds"]["direction"]
    assert found["firing"] == 3
    assert found["missing"] is None
    assert [row["id"] for row in found["rows"]] == ["L0.up+", "L1.q+", "L0.q+"]
    assert [row["ratio"] for row in found["rows"]] == [pytest.approx(2, rel=1e-3), None, None]
    assert fires_here(study, "train", 0, 1)["kinds"]["direction"]["firing"] == 0


def test_a_sink_neither_fires_nor_sets_the_scale(tmp_path: Path) -> None:
    z = np.ones((6, 3))
    z[2], z[4] = 100, 4
    study = small_study(tmp_path / "s", z, [6], sink=np.arange(6) == 2)
    page = coloured_trace(study, "train", 0, ["L0.q+"])
    assert page["sinks"] == [2]
    assert page["features"][0]["max"] == pytest.approx(4, rel=1e-2)
    assert [fires_here(study, "train", 0, t)["ordinary"] for t in (1, 2)] == [True, False]
    shown = plain_tokens(["a", "b", "c"], [0, 2, 2], [0, 2])
    assert shown.count('class="sk"') == 1, "template is no sink as well"
    assert '<span class="sk">c</span>' in shown


def test_tokens_at_and_after_firings(tmp_path: Path) -> None:
    """Counted by hand: the last token of a trace has nothing that follows; an example listed twice counts once."""
    tokens = [5, 6, 7, 6, 6, 5, 6, 9]
    study = small_study(tmp_path / "s", np.ones((8, 3)), [4, 4], tokens=np.array(tokens))
    features = load_features(study, "train", "direction")
    rows = [{"trace": t, "position": p} for t, p in ((0, 1), (0, 3), (1, 0), (1, 1), (0, 1))]
    words = token_table(Tokenizer(models.WordLevel({f"w{i}": i for i in range(9)}, unk_token="w0")))
    found = tokens_around(features, words, rows)
    assert found["examples"] == 4
    assert found["in"] == [{"text": "w6", "count": 3}, {"text": "w5", "count": 1}]
    assert found["out"] == [{"text": f"w{i}", "count": 1} for i in (5, 6, 7)]
    assert tokens_around(features, words, []) == NOTHING_AROUND


def test_density_per_segment(tmp_path: Path) -> None:
    """Firings of a segment over its ordinary tokens: 2 of prompt, 2 of think (a third is a sink), none of answer."""
    segments = np.array([0, 1, 2, 0, 1, 2, 2, 0])
    study = small_study(tmp_path / "s", np.ones((8, 3)), [4, 4], segments=segments, sink=np.arange(8) == 5)
    stats = {"share_prompt": 0.5, "share_think": 0.5, "share_answer": 0.0, "n_firing": 2}
    found = segment_densities(load_features(study, "train", "direction"), stats)
    assert found == {"prompt": 0.5, "think": 0.5, "answer": None}


def test_a_direction_is_none_of_its_own_neighbours(tmp_path: Path) -> None:
    """Also where there are fewer vectors than the list has places, and cosines below 0 come after the own 0."""
    study = make_study(tmp_path / "s")
    adapter = make_adapter(2)
    adapter.save(study.path / "adapter")
    for address in adapter.addresses:
        near = direction_cosines(study, address)
        assert near
        assert address not in [one["id"] for one in near]
