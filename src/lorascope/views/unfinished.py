"""What a study has not run yet, in the order in which stages need each other."""

import re

from lorascope.study import Study

TRAIN = "lorascope train STUDY"
RECORD = "lorascope record STUDY"
SAE = "lorascope sae STUDY"
EXAMPLES = "lorascope examples STUDY"
EXPLAIN = "lorascope explain STUDY"
HELDOUT = " --corpus heldout"
LEFT = {
    TRAIN: "adapter/adapter_config.json",
    RECORD: "scalars/train/adapter/index.json",
    RECORD + HELDOUT: "scalars/heldout/adapter/index.json",
    "lorascope ablate STUDY": "ablation/*-direction.parquet",
    SAE: "sae/sae_weights.safetensors",
    EXAMPLES: "examples/levels.json",
    EXAMPLES + HELDOUT: "examples/heldout/*-stats.parquet",
    EXPLAIN: "explanations/*.jsonl",
}
"""The stages that reading a study needs, in order, each with a file that it leaves."""
NEEDS = {
    "evaluate": [TRAIN],
    "ablate": [TRAIN],
    "record": [TRAIN],
    "lens": [TRAIN, RECORD],
    "sae": [RECORD, RECORD + HELDOUT],
    "examples": [RECORD],
    "reasoning": [RECORD],
    "explain": [RECORD, RECORD + HELDOUT, EXAMPLES],
    "compare": [EXAMPLES, EXAMPLES + HELDOUT, EXPLAIN],
    "categorize": [EXAMPLES, EXAMPLES + HELDOUT, EXPLAIN],
}
"""What a command needs to have been run, in order, beside the recording of a corpus that it names."""


def to_run(study: Study) -> list[str]:
    """Commands of the stages that have not run, in an order that works; of corpora that are not there, none."""
    return [command.replace("STUDY", str(study.path)) for command in LEFT if not has_run(study, command)]


def first_needed(study: Study, command: str) -> str:
    """The first stage that has to run before a command can, or the command."""
    name = command.split(" ", 2)[1]
    needed = list(NEEDS.get(name, []))
    if name in ("examples", "reasoning") and (corpus := re.search(r"--corpus (\S+)", command)):
        needed.append(RECORD if corpus[1] == "train" else f"{RECORD} --corpus {corpus[1]}")
    if "--kinds latent" in command:
        needed.append(SAE)
    gone = next((need for need in needed if not has_run(study, need)), None)
    return first_needed(study, gone) if gone else command


def has_run(study: Study, command: str) -> bool:
    """Whether a stage has left its file; one of a corpus that the study does not have is not waited for."""
    corpus = command.partition("--corpus ")[2]
    pattern = LEFT.get(command, f"scalars/{corpus}/adapter/index.json")
    return bool(corpus and corpus not in study.corpora()) or any(study.path.glob(pattern))
