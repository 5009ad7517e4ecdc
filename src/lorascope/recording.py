"""Recording: every direction's scalar on every token of a corpus, into the scalar store.

One forward pass of the trunk (no LM head) over right-padded batches planned by length. Shape legend: B traces of
a batch, T tokens, N directions, D hidden width.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorascope.adapter import AdaptedModule, Adapter
from lorascope.attached import Attached, attach, find_module
from lorascope.config import Options
from lorascope.edits import Edit
from lorascope.errors import BadInput, RunFailed
from lorascope.fused import fused_reading
from lorascope.memory import choose_budget
from lorascope.models import load_model, load_tokenizer
from lorascope.progress import progress
from lorascope.store import INDEX, PLAN, Store, read_json, store_folder
from lorascope.store_writer import StorePlan, StoreWriter, plan_shards
from lorascope.study import Study, write_json
from lorascope.traces import Rendered, pad_ids, plan_batches, read_traces, write_traces

SINK_RATIO = 10.0
"""A token is an attention sink when its hidden state entering the middle decoder layer is this many times longer
than its trace's median. Massive activations stand far off: 90 to 170 times on the default model, where every
other token stays below 2 (docs/log.md)."""
SHARD_TOKENS = 1 << 16  # at most this much work is lost when a run is cut off
MAX_SHARDS = 256  # each is an open file of every reader
OUTPUT_RMS = "output_rms.json"
"""Beside the adapter's store: how long the base's own outputs are, from `OUTPUT_TRACES` traces."""
OUTPUT_TRACES = 16


@dataclass(frozen=True)
class RecordConfig:
    """Record every direction's scalar on every token of a corpus."""

    corpus: str = "train"
    """Corpus to record: train, heldout, or a new name given with --traces."""
    traces: str | None = None
    """Traces of a new corpus: JSON, JSON Lines, Parquet, gzip, or hub:NAME."""
    response_template: str = ""
    """For traces of plain text: the text after which the response begins."""
    source: str = "adapter"
    """Whose scalars, comma-separated: adapter, or base (the same read vectors on the base model's run)."""
    token_budget: int | None = None
    """Most tokens in a batch, padding included; a longer trace is a batch of its own (default: by free memory)."""
    max_tokens: int | None = None
    """Longest trace in tokens (default: the study's)."""
    too_long: str | None = None
    """What to do with longer traces: keep, truncate or drop (default: the study's rule)."""
    limit: int | None = None
    """Record only the first so many traces."""


def record(study: Study, config: RecordConfig, options: Options) -> dict[str, Any]:
    """Record a corpus from one or more sources; `{"corpus", "sources": {source: counts}}`.

    Raises:
        BadInput: an unknown source or corpus, or no trace left.
        MissingStage: there is no adapter yet.
        RunFailed: a scalar is not finite.
    """
    sources = list(dict.fromkeys(part.strip() for part in config.source.split(",")))
    for source in sources:
        if source not in SOURCES:
            raise BadInput(f"There is no source {source!r}; choose from {', '.join(SOURCES)}.")
    if min(1 if value is None else value for value in (config.token_budget, config.limit)) < 1:
        raise BadInput("--token-budget and --limit must be at least 1.")
    if config.response_template and config.traces is None:
        raise BadInput("--response-template goes with --traces: recorded corpora are split already.")
    study.require("adapter/adapter_config.json", "lorascope train STUDY")
    if config.traces is not None:
        add_corpus(study, config)
    study.traces(config.corpus)  # an unknown corpus is named before a model is loaded
    load = cache(lambda: load_model(study.model_name, device=options.device, dtype=options.dtype))
    results: dict[str, Any] = {}
    for source in sources:
        alone = replace(config, source=source, traces=None, response_template="")

        def work(alone: RecordConfig = alone) -> dict[str, Any]:
            model, tokenizer = load()
            return record_source(study, alone, model, tokenizer)

        results[source] = study.run(
            f"record:{config.corpus}:{source}",
            alone,
            options,
            inputs=[f"traces/{config.corpus}.jsonl", "adapter"],
            outputs=[f"scalars/{config.corpus}/{source}/{name}" for name in written(source)],
            work=work,
        )
    study.summarise({"recording": {config.corpus: results}})
    return {"corpus": config.corpus, "sources": results}


def written(source: str) -> list[str]:
    """What tells that a source's store is whole."""
    return ["index.json", OUTPUT_RMS] if source == "adapter" else ["index.json"]


def add_corpus(study: Study, config: RecordConfig) -> None:
    """Read traces of any format and keep them, normalised, as a corpus of the study.

    Raises:
        BadInput: train and held-out traces are fixed when the study is made.
    """
    if config.corpus in ("train", "heldout"):
        raise BadInput("The corpora train and heldout were fixed with the study; give --traces another --corpus.")
    assert config.traces is not None
    file = study.corpus_file(config.corpus)
    traces = read_traces(config.traces, limit=config.limit, response_template=config.response_template or None)
    _, counts = study.renderer(load_tokenizer(study.model_name)).render_all(traces)
    file.parent.mkdir(exist_ok=True)
    write_traces(file, traces)
    entry = {"source": config.traces, "traces": len(traces), "length_rule": counts}
    study.update_manifest(corpora={config.corpus: entry})


