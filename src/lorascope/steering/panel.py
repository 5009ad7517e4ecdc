"""What can be watched and steered: the polarities of an adapter's directions and the latents of its SAE, by name.

Shape legend: T tokens, N directions, F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq

from lorascope.adapter import Adapter
from lorascope.errors import BadInput, MissingStage, RunFailed
from lorascope.features import LatentWeights, jumprelu_codes, latent_weights, polarity_codes
from lorascope.store import Floats
from lorascope.study import Study


@dataclass(frozen=True)
class Place:
    """Where a feature is: a latent's number, or a direction's column and the sign of its polarity."""

    latent: bool
    number: int
    sign: int = 1


@dataclass(frozen=True)
class Panel:
    """The features of one adapter, with the units of their amounts. It holds no language model."""

    addresses: Sequence[str]
    effect_N: Floats
    """s·‖b‖ of each direction: effect = this × scalar."""
    latents: LatentWeights | None
    """The SAE's weights, for raw scalars; None without an SAE."""
    p99: dict[str, float]
    """99th percentile of each feature's firing activations: the unit of an amount."""
    study: str = "STUDY"
    corpus: str = "train"

    def place(self, feature: str) -> Place:
        """Where a feature is: `L12.gate+`, `L12.gate-` or `sae.17`.

        Raises:
            BadInput: there is no such feature.
            MissingStage: a latent is named and there is no SAE.
        """
        head, _, number = feature.partition(".")
        if head == "sae" and number.isdecimal():
            if self.latents is None:
                raise MissingStage(
                    f"{feature} is a latent, and there is no SAE; run first: lorascope sae {self.study}."
                )
            if int(number) < len(self.latents.b_enc_F):
                return Place(True, int(number))
        elif feature[-1:] in ("+", "-") and feature[:-1] in self.addresses:
            return Place(False, list(self.addresses).index(feature[:-1]), 1 if feature[-1] == "+" else -1)
        count = 0 if self.latents is None else len(self.latents.b_enc_F)
        latents = f" or a latent, sae.0 to sae.{count - 1}" if count else ""
        raise BadInput(f"There is no feature {feature!r}: name a polarity such as {self.addresses[0]}+{latents}.")

    def unit(self, feature: str) -> float:
        """The feature's 99th percentile of firing activations: effect for a direction, code for a latent.

        Raises:
            MissingStage: examples were not searched for, so it is not known.
            BadInput: the feature never fires.
        """
        self.place(feature)
        if feature not in self.p99:
            raise MissingStage(
                f"The usual strength of {feature} on {self.corpus} is not known; "
                f"run first: lorascope examples {self.study} --corpus {self.corpus}."
            )
        if not self.p99[feature] > 0:
            raise BadInput(
                f"{feature} never fires on {self.corpus}, so its amount has no unit; steer another feature, "
                "or the other polarity by a negative amount."
            )
        return self.p99[feature]

    def activations(self, features: Sequence[str], z_TN: Floats) -> Floats:
        """Activations of features on tokens, float32 [T, F] from raw scalars."""
        places = [self.place(feature) for feature in features]
        acts_TF = np.zeros((len(z_TN), len(places)), np.float32)
        for latent, encode in ((False, self._polarities), (True, self._codes)):
            chosen = [i for i, place in enumerate(places) if place.latent == latent]
            if chosen:
                acts_TF[:, chosen] = encode(z_TN, [places[i] for i in chosen])
        return acts_TF + np.float32(0)  # no minus zeros, which a code below its threshold is

    def _polarities(self, z_TN: Floats, places: Sequence[Place]) -> Floats:
        wanted = np.array([2 * place.number + (place.sign < 0) for place in places], np.intp)
        return polarity_codes(z_TN, wanted, effect_N=self.effect_N)

    def _codes(self, z_TN: Floats, places: Sequence[Place]) -> Floats:
        assert self.latents is not None  # `place` found a latent
        wanted = np.array([place.number for place in places], np.intp)
        w = self.latents
        return jumprelu_codes(z_TN, w.W_enc_NF[:, wanted], w.b_enc_F[wanted], w.threshold_F[wanted])


def open_panel(study: Study, adapter: Adapter, corpus: str = "train") -> Panel:
    """The panel of a study; what has not been made yet (SAE, examples) is missed only where it is needed.

    Args:
        corpus: whose examples give the units of amounts.

    Raises:
        RunFailed: the SAE was trained on another adapter.
    """
    latents = latent_weights(study) if (study.path / "sae" / "sae_weights.safetensors").is_file() else None
    if latents is not None and len(latents.W_enc_NF) != len(adapter.addresses):
        raise RunFailed(
            f"The SAE reads {len(latents.W_enc_NF)} scalars, the adapter has {len(adapter.addresses)}; "
            f"run again: lorascope sae {study.path}"
        )
    p99: dict[str, float] = {}
    for kind in ("direction", "latent"):
        path = study.path / stats_file(corpus, kind)
        if path.is_file():
            table = pq.read_table(path, columns=["feature", "p99"]).to_pydict()
            p99 |= dict(zip(table["feature"], table["p99"], strict=True))
    return Panel(adapter.addresses, adapter.effect_per_scalar, latents, p99, str(study.path), corpus)


def stats_file(corpus: str, kind: str) -> str:
    """Where the examples stage keeps a kind's statistics, relative to the study."""
    return f"examples/{corpus}/{kind}-stats.parquet"
