"""`lorascope evaluate`: accuracy of base, adapter and full finetune on the same problems, and the recovery.

Responses to one set of problems under one set of limits are kept in `eval/sets/SET/MODEL.jsonl`, so that no call
undoes an earlier one. `eval/recovery.json` and `eval/details.json` are computed from those that belong together, which
are in `eval/MODEL.jsonl`: the last call's, and those of other benchmarks that were measured alike.
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorascope import edits
from lorascope.adapter import Adapter
from lorascope.addresses import select
from lorascope.attached import attach
from lorascope.config import Options
from lorascope.errors import BadInput
from lorascope.generation import Sampling, generate_batch
from lorascope.models import load_model
from lorascope.prepacked import prepacked_maps
from lorascope.recovery import recovery_rows
from lorascope.study import Study, atomic_write_text, digest, write_json
from lorascope.tasks import Problem, gather_problems, score
from lorascope.traces import MARKUPS, Renderer, Trace, pad_ids

PLAIN_TEXT = Path(__file__).parent / "plain_text.txt"
LIMITS = ("max_new_tokens", "thinking_budget", "temperature", "seeds")


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure accuracy of the base model, the adapter and the full finetune on the same problems."""

    on: str
    """What to evaluate on: task families (chain=2,letters), rg:NAME, files of questions (.jsonl, .json, .parquet)."""
    n: int = 160
    """Problems in all from task families; at most so many from each file."""
    difficulty: int = 1
    """Difficulty of the task families' problems, 1 to 5."""
    models: str = "auto"
    """Which to evaluate: base, base-3shot, adapter, full, control-answers, control-shuffled (auto: what is there)."""
    off: str = ""
    """Also the adapter with some directions off: attn, mlp, or other patterns; each gets a row of its own."""
    shots: int = 3
    """Worked examples in base's other prompt, from the training traces."""
    max_new_tokens: int = 192
    """Longest response in tokens, the same for all models."""
    thinking_budget: int | None = None
    """Close the thinking after so many tokens, if the model has not."""
    temperature: float = 0.0
    """0 is greedy."""
    seeds: int = 1
    """Sampled responses per problem (with a temperature)."""
    token_budget: int = 16_384
    """Most tokens, prompts and longest responses, held at once; sets how many responses are generated together."""
    plain_text: str = ""
    """File of plain text for the perplexity (default: a short built-in text)."""


@dataclass(frozen=True)
class Contestant:
    """One row of the evaluation: which weights, which prompt, which directions off."""

    name: str
    weights: str
    """Folder in the study that the weights are in; empty for the base model."""
    full: bool = False
    shots: int = 0
    off: str = ""


@dataclass(frozen=True)
class Measurement:
    """What decides one model's samples beside its weights and the seed; kept in the record of its stage."""

    problems: str
    """Digest of the problems: ids, questions, right answers, options."""
    benchmarks: dict[str, int]
    """How many problems each benchmark has."""
    limits: dict[str, Any]
    """What has to be the same for results to be compared."""
    token_budget: int
    shots: int
    off: str

    def set_name(self, options: Options) -> str:
        """The folder of samples that belong together: of the same problems under the same limits."""
        return digest([self.problems, self.limits, options.seed, options.dtype])[:12]


@dataclass(frozen=True)
class PlainText:
    """What decides a model's perplexity beside its weights."""

    text: str
    """Digest of the text."""
    off: str


Models = dict[str, dict[str, Any]]
"""The records of the samples of one set, by model."""


def evaluate(study: Study, config: EvaluateConfig, options: Options) -> dict[str, Any]:
    """Generate, score, keep every sample, compute recovery.

    Raises:
        BadInput: unknown tasks or models, or unreadable files. Nothing of it is found only after a model is loaded.
        MissingStage: a model that was asked for is not trained.
    """
    check_numbers(config)
    text = read_plain_text(config)
    contestants = choose_contestants(study, config)
    problems = gather_problems(config.on, config.n, options.seed, config.difficulty)
    for contestant in contestants:
        evaluate_one(study, contestant, problems, text, config, options)
    wanted = measurement(problems, contestants[0], config)
    return summarise_sets(study, wanted.set_name(options), text, config, options)


def check_numbers(config: EvaluateConfig) -> None:
    """Refuse numbers that make no sense."""
    least = {"n": 1, "seeds": 1, "max_new_tokens": 1, "token_budget": 1, "shots": 0, "temperature": 0}
    for name, low in least.items():
        if getattr(config, name) < low:
            raise BadInput(f"--{name.replace('_', '-')} must be at least {low}, not {getattr(config, name)}.")
    if config.seeds > 1 and config.temperature == 0:
        raise BadInput("Several --seeds need a --temperature above 0; greedy responses are all the same.")


