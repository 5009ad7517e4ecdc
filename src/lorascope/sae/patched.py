"""Patched KL: what the adapted model loses when its scalars are replaced by the SAE's reconstruction of them.

Each variant is a second pass over the same tokens, in which every ordinary token's scalars are replaced by a
function of the first pass's and all other tokens keep the first pass's. `off` switches the adapter off instead;
`exact` patches the first pass's own scalars in, so its KL is the floor of the method.

Legend: B sequences, T tokens, N directions, M predicted tokens, Q variants.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lorascope.config import Options
from lorascope.errors import BadInput
from lorascope.kl import compare_hidden
from lorascope.progress import progress
from lorascope.sae.files import CONFIG, WEIGHTS, load_sae
from lorascope.sae.moments import choose_unit, measure_moments, principal_components
from lorascope.sae.quality import COMPONENTS, fold_components
from lorascope.stats import bootstrap_ratio
from lorascope.store import Store, store_folder
from lorascope.study import Study, write_json

if TYPE_CHECKING:
    from lorascope.attached import Attached

Patch = Callable[[Tensor], Tensor]
"""Raw scalars [M, N] of ordinary tokens to those put in their place."""
OFF, EXACT, LATENTS = "off", "exact", "sae"


@dataclass(frozen=True)
class PatchConfig:
    """Measure the KL of the adapted model to itself with its scalars replaced by the SAE's reconstruction."""

    corpus: str = "heldout"
    """Recorded corpus to measure on."""
    tokens: int = 4096
    """Most tokens to run, prompts included; traces are drawn at random, each response cut to an eighth of this."""
    token_budget: int = 2048
    """Most tokens in a batch, padding included."""


@dataclass(frozen=True)
class Sequence:
    """One trace to run: ids and ordinary flags [T], and where its response starts."""

    ids: npt.NDArray[np.int64]
    ordinary: npt.NDArray[np.bool_]
    segments: npt.NDArray[np.uint8]
    response_start: int

    @property
    def predicted(self) -> npt.NDArray[np.int64]:
        """Positions whose prediction is the assistant's."""
        return np.arange(max(self.response_start - 1, 0), len(self.ids) - 1)


def patched_kl(study: Study, config: PatchConfig, options: Options) -> dict[str, Any]:
    """The stage: `sae/patched_kl.json`; returns `{"patched_kl", "adapter_off_kl", "ratio", "floor", "variants"}`.

    Values are KL(adapted ‖ patched) in nats per assistant-predicted token, pooled, intervals over traces.

    Raises:
        BadInput: an option makes no sense, or no trace can be run.
        MissingStage: there is no SAE, adapter or recording.
    """
    if config.tokens < 16 or config.token_budget < 1:
        raise BadInput("--patched-tokens must be at least 16.")
    _, metadata = load_sae(study.path / "sae")
    study.require("adapter/adapter_config.json", "lorascope train STUDY")
    folders = [store_folder(study.path, name, "adapter") for name in (metadata["corpus"], config.corpus)]
    files = [
        f"sae/{CONFIG}",
        f"sae/{WEIGHTS}",
        "adapter",
        *(f"{f.relative_to(study.path)}/index.json" for f in folders),
    ]

    def work() -> dict[str, Any]:
        result = measure_patched(study, Store.open(folders[0]), Store.open(folders[1]), config, options)
        write_json(study.path / "sae" / "patched_kl.json", result)
        return {name: result[name] for name in ("patched_kl", "adapter_off_kl", "ratio", "floor")}

    outputs = ["sae/patched_kl.json"]
    headline = study.run("sae:patched", config, options, inputs=files, outputs=outputs, work=work)
    study.summarise({name: headline[name] for name in ("patched_kl", "adapter_off_kl")})
    return headline


def measure_patched(
    study: Study, store: Store, heldout: Store, config: PatchConfig, options: Options
) -> dict[str, Any]:
    """Load the model, run all variants and pool their KLs."""
    from lorascope.adapter import Adapter
    from lorascope.attached import attach
    from lorascope.models import load_model
    from lorascope.prepacked import prepacked_maps

    rng = np.random.default_rng(options.seed)
    sequences = draw_sequences(heldout, config.tokens, rng)
    model, _ = load_model(study.model_name, device=options.device, dtype=options.dtype)
    adapter = Adapter.load(study.path / "adapter")
    if adapter.addresses != store.addresses:
        raise BadInput(f"The adapter of {study.path} has other directions than its recording; record it again.")
    patches = make_patches(study, store)
    with prepacked_maps(model), attach(model, adapter) as attached:
        kls, segments = run_variants(attached, sequences, patches, config.token_budget)
    names = [OFF, EXACT, *patches]
    return pool_kls(names, kls, segments, rng) | {
        "corpus": config.corpus,
        "traces": len(sequences),
        "tokens": sum(len(s.ids) for s in sequences),
        "components": COMPONENTS,
        "direction": "KL(adapted || patched), nats per assistant-predicted token, pooled; intervals over traces",
    }


