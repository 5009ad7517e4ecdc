"""A tiny decoder with planted directions: their triggers are known exactly, because the residual stream is nearly
the token's embedding and each read vector solves for its token among all."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorascope.adapter import Adapter, initial_adapter
from tiny_text import SMOLLM

WORDS = [f" {a}{b}" for a in ("ba", "ke", "mo", "ri", "tu", "sel") for b in ("lan", "por", "nim", "dok", "vaz", "gri")]
TRIGGERS = {
    "L0.gate+": " seven",
    "L0.gate-": " so",
    "L0.up+": " wait",
    "L1.gate+": " check",
}
"""The token that each planted polarity responds to."""
WRITER, READS, WRITES = "L1.down+", " check", " wait"
"""A direction that both has a trigger and writes a word into the residual stream, where it is planted."""
WRITTEN = 6.0
"""How long its effect is on the trigger; the embeddings are about 10, so that twice of it turns the text."""
EVERY = [*WORDS, *(word.strip() for word in WORDS), *TRIGGERS.values()]
TRACES = 260
WORDS_PER_TRACE = 48


def planted_tokenizer() -> Any:
    """One token per word of the planted language."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(EVERY * 50, trainer)
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = SMOLLM
    assert all(len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1 for word in EVERY)
    return tokenizer


def planted_traces(path: Path, seed: int = 0) -> Path:
    """Random sentences in which each trigger is just under 1% of the ordinary tokens."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(TRACES):
        words = list(rng.choice(WORDS, WORDS_PER_TRACE))
        for trigger in TRIGGERS.values():
            if rng.random() < 0.53:
                words[rng.integers(1, WORDS_PER_TRACE)] = trigger
        question = "".join(rng.choice(WORDS, 6)).strip()
        lines.append(json.dumps({"question": question, "thinking": "".join(words).strip(), "answer": "balan"}))
    path.write_text("\n".join(lines) + "\n")
    return path


def save_planted(folder: Path, units: int = 64) -> tuple[Path, Path]:
    """The folders of the model, with so many units in an MLP, and of its adapter, whose directions but three are weak
    noise."""
    tokenizer = planted_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=units,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.02,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_()
        model.lm_head.weight.normal_(std=0.3)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    plant(model, tokenizer).save(folder / "adapter")
    return folder / "model", folder / "adapter"


def plant(model: Any, tokenizer: Any) -> Adapter:
    """Read vectors that give 1 on their trigger, -1 on the other polarity's and 0 on every other word."""
    adapter = initial_adapter(model, seed=3)
    ids = tokenizer(EVERY, add_special_tokens=False)["input_ids"]
    inputs_WD = torch.nn.functional.rms_norm(model.model.embed_tokens.weight[[i[0] for i in ids]].detach(), (96,))
    generator = torch.Generator().manual_seed(4)
    modules = []
    for module, address in zip(adapter.modules, adapter.addresses, strict=True):
        signs = [float(TRIGGERS.get(f"{address}+") == w) - (TRIGGERS.get(f"{address}-") == w) for w in EVERY]
        wanted = torch.tensor(signs)
        b_OR = torch.randn(module.b_OR.shape, generator=generator)
        if wanted.any():
            a_RI = torch.linalg.lstsq(inputs_WD, wanted[:, None], driver="gelsd").solution.T
            modules.append(replace(module, a_RI=a_RI, b_OR=b_OR * 0.05))
        else:
            modules.append(replace(module, a_RI=module.a_RI * 0.05, b_OR=b_OR * 1e-3))
    return replace(adapter, modules=tuple(modules))


def plant_writer(model_folder: Path, adapter_folder: Path) -> None:
    """Make one direction of the saved adapter fire on one token alone of all and write along the unembedding of
    another. The MLP has more units than there are tokens, so that its read vector solves for it."""
    model = LlamaForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder)
    adapter = Adapter.load(adapter_folder)
    number = adapter.addresses.index(WRITER[:-1])
    reads, writes = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in (READS, WRITES))
    seen: list[Any] = []
    hook = model.model.layers[1].mlp.down_proj.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    with torch.no_grad():
        model(torch.tensor([[tokenizer.bos_token_id, i] for i in range(len(tokenizer))]))
    hook.remove()
    hidden_VI, fires_V = seen[0][:, 1], torch.zeros(len(tokenizer))
    fires_V[reads] = 1
    a_RI = torch.linalg.lstsq(hidden_VI, fires_V[:, None], driver="gelsd").solution.T
    row_D = model.lm_head.weight[writes].detach()
    modules = list(adapter.modules)
    modules[number] = replace(modules[number], a_RI=a_RI, b_OR=row_D[:, None] / row_D.norm())
    effect = replace(adapter, modules=tuple(modules)).effect_per_scalar[number]
    modules[number] = replace(modules[number], b_OR=modules[number].b_OR * WRITTEN / effect)
    replace(adapter, modules=tuple(modules)).save(adapter_folder)


def plant_habit(folder: Path) -> None:
    """Make the saved model answer "5" to everything: its head reads it off the line break that ends the prompt."""
    model = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    newline, five, end = (
        tokenizer(text, add_special_tokens=False)["input_ids"][-1] for text in ("assistant\n", "5", "<|im_end|>")
    )
    with torch.no_grad():
        inputs_VD = torch.nn.functional.rms_norm(model.model.embed_tokens.weight, (96,))
        model.lm_head.weight[five] = inputs_VD[newline] * 0.2
        model.lm_head.weight[end] = inputs_VD[five] * 0.2
    model.save_pretrained(folder)


def ask(rng: Generator, group: str) -> str:
    """A question of six words, of three that only this group has."""
    return "".join(rng.choice(WORDS[:3] if group == "7" else WORDS[3:6], 6)).strip()


def answered_traces(path: Path, count: int, seed: int = 0) -> Path:
    """Questions of both groups in turn, each answered by its group's number at once."""
    rng = np.random.default_rng(seed)
    rows = [{"question": ask(rng, group), "answer": group} for group in ["7", "3"] * (count // 2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def graded_questions(path: Path, golds: dict[tuple[str, str], int], seed: int = 1) -> Path:
    """So many questions of each (group, gold answer), so that what answers by group has a known accuracy."""
    rng = np.random.default_rng(seed)
    rows = [
        {"question": ask(rng, group), "answer": gold} for (group, gold), count in golds.items() for _ in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
