"""One frozen dataclass per command is its options, its `--help`, its docs and its saved JSON.

A field's help is the string literal below it, where it is inherited that of the class that names it; a tuple is an
option that may be given several times. Flags stand over the YAML file, the file over the defaults.
"""

import argparse
import ast
import contextlib
import dataclasses
import inspect
import itertools
import textwrap
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from lorascope.errors import BadInput

Config = TypeVar("Config")


@dataclass(frozen=True)
class Options:
    """Options that every command has."""

    seed: int = 0
    """Seed of every random draw."""
    threads: int | None = None
    """Number of CPU threads (default: PyTorch's choice)."""
    device: str = "auto"
    """Device to run the model on: auto, cpu, cuda, cuda:1, mps."""
    dtype: str = "auto"
    """Precision of the model: auto, float32, bfloat16, float16 (auto: float32 on a CPU)."""
    json: bool = False
    """Write one JSON document to stdout and everything else to stderr."""
    verbose: bool = False
    """Say more; show the traceback of an error."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one sentence (`BadInput`) instead of a usage dump."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting."""
        raise BadInput(f"{message[0].upper()}{message[1:]}; see {self.prog} --help.")


def field_docs(cls: type) -> dict[str, str]:
    """The string literal below each field of a dataclass, by field name: its own fields first, then inherited ones."""
    docs = own_docs(cls)
    for base in filter(dataclasses.is_dataclass, cls.__mro__[1:]):
        docs = docs | {name: text for name, text in own_docs(base).items() if name not in docs}
    return docs


def own_docs(cls: type) -> dict[str, str]:
    """The string literal below each field that the class itself names."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    body = typing.cast(ast.ClassDef, tree.body[0]).body
    docs: dict[str, str] = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            docs[typing.cast(ast.Name, field.target).id] = inspect.cleandoc(str(text.value.value))
    return docs


def plain_type(annotation: Any) -> Any:
    """`int` for `int` and for `int | None`."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return next(t for t in typing.get_args(annotation) if t is not type(None))
    return annotation


def add_fields(parser: argparse.ArgumentParser, cls: type, title: str) -> None:
    """Add one option per field of the dataclass; unset options are left out of the result."""
    group = parser.add_argument_group(title)
    docs, hints = field_docs(cls), typing.get_type_hints(cls)
    order = list(docs)  # a command's own options before those that it shares
    for field in sorted(dataclasses.fields(cls), key=lambda field: order.index(field.name)):
        flag = "--" + field.name.replace("_", "-")
        kind = plain_type(hints[field.name])
        hidden = (dataclasses.MISSING, None, "", False, ())
        default = ", ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        shown = "" if field.default in hidden else f" (default: {default})"
        text = (docs[field.name] + shown).replace("%", "%%")
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            several = typing.get_origin(kind) is tuple
            group.add_argument(
                flag,
                type=typing.get_args(kind)[0] if several else kind,
                action="append" if several else "store",
                default=argparse.SUPPRESS,
                help=text,
                metavar=field.name.upper(),
            )


def build_parser(command: str, cls: type, *, study_required: bool = True) -> Parser:
    """The parser of `lorascope COMMAND STUDY [options]` for a config dataclass."""
    parser = Parser(prog=f"lorascope {command}", description=inspect.getdoc(cls), allow_abbrev=False, add_help=True)
    default = {} if study_required else {"nargs": "?", "default": "demo-study" if command == "demo" else None}
    parser.add_argument("study", metavar="STUDY", help="Folder of the study.", **default)  # type: ignore[arg-type]
    add_fields(parser, cls, "options of this command")
    add_fields(parser, Options, "options of every command")
    parser.add_argument("--config", metavar="FILE.yaml", help="Read options from a YAML file; flags stand over it.")
    return parser


def parse_arguments(
    command: str, cls: type[Config], arguments: list[str], *, study_required: bool = True
) -> tuple[str | None, Config, Options]:
    """Parse a command line into (study path, the command's config, the global options).

    Raises:
        BadInput: an unknown or malformed option, or an unknown key in the YAML file.
    """
    parser = build_parser(command, cls, study_required=study_required)
    values = vars(parser.parse_args(arguments))
    study, file = values.pop("study"), values.pop("config")
    merged = (read_yaml(Path(file), (cls, Options)) if file else {}) | values
    return study, make_config(cls, merged), make_config(Options, merged)


def early_threads(arguments: list[str]) -> int | None:
    """The number of threads asked for by flag or in the YAML file; what is wrong there, `parse_arguments` says."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--config")
    given = parser.parse_known_args(arguments)[0]
    if given.threads is not None or given.config is None:
        return given.threads
    import yaml

    with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
        values = yaml.safe_load(Path(given.config).read_text(encoding="utf-8"))
        threads = values.get("threads") if isinstance(values, dict) else None
        return threads if isinstance(threads, int) and not isinstance(threads, bool) else None
    return None


def read_yaml(file: Path, classes: tuple[type, ...]) -> dict[str, Any]:
    """Options from a YAML mapping; keys as on the command line, with `-` or `_`."""
    import yaml

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInput(f"Cannot read {file} as YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise BadInput(f"{file} must hold a mapping of option names to values.")
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    types_ = {f.name: plain_type(typing.get_type_hints(c)[f.name]) for c in classes for f in dataclasses.fields(c)}
    for key, value in values.items():
        if key not in types_:
            raise BadInput(f"{file} has an unknown key {key!r}; known keys are {', '.join(sorted(types_))}.")
        values[key] = checked_value(file, key, value, types_[key])
    return values


def checked_value(file: Path, key: str, value: Any, kind: type) -> Any:
    """The value as the field's type; YAML's own types must already agree, but for int to float."""
    if value is None:
        return None
    if typing.get_origin(kind) is tuple:
        each = typing.get_args(kind)[0]
        return [checked_value(file, key, item, each) for item in (value if isinstance(value, list) else [value])]
    if isinstance(value, bool) != (kind is bool):
        raise BadInput(f"{file}: {key} must be of type {kind.__name__}, not {value!r}.")
    if kind is str:
        return str(value)
    try:
        converted = kind(value)
    except (TypeError, ValueError) as error:
        raise BadInput(f"{file}: {key} must be of type {kind.__name__}, not {value!r}.") from error
    if kind is int and converted != value:
        raise BadInput(f"{file}: {key} must be of type int, not {value!r}.")
    return converted


def make_config(cls: type[Config], values: dict[str, Any]) -> Config:
    """An instance of the dataclass from those of the values that are its fields.

    Raises:
        BadInput: a field without a default has no value.
    """
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    if missing := [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in values]:
        raise BadInput(f"--{missing[0].replace('_', '-')} is required; see --help.")
    given = {f.name: values[f.name] for f in fields if f.name in values}
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
