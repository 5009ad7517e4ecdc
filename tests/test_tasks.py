"""Task families: gold answers, splits, and traces that are true except where they are marked."""

import math
import random
import re
from collections import Counter

import pytest

from lorascope import tasks
from lorascope.errors import BadInput
from lorascope.tasks import (
    FAMILIES,
    Problem,
    algebra,
    arithmetic,
    automata,
    catalogue,
    claims,
    knights,
    make_problems,
    ordering,
    score,
    spelling,
    split_of,
    to_trace,
    wording,
)
from lorascope.tasks.catalogue import share_out
from lorascope.tasks.claims import Claim, solutions
from lorascope.tasks.wording import Teller, vary

LEVELS = (1, 2, 3, 4, 5)


def every_family(n: int, seed: int) -> list[Problem]:
    return [p for name in FAMILIES for level in LEVELS for p in make_problems([name], n, seed, level)]


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return every_family(120, seed=5)


def true_text(problem: Problem) -> str:
    """The trace without its marked errors."""
    text = problem.thinking
    for slip in problem.slips:
        text = text.replace(slip.wrong, "", 1)
    return text


def numbers(text: str) -> list[int]:
    return [int(found) for found in re.findall(r"\d+", text)]


def equalities(text: str, unknown: str, value: int) -> list[tuple[str, bool]]:
    """Every equality between calculations in a text, and whether it is true."""
    text = text.replace("×", "*").replace(" x ", " * ") if not unknown else text
    text = re.sub(r"(?<=\d) (?:is|gives|makes|equals|comes to) (?=-?\d)", " = ", text)
    token = rf"(?:\d*{unknown}\b|\d+\b|[()+*/-])" if unknown else r"(?:\d+\b|[()+*/-])"
    side = rf"{token}(?: ?{token})*"
    found: list[tuple[str, bool]] = []
    for match in re.finditer(rf"(?<![\w]){side}(?: = {side})+", text):
        sides = match[0].split(" = ")
        if not any(re.search(r"[+*/]|\d -|[a-z]", s) for s in sides):
            continue
        values = {value_of(s, unknown, value) for s in sides}
        found.append((match[0], len(values) == 1))
    return found


def value_of(side: str, unknown: str, value: int) -> float:
    if unknown:
        side = re.sub(rf"(\d){unknown}\b", rf"\1*{unknown}", side).replace(unknown, f"({value})")
    return eval(re.sub(r"(\d) ?\(", r"\1*(", side))  # digits and operators only, by the pattern above


def test_at_least_the_eight_promised_families_exist() -> None:
    assert {"multiply", "chain", "linear", "letters", "sort", "gcd", "knights", "mealy"} <= set(FAMILIES)
    assert all(family.name == name and family.description for name, family in FAMILIES.items())


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_answer_of_every_trace_verifies_over_thousands_of_seeds(name: str) -> None:
    for level in LEVELS:
        for seed in range(500):
            draft = FAMILIES[name].make(random.Random(f"{name} {level} {seed}"), level)
            problem = Problem("p", name, draft.question, draft.gold, draft.kind, draft.thinking, draft.answer)
            verdict = score(problem, f"<think>\n{draft.thinking}\n</think>\n{draft.answer}")
            assert verdict.correct, (draft.question, draft.answer, draft.gold, verdict)


def test_arithmetic_in_traces_is_true_except_in_marked_errors(problems: list[Problem]) -> None:
    checked = 0
    for problem in problems:
        if problem.family in ("multiply", "chain", "linear", "gcd"):
            unknown = str(problem.meta.get("unknown", ""))
            for said, holds in equalities(true_text(problem), unknown, int(problem.gold)):
                checked += 1
                assert holds, (said, problem.thinking)
    assert checked > 6000


