"""Tiny models of many architectures go through every stage that runs them, and each gives what plain hooks give."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from torch import nn

from lorascope import edits
from lorascope.ablation import AblateConfig, ablate, groups, make_targets
from lorascope.adapter import Adapter, build_adapter, initial_adapter
from lorascope.addresses import direction_type, group_of, locate_modules, select, side_of
from lorascope.attached import attach
from lorascope.config import Options
from lorascope.controls import neuron_probe, probing
from lorascope.creation import NewConfig, create_study
from lorascope.decoders import in_no_group, linear_modules, not_linear, text_decoder
from lorascope.errors import BadInput
from lorascope.fused import fused
from lorascope.fused_reading import fused_reading
from lorascope.generation import Sampling, cut_at_end, generate_batch, stop_ids
from lorascope.kl import assistant_positions
from lorascope.leave_one_out import leave_out
from lorascope.logit_lens import LensConfig, make_lens, read_lens
from lorascope.recording import RecordConfig, record
from lorascope.screening import gated
from lorascope.store import Store, store_folder
from lorascope.study import Study
from lorascope.traces import Rendered, Renderer
from lorascope.training import Learner, TrainConfig, train, trainable_adapter
from lorascope.training_plan import batch_tensors
from many_models import MODULES, NAMES, build_model
from tiny_folder import byte_tokenizer, save_tiny
from tiny_models import random_adapter, tiny_model

WHOLE = ["gpt2", "opt", "qwen2_moe", "llama4", "gemma3_multimodal"]
"""What goes through the commands: each has something that the others have not."""

LONG = {"max_position_embeddings": 512}
PLACES = {"gpt2": {"n_positions": 512}, "gptj": {"n_positions": 512}}


def make_traces() -> list[Rendered]:
    rng = np.random.default_rng(0)
    segments = [np.array([1] * 5 + [2] * (n - 9) + [3] * 4, np.uint8) for n in (14, 19)]
    return [Rendered(str(i), rng.integers(3, 90, len(s)).astype(np.int32), s, 5, False) for i, s in enumerate(segments)]


def naive_scalars(model: Any, adapter: Adapter, ids: list[int]) -> np.ndarray:
    """a·x of every direction on one sequence, from hooks on the inputs of the modules, in column order."""
    seen: list[Any] = [None] * len(adapter.modules)
    hooks = []
    for number, part in enumerate(adapter.modules):

        def keep(_: nn.Module, args: Any, number: int = number, part: Any = part) -> None:
            seen[number] = (args[0].reshape(-1, part.a_RI.shape[1]) @ part.a_RI.T).numpy()

        hooks.append(model.get_submodule(part.path).register_forward_pre_hook(keep))
    model(input_ids=torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return np.concatenate(seen, axis=1)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_every_linear_map_is_adapted_and_read_as_hooks_read_it(name: str) -> None:
    model = build_model(name)
    adapter = random_adapter(model, patterns=MODULES.get(name, "attn,mlp"))
    assert {part.path for part in adapter.modules} == set(linear_modules(model))
    found = groups(adapter.addresses)
    assert [*found][:-1] == MODULES.get(name, "attn,mlp").split(",")
    assert sum(len(members) for group, members in found.items() if group != "all") == len(found["all"])
    parents = {"attn": ("attn", "attention"), "mlp": ("mlp", "feed_forward", "ffn", "fc1", "fc2")}
    for part in adapter.modules:
        assert any(word in part.path for word in parents[group_of(part.type) or ""])
    traces = make_traces()
    with attach(model, adapter) as attached:
        batch = [trace.ids.tolist() for trace in traces]
        run, (short, long) = attached.trunk(batch), batch
        with fused_reading(attached):
            fast = attached.trunk(batch)
        for row, ids in enumerate(batch):
            wanted = naive_scalars(model, adapter, ids)
            size = np.abs(wanted).max()
            for got in (run, fast):
                np.testing.assert_allclose(got.scalars[row, : len(ids)].numpy(), wanted, atol=1e-4 * size)
        logits = attached.run([long]).logits
        torch.testing.assert_close(attached.head(run.hidden[1:]), logits, atol=2e-3, rtol=1e-3)
        with attached.edit(edits.off()):
            edited = attached.run([short]).logits
    assert torch.equal(edited, model(input_ids=torch.tensor([short]), use_cache=False).logits)


@pytest.mark.parametrize("name", NAMES)
def test_exact_ablation_gates_and_training_equal_the_plain_forms(name: str) -> None:
    model = build_model(name)
    adapter = random_adapter(model, patterns=MODULES.get(name, "attn,mlp"))
    traces = make_traces()
    with attach(model, adapter) as attached:
        targets = [make_targets(adapter.addresses, "direction")[i] for i in (0, len(adapter.addresses) // 2 + 1, -1)]
        sums, _ = leave_out(attached, traces, targets, 0.0, 4096)
        for target in targets:
            for number, trace in enumerate(traces):
                logits = [attached.run([trace.ids.tolist()]).logits]
                with attached.edit(edits.off(target.name)):
                    logits.append(attached.run([trace.ids.tolist()]).logits)
                p, q = (one[0, assistant_positions(trace)].double().log_softmax(-1) for one in logits)
                assert sums[target.by, target.name][number, 0, 0] == pytest.approx(
                    float((p.exp() * (p - q)).sum()), rel=1e-3, abs=1e-6
                )
        ids = torch.from_numpy(np.stack([trace.ids[:14] for trace in traces]))
        slopes: list[torch.Tensor] = []
        for fast in (True, False):
            gates = torch.ones(2, len(adapter.addresses), requires_grad=True)
            with gated(attached, gates) if fast else attached.edit(edits.gate(gates)):
                hidden = text_decoder(model)(input_ids=ids, use_cache=False).last_hidden_state
            weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
            slopes += torch.autograd.grad((hidden * weights).sum(), gates)
        assert (slopes[0] - slopes[1]).norm() <= 1e-3 * slopes[1].norm()
    trained = trainable_adapter(model, TrainConfig(modules=MODULES.get(name, "attn,mlp")), 0, "")
    gradients = []
    for fast in (True, False):
        with attach(model, trained), fused(model, trained) if fast else nullcontext():
            learner = Learner(model, trained)
            learner.zero_grad()
            learner(*batch_tensors(traces, torch.device("cpu"))).backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in learner.adapter_weights]))
    assert gradients[1].abs().max() > 0
    assert (gradients[0] - gradients[1]).norm() <= 1e-4 * gradients[1].norm()


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_generation_in_batches_equals_whole_passes(name: str) -> None:
    tokenizer = byte_tokenizer()
    model = build_model(name, vocab_size=len(tokenizer), **PLACES.get(name, LONG))
    adapter = random_adapter(model, patterns=MODULES.get(name, "attn,mlp"))
    renderer = Renderer(tokenizer, system=None)
    prompts = [renderer.prompt_ids(f"What is, in so many words, {text}?") for text in ("3+4", "17+29 and then 5")]
    with attach(model, adapter) as attached, attached.edit(edits.scale("*", 2.0)):
        found = generate_batch(attached, renderer, prompts, Sampling(max_new_tokens=6))
        for prompt, result in zip(prompts, found, strict=True):
            ids = list(prompt)
            for _ in range(6):
                ids.append(int(attached.run([ids]).logits[0, -1].argmax()))
            assert cut_at_end(ids[len(prompt) :], stop_ids(model, renderer)) == result


@torch.no_grad()
def test_an_adapted_head_sees_the_last_token_of_a_prompt() -> None:
    tokenizer = byte_tokenizer()
    model = build_model("llama", vocab_size=len(tokenizer), **LONG)
    inner = random_adapter(model, patterns="L0.q").modules[0]
    weights = {"lm_head": (torch.ones(1, 32), torch.randn(len(tokenizer), 1), 1.0)}
    adapter = build_adapter(weights | {inner.path: (inner.a_RI, inner.b_OR, inner.scale)}, {})
    renderer = Renderer(tokenizer, system=None)
    prompt = renderer.prompt_ids("3+4?")
    for edit in (edits.off("L0.q"), edits.off("lm_head")):
        with attach(model, adapter) as attached, attached.edit(edit):
            (found,) = generate_batch(attached, renderer, [prompt], Sampling(max_new_tokens=1, min_new_tokens=1))
            assert found.ids == [int(attached.run([prompt]).logits[0, -1].argmax())]


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "phi3", "opt", "llama4", "gemma3_multimodal"])
def test_peft_loads_it_and_gives_the_same_logits(tmp_path: Path, name: str) -> None:
    model = build_model(name)
    adapter = random_adapter(model, rank=2)
    adapter.save(tmp_path)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with attach(model, adapter) as attached:
        ours = attached.run(ids).logits
    theirs: Any = PeftModel.from_pretrained(model, str(tmp_path)).eval()
    assert sum(".lora_A." in key for key in theirs.state_dict()) == len(adapter.modules)  # no vision tower
    assert (theirs(input_ids=ids).logits - ours).abs().max() <= 1e-4 * ours.abs().max().clamp_min(1)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_the_lens_and_neurons_find_their_places(name: str) -> None:
    model = build_model(name)
    adapter = random_adapter(model, patterns=MODULES.get(name, "attn,mlp"))
    table, counts = make_lens(model, adapter, None, [str(i) for i in range(97)], LensConfig(top=5, random=10), 0)
    assert counts["directions_elsewhere"] == 0
    sides = {(row["feature"][:-1], row["side"]) for row in table.to_pylist()}
    assert sides == {(address, side_of(direction_type(address))) for address in adapter.addresses}
    if name in MODULES:
        with pytest.raises(BadInput, match="no down_proj or its like"):
            neuron_probe(model, 10, seed=0)
        return
    probe = neuron_probe(model, 10, seed=0)
    module = model.get_submodule(probe.sites[0].path)
    unit = int(probe.addresses[0].split(".")[1])
    weight_OI = module.weight.T if hasattr(module, "nx") else module.weight
    assert probe.effect_per_scalar[0] == pytest.approx(float(weight_OI[:, unit].norm()))
    with probing(model, [probe]) as read:
        model(input_ids=torch.tensor([[3, 4, 5], [6, 7, 8]]), use_cache=False)
    assert read()[0].shape == (6, 10)


@pytest.mark.parametrize("name", WHOLE)
def test_the_commands(tmp_path: Path, name: str) -> None:
    tokenizer = byte_tokenizer()
    build_model(name, vocab_size=len(tokenizer), **PLACES.get(name, LONG)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    traces = [{"question": f"{i}+{i}?", "thinking": f"{i} twice.", "answer": str(2 * i)} for i in range(8)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(t) + "\n" for t in traces))
    create_study(
        tmp_path / "study",
        NewConfig(str(tmp_path / "model"), str(tmp_path / "t.jsonl"), heldout=2, system=""),
        Options(),
    )
    study = Study.open(tmp_path / "study")
    result = train(study, TrainConfig(max_steps=2, batch=4, warmup=0, learning_rate="1e-2"), Options())
    assert ("not_adapted" in result) == (name in ("qwen2_moe", "llama4"))
    record(study, RecordConfig(source="adapter,base,random,untrained,neurons"), Options())
    store = Store.open(store_folder(study.path, "train", "adapter"))
    assert store.addresses == Adapter.load(study.path / "adapter").addresses
    ablate(study, AblateConfig(by="group", traces=2), Options())
    rows = pq.read_table(study.path / "ablation" / "exact-group.parquet").to_pylist()
    assert {row["target"] for row in rows} == {"attn", "mlp", "all"}
    ablate(study, AblateConfig(method="screen", passes=2, traces=2), Options())
    assert read_lens(study, LensConfig(top=3, random=10), Options())["directions_elsewhere"] == 0


class Routed(nn.Module):
    """An MLP whose second expert sees the tokens with a positive first entry only."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.shared, self.experts = shared, nn.ModuleList([nn.Linear(32, 32)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, 32)
        chosen = (flat[:, 0] > 0).nonzero()[:, 0]
        return self.shared(x) + torch.zeros_like(flat).index_add(0, chosen, self.experts[0](flat[chosen])).view_as(x)


