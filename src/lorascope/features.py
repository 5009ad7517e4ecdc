"""Features: anything with one non-negative activation per token, behind one type.

A kind of feature is one function from a study and a corpus to a `FeatureSet`, registered in `KINDS`; everything
from examples to scores then works on it. Shape legend: T tokens, N directions, F features.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

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
MOST_WAITING = 1 << 21
"""Activations held one by one before equal ones are counted together."""
BINS_PER_OCTAVE = 64
LOWEST, OCTAVES = -30, 48
"""Histograms of activations reach from 2^-30 to 2^18."""
BINS = OCTAVES * BINS_PER_OCTAVE
_PLACE_BITS = 17  # last bits of a float32, after those that tell its octave and one of 64 places in it
_FIRST_PLACE = (127 + LOWEST) * BINS_PER_OCTAVE


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
        return int((-(-np.diff(self.store.starts) // self.chunk_rows)).sum())

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
    file = study.require("sae/sae_weights.safetensors", "lorascope sae STUDY")
    stats = [path.stat() for path in (file, file.with_name("cfg.json"))]
    return read_latent_weights(file, *((stat.st_size, stat.st_mtime_ns) for stat in stats))


@lru_cache(maxsize=1)  # the latents of every corpus of a study share them
def read_latent_weights(file: Path, *state: tuple[int, int]) -> LatentWeights:
    """`latent_weights` of one state of their files."""
    cfg = json.loads(file.with_name("cfg.json").read_text(encoding="utf-8"))
    weights = {key: w.astype(np.float32, copy=False) for key, w in load_file(file).items()}
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


def bins_of(value_M: Floats) -> npt.NDArray[np.int64]:
    """Histogram bin of each activation: equal ratios, `BINS_PER_OCTAVE` to a factor of two, linear inside.

    What lies outside the histogram is counted in its outermost bins.
    """
    # the first bits of a positive float32 are its octave and its place there
    place_M = (value_M.view(np.uint32) >> _PLACE_BITS).astype(np.int64) - _FIRST_PLACE
    return np.clip(place_M, 0, BINS - 1)


def below_bins(bin_F: npt.NDArray[np.int64]) -> Floats:
    """The largest float32 below each bin: an activation above it lies in the bin or higher. 0 for the lowest bin."""
    edge_F = (bin_F + _FIRST_PLACE).astype(np.uint32) << _PLACE_BITS
    return np.where(bin_F > 0, (edge_F - np.uint32(1)).view(np.float32), np.float32(0))


def firing_levels(features: FeatureSet) -> Floats:
    """The firing level of each feature, float32 [F], exact.

    Latents: 0. Others: the smallest activation that at most 1% of the corpus's ordinary tokens exceed, which is
    0 for a feature that is 0 on 99% of them. Call it on the training corpus. Two readings of the store, whatever its
    length: the first finds the bin of each level, the second counts the different activations in that bin. Memory is
    that of F histograms, and of at most 17 values per feature where scalars of half precision are behind them.
    """
    levels_F = np.zeros(len(features.ids), np.float32)
    n = int(features.store.ordinary.sum())
    if features.latent or n == 0:
        return levels_F
    bin_F, rank_F = level_bins(features, int(n * LEVEL))  # so many tokens lie above the level
    found = np.flatnonzero(rank_F >= 0)
    if len(found):
        values, counts = values_in_bins(features, bin_F, rank_F >= 0)
        upto = np.cumsum(counts)
        first_M = np.searchsorted(values, found.astype(np.uint64) << np.uint64(32))
        before_M = np.where(first_M > 0, upto[first_M - 1], 0)
        chosen = values[np.searchsorted(upto, before_M + rank_F[found], side="right")]
        levels_F[found] = (np.uint32(0xFFFFFFFF) - chosen.astype(np.uint32)).view(np.float32)  # the low half
    return levels_F


def ordinary_activations(features: FeatureSet) -> Iterator[Floats]:
    """Activations of all features on the ordinary tokens of each chunk of the corpus, float32 [T, F]."""
    store = features.store
    for start, z_TN in store.chunks(features.chunk_rows):
        yield features.encode(z_TN[store.ordinary[start : start + len(z_TN)]], None)


def level_bins(features: FeatureSet, rank: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The bin of the activation with `rank` larger ones, and how many of these lie in that bin too, [F] each.

    A feature that does not fire on more than `rank` tokens has the rank -1 there.
    """
    count = len(features.ids)
    counts_FH = np.zeros((count, BINS), np.uint32)
    low_F, seen, due = np.zeros(count, np.float32), 0, 2 * rank
    for acts_TF in ordinary_activations(features):
        flat = np.flatnonzero(acts_TF > low_F)
        slots = flat % count * BINS + bins_of(acts_TF.reshape(-1)[flat])
        np.add.at(counts_FH.reshape(-1), slots, 1)
        seen += len(acts_TF)
        if seen > due:
            # More than `rank` activations reach this bin already, so the level is not below it, and what is need not be
            # counted any more: of a long corpus a twentieth is.
            low_F = below_bins(ranked_bins(counts_FH, rank)[0])
            due = seen * 9 // 8
    return ranked_bins(counts_FH, rank)


def ranked_bins(counts_FH: npt.NDArray[np.uint32], rank: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """What `level_bins` gives, from histograms; the bin of a feature without that many activations is 0."""
    from_top_FH = np.cumsum(counts_FH[:, ::-1], axis=1, dtype=np.uint32)
    place_F = np.argmax(from_top_FH > rank, axis=1)
    every_F = np.arange(len(counts_FH))
    enough_F = from_top_FH[:, -1] > rank
    bin_F = np.where(enough_F, BINS - 1 - place_F, 0)
    above_F = from_top_FH[every_F, place_F].astype(np.int64) - counts_FH[every_F, bin_F]
    return bin_F, np.where(enough_F, rank - above_F, -1)


def values_in_bins(
    features: FeatureSet, bin_F: npt.NDArray[np.int64], wanted_F: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """The different activations in one bin of each wanted feature, and how often each occurs.

    An activation is given as a number that sorts by feature, then by falling activation: the feature, and the
    activation's bits, which are in the order of the values, taken from all ones.
    """
    count = len(features.ids)
    low_F = np.where(wanted_F, below_bins(bin_F), np.float32(np.inf))
    high_F = np.where(bin_F < BINS - 1, below_bins(bin_F + 1), np.float32(np.inf))
    values, counts = np.zeros(0, np.uint64), np.zeros(0, np.int64)
    waiting: list[npt.NDArray[np.uint64]] = []
    size = 0
    for acts_TF in ordinary_activations(features):
        flat = np.flatnonzero(acts_TF > low_F)
        act_M, feature_M = acts_TF.reshape(-1)[flat], flat % count
        inside = act_M <= high_F[feature_M]
        bits_M = np.uint32(0xFFFFFFFF) - act_M[inside].view(np.uint32)
        waiting.append((feature_M[inside].astype(np.uint64) << np.uint64(32)) | bits_M)
        size += len(bits_M)
        if size > max(MOST_WAITING, len(values)):
            values, counts = counted(values, counts, waiting)
            waiting, size = [], 0
    return counted(values, counts, waiting)


def counted(
    values: npt.NDArray[np.uint64], counts: npt.NDArray[np.int64], more: list[npt.NDArray[np.uint64]]
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """Different numbers in rising order and how often each occurs, from such and from others one by one."""
    found, place, times = np.unique(np.concatenate([values, *more]), return_inverse=True, return_counts=True)
    times[place[: len(values)]] += counts - 1  # each stood for so many
    return found, times
