"""Options from flags, YAML and defaults; exit codes; one JSON document on stdout; studies that are not."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path

import pytest
import torch

from lorascope.cli import COMMANDS, main, readable
from lorascope.config import Options, field_docs, parse_arguments
from lorascope.errors import BadInput, RunFailed
from lorascope.explain.categories import CategorizeConfig
from lorascope.explain.settings import ExplainConfig, JudgeConfig
from lorascope.study import Study


@dataclass(frozen=True)
class Example:
    """An example command."""

    name: str
    """A name."""
    k: int = 3
    """A number, 50% of them odd."""
    fast: bool = False
    """Whether to hurry."""
    rate: float | None = None
    """A rate."""


def parse(*arguments: str) -> tuple[str | None, Example, Options]:
    return parse_arguments("example", Example, list(arguments))


def test_flags_stand_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("name: y\nk: 7\nrate: 1\nseed: 5\n")
    study, config, options = parse("s", "--k", "9", "--config", str(file), "--fast")
    assert (study, config, options.seed) == ("s", Example("y", 9, True, 1.0), 5)
    assert parse("s", "--name", "n", "--no-fast")[1] == Example("n")


@dataclass(frozen=True)
class Several:
    """A command with options that may be given several times."""

    name: tuple[str, ...]
    """Names."""
    rate: tuple[float, ...] = (0.5, 2.0)
    """Rates."""


def test_an_option_may_be_given_several_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def several(*arguments: str) -> Several:
        return parse_arguments("several", Several, ["s", *arguments])[1]

    assert several("--name", "a", "--name", "b,c", "--rate", "-1") == Several(("a", "b,c"), (-1.0,))
    assert several("--name", "a") == Several(("a",))
    file = tmp_path / "c.yaml"
    file.write_text("name: [x, y]\nrate: 3\n")
    assert several("--config", str(file)) == Several(("x", "y"), (3.0,))
    assert several("--config", str(file), "--name", "z") == Several(("z",), (3.0,))
    with pytest.raises(BadInput, match="--name is required"):
        several()
    file.write_text("name: x\nrate: [1, fast]\n")
    with pytest.raises(BadInput, match="type float"):
        several("--config", str(file))
    with pytest.raises(SystemExit):
        several("--help")
    assert "default: 0.5, 2.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("kk: 3", "unknown key 'kk'"),
        ("k: five", "type int"),
        ("k: true", "type int"),
        ("[1]", "mapping"),
        ("a: [", "YAML"),
    ],
)
def test_bad_yaml_is_one_sentence(tmp_path: Path, yaml: str, words: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml)
    with pytest.raises(BadInput, match=words):
        parse("s", "--name", "n", "--config", str(file))


@pytest.mark.parametrize(
    "bad", [["s"], ["s", "--name", "n", "--kk", "1"], ["s", "--name", "n", "--k", "x"], ["--name", "n"]]
)
def test_bad_flags_are_bad_input(bad: list[str]) -> None:
    with pytest.raises(BadInput):
        parse(*bad)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_documents_every_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = getattr(import_module(f"lorascope.{COMMANDS[name].module}"), COMMANDS[name].config)
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    for cls in (config, Options):
        docs = field_docs(cls)
        for field in fields(cls):
            assert docs[field.name].endswith((".", ".)"))
            assert "--" + field.name.replace("_", "-") in text


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    study = str(Study.create(tmp_path / "s", model="m", system=None).path)
    assert main(["status", study]) == 0
    assert main(["status", str(tmp_path / "none")]) == 2
    assert main(["nonsense"]) == 2
    assert main(["ablate", study]) == 2  # no adapter yet
    error = capsys.readouterr().err
    assert f"lorascope train {study}" in error
    assert "Traceback" not in error
    for raised, code in ((RunFailed("broken"), 1), (KeyboardInterrupt(), 130), (ValueError("odd"), 1)):

        def fail(*_: object, raised: BaseException = raised) -> None:
            raise raised

        monkeypatch.setattr("lorascope.status.show_status", fail)
        assert main(["status", study]) == code
    assert "ValueError: odd" in (tmp_path / "s" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["reprot", "s"], "lorascope: There is no command 'reprot'; did you mean report?\n"),
        (["report"], "lorascope: The following arguments are required: STUDY; see lorascope report --help.\n"),
        (["report", "s", "--oops"], "lorascope: Unrecognized arguments: --oops; see lorascope report --help.\n"),
    ],
)
def test_what_was_mistyped_is_one_sentence(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(given) == 2
    assert capsys.readouterr().err == said


def test_json_is_one_document_on_stdout(tmp_path: Path) -> None:
    study = Study.create(tmp_path / "s", model="m", system=None)
    command = [sys.executable, "-m", "lorascope", "status", str(study.path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["model"] == "m"
    assert done.stderr == ""


def test_doctor_finds_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = Study.create(tmp_path / "s", model="m", system=None)
    assert main(["doctor", str(study.path)]) == 0
    (study.path / "summary.json").write_text("{")
    (study.path / "traces" / "train.jsonl").write_text('{"a": 1}\n{"b"\n')
    (study.path / "weights.safetensors").write_bytes(b"1234")
    capsys.readouterr()
    assert main(["doctor", str(study.path), "--json"]) == 1
    damaged = json.loads(capsys.readouterr().out)["damaged"]
    assert [line.split(":")[0] for line in damaged] == ["summary.json", "traces/train.jsonl", "weights.safetensors"]
    assert "line 2" in damaged[1]


def test_line_separators_inside_texts_are_not_damage(tmp_path: Path) -> None:
    study = Study.create(tmp_path / "s", model="m", system=None)
    file = study.path / "traces" / "train.jsonl"
    rows = [json.dumps({"a": f"one{mark}two"}, ensure_ascii=False) + "\n" for mark in "\u2028\u2029\u0085"]
    file.write_text("".join(rows), encoding="utf-8")
    (study.path / "traces" / "none.jsonl").write_text("")
    assert main(["doctor", str(study.path)]) == 0
    file.write_text("".join(rows) + "\n{}", encoding="utf-8")
    assert main(["doctor", str(study.path)]) == 1


def test_an_error_that_cannot_be_logged_is_still_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study.create(tmp_path / "s", model="m", system=None)
    (study.path / "log.txt").mkdir()  # as unwritable as a read-only study's

    def broken(*_: object) -> None:
        raise ValueError("odd")

    monkeypatch.setattr("lorascope.status.show_status", broken)
    assert main(["status", str(study.path)]) == 1
    assert capsys.readouterr().err == "lorascope: ValueError: odd (run again with --verbose for the traceback).\n"


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("threads")
def test_threads_are_set_by_flag_and_by_yaml(tmp_path: Path) -> None:
    study = Study.create(tmp_path / "s", model="m", system=None)
    file = tmp_path / "c.yaml"
    file.write_text("threads: 3\n")
    for arguments, wanted in (
        (["--config", str(file)], 3),
        ([f"--config={file}", "--threads", "2"], 2),
        (["--threads=4"], 4),
    ):
        assert main(["status", str(study.path), *arguments]) == 0
        assert torch.get_num_threads() == wanted
        assert os.environ["OMP_NUM_THREADS"] == str(wanted)
    assert main(["status", str(study.path), "--threads", "0"]) == 2
    file.write_text("threads: many\n")
    assert main(["status", str(study.path), "--config", str(file)]) == 2


def test_threads_of_a_yaml_file_hold_before_anything_is_loaded(tmp_path: Path) -> None:
    study = Study.create(tmp_path / "s", model="m", system=None)
    (tmp_path / "c.yaml").write_text("threads: 2\n")
    command = [sys.executable, "-m", "lorascope", "doctor", str(study.path), "--json", "--config"]
    done = subprocess.run([*command, str(tmp_path / "c.yaml")], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["threads"] == 2  # the tests themselves run with 1


@dataclass(frozen=True)
class Shared:
    """Options that several commands have."""

    url: str = "here"
    """Where it is."""
    k: int = 1
    """A number that a command may set anew."""


@dataclass(frozen=True)
class Longer(Shared):
    """A command with options of its own."""

    name: str = ""
    """A name."""
    k: int = 2
    """A number of its own."""


def test_inherited_options_keep_their_help_and_come_last(capsys: pytest.CaptureFixture[str]) -> None:
    assert field_docs(Longer) == {"name": "A name.", "k": "A number of its own.", "url": "Where it is."}
    assert parse_arguments("longer", Longer, ["s", "--url", "there"])[1] == Longer("there", 2, "")
    with pytest.raises(SystemExit):
        parse_arguments("longer", Longer, ["--help"])
    text = capsys.readouterr().out
    assert text.index("--name") < text.index("--k ") < text.index("--url")
    assert "Where it is. (default: here)" in text


def test_commands_that_ask_judges_share_their_options() -> None:
    shared = {field.name for field in fields(JudgeConfig)}
    assert {"judge_model", "judge_max_tokens", "judge_timeout", "budget_money", "price_out"} < shared
    for cls in (ExplainConfig, CategorizeConfig):
        assert shared < {field.name for field in fields(cls)}


def test_results_are_readable_and_intervals_on_one_line() -> None:
    score = {"mean": 0.71234, "low": 0.7, "high": 0.72}
    result = {"n": 12, "detection": score, "none": None, "kinds": {"latent": {"n": 3, "score": score}}, "list": [1, 2]}
    result |= {"top": [{"feature": f"sae.{k}", "p": k / 3} for k in (1, 20)], "odd": [{"a": 1}, {"b": {"c": [2]}}]}
    result |= {"tokens": [["\n", 27], [" so", 1.5]], "names": ["a", " b"]}
    assert readable(result).splitlines() == [
        "n: 12",
        "detection: 0.7123 (0.7 to 0.72)",
        "none: None",
        "kinds:",
        "  latent:",
        "    n: 3",
        "    score: 0.7123 (0.7 to 0.72)",
        "list: 1, 2",
        "top:",
        "  feature  p",
        "  sae.1    0.3333",
        "  sae.20   6.667",
        "odd:",
        "  -",
        "    a: 1",
        "  -",
        "    b:",
        "      c: 2",
        "tokens:",
        r"  '\n'   27",
        "  ' so'  1.5",
        "names: a, ' b'",
    ]
