"""The studio on a large study: server time of its pages and its memory, without a model.

`.venv/bin/python benchmarks/studio.py [FOLDER]` (it needs the extra `web`) makes a study of 3,584 latents and 448
directions on 10 million tokens (10 GB; kept in FOLDER if one is named), and one with 10,000 rows of features, and asks
a studio of each, in a process of its own. Prints one JSON document.
"""

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lorascope.adapter import Adapter, build_adapter
from lorascope.config import Options
from lorascope.example_search import LEVELS, ExamplesConfig
from lorascope.explain import ExplainConfig
from lorascope.explain.summary import summarise_rows
from lorascope.recording import RecordConfig
from lorascope.sae import SAEConfig
from lorascope.store import store_folder
from lorascope.store_writer import StorePlan, StoreWriter, plan_shards
from lorascope.study import Study, write_json

LAYERS, LATENTS, TOKENS, LENGTH, VOCABULARY = 64, 3584, 10_000_000, 4000, 50_000
TOP, QUANTILES, PER_QUANTILE = 50, 5, 10
SHARD = 400_000
TYPES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
TYPES += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
SAE = "sae/sae_weights.safetensors"
STORES = [f"scalars/{corpus}/adapter/index.json" for corpus in ("train", "heldout")]
REPEATS = 20
START, FIRST_VIEW, FEATURE_PAGE, MEMORY = 1.0, 0.3, 0.1, 1 << 30
"""Seconds and bytes: until the studio answers, of its first view, of a feature's page; of the server."""


