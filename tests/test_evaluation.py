"""Evaluation end to end on a tiny model: samples, recovery, directions off, files of questions, what is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorascope import evaluation
from lorascope.attached import attach
from lorascope.config import Options
from lorascope.creation import NewConfig, create_study
from lorascope.errors import BadInput, MissingStage
from lorascope.evaluation import EvaluateConfig, evaluate, plain_perplexity, read_samples, shot_turns
from lorascope.models import load_model
from lorascope.study import Study
from lorascope.traces import Renderer
from lorascope.views import dropped, recovery_view
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
    assert rows[0]["recovery_reason"] == "the full finetune was not evaluated"
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
    assert [(row["benchmark"], row["n"]) for row in result["recovery"]][:2] == [("all", 4), ("mini", 4)]


def questions(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def sums(path: Path, *numbers: int) -> str:
    return questions(path, *({"question": f"{i}+1?", "answer": str(i + 1)} for i in numbers))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every load of a model that evaluation makes, from here on."""
    seen: list[str] = []

    def counted(name: str, **options: Any) -> Any:
        seen.append(name)
        return load_model(name, **options)

    monkeypatch.setattr(evaluation, "load_model", counted)
    return seen


def test_worked_examples_are_never_repeated(study: Study) -> None:
    """Traces of a user's file have no family, so one alone comes first."""
    renderer = Renderer(load_model(study.model_name)[1], system="")
    traces = [replace(t, family=None) for t in study.traces("train")]
    asked = [t["content"] for t in shot_turns([*traces[:5], replace(traces[0], id="again")], 9, renderer, 0)[::2]]
    assert sorted(asked) == sorted({t.question for t in traces[:5]})


def test_edited_questions_and_texts_are_evaluated_again(study: Study, tmp_path: Path, loads: list[str]) -> None:
    file, text = sums(tmp_path / "edited.jsonl", 1, 2), tmp_path / "text.txt"
    text.write_text("Plain text of some length.")
    config = EvaluateConfig(**(CONFIG | {"on": file, "models": "base", "plain_text": str(text)}))

    def run() -> tuple[str, float]:
        result = evaluate(study, config, Options())
        return read_samples(study.path / "eval" / "base.jsonl")[0]["gold"], result["details"]["models"][0]["perplexity"]

    gold, first = run()
    assert gold == "2"
    assert len(loads) == 1
    assert run() == (gold, first)
    assert len(loads) == 1
    questions(tmp_path / "edited.jsonl", {"question": "1+1?", "answer": "3"}, {"question": "2+1?", "answer": "3"})
    assert run() == ("3", first)
    assert len(loads) == 2
    text.write_text("Other plain text.")
    gold, second = run()
    assert gold == "3"
    assert second != first
    assert len(loads) == 3


def test_line_separators_in_texts_keep_rows_whole(study: Study, tmp_path: Path) -> None:
    asked = "one\u2028two\u2029three\u0085four"
    file = questions(tmp_path / "lines.jsonl", {"question": asked, "answer": "1"})
    evaluate(study, EvaluateConfig(**(CONFIG | {"on": file, "models": "base"})), Options())
    kept = [row["question"] for row in read_samples(study.path / "eval" / "base.jsonl") if row["benchmark"] == "lines"]
    assert kept == [asked]


def test_problems_are_told_apart(study: Study, tmp_path: Path) -> None:
    """Files of one stem, or of a family's name, are benchmarks of their own; repeated ids are problems of their own."""
    (tmp_path / "other").mkdir()
    rows = [{"id": "x", "question": f"{i}?", "answer": str(i)} for i in range(3)]
    files = [questions(tmp_path / name, *rows) for name in ("a.jsonl", "other/a.jsonl", "letters.jsonl", "all.json")]
    on = ",".join(["letters", *files, files[0]])
    result = evaluate(study, EvaluateConfig(**(CONFIG | {"on": on, "models": "base"})), Options())
    counts = {row["benchmark"]: row["n"] for row in result["recovery"]}
    wanted = {"all": 18, "letters": 6, "a": 3, "a#2": 3, "letters#2": 3, "all#2": 3}
    assert {name: counts[name] for name in wanted} == wanted


