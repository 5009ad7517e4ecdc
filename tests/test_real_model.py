"""The built-in model, for real and small: fetched, trained two steps, attached, evaluated, ablated, recorded.

Every fast path gives on it what its simple reference gives, as the tests on tiny models show in detail.
"""

from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from lorascope import edits
from lorascope.ablation import make_targets
from lorascope.adapter import Adapter
from lorascope.attached import attach
from lorascope.cli import main
from lorascope.fused import fused, fused_reading
from lorascope.generation import Sampling, generate_batch
from lorascope.kl import assistant_positions
from lorascope.leave_one_out import leave_out
from lorascope.models import load_model
from lorascope.screening import gated
from lorascope.store import Store
from lorascope.study import Study
from lorascope.traces import Rendered
from lorascope.training import Learner
from lorascope.training_plan import batch_tensors, packed_tensors

MODEL = "smollm2-135m-instruct"


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


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    """Equal to within a share of the largest entry."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))


def test_training_forms_and_packing_give_the_same_gradients(loaded: Loaded) -> None:
    model, adapter, traces, _ = loaded
    weights = [t.requires_grad_() for m in adapter.modules for t in (m.a_RI, m.b_OR)]
    learner, device, found = Learner(model, None), torch.device("cpu"), []
    with attach(model, adapter):
        loss = learner(*batch_tensors(traces, device))
        wanted = [loss.detach(), *torch.autograd.grad(loss, weights)]
        with fused(model, adapter):
            for make in (batch_tensors, packed_tensors):
                loss = learner(*make(traces, device))
                found.append([loss.detach(), *torch.autograd.grad(loss, weights)])
    for own in found:
        for mine, theirs in zip(own, wanted, strict=True):
            close(mine, theirs, 1e-4)
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


def test_a_batch_generates_what_single_runs_do(loaded: Loaded) -> None:
    model, adapter, _, renderer = loaded
    prompts = [renderer.prompt_ids(text) for text in ("Hi", "What is 2 + 2?", "Sort these letters: d, a, c.")]
    with attach(model, adapter) as attached:
        together = generate_batch(attached, renderer, prompts, Sampling(max_new_tokens=12))
        alone = [generate_batch(attached, renderer, [p], Sampling(max_new_tokens=12))[0] for p in prompts]
    assert together == alone
