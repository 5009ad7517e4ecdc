"""The Live page's engine: one model, loaded when the page asks for it, and one generation at a time.

Requests wait in a queue; one thread loads the model and works through it. A request's runs (the adapter as it is,
steered, a random control, the base model) go forward together, a token each in turn, to be read side by side.
"""

import contextlib
import itertools
import json
import queue
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorascope.config import Options
from lorascope.errors import BadInput, RunFailed
from lorascope.report.tokens import running_text
from lorascope.studio.notes import whole_text
from lorascope.study import Study
from lorascope.views.feature_list import feature_kind
from lorascope.views.kept import stamp
from lorascope.views.reading import json_file

Event = dict[str, Any]

RUNS = {
    "plain": "adapter",
    "steered": "adapter, steered",
    "control": "steered along random vectors",
    "base": "base model",
    "base_steered": "base model, steered",
}
MOVED = ("steered", "control", "base_steered")
"""Runs in which features are moved."""
TARGETS = {"control": "control", "base": "base", "base_steered": "base"}
"""What a run is steered on, where that is not the adapted model."""
LONGEST_PROMPT = 8_000
MOST_TOKENS = 2_048
MOST_FEATURES = 8
MOST_WAITING = 8
ENDS = ("done", "failed")
"""Events after which a job has nothing more to say."""
WEIGHTS = "adapter/adapter_model.safetensors"


@dataclass(frozen=True)
class Request:
    """What to generate."""

    prompt: str
    runs: tuple[str, ...] = ("plain",)
    steers: tuple[tuple[str, float, str], ...] = ()
    """(feature, amount, mode) of each move."""
    watch: tuple[str, ...] = ()
    where: str = "generated"
    max_new_tokens: int = 160
    temperature: float = 0.0
    seed: int = 0


@dataclass(eq=False)
class Job:
    """A request on its way, with what it has to say so far. Each is itself alone."""

    request: Request
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    events: "queue.SimpleQueue[Event]" = field(default_factory=queue.SimpleQueue)
    stopped: threading.Event = field(default_factory=threading.Event)
    wake: Callable[[], None] = lambda: None
    """Called in the engine's thread after every event, by whoever listens."""

    def say(self, event: Event) -> None:
        """Tell the page something."""
        self.events.put(event)
        self.wake()

    def heard(self) -> Iterator[Event]:
        """What was said since the last time."""
        with contextlib.suppress(queue.Empty):
            while True:
                yield self.events.get_nowait()


def read_request(body: Mapping[str, Any]) -> Request:
    """A request from a page's JSON.

    Raises:
        BadInput: something is missing, of the wrong type, or beyond the limits.
    """
    prompt, runs = body.get("prompt"), body.get("runs", ["plain"])
    if not isinstance(prompt, str) or not prompt.strip():
        raise BadInput("Type a prompt first.")
    if len(prompt) > LONGEST_PROMPT:
        raise BadInput(f"A prompt may have at most {LONGEST_PROMPT:,} characters.")
    if not whole_text(prompt):
        raise BadInput("The prompt holds half of a character (a lone surrogate); type that character again.")
    if not isinstance(runs, list) or not runs or not all(isinstance(run, str) and run in RUNS for run in runs):
        raise BadInput(f"Runs are some of {', '.join(RUNS)}.")
    steers, watch = body.get("steers", []), body.get("watch", [])
    if not isinstance(steers, list) or not isinstance(watch, list) or not all(isinstance(f, str) for f in watch):
        raise BadInput("Steers and watched features are lists.")
    if len(steers) > MOST_FEATURES:
        raise BadInput(f"At most {MOST_FEATURES} moves at once.")
    moves = tuple(read_move(move) for move in steers)
    watched = tuple(dict.fromkeys([*(feature for feature, _, _ in moves), *watch]))
    if len(watched) > MOST_FEATURES:
        raise BadInput(f"At most {MOST_FEATURES} features at once.")
    if not moves and any(run in MOVED for run in runs):
        raise BadInput("Choose how to steer a feature first, or leave out the steered runs.")
    return Request(
        prompt,
        tuple(run for run in RUNS if run in runs),
        moves,
        watched,
        "all" if body.get("where") == "all" else "generated",
        int(number_of(body, "max_new_tokens", 160, 1, MOST_TOKENS)),
        number_of(body, "temperature", 0.0, 0.0, 5.0),
        int(number_of(body, "seed", 0, 0, 2**31)),
    )


