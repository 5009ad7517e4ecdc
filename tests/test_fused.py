"""Training forms equal the modules they stand for: values and every gradient, in double, single and low precision."""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nRMSNorm
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm

from lorascope import edits
from lorascope.attached import attach
from lorascope.fused import GatedMLPFunction, NormFunction, fused, head_loss, plain_head
from lorascope.fused_reading import fused_reading, shared_inputs
from lorascope.prepacked import packs
from lorascope.rank1 import Linear, adapted_forward, apply_linear
from lorascope.screening import gated
from tiny_models import random_adapter, tiny_model


def leaf(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype).requires_grad_()


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_an_adapted_linear_equals_autograd(rank: int, bias: bool) -> None:
    """Merged (fp32 base) against the reading form, all gradients."""
    kind = torch.float32
    x, W, a, b = (leaf(*shape, dtype=kind) for shape in ((2, 5, 6), (7, 6), (rank, 6), (7, rank)))
    bias_O = leaf(7, dtype=kind) if bias else None
    tensors = [t for t in (x, W, bias_O, a, b) if t is not None]
    slope = leaf(2, 5, 7, seed=9, dtype=kind).detach()
    wanted = adapted_forward(x, lambda x: F.linear(x, W, bias_O), a, b, 1.7, lambda z: z)
    expected = torch.autograd.grad(wanted, tensors, slope)
    got = apply_linear(x, Linear(W, bias_O, a, b, 1.7))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(torch.autograd.grad(got, tensors, slope), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_a_low_precision_base_keeps_a_small_delta() -> None:
    """The direction's term is 2^-12 of the weight: merged into bfloat16 it would be gone."""
    W = torch.ones(4, 8, dtype=torch.bfloat16)
    a, b = torch.full((1, 8), 2.0**-6).requires_grad_(), torch.full((4, 1), 2.0**-6).requires_grad_()
    x = torch.eye(8)[:1].to(torch.bfloat16).requires_grad_()
    y = apply_linear(x, Linear(W, None, a, b, 1.0))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    torch.testing.assert_close(a.grad, torch.eye(8)[:1] * 4 * 2.0**-6)
    torch.testing.assert_close(b.grad, torch.full((4, 1), 2.0**-6))
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full((1, 8), 4.0, dtype=torch.bfloat16))


def test_an_rms_norm_equals_autograd() -> None:
    x, weight, slope = leaf(2, 5, 8), leaf(8), leaf(2, 5, 8, seed=3).detach()
    wanted = F.rms_norm(x, (8,), weight, 1e-5)
    got = NormFunction.apply(x.float(), weight.float(), 1e-5)
    torch.testing.assert_close(got, wanted.float(), rtol=1e-5, atol=1e-5)
    x32, w32 = x.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    mine = torch.autograd.grad(NormFunction.apply(x32, w32, 1e-5), [x32, w32], slope.float())
    for own, theirs in zip(mine, torch.autograd.grad(wanted, [x, weight], slope), strict=True):
        torch.testing.assert_close(own, theirs.float(), rtol=1e-5, atol=1e-5)


