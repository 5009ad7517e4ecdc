"""A whole study without a model: planted scalars on rendered traces, real examples, SAE and explanations, and
made-up but known numbers for what needs a model (training, evaluation, ablation, patched KL)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.numpy import save_file

from lorascope.adapter import Adapter, build_adapter
from lorascope.comparison import CompareConfig, compare
from lorascope.config import Options
from lorascope.example_search import ExamplesConfig, examples
from lorascope.explain import ExplainConfig, explain_features
from lorascope.explain.categories import CategorizeConfig, categorize
from lorascope.logit_lens import LENS, LensConfig
from lorascope.reasoning import ReasoningConfig, find_reasoning
from lorascope.recovery import recovery_rows
from lorascope.sae import SAEConfig
from lorascope.sae.training import train_sae
from lorascope.study import Study, write_json
from lorascope.token_text import token_texts
from lorascope.traces import Trace, write_traces
from lorascope.views.effects import direction_effects
from tiny_store import write_store
from tiny_text import tiny_tokenizer

TYPES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
HOSTILE = "</textarea><script>window.hacked = 1</script><img src=x onerror=window.hacked=2>"
FLOOR = 0.0005
PLANTED = {"L1.gate": ".", "L2.down": "is", "L0.up": "\n"}
"""Directions whose scalar is large on tokens with this text: + polarity only."""


def make_traces(name: str, count: int, seed: int) -> list[Trace]:
    """Short traces of sums; the first holds markup that must stay inert, and characters of several tokens."""
    rng = np.random.default_rng(seed)
    traces = []
    for i in range(count):
        a, b = (int(x) for x in rng.integers(2, 99, 2))
        wait = "Wait, that is not right.\n" if rng.random() < 0.6 else ""
        thinking = f"I add {a} and {b}.\n{wait}{a} + {b} is {a + b}. So it is {a + b}.\nLet me check: yes."
        if i == 0:
            thinking = f"{HOSTILE}\nZürich 日本 🦜. {thinking}"
        traces.append(Trace(f"{name}-{i}", f"What is {a} + {b}?", thinking, f"The answer is {a + b}.", str(a + b)))
    return traces


def make_adapter(layers: int, seed: int = 0) -> Adapter:
    """Rank 1 on every matrix, small random weights."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(layers):
        for place in TYPES.values():
            a, b = torch.randn(1, 8, generator=generator), torch.randn(6, 1, generator=generator)
            weights[f"model.layers.{layer}.{place}"] = (a, b * (1 + layer), 2.0)
    return build_adapter(weights, {"peft_type": "LORA", "r": 1, "lora_alpha": 2})


def record_corpus(study: Study, tokenizer: Any, adapter: Adapter, name: str, traces: list[Trace], seed: int) -> None:
    """Render, plant scalars, write the store; the first token of each trace is a sink."""
    rendered, counts = study.renderer(tokenizer).render_all(traces)
    write_traces(study.corpus_file(name), traces)
    rng = np.random.default_rng(seed)
    addresses = adapter.addresses
    parts, sinks = [], []
    # a few hidden causes shared by all directions, so that an SAE has something to find
    mixing = np.random.default_rng(7).normal(size=(12, len(addresses))) * (
        np.random.default_rng(8).random((12, 1)) + 0.2
    )
    for one in rendered:
        texts = token_texts(tokenizer, one.ids.tolist())
        causes = np.array([[hash_of(text, k) for k in range(12)] for text in texts])
        z = causes @ mixing * 0.3 + rng.normal(size=(len(texts), len(addresses))) * 0.05
        for address, trigger in PLANTED.items():
            if address in addresses:
                on = np.array([trigger in text for text in texts])
                z[:, addresses.index(address)] = np.where(on, 3 + rng.random(len(texts)), -0.1 * rng.random(len(texts)))
        parts.append(z)
        sinks.append(np.arange(len(texts)) == 0)
    write_store(
        study,
        np.concatenate(parts),
        [len(one.ids) for one in rendered],
        corpus=name,
        addresses=addresses,
        effect=[float(x) for x in adapter.effect_per_scalar],
        tokens=np.concatenate([one.ids for one in rendered]),
        segments=np.concatenate([one.segments for one in rendered]),
        sink=np.concatenate(sinks),
        shard_tokens=4096,
    )
    tokens = sum(len(one.ids) for one in rendered)
    entry = {"source": "made", "traces": len(traces), "tokens": tokens, "length_rule": counts}
    study.update_manifest(corpora={name: entry})


