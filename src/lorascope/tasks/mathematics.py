"""Free-form mathematics compared by math-verify, in a process of its own so that a comparison can be stopped.

math-verify stops long computations by a signal, which only works in a program's main thread. Here it runs without
its own limits in a worker that is ended, and started anew for the next comparison, when it takes too long.
"""

from __future__ import annotations

import atexit
import json
import re
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, SimpleQueue

from lorascope.errors import BadInput

_WORKER = Path(__file__).with_name("math_worker.py")
_START_SECONDS = 60.0
_SECONDS = 10.0

_lock = threading.Lock()
_running: tuple[subprocess.Popen[str], SimpleQueue[str]] | None = None


def same_mathematics(gold: str, answer: str) -> bool:
    """Whether two expressions (LaTeX or plain) mean the same; over 10 s of computing counts as no.

    Raises BadInput when math-verify is not installed.
    """
    if _bare(gold) == _bare(answer):
        return True
    bases, others = (re.findall(r"\d_\{?(\d+)", text) for text in (gold, answer))
    if bases and others and bases != others:  # math-verify reads 42_5 and 42_6 as 42
        return False
    require_mathematics()
    with _lock:
        return _ask(json.dumps([gold, answer]))


def require_mathematics() -> None:
    """Raises BadInput when math-verify is not installed."""
    if find_spec("math_verify") is None:
        raise BadInput("Free-form mathematics is scored by the math-verify package: pip install math-verify.")


def _bare(text: str) -> str:
    return re.sub(r"[\s$]|\\[,!; ]|\\left|\\right", "", text).replace("dfrac", "frac").rstrip(".")


def _ask(request: str) -> bool:
    process, answers = _worker()
    try:
        assert process.stdin is not None
        process.stdin.write(request + "\n")
        process.stdin.flush()
        return answers.get(timeout=_SECONDS) == "true"
    except (Empty, BrokenPipeError):
        _stop()
        return False


def _worker() -> tuple[subprocess.Popen[str], SimpleQueue[str]]:
    """The running worker, started when there is none; its first line says that it is ready."""
    global _running
    if _running is not None and _running[0].poll() is None:
        return _running
    process = subprocess.Popen(
        [sys.executable, "-P", str(_WORKER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
    )
    answers: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_listen, args=(process, answers), daemon=True).start()
    _running = (process, answers)
    try:
        ready = answers.get(timeout=_START_SECONDS)
    except Empty:
        ready = ""
    if ready != "ready":
        _stop()
        raise BadInput("math-verify does not start here: pip install --force-reinstall math-verify.")
    return _running


def _listen(process: subprocess.Popen[str], answers: SimpleQueue[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        answers.put(line.strip())


def _stop() -> None:
    global _running
    if _running is not None:
        process, _ = _running
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    continue
        _running = None


atexit.register(_stop)
