"""The study: a folder with everything made from one model, one adapter and their corpora.

`study.json` is its manifest: what it was made from, and a record per stage (inputs' hashes, config, seconds,
peak memory, result). A stage whose inputs and config did not change is not run again.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock, Timeout

from lorascope.config import Options
from lorascope.errors import BadInput, MissingStage, RunFailed
from lorascope.traces import Renderer, Trace, load_traces

FORMAT = 1
VERSIONED = ("lorascope", "torch", "transformers", "tokenizers", "numpy", "safetensors", "peft")
# Options that change results; the others (threads, json, verbose) do not make a stage stale.
RESULT_OPTIONS = ("seed", "dtype")
# Files that several records of one stage fill together: writing one again outdates no other record.
SHARED_OUTPUTS = ("examples/levels.json", "explanations/*.jsonl")


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_text(path: Path, text: str) -> None:
    """`atomic_write_bytes` for text, as UTF-8."""
    atomic_write_bytes(path, text.encode("utf-8"))


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `folder` at the end; after an error the old one stays."""
    new = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(new, ignore_errors=True)  # of a run that was killed
    new.mkdir(parents=True)
    try:
        yield new
        put_folder(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def put_folder(new: Path, folder: Path) -> None:
    """Move a finished folder to where another may be: a kill leaves the old one, the new one or none, never a mix."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically; NaN and infinities are refused, since no reader agrees on them."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file of the study.

    Raises:
        BadInput: the file is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is damaged ({error}); restore it or make the study anew.") from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of `stream_rows` at once."""
    return list(stream_rows(path))


def stream_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The whole rows of a JSON Lines file, one in memory at a time; none when there is no file.

    An unfinished last line is left out.

    Raises:
        RunFailed: a finished line is not JSON.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line)
            except ValueError as error:
                raise RunFailed(
                    f"{path}, line {number} is damaged; remove the line and run its stage again."
                ) from error


