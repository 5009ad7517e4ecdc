"""Notes on features and places: an append-only file of events, `notes.jsonl` in the study.

An event sets one field of one place: `{"id", "time", "author", "place", "field", "value"}`. A place is `feature:ID`,
`trace:CORPUS:INDEX`, `token:CORPUS:INDEX:POSITION` or `study`. The last event of a field counts, by time, then by id;
so the union of two people's files in any order gives the same notes, and every earlier text stays in the file.
"""

import getpass
import json
import os
import re
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from lorascope.errors import BadInput
from lorascope.study import Study, atomic_write_text

FILE = "notes.jsonl"
PLACE = re.compile(r"study|feature:[^\s:/]{1,100}|trace:[\w-]{1,60}:\d{1,9}|token:[\w-]{1,60}:\d{1,9}:\d{1,9}")
FIELDS = ("text", "label", "star")
TAG = re.compile(r"tag:[^\s:,]{1,40}")
"""Each tag is a field of its own, so that tags from two people add up."""
LONGEST_TEXT = 10_000
LONGEST_LABEL = 120
KEYS = ("id", "time", "author", "place", "field", "value")
LOCK = ".notes.lock"

Event = dict[str, Any]


@dataclass(frozen=True)
class Note:
    """What is noted of one place."""

    place: str
    text: str = ""
    label: str = ""
    star: bool = False
    tags: tuple[str, ...] = ()
    time: str = ""
    author: str = ""
    """Of the last change."""
    earlier: tuple[Event, ...] = ()
    """Events of texts that were replaced, newest first."""


def add_note(study: Study, place: str, field: str, value: Any) -> Event:
    """Append one event to the file and return it.

    Raises:
        BadInput: an unknown place or field, or a value that does not fit it.
    """
    event = {
        "id": uuid.uuid4().hex,
        "time": datetime.now(UTC).isoformat(timespec="microseconds"),
        "author": author_name(),
        "place": place,
        "field": field,
        "value": value,
    }
    check_event(event)
    with FileLock(study.path / LOCK):
        append_events(study.path / FILE, [event])
    return event


def author_name() -> str:
    """Who writes: `LORASCOPE_AUTHOR`, or the name of the user."""
    try:
        return os.environ.get("LORASCOPE_AUTHOR") or getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


def check_event(event: Any) -> None:
    """Raise BadInput unless this is a whole event whose value fits its field."""
    if not isinstance(event, dict) or set(event) != set(KEYS):
        raise BadInput(f"A note is an object with the keys {', '.join(KEYS)}.")
    place, field, value = event["place"], event["field"], event["value"]
    if not all(isinstance(event[key], str) and len(event[key]) <= 200 for key in ("id", "time", "author", "place")):
        raise BadInput("Id, time, author and place of a note are short texts.")
    if not PLACE.fullmatch(place):
        raise BadInput("A note's place is study, feature:ID, trace:CORPUS:INDEX or token:CORPUS:INDEX:POSITION.")
    if not isinstance(field, str) or (field not in FIELDS and not TAG.fullmatch(field)):
        raise BadInput("A note's field is text, label, star or tag:NAME, where NAME has no space, colon or comma.")
    if field in ("text", "label"):
        most = LONGEST_TEXT if field == "text" else LONGEST_LABEL
        if not isinstance(value, str) or len(value) > most:
            raise BadInput(f"The {field} of a note is text of at most {most} characters.")
    elif not isinstance(value, bool):
        raise BadInput(f"The value of {field} is true or false.")


def append_events(path: Path, events: Iterable[Event]) -> None:
    """Append events, each in one line; a line that a crash cut off is ended first, so that it harms no other."""
    lines = "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in events)
    with path.open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            lines = lines if file.read(1) == b"\n" else "\n" + lines
        file.write(lines.encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())


def read_events(path: Path) -> tuple[list[Event], int]:
    """The events of a file by time, each once, and how many lines could not be read; none without a file."""
    if not path.is_file():
        return [], 0
    return parse_events(path.read_text(encoding="utf-8", errors="replace"))


def parse_events(text: str) -> tuple[list[Event], int]:
    """Events of JSON Lines by time, each once, and how many lines are none."""
    events: dict[str, Event] = {}
    unread = 0
    for line in text.split("\n"):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
            check_event(event)
        except (ValueError, BadInput):
            unread += 1
            continue
        events[event["id"]] = event
    return in_order(events.values()), unread


def in_order(events: Iterable[Event]) -> list[Event]:
    """Events by time, then by id."""
    return sorted(events, key=lambda event: (event["time"], event["id"]))


def merge_events(*files: Sequence[Event]) -> list[Event]:
    """The union of several files' events, the same in whatever order they are given."""
    return in_order({event["id"]: event for events in files for event in events}.values())


def merge_notes(study: Study, text: str) -> dict[str, int]:
    """Take another file's events into the study's; `{"added", "known", "unread"}`.

    The file is written anew in the order of time, so that two merged copies are the same bytes.
    """
    theirs, unread = parse_events(text)
    with FileLock(study.path / LOCK):
        ours, damaged = read_events(study.path / FILE)
        if damaged:
            raise BadInput(f"{study.path / FILE} has {damaged} damaged lines; mend or remove them before merging.")
        merged = merge_events(ours, theirs)
        atomic_write_text(study.path / FILE, "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in merged))
    added = len(merged) - len(ours)
    return {"added": added, "known": len(theirs) - added, "unread": unread}


def current_notes(events: Iterable[Event]) -> dict[str, Note]:
    """What stands at each place after all events (given in order); places where nothing is left are left out."""
    fields: dict[str, dict[str, Any]] = {}
    texts: dict[str, list[Event]] = {}
    last: dict[str, Event] = {}
    for event in events:
        place = event["place"]
        fields.setdefault(place, {})[event["field"]] = event["value"]
        last[place] = event
        if event["field"] == "text" and event["value"]:
            texts.setdefault(place, []).append(event)
    notes = {}
    for place, values in fields.items():
        tags = tuple(sorted(name.removeprefix("tag:") for name, on in values.items() if name[:4] == "tag:" and on))
        text, label, star = values.get("text", ""), values.get("label", ""), values.get("star", False)
        earlier = tuple(e for e in reversed(texts.get(place, [])) if e["value"] != text)
        if text or label or star or tags or earlier:
            by = last[place]
            notes[place] = Note(place, text, label, star, tags, by["time"], by["author"], earlier)
    return notes


def searchable(notes: dict[str, Note]) -> dict[str, str]:
    """The text of the notes on each feature, in small letters, for the table's search."""
    return {
        place.removeprefix("feature:"): " ".join([note.label, note.text, *note.tags]).lower()
        for place, note in notes.items()
        if place.startswith("feature:")
    }
