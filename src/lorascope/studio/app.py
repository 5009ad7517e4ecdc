"""The application: addresses, templates, static files, what may be written. Starlette is loaded inside functions."""

import contextlib
import traceback
from collections.abc import Callable
from functools import cache, partial
from importlib import resources
from typing import Any
from urllib.parse import quote

import jinja2

from lorascope import __version__
from lorascope.config import Options
from lorascope.errors import BadInput, RunFailed
from lorascope.report.build import make_environment
from lorascope.report.flows import flow_chart
from lorascope.report.scatter import point_map
from lorascope.studio.answers import Endpoint, in_json, posted
from lorascope.studio.live import Live
from lorascope.studio.live_routes import live_routes
from lorascope.studio.notes import FILE, add_note, merge_notes
from lorascope.studio.pages import JSON_ONLY, PAGES, Page
from lorascope.studio.queries import BadQuery
from lorascope.study import Study, digest
from lorascope.views import provenance
from lorascope.views.kept import kept_view, study_state
from lorascope.views.one_feature import vocabulary_of
from lorascope.views.reading import warm_rows

KINDS_OF_FILE = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
SCRIPTS = "theme studio choosing painting features feature map trace live notes"
OWN_FILES = ["studio.css", "icon.svg", *(f"{name}.js" for name in SCRIPTS.split())]
STATIC = dict.fromkeys(("report.css", "shared.js"), "report") | dict.fromkeys(OWN_FILES, "studio/static")
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
    from starlette.applications import Starlette
    from starlette.routing import Route

    twins = {page.json_path: json_endpoint(study, page) for page in (*PAGES, *JSON_ONLY)}
    pages = {page.path: html_endpoint(study, page) for page in PAGES}
    shown = {"/static/{name}": static_file, "/state.json": lambda request: in_json({"state": state_of(study)})}
    routes = [Route(path, endpoint) for path, endpoint in (twins | pages | shown).items()]
    acting = note_routes(study) + live_routes(Live(study, options))
    routes += [Route(path, endpoint, methods=[method]) for path, method, endpoint in acting]
    return Starlette(routes=routes, exception_handlers=error_handlers(study))


@cache
def environment() -> jinja2.Environment:
    """The studio's templates, and those of the report that it shows parts of."""
    loaders = [jinja2.PackageLoader("lorascope.studio"), jinja2.PackageLoader("lorascope.report")]
    made = make_environment(jinja2.ChoiceLoader(loaders))
    made.globals["feature_url"] = feature_url
    made.globals["point_map"] = partial(point_map, traces="/trace/{corpus}")
    made.globals["flow_chart"] = partial(flow_chart, types="/features?kind=direction&type={}", thirds="/map")
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


def first_pages(study: Study) -> None:
    """Make the first page before anybody asks for it, and read what a feature's page, the next one, needs longest for.

    What is wrong with them, the pages themselves say.
    """
    first = PAGES[0]
    with contextlib.suppress(BadInput, RunFailed, OSError):
        render(study, first.template, first.path, first.view(study, {}, {}))
    with contextlib.suppress(BadInput, RunFailed, OSError):
        environment().get_template("feature_page.html.j2")
        vocabulary_of(study)
        warm_rows(study, "explanations/latent.jsonl")


def state_of(study: Study) -> str:
    """A short text that changes whenever a stage of the study ends."""
    return digest(study_state(study))[:16]


def outcome(error: Exception, changed: bool) -> tuple[int, str]:
    """Status and sentence for a view that could not be made; `changed`: a stage of the study ended meanwhile."""
    if changed:
        return 503, "The study changed while it was read; reload the page."
    if isinstance(error, BadInput):
        return 400 if isinstance(error, BadQuery) else 404, str(error)
    if isinstance(error, RunFailed):
        return 503, str(error)
    if isinstance(error, OSError):
        return 503, "The study cannot be read just now; it may be in the middle of being made."
    traceback.print_exception(error)
    return 500, f"{type(error).__name__}: the traceback is where lorascope studio runs."


