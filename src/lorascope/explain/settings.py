"""The options of `lorascope explain`, and those of judges, which `lorascope categorize` has too."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from lorascope.errors import BadInput
from lorascope.explained import LEXICAL

TRAIN = "train"
JUDGE = "judge"


@dataclass(frozen=True)
class JudgeConfig:
    """How a judge is reached and asked, and what a run may spend: options of every command that asks one."""

    judge_model: str | None = None
    """Name of the judge's model, as its server knows it."""
    judge_url: str | None = None
    """Base URL of an OpenAI-compatible server, for example http://localhost:8000/v1."""
    judge_key_env: str = ""
    """Name of the environment variable that holds the judge's key (default: no key is sent)."""
    judge_temperature: float = 0.0
    """Sampling temperature of judges, 0 unless given; below 0 leaves it to the server."""
    judge_max_tokens: int = 400
    """Most tokens of one answer; thinking judges need more. Raised, only answers that were cut off are asked again."""
    judge_concurrency: int = 8
    """Most requests in flight to one judge."""
    judge_timeout: float = 120.0
    """Seconds to wait for an answer."""
    judge_retries: int = 4
    """Further attempts after a passing failure (429, 5xx, time-out), with doubling pauses or as Retry-After says."""
    budget_calls: int | None = None
    """Most requests that this run may send to judges; it stops before one more, and the same command continues."""
    budget_tokens: int | None = None
    """Most tokens that this run may use, in and out."""
    budget_money: float | None = None
    """Most money that this run may spend, in the currency of the prices."""
    price_in: float = 0.0
    """Price of a million tokens read by judges."""
    price_out: float = 0.0
    """Price of a million tokens written by judges."""


@dataclass(frozen=True)
class ExplainConfig(JudgeConfig):
    """Explain each feature by a rule or a judge on the training corpus and score it on text that was not shown."""

    kinds: str = "direction,latent"
    """Kinds of features to explain, separated by commas: direction, latent, base, random, untrained, neuron."""
    corpus: str = "heldout"
    """Corpus to score on; traces that are also in the training corpus are left out."""
    explainer: str = LEXICAL
    """What explains: lexical (executable rules, no model, no network) or judge (a language model behind a URL)."""
    examples: int = 50
    """Scoring windows of each feature around its firings, and as many in which it does not fire."""
    learn: int = 256
    """Training windows from which a rule is learned, around firings, and as many others."""
    window: int = 8
    """Tokens on either side of a window's centre."""
    max_tokens: int = 500_000
    """Most tokens read of a corpus; of a longer one, whole traces are drawn by seed."""
    limit: int | None = None
    """Explain only this many features of each kind, drawn by seed."""
    shown: int = 10
    """Examples from which a judge explains and classifies: half the strongest, half over the quantiles of the rest."""
    asked: int = 5
    """Scoring windows that a judge sees in one request."""
    passes: int = 1
    """2 asks for classes and scores a second time, in another order, for the agreement of the two."""
    second_judge_model: str | None = None
    """Judge of the second pass (default: the same); naming one makes two passes."""
    second_judge_url: str | None = None
    """Base URL of the second pass's judge (default: the judge's); naming one makes two passes."""
    second_judge_key_env: str | None = None
    """Variable that holds its key (default: the judge's where the URL is the same, else none)."""
    class_judge_model: str | None = None
    """Judge of the classes 0, 1 and 2 (default: the same)."""
    class_judge_url: str | None = None
    """Base URL of the classes' judge (default: the judge's)."""
    class_judge_key_env: str | None = None
    """Variable that holds its key (default: the judge's where the URL is the same, else none)."""


def check_config(config: ExplainConfig) -> list[str]:
    """The kinds to explain.

    Raises:
        BadInput: an option is out of range, or the judge is not named.
    """
    kinds = [kind.strip() for kind in config.kinds.split(",") if kind.strip()]
    if config.explainer not in (LEXICAL, JUDGE):
        raise BadInput(f"There is no explainer {config.explainer!r}; choose lexical or judge.")
    if config.corpus == TRAIN:
        raise BadInput("Choose another --corpus than train: rules are learned there, so scores would mean nothing.")
    least = min(config.examples, config.learn, config.window, config.max_tokens, config.shown, config.asked)
    if not kinds or least < 1 or (config.limit is not None and config.limit < 1):
        raise BadInput("Name at least one kind, and give numbers of at least 1 to the options of explain.")
    if config.explainer == JUDGE:
        check_judge(config, "--explainer judge")
        for url in (config.second_judge_url, config.class_judge_url):
            if url is not None:
                check_url(url)
        if config.passes not in (1, 2):
            raise BadInput("--passes is 1 or 2.")
    return kinds


def check_judge(config: JudgeConfig, wanted_by: str) -> None:
    """Raise BadInput unless the options of judges make sense; `wanted_by` is the option that asks for one."""
    if not config.judge_model or not config.judge_url:
        raise BadInput(f"{wanted_by} needs --judge-model and --judge-url; see docs/judges.md.")
    check_url(config.judge_url)
    if min(config.judge_concurrency, config.judge_max_tokens) < 1 or config.judge_retries < 0:
        raise BadInput("Give --judge-concurrency and --judge-max-tokens at least 1, and --judge-retries at least 0.")
    if config.judge_timeout <= 0:
        raise BadInput("--judge-timeout must be above 0 seconds.")
    if any(limit is not None and limit <= 0 for limit in (config.budget_calls, config.budget_tokens)):
        raise BadInput("Give --budget-calls and --budget-tokens at least 1, or leave them out.")
    if config.budget_money is not None and (config.budget_money <= 0 or config.price_in + config.price_out <= 0):
        raise BadInput("--budget-money needs to be above 0, and prices: --price-in and --price-out.")
    if min(config.price_in, config.price_out) < 0:
        raise BadInput("Prices cannot be below 0.")


def check_url(url: str) -> None:
    """Raise BadInput unless this is the base URL of a server, without a key in it: it is stored with the study."""
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        whole = False
    if not whole:
        raise BadInput("A judge's URL must be like http://localhost:8000/v1 or https://HOST/v1.")
    if parts.username or parts.password or parts.query:
        raise BadInput("A judge's URL is stored with the study: leave the key out and name its variable instead.")
