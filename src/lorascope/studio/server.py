"""`lorascope studio`: the web server, bound to this machine unless told otherwise."""

import contextlib
import gc
import os
import socket
import sys
import threading
import webbrowser
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import util
from typing import Any

from lorascope.config import Options
from lorascope.errors import BadInput
from lorascope.studio.guard import guarded, rules_for
from lorascope.study import Study

FIRST_PORT, TRIES = 8700, 20


@dataclass(frozen=True)
class StudioConfig:
    """Open the study in the browser: map, features, traces, notes, and the model live."""

    host: str = "127.0.0.1"
    """Address to bind to; any other than loopback asks for a token, which is in the address that is printed."""
    port: int = 0
    """Port to listen on (default: the first free one from 8700)."""
    open: bool = True
    """Open a browser window; not in an SSH session, nor with --token: others can read a browser's command line."""
    token: bool = False
    """Ask for a token on loopback too: on a machine that others use, their programs reach loopback as well."""


def serve(study: Study, config: StudioConfig, options: Options) -> dict[str, Any]:
    """Serve the study until interrupted; `{"url"}`.

    Raises:
        BadInput: what serves pages is not installed, or the address cannot be bound.
    """
    if not all(util.find_spec(name) for name in ("starlette", "uvicorn")):
        raise BadInput("The studio needs the packages starlette and uvicorn: pip install starlette uvicorn.")
    import uvicorn

    from lorascope.studio.app import environment, first_pages, make_app
    from lorascope.studio.warming import SWITCH, Visits, read_examples, warm_up

    bound = bind(config.host, config.port)
    port = bound.getsockname()[1]
    rules = rules_for(config.host, token=config.token)
    query = f"?token={rules.token}" if rules.token else ""
    url = address_of(config.host, port)
    threading.Thread(target=read_examples, args=(study,), daemon=True).start()
    with without_collection():
        first_pages(study)
    print(f"The studio of {study.path} is at {url}{query} (stop with Ctrl-C).", file=sys.stderr)
    connection = os.environ.get("SSH_CONNECTION", "")
    for line in ways_in(config.host, port, query, connection):
        print(line, file=sys.stderr)
    sys.stderr.flush()
    sys.setswitchinterval(SWITCH)
    visits = Visits()
    prepare = (study, environment().get_template, visits.wait)
    threading.Thread(target=warm_up, args=prepare, daemon=True).start()
    if config.open and not connection and not config.token:
        threading.Timer(0.5, webbrowser.open, (url + query,)).start()
    settings = uvicorn.Config(
        visits.counted(guarded(make_app(study, options), rules)),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    with contextlib.suppress(KeyboardInterrupt):  # the usual end
        uvicorn.Server(settings).run(sockets=[bound])
    return {"url": url}


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """What is read here stays: looking for cycles in it would take a fifth of the start, and later delay pages."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


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


def ways_in(host: str, port: int, query: str, connection: str) -> list[str]:
    """Sentences on how else to reach the studio: from other machines, and through an SSH session.

    Args:
        query: what carries the token, "" without one.
        connection: the variable SSH_CONNECTION: client, its port, server, its port; "" outside a session.
    """
    lines = []
    if host in ("0.0.0.0", "::"):
        lines.append(f"From other machines it is at {address_of(socket.gethostname(), port)}{query}")
    if len(parts := connection.split()) == 4:
        near = address_of(host, port).removeprefix("http://").rstrip("/")
        user = os.environ.get("USER", "")
        lines.append(f"On your own machine: ssh -N -L {port}:{near} {user}{'@' if user else ''}{parts[2]}")
        lines.append(f"and there open http://127.0.0.1:{port}/{query}")
    return lines
