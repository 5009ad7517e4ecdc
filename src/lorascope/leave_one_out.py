"""Exact leave-one-out: KL(adapted ‖ edited) of many edits of the same traces.

Each edited run restarts from the first edited layer, on kept hidden states; edits of one layer share a batch; one
reference serves all of them, chunk by chunk of positions.

Shapes: B = traces of a batch, T = tokens, N = directions, G = edits in one pass, M = scored positions, D = model
width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorascope import edits
from lorascope.addresses import direction_layer
from lorascope.attached import Attached, decoder_layers
from lorascope.decoders import text_decoder
from lorascope.fused_reading import fused_reading
from lorascope.kl import Changes, assistant_positions, compare_hidden, predicted_segments
from lorascope.progress import progress
from lorascope.restart import Kept, keep_hidden, start_at
from lorascope.traces import SEGMENT_NAMES, Rendered, pad_ids, plan_batches

PARTS = ("all", "think", "answer", "special")
"""Segments of the predicted token that sums are given for; `special` is the markup and the end of turn."""


@dataclass(frozen=True)
class Target:
    """The directions (columns of N) that are switched off together."""

    by: str
    name: str
    columns: NDArray[np.bool_]
    first_layer: int


@dataclass(frozen=True)
class Reference:
    """Some traces with the adapted model's run on them: what every edited run is compared with."""

    ids_BT: Tensor
    rows_M: Tensor
    positions_M: Tensor
    targets_M: Tensor
    trace_M: NDArray[np.int64]
    segment_M: NDArray[np.uint8]
    hidden: list[Kept]
    """Output of each layer."""
    last_MD: Tensor
    """Final hidden states at the scored positions."""


