"""The studio on a free port of this machine, in a thread, for tests that open it in a browser."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from lorascope.config import Options
from lorascope.studio.app import make_app
from lorascope.studio.guard import guarded, rules_for
from lorascope.studio.server import address_of, bind
from lorascope.study import Study


@contextmanager
def studio_at(study: Study) -> Iterator[str]:
    """The address of a running studio, without a slash at its end."""
    bound = bind("127.0.0.1", 0)
    app = guarded(make_app(study, Options(threads=1)), rules_for("127.0.0.1"))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield address_of("127.0.0.1", bound.getsockname()[1]).rstrip("/")
    server.should_exit = True
    thread.join(10)
