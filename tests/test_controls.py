"""Controls: what is stored is the true input of the adapted model's run times the vector, in every source."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorascope import controls, recording, store_writer
from lorascope.adapter import Adapter, initial_adapter
from lorascope.attached import attach
from lorascope.config import Options
from lorascope.controls import adapter_probe, inputs_at, neuron_probe, probing, spread_sample
from lorascope.errors import BadInput, MissingStage
from lorascope.features import load_features
from lorascope.models import load_model
from lorascope.recording import RecordConfig, record
from lorascope.store import Store, store_folder
from lorascope.study import Study, write_json
from lorascope.traces import Trace, write_traces
from tiny_folder import save_tiny
from tiny_models import random_adapter, tiny_model

OPTIONS = Options(device="cpu", seed=3)
TRACES = [
    Trace("a", "What is 2 + 3?", "2 + 3 = 5.", "5"),
    Trace("b", "1 + 1?", "It is 2. Wait, check: 1 + 1 = 2. Yes.", "2"),
    Trace("c", "Say hi.", "", "hi"),
    Trace("d", "And 7 * 6?", "7 * 6 = 42", "The answer is 42."),
]
ALL = "adapter,random,untrained,neurons"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


def make_study(path: Path, base: Path, rank: int = 1) -> Study:
    """A study whose adapter is said to have begun as `initial_adapter(seed=5)`."""
    made = Study.create(path, model=str(base), system="Be brief.")
    write_traces(made.corpus_file("train"), TRACES)
    write_traces(made.corpus_file("heldout"), TRACES[:2])
    random_adapter(load_model(str(base))[0], rank=rank).save(made.path / "adapter")
    config = {"modules": "attn,mlp", "layers": "*", "rank": rank, "alpha": 16.0}
    record = {"config": config, "options": {"seed": 5}, "inputs": {}, "outputs": ["adapter"]}
    record |= {"seconds": 0, "peak_rss": 0, "finished": ""}
    made.update_manifest(stages={"train:adapter": record})
    return made


@pytest.fixture
def study(tmp_path: Path, base: Path) -> Study:
    return make_study(tmp_path / "study", base)


def test_modules_that_share_an_input_are_read_in_one_product_in_half_precision_too() -> None:
    model = tiny_model().to(torch.bfloat16)
    adapter = random_adapter(model)
    products: list[Any] = []

    class Counted(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function in (torch.Tensor.matmul, torch.Tensor.__matmul__):
                products.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    probe = adapter_probe(adapter, model, adapter.addresses)
    reads: list[Any] = [site.read for site in probe.sites]
    groups = {id(read.keywords["shared"]): read.keywords["shared"] for read in reads}
    for group in groups.values():
        group.a_GI = group.a_GI.as_subclass(Counted)
    with probing(model, [probe]), torch.no_grad():
        model(input_ids=torch.arange(6)[None])
    assert len(groups) < len(probe.sites)
    assert len(products) == len(groups)


def open_store(study: Study, source: str, corpus: str = "train") -> Store:
    return Store.open(store_folder(study.path, corpus, source))


def hooked_inputs(study: Study, base: Path, dtype: str = "float32") -> list[dict[str, np.ndarray]]:
    """Each trace's true input [T, I] of every linear map in the adapted model, by plain hooks, on its own."""
    model, tokenizer = load_model(str(base), dtype=dtype)
    adapter = Adapter.load(study.path / "adapter")
    rendered, _ = study.renderer(tokenizer).render_all(TRACES)
    found: list[dict[str, np.ndarray]] = []
    with attach(model, adapter):
        for one in rendered:
            seen: dict[str, np.ndarray] = {}
            handles = [
                model.get_submodule(part.path).register_forward_pre_hook(
                    lambda _, args, path=part.path, seen=seen: seen.__setitem__(path, args[0][0].float().numpy().copy())
                )
                for part in adapter.modules
            ]
            with torch.no_grad():
                model(input_ids=torch.tensor([one.ids.tolist()]))
            for handle in handles:
                handle.remove()
            found.append(seen)
    return found


