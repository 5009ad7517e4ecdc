"""The demo from end to end on a tiny model: its stages fit together, and it ends with a report and its figures."""

from pathlib import Path

import pytest

from lorascope import demo
from lorascope.config import Options
from lorascope.creation import NewConfig, create_study
from lorascope.errors import BadInput
from lorascope.features import KINDS
from lorascope.study import Study, read_json
from tiny_folder import save_tiny


@pytest.mark.parametrize("quick", [False, True])
def test_every_stage_runs_and_the_report_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quick: bool
) -> None:
    # The sizes alone are smaller; the byte-level tokenizer makes long texts of short problems.
    for name, value in {"MODEL": str(save_tiny(tmp_path / "model")), "STEPS": 2, "BATCH": 6, "PROBLEMS": 8}.items():
        monkeypatch.setattr(demo, name, value)
    figures = demo.run_demo(tmp_path / "study", demo.DemoConfig(quick=quick), Options())
    assert Path(figures["report"]).stat().st_size > 10_000
    assert figures["problems"] == (4 if quick else 8)
    assert set(figures["accuracy"]) == {"base", "adapter"} | (set() if quick else {"full"})
    assert {"sae", "patched_kl", "detection"} <= set(figures)
    compared = read_json(tmp_path / "study" / "compare" / "compare.json")
    assert {row["kind"] for row in compared["rows"]} == set(KINDS)
    assert (compared["missing"], compared["stale"]) == ([], [])
    titles = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[")]
    assert len(titles) == 2 * (14 if quick else 15)
    again = demo.run_demo(tmp_path / "study", demo.DemoConfig(quick=quick), Options())
    assert again["accuracy"] == figures["accuracy"]
    assert not [row for row in Study.open(tmp_path / "study").status() if row["state"] != "done"]


@pytest.mark.parametrize("other", ["model", "traces", "begun"])
def test_a_study_of_something_else_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    model = save_tiny(tmp_path / "model")
    monkeypatch.setattr(demo, "MODEL", str(save_tiny(tmp_path / "another") if other == "model" else model))
    if other == "begun":
        Study.create(tmp_path / "study", model=str(model), system="")
    else:
        tasks = "tasks:sort" if other == "traces" else f"tasks:{demo.TASKS}"
        create_study(tmp_path / "study", NewConfig(str(model), tasks, train_problems=12), Options())
    before = Study.open(tmp_path / "study").manifest
    with pytest.raises(BadInput, match="not the demo's; name another folder"):
        demo.run_demo(tmp_path / "study", demo.DemoConfig(), Options())
    assert Study.open(tmp_path / "study").manifest == before
