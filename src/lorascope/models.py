"""Base models and their tokenizers: hub id, local folder, GGUF file, or a built-in name."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorascope.builtin_model import BUILT_IN, built_in_folder, is_disk_full
from lorascope.errors import BadInput

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(name: str, device: str = "auto", dtype: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, in evaluation mode, and its tokenizer.

    `name`: a built-in name (`smollm2-135m-instruct`), a local folder, a GGUF file, or a hub id. `device`
    "auto" is CUDA, else Apple's MPS, else the CPU. `dtype` "auto" is float32 on the CPU, else the
    checkpoint's own. Only safetensors (or GGUF) weights are read and no code from the checkpoint is run.
    Raises BadInput, in one sentence, for anything that cannot be loaded.
    """
    import torch

    if dtype not in _DTYPES:
        raise BadInput(f"Unknown dtype {dtype!r}: choose one of {', '.join(_DTYPES)}.")
    chosen = _choose_device(device)
    number_type: Any = "auto" if dtype == "auto" else getattr(torch, dtype)
    if dtype == "auto" and chosen.type == "cpu":
        number_type = torch.float32
    source, gguf_file = _resolve(name)
    with _one_sentence(name):
        model = _from_pretrained(source, gguf_file, number_type)
    tokenizer = _load_tokenizer(name, source, gguf_file)
    return model.to(chosen).eval(), tokenizer


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; names as in `load_model`. Raises BadInput."""
    source, gguf_file = _resolve(name)
    return _load_tokenizer(name, source, gguf_file)


def _resolve(name: str) -> tuple[str, str | None]:
    """What from_pretrained takes for a name: a source and, for GGUF, the name of the file in it."""
    if name in BUILT_IN:
        return str(built_in_folder(name, _convert)), None
    path = Path(name).expanduser()
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise BadInput(f"{path} is not a GGUF file: give a model folder, a GGUF file or a hub id.")
        _require_gguf()
        return str(path.parent), path.name
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BadInput(f"{path} has no config.json: give a folder saved by transformers.")
        if not any((path / file).is_file() for file in _TOKENIZER_FILES):
            raise BadInput(f"{path} has no tokenizer: save the model's tokenizer in it too.")
        return str(path), None
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or name.endswith(".gguf"):
        known = ", ".join(BUILT_IN)
        raise BadInput(f"There is no model {name}: give a folder, a GGUF file, a hub id (owner/name) or {known}.")
    return name, None


def _from_pretrained(source: str, gguf_file: str | None, dtype: Any) -> Any:
    """The model as transformers loads it, on the CPU; ValueError when its files lack some of its weights."""
    from transformers import AutoModelForCausalLM, GgufConfig

    options: dict[str, Any] = {"use_safetensors": True}
    if gguf_file is not None:
        options = {"gguf_file": gguf_file, "quantization_config": GgufConfig(dequantize=True)}
    with _quiet(gguf=gguf_file is not None):
        loader: Any = AutoModelForCausalLM
        model, found = loader.from_pretrained(
            source, dtype=dtype, trust_remote_code=False, output_loading_info=True, **options
        )
    # transformers fills in random numbers and only warns.
    missing = sorted(found["missing_keys"]) + sorted(str(key) for key in found["mismatched_keys"])
    if missing:
        raise ValueError(f"{len(missing)} weights are missing or misshapen, such as {missing[0]}")
    return model


def _load_tokenizer(name: str, source: str, gguf_file: str | None) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with _one_sentence(name), _quiet(gguf=gguf_file is not None):
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
    except Exception as error:  # damaged files alone raise half a dozen kinds, few of them documented
        if is_disk_full(error):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[0].split(". ")[0].rstrip(".")
        raise BadInput(f"Could not load {name} ({reason}): check the name, its files and the network.") from error


@contextmanager
def _quiet(*, gguf: bool) -> Iterator[None]:
    """Without transformers' progress bars and loading messages; downloads keep theirs."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        # The bar of the GGUF reader has no switch.
        with redirect_stderr(io.StringIO()) if gguf else nullcontext():
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _convert(gguf_file: Path, folder: Path) -> None:
    """Dequantise a GGUF file to a folder of fp32 safetensors, as transformers saves it."""
    import torch

    source = str(gguf_file.parent)
    model = _from_pretrained(source, gguf_file.name, torch.float32)
    with _quiet(gguf=True):
        model.save_pretrained(folder)
    tokenizer: Any = _load_tokenizer(gguf_file.name, source, gguf_file.name)
    tokenizer.save_pretrained(folder)
