"""The model's own log-probability that a word comes next. Only this part needs the language model.

Shape legend: P places, B sequences, T tokens of the longest, V vocabulary.
"""

from itertools import pairwise

import numpy as np

from lorascope.config import Options
from lorascope.errors import BadInput
from lorascope.progress import progress
from lorascope.reasoning.words import Ints
from lorascope.stats import FloatArray
from lorascope.store import Store
from lorascope.study import Study

TOKEN_BUDGET = 2048
CHUNK = 128
"""Places whose logits exist at once."""


def word_log_probability(study: Study, store: Store, position_P: Ints, first_ids: Ints, options: Options) -> FloatArray:
    """log of the adapted model's probability that the next token is one of `first_ids`, float64 [P], in nats.

    Args:
        position_P: positions in the corpus, rising.
        first_ids: tokens with which the word begins; another word may begin with them too.

    Raises:
        BadInput: the adapter is of another model, or the model's head is of an unknown form.
    """
    import torch

    from lorascope.adapter import Adapter
    from lorascope.attached import attach
    from lorascope.fused_reading import fused_reading
    from lorascope.models import load_model
    from lorascope.traces import pad_ids, plan_batches

    model, _ = load_model(study.model_name, device=options.device, dtype=options.dtype)
    adapter = Adapter.load(study.path / "adapter")
    if int(first_ids.max()) >= model.get_input_embeddings().weight.shape[0]:
        raise BadInput(f"{study.model_name} lacks tokens of this recording; was it made with another model?")
    trace_P = store.token_traces(position_P)
    cuts = [0, *(np.flatnonzero(np.diff(trace_P)) + 1).tolist(), len(trace_P)]
    parts = [slice(first, stop) for first, stop in pairwise(cuts)]
    starts = [int(store.offsets[trace_P[part.start]]) for part in parts]
    ids = [store.tokens[s : int(position_P[p.stop - 1]) + 1] for s, p in zip(starts, parts, strict=True)]
    out_P = np.empty(len(position_P))
    batches = plan_batches([len(one) for one in ids], TOKEN_BUDGET)
    wanted = torch.from_numpy(first_ids)
    with torch.inference_mode(), attach(model, adapter) as attached, fused_reading(attached):
        for batch in progress(batches, len(batches), "log p of the word", "batch"):
            hidden_BTD = attached.trunk(pad_ids([ids[i] for i in batch], 0)[0]).hidden
            for row, i in enumerate(batch):
                places = range(parts[i].start, parts[i].stop, CHUNK)
                for part in [slice(first, min(first + CHUNK, parts[i].stop)) for first in places]:
                    at = torch.from_numpy(position_P[part] - starts[i]).to(hidden_BTD.device)
                    logp_PV = attached.head(hidden_BTD[row, at]).log_softmax(dim=-1)
                    out_P[part] = logp_PV[:, wanted.to(logp_PV.device)].logsumexp(dim=-1).cpu().numpy()
    return out_P
