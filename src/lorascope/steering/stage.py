"""The command `lorascope steer`: the same prompts answered with and without steering, side by side.

Every comparison is kept as `steering/DIGEST.json` in the study, DIGEST from what was asked; the study's record of the
stage is that of the newest.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorascope.adapter import Adapter
from lorascope.config import Options
from lorascope.errors import BadInput
from lorascope.generation import Sampling
from lorascope.progress import progress
from lorascope.steering.moves import Steer, check_moves
from lorascope.steering.panel import Panel, open_panel, stats_file
from lorascope.steering.passes import WHERE
from lorascope.steering.stream import Bench, open_bench, steer_stream
from lorascope.study import Study, atomic_write_text, digest, read_json, write_json
from lorascope.token_text import token_texts

Run = dict[str, Any]
SAE_WEIGHTS = "sae/sae_weights.safetensors"


@dataclass(frozen=True)
class SteerConfig:
    """Answer prompts with features pushed, scaled, clamped or off, and without, from the same seed."""

    feature: tuple[str, ...]
    """Feature to steer: L12.gate+, L12.gate-, sae.17. May be given several times."""
    amount: tuple[float, ...] = ()
    """How much: in units of the feature's 99th percentile of firing activations (add, clamp), or a factor (scale). Once
    for all features, or once for each; off takes none."""
    mode: tuple[str, ...] = ("add",)
    """add, scale, clamp or off. Once for all features, or once for each."""
    prompt: tuple[str, ...] = ()
    """A user's message to answer. May be given several times."""
    prompt_file: str | None = None
    """File with one prompt per line; in a .jsonl file a line is a text, or an object with prompt or question."""
    where: str = "generated"
    """Which tokens to edit: generated (the first of them, which the prompt predicts, stays what it was), or all (the
    prompt too)."""
    max_new_tokens: int = 128
    """Longest response."""
    temperature: float = 0.0
    """0 is greedy; else both responses draw the same noise at every step."""
    watch: tuple[str, ...] = ()
    """Further feature whose activations to report. May be given several times."""
    compare: bool = True
    """Also answer with the same moves along random vectors of the same length, and from the base model; --no-compare
    leaves both out."""
    corpus: str = "train"
    """Corpus whose examples give the 99th percentiles."""


def steer_text(study: Study, config: SteerConfig, options: Options) -> dict[str, Any]:
    """The stage.

    Returns:
        `{"file", "steers": [{"feature", "mode", "amount", "p99", "change", "unit"}], "settings", "prompts": [{"prompt",
        "runs", "first_difference"}]}`. `change` is the amount in the feature's own unit. Runs are `plain`, `steered`
        and, where to compare, `control` and `base`, each `{"text", "finished", "token_ids", "tokens", "activations":
        {feature: one number per token}}`; without --json only their text and `finished`. `first_difference` is the
        first token at which a run is not the plain one's, None when there is none.

    Raises:
        BadInput: a feature, an option or the file of prompts is wrong.
        MissingStage: adapter, SAE or examples are missing.
    """
    steers, prompts = planned_steers(config), read_prompts(config)
    if config.max_new_tokens < 1 or config.temperature < 0:
        raise BadInput("--max-new-tokens must be at least 1 and --temperature at least 0.")
    if config.where not in WHERE:
        raise BadInput(f"--where is {' or '.join(WHERE)}, not {config.where!r}.")
    folder = study.require("adapter/adapter_config.json", "lorascope train STUDY").parent
    panel = open_panel(study, Adapter.load(folder), config.corpus)
    check_moves(panel, steers)
    watch = list(dict.fromkeys([steer.feature for steer in steers] + list(config.watch)))
    for feature in watch:
        panel.place(feature)
    used = ["adapter", *(stats_file(config.corpus, kind) for kind in ("direction", "latent")), SAE_WEIGHTS]
    asked = asdict(config) | {"prompts": prompts, "options": [options.seed, options.dtype]}
    file = f"steering/{name_of(asked)}.json"
    unfinished = study.path / f"steering/.{name_of([asked, *map(study.fingerprint, used)])}.jsonl"

    def work() -> dict[str, Any]:
        rows = finished_rows(unfinished)
        settings = {name: getattr(config, name) for name in ("where", "max_new_tokens", "temperature", "corpus")}
        with open_bench(study, options, config.corpus) as bench:
            for prompt in progress(prompts[len(rows) :], len(prompts) - len(rows), "steer", "prompt"):
                rows.append(compare_runs(bench, prompt, steers, watch, config, options.seed))
                keep_row(unfinished, rows[-1])
        about = {"file": file, "steers": described(panel, steers), "settings": settings | {"seed": options.seed}}
        write_json(study.path / file, about | {"prompts": rows})
        unfinished.unlink()
        return {"file": file, "prompts": len(rows)}

    study.run("steer", config, options, inputs=used, outputs=[file], work=work)
    result: dict[str, Any] = read_json(study.path / file)
    return result if options.json else headline(result)


def name_of(asked: Any) -> str:
    """A short name for all that a result depends on."""
    return digest(json.loads(json.dumps(asked)))[:12]