def test_a_gated_mlp_equals_autograd() -> None:
    x = leaf(2, 5, 6)
    shapes = {"gate": (10, 6), "up": (10, 6), "down": (6, 10)}
    linears = [
        Linear(leaf(*shape, seed=i), None, leaf(1, shape[1], seed=i), leaf(shape[0], 1, seed=i), 0.5 + i)
        for i, shape in enumerate(shapes.values())
    ]
    tensors = [x, *(t for linear in linears for t in linear[:4] if isinstance(t, Tensor))]
    slope = leaf(2, 5, 6, seed=5).detach()

    def plain(x: Tensor, linear: Linear) -> Tensor:
        assert linear.a_RI is not None
        assert linear.b_OR is not None
        return F.linear(x, linear.W_OI + linear.scale * linear.b_OR @ linear.a_RI)

    gate, up, down = linears
    wanted = plain(F.silu(plain(x, gate)) * plain(x, up), down)
    expected = torch.autograd.grad(wanted, tensors, slope)
    single = [t.detach().float().requires_grad_() for t in tensors]
    weights = [w for i in range(3) for w in (single[1 + 3 * i], None, *single[2 + 3 * i : 4 + 3 * i])]
    got = GatedMLPFunction.apply(single[0], (0.5, 1.5, 2.5), *weights)
    torch.testing.assert_close(got, wanted.float(), rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(torch.autograd.grad(got, single, slope.float()), expected, strict=True):
        torch.testing.assert_close(mine, theirs.float(), rtol=1e-4, atol=1e-4)


def test_the_heads_loss_equals_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorascope.fused.HEAD_CHUNK", 4)
    hidden, weight = leaf(11, 6), leaf(50, 6)
    targets = torch.arange(11) % 7
    wanted = F.cross_entropy(hidden @ weight.T, targets, reduction="sum") / 3
    expected = torch.autograd.grad(wanted, [hidden, weight])
    own = [t.detach().float().requires_grad_() for t in (hidden, weight)]
    got = head_loss(own[0], own[1], targets) / 3
    torch.testing.assert_close(got, wanted.float())
    for mine, theirs in zip(torch.autograd.grad(got, own), expected, strict=True):
        torch.testing.assert_close(mine, theirs.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("rank", [1, 2])
def test_a_whole_model_gives_the_same_gradients(kind: str, rank: int) -> None:
    model = tiny_model(kind)
    adapter = random_adapter(model, rank=rank)
    model.requires_grad_(False)
    weights = [t.requires_grad_() for m in adapter.modules for t in (m.a_RI, m.b_OR)]
    ids = torch.randint(0, 97, (3, 9), generator=torch.Generator().manual_seed(0))

    def gradients() -> tuple[Tensor, Any]:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss.detach(), torch.autograd.grad(loss, weights)

    with attach(model, adapter):
        wanted, expected = gradients()
        with fused(model, adapter) as count:
            # per layer two norms, the MLP, q k v o; and the last norm
            assert count == 3 * 7 + 1
            got, mine = gradients()
        after, _ = gradients()
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    for own, theirs in zip(mine, expected, strict=True):
        # Either is 2e-5 to 4e-5 of the largest entry off a run in double precision.
        torch.testing.assert_close(own, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))
    assert torch.equal(after, wanted)


def test_all_weights_train_the_same_too() -> None:
    model = tiny_model()
    ids = torch.randint(0, 97, (3, 9), generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, list(model.parameters()))
    with fused(model, None):
        mine = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, list(model.parameters()))
    for own, theirs in zip(mine, expected, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))


def test_what_is_not_recognised_runs_as_it_is() -> None:
    class OddRMSNorm(nn.Module):
        """Named like an RMS norm, with another rule (Gemma's)."""

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(32)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return F.rms_norm(x, (32,), 1 + self.weight, self.eps)

    model = tiny_model()
    model.model.norm = OddRMSNorm()
    model.model.layers[0].mlp.act_fn = nn.GELU()
    ids = torch.arange(6)[None]
    wanted = model(ids).logits
    with fused(model, None) as count:
        assert count == 3 * 2 + 2
        torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    assert plain_head(model) is model.lm_head.weight
    model.config.logits_scaling = 2.0
    assert plain_head(model) is None


class TwoStreamRMSNorm(nn.Module):
    """Named like an RMS norm, and wants another argument."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return F.rms_norm(x, (8,), self.weight, self.eps) * gate


class MatrixRMSNorm(nn.RMSNorm):
    """A norm over two dimensions."""


@pytest.mark.parametrize(
    ("norm", "count"),
    [
        (Gemma3nRMSNorm(8, with_scale=False), 0),
        (Gemma4RMSNorm(8, with_scale=False), 0),
        (Gemma4RMSNorm(8), 1),
        (TwoStreamRMSNorm(), 0),
        (MatrixRMSNorm((2, 8), eps=1e-6), 0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_norms_without_a_vector_of_weights_run_as_they_are(norm: nn.Module, count: int) -> None:
    x, more = leaf(5, 2, 8, dtype=torch.float32), leaf(8, dtype=torch.float32, seed=1)
    arguments = (x, more) if isinstance(norm, TwoStreamRMSNorm) else (x,)
    wanted = norm(*arguments)
    with fused(nn.Sequential(norm), None) as found:
        assert found == count
        torch.testing.assert_close(norm(*arguments), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("choice", [{}, {"rank": 2}, {"patterns": "L*.k,L*.up,L1.down"}])
def test_the_base_run_reads_what_scalars_set_to_zero_gave(
    kind: str, choice: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hidden states bit for bit, the scalars to rounding: read vectors of one input are read in one product."""
    model = tiny_model(kind)
    adapter = random_adapter(model, **choice)
    model.to(dtype)
    ids = torch.randint(0, 97, (3, 9), generator=torch.Generator().manual_seed(0))
    slow: list[int] = []
    real = adapted_forward
    monkeypatch.setattr(
        "lorascope.attached.adapted_forward", lambda *args, **named: (slow.append(1), real(*args, **named))[1]
    )
    stopped = torch.zeros(3, 9, len(adapter.addresses))

    def read_and_stop(z_BTn: Tensor, columns: Tensor) -> Tensor:
        stopped[..., columns] = z_BTn
        return torch.zeros_like(z_BTn)

    with torch.no_grad():
        base = model.base_model(ids, use_cache=False).last_hidden_state
        with attach(model, adapter) as attached:
            with attached.as_base():
                plain = attached.trunk(ids)
            with fused_reading(attached):
                with attached.edit(edits.Edit("*", read_and_stop)):
                    wanted = attached.trunk(ids).hidden
                assert len(slow) > 0
                slow.clear()
                with attached.as_base():
                    got = attached.trunk(ids)
                assert slow == []  # nothing is read on its own, and no term is added
                adapted = attached.trunk(ids)
    assert torch.equal(got.hidden, wanted)
    assert torch.equal(plain.hidden, base)
    size = float(stopped.abs().max())
    torch.testing.assert_close(got.scalars, stopped, rtol=0, atol=1e-5 * size)
    assert not torch.allclose(adapted.hidden, got.hidden, rtol=0.01)
    assert not torch.allclose(adapted.scalars, got.scalars, rtol=0.01)
    if dtype == torch.float32:
        torch.testing.assert_close(plain.scalars, stopped, rtol=0, atol=1e-4 * size)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("choice", [{}, {"rank": 2}, {"patterns": "L*.k,L*.up,L1.down"}])
