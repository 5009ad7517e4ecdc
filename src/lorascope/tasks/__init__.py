"""Verifiable tasks with worked traces, question files, and the verifiers of both."""

from lorascope.tasks.answers import score
from lorascope.tasks.benchmarks import gather_problems
from lorascope.tasks.catalogue import (
    DIFFICULTIES,
    FAMILIES,
    family_named,
    make_problems,
    read_weights,
    split_of,
    to_trace,
)
from lorascope.tasks.problem import Family, Problem, Score, Slip
from lorascope.tasks.questions import read_questions

__all__ = [
    "DIFFICULTIES",
    "FAMILIES",
    "Family",
    "Problem",
    "Score",
    "Slip",
    "family_named",
    "gather_problems",
    "make_problems",
    "read_questions",
    "read_weights",
    "score",
    "split_of",
    "to_trace",
]
