"""Which directions act together: the matrix of pairwise interactions that screening leaves.

Shape legend: N directions.
"""

import base64

import numpy as np
from safetensors import SafetensorError, safe_open

from lorascope.errors import RunFailed
from lorascope.study import Study
from lorascope.views.reading import Json, missing, ready

FILE = "ablation/interactions.safetensors"
COMMAND = "lorascope ablate STUDY --by direction --method screen"
STRONGEST = 20


def interaction_matrix(study: Study) -> Json:
    """Interactions of every pair of directions.

    Returns:
        `{"available", "addresses", "cosines": base64 of int8 [N, N], 127 standing for 1, "pairs": [{"first", "second",
        "kl", "cosine"}]}`. `kl` is the KL that switching both off has beyond the sum of each alone (negative: less),
        to second order, in nats per predicted token; the cosine is of their gradients, 1 where both change the same
        predictions alike, -1 where they cancel. Pairs are the strongest by absolute `kl`.

    Raises:
        RunFailed: the file is damaged.
    """
    path = study.path / FILE
    if not path.is_file():
        return missing(study, "the interaction matrix", COMMAND)
    try:
        with safe_open(path, framework="numpy") as file:
            addresses = (file.metadata() or {}).get("addresses", "").split(",")
            kl_NN = file.get_tensor("kl_NN").astype(np.float64)
    except (OSError, SafetensorError) as error:
        raise RunFailed(
            f"{path} is damaged ({error}); run again: {COMMAND.replace('STUDY', str(study.path))}"
        ) from error
    root_N = np.sqrt(np.maximum(np.diag(kl_NN), 1e-30))
    cosine_NN = np.clip(kl_NN / (root_N[:, None] * root_N), -1, 1)
    first, second = np.triu_indices(len(addresses), 1)
    order = np.argsort(-np.abs(kl_NN[first, second]), kind="stable")[:STRONGEST]
    pairs = [
        {"first": addresses[i], "second": addresses[j], "kl": 2 * kl_NN[i, j], "cosine": cosine_NN[i, j]}
        for i, j in zip(first[order], second[order], strict=True)
    ]
    codes = np.rint(127 * cosine_NN).astype(np.int8)
    matrix = {"addresses": addresses, "cosines": base64.b64encode(codes.tobytes()).decode("ascii")}
    return dict(ready({"available": True, "pairs": pairs} | matrix))