def test_remainders_in_gcd_traces_are_true(problems: list[Problem]) -> None:
    checked = 0
    for problem in problems:
        if problem.family == "gcd":
            for a, b, rest in re.findall(
                r"(\d+) (?:mod|divided by|over) (\d+) (?:=|is|leaves) (\d+)", true_text(problem)
            ):
                checked += 1
                assert int(a) % int(b) == int(rest), problem.thinking
    assert checked > 200


def test_slips_are_wrong_and_corrected_right_after(problems: list[Problem]) -> None:
    slipped = [p for p in problems if p.slips]
    assert 0.1 < len(slipped) / len(problems) < 0.6
    for problem in slipped:
        for slip in problem.slips:
            place = problem.thinking.index(slip.wrong)
            after = problem.thinking[place + len(slip.wrong) :].lstrip()
            assert after.startswith(slip.correction), problem.thinking
            assert slip.wrong != slip.correction
    false = [
        slip
        for problem in slipped
        if problem.family in ("multiply", "linear")
        for slip in problem.slips
        if any(
            not holds for _, holds in equalities(slip.wrong, str(problem.meta.get("unknown", "")), int(problem.gold))
        )
    ]
    assert len(false) > 100


def test_traces_reason_in_many_words(problems: list[Problem]) -> None:
    words = Counter(word for p in problems for word in set(re.findall(r"[a-z]+", p.thinking.lower())))
    for word in ("wait", "hmm", "check", "alternatively", "so", "actually", "suppose", "contradiction", "back"):
        assert words[word] >= 5, word
    for name in FAMILIES:
        starts = Counter(p.thinking[:9] for p in problems if p.family == name)
        assert max(starts.values()) < 0.15 * starts.total(), (name, starts.most_common(3))


def test_every_step_has_at_least_five_wordings() -> None:
    banks = [
        (module.__name__, name, bank)
        for module in (algebra, arithmetic, automata, knights, ordering, spelling, wording)
        for name, bank in vars(module).items()
        if isinstance(bank, tuple) and bank and all(isinstance(t, str) for t in bank) and any(" " in t for t in bank)
    ] + [("claims", kind, bank) for kind, bank in claims._WORDINGS.items()]
    assert len(banks) > 30
    assert not [(module, name) for module, name, bank in banks if len(bank) < 5]


# -- gold answers, each computed another way ----------------------------------------------------------------------


def test_gold_answers_of_sums_products_and_divisors(problems: list[Problem]) -> None:
    for p in problems:
        if p.family == "multiply":
            assert math.prod(numbers(p.question)) == int(p.gold)
        elif p.family == "gcd":
            assert math.gcd(*numbers(p.question)) == int(p.gold)
        elif p.family == "chain" and p.difficulty == 1:
            assert sum(numbers(p.question)) == int(p.gold)
        elif p.family == "chain":
            task = re.search(r"\d+(?: [+-] \d+)+", p.question)
            assert task is not None
            assert eval(task[0]) == int(p.gold)


def test_gold_answers_of_equations_solve_them(problems: list[Problem]) -> None:
    for p in problems:
        if p.family == "linear":
            stated = equalities(p.question, str(p.meta["unknown"]), int(p.gold))
            assert [holds for _, holds in stated] == [True], (p.question, p.gold)


def test_gold_answers_of_letters_sorting_and_machines(problems: list[Problem]) -> None:
    for p in problems:
        if p.family == "letters":
            assert sum(c == p.meta["letter"] for c in str(p.meta["word"])) == int(p.gold)
        elif p.family == "sort":
            given, gold = numbers(p.question), numbers(p.gold)
            assert sorted(given) == sorted(gold)
            assert gold in (sorted(gold), sorted(gold, reverse=True))
            down = re.search(r"descending|from (?:largest|highest|biggest)", p.question) is not None
            assert (gold[0] > gold[-1]) == down
        elif p.family == "mealy" and (rules := re.findall(r"\((\w+), (\w)\) -> \((\w+), (\w)\)", p.question)):
            table = {(s, i): (t, o) for s, i, t, o in rules}
            state, written = rules[0][0], ""
            word = re.findall(rf"\b[{''.join({i for _, i in table})}]{{3,}}\b", p.question)[0]
            for symbol in word:
                state, output = table[state, symbol]
                written += output
            assert p.gold in (state, written)