def test_fast_reading_gives_the_same_scalars(kind: str, choice: dict[str, Any]) -> None:
    model = tiny_model(kind)
    adapter = random_adapter(model, **choice)
    ids = torch.randint(0, 97, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), attach(model, adapter) as attached:
        wanted = attached.run(ids)
        with attached.edit(edits.off("L0.*")):
            edited = attached.run(ids)
        with fused_reading(attached) as count:
            maps = 3 * 7 + 1 if packs() else len(adapter.modules)  # others are prepacked, where torch can
            assert count == maps + 3 * 3 + 1
            got = attached.run(ids)
            with attached.edit(edits.off("L0.*")):
                again = attached.run(ids)
        after = attached.run(ids)
    for mine, theirs in ((got, wanted), (again, edited)):
        # Against a run in double precision either form is 1e-6 to 8e-6 of the largest scalar off, over 12 batches.
        torch.testing.assert_close(mine.scalars, theirs.scalars, rtol=0, atol=2e-5 * float(theirs.scalars.abs().max()))
        torch.testing.assert_close(mine.logits, theirs.logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(after.logits, wanted.logits)


@pytest.mark.parametrize("pattern", ["L0.q", "L1.k,L1.v", "L2.up", "*"])
def test_no_input_is_held_after_a_forward_with_an_edit(pattern: str) -> None:
    model = tiny_model()
    adapter = random_adapter(model)
    ids = torch.arange(6)[None]
    inputs: list[weakref.ref[Tensor]] = []
    with torch.no_grad(), attach(model, adapter) as attached, fused_reading(attached):
        for part in adapter.modules:
            linear = model.get_submodule(part.path)
            linear.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0])))
        with attached.edit(edits.off(pattern)):
            attached.run(ids)
        assert len(inputs) == len(adapter.modules)
        assert [ref() for ref in inputs] == [None] * len(inputs)


def test_shared_scalars_belong_to_the_tensor_that_was_read() -> None:
    model = tiny_model()
    adapter = random_adapter(model, patterns="L0.q,L0.k,L0.v")
    (shared, _), *others = shared_inputs(adapter)
    assert all(other is shared for other, _ in others)
    x, y = leaf(2, 32, dtype=torch.float32).detach(), leaf(2, 32, seed=1, dtype=torch.float32).detach()
    for tensor, number in ((x, 0), (y, 1), (y, 2), (y, 0), (x, 1), (x, 2)):
        rows = shared_inputs(adapter)[number][1]
        torch.testing.assert_close(shared.scalars(tensor, rows), tensor @ adapter.modules[number].a_RI.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [1, 2])
