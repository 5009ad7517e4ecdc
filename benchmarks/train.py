"""Rank-1 training on SmolLM2: real tokens per second, memory and share of the GEMM limit, beside TRL + PEFT.

    python benchmarks/train.py STUDY [--contestant ours|trl|trl_alike]

All see the same traces in steps of 16, the loss on the response only, fp32. TRL takes them in random order, as its
trainer does unless told otherwise, and pads each batch; `trl_alike` is TRL given our batches of like length. Each
contestant runs in a process of its own, in turn, so that peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import DEVICE, HEAD, MODEL, TRUNK, peak_memory, print_rows, roofline, row, versions

STEPS, WARMUP, BATCH, RATE, REPEATS = 4, 1, 16, 2e-3, 3


def ours(study: Path) -> dict[str, Any]:
    from lorascope.config import Options
    from lorascope.study import Study
    from lorascope.training import TrainConfig, train

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "study"
        shutil.copytree(study, copy, ignore=shutil.ignore_patterns("adapter", "train", "scalars"))
        manifest = json.loads((copy / "study.json").read_text())
        (copy / "study.json").write_text(json.dumps(manifest | {"stages": {}, "adapter": None}))
        config = TrainConfig(
            max_steps=STEPS, batch=BATCH, learning_rate=str(RATE), eval_every=1000, eval_traces=2, warmup=0
        )
        train(Study.open(copy), config, Options(device=DEVICE))
        lines = [json.loads(line) for line in (copy / "train" / "adapter.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    kept = steps[WARMUP:]
    return {
        "seconds": [line["seconds"] for line in kept],
        "tokens": sum(line["tokens"] for line in kept),
        "supervised": sum(line["supervised"] for line in kept),
        "losses": [line["loss"] for line in steps],
        "peak": peak_memory(),
    }


def planned(study: Path) -> tuple[Any, list[Any], list[list[int]]]:
    """The traces and the steps that our training takes."""
    from lorascope.models import load_tokenizer
    from lorascope.study import Study
    from lorascope.training_plan import plan_steps

    opened = Study.open(study)
    tokenizer = load_tokenizer(MODEL)
    rendered, _ = opened.renderer(tokenizer).render_all(opened.traces("train"))
    return tokenizer, rendered, plan_steps([len(r.ids) for r in rendered], BATCH, 5.0, STEPS, 0)


def trl(study: Path, alike: bool = False) -> dict[str, Any]:
    import time

    from datasets import Dataset
    from peft import PeftModel
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from lorascope.adapter import initial_adapter
    from lorascope.models import load_model

    tokenizer, rendered, steps = planned(study)
    if not alike:
        steps = np.random.default_rng(0).permutation(np.concatenate(steps)).reshape(-1, BATCH).tolist()
    chosen = [rendered[i] for step in steps for i in step]
    data = Dataset.from_list(
        [
            {
                "input_ids": r.ids.tolist(),
                "labels": [-100] * r.response_start + r.ids[r.response_start :].tolist(),
            }
            for r in chosen
        ]
    )
    model, _ = load_model(MODEL, device=DEVICE)
    times: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            times[-1] += time.perf_counter()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                losses.append(float(logs["loss"]))

    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            max_steps=STEPS,
            learning_rate=RATE,
            lr_scheduler_type="cosine",
            weight_decay=1e-4,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            train_sampling_strategy="sequential",
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            bf16=False,
            fp16=False,
            use_cpu=DEVICE == "cpu",
            gradient_checkpointing=False,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            disable_tqdm=True,
        )
        # Ours draws its first adapter from the seed; PEFT loads the same one.
        torch.manual_seed(0)
        initial_adapter(model, patterns="attn,mlp", rank=1, alpha=16.0, seed=0, base_name=MODEL).save(Path(folder))
        trainer = SFTTrainer(
            model=PeftModel.from_pretrained(model, folder, is_trainable=True),
            args=config,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        trainer.train()
    kept = [i for step in steps[WARMUP:] for i in step]
    return {
        "seconds": times[WARMUP:],
        "tokens": sum(len(rendered[i].ids) for i in kept),
        "supervised": sum(len(rendered[i].ids) - rendered[i].response_start for i in kept),
        "losses": losses,
        "peak": peak_memory(),
    }


def run(contestant: str, study: Path) -> dict[str, Any]:
    """One contestant in a process of its own."""
    command = [sys.executable, __file__, str(study), "--contestant", contestant]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def measure(study: Path) -> dict[str, Any]:
    """The three rows of training."""
    rounds = [{name: run(name, study) for name in CONTESTANTS} for _ in range(REPEATS)]

    def speed(result: dict[str, Any]) -> float:
        return float(result["tokens"] / sum(result["seconds"]))

    speeds = {name: statistics.median(speed(r[name]) for r in rounds) for name in CONTESTANTS}
    memory, peer_memory = (statistics.median(r[name]["peak"] for r in rounds) for name in ("ours", "trl"))
    own = rounds[0]["ours"]
    flops = 4 * TRUNK * own["tokens"] + 4 * HEAD * own["supervised"]
    spent = statistics.median(sum(r["ours"]["seconds"]) for r in rounds)
    limits = roofline(spent, flops, 4 * (2 * TRUNK + 2 * HEAD) * len(own["seconds"]))
    pairs = zip(own["losses"], rounds[0]["trl_alike"]["losses"], strict=True)
    apart = max(abs(mine - theirs) / theirs for mine, theirs in pairs)
    return {
        "train_vs_trl": row(
            statistics.median(speed(r["ours"]) / speed(r["trl"]) for r in rounds),
            speeds["ours"],
            speeds["trl"],
            "real tokens/s",
            agrees=apart < 1e-3,
            losses={name: [round(loss, 4) for loss in rounds[0][name]["losses"]] for name in CONTESTANTS},
            largest_relative_difference_on_our_batches=apart,
            versions=versions("trl", "peft", "transformers"),
        ),
        "train_vs_trl_our_batches": row(
            statistics.median(speed(r["ours"]) / speed(r["trl_alike"]) for r in rounds),
            speeds["ours"],
            speeds["trl_alike"],
            "real tokens/s",
        ),
        "train_memory_vs_trl": row(
            memory / peer_memory,
            memory,
            peer_memory,
            "GiB peak, less is better",
            peer_on_our_batches=statistics.median(r["trl_alike"]["peak"] for r in rounds),
        ),
        "train_roofline": row(
            limits["share_of_gemm_limit"],
            flops / spent / 1e9,
            limits["gemm_rate"] / 1e9,
            "GFLOP/s of the measured GEMM rate",
            **limits,
        ),
    }


CONTESTANTS = {"ours": ours, "trl": trl, "trl_alike": lambda study: trl(study, alike=True)}


def main() -> None:
    """Run a contestant, or both and compare them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("study", type=Path)
    parser.add_argument("--contestant", choices=CONTESTANTS)
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    print_rows((CONTESTANTS[options.contestant] if options.contestant else measure)(options.study))


if __name__ == "__main__":
    main()
