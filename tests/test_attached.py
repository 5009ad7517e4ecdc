"""The attached model equals PEFT, the merged weights and the base; its scalars are a·x; edits do what they say."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from lorascope import edits
from lorascope.adapter import Adapter, build_adapter
from lorascope.attached import attach, decoder_layers, head_of
from lorascope.errors import BadInput
from lorascope.rank1 import adapted_forward
from tiny_models import random_adapter, tiny_model

TOKENS = [[5, 9, 2, 7, 11, 3], [8, 1, 4], [90, 13, 13, 13, 2]]
CASES = [("llama", 1), ("llama", 4), ("qwen2", 1), ("qwen2", 4)]


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Within 1e-4 × max(1, largest |logit|)."""
    return float((ours - theirs).abs().max()) <= 1e-4 * max(1.0, float(theirs.abs().max()))


def logits_of(model: Any, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens])).logits[0]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-r{case[1]}")
def pair(request: pytest.FixtureRequest) -> tuple[Any, Adapter]:
    kind, rank = request.param
    model = tiny_model(kind)
    return model, random_adapter(model, rank)


def test_logits_equal_peft_and_differ_from_base(pair: tuple[Any, Adapter], tmp_path: Path) -> None:
    model, adapter = pair
    adapter.save(tmp_path)
    base = logits_of(model, TOKENS[0])
    with torch.no_grad(), attach(model, adapter) as attached:
        ours = attached.run([TOKENS[0]]).logits[0]
    theirs = logits_of(PeftModel.from_pretrained(model, str(tmp_path)).eval(), TOKENS[0])
    assert close(ours, theirs)
    assert not close(ours, base)


def test_logits_equal_merged_weights(pair: tuple[Any, Adapter]) -> None:
    model, adapter = pair
    with torch.no_grad(), attach(model, adapter) as attached:
        ours = attached.run([TOKENS[0]]).logits[0]
    with torch.no_grad():
        for m in adapter.modules:
            model.get_submodule(m.path).weight += m.scale * m.b_OR @ m.a_RI
    assert close(ours, logits_of(model, TOKENS[0]))


def test_scalars_are_the_read_vectors_on_the_true_inputs(pair: tuple[Any, Adapter]) -> None:
    model, adapter = pair
    inputs: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(m.path).register_forward_hook(
            lambda _, args, __, path=m.path: inputs.__setitem__(path, args[0].detach())
        )
        for m in adapter.modules
    ]
    with torch.no_grad(), attach(model, adapter) as attached:
        scalars = attached.run([TOKENS[0]]).scalars[0]
    for hook in hooks:
        hook.remove()
    expected = torch.cat([inputs[m.path][0] @ m.a_RI.T for m in adapter.modules], dim=-1)
    torch.testing.assert_close(scalars, expected)
    assert scalars.shape == (6, len(adapter.addresses))


def test_padded_batch_equals_single_sequences(pair: tuple[Any, Adapter]) -> None:
    model, adapter = pair
    with torch.no_grad(), attach(model, adapter) as attached:
        batch = attached.run(TOKENS)
        for row, tokens in enumerate(TOKENS):
            single = attached.run([tokens])
            assert close(batch.logits[row, : len(tokens)], single.logits[0])
            assert close(batch.scalars[row, : len(tokens)], single.scalars[0])


def test_all_off_equals_base_bit_for_bit(pair: tuple[Any, Adapter]) -> None:
    model, adapter = pair
    base = logits_of(model, TOKENS[0])
    with torch.no_grad(), attach(model, adapter) as attached, attached.edit(edits.off()):
        assert torch.equal(attached.run([TOKENS[0]]).logits[0], base)


def test_base_is_restored_bit_for_bit_after_an_exception() -> None:
    model = tiny_model()
    base, weights = logits_of(model, TOKENS[0]), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="boom"), attach(model, random_adapter(model)) as attached:  # noqa: SIM117
        with attached.edit(edits.scale("attn", 3.0)):
            raise RuntimeError("boom")
    assert torch.equal(logits_of(model, TOKENS[0]), base)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_edits_end_with_their_context_also_after_an_exception() -> None:
    model = tiny_model()
    with torch.no_grad(), attach(model, random_adapter(model)) as attached:
        before = attached.run(TOKENS)
        with pytest.raises(RuntimeError), attached.edit(edits.add("*", 1.0)):
            raise RuntimeError
        after = attached.run(TOKENS)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.scalars, after.scalars)