def hash_of(text: str, k: int) -> float:
    """A number that depends on a token's text alone: mostly 0, sometimes 1 to 2."""
    value = sum(text.encode()) * (2 * k + 3) % 97
    return 1 + value / 12 if value < 12 else 0.0


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def add_training(study: Study) -> None:
    """Two runs whose losses fall to 0.5 and 0.6."""
    for name, low, lr in (("adapter", 0.5, 1e-3), ("full", 0.6, 1e-4)):
        rng = np.random.default_rng(len(name))
        rows: list[dict[str, Any]] = [{"step": 0, "heldout_loss": 2.0}]
        for step in range(1, 41):
            loss = low + 1.5 * float(np.exp(-step / 8)) + 0.05 * float(rng.normal())
            rows.append({"step": step, "loss": loss, "lr": lr, "tokens": 1000, "seconds": 0.5})
            if step % 10 == 0:
                rows[-1]["heldout_loss"] = low + 1.5 * float(np.exp(-step / 8))
        write_lines(study.path / "train" / f"{name}.jsonl", rows)


def add_evaluation(study: Study, full_right: float = 0.4) -> None:
    """100 problems: base right on 10%, adapter on 50%, full as said."""
    shares = {
        "base": 0.1,
        "base-3shot": 0.05,
        "adapter": 0.5,
        "full": full_right,
        "adapter-no-attn": 0.4,
        "adapter-no-mlp": 0.1,
    }
    samples = {
        name: [
            {"id": str(i), "benchmark": "sums" if i % 2 else "products", "correct": (i * 37 % 100) / 100 < part}
            for i in range(100)
        ]
        for name, part in shares.items()
    }
    rows, chosen = recovery_rows(samples, np.random.default_rng(0))
    write_json(study.path / "eval" / "recovery.json", rows)
    facts = [
        {
            "model": name,
            "n": 100,
            "accuracy": part,
            "unparsed": 0.03,
            "unfinished": 0.02,
            "mean_tokens": 60.5,
            "perplexity": 20.1,
        }
        for name, part in shares.items()
    ]
    settings = {"n": 100, "max_new_tokens": 128, "temperature": 0.0, "seeds": 1}
    write_json(study.path / "eval" / "details.json", {"base_prompt": chosen, "models": facts, "settings": settings})


def ablation_rows(way: str, kls: dict[str, float]) -> list[dict[str, Any]]:
    return [
        {
            "by": way,
            "target": target,
            "segment": segment,
            "kl": kl * factor,
            "low": kl * factor * 0.7,
            "high": kl * factor * 1.4,
            "ce_change": kl / 2,
            "ce_low": kl / 4,
            "ce_high": kl,
            "tokens": 900,
            "under_floor": kl * factor <= FLOOR,
        }
        for target, kl in kls.items()
        for segment, factor in (("all", 1.0), ("think", 1.2), ("answer", 0.6))
    ]


def add_ablation(study: Study, adapter: Adapter) -> None:
    """KL grows with the layer; L1.gate is the strongest, everything of layer 0 is under the floor."""
    rng = np.random.default_rng(3)
    layers = len(adapter.addresses) // 7
    factor = {"gate": 4.0, "up": 2.0, "down": 1.5}
    single = {}
    for address in adapter.addresses:
        layer, type_ = int(address[1:].split(".")[0]), address.split(".")[1]
        single[address] = (
            0.0001 if layer == 0 else 0.002 * layer * factor.get(type_, 0.6) * float(rng.uniform(0.4, 1.6))
        )
    single["L1.gate"] = 0.5
    tables = {
        "direction": single,
        "layer": {f"L{n}": sum(v for a, v in single.items() if a.startswith(f"L{n}.")) for n in range(layers)},
        "type": {t: sum(v for a, v in single.items() if a.endswith(f".{t}")) for t in TYPES},
        "group": {"attn": 0.02, "mlp": 0.9, "all": 1.3},
    }
    folder = study.path / "ablation"
    folder.mkdir()
    for way, kls in tables.items():
        pq.write_table(pa.Table.from_pylist(ablation_rows(way, kls)), folder / f"exact-{way}.parquet")
        write_json(folder / f"floor-exact-{way}.json", {"kl": FLOOR, "runs": {"re-run": 0.0, "re-batched": FLOOR}})