def test_a_module_that_sees_some_tokens_is_refused_by_name() -> None:
    model = tiny_model()
    model.model.layers[1].mlp = Routed(model.model.layers[1].mlp)
    adapter = random_adapter(model, patterns="*")
    ids = [[1, 2, 3, 4, 5, 6, 7, 8]] * 2
    with attach(model, adapter) as attached:
        with pytest.raises(BadInput, match=r"layers\.1\.mlp\.experts\.0 sees \d+ of 16 tokens"):
            attached.trunk(ids)
        with pytest.raises(BadInput, match="routed expert"), gated(attached, torch.ones(2, len(adapter.addresses))):
            model.model(input_ids=torch.tensor(ids))


def test_vision_modules_of_an_adapter_are_left_out_or_refused(tmp_path: Path) -> None:
    model = build_model("gemma3_multimodal")
    text = initial_adapter(model)
    assert text.addresses[:4] == ["L0.q", "L0.k", "L0.v", "L0.o"]
    tower = "model.vision_tower.encoder.layers"
    vision = {f"{tower}.{i}.self_attn.q_proj": (torch.ones(1, 32), torch.ones(32, 1), 1.0) for i in (0, 1)}
    both = {part.path: (part.a_RI, part.b_OR, part.scale) for part in text.modules} | vision
    whole = build_adapter(both, text.config)
    with pytest.raises(BadInput, match=r"2 of the adapter's modules are not in the text decoder"), attach(model, whole):
        pass
    assert whole.text_only().addresses == text.addresses
    assert text.text_only() is text
    with pytest.raises(BadInput, match="only that for images"):
        build_adapter(vision, text.config).text_only()
    save_tiny(tmp_path / "model")  # any: only its tokenizer is looked at
    whole.save(tmp_path / "peft")
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps({"question": f"{i}?", "answer": "1"}) + "\n" for i in range(4))
    )
    config = NewConfig(str(tmp_path / "model"), str(tmp_path / "t.jsonl"), heldout=1, adapter=str(tmp_path / "peft"))
    assert create_study(tmp_path / "study", config, Options())["left_out"].startswith("2 modules")
    assert Adapter.load(tmp_path / "study" / "adapter").addresses == text.addresses


