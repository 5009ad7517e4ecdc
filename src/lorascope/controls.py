"""Controls: other vectors than the trained read vectors, read in the same places while the adapted model runs.

`random`: isotropic read vectors, and differences of two random tokens' inputs, both with random writes and rescaled to
the trained direction's standard deviation of effect. `untrained`: the read vectors of step 0 with the trained writes.
`neurons`: a random sample of the inputs of the MLPs' last maps, so after the gate or activation. The first two are
adapters, kept in `controls/` of the study so that every corpus is read with the same vectors; they are never put on
the model.

Shape legend: B traces of a batch, T tokens, N directions, R = directions of one module, I input width, O output width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lorascope.adapter import AdaptedModule, Adapter, build_adapter, initial_adapter
from lorascope.addresses import WRITE, group_of, locate_modules, side_of
from lorascope.attached import Attached, decoder_layers, find_module
from lorascope.decoders import linear_modules, linear_sizes
from lorascope.errors import BadInput, MissingStage
from lorascope.features import DIFFERENCE
from lorascope.fused_reading import SharedInput, shared_inputs
from lorascope.sinks import is_sink, middle_norms
from lorascope.store import Floats
from lorascope.study import Study
from lorascope.traces import Rendered

SAMPLE_TRACES, SAMPLE_TOKENS = 16, 256
"""Training traces, and the most tokens of each, from which token pairs are drawn and effects are matched."""


@dataclass(frozen=True)
class Site:
    """Where a probe reads: a module's path, and what its input [..., I] gives, [..., columns] fp32."""

    path: str
    read: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Probe:
    """Vectors to read. Columns are those of the sites in order."""

    addresses: list[str]
    effect_per_scalar: npt.NDArray[np.float32]
    sites: tuple[Site, ...]


@contextmanager
def probing(model: nn.Module, probes: Sequence[Probe]) -> Iterator[Callable[[], list[Tensor]]]:
    """Read probes in every forward inside; the function given returns each probe's last scalars [B·T, columns] fp32.

    Inputs are seen by hooks before the module's own forward, whatever that is: nothing that runs is changed.
    """
    seen: list[list[Tensor]] = [[torch.empty(0)] * len(probe.sites) for probe in probes]

    def keep(row: list[Tensor], place: int, site: Site) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            row[place] = site.read(inputs[0]).flatten(0, -2)  # some decoders' MLPs get the tokens end to end

        return hook

    with ExitStack() as stack:
        for row, probe in zip(seen, probes, strict=True):
            for place, site in enumerate(probe.sites):
                handle = model.get_submodule(site.path).register_forward_pre_hook(keep(row, place, site))
                stack.callback(handle.remove)
        yield lambda: [torch.cat([z.to(row[0].device) for z in row], dim=-1) for row in seen]


def adapter_probe(adapter: Adapter, model: nn.Module, addresses: Sequence[str]) -> Probe:
    """Reads an adapter's scalars without its having any effect; modules that share an input are read in one GEMM."""
    here = replace(adapter, modules=tuple(beside(part, model) for part in adapter.modules))
    sites = tuple(
        Site(part.path, partial(read_vectors, shared=shared, rows=rows))
        for part, (shared, rows) in zip(here.modules, shared_inputs(here), strict=True)
    )
    return Probe(list(addresses), adapter.effect_per_scalar, sites)


def read_vectors(x: Tensor, shared: SharedInput, rows: slice) -> Tensor:
    """Scalars [..., R] of one module of a group that shares its input."""
    return shared.scalars(x, rows)


def read_units(x: Tensor, units: Tensor) -> Tensor:
    """Some entries of an input [..., I]."""
    return x[..., units.to(x.device)].float()


def beside(part: AdaptedModule, model: nn.Module) -> AdaptedModule:
    """The part with its read vectors on the device of the module that they read at."""
    return replace(part, a_RI=part.a_RI.to(next(find_module(model, part).parameters()).device))


