"""Addresses of the Live page: its state, loading the model, generating as server-sent events, and stopping."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from lorascope.errors import BadInput
from lorascope.studio.answers import Endpoint, in_json, posted
from lorascope.studio.live import ENDS, Job, Live, read_request
from lorascope.views.reading import ready

QUIET = 1.0
"""Seconds without news after which a line is sent all the same, which finds out whether the page is still there."""


def live_routes(live: Live) -> list[tuple[str, str, Endpoint]]:
    """(address, method, endpoint) of each."""
    from starlette.responses import StreamingResponse

    def state(request: Any) -> Any:
        return in_json(live.status())

    def open_model(request: Any) -> Any:
        live.open()
        return in_json(live.status())

    def generate(body: dict[str, Any]) -> Any:
        try:
            job = live.submit(read_request(body))
        except BadInput as error:
            return in_json({"error": str(error)}, 400)
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(server_sent(live, job), media_type="text/event-stream", headers=headers)

    def stop(body: dict[str, Any]) -> Any:
        return in_json({"stopped": live.stop(str(body.get("id", "")))})

    return [
        ("/live/state.json", "GET", state),
        ("/live/open", "POST", open_model),
        ("/live/generate", "POST", posted(generate)),
        ("/live/stop", "POST", posted(stop)),
    ]


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
