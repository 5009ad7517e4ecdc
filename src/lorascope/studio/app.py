"""The application: addresses, templates, static files, and what may be written. FastAPI is loaded inside functions."""

import contextlib
import json
import traceback
from collections.abc import Callable
from functools import cache
from importlib import resources
from typing import Any
from urllib.parse import quote

import jinja2

from lorascope import __version__
from lorascope.config import Options
from lorascope.errors import BadInput, RunFailed
from lorascope.report.build import make_environment
from lorascope.studio.live import Live
from lorascope.studio.live_routes import add_live
from lorascope.studio.notes import FILE, add_note, merge_notes
from lorascope.studio.pages import JSON_ONLY, PAGES, Page
from lorascope.study import Study, digest
from lorascope.views import provenance
from lorascope.views.kept import kept_view, study_state

KINDS_OF_FILE = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
OWN_FILES = "studio.css icon.svg theme.js studio.js strip.js features.js feature.js map.js trace.js live.js notes.js"
STATIC = {"report.css": "report"} | dict.fromkeys(OWN_FILES.split(), "studio/static")
"""The files that are served, and the package folder of each; nothing else can be asked for."""
NAVIGATION = (
    ("/", "Overview"),
    ("/map", "Map"),
    ("/features", "Features"),
    ("/traces", "Traces"),
    ("/categories", "Categories"),
    ("/evidence", "Evidence"),
    ("/live", "Live"),
    ("/notes", "Notes"),
)


def make_app(study: Study, options: Options) -> Any:
    """The application of one study, without the guard around it."""
    from fastapi import FastAPI

    app = FastAPI(title="lorascope studio", openapi_url=None, docs_url=None, redoc_url=None)
    for page in PAGES:
        app.add_api_route(page.twin or f"{page.path}.json", json_endpoint(study, page.view), methods=["GET"])
    for path, view in JSON_ONLY.items():
        app.add_api_route(path, json_endpoint(study, view), methods=["GET"])
    for page in PAGES:
        app.add_api_route(page.path, html_endpoint(study, page), methods=["GET"])
    add_files(app)
    add_notes(app, study)
    add_live(app, Live(study, options))
    add_errors(app, study)
    return app


@cache
def environment() -> jinja2.Environment:
    """The studio's templates, and those of the report that it shows parts of."""
    loaders = [jinja2.PackageLoader("lorascope.studio"), jinja2.PackageLoader("lorascope.report")]
    made = make_environment(jinja2.ChoiceLoader(loaders))
    made.globals["feature_url"] = feature_url
    return made


def feature_url(feature: str, corpus: str = "train") -> str:
    """The address of a feature's page; every sign of its id is quoted."""
    return f"/feature/{quote(feature, safe='')}" + (f"?corpus={quote(corpus, safe='')}" if corpus != "train" else "")


def render(study: Study, template: str, here: str, data: dict[str, Any]) -> str:
    """A whole page."""
    shown = {
        "here": here,
        "navigation": NAVIGATION,
        "study_name": study.path.resolve().name,
        "study_path": str(study.path),
        "state": state_of(study),
        "old": old_stages(study),
        "version": __version__,
    }
    return environment().get_template(template).render(**(shown | data))


def old_stages(study: Study) -> list[str]:
    """Names of stages whose inputs changed since; none where the study cannot be read, which the page itself says."""
    with contextlib.suppress(BadInput, RunFailed, OSError):
        return list(kept_view(study, provenance)["old"])
    return []


def first_view(study: Study) -> None:
    """Make the first page once before anybody asks for it; what is wrong with it, the page itself says."""
    first = PAGES[0]
    with contextlib.suppress(BadInput, RunFailed, OSError):
        render(study, first.template, first.path, first.view(study, {}, {}))


def state_of(study: Study) -> str:
    """A short text that changes whenever a stage of the study ends."""
    return digest(study_state(study))[:16]


def outcome(error: Exception, changed: bool) -> tuple[int, str]:
    """Status and sentence for a view that could not be made; `changed`: a stage of the study ended meanwhile."""
    if changed:
        return 503, "The study changed while it was read; reload the page."
    if isinstance(error, BadInput):
        return 404, str(error)
    if isinstance(error, RunFailed):
        return 503, str(error)
    if isinstance(error, OSError):
        return 503, "The study cannot be read just now; it may be in the middle of being made."
    traceback.print_exception(error)
    return 500, f"{type(error).__name__}: the traceback is where lorascope studio runs."


