"""Features: anything with one non-negative activation per token, behind one type.

A kind of feature is one function from a study and a corpus to a `FeatureSet`, registered in `KINDS`; everything
from examples to scores then works on it. Shape legend: T tokens, N directions, F features.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from lorascope.errors import BadInput, MissingStage, RunFailed
from lorascope.store import Floats, Store, store_folder
from lorascope.study import Study

Encode = Callable[[Floats, npt.NDArray[np.intp] | None], Floats]
"""Scalars z_TN, and the features wanted (None: all), to activations [T, features]."""

CHUNK_ACTIVATIONS = 1 << 20  # 4 MB of float32
LEVEL = 0.01
"""A feature that is no latent fires where its activation is above the level that 1% of ordinary tokens exceed."""
LIKELY = 0.02
"""Share of tokens looked at to find that level: those above the 2% level of a sample of `SAMPLE_ROWS`."""
SAMPLE_ROWS = 1 << 14
LEVEL_BYTES = 1 << 27
"""Memory for one group of features while their levels are found."""


@dataclass(frozen=True)
class FeatureSet:
    """All features of one kind on one corpus."""

    kind: str
    ids: list[str]
    """`L12.gate+`, `sae.17`, `random.L12.gate+`, `neuron.L3.512-`: one per feature, in the activations' order."""
    unit: str
    """What an activation is measured in."""
    latent: bool
    """A latent fires above 0 (its threshold is in its encoder), any other feature above its firing level."""
    store: Store
    encode: Encode

    @property
    def chunk_rows(self) -> int:
        """Most tokens in one of `chunks`."""
        return max(1, CHUNK_ACTIVATIONS // max(1, len(self.ids)))

    @property
    def n_chunks(self) -> int:
        """How many `chunks` there are."""
        return sum(-(-len(shard) // self.chunk_rows) for shard in self.store.shards)

    def chunks(self) -> Iterator[tuple[int, Floats]]:
        """Yield (first token, acts_TF float32 >= 0) over the corpus in order; a chunk may cut a trace."""
        for start, z_TN in self.store.chunks(self.chunk_rows):
            yield start, self.encode(z_TN, None)

    def columns(self, indices: npt.ArrayLike) -> Floats:
        """Activations of some features on every token, float32 [T, len(indices)]."""
        wanted = np.asarray(indices, np.intp)
        acts = np.empty((self.store.n_tokens, len(wanted)), np.float32)
        for start, z_TN in self.store.chunks():
            acts[start : start + len(z_TN)] = self.encode(z_TN, wanted)
        return acts


def jumprelu_codes(z_TN: Floats, W_enc: Floats, b_enc: Floats, threshold: Floats) -> Floats:
    """Latents' activations, float32 [T, F]: relu(z·W_enc + b_enc) where that is above the threshold, else 0.

    Args:
        z_TN: raw scalars; the unit in which the SAE was trained is folded into its weights.
        W_enc: [N, F].
        b_enc, threshold: [F].
    """
    codes_TF = z_TN @ W_enc
    codes_TF += b_enc
    codes_TF *= codes_TF > np.maximum(threshold, 0.0)
    return codes_TF


def polarity_codes(z_TN: Floats, wanted: npt.NDArray[np.intp] | None, *, effect_N: Floats) -> Floats:
    """Activations of directions' polarities: relu(+effect), relu(-effect) of each direction in turn, [T, 2N]."""
    if wanted is not None:
        signed_F = effect_N[wanted // 2] * np.where(wanted % 2, np.float32(-1), np.float32(1))
        signed_TF = z_TN[:, wanted // 2] * signed_F
        return np.maximum(signed_TF, 0, out=signed_TF)
    acts_TNP = np.empty((*z_TN.shape, 2), np.float32)
    np.multiply(z_TN, effect_N, out=acts_TNP[..., 0])
    np.negative(acts_TNP[..., 0], out=acts_TNP[..., 1])
    np.maximum(acts_TNP, 0, out=acts_TNP)
    return acts_TNP.reshape(len(z_TN), 2 * z_TN.shape[1])


def polarity_features(study: Study, corpus: str, *, kind: str, source: str, prefix: str = "") -> FeatureSet:
    """Both polarities of every column of a store; the activation is |effect| where the effect has that sign."""
    store = Store.open(store_folder(study.path, corpus, source))
    ids = [f"{prefix}{address}{sign}" for address in store.addresses for sign in "+-"]
    encode = partial(polarity_codes, effect_N=store.effect_per_scalar)
    return FeatureSet(kind, ids, "effect", False, store, encode)


@dataclass(frozen=True)
class LatentWeights:
    """The SAE's weights, float32, for raw scalars: the unit in which it was trained is folded in."""

    W_enc_NF: Floats
    W_dec_FN: Floats
    b_enc_F: Floats
    threshold_F: Floats


def latent_weights(study: Study) -> LatentWeights:
    """What the study's folder `sae/` (SAELens files) says.

    Raises:
        MissingStage: there is no SAE yet.
    """
    folder = study.require("sae/sae_weights.safetensors", "lorascope sae STUDY").parent
    cfg = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
    weights = {key: w.astype(np.float32) for key, w in load_file(folder / "sae_weights.safetensors").items()}
    W_enc, b_enc = weights["W_enc"], weights["b_enc"]
    if cfg.get("apply_b_dec_to_input"):
        b_enc = b_enc - weights["b_dec"] @ W_enc
    return LatentWeights(W_enc, weights["W_dec"], b_enc, weights["threshold"])


def latent_features(study: Study, corpus: str) -> FeatureSet:
    """The SAE's latents on the adapter's scalars."""
    sae = latent_weights(study)
    store = Store.open(store_folder(study.path, corpus, "adapter"))
    if len(sae.W_enc_NF) != len(store.addresses):
        raise RunFailed(
            f"The SAE reads {len(sae.W_enc_NF)} scalars, the store of {corpus} has {len(store.addresses)}; "
            f"run again: lorascope sae {study.path}"
        )

    def encode(z_TN: Floats, wanted: npt.NDArray[np.intp] | None) -> Floats:
        which = slice(None) if wanted is None else wanted
        return jumprelu_codes(z_TN, sae.W_enc_NF[:, which], sae.b_enc_F[which], sae.threshold_F[which])

    return FeatureSet("latent", [f"sae.{i}" for i in range(len(sae.b_enc_F))], "code", True, store, encode)


KINDS: dict[str, Callable[[Study, str], FeatureSet]] = {
    "direction": partial(polarity_features, kind="direction", source="adapter"),
    "latent": latent_features,
    "base": partial(polarity_features, kind="base", source="base", prefix="base."),
    "random": partial(polarity_features, kind="random", source="random", prefix="random."),
    "untrained": partial(polarity_features, kind="untrained", source="untrained", prefix="untrained."),
    "neuron": partial(polarity_features, kind="neuron", source="neurons", prefix="neuron."),
}
DIFFERENCE = "#difference"
"""Ends the address of a random direction whose read vector is a difference of two tokens' inputs: `L12.gate#difference`
beside the isotropic `L12.gate`."""
CONTROLS = ("base", "random", "untrained", "neuron")
"""Kinds of features that others are compared with."""


def source_of(kind: str) -> str:
    """Whose store the features of a kind are read from."""
    return {"direction": "adapter", "latent": "adapter", "neuron": "neurons"}.get(kind, kind)


def cluster_of(feature: str) -> str:
    """The two polarities of a direction (or of a control) are one cluster: the id without its sign."""
    return feature.rstrip("+-")


def load_features(study: Study, corpus: str, kind: str) -> FeatureSet:
    """The features of one kind on one corpus.

    Raises:
        BadInput: no such kind.
        MissingStage: the corpus is not recorded, or the SAE not trained.
    """
    if kind not in KINDS:
        raise BadInput(f"There is no kind of feature {kind!r}; choose from {', '.join(KINDS)}.")
    return KINDS[kind](study, corpus)


def available_kinds(study: Study, corpus: str) -> list[str]:
    """The kinds whose earlier stages have been run for this corpus, and for the training corpus, which sets levels."""
    kinds: list[str] = []
    for kind in KINDS:
        try:
            for name in (corpus, "train"):
                load_features(study, name, kind)
        except MissingStage:
            continue
        kinds.append(kind)
    return kinds


def firing_levels(features: FeatureSet) -> Floats:
    """The firing level of each feature, float32 [F], exact.

    Latents: 0. Others: the smallest activation that at most 1% of the corpus's ordinary tokens exceed, which is
    0 for a feature that is 0 on 99% of them. Call it on the training corpus. Memory is bounded: features are
    taken in groups, with one reading of the store each.
    """
    levels_F = np.zeros(len(features.ids), np.float32)
    n = int(features.store.ordinary.sum())
    if features.latent or n == 0:
        return levels_F
    rank = int(n * LEVEL)  # so many tokens lie above the level
    sample_SN = spaced_scalars(features.store, SAMPLE_ROWS)
    size = max(1, int(LEVEL_BYTES / (32 * LIKELY * n + 1)))
    for first in range(0, len(levels_F), size):
        group = np.arange(first, min(first + size, len(levels_F)))
        low_G = likely_bounds(features.encode(sample_SN, group))
        counts_G, levels_F[group] = ranked_values(features, group, low_G, rank)
        again = group[(counts_G <= rank) & (low_G > 0)]  # the sample misled: their level is below its bound
        if len(again):
            levels_F[again] = ranked_values(features, again, np.zeros(len(again), np.float32), rank)[1]
    return levels_F


def spaced_scalars(store: Store, most: int) -> Floats:
    """Scalars of at most so many evenly spaced ordinary tokens, read in order so that memory stays small."""
    positions = np.flatnonzero(store.ordinary)
    positions = positions[:: -(-len(positions) // most)]
    parts: list[Floats] = []
    for start, z_TN in store.chunks():
        first, stop = np.searchsorted(positions, [start, start + len(z_TN)])
        parts.append(z_TN[positions[first:stop] - start])
    return np.concatenate(parts)


def likely_bounds(acts_SG: Floats) -> Floats:
    """A bound for each column that about 2% of the tokens exceed, from a sample of their activations."""
    rank = int(len(acts_SG) * (1 - LIKELY))
    bound_G: Floats = np.partition(acts_SG, rank, axis=0)[rank]
    return bound_G


def ranked_values(
    features: FeatureSet, group: npt.NDArray[np.intp], low_G: Floats, rank: int
) -> tuple[npt.NDArray[np.int64], Floats]:
    """How many ordinary tokens are above `low_G`, and the activation with `rank` larger ones (0 if too few)."""
    whole = len(group) == len(features.ids)
    parts: list[npt.NDArray[np.uint64]] = []
    store = features.store
    for start, z_TN in store.chunks(max(1, CHUNK_ACTIVATIONS // len(group))):
        acts_TG = features.encode(z_TN[store.ordinary[start : start + len(z_TN)]], None if whole else group)
        flat = np.flatnonzero(acts_TG > low_G)
        # a number that sorts by feature, then by falling activation, whose bits are in the order of its values
        bits = np.uint32(0xFFFFFFFF) - acts_TG.reshape(-1)[flat].view(np.uint32)
        parts.append(((flat % len(group)).astype(np.uint64) << np.uint64(32)) | bits)
    found = np.sort(np.concatenate(parts))
    bounds = np.searchsorted(found, np.arange(len(group) + 1, dtype=np.uint64) << np.uint64(32))
    counts_G = np.diff(bounds)
    enough = counts_G > rank
    values_G = np.zeros(len(group), np.float32)
    chosen = found[bounds[:-1][enough] + rank].astype(np.uint32)  # the low half
    values_G[enough] = (np.uint32(0xFFFFFFFF) - chosen).view(np.float32)
    return counts_G, values_G
