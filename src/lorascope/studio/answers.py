"""Answers and questions in JSON. Starlette is loaded inside functions."""

import json
from collections.abc import Callable
from typing import Any

Endpoint = Callable[..., Any]
"""What Starlette calls for an address: from its `Request` to its `Response`."""


def dumped(value: Any) -> bytes:
    """Compact JSON without NaN, as UTF-8.

    Raises:
        ValueError: a number or a text in it can be no part of that.
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def in_json(value: Any, status: int = 200) -> Any:
    """A response."""
    from starlette.responses import Response

    return Response(dumped(value), status, media_type="application/json")


def posted(act: Callable[[dict[str, Any]], Any]) -> Endpoint:
    """An endpoint that takes a JSON object to a response, in a thread: other pages go on meanwhile."""
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request

    async def answer(request: Request) -> Any:
        try:
            body = json.loads(await request.body())
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            return in_json({"error": "The body must be a JSON object."}, 400)
        return await run_in_threadpool(act, body)

    return answer
