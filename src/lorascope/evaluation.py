"""`lorascope evaluate`: accuracy of base, adapter and full finetune on the same problems, and the recovery.

Every response is kept in `eval/MODEL.jsonl`; `eval/recovery.json` and `eval/details.json` are computed from them.
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorascope import edits
from lorascope.adapter import Adapter
from lorascope.attached import attach
from lorascope.config import Options
from lorascope.errors import BadInput
from lorascope.generation import Sampling, generate_batch
from lorascope.models import load_model
from lorascope.recovery import recovery_rows
from lorascope.study import Study, atomic_write_text, write_json
from lorascope.tasks import FAMILIES, Problem, make_problems, read_questions, read_weights, score
from lorascope.traces import MARKUPS, Renderer, Trace, pad_ids

PLAIN_TEXT = Path(__file__).parent / "plain_text.txt"


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure accuracy of the base model, the adapter and the full finetune on the same problems."""

    on: str
    """What to evaluate on: task families (chain=2,letters), rg:NAME, or files of questions and answers."""
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


def evaluate(study: Study, config: EvaluateConfig, options: Options) -> dict[str, Any]:
    """Generate, score, keep every sample, compute recovery.

    Raises:
        BadInput: unknown tasks or models, or unreadable files.
        MissingStage: a model that was asked for is not trained.
    """
    if config.seeds > 1 and config.temperature == 0:
        raise BadInput("Several --seeds need a --temperature above 0; greedy responses are all the same.")
    problems = gather_problems(config, options.seed)
    contestants = choose_contestants(study, config)
    for contestant in contestants:
        evaluate_one(study, contestant, problems, config, options)
    names = [contestant.name for contestant in contestants]
    samples = {name: read_samples(study.path / "eval" / f"{name}.jsonl") for name in names}
    rows, chosen = recovery_rows(samples, np.random.default_rng(options.seed))
    records = study.manifest["stages"]
    details = {
        "base_prompt": chosen,
        "problems": len(problems),
        "models": [
            {"model": name} | sample_facts(samples[name]) | records[f"evaluate:{name}"]["result"] for name in names
        ],
        "settings": asdict(config),
        "extraction": "the same lenient reader for every model; unparsed and unfinished answers count as wrong "
        "unless an answer could be read",
    }
    write_json(study.path / "eval" / "recovery.json", rows)
    write_json(study.path / "eval" / "details.json", details)
    return {"recovery": rows, "details": details}


def gather_problems(config: EvaluateConfig, seed: int) -> list[Problem]:
    """The problems of all named tasks and files. Problems of families are from their held-out side."""
    names = [name.strip() for name in config.on.split(",") if name.strip()]
    files = [name for name in names if Path(name).suffix in (".jsonl", ".json", ".gz", ".parquet")]
    families = read_weights(",".join(name for name in names if name not in files)) if len(names) > len(files) else {}
    unknown = [name for name in families if name not in FAMILIES and not name.startswith("rg:")]
    if unknown or not names:
        raise BadInput(
            f"--on {config.on!r}: there is no task or file {(unknown or [''])[0]!r}; tasks are {', '.join(FAMILIES)}."
        )
    problems = make_problems(families, config.n, seed, config.difficulty, "heldout") if families else []
    for file in files:
        read = read_questions(file, seed)
        order = np.random.default_rng(seed).permutation(len(read))[: config.n]
        problems += [replace(read[i], family=Path(file).name.split(".")[0]) for i in sorted(order)]
    return problems


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
        names = [name.strip() for name in config.models.split(",")]
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
        study.require("adapter", "lorascope train STUDY")
        chosen.append(Contestant(f"adapter-no-{pattern.replace('*', 'all')}", "adapter", off=pattern))
    return chosen


def evaluate_one(
    study: Study, contestant: Contestant, problems: Sequence[Problem], config: EvaluateConfig, options: Options
) -> dict[str, Any]:
    """One model's samples, kept in `eval/NAME.jsonl`; its perplexity on plain text as the result."""
    output = f"eval/{contestant.name}.jsonl"

    def work() -> dict[str, Any]:
        with contestant_model(study, contestant, options) as (model, renderer):
            rows = sample_rows(study, model, renderer, contestant, problems, config, options)
            text = Path(config.plain_text or PLAIN_TEXT).read_text(encoding="utf-8")
            perplexity = plain_perplexity(model, renderer.tokenizer, text)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        atomic_write_text(study.path / output, "".join(lines))
        return {"perplexity": perplexity}

    inputs = ["traces/train.jsonl"] + ([contestant.weights] if contestant.weights else [])
    # The models that were asked for beside this one do not change its samples.
    own = replace(config, models="", off=contestant.off)
    return study.run(f"evaluate:{contestant.name}", own, options, inputs=inputs, outputs=[output], work=work)


@contextmanager
def contestant_model(study: Study, contestant: Contestant, options: Options) -> Iterator[tuple[Any, Renderer]]:
    """The live model of a row (attached, where it has an adapter) and the study's renderer."""
    source = str(study.path / contestant.weights) if contestant.full else study.model_name
    model, tokenizer = load_model(source, device=options.device, dtype=options.dtype)
    renderer = study.renderer(tokenizer)
    if not contestant.weights or contestant.full:
        yield model, renderer
        return
    with attach(model, Adapter.load(study.path / contestant.weights)) as attached:
        if contestant.off:
            with attached.edit(edits.off(contestant.off)):
                yield attached, renderer
        else:
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
    chosen = ([*firsts.values(), *order])[:shots]
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
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


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
