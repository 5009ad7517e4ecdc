"""All benchmarks beside their peers: `make bench`, or some of them: `python benchmarks/bench.py --only train,record`.

    python benchmarks/bench.py [--study bench-study] [--only FILE,FILE]

Makes a small study of SmolLM2 first (an adapter trained for some steps, its recording), runs every file of rows in a
process of its own, merges what it gives into `benchmarks/results.json`, and writes the README's table between its
markers and the plot of the scaling runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import MODEL

HERE = Path(__file__).resolve().parent
RESULTS, README, PLOT = HERE / "results.json", HERE.parent / "README.md", HERE.parent / "docs" / "scaling.svg"
FILES = ("sae", "steer", "examples", "record", "ablate", "scaling", "train")
APART = ("judge",)
"""Measured only when named, for it is long and depends on no model; begins the names of its rows."""
ON_CPU_ALONE = ("examples", "judge")
BEGIN, END = "<!-- benchmarks -->", "<!-- end of benchmarks -->"
STEPS = 24

TABLE = {
    "train_vs_trl": (
        "rank-1 training on SmolLM2, 16 traces a step, of like length and packed",
        "TRL SFTTrainer + PEFT, 16 in random order, padded",
        "2.0",
    ),
    "train_vs_trl_our_batches": ("the same", "TRL given our steps, padded", ""),
    "train_memory_vs_trl": ("its peak memory, 2,048 tokens at a time", "TRL SFTTrainer + PEFT", "at most 0.75"),
    "train_roofline": ("its share of the GEMM limit", "measured GEMM rate", "0.55"),
    "record_vs_bare": ("recording every scalar", "the bare trunk's forward of the same batches", "0.95"),
    "record_vs_bare_prepacked": ("the same", "the bare trunk on our prepacked weights", ""),
    "record_vs_hooks": ("the same", "PEFT + a hook on every `lora_A`, batches in the corpus's order", "1.4"),
    "record_vs_hooks_our_batches": ("the same", "PEFT + hooks given our batches, padded", ""),
    "record_vs_nnsight": ("the same", "PEFT traced by nnsight, batches in the corpus's order", ""),
    "ablate_exact_vs_naive": ("exact leave-one-out, 210 directions", "one full forward each, 10 of them timed", "1.6"),
    "ablate_screen_vs_naive": ("screening, 210 directions", "the same", "18"),
    "screen_spearman": ("its rank correlation with exact", "", "0.95"),
    "sae_vs_saelens": ("SAE training", "SAELens", "4"),
    "sae_vs_dictionary_learning": ("SAE training", "dictionary_learning", "3"),
    "examples_scalars_per_s": ("exact top 50, both polarities", "(no exact peer: the floor)", "1e8"),
    "steer_vs_peft": ("steered generation", "PEFT generate, unsteered", "0.9"),
    "judge_requests": ("judging 10,000 features, killed and resumed", "the official client alone", ""),
    "judge_memory": ("its peak memory", "1,000 features", "at most 1.1"),
}


def lorascope(*arguments: str) -> None:
    """One command of the product."""
    subprocess.run([sys.executable, "-m", "lorascope", *arguments], check=True, stdout=sys.stderr)


def prepare(study: Path) -> None:
    """The study that the rows are measured on; what is there is not made again."""
    if not (study / "study.json").exists():
        new = ["--model", MODEL, "--traces", "tasks:chain=3,letters=3,sort", "--system", ""]
        lorascope("new", str(study), *new, "--train-problems", "768", "--heldout", "64")
    train = ["--max-steps", str(STEPS), "--learning-rate", "2e-3", "--eval-every", "1000", "--eval-traces", "8"]
    lorascope("train", str(study), *train)
    lorascope("record", str(study))


def measure(study: Path, files: list[str]) -> dict[str, Any]:
    """Run files of rows, on the CPU and on a GPU if there is one; merges what it finds into what earlier runs found.

    A run of all files starts from nothing but the rows of those apart, so that all others are of one run.
    """
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if set(files) == set(FILES):
        results = {key: found for key, found in results.items() if key.startswith(APART)}
    devices = {"cpu": ""} | ({"cuda": "_cuda"} if torch.cuda.is_available() else {})
    run, made = time.strftime("%Y-%m-%d %H:%M"), commit()
    for name, (device, suffix) in itertools.product(files, devices.items()):
        if device == "cuda" and name in ON_CPU_ALONE:
            continue
        started = time.perf_counter()
        command = [sys.executable, str(HERE / f"{name}.py"), str(study)]
        environment = os.environ | {"BENCH_DEVICE": device}
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
        rows = json.loads(output.splitlines()[-1])
        spent = round(time.perf_counter() - started)
        stamp = {"machine": rows.pop("machine"), "run": run, "commit": made, "file_seconds": spent}
        results |= {key + suffix: found | stamp for key, found in rows.items()}
        RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        print(f"{name} on {device}: {spent} s", file=sys.stderr, flush=True)
    return results


def commit() -> str:
    """The state of the code, with + where it was changed since."""
    told = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=HERE, stdout=subprocess.PIPE, text=True)
    return told.stdout.strip()


def reached(found: dict[str, Any], floor: str) -> str:
    """Whether a row is at its floor and its values agree with the peer's; nothing where there is no floor."""
    if not floor:
        return ""
    limit = float(floor.removeprefix("at most "))
    good = found["ratio"] <= limit if floor.startswith("at most") else found["ratio"] >= limit
    return "yes" if good and found.get("agrees", True) else "**no**"


