"""A study whose directions fire on the words of known categories, with an SAE whose latents are those directions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lorascope.config import Options
from lorascope.example_search import ExamplesConfig, examples
from lorascope.explain import ExplainConfig, explain_features
from lorascope.recording import OUTPUT_RMS
from lorascope.sae.files import save_sae
from lorascope.sae.model import SAE
from lorascope.study import Study, write_json
from tiny_store import make_study, write_store

PLANTED = {
    ("computational operations", "adding and subtracting"): [" plus", " minus", " +"],
    ("symbolic manipulation", "letters and spelling"): [" letter", " spell", " vowel"],
    ("variable and value tracking", "numbers held"): ["17", "4", "256"],
    ("reasoning flow control", "doubting and checking"): [" Wait", " hmm", " verify"],
    ("domain-specific patterns", "sorting and lists"): [" sort", " ascending", " list"],
    ("relational and logical operators", "equality"): [" equals", " same", " ="],
    ("result formulation", "announcing the answer"): [" answer", " final", " result"],
}
"""What the first directions fire on; the next fires on words of no category, the last at random."""
NEUTRAL = [f" zorb{c}" for c in "abcdefgh"]
WORDS = [word for words in PLANTED.values() for word in words] + NEUTRAL
RARE = 0.003
"""How often each planted word and the first three neutral ones occur: their features fire on less than 1% of tokens."""
TYPES = ["q", "gate", "down"]
DECODER = 2.0
"""Length of what each latent writes per unit, in scalars."""


def make_tokenizer() -> Tokenizer:
    """A byte-level vocabulary of whole words after the 256 bytes; ids are given, nothing is encoded."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    names += [level.pre_tokenize_str(word)[0][0] for word in WORDS if len(word) > 1]
    tokenizer = Tokenizer(models.BPE(vocab={name: k for k, name in enumerate(names)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def addresses() -> list[str]:
    """Three layers of three types, in the store's order."""
    return [f"L{layer}.{type_}" for layer in range(3) for type_ in TYPES]


def planted_categories(
    path: Path, *, traces: int = 60, length: int = 80, outputs: Sequence[float] | None = None
) -> tuple[Study, dict[str, tuple[str, str]]]:
    """The study up to `explain`, and the category and subcategory of each planted feature (both kinds).

    Args:
        outputs: the rms of the base's own output at each direction, which then writes so much more; recorded.
    """
    study = make_study(path)
    (path / "tokenizer").mkdir()
    tokenizer = make_tokenizer()
    tokenizer.save(str(path / "tokenizer" / "tokenizer.json"))
    pieces = tokenizer.get_vocab()
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    id_of = {word: pieces[level.pre_tokenize_str(word)[0][0]] for word in WORDS}
    share = np.array([RARE] * (len(WORDS) - 5) + [(1 - RARE * (len(WORDS) - 5)) / 5] * 5)
    names = addresses()
    for seed, corpus in enumerate(("train", "heldout")):
        rng = np.random.default_rng(seed)
        tokens = rng.choice(list(id_of.values()), traces * length, p=share)
        fires = [np.isin(tokens, [id_of[word] for word in words]) for words in PLANTED.values()]
        fires.append(np.isin(tokens, [id_of[word] for word in NEUTRAL[:3]]))
        fires.append(rng.random(len(tokens)) < 3 * RARE)
        z = np.stack([on * rng.uniform(1, 2, len(tokens)) for on in fires], axis=1)
        store = write_store(
            study,
            z,
            [length] * traces,
            corpus=corpus,
            addresses=names,
            effect=None if outputs is None else [float(rms) for rms in outputs],
            tokens=tokens,
            shard_tokens=2048,
        )
        if outputs is not None:
            write_json(store.folder / OUTPUT_RMS, {"address": names, "rms": list(outputs), "tokens": 1})
    eye = torch.eye(len(names))
    sae = SAE(
        eye.clone(), DECODER * eye, torch.zeros(len(names)), torch.zeros(len(names)), torch.full((len(names),), 0.5)
    )
    (path / "sae").mkdir()
    save_sae(path / "sae", sae, {"addresses": names})
    for corpus in ("train", "heldout"):
        examples(study, ExamplesConfig(corpus, kinds="direction,latent", k=20), Options())
    explain_features(study, ExplainConfig(examples=20, learn=96), Options())
    where = dict(zip(names, PLANTED, strict=False))
    planted = {f"{address}+": place for address, place in where.items()}
    return study, planted | {f"sae.{i}": place for i, place in enumerate(PLANTED)}
