"""What the studio prepares in the background, and that it waits for readers."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from lorascope.studio.warming import Visits, read_examples, steps, warm_up
from lorascope.study import Study
from lorascope.views import reading
from lorascope.views.one_feature import open_features
from lorascope.views.reading import feature_rows
from report_study import make_report_study


def test_preparation_waits_while_anybody_is_answered() -> None:
    visits = Visits()
    during: list[bool] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await send({"type": "lifespan.startup.complete"})
        else:
            during.append(visits.none.is_set())
            if scope["path"] == "/fails":
                raise ValueError

    async def send(message: Any) -> None:
        during.append(visits.none.is_set())

    async def ask(scope: Any) -> None:
        await visits.counted(application)(scope, None, send)  # type: ignore[arg-type]

    waiting = threading.Thread(target=visits.wait, daemon=True)
    waiting.start()
    assert waiting.is_alive(), "the server has not started"
    asyncio.run(ask({"type": "lifespan"}))
    waiting.join(10)
    assert not waiting.is_alive()
    for path in ("/", "/fails"):
        try:
            asyncio.run(ask({"type": "http", "path": path}))
        except ValueError:
            assert path == "/fails"
        assert visits.none.is_set()
        assert not visits.some.is_set()
    assert during == [False, False, False]


def test_examples_are_read_beside_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_report_study(tmp_path / "study")
    (study.path / "examples/train/latent-examples.parquet").write_bytes(b"damaged")
    read_examples(study)  # what is damaged keeps nothing else from being read
    monkeypatch.setattr(reading, "read_table", None)
    for corpus, kind in (("train", "direction"), ("heldout", "latent"), ("heldout", "direction")):
        feature = open_features(study, corpus, kind).ids[0]
        assert feature_rows(study, f"examples/{corpus}/{kind}-examples.parquet", feature) is not None


def test_every_step_waits_and_none_stops_the_others(tmp_path: Path) -> None:
    made = make_report_study(tmp_path / "study")
    for study in (made, Study.create(tmp_path / "empty", model="tiny", system=None)):
        waited: list[int] = []
        warm_up(study, lambda name: None, lambda waited=waited: waited.append(1))  # type: ignore[misc]
        assert len(waited) == len(list(steps(study, lambda name: None)))
