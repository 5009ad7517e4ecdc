"""What is told to glibc, and by whom: a command, and never a judge that somebody builds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lorascope import heap
from lorascope.cli import main
from lorascope.explain.budget import Budget, Limits
from lorascope.explain.judges import Endpoint, Judge, open_log

SHARED = ("mallopt", heap.M_ARENA_MAX, 1)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str | int, ...]]:
    calls: list[tuple[str | int, ...]] = []
    monkeypatch.setattr(heap, "_tell_glibc", lambda *said: calls.append(said))
    return calls


@pytest.mark.parametrize(("command", "shared"), [("explain", True), ("categorize", True), ("status", False)])
def test_only_commands_that_may_ask_a_judge_share_a_heap(
    command: str, shared: bool, told: list[tuple[str | int, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err
    assert told == [SHARED] * shared


def test_a_judge_changes_nothing_of_the_process(told: list[tuple[str | int, ...]], tmp_path: Path) -> None:
    endpoint = Endpoint("m", "http://127.0.0.1:9/v1")
    log = open_log(tmp_path, endpoint)
    with Judge(endpoint, log, Budget(Limits()), 2):
        pass
    log.close()
    assert told == []


def test_without_glibc_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(heap.ctypes, "CDLL", asked.append)  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "platform", "linux")
    heap.return_freed()  # None, which `append` gives, has no `malloc_trim`: a Linux of another C library
    monkeypatch.setattr(sys, "platform", "darwin")
    heap.return_freed()
    heap.share_heap()
    assert asked == [None]
