"""Explaining 10,000 features by a scripted judge: requests per second, flat memory, killed and resumed.

python benchmarks/judge.py [STUDY] [--features 10000]

A server in a process of its own answers at once, so what is measured is lorascope and the official client. The run is
killed (SIGKILL) when half of its requests are answered, and resumed; the server counts what it was asked twice, and
nothing may be among it that was kept before the kill. Memory is compared with that of a tenth of the features. Needs
the extra `judge`. Takes about ten minutes, so `make bench` does it only when asked to: `make bench ONLY=judge`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from common import print_rows, row, versions

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path.insert(0, str(TESTS))

EXAMPLES, ASKED = 5, 10
"""So each of the six scores (own, wrong, shuffled; detection, fuzzing) is one request: 8 for a feature in all."""
REQUESTS = 8
WORKERS = 8
"""`--judge-concurrency`, as it is unless given: so many answers may be on their way when a run is killed."""


def name_of(messages: list[dict[str, str]]) -> str:
    """A short name of a question."""
    return hashlib.blake2b(json.dumps(messages).encode(), digest_size=8).hexdigest()


def serve() -> None:
    """Answer every question at once until SIGTERM. Its stdout: the address, then what it was asked and how often."""
    from scripted_judge import Said, pieces_of, prompt_of, scripted_judge

    asked: Counter[str] = Counter()

    def script(request: dict[str, Any]) -> Said:
        asked[name_of(request["messages"])] += 1
        kind, shown = prompt_of(request)
        if kind == "confidence":
            return Said(json.dumps({"confidence": [len(text) % 11 for _, text in pieces_of(shown)]}))
        words = f"words number {hash(shown) % 10**9}"
        return Said(json.dumps({"explanation": words, "reason": words, "class": 1}))

    signal.signal(signal.SIGTERM, lambda *_: None)
    with scripted_judge(script, keep=False) as server:
        print(server.url, flush=True)
        signal.pause()
    print(json.dumps({"received": asked.total(), "twice": [name for name, count in asked.items() if count > 1]}))


@contextmanager
def scripted_server() -> Iterator[tuple[str, dict[str, Any]]]:
    """The address of a server in a process of its own, and a dict that has its counts once it has ended."""
    process = subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    counts: dict[str, Any] = {}
    try:
        yield process.stdout.readline().strip(), counts
        process.terminate()
        counts |= json.loads(process.stdout.read())
    finally:
        process.kill()
        process.wait()


def make_study(path: Path, features: int) -> None:
    """A study whose directions fire on 3.5% of random tokens, half in each polarity."""
    from lorascope.study import write_json
    from planted_text import make_tokenizer, random_tokens
    from tiny_store import make_study, write_store

    study = make_study(path)
    (path / "tokenizer").mkdir()
    make_tokenizer().save(str(path / "tokenizer" / "tokenizer.json"))
    for seed, corpus in enumerate(("train", "heldout")):
        tokens, segments, offsets = random_tokens(seed, 120)
        rng = np.random.default_rng(seed)
        shape = len(tokens), features // 2
        z = (1 + rng.random(shape, np.float32)) * (rng.random(shape, np.float32) < 0.035)
        z[rng.random(shape, np.float32) < 0.5] *= -1
        write_store(
            study, z, np.diff(offsets).tolist(), corpus=corpus, tokens=tokens, segments=segments, shard_tokens=4096
        )
    levels = {f"L{k}.gate{sign}": 0.5 for k in range(features // 2) for sign in "+-"}
    write_json(path / "examples" / "levels.json", {"direction": levels})


def explain(study: Path, url: str) -> subprocess.Popen[bytes]:
    """Start `lorascope explain` with the judge in a process of its own."""
    command = [sys.executable, "-m", "lorascope", "explain", str(study), "--kinds", "direction", "--explainer", "judge"]
    command += ["--judge-model", "scripted", "--judge-url", url, "--examples", str(EXAMPLES), "--asked", str(ASKED)]
    return subprocess.Popen([*command, "--judge-concurrency", str(WORKERS)], stdout=subprocess.DEVNULL)


def watch(run: subprocess.Popen[bytes], until: Callable[[], bool] = lambda: False) -> float:
    """The most memory of a process that is no mapped file, MiB, until it ends or a moment comes; every 50 ms.

    What the system says of a process that has ended would not do: on Linux it counts from before the new program is
    loaded, when a child still has its parent's memory. The pages of mapped files are the system's to drop.
    """
    process, peak, looked = psutil.Process(run.pid), 0.0, 0
    while run.poll() is None and not (looked % 10 == 0 and until()):
        with suppress(psutil.Error):
            memory = process.memory_info()
            peak = max(peak, (memory.rss - getattr(memory, "shared", 0)) / 2**20)
        looked += 1
        time.sleep(0.05)
    return peak


class Lines:
    """Counts the whole lines of a growing file, 0 while it does not exist; what was read is not read again."""

    def __init__(self, file: Path) -> None:
        """Nothing read yet."""
        self.file, self.place, self.count = file, 0, 0

    def __call__(self) -> int:
        """How many there are now."""
        if self.file.is_file():
            with self.file.open("rb") as opened:
                opened.seek(self.place)
                new = opened.read()
            self.place, self.count = self.place + len(new), self.count + new.count(b"\n")
        return self.count


def names_in(log: Path) -> list[str]:
    """The questions whose answers a judge's file has."""
    with log.open("rb") as file:
        return [name_of(json.loads(line)["messages"]) for line in file if line.endswith(b"\n")]


