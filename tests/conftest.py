"""What every test gets: no network, one thread, and a browser where one is asked for."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


@pytest.fixture(scope="session")
def chromium_path() -> str:
    """A Chromium that starts; `make test` finds or installs it. Its absence is a failure, never a skip."""
    path = os.environ.get("LORASCOPE_CHROMIUM")
    if not path:
        pytest.fail("Browser tests need a Chromium: run make test, or set LORASCOPE_CHROMIUM to one.")
    return path
