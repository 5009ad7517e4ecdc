"""What the studio loads: its start and its pages do without torch, transformers, pandas and the stages."""

import json
import subprocess
import sys
from urllib.parse import quote

import pytest

from lorascope.studio.pages import PAGES
from lorascope.study import Study
from report_study import make_report_study

GATE = quote("L1.gate+", safe="")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = make_report_study(tmp_path_factory.mktemp("loading") / "study")
    file = study.path / "explanations" / "direction.jsonl"
    row = json.loads(file.read_text().splitlines()[0]) | {"explainer": "judge:m", "rule": None}
    with file.open("a") as rows:
        rows.write(json.dumps(row) + "\n")  # what a judge left unread is counted on the first page
    return study


def loaded_by(code: str, names: str, *arguments: str) -> str:
    """Which of the modules are loaded once the code has run in a process of its own."""
    code += f"\nimport sys; print(*[name for name in {names.split()} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_first_page_loads_nothing_that_explains(study: Study) -> None:
    """Taxonomies, judges and progress bars would be a fifth of the time until the studio answers."""
    code = """
import sys
from lorascope.studio.app import first_pages
from lorascope.study import Study

first_pages(Study.open(sys.argv[1]))
"""
    assert loaded_by(code, "lorascope.explain lorascope.sae yaml tqdm pandas", str(study.path)) == ""


def test_importing_the_studio_loads_no_model_and_no_web_framework() -> None:
    assert loaded_by("import lorascope.studio", "torch transformers starlette uvicorn") == ""


def test_pages_are_served_without_torch_transformers_and_pandas(study: Study) -> None:
    """They would take most of the time until the studio answers, and most of its memory."""
    code = """
import sys
from starlette.testclient import TestClient
from lorascope.config import Options
from lorascope.studio.app import environment, make_app
from lorascope.studio.warming import warm_up
from lorascope.study import Study

study = Study.open(sys.argv[1])
client = TestClient(make_app(study, Options()))
for path in sys.argv[2:]:
    assert client.get(path).status_code == 200, path
warm_up(study, environment().get_template, lambda: None)
"""
    pages = [page.path for page in PAGES if "{" not in page.path]
    paths = [*pages, f"/feature/{GATE}", "/feature/sae.0", f"/trace/train/0?features={GATE},sae.0"]
    assert loaded_by(code, "torch transformers pandas", str(study.path), *paths, "/fires/train/0/9.json") == ""