def add_patched(study: Study) -> None:
    """The SAE's reconstruction costs 0.2 of switching the adapter off."""
    values = {"off": 1.0, "exact": 1e-9, "sae": 0.2, "mean": 0.9, "components": 0.35, "largest": 0.6}
    variants = {k: {"value": v, "low": v * 0.8, "high": v * 1.2, "segments": {}} for k, v in values.items()}
    write_json(
        study.path / "sae" / "patched_kl.json",
        {
            "patched_kl": 0.2,
            "adapter_off_kl": 1.0,
            "ratio": {"value": 0.2, "low": 0.15, "high": 0.25},
            "floor": 1e-9,
            "predicted_tokens": 800,
            "variants": variants,
            "corpus": "heldout",
            "traces": 8,
            "tokens": 1200,
            "components": 16,
        },
    )


LENS_TOKENS = ["</b><script>hacked", " think", "\n", "<E2 80>"]


def add_lens(study: Study) -> None:
    """What L2.down writes, L1.gate reads and latents write: the same few tokens; `-` is no more than random."""
    sides = {"L2.down": "write", "L1.gate": "read"} | {f"sae.{i}": "write" for i in range(56)}
    rows = [
        {
            "feature": f"{name}{sign}",
            "side": side,
            "norm": 2.0,
            "tokens": LENS_TOKENS,
            "ids": [0, 1, 2, 3],
            "values": [4.0, 3.0, 2.0, 1.0],
            "bottom_tokens": LENS_TOKENS[::-1],
            "bottom_ids": [3, 2, 1, 0],
            "bottom_values": [-4.0, -3.0, -2.0, -1.0],
            "random_share": 0.6 if sign == "-" else 0.005,
        }
        for name, side in sides.items()
        for sign in ([""] if name.startswith("sae") else "+-")
    ]

    def work() -> dict[str, Any]:
        (study.path / LENS).parent.mkdir()
        pq.write_table(pa.Table.from_pylist(rows), study.path / LENS)
        sides = {"write": {"features": 58, "beyond_random": 57}, "read": {"features": 2, "beyond_random": 1}}
        sides = {name: side | {"random_largest": 1.0} for name, side in sides.items()}
        return {"features": len(rows), "directions_elsewhere": 0, "sides": sides}

    study.run("lens", LensConfig(), Options(), inputs=["adapter"], outputs=[LENS], work=work)


def make_report_study(path: Path, *, layers: int = 4, traces: int = 40) -> Study:
    """The study, with every stage's files."""
    study = Study.create(path, model="tiny", system=None)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(path / "tokenizer")
    adapter = make_adapter(layers)
    adapter.save(path / "adapter")
    for seed, (name, count) in enumerate((("train", traces), ("heldout", traces))):
        record_corpus(study, tokenizer, adapter, name, make_traces(name, count, seed), seed)
    options = Options()
    train_sae(study, SAEConfig(tokens=40_000, expansion=2, k=4, batch=128), options)
    for corpus in ("train", "heldout"):
        examples(study, ExamplesConfig(corpus, k=12, per_quantile=4), options)
    explain_features(study, ExplainConfig(kinds="direction,latent", examples=20, learn=64), options)
    find_reasoning(study, ReasoningConfig(shifts=199, contrast="let me"), options)
    compare(study, CompareConfig(draws=500), options)
    categorize(study, CategorizeConfig(), options)
    add_lens(study)
    add_training(study)
    add_evaluation(study)
    add_ablation(study, adapter)
    add_patched(study)
    return study


def complete_maps(study: Study) -> None:
    """Measure effects, which would have maps reload later, and add what every two directions do together."""
    for corpus in ("train", "heldout"):
        direction_effects(study, corpus)
    names = Adapter.load(study.path / "adapter").addresses
    gradients = np.random.default_rng(0).normal(size=(8, len(names)))
    file = study.path / "ablation" / "interactions.safetensors"
    save_file({"kl_NN": (gradients.T @ gradients).astype(np.float32)}, file, {"addresses": ",".join(names)})
