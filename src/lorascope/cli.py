"""The command line: `lorascope COMMAND STUDY [options]`. Each command is a stage's config and function.

Exit codes: 0 done, 1 a run failed or damage was found, 2 bad input or a missing earlier stage, 130 interrupted.
"""

import contextlib
import difflib
import errno
import json
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from lorascope import __version__
from lorascope.columns import aligned
from lorascope.config import Options, early_threads, parse_arguments
from lorascope.errors import BadInput, RunFailed

WIDEST = 160
"""Characters of a table's line; what would be wider is printed as blocks."""


@dataclass(frozen=True)
class Command:
    """Where a command's config and function are, and what it takes as STUDY."""

    module: str
    config: str
    function: str
    help: str
    takes: str = "study"
    """`study` (an existing one), `path` (a folder), or `optional` (a folder or nothing)."""
    said: str = ""
    """Where its result is put into words, as `module:function` (default: `readable`)."""
    one_heap: bool = False
    """It may ask a judge from many threads, which are to share a heap (`heap.share_heap`)."""


COMMANDS = {
    "demo": Command("demo", "DemoConfig", "run_demo", "the whole pipeline on the embedded default", "optional"),
    "new": Command("creation", "NewConfig", "create_study", "make a study from a model and traces", "path"),
    "status": Command("status", "StatusConfig", "show_status", "what was run, what is stale"),
    "doctor": Command("status", "DoctorConfig", "examine", "check the installation, or a study for damage", "optional"),
    "train": Command("training", "TrainConfig", "train", "train an adapter, or the full finetune"),
    "evaluate": Command("evaluation", "EvaluateConfig", "evaluate", "accuracy and recovery on problems"),
    "ablate": Command("ablation", "AblateConfig", "ablate", "KL of switching directions off"),
    "record": Command("recording", "RecordConfig", "record", "every scalar on every token"),
    "examples": Command("example_search", "ExamplesConfig", "examples", "what each feature responds to most"),
    "sae": Command("sae", "SAEConfig", "decompose", "a sparse autoencoder on the whole state"),
    "explain": Command(
        *("explain", "ExplainConfig", "explain_features", "explain features and score it"), one_heap=True
    ),
    "compare": Command(
        *("comparison", "CompareConfig", "compare", "kinds of features beside each other, with tests"),
        said="views.compare:comparison_text",
    ),
    "categorize": Command(
        *("explain.categories", "CategorizeConfig", "categorize", "what kinds of things they encode"), one_heap=True
    ),
    "reasoning": Command("reasoning", "ReasoningConfig", "find_reasoning", "which features fire at reasoning words"),
    "lens": Command("logit_lens", "LensConfig", "read_lens", "tokens that directions and latents read and write"),
    "steer": Command(
        *("steering", "SteerConfig", "steer_text", "text with features pushed, scaled, clamped or off"),
        said="steering.words:steering_text",
    ),
    "studio": Command("studio", "StudioConfig", "serve", "look, ask, steer and note in the browser"),
    "notes": Command("studio.notes", "NotesConfig", "show_notes", "notes of the studio; take in those of another copy"),
    "export": Command("export", "ExportConfig", "export_study", "files for PEFT, SAELens, Neuronpedia, or as CSV"),
    "report": Command("report", "ReportConfig", "write_report", "one HTML file of everything"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    verbose = "--verbose" in given
    try:
        return dispatch(given)
    except BadInput as error:
        return fail(str(error), 2, verbose)
    except RunFailed as error:
        return fail(str(error), 1, verbose)
    except KeyboardInterrupt:
        return fail("Interrupted; what was finished is kept, and the same command continues.", 130, verbose)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return fail(
                f"No space left on the disk ({error.filename or 'writing'}); free some and run again.", 1, verbose
            )
        return unexpected(error, given, verbose)
    except Exception as error:
        return unexpected(error, given, verbose)


def dispatch(given: list[str]) -> int:
    """Find the command, parse its options, run it, print its result."""
    if not given or given[0] in ("-h", "--help"):
        print(overview())
        return 0 if given else 2
    if given[0] == "--version":
        print(f"lorascope {__version__}")
        return 0
    name, rest = given[0], given[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        known = f"did you mean {near[0]}?" if near else f"commands are {', '.join(COMMANDS)}."
        raise BadInput(f"There is no command {name!r}; {known}")
    if "--version" in rest:
        print(f"lorascope {__version__}")
        return 0
    command = COMMANDS[name]
    limit_threads(early_threads(rest))  # before any library with threads of its own is loaded
    quieten()
    module = import_module(f"lorascope.{command.module}")
    config_class = getattr(module, command.config)
    try:
        path, config, options = parse_arguments(name, config_class, rest, study_required=command.takes != "optional")
    except SystemExit:  # --help was printed
        return 0
    limit_threads(options.threads)
    if command.one_heap:
        from lorascope.heap import share_heap

        share_heap()
    # Whatever a library prints belongs to stderr: with --json, stdout holds one document and nothing else.
    with contextlib.redirect_stdout(sys.stderr):
        result = getattr(module, command.function)(subject(command, path), config, options)
    print(json.dumps(result, ensure_ascii=False, allow_nan=False, indent=2) if options.json else words(command, result))
    return 1 if result.get("damaged") else 0


def subject(command: Command, path: str | None) -> Any:
    """What the command works on: an opened study, or a folder."""
    from lorascope.study import Study

    if command.takes == "study":
        return Study.open(str(path))
    return Path(path) if path is not None else None


def limit_threads(threads: int | None) -> None:
    """Apply --threads, to libraries that are yet to be loaded and to torch where it is loaded already.

    Raises:
        BadInput: fewer than one.
    """
    if threads is None:
        return
    if threads < 1:
        raise BadInput(f"--threads must be at least 1, not {threads}.")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)


def quieten() -> None:
    """Keep the libraries' own bars, advice and telemetry out of the output."""
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("HF_HUB_DISABLE_TELEMETRY", "1"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
    ):
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", module=r"(torch|transformers|accelerate|huggingface_hub)\.")


def overview() -> str:
    """The help of `lorascope` itself."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lorascope COMMAND STUDY [options]",
            "",
            "What a finetune taught a language model, read from the scalars of a rank-1 LoRA adapter.",
            "",
            *lines,
            "",
            "lorascope COMMAND --help shows a command's options. Every command has --seed --threads --device --dtype",
            "--json --verbose --config FILE.yaml --version.",
        ]
    )


def words(command: Command, result: dict[str, Any]) -> str:
    """What a command prints for a reader."""
    if not command.said:
        return readable(result)
    module, _, function = command.said.partition(":")
    return str(getattr(import_module(f"lorascope.{module}"), function)(result))


def readable(value: Any, indent: int = 0) -> str:
    """A result as indented `name: value` lines, numbers rounded, intervals on one; lists of like dicts as tables."""
    pad = "  " * indent
    if is_interval(value):
        number, low, high = (readable(inner) for inner in value.values())
        return f"{number} (no interval)" if value["low"] is None else f"{number} ({low} to {high})"
    if isinstance(value, dict):
        lines = []
        for key, inner in value.items():
            below = nested(inner)
            lines.append(f"{pad}{key}:\n{readable(inner, indent + 1)}" if below else f"{pad}{key}: {readable(inner)}")
        return "\n".join(lines)
    if isinstance(value, list):
        if flat(value):
            return ", ".join(quoted(item) for item in value)
        if all(flat(item) and len(item) == len(value[0]) for item in value):
            return "\n".join(pad + line for line in aligned([[quoted(cell) for cell in item] for item in value]))
        if lines := table_lines(value):
            return "\n".join(pad + line for line in lines)
        return "\n".join(f"{pad}-\n{readable(item, indent + 1)}" for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def quoted(value: Any) -> str:
    """A plain value in a list: texts with white space at an end, or none that can be seen, in quotes."""
    plain = not isinstance(value, str) or (value.isprintable() and value == value.strip() != "")
    return readable(value) if plain else repr(value)


def table_lines(rows: list[Any]) -> list[str]:
    """Dicts of the same names, with a plain value or an interval under each, as an aligned table; none of others, nor
    where it would be wider than a terminal may be."""
    names = list(rows[0]) if isinstance(rows[0], dict) else []
    alike = all(isinstance(row, dict) and list(row) == names for row in rows)
    if not names or not alike or any(nested(cell) for row in rows for cell in row.values()):
        return []
    lines = aligned([names, *([readable(cell) for cell in row.values()] for row in rows)])
    return lines if max(map(len, lines)) <= WIDEST else []


def nested(value: Any) -> bool:
    """Whether a value needs lines of its own."""
    return isinstance(value, dict | list) and bool(value) and not flat(value) and not is_interval(value)


def is_interval(value: Any) -> bool:
    """Whether a dict is a number (called value, mean, accuracy...) with the bounds of its interval."""
    return isinstance(value, dict) and list(value)[1:] == ["low", "high"]


def flat(value: Any) -> bool:
    """Whether a list holds only plain values."""
    return isinstance(value, list) and not any(isinstance(item, dict | list) for item in value)


def fail(text: str, code: int, verbose: bool) -> int:
    """One line to stderr."""
    if verbose:
        traceback.print_exc()
    print(f"lorascope: {text}", file=sys.stderr)
    return code


def unexpected(error: Exception, given: list[str], verbose: bool) -> int:
    """An error that lorascope did not foresee: one line, and the traceback where it can be found."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    folder = Path(given[1]) if len(given) > 1 else Path()
    if (folder / "study.json").is_file():
        with contextlib.suppress(OSError):  # a log that cannot be written must not hide the error
            with (folder / "log.txt").open("a", encoding="utf-8") as file:
                file.write(traceback.format_exc())
            return fail(f"{text} (the traceback is in {folder / 'log.txt'}).", 1, verbose)
    return fail(f"{text} (run again with --verbose for the traceback).", 1, verbose)


__all__ = ["COMMANDS", "Options", "main"]
