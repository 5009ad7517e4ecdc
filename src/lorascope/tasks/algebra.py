"""Linear equations solved step by step and checked by putting the solution in."""

from __future__ import annotations

import random

from lorascope.tasks.problem import Draft
from lorascope.tasks.wording import CHECK, FITS, LEAD, Teller, near_miss, say_answer, vary

_BY_LEFT_OPERATION = (
    "[Subtract|Take|I subtract|I take] {b} [from both sides|on both sides|from each side|away]: {next}.",
    LEAD + "[minus|less] {b} [on both sides|each side]: {next}.",
    "[Move|I move|Bring] {b} [over|across|to the right]: {next}.",
    LEAD + "{next}, [after subtracting|taking away|without] {b}.",
    "[Get rid of|Remove|Drop] {b}: {next}.",
)
_BY_ADDING = (
    "[Add|I add|Adding|Put] {b} [to both sides|on both sides|to each side]: {next}.",
    LEAD + "plus {b} [on both sides|each side]: {next}.",
    "[Move|I move|Bring] {b} [over|across|to the right]: {next}.",
    LEAD + "{next}, after adding {b}.",
    "[Get rid of|Remove|Undo] the {b}: {next}.",
)
_BY_DIVIDING = (
    "[So|Then|Now|Next] {v} = {c} / {a} = {x}.",
    "{v} = {c} / {a} = {x}.",
    "[Divide|I divide|Dividing] by {a}: {v} = {x}.",
    LEAD + "{c} / {a} = {x}[.|, so {v} = {x}.]",
    LEAD + "{a} * {x} = {c}, so {v} = {x}.",
    "[Over|Through] {a}: {v} = {x}.",
)
_BY_CHECKING = (
    CHECK + "{left} = {right}. " + FITS,
    "[Put|Putting|Plug] {x} [in|back]: {left} = {right}. " + FITS,
    "[With|For] {v} = {x}, {left} = {right}[, good|, as it should|, so it works].",
    "[Hmm|Wait], does {x} work? {left} = {right}. " + FITS,
    "[Indeed|And] {left} = {right}. " + FITS,
)
_ASK = (
    "[Solve|Solve for {v}:|Find {v}:|Work out {v}:|What is {v} in] {equation}[.|]",
    "[If|Given that|Suppose] {equation}, what is {v}?",
    "{equation}. [What is|Find|Solve for|Give me] {v}[.|?]",
    "[For which {v} is|What {v} makes] {equation}[?| true?]",
    "[I need|Find|Tell me] the {v} [with|such that|for which] {equation}.",
    "{equation}, {v} = ?",
)


def _signed(value: int) -> str:
    return f"- {-value}" if value < 0 else f"+ {value}"


def _term(factor: int, unknown: str) -> str:
    """7 -> 7x, 1 -> x."""
    return unknown if factor == 1 else f"{factor}{unknown}"


def make_linear(rng: random.Random, difficulty: int) -> Draft:
    """ax + b = c (1, 2), ax + b = cx + d (3), a(x + b) + c = d (4), a(x + b) = cx + d (5)."""
    v = rng.choice("xxxxyntzkm")
    teller = Teller(rng)
    if difficulty <= 2:
        equation, key, x = _one_sided(teller, v, difficulty)
    elif difficulty == 4:
        equation, key, x = _bracketed(teller, v)
    else:
        equation, key, x = _two_sided(teller, v, bracket=difficulty == 5)
    return Draft(
        question=vary(rng, _ASK, {"equation": equation, "v": v}),
        gold=str(x),
        key=key,
        thinking=teller.text(),
        answer=say_answer(rng, x, (f"{v} = {{gold}}.", f"[So|Therefore|Thus] {v} = {{gold}}.")),
        slips=tuple(teller.slips),
        meta={"unknown": v},
    )


def _one_sided(teller: Teller, v: str, difficulty: int) -> tuple[str, str, int]:
    rng = teller.rng
    reach = 1 if difficulty == 1 else 3
    a, b, x = rng.randint(2, 9 * reach), rng.randint(1, 30 * reach), rng.randint(1, 12 * reach)
    if rng.random() < 0.4:
        b = -b
    c = a * x + b
    left = f"{a}{v} {_signed(b)}"
    if b > 0 and rng.random() < 0.2:
        left = f"{b} + {a}{v}"
    equation = f"{c} = {left}" if rng.random() < 0.15 else f"{left} = {c}"
    _tell_isolate(teller, v, a, b, c)
    _tell_divide(teller, v, a, c - b)
    if teller.chance(0.25):
        _tell_check(teller, v, x, f"{a} * {x} {_signed(b)}", c)
    return equation, f"linear {a} {b} {c}", x


def _tell_isolate(teller: Teller, v: str, a: int, b: int, c: int) -> None:
    """From av + b = c to av = c - b."""
    operation = _BY_LEFT_OPERATION if b > 0 else _BY_ADDING
    result = c - b
    longer = f"{_term(a, v)} = {c} {_signed(-b)} = "
    short = f"{_term(a, v)} = "
    said = longer if teller.chance(0.5) else short
    teller.step(
        operation,
        {"b": abs(b), "next": f"{said}{result}"},
        {"b": abs(b), "next": f"{said}{near_miss(teller.rng, result)}"},
        again=("{next}.", "it is {next}.", "{next}, of course.", "I get {next}.", "that should be {next}."),
    )


