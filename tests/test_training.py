"""Training: gradients equal plain autograd's, a run resumes to the same weights, batches and rates are as planned."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from lorascope import training, training_plan, training_state
from lorascope.adapter import Adapter
from lorascope.attached import attach
from lorascope.config import Options
from lorascope.creation import NewConfig, create_study
from lorascope.errors import BadInput
from lorascope.models import load_model
from lorascope.study import Study
from lorascope.traces import Rendered, write_traces
from lorascope.training import Learner, Run, TrainConfig, train
from lorascope.training_plan import batch_tensors, plan_packs
from lorascope.training_state import State
from tiny_folder import save_tiny

FAST: dict[str, Any] = {"epochs": 2.0, "batch": 4, "eval_every": 4, "save_every": 3, "eval_traces": 4}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


def make_study(folder: Path, model: Path) -> Study:
    traces = [{"question": f"{i}+{i}?", "thinking": f"{i} twice.", "answer": str(2 * i)} for i in range(24)]
    (folder / "t.jsonl").write_text("".join(json.dumps(t) + "\n" for t in traces))
    config = NewConfig(str(model), str(folder / "t.jsonl"), heldout=4, system="")
    create_study(folder / "study", config, Options())
    return Study.open(folder / "study")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    adapter = Adapter.load(folder)
    return {f"{m.path}.{side}": t for m in adapter.modules for side, t in (("a", m.a_RI), ("b", m.b_OR))}


def test_loss_and_gradients_equal_plain_autograd(tmp_path: Path, model_folder: Path) -> None:
    study = make_study(tmp_path, model_folder)
    model, tokenizer = load_model(str(model_folder))
    traces, _ = study.renderer(tokenizer).render_all(study.traces("train")[:5])
    adapter = training.trainable_adapter(model, TrainConfig(), 0, "")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in adapter.modules:
            module.b_OR.copy_(torch.randn(module.b_OR.shape, generator=generator) * 0.05)
    with attach(model, adapter) as attached:
        loss = Learner(model, adapter)(*batch_tensors(traces, torch.device("cpu")))
        loss.backward()
        ours = [m.a_RI.grad.clone() for m in adapter.modules] + [m.b_OR.grad.clone() for m in adapter.modules]
        for module in adapter.modules:
            module.a_RI.grad = module.b_OR.grad = None
        plain = torch.zeros(())
        for trace in traces:  # one by one, whole logits, the assistant's tokens alone
            ids = torch.from_numpy(trace.ids.astype(np.int64))
            logits = attached.run(ids[None]).logits[0]
            plain = plain + F.cross_entropy(
                logits[trace.response_start - 1 : -1], ids[trace.response_start :], reduction="sum"
            )
        plain.backward()
        theirs = [m.a_RI.grad for m in adapter.modules] + [m.b_OR.grad for m in adapter.modules]
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        assert one.abs().max() > 0


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_packed_run_reaches_what_a_padded_one_does(
    tmp_path: Path, model_folder: Path, full: bool, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, sizes = [], []

    def packs(lengths: Any, budget: int) -> Any:
        found = plan_packs(lengths, budget)
        sizes.extend(map(len, found))
        return found

    monkeypatch.setattr(training_plan, "plan_packs", packs)
    rates = {"learning_rate": "1e-3" if full else "1e-2", "full": full, "gradient_checkpointing": checkpointing}
    for pack in (False, True):
        (tmp_path / str(pack)).mkdir()
        study = make_study(tmp_path / str(pack), model_folder)
        config = TrainConfig(pack=pack, token_budget=200, **FAST | rates | {"max_steps": 3})
        losses.append(train(study, config, Options())["heldout_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert max(sizes) > 1


def test_compiling_without_a_compiler_is_refused(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(tmp_path, model_folder)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BadInput, match="needs a C\\+\\+ compiler"):
        train(study, TrainConfig(compile=True), Options())


def test_a_compiled_run_gives_the_same_weights(tmp_path: Path, model_folder: Path) -> None:
    found = []
    for compiled in (False, True):
        (tmp_path / str(compiled)).mkdir()
        study = make_study(tmp_path / str(compiled), model_folder)
        train(study, TrainConfig(learning_rate="1e-2", compile=compiled, **FAST | {"max_steps": 2}), Options())
        found.append(weights_of(study.path / "adapter"))
    for name, plain in found[0].items():
        torch.testing.assert_close(found[1][name], plain, rtol=1e-3, atol=1e-5)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0


def test_gradients_in_half_precision_do_not_fade_with_the_length_of_a_step(model_folder: Path) -> None:
    """A mean over 16 long traces has slopes below what fp16 holds, so the sum is what goes backwards."""
    model, tokenizer = load_model(str(model_folder), dtype="float16")
    adapter = training.trainable_adapter(model, TrainConfig(), 0, "")
    with torch.no_grad():
        for module in adapter.modules:
            module.b_OR.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
    ids = [tokenizer(f"{i} + {i} is {2 * i}.")["input_ids"] for i in range(4)]
    traces = [Rendered(str(i), np.array(x, np.int32), np.full(len(x), 2, np.uint8), 1, 0) for i, x in enumerate(ids)]
    parameters = [t for m in adapter.modules for t in (m.a_RI, m.b_OR)]
    found = []
    for repeats in (1, 4000):  # what a step of so many more tokens would divide by
        run = Run(TrainConfig(max_grad_norm=1e9), 0.0, traces, [], [[0, 1, 2, 3]], adapter, Path(), pack=False)
        with attach(model, adapter), pytest.MonkeyPatch.context() as patch:
            count = training.assistant_positions
            patch.setattr(training, "assistant_positions", lambda t, n=repeats, count=count: list(count(t)) * n)
            optimizer = torch.optim.SGD(parameters, lr=0.0)
            optimizer.zero_grad = lambda *_, **__: None  # type: ignore[method-assign]
            run.step(Learner(model, adapter), optimizer, parameters, [0, 1, 2, 3])
        found.append([p.grad * repeats for p in parameters if p.grad is not None])
        for p in parameters:
            p.grad = None
    for whole, scaled in zip(*found, strict=True):
        torch.testing.assert_close(scaled, whole, rtol=1e-4, atol=1e-6)


def test_several_processes_are_refused(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study(tmp_path, model_folder)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="trains in one process"):
        train(study, TrainConfig(), Options())


def test_nothing_to_measure_the_loss_on_is_refused(tmp_path: Path, model_folder: Path) -> None:
    study = make_study(tmp_path, model_folder)
    with pytest.raises(BadInput, match="--eval-traces must be at least 1"):
        train(study, TrainConfig(eval_traces=0), Options())
    study.corpus_file("heldout").write_text("")
    with pytest.raises(BadInput, match="no held-out trace"):
        train(study, TrainConfig(), Options())


def test_an_interrupted_run_resumes_to_the_same_weights(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(learning_rate="1e-2", checkpoints="2", **FAST)
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = make_study(tmp_path / "whole", model_folder)
    result = train(whole, config, Options())
    assert result["heldout_loss"] < result["heldout_loss_before"]
    cut = make_study(tmp_path / "cut", model_folder)
    cut_training(cut, config, Options(), monkeypatch)
    assert not (cut.path / "adapter").exists()
    train(cut, config, Options())
    ours, theirs = weights_of(cut.path / "adapter"), weights_of(whole.path / "adapter")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    steps = [json.loads(line)["step"] for line in (cut.path / "train" / "adapter.jsonl").read_text().splitlines()]
    assert steps == list(range(11))
    assert (cut.path / "train" / "adapter-steps" / "2" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("full", [False, True])
def test_recomputed_activations_change_nothing(
    tmp_path: Path, model_folder: Path, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(learning_rate="1e-3", full=full, **FAST | {"max_steps": 2})
    forward, calls = LlamaAttention.forward, []

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", counted)
    losses, counts = [], []
    for checkpointing in (False, True):
        (tmp_path / str(checkpointing)).mkdir()
        study = make_study(tmp_path / str(checkpointing), model_folder)
        calls.clear()
        losses.append(train(study, replace(config, gradient_checkpointing=checkpointing), Options())["heldout_loss"])
        counts.append(len(calls))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert counts[1] > counts[0]


def cut_training(
    study: Study, config: TrainConfig, options: Options, monkeypatch: pytest.MonkeyPatch, at: int = 8
) -> None:
    """Run until the interruption before step 8 (of all that are taken); the state of step 6 is kept."""
    real, count = training.Run.step, [0]

    def interrupted(self: Any, *args: Any) -> dict[str, Any]:
        count[0] += 1
        if count[0] == at:
            raise KeyboardInterrupt
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(study, config, options)


def steps_taken(study: Study, config: TrainConfig, options: Options, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many steps a run takes to its end."""
    real, count = training.Run.step, [0]

    def counted(self: Any, *args: Any) -> dict[str, Any]:
        count[0] += 1
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "step", counted)
        train(study, config, options)
    return count[0]


