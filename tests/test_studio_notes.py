"""Notes: saved at once, nothing lost by a crash or by merging two people's files, in whatever order."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from lorascope.cli import main
from lorascope.errors import BadInput, RunFailed
from lorascope.studio import notes
from lorascope.studio.notes import (
    FILE,
    add_note,
    append_events,
    as_shown,
    current_notes,
    merge_events,
    merge_notes,
    parse_events,
    read_events,
    searchable,
)
from lorascope.study import Study
from tiny_store import write_store

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


def test_it_is_said_when_something_newer_is_replaced(study: Study) -> None:
    assert "replaced" not in add_note(study, PLACE, "text", "one", "")
    assert "replaced" not in add_note(study, PLACE, "text", "two", "one")
    assert add_note(study, PLACE, "text", "three", "one")["replaced"]
    assert "replaced" not in add_note(study, PLACE, "text", "three", "two"), "both wrote the same"
    assert "replaced" not in add_note(study, PLACE, "star", True, False)
    assert "replaced" not in add_note(study, PLACE, "star", True, False)
    assert not any("replaced" in event for event in read_events(study.path / FILE)[0])


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


def test_a_later_edit_stands_whatever_another_clock_said(study: Study) -> None:
    ahead = event(1, "text", "theirs", author="bob") | {"time": "2900-01-01T00:00:00.000000+00:00"}
    merge_notes(study, json.dumps(ahead) + "\n")
    add_note(study, PLACE, "text", "mine")
    add_note(study, PLACE, "text", "mine again")
    note = notes_of(study)[PLACE]
    assert note.text == "mine again"
    assert [e["value"] for e in note.earlier] == ["mine", "theirs"]
    assert add_note(study, PLACE, "label", "own")["time"] < "2900", "the clock is right for other fields"


def test_half_characters_and_foreign_times_are_no_notes(study: Study) -> None:
    for value in ("half: \ud83e", "\udcff"):
        with pytest.raises(BadInput, match="half of a character"):
            add_note(study, PLACE, "text", value)
    lines = [event(1, "text", "\ud83e"), event(2, "text", "x") | {"time": "yesterday"}]
    lines += [
        event(3, "text", "x") | {"time": "2026-02-30T00:00:00.000000+00:00"},
        event(4, "text", "x", "study\ud83e"),
    ]
    assert parse_events("".join(json.dumps(line) + "\n" for line in lines)) == ([], 4)


def test_bytes_that_are_no_text_harm_their_line_alone(study: Study) -> None:
    add_note(study, PLACE, "text", "before")
    bad = json.dumps(event(1, "text", "latin")).encode().replace(b"latin", b"caf\xe9")
    with (study.path / FILE).open("ab") as file:
        file.write(bad + b"\n")
    assert [e["value"] for e in read_events(study.path / FILE)[0]] == ["before"]
    assert read_events(study.path / FILE)[1] == 1
    with pytest.raises(BadInput, match="1 damaged line"):
        merge_notes(study, "")


def test_who_waits_too_long_for_the_file_is_told(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notes, "PATIENCE", 0.1)
    with FileLock(study.path / notes.LOCK):
        with pytest.raises(RunFailed, match="Another process"):
            add_note(study, PLACE, "text", "x")
        with pytest.raises(RunFailed, match="Another process"):
            merge_notes(study, "")
    assert add_note(study, PLACE, "text", "x")["value"] == "x"


def test_notes_say_when_their_place_is_another(study: Study) -> None:
    (study.path / "adapter").mkdir()
    (study.path / "adapter" / "adapter_config.json").write_text("{}")
    write_store(study, [[1.0], [2.0], [3.0]], [1, 2])
    places = {
        "feature:L0.gate+": "an earlier adapter's direction",
        "feature:neuron.L0.1+": "",
        "trace:train:1": "an earlier trace of this number",
        "token:train:1:0": "an earlier trace of this number",
        "trace:train:7": "",
        "trace:other:0": "",
        "study": "",
    }
    for place in places:
        add_note(study, place, "text", "seen")
    append_events(study.path / FILE, [event(1, "label", "old", "feature:L0.up+")])

    def moved() -> dict[str, str]:
        return {place: as_shown(study, note)["moved"] for place, note in notes_of(study).items()}

    assert moved() == dict.fromkeys([*places, "feature:L0.up+"], "")
    (study.path / "adapter" / "adapter_config.json").write_text('{"r": 2}')
    shutil.rmtree(study.path / "scalars")
    write_store(study, [[1.0], [2.0], [3.0]], [1, 2], tokens=[7, 8, 9])
    study.summarise({"made": "anew"})
    assert moved() == places | {"feature:L0.up+": ""}, "a note that says nothing of its time is taken as it is"
    add_note(study, "trace:train:1", "text", "seen again")
    assert moved()["trace:train:1"] == ""
    add_note(study, "trace:train:1", "star", True)
    shutil.rmtree(study.path / "adapter")
    study.summarise({"made": "again"})
    assert moved()["feature:L0.gate+"] == "", "nobody can say"


def test_the_command_shows_and_merges(study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_note(study, PLACE, "text", "mine")
    theirs = tmp_path / "theirs.jsonl"
    theirs.write_text(json.dumps(event(1, "label", "theirs", "trace:train:0")) + "\nno json\n")
    command = ["notes", str(study.path), "--merge", str(theirs), "--json"]
    assert main(command) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["merged"] == {str(theirs): {"added": 1, "known": 0, "unread": 1}}
    assert {note["place"]: note["text"] + note["label"] for note in shown["notes"]} == {
        PLACE: "mine",
        "trace:train:0": "theirs",
    }
    assert main(["notes", str(study.path)]) == 0
    assert "mine" in capsys.readouterr().out
    assert main(["notes", str(study.path), "--merge", "nowhere"]) == 2
    assert "Cannot read the notes in nowhere" in capsys.readouterr().err
