"""Multiplication by parts, chained sums and gcd by Euclid, told step by step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import gcd

from lorascope.tasks.problem import Draft
from lorascope.tasks.wording import CHECK, EQUALS, FIRST, FITS, LEAD, Teller, near_miss, say_answer, vary

ASK_VALUE = (
    "[Compute|Calculate|Work out|Find|Evaluate|Tell me] {task}[.|]",
    "What is {task}[?|]",
    "[Can|Could] you [compute|work out|calculate] {task}?",
    "Please [compute|work out|calculate|find] {task}.",
    "{task} = ?",
    "How much is {task}?",
    "What do you get for {task}?",
    "[I need|Give me] the [value|result] of {task}.",
)

EQUATION = (
    LEAD + "{left} " + EQUALS + " {right}.",
    "{left} = {right}.",
    LEAD + "{left} [equals|comes to] {right}.",
    "[For|From] {left} I get {right}.",
    "[Now|Next][:|,] {left} = {right}.",
)
OPENING_EQUATION = (
    FIRST + "{left} " + EQUALS + " {right}.",
    "{left} = {right}.",
    "[Start with|Take|I take|I begin with] {left}[:|, that is|, which is] {right}.",
    "[First|To start], {left} = {right}.",
    "[Let me do|I do] {left} first: {right}.",
)
SUM_EQUATION = (
    "[So |Now |Then |Together |Adding up, |In total, |]{left} " + EQUALS + " {right}.",
    "[Add|Adding|Sum|I add]: {left} = {right}.",
    "[Add them|I add them|Put together]: {left} = {right}.",
    "{left} = {right}.",
    "[The sum is|That gives|All together:] {left} = {right}.",
)


def _place_values(number: int) -> list[int]:
    """The non-zero parts by place: 407 -> [400, 7]."""
    digits = str(number)
    return [int(d) * 10 ** (len(digits) - 1 - i) for i, d in enumerate(digits) if d != "0"]


def _draw_easy_factors(rng: random.Random) -> tuple[int, int]:
    """Mostly two parts: two digits, or three with a zero, times one digit or a round number."""
    digit, form = rng.randint(2, 9), rng.random()
    if form < 0.7:
        return rng.randint(11, 99), digit * (1 if form < 0.57 else 10 if form < 0.67 else 100)
    if form < 0.97:
        gap = rng.choice((1, 10))
        return 100 * rng.randint(1, 9) + gap * rng.randint(1, 9), digit * (1 if form < 0.88 else 10)
    return rng.randint(101, 999), rng.randint(2, 5)


def _draw_factors(rng: random.Random, difficulty: int) -> tuple[int, int]:
    match difficulty:
        case 1:
            return _draw_easy_factors(rng)
        case 2:
            return rng.randint(101, 999), rng.randint(2, 9)
        case 3:
            return rng.randint(11, 99), rng.randint(11, 99)
        case 4:
            return rng.randint(101, 999), rng.randint(11, 99)
        case _:
            return rng.randint(101, 999), rng.randint(101, 999)


def make_multiply(rng: random.Random, difficulty: int) -> Draft:
    """a times b by the parts of both factors; sometimes checked another way."""
    a, b = _draw_factors(rng, difficulty)
    sign = rng.choice("***×x")
    shown = [a, b] if rng.random() < 0.8 else [b, a]
    task = f"{shown[0]} {sign} {shown[1]}" if rng.random() < 0.85 else f"{shown[0]} times {shown[1]}"
    teller = Teller(rng)
    parts = [(p, q) for q in _place_values(b) for p in _place_values(a)]
    if len(parts) > 1 and teller.chance(0.22):
        split = " + ".join(str(p) for p in _place_values(a))
        teller.say(
            (
                "[I split|Split|Let me split|Break up|I break up|Take] {a} [as|into|as the sum] {split}.",
                "{a} [=|is] {split}[, so by parts|].",
                "[By parts|In parts|Piece by piece|Let me do this in parts|Part by part].",
                "[Use|I use] {a} = {split}.",
                "[I take|Let me take] {split} [for|in place of] {a}.",
            ),
            a=a,
            split=split,
        )
    _tell_products(teller, parts, sign)
    if len(parts) == 1 and teller.chance(0.3):
        teller.say("[That is all|Only one part|Nothing to add].")
    if teller.chance(0.12):
        teller.say(
            (
                CHECK + "{left} = {a}. " + FITS,
                "[Alternatively|The other way], {left} = {a}. " + FITS,
                "[And|Since] {left} [is|gives] {a}[, good|, so it fits|, as it should].",
                CHECK + "[is|does] {left} [equal to|the same as] {a}? " + FITS,
                "[Going back|Backwards]: {left} = {a}. " + FITS,
            ),
            left=f"{a * b} / {b}",
            a=a,
        )
    own = (f"{task} = {{gold}}.", f"{task} [is|equals|makes] {{gold}}.")
    return Draft(
        question=vary(rng, ASK_VALUE, {"task": task}),
        gold=str(a * b),
        key=f"{min(a, b)}*{max(a, b)}",
        thinking=teller.text(),
        answer=say_answer(rng, a * b, own),
        slips=tuple(teller.slips),
    )


def _tell_products(teller: Teller, parts: Sequence[tuple[int, int]], sign: str) -> None:
    """Every product of two parts, and their sum: added at once or at the end."""
    rng = teller.rng
    at_once = len(parts) > 2 and teller.chance(0.5)
    total = 0
    products: list[int] = []
    for index, (p, q) in enumerate(parts):
        left, right = f"{p} {sign} {q}", p * q
        templates = EQUATION if index else OPENING_EQUATION
        wrong = _misproduct(rng, p, q)
        teller.step(templates, {"left": left, "right": right}, {"left": left, "right": wrong})
        products.append(right)
        if at_once and index:
            _tell_sum(teller, total, right)
        total += right
    if not at_once:
        forgotten = products.pop() if len(products) > 1 and teller.chance(0.05) else None
        total = products[0]
        for product in products[1:]:
            _tell_sum(teller, total, product)
            total += product
        if forgotten is not None:
            teller.step(_TOTALS, {"total": total})
            _tell_forgotten(teller, total, forgotten)


def _misproduct(rng: random.Random, p: int, q: int) -> int:
    """A wrong product: a neighbour in the table of the leading digit, or a lost zero."""
    wrongs = [p * q + q, p * q - q, p * q + 2, p * q - 1, p * q * 10]
    if (p * q) % 10 == 0:
        wrongs.append(p * q // 10)
    return rng.choice([wrong for wrong in wrongs if 0 < wrong != p * q])


def _tell_sum(teller: Teller, a: int, b: int) -> None:
    left = f"{a} + {b}"
    teller.step(SUM_EQUATION, {"left": left, "right": a + b}, {"left": left, "right": near_miss(teller.rng, a + b)})


_TOTALS = (
    "[So it is|So|That is|It comes to|That makes] {total}.",
    "[The result|The product] is {total}.",
    "[Done|Finished], {total}.",
    "{total} [it is|in all|in total].",
    "[I get|We get|I have] {total}.",
)

# (count of numbers, digits of each, whether some are subtracted)
_CHAINS = {1: (3, 2, False), 2: (4, 2, True), 3: (5, 2, True), 4: (6, 3, True), 5: (8, 3, True)}


def make_chain(rng: random.Random, difficulty: int) -> Draft:
    """A sum of several numbers by running totals, never below zero."""
    count, digits, signed = _CHAINS[difficulty]
    low, high = 10 ** (digits - 1), 10**digits - 1
    terms = [rng.randint(low, high)]
    while len(terms) < count:
        term = rng.randint(low, high)
        terms.append(-term if signed and rng.random() < 0.4 and sum(terms) > term else term)
    task = _as_sum(terms)
    teller = Teller(rng)
    _tell_plan(teller, terms)
    forgotten = rng.randrange(1, len(terms) - 1) if min(terms) > 0 and teller.chance(0.06) else None
    total = terms[0]
    for index, term in enumerate(terms[1:], start=1):
        if index != forgotten:
            _tell_addition(teller, total, term, total == terms[0])
            total += term
    if forgotten is not None:
        _tell_forgotten(teller, total, terms[forgotten])
        total += terms[forgotten]
    if teller.chance(0.2):
        _check_backwards(teller, total, terms[-1])
    if signed or rng.random() < 0.8:
        question = vary(rng, ASK_VALUE, {"task": task})
    else:
        listed = ", ".join(str(t) for t in terms[:-1]) + f" and {terms[-1]}"
        question = vary(
            rng,
            (
                "[Find|Give me|Compute] the [sum|total] of {listed}.",
                "What is the [sum|total] of {listed}?",
                "[Add|Sum|Add up|Add together] {listed}.",
                "[Can|Could] you add {listed}?",
                "What do {listed} [make|come to|add up to] [together|in total|]?",
                "[How much|What] is {listed} [added together|in all]?",
            ),
            {"listed": listed},
        )
    return Draft(
        question=question,
        gold=str(total),
        key="chain " + " ".join(str(t) for t in sorted(terms)),
        thinking=teller.text(),
        answer=say_answer(rng, total, (f"{task} = {{gold}}.", "[The sum|The total|In total it] is {gold}.")),
        slips=tuple(teller.slips),
    )


def _as_sum(terms: Sequence[int]) -> str:
    return str(terms[0]) + "".join(f" {'-' if t < 0 else '+'} {abs(t)}" for t in terms[1:])


def _tell_plan(teller: Teller, terms: Sequence[int]) -> None:
    if teller.chance(0.25):
        teller.say(
            (
                "[I add|Let me add|I will add] [them|these] [one by one|from left to right|step by step].",
                "[From left to right|One at a time|Step by step|In order].",
                "[There are|I have|I see] {n} numbers.",
                "[Start with|I start from|Begin at] {first}.",
                "[Keep a running total|I keep a running total].",
            ),
            n=len(terms),
            first=terms[0],
        )


def _tell_forgotten(teller: Teller, total: int, part: int) -> None:
    """A part that was left out is noticed at the end and added."""
    teller.notice(
        (
            "[Wait|Hmm|Hold on|Oops|Actually], I [forgot|left out|missed|skipped] {part}. {left} = {right}.",
            "[Let me check|Let me look again]: [what about|where is] {part}? [So|I missed it:] {left} = {right}.",
            "[Hmm|Wait|Hold on], {part} is [missing|not in it] yet: {left} = {right}.",
            "[Actually|Wait], {part} [is still to be added|was left out]. [So |Going back: ]{left} = {right}.",
            "[Is that all|Did I take all]? [No|Wait, no], {part} is left: {left} = {right}.",
        ),
        part=part,
        left=f"{total} + {part}",
        right=total + part,
    )


def _tell_addition(teller: Teller, total: int, term: int, opening: bool) -> None:
    """One running total; a sum may go through the tens."""
    result = total + term
    left = _as_sum([total, term])
    tens, ones = term - term % 10 if term > 0 else 0, term % 10 if term > 0 else 0
    if tens and ones and tens < 100 and teller.chance(0.3):
        middle = total + tens
        values = {"total": total, "tens": tens, "ones": ones, "middle": middle}
        teller.step(
            (
                LEAD + "{total} + {tens} = {middle}, [plus {ones} is|{ones} more is|then {ones}:] {right}.",
                "{total} + {tens} [is|=] {middle}[.|,] {middle} + {ones} = {right}.",
                "[Tens first|By tens]: {total} + {tens} = {middle}, {middle} + {ones} = {right}.",
                LEAD + "{total} + {tens} = {middle} and {middle} + {ones} = {right}.",
                "[Add|Adding] {tens} to {total}: {middle}. [Add {ones}|Plus {ones}|And {ones}]: {right}.",
            ),
            {**values, "right": result},
            {**values, "right": near_miss(teller.rng, result)},
            again=f"{left} = {{right}}.",
        )
        return
    templates = OPENING_EQUATION if opening else (*EQUATION, *SUM_EQUATION[:1])
    wrong = near_miss(teller.rng, result)
    teller.step(templates, {"left": left, "right": result}, {"left": left, "right": wrong})


def _check_backwards(teller: Teller, total: int, last: int) -> None:
    teller.say(
        (
            CHECK + "{left} = {right}. " + FITS,
            "[Going back|Backwards|The other way]: {left} = {right}. " + FITS,
            "[And|Indeed] {left} [is|gives] {right}[, good|, as before|, so it fits].",
            "[Alternatively|To check], {left} [is|gives] {right} again. " + FITS,
            "[Hmm|Wait], {left} = {right}? " + FITS,
        ),
        left=_as_sum([total, -last]),
        right=total - last,
    )


# (largest common divisor, largest cofactor, fewest and most steps of Euclid)
_GCDS = {1: (25, 30, 1, 3), 2: (40, 40, 2, 4), 3: (60, 60, 3, 5), 4: (90, 120, 4, 7), 5: (200, 400, 5, 9)}


def _euclid(a: int, b: int) -> list[tuple[int, int, int, int]]:
    """The steps (a, quotient, b, remainder) down to remainder 0."""
    steps: list[tuple[int, int, int, int]] = []
    while b:
        steps.append((a, a // b, b, a % b))
        a, b = b, a % b
    return steps


def make_gcd(rng: random.Random, difficulty: int) -> Draft:
    """The greatest common divisor of two numbers by Euclid's remainders."""
    largest, cofactor, fewest, most = _GCDS[difficulty]
    while True:
        g, p, q = rng.randint(1, largest), rng.randint(2, cofactor), rng.randint(2, cofactor)
        a, b = g * max(p, q), g * min(p, q)
        if gcd(p, q) == 1 and a > b and fewest <= len(_euclid(a, b)) <= most:
            break
    teller = Teller(rng)
    if teller.chance(0.2):
        teller.say(
            (
                "[Use|I use|Let me use|Apply] [Euclid|remainders|the Euclidean algorithm].",
                "[By Euclid|With Euclid|Euclid it is].",
                "[I divide|Divide] and [keep|look at] the remainder.",
                "[Let me|I will] divide [again and again|until nothing is left].",
                "[Remainders will do|Take remainders].",
            )
        )
    for x, times, y, rest in _euclid(a, b):
        _tell_remainder(teller, x, times, y, rest)
    if g > 1 and teller.chance(0.2):
        teller.say(
            (
                CHECK + "{a} / {g} = {p}[ and|,] {b} / {g} = {q}. " + FITS,
                CHECK + "{g} * {p} = {a}[ and|,] {g} * {q} = {b}. " + FITS,
                "[Indeed|And] {a} / {g} = {p}, {b} / {g} = {q}[, good|].",
                "[Does {g} divide both|Hmm, does {g} divide both]? {a} / {g} = {p}, {b} / {g} = {q}. " + FITS,
                "[Alternatively|To check], {g} * {p} = {a}, {g} * {q} = {b}. " + FITS,
            ),
            a=a,
            b=b,
            g=g,
            p=a // g,
            q=b // g,
        )
    first, second = (a, b) if rng.random() < 0.6 else (b, a)
    question = vary(
        rng,
        (
            "[Find|Compute] the [greatest common divisor|gcd|greatest common factor] of {a} and {b}.",
            "What is the [greatest common divisor|gcd|greatest common factor] of {a} and {b}?",
            "[What is|Compute|Find|Evaluate] gcd({a}, {b})[?|]",
            "gcd({a}, {b}) = ?",
            "[Which|What] is the largest number that divides [both|] {a} and {b}?",
            "[I need|Give me|Tell me] the [gcd|greatest common divisor] of {a} and {b}.",
            "What is the biggest number dividing both {a} and {b}?",
        ),
        {"a": first, "b": second},
    )
    own = (f"gcd({first}, {second}) = {{gold}}.", "[The gcd|The greatest common divisor] is {gold}.")
    return Draft(
        question=question,
        gold=str(g),
        key=f"gcd {a} {b}",
        thinking=teller.text(),
        answer=say_answer(rng, g, own),
        slips=tuple(teller.slips),
    )


def _tell_remainder(teller: Teller, x: int, times: int, y: int, rest: int) -> None:
    values = {"x": x, "y": y, "times": times, "prod": times * y, "rest": rest}
    wrong = {**values, "rest": near_miss(teller.rng, rest)}
    if rest == 0:
        teller.step(
            (
                LEAD + "{x} = {times} * {y}[, nothing left|, no rest|, so {y}|, so stop].",
                LEAD + "{x} mod {y} [=|is] 0[, so {y}|, done|].",
                "{y} [divides|goes into] {x}[ {times} times|].",
                LEAD + "{x} / {y} = {times}[ with no rest|, even|].",
                "[So|Now] {y} * {times} = {x}[, the rest is 0|, rest 0].",
            ),
            values,
        )
        return
    teller.step(
        (
            LEAD + "{x} = {times} * {y} + {rest}.",
            LEAD + "{x} mod {y} [=|is] {rest}.",
            LEAD + "{x} - {prod} = {rest}.",
            "{x} [divided by|over] {y} leaves {rest}.",
            "[The rest|The remainder] of {x} by {y}[ is|:] {rest}.",
        ),
        values,
        wrong,
    )
