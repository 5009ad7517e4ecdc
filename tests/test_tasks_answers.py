"""Reading answers out of tricky responses."""

import threading

import pytest

from lorascope.tasks import Problem, score
from lorascope.tasks.answers import as_fraction, find_stated, last_boxed, read_roles, same_list, same_number
from lorascope.tasks.mathematics import same_mathematics


def problem(gold: str, kind: str = "number", options: tuple[str, ...] = ()) -> Problem:
    return Problem("p", "test", "?", gold, kind=kind, options=options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("response", "gold", "extracted"),
    [
        ("The answer is 282.", "282", "282"),
        ("the answer is: **282**", "282", "282"),
        ("Answer: 1,234", "1234", "1234"),
        ("The final answer is $\\boxed{1{,}234}$.", "1234", "1234"),
        ("\\boxed{42} and nothing else. 7", "42", "42"),
        ("#### 18", "18", "18"),
        ("It costs $18.", "18", "18"),
        ("So we have 282 pens in 6 boxes.\nThe answer is 282 pens.", "282", "282"),
        ("The answer is 40 * 6 + 7 * 6 = 282.", "282", "282"),
        ("The answer is 9, because 6 * 9 = 54.", "9", "9"),
        ("The answer is x = 9.", "9", "9"),
        ("47 * 6 = 282", "282", "282"),
        ("The answer is 3. Wait, no. The answer is 4.", "4", "4"),
        ("Answer:\n\n12", "12", "12"),
        ("It is -5.", "-5", "-5"),
        ("We get 10-5.", "5", None),
        ("The answer is 0.50", "1/2", "0.50"),
        ("The answer is \\frac{1}{2}.", "0.5", "1/2"),
        ("There are 12,34 and 5", "5", "5"),
        ("The letter r appears three times.", "3", "3"),
        ("The answer is twice.", "2", "2"),
        ("The answer is 50%.", "50", "50"),
        ("The answer is 7.\n", "7", "7"),
        ("<think>\n12 + 3 = 15\n</think>\nThe answer is 16.", "16", "16"),
        ("<think>\nThe answer is 15.\n</think>\n16", "16", "16"),
        ("<|im_start|>think\n15\n<|im_start|>answer\nIt is 16.<|im_end|>", "16", "16"),
        ("</think>\nThe answer is 8", "8", "8"),
    ],
)
def test_numbers(response: str, gold: str, extracted: str | None) -> None:
    verdict = score(problem(gold), response)
    assert verdict.correct
    if extracted is not None:
        assert verdict.extracted == extracted


@pytest.mark.parametrize("response", ["", "   ", "I do not know.", "<think>\n12 + 3 = 15, then", "</think>\n"])
def test_nothing_to_read_is_unparsed(response: str) -> None:
    verdict = score(problem("15"), response)
    assert verdict.extracted is None
    assert not verdict.correct


def test_unfinished_thinking_counts_only_when_it_states_an_answer() -> None:
    assert score(problem("15"), "<think>\n12 + 3 = 15").extracted is None
    assert score(problem("15"), "<think>\nSo the answer is 15").correct
    assert score(problem("15"), "12 + 3 = 15").correct


def test_wrong_answers_are_wrong() -> None:
    for response in ("The answer is 283.", "282 is not it. 5", "2.82", "-282", "The answer is 2820."):
        verdict = score(problem("282"), response)
        assert not verdict.correct
        assert verdict.extracted is not None


def test_numbers_compare_by_value() -> None:
    assert same_number("42.0", "42")
    assert same_number("1,000", "1000")
    assert same_number("84/2", "42")
    assert not same_number("x", "x")
    assert not same_number("1/0", "1")


@pytest.mark.parametrize(
    "response",
    [
        "12, 34, 56, 78",
        "The answer is 12, 34, 56, 78.",
        "Sorted: [12, 34, 56, 78]",
        "\\boxed{12, 34, 56, 78}",
        "The sorted list is:\n12, 34, 56 and 78.",
        "1. 12\n2. 34\n3. 56\n4. 78",
        "- 12\n- 34\n- 56\n- 78",
        "12 < 34 < 56 < 78",
        "The answer is 12 34 56 78",
        "The sorted numbers in ascending order are 12,34,56,78",
    ],
)
def test_lists(response: str) -> None:
    assert score(problem("12, 34, 56, 78", "list"), response).correct


def test_lists_in_another_order_or_too_short_are_wrong() -> None:
    gold = problem("12, 34, 56, 78", "list")
    assert not score(gold, "34, 12, 56, 78").correct
    assert not score(gold, "12, 34, 56").correct
    assert score(gold, "I cannot.").extracted is None
    assert same_list("pear, apple", "Pear and apple")
    assert same_list("1, 234, 5", "1,234,5")


@pytest.mark.parametrize(
    "response",
    [
        "The answer is (B).",
        "Answer: B",
        "The correct answer is B) iron",
        "**B**",
        "(B)",
        "B.",
        "\\boxed{B}",
        "\\boxed{\\text{(B)}}",
        "The answer is option B because A is a gas.",
        "The answer is iron.",
        "Out of A, C and D none fits, so I choose (B)",
        "<think>(A)? No.</think>The answer is b",
        "The best choice is B",
    ],
)
def test_choices(response: str) -> None:
    verdict = score(problem("B", "choice", ("gold", "iron", "tin", "zinc")), response)
    assert verdict.extracted == "B"
    assert verdict.correct