def finished_rows(path: Path) -> list[dict[str, Any]]:
    """The prompts that a run which was cut off had answered; half a last line is cut away."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    atomic_write_text(path, "".join(line + "\n" for line in lines))
    return [json.loads(line) for line in lines]


def keep_row(path: Path, row: dict[str, Any]) -> None:
    """Append an answered prompt."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def planned_steers(config: SteerConfig) -> list[Steer]:
    """One move per --feature.

    Raises:
        BadInput: amounts or modes do not fit the features.
    """
    count = len(config.feature)
    modes = one_each("--mode", config.mode, count)
    pushed = [i for i, mode in enumerate(modes) if mode != "off"]
    if config.amount and not pushed:
        raise BadInput("--mode off takes no --amount; leave it out.")
    if pushed and not config.amount:
        raise BadInput("--amount is required for the modes add, scale and clamp; see --help.")
    amounts = one_each("--amount", config.amount, len(pushed)) if pushed else []
    given = dict(zip(pushed, amounts, strict=True))
    return [Steer(config.feature[i], given.get(i, 0.0), modes[i]) for i in range(count)]


def one_each(flag: str, values: Sequence[Any], count: int) -> list[Any]:
    """One value per feature, from one for all or one for each."""
    if len(values) not in (1, count):
        raise BadInput(f"{flag} is given {len(values)} times for {count} features; give it once, or once for each.")
    return list(values) * (count if len(values) == 1 else 1)


def read_prompts(config: SteerConfig) -> list[str]:
    """All prompts asked for.

    Raises:
        BadInput: there is none, or the file cannot be read as such.
    """
    prompts = list(config.prompt)
    if config.prompt_file is not None:
        path = Path(config.prompt_file)
        try:
            lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"Cannot read the prompts in {path} ({error}).") from error
        prompts += [json_prompt(path, line) for line in lines] if path.suffix == ".jsonl" else lines
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise BadInput("There is no prompt to answer; give --prompt TEXT or --prompt-file FILE.")
    return prompts


def json_prompt(path: Path, line: str) -> str:
    """The prompt in a line of a .jsonl file."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise BadInput(f"{path} has a line that is not JSON: {line[:60]!r}.") from error
    text = row.get("prompt", row.get("question")) if isinstance(row, dict) else row
    if not isinstance(text, str):
        raise BadInput(f"{path} has a line without a prompt: {line[:60]!r}; give a text, or an object with `prompt`.")
    return text


def compare_runs(
    bench: Bench, prompt: str, steers: Sequence[Steer], watch: Sequence[str], config: SteerConfig, seed: int
) -> dict[str, Any]:
    """One prompt's row of the result."""
    sampling = Sampling(config.max_new_tokens, temperature=config.temperature, seed=seed)
    wanted: dict[str, tuple[str, Sequence[Steer]]] = {"plain": ("adapter", ()), "steered": ("adapter", steers)}
    if config.compare:
        wanted |= {"control": ("control", steers), "base": ("base", ())}
    ids = bench.renderer.prompt_ids(prompt)
    runs: dict[str, Run] = {}
    for name, (target, moves) in wanted.items():
        stream = steer_stream(
            bench, ids, steers=moves, watch=watch, target=target, where=config.where, sampling=sampling
        )
        runs[name] = as_run(bench, list(stream), watch)
    plain = runs["plain"]["token_ids"]
    parts = {name: first_difference(plain, run["token_ids"]) for name, run in runs.items() if name != "plain"}
    return {"prompt": prompt, "runs": runs, "first_difference": parts}


def as_run(bench: Bench, tokens: Sequence[Any], watch: Sequence[str]) -> Run:
    """Streamed tokens as one run; the token that ends the turn is not part of the text."""
    finished = bool(tokens) and tokens[-1]["end"]
    ids = [token["token_id"] for token in tokens]
    texts = token_texts(bench.renderer.tokenizer, ids)
    return {
        "text": "".join(texts[:-1] if finished else texts),
        "finished": finished,
        "token_ids": ids,
        "tokens": texts,
        "activations": {feature: [token["activations"][feature] for token in tokens] for feature in watch},
    }


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first place at which two runs differ, None when they are the same."""
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return None if same == len(one) == len(other) else same


def described(panel: Panel, steers: Sequence[Steer]) -> list[dict[str, Any]]:
    """The moves with what their amounts mean."""
    rows = []
    for steer in steers:
        by_unit = steer.mode in ("add", "clamp")
        p99 = panel.p99.get(steer.feature)
        unit = "code" if panel.place(steer.feature).latent else "effect"
        change = steer.amount * panel.unit(steer.feature) if by_unit else None
        rows.append(asdict(steer) | {"p99": p99, "unit": unit, "change": change})
    return rows


def headline(result: dict[str, Any]) -> dict[str, Any]:
    """The result without what is per token, which is in its file."""
    prompts = [
        row | {"runs": {name: {k: run[k] for k in ("text", "finished")} for name, run in row["runs"].items()}}
        for row in result["prompts"]
    ]
    return result | {"prompts": prompts}
