"""How well an SAE describes held-out scalars, beside as many principal components.

Legend: T tokens, N directions, F latents, K components.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from lorascope.sae.model import SAE
from lorascope.sae.moments import Doubles, Floats, Moments, Unit, principal_components

if TYPE_CHECKING:
    from lorascope.store import Store

COMPONENTS = 16


@torch.no_grad()
def measure_quality(
    sae: SAE, unit: Unit, moments: Moments, store: Store, heldout: Store, components: int = COMPONENTS
) -> dict[str, Any]:
    """JSON-ready quality of an SAE for raw scalars.

    Variance unexplained is over held-out ordinary tokens and about the training mean: `fvu_unit` in the training
    unit, `fvu_effect`, `fvu_std`, and per direction (where the unit cancels; None for a direction that never
    varies). `dead` is the share of latents that never fire on the training corpus.
    """
    fired = firing_counts(sae, store)
    tokens, codes = 0, 0
    n = len(moments.mean_N)
    error, pca_error, spread = np.zeros(n), np.zeros(n), np.zeros(n)
    read, write = fold_components(principal_components(moments, unit, components), unit)
    for rows in ordinary_chunks(heldout):
        codes_TF = sae.encode(torch.from_numpy(rows))
        deviation = rows - moments.mean_N
        error += np.square(rows - sae.decode(codes_TF).double().numpy()).sum(0)
        pca_error += np.square(deviation - deviation @ read @ write).sum(0)
        spread += np.square(deviation).sum(0)
        codes += int((codes_TF > 0).sum())
        tokens += len(rows)
    sizes = {
        "unit": unit.factor_N,
        "effect": moments.effect_per_scalar_N,
        "std": np.divide(1, np.sqrt(moments.variance_N), out=np.zeros_like(unit.factor_N), where=unit.factor_N > 0),
    }
    numbers: dict[str, Any] = {}
    for name, size in sizes.items():
        numbers[f"fvu_{name}"] = share(error, spread, size)
        numbers[f"pca_fvu_{name}"] = share(pca_error, spread, size)
    return numbers | {
        "l0": codes / max(tokens, 1),
        "dead": float((fired == 0).mean()),
        "dead_latents": int((fired == 0).sum()),
        "latents": sae.n_latents,
        "components": len(write),
        "heldout_tokens": tokens,
        "training_tokens": moments.count,
        "fvu_per_direction": [float(e / s) if s > 0 else None for e, s in zip(error, spread, strict=True)],
        "firing_share": [float(n) for n in fired / max(moments.count, 1)],
    }


def share(error_N: Doubles, spread_N: Doubles, size_N: Doubles) -> float:
    """Squared error over squared spread, both weighed by the unit's size of each direction."""
    return float((error_N * size_N**2).sum() / max((spread_N * size_N**2).sum(), 1e-300))


def fold_components(components_KN: Floats, unit: Unit) -> tuple[Floats, Floats]:
    """Components of the unit as maps for raw deviations: `(z - mean) @ read_NK @ write_KN`."""
    read = (components_KN * unit.factor_N).T.astype(np.float32)
    return np.ascontiguousarray(read), (components_KN * unit.inverse_N).astype(np.float32)


def ordinary_chunks(store: Store) -> Iterator[Floats]:
    """Raw scalars of ordinary tokens, chunk by chunk."""
    ordinary = store.ordinary
    for start, z_TN in store.chunks():
        rows = z_TN[ordinary[start : start + len(z_TN)]]
        if len(rows):
            yield rows


@torch.no_grad()
def firing_counts(sae: SAE, store: Store) -> npt.NDArray[np.int64]:
    """On how many ordinary tokens each latent fires, int64 [F]."""
    counts = np.zeros(sae.n_latents, np.int64)
    for rows in ordinary_chunks(store):
        counts += (sae.encode(torch.from_numpy(rows)) > 0).sum(0).numpy()
    return counts
