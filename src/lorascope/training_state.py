"""What an interrupted training run continues from, and the metrics that it writes."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorascope.study import atomic_write_text, read_json, write_json


@dataclass
class State:
    """Where a run is: the step, and a folder with its weights or, once it has ended, its result."""

    folder: Path
    key: str
    """Of everything that the run's weights depend on."""
    step: int = 0

    def save(self, optimizer: Any, parameters: Sequence[Tensor]) -> None:
        """Write parameters and AdamW's moments; the number of the step goes last, so half a state is none."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for i, p in enumerate(parameters):
            moments = optimizer.state[p]
            tensors |= {f"{i}.value": p.detach(), f"{i}.m": moments["exp_avg"], f"{i}.v": moments["exp_avg_sq"]}
        weights = self._weights(self.step)
        temporary = weights.with_name(f".{weights.name}.tmp")
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)
        os.replace(temporary, weights)
        self._keep("state.json", {"key": self.key, "step": self.step}, weights)

    def load(self, optimizer: Any, parameters: Sequence[Tensor]) -> None:
        """Continue from a saved state of the same run, if there is one; another run's is removed.

        That one's metrics are about to be written over, so nothing could continue from it.
        """
        saved = self._own("state.json")
        if saved is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        self.step = saved["step"]
        tensors = load_file(self._weights(self.step))
        for i, p in enumerate(parameters):
            p.data.copy_(tensors[f"{i}.value"])
            optimizer.state[p] = {
                # A fused AdamW on a GPU counts its steps there.
                "step": torch.tensor(float(self.step), device=p.device),
                "exp_avg": tensors[f"{i}.m"].to(p.device),
                "exp_avg_sq": tensors[f"{i}.v"].to(p.device),
            }

    def finish(self, result: dict[str, Any]) -> None:
        """Keep what the run gave in the place of what it would continue from."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._keep("result.json", {"key": self.key, "result": result})

    def result(self) -> dict[str, Any] | None:
        """What the same run gave when it came to its end, None where it did not."""
        saved = self._own("result.json")
        return None if saved is None else saved["result"]

    def _weights(self, step: int) -> Path:
        return self.folder / f"{self.key[:16]}-{step}.safetensors"

    def _own(self, name: str) -> Any:
        file = self.folder / name
        saved = read_json(file) if file.exists() else {}
        return saved if saved.get("key") == self.key else None

    def _keep(self, name: str, value: dict[str, Any], *beside: Path) -> None:
        write_json(self.folder / name, value)
        for old in self.folder.iterdir():
            if old not in (self.folder / name, *beside):
                old.unlink()


class Metrics:
    """`train/NAME.jsonl`: one line per step; on resuming, lines after the resumed step are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() and step else [""]
        # What follows the last line break is nothing, or a line that was cut off.
        rows = [json.loads(line) for line in lines[:-1]]
        self.path = path
        self.rows: list[dict[str, Any]] = [row for row in rows if row["step"] <= step]
        atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, **row: Any) -> None:
        """Append one row."""
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
