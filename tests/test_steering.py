"""Steering: what moves do to scalars, by hand and by algebra; streams that leave no trace; controls of equal size."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lorascope import edits
from lorascope.attached import attach
from lorascope.errors import BadInput, MissingStage
from lorascope.features import LatentWeights, jumprelu_codes
from lorascope.generation import Sampling, generate_batch
from lorascope.models import load_model
from lorascope.prepacked import prepacked_maps
from lorascope.steering import MODES, Bench, Panel, Steer, steer_stream
from lorascope.steering import passes as passes_module
from lorascope.steering.moves import direction_move, move_shift
from lorascope.steering.passes import begin_sequel, random_twins, run_pass
from lorascope.traces import Renderer
from tiny_folder import save_tiny
from tiny_models import random_adapter

QUESTION = "What is 2+2?"
LATENTS = 6


def random_latents(n: int, seed: int = 0) -> LatentWeights:
    rng = np.random.default_rng(seed)
    W_dec = rng.normal(size=(LATENTS, n)).astype(np.float32)
    W_enc = rng.normal(size=(n, LATENTS)).astype(np.float32)
    return LatentWeights(W_enc, W_dec, np.full(LATENTS, 0.3, np.float32), np.full(LATENTS, 0.1, np.float32))


def make_panel(adapter: Any, latents: LatentWeights | None) -> Panel:
    rng = np.random.default_rng(1)
    names = [f"{a}{sign}" for a in adapter.addresses for sign in "+-"] + [f"sae.{i}" for i in range(LATENTS)]
    units = {name: float(rng.uniform(0.5, 2)) for name in names}
    return Panel(adapter.addresses, adapter.effect_per_scalar, latents, units | {"L0.q-": 0.0})


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Renderer]:
    model, tokenizer = load_model(str(save_tiny(tmp_path_factory.mktemp("tiny"))))
    return model, Renderer(tokenizer, system="")


@pytest.fixture
def bench(loaded: tuple[Any, Renderer]) -> Iterator[Bench]:
    model, renderer = loaded
    adapter = random_adapter(model)
    with prepacked_maps(model), attach(model, adapter) as attached:
        yield Bench(attached, renderer, make_panel(adapter, random_latents(len(adapter.addresses))))


def stream(bench: Bench, *steers: Steer, **options: Any) -> list[Any]:
    options = {"sampling": Sampling(max_new_tokens=10)} | options
    return list(steer_stream(bench, bench.renderer.prompt_ids(QUESTION), steers=steers, **options))


def ids_of(tokens: Sequence[Any]) -> list[int]:
    return [token["token_id"] for token in tokens if not token["end"]]


def test_without_steering_it_is_the_models_own_text(bench: Bench) -> None:
    prompt, sampling = bench.renderer.prompt_ids(QUESTION), Sampling(max_new_tokens=40)
    adapted = generate_batch(bench.attached, bench.renderer, [prompt], sampling)[0]
    with bench.attached.edit(edits.off("*")):
        base = generate_batch(bench.attached, bench.renderer, [prompt], sampling)[0]
    assert ids_of(stream(bench, sampling=sampling)) == adapted.ids
    assert ids_of(stream(bench, sampling=sampling, target="base")) == base.ids
    assert ids_of(stream(bench, sampling=sampling, target="control")) == adapted.ids
    assert adapted.ids != base.ids


def test_it_ends_where_the_model_does(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    free = ids_of(stream(bench))
    end = next(i for i in range(2, 10) if free[i] not in free[:i])
    monkeypatch.setattr("lorascope.steering.stream.stop_ids", lambda *_: [free[end]])
    tokens = stream(bench)
    assert [token["token_id"] for token in tokens] == free[: end + 1]
    assert [token["end"] for token in tokens] == [False] * end + [True]
    late = stream(bench, sampling=Sampling(max_new_tokens=10, min_new_tokens=9))
    assert len(late) >= 9


@pytest.mark.parametrize("target", ["adapter", "base", "control"])
@pytest.mark.parametrize("feature", ["L1.gate+", "L2.down-", "sae.3"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_amount_of_zero_changes_nothing(bench: Bench, target: str, feature: str, temperature: float) -> None:
    sampling = Sampling(max_new_tokens=12, temperature=temperature, seed=3)
    options = {"target": target, "where": "all", "watch": ["L1.gate+", "sae.3"], "sampling": sampling}
    assert stream(bench, Steer(feature, 0.0), **options) == stream(bench, **options)


@pytest.mark.parametrize("mode", ["add", "scale"])
def test_logits_are_then_the_same_bit_for_bit(bench: Bench, mode: str) -> None:
    steers = [Steer(feature, float(mode == "scale"), mode) for feature in ("L1.gate+", "sae.3")]
    ids = bench.renderer.prompt_ids(QUESTION)
    plain = run_pass(begin_sequel(bench.attached, bench.panel, (), "adapter", 0), ids, edited=True)
    moved = run_pass(begin_sequel(bench.attached, bench.panel, steers, "adapter", 0), ids, edited=True)
    assert torch.equal(plain[0], moved[0])
    assert np.array_equal(plain[1], moved[1])


def by_hand(bench: Bench, shift_of: Any, count: int) -> tuple[list[int], list[np.ndarray]]:
    """Greedy text without a cache: the whole sequence is run anew for each token, with each token's own shift [N]
    from its scalars in a run where it alone has none."""
    ids = bench.renderer.prompt_ids(QUESTION)
    start, shifts, scalars = len(ids), [], []
    rows = [np.zeros(len(bench.panel.addresses), np.float32)] * start

    def run() -> Any:
        values = torch.from_numpy(np.stack(rows))[None]
        with bench.attached.edit(edits.Edit("*", lambda z, columns: z + values[..., columns])):
            return bench.attached.run([ids])

    with torch.no_grad():
        for _ in range(count):
            ids.append(int(run().logits[0, -1].argmax()))
            rows.append(np.zeros_like(rows[0]))
            shifts.append(shift_of(run().scalars[0, -1].numpy()))
            rows[-1] = shifts[-1]
            scalars.append(run().scalars[0, -1].numpy())
    return ids[start:], scalars


def test_adding_a_latent_is_adding_its_decoder_row(bench: Bench) -> None:
    steer = Steer("sae.3", 2.5)
    row = 2.5 * bench.panel.p99["sae.3"] * bench.panel.latents.W_dec_FN[3]  # type: ignore[union-attr]
    ids, scalars = by_hand(bench, lambda z: row, 8)
    tokens = stream(bench, steer, watch=["L1.gate+", "L1.gate-"], sampling=Sampling(max_new_tokens=8))
    assert [token["token_id"] for token in tokens] == ids
    assert ids != ids_of(stream(bench))[:8]
    effect = np.array([z[bench.panel.addresses.index("L1.gate")] for z in scalars])
    effect *= bench.panel.effect_N[bench.panel.addresses.index("L1.gate")]
    got = [t["activations"]["L1.gate+"] - t["activations"]["L1.gate-"] for t in tokens]
    np.testing.assert_allclose(got, effect, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cached", ["growing", "any"])
@pytest.mark.parametrize(("mode", "amount"), [("clamp", 1.5), ("clamp", -1.0), ("scale", 3.0), ("off", 0.0)])
def test_other_modes_take_the_code_from_a_pass_before(
    bench: Bench, mode: str, amount: float, cached: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cached == "any":  # a cache that nothing can be taken off
        monkeypatch.setattr(passes_module, "growing_cache", lambda model: None)
    w, unit = bench.panel.latents, bench.panel.p99["sae.2"]
    assert w is not None

    def shift_of(z_N: np.ndarray) -> np.ndarray:
        c = max(float(z_N @ w.W_enc_NF[:, 2] + w.b_enc_F[2]), 0.0)
        c = c if c > w.threshold_F[2] else 0.0
        wanted = {"clamp": amount * unit, "scale": amount * c, "off": 0.0}[mode]
        return ((wanted - c) * w.W_dec_FN[2]).astype(np.float32)

    ids, scalars = by_hand(bench, shift_of, 8)
    tokens = stream(bench, Steer("sae.2", amount, mode), watch=["sae.2"], sampling=Sampling(max_new_tokens=8))
    assert [token["token_id"] for token in tokens] == ids
    codes = jumprelu_codes(np.stack(scalars), w.W_enc_NF[:, [2]], w.b_enc_F[[2]], w.threshold_F[[2]])[:, 0]
    np.testing.assert_allclose([t["activations"]["sae.2"] for t in tokens], codes, rtol=1e-3, atol=1e-4)


def test_the_code_becomes_what_was_wanted_and_the_rest_of_the_state_stays(loaded: tuple[Any, Renderer]) -> None:
    """Where nothing feeds back (q, k and v of the first layer read one input) and decoder rows are orthonormal."""
    model, renderer = loaded
    adapter = random_adapter(model, patterns="q,k,v", layers="0")
    rows = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0][:2].astype(np.float32)
    latents = LatentWeights(rows.T.copy(), rows, np.zeros(2, np.float32), np.zeros(2, np.float32))
    panel = Panel(adapter.addresses, adapter.effect_per_scalar, latents, {"sae.0": 2.0, "sae.1": 2.0})
    ids = renderer.prompt_ids(QUESTION)
    with attach(model, adapter) as attached:

        def states(*steers: Steer) -> tuple[np.ndarray, np.ndarray]:
            z_TN = run_pass(begin_sequel(attached, panel, steers, "adapter", 0), ids, edited=True)[1]
            return z_TN, panel.activations(["sae.0", "sae.1"], z_TN)

        before, codes = states()
        assert (codes[:, 0] > 0).any()
        assert (codes[:, 0] == 0).any()
        fires = codes[:, 0] > 0
        for steer, wanted in (
            (Steer("sae.0", 1.5, "clamp"), np.full(len(ids), 3.0)),
            (Steer("sae.0", 0.5, "scale"), codes[:, 0] / 2),
            (Steer("sae.0", 0.0, "off"), np.zeros(len(ids))),
        ):
            after, moved = states(steer)
            exact = fires if steer.mode == "clamp" else slice(None)  # below 0, c is 0 but the state is not at 0
            np.testing.assert_allclose(moved[exact, 0], wanted[exact], atol=1e-5)
            np.testing.assert_allclose(moved[:, 1], codes[:, 1], atol=1e-5)
            expected = before + (wanted - codes[:, 0])[:, None] * rows[0]
            np.testing.assert_allclose(after, expected, atol=1e-5)


@pytest.mark.parametrize("sign", ["+", "-"])
def test_a_polarity_is_moved_in_units_of_its_usual_strength(bench: Bench, sign: str) -> None:
    name, other = f"L1.gate{sign}", "L1.gate" + "-+"[sign == "-"]
    unit, effect = bench.panel.p99[name], float(bench.panel.effect_N[bench.panel.addresses.index("L1.gate")])
    z = torch.tensor([-3.0, -0.5, 0.0, 0.5, 3.0])
    own = z * effect * (1 if sign == "+" else -1)  # positive where this polarity is active
    expected = {
        "add": own + 2 * unit,
        "scale": torch.where(own > 0, 2 * own, own),
        "off": torch.minimum(own, torch.tensor(0.0)),
        "clamp": torch.full_like(own, 2 * unit),
    }
    assert set(expected) == set(MODES)
    for mode, wanted in expected.items():
        move = direction_move(bench.panel, Steer(name, 2.0, mode), bench.panel.place(name))
        got = move(z) * effect * (1 if sign == "+" else -1)
        torch.testing.assert_close(got, wanted)
    tokens = stream(bench, Steer(name, 2.0, "clamp"), watch=[name, other])
    for token in tokens:
        assert token["activations"][name] == pytest.approx(2 * unit, rel=1e-5)
        assert token["activations"][other] == 0
    down = stream(bench, Steer(name, -2.0, "clamp"), watch=[other])
    assert all(token["activations"][other] == pytest.approx(2 * unit, rel=1e-5) for token in down)


def test_several_features_are_moved_in_order(bench: Bench) -> None:
    steers = [Steer("L1.gate+", 3.0, "clamp"), Steer("L1.gate+", 1.0), Steer("L2.down-", 2.0, "clamp")]
    tokens = stream(bench, *steers, watch=["L1.gate+", "L2.down-"])
    for token in tokens:
        assert token["activations"]["L1.gate+"] == pytest.approx(4 * bench.panel.p99["L1.gate+"], rel=1e-5)
        assert token["activations"]["L2.down-"] == pytest.approx(2 * bench.panel.p99["L2.down-"], rel=1e-5)


def test_the_prompt_is_edited_only_where_asked(bench: Bench) -> None:
    seen: list[Any] = []
    sampling, steer = Sampling(max_new_tokens=1), Steer("L1.gate+", 3.0, "clamp")
    column = bench.panel.addresses.index("L1.gate")
    for where in ("generated", "all"):
        with bench.attached.tap() as reading:
            stream(bench, steer, where=where, sampling=sampling)
        seen.append(reading.scalars()[0, :, column].numpy() * bench.panel.effect_N[column])
    wanted = 3 * bench.panel.p99["L1.gate+"]
    np.testing.assert_allclose(seen[1], wanted, rtol=1e-5)
    assert seen[0][-1] == pytest.approx(wanted, rel=1e-5)
    assert not np.isclose(seen[0][:-1], wanted).any()


@pytest.mark.parametrize("mode", MODES)
def test_the_control_writes_as_much_along_a_random_vector(bench: Bench, mode: str) -> None:
    """A forward hook adds s·b′·Δz by hand to the output of the steered direction's module."""
    adapter, model = bench.attached.adapter, bench.attached.model
    twins = random_twins(adapter, seed=5)
    np.testing.assert_allclose(twins.effect_per_scalar, adapter.effect_per_scalar, rtol=1e-5)
    number = adapter.addresses.index("L1.down")
    module, twin = adapter.modules[number], twins.modules[number]
    cosine = torch.nn.functional.cosine_similarity(module.b_OR[:, 0], twin.b_OR[:, 0], dim=0)
    assert abs(float(cosine)) < 0.6
    ids = bench.renderer.prompt_ids(QUESTION)
    with torch.no_grad():
        z_T = bench.attached.run([ids]).scalars[0, :, number]
    pushed = 4.0 * bench.panel.p99["L1.down+"] / float(bench.panel.effect_N[number])
    change_T = {"add": torch.full_like(z_T, pushed), "scale": 3 * z_T.relu(), "clamp": pushed - z_T, "off": -z_T.relu()}
    steers = [Steer("L1.down+", 4.0, mode)]
    sequel = begin_sequel(bench.attached, bench.panel, steers, "control", 5)
    got, z_TN = run_pass(sequel, ids, edited=True)
    hook = model.get_submodule(module.path).register_forward_hook(
        lambda _m, _x, y: y + module.scale * change_T[mode][:, None] * twin.b_OR[:, 0]
    )
    with torch.no_grad():
        wanted = bench.attached.run([ids])
    hook.remove()
    torch.testing.assert_close(got, wanted.logits[0, -1], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(z_TN, wanted.scalars[0].numpy(), rtol=1e-3, atol=1e-4)
    steered, _ = run_pass(begin_sequel(bench.attached, bench.panel, steers, "adapter", 5), ids, edited=True)
    assert not torch.allclose(steered, got, atol=1e-3)


def test_shifts_of_the_control_are_those_of_the_edits(bench: Bench) -> None:
    before = np.random.default_rng(2).normal(size=(5, len(bench.panel.addresses))).astype(np.float32)
    acts = bench.panel.activations(["L0.gate-", "sae.1"], before)
    shift = move_shift(bench.panel, [Steer("L0.gate-", mode="off"), Steer("sae.1", 3.0, "scale")], before)
    assert bench.panel.latents is not None
    expected = 2 * acts[:, 1:] * bench.panel.latents.W_dec_FN[1]
    number = bench.panel.addresses.index("L0.gate")
    expected[:, number] += acts[:, 0] / bench.panel.effect_N[number]
    np.testing.assert_allclose(shift, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["adapter", "base", "control"])
def test_a_stream_left_in_the_middle_leaves_no_trace(bench: Bench, target: str) -> None:
    ids = bench.renderer.prompt_ids(QUESTION)
    steers = [Steer("sae.1", 3.0)]
    with torch.no_grad():
        before = bench.attached.run([ids]).logits
    prompt = bench.renderer.prompt_ids(QUESTION)
    other = iter(steer_stream(bench, prompt, steers=steers, target=target, watch=["sae.1"]))
    for _ in range(3):
        next(other)
        with torch.no_grad():
            assert torch.equal(bench.attached.run([ids]).logits, before)
    other.close()  # type: ignore[attr-defined]
    assert bench.attached.edits == []
    assert bench.attached.readings == []
    assert torch.is_grad_enabled()


def test_streams_do_not_disturb_each_other(bench: Bench) -> None:
    prompt = bench.renderer.prompt_ids(QUESTION)
    sampling = Sampling(max_new_tokens=10, temperature=1.0, seed=1)
    options: list[dict[str, Any]] = [
        {"steers": [Steer("sae.1", 3.0, "clamp")]},
        {"target": "base"},
        {"target": "control", "steers": [Steer("sae.1", 3.0)]},
    ]
    alone = [list(steer_stream(bench, prompt, sampling=sampling, **o)) for o in options]
    together = list(zip(*(steer_stream(bench, prompt, sampling=sampling, **o) for o in options), strict=True))
    assert [list(tokens) for tokens in zip(*together, strict=True)] == alone


def test_sampling_follows_its_seed_and_nothing_elses(bench: Bench) -> None:
    def sampled(seed: int, temperature: float = 1.0) -> list[int]:
        return ids_of(stream(bench, sampling=Sampling(max_new_tokens=20, temperature=temperature, seed=seed)))

    first, state = sampled(1), torch.random.get_rng_state()
    torch.rand(3)
    assert sampled(1) == first
    assert sampled(2) != first
    assert (
        sampled(1, temperature=1e-4)
        == sampled(2, temperature=1e-4)
        == ids_of(stream(bench, sampling=Sampling(max_new_tokens=20)))
    )
    torch.random.set_rng_state(state)
    sampled(1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_draws_have_the_models_probabilities(bench: Bench) -> None:
    from lorascope.steering.stream import next_token

    logits, noise = torch.tensor([1.0, 0.0, 2.0, -1.0]), torch.Generator().manual_seed(0)
    counts = np.bincount([next_token(logits, 0.7, noise, [3]) for _ in range(4000)], minlength=4)
    wanted = torch.softmax(logits[:3] / 0.7, 0).numpy() * 4000
    assert counts[3] == 0
    assert np.abs(counts[:3] - wanted).max() < 4 * np.sqrt(1000)  # four standard deviations at the most


def test_pieces_of_text_join_to_the_text(bench: Bench) -> None:
    """One token per byte: characters of several bytes appear when they are whole."""
    text = "é 日本 🦜?"
    ids = bench.renderer.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text) + 5
    queue = iter([*ids, *ids[:1]])  # the last character stays unfinished
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorascope.steering.stream.next_token", lambda *_: next(queue))
        tokens = stream(bench, sampling=Sampling(max_new_tokens=len(ids) + 1))
    pieces = [token["text"] for token in tokens]
    assert [piece for piece in pieces if piece] == [*text, "\ufffd"]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"steers": [Steer("L9.gate+", 1)]}, BadInput, "no feature 'L9.gate[+]'.*L0.q[+].*sae.5"),
        ({"steers": [Steer("L1.gate", 1)]}, BadInput, "name a polarity"),
        ({"steers": [Steer("sae.6", 1)]}, BadInput, "sae.0 to sae.5"),
        ({"steers": [Steer("sae.x", 1)]}, BadInput, "no feature"),
        ({"watch": ["sae.99"]}, BadInput, "no feature"),
        ({"steers": [Steer("sae.1", 1, "push")]}, BadInput, "add, scale, clamp, off"),
        ({"steers": [Steer("sae.1", float("nan"))]}, BadInput, "must be a number"),
        ({"steers": [Steer("L0.q-", 1)]}, BadInput, "never fires"),
        ({"target": "full"}, BadInput, "adapter, base, control"),
        ({"where": "prompt"}, BadInput, "generated or all"),
        ({"target": "base", "steers": [Steer("sae.1", 1, "scale")]}, BadInput, "only be added"),
    ],
)
def test_wrong_input_is_named_before_a_token_is_made(
    bench: Bench, options: dict[str, Any], error: type, words: str
) -> None:
    with pytest.raises(error, match=words):
        steer_stream(bench, [1, 2], **options)


def test_what_is_missing_names_its_command(bench: Bench) -> None:
    bare = replace(bench, panel=replace(bench.panel, latents=None, p99={}, study="s"))
    with pytest.raises(MissingStage, match="lorascope sae s"):
        steer_stream(bare, [1], watch=["sae.1"])
    with pytest.raises(MissingStage, match="lorascope examples s --corpus train"):
        steer_stream(bare, [1], steers=[Steer("L1.gate+", 1)])
    steer_stream(bare, [1], steers=[Steer("L1.gate+", 2, "scale")])  # a factor needs no unit
    with pytest.raises(BadInput, match="prompt is empty"):
        steer_stream(bare, [])