def number(value: float) -> str:
    """Three figures that a reader takes in at once."""
    return f"{value:,.0f}" if 100 <= value < 1e6 else f"{value:.3g}"


def table(results: dict[str, Any]) -> str:
    """The README's table; a row that was not measured is left out."""
    lines = ["| work | beside | ours | peer's | ratio | floor | reached |", "|---|---|---|---|---|---|---|"]
    for (key, (work, peer, floor)), suffix in itertools.product(TABLE.items(), ("", "_cuda")):
        found = results.get(key + suffix)
        if found:
            work += " (GPU)" if suffix else ""
            if "unexplained_ours" in found:
                both = (f"{found[f'unexplained_{side}']:.3f}" for side in ("ours", "peer"))
                sizes = ", ".join(f"{number(size['ratio'])} at {size['size']}" for size in found["sizes"])
                work += f" ({sizes}; variance unexplained {' and '.join(both)})"
            unit = found["unit"].split(",")[0]
            lines.append(
                f"| {work} | {peer} | {number(found['ours'])} {unit} | {number(found['peer'])} | "
                f"**{number(found['ratio'])}** | {floor} | {reached(found, floor)} |"
            )
    runs = sorted({f"{found.get('run')} at commit {found.get('commit')}" for found in results.values()})
    machines = sorted({found["machine"] for found in results.values()})
    made = f"Medians of `make bench`, {' and '.join(runs)}; {'; '.join(machines)}."
    return "\n".join([BEGIN, made, "", *lines, END])


def write_readme(results: dict[str, Any]) -> None:
    """Put the table between the README's markers."""
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if rest:
        README.write_text(before + table(results) + after, encoding="utf-8")


def plot(results: dict[str, Any]) -> None:
    """Time and memory at 1, 4 and 16 times the work, on logarithmic axes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "lorascope"
    from matplotlib import pyplot

    rows = {key.removeprefix("scaling_"): r["runs"] for key, r in results.items() if key.startswith("scaling_")}
    if not rows:
        return
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for name, runs in rows.items():
        sizes = [run["size"] for run in runs]
        once = runs[0]["seconds"] / runs[0]["work"]
        work = [run["work"] / runs[0]["work"] for run in runs]
        left.plot(work, [run["seconds"] / (once * runs[0]["work"]) for run in runs], "o-", label=name)
        right.plot(sizes, [run["peak"] for run in runs], "o-", label=name)
    left.plot([1, 16], [1, 16], "k:", label="linear")
    left.set(xscale="log", yscale="log", xlabel="work", ylabel="time (once = 1)", title="Time grows with the work")
    right.set(xscale="log", ylim=(0, None), xlabel="work", ylabel="GiB allocated at the peak", title="Memory does not")
    for axes in (left, right):
        axes.set_xticks([1, 4, 16], ["1x", "4x", "16x"], minor=False)
        axes.minorticks_off()
    left.set_yticks([1, 4, 16], ["1x", "4x", "16x"])
    left.legend(frameon=False)
    figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    """Prepare, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=Path("bench-study"))
    parser.add_argument("--only", default=",".join(FILES), help="comma list of files of rows")
    options = parser.parse_args()
    files = options.only.split(",")
    if unknown := [name for name in files if name not in FILES + APART]:
        parser.error(f"there are no rows {unknown[0]!r}; choose from {', '.join(FILES + APART)}")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    started = time.perf_counter()
    if set(files) - set(APART):
        prepare(options.study)
    results = measure(options.study, files)
    print(f"{(time.perf_counter() - started) / 60:.0f} min in all", file=sys.stderr, flush=True)
    write_readme(results)
    plot(results)
    print(table(results))


if __name__ == "__main__":
    main()
