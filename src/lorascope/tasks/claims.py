"""What knights and knaves say about each other: claims, their truth, and their many wordings."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from lorascope.tasks.wording import vary

Roles = Mapping[int, bool]
"""Person -> whether a knight; people not in it are undecided."""


@dataclass(frozen=True)
class Claim:
    """A claim of one kind (a key of KINDS) about some people, each with the role claimed."""

    kind: str
    people: tuple[int, ...]
    roles: tuple[bool, ...] = ()

    def holds(self, roles: Roles) -> bool:
        """Whether it is true when everyone's role is known."""
        return _TRUTH[self.kind](self, roles)

    def outcomes(self, roles: Roles) -> set[bool]:
        """The truth values still possible under partly known roles."""
        return {self.holds(full) for full in completions(roles, self.people)}


_TRUTH: dict[str, Callable[[Claim, Roles], bool]] = {
    "is": lambda c, r: r[c.people[0]] == c.roles[0],
    "and": lambda c, r: all(r[p] == role for p, role in zip(c.people, c.roles, strict=True)),
    "or": lambda c, r: any(r[p] == role for p, role in zip(c.people, c.roles, strict=True)),
    "if": lambda c, r: r[c.people[0]] != c.roles[0] or r[c.people[1]] == c.roles[1],
    "same": lambda c, r: r[c.people[0]] == r[c.people[1]],
    "differ": lambda c, r: r[c.people[0]] != r[c.people[1]],
}
_WORDINGS: dict[str, tuple[str, ...]] = {
    "is": (
        "{a} is a {x}",
        "{a} is [certainly|surely] a {x}",
        "{a} is not a {not_x}",
        "{a} is no {not_x}",
        "{a} [must be|is] a {x}",
    ),
    "and": (
        "{a} is a {x} and {b} is a {y}",
        "{a} is a {x}, and {b} a {y}",
        "both: {a} is a {x}, {b} is a {y}",
        "{a} is a {x} while {b} is a {y}",
        "it is true that {a} is a {x} and {b} is a {y}",
    ),
    "or": (
        "{a} is a {x} or {b} is a {y}",
        "{a} is a {x}, or {b} is a {y}, or both",
        "at least one holds: {a} is a {x}, {b} is a {y}",
        "either {a} is a {x} or {b} is a {y}, maybe both",
        "{a} is a {x} and/or {b} is a {y}",
    ),
    "if": (
        "if {a} is a {x}, then {b} is a {y}",
        "{b} is a {y} if {a} is a {x}",
        "if {a} is a {x}, {b} is a {y}",
        "{a} being a {x} means that {b} is a {y}",
        "whenever {a} is a {x}, {b} is a {y}",
    ),
    "same": (
        "{a} and {b} are of the same kind",
        "{a} and {b} are [both knights or both knaves|alike]",
        "{a} is what {b} is",
        "{a} is a knight exactly if {b} is",
        "{a} and {b} are the same",
    ),
    "differ": (
        "{a} and {b} are of different kinds",
        "{a} and {b} [are not alike|differ]",
        "exactly one of {a} and {b} is a knight",
        "{a} is a knight exactly if {b} is a knave",
        "{a} is not what {b} is",
    ),
}
_SIMPLE = ("is", "is", "same", "differ", "and", "or")
_COMPOUND = ("and", "or", "if", "same", "differ", "and", "or", "is")


def role_name(knight: bool) -> str:
    """knight or knave."""
    return "knight" if knight else "knave"


def completions(roles: Roles, people: Sequence[int]) -> list[dict[int, bool]]:
    """Every way to decide the undecided among `people`."""
    open_people = [p for p in dict.fromkeys(people) if p not in roles]
    return [
        {**roles, **dict(zip(open_people, chosen, strict=True))}
        for chosen in product((True, False), repeat=len(open_people))
    ]


def draw_claim(rng: random.Random, speaker: int, people: int, compound: bool) -> Claim:
    """A random claim; "is" is always about somebody else, the others may include the speaker."""
    kind = rng.choice(_COMPOUND if compound else _SIMPLE)
    others = [p for p in range(people) if p != speaker]
    if kind == "is":
        return Claim(kind, (rng.choice(others),), (rng.random() < 0.5,))
    first = rng.choice([speaker, *others])
    second = rng.choice([p for p in range(people) if p != first])
    if kind in ("same", "differ"):
        return Claim(kind, (first, second))
    return Claim(kind, (first, second), (rng.random() < 0.5, rng.random() < 0.5))


def word_claim(rng: random.Random, claim: Claim, names: Sequence[str], short: bool = False) -> str:
    """One of the claim's wordings; `short` gives its first."""
    a, *rest = claim.people
    values = {"a": names[a], "b": names[rest[0]] if rest else ""}
    if claim.roles:
        values |= {"x": role_name(claim.roles[0]), "not_x": role_name(not claim.roles[0])}
        values["y"] = role_name(claim.roles[-1])
    wordings = _WORDINGS[claim.kind]
    return vary(rng, wordings[0] if short else wordings, values)


def solutions(claims: Sequence[Claim]) -> list[tuple[bool, ...]]:
    """Every assignment under which knights' claims hold and knaves' do not."""
    everyone = range(len(claims))
    return [
        tuple(roles[p] for p in everyone)
        for roles in completions({}, everyone)
        if all(claim.holds(roles) == roles[speaker] for speaker, claim in enumerate(claims))
    ]
