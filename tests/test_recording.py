"""Recording: the store holds a·x of every adapted matrix's true input, whatever the batch or the interruption."""

import dataclasses
import errno
import json
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch

from lorascope import recording, store_writer
from lorascope.adapter import Adapter
from lorascope.attached import attach
from lorascope.config import Options
from lorascope.errors import BadInput, MissingStage
from lorascope.fused_reading import fused_reading
from lorascope.layers import layer_count
from lorascope.memory import FEWEST, MOST_ON_CPU
from lorascope.models import load_model
from lorascope.packing import prepare_packing
from lorascope.recording import RecordConfig, record
from lorascope.sinks import is_sink
from lorascope.store import Store, store_folder
from lorascope.study import Study
from lorascope.traces import Rendered, Trace, write_traces
from tiny_folder import byte_tokenizer, save_tiny
from tiny_models import random_adapter, tiny_model

OPTIONS = Options(device="cpu")
TRACES = [
    Trace("a", "What is 2 + 3?", "2 + 3 = 5.", "5"),
    Trace("b", "1 + 1?", "It is 2. Wait, check: 1 + 1 = 2. Yes.", "2"),
    Trace("c", "Say hi.", "", "hi"),
    Trace("d", "And 7 * 6?", "7 * 6 = 42", "The answer is 42."),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def study(tmp_path: Path, base: Path) -> Study:
    made = Study.create(tmp_path / "study", model=str(base), system="Be brief.")
    write_traces(made.corpus_file("train"), TRACES)
    random_adapter(load_model(str(base))[0], rank=2).save(made.path / "adapter")
    return made


def open_store(study: Study, corpus: str = "train", source: str = "adapter") -> Store:
    return Store.open(store_folder(study.path, corpus, source))


def module_inputs(model: Any, adapter: Adapter, ids: list[int]) -> dict[str, torch.Tensor]:
    """What each adapted module is given, [T, I], from plain forward hooks on one sequence alone."""
    seen: dict[str, torch.Tensor] = {}

    def keep(path: str) -> Any:
        def hook(_: Any, args: Any) -> None:
            seen[path] = args[0][0]

        return hook

    handles = [model.get_submodule(m.path).register_forward_pre_hook(keep(m.path)) for m in adapter.modules]
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return seen


def inputs_by_hooks(model: Any, adapter: Adapter, ids: list[int]) -> np.ndarray:
    """a·x of every direction."""
    seen = module_inputs(model, adapter, ids)
    return torch.cat([seen[m.path] @ m.a_RI.T for m in adapter.modules], dim=1).numpy()


@pytest.mark.parametrize("source", ["adapter", "base"])
def test_the_store_holds_the_true_inputs_times_a(study: Study, base: Path, source: str) -> None:
    result = record(study, RecordConfig(source=source, token_budget=300), OPTIONS)
    store = open_store(study, source=source)
    model, tokenizer = load_model(str(base))
    adapter = Adapter.load(study.path / "adapter")
    rendered, _ = study.renderer(tokenizer).render_all(TRACES)
    assert store.trace_ids == ["a", "b", "c", "d"]
    assert store.addresses == adapter.addresses
    np.testing.assert_array_equal(store.effect_per_scalar, adapter.effect_per_scalar)
    assert result["sources"][source]["tokens"] == sum(len(r.ids) for r in rendered) == store.n_tokens
    for i, item in enumerate(rendered):
        where, z = store.trace(i)
        if source == "adapter":
            with attach(model, adapter):
                wanted = inputs_by_hooks(model, adapter, item.ids.tolist())
        else:
            wanted = inputs_by_hooks(model, adapter, item.ids.tolist())
        # Half precision is 2^-11; a merged run is 4e-6 of the largest scalar off one in double precision.
        np.testing.assert_allclose(z, wanted, rtol=2**-10, atol=1e-5 * np.abs(wanted).max())
        np.testing.assert_array_equal(store.tokens[where], item.ids)
        np.testing.assert_array_equal(store.segments[where], item.segments)
        assert store.response_start[i] == item.response_start


def test_both_sources_differ_and_share_their_text(study: Study) -> None:
    record(study, RecordConfig(source="adapter, base"), OPTIONS)
    ours, theirs = open_store(study), open_store(study, source="base")
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    first = ours.addresses.index("L0.q#0")
    last = ours.addresses.index("L2.down#1")
    z, base_z = ours.trace(1)[1], theirs.trace(1)[1]
    np.testing.assert_allclose(z[:, first], base_z[:, first], rtol=1e-3)  # nothing adapted lies before it
    assert np.abs(z[:, last] - base_z[:, last]).max() > 0.01


def test_the_study_says_how_many_layers_the_model_has(study: Study, base: Path) -> None:
    assert layer_count(study) is None
    record(study, RecordConfig(), OPTIONS)
    assert study.manifest["layers"] == layer_count(study) == len(load_model(str(base))[0].model.layers)


def test_batches_do_not_change_the_scalars(study: Study) -> None:
    stored = []
    for budget in (1, 4096):
        record(study, RecordConfig(token_budget=budget), OPTIONS)
        stored.append(np.concatenate([z for _, z in open_store(study).chunks()]))
    np.testing.assert_allclose(stored[0], stored[1], rtol=2**-10, atol=2e-5)


def test_a_recording_is_not_made_twice_and_follows_its_inputs(study: Study) -> None:
    record(study, RecordConfig(), OPTIONS)
    index = study.path / "scalars" / "train" / "adapter" / "index.json"
    before = index.stat().st_mtime_ns
    record(study, RecordConfig(), OPTIONS)
    assert index.stat().st_mtime_ns == before
    write_traces(study.corpus_file("train"), TRACES[:2])
    record(study, RecordConfig(), OPTIONS)
    assert open_store(study).trace_ids == ["a", "b"]


def test_a_recording_begun_with_other_memory_continues_with_its_batches(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Free memory chooses the batches, but not anew in the middle of a recording."""
    monkeypatch.setattr(recording, "SHARD_TOKENS", 100)
    folder = store_folder(study.path, "train", "adapter")

    def budget(free: int) -> int:
        monkeypatch.setattr("lorascope.memory.free_memory", lambda _: free)
        record(study, RecordConfig(), OPTIONS)
        return int(open_store(study).index["about"]["token_budget"])

    assert budget(1 << 40) == MOST_ON_CPU
    shards = {p.name: p.stat().st_mtime_ns for p in folder.glob("shard-*")}
    (folder / "index.json").unlink()
    (folder / "shard-00001.safetensors").unlink()
    assert budget(1) == MOST_ON_CPU
    kept = [name for name, time in shards.items() if (folder / name).stat().st_mtime_ns == time]
    assert len(kept) == len(shards) - 1
    for path in [folder / "index.json", *folder.glob("shard-*")]:  # nothing is done: memory may have been lacking
        path.unlink()
    assert budget(1) == FEWEST
    write_traces(study.corpus_file("train"), TRACES[:2])  # finished, and of other text
    assert budget(1 << 40) == MOST_ON_CPU


def test_shards_do_not_grow_with_the_corpus() -> None:
    """What is in memory, and what an interrupt loses, is a shard: 36 million tokens have more of them, not larger."""
    item = Rendered("t", np.zeros(30_000, np.int32), np.ones(30_000, np.uint8), 1)
    plan = recording.plan_recording(random_adapter(tiny_model()), [item] * 1200, 4096, {})
    tokens = [sum(plan.lengths[i] for batch in shard for i in batch) for shard in plan.shards]
    assert tokens == [60_000] * 600


def test_an_interrupt_while_a_shard_is_written_loses_nothing(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "SHARD_TOKENS", 100)
    config, folder = RecordConfig(token_budget=100), store_folder(study.path, "train", "adapter")
    record(study, config, OPTIONS)
    wanted = {p.name: p.read_bytes() for p in folder.iterdir()}
    for path in folder.iterdir():
        path.unlink()
    real_write, real_read, writing, interrupted = store_writer.write_tensors, recording.read_batch, Event(), Event()

    def slow_write(path: Path, tensors: Any) -> None:
        writing.set()
        assert interrupted.wait(30)
        real_write(path, tensors)

    def read(*args: Any) -> Any:
        if writing.wait(0.2):
            interrupted.set()
            raise KeyboardInterrupt
        return real_read(*args)

    with monkeypatch.context() as patch:
        patch.setattr(store_writer, "write_tensors", slow_write)
        patch.setattr(recording, "read_batch", read)
        with pytest.raises(KeyboardInterrupt):
            record(study, config, OPTIONS)
    assert (folder / "shard-00000.safetensors").read_bytes() == wanted["shard-00000.safetensors"]
    record(study, config, OPTIONS)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == wanted


def test_a_shard_that_cannot_be_written_stops_the_recording(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "SHARD_TOKENS", 100)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_writer, "write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        record(study, RecordConfig(token_budget=100), OPTIONS)


def test_a_recording_cut_off_continues_to_the_same_bytes(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "SHARD_TOKENS", 100)
    folder = store_folder(study.path, "train", "adapter")

    def contents() -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in folder.iterdir()}

    config = RecordConfig(token_budget=100)
    record(study, config, OPTIONS)
    wanted = contents()
    assert len([name for name in wanted if name.startswith("shard")]) == 4
    real_write, real_read = store_writer.write_tensors, recording.read_batch
    for limit in range(4):
        for path in folder.iterdir():
            path.unlink()
        ran: list[int] = []

        def write(path: Path, tensors: Any, limit: int = limit, ran: list[int] = ran) -> None:
            if len(ran) == limit:
                raise KeyboardInterrupt
            ran.append(1)
            real_write(path, tensors)

        monkeypatch.setattr(store_writer, "write_tensors", write)
        with pytest.raises(KeyboardInterrupt):
            record(study, config, OPTIONS)
        with pytest.raises(MissingStage, match="cut off"):
            open_store(study)
        monkeypatch.setattr(store_writer, "write_tensors", real_write)
        batches: list[int] = []

        def read(*args: Any, batches: list[int] = batches) -> Any:
            batches.append(1)
            return real_read(*args)

        monkeypatch.setattr(recording, "read_batch", read)
        record(study, config, OPTIONS)
        monkeypatch.setattr(recording, "read_batch", real_read)
        assert len(batches) == 4 - limit  # finished shards are not computed again
        assert contents() == wanted


def test_a_mistaken_recording_cut_off_leaves_the_old_store(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--limit` by mistake, then Ctrl-C: hours of work stay; begun again it continues, and then takes their place."""
    monkeypatch.setattr(recording, "SHARD_TOKENS", 100)
    monkeypatch.setattr("lorascope.memory.free_memory", lambda _: 1 << 40)
    record(study, RecordConfig(), OPTIONS)
    folder = store_folder(study.path, "train", "adapter")
    old = {p.name: p.read_bytes() for p in folder.iterdir()}
    real, batches = recording.read_batch, []

    def read(*args: Any) -> Any:
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(1)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(recording, "read_batch", read)
        with pytest.raises(KeyboardInterrupt):
            record(study, RecordConfig(limit=3), OPTIONS)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == old
    assert open_store(study).n_traces == 4
    record(study, RecordConfig(), OPTIONS)  # the old one is as good as it was
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == old
    monkeypatch.setattr("lorascope.memory.free_memory", lambda _: 1)  # continues with its batches all the same
    monkeypatch.setattr(recording, "read_batch", lambda *args: (batches.append(1), real(*args))[1])
    record(study, RecordConfig(limit=3), OPTIONS)
    assert len(batches) == 3
    assert open_store(study).trace_ids == ["a", "b", "c"]
    assert open_store(study).index["about"]["token_budget"] == MOST_ON_CPU
    assert [p.name for p in folder.parent.iterdir()] == ["adapter"]
    assert (folder / "output_rms.json").is_file()


def test_only_the_traces_that_are_recorded_are_read(study: Study) -> None:
    """The text of a corpus is never held: traces are read, rendered and dropped one by one."""
    file = study.corpus_file("train")
    file.write_text(file.read_text() + "not a trace\n")
    record(study, RecordConfig(limit=3), OPTIONS)
    assert open_store(study).trace_ids == ["a", "b", "c"]
    with pytest.raises(BadInput, match="line 5"):
        record(study, RecordConfig(), OPTIONS)


def test_a_cut_trace_holds_no_more_than_what_is_kept(study: Study) -> None:
    cut = dataclasses.replace(study.renderer(byte_tokenizer()), max_tokens=20).render(TRACES[1])
    assert cut.truncated > 0
    assert cut.ids.base is None
    assert cut.segments.base is None


def test_a_new_corpus_is_kept_under_its_name(study: Study, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"question": "Why?", "thinking": "Because.", "answer": "So."}\n' * 3)
    result = record(study, RecordConfig(corpus="mine", traces=str(file), limit=2), OPTIONS)
    assert result["sources"]["adapter"]["traces"] == 2
    assert study.manifest["corpora"]["mine"]["traces"] == 2
    assert len(study.traces("mine")) == 2
    assert open_store(study, "mine").n_traces == 2
    assert study.summary["recording"]["mine"]["adapter"]["traces"] == 2
    with pytest.raises(BadInput, match="another --corpus"):
        record(study, RecordConfig(corpus="train", traces=str(file)), OPTIONS)


def test_plain_text_is_split_by_the_response_template(study: Study, tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps({"text": "Q: Why? A:<think>Because.</think>So."}) + "\n")
    with pytest.raises(BadInput, match="--response-template"):
        record(study, RecordConfig(corpus="mine", traces=str(file)), OPTIONS)
    record(study, RecordConfig(corpus="mine", traces=str(file), response_template="A:"), OPTIONS)
    (trace,) = study.traces("mine")
    assert (trace.raw_prompt, trace.thinking, trace.answer) == ("Q: Why? A:", "Because.", "So.")
    finished = study.manifest["stages"]["record:mine:adapter"]["finished"]
    record(study, RecordConfig(corpus="mine"), OPTIONS)  # the same recording, however its traces came in
    assert study.manifest["stages"]["record:mine:adapter"]["finished"] == finished
    with pytest.raises(BadInput, match="goes with --traces"):
        record(study, RecordConfig(corpus="mine", response_template="A:"), OPTIONS)


def test_long_traces_are_truncated_or_dropped_and_counted(study: Study) -> None:
    longest = len(study.renderer(byte_tokenizer()).render(TRACES[1]).ids)
    counts = record(study, RecordConfig(max_tokens=longest - 1), OPTIONS)["sources"]["adapter"]
    assert (counts["length_rule"]["truncated"], counts["length_rule"]["truncated_tokens"]) == (1, 1)
    assert open_store(study).n_traces == 4
    config = RecordConfig(max_tokens=longest - 1, too_long="drop")
    counts = record(study, config, OPTIONS)["sources"]["adapter"]
    assert counts["length_rule"]["dropped"] == 1
    assert open_store(study).trace_ids == ["a", "c", "d"]
    with pytest.raises(BadInput, match="raise --max-tokens"):
        record(study, RecordConfig(max_tokens=5, too_long="drop"), OPTIONS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "adapter,nothing"}, "no source 'nothing'"),
        ({"corpus": "other"}, "no corpus 'other'"),
        ({"token_budget": 0}, "at least 1"),
        ({"limit": 0}, "at least 1"),
    ],
)
def test_bad_input_is_one_sentence(study: Study, change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        record(study, dataclasses.replace(RecordConfig(), **change), OPTIONS)


def test_without_an_adapter_the_command_is_named(tmp_path: Path, base: Path) -> None:
    with pytest.raises(MissingStage, match="lorascope train"):
        record(Study.create(tmp_path / "s", model=str(base), system=None), RecordConfig(), OPTIONS)


def test_sinks_are_tokens_far_above_their_traces_median() -> None:
    norms = np.float32([1600, 10, 11, 9, 12, 99, 10, 101])
    np.testing.assert_array_equal(np.flatnonzero(is_sink(norms)), [0])  # the median is 11: 101 is below 110
    np.testing.assert_array_equal(is_sink(np.float32([5.0])), [False])


@pytest.mark.parametrize("read", [recording.adapter_scalars, recording.base_scalars])
def test_traces_laid_end_to_end_give_what_each_gives_alone(study: Study, base: Path, read: recording.Read) -> None:
    model, tokenizer = load_model(str(base))
    rendered, _ = study.renderer(tokenizer).render_all(TRACES)
    with attach(model, Adapter.load(study.path / "adapter")) as attached, fused_reading(attached):
        alone = [recording.read_batch(attached, [item], read)[0] for item in rendered]
        assert prepare_packing(model, max(len(item.ids) for item in rendered))
        together = recording.read_batch(attached, rendered, read, pack=True)
    assert len({len(z_TN) for z_TN, _ in together}) > 1
    for (wanted, sinks), (found, found_sinks) in zip(alone, together, strict=True):
        assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
        np.testing.assert_array_equal(found_sinks, sinks)


@pytest.mark.parametrize("kind", ["mistral", "llama"])
def test_a_recording_packs_where_the_model_allows_it(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mistral's window is shorter than the traces here; then it pads."""
    folder = save_tiny(tmp_path / "model", kind, **({"sliding_window": 8} if kind == "mistral" else {}))
    study = Study.create(tmp_path / "study", model=str(folder), system=None)
    write_traces(study.corpus_file("train"), TRACES)
    random_adapter(load_model(str(folder))[0]).save(study.path / "adapter")
    real, packed = recording.read_batch, []

    def read(*args: Any) -> Any:
        packed.append(args[3])
        return real(*args)

    monkeypatch.setattr(recording, "read_batch", read)
    record(study, RecordConfig(), OPTIONS)
    assert packed == [kind == "llama"]


def test_sinks_are_found_in_padded_batches_by_trace(study: Study, base: Path) -> None:
    """A token whose embedding is made 1,000 times longer is a sink wherever it stands."""
    model, tokenizer = load_model(str(base))
    wait = tokenizer.convert_tokens_to_ids("W")
    with torch.no_grad():
        model.get_input_embeddings().weight[wait] *= 1000
    rendered, _ = study.renderer(tokenizer).render_all(TRACES)
    with attach(model, Adapter.load(study.path / "adapter")) as attached:
        parts = recording.read_batch(attached, rendered, recording.adapter_scalars)
    assert sum(int(sink.sum()) for _, sink in parts) == 2  # "What" in a, "Wait" in b
    for item, (_, sink) in zip(rendered, parts, strict=True):
        np.testing.assert_array_equal(sink, item.ids == wait)


def test_the_bases_own_outputs_are_measured_for_comparison(tmp_path: Path) -> None:
    """‖W·x‖ without the bias, which no adapter touches."""
    folder = save_tiny(tmp_path / "model", "qwen2")
    model, tokenizer = load_model(str(folder))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.fill_(3.0)
    model.save_pretrained(folder)
    study = Study.create(tmp_path / "study", model=str(folder), system=None)
    write_traces(study.corpus_file("train"), TRACES)
    adapter = random_adapter(model, rank=2)
    adapter.save(study.path / "adapter")
    record(study, RecordConfig(), OPTIONS)
    found = json.loads((open_store(study).folder / "output_rms.json").read_text())
    store = open_store(study)
    squares, tokens = dict.fromkeys(adapter.addresses, 0.0), int(store.ordinary.sum())
    for trace in study.traces("train"):
        ids = study.renderer(tokenizer).render(trace).ids.tolist()
        kept = store.ordinary[slice(*store.offsets[store.trace_ids.index(trace.id) :][:2])]
        with attach(model, adapter):
            inputs = module_inputs(model, adapter, ids)
        for module in adapter.modules:
            linear = model.get_submodule(module.path)
            output = torch.nn.functional.linear(inputs[module.path], linear.weight)[kept]
            for address in adapter.addresses[module.columns]:
                squares[address] += float(output.detach().pow(2).sum())
    assert found["address"] == adapter.addresses
    assert found["tokens"] == tokens
    np.testing.assert_allclose(found["rms"], [(squares[a] / tokens) ** 0.5 for a in adapter.addresses], rtol=1e-3)
