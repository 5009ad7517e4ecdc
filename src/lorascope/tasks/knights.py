"""Knights and knaves by search: suppose, follow what it forces, meet a contradiction, go back."""

from __future__ import annotations

import random
from collections.abc import Sequence

from lorascope.tasks.claims import Claim, draw_claim, role_name, solutions, word_claim
from lorascope.tasks.problem import Draft
from lorascope.tasks.wording import FITS, Teller, vary

# (people, compound claims)
_SIZES = {1: (2, False), 2: (3, False), 3: (3, True), 4: (4, True), 5: (5, True)}
_NAMES = (
    "Ann Ben Cal Dan Eve Fay Gus Hal Ida Jan Kim Lee Max Ned Amy Pam Ray Sam Tom Una Val Will Zoe Bob Dora Eric Fred "
    "Gina Hugo Ivy Jack Kate Leo Mia Nina Omar Paul Rosa Seth Tina Vera Walt Adam Bill Carl Emma Fiona Grace Henry "
    "Irene James Karen Laura Mark Nora Oscar Peter Ruth Susan"
)

_ISLAND = (
    "Knights [always |]tell the truth, knaves [always |]lie.",
    "On an island, knights [only|always] [say what is true|tell the truth] and knaves [always lie|say what is false].",
    "[Everyone here is|Each of them is] a knight, who tells the truth, or a knave, who lies.",
    "A knight never lies; a knave always [does|lies].",
    "Knaves lie. Knights do not.",
)
_ASK = (
    "Who is a knight and who is a knave?",
    "[What is each of them|What are they|Who is what]?",
    "[Find|Say|Tell me] who is a knight and who a knave.",
    "Which of them are knights, which are knaves?",
    "Is each of them a knight or a knave?",
)
_SPEECH = ("{n} says[:| that] {c}.", '{n} says: "{c}."', "{n}: {c}.", "{n} claims that {c}.", "According to {n}, {c}.")
_SUPPOSE = (
    "[Suppose|Say|Let me suppose|Assume|What if] {n} is a {r}.",
    "[Let me try|Try|I try] {n} as a {r}.",
    "[Take|Let] {n} [as|be] a {r}.",
    "[If|Imagine] {n} is a {r}:",
    "[Hypothesis|Case]: {n} is a {r}.",
)
_FORCED = (
    "[Then|So] {m} is a {q}[|, because of {n}|, from what {n} says].",
    "[As|Since] {n} is a {r}, {m} [must be|is] a {q}.",
    "{n}, a {r}, [makes|forces] {m} a {q}.",
    "[That makes|This makes] {m} a {q}.",
    "[It follows|So it follows|I see] that {m} is a {q}.",
    "[Hence|Therefore] {m} is a {q}.",
)
_CLASH = (
    "[But|But then|However,] {n}, a {r}, says something {v}. [Contradiction|That cannot be|Impossible].",
    "[Contradiction|A contradiction|That breaks]: {n} is a {r}, [yet|but] the claim is {v}.",
    "[Wait|Hmm], what {n} says [would be|is] {v}, and {n} is a {r}. [Contradiction|Impossible|No].",
    "[No|Not possible|That fails]: a {r} [does not say|cannot say] what is {v}, and {n} does.",
    "{n} is a {r} but says what is {v}. [Contradiction|That does not work|So no].",
)
_BACK = (
    "[Going back|I go back|Back|Let me go back][:|,] {n} is a {r}[| then].",
    "[So|Therefore,] {n} is not a {o}[.| but a {r}.]",
    "[Alternatively|Then|The other way], {n} is a {r}.",
    "[Undo that|Start over|I take that back]: {n} is a {r}.",
    "[So|Then] it was wrong to suppose {n} a {o}[.|: {n} is a {r}.]",
)
_HOLDS = (
    "[Every claim fits|All claims fit|Everything fits].",
    "[Check|Checking|Let me check]: {list}. " + FITS,
    "[No contradiction|Nothing breaks|It is consistent].",
    "[Everyone|Everything] [agrees|fits|checks out].",
    "[That works|This works].",
)
_SAY = (
    "{roles}.",
    "[The|So the|My|The final] answer is: {roles}.",
    "[So|Therefore|Thus|Hence], {roles}.",
    "[Answer|Final answer]: {roles}.",
    "[It is|That gives|We get] this: {roles}.",
)


