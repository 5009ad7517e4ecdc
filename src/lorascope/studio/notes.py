"""Notes on features and places: an append-only file of events, `notes.jsonl` in the study; and `lorascope notes`.

An event sets one field of one place: `{"id", "time", "author", "place", "field", "value", "about"}`. A place is
`feature:ID`, `trace:CORPUS:INDEX`, `token:CORPUS:INDEX:POSITION` or `study`; `about` is what it stood for then
(`places.about_place`), and may be left out. The last event of a field counts, by time, then by id; so the union of two
people's files in any order gives the same notes, and every earlier text stays in the file.
"""

import contextlib
import getpass
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lorascope.config import Options
from lorascope.errors import BadInput, RunFailed
from lorascope.studio.places import about_place, moved_to
from lorascope.study import Study, atomic_write_text

FILE = "notes.jsonl"
PLACE = re.compile(r"study|feature:[^\s:/]{1,100}|trace:[\w-]{1,60}:\d{1,9}|token:[\w-]{1,60}:\d{1,9}:\d{1,9}")
FIELDS = ("text", "label", "star")
TAG = re.compile(r"tag:[^\s:,]{1,40}")
"""Each tag is a field of its own, so that tags from two people add up."""
TIME = re.compile(r"[12]\d{3}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00")
"""Times in one form alone: their order as texts is their order."""
LONGEST_TEXT = 10_000
LONGEST_LABEL = 120
KEYS = ("id", "time", "author", "place", "field", "value")
LOCK = ".notes.lock"
PATIENCE = 10.0
"""Seconds to wait for another process that writes notes."""

Event = dict[str, Any]


@dataclass(frozen=True)
class NotesConfig:
    """Show the notes of a study; with --merge, take in those of another copy of it first."""

    merge: tuple[str, ...] = ()
    """The notes.jsonl of another copy of the study; every event of both is kept. May be given several times."""


def show_notes(study: Study, config: NotesConfig, options: Options) -> dict[str, Any]:
    """The command; `{"file", "events", "unread", "merged": {file: counts}, "notes": [..]}`, counts as `merge_notes`.

    Raises:
        BadInput: a file to merge cannot be read.
    """
    merged = {}
    for name in config.merge:
        try:
            text = read_loosely(Path(name))
        except OSError as error:
            raise BadInput(f"Cannot read the notes in {name} ({error.strerror}).") from error
        merged[name] = merge_notes(study, text)
    events, unread = read_events(study.path / FILE)
    notes = [as_shown(study, note) | {"earlier": len(note.earlier)} for note in current_notes(events).values()]
    return {"file": FILE, "events": len(events), "unread": unread, "merged": merged, "notes": notes}


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
    abouts: tuple[str, ...] = ()
    """What the place stood for when what stands here was written, each once."""


def as_shown(study: Study, note: Note) -> dict[str, Any]:
    """A note for a page, with what it is about (`moved`) where that is no longer what its place names."""
    return vars(note) | {"moved": moved_to(study, note.place, note.abouts)}


def add_note(study: Study, place: str, field: str, value: Any, before: Any = None) -> Event:
    """Append one event to the file and return it, with `"replaced": True` where it took the place of something else
    than its writer knew of (`before`), which the file keeps.

    Raises:
        BadInput: an unknown place or field, or a value that does not fit it.
    """
    event: Event = {"id": uuid.uuid4().hex, "time": time_after([]), "author": author_name()}
    event |= {"place": place, "field": field, "value": value}
    check_event(event)
    if about := about_place(study, place):
        event["about"] = about
    with notes_lock(study):
        events, _ = read_events(study.path / FILE)
        earlier = [e for e in events if e["place"] == place and e["field"] == field]
        event["time"] = time_after(e["time"] for e in earlier)
        append_events(study.path / FILE, [event])
    standing = earlier[-1]["value"] if earlier else type(value)()
    return event | ({"replaced": True} if before is not None and standing not in (before, value) else {})


@contextlib.contextmanager
def notes_lock(study: Study) -> Iterator[None]:
    """Nobody else writes the study's notes meanwhile.

    Raises:
        RunFailed: somebody does, for longer than one should wait.
    """
    lock = FileLock(study.path / LOCK)
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout as error:
        raise RunFailed("Another process is writing the notes of this study; try again soon.") from error
    try:
        yield
    finally:
        lock.release()


