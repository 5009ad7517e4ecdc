"""Question files of several benchmarks, and what is said about broken ones."""

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorascope.errors import BadInput
from lorascope.tasks import make_problems, read_questions, score


def written(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_aime(tmp_path: Path) -> None:
    file = written(tmp_path / "aime24.jsonl", {"id": 60, "problem": "Find n.", "solution": "...", "answer": "204"})
    (problem,) = read_questions(file, 0)
    assert (problem.id, problem.question, problem.gold, problem.kind) == ("60", "Find n.", "204", "number")
    capital = written(tmp_path / "aime.jsonl", {"ID": "2024-I-4", "Problem": "Find m.", "Solution": "s", "Answer": 116})
    (problem,) = read_questions(capital, 0)
    assert (problem.id, problem.gold) == ("2024-I-4", "116")
    assert score(problem, "The answer is $\\boxed{116}$.").correct


def test_math_500(tmp_path: Path) -> None:
    row = {
        "problem": "Convert $(0,3)$ to polar coordinates.",
        "solution": "... \\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}",
        "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
        "unique_id": "test/precalculus/807.json",
    }
    without = {key: row[key] for key in ("problem", "solution")}
    for given in (row, without):
        (problem,) = read_questions(written(tmp_path / "math.jsonl", given), 0)
        assert problem.kind == "math"
        assert problem.gold == row["answer"]
        assert score(problem, "It is $\\boxed{(3, \\pi/2)}$").correct


def test_gsm8k_in_gzip(tmp_path: Path) -> None:
    path = tmp_path / "gsm8k_test.jsonl.gz"
    row = {"question": "How much?", "answer": "She makes 9 * 2 = $<<9*2=18>>18.\n#### 1,018"}
    path.write_bytes(gzip.compress(json.dumps(row).encode()))
    (problem,) = read_questions(path, 0)
    assert (problem.id, problem.family, problem.gold, problem.kind) == ("gsm8k_test-1", "gsm8k_test", "1,018", "number")
    assert score(problem, "#### 1018").correct


def test_gpqa_is_shuffled_by_the_seed(tmp_path: Path) -> None:
    rows = [
        {
            "Record ID": f"rec{i}",
            "Question": f"Which is it, {i}?",
            "Correct Answer": "right ",
            "Incorrect Answer 1": "wrong one",
            "Incorrect Answer 2": "wrong two",
            "Incorrect Answer 3": "wrong three",
        }
        for i in range(40)
    ]
    file = written(tmp_path / "gpqa.jsonl", *rows)
    problems = read_questions(file, 1)
    assert problems == read_questions(file, 1)
    assert [p.gold for p in problems] != [p.gold for p in read_questions(file, 2)]
    assert {p.gold for p in problems} == set("ABCD")
    for p in problems:
        assert p.options["ABCD".index(p.gold)] == "right"
        assert f"({p.gold}) right" in p.question
        assert score(p, f"I think that the answer is ({p.gold}).").correct
    alone = read_questions(written(tmp_path / "one.jsonl", rows[7]), 1)[0]
    assert alone.gold == problems[7].gold


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Which?", "choices": ["tin", "iron"], "answer": 1},
        {"question": "Which?", "choices": ["tin", "iron"], "answer": "B"},
        {"question": "Which?", "choices": ["tin", "iron"], "answer": "iron"},
        {"question": "Which?", "options": {"A": "tin", "B": "iron"}, "answer": "B"},
        {"question": "Which?", "choices": {"text": ["tin", "iron"], "label": ["1", "2"]}, "answerKey": "2"},
    ],
)
def test_choices(tmp_path: Path, row: dict[str, Any]) -> None:
    (problem,) = read_questions(written(tmp_path / "mmlu.jsonl", row), 0)
    assert (problem.kind, problem.gold, problem.options) == ("choice", "B", ("tin", "iron"))
    assert problem.question == "Which?\n\n(A) tin\n(B) iron"


