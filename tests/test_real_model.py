"""The built-in model, for real and small: fetched, trained two steps, attached, evaluated, ablated, recorded.

Fast paths give on it what simple references give: here training forms, packing, reading, exact ablation, gates,
screening, batched generation, an autoencoder's steps and examples. `test_real_model_passes` holds passes in bfloat16,
of the base, of controls and of a full finetune to plain ones, `test_real_model_stages` the store, examples and the
autoencoder to dense arithmetic, `test_real_model_steering` steered text, `test_real_model_edits` ablation to zero and
to the mean and patched KL to edited runs.
"""

import copy
from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from lorascope import edits, screening
from lorascope.ablation import make_targets
from lorascope.adapter import Adapter
from lorascope.attached import attach
from lorascope.cli import main
from lorascope.example_search import ExamplesConfig, search
from lorascope.features import firing_levels, load_features
from lorascope.fused import fused
from lorascope.fused_reading import fused_reading
from lorascope.generation import Sampling, generate_batch
from lorascope.kl import assistant_positions
from lorascope.leave_one_out import leave_out
from lorascope.models import load_model
from lorascope.sae.moments import choose_unit, measure_moments
from lorascope.sae.rows import Rows
from lorascope.sae.steps import Weights, initial_weights
from lorascope.sae.training import SAEConfig, run_steps
from lorascope.screening import gated, screen
from lorascope.store import Store
from lorascope.study import Study
from lorascope.traces import Rendered
from lorascope.training import Learner
from lorascope.training_plan import Batch, batch_tensors, packed_tensors
from real_model import MODEL, close, packing
from test_sae_training import copies, dense_run


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    path = tmp_path_factory.mktemp("real") / "study"
    new = [
        "--model",
        MODEL,
        "--traces",
        "tasks:chain,letters",
        "--train-problems",
        "8",
        "--heldout",
        "4",
        "--system",
        "",
    ]
    assert main(["new", str(path), *new]) == 0
    train = ["--batch", "4", "--max-steps", "2", "--eval-traces", "2", "--learning-rate", "1e-2"]
    assert main(["train", str(path), *train]) == 0
    return Study.open(path)


def test_two_steps_lower_the_held_out_loss(study: Study) -> None:
    result = study.manifest["stages"]["train:adapter"]["result"]
    assert result["parameters"] == 305_280
    assert result["heldout_loss"] < result["heldout_loss_before"]


def test_the_trained_adapter_loads_in_peft_and_gives_the_same_logits(study: Study) -> None:
    model, tokenizer = load_model(MODEL)
    ids = torch.tensor([study.renderer(tokenizer).prompt_ids("What is 31 + 45 + 12?")])
    adapter = Adapter.load(study.path / "adapter")
    assert len(adapter.addresses) == 210
    with torch.no_grad():
        base = model(input_ids=ids).logits
        with attach(model, adapter) as attached:
            ours = attached.run(ids).logits
        theirs = PeftModel.from_pretrained(model, str(study.path / "adapter")).eval()(input_ids=ids).logits
    assert (ours - theirs).abs().max() <= 1e-4 * max(1, theirs.abs().max())
    assert (ours - base).abs().max() > 0.01


def test_the_stages_run_and_agree(study: Study) -> None:
    path = str(study.path)
    assert main(["record", path, "--source", "adapter,base"]) == 0
    assert main(["ablate", path, "--by", "group", "--traces", "2"]) == 0
    assert main(["evaluate", path, "--on", "chain", "--n", "2", "--models", "adapter", "--max-new-tokens", "8"]) == 0
    store = Store.open(study.path / "scalars" / "train" / "adapter")
    model, tokenizer = load_model(MODEL)
    rendered = study.renderer(tokenizer).render(study.traces("train")[0])
    with torch.no_grad(), attach(model, Adapter.load(study.path / "adapter")) as attached:
        scalars = attached.run([rendered.ids.tolist()]).scalars[0].numpy()
    _, recorded = store.trace(store.trace_ids.index(rendered.trace_id))
    spread = np.abs(scalars).max(axis=0)
    assert np.all(np.abs(recorded - scalars) <= 2e-3 * spread + 1e-6)
    assert store.sink[store.offsets[:-1]].all()
    assert not store.ordinary[store.offsets[:-1]].any()