def neuron_probe(model: nn.Module, count: int, seed: int) -> Probe:
    """Reads `count` MLP neurons, drawn by seed from all layers, after the gate or activation.

    Each writes its column of the MLP's last map (`down_proj`, `fc2`, `dense_4h_to_h`, …). Addresses are `L3.512`
    (layer, unit). All neurons where there are fewer than `count`.

    Raises:
        BadInput: a layer has no such map or several, as routed experts, or it is not known by its name.
    """
    modules: dict[str, Any] = dict(linear_modules(model))
    located = locate_modules(modules)
    writes = ((place[0] or 0, path) for path, place in located.items() if group_of(place[1]) == "mlp")
    downs = sorted((layer, path) for layer, path in writes if side_of(located[path][1]) == WRITE)
    if not downs or len({layer for layer, _ in downs}) < len(downs):
        raise BadInput(
            "This model has no down_proj or its like, or several in a layer, so its MLP neurons are not known; leave "
            "neurons out of --source."
        )
    widths = [(linear_sizes(modules[path]) or (0, 0))[0] for _, path in downs]
    starts = np.cumsum([0, *widths])
    total = int(starts[-1])
    chosen = np.sort(np.random.default_rng(seed).choice(total, min(count, total), replace=False))
    addresses, effects, sites = [], [], []
    for (layer, path), first, stop in zip(downs, starts, starts[1:], strict=False):
        units = torch.from_numpy(chosen[(chosen >= first) & (chosen < stop)] - first)
        if len(units):
            weight_OI = modules[path].weight.detach()
            weight_OI = weight_OI.T if hasattr(modules[path], "nx") else weight_OI  # Conv1D keeps [in, out]
            effects.append(weight_OI[:, units.to(weight_OI.device)].float().norm(dim=0).cpu().numpy())
            addresses += [f"L{layer}.{unit}" for unit in units.tolist()]
            sites.append(Site(path, partial(read_units, units=units)))
    return Probe(addresses, np.concatenate(effects).astype(np.float32), tuple(sites))


def random_addresses(adapter: Adapter) -> list[str]:
    """Addresses of `random_control`'s directions: a module's isotropic ones, then its differences."""
    names: list[str] = []
    for part in adapter.modules:
        own = adapter.addresses[part.columns]
        names += [*own, *(name + DIFFERENCE for name in own)]
    return names


@torch.no_grad()
def random_control(attached: Attached, rendered: Sequence[Rendered], seed: int) -> Adapter:
    """Random directions in an adapter's places: for each of its own an isotropic one and a difference of two tokens.

    Read vectors have length 1. A difference is of the module's inputs at two ordinary tokens, drawn by seed from
    the sample of training traces; of different ids, as the first layer's inputs are alike where ids are. Write vectors
    are isotropic, and as long as it takes for the standard deviation of the effect over the sample's ordinary tokens
    to be the trained direction's.

    Raises:
        BadInput: the sample has fewer than two ordinary tokens of different ids.
    """
    adapter, sample = attached.adapter, spread_sample(rendered)
    z_TN, ordinary_T = sample_scalars(attached, sample)
    ordinary = np.flatnonzero(ordinary_T)
    ids = np.concatenate([one.ids for one in sample])[ordinary]
    if len(np.unique(ids)) < 2:
        raise BadInput("The training traces have fewer than two different ordinary tokens to draw directions by.")
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    first_N = rng.integers(len(ordinary), size=len(adapter.addresses))
    second_N = [rng.choice(np.flatnonzero(ids != ids[first])) for first in first_N]
    pairs_N2 = ordinary[np.stack([first_N, second_N], axis=1)]
    weights: dict[str, tuple[Tensor, Tensor, float]] = {}
    for part, input_2RI in zip(adapter.modules, inputs_at(attached, sample, pairs_N2), strict=True):
        isotropic_RI = torch.randn(part.a_RI.shape, generator=generator)
        a_KI = nn.functional.normalize(torch.cat([isotropic_RI, input_2RI[0] - input_2RI[1]]), dim=1)
        b_OK = nn.functional.normalize(torch.randn(len(part.b_OR), len(a_KI), generator=generator), dim=0)
        weights[part.path] = (a_KI, b_OK, 1.0)
    unscaled = build_adapter(weights, unit_config(adapter, weights))
    probe = adapter_probe(unscaled, attached.model, random_addresses(adapter))
    with probing(attached.model, [probe]) as read:
        z_TK = np.concatenate([(attached.trunk([one.ids.tolist()]), read()[0].cpu().numpy())[1] for one in sample])
    trained_N = adapter.effect_per_scalar * z_TN[ordinary_T].std(axis=0)
    return rescaled(unscaled, adapter, trained_N, z_TK[ordinary_T].std(axis=0))