def read_plain_text(config: EvaluateConfig) -> str:
    """The text for the perplexity."""
    path = Path(config.plain_text or PLAIN_TEXT)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise BadInput(f"Cannot read {path} for --plain-text: {reason}.") from error
    if len(text.strip()) < 2:
        raise BadInput(f"There is no text in {path}; give --plain-text a file with at least a sentence.")
    return text


def measurement(problems: Sequence[Problem], contestant: Contestant, config: EvaluateConfig) -> Measurement:
    """What a contestant's samples depend on."""
    benchmarks: dict[str, int] = {}
    for problem in problems:
        benchmarks[problem.family] = benchmarks.get(problem.family, 0) + 1
    parts = [[p.family, p.id, p.question, p.gold, p.kind, p.options] for p in problems]
    limits = {name: getattr(config, name) for name in LIMITS}
    return Measurement(digest(parts), benchmarks, limits, config.token_budget, contestant.shots, contestant.off)


def choose_contestants(study: Study, config: EvaluateConfig) -> list[Contestant]:
    """The rows to evaluate, each checked to exist."""
    known = {
        "base": Contestant("base", ""),
        "base-3shot": Contestant("base-3shot", "", shots=config.shots),
        "adapter": Contestant("adapter", "adapter"),
        "full": Contestant("full", "full", full=True),
        "control-answers": Contestant("control-answers", "controls/answers"),
        "control-shuffled": Contestant("control-shuffled", "controls/shuffled"),
    }
    if config.models == "auto":
        chosen = [c for c in known.values() if (study.path / c.weights).exists()]
    else:
        names = list(dict.fromkeys(name.strip() for name in config.models.split(",")))
        if unknown := [name for name in names if name not in known]:
            raise BadInput(f"--models: there is no {unknown[0]!r}; choose from {', '.join(known)}.")
        chosen = [known[name] for name in names]
    for contestant in chosen:
        flag = (
            " --full"
            if contestant.full
            else f" --control {contestant.name[8:]}"
            if "control" in contestant.name
            else ""
        )
        study.require(contestant.weights or "study.json", f"lorascope train STUDY{flag}")
    for pattern in (p.strip() for p in config.off.split(",") if p.strip()):
        select(Adapter.load(study.require("adapter", "lorascope train STUDY")).addresses, pattern)
        chosen.append(Contestant(f"adapter-no-{pattern.replace('*', 'all')}", "adapter", off=pattern))
    return chosen


def evaluate_one(
    study: Study,
    contestant: Contestant,
    problems: Sequence[Problem],
    text: str,
    config: EvaluateConfig,
    options: Options,
) -> None:
    """One model's samples, kept in `eval/sets/SET/NAME.jsonl`, and its perplexity on plain text; done once each."""
    own = measurement(problems, contestant, config)
    output = sample_file(own.set_name(options), contestant.name)
    weights = [contestant.weights] if contestant.weights else []
    with ExitStack() as stack:
        load = cache(lambda: stack.enter_context(contestant_model(study, contestant, options)))

        def sampled() -> dict[str, Any]:
            model, renderer = load()
            rows = sample_rows(study, model, renderer, contestant, problems, config, options)
            write_samples(study.path / output, rows)
            return {"on": config.on, "n": config.n, "difficulty": config.difficulty}

        def plain() -> dict[str, Any]:
            model, renderer = load()
            return {"perplexity": plain_perplexity(model, renderer.tokenizer, text)}

        # The problems' digest and the limits are the config: what was asked for beside them changes no sample.
        stage = f"evaluate:{contestant.name}:{own.set_name(options)}"
        inputs = weights + (["traces/train.jsonl"] if contestant.shots else [])
        study.run(stage, own, options, inputs=inputs, outputs=[output], work=sampled)
        other = PlainText(digest(text), contestant.off)
        study.run(perplexity_stage(contestant.name), other, options, inputs=weights, outputs=[], work=plain)


def sample_file(set_name: str, model: str) -> str:
    """Where a model's samples of one set are in the study."""
    return f"eval/sets/{set_name}/{model}.jsonl"


def perplexity_stage(model: str) -> str:
    """The stage of a model's perplexity, which no prompt changes."""
    return f"perplexity:{model.removesuffix('-3shot')}"


