"""What optional packages do: sentence embeddings (extra `embed`) and UMAP (extra `umap`), imported when asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lorascope.errors import BadInput
from lorascope.explain.categories.clusters import FloatArray


def embed_texts(texts: Sequence[str], model: str, device: str) -> FloatArray:
    """Embeddings of length 1, float64 [texts, width], by a sentence-transformers model (hub id or folder).

    Raises:
        BadInput: the package is not installed, or the model cannot be loaded.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise BadInput("--embed needs the sentence-transformers package: pip install sentence-transformers.") from error
    try:
        encoder = SentenceTransformer(model, device=None if device == "auto" else device)
    except (OSError, ValueError) as error:
        raise BadInput(f"Cannot load the embedding model {model}: {' '.join(str(error).split())[:200]}.") from error
    return np.asarray(encoder.encode(list(texts), normalize_embeddings=True, show_progress_bar=False), np.float64)


def place_by_umap(points_PX: FloatArray, seed: int) -> FloatArray:
    """A UMAP of the points, float64 [P, 2], the same for the same seed.

    Raises:
        BadInput: the package is not installed.
    """
    try:
        from umap import UMAP
    except ImportError as error:
        raise BadInput("--map umap needs the umap-learn package: pip install umap-learn.") from error
    neighbours = max(2, min(15, len(points_PX) - 1))
    start = "random" if len(points_PX) < 40 else "spectral"  # few points have no spectrum to start from
    made = UMAP(n_components=2, n_neighbors=neighbours, random_state=seed, n_jobs=1, init=start)
    return np.asarray(made.fit_transform(points_PX), np.float64)
