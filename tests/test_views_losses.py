"""What judges did not answer, said at length, or could not be asked: counted, with what it is of."""

from pathlib import Path
from typing import Any

from compared_study import add_kind, explained_row
from lorascope.study import Study
from lorascope.views import dropped
from tiny_store import make_study

JUDGED = "explain directions, judge:m"


def judged_study(path: Path) -> Study:
    """Six features: one whose requests failed, one explained at length, three without a fuzzing score."""
    study = make_study(path)
    rows = [explained_row(f"L{i}.q+", 0.7, explainer="judge:m") for i in range(6)]
    for row in rows:
        row["scored"]["detection_shuffled"] = {"value": 0.5, "n": 40, "unparsed": 2}
    rows[0]["scored"]["detection_wrong"]["unparsed"] = 8
    rows[0]["retry"] = True
    rows[1]["text"] = "one two three four five six seven eight nine ten eleven"
    for k, row in enumerate(rows[:3]):
        row["scored"] |= {"fuzzing": None, "fuzzing_wrong": None}
        row["scored"]["without"] = {"fuzzing": f"only {k} windows with other tokens to mark, fewer than 5"}
    add_kind(study, "direction", rows)
    return study


def said_of(study: Study) -> dict[str, dict[str, Any]]:
    return {row["what"]: row for row in dropped(study)["rows"] if row["stage"] == JUDGED}


def test_unread_answers_have_their_denominators_and_controls(tmp_path: Path) -> None:
    said = said_of(judged_study(tmp_path / "study"))
    counts = {what: (row["count"], row["of"]) for what, row in said.items()}
    # 80 windows in detection of six features, in fuzzing of three; shuffled in detection alone, 40 windows.
    assert counts["judge's answers not read, own explanation"] == (0, 6 * 80 + 3 * 80)
    assert counts["judge's answers not read, wrong explanation"] == (8, 6 * 80 + 3 * 80)
    assert counts["judge's answers not read, shuffled feature"] == (12, 6 * 40)
    assert counts["features to be asked again"] == (1, 6)


def test_long_explanations_and_missing_fuzzing_are_counted(tmp_path: Path) -> None:
    said = said_of(judged_study(tmp_path / "study"))
    assert (said["explanations longer than 10 words"]["count"], said["explanations longer than 10 words"]["of"]) == (
        1,
        6,
    )
    fuzzing = said["without a fuzzing score"]
    assert (fuzzing["count"], fuzzing["of"]) == (3, 6)
    assert fuzzing["rule"] == "fewer than 5 windows with other tokens to mark"
