"""What a note's place means now: the adapter or autoencoder whose feature it names, or the trace at that number.

Names stay when a study is made anew and what they name does not: `sae.17` of another autoencoder is another latent.
"""

import contextlib

from lorascope.errors import BadInput, RunFailed
from lorascope.study import Study, digest
from lorascope.views.feature_list import feature_kind
from lorascope.views.kept import kept_view
from lorascope.views.one_feature import open_features

MADE_FROM = {"latent": "sae/sae_weights.safetensors", "direction": "adapter", "base": "adapter"}
"""What decides which features of a kind there are; controls are the same for any adapter of a model."""
EARLIER = {
    "latent": "an earlier autoencoder's latent",
    "direction": "an earlier adapter's direction",
    "base": "an earlier adapter's direction",
}


def about_place(study: Study, place: str) -> str:
    """What a place (as in `notes.PLACE`) stands for in the study as it is: a short digest, "" where nobody can say."""
    sort, _, rest = place.partition(":")
    with contextlib.suppress(BadInput, RunFailed, OSError, IndexError):  # there is no such corpus, trace or file
        if sort == "feature":
            source = MADE_FROM.get(feature_kind(rest))  # hashed once per state of the study
            return str(kept_view(study, Study.fingerprint, source) or "")[:12] if source else ""
        if sort in ("trace", "token"):
            corpus, index, *_ = rest.split(":")
            store = open_features(study, corpus, "direction").store
            first, stop = (int(store.offsets[int(index) + more]) for more in (0, 1))
            return digest([store.trace_ids[int(index)], store.tokens[first:stop].tolist()])[:12]
    return ""


def moved_to(study: Study, place: str, abouts: tuple[str, ...]) -> str:
    """What a note is about, where that is no longer what its place names; "" where it still is, or nobody can say."""
    now = about_place(study, place) if abouts else ""
    if not now or all(about == now for about in abouts):
        return ""
    sort, _, rest = place.partition(":")
    return EARLIER[feature_kind(rest)] if sort == "feature" else "an earlier trace of this number"