def test_a_group_without_linear_maps_says_what_is_there_instead() -> None:
    model = build_model("mixtral")
    with pytest.raises(BadInput, match=r"'mlp' .*mlp\.experts\.down_proj\); choose others, such as --modules 'attn'"):
        initial_adapter(model)
    assert not_linear(build_model("phi3")) == in_no_group(build_model("phi3")) == []
    hybrid = tiny_model()
    hybrid.model.layers[1].mixer = nn.Sequential(nn.Linear(32, 32))
    assert in_no_group(hybrid) == ["mixer.0"]


def test_names_tell_the_group_or_keep_their_parents() -> None:
    paths = ["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.0.mixer.out_proj", "h.0.attn.out_proj", "h.1.fc1", "h.1.ffn.extra"]
    types = [place[1] for place in locate_modules(paths).values()]
    assert types == ["attn.c_proj", "mlp.c_proj", "mixer.out_proj", "out_proj", "fc1", "ffn.extra"]
    assert [group_of(t) for t in types] == ["attn", "mlp", None, "attn", "mlp", "mlp"]
    assert [side_of(t) for t in types] == ["write", "write", "write", "write", "read", None]
    assert select(["L0.attn.c_proj", "L1.ffn.extra", "fc1"], "mlp").tolist() == [False, True, False]
