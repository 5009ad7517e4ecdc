"""The documentation names only commands and options that exist."""

import dataclasses
import json
import re
from importlib import import_module
from pathlib import Path

import pytest

from lorascope.cli import COMMANDS
from lorascope.config import Options

ROOT = Path(__file__).parent.parent
CALL = re.compile(r"lorascope ([a-z]+)((?:(?!lorascope |&&|`|\n).)*)")


def options_of(command: str) -> set[str]:
    config = getattr(import_module(f"lorascope.{COMMANDS[command].module}"), COMMANDS[command].config)
    names = {f.name for cls in (config, Options) for f in dataclasses.fields(cls)} | {"config", "version", "help"}
    return {"--" + name.replace("_", "-") for name in names}


def test_commands_and_options_in_the_documentation_exist() -> None:
    calls = []
    for file in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for command, rest in CALL.findall(file.read_text(encoding="utf-8")):
            if not rest.lstrip().isupper() and rest and not rest.startswith((" STUDY", " [", " demo", " /", " -")):
                continue  # prose such as "lorascope trains"
            calls.append((file.name, command, rest))
            assert command in COMMANDS, f"{file.name}: lorascope {command}"
            unknown = set(re.findall(r"--[a-z-]+", rest)) - options_of(command)
            assert not unknown, f"{file.name}: lorascope {command} has no {unknown}"
    assert len(calls) > 10


def test_every_command_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"lorascope {name}" not in readme and f"make {name}" not in readme] == []


def test_the_readmes_table_is_what_the_benchmarks_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    table = import_module("bench").table
    results = json.loads((ROOT / "benchmarks" / "results.json").read_text(encoding="utf-8"))
    for key, row in results.items():
        assert {"ratio", "ours", "peer", "unit", "machine", "commit"} <= set(row), key
    assert table(results) in (ROOT / "README.md").read_text(encoding="utf-8")
