"""What every test gets: no hub, one thread, and a browser where one is asked for."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from lorascope.study import Study


@pytest.fixture(scope="session")
def chromium_path() -> str:
    """A Chromium that starts; `make test` finds or installs it. Its absence is a failure, never a skip."""
    path = os.environ.get("LORASCOPE_CHROMIUM")
    if not path:
        pytest.fail("Browser tests need a Chromium: run make test, or set LORASCOPE_CHROMIUM to one.")
    return path


@pytest.fixture(scope="module")
def browser(chromium_path: str) -> Iterator[Browser]:
    """A headless Chromium for the tests of one file."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def real_study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The built-in model with a strong adapter, recorded."""
    from real_model import make_real_study

    return make_real_study(tmp_path_factory.mktemp("recorded") / "study")
