"""`lorascope ablate`: what each direction, layer, type or group does to the model's predictions.

KL(adapted ‖ edited) and the change of cross-entropy, in nats per assistant-predicted token, pooled over held-out
traces; intervals bootstrap traces. `--method exact` leaves each target out in turn, `--method screen` estimates the
KL of all of them from a few backward passes, and `--method exact --top 20` confirms the leaders.

Shapes: S = traces, N = directions, G = targets.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors.numpy import save as to_safetensors

from lorascope.adapter import Adapter
from lorascope.addresses import GROUPS, direction_layer, direction_type, group_of
from lorascope.attached import attach, find_module
from lorascope.config import Options
from lorascope.errors import BadInput
from lorascope.kl import assistant_positions
from lorascope.leave_one_out import PARTS, Target, leave_out
from lorascope.memory import graph_budget
from lorascope.models import load_model
from lorascope.screening import Screened, screen
from lorascope.stats import bootstrap_ratio
from lorascope.store import Store, store_folder
from lorascope.study import Study, atomic_write_bytes, write_json
from lorascope.traces import Rendered

KINDS = ("direction", "layer", "type", "group")


@dataclass(frozen=True)
class AblateConfig:
    """Switch off directions, layers, types or groups, one at a time, and measure KL(adapted ‖ edited).

    An adapter that adapts the LM head is refused.
    """

    by: str = "direction,layer,type,group"
    """What to switch off together: direction, layer, type, group, or a comma list of these."""
    method: str = "exact"
    """exact: leave each one out. screen: estimate all four kinds from a few backward passes (to second order)."""
    top: int | None = None
    """With exact: only the so many strongest of each kind by an earlier screening, in tables of their own."""
    to: str = "zero"
    """What scalars are set to: zero, or mean (over the training corpus's assistant tokens)."""
    corpus: str = "heldout"
    """Corpus to measure on."""
    traces: int = 16
    """At most so many traces."""
    max_tokens: int = 2048
    """Only the first so many tokens of each trace."""
    token_budget: int = 4096
    """Padded tokens per forward pass; screening takes fewer where their activations would fill the memory."""
    passes: int = 0
    """With screen: backward passes, at least 2 (default 0: as many as --precision asks for, at most 64)."""
    precision: float = 0.2
    """With screen: wanted standard error relative to the KL, for the median direction."""


Inputs = tuple[Any, Adapter, list[Rendered], dict[str, Any]]
"""The model, the adapter, the traces to measure on, and what was cut or dropped."""


def ablate(study: Study, config: AblateConfig, options: Options) -> dict[str, Any]:
    """Measure all targets of some kinds; writes `ablation/METHOD-KIND.parquet` and the floor beside each table.

    Raises:
        BadInput: an option makes no sense, or the adapter adapts the LM head.
        MissingStage: there is no adapter, no recorded training corpus (--to mean) or no screening (--top).
    """
    kinds = check_config(config)
    study.require("adapter", "lorascope train STUDY")
    inputs = ["adapter", f"traces/{config.corpus}.jsonl"]
    if config.to == "mean":
        study.require("scalars/train/adapter/index.json", "lorascope record STUDY")
        inputs.append("scalars/train/adapter/index.json")
    load = cache(lambda: load_inputs(study, config, options))
    folder = "ablation" if config.to == "zero" else "ablation/mean"
    (study.path / folder).mkdir(parents=True, exist_ok=True)
    if config.method == "screen":
        outputs = [f"{folder}/{name}" for name in ("screen.json", "interactions.safetensors")]
        outputs += [f"{folder}/screen-{kind}.parquet" for kind in KINDS]
        alone = replace(config, by=",".join(KINDS))
        return study.run(
            "ablate:screen",
            alone,
            options,
            inputs=inputs,
            outputs=outputs,
            work=lambda: run_screening(study.path / folder, config, options, load),
        )
    results = {}
    name, end = ("exact", "") if config.top is None else ("confirmed", ":top")
    end += ":mean" if config.to == "mean" else ""
    for kind in kinds:
        screened = [] if config.top is None else [f"ablation/screen-{kind}.parquet"]
        for path in screened:
            study.require(path, "lorascope ablate STUDY --method screen")

        def work(kind: str = kind) -> dict[str, Any]:
            tables = [
                study.path / output
                for output in (f"{folder}/{name}-{kind}.parquet", f"{folder}/floor-{name}-{kind}.json")
            ]
            return run_exact(study, tables, config, options, kind, load)

        results[kind] = study.run(
            f"ablate:{kind}{end}",
            replace(config, by=kind),
            options,
            inputs=inputs + screened,
            outputs=[f"{folder}/{name}-{kind}.parquet", f"{folder}/floor-{name}-{kind}.json"],
            work=work,
        )
    return results


def check_config(config: AblateConfig) -> list[str]:
    """The kinds asked for, or one sentence on what cannot be done."""
    kinds = list(dict.fromkeys(kind.strip() for kind in config.by.split(",")))
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise BadInput(f"--by {unknown[0]!r} is unknown; choose from {', '.join(KINDS)}.")
    if config.to not in ("zero", "mean"):
        raise BadInput(f"--to is zero or mean, not {config.to!r}.")
    if config.method not in ("exact", "screen"):
        raise BadInput(f"--method is exact or screen, not {config.method!r}.")
    if config.method == "screen" and (config.to != "zero" or config.top is not None):
        raise BadInput("--to mean and --top go with --method exact only.")
    top = 1 if config.top is None else config.top
    if min(config.traces, config.max_tokens, config.token_budget, top) < 1:
        raise BadInput("--traces, --max-tokens, --token-budget and --top must be at least 1.")
    if config.passes < 0 or config.passes == 1:
        raise BadInput("--passes is at least 2 (one pass tells nothing of its error), or 0 to stop by --precision.")
    if not 0.01 <= config.precision <= 10:
        raise BadInput(f"--precision is a share between 0.01 and 10, not {config.precision}.")
    return kinds


def load_inputs(study: Study, config: AblateConfig, options: Options) -> Inputs:
    """What every kind of target needs, loaded once."""
    model, tokenizer = load_model(study.model_name, device=options.device, dtype=options.dtype)
    model.requires_grad_(False)
    adapter = Adapter.load(study.path / "adapter")
    refuse_head(model, adapter)
    rendered, counts = study.renderer(tokenizer).render_all(study.traces(config.corpus))
    chosen, cut = first_tokens(rendered[: config.traces], config.max_tokens)
    about = {
        "traces": len(chosen),
        "tokens": int(sum(len(r.ids) for r in chosen)),
        "scored_tokens": int(sum(len(assistant_positions(r)) for r in chosen)),
        "cut_tokens": cut,
        "length_rule": counts,
        "to": config.to,
    }
    return model, adapter, chosen, about


def refuse_head(model: Any, adapter: Adapter) -> None:
    """Raise BadInput for directions on the LM head.

    Runs are compared by the hidden states before it, where such a direction would seem to do nothing.
    """
    head = model.get_output_embeddings()
    for part in adapter.modules:
        if find_module(model, part) is head:
            raise BadInput(f"The adapter adapts the LM head ({part.path}), which ablate cannot measure; use another.")


def run_exact(
    study: Study, outputs: list[Path], config: AblateConfig, options: Options, kind: str, load: Callable[[], Inputs]
) -> dict[str, Any]:
    """Leave out every target of one kind (with --top the leaders) and write its table and its floor."""
    model, adapter, traces, about = load()
    targets = make_targets(adapter.addresses, kind)
    if config.top is not None:
        leaders = leading(study.path / "ablation" / f"screen-{kind}.parquet", config.top)
        targets = [target for target in targets if target.name in leaders]
    to = Store.open(store_folder(study.path, "train", "adapter")).assistant_mean() if config.to == "mean" else 0.0
    with attach(model, adapter) as attached:
        sums, floor_runs = leave_out(attached, traces, targets, to, config.token_budget)
    floor, rng = max(floor_runs.values()), np.random.default_rng(options.seed)
    write_rows(
        outputs[0],
        [row for target in targets for row in target_rows(target, sums[target.by, target.name], floor, rng)],
    )
    write_json(outputs[1], {"kl": floor, "runs": floor_runs})
    return {"targets": len(targets), "floor": floor} | about


def run_screening(folder: Path, config: AblateConfig, options: Options, load: Callable[[], Inputs]) -> dict[str, Any]:
    """Screen all directions; tables of every kind and the interaction matrix from the same gradients."""
    model, adapter, traces, about = load()
    with attach(model, adapter) as attached:
        screened = screen(
            attached,
            traces,
            passes=config.passes,
            precision=config.precision,
            budget=graph_budget(model, config.token_budget),
            seed=options.seed,
        )
    rng = np.random.default_rng(options.seed)
    targets = {kind: make_targets(adapter.addresses, kind) for kind in KINDS}
    floor_runs = screened.null_kls(np.stack([target.columns for own in targets.values() for target in own]))
    floor = max(floor_runs.values())
    found = {kind: screened_rows(screened, own, floor, rng) for kind, own in targets.items()}
    for kind, rows in found.items():
        write_rows(folder / f"screen-{kind}.parquet", rows)
    interactions = {"kl_NN": screened.interactions_NN().astype(np.float32)}
    metadata = {"addresses": ",".join(adapter.addresses), "unit": "nats per predicted token"}
    atomic_write_bytes(folder / "interactions.safetensors", to_safetensors(interactions, metadata))
    relative = [row["se"] / row["kl"] for row in found["direction"] if row["kl"] > 0]
    result = {
        "targets": sum(len(rows) for rows in found.values()),
        "passes": len(screened.gradients_KSN),
        "precision": float(np.median(relative)) if relative else None,
        "floor": floor,
    } | about
    write_json(folder / "screen.json", {"kl": floor, "runs": floor_runs} | result)
    return result


def screened_rows(
    screened: Screened, targets: Sequence[Target], floor: float, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Rows like those of the exact tables, with the standard error that the passes leave."""
    members_GN = np.stack([target.columns for target in targets])
    kl_KSG = screened.kl_KSG(members_GN)
    passes, tokens_S = len(kl_KSG), screened.tokens_S.astype(np.float64)
    rows = []
    for target, kl_KS in zip(targets, np.moveaxis(kl_KSG, 2, 0), strict=True):
        kl = bootstrap_ratio(kl_KS.mean(axis=0), tokens_S, rng=rng, draws=2_000)
        spread = float(kl_KS.sum(axis=1).std(ddof=1))
        rows.append(
            {
                "by": target.by,
                "target": target.name,
                "segment": "all",
                "kl": kl.value,
                "low": kl.low,
                "high": kl.high,
                "se": spread / passes**0.5 / float(tokens_S.sum()),
                "tokens": int(tokens_S.sum()),
                "under_floor": kl.value <= floor,
            }
        )
    return rows


def leading(path: Path, count: int) -> set[str]:
    """Names of the strongest targets of a table."""
    rows = pq.read_table(path, columns=["target", "kl"]).to_pylist()
    return {row["target"] for row in sorted(rows, key=lambda row: -row["kl"])[:count]}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """A table as Parquet, whole or not at all; bounds that there are none of (NaN) are null."""
    columns = {}
    for name, value in (rows[0] if rows else {}).items():
        type_ = pa.float64() if isinstance(value, float) else None
        columns[name] = pa.array([row[name] for row in rows], type_, from_pandas=True)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    atomic_write_bytes(path, sink.getvalue().to_pybytes())


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
        # A module outside the layers (a projection of the embeddings) can only be edited in a whole pass.
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
    inside = [a for a in addresses if direction_layer(a) is not None]
    found = {group: [a for a in inside if group_of(direction_type(a)) == group] for group in GROUPS}
    return {group: members for group, members in found.items() if members} | {"all": list(addresses)}


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
