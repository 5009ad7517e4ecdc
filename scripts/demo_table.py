"""Write the figures of a demo study into the README, between its markers: `python scripts/demo_table.py demo-study`."""

import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from lorascope.study import Study, read_json

START, END = "<!-- demo numbers -->", "<!-- end of demo numbers -->"


def interval(entry: dict[str, float], key: str = "value", digits: int = 2) -> str:
    """`0.49 (0.41 to 0.57)`."""
    return f"{entry[key]:.{digits}f} ({entry['low']:.{digits}f} to {entry['high']:.{digits}f})"


def kl_of_groups(study: Study) -> dict[str, dict[str, Any]]:
    """The rows of the groups over all segments."""
    rows = pq.read_table(study.path / "ablation" / "exact-group.parquet").to_pylist()
    return {row["target"]: row for row in rows if row["segment"] == "all"}


def lines(study: Study) -> list[str]:
    """The README's table and the sentence above it."""
    summary, row = study.summary, read_json(study.path / "eval" / "recovery.json")[0]
    details = read_json(study.path / "eval" / "details.json")
    models = {m["model"]: m for m in details["models"]}
    groups, sae = kl_of_groups(study), summary["sae"]
    versions = study.manifest["stages"]["train:adapter"]["versions"]
    peak = max(s["peak_rss"] for s in summary["stages"].values()) / 2**30
    base = models[details["base_prompt"]]
    recovered = interval(row["recovery"]) if row["recovery"] else "none"
    note = f"; {row['recovery_reason']}" if row["recovery_reason"] else ""
    others = row["others"]
    table = [
        (
            "accuracy, base",
            f"{interval(row['base'], 'accuracy')}, the better of two prompts ({details['base_prompt']}; "
            f"unfinished {base['unfinished']:.2f}, unparsed {base['unparsed']:.2f})",
        ),
        ("accuracy, rank-1 adapter", interval(row["adapter"], "accuracy")),
        ("gain of the adapter over base, paired", interval(row["gains"]["adapter"])),
    ]
    if row["full"]:
        table.append(("accuracy, full finetune on the same examples", interval(row["full"], "accuracy")))
        table.append(("recovery", recovered + note))
    table += [
        ("accuracy with the attention directions off", interval(others["adapter-no-attn"], "accuracy")),
        ("accuracy with the MLP directions off", interval(others["adapter-no-mlp"], "accuracy")),
        (
            "KL(adapted ‖ off), nats per token: attention, MLP, all",
            ", ".join(f"{groups[g]['kl']:.3f}" for g in ("attn", "mlp", "all")),
        ),
        (
            "SAE: variance unexplained (effect unit), L0, dead latents, held out",
            f"{sae['fvu_effect']:.3f}, {sae['l0']:.1f}, {sae['dead']:.1%}",
        ),
        (
            "patched KL as a share of switching the adapter off",
            f"{summary['patched_kl'] / summary['adapter_off_kl']:.3f}",
        ),
        (
            "detection score of the rules, of borrowed rules, difference",
            f"{interval(summary['detection'], 'mean')}, {interval(summary['detection_wrong'], 'mean')}, "
            f"{interval(summary['detection_gain'], 'mean', 3)}",
        ),
        (
            "perplexity on plain text: base, adapter",
            f"{models['base']['perplexity']:.1f}, {models['adapter']['perplexity']:.1f}",
        ),
    ]
    return [
        f"{row['n']} held-out problems; up to {peak:.1f} GiB, {versions['machine']}, "
        f"no GPU (torch {versions['torch']}); intervals are 95%. Made by `make demo`, written here by "
        "`.venv/bin/python scripts/demo_table.py demo-study`.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in table),
    ]


def main() -> None:
    """Replace what stands between the markers."""
    readme = Path(__file__).parent.parent / "README.md"
    text = readme.read_text(encoding="utf-8")
    head, rest = text.split(START)
    tail = rest.split(END)[1]
    body = "\n".join(lines(Study.open(sys.argv[1])))
    readme.write_text(f"{head}{START}\n{body}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
