"""New studies: questions on one side only, adapters in their own or the singular basis, nothing left of failures."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lorascope.adapter import Adapter
from lorascope.config import Options
from lorascope.creation import NewConfig, create_study, split_by_question
from lorascope.errors import BadInput
from lorascope.models import load_model
from lorascope.study import Study
from lorascope.tasks import read_weights
from lorascope.traces import Trace
from tiny_folder import save_tiny
from tiny_models import random_adapter


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    file = tmp_path / "t.jsonl"
    rows = [{"question": f"{i}?", "thinking": "Hm.", "answer": str(i)} for i in range(10)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_an_adapter_is_taken_over_as_given_or_in_the_singular_basis(
    tmp_path: Path, model_folder: Path, traces: Path
) -> None:
    adapter = random_adapter(load_model(str(model_folder))[0], rank=2)
    adapter.save(tmp_path / "lora")
    for basis in ("given", "svd"):
        config = NewConfig(str(model_folder), str(traces), adapter=str(tmp_path / "lora"), basis=basis)
        create_study(tmp_path / basis, config, Options())
        study = Study.open(tmp_path / basis)
        assert study.manifest["basis"] == basis
        assert study.manifest["adapter"] == str(tmp_path / "lora")
        for ours, theirs in zip(Adapter.load(study.path / "adapter").modules, adapter.modules, strict=True):
            torch.testing.assert_close(ours.b_OR @ ours.a_RI, theirs.b_OR @ theirs.a_RI, rtol=1e-4, atol=1e-5)
            assert torch.equal(ours.a_RI, theirs.a_RI) == (basis == "given")


def test_long_traces_are_counted(tmp_path: Path, model_folder: Path, traces: Path) -> None:
    config = NewConfig(str(model_folder), str(traces), max_tokens=40, too_long="truncate", system="")
    result = create_study(tmp_path / "s", config, Options())
    counts = result["corpora"]["train"]["length_rule"]
    assert counts["kept"] + counts["truncated"] + counts["dropped"] == result["corpora"]["train"]["traces"] == 9
    assert Study.open(tmp_path / "s").manifest["corpora"]["train"]["length_rule"] == counts


def test_no_question_is_on_both_sides() -> None:
    traces = [Trace(str(i), f"What  is {i // 2}?" if i % 2 else f"what is {i // 2}?", "t", "a") for i in range(40)]
    train_side, heldout = split_by_question(traces, 0.25, 0)
    assert len(train_side) + len(heldout) == 40
    numbers = [{t.question.split()[-1] for t in side} for side in (train_side, heldout)]
    assert not numbers[0] & numbers[1]
    assert len(heldout) == 10


def test_task_weights_are_read() -> None:
    assert read_weights("multiply=2, chain") == {"multiply": 2.0, "chain": 1.0}
    with pytest.raises(BadInput, match="not a task with a weight"):
        read_weights("multiply=x")


def test_a_study_that_cannot_be_made_leaves_nothing(tmp_path: Path, model_folder: Path) -> None:
    with pytest.raises(BadInput):
        create_study(tmp_path / "s", NewConfig(str(model_folder), str(tmp_path / "missing.jsonl")), Options())
    assert not (tmp_path / "s").exists()


def test_tasks_without_worked_traces_are_refused(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """reasoning-gym's tasks (a package of the same shape stands in) would train nothing but the end of the turn."""

    def create_dataset(name: str, size: int, seed: int) -> list[dict[str, object]]:
        return [{"question": f"{seed} + 1?", "answer": str(seed + 1), "metadata": {}}]

    package = SimpleNamespace(factory=SimpleNamespace(DATASETS={"plus_one": object}), create_dataset=create_dataset)
    monkeypatch.setitem(sys.modules, "reasoning_gym", package)  # type: ignore[arg-type]
    config = NewConfig(str(model_folder), "tasks:sort,rg:plus_one", train_problems=20)
    with pytest.raises(BadInput, match="rg:plus_one has no worked traces"):
        create_study(tmp_path / "s", config, Options())
    assert not (tmp_path / "s").exists()