def json_endpoint(study: Study, page: Page) -> Endpoint:
    """An endpoint that gives a page's content as JSON, errors as `{"error"}`."""
    from starlette.requests import Request

    def answer(request: Request) -> Any:
        before = study_state(study)
        try:
            return in_json(page.content(study, request.path_params, dict(request.query_params)))
        except Exception as error:
            status, said = outcome(error, study_state(study) != before)
            return in_json({"error": said}, status)

    return answer


def html_endpoint(study: Study, page: Page) -> Endpoint:
    """An endpoint that gives a view as a page, errors as a page that says what to do."""
    from starlette.requests import Request
    from starlette.responses import HTMLResponse

    def answer(request: Request) -> HTMLResponse:
        before = study_state(study)
        try:
            data = page.content(study, request.path_params, dict(request.query_params))
            return HTMLResponse(render(study, page.template, page.path, data))
        except Exception as error:
            status, text = outcome(error, study_state(study) != before)
            return HTMLResponse(render(study, "error_page.html.j2", "", {"status": status, "text": text}), status)

    return answer


def static_file(request: Any) -> Any:
    """A style sheet or script, from memory and by name."""
    from starlette.responses import Response

    name = request.path_params["name"]
    if name not in STATIC:
        return in_json({"error": "There is no such file."}, 404)
    text = static_text(name)
    tag = f'"{digest(text)[:16]}"'
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers={"etag": tag})
    return Response(text, media_type=KINDS_OF_FILE[name[name.rindex(".") :]], headers={"etag": tag})


@cache
def static_text(name: str) -> str:
    """The content of a static file."""
    return (resources.files("lorascope") / STATIC[name] / name).read_text(encoding="utf-8")


def note_routes(study: Study) -> list[tuple[str, str, Endpoint]]:
    """(address, method, endpoint) of writing, merging and exporting notes."""
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import Response

    def saved(save: Callable[[], dict[str, Any]]) -> Any:
        try:
            return in_json(save())
        except BadInput as error:
            return in_json({"error": str(error)}, 400)
        except RunFailed as error:
            return in_json({"error": str(error)}, 503)
        except OSError as error:
            return in_json({"error": f"The notes were not saved: {error.strerror or error}."}, 507)

    def write(event: dict[str, Any]) -> Any:
        place, field, value, before = (event.get(key) for key in ("place", "field", "value", "before"))
        return saved(lambda: add_note(study, place or "", field or "", value, before))

    async def merge(request: Request) -> Response:
        text = (await request.body()).decode("utf-8", "surrogateescape")
        # in a thread: somebody else may be writing, and other pages go on meanwhile
        return await run_in_threadpool(saved, lambda: merge_notes(study, text))

    def export(request: Request) -> Response:
        path = study.path / FILE
        content = path.read_bytes() if path.is_file() else b""
        headers = {"content-disposition": f'attachment; filename="{FILE}"'}
        return Response(content, media_type="application/x-ndjson", headers=headers)

    return [("/notes", "POST", posted(write)), ("/notes/merge", "POST", merge), ("/notes.jsonl", "GET", export)]


def error_handlers(study: Study) -> dict[Any, Callable[..., Any]]:
    """Addresses that do not exist, and bodies that were cut off at their limit, as sentences."""
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse

    def absent(request: Request, error: Exception) -> Any:
        status = getattr(error, "status_code", 404)
        text = "There is no such page." if status == 404 else "This cannot be done here."
        if request.url.path.endswith(".json") or request.method != "GET":
            return in_json({"error": text}, status)
        return HTMLResponse(render(study, "error_page.html.j2", "", {"status": status, "text": text}), status)

    def cut_off(request: Request, error: Exception) -> Any:
        return in_json({"error": "The request is too long."}, 413)

    return {404: absent, 405: absent, ClientDisconnect: cut_off}
