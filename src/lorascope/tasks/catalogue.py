"""The task families, and making problems from them: no duplicates, training and held-out never overlap."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Mapping, Sequence

from lorascope.errors import BadInput
from lorascope.tasks.algebra import make_linear
from lorascope.tasks.arithmetic import make_chain, make_gcd, make_multiply
from lorascope.tasks.automata import make_mealy
from lorascope.tasks.gym import PREFIX, gym_family
from lorascope.tasks.knights import make_knights
from lorascope.tasks.ordering import make_sort
from lorascope.tasks.problem import Draft, Family, Problem, Split
from lorascope.tasks.spelling import make_letters
from lorascope.traces import Trace

_ALL = (
    Family("multiply", "multiplication by parts: 47 * 6", make_multiply),
    Family("chain", "chained sums: 12 + 34 + 56", make_chain),
    Family("linear", "linear equations: 7x + 5 = 89", make_linear),
    Family("letters", "letter counting by spelling: the r in strawberry", make_letters),
    Family("sort", "sorting numbers", make_sort),
    Family("gcd", "greatest common divisor by Euclid", make_gcd),
    Family("knights", "knights and knaves by search with contradiction and return", make_knights),
    Family("mealy", "step-by-step simulation of a small Mealy machine", make_mealy),
)
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
"""Every built-in family by name."""

DIFFICULTIES = (1, 2, 3, 4, 5)
HELDOUT_SHARE = 0.2
"""The share of each family's contents (by hash) that is never trained on."""
_PATIENCE = 400
"""Draws in a row that bring nothing new before a family counts as exhausted."""


def family_named(name: str) -> Family:
    """A built-in family, or one of reasoning-gym's as `rg:NAME`; raises BadInput naming the known ones."""
    if name.startswith(PREFIX):
        return gym_family(name)
    if name not in FAMILIES:
        raise BadInput(f"There is no task family {name!r}; choose from {', '.join(FAMILIES)}, or rg:NAME.")
    return FAMILIES[name]


def split_of(problem: Problem) -> Split:
    """Which side a problem is on: by a hash of its group, so it depends on content alone, never on a seed."""
    return _split_of_group(problem.family, problem.group)


def _split_of_group(family: str, group: str) -> Split:
    digest = hashlib.sha256(f"{family}\n{group}".encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") < HELDOUT_SHARE * 2**64 else "train"


def _named(family: str, difficulty: int, draft: Draft) -> Problem:
    digest = hashlib.sha256(draft.key.encode()).hexdigest()[:12]
    return Problem(
        id=f"{family}-{digest}",
        family=family,
        question=draft.question,
        gold=draft.gold,
        kind=draft.kind,
        thinking=draft.thinking,
        answer=draft.answer,
        difficulty=difficulty,
        key=draft.key,
        group=draft.group or draft.key,
        slips=draft.slips,
        meta=draft.meta,
    )


def make_problems(
    families: Mapping[str, float] | Sequence[str],
    n: int,
    seed: int,
    difficulty: int | Sequence[int] | None = None,
    split: Split = "train",
    exclude: Collection[str] = (),
) -> list[Problem]:
    """`n` different problems with worked traces, in a seeded order; the same call gives the same problems.

    families: names (equal shares) or name -> weight; shares are rounded so that they add up to `n`.
    difficulty: 1 (easiest, the default) to 5, or several to mix. exclude: ids of problems not to give.
    Raises BadInput for an unknown family, a difficulty off the dial, or a family with too few problems.
    """
    weights = dict(families) if isinstance(families, Mapping) else dict.fromkeys(families, 1.0)
    _check_request(weights, n, split)
    levels = _levels(difficulty)
    problems: list[Problem] = []
    for name, count in share_out(weights, n).items():
        problems += _draw(family_named(name), count, seed, levels, split, set(exclude))
    random.Random(f"order {seed} {split}").shuffle(problems)
    return problems


def read_weights(text: str) -> dict[str, float]:
    """`{"multiply": 2.0, "chain": 1.0}` from `multiply=2,chain`.

    Raises BadInput for a weight that is not a number.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = part.strip().partition("=")
        try:
            weights[name] = float(weight or 1)
        except ValueError as error:
            raise BadInput(f"{part!r} is not a task with a weight, such as multiply=2.") from error
    return weights


def to_trace(problem: Problem) -> Trace:
    """The worked trace of a problem, in the form that training and recording take."""
    return Trace(
        id=problem.id,
        question=problem.question,
        thinking=problem.thinking,
        answer=problem.answer,
        gold=problem.gold,
        family=problem.family,
    )


def _check_request(weights: Mapping[str, float], n: int, split: str) -> None:
    for name in weights:
        family_named(name)
    if not weights or any(weight < 0 for weight in weights.values()) or sum(weights.values()) <= 0:
        raise BadInput("Name at least one task family, with weights that are not negative and not all zero.")
    if n < 0:
        raise BadInput(f"Ask for a number of problems that is not negative, not {n}.")
    if split not in ("train", "heldout"):
        raise BadInput(f"A split is train or heldout, not {split!r}.")


def _levels(difficulty: int | Sequence[int] | None) -> tuple[int, ...]:
    chosen = 1 if difficulty is None else difficulty
    levels = (chosen,) if isinstance(chosen, int) else tuple(chosen)
    off_dial = [level for level in levels if level not in DIFFICULTIES]
    if off_dial or not levels:
        raise BadInput(f"Choose a difficulty from 1 to 5, not {off_dial[0] if off_dial else 'none'}.")
    return levels


def share_out(weights: Mapping[str, float], n: int) -> dict[str, int]:
    """Whole shares of `n` by weight that add up to `n` (largest remainders first, ties by order)."""
    total = sum(weights.values())
    exact = {name: n * weight / total for name, weight in weights.items()}
    shares = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: shares[name] - exact[name])
    for name in by_remainder[: n - sum(shares.values())]:
        shares[name] += 1
    return shares


def _draw(
    family: Family, count: int, seed: int, levels: Sequence[int], split: Split, exclude: Collection[str]
) -> list[Problem]:
    """Draws until `count` new problems of the split are found; each draw has a generator of its own."""
    found: dict[str, Problem] = {}
    draw = in_vain = 0
    while len(found) < count:
        rng = random.Random(f"{family.name} {seed} {draw}")
        level = levels[draw % len(levels)] if len(levels) == 1 else rng.choice(levels)
        draw += 1
        draft = family.make(rng, level)
        if _split_of_group(family.name, draft.group or draft.key) != split:
            continue
        problem = _named(family.name, level, draft)
        if problem.id in found or problem.id in exclude:
            in_vain += 1
            if in_vain > _PATIENCE:
                raise BadInput(
                    f"The family {family.name} has too few different problems at this difficulty for {count} "
                    f"(found {len(found)}); ask for fewer or a higher difficulty."
                )
            continue
        in_vain = 0
        found[problem.id] = problem
    return list(found.values())