def test_json_lists_and_other_kinds(tmp_path: Path) -> None:
    path = tmp_path / "mixed.json"
    rows = [
        {"question": "Capital?", "answer": "Paris"},
        {"prompt": "Who?", "target": "Ann is a knight, and Ben is a knave."},
        {"question": "Which? A) tin B) iron", "answer": "B"},
    ]
    path.write_text(json.dumps(rows))
    problems = read_questions(path, 0)
    assert [p.kind for p in problems] == ["text", "roles", "choice"]
    assert score(problems[0], "The answer is Paris.").correct
    assert score(problems[1], "Ben is a knave and Ann is a knight.").correct
    assert score(problems[2], "(B)").correct


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"question": "a", "answer": "1"}\n{"question": ', "file.jsonl, line 2: not valid JSON"),
        ('{"question": "a", "answer": "1"}\n\n[1]x', "line 3: not valid JSON"),
        ('"only text"', "line 1: an object is needed, not str"),
        ('{"answer": "1"}', "line 1: no question"),
        ('{"question": "  ", "answer": "1"}', "line 1: no question"),
        ('{"question": "a"}', "line 1: no answer"),
        ('{"question": "a", "answer": null}', "line 1: no answer"),
        ('{"question": "a", "answer": "work ####  "}', "line 1: the answer is empty"),
        ('{"problem": "a", "solution": "no box"}', "the solution has no boxed answer"),
        ('{"question": "a", "choices": ["x"], "answer": 0}', "choices must be a list of 2 to 10"),
        ('{"question": "a", "choices": ["x", "y"], "answer": "z"}', "the answer 'z' is none of the choices"),
        ('{"Question": "a", "Correct Answer": "b", "Incorrect Answer 1": "c"}', "'Incorrect Answer 2' is missing"),
        ('[{"question": "a"}]', "entry 1: no answer"),
        ("[1, 2", "line 1: not valid JSON"),
        ("", "has no questions"),
    ],
)
def test_broken_files_say_where_and_what(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "file.jsonl"
    path.write_text(text)
    with pytest.raises(BadInput) as error:
        read_questions(path, 0)
    assert said in str(error.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="Cannot read"):
        read_questions(tmp_path / "missing.jsonl", 0)
    (tmp_path / "bad.gz").write_bytes(b"\x1f\x8bnot gzip")
    with pytest.raises(BadInput, match="damaged gzip"):
        read_questions(tmp_path / "bad.gz", 0)
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(BadInput, match="not UTF-8"):
        read_questions(tmp_path / "latin.jsonl", 0)


def test_reasoning_gym_families(monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter to reasoning-gym, on a package of the same shape (the real one is heavy to install)."""

    def create_dataset(name: str, size: int, seed: int) -> list[dict[str, Any]]:
        return [{"question": f"{seed} + 1?", "answer": str(seed + 1), "metadata": {}}]

    package = SimpleNamespace(
        factory=SimpleNamespace(DATASETS={"plus_one": object}),
        create_dataset=create_dataset,
        get_score_answer_fn=lambda name: lambda answer, entry: 1.0 if answer == entry["answer"] else 0.01,
    )
    monkeypatch.setitem(sys.modules, "reasoning_gym", package)  # type: ignore[arg-type]
    problems = make_problems(["rg:plus_one"], 5, 0, split="heldout")
    assert [p.kind for p in problems] == ["number"] * 5
    assert score(problems[0], f"The answer is {problems[0].gold}.").correct
    assert not score(problems[0], "The answer is -3.").correct
    assert score(problems[0], "none").extracted is None
    with pytest.raises(BadInput, match="no task 'other'; choose from plus_one"):
        make_problems(["rg:other"], 5, 0)


def test_reasoning_gym_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(BadInput, match=r"lorascope\[gym\]"):
        make_problems(["rg:gcd"], 5, 0)