def digest(value: object) -> str:
    """SHA-256 of a JSON-ready value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that results may depend on."""
    found = {"python": platform.python_version(), "machine": f"{platform.machine()}, {os.cpu_count()} CPUs"}
    for name in VERSIONED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def reset_peak_memory() -> None:
    """Start a new peak of resident memory for this process (Linux; elsewhere the peak is the process's)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Peak resident memory in bytes since `reset_peak_memory`, or of the whole process."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


@dataclass(frozen=True)
class Study:
    """A study folder, opened. The manifest is read from disk each time, so two handles never disagree."""

    path: Path

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        model: str,
        system: str | None,
        markup: str = "think",
        max_tokens: int | None = None,
        too_long: str = "truncate",
        seed: int = 0,
    ) -> "Study":
        """Make an empty study.

        Raises:
            BadInput: the folder exists and is not empty.
        """
        path = Path(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise BadInput(f"{path} already exists; name a new folder, or remove it first.")
        study = cls(path)
        manifest = {
            "format": FORMAT,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": model,
            "adapter": None,
            "system": system,
            "markup": markup,
            "max_tokens": max_tokens,
            "too_long": too_long,
            "seed": seed,
            "corpora": {},
            "versions": versions(),
            "stages": {},
        }
        (path / "traces").mkdir(parents=True, exist_ok=True)
        write_json(path / "study.json", manifest)
        return study

    @classmethod
    def open(cls, path: str | Path) -> "Study":
        """Open an existing study.

        Raises:
            BadInput: there is no study at this path, or it is of a newer format.
        """
        study = cls(Path(path))
        if not (study.path / "study.json").is_file():
            raise BadInput(f"{path} is not a study; make one with: lorascope new {path} --model M --traces T.")
        manifest = study.manifest
        if not isinstance(manifest, dict) or "model" not in manifest:
            raise BadInput(f"{path}/study.json is damaged; restore it or make the study anew.")
        if manifest.get("format", 0) > FORMAT:
            raise BadInput(f"{path} was made by a newer lorascope; update lorascope to open it.")
        return study

    @property
    def manifest(self) -> dict[str, Any]:
        """The content of `study.json`."""
        return read_json(self.path / "study.json")

    @property
    def model_name(self) -> str:
        """The base model: hub id, folder, GGUF file or built-in name."""
        return str(self.manifest["model"])

    @property
    def summary(self) -> dict[str, Any]:
        """The headline numbers (`summary.json`), empty before the first stage."""
        path = self.path / "summary.json"
        return read_json(path) if path.exists() else {}

    def renderer(self, tokenizer: Any) -> Renderer:
        """The study's one way to turn a trace into tokens."""
        m = self.manifest
        return Renderer(
            tokenizer,
            system=m["system"],
            markup=m["markup"],
            max_tokens=m["max_tokens"],
            too_long=m["too_long"],
        )

    def corpora(self) -> list[str]:
        """Names of the corpora, in the order in which they were added."""
        return list(self.manifest["corpora"])

    def corpus_file(self, name: str) -> Path:
        """Where the normalised traces of a corpus are (or will be)."""
        if not name.replace("-", "").replace("_", "").isalnum():
            raise BadInput(f"The corpus name {name!r} may hold only letters, digits, - and _.")
        return self.path / "traces" / f"{name}.jsonl"

    def traces(self, name: str) -> list[Trace]:
        """The traces of a corpus, as `each_trace` gives them."""
        return list(self.each_trace(name))

    def each_trace(self, name: str) -> Iterator[Trace]:
        """The traces of a corpus, read one by one as they are taken.

        Raises:
            BadInput: no corpus of that name.
        """
        file = self.corpus_file(name)
        if not file.is_file():
            known = ", ".join(self.corpora()) or "none yet"
            raise BadInput(
                f"{self.path} has no corpus {name!r} (there are: {known}); add it with: "
                f"lorascope record {self.path} --corpus {name} --traces FILE."
            )
        return load_traces(file)

    def require(self, relative: str, command: str) -> Path:
        """The path of an earlier stage's output.

        Raises:
            MissingStage: it does not exist; the message names the command that makes it.
        """
        path = self.path / relative
        if not path.exists():
            raise MissingStage(f"{path} is missing; run first: {command.replace('STUDY', str(self.path))}.")
        return path

    def update_manifest(self, **changes: Any) -> None:
        """Set top-level keys of `study.json`; `corpora` and `stages` are merged by name."""
        with self._manifest_lock():
            manifest = self.manifest
            for key, value in changes.items():
                if key in ("corpora", "stages"):
                    manifest[key] = manifest[key] | value
                else:
                    manifest[key] = value
            write_json(self.path / "study.json", manifest)

    def summarise(self, numbers: dict[str, Any]) -> None:
        """Merge numbers into `summary.json`, nested dicts key by key."""
        with self._manifest_lock():
            write_json(self.path / "summary.json", merged(self.summary, numbers))

    def forget(self, stage: str, *headlines: str) -> None:
        """Take back a stage that no longer holds: its outputs, its record, and headline numbers by name."""
        with self._manifest_lock():
            manifest, summary = self.manifest, self.summary
            record = manifest["stages"].pop(stage, None)
            for path in [self.path / output for output in record["outputs"]] if record else ():
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            write_json(self.path / "study.json", manifest)
            summary.get("stages", {}).pop(stage, None)
            write_json(self.path / "summary.json", {k: v for k, v in summary.items() if k not in headlines})

    def expire(self, stage: str, unless: object = None) -> None:
        """Have a stage run again, changed or not, unless its last result has this `"method"`; its outputs stay."""
        record = self.manifest["stages"].get(stage)
        if record and (unless is None or record["result"].get("method") != unless):
            self.update_manifest(stages={stage: record | {"options": {}}})

    def log(self, text: str) -> None:
        """Append a dated line to `log.txt`."""
        with (self.path / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {text}\n")

    def fingerprint(self, relative: str) -> str | None:
        """SHA-256 of a file, or of the names and contents of a folder; None when it does not exist.

        `FILE.json#KEY` is one entry of a file that several runs fill. Contents are hashed once per (size, modification
        time); names that start with a dot are left out.
        """
        relative, _, key = relative.partition("#")
        path = self.path / relative
        if key:
            return digest(read_json(path).get(key)) if path.is_file() else None
        if path.is_file():
            return self._file_hash(path)
        if not path.is_dir():
            return None
        files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        return digest([[p.relative_to(path).as_posix(), self._file_hash(p)] for p in files])

    def run(
        self,
        stage: str,
        config: Any,
        options: Options,
        *,
        inputs: Sequence[str],
        outputs: Sequence[str],
        work: Callable[[], dict[str, Any]],
    ) -> dict[str, Any]:
        """Run a stage once: skip it when its inputs, config, seed and outputs are as recorded.

        Records of other stages that claim one of its outputs are dropped: that output is now this stage's.

        Args:
            stage: the stage's name, with its variant where it has several (`record:heldout:base`).
            config: the stage's frozen dataclass.
            inputs, outputs: paths relative to the study. Inputs' hashes decide whether the stage is stale.
            work: does the work and returns a JSON-ready result, which is kept in the record.

        Returns:
            The result of `work`, or the recorded one.

        Raises:
            BadInput: another process is running a stage of this study.
        """
        wanted = {
            "config": dataclasses.asdict(config),
            "options": {name: getattr(options, name) for name in RESULT_OPTIONS},
            "inputs": {name: self.fingerprint(name) for name in inputs},
        }
        record = self.manifest["stages"].get(stage)
        same = record and all(record[key] == value for key, value in json.loads(json.dumps(wanted)).items())
        if same and all((self.path / output).exists() for output in outputs):
            self.log(f"{stage}: up to date")
            return record["result"]
        with self._stage_lock(stage):
            self.log(f"{stage}: started")
            reset_peak_memory()
            started = time.perf_counter()
            result = work()
            seconds, peak = round(time.perf_counter() - started, 2), peak_memory()
        done = wanted | {
            "outputs": list(outputs),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": seconds,
            "peak_rss": peak,
            "versions": versions(),
            "result": result,
        }
        self._keep_record(stage, done)
        self.summarise({"stages": {stage: {"seconds": seconds, "peak_rss": peak}}})
        self.log(f"{stage}: done in {seconds} s, peak {peak / 2**30:.2f} GiB")
        return result

    def status(self) -> list[dict[str, Any]]:
        """One row per recorded stage: `{"stage", "state", "why", "seconds", "peak_rss", "finished"}`.

        `state` is `done`, `stale` (an input changed since) or `incomplete` (an output is gone).
        """
        rows, fingerprint = [], cache(self.fingerprint)
        for stage, record in self.manifest["stages"].items():
            changed, gone = self.changes(record, fingerprint)
            state = "incomplete" if gone else "stale" if changed else "done"
            why = f"{', '.join(gone)} missing" if gone else f"{', '.join(changed)} changed" if changed else ""
            kept = {key: record[key] for key in ("seconds", "peak_rss", "finished")}
            rows.append({"stage": stage, "state": state, "why": why} | kept)
        return rows

    def changes(
        self, record: dict[str, Any], fingerprint: Callable[[str], str | None] | None = None
    ) -> tuple[list[str], list[str]]:
        """What is no longer as a stage's record says: inputs that changed, outputs that are gone.

        Args:
            fingerprint: what remembers `fingerprint` for the records of one look at the study.
        """
        find = fingerprint or self.fingerprint
        changed = [name for name, hash_ in record["inputs"].items() if find(name) != hash_]
        return changed, [name for name in record["outputs"] if not (self.path / name).exists()]

    def holds(self, record: dict[str, Any]) -> bool:
        """Whether a record is of what the study has now."""
        changed, gone = self.changes(record)
        return not changed and not gone

    def is_current(self, stage: str) -> bool:
        """Whether a stage's record, if there is one, is of what the study has now."""
        record = self.manifest["stages"].get(stage)
        return record is None or self.holds(record)

    def _keep_record(self, stage: str, record: dict[str, Any]) -> None:
        own = {output for output in record["outputs"] if not is_shared(output)}
        with self._manifest_lock():
            manifest = self.manifest
            stages = manifest["stages"]
            over = [name for name, old in stages.items() if name != stage and own & set(old.get("outputs", ()))]
            manifest["stages"] = {name: old for name, old in stages.items() if name not in over} | {stage: record}
            write_json(self.path / "study.json", manifest)
            if over and (summary := self.summary):
                kept = {name: numbers for name, numbers in summary.get("stages", {}).items() if name not in over}
                write_json(self.path / "summary.json", summary | {"stages": kept})
        if over:
            self.log(f"{stage}: wrote over outputs of {', '.join(over)}, whose records are dropped")

    def _file_hash(self, path: Path) -> str:
        cache_file = self.path / ".fingerprints.json"
        try:
            known = cache_file.stat()
            cache = read_fingerprints(cache_file, known.st_size, known.st_mtime_ns)
        except (OSError, ValueError):
            cache = {}
        stat = path.stat()
        key, seen = str(path.relative_to(self.path)), [stat.st_size, stat.st_mtime_ns]
        if key in cache and cache[key][:2] == seen:
            return str(cache[key][2])
        with path.open("rb") as file:
            hash_ = hashlib.file_digest(file, "sha256").hexdigest()
        with contextlib.suppress(OSError):  # a study that cannot be written to can still be looked at
            atomic_write_text(cache_file, json.dumps(cache | {key: [*seen, hash_]}))
        return hash_

    @contextlib.contextmanager
    def _stage_lock(self, stage: str) -> Iterator[None]:
        lock = FileLock(self.path / ".stage.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise BadInput(f"Another lorascope command is working on {self.path}; wait for it to end.") from error
        try:
            yield
        except BaseException:
            self.log(f"{stage}: did not finish")
            raise
        finally:
            lock.release()

    def _manifest_lock(self) -> FileLock:
        return FileLock(self.path / ".manifest.lock", timeout=30)


@lru_cache(maxsize=4)
def read_fingerprints(file: Path, size: int, modified: int) -> dict[str, list[Any]]:
    """The hashes that are known, of one state of their file: {file: [size, modification time, hash]}."""
    return dict(json.loads(file.read_text()))


def is_shared(relative: str) -> bool:
    """Whether several records of one stage fill this file of a study together (`SHARED_OUTPUTS`)."""
    return any(PurePosixPath(relative).match(pattern) for pattern in SHARED_OUTPUTS)


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`old` with `new` laid over it, nested dicts key by key."""
    result = dict(old)
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result
