"""The text of tokens, without transformers: exact pieces of a sequence, and readable names of vocabulary
entries.

Decoding tokens one by one breaks characters whose UTF-8 bytes are spread over several tokens (most emoji,
many CJK characters). So every token is first mapped to the bytes it stands for, and a sequence is decoded
from its joined bytes: a piece with an unfinished character is empty there and the character belongs to the
token that completes it.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer

from lorascope.errors import BadInput


class HasTokenizer(Protocol):
    """A transformers fast tokenizer: it carries the `tokenizers.Tokenizer` it is made of."""

    backend_tokenizer: Any


@dataclass(frozen=True)
class TokenTable:
    """What each vocabulary id stands for.

    `names[i]` is how the vocabulary writes id i, None for an id that the tokenizer does not know; its bytes are worked
    out when they are asked for. `kind` is how these are joined: "bytelevel" (GPT-2, Llama 3, Qwen), "sentencepiece"
    (Llama 2, Mistral, Gemma: runs of byte tokens are text only when they are whole) or "other" (decoded by the
    tokenizer itself). `space` is what a sentencepiece name writes for a space, `byte_names` whether names such as
    `<0x0A>` are bytes. `added` are the ids beside the vocabulary, `special` those of special tokens. `tokenizer`
    decodes what is of no known kind; others may do without it.
    """

    names: tuple[str | None, ...]
    kind: str
    space: str
    byte_names: bool
    strips_first_space: bool
    added: frozenset[int]
    special: frozenset[int]
    tokenizer: Tokenizer | None

    def __len__(self) -> int:
        return len(self.names)

    def is_byte(self, number: int) -> bool:
        """Whether an id is a byte of a sentencepiece vocabulary."""
        name = self.names[number] if 0 <= number < len(self) else None
        return self.byte_names and name is not None and _is_byte_name(name)

    def piece(self, number: int) -> bytes:
        """The bytes of an id; none for one that the tokenizer does not know."""
        name = self.names[number] if 0 <= number < len(self) else None
        if name is None:
            return b""
        if self.kind == "bytelevel":
            return _bytes_of(name)
        if self.is_byte(number):
            return bytes([int(name[3:5], 16)])
        if number not in self.added and self.kind == "sentencepiece":
            name = name.replace(self.space, " ")
        elif number not in self.added and self.tokenizer is not None:
            name = self.tokenizer.decode([number], skip_special_tokens=False)
        return name.encode("utf-8", "replace")

    @cached_property
    def pieces(self) -> tuple[bytes, ...]:
        """The bytes of every id."""
        return tuple(self.piece(number) for number in range(len(self)))


def open_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer saved in a folder (its `tokenizer.json`) or in that file itself. BadInput when there is
    none."""
    return Tokenizer.from_file(str(_file_in(folder)))


def open_table(folder: str | Path) -> TokenTable:
    """`token_table(open_tokenizer(folder))` in a fraction of the time: the file's merges are left alone."""
    path = _file_in(folder)
    try:
        table = _table_of(json.loads(path.read_text(encoding="utf-8")), None)
    except (ValueError, LookupError, TypeError) as error:
        raise BadInput(f"{path} is damaged ({error}); save the model's fast tokenizer there again.") from error
    return table if table.kind != "other" else token_table(open_tokenizer(path))


def token_table(tokenizer: Tokenizer | HasTokenizer | TokenTable) -> TokenTable:
    """The table of a tokenizer (of `tokenizers`, or a transformers fast one); made once per tokenizer."""
    if isinstance(tokenizer, TokenTable):
        return tokenizer
    return _build_table(tokenizer if isinstance(tokenizer, Tokenizer) else tokenizer.backend_tokenizer)


def token_texts(tokenizer: Tokenizer | HasTokenizer | TokenTable, ids: Sequence[int]) -> list[str]:
    """One piece of text per id of a sequence; joined, they are exactly the tokenizer's decoding of the
    sequence.

    A character spread over several tokens is in the piece of the token that completes it (the earlier ones
    lack it); bytes that never make a character show as U+FFFD. Special tokens are kept. Ids the tokenizer
    does not know are "".
    """
    table = token_table(tokenizer)
    numbers = [int(i) for i in ids]
    if table.tokenizer is not None and table.kind == "other":
        return _texts_by_prefix(table.tokenizer, numbers)
    pieces = [table.piece(i) for i in numbers]
    if table.kind == "bytelevel":
        texts = _decode_incrementally(pieces)
    else:
        texts = _decode_with_fallback(pieces, [table.is_byte(i) for i in numbers])
    if table.strips_first_space and texts and texts[0].startswith(" "):
        texts[0] = texts[0][1:]
    return texts


def vocabulary_texts(tokenizer: Tokenizer | HasTokenizer | TokenTable) -> list[str]:
    """A readable string for every vocabulary id: its text, or its bytes as `<E2 80>` when they are no whole
    text."""
    return [_text_or_bytes(piece) for piece in token_table(tokenizer).pieces]


def readable(text: str) -> str:
    """A piece of text on one line and in quotes, as in descriptions: a line break shows as `\\n`, a tab as
    `\\t`."""
    shown = text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    return f'"{shown}"' if "'" in shown else f"'{shown}'"


