"""`lorascope new`: a study from a model, traces and, where there is one, an adapter."""

import hashlib
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorascope.adapter import Adapter
from lorascope.config import Options
from lorascope.errors import BadInput
from lorascope.models import load_tokenizer
from lorascope.study import Study, write_json
from lorascope.tasks import make_problems, read_weights, to_trace
from lorascope.traces import Trace, read_traces, write_traces


@dataclass(frozen=True)
class NewConfig:
    """Make a study from a model and traces: splits them into train and held-out, fixes how text is rendered."""

    model: str
    """Base model: hub id, folder, GGUF file, or the built-in smollm2-135m-instruct."""
    traces: str
    """Reasoning traces (JSON, JSON Lines, Parquet, gzip, hub:NAME), or tasks:multiply,chain,… to make them."""
    adapter: str = ""
    """Folder of a PEFT LoRA to study; without it, train one with lorascope train."""
    basis: str = "given"
    """Basis of an adapter of rank above 1: given (single rows mean little), or svd (the same change, exactly)."""
    heldout: float = 0.1
    """Share of the traces to hold out, or their number when above 1."""
    train_problems: int = 1000
    """With tasks: the number of training problems to make."""
    difficulty: int = 1
    """With tasks: difficulty from 1 to 5."""
    limit: int | None = None
    """Read only the first so many traces."""
    response_template: str = ""
    """For traces of plain text: the text after which the response begins."""
    system: str | None = None
    """The one system message of the study (default: the chat template's own)."""
    markup: str = "think"
    """How thinking is marked: think (<think>…</think>), think-blank-line, or s1."""
    max_tokens: int | None = None
    """Longest trace in tokens (default: no limit)."""
    too_long: str = "truncate"
    """What to do with longer traces: keep, truncate or drop. They are counted either way."""


def create_study(path: str | Path, config: NewConfig, options: Options) -> dict[str, Any]:
    """Make the study folder; on bad input nothing is left behind.

    Raises:
        BadInput: the folder exists, or the model, the traces or the adapter cannot be read.
    """
    if config.basis not in ("given", "svd"):
        raise BadInput(f"--basis is given or svd, not {config.basis!r}.")
    path = Path(path)
    existed = path.exists()
    study = Study.create(
        path,
        model=local_path(config.model),
        system=config.system,
        markup=config.markup,
        max_tokens=config.max_tokens,
        too_long=config.too_long,
        seed=options.seed,
    )
    try:
        return fill_study(study, config, options)
    except BaseException:
        shutil.rmtree(path)
        if existed:
            path.mkdir()
        raise


def fill_study(study: Study, config: NewConfig, options: Options) -> dict[str, Any]:
    """Write tokenizer, traces and adapter into an empty study; the counts of what went in."""
    train, heldout = split_source(config, options.seed)
    tokenizer = load_tokenizer(config.model)
    tokenizer.save_pretrained(study.path / "tokenizer")
    renderer = study.renderer(tokenizer)
    corpora, left_out = {}, 0
    for name, traces in (("train", train), ("heldout", heldout)):
        rendered, counts = renderer.render_all(traces)
        write_traces(study.corpus_file(name), traces)
        tokens = int(sum(len(r.ids) for r in rendered))
        corpora[name] = {"source": config.traces, "traces": len(traces), "tokens": tokens, "length_rule": counts}
    study.update_manifest(corpora=corpora)
    if config.adapter:
        whole = Adapter.load(config.adapter)
        adapter = whole.text_only()
        left_out = len(whole.modules) - len(adapter.modules)
        adapter = adapter.to_svd_basis() if config.basis == "svd" else adapter
        adapter.save(study.path / "adapter")
        study.update_manifest(adapter=config.adapter, basis=config.basis if adapter.basis_dependent else None)
    study.log(f"new: {corpora}")
    write_json(study.path / "summary.json", {})
    result = {"study": str(study.path), "corpora": corpora}
    if left_out:
        result["left_out"] = f"{left_out} modules of the adapter that text does not run through (vision or audio)"
        study.log(f"new: left out {result['left_out']}")
    return result


def split_source(config: NewConfig, seed: int) -> tuple[list[Trace], list[Trace]]:
    """(train, held-out) traces that share no question."""
    if config.traces.startswith("tasks:"):
        families = read_weights(config.traces.removeprefix("tasks:"))
        n_heldout = round(config.heldout if config.heldout > 1 else config.heldout * config.train_problems)
        level = config.difficulty
        train = make_problems(families, config.train_problems, seed, level, "train")
        heldout = make_problems(families, n_heldout, seed, level, "heldout")
        if bare := [p.family for p in (*train, *heldout) if not p.thinking and not p.answer]:
            raise BadInput(
                f"The task {bare[0]} has no worked traces to train on; leave it for lorascope evaluate STUDY --on "
                f"{bare[0]}."
            )
        return [to_trace(p) for p in train], [to_trace(p) for p in heldout]
    template = config.response_template or None
    return split_by_question(
        read_traces(config.traces, limit=config.limit, response_template=template), config.heldout, seed
    )


def split_by_question(traces: Sequence[Trace], heldout: float, seed: int) -> tuple[list[Trace], list[Trace]]:
    """Hold out whole questions (case and spacing aside), so that no question is on both sides.

    Raises:
        BadInput: too few different questions for both sides.
    """
    groups: dict[str, list[Trace]] = {}
    for trace in traces:
        key = re.sub(r"\s+", " ", f"{trace.raw_prompt or ''} {trace.question}").strip().lower()
        groups.setdefault(hashlib.sha256(key.encode()).hexdigest(), []).append(trace)
    if len(groups) < 2:
        raise BadInput(f"There are {len(groups)} different questions; a study needs at least 2 to hold one out.")
    wanted = heldout if heldout > 1 else heldout * len(traces)
    order = np.random.default_rng(seed).permutation(sorted(groups))
    held: set[str] = set()
    count = 0
    for key in order[:-1]:
        if count >= max(1, round(wanted)):
            break
        held.add(key)
        count += len(groups[key])
    train = [t for key in groups if key not in held for t in groups[key]]
    return train, [t for key in groups if key in held for t in groups[key]]


def local_path(model: str) -> str:
    """A folder or file as an absolute path, so that the study opens from anywhere; other names as they are."""
    return str(Path(model).resolve()) if Path(model).exists() else model
