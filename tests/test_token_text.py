"""Token texts: pieces join to the exact decoding, also where characters are spread over tokens."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lorascope.errors import BadInput
from lorascope.token_text import (
    open_table,
    open_tokenizer,
    readable,
    token_table,
    token_texts,
    vocabulary_text,
    vocabulary_texts,
)

TEXT = "The answer is 12.\n\tnaïve café 😀👩‍👩‍👧 日本語 — “Wait” <think>\n1+1=2\n</think>\nok"


def byte_level() -> Tokenizer:
    """A tokenizer of single bytes, so that every multi-byte character is spread over tokens, plus two
    special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|a b|>", special=True)])
    return tokenizer


def sentencepiece() -> Tokenizer:
    words = ["<unk>", *[f"<0x{b:02X}>" for b in range(256)], "▁The", "▁answer", "▁is", "n", "e", "日"]
    tokenizer = Tokenizer(
        models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def test_byte_level_pieces_join_to_the_text() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode(TEXT).ids
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == TEXT == tokenizer.decode(ids, skip_special_tokens=False)


def test_character_belongs_to_the_token_that_completes_it() -> None:
    tokenizer = byte_level()
    assert token_texts(tokenizer, tokenizer.encode("a😀b").ids) == ["a", "", "", "", "😀", "b"]


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_any_ids_join_to_the_tokenizers_own_decoding(make) -> None:  # type: ignore[no-untyped-def]
    tokenizer = make()
    rng = random.Random(0)
    for length in (0, 1, 2, 3, 5, 30):
        for _ in range(60):
            ids = [rng.randrange(tokenizer.get_vocab_size()) for _ in range(length)]
            assert "".join(token_texts(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=False), ids


def test_sentencepiece_bytes_and_first_space() -> None:
    tokenizer = sentencepiece()
    emoji = [1 + b for b in "😀".encode()]
    ids = [257, 258, *emoji, 259]
    assert token_texts(tokenizer, ids) == ["The", " answer", "", "", "", "😀", " is"]


def word_pieces() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "play": 1, "##ing": 2, "cards": 3}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def test_other_decoders_by_prefix() -> None:
    tokenizer = word_pieces()
    assert token_texts(tokenizer, [1, 2, 3]) == ["play", "ing", " cards"]


def test_special_and_unknown_ids() -> None:
    tokenizer = byte_level()
    start, spaced = tokenizer.token_to_id("<|im_start|>"), tokenizer.token_to_id("<|a b|>")
    assert start is not None
    assert spaced is not None
    assert token_texts(tokenizer, [start, spaced, 9999, -1]) == ["<|im_start|>", "<|a b|>", "", ""]
    assert token_table(tokenizer).special == {start, spaced}


def test_vocabulary_texts_are_readable() -> None:
    tokenizer = byte_level()
    texts = vocabulary_texts(tokenizer)
    assert len(texts) == tokenizer.get_vocab_size()
    assert texts[tokenizer.encode(" ").ids[0]] == " "
    assert texts[tokenizer.encode("é").ids[0]] == "<C3>"
    assert readable("\n") == "'\\n'"
    assert readable("don't") == '"don\'t"'


def test_open_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"tokenizer\.json"):
        open_tokenizer(tmp_path)
    byte_level().save(str(tmp_path / "tokenizer.json"))
    assert token_texts(open_tokenizer(tmp_path), [0]) == ["!"]


def test_transformers_fast_tokenizer_is_accepted() -> None:
    class Fast:
        backend_tokenizer = byte_level()

    assert token_texts(Fast(), Fast.backend_tokenizer.encode("é").ids) == ["", "é"]


@pytest.mark.parametrize("make", [byte_level, sentencepiece, word_pieces])
def test_a_table_read_from_its_file_is_the_tokenizers(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    tokenizer = make()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found, wanted = open_table(tmp_path), token_table(tokenizer)
    assert found.pieces == wanted.pieces
    assert (found.kind, found.special) == (wanted.kind, wanted.special)
    ids = list(range(tokenizer.get_vocab_size()))
    assert token_texts(found, ids) == token_texts(tokenizer, ids)
    assert [vocabulary_text(found, i) for i in (*ids, -1, 9999)] == [*vocabulary_texts(tokenizer), "", ""]
    (tmp_path / "tokenizer.json").write_text('{"model": {')
    with pytest.raises(BadInput, match="damaged"):
        open_table(tmp_path)
