"""Explaining 10,000 features by a scripted judge: requests per second, flat memory, killed and resumed.

python benchmarks/judge.py [--features 10000]

A server in a process of its own answers at once, so what is measured is lorascope and the official client. Memory is
compared with that of a tenth of the features. The run is killed in the middle and resumed; the requests that were
answered and kept before are not sent again. Needs the extra `judge`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path.insert(0, str(TESTS))

EXAMPLES, ASKED = 5, 10
"""So each of the six scores (own, wrong, shuffled; detection, fuzzing) is one request: 8 for a feature in all."""


def serve() -> None:
    """Answer every question at once until killed; the first line of stdout is the address."""
    from scripted_judge import Said, pieces_of, prompt_of, scripted_judge

    def script(request: dict[str, Any]) -> Said:
        kind, shown = prompt_of(request)
        if kind == "confidence":
            return Said(json.dumps({"confidence": [len(text) % 11 for _, text in pieces_of(shown)]}))
        words = f"words number {hash(shown) % 10**9}"
        return Said(json.dumps({"explanation": words, "reason": words, "class": 1}))

    with scripted_judge(script, keep=False) as server:
        print(server.url, flush=True)
        signal.pause()


def make_study(path: Path, features: int) -> None:
    """A study whose directions fire on 2.5% of random tokens, half in each polarity."""
    from lorascope.study import write_json
    from planted_text import make_tokenizer, random_tokens
    from tiny_store import make_study, write_store

    study = make_study(path)
    (path / "tokenizer").mkdir()
    make_tokenizer().save(str(path / "tokenizer" / "tokenizer.json"))
    for seed, corpus in enumerate(("train", "heldout")):
        tokens, segments, offsets = random_tokens(seed, 40)
        rng = np.random.default_rng(seed)
        z = rng.uniform(1, 2, (len(tokens), features // 2)) * (rng.random((len(tokens), features // 2)) < 0.025)
        z *= rng.choice([-1, 1], z.shape)
        write_store(
            study, z, np.diff(offsets).tolist(), corpus=corpus, tokens=tokens, segments=segments, shard_tokens=4096
        )
    levels = {f"L{k}.gate{sign}": 0.5 for k in range(features // 2) for sign in "+-"}
    write_json(path / "examples" / "levels.json", {"direction": levels})


def explain(study: Path, url: str) -> subprocess.Popen[bytes]:
    """Start `lorascope explain` with the judge in a process of its own."""
    command = [sys.executable, "-m", "lorascope", "explain", str(study), "--kinds", "direction", "--explainer", "judge"]
    command += ["--judge-model", "scripted", "--judge-url", url, "--examples", str(EXAMPLES), "--asked", str(ASKED)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def lines_in(file: Path) -> int:
    """Whole lines in a file, none when it does not exist."""
    if not file.is_file():
        return 0
    with file.open("rb") as opened:
        return sum(block.count(b"\n") for block in iter(lambda: opened.read(1 << 20), b""))


def measure(features: int, url: str, folder: Path, kill_after: int) -> dict[str, Any]:
    """Requests per second and peak memory of one run, killed once after so many requests and resumed."""
    study = folder / f"study-{features}"
    make_study(study, features)
    log = study / "explanations" / "judges" / "scripted.jsonl"
    before = 0
    if kill_after:
        run = explain(study, url)
        while lines_in(log) < kill_after:
            time.sleep(0.2)
        run.send_signal(signal.SIGKILL)
        run.wait()
        before = lines_in(log)
    started = time.perf_counter()
    if explain(study, url).wait() != 0:
        raise SystemExit("lorascope explain failed; see its message above.")
    seconds = time.perf_counter() - started
    record = json.loads((study / "study.json").read_text())["stages"]["explain:heldout:direction:judge:scripted"]
    keys = [json.loads(line)["key"] for line in log.open(encoding="utf-8")]
    sent = record["result"]["spent"]["calls"]
    return {
        "features": record["result"]["n"],
        "scored": record["result"]["n_detection"],
        "requests": len(keys),
        "kept_before_the_kill": before,
        "sent_by_the_resumed_run": sent,
        "asked_twice": len(keys) - len(set(keys)),
        "requests_per_second": round(sent / seconds, 1),
        "seconds": round(seconds, 1),
        "peak_mib": round(record["peak_rss"] / 2**20, 1),
        "log_mib": round(log.stat().st_size / 2**20, 1),
    }


def main() -> None:
    """Print one JSON line per size."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--features", type=int, default=10_000)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    server = subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    url = server.stdout.readline().strip()
    try:
        with tempfile.TemporaryDirectory() as folder:
            for features in (options.features // 10, options.features):
                print(json.dumps(measure(features, url, Path(folder), features)), flush=True)
    finally:
        server.terminate()
        server.wait()
    print(json.dumps({"machine": f"{os.cpu_count()} CPUs, the server on the same"}))


if __name__ == "__main__":
    main()