@pytest.mark.parametrize("change", ["nothing", "dtype", "heldout", "tokenizer"])
def test_a_run_continues_only_where_nothing_changed(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    study = make_study(tmp_path, model_folder)
    config, options = TrainConfig(learning_rate="1e-2", **FAST), Options(dtype="float32")
    cut_training(study, config, options, monkeypatch)
    if change == "dtype":
        options = Options(dtype="bfloat16")
    elif change == "heldout":
        write_traces(study.corpus_file("heldout"), study.traces("heldout")[:2])
    elif change == "tokenizer":
        (study.path / "tokenizer" / "added.json").write_text("{}")
    assert steps_taken(study, config, options, monkeypatch) == (4 if change == "nothing" else 10)


def test_a_state_is_never_continued_with_the_weights_of_another_run(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run dies after its weights are written and before the number of their step."""
    config, options = TrainConfig(learning_rate="1e-2", **FAST), Options()
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole, cut = make_study(tmp_path / "whole", model_folder), make_study(tmp_path / "cut", model_folder)
    train(whole, config, options)
    cut_training(cut, config, options, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(training_state, "write_json", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(cut, replace(config, weight_decay=0.3, save_every=6), options)
    train(cut, config, options)
    ours, theirs = weights_of(cut.path / "adapter"), weights_of(whole.path / "adapter")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    logs = [[json.loads(line) for line in metrics_lines(study)] for study in (cut, whole)]
    assert [[row["step"], row.get("loss")] for row in logs[0]] == [[row["step"], row.get("loss")] for row in logs[1]]


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def metrics_lines(study: Study) -> list[str]:
    return (study.path / "train" / "adapter.jsonl").read_text().splitlines()


def test_weights_of_a_state_are_whole_and_named_by_their_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    for key, step in (("a" * 64, 3), ("b" * 64, 3), ("b" * 64, 4)):
        State(tmp_path, key, step).save(optimizer, [weight])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b" * 16 + "-4.safetensors", "state.json"]
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def half(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(training_state, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        State(tmp_path, "b" * 64, 4).save(optimizer, [weight])
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_a_loaded_state_counts_its_steps_where_the_parameter_is(tmp_path: Path) -> None:
    """A fused AdamW on a GPU wants them there; the meta device stands for it."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], fused=True)
    weight.sum().backward()
    optimizer.step()
    State(tmp_path, "key", 1).save(optimizer, [weight])
    elsewhere = torch.nn.Parameter(torch.ones(3, device="meta"))
    again = torch.optim.AdamW([elsewhere])
    state = State(tmp_path, "key")
    state.load(again, [elsewhere])
    assert state.step == 1
    assert {tensor.device.type for tensor in again.state[elsewhere].values()} == {"meta"}


def test_of_several_rates_those_that_ended_are_not_trained_again(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(learning_rate="1e-3,1e-2", **FAST)
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole, cut = make_study(tmp_path / "whole", model_folder), make_study(tmp_path / "cut", model_folder)
    wanted = train(whole, config, Options())
    cut_training(cut, config, Options(), monkeypatch, at=18)  # the first rate takes ten steps
    assert steps_taken(cut, config, Options(), monkeypatch) == 4
    got = cut.manifest["stages"]["train:adapter"]["result"]
    timed = {"train_seconds"}
    assert {k: v for k, v in got.items() if k not in timed} == {k: v for k, v in wanted.items() if k not in timed}
    ours, theirs = weights_of(cut.path / "adapter"), weights_of(whole.path / "adapter")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert not [p for p in cut.path.rglob("*") if p.name.startswith((".state", "adapter-lr")) and p.is_dir()]


@pytest.mark.parametrize("change", ["rate", "data"])
def test_a_rate_that_ended_is_trained_again_after_a_change(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    study = make_study(tmp_path, model_folder)
    config = TrainConfig(learning_rate="1e-3,1e-2", **FAST)
    cut_training(study, config, Options(), monkeypatch, at=18)
    if change == "data":
        write_traces(study.corpus_file("heldout"), study.traces("heldout")[:2])
    else:
        config = replace(config, weight_decay=0.3)
    assert steps_taken(study, config, Options(), monkeypatch) == 20


def test_a_torn_last_line_of_the_metrics_is_dropped(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(tmp_path, model_folder)
    config = TrainConfig(learning_rate="1e-2", **FAST)
    cut_training(study, config, Options(), monkeypatch)
    log = study.path / "train" / "adapter.jsonl"
    with log.open("a") as file:
        file.write('{"step": 8, "lo')
    train(study, config, Options())
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(11))


@pytest.mark.parametrize("full", [False, True])
def test_a_retraining_cut_off_while_saving_leaves_the_old_weights(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    study = make_study(tmp_path, model_folder)
    config = TrainConfig(full=full, learning_rate="1e-3", **(FAST | {"epochs": 0.5}))
    train(study, config, Options())
    folder = study.path / training.run_name(config)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    target = LlamaForCausalLM if full else Adapter
    name = "save_pretrained" if full else "save"
    real = getattr(target, name)

    def save_and_die(self: Any, where: Path, **more: Any) -> None:
        real(self, where, **more)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(target, name, save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train(study, replace(config, learning_rate="1e-2"), Options())
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    train(study, replace(config, learning_rate="1e-2"), Options())
    assert {p.name: p.read_bytes() for p in folder.iterdir()} != before
    assert not [p for p in study.path.iterdir() if p.name.endswith((".tmp", ".old"))]


def test_the_full_finetune_lowers_the_loss_and_loads(tmp_path: Path, model_folder: Path) -> None:
    study = make_study(tmp_path, model_folder)
    result = train(study, TrainConfig(full=True, learning_rate="1e-3,1e-5", **FAST), Options())
    assert result["learning_rate"] == 1e-3
    assert {row["learning_rate"] for row in result["tried"]} == {1e-3, 1e-5}
    assert result["heldout_loss"] < result["heldout_loss_before"]
    model, _ = load_model(str(study.path / "full"))
    base, _ = load_model(str(model_folder))
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True))
    assert sorted(p.name for p in study.path.glob("full*")) == ["full"]


def test_subsets_and_ranks_train_only_what_was_asked_for(tmp_path: Path, model_folder: Path) -> None:
    study = make_study(tmp_path, model_folder)
    train(study, TrainConfig(rank=2, modules="mlp", layers="0-2:2", max_steps=2, **FAST), Options())
    adapter = Adapter.load(study.path / "adapter")
    assert adapter.addresses[:2] == ["L0.gate#0", "L0.gate#1"]
    assert {m.layer for m in adapter.modules} == {0, 2}
    assert {m.type for m in adapter.modules} == {"gate", "up", "down"}
    assert adapter.modules[0].scale == pytest.approx(16 / math.sqrt(2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"control": "none"}, "answers or shuffled"),
        ({"learning_rate": "fast"}, "must be a number"),
        ({"learning_rate": "2"}, "between 0 and 1"),
        ({"rank": 0}, "--rank"),
        ({"modules": "conv"}, "matches no direction"),
        ({"layers": "9"}, "there is no layer 9"),
        ({"checkpoints": "a"}, "comma list of steps"),
        ({"checkpoints": "2", "full": True}, "of an adapter"),
    ],
)
def test_bad_options_are_one_sentence(tmp_path: Path, model_folder: Path, change: dict[str, Any], words: str) -> None:
    study = make_study(tmp_path, model_folder)
    with pytest.raises(BadInput, match=words):
        train(study, TrainConfig(max_steps=1, **(FAST | change)), Options())
    assert not (study.path / "adapter").exists()
    assert not (study.path / "full").exists()