@contextmanager
def contestant_model(study: Study, contestant: Contestant, options: Options) -> Iterator[tuple[Any, Renderer]]:
    """The live model of a row (attached, where it has an adapter) and the study's renderer."""
    source = str(study.path / contestant.weights) if contestant.full else study.model_name
    model, tokenizer = load_model(source, device=options.device, dtype=options.dtype)
    renderer = study.renderer(tokenizer)
    with ExitStack() as stack:
        stack.enter_context(prepacked_maps(model))
        if not contestant.weights or contestant.full:
            yield model, renderer
            return
        attached = stack.enter_context(attach(model, Adapter.load(study.path / contestant.weights)))
        if contestant.off:
            stack.enter_context(attached.edit(edits.off(contestant.off)))
        yield attached, renderer


def sample_rows(
    study: Study,
    model: Any,
    renderer: Renderer,
    contestant: Contestant,
    problems: Sequence[Problem],
    config: EvaluateConfig,
    options: Options,
) -> list[dict[str, Any]]:
    """Responses to all problems, scored: one row per problem and seed."""
    turns = shot_turns(study.traces("train"), contestant.shots, renderer, options.seed)
    prompts = [renderer.prompt_ids(problem.question, turns) for problem in problems]
    rows = []
    for number in range(config.seeds):
        sampling = Sampling(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=options.seed + 1_000_000 * number,
            token_budget=config.token_budget,
            thinking_budget=config.thinking_budget,
        )
        results = generate_batch(model, renderer, prompts, sampling, desc=f"evaluate {contestant.name}")
        for problem, result in zip(problems, results, strict=True):
            response = renderer.tokenizer.decode(result.ids, skip_special_tokens=False)
            verdict = score(problem, response)
            rows.append(
                {
                    "id": problem.id,
                    "benchmark": problem.family,
                    "seed": number,
                    "question": problem.question,
                    "gold": problem.gold,
                    "response": response,
                    "tokens": len(result.ids),
                    "finished": result.finished,
                    "extracted": verdict.extracted,
                    "correct": verdict.correct,
                }
            )
    return rows


def shot_turns(traces: Sequence[Trace], shots: int, renderer: Renderer, seed: int) -> list[dict[str, str]]:
    """Worked examples as earlier turns: other problems, drawn from the training traces, families in turn."""
    if not shots:
        return []
    rng = np.random.default_rng(seed)
    order = [traces[i] for i in rng.permutation(len(traces))]
    firsts: dict[str | None, Trace] = {}
    for trace in order:
        firsts.setdefault(trace.family, trace)
    # By question: an example that is there twice, or that has two responses, shows no more than once.
    distinct: dict[str, Trace] = {}
    for trace in [*firsts.values(), *order]:
        distinct.setdefault(trace.question, trace)
    chosen = list(distinct.values())[:shots]
    markup, turns = MARKUPS[renderer.markup], []
    for trace in chosen:
        thought = f"{markup.open}{trace.thinking}{markup.close}" if trace.thinking else ""
        turns += [
            {"role": "user", "content": trace.question},
            {"role": "assistant", "content": thought + trace.answer},
        ]
    return turns