def read_move(move: Any) -> tuple[str, float, str]:
    """One move of a request as (feature, amount, mode)."""
    if not isinstance(move, dict) or not isinstance(move.get("feature"), str) or not isinstance(move.get("mode"), str):
        raise BadInput("A move has a feature, a mode and an amount.")
    return move["feature"], number_of(move, "amount", 0.0, -1e6, 1e6), move["mode"]


def number_of(body: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    """A number of a request within its limits."""
    value = body.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise BadInput(f"{name} is a number from {low:g} to {high:g}.")
    return value


class Live:
    """The model and its queue. Nothing is loaded until `open`."""

    def __init__(self, study: Study, options: Options) -> None:
        self.study, self.options = study, options
        self.phase, self.said, self.since = "closed", "", time.monotonic()
        self.waiting: list[Job] = []
        self.running: Job | None = None
        self.changed = threading.Condition()
        self.thread: threading.Thread | None = None

    def status(self) -> Event:
        """`{"phase", "said", "seconds", "queue": [{"id", "state", "prompt"}]}`; the phase is closed, loading, ready or
        failed."""
        with self.changed:
            jobs = ([("running", self.running)] if self.running else []) + [("waiting", job) for job in self.waiting]
            shown = [{"id": job.id, "state": state, "prompt": job.request.prompt[:60]} for state, job in jobs]
            seconds = round(time.monotonic() - self.since, 1)
            return {"phase": self.phase, "said": self.said, "seconds": seconds, "queue": shown}

    def open(self) -> None:
        """Begin to load the model, unless it is there or on its way."""
        with self.changed:
            if self.thread is None:
                self.enter("loading", "Loading the model")
                self.thread = threading.Thread(target=self.work, daemon=True)
                self.thread.start()

    def enter(self, phase: str, said: str) -> None:
        """Begin a phase."""
        with self.changed:
            self.phase, self.said, self.since = phase, said, time.monotonic()

    def submit(self, request: Request) -> Job:
        """Put a request into the queue.

        Raises:
            BadInput: too many are waiting.
        """
        with self.changed:
            if len(self.waiting) >= MOST_WAITING:
                raise BadInput("Too many generations are waiting; stop one, or try again soon.")
            job = Job(request)
            self.waiting.append(job)
            self.changed.notify_all()
            self.open()
            return job

    def stop(self, job_id: str) -> bool:
        """Stop a generation, running or waiting; whether it was there."""
        with self.changed:
            jobs = [job for job in [*self.waiting, self.running] if job is not None and job.id == job_id]
            for job in jobs:
                job.stopped.set()
            self.waiting = [job for job in self.waiting if not job.stopped.is_set()]
            return bool(jobs)

    def place_of(self, job: Job) -> int:
        """How many generations come before this one (0: it runs or is done)."""
        with self.changed:
            return self.waiting.index(job) + (self.running is not None) if job in self.waiting else 0

    def take(self) -> Job:
        """The next job, waiting for one."""
        with self.changed:
            while not self.waiting:
                self.changed.wait()
            self.running = self.waiting.pop(0)
            return self.running

    def work(self) -> None:
        """Load the model and serve jobs until something fails for good."""
        try:
            while True:
                self.serve_one_model()
        except Exception as error:
            self.fail(failed(error))

    def serve_one_model(self) -> None:
        """Serve jobs with one state of model and adapter; returns when the study has another one.

        The SAE, the examples and the way to render are read anew whenever they changed: stages may run while a page is
        open.
        """
        from lorascope.steering import open_bench, refreshed

        self.study.require(WEIGHTS, "lorascope train STUDY")
        model, features = model_state(self.study), feature_state(self.study)
        self.enter("loading", f"Loading {self.study.model_name}")
        with open_bench(self.study, self.options) as bench:
            self.enter("ready", "")
            while True:
                job = self.take()
                if model_state(self.study) != model:
                    with self.changed:
                        self.waiting.insert(0, job)
                        self.running = None
                    return
                try:
                    if (now := feature_state(self.study)) != features:
                        bench, features = refreshed(bench, self.study), now
                except Exception as error:
                    self.tell(job, failed(error))
                    continue
                for event in job_events(self.study, bench, job):
                    self.tell(job, event)

    def tell(self, job: Job, event: Event) -> None:
        """Have a job say something; at its end nothing runs any more before the page hears of it, so that it asks for
        no stale queue."""
        if event["event"] in ENDS:
            with self.changed:
                self.running = None
        job.say(event)

    def fail(self, event: Event) -> None:
        """Say to all that wait why nothing will come; who asks from now on has the model loaded anew."""
        with self.changed:
            self.enter("failed", event["error"])
            jobs = [*self.waiting, *([self.running] if self.running else [])]
            self.waiting, self.running, self.thread = [], None, None
        for job in jobs:
            job.say(event)


def model_state(study: Study) -> tuple[Any, ...]:
    """What changes whenever the loaded model is no longer the study's."""
    return study.model_name, stamps(study, "adapter/[!.]*"), stamps(study, "tokenizer/[!.]*")


def feature_state(study: Study) -> tuple[Any, ...]:
    """What changes whenever the features, their units or the rendering of prompts are no longer the study's."""
    manifest = study.manifest
    rendering = tuple(manifest[key] for key in ("system", "markup", "max_tokens", "too_long"))
    return rendering, stamps(study, "sae/[!.]*"), stamps(study, "examples/train/*-stats.parquet")


def stamps(study: Study, pattern: str) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of the study's files of a pattern."""
    found = []
    for path in sorted(study.path.glob(pattern)):
        with contextlib.suppress(OSError):  # being re-made
            found.append((path.name, *stamp(path)))
    return tuple(found)


def failed(error: Exception) -> Event:
    """The event that says why nothing more comes; of what nobody foresaw, the traceback goes to the terminal."""
    if isinstance(error, BadInput | RunFailed):
        return {"event": "failed", "error": str(error)}
    traceback.print_exception(error)
    return {"event": "failed", "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def job_events(study: Study, bench: Any, job: Job) -> Iterator[Event]:
    """What a page is told while its request is served: `start`, `token` of each run in turn, `done` or `failed`.

    Whatever goes wrong is this request's failure alone.
    """
    request = job.request
    streams: dict[str, Any] = {}
    try:
        streams = open_streams(bench, request)
        scales = {name: bench.panel.p99.get(name) for name in request.watch}
        runs = {run: RUNS[run] for run in request.runs}
        yield {"event": "start", "runs": runs, "scales": scales, "levels": levels_of(study, request.watch)}
        began, count, ended = time.monotonic(), 0, dict.fromkeys(request.runs, False)
        while streams and not job.stopped.is_set():
            for run in list(streams):
                token = next(streams[run], None)
                if token is None or token["end"]:
                    ended[run] = token is not None
                    del streams[run]
                else:
                    count += 1
                    yield {"event": "token", "run": run, "shown": running_text(token["text"])} | token
        rate = count / max(time.monotonic() - began, 1e-9)
    except Exception as error:
        yield failed(error)
        return
    finally:
        for stream in streams.values():
            stream.close()
    yield {"event": "done", "stopped": job.stopped.is_set(), "ended": ended, "tokens_per_second": round(rate, 2)}


def levels_of(study: Study, features: tuple[str, ...]) -> dict[str, float | None]:
    """The activation above which each feature fires, as on the other pages: 0 for a latent, None where not known."""
    known = json_file(study, "examples/levels.json") or {}
    default = {"latent": 0.0}
    kinds = {name: feature_kind(name) for name in features}
    return {name: known.get(kind, {}).get(name, default.get(kind)) for name, kind in kinds.items()}


def open_streams(bench: Any, request: Request) -> dict[str, Any]:
    """A stream of tokens per run, from one seed."""
    from lorascope.generation import Sampling
    from lorascope.steering import Steer, steer_stream

    ids = bench.renderer.prompt_ids(request.prompt)
    sampling = Sampling(request.max_new_tokens, temperature=request.temperature, seed=request.seed)
    moves = [Steer(feature, amount, mode) for feature, amount, mode in request.steers]
    return {
        run: steer_stream(
            bench,
            ids,
            steers=moves if run in MOVED else [],
            watch=request.watch,
            target=TARGETS.get(run, "adapter"),
            where=request.where,
            sampling=sampling,
        )
        for run in request.runs
    }


def sample_prompts(study: Study, count: int = 12) -> tuple[str, list[str]]:
    """A corpus, the held-out one or else the first there is, and the questions of its first traces."""
    corpora = study.corpora()
    for corpus in [name for name in ("heldout", *corpora) if name in corpora][:1]:
        path = study.corpus_file(corpus)
        if path.is_file():
            with path.open(encoding="utf-8") as file:
                questions = [str(json.loads(line).get("question") or "") for line in itertools.islice(file, count)]
            return corpus, [question for question in questions if question.strip()]
    return "", []