Loaded = tuple[Any, Adapter, list[Rendered], Any]


@pytest.fixture(scope="module")
def loaded(study: Study) -> Loaded:
    """The model, an adapter strong enough to matter, three held-out traces, the renderer."""
    model, tokenizer = load_model(MODEL)
    model.requires_grad_(False)
    adapter = Adapter.load(study.path / "adapter")
    generator = torch.Generator().manual_seed(0)
    for module in adapter.modules:
        module.b_OR.copy_(torch.randn(module.b_OR.shape, generator=generator) * 0.01)
    renderer = study.renderer(tokenizer)
    return model, adapter, renderer.render_all(study.traces("heldout"))[0][:3], renderer


def plain_gradients(model: Any, adapter: Adapter, traces: list[Rendered]) -> list[torch.Tensor]:
    """Summed cross-entropy of the supervised tokens and its gradients, in float64 from the logits of every position."""
    wide, loss = copy.deepcopy(model).double(), torch.zeros((), dtype=torch.float64)
    weights = [t.double().requires_grad_() for m in adapter.modules for t in (m.a_RI, m.b_OR)]
    for part, a_RI, b_OR in zip(adapter.modules, weights[::2], weights[1::2], strict=True):

        def add(_: Any, x: Any, out: Any, a: Any = a_RI, b: Any = b_OR, scale: float = part.scale) -> Any:
            return out + scale * (x[0] @ a.T) @ b.T

        wide.get_submodule(part.path).register_forward_hook(add)
    for trace in traces:
        ids, at = torch.from_numpy(trace.ids.astype(np.int64)), torch.from_numpy(assistant_positions(trace))
        logits = wide(input_ids=ids[None], use_cache=False).logits[0]
        loss = loss + torch.nn.functional.cross_entropy(logits[at], ids[at + 1], reduction="sum")
    return [loss.detach(), *torch.autograd.grad(loss, weights)]


def test_training_forms_and_packing_give_the_gradients_of_whole_logits(loaded: Loaded) -> None:
    """Padded, packed in the model's own attention, and packed in ours."""
    model, adapter, traces, _ = loaded
    wanted = plain_gradients(model, adapter, traces)
    weights = [t.requires_grad_() for m in adapter.modules for t in (m.a_RI, m.b_OR)]
    learner, device = Learner(model, None), torch.device("cpu")

    def check(batch: Batch) -> None:
        with attach(model, adapter), fused(model, adapter):
            loss = learner(*batch)
            for mine, theirs in zip([loss.detach(), *torch.autograd.grad(loss, weights)], wanted, strict=True):
                # fp32 beside float64; the plain form in fp32 is off by 1e-4 (docs/log.md).
                close(mine.double(), theirs, 3e-4)

    for make in (batch_tensors, packed_tensors):
        check(make(traces, device))
    with packing(model, traces):
        check(packed_tensors(traces, device))
    for tensor in weights:
        tensor.requires_grad_(False)


@torch.no_grad()
def test_fast_reading_gives_the_same_scalars(loaded: Loaded) -> None:
    model, adapter, traces, _ = loaded
    with attach(model, adapter) as attached:
        wanted = [attached.run([trace.ids.tolist()]).scalars[0] for trace in traces]
        with fused_reading(attached):
            found = attached.trunk([trace.ids.tolist() for trace in traces]).scalars
    for i, alone in enumerate(wanted):
        close(found[i, : len(alone)], alone, 1e-4)