def make_adapter() -> Adapter:
    """Rank 1 on seven matrices of every layer, of the width of a small model."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"model.layers.{layer}.{place}": (
            torch.randn(1, 512, generator=generator),
            torch.randn(512, 1, generator=generator),
            16.0,
        )
        for layer in range(LAYERS)
        for place in TYPES
    }
    return build_adapter(weights, {"peft_type": "LORA", "r": 1, "lora_alpha": 16})


def make_store(study: Study, adapter: Adapter, corpus: str, tokens: int) -> None:
    """A recorded corpus of random scalars: one block of noise, written again for every shard."""
    rng = np.random.default_rng(0)
    count = tokens // LENGTH
    lengths = [LENGTH] * count
    plan = StorePlan(
        addresses=adapter.addresses,
        effect_per_scalar=adapter.effect_per_scalar.tolist(),
        trace_ids=[f"trace-{i}" for i in range(count)],
        lengths=lengths,
        response_starts=[100] * count,
        shards=[[list(range(first, stop))] for first, stop in plan_shards(lengths, SHARD)],
        about={"source": "adapter"},
    )
    writer = StoreWriter(store_folder(study.path, corpus, "adapter"), plan)
    noise = rng.standard_t(4, size=(LENGTH, len(adapter.addresses))).astype(np.float32)
    writer.calibrate(np.abs(noise).max(axis=0))
    segments = np.repeat([0, 1, 2, 3], [10, 90, LENGTH - 200, 100]).astype(np.uint8)
    for number in writer.missing():
        shard = writer.begin(number)
        for i in plan.shards[number][0]:
            ids = rng.integers(0, VOCABULARY, LENGTH).astype(np.int32)
            writer.put(shard, i, np.roll(noise, i, axis=0), ids, segments, np.zeros(LENGTH, bool))
        writer.commit(shard)
    writer.finish()
    note(study, f"record:{corpus}:adapter", ["adapter"], [f"scalars/{corpus}/adapter/index.json"], RecordConfig(corpus))
    source = {"source": "made", "traces": tokens // LENGTH, "tokens": tokens}
    study.update_manifest(corpora={corpus: source})


def make_tables(study: Study, ids: list[str], kind: str, corpus: str, tokens: int) -> None:
    """Examples and statistics of a kind on a corpus, random but of the right shape and size."""
    rng = np.random.default_rng(len(ids))
    folder = study.path / "examples" / corpus
    folder.mkdir(parents=True, exist_ok=True)
    where = ["top"] * TOP + [f"q{q}" for q in range(QUANTILES) for _ in range(PER_QUANTILE)]
    rank = [*range(TOP), *(list(range(PER_QUANTILE)) * QUANTILES)]
    n = len(ids) * len(where)
    rows = {
        "feature": pa.array(np.repeat(ids, len(where))),
        "where": pa.array(where * len(ids)),
        "rank": pa.array(rank * len(ids), pa.int32()),
        "trace": pa.array(rng.integers(0, tokens // LENGTH, n).astype(np.int32)),
        "position": pa.array(rng.integers(100, LENGTH, n).astype(np.int32)),
        "activation": pa.array(rng.gamma(2, 1, n).astype(np.float32)),
    }
    pq.write_table(pa.table(rows), folder / f"{kind}-examples.parquet")
    f = len(ids)
    stats = {name: rng.random(f) for name in ("density", "share_prompt", "share_think", "share_answer")}
    stats |= {"n_firing": rng.integers(0, 10**6, f), "max": rng.gamma(9, 1, f), "p99": rng.gamma(5, 1, f)}
    stats |= {"mean": rng.gamma(2, 1, f), "level": np.full(f, 1.0)}
    edges, counts = [float(x) for x in range(1, 42)], [int(x) for x in range(40)]
    columns = {"feature": ids} | stats | {"hist_edges": [edges] * f, "hist_counts": [counts] * f}
    pq.write_table(pa.table(columns), folder / f"{kind}-stats.parquet")


def make_explanations(study: Study, ids: list[str], kind: str) -> None:
    """Explanations of a kind with their scores and controls, and the record of their stage."""
    rng = np.random.default_rng(len(ids))
    score = {"value": 0.8, "low": 0.7, "high": 0.9, "n": 80, "unparsed": 0, "counts": {}}
    endings = {"": 0.8, "_wrong": 0.5, "_shuffled": 0.5}
    scored = {f"{task}{end}": score | {"value": v} for task in ("detection", "fuzzing") for end, v in endings.items()}
    words = [f"word{i}" for i in range(500)]
    rows = [
        {
            "feature": name,
            "explainer": "lexical",
            "text": f"fires on {' or '.join(rng.choice(words, 6))} among the 8 tokens before",
            "rule": {},
            "scored": scored | {"wrong_from": ids[0]},
            "reason": None,
            "corpus": "heldout",
        }
        for name in ids
    ]
    file = f"explanations/{kind}.jsonl"
    (study.path / file).parent.mkdir(exist_ok=True)
    (study.path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = summarise_rows(rows, rng) | {"features": len(ids)}
    note(study, f"explain:heldout:{kind}", STORES, [file], ExplainConfig(kinds=kind), result)


def note(
    study: Study, stage: str, inputs: list[str], outputs: list[str], config: Any, result: dict[str, Any] | None = None
) -> None:
    """The record of a stage, as if it had made what is there."""
    study.run(stage, config, Options(), inputs=inputs, outputs=outputs, work=lambda: result or {})


def make_study(path: Path, tokens: int, latents: int) -> Study:
    """The whole study: a training corpus of so many tokens, a held-out one of a tenth, and what all stages leave."""
    study = Study.create(path, model="none", system=None)
    adapter = make_adapter()
    adapter.save(path / "adapter")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = alphabet + [f"w{i}" for i in range(VOCABULARY - len(alphabet))]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    (path / "tokenizer").mkdir()
    tokenizer.save(str(path / "tokenizer" / "tokenizer.json"))
    corpora = {"train": tokens, "heldout": max(LENGTH, tokens // 10)}
    for corpus, count in corpora.items():
        make_store(study, adapter, corpus, count)
    rng = np.random.default_rng(1)
    n = len(adapter.addresses)
    (path / "sae").mkdir()
    weights = {
        "W_enc": rng.normal(size=(n, latents)).astype(np.float32) / n,
        "W_dec": rng.normal(size=(latents, n)).astype(np.float32) / n,
        "b_enc": np.zeros(latents, np.float32),
        "b_dec": np.zeros(n, np.float32),
        "threshold": np.full(latents, 0.1, np.float32),
    }
    save_file(weights, path / SAE)
    write_json(path / "sae" / "cfg.json", {"metadata": {"addresses": adapter.addresses, "k": 16}})
    note(study, "sae", STORES[:1], [SAE], SAEConfig())
    add_ablation(study, adapter)
    ids = {
        "direction": [f"{a}{sign}" for a in adapter.addresses for sign in "+-"],
        "latent": [f"sae.{i}" for i in range(latents)],
    }
    write_json(path / LEVELS, {"direction": dict.fromkeys(ids["direction"], 1.0), "latent": {}})
    for kind, named in ids.items():
        for corpus, count in corpora.items():
            make_tables(study, named, kind, corpus, count)
            files = [f"examples/{corpus}/{kind}-{table}.parquet" for table in ("examples", "stats")]
            inputs = [*STORES, *([SAE] if kind == "latent" else [])]
            config = ExamplesConfig(corpus, kinds=kind)
            note(study, f"examples:{corpus}:{kind}", inputs, [*files, LEVELS], config, {"features": len(named)})
        make_explanations(study, named, kind)
    return study


def add_ablation(study: Study, adapter: Adapter) -> None:
    """Exact KL of every direction in three segments, and the matrix of interactions."""
    rng = np.random.default_rng(2)
    rows = [
        {"by": "direction", "target": address, "segment": segment, "tokens": 9000, "under_floor": False}
        | {"ce_change": 0.0, "ce_low": 0.0, "ce_high": 0.0, "kl": kl, "low": kl / 2, "high": kl * 2}
        for address, kl in zip(adapter.addresses, rng.gamma(1, 0.001, len(adapter.addresses)), strict=True)
        for segment in ("all", "think", "answer")
    ]
    (study.path / "ablation").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), study.path / "ablation" / "exact-direction.parquet")
    write_json(study.path / "ablation" / "floor-exact-direction.json", {"kl": 1e-6, "runs": {}})
    gradients = rng.normal(size=(32, len(adapter.addresses)))
    names = {"addresses": ",".join(adapter.addresses)}
    save_file(
        {"kl_NN": (gradients.T @ gradients).astype(np.float32)},
        study.path / "ablation" / "interactions.safetensors",
        names,
    )


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        return int(bound.getsockname()[1])


def ask(base: str, path: str) -> float:
    """Seconds that an answer takes."""
    began = time.perf_counter()
    with urllib.request.urlopen(base + path) as answer:
        answer.read()
    return time.perf_counter() - began


def used(process: psutil.Process) -> float:
    """Seconds of processor time so far."""
    times = process.cpu_times()
    return times.user + times.system


def wait_until_idle(process: psutil.Process) -> float:
    """Seconds until the server has done what it does in the background (at most ten minutes)."""
    began = time.perf_counter()
    while time.perf_counter() - began < 600:
        before = used(process)
        time.sleep(2)
        if used(process) - before < 0.1:
            break
    return time.perf_counter() - began


AT_ONCE = {
    "overview": "/",
    "latent": "/feature/sae.7",
    "direction": "/feature/L7.gate%2B",
    "latent_heldout": "/feature/sae.8?corpus=heldout",
    "direction_heldout": "/feature/L8.gate%2B?corpus=heldout",
    "trace": "/trace/train/1?features=sae.7%2CL7.gate%2B",
    "fires_here": "/fires/train/1/2000.json",
    "table": "/features?q=word7",
    "map": "/map",
}
"""Asked for right after the start, one after the other, while the studio still reads in the background."""
FEATURE_PAGES = ("latent", "latent_heldout", "direction", "direction_heldout")


def pages() -> dict[str, list[str]]:
    """Addresses to ask for, by kind of page."""
    rng = np.random.default_rng(0)
    latents = [int(i) for i in rng.permutation(LATENTS)[:REPEATS]]
    layers = [int(i) for i in rng.permutation(LAYERS)[:REPEATS]]
    return {
        "overview": ["/"] * REPEATS,
        "latent": [f"/feature/sae.{i}" for i in latents],
        "latent_all_examples": [f"/feature/sae.{i}?all=1" for i in latents],
        "latent_heldout": [f"/feature/sae.{i}?corpus=heldout" for i in latents],
        "direction": [f"/feature/L{layer}.gate%2B" for layer in layers],
        "direction_heldout": [f"/feature/L{layer}.gate%2B?corpus=heldout" for layer in layers],
        "map": ["/map"] * REPEATS,
        "interactions": ["/interactions.json"] * REPEATS,
        "evidence": ["/evidence"] * REPEATS,
        "trace": [f"/trace/train/{i}?features=sae.1%2Csae.2" for i in range(REPEATS)],
        "fires_here": [f"/fires/train/{i}/2000.json" for i in range(REPEATS)],
    } | table_pages()


def table_pages() -> dict[str, list[str]]:
    """Searches and sorts of the table of features."""
    return {
        "table": [f"/features?q=word{i}" for i in range(REPEATS)],
        "table_sorted": ["/features?sort=max", "/features?sort=kl&order=rising"] * (REPEATS // 2),
        "table_last_page": ["/features?sort=id&page=9999"] * REPEATS,
    }


def measure(study: Study, asked: dict[str, list[str]]) -> dict[str, float]:
    """Start a studio, ask for its pages, stop it.

    Returns:
        Seconds until the studio answers; of the first answers right after the start; then by kind of page the median
        and the longest that a reader waits, and the mean processor time of the server, which other work on the machine
        does not change; and bytes.
    """
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "lorascope", "studio", str(study.path), "--port", str(port), "--no-open"]
    began = time.perf_counter()
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    process, largest = psutil.Process(server.pid), 0
    try:
        while True:
            try:
                ask(base, "/static/theme.js")
                break
            except OSError:
                if server.poll() is not None:
                    raise SystemExit("The studio has stopped.") from None
                time.sleep(0.02)
        found = {"start": time.perf_counter() - began}
        for name, path in AT_ONCE.items():
            before = used(process)
            found[f"{name}_at_once"] = ask(base, path)
            found[f"{name}_at_once_processor"] = used(process) - before
        found["background"] = wait_until_idle(process)
        found["memory_after_background"] = process.memory_info().rss
        for name, paths in asked.items():
            before = used(process)
            times = [ask(base, path) for path in paths]
            found |= {name: median(times), f"{name}_longest": max(times)}
            found[f"{name}_processor"] = (used(process) - before) / len(paths)
            largest = max(largest, process.memory_info().rss)
        found["memory"] = largest
        return found
    finally:
        server.terminate()
        server.wait()


def judged(found: dict[str, float]) -> dict[str, bool]:
    """Whether the limits hold, by what a reader waits: usually, at the longest, and right after the start."""
    return {
        "start": found["start"] < START,
        "first_view": max(found["overview_at_once"], found["overview_longest"]) < FIRST_VIEW,
        "feature_page_median": max(found[name] for name in FEATURE_PAGES) < FEATURE_PAGE,
        "feature_page_longest": max(found[f"{name}_longest"] for name in FEATURE_PAGES) < FEATURE_PAGE,
        "feature_page_at_once": max(found[f"{name}_at_once"] for name in FEATURE_PAGES) < FEATURE_PAGE,
        "memory": max(found["memory"], found["memory_after_background"]) < MEMORY,
    }


def opened(folder: Path, tokens: int, latents: int) -> Study:
    """The made study of a folder, made if it is not there."""
    there = (folder / "study.json").is_file()
    return Study.open(folder) if there else make_study(folder, tokens, latents)


def main() -> None:
    """Make the studies, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="lorascope-studio-"))
    found = measure(opened(folder / "large", given.tokens, LATENTS), pages())
    many = 10_000 - 2 * LAYERS * len(TYPES)
    table = measure(opened(folder / "rows", min(given.tokens, 400_000), many), table_pages())
    kept = {name: value for name, value in table.items() if name.startswith("table") or name == "start"}
    said = {"tokens": given.tokens, "latents": LATENTS, "held": judged(found)} | found | {"rows_10000": kept}
    print(json.dumps(said, indent=2))
    if given.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
