"""Every second since the process's start is counted, once."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import pytest

from job.run import stopwatch
from job.run.stopwatch import Stopwatch


@pytest.fixture
def now(monkeypatch: Any) -> list[float]:
    """A clock that the test sets; the process is 5 s old."""
    moment = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: moment[0])
    monkeypatch.setattr(time, "time", lambda: 1_000_000.0)
    monkeypatch.setattr(stopwatch, "seconds_since_start", lambda: 5.0)
    return moment


def test_each_second_is_of_the_innermost_kind(now: list[float]) -> None:
    watch = Stopwatch()
    now[0] += 2.0
    with watch.spending("training"):
        now[0] += 3.0
        with watch.spending("committing"):
            now[0] += 0.25
        now[0] += 1.0
    watch.switch("other")
    now[0] += 0.5
    spent = watch.spent(due=7.0, ended=True)
    assert (spent.starting, spent.training, spent.committing, spent.other) == (7.0, 4.0, 0.25, 0.5)
    assert spent.seconds == 11.75
    assert (spent.began, spent.due, spent.ended) == (999_995.0, 7.0, True)


def test_what_is_under_way_is_counted_and_not_twice(now: list[float]) -> None:
    watch = Stopwatch()
    with watch.spending("evaluation"):
        now[0] += 1.0
        assert watch.seconds("evaluation") == watch.spent().evaluation == 1.0
        now[0] += 1.0
    assert watch.seconds("evaluation") == watch.spent().evaluation == 2.0


def test_an_error_ends_its_kind(now: list[float]) -> None:
    watch = Stopwatch()
    with pytest.raises(KeyError), watch.spending("restoring"):
        raise KeyError
    now[0] += 1.0
    assert (watch.spent().restoring, watch.spent().starting) == (0.0, 6.0)


def test_a_process_is_as_old_as_its_parent_says() -> None:
    """Imports and the interpreter's own start included."""
    code = "import time; time.sleep(0.5)\nfrom job.run.processes import seconds_since_start as s; print(s())"
    before = time.monotonic()
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = float(process.stdout.readline())
        heard = time.monotonic()
    tick = 0.02  # the system counts in hundredths
    assert told <= heard - before + tick
    assert told >= 0.5 - tick
