"""The table of explainers: what can explain a job's features and answer for its explanations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

from lorascope.explain.asking import judge_explainer
from lorascope.explain.budget import Budget
from lorascope.explain.candidates import make_candidates
from lorascope.explain.job import Explainer, Job, learning_sample, too_rare, without_text
from lorascope.explain.lexical import find_rule
from lorascope.explain.rows import Row
from lorascope.explain.rules import describe_rule, make_vocabulary, rule_to_json
from lorascope.explain.scoring import Explanation, Quiz, execute_answers, score_answers
from lorascope.explain.settings import JUDGE
from lorascope.explained import LEXICAL
from lorascope.study import Study
from lorascope.token_text import open_tokenizer, vocabulary_texts


@contextmanager
def lexical_explainer(study: Study, job: Job, budget: Budget) -> Iterator[Explainer]:
    """Executable rules; nothing is spent."""
    vocabulary = make_vocabulary(vocabulary_texts(open_tokenizer(study.path / "tokenizer")))
    candidates = make_candidates(job.training.reading.corpus, vocabulary)
    answer = execute_answers(vocabulary)

    def explain(feature: str, number: int) -> Row:
        if reason := too_rare(job, number):
            return without_text(reason)
        rule = find_rule(learning_sample(job, feature, number, job.config.learn), candidates)
        if not rule:
            return without_text("no rule tells its firing tokens from others")
        return {"text": describe_rule(rule), "rule": rule_to_json(rule), "reason": None}

    def score(quiz: Quiz, explanation: Explanation, rng: np.random.Generator) -> dict[str, Any]:
        return score_answers(quiz, answer(explanation, quiz.windows), rng).as_dict()

    yield Explainer(LEXICAL, [job.config.learn, len(vocabulary)], [], 1, explain, score)


EXPLAINERS: dict[str, Callable[[Study, Job, Budget], AbstractContextManager[Explainer]]] = {
    LEXICAL: lexical_explainer,
    JUDGE: judge_explainer,
}
