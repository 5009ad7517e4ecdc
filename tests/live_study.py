"""Studies whose planted direction has a trigger and writes a word, for Live and the walk; and what the engine says."""

import contextlib
import queue
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from lorascope.cli import main
from lorascope.studio.live import Job
from lorascope.study import Study
from planted_model import WRITER, plant_writer, planted_traces, save_planted

RECORDED = (["record"], ["record", "--corpus", "heldout"], ["examples"])
WHOLE = (
    *RECORDED[:2],
    ["ablate", "--traces", "4"],
    ["sae", "--k", "3", "--expansion", "1", "--tokens", "40000", "--patched-tokens", "500"],
    ["examples"],
    ["examples", "--corpus", "heldout"],
    ["explain"],
    ["lens"],
)
"""Every stage that the studio's pages draw from and that needs no training."""


def make_live_study(folder: Path, stages: tuple[list[str], ...] = RECORDED, *, traces: int = 40) -> Study:
    """Model, adapter, recordings and examples; no SAE, unless the stages make one."""
    model, adapter = save_planted(folder, units=512)
    plant_writer(model, adapter)
    file = planted_traces(folder / "all.jsonl")
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:traces]))
    path = folder / "study"
    new = ["new", "--model", str(model), "--traces", str(file), "--adapter", str(adapter), "--system", ""]
    for name, *rest in (new, *stages):
        assert main([name, str(path), *rest]) == 0, name
    return Study.open(path)


def make_planted_study(folder: Path) -> Study:
    """The whole of it: one direction that is on the map, has a trigger in the traces, and can be steered."""
    return make_live_study(folder, WHOLE, traces=120)


def strong_amount(study: Study) -> float:
    """An amount that makes the planted effect 200, far beyond what else is in the residual stream."""
    table = pq.read_table(study.path / "examples" / "train" / "direction-stats.parquet").to_pydict()
    return 200 / dict(zip(table["feature"], table["p99"], strict=True))[WRITER]


def drained(job: Job) -> list[dict[str, Any]]:
    """All that a job says, to its end."""
    events = []
    for _ in range(300):
        with contextlib.suppress(queue.Empty):
            events.append(job.events.get(timeout=0.2))
            if events[-1]["event"] in ("done", "failed"):
                return events
    raise AssertionError("the job never ended")
