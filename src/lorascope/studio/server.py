"""`lorascope studio`: the web server, bound to this machine unless told otherwise."""

import contextlib
import socket
import sys
import threading
import webbrowser
from dataclasses import dataclass
from importlib import util
from typing import Any

from lorascope.config import Options
from lorascope.errors import BadInput
from lorascope.studio.guard import guarded, rules_for
from lorascope.study import Study

FIRST_PORT, TRIES = 8700, 20
LATER = 1.5
"""Seconds that the first page has for itself before the others are prepared."""


@dataclass(frozen=True)
class StudioConfig:
    """Open the study in the browser: map, features, traces, notes, and the model live."""

    host: str = "127.0.0.1"
    """Address to bind to; any other than loopback asks for a token wherever something is written or generated."""
    port: int = 0
    """Port to listen on (default: the first free one from 8700)."""
    open: bool = True
    """Open a browser window."""


def serve(study: Study, config: StudioConfig, options: Options) -> dict[str, Any]:
    """Serve the study until interrupted; `{"url"}`.

    Raises:
        BadInput: the extra `web` is not installed, or the address cannot be bound.
    """
    if not all(util.find_spec(name) for name in ("fastapi", "uvicorn")):
        raise BadInput('The studio needs the extra "web"; install it with: pip install "lorascope[web]".')
    import uvicorn

    from lorascope.studio.app import first_view, make_app
    from lorascope.studio.pages import warm_up

    bound = bind(config.host, config.port)
    rules = rules_for(config.host)
    url = address_of(config.host, bound.getsockname()[1])
    shown = url + (f"#token={rules.token}" if rules.token else "")
    first_view(study)
    print(f"The studio of {study.path} is at {shown} (stop with Ctrl-C).", file=sys.stderr, flush=True)
    later = threading.Timer(LATER, warm_up, (study,))
    later.daemon = True
    later.start()
    if config.open:
        threading.Timer(0.5, webbrowser.open, (shown,)).start()
    settings = uvicorn.Config(
        guarded(make_app(study, options), rules),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    with contextlib.suppress(KeyboardInterrupt):  # the usual end
        uvicorn.Server(settings).run(sockets=[bound])
    return {"url": url}


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; without a port, on the first free one.

    Raises:
        BadInput: the port is taken, or the address is not this machine's.
    """
    if not 0 <= port < 1 << 16:
        raise BadInput(f"--port must be between 0 and 65535, not {port}.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    wanted = [port] if port else [*range(FIRST_PORT, FIRST_PORT + TRIES), 0]
    for number in wanted:
        try:
            return socket.create_server((host, number), family=family)
        except (OSError, UnicodeError) as error:
            trouble = error
    raise BadInput(f"Cannot listen on {host}:{port} ({trouble}); choose another --host or --port.") from trouble


def address_of(host: str, port: int) -> str:
    """The address to open, for hosts that stand for all addresses the local one."""
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{port}/"