def _tell_divide(teller: Teller, v: str, a: int, c: int) -> None:
    """From av = c to v."""
    if a == 1:
        return
    x = c // a
    teller.step(
        _BY_DIVIDING,
        {"v": v, "a": a, "c": c, "x": x},
        {"v": v, "a": a, "c": c, "x": x + teller.rng.choice((-1, 1)) if x > 1 else x + 1},
        again=(
            "{a} * {x} = {c}, so {v} = {x}.",
            "{c} / {a} = {x}, so {v} = {x}.",
            "{v} = {x}, since {a} * {x} = {c}.",
            "{v} = {c} / {a} = {x}.",
            "it is {v} = {x}: {a} * {x} = {c}.",
        ),
    )


def _tell_check(teller: Teller, v: str, x: int, left: str, right: int) -> None:
    teller.say(_BY_CHECKING, v=v, x=x, left=left, right=right)


def _tell_expand(teller: Teller, v: str, a: int, b: int, rest: str) -> None:
    """a(v + b) rest -> av + ab rest."""
    after = f"{a}{v} {_signed(a * b)}"
    wrong = f"{a}{v} {_signed(b)}"
    values = {"before": f"{a}({v} {_signed(b)})", "after": after, "rest": rest, "a": a}
    teller.step(
        (
            "[Expand|Multiply out|Open the bracket|I expand|Expanding]: {after}{rest}.",
            LEAD + "{before} [=|is] {after}[.|, so {after}{rest}.]",
            "[Without the bracket|After expanding]: {after}{rest}.",
            "[Distribute|I distribute] the {a}: {after}{rest}.",
            LEAD + "[the left side|the bracket] [is|becomes|gives] {after}.",
        ),
        values,
        {**values, "after": wrong},
    )


def _bracketed(teller: Teller, v: str) -> tuple[str, str, int]:
    rng = teller.rng
    a, x = rng.randint(2, 9), rng.randint(1, 20)
    b, c = rng.choice((-1, 1)) * rng.randint(1, 12), rng.choice((-1, 1)) * rng.randint(1, 40)
    d = a * (x + b) + c
    equation = f"{a}({v} {_signed(b)}) {_signed(c)} = {d}"
    _tell_expand(teller, v, a, b, f" {_signed(c)} = {d}")
    constant = a * b + c
    teller.say(
        (
            "[Together|So|Collect]: {before} = {sum}.",
            "{before} = {sum}.",
            LEAD + "{before} [is|gives] {sum}.",
            "[The numbers|The constants] [make|give] {sum}.",
            "[Combine|Combining] the numbers: {sum}.",
        ),
        before=f"{a * b} {_signed(c)}",
        sum=constant,
    )
    if constant:
        _tell_isolate(teller, v, a, constant, d)
    _tell_divide(teller, v, a, d - constant)
    if teller.chance(0.35):
        _tell_check(teller, v, x, f"{a} * {x + b} {_signed(c)}", d)
    return equation, f"linear {a}({b}) {c} {d}", x


def _two_sided(teller: Teller, v: str, bracket: bool) -> tuple[str, str, int]:
    rng = teller.rng
    x = rng.randint(1, 20)
    c = rng.randint(2, 9)
    a = c + rng.randint(1, 8)
    b = rng.choice((-1, 1)) * rng.randint(1, 12 if bracket else 40)
    constant = a * b if bracket else b
    d = (a - c) * x + constant
    right = f"{c}{v} {_signed(d)}" if d else f"{c}{v}"
    if bracket:
        equation = f"{a}({v} {_signed(b)}) = {right}"
        _tell_expand(teller, v, a, b, f" = {right}")
    else:
        equation = f"{a}{v} {_signed(b)} = {right}"
    teller.step(
        (
            "[Subtract|Take away|I subtract|I take] {cv} [on both sides|from both sides]: {next}.",
            "[Move|Bring|I move] {cv} [to the left|over|across]: {next}.",
            LEAD + "minus {cv} [on both sides|each side]: {next}.",
            LEAD + "{next}, [after taking away|without] {cv}[ on the right|].",
            "[Collect|I collect|Gather] {v} on the left: {next}.",
        ),
        {"cv": f"{c}{v}", "v": v, "next": f"{_term(a - c, v)} {_signed(constant)} = {d}"},
        {"cv": f"{c}{v}", "v": v, "next": f"{_term(a - c + 1, v)} {_signed(constant)} = {d}"},
    )
    _tell_isolate(teller, v, a - c, constant, d)
    _tell_divide(teller, v, a - c, d - constant)
    if teller.chance(0.35):
        left = f"{a} * {x + b}" if bracket else f"{a} * {x} {_signed(b)}"
        value = c * x + d
        teller.say(
            (
                CHECK + "{left} = {value}[ and|,] {right} = {value}. " + FITS,
                "[Both sides|Left and right]: {left} = {value}, {right} = {value}. " + FITS,
                "[Put|Plug] {x} in: {left} = {value}, {right} = {value}. " + FITS,
                "[Hmm|Wait], does {x} work? {left} = {value}, {right} = {value}. " + FITS,
                "[Indeed|And] {left} = {value}, [just as|like] {right} = {value}.",
            ),
            x=x,
            left=left,
            right=f"{c} * {x} {_signed(d)}",
            value=value,
        )
    return equation, f"linear {a} {b} {c} {d} {'bracket' if bracket else ''}", x