def time_after(times: Iterable[str]) -> str:
    """Now, or just after the last of some times: events from a clock ahead of ours must not outlive a later change."""
    now, last = datetime.now(UTC), max(times, default="")
    if last:
        now = max(now, datetime.fromisoformat(last) + timedelta(microseconds=1))
    return now.isoformat(timespec="microseconds")


def author_name() -> str:
    """Who writes: `LORASCOPE_AUTHOR`, or the name of the user."""
    try:
        return os.environ.get("LORASCOPE_AUTHOR") or getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


def whole_text(text: str) -> bool:
    """Whether a text can be written as UTF-8: half of a surrogate pair, or a byte that was none, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_time(text: str) -> bool:
    """Whether a text is a time in the one form that events have."""
    with contextlib.suppress(ValueError):  # the 30th of February
        return bool(TIME.fullmatch(text) and datetime.fromisoformat(text))
    return False


def check_event(event: Any) -> None:
    """Raise BadInput unless this is a whole event whose value fits its field."""
    if not isinstance(event, dict) or not set(KEYS) <= set(event) <= {*KEYS, "about"}:
        raise BadInput(f"A note is an object with the keys {', '.join(KEYS)}, and perhaps about.")
    place, field, value = event["place"], event["field"], event["value"]
    short = [event.get(key, "") for key in ("id", "time", "author", "place", "about")]
    if not all(isinstance(text, str) and len(text) <= 200 for text in short):
        raise BadInput("Id, time, author, place and about of a note are short texts.")
    if not all(whole_text(text) for text in event.values() if isinstance(text, str)):
        raise BadInput("A note holds half of a character (a lone surrogate); type that character again.")
    if not is_time(event["time"]):
        raise BadInput("The time of a note is in UTC, as 2026-01-31T23:59:59.000000+00:00.")
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


def read_loosely(path: Path) -> str:
    """A file's text in which bytes that are no UTF-8 stay marked, so that their lines count as unread."""
    return path.read_bytes().decode("utf-8", "surrogateescape")


def read_events(path: Path) -> tuple[list[Event], int]:
    """The events of a file by time, each once, and how many lines could not be read; none without a file."""
    return parse_events(read_loosely(path)) if path.is_file() else ([], 0)


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
        except (ValueError, RecursionError, BadInput):
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
    with notes_lock(study):
        ours, damaged = read_events(study.path / FILE)
        if damaged:
            raise BadInput(f"{study.path / FILE} has {damaged} damaged lines; mend or remove them before merging.")
        merged = merge_events(ours, theirs)
        atomic_write_text(study.path / FILE, "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in merged))
    added = len(merged) - len(ours)
    return {"added": added, "known": len(theirs) - added, "unread": unread}


def current_notes(events: Iterable[Event]) -> dict[str, Note]:
    """What stands at each place after all events (given in order); places where nothing is left are left out."""
    fields: dict[str, dict[str, Event]] = {}
    texts: dict[str, list[Event]] = {}
    last: dict[str, Event] = {}
    for event in events:
        place = event["place"]
        fields.setdefault(place, {})[event["field"]] = event
        last[place] = event
        if event["field"] == "text" and event["value"]:
            texts.setdefault(place, []).append(event)
    notes = {}
    for place, standing in fields.items():
        values = {name: event["value"] for name, event in standing.items()}
        tags = tuple(sorted(name.removeprefix("tag:") for name, on in values.items() if name[:4] == "tag:" and on))
        text, label, star = values.get("text", ""), values.get("label", ""), values.get("star", False)
        earlier = tuple(e for e in reversed(texts.get(place, [])) if e["value"] != text)
        if text or label or star or tags or earlier:
            by = last[place]
            abouts = tuple(sorted({e["about"] for e in standing.values() if e["value"] and e.get("about")}))
            notes[place] = Note(place, text, label, star, tags, by["time"], by["author"], earlier, abouts)
    return notes


def searchable(notes: dict[str, Note]) -> dict[str, str]:
    """The text of the notes on each feature, in small letters, for the table's search."""
    return {
        place.removeprefix("feature:"): " ".join([note.label, note.text, *note.tags]).lower()
        for place, note in notes.items()
        if place.startswith("feature:")
    }