def draw_sequences(store: Store, tokens: int, rng: np.random.Generator) -> list[Sequence]:
    """Random traces of a recording, each response cut to an eighth of the budget, until it is spent."""
    chosen: list[Sequence] = []
    longest, left = max(1, tokens // 8), tokens
    for number in rng.permutation(store.n_traces).tolist():
        first, start = int(store.offsets[number]), int(store.response_start[number])
        stop = min(int(store.offsets[number + 1]), first + max(start, 1) + longest)
        if stop - first <= max(start, 1):
            continue  # a trace without a response predicts nothing that counts
        if stop - first > left:
            if chosen:
                break
            continue
        left -= stop - first
        part = slice(first, stop)
        ids = np.asarray(store.tokens[part], np.int64)
        chosen.append(Sequence(ids, store.ordinary[part], np.asarray(store.segments[part]), start))
    if not chosen:
        raise BadInput("No recorded trace with a response fits the budget; raise --patched-tokens.")
    return chosen


def make_patches(study: Study, store: Store) -> dict[str, Patch]:
    """The SAE and its baselines: the mean, principal components, and the largest scalars, as many as components."""
    sae, metadata = load_sae(study.path / "sae")
    moments = measure_moments(store)
    unit = choose_unit(moments, metadata["unit"])
    read, write = map(torch.from_numpy, fold_components(principal_components(moments, unit, COMPONENTS), unit))
    mean = torch.from_numpy(moments.mean_N.astype(np.float32))
    response_mean = torch.from_numpy(store.assistant_mean())
    size = torch.from_numpy(np.abs(store.effect_per_scalar))

    def largest(z_MN: Tensor) -> Tensor:
        away = (z_MN - mean).abs() * size
        kept = away.topk(min(COMPONENTS, len(mean)), dim=1).indices
        return mean.expand_as(z_MN).scatter(1, kept, z_MN.gather(1, kept))

    return {
        LATENTS: sae.reconstruct,
        "mean": lambda z_MN: response_mean.expand_as(z_MN),
        "components": lambda z_MN: mean + (z_MN - mean) @ read @ write,
        "largest": largest,
    }


@torch.inference_mode()
def run_variants(
    attached: Attached, sequences: list[Sequence], patches: dict[str, Patch], token_budget: int
) -> tuple[list[npt.NDArray[np.float32]], list[npt.NDArray[np.uint8]]]:
    """KLs [Q, M] per trace (off, exact, then the patches in order) and the segments of the predicted tokens [M]."""
    from lorascope.traces import pad_ids, plan_batches

    kls: list[npt.NDArray[np.float32]] = [np.empty((0, 0), np.float32)] * len(sequences)
    batches = plan_batches([len(s.ids) for s in sequences], token_budget)
    for batch in progress(batches, total=len(batches), desc="patched KL", unit="batch"):
        chosen = [sequences[i] for i in batch]
        ids_BT, _ = pad_ids([s.ids for s in chosen], 0)
        hidden_p, changed = run_batch(attached, ids_BT, chosen, patches)
        for row, (number, sequence) in enumerate(zip(batch, chosen, strict=True)):
            at = torch.from_numpy(sequence.predicted).to(hidden_p.device)
            came = ids_BT[row, sequence.predicted + 1]
            kls[number] = compare_hidden(
                attached.head, hidden_p[row, at], [hidden[row, at] for hidden in changed], came
            ).kl.numpy()
    return kls, [s.segments[s.predicted + 1] for s in sequences]


def run_batch(
    attached: Attached, ids_BT: Tensor, sequences: list[Sequence], patches: dict[str, Patch]
) -> tuple[Tensor, list[Tensor]]:
    """Last hidden states of the first pass, and of every variant's second pass."""
    from lorascope.edits import off, replace

    first = attached.trunk(ids_BT)
    real, ordinary = (torch.zeros(ids_BT.shape, dtype=torch.bool) for _ in range(2))
    for row, sequence in enumerate(sequences):
        real[row, : len(sequence.ids)] = True
        ordinary[row, : len(sequence.ids)] = torch.from_numpy(sequence.ordinary)
    z_BTN = first.scalars.float().cpu()

    def second(edit: AbstractContextManager[None]) -> Tensor:
        with edit:
            return attached.trunk(ids_BT).hidden

    hidden = [second(attached.edit(off("*"))), second(attached.edit(replace(z_BTN, "*", real)))]
    for patch in patches.values():
        values = z_BTN.clone()
        values[ordinary] = patch(z_BTN[ordinary])
        hidden.append(second(attached.edit(replace(values, "*", real))))
    return first.hidden, hidden


def pool_kls(
    names: list[str],
    kls: list[npt.NDArray[np.float32]],
    segments: list[npt.NDArray[np.uint8]],
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Means over all predicted tokens with intervals over traces, per variant and segment, and the headline."""
    from lorascope.traces import SEGMENT_NAMES

    sums = {name: np.array([kl[q].sum(dtype=np.float64) for kl in kls]) for q, name in enumerate(names)}
    counts = np.array([kl.shape[1] for kl in kls], np.float64)
    variants: dict[str, Any] = {}
    for q, name in enumerate(names):
        by_segment = {}
        for code, segment in enumerate(SEGMENT_NAMES):
            inside = [s == code for s in segments]
            n = np.array([mask.sum() for mask in inside], np.float64)
            if n.sum():
                part = np.array([kl[q, mask].sum(dtype=np.float64) for kl, mask in zip(kls, inside, strict=True)])
                by_segment[segment] = bootstrap_ratio(part, n, rng=rng).as_dict() | {"tokens": int(n.sum())}
        variants[name] = bootstrap_ratio(sums[name], counts, rng=rng).as_dict() | {"segments": by_segment}
    off = variants[OFF]["value"]
    return {
        "patched_kl": variants[LATENTS]["value"],
        "adapter_off_kl": off,
        "ratio": bootstrap_ratio(sums[LATENTS], sums[OFF], rng=rng).as_dict() if off > 0 else None,
        "floor": variants[EXACT]["value"],
        "predicted_tokens": int(counts.sum()),
        "variants": variants,
    }
