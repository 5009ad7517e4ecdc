"""What an export leaves out because it has not been made: each with the command that makes it."""

from collections.abc import Sequence
from typing import Any

from lorascope.features import CONTROLS
from lorascope.study import Study
from lorascope.views.reading import missing

Json = dict[str, Any]


def missing_features(study: Study, corpus: str, kinds: Sequence[str]) -> list[Json]:
    """Latents that are not among the kinds with examples, and explanations of those that are; controls need none."""
    gone = []
    if "latent" not in kinds:
        trained = (study.path / "sae" / "cfg.json").is_file()
        command = f"lorascope examples STUDY --corpus {corpus} --kinds latent" if trained else "lorascope sae STUDY"
        gone.append(missing(study, "latents", command)["missing"])
    for kind in kinds:
        if kind not in CONTROLS and not (study.path / "explanations" / f"{kind}.jsonl").is_file():
            command = f"lorascope explain STUDY --kinds {kind}"
            gone.append(missing(study, f"explanations of {kind}s", command)["missing"])
    return gone
