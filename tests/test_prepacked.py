"""Products with a weight laid out once: the same numbers as `F.linear`, whatever torch's build offers."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorascope import prepacked as module
from lorascope.attached import attach
from lorascope.fused_reading import fused_reading
from lorascope.prepacked import prepacked, prepacked_maps
from tiny_models import random_adapter, tiny_model


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LAYOUTS = {
    "one row": lambda: values(1, 24),
    "a vector": lambda: values(24),
    "no rows": lambda: values(0, 24),
    "a batch": lambda: values(3, 5, 24),
    "many rows": lambda: values(1, 700, 24),
    "transposed": lambda: values(24, 7).T,
    "every other row": lambda: values(3, 8, 48)[:, ::2, 24:],
    "one row repeated": lambda: values(1, 24).expand(6, 24),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("outputs", [1, 40])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("built_with", [True, False])
def test_gives_what_a_linear_map_gives(
    layout: str, outputs: int, with_bias: bool, built_with: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not built_with:
        monkeypatch.setattr(module, "packs", lambda: False)
    x, weight = LAYOUTS[layout](), values(outputs, 24, seed=1)
    bias = values(outputs, 2, seed=2)[:, 0] if with_bias else None
    wanted = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    with torch.no_grad():
        got = prepacked(weight, bias)(x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


def test_weights_are_packed_where_torch_can() -> None:
    form: Any = prepacked(values(40, 24))
    packed = form.keywords.get("packed")
    assert (packed is not None and packed.is_mkldnn) == torch.backends.mkldnn.is_available()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions_run_as_they_are(dtype: torch.dtype) -> None:
    x, weight = values(5, 24).to(dtype), values(40, 24, seed=1).to(dtype)
    assert torch.equal(prepacked(weight)(x), F.linear(x, weight))


def test_a_build_whose_product_differs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators are torch's own and not documented, so a first use looks whether they do what they did."""
    packs = module.packs.__wrapped__
    assert packs() == torch.backends.mkldnn.is_available()
    real = module.product

    def wrong(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        return real(x, packed, bias) * 1.01

    def gone(*_: Any) -> Tensor:
        raise AttributeError("no such operator")

    for other in (wrong, gone):
        monkeypatch.setattr(module, "product", other)
        assert not packs()


def test_a_models_maps_run_prepacked_inside_and_are_its_own_after() -> None:
    model = tiny_model()
    adapter = random_adapter(model)
    ids = torch.randint(0, 97, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with attach(model, adapter) as attached:
            adapted = attached.run(ids)
        plain = model(ids).logits
        with prepacked_maps(model) as count:
            assert count == (3 * 7 + 1) * module.packs()  # and the LM head
            torch.testing.assert_close(model(ids).logits, plain, rtol=1e-5, atol=1e-5)
            with attach(model, adapter) as attached:
                got = attached.run(ids)
        assert torch.equal(model(ids).logits, plain)
    torch.testing.assert_close(got.logits, adapted.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.scalars, adapted.scalars, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got.logits, plain, rtol=1e-2)
    assert not any("forward" in part.__dict__ for part in model.modules())


def test_maps_stay_as_they_are_where_memory_or_precision_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    with prepacked_maps(model.to(torch.bfloat16)) as count:
        assert count == 0
    model.float()
    with attach(model, random_adapter(model)), prepacked_maps(model) as count:
        assert count == module.packs()  # the LM head alone: it has no directions
    monkeypatch.setattr(module, "free_memory", lambda _: 0)
    with prepacked_maps(model) as count:
        assert count == 0


def test_an_unused_map_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording has no use for the LM head, which may be the largest of all maps."""
    model = tiny_model()
    copied: list[tuple[int, ...]] = []
    real = module.arranged
    monkeypatch.setattr(module, "arranged", lambda weight: (copied.append(tuple(weight.shape)), real(weight))[1])
    ids = torch.arange(6)[None]
    with torch.no_grad(), attach(model, random_adapter(model, patterns="L*.q")) as attached, fused_reading(attached):
        for _ in range(2):
            attached.trunk(ids)
        assert len(copied) == 3 * 7 * module.packs()
        attached.run(ids)
        assert len(copied) == (3 * 7 + 1) * module.packs()


@pytest.mark.parametrize("patterns", ["*", "L*.q,L1.down"])
def test_memory_decides_the_cost_and_not_the_numbers(patterns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording that goes on beside another job ends with the same bytes."""
    model = tiny_model()
    ids = torch.randint(0, 97, (3, 9), generator=torch.Generator().manual_seed(0))
    copied: list[int] = []
    real = module.arranged
    monkeypatch.setattr(module, "arranged", lambda weight: (copied.append(1), real(weight))[1])
    runs, copies = [], []
    for free in (1 << 40, 0):
        monkeypatch.setattr(module, "free_memory", lambda _, free=free: free)
        with (
            torch.no_grad(),
            attach(model, random_adapter(model, patterns=patterns)) as attached,
            fused_reading(attached),
        ):
            copied.clear()
            runs += [attached.trunk(ids).scalars for _ in range(2)]
            copies.append(len(copied))
    assert all(torch.equal(run, runs[0]) for run in runs)
    assert copies == ([21, 42] if module.packs() else [0, 0])


def test_gradients_are_not_lost() -> None:
    model = tiny_model()
    ids = torch.randint(0, 97, (3, 9), generator=torch.Generator().manual_seed(0))
    own = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))
    with prepacked_maps(model):
        found = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, own, strict=True))
    if module.packs():
        with pytest.raises(RuntimeError, match="no gradient"):
            prepacked(values(40, 24))(values(5, 24).requires_grad_())