def json_endpoint(study: Study, view: Callable[..., dict[str, Any]]) -> Callable[..., Any]:
    """An endpoint that gives a view as JSON, errors as `{"error"}`."""
    from fastapi import Request, Response

    def answer(request: Request) -> Response:
        before = study_state(study)
        try:
            status, text = 200, dumped(view(study, request.path_params, dict(request.query_params)))
        except Exception as error:
            status, said = outcome(error, study_state(study) != before)
            text = dumped({"error": said})
        return Response(text, status, media_type="application/json")

    return answer


def html_endpoint(study: Study, page: Page) -> Callable[..., Any]:
    """An endpoint that gives a view as a page, errors as a page that says what to do."""
    from fastapi import Request
    from fastapi.responses import HTMLResponse

    def answer(request: Request) -> HTMLResponse:
        before = study_state(study)
        try:
            data = page.view(study, request.path_params, dict(request.query_params))
            return HTMLResponse(render(study, page.template, page.path, data))
        except Exception as error:
            status, text = outcome(error, study_state(study) != before)
            return HTMLResponse(render(study, "error_page.html.j2", "", {"status": status, "text": text}), status)

    return answer


def dumped(value: Any) -> bytes:
    """Compact JSON without NaN, as UTF-8.

    Raises:
        ValueError: a number or a text in it can be no part of that.
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def add_files(app: Any) -> None:
    """Style sheets and scripts, from memory and by name."""
    from fastapi import Request, Response

    def static(name: str, request: Request) -> Response:
        if name not in STATIC:
            return Response(dumped({"error": "There is no such file."}), 404, media_type="application/json")
        text = static_text(name)
        tag = f'"{digest(text)[:16]}"'
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers={"etag": tag})
        kind = KINDS_OF_FILE[name[name.rindex(".") :]]
        return Response(text, media_type=kind, headers={"etag": tag})

    app.add_api_route("/static/{name}", static, methods=["GET"])


@cache
def static_text(name: str) -> str:
    """The content of a static file."""
    return (resources.files("lorascope") / STATIC[name] / name).read_text(encoding="utf-8")


def add_notes(app: Any, study: Study) -> None:
    """Writing, merging and exporting notes; and the state of the study."""
    from fastapi import Body, Request, Response
    from fastapi.concurrency import run_in_threadpool

    def state() -> dict[str, str]:
        return {"state": state_of(study)}

    def saved(save: Callable[[], dict[str, Any]]) -> Response:
        try:
            status, value = 200, save()
        except BadInput as error:
            status, value = 400, {"error": str(error)}
        except RunFailed as error:
            status, value = 503, {"error": str(error)}
        except OSError as error:
            status, value = 507, {"error": f"The notes were not saved: {error.strerror or error}."}
        return Response(dumped(value), status, media_type="application/json")

    def write(event: dict[str, Any] = Body()) -> Response:  # noqa: B008 (FastAPI's way to name a body)
        return saved(lambda: add_note(study, event.get("place", ""), event.get("field", ""), event.get("value")))

    async def merge(request: Request) -> Response:
        text = (await request.body()).decode("utf-8", "surrogateescape")
        # in a thread: somebody else may be writing, and other pages go on meanwhile
        return await run_in_threadpool(saved, lambda: merge_notes(study, text))

    def export() -> Response:
        path = study.path / FILE
        content = path.read_bytes() if path.is_file() else b""
        headers = {"content-disposition": f'attachment; filename="{FILE}"'}
        return Response(content, media_type="application/x-ndjson", headers=headers)

    app.add_api_route("/state.json", state, methods=["GET"])
    app.add_api_route("/notes", write, methods=["POST"])
    app.add_api_route("/notes/merge", merge, methods=["POST"])
    app.add_api_route("/notes.jsonl", export, methods=["GET"])


def add_errors(app: Any, study: Study) -> None:
    """Addresses that do not exist, and bodies that are no JSON object, as sentences."""
    from fastapi import Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse

    def absent(request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        text = "There is no such page." if status == 404 else "This cannot be done here."
        if request.url.path.endswith(".json") or request.method != "GET":
            return Response(dumped({"error": text}), status, media_type="application/json")
        return HTMLResponse(render(study, "error_page.html.j2", "", {"status": status, "text": text}), status)

    def malformed(request: Request, error: Exception) -> Response:
        return Response(dumped({"error": "The body must be a JSON object."}), 400, media_type="application/json")

    app.add_exception_handler(404, absent)
    app.add_exception_handler(405, absent)
    app.add_exception_handler(RequestValidationError, malformed)
