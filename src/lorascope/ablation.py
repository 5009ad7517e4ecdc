"""`lorascope ablate`: what each direction, layer, type or group does to the model's predictions.

Exact leave-one-out on held-out traces: KL(adapted ‖ edited) and the change of cross-entropy, in nats per
assistant-predicted token, pooled over traces; intervals bootstrap traces. The edited run restarts from the first
edited layer; several edits of one layer share a batch.

Shapes: B = traces of a batch, T = tokens, N = directions, G = targets in one pass, M = scored positions,
V = vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorascope import edits
from lorascope.adapter import GROUPS, Adapter, direction_layer, direction_type, select
from lorascope.attached import Attached, attach
from lorascope.config import Options
from lorascope.errors import BadInput
from lorascope.kl import assistant_positions, predicted_segments, reference_scores
from lorascope.models import load_model
from lorascope.progress import progress
from lorascope.restart import keep_hidden, start_at
from lorascope.stats import bootstrap_ratio
from lorascope.store import Store
from lorascope.study import Study, write_json
from lorascope.traces import SEGMENT_NAMES, Rendered, pad_ids, plan_batches

KINDS = ("direction", "layer", "type", "group")
PARTS = ("all", "think", "answer", "special")
"""Segments of the predicted token that rows are given for; `special` is the markup and the end of turn."""


@dataclass(frozen=True)
class AblateConfig:
    """Switch off directions, layers, types or groups, one at a time, and measure KL(adapted ‖ edited)."""

    by: str = "direction,layer,type,group"
    """What to switch off together: direction, layer, type, group, or a comma list of these."""
    to: str = "zero"
    """What scalars are set to: zero, or mean (over the training corpus's assistant tokens)."""
    corpus: str = "heldout"
    """Corpus to measure on."""
    traces: int = 16
    """At most so many traces."""
    max_tokens: int = 2048
    """Only the first so many tokens of each trace."""
    token_budget: int = 4096
    """Padded tokens per forward pass."""


@dataclass(frozen=True)
class Target:
    """One row: the directions (columns of N) that are switched off together."""

    by: str
    name: str
    columns: NDArray[np.bool_]
    first_layer: int


@dataclass(frozen=True)
class Batch:
    """Some traces with the adapted model's run on them: what every edited run is compared with."""

    ids_BT: Tensor
    rows_M: Tensor
    positions_M: Tensor
    targets_M: Tensor
    trace_M: NDArray[np.int64]
    segment_M: NDArray[np.uint8]
    hidden: list[Tensor]
    """Output of each layer [B, T, D]."""
    logp_MV: Tensor
    ce_M: Tensor


def ablate(study: Study, config: AblateConfig, options: Options) -> dict[str, Any]:
    """Measure all targets; writes `ablation/exact-BY.parquet` and `ablation/floor.json`.

    Raises:
        BadInput: an unknown kind of target or of replacement.
        MissingStage: there is no adapter, or (with --to mean) no recorded training corpus.
    """
    kinds = [kind.strip() for kind in config.by.split(",")]
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise BadInput(f"--by {unknown[0]!r} is unknown; choose from {', '.join(KINDS)}.")
    if config.to not in ("zero", "mean"):
        raise BadInput(f"--to is zero or mean, not {config.to!r}.")
    study.require("adapter", "lorascope train STUDY")
    inputs = ["adapter", f"traces/{config.corpus}.jsonl"]
    if config.to == "mean":
        study.require("scalars/train/adapter/index.json", "lorascope record STUDY")
        inputs.append("scalars/train/adapter/index.json")
    folder = "ablation" if config.to == "zero" else "ablation/mean"

    def work() -> dict[str, Any]:
        return measure(study, config, options, kinds, folder)

    outputs = [f"{folder}/floor.json", *(f"{folder}/exact-{kind}.parquet" for kind in kinds)]
    return study.run(f"ablate:{config.by}:{config.to}", config, options, inputs=inputs, outputs=outputs, work=work)


def measure(study: Study, config: AblateConfig, options: Options, kinds: list[str], folder: str) -> dict[str, Any]:
    """Run everything and write the tables."""
    model, tokenizer = load_model(study.model_name, device=options.device, dtype=options.dtype)
    rendered, counts = study.renderer(tokenizer).render_all(study.traces(config.corpus))
    chosen, cut = first_tokens(rendered[: config.traces], config.max_tokens)
    adapter = Adapter.load(study.path / "adapter")
    targets = [target for kind in kinds for target in make_targets(adapter.addresses, kind)]
    to = direction_means(study) if config.to == "mean" else 0.0
    rng = np.random.default_rng(options.seed)
    with torch.no_grad(), attach(model, adapter) as attached:
        scores, floor_runs = score_targets(attached, chosen, targets, to, config.token_budget)
    floor = max(floor_runs.values())
    (study.path / folder).mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        rows = [row for t in targets if t.by == kind for row in target_rows(t, scores[t.by, t.name], floor, rng)]
        pq.write_table(pa.Table.from_pylist(rows), study.path / folder / f"exact-{kind}.parquet")
    write_json(study.path / folder / "floor.json", {"kl": floor, "runs": floor_runs})
    scored = int(sum(len(assistant_positions(r)) for r in chosen))
    return {
        "targets": len(targets),
        "traces": len(chosen),
        "tokens": int(sum(len(r.ids) for r in chosen)),
        "scored_tokens": scored,
        "cut_tokens": cut,
        "length_rule": counts,
        "floor": floor,
        "to": config.to,
    }


def first_tokens(rendered: Sequence[Rendered], limit: int) -> tuple[list[Rendered], int]:
    """Traces cut to their first `limit` tokens (those without an assistant token left out), and the tokens cut."""
    kept = [
        Rendered(r.trace_id, r.ids[:limit], r.segments[:limit], r.response_start, r.truncated)
        for r in rendered
        if min(limit, len(r.ids)) > r.response_start
    ]
    if not kept:
        raise BadInput("No trace has an assistant token within the first --max-tokens tokens.")
    return kept, int(sum(max(0, len(r.ids) - limit) for r in rendered))


def make_targets(addresses: Sequence[str], kind: str) -> list[Target]:
    """The targets of one kind, in column order; groups are attn, mlp (where present) and all."""
    names = {
        "direction": lambda: {a: [a] for a in addresses},
        "layer": lambda: gather(addresses, lambda a: f"L{direction_layer(a)}"),
        "type": lambda: gather(addresses, direction_type),
        "group": lambda: groups(addresses),
    }[kind]()
    index = {address: i for i, address in enumerate(addresses)}
    targets = []
    for name, members in names.items():
        columns = np.zeros(len(addresses), dtype=bool)
        columns[[index[a] for a in members]] = True
        # A module outside the layers (an LM head) can only be edited in a whole pass.
        first = min(-1 if (layer := direction_layer(a)) is None else layer for a in members)
        targets.append(Target(kind, name, columns, max(first, 0)))
    return targets


def gather(addresses: Sequence[str], key: Any) -> dict[str, list[str]]:
    """Addresses by their key, in order."""
    found: dict[str, list[str]] = {}
    for address in addresses:
        found.setdefault(key(address), []).append(address)
    return found


def groups(addresses: Sequence[str]) -> dict[str, list[str]]:
    """`attn` and `mlp`, where the adapter has them, and `all`."""
    types = {direction_type(a) for a in addresses}
    present = [group for group, members in GROUPS.items() if types & set(members)]
    found = {g: [a for a, hit in zip(addresses, select(addresses, g), strict=True) if hit] for g in present}
    return found | {"all": list(addresses)}


def direction_means(study: Study) -> NDArray[np.float32]:
    """Mean scalar of each direction over the training corpus's assistant tokens, float32 [N]."""
    store = Store.open(study.path / "scalars" / "train" / "adapter")
    starts = np.repeat(store.offsets[:-1] + store.response_start, np.diff(store.offsets))
    assistant = np.arange(store.n_tokens) >= starts
    total = np.zeros(len(store.addresses))
    for start, z_TN in store.chunks():
        total += z_TN[assistant[start : start + len(z_TN)]].sum(axis=0, dtype=np.float64)
    return (total / assistant.sum()).astype(np.float32)


def score_targets(
    attached: Attached, traces: Sequence[Rendered], targets: Sequence[Target], to: Any, budget: int
) -> tuple[dict[tuple[str, str], NDArray[np.float64]], dict[str, float]]:
    """Sums per target and trace, and the KL of the null runs.

    Returns:
        `{(by, name): sums [trace, part, (kl, ce change, tokens)]}` and `{null run: KL per token}`.
    """
    sums = {(t.by, t.name): np.zeros((len(traces), len(PARTS), 3)) for t in targets}
    nulls: dict[str, NDArray[np.float64]] = {}
    plan = plan_batches([len(t.ids) for t in traces], max(1, budget // 8))
    passes = sum(1 for _ in plan) * len(targets)
    bar = iter(progress(range(passes), desc="ablate", unit="target", total=passes))
    for rows in plan:
        batch = run_batch(attached, traces, rows)
        null_runs(attached, traces, rows, batch, nulls)
        width = max(1, budget // batch.ids_BT.numel())
        by_layer: dict[int, list[Target]] = {}
        for target in targets:
            by_layer.setdefault(target.first_layer, []).append(target)
        for layer, members in sorted(by_layer.items()):
            for start in range(0, len(members), width):
                group = members[start : start + width]
                kl_GM, ce_GM = edited_pass(attached, batch, layer, [t.columns for t in group], to)
                for target, kl_M, ce_M in zip(group, kl_GM, ce_GM, strict=True):
                    add_sums(sums[target.by, target.name], batch, kl_M, ce_M - batch.ce_M.numpy())
                    next(bar, None)
    for _ in bar:
        pass
    return sums, {name: float(total[0] / total[1]) for name, total in nulls.items()}


def run_batch(attached: Attached, traces: Sequence[Rendered], rows: Sequence[int]) -> Batch:
    """The adapted model on some traces: hidden states per layer, log-probabilities at the scored positions."""
    chosen = [traces[i] for i in rows]
    ids_BT = pad_ids([t.ids for t in chosen], 0)[0].to(attached.device)
    positions = [assistant_positions(t) for t in chosen]
    counts = [len(p) for p in positions]
    rows_M = torch.from_numpy(np.repeat(np.arange(len(rows)), counts)).to(attached.device)
    positions_M = torch.from_numpy(np.concatenate(positions)).to(attached.device)
    with keep_hidden(attached.model) as hidden:
        last = attached.trunk(ids_BT).hidden
    targets_M = ids_BT[rows_M, positions_M + 1]
    logp_MV = torch.log_softmax(attached.head(last[rows_M, positions_M]).float(), dim=-1)
    return Batch(
        ids_BT=ids_BT,
        rows_M=rows_M,
        positions_M=positions_M,
        targets_M=targets_M,
        trace_M=np.repeat(np.array(rows), counts),
        segment_M=np.concatenate([predicted_segments(t) for t in chosen]),
        hidden=hidden,
        logp_MV=logp_MV,
        ce_M=-logp_MV.gather(1, targets_M[:, None])[:, 0].cpu(),
    )


def edited_pass(
    attached: Attached, batch: Batch, layer: int, columns: Sequence[NDArray[np.bool_]], to: Any
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """KL and cross-entropy [G, M] of G edits of one batch, all at or after `layer`, in one forward pass."""
    size, copies = len(batch.ids_BT), len(columns)
    gates_GN = torch.from_numpy(~np.stack(list(columns))).float().to(attached.device)
    ids_BT = batch.ids_BT.repeat(copies, 1)
    with attached.edit(edits.gate(gates_GN.repeat_interleave(size, dim=0), to=to)):
        if layer == 0:
            hidden = attached.trunk(ids_BT).hidden
        else:
            with start_at(attached.model, layer, batch.hidden[layer - 1].repeat(copies, 1, 1)):
                hidden = last_hidden(attached, ids_BT)
    kl, ce = [], []
    for number in range(copies):
        own = hidden[number * size : (number + 1) * size][batch.rows_M, batch.positions_M]
        kl_M, ce_M = reference_scores(attached.head, batch.logp_MV, own, batch.targets_M)
        kl.append(kl_M.numpy())
        ce.append(ce_M.numpy())
    return np.stack(kl), np.stack(ce)


def last_hidden(attached: Attached, ids_BT: Tensor) -> Tensor:
    """The final hidden states when some layers are skipped, so that not every scalar exists."""
    hidden: Tensor = attached.model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
    return hidden


def null_runs(
    attached: Attached,
    traces: Sequence[Rendered],
    rows: Sequence[int],
    batch: Batch,
    nulls: dict[str, NDArray[np.float64]],
) -> None:
    """Runs that change nothing: again, each trace in a batch of its own, and restarted with gates of 1."""
    nothing = np.zeros(len(attached.addresses), dtype=bool)
    layers = len(batch.hidden)
    runs = {"rerun": [edited_pass(attached, batch, 0, [nothing], 0.0)[0]], "rebatched": []}
    for layer in sorted({layers // 3, 2 * layers // 3, layers - 1} - {0}):
        runs[f"restart at L{layer}"] = [edited_pass(attached, batch, layer, [nothing, nothing], 0.0)[0]]
    for row in rows:
        alone = run_batch(attached, traces, [row])
        mine = torch.from_numpy(batch.trace_M == row)
        kl_M, _ = reference_scores(
            attached.head,
            batch.logp_MV[mine.to(batch.logp_MV.device)],
            attached.trunk(alone.ids_BT).hidden[alone.rows_M, alone.positions_M],
            alone.targets_M,
        )
        runs["rebatched"].append(kl_M.numpy())
    for name, parts in runs.items():
        total = np.array([sum(kl.sum(dtype=np.float64) for kl in parts), sum(kl.size for kl in parts)])
        nulls[name] = nulls.get(name, np.zeros(2)) + total


def add_sums(sums: NDArray[np.float64], batch: Batch, kl_M: Any, ce_M: Any) -> None:
    """Add per-token values to the sums [trace, part, (kl, ce change, tokens)]."""
    values = np.stack([kl_M, ce_M, np.ones_like(kl_M)], axis=1).astype(np.float64)
    for number, part in enumerate(PARTS):
        mine = slice(None) if part == "all" else batch.segment_M == SEGMENT_NAMES.index(part)
        np.add.at(sums[:, number], batch.trace_M[mine], values[mine])


def target_rows(
    target: Target, sums: NDArray[np.float64], floor: float, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """The table's rows of one target: one per segment that has scored tokens."""
    rows = []
    for number, part in enumerate(PARTS):
        kl_sum, ce_sum, tokens = sums[:, number].T
        if tokens.sum() == 0:
            continue
        kl = bootstrap_ratio(kl_sum, tokens, rng=rng, draws=2_000)
        ce = bootstrap_ratio(ce_sum, tokens, rng=rng, draws=2_000)
        rows.append(
            {
                "by": target.by,
                "target": target.name,
                "segment": part,
                "kl": kl.value,
                "low": kl.low,
                "high": kl.high,
                "ce_change": ce.value,
                "ce_low": ce.low,
                "ce_high": ce.high,
                "tokens": int(tokens.sum()),
                "under_floor": kl.value <= floor,
            }
        )
    return rows
