"""Sorting a few numbers by picking the next one again and again."""

from __future__ import annotations

import random
from collections.abc import Sequence

from lorascope.tasks.problem import Draft
from lorascope.tasks.wording import CHECK, FIRST, FITS, LEAD, Teller, vary

# (how many numbers, the largest)
_SIZES = {1: (4, 99), 2: (5, 99), 3: (7, 500), 4: (9, 999), 5: (12, 9999)}

_ASK = (
    "Sort [the numbers |these numbers: |]{given} [in {order} order|from {low} to {high}].",
    "[Put|Arrange|Order] [the numbers |]{given} [in {order} order|from {low} to {high}].",
    "What is {given} in {order} order?",
    "[Can|Could] you sort {given} from {low} to {high}?",
    "{given}: [sort|order] [them|these] from {low} to {high}.",
    "[Write|List|Give me] [the numbers |]{given} in {order} order.",
)
_FIRST_PICK = (
    FIRST + "the {first} is {x}.",
    "[I look for the {first}|The {first} first|The {first} of all]: {x}.",
    "{x} is the {first}.",
    "[Start with|Begin with|I start with] {x}.",
    "[First|At the front|In front] [comes|goes] {x}.",
    "[First|1st]: {x}.",
)
_PICK = (
    "[Then|Next|After that] {x}.",
    LEAD + "[next is|next comes] {x}.",
    "{x} [follows|is next|comes next].",
    "[Of the rest|Of what is left], {x}.",
    "[After {y}|Following {y}][:|, it is|] {x}.",
    "[And|And then] {x}.",
)
_LAST_PICK = (
    "[Last|Finally|At the end|In the end][:|,] {x}.",
    "[That leaves|Only] {x}[.| at the end.]",
    "{x} [is last|remains|closes it].",
    "[The last|The rest] is {x}.",
    "[And|Then] {x}[, done|].",
)
_MISSED = (
    "[Wait|Hmm|Hold on|Actually], I [forgot|missed|skipped|left out] {x}. [So |It is ]{listed}.",
    "[Hmm|Wait], that is only {n}[ numbers|]: {x} is missing. [So |It goes ]{listed}.",
    "[Let me check|Counting]: {n} [of|out of] {all}. [Wait, |Oh, ]{x} is missing. {listed}.",
    "[Oops|No|Wait], where is {x}? [Going back|I go back]: {listed}.",
    "[Actually|Wait|Hmm], {x} [belongs in|comes in] before {next}. [So |]{listed}.",
)
_SAY = (
    "[The|So the|My|The final] answer is {gold}.",
    "[The|So the] [sorted list|order|sorted order] is {gold}.",
    "[Answer|Final answer|Sorted]: {gold}",
    "[So|Sorted, it is|That gives|In order]: {gold}.",
    "[The|So the] answer is \\boxed{{{gold}}}.",
    "{gold}",
)


def make_sort(rng: random.Random, difficulty: int) -> Draft:
    """Different numbers to put in ascending or descending order."""
    count, largest = _SIZES[difficulty]
    given = rng.sample(range(1, largest + 1), count)
    down = rng.random() < 0.4
    ordered = sorted(given, reverse=down)
    teller = Teller(rng, slip_chance=0.06)
    words = {"order": "descending", "low": rng.choice(("largest", "highest", "biggest"))}
    words["high"] = {"largest": "smallest", "highest": "lowest", "biggest": "smallest"}[words["low"]]
    if not down:
        words = {"order": rng.choice(("ascending", "increasing")), "low": words["high"], "high": words["low"]}
    _tell(teller, ordered, words["low"])
    return Draft(
        question=vary(rng, _ASK, {"given": _listed(given), **words}),
        gold=_listed(ordered),
        key=f"sort {'down' if down else 'up'} {_listed(given)}",
        group=f"sort {_listed(sorted(given))}",
        thinking=teller.text(),
        answer=_say(rng, _listed(ordered)),
        kind="list",
        slips=tuple(teller.slips),
    )


def _say(rng: random.Random, gold: str) -> str:
    return vary(rng, _SAY, {"gold": gold}, "upper")


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in numbers)


def _tell(teller: Teller, ordered: Sequence[int], first: str) -> None:
    """Picks told one by one, or the whole order at once with a number forgotten and put in."""
    rng = teller.rng
    if teller.chance(0.07):
        missing = rng.randrange(len(ordered) - 1)
        shorter = [*ordered[:missing], *ordered[missing + 1 :]]
        teller.say(
            (
                FIRST + "[it goes|I get|the order is|it is] {listed}.",
                "[Sorted|In order|Order]: {listed}.",
                "{listed}.",
                "[They go|The numbers go] {listed}.",
                "[I see|I read] {listed}.",
            ),
            listed=_listed(shorter),
        )
        teller.notice(
            _MISSED,
            x=ordered[missing],
            next=ordered[missing + 1],
            n=len(shorter),
            all=len(ordered),
            listed=_listed(ordered),
        )
        return
    for index, number in enumerate(ordered[:-1]):
        values = {"x": number, "y": ordered[index - 1], "first": first}
        wrong = {**values, "x": ordered[index + 1]}
        again = (
            "{x} [comes before|is before|goes first, then] " + str(ordered[index + 1]) + ".",
            "[first |]{x}.",
            "[it is|that should be|it has to be] {x}.",
            "[before that|there is still|I skipped] {x}.",
            "{x} is [ahead|next|first].",
        )
        teller.step(_PICK if index else _FIRST_PICK, values, wrong, again)
    teller.say(_LAST_PICK, x=ordered[-1])
    if teller.chance(0.12):
        teller.say(
            (
                CHECK + "[that is|I have] {n} numbers, {n} were given. " + FITS,
                CHECK + "{n} in, {n} out. " + FITS,
                "[All|That is all] {n}[ of them|]. " + FITS,
                "[Hmm|Wait], all {n}? [Yes|Yes, all there].",
                "[Is any missing|Did I miss any|Any left]? [No|None], [all {n} are there|{n} of {n}].",
            ),
            n=len(ordered),
        )
