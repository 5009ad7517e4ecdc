"""Who may ask the studio for what: host and origin checks, the token, limits on bodies, and security headers.

A layer around the application in the ASGI interface; it knows nothing of the pages.
"""

import hashlib
import hmac
import ipaddress
import json
import secrets
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

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
    """Needed for everything: it comes with the first address and stays as a cookie, or stands in a header. None: no
    token is asked for."""

    @property
    def cookie(self) -> str:
        """The cookie's name, another for each token: cookies are shared by all ports of a host."""
        return f"lorascope-{hashlib.sha256(str(self.token).encode()).hexdigest()[:12]}"


def rules_for(host: str, *, token: bool = False) -> Rules:
    """The rules of a server that is bound to this host.

    Args:
        token: ask for a token on loopback too, where other users of this machine might come from.
    """
    local = {"localhost", "127.0.0.1", "::1"}
    secret = secrets.token_urlsafe(24)
    if is_loopback(host):
        return Rules(frozenset(local | {host}), True, secret if token else None)
    own = {host, socket.gethostname(), socket.getfqdn()}
    return Rules(frozenset(name.lower() for name in local | own if name), False, secret)


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
        if rules.token is not None:
            path, rest, given = without_token(scope["path"], scope["query_string"])
            if scope["method"] in SAFE and is_token(given, rules):
                await let_in(send, path, rest, rules)
                return
            if not any(is_token(one, rules) for one in tokens_of(headers, rules)):
                await answer(send, 401, "This studio needs its token: open the address that lorascope studio printed.")
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
    if method not in (*SAFE, "POST"):
        return 405, "The studio takes GET and POST."
    return None


def without_token(path: str, query: bytes) -> tuple[str, list[tuple[str, str]], str]:
    """The path as a Location may hold it, the query without its token, and the token."""
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    rest = [(name, value) for name, value in pairs if name != "token"]
    return "/" + quote(path.lstrip("/")), rest, dict(pairs).get("token", "")


def tokens_of(headers: dict[str, str], rules: Rules) -> list[str]:
    """Tokens that a request carries: in the header, and in this studio's cookie."""
    cookies = [pair.strip().partition("=") for pair in headers.get("cookie", "").split(";")]
    return [headers.get(TOKEN_HEADER, ""), *(value for name, _, value in cookies if name == rules.cookie)]


def is_token(given: str, rules: Rules) -> bool:
    """Whether this is the studio's token, compared in constant time."""
    return rules.token is not None and hmac.compare_digest(given.encode(), rules.token.encode())


async def let_in(send: Send, path: str, rest: list[tuple[str, str]], rules: Rules) -> None:
    """Keep the token as a cookie and go on to the address without it, which may then be shown and shared."""
    where = path + (f"?{urlencode(rest)}" if rest else "")
    kept = f"{rules.cookie}={rules.token}; Path=/; HttpOnly; SameSite=Lax"
    headers = [(b"location", where.encode()), (b"set-cookie", kept.encode()), (b"content-length", b"0")]
    secured = with_headers(send)
    await secured({"type": "http.response.start", "status": 303, "headers": headers})
    await secured({"type": "http.response.body", "body": b""})


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
