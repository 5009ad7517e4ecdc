"""Recording: every direction's scalar on every token of a corpus, into the scalar store.

One forward pass of the trunk (no LM head) over batches planned by length, which a CPU lays end to end instead of
padding them where the model allows it; sources that are read while the adapted model runs share it. Shape legend: B
traces of a batch, T tokens, N columns (directions; neurons).
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorascope.adapter import AdaptedModule, Adapter
from lorascope.attached import Attached, attach, decoder_layers, find_module
from lorascope.config import Options
from lorascope.controls import (
    Probe,
    adapter_probe,
    neuron_probe,
    probing,
    random_addresses,
    random_control,
    untrained_control,
)
from lorascope.errors import BadInput, RunFailed
from lorascope.fused_reading import fused_reading
from lorascope.memory import choose_budget
from lorascope.models import load_model, load_tokenizer
from lorascope.packing import prepare_packing
from lorascope.progress import progress
from lorascope.sinks import SINK_RATIO, is_sink, middle_norms
from lorascope.store import INDEX, PLAN, Store, read_json, store_folder
from lorascope.store_writer import Shard, StorePlan, StoreWriter, part_folder, plan_shards
from lorascope.study import Study, whole_folder, write_json
from lorascope.traces import Rendered, pad_ids, plan_batches, read_traces, write_traces

SHARD_TOKENS = 1 << 16  # whatever the corpus: two are in memory, and at most one is lost when a run is cut off
OUTPUT_RMS = "output_rms.json"
"""Beside the adapter's store: how long the base's own outputs are, from `OUTPUT_TRACES` traces."""
OUTPUT_TRACES = 16
MADE = ("random", "untrained")
"""Controls that are adapters of their own, made once for a study."""
SOURCES = ("adapter", "base", *MADE, "neurons")


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
    """What to read, comma-separated: adapter; base (the same read vectors on the base model's run); or controls in the
    adapted model's run: random, untrained (the read vectors of step 0), neurons."""
    token_budget: int | None = None
    """Most tokens in a batch, padding included; a longer trace is a batch of its own (default: by free memory)."""
    max_tokens: int | None = None
    """Longest trace in tokens (default: the study's)."""
    too_long: str | None = None
    """What to do with longer traces: keep, truncate or drop (default: the study's rule)."""
    limit: int | None = None
    """Record only the first so many traces."""


@dataclass(frozen=True)
class ControlConfig:
    """What `controls/NAME` was made as."""

    control: str
    """random or untrained."""


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
    study.each_trace(config.corpus)  # an unknown corpus is named before a model is loaded
    load = cache(lambda: load_model(study.model_name, device=options.device, dtype=options.dtype))
    for name in sources:
        if name in MADE:
            make_control(study, name, options, load)
    # Chosen once, so that sources recorded together are planned in the same batches.
    choose = cache(lambda: shared_budget(study, sources, load()[0]))
    results: dict[str, Any] = {}
    for source in sources:
        alone = replace(config, source=source, traces=None, response_template="")
        together = [source] if source == "base" else [source, *(s for s in sources if s not in ("base", source))]

        def work(alone: RecordConfig = alone, together: list[str] = together) -> dict[str, Any]:
            model, tokenizer = load()
            return record_sources(study, alone, together, model, tokenizer, choose, options.seed)

        results[source] = study.run(
            f"record:{config.corpus}:{source}",
            alone,
            options,
            inputs=[f"traces/{config.corpus}.jsonl", "adapter", *([f"controls/{source}"] if source in MADE else [])],
            outputs=[f"scalars/{config.corpus}/{source}/{name}" for name in written(source)],
            work=work,
        )
    study.summarise({"recording": {config.corpus: results}})
    return {"corpus": config.corpus, "sources": results}


def shared_budget(study: Study, sources: Sequence[str], model: Any) -> int:
    """Padded tokens per pass by free memory, if all sources but the base are read in one."""
    adapter = Adapter.load(study.path / "adapter")
    columns = {"random": len(random_addresses(adapter)), "untrained": len(adapter.addresses)}
    columns["neurons"] = len(adapter.addresses)  # at most
    return choose_budget(adapter, model.device, model.dtype, sum(columns.get(name, 0) for name in sources))


def make_control(study: Study, name: str, options: Options, load: Callable[[], tuple[Any, Any]]) -> None:
    """Write the adapter of a control to `controls/NAME`, once for all corpora."""

    def work() -> dict[str, Any]:
        model, tokenizer = load()
        adapter = Adapter.load(study.path / "adapter")
        if name == "untrained":
            made = untrained_control(study, model, adapter)
        else:
            rendered, _ = study.renderer(tokenizer).render_all(study.each_trace("train"))
            with attach(model, adapter) as attached, fused_reading(attached):
                made = random_control(attached, rendered, options.seed)
        with whole_folder(study.path / "controls" / name) as new:
            made.save(new)
        return {"directions": len(made.addresses)}

    study.run(
        f"control:{name}",
        ControlConfig(name),
        options,
        inputs=["adapter", "traces/train.jsonl"],
        outputs=[f"controls/{name}"],
        work=work,
    )


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


def record_sources(
    study: Study,
    config: RecordConfig,
    sources: list[str],
    model: Any,
    tokenizer: Any,
    choose: Callable[[], int],
    seed: int,
) -> dict[str, Any]:
    """Record a corpus of the study from the first of some sources; the counts of what went in.

    `choose` gives the token budget where none is given or begun.

    The other sources' stores are filled in the same pass where they are planned in the same batches, so that their
    own turn finds them done.
    """
    renderer = study.renderer(tokenizer)
    changed: dict[str, Any] = {"max_tokens": config.max_tokens, "too_long": config.too_long}
    renderer = replace(renderer, **{key: value for key, value in changed.items() if value is not None})
    rendered, length_rule = renderer.render_all(islice(study.each_trace(config.corpus), config.limit))
    if not rendered:
        raise BadInput(f"No trace of {config.corpus} is left to record; raise --max-tokens or give other traces.")
    adapter = Adapter.load(study.path / "adapter")
    text = text_fingerprint(rendered)
    layers = len(decoder_layers(model, adapter))
    study.update_manifest(layers=layers)
    about = {
        "corpus": config.corpus,
        "model": study.model_name,
        "dtype": str(model.dtype),
        "adapter": study.fingerprint("adapter"),
        "text": text,
        "length_rule": length_rule,
        "sink_rule": {
            "ratio": SINK_RATIO,
            "layer": layers // 2,
            "over": "median norm in trace",
        },
    }
    folders = {source: store_folder(study.path, config.corpus, source) for source in sources}
    begun = {
        source: config.token_budget or finished_budget(folder, about | {"source": source}) or begun_budget(folder, text)
        for source, folder in folders.items()
    }
    fallback = next(filter(None, begun.values()), None) or choose()
    # On a GPU many short sequences one after the other would keep it waiting.
    pack = model.device.type == "cpu" and prepare_packing(model, max(len(item.ids) for item in rendered))
    with attach(model, adapter) as attached, fused_reading(attached):
        columns = [source_columns(study, source, attached, seed) for source in sources]
        budgets = [begun[source] or fallback for source in sources]
        plans = [
            plan_recording(part, rendered, budget, about | {"source": source, "token_budget": budget})
            for source, part, budget in zip(sources, columns, budgets, strict=True)
        ]
        shared = [i for i, plan in enumerate(plans) if plan.shards == plans[0].shards]
        beside = partial(scalars_beside, columns=[columns[i] for i in shared])
        read = base_scalars if sources[0] == "base" else beside
        stores = [(folders[sources[i]], plans[i]) for i in shared]
        counts = fill_stores(stores, rendered, attached, read, config.corpus, pack=pack)[0]
        if sources[0] == "adapter":
            folder = folders["adapter"]
            write_json(folder / OUTPUT_RMS, output_rms(attached, rendered, Store.open(folder)))
    return counts | {"length_rule": length_rule, "sink_rule": about["sink_rule"]}


def source_columns(study: Study, source: str, attached: Attached, seed: int) -> Adapter | Probe:
    """What a source's store has as columns; the adapter stands for its own scalars."""
    adapter = attached.adapter
    if source == "neurons":
        return neuron_probe(attached.model, len(adapter.addresses), seed)
    if source not in MADE:
        return adapter
    control = Adapter.load(study.path / "controls" / source)
    names = random_addresses(adapter) if source == "random" else adapter.addresses
    return adapter_probe(control, attached.model, names)


def finished_budget(folder: Path, about: dict[str, Any]) -> int | None:
    """The token budget of a finished recording of the very same: its batches are good, though memory may have changed.

    None where nothing is finished, or it is about another text, adapter, model or precision.
    """
    try:
        found = read_json(folder / INDEX)["about"]
        budget = int(found.pop("token_budget"))
        return budget if found == json.loads(json.dumps(about)) else None
    except (RunFailed, KeyError, TypeError, ValueError):
        return None


def begun_budget(folder: Path, text: str) -> int | None:
    """The token budget of a recording of this text that was begun here: a run that continues plans the same batches.

    Also beside a finished store. None where nothing was begun, or it was finished, or no shard of it is done (it may
    have lacked memory).
    """
    places = [part_folder(folder), *([] if (folder / INDEX).exists() else [folder])]
    for place in places:
        with suppress(RunFailed, KeyError, TypeError, ValueError):
            about = read_json(place / PLAN)["about"]
            if about["text"] == text and any(place.glob("shard-*.safetensors")):
                return int(about["token_budget"])
    return None


def text_fingerprint(rendered: list[Rendered]) -> str:
    """SHA-256 of all token ids and segments."""
    digest = hashlib.sha256()
    for item in rendered:
        digest.update(len(item.ids).to_bytes(8, "little") + item.ids.tobytes() + item.segments.tobytes())
    return digest.hexdigest()


def plan_recording(
    columns: Adapter | Probe, rendered: list[Rendered], token_budget: int, about: dict[str, Any]
) -> StorePlan:
    """Which traces share a shard and a batch: shards in the corpus's order, batches by length within a shard."""
    lengths = [len(item.ids) for item in rendered]
    ranges = plan_shards(lengths, SHARD_TOKENS)
    return StorePlan(
        addresses=columns.addresses,
        effect_per_scalar=[float(x) for x in columns.effect_per_scalar],
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
        z_TR = inputs[0].flatten(0, -2).float() @ part.a_RI.T.to(output.device)
        base_TO = output.flatten(0, -2).float() - part.scale * z_TR @ part.b_OR.T.to(output.device)
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


Read = Callable[[Attached, Tensor, Tensor | None], Tensor]
"""Scalars [B, T, N] fp32 of a batch of ids [B, T] and, where it is packed, its position ids [1, T]; the columns of
several stores side by side."""


def fill_stores(
    stores: list[tuple[Path, StorePlan]],
    rendered: list[Rendered],
    attached: Attached,
    read: Read,
    name: str,
    *,
    pack: bool,
) -> list[dict[str, Any]]:
    """Run the model over all shards that are not on disk yet and finish the stores; returns each one's counts.

    The stores have the same shards and batches, whose traces are laid end to end (`pack`) or padded. Full shards are
    written while the model runs on, so at most two of each store are in memory.
    """
    writers = [StoreWriter(folder, plan) for folder, plan in stores]
    stops = np.cumsum([0, *(len(plan.addresses) for _, plan in stores)])
    columns = [slice(int(a), int(b)) for a, b in pairwise(stops)]
    missing = [writer.missing() for writer in writers]
    shards = stores[0][1].shards
    work = [(shard, batch) for shard in sorted(set().union(*missing)) for batch in shards[shard]]
    begun: list[tuple[StoreWriter, Shard, slice]] = []
    written = Future[None]()
    written.set_result(None)
    with ThreadPoolExecutor(1) as pool:
        for number, batch in progress(work, total=len(work), desc=f"record {name}", unit="batch"):
            if not begun:
                due = zip(writers, columns, missing, strict=True)
                begun = [(writer, writer.begin(number), part) for writer, part, lacks in due if number in lacks]
            if written.done():
                written.result()  # a full disk is told at once, not after the next shard
            put = read_batch(attached, [rendered[i] for i in batch], read, pack)
            for writer, shard, part in begun:
                if writer.scale_N is None:
                    writer.calibrate(np.max([np.abs(z_TN[:, part]).max(axis=0) for z_TN, _ in put], axis=0))
                for i, (z_TN, sink_T) in zip(batch, put, strict=True):
                    writer.put(shard, i, z_TN[:, part], rendered[i].ids, rendered[i].segments, sink_T)
            if batch is shards[number][-1]:
                written.result()
                written, begun = pool.submit(commit_all, begun), []
        written.result()
    return [writer.finish() for writer in writers]


def commit_all(begun: list[tuple[StoreWriter, Shard, slice]]) -> None:
    """Write a filled shard of each store."""
    for writer, shard, _ in begun:
        writer.commit(shard)


@torch.inference_mode()
def read_batch(attached: Attached, batch: list[Rendered], read: Read, pack: bool = False) -> list[tuple[Any, Any]]:
    """Scalars [T, N] float32 and sink flags [T] of each trace of a batch, as on its own.

    Args:
        pack: lay the traces end to end, in a model that `prepare_packing` prepared, instead of padding them.
    """
    lengths, places_1T = [len(item.ids) for item in batch], None
    if pack:
        ids_BT = torch.from_numpy(np.concatenate([item.ids for item in batch]).astype(np.int64))[None]
        places_1T = torch.cat([torch.arange(n) for n in lengths])[None]
    else:
        ids_BT, _ = pad_ids([item.ids for item in batch], 0)
    with middle_norms(decoder_layers(attached.model, attached.adapter)) as norms:
        z_BTN = read(attached, ids_BT, places_1T).float().cpu().numpy()
    norms_BT = norms[0].cpu().numpy()
    if pack:
        stops = np.cumsum(lengths)[:-1]
        parts = list(zip(np.split(z_BTN[0], stops), np.split(norms_BT[0], stops), strict=True))
    else:
        parts = [(z_BTN[i, :n], norms_BT[i, :n]) for i, n in enumerate(lengths)]
    return [(z_TN, is_sink(norms_T)) for z_TN, norms_T in parts]


def adapter_scalars(attached: Attached, ids_BT: Tensor, places_1T: Tensor | None) -> Tensor:
    """The adapted model's scalars [B, T, N]; arguments as for `Attached.trunk`."""
    return attached.trunk(ids_BT, places_1T).scalars


def scalars_beside(
    attached: Attached, ids_BT: Tensor, places_1T: Tensor | None, columns: Sequence[Adapter | Probe]
) -> Tensor:
    """What several sources read in one run of the adapted model, side by side, [B, T, N]."""
    probes = [part for part in columns if isinstance(part, Probe)]
    with probing(attached.model, probes) as read:
        own_BTN = adapter_scalars(attached, ids_BT, places_1T)
    found = (z.to(own_BTN.device).view(*own_BTN.shape[:2], -1) for z in read())
    return torch.cat([next(found) if isinstance(part, Probe) else own_BTN for part in columns], -1)


def base_scalars(attached: Attached, ids_BT: Tensor, places_1T: Tensor | None) -> Tensor:
    """What the read vectors see in the base model's run, [B, T, N]."""
    with attached.as_base():
        return adapter_scalars(attached, ids_BT, places_1T)
