"""`lorascope demo`: the whole pipeline on the built-in model, from made traces to the report."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorascope.ablation import AblateConfig, ablate
from lorascope.comparison import CompareConfig, compare
from lorascope.config import Options
from lorascope.creation import NewConfig, create_study, local_path
from lorascope.errors import BadInput
from lorascope.evaluation import EvaluateConfig, evaluate
from lorascope.example_search import ExamplesConfig, examples
from lorascope.explain import ExplainConfig, explain_features
from lorascope.explain.categories import CategorizeConfig, categorize
from lorascope.features import CONTROLS
from lorascope.logit_lens import LensConfig, read_lens
from lorascope.models import load_tokenizer
from lorascope.reasoning import ReasoningConfig, find_reasoning
from lorascope.recording import RecordConfig, record
from lorascope.report import ReportConfig, write_report
from lorascope.sae import SAEConfig, decompose
from lorascope.study import Study
from lorascope.training import TrainConfig, train

MODEL = "smollm2-135m-instruct"
TASKS = "chain=3,letters=3,sort"
# Chosen by measurement on 2 cores (docs/log.md): what fits into the demo's time and shows a clear gain.
STEPS = 48
BATCH = 12
PROBLEMS = 120
ABLATION_TRACES = 6
CONFIRMED = 20
PATCHED_TOKENS = 2048
BESIDE = "adapter,random,untrained,neurons"
"""What is read in one run of the adapted model."""
CONTROL_FEATURES = 200


@dataclass(frozen=True)
class DemoConfig:
    """Run the whole pipeline on SmolLM2-135M-Instruct and tasks made on the spot; ends with report.html."""

    quick: bool = False
    """Leave out the full finetune, train on two thirds, read the base model on some traces; halve the problems, the
    traces of ablation, and the tokens of patched KL."""


def run_demo(path: Path | None, config: DemoConfig, options: Options) -> dict[str, Any]:
    """Run every stage in turn (those already done are skipped) and return the headline figures.

    Raises:
        BadInput: the folder is there but holds no study, or one of something else.
    """
    path = path or Path("demo-study")
    if (path / "study.json").exists():
        check_own(Study.open(path))
    started = time.perf_counter()
    half = 2 if config.quick else 1

    def new() -> None:
        load_tokenizer(MODEL)  # fetches and converts the model, the first time
        if not (path / "study.json").exists():
            n = STEPS * BATCH * 2 // 3 if config.quick else STEPS * BATCH
            made = NewConfig(MODEL, f"tasks:{TASKS}", train_problems=n, heldout=PROBLEMS // half, system="")
            create_study(path, made, options)

    stages = plan(lambda: Study.open(path), config, options, half)
    stages.insert(0, ("fetch the model, make traces", new))
    for number, (title, stage) in enumerate(stages, 1):
        begun = time.perf_counter()
        say(f"[{number}/{len(stages)}] {title} ...")
        stage()
        say(f"[{number}/{len(stages)}] {title}: {time.perf_counter() - begun:.0f} s")
    return headline(Study.open(path), time.perf_counter() - started)


def check_own(study: Study) -> None:
    """Refuse a study that the demo did not make: its adapter would be trained anew."""
    made = study.manifest["corpora"].get("train", {}).get("source")
    if (study.model_name, made) != (local_path(MODEL), f"tasks:{TASKS}"):
        raise BadInput(f"The model or the traces of {study.path} are not the demo's; name another folder.")


def plan(
    study: Callable[[], Study], config: DemoConfig, options: Options, half: int
) -> list[tuple[str, Callable[[], object]]]:
    """The demo's stages with their titles, in order."""
    rank1 = TrainConfig(epochs=1.0, batch=BATCH, token_budget=1024, eval_every=24, eval_traces=32)
    test = EvaluateConfig(on=TASKS, n=PROBLEMS // half, off="attn,mlp", max_new_tokens=96, token_budget=24_576)
    stages: list[tuple[str, Callable[[], object]]] = [
        (
            "train a rank-1 adapter",
            lambda: train(study(), replace(rank1, learning_rate="2e-3", checkpoints="4,8,16,32"), options),
        ),
        ("train the full finetune", lambda: train(study(), replace(rank1, full=True, learning_rate="3e-4"), options)),
        ("evaluate on held-out problems", lambda: evaluate(study(), test, options)),
        ("ablate", lambda: ablate_all(study(), ABLATION_TRACES // half, options)),
        ("record the training traces", lambda: record(study(), RecordConfig(source=BESIDE), options)),
        ("record the held-out traces", lambda: record(study(), RecordConfig("heldout", source=BESIDE), options)),
        ("record the base model", lambda: record_base(study(), config.quick, options)),
        (
            "train the sparse autoencoder",
            lambda: decompose(study(), SAEConfig(patched_tokens=PATCHED_TOKENS // half), options),
        ),
        ("find examples", lambda: both_corpora(study(), options)),
        ("explain and score", lambda: explain_features(study(), ExplainConfig(), options)),
        ("reasoning words and the lens", lambda: without_judge(study(), options)),
        ("compare with controls", lambda: compare_kinds(study(), options)),
        ("categories", lambda: categorize(study(), CategorizeConfig(), options)),
        ("write the report", lambda: write_report(study(), ReportConfig(), options)),
    ]
    return [stage for stage in stages if not (config.quick and "full" in stage[0])]


def ablate_all(study: Study, traces: int, options: Options) -> None:
    """Screen every direction, confirm the leaders exactly; layers, types and groups all exactly."""
    for config in (
        AblateConfig(method="screen", traces=traces),
        AblateConfig(by="direction", top=CONFIRMED, traces=traces),
        AblateConfig(by="layer,type,group", traces=traces),
    ):
        ablate(study, config, options)


def record_base(study: Study, quick: bool, options: Options) -> None:
    """The same read vectors on the base model's run; it takes a pass of its own; a quick demo takes few traces."""
    record(study, RecordConfig("heldout", source="base"), options)
    record(study, RecordConfig(source="base", limit=STEPS * BATCH // 8 if quick else None), options)


def compare_kinds(study: Study, options: Options) -> None:
    """Explain a sample of each control as the directions were, and put all kinds into one table."""
    explain_features(study, ExplainConfig(kinds=",".join(CONTROLS), limit=CONTROL_FEATURES), options)
    compare(study, CompareConfig(), options)


def both_corpora(study: Study, options: Options) -> None:
    """Examples on the training and on the held-out traces."""
    for corpus in ("train", "heldout"):
        examples(study, ExamplesConfig(corpus), options)


def without_judge(study: Study, options: Options) -> None:
    """What needs neither judge nor rule: features at reasoning words, tokens that vectors write and read."""
    find_reasoning(study, ReasoningConfig(), options)
    read_lens(study, LensConfig(), options)


def headline(study: Study, seconds: float) -> dict[str, Any]:
    """The figures that the demo ends with."""
    from lorascope.study import read_json

    summary, row = study.summary, read_json(study.path / "eval" / "recovery.json")[0]
    models = {name: row[name]["accuracy"] for name in ("base", "adapter", "full") if row[name]}
    return {
        "problems": row["n"],
        "accuracy": models,
        "adapter_gain": row["gains"]["adapter"],
        "recovery": row["recovery"],
        "recovery_reason": row["recovery_reason"],
        **{key: value for key, value in summary.items() if key != "stages"},
        "peak_rss_gib": round(max(s["peak_rss"] for s in summary["stages"].values()) / 2**30, 2),
        "minutes": round(seconds / 60, 1),
        "report": str((study.path / "report.html").resolve()),
    }


def say(text: str) -> None:
    """A line of progress to stderr."""
    print(text, file=sys.stderr, flush=True)


__all__ = ["DemoConfig", "run_demo"]
