"""Question files of several benchmarks, and what is said about broken ones."""

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
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


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        ("p - q", "p-q", "p+q"),
        ("-x", "-x", "x"),
        ("n+1", "1+n", "n-1"),
        ("ab - c", "ab-c", "ab+c"),
        ("x/2", "\\frac{x}{2}", "2x"),
        ("x^2+1", "1+x^2", "x^2-1"),
        ("\\frac{3}{4}", "0.75", "-\\frac{3}{4}"),
        ("(3, \\frac{\\pi}{2})", "(3, \\pi/2)", "(\\frac{\\pi}{2}, 3)"),
        ("11\\sqrt2", "11\\sqrt{2}", "11\\sqrt{3}"),
        ("\\text{Evelyn}", "Evelyn", "Carla"),
        ("(-\\infty, 3]", "(-\\infty,3]", "(-\\infty,3)"),
        ("90^\\circ", "90", "80^\\circ"),
        ("4210_{5}", "4210_5", "4210_{6}"),
        ("4210_5", "4210_{5}", "42105"),
        ("3, 5, 7", "3,5,7", "357"),
        ("-2,1", "1,-2", "-21"),
        ("6 - 5i", "6-5i", "6+5i"),
    ],
)
def test_mathematical_golds(tmp_path: Path, gold: str, right: str, wrong: str) -> None:
    (problem,) = read_questions(written(tmp_path / "math.jsonl", {"problem": "What?", "answer": gold}), 0)
    assert score(problem, f"So it is $\\boxed{{{right}}}$.").correct
    assert not score(problem, f"So it is $\\boxed{{{wrong}}}$.").correct


@pytest.mark.parametrize("gold", ["Coca-Cola", "to-do", "go/no", "F-16", "even", "A+", "New York - Paris", "C++"])
def test_texts_with_signs_stay_texts(tmp_path: Path, gold: str) -> None:
    (problem,) = read_questions(written(tmp_path / "qa.jsonl", {"question": "What?", "answer": gold}), 0)
    assert problem.kind == "text"
    assert score(problem, f"The answer is {gold}.").correct
    assert score(problem, f"The answer is {gold.rstrip('+')}.").correct == ("+" not in gold)


def test_repeated_ids_are_made_unique(tmp_path: Path) -> None:
    rows = [{"id": name, "question": f"{i}?", "answer": str(i)} for i, name in enumerate(["a", "a", "b", "a", "a#2"])]
    problems = read_questions(written(tmp_path / "twice.jsonl", *rows), 0)
    assert [p.id for p in problems] == ["a", "a#2", "b", "a#3", "a#2#2"]


def test_parquet(tmp_path: Path) -> None:
    rows = [{"question": "Which?", "choices": ["tin", "iron"], "answer": 1}, {"question": "Who?", "answer": None}]
    pq.write_table(pa.Table.from_pylist(rows[:1]), tmp_path / "mmlu.parquet")
    (problem,) = read_questions(tmp_path / "mmlu.parquet", 1)
    assert (problem.id, problem.kind, problem.options["AB".index(problem.gold)]) == ("mmlu-1", "choice", "iron")
    pq.write_table(pa.Table.from_pylist(rows[1:]), tmp_path / "none.parquet")
    with pytest.raises(BadInput, match=r"none.parquet, row 1: no answer"):
        read_questions(tmp_path / "none.parquet", 0)
    (tmp_path / "bad.parquet").write_text("text")
    with pytest.raises(BadInput, match="not a Parquet file"):
        read_questions(tmp_path / "bad.parquet", 0)


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
    (problem,) = read_questions(written(tmp_path / "mmlu.jsonl", row), 1)
    assert (problem.kind, sorted(problem.options)) == ("choice", ["iron", "tin"])
    assert problem.options["AB".index(problem.gold)] == "iron"
    assert problem.question == "Which?\n\n(A) {}\n(B) {}".format(*problem.options)


def test_choices_are_shuffled_by_the_seed(tmp_path: Path) -> None:
    rows = [{"question": f"Which, {i}?", "choices": ["right", "x", "y", "z"], "answer": 0} for i in range(40)]
    file = written(tmp_path / "mmlu.jsonl", *rows)
    problems = read_questions(file, 1)
    assert problems == read_questions(file, 1)
    assert [p.gold for p in problems] != [p.gold for p in read_questions(file, 2)]
    assert {p.gold for p in problems} == set("ABCD")
    for p in problems:
        assert p.options["ABCD".index(p.gold)] == "right"
        assert f"({p.gold}) right" in p.question


@pytest.mark.parametrize("last", ["All of the above", "None of these.", "none of the other options", "both of them"])
def test_options_about_other_options_keep_their_places(tmp_path: Path, last: str) -> None:
    rows = [{"question": f"Which, {i}?", "choices": ["right", "x", "y", last], "answer": 0} for i in range(40)]
    problems = read_questions(written(tmp_path / "mmlu.jsonl", *rows), 1)
    assert {p.options[3] for p in problems} == {last}
    assert {p.gold for p in problems} == set("ABC")
    assert all(p.options["ABC".index(p.gold)] == "right" for p in problems)


@pytest.mark.parametrize("between", ["Both A and B", "(A) and (C)", "A or B", "none of the above", "Neither A nor C"])
def test_options_that_name_others_keep_the_whole_order(tmp_path: Path, between: str) -> None:
    rows = [{"question": f"Which, {i}?", "choices": ["right", "x", between, "y"], "answer": 0} for i in range(9)]
    problems = read_questions(written(tmp_path / "mmlu.jsonl", *rows), 1)
    assert {p.options for p in problems} == {("right", "x", between, "y")}


def test_equal_options_keep_the_right_one(tmp_path: Path) -> None:
    """A file's mistake; its right letter must not become that of the copy without notice."""
    rows = [{"question": f"Which, {i}?", "choices": ["x", "x", "y", "z"], "answer": 1} for i in range(20)]
    assert all(p.options["ABCD".index(p.gold)] == "x" for p in read_questions(written(tmp_path / "a.jsonl", *rows), 1))


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


def test_reasoning_gym_missing_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(BadInput, match="pip install reasoning-gym"):
        make_problems(["rg:gcd"], 5, 0)