def test_spelled_letters_are_the_word_except_in_marked_errors(problems: list[Problem]) -> None:
    checked = 0
    for p in problems:
        if p.family == "letters":
            spelled = re.sub(r" \(\d+\)", "", true_text(p))
            for run in re.findall(r"(?<![\w'])[a-z](?:(?:, |-| )[a-z]\b){3,}", spelled):
                checked += 1
                assert "".join(re.findall("[a-z]", run)) in str(p.meta["word"]).split(), p.thinking
    assert checked > 500


def test_machine_steps_are_rows_of_the_table_except_in_marked_errors(problems: list[Problem]) -> None:
    checked = 0
    for p in problems:
        if p.family == "mealy" and (rules := re.findall(r"\((\w+), (\w)\) -> \((\w+), (\w)\)", p.question)):
            for step in re.findall(r"\((\w+), (\w)\) (?:gives|is|->) \((\w+), (\w)\)", true_text(p)):
                checked += 1
                assert step in rules, p.thinking
    assert checked > 50


def test_knights_and_knaves_solutions_are_the_known_ones() -> None:
    ann_says_ben_lies, ben_says_same = Claim("is", (1,), (False,)), Claim("same", (0, 1))
    assert solutions([ann_says_ben_lies, ben_says_same]) == [(True, False)]
    liar = Claim("and", (0, 1), (False, False))  # "we are both knaves": only a knave beside a knight says it
    assert solutions([liar, Claim("is", (0,), (False,))]) == [(False, True)]
    assert solutions([Claim("is", (1,), (True,)), Claim("is", (0,), (True,))]) == [(True, True), (False, False)]
    assert Claim("if", (0, 1), (True, False)).outcomes({0: True}) == {True, False}
    assert Claim("or", (0, 1), (True, True)).outcomes({0: True}) == {True}
    assert Claim("differ", (0, 1)).outcomes({0: True, 1: True}) == {False}


def test_knights_traces_meet_contradictions_and_go_back(problems: list[Problem]) -> None:
    told = [p.thinking for p in problems if p.family == "knights"]
    back = [
        text for text in told if re.search(r"ontradiction|mpossible|cannot|[Tt]hat fails|So no|does not work", text)
    ]
    assert len(back) > 0.3 * len(told)
    assert all(p.kind == "roles" for p in problems if p.family == "knights")


# -- making problems ----------------------------------------------------------------------------------------------


def test_the_same_call_gives_the_same_problems_and_another_seed_others() -> None:
    first = make_problems(["multiply", "knights"], 60, seed=4)
    assert first == make_problems(["multiply", "knights"], 60, seed=4)
    assert {p.id for p in first} != {p.id for p in make_problems(["multiply", "knights"], 60, seed=5)}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_training_and_heldout_never_overlap(name: str) -> None:
    train = [p for seed in (0, 1) for p in make_problems([name], 3000, seed, 1)]
    heldout = [p for seed in (0, 2) for p in make_problems([name], 500, seed, 1, split="heldout")]
    assert not {p.group for p in train} & {p.group for p in heldout}
    assert not {p.question for p in train} & {p.question for p in heldout}
    assert not {p.id for p in train} & {p.id for p in heldout}
    assert {split_of(p) for p in train} == {"train"}
    assert {split_of(p) for p in heldout} == {"heldout"}
    assert len({p.key for p in train[:3000]}) == 3000


def test_a_sum_or_product_in_another_order_is_on_the_same_side() -> None:
    for p in make_problems(["multiply", "chain"], 400, 3, (1, 2)):
        if p.family == "multiply":
            a, b = numbers(p.question)
            assert p.group == f"{min(a, b)}*{max(a, b)}"
        else:
            assert numbers(p.group) == sorted(numbers(p.group)) or "-" in p.group


