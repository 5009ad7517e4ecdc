"""Who may ask the studio for what: host and origin checks, the token, limits on bodies, and security headers.

A layer around the application in the ASGI interface; it knows nothing of the pages.
"""

import hmac
import ipaddress
import json
import secrets
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

BODY_LIMIT = 64 << 10
MERGE_LIMIT = 4 << 20
"""Another person's notes may be longer than what a page sends."""
LARGE_BODIES = ("/notes/merge",)
SAFE = ("GET", "HEAD")
TOKEN_HEADER = "x-lorascope-token"
POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


@dataclass(frozen=True)
class Rules:
    """What is let through."""

    hosts: frozenset[str]
    """Host names that requests may be addressed to; numeric addresses are also let through unless bound to loopback."""
    loopback: bool
    token: str | None
    """Needed for whatever writes or generates; None when bound to loopback."""


def rules_for(host: str) -> Rules:
    """The rules of a server that is bound to this host."""
    local = {"localhost", "127.0.0.1", "::1"}
    if is_loopback(host):
        return Rules(frozenset(local | {host}), True, None)
    own = {host, socket.gethostname(), socket.getfqdn()}
    return Rules(frozenset(name.lower() for name in local | own if name), False, secrets.token_urlsafe(24))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def guarded(application: Application, rules: Rules) -> Application:
    """The application behind the checks; refused requests never reach it."""

    async def serve(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the server's own start and stop; there are no websockets
            if scope["type"] == "lifespan":
                await application(scope, receive, send)
            return
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        if refused := reason_to_refuse(scope["method"], scope["path"], headers, rules):
            await answer(send, *refused)
            return
        limit = MERGE_LIMIT if scope["path"] in LARGE_BODIES else BODY_LIMIT
        await application(scope, limited(receive, limit), with_headers(send))

    return serve


def reason_to_refuse(method: str, path: str, headers: dict[str, str], rules: Rules) -> tuple[int, str] | None:
    """Status and sentence for a request that is not let through; None for one that is."""
    host = headers.get("host", "")
    if not host_allowed(host, rules):
        return 421, "This host name is not one of the studio's; open the address that lorascope studio printed."
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2].lower() != host.lower():
        return 403, "Another site's page may not talk to the studio."
    if headers.get("sec-fetch-site") == "cross-site" and method not in SAFE:
        return 403, "Another site's page may not talk to the studio."
    length = headers.get("content-length", "0")
    if not length.isdigit() or int(length) > (MERGE_LIMIT if path in LARGE_BODIES else BODY_LIMIT):
        return 413, "The request is too long."
    if method in SAFE:
        return None
    if method != "POST":
        return 405, "The studio takes GET and POST."
    given = headers.get(TOKEN_HEADER, "").encode()
    if rules.token is not None and not hmac.compare_digest(given, rules.token.encode()):
        return 401, "Writing and generating need the token: open the address that lorascope studio printed."
    return None


def host_allowed(host: str, rules: Rules) -> bool:
    """Whether a Host header names this server; any port, so that a forwarded port works."""
    name = host.lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.rpartition(":")[0] or name
    if name in rules.hosts:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return not rules.loopback  # no other site can have a number for its name


def limited(receive: Receive, limit: int) -> Receive:
    """`receive` that ends the connection once a body grows past the limit, whatever its declared length."""
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        return message if seen <= limit else {"type": "http.disconnect"}

    return counted


def with_headers(send: Send) -> Send:
    """`send` that adds the security headers to every response; a response's own header stands."""

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            present = {key.lower() for key, _ in message.get("headers", [])}
            added = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in present]
            message = {**message, "headers": [*message.get("headers", []), *added]}
        await send(message)

    return sent


async def answer(send: Send, status: int, text: str) -> None:
    """A short JSON response."""
    body = json.dumps({"error": text}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    secured = with_headers(send)
    await secured({"type": "http.response.start", "status": status, "headers": headers})
    await secured({"type": "http.response.body", "body": body})
