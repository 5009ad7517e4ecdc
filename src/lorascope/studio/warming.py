"""What a studio reads in the background during and after its start, so that the pages a reader comes to are ready.

It yields to readers: between its steps, each of which is short, it waits until nobody has asked for a moment.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial

from lorascope.errors import BadInput, MissingStage, RunFailed
from lorascope.features import KINDS
from lorascope.studio.guard import Application, Message, Receive, Send
from lorascope.studio.pages import PAGES, evidence_page, feature_view, features_page, map_page
from lorascope.study import Study
from lorascope.views.feature_list import decoder_effects
from lorascope.views.one_feature import open_features
from lorascope.views.reading import warm_rows

SWITCH = 0.0005
"""Seconds after which a thread lets another run: Python's own 0.005 add up for a page that waits at every file."""
PAUSE = 0.05
"""Seconds without a request before the next step: what belongs to a page is asked for right after it."""
FIRST = ("latent", "direction")
"""Kinds of features that readers go to from the overview."""
Step = Callable[[], object]


class Visits:
    """Requests that are being answered; the start of the server is as one."""

    def __init__(self) -> None:
        self.count = 0
        self.some, self.none = threading.Event(), threading.Event()

    def counted(self, application: Application) -> Application:
        """The application, whose requests are counted. It runs in the one thread of the server's loop."""

        async def serve(scope: Message, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await application(scope, receive, self.started(send))
                return
            self.count += 1
            self.none.clear()
            self.some.set()
            try:
                await application(scope, receive, send)
            finally:
                self.count -= 1
                if not self.count:
                    self.some.clear()
                    self.none.set()

        return serve

    def wait(self) -> None:
        """Return once the server has started and no request came for a moment."""
        self.none.wait()
        while self.some.wait(PAUSE):
            self.none.wait()

    def started(self, send: Send) -> Send:
        """`send` that hears when the server has started."""

        async def sent(message: Message) -> None:
            await send(message)
            if message["type"] == "lifespan.startup.complete":
                self.none.set()

        return sent


def read_examples(study: Study) -> None:
    """Read the examples of the features that readers go to first: Arrow does that without Python's lock."""
    for corpus in study.corpora():
        for kind in FIRST:
            with contextlib.suppress(BadInput, RunFailed, OSError):  # the page itself says what is wrong
                warm_rows(study, f"examples/{corpus}/{kind}-examples.parquet")


def warm_up(study: Study, load_template: Callable[[str], object], wait: Callable[[], object]) -> None:
    """Take all steps, waiting before each."""
    for step in steps(study, load_template):
        wait()
        with contextlib.suppress(MissingStage, BadInput, RunFailed, OSError):  # the page itself says what is wrong
            step()


def steps(study: Study, load_template: Callable[[str], object]) -> Iterator[Step]:
    """What pages need, in the order in which readers come to it; the map begins to measure what it needs of a store."""
    for kind in FIRST:
        yield from of_features(study, kind, "train")
    for page in PAGES:
        yield partial(load_template, page.template)
    yield partial(features_page, study, {}, {})
    for kind in FIRST:
        for corpus in study.corpora():
            yield from of_features(study, kind, corpus)
    yield partial(evidence_page, study, {}, {})
    yield partial(map_page, study, {}, {})
    for kind in KINDS:
        if kind not in FIRST:
            yield from of_features(study, kind, "train")


def of_features(study: Study, kind: str, corpus: str) -> Iterator[Step]:
    """What the page of a feature needs, piece by piece, and then one page."""

    def one_page() -> None:
        feature_view(study, {"feature": open_features(study, corpus, kind).ids[0]}, {"corpus": corpus})

    yield partial(open_features, study, corpus, kind)
    for relative in (
        f"examples/{corpus}/{kind}-examples.parquet",
        f"examples/{corpus}/{kind}-stats.parquet",
        f"explanations/{kind}.jsonl",
        f"categories/{kind}.jsonl",
    ):
        yield partial(warm_rows, study, relative)
    if kind == "latent":
        yield partial(decoder_effects, study)
    yield one_page