def test_weights_share_out_exactly() -> None:
    counts = Counter(p.family for p in make_problems({"multiply": 2, "sort": 1, "gcd": 1}, 41, 0))
    assert counts.total() == 41
    assert counts["multiply"] in (20, 21)
    assert share_out({"a": 1, "b": 1, "c": 1}, 4) == {"a": 2, "b": 1, "c": 1}
    assert share_out({"a": 0, "b": 1}, 3) == {"a": 0, "b": 3}


def test_excluded_problems_are_not_given_again() -> None:
    first = make_problems(["gcd"], 50, 0)
    more = make_problems(["gcd"], 50, 0, exclude={p.id for p in first})
    assert not {p.id for p in first} & {p.id for p in more}


def test_difficulty_is_a_dial() -> None:
    assert {p.difficulty for p in make_problems(["sort"], 20, 0)} == {1}
    assert {p.difficulty for p in make_problems(["sort"], 60, 0, (1, 3))} == {1, 3}
    for name in FAMILIES:
        easy, hard = (
            sum(len(p.thinking) for p in make_problems([name], 40, 0, level)) for level in (LEVELS[0], LEVELS[-1])
        )
        assert hard > 1.5 * easy, name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((["multply"], 3, 0), "no task family 'multply'; choose from multiply, chain"),
        (([], 3, 0), "at least one"),
        (({"gcd": -1}, 3, 0), "not negative"),
        ((["gcd"], -1, 0), "not -1"),
        ((["gcd"], 3, 0, 6), "from 1 to 5, not 6"),
        ((["gcd"], 3, 0, ()), "from 1 to 5"),
        ((["gcd"], 3, 0, 1, "test"), "train or heldout"),
    ],
)
def test_bad_requests_say_what_to_do(arguments: tuple[object, ...], said: str) -> None:
    with pytest.raises(BadInput, match=re.escape(said)):
        make_problems(*arguments)  # type: ignore[arg-type]


def test_an_exhausted_family_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "_PATIENCE", 5)
    with pytest.raises(BadInput, match="gcd has too few different problems at this difficulty for 9000"):
        make_problems(["gcd"], 9000, 0, 1)


def test_a_problem_becomes_a_trace() -> None:
    problem = make_problems(["letters"], 1, 0)[0]
    trace = to_trace(problem)
    assert (trace.id, trace.question, trace.thinking) == (problem.id, problem.question, problem.thinking)
    assert (trace.answer, trace.gold, trace.family) == (problem.answer, problem.gold, "letters")


# -- wordings -----------------------------------------------------------------------------------------------------


def test_templates_choose_and_fill_in() -> None:
    said = {vary(random.Random(i), "[a|b[1|2]] {n}", {"n": "[x|y]"}) for i in range(60)}
    assert said == {"a [x|y]", "b1 [x|y]", "b2 [x|y]"}
    assert vary(random.Random(0), "so it is", start="upper") == "So it is"
    assert vary(random.Random(0), "That is x", start="lower") == "that is x"
    assert vary(random.Random(0), "x = 5", start="upper") == "x = 5"
    assert vary(random.Random(0), "{w} is", {"w": "rrg"}, "upper") == "rrg is"
    assert vary(random.Random(0), "I get", start="lower") == "I get"


def test_a_teller_marks_its_slips() -> None:
    always = Teller(random.Random(0), slip_chance=1.0, doubt_chance=0.0)
    assert always.step("{n}.", {"n": 4}, {"n": 5})
    assert always.slips[0].wrong == "5."
    assert always.slips[0].correction.endswith("4.")
    assert not always.step("{n}.", {"n": 4}, {"n": 4})
    assert tasks.Slip is type(always.slips[0])