def record_source(study: Study, config: RecordConfig, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Record a corpus of the study from one source; the counts of what went in."""
    renderer = study.renderer(tokenizer)
    changed: dict[str, Any] = {"max_tokens": config.max_tokens, "too_long": config.too_long}
    renderer = replace(renderer, **{key: value for key, value in changed.items() if value is not None})
    rendered, length_rule = renderer.render_all(study.traces(config.corpus)[: config.limit])
    if not rendered:
        raise BadInput(f"No trace of {config.corpus} is left to record; raise --max-tokens or give other traces.")
    adapter = Adapter.load(study.path / "adapter")
    folder = store_folder(study.path, config.corpus, config.source)
    text = text_fingerprint(rendered)
    budget = config.token_budget or begun_budget(folder, text) or choose_budget(adapter, model.device, model.dtype)
    about = {
        "corpus": config.corpus,
        "source": config.source,
        "model": study.model_name,
        "dtype": str(model.dtype),
        "adapter": study.fingerprint("adapter"),
        "text": text,
        "token_budget": budget,
        "length_rule": length_rule,
        "sink_rule": {
            "ratio": SINK_RATIO,
            "layer": len(decoder_layers(model, adapter)) // 2,
            "over": "median norm in trace",
        },
    }
    plan = plan_recording(adapter, rendered, budget, about)
    with attach(model, adapter) as attached, fused_reading(attached):
        counts = fill_store(folder, plan, rendered, attached, SOURCES[config.source], config.corpus)
        if config.source == "adapter":
            write_json(folder / OUTPUT_RMS, output_rms(attached, rendered, Store.open(folder)))
    return counts | {"length_rule": length_rule, "sink_rule": about["sink_rule"]}


def begun_budget(folder: Path, text: str) -> int | None:
    """The token budget of a recording of this text that was begun here: a run that continues plans the same batches.

    None where nothing was begun, where it was finished, or where no shard of it is done (it may have lacked memory).
    """
    if (folder / INDEX).exists() or not any(folder.glob("shard-*.safetensors")):
        return None
    try:
        about = read_json(folder / PLAN)["about"]
        return int(about["token_budget"]) if about["text"] == text else None
    except (RunFailed, KeyError, TypeError, ValueError):
        return None


def text_fingerprint(rendered: list[Rendered]) -> str:
    """SHA-256 of all token ids and segments."""
    digest = hashlib.sha256()
    for item in rendered:
        digest.update(len(item.ids).to_bytes(8, "little") + item.ids.tobytes() + item.segments.tobytes())
    return digest.hexdigest()


def plan_recording(adapter: Adapter, rendered: list[Rendered], token_budget: int, about: dict[str, Any]) -> StorePlan:
    """Which traces share a shard and a batch: shards in the corpus's order, batches by length within a shard."""
    lengths = [len(item.ids) for item in rendered]
    ranges = plan_shards(lengths, max(SHARD_TOKENS, -(-sum(lengths) // MAX_SHARDS)))
    return StorePlan(
        addresses=adapter.addresses,
        effect_per_scalar=[float(x) for x in adapter.effect_per_scalar],
        trace_ids=[item.trace_id for item in rendered],
        lengths=lengths,
        response_starts=[int(item.response_start) for item in rendered],
        shards=[
            [[first + i for i in batch] for batch in plan_batches(lengths[first:stop], token_budget)]
            for first, stop in ranges
        ],
        about=about,
    )


@torch.inference_mode()
def output_rms(attached: Attached, rendered: list[Rendered], store: Store) -> dict[str, Any]:
    """How long the base's own output is where each direction writes: `{"address", "rms", "tokens"}`, lists of N.

    `rms` is the root mean square of ‖W·x‖, without a bias, in the adapted model's run, over the ordinary tokens of
    `OUTPUT_TRACES` spread traces. An effect relative to it can be compared across types, whose spaces differ.
    """
    modules = attached.adapter.modules
    squares, tokens = np.zeros(len(modules)), 0
    kept_T = torch.zeros(0, dtype=torch.bool)

    def measure(number: int, part: AdaptedModule, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        z_TR = inputs[0][0].float() @ part.a_RI.T.to(output.device)
        base_TO = output[0].float() - part.scale * z_TR @ part.b_OR.T.to(output.device)
        bias_O = getattr(find_module(attached.model, part), "bias", None)
        base_TO = base_TO if bias_O is None else base_TO - bias_O.float()
        squares[number] += float(base_TO[kept_T.to(output.device)].pow(2).sum())

    with ExitStack() as stack:
        for number, part in enumerate(modules):
            hook = find_module(attached.model, part).register_forward_hook(
                lambda _, inputs, output, number=number, part=part: measure(number, part, inputs, output)
            )
            stack.callback(hook.remove)
        for i in range(0, len(rendered), -(-len(rendered) // OUTPUT_TRACES)):
            kept_T = torch.from_numpy(store.ordinary[store.offsets[i] : store.offsets[i + 1]])
            tokens += int(kept_T.sum())
            attached.trunk([rendered[i].ids.tolist()])
    rms = np.sqrt(squares / max(tokens, 1))
    per_direction = [float(value) for value, part in zip(rms, modules, strict=True) for _ in range(part.rank)]
    return {"address": attached.addresses, "rms": per_direction, "tokens": tokens}


Read = Callable[[Attached, Tensor], Tensor]
"""Scalars [B, T, N] fp32 of a batch of ids [B, T]."""


def fill_store(
    folder: Path, plan: StorePlan, rendered: list[Rendered], attached: Attached, read: Read, name: str
) -> dict[str, Any]:
    """Run the model over all shards that are not on disk yet and finish the store; returns its counts.

    A full shard is written while the model runs on, so at most two are in memory.
    """
    writer = StoreWriter(folder, plan)
    work = [(shard, batch) for shard in writer.missing() for batch in plan.shards[shard]]
    shard, written = None, Future[None]()
    written.set_result(None)
    with ThreadPoolExecutor(1) as pool:
        for number, batch in progress(work, total=len(work), desc=f"record {name}", unit="batch"):
            if shard is None:
                shard = writer.begin(number)
            if written.done():
                written.result()  # a full disk is told at once, not after the next shard
            put = read_batch(attached, [rendered[i] for i in batch], read)
            if writer.scale_N is None:
                writer.calibrate(np.max([np.abs(z_TN).max(axis=0) for z_TN, _ in put], axis=0))
            for i, (z_TN, sink_T) in zip(batch, put, strict=True):
                writer.put(shard, i, z_TN, rendered[i].ids, rendered[i].segments, sink_T)
            if batch is plan.shards[number][-1]:
                written.result()
                written, shard = pool.submit(writer.commit, shard), None
        written.result()
    return writer.finish()


@torch.inference_mode()
def read_batch(attached: Attached, batch: list[Rendered], read: Read) -> list[tuple[Any, Any]]:
    """Scalars [T, N] float32 and sink flags [T] of each trace of a batch, as on its own."""
    ids_BT, lengths_B = pad_ids([item.ids for item in batch], 0)
    with middle_norms(decoder_layers(attached.model, attached.adapter)) as norms:
        z_BTN = read(attached, ids_BT).float().cpu().numpy()
    norms_BT = norms[0].cpu().numpy()
    lengths = lengths_B.tolist()
    return [(z_BTN[i, :n], is_sink(norms_BT[i, :n])) for i, n in enumerate(lengths)]


def is_sink(norms_T: Any) -> Any:
    """Which tokens of one trace are attention sinks, bool [T]."""
    return norms_T > SINK_RATIO * np.median(norms_T)


@contextmanager
def middle_norms(layers: nn.ModuleList) -> Iterator[list[Tensor]]:
    """Collect the norms [B, T] fp32 of the hidden states that enter the middle decoder layer."""
    norms: list[Tensor] = []

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_BTD: Tensor = args[0] if args else kwargs["hidden_states"]
        norms.append(torch.linalg.vector_norm(hidden_BTD, dim=-1, dtype=torch.float32))

    handle = layers[len(layers) // 2].register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield norms
    finally:
        handle.remove()


def decoder_layers(model: nn.Module, adapter: Adapter) -> nn.ModuleList:
    """The list of decoder layers that the adapter's modules are in.

    Raises:
        BadInput: the adapter has no module in a numbered layer.
    """
    for module in adapter.modules:
        match = re.match(r"(.*?)\.\d+\.", module.path)
        if match and isinstance(layers := model.get_submodule(match[1]), nn.ModuleList):
            return layers
    raise BadInput("The adapter adapts no numbered decoder layer; lorascope cannot tell attention sinks in it.")


def adapter_scalars(attached: Attached, ids_BT: Tensor) -> Tensor:
    """The adapted model's scalars [B, T, N]."""
    return attached.trunk(ids_BT).scalars


def base_scalars(attached: Attached, ids_BT: Tensor) -> Tensor:
    """What the read vectors see in the base model's run, [B, T, N]: every scalar is read, then set to zero."""
    seen: list[tuple[Tensor, Tensor]] = []

    def read_and_stop(z_BTn: Tensor, columns: Tensor) -> Tensor:
        seen.append((columns, z_BTn))
        return torch.zeros_like(z_BTn)

    with attached.edit(Edit("*", read_and_stop)):
        stopped_BTN = attached.trunk(ids_BT).scalars
    z_BTN = torch.empty_like(stopped_BTN)
    for columns, z_BTn in seen:
        z_BTN[..., columns.to(z_BTN.device)] = z_BTn.to(z_BTN.device)
    return z_BTN


SOURCES: dict[str, Read] = {"adapter": adapter_scalars, "base": base_scalars}
