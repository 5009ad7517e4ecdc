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

CHUNK_ACTIVATIONS = 1 << 21  # 8 MB of float32
LEVEL = 0.01
"""A feature that is no latent fires where its activation is above the level that 1% of ordinary tokens exceed."""
LEVEL_BYTES = 1 << 28
"""Memory for one group of features while their levels are found."""


@dataclass(frozen=True)
class FeatureSet:
    """All features of one kind on one corpus."""

    kind: str
    ids: list[str]
    """`L12.gate+`, `sae.17`, `base.L12.gate+`: one per feature, in the order of the activations' last axis."""
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
    effect_TN = z_TN * effect_N
    acts_TNP = np.empty((*z_TN.shape, 2), np.float32)
    np.maximum(effect_TN, 0, out=acts_TNP[..., 0])
    np.maximum(-effect_TN, 0, out=acts_TNP[..., 1])
    return acts_TNP.reshape(len(z_TN), 2 * z_TN.shape[1])


def polarity_features(study: Study, corpus: str, *, kind: str, source: str, prefix: str = "") -> FeatureSet:
    """Both polarities of every column of a store; the activation is |effect| where the effect has that sign."""
    store = Store.open(store_folder(study.path, corpus, source))
    ids = [f"{prefix}{address}{sign}" for address in store.addresses for sign in "+-"]
    encode = partial(polarity_codes, effect_N=store.effect_per_scalar)
    return FeatureSet(kind, ids, "effect", False, store, encode)


def latent_features(study: Study, corpus: str) -> FeatureSet:
    """The SAE's latents, from the folder `sae/` (SAELens files) and the adapter's scalars."""
    folder = study.require("sae/sae_weights.safetensors", "lorascope sae STUDY").parent
    store = Store.open(store_folder(study.path, corpus, "adapter"))
    cfg = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
    weights = {key: w.astype(np.float32) for key, w in load_file(folder / "sae_weights.safetensors").items()}
    W_enc, b_enc = weights["W_enc"], weights["b_enc"]
    if W_enc.shape[0] != len(store.addresses):
        raise RunFailed(
            f"The SAE reads {W_enc.shape[0]} scalars, the store of {corpus} has {len(store.addresses)}; "
            f"run again: lorascope sae {study.path}"
        )
    if cfg.get("apply_b_dec_to_input"):
        b_enc = b_enc - weights["b_dec"] @ W_enc

    def encode(z_TN: Floats, wanted: npt.NDArray[np.intp] | None) -> Floats:
        which = slice(None) if wanted is None else wanted
        return jumprelu_codes(z_TN, W_enc[:, which], b_enc[which], weights["threshold"][which])

    return FeatureSet("latent", [f"sae.{i}" for i in range(W_enc.shape[1])], "code", True, store, encode)


KINDS: dict[str, Callable[[Study, str], FeatureSet]] = {
    "direction": partial(polarity_features, kind="direction", source="adapter"),
    "latent": latent_features,
    "base": partial(polarity_features, kind="base", source="base", prefix="base."),
}


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
    """The kinds whose earlier stages have been run for this corpus."""
    kinds: list[str] = []
    for kind in KINDS:
        try:
            load_features(study, corpus, kind)
        except MissingStage:
            continue
        kinds.append(kind)
    return kinds


def level_rank(n: int) -> int:
    """How many of n ordinary tokens lie above a firing level (when there are no ties): 1%, rounded down."""
    return int(n * LEVEL)


def firing_levels(features: FeatureSet) -> Floats:
    """The firing level of each feature, float32 [F], exact.

    Latents: 0. Others: the smallest activation that at most 1% of the corpus's ordinary tokens exceed, which is
    0 for a feature that is 0 on 99% of them. Call it on the training corpus. Memory is bounded: features are
    taken in groups, with one reading of the store each.
    """
    levels_F = np.zeros(len(features.ids), np.float32)
    ordinary_T = features.store.ordinary
    n = int(ordinary_T.sum())
    if features.latent or n == 0:
        return levels_F
    kept = level_rank(n) + 1
    size = max(1, LEVEL_BYTES // (4 * 4 * kept))  # a group's buffer has room for three times what is kept
    for first in range(0, len(levels_F), size):
        group = np.arange(first, min(first + size, len(levels_F)))
        levels_F[group] = largest_values(features, group, ordinary_T, kept).min(axis=0)
    return levels_F


def largest_values(
    features: FeatureSet, group: npt.NDArray[np.intp], ordinary_T: npt.NDArray[np.bool_], kept: int
) -> Floats:
    """The `kept` largest activations of each feature of a group on ordinary tokens, [kept, len(group)], unsorted.

    New rows gather behind the largest so far until the buffer is full, then all but the largest are dropped.
    """
    whole = len(group) == len(features.ids)
    rows = max(1, CHUNK_ACTIVATIONS // len(group))
    buffer = np.empty((3 * kept + rows, len(group)), np.float32)
    filled = 0
    for start, z_TN in features.store.chunks(rows):
        z_TN = z_TN[ordinary_T[start : start + len(z_TN)]]
        acts_TG = features.encode(z_TN, None if whole else group)
        if filled + len(acts_TG) > len(buffer):
            filled = drop_small(buffer[:filled], kept)
        buffer[filled : filled + len(acts_TG)] = acts_TG
        filled += len(acts_TG)
    return buffer[: drop_small(buffer[:filled], kept)]


def drop_small(rows_MG: Floats, kept: int) -> int:
    """Move the `kept` largest of each column to the top, in place; returns how many rows those are."""
    if len(rows_MG) > kept:
        rows_MG[:kept] = np.partition(rows_MG, len(rows_MG) - kept, axis=0)[len(rows_MG) - kept :]
    return min(kept, len(rows_MG))
