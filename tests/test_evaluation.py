"""Evaluation end to end on a tiny model: samples, recovery, directions off, files of questions, what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lorascope.attached import attach
from lorascope.config import Options
from lorascope.creation import NewConfig, create_study
from lorascope.errors import BadInput, MissingStage
from lorascope.evaluation import EvaluateConfig, evaluate, plain_perplexity, shot_turns
from lorascope.models import load_model
from lorascope.study import Study
from lorascope.traces import Renderer
from tiny_folder import save_tiny
from tiny_models import random_adapter

CONFIG: dict[str, Any] = {"on": "chain,letters", "n": 6, "max_new_tokens": 6, "shots": 2}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("evaluation")
    model = save_tiny(folder / "model")
    create_study(
        folder / "study",
        NewConfig(str(model), "tasks:chain,letters", train_problems=12, heldout=4, system=""),
        Options(),
    )
    study = Study.open(folder / "study")
    random_adapter(load_model(str(model))[0]).save(study.path / "adapter")
    return study


def test_samples_of_every_model_are_kept_and_scored(study: Study) -> None:
    result = evaluate(study, EvaluateConfig(off="attn,mlp", **CONFIG), Options())
    names = ["base", "base-3shot", "adapter", "adapter-no-attn", "adapter-no-mlp"]
    assert [m["model"] for m in result["details"]["models"]] == names
    for name in names:
        rows = [json.loads(line) for line in (study.path / "eval" / f"{name}.jsonl").read_text().splitlines()]
        assert len(rows) == 6
        assert all(row["tokens"] <= 6 and isinstance(row["correct"], bool) for row in rows)
    rows = json.loads((study.path / "eval" / "recovery.json").read_text())
    assert rows[0]["benchmark"] == "all"
    assert {row["benchmark"] for row in rows} == {"all", "chain", "letters"}
    assert rows[0]["full"] is None
    assert rows[0]["recovery_reason"] == "full was not evaluated"
    assert set(rows[0]["others"]) == set(names) - {"base", "adapter"}


def test_all_directions_off_answers_as_the_base_does(study: Study) -> None:
    evaluate(study, EvaluateConfig(off="*", models="base,adapter", **CONFIG), Options())

    def responses(name: str) -> list[str]:
        lines = (study.path / "eval" / f"{name}.jsonl").read_text().splitlines()
        return [json.loads(line)["response"] for line in lines]

    assert responses("adapter-no-all") == responses("base") != responses("adapter")


def test_perplexity_is_that_of_the_plain_forward_pass(study: Study) -> None:
    model, tokenizer = load_model(study.model_name)
    text = "Plain text of some length."
    ids = torch.tensor(tokenizer(text)["input_ids"])
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(model(input_ids=ids[None, :-1]).logits[0], ids[1:])
    assert plain_perplexity(model, tokenizer, text) == pytest.approx(math.exp(float(losses)), rel=1e-5)
    assert plain_perplexity(model, tokenizer, text, window=7) != pytest.approx(math.exp(float(losses)), rel=1e-5)
    with attach(model, random_adapter(model)) as attached:
        assert plain_perplexity(attached, tokenizer, text) != pytest.approx(math.exp(float(losses)), rel=1e-3)


def test_worked_examples_are_other_problems_of_each_family(study: Study) -> None:
    renderer = Renderer(load_model(study.model_name)[1], system="")
    traces = study.traces("train")
    turns = shot_turns(traces, 2, renderer, 0)
    assert [t["role"] for t in turns] == ["user", "assistant", "user", "assistant"]
    families = {t.question: t.family for t in traces}
    assert {families[t["content"]] for t in turns[::2]} == {"chain", "letters"}
    assert all("<think>" in t["content"] for t in turns[1::2])


def test_question_files_are_benchmarks_of_their_own(study: Study, tmp_path: Path) -> None:
    file = tmp_path / "mini.jsonl"
    file.write_text("".join(json.dumps({"question": f"{i}+1?", "answer": str(i + 1)}) + "\n" for i in range(4)))
    result = evaluate(study, EvaluateConfig(**(CONFIG | {"on": str(file), "models": "base,adapter"})), Options())
    assert [(row["benchmark"], row["n"]) for row in result["recovery"]] == [("all", 4), ("mini", 4)]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"on": "nothing"}, BadInput, "no task or file 'nothing'"),
        ({"models": "full"}, MissingStage, "--full"),
        ({"models": "other"}, BadInput, "there is no 'other'"),
        ({"seeds": 2}, BadInput, "temperature"),
        ({"models": "control-answers"}, MissingStage, "--control answers"),
    ],
)
def test_what_cannot_be_evaluated(study: Study, change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        evaluate(study, EvaluateConfig(**(CONFIG | change)), Options())
