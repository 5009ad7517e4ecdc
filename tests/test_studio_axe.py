"""Accessibility of every page of the studio by axe-core, in light, dark and narrow; of its dialog and its errors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect
from safetensors.numpy import save_file

from lorascope.adapter import Adapter
from lorascope.views.effects import direction_effects
from report_study import make_report_study
from studio_server import studio_at

PAGES = (
    "/",
    "/map",
    "/features",
    "/feature/L1.gate%2B",
    "/feature/sae.1",
    "/compare?features=L1.gate%2B%2Csae.1%2CL99.q%2B",
    "/traces",
    "/trace/train/0?features=L1.gate%2B%2Csae.1#t12",
    "/evidence",
    "/categories",
    "/notes",
    "/live",
    "/nowhere",
)
LOOKS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light"},
    "dark": {"color_scheme": "dark"},
    "narrow": {"color_scheme": "light", "viewport": {"width": 360, "height": 800}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    study = make_report_study(tmp_path_factory.mktemp("axe") / "study")
    direction_effects(study, "train")  # else the map would reload once they are measured
    add_interactions(study.path)
    with studio_at(study) as address:
        yield address


def add_interactions(path: Path) -> None:
    names = Adapter.load(path / "adapter").addresses
    gradients = np.random.default_rng(0).normal(size=(8, len(names)))
    kl_NN = (gradients.T @ gradients).astype(np.float32)
    save_file({"kl_NN": kl_NN}, path / "ablation" / "interactions.safetensors", {"addresses": ",".join(names)})


def violations(page: Page) -> list[str]:
    found = Axe().run(page).response["violations"]
    return [f"{v['id']}: {node['target']} {node['failureSummary'][:200]}" for v in found for node in v["nodes"][:3]]


@pytest.mark.parametrize("path", PAGES)
@pytest.mark.parametrize("look", LOOKS)
def test_no_violations(browser: Browser, base: str, path: str, look: str) -> None:
    page = browser.new_context(**LOOKS[look]).new_page()
    page.goto(base + path)
    page.wait_for_load_state("networkidle")
    if path.startswith("/trace/"):
        expect(page.locator("#here h3").first).to_be_visible()  # the panel is filled
    assert violations(page) == []
    page.context.close()


@pytest.mark.parametrize("look", LOOKS)
def test_the_list_of_keys(browser: Browser, base: str, look: str) -> None:
    page = browser.new_context(**LOOKS[look]).new_page()
    page.goto(base + "/features")
    page.keyboard.press("?")
    expect(page.locator("#help")).to_be_visible()
    assert violations(page) == []
    page.context.close()
