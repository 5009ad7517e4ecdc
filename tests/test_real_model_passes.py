"""The built-in model's fast passes against plain ones: packed, in bfloat16, of the base, of controls, all trained."""

import copy
import json
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from lorascope import edits, generation
from lorascope.adapter import Adapter, initial_adapter
from lorascope.attached import Attached, attach
from lorascope.config import Options
from lorascope.controls import adapter_probe, neuron_probe, random_addresses, random_control, untrained_control
from lorascope.features import DIFFERENCE
from lorascope.fused import fused
from lorascope.fused_reading import fused_reading
from lorascope.generation import Sampling, generate_batch
from lorascope.models import load_model, load_tokenizer
from lorascope.prepacked import has_room, packs, prepacked_maps
from lorascope.reasoning.model_words import word_log_probability
from lorascope.recording import adapter_scalars, base_scalars, read_batch, scalars_beside
from lorascope.sinks import SINK_RATIO
from lorascope.store import Store
from lorascope.study import Study
from lorascope.traces import Rendered
from lorascope.training import Learner
from lorascope.training_plan import batch_tensors, packed_tensors
from real_model import (
    MODEL,
    Plain,
    close,
    cross_entropy,
    off_by,
    packing,
    plain_run,
    rendered,
    silenced,
    weights_of,
)
from test_fused import as_near, far

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(MODEL)[0].requires_grad_(False)


@pytest.fixture(scope="module")
def traces(real_study: Study) -> list[Rendered]:
    return rendered(real_study, "heldout")[:3]


@pytest.fixture
def adapter(real_study: Study) -> Adapter:
    return Adapter.load(real_study.path / "adapter")


Alone = dict[str, list[Plain]]


@pytest.fixture(scope="module")
def alone(model: Any, real_study: Study, traces: list[Rendered]) -> Alone:
    """Each trace's plain runs, with the adapter and without."""
    adapter = Adapter.load(real_study.path / "adapter")
    with torch.no_grad():
        return {
            "adapter": [plain_run(model, adapter, trace.ids) for trace in traces],
            "base": [plain_run(model, adapter, trace.ids, silenced) for trace in traces],
        }


def check_reading(found: list[tuple[Any, Any]], runs: list[Plain], wanted: list[Any]) -> None:
    """fp32 sums of up to 1,536 products in another order, through up to 30 layers: 1e-4 of a scalar's usual size."""
    for (z_TN, sink_T), run, wanted_TN in zip(found, runs, wanted, strict=True):
        assert off_by(z_TN, wanted_TN).max() < 1e-4
        close(z_TN[0], wanted_TN[0], 1e-4)
        lengths = run.lengths.numpy()
        np.testing.assert_array_equal(sink_T, lengths > SINK_RATIO * np.median(lengths))


@pytest.mark.parametrize("pack", [True, False])
def test_a_batch_is_read_as_each_trace_alone(
    model: Any, adapter: Adapter, traces: list[Rendered], alone: Alone, pack: bool
) -> None:
    """With the adapter in effect, and in the base model's run."""
    assert off_by(alone["base"][0].seen, alone["adapter"][0].seen).mean() > 0.1
    with torch.no_grad(), attach(model, adapter) as attached, fused_reading(attached):
        for name, read in (("adapter", adapter_scalars), ("base", base_scalars)):
            if pack:
                with packing(model, traces):
                    found = read_batch(attached, traces, read, pack=True)
            else:
                found = read_batch(attached, traces, read)
            check_reading(found, alone[name], [run.seen for run in alone[name]])


