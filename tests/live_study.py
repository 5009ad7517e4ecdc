"""A study whose planted direction writes one word, for Live; and what its engine says."""

import contextlib
import queue
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from lorascope.cli import main
from lorascope.studio.live import Job
from lorascope.study import Study
from planted_model import planted_traces, save_planted
from test_steering_stage import FEATURE, plant_writer


def make_live_study(folder: Path) -> Study:
    """Model, adapter, recordings and examples; no SAE."""
    model, adapter = save_planted(folder)
    plant_writer(model, adapter)
    traces = planted_traces(folder / "all.jsonl")
    traces.write_text("".join(traces.read_text().splitlines(keepends=True)[:40]))
    path = folder / "study"
    new = ["new", "--model", str(model), "--traces", str(traces), "--adapter", str(adapter), "--system", ""]
    for name, *rest in (new, ["record"], ["record", "--corpus", "heldout"], ["examples"]):
        assert main([name, str(path), *rest]) == 0, name
    return Study.open(path)


def strong_amount(study: Study) -> float:
    """An amount that makes the planted effect 200, far beyond what else is in the residual stream."""
    table = pq.read_table(study.path / "examples" / "train" / "direction-stats.parquet").to_pydict()
    return 200 / dict(zip(table["feature"], table["p99"], strict=True))[FEATURE]


def drained(job: Job) -> list[dict[str, Any]]:
    """All that a job says, to its end."""
    events = []
    for _ in range(300):
        with contextlib.suppress(queue.Empty):
            events.append(job.events.get(timeout=0.2))
            if events[-1]["event"] in ("done", "failed"):
                return events
    raise AssertionError("the job never ended")
