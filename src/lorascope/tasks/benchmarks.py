"""The problems that are named on a command line: task families with weights, `rg:NAME`, and question files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from lorascope.errors import BadInput
from lorascope.tasks.catalogue import FAMILIES, make_problems, read_weights
from lorascope.tasks.gym import PREFIX
from lorascope.tasks.mathematics import require_mathematics
from lorascope.tasks.problem import Problem
from lorascope.tasks.questions import read_questions

_FILES = (".jsonl", ".json", ".gz", ".parquet")


def gather_problems(on: str, n: int, seed: int, difficulty: int) -> list[Problem]:
    """`n` held-out problems of all named families together, and at most `n` of each file.

    A problem's family is its benchmark: a family's name or a file's stem, with `#2` where it is taken already.

    Raises:
        BadInput: an unknown family, an unreadable file, or free-form mathematics without what compares it.
    """
    names = [name.strip() for name in on.split(",") if name.strip()]
    files = [name for name in names if Path(name).suffix.lower() in _FILES]
    families = read_weights(",".join(name for name in names if name not in files)) if len(names) > len(files) else {}
    unknown = [name for name in families if name not in FAMILIES and not name.startswith(PREFIX)]
    if unknown or not names:
        raise BadInput(
            f"--on {on!r}: there is no task or file {(unknown or [''])[0]!r}; tasks are {', '.join(FAMILIES)}."
        )
    problems = make_problems(families, n, seed, difficulty, "heldout") if families else []
    taken = {"all", *families}  # "all" is the row over all benchmarks
    for file in dict.fromkeys(Path(file).expanduser().resolve() for file in files):
        benchmark = free_name(file.name.split(".")[0], taken)
        read = read_questions(file, seed)
        order = np.random.default_rng(seed).permutation(len(read))[:n]
        problems += [replace(read[i], family=benchmark) for i in sorted(order)]
    if any(problem.kind == "math" for problem in problems):
        require_mathematics()
    return problems


def free_name(name: str, taken: set[str]) -> str:
    """The name, or `name#2`, `name#3`, ... where it is taken; from now on it is."""
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}#{number}"
    taken.add(free)
    return free
