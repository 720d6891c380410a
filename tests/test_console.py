"""What the reporter writes: lines, JSON objects, and the live line on a real terminal."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from job.console import Reporter, duration

ROOT = Path(__file__).resolve().parent.parent


GRID = ["data", "grid", "a.png", "--data", "sample"]  # a command that prints a result


def test_a_result_that_cannot_be_written_is_a_failure_of_storage() -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "job", *GRID], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert ended.returncode == 74, ended.stderr
    assert "cannot write to standard output: No space left on device" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_reader_that_has_gone_is_no_failure() -> None:
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run(
        [sys.executable, "-m", "job", *GRID], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that a test sets."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def steps(reporter: Reporter, done: int, **values: Any) -> None:
    reporter.progress(
        "epoch 2/3", done, 100, images_per_second=50.4, loss=1.25, **{"accuracy": 0.5, **values}
    )


def test_without_a_terminal_a_line_comes_at_least_every_minute(clock: list[float]) -> None:
    out = io.StringIO()
    reporter = Reporter("plain", out)
    for second in range(0, 301):
        clock[0] = 100.0 + second
        steps(reporter, 10 + second // 10)
    measures = "loss 1.2500, accuracy 0.5000, 50 images/s"
    one, two, *others = out.getvalue().splitlines()
    assert one == f"epoch 2/3, step 16/100: {measures}, about 14 min 0 s left in the epoch"
    assert two == f"epoch 2/3, step 22/100: {measures}, about 13 min 0 s left in the epoch"
    assert len(others) == 3


def test_another_line_starts_the_minute_anew(clock: list[float]) -> None:
    out = io.StringIO()
    reporter = Reporter("plain", out)
    clock[0] += 50
    reporter.note("something else")
    clock[0] += 50
    steps(reporter, 3)
    assert out.getvalue() == "something else\n"
    clock[0] += 10
    steps(reporter, 4)
    assert out.getvalue().count("\n") == 2


def test_json_lines_have_a_time_and_the_values(clock: list[float]) -> None:
    out = io.StringIO()
    reporter = Reporter("json", out)
    reporter.note("began", attempt=1)
    steps(reporter, 3)
    clock[0] += 61
    steps(reporter, 5, accuracy=None)
    logging.getLogger("job").warning("hm %d", 7)
    began, progress, warning = (json.loads(line) for line in out.getvalue().splitlines())
    for line in (began, progress, warning):
        told = datetime.fromisoformat(line.pop("timestamp"))
        assert told.utcoffset() == timedelta(0)
        assert abs(datetime.now(UTC) - told) < timedelta(minutes=5)
    assert began == {"severity": "INFO", "message": "began", "attempt": 1}
    assert warning == {"severity": "WARNING", "message": "hm 7"}
    assert progress.pop("message").startswith("epoch 2/3, step 5/100: loss 1.2500, 50 images/s, about")
    assert progress == {
        "severity": "INFO",
        "step": 5,
        "steps": 100,
        "loss": 1.25,
        "accuracy": None,
        "images_per_second": 50.4,
        "seconds_left": pytest.approx(61 / 2 * 95),
    }


def test_an_epoch_is_told_with_the_number_that_its_entry_has() -> None:
    out = io.StringIO()
    measures = {"loss": 0.5, "accuracy": 0.8, "images_per_second": 70.0}
    entry = {"epoch": 3, "step": 30, "train": measures, "validation": measures}
    Reporter("json", out).epoch(entry, 3, seconds_left=0)
    line = json.loads(out.getvalue())
    assert line["message"].startswith("epoch 3/3: loss 0.5000, accuracy 0.8000, validation loss 0.5000")
    assert (line["epoch"], line["step"]) == (3, 30)


def test_a_transfer_tells_its_end_and_is_otherwise_sparse(clock: list[float]) -> None:
    out = io.StringIO()
    reporter = Reporter("plain", out)
    for second in range(101):
        clock[0] = 100.0 + second
        reporter.transfer("file", 1_000_000 * second, 100_000_000)
    lines = out.getvalue().splitlines()
    assert lines == [
        "file: 30.0 of 100.0 MB, 1.0 MB/s, about 1 min 10 s left",
        "file: 60.0 of 100.0 MB, 1.0 MB/s, about 40 s left",
        "file: 90.0 of 100.0 MB, 1.0 MB/s, about 10 s left",
        "file: 100.0 of 100.0 MB, 1.0 MB/s",
    ]


# --- on a terminal

SCRIPT = """
import sys, time
from job.console import Reporter, log
reporter = Reporter()
for epoch in (1, 2):
    for step in range(1, 41):
        time.sleep(0.01)
        reporter.progress(f"epoch {epoch}/2", step, 40, images_per_second=69, loss=1.5, accuracy=0.25)
        if step == 30:
            log.warning("a warning")
    reporter.note("an epoch")
reporter.write("ERROR", "the end")
"""


def on_terminal(script: str, columns: int, kind: str = "xterm") -> str:
    """What a process writes to a terminal of so many columns."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "LINES": "24", "TERM": kind}
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stderr=follower, env=environment
    ) as child:
        os.close(follower)
        written = b""
        while True:
            try:
                block = os.read(leader, 65536)
            except OSError:  # how Linux ends a terminal
                break
            if not block:
                break
            written += block
    os.close(leader)
    assert child.returncode == 0
    return written.decode()


def screen(written: str) -> list[str]:
    """The lines that remain: a terminal that knows carriage return, erase line and cursor up."""
    lines, row = [""], 0
    for part in re.split(r"(\r\n|\n|\r|\x1b\[[0-9;?]*[A-Za-z])", written):
        if part in ("\r\n", "\n"):
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part == "\x1b[1A":
            row = max(0, row - 1)
        elif part and not part.startswith("\x1b") and part != "\r":
            lines[row] += part
    return [line.rstrip() for line in lines if line.strip()]


@pytest.mark.parametrize("columns", [110, 60, 30])
def test_the_live_line_fits_the_terminal_and_leaves_nothing(columns: int) -> None:
    written = on_terminal(SCRIPT, columns)
    told = ["WARNING: a warning", "an epoch", "WARNING: a warning", "an epoch", "the end"]
    assert screen(written) == told
    shown = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"\r\n|\r|\n", written)]
    assert max(map(len, shown)) <= columns
    live = [line for line in shown if line.startswith("epoch 1/2")]
    assert live
    assert all(word not in line for line in live for word in ("WARNING", "an epoch", "the end"))
    if columns == 110:
        assert re.search(r"\d+/40  loss 1\.5000, accuracy 0\.2500, 69 images/s", live[-1])
        assert re.search(r"\b\d\d:\d\d\b|--:--", live[-1])
    assert "\x1b[?25l" not in written  # who ends the process at once must not leave the cursor hidden


def test_a_terminal_that_cannot_redraw_gets_lines() -> None:
    lines = on_terminal(SCRIPT, 80, kind="dumb").split("\r\n")
    assert lines == ["WARNING: a warning", "an epoch", "WARNING: a warning", "an epoch", "the end", ""]


def test_durations_are_as_people_say_them() -> None:
    assert [duration(seconds) for seconds in (0.4, 42, 185, 7_800)] == [
        "0 s",
        "42 s",
        "3 min 5 s",
        "2 h 10 min",
    ]