def test_a_later_call_keeps_what_is_measured_alike(study: Study, tmp_path: Path, loads: list[str]) -> None:
    first, second = sums(tmp_path / "first.jsonl", 1, 2, 3), sums(tmp_path / "second.jsonl", 4, 5)
    config = EvaluateConfig(**(CONFIG | {"on": first, "models": "base", "max_new_tokens": 5}))

    def rows() -> dict[str, Any]:
        found = json.loads((study.path / "eval" / "recovery.json").read_text())
        assert found[0]["benchmark"] == "all"
        return {row["benchmark"]: row for row in found}

    evaluate(study, config, Options())
    assert rows()["first"]["adapter"] is None
    evaluate(study, replace(config, models="adapter"), Options())
    assert len(loads) == 2  # base's samples of these problems are on disk
    alone = rows()
    assert list(alone) == ["all", "first"]
    assert alone["all"]["gains"]["adapter"] is not None
    evaluate(study, replace(config, on=second, models="base,adapter"), Options())
    both = rows()
    assert [(name, row["n"]) for name, row in both.items()] == [("all", 2), ("second", 2), ("first", 3)]
    assert {k: v for k, v in both["first"].items() if k != "measured"} == {
        k: v for k, v in alone["first"].items() if k != "measured"
    }
    assert both["first"]["measured"]["on"] == first
    assert both["all"]["measured"]["on"] == both["second"]["measured"]["on"] == second
    assert "first" in recovery_view(study)["sentences"][-1]
    kept = read_samples(study.path / "eval" / "adapter.jsonl")
    assert [(row["benchmark"], row["id"]) for row in kept] == [
        *(("second", f"second-{i}") for i in (1, 2)),
        *(("first", f"first-{i}") for i in (1, 2, 3)),
    ]
    assert len(loads) == 4
    evaluate(study, replace(config, models="base,adapter"), Options())
    assert len(loads) == 4
    assert list(rows()) == ["all", "first", "second"]


def test_other_settings_and_other_weights_are_not_mixed(study: Study, tmp_path: Path) -> None:
    config = EvaluateConfig(
        **(CONFIG | {"on": sums(tmp_path / "p.jsonl", 1, 2), "models": "base", "max_new_tokens": 4})
    )
    evaluate(study, replace(config, models="base,adapter", off="L*.[qk]"), Options())
    copy = study.path / "eval" / "adapter-no-Lall.[qk].jsonl"
    assert copy.exists()
    longer = evaluate(study, replace(config, max_new_tokens=3), Options())
    assert longer["recovery"][0]["adapter"] is None
    assert not copy.exists()
    apart = [row for row in longer["details"]["not_shown"] if row["max_new_tokens"] == 4]
    assert [(row["benchmarks"], row["problems"]) for row in apart] == [(["p"], 2)]
    (counted,) = [row for row in dropped(study)["rows"] if row["what"] == "sets of samples not shown"]
    assert counted["count"] == len(longer["details"]["not_shown"])
    adapter = study.path / "adapter"
    before = (adapter / "adapter_model.safetensors").read_bytes()
    try:
        random_adapter(load_model(study.model_name)[0], seed=7).save(adapter)
        assert evaluate(study, config, Options())["recovery"][0]["adapter"] is None
        assert not (study.path / "eval" / "adapter.jsonl").exists()
    finally:
        (adapter / "adapter_model.safetensors").write_bytes(before)
    assert evaluate(study, config, Options())["recovery"][0]["adapter"] is not None
    moved = evaluate(study, replace(config, models="adapter"), Options(seed=1))
    assert moved["recovery"][0]["base"] is None


def test_samples_are_kept_when_the_perplexity_fails(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loads: list[str]
) -> None:
    config = EvaluateConfig(**(CONFIG | {"on": sums(tmp_path / "kept.jsonl", 1, 2), "models": "adapter"}))
    before = set(study.path.glob("eval/sets/*/adapter.jsonl"))
    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "plain_perplexity", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(study, replace(config, plain_text=sums(tmp_path / "text.txt", 1)), Options())
    (kept,) = set(study.path.glob("eval/sets/*/adapter.jsonl")) - before
    times = kept.stat().st_mtime_ns
    evaluate(study, config, Options())
    assert kept.stat().st_mtime_ns == times


def interrupted(*_: Any) -> float:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n": 0}, "--n"),
        ({"seeds": 0}, "--seeds"),
        ({"max_new_tokens": 0}, "--max-new-tokens"),
        ({"token_budget": 0}, "--token-budget"),
        ({"shots": -1}, "--shots"),
        ({"temperature": -1.0}, "--temperature"),
        ({"plain_text": "missing.txt"}, "Cannot read missing.txt"),
        ({"plain_text": "EMPTY"}, "no text"),
        ({"off": "attn,L9.*"}, "'L9.*' matches no direction"),
        ({"on": "MATH"}, "pip install math-verify"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(
    study: Study, tmp_path: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], words: str
) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    paths = {
        "EMPTY": str(tmp_path / "empty.txt"),
        "MATH": questions(tmp_path / "math.jsonl", {"question": "What?", "answer": "\\sqrt{2}"}),
    }
    if change.get("on") == "MATH":
        monkeypatch.setattr("lorascope.tasks.mathematics.find_spec", lambda name: None)
    given = {key: paths.get(str(value), value) for key, value in change.items()}
    with pytest.raises(BadInput, match=words):
        evaluate(study, EvaluateConfig(**(CONFIG | given)), Options())
    assert loads == []


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
