"""The shape of the source: floors, sizes, names, what may never appear. Read from the syntax tree; nothing runs."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "lorascope"
MAX_LINES = 500

# A module imports only from lower floors, or from its own package. Modules of one floor may use each other,
# except the stages, which meet in the study. A new module or package gets a line here.
FLOORS = {
    1: "errors config progress columns stats differences addresses decoders adapter peft_files models builtin_model "
    "token_text traces tasks heap",
    2: "study store store_writer features layers explained recovery selection",
    3: "attached sinks controls restart rank1 fused fused_reading prepacked packing edits memory generation kl "
    "training_plan training_state leave_one_out screening residual_norms comparison_cells comparison_tests",
    4: "creation training evaluation ablation recording example_search logit_lens comparison steering sae explain "
    "reasoning",
    5: "views status",
    6: "report studio export demo cli __main__",
}
STAGES = 4
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names.split()}

# Reading stages work without a language model; what must load one does so inside the function that needs it.
NO_LANGUAGE_MODEL = [
    *("example_search", "sae", "explain", "comparison", "comparison_cells", "reasoning", "logit_lens"),
    *("views", "report", "studio", "export"),
]
LANGUAGE_MODEL = {"transformers", "peft", "lorascope.models", "lorascope.attached", "lorascope.generation"}

# Import names of packages that are called something else on the registry.
PACKAGES = {
    "yaml": "pyyaml",
    "math_verify": "math-verify",
    "reasoning_gym": "reasoning-gym",
    "sentence_transformers": "sentence-transformers",
    "umap": "umap-learn",
}


@dataclass(frozen=True)
class Import:
    """One import statement's target: `lorascope.x.y` or a third-party module."""

    target: str
    line: int
    lazy: bool  # inside a function, so it costs nothing until the function runs
    typing_only: bool  # inside `if TYPE_CHECKING:`


def source_files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def module_name(file: Path) -> str:
    parts = list(file.relative_to(SOURCE.parent).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def top_module(name: str) -> str:
    """`lorascope.sae.training` -> `sae`; the package itself -> ``."""
    return name.split(".")[1] if "." in name else ""


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


@cache
def imports(file: Path) -> tuple[Import, ...]:
    name = module_name(file)
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    return tuple(_imports(tree(file).body, package, lazy=False, typing_only=False))


def _imports(body: list[ast.stmt], package: str, *, lazy: bool, typing_only: bool) -> Iterator[Import]:
    for node in body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, lazy, typing_only)
        elif isinstance(node, ast.ImportFrom):
            for target in _from_targets(node, package):
                yield Import(target, node.lineno, lazy, typing_only)
        else:
            inner = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            guarded = typing_only or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
            for field in ("body", "orelse", "finalbody"):
                block = getattr(node, field, [])
                here = guarded if field == "body" else typing_only
                yield from _imports(block, package, lazy=inner, typing_only=here)
            for handler in [*getattr(node, "handlers", []), *getattr(node, "cases", [])]:
                yield from _imports(handler.body, package, lazy=inner, typing_only=typing_only)


def _from_targets(node: ast.ImportFrom, package: str) -> list[str]:
    base = node.module or ""
    if node.level:
        parents = package.split(".")
        base = ".".join(parents[: len(parents) - node.level + 1] + ([node.module] if node.module else []))
    names = [f"{base}.{alias.name}" for alias in node.names]  # `from lorascope import store` names a module
    return [name if name in all_modules() or base == "lorascope" else base for name in names]


@cache
def all_modules() -> frozenset[str]:
    return frozenset(module_name(file) for file in source_files())


def import_cases() -> list[tuple[Path, Import]]:
    return [(file, found) for file in source_files() for found in imports(file)]


def tracked_files() -> list[Path]:
    """What git tracks, or every file of an unpacked source archive."""
    if (ROOT / ".git").exists():
        names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
        return [ROOT / name for name in names.stdout.split("\0") if name and (ROOT / name).is_file()]
    places = [ROOT / name for name in ("src", "tests", "docs", "scripts")]
    return [file for place in places for file in place.rglob("*") if file.is_file()]


def test_every_module_has_a_floor() -> None:
    homeless = {top_module(module_name(file)) for file in source_files()} - set(FLOOR) - {""}
    assert not homeless, f"give {sorted(homeless)} a floor in {Path(__file__).name}"


def test_modules_import_only_from_lower_floors() -> None:
    wrong = []
    for file, found in import_cases():
        here, there = top_module(module_name(file)), top_module(found.target)
        if not found.target.startswith("lorascope") or not here or here == there or not there:
            continue
        if FLOOR.get(there, 0) > FLOOR.get(here, 6):
            wrong.append(f"{file.relative_to(ROOT)}:{found.line} imports {there} from above")
    assert not wrong, "\n".join(wrong)


def test_stages_never_import_each_other() -> None:
    wrong = []
    for file, found in import_cases():
        here, there = top_module(module_name(file)), top_module(found.target)
        if here != there and FLOOR.get(here) == FLOOR.get(there) == STAGES:
            wrong.append(f"{file.relative_to(ROOT)}:{found.line} imports the stage {there}")
    assert not wrong, "\n".join(wrong)


