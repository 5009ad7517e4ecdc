"""Random reasoning-like token sequences and features that are planted in them, for tests of explaining."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lorascope.explain.rules import Vocabulary, make_vocabulary
from lorascope.explain.windows import Corpus, make_corpus
from lorascope.study import Study, read_json, write_json
from lorascope.token_text import vocabulary_texts
from tiny_store import make_study, write_store

WORDS = [
    *[" is", " answer", "Wait", ",", ".", "\n", " so", " the", " Then", " x", "+", " =", " 日本"],
    *[str(d) for d in range(10)],
    *[f" word{k}" for k in range(30)],
]
SPECIAL, PROMPT, THINK, ANSWER = range(4)


def make_tokenizer() -> Tokenizer:
    """A byte-level vocabulary of whole words after the 256 bytes; ids are given, nothing is encoded."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    names = sorted(alphabet) + [level.pre_tokenize_str(word)[0][0] for word in WORDS if len(word.encode()) > 1]
    tokenizer = Tokenizer(models.BPE(vocab={name: k for k, name in enumerate(names)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def make_words() -> tuple[Vocabulary, dict[str, int]]:
    """The vocabulary and the id of each word."""
    vocabulary = make_vocabulary(vocabulary_texts(make_tokenizer()))
    return vocabulary, {word: vocabulary.ids[word][0] for word in WORDS}


def random_tokens(
    seed: int, traces: int, length: int = 60
) -> tuple[NDArray[np.int32], NDArray[np.uint8], NDArray[np.int64]]:
    """(tokens [T], segments [T], offsets): frequent and rare words in any order, prompt, thinking and answer."""
    rng = np.random.default_rng(seed)
    _, words = make_words()
    ids = np.array([words[word] for word in WORDS], dtype=np.int32)
    weights = np.array([3.0] * 13 + [1.0] * 10 + [0.7] * 30)
    lengths = rng.integers(length - 20, length + 20, traces)
    tokens = rng.choice(ids, int(lengths.sum()), p=weights / weights.sum()).astype(np.int32)
    segments = [np.repeat([SPECIAL, PROMPT, THINK, ANSWER], [2, 12, n - 26, 12]).astype(np.uint8) for n in lengths]
    return tokens, np.concatenate(segments), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def random_corpus(seed: int, traces: int, length: int = 60) -> Corpus:
    tokens, segments, offsets = random_tokens(seed, traces, length)
    return make_corpus(tokens, segments, segments != SPECIAL, offsets)


def planted_firings(corpus: Corpus) -> dict[str, NDArray[np.bool_]]:
    """Where each planted feature fires, on ordinary tokens."""
    vocabulary, words = make_words()
    before = np.concatenate([[-1], corpus.tokens_T[:-1]])
    before[np.unique(corpus.first_T)] = -1
    planted = {
        "a token": corpus.tokens_T == words[" is"],
        "a token after another": (corpus.tokens_T == words[" is"]) & (before == words[" answer"]),
        "a number while thinking": vocabulary.masks["number"][corpus.tokens_T] & (corpus.segments_T == THINK),
        "anything after Wait": before == words["Wait"],
    }
    return {name: fires & corpus.ordinary_T for name, fires in planted.items()}


def planted_study(path: Path, *, traces: int = 160) -> tuple[Study, dict[str, str]]:
    """A study with two recorded corpora whose directions fire as planted (and on nothing, and at random), and levels.

    Returns the study and the feature id of each planted name.
    """
    study = make_study(path)
    (path / "tokenizer").mkdir()
    make_tokenizer().save(str(path / "tokenizer" / "tokenizer.json"))
    names: list[str] = []
    for seed, corpus_name in enumerate(("train", "heldout")):
        tokens, segments, offsets = random_tokens(seed, traces)
        corpus = make_corpus(tokens, segments, segments != SPECIAL, offsets)
        rng = np.random.default_rng(seed)
        planted = planted_firings(corpus) | {
            "nothing": np.zeros(corpus.n_tokens, dtype=np.bool_),
            "chance": (rng.random(corpus.n_tokens) < 0.03) & corpus.ordinary_T,
        }
        names = list(planted)
        z = np.stack([fires * rng.uniform(1, 2, corpus.n_tokens) for fires in planted.values()], axis=1)
        z[:, names.index("anything after Wait")] *= -1
        write_store(
            study,
            z,
            np.diff(offsets).tolist(),
            corpus=corpus_name,
            addresses=[f"L{k}.gate" for k in range(len(names))],
            tokens=tokens,
            segments=segments,
            shard_tokens=4096,
        )
    ids = {name: f"L{k}.gate" + ("-" if name == "anything after Wait" else "+") for k, name in enumerate(names)}
    levels = {f"L{k}.gate{sign}": 0.5 for k in range(len(names)) for sign in "+-"}
    (path / "examples").mkdir()
    write_json(path / "examples" / "levels.json", {"direction": levels, "latent": {}})
    return study, ids


def add_latents(study: Study) -> None:
    """An SAE of five latents, one per direction, and their levels."""
    (study.path / "sae").mkdir()
    weights = {"W_enc": np.eye(6, 5), "b_enc": np.zeros(5), "threshold": np.full(5, 0.5)}
    weights |= {"W_dec": np.eye(5, 6), "b_dec": np.zeros(6)}
    save_file({k: w.astype(np.float32) for k, w in weights.items()}, study.path / "sae" / "sae_weights.safetensors")
    write_json(study.path / "sae" / "cfg.json", {"apply_b_dec_to_input": False})
    levels = read_json(study.path / "examples" / "levels.json")
    write_json(study.path / "examples" / "levels.json", levels | {"latent": {f"sae.{k}": 0.0 for k in range(5)}})