def test_choices_that_were_not_made() -> None:
    question = problem("B", "choice", ("gold", "iron", "tin", "zinc"))
    assert score(question, "A metal is what we look for.").extracted is None
    assert score(question, "The answer is (E).").extracted is None
    assert score(question, "The answer is (C)").extracted == "C"


@pytest.mark.parametrize(
    "response",
    [
        "Ann is a knight, Ben is a knave, and Cleo is a knight.",
        "The answer is: Ann is a knight and Ben is a knave, Cleo is a knight.",
        "(1) Ann is a knight\n(2) Ben is a knave\n(3) Cleo is a knight",
        "Ann: knight\nBen: knave\nCleo: knight",
        "Ann and Cleo are knights, but Ben is a knave.",
        "Ann is a knave? No. Ann is a knight. Ben is a liar; Cleo is a truth-teller.",
    ],
)
def test_roles(response: str) -> None:
    gold = problem("Ann is a knight, Ben is a knave, Cleo is a knight", "roles")
    assert score(gold, response).correct


def test_roles_need_everyone() -> None:
    gold = "Ann is a knight, Ben is a knave"
    assert read_roles("Ann is a knight.", gold) is None
    assert read_roles("Both are knaves.", gold) == "Ann is a knave, Ben is a knave"
    assert not score(problem(gold, "roles"), "Ann is a knave, Ben is a knave").correct


@pytest.mark.parametrize(
    "response",
    [
        "The answer is 0110.",
        "Output: 0 1 1 0",
        "It outputs 0110",
        "The output is `0110`.",
        "\\boxed{0110}",
        "0, 1, 1, 0",
    ],
)
def test_texts(response: str) -> None:
    assert score(problem("0110", "text"), response).correct


def test_states_are_texts_too() -> None:
    assert score(problem("S1", "text"), "The answer is state S1.").correct
    assert score(problem("S1", "text"), "It ends in S1").correct
    assert not score(problem("S1", "text"), "It ends in S0").correct
    assert score(problem("S1", "text"), "").extracted is None


@pytest.mark.parametrize(
    ("gold", "response", "right"),
    [
        ("Brasilia", "Answer: Brasília.", True),
        ("Everest", "The answer is Mount Everest (Asia).", True),
        ("Paris", "The answer is Paris or London.", False),
        ("Paris", "The answer is not Paris.", False),
        ("S1", "The answer is S1 then S2.", False),
        ("New York", "The answer is York, New.", False),
    ],
)
def test_texts_with_a_little_around_them(gold: str, response: str, right: bool) -> None:
    assert score(problem(gold, "text"), response).correct == right


@pytest.mark.parametrize(
    ("gold", "response"),
    [
        ("\\frac{1}{2}", "The answer is $\\dfrac{1}{2}$."),
        ("\\frac{1}{2}", "\\boxed{0.5}"),
        ("2\\sqrt{3}", "so it is $\\sqrt{12}$"),
        ("x^2+2x+1", "\\boxed{(x+1)^2}"),
        ("(3, \\frac{\\pi}{2})", "$\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}$"),
        ("[-2,7]", "\\boxed{[-2, 7]}"),
        ("\\text{Evelyn}", "\\boxed{\\text{Evelyn}}"),
    ],
)
def test_mathematics(gold: str, response: str) -> None:
    assert score(problem(gold, "math"), response).correct


def test_wrong_mathematics() -> None:
    assert not score(problem("\\frac{1}{2}", "math"), "\\boxed{\\frac{1}{3}}").correct
    assert score(problem("\\frac{1}{2}", "math"), "no idea").extracted is None


def test_mathematics_works_off_the_main_thread() -> None:
    verdicts: list[bool] = []
    thread = threading.Thread(target=lambda: verdicts.append(same_mathematics("\\frac{3}{4}", "0.75")))
    thread.start()
    thread.join()
    assert verdicts == [True]


def test_an_endless_comparison_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    assert same_mathematics("\\frac{3}{4}", "0.75")
    monkeypatch.setattr("lorascope.tasks.mathematics._SECONDS", 1.0)
    assert not same_mathematics("2", "9^{9^{9^{9}}}+1")
    monkeypatch.setattr("lorascope.tasks.mathematics._SECONDS", 10.0)
    assert same_mathematics("\\frac{3}{4}", "0.75")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234", 1234),
        ("1{,}234,567", 1234567),
        ("10,\\!080", 10080),
        ("\\$32,348.50", 32348.5),
        ("- 0.5", -0.5),
        ("3 / 4", 0.75),
        ("3, 5, 7", None),
        ("-2,1", None),
        ("1, 234", None),
        ("1,2345", None),
        ("3 1/2", None),
        ("42_5", None),
        ("x", None),
    ],
)
def test_only_numbers_are_read_as_numbers(text: str, value: float | None) -> None:
    assert as_fraction(text) == value


def test_stated_answers_and_boxes() -> None:
    assert last_boxed("\\boxed{\\frac{1}{2}} then \\boxed{\\sqrt{2}}") == "\\sqrt{2}"
    assert last_boxed("\\boxed{1} and \\boxed{2") == "1"
    assert last_boxed("nothing") is None
    assert find_stated("The answer to the question is 5.") == "5"
    assert find_stated("No such thing.") is None
