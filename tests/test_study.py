"""The study: stages run once, are stale when inputs change, lock, record what they took; writes are atomic."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from lorascope import study as study_module
from lorascope.config import Options
from lorascope.errors import BadInput, MissingStage
from lorascope.study import Study, atomic_write_text, merged, whole_folder, write_json


@dataclass(frozen=True)
class Config:
    """A config."""

    k: int = 1
    """A number."""


@pytest.fixture
def study(tmp_path: Path) -> Study:
    study = Study.create(tmp_path / "s", model="m", system="Think.")
    (study.path / "in.txt").write_text("1")
    return study


def run(study: Study, calls: list[int], config: Config = Config(), **options: Any) -> dict[str, Any]:
    def work() -> dict[str, Any]:
        calls.append(1)
        (study.path / "out.txt").write_text("done")
        return {"n": len(calls)}

    return study.run("stage", config, Options(**options), inputs=["in.txt"], outputs=["out.txt"], work=work)


def test_a_stage_runs_once_until_something_that_matters_changes(study: Study) -> None:
    calls: list[int] = []
    assert run(study, calls) == run(study, calls) == {"n": 1}
    assert run(study, calls, threads=1, verbose=True) == {"n": 1}
    assert run(study, calls, seed=1) == {"n": 2}
    assert run(study, calls, Config(2), seed=1) == {"n": 3}
    (study.path / "in.txt").write_text("2")
    assert run(study, calls, Config(2), seed=1) == {"n": 4}
    (study.path / "out.txt").unlink()
    assert run(study, calls, Config(2), seed=1) == {"n": 5}


def test_a_record_says_what_it_took(study: Study) -> None:
    run(study, [])
    record = study.manifest["stages"]["stage"]
    assert record["config"] == {"k": 1}
    assert record["options"]["seed"] == 0
    assert record["seconds"] >= 0
    assert record["peak_rss"] > 10_000_000
    assert "torch" in record["versions"]
    assert study.summary["stages"]["stage"]["peak_rss"] == record["peak_rss"]


def test_status_names_what_is_stale_or_gone(study: Study) -> None:
    run(study, [])
    assert study.status()[0]["state"] == "done"
    (study.path / "in.txt").write_text("other")
    assert (study.status()[0]["state"], study.status()[0]["why"]) == ("stale", "in.txt changed")
    (study.path / "out.txt").unlink()
    assert (study.status()[0]["state"], study.status()[0]["why"]) == ("incomplete", "out.txt missing")


def test_a_failed_stage_leaves_no_record(study: Study) -> None:
    def work() -> dict[str, Any]:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        study.run("stage", Config(), Options(), inputs=[], outputs=[], work=work)
    assert study.manifest["stages"] == {}
    assert "did not finish" in (study.path / "log.txt").read_text()
    run(study, [])  # and the lock is free again


def test_two_commands_on_one_study_do_not_mix(study: Study) -> None:
    with FileLock(study.path / ".stage.lock"), pytest.raises(BadInput, match="wait for it to end"):
        run(study, [])


def test_folders_are_fingerprinted_by_names_and_contents(study: Study) -> None:
    folder = study.path / "f"
    folder.mkdir()
    (folder / "a").write_text("1")
    first = study.fingerprint("f")
    (folder / "a").rename(folder / "b")
    second = study.fingerprint("f")
    (folder / ".hidden").write_text("x")
    assert first != second == study.fingerprint("f")
    assert study.fingerprint("nothing") is None


def test_missing_stages_name_their_command(study: Study) -> None:
    with pytest.raises(MissingStage, match=f"lorascope record {study.path}"):
        study.require("scalars", "lorascope record STUDY")


@pytest.mark.parametrize("name", ["../x", "a/b", "", "a.b"])
def test_corpus_names_cannot_leave_the_study(study: Study, name: str) -> None:
    with pytest.raises(BadInput):
        study.corpus_file(name)


def test_existing_folders_newer_formats_and_damage_are_refused(study: Study, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="already exists"):
        Study.create(study.path, model="m", system=None)
    with pytest.raises(BadInput, match="is not a study"):
        Study.open(tmp_path)
    write_json(study.path / "study.json", study.manifest | {"format": 99})
    with pytest.raises(BadInput, match="newer lorascope"):
        Study.open(study.path)
    (study.path / "study.json").write_text("{")
    with pytest.raises(BadInput, match="damaged"):
        Study.open(study.path)


def test_writes_are_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    write_json(file, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(file, {"a": float("nan")})
    assert json.loads(file.read_text()) == {"a": 1}
    atomic_write_text(file, "new")
    assert file.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_summaries_merge_by_key(study: Study) -> None:
    assert merged({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}, "d": 4}) == {"a": {"b": 1, "c": 3}, "d": 4}
    study.summarise({"sae": {"l0": 16}})
    study.summarise({"sae": {"dead": 0}})
    assert study.summary["sae"] == {"l0": 16, "dead": 0}


def test_looking_at_a_study_needs_no_write(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    run(study, [])
    (study.path / ".fingerprints.json").unlink()

    def refuse(path: Path, text: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(study_module, "atomic_write_text", refuse)
    assert study.status()[0]["state"] == "done"
    assert not (study.path / ".fingerprints.json").exists()


def write_output(study: Study, stage: str, outputs: list[str]) -> None:
    def work() -> dict[str, Any]:
        for output in outputs:
            (study.path / output).parent.mkdir(exist_ok=True)
            (study.path / output).write_text(stage)
        return {"by": stage}

    study.run(stage, Config(), Options(), inputs=["in.txt"], outputs=outputs, work=work)


def test_a_record_whose_output_another_stage_wrote_over_is_dropped(study: Study) -> None:
    write_output(study, "cut:a,b", ["a.txt", "b.txt"])
    write_output(study, "other", ["c.txt"])
    write_output(study, "cut:a", ["a.txt"])
    assert [row["stage"] for row in study.status()] == ["other", "cut:a"]
    write_output(study, "cut:a,b", ["a.txt", "b.txt"])  # so it runs again, and is not up to date by an old record
    assert (study.path / "a.txt").read_text() == "cut:a,b"
    assert [row["stage"] for row in study.status()] == ["other", "cut:a,b"]


def test_a_file_that_several_kinds_fill_together_outdates_none_of_them(study: Study) -> None:
    for kind in ("direction", "latent"):
        write_output(study, f"examples:train:{kind}", [f"examples/{kind}.parquet", "examples/levels.json"])
    assert [row["stage"] for row in study.status()] == ["examples:train:direction", "examples:train:latent"]


def test_explainers_share_a_file_of_rows_but_not_each_others(study: Study) -> None:
    rows = "explanations/direction.jsonl"
    write_output(study, "explain:heldout:direction", [rows, "explanations/unscored/direction.jsonl"])
    write_output(study, "explain:heldout:direction:judge:m", [rows, "explanations/unscored/direction.m.jsonl"])
    assert len(study.manifest["stages"]) == 2
    write_output(study, "explain:more:direction", [rows, "explanations/unscored/direction.jsonl"])
    assert set(study.manifest["stages"]) == {"explain:heldout:direction:judge:m", "explain:more:direction"}


def test_an_expired_stage_runs_again_and_keeps_its_output_until_then(study: Study) -> None:
    calls: list[int] = []
    run(study, calls)
    study.expire("stage")
    study.expire("never run")
    assert (study.path / "out.txt").is_file()
    assert list(study.manifest["stages"]) == ["stage"]
    run(study, calls)
    run(study, calls)
    assert len(calls) == 2


def test_a_stage_runs_again_where_its_last_result_is_of_another_method(study: Study) -> None:
    calls: list[int] = []
    run(study, calls)
    made = study.manifest["stages"]["stage"]["result"].get("method")
    study.expire("stage", unless=[3, 1])
    run(study, calls)
    assert (made, len(calls)) == (None, 2)
    record = study.manifest["stages"]["stage"]
    study.update_manifest(stages={"stage": record | {"result": record["result"] | {"method": [3, 1]}}})
    study.expire("stage", unless=[3, 1])
    run(study, calls)
    assert len(calls) == 2


def test_a_stage_can_be_taken_back(study: Study) -> None:
    run(study, [])
    study.summarise({"kl": 1.0, "other": 2})
    study.forget("stage", "kl", "never there")
    assert study.manifest["stages"] == {}
    assert not (study.path / "out.txt").exists()
    assert study.summary == {"other": 2, "stages": {}}
    study.forget("stage")


def test_folders_are_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "full"
    leftover = tmp_path / ".full.tmp"
    leftover.mkdir()
    (leftover / "of-a-kill").touch()
    with whole_folder(folder) as new:
        (new / "a").write_text("1")
        assert not folder.exists()

    def cut_off() -> None:
        with whole_folder(folder) as new:
            (new / "a").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_off()
    assert [(p.name, p.read_text()) for p in folder.iterdir()] == [("a", "1")]
    with whole_folder(folder) as new:
        (new / "b").write_text("2")
    assert [(p.name, p.read_text()) for p in folder.iterdir()] == [("b", "2")]
    assert [p.name for p in tmp_path.iterdir()] == ["full"]
