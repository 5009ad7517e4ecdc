"""The built-in model with a strong adapter: a study of it, and the plain runs that fast paths are held against.

A plain run takes one sequence without padding and without a cache through the model's own modules; forward hooks of
PyTorch read the scalars and write the directions' terms, and logits exist at every position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lorascope import recording
from lorascope.adapter import Adapter, initial_adapter
from lorascope.cli import main
from lorascope.kl import assistant_positions
from lorascope.models import load_model, load_tokenizer
from lorascope.packing import PACKED, prepare_packing
from lorascope.study import Study
from lorascope.traces import Rendered

MODEL = "smollm2-135m-instruct"
FIRST_SEED = 5
"""From which the adapter's training is said to have begun."""

Change = Callable[[Tensor, slice], Tensor]
"""Scalars [1, T, R] of one module and its columns to those that take effect."""


def make_real_study(path: Path) -> Study:
    """Recorded in shards of few traces; its adapter is not trained but drawn."""
    new = ["new", str(path), "--model", MODEL, "--traces", "tasks:chain,letters", "--system", ""]
    assert main([*new, "--train-problems", "16", "--heldout", "4"]) == 0
    adapter = initial_adapter(load_model(MODEL)[0], seed=1, base_name=MODEL)
    generator = torch.Generator().manual_seed(0)
    for module in adapter.modules:
        module.b_OR.copy_(torch.randn(module.b_OR.shape, generator=generator) * 0.01)
    adapter.save(path / "adapter")
    study = Study.open(path)
    config = {"modules": "attn,mlp", "layers": "*", "rank": 1, "alpha": 16.0}
    record = {"config": config, "options": {"seed": FIRST_SEED}, "inputs": {}, "outputs": ["adapter"]}
    study.update_manifest(stages={"train:adapter": record | {"seconds": 0, "peak_rss": 0, "finished": ""}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "SHARD_TOKENS", 500)
        patch.setattr(recording, "OUTPUT_TRACES", 2)
        for corpus in ("train", "heldout"):
            assert main(["record", str(path), "--corpus", corpus]) == 0
    return Study.open(path)


def rendered(study: Study, corpus: str) -> list[Rendered]:
    """The traces of a corpus as token ids."""
    return study.renderer(load_tokenizer(MODEL)).render_all(study.traces(corpus))[0]


@dataclass(frozen=True)
class Plain:
    """What a plain run of T tokens gives."""

    logits: Tensor
    """[T, V]."""
    seen: Tensor
    """Scalars [T, N] as read."""
    used: Tensor
    """Scalars [T, N] as they took effect."""
    inputs: dict[str, Tensor]
    """Input [T, I] of each adapted module, by its path."""
    lengths: Tensor
    """Of the hidden states [T] that enter the middle layer."""


def plain_run(model: Any, adapter: Adapter, ids: Sequence[int] | np.ndarray, change: Change | None = None) -> Plain:
    """One sequence; `change` edits scalars on their way."""
    seen: list[Tensor] = []
    used: list[Tensor] = []
    inputs: dict[str, Tensor] = {}
    lengths: list[Tensor] = []

    def add(part: Any) -> Callable[..., Tensor]:
        def hook(_: Any, args: tuple[Tensor], out: Tensor) -> Tensor:
            inputs[part.path] = args[0][0]
            z = args[0].to(part.a_RI.dtype) @ part.a_RI.T
            changed = z if change is None else change(z, part.columns)
            seen.append(z[0])
            used.append(changed[0])
            return (out.to(z.dtype) + part.scale * changed @ part.b_OR.T).to(out.dtype)

        return hook

    layers = model.model.layers
    with ExitStack() as stack:
        for part in adapter.modules:
            stack.callback(model.get_submodule(part.path).register_forward_hook(add(part)).remove)
        look = layers[len(layers) // 2].register_forward_pre_hook(
            lambda _, x: lengths.append(x[0][0].float().norm(dim=1))
        )
        stack.callback(look.remove)
        row = torch.from_numpy(np.asarray(ids, np.int64))[None]
        logits = model(input_ids=row, use_cache=False).logits[0]
    ran = {path: i for i, path in enumerate(inputs)}  # in another order than columns stand in
    place = [ran[part.path] for part in adapter.modules]
    seen_TN, used_TN = (torch.cat([logits[:, :0], *(parts[i] for i in place)], dim=-1) for parts in (seen, used))
    return Plain(logits, seen_TN, used_TN, inputs, lengths[0])


def silenced(z: Tensor, _: slice) -> Tensor:
    """The base model's run: scalars are read and take no effect."""
    return torch.zeros_like(z)


def cross_entropy(run: Plain, trace: Rendered) -> Tensor:
    """Summed over the tokens of the response."""
    ids, at = torch.from_numpy(trace.ids.astype(np.int64)), torch.from_numpy(assistant_positions(trace))
    return torch.nn.functional.cross_entropy(run.logits[at], ids[at + 1], reduction="sum")


def kl_sum(before: Plain, after: Plain, trace: Rendered) -> float:
    """KL(before ‖ after), summed over the tokens of the response, in float64 from whole logits."""
    at = torch.from_numpy(assistant_positions(trace))
    p, q = (torch.log_softmax(run.logits[at].double(), dim=-1) for run in (before, after))
    return float((p.exp() * (p - q)).sum())


def weights_of(adapter: Adapter) -> list[Tensor]:
    """All read and write vectors, as leaves to differentiate by."""
    return [t.requires_grad_() for m in adapter.modules for t in (m.a_RI, m.b_OR)]


@contextmanager
def packing(model: Any, traces: Sequence[Rendered]) -> Iterator[None]:
    """Inside, the model attends to packed sequences one by one in our own attention; afterwards as before."""
    before = model.config._attn_implementation
    assert before != PACKED
    try:
        assert prepare_packing(model, max(len(trace.ids) for trace in traces))
        assert model.config._attn_implementation == PACKED
        yield
    finally:
        model.set_attn_implementation(before)


def close(found: Any, wanted: Any, tolerance: float) -> None:
    """Equal to within a share of the largest entry."""
    found, wanted = torch.as_tensor(found), torch.as_tensor(wanted)
    torch.testing.assert_close(found, wanted.to(found), rtol=0, atol=tolerance * float(wanted.abs().max()))


def off_by(found: Any, wanted: Any) -> np.ndarray:
    """Largest error of each column over the root of its mean square, but for the first token: an attention sink, whose
    scalars are up to a hundred times larger than any other's."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    size_N = np.sqrt(np.square(wanted[1:]).mean(axis=0))
    return np.abs(found - wanted)[1:].max(axis=0) / np.where(size_N > 0, size_N, 1)
