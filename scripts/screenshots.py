"""Pictures of the studio's pages: `python scripts/screenshots.py STUDY [FOLDER]` writes `docs/studio-*.png`.

With `--all`, every page in light, dark and narrow, taller, for looking at.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

PORT = 8791
ROOT = Path(__file__).resolve().parents[1]
WIDE, TALL, NARROW = ({"width": w, "height": h} for w, h in ((1280, 860), (1280, 1700), (390, 1600)))


def pages(base: str) -> dict[str, str]:
    """Name and address of each page, features and traces that the study has."""

    def ask(path: str) -> dict:
        with urllib.request.urlopen(base + path) as answer:
            return json.load(answer)

    top = {kind: ask(f"/features.json?kind={kind}&sort={sort}&size=2")["rows"] for kind, sort in SORTS.items()}
    names = {kind: [urllib.request.quote(row["id"], safe="") for row in rows] for kind, rows in top.items()}
    direction, latent = names["direction"][0], names["latent"][0]
    together = f"{direction}%2C{latent}"
    return {
        "overview": "/",
        "map": "/map",
        "features": "/features?sort=kl",
        "direction": f"/feature/{direction}",
        "latent": f"/feature/{latent}",
        "compare": f"/compare?features={together}",
        "traces": "/traces",
        "trace": f"/trace/heldout/3?features={together}#t60",
        "categories": "/categories",
        "evidence": "/evidence",
        "notes": "/notes",
        "live": f"/live?features={together}",
        "missing": "/nowhere",
    }


SORTS = {"direction": "kl", "latent": "strength"}


def shoot(browser: Browser, base: str, address: str, file: Path, view: dict, scheme: str) -> None:
    """One picture; errors of the page's console are printed."""
    page = browser.new_context(viewport=view, color_scheme=scheme).new_page()
    page.on("console", lambda m: print(file.stem, m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: print(file.stem, error))
    page.goto(base + address)
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(400)
    if "/live" in address:
        generate(page)
    if page.evaluate("document.documentElement.scrollWidth > innerWidth"):
        print(file.stem, "scrolls sideways")
    page.screenshot(path=file)
    page.context.close()


def generate(page: Page) -> None:
    """Watch one feature, steer another, and wait for the answers."""
    page.locator("#moves select").last.select_option("add")
    page.locator('[name="run"][value="control"]').check()
    page.locator("#tokens").fill("48")
    page.locator("#go").click()
    page.locator("#said", has_text="Done").wait_for(timeout=300_000)
    page.evaluate("document.querySelector('#panels').scrollIntoView({block: 'end'})")
    page.wait_for_timeout(600)


def main() -> None:
    """Serve the study, take the pictures, stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "docs")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    base = f"http://127.0.0.1:{PORT}"
    command = [sys.executable, "-m", "lorascope", "studio", str(given.study), "--port", str(PORT), "--no-open"]
    server = subprocess.Popen(command)
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{base}/state.json")
                break
            except OSError:
                time.sleep(0.5)
        with sync_playwright() as playwright:
            path = os.environ.get("LORASCOPE_CHROMIUM")
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
            chosen = [name for name in given.only.split(",") if name]
            for name, address in pages(base).items():
                if chosen and name not in chosen:
                    continue
                if not given.all:
                    shoot(browser, base, address, given.folder / f"studio-{name}.png", WIDE, "light")
                    continue
                for kind, view, scheme in (
                    ("light", TALL, "light"),
                    ("dark", TALL, "dark"),
                    ("narrow", NARROW, "light"),
                ):
                    shoot(browser, base, address, given.folder / f"{name}-{kind}.png", view, scheme)
            browser.close()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
