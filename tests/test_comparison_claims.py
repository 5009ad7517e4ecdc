"""What may be claimed from the comparison: beyond the control, of equal text, of answers that came."""

from pathlib import Path

import numpy as np
import pytest

from compared_study import add_kind, classed, explained_row, row_of, the_test
from lorascope.comparison import CompareConfig, compare
from lorascope.config import Options
from lorascope.study import write_json
from lorascope.views import comparison_view
from lorascope.views.compare import MEASURES, comparison_text, verdict
from tiny_store import make_study, write_store

CONFIG = CompareConfig(draws=1000)


def test_a_lead_that_wrong_explanations_share_is_not_found_above_them(tmp_path: Path) -> None:
    """Directions 0.1 above neurons, and so are their wrong explanations: nothing of it is the explanation's."""
    study = make_study(tmp_path / "study")
    rng = np.random.default_rng(0)
    for kind, prefix, lead in (("direction", "", 0.1), ("neuron", "neuron.", 0.0)):
        rows = [explained_row(f"{prefix}L0.{i}+", 0.7 + lead + float(rng.normal(0, 0.03))) for i in range(40)]
        for row in rows:
            for task in ("detection_wrong", "fuzzing_wrong"):
                row["scored"][task]["value"] += lead + float(rng.normal(0, 0.03))
        add_kind(study, kind, rows)
    result = compare(study, CONFIG, Options())
    for raw, controlled in (("score", "gain"), ("fuzzing", "fuzzing_gain")):
        assert the_test(result, "neuron", raw)["p_holm"] < 0.05
        beyond = the_test(result, "neuron", controlled)
        assert beyond["p_holm"] > 0.05
        assert beyond["difference"]["low"] < 0 < beyond["difference"]["high"]
    everything = [test["p"] for test in result["tests"]]
    assert {test["measure"] for test in result["tests"]} >= {"gain", "fuzzing_gain"}
    smallest = min(result["tests"], key=lambda test: test["p"])
    assert smallest["p_holm"] == pytest.approx(len(everything) * smallest["p"], rel=1e-4)
    said = comparison_text(result)
    assert "Directions above MLP neurons" in said
    assert "Not found in detection above the wrong explanation's" in said
    verdicts = {verdict["measure"]: verdict["sentences"] for verdict in comparison_view(study)["tables"][0]["verdicts"]}
    for name in ("score", "score_all", "fuzzing"):
        (sentence,) = verdicts[MEASURES[name]]
        assert "Directions above MLP neurons" in sentence
        assert "Not found in" in sentence


def test_kinds_that_learned_from_unequal_text_get_no_verdict(tmp_path: Path) -> None:
    """The base model's directions, read on a third of what the others learned from; neurons on all but a twentieth."""
    study = make_study(tmp_path / "study")
    for source, tokens in (("adapter", 60), ("neurons", 57), ("base", 20)):
        write_store(study, np.ones((tokens, 1)), [tokens], corpus="train", source=source)
    for kind, prefix, score in (("direction", "", 0.8), ("neuron", "neuron.", 0.6), ("base", "base.", 0.6)):
        place = "7" if kind == "neuron" else "q"
        rows = [explained_row(f"{prefix}L{i}.{place}+", score + i / 1000) for i in range(12)]
        add_kind(study, kind, rows)
    result = compare(study, CONFIG, Options())
    assert the_test(result, "neuron", "score")["not_compared"] is None
    for measure in ("score", "gain", "fuzzing"):
        test = the_test(result, "base", measure)
        assert test["p_holm"] < 0.05  # it is kept, and not claimed
        said = test["not_compared"]
        assert said["tokens"] == [60, 20]
        assert said["run"] == f"lorascope record {study.path} --source base"
        assert verdict(test) == (
            "Directions and the directions on the base model: not compared, since explanations of the directions on "
            "the base model were learned from 20 ordinary tokens and not from 60."
        )
    text = comparison_text(result)
    assert "Directions above MLP neurons" in text
    assert "bove the directions on the base model" not in text
    again = "`lorascope explain --kinds base` with the earlier options and `lorascope compare` again"
    first = f"To compare the directions on the base model: `{said['run']}` on all training traces, "
    assert f"{first}then `lorascope examples`, {again}." in text