def vocabulary_text(table: TokenTable, number: int) -> str:
    """`vocabulary_texts` of one id, "" where there is no such id."""
    return _text_or_bytes(table.piece(number))


def _file_in(folder: str | Path) -> Path:
    path = Path(folder)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise BadInput(f"There is no tokenizer.json at {path}: save the model's fast tokenizer there.")
    return path


def _text_or_bytes(piece: bytes) -> str:
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return "<" + piece.hex(" ").upper() + ">"


def _decode_incrementally(pieces: Sequence[bytes]) -> list[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = [decoder.decode(piece) for piece in pieces]
    if texts:
        texts[-1] += decoder.decode(b"", final=True)
    return texts


def _decode_with_fallback(pieces: Sequence[bytes], is_byte: Sequence[bool]) -> list[str]:
    """Runs of byte tokens are decoded together; a run that is no valid UTF-8 gives one U+FFFD per token."""
    texts: list[str] = []
    start = 0
    while start < len(pieces):
        end = start + 1
        while end < len(pieces) and is_byte[end] == is_byte[start]:
            end += 1
        run = pieces[start:end]
        if not is_byte[start]:
            texts += [piece.decode("utf-8", "replace") for piece in run]
        else:
            try:
                b"".join(run).decode("utf-8")
                texts += _decode_incrementally(run)
            except UnicodeDecodeError:
                texts += ["\ufffd"] * len(run)
        start = end
    return texts


def _texts_by_prefix(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Pieces from decodings of growing prefixes: exact for any decoder that only appends, quadratic in
    length."""
    texts: list[str] = []
    before = ""
    for end in range(1, len(ids) + 1):
        now = tokenizer.decode(ids[:end], skip_special_tokens=False)
        texts.append(now[len(before) :] if now.startswith(before) else "")
        before = now if now.startswith(before) else before
    return texts


@lru_cache(maxsize=4)
def _build_table(tokenizer: Tokenizer) -> TokenTable:
    return _table_of(json.loads(tokenizer.to_str()), tokenizer)


def _table_of(said: dict[str, Any], tokenizer: Tokenizer | None) -> TokenTable:
    """The table of what a tokenizer.json says. The tokenizer itself is needed only for decoders of another kind."""
    steps = _decoder_steps(said.get("decoder") or {})
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        kind, space = "bytelevel", ""
    elif kinds & {"ByteFallback", "Metaspace"}:
        kind, space = "sentencepiece", _space_mark(steps)
    else:
        kind, space = "other", ""
    added = {token["id"]: token for token in said.get("added_tokens", [])}
    return TokenTable(
        names=tuple(_names(said["model"]["vocab"], added)),
        kind=kind,
        space=space,
        byte_names=kind == "sentencepiece" and "ByteFallback" in kinds,
        strips_first_space=_strips_first_space(steps),
        added=frozenset(added),
        special=frozenset(number for number, token in added.items() if token.get("special")),
        tokenizer=tokenizer,
    )


def _names(vocabulary: dict[str, int] | list[Any], added: dict[int, Any]) -> list[str | None]:
    """The name of each id: a vocabulary is a mapping from names, or a list of [name, score]."""
    known = vocabulary.items() if isinstance(vocabulary, dict) else ((pair[0], i) for i, pair in enumerate(vocabulary))
    numbered = {number: name for name, number in known} | {number: token["content"] for number, token in added.items()}
    return [numbered.get(number) for number in range(max(numbered, default=-1) + 1)]


def _bytes_of(name: str) -> bytes:
    """The bytes that a name of a byte-level vocabulary stands for; a name in other characters is itself."""
    try:
        return name.translate(_byte_alphabet()).encode("latin-1")
    except UnicodeEncodeError:
        return name.encode("utf-8", "replace")


def _decoder_steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder.get("type") == "Sequence":
        return [step for part in decoder["decoders"] for step in _decoder_steps(part)]
    return [decoder] if decoder else []


def _space_mark(steps: list[dict[str, Any]]) -> str:
    """The character that stands for a space in a sentencepiece vocabulary (U+2581 unless the decoder says
    other)."""
    for step in steps:
        if step["type"] == "Metaspace":
            return str(step.get("replacement", "\u2581"))
        if step["type"] == "Replace" and step.get("content") == " ":
            return str(step["pattern"].get("String", "\u2581"))
    return "\u2581"


def _strips_first_space(steps: list[dict[str, Any]]) -> bool:
    for step in steps:
        if step["type"] == "Strip" and step.get("content") == " " and step.get("start", 0) > 0:
            return True
        if step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never":
            return True
    return False


def _is_byte_name(name: str) -> bool:
    return len(name) == 6 and name.startswith("<0x") and name.endswith(">")


@cache
def _byte_alphabet() -> dict[int, str]:
    """Character of a byte-level vocabulary -> the character of its byte's number: printable Latin-1 stands for itself,
    the rest is moved past U+0100. A character that stands for no byte goes beyond all bytes."""
    itself = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = [byte for byte in range(256) if byte not in itself]
    return dict.fromkeys(moved, "\uffff") | {0x100 + k: chr(byte) for k, byte in enumerate(moved)}
