"""How well the explanations of controls do: what a single feature's score stands beside."""

from lorascope.explained import explainers_of
from lorascope.features import CONTROLS
from lorascope.study import Study
from lorascope.views.reading import Json
from lorascope.views.scores import current_records, score_row


def control_means(study: Study) -> list[Json]:
    """Mean scores of the explanations of every kind of control that was explained, by explainer.

    Returns:
        `[{"explainer", "kind", "label", "means": {"detection": mean, "fuzzing": mean}}]`; a task without scores is left
        out.
    """
    found: list[Json] = []
    for explainer in explainers_of(study):
        for kind, record in current_records(study, explainer).items():
            if kind not in CONTROLS or not record["result"].get("n"):
                continue
            row = score_row(explainer, kind, record["result"])
            means = {task: scores["own"]["value"] for task, scores in row["tasks"].items() if scores}
            found.append({"explainer": explainer, "kind": kind, "label": row["label"], "means": means})
    return found