def rescaled(unscaled: Adapter, adapter: Adapter, trained_N: Floats, std_K: Floats) -> Adapter:
    """The random directions with write vectors as long as makes their effects' deviations the trained ones'."""
    parts = []
    for part, own in zip(unscaled.modules, adapter.modules, strict=True):
        wanted_K, found_K = np.tile(trained_N[own.columns], 2), std_K[part.columns]
        length_K = np.divide(wanted_K, found_K, out=np.zeros_like(found_K), where=found_K > 0)
        parts.append(replace(part, b_OR=part.b_OR * torch.from_numpy(length_K.astype(np.float32))))
    return replace(unscaled, modules=tuple(parts))


def unit_config(adapter: Adapter, weights: dict[str, tuple[Tensor, Tensor, float]]) -> dict[str, Any]:
    """A PEFT configuration in which every module has its rank as alpha, so that all scales are 1."""
    ranks = {path: len(a_KI) for path, (a_KI, _, _) in weights.items()}
    first = next(iter(ranks.values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.config.get("base_model_name_or_path", ""),
        "r": first,
        "lora_alpha": first,
        "rank_pattern": {path: rank for path, rank in ranks.items() if rank != first},
        "alpha_pattern": {path: rank for path, rank in ranks.items() if rank != first},
        "target_modules": list(ranks),
        "bias": "none",
        "inference_mode": True,
    }


def spread_sample(rendered: Sequence[Rendered]) -> list[Rendered]:
    """At most `SAMPLE_TRACES` traces, evenly spread, each cut to its first `SAMPLE_TOKENS` tokens."""
    chosen = rendered[:: -(-len(rendered) // SAMPLE_TRACES)]
    return [replace(one, ids=one.ids[:SAMPLE_TOKENS], segments=one.segments[:SAMPLE_TOKENS]) for one in chosen]


def sample_scalars(attached: Attached, sample: Sequence[Rendered]) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """The adapted model's scalars [T, N] on the tokens of a sample, end to end, and which tokens are ordinary [T]."""
    z, ordinary = [], []
    for one in sample:
        with middle_norms(decoder_layers(attached.model, attached.adapter)) as norms:
            z.append(attached.trunk([one.ids.tolist()]).scalars[0].cpu().numpy())
        ordinary.append((one.segments != 0) & ~is_sink(norms[0][0].cpu().numpy()))
    return np.concatenate(z), np.concatenate(ordinary)


def inputs_at(attached: Attached, sample: Sequence[Rendered], tokens_NK: npt.NDArray[np.int64]) -> list[Tensor]:
    """Each module's input [K, R, I] fp32 at tokens of its directions' own; tokens are numbered through the sample."""
    adapter = attached.adapter
    found = [torch.zeros(tokens_NK.shape[1], *part.a_RI.shape) for part in adapter.modules]
    start = 0

    def keep(part: AdaptedModule, found_KRI: Tensor) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x_TI = inputs[0].flatten(0, -2)
            for r, k in np.argwhere((tokens_NK[part.columns] >= start) & (tokens_NK[part.columns] < start + len(x_TI))):
                found_KRI[k, r] = x_TI[tokens_NK[part.columns][r, k] - start].float().cpu()

        return hook

    with ExitStack() as stack:
        for part, found_KRI in zip(adapter.modules, found, strict=True):
            handle = find_module(attached.model, part).register_forward_pre_hook(keep(part, found_KRI))
            stack.callback(handle.remove)
        for one in sample:
            attached.trunk([one.ids.tolist()])
            start += len(one.ids)
    return found


def untrained_control(study: Study, model: nn.Module, adapter: Adapter) -> Adapter:
    """The adapter with the read vectors that its training began with, drawn again from the training's own seed.

    Raises:
        MissingStage: the adapter was not trained in this study, or in another way than its record says.
    """
    record = study.manifest["stages"].get("train:adapter")
    if record is None:
        raise MissingStage(
            f"The adapter of {study.path} was not trained here, so its read vectors at step 0 are not known; leave "
            "untrained out of --source."
        )
    config = record["config"]
    start = initial_adapter(
        model,
        patterns=config["modules"],
        layers=config["layers"],
        rank=config["rank"],
        alpha=config["alpha"],
        seed=record["options"]["seed"],
    )
    if [part.path for part in start.modules] != [part.path for part in adapter.modules]:
        raise MissingStage(
            f"The adapter of {study.path} adapts other modules than its training's record says, so its step 0 is not "
            f"known; run: lorascope train {study.path}, or leave untrained out of --source."
        )
    pairs = zip(adapter.modules, start.modules, strict=True)
    return replace(adapter, modules=tuple(replace(part, a_RI=first.a_RI) for part, first in pairs))
