"""Explanations of features, by executable rules or by judges, and how well they tell where a feature fires on text
never seen."""

from lorascope.explain.rules import Rule, describe_rule, execute_rule, make_vocabulary, rule_from_json, rule_to_json
from lorascope.explain.scoring import Explanation, execute_answers, score_answers
from lorascope.explain.settings import ExplainConfig
from lorascope.explain.stage import explain_features
from lorascope.explain.summary import pool_kinds, summarise_rows
from lorascope.explained import LEXICAL, explain_records, explainers_of

__all__ = [
    "LEXICAL",
    "ExplainConfig",
    "Explanation",
    "Rule",
    "describe_rule",
    "execute_answers",
    "execute_rule",
    "explain_features",
    "explain_records",
    "explainers_of",
    "make_vocabulary",
    "pool_kinds",
    "rule_from_json",
    "rule_to_json",
    "score_answers",
    "summarise_rows",
]
