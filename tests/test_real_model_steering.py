"""Steered text of the built-in model against a loop over whole plain runs, without a cache."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from lorascope import edits
from lorascope.adapter import Adapter
from lorascope.attached import attach
from lorascope.features import LatentWeights
from lorascope.generation import Sampling, generate_batch
from lorascope.models import load_model
from lorascope.prepacked import prepacked_maps
from lorascope.steering import Bench, Panel, Steer, steer_stream
from lorascope.study import Study
from real_model import MODEL, Change, plain_run

QUESTION = "What is 2 + 2?"
COUNT = 4
UNIT = {"L12.gate+": 0.5, "L12.gate-": 0.4, "sae.1": 0.8}


@pytest.fixture(scope="module")
def model() -> Any:
    """Without anything on it."""
    return load_model(MODEL)[0].requires_grad_(False)


@pytest.fixture(scope="module")
def bench(real_study: Study) -> Iterator[Bench]:
    """Latents that read and write many directions; units of the size of usual activations."""
    steered, tokenizer = load_model(MODEL)
    adapter = Adapter.load(real_study.path / "adapter")
    n, rng = len(adapter.addresses), np.random.default_rng(0)
    W_enc, W_dec = (rng.normal(size=shape).astype(np.float32) for shape in ((n, 2), (2, n)))
    zeros = np.zeros(2, np.float32)
    panel = Panel(adapter.addresses, adapter.effect_per_scalar, LatentWeights(W_enc, W_dec * 0.2, zeros, zeros), UNIT)
    with prepacked_maps(steered), attach(steered, adapter) as attached:
        yield Bench(attached, real_study.renderer(tokenizer), panel)


def greedy(model: Any, adapter: Adapter, prompt: list[int], count: int, change_at: Any) -> tuple[list[int], np.ndarray]:
    """Text and the generated tokens' scalars [T, N] as they took effect; `change_at(ids)` is the change of a run."""
    ids = list(prompt)
    for _ in range(count):
        run = plain_run(model, adapter, ids, change_at(ids))
        best = run.logits[-1].topk(2).values
        assert float(best[0] - best[1]) > 1e-2  # else rounding chooses
        ids.append(int(run.logits[-1].argmax()))
    return ids[len(prompt) :], plain_run(model, adapter, ids, change_at(ids)).used[len(prompt) :].numpy()


def after(start: int, column: int, move: Any) -> Change:
    """One direction's scalars moved on the tokens from `start` on."""

    def change(z: torch.Tensor, columns: slice) -> torch.Tensor:
        if not columns.start <= column < columns.stop:
            return z
        z = z.clone()
        z[0, start:, column - columns.start] = move(z[0, start:, column - columns.start])
        return z

    return change


@torch.no_grad()
@pytest.mark.parametrize(("mode", "amount"), [("add", 3.0), ("scale", -2.0), ("clamp", 2.0), ("off", 0.0)])
def test_a_steered_direction_writes_what_plain_runs_do(bench: Bench, model: Any, mode: str, amount: float) -> None:
    column, name = bench.panel.addresses.index("L12.gate"), "L12.gate-"
    effect = -float(bench.panel.effect_N[column])
    moves = {
        "add": lambda z: z + amount * UNIT[name] / effect,
        "scale": lambda z: torch.where(z * effect > 0, amount * z, z),
        "clamp": lambda z: torch.full_like(z, amount * UNIT[name] / effect),
        "off": lambda z: torch.where(z * effect > 0, 0.0, z),
    }
    prompt = bench.renderer.prompt_ids(QUESTION)
    steers, sampling = [Steer(name, amount, mode)], Sampling(max_new_tokens=COUNT, min_new_tokens=COUNT)
    tokens = list(steer_stream(bench, prompt, steers=steers, watch=["L12.gate+", name], sampling=sampling))
    ids, used = greedy(model, bench.attached.adapter, prompt, COUNT, lambda _: after(len(prompt), column, moves[mode]))
    assert [token["token_id"] for token in tokens] == ids
    found = [token["activations"][name] - token["activations"]["L12.gate+"] for token in tokens]
    # fp32, cached and whole: the sums of attention go in another order.
    np.testing.assert_allclose(found, used[:, column] * effect, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("mode", "amount"), [("add", 3.0), ("clamp", 2.0), ("scale", -1.0)])
def test_a_steered_latent_writes_what_plain_runs_do(bench: Bench, model: Any, mode: str, amount: float) -> None:
    """The code of a token comes from a run in which it alone is not moved; `off` is scaling by 0."""
    prompt, latents = bench.renderer.prompt_ids(QUESTION), bench.panel.latents
    assert latents is not None
    adapter, rows = bench.attached.adapter, [torch.zeros(len(bench.panel.addresses))] * len(prompt)
    sampling = Sampling(max_new_tokens=COUNT, min_new_tokens=COUNT)
    tokens = list(
        steer_stream(bench, prompt, steers=[Steer("sae.1", amount, mode)], watch=["sae.1"], sampling=sampling)
    )

    def change_at(ids: list[int]) -> Change:
        def shifted(z: torch.Tensor, columns: slice) -> torch.Tensor:
            return z + torch.stack(rows)[:, columns]

        while len(rows) < len(ids):
            rows.append(torch.zeros(len(bench.panel.addresses)))
            z_N = plain(ids[: len(rows)], shifted).used[-1].numpy()
            code = max(float(z_N @ latents.W_enc_NF[:, 1]), 0.0)
            wanted = {"add": code + amount * UNIT["sae.1"], "clamp": amount * UNIT["sae.1"], "scale": amount * code}
            rows[-1] = torch.from_numpy((wanted.get(mode, 0.0) - code) * latents.W_dec_FN[1]).float()
        return shifted

    def plain(ids: list[int], change: Change) -> Any:
        return plain_run(model, adapter, ids, change)

    ids, used = greedy(model, adapter, prompt, COUNT, change_at)
    assert [token["token_id"] for token in tokens] == ids
    codes = (used @ latents.W_enc_NF[:, 1]).clip(0)
    np.testing.assert_allclose([token["activations"]["sae.1"] for token in tokens], codes, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_batch_under_all_edits_writes_what_plain_runs_do(bench: Bench, model: Any) -> None:
    """Generated tokens alone are edited; rows of a batch are padded to the longest."""
    adapter, names = bench.attached.adapter, bench.panel.addresses
    layer = [name.partition(".")[0] for name in names]
    changes = {
        "L3": (edits.scale("L3.*", -1.0, where="generated"), lambda z: -z),
        "L9": (edits.off("L9.*", where="generated"), torch.zeros_like),
        "L15": (edits.add("L15.*", 0.5, where="generated"), lambda z: z + 0.5),
        "L21": (edits.clamp("L21.*", -0.1, 0.2, where="generated"), lambda z: z.clamp(-0.1, 0.2)),
    }
    prompts = [bench.renderer.prompt_ids(text) for text in ("Hi", QUESTION)]
    with bench.attached.edit(*(edit for edit, _ in changes.values())):
        sampling = Sampling(max_new_tokens=COUNT, min_new_tokens=COUNT)
        found = generate_batch(bench.attached, bench.renderer, prompts, sampling)
    for prompt, generation in zip(prompts, found, strict=True):

        def change(z: torch.Tensor, columns: slice, start: int = len(prompt)) -> torch.Tensor:
            move = changes.get(layer[columns.start], (None, lambda z: z))[1]
            return torch.cat([z[:, :start], move(z[:, start:])], dim=1)

        ids, _ = greedy(model, adapter, prompt, COUNT, lambda _, change=change: change)
        assert generation.ids == ids