def measure(features: int, folder: Path) -> dict[str, Any]:
    """Requests per second, peak memory and repeated calls of one run, killed once and resumed."""
    study = folder / f"study-{features}"
    make_study(study, features)
    log = study / "explanations" / "judges" / "scripted.jsonl"
    with scripted_server() as (url, counts):
        killed = explain(study, url)
        lines = Lines(log)
        peaks = [watch(killed, lambda: lines() >= features * REQUESTS // 2)]
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        kept = set(names_in(log))
        started = time.perf_counter()
        resumed = explain(study, url)
        peaks.append(watch(resumed))
        seconds = time.perf_counter() - started
        if resumed.returncode != 0:
            raise SystemExit("lorascope explain failed; see its message above.")
    stages = json.loads((study / "study.json").read_text())["stages"]
    result = stages["explain:heldout:direction:judge:scripted"]["result"]
    answered = names_in(log)
    return {
        "features": result["n"],
        "scored": result["n_detection"],
        "requests": len(answered),
        "kept_before_the_kill": len(kept),
        "asked_again_of_these": len(kept & set(counts["twice"])),
        "asked_again_of_all": counts["received"] - len(set(answered)),
        "sent_by_the_resumed_run": result["spent"]["calls"],
        "requests_per_second": round(result["spent"]["calls"] / seconds, 1),
        "seconds": round(seconds, 1),
        "peak_mib": [round(peak, 1) for peak in peaks],
        "log_mib": round(log.stat().st_size / 2**20, 1),
    }


def bare_client(requests: int = 4_000, size: int = 2_000) -> float:
    """Requests per second of the official client in as many threads, with questions of a like size and nothing kept."""
    import openai

    filler = "1. (think) " + json.dumps("x" * size)
    with scripted_server() as (url, _), ThreadPoolExecutor(WORKERS) as pool:
        client = openai.OpenAI(api_key="none", base_url=url)

        def ask(number: int) -> Any:
            told = {"role": "system", "content": '{"confidence"'}
            messages: Any = [told, {"role": "user", "content": f"{number}\n{filler}"}]
            return client.chat.completions.create(model="scripted", messages=messages)

        started = time.perf_counter()
        for _ in pool.map(ask, range(requests)):
            pass
        return requests / (time.perf_counter() - started)


def main() -> None:
    """The rows as the last line of stdout; one line per size before it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("study", type=Path, nargs="?", help="not used: a study of its own is made")
    parser.add_argument("--features", type=int, default=10_000)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for features in (options.features // 10, options.features):
            runs.append(measure(features, Path(folder)))
            print(json.dumps(runs[-1]), flush=True)
    few, many = (max(run["peak_mib"]) for run in runs)
    ours, peer = runs[-1]["requests_per_second"], bare_client()
    again = sum(run["asked_again_of_these"] for run in runs)
    print_rows(
        {
            "judge_requests": row(
                ours / peer, ours, peer, "requests/s", agrees=again == 0, runs=runs, versions=versions("openai")
            ),
            "judge_memory": row(many / few, many, few, "MiB"),
        }
    )


if __name__ == "__main__":
    main()
