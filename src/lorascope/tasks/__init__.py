"""Verifiable tasks with worked traces, question files, and the verifiers of both."""

from lorascope.tasks.catalogue import DIFFICULTIES, FAMILIES, make_problems, split_of, to_trace
from lorascope.tasks.problem import Family, Problem, Score, Slip

__all__ = ["DIFFICULTIES", "FAMILIES", "Family", "Problem", "Score", "Slip", "make_problems", "split_of", "to_trace"]