@torch.no_grad()
def test_exact_ablation_equals_whole_edited_passes(loaded: Loaded) -> None:
    model, adapter, traces, _ = loaded
    targets = make_targets(adapter.addresses, "direction")
    chosen = [targets[0], targets[100], targets[-1], *make_targets(adapter.addresses, "group")]
    with attach(model, adapter) as attached:
        sums, _ = leave_out(attached, traces, chosen, 0.0, 4096)
        for target in chosen:
            kl = 0.0
            for trace in traces:
                ids, at = [trace.ids.tolist()], assistant_positions(trace)
                reference = torch.log_softmax(attached.run(ids).logits[0, at].double(), dim=-1)
                with attached.edit(edits.off(np.array(adapter.addresses)[target.columns].tolist())):
                    changed = torch.log_softmax(attached.run(ids).logits[0, at].double(), dim=-1)
                kl += float((reference.exp() * (reference - changed)).sum())
            tokens = sum(len(assistant_positions(trace)) for trace in traces)
            found = sums[target.by, target.name][:, 0, 0].sum() / tokens
            assert found == pytest.approx(kl / tokens, rel=1e-3, abs=1e-7)


def test_gate_gradients_equal_autograd_through_the_edit(loaded: Loaded) -> None:
    model, adapter, traces, _ = loaded
    ids = torch.from_numpy(traces[0].ids.astype(np.int64))[None]
    slope = torch.randn(1, ids.shape[1], model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    found = []
    with attach(model, adapter) as attached:
        for context in (lambda gates: attached.edit(edits.gate(gates)), lambda gates: gated(attached, gates)):
            gates = torch.ones(1, len(adapter.addresses), requires_grad=True)
            with context(gates):
                hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            found += torch.autograd.grad(hidden, gates, slope)
    close(found[1], found[0], 1e-3)


def test_screened_groups_and_pairs_are_what_shared_gates_measure(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One gate on a whole layer, type or adapter, by autograd through the plain edit; slopes stand for labels'."""
    model, adapter, traces, _ = loaded
    generator = torch.Generator().manual_seed(2)
    slopes = {len(assistant_positions(trace)): torch.randn(2, 576, generator=generator) for trace in traces}
    assert len(slopes) == len(traces)
    monkeypatch.setattr(
        screening,
        "label_slopes",
        lambda _, hidden_MD, *__: (slopes[len(hidden_MD)][k].expand_as(hidden_MD) for k in (0, 1)),
    )
    monkeypatch.setattr(screening, "null_runs", lambda *_: {})
    wanted = [t for by in ("layer", "type") for t in make_targets(adapter.addresses, by)][::4]
    members_GN = np.stack([*(target.columns for target in wanted), np.ones(len(adapter.addresses), bool)])
    found_SKG = []
    with attach(model, adapter) as attached:
        screened = screen(attached, traces, passes=2, budget=1)
        for trace in traces:
            gates_G = torch.ones(len(members_GN), requires_grad=True)
            gates_1N = 1 + (gates_G - 1)[None] @ torch.from_numpy(members_GN).float()
            with attached.edit(edits.gate(gates_1N)):
                ids = torch.from_numpy(trace.ids.astype(np.int64))[None]
                hidden_MD = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0][
                    assistant_positions(trace)
                ]
            sums = [(hidden_MD @ slope_D).sum() for slope_D in slopes[len(hidden_MD)]]
            found_SKG.append([torch.autograd.grad(x, gates_G, retain_graph=True)[0].double().numpy() for x in sums])
    wanted_KSG = 0.5 * np.stack(found_SKG, axis=1) ** 2
    np.testing.assert_allclose(screened.kl_KSG(members_GN), wanted_KSG, rtol=0, atol=2e-3 * wanted_KSG.max())
    pairs_GG = members_GN @ screened.interactions_NN() @ members_GN.T
    np.testing.assert_allclose(
        np.diag(pairs_GG), wanted_KSG.sum(axis=1).mean(axis=0) / screened.tokens_S.sum(), rtol=2e-3
    )


def test_label_slopes_are_gradients_of_log_probabilities(loaded: Loaded) -> None:
    model, adapter, traces, _ = loaded
    ids = torch.from_numpy(traces[0].ids.astype(np.int64))[None]
    generator = torch.Generator().manual_seed(3)
    draws, signs = torch.rand(2, 9, generator=generator), torch.tensor([[1.0], [-1.0]]).expand(2, 9)
    with attach(model, adapter) as attached:
        with torch.no_grad():
            hidden = attached.trunk(ids).hidden[0, -9:]
        slopes = list(screening.label_slopes(attached, hidden, draws, signs))
    weight = model.get_output_embeddings().weight.detach()
    cdf = torch.softmax(hidden @ weight.T, dim=-1).cumsum(-1)
    wide = hidden.double().requires_grad_()
    logp = torch.log_softmax(wide @ weight.double().T, dim=-1)
    for k in (0, 1):
        labels = torch.searchsorted(cdf, (draws[k] * cdf[:, -1])[:, None], right=True)[:, 0]
        (expected,) = torch.autograd.grad((signs[k] * logp[torch.arange(9), labels]).sum(), wide, retain_graph=True)
        close(slopes[k].double(), expected, 1e-4)


def test_a_batch_generates_what_single_runs_do(loaded: Loaded) -> None:
    model, adapter, _, renderer = loaded
    prompts = [renderer.prompt_ids(text) for text in ("Hi", "What is 2 + 2?", "Sort these letters: d, a, c.")]
    with attach(model, adapter) as attached:
        together = generate_batch(attached, renderer, prompts, Sampling(max_new_tokens=12))
        alone = [generate_batch(attached, renderer, [p], Sampling(max_new_tokens=12))[0] for p in prompts]
    assert together == alone


def test_screening_estimates_what_exact_ablation_measures(loaded: Loaded) -> None:
    model, adapter, traces, _ = loaded
    targets = make_targets(adapter.addresses, "direction")[::8]
    tokens = sum(len(assistant_positions(trace)) for trace in traces)
    with attach(model, adapter) as attached:
        sums, _ = leave_out(attached, traces, targets, 0.0, 4096)
        screened = screen(attached, traces, passes=8)
    exact = np.array([sums[target.by, target.name][:, 0, 0].sum() for target in targets]) / tokens
    found = screened.kl_KSG(np.stack([target.columns for target in targets])).mean(axis=0).sum(axis=0) / tokens
    ranks = [np.argsort(np.argsort(values)) for values in (exact, found)]
    assert np.corrcoef(*ranks)[0, 1] > 0.9
    assert 0.8 < np.median(found / exact) < 1.25


@pytest.fixture(scope="module")
def state(study: Study) -> Store:
    assert main(["record", str(study.path)]) == 0
    return Store.open(study.path / "scalars" / "train" / "adapter")


class Untied(Rows):
    """Rows in float64, no two alike: traces begin alike, and which of equal scores is chosen is open."""

    def batches(self, size: int, rng: np.random.Generator) -> Generator[np.ndarray, None, None]:
        """Those of `Rows`, by 1e-5 apart from them."""
        noise = np.random.default_rng(0)
        for x_BN in super().batches(size, rng):
            yield x_BN * (1 + 1e-5 * noise.standard_normal(x_BN.shape))


def test_the_autoencoders_first_steps_follow_the_dense_reference(state: Store) -> None:
    """210 → 1,680 on the model's own state."""
    config = SAEConfig(k=16, batch=128, tokens=128 * 100)
    rows = Untied(state, choose_unit(measure_moments(state), "effect"))
    weights = Weights(*(t.double() for t in initial_weights(210, 1680, torch.Generator().manual_seed(0)).parameters()))
    parameters = copies(weights)
    ours = [line["loss"] for line in run_steps(weights, rows, config, np.random.default_rng(0), torch.Generator())]
    window = len(rows) + 1
    theirs = [line[0] for line in dense_run(parameters, rows.batches(128, np.random.default_rng(0)), config, window)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)


def test_examples_are_the_largest_activations(study: Study, state: Store) -> None:
    features = load_features(study, "train", "direction")
    found = search(features, firing_levels(features), ExamplesConfig(k=5, per_trace=10_000), 0).top
    for number in np.random.default_rng(0).choice(len(features.ids), 20, replace=False):
        activation_T = np.where(state.ordinary, features.columns([int(number)])[:, 0], -1)
        wanted = np.lexsort((np.arange(len(activation_T)), -activation_T))[:5]
        assert set(found.position[found.feature == number].tolist()) == set(wanted.tolist())