@torch.no_grad()
def leave_out(
    attached: Attached, traces: Sequence[Rendered], targets: Sequence[Target], to: Any, budget: int
) -> tuple[dict[tuple[str, str], NDArray[np.float64]], dict[str, float]]:
    """Switch off each target in turn.

    Args:
        to: what the scalars are set to: a number, or one per direction [N].
        budget: padded tokens per forward pass.

    Returns:
        `{(by, name): sums [trace, part, (kl, ce change, tokens)]}` and the noise floor's null runs as
        `{name: KL per token}`; nats.
    """
    sums = {(t.by, t.name): np.zeros((len(traces), len(PARTS), 3)) for t in targets}
    nulls: dict[str, NDArray[np.float64]] = {}
    plan = plan_batches([len(t.ids) for t in traces], max(1, budget // 8))
    bar = iter(progress(range(len(plan) * len(targets)), desc="ablate", unit="target", total=len(plan) * len(targets)))
    with fused_reading(attached):
        for rows in plan:
            reference = run_reference(attached, traces, rows)
            for name, kls in null_runs(attached, traces, rows, reference).items():
                nulls[name] = nulls.get(name, np.zeros(2)) + np.array([kls.sum(dtype=np.float64), kls.size])
            width = max(1, budget // reference.ids_BT.numel())
            for group in groups_by_layer(targets, width):
                gates_GN = torch.from_numpy(~np.stack([t.columns for t in group])).float()
                found = edited_run(attached, reference, group[0].first_layer, gates_GN, to)
                for target, kl_M, ce_M in zip(group, found.kl.numpy(), found.ce.numpy(), strict=True):
                    add_sums(sums[target.by, target.name], reference, kl_M, ce_M)
                    next(bar, None)
    for _ in bar:
        pass
    return sums, {name: float(total[0] / total[1]) for name, total in nulls.items()}


def groups_by_layer(targets: Sequence[Target], width: int) -> list[list[Target]]:
    """Targets with the same first layer, at most `width` together, in groups of like size."""
    by_layer: dict[int, list[Target]] = {}
    for target in targets:
        by_layer.setdefault(target.first_layer, []).append(target)
    groups = []
    for _, members in sorted(by_layer.items()):
        parts = -(-len(members) // width)
        groups += [[members[i] for i in part] for part in np.array_split(np.arange(len(members)), parts)]
    return groups


def run_reference(attached: Attached, traces: Sequence[Rendered], rows: Sequence[int]) -> Reference:
    """The adapted model on some traces, its hidden states kept."""
    chosen = [traces[i] for i in rows]
    ids_BT = pad_ids([t.ids for t in chosen], 0)[0].to(attached.device)
    positions = [assistant_positions(t) for t in chosen]
    counts = [len(p) for p in positions]
    rows_M = torch.from_numpy(np.repeat(np.arange(len(rows)), counts)).to(attached.device)
    positions_M = torch.from_numpy(np.concatenate(positions)).to(attached.device)
    with keep_hidden(decoder_layers(attached.model, attached.adapter)) as hidden:
        last = last_hidden(attached, ids_BT)
    return Reference(
        ids_BT=ids_BT,
        rows_M=rows_M,
        positions_M=positions_M,
        targets_M=ids_BT[rows_M, positions_M + 1],
        trace_M=np.repeat(np.array(rows), counts),
        segment_M=np.concatenate([predicted_segments(t) for t in chosen]),
        hidden=hidden,
        last_MD=last[rows_M, positions_M],
    )


def edited_run(attached: Attached, reference: Reference, layer: int, gates_GN: Tensor, to: Any) -> Changes:
    """G edits at or after `layer` in one forward pass: directions with a gate of 0 are off, with 1 as they are.

    Directions whose gates are 1 in all edits are not edited at all, unless all gates are 1 (a null run): then those
    of the first layer (or all, where it has none) are, to take the edited path.
    """
    size, copies = len(reference.ids_BT), len(gates_GN)
    touched_N = (gates_GN != 1).any(dim=0).tolist()
    if not any(touched_N):
        touched_N = [(direction_layer(a) or 0) == layer for a in attached.addresses]
    patterns = [a for a, hit in zip(attached.addresses, touched_N, strict=True) if hit] or attached.addresses
    gates_BN = gates_GN.to(attached.device).repeat_interleave(size, dim=0)
    ids_BT = reference.ids_BT.repeat(copies, 1)
    with attached.edit(edits.gate(gates_BN, patterns, to=to)):
        if layer == 0:
            hidden = last_hidden(attached, ids_BT)
        else:
            layers = decoder_layers(attached.model, attached.adapter)
            with start_at(layers, layer, reference.hidden[layer - 1].repeat(copies)):
                hidden = last_hidden(attached, ids_BT)
    own = [part[reference.rows_M, reference.positions_M] for part in hidden.split(size)]
    return compare_hidden(attached.head, reference.last_MD, own, reference.targets_M)


def last_hidden(attached: Attached, ids_BT: Tensor) -> Tensor:
    """The final hidden states, no scalar read: skipped layers have none."""
    hidden: Tensor = text_decoder(attached.model)(input_ids=ids_BT, use_cache=False).last_hidden_state
    return hidden


def null_runs(
    attached: Attached, traces: Sequence[Rendered], rows: Sequence[int], reference: Reference
) -> dict[str, NDArray[np.float32]]:
    """KLs of runs that change nothing: again, each trace in a batch of its own, and restarted with gates of 1."""
    layers = len(reference.hidden)
    alone = torch.cat([run_reference(attached, traces, [row]).last_MD for row in rows])
    runs = {
        "rerun": edited_run(attached, reference, 0, torch.ones(1, len(attached.addresses)), 0.0),
        "rebatched": compare_hidden(attached.head, reference.last_MD, [alone], reference.targets_M),
    }
    for layer in sorted({layers // 3, 2 * layers // 3, layers - 1} - {0}):
        if any(direction_layer(a) == layer for a in attached.addresses):
            gates_GN = torch.ones(2, len(attached.addresses))
            runs[f"restart at L{layer}"] = edited_run(attached, reference, layer, gates_GN, 0.0)
    return {name: changes.kl.numpy() for name, changes in runs.items()}


def add_sums(sums: NDArray[np.float64], reference: Reference, kl_M: Any, ce_M: Any) -> None:
    """Add per-token values to the sums [trace, part, (kl, ce change, tokens)]."""
    values = np.stack([kl_M, ce_M, np.ones_like(kl_M)], axis=1).astype(np.float64)
    for number, part in enumerate(PARTS):
        mine = slice(None) if part == "all" else reference.segment_M == SEGMENT_NAMES.index(part)
        np.add.at(sums[:, number], reference.trace_M[mine], values[mine])