def test_switching_off_a_direction_equals_zeroing_its_write_vector(pair: tuple[Any, Adapter]) -> None:
    model, adapter = pair
    target = adapter.addresses[adapter.modules[4].columns.start]
    with torch.no_grad(), attach(model, adapter) as attached, attached.edit(edits.off(target)):
        ours = attached.run([TOKENS[0]]).logits[0]
    adapter.modules[4].b_OR[:, 0] = 0
    with torch.no_grad(), attach(model, adapter) as attached:
        assert close(ours, attached.run([TOKENS[0]]).logits[0])


def test_each_edit_does_what_it_says() -> None:
    model = tiny_model()
    adapter = random_adapter(model)
    n = len(adapter.addresses)
    means = torch.arange(n) / 7.0
    # Only the first module's scalars are compared: later ones see other inputs once an edit acts.
    with torch.no_grad(), attach(model, adapter) as attached:
        z = attached.run(TOKENS).scalars[..., 0]

        def edited(*chosen: edits.Edit) -> Tensor:
            with attached.edit(*chosen):
                return attached.run(TOKENS).scalars[..., 0]

        first = adapter.addresses[0]
        torch.testing.assert_close(edited(edits.off(first)), torch.zeros_like(z))
        torch.testing.assert_close(edited(edits.off(first, to=means + 2)), torch.full_like(z, 2.0))
        torch.testing.assert_close(edited(edits.scale(first, -2.0)), -2 * z)
        torch.testing.assert_close(edited(edits.clamp(first, -0.1, 0.1)), z.clamp(-0.1, 0.1))
        torch.testing.assert_close(edited(edits.add(first, 1.5)), z + 1.5)
        torch.testing.assert_close(edited(edits.scale(first, 2.0), edits.add(first, 1.0)), 2 * z + 1)
        gates = torch.tensor([1.0, 0.0, 0.5])[:, None].expand(3, n)
        torch.testing.assert_close(edited(edits.gate(gates)), z * gates[:, :1])
        values, mask = torch.randn(3, 6, n), torch.tensor([[True, False] * 3] * 3)
        torch.testing.assert_close(edited(edits.replace(values, mask_BT=mask)), torch.where(mask, values[..., 0], z))


def test_replacing_scalars_by_themselves_changes_nothing() -> None:
    model = tiny_model()
    with torch.no_grad(), attach(model, random_adapter(model, rank=2)) as attached:
        before = attached.run(TOKENS)
        with attached.edit(edits.replace(before.scalars)):
            after = attached.run(TOKENS)
    assert torch.equal(before.logits, after.logits)


def test_results_do_not_depend_on_how_a_direction_is_split() -> None:
    model = tiny_model()
    adapter = random_adapter(model)
    with torch.no_grad(), attach(model, adapter) as attached:
        before = attached.run(TOKENS)
    effect = before.scalars * torch.from_numpy(adapter.effect_per_scalar.copy())
    for sign in (3.0, -0.5):
        split = random_adapter(model)
        for module in split.modules:
            module.a_RI.mul_(sign)
            module.b_OR.div_(sign)
        with torch.no_grad(), attach(model, split) as attached:
            after = attached.run(TOKENS)
        assert close(after.logits, before.logits)
        # c < 0 swaps the polarities.
        ours = after.scalars * torch.from_numpy(split.effect_per_scalar.copy()) * (1 if sign > 0 else -1)
        torch.testing.assert_close(ours, effect, rtol=1e-4, atol=1e-5)


def test_trunk_and_head_equal_the_full_run() -> None:
    model = tiny_model("qwen2")
    with torch.no_grad(), attach(model, random_adapter(model)) as attached:
        full, trunk = attached.run(TOKENS), attached.trunk(TOKENS)
        torch.testing.assert_close(attached.head(trunk.hidden), full.logits)
        assert torch.equal(trunk.scalars, full.scalars)


