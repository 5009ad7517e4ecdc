"""A judge as explainer and scorer: examples to words and a class, and its answers to detection and fuzzing.

Shapes: W = windows, S = tokens of a window, n = firings of one feature.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorascope.explain.budget import Budget, account
from lorascope.explain.job import Explainer, Job, feature_rng, too_rare, without_text
from lorascope.explain.judge_log import TRUNCATED, JudgeLog, is_passing
from lorascope.explain.judges import Endpoint, Judge, Reply, endpoint_of, open_log
from lorascope.explain.pieces import centre_segment, choose_marks, mark_texts, show_pieces, window_texts
from lorascope.explain.prompts import TOP, VERSION, ask_class, ask_confidence, ask_explanation, show_piece
from lorascope.explain.rows import Row
from lorascope.explain.scoring import Explanation, Quiz, compare_passes, rank_answers, score_answers, too_few
from lorascope.explain.settings import JUDGE, ExplainConfig
from lorascope.explain.windows import Windows, show_windows, spread_apart, spread_over_quantiles, window_index
from lorascope.study import Study
from lorascope.token_text import TokenTable, open_tokenizer, token_table

QUANTILES = 5
"""Parts, by activation, over which half of the examples that a judge is shown are drawn."""
PER_TRACE = 4
"""Most examples of one trace that are shown, as long as others are left."""

Asked = Callable[[Explanation, Windows], tuple[list[float | None], dict[str, int], NDArray[np.bool_]]]
"""Confidences [W] (None: not read), how many windows failed for which reason, and of which the request failed in
passing [W]: it is sent again by the next run, and until then says nothing, good or bad."""


@contextmanager
def judge_explainer(study: Study, job: Job, budget: Budget) -> Iterator[Explainer]:
    """The judge that the options name, with its second pass and the judge of classes where they are wanted."""
    config = job.config
    main, second, of_classes = endpoints(config)
    table = token_table(open_tokenizer(study.path / "tokenizer"))
    with ExitStack() as stack:
        judges = open_judges(study, [main, second or main, of_classes], config.judge_concurrency, budget, stack)
        ask = windows_asker(judges[main], table, config.asked, job.seed)

        def explain(feature: str, number: int) -> Row:
            asked = judges[main], judges[of_classes], judges[second] if second else None
            return explain_feature(job, table, *asked, feature, number)

        def score(quiz: Quiz, explanation: Explanation, rng: np.random.Generator) -> dict[str, Any]:
            answers, failures, lost_W = ask(explanation, quiz.windows)
            answered = replace(quiz, truth_W=quiz.truth_W[~lost_W])
            if too_few(answered):
                return {"failures": failures}
            read = [given for given, lost in zip(answers, lost_W, strict=True) if not lost]
            found = score_answers(answered, read, rng).as_dict()
            return found | {"auroc": rank_answers(answered, read, rng).rounded(4), "failures": failures}

        def agree(quiz: Quiz, explanation: Explanation) -> dict[str, Any]:
            again = windows_asker(judges[second], table, config.asked, job.seed + 1)
            once, twice = ask(explanation, quiz.windows), again(explanation, quiz.windows)
            return compare_passes(once[0], twice[0]) | {"failures": twice[1]}

        def stop() -> None:
            for judge in judges.values():
                judge.stopped.set()

        settings = [VERSION, identity(main), identity(of_classes), second and identity(second), config.shown]
        yield Explainer(
            f"{JUDGE}:{main.model}",
            settings,
            [VERSION, identity(main), second and identity(second), config.asked],
            config.judge_concurrency,
            explain,
            score,
            agree if second else None,
            lambda: account(budget),
            stop,
            main.max_tokens,
        )


def endpoints(config: ExplainConfig) -> tuple[Endpoint, Endpoint | None, Endpoint]:
    """The judge, that of the second pass (None for one pass) and that of the classes."""
    main = endpoint_of(config)

    def endpoint(model: str | None, url: str | None, key_env: str | None) -> Endpoint:
        # A key goes to no other address than its own unless it is named for that one.
        inherited = main.key_env if url in (None, main.url) else ""
        key_env = inherited if key_env is None else key_env
        return replace(main, model=model or main.model, url=url or main.url, key_env=key_env)

    other = (config.second_judge_model, config.second_judge_url, config.second_judge_key_env)
    second = endpoint(*other)
    of_classes = endpoint(config.class_judge_model, config.class_judge_url, config.class_judge_key_env)
    return main, second if config.passes == 2 or any(other) else None, of_classes


def identity(endpoint: Endpoint) -> list[Any]:
    """What of an endpoint changes its answers; where it is and how it is reached does not, nor how long they may be."""
    return [endpoint.model, endpoint.temperature]


def open_judges(
    study: Study, wanted: Sequence[Endpoint], workers: int, budget: Budget, stack: ExitStack
) -> dict[Endpoint | None, Judge]:
    """One judge per endpoint and one file per model, closed with the stack.

    Answers that came from another address under the same name are used all the same, which is said once.
    """
    folder = study.path / "explanations" / "judges"
    logs: dict[str, JudgeLog] = {}
    for endpoint in wanted:
        if endpoint.model not in logs:
            log = logs[endpoint.model] = open_log(folder, endpoint)
            stack.callback(log.close)
            here = {other.url for other in wanted if other.model == endpoint.model}
            if elsewhere := sorted(log.urls - here):
                say_once(
                    f"Answers of {endpoint.model!r} from {', '.join(elsewhere)} are used again in this run at "
                    f"{', '.join(sorted(here))}, for they are kept by the model's name; should another model answer "
                    "there (llama.cpp ignores names), give it a --judge-model of its own."
                )
    return {
        endpoint: stack.enter_context(Judge(endpoint, logs[endpoint.model], budget, workers))
        for endpoint in dict.fromkeys(wanted)
    }


@cache
def say_once(text: str) -> None:
    """Tell whoever runs this, the first time only: each kind of features opens the files anew."""
    print(f"lorascope: {text}", file=sys.stderr)


def explain_feature(
    job: Job, table: TokenTable, judge: Judge, of_classes: Judge, second: Judge | None, feature: str, number: int
) -> Row:
    """The judge's explanation and, asked apart from the same examples, its class (twice for two passes)."""
    if reason := too_rare(job, number):
        return without_text(reason) | {"class": None}
    pieces, marks = example_pieces(job, table, feature, number)
    said = judge.ask_all([ask_explanation(pieces, marks, job.seed)])[0]
    classed = of_classes.ask_all([ask_class(pieces, marks, job.seed)])[0]
    row: Row = {"text": said.value, "rule": None, "reason": None, "class": class_of(classed)}
    replies = [said, classed]
    if said.failure:
        row["reason"] = f"judge gave no explanation: {said.failure}"
    if second is not None:
        replies += second.ask_all([ask_class(pieces[::-1], marks, job.seed + 1)])
        row["class_again"] = class_of(replies[-1])
    if any(reply.failure and is_passing(reply.failure) for reply in replies):
        row["retry"] = True
    if any(reply.failure == TRUNCATED for reply in replies):
        row["truncated_under"] = judge.endpoint.max_tokens
    return row