def test_low_precision_forms_are_as_near_to_fp32_as_the_plain_ones(dtype: torch.dtype, rank: int) -> None:
    """Training, reading and the gates of screening, each against a run in fp32 of the same rounded weights."""
    low = tiny_model("qwen2").to(dtype)
    wide = tiny_model("qwen2").to(dtype).float()
    adapter = random_adapter(wide, rank=rank)
    weights = [t.requires_grad_() for m in adapter.modules for t in (m.a_RI, m.b_OR)]
    ids = torch.randint(0, 97, (3, 9), generator=torch.Generator().manual_seed(0))

    def gradients(model: Any) -> list[Tensor]:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        return [loss.detach().float(), *torch.autograd.grad(loss, weights)]

    slope = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(1))

    def gate_slopes(model: Any, gating: Callable[[Tensor], AbstractContextManager[None]]) -> list[Tensor]:
        gates = torch.ones(3, len(adapter.addresses), requires_grad=True)
        with gating(gates):
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return by_module(torch.autograd.grad(hidden, gates, slope.to(hidden.dtype))[0])

    def by_module(values: Tensor) -> list[Tensor]:
        return [values[..., part.columns] for part in adapter.modules]

    for model in (low, wide):
        model.requires_grad_(False)
    with attach(wide, adapter) as attached:
        exact = gradients(wide)
        exact_gates = gate_slopes(wide, lambda gates: attached.edit(edits.gate(gates)))
        with torch.no_grad():
            exact_scalars = attached.run(ids).scalars
    with attach(low, adapter) as attached:
        plain = gradients(low)
        plain_gates = gate_slopes(low, lambda gates: attached.edit(edits.gate(gates)))
        gates = gate_slopes(low, lambda gates: gated(attached, gates))
        with fused(low, adapter) as count:
            assert count == 3 * 7 + 1
            mine = gradients(low)
        with torch.no_grad():
            plain_scalars = attached.run(ids).scalars
            with fused_reading(attached) as count:
                assert count == len(adapter.modules) + 3 * 3 + 1
                scalars = attached.run(ids).scalars
    as_near(mine, plain, exact)
    as_near(gates, plain_gates, exact_gates)
    as_near(by_module(scalars), by_module(plain_scalars), by_module(exact_scalars))


def as_near(mine: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
    """Tensor by tensor: one that is wrong altogether is off by its own size."""
    own = [far(found, wanted) for found, wanted in zip(mine, exact, strict=True)]
    others = [far(found, wanted) for found, wanted in zip(plain, exact, strict=True)]
    assert 0 < sum(others) < 0.5 * len(others)
    assert sum(own) < 1.1 * sum(others)
    assert all(a < 1.5 * b for a, b in zip(own, others, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sure_heads_gradient_is_not_lost_in_low_precision(dtype: torch.dtype) -> None:
    """Targets at p > 0.99: the gradient is far smaller than the two terms that it is the difference of."""
    weight = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    targets = torch.arange(0, 2000, 100)
    hidden = weight[targets] * 0.35
    wide = [t.double().requires_grad_() for t in (hidden, weight)]
    logp = F.log_softmax(wide[0] @ wide[1].T, dim=-1).detach()
    assert float(logp.gather(1, targets[:, None]).exp().min()) > 0.99
    wanted = F.cross_entropy(wide[0] @ wide[1].T, targets, reduction="sum")
    exact = torch.autograd.grad(wanted, wide)
    own = [t.clone().requires_grad_() for t in (hidden, weight)]
    got = head_loss(own[0], own[1], targets)
    assert float(got.detach()) == pytest.approx(float(wanted.detach()), abs=5e-5)
    for mine, theirs in zip(torch.autograd.grad(got, own), exact, strict=True):
        assert far(mine, theirs) < 0.005
    scores = torch.exp(logp - logp.amax(1, keepdim=True)).float()
    late = (scores.to(dtype) @ weight).float() / scores.sum(1, keepdim=True) - weight[targets].float()
    assert far(late, exact[0]) > 0.2


def far(found: Tensor, exact: Tensor) -> float:
    """The relative error of a whole tensor."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def test_a_trainable_heads_gradient_is_not_formed_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = leaf(6, 8), leaf(11, 8, seed=1)
    targets = torch.arange(6)
    wanted = head_loss(hidden, weight, targets).detach()
    monkeypatch.setattr(torch, "zeros_like", None)  # what the weight's gradient is summed in
    with torch.no_grad():
        assert torch.equal(head_loss(hidden, weight, targets), wanted)


@pytest.mark.parametrize("names", [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")])
def test_maps_that_share_an_input_save_it_once(names: tuple[str, ...]) -> None:
    """Of the forward pass only one copy of it is kept, whoever needs it for a gradient."""
    model = tiny_model().requires_grad_(False)
    adapter = random_adapter(model)
    for part in adapter.modules:
        part.a_RI.requires_grad_()
    parent = model.model.layers[1].self_attn if names[0] == "q_proj" else model.model.layers[1].mlp
    seen: list[Tensor] = []
    saved: list[Tensor] = []
    parent.get_submodule(names[0]).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    parent.register_forward_pre_hook(lambda _, args: seen.extend(args[:1]))

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    ids = torch.randint(0, 97, (3, 9), generator=torch.Generator().manual_seed(0))
    with (
        torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
        attach(model, adapter),
        fused(model, adapter),
    ):
        model(ids, labels=ids).loss.backward()
    x = seen[-1]  # the first were probes
    alike = [tensor for tensor in saved if tensor.numel() == x.numel() and torch.equal(tensor.reshape(x.shape), x)]
    assert len(alike) == (3 if names[0] == "q_proj" else 1)  # a whole MLP is one function
    assert {tensor.untyped_storage().data_ptr() for tensor in alike} == {x.untyped_storage().data_ptr()}
