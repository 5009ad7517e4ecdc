"""Where words stand in the thinking of a recorded corpus, whatever its tokenizer.

Words are found in decoded text and mapped back to tokens, so a word may be a part of a token, one token or several.
Shape legend: T tokens of a corpus, K occurrences.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from lorascope.errors import BadInput
from lorascope.store import Store
from lorascope.token_text import token_texts
from lorascope.traces import THINK

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class WordMarks:
    """Occurrences of words in the thinking of a corpus, in its order, and the tokens that count as thinking."""

    first_K: Ints
    """The token of each occurrence's first character, as a position in the corpus."""
    last_K: Ints
    """The token of its last character."""
    counts: dict[str, int]
    """Occurrences of each word asked for, 0 included."""
    thinking_T: Mask
    """Ordinary tokens of the segment `think`."""


def read_words(file: str | None) -> tuple[str, ...]:
    """The words of a file, in lower case, or those that come with lorascope.

    One word or phrase per line; what follows a # is a comment.

    Raises:
        BadInput: the file cannot be read or names no word.
    """
    try:
        source = Path(file) if file else resources.files("lorascope.reasoning") / "words.txt"
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"Cannot read the words of {file} ({error}); give a text file, one word a line.") from error
    lines = (" ".join(line.partition("#")[0].split()).lower() for line in text.splitlines())
    words = tuple(dict.fromkeys(line for line in lines if line))
    if not words:
        raise BadInput(f"{file} names no word; write one per line.")
    return words


def word_pattern(words: Sequence[str]) -> re.Pattern[str]:
    """Finds any of the words, longest first, at word boundaries, in any case and with any white space within."""
    longest = sorted(words, key=len, reverse=True)
    either = "|".join(r"\s+".join(map(re.escape, word.split())) for word in longest)
    return re.compile(rf"(?<!\w)(?:{either})(?!\w)", re.IGNORECASE)


def mark_words(store: Store, tokenizer: Tokenizer, words: Sequence[str]) -> WordMarks:
    """Find the words in the thinking of every trace. Where two overlap, the one that begins first counts."""
    pattern = word_pattern(words)
    thinking_T = np.asarray(store.ordinary & (store.segments == THINK))
    counts: Counter[str] = Counter()
    first_K: list[int] = []
    last_K: list[int] = []
    for start, stop in zip(store.offsets[:-1].tolist(), store.offsets[1:].tolist(), strict=True):
        if not thinking_T[start:stop].any():
            continue
        texts = token_texts(tokenizer, store.tokens[start:stop].tolist())
        ends = np.cumsum([len(text) for text in texts])
        for match in pattern.finditer("".join(texts)):
            # the token that a character is in is the first that ends after it
            first, last = start + np.searchsorted(ends, [match.start(), match.end() - 1], side="right")
            if thinking_T[first] and thinking_T[last]:
                counts[" ".join(match[0].split()).lower()] += 1
                first_K.append(int(first))
                last_K.append(int(last))
    found = {word: counts[word] for word in words}
    return WordMarks(np.array(first_K, np.int64), np.array(last_K, np.int64), found, thinking_T)
