"""Question files as the field passes them around: AIME, MATH-500, GSM8K, GPQA, and plain question and answer."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorascope.errors import BadInput
from lorascope.tasks.answers import as_fraction, last_boxed
from lorascope.tasks.problem import Kind, Problem
from lorascope.traces.files import read_rows

_QUESTION = ("question", "problem", "prompt", "query", "input")
_GOLD = ("answer", "gold", "target", "final_answer", "expected_answer", "label")
_ID = ("id", "unique_id", "record id", "problem_idx", "task_id")
_LETTERS = "ABCDEFGHIJ"
_ABOUT_OTHERS = re.compile(
    r"\b(?:all|none|both|neither|either|any|some|two)\b.*\b(?:above|these|those|them|others?|options|choices|answers)\b",
    re.IGNORECASE,
)
_NAMES_OTHERS = re.compile(
    r"(?:\b|\()[A-J]\)?\s*(?:,|and|or|nor|&)\s*\(?[A-J](?:\)|\b)|\b(?:[Oo]ption|[Cc]hoice) \(?[A-J]\b"
)
_NAMED = {"sqrt", "sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "pi", "infinity"}
"""Words that formulas hold beside single letters."""
_ROLES = re.compile(r"\w+ is a kn(?:ight|ave)\b")


class _Malformed(Exception):
    """What is wrong with one row."""


def read_questions(file: str | Path, seed: int = 0) -> list[Problem]:
    """Reads a JSON Lines file, a JSON list (both also as .gz) or a Parquet file of questions with their answers.

    Known columns, in any case: problem or question with answer (GSM8K's ends in `#### N`; without an answer the
    solution's last box is taken), question with choices, GPQA's Correct Answer and Incorrect Answer 1 to 3. Options
    are shuffled by `seed` and the question's text, so that a problem is the same in every file; last ones such as
    "none of the above" keep their places, and so do all where an option names others ("both A and B") or speaks of
    them without being last. Options inside the question's own text stay as they are. Repeated ids get `#2`, `#3`.
    Raises BadInput with the line and what is wrong with it.
    """
    path = Path(file)
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    for where, row in _rows(path):
        try:
            problem = _problem(row, path.name.split(".")[0], len(problems), seed)
        except _Malformed as error:
            raise BadInput(f"{path.name}, {where}: {error}.") from error
        # Answers are kept and paired by id: two problems of one id would pass for two responses to one.
        seen[problem.id] = seen.get(problem.id, 0) + 1
        if seen[problem.id] > 1:
            problem = replace(problem, id=f"{problem.id}#{seen[problem.id]}")
            seen[problem.id] = 1
        problems.append(problem)
    if not problems:
        raise BadInput(f"{path.name} has no questions in it: give one JSON object per line.")
    return problems


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Every row with the words for where it stands: its line, or its number in a JSON list or a Parquet file."""
    if ".parquet" in path.suffixes:
        yield from ((f"row {number + 1}", row) for _, number, row in read_rows(path))
        return
    text = _text(path)
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise BadInput(f"{path.name}, line {error.lineno}: not valid JSON ({error.msg}).") from error
        yield from ((f"entry {number}", row) for number, row in enumerate(rows, start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise BadInput(f"{path.name}, line {number}: not valid JSON ({error.msg}).") from error


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(f"Cannot read {path}: {error.strerror}.") from error
    try:
        return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except (OSError, EOFError) as error:
        raise BadInput(f"{path.name} is a damaged gzip file.") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path.name} is not UTF-8 text.") from error


def _problem(row: Any, stem: str, index: int, seed: int) -> Problem:
    if not isinstance(row, dict):
        raise _Malformed(f"an object is needed, not {type(row).__name__}")
    columns = {str(key).strip().lower(): value for key, value in row.items()}
    question = _first(columns, _QUESTION)
    if not isinstance(question, str) or not question.strip():
        raise _Malformed(f"no question (a text in one of the columns {', '.join(_QUESTION)})")
    name = _first(columns, _ID)
    problem_id = str(name) if name not in (None, "") else f"{stem}-{index + 1}"
    if "correct answer" in columns:
        options, gold = _gpqa(columns, question, seed)
        return _multiple_choice(problem_id, stem, question, options, gold)
    if columns.get("choices") or columns.get("options"):
        options, gold = _shuffled(*_choices(columns), question, seed)
        return _multiple_choice(problem_id, stem, question, options, gold)
    gold = _gold(columns)
    return _made(problem_id, stem, question.strip(), gold, _kind(question, gold))


def _made(problem_id: str, stem: str, question: str, gold: str, kind: Kind, options: tuple[str, ...] = ()) -> Problem:
    return Problem(
        id=problem_id,
        family=stem,
        question=question,
        gold=gold,
        kind=kind,
        key=question,
        group=question,
        options=options,
    )


def _first(columns: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((columns[name] for name in names if columns.get(name) is not None), None)


# -- free answers -----------------------------------------------------------------------------------------------


def _gold(columns: Mapping[str, Any]) -> str:
    value = _first(columns, _GOLD)
    if value is None and isinstance(columns.get("solution"), str):
        value = last_boxed(columns["solution"])
        if value is None:
            raise _Malformed("the solution has no boxed answer and there is no answer column")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _Malformed(f"no answer (a text or number in one of the columns {', '.join(_GOLD)})")
    gold = str(value)
    if "####" in gold:
        gold = gold.rsplit("####", 1)[1]
    if not gold.strip():
        raise _Malformed("the answer is empty")
    return gold.strip()


def _kind(question: str, gold: str) -> Kind:
    if as_fraction(gold) is not None:
        return "number"
    if gold.strip("()") in _LETTERS and len(gold.strip("()")) == 1 and re.search(r"(?:\(|\b)B[).:]", question):
        return "choice"
    if _ROLES.search(gold):
        return "roles"
    if re.search(r"[\\^_$={}]|\d\s*[-+*/]|\d[a-z]\b", gold) or re.fullmatch(r"[\[(].*[\])]", gold):
        return "math"
    return "math" if _is_formula(gold) else "text"


def _is_formula(gold: str) -> bool:
    """Formulas without LaTeX: `p - q`, `-x`, `x/2`, `3, 5, 7`; not `to-do`, `F-16`, `Coca-Cola`.

    As texts they would lose their signs, and p + q would pass for p - q.
    """
    if re.fullmatch(r"[-+\d.,/\s]*\d", gold):
        return True
    if not re.fullmatch(r"[\w\s+\-*/^=<>()|!.,]+", gold) or re.fullmatch(r"[A-Z]-\d+", gold):
        return False
    if not re.search(r"[-+*/^=<>]\s*[\w(|]", gold):
        return False
    # Products of two letters, as in ab - c; without such a sign they may be words.
    pairs = re.search(r"[+=*^\d]| - ", gold)
    runs = re.findall(r"[^\W\d_]+", gold)
    return all(len(run) == 1 or run in _NAMED or (len(run) == 2 and pairs) for run in runs)


# -- multiple choice --------------------------------------------------------------------------------------------


def _gpqa(columns: Mapping[str, Any], question: str, seed: int) -> tuple[list[str], str]:
    names = ("correct answer", "incorrect answer 1", "incorrect answer 2", "incorrect answer 3")
    missing = [name for name in names if not str(columns.get(name) or "").strip()]
    if missing:
        raise _Malformed(f"the column {missing[0].title()!r} is missing or empty")
    return _shuffled([str(columns[name]).strip() for name in names], "A", question, seed)


def _shuffled(options: list[str], gold: str, question: str, seed: int) -> tuple[list[str], str]:
    """The options in a seeded order with the new letter of the right one; see `read_questions` for what stays."""
    free = len(options)
    while free and _ABOUT_OTHERS.search(options[free - 1]):
        free -= 1
    fixed = any(_ABOUT_OTHERS.search(option) for option in options[:free]) or any(map(_NAMES_OTHERS.search, options))
    order = list(range(free))
    if not fixed:
        random.Random(f"{seed} {question}").shuffle(order)
    order += range(free, len(options))
    return [options[i] for i in order], _LETTERS[order.index(_LETTERS.index(gold))]


def _choices(columns: Mapping[str, Any]) -> tuple[list[str], str]:
    """Choices as a list, {letter: text} or ARC's {text: [...], label: [...]}; the gold by letter, place or text."""
    given = columns.get("choices") or columns.get("options")
    labels: list[str] | None = None
    if isinstance(given, dict):
        known: dict[str, Any] = given
        if isinstance(known.get("text"), list):
            labels, given = [str(label) for label in known.get("label") or []] or None, known["text"]
        else:
            labels, given = [str(label) for label in known], list(known.values())
    if not isinstance(given, list) or not 2 <= len(given) <= len(_LETTERS):
        raise _Malformed(f"choices must be a list of 2 to {len(_LETTERS)} texts")
    options = [str(option).strip() for option in given]
    gold = _first(columns, ("answer", "answerkey", "answer_index", "gold", "target", "label"))
    if isinstance(gold, int) and not isinstance(gold, bool) and 0 <= gold < len(options):
        return options, _LETTERS[gold]
    name = str(gold).strip()
    for names in (labels or [], list(_LETTERS[: len(options)]), options):
        if name in names:
            return options, _LETTERS[names.index(name)]
    if name.isdigit() and int(name) < len(options):
        return options, _LETTERS[int(name)]
    raise _Malformed(f"the answer {gold!r} is none of the choices")


def _multiple_choice(problem_id: str, stem: str, question: str, options: list[str], gold: str) -> Problem:
    lettered = "\n".join(f"({letter}) {option}" for letter, option in zip(_LETTERS, options, strict=False))
    asked = f"{question.strip()}\n\n{lettered}"
    return _made(problem_id, stem, asked, gold, "choice", tuple(options))
