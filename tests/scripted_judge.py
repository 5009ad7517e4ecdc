"""A judge on a real socket: an HTTP server in a thread that answers by a Python function."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MARKED = re.compile(r"<<(.*?)>>", re.S)


@dataclass
class Said:
    """What the server sends back: an answer's text, or a status with a body."""

    text: str | None = ""
    finish: str = "stop"
    refusal: str | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: str | None = None
    delay: float = 0.0


@dataclass
class Scripted:
    """The server's address and everything it was asked; `answered` are the requests whose answer was sent whole."""

    url: str
    requests: list[dict[str, Any]]
    headers: list[dict[str, str]]
    answered: list[str]


@contextmanager
def scripted_judge(script: Callable[[dict[str, Any]], Said], *, keep: bool = True) -> Iterator[Scripted]:
    """Serve chat completions from a script. `keep` = False keeps no requests (for long runs)."""
    state = Scripted("", [], [], [])
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/chat/completions"
            with lock:
                if keep:
                    state.requests.append(request)
                    state.headers.append({name.lower(): value for name, value in self.headers.items()})
            said = script(request)
            time.sleep(said.delay)
            data = (said.body if said.body is not None else completion(said)).encode("utf-8", "surrogatepass")
            try:
                self.send_response(said.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                for name, value in said.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
            except OSError:  # the client gave up waiting
                return
            with lock:
                if keep:
                    state.answered.append(json.dumps(request, sort_keys=True))

        def log_message(self, *_: object) -> None:
            return

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, *_: object) -> None:
            return

    server = Server(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def completion(said: Said) -> str:
    """The body of a chat completion; half surrogates are sent as the escapes that some servers send."""
    message = {"role": "assistant", "content": said.text, "refusal": said.refusal}
    choice = {"index": 0, "finish_reason": said.finish, "message": message}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    return json.dumps(body)


def prompt_of(request: dict[str, Any]) -> tuple[str, str]:
    """(what is asked: explanation, class or confidence; the user's message)."""
    told, shown = (message["content"] for message in request["messages"])
    kinds = {'{"explanation"': "explanation", '{"reason"': "class", '{"confidence"': "confidence"}
    return next(kind for mark, kind in kinds.items() if mark in told), shown


def pieces_of(shown: str) -> list[tuple[str, str]]:
    """(segment, text) of each numbered piece in a prompt."""
    found = re.findall(r'^\d+\. \((\w+)\) (".*")$', shown, re.M)
    return [(segment, json.loads(text)) for segment, text in found]


def explanation_in(shown: str) -> str:
    """The explanation that a scoring prompt is about."""
    return str(json.loads(shown.split("as follows: ")[1].split("\n")[0]))


RULES = {
    "the word is": lambda text, _: " is" in text,
    "is after answer": lambda text, _: " answer is" in text,
    "numbers while thinking": lambda text, segment: segment == "think" and bool(re.search(r"\d", text)),
    "whatever follows Wait": lambda text, _: bool(re.search(r"Wait.", text, re.S)),
}
"""Explanations of the planted features (`planted_text.py`) and when a reader would say that they hold in a text."""

HOLDS_MARKED = {
    "the word is": lambda marked, _before, _segment: marked.replace(" is", "") == "",
    "is after answer": lambda marked, before, _segment: marked == " is" and before.endswith(" answer"),
    "numbers while thinking": lambda marked, _before, segment: segment == "think" and marked.isdigit(),
    "whatever follows Wait": lambda _marked, before, _segment: before.endswith("Wait"),
}
"""The same for one marked run of tokens with the text before it."""


def knowing_judge(request: dict[str, Any]) -> Said:
    """A judge that finds the planted features' explanations and follows an explanation to the letter."""
    kind, shown = prompt_of(request)
    if kind == "confidence":
        return Said(json.dumps({"confidence": confidences(shown)}))
    text = recognise(pieces_of(shown))
    if kind == "class":
        number = 2 if text == "no pattern" else 1 if text == "numbers while thinking" else 0
        return Said(json.dumps({"reason": f"It is {text}.", "class": number}))
    return Said(json.dumps({"explanation": text}))


def recognise(pieces: list[tuple[str, str]]) -> str:
    """The narrowest planted explanation that holds for every marked run of the pieces."""
    runs = [run for segment, text in pieces for run in marked_runs(text, segment)]
    for name in ("is after answer", "whatever follows Wait", "the word is", "numbers while thinking"):
        if runs and all(HOLDS_MARKED[name](*run) for run in runs if run[1] or name != "whatever follows Wait"):
            return name
    return "no pattern"


def marked_runs(text: str, segment: str) -> list[tuple[str, str, str]]:
    """(marked text, the text before it without marks, segment) of each marked run."""
    plain = [(m.group(1), MARKED.sub(r"\1", text[: m.start()])) for m in MARKED.finditer(text)]
    return [(marked, before, segment) for marked, before in plain]


def confidences(shown: str) -> list[int]:
    """Confidences of following the explanation to the letter: 9 where it holds, 1 where not, 5 if it says nothing."""
    name = explanation_in(shown)
    out = []
    for segment, text in pieces_of(shown):
        if name not in RULES:
            out.append(5)
        elif runs := marked_runs(text, segment):
            out.append(9 if all(HOLDS_MARKED[name](*run) for run in runs if run[1]) else 1)
        else:
            out.append(9 if RULES[name](text, segment) else 1)
    return out
