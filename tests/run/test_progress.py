"""Progress off a terminal: plain lines with the time of day, and the log of a workdir."""

import json
import re

import pytest

from diq_jax import errors
from diq_jax.run import memory, progress


def test_lines_and_events_by_hand(tmp_path, capsys, monkeypatch):
    clock = iter([0.0, 10.0, 10.0, 40.0, 40.0, 40.0, 40.0, 45.0, 45.0, 45.0, 45.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    with progress.logged(tmp_path), progress.Progress("score", 100, resumed=20) as bar:
        bar.update(10, 500)
        bar.update(10, 700, loss="1.5")
    said = capsys.readouterr().err.splitlines()
    # 20 new examples in 40 s are 0.5 a second; 1,200 tokens are 30 a second; 60 are left: 120 s.
    line = "score: 40 of 100 (40%), 0.5 ex/s, 30 tok/s, left 0:02:00, loss 1.5"
    assert re.fullmatch(rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\S+ {re.escape(line)}", said[0])
    assert (tmp_path / progress.LOG).read_text().splitlines() == said
    events = [json.loads(line) for line in (tmp_path / progress.EVENTS).read_text().splitlines()]
    assert events[0] | {"time": ""} == {
        "time": "", "event": "progress", "name": "score", "done": 40, "total": 100,
        "examples_per_second": 0.5, "tokens_per_second": 30.0, "seconds_left": 120, "loss": "1.5",
    }  # fmt: skip
    assert len(said) == len(events) == 2  # the last when it ended


def test_a_log_is_appended_to_and_is_no_link(tmp_path):
    for line in ("one", "two"):
        with progress.logged(tmp_path):
            progress.note(line)
        progress.note("outside")
    lines = (tmp_path / progress.LOG).read_text().splitlines()
    assert [line.split(" ")[-1] for line in lines] == ["one", "two"]
    (tmp_path / progress.LOG).rename(tmp_path / "mine")
    (tmp_path / progress.LOG).symlink_to(tmp_path / "mine")
    with pytest.raises(errors.UserError, match=r"run\.log is a symbolic link"):
        with progress.logged(tmp_path):
            pass


def test_the_peak_begins_anew():
    block = bytearray(b"1" * 200 * 2**20)
    before = memory.peak_mib()["host"]
    del block
    if memory.CLEAR.exists():
        memory.forget_peak()
        assert memory.peak_mib()["host"] < before - 100