def class_of(reply: Reply) -> dict[str, Any]:
    """`{"class", "reason", "failure"}` of a reply."""
    return {"class": None, "reason": None} | (reply.value or {}) | {"failure": reply.failure}


def example_pieces(job: Job, table: TokenTable, feature: str, number: int) -> tuple[list[str], tuple[str, str]]:
    """The examples that a judge sees, in random order, and the marks around their firing tokens.

    Activations are those of this feature alone, from 1 to 10 of its largest on the training corpus.
    """
    corpus = job.training.reading.corpus
    at_n, activation_n = job.training.firings.of(number)
    rng = feature_rng(job.seed, "show", feature)
    chosen = choose_examples(at_n, activation_n, corpus.first_T[at_n], job.config.shown, 2 * job.config.window, rng)
    index_WS = window_index(corpus, at_n[rng.permutation(chosen)], job.config.window)
    shown = show_windows(corpus, index_WS)
    texts = [window_texts(table, ids_S) for ids_S in shown.ids_WS]
    marks = choose_marks(["".join(text) for text in texts])
    level = np.zeros(corpus.n_tokens, dtype=np.int64)
    level[at_n] = np.maximum(1, np.rint(TOP * activation_n / activation_n.max()))
    pieces = []
    for text, index_S, segments_S in zip(texts, index_WS, shown.segments_WS, strict=True):
        levels = [int(level[place]) if place >= 0 else 0 for place in index_S]
        listed = [(token, value) for token, value in zip(text, levels, strict=True) if value and token]
        marked = mark_texts(text, [value > 0 for value in levels], marks)
        pieces.append(show_piece(marked, centre_segment(segments_S), listed))
    return pieces, marks


def choose_examples(
    at_n: NDArray[np.int64],
    activation_n: NDArray[np.float32],
    trace_n: NDArray[np.int64],
    wanted: int,
    apart: int,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Numbers of up to `wanted` firings: half the strongest, the rest over the quantiles of the others.

    At most 4 of a trace and none within `apart` tokens of another, as long as there are enough without.
    """
    order = np.argsort(-activation_n, kind="stable")
    spread = partial(spread_apart, at_n=at_n, trace_n=trace_n, apart=apart, caps=(PER_TRACE,))
    top = spread(order, wanted=(wanted + 1) // 2)
    others = order[~np.isin(order, top)]
    drawn = others[spread_over_quantiles(activation_n[others], min(len(others), 5 * wanted), rng, QUANTILES)]
    return spread(rng.permutation(drawn), wanted=wanted, chosen=top.tolist())


def windows_asker(judge: Judge, table: TokenTable, together: int, seed: int) -> Asked:
    """A function that asks a judge about windows, so many in one request, in an order that tells nothing."""

    def ask(explanation: Explanation, windows: Windows) -> tuple[list[float | None], dict[str, int], NDArray[np.bool_]]:
        order = feature_rng(seed, "order", explanation.feature).permutation(len(windows))
        groups = [order[start : start + together] for start in range(0, len(order), together)]
        questions = []
        for group in groups:
            marked_WS = None if windows.marked_WS is None else windows.marked_WS[group]
            some = Windows(windows.ids_WS[group], windows.segments_WS[group], marked_WS)
            questions.append(ask_confidence(explanation.text, *show_pieces(table, some), seed))
        answers: list[float | None] = [None] * len(windows)
        failures: Counter[str] = Counter()
        lost_W = np.zeros(len(windows), bool)
        for group, reply in zip(groups, judge.ask_all(questions), strict=True):
            if reply.failure:
                failures[reply.failure] += len(group)
                lost_W[group] = is_passing(reply.failure)
                continue
            for place, confidence in zip(group.tolist(), reply.value, strict=True):
                answers[place] = confidence
        return answers, dict(sorted(failures.items())), lost_W

    return ask
