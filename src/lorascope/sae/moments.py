"""Mean and covariance of a store's ordinary tokens, and what follows from them: the training unit, components.

Legend: T tokens, N directions, K components. Scalars z are raw (as stored) unless said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lorascope.errors import BadInput

if TYPE_CHECKING:
    from lorascope.store import Store

Doubles = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]
UNITS = ("effect", "std", "raw")


@dataclass(frozen=True)
class Moments:
    """First and second moments of raw scalars over ordinary tokens, in float64."""

    count: int
    mean_N: Doubles
    covariance_NN: Doubles
    effect_per_scalar_N: Doubles
    """s·‖b‖ per direction: an effect is this times the scalar."""

    @property
    def variance_N(self) -> Doubles:
        """Variance of each scalar; exactly constant ones have 0."""
        return np.maximum(np.diag(self.covariance_NN), 0.0)


@dataclass(frozen=True)
class Unit:
    """A standardisation u = (z - offset) · factor. A factor of 0 marks a direction that carries nothing."""

    name: str
    offset_N: Doubles
    factor_N: Doubles

    @property
    def inverse_N(self) -> Doubles:
        """1 / factor, and 0 where the factor is 0 (the reconstruction is then the mean)."""
        return np.divide(1.0, self.factor_N, out=np.zeros_like(self.factor_N), where=self.factor_N > 0)

    def apply(self, z_TN: Floats) -> Floats:
        """Raw scalars in this unit, float32."""
        return np.multiply(
            z_TN - self.offset_N.astype(np.float32), self.factor_N, dtype=np.float32, casting="same_kind"
        )


def measure_moments(store: Store) -> Moments:
    """One pass over a store's ordinary tokens.

    Raises:
        BadInput: fewer than two ordinary tokens were recorded.
    """
    count, shift = 0, None
    ordinary = store.ordinary
    for start, z_TN in store.chunks():
        rows = z_TN[ordinary[start : start + len(z_TN)]].astype(np.float64)
        if not len(rows):
            continue
        if shift is None:  # sums about a value near the mean keep their digits
            shift = rows.mean(0)
            total, square = np.zeros_like(shift), np.zeros((len(shift), len(shift)))
        rows -= shift
        count += len(rows)
        total += rows.sum(0)
        square += rows.T @ rows
    if shift is None or count < 2:
        raise BadInput(f"{store.folder} holds fewer than two ordinary tokens; record a larger corpus.")
    mean = total / count
    covariance = square / count - np.outer(mean, mean)
    return Moments(count, shift + mean, covariance, np.asarray(store.effect_per_scalar, np.float64))


def choose_unit(moments: Moments, name: str) -> Unit:
    """The standardisation of a name: `effect`, `std` or `raw`, all about the mean.

    `effect` and `raw` are divided by one number, so that directions keep their relative sizes; `std` gives every
    direction variance 1. In each, the mean variance over directions that vary is 1.

    Raises:
        BadInput: an unknown name, or nothing varies.
    """
    if name not in UNITS:
        raise BadInput(f"{name!r} is not a unit of the SAE's input; use {', '.join(UNITS)}.")
    deviation = np.sqrt(moments.variance_N)
    size = {"effect": np.abs(moments.effect_per_scalar_N), "raw": np.ones_like(deviation)}.get(name)
    if size is None:
        # A direction that is constant but for rounding would be blown up to noise of size 1.
        varies = deviation > 1e-7 * np.maximum(np.abs(moments.mean_N), deviation.max(initial=0.0))
        size = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=varies)
    size = np.where(deviation > 0, size, 0.0)
    used = size > 0
    if not used.any():
        raise BadInput("No direction's scalar varies over the corpus, so there is nothing to decompose.")
    scale = np.sqrt(np.mean((size * deviation)[used] ** 2))
    return Unit(name, moments.mean_N, size / scale)


def principal_components(moments: Moments, unit: Unit, count: int) -> Floats:
    """The leading principal components in a unit, orthonormal float32 [K, N]; K is at most N."""
    scaled = moments.covariance_NN * np.outer(unit.factor_N, unit.factor_N)
    _, vectors = np.linalg.eigh(scaled)
    return np.ascontiguousarray(vectors[:, ::-1][:, :count].T, dtype=np.float32)
