"""Options from flags, YAML and defaults; exit codes; one JSON document on stdout; studies that are not."""

import json
import subprocess
import sys
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path

import pytest

from lorascope.cli import COMMANDS, main
from lorascope.config import Options, field_docs, parse_arguments
from lorascope.errors import BadInput, RunFailed
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