def test_what_explain_read_of_long_recordings_counts(tmp_path: Path) -> None:
    """Recordings of 60 and 20 tokens of which explain read 20 at most are equal; where it read fewer, it is to."""
    study = make_study(tmp_path / "study")
    for kind, source, tokens in (("direction", "adapter", 60), ("base", "base", 20)):
        write_store(study, np.ones((tokens, 1)), [tokens], corpus="train", source=source)
        rows = [explained_row(f"{'base.' * (kind == 'base')}L{i}.q+", 0.7 + i / 1000) for i in range(12)]
        add_kind(study, kind, rows)
        study.update_manifest(stages={f"explain:heldout:{kind}": {"config": {"max_tokens": 20}}})
    assert the_test(compare(study, CONFIG, Options()), "base", "score")["not_compared"] is None
    study.update_manifest(stages={"explain:heldout:base": {"config": {"max_tokens": 10}}})
    add_kind(study, "base", [explained_row(f"base.L{i}.q+", 0.6 + i / 1000) for i in range(12)])
    said = the_test(compare(study, CONFIG, Options()), "base", "score")["not_compared"]
    assert said["tokens"] == [20, 10]
    assert said["run"] == f"lorascope explain {study.path} --corpus heldout --kinds base --max-tokens 20"


def test_answers_that_were_not_read_are_counted_beside_the_scores(tmp_path: Path) -> None:
    """Of ten features, each 80 windows in detection and 80 in fuzzing, a tenth of the wrong one's answers failed."""
    study = make_study(tmp_path / "study")
    rows = [explained_row(f"L{i}.q+", 0.7 + i / 100, explainer="judge:m") for i in range(10)]
    for row in rows:
        row["scored"]["detection_wrong"]["unparsed"] = 16
        row["scored"]["detection"]["unparsed"] = 1
    add_kind(study, "direction", rows)
    add_kind(study, "latent", [explained_row(f"sae.{i}", 0.7 + i / 90, explainer="judge:m") for i in range(10)])
    result = compare(study, CONFIG, Options())
    row = row_of(result, "direction")
    assert row["unread"] == {
        "own": {"answers": 1600, "unread": 10, "share": 0.00625},
        "wrong": {"answers": 1600, "unread": 160, "share": 0.1},
        "shuffled": {"answers": 0, "unread": 0, "share": None},
    }
    assert (row["to_retry"], row_of(result, "latent")["unread"]["wrong"]["share"]) == (0, 0.0)
    said = "Of the scoring answers about directions were not read, and count as wrong: 10.0% with the wrong explanation"
    text = comparison_text(result)
    assert f"{said} (0.6% with their own)." in text
    assert "about latents" not in text


def test_features_that_are_asked_again_are_in_no_score(tmp_path: Path) -> None:
    """Eight features scored 0.7 or so, one of whose class alone is asked again, and two without scores yet."""
    study = make_study(tmp_path / "study")
    rows = [explained_row(f"L{i}.q+", 0.7 + i / 100, explainer="judge:m", **classed(0)) for i in range(8)]
    rows[0]["retry"] = True
    out = explained_row("L8.q+", 0.0, explainer="judge:m", retry=True, **classed(1))
    out["scored"] = {"detection": None, "fuzzing": None, "unfinished": {"detection": {"HTTP 500": 80}}}
    silent = explained_row("L9.q+", None, explainer="judge:m", retry=True)
    silent |= {"reason": "judge gave no explanation: time-out"}
    silent["class"] = {"class": None, "reason": None, "failure": "time-out"}
    add_kind(study, "direction", [*rows, out, silent])
    result = compare(study, CONFIG, Options())
    row = row_of(result, "direction")
    assert (row["n"], row["scored"], row["to_retry"]) == (10, 8, 2)
    assert row["failures"] == {"requests to the judge failed; they are asked again by the next explain": 2}
    assert row["score"]["value"] == pytest.approx(0.735)
    assert row["score_all"]["value"] == pytest.approx(0.735)  # an outage is no chance score either
    assert row["scored_share"]["value"] == 1
    assert row["unread"]["own"]["unread"] == 0
    assert row["classes"]["0"]["value"] == pytest.approx(8 / 9, rel=1e-5)
    assert row["classes"]["none"]["value"] == 0
    assert "Left out of the scores of directions: 2 of 10, whose requests failed" in comparison_text(result)


def test_a_comparison_of_an_earlier_version_is_made_again(tmp_path: Path) -> None:
    """Its record is of the same inputs, but its verdicts are of other tests."""
    study = make_study(tmp_path / "study")
    add_kind(study, "direction", [explained_row(f"L{i}.q+", 0.7 + i / 100) for i in range(5)])
    now = compare(study, CONFIG, Options())
    assert comparison_view(study)["outdated"] is None
    earlier = {name: value for name, value in now.items() if name != "method"}
    record = study.manifest["stages"]["compare"]
    study.update_manifest(stages={"compare": record | {"result": earlier}})
    write_json(study.path / "compare" / "compare.json", earlier)
    assert comparison_view(study)["outdated"] == f"lorascope compare {study.path} --corpus heldout"
    assert compare(study, CONFIG, Options()) == now
    assert comparison_view(study)["outdated"] is None
