"""Notes: saved at once, nothing lost by a crash or by merging two people's files, in whatever order."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from lorascope.errors import BadInput
from lorascope.studio.notes import (
    FILE,
    add_note,
    append_events,
    current_notes,
    merge_events,
    merge_notes,
    parse_events,
    read_events,
    searchable,
)
from lorascope.study import Study

PLACE = "feature:L1.gate+"


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study.create(tmp_path / "study", model="tiny", system=None)


def event(number: int, field: str, value: Any, place: str = PLACE, author: str = "ann") -> dict[str, Any]:
    time = f"2026-01-01T00:00:{number:02d}.000000+00:00"
    return {"id": f"{author}{number}", "time": time, "author": author, "place": place, "field": field, "value": value}


def notes_of(study: Study) -> Any:
    return current_notes(read_events(study.path / FILE)[0])


def test_a_note_is_in_the_file_at_once(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASCOPE_AUTHOR", "ann")
    add_note(study, PLACE, "text", "fires on full stops")
    add_note(study, PLACE, "star", True)
    add_note(study, PLACE, "tag:stop", True)
    add_note(study, PLACE, "label", "the end")
    add_note(study, PLACE, "text", "fires on the last full stop")
    note = notes_of(study)[PLACE]
    assert (note.text, note.star, note.tags, note.label) == ("fires on the last full stop", True, ("stop",), "the end")
    assert [e["value"] for e in note.earlier] == ["fires on full stops"]
    assert note.author == "ann"
    assert len((study.path / FILE).read_text().splitlines()) == 5
    assert searchable(notes_of(study)) == {"L1.gate+": "the end fires on the last full stop stop"}


def test_what_is_taken_back_is_gone_and_its_text_kept(study: Study) -> None:
    add_note(study, PLACE, "star", True)
    add_note(study, PLACE, "star", False)
    assert notes_of(study) == {}
    add_note(study, PLACE, "text", "a thought")
    add_note(study, PLACE, "text", "")
    assert notes_of(study)[PLACE].text == ""
    assert [e["value"] for e in notes_of(study)[PLACE].earlier] == ["a thought"]


@pytest.mark.parametrize(
    ("place", "field", "value"),
    [
        ("../../etc/passwd", "text", "x"),
        ("feature:a b", "text", "x"),
        ("trace:train:x", "text", "x"),
        (PLACE, "colour", "x"),
        (PLACE, "tag:two words", True),
        (PLACE, "text", 3),
        (PLACE, "text", "x" * 10_001),
        (PLACE, "label", "x" * 121),
        (PLACE, "star", "yes"),
        (3, "text", "x"),
        (PLACE, None, "x"),
    ],
)
def test_what_is_no_note_is_refused(study: Study, place: Any, field: Any, value: Any) -> None:
    with pytest.raises(BadInput):
        add_note(study, place, field, value)
    assert not (study.path / FILE).exists()


def test_a_line_cut_off_by_a_crash_harms_no_other(study: Study) -> None:
    add_note(study, PLACE, "text", "before")
    whole = (study.path / FILE).read_bytes()
    (study.path / FILE).write_bytes(whole + whole[:40])
    add_note(study, PLACE, "label", "after")
    events, unread = read_events(study.path / FILE)
    assert [e["value"] for e in events] == ["before", "after"]
    assert unread == 1
    with pytest.raises(BadInput, match="1 damaged line"):
        merge_notes(study, "")


def test_merging_loses_nothing_in_any_order() -> None:
    ann = [event(1, "text", "first"), event(3, "tag:a", True), event(5, "star", True)]
    bob = [event(2, "text", "second", author="bob"), event(4, "tag:b", True, author="bob"), event(1, "text", "first")]
    eve = [event(6, "star", False, author="eve"), event(2, "label", "own", "trace:train:3", author="eve")]
    merged = [merge_events(*order) for order in itertools.permutations([ann, bob, eve])]
    assert all(one == merged[0] for one in merged)
    assert {e["id"] for e in merged[0]} == {e["id"] for e in ann + bob + eve}
    notes = current_notes(merged[0])
    assert notes[PLACE].text == "second"
    assert notes[PLACE].tags == ("a", "b")
    assert not notes[PLACE].star
    assert [e["value"] for e in notes[PLACE].earlier] == ["first"]
    assert notes["trace:train:3"].label == "own"


def test_two_merged_copies_are_the_same_bytes(tmp_path: Path) -> None:
    studies = [Study.create(tmp_path / name, model="tiny", system=None) for name in ("ann", "bob")]
    for study, name in zip(studies, ("ann", "bob"), strict=True):
        for number in range(4):
            append_events(study.path / FILE, [event(number, "text", f"{name} {number}", author=name)])
    texts = [(study.path / FILE).read_text() for study in studies]
    assert merge_notes(studies[0], texts[1]) == {"added": 4, "known": 0, "unread": 0}
    assert merge_notes(studies[1], texts[0] + "no json\n") == {"added": 4, "known": 0, "unread": 1}
    assert merge_notes(studies[1], texts[0]) == {"added": 0, "known": 4, "unread": 0}
    assert (studies[0].path / FILE).read_bytes() == (studies[1].path / FILE).read_bytes()
    assert len(read_events(studies[0].path / FILE)[0]) == 8


def test_events_from_elsewhere_are_checked() -> None:
    good = json.dumps(event(1, "text", "x"))
    bad = [json.dumps(event(2, "text", 4)), json.dumps({"id": "1"}), "[]", "{", json.dumps(event(3, "x", "y"))]
    events, unread = parse_events("\n".join([good, *bad]))
    assert len(events) == 1
    assert unread == len(bad)
