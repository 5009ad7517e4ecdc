"""Accessibility of every page of the studio by axe-core, in light and dark."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser
from safetensors.numpy import save_file

from lorascope.adapter import Adapter
from report_study import make_report_study
from studio_server import studio_at

PAGES = (
    "/",
    "/map",
    "/features",
    "/feature/L1.gate%2B",
    "/feature/sae.1",
    "/compare?features=L1.gate%2B%2Csae.1",
    "/traces",
    "/trace/train/0?features=L1.gate%2B%2Csae.1#t12",
    "/evidence",
    "/categories",
    "/notes",
    "/live",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    study = make_report_study(tmp_path_factory.mktemp("axe") / "study")
    add_interactions(study.path)
    with studio_at(study) as address:
        yield address


def add_interactions(path: Path) -> None:
    names = Adapter.load(path / "adapter").addresses
    gradients = np.random.default_rng(0).normal(size=(8, len(names)))
    kl_NN = (gradients.T @ gradients).astype(np.float32)
    save_file({"kl_NN": kl_NN}, path / "ablation" / "interactions.safetensors", {"addresses": ",".join(names)})


@pytest.mark.parametrize("path", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_violations(browser: Browser, base: str, path: str, scheme: str) -> None:
    page = browser.new_context(color_scheme=scheme).new_page()
    page.goto(base + path)
    page.wait_for_load_state("networkidle")
    found = Axe().run(page).response["violations"]
    said = [f"{v['id']}: {node['target']} {node['failureSummary'][:200]}" for v in found for node in v["nodes"][:3]]
    assert said == []
    page.context.close()