def test_low_precision_base_keeps_the_delta_that_merging_would_lose() -> None:
    # W = ±1 cancels on x, and s·b·a = 1e-3 per weight is under half a bf16 step at 1.
    weight = torch.tensor([[1.0, -1.0] * 16] * 4).bfloat16()
    x, a_RI, b_OR = torch.ones(1, 32).bfloat16(), torch.ones(1, 32), torch.full((4, 1), 1e-3)
    ours = adapted_forward(x, lambda x: x @ weight.T, a_RI, b_OR, 1.0, lambda z: z)
    merged = (weight.float() + b_OR @ a_RI).bfloat16()
    assert torch.equal(x @ merged.T, torch.zeros(1, 4).bfloat16())
    torch.testing.assert_close(ours.float(), torch.full((1, 4), 0.032), rtol=2**-8, atol=0)
    assert ours.dtype == torch.bfloat16


def test_svd_basis_gives_the_same_model_with_orthonormal_read_vectors(tmp_path: Path) -> None:
    model = tiny_model()
    adapter = random_adapter(model, rank=4)
    rewritten = adapter.to_svd_basis()
    with torch.no_grad(), attach(model, adapter) as attached:
        before = attached.run(TOKENS).logits
    with torch.no_grad(), attach(model, rewritten) as attached:
        assert close(attached.run(TOKENS).logits, before)
    for module in rewritten.modules:
        torch.testing.assert_close(module.a_RI @ module.a_RI.T, torch.eye(4), atol=1e-5, rtol=0)
        norms = module.b_OR.norm(dim=0)
        assert bool((norms[:-1] >= norms[1:]).all())


@pytest.mark.parametrize(
    ("change", "words"),
    [({"hidden_size": 64}, "another model"), ({"num_hidden_layers": 1}, "not in this model")],
)
def test_an_adapter_of_another_model_is_refused(change: dict[str, int], words: str) -> None:
    adapter = random_adapter(tiny_model())
    model = tiny_model(**change)
    with pytest.raises(BadInput, match=words), attach(model, adapter):
        pass
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_an_unknown_pattern_is_bad_input() -> None:
    model = tiny_model()
    with (
        attach(model, random_adapter(model)) as attached,
        pytest.raises(BadInput, match=r"L9\.gate"),
        attached.edit(edits.off("L9.gate")),
    ):
        pass


@pytest.mark.parametrize("kind", ["llama", "falcon"])
def test_decoder_layers_are_those_that_addresses_count_in(kind: str) -> None:
    model = tiny_model(kind)
    wanted = model.model.layers if kind == "llama" else model.transformer.h
    adapter = random_adapter(model, patterns="*", layers="1")
    # As many experts in a layer as there are layers are no second candidate.
    wanted[0].experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(len(wanted)))
    assert decoder_layers(model, adapter) is wanted
    head = build_adapter({"lm_head": (torch.ones(1, 32), torch.ones(97, 1), 1.0)}, adapter.config)
    with pytest.raises(BadInput, match="no numbered decoder layer"):
        decoder_layers(model, head)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("capped", [False, True])
def test_the_heads_logits_of_a_low_precision_base_are_those_of_fp32(dtype: torch.dtype, capped: bool) -> None:
    model = tiny_model().to(dtype).requires_grad_(False)
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(-3, 3, 97, dtype=dtype), requires_grad=False)
    if capped:
        model.config.final_logit_softcapping = 5.0
    hidden = torch.randn(7, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted = hidden.double() @ model.lm_head.weight.double().T + model.lm_head.bias.double()
    wanted = torch.tanh(wanted / 5) * 5 if capped else wanted
    got = head_of(model)(hidden)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    assert float((model.lm_head(hidden).double() - wanted).abs().max()) > 1e-3


def test_a_low_precision_model_with_another_head_is_refused_and_a_plain_one_is_not() -> None:
    model = tiny_model().to(torch.bfloat16)
    ids = torch.tensor([TOKENS[0]])
    with torch.no_grad(), attach(model, random_adapter(model)) as attached:
        hidden = attached.trunk(ids).hidden
        torch.testing.assert_close(attached.head(hidden), attached.run(ids).logits.float(), rtol=2e-2, atol=2e-2)
    model.lm_head.register_forward_hook(lambda _, __, logits: logits * 1.1)
    with torch.no_grad(), attach(model, random_adapter(model)) as attached, pytest.raises(BadInput, match="head"):
        attached.head(hidden)