@torch.no_grad()
def plain_perplexity(model: Any, tokenizer: Any, text: str, window: int = 512) -> float:
    """Perplexity per token of plain text, without a chat template, in windows of at most `window` tokens."""
    live = getattr(model, "model", model) if hasattr(model, "adapter") else model
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) < 2:
        raise BadInput("The text of --plain-text is one token long; give it a file with at least a sentence.")
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, window):
        part, _ = pad_ids([ids[start : start + window + 1]], 0)
        part = part.to(live.get_input_embeddings().weight.device)
        logits = live(input_ids=part[:, :-1], use_cache=False).logits[0].float()
        total += float(torch.nn.functional.cross_entropy(logits, part[0, 1:], reduction="sum"))
        count += part.shape[1] - 1
    return math.exp(total / count)


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The rows of one model's samples."""
    # Not splitlines: responses may hold line separators that JSON does not escape.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_samples(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write samples as JSON Lines."""
    atomic_write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def sample_facts(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts of one model's samples: shares, not percentages."""
    n = len(samples)
    return {
        "n": n,
        "accuracy": sum(s["correct"] for s in samples) / n,
        "unparsed": sum(s["extracted"] is None for s in samples) / n,
        "unfinished": sum(not s["finished"] for s in samples) / n,
        "mean_tokens": sum(s["tokens"] for s in samples) / n,
    }


def summarise_sets(study: Study, set_name: str, text: str, config: EvaluateConfig, options: Options) -> dict[str, Any]:
    """Recovery of the last call's set first, then of the benchmarks of other sets that were measured alike.

    A set's models are all that have samples of their weights as they are now, by whichever call.
    """
    sets = valid_sets(study, config.shots)
    current = how_measured(sets[set_name])
    others = sorted((name for name in sets if name != set_name), key=lambda name: newest(sets[name]), reverse=True)
    alike = [name for name in others if how_measured(sets[name]) == current]
    rows, samples = rows_of_sets(study, {name: sets[name] for name in [set_name, *alike]}, options.seed)
    facts = {model: sample_facts(read_samples(study.path / sample_file(set_name, model))) for model in sets[set_name]}
    details = {
        "base_prompt": rows[0]["measured"]["base_prompt"],
        "problems": rows[0]["n"],
        "models": [
            {"model": model} | own | {"perplexity": perplexity_of(study, model, text)} for model, own in facts.items()
        ],
        "settings": asdict(config),
        "not_shown": [
            benchmarks_of(sets[name]) | how_measured(sets[name])
            for name in others
            if name not in {row["measured"]["set"] for row in rows}
        ],
        "extraction": "the same lenient reader for every model; unparsed and unfinished answers count as wrong "
        "unless an answer could be read",
    }
    for model, kept in samples.items():
        write_samples(study.path / "eval" / f"{model}.jsonl", kept)
    for file in (study.path / "eval").glob("*.jsonl"):  # copies of samples that are behind these results no longer
        if file.stem not in samples and any(study.path.glob(sample_file("*", escape(file.stem)))):
            file.unlink()
    write_json(study.path / "eval" / "recovery.json", rows)
    write_json(study.path / "eval" / "details.json", details)
    return {"recovery": rows, "details": details}


def rows_of_sets(
    study: Study, sets: dict[str, Models], seed: int
) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """The rows of `recovery.json`, each benchmark by the first set that has it, and the samples behind them by model.

    The row `all` is over the first set alone: models of the others may not be the same.
    """
    rows: list[dict[str, Any]] = []
    samples: dict[str, list[dict[str, Any]]] = {}
    for name, models in sets.items():
        seen = {row["benchmark"] for row in rows}
        own = {
            model: [row for row in read_samples(study.path / sample_file(name, model)) if row["benchmark"] not in seen]
            for model in models
        }
        if not all(own.values()):
            continue
        found, base = recovery_rows(own, np.random.default_rng(seed))
        asked = next(iter(models.values()))["result"]
        measured = {"set": name, **asked, **how_measured(models), "base_prompt": base}
        rows += [row | {"measured": measured} for row in found if row["benchmark"] not in seen]
        for model, kept in own.items():
            samples.setdefault(model, []).extend(kept)
    return rows, samples


def valid_sets(study: Study, shots: int) -> dict[str, Models]:
    """The samples on disk whose weights are still the same, by set; few-shot ones only with so many examples."""
    sets: dict[str, Models] = {}
    for stage, record in study.manifest["stages"].items():
        kind, _, rest = stage.partition(":")
        model, _, set_name = rest.rpartition(":")
        if kind != "evaluate" or not model or record["config"]["shots"] not in (0, shots):
            continue
        if study.changes(record) == ([], []):
            sets.setdefault(set_name, {})[model] = record
    return {name: dict(sorted(models.items(), key=lambda item: place_of(item[0]))) for name, models in sets.items()}


def place_of(model: str) -> tuple[int, str]:
    """Where a model stands among others."""
    order = ["base", "base-3shot", "adapter", "full", "control-answers", "control-shuffled"]
    return (order.index(model) if model in order else len(order), model)


def how_measured(models: Models) -> dict[str, Any]:
    """What has to be the same for benchmarks to stand in one table."""
    record = next(iter(models.values()))
    return {**record["config"]["limits"], **record["options"]}


def benchmarks_of(models: Models) -> dict[str, Any]:
    """A set's benchmarks and its number of problems."""
    counts: dict[str, int] = next(iter(models.values()))["config"]["benchmarks"]
    return {"benchmarks": list(counts), "problems": sum(counts.values())}


def newest(models: Models) -> str:
    """When the last of a set's samples were made."""
    return max(str(record["finished"]) for record in models.values())


def perplexity_of(study: Study, model: str, text: str) -> float | None:
    """A model's perplexity on the text, if it was measured."""
    record = study.manifest["stages"].get(perplexity_stage(model))
    if not record or record["config"]["text"] != digest(text) or study.changes(record) != ([], []):
        return None
    return float(record["result"]["perplexity"])
