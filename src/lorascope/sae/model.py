"""The sparse autoencoder over all directions' scalars, and how a standardisation is folded into it.

Legend: T tokens, N directions, F latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorascope.sae.moments import Unit


@dataclass(frozen=True)
class SAE:
    """codes = relu(x·W_enc + b_enc) where that exceeds the threshold, else 0; reconstruction = codes·W_dec + b_dec.

    A token's codes depend on that token alone. Weights are fp32; x is in the unit they were trained in, or raw
    scalars after `fold`.
    """

    W_enc_NF: Tensor
    W_dec_FN: Tensor
    b_enc_F: Tensor
    b_dec_N: Tensor
    threshold_F: Tensor

    @property
    def n_directions(self) -> int:
        """Width of the input."""
        return self.W_enc_NF.shape[0]

    @property
    def n_latents(self) -> int:
        """Number of latents."""
        return self.W_enc_NF.shape[1]

    def encode(self, x_TN: Tensor) -> Tensor:
        """Codes [..., F] of inputs [..., N]."""
        before = torch.matmul(x_TN, self.W_enc_NF) + self.b_enc_F
        return torch.where(before > self.threshold_F, before.relu(), 0.0)

    def decode(self, codes_TF: Tensor) -> Tensor:
        """Reconstruction [..., N] from codes [..., F]."""
        return torch.matmul(codes_TF, self.W_dec_FN) + self.b_dec_N

    def reconstruct(self, x_TN: Tensor) -> Tensor:
        """Decode what was encoded; same shape and unit as the input."""
        return self.decode(self.encode(x_TN))

    def to(self, device: torch.device | str) -> SAE:
        """The same weights on a device."""
        return SAE(*(t.to(device) for t in self.tensors().values()))

    def tensors(self) -> dict[str, Tensor]:
        """The weights under the names that SAELens gives them."""
        return {
            "W_enc": self.W_enc_NF,
            "W_dec": self.W_dec_FN,
            "b_enc": self.b_enc_F,
            "b_dec": self.b_dec_N,
            "threshold": self.threshold_F,
        }


def fold(sae: SAE, unit: Unit) -> SAE:
    """The same autoencoder for raw scalars: same codes, reconstruction in raw units.

    With u = (z - offset)·factor: u·W + b = z·(factor·W) + (b - (offset·factor)·W), in float64, then fp32.
    """
    factor = torch.from_numpy(np.asarray(unit.factor_N, np.float64))
    inverse = torch.from_numpy(unit.inverse_N)
    offset = torch.from_numpy(np.asarray(unit.offset_N, np.float64))
    W_enc = sae.W_enc_NF.cpu().double() * factor[:, None]
    return SAE(
        W_enc.float().contiguous(),
        (sae.W_dec_FN.cpu().double() * inverse).float().contiguous(),
        (sae.b_enc_F.cpu().double() - offset @ W_enc).float(),
        (sae.b_dec_N.cpu().double() * inverse + offset).float(),
        sae.threshold_F.cpu().clone(),
    )
