"""Packed sequences: attention within each, the same losses and gradients as padded rows, and models that must pad."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import MambaConfig, MambaForCausalLM

from lorascope.attached import attach
from lorascope.fused import fused
from lorascope.packing import PACKED, packed_attention, prepare_packing, sequence_lengths
from lorascope.traces import Rendered
from lorascope.training import Learner
from lorascope.training_plan import batch_tensors, packed_tensors
from tiny_models import random_adapter, tiny_model

LENGTHS = (7, 1, 12, 5)


def random_traces(vocabulary: int) -> list[Rendered]:
    """Traces of some lengths; the first two tokens are the prompt."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(vocabulary, size=n).astype(np.int32) for n in LENGTHS if n > 2]
    return [Rendered(str(i), ids, np.full(len(ids), 2, np.uint8), 2, 0) for i, ids in enumerate(rows)]


def test_attention_within_sequences_equals_a_block_causal_mask() -> None:
    generator, total = torch.Generator().manual_seed(0), sum(LENGTHS)
    inputs = [torch.randn(1, total, heads, 8, generator=generator).transpose(1, 2) for heads in (6, 2, 2)]
    query, key, value = (tensor.requires_grad_() for tensor in inputs)
    slope = torch.randn(1, total, 6, 8, generator=generator)
    module: Any = torch.nn.Module()
    module.num_key_value_groups = 3
    places = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    found, _ = packed_attention(module, query, key, value, None, position_ids=places, scaling=0.3)
    sequence = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    order = torch.arange(total)
    mask = (sequence[:, None] == sequence) & (order[:, None] >= order)
    wide = [tensor.repeat_interleave(3, dim=1) for tensor in (key, value)]
    wanted = F.scaled_dot_product_attention(query, *wide, attn_mask=mask, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(found, wanted)
    grads = [torch.autograd.grad(output, (query, key, value), slope) for output in (found, wanted)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_packed_sequences_give_the_same_loss_and_gradients(kind: str) -> None:
    model = tiny_model(kind, initializer_range=0.1)  # with 0.2 fp32 itself is off by 6e-4 of float64, in any form
    traces = random_traces(model.config.vocab_size)
    adapter = random_adapter(model)
    weights = [t.requires_grad_() for m in adapter.modules for t in (m.a_RI, m.b_OR)]
    learner, found = Learner(model, None), []
    with attach(model, adapter), fused(model, adapter):
        alone = [learner(*batch_tensors([trace], torch.device("cpu"))) for trace in traces]
        found.append([sum(alone).detach(), *torch.autograd.grad(sum(alone), weights)])
        assert prepare_packing(model, max(LENGTHS))
        assert model.config._attn_implementation == PACKED
        for make in (batch_tensors, packed_tensors):
            loss = learner(*make(traces, torch.device("cpu")))
            found.append([loss.detach(), *torch.autograd.grad(loss, weights)])
    assert packed_tensors(traces, torch.device("cpu")).ids_BT.shape == (1, sum(len(t.ids) for t in traces))
    for wanted, padded, packed in zip(*found, strict=True):
        assert wanted.abs().max() > 1e-2
        for mine in (padded, packed):
            assert (mine - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_the_lengths_are_read_once_for_all_layers_of_a_pass() -> None:
    """Each reading would wait for a GPU; and another pass has other lengths."""
    model = tiny_model(num_hidden_layers=3)
    assert prepare_packing(model, max(LENGTHS))
    for lengths in (LENGTHS, [3, 4]):
        places = torch.cat([torch.arange(n) for n in lengths])[None]
        before = sequence_lengths.cache_info().misses
        model.base_model(input_ids=places % 90, position_ids=places, use_cache=False)
        assert sequence_lengths.cache_info().misses == before + 1
        assert sequence_lengths(places) == [n for n in lengths if n]


def test_a_model_that_mixes_packed_sequences_pads() -> None:
    config = MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)
    assert not prepare_packing(MambaForCausalLM(config).eval(), 8)


def test_a_model_pads_sequences_longer_than_its_window() -> None:
    model = tiny_model("mistral", sliding_window=16)
    before = model.config._attn_implementation
    assert not prepare_packing(model, 17)
    assert model.config._attn_implementation == before
    assert prepare_packing(model, 16)


def test_an_attention_that_cannot_pack_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def mixes(*inputs: Any, position_ids: Any = None, **settings: Any) -> Any:
        return packed_attention(*inputs, position_ids=None, **settings)

    monkeypatch.setattr("lorascope.packing.packed_attention", mixes)
    model = tiny_model()
    before = model.config._attn_implementation
    assert not prepare_packing(model, 8)
    assert model.config._attn_implementation == before
