"""What the views say of reasoning features and of the lens equals the files they read."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lorascope.study import Study
from lorascope.views import feature_lens, feature_page, lens_view, reasoning_view
from lorascope.views.reasoning import ENOUGH, contrast_sentence, contrast_view
from report_study import LENS_TOKENS, make_report_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return make_report_study(tmp_path_factory.mktemp("views") / "study")


def test_reasoning_features_are_the_tables(study: Study) -> None:
    view = reasoning_view(study, top=3)
    assert [kind["kind"] for kind in view["kinds"]] == ["direction", "latent"]
    for kind in view["kinds"]:
        rows = pq.read_table(study.path / "reasoning" / "heldout" / f"{kind['kind']}.parquet").to_pylist()
        passed = sorted((row for row in rows if row["q"] <= view["level"]), key=lambda row: -row["score"])
        assert kind["significant"] == len(passed) > 0
        assert kind["features"] == len(rows)
        assert [row["feature"] for row in kind["rows"]] == [row["feature"] for row in passed[:3]]
    counts = [n for _, n in view["words"]]
    assert counts == sorted(counts, reverse=True)
    assert dict(view["words"])["let me"] == 40
    assert json.loads(json.dumps(view, allow_nan=False)) == view
    contrast = view["contrasts"][0]
    assert contrast["word"] == "let me"
    assert len(contrast["sentences"]) == 3
    assert contrast["sentences"][2].startswith("The model's own log p of the word was not measured (--model-logp)")


def test_contrasts_of_all_corpora_are_shown_and_one_that_can_be_made_is_named(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = reasoning_view(study)
    assert [contrast["corpus"] for contrast in view["contrasts"]] == ["heldout"]
    found = dict(view["words"])[view["example"]]
    assert (found >= ENOUGH, view["contrast_on"]) == (True, "heldout")
    monkeypatch.setattr("lorascope.views.reasoning.ENOUGH", found + 1)
    assert reasoning_view(study)["contrast_on"] == "train"
    made = study.path / "reasoning" / "heldout" / "contrast-let-me.json"
    other = study.path / "reasoning" / "train" / made.name
    other.parent.mkdir()
    other.write_text(made.read_text().replace('"corpus": "heldout"', '"corpus": "train"'))
    assert [contrast["corpus"] for contrast in reasoning_view(study)["contrasts"]] == ["heldout", "train"]
    shutil.rmtree(other.parent)


def test_a_measured_model_is_not_said_to_be_missing(study: Study, tmp_path: Path) -> None:
    made = json.loads((study.path / "reasoning" / "heldout" / "contrast-let-me.json").read_text())
    row = {"predictor": "the model's own log p", "baseline": "model", "feature": None, "kind": None}
    (tmp_path / "contrast.json").write_text(json.dumps(made | {"predictors": [*made["predictors"], row]}))
    assert not any("not measured" in said for said in contrast_view(tmp_path / "contrast.json")["sentences"])


def test_sentences_follow_the_intervals() -> None:
    clear, touching = {"value": 0.2, "low": 0.1, "high": 0.3}, {"value": 0.1, "low": -0.1, "high": 0.3}
    row = {"feature": "L1.q-", "candidates": 1200, "kind": "direction"}
    both = contrast_sentence(row | {"above": {"random": clear, "unigram": touching}})
    assert "L1.q−, the best of 1,200 direction features" in both
    assert "stands clear of the best of as many random features, not of the current token alone." in both
    none = contrast_sentence(row | {"above": {"random": touching, "model": None}})
    assert "does not stand clear of the best of as many random features or the model's own log p" in none
    assert contrast_sentence(row | {"above": {"random": clear}}).endswith("random features.")


def test_lens_of_a_feature(study: Study) -> None:
    (side,) = feature_lens(study, "L1.gate+", shown=2)
    assert side["side"] == "read"
    assert side["tokens"] == [{"text": LENS_TOKENS[0], "value": 4.0}, {"text": LENS_TOKENS[1], "value": 3.0}]
    assert [token["text"] for token in side["bottom"]] == LENS_TOKENS[::-1][:2]
    assert side["beyond_random"]
    assert not feature_lens(study, "L1.gate-")[0]["beyond_random"]
    assert feature_lens(study, "L0.q+") == []
    assert feature_page(study, "L2.down+")["lens"][0]["side"] == "write"
    view = lens_view(study)
    assert view["available"]
    # not corrected for how many there are, so what 5% of them would be stands beside
    assert view["sides"]["write"]["by_chance"] == pytest.approx(2.9)
    assert view["sides"]["read"] == {"features": 2, "beyond_random": 1, "by_chance": 0.1, "random_largest": 1.0}


def test_what_was_not_run_names_its_command(tmp_path: Path) -> None:
    study = Study.create(tmp_path / "s", model="tiny", system=None)
    assert "lorascope reasoning" in reasoning_view(study)["missing"]["own"]
    assert lens_view(study)["missing"]["own"] == f"lorascope lens {study.path}"
    assert feature_lens(study, "L0.o+") == []