def test_modules_do_not_import_in_circles() -> None:
    names = {module_name(file): file for file in source_files()}
    graph = {name: _loaded_at_import(file, set(names)) - {name} for name, file in names.items()}
    while free := {name for name, needs in graph.items() if not needs}:
        graph = {name: needs - free for name, needs in graph.items() if name not in free}
    assert not graph, f"these import each other in a circle, or need one that does: {sorted(graph)}"


def _loaded_at_import(file: Path, names: set[str]) -> set[str]:
    return {found.target for found in imports(file) if not found.lazy and not found.typing_only} & names


def test_package_itself_is_not_imported_from_within() -> None:
    """Its names load on first use, for users; inside, the version is all there is to take from it."""
    wrong = []
    for file, found in import_cases():
        name = found.target.removeprefix("lorascope.")
        if found.target == "lorascope" or (found.target not in all_modules() and name in public_names()):
            wrong.append(f"{file.relative_to(ROOT)}:{found.line} {found.target}")
    assert not wrong, f"import the module that defines the name, not the package: {wrong}"


def public_names() -> set[str]:
    """The names in `lorascope.__all__`."""
    for node in tree(SOURCE / "__init__.py").body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def test_reading_stages_load_no_language_model() -> None:
    wrong = []
    for file, found in import_cases():
        if top_module(module_name(file)) not in NO_LANGUAGE_MODEL or found.lazy or found.typing_only:
            continue
        if any(found.target == name or found.target.startswith(name + ".") for name in LANGUAGE_MODEL):
            wrong.append(f"{file.relative_to(ROOT)}:{found.line} imports {found.target}")
    assert not wrong, "\n".join(wrong)


def test_exported_names_are_not_module_names() -> None:
    """`ls.store` must be the module, whatever was imported first."""
    stems = {file.stem if file.stem != "__init__" else file.parent.name for file in source_files()}
    wrong = []
    for file in source_files():
        if file.name != "__init__.py":
            continue
        for node in tree(file).body:
            if isinstance(node, ast.ImportFrom) and node.module != module_name(file):  # else: its own modules
                names = [alias.asname or alias.name for alias in node.names]
                wrong += [f"{file.relative_to(ROOT)}:{node.lineno} {name}" for name in names if name in stems]
    assert not wrong, f"exported under the name of a module: {wrong}"


def test_no_file_is_past_one_reading() -> None:
    files = [file for place in ("src", "tests", "benchmarks") for file in (ROOT / place).rglob("*.py")]
    long = {
        str(file.relative_to(ROOT)): lines
        for file in files
        if (lines := len(file.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert not long, f"over {MAX_LINES} lines: {long}"


def test_every_import_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    core = _package_names(project["dependencies"])
    readers = ("peft", "math", "gym", "hub", "web", "judge", "embed", "umap")
    reader_extras = _package_names([line for extra in readers for line in extras[extra]])
    wrong = []
    for file, found in import_cases():
        top = found.target.split(".")[0]
        package = PACKAGES.get(top, top)
        if top in sys.stdlib_module_names or top == "lorascope" or package in core:
            continue
        if package not in reader_extras or not (found.lazy or found.typing_only):
            wrong.append(f"{file.relative_to(ROOT)}:{found.line} {top}")
    assert not wrong, f"not a core dependency, or an extra's package imported outside a function: {wrong}"


def test_every_core_dependency_is_used() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    used = {PACKAGES.get(top, top) for _, found in import_cases() for top in [found.target.split(".")[0]]}
    indirect = {"gguf", "tokenizers", "jinja2", "accelerate"}  # transformers imports these by itself
    unused = _package_names(project["dependencies"]) - used - indirect
    assert not unused, f"declared and never imported: {sorted(unused)}"


def _package_names(requirements: list[str]) -> set[str]:
    return {match[0].lower() for line in requirements if (match := re.match(r"[A-Za-z0-9_.-]+", line))}


@pytest.mark.parametrize(
    "name", ["pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"], ids=lambda name: name
)
def test_source_does_not_unpickle(name: str) -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{found.line}" for file, found in import_cases() if found.target.split(".")[0] == name
    ]
    assert not wrong, f"{name} runs code from files: {wrong}"


def test_source_runs_no_code_from_files() -> None:
    """`torch.load` only with weights_only=True, never allow_pickle, trust_remote_code, eval or exec."""
    wrong = []
    for file in source_files():
        for node in ast.walk(tree(file)):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if (
                (called == "torch.load" and options.get("weights_only") != "True")
                or options.get("allow_pickle", "False") != "False"
                or options.get("trust_remote_code", "False") != "False"
                or called in {"eval", "exec"}
            ):
                wrong.append(f"{file.relative_to(ROOT)}:{node.lineno} {called}")
    assert not wrong, "\n".join(wrong)


def test_no_path_of_one_machine_is_tracked() -> None:
    slash = "/"
    private = re.compile("|".join([f"{slash}(?:work|farm|root){slash}", r"[.][.]" + slash + "shared"]))
    wrong = []
    for file in tracked_files():
        content = file.read_bytes()
        if b"\0" in content[:8192]:
            continue
        for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), start=1):
            if private.search(line):
                wrong.append(f"{file.relative_to(ROOT)}:{number}")
    assert not wrong, f"paths that exist on one machine only: {wrong}"
