"""The command `lorascope steer` on a planted model: what a planted direction writes is what the text becomes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from lorascope.adapter import Adapter
from lorascope.attached import attach
from lorascope.cli import main
from lorascope.models import load_model
from lorascope.steering import Panel, Steer, stage
from lorascope.steering.passes import begin_sequel, run_pass
from lorascope.steering.stage import first_difference
from lorascope.steering.words import steering_text
from lorascope.study import Study
from planted_model import WORDS, planted_traces, save_planted

WORD, FEATURE, PROMPT = " wait", "L1.down+", "balan kepor"


def plant_writer(model_folder: Path, adapter_folder: Path) -> None:
    """Make L1.down write along the unembedding of one word."""
    model, tokenizer = load_model(str(model_folder))
    adapter = Adapter.load(adapter_folder)
    number = adapter.addresses.index(FEATURE[:-1])
    row_D = model.lm_head.weight[tokenizer(WORD, add_special_tokens=False)["input_ids"][0]].detach()
    modules = list(adapter.modules)
    modules[number] = replace(modules[number], b_OR=0.2 * row_D[:, None] / row_D.norm())
    replace(adapter, modules=tuple(modules)).save(adapter_folder)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("steered")
    model, adapter = save_planted(folder)
    plant_writer(model, adapter)
    traces = planted_traces(folder / "all.jsonl")
    traces.write_text("".join(traces.read_text().splitlines(keepends=True)[:60]))
    path = folder / "study"
    commands = [
        ["new", "--model", str(model), "--traces", str(traces), "--adapter", str(adapter), "--system", ""],
        ["record"],
        ["record", "--corpus", "heldout"],
        ["sae", "--k", "3", "--expansion", "2", "--tokens", "20000", "--no-patched"],
        ["examples"],
    ]
    for name, *rest in commands:
        assert main([name, str(path), *rest]) == 0, name
    return Study.open(path)


def steer(study: Study, capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    assert main(["steer", str(study.path), "--max-new-tokens", "8", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def units(study: Study, kind: str) -> dict[str, float]:
    table = pq.read_table(study.path / "examples" / "train" / f"{kind}-stats.parquet").to_pydict()
    return dict(zip(table["feature"], table["p99"], strict=True))


def strength(study: Study) -> str:
    """An amount that makes the planted effect 200, far beyond what else is in the residual stream."""
    return str(200 / units(study, "direction")[FEATURE])


def firing_latent(study: Study) -> str:
    p99 = units(study, "latent")
    return max(p99, key=lambda name: p99[name])


def test_the_text_becomes_what_the_direction_writes(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    amount = strength(study)
    result = steer(study, capsys, "--feature", FEATURE, "--amount", amount, "--prompt", PROMPT)
    (row,) = result["prompts"]
    assert set(row["runs"]) == {"plain", "steered", "control", "base"}
    for name, run in row["runs"].items():
        assert len(run["tokens"]) == len(run["token_ids"]) == len(run["activations"][FEATURE])
        # Generated tokens are edited, so the first, which the prompt predicts, is the model's own.
        assert (run["tokens"][1:] == [WORD] * 7) == (name == "steered")
    assert row["first_difference"]["steered"] == 1
    assert row["runs"]["steered"]["tokens"][0] == row["runs"]["plain"]["tokens"][0]
    assert min(row["runs"]["steered"]["activations"][FEATURE]) > 190
    assert max(row["runs"]["plain"]["activations"][FEATURE]) < 10
    (move,) = result["steers"]
    assert move["change"] == pytest.approx(200)
    assert move["unit"] == "effect"
    everywhere = steer(study, capsys, "--feature", FEATURE, "--amount", amount, "--prompt", PROMPT, "--where", "all")
    assert everywhere["prompts"][0]["runs"]["steered"]["tokens"] == [WORD] * 8


def test_a_planted_direction_is_off_where_its_trigger_is_and_nowhere_else(study: Study) -> None:
    model, tokenizer = load_model(study.model_name)
    adapter = Adapter.load(study.path / "adapter")
    panel = Panel(adapter.addresses, adapter.effect_per_scalar, None, {})
    with attach(model, adapter) as attached:

        def change(text: str) -> float:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            plain, moved = (
                run_pass(begin_sequel(attached, panel, steers, "adapter", 0), ids, edited=True)[0]
                for steers in ((), (Steer("L0.gate+", mode="off"),))
            )
            return float((plain - moved).abs().max())

        other, trigger = change("".join(WORDS[:6])), change("".join(WORDS[:5]) + " seven")
        opposite = change("".join(WORDS[:5]) + " so")  # of the other polarity
    assert trigger > 50 * max(other, opposite)


def test_every_asking_is_kept_and_none_is_run_twice(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    latent = firing_latent(study)
    one = ["--feature", latent, "--amount", "2", "--feature", FEATURE, "--amount", "-1", "--prompt", PROMPT]
    first = steer(study, capsys, *one)
    record = study.manifest["stages"]["steer"]
    assert steer(study, capsys, *one) == first
    assert study.manifest["stages"]["steer"] == record
    other = steer(study, capsys, *one, "--seed", "5", "--temperature", "1")
    assert other["file"] != first["file"]
    assert json.loads((study.path / first["file"]).read_text()) == first
    assert [(m["feature"], m["amount"]) for m in first["steers"]] == [(latent, 2.0), (FEATURE, -1.0)]
    assert all(row["state"] == "done" for row in study.status())


def test_a_run_that_was_cut_off_goes_on_with_the_next_prompt(
    study: Study, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["--prompt", "balan", "--prompt", "monim", "--prompt", "ridok"]
    given = ["--feature", FEATURE, "--amount", "3", *prompts, "--max-new-tokens", "3", "--json"]
    real, answered = stage.compare_runs, []

    def answer(bench: Any, prompt: str, *rest: Any) -> Any:
        if answered == ["balan"]:
            raise KeyboardInterrupt
        answered.append(prompt)
        return real(bench, prompt, *rest)

    monkeypatch.setattr(stage, "compare_runs", answer)
    assert main(["steer", str(study.path), *given]) == 130
    (unfinished,) = (study.path / "steering").glob(".*.jsonl")
    with unfinished.open("a") as file:
        file.write('{"prompt": "mo')  # half a line
    answered.append("")
    assert main(["steer", str(study.path), *given]) == 0
    assert answered == ["balan", "", "monim", "ridok"]
    assert not list((study.path / "steering").glob(".*"))
    capsys.readouterr()
    assert main(["steer", str(study.path), *given]) == 0
    pieced = json.loads(capsys.readouterr().out)
    (study.path / pieced["file"]).unlink()
    monkeypatch.undo()
    assert main(["steer", str(study.path), *given]) == 0
    assert json.loads(capsys.readouterr().out) == pieced


def test_modes_and_prompts_come_one_by_one(study: Study, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lines, plain = tmp_path / "p.jsonl", tmp_path / "p.txt"
    lines.write_text('"balan\\nkepor"\n{"prompt": "monim"}\n\n{"question": "ridok"}\n')
    plain.write_text("balan\nmonim\n")
    features = ["--feature", "sae.0", "--mode", "off", "--feature", FEATURE, "--mode", "clamp", "--amount", "1.5"]
    result = steer(study, capsys, *features, "--prompt", PROMPT, "--prompt-file", str(lines), "--watch", "sae.1")
    assert [row["prompt"] for row in result["prompts"]] == [PROMPT, "balan\nkepor", "monim", "ridok"]
    assert [(m["mode"], m["amount"]) for m in result["steers"]] == [("off", 0.0), ("clamp", 1.5)]
    steered = result["prompts"][0]["runs"]["steered"]
    assert set(steered["activations"]) == {"sae.0", FEATURE, "sae.1"}
    wanted = result["steers"][1]["change"]
    assert steered["activations"][FEATURE] == pytest.approx([wanted] * len(steered["tokens"]), rel=1e-4)
    short = [*features, "--prompt-file", str(plain), "--max-new-tokens", "2"]
    assert main(["steer", str(study.path), *short]) == 0
    shown = capsys.readouterr().out
    assert shown.count("Prompt: ") == 2
    assert shown.count("\nsame seed, unsteered:\n") == 2
    assert shown.count("\nsame moves along random vectors of equal length:") == 2
    assert "\nL1.down+: clamp to 1.5 times the 99th percentile" in shown
    for dumped in ("token_ids", "None", "False", "unit"):
        assert dumped not in shown
    assert main(["steer", str(study.path), *short, "--no-compare"]) == 0
    assert "random vectors" not in capsys.readouterr().out


def test_a_run_like_the_unsteered_one_is_said_to_be_the_same() -> None:
    def run(text: str, *, finished: bool = True) -> dict[str, Any]:
        return {"text": text, "finished": finished}

    runs = {"plain": run("84."), "steered": run("7\n8", finished=False), "control": run("84.")}
    row = {"prompt": "7 * 12?", "runs": runs, "first_difference": {"steered": 0, "control": None}}
    steers = [
        {"feature": "L1.q+", "mode": "scale", "amount": 0.0, "p99": 3.0, "unit": "effect", "change": None},
        {"feature": "sae.3", "mode": "off", "amount": 0.0, "p99": 3.0, "unit": "code", "change": None},
    ]
    settings = {"where": "all", "max_new_tokens": 2, "temperature": 0.0, "corpus": "train", "seed": 4}
    said = steering_text({"file": "steering/x.json", "steers": steers, "settings": settings, "prompts": [row]})
    assert said.startswith("L1.q+: scaled by 0\nsae.3: off\nOn every token; at most 2 new tokens, greedy, seed 4.")
    assert "steered:\n  7\n  8\n  (cut off at the limit)\n\nsame seed, unsteered:\n  84.\n\n" in said
    assert "same moves along random vectors of equal length: the same as unsteered" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--amount", "1", "--prompt", "x"], "--feature is required"),
        (["--feature", FEATURE, "--prompt", "x"], "--amount is required"),
        (["--feature", FEATURE, "--amount", "1"], "--prompt TEXT"),
        (["--feature", FEATURE, "--amount", "1", "--prompt", " "], "--prompt TEXT"),
        (["--feature", FEATURE, "--mode", "off", "--amount", "1", "--prompt", "x"], "takes no --amount"),
        (["--feature", FEATURE, "--amount", "1", "--amount", "2", "--prompt", "x"], "2 times for 1 features"),
        (["--feature", FEATURE, "--amount", "1", "--mode", "push", "--prompt", "x"], "add, scale, clamp, off"),
        (["--feature", "L7.q+", "--amount", "1", "--prompt", "x"], "no feature 'L7.q+'"),
        (["--feature", FEATURE, "--amount", "1", "--prompt", "x", "--watch", "sae"], "no feature 'sae'"),
        (["--feature", FEATURE, "--amount", "1", "--prompt", "x", "--where", "here"], "--where is"),
        (["--feature", FEATURE, "--amount", "1", "--prompt", "x", "--corpus", "other"], "lorascope examples"),
        (["--feature", FEATURE, "--amount", "1", "--prompt", "x", "--max-new-tokens", "0"], "at least 1"),
        (["--feature", FEATURE, "--amount", "1", "--prompt-file", "nowhere.txt"], "Cannot read the prompts"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(
    study: Study, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    before = study.manifest
    capsys.readouterr()
    assert main(["steer", str(study.path), *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert study.manifest == before


@pytest.mark.parametrize(("line", "words"), [("{", "not JSON"), ('{"text": "x"}', "without a prompt")])
def test_a_damaged_file_of_prompts_is_named(
    study: Study, capsys: pytest.CaptureFixture[str], tmp_path: Path, line: str, words: str
) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(line + "\n")
    arguments = ["--feature", FEATURE, "--amount", "1", "--prompt-file", str(file)]
    assert main(["steer", str(study.path), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_the_first_difference_is_a_place_or_none() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([], []) is None


def test_a_steered_pass_keeps_no_gradient(study: Study) -> None:
    model, _ = load_model(study.model_name)
    adapter = Adapter.load(study.path / "adapter")
    panel = Panel(adapter.addresses, adapter.effect_per_scalar, None, {FEATURE: 1.0})
    with attach(model, adapter) as attached:
        logits, _ = run_pass(begin_sequel(attached, panel, [Steer(FEATURE, 1.0)], "adapter", 0), [5, 6], edited=True)
    assert not logits.requires_grad
    assert torch.isfinite(logits).all()