def close(stored: Any, wanted: Any) -> None:
    """Half precision is 2^-11; recording runs merged, which moves a neuron by some 5e-5 of its largest value."""
    np.testing.assert_allclose(stored, wanted, rtol=2**-10, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("rank", [1, 2])
def test_every_source_holds_the_true_inputs_times_its_vectors(tmp_path: Path, base: Path, rank: int) -> None:
    study = make_study(tmp_path / "study", base, rank)
    record(study, RecordConfig(source=ALL, token_budget=300), OPTIONS)
    adapter = Adapter.load(study.path / "adapter")
    model, _ = load_model(str(base))
    inputs = hooked_inputs(study, base)
    for source in ("random", "untrained"):
        control = Adapter.load(study.path / "controls" / source)
        store = open_store(study, source)
        np.testing.assert_array_equal(store.effect_per_scalar, control.effect_per_scalar)
        for i, seen in enumerate(inputs):
            close(store.trace(i)[1], np.concatenate([seen[m.path] @ m.a_RI.numpy().T for m in control.modules], axis=1))
    assert open_store(study, "untrained").addresses == adapter.addresses
    names = open_store(study, "random").addresses
    assert [name for name in names if not name.endswith("#difference")] == adapter.addresses
    assert len(set(names)) == len(names) == 2 * len(adapter.addresses)
    neurons = open_store(study, "neurons")
    assert len(neurons.addresses) == len(adapter.addresses)
    for column, address in enumerate(neurons.addresses):
        layer, unit = int(address[1:].split(".")[0]), int(address.split(".")[1])
        path = f"model.layers.{layer}.mlp.down_proj"
        for i, seen in enumerate(inputs):
            close(neurons.trace(i)[1][:, column], seen[path][:, unit])
        length = float(model.get_submodule(path).weight.detach()[:, unit].norm())
        assert neurons.effect_per_scalar[column] == pytest.approx(length, rel=1e-5)


def test_low_precision_bases_are_read_in_fp32(study: Study, base: Path) -> None:
    record(study, RecordConfig(source=ALL, token_budget=1), Options(device="cpu", dtype="bfloat16"))
    inputs = hooked_inputs(study, base, "bfloat16")
    control = Adapter.load(study.path / "controls" / "untrained")
    stored = np.concatenate([z for _, z in open_store(study, "untrained").chunks()])
    wanted = np.concatenate(
        [np.concatenate([seen[m.path] @ m.a_RI.numpy().T for m in control.modules], axis=1) for seen in inputs]
    )
    # recording's forms of the norms and the MLP round at other places than the model's own
    assert np.corrcoef(stored.ravel(), wanted.ravel())[0, 1] > 0.999


def test_untrained_is_step_0_of_the_training_that_was_recorded(study: Study, base: Path) -> None:
    record(study, RecordConfig(source="untrained"), OPTIONS)
    control, trained = (Adapter.load(study.path / name) for name in ("controls/untrained", "adapter"))
    start = initial_adapter(load_model(str(base))[0], seed=5)
    for ours, first, last in zip(control.modules, start.modules, trained.modules, strict=True):
        assert torch.equal(ours.a_RI, first.a_RI)
        assert torch.equal(ours.b_OR, last.b_OR)
        assert ours.scale == last.scale


def test_random_effects_deviate_as_the_trained_ones(study: Study) -> None:
    """The traces are all of the sample here, so the match is exact but for half precision."""
    record(study, RecordConfig(source=ALL), OPTIONS)
    trained, made = open_store(study, "adapter"), open_store(study, "random")
    wanted_by, deviations = (
        dict(zip(store.addresses, (scalars * store.effect_per_scalar).std(axis=0), strict=True))
        for store in (trained, made)
        for scalars in [np.concatenate([z for _, z in store.chunks()])[store.ordinary]]
    )
    for address, wanted in wanted_by.items():
        assert deviations[address] == pytest.approx(wanted, rel=2e-3)
        assert deviations[f"{address}#difference"] == pytest.approx(wanted, rel=2e-3)


def test_differences_are_of_two_ordinary_tokens_inputs(study: Study, base: Path) -> None:
    record(study, RecordConfig(source="random"), OPTIONS)
    control = Adapter.load(study.path / "controls" / "random")
    inputs = hooked_inputs(study, base)
    ordinary = open_store(study, "random").ordinary
    for part in control.modules:
        x = np.concatenate([seen[part.path] for seen in inputs])[ordinary].astype(np.float64)
        difference = part.a_RI[1].numpy().astype(np.float64)
        # every difference of a pair of rows, by its cosine with the vector
        apart = x[:, None] - x[None]
        cosine = apart @ difference / np.maximum(np.linalg.norm(apart, axis=2), 1e-9)
        assert cosine.max() == pytest.approx(1, abs=1e-4)
        assert abs(float(part.a_RI[0].norm()) - 1) < 1e-5
        assert abs(float(part.a_RI[0] @ part.a_RI[1])) < 0.7


def test_inputs_are_taken_at_the_tokens_asked_for(study: Study, base: Path) -> None:
    model, tokenizer = load_model(str(base))
    adapter = Adapter.load(study.path / "adapter")
    rendered, _ = study.renderer(tokenizer).render_all(TRACES)
    total = sum(len(one.ids) for one in rendered)
    tokens = np.random.default_rng(0).integers(0, total, (len(adapter.addresses), 3))
    with attach(model, adapter) as attached, torch.no_grad():
        found = inputs_at(attached, rendered, tokens)
    inputs = hooked_inputs(study, base)
    for part, found_KRI in zip(adapter.modules, found, strict=True):
        x = np.concatenate([seen[part.path] for seen in inputs])
        np.testing.assert_allclose(found_KRI[:, 0], x[tokens[part.columns.start]], rtol=1e-4, atol=1e-5)


def test_long_samples_are_spread_and_cut(study: Study, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered, _ = study.renderer(load_model(str(base))[1]).render_all(TRACES)
    monkeypatch.setattr(controls, "SAMPLE_TRACES", 2)
    monkeypatch.setattr(controls, "SAMPLE_TOKENS", 7)
    sample = spread_sample(rendered)
    assert [one.trace_id for one in sample] == ["a", "c"]
    assert [(len(one.ids), len(one.segments)) for one in sample] == [(7, 7), (7, 7)]


def store_bytes(study: Study, sources: str = ALL) -> dict[str, bytes]:
    """Every byte of the shards, scales and plans of some sources."""
    folders = [store_folder(study.path, "train", source) for source in sources.split(",")]
    return {
        f"{folder.name}/{file.name}": file.read_bytes()
        for folder in folders
        for file in sorted(folder.iterdir())
        if file.name != "index.json"
    }


def test_sources_share_a_pass_and_give_what_each_gives_alone(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = {"n": 0}
    real = recording.read_batch

    def counted(*args: Any) -> Any:
        passes["n"] += 1
        return real(*args)

    monkeypatch.setattr(recording, "read_batch", counted)
    together, apart = make_study(tmp_path / "together", base), make_study(tmp_path / "apart", base)
    record(together, RecordConfig(source=ALL), OPTIONS)
    assert passes["n"] == 1
    for source in ALL.split(","):
        record(apart, RecordConfig(source=source), OPTIONS)
    assert passes["n"] == 5
    assert store_bytes(together) == store_bytes(apart)  # and so seeds reproduce
    stages = together.manifest["stages"]
    assert {f"record:train:{source}" for source in ALL.split(",")} <= set(stages)
    assert all(row["state"] == "done" for row in together.status())
    record(together, RecordConfig(source=f"{ALL},base"), OPTIONS)
    assert passes["n"] == 6  # the base model's run alone


def test_a_finished_recording_is_left_alone_when_others_join(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Less memory would choose other batches now; the adapter's store is not made anew for it."""
    monkeypatch.setattr("lorascope.memory.free_memory", lambda _: 1 << 40)
    record(study, RecordConfig(), OPTIONS)
    folder = store_folder(study.path, "train", "adapter")
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    monkeypatch.setattr("lorascope.memory.free_memory", lambda _: 1)
    record(study, RecordConfig(source=ALL), OPTIONS)
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")} == before
    budgets = {source: open_store(study, source).index["about"]["token_budget"] for source in ALL.split(",")}
    assert len(set(budgets.values())) == 1


def test_the_budget_counts_what_all_sources_read(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, ...]] = []

    def choose(adapter: Adapter, device: torch.device, dtype: torch.dtype, beside: int) -> int:
        told.append((len(adapter.addresses), beside))
        return 300

    monkeypatch.setattr(recording, "choose_budget", choose)
    record(study, RecordConfig(source=f"{ALL},base"), OPTIONS)
    columns = {source: len(open_store(study, source).addresses) for source in ALL.split(",")}
    assert told == [(columns.pop("adapter"), sum(columns.values()))]


def test_another_seed_gives_other_controls(study: Study) -> None:
    record(study, RecordConfig(source="random,neurons"), OPTIONS)
    first = [open_store(study, source) for source in ("random", "neurons")]
    record(study, RecordConfig(source="random,neurons"), Options(device="cpu", seed=4))
    second = [open_store(study, source) for source in ("random", "neurons")]
    assert first[0].effect_per_scalar.tolist() != second[0].effect_per_scalar.tolist()
    assert first[1].addresses != second[1].addresses


def test_both_corpora_are_read_with_the_same_vectors(study: Study) -> None:
    record(study, RecordConfig(source="random,untrained,neurons"), OPTIONS)
    made = study.manifest["stages"]["control:random"]["finished"]
    record(study, RecordConfig(corpus="heldout", source="random,untrained,neurons"), OPTIONS)
    assert study.manifest["stages"]["control:random"]["finished"] == made
    for source in ("random", "untrained", "neurons"):
        train, heldout = open_store(study, source), open_store(study, source, "heldout")
        assert train.addresses == heldout.addresses
        np.testing.assert_allclose(train.trace(1)[1], heldout.trace(1)[1], rtol=2**-9, atol=2e-5)


def test_a_shared_pass_cut_off_continues_to_the_same_bytes(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "SHARD_TOKENS", 100)
    config = RecordConfig(source=ALL, token_budget=100)
    record(study, config, OPTIONS)
    wanted = store_bytes(study)
    real = store_writer.write_tensors
    for limit in (0, 1, 2, 5, 9, 14):
        for source in ALL.split(","):
            for path in store_folder(study.path, "train", source).iterdir():
                path.unlink()
        ran: list[int] = []

        def write(path: Path, tensors: Any, limit: int = limit, ran: list[int] = ran) -> None:
            if len(ran) == limit:
                raise KeyboardInterrupt
            ran.append(1)
            real(path, tensors)

        monkeypatch.setattr(store_writer, "write_tensors", write)
        with pytest.raises(KeyboardInterrupt):
            record(study, config, OPTIONS)
        monkeypatch.setattr(store_writer, "write_tensors", real)
        record(study, config, OPTIONS)
        assert store_bytes(study) == wanted


def test_controls_are_kinds_of_features(study: Study) -> None:
    record(study, RecordConfig(source=f"{ALL},base"), OPTIONS)
    direction = load_features(study, "train", "direction")
    for kind, count in (("random", 2), ("untrained", 1), ("neuron", 1), ("base", 1)):
        found = load_features(study, "train", kind)
        assert len(found.ids) == count * len(direction.ids)
        assert all(name.startswith(f"{kind}.L") and name[-1] in "+-" for name in found.ids)
        assert (found.unit, found.latent) == ("effect", False)


def test_an_imported_adapter_has_no_step_0(study: Study) -> None:
    stages = {name: entry for name, entry in study.manifest["stages"].items() if name != "train:adapter"}
    manifest = study.manifest | {"stages": stages}
    write_json(study.path / "study.json", manifest)
    with pytest.raises(MissingStage, match="not trained here"):
        record(study, RecordConfig(source="untrained"), OPTIONS)


def test_a_training_of_other_modules_is_not_taken_for_step_0(study: Study) -> None:
    entry = study.manifest["stages"]["train:adapter"]
    study.update_manifest(stages={"train:adapter": entry | {"config": entry["config"] | {"modules": "mlp"}}})
    with pytest.raises(MissingStage, match="adapts other modules"):
        record(study, RecordConfig(source="untrained"), OPTIONS)


def test_neurons_are_drawn_without_repeats_and_need_a_down_projection() -> None:
    model = tiny_model()
    probe = neuron_probe(model, 10_000, seed=0)  # more than there are
    assert len(set(probe.addresses)) == len(probe.addresses) == 3 * 48
    few = neuron_probe(model, 20, seed=0)
    assert len(set(few.addresses)) == 20
    assert few.addresses == neuron_probe(model, 20, seed=0).addresses != neuron_probe(model, 20, seed=1).addresses
    with pytest.raises(BadInput, match="no down_proj"):
        neuron_probe(model.model.layers[0].self_attn, 5, seed=0)
