"""Pictures of the studio's pages: `python scripts/screenshots.py STUDY [FOLDER]` writes `docs/studio-*.png`.

The pages of `SHOWN` in light; those of `LOOKED_AT` also as `-dark` and `-narrow`. With `--all`, every page in
light, dark and narrow, taller, for looking at.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
SIZES = ((1280, 860), (1280, 1180), (1280, 1700), (390, 1600))
WIDE, HIGH, TALL, NARROW = ({"width": w, "height": h} for w, h in SIZES)
SHOWN = (
    *("overview", "map", "features", "direction", "latent", "trace", "live"),
    *("traces", "compare", "categories", "evidence"),
)
LOOKED_AT = ("overview", "map", "features", "direction", "latent", "trace", "live")
SORTS = {"direction": "kl", "latent": "strength"}


def pages(base: str) -> dict[str, str]:
    """Name and address of each page, features and traces that the study has."""

    def ask(path: str) -> dict:
        with urllib.request.urlopen(base + path) as answer:
            return json.load(answer)

    def strongest(feature: str, colours: str) -> str:
        """The trace in which a feature is strongest, of the held-out ones where it has examples there."""
        corpora = ask(f"/feature/{feature}.json")["corpora"]
        for corpus in sorted(corpora, key=lambda name: name != "heldout"):
            page = ask(f"/feature/{feature}.json?corpus={corpus}")
            if page["available"] and (top := page["sides"][0]["examples"].get("top")):
                return f"/trace/{corpus}/{top[0]['trace']}?features={colours}#t{top[0]['position']}"
        raise SystemExit(f"{feature} has no examples; run lorascope examples.")

    top = {kind: ask(f"/features.json?kind={kind}&sort={sort}&size=1")["rows"] for kind, sort in SORTS.items()}
    if not all(top.values()):
        raise SystemExit("The study has no examples of directions and latents; run lorascope demo.")
    direction, latent = (urllib.request.quote(top[kind][0]["id"], safe="") for kind in SORTS)
    together = f"{direction}%2C{latent}"
    return {
        "overview": "/",
        "map": "/map",
        "features": "/features?sort=kl",
        "direction": f"/feature/{direction}",
        "latent": f"/feature/{latent}",
        "compare": f"/compare?features={together}",
        "traces": "/traces",
        "trace": strongest(direction, together),
        "categories": "/categories",
        "evidence": "/evidence",
        "notes": "/notes",
        "live": f"/live?features={together}",
        "missing": "/nowhere",
    }


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
    page.mouse.move(0, 0)  # or what it points at would be told over the text
    page.evaluate("document.querySelector('#panels').scrollIntoView({block: 'end'})")
    page.wait_for_timeout(600)


def shots(name: str, folder: Path, everything: bool) -> list[tuple[Path, dict, str]]:
    """File, size and colour scheme of each picture of a page."""
    if everything:
        looks = (("light", TALL, "light"), ("dark", TALL, "dark"), ("narrow", NARROW, "light"))
        return [(folder / f"{name}-{kind}.png", view, scheme) for kind, view, scheme in looks]
    wide = HIGH if name == "live" else WIDE  # the prompt and all answers in one picture
    first = [(folder / f"studio-{name}.png", wide, "light")] if name in SHOWN else []
    looks = (("dark", wide, "dark"), ("narrow", NARROW, "light")) if name in LOOKED_AT else ()
    return first + [(folder / f"studio-{name}-{kind}.png", view, scheme) for kind, view, scheme in looks]


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        return bound.getsockname()[1]


def main() -> None:
    """Serve the study, take the pictures, stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "docs")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--only", default="", help="names of pages, comma-separated")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "lorascope", "studio", str(given.study), "--port", str(port), "--no-open"]
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
                if not chosen or name in chosen:
                    for file, view, scheme in shots(name, given.folder, given.all):
                        shoot(browser, base, address, file, view, scheme)
            browser.close()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
