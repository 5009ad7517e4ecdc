"""reasoning-gym's families as `rg:NAME`, for evaluation: questions and its own scoring, no worked traces."""

from __future__ import annotations

import json
import random
import re
from typing import Any

from lorascope.errors import BadInput
from lorascope.tasks.problem import Draft, Family, Problem, Score

PREFIX = "rg:"
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def gym_family(name: str) -> Family:
    """The family behind `rg:NAME`; raises BadInput when the package or the name is missing."""
    task = name.removeprefix(PREFIX)
    package = _package()
    known = sorted(package.factory.DATASETS)
    if task not in known:
        raise BadInput(f"reasoning-gym has no task {task!r}; choose from {', '.join(known)}.")

    def make(rng: random.Random, difficulty: int) -> Draft:
        entry = package.create_dataset(task, size=1, seed=rng.randrange(2**31))[0]
        return Draft(
            question=entry["question"],
            gold=str(entry["answer"]),
            key=entry["question"],
            thinking="",
            answer="",
            kind="number" if _NUMBER.fullmatch(str(entry["answer"])) else "text",
            meta={"entry": json.loads(json.dumps(entry, default=str))},
        )

    return Family(name, f"{task} of reasoning-gym", make)


def score_gym(problem: Problem, extracted: str | None) -> Score:
    """Scores what was read from a response by reasoning-gym's own rule; right means its full score."""
    if extracted is None:
        return Score(False, None)
    package = _package()
    score_answer = package.get_score_answer_fn(problem.family.removeprefix(PREFIX))
    return Score(float(score_answer(extracted, problem.meta["entry"])) >= 1.0, extracted)


def _package() -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise BadInput("The rg: families come from the reasoning-gym package: pip install reasoning-gym.") from error
    return reasoning_gym