@pytest.mark.parametrize("edit", [None, edits.add("L20.gate", 3.0), edits.off("*")])
def test_a_prepacked_batch_generates_what_plain_single_runs_do(
    model: Any, adapter: Adapter, real_study: Study, edit: edits.Edit | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shared beginning, a cache that is entered again, and rows that leave it: as `evaluate` runs."""
    renderer = real_study.renderer(load_tokenizer(MODEL))
    told = "Answer the question below in one short sentence, and say nothing else than the answer. " * 2
    prompts = [renderer.prompt_ids(told + trace.question) for trace in real_study.traces("heldout")[:3]]
    assert len(generation.common_prefix(prompts)) > generation.SHARED
    own_ends = generation.stop_ids
    monkeypatch.setattr(generation, "STRETCH", 4)

    def texts(attached: Attached, *batches: list[list[int]]) -> list[list[int]]:
        with attached.edit(*([edit] if edit else [])):
            found = [generate_batch(attached, renderer, batch, Sampling(max_new_tokens=14)) for batch in batches]
        return [result.ids for results in found for result in results]

    with torch.no_grad():
        with attach(model, adapter) as attached:
            singles = [[prompt] for prompt in prompts]
            end = next(id_ for ids in texts(attached, *singles) for id_ in ids[5:8])
            monkeypatch.setattr(generation, "stop_ids", lambda *given: [*own_ends(*given), end])
            wanted = texts(attached, *singles)
        with prepacked_maps(model) as count, attach(model, adapter) as attached:
            assert count == (211 if packs() and has_room(model) else 0)
            assert texts(attached, prompts) == wanted
    assert len({len(ids) for ids in wanted}) > 1


def test_the_models_log_p_of_a_word_is_a_plain_runs(real_study: Study, model: Any, adapter: Adapter) -> None:
    store = Store.open(real_study.path / "scalars" / "heldout" / "adapter")
    places = np.array([int(store.offsets[1]) - 3, int(store.offsets[1]) - 2, int(store.offsets[2]) - 2])
    found = word_log_probability(real_study, store, places, np.array([198, 260]), Options())
    for place, value in zip(places.tolist(), found, strict=True):
        start = int(store.offsets[store.token_traces(np.array([place]))[0]])
        with torch.no_grad():
            logits_V = plain_run(model, adapter, store.tokens[start : place + 1]).logits[-1].double()
        assert value == pytest.approx(float(logits_V.log_softmax(0)[[198, 260]].logsumexp(0)), abs=1e-4)


def test_the_length_of_the_bases_outputs_is_a_plain_runs(real_study: Study, model: Any, adapter: Adapter) -> None:
    """Of two traces of those recorded; SmolLM2's maps have no bias."""
    store = Store.open(real_study.path / "scalars" / "heldout" / "adapter")
    found = json.loads((store.folder / "output_rms.json").read_text())
    squares, tokens = np.zeros(len(adapter.modules)), 0
    for i in range(0, store.n_traces, -(-store.n_traces // 2)):
        part = slice(int(store.offsets[i]), int(store.offsets[i + 1]))
        with torch.no_grad():
            inputs = plain_run(model, adapter, store.tokens[part]).inputs
            for number, module in enumerate(adapter.modules):
                output_TO = inputs[module.path] @ model.get_submodule(module.path).weight.T
                squares[number] += float(output_TO[torch.from_numpy(store.ordinary[part])].double().pow(2).sum())
        tokens += int(store.ordinary[part].sum())
    assert found["tokens"] == tokens
    np.testing.assert_allclose(found["rms"], np.sqrt(squares / tokens), rtol=1e-4)


def test_controls_are_read_as_hooks_see_them(
    model: Any, adapter: Adapter, real_study: Study, traces: list[Rendered], alone: Alone
) -> None:
    """Beside the adapter's own scalars, in one packed run."""
    untrained = untrained_control(real_study, model, adapter)
    with attach(model, adapter) as attached:
        random = random_control(attached, traces, 0)
    neurons = neuron_probe(model, 210, 0)
    columns = [
        adapter,
        adapter_probe(random, model, random_addresses(adapter)),
        adapter_probe(untrained, model, adapter.addresses),
        neurons,
    ]
    with packing(model, traces), attach(model, adapter) as attached, fused_reading(attached):
        found = read_batch(attached, traces, partial(scalars_beside, columns=columns), pack=True)
    wanted = []
    for run in alone["adapter"]:
        read = [run.inputs[part.path] @ part.a_RI.T for part in (*random.modules, *untrained.modules)]
        units = [address[1:].split(".") for address in neurons.addresses]
        read += [run.inputs[f"model.layers.{layer}.mlp.down_proj"][:, [int(unit)]] for layer, unit in units]
        wanted.append(torch.cat([run.seen, *read], dim=1))
    check_reading(found, alone["adapter"], wanted)
    ordinary = torch.cat(
        [torch.from_numpy((t.segments != 0) & ~sink) for t, (_, sink) in zip(traces, found, strict=True)]
    )
    n, k = len(adapter.addresses), len(random.addresses)
    own, drawn = torch.cat(wanted)[ordinary][:, : n + k].std(dim=0, correction=0).split([n, k])
    of = torch.tensor([adapter.addresses.index(name.removesuffix(DIFFERENCE)) for name in random_addresses(adapter)])
    effects = own[of] * torch.from_numpy(adapter.effect_per_scalar)[of]
    found_effects = drawn * torch.from_numpy(random.effect_per_scalar)
    assert bool((drawn > 0).all()), "two tokens of one id would differ by nothing in the first layer"
    torch.testing.assert_close(found_effects, effects, rtol=1e-3, atol=0)


def test_a_compiled_pass_gives_the_same_gradients(traces: list[Rendered]) -> None:
    """Through the first two layers; all thirty take a compiler minutes."""
    model = load_model(MODEL)[0].requires_grad_(False)
    model.model.layers = model.model.layers[:2]
    adapter = initial_adapter(model, seed=1)
    generator = torch.Generator().manual_seed(0)
    for module in adapter.modules:
        module.b_OR.copy_(torch.randn(module.b_OR.shape, generator=generator) * 0.01)
    weights = [t.requires_grad_() for m in adapter.modules for t in (m.a_RI, m.b_OR)]
    learner, batch = Learner(model, None), batch_tensors(traces, CPU)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with attach(model, adapter), fused(model, adapter):
        found = []
        for run in (learner, torch.compile(learner, dynamic=True)):
            loss = run(*batch)
            found.append([loss.detach(), *torch.autograd.grad(loss, weights)])
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    for compiled, plain in zip(found[1], found[0], strict=True):
        close(compiled, plain, 1e-4)


def test_full_training_gives_the_gradients_of_whole_logits(traces: list[Rendered]) -> None:
    """Packed, as `train --full` runs; in float64 by autograd. The embeddings are the LM head's weight too."""
    model = load_model(MODEL)[0].train()
    wide = copy.deepcopy(model).double()
    chosen = ("embed_tokens", "layers.0.input_layernorm", "layers.3.self_attn.k_proj", "layers.14.mlp.gate_proj")
    names = [f"model.{name}.weight" for name in (*chosen, "layers.29.mlp.down_proj", "norm")]
    traces = traces[:2]
    total = sum(cross_entropy(plain_run(wide, Adapter((), {}), trace.ids), trace) for trace in traces)
    wanted = torch.autograd.grad(total, [wide.get_parameter(name) for name in names])
    with packing(model, traces), fused(model, None):
        loss = Learner(model, None)(*packed_tensors(traces, CPU))
        loss.backward()
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=1e-5)
    for name, exact in zip(names, wanted, strict=True):
        # fp32 beside float64, as for an adapter's gradients.
        close(model.get_parameter(name).grad.double(), exact, 3e-4)


def test_a_bfloat16_base_is_as_near_to_exact_as_plain_hooks(adapter: Adapter, traces: list[Rendered]) -> None:
    """Gradients and scalars, packed, each against a run in fp32 of the same rounded weights.

    There is no bound for bfloat16 itself: thirty layers of its rounding (2^-9 a time) leave some percent, of the
    gradients 5 on average and up to 27 in a single tensor, with ours and the plain form in turn the nearer one. So
    ours may be a tenth worse on the whole and at the median; a tensor that is wrong is off by its own size.
    """
    low = load_model(MODEL, dtype="bfloat16")[0].requires_grad_(False)
    wide, traces = copy.deepcopy(low).float(), traces[:2]
    weights = weights_of(adapter)

    def plain(model: Any) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        runs = [plain_run(model, adapter, trace.ids) for trace in traces]
        gradients = torch.autograd.grad(sum(map(cross_entropy, runs, traces)), weights)
        with torch.no_grad():
            base = [plain_run(model, adapter, trace.ids, silenced).seen for trace in traces]
        return list(gradients), [run.seen.detach() for run in runs], base

    exact, own = plain(wide), plain(low)
    with packing(low, traces), attach(low, adapter) as attached:
        with fused(low, adapter):
            found = torch.autograd.grad(Learner(low, None)(*packed_tensors(traces, CPU)), weights)
        with torch.no_grad(), fused_reading(attached):
            read = [
                [torch.from_numpy(z_TN) for z_TN, _ in read_batch(attached, traces, scalars, pack=True)]
                for scalars in (adapter_scalars, base_scalars)
            ]
    errors = np.array([(far(a, c), far(b, c)) for a, b, c in zip(found, own[0], exact[0], strict=True)])
    assert errors[:, 0].sum() < 1.1 * errors[:, 1].sum()
    assert np.median(errors[:, 0] / errors[:, 1]) < 1.1
    assert errors[:, 0].max() < 0.5
    for mine, theirs, truth in zip(read, own[1:], exact[1:], strict=True):
        as_near(by_module(mine, adapter), by_module(theirs, adapter), by_module(truth, adapter))


def by_module(scalars: list[torch.Tensor], adapter: Adapter) -> list[torch.Tensor]:
    """Of all traces, but for their first tokens."""
    joined = torch.cat([z_TN[1:] for z_TN in scalars])
    return [joined[:, part.columns] for part in adapter.modules]
