"""Addresses of the Live page: its state, loading the model, generating as server-sent events, and stopping."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from lorascope.errors import BadInput
from lorascope.studio.live import ENDS, Job, Live, read_request
from lorascope.views.reading import ready

QUIET = 1.0
"""Seconds without news after which a line is sent all the same, which finds out whether the page is still there."""


def add_live(app: Any, live: Live) -> None:
    """Register the addresses."""
    from fastapi import Body, Response
    from fastapi.responses import StreamingResponse

    def state() -> Response:
        return in_json(live.status())

    def open_model() -> Response:
        live.open()
        return in_json(live.status())

    def generate(body: dict[str, Any] = Body()) -> Response:  # noqa: B008 (FastAPI's way to name a body)
        try:
            job = live.submit(read_request(body))
        except BadInput as error:
            return in_json({"error": str(error)}, 400)
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(server_sent(live, job), media_type="text/event-stream", headers=headers)

    def stop(body: dict[str, Any] = Body()) -> Response:  # noqa: B008
        return in_json({"stopped": live.stop(str(body.get("id", "")))})

    def in_json(value: Any, status: int = 200) -> Response:
        return Response(json.dumps(value, allow_nan=False), status, media_type="application/json")

    routes: dict[str, tuple[Callable[..., Any], str]] = {
        "/live/state.json": (state, "GET"),
        "/live/open": (open_model, "POST"),
        "/live/generate": (generate, "POST"),
        "/live/stop": (stop, "POST"),
    }
    for path, (endpoint, method) in routes.items():
        app.add_api_route(path, endpoint, methods=[method], response_model=None)


async def server_sent(live: Live, job: Job) -> AsyncIterator[str]:
    """The events of a job as server-sent events; when the page goes away, the job stops.

    The engine's thread wakes it; an open stream holds no thread of its own.
    """
    loop, news = asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:
        with contextlib.suppress(RuntimeError):  # the server is being stopped: nobody listens any more
            loop.call_soon_threadsafe(news.set)

    job.wake = wake
    try:
        yield sent({"event": "queued", "id": job.id, "before": live.place_of(job)})
        while True:
            news.clear()
            for event in job.heard():
                yield sent(event)
                if event["event"] in ENDS:
                    return
            try:
                async with asyncio.timeout(QUIET):
                    await news.wait()
            except TimeoutError:
                if job.stopped.is_set() and live.running is not job:
                    yield sent({"event": "done", "stopped": True, "ended": {}, "tokens_per_second": 0.0})
                    return
                yield sent({"event": "waiting", "before": live.place_of(job)} | live.status())
    finally:
        live.stop(job.id)


def sent(event: dict[str, Any]) -> str:
    """One server-sent event; JSON has no line breaks, so a token's text cannot end it early."""
    return f"data: {json.dumps(ready(event), allow_nan=False)}\n\n"