def make_knights(rng: random.Random, difficulty: int) -> Draft:
    """Two to five people, one claim each, exactly one solution; the trace is the search for it."""
    people, compound = _SIZES[difficulty]
    while True:
        claims = [draw_claim(rng, speaker, people, compound) for speaker in range(people)]
        solved = solutions(claims)
        if len(solved) == 1:
            break
    names = rng.sample(_NAMES.split(), people)
    gold = _listed(names, solved[0])
    teller = Teller(rng, slip_chance=0.05)
    found = _search(teller, claims, names, {})
    assert found == dict(enumerate(solved[0]))
    teller.say(_HOLDS, list=_listed(names, solved[0]))
    form = "; ".join(f"{c.kind} {c.people} {c.roles}" for c in claims)
    return Draft(
        question=_question(rng, claims, names),
        gold=gold,
        key=f"knights {' '.join(names)}: {form}",
        group=f"knights {form}",
        thinking=teller.text(),
        answer=vary(rng, _SAY, {"roles": _joined(rng, names, solved[0])}),
        kind="roles",
        slips=tuple(teller.slips),
        meta={"roles": list(solved[0]), "names": names},
    )


def _listed(names: Sequence[str], roles: Sequence[bool]) -> str:
    return ", ".join(f"{name} is a {role_name(role)}" for name, role in zip(names, roles, strict=True))


def _joined(rng: random.Random, names: Sequence[str], roles: Sequence[bool]) -> str:
    *first, last = [f"{name} is a {role_name(role)}" for name, role in zip(names, roles, strict=True)]
    return ", ".join(first) + rng.choice((", and ", " and ", ", ")) + last


def _question(rng: random.Random, claims: Sequence[Claim], names: Sequence[str]) -> str:
    speeches = [
        vary(rng, _SPEECH, {"n": names[speaker], "c": word_claim(rng, claim, names)})
        for speaker, claim in enumerate(claims)
    ]
    return " ".join((vary(rng, _ISLAND), *speeches, vary(rng, _ASK)))


def _search(
    teller: Teller, claims: Sequence[Claim], names: Sequence[str], roles: dict[int, bool]
) -> dict[int, bool] | None:
    """Tells a depth-first search from `roles`; returns the solution, or None after a told contradiction."""
    known = dict(roles)
    while True:
        clash = _first_clash(claims, known)
        if clash is not None:
            teller.say(_CLASH, n=names[clash], r=role_name(known[clash]), v="false" if known[clash] else "true")
            return None
        forced = _first_forced(claims, known)
        if forced is None:
            break
        speaker, person, role = forced
        _tell_forced(teller, names, speaker, known[speaker], person, role)
        known[person] = role
    undecided = [p for p in range(len(claims)) if p not in known]
    if not undecided:
        return known
    person = undecided[0]
    guess = teller.chance(0.6)
    teller.say(_SUPPOSE, n=names[person], r=role_name(guess))
    found = _search(teller, claims, names, {**known, person: guess})
    if found is not None:
        return found
    teller.say(_BACK, n=names[person], r=role_name(not guess), o=role_name(guess))
    return _search(teller, claims, names, {**known, person: not guess})


def _first_clash(claims: Sequence[Claim], known: dict[int, bool]) -> int | None:
    """A person whose role contradicts the only truth value left to their claim."""
    return next((p for p in known if known[p] not in claims[p].outcomes(known)), None)


def _first_forced(claims: Sequence[Claim], known: dict[int, bool]) -> tuple[int, int, bool] | None:
    """(speaker, person, role): the speaker's known role leaves this person only one role."""
    for speaker in known:
        claim = claims[speaker]
        for person in claim.people:
            if person in known:
                continue
            left = [r for r in (True, False) if known[speaker] in claim.outcomes({**known, person: r})]
            if len(left) == 1:
                return speaker, person, left[0]
    return None


def _tell_forced(
    teller: Teller, names: Sequence[str], speaker: int, speaker_role: bool, person: int, role: bool
) -> None:
    right = {"n": names[speaker], "r": role_name(speaker_role), "m": names[person], "q": role_name(role)}
    wrong = {**right, "q": role_name(not role)}
    again = (
        "{m} [is|must be] a {q}[|, since {n} is a {r}].",
        "[it is the other way|the other way]: {m} is a {q}.",
        "a {r} said it, so {m} is a {q}.",
        "{n} is a {r}, so {m} is a {q}.",
        "I mean that {m} is a {q}.",
    )
    teller.step(_FORCED, right, wrong, again)
