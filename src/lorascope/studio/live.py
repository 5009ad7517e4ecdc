"""The Live page's engine: one model, loaded when the page asks for it, and one generation at a time.

Requests wait in a queue; one thread loads the model and works through it. A request's runs (the adapter as it is,
steered, a random control, the base model) go forward together, a token each in turn, to be read side by side.
"""

import contextlib
import itertools
import queue
import threading
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorascope.config import Options
from lorascope.errors import BadInput, RunFailed
from lorascope.study import Study
from lorascope.views.kept import stamp

Event = dict[str, Any]

RUNS = {
    "plain": "adapter",
    "steered": "adapter, steered",
    "control": "steered along random vectors",
    "base": "base model",
}
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


@dataclass(frozen=True)
class Job:
    """A request on its way, with what it has to say so far."""

    request: Request
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    events: "queue.SimpleQueue[Event]" = field(default_factory=queue.SimpleQueue)
    stopped: threading.Event = field(default_factory=threading.Event)

    def next_event(self, seconds: float) -> Event | None:
        """The next thing to tell the page, None when there is none for so long."""
        with contextlib.suppress(queue.Empty):
            return self.events.get(timeout=seconds)
        return None


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
    if not isinstance(runs, list) or not runs or not all(run in RUNS for run in runs):
        raise BadInput(f"Runs are some of {', '.join(RUNS)}.")
    steers, watch = body.get("steers", []), body.get("watch", [])
    if not isinstance(steers, list) or not isinstance(watch, list) or not all(isinstance(f, str) for f in watch):
        raise BadInput("Steers and watched features are lists.")
    moves = tuple(read_move(move) for move in steers)
    watched = tuple(dict.fromkeys([*(feature for feature, _, _ in moves), *watch]))
    if len(watched) > MOST_FEATURES:
        raise BadInput(f"At most {MOST_FEATURES} features at once.")
    if not moves and any(run in ("steered", "control") for run in runs):
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
            if self.thread is None or not self.thread.is_alive():
                self.enter("loading", f"Loading {self.study.model_name}")
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
        except (BadInput, RunFailed) as error:
            self.fail(str(error))
        except Exception as error:
            traceback.print_exc()
            self.fail(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")

    def serve_one_model(self) -> None:
        """Serve jobs with one state of the adapter; returns when the study has another one."""
        from lorascope.steering import open_bench

        weights = self.study.require(WEIGHTS, "lorascope train STUDY")
        state = stamp(weights)
        self.enter("loading", f"Loading {self.study.model_name}")
        with open_bench(self.study, self.options) as bench:
            self.enter("ready", "")
            while True:
                job = self.take()
                if not weights.is_file() or stamp(weights) != state:
                    with self.changed:
                        self.waiting.insert(0, job)
                        self.running = None
                    return
                for event in job_events(bench, job):
                    if event["event"] in ENDS:
                        self.finish()  # before the page hears of it, so that it asks for no stale queue
                    job.events.put(event)

    def finish(self) -> None:
        """Nothing runs any more."""
        with self.changed:
            self.running = None

    def fail(self, text: str) -> None:
        """Say to all that wait why nothing will come."""
        with self.changed:
            self.enter("failed", text)
            jobs = [*self.waiting, *([self.running] if self.running else [])]
            self.waiting, self.running = [], None
        for job in jobs:
            job.events.put({"event": "failed", "error": text})


def job_events(bench: Any, job: Job) -> Iterator[Event]:
    """What a page is told while its request is served: `start`, `token` of each run in turn, `done` or `failed`."""
    request = job.request
    try:
        streams = open_streams(bench, request)
    except (BadInput, RunFailed) as error:
        yield {"event": "failed", "error": str(error)}
        return
    scales = {name: bench.panel.p99.get(name) for name in request.watch}
    yield {"event": "start", "runs": {run: RUNS[run] for run in request.runs}, "scales": scales}
    began, count, ended = time.monotonic(), 0, dict.fromkeys(request.runs, False)
    try:
        while streams and not job.stopped.is_set():
            for run in list(streams):
                token = next(streams[run], None)
                if token is None or token["end"]:
                    ended[run] = token is not None
                    del streams[run]
                else:
                    count += 1
                    yield {"event": "token", "run": run} | token
    except Exception as error:
        traceback.print_exc()
        yield {"event": "failed", "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        return
    finally:
        for stream in streams.values():
            stream.close()
    rate = count / max(time.monotonic() - began, 1e-9)
    yield {"event": "done", "stopped": job.stopped.is_set(), "ended": ended, "tokens_per_second": round(rate, 2)}


def open_streams(bench: Any, request: Request) -> dict[str, Any]:
    """A stream of tokens per run, from one seed."""
    from lorascope.generation import Sampling
    from lorascope.steering import Steer, steer_stream

    ids = bench.renderer.prompt_ids(request.prompt)
    sampling = Sampling(request.max_new_tokens, temperature=request.temperature, seed=request.seed)
    moves = [Steer(feature, amount, mode) for feature, amount, mode in request.steers]
    streams = {}
    for run in request.runs:
        steers = moves if run in ("steered", "control") else []
        target = run if run in ("control", "base") else "adapter"
        streams[run] = steer_stream(
            bench, ids, steers=steers, watch=request.watch, target=target, where=request.where, sampling=sampling
        )
    return streams


def sample_prompts(study: Study, count: int = 12) -> list[str]:
    """The questions of the first traces of the held-out corpus, or of the first there is."""
    import json

    corpora = study.corpora()
    for corpus in [name for name in ("heldout", *corpora) if name in corpora][:1]:
        path = study.corpus_file(corpus)
        if path.is_file():
            with path.open(encoding="utf-8") as file:
                return [str(json.loads(line).get("question") or "") for line in itertools.islice(file, count)]
    return []
