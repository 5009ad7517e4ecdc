"""The file of a judge's answers: what is found in it again, and what a kill leaves of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorascope.errors import RunFailed
from lorascope.explain.judge_log import JudgeLog


def test_half_a_line_is_cut_away_and_a_damaged_one_named(tmp_path: Path) -> None:
    file = tmp_path / "judges" / "m.jsonl"
    log = JudgeLog(file)
    for k in range(3):
        log.append({"key": f"{k:016x}" + "0" * 16, "failure": None, "text": f"日本\u2028{k}"})
    log.close()
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:20])
    log = JudgeLog(file)
    assert file.read_bytes() == whole
    found = log.find(f"{1:016x}" + "0" * 16)
    missing = [log.find(f"{9:016x}" + "0" * 16), log.find(f"{1:016x}" + "1" * 16)]
    log.close()
    assert found is not None
    assert found["text"] == "日本\u20281"
    assert missing == [None, None]
    file.write_bytes(b"{}\n" + whole)
    with pytest.raises(RunFailed, match="line 1 is damaged"):
        JudgeLog(file)
